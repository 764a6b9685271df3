# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: who else stands on an image. No image knows what is on top of it, so whole folders are looked through.

::

    OVERLAY    CLONE       in one folder, each records IMAGE as its backing file
        └──┬─────┘
         IMAGE             which must neither go nor change while CLONE is there
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from .._base.errors import Refusal, system_refusal
from .._base.files import Identity, OpenImage, identity_of, names_of_file, open_image
from .._qcow2.backing import recorded_name
from .._qcow2.chain import files_named, resolve_name
from .publish import is_temporary

_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM)  # or none that is ours to see
_NO_IMAGE = ("no_such_file", "not_a_disk", "bad_name", "no_permission")
# What libvirt's backups write beside a disk records the disk as its backing file, and holds older data than that.
IS_NO_DISK = (
    "If no VM has it, here or on another host, it is left over, or a backup that libvirt has made ('virsh "
    "backup-begin'): move it away, to another folder, and never merge it."
)


class Above(t.NamedTuple):
    """An image that stands on another one."""

    path: str
    identity: Identity
    backing_file: str  # path, from which a relative name is resolved
    backing_identity: Identity | None  # None if it does not exist


def folders_beside(paths: t.Iterable[str]) -> list[str]:
    """Return the folders in which others that stand on the images at these paths can lie, each once.

    An overlay lies beside that name of the image by which it was made, and a symlink gives it one more.
    """
    found: dict[t.Hashable, str] = {}
    for folder in (folder for path in paths for folder in _folders_of(path)):
        status = _status_of(folder)
        found.setdefault(identity_of(status) if status else folder, folder)
    return list(found.values())


def _folders_of(path: str) -> list[str]:
    """Return the folders of all names of an image; of a block device without its own, which holds no images."""
    folders = [os.path.realpath(os.path.dirname(name)) for name in names_of_file(path)]
    status = _status_of(path)
    is_device = status is not None and stat.S_ISBLK(status.st_mode)
    return [folder for folder in folders if not (is_device and folder == folders[-1])]


def overlays_in(folder: str) -> list[Above]:
    """Return the images in the folder that record a backing file, whatever else is wrong with them.

    Refusal if the storage fails: an image that is overlooked would have what it stands on change, or go. Leave out what
    is none, and what others keep from us. Leave out the temporary files of runs, too: those of killed ones nobody will
    ever have as a disk, and the next run removes them; a living run has its turn on the image below until it has
    published.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not is_temporary(entry.name) and _is_file(entry)]
    except OSError as exc:
        if exc.errno in _NO_FOLDER:
            return []
        raise system_refusal(exc, folder, "cannot be searched for images that stand on others") from exc
    return [one for name in sorted(names) for one in _look(os.path.join(folder, name))]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether it is a file, or a symlink that leads to one."""
    if not entry.is_symlink():
        return entry.is_file(follow_symlinks=False)  # which the folder itself tells
    status = _status_of(entry.path)
    return status is not None and stat.S_ISREG(status.st_mode)


def _look(path: str) -> list[Above]:
    """Return the image of this path, for each file that it can stand on; none if it stands on none, or is no image."""
    try:
        with open_image(path) as file:
            name = recorded_name(file)
            return [_above(path, file, one) for one in files_named(name)] if name is not None else []
    except Refusal as exc:
        if exc.code in _NO_IMAGE:
            return []
        raise
    except OSError as exc:
        raise system_refusal(exc, path, "cannot be read, so nobody can tell on which image it stands") from exc


def _above(path: str, file: OpenImage, name: str) -> Above:
    """Return the open image, which records this backing file."""
    backing_file = resolve_name(path, name)
    status = _status_of(backing_file)
    return Above(path, file.identity, backing_file, identity_of(status) if status else None)


def _status_of(path: str) -> os.stat_result | None:
    """Return what the kernel says of the file that a name leads to; None if it leads nowhere.

    Also if it leads to storage that is gone: the images that are asked about are there. Ask twice, since one error in
    between says nothing of that.
    """
    for _time in range(2):
        with contextlib.suppress(OSError, ValueError):  # such as a name that no file can have
            return os.stat(path)
    return None


def ways_up(image: Identity, overlays: t.Sequence[Above]) -> list[list[str]]:
    """Return the paths of what stands on an image, topmost first, for each topmost one of these overlays."""
    ways = []
    begun = [[one] for one in overlays if one.backing_identity == image]
    while begun:
        way = begun.pop()
        seen = [image, *(one.identity for one in way)]  # or else images that stand on each other have no end
        more = [one for one in overlays if one.backing_identity == way[0].identity and one.identity not in seen]
        begun += [[one, *way] for one in more]
        if not more:
            ways.append([one.path for one in way])
    return ways


def standing_on(image: Identity, folders: t.Iterable[str], but: t.Collection[Identity]) -> list[str]:
    """Return the paths of the images in the folders that stand on this image, without those in `but`."""
    return all_standing_on([image], folders, but)[image]


def all_standing_on(
    images: t.Iterable[Identity], folders: t.Iterable[str], but: t.Collection[Identity]
) -> dict[Identity, list[str]]:
    """Return for each of the images what standing_on() does, with one look through the folders."""
    found: dict[Identity, list[str]] = {image: [] for image in images}
    for folder in dict.fromkeys(folders):
        for one in overlays_in(folder):
            if one.backing_identity in found and one.identity not in but:
                found[one.backing_identity].append(one.path)
    return found
