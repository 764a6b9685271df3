# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: which snapshots of a domain are old enough to be merged down, and which of these go in one step.

Pure. The time of a snapshot is when the image below it was last written to: until then the guest wrote there. A merge
writes to that image too, so the snapshot above it counts from the merge; it is merged later then, never sooner.
"""

from __future__ import annotations

import re
import typing as t

from .._base.errors import Refusal, printable

_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}  # seconds
_AGE = re.compile(r"([1-9][0-9]{0,5})([hdw])")


class Retention(t.NamedTuple):
    """Which snapshots are to stay."""

    older_than: int | None  # seconds; only what is older goes
    keep: int  # so many of the newest ones stay, however old they are
    now: float  # seconds since 1970


class OwnImage(t.NamedTuple):
    """An image of a disk that is a snapshot of ours."""

    target: str
    snapshot: str
    place: int  # in the chain, counted from the base
    modified: int | None  # seconds since 1970, of the last write to the image below before; None if it cannot be told
    size: int  # bytes on its file system


class Picked(t.NamedTuple):
    """A snapshot that is to be merged down."""

    snapshot: str
    modified: int | None
    size: int  # of its images together

    def as_result(self) -> dict[str, t.Any]:
        """Return it in the form in which the module returns it."""
        return {"snapshot": printable(self.snapshot), "modified": self.modified, "size": self.size}


class Step(t.NamedTuple):
    """Snapshots that lie directly on each other on the same disks, so that they are merged down together."""

    highest: str
    lowest: str


NO_STEP = Step("", "")  # no snapshot has an empty name


def seconds_of(text: str) -> int:
    """Return the seconds that an age such as 30d has; Refusal for what is none."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        why = "must be a number with h, d or w for hours, days or weeks, such as 30d"
        raise Refusal("bad_option", f"older_than={text}", why)
    return int(found[1]) * _UNITS[found[2]]


def pick(images: t.Sequence[OwnImage], begun: t.Collection[str], retention: Retention) -> list[Picked]:
    """Return the snapshots of a domain that are to be merged down, the oldest first.

    `begun` are the names of those of which a merge was killed, which is to be completed whatever else holds.
    """
    order = _in_order(images)
    staying = [name for name in order if name not in begun]
    kept = staying[-retention.keep :] if retention.keep else []
    picked = [Picked(name, None, 0) for name in begun if name not in order]  # retired on every disk, but for a rest
    for name in order:
        own = [one for one in images if one.snapshot == name]
        times = [one.modified for one in own]
        # The newest of its disks counts, and what cannot be told is not old.
        modified = None if None in times else max(time for time in times if time is not None)
        if name in begun or (name not in kept and _is_old(modified, retention)):
            picked.append(Picked(name, modified, sum(one.size for one in own)))
    return picked


def _is_old(modified: int | None, retention: Retention) -> bool:
    if retention.older_than is None:
        return True
    return modified is not None and retention.now - modified > retention.older_than


def _in_order(images: t.Sequence[OwnImage]) -> list[str]:
    """Return the names of the snapshots, the oldest first: on each disk the lower one is the older one."""
    chains: dict[str, list[str]] = {}
    for one in sorted(images, key=lambda image: image.place):
        chains.setdefault(one.target, []).append(one.snapshot)
    order: list[str] = []
    while left := [[name for name in chain if name not in order] for chain in chains.values()]:
        lowest = [chain[0] for chain in left if chain]
        if not lowest:
            break
        # If the disks contradict each other, as after a disk was moved, the first one decides.
        is_above = {name for chain in left for name in chain[1:]}
        order.append(next((name for name in lowest if name not in is_above), lowest[0]))
    return order


def steps(
    picked: t.Sequence[Picked], images: t.Sequence[OwnImage], begun: t.Sequence[t.Sequence[str]] = (), *, joins: bool
) -> list[Step]:
    """Return how they are merged down, the lowest first; with `joins` as many at once as lie on each other.

    `begun` has for each merge that a killed run has begun its snapshots, the lowest first. These go first, and just
    these together: the vault of such a merge is of its own topmost image, and lets no other one pass.
    """
    if not joins:
        return [Step(one.snapshot, one.snapshot) for one in picked]
    places = {(one.target, one.snapshot): one.place for one in images}
    ends = _ends(begun)
    known = {name for names in begun for name in names}
    found: list[Step] = []
    for one in picked:
        if one.snapshot in known:
            continue
        if found and _lies_on(one.snapshot, found[-1].highest, places):
            found[-1] = found[-1]._replace(highest=one.snapshot)
        else:
            found.append(Step(one.snapshot, one.snapshot))
    return [*ends, *found]


def _ends(begun: t.Sequence[t.Sequence[str]]) -> list[Step]:
    """Return the steps of merges that were begun, each once: a disk that is done no longer has all of its snapshots."""
    longest: dict[str, t.Sequence[str]] = {}
    for names in begun:
        longest[names[-1]] = max(longest.get(names[-1], ()), names, key=len)
    return [Step(highest, names[0]) for highest, names in longest.items()]


def _lies_on(upper: str, lower: str, places: t.Mapping[tuple[str, str], int]) -> bool:
    above = {target: place - 1 for (target, name), place in places.items() if name == upper}
    return bool(above) and above == {target: place for (target, name), place in places.items() if name == lower}
