# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What a host is asked for by the variables of the role, and with which options the modules do it. Pure."""

from __future__ import annotations

import re
import typing as t

from ansible.module_utils.parsing.convert_bool import boolean

from ._variables import texts

DISKS, DOMAINS = "qcow2_overlay", "domain_overlay"  # the modules, in the order in which they are called
PRESENT, COMMITTED, REVERTED = "present", "committed", "reverted"
PREFIX = "overlay_"  # of the variables

_ANY = (PRESENT, COMMITTED, REVERTED)
_OF_NEW_OVERLAYS = (
    "bitmap_content",
    "relative",
    "cluster_size",
    "extended_l2",
    "lazy_refcounts",
    "refcount_bits",
    "compression_type",
    "owner",
    "group",
    "mode",
    "seuser",
    "serole",
    "setype",
    "selevel",
)
# Options of the modules, and in which states they have a meaning. In another one an option is left out, so that the
# inventory can have what is meant for that. The variable of an option is named as it is, but for RENAMED.
_OF_BOTH = {
    "timeout": _ANY,
    "retire": (COMMITTED, REVERTED),
    "speed": (COMMITTED,),
    **dict.fromkeys(_OF_NEW_OVERLAYS, (PRESENT,)),
}
OPTIONS: t.Mapping[str, t.Mapping[str, t.Sequence[str]]] = {
    DISKS: {**_OF_BOTH, "parallel": (COMMITTED,), "accept_lost_bitmaps": (COMMITTED,)},
    DOMAINS: {
        **_OF_BOTH,
        "disks": _ANY,
        "directory": _ANY,
        "running": _ANY,
        "uri": _ANY,
        "older_than": (COMMITTED,),
        "keep": (COMMITTED,),
        "quiesce": (PRESENT,),
        "libvirt_snapshots": (PRESENT, REVERTED),
        "unfit_disks": (PRESENT,),
        "confirm_all": (REVERTED,),
    },
}
RENAMED = {"disks": "targets"}  # overlay_disks are the disks that are managed without libvirt
# Variables that are no options of a module.
_OF_THE_ROLE = ("snapshot", "domains", "disks", "all_or_none", "task_timeout", "progress", "install")


class Asked(t.NamedTuple):
    """What a host is asked for."""

    state: str
    options: t.Mapping[str, t.Mapping[str, t.Any]]  # by module, of those that are to be called
    domains: list[str]  # names and patterns
    all_or_none: bool
    installs: bool  # what is missing
    timeout: int  # seconds that a call may take; 0 for no limit
    progress: bool  # whether to show how far merges are
    mistake: str  # in words; empty if there is none


def variables(state: str) -> list[str]:
    """Return the names of the variables that have a meaning in a state, without PREFIX."""
    options = [RENAMED.get(name, name) for of in OPTIONS.values() for name in of if state in of[name]]
    return list(dict.fromkeys([*_OF_THE_ROLE, *options]))


def asked(state: str, given: t.Mapping[str, t.Any], unknown: t.Sequence[str]) -> Asked:
    """Return what is asked for by the values of variables(), of those that are set.

    `unknown`: a sentence for each variable that is most likely misspelt.
    """
    # An empty key is as none at all; but for the name of the snapshot, which was forgotten.
    given = {name: value for name, value in given.items() if value is not None or name == "snapshot"}
    picks = state == COMMITTED and ("older_than" in given or "keep" in given)
    domains = texts(given.get("domains", ["*"] if "snapshot" in given or picks else []))
    if "targets" in given:
        given["targets"] = texts(given["targets"])
    disks = given.get("disks") or []
    seconds = str(given.get("task_timeout") or 0)
    options = {}
    if disks:
        options[DISKS] = {"overlays": disks, **_options(DISKS, state, given)}
    if domains:
        # As a text, since YAML takes a name such as 101 or 2024-06-01 for something else.
        snapshot = {"snapshot": str(given["snapshot"])} if "snapshot" in given else {}
        options[DOMAINS] = {"name": domains, **snapshot, **_options(DOMAINS, state, given)}
    return Asked(
        state,
        options,
        domains,
        boolean(given.get("all_or_none") or False),  # an empty text is none
        boolean(given.get("install") or False),
        int(seconds) if seconds.isdecimal() else 0,
        given.get("progress", "") == "" or boolean(given["progress"]),
        " ".join(unknown) or _no_such_state(state) or _mistake(given, domains, picks=picks),
    )


def _options(module: str, state: str, given: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return the options of a module that have a meaning in a state."""
    of_module = {option: RENAMED.get(option, option) for option, of in OPTIONS[module].items() if state in of}
    if given.get("running") != "live":
        of_module.pop("quiesce", None)
    options = {option: given[name] for option, name in of_module.items() if name in given}
    return {"state": state, **options}


def _no_such_state(state: str) -> str:
    """Return that the state is none; empty if it is one."""
    return "" if state in _ANY else f"overlay_state={state} must be one of {', '.join(_ANY)}."


def _mistake(given: t.Mapping[str, t.Any], domains: list[str], *, picks: bool) -> str:
    """Return what is wrong with the wish. An empty list is an answer; nothing at all is most likely a mistake."""
    if not str(given.get("task_timeout") or 0).isdecimal():
        return f"overlay_task_timeout={given['task_timeout']} must be a number of seconds."
    if domains == [""]:  # as of a survey; who means all of them says so
        return "overlay_domains is empty. Name domains, or leave it out for all of them."
    for name, names in (("domains", domains), ("targets", given.get("targets", ()))):
        if not all(one.strip() for one in names):
            why = "as a comma too many makes it, or with -e a blank that is not in quotation marks"
            return f"overlay_{name} has an empty name in it, {why}. Leave that out."
    if "snapshot" in given:
        snapshot = given["snapshot"]
        if snapshot is None or not str(snapshot).strip():
            return "overlay_snapshot is empty. Give it a name."
        if not _is_as_written(snapshot):
            how = "and may have been written otherwise. Put it in quotation marks."
            return f"overlay_snapshot is {snapshot} for YAML, {how}"
        return "Give overlay_snapshot, or overlay_older_than and overlay_keep, and not both." if picks else ""
    if picks or ("disks" in given and not domains):
        return ""
    if domains:
        return "overlay_domains needs overlay_snapshot, the name of the snapshot."
    return "Nothing was asked for. Set overlay_snapshot, or overlay_disks."


def _is_as_written(name: t.Any) -> bool:
    """Whether YAML has not changed a name: not 1.10, which is 1.1 then, a truth value, or a date with a time."""
    if isinstance(name, (bool, float)):
        return False
    return isinstance(name, (str, int)) or re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}$", str(name)) is not None
