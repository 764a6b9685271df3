# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Reports as Ansible carries them from task to task: as JSON.

Ansible looks into everything that a variable holds, at each use. For 20,000 domains that takes minutes; a text takes
none.
"""

from __future__ import annotations

import json
import re
import typing as t

# Only within a string of JSON, so it can be spelt out: names are the choice of others, and a template is a program.
_TEMPLATE = re.compile(r"\{(?=[{%#])")


def as_text(report: t.Mapping[str, t.Any]) -> str:
    """Return a report as JSON, in which nothing looks like a template."""
    return _TEMPLATE.sub(r"\\u007b", json.dumps(report, separators=(",", ":")))


def from_text(report: str | t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return a report from JSON. One that is read already does, too."""
    return t.cast("dict[str, t.Any]", json.loads(report) if isinstance(report, str) else report)
