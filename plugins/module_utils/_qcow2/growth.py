# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: how much a base grows when the layers above it are merged down into it by QEMU; never too small.

::

    data        where the base has no cluster of its own: none at all, one shared with a snapshot, a compressed one
    L2 tables   that are not there, or shared with a snapshot
    L1 table    a longer one if the disk grows
    refcounts   blocks for all that is new, and a longer table for many blocks

Free clusters in the middle of the base, which QEMU takes first, make it too large by as much.
Source: the qcow2 spec (L1 table and L2 table, Extended L2 Entries, Refcount table, Refcount blocks), and how QEMU
copies and zeroes (block/mirror.c, block/qcow2.c) and allocates (block/qcow2-refcount.c).
"""

from __future__ import annotations

import array
import errno
import functools
import os
import sys
import typing as t

from .._base.files import OpenImage
from .dirty import count_bits, rescaled
from .extents import (
    COMPRESSED,
    COPIED,
    ENTRY_SIZE,
    EXTENDED_ENTRY_SIZE,
    AllocationMap,
    TableMap,
    allocation_unit,
    any_of,
    is_extended,
    packed,
    read_l1,
    span_of_table,
    subclusters,
    whole_clusters,
)
from .header import (
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_DIRTY,
    L1_ENTRY_SIZE,
    REPAIR,
    SECTOR,
    Header,
    damaged,
    l1_bytes,
    read_as_qemu,
    read_header,
)

_PIECE = 1 << 19  # bits of the finest layer that are looked at together
_LEAST_COPIED = 4096  # bytes; the job's unit is a cluster of the base, within these bounds
_MOST_COPIED = 65536
_WINDOW = 10 << 20  # bytes that the job looks at together; QEMU's DEFAULT_MIRROR_BUF_SIZE
_MOST_ALLOCATED = 1 << 20  # bytes that it writes, and so allocates, together; QEMU's MAX_IO_BYTES
_OFFSET = 0xFFFFFFFFFFFFFE00  # of an entry of the refcount table
_REFCOUNT_ENTRY_SIZE = 8  # bytes of it
_OWN = bytes(byte & (COPIED | COMPRESSED) == COPIED for byte in range(256))  # by the first byte of an entry
_COMPRESSED = bytes(byte & COMPRESSED > 0 for byte in range(256))
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_NOT_ZERO = bytes([0]) + b"\1" * 255
_ALL = bytes([0]) + b"\xff" * 255

Extent = tuple[int, int]  # where it begins and ends, in bytes


class _Layer(t.NamedTuple):
    """What a layer holds itself, and what of that the job writes as zeroes; None if it writes nothing so."""

    held: TableMap
    zeroes: TableMap | None

    def units(self, unit: int, start: int, length: int) -> tuple[int, int]:
        """Return the units that get data of `length` bytes of the disk from `start`, and those that get anything."""
        size = self.held.granularity
        touched = rescaled(self.held.bits(start, length), size, unit)
        zeroes = self.zeroes.bits(start, length) if self.zeroes and touched else 0
        if not zeroes:
            return touched, touched
        everything = (1 << -(-length // size)) - 1
        return touched & rescaled(everything & ~zeroes, size, unit), touched


class _Merge(t.NamedTuple):
    """What the job does to the disk."""

    virtual_size: int  # bytes, afterwards
    unit: int  # bytes; of a unit that is not of one kind everything is copied, of a cluster of the base as well
    layers: list[_Layer]
    zeroes: list[Extent]  # what is zeroed beside
    as_data: list[Extent]  # where all that is touched is written as data


def most_growth(
    base: OpenImage, layers: t.Sequence[OpenImage], bitmap_clusters: int, *, shares_data: bool = False
) -> int:
    """Return an upper bound of the bytes that the file of `base`, a qcow2 image, takes in addition.

    `layers` are the qcow2 images that go in, the topmost first; the base gets the virtual size of the topmost.
    `bitmap_clusters` are the clusters of the base that bitmaps will take. What is written into holes of the file counts
    too, since the file system must find the space. Of a block device, it is what is needed beyond used_bytes().
    With `shares_data` the file gets longer by data, but takes no space for it: its extents are those of the layers.
    """
    header = read_header(base)
    merge = _merge_of(header.cluster_size, layers, has_zeroes=header.version > 2)
    data, tables, rewritten = _written_clusters(base, header, merge)
    allocated = data + tables
    needed = l1_bytes(merge.virtual_size, header.cluster_size, is_extended(header))
    if needed > header.l1_entries * L1_ENTRY_SIZE:  # the old table is given back only then
        allocated += -(-needed // header.cluster_size)
    used = used_bytes(base)
    if header.incompatible & INCOMPATIBLE_DIRTY and not base.is_device:  # its counts may be too low, so all are renewed
        used = max(used, -(-base.length() // header.cluster_size) * header.cluster_size)
        allocated += sum(_longer_table(-(-used // header.cluster_size // _per_block(header)), header))
    end = _end_with_refcounts(base, header, used, allocated + bitmap_clusters)
    if base.is_device:
        return end - used
    longer = max(0, end - base.length())
    if shares_data:
        return max(0, longer - data * header.cluster_size)
    return longer + min(rewritten * header.cluster_size, _bytes_of_holes(base))


def most_growth_raw(base: OpenImage, layers: t.Sequence[OpenImage]) -> int:
    """Return an upper bound of the bytes that a raw `base` takes in addition; of a block device, what it is too short.

    `layers` are the qcow2 images that go in, the topmost first; the base gets the virtual size of the topmost. Zeroes
    become holes, so the job must have discard=unmap.
    """
    merge, length = _merge_of(_MOST_COPIED, layers, has_zeroes=True), base.length()
    if base.is_device:
        return max(0, merge.virtual_size - length)
    added = in_holes = seen = 0
    for start, here, data, _touched in _pieces(merge, _MOST_COPIED):
        holes = list(_holes(base.fd, start, min(start + here, length)))
        seen += sum(end - begin for begin, end in holes)
        in_holes += count_bits(data & _marked(holes, start, here, merge.unit))
        added += count_bits(data & _marked([(length, merge.virtual_size)], start, here, merge.unit))
    # Space that is reserved looks like a hole; some file systems tell of no hole at all.
    missing = _bytes_of_holes(base)
    return added * merge.unit + min(missing, in_holes * merge.unit + max(0, missing - seen))


def used_bytes(file: OpenImage) -> int:
    """Return where the last cluster in use of a qcow2 image ends (qcow2 spec, Refcount table and Refcount blocks).

    Of an image that is marked dirty this may be too little.
    """
    header = read_header(file)
    bits, size = 1 << header.refcount_order, header.cluster_size
    table = _refcount_table(file, header)
    for index in range(len(table) - 1, -1, -1):
        if not table[index] & _OFFSET:
            continue
        counts = file.read(size, table[index] & _OFFSET)
        if len(counts) != size or table[index] & _OFFSET & (size - 1):
            raise damaged(file.path, f"its refcount block at {table[index]:#x} lies outside the file, or is misplaced")
        counts = counts.rstrip(b"\0")
        if counts:
            last = (len(counts) - 1) * 8 // bits + (counts[-1].bit_length() - 1) // bits * (bits < 8)
            return (index * (size * 8 // bits) + last + 1) * size
    raise damaged(file.path, "it counts no cluster as used", REPAIR)


def _merge_of(cluster_size: int, layers: t.Sequence[OpenImage], *, has_zeroes: bool) -> _Merge:
    """Return what a merge into a base of `cluster_size` does; without `has_zeroes` it cannot hold zero clusters.

    The job writes zeroes as such only in whole units, and where the base's clusters are larger than its units, only
    if the zeroes that it looks at together begin and end with clusters.
    """
    headers = [read_header(layer) for layer in layers]
    size, *below = (header.virtual_size // SECTOR * SECTOR for header in headers)
    unit = max(cluster_size, _LEAST_COPIED)
    is_aligned = all(allocation_unit(header) % unit == 0 for header in headers) and not any(end % unit for end in below)
    has_zeroes = has_zeroes and (is_aligned or unit <= _MOST_COPIED)
    # At the end of an L2 table of any layer, QEMU ends what it looks at.
    has_zeroes = has_zeroes and all(span_of_table(header) >= unit for header in headers)
    maps = [
        _Layer(AllocationMap(layer), _zero_map(layer, header, unit) if has_zeroes else None)
        for layer, header in zip(layers, headers)
    ]
    short = [(end, size) for end in below if end < size]  # what a layer lacks at its end reads as zeroes
    as_data = [(end, end + 1) for end, _size in short if end % unit] if has_zeroes else [(0, size)]
    if unit > _MOST_COPIED and size % unit:
        as_data.append((max(0, size - unit - _WINDOW), size))
    as_data.append((size - size % _MOST_COPIED, size))
    return _Merge(size, unit, maps, short, as_data)


def _zero_map(layer: OpenImage, header: Header, unit: int) -> TableMap | None:
    """Return the map of the zeroes of a layer that QEMU finds to be zeroes in whole units; None if there are none.

    It looks at zero clusters that have a place in the file one at a time.
    """
    if header.version < 3:
        return None
    bits_of = functools.partial(
        _zero_subclusters if is_extended(header) else _zero_clusters, with_place=header.cluster_size >= unit
    )
    return TableMap(layer, header, allocation_unit(header), bits_of)


def _zero_clusters(table: bytes, with_place: bool) -> bytes:
    """Return a bit for each entry: whether it is a zero cluster (qcow2 spec, L2 table)."""
    zeroes = table[ENTRY_SIZE - 1 :: ENTRY_SIZE].translate(_LOWEST_BIT)
    if 1 not in zeroes:
        return bytes(len(zeroes) // 8)
    return packed(_without(zeroes, _no_zeroes(table, ENTRY_SIZE, with_place)))


def _zero_subclusters(table: bytes, with_place: bool) -> bytes:
    """Return 32 bits for each entry: which subclusters are zeroes (qcow2 spec, Extended L2 Entries)."""
    excluded = _no_zeroes(table, EXTENDED_ENTRY_SIZE, with_place).translate(_ALL)
    return _without(subclusters(table, 8), whole_clusters(excluded))


def _no_zeroes(table: bytes, entry_size: int, with_place: bool) -> bytes:
    """Return 1 for each entry that is compressed, or has a place in the file if that does not count."""
    compressed = table[::entry_size].translate(_COMPRESSED)
    return compressed if with_place else any_of(compressed, _places(table, entry_size))


def _places(table: bytes, entry_size: int) -> bytes:
    """Return 1 for each entry that has a place in the file."""
    return any_of(*(table[byte::entry_size] for byte in range(1, 7))).translate(_NOT_ZERO)


def _without(flags: bytes, excluded: bytes) -> bytes:
    bits = int.from_bytes(flags, "little") & ~int.from_bytes(excluded, "little")
    return bits.to_bytes(len(flags), "little")


def _pieces(merge: _Merge, coarsest: int) -> t.Iterator[tuple[int, int, int, int]]:
    """Yield start and length of pieces of the disk, and in units of the merge what is data, and what is touched.

    A piece has a multiple of eight units of `coarsest` bytes.
    """
    granularities = [coarsest, merge.unit, *(layer.held.granularity for layer in merge.layers)]
    length = max(min(granularities) * _PIECE, max(granularities) * 8)
    for start in range(0, merge.virtual_size, length):
        here = min(length, merge.virtual_size - start)
        data, touched = 0, _marked(merge.zeroes, start, here, merge.unit)
        for layer in merge.layers:
            more_data, more = layer.units(merge.unit, start, here)
            data, touched = data | more_data, touched | more
        touched &= (1 << -(-here // merge.unit)) - 1  # a coarser layer's clusters reach beyond the end of the disk
        yield start, here, (data | _marked(merge.as_data, start, here, merge.unit)) & touched, touched


def _written_clusters(base: OpenImage, header: Header, merge: _Merge) -> tuple[int, int, int]:
    """Return how many clusters the base gets for data and for L2 tables, and how many of its own are overwritten."""
    size, span = header.cluster_size, span_of_table(header)
    entry_size = EXTENDED_ENTRY_SIZE if is_extended(header) else ENTRY_SIZE
    own_map = TableMap(base, header, size, functools.partial(_own_clusters, entry_size=entry_size))
    old_size = header.virtual_size // SECTOR * SECTOR
    # What is below the base must not show in what the disk grows by, so QEMU zeroes that.
    grown = [(old_size, merge.virtual_size)] if header.backing_offset and old_size < merge.virtual_size else []
    head = [(old_size, old_size + 1)] if grown and old_size % size else []
    allocated = rewritten = tables = 0
    for start, here, data, touched in _pieces(merge, size):
        clusters = rescaled(data | _marked(head, start, here, merge.unit), merge.unit, size)
        clusters &= (1 << -(-here // size)) - 1  # a unit may reach beyond the end of the disk
        own = own_map.bits(start, here)
        allocated += count_bits(clusters & ~own)
        rewritten += count_bits(clusters & own)
        linked = touched | _marked(grown, start, here, merge.unit)
        tables |= rescaled(linked, merge.unit, span) << start // span
    if header.incompatible & INCOMPATIBLE_DATA_FILE:  # there the data is
        allocated = rewritten = 0
    l1 = read_l1(base, header)[::L1_ENTRY_SIZE].translate(_OWN)
    own_tables = int.from_bytes(packed(l1.ljust(-(-len(l1) // 8) * 8, b"\0")), "little")
    return allocated, count_bits(tables & ~own_tables), rewritten


def _own_clusters(table: bytes, entry_size: int) -> bytes:
    """Return a bit for each entry: whether it has a cluster that is overwritten in place (qcow2 spec, L2 table)."""
    flags = int.from_bytes(table[::entry_size].translate(_OWN), "little")
    places = _places(table, entry_size)
    return packed((flags & int.from_bytes(places, "little")).to_bytes(len(places), "little"))


def _end_with_refcounts(base: OpenImage, header: Header, used: int, clusters: int) -> int:
    """Return where the file ends at most, in bytes, once so many `clusters` are allocated after `used` bytes."""
    size = header.cluster_size
    per_block = _per_block(header)
    table = _refcount_table(base, header)
    entries, longer_tables, least_end = len(table), 0, 0
    at_once = _MOST_ALLOCATED // size + 4  # data, what fills its first and last cluster, and blocks
    end, total = used // size + clusters, 0
    while True:
        while end > total:
            total = end
            needed = -(-total // per_block)
            blocks = needed - sum(1 for entry in table[:needed] if entry & _OFFSET)
            end = used // size + clusters + longer_tables + blocks
        if needed <= entries:
            return max(total, least_end) * size
        # The longer table lies, behind blocks of its own, where nothing could be counted before.
        first = entries + 2 + at_once // per_block  # the first of these blocks, at most
        table_clusters, all_blocks = _longer_table(first, header)
        area = all_blocks - first + table_clusters
        longer_tables += area + at_once
        least_end = first * per_block + area
        entries = _longer_table(entries + 1, header)[0] * size // _REFCOUNT_ENTRY_SIZE
        end = total + 1


def _longer_table(blocks: int, header: Header) -> tuple[int, int]:
    """Return the clusters of a longer refcount table behind what `blocks` blocks count, and the blocks it begins with.

    QEMU gives it room for half as many more.
    """
    per_block, cluster_size = _per_block(header), header.cluster_size
    clusters, total = blocks * per_block, 0
    table = spare = 0
    while True:
        total, last = -(-(clusters + table + total) // per_block), (total, table)
        table = -(-total * _REFCOUNT_ENTRY_SIZE // cluster_size)
        if (total, table) == last:
            if spare:
                break
            spare = -(-table // 2)
            clusters += spare
    return -(-(total + -(-total // 2)) * _REFCOUNT_ENTRY_SIZE // cluster_size), total


def _per_block(header: Header) -> int:
    """Return how many clusters a refcount block counts."""
    return header.cluster_size * 8 >> header.refcount_order


def _refcount_table(file: OpenImage, header: Header) -> array.array[int]:
    table = array.array("Q", read_as_qemu(file, header.refcount_clusters * header.cluster_size, header.refcount_offset))
    if sys.byteorder == "little":
        table.byteswap()
    return table


def _holes(fd: int, start: int, end: int) -> t.Iterator[Extent]:
    """Yield the holes of a file between two places."""
    while start < end:
        begin = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        try:
            start = min(os.lseek(fd, begin, os.SEEK_DATA), end)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # there is no data any more
                raise
            start = end
        if begin < start:
            yield begin, start


def _bytes_of_holes(file: OpenImage) -> int:
    """Return for how many bytes of the file the file system has reserved no space."""
    return max(0, file.length() - file.status().st_blocks * 512)


def _marked(extents: t.Sequence[Extent], start: int, length: int, unit: int) -> int:
    """Return the bits of the units that the extents touch, of `length` bytes of the disk from `start`."""
    flags = bytearray(-(-length // unit // 8) * 8)
    for begin, end in extents:
        first, last = (max(begin, start) - start) // unit, -(-(min(end, start + length) - start) // unit)
        if first < last:
            flags[first:last] = b"\1" * (last - first)
    return int.from_bytes(packed(bytes(flags)), "little")
