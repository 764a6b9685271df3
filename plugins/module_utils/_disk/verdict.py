# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: the states, what every verdict has, and the rules over the verdicts of a VM: all or none, enough space.

Pure: values in, verdicts out. The same verdicts feed the prediction of check mode, the diff and the result.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable

CREATED = "created"
PRESENT = "present"
COMMITTED = "committed"
REVERTED = "reverted"
ABSENT = "absent"
SKIPPED = "skipped"
FAILED = "failed"
# The states of what was done, or what check mode says would be done, and what a second run must find then.
AFTER = {CREATED: PRESENT, COMMITTED: ABSENT, REVERTED: ABSENT}
# What becomes of an image that no VM needs any more.
How = t.Literal["delete", "keep"]
DELETE: How = "delete"
KEEP: How = "keep"


class Request(t.Protocol):
    """What every request has."""

    @property
    def path(self) -> str:
        """Return the image that it is about."""

    @property
    def vm(self) -> str | None:
        """Return the VM that it belongs to; the requests of a VM are done all or none."""


class Need(t.NamedTuple):
    """Space that a request takes."""

    device: int  # of the file system
    folder: str
    bytes: int
    free: int  # bytes, before anything of this call is done


V = t.TypeVar("V", bound="Verdict")


class Verdict(t.Protocol):
    """What every verdict has: what is to become, or became, of one request."""

    @property
    def request(self) -> Request:
        """Return what was asked for."""

    @property
    def state(self) -> str:
        """Return the word for it."""

    @property
    def changed(self) -> bool:
        """Return whether something is to be done, or was done."""

    @property
    def problems(self) -> tuple[Refusal, ...]:
        """Return why it failed."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what is odd but no reason to refuse."""

    @property
    def need(self) -> Need | None:
        """Return the space that it takes; None if it takes none, or if that cannot be told."""

    def failed(self: V, *problems: Refusal) -> V:
        """Return this verdict as a failure, with these problems beside those that it has."""

    def as_result(self) -> dict[str, t.Any]:
        """Return it in the form in which the modules return it."""

    def as_diff(self) -> tuple[t.Any, t.Any]:
        """Return what a diff shows of it, before and after."""


def problem_fields(problems: t.Sequence[Refusal]) -> dict[str, str]:
    """Return `msg` and `code` of an item that failed; nothing for one that did not.

    The code is the first problem's, unless that is only a consequence.
    """
    if not problems:
        return {}
    cause = next(iter(root_causes(problems)), problems[0])
    return {"msg": " ".join(map(str, problems)), "code": cause.code}


def root_causes(problems: t.Iterable[Refusal]) -> list[Refusal]:
    """Return the problems without those that only follow from another one, each once."""
    return [problem for problem in dict.fromkeys(problems) if problem.code != "group_failed"]


def all_or_none(verdicts: t.Sequence[V]) -> list[V]:
    """Return the verdicts of one VM. If one failed, those that would change something fail too."""
    failed = next((verdict for verdict in verdicts if verdict.state == FAILED), None)
    if failed is None:
        return list(verdicts)
    why = f"is not done, because {failed.request.path} failed, and what belongs together is done all or none"
    return [v.failed(Refusal("group_failed", v.request.path, why)) if v.changed else v for v in verdicts]


def within_space(verdicts: t.Sequence[V], free: dict[int, int]) -> list[V]:
    """Return the verdicts of one VM, failed where they do not fit.

    `free` has the bytes that are left for all, by device. What this VM takes is subtracted, unless it failed.
    """
    settled = list(verdicts)
    left = dict(free)
    for index, verdict in enumerate(settled):
        need = verdict.need
        if need is None or not verdict.changed:
            continue
        available = left.setdefault(need.device, need.free)
        if need.bytes > available:
            settled[index] = verdict.failed(
                Refusal(
                    "no_space",
                    verdict.request.path,
                    f"needs {need.bytes} bytes in {need.folder}, where {max(available, 0)} are left",
                    "Make room, or choose another folder.",
                )
            )
        left[need.device] = available - need.bytes
    settled = all_or_none(settled)
    if all(verdict.state != FAILED for verdict in settled):
        free.update(left)
    return settled


def printable_warnings(verdicts: t.Iterable[Verdict]) -> list[str]:
    """Return the warnings of all verdicts, each once."""
    return list(dict.fromkeys(printable(warning) for verdict in verdicts for warning in verdict.warnings))


def examined_image(overlay: t.Mapping[str, t.Any], *, is_planned: bool) -> str:
    """Return the image whose chain tells whether the bitmaps of a disk can be used for a backup.

    It is the topmost one. `is_planned`: nothing was done, so it is the one that the disk has now.
    """
    path, base = overlay["path"], overlay["backing_file"]
    leaves = overlay["state"] in (COMMITTED, REVERTED, ABSENT)
    topmost = overlay.get("topmost", base if leaves else path)
    if is_planned and overlay["state"] == CREATED:
        topmost = base
    elif is_planned and overlay["state"] in (COMMITTED, REVERTED) and topmost == base:
        topmost = path
    return t.cast("str", topmost)
