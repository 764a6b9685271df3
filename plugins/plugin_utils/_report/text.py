# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report for a person to read."""

from __future__ import annotations

import typing as t

from ...module_utils._disk.verdict import ABSENT, COMMITTED, CREATED, FAILED, PRESENT, REVERTED, SKIPPED
from .fleet import NOT_RUN
from .host import OK, UNREACHABLE

STATES = (CREATED, PRESENT, COMMITTED, REVERTED, ABSENT)
STATES_OF = {  # of what is asked for; those of something else are shown if there are any
    PRESENT: (CREATED, PRESENT),
    COMMITTED: (COMMITTED, ABSENT),
    REVERTED: (REVERTED, ABSENT),
}


def summary_of_host(report: t.Mapping[str, t.Any]) -> str:
    """Return the line of a host."""
    if report["waiting_for"]:
        return f"would install {', '.join(report['waiting_for'])}; what comes then cannot be predicted"
    return summary_of_counts(report)


def summary_of_counts(report: t.Mapping[str, t.Any]) -> str:
    """Return the counts of a host, or of the fleet, in words."""
    unfit = f", {report['unfit']} of them written to and in no snapshot" if report["unfit"] else ""
    shown = [state for state in STATES if report[state] or state in STATES_OF.get(report["wanted"], ())]
    counts = (
        f"{', '.join(f'{report[state]} {state}' for state in shown)}, {report[SKIPPED]} skipped"
        f"{reasons(report['skipped_because'])}{unfit}, {report[FAILED]} failed"
    )
    left_behind = sum(report["bitmaps_left_behind"].values())
    bitmaps = f"bitmaps: {report['bitmaps_carried']} carried, {left_behind} left behind"
    running = f", {report['bitmaps_unverified']} not verified, as a VM runs" if report["bitmaps_unverified"] else ""
    return f"{counts}; {bitmaps}{reasons(report['bitmaps_left_behind'])}{running}"


def reasons(counts: t.Mapping[str, int]) -> str:
    """Return how many of something there are for which reason, as an addition to a text."""
    return f" ({', '.join(f'{count} {reason}' for reason, count in counts.items())})" if counts else ""


def summary_of_fleet(report: t.Mapping[str, t.Any]) -> list[str]:
    """Return the lines that a person reads at the end: one for each host, its problems below, and the sum."""
    width = max((len(host) for host in report["hosts"]), default=0)
    lines = []
    for host, one in report["hosts"].items():
        state = one["state"] if one["state"] == OK else one["state"].upper()
        texts = [" ".join(problem["msg"].splitlines()) for problem in one["problems"]]
        told = texts if _is_unknown(one) else [summary_of_host(one), *(f"- {text}" for text in texts)]
        lines.append(f"{host:{width}}  {state:11}  {told[0]}")
        lines.extend(f"{'':{width}}  {text}" for text in told[1:])
    states = ", ".join(f"{count} {state}" for state, count in report["states"].items())
    lines.extend(problem["msg"] for problem in report["problems"])
    planned = "Check mode, nothing was changed. " if report["check_mode"] else ""
    return [*lines, f"{planned}{len(report['hosts'])} hosts: {states}. {summary_of_counts(report)}"]


def _is_unknown(report: t.Mapping[str, t.Any]) -> bool:
    """Whether there is nothing to tell of a host but why that is so."""
    return report["state"] in (UNREACHABLE, NOT_RUN) and not report["overlays"]
