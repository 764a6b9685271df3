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

ON_CONTROLLER = "controller"
ON_HOST = "host"
_TEMPLATE = re.compile(r"\{[{%#]")
_SHUT_OFF = "shut off"
_HEALABLE = ("not_in_top", "gap", "inconsistent")


class Command(t.NamedTuple):
    """A command for a shell."""

    command: str
    run_on: str  # ON_CONTROLLER or ON_HOST


def for_checkpoint(host: str, domain: Result, checkpoint: Result) -> Command | None:
    """Return what makes a checkpoint valid again where that is possible, or forgets it where its bitmaps are gone."""
    places = checkpoint["bitmaps"]
    disks = [one for one in domain["disks"] if one["target"] in places]
    if domain["state"] != _SHUT_OFF or not disks:
        return None
    lowest = [_lowest(one, places[one["target"]]) for one in disks]
    if not any(lowest) and not any("msg" in one for one in disks):
        return _forget(domain["uuid"], checkpoint["name"])
    # Where it begins it must be in order: from there on the images themselves tell what has changed.
    is_healable = all(one and one["recording"] and not one["inconsistent"] for one in lowest)
    if not is_healable or checkpoint["problem"] not in _HEALABLE or any(one["source"] is None for one in disks):
        return None
    names = sorted(set(places.values()))
    return _module(host, "qcow2_bitmap", {"paths": [one["source"] for one in disks], "names": names})


def for_orphans(host: str, domain: Result, orphans: Result) -> Command | None:
    """Return what removes bitmaps that no checkpoint refers to."""
    if domain["state"] != _SHUT_OFF:
        return None
    wanted = {"path": orphans["image"], "names": orphans["bitmaps"], "state": "absent"}
    return _module(host, "qcow2_bitmap", wanted)


def for_chain(host: str, domain: Result, disk: Result) -> Command | None:
    """Return what merges the lowest snapshot of a chain down."""
    lowest = next((one["snapshot"] for one in reversed(disk["images"]) if one["snapshot"] is not None), None)
    return for_snapshot(host, domain, lowest) if lowest is not None else None


def for_snapshot(host: str, domain: Result, snapshot: str) -> Command | None:
    """Return what merges a snapshot down."""
    if domain["state"] != _SHUT_OFF:
        return None
    wanted = {"name": [domain["name"]], "snapshot": snapshot, "state": "committed"}
    return _module(host, "domain_overlay", wanted)


def _lowest(disk: Result, bitmap: str) -> Result | None:
    """Return the bitmap as the lowest image of the disk has it."""
    found = [one for image in disk["images"] for one in image["bitmaps"] if one["name"] == bitmap]
    return found[-1] if found else None


def _module(host: str, module: str, options: Result) -> Command | None:
    """Return the command that calls a module. JSON spells out all that is not ASCII."""
    arguments = json.dumps(options)
    if _TEMPLATE.search(arguments) or not _is_plain(host):
        return None
    words = ["ansible", host, "-b", "-m", f"kvmfleet.qcow2.{module}", "-a", arguments]
    return Command(shlex.join(words), ON_CONTROLLER)


def _forget(uuid: str, checkpoint: str) -> Command | None:
    """Return the command that has libvirt forget a checkpoint."""
    words = ["virsh", "checkpoint-delete", "--metadata", uuid, checkpoint]
    return Command(shlex.join(words), ON_HOST) if _is_plain(checkpoint) else None


def _is_plain(word: str) -> bool:
    """Whether a word is for a terminal what it looks like, and no option."""
    return word.isascii() and word.isprintable() and not word.startswith("-")
