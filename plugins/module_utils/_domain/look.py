# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: every domain with its disks, its chains and its checkpoints, and conclude."""

from __future__ import annotations

import itertools
import typing as t

from .._base.errors import Refusal, printable
from .._base.files import open_image
from .._disk.examine import ExaminedLayer, examine_chain
from .._disk.observe import why_not_open
from .._disk.unfinished import Unfinished
from .._disk.verdict import problem_fields
from .._libvirt import quiesced
from .._libvirt.connection import Domain, Kept, Libvirt, Unreadable
from .._libvirt.definition import DomainDisk
from .._libvirt.snapshots import check_still_runs
from .._qcow2.chain import Layer, relative_data_file, walk_chain
from .._qcow2.mark import Mark
from .fitness import fitness_of
from .healing import bitmaps_known
from .inventory import Inventory, facts_without_chain
from .overlay import stated_problems
from .verdicts import UNKNOWN, DiskLook, DomainCheckpoint, NextBackup, judge_domain, next_backup, orphan_bitmaps

SHUT_OFF = "shut off"
_FROZEN = {
    "kind": "quiesce",
    "snapshot": None,
    "target": None,
    "image": None,
    "what": f"{quiesced.MAY_BE_FROZEN} still",
    "completed_by": "kvmfleet.qcow2.domain_overlay thaws them, whatever its state is. So does 'virsh domfsthaw'.",
}


class DomainLook(t.NamedTuple):
    """What was read of one domain, and what follows from it."""

    domain: Domain
    kept: Kept
    disks: tuple[DiskLook, ...]
    checkpoints: tuple[DomainCheckpoint, ...]
    next_backup: NextBackup
    may_be_frozen: bool = False  # the file systems of its guest, by a snapshot that was not ended

    @property
    def warnings(self) -> list[str]:
        """What somebody should know of the images."""
        return [warning for one in self.disks if one.chain for warning in one.chain.warnings]

    def as_result(self) -> dict[str, t.Any]:
        """Return the domain as the module returns it."""
        definition = self.domain.running_definition or self.domain.definition
        return {
            "name": self.domain.name,
            "uuid": self.domain.uuid,
            "state": self.domain.state or SHUT_OFF,
            "managed_save": self.domain.managed_save,
            "nvram": definition.nvram,
            "tpm": definition.has_tpm_state,
            "libvirt_snapshots": [printable(name) for name in self.kept.snapshots],
            "disks": [_disk_as_result(one, self.domain.uuid) for one in self.disks],
            "checkpoints": [one.as_result() for one in self.checkpoints],
            "orphan_bitmaps": orphan_bitmaps(self.kept.checkpoints, self.disks),
            "unfinished": [
                _unfinished_as_result(left, self.domain.uuid, one.disk.target)
                for one in self.disks
                for left in (one.chain.unfinished if one.chain else ())
            ]
            + ([_FROZEN] if self.may_be_frozen else []),
            "next_backup": self.next_backup.kind,
            "next_backup_since": self.next_backup.since and printable(self.next_backup.since),
            "next_backup_reason": printable(self.next_backup.reason),
        }


def look(daemon: Libvirt, names: t.Sequence[str], *, counts: bool) -> tuple[list[DomainLook | Unreadable], list[str]]:
    """Return what was read of the domains of these names and patterns, and warnings; with `counts` dirty bytes too."""
    found, unmatched = Inventory(daemon.domains()).select(names)
    looks = [one if isinstance(one, Unreadable) else look_at(daemon, one, counts=counts) for one in found]
    # A host without domains is fine, if nothing but all of them was asked for.
    warnings = [f"{one}: no domain of this host matches it." for one in unmatched if one != "*"]
    of_domains = [warning for one in looks if isinstance(one, DomainLook) for warning in one.warnings]
    return looks, [*warnings, *dict.fromkeys(of_domains)]


def unreadable_as_result(one: Unreadable) -> dict[str, t.Any]:
    """Return a domain that cannot be looked at, with the same keys as any other."""
    nothing = ("uuid", "state", "managed_save", "nvram", "tpm", "orphan_bitmaps", "next_backup_since")
    return {
        "name": one.name,
        **dict.fromkeys(nothing),
        **{name: [] for name in ("libvirt_snapshots", "disks", "checkpoints", "unfinished")},
        "next_backup": UNKNOWN,
        "next_backup_reason": str(one.problem),
        **problem_fields([one.problem]),
    }


def look_at(daemon: Libvirt, domain: Domain, *, counts: bool) -> DomainLook | Unreadable:
    """Look at one domain."""
    try:
        kept = daemon.kept_now(domain)
    except Refusal as exc:
        return Unreadable(domain.name, exc)
    # What it runs with is what its guest writes to, whatever the next start uses.
    definition = domain.running_definition or domain.definition
    disks = tuple(_look_at_disk(daemon, domain, one, kept, counts=counts) for one in definition.disks)
    checkpoints = tuple(judge_domain(kept.checkpoints, disks, counts=counts))
    may_be_frozen = domain.state is not None and quiesced.is_left(daemon, domain)
    return DomainLook(domain, kept, disks, checkpoints, next_backup(checkpoints, disks), may_be_frozen)


def _look_at_disk(daemon: Libvirt, domain: Domain, disk: DomainDisk, kept: Kept, *, counts: bool) -> DiskLook:
    """Look at one disk and at the images of its chain."""
    unfit = fitness_of(facts_without_chain(disk), None).why_unfit
    if unfit is None and disk.opted_out:
        unfit = "excluded by snapshot='no' in the definition"
    if disk.source is None:
        return DiskLook(disk, unfit, None)
    created = dict(bitmaps_known(kept.checkpoints, disk.target))
    chain = examine_chain(disk.source, follow=True, count=counts, image_format=disk.format, created=created)
    layers = [one.layer for one in chain.layers]
    problem = chain.problem or _start_problem(domain, disk, layers) or _other_file(daemon, domain, disk, layers)
    return DiskLook(disk, unfit, chain, problem)


def _start_problem(domain: Domain, disk: DomainDisk, layers: t.Sequence[Layer]) -> Refusal | None:
    """Return why the domain would start with other images than were read, or not at all; what runs has started."""
    if domain.state is not None or not layers:
        return None
    return next(iter([*stated_problems(domain.name, disk, layers), *_relative_data_files(disk, layers)]), None)


def _relative_data_files(disk: DomainDisk, layers: t.Sequence[Layer]) -> t.Iterator[Refusal]:
    """Yield which external data files QEMU looks for elsewhere; not of those that the definition states."""
    stated = [disk.data_file, *(image.data_file for image in disk.stated_images)]
    for layer, data_file in itertools.zip_longest(layers, stated[: len(layers)]):
        relative = relative_data_file(layer.path, layer.image) if layer.image is not None else None
        if relative is not None and data_file is None:
            yield relative


def _other_file(daemon: Libvirt, domain: Domain, disk: DomainDisk, layers: t.Sequence[Layer]) -> Refusal | None:
    """Return that a domain which runs has other files open; in another state, as of a migration, it may have none."""
    if domain.state != "running" or disk.source is None or disk.why_unfit is not None:
        return None
    try:
        if why_not_open(layers, is_written=True) is None:
            return None
        # It may have been shut off since it was asked for, or a merge may just have ended.
        check_still_runs(daemon, domain)
        with open_image(disk.source) as file:
            layers = [layer for layer, _file in walk_chain(file, disk.format)]
        return why_not_open(layers, is_written=True)
    except Refusal:
        return None


def _disk_as_result(one: DiskLook, uuid: str) -> dict[str, t.Any]:
    """Return a disk in the form in which the module returns it."""
    layers = one.chain.layers if one.chain else ()
    return {
        "target": one.disk.target,
        "source": printable(one.disk.source) if one.disk.source else None,
        "unfit": one.unfit,
        "images": [_image_as_result(layer, uuid, one.disk.target) for layer in layers],
        **problem_fields([one.problem] if one.problem else []),
    }


def _image_as_result(layer: ExaminedLayer, uuid: str, target: str) -> dict[str, t.Any]:
    """Return an image as qcow2_info does, with what is known of it as an image of this disk."""
    mark = layer.image.mark if layer.image else None
    made = layer.image.history.made // 10**9 if layer.image else 0
    return {
        **layer.as_result(),
        "modified": layer.modified,
        "made": made or None,
        "snapshot": _snapshot_of(mark, uuid, target),
    }


def _unfinished_as_result(left: Unfinished, uuid: str, target: str) -> dict[str, t.Any]:
    """Return work that a killed run has left in the form in which the module returns it."""
    return {
        "target": target,
        "image": printable(left.path),
        "kind": left.kind,
        "snapshot": _snapshot_of(left.mark, uuid, target),
        "what": printable(left.what),
        "completed_by": printable(left.remedy),
    }


def _snapshot_of(mark: Mark | None, uuid: str, target: str) -> str | None:
    """Return of which snapshot of this disk the mark is; None if of none."""
    return printable(mark.snapshot) if mark is not None and (mark.vm, mark.target) == (uuid, target) else None
