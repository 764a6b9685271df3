# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Keep: that the merge of an image was begun while its VM ran, in a file beside it.

From then on the image below is not what it was at the snapshot, and the images do not tell. The hypervisor's job can
be given up, end with the VM, or go on without us. So the sign is there before the job, and goes after the image.
"""

from __future__ import annotations

import contextlib
import os

from .._base.files import OpenImage, close
from .publish import StagedFile, open_to_list, publish_over

_SUFFIX = ".kvmfleet-merging"


def leave_sign(file: OpenImage) -> None:
    """Say beside the open image that its merge is begun; the sign is on stable storage then."""
    place = _place_of(file.path)
    with StagedFile(place, os.path.dirname(place)) as staged:
        os.write(staged.file.fd, _words_of(file))
        os.fsync(staged.file.fd)
        publish_over(staged)


def find_sign(file: OpenImage) -> str | None:
    """Return the path of the sign that the merge of this very image was begun; None if there is none."""
    place = _place_of(file.path)
    with contextlib.suppress(FileNotFoundError), open(place, "rb") as sign:
        if sign.read() == _words_of(file):  # else it is of an image that had the name before
            return place
    return None


def remove_sign(real_path: str) -> None:
    """Remove the sign of an image that has gone."""
    place = _place_of(real_path)
    if not os.path.lexists(place):
        return
    folder_fd, _folder = open_to_list(os.path.dirname(place))
    try:
        os.unlink(os.path.basename(place), dir_fd=folder_fd)
        os.fsync(folder_fd)
    finally:
        close(folder_fd)


def _place_of(path: str) -> str:
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}{_SUFFIX}")


def _words_of(file: OpenImage) -> bytes:
    """Return what the sign holds: the inode alone, since devices can have other numbers once the host was restarted."""
    return b"%d\n" % file.identity[1]
