# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report on the health of hosts and of the fleet, from what domain_info returned. Pure, on the controller."""

from __future__ import annotations

import collections
import typing as t

from ...module_utils._disk.verdict import FAILED
from .._report.fleet import COLLECTION_VERSION, NOT_RUN
from .._report.host import OK as HOST_OK
from .._report.host import UNREACHABLE
from .._report.patterns import matches, unmatched
from .._report.rows import Problem, Result, problem, reason
from .commands import Place
from .domain import ATTENTION, FULL, HEALTHS, UNKNOWN, Limits, defined_twice, domain_health

SCHEMA_VERSION = 1  # docs/health.schema.json describes it
# The healths of a domain for which its host fails.
FAIL_ON: t.Mapping[str, t.Container[str]] = {
    "full": (FULL, UNKNOWN),
    "attention": (FULL, UNKNOWN, ATTENTION),
    "never": (),
}
# Of what domain_info tells of an image, what the report has; the rest is of no use for a judgement of the fleet.
_OF_IMAGE = ("path", "format", "virtual_size", "actual_size", "in_use", "corrupt", "modified", "made", "snapshot")
_OF_BITMAP = ("name", "recording", "inconsistent")
_OF_DOMAIN = (
    "name",
    "uuid",
    "state",
    "managed_save",
    "libvirt_snapshots",
    "next_backup",
    "next_backup_since",
    "next_backup_reason",
    "checkpoints",
    "orphan_bitmaps",
    "unfinished",
)
_NOT_RUN = problem("not_run", "It was not looked at: the run ended before, or an earlier play lost it.")


class Look(t.NamedTuple):
    """What there is of a look at one host."""

    result: Result | None = None  # of domain_info
    problem: str = ""  # what ended the look before its end, if anything did
    patterns: t.Sequence[str] = ()  # of names of domains, among those that were asked for


def host_health(place: Place, look: Look, limits: Limits, now: float) -> dict[str, t.Any]:
    """Return the report on one host. `now`: seconds since 1970."""
    told = (look.result or {}).get("domains")
    domains = [_domain(place, one, limits, now) for one in told or ()]
    problems = [problem("task_failed", look.problem)] if look.problem else []
    if told is None and not problems:
        problems = [reason(look.result) if look.result is not None else _NOT_RUN]
    lost = any(one.code == "unreachable" for one in problems)
    return {
        "state": UNREACHABLE if lost else FAILED if problems else HOST_OK,
        "patterns": matches(look.patterns, [look.result]),
        "warnings": [str(one) for one in (look.result or {}).get("warnings") or ()],
        "problems": [one._asdict() for one in problems],
        **_sums(domains),
        "domains": domains,
    }


def fleet_health(
    reports: t.Mapping[str, Result | None], *, fail_on: str = "full", allows_nothing: bool = False
) -> dict[str, t.Any]:
    """Return the report on the fleet, from that on each host, which is None if its turn never came."""
    not_run = {**host_health(Place(""), Look(), Limits(), 0), "state": NOT_RUN}
    hosts = _with_twins({host: report or not_run for host, report in reports.items()})
    states = collections.Counter(report["state"] for report in hosts.values())
    domains = [domain for report in hosts.values() for domain in report["domains"]]
    problems = [] if allows_nothing else in_vain(list(hosts.values()), "health_allow_nothing")
    bad = {host: _bad(report, fail_on) for host, report in hosts.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "collection_version": COLLECTION_VERSION,
        "fail_on": fail_on,
        "ready": not problems and not any(_bad(report, "full") for report in hosts.values()),
        "states": {state: states[state] for state in (HOST_OK, FAILED, UNREACHABLE, NOT_RUN)},
        **_sums(domains),
        "problems": [one._asdict() for one in problems],
        "failed_hosts": {host: count for host, count in bad.items() if count},
        "hosts": hosts,
    }


def _with_twins(hosts: t.Mapping[str, Result]) -> dict[str, dict[str, t.Any]]:
    """Return the reports on hosts, in which a domain that is defined on several of them has that as a finding.

    By the UUID alone: hosts with disks of their own call their images alike, and a clone has a UUID of its own.
    """
    places = collections.defaultdict[str, list[str]](list)
    for host, report in hosts.items():
        for uuid in {one["uuid"] for one in report["domains"] if one["uuid"] is not None}:
            places[uuid].append(host)
    told = {}
    for host, report in hosts.items():
        others = [[at for at in places.get(one["uuid"], ()) if at != host] for one in report["domains"]]
        domains = [defined_twice(one, at) if at else one for one, at in zip(report["domains"], others)]
        told[host] = {**report, **_sums(domains), "domains": domains}
    return told


def _domain(place: Place, told: Result, limits: Limits, now: float) -> dict[str, t.Any]:
    """Return what the report says of a domain."""
    problem_of = {key: told[key] for key in ("msg", "code") if key in told}
    disks = [
        {
            **{key: disk[key] for key in ("target", "source", "unfit", "msg", "code") if key in disk},
            "images": [_image(image) for image in disk["images"]],
        }
        for disk in told["disks"]
    ]
    own = {key: told[key] for key in _OF_DOMAIN}
    return {**own, **problem_of, **domain_health(place, told, limits, now), "disks": disks}


def _image(image: Result) -> dict[str, t.Any]:
    """Return what the report says of an image."""
    bitmaps = [{key: one[key] for key in _OF_BITMAP} for one in image["bitmaps"]]
    return {**{key: image[key] for key in _OF_IMAGE}, "bitmaps": bitmaps}


def _sums(domains: t.Sequence[Result]) -> dict[str, t.Any]:
    """Return how many domains are of which health, and sums."""
    healths = collections.Counter(one["health"] for one in domains)
    findings = collections.Counter(code for one in domains for code in {found["code"] for found in one["findings"]})
    return {
        "healths": {health: healths[health] for health in HEALTHS},
        "findings": dict(sorted(findings.items())),
        "increment_bytes": sum(one["increment_bytes"] or 0 for one in domains),
        "snapshot_bytes": sum(one["snapshot_bytes"] for one in domains),
    }


def _bad(report: Result, fail_on: str) -> int:
    """Return for how many reasons a host is to fail."""
    bad = FAIL_ON[fail_on]
    domains = sum(one["health"] in bad for one in report["domains"])
    return domains + (len(report["problems"]) if fail_on != "never" else 0)


def in_vain(hosts: t.Sequence[Result], way_out: str) -> list[Problem]:
    """Return what is wrong with the fleet although nothing is with any host: what was asked for is nowhere.

    `way_out`: the variable that allows it.
    """
    if any(host["state"] != HOST_OK for host in hosts):
        return []  # there it may be
    words = f"No host has a domain of what was asked for. Correct that, or set {way_out}."
    found = list(unmatched(hosts, way_out))
    return found or ([] if any(host["domains"] for host in hosts) else [problem("nothing_done", words)])
