# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Healing that is killed: nothing looks valid that is not, and the same call completes it."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import diagnose
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import mend as mend_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Engine, Held, Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.unfinished import is_healing_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import open_vault, read_vault
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image
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
    lose,
    mend,
    overlay,
    recording_overlay,
)
from .overlays import SETTINGS

WEDNESDAY = Bitmap("wednesday", 65536, True, False)  # begins in the image in the middle
NAMES = ("monday", "tuesday", "wednesday")


@pytest.fixture(name="broken", scope="module")
def fixture_broken(tmp_path_factory):
    """A chain of three whose middle has lost one bitmap, and has another one that no image below has."""
    folder = tmp_path_factory.mktemp("broken")
    base = qemu.create(folder / "base.qcow2", SIZE)
    guest_writes(base, random.Random(1))
    qemu.add_bitmaps(base, [MONDAY, TUESDAY])
    then = dict.fromkeys(("monday", "tuesday"), content(base))
    guest_writes(base, random.Random(2))
    recording_overlay(folder / "middle.qcow2", base)
    guest_writes(folder / "middle.qcow2", random.Random(3))
    qemu.add_bitmaps(folder / "middle.qcow2", [WEDNESDAY])
    then["wednesday"] = content(folder / "middle.qcow2")
    guest_writes(folder / "middle.qcow2", random.Random(4))
    recording_overlay(folder / "top.qcow2", folder / "middle.qcow2")
    guest_writes(folder / "top.qcow2", random.Random(5))
    qemu.qemu_img("bitmap", "--remove", str(folder / "middle.qcow2"), "tuesday")
    return folder, then


class Case:
    """A copy of the chain, and what its checkpoints were made of."""

    def __init__(self, folder, broken):
        self.folder, self.then = folder, broken[1]
        for name in ("base", "middle", "top"):
            shutil.copy(broken[0] / f"{name}.qcow2", folder / f"{name}.qcow2")
            qemu.qemu_img("rebase", "-u", *self._below(name), str(folder / f"{name}.qcow2"))
        self.top = str(folder / "top.qcow2")

    def _below(self, name):
        below = {"top": "middle", "middle": "base"}.get(name)
        return ("-b", str(self.folder / f"{below}.qcow2"), "-F", "qcow2") if below else ("-b", "")

    def short(self):
        """Return the checkpoints that look valid and lack what really changed."""
        now = content(self.top)
        return {
            name
            for name in checkpoints(self.top)
            if changed_bits(self.then[name], now) & ~bits_of(self.folder.glob("*.qcow2"), name)
        }


@pytest.fixture(name="case")
def fixture_case(tmp_path, broken):
    return Case(tmp_path, broken)


STEPS = [(Monitor, "send"), (os, "fsync"), (os, "rename"), (os, "unlink")]


def killed(case, step, pause=0.0, **options):
    """Run in a child that kills itself before, or some time after, this step; return whether it came so far."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with contextlib.suppress(BaseException):
        counter = itertools.count()
        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name), counter, step, pause))
        run(MendBitmaps(), [HealRequest(case.top, **options)], SETTINGS)
    os._exit(0)


def counted(real, counter, step, pause):
    """Return the call, which kills this process if it is its turn."""

    def calling(*args, **kwargs):
        is_it = next(counter) == step
        if is_it and pause:
            with contextlib.suppress(OSError):
                real(*args, **kwargs)
            time.sleep(pause)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return calling


def vm_runs(case):
    guest_writes(case.top, random.Random(6))


def vm_crashes(case):
    guest_writes(case.top, random.Random(6))
    crash(case.top)


def nothing(_case):
    pass


@pytest.mark.parametrize(
    ("options", "pause", "meanwhile"),
    [
        ({}, 0.0, vm_crashes),
        ({"state": "absent", "names": ("tuesday",)}, 0.0004, vm_runs),
    ],
)
def test_a_kill_at_any_step_is_completed_by_the_same_call(tmp_path, broken, options, pause, meanwhile):
    for step in range(0, 200, 200 // qemu.examples(100)):  # each second one, and each eleventh on the oldest Python
        folder = tmp_path / str(step)
        folder.mkdir()
        case = Case(folder, broken)
        if not killed(case, step, pause, **options):
            break
        assert not case.short(), step
        meanwhile(case)
        assert not case.short(), step
        disk, _changed = mend(case.top, **options)
        assert disk["state"] != "failed", (step, disk)
        if options:
            mend(case.top, names=("monday", "wednesday"))  # which a VM that died has broken
        assert checkpoints(case.top) == {name for name in NAMES if not options or name != "tuesday"}, (step, disk)
        assert not case.short(), step
        assert sorted(os.listdir(folder)) == ["base.qcow2", "middle.qcow2", "top.qcow2"], step
        assert not any(map(corruptions, folder.glob("*.qcow2")))
        shutil.rmtree(folder)
    assert step > 12


@pytest.mark.parametrize("meanwhile", [nothing, vm_runs, vm_crashes])
def test_if_qemu_dies_while_it_opens_the_middle_the_top_alone_is_right_and_the_vault_puts_back_all(case, meanwhile):
    kill_after_top_was_written(case)
    drop_all_bitmaps(case.folder / "middle.qcow2")
    assert checkpoints(case.top) == {"wednesday"}  # which no image below has, so nobody can see that it is lost
    assert not case.short()
    meanwhile(case)
    assert not case.short()
    disk, _changed = mend(case.top)
    assert checkpoints(case.top) == set(NAMES), disk
    assert not case.short()


def kill_after_top_was_written(case):
    """Kill a run once the topmost image has all that is below, and the vaults of both images are there."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            mend_module.bring = dying_at_the_second(mend_module.bring)
            run(MendBitmaps(), [HealRequest(case.top)], SETTINGS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(name for name in os.listdir(case.folder) if name.startswith(".")) == [
        ".middle.qcow2.kvmfleet-healing",
        ".top.qcow2.kvmfleet-healing",
    ]


def lost_as_the_last_one_goes(tmp_path, tells_names=True):
    """Kill a run as its QEMU opens the base, to remove the only bitmap there; return the overlay and the base."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.add_bitmaps(base, [MONDAY])
    recording_overlay(tmp_path / "top.qcow2", base)
    top = str(tmp_path / "top.qcow2")
    qemu.add_bitmaps(top, [WEDNESDAY])
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            mend_module.bring = dying_at_the_second(mend_module.bring)
            run(MendBitmaps(), [HealRequest(top, names=("monday",), state="absent")], SETTINGS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if not tells_names:
        offset, length = qemu.directory_of(base)
        qemu.patch(base, offset, bytes(length))
    lose(base)
    assert checkpoints(top) == ({"wednesday"} if tells_names else set())
    return top, base


@pytest.mark.parametrize("wish", [{"names": ("monday",), "state": "absent"}, {}, {"names": (), "state": "absent"}])
def test_what_was_begun_above_an_image_that_has_nothing_to_keep_is_valid_again(tmp_path, wish):
    top, base = lost_as_the_last_one_goes(tmp_path)
    disk, changed = mend(top, **wish)
    assert (changed, disk["state"], checkpoints(top)) == (True, wish.get("state", "valid"), {"wednesday"})
    assert not corruptions(base)
    with open_image(base) as file:
        assert read_image(file).lost_bitmaps == 0


def test_what_a_vault_has_and_nobody_wants_any_more_is_not_lost_for_ever(tmp_path):
    """The vault of a removal has what was to stay; then that is to go, too."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    killed_at_removal(base, loses=lose)
    top = overlay(tmp_path / "top.qcow2", base)
    qemu.add_bitmaps(top, [WEDNESDAY])
    mend(top, names=("monday", "tuesday"), state="absent")
    assert checkpoints(top) == {"wednesday"}


def test_what_another_program_has_lost_after_all_was_written_is_not_told_by_the_vault(tmp_path):
    """Whoever takes a vault that is left over for that of a kill would make valid what began in the base."""
    top, _base = lost_as_the_last_one_goes(tmp_path, tells_names=False)
    vault = tmp_path / ".base.qcow2.kvmfleet-healing"
    os.rename(vault, f"{vault}-given")
    mend(top)
    assert not checkpoints(top)


def test_what_was_lost_long_after_the_vault_was_kept_is_not_told_by_it(tmp_path):
    """The run was killed before it opened the base; a VM has run on that since, and a newer bitmap can have begun."""
    top, base = lost_as_the_last_one_goes(tmp_path, tells_names=False)
    os.utime(base, (time.time(), time.time() + 7200))
    mend(top)
    assert not checkpoints(top)


@pytest.mark.parametrize("options", [{}, {"domain": "web"}])
@pytest.mark.parametrize("is_older", [False, True])
def test_what_is_left_over_looks_not_new_after_a_kill(case, is_older, options):
    """The killed run has written to it. Of a domain's it is not left over, and its VM can have run since."""
    base = case.folder / "base.qcow2"
    os.utime(base)
    then = os.stat(base).st_mtime_ns + (-1 if is_older else 1)
    os.utime(case.top, ns=(then, then))
    for _kill in range(2):  # the second run has to write once more, and keeps a new vault
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                mend_module._put_time_back = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)
                run(MendBitmaps(), [HealRequest(case.top)], SETTINGS)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        crash(case.top)
    since = os.stat(case.top).st_mtime_ns
    assert since > os.stat(base).st_mtime_ns
    mend(case.top, **options)
    assert os.stat(case.top).st_mtime_ns == (then if is_older and not options else since)


def test_an_overlay_made_anew_gets_no_bitmaps_of_the_one_before_it(case, monkeypatch):
    """It can have the same inode, but not the same generation; what the old one held is gone."""
    kill_after_top_was_written(case)
    os.unlink(case.top)
    qemu.create(case.top, SIZE, "-b", str(case.folder / "middle.qcow2"), "-F", "qcow2")
    with open_vault(f"{case.folder}/.top.qcow2.kvmfleet-healing") as file:
        vault = read_vault(file)
    status = os.stat(case.top)
    numbers = (status.st_dev, status.st_ino)
    with monkeypatch.context() as patch:
        kept = vault._replace(top=numbers, generations={numbers: 1})
        patch.setattr(diagnose, "read_vault", lambda file: kept if "top" in file.path else read_vault(file))
        patch.setattr(OpenImage, "generation", 2)
        outcome = run(MendBitmaps(), [HealRequest(case.top)], SETTINGS)
    assert [failure.code for failure in outcome.failures] == ["unfinished"]
    assert not qemu.bitmaps_of(case.top)


def test_a_vault_that_somebody_has_opened_for_writing_is_none(case):
    kill_after_top_was_written(case)
    crash(case.folder / ".middle.qcow2.kvmfleet-healing")
    outcome = run(MendBitmaps(), [HealRequest(case.top)], SETTINGS)
    assert [(one.code, "kvmfleet-healing" in str(one)) for one in outcome.failures] == [("unfinished", True)]


def test_what_somebody_has_removed_since_the_kill_is_not_put_back(case):
    kill_after_top_was_written(case)
    for name in ("top", "middle"):
        qemu.qemu_img("bitmap", "--remove", str(case.folder / f"{name}.qcow2"), "wednesday")
    mend(case.top)
    assert checkpoints(case.top) == {"monday", "tuesday"}
    assert "wednesday" not in {bitmap[0] for bitmap in qemu.bitmaps_of(case.folder / "middle.qcow2")}


def test_what_is_removed_after_all_was_written_is_not_put_back(case):
    """A run that is killed while libvirt is told leaves vaults behind; anybody can remove bitmaps then."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            vms = {case.top: Vm(lambda: os.kill(os.getpid(), signal.SIGKILL))}
            run(MendBitmaps(), [HealRequest(case.top, names=("tuesday",), state="absent")], SETTINGS, vms)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ".top.qcow2.kvmfleet-healing-given" in os.listdir(case.folder)
    for image, name in itertools.product(("top", "middle", "base"), ("monday", "wednesday")):
        if name in {one[0] for one in qemu.bitmaps_of(case.folder / f"{image}.qcow2")}:
            qemu.qemu_img("bitmap", "--remove", str(case.folder / f"{image}.qcow2"), name)
    _disk, changed = mend(case.top)
    assert changed  # the vaults are gone
    assert not any(qemu.bitmaps_of(case.folder / f"{image}.qcow2") for image in ("top", "middle", "base"))


@pytest.mark.parametrize(
    ("wish", "is_back"), [({"names": ("monday",)}, True), ({"created": (("monday", 0),)}, True), ({}, False)]
)
def test_a_bitmap_that_is_counted_on_is_lost_though_a_newer_one_is_in_order(tmp_path, wish, is_back):
    """QEMU was killed as it opened the image, and then a backup has made a checkpoint."""
    path = lost_to_a_kill(tmp_path)
    then = content(path)
    guest_writes(path, random.Random(9))
    qemu.add_bitmaps(path, [WEDNESDAY])
    outcome = run(MendBitmaps(), [HealRequest(path, **wish)], SETTINGS._replace(check_mode=True))
    assert [f"{path}: a run that was killed has kept its bitmap 'monday'" in one for one in outcome.warnings] == (
        [] if is_back else [True]  # nothing is lost without a word
    )
    mend(path, **wish)
    assert checkpoints(path) == ({"monday", "wednesday"} if is_back else {"wednesday"})
    assert not is_back or not changed_bits(then, content(path)) & ~bits_of([path], "monday")


@pytest.mark.parametrize(
    "wish", [{"state": "absent"}, {"names": (), "removed": ("monday",), "created": (("monday", 0),)}]
)
def test_a_bitmap_that_is_counted_on_can_be_removed(tmp_path, wish):
    path = lost_to_a_kill(tmp_path)
    qemu.add_bitmaps(path, [WEDNESDAY])
    request = HealRequest(path, **{"names": ("monday",), **wish})
    assert not run(MendBitmaps(), [request], SETTINGS._replace(check_mode=True)).warnings
    mend(path, **{"names": ("monday",), **wish})
    assert checkpoints(path) == {"wednesday"}


def drop_all_bitmaps(path):
    """Leave an image as a QEMU does that is killed while it opens it, and another one that opens it then."""
    lose(path)
    with qemu.storage_daemon() as monitor:
        qemu._open(monitor, path)
        monitor.command("blockdev-del", {"node-name": "image"})
    assert not qemu.bitmaps_of(path)


def lost_to_a_kill(tmp_path):
    """Return an image whose vault alone has the bitmap of Monday."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    guest_writes(base, random.Random(7))
    path = overlay(tmp_path / "top.qcow2", base)
    guest_writes(path, random.Random(8))
    return killed_at_removal(path)


def killed_at_removal(path, loses=drop_all_bitmaps, **options):
    qemu.add_bitmaps(path, [MONDAY, TUESDAY])
    killed_before_it_writes(HealRequest(path, names=("tuesday",), state="absent", **options))
    loses(path)
    return path


def killed_before_it_writes(request):
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            mend_module.bring = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)
            run(MendBitmaps(), [request], SETTINGS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


# As a domain asks whose checkpoint monday was removed after the kill, and wednesday was not.
SINCE = {"names": ("wednesday",), "created": (("wednesday", 0),), "referred": frozenset(["wednesday"])}
THEN = {"created": (("monday", 0), ("wednesday", 0))}


def lost_of_a_domain(tmp_path, *of_base, holds=True, **then):
    """Return an overlay whose vault alone has the bitmap of Monday. Libvirt knew it, unless `then` says otherwise."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.add_bitmaps(base, [WEDNESDAY, *of_base])
    path = overlay(tmp_path / "top.qcow2", base)
    if holds:
        guest_writes(path, random.Random(8))
    return killed_at_removal(path, **{**THEN, **then})


def standing_of(path, **options):
    """Return what is known of the topmost image."""
    with Held(SETTINGS, Engine(SETTINGS), locking=False) as held:
        return diagnose.look_at_chain(HealRequest(path, **options), held)[0].standing


@pytest.mark.parametrize("holds", [True, False])
def test_a_checkpoint_that_was_removed_since_the_kill_does_not_come_back_and_keeps_no_other_from_healing(
    tmp_path, holds
):
    """Nobody counts on its bitmap, so nothing depends on whether the image was emptied."""
    path = lost_of_a_domain(tmp_path, holds=holds)
    for removed in ((), ("monday",)):
        request = HealRequest(path, domain="uuid", removed=removed, **SINCE)
        outcome = run(MendBitmaps(), [request], SETTINGS._replace(check_mode=True))
        assert not outcome.failures
        assert ["'monday'" in one for one in outcome.warnings] == ([] if removed else [True])  # unless it was asked for
    mend(path, domain="uuid", **SINCE)
    assert checkpoints(path) == {"wednesday"}
    assert [one[0] for one in qemu.bitmaps_of(path)] == ["wednesday"]


@pytest.mark.parametrize(
    ("then", "since"),
    [
        ({"created": (("wednesday", 0),)}, {}),  # of another tool, or another domain
        ({}, {"created": (), "referred": frozenset()}),  # the domain was defined anew, or all is gone
        ({}, {"referred": frozenset(["monday", "wednesday"])}),  # of another disk, whose target this one had
        ({}, {"names": ("monday",)}),
    ],
)
def test_what_nobody_has_removed_as_far_as_libvirt_tells_is_put_back(tmp_path, then, since):
    path = lost_of_a_domain(tmp_path, **then)
    standing = standing_of(path, **{**SINCE, **since})
    assert (standing.put_back, standing.forgotten) == ({"monday"}, frozenset())


@pytest.mark.parametrize(
    ("then", "removed", "is_told"),
    [({"created": ()}, (), True), ({"created": ()}, ("monday",), False), ({}, (), False)],
)
def test_what_another_tool_had_is_not_lost_without_a_word_where_a_newer_one_is_in_order(
    tmp_path, then, removed, is_told
):
    """Of the checkpoint that it knew libvirt tells that it was removed."""
    path = lost_of_a_domain(tmp_path, **then)
    qemu.add_bitmaps(path, [WEDNESDAY])
    request = HealRequest(path, domain="uuid", removed=removed, **SINCE)
    outcome = run(MendBitmaps(), [request], SETTINGS._replace(check_mode=True))
    assert not outcome.failures
    assert ["'monday'" in one for one in outcome.warnings] == ([True] if is_told else [])


@pytest.mark.parametrize("change", [crash, lose, lambda _path: None])
def test_what_another_image_has_or_has_lost_is_not_removed(tmp_path, change):
    path = lost_of_a_domain(tmp_path, MONDAY)
    change(tmp_path / "base.qcow2")
    assert standing_of(path, **SINCE).put_back == {"monday"}


def test_what_libvirt_knew_when_the_first_of_two_runs_was_killed_counts(tmp_path):
    path = lost_of_a_domain(tmp_path)
    killed_before_it_writes(HealRequest(path))
    standing = standing_of(path, **SINCE)
    assert (standing.put_back, standing.forgotten) == (frozenset(), {"monday"})


def test_the_vault_of_an_image_that_others_stand_on_stays_though_libvirt_has_forgotten_all_of_it(tmp_path):
    path = lost_of_a_domain(tmp_path)
    overlay(tmp_path / "clone.qcow2", path)
    (failure,) = run(MendBitmaps(), [HealRequest(path, **{**SINCE, "names": ()})], SETTINGS).failures
    assert failure.code == "has_overlay"
    assert ".top.qcow2.kvmfleet-healing" in os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["relative", "absolute"])
def test_the_vault_of_an_image_that_was_merged_meanwhile_is_told(tmp_path, name):
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    other = qemu.create(tmp_path / "other.qcow2", SIZE)
    below = "base.qcow2" if name == "relative" else base
    path = killed_at_removal(overlay(tmp_path / "top.qcow2", below))
    assert warnings_of(base) == []
    os.rename(path, tmp_path / "elsewhere.qcow2")
    vault = f"{tmp_path}/.top.qcow2.kvmfleet-healing"
    assert [one.startswith(f"{vault}: ") and "remove the vault" in one for one in warnings_of(base)] == [True]
    assert warnings_of(other) == []
    os.rename(vault, f"{tmp_path}/.copy.qcow2.kvmfleet-healing")  # as beside a copy that has another name
    os.rename(tmp_path / "elsewhere.qcow2", path)
    assert warnings_of(base) == []


def warnings_of(path):
    return list(run(MendBitmaps(), [HealRequest(path)], SETTINGS._replace(check_mode=True)).warnings)


def merged_by_hand(path):
    """Merge an image down without retiring it, which takes away what it held."""
    qemu.qemu_img("commit", "-q", path)


def flattened(path):
    qemu.qemu_img("rebase", "-b", "", path)


@pytest.mark.parametrize("emptied", [merged_by_hand, flattened])
def test_what_an_image_that_was_emptied_cannot_tell_is_not_put_back(tmp_path, emptied):
    path = lost_to_a_kill(tmp_path)
    guest_writes(path, random.Random(9))
    emptied(path)
    for settings in (SETTINGS._replace(check_mode=True), SETTINGS):
        (failure,) = run(MendBitmaps(), [HealRequest(path)], settings).failures
        assert (failure.code, ".top.qcow2.kvmfleet-healing" in failure.why) == ("may_be_emptied", True)
    assert ".top.qcow2.kvmfleet-healing" in os.listdir(tmp_path)
    mend(path, assume_not_emptied=True)  # the user's word
    assert checkpoints(path) == {"monday"}


def test_an_image_that_may_have_held_something_since_is_not_trusted_either(tmp_path):
    path = overlay(tmp_path / "top.qcow2", qemu.create(tmp_path / "base.qcow2", SIZE))
    killed_at_removal(path)
    (failure,) = run(MendBitmaps(), [HealRequest(path)], SETTINGS).failures
    assert failure.code == "may_be_emptied"
    mend(path, names=("monday", "tuesday"), state="absent")
    assert not qemu.bitmaps_of(path)


def test_a_vm_that_died_in_an_image_that_was_emptied_has_no_valid_bitmaps(tmp_path):
    """The vault knows more than the image, which has their names still, and not what a merge has taken away."""
    path = overlay(tmp_path / "top.qcow2", qemu.create(tmp_path / "base.qcow2", SIZE))
    guest_writes(path, random.Random(8))
    killed_at_removal(path, loses=crash)
    merged_by_hand(path)
    (failure,) = run(MendBitmaps(), [HealRequest(path, names=("monday",))], SETTINGS).failures
    assert failure.code == "may_be_emptied"
    assert not checkpoints(path)


def test_what_a_vm_wrote_before_an_image_was_emptied_and_filled_again_is_in_its_bitmap(tmp_path):
    """It holds all again that it held when the vault was made. What was stored last tells of the rest."""
    path = overlay(tmp_path / "top.qcow2", qemu.create(tmp_path / "base.qcow2", SIZE))
    guest_writes(path, random.Random(8))
    then = content(path)
    killed_at_removal(path, loses=lambda path: guest_writes(path, random.Random(9)))
    merged_by_hand(path)
    guest_writes(path, random.Random(8))
    crash(path)
    mend(path)
    assert "monday" in checkpoints(path)
    assert not changed_bits(then, content(path)) & ~bits_of([path], "monday")


def test_what_cannot_be_put_back_names_the_way_out(case):
    """An overlay that somebody has made meanwhile keeps the image below from being written."""
    kill_after_top_was_written(case)
    drop_all_bitmaps(case.folder / "middle.qcow2")
    overlay(case.folder / "clone.qcow2", case.folder / "middle.qcow2")
    (failure,) = run(MendBitmaps(), [HealRequest(case.top)], SETTINGS).failures
    assert failure.code == "has_overlay"
    assert f"remove its vault {case.folder}/.middle.qcow2.kvmfleet-healing," in failure.remedy


def test_a_file_has_another_generation_than_the_one_whose_inode_it_got(tmp_path):
    path, seen = tmp_path / "image", {}
    for _number in range(50):  # not every file system gives an inode anew, or tells
        path.write_bytes(b"")
        with open_image(str(path)) as file, open_image(str(path)) as again:
            assert file.generation == again.generation
            if file.generation is not None and file.identity in seen:
                assert file.generation not in seen[file.identity]
            seen.setdefault(file.identity, set()).add(file.generation)
        path.unlink()


def test_a_bitmap_that_only_the_users_word_makes_valid_is_in_the_vault(tmp_path):
    """A QEMU that dies as it opens the image takes its name away, and no image has it then."""
    path = qemu.create(tmp_path / "top.qcow2", SIZE)
    qemu.add_bitmaps(path, [MONDAY])
    then = content(path)
    guest_writes(path, random.Random(8))
    crash(path)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            mend_module.bring = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)
            run(MendBitmaps(), [HealRequest(path, assume_not_emptied=True)], SETTINGS)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    drop_all_bitmaps(path)
    mend(path, assume_not_emptied=True)
    assert checkpoints(path) == {"monday"}
    assert not changed_bits(then, content(path)) & ~bits_of([path], "monday")


def dying_below(top, real):
    """Return the call, which kills this process at any image but the topmost one."""

    def calling(place, *args):
        if place.file.path != top:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(place, *args)

    return calling


def dying_at_the_second(real):
    """Return the call, which kills this process the second time."""
    counter = itertools.count()

    def calling(*args):
        if next(counter):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    return calling


def test_what_a_vault_does_not_have_is_lost(tmp_path, monkeypatch):
    """A bitmap that was made after the kill, and was lost with the others, does not come to look valid again."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.add_bitmaps(base, [MONDAY])
    middle = overlay(tmp_path / "middle.qcow2", base)
    qemu.add_bitmaps(middle, [TUESDAY])
    guest_writes(middle, random.Random(1))
    with monkeypatch.context() as stopped:
        stopped.setattr(MendBitmaps, "write", lambda *_arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(MendBitmaps(), [HealRequest(middle)], SETTINGS)
    assert [name for name in os.listdir(tmp_path) if "healing" in name]
    qemu.add_bitmaps(middle, [WEDNESDAY])
    top = overlay(tmp_path / "top.qcow2", middle)
    qemu.add_bitmaps(top, [WEDNESDAY])
    assert checkpoints(top) == {"wednesday"}
    lose(middle)
    for check_mode in (True, False):
        outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS._replace(check_mode=check_mode))
        assert [one.code for one in outcome.failures] == ["closes_gap"]
        assert "perhaps 'wednesday', too" in str(outcome.failures[0])
        assert checkpoints(top) == set()
    mend(top, state="absent", names=("wednesday",))  # as it advises
    mend(top)
    assert checkpoints(top) == {"monday", "tuesday"}


class Volume:
    """An overlay on a volume, and what a kill has left as QEMU opened that to remove one of its two bitmaps."""

    def __init__(self, folder, stack):
        self.folder, self.top, self.path = folder, str(folder / "top.qcow2"), str(folder / "volume")
        self._image = qemu.create(folder / "image", SIZE)
        qemu.add_bitmaps(self._image, [MONDAY, TUESDAY])
        os.truncate(self._image, 2 * SIZE)
        self._stack = stack
        self.attach()
        recording_overlay(self.top, self.path)
        self.kill()
        lose(self.path)
        (self.vault,) = self.vaults()
        self.old_vault = folder / f".{os.path.basename(os.path.realpath(self.path))}.kvmfleet-healing"

    def kill(self):
        """Kill a run once the vault of the volume is there, and the overlay is as it is to be."""
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                mend_module.bring = dying_below(self.top, mend_module.bring)
                run(MendBitmaps(), [HealRequest(self.top, names=("tuesday",), state="absent")], SETTINGS)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    def vaults(self):
        """Return those that may be of the volume."""
        return [path for path in self.folder.glob(".*.kvmfleet-healing") if path.name != ".top.qcow2.kvmfleet-healing"]

    def attach(self):
        """Give the volume its name and a number."""
        self._device = contextlib.ExitStack()
        os.symlink(self._device.enter_context(commits.loop_device(self._image)), self.path)
        self._stack.push(self._device)

    def start_host_anew(self):
        """Have the volume get another number, and another one that of its own."""
        self._device.close()
        os.unlink(self.path)
        qemu.create(self.folder / "other", SIZE)
        self._stack.enter_context(commits.loop_device(self.folder / "other"))
        self.attach()


@pytest.fixture(name="volume")
def fixture_volume(tmp_path):
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("no loop devices")
    with contextlib.ExitStack() as stack:
        yield Volume(tmp_path, stack)


@pytest.mark.parametrize("kind", ["same", "started anew", "named by an older release"])
def test_a_volume_is_known_by_its_name_whatever_number_it_has(volume, kind):
    if kind == "started anew":
        volume.start_host_anew()
    if kind == "named by an older release":
        os.rename(volume.vault, volume.old_vault)
        volume.kill()
        assert volume.vaults() == [volume.old_vault]  # two would contradict each other once one is given
    assert "is unfinished (vault " in examine_chain(volume.top, follow=True, count=False).as_result()["unfinished"]
    mend(volume.top, names=("tuesday",), state="absent")
    assert qemu.bitmaps_of(os.path.realpath(volume.path)) == {("monday", 65536, True, False)}
    assert checkpoints(volume.top) == {"monday"}


@pytest.mark.parametrize("changed", ["the volume", "the overlay"])
def test_a_volume_gets_nothing_from_the_vault_of_another_one(volume, changed):
    """One can get the number of another one, or its name."""
    if changed == "the volume":
        os.rename(volume.vault, volume.old_vault)
        os.rename(volume.path, f"{volume.path}2")
        volume.path += "2"
    (volume.folder / "aside").mkdir()
    os.rename(volume.top, volume.folder / "aside" / "top.qcow2")
    top = overlay(volume.folder / "new.qcow2", volume.path)
    assert examine_chain(top, follow=True, count=False).as_result()["unfinished"] is None
    outcome = run(MendBitmaps(), [HealRequest(top, names=("monday",))], SETTINGS)
    assert [one.code for one in outcome.failures] == ["no_checkpoint" if changed == "the volume" else "unfinished"]
    assert not qemu.bitmaps_of(os.path.realpath(volume.path))
    assert len(volume.vaults()) == 1


def test_a_vault_of_one_of_two_volumes_of_a_chain_is_not_that_of_the_other(volume):
    """Their numbers can be exchanged."""
    layers = [one.layer for one in examine_chain(volume.top, follow=True, count=False).layers]
    with open_vault(str(volume.vault)) as file:
        vault = read_vault(file)
    assert is_healing_of(vault, layers[1], layers[:1])
    assert not is_healing_of(vault._replace(top_path=f"{volume.path}2"), layers[1], layers[:1])
