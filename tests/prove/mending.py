# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Heal and remove bitmaps, killed at every step and at random moments, with faults, and with VMs before the next run.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/mending.py. Needs QEMU and gcc.

At any moment each image holds what it held, none is damaged, and a bitmap that libvirt would use marks all that has
changed since its checkpoint; QEMU tells all of that. No process and no lock is left. The next run completes the work,
removes what is left over, and leaves no vault; the one after it changes nothing.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import typing as t

import commits
import kills
import kinds
import promise
import qemu
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains, disks

SIZE = disks.SIZE
VAULTS = (".kvmfleet-healing", ".kvmfleet-healing-given")  # of work that goes on, and of work that is done
DONE = {"valid": ("valid", "rebuilt"), "absent": ("absent", "removed")}
# What a bitmap that nobody can tell the changes of may fail with.
BY_WORD = ("not_healable", "may_be_emptied", "no_checkpoint", "closes_gap", "unfinished")


class Wish(t.NamedTuple):
    """What is done to the bitmaps of the disks of a VM."""

    state: str
    scenes: tuple[disks.Scene, ...]
    options: dict[str, t.Any]
    asked: tuple[str, ...]  # that are valid afterwards, or gone
    refused_after: tuple[disks.Event, ...] = ()  # after which they may be lost, beside the loss of a vault


def alone(disk: disks.Disk) -> None:
    """One image, whose VM has died."""
    disk.path = disk.base = disk.add("top", SIZE, disks.recording("a", "b"))
    disk.crash()


def layered(disk: disks.Disk) -> None:
    """Three images: one that lacks bitmaps, and one whose VM has died; a bitmap that begins in the one between."""
    disk.base = disk.add("base", SIZE, [*disks.recording("a", "b", "c"), Bitmap("off", 65536, False, False)])
    disk.add("middle", SIZE, disks.recording("a", "own", granularity=4096))
    disk.path = disk.add("top", SIZE, disks.recording("a", "c", "own"))
    disk.crash()


def dropped(disk: disks.Disk) -> None:
    """Two images, the upper one as qemu-img makes it."""
    disk.base = disk.add("base", SIZE, disks.recording("a", "b"), "-o", "cluster_size=4096")
    disk.path = disk.add("top", SIZE, [])


def sound(disk: disks.Disk) -> None:
    """Three images with all that they should have."""
    disk.base = disk.add("base", SIZE, disks.recording("a", "b"))
    disk.add("middle", SIZE, disks.recording("a", "b", "own"))
    disk.path = disk.add("top", SIZE, disks.recording("a", "b", "own", "new"))


def vaults_go(disk: disks.Disk) -> None:
    """Somebody deletes the vaults."""
    for name in os.listdir(disk.folder):
        if name.endswith(VAULTS):
            os.unlink(os.path.join(disk.folder, name))


def vaults_go_and_vm_dies(disk: disks.Disk) -> None:
    """Somebody deletes the vaults, and the VM dies."""
    vaults_go(disk)
    disk.crash()


EVENTS = ("vm_runs", "vm_dies", "vm_dies_at_start", "vm_runs_after_it_died_at_start", "checkpoint")
_WITHOUT_VAULT = (vaults_go, vaults_go_and_vm_dies)
WISHES = {
    kinds.Kind("one image healed", (0,)): Wish(
        "valid",
        (alone,),
        {"assume_not_emptied": True},
        ("a", "b"),
        (disks.vm_dies_at_start, disks.vm_runs_after_it_died_at_start),
    ),
    kinds.Kind("chain healed", (0,)): Wish(
        "valid", (layered,), {"names": ["a", "b", "c", "own"]}, ("a", "b", "c", "own")
    ),
    kinds.Kind("two disks made cumulative", (0, 1)): Wish(
        "valid", (dropped, sound), {"bitmap_content": "cumulative", "names": ["a", "b"]}, ("a", "b")
    ),
    kinds.Kind("removed from a chain", (0,)): Wish("absent", (sound,), {"names": ["a", "new"]}, ("a", "new")),
}


class Mended(commits.OfStacks["Chain"]):
    """The bitmaps are valid, or gone, or can be made so by the next run, and look valid only if they are."""

    module = "qcow2_bitmap"

    def untouched(self) -> list[pathlib.Path]:
        """Return the BASE of each disk where it is not to be written."""
        below = [pathlib.Path(disk.base) for disk in self._ground.stacks if disk.base != disk.path]
        return below if self._ground.wish.state == "valid" else []

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module."""
        wish = self._ground.wish
        paths = [disk.path for disk in self._ground.stacks]
        return {"paths": paths, "state": wish.state, **wish.options, "timeout": 20, **options}

    def done(self) -> list[bool]:
        """Whether nothing is left to do, for each disk."""
        return [not self._undone(disk, self._ground.wish.asked) for disk in self._ground.stacks]

    def _undone(self, disk: disks.Disk, names: t.Collection[str]) -> set[str]:
        """Return of these names those that are not as they were asked for; or the vaults that are there."""
        vaults = {name for name in os.listdir(disk.folder) if name.endswith(VAULTS)}
        if vaults:
            return vaults
        try:
            if self._ground.wish.state == "valid":
                return set(names) - chains.usable(disk.path).keys()
            there = {bitmap[0] for path in disk.images for bitmap in qemu.bitmaps_of(path)}
        except subprocess.CalledProcessError:  # QEMU has one of them open for writing
            return set(names)
        return there & set(names)

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        vaults = [name for disk in self._ground.stacks for name in os.listdir(disk.folder) if name.endswith(VAULTS)]
        return f"{len(vaults)} vaults, {sum(self.done())} of {len(self._ground.stacks)} done"

    def known(self, _disk: disks.Disk, images: t.Sequence[str]) -> set[str]:
        """Return the names that there may be: of the images, and of a vault of each."""
        return {*images, *(f".{one}{end}" for one in images for end in VAULTS)}

    def disk_wrong(self, disk: disks.Disk) -> list[str]:
        """Return what is wrong with the images of a disk."""
        return disks.wrong_with(disk)

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left."""
        said = run.states
        is_good = run.status == 0 and all(self.done()) and set(said) <= set(DONE[self._ground.wish.state])
        is_bad = run.status == 1 and "failed" in said
        return (
            [] if is_good or is_bad else [f"exit {run.status}, says {said} of what is {self.done()}: {run.message!r}"]
        )

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must complete the work, and a third one."""
        ground, leftovers = self._ground, self._ground.leftovers()
        run = ground.run()
        wrong = [f"second run: {what}" for what in [*self.images_wrong(), *ground.cleared_wrong(run, leftovers)]]
        needed = () if ground.may_refuse else ground.wish.asked
        # A vault of an image that is gone stays, as that refusal says: somebody may put the image back.
        is_of_another = ground.may_refuse and _codes(run) == {"unfinished"}
        undone = [] if is_of_another else [self._undone(disk, needed) - _told_as_gone(run) for disk in ground.stacks]
        wrong += [f"second run: {sorted(names)} are left" for names in undone if names]
        if run.status and not (ground.may_refuse and _codes(run) <= set(BY_WORD)):
            wrong.append(f"second run: exit {run.status}: {run.message} {run.stderr}")
        wrong += ground.bits_wrong(run)
        third = ground.run()
        if third.status != run.status or (third.result or {}).get("changed"):
            wrong.append(f"third run: exit {third.status}: {third.message} {(third.result or {}).get('disks')}")
        return wrong

    def raced_wrong(
        self, rival: promise.Rival, _theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, stopped: bool
    ) -> list[str]:
        """Return what is wrong with what two runs have done: one does it, the other waits for it, or says that."""
        changed = [run for run in (first, second) if (run.result or {}).get("changed")]
        wrong = [] if len(changed) in rival.winners else [f"{len(changed)} runs say that they have changed something"]
        if not stopped and (first.status or second.status):
            wrong.append(f"{first.message} / {second.message}")
        return wrong + self.images_wrong()

    def vm_wrong(self, run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a VM came, or tried to."""
        wrong = ["the VM had the image open, and its bitmaps were written"] if run.status == 0 and too_early else []
        return wrong if runs_on else wrong + self.images_wrong()


def _told_as_gone(run: runs.Run) -> set[str]:
    """Return the bitmaps that are told of, and are not put back, as a checkpoint was made since QEMU has lost them."""
    told = re.findall("has kept its bitmap (.*?), which it lacks now", str((run.result or {}).get("warnings")))
    return {name for names in told for name in re.findall("'([^']*)'", names)}


def _codes(run: runs.Run) -> set[str]:
    """Return the codes of all bitmaps, or disks, that failed."""
    found = set()
    for disk in (run.result or {}).get("disks", ()):
        own = [bitmap["code"] for bitmap in disk["bitmaps"] if "code" in bitmap]
        found.update(own or [disk["code"]] if "code" in disk else own)
    return found


class Chain(commits.Stack):
    """A lab whose disks have bitmaps to be healed or removed."""

    events = (
        *(event for event in disks.EVENTS[1:] if event.__name__ in EVENTS),
        vaults_go,
        vaults_go_and_vm_dies,
        disks.made_anew,
    )
    wish: Wish

    def use(self, kind: kinds.Kind) -> None:
        """Have disks as for this wish."""
        kind = kind if kind in WISHES else next(iter(WISHES))
        self.wish = WISHES[kind]
        super().use(kind)

    def scenes(self, kind: kinds.Kind) -> t.Sequence[disks.Scene]:
        """Return how the disks are made."""
        return WISHES[kind].scenes

    def refuses_after(self, event: disks.Event) -> bool:
        """Whether the next run may refuse, since what is needed may be in no image any more."""
        return event in (disks.made_anew, *_WITHOUT_VAULT, *self.wish.refused_after)

    def note_usual(self) -> None:
        """Note what the bitmaps mark after a run to which nothing happens."""
        self.scenery.usual.extend((set[t.Any](), chains.usable(disk.path)) for disk in self.stacks)

    def bits_wrong(self, _run: runs.Run) -> list[str]:
        """Return which bitmaps mark more than they do usually, and than images hold; the rest was judged before."""
        wrong = []
        for disk, (_bitmaps, usual) in zip(self.stacks, self.scenery.usual):
            held = 0
            for path in disk.images:
                held |= held_by(path)
            for name, bits in chains.usable(disk.path).items():
                if name in usual and not self.may_differ and bits & ~(usual[name] | held):
                    wrong.append(f"{name} marks more than can be")
        return wrong


def held_by(path: str) -> chains.Bits:
    """Return what an image holds itself, as QEMU maps it, in granules of the bitmaps that there are here."""
    granule, bits = 65536, 0
    for one in json.loads(qemu.qemu_img("map", "--output=json", "-f", "qcow2", path)):
        if one["depth"] == 0:
            start, end = one["start"] // granule, -(-(one["start"] + one["length"]) // granule)
            bits |= ((1 << (end - start) * granule // 512) - 1) << (start * granule // 512)
    return bits


def jobs_for(crew: rounds.Crew[Chain], asked: rounds.Choice) -> list[rounds.Job[Chain]]:
    """Return all rounds."""
    ground = crew.labs[0]
    commits.warn_of_tmpfs(ground)
    jobs: list[rounds.Job[Chain]] = []
    for kind in WISHES:
        ground.use(kind)
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += commits.then_jobs(ground, kind, asked)
    for kind in list(WISHES)[1::2]:
        jobs += commits.fault_jobs(ground, kind)
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Chain, make_promise=Mended)))
