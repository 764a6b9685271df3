# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what the XML of a domain that runs says of the chains of its disks, and of its guest agent.

Pure: XML in, values or XML out. libvirt numbers the images of a chain; by these numbers they are named to it, since one
image can have several paths.
"""

from __future__ import annotations

import os
import typing as t
import xml.dom.minidom
import xml.sax.saxutils

_AGENT = "org.qemu.guest_agent.0"


class RunningImage(t.NamedTuple):
    """One image of the chain of a disk."""

    path: str | None  # None if it is no local file or device, or a volume
    number: str  # libvirt's number of it; empty if it has none


class Mirror(t.NamedTuple):
    """What a block job writes to beside the disk."""

    job: str  # active-commit, copy
    image: RunningImage


class RunningDisk(t.NamedTuple):
    """A disk as the domain has it just now."""

    target: str
    images: tuple[RunningImage, ...]  # the topmost first
    mirror: Mirror | None

    def place_of(self, path: str) -> int | None:
        """Return at which place of the chain the image of this path is; None if it is in none."""
        real = os.path.realpath(path)
        paths = [image.path and os.path.realpath(image.path) for image in self.images]
        return paths.index(real) if real in paths else None

    def name_of(self, place: int) -> str:
        """Return how libvirt is told which image of the chain is meant."""
        image = self.images[place]
        return f"{self.target}[{image.number}]" if image.number else image.path or ""


def run_of(text: str) -> str:
    """Return libvirt's number of the run of a domain, which is another one after each start; empty if it is shut off.

    The same text has the disks: an answer of its own could come from after the end of the domain.
    """
    root: t.Any = xml.dom.minidom.parseString(text).documentElement
    return t.cast("str", root.getAttribute("id"))


def running_disks(text: str) -> tuple[RunningDisk, ...]:
    """Return the disks of a domain that runs. Of one that is shut off libvirt tells no chains."""
    root = xml.dom.minidom.parseString(text).documentElement
    devices = [device for part in _children(root, "devices") for device in _children(part, "disk")]
    return tuple(_disk_from(device) for device in devices)


def _disk_from(element: t.Any) -> RunningDisk:
    images = []
    part, indexed = element, next(iter(_children(element, "source")), None)
    while part is not None and _children(part, "source"):
        images.append(RunningImage(_path_of(part), indexed.getAttribute("index") if indexed is not None else ""))
        part = indexed = next(iter(_children(part, "backingStore")), None)
    mirrors = [Mirror(one.getAttribute("job"), _mirrored(one)) for one in _children(element, "mirror")]
    target = _children(element, "target")[0].getAttribute("dev")
    return RunningDisk(target, tuple(images), mirrors[0] if mirrors else None)


def _mirrored(element: t.Any) -> RunningImage:
    """Return the image that a block job writes to; one of the chain has the number that it has there."""
    source = next(iter(_children(element, "source")), None)
    return RunningImage(_path_of(element), source.getAttribute("index") if source is not None else "")


def _path_of(element: t.Any) -> str | None:
    """Return the path of a local image."""
    for source in _children(element, "source"):
        return source.getAttribute("file") or source.getAttribute("dev") or None
    return None


def _children(element: t.Any, name: str) -> list[t.Any]:
    return [child for child in element.childNodes if child.nodeName == name]


def why_not_quiesced(text: str) -> str | None:
    """Return why the guest's agent cannot be asked to hold the guest's writes; None if it can, as far as is known."""
    root = xml.dom.minidom.parseString(text).documentElement
    channels = [channel for part in _children(root, "devices") for channel in _children(part, "channel")]
    agents = [
        target
        for channel in channels
        for target in _children(channel, "target")
        if target.getAttribute("name") == _AGENT
    ]
    if not agents:
        return f"its definition has no channel for QEMU's guest agent ({_AGENT})"
    if all(agent.getAttribute("state") == "disconnected" for agent in agents):
        return "no guest agent answers in it"
    return None


def snapshot_xml(targets: t.Iterable[str], overlays: t.Mapping[str, str]) -> str:
    """Return the description of a snapshot in which these targets get these overlays, and the others none."""
    quoted = xml.sax.saxutils.quoteattr
    disks = "".join(
        f"<disk name={quoted(target)} snapshot='external' type='file'><driver type='qcow2'/>"
        f"<source file={quoted(overlays[target])}/></disk>"
        if target in overlays
        else f"<disk name={quoted(target)} snapshot='no'/>"
        for target in targets
    )
    return f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>"
