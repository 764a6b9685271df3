# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report of a host, from what the modules returned there. Pure, on the controller."""

from __future__ import annotations

import collections
import typing as t

from ...module_utils._base.errors import Code
from ...module_utils._disk.verdict import ABSENT, AFTER, COMMITTED, CREATED, FAILED, PRESENT, REVERTED, SKIPPED
from .patterns import matches
from .rows import Found, Problem, ReportCode, Result, from_disks, from_domains, problem, reason

OK = "ok"
UNREACHABLE = "unreachable"


class Pass(t.NamedTuple):
    """The results of one module on one host; None for a step that was not taken."""

    preflight: Result | None = None  # in check mode, before anything was made
    run: Result | None = None
    again: Result | None = None  # in check mode once more, after the run

    @property
    def is_lost(self) -> bool:
        """Whether there was a run, and it told nothing of what it made."""
        return self.run is not None and _has_no_items(self.run)


def pass_of(
    before: Result | None = None, run: Result | None = None, after: Result | None = None, *, check_mode: bool
) -> Pass:
    """Return the results of one module, of which a run with the option verify has several in one."""
    if run is None:
        return Pass(before)
    if "preflight" not in run:
        is_refused = before is None and after is None and _has_no_items(run) and "code" in run
        return Pass(run) if is_refused else Pass(before, run, after)
    return Pass(run) if check_mode else Pass(run["preflight"], run, after or run["again"])


def _has_no_items(result: Result) -> bool:
    return "overlays" not in result and "domains" not in result


class Steps(t.NamedTuple):
    """Everything that was done on one host."""

    disks: Pass = Pass()
    domains: Pass = Pass()
    chains: Result | None = None  # of qcow2_info, about the overlays that carry bitmaps
    waiting_for: t.Sequence[str] = ()  # packages that check mode did not install; without them it can predict nothing
    all_or_none: bool = False  # whether the host was left as it is if anything of it was refused
    problem: str = ""  # what ended the steps before their end, if anything did
    patterns: t.Sequence[str] = ()  # of names of domains, among those that were asked for
    wanted: str = PRESENT  # the state that was asked for

    @property
    def examined(self) -> Result | None:
        """Return what the chains tell, wherever they were examined; None if they were not."""
        if self.chains is not None:
            return self.chains
        told = [one.run or one.preflight or {} for one in (self.disks, self.domains)]
        if not any("chains" in one for one in told):
            return None
        return {"disks": [disk for one in told for disk in one.get("chains", ())]}


class _Excuse(t.NamedTuple):
    """Why what could have been made was not."""

    code: ReportCode | Code
    words: str


_HELD_BACK = _Excuse(
    "held_back", "is not made, because something else of this host was refused, and overlay_all_or_none is set."
)
_NOT_BEGUN = _Excuse("not_begun", "is left as it is, because the run did not begin. Run this again.")
_LOST = problem(
    "module_failed",
    "The run did not tell what it made. What is told here was found afterwards, if anything was. Run this again.",
)


def host_report(steps: Steps, check_mode: bool) -> dict[str, t.Any]:
    """Return the report of one host."""
    passes = [(steps.disks, from_disks), (steps.domains, from_domains)]
    why_not = _HELD_BACK if steps.all_or_none else _NOT_BEGUN
    found = [_what_became_of(one, read, check_mode, why_not) for one, read in passes]
    if check_mode and steps.all_or_none and any(one.problems for one in found):
        found = [one._replace(overlays=[_not_made(overlay, _HELD_BACK) for overlay in one.overlays]) for one in found]
    overlays = [overlay for one in found for overlay in one.overlays]
    chains = _Chains(overlays, steps.examined)
    lost = [reason(one) for one in (*steps.disks, *steps.domains, steps.chains) if one and one.get("unreachable")]
    problems = [
        *([problem("task_failed", steps.problem)] if steps.problem else []),
        *(one for some in found for one in some.problems),
        *_unstable(steps.disks, "overlays"),
        *_unstable(steps.domains, "domains"),
        *chains.problems,
        *_broken_checkpoints(found[1], chains.unusable),
    ]
    report = {
        "state": UNREACHABLE if lost else FAILED if problems else OK,
        "check_mode": check_mode,
        "wanted": steps.wanted,
        "overlays": overlays,
        "skipped_disks": [disk for one in found for disk in one.skipped_disks],
        "picked_snapshots": [one for some in found for one in some.picked_snapshots],
        "lost_checkpoints": [one for some in found for one in some.lost_checkpoints],
        "examined": list(dict.fromkeys(overlay["examine"] for overlay in overlays if overlay["bitmaps"])),
        "unverified": chains.unverified,
        "waiting_for": list(steps.waiting_for),
        "patterns": matches(steps.patterns, steps.domains),
        "warnings": list(dict.fromkeys(_warnings([*steps.disks, *steps.domains]))),
        "problems": [one._asdict() for one in dict.fromkeys([*lost, *problems])],
    }
    return {**report, **counts([report])}


def _what_became_of(
    one: Pass, read: t.Callable[[Result | None, bool], Found], check_mode: bool, why_not: _Excuse
) -> Found:
    """Prefer what the run itself reported; else use a look, and mark as failed what it would have created."""
    if check_mode:
        return read(one.preflight or one.run, True)  # a module that ended without a result has foreseen nothing
    if one.run is None:
        found = read(one.preflight, False)
        return found._replace(overlays=[_not_made(overlay, why_not) for overlay in found.overlays])
    if not one.is_lost:
        return read(one.run, False)
    afterwards = read(one.again, False)
    overlays = [_not_made(overlay, why_not) for overlay in afterwards.overlays]
    if one.run.get("unreachable") and one.preflight is None:  # most likely it was never reached
        return afterwards._replace(overlays=overlays, problems=[reason(one.run)])
    return afterwards._replace(overlays=overlays, problems=[reason(one.run), _LOST, *afterwards.problems])


def _not_made(overlay: Result, why: _Excuse) -> Result:
    """Return what the report says of an overlay that could have been made, but was not."""
    if overlay["state"] not in AFTER:
        return overlay
    return {**overlay, "state": FAILED, "bitmaps": [], "msg": f"{overlay['path']}: {why.words}", "code": why.code}


def _warnings(results: t.Sequence[Result | None]) -> t.Iterator[str]:
    """Yield the warnings of the modules as texts."""
    for result in results:
        yield from map(str, (result or {}).get("warnings") or ())


def _unstable(one: Pass, key: str) -> t.Iterator[Problem]:
    """Yield what the idempotence check found: after the run, the same call must find everything done."""
    if one.run is None or one.is_lost or one.again is None:
        return
    if key not in one.again:
        yield problem("unstable", f"The idempotence check could not be made: {reason(one.again).msg}")
        return
    after = {_name(item): item for item in one.again[key]}
    for item in one.run[key]:
        name = _name(item)
        now = after.get(name, {"state": FAILED, "msg": "it is not there any more."})
        if now["state"] != AFTER.get(item["state"], item["state"]) and item["state"] != FAILED:
            found = now.get("msg") or "a second run would do it once more."
            yield problem("unstable", f"{name}: is {item['state']}, but the idempotence check finds otherwise: {found}")


def _name(item: Result) -> str:
    """Return the name of a domain, or the path of an overlay."""
    return t.cast("str", item["name"] if "name" in item else item["path"])


class _Chains:
    """Which bitmaps go on recording in vain, as no backup can use them, and of which that cannot be told."""

    def __init__(self, overlays: t.Sequence[Result], chains: Result | None) -> None:
        self.problems: list[Problem] = []
        self.unusable: set[str] = set()  # names of checkpoints
        self.unverified: list[dict[str, str]] = []
        carrying = [(one["examine"], name) for one in overlays for name in one["bitmaps"]]
        if not carrying or chains is None:
            return
        if "disks" not in chains:
            words = f"The chains could not be examined: {reason(chains).msg}"
            self.problems.append(Problem(reason(chains).code, words))
            return
        disks = {disk["path"]: disk for disk in chains["disks"]}
        for path, name in dict.fromkeys(carrying):
            self._judge(path, name, disks.get(path, {"checkpoints": [], "msg": "was not examined."}))

    def _judge(self, path: str, name: str, disk: Result) -> None:
        """Add what the chain of a disk says of a checkpoint."""
        verdicts = {checkpoint["name"]: checkpoint for checkpoint in disk["checkpoints"]}
        verdict = verdicts.get(name, {"valid": False, "advice": disk.get("msg", "is not in the chain.")})
        if verdict.get("problem") == "in_use":  # a VM runs on it, so nothing can be told
            self.unverified.append({"path": path, "checkpoint": name})
        elif not verdict["valid"]:
            self.unusable.add(name)
            self.problems.append(_no_backup(path, name, verdict["advice"]))


def _no_backup(where: str, checkpoint: str, why: str) -> Problem:
    """Return that a checkpoint is carried on in vain."""
    return problem("no_backup", f"{where}: checkpoint {checkpoint} cannot be used for a backup: {why}")


def _broken_checkpoints(domains: Found, told: t.Container[str]) -> t.Iterator[Problem]:
    """Yield which checkpoints of domains are broken on one disk although they are carried on another."""
    carried = {(overlay["domain"], name) for overlay in domains.overlays for name in overlay["bitmaps"]}
    for domain, checkpoint in domains.checkpoints:
        is_carried = (domain, checkpoint["name"]) in carried
        if checkpoint["valid"] is False and is_carried and checkpoint["name"] not in told:
            yield _no_backup(domain, checkpoint["name"], f"{checkpoint['image']}: {checkpoint['advice']}")


def counts(reports: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    """Return how many overlays are in which state, and what became of the bitmaps."""
    overlays = [overlay for report in reports for overlay in report["overlays"]]
    skipped = collections.Counter(disk["reason"] for report in reports for disk in report["skipped_disks"])
    states = collections.Counter(overlay["state"] for overlay in overlays)
    reasons = collections.Counter(bitmap["reason"] for overlay in overlays for bitmap in overlay["skipped_bitmaps"])
    return {
        CREATED: states[CREATED],
        PRESENT: states[PRESENT],
        COMMITTED: states[COMMITTED],
        REVERTED: states[REVERTED],
        ABSENT: states[ABSENT],
        SKIPPED: sum(skipped.values()),
        "skipped_because": dict(sorted(skipped.items())),
        "unfit": sum(disk["unfit"] for report in reports for disk in report["skipped_disks"]),
        FAILED: states[FAILED],
        "bitmaps_carried": sum(len(overlay["bitmaps"]) for overlay in overlays),
        "bitmaps_left_behind": dict(sorted(reasons.items())),
        "bitmaps_unverified": sum(len(report["unverified"]) for report in reports),
    }
