# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The folders in which runs are played, and what is asked of every run, whatever it does."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import os
import pathlib
import shutil
import struct
import subprocess
import typing as t

import kinds
import leftover
import runs

if t.TYPE_CHECKING:
    import promise

_OFD_GETLK = 36  # Linux, fcntl(2)
_FLOCK = struct.Struct("@hhqqi4x")


L = t.TypeVar("L", bound="Lab")


class Lab:
    """A folder with the disks of one VM, runners, and the promise that their runs have to keep."""

    def __init__(
        self: L,
        base: pathlib.Path,
        library: pathlib.Path,
        templates: kinds.Templates,
        make_promise: t.Callable[[L], promise.Promise],
    ) -> None:
        self._templates = templates
        self.place = base / "disks"  # what stands between watches all below this
        self.actives_folder, self.folder = self.place / "a", self.place / "o"
        self.papers = base / "papers"
        for folder in (self.actives_folder, self.folder, self.papers):
            folder.mkdir(parents=True, exist_ok=True)
        self.library = library
        (self.papers / "second").mkdir(exist_ok=True)
        self.man()
        self.use(kinds.ONE)
        self.promise = make_promise(self)

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
        """Have all as a round wants to find it."""
        self.lay_out()
        self.promise.prepare()

    def lay_out(self) -> None:
        """Have fresh images and no overlays."""
        for folder in (self.folder, self.actives_folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        for disk in reversed(self.disks):  # so that the order of their inodes is not that of the disks
            shutil.copyfile(self._templates.paths[disk.number], disk.active)
            disk.active.chmod(0o640)

    def environment(self, rule: str = "") -> dict[str, str]:
        """Return what tells faults.c which files are meant, and what is to go wrong."""
        return {"PROVE_FOLDER": f"{self.place}/", **({"PROVE_RULE": rule} if rule else {})}

    def start(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> None:
        """Begin a run of the module for all disks, with this rule of what is to go wrong; see faults.c."""
        environment = self.environment(rule)
        if log is not None:
            environment["PROVE_LOG"] = str(log)
        self.runner.start(self.promise.module, self.promise.arguments(), environment, kill)

    def run(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> runs.Run:
        """Run the module for all disks to its end."""
        self.start(rule, log, kill)
        return self.runner.ended()

    def stops(self, call: str, number: int) -> bool:
        """Begin a run that stops itself at a step; False when it was over before. It waits for runner.resume()."""
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

    def leftovers(self) -> list[str]:
        """Return the names of the temporary files."""
        return list(filter(leftover.is_one, os.listdir(self.folder)))

    def ended_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong after a run that was not killed: nothing is left, and it says what it has done."""
        wrong = self.promise.images_wrong()
        if run.result is None or "Traceback" in run.stderr:
            return [*wrong, f"ended with {run.status} and no result: {run.stderr[-2000:]}"]
        if run.status != 0 and not run.message:
            wrong.append("failed without a message")
        if self.leftovers():
            wrong.append(f"left {self.leftovers()} behind, and says {run.message!r}")
        wrong += self.promise.told_wrong(run)
        return wrong if run.alone else [*wrong, "left a process behind"]

    def cleared_wrong(self, run: runs.Run, leftovers: list[str]) -> list[str]:
        """Return what is wrong after a run that has found these leftovers, which must tell of each and remove it."""
        told = run.said_left_over
        if self.leftovers() or len(told) != len(leftovers):
            return [f"of {leftovers} it told {len(told)} and left {self.leftovers()}"]
        return []


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


def is_locked(path: pathlib.Path) -> bool:
    """Whether anybody holds a lock on any byte of the file; the question locks nothing."""
    with open(path, "rb") as file:
        answer = fcntl.fcntl(file, _OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
