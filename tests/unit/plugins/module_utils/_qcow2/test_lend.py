# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bits that are lent to a bitmap in place: what QEMU exports over NBD before, half-way, with them, and after."""

from __future__ import annotations

import contextlib
import pathlib
import random
import struct

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base import files
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import maps_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.lend import bits_to_lend, lend, take_back

from .. import chains, qemu


@contextlib.contextmanager
def lending(image, lower):
    """Hold for the block the open image, and what it is to be lent of the bitmaps of the other one."""
    with open_image(str(image)) as file, open_image(str(lower)) as other:
        maps = {name: [one] for name, one in maps_of(other, qemu.read(lower)).items()}
        yield file, bits_to_lend(file, qemu.read(image), maps, qemu.read(lower).virtual_size)


def exported(folder, path, name="x"):
    """Return the sectors that QEMU tells an NBD client to be dirty."""
    with qemu.exporting(folder) as monitor:
        qemu.open_bitmaps(monitor, "n", path)
        extents = qemu.dirty_extents(monitor, folder, "n", name)
    return {sector for start, length in extents for sector in range(start // 512, -(-(start + length) // 512))}


def written(path, size, dice, granularity, times, cluster_size=65536):
    """Make an image with a bitmap that records some writes of a guest."""
    qemu.create(path, size, "-o", f"cluster_size={cluster_size}")
    qemu.add_bitmaps(path, [Bitmap("x", granularity, True, False)])
    qemu.guest_writes(path, dice, size, times)
    return str(path)


def whole(sectors, unit, size):
    """Return all sectors of the units of so many bytes that have some of these."""
    units = {sector * 512 // unit for sector in sectors}
    return {one for u in units for one in range(u * unit // 512, -(-min(size, (u + 1) * unit) // 512))}


@pytest.mark.parametrize("seed", range(qemu.examples(16)))
def test_what_is_lent_is_marked_and_goes_without_a_trace(tmp_path, seed):
    dice = random.Random(seed)
    size = dice.randrange(1, 1 << 12) * dice.choice((512, 4096))
    fine, cluster_size = 1 << dice.randint(9, 16), 1 << dice.randint(9, 21)
    image = written(tmp_path / "image", size, dice, fine, dice.choice((0, 1, 5)), cluster_size)
    lower = written(tmp_path / "lower", size, dice, 1 << dice.randint(9, 18), dice.choice((1, 5, 40)))
    before, bytes_before = exported(tmp_path, image), pathlib.Path(image).read_bytes()
    wanted = before | whole(exported(tmp_path, lower), fine, size)
    table = qemu.read(image).bitmap_tables[0]
    entries = struct.unpack(f">{table.entries}Q", bytes_before[table.offset : table.offset + 8 * table.entries])
    without_data = {
        sector
        for index, entry in enumerate(entries)
        if not entry
        for sector in whole({index * fine * cluster_size * 8 // 512}, fine * cluster_size * 8, size)
    }
    with lending(image, lower) as (file, lent):
        lend(file, lent[: dice.randint(0, len(lent))])  # as a kill leaves it
        assert before <= exported(tmp_path, image)
        lend(file, lent)
        there = exported(tmp_path, image)
        assert wanted <= there
        assert there - wanted <= without_data
        assert not chains.damage(image)
        assert lending_nothing(image, lower)
        take_back(file, lent)
    assert pathlib.Path(image).read_bytes() == bytes_before


def lending_nothing(image, lower):
    """Whether all bits are there already."""
    with lending(image, lower) as (_file, lent):
        return not lent


@pytest.mark.parametrize("recording, is_closed", [(False, True), (True, False)], ids=["disabled", "inconsistent"])
def test_a_bitmap_that_tells_nothing_is_lent_nothing(tmp_path, recording, is_closed):
    lower = written(tmp_path / "lower", 1 << 20, random.Random(1), 65536, 5)
    image = qemu.create(tmp_path / "image", 1 << 20)
    qemu.add_bitmaps(image, [Bitmap("x", 65536, recording, not is_closed)])
    assert lending_nothing(image, lower)


def test_an_image_of_another_size_is_lent_what_it_has_room_for(tmp_path):
    """The bits of a small disk take one byte; there is more of the larger one."""
    lower = written(tmp_path / "lower", 1 << 30, random.Random(1), 65536, 40)
    image = written(tmp_path / "image", 3 << 16, random.Random(2), 65536, 1)
    with lending(image, lower) as (file, lent):
        lend(file, lent)
    assert not chains.damage(image)
    assert exported(tmp_path, image) <= set(range(3 * 128))


def test_data_of_a_bitmap_outside_the_file_is_refused(tmp_path):
    lower = written(tmp_path / "lower", 1 << 20, random.Random(1), 65536, 5)
    image = written(tmp_path / "image", 1 << 20, random.Random(2), 65536, 5)
    qemu.patch(image, qemu.read(image).bitmap_tables[0].offset, struct.pack(">Q", 1 << 40))
    with pytest.raises(Refusal, match="outside the file"), lending(image, lower):
        pass


def test_a_storage_that_does_not_keep_what_is_written_is_told(tmp_path, monkeypatch):
    lower = written(tmp_path / "lower", 1 << 20, random.Random(1), 65536, 5)
    image = written(tmp_path / "image", 1 << 20, random.Random(2), 65536, 0)
    monkeypatch.setattr(files, "write_all", lambda *_args: None)
    with lending(image, lower) as (file, lent), pytest.raises(Refusal) as told:
        lend(file, lent)
    assert (told.value.code, told.value.subject) == ("not_verified", image)
