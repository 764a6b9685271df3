# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: how many bitmaps a chain may have, and how large ones, before anybody looks into them."""

from __future__ import annotations

from .._base.errors import Refusal
from .._qcow2.image import Image

MAX_BITMAPS_OF_CHAIN = 16384
MAX_BITMAP_BYTES = 64 << 30  # of the bits of all bitmaps of one chain; each look at them takes seconds
MAX_TABLE_ENTRIES = 1 << 22  # of all bitmap tables of one chain, which are held in memory


class ChainSize:
    """How many bitmaps the images of a chain have together, and how large they are."""

    def __init__(self) -> None:
        self._bitmaps = 0
        self._bytes = 0
        self._entries = 0

    def add(self, path: str, image: Image) -> None:
        """Add an image; Refusal if the chain has more bitmaps now, or larger ones, than can be handled."""
        self._bitmaps += len(image.bitmaps)
        self._bytes += sum(bitmap.data_bytes(image.virtual_size) for bitmap in image.bitmaps)
        self._entries += sum(table.entries for table in image.bitmap_tables)
        if self._bitmaps > MAX_BITMAPS_OF_CHAIN:
            problem = f"has more than {MAX_BITMAPS_OF_CHAIN}, too many to report"
        elif self._bytes > MAX_BITMAP_BYTES or self._entries > MAX_TABLE_ENTRIES:
            problem = f"has {self._bytes >> 20} MiB of them in {self._entries} clusters, too much to be looked at"
        else:
            return
        why = f"with its bitmaps the chain {problem}"
        remedy = "Remove those that no backup needs with 'qemu-img bitmap --remove'."
        raise Refusal("too_many_bitmaps", path, why, remedy)
