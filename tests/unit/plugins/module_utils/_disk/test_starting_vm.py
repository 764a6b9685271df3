# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that is started while its images are locked, or just before."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base import files
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu
from .overlays import SETTINGS, make_overlays, states


class StartedVM:
    """A VM of two disks that somebody starts whenever images are about to be locked or released."""

    def __init__(self, monkeypatch, *disks):
        self._disks = disks  # by definition: the paths of both
        self.tries = 0
        for module, name in ((locks, "hold_off_writers"), (files, "close")):
            monkeypatch.setattr(module, name, self._before(getattr(module, name)))

    def _before(self, call):
        def start_then_call(*arguments):
            for disks in self._disks:
                if all(map(os.path.exists, disks)):
                    self.tries += 1
                    start_and_quit(disks)
            return call(*arguments)

        return start_then_call


def start_and_quit(disks):
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    for number, disk in enumerate(disks):
        node = {"driver": "qcow2", "node-name": f"disk{number}", "file": {"driver": "file", "filename": disk}}
        command += ["-blockdev", json.dumps(node)]
    words = b'{"execute": "qmp_capabilities"} {"execute": "quit"}'
    started = subprocess.run(command, input=words, check=False, capture_output=True)
    assert started.returncode == 0 or b"lock" in started.stderr


@pytest.mark.parametrize("there", [(), (0,), (1,)], ids=["none there", "first there", "second there"])
def test_a_vm_that_cannot_start_does_not_lose_the_bitmaps_of_its_first_disk(tmp_path, monkeypatch, there):
    # A QEMU that cannot open its second disk ends with the bitmaps of the first one in use. The VM's first disk has the
    # higher inode here, since runs wait for each other in the order of those.
    actives = [qemu.create(tmp_path / name) for name in ("second", "first")][::-1]
    for active in actives:
        qemu.add_bitmaps(active, [Bitmap("monday", 65536, True, False)])
    overlays = [f"{active}.snap" for active in actives]
    wanted = [OverlayRequest(path, active, vm="a") for path, active in zip(overlays, actives)]
    for number in there:
        make_overlays([wanted[number]], SETTINGS)
    mixed = [overlays[number] if number in there else active for number, active in enumerate(actives)]
    vm = StartedVM(monkeypatch, actives, overlays, mixed)
    outcome = make_overlays(wanted, SETTINGS)
    monkeypatch.undo()
    assert set(states(outcome)) <= {"created", "present"}
    assert vm.tries > 8
    for path in (*actives, *overlays):
        assert qemu.bitmaps_of(path) == {("monday", 65536, True, False)}, path


def test_a_vm_is_kept_from_its_first_disk_though_only_the_second_takes_part(tmp_path, disk):
    first = qemu.create(tmp_path / "first")

    def finish():
        started = subprocess.run(["qemu-io", "-c", "quit", first], check=False, capture_output=True)
        assert b'Failed to get "write" lock' in started.stderr

    wanted = [OverlayRequest(str(tmp_path / "over"), disk, vm="a")]
    assert states(make_overlays(wanted, SETTINGS, {"a": Vm(finish, first)})) == ["created"]


def test_a_first_disk_that_is_missing_does_not_matter(tmp_path, disk):
    machine = Vm(lambda: None, str(tmp_path / "first"))
    wanted = [OverlayRequest(str(tmp_path / "over"), disk, vm="a")]
    assert states(make_overlays(wanted, SETTINGS, {"a": machine})) == ["created"]


@contextlib.contextmanager
def opened_before_the_first_lock(path, monkeypatch):
    take_turn = locks.take_turn
    with contextlib.ExitStack() as vm:

        def start_vm(*arguments):
            vm.enter_context(qemu.opened_for_writing(path))
            monkeypatch.setattr(locks, "take_turn", take_turn)
            take_turn(*arguments)

        monkeypatch.setattr(locks, "take_turn", start_vm)
        yield


def with_a_first_disk(tmp_path, disk, what):
    """Return what is wanted of the second disk of a VM, what is known of that, and what it opens first."""
    first, wanted = qemu.create(tmp_path / "first"), OverlayRequest(str(tmp_path / "over"), disk, vm="a")
    if what == "takes no part":
        return [wanted], {"a": Vm(lambda: None, first)}, first
    there = OverlayRequest(f"{first}.snap", first, vm="a")
    make_overlays([there], SETTINGS)
    return [there, wanted], {}, there.path


@pytest.mark.parametrize("what", ["takes no part", "has its overlay already"])
def test_nothing_is_locked_behind_a_first_disk_that_its_vm_has_opened(tmp_path, disk, monkeypatch, what):
    wanted, machines, opened = with_a_first_disk(tmp_path, disk, what)
    hold = locks.hold_off_writers
    held = []
    monkeypatch.setattr(locks, "hold_off_writers", lambda file: (hold(file), held.append(file.path)))
    with opened_before_the_first_lock(opened, monkeypatch):
        outcome = make_overlays(wanted, SETTINGS, machines)
    assert states(outcome)[-1] == "failed"
    assert f"{opened}: is open for writing in another process" in str(outcome.failures[0])
    assert held == []
    assert not os.path.exists(wanted[-1].path)


@pytest.mark.parametrize("check_mode", [True, False])
@pytest.mark.parametrize("what", ["takes no part", "has its overlay already"])
def test_a_first_disk_in_use_is_refused_in_check_mode_and_in_the_run(tmp_path, disk, what, check_mode):
    wanted, machines, opened = with_a_first_disk(tmp_path, disk, what)
    with qemu.opened_for_writing(opened):
        outcome = make_overlays(wanted, SETTINGS._replace(check_mode=check_mode), machines)
    assert states(outcome)[-1] == "failed"
    assert f"{opened}: is open for writing in another process" in str(outcome.failures[0])
    assert not os.path.exists(wanted[-1].path)


def test_other_vms_of_a_call_that_names_none_are_not_locked(tmp_path, disk):
    theirs = OverlayRequest(str(tmp_path / "theirs.snap"), qemu.create(tmp_path / "theirs"))
    make_overlays([theirs], SETTINGS)
    with qemu.opened_for_writing(theirs.path):
        outcome = make_overlays([theirs, OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert states(outcome) == ["present", "created"]


@pytest.mark.parametrize("make_name", [os.symlink, os.link])
def test_a_file_with_two_names_is_locked_once(tmp_path, disk, make_name):
    other = str(tmp_path / "other")
    make_name(disk, other)
    settings = SETTINGS._replace(seconds=1)
    wanted = [OverlayRequest(str(tmp_path / "a"), disk, vm="a"), OverlayRequest(str(tmp_path / "b"), other, vm="a")]
    machines = {"a": Vm(lambda: None, other)}
    assert states(make_overlays(wanted[:1], settings, machines)) == ["created"]
    assert states(make_overlays(wanted, settings)) == ["present", "created"]


def test_a_vm_that_opens_an_overlay_just_before_it_would_be_locked_is_seen(tmp_path, disk, monkeypatch):
    wanted = OverlayRequest(str(tmp_path / "over"), disk, vm="a", must_be_fresh=True)
    make_overlays([wanted], SETTINGS)
    with opened_before_the_first_lock(wanted.path, monkeypatch):
        outcome = make_overlays([wanted], SETTINGS, {"a": Vm(lambda: None)})
    assert "is open for writing in another process" in str(outcome.failures[0])
