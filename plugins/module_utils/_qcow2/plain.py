# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: guest data where it lies as the guest wrote it (qcow2 spec, Standard Cluster Descriptor, Extended L2 Entries).

Not compressed and not encrypted. It lies in the image, or in its external data file.
"""

from __future__ import annotations

import array
import sys
import typing as t

from .._base.files import OpenImage
from .extents import COMPRESSED, COPIED, ENTRY_SIZE, SUBCLUSTERS, is_extended, read_l1
from .header import INCOMPATIBLE_DATA_FILE, Header, is_qcow2, read_header

_OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55 of an entry of either table
_ZERO = 1  # the whole cluster reads as zeroes, whatever the entry points to; not in extended entries
_ALL = (1 << SUBCLUSTERS) - 1


class Piece(t.NamedTuple):
    """Guest data that lies together: a cluster, or subclusters of one."""

    start: int  # on the disk
    length: int
    place: int  # in the file


class PlainData:
    """The guest data of an open image. Its files must stay open as long as it is asked for."""

    def __init__(self, file: OpenImage, data_file: OpenImage | None = None) -> None:
        """Read the L1 table; Refusal if it is damaged. Of an image with an external data file give that, too."""
        self._file = file
        self._header = read_header(file) if is_qcow2(file) else None
        self._data = file
        self._l1: t.Sequence[int] = ()
        self._last: tuple[int, t.Sequence[int]] = (0, ())
        self._words = 1  # of an entry of an L2 table
        self._unit = 1  # bytes of the disk that lie together
        self._marks = _OFFSET  # bits of an entry of which one is set if it points to data
        self._foreign = COMPRESSED << 56 | _ZERO  # bits of which one is set if that data is not what the guest reads
        if self._header is not None:
            self._read_header(self._header, data_file)

    def _read_header(self, header: Header, data_file: OpenImage | None) -> None:
        self._unit = header.cluster_size
        if is_extended(header):
            self._words, self._unit = 2, header.cluster_size // SUBCLUSTERS
            self._foreign = COMPRESSED << 56
        if header.incompatible & INCOMPATIBLE_DATA_FILE:
            if data_file is None:
                return
            self._data = data_file
            self._marks |= COPIED << 56  # there data can lie at offset 0
        if not header.crypt_method:
            self._l1 = [entry & _OFFSET for entry in _words(read_l1(self._file, header))]

    def pieces(self, most_tables: int | None = None) -> t.Iterator[Piece]:
        """Yield what a qcow2 image holds itself, in the order of the disk. No data is read.

        `most_tables`: of how many L2 tables at most; they are spread evenly over the disk. None: of all.
        """
        if self._header is None:
            return
        size, marks, foreign = self._header.cluster_size, self._marks, self._foreign
        per_table = size // ENTRY_SIZE // self._words
        tables = [(number, table) for number, table in enumerate(self._l1) if table]
        step = -(-len(tables) // most_tables) if most_tables and tables else 1
        for number, table in tables[::step]:
            entries = self._entries(table)
            for index, entry in enumerate(entries[:: self._words]):
                if entry & marks and not entry & foreign:
                    start, place = (number * per_table + index) * size, entry & _OFFSET
                    if self._words == 1:
                        yield Piece(start, size, place)
                    else:
                        yield from self._parts(start, place, _held(entries[2 * index + 1]))

    def _parts(self, start: int, place: int, held: int) -> t.Iterator[Piece]:
        """Yield the subclusters of a cluster that it holds, those that follow each other as one."""
        while held:
            lowest = held & -held
            rest = held & (held + lowest)  # without the bits that follow the lowest one
            first, length = lowest.bit_length() - 1, bin(held ^ rest).count("1")
            yield Piece(start + first * self._unit, length * self._unit, place + first * self._unit)
            held = rest

    def data_of(self, piece: Piece) -> bytes:
        """Return the data of a piece; less of it at the end of the file."""
        return self._data.read(piece.length, piece.place)

    def read(self, start: int, length: int) -> bytes | None:
        """Return what the image itself holds of the disk from `start`; None if that does not lie there plainly."""
        if self._header is None:
            return self._file.read(length, start)
        unit, found = self._unit, b""
        for number in range(start // unit, -(-(start + length) // unit)):
            place = self._place(*divmod(number * unit, self._header.cluster_size))
            if place is None:
                return None
            found += self._data.read(unit, place)
        return found[start % unit : start % unit + length]

    def _place(self, cluster: int, within: int) -> int | None:
        """Return where the data lies that is so far within a cluster; None if it does not do so plainly."""
        per_table = self._header.cluster_size // ENTRY_SIZE // self._words if self._header else 1
        number, index = divmod(cluster, per_table)
        table = self._l1[number] if number < len(self._l1) else 0
        at = index * self._words
        entry, *bits = self._entries(table)[at : at + self._words] or (0,)
        is_plain = entry & self._marks and not entry & self._foreign
        if not is_plain or (bits and not _held(bits[0]) >> within // self._unit & 1):
            return None
        return (entry & _OFFSET) + within

    def _entries(self, table: int) -> t.Sequence[int]:
        """Return the words of the L2 table at this offset; none if there is no table. It keeps the last one."""
        if table and self._last[0] != table and self._header is not None:
            data = self._file.read(self._header.cluster_size, table)
            whole = len(data) == self._header.cluster_size and any(data)  # of a disk that was emptied, most are empty
            self._last = (table, _words(data) if whole else ())
        return self._last[1] if table else ()


def _held(bits: int) -> int:
    """Return a bit for each subcluster whose data lies in the cluster, the first one as the lowest."""
    return bits & ~(bits >> SUBCLUSTERS) & _ALL


def _words(table: bytes) -> t.Sequence[int]:
    words = array.array("Q", table)
    if sys.byteorder == "little":
        words.byteswap()
    return words
