# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide and act: the checkpoints of a domain that runs, of which libvirt tells, and which it deletes.

QEMU has the images open, so nothing is healed. What libvirt does not call valid counts as unusable, whatever could be
made of it while the domain is shut off.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal
from .._disk import heal
from .._disk.heal import ABSENT, VALID
from .._disk.unfinished import COMMIT
from .._libvirt.checkpoints import delete_live
from .._libvirt.connection import Domain, Libvirt
from .healing import CheckpointRequest, Fate, no_such_checkpoint, without_disks
from .live import OLDEST, shown, why_not_written_below
from .look import DomainLook
from .verdicts import DomainCheckpoint

_SHUT_OFF_HEALS = (
    "Shut it down and run this again, which makes it valid if that is provable. Or have it deleted at once with "
    "running=live and unusable=remove, and make a full backup with a new checkpoint."
)


def fates_of_running(look: DomainLook, request: CheckpointRequest) -> list[Fate]:
    """Return what is to become of the checkpoints that are asked for, the newest one first."""
    name = look.domain.name
    asked = {one.name for one in request.select(look.kept.checkpoints)}
    newest_first = [one for one in reversed(look.checkpoints) if one.known.name in asked]
    unknown = request.unknown(look.kept.checkpoints)
    if request.state == ABSENT:
        gone = [Fate(one, {}, ABSENT, is_as_wanted=True) for one in unknown]
        return [*(Fate(one.known.name, one.known.bitmaps, heal.REMOVED) for one in newest_first), *gone]
    targets = {one.disk.target for one in look.disks}
    missing = [Fate(one, {}, VALID, no_such_checkpoint(name, one)) for one in unknown]
    return [*(_fate(name, one, targets, request) for one in newest_first), *missing]


def _fate(domain: str, one: DomainCheckpoint, targets: t.Container[str], request: CheckpointRequest) -> Fate:
    known, verdict = one.known, one.verdict
    if verdict.valid:
        return Fate(known.name, known.bitmaps, VALID, is_as_wanted=True)
    has_disks = any(target in targets for target in known.bitmaps)
    if verdict.valid is None and has_disks:
        why = f"whether its checkpoint {known.name!r} is valid cannot be told while it runs"
        return Fate(known.name, known.bitmaps, VALID, Refusal("libvirt_failed", domain, why, verdict.advice or ""))
    if request.removes_unusable:
        return Fate(known.name, known.bitmaps, heal.REMOVED)
    if not has_disks:
        return Fate(known.name, known.bitmaps, VALID, without_disks(domain, known.name))
    where = f" in {verdict.image}" if verdict.image else ""
    why = f"its checkpoint {known.name!r} is not valid ({verdict.problem}{where}), and it runs, so nobody can heal it"
    return Fate(known.name, known.bitmaps, VALID, Refusal("not_valid", domain, why, _SHUT_OFF_HEALS))


def why_not_deleted(version: tuple[int, int, int], domain: Domain) -> Refusal | None:
    """Return why this libvirt cannot delete checkpoints of a domain that runs; None if it can."""
    if version >= OLDEST:
        return None
    why = (
        f"libvirt {shown(version)} would change the bitmaps of other checkpoints, too, when it deletes one; "
        f"{shown(OLDEST)} does not"
    )
    return Refusal("old_libvirt", domain.name, why, "Update libvirt, or shut the domain down and run this again.")


def why_left_below(version: tuple[int, int, int], look: DomainLook, fate: Fate) -> Refusal | None:
    """Return why this QEMU cannot remove the bitmaps of a checkpoint from all images of a disk; None if it can.

    It must not be asked to: before it fails, it takes the bitmap out of the topmost image, on disk, and if it is killed
    then, the checkpoint is broken.
    """
    too_old = why_not_written_below(version)
    if too_old is None:
        return None
    for disk in look.disks:
        below = disk.chain.layers[1:] if disk.chain is not None else ()
        bitmap = fate.bitmaps.get(disk.disk.target)
        for image in (one.layer.path for one in below if bitmap in one.bitmaps().bitmaps):
            why = f"{image} has a bitmap of its checkpoint {fate.name!r}, and {too_old[0]}"
            return Refusal("old_libvirt", look.domain.name, why, too_old[1])
    return None


def why_unfinished(look: DomainLook, fate: Fate) -> Refusal | None:
    """Return which merge has to be completed before a checkpoint is removed; None if none.

    Its vault can have bitmaps of the checkpoint: what looks broken may be valid then, and what was removed is back.
    """
    chains = [one.chain for one in look.disks if one.disk.target in fate.bitmaps and one.chain is not None]
    left = (one for chain in chains for one in chain.unfinished if one.kind == COMMIT and one.is_in_the_way)
    return next((one.as_refusal() for one in left), None)


def remove_from_running(daemon: Libvirt, look: DomainLook, fates: t.Sequence[Fate], *, check_mode: bool) -> list[Fate]:
    """Have libvirt delete the checkpoints that are to go; return the fates as they are then."""
    going = [one for one in fates if one.state == heal.REMOVED]
    if not going:
        return list(fates)
    too_old = why_not_deleted(daemon.version, look.domain)
    version = daemon.qemu_version
    problems = {one.name: too_old or why_unfinished(look, one) or why_left_below(version, look, one) for one in going}
    names = [name for name, problem in problems.items() if problem is None]
    if not check_mode:
        problems.update(delete_live(daemon, look.domain, names))
    return [one._replace(problem=problems.get(one.name) or one.problem) for one in fates]
