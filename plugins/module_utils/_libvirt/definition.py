# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what the definition of a libvirt domain says of its disks, and what it must become.

Pure: XML in, values or XML out (libvirt, "Domain XML format", Hard drives, floppy disks, CDROMs). Whatever is not
inside the element of a switched disk stays as it was, byte by byte.
"""

from __future__ import annotations

import functools
import typing as t
import xml.dom.minidom
import xml.parsers.expat

FORMATS = ("qcow2", "raw")  # that an image with an overlay on top can have here
_DISK = ["domain", "devices", "disk"]
_SOURCE_ATTRIBUTES = {"file": "file", "block": "dev"}  # which attribute of <source> has the path, by type of the disk


class Source(t.NamedTuple):
    """The image of a disk, as <source>, <driver type> and the type of the disk name it."""

    path: str
    format: str = "qcow2"
    type: str = "file"  # or block


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
    source: str | None  # path; None if it has none
    format: str  # as <driver type> says
    why_unfit: str | None  # why it can take no part in snapshots
    opted_out: bool  # by snapshot='no', which is a default only
    stated_chain: StatedChain | None


class Definition:
    """The XML of a domain. Its disks are parsed once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def disks(self) -> tuple[DomainDisk, ...]:
        """The disks, in the order of the definition."""
        return tuple(_disk_from(element) for element in _disk_elements(_parse(self.text)))

    @property
    def tops(self) -> dict[str, str]:
        """The path of the topmost image of each disk that has one, by target."""
        return {disk.target: disk.source for disk in self.disks if disk.source is not None}

    def with_sources(self, sources: t.Mapping[str, Source]) -> Definition:
        """Return the definition with these targets switched to these images.

        Change the path, the type and the format only. Drop the stated backing chain: it would end at the wrong image,
        and the image itself records what is below it.
        """
        data = self.text.encode("utf-8")
        for start, end in reversed(_places_of_disks(data)):
            document = _parse(data[start:end].decode("utf-8"))
            element = document.documentElement
            target = _target_of(element)
            if target in sources:
                _switch(document, element, sources[target])
                data = data[:start] + element.toxml().encode("utf-8") + data[end:]
        return Definition(data.decode("utf-8"))

    def has_only_switched(self, old: Definition, sources: t.Mapping[str, Source]) -> bool:
        """Whether these targets are these images, and nothing else about the disks differs from `old`."""
        own = {disk.target: disk for disk in self.disks}
        others = [disk for disk in self.disks if disk.target not in sources]
        return others == [disk for disk in old.disks if disk.target not in sources] and all(
            target in own
            and (own[target].source, own[target].format, own[target].kind) == source
            and own[target].stated_chain is None
            for target, source in sources.items()
        )

    def parts(self, targets: t.Container[str]) -> str:
        """Return the elements of these disks only, for a diff."""
        elements = [element for element in _disk_elements(_parse(self.text)) if _target_of(element) in targets]
        return "".join(f"    {element.toxml()}\n" for element in elements)


def bitmaps_of(checkpoint: str) -> dict[str, str]:
    """Return the bitmaps of a checkpoint by target (libvirt, "Checkpoint XML format")."""
    disks = _children(_children(_parse(checkpoint).documentElement, "disks")[0], "disk")
    return {
        disk.getAttribute("name"): disk.getAttribute("bitmap")
        for disk in disks
        if disk.getAttribute("checkpoint") == "bitmap"
    }


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
    places = [element, *_children(element, "source")]
    inner = [part for part in ("encryption", "slices") if any(_children(place, part) for place in places)]
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


def _switch(document: t.Any, disk: t.Any, image: Source) -> None:
    """Have a disk be this image."""
    disk.setAttribute("type", image.type)
    source = _children(disk, "source")[0]
    wanted = _SOURCE_ATTRIBUTES[image.type]
    for attribute in _SOURCE_ATTRIBUTES.values():
        if attribute != wanted and source.hasAttribute(attribute):
            source.removeAttribute(attribute)
    source.setAttribute(wanted, image.path)
    drivers = _children(disk, "driver")
    if not drivers:
        drivers = [document.createElement("driver")]
        drivers[0].setAttribute("name", "qemu")
        disk.insertBefore(drivers[0], source)
    drivers[0].setAttribute("type", image.format)
    for stated in _children(disk, "backingStore"):
        blank = stated.previousSibling
        if blank is not None and blank.nodeType == blank.TEXT_NODE and not blank.data.strip():
            disk.removeChild(blank)
        disk.removeChild(stated)
