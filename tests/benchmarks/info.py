# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What looking at a host's chains costs beside 'qemu-img info', both sides in one run. Run it by 'make bench'.

Measured is the module's own work, in a process of its own that has imported what a module imports, without the start of
Ansible. Each figure is the median of the rounds; both sides take turns within a round.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from overlay import make_disk

ROUNDS = 5
DISKS = 200
BITMAPS = 14

# The module's work in a process of its own: prints the seconds.
OUR_TURN = """
import json, sys, time
import ansible.module_utils.basic
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
paths, count = json.load(sys.stdin)
start = time.perf_counter()
disks = [examine_chain(path, follow=True, count=count) for path in paths]
results = [disk.as_result() for disk in disks]
seconds = time.perf_counter() - start
assert all(one["valid"] for result in results for one in result["checkpoints"]), results[0]
assert {len(result["images"]) for result in results} == {3}
print(seconds)
"""


def make_chain(folder: pathlib.Path, number: int, templates: list[pathlib.Path]) -> pathlib.Path:
    """Make a chain of three from a template for each level, lowest first, and return its top."""
    below: list[str] = []
    for level, template in enumerate(templates):
        path = folder / f"disk{number}.{level}"
        shutil.copy(template, path)
        if below:
            subprocess.run(["qemu-img", "rebase", "-u", *below, str(path)], check=True)
        below = ["-b", str(path), "-F", "qcow2"]
    return path


def ours(paths: list[pathlib.Path], count: bool) -> float:
    """Return the seconds that the module's work takes."""
    text = json.dumps([[str(path) for path in paths], count])
    command = [sys.executable, "-c", OUR_TURN]
    return float(subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout)


def theirs(paths: list[pathlib.Path]) -> float:
    """Return the seconds that qemu-img takes."""
    start = time.perf_counter()
    for path in paths:
        command = ["qemu-img", "info", "--backing-chain", "--output=json", str(path)]
        chain = json.loads(subprocess.check_output(command))
        assert [len(image["format-specific"]["data"]["bitmaps"]) for image in chain] == [BITMAPS] * 3
    return time.perf_counter() - start


def main() -> None:
    """Measure in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        templates = [make_disk(folder / f"template{level}", BITMAPS) for level in range(3)]
        subprocess.run(["qemu-io", "-c", "write 50G 64k", str(templates[2])], check=True, stdout=subprocess.DEVNULL)
        paths = [make_chain(folder, number, templates) for number in range(DISKS)]
        seconds: dict[str, list[float]] = {"qemu-img": [], "plain": [], "counting": []}
        for _round in range(ROUNDS):
            seconds["qemu-img"].append(theirs(paths))
            seconds["plain"].append(ours(paths, False))
            seconds["counting"].append(ours(paths, True))
    base, plain, counting = (statistics.median(figures) for figures in seconds.values())
    print(f"{DISKS} disks, chains of three, {BITMAPS} bitmaps each: qemu-img info --backing-chain {base:.3f} s")
    print(f"  module, without dirty bytes {plain:.3f} s, {base / plain:.1f} times; with them {counting:.3f} s")


if __name__ == "__main__":
    main()
