# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a run costs with all processes that it causes, and whether its result is right, as qemu-img and the file tell.

This process becomes the parent of every process that a run leaves behind (a "subreaper"), so none is missed. Time and
CPU are measured with nothing else going on; memory and the number of programs in a run of their own, under strace,
which holds every process for a moment at its end, so that the memory of a short one is seen, too.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import typing as t

from overlay import add_bitmaps

OWNER, GROUP, MODE = 64055, 64055, 0o640  # what ACTIVE has; nobody's default
_SET_CHILD_SUBREAPER = 36
_SECONDS_TO_END = 10.0  # for what a run has left behind
_HELD = 10000  # microseconds
_TICKS = os.sysconf("SC_CLK_TCK")


class Disk(t.NamedTuple):
    """An image and the overlay to be made of it."""

    active: pathlib.Path
    overlay: pathlib.Path


class Template(t.NamedTuple):
    """The image that every ACTIVE is a copy of."""

    path: pathlib.Path
    bitmaps: list[tuple[str, int]]  # those that must go on recording: name and granularity
    virtual_size: int
    checksum: str


class Job(t.NamedTuple):
    """What a contender runs, one command after the other."""

    commands: list[list[str]]
    stdin: str = ""
    environment: t.Mapping[str, str] = {}


class Daemon(t.NamedTuple):
    """A process that works for a contender but is not started by it, and the one that waits for all it leaves."""

    pid: int
    keeper: int


class Cost(t.NamedTuple):
    """What a run took."""

    status: int  # exit code of the command that failed, or 0
    seconds: float
    cpu: float  # seconds of user and system time, of all processes
    said: str  # on standard output and error


class Look(t.NamedTuple):
    """What a run under strace shows."""

    memory: int  # bytes: the largest sum of the PSS of all processes of the run
    programs: int  # successful execve()


# Processes


def become_subreaper() -> None:
    """Have all that descends from this process, and has lost its parent, become its child."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)


def children_of(pid: int) -> list[int]:
    """Return the children of a process, or none if it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            text = pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
            found += map(int, text.split())
    return found


def descendants_of(pid: int) -> list[int]:
    """Return all processes below a process."""
    found = []
    for child in children_of(pid):
        found += [child, *descendants_of(child)]
    return found


def kill_tree(pid: int) -> None:
    """Kill a process and all below it, stopped first so that none can start another."""
    everyone = [pid, *descendants_of(pid)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)


def reap(kept: t.Collection[int], seconds: float = _SECONDS_TO_END) -> list[int]:
    """Wait for the children that a run has left, except those kept; return those that do not end."""
    deadline = time.monotonic() + seconds
    while left := [child for child in children_of(os.getpid()) if child not in kept]:
        for child in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.001)
    return []


def cpu_of_children() -> float:
    """Return the CPU seconds of all children that were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cpu_of(daemon: Daemon | None) -> float:
    """Return the CPU seconds of a daemon and its keeper, and of the children they have waited for; 0 of none."""
    ticks = 0
    for pid in daemon or ():
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def pss_of(pid: int) -> int:
    """Return the bytes of a process, shared ones in proportion; 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


# Runs


def run(
    job: Job,
    daemon: Daemon | None = None,
    prefix: t.Sequence[str] = (),
    stop_after: float | None = None,
) -> Cost:
    """Run a job and return its cost, the daemon's share included.

    With stop_after all of the job is killed after these seconds. Children that we have before are no part of it.
    """
    kept = children_of(os.getpid())  # such as the keeper of a daemon that is not this contender's
    environment = {**os.environ, **job.environment}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as stdin:
        stdin.write(job.stdin.encode())
        cpu = cpu_of_children() + cpu_of(daemon)
        start = time.perf_counter()
        status = 0
        for command in job.commands:
            stdin.seek(0)
            process = subprocess.Popen(
                [*prefix, *command], stdin=stdin, stdout=said, stderr=subprocess.STDOUT, env=environment
            )
            if stop_after is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, start + stop_after - time.perf_counter()))
                if process.poll() is None:
                    kill_tree(process.pid)
            status = process.wait()
            if status != 0:
                break
        seconds = time.perf_counter() - start
        reap(kept)
        cpu = cpu_of_children() + cpu_of(daemon) - cpu
        said.seek(0)
        return Cost(status, seconds, cpu, said.read().decode(errors="replace"))


def look(job: Job, daemon: Daemon | None = None) -> tuple[Cost, Look]:
    """Run a job under strace; count its programs and watch its memory.

    A daemon is not traced, which would take minutes; of what it starts, each different program seen counts as one.
    """
    with tempfile.TemporaryDirectory() as name:
        strace = ["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none"]
        ended, sums = threading.Event(), [0]
        started: set[str] = set()
        ignored = () if daemon else children_of(os.getpid())
        before = sum(pss_of(pid) for pid in watched(ignored))
        watcher = threading.Thread(target=watch, args=(ended, sums, ignored))
        note = threading.Thread(target=note_new, args=(ended, daemon, started))
        note.start()
        watcher.start()
        hold = ["-e", "trace=execve,exit_group", "-e", f"inject=exit_group:delay_enter={_HELD}", "--seccomp-bpf"]
        cost = run(job, daemon, [*strace, *hold, "-A", "-o", f"{name}/job", "--"])
        ended.set()
        watcher.join()
        note.join()
        programs = executed(pathlib.Path(name, "job")) + len(started)
        return cost, Look(max(sums) - before, programs)


def note_new(ended: threading.Event, daemon: Daemon | None, started: set[str]) -> None:
    """Note the programs, other than the daemon's own, that run below the keeper of a daemon."""
    while daemon and not ended.is_set():
        for pid in descendants_of(daemon.keeper):
            with contextlib.suppress(OSError):
                program = os.readlink(f"/proc/{pid}/exe")
                started |= {program} - {os.readlink(f"/proc/{daemon.pid}/exe")}
        time.sleep(0.005)


def watched(ignored: t.Collection[int]) -> list[int]:
    """Return all processes below this one, without strace, and without those below the children that are ignored."""
    children = [child for child in children_of(os.getpid()) if child not in ignored]
    found = [pid for child in children for pid in (child, *descendants_of(child))]
    return [pid for pid in found if not is_strace(pid)]


def is_strace(pid: int) -> bool:
    """Whether a process is strace."""
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_bytes() == b"strace\n"
    except OSError:
        return False


def watch(ended: threading.Event, sums: list[int], ignored: t.Collection[int]) -> None:
    """Note the memory of all processes again and again, less often when it has taken some time."""
    start = time.monotonic()
    while not ended.is_set():
        sums.append(sum(pss_of(pid) for pid in watched(ignored)))
        time.sleep(0.001 if time.monotonic() - start < 1 else 0.005)


def executed(log: pathlib.Path) -> int:
    """Return how many programs were started, from what strace has written."""
    return len(re.findall(r"execve(?:\(| resumed>).* = 0$", log.read_text(errors="replace"), re.MULTILINE))


# Images


def info(path: pathlib.Path) -> t.Any:
    """Return what qemu-img says of a qcow2 image."""
    command = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def entries(said: t.Any) -> set[tuple[str, int, tuple[str, ...]]]:
    """Return name, granularity and flags of each bitmap in what qemu-img says."""
    found = said["format-specific"]["data"].get("bitmaps", [])
    return {(entry["name"], entry["granularity"], tuple(sorted(entry["flags"]))) for entry in found}


def checksum(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_template(path: pathlib.Path, bitmaps: list[tuple[str, int]], size: str) -> Template:
    """Make an image with these recording bitmaps, one that is disabled, and one that is inconsistent."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), size], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", str(path), "crashed"], check=True)
    # A VM that dies leaves the bitmaps it was recording to marked as in use.
    crash = ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "abort", str(path)]
    subprocess.run(crash, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    add_bitmaps(path, bitmaps)
    subprocess.run(["qemu-img", "bitmap", "--add", "--disable", str(path), "sunday"], check=True)
    said = info(path)
    others = {("crashed", 65536, ("auto", "in-use")), ("sunday", 65536, ())}
    assert entries(said) == {(name, granularity, ("auto",)) for name, granularity in bitmaps} | others, said
    return Template(path, bitmaps, said["virtual-size"], checksum(path))


def fresh(disks: list[Disk], template: Template) -> None:
    """Make each ACTIVE anew, down to the disk, and remove each overlay."""
    for disk in disks:
        disk.overlay.unlink(missing_ok=True)
        shutil.copy(template.path, disk.active)
        os.chown(disk.active, OWNER, GROUP)
        os.chmod(disk.active, MODE)
    for disk in disks:  # or a run would wait for what was written before it
        with disk.active.open("rb") as file:
            os.fsync(file.fileno())


def on_disk(disks: list[Disk]) -> int:
    """Return the bytes that an overlay takes, on average of the disks."""
    return sum(disk.overlay.stat().st_blocks * 512 for disk in disks) // len(disks)


# Right or wrong


def judge(disks: list[Disk], template: Template) -> list[str]:
    """Return what is wrong with any of the overlays, in few words; nothing if all is right."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sorted(set().union(*pool.map(lambda disk: wrong_with(disk, template), disks)))


def wrong_with(disk: Disk, template: Template) -> set[str]:
    """Return what is wrong with an overlay and with ACTIVE after the run."""
    found = set()
    if checksum(disk.active) != template.checksum:
        found.add("ACTIVE was written to")
    if owner_and_mode(disk.active) != (OWNER, GROUP, MODE):
        found.add("owner or mode of ACTIVE")
    if not disk.overlay.exists():
        return found | {"no overlay"}
    if owner_and_mode(disk.overlay) != (OWNER, GROUP, MODE):
        found.add("owner or mode")
    try:
        return found | wrong_in(info(disk.overlay), disk, template)
    except subprocess.CalledProcessError:
        return found | {"not a qcow2 image"}


def owner_and_mode(path: pathlib.Path) -> tuple[int, int, int]:
    """Return user, group and mode of a file."""
    stat = path.stat()
    return stat.st_uid, stat.st_gid, stat.st_mode & 0o7777


def wrong_in(said: t.Any, disk: Disk, template: Template) -> set[str]:
    """Return what is wrong in what qemu-img says of an overlay."""
    bitmaps = entries(said)
    names, wanted = {bitmap[0] for bitmap in bitmaps}, {bitmap[0] for bitmap in template.bitmaps}
    checks = {
        "size": said["virtual-size"] == template.virtual_size,
        "backing file": said.get("full-backing-filename") == str(disk.active),
        "backing format": said.get("backing-filename-format") == "qcow2",
        "bitmaps missing": wanted <= names,
        "bitmaps too many": names <= wanted,
        "bitmaps not recording": all(flags == ("auto",) for *_bitmap, flags in bitmaps),
        "granularity": {bitmap[:2] for bitmap in bitmaps if bitmap[0] in wanted}
        == {w for w in template.bitmaps if w[0] in names},
    }
    return {what for what, holds in checks.items() if not holds}


def prove_judge(folder: pathlib.Path) -> int:
    """Give the judge a right overlay and wrong ones, each wrong in one way; return how many wrong ones it found."""
    template = make_template(folder / "template", [("b0", 65536), ("b1", 131072)], "1G")
    disk = Disk(folder / "active", folder / "overlay")
    make = f"create -q -f qcow2 -b {disk.active} -F qcow2 {disk.overlay}"
    add = "bitmap --add -g {} {} {}"
    b0, b1 = add.format(65536, disk.overlay, "b0"), add.format(131072, disk.overlay, "b1")
    cases = {
        "": [make, b0, b1],
        "no overlay": [],
        "bitmaps missing": [make, b0],
        "bitmaps too many": [make, b0, b1, add.format(65536, disk.overlay, "b2")],
        "bitmaps not recording": [make, b0, b1.replace("--add", "--add --disable")],
        "granularity": [make, b0, b1.replace("131072", "65536")],
        "size": [f"{make} 2G", b0, b1],
        "backing file": [make.replace(f"-b {disk.active}", f"-b {template.path}"), b0, b1],
        "backing format": [make.replace("-F qcow2", "-F raw"), b0, b1],
        "not a qcow2 image": [make.replace("-f qcow2", "-f qed")],
        "owner or mode": [make, b0, b1],
        "ACTIVE was written to": [make, b0, b1, add.format(65536, disk.active, "b2")],
    }
    for expected, commands in cases.items():
        fresh([disk], template)
        for command in commands:
            subprocess.run(["qemu-img", *command.split()], check=True)
        if disk.overlay.exists() and expected != "owner or mode":
            os.chown(disk.overlay, OWNER, GROUP)
            disk.overlay.chmod(MODE)
        found = judge([disk], template)
        assert (expected in found) if expected else not found, (expected, found)
    return len(cases) - 1
