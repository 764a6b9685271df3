# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Going back to an image below: what goes, what is refused, and what a kill leaves."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import build, common_data, merge, revert
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import retire as retiring
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation, OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2 import mark as marks
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import Layer
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.header import extension_bytes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import EXT_MARK, Mark, write_mark

from .. import qemu
from .overlays import SETTINGS, digest, make_overlays, states

CHECK = SETTINGS._replace(check_mode=True, find_program=lambda _name: None)
KEPT = ["base.qcow2", "s1.reverted", "s2.reverted"]


@pytest.fixture(name="base")
def fixture_base(tmp_path):
    """Have base ← s1 ← s2, with data in each, and bitmaps that go on; "later" is in s2 alone."""
    base = qemu.create(tmp_path / "base.qcow2", "64M")
    qemu.add_bitmaps(base, [Bitmap("monday", 65536, True, False)])
    subprocess.run(["qemu-io", "-c", "write -P 1 0 1M", base], check=True, stdout=subprocess.DEVNULL)
    below = base
    for number in (1, 2):
        path = str(tmp_path / f"s{number}")
        assert states(make_overlays([OverlayRequest(path, below)], SETTINGS)) == ["created"]
        subprocess.run(["qemu-io", "-c", f"write -P {number + 1} 0 1M", path], check=True, stdout=subprocess.DEVNULL)
        below = path
    qemu.add_bitmaps(below, [Bitmap("later", 65536, True, False)])
    return base


@pytest.fixture(name="request_for")
def fixture_request_for(tmp_path, base):
    return lambda name, **more: RevertRequest(str(tmp_path / name), base, **more)


def go_back(requests, settings=SETTINGS, vms=None):
    return run(GoBack(), requests, settings._replace(find_program=lambda _name: None), vms)


def names(folder):
    return sorted(os.listdir(folder))


def fail(error):
    raise error


def world(folder):
    """Return name, inode and content of all files."""
    return {
        name: (os.lstat(folder / name).st_ino, digest(folder / name) if os.path.isfile(folder / name) else None)
        for name in names(folder)
    }


def test_both_images_go_and_the_second_run_changes_nothing(tmp_path, base, request_for):
    before = world(tmp_path)
    predicted = go_back([request_for("s2")], CHECK)
    assert world(tmp_path) == before
    outcome = go_back([request_for("s2")])
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    assert outcome.warnings == predicted.warnings
    (result,) = outcome.as_result("overlays")["overlays"]
    retired = [{"path": f"{tmp_path}/{name}", "kept_as": f"{tmp_path}/{name}.reverted"} for name in ("s2", "s1")]
    assert result == {
        "path": f"{tmp_path}/s2",
        "backing_file": base,
        "backing_format": "qcow2",
        "virtual_size": 64 << 20,
        "state": "reverted",
        "kept_as": f"{tmp_path}/s2.reverted",
        "retired": retired,
    }
    after = world(tmp_path)
    assert after == {name if name == "base.qcow2" else f"{name}.reverted": one for name, one in before.items()}
    for settings in (CHECK, SETTINGS):
        again = go_back([request_for("s2")], settings)
        (result,) = again.as_result("overlays")["overlays"]
        assert (result["state"], result["kept_as"], result["retired"]) == ("absent", None, [])
        assert not again.as_result("overlays")["changed"]
        assert (result["virtual_size"], again.warnings) == (64 << 20, ())
    assert world(tmp_path) == after
    # Renamed back they are what they were.
    for name in ("s1", "s2"):
        os.rename(tmp_path / f"{name}.reverted", tmp_path / name)
    command = ["qemu-io", "-r", "-c", "read -P 3 0 1M", str(tmp_path / "s2")]
    assert b"failed" not in subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("retire", ["keep", "delete"])
@pytest.mark.parametrize("name", ["s1", "s2"])
def test_internal_snapshots_in_an_image_that_goes(tmp_path, request_for, name, retire):
    qemu.qemu_img("snapshot", "-c", "s", str(tmp_path / name))
    before = world(tmp_path)
    for settings in (CHECK, SETTINGS):
        (failure,) = go_back([request_for("s2", retire=retire)], settings).failures
        assert (failure.code, failure.subject) == ("unsupported", str(tmp_path / name))
        assert "has 1 internal snapshots, which would go with it" in failure.why
    assert world(tmp_path) == before
    qemu.qemu_img("snapshot", "-d", "s", str(tmp_path / name))
    assert not go_back([request_for("s2", retire=retire)]).failures


def test_internal_snapshots_of_the_image_that_the_disk_goes_back_to_stay(base, request_for):
    qemu.qemu_img("snapshot", "-c", "s", base)
    assert not go_back([request_for("s2")]).failures


def test_delete(tmp_path, request_for):
    predicted = go_back([request_for("s2", retire="delete")], CHECK)
    outcome = go_back([request_for("s2", retire="delete")])
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    assert names(tmp_path) == ["base.qcow2"]
    (result,) = outcome.as_result("overlays")["overlays"]
    assert [one["kept_as"] for one in result["retired"]] == [None, None]
    before = {"backing_file": f"{tmp_path}/base.qcow2", "images": [f"{tmp_path}/s2", f"{tmp_path}/s1"]}
    diff = outcome.as_result("overlays")["diff"]
    assert diff == {"before": {f"{tmp_path}/s2": before}, "after": {f"{tmp_path}/s2": None}}


@pytest.mark.parametrize("how", ["keep", "delete"])
def test_three_images_are_told_from_the_topmost_down(tmp_path, base, request_for, how):
    qemu.create(tmp_path / "s3", "64M", "-b", f"{tmp_path}/s2", "-F", "qcow2")
    predicted = go_back([request_for("s3", retire=how)], CHECK)
    outcome = go_back([request_for("s3", retire=how)])
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    (result,) = outcome.as_result("overlays")["overlays"]
    kept = {name: f"{tmp_path}/{name}.reverted" if how == "keep" else None for name in ("s3", "s2", "s1")}
    assert result["retired"] == [{"path": f"{tmp_path}/{name}", "kept_as": path} for name, path in kept.items()]
    assert len(names(tmp_path)) == (4 if how == "keep" else 1)


def test_one_image_of_two(tmp_path, base, request_for):
    assert states(go_back([request_for("s2")._replace(backing_file=f"{tmp_path}/s1")])) == ["reverted"]
    assert names(tmp_path) == ["base.qcow2", "s1", "s2.reverted"]


def test_the_checkpoints_that_are_lost_are_named(tmp_path, base, request_for):
    qemu.add_bitmaps(tmp_path / "s2", [Bitmap("off", 65536, False, False)])  # no backup can be made since that one
    (warning,) = go_back([request_for("s2")], CHECK).warnings
    assert "the checkpoint 'later' goes with it" in warning
    assert f"since a checkpoint that {base} has" in warning
    qemu.qemu_img("bitmap", "--remove", f"{tmp_path}/s2", "later")
    assert go_back([request_for("s2")]).warnings == ()


def test_a_raw_image_below(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    qemu.create(tmp_path / "over", "1M", "-b", f"{tmp_path}/raw", "-F", "raw")
    wanted = RevertRequest(f"{tmp_path}/over", f"{tmp_path}/raw", "raw", retire="delete")
    outcome = go_back([wanted])
    assert (states(outcome), outcome.verdicts[0].virtual_size) == (["reverted"], 1 << 20)
    assert states(go_back([wanted])) == ["absent"]
    assert names(tmp_path) == ["raw"]


def test_a_template_below_other_vms_stays_shared(tmp_path, base, request_for):
    other = qemu.create(tmp_path / "clone", "64M", "-b", base, "-F", "qcow2")
    with qemu.opened_for_writing(other):
        assert states(go_back([request_for("s2")])) == ["reverted"]


# Refused


def refused(folder, *requests):
    """Return why requests are refused, by check mode and by a run, which change nothing."""
    before = world(folder)
    predicted = go_back(requests, CHECK)
    outcome = go_back(requests)
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    assert world(folder) == before
    assert set(states(outcome)) == {"failed"}
    assert outcome.warnings == predicted.warnings == ()
    return outcome.failures


def code(folder, *requests):
    return {failure.code for failure in refused(folder, *requests)}


@pytest.mark.parametrize("name", ["s2", "s1"])
def test_an_image_that_a_vm_has_open(tmp_path, request_for, name):
    with qemu.opened_for_writing(tmp_path / "s2"):
        (failure, *_more) = refused(tmp_path, request_for(name))
    assert failure.code == ("in_use" if name == "s2" else "below_running_vm")


def test_an_image_below_a_running_vm_elsewhere(tmp_path, request_for):
    (tmp_path / "elsewhere").mkdir()
    other = qemu.create(tmp_path / "elsewhere" / "clone", "64M", "-b", f"{tmp_path}/s1", "-F", "qcow2")
    with qemu.opened_for_writing(other):
        assert code(tmp_path, request_for("s2")) == {"below_running_vm"}


def test_a_vm_that_runs_on_the_image_below(tmp_path, base, request_for):
    with qemu.opened_for_writing(base):
        assert code(tmp_path, request_for("s2")) == {"in_use"}


def test_another_image_on_top_of_one_that_goes(tmp_path, base, request_for):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "s3").symlink_to(qemu.create(tmp_path / "s3", "64M", "-b", f"{tmp_path}/s1", "-F", "qcow2"))
    (failure,) = refused(tmp_path, request_for("s2"))
    assert failure.code == "has_overlay"
    assert failure.subject == f"{tmp_path}/s1"
    assert f"is the backing file of {tmp_path}/s3" in failure.why
    assert "If a VM has that one as a disk, put it back first, or merge it down. If no VM has it" in failure.remedy
    assert "a backup that libvirt has made ('virsh backup-begin'): move it away" in failure.remedy
    assert code(tmp_path, request_for("s1")) == {"has_overlay"}  # of s2, too
    os.unlink(tmp_path / "s3")
    os.unlink(tmp_path / "other" / "s3")
    assert states(go_back([request_for("s2")])) == ["reverted"]


def test_another_image_on_top_of_the_one_that_a_vm_is_to_write_to(tmp_path, base, request_for):
    clone = qemu.create(tmp_path / "clone", "64M", "-b", base, "-F", "qcow2")
    qemu.create(tmp_path / "old.reverted", "64M", "-b", base, "-F", "qcow2")  # is only kept
    (failure,) = refused(tmp_path, request_for("s2", vm="web", puts_on_base=True))
    assert (failure.code, failure.subject) == ("has_overlay", base)
    assert f"is the backing file of {clone}, too" in failure.why
    assert "a backup that libvirt has made ('virsh backup-begin'): move it away" in failure.remedy
    # A clone of a template goes, and nobody is put on that.
    outcome = go_back([request_for("s2", vm="web")])
    assert (states(outcome), [one for one in outcome.warnings if clone in one]) == (["reverted"], [])


def test_what_stands_on_images_beside_a_symlink_to_them(tmp_path, base, request_for):
    (tmp_path / "links").mkdir()
    for name in ("base.qcow2", "s2"):
        (tmp_path / "links" / name).symlink_to(f"../{name}")
    link = request_for("links/s2", vm="web", puts_on_base=True)._replace(backing_file=f"{tmp_path}/links/base.qcow2")
    clone = qemu.create(tmp_path / "links" / "clone", "64M", "-b", "base.qcow2", "-F", "qcow2")
    (failure,) = refused(tmp_path, link)
    assert (failure.code, f"is the backing file of {clone}" in failure.why) == ("has_overlay", True)
    qemu.qemu_img("rebase", "-u", "-b", "s2", "-F", "qcow2", clone)
    (failure,) = refused(tmp_path, link)
    assert (failure.code, f"is the backing file of {clone}" in failure.why) == ("has_overlay", True)
    os.unlink(clone)
    assert states(go_back([link])) == ["reverted"]


def test_other_requests_of_the_call(tmp_path, base, request_for):
    far = tmp_path / "far"
    far.mkdir()
    clone = qemu.create(far / "clone", "64M", "-b", f"{tmp_path}/s1", "-F", "qcow2")
    own = RevertRequest(clone, f"{tmp_path}/s1")
    before = world(tmp_path)
    for requests in ([request_for("s2"), own], [own, request_for("s2")]):
        outcome = go_back([one._replace(vm=one.path) for one in requests], CHECK)
        by_path = {verdict.request.path: [problem.code for problem in verdict.problems] for verdict in outcome.verdicts}
        assert by_path == {f"{tmp_path}/s2": ["repeated"], clone: []}
    (tmp_path / "link").symlink_to("s2")
    assert code(tmp_path, request_for("s2"), request_for("link")) == {"repeated"}
    assert code(tmp_path, request_for("s2"), request_for("s2")) == {"repeated"}
    os.unlink(tmp_path / "link")
    assert world(tmp_path) == before


def test_an_image_that_is_not_in_the_chain(tmp_path, base, request_for):
    other = qemu.create(tmp_path / "other", "64M")
    (failure,) = refused(tmp_path, request_for("s2")._replace(backing_file=other))
    assert failure.code == "differs"
    assert f"does not have {other} in its chain: its backing file is {tmp_path}/s1" in failure.why
    (failure,) = refused(tmp_path, RevertRequest(base, other))
    assert "it has no backing file" in failure.why
    assert code(tmp_path, RevertRequest(f"{tmp_path}/s1", f"{tmp_path}/s2")) >= {"differs"}
    assert code(tmp_path, RevertRequest(base, base)) == {"backs_itself"}
    os.link(base, tmp_path / "hard")
    assert states(go_back([request_for("s2")._replace(backing_file=f"{tmp_path}/hard")], CHECK)) == ["reverted"]


def test_another_format_than_is_recorded(tmp_path, request_for):
    (failure,) = refused(tmp_path, request_for("s2", backing_format="raw"))
    assert (failure.code, "Use backing_format=qcow2" in failure.remedy) == ("differs", True)


@pytest.mark.parametrize("image", ["base.qcow2", "s1", "s2"])
def test_an_unfinished_commit(tmp_path, request_for, image):
    (tmp_path / f".{image}.kvmfleet-vault").touch()
    (failure,) = refused(tmp_path, request_for("s2"))
    assert failure.code == "unfinished"
    assert f"{tmp_path}/.{image}.kvmfleet-vault " in failure.why
    if image == "base.qcow2":
        os.unlink(tmp_path / "s2")
        assert code(tmp_path, request_for("s2")) == {"unfinished"}


def test_an_unfinished_commit_into_an_image_further_down(tmp_path, base, request_for, monkeypatch):
    """Its data is below the image to go back to, and TOP, which tells of it, can lose its mark."""
    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, "give", lambda *_args: os.close(-1))
        assert run(MergeLayers(), [CommitRequest(f"{tmp_path}/s2", base)], SETTINGS).failures
    for name, *_others in qemu.bitmaps_of(tmp_path / "s2"):
        qemu.qemu_img("bitmap", "--remove", str(tmp_path / "s2"), name)
    request = RevertRequest(f"{tmp_path}/s2", f"{tmp_path}/s1")
    (failure,) = refused(tmp_path, request)
    assert (failure.code, failure.subject) == ("unfinished", base)
    os.unlink(tmp_path / ".base.qcow2.kvmfleet-vault")
    assert not go_back([request]).failures


def test_the_vault_of_a_commit_that_is_done_is_in_nobodys_way(tmp_path, base, request_for, monkeypatch):
    monkeypatch.setattr(merge, "remove_vault", lambda _path: None)
    assert not run(MergeLayers(), [CommitRequest(f"{tmp_path}/s2", base)], SETTINGS).failures
    assert names(tmp_path) == [".base.qcow2.kvmfleet-vault-given", "base.qcow2"]
    make_overlays([OverlayRequest(f"{tmp_path}/s2", base)], SETTINGS)
    assert not go_back([request_for("s2")]).failures


def test_the_mark_of_an_unfinished_commit(tmp_path, request_for):
    qemu.add_bitmaps(tmp_path / "s2", [Bitmap("kvmfleet-carried-0123", 65536, False, False)])
    assert code(tmp_path, request_for("s2")) == {"unfinished"}


@pytest.mark.parametrize(
    "image, offset, data, expected",
    [
        ("s2", 4, b"\0\0\0\7", "unsupported"),
        ("s1", 40, b"\xff" * 8, "damaged"),
        ("base.qcow2", 40, b"\xff" * 8, "damaged"),
        ("base.qcow2", 79, b"\2", "corrupt"),
        ("base.qcow2", 0, b"xxxx", "not_qcow2"),
        ("s2", 0, b"xxxx", "not_qcow2"),
    ],
)
def test_damaged_images(tmp_path, request_for, image, offset, data, expected):
    qemu.patch(tmp_path / image, offset, data)
    assert code(tmp_path, request_for("s2")) == {expected}


def test_what_is_missing(tmp_path, base, request_for):
    (tmp_path / "link").symlink_to("nowhere")
    assert code(tmp_path, request_for("link")) == {"no_such_file"}
    assert code(tmp_path, request_for("no-such-folder/s2")) == {"no_folder"}
    assert code(tmp_path, request_for("s9")._replace(backing_file=f"{tmp_path}/no-base")) == {"no_such_file"}
    os.rename(tmp_path / "s1", tmp_path / "moved")
    assert code(tmp_path, request_for("s2")) == {"no_such_file"}
    assert code(tmp_path, RevertRequest("s2", base)) == {"bad_name"}


def test_a_name_that_would_be_too_long(tmp_path, base):
    path = qemu.create(tmp_path / ("x" * 250), "64M", "-b", base, "-F", "qcow2")
    assert code(tmp_path, RevertRequest(path, base)) == {"name_too_long"}
    (tmp_path / "link").symlink_to(path)  # so it is renamed before it is deleted
    assert code(tmp_path, RevertRequest(f"{tmp_path}/link", base, retire="delete")) == {"name_too_long"}
    assert states(go_back([RevertRequest(path, base, retire="delete")])) == ["reverted"]


def test_a_block_device(tmp_path, base, request_for, monkeypatch):
    real = revert.why_not_retired
    refusal = Refusal("block_device", "/dev/vg/web", "is a block device")
    monkeypatch.setattr(
        revert, "why_not_retired", lambda path, *more: refusal if path.endswith("s1") else real(path, *more)
    )
    assert code(tmp_path, request_for("s2")) == {"block_device"}


# All or none, the switch, and failures


def machines(done, error=None):
    def switch():
        done.append(1)
        if error:
            raise error

    return {"a": Vm(switch), "b": Vm(lambda: None)}


@pytest.fixture(name="disks")
def fixture_disks(tmp_path):
    """Have two VMs of two disks."""
    for name in ("a1", "a2", "b1", "b2"):
        base = qemu.create(tmp_path / f"{name}.base", "1M")
        qemu.create(tmp_path / name, "1M", "-b", base, "-F", "qcow2")
    return [RevertRequest(f"{tmp_path}/{n}", f"{tmp_path}/{n}.base", vm=n[0]) for n in ("a1", "b1", "a2", "b2")]


def test_of_a_vm_all_or_none(tmp_path, disks):
    with qemu.opened_for_writing(tmp_path / "a2.base"):
        outcome = go_back(disks)
    assert states(outcome) == ["failed", "reverted", "failed", "reverted"]
    assert [verdict.as_result().get("code") for verdict in outcome.verdicts] == ["group_failed", None, "in_use", None]
    assert [name for name in names(tmp_path) if "base" not in name] == ["a1", "a2", "b1.reverted", "b2.reverted"]


def test_the_vm_is_switched_while_it_cannot_start_and_before_anything_goes(tmp_path, disks):
    seen = []
    (tmp_path / "far").mkdir()  # nobody looks there, but no VM may start on it just now
    qemu.create(tmp_path / "far" / "clone.base", "1M", "-b", f"{tmp_path}/a1", "-F", "qcow2")

    def switch():
        for name in ("a1", "a1.base", "a2", "a2.base", "far/clone.base"):
            started = subprocess.run(["qemu-io", "-c", "quit", tmp_path / name], check=False, capture_output=True)
            assert b"lock" in started.stderr
        seen.append([name for name in names(tmp_path) if "base" not in name and name != "far"])

    assert states(go_back(disks, CHECK, {"a": Vm(switch)})) == ["reverted"] * 4
    assert seen == []
    assert states(go_back(disks, SETTINGS, {"a": Vm(switch)})) == ["reverted"] * 4
    assert seen == [["a1", "a2", "b1", "b2"]]


@pytest.mark.parametrize(
    "error", [Refusal("not_switched", "a", "libvirt says no"), UnknownOutcomeError("a", "half done", "")]
)
def test_if_the_vm_is_not_switched_nothing_goes(tmp_path, disks, error):
    outcome = go_back(disks, SETTINGS, machines([], error))
    assert states(outcome) == ["failed", "reverted", "failed", "reverted"]
    assert outcome.failures == [error]
    assert [name for name in names(tmp_path) if "base" not in name] == ["a1", "a2", "b1.reverted", "b2.reverted"]


@pytest.mark.parametrize("how", ["keep", "delete"])
def test_what_cannot_be_retired_after_the_switch_is_told(tmp_path, disks, monkeypatch, how):
    real, done = revert.retire, []

    def failing(path, *more):
        if path.endswith("a1"):
            raise OSError(5, "Input/output error")
        return real(path, *more)

    monkeypatch.setattr(revert, "retire", failing)
    outcome = go_back([one._replace(retire=how) for one in disks], SETTINGS, machines(done))
    assert (states(outcome), done) == (["failed", "reverted", "reverted", "reverted"], [1])
    (failure,) = outcome.failures
    assert (failure.code, failure.subject) == ("not_removed", f"{tmp_path}/a1")
    assert "since the VM is on" in failure.why
    assert "Input/output error" in failure.why
    monkeypatch.undo()
    again = go_back(disks, SETTINGS, machines(done))
    assert states(again) == ["reverted", "absent", "absent", "absent"]


def test_what_cannot_be_retired_of_a_chain_is_named_whole(tmp_path, request_for, monkeypatch):
    def failing(_path, *_more):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(revert, "retire", failing)
    outcome = go_back([request_for("s2")])
    (failure,) = outcome.failures
    assert "the checkpoint 'later' goes with it" in outcome.warnings[0]  # the VM is on the image below
    assert failure.subject == f"{tmp_path}/s2"
    assert f"So is {tmp_path}/s1." in failure.remedy


def test_an_image_that_is_replaced_under_the_locks(tmp_path, request_for):
    def replace():
        os.rename(tmp_path / "s2", tmp_path / "mine")
        shutil.copy(tmp_path / "mine", tmp_path / "s2")

    outcome = go_back([request_for("s2", vm="a")], SETTINGS, {"a": Vm(replace)})
    assert outcome.failures[0].code == "not_removed"
    assert "was moved or replaced meanwhile" in outcome.failures[0].why
    assert "s2" in names(tmp_path)


def test_an_image_that_is_replaced_before_the_switch(tmp_path, base, request_for, monkeypatch):
    real, looks, done = revert._observe, [], []

    def observe(*args):
        seen = real(*args)
        looks.append(seen)
        if len(looks) == 2:  # under the locks
            os.rename(tmp_path / "s1", tmp_path / "mine")
            shutil.copy(tmp_path / "mine", tmp_path / "s1")
        return seen

    monkeypatch.setattr(revert, "_observe", observe)
    outcome = go_back([request_for("s2", vm="a")], SETTINGS, machines(done))
    assert [failure.code for failure in outcome.failures] == ["changed_meanwhile"]
    assert (done, names(tmp_path)) == ([], ["base.qcow2", "mine", "s1", "s2"])


# Kills and races

RUN = """
import shutil, sys
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
"""


def killed_at(step, how, path, base, by_link):
    """Run in a process that is killed before its call number `step` that changes a folder; return whether it was."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    calls = []

    def counting(real):
        def call(*args, **more):
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        return call

    failed = 1
    try:
        for name in ("unlink", "link", "fsync"):
            setattr(os, name, counting(getattr(os, name)))
        rename = retiring.rename_without_replacing
        retiring.rename_without_replacing = (lambda *_args: False) if by_link else counting(rename)
        vms = {"a": Vm(counting(lambda: None))}
        failed = states(go_back([RevertRequest(path, base, vm="a", retire=how)], SETTINGS, vms)) != ["reverted"]
    finally:
        os._exit(failed)


@pytest.mark.parametrize("by_link", [False, True], ids=["by rename", "by link"])
@pytest.mark.parametrize("how", ["keep", "delete"])
def test_a_kill_at_any_step_leaves_what_the_same_call_completes(tmp_path, base, how, by_link, monkeypatch):
    before, steps = {name: digest(tmp_path / name) for name in names(tmp_path)}, 0
    copies = tmp_path.parent / f"{tmp_path.name}.copies"
    shutil.copytree(tmp_path, copies)
    while True:
        was_killed = killed_at(steps + 1, how, f"{tmp_path}/s2", base, by_link)
        found = {digest(tmp_path / name) for name in names(tmp_path)}
        assert how == "delete" or found == set(before.values())  # nothing of the data is lost
        with monkeypatch.context() as patch:
            if by_link:
                patch.setattr(retiring, "rename_without_replacing", lambda *_args: False)
            outcome = go_back([RevertRequest(f"{tmp_path}/s2", base, retire=how)])
        assert states(outcome) in (["reverted"], ["absent"]), outcome.failures
        assert {"s1", "s2"}.isdisjoint(names(tmp_path))
        assert digest(base) == before["base.qcow2"]
        if how == "keep":
            assert names(tmp_path) == KEPT
            assert states(outcome) == ["absent"] or outcome.as_result("overlays")["overlays"][0]["kept_as"] is not None
        else:
            assert set(names(tmp_path)) <= {"base.qcow2", "s1.reverted"}
        for name in names(tmp_path):
            os.unlink(tmp_path / name)
        for name in names(copies):
            shutil.copy(copies / name, tmp_path / name)
        if not was_killed:
            break
        steps += 1
    assert steps >= 5


@pytest.mark.parametrize("how", ["keep", "delete"])
@pytest.mark.parametrize("linked", ["s1", "s2"])
def test_a_kill_at_any_step_beside_a_symlink_leaves_what_the_same_call_completes(tmp_path, base, how, linked):
    folder, store, steps = tmp_path / "vm", tmp_path / "store", 0
    images = {name: (tmp_path / name).read_bytes() for name in ("base.qcow2", "s1", "s2")}
    was_killed = True
    while was_killed:
        for one in (folder, store):
            shutil.rmtree(one, ignore_errors=True)
            one.mkdir()
        for name, content in images.items():
            place = store / name if name == linked else folder / name
            place.write_bytes(content)
            if name == linked:
                (folder / name).symlink_to(place)
        for name, below in (("s1", "base.qcow2"), ("s2", "s1")):
            qemu.qemu_img("rebase", "-u", "-b", str(folder / below), "-F", "qcow2", str(folder / name))
        request = RevertRequest(f"{folder}/s2", f"{folder}/base.qcow2", retire=how)
        was_killed = killed_at(steps + 1, how, request.path, request.backing_file, by_link=False)
        foretold, outcome = go_back([request], CHECK), go_back([request])
        assert outcome.as_result("x")["x"] == foretold.as_result("x")["x"]
        assert states(outcome) in (["reverted"], ["absent"]), outcome.failures
        kept = {name for one in (folder, store) for name in names(one) if name.endswith(".reverted")}
        assert how == "delete" or kept == {"s1.reverted", "s2.reverted"}
        # Of the one below nothing tells once the topmost one has gone.
        left = {"s1"} if states(outcome) == ["absent"] and linked == "s1" else set()
        assert {"base.qcow2"} <= set(names(folder)) - kept <= {"base.qcow2"} | left
        assert states(go_back([request])) == ["absent"]
        steps += 1
    assert set(names(folder)) - kept == {"base.qcow2"}
    assert steps >= 5


def test_a_symlink_that_leads_nowhere_stays_if_nothing_tells_that_the_image_was_renamed(tmp_path, base, request_for):
    (tmp_path / "link").symlink_to("gone")
    qemu.create(tmp_path / "gone.reverted", "64M")  # which does not stand on BASE
    before = world(tmp_path)
    assert [problem.code for problem in go_back([request_for("link")]).failures] == ["no_such_file"]
    assert world(tmp_path) == before


def test_a_symlink_that_cannot_be_removed_is_told(tmp_path, base, request_for, monkeypatch):
    (tmp_path / "link").symlink_to("s2")

    real = revert.remove_dangling_link

    def failing(path):
        if is_gone:
            real(path)
        if path == f"{tmp_path}/link":
            raise OSError(5, "Input/output error")

    for is_gone in (False, True):
        monkeypatch.setattr(revert, "remove_dangling_link", failing)
        (failure,) = go_back([request_for("link")]).failures
        assert (failure.code, failure.subject) == ("not_removed", f"{tmp_path}/link")
        monkeypatch.undo()
        assert states(go_back([request_for("link")])) == ["absent" if is_gone else "reverted"]
        for name in ("s1", "s2"):
            os.rename(tmp_path / f"{name}.reverted", tmp_path / name)
        if not is_gone:
            (tmp_path / "link").symlink_to("s2")


def test_a_symlink_in_between_that_cannot_be_removed_is_told(tmp_path, base, request_for, monkeypatch):
    os.rename(tmp_path / "s1", tmp_path / "far")
    (tmp_path / "s1").symlink_to("far")

    def failing(_path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(revert, "remove_dangling_link", failing)
    (failure,) = go_back([request_for("s2")]).failures
    assert (failure.code, failure.subject) == ("not_removed", f"{tmp_path}/s1")


def test_of_runs_that_race_one_goes_back_and_the_others_find_it_done(tmp_path, base):
    copies = tmp_path.parent / f"{tmp_path.name}.copies"
    shutil.copytree(tmp_path, copies)
    call = RUN + (
        "outcome = run(GoBack(), [RevertRequest(sys.argv[1], sys.argv[2])], Settings(False, 60, shutil.which))\n"
        "print(*(verdict.state for verdict in outcome.verdicts), *(f.code for f in outcome.failures))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", call, f"{tmp_path}/s2", base]
    for _round in range(6):
        runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _number in range(3)]
        said = collections.Counter(one.communicate()[0].strip() for one in runs)
        assert said.pop("reverted") == 1
        # A look can come just between the first rename and the second one.
        moved = {f"failed {code}" for code in ("no_such_file", "gone", "changed_meanwhile")}
        assert set(said) <= {"absent", *moved}, said
        assert names(tmp_path) == KEPT
        for name in KEPT[1:]:
            os.unlink(tmp_path / name)
        for name in ("s1", "s2"):
            shutil.copy(copies / name, tmp_path / name)


def test_an_image_that_another_run_retires_during_the_look_is_absent(tmp_path, request_for, monkeypatch):
    def observe(request, _held):
        os.rename(request.path, f"{request.path}.reverted")
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(revert, "_observe_overlay", observe)
    assert states(go_back([request_for("s2")])) == ["absent"]


def test_a_kept_image_of_an_earlier_time_is_not_deleted(tmp_path, base, request_for):
    os.rename(tmp_path / "s1", tmp_path / "s1.reverted")
    outcome = go_back([request_for("s2", retire="delete")])
    assert states(outcome) == ["reverted"]
    assert names(tmp_path) == ["base.qcow2", "s1.reverted"]
    (result,) = outcome.as_result("overlays")["overlays"]
    assert result["retired"] == [
        {"path": f"{tmp_path}/s2", "kept_as": None},
        {"path": f"{tmp_path}/s1", "kept_as": f"{tmp_path}/s1.reverted"},
    ]


@pytest.mark.parametrize("damage", ["elsewhere", "gone below", "no image", "unreadable", "folder", "nowhere", "itself"])
def test_what_else_is_kept_is_not_taken_for_the_image_that_a_killed_run_has_renamed(
    tmp_path, base, request_for, damage, monkeypatch
):
    os.rename(tmp_path / "s1", tmp_path / "s1.reverted")
    other = tmp_path / "s1.reverted.1"
    if damage in ("elsewhere", "gone below"):
        qemu.create(tmp_path / "other", "64M")
        qemu.create(other, "64M", "-b", f"{tmp_path}/other", "-F", "qcow2")
        if damage == "gone below":
            os.unlink(tmp_path / "other")
    elif damage == "folder":
        other.mkdir()
    elif damage in ("nowhere", "itself"):
        other.symlink_to("nowhere" if damage == "nowhere" else "s2")
    else:
        other.write_bytes(b"QFI\xfb")
    if damage == "unreadable":
        look = revert._layers
        failure = OSError(errno.EIO, os.strerror(errno.EIO))
        monkeypatch.setattr(
            revert, "_layers", lambda file, *how: fail(failure) if file.path == str(other) else look(file, *how)
        )
    assert retiring.all_kept(f"{tmp_path}/s1", "reverted")[-1] == str(other)
    outcome = go_back([request_for("s2")])
    assert states(outcome) == ["reverted"]
    assert outcome.as_result("overlays")["overlays"][0]["retired"][1]["kept_as"] == f"{tmp_path}/s1.reverted"


def test_of_several_that_a_killed_run_may_have_renamed_it_is_the_newest(tmp_path, base, request_for):
    shutil.copy(tmp_path / "s1", tmp_path / "s1.reverted.1")  # kept by an earlier release, which filled gaps
    time.sleep(0.02)
    os.rename(tmp_path / "s1", tmp_path / "s1.reverted")
    outcome = go_back([request_for("s2")])
    assert outcome.as_result("overlays")["overlays"][0]["retired"][1]["kept_as"] == f"{tmp_path}/s1.reverted"


def test_what_is_missing_below_the_image_to_go_back_to_is_told(tmp_path, base, request_for):
    template = qemu.create(tmp_path / "template", "64M")
    qemu.qemu_img("rebase", "-u", "-b", template, "-F", "qcow2", base)
    os.unlink(template)
    assert "template: does not exist" in str(refused(tmp_path, request_for("s2"))[0])
    os.rename(tmp_path / "s1", tmp_path / "s1.reverted")
    assert "template: does not exist" in str(refused(tmp_path, request_for("s2"))[0])


def test_a_loop_through_kept_images_ends(tmp_path, base, request_for):
    os.unlink(tmp_path / "s1")
    os.link(tmp_path / "s2", tmp_path / "s1.reverted")
    assert code(tmp_path, request_for("s2")) == {"no_such_file"}


def test_no_descriptor_stays_open(tmp_path, base, request_for):
    with contextlib.suppress(Refusal):
        go_back([request_for("s9")])
    descriptors = len(os.listdir("/proc/self/fd"))
    go_back([request_for("s2")])
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert json.dumps(go_back([request_for("s2")]).as_result("overlays"))


MARK = Mark("uuid", "vda", "mon")


@pytest.fixture(name="snapshot")
def fixture_snapshot(tmp_path):
    """Return how to make an overlay of a VM, with data of the guest in it and below; the image below stays as it is."""

    def make(name, below, backing_format="qcow2", data="write -P 9 1M 2M", **more):
        path = str(tmp_path / name)
        wanted = OverlayRequest(path, str(below), backing_format, vm="uuid", mark=MARK, **more)
        assert states(make_overlays([wanted], SETTINGS)) == ["created"]
        if data is not None:
            subprocess.run(["qemu-io", "-c", data, path], check=True, stdout=subprocess.DEVNULL)
        return path

    return make


def back_to(base, top, **more):
    return RevertRequest(str(top), str(base), vm="uuid", puts_on_base=True, **more)


def codes_of(outcome):
    return [problem.code for problem in outcome.failures]


def merged_in_part(path, base):
    """Have data of the overlay in the image below, as after a merge that was given up."""
    del path
    qemu.qemu_img("bitmap", "--add", base, "other")
    subprocess.run(["qemu-io", "-c", "write -P 9 1M 1536k", base], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
@pytest.mark.parametrize(
    "merge_by_others", [lambda path, _base: qemu.qemu_img("commit", "-q", path, "-d"), merged_in_part]
)
def test_nobody_goes_back_to_an_image_that_others_have_merged_data_into(
    tmp_path, snapshot, merge_by_others, image_format
):
    base = str(tmp_path / "disk")
    qemu.qemu_img("create", "-q", "-f", image_format, base, "16M")
    path = snapshot("top", base, image_format)
    before = os.stat(base).st_mtime_ns
    if merge_by_others is merged_in_part and image_format == "raw":
        with open(base, "r+b") as file:
            file.seek(1 << 20)
            file.write(b"\x09" * (3 << 19))
    else:
        merge_by_others(path, base)
    wanted = RevertRequest(path, base, image_format, vm="uuid", puts_on_base=True)
    there = world(tmp_path)
    for settings in (CHECK, SETTINGS):
        assert codes_of(go_back([wanted], settings)) == ["base_changed"]
    assert world(tmp_path) == there
    os.utime(base, ns=(before, before))
    assert states(go_back([wanted], CHECK)) == ["reverted"]  # it is told by the time and by the data
    os.utime(base)
    assert states(go_back([wanted._replace(puts_on_base=False, vm=None)])) == ["reverted"]  # who names the images


def written_after(path, since, seconds):
    """Have a file written to last so many seconds after a time in nanoseconds."""
    os.utime(path, ns=(since, since + seconds * 10**9))


@pytest.mark.parametrize("has_bitmaps", [False, True])
@pytest.mark.parametrize("extended_l2", [False, True])
def test_nobody_goes_back_once_the_overlay_was_emptied(tmp_path, snapshot, has_bitmaps, extended_l2):
    base = qemu.create(tmp_path / "disk", "16M")
    path = snapshot("top", base, creation=Creation(extended_l2=extended_l2))
    if has_bitmaps:
        qemu.add_bitmaps(path, [Bitmap("monday", 65536, True, False)])
    qemu.qemu_img("commit", "-q", path)
    history = qemu.read(path).history
    since = max(history.base_written, history.made)
    written_after(path, since, 61)
    for seconds, expected in ((59, []), (61, ["base_changed"])):
        written_after(base, since, seconds)  # a VM that runs writes on until it is switched
        outcome = go_back([back_to(base, path)], CHECK)
        assert codes_of(outcome) == expected
        assert all("(disks)" in one.remedy for one in outcome.failures)
    subprocess.run(["qemu-io", "-c", "write -P 5 1M 64k", path], check=True, stdout=subprocess.DEVNULL)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == []


@pytest.mark.parametrize("has_bitmaps", [False, True])
@pytest.mark.parametrize("knows_when", [False, True])
def test_an_idle_disk_goes_back_although_checkpoints_are_removed_below(
    tmp_path, snapshot, monkeypatch, has_bitmaps, knows_when
):
    """What QEMU stores at its end writes to an overlay that has bitmaps, and the switch to the image below."""
    if not knows_when:
        new_history = build.new_history
        monkeypatch.setattr(build, "new_history", lambda base: new_history(base)._replace(made=0))
    base = qemu.create(tmp_path / "disk", "16M")
    if has_bitmaps:
        qemu.add_bitmaps(base, [Bitmap("monday", 65536, True, False)])
    path = snapshot("top", base, data=None)
    assert (qemu.read(path).history.made > 0, bool(qemu.read(path).bitmaps)) == (knows_when, has_bitmaps)
    for file in [base, path] if has_bitmaps else [base]:
        written_after(file, time.time_ns(), 3600)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == []
    refuse = {"uuid": Vm(lambda: fail(Refusal("libvirt", "web", "said no")), base)}
    if has_bitmaps:
        written_after(path, time.time_ns(), -7200)
    else:
        written_after(path, os.stat(path).st_mtime_ns, -1)
    before = os.stat(path).st_mtime_ns
    assert codes_of(go_back([back_to(base, path)], vms=refuse)) == ["libvirt"]
    assert (leaves(path), os.stat(path).st_mtime_ns) == (True, before)  # its guest has not written to it
    assert codes_of(go_back([back_to(base, path)])) == []


def test_the_live_switch_stores_bitmaps_below_long_after_the_last_write_there(tmp_path, snapshot):
    base = qemu.create(tmp_path / "disk", "16M")
    written_after(base, time.time_ns(), -3600)
    path = snapshot("top", base, data=None)
    made = qemu.read(path).history.made
    written_after(path, made, 61)
    for seconds, expected in ((59, []), (61, ["base_changed"])):
        written_after(base, made, seconds)
        assert codes_of(go_back([back_to(base, path)], CHECK)) == expected


def test_subclusters_are_compared_too(tmp_path, snapshot):
    base = qemu.create(tmp_path / "disk", "16M", "-o", "extended_l2=on")
    path = snapshot("top", base, creation=Creation(extended_l2=True), data="write -P 9 1M 4k")
    qemu.qemu_img("commit", "-q", "-d", path)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == ["base_changed"]


@pytest.mark.parametrize("is_raw", ["on", "off"])
def test_an_external_data_file_is_compared_too_whatever_the_time_of_its_image(tmp_path, snapshot, is_raw):
    data = tmp_path / "data"
    base = qemu.create(tmp_path / "disk", "16M", "-o", f"data_file={data},data_file_raw={is_raw}")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 16M", base], check=True, stdout=subprocess.DEVNULL)
    path = snapshot("top", base)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == []
    before = os.stat(base).st_mtime_ns
    qemu.qemu_img("commit", "-q", "-d", path)
    os.utime(base, ns=(before, before))
    assert codes_of(go_back([back_to(base, path)], CHECK)) == ["base_changed"]
    qemu.qemu_img("commit", "-q", path)
    history = qemu.read(path).history
    os.utime(base, ns=(before, before))
    for file in (data, path):
        written_after(file, history.made, 61)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == ["base_changed"]


def test_a_guest_that_goes_on_hides_a_merge_only_where_it_writes(tmp_path, snapshot):
    """A merge that was given up has got far, and what is written most lies at the start of the disk."""
    base = qemu.create(tmp_path / "disk", "64M")
    path = snapshot("top", base, data="write -P 9 0 32M")
    qemu.qemu_img("commit", "-q", "-d", path)
    for written, expected in (("10M", ["base_changed"]), ("26M", ["base_changed"]), ("29M", [])):
        subprocess.run(["qemu-io", "-c", f"write -P 7 0 {written}", path], check=True, stdout=subprocess.DEVNULL)
        assert codes_of(go_back([back_to(base, path)], CHECK)) == expected


def test_a_merge_that_was_given_up_early_is_seen(tmp_path, snapshot):
    base = qemu.create(tmp_path / "disk", "64M")
    path = snapshot("top", base, data="write -P 9 0 64M")
    for command in ("write -P 9 0 16M", "write -P 7 0 7M"):  # what went in; what the guest has written again since
        file = base if "9" in command else path
        subprocess.run(["qemu-io", "-c", command, file], check=True, stdout=subprocess.DEVNULL)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == ["base_changed"]


def write_scattered(path, numbers):
    """Write so many clusters of 64 KiB, each with data of its own, and an empty one after the second."""
    commands = [f"write -P {1 + number % 250} {number * 192}k 64k" for number in numbers]
    options = [option for one in [*commands, "write -P 0 320k 64k"] for option in ("-c", one)]
    subprocess.run(["qemu-io", *options, path], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("merged", "written_since", "expected"),
    [
        (range(3), None, []),
        (range(4), None, ["base_changed"]),
        (range(16), None, ["base_changed"]),
        (range(16), 0, []),  # the guest has written to the first again
        (range(16), 3, []),
        (range(16), 4, ["base_changed"]),
        (range(1, 16), None, []),  # what is the same by chance does not begin at the start
        ([*range(3), *range(4, 16)], None, []),
    ],
)
def test_a_merge_that_was_given_up_at_its_very_start_is_seen(tmp_path, snapshot, merged, written_since, expected):
    """Of all that the overlay holds a few clusters went in, which are the first ones."""
    base = qemu.create(tmp_path / "disk", "64M")
    subprocess.run(["qemu-io", "-c", "write -P 251 0 4M", base], check=True, stdout=subprocess.DEVNULL)
    path = snapshot("top", base, data=None)
    write_scattered(path, range(300))
    qemu.qemu_img("bitmap", "--add", base, "other")  # which is no merge
    assert codes_of(go_back([back_to(base, path)], CHECK)) == []
    write_scattered(base, merged)
    if written_since is not None:
        command = f"write -P 251 {written_since * 192}k 4k"
        subprocess.run(["qemu-io", "-c", command, path], check=True, stdout=subprocess.DEVNULL)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == expected
    assert codes_of(go_back([back_to(base, path, is_left=True)], CHECK)) == []


@pytest.mark.parametrize(("merged", "expected"), [("512k", []), ("1M", ["base_changed"])])
def test_one_large_cluster_that_is_the_same_is_no_merge(tmp_path, snapshot, merged, expected):
    base = qemu.create(tmp_path / "disk", "64M", "-o", "cluster_size=512k")
    path = snapshot("top", base, creation=Creation(cluster_size=1 << 19), data="write -P 9 0 32M")
    subprocess.run(["qemu-io", "-c", f"write -P 9 0 {merged}", base], check=True, stdout=subprocess.DEVNULL)
    assert codes_of(go_back([back_to(base, path)], CHECK)) == expected


@pytest.fixture(name="two")
def fixture_two(tmp_path, snapshot):
    """Return BASE, and two snapshots on it, of which the guest has written to the second alone."""
    base = qemu.create(tmp_path / "disk", "16M")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 16M", base], check=True, stdout=subprocess.DEVNULL)
    lower = snapshot("s1", base, data=None)
    return base, lower, snapshot("s2", lower)


def commit_to_the_lowest(base, top):
    """Merge as 'virsh blockcommit' does by default: what is topmost into what is lowest, and give that up."""
    qemu.qemu_img("commit", "-q", "-b", base, "-d", top)


@pytest.mark.parametrize("goes_to", ["lowest", "lower"])
def test_what_went_into_the_lowest_image_is_seen_from_each_snapshot(tmp_path, two, goes_to):
    base, lower, top = two
    to = base if goes_to == "lowest" else lower
    assert codes_of(go_back([back_to(to, top)], CHECK)) == []
    qemu.qemu_img("bitmap", "--add", base, "later")  # which is no merge
    assert codes_of(go_back([back_to(to, top)], CHECK)) == []
    commit_to_the_lowest(base, top)
    outcome = go_back([back_to(to, top)], CHECK)
    assert codes_of(outcome) == ["base_changed"]
    assert f"{'it' if to == base else base} holds data of {top} already" in str(outcome.failures[0])


@pytest.mark.parametrize("between", [1, 2])
@pytest.mark.parametrize("is_device", [False, True])
def test_an_image_of_other_tools_does_not_hide_what_went_in_below_it(
    tmp_path, snapshot, monkeypatch, between, is_device
):
    """It records nothing, as after 'virsh snapshot-create-as'. BASE may be a block device, which tells no time."""
    base = qemu.create(tmp_path / "disk", "16M")
    subprocess.run(["qemu-io", "-c", "write -P 1 0 16M", base], check=True, stdout=subprocess.DEVNULL)
    below = base
    for number in range(between):
        below = qemu.create(tmp_path / f"x{number}", "16M", "-b", below, "-F", "qcow2")
    if is_device:
        new_history = build.new_history
        monkeypatch.setattr(build, "new_history", lambda file: new_history(file)._replace(base_written=0, base_inode=0))
    subprocess.run(["qemu-io", "-c", "write -P 9 1M 2M", base], check=True, stdout=subprocess.DEVNULL)
    os.utime(below)
    path = snapshot("top", below)
    assert codes_of(go_back([back_to(below, path)], CHECK)) == []  # what was written before is no merge of this one
    qemu.qemu_img("bitmap", "--add", base, "later")
    subprocess.run(["qemu-io", "-c", "write -P 1 1M 2M", base], check=True, stdout=subprocess.DEVNULL)
    assert codes_of(go_back([back_to(below, path)], CHECK)) == []
    commit_to_the_lowest(base, path)
    outcome = go_back([back_to(below, path)], CHECK)
    assert codes_of(outcome) == ["base_changed"]
    assert f"{base} holds data of {path} already" in str(outcome.failures[0])
    history = qemu.read(path).history  # the clock of the storage can go behind that of the host, which tells `made`
    since = history.base_written or history.made
    for later, expected in ((1, ["base_changed"]), (0, [])):
        os.utime(base, ns=(since, since + later))
        assert codes_of(go_back([back_to(below, path)], CHECK)) == expected


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_data_tells_of_a_merge_where_times_do_not(tmp_path, snapshot, monkeypatch, image_format):
    """That of a block device is never told."""
    base, new_history = str(tmp_path / "disk"), build.new_history
    qemu.qemu_img("create", "-q", "-f", image_format, base, "16M")
    monkeypatch.setattr(build, "new_history", lambda file: new_history(file)._replace(base_written=0, base_inode=0))
    monkeypatch.setattr(Layer, "written", lambda _layer: 0)
    path = snapshot("top", base, image_format)
    wanted = back_to(base, path, backing_format=image_format)
    assert codes_of(go_back([wanted], CHECK)) == []
    qemu.qemu_img("commit", "-q", "-d", path)
    assert codes_of(go_back([wanted], CHECK)) == ["base_changed"]


def test_what_a_killed_run_has_left_may_have_been_merged_since(tmp_path, snapshot):
    """It was killed before the switch, so the VM has gone on with the overlay; then others have merged that."""
    base = qemu.create(tmp_path / "disk", "16M")
    path = snapshot("top", base)
    left = back_to(base, path, is_left=True)
    os.utime(base)
    assert codes_of(go_back([left], CHECK)) == []
    qemu.qemu_img("commit", "-q", "-d", path)
    outcome = go_back([left], CHECK)
    assert codes_of(outcome) == ["base_changed"]
    assert f"move {path} away" in outcome.failures[0].remedy


@pytest.mark.parametrize("count", [0, 1, 5, 2048, 2049, 5000, 100_000])
def test_what_is_chosen_is_spread_evenly_however_far_one_comes(count):
    chosen = list(common_data._spread(range(count)))
    assert min(count, 1024) <= len(chosen) == len(set(chosen)) <= 2048
    for some in (4, 32, 128, 1024):
        first = sorted(chosen[:some])
        gaps = [after - before for before, after in zip(first, [*first[1:], count])]
        assert max(gaps, default=0) <= max(4096 // some, 1) * max(count, 1) / 1024 + 1


def test_to_remove_a_checkpoint_from_an_image_below_is_in_nobodys_way(tmp_path, base, snapshot):
    path = snapshot("top", tmp_path / "s2")
    qemu.qemu_img("bitmap", "--remove", str(tmp_path / "s2"), "later")
    assert os.stat(tmp_path / "s2").st_mtime_ns > qemu.read(path).history.base_written > os.stat(base).st_mtime_ns
    assert states(go_back([back_to(tmp_path / "s2", path)])) == ["reverted"]


def test_an_overlay_of_an_older_version_does_not_tell_of_the_image_below(tmp_path, snapshot, monkeypatch):
    monkeypatch.setattr(build.overlay, "verify", lambda *_made: [])
    monkeypatch.setattr(build, "write_mark", write_old_mark)
    base = qemu.create(tmp_path / "disk", "16M")
    path = snapshot("top", base)
    assert qemu.read(path).mark == MARK
    qemu.qemu_img("commit", "-q", "-d", path)
    assert states(go_back([back_to(base, path)])) == ["reverted"]


def write_old_mark(file, mark, _history):
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(marks, "_extension_of", lambda one, _history: extension_bytes(EXT_MARK, "\n".join(one).encode()))
        write_mark(file, mark)


def leaves(path):
    return qemu.read(path).history.leaving


def test_the_image_that_goes_says_so_while_its_vm_is_switched(tmp_path, snapshot):
    base = qemu.create(tmp_path / "disk", "16M")
    path, seen = snapshot("top", base), []
    for error in (Refusal("libvirt", "web", "said no"), UnknownOutcomeError("libvirt", "web", "gone"), None):

        def switch(error=error):
            seen.append(leaves(path))
            if error is not None:
                raise error

        states(go_back([back_to(base, path)], vms={"uuid": Vm(switch, base)}))
        there = path if error is not None else f"{path}.reverted"
        assert leaves(there) is (error is not None)  # whatever it says, the VM may be switched
    assert seen == [True] * 3
