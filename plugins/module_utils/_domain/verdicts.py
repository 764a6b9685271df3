# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what a domain is worth for its next incremental backup, from what was read of its disks.

Pure. Of a domain that is shut off the images tell. Of one that runs libvirt tells, since the bitmaps are in the memory
of its QEMU: it says which disks have a checkpoint valid in the whole chain. The images below the topmost one, which
nobody writes to, only say what is wrong there if libvirt says that something is.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable
from .._disk.bitmap_rules import IN_USE, INCOMPLETE, Checkpoint, judge
from .._disk.examine import ExaminedChain
from .._disk.unfinished import left_in_vault
from .._disk.vault import MARK
from .._libvirt.connection import KnownCheckpoint
from .._libvirt.definition import DomainDisk
from .._qcow2.formats import QCOW2
from .checkpoints import judge_live, judge_swapped, left_open, other_disk, unreadable_disk, worst_of
from .fitness import KEEPS_NOTHING
from .inventory import READ_ONLY

INCREMENTAL = "incremental"
FULL = "full"
UNKNOWN = "unknown"
_SHOWN = 5  # names in a sentence
_HEAL = (
    " kvmfleet.qcow2.domain_checkpoint makes valid again what can be while the domain is shut off, and with "
    "unusable=remove removes the rest."
)


class DiskLook(t.NamedTuple):
    """What was read of one disk."""

    disk: DomainDisk
    unfit: str | None  # why it could take no part in a snapshot
    chain: ExaminedChain | None  # None if it has no image that could be read here
    problem: Refusal | None = None  # why the chain tells nothing about the disk

    @property
    def is_backed_up(self) -> bool:
        """Whether libvirt would take it into a checkpoint, and into a backup, unless told otherwise."""
        return self.disk.format == QCOW2 and self.disk.why_unfit not in KEEPS_NOTHING

    @property
    def real_paths(self) -> list[str]:
        """Of the images of its chain, as far as they could be read."""
        return [one.layer.real_path for one in self.chain.layers] if self.chain else []

    @property
    def top_bitmaps(self) -> list[str] | None:
        """The names of the topmost image's bitmaps; None if what is stored there tells nothing."""
        layers = self.chain.layers if self.chain else ()
        if not layers or layers[0].image is None:
            return []
        if layers[0].is_open_for_writing:
            return None
        return [bitmap.name for bitmap in layers[0].image.bitmaps if not bitmap.name.startswith(MARK)]


class DomainCheckpoint(t.NamedTuple):
    """A checkpoint of a domain over all its disks."""

    known: KnownCheckpoint
    verdict: Checkpoint
    dirty_bytes: int | None
    top_alone: bool | None

    def as_result(self) -> dict[str, t.Any]:
        """Return it in the form in which domain_info returns it."""
        return {
            **self.verdict.as_result(),
            "created": self.known.created,
            "parent": printable(self.known.parent) if self.known.parent else None,
            "dirty_bytes": self.dirty_bytes,
            "top_alone": self.top_alone,
            "bitmaps": {printable(target): printable(bitmap) for target, bitmap in self.known.bitmaps.items()},
        }


class NextBackup(t.NamedTuple):
    """What the next backup of a domain can be."""

    kind: str  # one of the constants above
    since: str | None  # name of the checkpoint
    reason: str


def judge_domain(
    known: t.Sequence[KnownCheckpoint], disks: t.Sequence[DiskLook], *, counts: bool
) -> list[DomainCheckpoint]:
    """Return the verdict on each checkpoint, the oldest one first."""
    by_target = {one.disk.target: one for one in disks}
    ages = {one.name: _age(one, {other.name: other for other in known}) for one in known}
    return [_judge(one, by_target, counts=counts) for one in sorted(known, key=lambda one: ages[one.name])]


def _age(one: KnownCheckpoint, known: t.Mapping[str, KnownCheckpoint]) -> tuple[int, int, str]:
    """Return by what checkpoints are sorted: the time, and within a second how many went before."""
    ancestors: list[str] = []
    parent = one.parent
    while parent is not None and parent in known and parent not in ancestors:
        ancestors.append(parent)
        parent = known[parent].parent
    return one.created, len(ancestors), one.name


def _judge(known: KnownCheckpoint, disks: t.Mapping[str, DiskLook], *, counts: bool) -> DomainCheckpoint:
    """Return the verdict on one checkpoint."""
    there = [(disks[target], bitmap) for target, bitmap in known.bitmaps.items() if target in disks]
    verdict = worst_of(known.name, [_judge_disk(one, bitmap, known) for one, bitmap in there])
    if not verdict.valid or not counts:
        return DomainCheckpoint(known, verdict, None, None)
    if known.live is not None:
        return DomainCheckpoint(known, verdict, sum(known.live.sizes[one.disk.target] for one, _bitmap in there), None)
    figures = [(_figure(one, bitmap, is_top=False), _figure(one, bitmap, is_top=True)) for one, bitmap in there]
    whole = [dirty for dirty, _top in figures if dirty is not None]
    if len(whole) < len(figures):
        return DomainCheckpoint(known, verdict, None, None)
    return DomainCheckpoint(known, verdict, sum(whole), all(dirty == top for dirty, top in figures))


def _figure(look: DiskLook, bitmap: str, *, is_top: bool) -> int | None:
    """Return the dirty bytes of a disk, or of its topmost image's bitmap alone; None if they were not counted."""
    if look.chain is None:
        return None
    return (look.chain.dirty_top if is_top else look.chain.dirty).get(bitmap)


def _judge_disk(look: DiskLook, bitmap: str, known: KnownCheckpoint) -> Checkpoint:
    """Return the verdict on the checkpoint for one disk."""
    # libvirt tells of the files that QEMU has open, which are not there.
    if look.problem is not None and look.problem.code == "other_disks":
        return Checkpoint(bitmap, None, INCOMPLETE, look.problem.subject, str(look.problem))
    swapped = judge_swapped(known, look.disk, look.real_paths)
    stored = _judge_stored(look, bitmap, known.created)
    open_below = left_open(look.chain.bitmaps()) if look.chain is not None else None
    doubt = left_in_vault(bitmap, look.chain.unfinished) if look.chain is not None else None
    return swapped or doubt or judge_live(bitmap, look.disk, known.live, stored, open_below)


def _judge_stored(look: DiskLook, bitmap: str, created: int) -> Checkpoint:
    """Return the verdict by what is stored in the images."""
    if look.chain is None or not look.chain.layers:
        return unreadable_disk(bitmap, look.disk.target)
    stored = judge(bitmap, look.chain.bitmaps(), complete=look.chain.is_complete, created=created)
    if look.problem is None or stored.problem == IN_USE:
        return stored
    # What is wrong in a part of the chain is wrong, whatever the rest is; unless the guest has another chain.
    if stored.valid is False and look.problem is look.chain.problem:
        return stored
    return Checkpoint(bitmap, None, INCOMPLETE, stored.image or look.disk.source, str(look.problem))


def orphan_bitmaps(known: t.Sequence[KnownCheckpoint], disks: t.Sequence[DiskLook]) -> list[dict[str, t.Any]] | None:
    """Return the topmost images' bitmaps that no checkpoint refers to; None if that cannot be told.

    Disks that the domain only reads do not count: their bitmaps are somebody else's.
    """
    orphans = []
    for one in disks:
        if one.disk.why_unfit in READ_ONLY:
            continue
        names = one.top_bitmaps
        if names is None:
            return None
        ours = {bitmap for checkpoint in known for bitmap in checkpoint.bitmaps.values()}  # targets can change
        left = [printable(name) for name in names if name not in ours]
        if left:
            orphans.append({"target": one.disk.target, "image": printable(one.disk.source or ""), "bitmaps": left})
    return orphans


def next_backup(checkpoints: t.Sequence[DomainCheckpoint], disks: t.Sequence[DiskLook]) -> NextBackup:
    """Return what the next backup can be: an increment since the newest checkpoint that allows one, or a full one."""
    backed_up = [one for one in disks if one.is_backed_up]
    newer: list[str] = []  # why those that are newer do not allow it
    unknown = None
    for one in reversed(checkpoints):
        lacking = [look.disk.target for look in backed_up if not _knows(one.known, look)]
        if one.verdict.valid and not lacking:
            since = f"An increment since the checkpoint {one.known.name!r} is possible."
            return NextBackup(INCREMENTAL, one.known.name, " ".join([since, *newer[:_SHOWN]]))
        newer.append(_why_not(one, lacking))
        if one.verdict.valid is None and unknown is None:
            unknown = newer[-1]
    if unknown is not None:
        return NextBackup(UNKNOWN, None, unknown)
    if not checkpoints:
        why = "" if backed_up else " It could have none, since it writes to no qcow2 disk."
        return NextBackup(FULL, None, f"libvirt knows no checkpoint of the domain.{why}")
    older = [" Nor does an older one allow it."] if len(newer) > 1 else []
    broken = any(one.verdict.valid is False for one in checkpoints)
    return NextBackup(FULL, None, "".join([newer[0], *older, *([_HEAL] if broken else [])]))


def _knows(known: KnownCheckpoint, look: DiskLook) -> bool:
    """Whether a disk has its bitmap of the checkpoint, or is one that was left out when it was made."""
    target = look.disk.target
    was_left_out = target in known.left_out and other_disk(known, target, look.real_paths) is None
    return target in known.bitmaps or was_left_out


def _why_not(one: DomainCheckpoint, lacking: t.Sequence[str]) -> str:
    """Return why an increment since this checkpoint is not possible, or why that cannot be told."""
    verdict = one.verdict
    where = f" in {verdict.image}" if verdict.image else ""
    if verdict.valid is None:
        return f"Whether the checkpoint {verdict.name!r} is valid cannot be told ({verdict.problem}{where})."
    if not verdict.valid:
        return f"The checkpoint {verdict.name!r} is not valid ({verdict.problem}{where})."
    return f"The checkpoint {verdict.name!r} is older than the disks {', '.join(lacking)}, of which there is no backup."
