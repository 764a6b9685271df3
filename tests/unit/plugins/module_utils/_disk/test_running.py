# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images of VMs that run: on real images that a QEMU has open, with qemu-img for the hypervisor."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import signal
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    GoesOn,
    Interrupted,
    ending_cleanly,
    stop_here_if_asked,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import begun, publish, running
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import find_sign, has_begun_job, leave_sign
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.observe import observe_chain, why_not_open
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.retire import retire
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.running import (
    Known,
    MakeForRunning,
    MergeRunning,
    bitmaps_of,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import DELETE
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark, new_history, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.locks import LIVE_TURN, take_turn

from .. import qemu
from . import commits
from .healing import leave_healing
from .overlays import SETTINGS, states

CHECK = SETTINGS._replace(check_mode=True)
SUNDAY = Bitmap("sunday", 131072, True, False)
OF_WEB = Mark("web", "vda", "mon")


@pytest.fixture(autouse=True)
def fixture_images_are_open(monkeypatch):
    """Take the images for those that the VM has open, which hardly any test has a QEMU for."""
    monkeypatch.setattr(running, "why_not_open", lambda *_layers, **_more: None)


class Hypervisor:
    """Knows what it is told, and merges by qemu-img; `fails` has by path what it raises instead."""

    def __init__(self, known=Known(), fails=(), keeps=()):  # noqa: B008  a tuple
        self._known = known
        self.fails = dict(fails)
        self.keeps = keeps  # paths that the definition has whatever is done
        self.gone = set()
        self.refuses = set()  # paths of images that it does not begin to merge
        self.resumed = {}
        self.relative = None
        self.is_lost = False  # it cannot be asked for anything any more
        self.loses = ()  # paths of images with the merge of which it goes
        self.lost = set()  # paths of images that the VM does not have any more when they are to be merged
        self.signals = ()  # paths of images in whose merge a signal comes
        self.is_full = False  # where it keeps definitions
        self.busy = set()  # paths of images, or of new ones, on whose disk somebody else's job goes on
        self.none_below = None  # why it adds no bitmap to an image below the topmost one

    def known(self, _vm, _paths):
        return self._known

    def has(self, request):
        if self.is_lost:
            raise Refusal("libvirt_unreachable", "uri", "went away")
        return request.path in self.keeps or request.path not in self.gone | self.lost

    def why_none_below(self):
        return self.none_below

    def check_for_snapshot(self, request):
        if request.path in self.busy:
            raise Refusal("block_job", "web", "its disk vda has a block job")

    def check_for_merge(self, request, *, resumes):
        if not resumes:
            self.check_for_snapshot(request)

    def store(self, _request):
        if self.is_full:
            raise Refusal("not_switched", "web", "its new definition could not be stored")

    def merge(self, request, watch, _seconds, begin, *, relative, resumes):
        self.resumed[os.path.basename(request.path)] = resumes
        if request.path in self.lost:
            raise Refusal("changed_meanwhile", "web", "has got other disks meanwhile")
        signs = begin()
        if request.path in self.refuses:
            signs.withdraw()
            raise Refusal("libvirt_failed", "web", "is locked")
        watch(1, 2)
        if request.path in self.signals:
            os.kill(os.getpid(), signal.SIGTERM)
            stop_here_if_asked()
        failure = self.fails.get(request.path)
        if failure is not None and request.path not in self.loses:
            raise failure
        self.relative = relative
        qemu.qemu_img("commit", "-q", "-d", "-b", request.backing_file, request.path)
        if request.above:
            qemu.qemu_img("rebase", "-q", "-u", "-b", request.backing_file, "-F", "qcow2", request.above)
        self.gone.add(request.path)
        self.is_lost = request.path in self.loses
        if failure is not None:
            raise failure


def overlay(path, below, mark=OF_WEB, bitmaps=()):
    """Make an overlay with a mark on an image."""
    qemu.create(path, "1M", "-b", str(below), "-F", "qcow2")
    if mark is not None:
        with OpenImage(str(path), os.open(path, os.O_RDWR)) as file:
            write_mark(file, mark)
    qemu.add_bitmaps(path, bitmaps)
    return str(path)


@pytest.fixture(name="disk")
def fixture_disk(tmp_path):
    disk = qemu.create(tmp_path / "disk.qcow2", "1M")
    qemu.add_bitmaps(disk, [SUNDAY])
    os.chmod(disk, 0o640)
    return disk


@pytest.mark.parametrize("settings", [CHECK, SETTINGS])
def test_an_overlay_that_a_killed_run_has_made_for_a_vm_that_was_shut_off_may_go(tmp_path, disk, settings):
    request = OverlayRequest(str(tmp_path / "disk.mon.qcow2"), disk, vm="web", must_be_fresh=True, mark=OF_WEB)
    assert states(run(MakeOverlays(AttributeOptions()), [request], SETTINGS)) == ["created"]
    hypervisor = Hypervisor()
    hypervisor.gone.add(request.path)
    (problem,) = run(MakeForRunning(AttributeOptions(), hypervisor), [request], settings).failures
    assert "it has the bitmap 'sunday', which a new overlay would not have" in problem.why
    assert problem.remedy.startswith("It holds no data. If no VM has it as its disk")


def snapshot(tmp_path, disk, switch, known=Known(("sunday",)), settings=SETTINGS):  # noqa: B008
    request = OverlayRequest(str(tmp_path / "disk.mon.qcow2"), disk, vm="web", must_be_fresh=True, mark=OF_WEB)
    operation = MakeForRunning(AttributeOptions(), Hypervisor(known))
    return run(operation, [request], settings, {"web": Vm(switch)})


@pytest.mark.parametrize("settings", [CHECK, SETTINGS])
def test_a_job_of_somebody_else_keeps_the_disk_from_a_snapshot_and_nothing_is_made(tmp_path, disk, settings):
    request = OverlayRequest(str(tmp_path / "disk.mon.qcow2"), disk, vm="web", must_be_fresh=True, mark=OF_WEB)
    hypervisor = Hypervisor()
    hypervisor.busy.add(request.path)
    switched = []
    vms = {"web": Vm(lambda: switched.append(1))}
    (problem,) = run(MakeForRunning(AttributeOptions(), hypervisor), [request], settings, vms).failures
    assert (problem.code, switched, os.listdir(tmp_path)) == ("block_job", [], ["disk.qcow2"])
    hypervisor.busy.clear()
    assert states(run(MakeForRunning(AttributeOptions(), hypervisor), [request], SETTINGS, vms)) == ["created"]
    hypervisor.busy.add(request.path)  # nothing is to be done
    present = OverlayRequest(request.path, disk, vm="web")
    assert states(run(MakeForRunning(AttributeOptions(), hypervisor), [present], settings)) == ["present"]


@pytest.mark.parametrize(
    "is_of_the_vm, code, said",
    [(True, "changed_meanwhile", "was given to its VM meanwhile"), (False, "differs", "has it open for writing")],
)
def test_an_overlay_that_another_run_has_given_to_the_vm_since_the_look(tmp_path, disk, is_of_the_vm, code, said):
    path = tmp_path / "disk.mon.qcow2"
    overlay(path, disk)
    request = OverlayRequest(str(path), disk, vm="web", must_be_fresh=True, mark=OF_WEB)
    hypervisor = Hypervisor()
    hypervisor.gone |= set() if is_of_the_vm else {str(path)}
    with qemu.opened_for_writing(path):
        outcome = run(MakeForRunning(AttributeOptions(), hypervisor), [request], SETTINGS, {"web": Vm(lambda: None)})
    (problem,) = outcome.failures
    assert problem.code == code
    assert said in str(problem)


def test_an_overlay_has_not_the_sign_of_an_image_that_had_its_name_and_inode(tmp_path, disk, monkeypatch):
    make = publish._new_file

    def with_a_sign(*args):
        monkeypatch.setattr(publish, "_new_file", make)
        name, file = make(*args)
        pathlib.Path(begun._place_of(file, file.path)).touch()
        return name, file

    monkeypatch.setattr(publish, "_new_file", with_a_sign)
    assert states(snapshot(tmp_path, disk, lambda: None)) == ["created"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.mon.qcow2", "disk.qcow2"]


def test_an_overlay_is_complete_before_the_hypervisor_opens_it(tmp_path, disk):
    seen = []

    def switch():
        image = qemu.read(tmp_path / "disk.mon.qcow2")
        seen.append(
            (image.mark, image.backing_file, image.bitmaps, os.stat(tmp_path / "disk.mon.qcow2").st_mode & 0o777)
        )
        with qemu.opened_for_writing(tmp_path / "other.qcow2"):  # nothing of ours keeps it from opening files
            pass

    qemu.create(tmp_path / "other.qcow2", "1M")
    known = Known(("sunday", "new"))
    with qemu.storage_daemon() as vm:
        have_in_memory(vm, disk, "new")
        foretold = snapshot(tmp_path, disk, switch, known, CHECK)
        assert seen == []
        outcome = snapshot(tmp_path, disk, lambda: (leave(vm), switch()), known)
    assert states(foretold) == states(outcome) == ["created"]
    assert seen == [(OF_WEB, disk, (), 0o640)]
    assert foretold.as_result("x")["x"] == outcome.as_result("x")["x"]
    # Of what is in memory alone the granularity is QEMU's default.
    assert [(b.name, b.granularity) for b in outcome.verdicts[0].bitmaps] == [("sunday", 131072), ("new", 65536)]
    assert foretold.warnings == outcome.warnings
    assert "begins the bitmaps of new overlays empty" in outcome.warnings[0]


def have_in_memory(vm, disk, name):
    """Have a QEMU write to a disk, and have a bitmap in memory alone."""
    qemu._open(vm, disk)
    vm.command("block-dirty-bitmap-add", {"node": "image", "name": name, "persistent": True})


def leave(vm):
    """Have a QEMU store the bitmaps of its disk."""
    vm.command("blockdev-del", {"node-name": "image"})


def test_what_qemu_could_not_store_as_the_vm_left_its_disk_is_told(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(running, "_LET_GO", 0.1)
    known = Known(("sunday", "new"))
    with qemu.storage_daemon() as vm:
        have_in_memory(vm, disk, "new")
        outcome = snapshot(tmp_path, disk, lambda: None, known)
        (problem,) = outcome.failures
        assert (problem.code, problem.subject, states(outcome)) == ("not_stored", disk, ["failed"])
        assert "'sunday', 'new'" in problem.why
        assert f"the VM runs on {tmp_path}/disk.mon.qcow2" in problem.why
        assert "make room" in problem.remedy
        assert qemu.read(tmp_path / "disk.mon.qcow2").mark == OF_WEB  # it stays, since the VM has it
        os.remove(tmp_path / "disk.mon.qcow2")
        assert states(snapshot(tmp_path, disk, lambda: leave(vm), known)) == ["created"]


@pytest.mark.parametrize(
    "bitmap",
    [
        None,
        SUNDAY._replace(name="new", inconsistent=True),
        SUNDAY._replace(name="new", recording=False),
    ],
)
def test_what_the_disk_that_the_vm_has_left_does_not_store_in_order_is_told(tmp_path, disk, bitmap):
    qemu.add_bitmaps(disk, [bitmap] if bitmap else [])
    left = Known(("sunday", "new") if bitmap is None or not bitmap.inconsistent else ("new",))
    (problem,) = snapshot(tmp_path, disk, lambda: None, left).failures
    assert (problem.code, "'sunday'" in problem.why, "'new'" in problem.why) == ("not_stored", False, True)
    assert "told nowhere once" in problem.remedy


@pytest.mark.parametrize("settings", [CHECK, SETTINGS])
def test_what_the_image_below_still_does_not_store_is_told_again(tmp_path, disk, settings):
    path = overlay(tmp_path / "disk.mon.qcow2", disk, mark=None)
    with open_image(disk) as below, OpenImage(path, os.open(path, os.O_RDWR)) as file:
        write_mark(file, OF_WEB, new_history(below))
    made = qemu.read(path).made
    operation = MakeForRunning(AttributeOptions(), Hypervisor(Known(("sunday", "new"))))
    request = OverlayRequest(path, disk, vm="web", created=(("sunday", made - 1000), ("new", made - 1000)))
    outcome = run(operation, [request], settings)
    (problem,) = outcome.failures
    assert (problem.code, problem.subject, outcome.as_result("x")["changed"]) == ("not_stored", disk, False)
    assert ("'sunday'" in problem.why, "'new'" in problem.why) == (False, True)
    for created in (made - 1, made + 1000):  # too close for the clocks, or made on the overlay
        later = request._replace(created=(("sunday", made - 1000), ("new", created)))
        assert states(run(operation, [later], settings)) == ["present"]
    gone = MakeForRunning(AttributeOptions(), Hypervisor(Known(("sunday",))))  # the checkpoint is
    assert states(run(gone, [request], settings)) == ["present"]
    qemu.add_bitmaps(disk, [SUNDAY._replace(name="new")])
    assert states(run(operation, [request], settings)) == ["present"]


def test_a_disk_whose_bitmaps_are_stored_is_done_whatever_another_is(tmp_path, disk):
    other = qemu.create(tmp_path / "other.qcow2", "1M")
    there = overlay(tmp_path / "there.mon.qcow2", qemu.create(tmp_path / "there.qcow2", "1M"))
    paths = [(f"{tmp_path}/disk.mon.qcow2", disk), (f"{tmp_path}/other.mon.qcow2", other)]
    requests = [OverlayRequest(*pair, vm="web", must_be_fresh=True, mark=OF_WEB) for pair in paths]
    requests.append(OverlayRequest(there, f"{tmp_path}/there.qcow2", vm="web"))  # sunday may have begun in it
    operation = MakeForRunning(AttributeOptions(), Hypervisor(Known(("sunday",))))
    outcome = run(operation, requests, SETTINGS, {"web": Vm(lambda: None)})
    assert states(outcome) == ["created", "failed", "present"]
    assert [problem.subject for problem in outcome.failures] == [other]


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_image_stays_if_the_one_below_has_not_got_its_bitmaps(tmp_path, disk, is_stored):
    middle = overlay(tmp_path / "disk.mon.qcow2", disk, bitmaps=[SUNDAY, SUNDAY._replace(name="new")])
    above = overlay(tmp_path / "disk.tue.qcow2", middle, OF_WEB._replace(snapshot="tue"))
    qemu.add_bitmaps(disk, [SUNDAY._replace(name="new")] if is_stored else [])
    request = CommitRequest(middle, disk, vm="web", above=above)
    outcome = merge([request], Hypervisor(Known(("sunday", "new", "began_above"))))
    assert [(one.code, one.subject) for one in outcome.failures] == ([] if is_stored else [("not_stored", disk)])
    assert os.path.exists(middle) is not is_stored


@pytest.mark.parametrize(("names", "codes"), [(("sunday",), []), (("sunday", "new"), ["old_libvirt"])])
@pytest.mark.parametrize("is_between", [True, False])
def test_a_merge_that_would_lose_a_bitmap_is_not_begun(tmp_path, disk, names, codes, is_between):
    """A QEMU before 6.1 stores none in an image below the topmost one that this has not."""
    middle = overlay(tmp_path / "disk.mon.qcow2", disk)
    qemu.add_bitmaps(middle, [Bitmap(name, 65536, True, False) for name in names])
    above = overlay(tmp_path / "disk.tue.qcow2", middle) if is_between else None
    hypervisor = Hypervisor(Known(names))
    hypervisor.none_below = ("QEMU 5.2.0 does not", "Update QEMU.")
    outcome = merge([CommitRequest(middle, disk, vm="web", above=above)], hypervisor)
    assert [(one.code, one.subject) for one in outcome.failures] == (
        [(code, disk) for code in codes] if is_between else []
    )
    assert all("'new'" in one.why and "'sunday'" not in one.why for one in outcome.failures)
    assert os.path.exists(middle) is bool(outcome.failures)


def test_the_hypervisor_can_open_the_new_overlay(tmp_path, disk):
    def switch():
        with qemu.opened_for_writing(tmp_path / "disk.mon.qcow2"):
            pass

    assert states(snapshot(tmp_path, disk, switch)) == ["created"]


def test_nothing_is_left_behind_if_the_hypervisor_refuses(tmp_path, disk):
    def switch():
        raise Refusal("libvirt_failed", "web", "took no snapshot")

    with qemu.opened_for_writing(disk):
        outcome = snapshot(tmp_path, disk, switch)
    assert [failure.code for failure in outcome.failures] == ["libvirt_failed"]
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_what_may_be_in_use_stays_and_is_taken_the_next_time(tmp_path, disk):
    def dies():
        raise UnknownOutcomeError("web", "nobody knows", "Look.")

    switched = []
    with qemu.opened_for_writing(disk):
        assert states(snapshot(tmp_path, disk, dies)) == ["failed"]
        assert sorted(os.listdir(tmp_path)) == ["disk.mon.qcow2", "disk.qcow2"]
    # As the VM leaves its disk.
    assert states(snapshot(tmp_path, disk, lambda: switched.append(1))) == ["present"]
    assert switched == [1]


def test_a_bitmap_that_no_image_stores_has_the_granularity_that_qemu_gives_by_default(tmp_path):
    for cluster_size, granularity in ((512, 4096), (16384, 16384), (2 << 20, 65536)):
        small = qemu.create(tmp_path / "small.qcow2", "1M", "-o", f"cluster_size={cluster_size}")
        with open_image(small) as file:
            layers = observe_chain(file, "qcow2", relative=False).layers
        assert bitmaps_of(["new"], layers) == (Bitmap("new", granularity, True, False),)


def merge(requests, hypervisor, settings=SETTINGS):
    return run(MergeRunning(hypervisor), requests, settings)


@pytest.mark.parametrize("settings", [CHECK, SETTINGS])
def test_a_job_of_somebody_else_keeps_all_disks_of_the_vm_from_a_merge(three, settings):
    hypervisor = Hypervisor()
    hypervisor.busy.add(three[1].path)
    outcome = merge(three[:2], hypervisor, settings)
    assert [problem.code for verdict in outcome.verdicts for problem in verdict.problems] == [
        "group_failed",
        "block_job",
    ]
    assert hypervisor.resumed == {}
    merge(three[:2], Hypervisor(fails={three[0].path: Interrupted("SIGTERM")}))
    hypervisor.busy = {three[0].path}  # by a job of a run that was killed
    assert states(merge(three[:2], hypervisor, settings)) == ["committed"] * 2


def test_a_job_is_not_in_the_way_of_an_image_that_is_only_put_aside(tmp_path, disk):
    request = CommitRequest(overlay(tmp_path / "disk.mon.qcow2", disk), disk, vm="web")
    hypervisor = Hypervisor()
    hypervisor.gone.add(request.path)
    hypervisor.busy.add(request.path)
    assert states(merge([request], hypervisor)) == ["committed"]


def test_a_merged_image_goes_and_check_mode_says_so(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    request = CommitRequest(path, disk, vm="web")
    foretold = merge([request], Hypervisor(Known(("sunday",))), CHECK)
    assert os.path.exists(path)
    outcome = merge([request], Hypervisor(Known(("sunday",))))
    assert foretold.as_result("x")["x"] == outcome.as_result("x")["x"]
    assert states(outcome) == ["committed"]
    assert outcome.verdicts[0].bitmaps == (SUNDAY,)
    assert not os.path.exists(path)
    assert states(merge([request], Hypervisor())) == ["absent"]


class Heals(Hypervisor):
    """Finds bitmaps broken until it has merged an image; `known_then` is what it says then."""

    def __init__(self, known_then):
        super().__init__(Known((), ("sunday",)))
        self._known_then = known_then

    def known(self, _vm, _paths):
        if self.gone and self._known_then is None:
            raise Refusal("libvirt_unreachable", "uri", "went away")
        return self._known_then if self.gone else self._known


HEALED, BROKEN = Known(("sunday",)), Known((), ("sunday",))


@pytest.mark.parametrize(
    "own, lower, then",
    [
        (SUNDAY, None, HEALED),
        (SUNDAY, SUNDAY, HEALED),
        (None, None, BROKEN),
        (SUNDAY._replace(inconsistent=True), None, BROKEN),
        (SUNDAY._replace(recording=False), None, BROKEN),
        (SUNDAY, SUNDAY._replace(recording=False), BROKEN),
    ],
)
@pytest.mark.parametrize("in_top", [None, SUNDAY._replace(inconsistent=True)])
def test_a_bitmap_that_the_image_below_has_in_order_is_healed_and_check_mode_says_so(
    tmp_path, own, lower, then, in_top
):
    bottom = qemu.create(tmp_path / "bottom.qcow2", "1M")
    qemu.add_bitmaps(bottom, [lower] if lower else [])
    base = overlay(tmp_path / "base.qcow2", bottom, None, [own] if own else [])
    path = overlay(tmp_path / "disk.mon.qcow2", base, bitmaps=[in_top] if in_top else [])
    request = CommitRequest(path, base, vm="web")
    foretold = merge([request], Heals(then), CHECK)
    outcome = merge([request], Heals(then))
    assert foretold.as_result("x")["x"] == outcome.as_result("x")["x"]
    (verdict,) = outcome.verdicts
    assert [b.name for b in verdict.bitmaps] == list(then.usable)
    assert [(b.name, b.reason) for b in verdict.skipped] == [(name, "broken") for name in then.unusable]


def test_what_is_foretold_of_a_bitmap_gives_way_to_what_is_so_after_the_merge(tmp_path, disk):
    request = CommitRequest(overlay(tmp_path / "disk.mon.qcow2", disk), disk, vm="web")
    (verdict,) = merge([request], Heals(BROKEN)).verdicts
    assert (verdict.state, verdict.bitmaps, [b.name for b in verdict.skipped]) == ("committed", (), ["sunday"])


def test_of_a_merge_that_is_done_it_is_told_if_its_bitmaps_cannot_be(tmp_path, disk):
    request = CommitRequest(overlay(tmp_path / "disk.mon.qcow2", disk), disk, vm="web")
    outcome = merge([request], Heals(None))
    assert (states(outcome), outcome.verdicts[0].bitmaps, outcome.verdicts[0].skipped) == (["committed"], (), ())
    assert "Which bitmaps a backup can use now cannot be told: uri: went away" in outcome.warnings[0]
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_a_bitmap_below_the_image_above_is_not_foretold_to_be_healed(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk, bitmaps=[SUNDAY._replace(inconsistent=True)])
    above = overlay(tmp_path / "disk.tue.qcow2", path, OF_WEB._replace(snapshot="tue"))
    outcome = merge([CommitRequest(path, disk, vm="web", above=above)], Heals(BROKEN), CHECK)
    assert [b.name for b in outcome.verdicts[0].skipped] == ["sunday"]


def test_what_is_left_over_heals_nothing(tmp_path, disk):
    request = CommitRequest(overlay(tmp_path / "disk.mon.qcow2", disk), disk, vm="web")
    hypervisor = Hypervisor(BROKEN)
    hypervisor.gone.add(request.path)
    (verdict,) = merge([request], hypervisor).verdicts
    assert (verdict.bitmaps, [b.name for b in verdict.skipped]) == ((), ["sunday"])


def test_check_mode_takes_for_gone_what_another_call_is_to_retire(tmp_path, disk):
    path, left = overlay(tmp_path / "disk.tue.qcow2", disk), overlay(tmp_path / "disk.mon.qcow2", disk)
    request = CommitRequest(path, disk, vm="web")
    assert merge([request], Hypervisor(), CHECK).failures[0].code == "has_overlay"
    assert states(run(MergeRunning(Hypervisor(), [left]), [request], CHECK)) == ["committed"]


def test_an_image_without_the_mark_is_kept(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk, mark=None)
    (verdict,) = merge([CommitRequest(path, disk, vm="web")], Hypervisor()).verdicts
    assert verdict.retired[0].kept_as == f"{path}.committed"
    assert os.path.exists(f"{path}.committed")


def test_an_image_that_no_vm_has_any_more_is_kept_and_nothing_merged(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    hypervisor = Hypervisor(fails={path: AssertionError("it is not merged")})
    hypervisor.gone.add(path)
    outcome = merge([CommitRequest(path, disk, vm="web")], hypervisor)
    assert outcome.verdicts[0].retired[0].kept_as == f"{path}.committed"
    assert "its VM does not have it any more" in outcome.warnings[0]


def test_an_image_that_the_definition_still_has_stays(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    outcome = merge([CommitRequest(path, disk, vm="web")], Hypervisor(keeps=[path]))
    assert [failure.code for failure in outcome.failures] == ["not_switched"]
    assert os.path.exists(path)


@pytest.fixture(name="three")
def fixture_three(tmp_path):
    """Have a VM with three disks, and another with one; all on overlays."""
    pairs = []
    for name in "abcd":
        base = qemu.create(tmp_path / f"{name}.qcow2", "1M")
        pairs.append((overlay(tmp_path / f"{name}.mon.qcow2", base), base))
    return [CommitRequest(path, base, vm=vm) for (path, base), vm in zip(pairs, ("web", "web", "web", "db"))]


def test_disks_that_are_done_stay_done_if_another_one_fails(three):
    outcome = merge(three, Hypervisor(fails={three[1].path: Refusal("libvirt_failed", "web", "no")}))
    assert states(outcome) == ["committed", "failed", "failed", "committed"]
    assert [verdict.problems[0].code for verdict in outcome.verdicts[1:3]] == ["libvirt_failed", "group_failed"]
    assert [os.path.exists(request.path) for request in three] == [False, True, True, False]
    assert states(merge(three, Hypervisor())) == ["absent", "committed", "committed", "absent"]


def test_a_signal_ends_the_run_and_what_is_done_stays_done(three):
    hypervisor = Hypervisor()
    hypervisor.signals = {three[1].path}
    with ending_cleanly():
        outcome = merge(three, hypervisor)
    assert states(outcome) == ["committed", "failed", "failed", "failed"]
    codes = [verdict.problems[0].code for verdict in outcome.verdicts[1:]]
    assert codes == ["interrupted", "group_failed", "interrupted"]
    assert [os.path.exists(request.path) for request in three] == [False, True, True, True]


def test_an_image_stays_as_long_as_the_definition_without_it_is_not_stored(three):
    hypervisor = Hypervisor()
    hypervisor.is_full = True
    outcome = merge(three[:1], hypervisor)
    assert [failure.code for failure in outcome.failures] == ["not_switched"]
    assert os.path.exists(three[0].path)
    hypervisor.is_full = False
    outcome = merge(three[:1], hypervisor)
    assert (states(outcome), os.path.exists(three[0].path)) == (["committed"], False)
    assert os.path.exists(f"{three[0].path}.committed")  # it could be that of a VM that was put back


def test_a_vm_that_was_started_meanwhile_is_not_merged_by_several_images_at_once(disk, tmp_path):
    lower = overlay(tmp_path / "lower.qcow2", disk)
    upper = overlay(tmp_path / "upper.qcow2", lower)
    outcome = merge([CommitRequest(upper, str(disk), vm="web")], Hypervisor())
    assert [failure.code for failure in outcome.failures] == ["changed_meanwhile"]
    assert os.path.exists(upper)
    assert os.path.exists(lower)


def test_what_is_merged_down_is_told_although_its_vm_cannot_be_looked_at_any_more(three):
    def lost():
        raise Refusal("libvirt_unreachable", "uri", "went away")

    outcome = run(MergeRunning(Hypervisor()), three, SETTINGS, {"web": Vm(lost), "db": Vm(lost)})
    assert states(outcome) == ["committed"] * 4
    assert outcome.failures == []  # whoever looks tells of it
    assert [os.path.exists(request.path) for request in three] == [False] * 4


def test_a_merge_that_is_complete_when_the_hypervisor_goes_is_told_and_its_image_kept(three):
    hypervisor = Hypervisor()
    hypervisor.loses = {three[0].path}
    first = merge(three[:1], hypervisor).verdicts[0].problems[0]
    assert (first.code, f"{three[0].path} is merged down, and left in place" in str(first)) == (
        "libvirt_unreachable",
        True,
    )
    assert os.path.exists(three[0].path)
    again = Hypervisor()
    again.gone.add(three[0].path)
    assert merge(three[:1], again).verdicts[0].retired[0].kept_as == f"{three[0].path}.committed"


@pytest.mark.parametrize(
    "is_lost, words", [(False, "its VM does not have it any more; it was not retired"), (True, "could not be told")]
)
def test_a_signal_at_the_end_of_a_merge_does_not_have_it_called_given_up(three, is_lost, words):
    hypervisor = Hypervisor(fails={three[0].path: Interrupted("SIGTERM")})
    hypervisor.loses = {three[0].path}
    real = hypervisor.merge

    def complete(request, *more, **options):
        try:
            real(request, *more, **options)
        finally:
            hypervisor.is_lost = is_lost

    hypervisor.merge = complete
    (problem,) = merge(three[:1], hypervisor).verdicts[0].problems
    assert (problem.code, words in problem.why, "given up" in problem.why) == ("interrupted", True, False)


def go_back(request):
    """Return the codes of what is wrong with going back, with the VM shut off."""
    back = RevertRequest(request.path, request.backing_file, vm=request.vm)
    outcome = run(GoBack(), [back], SETTINGS, {"web": Vm(lambda: None)})
    return [failure.code for failure in outcome.failures]


def test_once_a_merge_is_begun_no_disk_of_the_vm_goes_back(three):
    merge(three[:3], Hypervisor(fails={three[1].path: Interrupted("SIGTERM")}))
    assert [go_back(request) for request in three[1:3]] == [["unfinished"]] * 2
    merge(three[:3], Hypervisor())
    folder = os.path.dirname(three[0].path)
    assert [name for name in os.listdir(folder) if "kvmfleet" in name] == []


def test_only_the_image_whose_job_was_begun_may_have_one_of_ours(three):
    merge(three[:3], Hypervisor(fails={three[1].path: Interrupted("SIGTERM")}))
    again = Hypervisor()
    merge(three[:3], again)
    assert again.resumed == {"b.mon.qcow2": True, "c.mon.qcow2": False}


def test_a_merge_that_was_not_begun_after_all_leaves_no_sign(three):
    hypervisor = Hypervisor()
    hypervisor.refuses.add(three[0].path)
    assert states(merge(three[:3], hypervisor)) == ["failed"] * 3
    assert [name for name in os.listdir(os.path.dirname(three[0].path)) if "kvmfleet" in name] == []
    merge(three[:3], Hypervisor(fails={three[0].path: Interrupted("SIGTERM")}))
    assert has_job(three[0].path)
    merge(three[:3], hypervisor)  # the signs of an earlier run stay, but its job is not there any more
    assert not has_job(three[0].path)
    assert [go_back(request) for request in three[:3]] == [["unfinished"]] * 3


def test_what_the_vm_has_lost_since_the_look_is_not_merged_and_stays(three):
    hypervisor = Hypervisor()
    merge_one = hypervisor.merge

    def merge_then_lose(request, *arguments, **more):
        merge_one(request, *arguments, **more)
        hypervisor.lost.add(three[1].path)

    hypervisor.merge = merge_then_lose
    outcome = merge(three[:2], hypervisor)
    assert states(outcome) == ["committed", "failed"]
    assert "has got other disks meanwhile" in str(outcome.failures[0])
    assert os.path.exists(three[1].path)


def test_one_run_at_a_time_works_on_the_images_of_a_vm_that_runs(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    at_once = SETTINGS._replace(seconds=0.1)
    for busy in (path, disk):
        with open_image(busy) as file:
            take_turn(file, 0, byte=LIVE_TURN)
            (problem,) = merge([CommitRequest(path, disk, vm="web")], Hypervisor(), at_once).failures
            assert problem.code == "other_run"
            assert states(merge([CommitRequest(path, disk, vm="web")], Hypervisor(), CHECK)) == ["committed"]
    os.remove(path)
    with open_image(disk) as file:
        take_turn(file, 0, byte=LIVE_TURN)
        (problem,) = snapshot(tmp_path, disk, lambda: None, settings=at_once).failures
        assert problem.code == "other_run"


@pytest.mark.parametrize("number", [0, 1])
def test_an_image_that_another_run_has_retired_meanwhile_gets_no_sign(three, number):
    hypervisor = Hypervisor()
    folder = os.path.dirname(three[0].path)

    def merge_meanwhile(request, _watch, _seconds, begin, **_more):
        with open_image(three[number].path) as file:
            retire(file.path, file, DELETE, "committed")
        hypervisor.gone.add(three[number].path)
        begin()
        raise AssertionError(f"{request.path} has no sign")

    hypervisor.merge = merge_meanwhile
    (problem,) = merge(three[:2], hypervisor).failures
    assert problem.code == "changed_meanwhile"
    assert "was merged down or moved meanwhile" in str(problem)
    left = [name for name in os.listdir(folder) if name.endswith("kvmfleet-merging")]
    assert [name.split(".kvmfleet")[0] for name in left] == ([] if number == 0 else [sign_name(three[0].path)])


def test_an_image_that_goes_while_its_job_is_said_to_have_ended_gets_no_sign(tmp_path, disk, monkeypatch):
    path, write = overlay(tmp_path / "disk.mon.qcow2", disk), begun._write_sign

    def retire_then_write(*arguments):
        with open_image(path) as other:
            retire(path, other, DELETE, "committed")
        write(*arguments)

    with open_image(path) as file:
        leave_sign(file)
        monkeypatch.setattr(begun, "_write_sign", retire_then_write)
        begun.end_job(file)
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def sign_name(path):
    return f".{os.path.basename(path)}.{os.stat(path).st_ino}"


def has_job(path):
    with open_image(path) as file:
        return has_begun_job(file)


def test_a_pipe_in_the_place_of_a_sign_is_not_waited_for(tmp_path, disk):
    with open_image(overlay(tmp_path / "disk.mon.qcow2", disk)) as file:
        leave_sign(file)
        place = find_sign(file)
        os.unlink(place)
        os.mkfifo(place)
        assert not has_begun_job(file)


def test_a_sign_of_another_user_tells_of_no_job(tmp_path, disk, monkeypatch):
    with open_image(overlay(tmp_path / "disk.mon.qcow2", disk)) as file:
        leave_sign(file)
        assert has_begun_job(file)
        if os.geteuid() == 0:
            os.chown(find_sign(file), 4242, 4242)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4242)
        assert not has_begun_job(file)
        os.rename(find_sign(file), tmp_path / "aside")
        os.symlink(tmp_path / "aside", os.path.join(tmp_path, f".disk.mon.qcow2.{file.identity[1]}.kvmfleet-merging"))
        assert find_sign(file) is not None
        assert not has_begun_job(file)


@pytest.mark.usefixtures("squashed")
def test_no_merge_is_begun_where_no_later_run_would_trust_its_sign(tmp_path, three):
    names, hypervisor = sorted(os.listdir(tmp_path)), Hypervisor()
    (failure, *_rest) = merge(three, hypervisor).failures
    assert (failure.code, "no_root_squash" in failure.remedy) == ("no_permission", True)
    assert (hypervisor.gone, sorted(os.listdir(tmp_path))) == (set(), names)


def test_a_job_that_another_user_may_have_begun_is_told(three, monkeypatch):
    hypervisor = Hypervisor()
    with open_image(three[0].path) as file:
        leave_sign(file)
        if os.geteuid() == 0:
            os.chown(find_sign(file), 4242, 4242)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 4242)

    def busy(*_args, **_more):
        raise Refusal("block_job", "web", "its disk vda has a block job that this run has not begun")

    hypervisor.merge = busy
    (failure,) = merge(three[:1], hypervisor).failures
    assert failure.remedy.endswith("if that was yours, run this as it.")


def test_a_merge_that_nobody_can_end_is_told_to_go_on(three):
    outcome = merge(three[:1], Hypervisor(fails={three[0].path: GoesOn("SIGTERM")}))
    assert "the run was ended by SIGTERM, and its merge goes on" in outcome.verdicts[0].problems[0].why


class Stops(Hypervisor):
    """Has QEMU merge an image, and the one above stand on BASE; then it fails, and has the image further on."""

    def __init__(self, failure):
        super().__init__(fails={})
        self._failure = failure

    def merge(self, request, *arguments, **options):
        super().merge(request, *arguments, **options)
        self.gone.clear()
        raise self._failure


@pytest.mark.parametrize(
    "failure, code",
    [
        (Refusal("libvirt_failed", "web", "ended before it was complete"), "not_switched"),
        (Interrupted("SIGTERM"), "interrupted"),
    ],
)
def test_a_merge_in_the_middle_whose_end_fails_has_a_way_out(tmp_path, disk, monkeypatch, failure, code):
    path = overlay(tmp_path / "disk's mon.qcow2", disk, bitmaps=[SUNDAY])
    commits.write(path, "write -P 17 0 64k")
    above = overlay(tmp_path / "disk.tue.qcow2", path, mark=None, bitmaps=[SUNDAY])
    qemu.qemu_img("convert", "-O", "raw", above, str(tmp_path / "seen"))
    request = CommitRequest(path, disk, vm="web", above=above)
    (problem,) = merge([request], Stops(failure)).failures
    assert (problem.code, problem.subject) == (code, path)
    assert "was merged down while its VM ran, and the end of that failed" in problem.why
    assert ("ended before it was complete" in str(problem)) == (code == "not_switched")
    other = Refusal("other_disks", path, "is not what its running VM has open by this name")
    monkeypatch.setattr(running, "why_not_open", lambda *_layers, **_more: other)
    for settings in (CHECK, SETTINGS):  # QEMU does not have it open any more, and that is no copy
        (again,) = merge([request], Hypervisor(), settings).failures
        assert (again.code, again.remedy) == ("not_switched", problem.remedy.split(" At its end")[0])
    command = re.search("by '(qemu-img .*)', and run this again", problem.remedy)[1]
    subprocess.run(shlex.split(command), check=True)
    monkeypatch.setattr(running, "why_not_open", lambda *_layers, **_more: None)
    assert states(merge([request], Hypervisor())) == ["committed"]
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "disk.tue.qcow2", "seen"]
    qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", above, str(tmp_path / "seen"))


@pytest.mark.parametrize("failure", [Refusal("libvirt_failed", "web", "is full"), Interrupted("SIGTERM")])
def test_a_merge_in_the_middle_that_fails_before_its_end_is_only_told(tmp_path, disk, failure):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    above = overlay(tmp_path / "disk.tue.qcow2", path, mark=None)
    (problem,) = merge([CommitRequest(path, disk, vm="web", above=above)], Hypervisor(fails={path: failure})).failures
    assert (problem.code, "rebase" in str(problem)) == (getattr(failure, "code", "interrupted"), False)


def test_an_image_whose_merge_is_complete_is_not_gone_back_from(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    request = CommitRequest(path, disk, vm="web")
    with open_image(path) as file:
        leave_sign(file)  # and the run was killed before the image was removed
    assert go_back(request) == ["unfinished"]
    hypervisor = Hypervisor()
    hypervisor.gone.add(path)
    merge([request], hypervisor)
    assert sorted(os.listdir(tmp_path)) == ["disk.mon.qcow2.committed", "disk.qcow2"]


def test_the_sign_of_an_image_that_had_the_name_before_keeps_nobody_from_going_back(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    with open_image(path) as file:
        leave_sign(file)
        os.rename(path, tmp_path / "other")
        overlay(tmp_path / "disk.mon.qcow2", disk, mark=None)  # by another tool: it has no mark of ours
        os.remove(tmp_path / "other")
        assert go_back(CommitRequest(path, disk, vm="web")) == []
    assert "disk.mon.qcow2.reverted" in os.listdir(tmp_path)


def test_an_image_that_was_copied_with_its_sign_is_not_gone_back_from(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    with open_image(path) as file:
        leave_sign(file)
        shutil.copy2(path, tmp_path / "copy")
        os.rename(tmp_path / "copy", path)
    assert go_back(CommitRequest(path, disk, vm="web")) == ["unfinished"]
    with open_image(path) as file:
        retire(path, file, DELETE, "committed")
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_a_new_overlay_has_no_sign_of_one_that_had_its_name(tmp_path, disk):
    with open_image(overlay(tmp_path / "disk.mon.qcow2", disk)) as file:
        leave_sign(file)
        os.remove(file.path)
        assert states(snapshot(tmp_path, disk, lambda: None)) == ["created"]
    assert sorted(os.listdir(tmp_path)) == ["disk.mon.qcow2", "disk.qcow2"]


def test_the_name_of_an_image_may_be_as_long_as_a_name_can_be(tmp_path, disk):
    path = overlay(tmp_path / ("x" * 255), disk)
    request = CommitRequest(path, disk, vm="web")
    merge([request], Hypervisor(fails={path: Interrupted("SIGTERM")}))
    assert "unfinished" in go_back(request)
    assert states(merge([request], Hypervisor())) == ["committed"]
    assert os.listdir(tmp_path) == ["disk.qcow2"]


def test_a_merge_that_is_not_begun_leaves_no_sign(tmp_path, disk):
    path = overlay(tmp_path / "disk.mon.qcow2", disk)

    class Busy(Hypervisor):
        def merge(self, *_arguments, **_options):
            raise Refusal("block_job", "web", "is busy")

    merge([CommitRequest(path, disk, vm="web")], Busy())
    assert sorted(os.listdir(tmp_path)) == ["disk.mon.qcow2", "disk.qcow2"]


def refused(request, known=Known()):  # noqa: B008
    outcome = merge([request], Hypervisor(known, fails={request.path: AssertionError("it is not begun")}))
    return [failure.code for failure in outcome.failures]


def test_a_bitmap_of_the_image_above_must_not_come_to_look_valid(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    middle = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY._replace(inconsistent=True)])
    above = overlay(tmp_path / "tue.qcow2", middle, OF_WEB._replace(snapshot="tue"), [SUNDAY])
    request = CommitRequest(middle, base, vm="web", above=above)
    assert refused(request, Known((), ("sunday",))) == ["closes_gap"]
    with qemu.opened_for_writing(above):  # QEMU has its bitmaps in memory, and marked in the file as in use
        assert refused(request, Known((), ("sunday",))) == ["closes_gap"]


def test_a_bitmap_of_an_image_further_up_must_not_come_to_look_valid(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    middle = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY._replace(inconsistent=True)])
    above = overlay(tmp_path / "tue.qcow2", middle, OF_WEB._replace(snapshot="tue"))
    further = overlay(tmp_path / "wed.qcow2", above, OF_WEB._replace(snapshot="wed"), [SUNDAY])
    request = CommitRequest(middle, base, vm="web", above=above, is_of_vm=True, further=(further,))
    assert refused(request, Known((), ("sunday",))) == ["closes_gap"]
    with qemu.opened_for_writing(further):
        assert refused(request, Known((), ("sunday",))) == ["closes_gap"]


def test_an_image_below_that_can_hold_no_bitmaps(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "1M", "-o", "compat=0.10")
    path = overlay(tmp_path / "mon.qcow2", base)
    assert refused(CommitRequest(path, base, vm="web"), Known(("sunday",))) == ["lost_bitmaps"]
    assert states(merge([CommitRequest(path, base, vm="web")], Hypervisor())) == ["committed"]


def test_an_image_below_that_has_lost_its_bitmaps(tmp_path):
    """Libvirt goes on with those above, which may have begun there."""
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    qemu.add_bitmaps(base, [SUNDAY])
    path = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY])
    qemu.patch(base, 88, struct.pack(">Q", 0))  # autoclear bit 0
    assert refused(CommitRequest(path, base, vm="web"), Known(("sunday",))) == ["lost_bitmaps"]
    assert states(merge([CommitRequest(path, base, vm="web")], Hypervisor(Known(("new",))), CHECK)) == ["committed"]
    os.utime(base, (10_000, 10_000))
    older = CommitRequest(path, base, vm="web", created=(("sunday", 50_000),))
    assert states(merge([older], Hypervisor(Known(("sunday",))), CHECK)) == ["committed"]
    assert states(merge([CommitRequest(path, base, vm="web")], Hypervisor())) == ["committed"]


def test_an_older_image_below_does_not_get_younger_by_a_merge(tmp_path):
    """After it libvirt would go on with the bitmap of BASE, which is an earlier one of that name."""
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    qemu.add_bitmaps(base, [SUNDAY])
    path = overlay(tmp_path / "mon.qcow2", base)
    os.utime(base, (10_000, 10_000))
    request = CommitRequest(path, base, vm="web", created=(("sunday", 50_000),))
    for known in (Known((), ("sunday",)), Known()):
        assert refused(request, known) == ["closes_gap"]
        assert states(merge([request], Hypervisor(known), CHECK)) == ["failed"]
    assert states(merge([request], Hypervisor(Known(("sunday",))), CHECK)) == ["committed"]
    os.utime(base)
    os.utime(path, (10_000, 10_000))  # which QEMU has open, and writes to in the end
    assert states(merge([request], Hypervisor(Known((), ("sunday",))), CHECK)) == ["committed"]


def test_an_image_between_does_not_get_younger_by_a_merge(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    middle = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY])
    above = overlay(tmp_path / "tue.qcow2", middle, OF_WEB._replace(snapshot="tue"))
    further = overlay(tmp_path / "wed.qcow2", above, OF_WEB._replace(snapshot="wed"))
    request = CommitRequest(middle, base, vm="web", above=above, is_of_vm=True, further=(further,))
    request = request._replace(created=(("sunday", 50_000),))
    for path, code in ((middle, ["closes_gap"]), (above, ["closes_gap"]), (further, [])):
        os.utime(path, (10_000, 10_000))
        outcome = merge([request], Hypervisor(Known((), ("sunday",))), CHECK)
        assert [(failure.code, failure.subject) for failure in outcome.failures] == [(one, path) for one in code]
        os.utime(path)


def test_what_is_put_aside_may_have_lost_its_bitmaps(tmp_path):
    """The VM does not have it any more, so none of its bitmaps go on with what was lost."""
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    path = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY])
    qemu.patch(path, 88, struct.pack(">Q", 0))
    hypervisor = Hypervisor(Known(("sunday",)))
    hypervisor.lost = {path}
    assert states(merge([CommitRequest(path, base, vm="web")], hypervisor, CHECK)) == ["committed"]


def test_an_image_further_down_that_has_lost_its_bitmaps(tmp_path):
    """What is in memory, or in the image above, can have begun in the image that goes in."""
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    middle = overlay(tmp_path / "mon.qcow2", base, bitmaps=[SUNDAY])
    above = overlay(tmp_path / "tue.qcow2", middle, OF_WEB._replace(snapshot="tue"), [SUNDAY])
    qemu.patch(middle, 88, struct.pack(">Q", 0))
    request = CommitRequest(middle, base, vm="web", above=above)
    assert refused(request, Known(("sunday",))) == ["lost_bitmaps"]
    assert states(merge([request], Hypervisor(Known(("monday",))), CHECK)) == ["committed"]


def test_a_merge_that_was_begun_while_the_vm_was_shut_off(tmp_path, disk):
    path = overlay(tmp_path / "mon.qcow2", disk)
    (tmp_path / ".disk.qcow2.kvmfleet-vault").touch()
    assert refused(CommitRequest(path, disk, vm="web")) == ["unfinished"]


@pytest.mark.parametrize("place", range(4))
def test_a_healing_of_any_image_of_the_chain_that_is_unfinished(tmp_path, monkeypatch, place):
    images = [str(tmp_path / name) for name in ("top", "upper", "lower", "base")]
    qemu.create(images[3], "1M")
    qemu.add_bitmaps(images[3], [SUNDAY])
    for upper, below in ((2, 3), (1, 2), (0, 1)):
        overlay(images[upper], images[below], bitmaps=[SUNDAY])
    leave_healing(images[0], images[place], monkeypatch)
    assert refused(CommitRequest(images[1], images[2], vm="web", above=images[0])) == ["unfinished"]


def test_an_image_that_another_one_stands_on(tmp_path, disk):
    path = overlay(tmp_path / "mon.qcow2", disk)
    overlay(tmp_path / "clone.qcow2", disk, None)
    assert refused(CommitRequest(path, disk, vm="web")) == ["has_overlay"]
    os.rename(tmp_path / "clone.qcow2", tmp_path / "old.qcow2.committed")  # what is kept has gone in already
    assert states(merge([CommitRequest(path, disk, vm="web")], Hypervisor())) == ["committed"]


def test_an_image_that_another_one_stands_on_beside_a_symlink_to_it(tmp_path, disk):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "disk").symlink_to(disk)
    path = overlay(tmp_path / "mon.qcow2", disk)
    clone = overlay(tmp_path / "links" / "clone.qcow2", f"{tmp_path}/links/disk", None)
    request = CommitRequest(path, f"{tmp_path}/links/disk", vm="web")
    assert refused(request) == ["has_overlay"]
    os.unlink(clone)
    assert states(merge([request], Hypervisor())) == ["committed"]


def test_what_is_left_over_is_put_aside_though_the_vm_stands_on_the_image_below(tmp_path, disk):
    left = overlay(tmp_path / "mon.qcow2", disk)
    overlay(tmp_path / "tue.qcow2", disk, OF_WEB._replace(snapshot="tue"))  # what the VM has now
    hypervisor = Hypervisor()
    hypervisor.gone.add(left)
    request = CommitRequest(left, disk, vm="web")
    foretold, outcome = merge([request], hypervisor, CHECK), merge([request], hypervisor)
    assert foretold.as_result("x")["x"] == outcome.as_result("x")["x"]
    assert states(outcome) == ["committed"]
    assert sorted(os.listdir(tmp_path)) == ["disk.qcow2", "mon.qcow2.committed", "tue.qcow2"]


def test_what_is_left_over_stays_if_another_image_stands_on_it(tmp_path, disk):
    left = overlay(tmp_path / "mon.qcow2", disk)
    overlay(tmp_path / "clone.qcow2", left, None)
    hypervisor = Hypervisor()
    hypervisor.gone.add(left)
    outcome = merge([CommitRequest(left, disk, vm="web")], hypervisor)
    assert [failure.code for failure in outcome.failures] == ["has_overlay"]


def test_an_overlay_that_is_smaller_than_the_image_below(tmp_path):
    base = qemu.create(tmp_path / "base.qcow2", "2M")
    path = overlay(tmp_path / "mon.qcow2", base)
    assert refused(CommitRequest(path, base, vm="web")) == ["unsupported"]


def test_relative_names_stay_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["base.qcow2", "mon.qcow2", "tue.qcow2"]
    qemu.create("base.qcow2", "1M")
    for below, name in zip(names, names[1:]):
        overlay(name, below, OF_WEB._replace(snapshot=name.split(".")[0]))
    hypervisor = Hypervisor()
    base, middle, above = (str(tmp_path / name) for name in names)
    assert states(merge([CommitRequest(middle, base, vm="web", above=above)], hypervisor)) == ["committed"]
    assert hypervisor.relative is True


def replace(path):
    """Put a copy in the place of an image, as a restore does."""
    shutil.copy(path, f"{path}.copy")
    os.rename(f"{path}.copy", path)


@pytest.mark.parametrize("settings", [SETTINGS, CHECK])
@pytest.mark.parametrize("replaced", [None, "disk.qcow2", "disk.sun.qcow2"])
def test_the_images_of_a_snapshot_are_those_that_the_vm_has_open(tmp_path, disk, monkeypatch, replaced, settings):
    monkeypatch.setattr(running, "why_not_open", why_not_open)
    top = overlay(tmp_path / "disk.sun.qcow2", disk, mark=None)
    with qemu.opened_for_writing(top):
        if replaced:
            replace(tmp_path / replaced)
        outcome = snapshot(tmp_path, top, lambda: None, Known(), settings)
    assert [(problem.code, problem.subject) for problem in outcome.failures] == (
        [("other_disks", str(tmp_path / replaced))] if replaced else []
    )
    assert os.path.exists(tmp_path / "disk.mon.qcow2") == (not replaced and settings is SETTINGS)


@pytest.mark.parametrize("settings", [SETTINGS, CHECK])
@pytest.mark.parametrize("is_on_top", [False, True])
@pytest.mark.parametrize("replaced", [None, "base.qcow2", "disk.qcow2", "disk.mon.qcow2"])
def test_the_images_of_a_merge_are_those_that_the_vm_has_open(tmp_path, monkeypatch, replaced, is_on_top, settings):
    monkeypatch.setattr(running, "why_not_open", why_not_open)
    base = qemu.create(tmp_path / "base.qcow2", "1M")
    disk = overlay(tmp_path / "disk.qcow2", base, mark=None)
    path = overlay(tmp_path / "disk.mon.qcow2", disk)
    above = None if is_on_top else overlay(tmp_path / "disk.tue.qcow2", path)
    hypervisor = Hypervisor(fails={path: AssertionError("begun")})
    with qemu.opened_for_writing(above or path):
        if replaced:
            replace(tmp_path / replaced)
        request = CommitRequest(path, disk, vm="web", above=above)
        if replaced is None and settings is SETTINGS:
            with pytest.raises(AssertionError, match="begun"):
                merge([request], hypervisor, settings)
            return
        outcome = merge([request], hypervisor, settings)
    assert [(problem.code, problem.subject) for problem in outcome.failures] == (
        [("other_disks", str(tmp_path / replaced))] if replaced else []
    )


def test_an_image_that_is_only_read_by_the_vm_is_not_taken_for_the_one_that_it_writes_to(tmp_path, disk):
    with qemu.opened_for_writing(overlay(tmp_path / "disk.mon.qcow2", disk)), open_image(disk) as file:
        layers = observe_chain(file, "qcow2", relative=False).layers
        assert why_not_open(layers, is_written=False) is None
        assert why_not_open(layers, is_written=True).code == "other_disks"
