# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: how an image that stands at an overlay's place differs from the overlay, for which cause, and the way out.

Pure. The advice is that of the gravest cause. To remove the image is advised only if nothing is lost with it, or with
what would be lost.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal
from .._qcow2.chain import has_protocol
from .._qcow2.image import Image
from .._qcow2.mark import Mark
from .bitmap_rules import bitmap_drift, names_of
from .observe import ObservedChain, Target

# The advice about an overlay with which nothing is lost.
MAY_GO = (
    "It holds no data. If no VM has it as its disk, here or on another host, and no image stands on it, remove it and "
    "run this again."
)

_ELSEWHERE = "Give the overlay another name or folder."
_IN_USE = f"A process has it open for writing, most likely a VM: leave it alone. {_ELSEWHERE}"
_ANOTHERS = f"Most likely it is the disk of another VM, here or on another host: leave it alone. {_ELSEWHERE}"
_CORRUPT = "Repair it with 'qemu-img check -r all', or restore it from a backup."
_FORMAT = "Find out which format is right. Record that with 'qemu-img rebase -u -b … -F …', or ask for it."
_ODD = f"Look at it with 'qemu-img info'; this collection has not made it so. {_ELSEWHERE}"
_UNKNOWN = (
    "It is the disk of another VM, or left over from a merge or from going back. What was written to it may be in it "
    f"alone, so leave it alone until you know. {_ELSEWHERE}"
)
_LEFT_OVER = (
    "It is left over from 'virsh blockcommit --pivot', which has merged it down, or from going back, which gave it "
    "up. After going back, what the VM wrote to it and its bitmaps are in it alone and are lost with it. Move it away, "
    "or remove it if nobody needs that; or give the overlay another name or folder."
)
_KILLED = f"Most likely it was left by a run of this snapshot that was killed, and other images came since. {MAY_GO}"
_HEAL = (
    "With the VM shut off, kvmfleet.qcow2.domain_checkpoint (without libvirt: kvmfleet.qcow2.qcow2_bitmap) makes it "
    "valid again where that is right, from what the overlay holds. Else make a full backup with a new checkpoint."
)


class Wanted(t.Protocol):
    """What the rules need of a request for an overlay."""

    @property
    def path(self) -> str:
        """Return its place."""

    @property
    def backing_format(self) -> str:
        """Return the format of ACTIVE that it is to record."""

    @property
    def must_be_fresh(self) -> bool:
        """Return whether the VM is not on it yet."""

    @property
    def mark(self) -> Mark | None:
        """Return the mark that it is to bear."""

    @property
    def created(self) -> tuple[tuple[str, int], ...]:
        """Return the bitmaps of known checkpoints, and when these were made."""


class _Difference(t.NamedTuple):
    """One way in which the image differs, and what to do about its cause."""

    what: str
    advice: str


def drift_problems(request: Wanted, active: ObservedChain, target: Target, image: Image) -> list[Refusal]:
    """Return how the image that stands there differs from the overlay that was asked for."""
    found = [
        *_differences_in_place(request, active, target, image),
        *(_signs_of_use(request, active, target, image) if request.must_be_fresh else ()),
        *_differences_in_bitmaps(request, active, target, image),
    ]
    if not found:
        return []
    advice = _IN_USE if target.is_open_for_writing and request.must_be_fresh else found[0].advice
    why = f"exists and differs: {'; '.join(one.what for one in found)}"
    return [Refusal("differs", request.path, why, advice)]


def _differences_in_place(
    request: Wanted, active: ObservedChain, target: Target, image: Image
) -> t.Iterator[_Difference]:
    """Yield how it does not fit on top of ACTIVE, the gravest difference first."""
    below = active.layers[0]
    if target.backing_path != below.real_path and target.backing_identity != below.identity:
        yield _other_backing_file(request, target, image, below.real_path)
    elif image.backing_format != request.backing_format:
        what = f"it records the backing format {image.backing_format or 'none'}, not {request.backing_format}"
        yield _Difference(what, _FORMAT)
    if image.corrupt:
        yield _Difference("it is marked corrupt", _CORRUPT)
    if image.virtual_size < active.virtual_size:
        what = f"its virtual size is {image.virtual_size}, smaller than ACTIVE's {active.virtual_size}"
        yield _Difference(what, MAY_GO if _is_of_killed_run(request, target, image) else _ODD)


def _is_of_killed_run(request: Wanted, target: Target, image: Image) -> bool:
    """Whether it is this very snapshot and holds no data, so that nothing is lost with it.

    So a run leaves it that was killed before the VM was put on it. Its bitmaps do not count, whatever they mark: the
    disk is as the image below has it. The VM goes on there, where checkpoints come and go, and the size can change.
    """
    return request.must_be_fresh and request.mark is not None and image.mark == request.mark and not target.has_data


def _other_backing_file(request: Wanted, target: Target, image: Image, wanted: str) -> _Difference:
    """Return the difference of an image that is on top of something else, of nothing, or of what is gone."""
    if image.backing_file is None:
        return _Difference(f"its backing file is none, not {wanted}", _ANOTHERS)
    what = f"its backing file is {target.backing_path}, not {wanted}"
    if _is_of_killed_run(request, target, image):
        return _Difference(what, _KILLED)
    if target.backing_identity is not None or has_protocol(image.backing_file):
        return _Difference(what, _ANOTHERS)
    advice = (
        "Put that back in its place, or, if it was renamed, have the image record its new name with 'qemu-img rebase "
        f"-u'. Do not remove it: it may be the disk of another VM. {_ELSEWHERE}"
    )
    return _Difference(f"{what}, and that file does not exist", advice)


def _signs_of_use(request: Wanted, active: ObservedChain, target: Target, image: Image) -> t.Iterator[_Difference]:
    """Yield the signs that this existing overlay is not one that an interrupted run of ours has left fresh.

    It must not be taken for one: it is another VM's disk, or a VM has run on it.
    """
    own = {bitmap.name for bitmap in active.image.bitmaps} if active.image else set()
    foreign = [bitmap for bitmap in image.bitmaps if bitmap.name not in own]
    is_ours = image.mark == request.mark
    if not is_ours:
        marked = f"is marked as that of {' '.join(image.mark)}" if image.mark else "has no mark of this collection"
        what = f"it was not made as this snapshot of this disk (it {marked})"
        yield _Difference(what, _ANOTHERS if image.mark else _UNKNOWN if target.has_data or foreign else MAY_GO)
    if target.has_data:
        what = "it holds data, so a VM has run on it and was later put back to the image below"
        yield _Difference(what, _LEFT_OVER if is_ours else _UNKNOWN)
    if foreign:
        what = f"it has the bitmap {names_of(foreign)}, which a new overlay would not have"
        yield _Difference(what, MAY_GO if _is_of_killed_run(request, target, image) else _UNKNOWN)
    earlier = active.earlier_bitmaps(dict(request.created))
    carried = [bitmap for bitmap in image.bitmaps if bitmap.name in earlier]
    if carried:
        what = f"its bitmap {names_of(carried)} would look valid, and in ACTIVE, last written to before its checkpoint"
        yield _Difference(f"{what} was made, it is an earlier one of that name", MAY_GO)
    if target.is_open_for_writing:
        yield _Difference("a process has it open for writing, most likely another VM", _IN_USE)
    if image.virtual_size != active.virtual_size:
        what = f"its virtual size is {image.virtual_size}, not ACTIVE's {active.virtual_size}"
        yield _Difference(what, MAY_GO if _is_of_killed_run(request, target, image) else _ODD)
    if image.encrypted or image.has_data_file or image.dirty:
        what = "it is encrypted, has a data file, or was not closed properly, so this collection has not made it"
        yield _Difference(what, _ODD)


def _differences_in_bitmaps(
    request: Wanted, active: ObservedChain, target: Target, image: Image
) -> t.Iterator[_Difference]:
    """Yield which bitmaps do not record. One cannot be added later: what was written before would be missing in it."""
    # Of one that is to be fresh, and has data or another's mark, that is told before, with its advice.
    advice = MAY_GO if request.must_be_fresh else _HEAL
    earlier = active.earlier_bitmaps(dict(request.created))
    for what in bitmap_drift(active.image, image, earlier, is_open=target.is_open_for_writing or target.is_in_work):
        yield _Difference(what, advice)
