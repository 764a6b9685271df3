# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report on what was healed on a host from what domain_checkpoint returned there."""

from __future__ import annotations

DOCUMENTATION = r"""
name: host_healed
short_description: Make the report on what was healed on a host from what domain_checkpoint returned there
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.heal) uses it.
options:
  _input:
    description: What there is of the work on the host.
    type: dict
    required: true
    suboptions:
      work:
        description: The result of M(kvmfleet.qcow2.domain_checkpoint).
        type: dict
      names:
        description: The names and patterns of domains that were asked for.
        type: list
        elements: str
      checkpoints:
        description: The names and patterns of checkpoints that were asked for.
        type: list
        elements: str
      problem:
        description: What ended the work before its end, if anything did.
        type: str
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Keep what was healed
  ansible.builtin.set_fact:
    heal_result: "{{ {'work': healed, 'names': ['*']} | kvmfleet.qcow2.host_healed }}"
"""

RETURN = r"""
_value:
  description: The report as JSON, in which nothing looks like a template.
  type: str
"""

import typing as t

from ..plugin_utils._health.carried import as_text
from ..plugin_utils._health.healed import Work, host_healed
from ..plugin_utils._variables import texts


def make_host_healed(done: t.Mapping[str, t.Any]) -> str:
    """Return the report on a host. Whatever is wrong with it, what the module has returned is in it."""
    work = Work(done.get("work"), done.get("problem", ""), texts(done.get("names")), texts(done.get("checkpoints")))
    try:
        return as_text(host_healed(work))
    except Exception as exc:  # a bug, after the work was done
        result = work.result or {}
        why = f"The report could not be made: {type(exc).__name__}: {exc}. What the module returned is in `results`."
        return as_text({**host_healed(Work({"warnings": result.get("warnings")}, why)), "results": [result]})


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"host_healed": make_host_healed}
