# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report of a host from what the modules returned there."""

from __future__ import annotations

DOCUMENTATION = r"""
name: host_report
short_description: Make the report of a host from what the modules of this collection returned there
version_added: 0.1.0
description:
  - The role P(kvmfleet.qcow2.overlay#role) uses it. It says what became of each overlay, whether the idempotence check
    and the examination of the chains found anything, and counts.
options:
  _input:
    description:
      - Registered results. A step that was left out, or skipped, is no problem.
    type: dict
    required: true
    suboptions:
      disks:
        description: Results of M(kvmfleet.qcow2.qcow2_overlay) before the run in check mode, of the run, and after it
          in check mode.
        type: list
        elements: dict
      domains:
        description: Results of M(kvmfleet.qcow2.domain_overlay) of the same three steps.
        type: list
        elements: dict
      chains:
        description: The result of M(kvmfleet.qcow2.qcow2_info) about the images that an earlier report names in
          C(examined).
        type: dict
      waiting_for:
        description: Packages that check mode did not install.
        type: list
        elements: str
      all_or_none:
        description: Whether the host was left as it is if anything of it was refused.
        type: bool
        default: false
      problem:
        description: What ended the steps before their end.
        type: str
  check_mode:
    description: Whether the run was made in check mode.
    type: bool
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Make the report of a host
  ansible.builtin.set_fact:
    overlay_result: >-
      {{ {'disks': [looked, made, looked_again], 'chains': chains} | kvmfleet.qcow2.host_report(ansible_check_mode) }}
"""

RETURN = r"""
_value:
  description:
    - The report. It has C(state) (V(ok), V(failed) or V(unreachable)); C(problems), each with C(code) and C(msg); the
      counts C(created), C(present), C(skipped), C(failed), C(bitmaps_carried) and C(bitmaps_left_behind) by reason; and
      in detail C(overlays), with C(code) and C(msg) if V(failed), and C(skipped_disks).
    - C(summary) is all that in one line.
  type: dict
"""

import typing as t

from ..plugin_utils._report.host import Pass, Steps, host_report
from ..plugin_utils._report.text import summary_of_host


def _taken(result: t.Mapping[str, t.Any] | None) -> t.Mapping[str, t.Any] | None:
    """Return the result of a step, or None if it was not taken."""
    return None if not result or result.get("skipped") else result


def make_host_report(results: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """Return the report of a host."""
    steps = Steps(
        Pass(*map(_taken, results.get("disks", ()))),
        Pass(*map(_taken, results.get("domains", ()))),
        _taken(results.get("chains")),
        results.get("waiting_for", ()),
        results.get("all_or_none", False),
        results.get("problem", ""),
    )
    report = host_report(steps, check_mode)
    return {**report, "summary": summary_of_host(report)}


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"host_report": make_host_report}
