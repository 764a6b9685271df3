# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make what Prometheus reads from the report on the health of the fleet."""

from __future__ import annotations

DOCUMENTATION = r"""
name: health_metrics
short_description: Make what Prometheus reads from the report on the health of the fleet
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.health) writes it to C(health_metrics), for the textfile collector of the node
    exporter.
  - Labels are C(host) and C(domain) alone.
options:
  _input:
    description: The report, as P(kvmfleet.qcow2.fleet_health#filter) makes it, as JSON or read from that.
    type: raw
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Write the metrics
  ansible.builtin.copy:
    content: "{{ report | kvmfleet.qcow2.health_metrics }}"
    dest: /var/lib/prometheus/node-exporter/kvmfleet.prom
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The metrics in the text format.
  type: str
"""

import typing as t

from ..plugin_utils._health.carried import from_text
from ..plugin_utils._health.metrics import metrics


def make_metrics(text: str | t.Mapping[str, t.Any]) -> str:
    """Return the metrics."""
    report = from_text(text)
    return metrics(report, report["ended"])


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"health_metrics": make_metrics}
