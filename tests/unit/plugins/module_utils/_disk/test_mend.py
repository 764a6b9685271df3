# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bitmaps are healed rightly: beside a twin that recorded all the time, and beside what really changed on the disk."""

from __future__ import annotations

import random
import shutil

import pytest

from .. import qemu
from .healing import (
    MONDAY,
    SIZE,
    TUESDAY,
    bits_of,
    changed_bits,
    checkpoints,
    content,
    corruptions,
    crash,
    guest_writes,
    held_bits,
    lose,
    mend,
    overlay,
    recording_overlay,
    told,
    union_of_granules,
)
from .overlays import digest


@pytest.fixture(name="base")
def fixture_base(tmp_path):
    """A base with two bitmaps that a guest has written to."""
    path = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.guest_writes(path, random.Random(1), SIZE, 5)
    qemu.add_bitmaps(path, [MONDAY, TUESDAY])
    qemu.guest_writes(path, random.Random(2), SIZE, 5)
    return path


def test_an_overlay_by_qemu_img_gets_what_it_holds(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    qemu.guest_writes(top, random.Random(3), SIZE, 9)
    before = digest(base)
    disk, changed = mend(top)
    assert changed
    assert disk["state"] == "rebuilt"
    assert told(disk) == [("monday", "top.qcow2", "rebuilt"), ("tuesday", "top.qcow2", "rebuilt")]
    assert [one["valid"] for one in disk["checkpoints"]] == [True, True]
    for bitmap in (MONDAY, TUESDAY):
        assert bits_of([top], bitmap.name) == union_of_granules(held_bits(top, bitmap.granularity), bitmap.granularity)
    assert qemu.bitmaps_of(top) == {("monday", 65536, True, False), ("tuesday", 4096, True, False)}
    assert digest(base) == before


def make_chain(folder, dice, make_overlay, depth, guest):
    """Make a base with bitmaps and overlays on it to which a guest writes; return the paths, topmost first."""
    path = qemu.create(folder / "0.qcow2", SIZE)
    guest(path, random.Random(dice.random()))
    qemu.add_bitmaps(path, [MONDAY, TUESDAY])
    shutil.copy(path, folder / "then.qcow2")  # what the full backup has
    guest(path, random.Random(dice.random()))
    paths = [path]
    for number in range(1, depth):
        make_overlay(folder / f"{number}.qcow2", paths[0])
        paths.insert(0, str(folder / f"{number}.qcow2"))
        guest(paths[0], random.Random(dice.random()))
    return paths


def careless_guest(path, dice):
    """Have a guest that discards less than clusters, too: QEMU records that, and does not do it."""
    qemu.guest_writes(path, dice, SIZE, 4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("guest", [guest_writes, careless_guest])
def test_healed_chains_mark_what_a_twin_has_recorded_and_what_really_changed(tmp_path, seed, guest):
    dice, harms = random.Random(seed), random.Random(seed + 100)
    depth = dice.randrange(2, 5)
    (tmp_path / "twin").mkdir()
    state = dice.getstate()
    twin = make_chain(tmp_path / "twin", dice, recording_overlay, depth, guest)
    dice.setstate(state)

    def make_any(path, base):
        harms.choice((overlay, recording_overlay))(path, base)

    paths = make_chain(tmp_path, dice, make_any, depth, guest)
    for path in paths[:-1]:
        harms.choice((crash, lose, lambda _path: None))(path)
    for top in (twin[0], paths[0]):  # the VM goes on with what is broken
        guest(top, random.Random(seed))
    assert content(paths[0]) == content(twin[0])
    before = digest(paths[-1])
    disk, _changed = mend(paths[0])
    assert digest(paths[-1]) == before
    assert disk["state"] in ("valid", "rebuilt"), disk
    assert checkpoints(paths[0]) == {"monday", "tuesday"}
    changed = changed_bits(content(tmp_path / "then.qcow2"), content(paths[0]))
    for name in ("monday", "tuesday"):
        recorded, healed = bits_of(twin, name), bits_of(paths, name)
        assert guest is careless_guest or not recorded & ~healed
        assert not changed & ~healed
    for path in paths:
        assert not corruptions(path)
