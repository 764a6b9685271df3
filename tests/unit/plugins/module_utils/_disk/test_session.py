# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The session with another operation than making overlays: retiring images, by renaming them aside."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import typing as t

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    Interrupted,
    ending_cleanly,
    stop_here_if_asked,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import Batch, run, run_all
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Images, Settings, Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import FAILED, Need, problem_fields

from .. import qemu

SETTINGS = Settings(check_mode=False, seconds=60, find_program=shutil.which)


class Request(t.NamedTuple):
    path: str
    vm: str | None = None


class Verdict(t.NamedTuple):
    request: Request
    state: str
    problems: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    need: None = None

    @property
    def changed(self):
        return self.state == "retired"

    def failed(self, *problems):
        return self._replace(state=FAILED, problems=(*self.problems, *problems))

    def as_result(self):
        return {"path": self.request.path, "state": self.state, **problem_fields(self.problems)}

    def as_diff(self):
        return self.request.path, f"{self.request.path}.kept"


class Retire:
    """An operation with two phases, which notes what it is asked to do."""

    def __init__(self, broken=()):
        self.notes = []
        self.broken = broken  # names of images at which the second phase fails

    def problems(self, request):
        return [] if request.path.startswith("/") else [Refusal("bad_name", request.path, "is no absolute path")]

    def conflicts(self, requests):
        return [None for _request in requests]

    def folders(self, request):
        return [os.path.dirname(request.path)]

    def refused(self, request, problems):
        return Verdict(request, FAILED, tuple(problems))

    def judge(self, request, held):
        if not os.path.exists(request.path):
            return Verdict(request, "absent")
        held.image(request.path)
        return Verdict(request, "retired")

    def images(self, verdict):
        return Images((verdict.request.path,), frozenset([verdict.request.path]))

    def rehearse(self, verdict, _held):
        return self._note("rehearse", verdict)

    def phases(self):
        return [self.keep, self.act]

    def keep(self, verdict, _held):
        assert not qemu_can_write(verdict.request.path)
        return self._note("keep", verdict)

    def act(self, verdict, _held):
        if os.path.basename(verdict.request.path) in self.broken:
            raise Refusal("storage", verdict.request.path, "cannot be kept")
        return self._note("act", verdict)

    def publish(self, verdicts, _held, switch):
        self.notes.append("publish")
        for verdict in verdicts:
            os.rename(verdict.request.path, f"{verdict.request.path}.kept")
        switch()
        return verdicts

    def _note(self, what, verdict):
        self.notes.append(f"{what} {os.path.basename(verdict.request.path)}")
        return verdict


def qemu_can_write(path):
    """Whether a QEMU process can open the image for writing."""
    command = ["qemu-io", "-f", "qcow2", "-c", "quit", path]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture(name="images")
def fixture_images(tmp_path):
    return [qemu.create(tmp_path / name, "1M") for name in "abc"]


def requests(images, vms=("x", "x", "y")):
    return [Request(path, vm) for path, vm in zip(images, vms)]


def states(outcome):
    return [verdict.state for verdict in outcome.verdicts]


def test_each_phase_is_taken_for_all_disks_of_a_vm_before_the_next_begins(images, tmp_path):
    operation = Retire()
    outcome = run(operation, requests(images), SETTINGS)
    assert operation.notes == ["keep a", "keep b", "act a", "act b", "publish", "keep c", "act c", "publish"]
    assert sorted(os.listdir(tmp_path)) == ["a.kept", "b.kept", "c.kept"]
    assert outcome.as_result("images") == {
        "changed": True,
        "images": [{"path": path, "state": "retired"} for path in images],
        "diff": {"before": {path: path for path in images}, "after": {path: f"{path}.kept" for path in images}},
    }
    again = run(Retire(), requests(images), SETTINGS)
    assert states(again) == ["absent"] * 3
    assert not again.as_result("images")["changed"]


def test_check_mode_rehearses_and_predicts(images, tmp_path):
    operation = Retire()
    predicted = run(operation, requests(images), SETTINGS._replace(check_mode=True))
    assert operation.notes == ["rehearse a", "rehearse b", "rehearse c"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
    assert run(Retire(), requests(images), SETTINGS).as_result("x") == predicted.as_result("x")


def test_one_that_fails_fails_its_vm_only(images, tmp_path):
    outcome = run(Retire(broken=["b"]), requests(images), SETTINGS)
    assert states(outcome) == ["failed", "failed", "retired"]
    assert [failure.code for failure in outcome.failures] == ["storage"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c.kept"]


def test_an_image_in_use_stops_its_vm_before_anything_is_done(images, tmp_path):
    operation = Retire()
    with qemu.opened_for_writing(images[1]):
        outcome = run(operation, requests(images), SETTINGS)
    assert states(outcome) == ["failed", "failed", "retired"]
    assert {failure.code for failure in outcome.failures} == {"in_use"}
    assert operation.notes == ["keep c", "act c", "publish"]


def test_a_signal_ends_the_run_between_two_vms(images, tmp_path):
    with ending_cleanly():
        vms = {"x": Vm(lambda: os.kill(os.getpid(), signal.SIGTERM))}
        outcome = run(Retire(), requests(images), SETTINGS, vms)
    assert states(outcome) == ["retired", "retired", "failed"]
    assert [failure.code for failure in outcome.failures] == ["interrupted"]
    assert sorted(os.listdir(tmp_path)) == ["a.kept", "b.kept", "c"]


def test_a_signal_that_one_vm_has_taken_ends_the_run_all_the_same(images, tmp_path):
    def take_it():
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(Interrupted):
            stop_here_if_asked()

    with ending_cleanly():
        outcome = run(Retire(), requests(images), SETTINGS, {"x": Vm(take_it)})
    assert states(outcome) == ["retired", "retired", "failed"]
    assert sorted(os.listdir(tmp_path)) == ["a.kept", "b.kept", "c"]
    assert states(run(Retire(), requests(images[2:]), SETTINGS)) == ["retired"]  # the signal is not the next run's


def test_a_vm_that_is_not_what_was_planned_is_left_alone_by_every_phase(images, tmp_path):
    def changed():
        raise Refusal("changed_meanwhile", "x", "was changed meanwhile")

    operation = Retire()
    check = SETTINGS._replace(check_mode=True)
    assert states(run(operation, requests(images), check, {"x": Vm(lambda: None, None, changed)})) == ["retired"] * 3
    operation = Retire()
    outcome = run(operation, requests(images), SETTINGS, {"x": Vm(lambda: None, None, changed)})
    assert states(outcome) == ["failed", "failed", "retired"]
    assert [failure.code for failure in outcome.failures] == ["changed_meanwhile"]
    assert operation.notes == ["keep c", "act c", "publish"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c.kept"]


def test_a_request_that_cannot_be_is_refused_without_a_look():
    outcome = run(Retire(), [Request("relative")], SETTINGS)
    assert outcome.as_result("x")["x"] == [
        {"path": "relative", "state": "failed", "msg": "relative: is no absolute path.", "code": "bad_name"}
    ]


def test_two_operations_share_one_call(images, tmp_path):
    first, second = Retire(), Retire()
    batches = [Batch(first, requests(images[:1], ["x"])), Batch(second, requests(images[1:], ["y", "z"]))]
    with ending_cleanly():
        run_all(batches, SETTINGS, {"y": Vm(lambda: os.kill(os.getpid(), signal.SIGTERM))})
    assert [states(batch.outcome()) for batch in batches] == [["retired"], ["retired", "failed"]]
    assert first.notes == ["keep a", "act a", "publish"]
    assert second.notes == ["keep b", "act b", "publish"]  # the signal ends the call, whatever is done to the others


def test_two_operations_share_the_space(images, monkeypatch):
    need = Need(device=1, folder="/", bytes=6, free=10)
    monkeypatch.setattr(Verdict, "need", need)
    batches = [Batch(Retire(), requests(images[:1], ["x"])), Batch(Retire(), requests(images[1:], ["y", "z"]))]
    run_all(batches, SETTINGS, {})
    assert [states(batch.outcome()) for batch in batches] == [["retired"], ["failed", "failed"]]
