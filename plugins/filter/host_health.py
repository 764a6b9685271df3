# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report on the health of a host from what domain_info returned there."""

from __future__ import annotations

DOCUMENTATION = r"""
name: host_health
short_description: Make the report on the health of a host from what domain_info returned there
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.health) uses it. It says of each domain what somebody should see to, and with which
    command.
positional: host
options:
  _input:
    description: What there is of a look at the host.
    type: dict
    required: true
    suboptions:
      look:
        description: The result of M(kvmfleet.qcow2.domain_info). One that was skipped is none.
        type: dict
      problem:
        description: What ended the look before its end.
        type: str
      names:
        description: Names and patterns of the domains that were asked for.
        type: list
        elements: str
  host:
    description: Name of the host.
    type: str
    required: true
  longest_chain:
    description: Tell of chains with more images. V(0) is no limit.
    type: int
    default: 0
  oldest_snapshot:
    description: Tell of snapshots that are older, in days. V(0) is no limit.
    type: float
    default: 0
  without_backup:
    description: Names and patterns of domains that are not to be backed up.
    type: list
    elements: str
    default: []
  uri:
    description: The libvirt daemon of the host, for the commands. Left out, or V(qemu:///system), it is in none.
    type: str
    default: ""
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Look
  kvmfleet.qcow2.domain_info:
  register: look

- name: Show what somebody should see to
  ansible.builtin.debug:
    msg: "{{ health.domains | map(attribute='findings') | flatten | map(attribute='msg') }}"
  vars:
    health: "{{ {'look': look} | kvmfleet.qcow2.host_health(inventory_hostname) | from_json }}"
"""

RETURN = r"""
_value:
  description:
    - The report as JSON, which Ansible passes on much faster than what it is made of. C(docs/health.schema.json) of the
      collection describes it as an item of C(hosts).
  type: str
"""

import time
import typing as t

from ..plugin_utils._health.carried import as_text
from ..plugin_utils._health.commands import Place
from ..plugin_utils._health.domain import Limits
from ..plugin_utils._health.report import Look, host_health
from ..plugin_utils._variables import texts


def make_host_health(
    found: t.Mapping[str, t.Any],
    host: str,
    longest_chain: t.Any = 0,
    oldest_snapshot: t.Any = 0,
    without_backup: t.Any = (),
    uri: t.Any = "",
) -> str:
    """Return the report on a host."""
    result = found.get("look")
    look = Look(
        None if not result or result.get("skipped") else result,
        found.get("problem") or "",
        [name for name in texts(found.get("names")) if any(character in name for character in "*?[")],
    )
    limits = Limits(int(longest_chain), float(oldest_snapshot), tuple(filter(None, texts(without_backup))))
    return as_text(host_health(Place(host, str(uri or "")), look, limits, time.time()))


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"host_health": make_host_health}
