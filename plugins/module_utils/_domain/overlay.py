# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read, decide, act: overlays for the disks of libvirt domains, and the domains with_sources to them."""

from __future__ import annotations

import itertools
import os
import typing as t

from .._disk.verdict import OverlayRequest
from .._libvirt.connection import Domain
from .._libvirt.definition import DomainDisk, StatedChain, StatedImage, disks_of
from .._qcow2.chain import Layer
from .inventory import Users, is_device_path, layers_of
from .plan import DomainPlan, SkippedDisk, SnapshotRequest, state_problems

_EXTENSIONS = (".qcow2", ".qcow", ".img", ".raw")  # that are no part of an image's stem
_NOT_ASKED_FOR = "not asked for"


def plan_domain(domain: Domain, request: SnapshotRequest, users: Users) -> DomainPlan:
    """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
    plan = DomainPlan(domain, {}, {}, [], [])
    for disk in disks_of(domain.definition):
        reason = _reason_to_skip(disk, request)
        if reason is None:
            _plan_disk(plan, disk, request, users)
        else:
            plan.skipped.append(SkippedDisk(disk.target, reason))
    skipped = {disk.target: disk.reason for disk in plan.skipped}
    for target in request.targets or ():
        if target not in plan.wanted:
            why = skipped.get(target, "it has no such disk")
            plan.problems.append(f"{domain.name}: its disk {target} cannot take part: {why}. Correct disks.")
    if not plan.wanted and not plan.problems:
        listed = ", ".join(f"{disk.target}: {disk.reason}" for disk in plan.skipped) or "it has no disks"
        plan.problems.append(f"{domain.name}: none of its disks can take part ({listed}).")
    plan.problems.extend(state_problems(plan))
    return plan


def _reason_to_skip(disk: DomainDisk, request: SnapshotRequest) -> str | None:
    """Return why a disk is left out, or None."""
    if disk.why_unfit is not None:
        return disk.why_unfit
    if request.targets is not None and disk.target not in request.targets:
        return _NOT_ASKED_FOR
    if disk.opted_out and request.targets is None:
        return "excluded by snapshot='no' in the definition"
    if request.directory is None and (disk.kind == "block" or is_device_path(disk.source)):
        return "block device, beside which no overlay can be made; give a directory"
    return None


def _plan_disk(plan: DomainPlan, disk: DomainDisk, request: SnapshotRequest, users: Users) -> None:
    """Add to the plan what is to become of a disk that takes part."""
    name, source = plan.domain.name, t.cast("str", disk.source)
    layers, problem = layers_of(source, disk.format)
    # A template belongs to all its clones; neither its name nor its snapshots are those of this domain.
    below_top = itertools.takewhile(lambda layer: users.anyhow.get(layer.real_path) == {name}, layers[1:])
    own = [*layers[:1], *below_top]
    others = users.writing.get(os.path.realpath(source), set()) - {name}
    # Whoever is on that snapshot already, or above it, may have been given another directory then.
    for above, below in zip(own, layers[1:]):
        if os.path.basename(above.path).endswith(f".{request.snapshot}.qcow2"):
            plan.wanted[disk.target] = OverlayRequest(
                above.path, below.path, below.format or "qcow2", vm=plan.domain.uuid
            )
            break
    else:
        stem = stem_of([layer.path for layer in own] or [source])
        path = os.path.join(request.directory or os.path.dirname(source), f"{stem}.{request.snapshot}.qcow2")
        if others:
            problem = (
                f"{name}: its disk {disk.target} is a disk of {', '.join(sorted(others))} too, which would go on "
                "writing below the overlay. Give each a disk of its own."
            )
        if path in plan.overlays.values():
            problem = (
                f"{name}: several of its disks would get the overlay {path}. Take them one by one, by disks, into "
                "directories of their own."
            )
        plan.overlays[disk.target] = path
        plan.wanted[disk.target] = OverlayRequest(
            path=path,
            backing_file=source,
            backing_format=disk.format,
            vm=plan.domain.uuid,
            relative=request.relative,
            creation=request.creation,
            must_be_fresh=True,
        )
    if problem is None and disk.stated_chain is not None:
        problem = _stated_problem(name, disk, disk.stated_chain, layers)
    if problem is not None:
        plan.problems.append(problem)


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


def _stated_problem(name: str, disk: DomainDisk, stated: StatedChain, layers: t.Sequence[Layer]) -> str | None:
    """Return how the chain that the definition states differs from the one that the images record."""
    recorded = [StatedImage(layer.real_path, layer.format or "") for layer in layers[1:]]
    images = [StatedImage(os.path.realpath(image.path), image.format) for image in stated.images]
    unnamed = [layer.path for layer in layers[1:] if layer.format is None]
    # Where the images record no format, the one that the definition states is not another one.
    known = [image if image.format else image._replace(format=own.format) for image, own in zip(recorded, images)]
    if images != known or (stated.is_complete and len(images) != len(recorded)):
        return (
            f"{name}: its definition states another backing chain for {disk.target} ({_shown(images)}) than the images "
            f"record ({_shown(recorded)}), so the guest may have been seeing other data than an overlay would show. "
            "Find out which is right; then correct <backingStore> in the definition, or the images with "
            "'qemu-img rebase -u'."
        )
    if unnamed:
        return (
            f"{name}: the format of {unnamed[0]} is stated in the definition only, not in the image above it, which an "
            "overlay needs. Record it with 'qemu-img rebase -u -b … -F …'."
        )
    return None


def _shown(images: t.Sequence[StatedImage]) -> str:
    """Return a chain for a message."""
    return " > ".join(f"{image.path} as {image.format or 'no format'}" for image in images) or "none"
