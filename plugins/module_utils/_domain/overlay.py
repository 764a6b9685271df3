# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what becomes of each disk of a domain that is to be on a snapshot.

Facts in, a plan out; names.py tells which image is which snapshot. Only symlinks in the paths that a definition states
are looked up here, and, where these are not what the images record, whether a merge has left that.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal
from .._disk.overlay import OverlayRequest
from .._libvirt.connection import Domain, Kept
from .._libvirt.definition import DomainDisk, Source, StatedChain, StatedImage
from .._qcow2.chain import Layer, resolve_name
from .._qcow2.mark import Mark
from .fitness import Fitness, fitness_of, missed_refusal
from .inventory import DiskFacts
from .merged_below import why_differs
from .names import ambiguous, find_snapshot, flattened, flattened_one, new_path
from .plan import DiskPlan, DomainPlan, NotReady, SkippedDisk, SnapshotRequest, state_problems

_NOT_ASKED_FOR = "not asked for"
_SHOWN = 5  # snapshots that a message names


def plan_domain(
    domain: Domain,
    facts: t.Sequence[DiskFacts],
    request: SnapshotRequest,
    kept: Kept,
    not_ready: NotReady = state_problems,
) -> DomainPlan:
    """Return what is to become of a domain, as far as that can be said without its images' bitmaps.

    `not_ready` returns why it cannot be put on overlays in the state that it is in.
    """
    fitness = {one.disk.target: fitness_of(one, request.directory) for one in facts}
    reasons = {one.disk.target: _reason_to_skip(one, fitness[one.disk.target], request) for one in facts}
    # Those that are named and cannot take part are told by name below.
    missed = [one for one in facts if fitness[one.disk.target].is_missed and not _is_excluded(one.disk, request)]
    skipped = tuple(SkippedDisk(target, reason) for target, reason in reasons.items() if reason is not None)
    taking_part = [one for one in facts if reasons[one.disk.target] is None]
    disks = [_plan_disk(domain, one, request, kept) for one in taking_part]
    problems = [problem for disk in disks for problem in disk.problems]
    problems += _target_problems(domain, reasons, request)
    if not request.skips_unfit and request.targets is None:
        problems += [missed_refusal(domain.name, one.disk, reasons[one.disk.target] or "") for one in missed]
    if not disks and not problems:
        listed = ", ".join(f"{disk.target}: {disk.reason}" for disk in skipped) or "it has no disks"
        problems.append(Refusal("no_disk", domain.name, f"none of its disks can take part ({listed})"))
    problems += not_ready(domain, disks)
    if kept.snapshots and not request.allows_snapshots and any(disk.source for disk in disks):
        # Reverting to an internal one rewrites that image; to an external one, libvirt 11 deletes it.
        why = "'virsh snapshot-revert' would rewrite or delete the image below the overlay"
        problems.append(snapshots_problem(domain, kept.snapshots, why))
    plan = DomainPlan(
        domain=domain,
        disks=tuple(disks),
        skipped=skipped,
        problems=tuple(problems),
        definition=domain.definition,
        missed=tuple(one.disk.target for one in missed),
        absent=tuple(target for target, one in fitness.items() if one.is_absent and reasons[target] == one.why_unfit),
        notes=_of_late_disks(domain, disks, request),
    )
    if problems or not plan.sources:  # there is nothing to switch
        return plan
    return plan._replace(definition=domain.definition.with_sources(plan.sources))


def snapshots_problem(domain: Domain, snapshots: t.Sequence[str], why: str) -> Refusal:
    """Return the refusal of a domain of which libvirt has snapshots of its own; `why` it matters."""
    shown = ", ".join(snapshots[:_SHOWN]) + (f" and {len(snapshots) - _SHOWN} more" * (len(snapshots) > _SHOWN))
    return Refusal(
        "libvirt_snapshots",
        domain.name,
        f"libvirt has snapshots of its own of it ({shown}). {why}",
        "Remove them with 'virsh snapshot-delete', or set libvirt_snapshots=ignore and never revert to one of them.",
    )


def _is_excluded(disk: DomainDisk, request: SnapshotRequest) -> bool:
    """Whether somebody wants a snapshot without this disk."""
    return disk.opted_out if request.targets is None else disk.target not in request.targets


def _reason_to_skip(facts: DiskFacts, fitness: Fitness, request: SnapshotRequest) -> str | None:
    """Return why a disk is left out, or None."""
    if facts.disk.why_unfit is None and _is_excluded(facts.disk, request):
        return _NOT_ASKED_FOR if request.targets is not None else "excluded by snapshot='no' in the definition"
    return fitness.why_unfit


def _of_late_disks(domain: Domain, disks: t.Sequence[DiskPlan], request: SnapshotRequest) -> tuple[str, ...]:
    """Return the warning of disks that join a snapshot which others are on already; none if they are of one moment.

    No killed run leaves that, since a domain is put on all overlays of a call at once, whether it runs or is shut off.
    """
    late = [disk.target for disk in disks if disk.source is not None]
    done = [disk.target for disk in disks if disk.source is None and not disk.problems]
    if not late or not done:
        return ()
    why = (
        f"{domain.name}: its disk {', '.join(done)} is on the snapshot {request.snapshot} already, and its disk "
        f"{', '.join(late)} joins it now. To go back would give it disks of two moments. For one of this moment choose "
        "another name for the snapshot."
    )
    return (why,)


def _target_problems(
    domain: Domain, reasons: t.Mapping[str, str | None], request: SnapshotRequest
) -> t.Iterator[Refusal]:
    """Yield why disks that were asked for by name cannot take part."""
    for target in request.targets or ():
        reason = reasons.get(target, "it has no such disk")
        if reason is not None:
            why = f"its disk {target} cannot take part: {reason}"
            yield Refusal("disk_unfit", domain.name, why, "Correct disks.")


def _plan_disk(domain: Domain, facts: DiskFacts, request: SnapshotRequest, kept: Kept) -> DiskPlan:
    """Return what is to become of a disk that takes part."""
    disk, source = facts.disk, t.cast("str", facts.disk.source)
    mark = Mark(domain.uuid, disk.target, request.snapshot)
    problems = [facts.problem] if facts.problem else stated_problems(domain.name, disk, facts.layers)
    found = find_snapshot(facts, domain.name, mark, lambda: _remembered(kept))
    if found is not None:
        there = OverlayRequest(found.overlay.path, found.below.path, found.below.format or "qcow2", vm=domain.uuid)
        problems += [] if found.is_certain else [ambiguous(domain.name, found, mark)]
        return DiskPlan(disk.target, there, None, tuple(problems), is_done=True)
    base = flattened_one(facts, mark)
    if base is not None:
        # Whatever the name of a new overlay would be: two images would bear one mark.
        there = OverlayRequest(base.path, source, disk.format, vm=domain.uuid)
        return DiskPlan(
            disk.target, there, None, (*problems, flattened(domain.name, base, mark, is_new=True)), is_done=True
        )
    if facts.writers:
        why = (
            f"its disk {disk.target} is a disk of {', '.join(facts.writers)} too, which would go on writing below the "
            "overlay"
        )
        remedy = "Give each a disk of its own, or undefine the domain that is not needed any more."
        problems.append(Refusal("shared_disk", domain.name, why, remedy))
    if facts.suspects:
        names = ", ".join(facts.suspects)
        why = f"its disk {disk.target} may be a disk of {names} too, by a volume that libvirt cannot look up just now"
        remedy = "Start the storage pool of that volume ('virsh pool-start'), refresh it, or correct that domain."
        problems.append(Refusal("shared_disk", domain.name, why, remedy))
    path = new_path(facts, domain.name, mark, request.directory)
    problems += _taken_problems(domain, facts, path)
    new = OverlayRequest(
        path=path,
        backing_file=source,
        backing_format=disk.format,
        vm=domain.uuid,
        relative=request.relative,
        creation=request.creation,
        bitmap_content=request.bitmap_content,
        must_be_fresh=True,
        mark=mark,
    )
    return DiskPlan(disk.target, new, Source(new.path), tuple(problems))


def _taken_problems(domain: Domain, facts: DiskFacts, path: str) -> t.Iterator[Refusal]:
    """Yield why no overlay can be made at a path: other disks name it, whether anything stands there or not.

    What is missing there is theirs. An overlay in its place would look like it, and have other data.
    """
    real_path = os.path.realpath(path)
    whose = [*facts.others_with(path), *_own_disks_with(domain, facts.disk.target, real_path)]
    if whose:
        why = f"{path} would be the overlay of its disk {facts.disk.target}, and is named already by {', '.join(whose)}"
        remedy = (
            "Choose another name for the snapshot, or give a directory. If that file is missing, put it back; else "
            "undefine what is not needed any more."
        )
        yield Refusal("occupied", domain.name, why, remedy)


def _own_disks_with(domain: Domain, target: str, real_path: str) -> list[str]:
    """Return the other disks of the domain that name a path, as it is defined or as it runs."""
    definitions = [domain.definition, *([domain.running_definition] if domain.running_definition is not None else [])]
    others = [disk for one in definitions for disk in one.disks if disk.target != target]
    return list(dict.fromkeys(f"its disk {disk.target}" for disk in others if real_path in map(_real, _named_by(disk))))


def _named_by(disk: DomainDisk) -> list[str]:
    """Return the images that a definition names for a disk."""
    return [*([disk.source] if disk.source is not None else []), *(image.path for image in disk.stated_images)]


def _remembered(kept: Kept) -> set[str]:
    """Return the real paths of the disks that the domain had when its checkpoints were made."""
    return {os.path.realpath(path) for path in kept.images}


def stated_problems(name: str, disk: DomainDisk, layers: t.Sequence[Layer]) -> list[Refusal]:
    """Return how what the definition states, if it does, differs from what the images record."""
    stated = disk.stated_chain
    images = stated.images if stated is not None else ()
    data_files = [(disk.data_file, layers[0]), *((image.data_file, layer) for image, layer in zip(images, layers[1:]))]
    problems = [_data_file_problem(name, disk, *one) for one in data_files]
    problems += [_parts_problem(name, disk, image) for image in images]
    return [*([] if stated is None else _chain_problems(name, disk, stated, layers)), *filter(None, problems)]


def _data_file_problem(name: str, disk: DomainDisk, stated: str | None, layer: Layer) -> Refusal | None:
    """Return how the external data file that the definition states differs from the one that the image records."""
    recorded = layer.image.data_file if layer.image is not None else None
    path = resolve_name(layer.path, recorded) if recorded is not None else None
    if stated is None or (path is not None and os.path.realpath(path) == _real(stated)):
        return None
    why = (
        f"{disk.target}: <dataStore> says {stated}, {layer.path} says {recorded or 'none'}, so the guest may have been "
        "seeing other data than an overlay would show"
    )
    remedy = "Find out which the guest saw; correct the other one, the image with 'qemu-img amend -o data_file=…'."
    return Refusal("other_chain", name, why, remedy)


def _parts_problem(name: str, disk: DomainDisk, image: StatedImage) -> Refusal | None:
    """Return what the definition states of an image below, and no image can record."""
    if not image.parts:
        return None
    why = f"{disk.target}: <backingStore> has {', '.join(image.parts)} for {image.path}, which no image records"
    remedy = "Convert that image into one that needs no such thing ('qemu-img convert')."
    return Refusal("other_chain", name, why, remedy)


def _real(path: str) -> str:
    """Return the path without symlinks; of what is no path, the same."""
    return os.path.realpath(path) if os.path.isabs(path) else path


def _chain_problems(name: str, disk: DomainDisk, stated: StatedChain, layers: t.Sequence[Layer]) -> list[Refusal]:
    """Return how the chain that the definition states differs from the one that the images record."""
    recorded = [StatedImage(layer.real_path, layer.format or "") for layer in layers[1:]]
    images = [StatedImage(_real(image.path), image.format) for image in stated.images]
    unnamed = [layer.path for layer in layers[1:] if layer.format is None]
    if _differs(stated, images, recorded):
        why = (
            f"{disk.target}: <backingStore> says {_shown(images)}, the images say {_shown(recorded)}, so the guest may "
            "have been seeing other data than an overlay would show"
        )
        remedy = (
            "Find out which the guest saw; correct the other one, the images with 'qemu-img rebase -u'. If a job has "
            "taken an image out of the chain and libvirt has not seen its end, the bits of that image are nowhere: "
            "make a full backup with a new checkpoint then."
        )
        return [why_differs(stated, layers) or Refusal("other_chain", name, why, remedy)]
    if unnamed:
        why = (
            f"the format of {unnamed[0]} is stated in the definition only, not in the image above it, which an "
            "overlay needs"
        )
        return [Refusal("format_not_recorded", name, why, "Record it with 'qemu-img rebase -u -b … -F …'.")]
    return []


def _differs(stated: StatedChain, images: list[StatedImage], recorded: list[StatedImage]) -> bool:
    """Whether the stated images are not the recorded ones; where no format is recorded, any stated one fits."""
    known = [image if image.format else image._replace(format=own.format) for image, own in zip(recorded, images)]
    return images != known or (stated.is_complete and len(images) != len(recorded))


def _shown(images: t.Sequence[StatedImage]) -> str:
    """Return a chain for a message."""
    return " > ".join(f"{image.path} as {image.format or 'no format'}" for image in images) or "none"
