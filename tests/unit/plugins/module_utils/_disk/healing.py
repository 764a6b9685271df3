# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of healing share: chains to which guests write, what breaks them, and what really changed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import mend as mend_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import EMPTY, OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import maps_of, united
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.extents import AllocationMap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

from .. import qemu
from .overlays import SETTINGS, make_overlays

SIZE = 8 << 20
MONDAY = Bitmap("monday", 65536, True, False)
TUESDAY = Bitmap("tuesday", 4096, True, False)


def mend(path, settings=SETTINGS, **options):
    """Heal the bitmaps of one disk; check mode must have said the same, and a second run must change nothing."""
    request = HealRequest(str(path), **options)
    predicted = run(MendBitmaps(), [request], settings._replace(check_mode=True)).as_result("disks")
    result = run(MendBitmaps(), [request], settings).as_result("disks")
    assert result == predicted
    again = run(MendBitmaps(), [request], settings._replace(find_program=lambda _name: None)).as_result("disks")
    assert not again["changed"], again
    assert not [name for name in os.listdir(os.path.dirname(path)) if name.startswith(".")]  # vault, temporary file
    disk = result["disks"][0]
    assert again["disks"][0]["checkpoints"] == disk["checkpoints"]
    assert disk["checkpoints"] == as_info_tells(path, dict(request.created))
    return disk, result["changed"]


def as_info_tells(path, created=None):
    """Return the checkpoints as qcow2_info tells them."""
    found = examine_chain(str(path), follow=True, count=True, created=created).as_result()["checkpoints"]
    return sorted(found, key=lambda one: one["name"])


def told(disk):
    """Return name, file and state of each bitmap."""
    return [
        (one["name"], one["image"] and os.path.basename(one["image"]), one.get("code", one["state"]))
        for one in disk["bitmaps"]
    ]


def checkpoints(path):
    """Return the names of the valid checkpoints, as qcow2_info tells them."""
    return {one.name for one in examine_chain(str(path), follow=True, count=False).checkpoints if one.valid}


def as_bits(maps, granularity):
    """Return the union of maps as a number, whose lowest bit is about the beginning of the disk."""
    return sum(int.from_bytes(data, "little") << offset * 8 for offset, data in united(maps, granularity, SIZE))


def bits_of(paths, name, granularity=512):
    """Return the bits of the bitmaps of this name in some images, together."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_image(str(path))) for path in paths]
        maps = [maps_of(file, read_image(file)) for file in files]
        return as_bits([one[name] for one in maps if name in one], granularity)


def held_bits(path, granularity):
    """Return the bits of what an image holds itself."""
    with open_image(str(path)) as file:
        return as_bits([AllocationMap(file)], granularity)


def content(path):
    """Return what the guest sees."""
    raw = f"{path}.raw"
    qemu.qemu_img("convert", "-O", "raw", str(path), raw)
    with open(raw, "rb") as file:
        data = file.read()
    os.unlink(raw)
    return data


def changed_bits(before, after):
    """Return a bit for each sector that differs."""
    bits = 0
    for number in range(SIZE // 512):
        if before[number * 512 : number * 512 + 512] != after[number * 512 : number * 512 + 512]:
            bits |= 1 << number
    return bits


def guest_writes(path, dice, times=4):
    """Have a guest write and zero here and there, and discard whole clusters: of less QEMU only says that it did."""
    command = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
    for _number in range(times):
        what, unit = dice.choice((("write -P 7", 512), ("write -z", 4096), ("discard", 65536)))
        length = unit * dice.randrange(1, 17)
        command += ["-c", f"{what} {dice.randrange(0, (SIZE - length) // unit + 1) * unit} {length}"]
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)


def overlay(path, base, *options):
    """Make an overlay as qemu-img does, without bitmaps."""
    return qemu.create(path, SIZE, "-b", str(base), "-F", "qcow2", *options)


def crash(path):
    """Leave the bitmaps of an image inconsistent, as a VM that dies does."""
    with qemu.storage_daemon() as monitor:
        qemu._open(monitor, path)
        monitor.command("block-dirty-bitmap-add", {"node": "image", "name": "touch", "persistent": True})
        monitor._process.kill()


def lose(path):
    """Have a program that does not know bitmaps write to an image."""
    with open(path, "rb") as file:
        autoclear = int.from_bytes(file.read(96)[88:96], "big")
    qemu.patch(path, 88, (autoclear & ~1).to_bytes(8, "big"))


def union_of_granules(bits, granularity):
    """Return bits of a granularity as bits of sectors."""
    factor = granularity // 512
    return int("".join(digit * factor for digit in bin(bits)[2:]), 2)


def leave_healing(top, image, monkeypatch):
    """Leave the vault of a healing that has removed a bitmap of an image of the chain, and was not completed."""

    def failing(_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    qemu.add_bitmaps(image, [Bitmap("left", 65536, True, False)])
    with monkeypatch.context() as patch:
        patch.setattr(mend_module, "mark_given", failing)
        request = HealRequest(str(top), names=("left",), state="absent")
        assert run(MendBitmaps(), [request], SETTINGS).failures
    folder, name = os.path.split(image)
    assert [one for one in os.listdir(folder) if one.endswith("-healing")] == [f".{name}.kvmfleet-healing"]


def recording_overlay(path, base):
    """Make an overlay that records from the beginning."""
    outcome = make_overlays([OverlayRequest(str(path), str(base), bitmap_content=EMPTY)], SETTINGS)
    assert not outcome.failures


def corruptions(path):
    """Return what QEMU finds wrong with an image, but for clusters that are lost, as those of lost bitmaps are."""
    command = ["qemu-img", "check", "--output=json", str(path)]
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout)
    return said.get("corruptions", 0) + said["check-errors"]
