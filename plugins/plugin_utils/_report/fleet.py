# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report of the fleet, from the reports of its hosts."""

from __future__ import annotations

import collections
import typing as t

from ...module_utils._disk.verdict import FAILED
from .host import OK, UNREACHABLE, Steps, counts, host_report
from .patterns import unmatched
from .rows import Problem, problem

NOT_RUN = "not run"
SCHEMA_VERSION = 2  # of the report of the fleet; docs/report.schema.json describes it
COLLECTION_VERSION = "1.0.0"  # as in galaxy.yml, which is not installed
_TURN_NEVER_CAME = problem(
    "not_run", "Its turn never came: too many hosts before it failed, or an earlier play lost it."
)
_NOTHING_DONE = problem(
    "nothing_done",
    "Nothing was done: no host has anything of what was asked for. Correct that, or set overlay_allow_nothing.",
)
Report = t.Mapping[str, t.Any]


def fleet_report(
    reports: t.Mapping[str, Report | None], check_mode: bool, *, allows_nothing: bool = False
) -> dict[str, t.Any]:
    """Return the report of the fleet, from the report of each host, which is None if its turn never came."""
    nothing = host_report(Steps(), check_mode)
    not_run = {**nothing, "state": NOT_RUN, "problems": [_TURN_NEVER_CAME._asdict()]}
    hosts = {host: report or not_run for host, report in reports.items()}
    states = collections.Counter(report["state"] for report in hosts.values())
    known = {state: states[state] for state in (OK, FAILED, UNREACHABLE, NOT_RUN)}
    problems = [] if allows_nothing else _done_in_vain(list(hosts.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "collection_version": COLLECTION_VERSION,
        "check_mode": check_mode,
        "wanted": next((host["wanted"] for host in hosts.values() if host["state"] != NOT_RUN), nothing["wanted"]),
        "states": known,
        **counts(list(hosts.values())),
        "problems": [one._asdict() for one in problems],
        "repeat": [host for host, report in hosts.items() if report["state"] != OK],
        "hosts": hosts,
    }


def _done_in_vain(hosts: t.Sequence[Report]) -> list[Problem]:
    """Return what is wrong with the fleet although nothing is with any host: what was asked for is nowhere."""
    if any(host["state"] in (UNREACHABLE, NOT_RUN) or host["waiting_for"] for host in hosts):
        return []  # there it may be
    found = list(unmatched(hosts, "overlay_allow_nothing"))
    is_nothing = not any(host["overlays"] or host["skipped_disks"] or host["problems"] for host in hosts)
    return found or ([_NOTHING_DONE] if is_nothing else [])
