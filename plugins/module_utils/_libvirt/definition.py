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
import json
import typing as t
import xml.dom.minidom
import xml.parsers.expat

FORMATS = ("qcow2", "raw")  # that an image with an overlay on top can have here
_DISK = ["domain", "devices", "disk"]
_SOURCE_ATTRIBUTES = {"file": "file", "block": "dev"}  # which attribute of <source> has the path, by type of the disk
# What <source> can have (libvirt 12.8: diskSourceFile, diskSourceBlock and diskSourceVolume of domaincommon.rng, and
# storagecommon.rng), and what becomes of it when the disk gets an overlay. What is in no row is refused, too.
#   file, dev, pool, volume, mode   replaced: they are the image
#   startupPolicy, index, seclabel  stay: they are about the disk, whatever image it has
#   dataStore                       goes: the image below records its data file itself, which is compared
#   slices                          refused: they are a part of the old file
#   encryption                      refused: it has the key of the old image
#   fdgroup                         refused: it is the old image, opened by whoever started the domain
#   reservations                    refused: they belong to a SCSI device (device='lun')
#   privateData                     refused: it is libvirt's own, of a running domain
# The types nvme, network, dir, vhostuser, vhostvdpa and ctl cannot take part at all. Only they have protocol, name,
# tls, tlsHostname, query, transport, namespace, managed, dir; host, snapshot, config, auth, reconnect, initiator,
# address, cookies, ssl, readahead, timeout, knownHosts, identity.
_REPLACED = ("file", "dev", "pool", "volume", "mode")
_ALLOWED = frozenset((*_REPLACED, "startupPolicy", "index", "seclabel", "dataStore"))
_HAD = "kvmfleet.qcow2 deletes it disk by disk. The bitmaps that it had: "  # description of a checkpoint, then JSON


class Source(t.NamedTuple):
    """The image of a disk, as <source>, <driver type> and the type of the disk name it."""

    path: str
    format: str = "qcow2"
    type: str = "file"  # or block


class Volume(t.NamedTuple):
    """A volume of a storage pool, as a definition names it."""

    pool: str
    name: str
    is_direct: bool  # mode='direct': QEMU talks to the iSCSI server itself, in place of using the host's device


class Place(t.NamedTuple):
    """Where the image of a volume is."""

    path: str | None  # None if it cannot be told, or if QEMU does not open it by its path
    kind: str = "file"  # or block, or else what it is that has no path
    why_unfit: str | None = None
    suspect: str | None = None  # a path that it may have all the same, or only the name of the file

    @property
    def shown(self) -> str:
        """The path, if there is any, for a comparison with what images record."""
        return self.path or self.suspect or self.kind


class StatedImage(t.NamedTuple):
    """An image that a definition states to be below another."""

    path: str  # of an image that is no local file, its type
    format: str
    data_file: str | None = None  # None: whatever the image records
    parts: tuple[str, ...] = ()  # what <source> has beside that, and no image could record


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
    data_file: str | None = None  # that <dataStore> states; None if it does not
    is_optional: bool = False  # by startupPolicy='optional': without its file the domain starts without the disk
    volume: Volume | None = None
    suspect: str | None = None  # as Place has it

    @property
    def stated_images(self) -> tuple[StatedImage, ...]:
        """The images that are stated to be below its own."""
        return self.stated_chain.images if self.stated_chain is not None else ()

    @property
    def can_have_bitmaps(self) -> bool:
        """Whether its images are ones that can be looked at, and whose format can keep bitmaps."""
        return self.source is not None and self.format == "qcow2" and self.why_unfit is None


class CheckpointParts(t.NamedTuple):
    """What is kept of the XML of a checkpoint, which has the whole definition of the domain at that time."""

    bitmaps: t.Mapping[str, str]  # by target; those that it had if its deletion was begun
    disks: tuple[DomainDisk, ...]  # that the domain had, and could write to; of volumes nothing but their names
    left_out: frozenset[str]  # targets of the other ones; where the definition is missing, of whatever had a target
    created: int  # seconds since 1970
    parent: str | None  # name of the checkpoint before
    sizes: t.Mapping[str, int]  # dirty bytes by target, of the disks of which libvirt tells them
    is_half_deleted: bool  # a run that was killed had begun to delete it disk by disk

    @property
    def images(self) -> frozenset[str]:
        """The paths of those disks."""
        return frozenset(disk.source for disk in self.disks if disk.source is not None)

    @property
    def volumes(self) -> frozenset[Volume]:
        """Those of them that were volumes."""
        return frozenset(disk.volume for disk in self.disks if disk.volume is not None)


class Definition:
    """The XML of a domain. Its disks are parsed once.

    `places` has the images of the volumes that it names. They are known to libvirt, not to the XML.
    """

    def __init__(self, text: str, places: t.Mapping[Volume, Place] | None = None) -> None:
        self.text = text
        self.places = places or {}

    @functools.cached_property
    def volumes(self) -> tuple[Volume, ...]:
        """The volumes that the disks, and what is stated to be below them, are."""
        if "volume=" not in self.text:  # as in nearly all definitions
            return ()
        elements = _parse(self.text).getElementsByTagName("source")
        return tuple(_volume_from(source) for source in elements if source.hasAttribute("volume"))

    def with_places(self, places: t.Mapping[Volume, Place]) -> Definition:
        """Return the definition with what libvirt knows of its volumes."""
        return Definition(self.text, {volume: places[volume] for volume in self.volumes if volume in places})

    @functools.cached_property
    def disks(self) -> tuple[DomainDisk, ...]:
        """The disks, in the order of the definition."""
        return tuple(_disk_from(element, self.places) for element in _disk_elements(_parse(self.text)))

    @property
    def nvram(self) -> str | None:
        """The path of the file or device in which the firmware keeps its variables, if it is a local one."""
        if "<nvram" not in self.text:  # as in most definitions
            return None
        systems = _children(_parse(self.text).documentElement, "os")
        for nvram in (nvram for system in systems for nvram in _children(system, "nvram")):
            return _text_of(nvram) or _source_of(nvram, nvram.getAttribute("type") or "file")
        return None

    @property
    def has_tpm_state(self) -> bool:
        """Whether it has a TPM in software, which keeps its state in files of its own."""
        if "<tpm" not in self.text:
            return False
        backends = [
            backend
            for devices in _children(_parse(self.text).documentElement, "devices")
            for tpm in _children(devices, "tpm")
            for backend in _children(tpm, "backend")
        ]
        return any(backend.getAttribute("type") in ("emulator", "external") for backend in backends)

    @property
    def tops(self) -> dict[str, str]:
        """The path of the topmost image of each disk that has one, by target."""
        return {disk.target: disk.source for disk in self.disks if disk.source is not None}

    @property
    def paths(self) -> list[str]:
        """The paths of all images that it names, those that it states to be below others included."""
        stated = (image.path for disk in self.disks for image in disk.stated_images)
        return [*self.tops.values(), *stated]

    def with_sources(self, sources: t.Mapping[str, Source]) -> Definition:
        """Return the definition with these targets switched to these images.

        Change the path, the type and the format only. Drop the stated backing chain and the stated data file: they
        are those of another image, and each image records its own.
        """
        data = self.text.encode("utf-8")
        for start, end in reversed(_places_of_disks(data)):
            document = _parse(data[start:end].decode("utf-8"))
            element = document.documentElement
            target = _target_of(element)
            if target in sources:
                _switch(document, element, sources[target])
                data = data[:start] + element.toxml().encode("utf-8") + data[end:]
        return Definition(data.decode("utf-8"), self.places)

    def has_only_switched(self, old: Definition, sources: t.Mapping[str, Source]) -> bool:
        """Whether these targets are these images, and nothing else about the disks differs from `old`."""
        own = {disk.target: disk for disk in self.disks}
        others = [disk for disk in self.disks if disk.target not in sources]
        return others == [disk for disk in old.disks if disk.target not in sources] and all(
            target in own
            and (own[target].source, own[target].format, own[target].kind) == source
            and (own[target].stated_chain, own[target].data_file, own[target].volume) == (None, None, None)
            for target, source in sources.items()
        )

    def parts(self, targets: t.Container[str]) -> str:
        """Return the elements of these disks only, for a diff."""
        elements = [element for element in _disk_elements(_parse(self.text)) if _target_of(element) in targets]
        return "".join(f"    {element.toxml()}\n" for element in elements)


def checkpoint_from(text: str) -> CheckpointParts:
    """Return what the XML of a checkpoint says (libvirt, "Checkpoint XML format")."""
    root = _parse(text).documentElement
    named = _disks_of_checkpoint(root)
    with_bitmap = [disk for disk in named if disk.getAttribute("checkpoint") == "bitmap"]
    had = _bitmaps_before(root)
    bitmaps = had or {disk.getAttribute("name"): disk.getAttribute("bitmap") for disk in with_bitmap}
    times = [_text_of(time) for time in _children(root, "creationTime")]
    parents = [_text_of(name) for parent in _children(root, "parent") for name in _children(parent, "name")]
    domains = _children(root, "domain")
    disks = [_disk_from(disk, {}) for domain in domains for disk in _disks_of(domain) if _is_written(disk)]
    left_out = frozenset(disk.getAttribute("name") for disk in named) - set(bitmaps)
    return CheckpointParts(
        bitmaps,
        tuple(disks),
        left_out & {disk.target for disk in disks} if domains else left_out,
        created=int(times[0]) if times else 0,
        parent=parents[0] if parents else None,
        sizes={d.getAttribute("name"): int(d.getAttribute("size")) for d in with_bitmap if d.hasAttribute("size")},
        is_half_deleted=bool(had),
    )


def _disks_of_checkpoint(root: t.Any) -> list[t.Any]:
    return [disk for part in _children(root, "disks") for disk in _children(part, "disk")]


def _bitmaps_before(root: t.Any) -> dict[str, str]:
    """Return the bitmaps that only_disk() has noted in the description of a checkpoint, by target."""
    for text in (_text_of(one) for one in _children(root, "description")):
        try:
            had = json.loads(text[len(_HAD) :]) if text.startswith(_HAD) else None
        except ValueError:
            continue
        if isinstance(had, dict) and all(isinstance(bitmap, str) for bitmap in had.values()):
            return had
    return {}


def only_disk(text: str, bitmaps: t.Mapping[str, str], target: str) -> str:
    """Return the XML of a checkpoint with the bitmap of this disk alone; note in it the `bitmaps` that it had."""
    document = _parse(text)
    root = document.documentElement
    for disk in _disks_of_checkpoint(root):
        if disk.getAttribute("name") == target:
            disk.setAttribute("checkpoint", "bitmap")
            disk.setAttribute("bitmap", bitmaps[target])
        elif disk.hasAttribute("bitmap"):
            disk.setAttribute("checkpoint", "no")
            disk.removeAttribute("bitmap")
    for description in list(_children(root, "description")):
        root.removeChild(description)
    description = document.createElement("description")
    description.appendChild(document.createTextNode(_HAD + json.dumps(dict(bitmaps))))
    root.appendChild(description)
    return t.cast("str", root.toxml())


def pool_from(text: str) -> tuple[str, str | None]:
    """Return the type of a storage pool and the folder of its volumes (libvirt, "Storage pool XML format")."""
    root = _parse(text).documentElement
    paths = [path for target in _children(root, "target") for path in _children(target, "path")]
    return root.getAttribute("type"), _text_of(paths[0]) or None if paths else None


def _text_of(element: t.Any) -> str:
    """Return the text in an element, without that of its children."""
    return "".join(part.data for part in element.childNodes if part.nodeType == part.TEXT_NODE).strip()


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
    return _disks_of(document.documentElement)


def _disks_of(domain: t.Any) -> list[t.Any]:
    return [disk for devices in _children(domain, "devices") for disk in _children(devices, "disk")]


def _is_written(disk: t.Any) -> bool:
    """Whether the domain can write to a disk. One that it only reads may be a template."""
    return (disk.getAttribute("device") or "disk") == "disk" and not _children(disk, "readonly")


def _target_of(disk: t.Any) -> str:
    """Return the name of a disk in the guest, such as vda."""
    return t.cast("str", _children(disk, "target")[0].getAttribute("dev"))


def _source_of(element: t.Any, kind: str) -> str | None:
    """Return the path of a local image, of a disk, of a <backingStore> or of a <dataStore>."""
    attribute = _SOURCE_ATTRIBUTES.get(kind)
    paths = [source.getAttribute(attribute) for source in _children(element, "source")] if attribute else []
    return paths[0] or None if paths else None


def _volume_from(source: t.Any) -> Volume:
    """Return the volume that a <source> names."""
    mode = source.getAttribute("mode")
    return Volume(source.getAttribute("pool"), source.getAttribute("volume"), mode == "direct")


def _place_of(element: t.Any, places: t.Mapping[Volume, Place]) -> tuple[Volume | None, Place]:
    """Return where the image of an element is, with the volume that it is, if it is one."""
    kind = element.getAttribute("type") or "file"
    if kind in _SOURCE_ATTRIBUTES:
        path = _source_of(element, kind)
        return None, Place(path, kind, "no source" if path is None else None)
    volumes = [_volume_from(source) for source in _children(element, "source") if source.hasAttribute("volume")]
    if kind != "volume" or not volumes:
        return None, Place(None, kind, kind)
    return volumes[0], places.get(volumes[0], Place(None, kind, kind))


def _disk_from(element: t.Any, places: t.Mapping[Volume, Place]) -> DomainDisk:
    """Return what one element says."""
    volume, place = _place_of(element, places)
    drivers = [driver.getAttribute("type") for driver in _children(element, "driver")]
    image_format = (drivers[0] if drivers else "") or "raw"
    sources, stated = _children(element, "source"), _children(element, "backingStore")
    return DomainDisk(
        target=_target_of(element),
        kind=place.kind,
        source=place.path,
        format=image_format,
        why_unfit=_why_unfit(element, image_format, place),
        opted_out=element.getAttribute("snapshot") == "no",
        stated_chain=_stated_chain(stated[0], places) if stated else None,
        data_file=_data_file(sources, places),
        is_optional=any(source.getAttribute("startupPolicy") == "optional" for source in sources),
        volume=volume,
        suspect=place.suspect,
    )


def _why_unfit(element: t.Any, image_format: str, place: Place) -> str | None:
    """Return why a disk can take no part, or None."""
    device = element.getAttribute("device") or "disk"
    parts = [*(part for part in ("encryption", "auth") if _children(element, part)), *_other_parts(element)]
    rules = [
        (device != "disk", device),
        (bool(_children(element, "readonly")), "read-only"),
        (bool(_children(element, "shareable")), "shareable"),
        (bool(_children(element, "transient")), "transient"),
        (place.why_unfit is not None, place.why_unfit),
        ("encryption" in parts, "encrypted"),
        ("slices" in parts, "slice of a file"),
        (bool(parts), f"its definition has {', '.join(parts)}, which an overlay cannot have"),
        (image_format not in FORMATS, f"format {image_format}"),
    ]
    return next((reason for applies, reason in rules if applies), None)


def _other_parts(element: t.Any) -> list[str]:
    """Return the names of what the <source> of an element has that is not on the list of what may be there."""
    names = set()
    for source in _children(element, "source"):
        names |= set(source.attributes.keys())
        names |= {child.nodeName for child in source.childNodes if child.nodeType == child.ELEMENT_NODE}
    return sorted(names - _ALLOWED)


def _data_file(sources: t.Sequence[t.Any], places: t.Mapping[Volume, Place]) -> str | None:
    """Return the external data file that <dataStore> states; of one that is no local file, its type."""
    for store in (store for source in sources for store in _children(source, "dataStore")):
        _volume, place = _place_of(store, places)
        return place.shown
    return None


def _stated_chain(element: t.Any, places: t.Mapping[Volume, Place]) -> StatedChain:
    """Return the chain that a <backingStore> states, which are nested; an empty one says that there is no more."""
    images: list[StatedImage] = []
    while element.getAttribute("type") or _children(element, "source"):
        formats = [stated.getAttribute("type") for stated in _children(element, "format")]
        _volume, place = _place_of(element, places)
        images.append(
            StatedImage(
                place.shown,
                formats[0] if formats else "raw",
                _data_file(_children(element, "source"), places),
                tuple(_other_parts(element)) if place.path else (),  # else it has no image that could record it
            )
        )
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
    for attribute in _REPLACED:
        if attribute != wanted and source.hasAttribute(attribute):
            source.removeAttribute(attribute)
    source.setAttribute(wanted, image.path)
    _remove(source, "dataStore")
    drivers = _children(disk, "driver")
    if not drivers:
        drivers = [document.createElement("driver")]
        drivers[0].setAttribute("name", "qemu")
        disk.insertBefore(drivers[0], source)
    drivers[0].setAttribute("type", image.format)
    _remove(disk, "backingStore")


def _remove(element: t.Any, name: str) -> None:
    """Remove the children of this name, each with the blank before it."""
    for child in _children(element, name):
        blank = child.previousSibling
        if blank is not None and blank.nodeType == blank.TEXT_NODE and not blank.data.strip():
            element.removeChild(blank)
        element.removeChild(child)
