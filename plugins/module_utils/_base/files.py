# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files and folders: opened without being led astray."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from .errors import Qcow2Error, advice

_MOST_LINKS = 40  # on the way to a folder; the kernel follows no more either
# With O_DIRECTORY, or what is mounted on demand would not be mounted.
_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTER = _PASS | os.O_DIRECTORY


def open_image(path: str) -> int:
    """Open the file or block device for reading and return the descriptor; whoever calls closes it."""
    try:
        # First without opening it really: of a FIFO that would hang us, of some devices it would start something.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(place).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise Qcow2Error(f"{path}: is neither a file nor a block device, so it cannot be a disk image.")
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)
    except FileNotFoundError as exc:
        raise Qcow2Error(f"{path}: does not exist. Check the name, and that its storage is mounted.") from exc
    except OSError as exc:
        raise Qcow2Error(f"{path}: cannot be opened: {exc.strerror}. {advice(exc)}") from exc
    except ValueError as exc:  # a NUL byte, or characters that file names cannot have in this locale
        raise Qcow2Error(f"{path!r}: is no name that a file can have here. Correct it.") from exc


def close_image(fd: int) -> None:
    """Close an image from which there was only to be read, or that is on stable storage already."""
    with contextlib.suppress(OSError):  # network file systems tell of old failures here; the descriptor is gone anyway
        os.close(fd)


def length_of(fd: int) -> int:
    """Return the length in bytes of the open file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def open_folder(path: str) -> tuple[int, str]:
    """Return a descriptor that stands for the folder, and its path without symlinks; OSError when there is none.

    Who may write to a folder on the way must not lead us, by a symlink, into one that belongs to somebody else. So each
    step goes through the folder that the step before has found, where nobody can swap what was checked.
    """
    here, names, way, owners = os.open("/", _ENTER), list[str](), path.split("/")[::-1], list[int]()
    try:
        while way:
            name = way.pop()
            if name in ("", "."):
                continue
            try:
                below = os.open(name, _ENTER, dir_fd=here)
            except NotADirectoryError:
                text, owner = _read_link(here, name)
                owners.append(owner)
                if len(owners) > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
                way += text.split("/")[::-1]
                if not text.startswith("/"):
                    continue
                name, below, names = "", os.open("/", _ENTER), []
            os.close(here)
            here, names = below, names[:-1] if name == ".." else [*names, *filter(None, [name])]
        _check_links(owners, here, path)
    except BaseException:
        os.close(here)
        raise
    return here, "/" + "/".join(names)


def _read_link(folder_fd: int, name: str) -> tuple[str, int]:
    """Return where the symlink in the folder leads, and whose it is; NotADirectoryError when it is none."""
    fd = os.open(name, _PASS, dir_fd=folder_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISLNK(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.readlink("", dir_fd=fd), status.st_uid
    finally:
        os.close(fd)


def _check_links(owners: t.Sequence[int], folder_fd: int, path: str) -> None:
    """Raise when a symlink on the way, of the user who is given, leads into a folder of somebody else."""
    owner = os.fstat(folder_fd).st_uid
    foreign = [one for one in owners if one not in (0, os.geteuid(), owner)]
    if foreign:
        raise Qcow2Error(
            f"{path} leads through a symlink of the user {foreign[0]} into a folder of the user {owner}. Such a link "
            "can be a trap. Give the real path, or have the owner of that folder or root make the symlink."
        )
