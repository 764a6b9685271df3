# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An overlay that is there already: made just now, or one that a VM has run on."""

from __future__ import annotations

import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu
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
    "a checkpoint": "it has the bitmap 'later', made while a VM ran on it",
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
