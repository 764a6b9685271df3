# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What is asked of domains, what is to become of each, and what became of it."""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable
from .._disk.bitmap_rules import IN_USE, LOST, Checkpoint
from .._disk.overlay import CUMULATIVE, Creation
from .._disk.verdict import FAILED, problem_fields
from .._libvirt.connection import Domain, KnownCheckpoint, Unreadable
from .._libvirt.definition import Definition, Source
from .healing import bitmaps_known
from .retention import Picked


class SnapshotRequest(t.NamedTuple):
    """What is wanted of every domain."""

    snapshot: str
    targets: tuple[str, ...] | None  # None: all disks that can take part
    directory: str | None  # None: beside each disk
    relative: bool
    creation: Creation
    bitmap_content: str = CUMULATIVE
    skips_running: bool = False  # domains that are not shut off are left out, instead of a failure
    allows_snapshots: bool = False  # libvirt's own snapshots of a domain are no failure
    skips_unfit: bool = False  # disks that are written to and cannot take part are left out, instead of a failure


class SkippedDisk(t.NamedTuple):
    """A disk that takes no part."""

    target: str
    reason: str


class DiskPlan(t.NamedTuple):
    """What is to become of one disk that takes part."""

    target: str
    request: t.Any  # of the operation on images
    source: Source | None  # the image that the definition is to be switched to; None if it stays as it is
    problems: tuple[Refusal, ...] = ()
    is_done: bool = False  # nothing is to be done


class DomainPlan(t.NamedTuple):
    """What is to become of one domain."""

    domain: Domain
    disks: tuple[DiskPlan, ...]
    skipped: tuple[SkippedDisk, ...]
    problems: tuple[Refusal, ...]
    definition: Definition  # that the domain is to get
    missed: tuple[str, ...] = ()  # targets of the disks that are skipped although the domain writes to them
    absent: tuple[str, ...] = ()  # targets of the disks that are skipped since their file is not there
    notes: tuple[str, ...] = ()  # further warnings, if anything is to be done
    always: tuple[str, ...] = ()  # further warnings, also if nothing is to be done
    lost: tuple[str, ...] = ()  # names of the checkpoints that libvirt is to forget once the domain is switched

    @property
    def warnings(self) -> list[str]:
        """What somebody should know of the disks that are skipped, and of what is done."""
        reasons = {disk.target: disk.reason for disk in self.skipped}
        left_out = [
            *((target, "its disk {} is not in the snapshot: {}.") for target in self.missed),
            *((target, "its disk {} was left out: {}.") for target in self.absent),
        ]
        told = [f"{self.domain.name}: {words.format(target, reasons[target])}" for target, words in left_out]
        return [*told, *self.always, *(self.notes if self.has_work else ())]

    @property
    def has_work(self) -> bool:
        """Whether anything is to be done, for which the domain must be shut off."""
        return any(not disk.is_done for disk in self.disks)

    @property
    def sources(self) -> dict[str, Source]:
        """The images that the definition is to be switched to, by target."""
        return {disk.target: disk.source for disk in self.disks if disk.source is not None}

    def failed(self, problems: t.Sequence[Refusal]) -> DomainPlan:
        """Return this plan with these problems beside those that it has."""
        return self._replace(problems=(*self.problems, *problems), definition=self.domain.definition)


class DomainOutcome(t.NamedTuple):
    """What became of one domain."""

    name: str
    uuid: str | None
    state: str  # what the aim calls it, failed or skipped
    overlays: tuple[tuple[str, t.Any], ...] = ()  # verdicts on images, with the target
    skipped: tuple[SkippedDisk, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    verified: frozenset[str] = frozenset()  # names of those of which libvirt itself has said whether they can be used
    snapshots: tuple[str, ...] = ()  # names of libvirt's own
    missed: tuple[str, ...] = ()  # as DomainPlan has it
    warnings: t.Sequence[str] = ()
    definition: Definition | None = None  # None of a domain of which nothing is known
    problems: tuple[Refusal, ...] = ()
    diff: tuple[str, str] = ("", "")  # the disks' elements before and after
    tops: t.Mapping[str, str] = {}  # the topmost image of each disk, by target, as the definition has it after the task
    changed: bool = False  # whether it is to be switched, or was switched
    picked: tuple[Picked, ...] = ()  # the snapshots that are to be merged down since they are old
    lost: tuple[str, ...] = ()  # names of checkpoints that are gone with the images that had their bitmaps
    known: t.Sequence[KnownCheckpoint] = ()  # that libvirt has

    @property
    def created(self) -> dict[str, dict[str, int]]:
        """When the checkpoints of each image that a disk has, or may have, on top were made, by the bitmap's name."""
        found: dict[str, dict[str, int]] = {}
        for target, verdict in self.overlays:
            request = verdict.request
            paths = (request.path, request.backing_file, self.tops.get(target, request.path))
            found.update({path: dict(bitmaps_known(self.known, target)) for path in paths})
        return found

    def as_result(self) -> dict[str, t.Any]:
        """Return the domain as the module returns it."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "state": self.state,
            "overlays": [
                {
                    "target": target,
                    **verdict.as_result(),
                    "topmost": printable(self.tops.get(target, verdict.request.path)),
                }
                for target, verdict in self.overlays
            ],
            "skipped_disks": [disk._asdict() for disk in self.skipped],
            "unfit_disks": list(self.missed),
            # What no snapshot of disks has.
            "nvram": self.definition.nvram if self.definition else None,
            "tpm": self.definition.has_tpm_state if self.definition else None,
            "checkpoints": [
                # Of a loss libvirt knows nothing, nor of what QEMU could not store.
                {**one.as_result(), "verified": one.name in self.verified and one.problem not in (LOST, IN_USE)}
                for one in self.checkpoints
            ],
            "libvirt_snapshots": [printable(name) for name in self.snapshots],
            "picked_snapshots": [one.as_result() for one in self.picked],
            "lost_checkpoints": [printable(name) for name in self.lost],
            **problem_fields(self.problems),
        }


NotReady = t.Callable[[Domain, t.Sequence[DiskPlan]], t.Sequence[Refusal]]  # why a domain is in no state for its plan


def failed_outcome(unreadable: Unreadable) -> DomainOutcome:
    """Return the outcome for a domain of which nothing is known."""
    return DomainOutcome(name=unreadable.name, uuid=None, state=FAILED, problems=(unreadable.problem,))


def state_problems(domain: Domain, disks: t.Sequence[DiskPlan]) -> list[Refusal]:
    """Return why the domain cannot be switched as it is just now."""
    if not any(disk.source for disk in disks):
        return running_elsewhere(domain, disks)
    live = "or use running=live, which takes the snapshot while it runs."
    return not_shut_off(domain, live, "has a managed save, which would go on writing to the images below the overlays")


def not_shut_off(domain: Domain, live: str, why_saved: str) -> list[Refusal]:
    """Return why nothing can be done to the images of a domain just now; `live` tells what can while it runs."""
    if not domain.persistent:
        why = "is transient: it has no definition that could be changed"
        return [Refusal("transient", domain.name, why, "Define it first.")]
    if domain.state is not None:
        remedy = f"Shut it down and run this again; {live}"
        return [Refusal("running", domain.name, f"is {domain.state}", remedy)]
    if domain.managed_save:
        remedy = "Start it and shut it down properly, or give up its saved state with 'virsh managedsave-remove'."
        return [Refusal("managed_save", domain.name, why_saved, remedy)]
    return []


def running_elsewhere(domain: Domain, disks: t.Sequence[DiskPlan]) -> list[Refusal]:
    """Return why a domain whose definition is on the overlays all the same is not: it still runs without them."""
    if domain.running_definition is None:
        return []
    running, defined = domain.running_definition.tops, domain.definition.tops
    if all(running.get(disk.target) == defined[disk.target] for disk in disks):
        return []
    why = "runs with other disks than its definition has"
    return [Refusal("other_disks", domain.name, why, "Shut it down and run this again.")]
