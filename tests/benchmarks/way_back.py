# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rest of a snapshot's life beside the other ways: 'make bench-back' writes part two of docs/side-by-side.md.

Name a few trials to have only these, and their tables printed: commit, mishaps, rebuild, live, health. Each way takes
its turn within a round. All images lie on file systems of their own, made in files. It runs as root.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing as t

import side_by_side
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import qemu
from contenders import Libvirt
from measuring import Cost, Daemon, Job, become_subreaper, look, run
from merge import GiB, dense, file_system, make_pair, scattered

MODULES = "ansible_collections.kvmfleet.qcow2.plugins.modules"
BEGIN, END = "<!-- begin: written by make bench-back -->", "<!-- end: written by make bench-back -->"
ROUNDS = 3
KILLS = 6
CLUSTER = 65536

SHELL_COMMIT = r"""
set -euo pipefail
top=$1 base=$2
qemu-img commit -q -d -f qcow2 "$top"
qemu-img info --output=json "$top" | jq -j '."format-specific".data.bitmaps[]? | "\(.name)\u0000"' |
  while IFS= read -r -d '' name; do
    qemu-img bitmap --merge "$name" -b "$top" -F qcow2 -f qcow2 "$base" "$name"
  done
rm -- "$top"
"""
LIBVIRT_COMMIT = """
set -euo pipefail
virsh -q start --paused bench
virsh -q blockcommit bench vda --active --pivot --wait > /dev/null
virsh -q destroy bench
rm -- "$1"
"""
VIRSH_SNAPSHOTS = """
set -euo pipefail
snapshot=$1 folder=$2
shift 2
for name; do
  virsh -q snapshot-create-as "$name" --disk-only --no-metadata --diskspec "vda,file=$folder/$name.$snapshot.qcow2"
done
"""
LOOK = """
set -euo pipefail
virsh -q list --all --name | while read -r name; do
  [[ $name = health* ]] || continue
  virsh -q checkpoint-list "$name" --name
  virsh -q domblklist "$name" | while read -r target file; do
    qemu-img info -U --backing-chain --output=json "$file"
  done
done
"""


class Way(t.NamedTuple):
    """One way to do it."""

    name: str
    job: t.Callable[[], Job]
    daemon: Daemon | None = None


class Trial(t.NamedTuple):
    """What is done in each way, and judged."""

    title: str
    ways: t.Sequence[Way]
    prepare: t.Callable[[Way], None]
    judge: t.Callable[[Way, Cost], str]
    place: pathlib.Path  # in the file system whose free space is watched
    note: str = ""


class Pair(t.NamedTuple):
    """An overlay and BASE, laid out anew from those in `kept` for each run."""

    kept: pathlib.Path
    folder: pathlib.Path
    bits: dict[str, set[int]]  # of each bitmap, the clusters that both images mark

    @property
    def top(self) -> pathlib.Path:
        """The overlay."""
        return self.folder / "top"

    @property
    def base(self) -> pathlib.Path:
        """The image below it."""
        return self.folder / "base"


def module(name: str, options: dict[str, t.Any]) -> Job:
    """Return a module with its options in a Python of its own, as Ansible starts it on a host."""
    return Job([[sys.executable, "-m", f"{MODULES}.{name}"]], json.dumps({"ANSIBLE_MODULE_ARGS": options}))


# Images


def make_bits(folder: pathlib.Path, written: t.Sequence[tuple[int, int]], virtual_size: int) -> Pair:
    """Make an overlay and BASE, with eight bitmaps that hold bits in both."""
    make_pair(folder / "kept", virtual_size, written, others=scattered(200, virtual_size))
    (folder / "now").mkdir()
    kept = folder / "kept"
    both = [marked(kept / name) for name in ("top", "base")]
    assert all(both[0].values())
    assert all(both[1].values())
    return Pair(kept, folder / "now", {name: bits | both[1][name] for name, bits in both[0].items()})


def lay_out(pair: Pair) -> None:
    """Have both images as they were, on the disk."""
    for path in pair.folder.iterdir():
        path.unlink()
    for name in ("base", "top"):
        copy = pair.folder / name
        subprocess.run(["cp", "--sparse=always", "--reflink=never", pair.kept / name, copy], check=True)
    # The name of BASE is recorded as an absolute one.
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", pair.base, pair.top], check=True)
    os.sync()


def marked(path: pathlib.Path) -> dict[str, set[int] | None]:
    """Return the clusters that each bitmap of an image marks, as QEMU tells an NBD client; None if it is broken."""
    found: dict[str, set[int] | None] = {}
    with tempfile.TemporaryDirectory() as folder, qemu.exporting(folder) as monitor:
        qemu.open_bitmaps(monitor, "image", path)
        for name, _granularity, _recording, inconsistent in sorted(qemu.bitmaps_of(path)):
            extents = [] if inconsistent else qemu.dirty_extents(monitor, folder, "image", name)
            clusters = {at for start, size in extents for at in range(start // CLUSTER, -(-(start + size) // CLUSTER))}
            found[name] = None if inconsistent else clusters
    return found


def same_data(pair: Pair) -> bool:
    """Whether a guest reads what it has written, from the overlay if it is there, else from BASE."""
    there = pair.top if pair.top.exists() else pair.base
    command = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", str(pair.kept / "top"), str(there)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def wrong_with(pair: Pair) -> str:
    """Return what is wrong with data and bitmaps, as a backup would use them: from the overlay down, if it is there."""
    if not same_data(pair):
        return "**the guest's data is damaged**"
    images = [marked(path) for path in (pair.top, pair.base) if path.exists()]
    refused, lacking, more = [], [], []
    for name, wanted in pair.bits.items():
        found = [image[name] for image in images if name in image]
        if name not in images[0] or None in found:
            refused.append(name)
            continue
        union = set[int]().union(*(bits for bits in found if bits is not None))
        if not wanted <= union:
            lacking.append(name)
        elif union > wanted:
            more.append(len(union) / len(wanted))
    words = [f"**{len(lacking)} bitmaps that libvirt takes lack changes**"] * bool(lacking)
    words += [f"{len(refused)} bitmaps are lost: their next backup is a full one"] * bool(refused)
    words += [f"{len(more)} bitmaps mark up to {max(more, default=0):.1f} times what has changed"] * bool(more)
    return ", ".join(words) or "right"


# Measuring


class Space:
    """The most that a run takes of a file system, looked at every few milliseconds."""

    def __init__(self, place: pathlib.Path) -> None:
        self._place, self._ended, self.most = place, threading.Event(), 0

    def __enter__(self) -> Space:
        self._before = self._free()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _free(self) -> int:
        about = os.statvfs(self._place)
        return about.f_bfree * about.f_frsize

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, self._before - self._free())


def measure(trial: Trial, rounds: int) -> list[str]:
    """Run all ways in turns; return the table."""
    costs: dict[str, list[Cost]] = {}
    said: dict[str, set[str]] = {}
    taken: dict[str, int] = {}
    for _round in range(rounds):
        for way in trial.ways:
            trial.prepare(way)
            with Space(trial.place) as space:
                cost = run(way.job(), way.daemon)
            if cost.status:
                sys.exit(f"{trial.title}: {way.name}: exit {cost.status}: {cost.said[-2000:]}")
            side_by_side.progress(f"{trial.title}: {way.name}: {cost.seconds:.2f} s")
            costs.setdefault(way.name, []).append(cost)
            said.setdefault(way.name, set()).add(trial.judge(way, cost))
            taken[way.name] = max(taken.get(way.name, 0), space.most)
    memory = {}
    for way in trial.ways:
        trial.prepare(way)
        memory[way.name] = look(way.job(), way.daemon)[1]
    lines = [f"### {trial.title}", "", *([trial.note, ""] if trial.note else [])]
    lines += ["| | time | CPU | peak memory | programs | most new space | result |", "|---|---|---|---|---|---|---|"]
    ours = [statistics.median(figures) for figures in zip(*((c.seconds, c.cpu) for c in costs[trial.ways[0].name]))]
    for name, runs in costs.items():
        figures = [statistics.median(one) for one in zip(*((cost.seconds, cost.cpu) for cost in runs))]
        cells = [f"{figure:.2f} s ({figure / own:.2f})" for figure, own in zip(figures, ours)]
        cells += [f"{memory[name].memory >> 20} MiB", f"{memory[name].programs}", f"{taken[name] >> 20} MiB"]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(sorted(said[name]))} |")
    return [*lines, ""]


# Merging down


def commit_ways(pair: Pair, libvirt: Libvirt) -> list[Way]:
    """Return the ways to merge the overlay of a pair down; ours is the first one."""
    top, base = str(pair.top), str(pair.base)
    copy = str(pair.folder / "copy")
    overlays = [{"path": top, "backing_file": base}]
    return [
        Way("module", lambda: module("qcow2_overlay", {"state": "committed", "overlays": overlays})),
        Way("shell", lambda: Job([["bash", "-c", SHELL_COMMIT, "bash", top, base]])),
        Way(
            "libvirt",
            lambda: Job([["bash", "-c", LIBVIRT_COMMIT, "bash", top]], environment=libvirt.environment),
            libvirt.daemon,
        ),
        Way("floor", lambda: Job([["cp", "--sparse=always", "--reflink=never", top, copy], ["sync", copy]])),
    ]


def define_bench(libvirt: Libvirt, pair: Pair) -> None:
    """Define the domain whose disk is the overlay."""
    libvirt.bash(f"define bench \"$(disk vda '{pair.top}')\" > /dev/null")


def commit_trial(libvirt: Libvirt, folder: pathlib.Path, what: str, pair: Pair) -> Trial:
    """Return the trial of merging an overlay down."""

    def prepare(way: Way) -> None:
        libvirt.settle()
        lay_out(pair)
        if way.name == "libvirt":
            define_bench(libvirt, pair)

    def judge(way: Way, _cost: Cost) -> str:
        if way.name == "floor":
            return "a copy of the overlay, nothing is merged"
        return wrong_with(pair) if not pair.top.exists() else "**the overlay is still there**"

    return Trial(f"Merge down: {what}", commit_ways(pair, libvirt), prepare, judge, folder)


def commits(libvirt: Libvirt, rounds: int) -> list[str]:
    """Merge overlays down."""
    lines = []
    for kind, what, virtual_size, written in (
        ("ext4", "1.5 GiB dense, ext4", 100 * GiB, dense(3 * GiB // 2)),
        ("ext4", "12,000 clusters anywhere in 16 GiB, ext4", 16 * GiB, scattered(12000, 16 * GiB)),
        ("xfs", "1.5 GiB dense, XFS", 100 * GiB, dense(3 * GiB // 2)),
    ):
        with mounted(libvirt, kind, 12 * GiB) as folder:
            pair = make_bits(folder, written, virtual_size)
            lines += measure(commit_trial(libvirt, folder, what, pair), rounds)
    return lines


@contextlib.contextmanager
def mounted(libvirt: Libvirt, kind: str, size: int) -> t.Iterator[pathlib.Path]:
    """Have a file system, and a libvirt daemon that sees it: it has the mounts that were there when it started."""
    with file_system(kind, size) as folder:
        libvirt.start()
        try:
            yield folder
        finally:
            libvirt.stop()


def mishaps(libvirt: Libvirt, _rounds: int) -> list[str]:
    """Merge down while something goes wrong; return what is found then, and after the same command once more."""
    lines = ["### Merge down, when something is not as it should be", ""]
    lines += ["512 MiB dense. *Then* is what the same command makes of it, once what was wrong is put right.", ""]
    lines += ["| | what happens | found | then |", "|---|---|---|---|"]
    with mounted(libvirt, "ext4", 3 * GiB) as folder:
        pair = make_bits(folder, dense(GiB // 2), 100 * GiB)
        for way in commit_ways(pair, libvirt)[:3]:
            for what, befall in MISHAPS.items():
                found = befall(libvirt, pair, way)
                side_by_side.progress(f"{what}: {way.name}: {found}")
                lines.append(f"| {way.name} | {what} | {found[0]} | {found[1]} |")
    return [*lines, ""]


def begun(libvirt: Libvirt, pair: Pair, way: Way) -> None:
    """Have all as it is before a run."""
    libvirt.settle()
    lay_out(pair)
    define_bench(libvirt, pair)
    assert way.name


def once_more(libvirt: Libvirt, pair: Pair, way: Way) -> str:
    """Return what comes of the same command, given again."""
    libvirt.settle()
    cost = run(way.job(), way.daemon)
    libvirt.settle()
    merged = "merged" if not pair.top.exists() else "not merged"
    return f"{'exit 0' if cost.status == 0 else 'fails'}, {merged}, {wrong_with(pair)}"


def counted(all_found: list[tuple[str, str]]) -> tuple[str, str]:
    """Return what was found in several runs, and how often."""
    columns = ([found for found, _then in all_found], [then for _found, then in all_found])
    texts = [
        "; ".join(f"{column.count(one)} of {len(column)}: {one}" for one in sorted(set(column))) for column in columns
    ]
    return texts[0], texts[1]


def killed(libvirt: Libvirt, pair: Pair, way: Way) -> tuple[str, str]:
    """Kill it at moments spread over its time."""
    begun(libvirt, pair, way)
    seconds = run(way.job(), way.daemon).seconds
    found = []
    for number in range(KILLS):
        begun(libvirt, pair, way)
        run(way.job(), way.daemon, stop_after=seconds * (number + 0.5) / KILLS)
        libvirt.settle()
        found.append((wrong_with(pair), once_more(libvirt, pair, way)))
    return counted(found)


def full(libvirt: Libvirt, pair: Pair, way: Way) -> tuple[str, str]:
    """Run it where there is too little room, then where there is enough."""
    begun(libvirt, pair, way)
    filler = pair.folder.parent / "filler"
    about = os.statvfs(pair.folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(about.f_bavail * about.f_frsize - GiB // 4, 1))
    cost = run(way.job(), way.daemon, stop_after=60)
    libvirt.settle()
    found = f"{'exit 0' if cost.status == 0 else 'fails'}, {wrong_with(pair)}"
    filler.unlink()
    return found, once_more(libvirt, pair, way)


def twice(libvirt: Libvirt, pair: Pair, way: Way) -> tuple[str, str]:
    """Run it when it has been done."""
    begun(libvirt, pair, way)
    run(way.job(), way.daemon)
    return wrong_with(pair), once_more(libvirt, pair, way)


def started(libvirt: Libvirt, pair: Pair, way: Way) -> tuple[str, str]:
    """Have the domain started while it runs."""
    begun(libvirt, pair, way)
    seconds = run(way.job(), way.daemon).seconds
    begun(libvirt, pair, way)
    starts: list[int] = []

    def start() -> None:
        time.sleep(seconds / 2)
        environment = {**os.environ, **libvirt.environment}
        done = subprocess.run(["virsh", "-q", "start", "bench"], env=environment, capture_output=True, check=False)
        starts.append(done.returncode)

    starter = threading.Thread(target=start)
    starter.start()
    cost = run(way.job(), way.daemon)
    starter.join()
    libvirt.settle()
    found = f"the start {'succeeds' if starts == [0] else 'is refused'}, {'exit 0' if cost.status == 0 else 'fails'}"
    return f"{found}, {wrong_with(pair)}", once_more(libvirt, pair, way)


MISHAPS: dict[str, t.Callable[[Libvirt, Pair, Way], tuple[str, str]]] = {
    f"killed with SIGKILL, {KILLS} times": killed,
    "the disk is full": full,
    "run again": twice,
    "the VM is started meanwhile": started,
}


# Rebuilding bitmaps


def rebuilds(libvirt: Libvirt, rounds: int) -> list[str]:
    """Have backups go on after an overlay by qemu-img alone: by rebuilding its bitmaps, or by a full backup."""
    del libvirt
    with file_system("ext4", 12 * GiB) as folder:
        pair = make_bits(folder, scattered(12000, 16 * GiB), 16 * GiB)
        for name in pair.bits:
            subprocess.run(["qemu-img", "bitmap", "--remove", pair.kept / "top", name], check=True)
        top, backup = str(pair.top), str(folder / "backup")
        convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", top, backup]
        ways = [
            Way("module", lambda: module("qcow2_bitmap", {"state": "valid", "path": top})),
            Way("full backup", lambda: Job([convert, ["sync", backup]])),
        ]

        def judge(way: Way, _cost: Cost) -> str:
            return wrong_with(pair) if way.name == "module" else "a full backup; the bitmaps stay lost"

        note = "16 GiB, 12,000 clusters in the overlay, eight bitmaps lost by `qemu-img create`."
        trial = Trial("Bitmaps that were lost", ways, lambda _way: lay_out(pair), judge, folder, note)
        return measure(trial, rounds)


# Running domains


def live(libvirt: Libvirt, rounds: int) -> list[str]:
    """Take snapshots of running domains, each of which has two checkpoints."""
    lines = []
    with mounted(libvirt, "ext4", 12 * GiB) as folder:
        for count in (1, 10, 50):
            names = [f"live{count}-{number}" for number in range(count)]
            for name in names:
                path = folder / f"{name}.qcow2"
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True)
                libvirt.bash(
                    f"define {name} \"$(disk vda '{path}')\" > /dev/null; virsh -q start {name};"
                    f"for c in one two; do virsh -q checkpoint-create-as {name} $c > /dev/null; done"
                )
            lines += measure(live_trial(libvirt, folder, names), rounds)
            libvirt.bash(f"for name in {' '.join(names)}; do virsh -q destroy $name; done")
    return lines


def live_trial(libvirt: Libvirt, folder: pathlib.Path, names: list[str]) -> Trial:
    """Return the trial of one snapshot more of these domains."""
    taken = itertools.count()
    snapshot = ""

    def prepare(_way: Way) -> None:
        nonlocal snapshot
        snapshot = f"s{next(taken)}"

    def ours() -> Job:
        options = {"name": names, "snapshot": snapshot, "running": "live", "uri": uri_of(libvirt)}
        return module("domain_overlay", options)

    def theirs() -> Job:
        command = ["bash", "-c", VIRSH_SNAPSHOTS, "bash", snapshot, str(folder), *names]
        return Job([command], environment=libvirt.environment)

    def judge(_way: Way, _cost: Cost) -> str:
        wrong = sum(not is_on(libvirt, name, f"{name}.{snapshot}.qcow2") for name in names)
        return f"**{wrong} are not on it, or do not record**" if wrong else "right"

    ways = [Way("module", ours, libvirt.daemon), Way("loop of virsh", theirs, libvirt.daemon)]
    return Trial(f"Snapshot of {side_by_side.count(len(names), 'running domain')}", ways, prepare, judge, folder)


def uri_of(libvirt: Libvirt) -> str:
    """Return where the daemon of the lab is."""
    return libvirt.environment["LIBVIRT_DEFAULT_URI"]


def is_on(libvirt: Libvirt, name: str, file: str) -> bool:
    """Whether QEMU writes to this overlay, and has both bitmaps recording there."""
    command = ["virsh", "qemu-monitor-command", name, '{"execute": "query-named-block-nodes"}']
    said = subprocess.check_output(command, env={**os.environ, **libvirt.environment}, text=True)
    for node in json.loads(said)["return"]:
        if node["drv"] == "qcow2" and node["file"].endswith(f"/{file}"):
            recording = {bitmap["name"] for bitmap in node.get("dirty-bitmaps", ()) if bitmap["recording"]}
            return not node["ro"] and {"one", "two"} <= recording
    return False


def health(libvirt: Libvirt, rounds: int) -> list[str]:
    """Look at 100 domains with 10 disks each, in chains of two, with two checkpoints, all shut off."""
    disks = 10
    with mounted(libvirt, "ext4", 12 * GiB) as folder:
        for number in range(100):
            name = f"health{number}"
            paths = [folder / f"{name}-{disk}.qcow2" for disk in range(disks)]
            for path in paths:
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True)
            elements = "".join(f"$(disk vd{'abcdefghij'[at]} '{path}')" for at, path in enumerate(paths))
            libvirt.bash(
                f'define {name} "{elements}"; virsh -q start --paused {name};'
                f"virsh -q checkpoint-create-as {name} one; virsh -q checkpoint-create-as {name} two;"
                f"virsh -q snapshot-create-as {name} s --disk-only --no-metadata; virsh -q destroy {name}"
            )
        ways = [
            Way("module", lambda: module("domain_info", {"name": ["health*"], "uri": uri_of(libvirt)}), libvirt.daemon),
            Way("loop", lambda: Job([["bash", "-c", LOOK]], environment=libvirt.environment), libvirt.daemon),
        ]

        def judge(way: Way, cost: Cost) -> str:
            if way.name == "loop":
                return f"no verdict: {len(cost.said) >> 10} KiB to read"
            found = [one["next_backup"] for one in json.loads(cost.said)["domains"]]
            return f"{found.count('incremental')} of {len(found)} can go on with increments"

        trial = Trial("Health of 1,000 disks", ways, lambda _way: None, judge, folder, str(health.__doc__))
        return measure(trial, rounds)


TRIALS: dict[str, t.Callable[[Libvirt, int], list[str]]] = {
    "commit": commits,
    "mishaps": mishaps,
    "rebuild": rebuilds,
    "live": live,
    "health": health,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("trials", nargs="*", choices=[*TRIALS, []], help="default all, written into the document")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    become_subreaper()
    lab = pathlib.Path(tempfile.mkdtemp(prefix="back."))
    libvirt = Libvirt(lab)
    try:
        lines = [line for name in options.trials or TRIALS for line in TRIALS[name](libvirt, options.rounds)]
        lines = [f"Measured on: {side_by_side.machine([libvirt])}.", "", *lines]
    finally:
        shutil.rmtree(lab)
    print("\n".join(lines))
    if not options.trials:
        side_by_side.write("\n".join(lines), BEGIN, END)


if __name__ == "__main__":
    main()
