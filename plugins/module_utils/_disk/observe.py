# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: what stands at both ends of an overlay, ACTIVE with its chain and its locks, and the place for OVERLAY."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import typing as t

from .._base.errors import Qcow2Error
from .._qcow2.chain import Layer, has_protocol, identity_of, read_chain, resolve_name
from .._qcow2.header import Image, holds_data, is_qcow2, open_image, read_image
from .._qemu import locks as _locks

_MOST_LINKS = 40  # on the way to a folder; the kernel follows no more either
# With O_DIRECTORY, or what is mounted on demand would not be mounted.
_PASS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ENTER = _PASS | os.O_DIRECTORY
_LOOKS = 20  # at an image whose header is being changed, 10 ms apart


class Active(t.NamedTuple):
    """ACTIVE as it was read."""

    path: str  # as asked for
    chain: tuple[Layer, ...]  # ACTIVE itself first
    open_for_writing: bool
    below_running_vm: bool  # somebody has it open in a way that allows no writer
    disguised: bool  # raw was asked for, but it begins like a qcow2 image

    @property
    def image(self) -> Image | None:
        """ACTIVE's header; None when it is raw."""
        return self.chain[0].image

    @property
    def virtual_size(self) -> int:
        """ACTIVE's virtual size in bytes."""
        return self.chain[0].virtual_size

    @property
    def is_recording(self) -> bool:
        """Whether any bitmap records, so that it is no template, which running VMs may share."""
        return self.image is not None and any(bitmap.recording for bitmap in self.image.bitmaps)


class Target(t.NamedTuple):
    """What stands where OVERLAY is to be."""

    path: str  # resolved: no symlinks
    folder: str  # resolved
    problem: str | None = None  # why nothing can be made here
    image: Image | None = None  # the qcow2 image that stands there; None when nothing does
    identity: tuple[int, int] | None = None
    backing_path: str | None = None  # of that image, resolved
    backing_identity: tuple[int, int] | None = None
    open_for_writing: bool = False
    has_data: bool = False  # of its own, not in the images below
    device: int = 0  # of the folder's file system
    free_bytes: int | None = None  # of the folder's file system; None when it does not say


def observe_active(fd: int, path: str, backing_format: str, relative: bool) -> Active:
    """Return what the open ACTIVE and the chain below it are; Qcow2Error when something there is unusable."""
    written_before = _locks.is_used(fd, _locks.WRITE, path)
    # An overlay that records ACTIVE relative to its own folder records its real path.
    chain = read_chain(fd, os.path.realpath(path) if relative else path, backing_format)
    return Active(
        path=path,
        chain=chain,
        open_for_writing=written_before or is_written(fd, path),
        below_running_vm=_locks.is_used(fd, _locks.WRITE_UNSHARED, path),
        disguised=backing_format == "raw" and is_qcow2(fd),
    )


def observe_target(path: str) -> Target:
    """Return what stands at the place for an overlay; what is wrong there is in the answer."""
    try:
        return _observe_target(path)
    except Qcow2Error as exc:
        return Target(path, os.path.dirname(path), problem=str(exc))
    except OSError as exc:
        problem = f"{path}: cannot be looked at: {exc.strerror}. Check the path and its permissions."
        return Target(path, os.path.dirname(path), problem=problem)


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


def is_written(fd: int, path: str) -> bool:
    """Whether a VM or a tool has the open image open for writing."""
    if _locks.is_used(fd, _locks.WRITE, path):
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


def _observe_target(path: str) -> Target:
    """Return what stands there; may raise."""
    name = os.path.basename(path)
    if name in ("", ".", ".."):
        raise Qcow2Error(f"{path}: names a folder. Give the full name of the overlay's file.")
    folder, folder_status = _observe_way(path)
    target = Target(os.path.join(folder, name), folder)
    try:
        status = os.lstat(target.path)
    except FileNotFoundError:
        return _observe_folder(target, folder_status)
    return _observe_occupied(target, status, path)


def _observe_way(path: str) -> tuple[str, os.stat_result]:
    """Return the folder of the overlay, without symlinks, and what it is."""
    folder = os.path.dirname(path)
    try:
        fd, real = open_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as exc:
        real = os.path.realpath(folder)
        if os.path.exists(real) and not os.path.isdir(real):
            raise Qcow2Error(f"{path}: {real} is not a folder. Give another path.") from exc
        raise Qcow2Error(f"{path}: its folder {real} does not exist. Create it first.") from exc
    except Qcow2Error as exc:
        raise Qcow2Error(f"{path}: its folder {exc}") from exc
    try:
        return real, os.fstat(fd)
    finally:
        os.close(fd)


def _observe_folder(target: Target, status: os.stat_result) -> Target:
    """Return a target at which nothing stands yet, with what matters for making something there."""
    if not os.access(target.folder, os.W_OK | os.X_OK):
        raise Qcow2Error(
            f"{target.path}: its folder {target.folder} cannot be written to: its permissions forbid it, or it is "
            "mounted read-only. Run with become, or make it writable."
        )
    space = os.statvfs(target.folder)
    blocks = space.f_bfree if os.geteuid() == 0 else space.f_bavail
    free = blocks * space.f_frsize if space.f_blocks else None
    return target._replace(device=status.st_dev, free_bytes=free)


def _observe_occupied(target: Target, status: os.stat_result, path: str) -> Target:
    """Return a target at which something stands; path is its name as asked for."""
    if stat.S_ISLNK(status.st_mode):
        real = os.path.realpath(target.path)
        try:
            status = os.stat(real)
        except OSError as exc:
            why = "is a loop of symlinks" if exc.errno == errno.ELOOP else f"is a dangling symlink to {real}"
            raise Qcow2Error(f"{target.path}: {why}. Remove it, or choose another path.") from exc
        target = target._replace(path=real)
    if stat.S_ISDIR(status.st_mode):
        raise Qcow2Error(f"{target.path}: is a folder. Give the full name of the overlay's file.")
    if stat.S_ISBLK(status.st_mode):
        raise Qcow2Error(
            f"{target.path}: is a block device. An overlay on a block device is not supported yet (ACTIVE may be on "
            "one); give the name of a file."
        )
    fd = open_image(target.path)
    try:
        return _observe_image(fd, target, path)
    finally:
        os.close(fd)


def _observe_image(fd: int, target: Target, path: str) -> Target:
    """Return a target at which the open file stands; path is its name as asked for."""
    if not is_qcow2(fd):
        raise Qcow2Error(
            f"{target.path}: exists already and is not a qcow2 image. Nothing is ever replaced: remove it, or choose "
            "another path."
        )
    image, live = read_settled(fd, target.path)
    target = target._replace(
        image=image,
        identity=identity_of(os.fstat(fd)),
        open_for_writing=live,
        has_data=holds_data(fd, target.path),
    )
    if image.backing_file is None or has_protocol(image.backing_file):
        return target._replace(backing_path=image.backing_file)
    backing = resolve_name(path, image.backing_file)
    target = target._replace(backing_path=os.path.realpath(backing))
    with contextlib.suppress(OSError):
        target = target._replace(backing_identity=identity_of(os.stat(backing)))
    return target


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
    live_before = _locks.is_held(fd, _locks.WRITE, path)
    image = read_image(fd, path)
    live_after = _locks.is_held(fd, _locks.WRITE, path)
    return _Look(image, live_before, live_after, (live_before or live_after) and _locks.is_held(fd, _locks.OURS, path))


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
            if not _locks.is_held(fd, _locks.WRITE, path):
                raise
        if seen is not None and (seen.is_plain or (seen == previous and not seen.live_after)):
            break
        time.sleep(0.01)
    if seen is None:
        raise error or Qcow2Error(f"{path}: cannot be read.")
    return seen.image, seen.live_before or seen.live_after
