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
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import typing as t

import kinds
import lab
import leftover
import machine
import overlays
import promise
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
    "Inspect it|move it away|must be readable|remove it|name the image|Name the |Please report|Wait for"
)
# What each call of the module or of QEMU may meet, beside EIO, which any may.
ERRORS = {
    ("module", "create"): ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EMFILE", "ESTALE"),
    ("module", "open"): ("EMFILE", "EACCES", "ESTALE", "ENOENT"),
    ("module", "fsync"): ("ENOSPC", "EDQUOT"),
    ("module", "fchmod"): ("EPERM", "EROFS"),
    ("module", "linkat"): ("ENOSPC", "EDQUOT", "EROFS", "EPERM", "EMLINK", "ENOENT", "EACCES"),
    ("module", "unlinkat"): ("EROFS", "EACCES"),
    ("module", "renameat"): ("ENOSPC", "EROFS", "EACCES"),
    ("module", "renameat2"): ("ENOSPC", "EROFS", "EACCES", "EINVAL"),
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
        wrong = [*ground.promise.images_wrong(), *ground.promise.unsaid(run)]
        outcome += ", what could not be removed is left" + (", and it says so" if any(ground.promise.done()) else "")
    else:
        wrong = ground.ended_wrong(run)
    return rounds.Finding(outcome, wrong + message_wrong(ground, run) + ground.promise.rerun_wrong(), told(ground, run))


def message_wrong(ground: lab.Lab, run: runs.Run) -> list[str]:
    """Return what is wrong with the messages of a failure: each names the file and says what to do."""
    messages = run.messages
    if run.status and not messages:
        return [f"nothing has a message: {run.message or run.stderr[-2000:]}"]
    return [
        f"the message {what}: {message}"
        for message in messages
        for what, holds in (
            ("names no file", message.startswith((*ground.promise.subjects, "/proc:"))),
            ("does not say what to do", ADVICE.search(message)),
        )
        if not holds
    ]


def faulty(ground: lab.Lab, rule: str) -> rounds.Finding:
    """Run the module with a fault."""
    _who, call, number, _action = rule.split(":")
    run = ground.run(rule)
    finding = judge(ground, run, call == "unlinkat" or "+" in number)
    if call == "fsync" and run.status == 0:  # what is not on stable storage may be gone after the next power loss
        finding.violations.append("says success, though fsync has failed")
    return finding


def injected(ground: lab.Lab, kind: kinds.Kind) -> list[rounds.Job[lab.Lab]]:
    """Return a round for each call and each error that it may meet, once and from there on."""
    ground.use(kind)
    jobs = []
    for who, calls in ground.calls().items():
        for call, count in calls.items():
            errors = (*(() if call in DIALOGUE else ("EIO",)), *ERRORS.get((who, call), ()))
            for rule in [f"{who}:{call}:{n}{s}:{e}" for n in range(1, count + 1) for e in errors for s in ("", "+")]:
                sides = {"module": "the module's calls", "qemu": "QEMU's calls"}
                series = f"{kind.name}: {rule.split(':')[3]} in {sides[who]}" + (" from there on" * ("+" in rule))
                jobs.append(rounds.Job(series, f"{kind.name}-{rule}", functools.partial(faulty, rule=rule), kind))
    of_files = sum(count for call, count in ground.calls()["module"].items() if call not in DIALOGUE)
    everything = [f"module:files:{number}+:EIO" for number in range(1, of_files + 1)]
    series = f"{kind.name}: all I/O fails from there on"
    jobs += [
        rounds.Job(series, f"{kind.name}-{rule}", functools.partial(faulty, rule=rule), kind) for rule in everything
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
def quotas(ground: lab.Lab) -> t.Iterator[t.Callable[[int | None], None]]:
    """Have btrfs for the overlays, whose quotas hold for root, too; what is yielded sets one, in bytes, or lifts it."""
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
        lab.quietly(["mount", "--bind", str(top / "overlays"), str(ground.folder)])
        stack.callback(lab.quietly, ["umount", "-l", str(ground.folder)])

        def limit(size: int | None) -> None:
            words = "none" if size is None else str(size)
            lab.quietly(["btrfs", "qgroup", "limit", words, FIRST_SUBVOLUME, str(top)])

        yield limit


@contextlib.contextmanager
def quota(ground: lab.Lab, limit: int) -> t.Iterator[t.Callable[[], None]]:
    """Have a quota of so many bytes for the overlays; what is yielded lifts it."""
    with quotas(ground) as set_limit:
        set_limit(limit)
        yield lambda: set_limit(None)


def within_quota(ground: lab.Lab, room: int) -> rounds.Finding:
    """Run the module where a quota leaves so many bytes beside the images, then on the same without one."""
    with quotas(ground) as set_limit:
        ground.reset()
        set_limit(_taken(ground.folder) + room)
        run = ground.run()
        wrong = [*ground.ended_wrong(run), *message_wrong(ground, run)]
        set_limit(None)
        who = "QEMU" if any("QEMU says" in message for message in run.messages) else "the module"
        outcome = "told as success: it was enough" if run.status == 0 else f"told as failure, which {who} has met"
        return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), told(ground, run))


def _taken(folder: pathlib.Path) -> int:
    """Return the bytes of a subvolume, as its quota counts them."""
    lab.quietly(["sync", "--file-system", str(folder)])
    command = ["btrfs", "qgroup", "show", "--raw", "-f", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return next(int(line.split()[1]) for line in said if line.startswith(FIRST_SUBVOLUME))


def quota_jobs(kind: kinds.Kind, most: int) -> list[rounds.Job[lab.Lab]]:
    """Return a round for each size of a quota, from none up to so many nodes, which are more than a run takes."""
    return [
        rounds.Job(
            f"{kind.name}: quota", f"{kind.name}-quota-{n}", functools.partial(within_quota, room=n * BTRFS_NODE), kind
        )
        for n in range(most + 1)
    ]


Unfit = t.Callable[[lab.Lab], t.ContextManager[t.Callable[[], None]]]


def unfit(ground: lab.Lab, storage: Unfit) -> rounds.Finding:
    """Run the module on storage that is unfit, then on the same when it is cured."""
    with storage(ground) as cure:
        run = ground.run()
        wrong = [*ground.ended_wrong(run), *message_wrong(ground, run)]
        cure()
        outcome = f"told as {'success' if run.status == 0 else 'failure'}"
        return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), told(ground, run))


def unfit_job(kind: kinds.Kind, series: str, name: str, storage: Unfit) -> rounds.Job[lab.Lab]:
    """Return a round on such storage."""
    return rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{name}", functools.partial(unfit, storage=storage), kind)


def full_jobs(ground: lab.Lab, kind: kinds.Kind) -> list[rounds.Job[lab.Lab]]:
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


def result_wrong(run: runs.Run) -> list[str]:
    """Return what is wrong with a run that has no result."""
    return [] if run.result is not None else [f"ended with {run.status} and no result: {run.stderr[-2000:]}"]


def without_folder(ground: lab.Lab, number: int, moved: bool) -> rounds.Finding:
    """Take the folder of the overlays away while the module is at a step."""
    elsewhere = ground.place / "elsewhere"
    ground.start(f"module:*:{number}:stop")
    run = ground.runner.answer()
    done = ground.promise.done()
    if run is None:
        ground.folder.rename(elsewhere)
        if moved:
            ground.folder.mkdir()
        else:
            shutil.rmtree(elsewhere)
        run = ground.runner.resume()
    try:
        ground.folder.mkdir(exist_ok=True)
        wrong = [*result_wrong(run), *ground.promise.without_folder_wrong(run, done, elsewhere)]
        outcome = f"told as {'success' if run.status == 0 else 'failure'}"
        return rounds.Finding(outcome, wrong + message_wrong(ground, run), told(ground, run))
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
        ground.folder.mkdir(exist_ok=True)


RIVALS = (
    promise.Rival("the same target", kinds.ONE, lambda disks: disks, (1,), "present"),
    promise.Rival(
        "another target on the same ACTIVE",
        kinds.ONE,
        lambda disks: [disks[0]._replace(target=disks[0].target.with_name("other.snap.qcow2"))],
        (1, 2),
        "created",
    ),
    promise.Rival("the same three, in another order", kinds.THREE, lambda disks: disks[::-1], (1,), "present"),
    promise.Rival(
        "the same target on another ACTIVE",
        kinds.ONE,
        lambda disks: [disks[0]._replace(active=disks[0].active.with_name("other.qcow2"))],
        (1,),
        "failed",
    ),
)


def race(ground: lab.Lab, rival: promise.Rival, pause: float, step: int | None) -> rounds.Finding:
    """Let two runs race, the second after a pause or while the first is at a step."""
    theirs = rival.choose(ground.disks)
    for disk in theirs:
        if not disk.active.exists():
            shutil.copy2(ground.disks[0].active, disk.active)
    ground.start(f"module:*:{step}:stop" if step else "")
    first = ground.runner.answer() if step else None
    time.sleep(pause)
    arguments = ground.promise.arguments(theirs, timeout=1 if step else 20)
    ground.second.start(ground.promise.module, arguments, ground.environment())
    second = ground.second.ended()
    if first is None:
        first = ground.runner.resume() if step else ground.runner.ended()
    wrong = [*result_wrong(first), *result_wrong(second)]
    wrong += ground.promise.raced_wrong(rival, theirs, first, second, bool(step))
    words = ["+".join(sorted(set(run.states))) or "none" for run in (first, second)]
    return rounds.Finding(" and ".join(words), wrong, told(ground, first) + told(ground, second))


Opened = t.Callable[[kinds.Disk], tuple[pathlib.Path, str]]  # the image of a disk that a VM opens, and its format


def active(disk: kinds.Disk) -> tuple[pathlib.Path, str]:
    """Have a VM open ACTIVE."""
    return disk.active, disk.format


def overlay(disk: kinds.Disk) -> tuple[pathlib.Path, str]:
    """Have a VM open the overlay."""
    return disk.target, "qcow2"


def vm_at_step(ground: lab.Lab, image: Opened, number: int) -> rounds.Finding:
    """Start a VM on an image while the module is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    done = all(ground.promise.done())
    disk = ground.disks[number % len(ground.disks)]
    vm = machine.VM(*image(disk), emulator=False)
    runs_on = vm.settle()
    run = ground.runner.resume()
    said = vm.end()
    return judge_vm(ground, run, runs_on, runs_on and not done, said)


def vm_at_moment(ground: lab.Lab, image: Opened, pause: float, emulator: bool) -> rounds.Finding:
    """Start a VM on an image at a random moment of a run."""
    ground.start()
    time.sleep(pause)
    path, image_format = image(ground.disks[-1])
    # An emulator with no device takes a raw image without asking to write to it.
    vm = machine.VM(path, image_format, emulator and image_format == "qcow2")
    runs_on = vm.settle()
    run = ground.runner.ended()
    said = vm.end()
    # What is done is done before the image is released; clocks of files are coarse.
    too_early = runs_on and t.cast("float", vm.opened_at) < ground.promise.done_at() - 0.02
    return judge_vm(ground, run, runs_on, too_early, said)


def judge_vm(ground: lab.Lab, run: runs.Run, runs_on: bool, too_early: bool, said: str) -> rounds.Finding:
    """Judge a run into which a VM came; too_early, it had its image open before all was done."""
    wrong = ground.promise.vm_wrong(run, runs_on, too_early)
    if not runs_on and "lock" not in said and "No such file" not in said:
        wrong.append(f"the VM failed in another way: {said}")
    outcome = f"VM {'starts' if runs_on else 'does not start'}, told as {'success' if run.status == 0 else 'failure'}"
    return rounds.Finding(outcome, wrong + message_wrong(ground, run), told(ground, run))


def stepping(ground: lab.Lab) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds in which something happens while the module is at a step."""
    jobs = []
    for kind in (kinds.ONE, kinds.THREE, kinds.TEMPLATE, kinds.RAW):
        ground.use(kind)
        for n in range(1, sum(ground.calls()["module"].values()) + 1):
            play = functools.partial(vm_at_step, image=active, number=n)
            jobs.append(
                rounds.Job(f"{kind.name}: VM starts on ACTIVE at a step", f"vm-{kind.name}-step-{n}", play, kind)
            )
    ground.use(kinds.ONE)
    for n in range(1, sum(ground.calls()["module"].values()) + 1):
        for moved in (True, False):
            word = "moved away" if moved else "removed"
            play = functools.partial(without_folder, number=n, moved=moved)
            jobs.append(rounds.Job(f"folder {word} in mid-run", f"folder-{moved}-{n}", play))
        play = functools.partial(vm_at_step, image=overlay, number=n)
        jobs.append(rounds.Job("one: VM starts on the overlay at a step", f"vm-overlay-step-{n}", play))
        for number, rival in enumerate(RIVALS[:2]):
            play = functools.partial(race, rival=rival, pause=0, step=n)
            jobs.append(rounds.Job(f"second run at a step, {rival.what}", f"race-{number}-step-{n}", play))
    return jobs


def racing(asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
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
            play = functools.partial(vm_at_moment, image=active, pause=pause, emulator=bool(n % 2))
            jobs.append(rounds.Job(f"{kind.name}: VM starts on ACTIVE at a random moment", name, play, kind))
    return jobs


def jobs_for(crew: rounds.Crew[lab.Lab], asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
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
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(lab.Lab, make_promise=overlays.Made)))
