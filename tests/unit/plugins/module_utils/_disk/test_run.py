# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All VMs of a call: all or none, failures at every step, races, signals."""

from __future__ import annotations

import collections
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import Interrupted, ending_cleanly
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import build
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu
from .overlays import CARRIED, SETTINGS, digest, make_overlays, states

LIBVIRT_SAYS_NO = Refusal("not_switched", "a", "libvirt says no")


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
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b1", "taken"]


@pytest.mark.parametrize("step", ["create_image", "apply_attributes", "read_image", "publish_together"])
@pytest.mark.parametrize("error", [Refusal("damaged", "/x", "because"), OSError(28, "No space left on device")])
def test_a_failure_at_any_step_leaves_nothing_and_does_not_stop_other_vms(tmp_path, disk, monkeypatch, step, error):
    real, calls = getattr(build, step), []

    def failing(*args):
        calls.append(args)
        if len(calls) == (1 if step == "publish_together" else 2):
            raise error
        return real(*args)

    monkeypatch.setattr(build, step, failing)
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name[0]) for name in ("a1", "a2", "b1", "b2")]
    outcome = make_overlays(wanted, SETTINGS)
    assert states(outcome) == ["failed", "failed", "created", "created"], (outcome.failures, outcome.warnings)
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b1", "b2"]
    assert [failure.code for failure in outcome.failures][-1] == ("damaged" if "because" in str(error) else "no_space")


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
    assert "ended with status -9" in str(outcome.failures[0]) or "could not be talked to" in str(outcome.failures[0])
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b"]


RUN = """
import shutil, sys
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
settings = Settings(False, 60, shutil.which)
pairs = zip(sys.argv[1::2], sys.argv[2::2])
requests = [OverlayRequest(path, active) for active, path in pairs]
outcome = run(MakeOverlays(AttributeOptions()), requests, settings)
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


def test_a_run_that_is_told_to_end_says_what_it_has_made(tmp_path, disk, monkeypatch):
    real, calls = build.publish_together, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Interrupted("SIGTERM")
        real(*args)

    monkeypatch.setattr(build, "publish_together", interrupted)
    outcome = make_overlays([OverlayRequest(str(tmp_path / name), disk, vm=name) for name in "abc"], SETTINGS)
    assert states(outcome) == ["created", "failed", "failed"]
    assert outcome.as_result("overlays")["changed"]
    assert "was ended by SIGTERM" in str(outcome.failures[0])
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
    assert outcome.as_result("overlays") == predicted.as_result("overlays")
    assert done[0] == ["a1", "a2", "active.qcow2"]
    # Once more, since the VM may still have to be finished although its overlays are there: a run can be killed.
    again = make_overlays(wanted, SETTINGS._replace(find_program=lambda _name: None), machines)
    assert (states(again), len(done)) == (["present"] * 3, 2)


def test_an_overlay_that_another_run_publishes_just_now_is_waited_for(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / "a"), disk, vm="a", must_be_fresh=True)]
    meanwhile = []

    def second_run():
        vms = {"a": Vm(lambda: None)}
        meanwhile.append(make_overlays(wanted, SETTINGS._replace(seconds=0.3), vms))

    first = make_overlays(wanted, SETTINGS, {"a": Vm(second_run)})
    assert (states(first), states(meanwhile[0])) == (["created"], ["failed"])
    assert [failure.code for failure in meanwhile[0].failures] == ["other_run"]  # not that a VM has it open


def test_overlays_of_a_vm_that_cannot_be_finished_are_removed_again(tmp_path, disk):
    wanted = [OverlayRequest(str(tmp_path / name), disk, vm=name) for name in ("a", "b")]
    outcome = make_overlays(wanted, SETTINGS, {"a": Vm(finishing(tmp_path, [], LIBVIRT_SAYS_NO))})
    assert states(outcome) == ["failed", "created"]
    assert outcome.failures == [LIBVIRT_SAYS_NO]
    assert sorted(os.listdir(tmp_path)) == ["active.qcow2", "b"]
    # One that was there before stays.
    outcome = make_overlays(wanted, SETTINGS, {"b": Vm(finishing(tmp_path, [], LIBVIRT_SAYS_NO))})
    assert states(outcome) == ["created", "failed"]
    assert sorted(os.listdir(tmp_path)) == ["a", "active.qcow2", "b"]


def test_overlays_that_may_be_in_use_already_stay(tmp_path, disk):
    machines = {"a": Vm(finishing(tmp_path, [], UnknownOutcomeError("a", "half done", "")))}
    outcome = make_overlays([OverlayRequest(str(tmp_path / "a"), disk, vm="a")], SETTINGS, machines)
    assert (states(outcome), outcome.failures) == (["failed"], [UnknownOutcomeError("a", "half done", "")])
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
    assert outcome.as_result("overlays")["changed"]
