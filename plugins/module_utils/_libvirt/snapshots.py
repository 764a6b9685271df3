# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: have libvirt put a domain that runs on overlays, which are there already."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal, UnknownOutcomeError
from .bindings import LibvirtError, libvirt, words_of
from .connection import Domain, Libvirt, definition_of, unreadable
from .definition import Definition, Source
from .running import RunningDisk, running_disks, snapshot_xml


def take_snapshot(daemon: Libvirt, domain: Domain, sources: t.Mapping[str, Source], *, quiesce: bool) -> None:
    """Have the domain write to these images from now on, all at one moment.

    libvirt gives them the bitmaps that are in order below. Raises Refusal if the domain goes on with the images that it
    had, UnknownOutcomeError if that is unknown.
    """
    handle = look_up(daemon, domain)
    error: t.Any = None
    try:
        check_still_runs(handle, domain)
        targets = [disk.target for disk in running_disks(handle.XMLDesc(0))]
        handle.snapshotCreateXML(
            snapshot_xml(targets, {target: source.path for target, source in sources.items()}),
            libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
            | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
            | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE if quiesce else 0),
        )
    except LibvirtError as exc:
        error = exc
        if quiesce:  # libvirt does so itself, unless that is what failed
            with contextlib.suppress(LibvirtError):
                handle.fsThaw()
    check_switched(daemon, handle, domain, sources, error)


def look_up(daemon: Libvirt, domain: Domain) -> t.Any:
    """Return libvirt's handle of a domain."""
    try:
        return daemon.connection.lookupByUUIDString(domain.uuid)
    except LibvirtError as exc:
        raise unreadable(domain.name, exc) from exc


def disks_now(daemon: Libvirt, domain: Domain) -> tuple[RunningDisk, ...]:
    """Return the disks of a domain with their chains, as it has them just now."""
    handle = look_up(daemon, domain)
    try:
        return running_disks(handle.XMLDesc(0))
    except LibvirtError as exc:
        raise unreadable(domain.name, exc) from exc


def defined_now(daemon: Libvirt, domain: Domain) -> Definition:
    """Return what the next start of a domain uses."""
    handle = look_up(daemon, domain)
    try:
        return daemon.placed(definition_of(handle))
    except LibvirtError as exc:
        raise unreadable(domain.name, exc) from exc


def check_still_runs(handle: t.Any, domain: Domain) -> None:
    """Refuse a domain that does not run any more with the disks that were judged."""
    if not handle.isActive():
        raise shut_off_meanwhile(domain)
    now = Definition(handle.XMLDesc(0)).with_places(domain.definition.places)
    if domain.running_definition is None or now.tops != domain.running_definition.tops:
        raise Refusal("changed_meanwhile", domain.name, "has got other disks meanwhile", "Run this again.")


def shut_off_meanwhile(domain: Domain) -> Refusal:
    """Return the refusal of a domain that does not run any more."""
    return Refusal("changed_meanwhile", domain.name, "was shut off meanwhile", "Run this again.")


def check_switched(
    daemon: Libvirt, handle: t.Any, domain: Domain, sources: t.Mapping[str, Source], error: t.Any
) -> None:
    """Raise unless the domain runs on these images and is defined so; `error` is what libvirt has answered."""
    try:
        is_active = handle.isActive()
        parts = [definition_of(handle), *([Definition(handle.XMLDesc(0))] if is_active else [])]
    except LibvirtError as exc:
        raise _unknown(domain, f"libvirt says: {words_of(exc)}") from exc
    wanted = {(target, os.path.realpath(source.path)) for target, source in sources.items()}
    # With the end of a merge libvirt has the domain on the volume again that it was on before the snapshot.
    tops = [daemon.placed(part).tops for part in parts]
    there = [{(target, os.path.realpath(path)) for target, path in part.items()} for part in tops]
    if error is None and all(wanted <= tops for tops in there):
        return
    words = f"libvirt says: {words_of(error)}" if error is not None else "libvirt reports no error"
    if error is None or any(wanted & tops for tops in there):
        raise _unknown(domain, words)
    if not is_active:
        raise shut_off_meanwhile(domain)
    raise _refusal(domain, error) from error


def _refusal(domain: Domain, error: t.Any) -> Refusal:
    """Return the refusal of a snapshot that libvirt has not taken."""
    why = f"libvirt took no snapshot, and it goes on with the images that it had. libvirt says: {words_of(error)}"
    agent = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED)
    if error.get_error_code() in agent:
        return Refusal("not_quiesced", domain.name, why, "See to the guest agent, or leave out quiesce.")
    return Refusal("libvirt_failed", domain.name, why, "See its log and that of the domain, then run this again.")


def _unknown(domain: Domain, words: str) -> UnknownOutcomeError:
    why = f"may or may not run on its new images, so all images were left in place. {words}"
    return UnknownOutcomeError(domain.name, why, "Look at 'virsh domblklist', then run this again.")
