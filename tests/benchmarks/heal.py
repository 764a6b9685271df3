# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What rebuilding a bitmap of an overlay costs, and how much memory it takes. Run it by 'make bench'.

Measured is the module's own work, in a process of its own that has imported what a module imports, without the start of
Ansible; QEMU's part is in the seconds, its memory is not in the MiB. HEAL_TIB=10 measures a disk of 10 TiB as well.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

from overlay import add_bitmaps, bitmaps_of

ROUNDS = 5
GIB = 1 << 30

# The module's work in a process of its own: prints the seconds and the peak memory of the process in KiB.
OUR_TURN = """
import json, resource, shutil, sys, time
import ansible.module_utils.basic
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
start = time.perf_counter()
outcome = run(MendBitmaps(), [HealRequest(path) for path in sys.argv[1:]], Settings(False, 60, shutil.which))
seconds = time.perf_counter() - start
assert {verdict.result_state for verdict in outcome.verdicts} == {"rebuilt"}, outcome.failures
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def qemu_img(*words: object) -> None:
    """Run qemu-img."""
    subprocess.run(["qemu-img", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def make_base(path: pathlib.Path, size: int) -> pathlib.Path:
    """Make an image with one bitmap."""
    qemu_img("create", "-q", "-f", "qcow2", path, size)
    add_bitmaps(path, [("monday", 65536)])
    return path


def full_overlay(path: pathlib.Path, base: pathlib.Path, size: int) -> pathlib.Path:
    """Make an overlay that holds everything itself."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, size)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    return path


def scattered_overlay(path: pathlib.Path, base: pathlib.Path, size: int, extents: int) -> pathlib.Path:
    """Make an overlay that holds so many clusters of zeroes, here and there."""
    dice = random.Random(1)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    places = dice.sample(range(size // 65536 // 2), extents)
    commands = "".join(f"write -q -z {place * 131072} 64k\n" for place in sorted(places))
    subprocess.run(["qemu-io", "-f", "qcow2", path], input=commands, text=True, check=True, stdout=subprocess.DEVNULL)
    return path


def heal(paths: list[pathlib.Path]) -> tuple[float, int]:
    """Return the seconds that healing takes, and the KiB of memory."""
    command = [sys.executable, "-c", OUR_TURN, *map(str, paths)]
    seconds, memory = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert all(len(bitmaps_of(path)) == 1 for path in paths)
    return seconds, memory


def measure(what: str, paths: list[pathlib.Path], rounds: int = ROUNDS) -> None:
    """Heal again and again, and print the median."""
    figures = []
    for _round in range(rounds):
        figures.append(heal(paths))
        for path in paths:
            qemu_img("bitmap", "--remove", path, "monday")
    seconds, memory = statistics.median(f[0] for f in figures), max(f[1] for f in figures)
    print(f"{what}: {seconds:.3f} s, peak memory of the module {memory >> 10} MiB")


def main() -> None:
    """Run all measurements in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base = make_base(folder / "base", 100 * GIB)
        measure("100 GiB, 100,000 extents", [scattered_overlay(folder / "many", base, 100 * GIB, 100_000)])
        disks = [make_base(folder / f"base{number}", GIB) for number in range(100)]
        tops = [scattered_overlay(folder / f"top{number}", disk, GIB, 100) for number, disk in enumerate(disks)]
        measure("100 disks, 100 extents each", tops, rounds=1)
    for tib in [1, *filter(None, [int(os.environ.get("HEAL_TIB", "0"))])]:
        with tempfile.TemporaryDirectory() as name:
            folder, size = pathlib.Path(name), tib << 40
            base = make_base(folder / "base", size)
            measure(
                f"{tib} TiB, everything held", [full_overlay(folder / "full", base, size)], rounds=3 if tib == 1 else 1
            )


if __name__ == "__main__":
    main()
