# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Rows of the report: what the modules returned of each overlay."""

from __future__ import annotations

import typing as t

from ...module_utils._disk.verdict import FAILED, examined_image

Result = t.Mapping[str, t.Any]  # what a module returned, or what Ansible says in its place

# What can be wrong of which no module tells. docs/refusals.md has the same words, with what to do.
ReportCode = t.Literal[
    "module_failed",
    "no_backup",
    "no_match",
    "not_begun",
    "not_run",
    "nothing_done",
    "task_failed",
    "unreachable",
    "unstable",
]

_MODULE_FAILED: ReportCode = "module_failed"
_CONSEQUENCES = (None, "group_failed", "held_back")  # codes that only follow from another problem


class Problem(t.NamedTuple):
    """Something that is wrong with a host."""

    code: str  # of the refusal that a module returned, or a ReportCode
    msg: str


class Found(t.NamedTuple):
    """What the results of one module tell."""

    overlays: t.Sequence[Result]
    skipped_disks: t.Sequence[Result]
    problems: t.Sequence[Problem]
    checkpoints: t.Sequence[tuple[str, Result]]  # those of libvirt, with the name of the domain
    picked_snapshots: t.Sequence[Result] = ()  # that are merged down since they are old
    lost_checkpoints: t.Sequence[Result] = ()  # that went with the overlays of a domain that has gone back


def problem(code: ReportCode, msg: str) -> Problem:
    """Return a problem of which no module tells."""
    return Problem(code, msg)


def from_disks(result: Result | None, check_mode: bool) -> Found:
    """Return what qcow2_overlay tells."""
    if result is None or "overlays" not in result:
        return found_nothing(result)
    overlays = [_row(overlay, None, check_mode) for overlay in result["overlays"]]
    # What only follows from another problem is told with the overlay alone.
    failed = [one for one in overlays if one.get("code") not in _CONSEQUENCES]
    return Found(overlays, [], [Problem(one["code"], one["msg"]) for one in failed], [])


def from_domains(result: Result | None, check_mode: bool) -> Found:
    """Return what domain_overlay tells."""
    if result is None or "domains" not in result:
        return found_nothing(result)
    domains = result["domains"]
    overlays = [_row(overlay, domain, check_mode) for domain in domains for overlay in domain["overlays"]]
    failed = [domain for domain in domains if domain["state"] == FAILED and not domain["overlays"]]
    overlays += [_row(None, domain, check_mode) for domain in failed]
    # Of a domain that failed nothing was made, so nothing is missed.
    missed = {domain["name"]: domain["unfit_disks"] for domain in domains if domain["state"] != FAILED}
    skipped = [
        {"domain": domain["name"], **disk, "unfit": disk["target"] in missed.get(domain["name"], ())}
        for domain in domains
        for disk in domain["skipped_disks"]
    ]
    checkpoints = [(domain["name"], checkpoint) for domain in domains for checkpoint in domain["checkpoints"]]
    lost = [{"domain": one["name"], "checkpoint": name} for one in domains for name in one.get("lost_checkpoints", ())]
    wrong = [Problem(one["code"], one["msg"]) for one in domains if one.get("code") not in _CONSEQUENCES]
    picked = [{"domain": one["name"], **old} for one in domains for old in one.get("picked_snapshots", ())]
    return Found(overlays, skipped, wrong, checkpoints, picked, lost)


def found_nothing(result: Result | None) -> Found:
    """Return what is told by a step that was not taken, or by one that returned nothing of use."""
    return Found([], [], [] if result is None else [reason(result)], [])


def _row(overlay: Result | None, domain: Result | None, check_mode: bool) -> dict[str, t.Any]:
    """Return what the report says of one overlay, or of a domain that did not get as far as overlays."""
    source: Result = overlay or {"path": None, "backing_file": None}
    # What belongs to a domain that failed is not in use, whatever became of it by itself.
    is_lost = domain is not None and domain["state"] == FAILED
    state = FAILED if is_lost else source["state"]
    failure: Result = domain if domain is not None else source
    return {
        "domain": domain["name"] if domain is not None else None,
        "path": source["path"],
        "backing_file": source["backing_file"],
        "examine": examined_image(source, is_planned=check_mode) if state != FAILED else source["path"],
        "state": state,
        "kept_as": source.get("kept_as"),
        "bitmaps": [bitmap["name"] for bitmap in source.get("bitmaps", ())] if state != FAILED else [],
        "skipped_bitmaps": [
            {"name": bitmap["name"], "reason": bitmap["reason"]} for bitmap in source.get("skipped_bitmaps", ())
        ],
        **({"msg": failure.get("msg"), "code": failure.get("code")} if state == FAILED else {}),
    }


def reason(result: Result) -> Problem:
    """Return why a module returned nothing of use."""
    if result.get("unreachable"):
        return problem("unreachable", _words(result))
    return Problem(result.get("code") or _MODULE_FAILED, _words(result))


def _words(result: Result) -> str:
    """Return the words in which a module, or Ansible in its place, failed."""
    words = str(result.get("msg") or "No reason was given.").strip()
    details = str(result.get("module_stderr") or "").strip().splitlines()  # such as what an old Python says
    return f"{words} {details[-1]}" if details and details[-1] not in words else words
