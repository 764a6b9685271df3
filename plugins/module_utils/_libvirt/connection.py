# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read and act: the libvirt daemon of this host, by its Python bindings."""

from __future__ import annotations

import time
import traceback
import typing as t

from .._base.errors import Qcow2Error, UnknownOutcomeError
from .definition import bitmaps_of, disks_of, without

try:
    import libvirt
except ImportError:
    libvirt = None
    LIBVIRT_IMPORT_ERROR: str | None = traceback.format_exc()
else:
    LIBVIRT_IMPORT_ERROR = None

_STATES = {1: "running", 2: "blocked", 3: "paused", 4: "shutting down", 7: "suspended"}  # virDomainState


class KnownCheckpoint(t.NamedTuple):
    """A checkpoint that libvirt has of a domain."""

    name: str
    bitmaps: dict[str, str]  # by target


class Domain(t.NamedTuple):
    """A domain as libvirt describes it."""

    name: str
    uuid: str
    state: str | None  # running, paused, …; None when it is shut off
    persistent: bool
    managed_save: bool
    definition: str  # XML of what the next start uses, with its secrets
    running_definition: str | None  # XML of what it runs with; None when it is shut off
    checkpoints: list[KnownCheckpoint]


class Unreadable(t.NamedTuple):
    """A domain, or the name of one, of which nothing can be said."""

    name: str
    problem: str


class Libvirt:
    """A connection to the daemon."""

    def __init__(self, uri: str) -> None:
        """Connect; Qcow2Error when that is not possible."""
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or every error is on standard error too
        try:
            self._connection = libvirt.open(uri)
        except libvirt.libvirtError as exc:
            raise Qcow2Error(
                f"libvirt cannot be reached at {uri}: {words_of(exc)}. Is its daemon running, and may this user use "
                "it? Run with become, or give another uri."
            ) from exc

    def domains(self) -> dict[str, Domain | Unreadable]:
        """Return all domains of the host by name."""
        try:
            handles = {handle.name(): handle for handle in self._connection.listAllDomains(0)}
        except libvirt.libvirtError as exc:
            raise Qcow2Error(
                f"libvirt cannot list its domains: {words_of(exc)}. See that its daemon runs, then run this again."
            ) from exc
        return {name: _read(handle, name) for name, handle in handles.items()}

    def switch(self, domain: Domain, new: str, overlays: t.Mapping[str, str], seconds: float) -> None:
        """Give the domain its new definition, in which these targets are these overlays, and read it back.

        Raises Qcow2Error if the old definition stands, UnknownOutcomeError if that is unknown. If the domain is just
        being started with the old definition, wait up to `seconds` for that start to fail on our locks.
        """
        try:
            handle = self._connection.lookupByUUIDString(domain.uuid)
            _check_unchanged(handle, domain)
        except libvirt.libvirtError as exc:
            raise Qcow2Error(f"{domain.name}: libvirt cannot look at it: {words_of(exc)}. Run this again.") from exc
        error = "libvirt took it, but made something else of it."
        try:
            self._connection.defineXML(new)
        except libvirt.libvirtError as exc:
            error = f"libvirt says: {words_of(exc)}."
        try:
            now = definition_of(handle)
        except libvirt.libvirtError as exc:
            raise _half_done(domain, f"libvirt says: {words_of(exc)}.") from exc
        if _is_as_wanted(now, domain, overlays):
            _wait_for_start(handle, domain, seconds)
            return
        if now != domain.definition:  # nor is it the old one: somebody else may be changing it, and is not overruled
            raise _half_done(domain, error)
        raise Qcow2Error(
            f"{domain.name}: its definition could not be changed, so the old one stands and new overlays were removed "
            f"again. {error} Check the space where libvirt keeps its definitions, and its log, then run this again."
        )


def _wait_for_start(handle: t.Any, domain: Domain, seconds: float) -> None:
    """Wait, so many seconds at most, until a start that has begun with the old definition has failed."""
    deadline = time.monotonic() + seconds
    try:
        while handle.isActive():
            if time.monotonic() > deadline:
                raise UnknownOutcomeError(
                    f"{domain.name}: was started while it was being with_sources, and runs on the images below its "
                    "overlays although they were locked, so its overlays were left in place. What it writes there its "
                    "bitmaps record, too. Shut it down, then run this again."
                )
            time.sleep(0.02)
    except libvirt.libvirtError as exc:
        raise _half_done(domain, f"libvirt says: {words_of(exc)}.") from exc


def _read(handle: t.Any, name: str) -> Domain | Unreadable:
    """Return what libvirt says of a domain."""
    try:
        state = None
        if handle.isActive():
            state = _STATES.get(handle.state()[0], "active")
        return Domain(
            name=name,
            uuid=handle.UUIDString(),
            state=state,
            persistent=bool(handle.isPersistent()),
            managed_save=bool(handle.hasManagedSaveImage(0)),
            definition=definition_of(handle),
            running_definition=handle.XMLDesc(0) if state else None,
            checkpoints=_checkpoints_of(handle),
        )
    except libvirt.libvirtError as exc:
        return Unreadable(name, f"{name}: libvirt cannot tell about it: {words_of(exc)}. Run this again.")


def definition_of(handle: t.Any) -> str:
    """Return what the next start uses; with its secrets, or defining it anew would lose them."""
    return t.cast("str", handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))


def _checkpoints_of(handle: t.Any) -> list[KnownCheckpoint]:
    """Return the checkpoints of a domain by name; none where the hypervisor driver knows no such thing."""
    try:
        checkpoints = sorted(handle.listAllCheckpoints(0), key=lambda one: t.cast("str", one.getName()))
    except libvirt.libvirtError as exc:
        if exc.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return []
        raise
    return [KnownCheckpoint(one.getName(), bitmaps_of(one.getXMLDesc(0))) for one in checkpoints]


def _check_unchanged(handle: t.Any, domain: Domain) -> None:
    """Raise when the domain is not any more what was judged."""
    if handle.isActive():
        raise Qcow2Error(f"{domain.name}: was started meanwhile. Shut it down and run this again.")
    if handle.hasManagedSaveImage(0):
        raise Qcow2Error(f"{domain.name}: has got a managed save meanwhile. Start it and shut it down, then run again.")
    if definition_of(handle) != domain.definition:
        raise Qcow2Error(f"{domain.name}: its definition was changed meanwhile. Run this again.")


def _is_as_wanted(now: str, domain: Domain, overlays: t.Mapping[str, str]) -> bool:
    """Whether the definition that was read back has the overlays, and nothing else has changed about the disks."""
    own = {disk.target: disk for disk in disks_of(now)}
    return without(now, overlays) == without(domain.definition, overlays) and all(
        target in own and (own[target].source, own[target].format, own[target].stated_chain) == (path, "qcow2", None)
        for target, path in overlays.items()
    )


def _half_done(domain: Domain, error: str) -> UnknownOutcomeError:
    """Return the error for a definition of which nobody knows what it is."""
    return UnknownOutcomeError(
        f"{domain.name}: its definition may or may not have been changed, so its overlays were left in place. {error} "
        "Look at 'virsh domblklist --inactive', then run this again."
    )


def words_of(exc: t.Any) -> str:
    """Return libvirt's own words."""
    return t.cast("str", exc.get_error_message() or str(exc)).rstrip(".")
