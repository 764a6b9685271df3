# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the names that a module takes from what a variable has."""

from __future__ import annotations

DOCUMENTATION = r"""
name: names
short_description: Make a list of names from a list, a single name, or any of these as text
version_added: 1.1.0
description:
  - The playbooks C(kvmfleet.qcow2.health) and C(kvmfleet.qcow2.heal) use it. Of a text with commas Ansible leaves the
    blanks in the names when it makes a list for a module, and no domain is found by such a name.
options:
  _input:
    description: Names, such as V([web*\, db*]), V(web*\, db*) or V(101). An empty text is one empty name.
    type: raw
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Look at the domains of which a survey has the names
  kvmfleet.qcow2.domain_info:
    name: "{{ 'web*, db*' | kvmfleet.qcow2.names }}"
"""

RETURN = r"""
_value:
  description: The names, all of them texts. Items of a list stay as they are.
  type: list
  elements: str
  sample: ["web*", "db*"]
"""

import typing as t

from ..plugin_utils._variables import texts


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"names": texts}
