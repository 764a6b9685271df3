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
from . import quiesced
from .bindings import LibvirtError, libvirt, words_of
from .connection import Domain, Libvirt, definition_of, unreadable
from .definition import Definition, Source
from .running import RunningDisk, run_of, running_disks, snapshot_xml

_Answer = t.TypeVar("_Answer")
_MAY_BE_FROZEN = (
    "The file systems of its guest may be frozen, since its agent has not said that it has thawed them. "
    "The next run thaws them."
)
_NAMESPACE = "kvmfleet.qcow2"  # of metadata that no domain has
RESTART = 60.0  # seconds in which a daemon that is started anew, as by an update, is back


def take_snapshot(daemon: Libvirt, domain: Domain, sources: t.Mapping[str, Source], *, quiesce: bool) -> None:
    """Have the domain write to these images from now on, all at one moment.

    libvirt gives them the bitmaps that are in order below. Raises Refusal if the domain goes on with the images that it
    had, UnknownOutcomeError if that is unknown.
    """
    handle = look_up(daemon, domain)
    try:
        before = _check_still_runs(handle, domain)
        wanted, number = _wanted(before, sources), handle.ID()
    except LibvirtError as exc:
        raise unreadable(domain.name, exc) from exc
    if quiesce:
        quiesced.check_answers(daemon, domain)
    with quiesced.noted(domain, number) if quiesce else contextlib.nullcontext() as note:
        error = _attempt(handle, wanted, quiesce=quiesce)
        new_handle = _handle_after(daemon, domain, error) if error is not None else None
        may_be_frozen = note is not None and not note.is_settled(daemon, domain.uuid, error)
    try:
        check_switched(daemon, new_handle or handle, domain, sources, error, was_away=new_handle is not None)
    except Refusal as exc:
        raise (exc.with_note(_MAY_BE_FROZEN) if may_be_frozen else exc) from error
    _check_below(daemon, domain, before, sources)
    if may_be_frozen:
        raise UnknownOutcomeError(domain.name, "runs on its new images, but that is not all", _MAY_BE_FROZEN)


def _check_below(
    daemon: Libvirt, domain: Domain, before: t.Sequence[RunningDisk], sources: t.Mapping[str, Source]
) -> None:
    """Raise if a new image stands on another one than it records: what it was made for can be merged down meanwhile."""
    recorded = {disk.target: disk.images[0].path for disk in before if disk.images}
    now = tuple[RunningDisk, ...]()
    with contextlib.suppress(Refusal):  # it may be shut off again
        now = disks_now(daemon, domain)
    for disk in now:
        was, there = recorded.get(disk.target), disk.images[1].path if len(disk.images) > 1 else None
        if (
            disk.target not in sources
            or was is None
            or there is None
            or os.path.realpath(was) == os.path.realpath(there)
        ):
            continue
        path = sources[disk.target].path
        why = (
            f"runs on {path}, which records {was} below it, but QEMU has {there} there: that was merged down meanwhile"
        )
        remedy = f"As soon as it is shut off, and before anything else: 'qemu-img rebase -u -b {there} -F … {path}'."
        raise UnknownOutcomeError(domain.name, why, remedy)


def _attempt(handle: t.Any, wanted: str, *, quiesce: bool) -> t.Any:
    """Have libvirt take a snapshot; return the error, if any.

    libvirt freezes, takes it and thaws in this one call, and ends that whatever becomes of this run. Calls of our own
    for each would leave the guest frozen whenever this run is killed in between.
    """
    try:
        handle.snapshotCreateXML(wanted, _flags(quiesce=quiesce))
    except LibvirtError as exc:
        return exc
    return None


def _handle_after(daemon: Libvirt, domain: Domain, error: t.Any) -> t.Any:
    """Return the handle of a domain if the daemon was started anew; None if it was there all the time."""
    try:
        if not daemon.is_back(RESTART, can_end=False):
            return None
        return daemon.connection.lookupByUUIDString(domain.uuid)
    except (LibvirtError, Refusal) as exc:
        raise _unknown(domain, f"libvirt says: {words_of(error)}") from exc


def _wanted(before: t.Sequence[RunningDisk], sources: t.Mapping[str, Source]) -> str:
    targets = [disk.target for disk in before]
    return snapshot_xml(targets, {target: source.path for target, source in sources.items()})


def _flags(*, quiesce: bool) -> int:
    return t.cast(
        "int",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
        | (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE if quiesce else 0),
    )


def look_up(daemon: Libvirt, domain: Domain) -> t.Any:
    """Return libvirt's handle of a domain."""
    return _asked(daemon, domain, lambda handle: handle)


def disks_now(daemon: Libvirt, domain: Domain) -> tuple[RunningDisk, ...]:
    """Return the disks of a domain with their chains, as it has them just now; Refusal if it does not run any more."""
    return running_disks(_asked(daemon, domain, lambda handle: running_text(handle, domain)))


def defined_now(daemon: Libvirt, domain: Domain) -> Definition:
    """Return what the next start of a domain uses."""
    return _asked(daemon, domain, lambda handle: daemon.placed(definition_of(handle)))


def store_definition(daemon: Libvirt, domain: Domain) -> None:
    """Have libvirt store the definition of a domain as it has it; Refusal if it cannot.

    With the end of a merge libvirt only logs that it could not, and has the new definition in its memory alone.
    """

    def ask(handle: t.Any) -> None:
        if handle.isPersistent():
            # That removes nothing, and stores the definition. To define what was read could undo what others define.
            element, config = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_CONFIG
            handle.setMetadata(element, None, None, _NAMESPACE, config)

    try:
        _asked(daemon, domain, ask)
    except Refusal as exc:
        if exc.code != "libvirt_failed":
            raise
        words = words_of(exc.__cause__)
        why = f"its new definition could not be stored, so it is lost when the daemon ends. libvirt says: {words}"
        remedy = "Make room where libvirt keeps its definitions, then run this again."
        raise Refusal("not_switched", domain.name, why, remedy) from exc


def _asked(daemon: Libvirt, domain: Domain, ask: t.Callable[[t.Any], _Answer]) -> _Answer:
    """Return what libvirt answers about a domain, also over a restart of its daemon; Refusal if it cannot tell."""
    while True:
        try:
            return ask(daemon.connection.lookupByUUIDString(domain.uuid))
        except LibvirtError as exc:
            # No signal ends this: images of the domain may be merged down and retired already, which is to be told.
            if daemon.is_back(RESTART, can_end=False):
                continue
            if exc.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise gone_meanwhile(domain) from exc
            raise unreadable(domain.name, exc) from exc


def check_still_runs(daemon: Libvirt, domain: Domain) -> None:
    """Refuse a domain that does not run any more with the disks that were judged."""
    _asked(daemon, domain, lambda handle: _check_still_runs(handle, domain))


def _check_still_runs(handle: t.Any, domain: Domain) -> tuple[RunningDisk, ...]:
    """Return the disks of the domain."""
    text = running_text(handle, domain)
    now = Definition(text).with_places(domain.definition.places)
    if domain.running_definition is None or now.tops != domain.running_definition.tops:
        raise other_disks_meanwhile(domain)
    return running_disks(text)


def running_text(handle: t.Any, domain: Domain) -> str:
    """Return the XML of a domain that runs; Refusal if it does not, since then that has no chains."""
    text: str = handle.XMLDesc(0)
    if not run_of(text):
        raise shut_off_meanwhile(domain)
    return text


def other_disks_meanwhile(domain: Domain) -> Refusal:
    """Return the refusal of a domain that has other images than those that were judged."""
    return Refusal("changed_meanwhile", domain.name, "has got other disks meanwhile", "Run this again.")


def shut_off_meanwhile(domain: Domain) -> Refusal:
    """Return the refusal of a domain that does not run any more."""
    return Refusal("changed_meanwhile", domain.name, "was shut off meanwhile", "Run this again.")


def gone_meanwhile(domain: Domain) -> Refusal:
    """Return the refusal of a domain that libvirt does not know any more."""
    why = "is not on this host any more: it was undefined, or it has migrated"
    return Refusal("changed_meanwhile", domain.name, why, "Run this on the host that it is on now.")


def check_on(daemon: Libvirt, domain: Domain, sources: t.Mapping[str, Source]) -> None:
    """Raise Refusal unless a domain, of which a merge was the last that was done, has these images."""
    there = _asked(daemon, domain, lambda handle: _images_now(daemon, handle))
    if not all(_images(sources) <= images for images in there):
        why = "was given other images than those below its snapshot, which all of it is merged into"
        raise UnknownOutcomeError(domain.name, why, "Look at 'virsh domblklist', then run this again.")


def check_switched(
    daemon: Libvirt,
    handle: t.Any,
    domain: Domain,
    sources: t.Mapping[str, Source],
    error: t.Any,
    *,
    was_away: bool = False,
) -> None:
    """Raise unless the domain runs on these images and is defined so; `error` is what libvirt has answered.

    Of a daemon that `was_away` no answer came. What it says since then tells that the domain is on the new images, but
    not that QEMU does not have them open.
    """
    try:
        is_active = handle.isActive()
        there = _images_now(daemon, handle)
    except LibvirtError as exc:
        raise _unknown(domain, f"libvirt says: {words_of(exc)}") from exc
    wanted = _images(sources)
    is_on_all = all(wanted <= images for images in there)
    if is_on_all and (error is None or was_away):
        return
    if is_on_all:  # as if the definition could not be stored
        _store_or_tell(daemon, domain)
    words = f"libvirt says: {words_of(error)}" if error is not None else "libvirt reports no error"
    if error is None or was_away or any(wanted & images for images in there):
        raise _unknown(domain, words)
    if not is_active:
        raise shut_off_meanwhile(domain)
    raise _refusal(domain, error) from error


def _store_or_tell(daemon: Libvirt, domain: Domain) -> None:
    """Have libvirt store the definition of a domain that runs on new images, which must stay whatever comes of it."""
    try:
        store_definition(daemon, domain)
    except Refusal as exc:
        why = f"runs on its new images, and {exc.why}"
        remedy = (
            "Make room where libvirt keeps its definitions, and store it before the domain is shut off: 'virsh dumpxml "
            "--inactive --security-info' into a file, then 'virsh define' with that."
        )
        raise UnknownOutcomeError(domain.name, why, remedy) from exc


def _images(sources: t.Mapping[str, Source]) -> set[tuple[str, str]]:
    return {(target, os.path.realpath(source.path)) for target, source in sources.items()}


def _images_now(daemon: Libvirt, handle: t.Any) -> list[set[tuple[str, str]]]:
    """Return the topmost images of a domain by its definition, and those that it runs with, if it does."""
    parts = [definition_of(handle), *([Definition(handle.XMLDesc(0))] if handle.isActive() else [])]
    # With the end of a merge libvirt has the domain on the volume again that it was on before the snapshot.
    tops = [daemon.placed(part).tops for part in parts]
    return [{(target, os.path.realpath(path)) for target, path in part.items()} for part in tops]


def _refusal(domain: Domain, error: t.Any) -> Refusal:
    """Return the refusal of a snapshot that libvirt has not taken."""
    why = f"libvirt took no snapshot, and it goes on with the images that it had. libvirt says: {words_of(error)}"
    if quiesced.is_no_answer(error) or quiesced.is_freeze(error):
        return Refusal("not_quiesced", domain.name, why, "See to the guest agent, or leave out quiesce.")
    return Refusal("libvirt_failed", domain.name, why, "See its log and that of the domain, then run this again.")


def _unknown(domain: Domain, words: str) -> UnknownOutcomeError:
    why = f"may or may not run on its new images, so all images were left in place. {words}"
    return UnknownOutcomeError(domain.name, why, "Look at 'virsh domblklist', then run this again.")
