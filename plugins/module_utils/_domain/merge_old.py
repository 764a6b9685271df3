# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Merge down the old snapshots of all domains: pick them once, then one call after the other, the lowest first.

They are picked once, since each merge writes to the image from whose last write the age of the next one counts.
"""

from __future__ import annotations

import itertools
import os
import re
import typing as t

from .._base.errors import Refusal, printable
from .._disk.session import Settings
from .._disk.verdict import COMMITTED, FAILED
from .._libvirt.connection import Domain, Libvirt
from .._qcow2.chain import Layer
from .inventory import DiskFacts, Inventory
from .plan import DomainOutcome
from .retention import OwnImage, Picked, Retention, Step, pick, steps
from .run import Aim, Call
from .wayback import WayBack, begun_merge, has_sign, signed_leftovers

_BLOCK = 512  # bytes, of st_blocks
MakeAims = t.Callable[[WayBack], t.Sequence[Aim]]


class _Old(t.NamedTuple):
    """What is to be merged down of one domain."""

    picked: tuple[Picked, ...]
    steps: tuple[Step, ...]
    foreseen: int  # how many of these steps check mode can look at


class _BegunMerge(t.NamedTuple):
    """A merge that a killed run has begun on a disk."""

    target: str
    snapshots: tuple[str, ...]  # that go in, the lowest first
    is_in_chain: bool  # or else only its end is missing


def merge_old(
    daemon: Libvirt,
    names: t.Sequence[str],
    request: WayBack,
    retention: Retention,
    make_aims: MakeAims,
    settings: Settings,
) -> tuple[list[DomainOutcome], list[str]]:
    """Merge down what is old; return what became of each domain, and warnings. `request` says the rest."""
    old = _find_old(daemon, names, request, retention)
    if settings.check_mode:
        old = {uuid: one._replace(steps=one.steps[: one.foreseen]) for uuid, one in old.items()}
    outcomes: dict[str, DomainOutcome] = {}
    warnings: list[str] = []
    # A domain without anything old is in the first round all the same, so that it is told of.
    for number in range(max([1, *(len(one.steps) for one in old.values())])):
        own = {uuid: one.steps[number] for uuid, one in old.items() if number < len(one.steps)}
        goes_on = [one.name for one in outcomes.values() if one.uuid in own and one.state != FAILED]
        if number and not goes_on:
            continue
        gone = [path for one in outcomes.values() for path in _retired(one)] if settings.check_mode else []
        aims = make_aims(request._replace(steps=own, gone=gone))
        try:
            if _is_ended(outcomes.values()):
                raise Refusal("interrupted", "", "not all is merged down, because the run was ended", "Run this again.")
            found, more = Call(daemon, goes_on if number else names, aims, settings).run()
        except Refusal as exc:
            if not number:
                raise
            # What the rounds before have done is told.
            outcomes.update((name, _cut_off(outcomes[name], exc)) for name in goes_on)
            break
        warnings += more
        for one in found:
            first = outcomes.get(one.name)
            then = _as_after(first, one) if first is not None and settings.check_mode else one
            outcomes[one.name] = then if first is None else _together(first, then)
    told = [one._replace(picked=old[one.uuid].picked) if one.uuid in old else one for one in outcomes.values()]
    return told, list(dict.fromkeys(warnings))


def _is_ended(outcomes: t.Iterable[DomainOutcome]) -> bool:
    """Return whether a signal has ended the run."""
    return any(problem.code == "interrupted" for one in outcomes for problem in one.problems)


def _cut_off(outcome: DomainOutcome, problem: Refusal) -> DomainOutcome:
    """Return what became of a domain whose next round was not made."""
    return outcome._replace(state=FAILED, problems=(problem if problem.subject else problem.about(outcome.name),))


def _as_after(first: DomainOutcome, then: DomainOutcome) -> DomainOutcome:
    """Return the prediction of a round, for which the images are still there that the first one is to merge down."""
    into = _merged(first)

    def moved(verdict: t.Any) -> t.Any:
        base = verdict.request.backing_file
        return verdict._replace(request=verdict.request._replace(backing_file=into.get(base, base)))

    before, after = then.diff
    for path, base in into.items():
        before, after = (_renamed(text, path, base) for text in (before, after))
    return then._replace(
        overlays=tuple((target, moved(verdict)) for target, verdict in then.overlays),
        tops={target: into.get(top, top) for target, top in then.tops.items()},
        diff=(before, after),
    )


def _merged(outcome: DomainOutcome) -> dict[str, str]:
    """Return what a domain's images went into, by path."""
    requests = [verdict.request for _target, verdict in outcome.overlays if verdict.state == COMMITTED]
    return {request.path: request.backing_file for request in requests}


def _retired(outcome: DomainOutcome) -> list[str]:
    """Return the paths of a domain's images that a run would have retired."""
    verdicts = [verdict for _target, verdict in outcome.overlays if verdict.state == COMMITTED]
    return [path for one in verdicts for path in (one.request.path, *(image.path for image in one.retired))]


def _renamed(diff: str, path: str, base: str) -> str:
    """Return a diff with another image in its place, which is in an element or at the end of a line."""
    return re.sub(f"{re.escape(printable(path))}(?=['\"\n])", lambda _found: printable(base), diff)


def _together(first: DomainOutcome, then: DomainOutcome) -> DomainOutcome:
    """Return what became of a domain in two rounds, of which the first one did not fail."""
    taking_part = {target for target, _verdict in (*first.overlays, *then.overlays)}
    return then._replace(
        state=first.state if then.state != FAILED and first.state == COMMITTED else then.state,
        changed=first.changed or then.changed,
        overlays=(*first.overlays, *then.overlays),
        skipped=tuple(one for one in then.skipped if one.target not in taking_part),
        diff=(first.diff[0] + then.diff[0], first.diff[1] + then.diff[1]),
    )


def _find_old(daemon: Libvirt, names: t.Sequence[str], request: WayBack, retention: Retention) -> dict[str, _Old]:
    """Return by its UUID what is to be merged down of each domain."""
    inventory = Inventory(daemon.domains())
    found, _unmatched = inventory.select(names)
    old = {}
    for domain in found:
        if isinstance(domain, Domain):
            targets = request.targets
            disks = [one for one in domain.definition.disks if targets is None or one.target in targets]
            facts = [inventory.facts(domain, disk) for disk in disks]
            images = [image for one in facts for image in _own_images(domain.uuid, one)]
            # What is left over stands on images that others are to go into, so it goes first.
            left = [name for one in facts for name in _left(domain, one, request)]
            # Unless a snapshot of the same name was made since on another disk: a merge leaves signs on all.
            new = {name for one in facts for name in _without_sign(domain.uuid, one)} if left else set()
            left = [name for name in left if name not in new]
            begun = _without_new(images, [merge for one in facts for merge in _begun(domain, one, request)])
            joined = [one.snapshots for one in begun]
            picked = pick(images, list(dict.fromkeys([*left, *itertools.chain(*joined)])), retention)
            # libvirt merges one image of a running domain at a time.
            in_steps = steps(picked, images, joined, joins=domain.state is None)
            old[domain.uuid] = _Old(tuple(picked), tuple(in_steps), _count_foreseen(in_steps, begun))
    return old


def _left(domain: Domain, facts: DiskFacts, request: WayBack) -> list[str]:
    """Return the snapshots of a disk that went in while its VM ran, and were not retired."""
    try:
        return list(signed_leftovers(domain, facts, request))
    except Refusal:  # of something in the folder that cannot be read; the merge itself will tell of it
        return []


def _own_images(uuid: str, facts: DiskFacts) -> t.Iterator[OwnImage]:
    """Yield the images of a disk that are snapshots of ours."""
    for place, (layer, below) in enumerate(zip(facts.layers, facts.layers[1:])):
        snapshot = _snapshot_of(layer, uuid, facts)
        if snapshot is not None:
            height = len(facts.layers) - 1 - place
            yield OwnImage(facts.disk.target, snapshot, height, _time_of(layer, below), _size(layer))


def _snapshot_of(layer: Layer, uuid: str, facts: DiskFacts) -> str | None:
    """Return the name of the snapshot that an image is by its mark; None if it is none of this domain."""
    mark = layer.image.mark if layer.image else None
    return mark.snapshot if mark is not None and mark.vm == uuid and layer in facts.own else None


def _without_sign(uuid: str, facts: DiskFacts) -> t.Iterator[str]:
    """Yield the snapshots that a disk is on, and of whose images no merge was begun while the VM ran."""
    for layer in facts.layers:
        snapshot = _snapshot_of(layer, uuid, facts)
        if snapshot is not None and not has_sign(layer.path):
            yield snapshot


def _begun(domain: Domain, facts: DiskFacts, request: WayBack) -> t.Iterator[_BegunMerge]:
    """Yield the merges of snapshots of a disk that a killed run has begun, the lowest first."""
    for place, base in enumerate(facts.layers):
        try:
            begun = begun_merge(domain, facts, base, request)
        except Refusal:  # of a vault that cannot be read; the merge itself will tell of it
            continue
        if begun is None or begun.mark.vm != domain.uuid:
            continue
        top = place if begun.depth is None else begun.depth
        above = [_snapshot_of(layer, domain.uuid, facts) for layer in reversed(facts.layers[top + 1 : place])]
        snapshots = (*(name for name in above if name is not None), begun.mark.snapshot)
        yield _BegunMerge(facts.disk.target, snapshots, begun.depth is not None)


def _without_new(images: t.Sequence[OwnImage], begun: t.Sequence[_BegunMerge]) -> list[_BegunMerge]:
    """Return what was begun without those ends of merges that could have a snapshot merged which was made since.

    Where only the end is missing the snapshots are in no chain, or only in those where their merge was begun, too.
    """
    going_in = {(one.target, name) for one in begun if one.is_in_chain for name in one.snapshots}
    new = {one.snapshot for one in images if (one.target, one.snapshot) not in going_in}
    return [one for one in begun if one.is_in_chain or new.isdisjoint(one.snapshots)]


def _count_foreseen(in_steps: t.Sequence[Step], begun: t.Sequence[_BegunMerge]) -> int:
    """Return how many of the steps check mode can look at.

    What comes after a merge that is to be completed stands on images that are half merged until then.
    """
    ends = {one.snapshots[-1] for one in begun if one.is_in_chain}
    last = [number for number, step in enumerate(in_steps, start=1) if step.highest in ends]
    return max(last, default=len(in_steps))


def _time_of(layer: Layer, below: Layer) -> int | None:
    """Return when the image below was last written to, in seconds since 1970, or an image was made, if that is earlier.

    To remove a checkpoint, as every backup tool does, writes to the image below. None if it cannot be told.
    """
    written, made = below.written(), layer.image.history.made if layer.image is not None else 0
    return min(written, made or written) // 10**9 or None


def _size(layer: Layer) -> int:
    """Return the bytes that an image takes on its file system."""
    try:
        return os.stat(layer.real_path).st_blocks * _BLOCK
    except OSError:
        return 0
