# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Give overlays up, killed at every step and at random moments, with faults, and with VMs before the next run.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/reverts.py. Needs QEMU and gcc.

At any moment BASE and all below it are what they were, to the byte; each overlay is there, under its name or under the
one that it is kept by, and holds what it held, unless it was to be deleted; QEMU tells that. No process and no lock is
left. The next run completes it, and the one after that changes nothing.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import typing as t

import commits
import kills
import kinds
import promise
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import disks

REVERTED = "reverted"
WISHES: dict[kinds.Kind, tuple[tuple[disks.Scene, ...], str]] = {
    kinds.Kind("two layers kept", (0,)): ((disks.two,), "keep"),
    kinds.Kind("two layers deleted", (0,)): ((disks.two,), "delete"),
    kinds.Kind("two disks kept", (0, 1)): ((disks.plain, disks.faulty), "keep"),
}


class GoneBack(commits.OfStacks["Overlays"]):
    """Each overlay is there with all that it holds, or retired as it was asked for; what is below is untouched."""

    def untouched(self) -> list[pathlib.Path]:
        """Return BASE and the images below it."""
        stacks = self._ground.stacks
        return [pathlib.Path(path) for disk in stacks for path in disk.images[disk.images.index(disk.base) :]]

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module."""
        overlays = [{"path": disk.path, "backing_file": disk.base} for disk in self._ground.stacks]
        what = {"state": REVERTED, "overlays": overlays, "retire": self._ground.retire}
        return {**what, "timeout": 20, **options}

    def done(self) -> list[bool]:
        """Whether nothing is left to do, for each disk."""
        return [not any(map(os.path.lexists, _above(disk))) for disk in self._ground.stacks]

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        kept = sum(name.endswith(f".{REVERTED}") for disk in self._ground.stacks for name in os.listdir(disk.folder))
        return f"{sum(self.done())} of {len(self._ground.stacks)} done, {kept} kept"

    def known(self, _disk: disks.Disk, images: t.Sequence[str]) -> set[str]:
        """Return the names that there may be: of the images, and those that they are kept by."""
        return {*images, *(f"{name}.{REVERTED}" for name in images)}

    def disk_wrong(self, disk: disks.Disk) -> list[str]:
        """Return what is wrong with the overlays of a disk, wherever they are."""
        places = [_place(path) for path in disk.images]
        if None in places:
            may_be_gone = self._ground.retire == "delete"
            return [] if may_be_gone else [f"of {disk.images} only {places} are there"]
        there = t.cast("list[str]", places)
        wrong = [problem for path in there for problem in _damage(path)]
        return wrong if _content(there) == disk.now else [*wrong, f"{there} do not hold what was written"]

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left."""
        said, done = run.states, self.done()
        is_good = run.status == 0 and all(done) and set(said) <= {REVERTED, "absent"}
        is_bad = run.status == 1 and "failed" in said
        return [] if is_good or is_bad else [f"exit {run.status}, says {said} of what is {done}: {run.message!r}"]

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must complete it, and a third one."""
        leftovers = self._ground.leftovers()
        run = self._ground.run()
        wrong = [*self.images_wrong(), *self._ground.cleared_wrong(run, leftovers)]
        if run.status or not all(self.done()):
            wrong.append(f"exit {run.status}, {run.states}, {self.done()}: {run.message} {run.stderr}")
        third = self._ground.run()
        if third.status or set(third.states) != {"absent"} or (third.result or {}).get("changed"):
            wrong.append(f"third run: exit {third.status}, {third.states}: {third.message}")
        return [f"second run: {what}" for what in wrong]

    def raced_wrong(
        self, rival: promise.Rival, _theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, _stopped: bool
    ) -> list[str]:
        """Return what is wrong with what two runs have done: one does it, the other waits for it, or says that."""
        done = [run for run in (first, second) if set(run.states) == {REVERTED}]
        return [*([] if len(done) in rival.winners else [f"{first.states} and {second.states}"]), *self.images_wrong()]

    def vm_wrong(self, _run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a VM came, or tried to; on BASE it may run at any time."""
        is_there = any(map(os.path.lexists, (disk.path for disk in self._ground.stacks)))
        wrong = ["the VM had TOP open, and it was retired all the same"] if too_early and not is_there else []
        return wrong if runs_on else [*wrong, *self.images_wrong()]


def _above(disk: disks.Disk) -> list[str]:
    """Return the paths of the overlays of a disk. After a kill one can be left that was to be deleted, kept aside."""
    return disk.images[: disk.images.index(disk.base)]


def _place(path: str) -> str | None:
    """Return where an image is."""
    return next((one for one in (path, f"{path}.{REVERTED}") if os.path.lexists(one)), None)


def _damage(path: str) -> list[str]:
    """Return what qemu-img check finds wrong with an image, whose backing file may have another name by now."""
    node = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": None}
    done = subprocess.run(
        ["qemu-img", "check", f"json:{json.dumps(node)}"], capture_output=True, text=True, check=False
    )
    return [] if done.returncode in (0, 3) else [f"{path}: {done.stdout}{done.stderr}"]


def _content(images: t.Sequence[str]) -> bytes:
    """Return what a guest reads from a chain of images that have other names than they know each other by."""
    node: dict[str, t.Any] | None = None
    for path in reversed(images):
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": path}, "backing": node}
    with tempfile.NamedTemporaryFile() as raw:
        subprocess.run(["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(node)}", raw.name], check=True)
        return raw.read()


class Overlays(commits.Stack):
    """A lab whose disks have overlays to be given up."""

    retire = "keep"

    def use(self, kind: kinds.Kind) -> None:
        """Have disks as in these scenes."""
        kind = kind if kind in WISHES else next(iter(WISHES))
        self.retire = WISHES[kind][1]
        super().use(kind)

    def scenes(self, kind: kinds.Kind) -> t.Sequence[disks.Scene]:
        """Return how the disks are made."""
        return WISHES[kind][0]

    def note_usual(self) -> None:
        """Note nothing: no bitmap is touched."""
        self.scenery.usual.append((set(), {}))


def jobs_for(crew: rounds.Crew[Overlays], asked: rounds.Choice) -> list[rounds.Job[Overlays]]:
    """Return all rounds."""
    ground = crew.labs[0]
    commits.warn_of_tmpfs(ground)
    jobs: list[rounds.Job[Overlays]] = []
    for kind in WISHES:
        ground.use(kind)
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
    jobs += commits.fault_jobs(ground, next(iter(WISHES)))
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Overlays, make_promise=GoneBack)))
