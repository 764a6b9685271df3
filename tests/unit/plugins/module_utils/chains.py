# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a guest and its backups get out of a chain of images: the judge of what may have become of bitmaps.

A checkpoint is known by what the guest's disk held when it was made. A bitmap of this name that libvirt would use must
mark all that has changed since; else an incremental backup would lack it, and nobody would know. QEMU's tools tell what
images hold and what bitmaps mark, as a backup gets it; nothing of the collection's own reading is asked.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

from . import qemu

_BLOCK = 512  # bytes; of the disk, that a bit of what is returned here is about
Bits = int  # of blocks, the first one as the lowest bit
Checkpoints = t.Mapping[str, bytes]  # by name, what the guest's disk held


class _Image(t.NamedTuple):
    """What qemu-img info tells of an image."""

    path: str
    virtual_size: int  # bytes
    flags: dict[str, list[str]]  # of its bitmaps, by name


def content(path: t.Any) -> bytes:
    """Return what a guest reads from the disk whose topmost image this is."""
    with tempfile.TemporaryDirectory() as folder:
        raw = os.path.join(folder, "raw")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), raw], check=True)
        with open(raw, "rb") as file:
            return file.read()


def own_bits(path: t.Any) -> dict[str, Bits]:
    """Return what each consistent bitmap of one image marks."""
    image = _image(qemu.info(path))
    names = [name for name, flags in image.flags.items() if "in-use" not in flags]
    return _served([(image.path, names)])[0]


def usable(path: t.Any) -> dict[str, Bits]:
    """Return what each bitmap of a chain marks that libvirt would use for a backup."""
    chain = [_image(one) for one in qemu.chain_of(path)]
    holders = {name: _contiguous(name, chain) for name in chain[0].flags}
    names = [name for name, images in holders.items() if images]
    depth = max((len(holders[name]) for name in names), default=0)
    served = _served([(image.path, [name for name in names if image in holders[name]]) for image in chain[:depth]])
    found: dict[str, Bits] = {}
    for bits in served:
        for name, own in bits.items():
            found[name] = found.get(name, 0) | own
    return found


def _image(said: dict[str, t.Any]) -> _Image:
    bitmaps = said.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return _Image(said["filename"], said["virtual-size"], {one["name"]: one["flags"] for one in bitmaps})


def _contiguous(name: str, chain: t.Sequence[_Image]) -> list[_Image]:
    """Return the images whose bitmaps of this name libvirt would unite; none if it would refuse."""
    has_it = [name in image.flags for image in chain]
    images = chain[: has_it.index(False) if False in has_it else len(chain)]
    is_used = sum(has_it) == len(images) and len({image.virtual_size for image in images}) == 1
    flags = [image.flags[name] for image in images]
    return list(images) if is_used and all("auto" in one and "in-use" not in one for one in flags) else []


def _served(wanted: t.Sequence[tuple[str, list[str]]]) -> list[dict[str, Bits]]:
    """Return what the bitmaps of these names in each of these images mark, as QEMU serves it to a backup by NBD."""
    if not any(names for _path, names in wanted):
        return [{} for _each in wanted]
    found = []
    with tempfile.TemporaryDirectory() as folder, qemu.exporting(folder) as monitor:
        for number, (path, names) in enumerate(wanted):
            node = f"n{number}"
            if names:
                qemu.open_bitmaps(monitor, node, path)
            found.append({name: _blocks(qemu.dirty_extents(monitor, folder, node, name)) for name in names})
    return found


def _blocks(extents: t.Sequence[tuple[int, int]]) -> Bits:
    bits = 0
    for start, length in extents:  # the end of a disk may lie within a block
        bits |= ((1 << -(-length // _BLOCK)) - 1) << (start // _BLOCK)
    return bits


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
