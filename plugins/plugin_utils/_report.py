# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a host and of the fleet, from what the modules returned: pure, on the controller."""

from __future__ import annotations

import collections
import typing as t

Result = t.Mapping[str, t.Any]  # what a module returned, or what Ansible says in its place

CREATED = "created"
PRESENT = "present"
SKIPPED = "skipped"
OK = "ok"
FAILED = "failed"
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


class Found(t.NamedTuple):
    """What the results of one module tell."""

    overlays: list[dict[str, t.Any]]
    skipped_disks: list[dict[str, t.Any]]
    problems: list[str]
    checkpoints: list[tuple[str, dict[str, t.Any]]]  # those of libvirt, with the name of the domain


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
    passes = [(steps.disks, _from_disks), (steps.domains, _from_domains)]
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
    return {**report, **_counts([report])}


def fleet_report(reports: t.Mapping[str, t.Mapping[str, t.Any] | None], check_mode: bool) -> dict[str, t.Any]:
    """Return the report of the fleet, from the report of each host, which is None if its turn never came."""
    nothing = host_report(Steps(problem="Its turn never came, because too many hosts before it failed."), check_mode)
    not_run = {**nothing, "state": NOT_RUN}
    hosts = {host: report or not_run for host, report in reports.items()}
    states = collections.Counter(report["state"] for report in hosts.values())
    known = {state: states[state] for state in (OK, FAILED, UNREACHABLE, NOT_RUN)}
    return {"check_mode": check_mode, "states": known, **_counts(list(hosts.values())), "hosts": hosts}


def summary_of_host(report: t.Mapping[str, t.Any]) -> str:
    """Return the line of a host."""
    if report["waiting_for"]:
        return f"would install {', '.join(report['waiting_for'])}; what comes then cannot be predicted"
    return _summary_of_counts(report)


def _summary_of_counts(report: t.Mapping[str, t.Any]) -> str:
    """Return the counts of a host, or of the fleet, in words."""
    counts = (
        f"{report[CREATED]} created, {report[PRESENT]} present, {report[SKIPPED]} skipped"
        f"{_reasons(report['skipped_because'])}, {report[FAILED]} failed"
    )
    left_behind = sum(report["bitmaps_left_behind"].values())
    bitmaps = f"bitmaps: {report['bitmaps_carried']} carried, {left_behind} left behind"
    running = f", {report['bitmaps_unverified']} not verified, as a VM runs" if report["bitmaps_unverified"] else ""
    return f"{counts}; {bitmaps}{_reasons(report['bitmaps_left_behind'])}{running}"


def _reasons(counts: t.Mapping[str, int]) -> str:
    """Return how many of something there are for which reason, as an addition to a text."""
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())})" if counts else ""


def summary_of_fleet(report: t.Mapping[str, t.Any]) -> list[str]:
    """Return the lines that a person reads at the end: one for each host, its problems below, and the sum."""
    width = max((len(host) for host in report["hosts"]), default=0)
    lines = []
    for host, one in report["hosts"].items():
        state = one["state"] if one["state"] == OK else one["state"].upper()
        texts = [" ".join(problem.splitlines()) for problem in one["problems"]]
        told = texts if _is_unknown(one) else [summary_of_host(one), *(f"- {text}" for text in texts)]
        lines.append(f"{host:{width}}  {state:11}  {told[0]}")
        lines.extend(f"{'':{width}}  {text}" for text in told[1:])
    states = ", ".join(f"{count} {state}" for state, count in report["states"].items())
    planned = "Check mode, nothing was changed. " if report["check_mode"] else ""
    return [*lines, f"{planned}{len(report['hosts'])} hosts: {states}. {_summary_of_counts(report)}"]


def _is_unknown(report: t.Mapping[str, t.Any]) -> bool:
    """Whether there is nothing to tell of a host but why that is so."""
    return report["state"] in (UNREACHABLE, NOT_RUN) and not report["overlays"]


def _from_disks(result: Result | None, check_mode: bool) -> Found:
    """Return what qcow2_overlay tells."""
    if result is None or "overlays" not in result:
        return _found_nothing(result)
    overlays = [_overlay(overlay, None, check_mode) for overlay in result["overlays"]]
    return Found(overlays, [], [overlay["msg"] for overlay in overlays if "msg" in overlay], [])


def _from_domains(result: Result | None, check_mode: bool) -> Found:
    """Return what domain_overlay tells."""
    if result is None or "domains" not in result:
        return _found_nothing(result)
    domains = result["domains"]
    overlays = [_overlay(overlay, domain, check_mode) for domain in domains for overlay in domain["overlays"]]
    failed = [domain for domain in domains if domain["state"] == FAILED and not domain["overlays"]]
    overlays += [_overlay(None, domain, check_mode) for domain in failed]
    skipped = [{"domain": domain["name"], **disk} for domain in domains for disk in domain["skipped_disks"]]
    checkpoints = [(domain["name"], checkpoint) for domain in domains for checkpoint in domain["checkpoints"]]
    return Found(overlays, skipped, [domain["msg"] for domain in domains if "msg" in domain], checkpoints)


def _found_nothing(result: Result | None) -> Found:
    """Return what is told by a step that was not taken, or by one that returned nothing of use."""
    return Found([], [], [] if result is None else [_reason(result)], [])


def _overlay(overlay: Result | None, domain: Result | None, check_mode: bool) -> dict[str, t.Any]:
    """Return what the report says of one overlay, or of a domain that did not get as far as overlays."""
    source: Result = overlay or {"path": None, "backing_file": None, "bitmaps": [], "skipped_bitmaps": []}
    # What belongs to a domain that failed is not in use, whatever became of it by itself.
    is_lost = domain is not None and domain["state"] == FAILED
    state = FAILED if is_lost else source["state"]
    message = domain.get("msg") if domain is not None else source.get("msg")
    return {
        "domain": domain["name"] if domain is not None else None,
        "path": source["path"],
        "backing_file": source["backing_file"],
        # Of which the chain tells: the topmost image, which in check mode is not there yet.
        "examine": source["backing_file"] if check_mode and state == CREATED else source.get("topmost", source["path"]),
        "state": state,
        "bitmaps": [bitmap["name"] for bitmap in source["bitmaps"]] if state != FAILED else [],
        "skipped_bitmaps": [
            {"name": bitmap["name"], "reason": bitmap["reason"]} for bitmap in source["skipped_bitmaps"]
        ],
        **({"msg": message} if state == FAILED else {}),
    }


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
    return afterwards._replace(overlays=overlays, problems=[_reason(one.run), _LOST, *afterwards.problems])


def _not_made(overlay: dict[str, t.Any], why: str) -> dict[str, t.Any]:
    """Return what the report says of an overlay that could have been made, but was not."""
    if overlay["state"] != CREATED:
        return overlay
    return {**overlay, "state": FAILED, "bitmaps": [], "msg": f"{overlay['path']}: {why}"}


def _lost_connections(results: t.Sequence[Result | None]) -> list[str]:
    """Return why a host could not be reached."""
    return [_reason(result) for result in results if result and result.get("unreachable")]


def _warnings(results: t.Sequence[Result | None]) -> t.Iterator[str]:
    """Return the warnings of the modules; Ansible has each as a text."""
    for result in results:
        yield from map(str, (result or {}).get("warnings") or ())


def _unstable(one: Pass, key: str) -> list[str]:
    """Return what the idempotence check found: after the run, the same call must find everything done."""
    if one.run is None or one.is_lost or one.again is None:
        return []
    if key not in one.again:
        return [f"The idempotence check could not be made: {_reason(one.again)}"]
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
        return [f"The chains could not be examined: {_reason(chains)}"], []
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


def _counts(reports: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
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


def _reason(result: Result) -> str:
    """Return why a module returned nothing of use."""
    reason = str(result.get("msg") or "No reason was given.").strip()
    details = str(result.get("module_stderr") or "").strip().splitlines()  # such as what an old Python says
    return f"{reason} {details[-1]}" if details and details[-1] not in reason else reason
