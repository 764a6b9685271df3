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

import contextlib
import json
import os
import stat
import typing as t

from .._base.errors import Refusal
from .._base.files import Identity, OpenImage, open_image, real_path
from .formats import HEAD, PLAIN, QCOW2, RAW, WITHOUT_BACKING, format_by_magic, why_not
from .header import SECTOR, damaged, read_as_qemu
from .image import Image, read_image

MAX_LAYERS = 200  # libvirt follows no chain further either
Reader = t.Callable[[OpenImage], Image]
_FILE = "file:"  # QEMU's protocol for what is a file
_JSON = "json:"  # begins the description of a node of QEMU's


class Layer(t.NamedTuple):
    """One image of a backing chain."""

    path: str  # the name under which QEMU would open it, which is what a relative backing file is relative to
    real_path: str  # no symlinks
    identity: Identity  # two names of one file are one layer
    format: str | None  # as the layer above records it; None if it does not
    format_found: str  # the recorded one, or else that for which QEMU would take it
    virtual_size: int  # bytes
    is_device: bool
    image: Image | None  # None if the layer is not qcow2
    generation: int | None = None  # as OpenImage has it

    def written(self) -> int:
        """Return when it was last written to, in nanoseconds since 1970; 0 if that cannot be told."""
        with contextlib.suppress(OSError):
            return 0 if self.is_device else os.stat(self.real_path).st_mtime_ns
        return 0

    def is_bottom(self) -> bool:
        """Whether nothing is below it, as far as that can be known: what other formats say is not read."""
        if self.image is not None:
            return self.image.backing_file is None
        return self.format_found in (WITHOUT_BACKING if self.format else PLAIN)

    def why_no_bottom(self) -> Refusal | None:
        """Return why nobody can tell whether anything is below it; None if nothing is."""
        if self.is_bottom():
            return None
        why = f"is an image of the format {self.format_found}, and what is below it cannot be read"
        remedy = "Copy it into a qcow2 image ('qemu-img convert -O qcow2')."
        return self.why_not_read() or Refusal("unsupported", self.path, why, remedy)

    def why_not_read(self) -> Refusal | None:
        """Return why nobody can tell what is below it; None if the format of such an image is recorded, or plain."""
        if self.image is not None or self.format is not None or self.format_found in PLAIN:
            return None
        why = f"is an image of the format {self.format_found}, which holds no bitmaps and is not looked into"
        remedy = (
            "If it is the topmost image, copy it into a qcow2 image ('qemu-img convert -O qcow2'); of a backing file, "
            f"have the image above record its format by 'qemu-img rebase -u -F {self.format_found}'."
        )
        return Refusal("format_not_recorded", self.path, why, remedy)


def has_protocol(name: str) -> bool:
    """Whether QEMU would take this file name for a protocol (json:…, nbd:…); a colon after a slash is harmless."""
    return ":" in name.split("/", 1)[0]


def is_local(name: str) -> bool:
    """Whether QEMU takes this name of a backing file for a file, wherever QEMU was started."""
    return not has_protocol(name) or name.startswith(_FILE + "/")


def files_named(name: str) -> list[str]:
    """Return the names of the files that a recorded name of a backing file can lead a QEMU to, as far as it tells.

    To follow such names is for QEMU alone (see protocol_name); here they tell which files are in use. "json:" has what
    QEMU calls a node: its file, at any depth, as an object or by keys such as "file.filename".
    """
    if is_local(name):
        return [name]
    if name.startswith(_FILE):
        return [name[len(_FILE) :]]
    if not name.startswith(_JSON):
        return []
    try:
        return list(dict.fromkeys(_filenames(json.loads(name[len(_JSON) :]))))
    except (ValueError, RecursionError):  # no QEMU opens it either
        return []


def _filenames(node: object) -> t.Iterator[str]:
    """Yield the names of files that a node of QEMU's has."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, str) and key.split(".")[-1] == "filename":
            yield from files_named(value)
        yield from _filenames(value)


def resolve_name(image_path: str, name: str) -> str:
    """Return the path of the backing file of this name; a relative one lies beside the name the image was opened by."""
    return os.path.join(os.path.dirname(image_path), name[len(_FILE) :] if name.startswith(_FILE + "/") else name)


def why_unusable(path: str, image: Image, *, for_writing: bool) -> list[Refusal]:
    """Return why QEMU cannot, or must not, open the image although it can be read here."""
    problems = []
    if image.corrupt and for_writing:
        problems.append(
            Refusal(
                "corrupt",
                path,
                "is marked corrupt, by a QEMU that found its metadata damaged",
                "Repair it with 'qemu-img check -r all', or restore it, first.",
            )
        )
    if image.encrypted_with_aes:
        why = "is encrypted in the old way (AES, not LUKS), on which QEMU does not run VMs any more"
        problems.append(Refusal("encrypted", path, why, "Copy it into an image without it ('qemu-img convert')."))
    return [*problems, *_data_file_problems(path, image)]


def corrupt_below(top: str, layers: t.Sequence[Layer]) -> list[str]:
    """Return a warning for each image below the topmost one that is marked corrupt, which is no reason to refuse."""
    return [
        f"{layer.path}: is below {top} and marked corrupt. QEMU reads it nevertheless, but a merge into it is refused. "
        "Repair it with 'qemu-img check -r all' while no VM uses it, or restore it."
        for layer in layers[1:]
        if layer.image and layer.image.corrupt
    ]


def _data_file_problems(path: str, image: Image) -> list[Refusal]:
    """Return why the external data file cannot, or must not, be opened."""
    if image.has_data_file and image.data_file is None:
        why = "keeps its data in an external data file but does not name it; not supported"
        return [Refusal("no_data_file", path, why)]
    if image.data_file is not None and has_protocol(image.data_file):  # also file:, which newer QEMUs take as it is
        return [
            Refusal(
                "protocol_name",
                path,
                f"its external data file {image.data_file!r} is a protocol for QEMU, not a file. Such an image can "
                "make QEMU open whatever its author wants",
                "Restore it from a backup.",
            )
        ]
    return []


def relative_data_file(path: str, image: Image) -> Refusal | None:
    """Return what is wrong with an external data file that is recorded without its folder; None if none is."""
    name = image.data_file
    if name is None or os.path.isabs(name) or has_protocol(name):
        return None
    return Refusal(
        "relative_data_file",
        path,
        f"its external data file {name!r} is recorded without its folder. QEMU looks for it in the folder that QEMU "
        "itself was started in, which for a VM is another one than the image's",
        "Record its full name: in the folder where it is, run 'qemu-img amend -f qcow2 -o data_file=/full/name' on the "
        "image, while no VM uses it.",
    )


def read_head(file: OpenImage) -> Image:
    """Return what the open image says of itself, without its bitmaps."""
    return read_image(file, with_bitmaps=False)


def walk_chain(
    top: OpenImage,
    image_format: str | None,
    *,
    read_top: Reader = read_head,
    read_below: Reader = read_head,
    path: str | None = None,
) -> t.Generator[tuple[Layer, OpenImage], None, None]:
    """Yield the layers from the open image down to its base, each with its file, which is open until the next step.

    Refusal if one is missing, odd or in a loop, once the layers above it were yielded. `read_top` reads the topmost
    image, `read_below` the others. Give `path` if relative names count from another name than `top.path`.
    """
    layer = _read_layer(top, path or top.path, image_format, read_top)
    yield layer, top
    seen = {layer.identity}
    while layer.image is not None and layer.image.backing_file is not None:
        above, image_format = layer, layer.image.backing_format
        with open_below(above) as file:
            try:
                layer = _read_layer(file, file.path, image_format, read_below)
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
        # Not with 'qemu-img commit', which loses their bitmaps.
        remedy = "Merge the lowest ones down with state=committed of kvmfleet.qcow2.qcow2_overlay, naming above."
        raise Refusal("chain_too_long", top_path, why, remedy)


def _read_layer(file: OpenImage, path: str, image_format: str | None, read: Reader) -> Layer:
    """Return the open image as a layer; a format that is not recorded is looked up, for reading only."""
    found = image_format or _format_of(file)
    image = read(file) if found == QCOW2 else None
    virtual_size = image.virtual_size if image else (file.length() + SECTOR - 1) // SECTOR * SECTOR
    if image is None and image_format not in (None, RAW):
        _check_format(file, image_format)
    if image is not None and image.data_file is not None and os.path.isabs(image.data_file):
        _check_data_file(path, image.data_file)
    return Layer(
        path=path,
        real_path=real_path(path),
        identity=file.identity,
        format=image_format,
        format_found=found,
        virtual_size=virtual_size,
        is_device=file.is_device,
        image=image,
        generation=file.generation,
    )


def _format_of(file: OpenImage) -> str:
    """Return the format for which QEMU takes the open image, if nobody tells it."""
    return format_by_magic(read_as_qemu(file, HEAD, 0), file.path)


def _check_format(file: OpenImage, image_format: str | None) -> None:
    """Refuse an image that QEMU cannot open in the format, other than qcow2, that is recorded for it."""
    why = why_not(image_format or RAW, read_as_qemu(file, HEAD, 0), file.is_device)
    if why is not None:
        raise damaged(
            file.path,
            f"it is recorded as {image_format}, but {why}",
            "Restore it from a backup, or record its format with 'qemu-img rebase -u -b … -F …' in the image above.",
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
    if backing_file is None or not is_local(backing_file):
        raise _not_local(above.path, backing_file)
    try:
        return open_image(resolve_name(above.path, backing_file))
    except Refusal as exc:
        raise _below(exc, above) from exc


def _not_local(path: str, backing_file: str | None) -> Refusal:
    """Return the refusal of an image whose backing file is none that can be opened here."""
    if backing_file is not None and backing_file.startswith(_FILE):
        what = "is looked for in the folder that QEMU was started in, so nobody can tell which file it is"
    else:
        what = "is a protocol for QEMU, not a file. This collection works with local files and block devices only"
    remedy = "If it is meant as a file, record its absolute path with 'qemu-img rebase -u -b'."
    return Refusal("protocol_name", path, f"its backing file {backing_file!r} {what}", remedy)


def _below(exc: Refusal, above: Layer) -> Refusal:
    """Return the refusal of an image with the name of the image above it."""
    return exc.with_note(f"It is the backing file of {above.path}.")
