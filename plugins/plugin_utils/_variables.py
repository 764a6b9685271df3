# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The names of the variables of role and playbook, and what is most likely one of them misspelt."""

from __future__ import annotations

import difflib
import functools
import pathlib
import re
import typing as t

from ansible.module_utils.common.yaml import yaml_load

OF_PLAYBOOK = (
    "overlay_allow_nothing",
    "overlay_become",
    "overlay_hosts",
    "overlay_max_fail_percentage",
    "overlay_report",
    "overlay_retry_file",
    "overlay_serial",
)
RESULT = "overlay_result"  # a fact that the role sets
OTHERS = "overlay_other_variables"
_SPECS = pathlib.Path(__file__).parents[2] / "roles/overlay/meta/argument_specs.yml"
# The beginning may be misspelt, too, but only of its own letters: overlap_ is something else.
_LIKE_OURS = re.compile(r"[overlays]{5,9}[-_]", re.IGNORECASE)
_OURS = re.compile(r"overlay[-_]", re.IGNORECASE)
_PREFIX = "overlay_"
_NEAR = 0.7  # of 1, which is the same
_SAME_BUT_FOR_A_LETTER = 0.9


def texts(value: t.Any) -> list[str]:
    """Return the items of a variable as texts. For YAML a name such as 101 or 2024-06-01 is none.

    `value`: a list, a single item, a text with commas, as a survey gives it, or None.
    """
    if isinstance(value, str):
        return [text.strip() for text in value.split(",")]
    items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return [str(item) for item in items]


@functools.lru_cache(maxsize=1)
def known_variables() -> frozenset[str]:
    """Return the names that role and playbook know."""
    spec = yaml_load(_SPECS.read_text(encoding="utf-8"))
    return frozenset([*spec["argument_specs"]["main"]["options"], *OF_PLAYBOOK, RESULT])


def misspelt(names: t.Iterable[str], others: t.Container[str]) -> t.Iterator[tuple[str, str | None]]:
    """Yield each name that most likely is one of ours misspelt, with the nearest that is known, if any is near.

    `others`: names that belong to something else.
    """
    suspects = sorted({name for name in names if _LIKE_OURS.match(name)})
    known = known_variables() if suspects else frozenset()
    for name in suspects:
        if name in known or name in others:
            continue
        near = _nearest(name.lower().replace("-", "_"), known)
        if near or _OURS.match(name):
            yield name, near


def _nearest(name: str, known: t.Iterable[str]) -> str | None:
    """Return the known name that is nearest, if it is near."""
    if not name.startswith(_PREFIX):
        return next(iter(difflib.get_close_matches(name, known, 1, _SAME_BUT_FOR_A_LETTER)), None)
    # The beginning is that of all names, so it makes none near.
    ends = [one[len(_PREFIX) :] for one in known]
    near = difflib.get_close_matches(name[len(_PREFIX) :], ends, 1, _NEAR)
    return _PREFIX + near[0] if near else None
