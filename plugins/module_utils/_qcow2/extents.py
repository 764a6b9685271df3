# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what an image holds of its own (qcow2 spec, Cluster mapping)."""

from __future__ import annotations

from .._base.files import OpenImage
from .header import L1_ENTRY_SIZE, read_header


def has_allocated_extents(file: OpenImage) -> bool:
    """Whether the image has clusters of its own, not only those of the images below (qcow2 spec, L1 table).

    Internal snapshots count: the disk may have been put back to an empty one, while the data is in another.
    """
    header = read_header(file)
    return header.snapshots > 0 or any(file.read(header.l1_entries * L1_ENTRY_SIZE, header.l1_offset))
