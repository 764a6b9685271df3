# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: follow the backing files of an image down to its base, without ever probing a format for use.

::

    path  top        what the VM has open, with the bitmaps that are recording
           │ backing_file, backing_format, as top records them
           ▼
          layer
           │
           ▼
          base       records no backing file, or is not qcow2
"""

from __future__ import annotations

import os
import stat
import typing as t

from .._base.errors import Refusal
from .._base.files import Identity, OpenImage, open_image
from .header import SECTOR, is_qcow2
from .image import Image, read_image

MAX_LAYERS = 200  # libvirt follows no chain further either


class Layer(t.NamedTuple):
    """One image of a backing chain."""

    path: str  # the name under which QEMU would open it, which is what a relative backing file is relative to
    real_path: str  # no symlinks
    identity: Identity  # two names of one file are one layer
    format: str | None  # as the layer above records it; None if it does not
    virtual_size: int  # bytes
    is_device: bool
    image: Image | None  # None if the layer is not qcow2; below the top without its bitmaps


def has_protocol(name: str) -> bool:
    """Whether QEMU would take this file name for a protocol (json:…, nbd:…); a colon after a slash is harmless."""
    return ":" in name.split("/", 1)[0]


def why_unusable(path: str, image: Image) -> list[Refusal]:
    """Return why QEMU cannot, or must not, open the image for writing although it can be read here."""
    problems = []
    if image.corrupt:
        problems.append(
            Refusal(
                "corrupt",
                path,
                "is marked corrupt, by a QEMU that found its metadata damaged",
                "Repair it with 'qemu-img check -r all', or restore it, first.",
            )
        )
    if image.has_data_file and image.data_file is None:
        why = "keeps its data in an external data file but does not name it; not supported"
        problems.append(Refusal("no_data_file", path, why))
    elif image.data_file is not None and has_protocol(image.data_file):
        problems.append(
            Refusal(
                "protocol_name",
                path,
                f"its external data file {image.data_file!r} is a protocol for QEMU, not a file. Such an image can "
                "make QEMU open whatever its author wants",
                "Restore it from a backup.",
            )
        )
    return problems


def resolve_name(image_path: str, name: str) -> str:
    """Return the path of a file that an image records; a relative one lies beside the name the image was opened by."""
    return os.path.join(os.path.dirname(image_path), name)


def read_chain(top: OpenImage, image_format: str | None, *, path: str | None = None) -> tuple[Layer, ...]:
    """Return the layers from the open image down to its base; Refusal if one is missing, odd or in a loop.

    Only the topmost image comes with its bitmaps. Give `path` if relative names count from another name than
    `top.path`.
    """
    return tuple(layer for layer, _file in walk_chain(top, image_format, path=path, with_bitmaps=True))


def walk_chain(
    top: OpenImage, image_format: str | None, *, with_bitmaps: bool, path: str | None = None
) -> t.Generator[tuple[Layer, OpenImage], None, None]:
    """Yield the layers from the open image down to its base, each with its file, which is open until the next step.

    Raise as read_chain() does, once the layers above the fault were yielded. Only the topmost image can come with its
    bitmaps.
    """
    layer = _read_layer(top, path or top.path, image_format, with_bitmaps=with_bitmaps)
    yield layer, top
    seen = {layer.identity}
    while layer.image is not None and layer.image.backing_file is not None:
        above, image_format = layer, layer.image.backing_format
        with open_below(above) as file:
            try:
                layer = _read_layer(file, file.path, image_format)
            except Refusal as exc:
                raise _below(exc, above) from exc
            _check_depth(layer, above, seen, top.path)
            yield layer, file


def _check_depth(layer: Layer, above: Layer, seen: set[Identity], top_path: str) -> None:
    """Add the layer to `seen`; Refusal if it was there already, or if these are too many."""
    if layer.identity in seen:
        raise Refusal(
            "chain_loop",
            above.path,
            f"its backing file {layer.path} is already part of the chain above it: the chain is a loop",
            "Correct the backing file with 'qemu-img rebase -u'.",
        )
    seen.add(layer.identity)
    if len(seen) > MAX_LAYERS:
        why = f"its backing chain has more than {MAX_LAYERS} images"
        raise Refusal("chain_too_long", top_path, why, "Merge some with 'qemu-img commit'.")


def _read_layer(file: OpenImage, path: str, image_format: str | None, *, with_bitmaps: bool = False) -> Layer:
    """Return the open image as a layer; a format that is not recorded is looked up, for reading only."""
    as_qcow2 = image_format == "qcow2" or (image_format is None and is_qcow2(file))
    image = read_image(file, with_bitmaps=with_bitmaps) if as_qcow2 else None
    virtual_size = image.virtual_size if image else (file.length() + SECTOR - 1) // SECTOR * SECTOR
    if image is not None and image.data_file is not None and not has_protocol(image.data_file):
        _check_data_file(path, resolve_name(path, image.data_file))
    return Layer(
        path=path,
        real_path=os.path.realpath(path),
        identity=file.identity,
        format=image_format,
        virtual_size=virtual_size,
        is_device=file.is_device,
        image=image,
    )


def _check_data_file(path: str, data_file: str) -> None:
    """Refuse an external data file in which no VM could have its data; it is not opened."""
    try:
        mode = os.stat(data_file).st_mode
    except (OSError, ValueError) as exc:
        why = f"its external data file {data_file} does not exist"
        raise Refusal("no_data_file", path, why, "Put it back in its place.") from exc
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise Refusal(
            "no_data_file",
            path,
            f"its external data file {data_file} is neither a file nor a block device. Such an image can make QEMU "
            "open whatever its author wants",
            "Restore it from a backup.",
        )


def open_below(above: Layer) -> OpenImage:
    """Open the backing file that the image of the layer records; Refusal if there is none that could be."""
    backing_file = above.image.backing_file if above.image else None
    if backing_file is None or has_protocol(backing_file):
        raise Refusal(
            "protocol_name",
            above.path,
            f"its backing file {backing_file!r} is a protocol for QEMU, not a file. This collection works with local "
            "files and block devices only",
            "If it is meant as a file, record its absolute path with 'qemu-img rebase -u -b'.",
        )
    try:
        return open_image(resolve_name(above.path, backing_file))
    except Refusal as exc:
        raise _below(exc, above) from exc


def _below(exc: Refusal, above: Layer) -> Refusal:
    """Return the refusal of an image with the name of the image above it."""
    return exc.with_note(f"It is the backing file of {above.path}.")
