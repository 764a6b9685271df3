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
    def decisive(self) -> Result | None:
        """The result that says what became of the overlays."""
        return self.run or self.preflight


class Found(t.NamedTuple):
    """What the results of one module tell."""

    overlays: list[dict[str, t.Any]]
    skipped_disks: list[dict[str, t.Any]]
    problems: list[str]


class Steps(t.NamedTuple):
    """Everything that was done on one host."""

    disks: Pass = Pass()
    domains: Pass = Pass()
    chains: Result | None = None  # of qcow2_info, about the overlays that carry bitmaps
    waiting_for: t.Sequence[str] = ()  # packages that check mode did not install; without them it can predict nothing
    all_or_none: bool = False  # whether the host was left as it is if anything of it was refused


def host_report(steps: Steps, check_mode: bool) -> dict[str, t.Any]:
    """Return the report of one host."""
    disks, domains, chains = steps.disks, steps.domains, steps.chains
    found = [_from_disks(disks.decisive), _from_domains(domains.decisive)]
    overlays = [overlay for one in found for overlay in one.overlays]
    problems = [problem for one in found for problem in one.problems]
    if steps.all_or_none and problems and not (disks.run or domains.run):
        overlays = [_held_back(overlay) if overlay["state"] == CREATED else overlay for overlay in overlays]
    problems += [problem for one, key in ((disks, "overlays"), (domains, "domains")) for problem in _unstable(one, key)]
    problems += _unusable(overlays, chains, check_mode)
    lost = _lost_connections([*disks, *domains, chains], [disks.run, domains.run])
    report = {
        "state": UNREACHABLE if lost else FAILED if problems else OK,
        "check_mode": check_mode,
        "overlays": overlays,
        "skipped_disks": [disk for one in found for disk in one.skipped_disks],
        "examined": [_examined_path(overlay, check_mode) for overlay in overlays if overlay["bitmaps"]],
        "waiting_for": list(steps.waiting_for),
        "problems": list(dict.fromkeys([*lost, *problems])),
    }
    return {**report, **_counts([report])}


def failed_report(problem: str, check_mode: bool, state: str = FAILED) -> dict[str, t.Any]:
    """Return the report of a host of which nothing is known but why."""
    return {**host_report(Steps(), check_mode), "state": state, "problems": [problem]}


def fleet_report(reports: t.Mapping[str, t.Mapping[str, t.Any] | None], check_mode: bool) -> dict[str, t.Any]:
    """Return the report of the fleet, from the report of each host, which is None if its turn never came."""
    not_run = failed_report("Its turn never came, because too many hosts before it failed.", check_mode, NOT_RUN)
    hosts = {host: report or not_run for host, report in reports.items()}
    states = collections.Counter(report["state"] for report in hosts.values())
    known = {state: states[state] for state in (OK, FAILED, UNREACHABLE, NOT_RUN)}
    return {"check_mode": check_mode, "states": known, **_counts(list(hosts.values())), "hosts": hosts}


def summary_of_host(report: t.Mapping[str, t.Any]) -> str:
    """Return the line of a host."""
    if report["waiting_for"]:
        return f"would install {', '.join(report['waiting_for'])}; what comes then cannot be predicted"
    counts = ", ".join(f"{report[state]} {state}" for state in (CREATED, PRESENT, "skipped", FAILED))
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["bitmaps_left_behind"].items())
    bitmaps = f"bitmaps: {report['bitmaps_carried']} carried, {sum(report['bitmaps_left_behind'].values())} left behind"
    return f"{counts}; {bitmaps}{f' ({reasons})' if reasons else ''}"


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
    return [
        *lines,
        f"{planned}{len(report['hosts'])} hosts: {states}. {summary_of_host({**report, 'waiting_for': []})}",
    ]


def _is_unknown(report: t.Mapping[str, t.Any]) -> bool:
    """Whether there is nothing to tell of a host but why that is so."""
    return report["state"] in (UNREACHABLE, NOT_RUN) and not report["overlays"]


def _from_disks(result: Result | None) -> Found:
    """Return what qcow2_overlay tells."""
    if result is None or "overlays" not in result:
        return _found_nothing(result)
    overlays = [_overlay(overlay, None) for overlay in result["overlays"]]
    return Found(overlays, [], [overlay["msg"] for overlay in overlays if "msg" in overlay])


def _from_domains(result: Result | None) -> Found:
    """Return what domain_overlay tells."""
    if result is None or "domains" not in result:
        return _found_nothing(result)
    domains = result["domains"]
    overlays = [_overlay(overlay, domain) for domain in domains for overlay in domain["overlays"]]
    overlays += [_overlay(None, domain) for domain in domains if domain["state"] == FAILED and not domain["overlays"]]
    skipped = [{"domain": domain["name"], **disk} for domain in domains for disk in domain["skipped_disks"]]
    return Found(overlays, skipped, [domain["msg"] for domain in domains if "msg" in domain])


def _found_nothing(result: Result | None) -> Found:
    """Return what is told by a step that was not taken, or by one that returned nothing of use."""
    return Found([], [], [] if result is None else [_reason(result)])


def _overlay(overlay: Result | None, domain: Result | None) -> dict[str, t.Any]:
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
        "state": state,
        "bitmaps": [bitmap["name"] for bitmap in source["bitmaps"]] if state != FAILED else [],
        "skipped_bitmaps": [
            {"name": bitmap["name"], "reason": bitmap["reason"]} for bitmap in source["skipped_bitmaps"]
        ],
        **({"msg": message} if state == FAILED else {}),
    }


def _held_back(overlay: Result) -> dict[str, t.Any]:
    """Return what the report says of an overlay that could have been made, but was not to be made alone."""
    why = "is not made, because something else of this host was refused, and overlay_all_or_none is set."
    return {**overlay, "state": FAILED, "bitmaps": [], "msg": f"{overlay['path']}: {why}"}


def _lost_connections(results: t.Sequence[Result | None], runs: t.Sequence[Result | None]) -> list[str]:
    """Return why a host could not be reached, and whether that leaves open what was made."""
    lost = [_reason(result) for result in results if result and result.get("unreachable")]
    if any(run and run.get("unreachable") for run in runs):
        lost.append("The connection was lost during the run, so it is not known what was made. Run this again.")
    return lost


def _unstable(one: Pass, key: str) -> list[str]:
    """Return what the idempotence check found: after the run, the same call must find everything done."""
    if one.run is None or key not in one.run or one.again is None:
        return []
    if key not in one.again:
        return [f"The idempotence check could not be made: {_reason(one.again)}"]
    problems = []
    for before, after in zip(one.run[key], one.again[key]):
        name = before.get("name") or before["path"]
        if before["state"] != FAILED and after["state"] != PRESENT:
            found = after.get("msg") or "a second run would make it once more."
            problems.append(f"{name}: is {before['state']}, but the idempotence check finds otherwise: {found}")
    return problems


def _unusable(overlays: t.Sequence[Result], chains: Result | None, check_mode: bool) -> list[str]:
    """Return which bitmaps go on recording in vain, because no backup can use their checkpoint."""
    carrying = [overlay for overlay in overlays if overlay["bitmaps"]]
    if not carrying or chains is None:
        return []
    if "disks" not in chains:
        return [f"The chains could not be examined: {_reason(chains)}"]
    disks = {disk["path"]: disk for disk in chains["disks"]}
    problems = []
    for overlay in carrying:
        path = _examined_path(overlay, check_mode)
        disk = disks.get(path, {"checkpoints": [], "msg": "was not examined."})
        verdicts = {checkpoint["name"]: checkpoint for checkpoint in disk["checkpoints"]}
        for name in overlay["bitmaps"]:
            verdict = verdicts.get(name, {"valid": False, "advice": disk.get("msg", "is not in the chain.")})
            # In use: a VM was started on it meanwhile, and nothing can be told until it is shut off.
            if not verdict["valid"] and verdict.get("problem") != "in_use":
                problems.append(f"{path}: checkpoint {name} cannot be used for a backup: {verdict['advice']}")
    return problems


def _examined_path(overlay: Result, check_mode: bool) -> str:
    """Return the image whose chain tells of an overlay; in check mode the overlay itself may not be there yet."""
    is_there = overlay["state"] == PRESENT or not check_mode
    return t.cast("str", overlay["path"] if is_there else overlay["backing_file"])


def _counts(reports: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, t.Any]:
    """Return how many overlays are in which state, and what became of the bitmaps."""
    overlays = [overlay for report in reports for overlay in report["overlays"]]
    states = collections.Counter(overlay["state"] for overlay in overlays)
    reasons = collections.Counter(bitmap["reason"] for overlay in overlays for bitmap in overlay["skipped_bitmaps"])
    return {
        CREATED: states[CREATED],
        PRESENT: states[PRESENT],
        "skipped": sum(len(report["skipped_disks"]) for report in reports),
        FAILED: states[FAILED],
        "bitmaps_carried": sum(len(overlay["bitmaps"]) for overlay in overlays),
        "bitmaps_left_behind": dict(sorted(reasons.items())),
    }


def _reason(result: Result) -> str:
    """Return why a module returned nothing of use."""
    reason = str(result.get("msg") or "No reason was given.").strip()
    details = str(result.get("module_stderr") or "").strip().splitlines()  # such as what an old Python says
    return f"{reason} {details[-1]}" if details and details[-1] not in reason else reason
