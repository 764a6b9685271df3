# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The names of the variables of role and playbooks, and what is most likely one of them misspelt."""

from __future__ import annotations

import ast
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
OF_HEALTH = (
    "health_allow_nothing",
    "health_become",
    "health_dirty_bytes",
    "health_domains",
    "health_fail_on",
    "health_hosts",
    "health_longest_chain",
    "health_metrics",
    "health_oldest_snapshot",
    "health_other_variables",
    "health_page",
    "health_report",
    "health_task_timeout",
    "health_uri",
    "health_without_backup",
)
OF_HEAL = (
    "heal_allow_nothing",
    "heal_assume_not_emptied",
    "heal_become",
    "heal_bitmap_content",
    "heal_checkpoints",
    "heal_domains",
    "heal_hosts",
    "heal_orphans",
    "heal_other_variables",
    "heal_page",
    "heal_page_before",
    "heal_report",
    "heal_running",
    "heal_task_timeout",
    "heal_unusable",
    "heal_uri",
)
_SPECS = pathlib.Path(__file__).parents[2] / "roles/overlay/meta/argument_specs.yml"
_NEAR = 0.7  # of 1, which is the same
_SAME_BUT_FOR_A_LETTER = 0.9


class Family(t.NamedTuple):
    """The variables of a playbook, which all begin with its name."""

    name: str
    of_playbook: t.Sequence[str]
    specs: pathlib.Path | None = None  # of its role

    @property
    def prefix(self) -> str:
        """The beginning of all names."""
        return f"{self.name}_"

    @property
    def others(self) -> str:
        """The name of the variable that lists the names of something else."""
        return f"{self.prefix}other_variables"

    @property
    def result(self) -> str:
        """The name of the fact that is set."""
        return f"{self.prefix}result"

    def begins(self, name: str) -> bool:
        """Whether a name begins as all of them."""
        return re.match(f"{self.name}[-_]", name, re.IGNORECASE) is not None

    def begins_nearly(self, name: str) -> bool:
        """Whether a name begins so but for a letter, but only of the same letters: overlap_ is something else."""
        length = len(self.name)
        return re.match(f"[{self.name}s]{{{length - 2},{length + 2}}}[-_]", name, re.IGNORECASE) is not None


FAMILIES = {
    one.name: one
    for one in (Family("overlay", OF_PLAYBOOK, _SPECS), Family("health", OF_HEALTH), Family("heal", OF_HEAL))
}


def as_list(names: t.Any) -> t.Any:
    """Return the list that a text is, such as `["web"]` from the command line; a pattern such as `[ab]*` is none."""
    try:
        value = ast.literal_eval(names) if isinstance(names, str) else names
    except (ValueError, SyntaxError):
        return names
    return value if isinstance(value, list) else names


def texts(value: t.Any) -> list[str]:
    """Return the items of a variable as texts. For YAML a name such as 101 or 2024-06-01 is none.

    `value`: a list, lists in it, a single item, a text with commas, as a survey gives it, or None.
    """
    items = as_list(value)
    # Ansible would split it, too, and leave the blanks, with which no name is found.
    return [one.strip() for one in items.split(",")] if isinstance(items, str) else list(map(str, _flat([items])))


def _flat(values: t.Iterable[t.Any]) -> t.Iterator[t.Any]:
    """Yield the items of lists in lists, without those that are None."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif value is not None:
            yield value


@functools.cache
def known_variables(family: str = "overlay") -> frozenset[str]:
    """Return the names that a playbook, and its role, know."""
    one = FAMILIES[family]
    spec = yaml_load(one.specs.read_text(encoding="utf-8"))["argument_specs"]["main"]["options"] if one.specs else ()
    return frozenset([*spec, *one.of_playbook, one.result])


def misspelt(names: t.Iterable[str], others: t.Container[str], family: Family) -> t.Iterator[tuple[str, str | None]]:
    """Yield each name that most likely is one of ours misspelt, with the nearest that is known, if any is near.

    `others`: names that belong to something else.
    """
    suspects = sorted({name for name in names if family.begins_nearly(name)})
    known = known_variables(family.name) if suspects else frozenset()
    for name in suspects:
        if name in known or name in others or any(name in known_variables(one) for one in FAMILIES):
            continue
        near = _nearest(name.lower().replace("-", "_"), known, family.prefix)
        if near or family.begins(name):
            yield name, near


def _nearest(name: str, known: t.Iterable[str], prefix: str) -> str | None:
    """Return the known name that is nearest, if it is near."""
    if not name.startswith(prefix):
        return next(iter(difflib.get_close_matches(name, known, 1, _SAME_BUT_FOR_A_LETTER)), None)
    # The beginning is that of all names, so it makes none near.
    ends = [one[len(prefix) :] for one in known]
    near = difflib.get_close_matches(name[len(prefix) :], ends, 1, _NEAR)
    return prefix + near[0] if near else None
