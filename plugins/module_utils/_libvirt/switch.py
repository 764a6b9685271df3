# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: give a domain its new definition, and read it back."""

from __future__ import annotations

import time
import typing as t

from .._base.errors import Refusal, UnknownOutcomeError
from .bindings import LibvirtError, known, libvirt, words_of
from .connection import Domain, Libvirt, definition_of
from .definition import Definition, Source

_PAUSE = 0.02  # seconds between two looks at a start that must fail


def switch(daemon: Libvirt, domain: Domain, sources: t.Mapping[str, Source], new: Definition, seconds: float) -> None:
    """Give the domain the definition `new`, in which these targets are these images.

    Raises Refusal if the old definition stands, UnknownOutcomeError if that is unknown. If the domain is just being
    started with the old definition, wait up to `seconds` for that start to fail on our locks.
    """
    handle = check_unchanged(daemon, domain)
    error = "libvirt took it, but made something else of it"
    try:
        daemon.connection.defineXML(new.text)
    except LibvirtError as exc:
        error = f"libvirt says: {words_of(exc)}"
    try:
        now = definition_of(handle)
    except LibvirtError as exc:
        raise _unknown(domain, f"libvirt says: {words_of(exc)}") from exc
    if now.with_places(domain.definition.places).has_only_switched(domain.definition, sources):
        wait_for_start(handle, domain, seconds)
        return
    if (
        now.text != domain.definition.text
    ):  # nor is it the old one: somebody else may be changing it, and is not overruled
        raise _unknown(domain, error)
    raise Refusal(
        "not_switched",
        domain.name,
        f"its definition could not be changed, so the old one stands. {error}",
        "Check the space where libvirt keeps its definitions, and its log, then run this again.",
    )


def forget(daemon: Libvirt, domain: Domain, checkpoints: t.Sequence[str]) -> None:
    """Have libvirt forget these checkpoints of a domain; no bitmap is touched. Those that are gone are fine."""
    if not checkpoints:  # nor ask libvirt, which could fail, while the domain is switched already
        return
    try:
        handle = daemon.connection.lookupByUUIDString(domain.uuid)
        for checkpoint in known(handle.listAllCheckpoints):
            if checkpoint.getName() in checkpoints:
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    except LibvirtError as exc:
        why = f"libvirt could not forget its checkpoints {', '.join(checkpoints)}: {words_of(exc)}"
        raise Refusal("libvirt_failed", domain.name, why, "Run this again.") from exc


def wait_for_start(handle: t.Any, domain: Domain, seconds: float) -> None:
    """Wait up to `seconds` until a start that has begun with the old definition has failed.

    Its QEMU may not have opened the old images yet. It must find them locked.
    """
    deadline = time.monotonic() + seconds
    try:
        while handle.isActive():
            if time.monotonic() > deadline:
                # What it writes to the old images is recorded in their bitmaps, too.
                why = "was started during the switch and runs on the old images; all images were kept"
                raise UnknownOutcomeError(domain.name, why, "Shut it down and run again.")
            time.sleep(_PAUSE)
    except LibvirtError as exc:
        raise _unknown(domain, f"libvirt says: {words_of(exc)}") from exc


def check_unchanged(daemon: Libvirt, domain: Domain) -> t.Any:
    """Return libvirt's handle of a domain; Refusal if it is not any more what was judged."""
    try:
        handle = daemon.connection.lookupByUUIDString(domain.uuid)
        changed = _how_changed(handle, domain)
    except LibvirtError as exc:
        why = f"libvirt cannot look at it: {words_of(exc)}"
        raise Refusal("libvirt_failed", domain.name, why, "Run this again.") from exc
    if changed is not None:
        raise Refusal("changed_meanwhile", domain.name, *changed)
    return handle


def _how_changed(handle: t.Any, domain: Domain) -> tuple[str, str] | None:
    """Return how a domain is not any more what was judged, and the way out."""
    if handle.isActive():
        return "was started meanwhile", "Shut it down and run this again."
    if handle.hasManagedSaveImage(0):
        return "has got a managed save meanwhile", "Start it and shut it down, then run again."
    if definition_of(handle).text != domain.definition.text:
        return "its definition was changed meanwhile", "Run this again."
    return None


def _unknown(domain: Domain, error: str) -> UnknownOutcomeError:
    """Return the error for a definition of which nobody knows what it is."""
    why = f"its definition may or may not have been changed, so all images were left in place. {error}"
    return UnknownOutcomeError(domain.name, why, "Look at 'virsh domblklist --inactive', then run this again.")
