# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An image that holds nothing but bitmaps: QEMU checks it clean, and sees in it, bit for bit, what was written."""

from __future__ import annotations

import json
import random

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.scratch import CLUSTER, write_scratch

from .. import qemu


def write(path, size, bitmaps):
    with open(path, "x+b") as file:
        write_scratch(file.fileno(), size, bitmaps)


def pieces_of(bits, count):
    """Return the bits, numbers of granules, as pieces of bitmap data; those without a bit are left out."""
    data = bytearray(-(-count // 8))
    for bit in bits:
        data[bit // 8] |= 1 << bit % 8
    offsets = range(0, len(data), CLUSTER)
    return [(at, bytes(data[at : at + CLUSTER])) for at in offsets if any(data[at : at + CLUSTER])]


def extents_of(bits, granularity, size):
    """Return the dirty extents, (start, length), that these bits tell of."""
    found = []
    for bit in sorted(bits):
        start, end = bit * granularity, min((bit + 1) * granularity, size)
        if found and sum(found[-1]) == start:
            start = found.pop()[0]
        found.append((start, end - start))
    return found


def check(path):
    report = json.loads(qemu.qemu_img("check", "--output=json", str(path)))
    assert report.get("leaks", 0) == report.get("corruptions", 0) == report["check-errors"] == 0


@pytest.mark.parametrize("seed", range(qemu.examples(12)))
def test_equal_to_qemu_bit_by_bit(tmp_path, seed):
    dice = random.Random(seed)
    size = dice.choice((512, 1 << 20, (6 << 30) + 512, (40 << 30) + 65536 * 3 + 512))
    bitmaps = []
    for number in range(dice.choice((1, 3, 9))):
        granularity = 1 << dice.randint(14, 31)
        count = -(-size // granularity)
        bits = {dice.randrange(count) for _bit in range(dice.choice((0, 1, 3000)))} | {count - 1}
        bitmaps.append((Bitmap(f"b{number} ü", granularity, False, False), bits, count))
    path = tmp_path / "scratch"
    write(path, size, [(bitmap, pieces_of(bits, count)) for bitmap, bits, count in bitmaps])
    check(path)
    assert qemu.bitmaps_of(path) == {tuple(bitmap) for bitmap, _bits, _count in bitmaps}
    with qemu.exporting(tmp_path) as monitor:
        qemu.open_bitmaps(monitor, "n", path)
        for bitmap, bits, _count in bitmaps:
            assert qemu.dirty_extents(monitor, tmp_path, "n", bitmap.name) == extents_of(bits, bitmap.granularity, size)


def test_all_ones_take_no_space_and_a_piece_may_be_of_many_clusters(tmp_path):
    size, granularity = 1 << 40, 65536
    everything = bytes([255]) * (size // granularity // 8)
    path = tmp_path / "scratch"
    bitmap = Bitmap("all", granularity, False, False)
    write(path, size, [(bitmap, [(0, everything)]), (bitmap._replace(name="none"), [(0, bytes(len(everything)))])])
    check(path)
    assert path.stat().st_size < 16 * CLUSTER
    with qemu.exporting(tmp_path) as monitor:
        qemu.open_bitmaps(monitor, "n", path)
        assert qemu.dirty_extents(monitor, tmp_path, "n", "all") == [(0, size)]
        assert qemu.dirty_extents(monitor, tmp_path, "n", "none") == []


def test_an_image_with_so_much_data_that_refcounts_take_several_blocks(tmp_path):
    size, granularity = 1 << 41, 512
    bitmaps = []
    for number in range(20):
        data = ((at * CLUSTER, b"\1" + bytes(CLUSTER - 1)) for at in range(number % 8, 8192, 4))
        bitmaps.append((Bitmap(f"b{number}", granularity, False, False), data))
    path = tmp_path / "scratch"
    write(path, size, bitmaps)
    check(path)
