# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: verdicts, and what holds for all of a VM or of a call: all or none, space."""

from __future__ import annotations

import typing as t

from .._base.errors import printable
from .._qcow2.bitmaps import Bitmap
from .._qcow2.header import l1_bytes
from .observe import Target

CREATED = "created"
PRESENT = "present"
FAILED = "failed"


class Creation(t.NamedTuple):
    """How a new overlay is laid out; the names are those of qemu-img create -o."""

    cluster_size: int = 65536  # bytes
    extended_l2: bool = False
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: str = "zlib"


class OverlayRequest(t.NamedTuple):
    """One overlay as it was asked for."""

    path: str
    backing_file: str
    backing_format: str = "qcow2"
    vm: str | None = None
    relative: bool = False
    creation: Creation = Creation()
    must_be_fresh: bool = False  # the VM is not on it yet, so one that exists already must hold no data


class SkippedBitmap(t.NamedTuple):
    """A bitmap of ACTIVE that the overlay does not go on recording."""

    name: str
    granularity: int  # bytes
    reason: str  # disabled or inconsistent


class Verdict(t.NamedTuple):
    """What is to become, or became, of one overlay."""

    wanted: OverlayRequest
    state: str  # created, present or failed
    problems: tuple[str, ...] = ()
    virtual_size: int | None = None  # bytes
    bitmaps: tuple[Bitmap, ...] = ()
    skipped: tuple[SkippedBitmap, ...] = ()
    warnings: tuple[str, ...] = ()

    def failed(self, problem: str) -> Verdict:
        """Return this verdict as a failure."""
        return self.with_problems((*self.problems, problem))

    def with_problems(self, problems: t.Iterable[str]) -> Verdict:
        """Return this verdict, failed if there are problems."""
        found = tuple(problems)
        return Verdict(self.wanted, FAILED, found, warnings=self.warnings) if found else self

    @property
    def message(self) -> str:
        """Why it failed, in one text."""
        return printable(" ".join(self.problems))

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        result: dict[str, t.Any] = {
            "path": self.wanted.path,
            "backing_file": self.wanted.backing_file,
            "backing_format": self.wanted.backing_format,
            "virtual_size": self.virtual_size,
            "state": self.state,
            "bitmaps": [{"name": b.name, "granularity": b.granularity} for b in self.bitmaps],
            "skipped_bitmaps": [b._asdict() for b in self.skipped],
        }
        return {**result, "msg": self.message} if self.state == FAILED else result


def all_or_none(verdicts: t.Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts of one VM, where one failure means that none of its overlays is made."""
    failed = next((verdict for verdict in verdicts if verdict.state == FAILED), None)
    if failed is None:
        return list(verdicts)
    reason = (
        f"not made, because the overlays that belong together are made all or none and {failed.wanted.path} failed."
    )
    return [v.failed(f"{v.wanted.path}: {reason}") if v.state == CREATED else v for v in verdicts]


def needed_bytes(verdict: Verdict) -> int:
    """Return how many bytes the new overlay takes on disk at least, where blocks are of 4 KiB or larger."""
    creation, size = verdict.wanted.creation, verdict.virtual_size or 0
    needed = 3 * creation.cluster_size + l1_bytes(
        size, creation.cluster_size, creation.extended_l2
    )  # header, refcount table, one refcount block
    for bitmap in verdict.bitmaps:
        entries = -(-bitmap.data_bytes(size) // creation.cluster_size)
        needed += max(entries * 8, min(4096, creation.cluster_size))
    return needed


def within_space(verdicts: t.Sequence[Verdict], targets: t.Sequence[Target], free: dict[int, int]) -> list[Verdict]:
    """Return the verdicts of one VM, failed where they do not fit; free, bytes by device, is what is left for all."""
    settled = list(verdicts)
    left = dict(free)
    for index, (verdict, target) in enumerate(zip(verdicts, targets)):
        if verdict.state != CREATED or target.free_bytes is None:
            continue
        available = left.setdefault(target.device, target.free_bytes)
        needed = needed_bytes(verdict)
        if needed > available:
            settled[index] = verdict.failed(
                f"{verdict.wanted.path}: needs at least {needed} bytes in {target.folder}, where "
                f"{max(available, 0)} are left after the overlays before it. Make room, or choose another folder."
            )
        left[target.device] = available - needed
    settled = all_or_none(settled)
    if all(verdict.state != FAILED for verdict in settled):
        free.update(left)
    return settled
