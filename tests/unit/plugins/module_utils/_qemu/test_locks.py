# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Our locks against those of real QEMU processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Qcow2Error
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks as _locks

from .. import qemu


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    return base, qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")


@contextlib.contextmanager
def opened(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def qemu_can_open(path, *options):
    """Whether a QEMU process can open the image, for writing unless told otherwise."""
    command = ["qemu-io", "-f", "qcow2", *options, "-c", "quit", path]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_what_a_vm_holds_is_seen_and_respected(chain):
    base, top = chain
    with qemu.opened_for_writing(top), opened(base) as base_fd, opened(top) as top_fd:
        assert _locks.is_locked(top_fd, _locks.WRITE, top)
        assert not _locks.is_locked(base_fd, _locks.WRITE, base)
        assert _locks.is_locked(base_fd, _locks.WRITE_UNSHARED, base)
        with pytest.raises(Qcow2Error, match="is open for writing in another process"):
            _locks.hold_off_writers(top_fd, top)
        _locks.hold_off_writers(base_fd, base)
        with pytest.raises(Qcow2Error, match="backing file of a running VM"):
            _locks.hold_off_everybody(base_fd, base)
    with opened(top) as fd:
        assert not _locks.is_locked(fd, _locks.WRITE, top)


def test_what_we_hold_is_respected_by_qemu(chain):
    base, top = chain
    with opened(base) as fd:
        _locks.hold_off_writers(fd, base)
        assert not qemu_can_open(base)
        assert qemu_can_open(base, "-r")
        assert qemu_can_open(top)
        _locks.hold_off_everybody(fd, base)
        assert not qemu_can_open(base, "-r")
        assert not qemu_can_open(top)
    assert qemu_can_open(top)
    assert qemu_can_open(base)


def test_a_dead_holder_holds_nothing(chain):
    base, _top = chain
    with opened(base) as fd:
        command = ["qemu-io", "-f", "qcow2", "-c", "sleep 100000", base]
        process = subprocess.Popen(command)
        while not _locks.is_locked(fd, _locks.WRITE, base):
            assert process.poll() is None
        process.kill()
        process.wait()
        assert not _locks.is_locked(fd, _locks.WRITE, base)


def test_runs_take_turns(chain):
    base, _top = chain
    inside, most, done = [], [], []

    def run():
        for _round in range(20):
            with opened(base) as fd:
                _locks.take_turn(fd, base, 60)
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
    with opened(base) as first, opened(base) as second:
        _locks.take_turn(first, base, 0)
        with pytest.raises(Qcow2Error, match="another run of this module"):
            _locks.take_turn(second, base, 0.1)
    with opened(base) as third:
        _locks.take_turn(third, base, 0)


def test_a_file_in_work_is_known_as_such(tmp_path):
    path = str(tmp_path / "ours")
    ours = os.open(path, os.O_RDWR | os.O_CREAT)
    with opened(path) as fd:
        assert not _locks.is_locked(fd, _locks.OUR_TURN, path)
        assert _locks.claim(ours, path)
        assert _locks.is_locked(fd, _locks.OUR_TURN, path)
        os.close(ours)
        assert not _locks.is_locked(fd, _locks.OUR_TURN, path)
