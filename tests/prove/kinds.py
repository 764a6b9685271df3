# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What VMs there are, and what their images look like."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
COLLECTION = HERE.parents[1]
sys.path[:0] = [str(COLLECTION.parents[2]), str(COLLECTION / "tests/unit/plugins/module_utils")]

import qemu  # noqa: E402  makes the images; nothing of it judges

# Of each disk that there can be: name, granularity, recording, inconsistent.
BITMAPS = (
    (("monday", 65536, True, False), ("tuesday", 4096, True, False), ("crashed", 65536, False, True)),
    (("monday", 65536, True, False), ("sunday", 131072, False, False)),
    (("monday", 1048576, True, False), ("Mittwoch, früh", 32768, True, False)),
    (("sunday", 65536, False, False),),
    None,  # raw
)
# Of the image below the first disk. Bits of "monday" come from there; those of "tuesday" end at a gap.
BELOW = (("monday", 4096, True, False), ("tuesday", 65536, True, True))
SIZE = 64 << 20


class Kind(t.NamedTuple):
    """What a VM has: the numbers of its disks."""

    name: str
    numbers: tuple[int, ...]


ONE, THREE, TEMPLATE, RAW = Kind("one", (0,)), Kind("three", (0, 1, 2)), Kind("template", (3,)), Kind("raw", (4,))


class Disk(t.NamedTuple):
    """One disk of the VM."""

    active: pathlib.Path
    target: pathlib.Path
    bitmaps: dict[str, int]  # granularity of those that must go on recording
    size: int = SIZE  # bytes
    format: str = "qcow2"  # of ACTIVE
    number: int = 0  # of its template


class Templates:
    """One ACTIVE for each disk, made once and copied for each round."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.paths = []
        for number, bitmaps in enumerate(BITMAPS):
            path = folder / f"template{number}.qcow2"
            if bitmaps is None:
                path.touch()
                os.truncate(path, SIZE)
            else:
                below = ["-b", self._below(folder), "-F", "qcow2"] if number == 0 else []
                qemu.create(path, SIZE, *below)
                qemu.add_bitmaps(path, [qemu.Bitmap(*bitmap) for bitmap in bitmaps])
            image_format = "raw" if bitmaps is None else "qcow2"
            subprocess.run(
                ["qemu-io", "-f", image_format, "-c", "write -P 7 1M 300k", str(path)], check=True, stdout=-3
            )
            self.paths.append(path)

    @staticmethod
    def _below(folder: pathlib.Path) -> str:
        """Make the image below the first disk, which all rounds share; no run writes to it."""
        path = qemu.create(folder / "below.qcow2", SIZE)
        qemu.add_bitmaps(path, [qemu.Bitmap(*bitmap) for bitmap in BELOW])
        subprocess.run(["qemu-io", "-c", "write -P 8 9M 300k", path], check=True, stdout=-3)
        return path
