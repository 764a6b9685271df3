# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: which disks can take part in a snapshot, and which a domain must not go without."""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal
from .._libvirt.definition import DomainDisk
from .inventory import READ_ONLY, DiskFacts

# A transient disk is written to, but the writes are thrown away when the domain is shut off.
KEEPS_NOTHING = (*READ_ONLY, "transient", "no source")


class Fitness(t.NamedTuple):
    """Whether a disk can take part, whatever a call asks for."""

    why_unfit: str | None  # None if it can
    is_missed: bool  # it keeps what the domain writes, so that a snapshot without it is half a snapshot
    is_absent: bool = False  # its file is not there, and its startupPolicy lets the domain start without it


def fitness_of(facts: DiskFacts, directory: str | None) -> Fitness:
    """Return whether a disk can take part, if overlays are made in `directory`, or beside each disk if that is None."""
    disk = facts.disk
    if disk.why_unfit is not None:
        return Fitness(disk.why_unfit, disk.why_unfit not in KEEPS_NOTHING)
    if facts.is_absent and disk.is_optional:
        why = "its file does not exist, and startupPolicy='optional' lets the domain start without it"
        return Fitness(why, is_missed=False, is_absent=True)
    if directory is None and (disk.kind == "block" or facts.is_device):
        why = "block device, beside which no overlay can be made; give a directory"
        return Fitness(why, is_missed=True)
    return Fitness(None, is_missed=False)


def missed_refusal(name: str, disk: DomainDisk, why_unfit: str) -> Refusal:
    """Return the refusal of a domain that would get a snapshot without one of its disks."""
    return Refusal(
        "disk_unfit",
        name,
        f"its disk {disk.target} cannot take part, and a snapshot without it would be half a snapshot: {why_unfit}",
        "Make it fit; or exclude it, by disks or with snapshot='no' in the definition; or set unfit_disks=skip.",
    )
