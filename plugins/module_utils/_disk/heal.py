# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: which bitmaps of a chain can be made valid, or removed, and what each image must have for that.

Pure. mend.py acts on the plan. An overlay differs from the image below only where it holds something itself. So where a
bitmap is valid in the image below, down to the bottom, all that changed in the overlay since is what the overlay
holds, whatever became of its own bitmap::

    TOP      rebuilt: what it holds, and what its own bitmap marks, if it has one
    layer    first bad one, from the bottom: rebuilt from what it holds
    lowest   the lowest image that has the bitmap: recording, not inconsistent

Above the first bad one a bitmap of the name may be a later one, so all from there to the top are rebuilt.

Images are written from the top downwards. A QEMU that is killed while it opens an image with bitmaps can lose all of
them, names included, and a chain without them may look valid. So

1) before an image below the topmost one is written, the bitmaps of the topmost one take in all bits below, and
2) an image is barred if the chain would, without its bitmaps, look valid for one that is not, or if it alone tells why
   a bitmap that stays can never be valid, since it tells that no more once it is written.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable
from .._qcow2.bitmaps import Bitmap
from .bitmap_rules import (
    DIFFERENT_SIZE,
    EMPTIED,
    INCONSISTENT,
    LOST,
    NOT_RECORDING,
    OLDER,
    Checkpoint,
    LayerBitmaps,
    carries_over,
    judge,
    judge_all,
    why_not_provable,
)
from .fates import Named
from .siblings import IS_NO_DISK
from .vault import MARK
from .verdict import FAILED, Need, problem_fields

VALID = "valid"
ABSENT = "absent"
REBUILT = "rebuilt"
REMOVED = "removed"

_FULL = (
    "Make a full backup with a new checkpoint, and remove this one with state=absent, of a libvirt domain by "
    "kvmfleet.qcow2.domain_checkpoint."
)


class HealRequest(t.NamedTuple):
    """The bitmaps of one disk, as they are asked for."""

    path: str
    names: tuple[str, ...] | None = None  # None means all that the chain has
    state: str = VALID
    assume_not_emptied: bool = False
    cumulative: bool = False
    removed: tuple[str, ...] = ()  # beside those that are to be valid
    domain: str | None = None  # whose disks are done all or none, each with all that is asked for
    others: tuple[tuple[str, str], ...] = ()  # real path of an image of the chain, and who else has it, as far as known
    created: tuple[tuple[str, int], ...] = ()  # bitmaps of known checkpoints, and when these were made, s since 1970
    referred: frozenset[str] = frozenset()  # bitmaps that checkpoints of the domain need, of whichever disk

    @property
    def missed(self) -> frozenset[str]:
        """The bitmaps that nobody has removed on purpose: where a vault has one and its image does not, it is lost."""
        wanted = self.names if self.names is not None and self.state == VALID else ()
        return frozenset((*dict(self.created), *wanted))

    @property
    def vm(self) -> str:
        """Without a domain each disk has its turn by itself."""
        return self.domain or self.path


class Standing(t.NamedTuple):
    """An image of the chain, as it stands there."""

    path: str
    virtual_size: int  # bytes
    bitmaps: Named  # those that are put back are told as the vault has them
    put_back: frozenset[str] = frozenset()  # that a killed run has lost, and that its vault has
    gone: tuple[Bitmap, ...] = ()  # that its vault has and it lacks, and that are not put back
    forgotten: frozenset[str] = frozenset()  # of these, whose checkpoints libvirt has forgotten since the kill
    doubtful: t.Mapping[str, Refusal] = {}  # of those put back, the ones that may lack changes, and why
    lost_bitmaps: int = 0
    lost_names: frozenset[str] | None = None  # of these; None if that cannot be told
    lost_by_kill: bool = False  # a killed run has lost these, and its vault has those that were to stay
    modified: int | None = None  # seconds since 1970, of the last write; None if that cannot be told
    made: int = 0  # seconds since 1970, when an overlay was; 0: not known
    is_flattened: bool = False  # an overlay that records no image below any more
    fault: Refusal | None = None  # why its bitmaps cannot be written
    others: tuple[str, ...] = ()  # paths of the images on top of it that are not in this chain

    @property
    def is_broken_off(self) -> bool:
        """Whether it must be written: by its vault alone it is known which bitmaps it is to have."""
        return bool(self.put_back or self.forgotten) or self.lost_by_kill

    @property
    def layer(self) -> LayerBitmaps:
        """What the rules about checkpoints need of it, as it is."""
        return LayerBitmaps(
            path=self.path,
            virtual_size=self.virtual_size,
            bitmaps=self.bitmaps,
            lost_bitmaps=self.lost_bitmaps,
            lost_names=self.lost_names,
            modified=self.modified,
            made=self.made,
            is_flattened=self.is_flattened,
        )


class Want(t.NamedTuple):
    """A bitmap that an image is to have. An inconsistent one only stays."""

    bitmap: Bitmap
    own: bool = True  # what it marks now goes in
    held: bool = False  # all goes in that the image holds itself
    below: tuple[int, ...] = ()  # the places of the images whose bitmaps of this name go in


class Found(t.NamedTuple):
    """What was found of one bitmap that is asked for."""

    name: str
    image: str | None  # path of the image that it is about
    problem: Refusal | None = None


Wants = t.Mapping[int, t.Mapping[str, Want]]  # by place and name


class Plan(t.NamedTuple):
    """What is to be done with one disk."""

    wants: Wants  # all bitmaps that each image is to have, by its place in the chain
    written: tuple[int, ...]  # the places of those that may have to be written
    found: tuple[Found, ...]  # of each bitmap that is asked for
    checkpoints: tuple[Checkpoint, ...]  # afterwards
    barred: t.Mapping[int, Refusal]  # why an image must not be written, by its place


class Item(t.NamedTuple):
    """What is to become, or became, of a bitmap in one image."""

    name: str
    image: str | None
    state: str
    before: int | None = None  # bytes that it marks
    after: int | None = None
    problem: Refusal | None = None

    def as_result(self) -> dict[str, t.Any]:
        """Return it in the form in which the module returns it."""
        return {
            "name": printable(self.name),
            "image": printable(self.image) if self.image else None,
            "state": self.state,
            "dirty_bytes_before": self.before,
            "dirty_bytes_after": self.after,
            **(problem_fields([self.problem]) if self.problem else {}),
        }


class HealVerdict(t.NamedTuple):
    """What is to become, or became, of the bitmaps of one disk."""

    request: HealRequest
    refusals: tuple[Refusal, ...] = ()  # why nothing of the disk is done
    warnings: tuple[str, ...] = ()
    items: tuple[Item, ...] = ()
    checkpoints: tuple[t.Mapping[str, t.Any], ...] = ()  # afterwards, as qcow2_info tells them
    chain: tuple[str, ...] = ()  # paths of its images, topmost first
    written: tuple[int, ...] = ()  # places of those that are to be written
    vaults: tuple[str, ...] = ()  # paths of those that killed runs have left
    need: Need | None = None

    @property
    def state(self) -> str:
        """The word for it while it is worked on: a bitmap that cannot be healed keeps no other from it."""
        states = {item.state for item in self.items}
        whole = VALID if self.request.state == VALID else ABSENT
        return FAILED if self.refusals else next((one for one in (REMOVED, REBUILT) if one in states), whole)

    @property
    def result_state(self) -> str:
        """The word for it in the end."""
        return FAILED if any(item.state == FAILED for item in self.items) else self.state

    @property
    def problems(self) -> tuple[Refusal, ...]:
        """Why the disk, or a bitmap of it, failed."""
        return (*self.refusals, *(item.problem for item in self.items if item.problem))

    @property
    def changed(self) -> bool:
        """Whether something is to be done, or was done."""
        return not self.refusals and bool(self.written or self.vaults)

    def failed(self, *problems: Refusal) -> HealVerdict:
        """Return this verdict as a failure, with these problems beside those that it has."""
        return HealVerdict(self.request, (*self.refusals, *problems), self.warnings, chain=self.chain)

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        return {
            "path": printable(self.request.path),
            "state": self.result_state,
            "bitmaps": [item.as_result() for item in self.items],
            "checkpoints": list(self.checkpoints),
            **problem_fields(self.problems),
        }

    def as_diff(self) -> tuple[t.Any, t.Any]:
        """Return what a diff shows: the bytes that each bitmap which is written marks, before and after."""
        changed = [(f"{item.name} in {item.image}", item) for item in self.items if item.state in (REBUILT, REMOVED)]
        before = {printable(key): {"dirty_bytes": item.before} for key, item in changed}
        after = {printable(key): {"dirty_bytes": item.after} for key, item in changed if item.state == REBUILT}
        return before, after


def decide(request: HealRequest, chain: t.Sequence[Standing]) -> Plan:
    """Return what is to be done with the bitmaps of a chain, topmost image first.

    An image to be written can be barred all the same: what a killed run has begun cannot be left as it is, and what the
    topmost one would have to take in may be there already.
    """
    barred = _barred(chain)
    while True:
        plan = _Draft(request, chain, barred).plan()
        unsafe = {place: why for place, why in _unsafe(plan, chain, request).items() if place not in barred}
        if not unsafe:
            return plan
        barred.update(unsafe)


def _barred(chain: t.Sequence[Standing]) -> dict[int, Refusal]:
    """Return why an image must not be written, by its place."""
    if chain[0].fault is not None:  # it must be written before any other
        return dict.fromkeys(range(len(chain)), chain[0].fault)
    barred = {place: image.fault for place, image in enumerate(chain) if image.fault is not None}
    shared = next((place for place, image in enumerate(chain) if image.others), len(chain))
    for place in range(shared, len(chain)):  # what is on top of one is on top of all below it
        barred[place] = _has_overlay(chain[place].path, chain[shared].others[0])
    return barred


def _has_overlay(path: str, other: str) -> Refusal:
    why = f"is below {other} too, whose backups would be judged by other bitmaps"
    remedy = f"Give the topmost image of the disk; a template stays as it is. {IS_NO_DISK}"
    return Refusal("has_overlay", path, why, remedy)


def names_asked(request: HealRequest, chain: t.Sequence[Standing]) -> list[str]:
    """Return the bitmaps that are asked for. By default those of a template are left alone where they would go."""
    if request.names is not None:
        return list(dict.fromkeys(request.names))
    shared = next((place for place, image in enumerate(chain) if image.others), len(chain))
    looked_at = chain if request.state == VALID else chain[:shared]
    return sorted({name for one in looked_at for name in one.bitmaps if not name.startswith(MARK)})


class _Draft:
    """A plan in the making, for which no more images have to be barred."""

    def __init__(self, request: HealRequest, chain: t.Sequence[Standing], barred: t.Mapping[int, Refusal]) -> None:
        self._request = request
        self._chain = chain
        self._barred = barred
        self._wants = [_as_it_is(image) for image in chain]
        self._written = {place for place, image in enumerate(chain) if image.is_broken_off}
        self._created = dict(request.created)

    def plan(self) -> Plan:
        """Return the plan."""
        asked = names_asked(self._request, self._chain)
        act = self._heal if self._request.state == VALID else self._remove
        found = [one for name in self._request.removed for one in self._remove(name)]
        found += [one for name in asked for one in act(name)]
        self._take_in(asked)
        checkpoints = judge_all(_layers(self._chain, self._wants, self._written), complete=True, created=self._created)
        checkpoints.sort(key=lambda one: one.name)  # the order in an image changes when it is written
        wants = dict(enumerate(self._wants))
        return Plan(wants, tuple(sorted(self._written)), tuple(found), tuple(checkpoints), self._barred)

    def _heal(self, name: str) -> list[Found]:
        """Add what makes a bitmap valid; return what was found of it."""
        chain, layers = self._chain, _layers(self._chain, self._wants, ())
        doubt = next((image.doubtful[name] for image in chain if name in image.doubtful), None)
        if doubt is None and judge(name, layers, created=self._created.get(name)).valid:
            return [Found(name, chain[0].path)]
        problem = doubt or _why_not(name, self._request, layers)
        if problem is not None:
            return [Found(name, None if problem.code == "no_checkpoint" else problem.subject, problem)]
        lowest = max(place for place, image in enumerate(chain) if name in image.bitmaps)
        bad = [place for place in range(lowest) if not _records(chain[place], name)]
        rebuilt = range(max(bad, default=0) + 1)  # the topmost one has the lowest bitmap itself where none is bad
        blocked = next((self._barred[place] for place in rebuilt if place in self._barred), None)
        if blocked is not None:
            return [Found(name, blocked.subject, blocked)]
        begun = chain[min(len(rebuilt), lowest)].bitmaps[name]
        for place in rebuilt:
            bitmap = begun._replace(recording=True, inconsistent=False)
            self._wants[place][name] = Want(bitmap, own=_records(chain[place], name), held=True)
            self._written.add(place)
        return [Found(name, chain[place].path) for place in rebuilt]

    def _remove(self, name: str) -> list[Found]:
        """Take a bitmap away from the top downwards: while any image has it, the topmost one does not."""
        found = []
        problem = None
        for place, image in enumerate(self._chain):
            if name not in image.bitmaps:
                continue
            problem = problem or self._barred.get(place)
            is_template = problem is not None and problem.code == "has_overlay" and place > 0
            if is_template and (self._request.names is None or name in self._request.removed):
                break  # what a template has is meant only by its name
            if problem is None:
                del self._wants[place][name]
                self._written.add(place)
            found.append(Found(name, image.path, problem))
        return found or [Found(name, None)]

    def _take_in(self, asked: t.Sequence[str]) -> None:
        """Have the topmost image's bitmaps take in the bits below, where they are in danger or where that is asked."""
        chain, wants = self._chain, self._wants
        judged = judge_all(_layers(chain, wants, ()), complete=True, created=self._created)
        right = {one.name for one in judged if one.valid}
        lower = [place for place in self._written if place > 0]
        in_danger = {name for place in lower for name in (*chain[place].bitmaps, *wants[place])}
        is_cumulative = self._request.cumulative and self._request.state == VALID
        for name in sorted(right & (in_danger | set(asked if is_cumulative else ()))):
            below = tuple(place for place in range(1, len(chain)) if name in wants[place])
            if below:
                wants[0][name] = wants[0][name]._replace(below=below)
                self._written.add(0)


def _as_it_is(image: Standing) -> dict[str, Want]:
    return {name: Want(bitmap, held=name in image.put_back) for name, bitmap in image.bitmaps.items()}


def _records(image: Standing, name: str) -> bool:
    return name in image.bitmaps and carries_over(image.bitmaps[name])


def _layers(
    chain: t.Sequence[Standing], wants: t.Sequence[t.Mapping[str, Want]], written: t.Collection[int]
) -> list[LayerBitmaps]:
    """Return what the rules about checkpoints need of a chain that has what is wanted."""
    return [
        image.layer._replace(
            bitmaps={name: want.bitmap for name, want in wants[place].items()},
            lost_bitmaps=0 if place in written else image.lost_bitmaps,
        )
        for place, image in enumerate(chain)
    ]


_WHY = {
    INCONSISTENT: "its bitmap {} is inconsistent, and no image below has it, so nobody knows what changed since",
    NOT_RECORDING: "its bitmap {} is disabled, so somebody has ended its recording on purpose",
    DIFFERENT_SIZE: "has another virtual size than the image below it with the bitmap {}; QEMU merges no such bitmaps",
    OLDER: "was last written to before the checkpoint of the bitmap {} was made, so its own is another one's. That of "
    "the checkpoint is gone, with what was in its image",
    LOST: "may lack {}, or what that goes on with: a program that does not know bitmaps has written to it, QEMU could "
    "not store them, or somebody has put it there, or copied another image into it, without them",
    EMPTIED: "its bitmap {} is inconsistent, and no image below has it. It can be rebuilt from what the image holds, "
    "unless the bitmap is older than the image, or the image was emptied since, neither of which can be seen",
}


def _why_not(name: str, request: HealRequest, layers: t.Sequence[LayerBitmaps]) -> Refusal | None:
    """Return why a bitmap that is not valid cannot be made so rightly; None if it can."""
    if all(name not in layer.bitmaps for layer in layers):
        why = f"no image of its chain has the bitmap {name!r}"
        return Refusal("no_checkpoint", layers[0].path, why, "Make a full backup with it.")
    found = why_not_provable(name, layers, dict(request.created).get(name))
    if found is None or (found[0] == EMPTIED and request.assume_not_emptied):
        return None
    why = _WHY[found[0]].format(repr(name))
    if found[0] != EMPTIED:
        return Refusal("not_healable", found[1].path, why, _FULL)
    remedy = (
        "If the checkpoint was made on this image, and nobody has run 'qemu-img commit' without -d on it since, use "
        "assume_not_emptied=true. (On an older one: the images below have lost its bitmap, as by 'qemu-img convert', "
        "and what it marked there is told nowhere.)"
    )
    return Refusal("may_be_emptied", found[1].path, why, f"{remedy} Else: {_FULL}")


def in_doubt(path: str, vault_path: str, name: str) -> Refusal:
    """Return why a bitmap that an image has lost is not put back from its vault without the user's word."""
    why = (
        f"has lost its bitmap {name!r} since a run was killed. The vault {vault_path} has it, but the image does not "
        "hold all any more that it held then, or nothing tells that it does"
    )
    remedy = (
        "If nobody has run 'qemu-img commit' without -d or 'qemu-img rebase' on it since, use "
        f"assume_not_emptied=true. Else: {_FULL}"
    )
    return Refusal("may_be_emptied", path, why, remedy)


def _unsafe(plan: Plan, chain: t.Sequence[Standing], request: HealRequest) -> dict[int, Refusal]:
    """Return the images whose bitmaps, if they were lost, would make the chain look valid for one that is not."""
    created = dict(request.created)
    right = {one.name for one in plan.checkpoints if one.valid}
    now, then = [_as_it_is(image) for image in chain], [plan.wants[place] for place in range(len(chain))]
    unsafe = {}
    for place in (place for place in plan.written if place > 0):
        wrong = _valid(_layers(chain, [*then[:place], {}, *now[place + 1 :]], ()), created) - right
        if wrong:
            # One that goes by this call would come back by a call for the other one alone.
            as_it_is = _valid(_layers(chain, now, ()), created)
            wrong_now = _valid(_layers(chain, [*now[:place], {}, *now[place + 1 :]], ()), created) - as_it_is
            why = (
                "cannot be written safely: if QEMU were killed while it opens it, the bitmap "
                f"{min(wrong)!r} would look valid, and is not"
            )
            remedy = f"Heal or remove {_first(wrong | wrong_now)}."
            unsafe[place] = Refusal("closes_gap", chain[place].path, why, remedy)
    return {**unsafe, **_hiding(plan, chain, request)}


def _valid(layers: t.Sequence[LayerBitmaps], created: t.Mapping[str, int]) -> set[str]:
    return {one.name for one in judge_all(layers, complete=True, created=created) if one.valid}


def _first(names: t.Collection[str]) -> str:
    """Return for a remedy which bitmaps have to be seen to first: each of them can be in the way of the others."""
    return ", ".join(map(repr, sorted(names))) + (" first" if len(names) == 1 else ", all in one call")


def _hiding(plan: Plan, chain: t.Sequence[Standing], request: HealRequest) -> dict[int, Refusal]:
    """Return the images that tell why a bitmap can never be valid, and would not any more once they are written.

    That they have lost their own bitmaps is told by their header, which QEMU writes anew, and that theirs are older
    ones by the time of the last write. It does not count what else is wrong with the bitmap: that may be healed later.
    """
    created, layers = dict(request.created), [image.layer for image in chain]
    stays = {name for wants in plan.wants.values() for name in wants}
    tellers = _tellers(chain, created)
    # As long as one of them is not written, it goes on telling.
    hidden = [name for name, places in tellers.items() if name in stays and places <= set(plan.written)]
    unsafe = {}
    for place in plan.written:
        told = [name for name in hidden if place in tellers[name]]
        if told:
            names = ", ".join(map(repr, told))
            why = f"is older than the checkpoint of {names}"
            if layers[place].may_have_lost(told[0], created.get(told[0])):
                # What its vault has is put back; of what else it has lost the vault tells nothing.
                why = f"has lost its bitmaps, perhaps {names}, too"
            why = f"{why}, which nothing would tell any more"
            those = _first([name for name, places in tellers.items() if place in places])
            unsafe[place] = Refusal("closes_gap", chain[place].path, why, f"Remove {those}, and make a full backup.")
    return unsafe


def _tellers(chain: t.Sequence[Standing], created: t.Mapping[str, int]) -> dict[str, set[int]]:
    """Return the places of the images that tell that a bitmap can never be valid, by its name.

    Of one that is valid none does: an older one of its name further down only adds bits, and all that it is to tell
    the images above hold, or mark.
    """
    layers = [image.layer for image in chain]
    doubtful = {name for image in chain for name in image.doubtful}
    names = {name for layer in layers for name in layer.bitmaps if not name.startswith(MARK)}
    return {
        name: {place for place in range(len(layers)) if _tells(place, name, layers, created.get(name))}
        for name in sorted(names - (_valid(layers, created) - doubtful))
    }


def _tells(place: int, name: str, layers: t.Sequence[LayerBitmaps], created: int | None) -> bool:
    """Whether an image tells that a bitmap can never be valid."""
    lowest = max(number for number, layer in enumerate(layers) if name in layer.bitmaps)
    if place <= lowest:  # one further down tells it, too, but not of a bitmap that the images above have in order
        return layers[place].is_older_than(created)
    # That it lacks what an overlay goes on with the overlay tells, also afterwards.
    is_told = why_not_provable(name, layers, created) == (LOST, layers[place])
    return is_told and layers[place].may_have_lost(name, created)
