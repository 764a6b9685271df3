# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: who has an image open, and an image in a moment when nothing changes."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import typing as t

from .._base.errors import Qcow2Error
from .._qcow2.image import Image, read_image
from . import locks

_LOOKS = 20  # at an image whose header is being changed, 10 ms apart


def is_open_for_writing(fd: int, path: str) -> bool:
    """Whether a VM or a tool has the open image open for writing."""
    if locks.is_locked_by_qemu(fd, locks.WRITE, path):
        return True
    status = os.fstat(fd)
    # Of a device there can be several nodes, each with locks of its own: libvirt gives every VM a /dev of its own.
    return stat.S_ISBLK(status.st_mode) and _device_is_written(status.st_rdev)


def _device_is_written(device: int) -> bool:
    """Whether any process has a node of this block device open for writing, as far as this user may see."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to see
            for number in os.listdir(f"/proc/{process}/fd"):
                status = os.stat(f"/proc/{process}/fd/{number}")
                if stat.S_ISBLK(status.st_mode) and status.st_rdev == device and _is_writable(process, number):
                    return True
    return False


def _is_writable(process: str, number: str) -> bool:
    """Whether a process has this descriptor open for writing (proc_pid_fdinfo(5), flags)."""
    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii") as file:
        flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_RDONLY


class _Look(t.NamedTuple):
    """What one look at an image shows."""

    image: Image
    live_before: bool  # a process had it open for writing before it was read
    live_after: bool
    at_work: bool  # a run of this collection has the image locked, which looks like a process that has it open

    @property
    def is_plain(self) -> bool:
        """Whether nothing hints at somebody who is opening or closing the image just now."""
        bitmaps_fit = self.live_after or not any(bitmap.inconsistent for bitmap in self.image.bitmaps)
        is_still = self.live_before == self.live_after and not self.at_work
        return is_still and bitmaps_fit and not self.image.lost_bitmaps


def _look(fd: int, path: str) -> _Look:
    """Read the image between two questions for its locks."""
    live_before = locks.is_locked(fd, locks.WRITE, path)
    image = read_image(fd, path)
    live_after = locks.is_locked(fd, locks.WRITE, path)
    return _Look(
        image, live_before, live_after, (live_before or live_after) and locks.is_locked(fd, locks.OUR_TURN, path)
    )


def read_settled(fd: int, path: str) -> tuple[Image, bool]:
    """Return the open image and whether a process has it open for writing, from a moment when nothing changes in it.

    While a QEMU opens or closes an image it declares the bitmaps worthless for a moment, and then writes them anew.
    """
    seen: _Look | None = None
    error: Qcow2Error | None = None
    for _attempt in range(_LOOKS):
        previous = seen
        try:
            seen, error = _look(fd, path), None
        except Qcow2Error as exc:
            seen, error = None, exc
            if not locks.is_locked(fd, locks.WRITE, path):
                raise
        if seen is not None and (seen.is_plain or (seen == previous and not seen.live_after)):
            break
        time.sleep(0.01)
    if seen is None:
        raise error or Qcow2Error(f"{path}: cannot be read.")
    return seen.image, seen.live_before or seen.live_after
