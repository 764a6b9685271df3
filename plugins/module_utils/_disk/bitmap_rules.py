# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: the rules about bitmaps.

Pure. An overlay carries on each bitmap of ACTIVE that is recording and not inconsistent (libvirt, "Incremental backup
internals", Creating overlays), unless rule 7 says that it is another one: in the overlay nothing would tell that.

An incremental backup since a bitmap is possible if

1) the topmost image has it,
2) the images that have it are contiguous from the top, no gap,
3) all of them are recording,
4) none is inconsistent (libvirt, "Incremental backup internals", Integration with backups),
5) all these images have one virtual size, since QEMU cannot merge bitmaps of different sizes, as the backup does,
6) no image below them has lost the bitmap that this one goes on with: what changed there is told nowhere any more. QEMU
   and libvirt do not look. Which bitmaps an image has lost their old directory tells. Where it is gone, all count, and
   so does one of a name that was used before, unless the image is older than the checkpoint. And if the lowest image
   that has the bitmap is an overlay that was made after the checkpoint, the image below must have it, too. If there is
   none any more, who has copied the data up may have left the bits behind, and
7) the topmost image is not older than the checkpoint: else its bitmap is an earlier one of this name. Further down such
   an earlier one, as that of a template, only adds bits.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable
from .._qcow2.bitmaps import MAX_BITMAP_DATA, Bitmap
from .._qcow2.image import Image

NOT_IN_TOP = "not_in_top"
GAP = "gap"
NOT_RECORDING = "not_recording"
INCONSISTENT = "inconsistent"
DIFFERENT_SIZE = "different_size"
BROKEN = "broken"  # libvirt says so of a running domain, and not which rule
IN_USE = "in_use"
INCOMPLETE = "incomplete"
LOST = "lost"
SWAPPED = "swapped"  # of a domain: the disk had another target when the checkpoint was made
OLDER = "older"

# Why a bitmap that is not valid cannot be made so, beside those.
EMPTIED = "emptied"

MAX_BITMAPS_CARRIED = 4096  # of one ACTIVE; QEMU's time grows with the square of them
MAX_ALL_BITMAP_DATA = 4 * 1024 * 1024 * 1024  # bytes of memory that QEMU needs to have all bitmaps of ACTIVE open
_CLOCKS = 3600  # seconds by which the clocks of a host and of its storage may differ
_CLOCKS_OF_HOSTS = 10  # seconds by which those of two hosts may that have had the domain
_SHOWN = 5  # bitmaps that a message names

_FULL = (
    "Make a full backup with a new checkpoint. kvmfleet.qcow2.domain_checkpoint with unusable=remove removes this one, "
    "so that it is not in the way (without libvirt: kvmfleet.qcow2.qcow2_bitmap with state=absent)."
)
_HEAL = (
    "With the VM shut off, kvmfleet.qcow2.domain_checkpoint (without libvirt: kvmfleet.qcow2.qcow2_bitmap) makes it "
    "valid again, from what the images above the lowest one with the bitmap hold themselves."
)
_HEAL_BY_WORD = (
    "With the VM shut off, kvmfleet.qcow2.domain_checkpoint (without libvirt: kvmfleet.qcow2.qcow2_bitmap) can make it "
    "valid again, from what the image holds, if you know that the checkpoint was made on this image and that nobody "
    "has emptied the image since (assume_not_emptied). Else: "
)
_NO_HEALING = "It cannot be made valid again. "
_ASK_LIBVIRT = (
    "A process has the image open for writing, most likely the running VM, so what is stored tells nothing. libvirt "
    "knows more while the VM runs; or look again when it is shut off."
)
_LOST = (
    "This image, below those that have the bitmap, has lost its own, since a program that does not know them has "
    "written to it, or a QEMU was killed as it opened it. This one may have begun there. If you know that it did not, "
    "'qemu-img check -r all {}' has the image forget them, with the VM shut off."
)
_NOT_BELOW = (
    "This image lacks the bitmap, although the overlay on top of it was made after the checkpoint, so the bitmap there "
    "goes on with one of this image. QEMU could not store that (a full storage), or this image was put here since, as "
    "a copy without bitmaps, or by a program that takes in the one between, as 'virsh blockpull' does. What changed "
    "before the overlay was made is told nowhere."
)
_FLATTENED = (
    "This image has no image below any more, although it is an overlay that was made after the checkpoint, so its "
    "bitmap goes on with one below. 'virsh blockpull' moves the bits of that, if libvirt was there as it ended; "
    "'qemu-img rebase' leaves them behind. Nothing tells which of them took in what was below."
)
_OLDER = (
    "This image was last written to before the checkpoint was made, as one that was put back from a copy, so its "
    "bitmap is an earlier one of this name. That of the checkpoint is gone, with what was in its image."
)
_LOOK_FURTHER = "The chain below this image was not read. Look at the whole chain, or mend it first."


class LayerBitmaps(t.NamedTuple):
    """What the rules need of one image of a chain."""

    path: str
    virtual_size: int  # bytes
    bitmaps: t.Mapping[str, Bitmap]  # by name
    is_open_for_writing: bool = False  # so what is stored tells nothing about its bitmaps
    lost_bitmaps: int = 0  # made worthless by a program that does not know them
    lost_names: frozenset[str] | None = None  # of these; None if that cannot be told
    modified: int | None = None  # seconds since 1970, of the last write; None if that cannot be told
    made: int = 0  # seconds since 1970, when an overlay was; 0: not known
    is_flattened: bool = False  # an overlay that records no image below any more

    def is_older_than(self, created: int | None) -> bool:
        """Whether it was last written to before a checkpoint was made: a bitmap is stored when its image is closed.

        What is open is still to be written. Of what is but slightly older nobody can tell, for the clocks.
        """
        if self.is_open_for_writing:
            return False
        return created is not None and self.modified is not None and self.modified + _CLOCKS < created

    def may_have_lost(self, name: str, created: int | None = None) -> bool:
        """Whether the bitmap of a checkpoint, which was made then, may be one that this image has lost."""
        if not self.lost_bitmaps or name in self.bitmaps or self.is_older_than(created):
            return False
        return self.lost_names is None or name in self.lost_names

    def was_made_after(self, created: int | None) -> bool:
        """Whether a checkpoint, which was made then, is older than this overlay: its bitmap goes on with one below."""
        return created is not None and 0 < created < self.made - _CLOCKS_OF_HOSTS


class Checkpoint(t.NamedTuple):
    """Whether the next incremental backup since a checkpoint is possible."""

    name: str
    valid: bool | None  # None if it cannot be told
    problem: str | None = None  # one of the constants above
    image: str | None = None  # path of the image at fault
    advice: str | None = None

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the modules return it."""
        return {key: printable(value) if isinstance(value, str) else value for key, value in self._asdict().items()}


def carries_over(bitmap: Bitmap) -> bool:
    """Whether an overlay must go on recording this bitmap of ACTIVE."""
    return bitmap.recording and not bitmap.inconsistent


def judge_all(
    chain: t.Sequence[LayerBitmaps], *, complete: bool, created: t.Mapping[str, int] | None = None
) -> list[Checkpoint]:
    """Return a verdict for each bitmap name in the chain, top to base; the options are those of judge(), by name."""
    names = dict.fromkeys(name for layer in chain for name in layer.bitmaps)
    return [judge(name, chain, complete=complete, created=(created or {}).get(name)) for name in names]


def judge(
    name: str, chain: t.Sequence[LayerBitmaps], *, complete: bool = True, created: int | None = None
) -> Checkpoint:
    """Return whether this checkpoint can be used, judged from the top of the chain downwards.

    `complete`: the chain ends with its base. `created`: when the checkpoint was made, in seconds since 1970, if known.
    """
    way_out = _way_out(name, chain, complete, created)
    fault = _fault_of_top(name, chain, created, way_out)
    if fault is not None:
        return fault
    missing: LayerBitmaps | None = None  # the uppermost image that lacks the bitmap
    unknown: LayerBitmaps | None = None
    above: LayerBitmaps | None = None  # the image just above, if it has the bitmap or may have it
    for layer in chain:
        bitmap = layer.bitmaps.get(name)
        if layer.is_open_for_writing:
            unknown, above = unknown or layer, layer  # its size is known
        elif bitmap is None:
            missing = missing or layer
        elif missing is not None:  # rule 2
            return _without(name, GAP, missing, layer, way_out)
        else:
            fault = _fault(bitmap, layer, above, way_out)
            if fault is not None:
                return fault
            above = layer
    lost = lost_below(name, chain, created)
    if lost is not None:  # rule 6
        return Checkpoint(name, False, LOST, lost.path, f"{_why_lost(name, lost, created)} {way_out}")
    if unknown is not None:
        return Checkpoint(name, None, IN_USE, unknown.path, _ASK_LIBVIRT)
    if not complete:
        return Checkpoint(name, None, INCOMPLETE, chain[-1].path, _LOOK_FURTHER)
    return Checkpoint(name, True)


def _why_lost(name: str, lost: LayerBitmaps, created: int | None) -> str:
    if lost.may_have_lost(name, created):
        return _LOST.format(lost.path)
    return _FLATTENED if name in lost.bitmaps else _NOT_BELOW


def lost_below(name: str, chain: t.Sequence[LayerBitmaps], created: int | None) -> LayerBitmaps | None:
    """Return the image that may have lost the bitmap, or lacks it, below all that have it, or can have it.

    If it has the bitmap itself, the image that was below it is gone.
    """
    lowest = max((n for n, one in enumerate(chain) if name in one.bitmaps or one.is_open_for_writing), default=-1)
    below = chain[lowest + 1 :]
    if lowest >= 0 and chain[lowest].was_made_after(created):
        if below:
            return below[0]
        if chain[lowest].is_flattened:
            return chain[lowest]
    return next((one for one in below if one.may_have_lost(name, created)), None)


def why_not_provable(
    name: str, chain: t.Sequence[LayerBitmaps], created: int | None = None
) -> tuple[str, LayerBitmaps] | None:
    """Return the rule because of which nobody can tell what changed since a bitmap began, and the image; None if none.

    `name` is in the chain. Above the lowest image with it, what changed is what the images hold. In that one it must
    be in order, unless it is the topmost one, of which EMPTIED says that it may have been emptied. It must be the
    bitmap of this checkpoint, not one of its name in a template, nor may an image above be one from before (OLDER):
    the one of this checkpoint is gone then, with what was in its image.
    """
    places = [place for place, layer in enumerate(chain) if name in layer.bitmaps]
    lowest = chain[places[-1]]
    older = next((one for one in chain[places[-1] :: -1] if one.is_older_than(created)), None)
    if older is not None:
        return OLDER, older
    if lowest.bitmaps[name].inconsistent and places[-1] > 0:
        return INCONSISTENT, lowest
    for layer in (chain[place] for place in places):
        if not layer.bitmaps[name].recording and not layer.bitmaps[name].inconsistent:
            return NOT_RECORDING, layer
    other = next((one for one in chain[places[-1] :: -1] if one.virtual_size != lowest.virtual_size), None)
    if other is not None:
        return DIFFERENT_SIZE, other
    lost = lost_below(name, chain, created)
    if lost is not None:
        return LOST, lost
    return (EMPTIED, lowest) if lowest.bitmaps[name].inconsistent else None


def _way_out(name: str, chain: t.Sequence[LayerBitmaps], complete: bool, created: int | None) -> str:
    """Return what to do about a bitmap that is not valid."""
    if (
        not complete
        or any(layer.is_open_for_writing for layer in chain)
        or not any(name in one.bitmaps for one in chain)
    ):
        return _FULL
    why = why_not_provable(name, chain, created)
    if why is None:
        return _HEAL
    return (_HEAL_BY_WORD if why[0] == EMPTIED else _NO_HEALING) + _FULL


def _fault_of_top(name: str, chain: t.Sequence[LayerBitmaps], created: int | None, way_out: str) -> Checkpoint | None:
    """Return why the topmost image has not the bitmap of this checkpoint."""
    top = chain[0]
    if top.is_open_for_writing:
        return None
    if name not in top.bitmaps:  # rule 1
        below = next((layer for layer in chain if name in layer.bitmaps), None)
        return _without(name, NOT_IN_TOP, top, below, way_out)
    if top.is_older_than(created):  # rule 7
        return Checkpoint(name, False, OLDER, top.path, f"{_OLDER} {way_out}")
    return None


def _without(name: str, problem: str, missing: LayerBitmaps, below: LayerBitmaps | None, way_out: str) -> Checkpoint:
    """Return that an image lacks the bitmap, while one below has it, or none."""
    has = f", while {below.path} below has it" if below is not None else ""
    if missing.may_have_lost(name):
        cause = "A program that does not know bitmaps has written to this image and made its bitmaps worthless. "
    elif below is None:
        cause = (
            "No image of the chain has it: it was removed, the VM died in the very run in which it was made, or the "
            "disk was put back to an image below the one that has it (going back). "
        )
    else:
        cause = "It was most likely made with qemu-img or by an offline snapshot, which drop the bitmaps. "
    advice = f"This image lacks the bitmap{has}, so changes were not recorded. {cause}{way_out}"
    return Checkpoint(name, False, problem, missing.path, advice)


def _fault(bitmap: Bitmap, layer: LayerBitmaps, above: LayerBitmaps | None, way_out: str) -> Checkpoint | None:
    """Return what is wrong with the bitmap of one image."""
    problem: str | None = None
    if bitmap.inconsistent:  # rule 4, before rule 3: an inconsistent bitmap never records, whatever its flag says
        problem = INCONSISTENT
        why = "The bitmap was not saved properly, as after a crash or power loss, so changes are not recorded in it."
    elif not bitmap.recording:  # rule 3
        problem = NOT_RECORDING
        why = "The bitmap is disabled in this image, so changes were not recorded."
    elif above is not None and above.virtual_size != layer.virtual_size:  # rule 5
        problem = DIFFERENT_SIZE
        why = (
            f"The image has {layer.virtual_size} bytes and the one above it {above.virtual_size}; QEMU cannot merge "
            "bitmaps of different sizes. It is valid again once the overlays are merged down (state=committed)."
        )
    if problem is None:
        return None
    return Checkpoint(bitmap.name, False, problem, layer.path, f"{why} {way_out}")


def bitmap_problems(path: str, image: Image) -> list[Refusal]:
    """Return why the bitmaps of this ACTIVE are more, or other, than can be handled."""
    if len(image.bitmaps) > MAX_BITMAPS_CARRIED:
        return [
            Refusal(
                "too_many_bitmaps",
                path,
                f"has {len(image.bitmaps)} bitmaps, more than the {MAX_BITMAPS_CARRIED} that can be handled in "
                "reasonable time",
                "Remove those that no backup needs with 'qemu-img bitmap --remove'.",
            )
        ]
    return [*_name_problems(path, image), *_size_problems(path, image)]


def _name_problems(path: str, image: Image) -> list[Refusal]:
    """Return why QEMU cannot be told the names of the bitmaps."""
    odd = [bitmap for bitmap in image.bitmaps if not is_expressible(bitmap.name)]
    if not odd:
        return []
    return [
        Refusal(
            "bitmap_name",
            path,
            f"the bitmap name {names_of(odd)} cannot be passed to QEMU's monitor (it is not UTF-8, or has code points "
            "that are no characters)",
            "Remove the bitmap with 'qemu-img bitmap --remove'.",
        )
    ]


def _size_problems(path: str, image: Image) -> list[Refusal]:
    """Return why the bits of the bitmaps are too many."""
    large = [b for b in image.bitmaps if carries_over(b) and b.data_bytes(image.virtual_size) > MAX_BITMAP_DATA]
    whole = sum(bitmap.data_bytes(image.virtual_size) for bitmap in image.bitmaps if not bitmap.inconsistent)
    if large:
        return [
            Refusal(
                "bitmaps_too_large",
                path,
                f"the granularity of the bitmap {names_of(large)} is so fine that it needs more than "
                f"{MAX_BITMAP_DATA >> 20} MiB for {image.virtual_size} bytes. QEMU stores no larger one",
                "Remove it and make a full backup with a coarser bitmap.",
            )
        ]
    if whole > MAX_ALL_BITMAP_DATA:
        return [
            Refusal(
                "bitmaps_too_large",
                path,
                f"its {len(image.bitmaps)} bitmaps need {whole >> 20} MiB of memory to be opened; at most "
                f"{MAX_ALL_BITMAP_DATA >> 20} MiB is given",
                "Remove those that no backup needs.",
            )
        ]
    return []


def bitmap_drift(active: Image | None, overlay: Image, earlier: t.Collection[str], *, is_open: bool) -> list[str]:
    """Return which bitmaps the overlay should be recording and is not.

    `earlier`: names of those that are not of the checkpoints of their names, so that it need not have them.
    `is_open`: a process has the overlay open for writing, so its flag in-use means nothing.
    """
    there = {bitmap.name: bitmap for bitmap in overlay.bitmaps}
    wanted = [bitmap for bitmap in active.bitmaps if carries_over(bitmap)] if active else []
    wanted = [bitmap for bitmap in wanted if bitmap.name in there or bitmap.name not in earlier]
    own = [there[bitmap.name] for bitmap in wanted if bitmap.name in there]
    found = {
        "it lacks the bitmap {}": [bitmap for bitmap in wanted if bitmap.name not in there],
        "its bitmap {} is not recording": [bitmap for bitmap in own if not bitmap.recording],
        "its bitmap {} is inconsistent": [bitmap for bitmap in own if bitmap.inconsistent and not is_open],
    }
    return [what.format(names_of(bitmaps)) for what, bitmaps in found.items() if bitmaps]


def is_expressible(name: str) -> bool:
    """Whether QEMU's JSON parser takes the name: it refuses bytes that are not UTF-8, and Unicode's noncharacters."""
    return not any(
        0xD800 <= ord(character) <= 0xDFFF or 0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE
        for character in name
    )


def names_of(bitmaps: t.Sequence[Bitmap]) -> str:
    """Return the names for a message; where they are many or long, the first of them."""
    shown = [repr(b.name if len(b.name) <= 100 else f"{b.name[:100]}…") for b in bitmaps[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(bitmaps) - _SHOWN} more" if len(bitmaps) > _SHOWN else "")
