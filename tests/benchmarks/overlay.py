# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What making overlays costs beside the obvious shell loop, both sides in one run. Run it by 'make bench'.

Measured is the module's own work, in a process of its own that has imported what a module imports, without the start of
Ansible. Each figure is the median of the rounds; both sides take turns within a round.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor, find_qemu

ROUNDS = 9

# For each pair of ACTIVE and OVERLAY. A bitmap may have any name: names end with NUL, and none is taken for an option.
SHELL_LOOP = r"""
set -euo pipefail
while [ "$#" -gt 0 ]; do
  qemu-img create -q -f qcow2 -b "$1" -F qcow2 "$2"
  qemu-img info --output=json "$1" |
    jq -j '."format-specific".data.bitmaps[]? | select(.flags | index("auto") and (index("in-use") | not))
           | "\(.granularity)\u0000\(.name)\u0000"' |
    while IFS= read -r -d '' granularity && IFS= read -r -d '' name; do
      qemu-img bitmap --add -g "$granularity" -- "$2" "$name"
    done
  shift 2
done
"""

# The module's work in a process of its own: prints the seconds of a run and the peak memory of the process in KiB.
OUR_TURN = """
import json, resource, shutil, sys, time
import ansible.module_utils.basic
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
wanted = [OverlayRequest(path, active, bitmap_content=sys.argv[2]) for active, path in json.load(sys.stdin)]
start = time.perf_counter()
outcome = run(MakeOverlays(AttributeOptions()), wanted, Settings(False, 60, shutil.which))
seconds = time.perf_counter() - start
assert {verdict.state for verdict in outcome.verdicts} == {sys.argv[1]}, outcome.failures
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def make_disk(path: pathlib.Path, bitmaps: int) -> pathlib.Path:
    """Make an image with so many bitmaps of a few granularities."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "100G"], check=True)
    add_bitmaps(path, [(f"b{number}", 65536 << number % 3) for number in range(bitmaps)])
    return path


def add_bitmaps(path: pathlib.Path, bitmaps: list[tuple[str, int]]) -> None:
    """Add bitmaps of these names and granularities to an image, recording."""
    monitor = Monitor(find_qemu(shutil.which), 60)
    node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(path)}}
    monitor.command("blockdev-add", node)
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {"node": "n", "name": name, "persistent": True, "granularity": granularity},
        }
        for name, granularity in bitmaps
    ]
    monitor.command("transaction", {"actions": actions}, 60)
    monitor.command("blockdev-del", {"node-name": "n"}, 60)
    monitor.close()


def ours(
    pairs: list[tuple[pathlib.Path, pathlib.Path]], state: str = "created", content: str = "cumulative"
) -> tuple[float, int]:
    """Return the seconds that the module's work takes for these pairs of ACTIVE and OVERLAY, and its KiB of memory."""
    text = json.dumps([[str(active), str(path)] for active, path in pairs])
    command = [sys.executable, "-c", OUR_TURN, state, content]
    answer = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
    seconds, memory = json.loads(answer)
    return seconds, memory


def shell(active: pathlib.Path, path: pathlib.Path) -> float:
    """Return the seconds that the shell loop takes."""
    start = time.perf_counter()
    subprocess.run(["bash", "-c", SHELL_LOOP, "bash", str(active), str(path)], check=True)
    return time.perf_counter() - start


def bitmaps_of(path: pathlib.Path) -> t.Any:
    """Return what qemu-img says of the bitmaps, in a fixed order."""
    said = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", str(path)]))
    return sorted(said["format-specific"]["data"].get("bitmaps", []), key=lambda bitmap: str(bitmap["name"]))


def one_overlay(folder: pathlib.Path, bitmaps: int) -> None:
    """Compare both sides for one overlay of a disk with so many bitmaps."""
    active = make_disk(folder / "active", bitmaps)
    seconds: dict[str, list[float]] = {"shell": [], "ours": []}
    for _round in range(ROUNDS):
        seconds["shell"].append(shell(active, folder / "shell"))
        seconds["ours"].append(ours([(active, folder / "ours")])[0])
        assert bitmaps_of(folder / "shell") == bitmaps_of(folder / "ours") == bitmaps_of(active)
        (folder / "shell").unlink()
        (folder / "ours").unlink()
    theirs, own = (statistics.median(seconds[side]) for side in ("shell", "ours"))
    print(
        f"{bitmaps:>5} bitmaps, 1 overlay: shell loop {theirs:7.3f} s, module {own:7.3f} s, {theirs / own:5.1f} times"
    )


def many_disks(folder: pathlib.Path, disks: int, bitmaps: int) -> None:
    """Measure one call for many disks, and the same call again."""
    template = make_disk(folder / "template", bitmaps)
    pairs = []
    for number in range(disks):
        pairs.append((folder / f"disk{number}", folder / f"disk{number}.snap"))
        shutil.copy(template, pairs[-1][0])
    first, again = [], []
    for _round in range(ROUNDS):
        first.append(ours(pairs)[0])
        again.append(ours(pairs, "present")[0])
        for _active, path in pairs:
            path.unlink()
    print(
        f"{disks} disks of {bitmaps} bitmaps in one call: {statistics.median(first):.3f} s, "
        f"run again, unchanged: {statistics.median(again):.3f} s"
    )


def bitmap_content(folder: pathlib.Path, disks: int, bitmaps: int, writes: int) -> None:
    """Compare cumulative bitmaps with empty ones, on images in which a guest has written at so many random places."""
    template, dice = make_disk(folder / "template", bitmaps), random.Random(1)
    commands = [f"write {dice.randrange(100 << 14) << 16} 64k" for _write in range(writes)]
    command = ["qemu-io", *(word for one in commands for word in ("-c", one)), str(template)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pairs = [(folder / f"disk{number}", folder / f"disk{number}.snap") for number in range(disks)]
    for active, _path in pairs:
        shutil.copy(template, active)
    seconds: dict[str, list[float]] = {"empty": [], "cumulative": []}
    for _round in range(ROUNDS):
        for content, own in seconds.items():
            own.append(ours(pairs, content=content)[0])
            for _active, path in pairs:
                path.unlink()
    empty, cumulative = (statistics.median(own) for own in seconds.values())
    print(
        f"{disks} disks of {bitmaps} bitmaps with {writes:>2} writes: empty {empty:.3f} s, "
        f"cumulative {cumulative:.3f} s, {cumulative / empty:.2f} times"
    )


def growth(folder: pathlib.Path) -> None:
    """Show how time and memory grow with the bitmaps of one disk."""
    previous = 0.0
    for bitmaps in (250, 500, 1000, 2000):
        active = make_disk(folder / f"active{bitmaps}", bitmaps)
        figures = []
        for _round in range(ROUNDS):
            figures.append(ours([(active, folder / "over")]))
            (folder / "over").unlink()
        seconds, memory = statistics.median(f[0] for f in figures), max(f[1] for f in figures)
        ratio = f", {seconds / previous:.1f} times the row above" if previous else ""
        print(f"{bitmaps:>5} bitmaps, 1 overlay: {seconds:.3f} s, peak memory of the module {memory >> 10} MiB{ratio}")
        previous = seconds


def main() -> None:
    """Run all measurements in a temporary folder."""
    print(
        f"{os.cpu_count()} processors, {subprocess.check_output(['qemu-img', '--version'], text=True).splitlines()[0]}"
    )
    for measure in (
        lambda folder: one_overlay(folder, 1),
        lambda folder: one_overlay(folder, 8),
        lambda folder: one_overlay(folder, 64),
        lambda folder: many_disks(folder, 100, 8),
        lambda folder: bitmap_content(folder, 100, 8, 2),
        lambda folder: bitmap_content(folder, 100, 8, 50),
        growth,
    ):
        with tempfile.TemporaryDirectory() as folder:
            measure(pathlib.Path(folder))


if __name__ == "__main__":
    main()
