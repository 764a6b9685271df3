# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what becomes of the checkpoints of a domain that is shut off, over all its disks.

Pure. heal.py decides for one disk; a checkpoint needs all of its disks. One that cannot be made valid on one of them is
not touched on the others, or goes from all of them. Since what goes can be in the way of what is healed, and the other
way round, decide again until it holds::

    asked ── on every disk valid, or can be made so ──────────> healed
      └───── never valid again (UNUSABLE) ── unusable=remove ─> removed, bitmaps first, then libvirt's part
      └───── anything else ───────────────────────────────────> left as it is, failed
"""

from __future__ import annotations

import fnmatch
import typing as t

from .._base.errors import Refusal
from .._disk import heal
from .._disk.bitmap_rules import judge
from .._disk.heal import ABSENT, VALID, HealRequest, Standing
from .._disk.vault import MARK
from .._libvirt.connection import KnownCheckpoint
from .checkpoints import OTHER_DISK, other_disk
from .inventory import is_pattern

# Why a checkpoint will never be valid again; everything else that is wrong can be mended.
UNUSABLE = ("not_healable", "may_be_emptied", "no_checkpoint")
_GOES = "unusable=remove removes it, so that it is in no backup's way."


class CheckpointRequest(t.NamedTuple):
    """What is wanted of the checkpoints of every domain."""

    checkpoints: tuple[str, ...] = ("*",)  # names and patterns
    state: str = VALID
    removes_unusable: bool = False
    removes_orphans: bool = False
    cumulative: bool = False
    assume_not_emptied: bool = False
    skips_running: bool = False

    def select(self, known: t.Sequence[KnownCheckpoint]) -> list[KnownCheckpoint]:
        """Return the checkpoints that are asked for."""
        return [
            one for one in known if any(one.name == name or fnmatch.fnmatchcase(one.name, name) for name in self._names)
        ]

    def unknown(self, known: t.Sequence[KnownCheckpoint]) -> list[str]:
        """Return the names, not patterns, of which libvirt knows no checkpoint."""
        there = {one.name for one in known}
        return [name for name in self._names if not is_pattern(name) and name not in there]

    def unmatched(self, known: t.Sequence[KnownCheckpoint]) -> list[str]:
        """Return the patterns that match none of these checkpoints, but for the one that asks for all there are."""
        patterns = [name for name in self._names if name != "*" and is_pattern(name)]
        return [one for one in patterns if not any(fnmatch.fnmatchcase(other.name, one) for other in known)]

    @property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(self.checkpoints)


class DiskChain(t.NamedTuple):
    """A disk with the images of its chain, topmost first."""

    target: str
    path: str
    images: tuple[Standing, ...] = ()
    problem: Refusal | None = None  # why nothing can be said of it
    has_vault: bool = False  # that a killed run has left
    others: tuple[tuple[str, str], ...] = ()  # as HealRequest has it
    holds_none: bool = False  # whether its format holds no bitmaps, as its definition has it
    real_paths: tuple[str, ...] = ()  # of its images
    warnings: tuple[str, ...] = ()

    def is_valid(self, bitmap: str, created: int) -> bool:
        """Whether the chain has this bitmap, of a checkpoint that was made then, in order as it is, without a vault."""
        layers = [one.layer for one in self.images]
        is_complete = bool(layers) and not any(bitmap in one.put_back for one in self.images)
        return is_complete and judge(bitmap, layers, created=created).valid is True


class Fate(t.NamedTuple):
    """What is to become of a checkpoint that is asked for."""

    name: str
    bitmaps: t.Mapping[str, str]  # by target, of the disks that the domain still has
    state: str  # of it if all goes well, REBUILT excepted, which the disks tell
    problem: Refusal | None = None  # why it is left as it is
    is_as_wanted: bool = False  # nothing has to be done for it


class Decision(t.NamedTuple):
    """What is to be done with the checkpoints of a domain."""

    fates: tuple[Fate, ...]
    requests: t.Mapping[str, HealRequest]  # by target
    forgotten: tuple[str, ...]  # names of the checkpoints that libvirt is to forget, once their bitmaps are gone
    orphans: t.Mapping[str, tuple[str, ...]]  # bitmaps that are to go, by target
    problems: tuple[Refusal, ...]  # that are about no checkpoint
    writes: bool  # whether images may have to be written, as far as their headers tell


def bitmaps_known(known: t.Sequence[KnownCheckpoint], target: str) -> tuple[tuple[str, int], ...]:
    """Return the bitmaps of a disk that libvirt's checkpoints need, and when each was made, in seconds since 1970."""
    return tuple((one.bitmaps[target], one.created) for one in known if target in one.bitmaps)


def bitmaps_referred(known: t.Sequence[KnownCheckpoint]) -> frozenset[str]:
    """Return the bitmaps that libvirt's checkpoints need, of whichever disk: one can have got another target since."""
    return frozenset(bitmap for one in known for bitmap in one.bitmaps.values())


def no_such_checkpoint(domain: str, name: str) -> Refusal:
    """Return the refusal of a name of which libvirt knows no checkpoint."""
    why = f"libvirt knows no checkpoint {name!r} of it"
    return Refusal("no_checkpoint", domain, why, "Check the name ('virsh checkpoint-list').")


def without_disks(domain: str, name: str) -> Refusal:
    """Return the refusal of a checkpoint that is about disks which the domain has no more."""
    why = f"it has none of the disks of its checkpoint {name!r} any more"
    return Refusal("no_checkpoint", domain, why, "Make a full backup with a new checkpoint.")


def holds_no_bitmaps(disk: DiskChain, name: str) -> Refusal:
    """Return the refusal of a checkpoint of a disk that has another format since."""
    why = f"its format in the definition of the domain holds no bitmaps, so checkpoint {name!r} is never valid again"
    return Refusal("no_checkpoint", disk.path, why, "Make a full backup with a new checkpoint.")


def is_of_other_disk(disk: DiskChain, other: str, name: str) -> Refusal:
    """Return the refusal of a checkpoint of disks that have swapped their targets, or their files, since."""
    why = (
        f"is the disk {disk.target} now, and by the names of its images was {other} when the checkpoint {name!r} was "
        "made, so an increment may not fit its backup"
    )
    return Refusal("not_healable", disk.path, why, OTHER_DISK)


def decide(
    domain: tuple[str, str],
    request: CheckpointRequest,
    known: t.Sequence[KnownCheckpoint],
    disks: t.Sequence[DiskChain],
) -> Decision:
    """Return what is to be done; `domain` is its name and its UUID, `known` has all its checkpoints."""
    draft = _Draft(domain, request, known, disks)
    while draft.move():
        pass
    return draft.decision()


class _Draft:
    """A decision in the making."""

    def __init__(
        self,
        domain: tuple[str, str],
        request: CheckpointRequest,
        known: t.Sequence[KnownCheckpoint],
        disks: t.Sequence[DiskChain],
    ) -> None:
        self._name, self._uuid = domain
        self._request = request
        self._known = known
        self._disks = {one.target: one for one in disks}
        self._asked = {one.name: self._bitmaps(one) for one in request.select(known)}
        self._problems: dict[str, Refusal] = {}  # by checkpoint
        self._of_orphans: list[Refusal] = []
        self._orphans = self._find_orphans() if request.removes_orphans else {}
        self._left_over = self._find_left_over() if request.state == ABSENT else []
        self._healed = list(self._asked) if request.state == VALID else []
        self._removed = [] if request.state == VALID else list(self._asked)
        for name in list(self._healed):
            if not self._asked[name]:
                self._give_up(name, without_disks(self._name, name))
        for one, disk, other in self._swapped():
            if one in self._healed:
                self._give_up(one, is_of_other_disk(disk, other, one))
        for name, bitmaps in self._asked.items():
            for disk in (self._disks[target] for target in bitmaps):
                if disk.holds_none and name in self._healed:
                    self._give_up(name, holds_no_bitmaps(disk, name))
                if disk.problem is not None:
                    self._leave(name, disk.problem)

    def _bitmaps(self, checkpoint: KnownCheckpoint) -> dict[str, str]:
        """Return the bitmaps of a checkpoint on the disks that the domain still has."""
        return {target: bitmap for target, bitmap in checkpoint.bitmaps.items() if target in self._disks}

    def _referred(self) -> frozenset[str]:
        return bitmaps_referred(self._known)

    def _swapped(self) -> t.Iterator[tuple[str, DiskChain, str]]:
        """Yield the checkpoints that are asked for, with a disk that each has, and which one that was then."""
        for known in (one for one in self._known if one.name in self._asked):
            for disk in (self._disks[target] for target in self._asked[known.name]):
                other = other_disk(known, disk.target, disk.real_paths)
                if other is not None:
                    yield known.name, disk, other

    def _find_orphans(self) -> dict[str, tuple[str, ...]]:
        """Return the bitmaps that no checkpoint refers to, by target."""
        found, referred = {}, self._referred()
        for target, disk in self._disks.items():
            self._of_orphans += [disk.problem] if disk.problem is not None else []
            own = []
            for image in disk.images:
                if image.others:  # what a template has is its own
                    break
                own += [name for name in image.bitmaps if name not in referred and not name.startswith(MARK)]
            if own:
                found[target] = tuple(dict.fromkeys(own))
        return found

    def _give_up(self, name: str, problem: Refusal) -> None:
        """Have a checkpoint go that will never be valid again, or leave it."""
        if not self._request.removes_unusable:
            self._leave(name, problem.with_note(_GOES))
            return
        self._healed.remove(name)
        self._removed.append(name)

    def _leave(self, name: str, problem: Refusal) -> None:
        """Leave a checkpoint as it is, on all disks."""
        self._problems.setdefault(name, problem)
        for names in (self._healed, self._removed, self._left_over):
            if name in names:
                names.remove(name)

    def _requests(self) -> dict[str, HealRequest]:
        """Return what is asked of each disk."""
        requests = {}
        for target, disk in self._disks.items():
            if disk.problem is not None or disk.holds_none:
                continue
            names = [self._asked[name][target] for name in self._healed if target in self._asked[name]]
            removed = [self._asked[name][target] for name in self._removed if target in self._asked[name]]
            removed += self._orphans.get(target, ())
            if disk.has_vault:  # by which they would be put back
                removed += self._left_over
            if names or removed or disk.has_vault:
                requests[target] = HealRequest(
                    path=disk.path,
                    names=tuple(dict.fromkeys(names)),
                    assume_not_emptied=self._request.assume_not_emptied,
                    cumulative=self._request.cumulative,
                    removed=tuple(dict.fromkeys(removed)),
                    domain=self._uuid,
                    others=disk.others,
                    created=bitmaps_known(self._known, target),
                    referred=self._referred(),
                )
        return requests

    def _find_left_over(self) -> list[str]:
        """Return the bitmaps of checkpoints that are to be absent and that libvirt does not know any more.

        It names a bitmap as its checkpoint, unless it is asked for another name. Then it can be that of another one.
        """
        referred = self._referred()
        return [name for name in self._request.unknown(self._known) if name not in referred]

    def _plans(self) -> dict[str, heal.Plan]:
        return {target: heal.decide(one, self._disks[target].images) for target, one in self._requests().items()}

    def move(self) -> bool:
        """Move what turns out to be impossible to where it belongs; return whether there was anything."""
        found = {
            (target, one.name): one.problem
            for target, plan in self._plans().items()
            for one in plan.found
            if one.problem is not None
        }
        wrong = {
            name: found[target, bitmap]
            for name in (*self._healed, *self._removed)
            for target, bitmap in reversed(list(self._asked[name].items()))
            if (target, bitmap) in found
        }
        never = {name: why for name, why in wrong.items() if name in self._healed and why.code in UNUSABLE}
        for name, problem in never.items():
            self._give_up(name, problem)
        if not never:  # what goes may have been in the way of the others
            for name, problem in wrong.items():
                self._leave(name, problem)
            self._spare({key: why for key, why in found.items() if not wrong})
        return bool(found)

    def _spare(self, found: t.Mapping[tuple[str, str], Refusal]) -> None:
        """Leave what cannot be removed of what no checkpoint refers to."""
        for (target, bitmap), problem in found.items():
            orphans = self._orphans.get(target, ())
            if bitmap in orphans:
                self._orphans[target] = tuple(name for name in orphans if name != bitmap)
                self._of_orphans.append(problem)
            if bitmap in self._left_over:
                self._leave(bitmap, problem)

    def decision(self) -> Decision:
        """Return what holds now that nothing has to be moved any more."""
        plans = self._plans()
        vaults = any(one.has_vault for one in self._disks.values())
        return Decision(
            fates=(*(self._fate(name) for name in self._asked), *self._unknown()),
            requests=self._requests(),
            forgotten=tuple(self._removed),
            orphans={target: names for target, names in self._orphans.items() if names},
            problems=tuple(dict.fromkeys(self._of_orphans)),
            writes=vaults or any(plan.written for plan in plans.values()),
        )

    def _fate(self, name: str) -> Fate:
        bitmaps = self._asked[name]
        state = heal.REMOVED if name in self._removed else VALID
        created = next(one.created for one in self._known if one.name == name)
        is_valid = state == VALID and all(
            self._disks[target].is_valid(bitmap, created) for target, bitmap in bitmaps.items()
        )
        problem = self._problems.get(name)
        return Fate(name, bitmaps, state, problem, is_as_wanted=problem is None and is_valid)

    def _unknown(self) -> t.Iterator[Fate]:
        for name in self._request.unknown(self._known):
            if self._request.state == VALID:
                yield Fate(name, {}, VALID, no_such_checkpoint(self._name, name))
            else:
                problem = self._problems.get(name)
                yield Fate(name, {}, ABSENT, problem, is_as_wanted=problem is None and not self._is_to_go(name))

    def _is_to_go(self, name: str) -> bool:
        """Whether an image still has the bitmap of a checkpoint that libvirt has forgotten, or would get it back."""
        with_vault = [one for one in self._disks.values() if one.has_vault]
        return name in self._left_over and any(name in image.bitmaps for one in with_vault for image in one.images)
