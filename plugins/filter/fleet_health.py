# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report on the health of the fleet from the reports on its hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_health
short_description: Make the report on the health of the fleet from the reports on its hosts
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.health) uses it. Hosts without a report count as V(not run).
positional: hostvars, run
options:
  _input:
    description: Names of the hosts.
    type: list
    elements: str
    required: true
  hostvars:
    description: The variables of the hosts, where C(health_result) is what P(kvmfleet.qcow2.host_health#filter) makes.
    type: dict
    required: true
  run:
    description: What the report tells of the run, such as C(ended), when it has ended.
    type: dict
    required: true
  fail_on:
    description:
      - For what a host is to fail. V(full) is a domain of which the next backup cannot be an increment, or it cannot be
        told, and a host that could not be asked. V(attention) is also a domain that somebody should see to.
    type: str
    choices: [full, attention, never]
    default: full
  allows_nothing:
    description: Whether it is no problem if nothing of what was asked for is on any host.
    type: bool
    default: false
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Show how the fleet is
  ansible.builtin.debug:
    msg: "{{ (ansible_play_hosts_all | kvmfleet.qcow2.fleet_health(hostvars, {})).summary }}"
  run_once: true
"""

RETURN = r"""
_value:
  description: What the playbook needs to go on, and the report.
  type: dict
  contains:
    ready:
      description: Whether every next increment is possible, and every host could be asked.
      type: bool
      sample: false
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
        - The report as JSON. The playbook writes it to a file. C(docs/health.schema.json) of the collection is its JSON
          schema.
      type: str
"""

import typing as t

from ansible.errors import AnsibleFilterError
from ansible.utils.unsafe_proxy import wrap_var

from ..plugin_utils._health.carried import as_text, from_text
from ..plugin_utils._health.report import FAIL_ON, fleet_health
from ..plugin_utils._health.text import summary


def make_fleet_health(
    hosts: t.Sequence[str],
    hostvars: t.Mapping[str, t.Mapping[str, t.Any]],
    run: t.Mapping[str, t.Any],
    fail_on: str = "full",
    allows_nothing: bool = False,
) -> dict[str, t.Any]:
    """Return the report on the fleet."""
    if fail_on not in FAIL_ON:
        raise AnsibleFilterError(f"health_fail_on={fail_on}: must be one of {', '.join(FAIL_ON)}.")
    texts = {host: hostvars[host].get("health_result") for host in hosts}
    reports = {host: from_text(text) if text else None for host, text in texts.items()}
    report = fleet_health(reports, fail_on=fail_on, allows_nothing=allows_nothing)
    report["summary"] = summary(report)
    return {
        "ready": report["ready"],
        # Or ansible-core before 2.19 would run what looks like a template in it, as in the name of a domain.
        "summary": wrap_var(report["summary"]),
        "problems": len(report["problems"]),
        "failed_hosts": report["failed_hosts"],
        "report": as_text({**run, **report, **({} if run.get("finished", True) else {"ready": False})}),
    }


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"fleet_health": make_fleet_health}
