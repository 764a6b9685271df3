# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: have libvirt delete checkpoints of a domain that runs, with their bitmaps."""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal
from .bindings import LibvirtError, known, libvirt, words_of
from .connection import Domain, Libvirt, unreadable
from .definition import checkpoint_from, only_disk
from .snapshots import look_up, shut_off_meanwhile

_LACKS_IT = "not found in backing chain"  # in libvirt's words, which have no code of their own for it

_IS_READ_ONLY = "is readonly and cannot be modified"  # in QEMU's words


def delete_live(daemon: Libvirt, domain: Domain, names: t.Sequence[str]) -> dict[str, Refusal]:
    """Have libvirt delete these checkpoints, in this order; return by name why one is still there.

    Those that are gone are fine.
    """
    if not names:
        return {}
    handle = look_up(daemon, domain)
    problems = dict[str, Refusal]()
    try:
        there = {one.getName(): one for one in known(handle.listAllCheckpoints)}
    except LibvirtError as exc:
        raise unreadable(domain.name, exc) from exc
    for name in (name for name in names if name in there):
        try:
            error = _delete_wholly(handle, there[name])
            if error is not None:
                problems[name] = _refusal(handle, domain, name, error)
        except LibvirtError as exc:  # those that were deleted before are to be told of
            problems[name] = unreadable(domain.name, exc)
    try:
        left = {one.getName() for one in known(handle.listAllCheckpoints)}
    except LibvirtError as exc:
        return {**{name: unreadable(domain.name, exc) for name in there if name in names}, **problems}
    for name in names:
        if name not in left:
            problems.pop(name, None)  # somebody else has deleted it meanwhile
        elif name not in problems:
            why = f"libvirt said that it deleted its checkpoint {name!r}, and still has it"
            problems[name] = Refusal("libvirt_failed", domain.name, why, "See its log, then run this again.")
    return problems


def _delete_wholly(handle: t.Any, checkpoint: t.Any) -> t.Any:
    """Delete a checkpoint, or what a killed run has left of it; return the error, if any."""
    text = checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE)
    parts = checkpoint_from(text)
    if not parts.is_half_deleted:
        error = _delete(checkpoint)
        if error is None or not _lacks_bitmap(error):
            return error
    return _delete_by_disk(handle, text, parts.bitmaps)


def _delete_by_disk(handle: t.Any, text: str, bitmaps: t.Mapping[str, str]) -> t.Any:
    """Delete the bitmaps that the disks have of the checkpoint with this XML; return the error, if any.

    libvirt deletes nothing of a checkpoint of which one disk lacks the bitmap. So describe it to libvirt anew, with one
    disk after the other. Its description tells the next run, if this one is killed, that it is about more disks.
    """
    for target in bitmaps:
        xml = only_disk(text, bitmaps, target)
        one = handle.checkpointCreateXML(xml, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
        error = _delete(one)
        if error is not None and _lacks_bitmap(error):
            error = _forget(one)
        if error is not None:
            return error
    return None


def _lacks_bitmap(error: t.Any) -> bool:
    return _LACKS_IT in words_of(error)


def _delete(checkpoint: t.Any) -> t.Any:
    """Delete a checkpoint with its bitmaps, in all images of all disks; return the error, if any."""
    try:
        checkpoint.delete(0)
    except LibvirtError as exc:
        return exc
    return None


def _forget(checkpoint: t.Any) -> t.Any:
    try:
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    except LibvirtError as exc:
        return exc
    return None


def _refusal(handle: t.Any, domain: Domain, name: str, error: t.Any) -> Refusal:
    """Return the refusal of a checkpoint that libvirt has not deleted."""
    if not handle.isActive():
        return shut_off_meanwhile(domain)
    why = f"libvirt could not delete its checkpoint {name!r} while it runs: {words_of(error)}"
    remedy = "Run this again when it is shut off: then it is done without libvirt."
    if _IS_READ_ONLY in words_of(error):  # as all images below the topmost one are, for a QEMU before 6.1
        return Refusal("old_libvirt", domain.name, why, f"{remedy} Or update: libvirt 9.0 with QEMU 7.2 can.")
    return Refusal("libvirt_failed", domain.name, why, remedy)
