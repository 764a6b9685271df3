# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: the command that mends what is wrong with a domain, for a person to copy.

The names in it are the choice of whoever made the domain. A command is None if a shell, a terminal or Ansible's
templates could take a name in it for something else; and if it would be refused, as on a domain that runs.
"""

from __future__ import annotations

import json
import re
import shlex
import typing as t

Result = t.Mapping[str, t.Any]

_OF_PATTERNS = re.compile(r"[*?[]|\A\s|\s\Z")  # what a module does not take for a part of a name
_TEMPLATE = re.compile(r"\{[{%#]")
_HOST = re.compile(r"[\w.][\w.:-]*", re.ASCII)  # that is no pattern of hosts
_USUAL_URI = "qemu:///system"
_SHUT_OFF = "shut off"
_HEAL: t.Mapping[str, str] = {}
_REMOVE = {"unusable": "remove"}
_HEALABLE = ("not_in_top", "gap", "inconsistent")


class Place(t.NamedTuple):
    """Where a domain is."""

    host: str  # its name in the inventory
    uri: str = ""  # of the libvirt daemon, if any is given


def for_checkpoints(place: Place, domain: Result) -> dict[str, str | None]:
    """Return by checkpoint what makes it valid again where that is possible, or removes it where its bitmaps are gone.

    It does so for all checkpoints of the domain of which the same is true: they are mostly broken together.
    """
    # The lowest image comes last, so its bitmap stays.
    lowest = {
        disk["target"]: {one["name"]: one for image in disk["images"] for one in image["bitmaps"]}
        for disk in domain["disks"]
    }
    remedies = {one["name"]: _remedy(domain, one, lowest) for one in domain["checkpoints"]}
    found: dict[str, str | None] = {}
    for remedy in (_HEAL, _REMOVE):
        names = [name for name, its in remedies.items() if its == remedy]
        wanted = {"checkpoints": list(map(_alone, names)), **remedy}
        found.update(dict.fromkeys(names, _of_domain(place, domain, "domain_checkpoint", wanted)))
    return found


def for_orphans(place: Place, domain: Result) -> str | None:
    """Return what removes the bitmaps of a domain that no checkpoint refers to."""
    if domain["unfinished"]:
        return None
    return _of_domain(place, domain, "domain_checkpoint", {"checkpoints": [], "orphans": "remove"})


def for_unfinished(place: Place, domain: Result, unfinished: Result) -> str | None:
    """Return what completes the work that a killed run has begun."""
    if unfinished["kind"] == "healing":
        return _of_domain(place, domain, "domain_checkpoint", {})
    snapshot = unfinished["snapshot"]  # of a guest that was left frozen there is none
    return _merge(place, domain, snapshot) if snapshot is not None else None


def for_chain(place: Place, domain: Result, disk: Result) -> str | None:
    """Return what merges the lowest snapshot of a chain down."""
    lowest = next((one["snapshot"] for one in reversed(disk["images"]) if one["snapshot"] is not None), None)
    return for_snapshot(place, domain, lowest) if lowest is not None else None


def for_snapshot(place: Place, domain: Result, snapshot: str) -> str | None:
    """Return what merges a snapshot down."""
    merges = (one for one in domain["unfinished"] if one["kind"] != "quiesce")
    is_other = any(one["snapshot"] != snapshot for one in merges)  # which has to be completed first
    return None if is_other else _merge(place, domain, snapshot)


def _remedy(
    domain: Result, checkpoint: Result, lowest: t.Mapping[str, t.Mapping[str, Result]]
) -> t.Mapping[str, str] | None:
    """Return the options that mend a checkpoint; None if none does. `lowest`: bitmaps by disk and name."""
    places = checkpoint["bitmaps"]
    disks = [one for one in domain["disks"] if one["target"] in places]
    if checkpoint["valid"] is not False or not disks or domain["unfinished"]:
        return None
    begun = [lowest[one["target"]].get(places[one["target"]]) for one in disks]
    if not any(begun):
        return _REMOVE
    # Where it begins it must be in order: from there on the images themselves tell what has changed.
    is_healable = all(one and one["recording"] and not one["inconsistent"] for one in begun)
    return _HEAL if is_healable and checkpoint["problem"] in _HEALABLE else None


def _merge(place: Place, domain: Result, snapshot: str) -> str | None:
    """Return what merges a snapshot down, whatever else is unfinished."""
    if domain["libvirt_snapshots"]:
        return None
    return _of_domain(place, domain, "domain_overlay", {"snapshot": snapshot, "state": "committed"})


def _of_domain(place: Place, domain: Result, module: str, options: Result) -> str | None:
    """Return the command that calls a module for a domain. JSON spells out all that is not ASCII."""
    of_daemon = {"uri": place.uri} if place.uri not in ("", _USUAL_URI) else {}
    arguments = json.dumps({"name": [_alone(domain["name"])], **options, **of_daemon})
    is_whole = all("msg" not in one for one in domain["disks"])
    would_be_done = domain["state"] == _SHUT_OFF and not domain["managed_save"] and is_whole
    if not would_be_done or _TEMPLATE.search(arguments) or not _HOST.fullmatch(place.host):
        return None
    words = ["ansible", place.host, "-b", "-m", f"kvmfleet.qcow2.{module}", "-a", arguments]
    return shlex.join(words)


def _alone(name: str) -> str:
    """Return what a module takes for this name and no other, if need be a pattern.

    With a slash, which libvirt forbids in names: what glob.escape() returns may be the name of something else.
    """
    return _OF_PATTERNS.sub(r"[\g<0>/]", name)
