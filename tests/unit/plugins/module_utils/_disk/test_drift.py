# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is advised about an image that stands at an overlay's place: by its cause, and never what loses a disk."""

from __future__ import annotations

import os
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark

from .. import qemu
from .overlays import SETTINGS, make_overlays, states

OURS = Mark("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "vda", "s")


@pytest.fixture(name="wanted")
def fixture_wanted(tmp_path, disk):
    """Have a request of a domain for an overlay on which it is not yet."""
    return OverlayRequest(str(tmp_path / "over.qcow2"), disk, must_be_fresh=True, mark=OURS)


def advice(wanted):
    """Return the advice about what stands there."""
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert problem.code == "differs"
    return problem.remedy


def write(path):
    subprocess.run(["qemu-io", "-c", "write 0 512", path], check=True, stdout=subprocess.DEVNULL)


def by_qemu_img(wanted, backing):
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", str(backing), "-F", "qcow2", "-u", wanted.path, "1G")


def test_another_vms_disk_is_never_to_be_removed(wanted, tmp_path):
    other = qemu.create(tmp_path / "other.qcow2", "1G")
    by_qemu_img(wanted, other)
    for request in (wanted, wanted._replace(must_be_fresh=False)):
        assert "the disk of another VM, here or on another host: leave it alone" in advice(request)
        assert "remove" not in advice(request)
    qemu.qemu_img("rebase", "-u", "-b", "", wanted.path)
    assert "leave it alone" in advice(wanted)


def test_a_clone_of_the_same_image_may_be_another_vms_disk(wanted):
    make_overlays([wanted._replace(mark=Mark("another", "vda", "s"), must_be_fresh=False)], SETTINGS)
    assert "the disk of another VM, here or on another host: leave it alone" in advice(wanted)
    os.unlink(wanted.path)
    make_overlays([wanted._replace(mark=None, must_be_fresh=False)], SETTINGS)
    assert "If no VM has it as its disk, here or on another host, and no image stands on it" in advice(wanted)
    write(wanted.path)
    assert "leave it alone until you know" in advice(wanted)
    assert "remove" not in advice(wanted)


def test_an_image_that_a_process_has_open_is_left_alone(wanted):
    make_overlays([wanted], SETTINGS)
    with qemu.opened_for_writing(wanted.path):
        assert "A process has it open for writing" in advice(wanted)
        assert "remove" not in advice(wanted)


def test_of_what_is_left_over_it_is_told_what_would_be_lost(wanted):
    make_overlays([wanted], SETTINGS)
    write(wanted.path)
    assert "virsh blockcommit --pivot" in advice(wanted)
    assert "what the VM wrote to it and its bitmaps are in it alone and are lost with it" in advice(wanted)


def test_a_checkpoint_that_was_made_on_what_is_left_over(wanted):
    make_overlays([wanted], SETTINGS)
    qemu.add_bitmaps(wanted.path, [Bitmap("later", 65536, True, False)])
    write(wanted.path)
    assert "are lost with it" in advice(wanted)


KILLED = {
    "a new checkpoint": lambda disk, _path: qemu.add_bitmaps(disk, [Bitmap("later", 65536, True, False)]),
    "a checkpoint deleted": lambda disk, _path: qemu.qemu_img("bitmap", "--remove", disk, "fine"),
    "a disk enlarged": lambda disk, _path: qemu.qemu_img("resize", "-q", disk, "2G"),
    "a disk shrunk": lambda disk, _path: qemu.qemu_img("resize", "-q", "--shrink", disk, "512M"),
    "a bitmap disabled": lambda _disk, path: qemu.qemu_img("bitmap", "--disable", path, "fine"),
    "a VM that ran on it": lambda _disk, path: qemu.add_bitmaps(path, [Bitmap("later", 65536, True, False)]),
}


@pytest.mark.parametrize("since", KILLED)
def test_with_what_a_killed_run_has_left_nothing_is_lost_whatever_its_bitmaps(wanted, disk, since):
    for bitmap in ("disabled", "broken"):
        qemu.qemu_img("bitmap", "--remove", disk, bitmap)
    for bitmap in ("coarse",) if since.startswith("a disk") else ():
        qemu.qemu_img("bitmap", "--remove", disk, bitmap)
    make_overlays([wanted], SETTINGS)
    KILLED[since](disk, wanted.path)
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert "ran on it" not in problem.why
    assert problem.remedy == (
        "It holds no data. If no VM has it as its disk, here or on another host, and no image stands on it, remove it "
        "and run this again."
    )
    assert "remove" not in advice(wanted._replace(mark=OURS._replace(vm="another")))
    os.unlink(wanted.path)
    assert states(make_overlays([wanted], SETTINGS)) == ["created"]


def test_nothing_that_would_be_lost_is_to_be_removed(wanted, disk):
    qemu.create(wanted.path, "1G", "-b", disk, "-F", "qcow2")
    qemu.add_bitmaps(wanted.path, [Bitmap("a clone's", 65536, True, False)])
    assert "leave it alone until you know" in advice(wanted)
    assert "full backup" in advice(wanted._replace(must_be_fresh=False))
    os.unlink(wanted.path)
    qemu.create(wanted.path, "1G", "-b", disk, "-F", "qcow2")
    qemu.qemu_img("snapshot", "-c", "empty", wanted.path)
    write(wanted.path)
    qemu.qemu_img("snapshot", "-c", "full", wanted.path)
    qemu.qemu_img("snapshot", "-a", "empty", wanted.path)  # so the data is in an internal snapshot alone
    assert "remove" not in advice(wanted)
    assert "remove" not in advice(wanted._replace(must_be_fresh=False))


def test_a_backing_file_that_is_gone_is_to_be_put_back(wanted, tmp_path):
    by_qemu_img(wanted, tmp_path / "gone.qcow2")
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert "gone.qcow2" in problem.why
    assert "that file does not exist" in problem.why
    assert problem.remedy.startswith("Put that back in its place")
    assert "Do not remove it" in problem.remedy


def test_an_empty_overlay_that_lacks_the_bitmaps_can_be_made_again_and_a_disk_is_healed(wanted, disk):
    by_qemu_img(wanted, disk)
    assert "remove it and run this again" in advice(wanted)
    on_it = wanted._replace(must_be_fresh=False)
    assert "kvmfleet.qcow2.qcow2_bitmap" in advice(on_it)
    write(wanted.path)
    assert "kvmfleet.qcow2.qcow2_bitmap" in advice(on_it)
    assert "kvmfleet.qcow2.qcow2_bitmap" not in advice(wanted)
    assert "remove" not in advice(on_it)
    assert "remove" not in advice(wanted)


def test_other_causes(wanted, disk):
    on_it = wanted._replace(must_be_fresh=False)
    qemu.create(wanted.path, "512M", "-b", disk, "-F", "qcow2")
    assert "this collection has not made it so" in advice(on_it)
    os.unlink(wanted.path)
    qemu.create(wanted.path, "1G", "-b", disk, "-F", "raw")
    assert "which format is right" in advice(on_it)
    os.unlink(wanted.path)
    make_overlays([wanted], SETTINGS)
    qemu.patch(wanted.path, 79, b"\x02")
    assert "qemu-img check -r all" in advice(on_it)


def test_what_is_no_qcow2_image_may_be_a_raw_disk(wanted):
    with open(wanted.path, "wb") as file:
        file.write(b"\x55" * 4096)
    (problem,) = make_overlays([wanted], SETTINGS).failures
    assert problem.code == "occupied"
    assert "may be the raw disk of a VM" in problem.why
    assert "Remove it" not in problem.remedy


def test_what_a_killed_run_has_left_may_go_although_the_vm_has_other_images_since(wanted, disk, tmp_path):
    make_overlays([wanted], SETTINGS)
    above = str(tmp_path / "other.qcow2")
    make_overlays([OverlayRequest(above, disk)], SETTINGS)
    since = wanted._replace(backing_file=above)
    assert "left by a run of this snapshot that was killed" in advice(since)
    assert "remove it and run this again" in advice(since)
    write(wanted.path)
    assert "remove" not in advice(since)
