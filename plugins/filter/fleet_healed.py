# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report on what was healed in the fleet from the reports on its hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_healed
short_description: Make the report on what was healed in the fleet from the reports on its hosts
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.heal) uses it. Hosts without a report count as V(not run).
positional: hostvars, run
options:
  _input:
    description: Names of the hosts.
    type: list
    elements: str
    required: true
  hostvars:
    description: The variables of the hosts, where C(heal_result) is what P(kvmfleet.qcow2.host_healed#filter) makes.
    type: dict
    required: true
  run:
    description: What the report tells of the run, such as C(ended), when it has ended.
    type: dict
    required: true
  check_mode:
    description: Whether nothing was changed, and the report is what a run would do.
    type: bool
    default: false
  allows_nothing:
    description: Whether it is no problem if nothing of what was asked for is on any host.
    type: bool
    default: false
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Show what was healed
  ansible.builtin.debug:
    msg: "{{ (ansible_play_hosts_all | kvmfleet.qcow2.fleet_healed(hostvars, {})).summary }}"
  run_once: true
"""

RETURN = r"""
_value:
  description: What the playbook needs to go on, and the report.
  type: dict
  contains:
    summary:
      description: All of it as lines for a person to read.
      type: list
      elements: str
    problems:
      description: Number of problems of the fleet that are with no host.
      type: int
      sample: 0
    failed_hosts:
      description: For how many reasons a host is to fail, by its name.
      type: dict
      sample: {"hv13": 1}
    report:
      description:
        - The report as JSON. The playbook writes it to a file. C(docs/heal.schema.json) of the collection is its JSON
          schema.
      type: str
"""

import typing as t

from ansible.utils.unsafe_proxy import wrap_var

from ..plugin_utils._health.carried import as_text, from_text
from ..plugin_utils._health.healed import fleet_healed, summary


def make_fleet_healed(
    hosts: t.Sequence[str],
    hostvars: t.Mapping[str, t.Mapping[str, t.Any]],
    run: t.Mapping[str, t.Any],
    check_mode: bool = False,
    allows_nothing: bool = False,
) -> dict[str, t.Any]:
    """Return the report on the fleet."""
    told = {host: hostvars[host].get("heal_result") for host in hosts}
    reports = {host: from_text(text) if text else None for host, text in told.items()}
    report = fleet_healed(reports, check_mode=check_mode, allows_nothing=allows_nothing)
    report["summary"] = summary(report)
    return {
        # Or ansible-core before 2.19 would run what looks like a template in it, as in the name of a domain.
        "summary": wrap_var(report["summary"]),
        "problems": len(report["problems"]),
        "failed_hosts": report["failed_hosts"],
        "report": as_text({**run, **report}),
    }


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"fleet_healed": make_fleet_healed}
