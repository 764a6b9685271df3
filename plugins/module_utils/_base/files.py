# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Open files and folders without being led astray."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
import typing as t

from .errors import Refusal, system_refusal

_ANY_DEVICE = -1  # stands for the file system of a block device, which can have several nodes
_MOST_LINKS = 40  # on the way to a file; the kernel follows no more either
# With O_DIRECTORY, or what is mounted on demand would not be mounted.
_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTER = _PASS | os.O_DIRECTORY

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # what says that nothing has a name

_LONG = struct.Struct("l")
_GET_VERSION = 2 << 30 | _LONG.size << 16 | ord("v") << 8 | 1  # FS_IOC_GETVERSION of most architectures (Linux, ioctl)

Identity = tuple[int, int]  # of a file its file system and inode, of a block device the device itself


class OpenImage:
    """An open file or block device; the end of the block closes it.

    `path` is the name that it was opened by. `fd` is its descriptor. `identity` tells it from all other files, so two
    names of one file have the same.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.identity = identity_of(os.fstat(fd))

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self.identity[0] == _ANY_DEVICE

    @property
    def generation(self) -> int | None:
        """What tells it from a file that had its inode before, and is gone; None if its file system does not say."""
        try:
            return int.from_bytes(fcntl.ioctl(self.fd, _GET_VERSION, bytes(_LONG.size))[:4], sys.byteorder)
        except OSError:
            return None

    def status(self) -> os.stat_result:
        """Return what the kernel says of it now."""
        return os.fstat(self.fd)

    def written(self) -> int:
        """Return when it was last written to, in nanoseconds since 1970; 0 for a block device, which does not tell."""
        return 0 if self.is_device else self.status().st_mtime_ns

    def touch(self) -> None:
        """Have it written to last just now, if that is ours to say; OSError is nobody's failure."""
        with contextlib.suppress(OSError):
            os.utime(self.fd)

    def put_time_back(self, written: int) -> None:
        """Have it written to last at that time, as written() told it; nothing if it was, or for a block device."""
        if not self.is_device and self.written() != written:
            os.utime(self.fd, ns=(self.status().st_atime_ns, written))

    def read(self, length: int, offset: int) -> bytes:
        """Return up to `length` bytes from `offset`; fewer at the end of the file."""
        return os.pread(self.fd, length, offset)

    def overwrite(self, pieces: t.Iterable[tuple[int, bytes]]) -> None:
        """Put data, pairs of an offset in bytes and itself, in the place of what is there, on stable storage.

        It is open for reading; this opens it for writing once more. The caller keeps everybody else from it.
        """
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset, data in pieces:
                write_all(fd, data, offset)
            os.fsync(fd)
        finally:
            close(fd)

    def length(self) -> int:
        """Return its length in bytes."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def named(self, path: str) -> OpenImage:
        """Return this open file under another of its names. Close only this one."""
        return OpenImage(path, self.fd)

    def is_still_at_its_path(self) -> bool:
        """Whether its path still leads to this very file."""
        try:
            return identity_of(os.stat(self.path)) == self.identity
        except OSError:
            return False

    def close(self) -> None:
        """Close it. A close error cannot mean lost data here: the file was only read, or is fsynced."""
        close(self.fd)


def open_image(path: str) -> OpenImage:
    """Open the file or block device for reading; Refusal if there is none."""
    try:
        # Look before opening: to open a FIFO would hang, to open some devices would start something.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(place).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise Refusal("not_a_disk", path, "is neither a file nor a block device, so it cannot be a disk image")
            return owning(path, os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            os.close(place)
    except FileNotFoundError as exc:
        remedy = "Check the name, and that its storage is mounted."
        raise Refusal("no_such_file", path, "does not exist", remedy) from exc
    except OSError as exc:
        raise system_refusal(exc, path, "cannot be opened") from exc
    except ValueError as exc:  # a NUL byte, or characters that file names cannot have in this locale
        raise Refusal("bad_name", repr(path), "is no name that a file can have here", "Correct it.") from exc


def owning(path: str, fd: int) -> OpenImage:
    """Return the open file of a descriptor that nobody else closes; close it if that fails."""
    try:
        return OpenImage(path, fd)
    except BaseException:
        close(fd)
        raise


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of the data at this offset; the system may take it in parts."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def is_there(path: str) -> bool:
    """Whether something has this name, and be it a symlink that leads nowhere; Refusal if that cannot be told.

    os.path.lexists takes each error for absence.
    """
    return _look(path) is not None


def is_link(path: str) -> bool:
    """Whether it is a symlink; Refusal if that cannot be told. os.path.islink takes an error for something else."""
    status = _look(path)
    return status is not None and stat.S_ISLNK(status.st_mode)


def real_path(path: str) -> str:
    """Return the path without symlinks; Refusal if it ends in one that cannot be followed.

    os.path.realpath takes an error for a component that is no symlink. One on the way changes the name of the folder,
    not the folder; the last one would have what belongs beside the file be looked for beside the symlink.
    """
    real = os.path.realpath(path)
    if is_link(real):
        raise Refusal("storage", path, "ends in a symlink that cannot be followed", "Give the real path.")
    return real


def names_of_file(path: str) -> t.Iterator[str]:
    """Yield the path, then each name that a symlink there leads on to; Refusal if one cannot be followed."""
    for _step in range(_MOST_LINKS):
        yield path
        if not is_link(path):
            break
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError as exc:
            raise system_refusal(exc, path, "cannot be followed") from exc


def _look(path: str) -> os.stat_result | None:
    """Return what the kernel says of what has this name; None if nothing has."""
    try:
        return os.lstat(path)
    except ValueError:  # a name that no file can have
        return None
    except OSError as exc:
        if exc.errno in _ABSENT:
            return None
        raise system_refusal(exc, path, "cannot be looked at") from exc


def is_ours(status: os.stat_result) -> bool:
    """Whether a file of this status is root's or ours, so that nobody else can have put it there."""
    return status.st_uid in (0, os.geteuid())


def is_private(folder: str) -> bool:
    """Whether it is a folder of root, or ours, to which nobody else can write; a symlink to one is none."""
    try:
        status = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and is_ours(status) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read_note(path: str, most: int) -> bytes | None:
    """Return up to so many bytes of a small file of root or ours; None if something else stands there, or nothing."""
    try:
        # To open a FIFO would hang.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        return os.read(fd, most) if stat.S_ISREG(status.st_mode) and is_ours(status) else None
    except OSError:
        return None
    finally:
        close(fd)


def close(fd: int) -> None:
    """Close a descriptor whose close error cannot mean lost data: read-only, or fsynced."""
    with contextlib.suppress(OSError):  # network file systems tell of old failures here; the descriptor is gone anyway
        os.close(fd)


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells the file of this status from all others."""
    if stat.S_ISBLK(status.st_mode):
        return (_ANY_DEVICE, status.st_rdev)
    return (status.st_dev, status.st_ino)


def open_folder(path: str) -> tuple[int, str]:
    """Return a descriptor that stands for the folder, and its path without symlinks; OSError if there is none.

    Resolve the path one component at a time through O_PATH descriptors, so that nothing checked can be swapped. Follow
    a symlink only if it is root's, ours, or the owner's of the folder it leads to.
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
    """Return where the symlink in the folder leads, and whose it is; NotADirectoryError if it is none."""
    fd = os.open(name, _PASS, dir_fd=folder_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISLNK(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return os.readlink("", dir_fd=fd), status.st_uid
    finally:
        os.close(fd)


def _check_links(owners: t.Sequence[int], folder_fd: int, path: str) -> None:
    """Raise if a symlink on the way, made by one of the `owners`, leads into a folder of somebody else."""
    owner = os.fstat(folder_fd).st_uid
    foreign = [one for one in owners if one not in (0, os.geteuid(), owner)]
    if foreign:
        raise Refusal(
            "untrusted_link",
            path,
            f"leads through a symlink of the user {foreign[0]} into a folder of the user {owner}. Such a link can be a "
            "trap",
            "Give the real path, or have the owner of that folder or root make the symlink.",
        )


def exceeded_name_max(path: str) -> int | None:
    """Return how many bytes a name can have in the folder of the path, if its own has more; else None."""
    folder, name = os.path.split(path)
    longest = os.pathconf(folder, "PC_NAME_MAX")
    return longest if len(os.fsencode(name)) > longest else None
