# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The QEMU process: what it says, and what becomes of one that dies, hangs or babbles."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor, find_qemu

EMULATOR = "qemu-system-x86_64"
GREETING = '{"QMP": {"version": {"qemu": {"major": %d, "minor": %d, "micro": 0}}, "capabilities": []}}'


def only(*programs):
    """Return a finder to which only these programs exist."""
    return lambda name: shutil.which(name) if name in programs else None


@pytest.mark.parametrize("program", ["qemu-storage-daemon", EMULATOR])
def test_both_kinds_of_qemu_answer(program):
    command = find_qemu(only(program))
    assert os.path.basename(command[0]) == program
    monitor = Monitor(command, 30)
    assert monitor.command("query-named-block-nodes") == []
    with pytest.raises(Refusal, match="QEMU says: .*nonsense"):
        monitor.command("nonsense")
    with pytest.raises(Refusal, match="QEMU says: .*No such file or directory. Check that its folder is"):
        monitor.command("blockdev-add", {"driver": "file", "node-name": "x", "filename": "/does/not/exist"})
    full = {"driver": "blkdebug", "image": {"driver": "null-co"}, "inject-error": [{"event": "none", "errno": 28}]}
    with pytest.raises(Refusal, match="QEMU says: .*No space left on device. Check the space"):
        monitor.command("blockdev-add", {"driver": "qcow2", "node-name": "y", "file": full})
    with pytest.raises(Refusal, match="QEMU says: .*value 'zopfli'.*leave it out"):
        monitor.command("blockdev-add", {"driver": "zopfli", "node-name": "z"})
    assert monitor.command("query-jobs") == []
    monitor.close()
    assert monitor._process.returncode is not None


def test_answers_come_in_the_order_of_the_commands_and_a_failed_one_does_not_stop_the_others():
    monitor = Monitor(find_qemu(shutil.which), 30)
    for number in range(20):
        monitor.send("blockdev-add", {"driver": "null-co", "node-name": f"n{number}", "size": number})
    monitor.send("blockdev-del", {"node-name": "nothing"})
    monitor.send("query-named-block-nodes", {"flat": True})
    for _number in range(20):
        assert monitor.receive() == {}
    with pytest.raises(Refusal, match="nothing"):
        monitor.receive()
    assert len(monitor.receive()) == 20
    monitor.send("blockdev-del", {"node-name": "nothing"})
    with pytest.raises(Refusal, match="nothing"):
        monitor.receive_rest()
    monitor.receive_rest()
    monitor.close()


def test_without_qemu_there_is_a_way_out():
    with pytest.raises(Refusal, match="no QEMU found.*Install"):
        find_qemu(only())


def test_the_error_of_a_job_is_qemus_own(tmp_path):
    path = tmp_path / "x"
    path.touch()
    monitor = Monitor(find_qemu(shutil.which), 30)
    monitor.command("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(path)})
    options = {"driver": "qcow2", "file": "f", "size": 1 << 62, "cluster-size": 512}
    with pytest.raises(Refusal, match="QEMU says: .*size"):
        monitor.run_job("blockdev-create", "create", {"options": options})
    monitor.run_job("blockdev-create", "create", {"options": {**options, "size": 1 << 20}})
    monitor.close()


def fake(tmp_path, script):
    """Return the command of a program that stands for a broken QEMU."""
    path = tmp_path / "qemu-broken"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return [str(path)]


BROKEN = {
    "dies at once": ("echo cannot allocate >&2; exit 3", "ended with status 3. It says: cannot allocate"),
    "hangs at once": ("exec sleep 1000", "gave no answer for 1 s and was killed"),
    "hangs later": (f"echo '{GREETING % (9, 0)}'; exec sleep 1000", "gave no answer for 1 s and was killed"),
    "babbles": ("echo hello; exec sleep 1000", "could not be talked to"),
    "floods": ('while :; do echo \'{"event": "X"}\'; done', "gave no answer for 1 s and was killed"),
    "is too old": (f"echo '{GREETING % (4, 2)}'; exec sleep 1000", "is version 4.2, too old. At least 5.2"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_qemu_is_ended_and_reported(tmp_path, how):
    script, expected = BROKEN[how]
    start = time.monotonic()
    with pytest.raises(Refusal, match=expected):
        Monitor(fake(tmp_path, script), 1).command("query-jobs")
    assert time.monotonic() - start < 10
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False, capture_output=True).returncode == 1


def test_a_qemu_that_does_not_read_is_ended_too(tmp_path):
    script = f"echo '{GREETING % (9, 0)}'; read x; echo '{{\"return\": {{}}}}'; exec sleep 1000"
    monitor = Monitor(fake(tmp_path, script), 1)
    with pytest.raises(Refusal, match="gave no answer for 1 s"):
        monitor.command("transaction", {"actions": ["x" * 1000] * 1000})
    monitor.close()


def test_a_program_that_cannot_be_started_is_named(tmp_path):
    with pytest.raises(Refusal, match="/nowhere/qemu: cannot be started"):
        Monitor(["/nowhere/qemu"], 1)


def test_qemu_dies_with_its_parent():
    script = (
        "import os, shutil, signal\n"
        "from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import *\n"
        "m = Monitor(find_qemu(shutil.which), 30); print(m._process.pid, flush=True); signal.pause()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and "Z" not in open(f"/proc/{child}/stat").read().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_long_answer_comes_whole_and_those_after_it_in_turn(tmp_path):
    script = (
        f"echo '{GREETING % (9, 0)}'; read x; echo '{{\"return\": {{}}}}'; read x; printf '{{\"return\": \"'\n"
        "head -c 3000000 /dev/zero | tr '\\0' x; "
        'printf \'"}\\n{"return": 2}\\n{"return"\'; sleep 0.2; echo \': 3}\'; exec sleep 1000'
    )
    monitor = Monitor(fake(tmp_path, script), 20)
    for _number in range(3):
        monitor.send("query")
    assert monitor.receive() == "x" * 3000000
    assert [monitor.receive(), monitor.receive()] == [2, 3]
    monitor.close()
