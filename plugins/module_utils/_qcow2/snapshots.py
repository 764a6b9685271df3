# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the table of an image's internal snapshots, only to tell whether QEMU can (qcow2 spec, Snapshots)."""

from __future__ import annotations

import struct

from .._base.files import OpenImage
from .header import MAX_OFFSET, REPAIR, SNAPSHOT_ENTRY_SIZE, Header, damaged, read_as_qemu

_ENTRY = struct.Struct(">12xHH20xI")
_MAX_EXTRA_DATA = 1024  # bytes of one entry; QEMU's QCOW_MAX_SNAPSHOT_EXTRA_DATA
_MAX_TABLE = 1024 * 65536  # bytes; QEMU's QCOW_MAX_SNAPSHOTS_SIZE


def check_snapshots(file: OpenImage, header: Header) -> None:
    """Refuse a snapshot table that QEMU too refuses; most images have none, and then nothing is read."""
    offset = header.snapshots_offset
    for number in range(header.snapshots):
        offset = (offset + 7) // 8 * 8
        if offset > MAX_OFFSET - SNAPSHOT_ENTRY_SIZE:
            raise damaged(file.path, f"entry {number} of its snapshot table lies outside any file")
        id_size, name_size, extra_data = _ENTRY.unpack(read_as_qemu(file, SNAPSHOT_ENTRY_SIZE, offset))
        if extra_data > _MAX_EXTRA_DATA:
            raise damaged(
                file.path, f"entry {number} of its snapshot table has {extra_data} bytes of extra data", REPAIR
            )
        offset += SNAPSHOT_ENTRY_SIZE + extra_data + id_size + name_size
        if offset - header.snapshots_offset > _MAX_TABLE:
            raise damaged(file.path, f"its snapshot table is larger than {_MAX_TABLE} bytes", REPAIR)
