# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: how much space a commit takes, and where.

::

    BASE        the data, unless its extents can be shared; its tables; the bitmaps once more, when they are given
    data file   the data, if BASE has one
    TOP         the bitmaps that it carries, and the mark
    the vault   the bits of BASE's bitmaps and of TOP's, and what the images hold that go in
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage
from .._qcow2.bitmaps import Bitmap
from .._qcow2.dirty import DirtyBits, count_bits, united
from .._qcow2.extents import AllocationMap, has_compressed_clusters
from .._qcow2.growth import most_growth, most_growth_raw, used_bytes
from .._qcow2.scratch import CLUSTER
from . import commit
from .carry import Wanted
from .cumulative import most_bytes
from .observe import free_bytes
from .session import Held
from .share import shares_extents
from .stages import Seen
from .verdict import Need

_MOST_COPIED = 65536  # bytes; what QEMU copies at once, if clusters are smaller
_NAMES_ONLY = 16  # bitmaps of a vault that tell something by their name alone, and its tables; more than there are


def can_share(seen: Seen, layers: t.Sequence[OpenImage]) -> bool:
    """Whether the data can get into BASE by extents that both files share."""
    if not commit.can_share(seen) or seen.base.image is None:
        return False
    if any(map(has_compressed_clusters, layers)):  # at the first one QEMU begins to copy, all that follows, too
        return False
    return shares_extents([layer.real_path for layer in seen.part], seen.base.image.cluster_size)


def need_of(seen: Seen, held: Held, wanted: t.Sequence[Wanted], *, shares_data: bool) -> Need | None:
    """Return the space that is needed in BASE's file system; Refusal if it is too little elsewhere.

    `wanted` are the bitmaps that TOP is to have, and BASE then.
    """
    base, top = held.image(seen.base.path), held.image(seen.chain[0].path)
    layers = [held.image(layer.path) for layer in seen.chain[: seen.depth]]
    needs: dict[int, Need] = {}
    if base.is_device:
        _check_device(base, seen, layers, wanted)
    else:
        _add(needs, base, _growth(base, seen, layers, wanted, shares_data=shares_data))
    if seen.top.version == 3:
        _add(needs, top, (_bitmap_clusters(wanted, seen.top.cluster_size, seen) + 2) * seen.top.cluster_size)
    vault = 2 * (_bitmap_clusters(wanted, CLUSTER, seen) + len(wanted))
    vault += _bitmap_clusters([_what_is_held(layers)], CLUSTER, seen) + _NAMES_ONLY
    _add(needs, top if base.is_device else base, vault * CLUSTER)
    if seen.base.image is not None and seen.base.image.data_file:
        data_file = held.image(seen.base.image.data_file)
        if not data_file.is_device:
            _add(needs, data_file, _growth_of_data_file(data_file, seen, layers))
    of_base = needs.pop((top if base.is_device else base).status().st_dev, None)
    for need in needs.values():
        if need.bytes > need.free:
            why = f"needs {need.bytes} bytes in {need.folder}, where {need.free} are left"
            raise Refusal("no_space", seen.chain[0].path, why, "Make room there, then run this again.")
    return of_base


def _what_is_held(layers: t.Sequence[OpenImage]) -> Wanted:
    """Return the bitmap by which a vault tells what the images hold that go in."""
    maps = [AllocationMap(layer) for layer in layers]
    return Wanted(Bitmap("", min(one.granularity for one in maps), recording=False, inconsistent=False), maps)


def _check_device(base: OpenImage, seen: Seen, layers: t.Sequence[OpenImage], wanted: t.Sequence[Wanted]) -> None:
    """Refuse if the block device is too small for what it gets."""
    used = 0 if seen.base.image is None else used_bytes(base)
    growth = _growth(base, seen, layers, wanted, shares_data=False)
    needed = used + growth if seen.base.image is not None else base.length() + growth
    if needed > base.length():
        why = f"has {base.length()} bytes, and needs {needed}"
        raise Refusal("no_space", base.path, why, "Enlarge it (lvextend), then run this again.")


def _growth(
    base: OpenImage, seen: Seen, layers: t.Sequence[OpenImage], wanted: t.Sequence[Wanted], *, shares_data: bool
) -> int:
    if seen.base.image is None:
        return most_growth_raw(base, layers)
    clusters = _bitmap_clusters(wanted, seen.base.image.cluster_size, seen)
    return most_growth(base, layers, clusters, shares_data=shares_data)


def _growth_of_data_file(file: OpenImage, seen: Seen, layers: t.Sequence[OpenImage]) -> int:
    """Return an upper bound of what the data file takes: all that is written to it where it has holes."""
    own = seen.base.image.cluster_size if seen.base.image else 0  # of raw ones there is no data file
    unit, size = max(own, _MOST_COPIED), seen.chain[0].virtual_size
    maps: list[DirtyBits] = [AllocationMap(layer) for layer in layers]
    written = sum(count_bits(int.from_bytes(bits, "little")) for _at, bits in united(maps, unit, size)) * unit
    return min(written, max(0, -(-size // unit) * unit - file.status().st_blocks * 512))


def _bitmap_clusters(wanted: t.Sequence[Wanted], cluster_size: int, seen: Seen) -> int:
    """Return how many clusters the bitmaps take at most, with their tables and their directory."""
    if not wanted:
        return 0
    size = seen.chain[0].virtual_size
    tables = sum(-(-one.bitmap.data_bytes(size) // cluster_size) * 8 for one in wanted)
    maps = {one.bitmap.name: one.maps for one in wanted}
    data = most_bytes(maps, [one.bitmap for one in wanted], cluster_size, size)
    directory = sum(32 + len(one.bitmap.name.encode("utf-8", "surrogateescape")) for one in wanted)
    return data // cluster_size + tables // cluster_size + len(wanted) + directory // cluster_size + 1


def _add(needs: dict[int, Need], file: OpenImage, more: int) -> None:
    """Add what a file takes to what is needed in its file system, if that tells how much is free."""
    device, folder = file.status().st_dev, os.path.dirname(os.path.realpath(file.path))
    free = free_bytes(folder)
    if free is None:
        return
    before = needs.get(device, Need(device, folder, 0, free))
    needs[device] = before._replace(bytes=before.bytes + more)
