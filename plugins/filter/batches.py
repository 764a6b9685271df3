# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make what a play takes as serial from a text."""

from __future__ import annotations

DOCUMENTATION = r"""
name: batches
short_description: Make what a play takes as serial from a number, a percentage, a list, or any of these as text
version_added: 1.0.0
description:
  - The playbook C(kvmfleet.qcow2.overlay) uses it. A text is all that a survey of AWX, or C(-e name=value), can give.
options:
  _input:
    description: Hosts at a time, such as V(3), V(50%), V(1\,10\,25%) or V([1\, 10\, "25%"]). An empty text is all.
    type: raw
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: One host first, then the rest by quarters
  hosts: hypervisors
  serial: "{{ '1,25%' | kvmfleet.qcow2.batches }}"
  tasks: []
"""

RETURN = r"""
_value:
  description: The sizes of the batches, as numbers and percentages.
  type: list
  elements: raw
  sample: [1, "25%"]
"""

import re
import typing as t

from ansible.errors import AnsibleFilterError

_SIZE = re.compile(r"[1-9][0-9]*%?")


def batches(value: t.Any) -> list[int | str]:
    """Return the sizes of the batches."""
    # Of a list as text the brackets and quotation marks say nothing that the commas do not.
    sizes = re.sub(r"[\[\]'\"]", "", value).split(",") if isinstance(value, str) else value
    sizes = sizes if isinstance(sizes, list) else [sizes]
    found = [str(size).strip() for size in sizes]
    if found == [""]:
        return ["100%"]
    if not found or not all(map(_SIZE.fullmatch, found)):
        # A zero would be all hosts at once for Ansible.
        words = "must be a number of hosts from 1 on, or a percentage such as 25%, or several of these as in 1,10,25%"
        raise AnsibleFilterError(f"serial={value!r}: {words}")
    return [size if size.endswith("%") else int(size) for size in found]


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"batches": batches}
