# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: the header, header extensions and bitmap directory of one qcow2 image.

The images are not trusted: every offset and length is checked before it is used, and what is read is bounded by
2 MiB for the header cluster and 64 MiB for the bitmap directory. Nothing here writes, locks or starts a process.
Source of all layouts and limits: QEMU, docs/interop/qcow2 ("the qcow2 spec" below), and where the spec is silent
the checks that QEMU itself makes when it opens an image.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import typing as t

from .._base.errors import Qcow2Error, advice

MAGIC = b"QFI\xfb"
SECTOR = 512  # bytes; QEMU rounds the virtual size down to it
MAX_BACKING_FILE_NAME = 1023  # bytes; qcow2 spec, Header
MAX_BACKING_FORMAT_NAME = 15  # bytes; QEMU's BlockDriverState.backing_format
MAX_BITMAPS = 65535  # QEMU's QCOW2_MAX_BITMAPS
MAX_BITMAP_NAME = 1023  # bytes; QEMU's BME_MAX_NAME_SIZE
MAX_BITMAP_DIRECTORY = 1024 * MAX_BITMAPS  # bytes; QEMU's QCOW2_MAX_BITMAP_DIRECTORY_SIZE
MAX_L1_TABLE = 32 * 1024 * 1024  # bytes; QEMU's QCOW_MAX_L1_SIZE
L1_ENTRY_SIZE = 8  # bytes
TABLE_ENTRY_SIZE = 8  # bytes of an entry of a bitmap table
MAX_BITMAP_DATA = 512 * 1024 * 1024  # bytes that one bitmap may take; QEMU's BME_MAX_PHYS_SIZE

_V2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_HEADER = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_BITMAPS_EXTENSION = struct.Struct(">IIQQ")
_BITMAP_ENTRY = struct.Struct(">QIIBBHI")

_EXT_END = 0
_EXT_BACKING_FORMAT = 0xE2792ACA
_EXT_BITMAPS = 0x23852875
_EXT_DATA_FILE = 0x44415441

_INCOMPATIBLE_DIRTY = 1 << 0
_INCOMPATIBLE_CORRUPT = 1 << 1
_INCOMPATIBLE_DATA_FILE = 1 << 2
_INCOMPATIBLE_COMPRESSION = 1 << 3
_INCOMPATIBLE_EXTENDED_L2 = 1 << 4
_INCOMPATIBLE_KNOWN = 0b11111
_COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
_AUTOCLEAR_BITMAPS = 1 << 0
_AUTOCLEAR_DATA_FILE_RAW = 1 << 1

_FLAG_IN_USE = 1 << 0
_FLAG_AUTO = 1 << 1
_TYPE_DIRTY_TRACKING = 1
_COMPRESSION_TYPES = ("zlib", "zstd")


class Bitmap(t.NamedTuple):
    """One bitmap as the directory describes it (qcow2 spec, Bitmap directory entry)."""

    name: str
    granularity: int  # bytes covered by one bit
    recording: bool  # flag auto
    inconsistent: bool  # flag in-use; in an image that a process has open for writing it is set and means nothing

    @property
    def carries_over(self) -> bool:
        """Whether an overlay must go on recording this bitmap."""
        return self.recording and not self.inconsistent

    def data_bytes(self, virtual_size: int) -> int:
        """Return how many bytes the bits take for an image of that virtual size in bytes."""
        return -(-virtual_size // (self.granularity * 8))


class BitmapTable(t.NamedTuple):
    """Where the bitmap table of one bitmap lies (qcow2 spec, Bitmap table)."""

    offset: int  # bytes
    entries: int  # of eight bytes


class Image(t.NamedTuple):
    """What the header of a qcow2 image says (qcow2 spec, Header and Header extensions)."""

    version: int  # 2 or 3; qemu-img calls them compat 0.10 and 1.1
    virtual_size: int  # bytes
    cluster_size: int  # bytes
    refcount_bits: int
    backing_file: str | None  # as recorded, not resolved
    backing_format: str | None
    encrypted: bool
    dirty: bool
    corrupt: bool
    lazy_refcounts: bool
    extended_l2: bool
    compression_type: str
    has_data_file: bool
    data_file: str | None  # as recorded; None too when the image has one but does not name it
    data_file_raw: bool
    bitmaps: tuple[Bitmap, ...]  # in the order of the directory
    bitmap_tables: tuple[BitmapTable, ...]  # in the same order
    lost_bitmaps: int  # bitmaps that a program which does not know them has made worthless (autoclear bit 0)


class _Header(t.NamedTuple):
    """The fixed fields that the rest of the reading needs."""

    version: int
    backing_offset: int  # bytes
    backing_length: int  # bytes
    cluster_size: int  # bytes
    virtual_size: int  # bytes
    crypt_method: int
    l1_entries: int
    l1_offset: int  # bytes
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    length: int  # bytes; the extensions begin here
    compression_type: int


def open_image(path: str) -> int:
    """Open the file or block device for reading and return the descriptor; whoever calls closes it."""
    try:
        # First without opening it really: of a FIFO that would hang us, of some devices it would start something.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(place).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise Qcow2Error(f"{path}: is neither a file nor a block device, so it cannot be a disk image.")
            return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(place)
    except FileNotFoundError as exc:
        raise Qcow2Error(f"{path}: does not exist. Check the name, and that its storage is mounted.") from exc
    except OSError as exc:
        raise Qcow2Error(f"{path}: cannot be opened: {exc.strerror}. {advice(exc)}") from exc
    except ValueError as exc:  # a NUL byte, or characters that file names cannot have in this locale
        raise Qcow2Error(f"{path!r}: is no name that a file can have here. Correct it.") from exc


def close_image(fd: int) -> None:
    """Close an image from which there was only to be read, or that is on stable storage already."""
    with contextlib.suppress(OSError):  # network file systems tell of old failures here; the descriptor is gone anyway
        os.close(fd)


def length_of(fd: int) -> int:
    """Return the length in bytes of the open file or block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def is_qcow2(fd: int) -> bool:
    """Whether the open file begins with the magic of qcow2."""
    return os.pread(fd, len(MAGIC), 0) == MAGIC


def read_image(fd: int, path: str, with_bitmaps: bool = True) -> Image:
    """Return what the open qcow2 image says of itself; Qcow2Error when it is none, or damaged."""
    header = _read_header(fd, path)
    end = header.backing_offset or header.cluster_size
    area = os.pread(fd, header.cluster_size, 0)
    extensions = _read_extensions(area[: min(end, len(area))], header, path)
    backing_file = _backing_file(area, header, path)
    return Image(
        version=header.version,
        virtual_size=header.virtual_size // SECTOR * SECTOR,
        cluster_size=header.cluster_size,
        refcount_bits=1 << header.refcount_order,
        backing_file=backing_file,
        backing_format=_text(extensions.get(_EXT_BACKING_FORMAT)) if backing_file is not None else None,
        encrypted=header.crypt_method != 0,
        dirty=bool(header.incompatible & _INCOMPATIBLE_DIRTY),
        corrupt=bool(header.incompatible & _INCOMPATIBLE_CORRUPT),
        lazy_refcounts=bool(header.compatible & _COMPATIBLE_LAZY_REFCOUNTS),
        extended_l2=bool(header.incompatible & _INCOMPATIBLE_EXTENDED_L2),
        compression_type=_COMPRESSION_TYPES[header.compression_type],
        has_data_file=bool(header.incompatible & _INCOMPATIBLE_DATA_FILE),
        data_file=_text(extensions.get(_EXT_DATA_FILE)) if header.incompatible & _INCOMPATIBLE_DATA_FILE else None,
        data_file_raw=bool(header.autoclear & _AUTOCLEAR_DATA_FILE_RAW),
        **_read_bitmaps(fd, extensions.get(_EXT_BITMAPS) if with_bitmaps else None, header, path),
    )


def holds_data(fd: int, path: str) -> bool:
    """Whether the open qcow2 image has data clusters of its own (qcow2 spec, L1 table); Qcow2Error when damaged."""
    header = _read_header(fd, path)
    size = header.l1_entries * L1_ENTRY_SIZE
    table = os.pread(fd, size, header.l1_offset)
    if len(table) != size:
        raise damaged(path, "the file ends within the L1 table")
    return any(table)


def l1_bytes(virtual_size: int, cluster_size: int, extended_l2: bool) -> int:
    """Return the size in bytes of the L1 table that an image of that virtual size in bytes needs."""
    l2_entries = cluster_size // (16 if extended_l2 else 8)
    return -(-virtual_size // (l2_entries * cluster_size)) * L1_ENTRY_SIZE


def damaged(path: str, what: str) -> Qcow2Error:
    """Return the error for an image that breaks the format."""
    return Qcow2Error(f"{path}: is damaged: {what}. Inspect it with 'qemu-img check', or restore it from a backup.")


def _text(data: bytes | None) -> str | None:
    """Return a name of the image as Python holds file names, up to a NUL byte, as QEMU takes it; None when empty.

    Bytes that are not UTF-8 survive as surrogates.
    """
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") or None if data else None


def _read_header(fd: int, path: str) -> _Header:
    """Return the fixed part of the header (qcow2 spec, Header)."""
    data = os.pread(fd, 112, 0)
    if not data.startswith(MAGIC):
        raise Qcow2Error(
            f"{path}: is not a qcow2 image (it does not begin with QFI\\xfb), but is used as one. If it is raw, say so "
            "with backing_format=raw; of a backing file, have the image above record it by 'qemu-img rebase -u -F raw'."
        )
    if len(data) < _V2_HEADER.size:
        raise damaged(path, f"the file ends within the header, after {len(data)} bytes")
    fields = _V2_HEADER.unpack_from(data)
    (_magic, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset, *_rest) = fields
    if version not in (2, 3):
        raise Qcow2Error(f"{path}: has qcow2 version {version}; only 2 and 3 are known. Is it really a qcow2 image?")
    if not 9 <= cluster_bits <= 21:
        raise damaged(path, f"cluster_bits is {cluster_bits}, allowed is 9 to 21")
    header = _Header(
        version=version,
        backing_offset=backing_offset,
        backing_length=backing_length,
        cluster_size=1 << cluster_bits,
        virtual_size=size,
        crypt_method=crypt,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        incompatible=0,
        compatible=0,
        autoclear=0,
        refcount_order=4,
        length=_V2_HEADER.size,
        compression_type=0,
    )
    if version == 3:
        header = _read_v3_fields(data, header, path)
    _check_header(header, path)
    return header


def _read_v3_fields(data: bytes, header: _Header, path: str) -> _Header:
    """Return the header completed by the fields that only version 3 has."""
    if len(data) < _V2_HEADER.size + _V3_HEADER.size:
        raise damaged(path, f"the file ends within the header, after {len(data)} bytes")
    incompatible, compatible, autoclear, refcount_order, length = _V3_HEADER.unpack_from(data, _V2_HEADER.size)
    compression_type = data[104] if length > 104 and len(data) > 104 else 0
    return header._replace(
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        length=length,
        compression_type=compression_type,
    )


def _check_header(header: _Header, path: str) -> None:
    """Raise what QEMU too would refuse about the fixed fields."""
    unknown = header.incompatible & ~_INCOMPATIBLE_KNOWN
    if unknown:
        raise Qcow2Error(
            f"{path}: needs qcow2 features that are not known here (incompatible feature bits {unknown:#x}). "
            "It was made by a newer program; nothing can be said safely about its bitmaps."
        )
    if header.version == 3 and not 104 <= header.length <= header.cluster_size:
        raise damaged(path, f"header_length is {header.length}, allowed is 104 to {header.cluster_size}")
    if header.refcount_order > 6:
        raise damaged(path, f"refcount_order is {header.refcount_order}, allowed is 0 to 6")
    if header.crypt_method > 2:
        raise damaged(path, f"crypt_method is {header.crypt_method}, allowed is 0 to 2")
    if header.compression_type >= len(_COMPRESSION_TYPES):
        raise damaged(path, f"compression_type is {header.compression_type}, allowed is 0 to 1")
    if bool(header.incompatible & _INCOMPATIBLE_COMPRESSION) != (header.compression_type != 0):
        raise damaged(path, "its compression type and its compression feature bit contradict each other")
    if header.incompatible & _INCOMPATIBLE_EXTENDED_L2 and header.cluster_size < 16384:
        raise damaged(path, f"it has extended L2 entries with clusters of only {header.cluster_size} bytes")
    extended = bool(header.incompatible & _INCOMPATIBLE_EXTENDED_L2)
    size = header.l1_entries * L1_ENTRY_SIZE
    if (
        size < l1_bytes(header.virtual_size, header.cluster_size, extended)
        or size > MAX_L1_TABLE
        or header.l1_offset % header.cluster_size
        or header.l1_offset >> 62  # more than any file can have, and than pread takes
    ):
        raise damaged(
            path,
            f"its L1 table of {header.l1_entries} entries at offset {header.l1_offset} does not fit its virtual size, "
            f"{header.virtual_size} bytes",
        )


def _backing_file(area: bytes, header: _Header, path: str) -> str | None:
    """Return the name of the backing file as it is recorded (qcow2 spec, Header, offsets 8 and 16)."""
    start, length = header.backing_offset, header.backing_length
    if not start:
        return None
    if start < header.length or start > header.cluster_size:
        raise damaged(path, f"its backing file name lies at offset {start}, outside the header cluster")
    if length > min(MAX_BACKING_FILE_NAME, header.cluster_size - start):
        raise damaged(path, f"its backing file name is {length} bytes long")
    if start + length > len(area):
        raise damaged(path, "the file ends within the name of its backing file")
    name = area[start : start + length]
    if b"\0" in name:
        raise damaged(path, "its backing file name has a NUL byte in it")
    return _text(name)


def _read_extensions(area: bytes, header: _Header, path: str) -> dict[int, bytes]:
    """Return the data of the header extensions by type (qcow2 spec, Header extensions)."""
    extensions: dict[int, bytes] = {}
    offset = header.length
    while offset + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, offset)
        if kind == _EXT_END:
            return extensions
        offset += _EXTENSION.size
        if length > len(area) - offset:
            raise damaged(path, f"header extension {kind:#010x} of {length} bytes reaches out of the header cluster")
        if kind in extensions and kind in (_EXT_BACKING_FORMAT, _EXT_BITMAPS, _EXT_DATA_FILE):
            raise damaged(path, f"header extension {kind:#010x} occurs twice")
        if kind == _EXT_BACKING_FORMAT and length > MAX_BACKING_FORMAT_NAME:
            raise damaged(path, f"the name of its backing format is {length} bytes long")
        extensions[kind] = area[offset : offset + length]
        offset += (length + 7) // 8 * 8
    return extensions


def _read_bitmaps(fd: int, extension: bytes | None, header: _Header, path: str) -> dict[str, t.Any]:
    """Return the fields of the image that tell of bitmaps (qcow2 spec, Bitmaps extension)."""
    if extension is None or header.version == 2:
        return {"bitmaps": (), "bitmap_tables": (), "lost_bitmaps": 0}
    if len(extension) != _BITMAPS_EXTENSION.size:
        raise damaged(path, f"its bitmaps extension is {len(extension)} bytes long instead of 24")
    count, reserved, size, offset = _BITMAPS_EXTENSION.unpack(extension)
    if not header.autoclear & _AUTOCLEAR_BITMAPS:
        return {"bitmaps": (), "bitmap_tables": (), "lost_bitmaps": count}
    if reserved or not 1 <= count <= MAX_BITMAPS:
        raise damaged(path, f"its bitmaps extension announces {count} bitmaps; allowed is 1 to {MAX_BITMAPS}")
    if not count * _BITMAP_ENTRY.size < size <= MAX_BITMAP_DIRECTORY:
        raise damaged(path, f"its bitmap directory of {count} entries has an impossible length of {size} bytes")
    if offset % header.cluster_size or offset < header.cluster_size or offset + size > length_of(fd):
        raise damaged(path, f"its bitmap directory lies at offset {offset}, outside the image")
    directory = os.pread(fd, size, offset)
    if len(directory) != size:
        raise damaged(path, "the file ends within the bitmap directory")
    bitmaps, tables = _parse_directory(directory, count, header, path)
    extents = [(offset, size), *((table.offset, table.entries * TABLE_ENTRY_SIZE) for table in tables)]
    _check_apart(extents, length_of(fd), path)
    return {"bitmaps": tuple(bitmaps), "bitmap_tables": tuple(tables), "lost_bitmaps": 0}


def _parse_directory(
    directory: bytes, count: int, header: _Header, path: str
) -> tuple[list[Bitmap], list[BitmapTable]]:
    """Return the bitmaps and where their tables lie."""
    bitmaps: list[Bitmap] = []
    tables: list[BitmapTable] = []
    names: set[str] = set()
    position = 0
    while position < len(directory):
        if position + _BITMAP_ENTRY.size > len(directory):
            raise damaged(path, "its bitmap directory ends within an entry")
        fields = _BITMAP_ENTRY.unpack_from(directory, position)
        table_offset, table_size, flags, _kind, granularity_bits, name_size, _extra = fields
        _check_entry(fields, header, path)
        start = position + _BITMAP_ENTRY.size
        name = directory[start : start + name_size].decode("utf-8", "surrogateescape")
        if start + name_size > len(directory) or "\0" in name or name in names:
            raise damaged(path, f"entry {len(bitmaps)} of its bitmap directory has an impossible name")
        names.add(name)
        bitmaps.append(Bitmap(name, 1 << granularity_bits, bool(flags & _FLAG_AUTO), bool(flags & _FLAG_IN_USE)))
        tables.append(BitmapTable(table_offset, table_size))
        position = (start + name_size + 7) // 8 * 8
    if len(bitmaps) != count:
        raise damaged(path, f"its bitmap directory has {len(bitmaps)} entries, its header says {count}")
    return bitmaps, tables


def _check_entry(fields: tuple[int, ...], header: _Header, path: str) -> None:
    """Raise what QEMU too would refuse about an entry (qcow2 spec, Bitmap directory entry)."""
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_data_size = fields
    data = table_size * header.cluster_size
    covered = (data * 8) << granularity_bits if granularity_bits < 64 else 0
    if (
        flags & ~(_FLAG_IN_USE | _FLAG_AUTO)
        or kind != _TYPE_DIRTY_TRACKING
        or extra_data_size
        or not 9 <= granularity_bits <= 31
        or not 1 <= name_size <= MAX_BITMAP_NAME
        or table_offset < header.cluster_size
        or table_offset % header.cluster_size
        or not 0 < data <= MAX_BITMAP_DATA
        or (not flags & _FLAG_IN_USE and covered < header.virtual_size // SECTOR * SECTOR)
    ):
        raise damaged(
            path,
            "an entry of its bitmap directory breaks the format "
            f"(table {table_offset}+{table_size}, flags {flags:#x}, type {kind}, granularity bits {granularity_bits}, "
            f"name of {name_size} bytes, extra data of {extra_data_size} bytes)",
        )


def _check_apart(extents: list[tuple[int, int]], end: int, path: str) -> None:
    """Raise when the bitmap directory and the bitmap tables, (offset, length) each, overlap or leave the file."""
    previous_end = 0
    for offset, length in sorted(extents):
        if offset < previous_end or offset + length > end:
            raise damaged(path, f"the bitmap structure at offset {offset} overlaps another one or leaves the file")
        previous_end = offset + length
