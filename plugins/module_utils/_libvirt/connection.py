# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the libvirt daemon of this host, by its Python bindings.

The calls that are made, here, in switch.py and in pools.py: open; listAllDomains, lookupByUUIDString, defineXML,
listAllStoragePools of the connection; name, UUIDString, isActive, state, isPersistent, hasManagedSaveImage, XMLDesc,
listAllCheckpoints, listAllSnapshots of a domain; getName, getXMLDesc of a checkpoint; getName of a snapshot; name,
XMLDesc, isActive, storageVolLookupByName, refresh of a storage pool; path, info of a volume.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal
from .bindings import LibvirtError, known, libvirt, words_of
from .definition import Definition, checkpoint_from
from .pools import Pools

_STATES = {1: "running", 2: "blocked", 3: "paused", 4: "shutting down", 7: "suspended"}  # virDomainState


class KnownCheckpoint(t.NamedTuple):
    """A checkpoint that libvirt has of a domain."""

    name: str
    bitmaps: t.Mapping[str, str]  # by target


class Domain(t.NamedTuple):
    """A domain as libvirt describes it."""

    name: str
    uuid: str
    state: str | None  # running, paused, …; None if it is shut off
    persistent: bool
    managed_save: bool
    definition: Definition  # what the next start uses, with its secrets
    running_definition: Definition | None  # what it runs with; None if it is shut off


class Kept(t.NamedTuple):
    """What libvirt keeps of a domain beside its definition."""

    checkpoints: tuple[KnownCheckpoint, ...] = ()  # by name
    snapshots: tuple[str, ...] = ()  # names of libvirt's own, internal ones and external ones that have metadata
    images: frozenset[str] = frozenset()  # paths of the disks that it had when its checkpoints were made


class Unreadable(t.NamedTuple):
    """A domain, or the name of one, of which nothing can be said."""

    name: str
    problem: Refusal


class Libvirt:
    """A connection to the daemon."""

    def __init__(self, uri: str) -> None:
        """Connect; Refusal if that is not possible."""
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or every error is on standard error too
        try:
            self.connection = libvirt.open(uri)
        except LibvirtError as exc:
            why = f"libvirt cannot be reached: {words_of(exc)}"
            remedy = "See that its daemon runs and that this user may use it: run with become, or give another uri."
            raise Refusal("libvirt_unreachable", uri, why, remedy) from exc
        self.pools = Pools(self.connection)

    def domains(self) -> dict[str, Domain | Unreadable]:
        """Return all domains of the host by name."""
        try:
            handles = {handle.name(): handle for handle in self.connection.listAllDomains(0)}
        except LibvirtError as exc:
            why = f"libvirt cannot list its domains: {words_of(exc)}"
            raise Refusal("libvirt_failed", "", why, "See that its daemon runs, then run this again.") from exc
        return {name: self._with_places(_read(handle, name)) for name, handle in handles.items()}

    def _with_places(self, one: Domain | Unreadable) -> Domain | Unreadable:
        """Return a domain with what libvirt knows of the volumes that its definitions name."""
        if isinstance(one, Unreadable):
            return one
        running = one.running_definition
        volumes = {*one.definition.volumes, *(running.volumes if running else ())}
        places = {volume: self.pools.place_of(volume) for volume in volumes}
        return one._replace(
            definition=one.definition.with_places(places),
            running_definition=running.with_places(places) if running else None,
        )

    def kept(self, domain: Domain) -> Kept:
        """Return the checkpoints and snapshots of a domain; Refusal if libvirt cannot tell."""
        try:
            handle = self.connection.lookupByUUIDString(domain.uuid)
            checkpoints = sorted(known(handle.listAllCheckpoints), key=lambda one: t.cast("str", one.getName()))
            parts = [(one.getName(), checkpoint_from(one.getXMLDesc(0))) for one in checkpoints]
            snapshots = tuple(sorted(one.getName() for one in known(handle.listAllSnapshots)))
        except LibvirtError as exc:
            raise unreadable(domain.name, exc) from exc
        places = [self.pools.place_of(volume) for _name, part in parts for volume in part.volumes]
        return Kept(
            tuple(KnownCheckpoint(name, part.bitmaps) for name, part in parts),
            snapshots,
            # Without a path of today nothing is known, and a disk is rather ambiguous.
            frozenset(place.path for place in places if place.path).union(*(part.images for _name, part in parts)),
        )


def _read(handle: t.Any, name: str) -> Domain | Unreadable:
    """Return what libvirt says of a domain."""
    try:
        state = _STATES.get(handle.state()[0], "active") if handle.isActive() else None
        return Domain(
            name=name,
            uuid=handle.UUIDString(),
            state=state,
            persistent=bool(handle.isPersistent()),
            managed_save=bool(handle.hasManagedSaveImage(0)),
            definition=definition_of(handle),
            running_definition=Definition(handle.XMLDesc(0)) if state else None,
        )
    except LibvirtError as exc:
        return Unreadable(name, unreadable(name, exc))


def definition_of(handle: t.Any) -> Definition:
    """Return what the next start uses; with its secrets, or defining it anew would lose them."""
    return Definition(handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))


def unreadable(name: str, exc: t.Any) -> Refusal:
    """Return the refusal of a domain of which libvirt cannot tell."""
    return Refusal("libvirt_failed", name, f"libvirt cannot tell about it: {words_of(exc)}", "Run this again.")
