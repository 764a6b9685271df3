# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An overlay that is there already: made just now, or one that a VM has run on."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu
from .healing import mend
from .overlays import SETTINGS, make_overlays, states


def test_an_overlay_that_a_vm_has_written_to_is_not_taken_for_a_new_one(tmp_path, disk):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    assert states(make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS)) == ["present"]
    subprocess.run(["qemu-io", "-c", "write 0 512", wanted.path], check=True, stdout=subprocess.DEVNULL)
    assert states(make_overlays([wanted], SETTINGS)) == ["present"]
    outcome = make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS)
    assert "it holds data, so a VM has run on it" in str(outcome.failures[0])


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
    "a checkpoint": "it has the bitmap 'later', which a new overlay would not have",
    "another size": "its virtual size is 2147483648, not ACTIVE's 1073741824",
    "encrypted": "it is encrypted",
    "not closed": "was not closed properly",
}


@pytest.mark.parametrize("what", SIGNS)
def test_an_overlay_with_a_sign_of_use_is_not_taken_for_a_new_one(tmp_path, disk, what):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    signs_of_use(wanted.path, what)
    assert SIGNS[what] in str(make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS).failures[0])


def test_an_overlay_that_is_open_is_not_taken_for_a_new_one(tmp_path, disk):
    wanted = OverlayRequest(str(tmp_path / "over"), disk)
    make_overlays([wanted], SETTINGS)
    with qemu.opened_for_writing(wanted.path):
        assert states(make_overlays([wanted], SETTINGS)) == ["present"]
        assert "open for writing" in str(make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS).failures[0])


def test_a_bitmap_that_is_older_than_its_checkpoint_is_not_carried_on(tmp_path, disk):
    """In the overlay nothing would tell that it is another one; nor can it be healed there."""
    os.utime(disk, (10_000, 10_000))
    created = (("fine", 50_000), ("coarse", 10_000))
    wanted = OverlayRequest(str(tmp_path / "over"), disk, created=created)
    predicted = make_overlays([wanted], SETTINGS._replace(check_mode=True))
    done = make_overlays([wanted], SETTINGS)
    assert done.as_result("overlays") == predicted.as_result("overlays")
    (told,) = done.as_result("overlays")["overlays"]
    assert ([one["name"] for one in told["bitmaps"]], qemu.bitmaps_of(wanted.path)) == (
        ["coarse"],
        {("coarse", 1 << 21, True, False)},
    )
    reasons = {one["name"]: one["reason"] for one in told["skipped_bitmaps"]}
    assert reasons == {"fine": "older", "disabled": "disabled", "broken": "inconsistent"}
    for again in (wanted, wanted._replace(must_be_fresh=True)):
        (found,) = make_overlays([again], SETTINGS).as_result("overlays")["overlays"]
        assert {**found, "state": "created"} == told
    healed, changed = mend(wanted.path, names=("fine",), created=created)
    assert (changed, [(one["image"], one["code"]) for one in healed["bitmaps"]]) == (False, [(disk, "not_healable")])
    assert {one["name"]: one["problem"] for one in healed["checkpoints"]}["fine"] == "not_in_top"


def test_an_overlay_left_by_a_killed_run_must_not_have_what_is_older_than_its_checkpoint(tmp_path, disk):
    """Its disk was put back from an older file since. What a VM has run on can have the checkpoint's own."""
    wanted = OverlayRequest(str(tmp_path / "over"), disk, created=(("fine", 50_000),))
    make_overlays([wanted], SETTINGS)
    os.utime(disk, (10_000, 10_000))
    (failure,) = make_overlays([wanted._replace(must_be_fresh=True)], SETTINGS).failures
    assert "its bitmap 'fine' would look valid" in str(failure)
    (found,) = make_overlays([wanted], SETTINGS).as_result("overlays")["overlays"]
    assert (found["state"], {one["name"] for one in found["bitmaps"]}) == ("present", {"fine", "coarse"})


def test_the_bits_of_what_is_not_carried_on_are_not_read(tmp_path, disk):
    """They can be damaged, or so many that the overlay would be refused for them."""
    over = tmp_path / "over"
    os.utime(disk, (10_000, 10_000))
    made = make_overlays([OverlayRequest(str(over), disk, created=(("fine", 50_000),))], SETTINGS)
    assert set(made.verdicts[0].spec.maps) == {"coarse"}
