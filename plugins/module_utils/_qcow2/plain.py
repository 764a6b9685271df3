# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: guest data where it lies in an image as the guest wrote it (qcow2 spec, Standard Cluster Descriptor).

Not compressed, not encrypted, not in subclusters and not in an external data file.
"""

from __future__ import annotations

import typing as t

from .._base.files import OpenImage
from .extents import COMPRESSED, ENTRY_SIZE, is_extended, read_l1
from .header import INCOMPATIBLE_DATA_FILE, L1_ENTRY_SIZE, Header, is_qcow2, read_header

_OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55 of an entry of either table
_ZERO = 1  # reads as zeroes, whatever it points to


class PlainData:
    """The guest data of an open image. `file` must stay open as long as it is asked for."""

    def __init__(self, file: OpenImage) -> None:
        """Read the L1 table; Refusal if it is damaged."""
        self._file = file
        self._header = read_header(file) if is_qcow2(file) else None
        self._l1 = _l1_of(file, self._header) if self._header is not None else []
        self._last: tuple[int, list[int]] = (0, [])

    def clusters(self) -> t.Iterator[tuple[int, bytes]]:
        """Yield the clusters that a qcow2 image holds itself, in the order of the disk: offset there, and data."""
        if self._header is None:
            return
        size = self._header.cluster_size
        for number, table in enumerate(self._l1):
            for index, entry in enumerate(self._entries(table)):
                if _is_plain(entry):
                    yield (number * size // ENTRY_SIZE + index) * size, self._file.read(size, entry & _OFFSET)

    def read(self, start: int, length: int) -> bytes | None:
        """Return what the image itself holds of the disk from `start`; None if that does not lie there plainly."""
        if self._header is None:
            return self._file.read(length, start)
        size, found = self._header.cluster_size, b""
        for cluster in range(start // size, -(-(start + length) // size)):
            entry = self._entry(cluster)
            if not _is_plain(entry):
                return None
            found += self._file.read(size, entry & _OFFSET)
        return found[start % size : start % size + length]

    def _entry(self, cluster: int) -> int:
        per_table = self._header.cluster_size // ENTRY_SIZE if self._header else 1
        number, index = divmod(cluster, per_table)
        table = self._l1[number] if number < len(self._l1) else 0
        return next(iter(self._entries(table)[index : index + 1]), 0)

    def _entries(self, table: int) -> list[int]:
        """Return the entries of the L2 table at this offset; none if there is no table. It keeps the last one."""
        if table and self._last[0] != table and self._header is not None:
            data = self._file.read(self._header.cluster_size, table)
            self._last = (table, _words(data) if any(data) else [])  # of a disk that was emptied, most are empty
        return self._last[1] if table else []


def _l1_of(file: OpenImage, header: Header) -> list[int]:
    """Return the offsets of the L2 tables, 0 for none; nothing for an image in which no data lies plainly."""
    if is_extended(header) or header.crypt_method or header.incompatible & INCOMPATIBLE_DATA_FILE:
        return []
    return [entry & _OFFSET for entry in _words(read_l1(file, header))]


def _is_plain(entry: int) -> bool:
    return bool(entry & _OFFSET) and not (entry & _ZERO or entry >> 56 & COMPRESSED)


def _words(table: bytes) -> list[int]:
    return [int.from_bytes(table[at : at + L1_ENTRY_SIZE], "big") for at in range(0, len(table), L1_ENTRY_SIZE)]
