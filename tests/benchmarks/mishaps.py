# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each contender does when something is not as it should be. Every answer is what was found after a run."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import tempfile
import typing as t

from contenders import Case, Contender
from measuring import Cost, Disk, Template, fresh, judge, make_template, run

BITMAPS = [(f"b{number}", 65536 << number % 3) for number in range(8)]
NAMES = {"a space": "two words", "a newline": "new\nline", "a comma": "a,b", "a leading dash": "-dash"}
KILLS = 5  # spread evenly over the time of a run
FULL = "64k"  # too small for the image
SMALL = "220k"  # room for the image, which takes 196 KiB, but not for its bitmaps


class Found(t.NamedTuple):
    """What a contender did."""

    text: str
    said: str  # what it printed that tells of a failure


class Mishap(t.NamedTuple):
    """Something that is not as it should be."""

    title: str
    wanted: str
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


def anew(contender: Contender, case: Case) -> None:
    """Give the images to a contender once more, as if nothing had been."""
    contender.after()
    fresh(case.disks, case.template)
    contender.before(case)


def verdict(cost: Cost) -> str:
    """Return how a contender says that it went."""
    return "exit 0" if cost.status == 0 else f"fails (exit {cost.status})"


def told(cost: Cost) -> str:
    """Return what a contender printed of a failure: the module's message, or the first such line."""
    for line in cost.said.splitlines():
        if line.startswith("{"):
            return str(json.loads(line).get("msg", ""))
        if re.search(r"qemu-img: |error: |fatal: |failed: ", line):
            return line.strip()
    return ""


def usual(contender: Contender, folder: pathlib.Path) -> list[str]:
    """Return what the judge finds wrong after an undisturbed run."""
    with prepared(contender, folder) as case:
        run(contender.job(case), contender.daemon)
        return judge(case.disks, case.template)


def state_of(disk: Disk, template: Template, finished: list[str]) -> str:
    """Return whether an overlay is absent, as an undisturbed run makes it, or neither."""
    if not disk.overlay.exists():
        return "absent"
    wrong = [what for what in judge([disk], template) if what not in finished]
    return f"**half-made** ({', '.join(wrong)})" if wrong else "finished"


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
        kept = "the data is kept" if qemu_io(overlay, "read -P 0xab 1M 64k") else "the data is **lost**"
        after = judge(case.disks, case.template)
        more = "" if after == before else f"; now wrong: {', '.join(set(after) - set(before))}"
        return Found(f"{verdict(cost)}; {kept}{more}", told(cost))


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
            cost = run(contender.job(case), contender.daemon)
            holder.stdin.write(b"quit\n")
        # The one that has it open may write to it, so this is no question here.
        state = state_of(case.disks[0], case.template, [*finished, "ACTIVE was written to"])
        return Found(f"{verdict(cost)}; the overlay is {state}", told(cost))


def killed(contender: Contender, folder: pathlib.Path) -> Found:
    """Kill it with all its processes, at several moments of its run."""
    with prepared(contender, folder) as case:
        seconds = []
        for _round in range(3):
            anew(contender, case)
            seconds.append(run(contender.job(case), contender.daemon).seconds)
            finished = judge(case.disks, case.template)
        states: list[str] = []
        for number in range(KILLS):
            anew(contender, case)
            moment = statistics.median(seconds) * (2 * number + 1) / (2 * KILLS)
            run(contender.job(case), contender.daemon, stop_after=moment)
            left = contender.settle()
            states.append(
                state_of(case.disks[0], case.template, finished) + (", the domain left paused" if left else "")
            )
        others = len(list(folder.glob(".*")))
    counts = [f"{states.count(state)} of {KILLS}: {state}" for state in sorted(set(states))]
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
            said.append(told(cost))
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
        text = f"{verdict(cost)}; that file is {'intact' if intact else '**overwritten**'}; {states}"
        return Found(text, told(cost))


def third_is_full(contender: Contender, folder: pathlib.Path, small: pathlib.Path) -> Found:
    """Run it for three disks of a VM, the third of which has a folder that is too small for the overlay."""
    finished = usual(contender, folder)
    with prepared(contender, folder, 3) as usual_case:
        first, second, third = usual_case.disks
        case = usual_case._replace(disks=[first, second, Disk(third.active, small / "vm2.snap.qcow2")])
        anew(contender, case)
        cost = run(contender.job(case), contender.daemon)
        contender.settle()
        state = state_of(case.disks[2], case.template, finished)
        states = taken_back([first, second], case.template, finished)
    for left in small.iterdir():
        left.unlink()
    return Found(f"{verdict(cost)}; the third overlay is {state}; {states}", told(cost))


@contextlib.contextmanager
def small_folders() -> t.Iterator[pathlib.Path]:
    """Mount small file systems, named as their sizes, in a folder; before libvirt takes a copy of what is mounted."""
    with tempfile.TemporaryDirectory(prefix="side.") as name, contextlib.ExitStack() as mounted:
        for size in (FULL, SMALL):
            place = pathlib.Path(name, size)
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
            mounted.callback(subprocess.run, ["umount", str(place)], check=True)
        yield pathlib.Path(name)


def taken_back(disks: list[Disk], template: Template, finished: list[str]) -> str:
    """Return what became of the overlays that could be made."""
    states = [state_of(disk, template, finished) for disk in disks]
    if set(states) == {"absent"}:
        return "the first two are not there"
    if set(states) == {"finished"}:
        return "the first two are left"
    return f"the first two are {' and '.join(states)}"


def mishaps(small: pathlib.Path) -> list[Mishap]:
    """Return all of them, with the folder of the small file systems."""
    return [
        Mishap(
            "Run again, after the guest has written to the overlay",
            "the data is kept.",
            "CONTENDER; qemu-io -f qcow2 -c 'write -P 0xab 1M 64k' OVERLAY\n"
            "CONTENDER; echo $?; qemu-io -f qcow2 -c 'read -P 0xab 1M 64k' OVERLAY",
            again,
        ),
        Mishap(
            "ACTIVE is open for writing, as in a running VM",
            "it fails, and there is no overlay.",
            "(echo length; sleep 60) | qemu-io -f qcow2 ACTIVE & sleep 1\nCONTENDER; echo $?; ls -l OVERLAY",
            in_use,
        ),
        Mishap(
            f"Killed with SIGKILL, at {KILLS} moments spread over its time",
            "the overlay is absent or finished. (Of libvirt's way virsh and its shell are killed, not the daemon.)",
            "timeout -s KILL PART-OF-ITS-SECONDS CONTENDER; qemu-img info OVERLAY",
            killed,
        ),
        Mishap(
            "A bitmap's name has " + ", ".join(NAMES),
            "every one is carried.",
            "qemu-img bitmap --add -g 128k -- ACTIVE $'new\\nline'; CONTENDER; qemu-img info --output=json OVERLAY",
            names,
        ),
        Mishap(
            "Three disks of a VM, a file of someone else in the place of the third overlay",
            "it fails, that file is intact, and the first two overlays are not there.",
            "echo precious > OVERLAY3; CONTENDER; echo $?; cat OVERLAY3; ls -l OVERLAY1 OVERLAY2",
            third_exists,
        ),
        Mishap(
            "Three disks of a VM, the folder of the third overlay is full",
            "it fails, and none of the three is there.",
            f"mount -t tmpfs -o size={FULL} none FOLDER3; CONTENDER; echo $?; ls -l OVERLAY1 OVERLAY2 OVERLAY3",
            lambda contender, folder: third_is_full(contender, folder, small / FULL),
        ),
        Mishap(
            "The same, with room for the image but not for its bitmaps",
            "it fails, and none of the three is there.",
            f"mount -t tmpfs -o size={SMALL} none FOLDER3; CONTENDER; echo $?\n"
            "qemu-img info --output=json OVERLAY3; ls -l OVERLAY1 OVERLAY2",
            lambda contender, folder: third_is_full(contender, folder, small / SMALL),
        ),
    ]
