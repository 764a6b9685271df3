# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dirty bytes: equal to the byte to what QEMU exports over NBD, for random chains; and damaged tables."""

from __future__ import annotations

import random
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import dirty_bytes, maps_of, rescaled

from .. import qemu


def map_of(path, name="x"):
    """Return our reader's map of a bitmap; the descriptor stays open until the end of the tests."""
    file = open_image(str(path))
    return maps_of(file, qemu.read(path))[name]


def exported(monitor, folder, node, bitmap):
    """Return the dirty bytes that an NBD client is told of a bitmap of QEMU."""
    return sum(length for _start, length in qemu.dirty_extents(monitor, folder, node, bitmap))


@pytest.mark.parametrize("seed", range(qemu.examples(18)))
def test_equal_to_qemu_to_the_byte(tmp_path, seed):
    dice = random.Random(seed)
    # Chains of three; sizes that end in mid-granule; each image with a granularity and a cluster size of its own.
    size = dice.randrange(1, 1 << 13) * dice.choice((512, 4096, 65536 + 512))
    same = 1 << dice.randint(9, 20)
    paths, backing = [], []
    for layer in range(3):
        granularity = same if seed % 2 else 1 << dice.randint(9, 20)
        cluster_size = 1 << dice.randint(9, 21)
        path = qemu.create(tmp_path / f"layer{layer}", size, "-o", f"cluster_size={cluster_size}", *backing)
        qemu.add_bitmaps(path, [Bitmap("x", granularity, True, False), Bitmap("other", 65536, True, False)])
        qemu.guest_writes(path, dice, size, dice.choice((1, 5, 60)))
        paths.insert(0, path)
        backing = ["-b", path, "-F", "qcow2"]
    maps = [map_of(path) for path in paths]
    with qemu.exporting(tmp_path) as monitor:
        for number, path in enumerate(paths):
            qemu.open_bitmaps(monitor, f"n{number}", path)
            assert dirty_bytes([maps[number]], size) == exported(monitor, tmp_path, f"n{number}", "x")
        qemu.merge_bitmaps(monitor, ["n0", "n1", "n2"], "x", "all", maps[0].granularity)
        assert 0 < dirty_bytes(maps, size) == exported(monitor, tmp_path, "n0", "all")


def test_clusters_of_the_bitmap_that_are_all_ones_or_all_zeroes(tmp_path):
    size = (10 << 30) + 512
    path = qemu.create(tmp_path / "x", size)
    qemu.add_bitmaps(path, [Bitmap("x", 512, True, False)])
    assert dirty_bytes([map_of(path)], size) == 0
    # QEMU reads the short form of all ones, but never writes it.
    table = qemu.read(path).bitmap_tables[0]
    for index in (0, 7, table.entries - 1):
        qemu.patch(path, table.offset + index * 8, struct.pack(">Q", 1))
    with qemu.exporting(tmp_path) as monitor:
        qemu.open_bitmaps(monitor, "n", path)
        assert dirty_bytes([map_of(path)], size) == exported(monitor, tmp_path, "n", "x") == 2 * (256 << 20) + 512


@pytest.mark.parametrize("top", [512, 1 << 31])
def test_the_finest_and_the_coarsest_granularity_together(tmp_path, top):
    size = (40 << 30) + 512
    paths, backing = [], []
    for layer, granularity in enumerate((512, 1 << 31) if top == 1 << 31 else (1 << 31, 512)):
        path = qemu.create(tmp_path / f"layer{layer}", size, *backing)
        qemu.add_bitmaps(path, [Bitmap("x", granularity, True, False)])
        command = ["qemu-io", "-c", f"write {layer * 20}G 512", "-c", f"write {size - 512} 512", path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        paths.insert(0, path)
        backing = ["-b", path, "-F", "qcow2"]
    # A granule of 2 GiB at each place, of which the one at the end has only 512 bytes of disk.
    expected = {512: (1 << 31) + 512 + 512, 1 << 31: 2 * (1 << 31) + 512}
    assert dirty_bytes([map_of(path) for path in paths], size) == expected[top]


@pytest.mark.parametrize("granularity, wanted", [(1, 1), (8, 1), (1, 8), (4, 2), (2, 64), (64, 2)])
def test_another_granularity_marks_whatever_is_touched(granularity, wanted):
    dice = random.Random(granularity * 100 + wanted)
    for _attempt in range(50):
        bits = [dice.random() < 0.1 for _bit in range(256 // granularity)]
        number = sum(1 << index for index, bit in enumerate(bits) if bit)
        expected = 0
        for index in range(256 // wanted):
            touched = range(index * wanted // granularity, -(-(index + 1) * wanted // granularity))
            expected |= any(bits[one] for one in touched) << index
        assert rescaled(number, granularity, wanted) == expected


DAMAGE = {
    "reserved low bits": 0b10,
    "reserved high bits": 1 << 56,
    "all ones with an offset": 65536 | 1,
    "an unaligned offset": 65536 + 512,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_refused_as_qemu_refuses_it(tmp_path, damage):
    path = qemu.create(tmp_path / "x")
    qemu.add_bitmaps(path, [Bitmap("x", 65536, True, False)])
    qemu.patch(path, qemu.read(path).bitmap_tables[0].offset, struct.pack(">Q", DAMAGE[damage]))
    with pytest.raises(Refusal, match=r"is damaged: an entry of the table of the bitmap 'x' is 0x"):
        map_of(path)
    assert subprocess.run(["qemu-io", "-c", "quit", path], check=False, capture_output=True).returncode == 1


def test_data_outside_the_file_is_refused(tmp_path):
    path = qemu.create(tmp_path / "x")
    qemu.add_bitmaps(path, [Bitmap("x", 65536, True, False)])
    qemu.patch(path, qemu.read(path).bitmap_tables[0].offset, struct.pack(">Q", 1 << 40))
    with pytest.raises(Refusal, match=r"is damaged: a bitmap has data at offset 1099511627776, outside the file"):
        dirty_bytes([map_of(path)], 64 << 20)
