# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the bitmap directory and tables of one qcow2 image (qcow2 spec, Bitmaps extension)."""

from __future__ import annotations

import shlex
import struct
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage
from .header import AUTOCLEAR, AUTOCLEAR_AT, AUTOCLEAR_BITMAPS, SECTOR, Header, damaged, text_of

EXT_BITMAPS = 0x23852875  # type of the header extension
MAX_BITMAPS = 65535  # QEMU's QCOW2_MAX_BITMAPS
MAX_BITMAP_NAME = 1023  # bytes; QEMU's BME_MAX_NAME_SIZE
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS  # bytes; QEMU's QCOW2_MAX_BITMAP_DIRECTORY_SIZE
TABLE_ENTRY_SIZE = 8  # bytes of an entry of a bitmap table
ENTRY_ALL_ONES = 1 << 0  # in an entry without data: all bits are set (qcow2 spec, Bitmap table)
MAX_BITMAP_DATA = 512 * 1024 * 1024  # bytes that one bitmap may take; QEMU's BME_MAX_PHYS_SIZE
BITMAPS_EXTENSION = struct.Struct(">IIQQ")
BITMAP_ENTRY = struct.Struct(">QIIBBHI")
FLAG_IN_USE = 1 << 0
FLAG_AUTO = 1 << 1
TYPE_DIRTY_TRACKING = 1


class Bitmap(t.NamedTuple):
    """One bitmap as the directory describes it (qcow2 spec, Bitmap directory entry)."""

    name: str
    granularity: int  # bytes covered by one bit
    recording: bool  # flag auto
    inconsistent: bool  # flag in-use; in an image that a process has open for writing it is set and means nothing

    def data_bytes(self, virtual_size: int) -> int:
        """Return how many bytes the bits take in an image of `virtual_size` bytes."""
        return -(-virtual_size // (self.granularity * 8))


class BitmapTable(t.NamedTuple):
    """Where the bitmap table of one bitmap lies (qcow2 spec, Bitmap table)."""

    offset: int  # bytes
    entries: int  # of eight bytes


class StoredBitmaps(t.NamedTuple):
    """What an image stores of bitmaps."""

    bitmaps: tuple[Bitmap, ...] = ()  # in the order of the directory
    tables: tuple[BitmapTable, ...] = ()  # in the same order
    lost: int = 0  # bitmaps that a program which does not know them has made worthless (autoclear bit 0)
    lost_names: frozenset[str] | None = None  # of these; None if that cannot be told


class BitmapsExtension(t.NamedTuple):
    """The header extension that tells where the bitmap directory is (qcow2 spec, Bitmaps extension)."""

    is_trusted: bool  # or else a program that does not know bitmaps has written to the image (autoclear bit 0)
    bitmaps: int
    size: int  # bytes of the directory
    offset: int  # bytes


def parse_bitmaps_extension(data: bytes, header: Header, path: str) -> BitmapsExtension:
    """Return the header extension; Refusal where QEMU too refuses it."""
    if len(data) != BITMAPS_EXTENSION.size:
        raise damaged(path, f"its bitmaps extension is {len(data)} bytes long instead of 24")
    count, reserved, size, offset = BITMAPS_EXTENSION.unpack(data)
    extension = BitmapsExtension(bool(header.autoclear & AUTOCLEAR_BITMAPS), count, size, offset)
    if extension.is_trusted:
        _check_extension(extension, reserved, header, path)
    return extension


def _check_extension(extension: BitmapsExtension, reserved: int, header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about an extension that counts."""
    _is_trusted, count, size, offset = extension
    if reserved or not 1 <= count <= MAX_BITMAPS:
        raise _damaged(header, path, f"its bitmaps extension announces {count} bitmaps; allowed is 1 to {MAX_BITMAPS}")
    if size > MAX_BITMAP_DIRECTORY:
        raise _damaged(
            header, path, f"its bitmap directory of {count} entries has an impossible length of {size} bytes"
        )
    if offset % header.cluster_size:
        raise _damaged(
            header, path, f"its bitmap directory lies at offset {offset}, which is not the beginning of a cluster"
        )


def read_bitmaps(file: OpenImage, extension: BitmapsExtension | None, header: Header) -> StoredBitmaps:
    """Return the bitmaps that the header extension announces."""
    if extension is None or header.version == 2:
        return StoredBitmaps()
    if not extension.is_trusted:
        return StoredBitmaps(lost=extension.bitmaps, lost_names=_names_lost(file, extension, header))
    return _read_directory(file, extension, header)


def _names_lost(file: OpenImage, extension: BitmapsExtension, header: Header) -> frozenset[str] | None:
    """Return the names of bitmaps that are worthless now; None if their directory does not stand there any more."""
    try:
        _check_extension(extension, 0, header, file.path)
        return frozenset(bitmap.name for bitmap in _read_directory(file, extension, header).bitmaps)
    except Refusal:
        return None


def _read_directory(file: OpenImage, extension: BitmapsExtension, header: Header) -> StoredBitmaps:
    """Return the bitmaps in the directory; Refusal where QEMU too refuses it."""
    path = file.path
    _is_trusted, count, size, offset = extension
    if not count * BITMAP_ENTRY.size < size:
        raise _damaged(
            header, path, f"its bitmap directory of {count} entries has an impossible length of {size} bytes"
        )
    if offset < header.cluster_size or offset + size > file.length():
        raise _damaged(header, path, f"its bitmap directory lies at offset {offset}, outside the image")
    directory = file.read(size, offset)
    if len(directory) != size:
        raise damaged(path, "the file ends within the bitmap directory")
    bitmaps, tables = _parse_directory(directory, count, header, path)
    extents = [(offset, size), *((table.offset, table.entries * TABLE_ENTRY_SIZE) for table in tables)]
    _check_apart(extents, file.length(), header, path)
    return StoredBitmaps(tuple(bitmaps), tuple(tables))


def _parse_directory(directory: bytes, count: int, header: Header, path: str) -> tuple[list[Bitmap], list[BitmapTable]]:
    """Return the bitmaps and where their tables lie."""
    bitmaps: list[Bitmap] = []
    tables: list[BitmapTable] = []
    names: set[str] = set()
    position = 0
    while position < len(directory):
        if position + BITMAP_ENTRY.size > len(directory):
            raise _damaged(header, path, "its bitmap directory ends within an entry")
        fields = BITMAP_ENTRY.unpack_from(directory, position)
        table_offset, table_size, flags, _kind, granularity_bits, name_size, _extra = fields
        _check_entry(fields, header, path)
        start = position + BITMAP_ENTRY.size
        name = text_of(directory[start : start + name_size])
        position = (start + name_size + 7) // 8 * 8
        if position > len(directory):
            raise _damaged(header, path, "its bitmap directory ends within an entry")
        if name is None or name in names:
            raise _damaged(
                header, path, f"entry {len(bitmaps)} of its bitmap directory has no name, or that of another one"
            )
        names.add(name)
        bitmaps.append(Bitmap(name, 1 << granularity_bits, bool(flags & FLAG_AUTO), bool(flags & FLAG_IN_USE)))
        tables.append(BitmapTable(table_offset, table_size))
    if len(bitmaps) != count:
        raise _damaged(header, path, f"its bitmap directory has {len(bitmaps)} entries, its header says {count}")
    return bitmaps, tables


def _check_entry(fields: tuple[int, ...], header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about an entry (qcow2 spec, Bitmap directory entry)."""
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_data_size = fields
    data = table_size * header.cluster_size
    covered = (data * 8) << granularity_bits if granularity_bits < 64 else 0
    if (
        flags & ~(FLAG_IN_USE | FLAG_AUTO)
        or kind != TYPE_DIRTY_TRACKING
        or extra_data_size
        or not 9 <= granularity_bits <= 31
        or not 1 <= name_size <= MAX_BITMAP_NAME
        or table_offset < header.cluster_size
        or table_offset % header.cluster_size
        or not 0 < data <= MAX_BITMAP_DATA
        or (not flags & FLAG_IN_USE and covered < header.virtual_size // SECTOR * SECTOR)
    ):
        raise _damaged(
            header,
            path,
            "an entry of its bitmap directory breaks the format "
            f"(table {table_offset}+{table_size}, flags {flags:#x}, type {kind}, granularity bits {granularity_bits}, "
            f"name of {name_size} bytes, extra data of {extra_data_size} bytes)",
        )


def _check_apart(extents: list[tuple[int, int]], end: int, header: Header, path: str) -> None:
    """Refuse a bitmap directory and bitmap tables, (offset, length) each, that overlap or leave the file."""
    previous_end = 0
    for offset, length in sorted(extents):
        if offset < previous_end or offset + length > end:
            raise _damaged(
                header, path, f"the bitmap structure at offset {offset} overlaps another one or leaves the file"
            )
        previous_end = offset + length


def _damaged(header: Header, path: str, what: str) -> Refusal:
    """Return the refusal of an image whose bitmap directory breaks the format, which no tool repairs."""
    octal = f"{header.autoclear & ~AUTOCLEAR_BITMAPS & 0xFF:03o}"
    last = AUTOCLEAR_AT + AUTOCLEAR.size - 1
    remedy = (
        "Inspect it with 'qemu-img check', or restore it from a backup; or do without its bitmaps: with no VM on it, "
        f"printf '\\{octal}' | dd of={shlex.quote(path)} bs=1 seek={last} conv=notrunc; then remove the bitmaps of the "
        "images above it, whose checkpoints are void with those (kvmfleet.qcow2.qcow2_bitmap with state=absent); then "
        "'qemu-img check -r all'."
    )
    return damaged(path, what, remedy)
