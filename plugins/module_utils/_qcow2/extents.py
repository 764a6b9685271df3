# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what an image holds itself, not the images below (qcow2 spec, L1 and L2 tables).

Whole tables are turned into bits at once: in 1 TiB that are full there are sixteen million clusters.
"""

from __future__ import annotations

import array
import sys

from .._base.files import OpenImage
from .header import INCOMPATIBLE_EXTENDED_L2, L1_ENTRY_SIZE, SECTOR, Header, damaged, read_header

_OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55 of an entry of the L1 table
_ENTRY_SIZE = 8  # bytes of an entry of an L2 table
_EXTENDED_ENTRY_SIZE = 16  # with the bitmap of its subclusters
_SUBCLUSTERS = 32
_NOT_ZERO = bytes([0]) + b"\1" * 255
_COMPRESSED = bytes(255 if byte & 0x40 else 0 for byte in range(256))  # by an entry's first byte: all subclusters


def has_allocated_extents(file: OpenImage) -> bool:
    """Whether the image has clusters of its own, not only those of the images below (qcow2 spec, L1 table).

    Internal snapshots count: the disk may have been put back to an empty one, while the data is in another.
    """
    header = read_header(file)
    return header.snapshots > 0 or any(_read_l1(file, header))


class AllocationMap:
    """What the open image holds itself: data, zeroes, compressed clusters. Read as the bits of a bitmap are.

    One bit is a cluster; in an image with extended L2 entries a subcluster, of which a cluster has 32.
    """

    def __init__(self, file: OpenImage) -> None:
        """Read the L1 table; Refusal if it is damaged. `file` must stay open as long as bits are asked for."""
        header = read_header(file)
        self._file = file
        self._is_extended = bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2)
        self._virtual_size = header.virtual_size // SECTOR * SECTOR
        self._table_bytes = header.cluster_size
        entries = header.cluster_size // (_EXTENDED_ENTRY_SIZE if self._is_extended else _ENTRY_SIZE)
        self._span = entries * header.cluster_size  # bytes of the disk that an L2 table is about
        self.granularity = header.cluster_size // (_SUBCLUSTERS if self._is_extended else 1)
        self._l1 = array.array("Q", _read_l1(file, header))
        if sys.byteorder == "little":
            self._l1.byteswap()
        self._last = (-1, b"")  # the table that was turned into bits last, since a piece can be less than a table

    @property
    def most_dirty_bits(self) -> int:
        """An upper bound of the bits that are set, without a look at them."""
        tables = sum(1 for entry in self._l1 if entry & _OFFSET)
        return min(tables * self._span, self._virtual_size) // self.granularity + 1 if tables else 0

    def stored(self, start: int, length: int) -> bytes:
        """Return the bits that cover `length` bytes of the disk from `start`, as DirtyMap.stored() does."""
        end = min(start + length, self._virtual_size)
        if start >= end:
            return b""
        first, last = start // self._span, (end - 1) // self._span
        if not any(entry & _OFFSET for entry in self._l1[first : last + 1]):
            return b""
        per_byte = self.granularity * 8
        within = (start - first * self._span) // per_byte
        data = b"".join(map(self._table, range(first, last + 1)))[within : within - (start - end) // per_byte]
        used = -(-(end - start) // self.granularity) % 8  # bits of the last byte that lie on the disk
        return data[:-1] + bytes([data[-1] & ((1 << used) - 1)]) if used else data

    def _table(self, index: int) -> bytes:
        """Return the bits of one L2 table."""
        if self._last[0] != index:
            self._last = (index, self._read_table(index))
        return self._last[1]

    def _read_table(self, index: int) -> bytes:
        offset = self._l1[index] & _OFFSET if index < len(self._l1) else 0
        if not offset:
            return bytes(self._span // self.granularity // 8)
        table = self._file.read(self._table_bytes, offset)
        if len(table) != self._table_bytes or offset % self._table_bytes:
            raise damaged(
                self._file.path, f"its L2 table at offset {offset} lies outside the file, or between clusters"
            )
        return _subclusters(table) if self._is_extended else _clusters(table)


def _read_l1(file: OpenImage, header: Header) -> bytes:
    size = header.l1_entries * L1_ENTRY_SIZE
    table = file.read(size, header.l1_offset)
    if len(table) != size:
        raise damaged(file.path, "the file ends within the L1 table")
    return table


def _clusters(table: bytes) -> bytes:
    """Return a bit for each entry, the first one as the lowest: allocated is what is not zero (qcow2 spec, L2 table).

    A zero cluster has its flag, a compressed one its own, one of an external data file at offset 0 the flag "copied".
    """
    column = table[::_ENTRY_SIZE]  # the byte with the flags
    if 0 in column:
        column = _united(*(table[byte::_ENTRY_SIZE] for byte in range(_ENTRY_SIZE)))
    bits = 0
    flags = column.translate(_NOT_ZERO)
    for bit in range(8):
        bits |= int.from_bytes(flags[bit::8], "little") << bit
    return bits.to_bytes(len(column) // 8, "little")


def _subclusters(table: bytes) -> bytes:
    """Return 32 bits for each entry: those of the subclusters that are data or zeroes (qcow2 spec, Extended L2)."""
    compressed = table[::_EXTENDED_ENTRY_SIZE].translate(_COMPRESSED)
    bits = bytearray(len(compressed) * _SUBCLUSTERS // 8)
    for byte in range(4):  # of the big-endian words with the zero flags, at 8, and with the allocation, at 12
        zeroes, allocated = table[11 - byte :: _EXTENDED_ENTRY_SIZE], table[15 - byte :: _EXTENDED_ENTRY_SIZE]
        bits[byte::4] = _united(zeroes, allocated, compressed)
    return bytes(bits)


def _united(*columns: bytes) -> bytes:
    """Return the bitwise or of byte strings of one length."""
    united = 0
    for column in columns:
        united |= int.from_bytes(column, "little")
    return united.to_bytes(len(columns[0]), "little")
