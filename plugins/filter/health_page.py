# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make what the page on the health of the fleet holds from the report."""

from __future__ import annotations

DOCUMENTATION = r"""
name: health_page
short_description: Make what the page on the health of the fleet holds from the report
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.health) uses it in the template of its page. What it makes is for that page alone.
options:
  _input:
    description: The report, as P(kvmfleet.qcow2.fleet_health#filter) makes it, as JSON or read from that.
    type: raw
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Show what the page holds
  ansible.builtin.debug:
    msg: "{{ (report | kvmfleet.qcow2.health_page).data }}"
"""

RETURN = r"""
_value:
  description: What the template needs.
  type: dict
  contains:
    ready:
      description: Whether every next increment is possible.
      type: bool
    ended:
      description: When the run ended.
      type: str
    data:
      description: JSON that is safe within an element of HTML.
      type: str
    sums:
      description: Names and values for the head of the page.
      type: list
      elements: list
    worst:
      description: Lines for whoever has no scripts.
      type: list
      elements: str
"""

import typing as t

from ..plugin_utils._health.carried import from_text
from ..plugin_utils._health.page import page_data, visible
from ..plugin_utils._health.text import figures, summary


def make_page(text: str | t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return what the template needs."""
    report = from_text(text)
    return {
        "ready": report["ready"],
        "ended": report["ended"],
        "data": page_data(report, report["ended"]),
        "sums": figures(report),
        "worst": [visible(line) for line in summary(report)],
    }


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"health_page": make_page}
