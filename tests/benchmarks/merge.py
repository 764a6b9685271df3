# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What merging an overlay down costs beside 'qemu-img commit -d', both sides in one run. Run it by 'make bench'.

As in overlay.py, measured is the module's own work, with all that keeps bitmaps alive, which qemu-img loses if it is
killed. Each figure is the median of the rounds; both sides take turns within a round, each on images of its own.

On XFS and btrfs the module shares extents. These file systems are made in files, which needs root. --large adds an
overlay of 20 GiB there, which needs 45 GiB in the temporary folder, and minutes.

Nothing of the images is in the host's page cache, as VMs with cache='none' leave them, but where the line says
"cached". There the kernel frees the pages of the overlay when it is removed, for either side.
"""

from __future__ import annotations

import contextlib
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

from overlay import add_bitmaps

ROUNDS = 5
GiB = 1 << 30
CLUSTER = 65536
BITMAPS = [(f"b{number}", CLUSTER) for number in range(8)]

OUR_TURN = """
import shutil, sys, time
import ansible.module_utils.basic
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
start = time.perf_counter()
outcome = run(MergeLayers(), [CommitRequest(*sys.argv[1:])], Settings(False, 60, shutil.which))
seconds = time.perf_counter() - start
assert outcome.verdicts[0].state == "committed", [str(failure) for failure in outcome.failures]
print(seconds, outcome.verdicts[0].method)
"""

Extents = t.Sequence[tuple[int, int]]  # start and length in bytes


def make_pair(
    folder: pathlib.Path, virtual_size: int, written: Extents, others: Extents = (), *, cached: bool = False
) -> tuple[pathlib.Path, pathlib.Path]:
    """Make an overlay, to which a guest has written, and its backing file, which has `others`; both have bitmaps.

    If `cached`, all that was written is still in the host's page cache.
    """
    folder.mkdir()
    top, base = folder / "top", folder / "base"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), str(virtual_size)], check=True)
    add_bitmaps(base, BITMAPS)
    guest_writes(base, others)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top)], check=True)
    add_bitmaps(top, BITMAPS)
    guest_writes(top, written)
    for path in (top, base):  # or one side would pay for what the other has left to be written
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return top, base


def guest_writes(path: pathlib.Path, written: Extents) -> None:
    """Write there as a guest does."""
    commands = [word for start, length in written for word in ("-c", f"write -P 7 {start} {length}")]
    command = ["qemu-io", "-f", "qcow2", "-t", "writeback", *commands, str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ours(top: pathlib.Path, base: pathlib.Path) -> tuple[float, str]:
    """Return the seconds that the module's work takes, and how it has moved the data."""
    command = [sys.executable, "-c", OUR_TURN, str(top), str(base)]
    seconds, method = subprocess.check_output(command, text=True).split()
    return float(seconds), method


def theirs(top: pathlib.Path, _base: pathlib.Path) -> tuple[float, str]:
    """Return the seconds that qemu-img takes, and the removal of the overlay, as the module removes it, too.

    qemu-img ends when all is on the disk.
    """
    start = time.perf_counter()
    subprocess.run(["qemu-img", "commit", "-q", "-d", "-f", "qcow2", str(top)], check=True)
    top.unlink()
    return time.perf_counter() - start, "copied"


def side_by_side(
    what: str,
    folder: pathlib.Path,
    virtual_size: int,
    written: Extents,
    method: str,
    *,
    rounds: int = ROUNDS,
    cached: bool = False,
) -> None:
    """Compare both sides for one overlay."""
    seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
    for _round in range(rounds):
        for side, merge in (("theirs", theirs), ("ours", ours)):
            pair = make_pair(folder / "pair", virtual_size, written, cached=cached)
            taken, how = merge(*pair)
            assert how == (method if side == "ours" else "copied"), how
            seconds[side].append(taken)
            shutil.rmtree(folder / "pair")
    their, own = (statistics.median(seconds[side]) for side in ("theirs", "ours"))
    ratio = f"{their / own:6.1f} times as fast" if own < their else f"{own / their:6.2f} times as long"
    print(f"{what:<44} qemu-img commit -d {their:7.3f} s, module {own:7.3f} s, {method}, {ratio}", flush=True)


def dense(size: int) -> Extents:
    """Return all of the first `size` bytes, in pieces that qemu-io can write."""
    return [(start, min(GiB // 4, size - start)) for start in range(0, size, GiB // 4)]


def scattered(count: int, virtual_size: int) -> Extents:
    """Return so many clusters, anywhere."""
    dice = random.Random(1)
    return [(number * CLUSTER, CLUSTER) for number in dice.sample(range(virtual_size // CLUSTER), count)]


def beside_the_data(folder: pathlib.Path) -> None:
    """Measure what is done for the bitmaps, where there is next to no data."""
    figures = []
    for _round in range(ROUNDS):
        pair = make_pair(folder / "pair", 100 * GiB, scattered(50, 100 * GiB))
        figures.append(ours(*pair)[0])
        shutil.rmtree(folder / "pair")
    print(f"100 GiB, {len(BITMAPS)} bitmaps, 50 clusters: all but the data takes {statistics.median(figures):.3f} s")


@contextlib.contextmanager
def file_system(kind: str, size: int) -> t.Iterator[pathlib.Path]:
    """Have a file system of this kind, made in a file, for the block."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        image, place = pathlib.Path(name, "image"), pathlib.Path(name, "mounted")
        image.touch()
        os.truncate(image, size)
        place.mkdir()
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
        stack.callback(subprocess.run, ["umount", str(place)], check=True)
        yield place


def main() -> None:
    """Run all measurements in temporary folders."""
    version = subprocess.check_output(["qemu-img", "--version"], text=True).splitlines()[0]
    print(f"{os.cpu_count()} processors, {version}")
    if os.geteuid() == 0:
        for kind in ("xfs", "btrfs"):
            with file_system(kind, 10 * GiB) as folder:
                side_by_side(f"{kind}, 2 GiB", folder, 100 * GiB, dense(2 * GiB), "shared")
            if "--large" in sys.argv:
                with file_system(kind, 60 * GiB) as folder:
                    for cached, what in ((False, f"{kind}, 20 GiB"), (True, f"{kind}, 20 GiB, cached")):
                        written = dense(20 * GiB)
                        side_by_side(what, folder, 100 * GiB, written, "shared", rounds=1, cached=cached)
    else:
        print("XFS and btrfs are left out: to make them needs root.")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        side_by_side("by copying, 1.5 GiB", folder, 100 * GiB, dense(3 * GiB // 2), "copied")
        side_by_side("by copying, 12,000 clusters anywhere", folder, 16 * GiB, scattered(12000, 16 * GiB), "copied")
        beside_the_data(folder)


if __name__ == "__main__":
    main()
