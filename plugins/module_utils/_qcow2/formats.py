# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Tell: the formats of images, by the names and the magics by which QEMU knows them."""

from __future__ import annotations

import re

QCOW2 = "qcow2"
RAW = "raw"
PLAIN = frozenset(("file", "host_cdrom", "host_device", RAW))  # the disk's own bytes
WITHOUT_BACKING = PLAIN | frozenset(("bochs", "cloop", "dmg", "luks", "vdi", "vhdx", "vpc"))
UNREAD_CHAINS = frozenset(("parallels", "qcow", "qed", "vmdk"))  # what they say of a backing file is not read here
# What a qcow2 image can record as the format of its backing file, if that is a local file or device.
BACKING_FORMATS = WITHOUT_BACKING | UNREAD_CHAINS | {QCOW2}
HEAD = 512  # bytes that QEMU looks at

_DEVICES = frozenset(("host_cdrom", "host_device"))
_BOCHS = ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"))
_PARALLELS = (16, b"\2\0\0\0")
_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
# The bytes at some offsets by which a format is told; the first one that fits.
_MAGICS: tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...] = (
    ("qcow", ((0, b"QFI\xfb\0\0\0\1"),)),
    (QCOW2, ((0, b"QFI\xfb"),)),
    ("bochs", (*_BOCHS, (64, b"\0\0\1\0"))),
    ("bochs", (*_BOCHS, (64, b"\0\0\2\0"))),
    ("luks", ((0, b"LUKS\xba\xbe\0\1"),)),
    ("parallels", ((0, b"WithoutFreeSpace"), _PARALLELS)),
    ("parallels", ((0, b"WithouFreSpacExt"), _PARALLELS)),
    ("qed", ((0, b"QED\0"),)),
    ("vdi", ((64, b"\x7f\x10\xda\xbe"),)),
    ("vhdx", ((0, b"vhdxfile"),)),
    ("vmdk", ((0, b"KDMV"),)),
    ("vmdk", ((0, b"COWD"),)),
    ("vpc", ((0, b"conectix"),)),
    ("cloop", ((0, _CLOOP),)),
)
_VMDK_TEXT = rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n"
# A vpc image can have its magic at the end, a vmdk image is described by a text, dmg and cloop have no magic.
_ALWAYS_AT_START = frozenset(("bochs", "luks", "parallels", "qcow", "qed", "vdi", "vhdx"))


def format_by_magic(head: bytes, name: str) -> str:
    """Return the format for which QEMU takes an unrecorded one, by the first HEAD bytes and by the file's name."""
    for image_format, pieces in _MAGICS:
        if all(head.startswith(magic, offset) for offset, magic in pieces):
            return image_format
    if re.match(_VMDK_TEXT, head):
        return "vmdk"
    return "dmg" if name.endswith(".dmg") and len(name) > len(".dmg") else RAW


def why_not(recorded: str, head: bytes, is_device: bool) -> str | None:
    """Return why QEMU does not open the image as the format that is recorded for it; None if nothing is known."""
    if recorded in _ALWAYS_AT_START and format_by_magic(head, "") != recorded:
        return "it does not begin as such an image does"
    if recorded == "file" and is_device:
        return "it is a block device"
    if recorded in _DEVICES and not is_device:
        return "it is a file"
    return None
