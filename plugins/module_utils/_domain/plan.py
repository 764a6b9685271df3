# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of domains, what is to become of each, and what became of it."""

from __future__ import annotations

import typing as t

from .._base.errors import printable
from .._disk.bitmap_rules import Checkpoint
from .._disk.verdict import Creation, OverlayRequest, Verdict
from .._libvirt.connection import Domain
from .._libvirt.definition import disks_of, with_sources

SKIPPED = "skipped"


class SnapshotRequest(t.NamedTuple):
    """What is wanted of every domain."""

    snapshot: str
    targets: list[str] | None  # None: all disks that can take part
    directory: str | None  # None: beside each disk
    relative: bool
    creation: Creation
    skips_running: bool = False  # domains that are not shut off are left out, instead of a failure


class SkippedDisk(t.NamedTuple):
    """A disk that takes no part."""

    target: str
    reason: str


class DomainPlan(t.NamedTuple):
    """What is to become of one domain."""

    domain: Domain
    wanted: dict[str, OverlayRequest]  # by target; the overlays, those that are there already too
    overlays: dict[str, str]  # path by target, of the disks that the definition does not have as overlays yet
    skipped: list[SkippedDisk]
    problems: list[str]

    @property
    def definition(self) -> str:
        """The definition that the domain is to get."""
        return with_sources(self.domain.definition, self.overlays)


class DomainOutcome(t.NamedTuple):
    """What became of one domain."""

    name: str
    uuid: str | None
    state: str  # created, present, failed or skipped
    overlays: list[tuple[str, Verdict]]  # with the target
    skipped: list[SkippedDisk]
    checkpoints: list[Checkpoint]
    problems: list[str]
    diff: tuple[str, str]  # the disks' elements before and after
    tops: t.Mapping[str, str]  # the topmost image of each disk, by target, as the definition has it after the task

    def as_result(self) -> dict[str, t.Any]:
        """Return the domain as the module returns it."""
        result: dict[str, t.Any] = {
            "name": self.name,
            "uuid": self.uuid,
            "state": self.state,
            "overlays": [
                {
                    "target": target,
                    **verdict.as_result(),
                    "topmost": printable(self.tops.get(target, verdict.wanted.path)),
                }
                for target, verdict in self.overlays
            ],
            "skipped_disks": [disk._asdict() for disk in self.skipped],
            "checkpoints": [checkpoint.as_result() for checkpoint in self.checkpoints],
        }
        return {**result, "msg": self.message} if self.problems else result

    @property
    def message(self) -> str:
        """Why it failed, in one text."""
        return printable(" ".join(self.problems))


def state_problems(plan: DomainPlan) -> list[str]:
    """Return why the domain cannot be with_sources as it is just now."""
    domain = plan.domain
    if domain.running_definition is not None and not plan.overlays:
        running = {disk.target: disk.source for disk in disks_of(domain.running_definition)}
        defined = {disk.target: disk.source for disk in disks_of(domain.definition)}
        if any(running.get(target) != defined[target] for target in plan.wanted):
            return [f"{domain.name}: runs with other disks than its definition has. Shut it down and run this again."]
    if not plan.overlays:
        return []
    if not domain.persistent:
        return [f"{domain.name}: is transient: it has no definition that could be changed. Define it first."]
    if domain.state is not None:
        return [
            f"{domain.name}: is {domain.state}. Shut it down and run this again; for a running domain, "
            "'virsh snapshot-create-as --disk-only' does it all, bitmaps included."
        ]
    if domain.managed_save:
        return [
            f"{domain.name}: has a managed save, which would go on writing to the images below the overlays. Start it "
            "and shut it down properly, or give up its saved state with 'virsh managedsave-remove'."
        ]
    return []
