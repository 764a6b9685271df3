# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Write a small qcow2 image that holds nothing but bitmaps, for QEMU to merge from.

::

    header │ data, table │ data, table │ … │ directory │ L1 table, all zero │ refcount blocks │ refcount table

Write each part where the one before it ends, so nothing needs to be counted beforehand. Zeroes stay a hole.
"""

from __future__ import annotations

import os
import struct
import typing as t

from .._base.files import write_all
from .bitmaps import (
    BITMAP_ENTRY,
    BITMAPS_EXTENSION,
    ENTRY_ALL_ONES,
    EXT_BITMAPS,
    FLAG_AUTO,
    TABLE_ENTRY_SIZE,
    TYPE_DIRTY_TRACKING,
    Bitmap,
)
from .header import AUTOCLEAR_BITMAPS, L1_ENTRY_SIZE, MAGIC, V2_HEADER, V3_HEADER, extension_bytes, l1_bytes

CLUSTER = 65536  # bytes
_FULL = b"\xff" * CLUSTER
_REFCOUNT_ORDER = 4  # refcounts of 16 bits
_HEADER_LENGTH = 112  # bytes; a multiple of 8 that has all fields

Pieces = t.Iterable[tuple[int, bytes]]  # of a bitmap's data: offset in bytes, a multiple of CLUSTER, and what is there


def write_scratch(fd: int, virtual_size: int, bitmaps: t.Iterable[tuple[Bitmap, Pieces]]) -> None:
    """Make the open, empty file an image of `virtual_size` bytes that has these bitmaps and no data."""
    writer = _Writer(fd)
    l1_size = l1_bytes(virtual_size, CLUSTER, extended_l2=False)
    directory = [_write_bitmap(writer, virtual_size, bitmap, pieces) for bitmap, pieces in bitmaps]
    entries = b"".join(directory)
    directory_at = writer.append(entries)
    l1_at = writer.append(b"", l1_size)
    refcounts_at, refcount_clusters = writer.append_refcounts()
    fields = (0, 0, CLUSTER.bit_length() - 1, virtual_size, 0, l1_size // L1_ENTRY_SIZE, l1_at)
    header = V2_HEADER.pack(MAGIC, 3, *fields, refcounts_at, refcount_clusters, 0, 0)
    header += V3_HEADER.pack(0, 0, AUTOCLEAR_BITMAPS if directory else 0, _REFCOUNT_ORDER, _HEADER_LENGTH, 0)
    header = header.ljust(_HEADER_LENGTH, b"\0")
    if directory:  # an extension that announces none is against the format
        extension = BITMAPS_EXTENSION.pack(len(directory), 0, len(entries), directory_at)
        header += extension_bytes(EXT_BITMAPS, extension)
    writer.write(0, header)  # what follows is zero, which is the end of the extensions


def _write_bitmap(writer: _Writer, virtual_size: int, bitmap: Bitmap, pieces: Pieces) -> bytes:
    """Write data and table of a bitmap; return its entry of the directory (qcow2 spec, Bitmap directory entry)."""
    entries = -(-bitmap.data_bytes(virtual_size) // CLUSTER)
    table = bytearray(entries * TABLE_ENTRY_SIZE)
    for offset, data in pieces:
        for within in range(0, len(data), CLUSTER):
            cluster = data[within : within + CLUSTER]
            if cluster == bytes(len(cluster)):
                continue
            entry = ENTRY_ALL_ONES if cluster == _FULL else writer.append(cluster)
            struct.pack_into(">Q", table, (offset + within) // CLUSTER * TABLE_ENTRY_SIZE, entry)
    name = bitmap.name.encode()
    flags, granularity_bits = FLAG_AUTO * bitmap.recording, bitmap.granularity.bit_length() - 1
    fields = (writer.append(bytes(table)), entries, flags, TYPE_DIRTY_TRACKING, granularity_bits, len(name), 0)
    entry_bytes = BITMAP_ENTRY.pack(*fields) + name
    return entry_bytes + bytes(-len(entry_bytes) % 8)


class _Writer:
    """The clusters of the image, one after the other; the first one is the header's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._clusters = 1

    def write(self, offset: int, data: bytes) -> None:
        """Write all of the data at this offset."""
        write_all(self._fd, data, offset)

    def append(self, data: bytes, length: int = 0) -> int:
        """Append the data, with zeroes up to `length` and to the end of its last cluster; return its offset."""
        offset = self._clusters * CLUSTER
        self.write(offset, data)
        self._clusters += -(-max(len(data), length) // CLUSTER)
        os.ftruncate(self._fd, self._clusters * CLUSTER)
        return offset

    def append_refcounts(self) -> tuple[int, int]:
        """Append a count of one for every cluster, these included; return offset and clusters of the table."""
        per_block = CLUSTER * 8 >> _REFCOUNT_ORDER
        table, blocks = 1, 1
        while True:
            counted = self._clusters + table + blocks
            needed = -(-counted // per_block)
            if (-(-needed * 8 // CLUSTER), needed) == (table, blocks):
                break
            table, blocks = -(-needed * 8 // CLUSTER), needed
        blocks_at = self.append(b"\0\1" * counted)
        table_at = self.append(b"".join(struct.pack(">Q", blocks_at + i * CLUSTER) for i in range(blocks)))
        return table_at, table
