# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Our locks against those of real QEMU processes."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    return base, qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")


def qemu_can_open(path, *options):
    """Whether a QEMU process can open the image, for writing unless told otherwise."""
    command = ["qemu-io", "-f", "qcow2", *options, "-c", "quit", path]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_what_a_vm_holds_is_seen_and_respected(chain):
    base, top = chain
    with qemu.opened_for_writing(top), open_image(base) as base_file, open_image(top) as top_file:
        assert locks.is_locked(top_file, locks.WRITE)
        assert not locks.is_locked(base_file, locks.WRITE)
        assert locks.is_locked(base_file, locks.WRITE_UNSHARED)
        with pytest.raises(Refusal, match="is open for writing in another process"):
            locks.hold_off_writers(top_file)
        locks.hold_off_writers(base_file)
        with pytest.raises(Refusal, match="is below a running VM"):
            locks.hold_off_everybody(base_file)
    with open_image(top) as file:
        assert not locks.is_locked(file, locks.WRITE)


def test_what_we_hold_is_respected_by_qemu(chain):
    base, top = chain
    with open_image(base) as file:
        locks.hold_off_writers(file)
        assert not qemu_can_open(base)
        assert qemu_can_open(base, "-r")
        assert qemu_can_open(top)
        locks.hold_off_everybody(file)
        assert not qemu_can_open(base, "-r")
        assert not qemu_can_open(top)
    assert qemu_can_open(top)
    assert qemu_can_open(base)


def test_a_dead_holder_holds_nothing(chain):
    base, _top = chain
    with open_image(base) as file:
        command = ["qemu-io", "-f", "qcow2", "-c", "sleep 100000", base]
        process = subprocess.Popen(command)
        while not locks.is_locked(file, locks.WRITE):
            assert process.poll() is None
        process.kill()
        process.wait()
        assert not locks.is_locked(file, locks.WRITE)


def test_runs_take_turns(chain):
    base, _top = chain
    inside, most, done = [], [], []

    def run():
        for _round in range(20):
            with open_image(base) as file:
                locks.take_turn(file, 60)
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                done.append(1)

    threads = [threading.Thread(target=run) for _round in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(done) == 80


def test_waiting_for_a_turn_has_an_end(chain):
    base, _top = chain
    with open_image(base) as first, open_image(base) as second:
        locks.take_turn(first, 0)
        with pytest.raises(Refusal, match="another run of this collection"):
            locks.take_turn(second, 0.1)
    with open_image(base) as third:
        locks.take_turn(third, 0)


def test_the_turn_of_an_image_whose_vm_runs_is_one_of_its_own(chain):
    base, _top = chain
    with open_image(base) as first, open_image(base) as second:
        locks.take_turn(first, 0, byte=locks.LIVE_TURN)
        assert not locks.is_locked(second, locks.OUR_TURN)  # or QEMU's locks would be taken for those of a run
        with pytest.raises(Refusal, match="another run of this collection"):
            locks.take_turn(second, 0.1, byte=locks.LIVE_TURN)
    with qemu.opened_for_writing(base), open_image(base) as third:
        locks.take_turn(third, 0, byte=locks.LIVE_TURN)


def test_a_run_that_goes_on_is_waited_for(chain):
    base, _top = chain
    told = iter(range(5))
    with open_image(base) as first, open_image(base) as second:
        locks.take_turn(first, 0)
        begun = time.monotonic()
        with pytest.raises(Refusal, match="another run of this collection"):
            locks.take_turn(second, 0.1, lambda: next(told, "stuck"))
        assert time.monotonic() - begun > 0.3
        assert list(told) == []


def test_a_file_in_work_is_known_as_such_and_waited_for(tmp_path):
    path = str(tmp_path / "ours")
    ours = OpenImage(path, os.open(path, os.O_RDWR | os.O_CREAT))
    with open_image(path) as file:
        assert not locks.is_locked(file, locks.OUR_TURN)
        assert locks.claim(ours)
        assert locks.is_locked(file, locks.OUR_TURN)
        with pytest.raises(Refusal, match="another run of this collection"):  # and not that a VM has it open
            locks.take_turn(file, 0.1)
        ours.close()
        assert not locks.is_locked(file, locks.OUR_TURN)
        locks.take_turn(file, 0)
