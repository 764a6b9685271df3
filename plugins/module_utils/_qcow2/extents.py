# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: what an image holds of its own (qcow2 spec, Cluster mapping)."""

from __future__ import annotations

import os

from .header import L1_ENTRY_SIZE, damaged, read_header


def has_allocated_extents(fd: int, path: str) -> bool:
    """Whether the open qcow2 image has data clusters of its own (qcow2 spec, L1 table); Qcow2Error when damaged."""
    header = read_header(fd, path)
    size = header.l1_entries * L1_ENTRY_SIZE
    table = os.pread(fd, size, header.l1_offset)
    if len(table) != size:
        raise damaged(path, "the file ends within the L1 table")
    return any(table)
