# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: what stands at both ends of an overlay, ACTIVE with its chain and its locks, and the place for OVERLAY."""

from __future__ import annotations

import errno
import os
import stat
import typing as t

from . import _locks
from ._chain import Layer, has_protocol, identity_of, read_chain, resolve_backing
from ._errors import Qcow2Error
from ._image import Image, is_qcow2, open_image, read_image


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


class Target(t.NamedTuple):
    """What stands where OVERLAY is to be."""

    path: str  # resolved: no symlinks
    folder: str  # resolved
    problem: str | None = None  # why nothing can be made here
    image: Image | None = None  # the qcow2 image that stands there; None when nothing does
    identity: tuple[int, int] | None = None
    backing_path: str | None = None  # resolved, of that image
    backing_identity: tuple[int, int] | None = None
    open_for_writing: bool = False
    device: int = 0  # of the folder's file system
    free_bytes: int | None = None  # of the folder's file system; None when it does not say


def observe_active(fd: int, path: str, backing_format: str) -> Active:
    """Return what the open ACTIVE and the chain below it are; Qcow2Error when something there is unusable."""
    return Active(
        path=path,
        chain=read_chain(fd, path, backing_format),
        open_for_writing=_locks.is_used(fd, _locks.WRITE, path),
        below_running_vm=_locks.is_used(fd, _locks.WRITE_UNSHARED, path),
        disguised=backing_format == "raw" and is_qcow2(fd),
    )


def observe_target(path: str) -> Target:
    """Return what stands at the place for an overlay; never raises, what is wrong is in the answer."""
    try:
        return _observe_target(path)
    except Qcow2Error as exc:
        return Target(path, os.path.dirname(path), problem=str(exc))
    except OSError as exc:
        problem = f"{path}: cannot be looked at: {exc.strerror}. Check the path and its permissions."
        return Target(path, os.path.dirname(path), problem=problem)


def _observe_target(path: str) -> Target:
    """Return what stands there; may raise."""
    folder = os.path.realpath(os.path.dirname(path))
    name = os.path.basename(path)
    if name in ("", ".", ".."):
        raise Qcow2Error(f"{path}: names a folder. Give the full name of the overlay's file.")
    target = Target(os.path.join(folder, name), folder)
    try:
        folder_status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise Qcow2Error(f"{path}: its folder {folder} does not exist. Create it first.") from exc
    if not stat.S_ISDIR(folder_status.st_mode):
        raise Qcow2Error(f"{path}: {folder} is not a folder.")
    try:
        status = os.lstat(target.path)
    except FileNotFoundError:
        return _observe_folder(target, folder_status)
    return _observe_occupied(target, status)


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


def _observe_occupied(target: Target, status: os.stat_result) -> Target:
    """Return a target at which something stands."""
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
        return _observe_image(fd, target)
    finally:
        os.close(fd)


def _observe_image(fd: int, target: Target) -> Target:
    """Return a target at which the open file stands."""
    if not is_qcow2(fd):
        raise Qcow2Error(
            f"{target.path}: exists already and is not a qcow2 image. Nothing is ever replaced: remove it, or choose "
            "another path."
        )
    image = read_image(fd, target.path)
    target = target._replace(
        image=image,
        identity=identity_of(os.fstat(fd)),
        open_for_writing=_locks.is_held(fd, _locks.WRITE, target.path),
    )
    if image.backing_file is None or has_protocol(image.backing_file):
        return target._replace(backing_path=image.backing_file)
    backing_path = resolve_backing(target.path, image.backing_file)
    try:
        backing_identity = identity_of(os.stat(backing_path))
    except OSError:
        backing_identity = None
    return target._replace(backing_path=backing_path, backing_identity=backing_identity)
