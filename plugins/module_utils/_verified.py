# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The option verify: look, make, look again from scratch, and judge the chains, all in one call of a module.

Over a fleet a remote execution costs more than all that is done in it. So what would be three calls (check mode, the
run, check mode again) and one of qcow2_info is one, and its result has what each of them would have returned.
"""

from __future__ import annotations

import typing as t

from ._base.errors import Refusal
from ._disk.examine import examine_chain
from ._disk.session import Settings
from ._disk.verdict import AFTER, FAILED, SKIPPED, examined_image, problem_fields
from ._module import Report

Result = t.Mapping[str, t.Any]
Once = t.Callable[[Settings], Report]  # one call as it is without the option


def verify_spec() -> dict[str, t.Any]:
    """Return the argument spec of the options."""
    return {"verify": {"type": "bool", "default": False}, "all_or_none": {"type": "bool", "default": False}}


def verified(once: Once, settings: Settings, params: t.Mapping[str, t.Any], items: str) -> Report:
    """Do it as the options ask for; `items` is the name of the list in the result."""
    if params["all_or_none"] and not params["verify"]:
        raise Refusal("bad_option", "all_or_none=True", "has no meaning without verify", "Leave it out.")
    if not params["verify"]:
        return once(settings)
    look = settings._replace(check_mode=True)
    preflight = once(look)
    before = {items: preflight.result[items]}
    is_held_back = params["all_or_none"] and bool(preflight.failures)
    if settings.check_mode or is_held_back or not any(one["state"] in AFTER for one in before[items]):
        report = _held_back(preflight, items) if is_held_back else preflight
        chains = _chains(report.result[items], report.created, is_planned=True)
        return _told(report, before, None, chains, is_planned=settings.check_mode)
    made = _attempt(once, settings)
    if any(failure.code == "interrupted" for failure in made.failures):
        return _told(made, before, None, [])  # whoever ends the run does not want to wait for more
    again = _attempt(once, look)
    found = again.result.get(items, [])
    return _told(
        made._replace(warnings=list(dict.fromkeys([*preflight.warnings, *made.warnings, *again.warnings]))),
        before,
        {items: found} if items in again.result else problem_fields(again.failures),
        _chains(made.result.get(items, found), {**again.created, **made.created}, is_planned=False),
    )


def _attempt(once: Once, settings: Settings) -> Report:
    """Return how a call ended, also if it was refused altogether: what came before it is to be told."""
    try:
        return once(settings)
    except Refusal as exc:
        return Report({"changed": False}, [exc])


def _told(
    report: Report, before: Result, again: Result | None, chains: t.Sequence[Result], *, is_planned: bool = False
) -> Report:
    more = {"check_mode": is_planned, "preflight": before, "again": again, "chains": chains}
    return report._replace(result={**report.result, **more})


def _held_back(preflight: Report, items: str) -> Report:
    """Return the report of a call that left everything as it is, because something was refused."""
    held = [_not_done(one) for one in preflight.result[items]]
    return preflight._replace(result={**preflight.result, "changed": False, items: held, "diff": {}})


def _not_done(item: Result) -> Result:
    if item["state"] not in AFTER:
        return item
    why = "is left as it is, because something else of this call was refused, and all_or_none is set"
    refusal = Refusal("held_back", item["name"] if "name" in item else item["path"], why)
    own = {"overlays": [_not_done(one) for one in item["overlays"]]} if "overlays" in item else {}
    return {**item, **own, "state": FAILED, **problem_fields([refusal])}


def _chains(items: t.Sequence[Result], created: t.Mapping[str, t.Any], *, is_planned: bool) -> list[Result]:
    """Return what qcow2_info tells of the chains of disks that have bitmaps."""
    domains = [item for item in items if item["state"] != FAILED]
    overlays = [overlay for domain in domains for overlay in domain.get("overlays", [domain])]
    tops = [examined_image(one, is_planned=is_planned) for one in overlays if one["state"] not in (FAILED, SKIPPED)]
    paths = [top for top, one in zip(tops, overlays) if one.get("bitmaps")]
    return [_chain(path, created.get(path, {})) for path in dict.fromkeys(paths)]


def _chain(path: str, created: t.Mapping[str, int]) -> Result:
    return examine_chain(path, follow=True, count=False, created=created).as_result()
