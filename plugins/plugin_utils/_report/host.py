# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a host and of the fleet, from what the modules returned: pure, on the controller."""

from __future__ import annotations

import collections
import typing as t

from ...module_utils._disk.verdict import CREATED, FAILED, PRESENT
from ...module_utils._domain.plan import SKIPPED
from .rows import Found, Result, from_disks, from_domains, reason

OK = "ok"
UNREACHABLE = "unreachable"
NOT_RUN = "not run"


class Pass(t.NamedTuple):
    """The results of one module on one host; None for a step that was not taken."""

    preflight: Result | None = None  # in check mode, before anything was made
    run: Result | None = None
    again: Result | None = None  # in check mode once more, after the run

    @property
    def is_lost(self) -> bool:
        """Whether there was a run, and it told nothing of what it made."""
        return self.run is not None and "overlays" not in self.run and "domains" not in self.run


class Steps(t.NamedTuple):
    """Everything that was done on one host."""

    disks: Pass = Pass()
    domains: Pass = Pass()
    chains: Result | None = None  # of qcow2_info, about the overlays that carry bitmaps
    waiting_for: t.Sequence[str] = ()  # packages that check mode did not install; without them it can predict nothing
    all_or_none: bool = False  # whether the host was left as it is if anything of it was refused
    problem: str = ""  # what ended the steps before their end, if anything did


def host_report(steps: Steps, check_mode: bool) -> dict[str, t.Any]:
    """Return the report of one host."""
    passes = [(steps.disks, from_disks), (steps.domains, from_domains)]
    why_not = _HELD_BACK if steps.all_or_none else _NOT_BEGUN
    found = [_what_became_of(one, read, check_mode, why_not) for one, read in passes]
    if check_mode and steps.all_or_none and any(one.problems for one in found):
        found = [one._replace(overlays=[_not_made(overlay, _HELD_BACK) for overlay in one.overlays]) for one in found]
    overlays = [overlay for one in found for overlay in one.overlays]
    problems = [steps.problem] if steps.problem else []
    problems += [problem for one in found for problem in one.problems]
    problems += [*_unstable(steps.disks, "overlays"), *_unstable(steps.domains, "domains")]
    unusable, unverified = _unusable(overlays, steps.chains)
    problems += unusable
    problems += _broken_checkpoints(found[1], unusable)
    lost = _lost_connections([*steps.disks, *steps.domains, steps.chains])
    report = {
        "state": UNREACHABLE if lost else FAILED if problems else OK,
        "check_mode": check_mode,
        "overlays": overlays,
        "skipped_disks": [disk for one in found for disk in one.skipped_disks],
        "examined": list(dict.fromkeys(overlay["examine"] for overlay in overlays if overlay["bitmaps"])),
        "unverified": unverified,
        "waiting_for": list(steps.waiting_for),
        "warnings": list(dict.fromkeys(_warnings([*steps.disks, *steps.domains]))),
        "problems": list(dict.fromkeys([*lost, *problems])),
    }
    return {**report, **counts([report])}


_HELD_BACK = "is not made, because something else of this host was refused, and overlay_all_or_none is set."
_NOT_BEGUN = "was not made, because the run did not begin. Run this again."
_LOST = "The run did not tell what it made. What is told here was found afterwards, if anything was. Run this again."


def _what_became_of(one: Pass, read: t.Callable[[Result | None, bool], Found], check_mode: bool, why_not: str) -> Found:
    """Return what is to be told of the overlays: what the run says; else what was found, of which nothing was made."""
    if check_mode:
        return read(one.preflight, True)
    if one.run is None:
        found = read(one.preflight, False)
        return found._replace(overlays=[_not_made(overlay, why_not) for overlay in found.overlays])
    if not one.is_lost:
        return read(one.run, False)
    afterwards = read(one.again, False)
    overlays = [_not_made(overlay, why_not) for overlay in afterwards.overlays]
    return afterwards._replace(overlays=overlays, problems=[reason(one.run), _LOST, *afterwards.problems])


def _not_made(overlay: dict[str, t.Any], why: str) -> dict[str, t.Any]:
    """Return what the report says of an overlay that could have been made, but was not."""
    if overlay["state"] != CREATED:
        return overlay
    return {**overlay, "state": FAILED, "bitmaps": [], "msg": f"{overlay['path']}: {why}"}


def _lost_connections(results: t.Sequence[Result | None]) -> list[str]:
    """Return why a host could not be reached."""
    return [reason(result) for result in results if result and result.get("unreachable")]


def _warnings(results: t.Sequence[Result | None]) -> t.Iterator[str]:
    """Return the warnings of the modules; Ansible has each as a text."""
    for result in results:
        yield from map(str, (result or {}).get("warnings") or ())


def _unstable(one: Pass, key: str) -> list[str]:
    """Return what the idempotence check found: after the run, the same call must find everything done."""
    if one.run is None or one.is_lost or one.again is None:
        return []
    if key not in one.again:
        return [f"The idempotence check could not be made: {reason(one.again)}"]
    after = {_name(item): item for item in one.again[key]}
    problems = []
    for item in one.run[key]:
        name = _name(item)
        now = after.get(name, {"state": FAILED, "msg": "it is not there any more."})
        if item["state"] in (CREATED, PRESENT) and now["state"] != PRESENT:
            found = now.get("msg") or "a second run would make it once more."
            problems.append(f"{name}: is {item['state']}, but the idempotence check finds otherwise: {found}")
    return problems


def _name(item: Result) -> str:
    """Return the name of a domain, or the path of an overlay."""
    return t.cast("str", item.get("name") or item["path"])


def _unusable(overlays: t.Sequence[Result], chains: Result | None) -> tuple[list[str], list[dict[str, str]]]:
    """Return which bitmaps go on recording in vain, as no backup can use them, and of which that cannot be told."""
    carrying = [overlay for overlay in overlays if overlay["bitmaps"]]
    if not carrying or chains is None:
        return [], []
    if "disks" not in chains:
        return [f"The chains could not be examined: {reason(chains)}"], []
    disks = {disk["path"]: disk for disk in chains["disks"]}
    problems, unverified = [], []
    for path, name in dict.fromkeys((overlay["examine"], name) for overlay in carrying for name in overlay["bitmaps"]):
        disk = disks.get(path, {"checkpoints": [], "msg": "was not examined."})
        verdicts = {checkpoint["name"]: checkpoint for checkpoint in disk["checkpoints"]}
        verdict = verdicts.get(name, {"valid": False, "advice": disk.get("msg", "is not in the chain.")})
        if verdict.get("problem") == "in_use":  # a VM runs on it, so nothing can be told
            unverified.append({"path": path, "checkpoint": name})
        elif not verdict["valid"]:
            problems.append(f"{path}: checkpoint {name} {_NO_BACKUP}: {verdict['advice']}")
    return problems, unverified


_NO_BACKUP = "cannot be used for a backup"


def _broken_checkpoints(domains: Found, unusable: t.Sequence[str]) -> list[str]:
    """Return which checkpoints of domains are broken on one disk although they are carried on another."""
    problems = []
    for domain, checkpoint in domains.checkpoints:
        own = [overlay for overlay in domains.overlays if overlay["domain"] == domain]
        is_carried = any(checkpoint["name"] in overlay["bitmaps"] for overlay in own)
        is_told = any(f"checkpoint {checkpoint['name']} {_NO_BACKUP}" in problem for problem in unusable)
        if checkpoint["valid"] is False and is_carried and not is_told:
            where = f"{checkpoint['image']}: {checkpoint['advice']}"
            problems.append(f"{domain}: checkpoint {checkpoint['name']} {_NO_BACKUP}: {where}")
    return problems


def counts(reports: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    """Return how many overlays are in which state, and what became of the bitmaps."""
    overlays = [overlay for report in reports for overlay in report["overlays"]]
    skipped = collections.Counter(disk["reason"] for report in reports for disk in report["skipped_disks"])
    states = collections.Counter(overlay["state"] for overlay in overlays)
    reasons = collections.Counter(bitmap["reason"] for overlay in overlays for bitmap in overlay["skipped_bitmaps"])
    return {
        CREATED: states[CREATED],
        PRESENT: states[PRESENT],
        SKIPPED: sum(skipped.values()),
        "skipped_because": dict(sorted(skipped.items())),
        FAILED: states[FAILED],
        "bitmaps_carried": sum(len(overlay["bitmaps"]) for overlay in overlays),
        "bitmaps_left_behind": dict(sorted(reasons.items())),
        "bitmaps_unverified": sum(len(report["unverified"]) for report in reports),
    }
