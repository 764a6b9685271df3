# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bitmaps are healed rightly: beside a twin that recorded all the time, and beside what really changed on the disk."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import unittest.mock

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import mend as mend_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu
from . import commits
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
from .overlays import SETTINGS, digest


@pytest.fixture(name="base")
def fixture_base(tmp_path):
    """A base with two bitmaps that a guest has written to."""
    path = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.guest_writes(path, random.Random(1), SIZE, 5)
    qemu.add_bitmaps(path, [MONDAY, TUESDAY])
    qemu.guest_writes(path, random.Random(2), SIZE, 5)
    return path


def test_a_bitmap_whose_beginning_was_not_stored_below_is_not_valid_and_cannot_be_healed(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    with OpenImage(top, os.open(top, os.O_RDWR)) as file:
        write_mark(file, Mark("web", "vda", "mon"), History(made=90_000 * 10**9))
    qemu.add_bitmaps(top, [Bitmap("new", 65536, True, False)])
    for created, is_valid in ((50_000, False), (89_995, True)):
        disk, changed = mend(top, names=("new",), created=(("new", created),))
        found = {one["name"]: one for one in disk["checkpoints"]}["new"]
        assert (found["valid"], found["image"], changed) == (is_valid, None if is_valid else base, False)
        assert told(disk) == [
            ("new", "top.qcow2" if is_valid else "base.qcow2", "valid" if is_valid else "not_healable")
        ]


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


@pytest.mark.parametrize("seed", range(qemu.examples(7)))
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


def crashed(tmp_path, base):
    """Return an overlay that records, and whose VM has died."""
    recording_overlay(tmp_path / "top.qcow2", base)
    guest_writes(tmp_path / "top.qcow2", random.Random(3))
    crash(tmp_path / "top.qcow2")
    guest_writes(tmp_path / "top.qcow2", random.Random(4))
    return str(tmp_path / "top.qcow2")


def test_a_vm_that_died_has_its_bitmaps_again(tmp_path, base):
    top = crashed(tmp_path, base)
    disk, _changed = mend(top)
    assert told(disk) == [("monday", "top.qcow2", "rebuilt"), ("tuesday", "top.qcow2", "rebuilt")]
    assert checkpoints(top) == {"monday", "tuesday"}


def test_what_is_not_asked_for_stays_broken_and_what_nobody_has_is_told(tmp_path, base):
    top = crashed(tmp_path, base)
    disk, changed = mend(top, names=("tuesday", "friday"))
    assert changed
    assert told(disk) == [("tuesday", "top.qcow2", "rebuilt"), ("friday", None, "no_checkpoint")]
    assert (disk["state"], disk["code"]) == ("failed", "no_checkpoint")
    assert checkpoints(top) == {"tuesday"}
    assert qemu.bitmaps_of(top) == {("monday", 65536, True, True), ("tuesday", 4096, True, False)}


def test_an_image_that_has_lost_others_can_be_written(tmp_path, base):
    """The bitmap that began above it is not one of those."""
    middle = str(tmp_path / "middle.qcow2")
    recording_overlay(middle, base)
    top = overlay(tmp_path / "top.qcow2", middle)
    qemu.add_bitmaps(top, [Bitmap("new", 65536, True, False)])
    lose(middle)
    assert checkpoints(top) == {"new"}
    mend(top)
    assert checkpoints(top) == {"monday", "tuesday", "new"}


@pytest.mark.parametrize("harm", [crash, lambda path: qemu.qemu_img("bitmap", "--remove", path, "new")])
def test_what_tells_that_a_bitmap_is_lost_stays_while_the_bitmap_does(tmp_path, base, harm):
    """Whatever is wrong with it in the topmost image, a second run would rebuild it without what was lost."""
    middle = overlay(tmp_path / "middle.qcow2", base)
    qemu.add_bitmaps(middle, [Bitmap("new", 65536, True, False)])
    above, top = str(tmp_path / "above.qcow2"), str(tmp_path / "top.qcow2")
    recording_overlay(above, middle)
    recording_overlay(top, above)
    harm(top)
    lose(middle)
    before = digest(middle)
    for names in (("monday",), None, None):
        disk, changed = mend(top, names=names)
        assert (changed, disk["state"], checkpoints(top)) == (False, "failed", set())
    assert digest(middle) == before
    disk, changed = mend(top, names=("monday", "tuesday"), removed=("new",))
    assert (changed, disk["state"], checkpoints(top)) == (True, "removed", {"monday", "tuesday"})


def test_what_tells_that_a_bitmap_is_older_than_its_checkpoint_stays_while_the_bitmap_does(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    qemu.add_bitmaps(top, [Bitmap("new", 65536, True, False)])
    created = (("monday", 0), ("new", 50_000))
    os.utime(top, (10_000, 10_000))
    for _run in range(2):
        disk, changed = mend(top, created=created)
        assert (changed, disk["state"]) == (False, "failed")
        assert [(one["name"], one["problem"]) for one in disk["checkpoints"] if one["problem"] == "older"] == [
            ("new", "older")
        ]
    disk, changed = mend(top, names=("monday", "tuesday"), removed=("new",), created=created)
    assert (changed, disk["state"], checkpoints(top)) == (True, "removed", {"monday", "tuesday"})


def test_a_checkpoint_goes_from_an_image_that_has_an_earlier_bitmap_of_the_name_of_another_one(tmp_path, base):
    """What is valid stays so, and is healed rightly once the image below tells of no age any more."""
    top = str(tmp_path / "top.qcow2")
    recording_overlay(top, base)
    guest_writes(top, random.Random(4))
    os.utime(base, (10_000, 10_000))
    created = (("monday", 50_000), ("tuesday", 60_000))
    disk, changed = mend(top, names=("monday",), state="absent", created=created)
    assert (changed, disk["state"], checkpoints(top)) == (True, "removed", {"tuesday"})
    before = bits_of([top, base], "tuesday")
    crash(top)
    assert not mend(top, created=created)[1]  # the image below goes on to tell that its own is an earlier one
    os.utime(base)
    assert mend(top, created=created)[1]
    assert checkpoints(top) == {"tuesday"}
    assert not before & ~bits_of([top, base], "tuesday")


def test_only_your_word_heals_what_no_image_below_has(tmp_path):
    top = qemu.create(tmp_path / "top.qcow2", SIZE)
    guest_writes(top, random.Random(1))
    qemu.add_bitmaps(top, [MONDAY])
    guest_writes(top, random.Random(2))
    crash(top)
    before = digest(top)
    disk, changed = mend(top)
    assert (changed, told(disk), disk["code"]) == (False, [("monday", "top.qcow2", "may_be_emptied")], "may_be_emptied")
    assert digest(top) == before
    disk, changed = mend(top, assume_not_emptied=True)
    assert (changed, checkpoints(top)) == (True, {"monday"})
    assert bits_of([top], "monday") == union_of_granules(held_bits(top, 65536), 65536)


def test_cumulative_has_the_topmost_image_tell_all(tmp_path, base):
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    for path, below, seed in ((middle, base, 3), (top, middle, 4)):
        recording_overlay(path, below)
        guest_writes(path, random.Random(seed))
    everything = bits_of([base, middle, top], "monday")
    own = bits_of([top], "tuesday")
    disk, changed = mend(top, names=("monday",), cumulative=True)
    assert (changed, told(disk)) == (True, [("monday", "top.qcow2", "rebuilt")])
    (monday,) = [one for one in disk["checkpoints"] if one["name"] == "monday"]
    assert monday["top_alone"] is True
    assert bits_of([top], "monday") == everything
    assert bits_of([top], "tuesday") == own
    assert disk["bitmaps"][0]["dirty_bytes_before"] < disk["bitmaps"][0]["dirty_bytes_after"]
    assert disk["bitmaps"][0]["dirty_bytes_after"] == monday["dirty_bytes"]


def test_removal_goes_through_the_chain_and_leaves_the_others(tmp_path, base):
    recording_overlay(tmp_path / "top.qcow2", base)
    top = str(tmp_path / "top.qcow2")
    guest_writes(top, random.Random(3))
    since_monday = bits_of([base, top], "monday")
    disk, changed = mend(top, names=("tuesday",), state="absent")
    assert (changed, disk["state"]) == (True, "removed")
    assert told(disk) == [
        ("tuesday", "top.qcow2", "removed"),
        ("tuesday", "base.qcow2", "removed"),
        ("monday", "top.qcow2", "rebuilt"),  # it tells all by itself now, while base.qcow2 was written
    ]
    assert qemu.bitmaps_of(base) == qemu.bitmaps_of(top) == {("monday", 65536, True, False)}
    assert bits_of([base, top], "monday") == since_monday
    disk, changed = mend(top, names=("tuesday",), state="absent")
    assert (changed, told(disk)) == (False, [("tuesday", None, "absent")])
    disk, changed = mend(top, state="absent")
    assert qemu.bitmaps_of(base) == qemu.bitmaps_of(top) == set()


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize("created", [(), (("monday", 0), ("tuesday", 0))])
@pytest.mark.parametrize(
    ("wish", "state"),
    [
        ({"names": ("monday",), "state": "absent"}, "removed"),  # writes to both
        ({}, "rebuilt"),  # to the topmost image alone
        ({"names": ("tuesday",), "cumulative": True}, "rebuilt"),
        ({"names": ("tuesday",), "removed": ("monday",)}, "removed"),
    ],
)
def test_what_was_written_to_is_as_old_as_its_data(tmp_path, base, is_older, created, wish, state):
    """By its time a merge tells what is left over, and by libvirt's word a checkpoint that it cannot have."""
    top = crashed(tmp_path, base)
    if is_older:
        os.utime(top, (10_000, 10_000))
    before = [os.stat(path).st_mtime_ns for path in (top, base)]
    disk, _changed = mend(top, created=created, **wish)
    assert disk["state"] == state
    assert [os.stat(path).st_mtime_ns for path in (top, base)] == before
    failures = [one.code for one in commits.merge(top, base).failures]
    assert failures == (["unfinished"] if is_older else [])


def test_nothing_is_written_whose_time_could_not_be_put_back(tmp_path, base, monkeypatch):
    top = crashed(tmp_path, base)
    before = digest(top)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    disk, changed = mend(top)
    assert (changed, disk["code"], digest(top)) == (False, "no_permission", before)


def test_a_template_keeps_its_bitmaps(tmp_path, base):
    recording_overlay(tmp_path / "top.qcow2", base)
    overlay(tmp_path / "clone.qcow2", base)
    top, before = str(tmp_path / "top.qcow2"), digest(base)
    disk, _changed = mend(top, names=("monday",), state="absent")
    assert told(disk) == [("monday", "top.qcow2", "removed"), ("monday", "base.qcow2", "has_overlay")]
    disk, _changed = mend(top, state="absent")
    assert told(disk) == [("tuesday", "top.qcow2", "removed")]
    assert (digest(base), qemu.bitmaps_of(top)) == (before, set())
    assert mend(top, names=("monday",))[0]["state"] == "rebuilt"
    assert told(mend(base, names=("monday",), state="absent")[0]) == [("monday", "base.qcow2", "has_overlay")]
    shutil.move(tmp_path / "clone.qcow2", tmp_path / "clone.qcow2.reverted")
    assert mend(top, state="absent")[0]["state"] == "removed"


def test_a_template_that_is_named_by_a_symlink_keeps_its_bitmaps(tmp_path, base):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "base.qcow2"
    link.symlink_to(base)
    clone = overlay(tmp_path / "links" / "clone.qcow2", link)
    assert told(mend(link, names=("monday",), state="absent")[0]) == [("monday", "base.qcow2", "has_overlay")]
    os.unlink(clone)
    assert told(mend(link, names=("monday",), state="absent")[0]) == [("monday", "base.qcow2", "removed")]


def test_what_a_killed_run_has_left_beside_the_file_of_a_symlink_goes(tmp_path, base):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "base.qcow2").symlink_to(base)
    (tmp_path / ".kvmfleet-0123456789abcdef.tmp").touch()
    assert run(MendBitmaps(), [HealRequest(f"{tmp_path}/links/base.qcow2")], SETTINGS).warnings
    assert sorted(os.listdir(tmp_path)) == ["base.qcow2", "links"]


def test_images_of_all_kinds(tmp_path, base):
    options = [
        ("-o", "cluster_size=4k"),
        ("-o", "cluster_size=2M"),
        ("-o", "extended_l2=on,cluster_size=128k"),
        ("-o", f"data_file={tmp_path}/data,data_file_raw=off"),
        ("-o", "lazy_refcounts=on"),
    ]
    for number, option in enumerate(options):
        top = overlay(tmp_path / f"top{number}.qcow2", base, *option)
        guest_writes(top, random.Random(number), 8)
        before = content(top)
        disk, _changed = mend(top)
        assert disk["state"] == "rebuilt", disk
        for bitmap in (MONDAY, TUESDAY):
            held = held_bits(top, bitmap.granularity)
            assert bits_of([top], bitmap.name) == union_of_granules(held, bitmap.granularity), option
        assert content(top) == before
        assert not corruptions(top)


def in_version_2(top, base):
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-b", base, "-F", "qcow2", top)


def corrupt(top, _base):
    qemu.patch(top, 79, b"\x02")


def with_vault(_top, base):
    shutil.copy(base, f"{os.path.dirname(base)}/.base.qcow2.kvmfleet-vault")


def with_mark(top, _base):
    qemu.add_bitmaps(top, [Bitmap("kvmfleet-carried-0123", 65536, True, False)])


REFUSED = [
    (in_version_2, "unsupported"),
    (corrupt, "corrupt"),
    (with_vault, "unfinished"),
    (with_mark, "unfinished"),
]


@pytest.mark.parametrize(("harm", "code"), REFUSED)
def test_refused(tmp_path, base, harm, code):
    top = overlay(tmp_path / "top.qcow2", base)
    harm(top, base)
    before = {path: digest(path) for path in (top, base)}
    result = run(MendBitmaps(), [HealRequest(top)], SETTINGS).as_result("disks")
    assert (result["changed"], result["disks"][0]["state"], result["disks"][0]["code"]) == (False, "failed", code)
    assert {path: digest(path) for path in (top, base)} == before


def test_what_is_in_use_is_refused(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    with qemu.opened_for_writing(top):
        outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS)
    assert [failure.code for failure in outcome.failures] == ["in_use"]


def test_one_disk_keeps_no_other_from_its_turn(tmp_path, base):
    top, broken = overlay(tmp_path / "top.qcow2", base), overlay(tmp_path / "broken.qcow2", base)
    corrupt(broken, base)
    paths = [broken, top, top.replace("top", "./top"), str(tmp_path / "none.qcow2")]
    outcome = run(MendBitmaps(), [HealRequest(path) for path in (*paths[:2], paths[3])], SETTINGS)
    assert [one["state"] for one in outcome.as_result("disks")["disks"]] == ["failed", "rebuilt", "failed"]
    assert [failure.code for failure in outcome.failures] == ["corrupt", "no_such_file"]
    outcome = run(MendBitmaps(), [HealRequest(path) for path in paths[1:3]], SETTINGS)
    assert [failure.code for failure in outcome.failures] == ["repeated", "repeated"]


def test_too_little_room_is_seen_beforehand(tmp_path, base, monkeypatch):
    top = overlay(tmp_path / "top.qcow2", base)
    guest_writes(top, random.Random(1))
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:3], 1, 1, *real(path)[5:]]))
    outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS)
    assert [failure.code for failure in outcome.failures] == ["no_space"]


def test_bits_that_cannot_be_stored_are_noticed(tmp_path, base, monkeypatch):
    """As when the disk is full: QEMU says nothing."""
    top = overlay(tmp_path / "top.qcow2", base)
    guest_writes(top, random.Random(1))
    real = Monitor.send
    monkeypatch.setattr(
        Monitor, "send", lambda self, name, *args: None if name == "transaction" else real(self, name, *args)
    )
    outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS)
    assert [failure.code for failure in outcome.failures] == ["not_verified"]
    assert "The same call again goes on" in outcome.failures[0].remedy


def refused_alike(path, code, settings=SETTINGS, **options):
    """Have a call fail, and check mode before it, for the same reason; nothing is written."""
    before = digest(path)
    for one in (settings._replace(check_mode=True), settings):
        outcome = run(MendBitmaps(), [HealRequest(str(path), **options)], one)
        assert [failure.code for failure in outcome.failures] == [code], one
        assert digest(path) == before
        assert not any(name.startswith(".") for name in os.listdir(os.path.dirname(path)))


def test_a_name_that_leaves_no_room_for_that_of_a_vault(tmp_path, base):
    top = overlay(tmp_path / f"{'n' * 230}.qcow2", base)
    qemu.add_bitmaps(top, [Bitmap("own", 65536, True, False)])
    refused_alike(top, "name_too_long", names=("monday",))


@pytest.mark.parametrize("inconsistent", [False, True])
def test_a_bitmap_whose_name_is_too_long_for_a_vault(tmp_path, inconsistent):
    top = qemu.create(tmp_path / "top.qcow2", SIZE)
    qemu.add_bitmaps(top, [Bitmap("n" * 1022, 65536, True, False), MONDAY])
    if inconsistent:
        crash(top)
    wish = {"assume_not_emptied": True} if inconsistent else {"names": ("monday",), "state": "absent"}
    refused_alike(top, "bitmap_name", **wish)


@pytest.fixture(name="kept_from_writing")
def fixture_kept_from_writing():
    """Have nobody open an image for writing, root included."""
    paths = []

    def keep(path):
        if os.geteuid():
            os.chmod(path, 0o444)
            return
        done = subprocess.run(["chattr", "+i", str(path)], stderr=subprocess.DEVNULL, check=False)
        if done.returncode:
            pytest.skip("the file system knows no immutable files")
        paths.append(str(path))

    yield keep
    for path in paths:
        subprocess.run(["chattr", "-i", path], check=True)


def test_an_image_that_nobody_can_write_to(tmp_path, base, kept_from_writing):
    top = overlay(tmp_path / "top.qcow2", base)
    kept_from_writing(top)
    refused_alike(top, "no_permission")


def test_a_base_that_nobody_can_write_to(tmp_path, base, kept_from_writing):
    recording_overlay(tmp_path / "top.qcow2", base)
    kept_from_writing(base)
    for settings in (SETTINGS._replace(check_mode=True), SETTINGS):
        assert commits.refusal(tmp_path / "top.qcow2", base, settings=settings).code == "no_permission"
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def test_without_qemu_check_mode_promises_nothing(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    settings = SETTINGS._replace(find_program=lambda _name: None, check_mode=True)
    assert [one.code for one in run(MendBitmaps(), [HealRequest(top)], settings).failures] == ["no_qemu"]
    assert commits.refusal(top, base, settings=settings).code == "no_qemu"


@pytest.mark.usefixtures("squashed")
def test_nothing_is_written_where_no_later_run_would_trust_a_vault(tmp_path, base):
    top = overlay(tmp_path / "top.qcow2", base)
    before = digest(top)
    (failure,) = run(MendBitmaps(), [HealRequest(top)], SETTINGS).failures
    assert (failure.code, "give us what is ours" in failure.remedy) == ("no_permission", True)
    assert digest(top) == before
    assert sorted(os.listdir(tmp_path)) == ["base.qcow2", "top.qcow2"]


def test_a_vault_that_cannot_be_removed_is_told_beforehand(tmp_path, base, monkeypatch):
    recording_overlay(tmp_path / "top.qcow2", base)
    top = str(tmp_path / "top.qcow2")
    qemu.qemu_img("bitmap", "--remove", top, "tuesday")
    with monkeypatch.context() as patch:
        patch.setattr(mend_module, "remove_vault", unittest.mock.Mock(side_effect=OSError))
        run(MendBitmaps(), [HealRequest(top)], SETTINGS)
    monkeypatch.setattr(os, "access", lambda folder, _how: folder != str(tmp_path))
    outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS._replace(check_mode=True))
    assert [one.code for one in outcome.failures] == ["no_permission"]
