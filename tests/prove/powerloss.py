# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Have the power go while overlays are merged down or given up, or bitmaps healed or removed, at any write of the disk.

Run as root, with the Python of an environment that has ansible-core and libvirt-python:
python tests/prove/powerloss.py. Needs QEMU with FUSE exports, libvirt, gcc, e2fsprogs, xfsprogs and btrfs-progs.

Writes of the last moment are lost. A disk with a file system lies on a QEMU that logs what is written to it and when it
is flushed. What was on the disk at a moment is made again from that log: all up to the last flush, and some of what
came after it. The file system is mounted, the promise is judged there, and the next run completes what was begun.
The moments are random ones; with --full they are each entry of the log.
Of domains the images lie there, overlays and what is below; what libvirt keeps of them lies elsewhere, and is what it
was before the run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import pathlib
import random
import struct
import subprocess
import sys
import time
import typing as t

import checkpoints
import commits
import kinds
import lab
import mending
import reverts
import rounds

_SECTOR = 512  # bytes
_SUPER = struct.Struct("<QQQI")  # of the log, as of dm-log-writes: magic, version, entries, bytes of a sector
_ENTRY = struct.Struct("<QQQQ")  # sector, sectors, flags, bytes of data
_FLUSH, _DISCARD = 1, 4
_MOST = 10_000  # entries of a log
FILE_SYSTEMS = {"ext4": 64 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}  # bytes; they make no smaller ones
SHUT_OFF = [kind for kind, wish in checkpoints.WISHES.items() if not wish.runs]


class Write(t.NamedTuple):
    """An entry of the log."""

    offset: int  # bytes
    length: int
    is_flush: bool
    data: bytes | None  # None if it was a discard


class Recording(t.NamedTuple):
    """A disk before a run, and what the run has written to it."""

    before: pathlib.Path
    writes: list[Write]


class Mains(lab.Lab):
    """A lab whose disk can lose its power."""

    begin: t.Callable[[], None]  # have the rest as it was in the beginning

    @property
    def on_disk(self) -> pathlib.Path:
        """The folder that is on that disk."""
        return self.folder

    def recording(self, kind: kinds.Kind, system: str) -> Recording:
        """Return the recording of a run on a file system, which is made once."""
        known: dict[tuple[str, str], Recording] = self.__dict__.setdefault("_recordings", {})
        if (kind.name, system) not in known:
            known[kind.name, system] = self._record(system, self.papers / f"{kind.name}.{system}")
        return known[kind.name, system]

    def _record(self, system: str, before: pathlib.Path) -> Recording:
        """Lay out the disks on a file system, then log what a run writes."""
        before.touch()
        os.truncate(before, FILE_SYSTEMS[system])
        lab.quietly([f"mkfs.{system}", str(before)])
        with mounted(before, self.on_disk):
            self.lay_out()
        disk, log = before.with_suffix(".disk"), before.with_suffix(".log")
        _copy(before, disk)
        log.touch()
        os.truncate(log, 0)
        with logged(disk, log) as place, mounted(place, self.on_disk):
            run = self.run()
            assert run.status == 0, run
            lab.quietly(["sync", "--file-system", str(self.on_disk)])
        writes = read_log(log)
        disk.unlink()
        log.unlink()
        return Recording(before, writes)


@contextlib.contextmanager
def mounted(disk: pathlib.Path, place: pathlib.Path) -> t.Iterator[None]:
    """Have a disk mounted."""
    command = ["losetup", "--find", "--show", str(disk)]
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        lab.quietly(["mount", device, str(place)])
        try:
            yield
        finally:
            unmount(place)
    finally:
        lab.quietly(["losetup", "--detach", device])


def unmount(place: pathlib.Path) -> None:
    """Unmount a disk; for some seconds a process that another lab is about to start can still have its files."""
    deadline = time.monotonic() + 10
    while subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode != 0:
        if time.monotonic() > deadline:
            lab.quietly(["umount", str(place)])  # which says why
            return
        time.sleep(0.1)


@contextlib.contextmanager
def logged(disk: pathlib.Path, log: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """Have a file that is the disk, all writes to which go into the log."""
    place = disk.with_suffix(".fuse")
    place.touch()
    command = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}"]
    command += ["--blockdev", f"driver=file,node-name=l,filename={log}"]
    command += ["--blockdev", f"driver=blklogwrites,node-name=b,file=d,log=l,log-sector-size={_SECTOR}"]
    command += ["--export", f"type=fuse,id=e,node-name=b,mountpoint={place},writable=on"]
    with subprocess.Popen(command) as daemon:
        try:
            while place.stat().st_size == 0:
                assert daemon.poll() is None, "the daemon has ended"
                time.sleep(0.01)
            yield place
        finally:
            daemon.terminate()


def read_log(path: pathlib.Path) -> list[Write]:
    """Return what a log has."""
    writes = []
    with open(path, "rb") as file:
        _magic, _version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        file.seek(sector)
        for _number in range(count):
            start, sectors, flags, _length = _ENTRY.unpack(file.read(sector)[: _ENTRY.size])
            data = None if flags & _DISCARD else file.read(sectors * sector)
            writes.append(Write(start * sector, sectors * sector, bool(flags & _FLUSH), data))
    return writes


def _copy(one: pathlib.Path, other: pathlib.Path) -> None:
    """Copy a disk."""
    lab.quietly(["cp", "--sparse=always", "--reflink=auto", str(one), str(other)])


def survivors(writes: t.Sequence[Write], number: int, dice: random.Random) -> list[Write]:
    """Return what is on the disk if the power goes after so many entries: a part of what came after the last flush."""
    last = max((place + 1 for place in range(number) if writes[place].is_flush), default=0)
    share = dice.choice((0.0, 0.3, 0.7, 1.0))
    return [*writes[:last], *(write for write in writes[last:number] if dice.random() < share)]


def power_goes(ground: Mains, kind: kinds.Kind, system: str, share: float, seed: str) -> rounds.Finding:
    """Judge what is on the disk after the power went at this share of the log, and have the next run complete it."""
    recording, dice = ground.recording(kind, system), random.Random(seed)
    number = round(share * len(recording.writes))
    disk = recording.before.with_suffix(".now")
    _copy(recording.before, disk)
    with open(disk, "r+b") as file:
        for write in survivors(recording.writes, number, dice):
            file.seek(write.offset)
            file.write(bytes(write.length) if write.data is None else write.data)
    ground.begin()
    was = {path: identity[0] for path, identity in ground.promise.before.items()}
    with mounted(disk, ground.on_disk):
        ground.promise.prepare()  # files have other numbers and times there
        outcome = ground.promise.outcome()
        found = [f"{path} was changed" for path, now in ground.promise.before.items() if now[0] != was[path]]
        found += ground.promise.images_wrong()
        wrong = [f"entry {number} of {len(recording.writes)}: {what}" for what in found]
        return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong())


class MergingMains(Mains, commits.Stack):
    """The same for overlays that are merged down."""


class HealingMains(Mains, mending.Chain):
    """The same for bitmaps that are healed or removed."""


class RevertingMains(Mains, reverts.Overlays):
    """The same for overlays that are given up."""


class DomainMains(Mains, checkpoints.Ground):
    """The same for the checkpoints of domains."""

    @property
    def on_disk(self) -> pathlib.Path:
        """The folder that is on that disk."""
        return self.place


def entries_of(ground: Mains, kind: kinds.Kind, system: str) -> int:
    """Return how many entries the log of a run has."""
    ground.use(kind)
    ground.reset()
    return len(ground.recording(kind, system).writes)


def jobs_for(crew: rounds.Crew[Mains], asked: rounds.Choice, scenes: t.Iterable[kinds.Kind]) -> list[rounds.Job[Mains]]:
    """Return all rounds."""
    jobs = []
    for kind in scenes:
        for system in FILE_SYSTEMS:
            last = entries_of(crew.labs[0], kind, system) if asked.full else asked.rounds - 1
            for number in range(last + 1):
                name = f"{kind.name}-{system}-{number}"
                # The log of another worker can have some entries more or less, so tell the moment by a share of it.
                share = number / last if asked.full else asked.randomness(name).random()
                play = functools.partial(power_goes, kind=kind, system=system, share=share, seed=f"{asked.seed} {name}")
                jobs.append(rounds.Job(f"{system}: the power goes", name, play, kind))
    return rounds.sampled(jobs, asked)


def main() -> int:
    """Play the rounds of each operation; return the exit code."""
    plays: list[tuple[t.Collection[kinds.Kind], rounds.MakeLab[Mains]]] = [
        (commits.SCENES, functools.partial(MergingMains, make_promise=commits.Committed)),
        (mending.WISHES, functools.partial(HealingMains, make_promise=mending.Mended)),
        (reverts.WISHES, functools.partial(RevertingMains, make_promise=reverts.GoneBack)),
        (SHUT_OFF, functools.partial(DomainMains, make_promise=checkpoints.Mended)),
    ]
    asked = rounds.choice(str(__doc__), 10)
    ended = [
        rounds.prove(str(__doc__), 10, functools.partial(jobs_for, scenes=scenes), make_lab)
        for scenes, make_lab in plays
        if asked.only is None or fnmatch.filter(_names(scenes, _MOST if asked.full else asked.rounds), asked.only)
    ]
    return max(ended, default=1)


def _names(scenes: t.Collection[kinds.Kind], count: int) -> list[str]:
    return [f"{kind.name}-{system}-{number}" for kind in scenes for system in FILE_SYSTEMS for number in range(count)]


if __name__ == "__main__":
    sys.exit(main())
