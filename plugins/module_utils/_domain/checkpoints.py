# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and decide: libvirt's checkpoints, judged on the chains of the disks."""

from __future__ import annotations

import collections
import os
import typing as t

from .._disk.bitmap_rules import BROKEN, IN_USE, INCOMPLETE, LOST, SWAPPED, Checkpoint, LayerBitmaps, judge
from .._disk.examine import examine_chain
from .._libvirt.connection import KnownCheckpoint, LiveBitmaps
from .._libvirt.definition import DomainDisk
from .._qcow2.bitmaps import Bitmap

_BROKEN_LIVE = (
    "libvirt says that the bitmap is missing or broken in the chain of the disk {}, and not in which image, since the "
    "domain runs. Shut it down, and kvmfleet.qcow2.domain_checkpoint makes it valid again if that is provable. Or have "
    "libvirt delete it at once by domain_checkpoint with running=live and unusable=remove, and make a full backup with "
    "a new checkpoint."
)
OTHER_DISK = (
    "If the disks have swapped their targets, so that the guest finds the other one's data here, give the targets back "
    "('virsh edit'), or make a full backup with a new checkpoint. If only the files were moved or renamed, and the "
    "guest finds its data where it was, leave the targets, or an increment would hold the data of another disk: a full "
    "backup with a new checkpoint is needed."
)
_SWAPPED = (
    "The disk {} has images by the names that {} had when the checkpoint was made, so an increment may not fit its "
    f"backup. {OTHER_DISK} kvmfleet.qcow2.domain_checkpoint with unusable=remove removes this one."
)


_NOT_STORED = (
    "The domain runs above this image, and its QEMU still has it open for writing: a block job writes to it, or QEMU "
    "could not store its bitmaps as it was left, for want of room. Then the checkpoint is valid until the domain is "
    "shut off. Wait for the job, or make room on the storage of this image and an incremental backup with a new "
    "checkpoint before the domain is shut off."
)


class Chain(t.NamedTuple):
    """The chain of a disk as it is, or will be, after the run."""

    layers: tuple[LayerBitmaps, ...]
    is_complete: bool

    def down_to(self, path: str) -> tuple[LayerBitmaps, ...]:
        """Return the images from the top down to the one of this path."""
        paths = [layer.path for layer in self.layers]
        return self.layers[: paths.index(path) + 1] if path in paths else ()


def judge_checkpoints(
    known: t.Sequence[KnownCheckpoint], disks: t.Sequence[DomainDisk], chain_after: t.Callable[[DomainDisk], Chain]
) -> tuple[Checkpoint, ...]:
    """Return for each checkpoint whether it can be used after the run.

    `chain_after` returns the chain that a disk has then. Only chains of disks are read that have a checkpoint.
    """
    targets = {target for one in known for target in one.bitmaps}
    chains = {disk.target: chain_after(disk) for disk in disks if disk.target in targets}
    return tuple(_judge(one, {disk.target: disk for disk in disks}, chains) for one in known)


def chain_of(path: str | None, image_format: str) -> Chain:
    """Return the chain of an image as it is."""
    source = examine_chain(path or "", follow=True, count=False, image_format=image_format)
    return Chain(tuple(source.bitmaps()), source.is_complete)


def promised(path: str, virtual_size: int | None, bitmaps: t.Sequence[Bitmap]) -> LayerBitmaps:
    """Return an image as it will be when these bitmaps record in it."""
    own = {b.name: b._replace(recording=True, inconsistent=False) for b in bitmaps}
    return LayerBitmaps(path, virtual_size or 0, own)


def as_promised(
    known: t.Sequence[KnownCheckpoint], usable: t.Mapping[str, t.Collection[str]]
) -> tuple[KnownCheckpoint, ...]:
    """Return the checkpoints as libvirt would tell of them after a run that is only rehearsed.

    `usable` has by target the bitmaps that the run promises. How much they mark nobody can tell before.
    """
    return tuple(one._replace(live=_live_as_promised(one, one.live, usable)) for one in known)


def _live_as_promised(
    known: KnownCheckpoint, live: LiveBitmaps | None, usable: t.Mapping[str, t.Collection[str]]
) -> LiveBitmaps | None:
    if live is None or live.problem is not None:
        return live
    promised_to = {target: 0 for target, bitmap in known.bitmaps.items() if bitmap in usable.get(target, ())}
    return LiveBitmaps({**promised_to, **live.sizes})


def _judge(known: KnownCheckpoint, disks: t.Mapping[str, DomainDisk], chains: t.Mapping[str, Chain]) -> Checkpoint:
    """Return the verdict on a checkpoint by the chains of its disks, or by what libvirt says of them."""
    verdicts = [
        judge_swapped(known, disks[target], [os.path.realpath(one.path) for one in chains[target].layers])
        or judge_live(
            bitmap,
            disks[target],
            known.live,
            _judge_stored(bitmap, target, chains, known.created),
            left_open(chains[target].layers),
        )
        for target, bitmap in known.bitmaps.items()
        if target in disks  # the definition may have lost a disk since
    ]
    return worst_of(known.name, verdicts)


def _judge_stored(bitmap: str, target: str, chains: t.Mapping[str, Chain], created: int) -> Checkpoint:
    """Return the verdict by what is stored in the images."""
    chain = chains.get(target)
    if chain is None or not chain.layers:
        return unreadable_disk(bitmap, target)
    return judge(bitmap, chain.layers, complete=chain.is_complete, created=created)


def other_disk(known: KnownCheckpoint, target: str, images: t.Collection[str]) -> str | None:
    """Return which disk of a checkpoint's time it is whose images a target has now, if not the one it had then.

    `images` are the real paths of its chain. That they are others tells nothing: a snapshot, a merge or a move gives a
    disk other images. But if one was another disk's, and none its own, the disks have swapped their targets, or their
    files have swapped their names. Nothing but the path tells images of that time.
    """
    times = collections.Counter(path for paths in known.images.values() for path in paths)
    own = {name: {path for path in paths if times[path] == 1} for name, paths in known.images.items()}  # no template
    if not own.get(target, set()).isdisjoint(images):
        return None
    return next((name for name in sorted(own) if name != target and not own[name].isdisjoint(images)), None)


def judge_swapped(known: KnownCheckpoint, disk: DomainDisk, images: t.Collection[str]) -> Checkpoint | None:
    """Return the verdict for one disk that had another target when the checkpoint was made; None if it had this one."""
    other = other_disk(known, disk.target, images)
    if other is None:
        return None
    return Checkpoint(known.name, False, SWAPPED, disk.source, _SWAPPED.format(disk.target, other))


def left_open(layers: t.Sequence[LayerBitmaps]) -> str | None:
    """Return the path of the first image below the topmost one that is open for writing; None if none is."""
    return next((layer.path for layer in layers[1:] if layer.is_open_for_writing), None)


def judge_live(
    bitmap: str, disk: DomainDisk, live: LiveBitmaps | None, stored: Checkpoint, open_below: str | None = None
) -> Checkpoint:
    """Return the verdict for one disk by what libvirt says of it, if it was asked; `stored` is that by the images.

    `open_below`: the path of an image below the topmost one that QEMU has open for writing, and so has not stored.
    """
    if live is None:
        return stored
    if stored.problem == LOST:  # of which libvirt knows nothing
        return stored
    if live.problem is None and disk.target in live.sizes:
        return (
            Checkpoint(bitmap, True)
            if open_below is None
            else Checkpoint(bitmap, None, IN_USE, open_below, _NOT_STORED)
        )
    if stored.valid is False:  # an image below the one that is written to
        return stored
    if live.problem is None:
        return Checkpoint(bitmap, False, BROKEN, None, _BROKEN_LIVE.format(disk.target))
    advice = f"The domain runs, and libvirt cannot tell: {live.problem}. Look again, or when it is shut off."
    return Checkpoint(bitmap, None, IN_USE, disk.source, advice)


def unreadable_disk(bitmap: str, target: str) -> Checkpoint:
    """Return the verdict on a bitmap of a disk of which nothing can be read."""
    return Checkpoint(bitmap, None, INCOMPLETE, None, f"The image of the disk {target} cannot be read. Mend it first.")


def worst_of(name: str, verdicts: t.Sequence[Checkpoint]) -> Checkpoint:
    """Return the worst verdict of all disks of a checkpoint, since a backup needs all of them."""
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.valid], default=None)
    if worst is None:
        return Checkpoint(name, None, INCOMPLETE, None, "The domain has none of the disks of this checkpoint any more.")
    return worst._replace(name=name)
