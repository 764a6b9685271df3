# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what a new overlay is called, and which image of a disk is which snapshot.

The mark that an overlay bears tells whose snapshot it is. A name alone does not: debian.web1.qcow2 on debian.qcow2 is
either a snapshot or a clone, and whoever takes the one for the other removes a disk. An image without the mark (made by
version 0.1, or copied by libvirt to another storage) is the snapshot for certain if an image below it is known to have
been the domain's disk: it bears the domain's mark, or libvirt remembers it with a checkpoint. Else it is ambiguous.

No name depends on what other domains the host has: several hosts may share a storage.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal
from .._qcow2.chain import Layer
from .._qcow2.mark import Mark
from .inventory import DiskFacts
from .plan import DomainPlan

_EXTENSIONS = (".qcow2", ".qcow", ".img", ".raw")  # that are no part of an image's stem


class Found(t.NamedTuple):
    """The image of a disk that is the snapshot, or looks like it."""

    overlay: Layer
    below: Layer
    is_certain: bool


def new_path(facts: DiskFacts, domain: str, mark: Mark, directory: str | None) -> str:
    """Return the path of a new overlay on top of the disk's topmost image."""
    source = facts.disk.source or ""
    if directory is not None:
        return os.path.join(directory, f"{domain}.{mark.target}.{mark.snapshot}.qcow2")
    stem = stem_of(facts.layers, mark.vm) or _without_extension(source)
    return os.path.join(os.path.dirname(source), f"{stem}.{mark.snapshot}.qcow2")


def find_snapshot(
    facts: DiskFacts, domain: str, mark: Mark, remembered: t.Callable[[], t.Container[str]]
) -> Found | None:
    """Return which image of the disk is the snapshot of this mark; None if none is, which is certain then.

    `remembered` returns the real paths of images that libvirt remembers as disks of the domain.
    """
    pairs = list(zip(facts.layers, facts.layers[1:]))
    for overlay, below in pairs:
        if _is_marked(overlay, facts, mark):
            return Found(overlay, below, is_certain=True)
    for overlay, below in pairs:
        if overlay in facts.own and _looks_like(overlay, below, facts, domain, mark):
            is_certain = _was_active(below, facts, mark.vm, remembered())
            if is_certain or below in facts.own or _mark_of(overlay):
                return Found(overlay, below, is_certain)
    return None


def _was_active(below: Layer, facts: DiskFacts, vm: str, remembered: t.Container[str]) -> bool:
    """Whether the image, or one below it, was the domain's disk once. Then it is no template."""
    own = [layer for layer in _chain_from(below, facts) if layer in facts.own]
    marks = [_mark_of(layer) for layer in own]
    is_marked = any(mark is not None and mark.vm == vm for mark in marks)
    return is_marked or any(layer.real_path in remembered for layer in (below, *own))


def _chain_from(layer: Layer, facts: DiskFacts) -> tuple[Layer, ...]:
    return facts.layers[facts.layers.index(layer) :]


def _is_marked(overlay: Layer, facts: DiskFacts, mark: Mark) -> bool:
    """Whether the image bears the mark. A disk may have got another target since, but then no other disk has it."""
    found = _mark_of(overlay)
    return found is not None and found._replace(target=mark.target) == mark and (found == mark or overlay in facts.own)


def _looks_like(overlay: Layer, below: Layer, facts: DiskFacts, domain: str, mark: Mark) -> bool:
    """Whether an image that does not bear the mark could be the snapshot all the same."""
    found, top = _mark_of(overlay), _mark_of(facts.layers[0])
    if found is not None:
        # The domain was defined anew since, or has taken over the disk of another. Further down, below an image that is
        # not of that other domain, it is a template.
        return top is not None and top.vm == found.vm and found.snapshot == mark.snapshot
    chain = _chain_from(below, facts)
    own = [layer.path for layer in chain if layer in facts.own]
    stems = (_stem_of_paths(own), _without_extension(below.path), stem_of(chain, mark.vm), f"{domain}.{mark.target}")
    return os.path.basename(overlay.path) in [f"{stem}.{mark.snapshot}.qcow2" for stem in stems]


def _mark_of(layer: Layer) -> Mark | None:
    return layer.image.mark if layer.image else None


def stem_of(layers: t.Sequence[Layer], vm: str) -> str:
    """Return what an overlay's name begins with: that of the image below, without the snapshot that it is.

    On top of web.qcow2 and web.monday.qcow2 it is web. So it is on top of web.monday.live, which libvirt has put onto
    the latter: what is added to the name of an image that bears the mark goes.
    """
    top = _without_extension(layers[0].path) if layers else ""
    for layer in layers:
        mark, name = _mark_of(layer), os.path.basename(layer.path)
        if mark is not None and mark.vm == vm and name.endswith(f".{mark.snapshot}.qcow2"):
            stem = name[: -len(f".{mark.snapshot}.qcow2")]
            return stem if stem and top.startswith(f"{stem}.") else top
    return top


def _stem_of_paths(paths: t.Sequence[str]) -> str:
    """Return the stem as version 0.1 made it out, from the names of the disk's own images, top to base."""
    stem = ""
    for path in reversed(paths):
        own = _without_extension(path)
        if not stem or not own.startswith(f"{stem}."):
            stem = own
    return stem


def _without_extension(path: str) -> str:
    name = os.path.basename(path)
    return next((name[: -len(end)] for end in _EXTENSIONS if name.endswith(end) and name != end), name)


def ambiguous(domain: str, found: Found, mark: Mark) -> Refusal:
    """Return the refusal of a disk of which nobody can tell whether it is on the snapshot."""
    why = (
        f"whether its disk {mark.target} is on the snapshot {mark.snapshot} cannot be told: {found.overlay.path} is "
        f"either that snapshot of {found.below.path}, or a disk made from {found.below.path} as a template, and bears "
        "no mark of this domain"
    )
    remedy = (
        "Choose another name for the snapshot. (If it is the snapshot, there is nothing to be done, and the domain can "
        "be left out.)"
    )
    return Refusal("ambiguous", domain, why, remedy)


def same_names(plans: t.Sequence[DomainPlan]) -> dict[str, list[Refusal]]:
    """Return by the name of the domain why its overlays cannot be made: another disk of the call would get the same."""
    by_path: dict[str, list[tuple[str, str]]] = {}
    for plan in plans:
        for target, source in plan.sources.items():
            by_path.setdefault(os.path.realpath(source.path), []).append((plan.domain.name, target))
    problems: dict[str, list[Refusal]] = {}
    for path, disks in by_path.items():
        whose = " and of ".join(f"disk {target} of {name}" for name, target in disks)
        for name in dict.fromkeys(name for name, _target in disks) if len(disks) > 1 else ():
            why = f"{path} would be the overlay of {whose}"
            remedy = "Give a directory, where the names have the domain and the disk in them, or take them one by one."
            problems.setdefault(name, []).append(Refusal("same_name", name, why, remedy))
    return problems
