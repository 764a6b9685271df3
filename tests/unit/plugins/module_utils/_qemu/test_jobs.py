# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The jobs that move data: what comes after one that QEMU does not take, and when one is given up."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import QemuError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import jobs
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor, find_qemu

from .. import qemu

# The storage daemon with a parameter that it does not know where 5.2 does not know this one.
WITHOUT_X_PERF = """#!/bin/bash
exec qemu-storage-daemon "$@" < <(exec sed -u 's/"x-perf":{/"x-perf":{"unheard-of":1,/' <&0)
"""


@contextlib.contextmanager
def job(command, *paths, seconds=30.0, speed=0):
    """Have what a job needs for the block: the images, TOP first, and a QEMU process."""
    monitor = Monitor(command, 30)
    told = []
    with contextlib.ExitStack() as stack:
        stack.callback(monitor.close)
        images = [jobs.Opened(stack.enter_context(open_image(path)), "qcow2") for path in paths]
        yield jobs.Job(monitor, seconds, speed, lambda *progress: told.append(progress)), images, told


def a_pair(tmp_path, *commands):
    base = qemu.create(tmp_path / "base", "256M")
    top = qemu.create(tmp_path / "top", "256M", "-b", base, "-F", "qcow2")
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, top], check=True, stdout=subprocess.DEVNULL)
    return top, base


def holds(path, pattern, start, length):
    command = ["qemu-io", "-f", "qcow2", "-c", f"read -P {pattern} {start} {length}", path]
    return b"verification failed" not in subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def test_what_takes_the_place_of_a_job_that_qemu_does_not_know_can_open_the_same_images(tmp_path):
    old = tmp_path / "without-x-perf"
    old.write_text(WITHOUT_X_PERF)
    old.chmod(0o755)
    command = find_qemu({"qemu-storage-daemon": str(old)}.get)
    with job(command, *a_pair(tmp_path, "write -P 7 1M 1M")) as (wanted, images, _told):
        with pytest.raises(QemuError, match="x-perf") as caught:
            jobs.share(wanted, images[0], images[1:])
        assert caught.value.code == "qemu_option"  # which is what the caller looks for
        jobs.commit(wanted, images[:1], images[1:])
    assert holds(str(tmp_path / "base"), 7, "1M", "1M")


def test_a_job_that_is_slow_because_it_was_told_so_is_not_given_up(tmp_path):
    pair = a_pair(tmp_path, "write -P 7 0 48M")
    with job(find_qemu(shutil.which), *pair, seconds=0.3, speed=16 << 20) as (wanted, images, told):
        jobs.commit(wanted, images[:1], images[1:])
    assert holds(pair[1], 7, 0, "48M")
    assert len({done for done, _total in told}) > 1


def test_why_an_image_could_not_be_opened_is_told(tmp_path):
    """And not that the node, which is not there, could not be closed."""
    top, base = a_pair(tmp_path)
    (tmp_path / "base").write_bytes(b"no qcow2" * 512)
    never_qcow2 = pytest.raises(QemuError, match="not in qcow2 format")
    with job(find_qemu(shutil.which), top, base) as (wanted, images, _told), never_qcow2:
        jobs.commit(wanted, images[:1], images[1:])
