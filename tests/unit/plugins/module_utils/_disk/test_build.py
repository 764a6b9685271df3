# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlays as they are made: complete, read back, or refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import types

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import build
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation, OverlayRequest, needed_bytes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import nodes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu
from .overlays import CARRIED, SETTINGS, digest, make_overlays, states


@pytest.mark.parametrize("program", ["qemu-storage-daemon", "qemu-system-x86_64"])
def test_check_do_check_again_do_again(tmp_path, disk, program):
    settings = SETTINGS._replace(find_program=lambda name: shutil.which(name) if name == program else None)
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    before = digest(disk)
    predicted = make_overlays(wanted, settings._replace(check_mode=True))
    assert os.listdir(tmp_path) == ["active.qcow2"]
    done = make_overlays(wanted, settings)
    assert done.as_result("overlays") == predicted.as_result("overlays")
    assert states(done) == ["created"]
    assert qemu.bitmaps_of(tmp_path / "over") == CARRIED
    without_qemu = settings._replace(find_program=lambda _name: None)
    for check_mode in (True, False):
        again = make_overlays(wanted, without_qemu._replace(check_mode=check_mode))
        assert states(again) == ["present"]
        assert not again.as_result("overlays")["changed"]
    assert digest(disk) == before
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "over"]


def test_the_guest_writes_and_both_bitmaps_record(tmp_path, disk):
    make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    subprocess.run(["qemu-io", "-c", "write 1M 64k", str(tmp_path / "over")], check=True, stdout=subprocess.DEVNULL)
    with qemu.storage_daemon() as monitor:
        node = {"driver": "qcow2", "node-name": "o", "read-only": True, "backing": None}
        monitor.command("blockdev-add", {**node, "file": {"driver": "file", "filename": str(tmp_path / "over")}})
        nodes = monitor.command("query-named-block-nodes", {"flat": True})
        counts = {b["name"]: b["count"] for n in nodes if n["node-name"] == "o" for b in n["dirty-bitmaps"]}
        monitor.command("blockdev-del", {"node-name": "o"})
    assert counts == {"fine": 65536, "coarse": 1 << 21}


@pytest.mark.parametrize("seed", range(qemu.examples(48)))
def test_needed_space_is_a_lower_bound_and_creation_options_are_kept(tmp_path, seed):
    dice = random.Random(seed)
    cluster_size = 1 << dice.randint(12, 21)
    creation = Creation(
        cluster_size,
        cluster_size >= 16384 and dice.random() < 0.5,
        dice.random() < 0.5,
        1 << dice.randint(0, 6),
        dice.choice(("zlib", "zstd")),
    )
    active = qemu.create(tmp_path / "active", dice.choice(("1M", "10G", "1T")))
    bitmaps = [Bitmap(f"b{i}", 1 << dice.randint(16, 31), True, False) for i in range(dice.choice((0, 1, 9, 70)))]
    qemu.add_bitmaps(active, bitmaps)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), active, creation=creation)], SETTINGS)
    assert states(outcome) == ["created"]
    said = qemu.info(tmp_path / "over")
    data = said["format-specific"]["data"]
    assert (said["cluster-size"], data["extended-l2"], data["lazy-refcounts"], data["refcount-bits"]) == creation[:4]
    assert data["compression-type"] == creation.compression_type
    assert qemu.bitmaps_of(tmp_path / "over") == {tuple(bitmap) for bitmap in bitmaps}
    taken = os.stat(tmp_path / "over").st_blocks * 512
    assert 0.7 * taken <= needed_bytes(outcome.verdicts[0]) <= taken


def test_bitmaps_that_qemu_loses_silently_are_noticed(tmp_path, disk, monkeypatch):
    real = Monitor.send

    def losing(self, name, arguments=None, *args):
        if name == "transaction":
            arguments = {"actions": arguments["actions"][:-1]}
        return real(self, name, arguments, *args)

    monkeypatch.setattr(Monitor, "send", losing)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert states(outcome) == ["failed"]
    assert "is missing or different" in str(outcome.failures[0])
    assert os.listdir(tmp_path) == ["active.qcow2"]


def test_what_qemu_and_the_reader_see_differently_is_refused(tmp_path, disk, monkeypatch):
    real = Monitor.receive

    def lying(self, *args):
        answer = real(self, *args)
        for node in answer:
            if "dirty-bitmaps" in node:
                node["dirty-bitmaps"].pop()
        return answer

    monkeypatch.setattr(Monitor, "receive", lying)
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    predicted = make_overlays(wanted, SETTINGS._replace(check_mode=True))
    outcome = make_overlays(wanted, SETTINGS)
    assert predicted.as_result("overlays") == outcome.as_result("overlays")
    assert "QEMU sees other bitmaps" in str(outcome.failures[0])
    assert os.listdir(tmp_path) == ["active.qcow2"]


def test_an_active_that_is_replaced_meanwhile_is_noticed(tmp_path, disk, monkeypatch):
    real = build.create_image

    def replacing(*args):
        os.rename(disk, tmp_path / "old")
        shutil.copy(tmp_path / "old", disk)
        real(*args)

    monkeypatch.setattr(build, "create_image", replacing)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert "was moved or replaced" in str(outcome.failures[0])
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "old"]


def test_an_overlay_is_present_also_while_a_vm_opens_and_closes_it(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    make_overlays(wanted, SETTINGS)
    loop = f"while :; do qemu-io -f qcow2 -c 'write 0 64k' {tmp_path}/over; done"
    vm = subprocess.Popen(["sh", "-c", loop], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 4
        looks = []
        while time.monotonic() < end or len(looks) < 100:
            looks.append(tuple(map(str, make_overlays(wanted, SETTINGS).failures)))
    finally:
        os.killpg(vm.pid, signal.SIGKILL)
        vm.wait()
    assert set(looks) == {()}


def test_a_relative_overlay_of_a_symlinked_active_opens(tmp_path, disk):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "active").symlink_to(disk)
    wanted = OverlayRequest(str(tmp_path / "links" / "over"), str(tmp_path / "links" / "active"), relative=True)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert qemu.info(tmp_path / "links" / "over")["backing-filename"] == "../active.qcow2"
    qemu.qemu_img("info", "--backing-chain", str(tmp_path / "links" / "over"))
    assert states(make_overlays([wanted], SETTINGS)) == ["present"]


def test_a_relative_overlay_shows_what_the_guest_sees_by_the_name_of_its_disk(tmp_path):
    for folder, pattern in (("vm", 1), ("pool", 2)):
        (tmp_path / folder).mkdir()
        base = qemu.create(tmp_path / folder / "base", "1M")
        subprocess.run(["qemu-io", "-c", f"write -P {pattern} 0 64k", base], check=True, stdout=subprocess.DEVNULL)
    qemu.create(tmp_path / "pool" / "disk", "1M", "-b", "base", "-F", "qcow2")
    (tmp_path / "vm" / "disk").symlink_to(tmp_path / "pool" / "disk")
    wanted = OverlayRequest(str(tmp_path / "vm" / "over"), str(tmp_path / "vm" / "disk"), relative=True)
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert (problem.code, problem.subject) == ("other_chain", wanted.backing_file)
    assert f"{tmp_path}/pool/base by that name, and on {tmp_path}/vm/base by this one" in problem.why
    assert states(make_overlays([wanted._replace(relative=False)], SETTINGS)) == ["created"]
    seen = subprocess.run(["qemu-io", "-c", "read -P 1 0 64k", wanted.path], check=True, capture_output=True, text=True)
    assert "verification failed" not in seen.stdout


@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS._replace(check_mode=True)])
def test_an_overlay_takes_no_place_at_which_an_image_has_lost_its_backing_file(tmp_path, disk, settings):
    (tmp_path / "links").symlink_to(tmp_path)
    qemu.create(tmp_path / "clone", "1G", "-b", str(tmp_path / "links" / "over"), "-F", "qcow2", "-u")
    (tmp_path / "elsewhere").mkdir()
    beside = OverlayRequest(str(tmp_path / "elsewhere" / "over"), disk)
    of_beside = qemu.create(tmp_path / "another", "1G", "-b", beside.path, "-F", "qcow2", "-u")
    far = OverlayRequest(str(tmp_path / "elsewhere" / "far"), disk)
    of_far = qemu.create(tmp_path / "elsewhere" / "third", "1G", "-b", "far", "-F", "qcow2", "-u")
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk), beside, far], settings)
    assert [problem.code for problem in outcome.failures] == ["occupied"] * 3
    for problem, clone in zip(outcome.failures, (tmp_path / "clone", of_beside, of_far)):
        assert f"is the backing file of {clone}, which" in problem.why
    assert not os.path.exists(tmp_path / "over")


def test_an_image_beside_a_symlink_to_the_one_below_that_waits_for_the_overlay(tmp_path, disk):
    (tmp_path / "links").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "links" / "disk").symlink_to(disk)
    wanted = OverlayRequest(f"{tmp_path}/far/over", f"{tmp_path}/links/disk")
    clone = qemu.create(tmp_path / "links" / "clone", "1G", "-b", wanted.path, "-F", "qcow2", "-u")
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert (problem.code, f"is the backing file of {clone}, which" in problem.why) == ("occupied", True)


def test_an_image_that_is_only_kept_is_told_of_and_keeps_nobody_from_an_overlay(tmp_path, disk):
    kept = qemu.create(tmp_path / "above.reverted", "1G", "-b", str(tmp_path / "over"), "-F", "qcow2", "-u")
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    foretold = make_overlays(wanted, SETTINGS._replace(check_mode=True))
    outcome = make_overlays(wanted, SETTINGS)
    assert (states(outcome), outcome.warnings) == (["created"], foretold.warnings)
    assert f"{kept}: records the path of the new overlay {wanted[0].path} as its backing file" in outcome.warnings[-1]


def test_a_folder_is_looked_through_once_for_all_overlays_of_a_call(tmp_path, disk, monkeypatch):
    real, looks = build.overlays_in, []
    monkeypatch.setattr(build, "overlays_in", lambda folder: looks.append(folder) or real(folder))
    wanted = [OverlayRequest(str(tmp_path / f"over{number}"), disk) for number in range(3)]
    assert states(make_overlays(wanted, SETTINGS)) == ["created"] * 3
    assert states(make_overlays(wanted, SETTINGS)) == ["present"] * 3
    assert looks == [str(tmp_path)]


def test_a_proc_of_another_namespace_is_not_trusted(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(nodes, "os", types.SimpleNamespace(**{**vars(os), "getpid": lambda: 1}))
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert "/proc: is missing, or not that of" in str(outcome.failures[0])


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_an_overlay_bears_its_mark_whatever_room_there_is_in_its_header(tmp_path, disk, cluster_size):
    mark = Mark("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "vda", "s" * 100)
    creation = Creation(cluster_size=cluster_size)
    wanted = OverlayRequest(str(tmp_path / "over"), disk, vm="a", mark=mark, creation=creation)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert qemu.read(wanted.path).mark == mark
    assert qemu.bitmaps_of(wanted.path) == CARRIED
    qemu.qemu_img("check", "-q", wanted.path)


def test_an_overlay_without_its_mark_is_not_published(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(build, "write_mark", lambda _file, _mark, _history: None)
    wanted = OverlayRequest(str(tmp_path / "over"), disk, vm="a", mark=Mark("uuid", "vda", "s"))
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert problem.code == "not_verified"
    assert not os.path.exists(wanted.path)
