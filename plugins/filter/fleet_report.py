# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report of the fleet from the reports of its hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_report
short_description: Make the report of the fleet from the reports of its hosts
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.overlay) uses it. Hosts without a report count as V(not run).
positional: hostvars, check_mode
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
  allows_nothing:
    description: Whether it is no problem if nothing of what was asked for is on any host.
    type: bool
    default: false
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
    - The report. Besides what is told here it has the counts C(created) to C(bitmaps_unverified) of all hosts together,
      which P(kvmfleet.qcow2.host_report#filter) has of one.
    - The playbook writes it to a file, with more about the run. C(docs/report.schema.json) of the collection is the
      JSON schema of that.
  type: dict
  contains:
    summary:
      description: All of it as lines for a person to read. A line for each host, its problems below, and the sum.
      type: list
      elements: str
    schema_version:
      description: It grows when something in the report changes its meaning, or goes. What is added does not count.
      type: int
      sample: 2
    collection_version:
      description: Version of this collection.
      type: str
      sample: 1.0.0
    check_mode:
      description: Whether the run was made in check mode.
      type: bool
      sample: false
    wanted:
      description: The state that was asked for.
      type: str
      sample: present
    states:
      description: Number of hosts by state.
      type: dict
      sample: {"ok": 3, "failed": 0, "unreachable": 1, "not run": 0}
    problems:
      description:
        - What is wrong with the fleet although it is with no host. Nothing of what was asked for is anywhere
          (C(nothing_done)), or a pattern matches no domain anywhere (C(no_match)).
      type: list
      elements: dict
      contains:
        code:
          description: The kind of problem, one word.
          type: str
          sample: no_match
        msg:
          description: What is wrong, and what to do.
          type: str
    repeat:
      description: Names of the hosts that are not V(ok), for which to run the same again.
      type: list
      elements: str
      sample: [hv13]
    hosts:
      description: The report of each host by its name, as P(kvmfleet.qcow2.host_report#filter) makes it.
      type: dict
"""

import typing as t

from ansible.utils.unsafe_proxy import wrap_var

from ..plugin_utils._report.fleet import fleet_report
from ..plugin_utils._report.text import summary_of_fleet


def make_fleet_report(
    hosts: t.Sequence[str],
    hostvars: t.Mapping[str, t.Mapping[str, t.Any]],
    check_mode: bool,
    allows_nothing: bool = False,
) -> dict[str, t.Any]:
    """Return the report of the fleet."""
    reports = {host: hostvars[host].get("overlay_result") for host in hosts}
    report = fleet_report(reports, check_mode, allows_nothing=allows_nothing)
    # Or ansible-core before 2.19 would run what looks like a template in it, as in the name of a domain.
    return {**report, "summary": wrap_var(summary_of_fleet(report))}


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"fleet_report": make_fleet_report}
