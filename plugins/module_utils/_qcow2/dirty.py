# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the bits of stored bitmaps, one by one or all of a chain together, and how much of a disk they mark dirty.

Look at a piece of the disk at a time, so that memory is bounded however large the bitmaps are.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import sys
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage
from .bitmaps import ENTRY_ALL_ONES, TABLE_ENTRY_SIZE, Bitmap, BitmapTable
from .header import damaged
from .image import Image

_PIECE = 1 << 19  # bits of the finest bitmap that are looked at together; a cluster of 64 KiB holds so many
ENTRY_OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55
_DIGITS = "01"


class DirtyBits(t.Protocol):
    """Bits that mark a disk: those of a bitmap, or those of what an image holds itself."""

    granularity: int  # bytes of the disk that a bit is about

    @property
    def most_dirty_bits(self) -> int:
        """An upper bound of the bits that are set, without a look at them."""

    def bits(self, start: int, length: int) -> int:
        """Return the bits that cover `length` bytes of the disk from `start`, the first bit as the number's lowest."""

    def stored(self, start: int, length: int) -> bytes:
        """Return the same bits as bitmap data; zeroes at the end may be left out."""

    def most_clusters(self, granularity: int, cluster_size: int) -> int:
        """Return an upper bound of the clusters that hold these bits in another image, in `granularity`."""


class DirtyMap:
    """The bits of one consistent bitmap of an open image (qcow2 spec, Bitmap table and Bitmap data)."""

    def __init__(self, file: OpenImage, image: Image, bitmap: Bitmap, table: BitmapTable) -> None:
        """Read the table; Refusal if it is damaged. `file` must stay open as long as bits are asked for."""
        path = file.path
        self.granularity = bitmap.granularity
        self._file = file
        self._virtual_size = image.virtual_size
        self._cluster_size = image.cluster_size
        if table.entries != -(-bitmap.data_bytes(image.virtual_size) // image.cluster_size):
            raise damaged(path, f"the table of the bitmap {bitmap.name!r} has {table.entries} entries")
        data = file.read(table.entries * TABLE_ENTRY_SIZE, table.offset)
        if len(data) != table.entries * TABLE_ENTRY_SIZE:
            raise damaged(path, f"the file ends within the table of the bitmap {bitmap.name!r}")
        self._entries = array.array("Q", data)  # eight bytes each; as numbers of their own they would be forty
        if sys.byteorder == "little":
            self._entries.byteswap()
        for entry in self._entries:
            self._check(entry, bitmap)
        self._dirty_clusters = len(self._entries) - self._entries.count(0)  # of the bitmap data, at most

    @property
    def most_dirty_bits(self) -> int:
        """An upper bound of the bits that are set, without a look at them."""
        return min(self._dirty_clusters * self._cluster_size * 8, -(-self._virtual_size // self.granularity))

    @property
    def is_whole(self) -> bool:
        """Whether all data that the table names is in the file."""
        last = max((entry & ENTRY_OFFSET for entry in self._entries), default=0)
        return last + self._cluster_size <= self._file.length()

    def _check(self, entry: int, bitmap: Bitmap) -> None:
        """Refuse what QEMU too refuses about an entry of the table (qcow2 spec, Bitmap table)."""
        offset = entry & ENTRY_OFFSET
        if entry & ~ENTRY_OFFSET & ~ENTRY_ALL_ONES or (offset and (entry & 1 or offset % self._cluster_size)):
            raise damaged(self._file.path, f"an entry of the table of the bitmap {bitmap.name!r} is {entry:#x}")

    def bits(self, start: int, length: int) -> int:
        """Return the bits that cover `length` bytes of the disk from `start`, the first bit as the number's lowest.

        `start` and `length` are multiples of eight granules; `length` may also end where a disk does.
        """
        return int.from_bytes(self.stored(start, length), "little")

    def stored(self, start: int, length: int) -> bytes:
        """Return the same bits as bitmap data (qcow2 spec, Bitmap data); nothing at all where none is set.

        Zeroes at the end may be left out.
        """
        end = min(start + length, self._virtual_size)
        if start >= end:
            return b""
        per_byte = self.granularity * 8
        first, last = start // per_byte, (end - 1) // per_byte
        if not any(self._entries[first // self._cluster_size : last // self._cluster_size + 1]):
            return b""  # as most of a disk is
        data = self._data(first, last + 1)
        used = -(-(end - start) // self.granularity) % 8  # bits of the last byte that lie on the disk
        return data[:-1] + bytes([data[-1] & ((1 << used) - 1)]) if used else data

    def most_clusters(self, granularity: int, cluster_size: int) -> int:
        """Return an upper bound of the clusters that hold these bits in another image, in `granularity`."""
        here, there = self._cluster_size * 8 * self.granularity, cluster_size * 8 * granularity  # bytes of the disk
        return min(self._dirty_clusters * (here // there if here > there else 1), -(-self._virtual_size // there))

    def _data(self, first: int, end: int) -> bytes:
        """Return the bytes of the bitmap data from `first` up to, not including, `end`."""
        pieces = []
        while first < end:
            index, within = divmod(first, self._cluster_size)
            length = min(self._cluster_size - within, end - first)
            entry = self._entries[index]
            if entry & ENTRY_OFFSET:
                piece = self._file.read(length, (entry & ENTRY_OFFSET) + within)
                if len(piece) != length:
                    raise damaged(
                        self._file.path, f"a bitmap has data at offset {entry & ENTRY_OFFSET}, outside the file"
                    )
            else:
                piece = (b"\xff" if entry & ENTRY_ALL_ONES else b"\0") * length
            pieces.append(piece)
            first += length
        return b"".join(pieces)


def maps_of(file: OpenImage, image: Image) -> dict[str, DirtyMap]:
    """Return the map of each consistent bitmap of an open image, by name; Refusal if the table of one is damaged."""
    return {
        bitmap.name: DirtyMap(file, image, bitmap, table)
        for bitmap, table in zip(image.bitmaps, image.bitmap_tables)
        if not bitmap.inconsistent
    }


def stored_maps(file: OpenImage, image: Image) -> dict[str, DirtyMap]:
    """Return the map of each inconsistent bitmap of an open image as it was stored last, by name.

    What was marked since is lost, so it is of no use alone. One whose table or data is damaged is left out.
    """
    found = {}
    for bitmap, table in zip(image.bitmaps, image.bitmap_tables):
        if bitmap.inconsistent:
            with contextlib.suppress(Refusal):
                stored = DirtyMap(file, image, bitmap, table)
                if stored.is_whole:
                    found[bitmap.name] = stored
    return found


def dirty_bytes(maps: t.Sequence[DirtyBits], virtual_size: int) -> int:
    """Return how many bytes of the disk are dirty in any of `maps`, in granules of the first one.

    A backup merges the bitmaps of a chain so: into one that has the granularity of the topmost image's bitmap.
    """
    granularity = maps[0].granularity
    finest, coarsest = min(one.granularity for one in maps), max(one.granularity for one in maps)
    length = max(finest * _PIECE, coarsest * 8)
    dirty = 0
    for start in range(0, virtual_size, length):
        here = min(length, virtual_size - start)  # bytes of the disk
        bits = _union(maps, granularity, start, here)
        dirty += count_bits(bits) * granularity
        if bits >> (-(-here // granularity) - 1):  # the last granule may reach beyond the end of the disk
            dirty -= -here % granularity
    return dirty


def count_bits(bits: int) -> int:
    """Return how many bits are set."""
    if sys.version_info >= (3, 10):  # some hundred times as fast
        return bits.bit_count()
    return bin(bits).count("1")


def _union(maps: t.Sequence[DirtyBits], granularity: int, start: int, length: int) -> int:
    """Return the bits of `granularity` that cover `length` bytes of the disk from `start`, dirty in any of `maps`."""
    bits = 0
    for one in maps:
        bits |= rescaled(one.bits(start, length), one.granularity, granularity)
    # A coarser map marks some beyond the end of the disk. Most of a disk is clean, and needs no mask.
    return bits and bits & ((1 << -(-length // granularity)) - 1)


def united(
    maps: t.Sequence[DirtyBits], granularity: int, virtual_size: int, span: int = 0
) -> t.Iterator[tuple[int, bytes]]:
    """Yield what is dirty in any of `maps`, piece by piece, as data of a bitmap of `granularity`.

    Yield pairs of the offset in the bitmap's data in bytes, a multiple of 64 KiB, and the data, to the end of the disk
    at most. Leave out pieces that are clean. A piece covers `span` bytes of the disk or more.
    """
    if not maps:
        return
    coarsest = max(one.granularity for one in maps)
    span = max(span, granularity * _PIECE, coarsest * 8)
    for start in range(0, virtual_size, span):
        here = min(span, virtual_size - start)  # bytes of the disk
        if len(maps) == 1 and coarsest == granularity:  # the usual case, and some ten times as fast
            data = maps[0].stored(start, here)
            data = data and data.ljust(-(-here // (granularity * 8)), b"\0")
        else:
            data = _rescaled_data(maps, granularity, start, here)
        if data != bytes(len(data)):
            yield start // (granularity * 8), data


def _rescaled_data(maps: t.Sequence[DirtyBits], granularity: int, start: int, length: int) -> bytes:
    """Return the union of `maps` for `length` bytes of the disk from `start`, as data of a bitmap of `granularity`."""
    finest, coarsest = min(one.granularity for one in maps), max(one.granularity for one in maps)
    step = max(min(finest, granularity) * _PIECE, coarsest * 8, granularity * 8)  # bounds the memory
    pieces = []
    for begin in range(start, start + length, step):
        here = min(step, start + length - begin)  # bytes of the disk
        bits = _union(maps, granularity, begin, here)
        pieces.append(bits.to_bytes(-(-here // (granularity * 8)), "little"))
    return b"".join(pieces)


def is_union(found: DirtyBits, maps: t.Sequence[DirtyBits], virtual_size: int) -> bool:
    """Whether `found` marks just what is dirty in any of `maps`, in its granules."""
    span = max((one.granularity * 8 for one in maps), default=0)  # both sides in the same pieces
    wanted = united(maps, found.granularity, virtual_size, span)
    there = united([found], found.granularity, virtual_size, span)
    return all(one == other for one, other in itertools.zip_longest(wanted, there))


def covers(maps: t.Sequence[DirtyBits], kept: DirtyBits, virtual_size: int) -> bool:
    """Whether all that `kept` marks is dirty in any of `maps`, in the finest granules of all."""
    finest, coarsest = (which(one.granularity for one in (*maps, kept)) for which in (min, max))
    now, together = (united(some, finest, virtual_size, coarsest * 8) for some in (maps, [*maps, kept]))
    return all(one == other for one, other in itertools.zip_longest(now, together))


def counting_cost(maps: t.Sequence[DirtyBits]) -> int:
    """Return how many bits dirty_bytes() looks at for these maps."""
    finest = min(one.granularity for one in maps)
    return sum(one.most_dirty_bits * (one.granularity // finest) for one in maps)


def rescaled(bits: int, granularity: int, wanted: int) -> int:
    """Return `bits` in the granularity `wanted`: a granule is dirty if any part of it is."""
    if bits == 0 or granularity == wanted:
        return bits
    if granularity > wanted:
        factor = granularity // wanted
        return int(bin(bits)[2:].translate({ord(digit): digit * factor for digit in _DIGITS}), 2)
    factor = wanted // granularity
    covered = 1
    while covered < factor:  # now each bit tells about itself and the covered - 1 bits above it
        bits |= bits >> covered
        covered *= 2
    return int(bin(bits)[:1:-1][::factor][::-1], 2)
