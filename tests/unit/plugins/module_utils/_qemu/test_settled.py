# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An image that somebody is opening: its bitmaps are declared worthless for as long as the storage takes."""

from __future__ import annotations

import threading
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.header import (
    AUTOCLEAR,
    AUTOCLEAR_AT,
    AUTOCLEAR_BITMAPS,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.settled import read_settled

from .. import qemu


def put_autoclear(path, features):
    qemu.patch(path, AUTOCLEAR_AT, AUTOCLEAR.pack(features))


@pytest.fixture(name="amid")
def fixture_amid(tmp_path):
    path = qemu.create(tmp_path / "image", "1M")
    qemu.qemu_img("bitmap", "--add", path, "monday")
    put_autoclear(path, 0)
    return path


def test_a_slow_storage_is_waited_for(amid):
    with open_image(amid) as vm, open_image(amid) as file:
        locks.hold_off_everybody(vm)
        written = threading.Timer(1.5, put_autoclear, (amid, AUTOCLEAR_BITMAPS))
        written.start()
        seen = read_settled(file)
        written.join()
    assert [bitmap.name for bitmap in seen.image.bitmaps] == ["monday"]
    assert seen.is_open_for_writing


def test_what_is_lost_below_a_running_vm_is_told_in_the_end(amid):
    with open_image(amid) as vm, open_image(amid) as file:
        locks.hold_off_everybody(vm)
        assert read_settled(file).image.lost_bitmaps == 1


def test_an_image_that_nobody_has_open_is_not_waited_for(amid):
    start = time.monotonic()
    with open_image(amid) as file:
        assert read_settled(file).image.lost_bitmaps == 1
    assert time.monotonic() - start < 2
