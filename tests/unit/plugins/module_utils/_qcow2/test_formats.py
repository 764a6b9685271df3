# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Formats are told as QEMU tells them."""

from __future__ import annotations

import json
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.formats import HEAD, format_by_magic, why_not

from .. import qemu

MADE_BY_QEMU = ("qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels", "raw")
BOCHS = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
BY_HAND = {
    "bochs": (BOCHS + struct.pack("<II", 0x20000, 512), "bochs"),
    "bochs of version 1": (BOCHS + struct.pack("<II", 0x10000, 512), "bochs"),
    "bochs of version 3": (BOCHS + struct.pack("<II", 0x30000, 512), "raw"),
    "luks": (b"LUKS\xba\xbe\0\1aes", "luks"),
    "luks of version 2": (b"LUKS\xba\xbe\0\2", "raw"),
    "cloop": (CLOOP, "cloop"),
    "cloop that ends early": (CLOOP[:-1], "raw"),
    "vmdk of version 3": (b"COWD", "vmdk"),
    "text of vmdk": (b"# Disk DescriptorFile\n   \r\nversion=1\nCID=fffffffe\n", "vmdk"),
    "text of vmdk with an empty line": (b"# Disk DescriptorFile\n\nversion=1\n", "raw"),
    "text of vmdk with another line first": (b"# Disk DescriptorFile\nCID=1\nversion=1\n", "raw"),
    "parallels": (b"WithoutFreeSpace\2\0\0\0", "parallels"),
    "parallels of version 3": (b"WithoutFreeSpace\3\0\0\0", "raw"),
    "qcow2 of version 2": (b"QFI\xfb\0\0\0\2", "qcow2"),
    "qcow2 of version 9": (b"QFI\xfb\0\0\0\x09", "qcow2"),
    "a name.dmg": (b"", "dmg"),
}


def told_by_qemu(path):
    """Return the format for which QEMU takes a file, in its words where it cannot open it as that."""
    said = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=False, capture_output=True, text=True)
    return json.loads(said.stdout)["format"] if said.returncode == 0 else said.stderr


@pytest.mark.parametrize("image_format", MADE_BY_QEMU)
def test_what_qemu_makes_is_told_by_its_magic(tmp_path, image_format):
    path = tmp_path / "image"
    qemu.qemu_img("create", "-q", "-f", image_format, str(path), "10M")
    head = path.read_bytes()[:HEAD]
    assert format_by_magic(head, str(path)) == image_format == told_by_qemu(path)
    assert why_not(image_format, head, is_device=False) is None


@pytest.mark.parametrize("what", BY_HAND)
def test_what_other_programs_make_is_told_as_qemu_tells_it(tmp_path, what):
    path = tmp_path / what
    head, expected = BY_HAND[what]
    path.write_bytes(head.ljust(4096, b"\0"))
    assert format_by_magic(path.read_bytes()[:HEAD], str(path)) == expected
    # QEMU opens none of these, since there is nothing behind the magic, but those that it takes for raw.
    assert (told_by_qemu(path) == "raw") == (expected == "raw")
