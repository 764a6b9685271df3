# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what an image holds of its own (qcow2 spec, Cluster mapping)."""

from __future__ import annotations

from .._base.files import OpenImage
from .header import L1_ENTRY_SIZE, damaged, read_header


def has_allocated_extents(file: OpenImage) -> bool:
    """Whether the image has clusters of its own, not only those of the images below (qcow2 spec, L1 table)."""
    header = read_header(file)
    size = header.l1_entries * L1_ENTRY_SIZE
    table = file.read(size, header.l1_offset)
    if len(table) != size:
        raise damaged(file.path, "the file ends within the L1 table")
    return any(table)
