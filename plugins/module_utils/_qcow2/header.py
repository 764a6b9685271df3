# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the header of one qcow2 image, and the header extensions.

Images are not trusted. Check every offset and length before it is used. Read at most 2 MiB for the header cluster, and
64 MiB for the bitmap directory. Nothing in this folder writes, locks or starts a process.
Source of all layouts and limits: QEMU, docs/interop/qcow2 ("the qcow2 spec" below). Where the spec is silent, the
checks that QEMU makes when it opens an image.
"""

from __future__ import annotations

import struct
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage

MAGIC = b"QFI\xfb"
SECTOR = 512  # bytes; QEMU rounds the virtual size down to it
MAX_BACKING_FILE_NAME = 1023  # bytes; qcow2 spec, Header
MAX_BACKING_FORMAT_NAME = 15  # bytes; QEMU's BlockDriverState.backing_format
MAX_L1_TABLE = 32 * 1024 * 1024  # bytes; QEMU's QCOW_MAX_L1_SIZE
L1_ENTRY_SIZE = 8  # bytes

_V2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_V3_HEADER = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")

_EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_BITMAPS = 0x23852875
EXT_DATA_FILE = 0x44415441

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_DATA_FILE = 1 << 2
_INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
_INCOMPATIBLE_KNOWN = 0b11111
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_DATA_FILE_RAW = 1 << 1

COMPRESSION_TYPES = ("zlib", "zstd")


class Header(t.NamedTuple):
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


def is_qcow2(file: OpenImage) -> bool:
    """Whether the file begins with the magic of qcow2."""
    return file.read(len(MAGIC), 0) == MAGIC


def l1_bytes(virtual_size: int, cluster_size: int, extended_l2: bool) -> int:
    """Return the size in bytes of the L1 table that an image of `virtual_size` bytes needs (qcow2 spec, L1 table)."""
    l2_entries = cluster_size // (16 if extended_l2 else 8)
    return -(-virtual_size // (l2_entries * cluster_size)) * L1_ENTRY_SIZE


def damaged(path: str, what: str) -> Refusal:
    """Return the refusal of an image that breaks the format."""
    remedy = "Inspect it with 'qemu-img check', or restore it from a backup."
    return Refusal("damaged", path, f"is damaged: {what}", remedy)


def text_of(data: bytes | None) -> str | None:
    """Return a name that the image records, up to a NUL byte, as QEMU takes it; None if it is empty.

    Bytes that are not UTF-8 survive as surrogates, as in Python's file names.
    """
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") or None if data else None


def read_header(file: OpenImage) -> Header:
    """Return the fixed part of the header (qcow2 spec, Header); Refusal if the file is no qcow2 image, or damaged."""
    path, data = file.path, file.read(112, 0)
    if not data.startswith(MAGIC):
        raise Refusal(
            "not_qcow2",
            path,
            "is not a qcow2 image (it does not begin with QFI\\xfb), but is used as one",
            "If it is raw, say so with backing_format=raw; of a backing file, have the image above record it by "
            "'qemu-img rebase -u -F raw'.",
        )
    if len(data) < _V2_HEADER.size:
        raise damaged(path, f"the file ends within the header, after {len(data)} bytes")
    fields = _V2_HEADER.unpack_from(data)
    (_magic, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_entries, l1_offset, *_rest) = fields
    if version not in (2, 3):
        why = f"has qcow2 version {version}; only 2 and 3 are known"
        raise Refusal("unsupported", path, why, "See that it is really a qcow2 image.")
    if not 9 <= cluster_bits <= 21:
        raise damaged(path, f"cluster_bits is {cluster_bits}, allowed is 9 to 21")
    header = Header(
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


def _read_v3_fields(data: bytes, header: Header, path: str) -> Header:
    """Return `header` with the fields that only version 3 has."""
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


def _check_header(header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about the fixed fields."""
    unknown = header.incompatible & ~_INCOMPATIBLE_KNOWN
    if unknown:
        raise Refusal(
            "unsupported",
            path,
            f"needs qcow2 features that are not known here (incompatible feature bits {unknown:#x}). It was made by a "
            "newer program, so nothing can be said safely about its bitmaps",
            "Copy it with that program into an image without these features ('qemu-img convert').",
        )
    if header.version == 3 and not 104 <= header.length <= header.cluster_size:
        raise damaged(path, f"header_length is {header.length}, allowed is 104 to {header.cluster_size}")
    if header.refcount_order > 6:
        raise damaged(path, f"refcount_order is {header.refcount_order}, allowed is 0 to 6")
    if header.crypt_method > 2:
        raise damaged(path, f"crypt_method is {header.crypt_method}, allowed is 0 to 2")
    if header.compression_type >= len(COMPRESSION_TYPES):
        raise damaged(path, f"compression_type is {header.compression_type}, allowed is 0 to 1")
    if bool(header.incompatible & _INCOMPATIBLE_COMPRESSION) != (header.compression_type != 0):
        raise damaged(path, "its compression type and its compression feature bit contradict each other")
    if header.incompatible & INCOMPATIBLE_EXTENDED_L2 and header.cluster_size < 16384:
        raise damaged(path, f"it has extended L2 entries with clusters of only {header.cluster_size} bytes")
    extended = bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2)
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


def backing_file_of(area: bytes, header: Header, path: str) -> str | None:
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
    return text_of(name)


def read_extensions(area: bytes, header: Header, path: str) -> dict[int, bytes]:
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
        if kind in extensions and kind in (EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE):
            raise damaged(path, f"header extension {kind:#010x} occurs twice")
        if kind == EXT_BACKING_FORMAT and length > MAX_BACKING_FORMAT_NAME:
            raise damaged(path, f"the name of its backing format is {length} bytes long")
        extensions[kind] = area[offset : offset + length]
        offset += (length + 7) // 8 * 8
    return extensions
