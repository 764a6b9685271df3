# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Let everything go wrong that can: storage, the folder, other runs and VMs that start; judge what is there afterwards.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/faults.py. Needs QEMU and gcc.

After each round ACTIVE is what it was, to the byte; the overlays are all there and complete, as qemu-img sees them, or
none is and nothing else is left; the module says just that, names the file in its message, and leaves no process and no
lock; and once the fault is gone a run makes what is missing. All messages are printed at the end, to be read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import typing as t

import kinds
import lab
import leftover
import rounds
import runs

DIALOGUE = {"fork", "hear", "say", "kill", "wait", "ask", "answer"}
PAGE = 4096
SMALLEST_BTRFS = 128 << 20  # bytes; it makes none of less than 109 MiB
FIRST_SUBVOLUME = "0/256"
BTRFS_NODE = 16384  # bytes, in which it counts what it sets aside for a file's name
QUOTAS = 30  # of so many nodes, for each disk: more than a run takes, with all that is set aside meanwhile
ADVICE = re.compile(
    "[Rr]un this again|Make room|[Rr]un with become|Choose|Check the|Create it|make it writable|Mount it|Mount a proc|"
    "Inspect it|must be readable|remove it|name the image|Please report|Wait for"
)
# What each call of the module or of QEMU may meet, beside EIO, which any may.
ERRORS = {
    ("module", "create"): ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EMFILE", "ESTALE"),
    ("module", "open"): ("EMFILE", "EACCES", "ESTALE", "ENOENT"),
    ("module", "fsync"): ("ENOSPC", "EDQUOT"),
    ("module", "fchmod"): ("EPERM", "EROFS"),
    ("module", "linkat"): ("ENOSPC", "EDQUOT", "EROFS", "EPERM", "EMLINK", "ENOENT", "EACCES"),
    ("module", "unlinkat"): ("EROFS", "EACCES"),
    ("module", "setlk"): ("ENOLCK",),
    ("module", "getlk"): ("ENOLCK", "EINVAL"),
    ("module", "fgetxattr"): ("ENOTSUP",),
    ("module", "pread"): ("short", "ESTALE"),
    ("module", "ask"): ("EPIPE",),
    ("module", "answer"): ("ECONNRESET",),
    ("qemu", "pwrite"): ("ENOSPC", "EDQUOT", "short"),
    ("qemu", "pread"): ("short",),
    ("qemu", "open"): ("EMFILE", "EACCES"),
}


def shown(ground: lab.Lab, text: str) -> str:
    """Return a message without what differs from round to round."""
    text = text.replace(str(ground.folder), "OVERLAYS").replace(str(ground.actives_folder), "ACTIVES")
    text = re.sub(r"disk\d\.", "disk.", leftover.shown(text))
    return re.sub(r"\b\d{4,}\b", "N", text)


def told(ground: lab.Lab, run: runs.Run) -> tuple[str, ...]:
    """Return the messages of a run for the list at the end."""
    return tuple(shown(ground, message) for message in run.messages)


def judge(ground: lab.Lab, run: runs.Run, stuck: bool = False) -> rounds.Finding:
    """Judge a run that has met a fault, stuck if one that kept it from removing files, and a second one without."""
    outcome = f"told as {'success' if run.status == 0 else 'failure'}"
    if stuck and run.status and run.result and (run.says_not_removed() or ground.leftovers()):
        wrong = [*ground.images_wrong(), *unsaid(ground, run)]
        outcome += ", what could not be removed is left" + (", and it says so" if any(ground.there()) else "")
    else:
        wrong = ground.ended_wrong(run)
    return rounds.Finding(outcome, wrong + message_wrong(ground, run) + ground.rerun_wrong(), told(ground, run))


def message_wrong(ground: lab.Lab, run: runs.Run) -> list[str]:
    """Return what is wrong with the messages of a failure: each names the file and says what to do."""
    messages = run.messages
    if run.status and not messages:
        return [f"no overlay has a message: {run.message or run.stderr[-2000:]}"]
    return [
        f"the message {what}: {message}"
        for message in messages
        for what, holds in (
            ("names no file", message.startswith((*ground.subjects, "/proc:"))),
            ("does not say what to do", ADVICE.search(message)),
        )
        if not holds
    ]


def unsaid(ground: lab.Lab, run: runs.Run) -> list[str]:
    """Return which overlays a failed run has left without a word."""
    left = [disk.target for disk in ground.disks if os.path.lexists(disk.target)]
    return [f"left {path}, says: {run.message}" for path in left if not ground.is_told(path, run)]


def faulty(ground: lab.Lab, rule: str) -> rounds.Finding:
    """Run the module with a fault."""
    _who, call, number, _action = rule.split(":")
    run = ground.run(rule)
    finding = judge(ground, run, call == "unlinkat" or "+" in number)
    if call == "fsync" and run.status == 0:  # what is not on stable storage may be gone after the next power loss
        finding.violations.append("says success, though fsync has failed")
    return finding


def injected(ground: lab.Lab, kind: kinds.Kind) -> list[rounds.Job]:
    """Return a round for each call and each error that it may meet, once and from there on."""
    ground.use(kind)
    jobs = []
    for who, calls in ground.calls().items():
        for call, count in calls.items():
            errors = (*(() if call in DIALOGUE else ("EIO",)), *ERRORS.get((who, call), ()))
            for rule in [f"{who}:{call}:{n}{s}:{e}" for n in range(1, count + 1) for e in errors for s in ("", "+")]:
                sides = {"module": "the module's calls", "qemu": "QEMU's calls"}
                series = f"{kind.name}: {rule.split(':')[3]} in {sides[who]}" + (" from there on" * ("+" in rule))
                jobs.append(
                    rounds.Job(series, f"{kind.name}-{rule}", lambda ground, rule=rule: faulty(ground, rule), kind)
                )
    of_files = sum(count for call, count in ground.calls()["module"].items() if call not in DIALOGUE)
    everything = [f"module:files:{number}+:EIO" for number in range(1, of_files + 1)]
    jobs += [
        rounds.Job(
            f"{kind.name}: all I/O fails from there on", f"{kind.name}-{rule}", lambda g, r=rule: faulty(g, r), kind
        )
        for rule in everything
    ]
    return jobs


@contextlib.contextmanager
def small_disk(ground: lab.Lab, options: str) -> t.Iterator[t.Callable[[], None]]:
    """Have a file system of its own, with these options, for the overlays; what is yielded cures it."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    lab.quietly([*mount, options, "prove", str(ground.folder)])
    try:
        yield lambda: lab.quietly([*mount, "remount,rw,size=64m", "prove", str(ground.folder)])
    finally:
        lab.quietly(["umount", "-l", str(ground.folder)])


@contextlib.contextmanager
def quota(ground: lab.Lab, limit: int) -> t.Iterator[t.Callable[[], None]]:
    """Have a quota of so many bytes for the overlays, of btrfs, whose quotas hold for root too.

    What is yielded lifts it.
    """
    image, top = ground.papers / "btrfs.img", ground.papers / "btrfs"
    image.unlink(missing_ok=True)
    image.touch()
    os.truncate(image, SMALLEST_BTRFS)
    top.mkdir(exist_ok=True)
    lab.quietly(["mkfs.btrfs", str(image)])
    with contextlib.ExitStack() as stack:
        lab.quietly(["mount", "-o", "loop", str(image), str(top)])
        stack.callback(lab.quietly, ["umount", "-l", str(top)])
        lab.quietly(["btrfs", "quota", "enable", str(top)])
        lab.quietly(["btrfs", "subvolume", "create", str(top / "overlays")])
        lab.quietly(["btrfs", "qgroup", "limit", str(limit), FIRST_SUBVOLUME, str(top)])
        lab.quietly(["mount", "--bind", str(top / "overlays"), str(ground.folder)])
        stack.callback(lab.quietly, ["umount", "-l", str(ground.folder)])
        yield lambda: lab.quietly(["btrfs", "qgroup", "limit", "none", FIRST_SUBVOLUME, str(top)])


Unfit = t.Callable[[lab.Lab], t.ContextManager[t.Callable[[], None]]]


def unfit(ground: lab.Lab, storage: Unfit) -> rounds.Finding:
    """Run the module on storage that is unfit, then on the same when it is cured."""
    with storage(ground) as cure:
        run = ground.run()
        wrong = [*ground.ended_wrong(run), *message_wrong(ground, run)]
        cure()
        outcome = f"told as {'success' if run.status == 0 else 'failure'}"
        return rounds.Finding(outcome, wrong + ground.rerun_wrong(), told(ground, run))


def unfit_job(kind: kinds.Kind, series: str, name: str, storage: Unfit) -> rounds.Job:
    """Return a round on such storage."""
    return rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{name}", functools.partial(unfit, storage=storage), kind)


def full_jobs(ground: lab.Lab, kind: kinds.Kind) -> list[rounds.Job]:
    """Return a round for each size of the file system, from one page to more than enough, and for each quota."""
    ground.use(kind)
    ground.reset()
    with small_disk(ground, "size=64m"):
        assert ground.run().status == 0
        space = os.statvfs(ground.folder)
        pages = (space.f_blocks - space.f_bfree) * space.f_frsize // PAGE
    sizes = [
        unfit_job(kind, "full disk", f"full-{n}", functools.partial(small_disk, options=f"size={n * PAGE}"))
        for n in range(1, pages + 3)
    ]
    quotas = [
        unfit_job(kind, "quota", f"quota-{n}", functools.partial(quota, limit=n * BTRFS_NODE))
        for n in range(1, QUOTAS * len(kind.numbers) + 1)
    ]
    return sizes + quotas


def without_folder(ground: lab.Lab, number: int, moved: bool) -> rounds.Finding:
    """Take the folder of the overlays away while the module is at a step."""
    elsewhere = ground.place / "elsewhere"
    ground.start(f"module:*:{number}:stop")
    run = ground.runner.answer()
    there = ground.there()
    if run is None:
        ground.folder.rename(elsewhere)
        if moved:
            ground.folder.mkdir()
        else:
            shutil.rmtree(elsewhere)
        ground.runner.say()
        run = ground.runner.answer()
    try:
        return judge_without_folder(ground, t.cast("runs.Run", run), there, elsewhere)
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
        ground.folder.mkdir(exist_ok=True)


def judge_without_folder(ground: lab.Lab, run: runs.Run, there: list[bool], elsewhere: t.Any) -> rounds.Finding:
    """Judge what is left in both folders; there is what stood there when the folder was taken away."""
    ground.folder.mkdir(exist_ok=True)
    strays = [entry.name for entry in elsewhere.iterdir()] if elsewhere.is_dir() else []
    wrong = ground.images_wrong()
    if run.status != 0 and (strays or os.listdir(ground.folder)):
        wrong.append(f"failed and left {strays} and {os.listdir(ground.folder)}: {run.message}")
    if run.status == 0 and not all(there) and not all(ground.there()):
        wrong.append("says that it has created what is not there")
    if run.result is None:
        wrong.append(f"ended with {run.status} and no result: {run.stderr[-2000:]}")
    outcome = f"told as {'success' if run.status == 0 else 'failure'}"
    return rounds.Finding(outcome, wrong + message_wrong(ground, run), told(ground, run))


class Rival(t.NamedTuple):
    """What the second of two runs is to make, out of the disks of the VM."""

    what: str
    kind: kinds.Kind
    choose: t.Callable[[lab.Lab], list[kinds.Disk]]
    winners: tuple[int, ...]  # how many runs may create something
    other: str  # the state that a run comes to that waits, but is not the first


RIVALS = (
    Rival("the same target", kinds.ONE, lambda ground: ground.disks, (1,), "present"),
    Rival(
        "another target on the same ACTIVE",
        kinds.ONE,
        lambda ground: [ground.disks[0]._replace(target=ground.folder / "other.snap.qcow2")],
        (1, 2),
        "created",
    ),
    Rival("the same three, in another order", kinds.THREE, lambda ground: ground.disks[::-1], (1,), "present"),
    Rival(
        "the same target on another ACTIVE",
        kinds.ONE,
        lambda ground: [ground.disks[0]._replace(active=ground.actives_folder / "other.qcow2")],
        (1,),
        "failed",
    ),
)


def race(ground: lab.Lab, rival: Rival, pause: float, step: int | None) -> rounds.Finding:
    """Let two runs race, the second after a pause or while the first is at a step."""
    theirs = rival.choose(ground)
    for disk in theirs:
        if not disk.active.exists():
            shutil.copy2(ground.disks[0].active, disk.active)
    ground.start(f"module:*:{step}:stop" if step else "")
    first = ground.runner.answer() if step else None
    time.sleep(pause)
    arguments = ground.arguments(theirs, timeout=1 if step else 20)
    ground.second.start(arguments, ground.environment(), None)
    second = ground.second.answer()
    if first is None:
        if step:
            ground.runner.say()
        first = ground.runner.answer()
    finding = judge_race(ground, rival, theirs, t.cast("runs.Run", first), t.cast("runs.Run", second))
    if not step and {*first.states, *second.states} != {"created", rival.other}:  # nobody stopped, so waiting helps
        finding.violations.append(f"{first.states} and {second.states}, but each has waited for the other")
    return finding


def judge_race(
    ground: lab.Lab, rival: Rival, theirs: list[kinds.Disk], first: runs.Run, second: runs.Run
) -> rounds.Finding:
    """Judge what two runs have made."""
    created = [set(run.states) == {"created"} for run in (first, second)]
    wrong = [f"ended with {run.status}: {run.stderr[-2000:]}" for run in (first, second) if run.result is None]
    if sum(created) not in rival.winners:
        wrong.append(f"states {first.states} and {second.states}: {first.message} / {second.message}")
    # What stands there is what the run made that says so.
    made = [disk for won, disks in zip(created, (ground.disks, theirs)) if won for disk in disks]
    wrong += [problem for disk in made for problem in lab.incomplete(disk)]
    expected = {disk.target.name for disk in made}
    if set(os.listdir(ground.folder)) != expected:
        wrong.append(f"there is {os.listdir(ground.folder)}, not {sorted(expected)}")
    ours, ground.disks = ground.disks, made
    wrong += ground.images_wrong()
    ground.disks = ours
    words = ["+".join(sorted(set(run.states))) or "none" for run in (first, second)]
    return rounds.Finding(" and ".join(words), wrong, told(ground, first) + told(ground, second))


class VM:
    """A QEMU that opens an image for writing, as a VM does, and goes on holding it if it could."""

    def __init__(self, image: t.Any, image_format: str, emulator: bool) -> None:
        command = ["qemu-io", "-f", image_format, str(image)]
        if emulator:
            node = {"driver": image_format, "node-name": "d", "file": {"driver": "file", "filename": str(image)}}
            command = [f"qemu-system-{os.uname().machine}", "-machine", "none", "-nodefaults", "-display", "none"]
            command += ["-qmp", "stdio", "-blockdev", json.dumps(node)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, bufsize=0, **pipes)  # type: ignore[call-overload]
        self._word = b'{"execute": "qmp_capabilities"}\n' if emulator else b"length\n"
        self._sign = b'"return"' if emulator else b"MiB"
        self.opened_at: float | None = None

    def settle(self) -> bool:
        """Return whether it has the image open, once that is decided."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(self._word)
        seen = b""
        while self._sign not in seen:
            select.select([self._process.stdout], [], [], 30)
            piece = self._process.stdout.read(4096)
            if not piece:
                return False
            seen += piece
        self.opened_at = time.time()
        return True

    def end(self) -> str:
        """End it and return what it said."""
        self._process.kill()
        return self._process.communicate()[1].decode()


def vm_at_step(ground: lab.Lab, number: int, on_overlay: bool) -> rounds.Finding:
    """Start a VM on ACTIVE, or on the overlay, while the module is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    there = all(ground.there())
    disk = ground.disks[number % len(ground.disks)]
    vm = VM(*((disk.target, "qcow2") if on_overlay else (disk.active, disk.format)), emulator=False)
    runs_on = vm.settle()
    ground.runner.say()
    run = ground.runner.answer()
    said = vm.end()
    return judge_vm(ground, t.cast("runs.Run", run), runs_on, runs_on and not there, said)


def vm_at_moment(ground: lab.Lab, pause: float, emulator: bool) -> rounds.Finding:
    """Start a VM on ACTIVE at a random moment of a run."""
    ground.start()
    time.sleep(pause)
    disk = ground.disks[-1]
    # An emulator with no device takes a raw image without asking to write to it.
    vm = VM(disk.active, disk.format, emulator and disk.format == "qcow2")
    runs_on = vm.settle()
    run = ground.runner.answer()
    said = vm.end()
    # The overlay's last change is that its temporary name goes, before ACTIVE is released; clocks of files are coarse.
    made = max((disk.target.stat().st_ctime for disk in ground.disks if disk.target.exists()), default=0.0)
    too_early = runs_on and t.cast("float", vm.opened_at) < made - 0.02
    return judge_vm(ground, t.cast("runs.Run", run), runs_on, too_early, said)


def judge_vm(ground: lab.Lab, run: runs.Run, runs_on: bool, too_early: bool, said: str) -> rounds.Finding:
    """Judge a run into which a VM came; too_early, it had ACTIVE open before all overlays were there."""
    wrong = []
    there = ground.there()
    if run.status == 0 and too_early:
        wrong.append("the VM had ACTIVE open, and the overlays were made all the same")
    if run.status != 0 and runs_on and any(there):
        wrong.append("the VM runs, and an overlay is there that the run says it has not made")
    if not runs_on and "lock" not in said and "No such file" not in said:
        wrong.append(f"the VM failed in another way: {said}")
    if not runs_on or (run.status == 0 and not too_early):
        wrong += [problem for disk in ground.disks if disk.target.exists() for problem in lab.incomplete(disk)
                  if "is 'in-use'" not in problem]  # fmt: skip
    if run.status != 0 and os.listdir(ground.folder):
        wrong.append(f"there is {os.listdir(ground.folder)} after {run.message}")
    if not runs_on:
        wrong += ground.images_wrong()
    outcome = f"VM {'starts' if runs_on else 'does not start'}, told as {'success' if run.status == 0 else 'failure'}"
    return rounds.Finding(outcome, wrong + message_wrong(ground, run), told(ground, run))


def stepping(ground: lab.Lab) -> list[rounds.Job]:
    """Return the rounds in which something happens while the module is at a step."""
    jobs = []
    for kind in (kinds.ONE, kinds.THREE, kinds.TEMPLATE, kinds.RAW):
        ground.use(kind)
        for n in range(1, sum(ground.calls()["module"].values()) + 1):
            play = functools.partial(vm_at_step, number=n, on_overlay=False)
            jobs.append(
                rounds.Job(f"{kind.name}: VM starts on ACTIVE at a step", f"vm-{kind.name}-step-{n}", play, kind)
            )
    ground.use(kinds.ONE)
    for n in range(1, sum(ground.calls()["module"].values()) + 1):
        for moved in (True, False):
            word = "moved away" if moved else "removed"
            play = functools.partial(without_folder, number=n, moved=moved)
            jobs.append(rounds.Job(f"folder {word} in mid-run", f"folder-{moved}-{n}", play))
        play = functools.partial(vm_at_step, number=n, on_overlay=True)
        jobs.append(rounds.Job("one: VM starts on the overlay at a step", f"vm-overlay-step-{n}", play))
        for number, rival in enumerate(RIVALS[:2]):
            play = functools.partial(race, rival=rival, pause=0, step=n)
            jobs.append(rounds.Job(f"second run at a step, {rival.what}", f"race-{number}-step-{n}", play))
    return jobs


def racing(asked: rounds.Choice) -> list[rounds.Job]:
    """Return the rounds with a second run, or a VM, at a random moment."""
    jobs = []
    for n in range(asked.rounds):
        for number, rival in enumerate(RIVALS):
            name = f"race-{number}-moment-{n}"
            pause = asked.randomness(name).random() * 0.15
            play = functools.partial(race, rival=rival, pause=pause, step=None)
            jobs.append(rounds.Job(f"two runs race, {rival.what}", name, play, rival.kind))
        for kind in (kinds.ONE, kinds.THREE, kinds.TEMPLATE, kinds.RAW):
            name = f"vm-{kind.name}-moment-{n}"
            pause = asked.randomness(name).random() * 0.1
            play = functools.partial(vm_at_moment, pause=pause, emulator=bool(n % 2))
            jobs.append(rounds.Job(f"{kind.name}: VM starts on ACTIVE at a random moment", name, play, kind))
    return jobs


def jobs_for(crew: rounds.Crew, asked: rounds.Choice) -> list[rounds.Job]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs = [
        unfit_job(
            kinds.ONE, "read-only file system", "read-only", functools.partial(small_disk, options="ro,size=64m")
        ),
        *racing(asked),
        *stepping(ground),
    ]
    for kind in (kinds.ONE, kinds.THREE, kinds.TEMPLATE, kinds.RAW):
        jobs += injected(ground, kind)
        jobs += full_jobs(ground, kind)
    return rounds.sampled(jobs, asked, whole="one: full disk")


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for))
