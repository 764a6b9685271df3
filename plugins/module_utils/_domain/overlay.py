# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what becomes of each disk of a domain that is to be on a snapshot.

Facts in, a plan out. Only symlinks in the paths that a definition states are looked up here.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal
from .._disk.overlay import OverlayRequest
from .._libvirt.connection import Domain
from .._libvirt.definition import DomainDisk, StatedChain, StatedImage
from .._qcow2.chain import Layer
from .inventory import DiskFacts
from .plan import DiskPlan, DomainPlan, SkippedDisk, SnapshotRequest, state_problems

_EXTENSIONS = (".qcow2", ".qcow", ".img", ".raw")  # that are no part of an image's stem
_NOT_ASKED_FOR = "not asked for"
_SHOWN = 5  # snapshots that a message names


def plan_domain(
    domain: Domain, facts: t.Sequence[DiskFacts], request: SnapshotRequest, snapshots: t.Sequence[str] = ()
) -> DomainPlan:
    """Return what is to become of a domain, as far as that can be said without its images' bitmaps.

    `snapshots` has the names of libvirt's own snapshots of the domain.
    """
    reasons = {one.disk.target: _reason_to_skip(one, request) for one in facts}
    skipped = tuple(SkippedDisk(target, reason) for target, reason in reasons.items() if reason is not None)
    taking_part = [one for one in facts if reasons[one.disk.target] is None]
    disks = _without_same_names(domain, [_plan_disk(domain, one, request) for one in taking_part])
    problems = [problem for disk in disks for problem in disk.problems]
    problems += _target_problems(domain, reasons, request)
    if not disks and not problems:
        listed = ", ".join(f"{disk.target}: {disk.reason}" for disk in skipped) or "it has no disks"
        problems.append(Refusal("no_disk", domain.name, f"none of its disks can take part ({listed})"))
    problems += state_problems(domain, disks)
    if snapshots and not request.allows_snapshots and any(disk.is_new for disk in disks):
        problems.append(_snapshots_problem(domain, snapshots))
    plan = DomainPlan(domain, tuple(disks), skipped, tuple(problems), domain.definition)
    if problems or not plan.sources:  # there is nothing to switch
        return plan
    return plan._replace(definition=domain.definition.with_sources(plan.sources))


def _snapshots_problem(domain: Domain, snapshots: t.Sequence[str]) -> Refusal:
    """Return the refusal of a domain of which libvirt has snapshots of its own."""
    shown = ", ".join(snapshots[:_SHOWN]) + (f" and {len(snapshots) - _SHOWN} more" * (len(snapshots) > _SHOWN))
    # Reverting to an internal one rewrites the image below the overlay; to an external one, libvirt 11 deletes it.
    return Refusal(
        "libvirt_snapshots",
        domain.name,
        f"libvirt has snapshots of its own of it ({shown}). 'virsh snapshot-revert' would rewrite or delete the image "
        "below the overlay",
        "Remove them with 'virsh snapshot-delete', or set libvirt_snapshots=ignore and never revert to one of them.",
    )


def _reason_to_skip(facts: DiskFacts, request: SnapshotRequest) -> str | None:
    """Return why a disk is left out, or None."""
    disk = facts.disk
    if disk.why_unfit is not None:
        return disk.why_unfit
    if request.targets is not None and disk.target not in request.targets:
        return _NOT_ASKED_FOR
    if disk.opted_out and request.targets is None:
        return "excluded by snapshot='no' in the definition"
    if request.directory is None and (disk.kind == "block" or facts.is_device):
        return "block device, beside which no overlay can be made; give a directory"
    return None


def _target_problems(
    domain: Domain, reasons: t.Mapping[str, str | None], request: SnapshotRequest
) -> t.Iterator[Refusal]:
    """Yield why disks that were asked for by name cannot take part."""
    for target in request.targets or ():
        reason = reasons.get(target, "it has no such disk")
        if reason is not None:
            why = f"its disk {target} cannot take part: {reason}"
            yield Refusal("disk_unfit", domain.name, why, "Correct disks.")


def _plan_disk(domain: Domain, facts: DiskFacts, request: SnapshotRequest) -> DiskPlan:
    """Return what is to become of a disk that takes part."""
    disk, source = facts.disk, t.cast("str", facts.disk.source)
    problems = [facts.problem] if facts.problem else _stated_problems(domain.name, disk, facts.layers)
    # A domain that is on the snapshot already, or above it, may have been given another directory then.
    for above, below in zip(facts.own, facts.layers[1:]):
        if os.path.basename(above.path).endswith(f".{request.snapshot}.qcow2"):
            there = OverlayRequest(above.path, below.path, below.format or "qcow2", vm=domain.uuid)
            return DiskPlan(disk.target, there, is_new=False, problems=tuple(problems))
    if facts.writers:
        why = (
            f"its disk {disk.target} is a disk of {', '.join(facts.writers)} too, which would go on writing below the "
            "overlay"
        )
        problems.append(Refusal("shared_disk", domain.name, why, "Give each a disk of its own."))
    stem = stem_of([layer.path for layer in facts.own] or [source])
    new = OverlayRequest(
        path=os.path.join(request.directory or os.path.dirname(source), f"{stem}.{request.snapshot}.qcow2"),
        backing_file=source,
        backing_format=disk.format,
        vm=domain.uuid,
        relative=request.relative,
        creation=request.creation,
        bitmap_content=request.bitmap_content,
        must_be_fresh=True,
    )
    return DiskPlan(disk.target, new, is_new=True, problems=tuple(problems))


def _without_same_names(domain: Domain, disks: t.Sequence[DiskPlan]) -> list[DiskPlan]:
    """Return the plans, with a problem for each that would get the same new overlay as one before it."""
    taken = set()
    checked = []
    for disk in disks:
        path, problems = disk.request.path, disk.problems
        if disk.is_new and path in taken:
            why = f"several of its disks would get the overlay {path}"
            remedy = "Take them one by one, by disks, into directories of their own."
            problems = (*problems, Refusal("same_name", domain.name, why, remedy))
        if disk.is_new:
            taken.add(path)
        checked.append(disk._replace(problems=problems))
    return checked


def stem_of(paths: t.Sequence[str]) -> str:
    """Return what an overlay's name begins with, from the chain's paths, top to base.

    It is the name of the topmost image without its extension, and without what snapshots have added to the name of
    the image below: on top of web.qcow2 and web.monday.qcow2 it is still web.
    """
    stem = ""
    for path in reversed(paths):
        name = os.path.basename(path)
        own = next((name[: -len(end)] for end in _EXTENSIONS if name.endswith(end) and name != end), name)
        if not stem or not own.startswith(f"{stem}."):
            stem = own
    return stem


def _stated_problems(name: str, disk: DomainDisk, layers: t.Sequence[Layer]) -> list[Refusal]:
    """Return how the chain that the definition states, if it does, differs from the one that the images record."""
    stated = disk.stated_chain
    if stated is None:
        return []
    recorded = [StatedImage(layer.real_path, layer.format or "") for layer in layers[1:]]
    images = [StatedImage(os.path.realpath(image.path), image.format) for image in stated.images]
    unnamed = [layer.path for layer in layers[1:] if layer.format is None]
    if _differs(stated, images, recorded):
        why = (
            f"{disk.target}: <backingStore> says {_shown(images)}, the images say {_shown(recorded)}, so the guest may "
            "have been seeing other data than an overlay would show"
        )
        remedy = "Find out which the guest saw; correct the other one, the images with 'qemu-img rebase -u'."
        return [Refusal("other_chain", name, why, remedy)]
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
