# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: whether a file system can have two files share their extents, as XFS and btrfs can."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import typing as t

from .._base.files import close

_FICLONERANGE = 0x4020940D  # Linux, ioctl_ficlonerange(2)
_RANGE = struct.Struct("@qQQQ")  # struct file_clone_range: fd, offset, length, offset in the other file


def shares_extents(paths: t.Sequence[str], unit: int) -> bool:
    """Whether `unit` bytes of one of these files can be shared with another: asked by doing so with files of ours.

    They have no name, so nothing is left of them. A file system shares no less than a block of its own.
    """
    if len({os.stat(path).st_dev for path in paths}) != 1:
        return False
    folder = os.path.dirname(paths[0])
    try:
        with _nameless(folder) as one, _nameless(folder) as other:
            for offset in range(3):  # in the middle, since the end of a file may lie within a block
                os.pwrite(one, b"\1" * unit, offset * unit)
            fcntl.ioctl(other, _FICLONERANGE, _RANGE.pack(one, unit, unit, unit))
    except OSError:  # not every file system has files without a name; those that share extents do
        return False
    return True


@contextlib.contextmanager
def _nameless(folder: str) -> t.Iterator[int]:
    """Have a new file without a name for the block."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        close(fd)
