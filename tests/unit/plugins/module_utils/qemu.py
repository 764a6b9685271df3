# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images made by the real QEMU, and what QEMU itself says of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import Image, read_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor, find_qemu

SECONDS = 60.0


def examples(count: int) -> int:
    """Return how many of so many random examples to try: what they look for does not depend on Python's version.

    So all are tried on the newer ones, and a sixth on the oldest.
    """
    return count if sys.version_info >= (3, 10) else -(-count // 6)


def qemu_img(*arguments: str) -> str:
    """Run qemu-img and return what it prints."""
    for _attempt in range(20):
        done = subprocess.run(["qemu-img", *arguments], check=False, capture_output=True, text=True)
        if "accurate CPU usage" not in done.stderr:  # which it measures for a LUKS key, and cannot now and then
            break
    print(done.stderr, end="", file=sys.stderr)
    done.check_returncode()
    return done.stdout


def info(path: t.Any) -> dict[str, t.Any]:
    """Return what qemu-img says of an image, without its chain."""
    return t.cast("dict[str, t.Any]", json.loads(qemu_img("info", "--output=json", str(path))))


def chain_of(path: t.Any) -> list[dict[str, t.Any]]:
    """Return what qemu-img says of each image of a chain, topmost first."""
    said = qemu_img("info", "--backing-chain", "--output=json", "-f", "qcow2", str(path))
    return t.cast("list[dict[str, t.Any]]", json.loads(said))


def bitmaps_of(path: t.Any) -> set[tuple[str, int, bool, bool]]:
    """Return name, granularity, recording, inconsistent of each bitmap, as qemu-img tells them."""
    entries = info(path)["format-specific"]["data"].get("bitmaps", ())
    return {(e["name"], e["granularity"], "auto" in e["flags"], "in-use" in e["flags"]) for e in entries}


def create(path: t.Any, size: t.Any = "64M", *options: str) -> str:
    """Make an image; options are arguments of qemu-img create."""
    qemu_img("create", "-q", "-f", "qcow2", *options, str(path), str(size))
    return str(path)


@contextlib.contextmanager
def storage_daemon() -> t.Iterator[Monitor]:
    """Run a QEMU process for the block."""
    monitor = Monitor(find_qemu(shutil.which), SECONDS)
    try:
        yield monitor
    finally:
        monitor.close()


def add_bitmaps(path: t.Any, bitmaps: t.Sequence[Bitmap]) -> None:
    """Add bitmaps as they are described; the inconsistent ones by a process that has the image open and is killed."""
    inconsistent = [bitmap for bitmap in bitmaps if bitmap.inconsistent]
    consistent = [bitmap for bitmap in bitmaps if not bitmap.inconsistent]
    if inconsistent:
        with storage_daemon() as monitor:
            _add(monitor, path, inconsistent)
            monitor.command("blockdev-del", {"node-name": "image"})
            _open(monitor, path)
            # Before its first write, QEMU marks every bitmap on the disk as in use.
            monitor.command("block-dirty-bitmap-add", {"node": "image", "name": "touch", "persistent": True})
            monitor._process.kill()
    if consistent:
        with storage_daemon() as monitor:
            _add(monitor, path, consistent)
            monitor.command("blockdev-del", {"node-name": "image"})


def _open(monitor: Monitor, path: t.Any) -> None:
    """Open the image for writing, alone, with its data file if it has one."""
    node: dict[str, t.Any] = {"driver": "file", "filename": str(path)}
    monitor.command("blockdev-add", {"driver": "qcow2", "node-name": "image", "file": node, "backing": None})


def _add(monitor: Monitor, path: t.Any, bitmaps: t.Sequence[Bitmap]) -> None:
    """Open the image and add the bitmaps in one transaction."""
    _open(monitor, path)
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {
                "node": "image",
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "persistent": True,
                "disabled": not bitmap.recording,
            },
        }
        for bitmap in bitmaps
    ]
    monitor.command("transaction", {"actions": actions}, len(actions) / 10)


@contextlib.contextmanager
def opened_for_writing(path: t.Any) -> t.Iterator[None]:
    """Have another process hold the image open for writing, with its chain, as a VM does."""
    command = ["qemu-io", "-f", "qcow2", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    stdin, stdout = t.cast("t.IO[bytes]", process.stdin), t.cast("t.IO[bytes]", process.stdout)
    try:
        stdin.write(b"length\n")
        seen = b""
        while b"MiB" not in seen and b"GiB" not in seen:
            piece = stdout.read(4096)
            assert piece, f"qemu-io could not open {path}"
            seen += piece
        yield
    finally:
        stdin.write(b"quit\n")
        process.communicate()


@contextlib.contextmanager
def exporting(folder: t.Any) -> t.Iterator[Monitor]:
    """Run a QEMU process for the block that serves what dirty_extents() asks for."""
    with storage_daemon() as monitor:
        monitor.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": f"{folder}/nbd"}}})
        yield monitor


def open_bitmaps(monitor: Monitor, node: str, path: t.Any) -> None:
    """Open an image without its chain and read-only."""
    driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    file = {"driver": driver, "filename": str(path)}
    options = {"driver": "qcow2", "node-name": node, "file": file, "backing": None, "read-only": True}
    monitor.command("blockdev-add", options)


def guest_writes(path: t.Any, dice: random.Random, size: int, times: int) -> None:
    """Have a guest write, zero and discard here and there, at the very end too."""
    command = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
    for number in range(times):
        length = min(dice.choice((512, 4096, 70000 // 512 * 512, 1 << 20)), size)
        offset = size - length if number == 0 else dice.randrange(0, (size - length) // 512 + 1) * 512
        command += ["-c", f"{dice.choice(('write -P 7', 'write -z', 'discard'))} {offset} {length}"]
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)


def merge_bitmaps(monitor: Monitor, nodes: t.Sequence[str], name: str, union: str, granularity: int) -> None:
    """Have QEMU merge a bitmap of several open images into a new one, `union`, of the first of them."""
    new = {"node": nodes[0], "name": union, "granularity": granularity, "disabled": True}
    monitor.command("block-dirty-bitmap-add", new)
    sources = [{"node": node, "name": name} for node in nodes]
    monitor.command("block-dirty-bitmap-merge", {"node": nodes[0], "target": union, "bitmaps": sources})


def pull(path: t.Any, base: t.Any) -> None:
    """Take the images between into the topmost one, as 'virsh blockpull --base' does.

    With the bits of those bitmaps alone that are in order in each image down to the lowest that has them.
    """
    chain = chain_of(path)
    between = [one["filename"] for one in chain].index(str(base)) - 1
    sound = [
        {bitmap.name for bitmap in read(one["filename"]).bitmaps if not bitmap.inconsistent}
        for one in chain
        if one["format"] == "qcow2"
    ]
    moved = {
        name
        for name in sound[0]
        if all(name in names for names in sound[: max(n for n, names in enumerate(sound) if name in names)])
    }
    with storage_daemon() as monitor:
        for number, one in reversed(list(enumerate(chain))):
            file = {"driver": "file", "filename": one["filename"]}
            below = f"n{number + 1}" if number + 1 < len(chain) else None
            options = {"driver": one["format"], "node-name": f"n{number}", "file": file, "read-only": number > 0}
            monitor.command("blockdev-add", {**options, "backing": below})
        for number in range(1, between + 1):
            for name in moved & sound[number]:
                arguments = {"node": "n0", "target": name, "bitmaps": [{"node": f"n{number}", "name": name}]}
                monitor.command("block-dirty-bitmap-merge", arguments)
        options = {"device": "n0", "base-node": f"n{between + 1}", "backing-file": str(base), "auto-dismiss": False}
        monitor.run_job("block-stream", "pull", options)
        monitor.command("blockdev-del", {"node-name": "n0"})  # which stores its bitmaps


def dirty_extents(monitor: Monitor, folder: t.Any, node: str, bitmap: str) -> list[tuple[int, int]]:
    """Return (start, length) of all that an NBD client is told to be dirty in a bitmap of QEMU."""
    export = {"type": "nbd", "id": "export", "node-name": node, "name": "disk", "bitmaps": [bitmap]}
    monitor.command("block-export-add", export)
    options = [
        "driver=nbd,server.type=unix,export=disk",
        f"server.path={folder}/nbd",
        f"x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}".replace(",", ",,"),
    ]
    extents = json.loads(qemu_img("map", "--output=json", "--image-opts", ",".join(options)))
    monitor.command("block-export-del", {"id": "export", "mode": "hard"})
    while monitor.command("query-block-exports"):
        pass
    found: list[tuple[int, int]] = []
    for extent in extents:
        if extent["data"]:
            continue
        start, length = extent["start"], extent["length"]
        if found and sum(found[-1]) == start:
            start, length = found[-1][0], found.pop()[1] + length
        found.append((start, length))
    return found


def read(path: t.Any) -> Image:
    """Return what our reader says of an image."""
    with open_image(str(path)) as file:
        return read_image(file)


def why_not_opened(path: t.Any) -> str:
    """Return why QEMU does not open the image, and all below; nothing if it does."""
    command = ["qemu-img", "info", "-U", "--backing-chain", "-f", "qcow2", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def patch(path: t.Any, offset: int, data: bytes) -> None:
    """Overwrite bytes of an image."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def directory_of(path: t.Any) -> tuple[int, int]:
    """Return offset and length in bytes of the bitmap directory; the image is known to have one."""
    with open(path, "rb") as file:
        head = file.read(4096)
    place = head.index(struct.pack(">II", 0x23852875, 24)) + 8
    _count, _reserved, length, offset = struct.unpack_from(">IIQQ", head, place)
    return offset, length


def as_qemu_says(image: Image) -> dict[str, object]:
    """Return what our reader says, in the words and with the omissions of qemu-img info."""
    said: dict[str, object] = {
        "virtual-size": image.virtual_size,
        "cluster-size": image.cluster_size,
        "backing-filename": image.backing_file,
        "backing-filename-format": image.backing_format,
        "compat": {2: "0.10", 3: "1.1"}[image.version],
        "refcount-bits": image.refcount_bits,
        "compression-type": image.compression_type,
        "data-file": image.data_file,
        "dirty-flag": image.dirty,
    }
    if image.version == 3:
        said["lazy-refcounts"] = image.lazy_refcounts
        said["extended-l2"] = image.extended_l2
        said["corrupt"] = image.corrupt
    if image.has_data_file:
        said["data-file-raw"] = image.data_file_raw
    return {name: value for name, value in said.items() if value is not None}
