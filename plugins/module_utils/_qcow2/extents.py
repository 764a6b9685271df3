# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what an image holds itself, not the images below (qcow2 spec, L1 table and L2 table).

Whole tables are turned into bits at once: in 1 TiB that are full there are sixteen million clusters.
"""

from __future__ import annotations

import array
import sys
import typing as t

from .._base.files import OpenImage
from .header import INCOMPATIBLE_EXTENDED_L2, L1_ENTRY_SIZE, SECTOR, Header, damaged, read_header

ENTRY_SIZE = 8  # bytes of an entry of an L2 table
EXTENDED_ENTRY_SIZE = 16  # with the bitmap of its subclusters
SUBCLUSTERS = 32  # of a cluster
COPIED = 0x80  # in the first byte of an entry of either table: nobody else refers to what it points to
COMPRESSED = 0x40  # in the first byte of an entry of an L2 table
_OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55 of an entry of the L1 table
_BATCH = 65536  # bytes of tables that are turned into bits together, where a table is smaller
_AT_ONCE = 1 << 30  # bytes of a disk of which is asked together whether there is anything; tables are smaller mostly
_NOT_ZERO = bytes([0]) + b"\1" * 255
_COMPRESSED = bytes(255 if byte & COMPRESSED else 0 for byte in range(256))


def has_allocated_extents(file: OpenImage) -> bool:
    """Whether the image has clusters of its own, not only those of the images below (qcow2 spec, L1 table).

    Internal snapshots count: the disk may have been put back to an empty one, while the data is in another.
    """
    header = read_header(file)
    return header.snapshots > 0 or any(read_l1(file, header))


def has_compressed_clusters(file: OpenImage) -> bool:
    """Whether a cluster of the disk is compressed (qcow2 spec, L2 table)."""
    header = read_header(file)
    size = EXTENDED_ENTRY_SIZE if is_extended(header) else ENTRY_SIZE
    l1 = array.array("Q", read_l1(file, header))
    if sys.byteorder == "little":
        l1.byteswap()
    tables = (file.read(header.cluster_size, entry & _OFFSET) for entry in l1 if entry & _OFFSET)
    return any(255 in table[::size].translate(_COMPRESSED) for table in tables)


class TableMap:
    """Bits that are made from the L2 tables of an open image. Read as those of a bitmap are."""

    def __init__(self, file: OpenImage, header: Header, granularity: int, bits_of: t.Callable[[bytes], bytes]) -> None:
        """Read the L1 table; Refusal if it is damaged. `file` must stay open as long as bits are asked for.

        `bits_of` turns L2 entries into bits, a bit for `granularity` bytes of the disk, the first one as the lowest.
        """
        self.granularity = granularity
        self.span = span_of_table(header)
        self._file = file
        self._bits_of = bits_of
        self._virtual_size = header.virtual_size // SECTOR * SECTOR
        self._table_bytes = header.cluster_size
        self._l1 = array.array("Q", read_l1(file, header))
        if sys.byteorder == "little":
            self._l1.byteswap()
        self._tables = sum(1 for entry in self._l1 if entry & _OFFSET)
        self._per_batch = max(1, _BATCH // self._table_bytes)  # tables
        self._last = (-1, b"")  # the batch that was turned into bits last, since a piece can be less than a table

    @property
    def most_dirty_bits(self) -> int:
        """An upper bound of the bits that are set, without a look at them."""
        return -(-min(self._tables * self.span, self._virtual_size) // self.granularity)

    def most_clusters(self, granularity: int, cluster_size: int) -> int:
        """Return an upper bound of the clusters that hold these bits in another image, in `granularity`."""
        there = cluster_size * 8 * granularity  # bytes of the disk
        return min(self._tables * max(self.span // there, 1), -(-self._virtual_size // there))

    def bits(self, start: int, length: int) -> int:
        """Return the bits that cover `length` bytes of the disk from `start`, as DirtyMap.bits() does."""
        return int.from_bytes(self.stored(start, length), "little")

    def stored(self, start: int, length: int) -> bytes:
        """Return the same bits as DirtyMap.stored() does."""
        end = min(start + length, self._virtual_size)
        if start >= end:
            return b""
        if not any(entry & _OFFSET for entry in self._l1[start // self.span : (end - 1) // self.span + 1]):
            return b""  # as most of a disk is
        batch = self.span * self._per_batch  # bytes of the disk
        first, last = start // batch, (end - 1) // batch
        per_byte = self.granularity * 8
        within = (start - first * batch) // per_byte
        data = b"".join(map(self._batch, range(first, last + 1)))[within : within - (start - end) // per_byte]
        used = -(-(end - start) // self.granularity) % 8  # bits of the last byte that lie on the disk
        return data[:-1] + bytes([data[-1] & ((1 << used) - 1)]) if used else data

    def _batch(self, index: int) -> bytes:
        """Return the bits of some L2 tables that follow each other."""
        if self._last[0] != index:
            self._last = (index, self._read_batch(index * self._per_batch))
        return self._last[1]

    def _read_batch(self, first: int) -> bytes:
        offsets = [entry & _OFFSET for entry in self._l1[first : first + self._per_batch]]
        if not any(offsets):
            return bytes(self.span // self.granularity // 8 * len(offsets))
        return self._bits_of(b"".join(map(self._read_table, offsets)))

    def _read_table(self, offset: int) -> bytes:
        if not offset:
            return bytes(self._table_bytes)
        table = self._file.read(self._table_bytes, offset)
        if len(table) != self._table_bytes or offset % self._table_bytes:
            raise damaged(
                self._file.path, f"its L2 table at offset {offset} lies outside the file, or between clusters"
            )
        return table


class AllocationMap(TableMap):
    """What the open image holds itself: data, zeroes, compressed clusters.

    One bit is a cluster; in an image with extended L2 entries a subcluster.
    """

    def __init__(self, file: OpenImage) -> None:
        """Read the L1 table; Refusal if it is damaged. `file` must stay open as long as bits are asked for."""
        header = read_header(file)
        bits_of = _allocated_subclusters if is_extended(header) else allocated_clusters
        super().__init__(file, header, allocation_unit(header), bits_of)


def holds_any(file: OpenImage) -> bool:
    """Whether the image holds data or zeroes itself: it can have tables in which there is nothing."""
    held, size = AllocationMap(file), read_header(file).virtual_size
    at_once = max(held.span, _AT_ONCE)
    return any(any(held.stored(start, at_once)) for start in range(0, size, at_once))


def is_extended(header: Header) -> bool:
    """Whether the entries of the L2 tables have bitmaps of subclusters (qcow2 spec, Extended L2 Entries)."""
    return bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2)


def allocation_unit(header: Header) -> int:
    """Return the bytes of the disk that are allocated, or are not: a cluster or a subcluster."""
    return header.cluster_size // (SUBCLUSTERS if is_extended(header) else 1)


def span_of_table(header: Header) -> int:
    """Return how many bytes of the disk an L2 table is about."""
    entry_size = EXTENDED_ENTRY_SIZE if is_extended(header) else ENTRY_SIZE
    return header.cluster_size // entry_size * header.cluster_size


def read_l1(file: OpenImage, header: Header) -> bytes:
    """Return the L1 table; Refusal if the file ends within it."""
    size = header.l1_entries * L1_ENTRY_SIZE
    table = file.read(size, header.l1_offset)
    if len(table) != size:
        raise damaged(file.path, "the file ends within the L1 table")
    return table


def allocated_clusters(table: bytes) -> bytes:
    """Return a bit for each entry: allocated is what is not zero (qcow2 spec, L2 table).

    A zero cluster has its flag, a compressed one its own, one of an external data file at offset 0 the flag "copied".
    """
    column = table[::ENTRY_SIZE]  # the byte with the flags
    if 0 in column:
        column = any_of(*(table[byte::ENTRY_SIZE] for byte in range(ENTRY_SIZE)))
    return packed(column.translate(_NOT_ZERO))


def _allocated_subclusters(table: bytes) -> bytes:
    """Return 32 bits for each entry: those of the subclusters that are data or zeroes, all of a compressed cluster."""
    compressed = table[::EXTENDED_ENTRY_SIZE].translate(_COMPRESSED)
    return any_of(subclusters(table, 8), subclusters(table, 12), whole_clusters(compressed))


def subclusters(table: bytes, word: int) -> bytes:
    """Return 32 bits for each extended entry: its zero flags, if `word` is 8, or what is allocated, if it is 12."""
    bits = bytearray(len(table) // EXTENDED_ENTRY_SIZE * SUBCLUSTERS // 8)
    for byte in range(4):  # the word is big-endian
        bits[byte::4] = table[word + 3 - byte :: EXTENDED_ENTRY_SIZE]
    return bytes(bits)


def whole_clusters(flags: bytes) -> bytes:
    """Return 32 bits for each byte, which is 0 or 255."""
    bits = bytearray(len(flags) * SUBCLUSTERS // 8)
    for byte in range(4):
        bits[byte::4] = flags
    return bytes(bits)


def packed(flags: bytes) -> bytes:
    """Return a bit for each byte, which is 0 or 1, the first one as the lowest. Their number is a multiple of eight."""
    bits = 0
    for bit in range(8):
        bits |= int.from_bytes(flags[bit::8], "little") << bit
    return bits.to_bytes(len(flags) // 8, "little")


def any_of(*columns: bytes) -> bytes:
    """Return the bitwise or of byte strings of one length."""
    united = 0
    for column in columns:
        united |= int.from_bytes(column, "little")
    return united.to_bytes(len(columns[0]), "little")
