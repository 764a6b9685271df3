# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of commits share: chains made by QEMU, and what QEMU says of their data and of their bits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import tempfile
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import Outcome, run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu
from .overlays import SETTINGS

Extents = list[tuple[int, int]]  # start and length in bytes
KINDS = ("recording", "disabled", "inconsistent")


def merge(top: t.Any, base: t.Any, settings: t.Any = SETTINGS, **options: t.Any) -> Outcome:
    """Merge everything from TOP down into BASE."""
    request = CommitRequest(str(top), str(base), **options)
    return run(MergeLayers(), [request], settings)


def merged(top: t.Any, base: t.Any, **options: t.Any) -> dict[str, t.Any]:
    """Merge, and return what became of it, which must be well."""
    outcome = merge(top, base, **options)
    assert not outcome.failures, [str(one) for one in outcome.failures]
    (result,) = outcome.as_result("overlays")["overlays"]
    return t.cast("dict[str, t.Any]", result)


def refusal(top: t.Any, base: t.Any, **options: t.Any) -> Refusal:
    """Return the one reason for which a merge is refused."""
    (failure,) = merge(top, base, **options).failures
    return failure


def content(path: t.Any, *options: str) -> str:
    """Return a digest of what a guest reads, as QEMU converts it; options are arguments of qemu-img convert."""
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile() as raw:  # not beside the image, where there may be no room
        qemu.qemu_img("convert", "-O", "raw", *options, str(path), raw.name)
        while piece := os.read(raw.fileno(), 1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check(path: t.Any) -> None:
    """Have QEMU check an image, in which nothing may be wrong or leaked."""
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def bitmap(name: str, kind: str, granularity: int) -> Bitmap:
    return Bitmap(name, granularity, kind != "disabled", kind == "inconsistent")


def overlay(path: t.Any, below: t.Any, *options: str, form: str = "qcow2", size: t.Any = None) -> str:
    """Make an overlay; options are arguments of qemu-img create."""
    sizes = [] if size is None else [str(size)]
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", str(below), "-F", form, *options, str(path), *sizes)
    return str(path)


def write(path: t.Any, *commands: str, form: str = "qcow2") -> None:
    """Have qemu-io execute commands on an image."""
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", form, "-d", "unmap", *words, str(path)], check=True, stdout=subprocess.DEVNULL)


def random_writes(path: t.Any, dice: random.Random, size: int, times: int, compressed: int, form: str) -> None:
    """Have a guest write, zero and discard here and there, and before a tool write compressed clusters of this size."""
    commands = []
    for number in range(times):
        length = min(dice.choice((512, 4096, 70000 // 512 * 512, 300 << 10, 1 << 20)), size)
        offset = size - length if number == 0 else dice.randrange(0, (size - length) // 512 + 1) * 512
        kind = dice.choice((f"write -P {dice.randint(1, 255)}",) * 3 + ("write -z", "write -z -u", "discard"))
        commands.append(f"{kind} {offset} {length}")
    if compressed:  # QEMU writes compressed only what is not allocated yet
        clusters = dice.sample(range(size // compressed), min(times // 5, size // compressed))
        commands[:0] = [f"write -c -P {dice.randint(1, 255)} {one * compressed} {compressed}" for one in clusters]
    write(path, *commands, form=form)


class Bits(t.NamedTuple):
    """What a bitmap marks, as QEMU serves it to a backup."""

    granularity: int
    extents: Extents

    def whole(self) -> Extents:
        """Return the same as whole granules; in a smaller image QEMU serves the last one only up to the disk's end."""
        return [(start, -(-length // self.granularity) * self.granularity) for start, length in self.extents]


def bits_of(folder: t.Any, paths: t.Sequence[str]) -> list[dict[str, Bits]]:
    """Return for each image the bits of each of its consistent bitmaps, by name."""
    found: list[dict[str, Bits]] = []
    with qemu.exporting(folder) as monitor:
        for number, path in enumerate(paths):
            qemu.open_bitmaps(monitor, f"n{number}", path)
            own = sorted(qemu.bitmaps_of(path))
            found.append(
                {
                    name: Bits(granularity, qemu.dirty_extents(monitor, folder, f"n{number}", name))
                    for name, granularity, _recording, inconsistent in own
                    if not inconsistent
                }
            )
    return found


def held_by(path: t.Any) -> Extents:
    """Return what an image holds itself, not the images below, as QEMU maps it."""
    extents = json.loads(qemu.qemu_img("map", "--output=json", str(path)))
    return [(one["start"], one["length"]) for one in extents if one["depth"] == 0 and one["present"]]


def granules(extents: Extents, granularity: int) -> set[int]:
    """Return the numbers of the granules that the extents touch."""
    return {
        granule
        for start, length in extents
        for granule in range(start // granularity, (start + length - 1) // granularity + 1)
    }


@contextlib.contextmanager
def loop_device(path: t.Any) -> t.Iterator[str]:
    """Have a file as a block device for the block."""
    device = subprocess.check_output(["losetup", "--find", "--show", str(path)], text=True).strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
