# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report on the health of the fleet for a person to read on a screen."""

from __future__ import annotations

import typing as t

from .._report.host import OK
from .domain import ATTENTION, FULL, HEALTHS, UNKNOWN
from .domain import OK as WELL

Result = t.Mapping[str, t.Any]


def size(count: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def counts(report: Result) -> str:
    """Return the counts of a host, or of the fleet, in words."""
    healths = report["healths"]
    told = ", ".join(f"{healths[health]} {health}" for health in HEALTHS if healths[health])
    sums = f"next increments {size(report['increment_bytes'])}, in snapshots {size(report['snapshot_bytes'])}"
    return f"{sum(healths.values())} VMs" + (f": {told}; {sums}" if told else "")


def figures(report: Result) -> list[tuple[str, str]]:
    """Return the sums for the head of the page, each with its name."""
    healths, states = report["healths"], report["states"]
    lost = sum(count for state, count in states.items() if state != OK)
    return [
        ("VMs", str(sum(healths.values()))),
        ("only a full backup", str(healths[FULL])),
        ("unknown", str(healths[UNKNOWN])),
        ("need attention", str(healths[ATTENTION])),
        ("in order", str(healths[WELL])),
        ("hosts", str(sum(states.values()))),
        ("hosts not asked", str(lost)),
        ("the next increments copy", size(report["increment_bytes"])),
        ("merging all snapshots frees at most", size(report["snapshot_bytes"])),
    ]


def lines_of_hosts(report: Result, tell: t.Callable[[Result], list[str]]) -> list[str]:
    """Return a line for each host, with what is wrong below. `tell` returns what is told of one that was reached."""
    width = max((len(host) for host in report["hosts"]), default=0)
    lines = []
    for host, one in report["hosts"].items():
        state = one["state"] if one["state"] == OK else one["state"].upper()
        problems = [" ".join(problem["msg"].splitlines()) for problem in one["problems"]]
        first, *rest = tell(one)
        told = [first, *problems, *rest] if one["domains"] or not problems else [*problems, *rest]
        lines.append(f"{host:{width}}  {state:11}  {told[0]}")
        lines.extend(f"{'':{width}}  {text}" for text in told[1:])
    return lines


def summary(report: Result) -> list[str]:
    """Return the lines that a person reads at the end: one for each host, what is wrong below, and the sum."""
    lines = lines_of_hosts(report, _of_host)
    states = ", ".join(f"{count} {state}" for state, count in report["states"].items())
    lines.extend(problem["msg"] for problem in report["problems"])
    verdict = "Every next increment is possible." if report["ready"] else "Not every next increment is possible."
    return [*lines, f"{len(report['hosts'])} hosts: {states}. {counts(report)}. {verdict}"]


def _of_host(one: Result) -> list[str]:
    """Return the counts of a host, and the domains that stand in the way."""
    return [
        counts(one),
        *(
            f"- {domain['name']}: {domain['health']}. {domain['next_backup_reason']}"
            for domain in one["domains"]
            if domain["health"] in (FULL, UNKNOWN)
        ),
    ]
