# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole way on real images with real QEMU, without Ansible around it."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Qcow2Error, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import Interrupted, ending_cleanly
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import publish as _publish
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import session as _overlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import make_overlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings, Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import Creation, OverlayRequest, needed_bytes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks as _locks
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import nodes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu

SETTINGS = Settings(check_mode=False, seconds=60, find_program=shutil.which, ownership=AttributeOptions())
BITMAPS = [
    Bitmap("fine", 65536, True, False),
    Bitmap("coarse", 1 << 21, True, False),
    Bitmap("disabled", 65536, False, False),
    Bitmap("broken", 65536, True, True),
]
CARRIED = {("fine", 65536, True, False), ("coarse", 1 << 21, True, False)}


@pytest.fixture(name="disk")
def fixture_disk(tmp_path):
    path = qemu.create(tmp_path / "active.qcow2", "1G")
    qemu.add_bitmaps(path, BITMAPS)
    return path


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def states(outcome):
    return [verdict.state for verdict in outcome.verdicts]


@pytest.mark.parametrize("program", ["qemu-storage-daemon", "qemu-system-x86_64"])
def test_check_do_check_again_do_again(tmp_path, disk, program):
    settings = SETTINGS._replace(find_program=lambda name: shutil.which(name) if name == program else None)
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    before = digest(disk)
    predicted = make_overlays(wanted, settings._replace(check_mode=True))
    assert os.listdir(tmp_path) == ["active.qcow2"]
    done = make_overlays(wanted, settings)
    assert done.as_result() == predicted.as_result()
    assert states(done) == ["created"]
    assert qemu.bitmaps_of(tmp_path / "over") == CARRIED
    without_qemu = settings._replace(find_program=lambda _name: None)
    for check_mode in (True, False):
        again = make_overlays(wanted, without_qemu._replace(check_mode=check_mode))
        assert states(again) == ["present"]
        assert not again.as_result()["changed"]
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


@pytest.mark.parametrize("seed", range(60))
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


def test_one_vm_fails_whole_and_the_other_is_made(tmp_path, disk):
    (tmp_path / "taken").write_text("theirs")
    wanted = [
        OverlayRequest(str(tmp_path / "a1"), disk, vm="a"),
        OverlayRequest(str(tmp_path / "b1"), disk, vm="b"),
        OverlayRequest(str(tmp_path / "taken"), disk, vm="a"),
    ]
    predicted = make_overlays(wanted, SETTINGS._replace(check_mode=True))
    outcome = make_overlays(wanted, SETTINGS)
    assert states(outcome) == states(predicted) == ["failed", "created", "failed"]
    assert outcome.as_result() == predicted.as_result()
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b1", "taken"]


@pytest.mark.parametrize("step", ["fill", "apply_attributes", "_read_back", "publish_together"])
@pytest.mark.parametrize("error", [Qcow2Error("/x: because"), OSError(28, "No space left on device")])
def test_a_failure_at_any_step_leaves_nothing_and_does_not_stop_other_vms(tmp_path, disk, monkeypatch, step, error):
    real, calls = getattr(_overlays, step), []

    def failing(*args):
        calls.append(args)
        if len(calls) == (1 if step == "publish_together" else 2):
            raise error
        return real(*args)

    monkeypatch.setattr(_overlays, step, failing)
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name[0]) for name in ("a1", "a2", "b1", "b2")]
    outcome = make_overlays(wanted, SETTINGS)
    assert states(outcome) == ["failed", "failed", "created", "created"]
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b1", "b2"]
    assert "because" in outcome.failures[-1] or "No space" in outcome.failures[-1]


@pytest.mark.parametrize("command", ["blockdev-add", "blockdev-create", "transaction", "blockdev-del", "query-jobs"])
def test_a_qemu_that_is_killed_fails_that_vm_only(tmp_path, disk, monkeypatch, command):
    real, calls = Monitor.send, []

    def killing(self, name, *args):
        if name == command and not calls:
            calls.append(name)
            self._process.kill()
        return real(self, name, *args)

    monkeypatch.setattr(Monitor, "send", killing)
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name) for name in ("a", "b")]
    outcome = make_overlays(wanted, SETTINGS)
    assert states(outcome) == ["failed", "created"]
    assert "ended with status -9" in outcome.failures[0] or "could not be talked to" in outcome.failures[0]
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b"]


def test_bitmaps_that_qemu_loses_silently_are_noticed(tmp_path, disk, monkeypatch):
    real = Monitor.send

    def losing(self, name, arguments=None, *args):
        if name == "transaction":
            arguments = {"actions": arguments["actions"][:-1]}
        return real(self, name, arguments, *args)

    monkeypatch.setattr(Monitor, "send", losing)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert states(outcome) == ["failed"]
    assert "is missing or different" in outcome.failures[0]
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
    assert predicted.as_result() == outcome.as_result()
    assert "QEMU sees other bitmaps" in outcome.failures[0]
    assert os.listdir(tmp_path) == ["active.qcow2"]


def test_an_active_that_is_replaced_meanwhile_is_noticed(tmp_path, disk, monkeypatch):
    real = _overlays.fill

    def replacing(*args):
        os.rename(disk, tmp_path / "old")
        shutil.copy(tmp_path / "old", disk)
        real(*args)

    monkeypatch.setattr(_overlays, "fill", replacing)
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert "was moved or replaced" in outcome.failures[0]
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "old"]


RUN = """
import shutil, sys
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import make_overlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import OverlayRequest
settings = Settings(False, 60, shutil.which, AttributeOptions())
pairs = zip(sys.argv[1::2], sys.argv[2::2])
outcome = make_overlays([OverlayRequest(path, active) for active, path in pairs], settings)
print(" ".join(verdict.state for verdict in outcome.verdicts), *outcome.failures)
"""


def start_run(active, *paths):
    """Start a run for overlays of one ACTIVE."""
    return start_run_pairs(*(word for path in paths for word in (active, path)))


def start_run_pairs(*pairs):
    """Start a run for pairs of ACTIVE and OVERLAY in a process, and a process group, of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUN, *map(str, pairs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_of_runs_that_race_one_creates_and_the_others_find_it(tmp_path, disk):
    for attempt in range(8):
        path = tmp_path / f"over-{attempt}"
        runs = [start_run(disk, path) for _round in range(3)]
        said = collections.Counter(run.communicate()[0].strip() for run in runs)
        assert said == {"created": 1, "present": 2}
    assert len(os.listdir(tmp_path)) == 9


@pytest.mark.parametrize("whole_group", [True, False], ids=["with its QEMU", "alone"])
def test_a_killed_run_leaves_all_or_nothing_and_the_next_completes(tmp_path, disk, whole_group):
    dice, before = random.Random(7), digest(disk)
    paths = [tmp_path / f"over-{number}" for number in range(3)]
    for _round in range(25):
        run = start_run(disk, *paths)
        time.sleep(dice.uniform(0.0, 0.25))
        (os.killpg if whole_group else os.kill)(run.pid, signal.SIGKILL)
        run.communicate()
        for path in paths:
            assert not path.exists() or qemu.bitmaps_of(path) == CARRIED
        start_run(disk, *paths).communicate()
        assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "over-0", "over-1", "over-2"]
        for path in paths:
            assert qemu.bitmaps_of(path) == CARRIED
            path.unlink()
    assert digest(disk) == before


def test_runs_that_want_the_same_disks_in_another_order_do_not_wait_for_each_other(tmp_path, disk):
    other = qemu.create(tmp_path / "other.qcow2", "1G")
    for attempt in range(5):
        first = start_run_pairs(disk, tmp_path / f"a{attempt}", other, tmp_path / f"b{attempt}")
        second = start_run_pairs(other, tmp_path / f"c{attempt}", disk, tmp_path / f"d{attempt}")
        assert [run.communicate()[0].strip() for run in (first, second)] == ["created created"] * 2


def test_an_overlay_is_present_also_while_a_vm_opens_and_closes_it(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / "over"), disk)]
    make_overlays(wanted, SETTINGS)
    loop = f"while :; do qemu-io -f qcow2 -c 'write 0 64k' {tmp_path}/over; done"
    vm = subprocess.Popen(["sh", "-c", loop], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 4
        looks = []
        while time.monotonic() < end:
            looks.append(tuple(make_overlays(wanted, SETTINGS).failures))
    finally:
        os.killpg(vm.pid, signal.SIGKILL)
        vm.wait()
    assert len(looks) > 100
    assert set(looks) == {()}


def test_a_relative_overlay_of_a_symlinked_active_opens(tmp_path, disk):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "active").symlink_to(disk)
    wanted = OverlayRequest(str(tmp_path / "links" / "over"), str(tmp_path / "links" / "active"), relative=True)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]
    assert qemu.info(tmp_path / "links" / "over")["backing-filename"] == "../active.qcow2"
    qemu.qemu_img("info", "--backing-chain", str(tmp_path / "links" / "over"))
    assert states(make_overlays([wanted], SETTINGS)) == ["present"]


def test_a_proc_of_another_namespace_is_not_trusted(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(nodes, "os", types.SimpleNamespace(**{**vars(os), "getpid": lambda: 1}))
    outcome = make_overlays([OverlayRequest(str(tmp_path / "over"), disk)], SETTINGS)
    assert "/proc: is missing, or not that of" in outcome.failures[0]


def test_a_run_that_is_told_to_end_says_what_it_has_made(tmp_path, disk, monkeypatch):
    real, calls = _overlays.publish_together, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Interrupted("SIGTERM")
        real(*args)

    monkeypatch.setattr(_overlays, "publish_together", interrupted)
    outcome = make_overlays([OverlayRequest(str(tmp_path / name), disk, vm=name) for name in "abc"], SETTINGS)
    assert states(outcome) == ["created", "failed", "failed"]
    assert outcome.as_result()["changed"]
    assert "was ended by SIGTERM" in outcome.failures[0]
    assert sorted(os.listdir(tmp_path)) == ["a", "active.qcow2"]


def test_hundreds_of_disks_fit_into_one_call(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        wanted = []
        for number in range(40):
            active = qemu.create(tmp_path / f"active{number}", "1M")
            wanted.append(OverlayRequest(str(tmp_path / f"over{number}"), active))
        assert set(states(make_overlays(wanted, SETTINGS))) == {"created"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def finishing(tmp_path, done, error=None):
    """Return what finishes a VM: it notes what is there, and that the VM cannot start meanwhile, and may fail."""

    def finish():
        done.append(sorted(name for name in os.listdir(tmp_path) if not name.startswith(".")))
        active = tmp_path / "active.qcow2"
        started = subprocess.run(["qemu-io", "-c", "quit", active], check=False, capture_output=True)
        assert b'Failed to get "write" lock' in started.stderr
        if error:
            raise error

    return finish


def test_a_vm_is_finished_once_all_its_overlays_are_there_and_while_it_cannot_start(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name[0]) for name in ("a1", "b1", "a2")]
    done = []
    machines = {"a": Vm(finishing(tmp_path, done))}
    predicted = make_overlays(wanted, SETTINGS._replace(check_mode=True), machines)
    assert done == []
    outcome = make_overlays(wanted, SETTINGS, machines)
    assert outcome.as_result() == predicted.as_result()
    assert done[0] == ["a1", "a2", "active.qcow2"]
    # Once more, since the VM may still have to be finished although its overlays are there: a run can be killed.
    again = make_overlays(wanted, SETTINGS._replace(find_program=lambda _name: None), machines)
    assert (states(again), len(done)) == (["present"] * 3, 2)


def test_overlays_of_a_vm_that_cannot_be_finished_are_removed_again(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name) for name in ("a", "b")]
    outcome = make_overlays(wanted, SETTINGS, {"a": Vm(finishing(tmp_path, [], Qcow2Error("libvirt says no")))})
    assert states(outcome) == ["failed", "created"]
    assert outcome.failures == ["libvirt says no"]
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b"]
    # One that was there before stays.
    outcome = make_overlays(wanted, SETTINGS, {"b": Vm(finishing(tmp_path, [], Qcow2Error("libvirt says no")))})
    assert states(outcome) == ["created", "failed"]
    assert sorted(os.listdir(tmp_path)) == ["a", "active.qcow2", "b"]


def test_overlays_that_may_be_in_use_already_stay(tmp_path, disk):
    machines = {"a": Vm(finishing(tmp_path, [], UnknownOutcomeError("half done")))}
    outcome = make_overlays([OverlayRequest(str(tmp_path / "a"), disk, vm="a")], SETTINGS, machines)
    assert (states(outcome), outcome.failures) == (["failed"], ["half done"])
    assert sorted(os.listdir(tmp_path)) == ["a", "active.qcow2"]


def test_a_vm_of_which_an_overlay_fails_is_not_finished(tmp_path, disk):
    (tmp_path / "a2").write_text("theirs")
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm="a") for name in ("a1", "a2")]
    make_overlays(wanted[:1], SETTINGS)
    done = []
    outcome = make_overlays(wanted, SETTINGS, {"a": Vm(finishing(tmp_path, done))})
    assert (states(outcome), done) == (["present", "failed"], [])


def test_a_signal_waits_until_the_vm_is_finished(tmp_path, disk):
    def finish():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        (tmp_path / "finished").touch()

    with ending_cleanly():
        wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name) for name in "ab"]
        outcome = make_overlays(wanted, SETTINGS, {"a": Vm(finish)})
    assert sorted(os.listdir(tmp_path)) == ["a", "active.qcow2", "finished"]
    # What was made is said to be made.
    assert states(outcome) == ["created", "failed"]
    assert outcome.as_result()["changed"]


def test_an_overlay_that_a_vm_has_written_to_is_not_taken_for_a_new_one(tmp_path, disk):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    assert states(make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS)) == ["present"]
    subprocess.run(["qemu-io", "-c", "write 0 512", wanted.path], check=True, stdout=subprocess.DEVNULL)
    assert states(make_overlays([wanted], SETTINGS)) == ["present"]
    outcome = make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS)
    assert "it holds data, so a VM has run on it" in outcome.failures[0]


class StartedVM:
    """A VM of two disks that somebody starts whenever images are about to be locked or released."""

    def __init__(self, monkeypatch, *disks):
        self._disks = disks  # by definition: the paths of both
        self.tries = 0
        for module, name in ((_locks, "hold_off_writers"), (_overlays, "close_image"), (_publish, "close_image")):
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
    take_turn = _locks.take_turn
    with contextlib.ExitStack() as vm:

        def start_vm(*arguments):
            vm.enter_context(qemu.opened_for_writing(path))
            monkeypatch.setattr(_locks, "take_turn", take_turn)
            take_turn(*arguments)

        monkeypatch.setattr(_locks, "take_turn", start_vm)
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
    hold = _locks.hold_off_writers
    held = []
    monkeypatch.setattr(_locks, "hold_off_writers", lambda fd, path: (hold(fd, path), held.append(path)))
    with opened_before_the_first_lock(opened, monkeypatch):
        outcome = make_overlays(wanted, SETTINGS, machines)
    assert states(outcome)[-1] == "failed"
    assert f"{opened}: is open for writing in another process" in outcome.failures[0]
    assert held == []
    assert not os.path.exists(wanted[-1].path)


@pytest.mark.parametrize("check_mode", [True, False])
@pytest.mark.parametrize("what", ["takes no part", "has its overlay already"])
def test_a_first_disk_in_use_is_refused_in_check_mode_and_in_the_run(tmp_path, disk, what, check_mode):
    wanted, machines, opened = with_a_first_disk(tmp_path, disk, what)
    with qemu.opened_for_writing(opened):
        outcome = make_overlays(wanted, SETTINGS._replace(check_mode=check_mode), machines)
    assert states(outcome)[-1] == "failed"
    assert f"{opened}: is open for writing in another process" in outcome.failures[0]
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
    assert "is open for writing in another process" in outcome.failures[0]


def signs_of_use(path, what):
    """Have an overlay that was just made show that it is none."""
    if what == "a checkpoint":
        qemu.add_bitmaps(path, [Bitmap("later", 65536, True, False)])
    elif what == "another size":
        qemu.qemu_img("resize", "-q", path, "2G")
    elif what == "encrypted":
        qemu.patch(path, 32, struct.pack(">I", 2))
    elif what == "not closed":
        qemu.patch(path, 72, struct.pack(">Q", 1))


SIGNS = {
    "a checkpoint": "it has the bitmap 'later', made while a VM ran on it",
    "another size": "its virtual size is 2147483648, not ACTIVE's 1073741824",
    "encrypted": "it is encrypted",
    "not closed": "was not closed properly",
}


@pytest.mark.parametrize("what", SIGNS)
def test_an_overlay_with_a_sign_of_use_is_not_taken_for_a_new_one(tmp_path, disk, what):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    signs_of_use(wanted.path, what)
    assert SIGNS[what] in make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS).failures[0]


def test_an_overlay_that_is_open_is_not_taken_for_a_new_one(tmp_path, disk):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    with qemu.opened_for_writing(wanted.path):
        assert states(make_overlays([wanted], SETTINGS)) == ["present"]
        assert "open for writing" in make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS).failures[0]
