# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: header and bitmaps of one open qcow2 image."""

from __future__ import annotations

import typing as t

from .._base.files import OpenImage
from .bitmaps import Bitmap, BitmapTable, read_bitmaps
from .extensions import check_backing_format, read_extensions
from .header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    COMPRESSION_TYPES,
    CRYPT_AES,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    SECTOR,
    backing_file_of,
    read_as_qemu,
    read_header,
)
from .mark import History, Mark
from .snapshots import check_snapshots


class Image(t.NamedTuple):
    """What the header of a qcow2 image says (qcow2 spec, Header and Header extensions)."""

    version: int  # 2 or 3; qemu-img calls them compat 0.10 and 1.1
    virtual_size: int  # bytes
    cluster_size: int  # bytes
    refcount_bits: int
    backing_file: str | None  # as recorded, not resolved
    backing_format: str | None
    encrypted: bool
    encrypted_with_aes: bool  # in the old way, which QEMU still reads but no VM can run on
    dirty: bool
    corrupt: bool
    lazy_refcounts: bool
    extended_l2: bool
    compression_type: str
    has_data_file: bool
    data_file: str | None  # as recorded; None too if the image has one but does not name it
    data_file_raw: bool
    bitmaps: tuple[Bitmap, ...]  # in the order of the directory
    bitmap_tables: tuple[BitmapTable, ...]  # in the same order
    lost_bitmaps: int  # bitmaps that a program which does not know them has made worthless (autoclear bit 0)
    snapshots: int = 0  # internal ones
    mark: Mark | None = None  # of an overlay that this collection has made for a domain
    history: History = History()  # of the same; it tells nothing of any other image
    lost_names: frozenset[str] | None = None  # of the lost bitmaps; None if that cannot be told

    @property
    def made(self) -> int:
        """When it was made, in seconds since 1970; 0: not known."""
        return self.history.made // 10**9

    @property
    def is_flattened(self) -> bool:
        """Whether it is an overlay that somebody has copied everything below into, and that records no image now."""
        return self.made > 0 and self.backing_file is None


def read_image(file: OpenImage, *, with_bitmaps: bool = True) -> Image:
    """Return what the open image says of itself; Refusal if it is no qcow2 image, or one that QEMU does not open."""
    header = read_header(file)
    area = read_as_qemu(file, header.cluster_size, 0)
    extensions = read_extensions(area, header, file.path)
    backing_file = backing_file_of(area, header, file.path)
    if backing_file is not None:
        check_backing_format(extensions.backing_format, file.path)
    check_snapshots(file, header)
    stored = read_bitmaps(file, extensions.bitmaps if with_bitmaps else None, header)
    return Image(
        version=header.version,
        virtual_size=header.virtual_size // SECTOR * SECTOR,
        cluster_size=header.cluster_size,
        refcount_bits=1 << header.refcount_order,
        backing_file=backing_file,
        backing_format=extensions.backing_format if backing_file is not None else None,
        encrypted=header.crypt_method != 0,
        encrypted_with_aes=header.crypt_method == CRYPT_AES,
        dirty=bool(header.incompatible & INCOMPATIBLE_DIRTY),
        corrupt=bool(header.incompatible & INCOMPATIBLE_CORRUPT),
        lazy_refcounts=bool(header.compatible & COMPATIBLE_LAZY_REFCOUNTS),
        extended_l2=bool(header.incompatible & INCOMPATIBLE_EXTENDED_L2),
        compression_type=COMPRESSION_TYPES[header.compression_type],
        has_data_file=bool(header.incompatible & INCOMPATIBLE_DATA_FILE),
        data_file=extensions.data_file if header.incompatible & INCOMPATIBLE_DATA_FILE else None,
        data_file_raw=bool(header.autoclear & AUTOCLEAR_DATA_FILE_RAW),
        bitmaps=stored.bitmaps,
        bitmap_tables=stored.tables,
        lost_bitmaps=stored.lost,
        lost_names=stored.lost_names,
        snapshots=header.snapshots,
        mark=extensions.mark,
        history=extensions.history,
    )
