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
MAX_L1_TABLE = 32 * 1024 * 1024  # bytes; QEMU's QCOW_MAX_L1_SIZE
L1_ENTRY_SIZE = 8  # bytes
MAX_OFFSET = (1 << 63) - (1 << 30)  # bytes; QEMU's BDRV_MAX_LENGTH, beyond which it reads nothing
INSPECT = "Inspect it with 'qemu-img check', or restore it from a backup."
REPAIR = "Repair it with 'qemu-img check -r all', or restore it from a backup."

V2_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
V3_HEADER = struct.Struct(">QQQIIB")  # what version 3 adds, with the compression type
BACKING_FILE_AT = 8  # bytes; where the header has offset and length of the name of the backing file
BACKING_FILE = struct.Struct(">QI")  # these two
AUTOCLEAR_AT = 88  # bytes; where the header of version 3 has the autoclear features
AUTOCLEAR = struct.Struct(">Q")
EXTENSION = struct.Struct(">II")  # type and length; qcow2 spec, Header extensions
EXT_END = 0
_MAX_REFCOUNT_TABLE = 8 * 1024 * 1024  # bytes; QEMU's QCOW_MAX_REFTABLE_SIZE
_MAX_SNAPSHOTS = 65536  # QEMU's QCOW_MAX_SNAPSHOTS
SNAPSHOT_ENTRY_SIZE = 40  # bytes; qcow2 spec, Snapshots, without what has no fixed length

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
CRYPT_AES = 1
CRYPT_LUKS = 2


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
    refcount_offset: int  # bytes; of the refcount table
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int  # bytes
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    length: int = V2_HEADER.size  # bytes; the extensions begin here
    compression_type: int = 0

    @property
    def extensions_end(self) -> int:
        """Return where the room for header extensions ends, in bytes."""
        return self.backing_offset or self.cluster_size


def is_qcow2(file: OpenImage) -> bool:
    """Whether the file begins with the magic of qcow2."""
    return file.read(len(MAGIC), 0) == MAGIC


def l1_bytes(virtual_size: int, cluster_size: int, extended_l2: bool) -> int:
    """Return the size in bytes of the L1 table that an image of `virtual_size` bytes needs (qcow2 spec, L1 table)."""
    l2_entries = cluster_size // (16 if extended_l2 else 8)
    return -(-virtual_size // (l2_entries * cluster_size)) * L1_ENTRY_SIZE


def extension_bytes(kind: int, data: bytes) -> bytes:
    """Return a header extension, padded to 8 bytes (qcow2 spec, Header extensions)."""
    return EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def damaged(path: str, what: str, remedy: str = INSPECT) -> Refusal:
    """Return the refusal of an image that breaks the format."""
    return Refusal("damaged", path, f"is damaged: {what}", remedy)


def each_extension(area: bytes, header: Header, path: str) -> t.Iterator[tuple[int, int, bytes]]:
    """Yield type, offset of the data and data of each extension, up to and with the end, if there is an explicit one.

    Refusal if one reaches out of the room for extensions.
    """
    offset, end = header.length, header.extensions_end
    while offset < end:
        kind, length = EXTENSION.unpack(area[offset : offset + EXTENSION.size].ljust(EXTENSION.size, b"\0"))
        offset += EXTENSION.size
        if offset + length > end:
            raise damaged(path, f"header extension {kind:#010x} of {length} bytes reaches out of the header cluster")
        yield kind, offset, area[offset : offset + length]
        if kind == EXT_END:
            return
        offset += (length + 7) // 8 * 8


def end_of_extensions(area: bytes, header: Header, path: str) -> int | None:
    """Return the offset behind the explicit end of the extensions in `area`; None if they only end at other data."""
    ends = [start for kind, start, _data in each_extension(area, header, path) if kind == EXT_END]
    return ends[0] if ends else None


def read_as_qemu(file: OpenImage, length: int, offset: int) -> bytes:
    """Return `length` bytes from `offset`; what lies beyond the end of the file is zero, as it is for QEMU."""
    return file.read(length, offset).ljust(length, b"\0")


def text_of(data: bytes | None) -> str | None:
    """Return a name that the image records, up to a NUL byte, as QEMU takes it; None if it is empty.

    Bytes that are not UTF-8 survive as surrogates, as in Python's file names.
    """
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") or None if data else None


def read_header(file: OpenImage) -> Header:
    """Return the fixed part of the header (qcow2 spec, Header); Refusal if the file is no qcow2 image, or damaged."""
    path, data = file.path, read_as_qemu(file, V2_HEADER.size + V3_HEADER.size, 0)
    magic, version, backing_offset, backing_length, cluster_bits, *rest = V2_HEADER.unpack_from(data)
    if magic != MAGIC:
        raise Refusal(
            "not_qcow2",
            path,
            "is not a qcow2 image (it does not begin with QFI\\xfb), but is used as one",
            "If it is raw, say so with backing_format=raw; of a backing file, have the image above record it by "
            "'qemu-img rebase -u -F raw'.",
        )
    _check_version(version, path)
    if not 9 <= cluster_bits <= 21:
        raise damaged(path, f"cluster_bits is {cluster_bits}, allowed is 9 to 21")
    header = Header(version, backing_offset, backing_length, 1 << cluster_bits, *rest)
    if version == 3:
        header = _with_v3_fields(header, *V3_HEADER.unpack_from(data, V2_HEADER.size))
    _check_features(header, path)
    _check_encoding(header, path)
    _check_tables(header, path)
    if header.l1_offset + header.l1_entries * L1_ENTRY_SIZE > file.length():  # QEMU would read zeroes, not the data
        raise damaged(path, "the file ends within the L1 table, so data is lost", "Restore it from a backup.")
    return header


def _check_version(version: int, path: str) -> None:
    """Refuse versions that are not known."""
    if version == 1:
        raise Refusal(
            "unsupported",
            path,
            "is an image of the old format qcow, version 1, but is used as qcow2; it can hold no bitmaps",
            "Copy it into a qcow2 image ('qemu-img convert -f qcow -O qcow2'); of a backing file, you can also have "
            "the image above record it by 'qemu-img rebase -u -F qcow'.",
        )
    if version not in (2, 3):
        why = f"has qcow2 version {version}; only 2 and 3 are known"
        raise Refusal("unsupported", path, why, "See that it is really a qcow2 image.")


def _with_v3_fields(
    header: Header,
    incompatible: int,
    compatible: int,
    autoclear: int,
    refcount_order: int,
    length: int,
    compression_type: int,
) -> Header:
    """Return `header` with the fields that only version 3 has."""
    return header._replace(
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=refcount_order,
        length=length,
        compression_type=compression_type if length > V2_HEADER.size + V3_HEADER.size - 1 else 0,
    )


def _check_features(header: Header, path: str) -> None:
    """Refuse features that are not known here, or cannot be, as QEMU does."""
    unknown = header.incompatible & ~_INCOMPATIBLE_KNOWN
    if unknown:
        raise Refusal(
            "unsupported",
            path,
            f"needs qcow2 features that are not known here (incompatible feature bits {unknown:#x}). It was made by a "
            "newer program, so nothing can be said safely about its bitmaps",
            "Copy it with that program into an image without these features ('qemu-img convert').",
        )
    if header.incompatible & INCOMPATIBLE_EXTENDED_L2 and header.cluster_size < 16384:
        raise damaged(path, f"it has extended L2 entries with clusters of only {header.cluster_size} bytes")
    if header.autoclear & AUTOCLEAR_DATA_FILE_RAW and not header.incompatible & INCOMPATIBLE_DATA_FILE:
        raise damaged(
            path, "it says that its external data file is raw (autoclear feature bit 1), but has no such file"
        )


def _check_encoding(header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about the fields that say how the image is written."""
    if header.version == 3 and not 104 <= header.length <= header.cluster_size:
        raise damaged(path, f"header_length is {header.length}, allowed is 104 to {header.cluster_size}")
    if header.refcount_order > 6:
        raise damaged(path, f"refcount_order is {header.refcount_order}, allowed is 0 to 6")
    if header.crypt_method > CRYPT_LUKS:
        raise damaged(path, f"crypt_method is {header.crypt_method}, allowed is 0 to 2")
    if header.compression_type >= len(COMPRESSION_TYPES):
        raise damaged(path, f"compression_type is {header.compression_type}, allowed is 0 to 1")
    if bool(header.incompatible & _INCOMPATIBLE_COMPRESSION) != (header.compression_type != 0):
        raise damaged(path, "its compression type and its compression feature bit contradict each other")
    if header.backing_offset > header.cluster_size:
        raise damaged(path, f"its backing file name lies at offset {header.backing_offset}, outside the header cluster")


def _check_tables(header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about where the tables are and how large they are."""
    refcounts, l1_size = header.refcount_clusters * header.cluster_size, header.l1_entries * L1_ENTRY_SIZE
    if not refcounts:
        raise damaged(path, "it has no refcount table", REPAIR)
    if refcounts > _MAX_REFCOUNT_TABLE or _is_misplaced(header.refcount_offset, refcounts, header):
        where = f"{header.refcount_clusters} clusters at offset {header.refcount_offset}"
        raise damaged(path, f"its refcount table of {where} is none that can be")
    snapshots = header.snapshots * SNAPSHOT_ENTRY_SIZE
    if header.snapshots > _MAX_SNAPSHOTS or _is_misplaced(header.snapshots_offset, snapshots, header):
        where = f"{header.snapshots} entries at offset {header.snapshots_offset}"
        raise damaged(path, f"its snapshot table of {where} is none that can be")
    needed = l1_bytes(header.virtual_size, header.cluster_size, bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2))
    if not needed <= l1_size <= MAX_L1_TABLE or _is_misplaced(header.l1_offset, l1_size, header):
        raise damaged(
            path,
            f"its L1 table of {header.l1_entries} entries at offset {header.l1_offset} does not fit its virtual size, "
            f"{header.virtual_size} bytes",
        )


def _is_misplaced(offset: int, size: int, header: Header) -> bool:
    """Whether no table of `size` bytes can lie at this offset."""
    return bool(offset % header.cluster_size) or offset + size > (MAX_OFFSET if size else (1 << 63) - 1)


def backing_file_of(area: bytes, header: Header, path: str) -> str | None:
    """Return the name of the backing file as it is recorded (qcow2 spec, Header, offsets 8 and 16)."""
    start, length = header.backing_offset, header.backing_length
    if not start:
        return None
    if length > min(MAX_BACKING_FILE_NAME, header.cluster_size - start):
        raise damaged(path, f"its backing file name is {length} bytes long")
    return text_of(area[start : start + length])
