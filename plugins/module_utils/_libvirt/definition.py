# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: what the definition of a libvirt domain says of its disks, and what it must become.

Pure: XML in, values or XML out (libvirt, "Domain XML format", Hard drives, floppy disks, CDROMs). Whatever is not
inside the element of a with_sources disk stays as it was, byte by byte.
"""

from __future__ import annotations

import typing as t
import xml.dom.minidom
import xml.parsers.expat

FORMATS = ("qcow2", "raw")  # that an image with an overlay on top can have here
_DISK = ["domain", "devices", "disk"]
_SOURCE_ATTRIBUTES = {"file": "file", "block": "dev"}  # which attribute of <source> has the path, by type of the disk


class StatedImage(t.NamedTuple):
    """An image that a definition states to be below another."""

    path: str  # of an image that is no local file, its type
    format: str


class StatedChain(t.NamedTuple):
    """The backing chain that a definition states with <backingStore>, in place of what the images record."""

    images: tuple[StatedImage, ...]  # below the disk's own image
    is_complete: bool  # or else the last image tells what is below it


class DomainDisk(t.NamedTuple):
    """One disk of a definition."""

    target: str
    kind: str  # file, block, network, …
    source: str | None  # path; None when it has none
    format: str  # as <driver type> says
    why_unfit: str | None  # why it can take no part in snapshots
    opted_out: bool  # by snapshot='no', which is a default only
    stated_chain: StatedChain | None


def disks_of(definition: str) -> list[DomainDisk]:
    """Return the disks of a domain, in the order of its definition."""
    return [_disk_from(element) for element in _disk_elements(_parse(definition))]


def with_sources(definition: str, overlays: t.Mapping[str, str]) -> str:
    """Return the definition with these targets with_sources to the overlays with these paths.

    Only the path changes, and the format when it was raw. The stated backing chain goes: it would end at the wrong
    image, and the overlay itself records what is below it.
    """
    data = definition.encode("utf-8")
    for start, end in reversed(_places_of_disks(data)):
        document = _parse(data[start:end].decode("utf-8"))
        element = document.documentElement
        target = _target_of(element)
        if target in overlays:
            _switch(document, element, overlays[target])
            data = data[:start] + element.toxml().encode("utf-8") + data[end:]
    return data.decode("utf-8")


def _places_of_disks(data: bytes) -> list[tuple[int, int]]:
    """Return where the elements of the disks begin and end, in bytes."""
    parser = xml.parsers.expat.ParserCreate("utf-8")
    open_elements: list[str] = []
    places: list[tuple[int, int]] = []

    def start(name: str, _attributes: t.Any) -> None:
        open_elements.append(name)
        if open_elements == _DISK:
            places.append((parser.CurrentByteIndex, -1))

    def end(_name: str) -> None:
        if open_elements == _DISK:
            places[-1] = (places[-1][0], data.index(b">", parser.CurrentByteIndex) + 1)
        open_elements.pop()

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.Parse(data, True)
    return places


def parts_of(definition: str, targets: t.Container[str]) -> str:
    """Return the elements of these disks only, for a diff."""
    elements = [element for element in _disk_elements(_parse(definition)) if _target_of(element) in targets]
    return "".join(f"    {element.toxml()}\n" for element in elements)


def without(definition: str, targets: t.Container[str]) -> list[DomainDisk]:
    """Return the other disks, which a switch must leave as they are."""
    return [disk for disk in disks_of(definition) if disk.target not in targets]


def bitmaps_of(checkpoint: str) -> dict[str, str]:
    """Return the bitmaps of a checkpoint by target (libvirt, "Checkpoint XML format")."""
    disks = _children(_children(_parse(checkpoint).documentElement, "disks")[0], "disk")
    return {
        disk.getAttribute("name"): disk.getAttribute("bitmap")
        for disk in disks
        if disk.getAttribute("checkpoint") == "bitmap"
    }


def _parse(text: str) -> t.Any:
    """Return the document."""
    return xml.dom.minidom.parseString(text)


def _children(element: t.Any, name: str) -> list[t.Any]:
    """Return the direct children of this name."""
    return [child for child in element.childNodes if child.nodeName == name]


def _disk_elements(document: t.Any) -> list[t.Any]:
    """Return the elements of all disks."""
    return [disk for devices in _children(document.documentElement, "devices") for disk in _children(devices, "disk")]


def _target_of(disk: t.Any) -> str:
    """Return the name of a disk in the guest, such as vda."""
    return t.cast("str", _children(disk, "target")[0].getAttribute("dev"))


def _source_of(element: t.Any, kind: str) -> str | None:
    """Return the path of a local image, of a disk or of a <backingStore>."""
    attribute = _SOURCE_ATTRIBUTES.get(kind)
    paths = [source.getAttribute(attribute) for source in _children(element, "source")] if attribute else []
    return paths[0] or None if paths else None


def _disk_from(element: t.Any) -> DomainDisk:
    """Return what one element says."""
    kind = element.getAttribute("type") or "file"
    drivers = [driver.getAttribute("type") for driver in _children(element, "driver")]
    image_format = (drivers[0] if drivers else "") or "raw"
    source = _source_of(element, kind)
    stated = _children(element, "backingStore")
    return DomainDisk(
        target=_target_of(element),
        kind=kind,
        source=source,
        format=image_format,
        why_unfit=_why_unfit(element, kind, image_format, source),
        opted_out=element.getAttribute("snapshot") == "no",
        stated_chain=_stated_chain(stated[0]) if stated else None,
    )


def _why_unfit(element: t.Any, kind: str, image_format: str, source: str | None) -> str | None:
    """Return why a disk can take no part, or None."""
    device = element.getAttribute("device") or "disk"
    inner = [part for place in [element, *_children(element, "source")] for part in ("encryption", "slices")
             if _children(place, part)]  # fmt: skip
    rules = [
        (device != "disk", device),
        (bool(_children(element, "readonly")), "read-only"),
        (bool(_children(element, "shareable")), "shareable"),
        (bool(_children(element, "transient")), "transient"),
        (kind not in _SOURCE_ATTRIBUTES, kind),
        (source is None, "no source"),
        ("encryption" in inner, "encrypted"),
        ("slices" in inner, "slice of a file"),
        (image_format not in FORMATS, f"format {image_format}"),
    ]
    return next((reason for applies, reason in rules if applies), None)


def _stated_chain(element: t.Any) -> StatedChain:
    """Return the chain that a <backingStore> states, which are nested; an empty one says that there is no more."""
    images: list[StatedImage] = []
    while element.getAttribute("type") or _children(element, "source"):
        kind = element.getAttribute("type") or "file"
        formats = [stated.getAttribute("type") for stated in _children(element, "format")]
        images.append(StatedImage(_source_of(element, kind) or kind, formats[0] if formats else "raw"))
        inner = _children(element, "backingStore")
        if not inner:
            return StatedChain(tuple(images), is_complete=False)
        element = inner[0]
    return StatedChain(tuple(images), is_complete=True)


def _switch(document: t.Any, disk: t.Any, path: str) -> None:
    """Have a disk be the overlay."""
    disk.setAttribute("type", "file")
    source = _children(disk, "source")[0]
    if source.hasAttribute("dev"):
        source.removeAttribute("dev")
    source.setAttribute("file", path)
    drivers = _children(disk, "driver")
    if not drivers:
        drivers = [document.createElement("driver")]
        drivers[0].setAttribute("name", "qemu")
        disk.insertBefore(drivers[0], source)
    drivers[0].setAttribute("type", "qcow2")
    for stated in _children(disk, "backingStore"):
        blank = stated.previousSibling
        if blank is not None and blank.nodeType == blank.TEXT_NODE and not blank.data.strip():
            disk.removeChild(blank)
        disk.removeChild(stated)
