# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Keep: that the merge of an image was begun while its VM ran, in a file beside it.

From then on the image below is not what it was at the snapshot, and the images do not tell. The hypervisor's job can
be given up, end with the VM, or go on without us. So the sign is there before the job, and goes when the image is
retired. It tells whether a job of this very image was begun, or only one of another disk of the VM: a job without such
a sign is somebody else's.
"""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage, close, identity_of, is_ours, is_there, read_note, real_path
from .._qcow2.chain import read_head
from .publish import StagedFile, check_owner, open_to_list, publish_over

_SUFFIX = ".kvmfleet-merging"
_HAS_JOB = b"job\n"
_LONGEST = 100  # bytes of the name of the image, which may be as long as a name can be


def check_owner_of_signs(files: t.Iterable[OpenImage]) -> None:
    """Refuse if the sign of one of these images would not be ours, so that no later run would trust it."""
    for file in files:
        check_owner(_place_of(file, file.path))


def leave_sign(file: OpenImage, *, has_job: bool = True) -> None:
    """Say beside the open image that its merge is begun; the sign is on stable storage then.

    Without `has_job` only the merge of another disk of the VM is; a sign that is there already stays. Refusal if
    another run has merged the image down and retired it meanwhile; then no sign is left.
    """
    place = _place_of(file, file.path)
    if has_job or not is_there(place):
        _write_sign(place, _HAS_JOB if has_job else b"")
    if _remove_if_lost(file, place):
        why = "was merged down or moved meanwhile, most likely by another run"
        raise Refusal("changed_meanwhile", file.path, why, "Run this again.")


def end_job(file: OpenImage) -> None:
    """Say that no job of the open image is there any more; its sign stays as long as it, since data may be below."""
    if has_begun_job(file):
        place = _place_of(file, file.path)
        _write_sign(place, b"")
        _remove_if_lost(file, place)


def has_begun_job(file: OpenImage) -> bool:
    """Return whether an earlier run has begun a job of this very image; what another user says of that counts not."""
    return read_note(_place_of(file, file.path), len(_HAS_JOB)) == _HAS_JOB


def stranger_with_sign(file: OpenImage) -> int | None:
    """Return the user, neither root nor we, whose sign of this very image tells us nothing; None if there is none."""
    with contextlib.suppress(OSError):
        status = os.lstat(_place_of(file, file.path))
        return None if is_ours(status) else status.st_uid
    return None


def find_sign(file: OpenImage) -> str | None:
    """Return the path of the sign that the merge of this very image was begun; None if there is none.

    An image that was copied with its sign, as to another storage, has another inode. It bears the mark of an overlay
    that this collection has made, and of those that it makes anew it removes the signs of the name.
    """
    place = _place_of(file, file.path)
    if is_there(place):
        return place
    copied = _signs_of_name(file.path)
    return copied[0] if copied and _bears_mark(file) else None


def remove_signs(file: OpenImage, path: str) -> None:
    """Remove the sign of an open image whose place is this path, if there is one, and those of others that had it."""
    for place in (_place_of(file, path), *_signs_of_name(path)):
        _remove(place)


def _signs_of_name(path: str) -> list[str]:
    """Return the signs of all images that had this name, whatever their inodes were."""
    folder, name = os.path.split(real_path(path))
    if len(os.fsencode(name)) > _LONGEST:  # another image can begin with the same
        return []
    begin = f".{name}."
    found = [one for one in os.listdir(folder) if one.startswith(begin) and one.endswith(_SUFFIX)]
    return sorted(os.path.join(folder, one) for one in found if one[len(begin) : -len(_SUFFIX)].isdigit())


def _bears_mark(file: OpenImage) -> bool:
    with contextlib.suppress(Refusal):
        return read_head(file).mark is not None
    return False


def _remove(place: str) -> None:
    """Remove the sign at this place, if there is one."""
    if not is_there(place):
        return
    folder_fd, _folder = open_to_list(os.path.dirname(place))
    try:
        with contextlib.suppress(FileNotFoundError):  # another run does so, too
            os.unlink(os.path.basename(place), dir_fd=folder_fd)
        os.fsync(folder_fd)
    finally:
        close(folder_fd)


def _write_sign(place: str, text: bytes) -> None:
    """Put a sign at this place, over one that is there; it is on stable storage then."""
    with StagedFile(place, os.path.dirname(place)) as staged:
        os.write(staged.file.fd, text)
        os.fsync(staged.file.fd)
        publish_over(staged)


def _remove_if_lost(file: OpenImage, place: str) -> bool:
    """Remove a sign whose image does not stand at its path any more; return whether that was so.

    Whoever retires the image looks for the sign once more when the image has gone: one of both sees it. OSError if it
    cannot be told.
    """
    with contextlib.suppress(FileNotFoundError):
        if identity_of(os.stat(file.path)) == file.identity:
            return False
    _remove(place)
    return True


def _place_of(file: OpenImage, path: str) -> str:
    """Return where the sign is. By the inode it is never taken for that of another image that had the name before."""
    folder, name = os.path.split(real_path(path))
    _device, inode = file.identity  # devices can have other numbers once the host was started anew
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:_LONGEST])}.{inode}{_SUFFIX}")
