# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what a new overlay is called, and which image of a disk is which snapshot.

The mark that an overlay bears tells whose snapshot it is. A name alone does not: debian.web1.qcow2 on debian.qcow2 is
either a snapshot or a clone, and whoever takes the one for the other removes a disk. An image without the mark (made by
version 0.1, or copied by libvirt to another storage) is the snapshot for certain if it is called as the snapshot would
be, no other disk has it, and an image below it is known to have been the domain's disk: it bears the domain's mark, or
libvirt remembers it with a checkpoint. If only one of these is known, it is ambiguous.

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
    judged = [_judge_unmarked(overlay, below, facts, domain, mark, remembered) for overlay, below in pairs]
    found = [one for one in judged if one is not None]
    return next((one for one in found if one.is_certain), found[0] if found else None)


def flattened_one(facts: DiskFacts, mark: Mark) -> Layer | None:
    """Return the image that bears the mark and has no image below any more; None if there is none.

    'virsh blockpull', which copies everything into the overlay, leaves the mark.
    """
    base = facts.layers[-1] if facts.layers else None
    return base if base is not None and _is_marked(base, facts, mark) else None


def _judge_unmarked(
    overlay: Layer,
    below: Layer,
    facts: DiskFacts,
    domain: str,
    mark: Mark,
    remembered: t.Callable[[], t.Container[str]],
) -> Found | None:
    """Return an image that does not bear the mark if it is the snapshot all the same, or may be it."""
    if not _may_be(overlay, facts, mark):
        return None
    is_own, was_active = overlay in facts.own, _was_active(below, facts, mark.vm, remembered())
    if _mark_of(overlay) is not None:
        return Found(overlay, below, is_certain=was_active)
    stem = os.path.basename(overlay.path)[: -len(f".{mark.snapshot}.qcow2")]
    stems = _stems_on(below, facts, domain, mark)
    # On debian.web1.qcow2, debian.web1.monday.qcow2 is the snapshot monday of it; web1.monday of debian, perhaps.
    name = f"{stem}.{mark.snapshot}"
    has_longer = any(name.startswith(f"{one}.") for one in stems if len(one) > len(stem))
    if was_active or (stem in stems and overlay not in facts.lent and below not in facts.lent):
        return Found(overlay, below, is_certain=is_own and was_active and stem in stems and not has_longer)
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


def _may_be(overlay: Layer, facts: DiskFacts, mark: Mark) -> bool:
    """Whether an image that does not bear the mark could be the snapshot, by its name or another mark alone."""
    found, top = _mark_of(overlay), _mark_of(facts.layers[0])
    if found is None:
        return os.path.basename(overlay.path).endswith(f".{mark.snapshot}.qcow2")
    # The domain was defined anew since, or has taken over the disk of another. Further down, below an image that is not
    # of that other domain, it is a template.
    return overlay in facts.own and top is not None and top.vm == found.vm and found.snapshot == mark.snapshot


def _stems_on(below: Layer, facts: DiskFacts, domain: str, mark: Mark) -> set[str]:
    """Return what the names of overlays on top of an image can begin with, or could in version 0.1."""
    chain = _chain_from(below, facts)
    return {*_old_stems([layer.path for layer in chain]), stem_of(chain, mark.vm), f"{domain}.{mark.target}"}


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


def snapshot_in(path: str, layers: t.Sequence[Layer], domain: str, mark: Mark) -> str | None:
    """Return the snapshot that an overlay of this path was, by its name; `layers` are the images that it stood on."""
    name = os.path.basename(path)
    stem = stem_of(layers, mark.vm)
    if not name.endswith(".qcow2"):
        return None
    begins = [f"{one}." for one in (stem, f"{domain}.{mark.target}") if name.startswith(f"{one}.")]
    found = name[: -len(".qcow2")]
    return found[len(max(begins, key=len)) :] if begins else found.rpartition(".")[2]


def _old_stems(paths: t.Sequence[str]) -> list[str]:
    """Return the stems that version 0.1 may have made out, from the names of images, top to base.

    It began with the lowest one that no other disk of the host had just then. That may have been any of them.
    """
    stems = []
    for lowest in range(len(paths)):
        stem = ""
        for path in reversed(paths[: lowest + 1]):
            own = _without_extension(path)
            if not stem or not own.startswith(f"{stem}."):
                stem = own
        stems.append(stem)
    return stems


def _without_extension(path: str) -> str:
    name = os.path.basename(path)
    return next((name[: -len(end)] for end in _EXTENSIONS if name.endswith(end) and name != end), name)


def ambiguous(domain: str, found: Found, mark: Mark) -> Refusal:
    """Return the refusal of a disk of which nobody can tell whether it is on the snapshot."""
    why = (
        f"whether its disk {mark.target} is on the snapshot {mark.snapshot} cannot be told: {found.overlay.path} is "
        f"either that snapshot of {found.below.path}, or a disk made from {found.below.path} as a template, or a "
        "snapshot with another name, and bears no mark of this domain"
    )
    remedy = (
        "Choose another name for the snapshot. (If it is the snapshot, there is nothing to be done, and the domain can "
        "be left out.)"
    )
    return Refusal("ambiguous", domain, why, remedy)


def flattened(domain: str, image: Layer, mark: Mark, *, is_new: bool) -> Refusal:
    """Return the refusal of a disk whose snapshot, which may be wanted as a new one, has no image below any more."""
    why = (
        f"{image.path} was the overlay of the snapshot {mark.snapshot} of its disk {mark.target}, and has no image "
        "below any more, as 'virsh blockpull' leaves it. What the disk was like at that snapshot is not in its chain"
    )
    left = (
        "Nothing of it is left to merge down or to go back to. Name the other disks (disks), or leave the domain out."
    )
    return Refusal("flattened", domain, why, "Choose another name for the snapshot." if is_new else left)


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
