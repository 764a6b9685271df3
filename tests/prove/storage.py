# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlays that are merged down on XFS, on btrfs, into a block device, and where there is too little room.

Run as root, with the Python of an environment that has ansible-core, and with the collection in PYTHONPATH:
python tests/prove/storage.py. Needs QEMU, xfsprogs and btrfs-progs. For a night: --rounds 2000.

On XFS and btrfs random overlays are merged down by shared extents where that is right, and the program fails if none of
them was; others are copied. After each round a guest reads from BASE what it has read from the overlay, QEMU finds
nothing wrong in BASE, its internal snapshot is what it was, and its bitmap marks all that it and the overlays have
marked. QEMU is killed in the middle, the disk gets full and gets room again, or stays full: then the same call goes on.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import typing as t

import lab
import rounds
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import observe, survey
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitVerdict
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Held, Settings
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import qemu
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils._disk import commits

MiB = 1 << 20
SIZE = 512 * MiB  # of a disk
ONLY_LEAKS = 3  # status of qemu-img check
SHARED, COPIED = "shared", "copied"
MOST_TAKEN = 16 * MiB  # that a merge may take of the file system, if it shares the data
# The storage daemon with a parameter that it does not know where 5.2 does not know this one.
WITHOUT_X_PERF = """#!/bin/bash
exec qemu-storage-daemon "$@" < <(exec sed -u 's/"x-perf":{/"x-perf":{"unheard-of":1,/' <&0)
"""

Play = t.Callable[[pathlib.Path, random.Random], rounds.Finding]


class Judged(t.NamedTuple):
    """What must be found in BASE afterwards."""

    top: str
    base: str
    data: str  # digest
    snapshot: str | None  # digest
    marked: commits.Extents

    def wrong(self, *, leaks: bool = False) -> list[str]:
        """Return what is wrong with BASE."""
        found = []
        if commits.content(self.base, "-f", "qcow2") != self.data:
            found.append("a guest reads other data")
        if self.snapshot and commits.content(self.base, "-l", "snapshot.name=s") != self.snapshot:
            found.append("the internal snapshot has changed")
        (bits,) = commits.bits_of(os.path.dirname(self.top), [self.base])
        unit = bits["x"].granularity
        if commits.granules(bits["x"].extents, unit) != commits.granules(self.marked, unit):
            found.append("the bitmap marks other places")
        check = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", self.base], check=False)
        if check.returncode != 0 and not (leaks and check.returncode == ONLY_LEAKS):
            found.append(f"qemu-img check ends with {check.returncode}")
        return found


def judged(folder: pathlib.Path, top: str, layers: t.Sequence[str], *, snapshot: bool = False) -> Judged:
    """Return what a merge must come to; `layers` are all images of it, BASE last."""
    marked = [extent for own in commits.bits_of(folder, layers) for extent in own["x"].extents]
    was = commits.content(layers[-1], "-l", "snapshot.name=s") if snapshot else None
    return Judged(top, layers[-1], commits.content(top), was, marked)


def a_chain(folder: pathlib.Path, dice: random.Random) -> Judged:
    """Make a base of any cluster size and one to three overlays, most of which may share extents with it."""
    size = dice.choice((32 * MiB, 32 * MiB + 512 * 77, 64 * MiB))
    of_base = 1 << dice.choice((9, 11, 12, 14, 16, 16, 16, 16, 18, 20, 21))
    is_extended = of_base >= 16384 and dice.random() < 0.15
    base = qemu.create(folder / "base", size, "-o", f"cluster_size={of_base}{',extended_l2=on' * is_extended}")
    paths, granularity = [base], 1 << dice.randint(9, 20)
    qemu.add_bitmaps(base, [commits.bitmap("x", "recording", granularity)])
    commits.random_writes(base, dice, size, dice.randint(0, 30), 0 if is_extended else of_base, "qcow2")
    has_snapshot = dice.random() < 0.2
    if has_snapshot:
        qemu.qemu_img("snapshot", "-c", "s", base)
        commits.random_writes(base, dice, size, 5, 0, "qcow2")
    for number in range(dice.randint(1, 3)):
        least = max(of_base, 65536)
        # One as small as these two holds whole units of 64 KiB, or whole clusters of BASE, only by chance.
        cluster_size = dice.choice((least, least, least, min(2 * least, 2 * MiB), 2 * MiB, 65536, 4096))
        path = commits.overlay(folder / f"over{number}", paths[0], "-o", f"cluster_size={cluster_size}")
        qemu.add_bitmaps(path, [commits.bitmap("x", "recording", granularity)])
        compressed = cluster_size if dice.random() < 0.1 else 0
        commits.random_writes(path, dice, size, dice.randint(1, 40), compressed, "qcow2")
        paths.insert(0, path)
    return judged(folder, paths[0], paths, snapshot=has_snapshot)


def a_pair(folder: pathlib.Path, base: str, written: int, above: pathlib.Path | None = None) -> Judged:
    """Put an overlay with so many MiB of a guest's data, from the beginning on, onto a base that has the bitmap x."""
    top = commits.overlay((above or folder) / "top", base)
    qemu.add_bitmaps(top, [commits.bitmap("x", "recording", 65536)])
    pieces = range(0, written, 64)
    commits.write(top, *(f"write -P {number % 251 + 1} {number}M {min(64, written - number)}M" for number in pieces))
    return judged(folder, top, [top, base])


def a_base(folder: pathlib.Path) -> str:
    base = qemu.create(folder / "base", SIZE)
    qemu.add_bitmaps(base, [commits.bitmap("x", "recording", 65536)])
    return base


def merged(pair: Judged, series: str, *, leaks: bool = False, **settings: t.Any) -> rounds.Finding:
    """Merge down, and judge; `leaks` says that clusters may be of no use, as after a kill."""
    outcome = commits.merge(pair.top, pair.base, Settings(**{**DEFAULTS, **settings}))
    told = outcome.as_result("overlays")["overlays"][0]
    if outcome.failures:
        return rounds.Finding("failed", [str(failure) for failure in outcome.failures])
    return rounds.Finding(f"{series}{told['method']}", pair.wrong(leaks=leaks))


DEFAULTS: dict[str, t.Any] = {"check_mode": False, "seconds": 60, "find_program": shutil.which}


def at_random(folder: pathlib.Path, dice: random.Random) -> rounds.Finding:
    """Merge any chain down."""
    return merged(a_chain(folder, dice), "")


def by_sharing(folder: pathlib.Path, _dice: random.Random) -> rounds.Finding:
    """Merge down what is large; see that it takes no space."""
    pair = a_pair(folder, a_base(folder), 256)
    before = free_in(folder)
    finding = merged(pair, "")
    for name in os.listdir(folder):  # the overlay is gone, and its space with it
        assert name in ("base", "nbd"), name
    taken = before + 256 * MiB - free_in(folder)
    # What the overlay had is free again, or BASE's by now: if it was copied, nothing is free again.
    if finding.outcome != SHARED or taken > 256 * MiB + MOST_TAKEN:
        finding.violations.append(f"{finding.outcome}, and took {taken - 256 * MiB} bytes")
    return finding


def by_an_old_qemu(folder: pathlib.Path, _dice: random.Random) -> rounds.Finding:
    """Merge down by a QEMU that cannot share extents, two overlays at once."""
    daemon = folder / "without-x-perf"
    daemon.write_text(WITHOUT_X_PERF, encoding="ascii")
    daemon.chmod(0o755)
    pair = a_pair(folder, a_base(folder), 8)
    finding = merged(pair, "", find_program={"qemu-storage-daemon": str(daemon)}.get)
    return finding if finding.outcome == COPIED else finding._replace(violations=[*finding.violations, finding.outcome])


class Killed(MergeLayers):
    """A commit whose QEMU is killed while it moves the data."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def move(self, verdict: CommitVerdict, work: t.Any, held: Held) -> CommitVerdict:
        """Move the data, while the time runs."""
        process = held.monitor()._process
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            return super().move(verdict, work, held)
        finally:
            timer.cancel()


def killed(folder: pathlib.Path, dice: random.Random) -> rounds.Finding:
    """Kill QEMU in the middle, then make the same call again."""
    base = a_base(folder)
    top = commits.overlay(folder / "top", base)
    qemu.add_bitmaps(top, [commits.bitmap("x", "recording", 65536)])
    clusters = dice.sample(range(SIZE // 65536), 1000)
    commits.write(
        top, *(f"write -P {number % 251 + 1} {cluster * 65536} 64k" for number, cluster in enumerate(clusters))
    )
    pair = judged(folder, top, [top, base])
    request = commits.CommitRequest(top, base, speed=16 * MiB)
    outcome = run(Killed(dice.uniform(0.01, 3)), [request], Settings(**DEFAULTS))
    if not outcome.failures:
        return rounds.Finding("over before the kill", pair.wrong())
    wrong = []
    if commits.content(top) != pair.data:
        wrong.append("after the kill a guest reads other data from the overlay")
    finding = merged(pair, "killed, then ", leaks=True)
    return finding._replace(violations=[*wrong, *finding.violations])


def into_a_device(folder: pathlib.Path, dice: random.Random) -> rounds.Finding:
    """Merge down into a block device that is too small, then large enough."""
    image = folder / "device"
    image.touch()
    os.truncate(image, 64 * MiB)
    with commits.loop_device(image) as device:
        qemu.qemu_img("create", "-q", "-f", "qcow2", device, str(SIZE))
        qemu.qemu_img("bitmap", "--add", "-f", "qcow2", device, "x")
        commits.random_writes(device, dice, 64 * MiB, 5, 0, "qcow2")
        pair = a_pair(folder, device, 70)
        told = commits.refusal(pair.top, device)
        wrong = [] if told.code == "no_space" and told.subject == device else [f"not told to be too small, but {told}"]
        os.truncate(image, 80 * MiB)
        lab.quietly(["losetup", "--set-capacity", device])
        finding = merged(pair, "")
        left = [name for name in os.listdir(folder) if name not in ("device", "nbd")]
        return finding._replace(violations=[*wrong, *finding.violations, *(f"left {name}" for name in left)])


def free_in(folder: pathlib.Path) -> int:
    """Return the bytes that are free, once nothing is under way any more."""
    lab.quietly(["sync", "-f", str(folder)])
    space = os.statvfs(folder)
    return space.f_bfree * space.f_frsize


def fill(folder: pathlib.Path, left: int) -> None:
    """Leave so many bytes in the file system, of those that a run can take."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        for piece in (MiB, 4096):
            while (more := (usable_in(folder) - left) // piece * piece) > 0:
                file.write(b"\1" * min(16 * MiB, more))


def usable_in(folder: pathlib.Path) -> int:
    """Return the bytes that a run can take, once nothing is under way any more."""
    lab.quietly(["sync", "-f", str(folder)])
    free = observe.free_bytes(str(folder))
    assert free is not None
    return free


def with_just_enough(folder: pathlib.Path, _dice: random.Random, *, elsewhere: pathlib.Path) -> rounds.Finding:
    """Ask where a little less is free than is needed, and merge down where just that is free."""
    pair = a_pair(elsewhere, a_base(folder), 20, elsewhere)
    (verdict,) = run(MergeLayers(), [commits.CommitRequest(pair.top, pair.base)], CHECK).verdicts
    assert verdict.need is not None
    fill(folder, verdict.need.bytes - 65536)
    told = commits.refusal(pair.top, pair.base)
    wrong = [] if told.code == "no_space" else [f"with too little room: {told}"]
    (folder / "ballast").unlink()
    fill(folder, verdict.need.bytes + 65536)
    finding = merged(pair, "")
    return finding._replace(violations=[*wrong, *finding.violations])


CHECK = Settings(**{**DEFAULTS, "check_mode": True})


@contextlib.contextmanager
def nobody_counts() -> t.Iterator[None]:
    """As if the space was taken by others after it was counted."""
    counted = survey.need_of
    survey.need_of = lambda *_arguments, **_options: None
    try:
        yield
    finally:
        survey.need_of = counted


def full(folder: pathlib.Path, dice: random.Random, *, elsewhere: pathlib.Path, gets_room: bool) -> rounds.Finding:
    """Have the disk full in the middle, and then room in time, or only before the next call."""
    pair = a_pair(elsewhere, a_base(folder), 20, elsewhere)
    fill(folder, dice.randrange(4, 20) * MiB)
    make_room = threading.Timer(2.0, (folder / "ballast").unlink)
    with nobody_counts():
        if gets_room:
            make_room.start()
            finding = merged(pair, "paused, ", seconds=20)
            make_room.join()
            return finding
        failures = commits.merge(pair.top, pair.base, Settings(**{**DEFAULTS, "seconds": 2})).failures
    wrong = [str(one) for one in failures if one.code != "no_space"] + ["not told to be full"] * (not failures)
    if commits.content(pair.top) != pair.data:
        wrong.append("a guest reads other data from the overlay")
    (folder / "ballast").unlink()
    finding = merged(pair, "cancelled, then ")
    return finding._replace(violations=[*wrong, *finding.violations])


@contextlib.contextmanager
def file_system(kind: str, size: int) -> t.Iterator[pathlib.Path]:
    """Have a file system of this kind, made in a file, for the block."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        image, place = pathlib.Path(name, "image"), pathlib.Path(name, "mounted")
        image.touch()
        os.truncate(image, size)
        place.mkdir()
        lab.quietly([f"mkfs.{kind}", "-q", str(image)])
        lab.quietly(["mount", "-o", "loop", str(image), str(place)])
        stack.callback(lab.quietly, ["umount", "-l", str(place)])
        yield place


def series(elsewhere: pathlib.Path) -> dict[str, tuple[str, int, Play]]:
    """Return the file system of each series, its size, and how a round of it is played."""
    rest: dict[str, tuple[str, int, Play]] = {
        "block device": ("xfs", 1024 * MiB, into_a_device),
        "full, then room": ("ext4", 128 * MiB, functools.partial(full, elsewhere=elsewhere, gets_room=True)),
        "full": ("ext4", 128 * MiB, functools.partial(full, elsewhere=elsewhere, gets_room=False)),
        "just enough, ext4": ("ext4", 128 * MiB, functools.partial(with_just_enough, elsewhere=elsewhere)),
    }
    for kind in ("xfs", "btrfs"):
        rest[f"{kind}, random chains"] = (kind, 1024 * MiB, at_random)
        rest[f"{kind}, no space taken"] = (kind, 1024 * MiB, by_sharing)
        rest[f"{kind}, killed"] = (kind, 1024 * MiB, killed)
        rest[f"{kind}, old QEMU"] = (kind, 1024 * MiB, by_an_old_qemu)
    return rest


SELDOM = 10  # rounds of a series that is not about random chains


def main() -> int:
    """Play what the command line asks for and return the exit code."""
    asked, start = rounds.choice(str(__doc__), 20), time.monotonic()
    if os.geteuid() != 0:
        sys.exit("Run this as root: it mounts file systems.")
    book: rounds.Book = rounds.Book(pathlib.Path(sys.argv[0]).name, asked.seed)
    with tempfile.TemporaryDirectory() as other:
        for name, (kind, size, play) in series(pathlib.Path(other)).items():
            count = asked.rounds if name.endswith("chains") else min(asked.rounds, SELDOM)
            play_series(book, asked, name, file_system(kind, size), play, count, pathlib.Path(other))
    return book.close(start)


def play_series(
    book: rounds.Book,
    asked: rounds.Choice,
    name: str,
    place: t.ContextManager[pathlib.Path],
    play: Play,
    count: int,
    other: pathlib.Path,
) -> None:
    """Play the rounds of a series that are asked for."""
    jobs = [rounds.Job(name, f"{name}-{number}", lambda _lab: rounds.Finding("", [])) for number in range(count)]
    jobs = [job for job in jobs if asked.only is None or fnmatch.fnmatch(job.name, asked.only)]
    if not jobs:
        return
    jobs = jobs[: asked.at_most]
    with place as folder:
        for job in jobs:
            try:
                finding = play(folder, asked.randomness(job.name))
            except Exception as exc:  # a round that cannot be judged is no proof
                finding = rounds.Finding("could not be judged", [repr(exc)])
            book.note(job, finding)
            for left in (*folder.iterdir(), *other.iterdir()):
                if left.is_dir():
                    continue
                left.unlink()


if __name__ == "__main__":
    sys.exit(main())
