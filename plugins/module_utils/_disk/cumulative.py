# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the bits that a cumulative bitmap of an overlay begins with.

::

    OVERLAY   begins with the union of …
    ACTIVE    valid          ┐
    image     valid          ├ … these
    image     valid          ┘
    base      not there, or inconsistent: libvirt's backup reads no further either

With them OVERLAY's bitmap alone tells all changes since the checkpoint, as tools need that read no other image.
"""

from __future__ import annotations

import contextlib
import errno
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage, owning
from .._qcow2.bitmaps import Bitmap
from .._qcow2.dirty import DirtyBits, DirtyMap, is_union, maps_of, united
from .._qcow2.image import Image, read_image
from .._qcow2.scratch import write_scratch
from .observe import ObservedChain

MAX_UNITED = 8 << 30  # bytes of bits of all images; uniting them takes about that many seconds
_RESCALING = 32  # times as long as it takes to unite bits of another granularity
_MFD_NOEXEC_SEAL = 0x8  # memfd_create(2); since Linux 6.3, where it can be an obligation

Maps = t.Mapping[str, t.Sequence[DirtyBits]]  # by the name of the bitmap, ACTIVE's map first


def map_chain(
    active: ObservedChain, file: OpenImage, names: t.Collection[str], open_below: t.Callable[[str], OpenImage]
) -> Maps:
    """Return the maps of the bitmaps of these names; Refusal if one is damaged, or too large.

    `file` is ACTIVE. `names` are those of its bitmaps that an overlay carries on. `open_below` returns the open image
    of a path, to which nobody writes. What it returns must stay open, and be kept from writers, as long as the maps are
    read.
    """
    maps: dict[str, list[DirtyMap]] = {}
    wanted = {bitmap.name: bitmap for bitmap in active.image.bitmaps if bitmap.name in names} if active.image else {}
    cost = 0
    for layer in active.layers:
        if layer.image is None or not wanted:
            break
        if layer is not active.layers[0]:
            file = open_below(layer.path)
            if file.identity != layer.identity:
                raise Refusal("changed_meanwhile", layer.path, "was moved or replaced meanwhile", "Run this again.")
        # Of an image below, what was read before it was kept from writers may be of yesterday.
        image = layer.image if layer is active.layers[0] else read_image(file)
        own = maps_of(file, image)
        wanted = {name: bitmap for name, bitmap in wanted.items() if name in own}
        for name, bitmap in wanted.items():
            one = own[name]
            maps.setdefault(name, []).append(one)
            cost += uniting_cost(one, bitmap.granularity)
        if cost > MAX_UNITED:
            raise _too_large(layer.path)
    return maps


def uniting_cost(one: DirtyBits, granularity: int) -> int:
    """Return the bytes of bits that are looked at to unite a map into a bitmap of `granularity`; see MAX_UNITED."""
    return one.most_dirty_bits // 8 * (1 if one.granularity == granularity else _RESCALING)


def _too_large(path: str) -> Refusal:
    return Refusal(
        "bitmaps_too_large",
        path,
        "with the images above it has so many bits set in its bitmaps that uniting them would take too long",
        "Remove those bitmaps that no backup needs, or use bitmap_content=empty.",
    )


def most_bytes(maps: Maps, bitmaps: t.Sequence[Bitmap], cluster_size: int, virtual_size: int) -> int:
    """Return an upper bound of the bytes that the bits of these bitmaps take in an overlay of this `cluster_size`."""
    clusters = 0
    for bitmap in bitmaps:
        most = sum(one.most_clusters(bitmap.granularity, cluster_size) for one in maps.get(bitmap.name, ()))
        clusters += min(most, -(-bitmap.data_bytes(virtual_size) // cluster_size))
    return clusters * cluster_size


def has_bits(maps: t.Sequence[DirtyBits]) -> bool:
    """Whether any bit can be set in one of the maps, without a look at the bits."""
    return any(one.most_dirty_bits for one in maps)


@contextlib.contextmanager
def lower_bits(maps: Maps, bitmaps: t.Sequence[Bitmap], virtual_size: int) -> t.Iterator[OpenImage | None]:
    """Hold for the block an image in memory that has the bits of the images below ACTIVE; None if there are none.

    They are brought to ACTIVE's virtual size, since QEMU merges no bitmaps of different sizes.
    """
    lower = {name: own[1:] for name, own in maps.items() if has_bits(own[1:])}
    if not lower:
        yield None
        return
    with memory_image() as file:
        wanted = [bitmap for bitmap in bitmaps if bitmap.name in lower]
        pieces = ((b, united(lower[b.name], b.granularity, virtual_size)) for b in wanted)
        write_scratch(file.fd, virtual_size, pieces)
        yield file


def memory_image() -> OpenImage:
    """Return a new, empty file in memory, for an image that holds nothing but bitmaps."""
    return owning("an image in memory", _memory_file())


def _memory_file() -> int:
    try:
        return os.memfd_create("kvmfleet-bitmaps", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # as an older kernel says of a flag that it does not know
            raise
        return os.memfd_create("kvmfleet-bitmaps", os.MFD_CLOEXEC)


def read_all(maps: Maps, bitmaps: t.Sequence[Bitmap], virtual_size: int) -> None:
    """Read all bits, only to see whether that can be done; Refusal if they are damaged."""
    for bitmap in bitmaps:
        for _piece in united(maps.get(bitmap.name, ()), bitmap.granularity, virtual_size):
            pass


def wrong_bits(maps: Maps, bitmaps: t.Sequence[Bitmap], file: OpenImage, image: Image) -> list[Bitmap]:
    """Return those of `bitmaps` that begin with other bits, in the open overlay, than the union of their maps."""
    found, size = maps_of(file, image), image.virtual_size
    return [b for b in bitmaps if not is_union(found[b.name], maps.get(b.name, ()), size)]
