# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report on what was healed in the fleet, from what domain_checkpoint returned. Pure, on the controller."""

from __future__ import annotations

import collections
import typing as t

from ...module_utils._disk.heal import REBUILT, REMOVED, VALID
from ...module_utils._disk.verdict import FAILED, SKIPPED
from .._report.fleet import COLLECTION_VERSION, NOT_RUN
from .._report.host import OK, UNREACHABLE
from .._report.patterns import checkpoint_matches, matches, unmatched_checkpoints
from .._report.rows import Problem, Result, problem, reason
from .report import in_vain
from .text import lines_of_hosts

SCHEMA_VERSION = 1  # docs/heal.schema.json describes it
STATES = (VALID, REBUILT, REMOVED, SKIPPED, FAILED)  # of domains and of checkpoints
_NOT_RUN = problem("not_run", "Nothing was healed there: the run ended before, or an earlier play lost it.")


class Work(t.NamedTuple):
    """What there is of the work on one host."""

    result: Result | None = None  # of domain_checkpoint
    problem: str = ""  # what ended it before its end, if anything did
    patterns: t.Sequence[str] = ()  # of names of domains, among those that were asked for
    checkpoints: t.Sequence[str] = ()  # patterns of names of checkpoints, among those that were asked for


def host_healed(work: Work) -> dict[str, t.Any]:
    """Return the report on one host."""
    told = (work.result or {}).get("domains")
    domains = list(told or ())
    problems = [problem("task_failed", work.problem)] if work.problem else []
    if told is None and not problems:
        problems = [reason(work.result) if work.result is not None else _NOT_RUN]
    lost = any(one.code == "unreachable" for one in problems)
    failed = [_of_domain(one) for one in domains if one["state"] == FAILED]
    return {
        "state": UNREACHABLE if lost else FAILED if problems or failed else OK,
        "patterns": matches(work.patterns, [work.result]),
        "checkpoint_patterns": checkpoint_matches(work.checkpoints, domains) if told is not None else {},
        "warnings": [str(one) for one in (work.result or {}).get("warnings") or ()],
        "problems": [one._asdict() for one in (*problems, *failed)],
        **_sums(domains),
        "domains": domains,
    }


def _of_domain(domain: Result) -> Problem:
    """Return why a domain failed. Words about an image alone do not tell whose it is."""
    name, words = domain["name"], domain["msg"]
    return Problem(domain["code"], words if words.startswith(f"{name}: ") else f"{name}: {words}")


def fleet_healed(
    reports: t.Mapping[str, Result | None], *, check_mode: bool, allows_nothing: bool = False
) -> dict[str, t.Any]:
    """Return the report on the fleet, from that on each host, which is None if its turn never came."""
    not_run = {**host_healed(Work()), "state": NOT_RUN}
    hosts = {host: report or not_run for host, report in reports.items()}
    states = collections.Counter(report["state"] for report in hosts.values())
    problems = [] if allows_nothing else _in_vain(list(hosts.values()), "heal_allow_nothing")
    return {
        "schema_version": SCHEMA_VERSION,
        "collection_version": COLLECTION_VERSION,
        "check_mode": check_mode,
        "states": {state: states[state] for state in (OK, FAILED, UNREACHABLE, NOT_RUN)},
        **_sums([domain for report in hosts.values() for domain in report["domains"]]),
        "problems": [one._asdict() for one in problems],
        "failed_hosts": {host: len(report["problems"]) for host, report in hosts.items() if report["problems"]},
        "hosts": hosts,
    }


def _in_vain(hosts: t.Sequence[Result], way_out: str) -> list[Problem]:
    """Return what was asked for and is on no host: domains, or checkpoints of these."""
    return in_vain(hosts, way_out) or list(unmatched_checkpoints(hosts, way_out))


def summary(report: Result) -> list[str]:
    """Return the lines that a person reads at the end: one for each host, what is wrong below, and the sum."""
    lines = lines_of_hosts(report, lambda one: [_counts(one)])
    lines.extend(problem["msg"] for problem in report["problems"])
    states = ", ".join(f"{count} {state}" for state, count in report["states"].items())
    foreseen = " Nothing was changed: this is what a run would do." if report["check_mode"] else ""
    return [*lines, f"{len(report['hosts'])} hosts: {states}. {_counts(report)}.{foreseen}"]


def _sums(domains: t.Sequence[Result]) -> dict[str, t.Any]:
    """Return how many domains and checkpoints have come to which state."""
    of_domains = collections.Counter(one["state"] for one in domains)
    of_checkpoints = collections.Counter(one["state"] for domain in domains for one in domain["checkpoints"])
    orphans = sum(len(one["bitmaps"]) for domain in domains for one in domain["removed_orphans"] or ())
    return {
        "domain_states": {state: of_domains[state] for state in STATES},
        "checkpoint_states": {state: of_checkpoints[state] for state in STATES if state != SKIPPED},
        "removed_orphans": orphans,
    }


def _counts(report: Result) -> str:
    """Return the counts of a host, or of the fleet, in words."""
    of_domains, of_checkpoints = report["domain_states"], report["checkpoint_states"]
    domains = ", ".join(f"{count} {state}" for state, count in of_domains.items() if count)
    checkpoints = ", ".join(f"{count} {state}" for state, count in of_checkpoints.items() if count)
    orphans = f"; {report['removed_orphans']} orphan bitmaps removed" if report["removed_orphans"] else ""
    vms = f"{sum(of_domains.values())} VMs" + (f": {domains}" if domains else "")
    return f"{vms}; checkpoints: {checkpoints or 'none'}{orphans}"
