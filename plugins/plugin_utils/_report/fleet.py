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
from .rows import problem

NOT_RUN = "not run"
_TURN_NEVER_CAME = problem("not_run", "Its turn never came, because too many hosts before it failed.")


def fleet_report(reports: t.Mapping[str, t.Mapping[str, t.Any] | None], check_mode: bool) -> dict[str, t.Any]:
    """Return the report of the fleet, from the report of each host, which is None if its turn never came."""
    nothing = host_report(Steps(), check_mode)
    not_run = {**nothing, "state": NOT_RUN, "problems": [_TURN_NEVER_CAME._asdict()]}
    hosts = {host: report or not_run for host, report in reports.items()}
    states = collections.Counter(report["state"] for report in hosts.values())
    known = {state: states[state] for state in (OK, FAILED, UNREACHABLE, NOT_RUN)}
    return {"check_mode": check_mode, "states": known, **counts(list(hosts.values())), "hosts": hosts}
