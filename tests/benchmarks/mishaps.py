# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each contender does when something is not as it should be. Every answer is what was found after a run."""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import subprocess
import typing as t

from contenders import Case, Contender
from measuring import Cost, Disk, Template, fresh, judge, make_template, run

BITMAPS = [(f"b{number}", 65536 << number % 3) for number in range(8)]
NAMES = {"a space": "two words", "a newline": "new\nline", "a comma": "a,b", "a leading dash": "-dash"}
KILLS = 5  # spread evenly over the time of a run
SMALL = "256k"  # for the image alone it is enough, for its bitmaps it is not


class Found(t.NamedTuple):
    """What a contender did."""

    text: str
    said: str  # what it printed last, if it failed


class Mishap(t.NamedTuple):
    """Something that is not as it should be."""

    title: str
    shown_by: str  # commands of a shell
    find: t.Callable[[Contender, pathlib.Path], Found]


def disks_in(folder: pathlib.Path, count: int) -> list[Disk]:
    """Return so many disks."""
    return [Disk(folder / f"vm{number}.qcow2", folder / f"vm{number}.snap.qcow2") for number in range(count)]


@contextlib.contextmanager
def prepared(
    contender: Contender, folder: pathlib.Path, count: int = 1, bitmaps: list[tuple[str, int]] | None = None
) -> t.Iterator[Case]:
    """Give images to a contender, and clean up after it."""
    template = folder / "template.qcow2"
    case = Case(folder, disks_in(folder, count), make_template(template, bitmaps or BITMAPS, "100G"))
    fresh(case.disks, case.template)
    contender.before(case)
    try:
        yield case
    finally:
        contender.after()


def verdict(cost: Cost) -> str:
    """Return how a contender says that it went."""
    return "says all is well (exit 0)" if cost.status == 0 else f"fails (exit {cost.status})"


def last_line(cost: Cost) -> str:
    """Return what a contender that failed printed, the end of it."""
    if cost.status == 0:
        return ""
    lines = [line.strip() for line in cost.said.splitlines() if "rror" in line or '"msg"' in line or "qemu" in line]
    return (lines or cost.said.strip().splitlines() or ["(killed)"])[0]


def usual(contender: Contender, folder: pathlib.Path) -> list[str]:
    """Return what the judge finds wrong after an undisturbed run."""
    with prepared(contender, folder) as case:
        run(contender.job(case), contender.daemon)
        return judge(case.disks, case.template)


def state_of(disk: Disk, template: Template, finished: list[str]) -> str:
    """Return whether an overlay is absent, as it is after an undisturbed run, or something else."""
    if not disk.overlay.exists():
        return "absent"
    wrong = [what for what in judge([disk], template) if what not in finished]
    return f"half-made ({', '.join(wrong)})" if wrong else "as after an undisturbed run"


def qemu_io(path: pathlib.Path, command: str) -> bool:
    """Run a command of qemu-io; return whether it did what it was to do."""
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, str(path)], capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and "failed" not in done.stdout + done.stderr


def again(contender: Contender, folder: pathlib.Path) -> Found:
    """Run it, write to the overlay as a guest does, and run it again."""
    with prepared(contender, folder) as case:
        overlay = case.disks[0].overlay
        run(contender.job(case), contender.daemon)
        assert qemu_io(overlay, "write -P 0xab 1M 64k")
        before = judge(case.disks, case.template)
        cost = run(contender.job(case), contender.daemon)
        contender.settle()
        kept = "the data is kept" if qemu_io(overlay, "read -P 0xab 1M 64k") else "THE DATA IS LOST"
        after = judge(case.disks, case.template)
        more = "" if after == before else f"; now wrong: {', '.join(set(after) - set(before))}"
        return Found(f"{verdict(cost)}; {kept}{more}", last_line(cost))


def in_use(contender: Contender, folder: pathlib.Path) -> Found:
    """Run it while another process has ACTIVE open for writing, as a VM does."""
    finished = usual(contender, folder)
    with prepared(contender, folder) as case:
        active = str(case.disks[0].active)
        with subprocess.Popen(
            ["qemu-io", "-f", "qcow2", active], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as holder:
            assert holder.stdin
            assert holder.stdout
            holder.stdin.write(b"length\n")
            seen = b""
            while b"GiB" not in seen:
                seen += holder.stdout.read(4096)
            cost = run(contender.job(case), contender.daemon, kept=[holder.pid])
            holder.stdin.write(b"quit\n")
        # The one that has it open may write to it, so this is no question here.
        state = state_of(case.disks[0], case.template, [*finished, "ACTIVE was written to"])
        return Found(f"{verdict(cost)}; the overlay is {state}", last_line(cost))


def killed(contender: Contender, folder: pathlib.Path) -> Found:
    """Kill it with all its processes, at several moments of its run."""
    with prepared(contender, folder) as case:
        seconds = []
        for _round in range(3):
            fresh(case.disks, case.template)
            contender.before(case)
            seconds.append(run(contender.job(case), contender.daemon).seconds)
            finished = judge(case.disks, case.template)
        states: list[str] = []
        for number in range(KILLS):
            fresh(case.disks, case.template)
            contender.before(case)
            moment = statistics.median(seconds) * (2 * number + 1) / (2 * KILLS)
            run(contender.job(case), contender.daemon, stop_after=moment)
            left = contender.settle()
            states.append(
                state_of(case.disks[0], case.template, finished) + (", the domain left paused" if left else "")
            )
        others = len(list(folder.glob(".*")))
    counts = [f"{states.count(state)} times {state}" for state in sorted(set(states))]
    return Found("; ".join(counts) + (f"; {others} temporary files left" if others else ""), "")


def names(contender: Contender, folder: pathlib.Path) -> Found:
    """Run it on images each of which has one bitmap of an unusual name."""
    finished = usual(contender, folder)
    right, wrong, said = [], [], []
    for what, name in NAMES.items():
        with prepared(contender, folder, bitmaps=[(name, 131072)]) as case:
            cost = run(contender.job(case), contender.daemon)
            found = set(judge(case.disks, case.template)) - (set(finished) - {"bitmaps missing"})
            (wrong if found else right).append(what)
            said.append(last_line(cost))
    text = [f"carried: {', '.join(right)}"] * bool(right) + [f"not carried: {', '.join(wrong)}"] * bool(wrong)
    return Found("; ".join(text), next(filter(None, said), ""))


def third_exists(contender: Contender, folder: pathlib.Path) -> Found:
    """Run it for three disks of a VM, with a file of someone else in the place of the third overlay."""
    finished = usual(contender, folder)
    with prepared(contender, folder, 3) as case:
        first, second, third = case.disks
        third.overlay.write_text("precious\n")
        cost = run(contender.job(case), contender.daemon)
        contender.settle()
        intact = third.overlay.read_bytes() == b"precious\n"
        states = taken_back([first, second], case.template, finished)
        text = f"{verdict(cost)}; that file is {'intact' if intact else 'OVERWRITTEN'}; {states}"
        return Found(text, last_line(cost))


def third_is_full(contender: Contender, folder: pathlib.Path, size: str) -> Found:
    """Run it for three disks of a VM, the third of which has a folder that is too small for the overlay."""
    finished = usual(contender, folder)
    small = folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(small)], check=True)
    try:
        with prepared(contender, folder, 3) as usual_case:
            first, second, third = usual_case.disks
            case = usual_case._replace(disks=[first, second, Disk(third.active, small / "vm2.snap.qcow2")])
            contender.before(case)
            cost = run(contender.job(case), contender.daemon)
            contender.settle()
            state = state_of(case.disks[2], case.template, finished)
            states = taken_back([first, second], case.template, finished)
            return Found(f"{verdict(cost)}; the third overlay is {state}; {states}", last_line(cost))
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
        small.rmdir()


def taken_back(disks: list[Disk], template: Template, finished: list[str]) -> str:
    """Return what became of the overlays that could be made."""
    states = [state_of(disk, template, finished) for disk in disks]
    if set(states) == {"absent"}:
        return "the first two are not there"
    if set(states) == {"as after an undisturbed run"}:
        return "the first two are left"
    return f"the first two are {' and '.join(states)}"


MISHAPS = [
    Mishap(
        "run again, after the guest has written to the overlay",
        "CONTENDER; qemu-io -f qcow2 -c 'write -P 0xab 1M 64k' OVERLAY; CONTENDER; "
        "qemu-io -f qcow2 -c 'read -P 0xab 1M 64k' OVERLAY",
        again,
    ),
    Mishap(
        "ACTIVE is open for writing, as in a running VM",
        "(echo length; sleep 60) | qemu-io -f qcow2 ACTIVE & sleep 1; CONTENDER; echo $?; ls -l OVERLAY",
        in_use,
    ),
    Mishap(
        f"killed (SIGKILL) at {KILLS} moments of its time",
        "timeout -s KILL HALF-OF-ITS-SECONDS CONTENDER; qemu-img info OVERLAY",
        killed,
    ),
    Mishap(
        "a bitmap's name has " + ", ".join(NAMES),
        "qemu-img bitmap --add -g 128k -- ACTIVE $'new\\nline'; CONTENDER; qemu-img info --output=json OVERLAY",
        names,
    ),
    Mishap(
        "three disks of a VM, a file of someone else in the place of the third overlay",
        "echo precious > OVERLAY3; CONTENDER; echo $?; cat OVERLAY3; ls -l OVERLAY1 OVERLAY2",
        third_exists,
    ),
    Mishap(
        "three disks of a VM, the folder of the third overlay is full",
        "mount -t tmpfs -o size=64k none FOLDER3; CONTENDER; echo $?; ls -l OVERLAY1 OVERLAY2",
        lambda contender, folder: third_is_full(contender, folder, "64k"),
    ),
    Mishap(
        "the same, with room for the image but not for its bitmaps",
        f"mount -t tmpfs -o size={SMALL} none FOLDER3; CONTENDER; echo $?; "
        "qemu-img info --output=json OVERLAY3; ls -l OVERLAY1 OVERLAY2",
        lambda contender, folder: third_is_full(contender, folder, SMALL),
    ),
]
