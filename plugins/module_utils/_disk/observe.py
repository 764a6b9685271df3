# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: what stands at both ends of an overlay, ACTIVE with its chain and its locks, and the place for OVERLAY."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from .._base.errors import Qcow2Error
from .._base.files import open_folder, open_image
from .._qcow2.chain import Layer, has_protocol, identity_of, read_chain, resolve_name
from .._qcow2.extents import has_allocated_extents
from .._qcow2.header import is_qcow2
from .._qcow2.image import Image
from .._qemu import locks
from .._qemu.settled import is_open_for_writing, read_settled


class ObservedChain(t.NamedTuple):
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


def observe_active(fd: int, path: str, backing_format: str, relative: bool) -> ObservedChain:
    """Return what the open ACTIVE and the chain below it are; Qcow2Error when something there is unusable."""
    written_before = locks.is_locked_by_qemu(fd, locks.WRITE, path)
    # An overlay that records ACTIVE relative to its own folder records its real path.
    chain = read_chain(fd, os.path.realpath(path) if relative else path, backing_format)
    return ObservedChain(
        path=path,
        chain=chain,
        open_for_writing=written_before or is_open_for_writing(fd, path),
        below_running_vm=locks.is_locked_by_qemu(fd, locks.WRITE_UNSHARED, path),
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
        has_data=has_allocated_extents(fd, target.path),
    )
    if image.backing_file is None or has_protocol(image.backing_file):
        return target._replace(backing_path=image.backing_file)
    backing = resolve_name(path, image.backing_file)
    target = target._replace(backing_path=os.path.realpath(backing))
    with contextlib.suppress(OSError):
        target = target._replace(backing_identity=identity_of(os.stat(backing)))
    return target
