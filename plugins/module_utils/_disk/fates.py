# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what becomes of each bitmap when the layers above BASE are merged down into it.

Pure. Where no layer has lost anything the outcome is that of libvirt's own commit (libvirt, "Incremental backup
internals", Commit operations of block jobs): each bitmap that is valid from the top downwards is made in BASE if BASE
lacks it, in the granularity of the topmost image, and takes in the bits of every layer. A bitmap that BASE has and that
no backup can use from the top stays, and records the commit: it takes in all that the layers hold.

A bitmap that no backup can use before the commit is usable after it only if BASE had it in order, since what was
written meanwhile is known then: it is what the layers hold.
"""

from __future__ import annotations

import typing as t

from .._qcow2.bitmaps import Bitmap
from .bitmap_rules import carries_over

DISABLED = "disabled"
INCONSISTENT = "inconsistent"
GAP = "gap"

REASONS = (DISABLED, INCONSISTENT, GAP)

Named = t.Mapping[str, Bitmap]  # the bitmaps of one image, by name


class Fate(t.NamedTuple):
    """What becomes of one bitmap."""

    bitmap: Bitmap | None  # as BASE has it afterwards; None if it goes
    bits: tuple[int, ...] = ()  # the images, by their place in the chain, of which the bitmap's own bits go in
    held: tuple[int, ...] = ()  # those of which all goes in that they hold, because they have not recorded it
    skipped: str | None = None  # why no backup can use it afterwards

    @property
    def is_exact(self) -> bool:
        """Whether it holds just what was recorded."""
        return not self.held


def fates(chain: t.Sequence[Named], depth: int) -> dict[str, Fate]:
    """Return what becomes of each bitmap. `chain` goes from the topmost image that goes in down to the bottom.

    The images before place `depth` go in; the one at `depth` is BASE. A bitmap that only images below BASE have is not
    touched.
    """
    names = dict.fromkeys(name for image in chain[: depth + 1] for name in image)
    return {name: _fate(name, chain, depth) for name in names}


def _fate(name: str, chain: t.Sequence[Named], depth: int) -> Fate:
    own = chain[depth].get(name)
    if own is None:
        return _fate_of_new(name, chain, depth)
    if own.inconsistent:
        return Fate(None, skipped=INCONSISTENT)
    if not own.recording:
        return Fate(own, bits=(depth,), skipped=DISABLED)
    layers = range(depth - 1, -1, -1)
    # From the lowest one upwards: above one that has not recorded, a bitmap of the name may be a later one.
    first_bad = next((place for place in layers if not _records(name, chain[place])), -1)
    bits, held = tuple(range(first_bad + 1, depth + 1)), tuple(range(first_bad + 1))
    bitmap = own if held else chain[0][name]
    return Fate(bitmap, bits, held, skipped=fault_below(name, chain[depth + 1 :]))


def _fate_of_new(name: str, chain: t.Sequence[Named], depth: int) -> Fate:
    """Return what becomes of a bitmap that BASE lacks."""
    if any(name in image for image in chain[depth + 1 :]):
        return Fate(None, skipped=GAP)
    places = [place for place in range(depth) if name in chain[place]]
    found = [chain[place][name] for place in places]
    if any(bitmap.inconsistent for bitmap in found):
        return Fate(None, skipped=INCONSISTENT)
    if not all(bitmap.recording for bitmap in found):
        return Fate(None, skipped=DISABLED)
    if places != list(range(len(places))):
        return Fate(None, skipped=GAP)
    return Fate(found[0], bits=tuple(places))


def _records(name: str, image: Named) -> bool:
    return name in image and carries_over(image[name])


def fault_below(name: str, below: t.Sequence[Named]) -> str | None:
    """Return why the chain below BASE makes a bitmap useless; None if it does not."""
    has_it = [name in image for image in below]
    contiguous = has_it.index(False) if False in has_it else len(has_it)
    found = [image[name] for image in below if name in image]
    if any(bitmap.inconsistent for bitmap in found):
        return INCONSISTENT
    if not all(bitmap.recording for bitmap in found):
        return DISABLED
    return GAP if any(has_it[contiguous:]) else None


def wrongly_mended(above: t.Sequence[Named], chain: t.Sequence[Named], depth: int) -> list[str]:
    """Return the bitmaps that no backup can use now and that would look usable once the rest stands on BASE.

    `above` are the images on top of those that go in, the first one being that whose bitmaps are asked about. What was
    written while an image in between did not record is in no bitmap of theirs.
    """
    after = fates(chain, depth)
    wrong = []
    for name in above[0]:
        fate = after.get(name)
        has_it = {name: fate.bitmap} if fate and fate.bitmap else {}
        now = _is_usable(name, [*above, *chain])
        then = _is_usable(name, [*above, has_it, *chain[depth + 1 :]])
        if then and not now:
            wrong.append(name)
    return wrong


def _is_usable(name: str, chain: t.Sequence[Named]) -> bool:
    """Whether a chain that has the bitmap looks valid to libvirt."""
    return _records(name, chain[0]) and fault_below(name, chain) is None
