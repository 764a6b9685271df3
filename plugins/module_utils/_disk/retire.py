# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Retire an image that no VM needs any more: rename it aside, or delete it, so that its name is free again.

Nothing is ever replaced, and nothing goes but the very file that was looked at. Where a symlink leads to it, the file
goes and then the symlink, which leads nowhere any more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import typing as t

from .._base.errors import Refusal, system_refusal
from .._base.files import OpenImage, close, exceeded_name_max, identity_of, is_link, is_there, real_path
from .begun import remove_signs
from .observe import why_not_writable
from .publish import open_to_list, rename_without_replacing
from .verdict import KEEP, How

KEPT_AS = "committed"  # the suffix of an image that went in and is kept
REVERTED_AS = "reverted"  # the suffix of an image that was gone back from and is kept
_KEPT = re.compile(rf"\.({KEPT_AS}|{REVERTED_AS})(\.[0-9]+)?$")


def retire(path: str, file: OpenImage, how: How, suffix: str) -> str | None:
    """Retire the image that is open as `file` and stands at `path`; return the path it is kept as, if it is kept.

    The caller keeps everybody else from it, and has found it possible by why_not_retired().
    """
    real = real_path(path)
    folder_fd, folder = open_to_list(os.path.dirname(real))
    try:
        name = os.path.basename(real)
        _check_place(path, file, name, folder_fd)
        # First: no VM has the image, and a sign that is left would be the next one's that gets its name and inode.
        remove_signs(file, real)
        if how == KEEP:
            kept = os.path.join(folder, _move_aside(file, name, f"{name}.{suffix}", folder_fd, folder))
        else:
            kept = None
            os.unlink(name, dir_fd=folder_fd)
        os.fsync(folder_fd)
        remove_signs(file, real)  # one that another run has left meanwhile, which has found the image still there
    finally:
        close(folder_fd)
    _remove_link(path, real)
    return kept


def _remove_link(path: str, real: str) -> None:
    """Remove a symlink that led to the file; nothing if `path` was its real path."""
    if not is_link(path) or real_path(path) != real:
        return
    folder_fd, _folder = open_to_list(os.path.dirname(path))
    try:
        os.unlink(os.path.basename(path), dir_fd=folder_fd)
        os.fsync(folder_fd)
    finally:
        close(folder_fd)


def remove_dangling_link(path: str) -> None:
    """Remove a symlink that leads nowhere, since what it led to was retired; nothing if there is none."""
    real = real_path(path)
    if not is_there(real):
        _remove_link(path, real)


def stands(path: str) -> bool:
    """Whether something stands there, and be it a symlink that leads nowhere."""
    if is_there(path):
        return True
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):  # of storage that is not mounted nothing can be said to be gone
        why = f"its folder {folder} does not exist, so nobody can tell whether it is gone"
        raise Refusal("no_folder", path, why, "Mount its storage, or correct the path.")
    return False


def kept_path(path: str, suffix: str) -> str:
    """Return the path that the image at `path` would be kept as."""
    real = real_path(path)
    wanted = f"{real}.{suffix}"
    kept = _kept(os.path.dirname(real), os.path.basename(wanted))
    second_name = (one for _number, one in kept if _are_one(real, one))  # a run was killed between link and unlink
    return next(second_name, None) or next(_new_names(wanted, kept))


def is_kept(path: str, suffix: str | None = None) -> bool:
    """Whether an image has the name of one that was retired and kept, with this suffix or any."""
    found = _KEPT.search(path)
    return found is not None and suffix in (None, found[1])


def all_kept(path: str, suffix: str) -> list[str]:
    """Return the paths that images which stood at `path` are kept as, the newest last.

    A file that is renamed gets a new ctime. Its number alone does not tell: earlier releases filled the gaps.
    """
    folder, name = os.path.split(real_path(path))
    found: list[tuple[int, int, str]] = []
    for number, one in _kept(folder, f"{name}.{suffix}"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            found.append((os.lstat(one).st_ctime_ns, number, one))
    return [one for _changed, _number, one in sorted(found)]


def why_not_retired(path: str, file: OpenImage, how: How, suffix: str) -> Refusal | None:
    """Return why retire() would refuse; None if it would not, as far as that can be told beforehand."""
    if file.is_device:
        return Refusal(
            "block_device",
            path,
            "is a block device, of which nothing is ever deleted or renamed",
            "Have the VM use the image below (virsh edit), then remove the volume with the tool that made it, such as "
            "lvremove.",
        )
    untrusted = _why_untrusted(path, file)
    if untrusted is not None:
        return untrusted
    too_long = why_not_kept(path, suffix) if how == KEEP else None
    return too_long or next(filter(None, (why_not_writable(folder, path) for folder in _folders_of(path))), None)


def why_not_kept(path: str, suffix: str) -> Refusal | None:
    """Return why no file beside the one at `path` can have the longer name; None if one can."""
    kept = kept_path(path, suffix)
    longest = exceeded_name_max(kept)
    if longest is None:
        return None
    why = (
        f"cannot be kept as {os.path.basename(kept)}, since its file system takes no names of more than {longest} bytes"
    )
    return Refusal("name_too_long", path, why, "Rename the file, or use retire=delete.")


def _folders_of(path: str) -> list[str]:
    """Return the folders in which something goes: of the file, and of a symlink that leads to it."""
    return list(dict.fromkeys(map(os.path.dirname, (os.path.realpath(path), path))))


def _why_untrusted(path: str, file: OpenImage) -> Refusal | None:
    """Return the refusal of a symlink by which somebody could have another one's file retired; None for any other."""
    status = os.lstat(path)
    owner = file.status().st_uid
    if not stat.S_ISLNK(status.st_mode) or status.st_uid in (0, os.geteuid(), owner):
        return None
    why = f"is a symlink of the user {status.st_uid} to a file of the user {owner}. Such a link can be a trap"
    return Refusal("untrusted_link", path, why, "Give the real path.")


def _check_place(path: str, file: OpenImage, name: str, folder_fd: int) -> None:
    """Refuse if it is not the file that was looked at which stands there."""
    if not _is_there(file, name, folder_fd):
        raise Refusal("changed_meanwhile", path, "was moved or replaced meanwhile", "Run this again.")


def _kept(folder: str, name: str) -> list[tuple[int, str]]:
    """Return what has this name in the folder, or this name and a number: the number, 0 for none, and the path."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise system_refusal(exc, folder, "cannot be searched for images that are kept") from exc
    numbered = re.compile(rf"{re.escape(name)}(?:\.([0-9]+))?")
    found = filter(None, map(numbered.fullmatch, names))
    return sorted((int(one[1] or 0), os.path.join(folder, one[0])) for one in found)


def _new_names(wanted: str, kept: t.Sequence[tuple[int, str]]) -> t.Iterator[str]:
    """Yield names for one more image, without end. None fills a gap, or the newest could not be told by its number."""
    for number in itertools.count(kept[-1][0] + 1 if kept else 0):
        yield f"{wanted}.{number}" if number else wanted


def _are_one(path: str, other: str) -> bool:
    """Whether both are names of one file; not if one of them is a symlink."""
    with contextlib.suppress(FileNotFoundError):
        return identity_of(os.lstat(path)) == identity_of(os.lstat(other))
    return False


def _move_aside(file: OpenImage, name: str, wanted: str, folder_fd: int, folder: str) -> str:
    """Rename within the folder, with a number where the name is taken; return the new name."""
    kept = _kept(folder, wanted)
    for place in (os.path.basename(one) for _number, one in kept):
        if _is_there(file, place, folder_fd):  # a run was killed between link and unlink
            os.unlink(name, dir_fd=folder_fd)
            return place
    for place in _new_names(wanted, kept):
        with contextlib.suppress(FileExistsError):  # another file got that name in this moment
            if not rename_without_replacing(folder_fd, name, place):
                _link_aside(file, name, place, folder_fd)
            return place
    raise AssertionError("the names do not end")


def _link_aside(file: OpenImage, name: str, place: str, folder_fd: int) -> None:
    """Give the file a second name, then take its first one away: for NFS, which cannot rename without replacing."""
    try:
        os.link(f"/proc/self/fd/{file.fd}", place, dst_dir_fd=folder_fd, follow_symlinks=True)
    except FileExistsError:
        raise
    except OSError as exc:
        why = "its file system has neither hard links nor renaming without replacing, so it cannot be kept safely"
        raise Refusal("no_rename", file.path, why, "Rename it yourself, or use retire=delete.") from exc
    os.fsync(folder_fd)
    os.unlink(name, dir_fd=folder_fd)


def _is_there(file: OpenImage, place: str, folder_fd: int) -> bool:
    """Whether this very file has this name, too."""
    try:
        return identity_of(os.stat(place, dir_fd=folder_fd, follow_symlinks=False)) == file.identity
    except FileNotFoundError:
        return False
