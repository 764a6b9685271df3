# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what somebody should see to of a domain, from what domain_info tells of it. Pure, on the controller."""

from __future__ import annotations

import fnmatch
import typing as t

from . import commands
from .commands import Place

Result = t.Mapping[str, t.Any]

# What a domain is worth, the worst first.
FULL = "full"  # only a full backup is possible
UNKNOWN = "unknown"
ATTENTION = "attention"  # an increment is possible, and something else should be seen to
OK = "ok"
LEFT_OUT = "left out"  # it is not to be backed up
HEALTHS = (FULL, UNKNOWN, ATTENTION, OK, LEFT_OUT)
INCREMENTAL = "incremental"  # as domain_info says it
SHUT_OFF = "shut off"
DAY = 24 * 60 * 60
_TOLD = 3  # other hosts that are named at most

FindingCode = t.Literal[
    "broken_checkpoint",
    "corrupt_image",
    "defined_twice",
    "full",
    "long_chain",
    "old_snapshot",
    "orphan_bitmaps",
    "unfinished",
    "unknown",
    "unreadable_disk",
]


class Limits(t.NamedTuple):
    """What is still fine, and what is not looked at."""

    longest_chain: int = 0  # images; 0 is no limit
    oldest_snapshot: float = 0  # days; 0 is no limit
    without_backup: tuple[str, ...] = ()  # names and patterns of domains that are not to be backed up


class Finding(t.NamedTuple):
    """Something that somebody should see to."""

    code: FindingCode
    msg: str
    command: str | None = None  # for a shell on the controller


def domain_health(place: Place, domain: Result, limits: Limits, now: float) -> dict[str, t.Any]:
    """Return what the report says of a domain, besides what domain_info does. `now`: seconds since 1970."""
    is_left_out = any(fnmatch.fnmatchcase(domain["name"], one) for one in limits.without_backup)
    findings = [*([] if is_left_out else _of_backup(domain)), *_of_rest(place, domain, limits, now)]
    taken = [one["taken"] for one in snapshots(domain) if one["taken"] is not None]
    since = domain["next_backup_since"]
    increment = (one["dirty_bytes"] for one in domain["checkpoints"] if one["name"] == since)
    return {
        "health": LEFT_OUT if is_left_out else _health(domain["next_backup"], findings),
        "increment_bytes": next(increment, None),
        "longest_chain": max((len(disk["images"]) for disk in domain["disks"]), default=0),
        "oldest_snapshot": min(taken, default=None),
        "snapshot_bytes": sum(one["bytes"] for one in snapshots(domain)),
        "findings": [one._asdict() for one in findings],
    }


def defined_twice(judged: Result, others: t.Sequence[str]) -> dict[str, t.Any]:
    """Return the report on a domain that is defined on other hosts, too."""
    more = f" and {len(others) - _TOLD} more" if len(others) > _TOLD else ""
    msg = (
        f"Its UUID is that of a domain on {', '.join(others[:_TOLD])}{more}, too. What a run changes on one host, the "
        "definition on the other does not follow, and its VM would start on an old or a missing image. Undefine it "
        "where it does not belong, which deletes no disk; or name a host only once in the inventory."
    )
    # No command for it: it would be done by one definition alone.
    findings = [Finding("defined_twice", msg)._asdict(), *({**one, "command": None} for one in judged["findings"])]
    return {**judged, "health": ATTENTION if judged["health"] == OK else judged["health"], "findings": findings}


def snapshots(domain: Result) -> list[dict[str, t.Any]]:
    """Return the snapshots of a domain: name, disk, when each was taken (None if unknown), and how much it holds."""
    found = []
    for disk in domain["disks"]:
        written = [image["modified"] for image in disk["images"]]
        for image, below in zip(disk["images"], [*written[1:], None]):
            if image["snapshot"] is not None:
                # A snapshot's time is the last write to the image below it before it was made.
                made = image.get("made")  # a report that is carried over can be of a version that did not tell
                taken = below if below is None or made is None else min(below, made)
                size = image["actual_size"] or 0
                found.append({"name": image["snapshot"], "target": disk["target"], "taken": taken, "bytes": size})
    return found


def _health(next_backup: str, findings: t.Sequence[Finding]) -> str:
    """Return what a domain is worth."""
    if next_backup != INCREMENTAL:
        return FULL if next_backup == FULL else UNKNOWN
    return ATTENTION if findings else OK


def _of_backup(domain: Result) -> t.Iterator[Finding]:
    """Yield why the next backup cannot be an increment."""
    if domain["next_backup"] != INCREMENTAL:
        yield Finding("full" if domain["next_backup"] == FULL else "unknown", domain["next_backup_reason"])


def _of_rest(place: Place, domain: Result, limits: Limits, now: float) -> t.Iterator[Finding]:
    """Yield what else is wrong."""
    for disk in domain["disks"]:
        if "msg" in disk:
            yield Finding("unreadable_disk", f"{disk['target']}: {disk['msg']}")
        yield from _corrupt_below(disk)
    for one in domain["unfinished"]:
        where = f"{one['image']}: " if one["image"] else ""
        msg = f"{where}{one['what']}. {one['completed_by']}"
        yield Finding("unfinished", msg, commands.for_unfinished(place, domain, one))
    broken = [one for one in domain["checkpoints"] if one["valid"] is False]
    mended = commands.for_checkpoints(place, domain) if broken else {}
    for checkpoint in broken:
        where = f" in {checkpoint['image']}" if checkpoint["image"] else ""
        msg = f"{checkpoint['name']} ({checkpoint['problem']}{where}): {checkpoint['advice']}"
        yield Finding("broken_checkpoint", msg, mended.get(checkpoint["name"]))
    if domain["orphan_bitmaps"]:
        named = [f"{', '.join(one['bitmaps'])} in {one['image']}" for one in domain["orphan_bitmaps"]]
        msg = f"No checkpoint refers to {'; '.join(named)}. libvirt makes no use of such a bitmap."
        yield Finding("orphan_bitmaps", msg, commands.for_orphans(place, domain))
    yield from _beyond(place, domain, limits, now)


def _corrupt_below(disk: Result) -> t.Iterator[Finding]:
    """Yield which images below the topmost one are marked corrupt; with a topmost one the disk cannot be read."""
    for image in disk["images"][1:]:
        if image["corrupt"]:
            msg = (
                f"{disk['target']}: {image['path']} is marked corrupt. QEMU reads it nevertheless, but a merge "
                "into it is refused. Repair it with 'qemu-img check -r all' while no VM uses it, or restore it."
            )
            yield Finding("corrupt_image", msg)


def _beyond(place: Place, domain: Result, limits: Limits, now: float) -> t.Iterator[Finding]:
    """Yield which limits a domain exceeds."""
    for disk in domain["disks"]:
        length = len(disk["images"])
        if 0 < limits.longest_chain < length:
            msg = f"{disk['target']}: the chain has {length} images, more than {limits.longest_chain}."
            yield Finding("long_chain", msg, commands.for_chain(place, domain, disk))
    told = set[str]()
    for one in snapshots(domain):
        age = (now - one["taken"]) / DAY if one["taken"] is not None else 0
        if 0 < limits.oldest_snapshot < age and one["name"] not in told:
            told.add(one["name"])
            msg = f"The snapshot {one['name']} is {age:.1f} days old, more than {limits.oldest_snapshot:g}."
            yield Finding("old_snapshot", msg, commands.for_snapshot(place, domain, one["name"]))
