# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rows of the report: what the modules returned of each overlay."""

from __future__ import annotations

import typing as t

from ...module_utils._disk.verdict import CREATED, FAILED

Result = t.Mapping[str, t.Any]  # what a module returned, or what Ansible says in its place


class Found(t.NamedTuple):
    """What the results of one module tell."""

    overlays: list[dict[str, t.Any]]
    skipped_disks: list[dict[str, t.Any]]
    problems: list[str]
    checkpoints: list[tuple[str, dict[str, t.Any]]]  # those of libvirt, with the name of the domain


def from_disks(result: Result | None, check_mode: bool) -> Found:
    """Return what qcow2_overlay tells."""
    if result is None or "overlays" not in result:
        return found_nothing(result)
    overlays = [_overlay(overlay, None, check_mode) for overlay in result["overlays"]]
    return Found(overlays, [], [overlay["msg"] for overlay in overlays if "msg" in overlay], [])


def from_domains(result: Result | None, check_mode: bool) -> Found:
    """Return what domain_overlay tells."""
    if result is None or "domains" not in result:
        return found_nothing(result)
    domains = result["domains"]
    overlays = [_overlay(overlay, domain, check_mode) for domain in domains for overlay in domain["overlays"]]
    failed = [domain for domain in domains if domain["state"] == FAILED and not domain["overlays"]]
    overlays += [_overlay(None, domain, check_mode) for domain in failed]
    skipped = [{"domain": domain["name"], **disk} for domain in domains for disk in domain["skipped_disks"]]
    checkpoints = [(domain["name"], checkpoint) for domain in domains for checkpoint in domain["checkpoints"]]
    return Found(overlays, skipped, [domain["msg"] for domain in domains if "msg" in domain], checkpoints)


def found_nothing(result: Result | None) -> Found:
    """Return what is told by a step that was not taken, or by one that returned nothing of use."""
    return Found([], [], [] if result is None else [reason(result)], [])


def _overlay(overlay: Result | None, domain: Result | None, check_mode: bool) -> dict[str, t.Any]:
    """Return what the report says of one overlay, or of a domain that did not get as far as overlays."""
    source: Result = overlay or {"path": None, "backing_file": None, "bitmaps": [], "skipped_bitmaps": []}
    # What belongs to a domain that failed is not in use, whatever became of it by itself.
    is_lost = domain is not None and domain["state"] == FAILED
    state = FAILED if is_lost else source["state"]
    message = domain.get("msg") if domain is not None else source.get("msg")
    return {
        "domain": domain["name"] if domain is not None else None,
        "path": source["path"],
        "backing_file": source["backing_file"],
        # Of which the chain tells: the topmost image, which in check mode is not there yet.
        "examine": source["backing_file"] if check_mode and state == CREATED else source.get("topmost", source["path"]),
        "state": state,
        "bitmaps": [bitmap["name"] for bitmap in source["bitmaps"]] if state != FAILED else [],
        "skipped_bitmaps": [
            {"name": bitmap["name"], "reason": bitmap["reason"]} for bitmap in source["skipped_bitmaps"]
        ],
        **({"msg": message} if state == FAILED else {}),
    }


def reason(result: Result) -> str:
    """Return why a module returned nothing of use."""
    reason = str(result.get("msg") or "No reason was given.").strip()
    details = str(result.get("module_stderr") or "").strip().splitlines()  # such as what an old Python says
    return f"{reason} {details[-1]}" if details and details[-1] not in reason else reason
