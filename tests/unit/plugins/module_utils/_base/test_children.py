# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several things side by side: their results, their failures, signals, and a parent that is killed."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.children import side_by_side
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import QemuError, Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    Interrupted,
    ending_cleanly,
    interruptible,
)

REFUSALS = [
    Refusal("in_use", "/srv/a", "is open", "Shut it down."),
    QemuError("qemu_lost", "it is gone", "Look."),
    UnknownOutcomeError("/srv/a", "half done", ""),
]


def results_of(tasks, at_a_time):
    found = {}
    side_by_side(tasks, at_a_time, found.__setitem__, print)
    return found


def square(number):
    return number**2, os.getpid()


@pytest.mark.parametrize("at_a_time", [1, 2, 9])
def test_each_result_has_the_number_of_its_task_and_comes_from_a_process_of_its_own(at_a_time):
    found = results_of([functools.partial(square, number) for number in range(7)], at_a_time)
    assert {number: result for number, (result, _pid) in found.items()} == {number: number**2 for number in range(7)}
    assert len({pid for _result, pid in found.values()} - {os.getpid()}) == 7


def test_no_more_run_at_a_time_than_are_allowed(tmp_path):
    def count(number):
        (tmp_path / str(number)).touch()
        running = len(list(tmp_path.iterdir()))
        time.sleep(0.05)
        (tmp_path / str(number)).unlink()
        return running

    assert max(results_of([functools.partial(count, number) for number in range(8)], 2).values()) == 2


def test_a_large_result_comes_whole():
    assert results_of([lambda: b"x" * (5 << 20)], 1) == {0: b"x" * (5 << 20)}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda one: type(one).__name__)
def test_what_a_task_raises_is_raised_when_the_others_have_ended(refusal):
    def fail():
        raise refusal

    found = {}
    with pytest.raises(type(refusal)) as caught:
        side_by_side([fail, lambda: time.sleep(0.1)], 2, found.__setitem__, print)
    assert (caught.value, str(caught.value), found) == (refusal, str(refusal), {1: None})


def test_a_process_that_is_killed_is_told_and_the_others_go_on():
    found, lost = {}, {}
    tasks = [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: "done"]
    side_by_side(tasks, 1, found.__setitem__, lost.__setitem__)
    assert (found, lost) == ({1: "done"}, {0: "SIGKILL"})


def test_a_process_that_ends_without_an_answer_is_a_failure():
    with pytest.raises(RuntimeError, match="without an answer"):
        side_by_side([lambda: os._exit(0)], 1, print, print)


def wait_until_told():
    try:
        with interruptible():
            time.sleep(30)
    except Interrupted:
        return "told"
    return "slept"


def test_a_run_that_is_told_to_end_tells_its_processes_and_waits_for_them():
    found, begun = {}, time.monotonic()
    tasks = [lambda: os.kill(os.getppid(), signal.SIGTERM), wait_until_told, lambda: "never begun"]
    with ending_cleanly(), pytest.raises(Interrupted):
        side_by_side(tasks, 2, found.__setitem__, print)
    assert (found, time.monotonic() - begun < 10) == ({0: None, 1: "told"}, True)


def test_processes_die_with_the_one_that_began_them(tmp_path):
    code = (
        "import os, time\n"
        "from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.children import side_by_side\n"
        f"def task():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
        "side_by_side([task], 1, print, print)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")
