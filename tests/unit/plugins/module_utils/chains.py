# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest and its backups get out of a chain of images: the judge of what may have become of bitmaps.

A checkpoint is known by what the guest's disk held when it was made. A bitmap of this name that libvirt would use must
mark all that has changed since; else an incremental backup would lack it, and nobody would know.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps, judge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import maps_of, rescaled
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

_BLOCK = 512  # bytes; of the disk, that a bit of what is returned here is about
Bits = int  # of blocks, the first one as the lowest bit
Checkpoints = t.Mapping[str, bytes]  # by name, what the guest's disk held


def content(path: t.Any) -> bytes:
    """Return what a guest reads from the disk whose topmost image this is."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "raw")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), raw], check=True)
        with open(raw, "rb") as file:
            return file.read()


def own_bits(path: t.Any) -> dict[str, Bits]:
    """Return what each consistent bitmap of one image marks."""
    with open_image(str(path)) as file:
        image = read_image(file)
        return {
            name: rescaled(one.bits(0, image.virtual_size), one.granularity, _BLOCK)
            for name, one in maps_of(file, image).items()
        }


def usable(path: t.Any) -> dict[str, Bits]:
    """Return what each bitmap of a chain marks that libvirt would use for a backup."""
    layers, bits = [], []
    below: str | None = str(path)
    while below is not None:
        with open_image(below) as file:
            image = read_image(file)
        layers.append(LayerBitmaps(below, image.virtual_size, {bitmap.name: bitmap for bitmap in image.bitmaps}))
        bits.append(own_bits(below))
        below = image.backing_file if image.backing_format != "raw" else None  # which has none
    found = {}
    for name in layers[0].bitmaps:
        if judge(name, layers).valid:
            found[name] = 0
            for own in bits:
                found[name] |= own.get(name, 0)
    return found


def changed(then: bytes, now: bytes) -> Bits:
    """Return where a disk has changed; one that has grown was empty there."""
    old, found = then.ljust(len(now), b"\0"), 0
    for start in range(0, len(now), _BLOCK):
        if old[start : start + _BLOCK] != now[start : start + _BLOCK]:
            found |= 1 << (start // _BLOCK)
    return found


def lacking(path: t.Any, checkpoints: Checkpoints, now: bytes) -> list[str]:
    """Return the bitmaps that libvirt would use and that lack changes."""
    marked = usable(path)
    return [name for name, then in checkpoints.items() if name in marked and changed(then, now) & ~marked[name]]


def damage(path: t.Any) -> str:
    """Return what qemu-img check finds wrong with an image beside clusters that are only lost.

    One with lazy refcounts is repaired by QEMU when it opens the image the next time.
    """
    with open_image(str(path)) as file:
        if read_image(file).dirty:
            return ""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, check=False)
    return "" if done.returncode in (0, 3) else f"{path}: {done.stdout}{done.stderr}"
