# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: both ends of an overlay, ACTIVE with its chain and its locks, and the place for OVERLAY."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from .._base.errors import Refusal, system_refusal
from .._base.files import Identity, OpenImage, identity_of, open_folder, open_image
from .._qcow2.chain import Layer, is_local, resolve_name, walk_chain
from .._qcow2.dirty import maps_of
from .._qcow2.extents import has_allocated_extents
from .._qcow2.header import is_qcow2
from .._qcow2.image import Image, read_image
from .._qemu import locks
from .._qemu.settled import is_open_for_writing, read_settled
from .bitmap_rules import LayerBitmaps
from .chain_size import ChainSize

# What can stand at the place of an overlay.
NOTHING = "nothing"
IMAGE = "image"  # qcow2
OTHER_FILE = "other file"  # or a pipe, a socket, …
FOLDER = "folder"
DEVICE = "device"

# What ext4 keeps back (fs/ext4/super.c, ext4_calculate_resv_clusters).
_KEPT_BACK = 50  # one block of so many …
_MOST_KEPT_BACK = 4096  # … and no more


class ObservedChain(t.NamedTuple):
    """ACTIVE, and the chain below it, as they were read."""

    path: str  # as asked for
    layers: tuple[Layer, ...]  # ACTIVE itself first
    is_open_for_writing: bool
    below_running_vm: bool  # somebody has it open in a way that allows no writer
    disguised: bool  # raw was asked for, but it begins like a qcow2 image
    modified: int | None = None  # seconds since 1970, of the last write to ACTIVE; None if that cannot be told

    @property
    def image(self) -> Image | None:
        """ACTIVE's header and bitmaps; None if it is raw."""
        return self.layers[0].image

    @property
    def virtual_size(self) -> int:
        """ACTIVE's virtual size in bytes."""
        return self.layers[0].virtual_size

    @property
    def is_recording(self) -> bool:
        """Whether any bitmap records, so that it is no template, which running VMs may share."""
        return self.image is not None and any(bitmap.recording for bitmap in self.image.bitmaps)

    def earlier_bitmaps(self, created: t.Mapping[str, int]) -> frozenset[str]:
        """Return which of ACTIVE's bitmaps are not those of the checkpoints of their names, but from before (rule 7).

        `created`: when the checkpoints were made, by the names of their bitmaps.
        """
        active = LayerBitmaps(self.path, self.virtual_size, {}, self.is_open_for_writing, modified=self.modified)
        names = [bitmap.name for bitmap in self.image.bitmaps] if self.image is not None else []
        return frozenset(name for name in names if active.is_older_than(created.get(name)))


class Target(t.NamedTuple):
    """What stands where OVERLAY is to be."""

    path: str  # resolved: no symlinks
    folder: str  # resolved
    problem: Refusal | None = None  # why nothing can be said of it
    stands: str = NOTHING
    image: Image | None = None  # the qcow2 image that stands there
    identity: Identity | None = None
    backing_path: str | None = None  # of that image, resolved
    backing_identity: Identity | None = None
    is_open_for_writing: bool = False  # by a VM or a tool
    is_in_work: bool = False  # by another run of this collection, which is waited for before anything is done
    has_data: bool = False  # of its own, not in the images below
    device: int = 0  # of the folder's file system
    free_bytes: int | None = None  # of the folder's file system; None if it does not say


def observe_chain(file: OpenImage, backing_format: str, *, relative: bool) -> ObservedChain:
    """Return what the open ACTIVE and the chain below it are; Refusal if something there is unusable."""
    open_before = locks.is_locked_by_qemu(file, locks.WRITE)
    # An overlay that records ACTIVE relative to its own folder records its real path.
    path = os.path.realpath(file.path) if relative else file.path
    layers = tuple(_read_layers(file, backing_format, path))
    if path != file.path:
        _check_same_chain(file, backing_format, layers)
    return ObservedChain(
        path=file.path,
        layers=layers,
        is_open_for_writing=open_before or is_open_for_writing(file),
        below_running_vm=locks.is_locked_by_qemu(file, locks.WRITE_UNSHARED),
        disguised=backing_format == "raw" and is_qcow2(file),
        modified=None if file.is_device else int(file.status().st_mtime),
    )


def why_not_open(layers: t.Sequence[Layer], *, is_written: bool) -> Refusal | None:
    """Return that the VM which runs on these images has other files open than stand there; None if it has these.

    `is_written`: it writes to the first one. Of a device nothing is said, since a VM has nodes of its own.
    """
    for layer in layers:
        if layer.is_device:
            continue
        with open_image(layer.path) as file:
            is_open = locks.is_locked(file, locks.WRITE) if is_written and layer is layers[0] else locks.is_open(file)
        if not is_open:
            why = (
                "is not what its running VM has open by this name, as if a copy was put in its place, or the VM was "
                "put on another storage. What the guest sees and writes is in another file"
            )
            remedy = (
                "If that file has no name any more, it is gone once the VM is shut off. So copy the disk first, while "
                "the VM runs, by a full backup or 'virsh blockcopy'. Then shut the VM off and see which of the two "
                "files it needs."
            )
            return Refusal("other_disks", layer.path, why, remedy)
    return None


def _check_same_chain(file: OpenImage, backing_format: str, layers: t.Sequence[Layer]) -> None:
    """Refuse an image that stands on other files by the name that was asked for than by its real path.

    A relative name of a backing file counts from the folder of the name by which the image is opened.
    """
    by_name = [layer for layer, _file in walk_chain(file, backing_format)]
    for layer, other in zip(layers, by_name):
        if layer.identity != other.identity:
            why = (
                f"leads to {layers[0].real_path}, which stands on {layer.path} by that name, and on {other.path} by "
                "this one, as the guest sees it. An overlay with a relative name would show other data"
            )
            remedy = "Leave out relative, or have the images record absolute names ('qemu-img rebase -u')."
            raise Refusal("other_chain", file.path, why, remedy)


def _read_layers(top: OpenImage, backing_format: str, path: str) -> t.Iterator[Layer]:
    """Yield the layers, with bitmaps; Refusal if those of one are damaged: QEMU then opens no image above it either."""
    walk = walk_chain(top, backing_format, read_top=read_image, read_below=_read_settled, path=path)
    size = ChainSize()
    for layer, file in walk:
        if layer.image is not None:
            size.add(layer.path, layer.image)
            maps_of(file, layer.image)  # reads the tables and checks them
        yield layer


def _read_settled(file: OpenImage) -> Image:
    return read_settled(file).image


def observe_target(path: str) -> Target:
    """Return what stands at the place for an overlay; what is wrong there is in the answer."""
    try:
        return _observe_target(path)
    except Refusal as exc:
        return Target(path, os.path.dirname(path), problem=exc)
    except OSError as exc:
        return Target(path, os.path.dirname(path), problem=system_refusal(exc, path, "cannot be looked at"))


def _observe_target(path: str) -> Target:
    """Return what stands there; may raise."""
    name = os.path.basename(path)
    if name in ("", ".", ".."):
        return Target(path, os.path.dirname(path), stands=FOLDER)
    folder, folder_status = _observe_folder_of(path)
    target = Target(os.path.join(folder, name), folder)
    try:
        status = os.lstat(target.path)
    except FileNotFoundError:
        return _with_space(target, folder_status)
    return _observe_occupied(target, status, path)


def _observe_folder_of(path: str) -> tuple[str, os.stat_result]:
    """Return the folder of the overlay, without symlinks, and its status."""
    folder = os.path.dirname(path)
    try:
        fd, real = open_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as exc:
        real = os.path.realpath(folder)
        if os.path.exists(real) and not os.path.isdir(real):
            raise Refusal("no_folder", path, f"{real} is not a folder", "Give another path.") from exc
        raise Refusal("no_folder", path, f"its folder {real} does not exist", "Create it first.") from exc
    except Refusal as exc:
        raise Refusal(exc.code, path, f"its folder {exc.subject} {exc.why}", exc.remedy) from exc
    try:
        return real, os.fstat(fd)
    finally:
        os.close(fd)


def why_not_writable(folder: str, path: str) -> Refusal | None:
    """Return why nothing can be made or removed in the folder, as a refusal of `path` in it; None if it can."""
    if os.access(folder, os.W_OK | os.X_OK):
        return None
    is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    why = "it is mounted read-only" if is_read_only else "its permissions forbid it"
    return Refusal(
        "read_only" if is_read_only else "no_permission",
        path,
        f"its folder {folder} cannot be written to: {why}",
        "Make its file system writable, then run this again."
        if is_read_only
        else "Run with become, or make it writable.",
    )


def why_not_opened(file: OpenImage) -> Refusal | None:
    """Return why the open image cannot be opened for writing; None if it can, as far as the kernel tells."""
    if os.access(f"/proc/self/fd/{file.fd}", os.W_OK):
        return None
    if os.fstatvfs(file.fd).f_flag & os.ST_RDONLY:
        why, remedy = "it is mounted read-only", "Make its file system writable, then run this again."
        return Refusal("read_only", file.path, f"cannot be written to: {why}", remedy)
    why = "cannot be written to: its permissions forbid it, or an attribute does ('lsattr')"
    return Refusal("no_permission", file.path, why, "Run with become, or make it writable.")


def _with_space(target: Target, status: os.stat_result) -> Target:
    """Return a target at which nothing stands yet, with the space in its folder; Refusal if that is not writable."""
    problem = why_not_writable(target.folder, target.path)
    if problem is not None:
        raise problem
    return target._replace(device=status.st_dev, free_bytes=free_bytes(target.folder))


def free_bytes(folder: str) -> int | None:
    """Return what this process can still take of the folder's file system; None if that cannot be told."""
    space = os.statvfs(folder)
    blocks = space.f_bavail
    if os.geteuid() == 0:  # what is reserved for root counts, but ext4 keeps some back even from root
        blocks = max(blocks, space.f_bfree - min(space.f_blocks // _KEPT_BACK, _MOST_KEPT_BACK))
    return blocks * space.f_frsize if space.f_blocks else None


def _observe_occupied(target: Target, status: os.stat_result, path: str) -> Target:
    """Return a target at which something stands; `path` is its name as asked for."""
    if stat.S_ISLNK(status.st_mode):
        real = os.path.realpath(target.path)
        try:
            status = os.stat(real)
        except OSError as exc:
            why = "is a loop of symlinks" if exc.errno == errno.ELOOP else f"is a dangling symlink to {real}"
            remedy = "If the storage that it leads to is not mounted, mount it; else remove the symlink."
            raise Refusal("occupied", target.path, why, remedy) from exc
        target = target._replace(path=real)
    if stat.S_ISDIR(status.st_mode):
        return target._replace(stands=FOLDER)
    if stat.S_ISBLK(status.st_mode):
        return target._replace(stands=DEVICE)
    if not stat.S_ISREG(status.st_mode):
        return target._replace(stands=OTHER_FILE)
    with open_image(target.path) as file:
        return _observe_image(file, target, path) if is_qcow2(file) else target._replace(stands=OTHER_FILE)


def _observe_image(file: OpenImage, target: Target, path: str) -> Target:
    """Return a target at which the open qcow2 image stands; `path` is its name as asked for."""
    settled = read_settled(file)
    image = settled.image
    target = target._replace(
        stands=IMAGE,
        image=image,
        identity=file.identity,
        is_open_for_writing=settled.is_open_for_writing and not settled.is_in_work,
        is_in_work=settled.is_in_work,
        has_data=has_allocated_extents(file),
    )
    if image.backing_file is None or not is_local(image.backing_file):
        return target._replace(backing_path=image.backing_file)
    backing = resolve_name(path, image.backing_file)
    target = target._replace(backing_path=os.path.realpath(backing))
    with contextlib.suppress(OSError):
        target = target._replace(backing_identity=identity_of(os.stat(backing)))
    return target
