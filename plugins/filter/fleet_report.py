# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report of the fleet from the reports of its hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_report
short_description: Make the report of the fleet from the reports of its hosts
version_added: 0.1.0
description:
  - The playbook C(kvmfleet.qcow2.overlay) uses it. Hosts without a report count as V(not run).
options:
  _input:
    description: Names of the hosts.
    type: list
    elements: str
    required: true
  hostvars:
    description: The variables of the hosts, where C(overlay_result) is the report that the role
      P(kvmfleet.qcow2.overlay#role) made.
    type: dict
    required: true
  check_mode:
    description: Whether the run was made in check mode.
    type: bool
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Show what became of the fleet
  ansible.builtin.debug:
    msg: "{{ (ansible_play_hosts_all | kvmfleet.qcow2.fleet_report(hostvars, ansible_check_mode)).summary }}"
  run_once: true
"""

RETURN = r"""
_value:
  description:
    - The report, which has C(states) (the number of hosts by state), the counts of all hosts together, and C(hosts),
      the report of each host.
    - C(summary) is all that as a list of lines, for a person to read.
  type: dict
"""

import typing as t

from ..plugin_utils._report.fleet import fleet_report
from ..plugin_utils._report.text import summary_of_fleet


def make_fleet_report(
    hosts: t.Sequence[str], hostvars: t.Mapping[str, t.Mapping[str, t.Any]], check_mode: bool
) -> dict[str, t.Any]:
    """Return the report of the fleet."""
    report = fleet_report({host: hostvars[host].get("overlay_result") for host in hosts}, check_mode)
    return {**report, "summary": summary_of_fleet(report)}


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"fleet_report": make_fleet_report}
