# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Merge overlays down, killed at every step and at random moments, with faults, and with VMs before the next run.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/commits.py. Needs QEMU and gcc.

At any moment the guest reads what it wrote, no image is damaged, and a bitmap that libvirt would use marks all that has
changed since its checkpoint; judged from the topmost image, and from BASE too once the vault says that it has all. No
process and no lock is left. The next run completes the commit and removes what is left over; the one after it changes
nothing. Where the vault was removed, or a VM died as it opened its image, it may refuse, and says so.
"""

from __future__ import annotations

import collections
import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import typing as t

import faults
import kills
import kinds
import lab
import leftover
import promise
import qemu
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains, disks

# The scenes of the disks of a VM.
SCENES: dict[kinds.Kind, tuple[disks.Scene, ...]] = {
    kinds.Kind(" and ".join(scene.__name__ for scene in scenes), tuple(range(len(scenes)))): scenes
    for scenes in (
        (disks.plain,),
        (disks.unlike,),
        (disks.two,),
        (disks.below,),
        (disks.deep,),
        (disks.deep_to_the_top,),
        (disks.faulty, disks.bare),
    )
}
# Those whose bitmaps are all in order. Over a gap that was there before other tools make wrong ones look valid, too.
IN_ORDER = {disks.below, disks.deep, disks.deep_to_the_top}
IS_DONE = ("committed", "absent")
# By these codes a disk may be refused when what is needed may be in no image any more.
BY_LOSS = {*disks.BY_LOSS, runs.LEFT_OUT}
QUOTAS = 66  # nodes of btrfs: more than a run takes


S = t.TypeVar("S", bound="Stack")


class OfStacks(promise.OfImages[S]):
    """What the promises of disks with several images have in common."""

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images, whatever the run was to do."""
        wrong = self.changed_wrong()
        for disk, (_checkpoints, _now, images) in zip(self._ground.stacks, self._ground.scenery.then):
            folder = pathlib.Path(disk.folder)
            known = self.known(disk, list(map(os.path.basename, images)))
            wrong += [*self.disk_wrong(disk), *promise.locks_wrong(folder), *promise.names_wrong(folder, known)]
        return wrong

    def known(self, disk: disks.Disk, images: t.Sequence[str]) -> set[str]:
        """Return the names that there may be, out of those that the images had in the beginning."""
        raise NotImplementedError

    def disk_wrong(self, disk: disks.Disk) -> list[str]:
        """Return what is wrong with the images of a disk."""
        raise NotImplementedError

    def done(self) -> list[bool]:
        """Whether nothing is left to do, for each disk."""
        raise NotImplementedError

    def done_at(self) -> float:
        """Return when the last name went; 0 if something is to be done."""
        return max(os.stat(disk.folder).st_mtime for disk in self._ground.stacks) if all(self.done()) else 0.0


class Committed(OfStacks["Stack"]):
    """All from TOP down to BASE is in BASE, or the VM can go on with TOP; and the next run completes it."""

    def untouched(self) -> list[pathlib.Path]:
        """Return the images below BASE."""
        stacks = self._ground.stacks
        return [pathlib.Path(path) for disk in stacks for path in disk.images[disk.images.index(disk.base) + 1 :]]

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module."""
        overlays = [
            {"path": disk.path, "backing_file": disk.base, **({"above": disk.above} if disk.above else {})}
            for disk in self._ground.stacks
        ]
        return {"state": "committed", "overlays": overlays, "timeout": 20, **options}

    def done(self) -> list[bool]:
        """Whether nothing is left of the commit, for each disk."""
        return [not os.path.lexists(disk.path) and disk.vault is None for disk in self._ground.stacks]

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        found = {"vaulted" if disk.vault else "merged" if done else "whole" for done, disk in self._each()}
        if any(disk.vault and disk.vault.endswith("-given") for disk in self._ground.stacks):
            found = {"given"}
        return "+".join(sorted(found))

    def _each(self) -> t.Iterator[tuple[bool, disks.Disk]]:
        return zip(self.done(), self._ground.stacks)

    def known(self, disk: disks.Disk, images: t.Sequence[str]) -> set[str]:
        """Return the names that there may be: of the images, and of the vault."""
        return {*images, *([os.path.basename(disk.vault)] if disk.vault else [])}

    def disk_wrong(self, disk: disks.Disk) -> list[str]:
        """Return what is wrong with the images of a disk."""
        return disks.wrong_with(disk, with_base=not self._ground.has_run)

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left."""
        said, done = run.states, self.done()
        is_good = run.status == 0 and all(done) and set(said) <= set(IS_DONE)
        is_bad = run.status == 1 and set(said) == {"failed"}
        return [] if is_good or is_bad else [f"exit {run.status}, says {said} of what is {done}: {run.message!r}"]

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must complete the commit, and a third one."""
        leftovers = self._ground.leftovers()
        run = self._ground.run()
        wrong = [f"second run: {what}" for what in self.images_wrong()]
        if self._ground.may_refuse and run.status == 1:
            codes = {overlay["code"] for overlay in (run.result or {}).get("overlays", ()) if "code" in overlay}
            return wrong if codes and codes <= BY_LOSS else [*wrong, f"second run: {run.message}"]
        wrong += [f"second run: {what}" for what in self._ground.cleared_wrong(run, leftovers)]
        if run.status != 0 or not all(self.done()):
            return [*wrong, f"second run: exit {run.status}, {run.states}, {self.done()}: {run.message} {run.stderr}"]
        wrong += self._ground.bits_wrong(run)
        third = self._ground.run()
        if third.status or set(third.states) != {"absent"} or (third.result or {}).get("changed"):
            wrong.append(f"third run: exit {third.status}, {third.states}: {third.message}")
        return wrong

    def raced_wrong(
        self, rival: promise.Rival, _theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, stopped: bool
    ) -> list[str]:
        """Return what is wrong with what two runs have done: one commits, the other waits for it, or says that."""
        done = [run for run in (first, second) if set(run.states) == {"committed"}]
        wrong = [] if len(done) in rival.winners else [f"{first.states} and {second.states}"]
        if not stopped and {*first.states, *second.states} > {"committed", rival.other}:
            wrong.append(f"{first.states} and {second.states}: {first.message} / {second.message}")
        return wrong + self.images_wrong()

    def vm_wrong(self, run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a VM came, or tried to."""
        wrong = ["the VM had TOP open, and it was merged all the same"] if run.status == 0 and too_early else []
        return wrong if runs_on else wrong + self.images_wrong()


class Scenery(t.NamedTuple):
    """The disks of a VM, and what they were in the beginning."""

    stacks: list[disks.Disk]
    then: list[tuple[dict[str, bytes], bytes, list[str]]]  # checkpoints, what the guest has, and the images
    kept: pathlib.Path
    usual: list[tuple[set[tuple[str, int, bool, bool]], dict[str, int]]]  # BASE's bitmaps and bits when nothing happens


class Stack(lab.Lab):
    """A lab whose disks have overlays to be merged down."""

    has_run = False  # a VM, since the kill
    may_refuse = False
    may_differ = False  # the bitmaps in the end
    events: t.Sequence[disks.Event] = (*disks.EVENTS[1:], disks.made_anew)  # between a kill and the next run
    scenery: Scenery
    kind: kinds.Kind

    def use(self, kind: kinds.Kind) -> None:
        """Have disks as in these scenes."""
        known: dict[kinds.Kind, Scenery] = self.__dict__.setdefault("_known", {})
        if kind not in known:
            known[kind] = self._build(self.scenes(kind), kind.name)
        self.kind = kind
        self.scenery = known[kind]
        self.stacks = self.scenery.stacks
        self.disks = [
            kinds.Disk(pathlib.Path(disk.base), pathlib.Path(disk.path), {}, disks.SIZE) for disk in self.stacks
        ]

    def scenes(self, kind: kinds.Kind) -> t.Sequence[disks.Scene]:
        """Return how the disks of a VM of this kind are made."""
        return SCENES.get(kind, (disks.plain,))

    def refuses_after(self, event: disks.Event) -> bool:
        """Whether the next run may refuse, since what is needed may be in no image any more."""
        return event in (*disks.MAY_REFUSE, disks.made_anew)

    def calls(self) -> dict[str, collections.Counter[str]]:
        """Return how often module and qemu make each call in a run in which nothing goes wrong."""
        known: dict[kinds.Kind, dict[str, collections.Counter[str]]] = self.__dict__.setdefault("_counted", {})
        if self.kind not in known:
            known[self.kind] = super().calls()
        return known[self.kind]

    def _build(self, scenes: t.Sequence[disks.Scene], name: str) -> Scenery:
        shutil.rmtree(self.folder, ignore_errors=True)
        stacks = []
        for number, scene in enumerate(scenes):
            place = self.folder / str(number)
            place.mkdir(parents=True)
            disk = disks.Disk(place)
            scene(disk)
            stacks.append(disk)
        kept = self.papers / "kept" / name
        shutil.copytree(self.folder, kept)
        then = [(dict(disk.checkpoints), disk.now, list(disk.images)) for disk in stacks]
        return Scenery(stacks, then, kept, [])

    def reset(self) -> None:
        """Have all as a round wants to find it."""
        if not self.scenery.usual:
            self.lay_out()
            run = self.run()
            assert run.status == 0, run
            self.note_usual()
        super().reset()

    def note_usual(self) -> None:
        """Note what a run leaves to which nothing happens."""
        self.scenery.usual.extend((qemu.bitmaps_of(disk.base), chains.own_bits(disk.base)) for disk in self.stacks)

    def lay_out(self) -> None:
        """Have the images as they were in the beginning."""
        for entry in list(self.folder.iterdir()):
            if entry.name != "lost+found":
                shutil.rmtree(entry)
        shutil.copytree(self.scenery.kept, self.folder, dirs_exist_ok=True)
        self.begin()

    def begin(self) -> None:
        """Know of the disks what they were in the beginning."""
        self.has_run = self.may_refuse = self.may_differ = False
        for disk, (checkpoints, now, images) in zip(self.stacks, self.scenery.then):
            disk.checkpoints, disk.now, disk.images = dict(checkpoints), now, list(images)

    def leftovers(self) -> list[str]:
        """Return the names of the temporary files."""
        return [name for _folder, _folders, names in os.walk(self.folder) for name in filter(leftover.is_one, names)]

    def bits_wrong(self, run: runs.Run) -> list[str]:
        """Return in what BASE's bitmaps are not those of a run to which nothing happens."""
        wrong = []
        said = (run.result or {}).get("overlays", [{}] * len(self.stacks))
        for disk, (bitmaps, bits), told in zip(self.stacks, self.scenery.usual, said):
            if self.may_differ:
                continue
            there, own = qemu.bitmaps_of(disk.base), chains.own_bits(disk.base)
            if there != bitmaps:
                wrong.append(f"BASE has {sorted(there)}, not {sorted(bitmaps)}")
            # Those that are made again from what images hold lack discards that had no effect, and have more elsewhere.
            if told.get("exact") and own != bits:
                wrong.append("BASE's bitmaps are called exact and are not")
        return wrong


def then(ground: Stack, rule: str, event: disks.Event, seed: str) -> rounds.Finding:
    """Kill a run and its QEMU at a step; let something happen to the disks; have the next run complete it."""
    run = ground.run(rule)
    outcome = f"{ground.promise.outcome()}, {event.__name__}"
    wrong = [f"after the kill: {what}" for what in ground.promise.images_wrong()]
    for disk in ground.stacks:
        disk.dice = random.Random(seed)
        event(disk)
    ground.has_run = ground.may_differ = True
    ground.may_refuse = ground.refuses_after(event)
    wrong += [f"after {event.__name__}: {what}" for what in ground.promise.images_wrong()]
    wrong += ground.promise.rerun_wrong()
    if ground.may_refuse:
        outcome += ", completed" if all(ground.promise.done()) else ", refused"
    return rounds.Finding(outcome if run.status < 0 else f"the run went through, {event.__name__}", wrong)


def then_pulled(ground: Stack, rule: str, base: int) -> rounds.Finding:
    """Kill a run and its QEMU at a step; another tool takes TOP, or BASE, into the image above; then the call again.

    `base` is the place in the chain of the image that is the lowest but not taken in.
    """
    run = ground.run(rule)
    before = ground.promise.outcome()
    wrong = [f"after the kill: {what}" for what in ground.promise.images_wrong()]
    for disk in ground.stacks:
        top, images = disk.images[0], disk.images[: base + 1]
        chain = [one["filename"] for one in qemu.chain_of(top)] if os.path.exists(top) else []
        if base < len(disk.images) and chain[: base + 1] == images:
            qemu.pull(top, images[base])
    wrong += [f"after the pull: {what}" for what in ground.promise.images_wrong()]
    again = "+".join(sorted(set(ground.run().states)))
    wrong += [f"second run: {what}" for what in ground.promise.images_wrong()]
    return rounds.Finding(f"{before}, then {again}" if run.status < 0 else "the run went through", wrong)


def then_jobs(ground: Stack, kind: kinds.Kind, asked: rounds.Choice) -> list[rounds.Job[Stack]]:
    """Return a round for each step that changes something and each thing that can happen before the next run."""
    calls = ground.calls()
    rules = [
        f"{who}:{call}:{number}:{action}"
        for who, action in (("module", "group"), ("qemu", "group"))
        for call, number in kills.steps(calls, who, asked.full)
        if call not in ("setlk", "fork", "say", "kill", "ask")
    ]
    pulled = [
        rounds.Job(
            f"{kind.name}: killed, then another tool takes TOP out",
            f"{kind.name}-{rule}-pulled-to-{base}",
            functools.partial(then_pulled, rule=rule, base=base),
            kind,
        )
        for rule in rules
        for base in range(2, max(len(disk.images) for disk in ground.stacks))
        if IN_ORDER.issuperset(ground.scenes(kind))
    ]
    return pulled + [
        rounds.Job(
            f"{kind.name}: killed, then {'the vault goes' if 'vault' in event.__name__ else 'a VM'}",
            f"{kind.name}-{rule}-{event.__name__}",
            functools.partial(then, rule=rule, event=event, seed=f"{asked.seed} {rule}"),
            kind,
        )
        for rule in rules
        for event in ground.events
    ]


def full(ground: Stack, pages: int) -> rounds.Finding:
    """Merge on a file system that has so much room left, then on the same when it has more."""
    used = sum(path.stat().st_blocks * 512 for path in ground.scenery.kept.rglob("*"))
    with faults.small_disk(ground, f"size={used + (pages + 8) * faults.PAGE}") as cure:
        ground.reset()
        ground.runner.start(ground.promise.module, ground.promise.arguments(timeout=2), ground.environment())
        run = ground.runner.ended()
        wrong = [*ground.ended_wrong(run), *faults.message_wrong(ground, run)]
        cure()
        outcome = f"told as {'success' if run.status == 0 else 'failure'}"
        return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), faults.told(ground, run))


def vm_jobs(ground: Stack, kind: kinds.Kind) -> list[rounds.Job[Stack]]:
    """Return the rounds in which a VM starts, or a second run comes, while the module is at a step."""
    rival = promise.Rival("the same merge", kind, lambda all_disks: all_disks, (0, 1), "absent")
    plays: dict[str, t.Callable[[int], t.Callable[[Stack], rounds.Finding]]] = {
        "VM starts on TOP": lambda n: functools.partial(faults.vm_at_step, image=faults.overlay, number=n),
        "VM starts on BASE": lambda n: functools.partial(faults.vm_at_step, image=faults.active, number=n),
        "second run": lambda n: functools.partial(faults.race, rival=rival, pause=0, step=n),
    }
    count = sum(ground.calls()["module"].values())
    return [
        rounds.Job(f"{kind.name}: {what} at a step", f"{kind.name}-{what}-{n}", play(n), kind)
        for what, play in plays.items()
        for n in range(1, count + 1)
    ]


def fault_jobs(ground: Stack, kind: kinds.Kind) -> list[rounds.Job[Stack]]:
    """Return the rounds in which a call fails, a VM or another run comes, or the disk is full."""
    ground.use(kind)
    return [
        *faults.injected(ground, kind),
        *vm_jobs(ground, kind),
        *(
            rounds.Job(f"{kind.name}: full disk", f"{kind.name}-full-{n}", functools.partial(full, pages=n), kind)
            for n in range(0, 400, 7)
        ),
        *faults.quota_jobs(kind, QUOTAS),
    ]


def warn_of_tmpfs(ground: Stack) -> None:
    """Tell that kills do not meet all moments where nothing waits for a disk."""
    command = ["stat", "--file-system", "--format=%T", str(ground.place)]
    if subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "tmpfs":
        print("The labs lie on a tmpfs, where nothing waits for a disk: set TMPDIR to meet the moments between writes.")


def jobs_for(crew: rounds.Crew[Stack], asked: rounds.Choice) -> list[rounds.Job[Stack]]:
    """Return all rounds."""
    ground = crew.labs[0]
    warn_of_tmpfs(ground)
    jobs: list[rounds.Job[Stack]] = []
    for kind in SCENES:
        ground.use(kind)
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += then_jobs(ground, kind, asked)
    for kind in list(SCENES)[:1]:
        jobs += fault_jobs(ground, kind)
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Stack, make_promise=Committed)))
