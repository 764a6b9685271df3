# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Write: more bits into the bitmaps of an image, in place, and take them back.

QEMU takes all bitmaps of an image away for a moment, names included, as it opens it for writing. Here nothing is
allocated and no flag changes: whatever a kill or a power loss leaves marks what was marked before, and perhaps more.
"""

from __future__ import annotations

import struct
import typing as t

from .._base.errors import CHECK_STORAGE, Refusal
from .._base.files import OpenImage
from .bitmaps import ENTRY_ALL_ONES, TABLE_ENTRY_SIZE, BitmapTable
from .dirty import ENTRY_OFFSET, DirtyBits, maps_of, united
from .header import damaged
from .image import Image

_ENTRY = struct.Struct(">Q")


class Lent(t.NamedTuple):
    """Bytes of an image that hold more bits now."""

    place: int  # bytes from the beginning of the file
    before: bytes
    after: bytes  # as many


def bits_to_lend(file: OpenImage, image: Image, maps: t.Mapping[str, t.Sequence[DirtyBits]], size: int) -> list[Lent]:
    """Return what is to change so that recording bitmaps of an open image mark what any of their `maps` marks, too.

    `size` is how many bytes of the disk `maps` are about. Where a bitmap has no data, all bits that a cluster of data
    would hold are to be set, since to allocate one is not in place (qcow2 spec, Bitmap table). Refusal if a table or
    data is damaged.
    """
    found: list[Lent] = []
    own = maps_of(file, image)  # which refuses a table that is damaged
    for bitmap, table in zip(image.bitmaps, image.bitmap_tables):
        if bitmap.name in own and bitmap.recording and bitmap.name in maps:
            pieces = united(maps[bitmap.name], bitmap.granularity, min(size, image.virtual_size))
            found += _missing(file, table, _by_cluster(pieces, image.cluster_size))
    return found


def lend(file: OpenImage, lent: t.Sequence[Lent]) -> None:
    """Set the bits, on stable storage; Refusal if they are not there when they are read back.

    The caller keeps everybody else from the image.
    """
    _write(file, [(one.place, one.after) for one in lent])


def take_back(file: OpenImage, lent: t.Sequence[Lent]) -> None:
    """Have the bitmaps mark what they did before; as lend() does."""
    _write(file, [(one.place, one.before) for one in lent])


def _missing(file: OpenImage, table: BitmapTable, pieces: t.Iterable[tuple[int, int, bytes]]) -> t.Iterator[Lent]:
    """Yield the changes of one bitmap; `pieces` are those of _by_cluster()."""
    filled: set[int] = set()  # entries of the table
    for index, within, bits in pieces:
        place = table.offset + index * TABLE_ENTRY_SIZE
        (entry,) = _ENTRY.unpack(file.read(TABLE_ENTRY_SIZE, place))
        if entry & ENTRY_ALL_ONES or index in filled or not any(bits):
            continue
        if entry & ENTRY_OFFSET:
            yield from _more(file, (entry & ENTRY_OFFSET) + within, bits)
        else:
            filled.add(index)
            yield Lent(place, _ENTRY.pack(entry), _ENTRY.pack(ENTRY_ALL_ONES))


def _by_cluster(pieces: t.Iterable[tuple[int, bytes]], cluster_size: int) -> t.Iterator[tuple[int, int, bytes]]:
    """Yield bitmap data, pairs of its offset and itself, by clusters: the number of one, offset within it, bits."""
    for offset, data in pieces:
        begin = 0
        while begin < len(data):
            index, within = divmod(offset + begin, cluster_size)
            length = cluster_size - within
            yield index, within, data[begin : begin + length]
            begin += length


def _more(file: OpenImage, place: int, bits: bytes) -> t.Iterator[Lent]:
    """Yield the change of data that lacks some of these bits; only of the bytes that differ, since a list has them."""
    data = file.read(len(bits), place)
    if len(data) != len(bits):
        raise damaged(file.path, f"a bitmap has data at offset {place}, outside the file")
    before = int.from_bytes(data, "little")
    added = int.from_bytes(bits, "little") & ~before
    if added:
        first, last = ((added & -added).bit_length() - 1) // 8, (added.bit_length() - 1) // 8
        after = (before | added).to_bytes(len(data), "little")
        yield Lent(place + first, data[first : last + 1], after[first : last + 1])


def _write(file: OpenImage, pieces: t.Sequence[tuple[int, bytes]]) -> None:
    if not pieces:
        return
    file.overwrite(pieces)
    if any(file.read(len(data), place) != data for place, data in pieces):
        raise Refusal("not_verified", file.path, "its bitmaps are not as they were written", CHECK_STORAGE)
