# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: libvirt's checkpoints, judged on the chains of the disks."""

from __future__ import annotations

import typing as t

from .._disk.bitmap_rules import INCOMPLETE, Checkpoint, LayerBitmaps, judge
from .._disk.examine import examine_chain
from .._disk.verdict import Verdict
from .._libvirt.connection import KnownCheckpoint
from .._libvirt.definition import DomainDisk, disks_of
from .._qcow2.bitmaps import Bitmap
from .plan import DomainPlan


class _Chain(t.NamedTuple):
    """The chain of a disk as it is, or will be, after the run."""

    links: list[LayerBitmaps]
    is_complete: bool


def judge_checkpoints(plan: DomainPlan, overlays: t.Mapping[str, Verdict]) -> list[Checkpoint]:
    """Return for each checkpoint that libvirt knows whether it can be used after the run."""
    targets = {target for known in plan.domain.checkpoints for target in known.bitmaps}
    chains = {
        disk.target: _chain_after(disk, overlays.get(disk.target), plan)
        for disk in disks_of(plan.domain.definition)
        if disk.target in targets
    }
    return [_judge_checkpoint(known, chains) for known in plan.domain.checkpoints]


def _chain_after(disk: DomainDisk, verdict: Verdict | None, plan: DomainPlan) -> _Chain:
    """Return the chain of a disk after the run; the overlay is taken as it was promised, so also in check mode."""
    source = examine_chain(disk.source or "", follow=True, count=False, image_format=disk.format)
    if verdict is None or disk.target not in plan.overlays:
        return _Chain(source.links, source.is_complete)
    bitmaps = {b.name: Bitmap(b.name, b.granularity, recording=True, inconsistent=False) for b in verdict.bitmaps}
    overlay = LayerBitmaps(verdict.wanted.path, verdict.virtual_size or 0, bitmaps)
    return _Chain([overlay, *source.links], source.is_complete)


def _judge_checkpoint(known: KnownCheckpoint, chains: t.Mapping[str, _Chain]) -> Checkpoint:
    """Return the worst verdict of all disks of a checkpoint, since a backup needs all of them."""
    verdicts = [
        judge(bitmap, chains[target].links, chains[target].is_complete)
        if chains[target].links
        else Checkpoint(
            bitmap, None, INCOMPLETE, None, f"The image of the disk {target} cannot be read. Mend it first."
        )
        for target, bitmap in known.bitmaps.items()
        if target in chains  # the definition may have lost a disk since
    ]
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.valid], default=None)
    return worst._replace(name=known.name) if worst else Checkpoint(known.name, None)
