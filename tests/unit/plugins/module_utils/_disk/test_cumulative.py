# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the bitmaps of an overlay begin with: the union of the chain, as QEMU itself merges it, bit by bit."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import tracemalloc

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import build, cumulative
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation, OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import maps_of, united
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu
from .overlays import SETTINGS, make_overlays, states

NAMES = ("x", "y ü,\n")


def merged_by_qemu(tmp_path, paths, name, granularity):
    """Return the dirty extents of the union of a bitmap of several images, as QEMU merges them."""
    with qemu.exporting(tmp_path) as monitor:
        for number, path in enumerate(paths):
            qemu.open_bitmaps(monitor, f"n{number}", path)
        qemu.merge_bitmaps(monitor, [f"n{number}" for number in range(len(paths))], name, "union", granularity)
        return qemu.dirty_extents(monitor, tmp_path, "n0", "union")


def extents_in(tmp_path, path, name):
    with qemu.exporting(tmp_path) as monitor:
        qemu.open_bitmaps(monitor, "n", path)
        return qemu.dirty_extents(monitor, tmp_path, "n", name)


@pytest.mark.parametrize("seed", range(qemu.examples(18)))
def test_the_union_of_the_chain_bit_by_bit(tmp_path, seed):
    dice = random.Random(seed)
    # Sizes that end in mid-granule; each image with granularities and a cluster size of its own.
    size = dice.randrange(1, 1 << 13) * dice.choice((512, 4096, 65536 + 512))
    same = 1 << dice.randint(9, 20)
    paths, backing = [], []
    for layer in range(seed % 3 + 1):
        cluster_size = 1 << dice.randint(9, 21)
        path = qemu.create(tmp_path / f"layer{layer}", size, "-o", f"cluster_size={cluster_size}", *backing)
        granularities = [same if seed % 2 else 1 << dice.randint(9, 20) for _name in NAMES]
        qemu.add_bitmaps(path, [Bitmap(name, g, True, False) for name, g in zip(NAMES, granularities)])
        qemu.guest_writes(path, dice, size, dice.choice((0, 1, 5, 60)))
        paths.insert(0, path)
        backing = ["-b", path, "-F", "qcow2"]
    wanted = OverlayRequest(str(tmp_path / "over"), paths[0], creation=Creation(1 << dice.randint(12, 21)))
    outcome = make_overlays([wanted], SETTINGS)
    assert states(outcome) == ["created"], outcome.failures
    assert qemu.bitmaps_of(wanted.path) == qemu.bitmaps_of(paths[0])
    for name, granularity in zip(NAMES, granularities):
        assert extents_in(tmp_path, wanted.path, name) == merged_by_qemu(tmp_path, paths, name, granularity)


def test_empty_means_no_bit(tmp_path):
    active = qemu.create(tmp_path / "active", "1G")
    qemu.add_bitmaps(active, [Bitmap("x", 65536, True, False)])
    qemu.guest_writes(active, random.Random(1), 1 << 30, 5)
    wanted = OverlayRequest(str(tmp_path / "over"), active, bitmap_content="empty")
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert extents_in(tmp_path, wanted.path, "x") == []
    assert extents_in(tmp_path, active, "x") != []


def chain_of_three(tmp_path, sizes=("64M", "64M", "64M"), lowest=True):
    """Return base, middle and top with a bitmap x each, in which 64 KiB are dirty: at 1M, at 2M, at 3M."""
    paths, backing = [], []
    for layer, size in enumerate(sizes):
        path = qemu.create(tmp_path / f"layer{layer}", size, *backing)
        qemu.add_bitmaps(path, [Bitmap("x", 65536, True, False)])
        subprocess.run(["qemu-io", "-c", f"write {layer + 1}M 64k", path], check=True, stdout=subprocess.DEVNULL)
        paths.append(path)
        backing = ["-b", path, "-F", "qcow2"]
    return paths


@pytest.mark.parametrize("fault", ["missing", "inconsistent", "lost"])
def test_the_union_ends_where_the_chain_of_bitmaps_ends(tmp_path, fault):
    base, middle, top = chain_of_three(tmp_path)
    qemu.qemu_img("bitmap", "--remove", middle, "x")
    if fault == "inconsistent":
        qemu.add_bitmaps(middle, [Bitmap("x", 65536, True, True)])
    elif fault == "lost":
        qemu.add_bitmaps(middle, [Bitmap("x", 65536, True, False)])
        qemu.patch(middle, 88, struct.pack(">Q", 0))  # autoclear bit 0
    wanted = OverlayRequest(str(tmp_path / "over"), top)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert extents_in(tmp_path, wanted.path, "x") == [(3 << 20, 65536)]
    assert extents_in(tmp_path, base, "x") == [(1 << 20, 65536)]


@pytest.mark.parametrize("sizes", [("64M", "96M", "160M"), ("160M", "96M", "64M")], ids=["grown", "shrunk"])
def test_images_of_different_sizes_are_united_too(tmp_path, sizes):
    base, _middle, top = chain_of_three(tmp_path, sizes)
    end = qemu.info(base)["virtual-size"] - 512
    subprocess.run(["qemu-io", "-c", f"write {end} 512", base], check=True, stdout=subprocess.DEVNULL)
    wanted = OverlayRequest(str(tmp_path / "over"), top)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    dirty = [(number << 20, 65536) for number in (1, 2, 3)]
    last = [(end // 65536 * 65536, 65536)] if sizes[0] == "64M" else []  # else it lies beyond the end of ACTIVE
    assert extents_in(tmp_path, wanted.path, "x") == dirty + last


def table_of(path, name):
    image = qemu.read(path)
    return dict(zip((bitmap.name for bitmap in image.bitmaps), image.bitmap_tables))[name]


def clusters_of(path, name):
    """Yield the clusters of a bitmap's data; an NBD client would need minutes for millions of extents."""
    table = table_of(path, name)
    with open(path, "rb") as file:
        file.seek(table.offset)
        for (entry,) in struct.iter_unpack(">Q", file.read(table.entries * 8)):
            file.seek(entry)
            yield file.read(65536)


def test_a_terabyte_that_is_dirty_everywhere_and_another_at_random(tmp_path):
    size = 1 << 40
    active = qemu.create(tmp_path / "active", size)
    qemu.add_bitmaps(active, [Bitmap(name, 65536, True, False) for name in ("full", "random", "clean")])
    dice, end = random.Random(1), os.path.getsize(active)
    full, mixed = table_of(active, "full"), table_of(active, "random")
    for index in range(full.entries):
        qemu.patch(active, full.offset + index * 8, struct.pack(">Q", 1))
        place = (end + 65535) // 65536 * 65536 + index * 65536
        qemu.patch(active, place, dice.randbytes(65536))
        qemu.patch(active, mixed.offset + index * 8, struct.pack(">Q", place))
    wanted = OverlayRequest(str(tmp_path / "over"), active)
    outcome = make_overlays([wanted], SETTINGS)
    assert states(outcome) == ["created"], outcome.failures
    assert extents_in(tmp_path, wanted.path, "full") == [(0, size)]
    assert list(clusters_of(wanted.path, "random")) == list(clusters_of(active, "random"))
    assert extents_in(tmp_path, wanted.path, "clean") == []
    need = outcome.verdicts[0].need
    taken = os.stat(wanted.path).st_blocks * 512
    assert 2 * full.entries * 65536 < taken <= need.bytes + 4 * 65536


@pytest.mark.parametrize("what", ["a bit less", "a bit more", "not merged"])
def test_bits_that_become_others_on_the_way_are_noticed(tmp_path, monkeypatch, what):
    base, middle, top = chain_of_three(tmp_path)
    real = Monitor.send

    def changing(self, name, arguments=None, *args):
        if name == "transaction" and what == "not merged":
            arguments = {"actions": [one for one in arguments["actions"] if "merge" not in one["type"]]}
        return real(self, name, arguments, *args)

    def other(fd, size, bitmaps, real_write=cumulative.write_scratch):
        changed = []
        for bitmap, pieces in bitmaps:
            (_offset, data), *_rest = pieces
            number = int.from_bytes(data, "little")
            number = number & (number - 1) if what == "a bit less" else number | 1 << 500
            changed.append((bitmap, [(0, number.to_bytes(len(data), "little"))]))
        real_write(fd, size, changed)

    monkeypatch.setattr(Monitor, "send", changing)
    if what != "not merged":
        monkeypatch.setattr(cumulative, "write_scratch", other)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), top)], SETTINGS)
    assert states(outcome) == ["failed"]
    assert "the bitmap 'x' has other bits than it was to begin with" in str(outcome.failures[0])
    assert not os.path.exists(tmp_path / "over")
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(path) for path in (base, middle, top)]


def test_a_damaged_table_below_is_told_before_anything_is_made(tmp_path):
    base, _middle, top = chain_of_three(tmp_path)
    qemu.patch(base, qemu.read(base).bitmap_tables[0].offset, struct.pack(">Q", 3))
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), top)], SETTINGS)
    assert str(outcome.failures[0]).startswith(f"{base}: is damaged")
    assert sorted(os.listdir(tmp_path)) == ["layer0", "layer1", "layer2"]


def test_an_overlay_of_an_interrupted_run_is_not_taken_if_the_vm_ran_on_below_it(tmp_path):
    active = chain_of_three(tmp_path)[2]
    wanted = OverlayRequest(str(tmp_path / "over"), active, must_be_fresh=True)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert states(make_overlays([wanted], SETTINGS)) == ["present"]
    subprocess.run(["qemu-io", "-c", "write 9M 64k", active], check=True, stdout=subprocess.DEVNULL)
    outcome = make_overlays([wanted], SETTINGS)
    assert "its bitmap 'x' has not the bits of the images below" in str(outcome.failures[0])
    assert "If no VM has it as its disk" in outcome.failures[0].remedy
    assert states(make_overlays([wanted._replace(bitmap_content="empty")], SETTINGS)) == ["present"]
    assert states(make_overlays([wanted._replace(must_be_fresh=False)], SETTINGS)) == ["present"]


def test_an_image_below_that_somebody_writes_to_is_refused(tmp_path):
    base, _middle, top = chain_of_three(tmp_path)
    wanted = OverlayRequest(str(tmp_path / "over"), top)
    with qemu.opened_for_writing(base):
        for settings in (SETTINGS, SETTINGS._replace(check_mode=True)):
            outcome = make_overlays([wanted], settings)
            assert [(one.code, one.subject) for one in outcome.failures] == [("in_use", base)]
        # With bitmaps that begin empty, nothing of that image matters.
        assert states(make_overlays([wanted._replace(bitmap_content="empty")], SETTINGS)) == ["created"]


@pytest.mark.parametrize("step", ["observe", "build"])
def test_no_tool_can_change_an_image_below_between_the_look_and_the_end(tmp_path, monkeypatch, step):
    base, middle, top = chain_of_three(tmp_path)
    done = []

    def merge_down():  # which is right, and changes nothing of what ACTIVE shows
        command = ["qemu-img", "commit", "-q", "-f", "qcow2", "-d", middle]
        done.append(subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True))

    def after_the_look(*args, real=build.observe_chain, **more):
        found = real(*args, **more)
        merge_down()
        return found

    def before_the_work(*args, real=build._fill):
        merge_down()
        real(*args)

    if step == "observe":
        monkeypatch.setattr(build, "observe_chain", after_the_look)
    else:
        monkeypatch.setattr(build, "_fill", before_the_work)
    wanted = OverlayRequest(str(tmp_path / "over"), top)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    # Before the images below are held, the merge goes well, and its outcome is what is read.
    assert [one.returncode for one in done] == ([0, 0] if step == "observe" else [1])
    assert all("lock" in one.stderr for one in done if one.returncode)
    assert extents_in(tmp_path, wanted.path, "x") == merged_by_qemu(tmp_path, [top, middle, base], "x", 65536)
    assert len(extents_in(tmp_path, wanted.path, "x")) == 3


def test_a_fine_bitmap_below_a_coarse_one_takes_little_memory(tmp_path):
    size = 256 << 30
    base = qemu.create(tmp_path / "base", size)
    qemu.add_bitmaps(base, [Bitmap("x", 512, True, False)])
    table = qemu.read(base).bitmap_tables[0]
    for index in range(0, table.entries, 2):
        qemu.patch(base, table.offset + index * 8, struct.pack(">Q", 1))
    top = qemu.create(tmp_path / "top", size, "-b", base, "-F", "qcow2")
    qemu.add_bitmaps(top, [Bitmap("x", 1 << 31, True, False)])
    with contextlib.ExitStack() as held:
        maps = [maps_of(held.enter_context(open_image(path)), qemu.read(path))["x"] for path in (top, base)]
        tracemalloc.start()
        ((offset, data),) = united(maps, 1 << 31, size)
        _now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (offset, data) == (0, bytes([255]) * 16)  # 256 MiB of every 512 MiB are dirty
    assert peak < 100 << 20  # however large the disk is


def test_bits_that_would_take_too_long_to_unite_are_refused(tmp_path, monkeypatch):
    _base, _middle, top = chain_of_three(tmp_path)
    monkeypatch.setattr(cumulative, "MAX_UNITED", 2)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), top)], SETTINGS)
    assert [one.code for one in outcome.failures] == ["bitmaps_too_large"]
    assert "bitmap_content=empty" in str(outcome.failures[0])


def test_check_mode_reads_the_bits(tmp_path):
    base, _middle, top = chain_of_three(tmp_path)
    table = qemu.read(base).bitmap_tables[0]
    qemu.patch(base, table.offset, struct.pack(">Q", 1 << 40))  # data far beyond the end
    for settings in (SETTINGS, SETTINGS._replace(check_mode=True)):
        outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), top)], settings)
        assert [(one.code, one.subject) for one in outcome.failures] == [("damaged", base)]
