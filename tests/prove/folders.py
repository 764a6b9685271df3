# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Folders in which another user may write, who swaps what a run has found, or is to find, there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import typing as t

import kinds
import lab
import leftover
import modules
import overlays
import rounds
import runs

NOBODY = 65534
# What can be put in the place of a file; what lies outside is not to be changed, nor made.
LURES: dict[str, t.Callable[[pathlib.Path, pathlib.Path], None]] = {
    "symlink": lambda place, outside: place.symlink_to(outside / "bait"),
    "new": lambda place, outside: place.symlink_to(outside / "new"),
    "link": lambda place, outside: place.hardlink_to(outside / "bait"),
    "fifo": lambda place, _outside: os.mkfifo(place),
    "folder": lambda place, _outside: place.mkdir(),
    "away": lambda place, outside: place.symlink_to(outside),
    "device": lambda place, _outside: os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


class Shared(t.NamedTuple):
    """A folder in which another user may write, and what must stay as it is outside."""

    parent: pathlib.Path
    folder: pathlib.Path  # in it
    outside: pathlib.Path
    before: dict[str, tuple[t.Any, ...]]


@contextlib.contextmanager
def shared_folder(ground: lab.Lab, mode: int) -> t.Iterator[Shared]:
    """Have such a folder for the block."""
    for folder in [ground.place, *ground.place.parents][:3]:
        folder.chmod(0o755)  # the other user has to get there
    parent, outside = ground.place / "shared", ground.place / "outside"
    for folder in (parent, outside, parent / "folder"):
        folder.mkdir()
    for folder in (parent, parent / "folder"):
        folder.chmod(mode)
    (outside / "bait").write_bytes(b"bait")
    (outside / "bait").chmod(0o644)
    try:
        yield Shared(parent, parent / "folder", outside, snapshot(outside))
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        shutil.rmtree(outside, ignore_errors=True)


def snapshot(folder: pathlib.Path) -> dict[str, tuple[t.Any, ...]]:
    """Return all that must not change about a folder and what is in it; hard links do change the time of change."""
    found = {}
    for path in (folder, *folder.iterdir()):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[path.name] = (content, status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    return found


def race_wrong(ground: lab.Lab, shared: Shared, disk: kinds.Disk, ended: runs.Run) -> list[str]:
    """Return what is wrong after a run in a shared folder, whatever it says."""
    wrong = modules.run_wrong(ended, [ground.place])
    if snapshot(shared.outside) != shared.before:
        wrong.append(f"outside was {shared.before}, is {snapshot(shared.outside)}")
    if lab.identity(disk.active) != ground.promise.before[disk.active]:
        wrong.append("ACTIVE was changed")
    if ended.states == ["created"]:
        is_there = disk.target.is_file() and not disk.target.is_symlink()
        wrong += overlays.incomplete(disk) if is_there else ["is not there"]
    return wrong


def make(ground: lab.Lab, disk: kinds.Disk) -> runs.Run:
    """Have the overlay of the disk made."""
    return modules.run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), timeout=15)


@contextlib.contextmanager
def intruder(what: str, place: pathlib.Path, bait: pathlib.Path) -> t.Iterator[list[int]]:
    """Have another user at work for the block; afterwards the list has how often it did what it can."""
    command = [sys.executable, "-S", str(kinds.HERE / "intruder.py"), what, str(NOBODY), str(place), str(bait)]
    done: list[int] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = t.cast("t.IO[str]", process.stdin), t.cast("t.IO[str]", process.stdout)
        try:
            assert stdout.readline() == "ready\n"
            yield done
        finally:
            stdin.close()
            done.append(int(stdout.readline() or -1))


def race(ground: lab.Lab, what: str, mode: int, owned: bool) -> rounds.Finding:
    """Run the module while another user swaps something; owned, the image is that user's, and so is the overlay."""
    with shared_folder(ground, mode) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        if owned:
            os.chown(disk.active, NOBODY, NOBODY)
            ground.promise.prepare()
        place = {"target": disk.target, "temporary": shared.folder, "link": shared.folder}[what]
        if what == "link":
            os.chown(shared.folder, NOBODY, NOBODY)  # or it could not be moved out of a sticky folder
        with intruder(what, place, shared.outside) as done:
            ended = make(ground, disk)
        if what == "link" and shared.folder.is_symlink():
            shared.folder.unlink()
            pathlib.Path(f"{shared.folder}.link").rename(shared.folder)
        wrong = race_wrong(ground, shared, disk, ended)
        if done[0] < 0:
            wrong.append("the other user has failed")
    return rounds.Finding(f"{ended.states[0]}, {'after' if done[0] else 'without'} swaps", wrong)


STEP_TRICKS = (
    "target-symlink",
    "target-new",
    "target-link",
    "temporary-symlink",
    "temporary-new",
    "temporary-link",
    "temporary-gone",
    "temporary-folder",
    "folder-symlink",
)


def trick(shared: Shared, disk: kinds.Disk, what: str) -> bool:
    """Do once what another user could do in a folder that is not sticky; whether it could be done."""
    thing, way = what.split("-")
    if thing == "folder":
        shared.folder.rename(shared.parent / "aside")
        shared.folder.symlink_to(shared.outside)
        os.chown(shared.folder, NOBODY, NOBODY, follow_symlinks=False)
        return True
    temporary = [path for path in shared.folder.iterdir() if leftover.is_one(path.name)]
    places = [disk.target] if thing == "target" else temporary
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            if thing == "target" and place.exists():
                return False  # the overlay is there already, and who takes it away is told nothing
            place.unlink()
        if way != "gone":
            LURES[way](place, shared.outside)
    return bool(places)


def race_at_step(ground: lab.Lab, what: str, number: int) -> rounds.Finding:
    """Do something in the folder while the module is at a step."""
    with shared_folder(ground, 0o777) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        arguments = {"path": str(disk.target), "backing_file": str(disk.active), "timeout": 15}
        ground.runner.start("qcow2_overlay", arguments, ground.environment(f"module:*:{number}:stop"))
        ended = ground.runner.answer()
        done = False
        if ended is None:
            done = trick(shared, disk, what)
            ended = ground.runner.resume()
        if what == "folder-symlink" and done:
            shared.folder.unlink()
            (shared.parent / "aside").rename(shared.folder)
        wrong = race_wrong(ground, shared, disk, ended)
        if done and what.startswith("target-") and ended.states != ["failed"]:
            wrong.append("has replaced what another user has put there")
    return rounds.Finding(f"{' '.join(ended.states)}, {'after the trick' if done else 'nothing to be tricked'}", wrong)


def standing_link(ground: lab.Lab, owner: int, to_owner: int, mode: int) -> rounds.Finding:
    """Have a symlink on the way to the overlay, of this owner and to a folder of that one."""
    with shared_folder(ground, mode) as shared:
        link = shared.parent / "link"
        link.symlink_to(shared.outside)
        os.chown(link, owner, owner, follow_symlinks=False)
        os.chown(shared.outside, to_owner, to_owner)
        disk = ground.disks[0]._replace(target=link / "disk.snap.qcow2")
        (shared.outside / leftover.EXAMPLE).write_bytes(b"left over")
        before = snapshot(shared.outside)
        ended = make(ground, disk)
        wrong = modules.run_wrong(ended, [disk.target])
        trusted = owner in (0, to_owner)
        if ended.states != ["created" if trusted else "failed"]:
            wrong.append(f"{ended.states}: {ended.message}")
        if not trusted:
            wrong += race_wrong(ground, shared._replace(before=before), disk, ended)
    return rounds.Finding(ended.states[0], wrong)


def planted(ground: lab.Lab, way: str) -> rounds.Finding:
    """Have something in the folder that looks like what a killed run has left."""
    with shared_folder(ground, 0o777) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        place = shared.folder / leftover.EXAMPLE
        LURES[way](place, shared.outside)
        ended = make(ground, disk)
        wrong = race_wrong(ground, shared, disk, ended)
        if ended.states != ["created"]:
            wrong.append(f"{ended.states}: {ended.message}")
        if os.path.lexists(place) != (way != "link"):  # another name of a file is taken away, but never the file
            wrong.append("what was planted is " + ("still there" if way == "link" else "gone"))
    return rounds.Finding(ended.states[0], wrong)


def folder_jobs(ground: lab.Lab, asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with another user in the folder."""
    jobs = []
    for n in range(max(1, asked.rounds // 20)):
        for what in ("target", "temporary", "link"):
            for mode, word in ((0o777, "a folder for all"), (0o1777, "a sticky folder")):
                play = functools.partial(race, what=what, mode=mode, owned=bool(n % 2))
                jobs.append(rounds.Job(f"another user swaps the {what} in {word}", f"race-{what}-{mode:o}-{n}", play))
    ground.use(kinds.ONE)
    ground.reset()
    steps = sum(ground.calls()["module"].values()) + 8
    for what in STEP_TRICKS:
        numbers: t.Sequence[int] = range(1, steps + 1)
        if not asked.full:
            numbers = sorted(asked.randomness(what).sample(numbers, min(steps, max(4, asked.rounds // 20))))
        for number in numbers:
            play = functools.partial(race_at_step, what=what, number=number)
            jobs.append(rounds.Job(f"{what} at a step", f"step-{what}-{number}", play))
    for owner, to_owner in ((0, 0), (0, NOBODY), (NOBODY, NOBODY), (NOBODY, 0), (NOBODY, 1)):
        for mode in (0o777, 0o1777):
            play = functools.partial(standing_link, owner=owner, to_owner=to_owner, mode=mode)
            series = f"a symlink of user {owner} to a folder of user {to_owner}"
            jobs.append(rounds.Job(series, f"link-{owner}-{to_owner}-{mode:o}", play))
    return jobs + [
        rounds.Job(f"a planted leftover, {way}", f"planted-{way}", functools.partial(planted, way=way))
        for way in ("symlink", "link", "fifo", "folder", "device")
    ]
