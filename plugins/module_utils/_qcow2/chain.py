# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: follow the backing files of an image down to its base, without ever probing a format for use."""

from __future__ import annotations

import os
import stat
import typing as t

from .._base.errors import Qcow2Error
from .._base.files import close_image, length_of, open_image
from .header import SECTOR, is_qcow2
from .image import Image, read_image

_ANY_DEVICE = -1  # stands for the file system of a block device, which can have several nodes
MAX_LAYERS = 200  # libvirt follows no chain further either


class Layer(t.NamedTuple):
    """One image of a backing chain."""

    path: str  # the name under which QEMU would open it, which is what a relative backing file is relative to
    real_path: str  # no symlinks
    identity: tuple[int, int]  # device and inode: two names of one file are one layer
    format: str | None  # as the layer above records it; None when it does not
    virtual_size: int  # bytes
    image: Image | None  # None when the layer is not qcow2; below the top without its bitmaps

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self.identity[0] == _ANY_DEVICE


def has_protocol(name: str) -> bool:
    """Whether QEMU would take this file name for a protocol (json:…, nbd:…); a colon after a slash is harmless."""
    return ":" in name.split("/", 1)[0]


def why_unusable(path: str, image: Image) -> list[str]:
    """Return why QEMU cannot, or must not, open the image for writing although it can be read here."""
    problems = []
    if image.corrupt:
        problems.append(
            f"{path}: is marked corrupt, by a QEMU that found its metadata damaged. Repair it with "
            "'qemu-img check -r all', or restore it, first."
        )
    if image.has_data_file and image.data_file is None:
        problems.append(f"{path}: keeps its data in an external data file but does not name it; not supported.")
    elif image.data_file is not None and has_protocol(image.data_file):
        problems.append(
            f"{path}: its external data file {image.data_file!r} is a protocol for QEMU, not a file. Refused: such an "
            "image can make QEMU open whatever its author wants."
        )
    return problems


def identity_of(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from all others: of a block device the device itself, else device and inode."""
    if stat.S_ISBLK(status.st_mode):
        return (_ANY_DEVICE, status.st_rdev)
    return (status.st_dev, status.st_ino)


def resolve_name(image_path: str, name: str) -> str:
    """Return the path of a file that an image records; a relative one lies beside the name the image was opened by."""
    return os.path.join(os.path.dirname(image_path), name)


def read_chain(top_fd: int, path: str, image_format: str | None) -> tuple[Layer, ...]:
    """Return the layers from the open image down to its base; Qcow2Error when one is missing, odd or in a loop.

    Only the topmost image comes with its bitmaps.
    """
    return tuple(layer for layer, _fd in walk_chain(top_fd, path, image_format, with_bitmaps=True))


def walk_chain(
    top_fd: int, path: str, image_format: str | None, with_bitmaps: bool
) -> t.Generator[tuple[Layer, int], None, None]:
    """Yield the layers from the open image down to its base, each with a descriptor that is open until the next step.

    Raises as read_chain does, once the layers above the fault were yielded. Only the topmost image can come with its
    bitmaps.
    """
    layer = _read_layer(top_fd, path, image_format, with_bitmaps)
    yield layer, top_fd
    seen = {layer.identity}
    while layer.image is not None and layer.image.backing_file is not None:
        above, fd = layer, _open_below(layer, layer.image.backing_file)
        try:
            name, image_format = resolve_name(above.path, layer.image.backing_file), layer.image.backing_format
            try:
                layer = _read_layer(fd, name, image_format)
            except Qcow2Error as exc:
                raise _below(exc, above) from exc
            if layer.identity in seen:
                raise Qcow2Error(
                    f"{above.path}: its backing file {layer.path} is already part of the chain above it: the chain is "
                    "a loop. Correct the backing file with 'qemu-img rebase -u'."
                )
            seen.add(layer.identity)
            if len(seen) > MAX_LAYERS:
                raise Qcow2Error(
                    f"{path}: its backing chain has more than {MAX_LAYERS} images. Merge some with 'qemu-img commit'."
                )
            yield layer, fd
        finally:
            close_image(fd)


def _read_layer(fd: int, path: str, image_format: str | None, with_bitmaps: bool = False) -> Layer:
    """Return the open image as a layer; a format that is not recorded is looked up, for reading only."""
    as_qcow2 = image_format == "qcow2" or (image_format is None and is_qcow2(fd))
    image = read_image(fd, path, with_bitmaps) if as_qcow2 else None
    virtual_size = image.virtual_size if image else (length_of(fd) + SECTOR - 1) // SECTOR * SECTOR
    if image is not None and image.data_file is not None and not has_protocol(image.data_file):
        _check_data_file(path, resolve_name(path, image.data_file))
    return Layer(path, os.path.realpath(path), identity_of(os.fstat(fd)), image_format, virtual_size, image)


def _check_data_file(path: str, data_file: str) -> None:
    """Raise when no VM could have its data in the external data file of the image; it is not opened."""
    try:
        mode = os.stat(data_file).st_mode
    except (OSError, ValueError) as exc:
        raise Qcow2Error(
            f"{path}: its external data file {data_file} does not exist. Put it back in its place."
        ) from exc
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise Qcow2Error(
            f"{path}: its external data file {data_file} is neither a file nor a block device. Refused: such an image "
            "can make QEMU open whatever its author wants. Restore it from a backup."
        )


def _open_below(above: Layer, backing_file: str) -> int:
    """Open the file that the image above records as its backing file, and return the descriptor."""
    if has_protocol(backing_file):
        raise Qcow2Error(
            f"{above.path}: its backing file {backing_file!r} is a protocol for QEMU, not a file. This collection "
            "works with local files and block devices only. If it is meant as a file, record its absolute path with "
            "'qemu-img rebase -u -b'."
        )
    try:
        return open_image(resolve_name(above.path, backing_file))
    except Qcow2Error as exc:
        raise _below(exc, above) from exc


def _below(exc: Qcow2Error, above: Layer) -> Qcow2Error:
    """Return the error with the name of the image above."""
    return Qcow2Error(f"{exc} It is the backing file of {above.path}.")
