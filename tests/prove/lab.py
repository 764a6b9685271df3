# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The folders in which runs are played, and the judgement of what a run has left, by QEMU's own tools."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import typing as t

import kinds
import leftover
import runs

_OFD_GETLK = 36  # Linux, fcntl(2)
_FLOCK = struct.Struct("@hhqqi4x")


class Lab:
    """A folder with the disks of one VM, and a runner; what is different for another module, a subclass says."""

    module = "qcow2_overlay"

    def __init__(self, base: pathlib.Path, library: pathlib.Path, templates: kinds.Templates) -> None:
        self._templates = templates
        self.place = base / "disks"  # what stands between watches all below this
        self.actives_folder, self.folder = self.place / "a", self.place / "o"
        self.papers = base / "papers"
        self.subjects = [str(self.place)]  # with one of which a message begins
        for folder in (self.actives_folder, self.folder, self.papers):
            folder.mkdir(parents=True, exist_ok=True)
        self.library = library
        (self.papers / "second").mkdir(exist_ok=True)
        self.man()
        self.use(kinds.ONE)

    def man(self) -> None:
        """Have new runners."""
        self.runner = runs.Runner(self.library, self.papers)
        self.second = runs.Runner(self.library, self.papers / "second")  # for a run beside the first

    def leave(self) -> None:
        """End the runners, and with them what runs."""
        self.runner.close()
        self.second.close()

    def close(self) -> None:
        """End all that runs."""
        self.leave()

    def use(self, kind: kinds.Kind) -> None:
        """Have a VM of this kind."""
        self.disks = [
            kinds.Disk(
                self.actives_folder / f"disk{number}.img",
                self.folder / f"disk{number}.snap.qcow2",
                {name: bits for name, bits, recording, lost in kinds.BITMAPS[number] or () if recording and not lost},
                format="raw" if kinds.BITMAPS[number] is None else "qcow2",
                number=number,
            )
            for number in kind.numbers
        ]

    def reset(self) -> None:
        """Have fresh images and no overlays."""
        for folder in (self.folder, self.actives_folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        for disk in reversed(self.disks):  # so that the order of their inodes is not that of the disks
            shutil.copyfile(self._templates.paths[disk.number], disk.active)
            disk.active.chmod(0o640)
        self.before = {disk.active: identity(disk.active) for disk in self.disks}

    def arguments(self, disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module."""
        overlays = [
            {"path": str(disk.target), "backing_file": str(disk.active), "backing_format": disk.format}
            for disk in disks or self.disks
        ]
        return {"overlays": overlays, "timeout": 20, **options}

    def environment(self, rule: str = "") -> dict[str, str]:
        """Return what tells faults.c which files are meant, and what is to go wrong."""
        return {"PROVE_FOLDER": f"{self.place}/", **({"PROVE_RULE": rule} if rule else {})}

    def start(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> None:
        """Begin a run of the module for all disks, with this rule of what is to go wrong; see faults.c."""
        environment = self.environment(rule)
        if log is not None:
            environment["PROVE_LOG"] = str(log)
        self.runner.start(self.arguments(), environment, kill, self.module)

    def run(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> runs.Run:
        """Run the module for all disks to its end."""
        self.start(rule, log, kill)
        run = self.runner.answer()
        assert run is not None
        return run

    def stops(self, call: str, number: int) -> bool:
        """Begin a run that stops itself at a step; False when it was over before. It waits for runner.say()."""
        self.start(f"module:{call}:{number}:stop")
        return self.runner.answer() is None

    def calls(self) -> dict[str, collections.Counter[str]]:
        """Return how often module and qemu make each call in a run in which nothing goes wrong."""
        log = self.papers / "log"
        log.unlink(missing_ok=True)
        self.reset()
        assert self.run(log=log).status == 0
        calls: dict[str, collections.Counter[str]] = {"module": collections.Counter(), "qemu": collections.Counter()}
        for line in log.read_text(encoding="ascii").splitlines():
            who, call = line.split()
            calls[who][call] += 1
        return calls

    def there(self) -> list[bool]:
        """Whether the overlay is there, for each disk."""
        return [os.path.lexists(disk.target) for disk in self.disks]

    def leftovers(self) -> list[str]:
        """Return the names of the temporary files."""
        return list(filter(leftover.is_one, os.listdir(self.folder)))

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        there = self.there()
        return f"{sum(there)} of {len(there)} overlays there"

    def is_told(self, path: pathlib.Path, run: runs.Run) -> bool:
        """Whether a run that has failed says that this overlay is there all the same."""
        return run.says_not_removed(path)

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images, whatever the run was to do."""
        wrong = [f"{path.name} was changed" for path, was in self.before.items() if identity(path) != was]
        for disk in self.disks:
            if os.path.lexists(disk.target):
                wrong += incomplete(disk)
                if disk.target.stat().st_nlink > 1 and not self.leftovers():
                    wrong.append(f"{disk.target.name} has a second name")
            wrong += [
                f"{path.name} is locked" for path in (disk.active, disk.target) if path.exists() and _is_locked(path)
            ]
        expected = {disk.target.name for disk in self.disks}
        wrong += [f"there is {name}" for name in os.listdir(self.folder)
                  if name not in expected and not leftover.is_one(name)]  # fmt: skip
        return wrong

    def ended_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong after a run that was not killed: all or none, nothing left, and it says so."""
        wrong = self.images_wrong()
        if run.result is None or "Traceback" in run.stderr:
            return [*wrong, f"ended with {run.status} and no result: {run.stderr[-2000:]}"]
        if run.status != 0 and not run.message:
            wrong.append("failed without a message")
        if self.leftovers():
            wrong.append(f"left {self.leftovers()} behind, and says {run.message!r}")
        wrong += self.told_wrong(run)
        return wrong if run.alone else [*wrong, "left a process behind"]

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left."""
        there, said = self.there(), run.states
        states = ["created" if each else "failed" for each in there]
        if said != states or len(set(states)) != 1 or run.status != (0 if all(there) else 1):
            return [f"exit {run.status}, says {said} of what is {states}: {run.message!r}"]
        return []

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must make what is missing and remove what is left."""
        expected = ["present" if there else "created" for there in self.there()]
        leftovers = self.leftovers()
        run = self.run()
        wrong = [f"second run: {what}" for what in self.images_wrong()]
        if run.status != 0 or run.states != expected:
            words = f"{run.message} {run.stderr}"
            wrong.append(f"second run: exit {run.status}, {run.states} instead of {expected}: {words}")
        if self.leftovers() or len(run.said_left_over) != len(leftovers):
            wrong.append(f"second run: of {leftovers} it told {len(run.said_left_over)} and left {self.leftovers()}")
        return wrong if all(self.there()) else [*wrong, "second run: an overlay is missing"]


def quietly(command: list[str]) -> None:
    """Run a command whose words matter only when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")


def identity(path: pathlib.Path) -> tuple[t.Any, ...]:
    """Return all that must not change about a file."""
    try:
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        return (exc.errno,)
    return digest, status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_locked(path: pathlib.Path) -> bool:
    """Whether anybody holds a lock on any byte of the file; the question locks nothing."""
    with open(path, "rb") as file:
        answer = fcntl.fcntl(file, _OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def incomplete(disk: kinds.Disk) -> list[str]:
    """Return in what the overlay is not what it is to be, as QEMU's own tools see it."""
    command = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(disk.target)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return [f"{disk.target.name}: {said.stderr}"]
    about = json.loads(said.stdout)
    data = about["format-specific"]["data"]
    seen = {
        "backing file": (about.get("backing-filename"), str(disk.active)),
        "backing format": (about.get("backing-filename-format"), disk.format),
        "size": (about["virtual-size"], disk.size),
        "bitmaps": ({bitmap["name"]: bitmap["granularity"] for bitmap in data.get("bitmaps", ())}, disk.bitmaps),
        "flags": (
            {flag for bitmap in data.get("bitmaps", ()) for flag in bitmap["flags"]},
            {"auto"} if disk.bitmaps else set(),
        ),
        "corrupt": (data["corrupt"], False),
        "mode": (disk.target.stat().st_mode, disk.active.stat().st_mode),
    }
    wrong = [f"{disk.target.name}: {what} is {is_!r}, not {to_be!r}" for what, (is_, to_be) in seen.items()
             if is_ != to_be]  # fmt: skip
    command = ["qemu-img", "check", "-q", str(disk.target)]
    check = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return [*wrong, *([f"{disk.target.name}: check says {check.stdout}{check.stderr}"] if check.returncode else [])]
