# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell which variables are most likely misspelt ones of a playbook of this collection."""

from __future__ import annotations

DOCUMENTATION = r"""
name: unknown_variables
short_description: Tell which variables are most likely misspelt ones of a playbook of this collection
version_added: 1.0.0
description:
  - The role P(kvmfleet.qcow2.overlay#role) and the playbooks C(kvmfleet.qcow2.overlay), C(kvmfleet.qcow2.health) and
    C(kvmfleet.qcow2.heal) use it. What is misspelt has no effect, and the run would be wider than meant.
  - A name is told if it begins with C(overlay_), or whatever O(family) says, in whatever case and also with C(-) for
    C(_), and neither role nor playbook knows it. Also if it is one of theirs but for a letter, such as
    C(ovelay_domains).
positional: others, hosts, family
options:
  _input:
    description: Names of variables.
    type: list
    elements: str
    required: true
  others:
    description: Names that belong to something else.
    type: list
    elements: str
    default: []
  hosts:
    description:
      - Variables of each host, whose names are looked at, too. For a host its own C(overlay_other_variables) counts
        besides O(others).
    type: list
    elements: dict
    default: []
  family:
    description: The playbook, by whose name the variables begin.
    type: str
    choices: [overlay, health, heal]
    default: overlay
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Refuse what nobody will read
  ansible.builtin.assert:
    that: __unknown | length == 0
    fail_msg: "{{ __unknown | join(' ') }}"
  vars:
    __unknown: "{{ query('ansible.builtin.varnames', '.') | kvmfleet.qcow2.unknown_variables }}"
"""

RETURN = r"""
_value:
  description: A sentence for each such name, with the one that is known and near, if any is. None is an empty list.
  type: list
  elements: str
  sample:
    - >-
      overlay_domain: no variable of this name is known. Is it overlay_domains?
      If it belongs to something else, name it in overlay_other_variables.
"""

import typing as t

from ..plugin_utils._variables import FAMILIES, misspelt, texts


def unknown_variables(
    names: t.Iterable[str],
    others: str | t.Sequence[str] = (),
    hosts: t.Iterable[t.Mapping[str, t.Any]] = (),
    family: str = "overlay",
) -> list[str]:
    """Return a sentence for each name."""
    ours, everywhere = FAMILIES[family], texts(others)
    unknown = dict(misspelt(names, everywhere, ours))
    for variables in hosts:
        unknown.update(misspelt(variables, [*everywhere, *texts(variables.get(ours.others))], ours))
    return [_sentence(name, unknown[name], ours.others) for name in sorted(unknown)]


def _sentence(name: str, near: str | None, others: str) -> str:
    """Return what is wrong with a name, and what to do."""
    question = f"Is it {near}? " if near else ""
    way_out = f"If it belongs to something else, name it in {others}."
    return f"{name}: no variable of this name is known. {question}{way_out}"


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"unknown_variables": unknown_variables}
