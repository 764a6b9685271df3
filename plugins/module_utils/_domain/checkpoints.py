# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and decide: libvirt's checkpoints, judged on the chains of the disks."""

from __future__ import annotations

import typing as t

from .._disk.bitmap_rules import INCOMPLETE, Checkpoint, LayerBitmaps, judge
from .._disk.examine import examine_chain
from .._disk.overlay import OverlayVerdict
from .._libvirt.connection import KnownCheckpoint
from .._libvirt.definition import DomainDisk
from .._qcow2.bitmaps import Bitmap
from .plan import DomainPlan


class _Chain(t.NamedTuple):
    """The chain of a disk as it is, or will be, after the run."""

    layers: tuple[LayerBitmaps, ...]
    is_complete: bool


def judge_checkpoints(
    known: t.Sequence[KnownCheckpoint], plan: DomainPlan, overlays: t.Mapping[str, OverlayVerdict]
) -> tuple[Checkpoint, ...]:
    """Return for each checkpoint whether it can be used after the run.

    `overlays` has the new overlays by target. Only chains of disks that have a checkpoint are read.
    """
    targets = {target for one in known for target in one.bitmaps}
    chains = {
        disk.target: _chain_after(disk, overlays.get(disk.target))
        for disk in plan.domain.definition.disks
        if disk.target in targets
    }
    return tuple(_judge(one, chains) for one in known)


def _chain_after(disk: DomainDisk, overlay: OverlayVerdict | None) -> _Chain:
    """Return the chain of a disk after the run; the overlay is taken as it was promised, so also in check mode."""
    source = examine_chain(disk.source or "", follow=True, count=False, image_format=disk.format)
    if overlay is None:
        return _Chain(tuple(source.bitmaps()), source.is_complete)
    bitmaps = {b.name: Bitmap(b.name, b.granularity, recording=True, inconsistent=False) for b in overlay.bitmaps}
    top = LayerBitmaps(overlay.request.path, overlay.virtual_size or 0, bitmaps)
    return _Chain((top, *source.bitmaps()), source.is_complete)


def _judge(known: KnownCheckpoint, chains: t.Mapping[str, _Chain]) -> Checkpoint:
    """Return the worst verdict of all disks of a checkpoint, since a backup needs all of them."""
    verdicts = [
        judge(bitmap, chains[target].layers, complete=chains[target].is_complete)
        if chains[target].layers
        else Checkpoint(
            bitmap, None, INCOMPLETE, None, f"The image of the disk {target} cannot be read. Mend it first."
        )
        for target, bitmap in known.bitmaps.items()
        if target in chains  # the definition may have lost a disk since
    ]
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.valid], default=None)
    return worst._replace(name=known.name) if worst else Checkpoint(known.name, None)
