# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Heal and remove the checkpoints of domains, and kill domain_checkpoint on the way; judge by libvirt's words.

Run as root, with the Python of an environment that has ansible-core and libvirt-python:
python tests/prove/checkpoints.py. Needs QEMU, libvirt and gcc. Each lab has a libvirt daemon of its own.

At any moment the definitions are what they were, and the images hold what they held; a bitmap that libvirt would use
marks all that has changed since its checkpoint, and libvirt knows every checkpoint that was not to go. The next run
completes the work, and the one after it changes nothing. Then the domains are started, and libvirt is asked whether an
increment since each checkpoint is possible.
"""

from __future__ import annotations

import collections
import functools
import pathlib
import sys
import typing as t

import commits
import domains
import estate
import faults
import kills
import kinds
import lab
import leaving
import promise
import qemu
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains

VAULTS = (".kvmfleet-healing", ".kvmfleet-healing-given")  # of work that goes on, and of work that is done
Break = t.Callable[[list[pathlib.Path]], None]  # what happens to the overlays


class Wish(t.NamedTuple):
    """What is to become of the checkpoints of which domains."""

    domains: kinds.Kind
    options: dict[str, t.Any]
    broken: Break
    left: tuple[str, ...]  # checkpoints afterwards
    runs: bool = False  # whether the domains do


def died(overlays: list[pathlib.Path]) -> None:
    """The VM has died, so that all bitmaps of the overlays are inconsistent."""
    for path in overlays:
        with qemu.storage_daemon() as monitor:
            qemu._open(monitor, path)
            monitor.command("block-dirty-bitmap-add", {"node": "image", "name": "touch", "persistent": True})
            monitor._process.kill()


def dropped(overlays: list[pathlib.Path]) -> None:
    """An overlay has lost a bitmap that is in the image below, and one that is in no other."""
    qemu.qemu_img("bitmap", "--remove", str(overlays[0]), estate.CHECKPOINT)
    qemu.qemu_img("bitmap", "--remove", str(overlays[-1]), leaving.LATER)


def lost(overlays: list[pathlib.Path]) -> None:
    """An overlay has lost a bitmap that is in no other image."""
    qemu.qemu_img("bitmap", "--remove", str(overlays[-1]), leaving.LATER)


BOTH, FIRST = (leaving.LATER, estate.CHECKPOINT), (estate.CHECKPOINT,)
WISHES = {
    kinds.Kind("healed", (0, 1, 2)): Wish(estate.PAIR, {"assume_not_emptied": True}, died, BOTH),
    kinds.Kind("healed or removed", (0, 1, 2)): Wish(estate.PAIR, {"unusable": "remove"}, dropped, BOTH),
    kinds.Kind("removed", (0, 1, 2)): Wish(
        estate.THREE, {"state": "absent", "checkpoints": [leaving.LATER]}, lost, FIRST
    ),
    kinds.Kind("removed while it runs", (0, 1, 2)): Wish(
        estate.THREE, {"unusable": "remove", "running": "live"}, lost, FIRST, runs=True
    ),
}


class Ground(leaving.Ground):
    """A lab whose domains have checkpoints that are broken."""

    known_kinds = estate.WITH_PAIR
    wish: Wish

    def use(self, kind: kinds.Kind) -> None:
        """Have the domains of this wish."""
        kind = kind if kind in WISHES else next(iter(WISHES))
        self.wish = WISHES[kind]
        estate.Estate.use(self, self.wish.domains)
        self.kind = kind

    def calls(self) -> dict[str, collections.Counter[str]]:
        """Return how often module and qemu make each call in a run in which nothing goes wrong."""
        known: dict[str, dict[str, collections.Counter[str]]] = self.__dict__.setdefault("_counted", {})
        name = next(kind.name for kind, wish in WISHES.items() if wish is self.wish)
        if name not in known:
            known[name] = super().calls()
        return known[name]

    def _build(self) -> leaving.Scenery:
        scenery = super()._build()
        self.wish.broken([scenery.kept / self.folder.name / disk.target.name for disk in self.disks])
        return scenery

    def lay_out(self) -> None:
        """Have the domains with broken checkpoints, and running if that is wished."""
        super().lay_out()
        for name in self.numbers if self.wish.runs else ():
            said = self.daemon.start_domain(name)
            assert not said, said


class Mended(estate.OfDomains[Ground]):
    """The checkpoints are valid, or gone, or can be made so by the next run, and look valid only if they are."""

    module = "domain_checkpoint"

    @property
    def subjects(self) -> tuple[str, ...]:
        """With one of which each message begins."""
        shared = str(self._ground.place.parents[1] / "below.qcow2")  # which a run in another lab may hold just now
        return (*super().subjects, shared)

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, which takes domains as a whole."""
        what = {"name": list(self._ground.numbers), "uri": self._ground.daemon.uri, "timeout": 20}
        return {**what, **self._ground.wish.options, **options}

    def undone(self, name: str) -> list[str]:
        """Return what is left to do for a domain."""
        ground = self._ground
        vaults = [path.name for path in ground.folder.parent.rglob(".*") if path.name.endswith(VAULTS)]
        images = [path.name for disk in ground.disks_of(name) for path in (disk.active, disk.target)]
        own = {f".{image}{end}" for image in images for end in VAULTS}
        if own & set(vaults):
            return vaults
        known = self._known(name)
        # Of two domains, one has lost nothing that cannot be healed.
        left = set(ground.wish.left) - ({leaving.LATER} if self._is_to_lose(name) else set())
        undone = [f"libvirt knows {sorted(known)}"] if known != left else []
        if not ground.wish.runs:
            for disk in ground.disks_of(name):
                undone += [f"{disk.target.name}: {one} is broken" for one in left - chains.usable(disk.target).keys()]
        return undone

    def _is_to_lose(self, name: str) -> bool:
        """Whether a domain has a checkpoint that nobody can heal."""
        ground = self._ground
        return ground.wish.broken is not died and ground.disks[-1] in ground.disks_of(name)

    def _known(self, name: str) -> set[str]:
        return {checkpoint.getName() for checkpoint in self._ground.domain(name).listAllCheckpoints()}

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        vaults = [path for path in self._ground.folder.parent.rglob(".*") if path.name.endswith(VAULTS)]
        return f"{sum(self.done())} of {len(self._ground.numbers)} domains done, {len(vaults)} vaults"

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images, the definitions and the checkpoints, whatever the run was to do."""
        ground, wrong = self._ground, []
        for name in ground.numbers:
            if ground.switched(name) is not True:
                wrong.append(f"{name} has another definition: {estate.definition_of(ground.domain(name))}")
            must = set(BOTH) - ({leaving.LATER} if self._is_to_lose(name) else set())
            if not must <= self._known(name):
                wrong.append(f"{name} has lost checkpoints: {self._known(name)}")
            if ground.wish.runs and ground.domain(name).isActive():
                wrong += [f"{name}: {one} is broken" for one in must if not ground.daemon.size_told(name, one)]
            elif not ground.domain(name).isActive():
                wrong += [problem for disk in ground.disks_of(name) for problem in self._disk_wrong(disk)]
        known = {path.name for disk in ground.disks for path in (disk.active, disk.target)}
        known |= {f".{name}{end}" for name in known for end in VAULTS}
        folders = (ground.folder, ground.actives_folder)
        return wrong + [problem for folder in folders for problem in promise.names_wrong(folder, known)]

    def _disk_wrong(self, disk: kinds.Disk) -> list[str]:
        """Return what is wrong with the images of a disk that nobody has open."""
        known = self._ground.scenery.disks[disk.number]
        wrong = leaving._unlike(disk.target, "qcow2", known.now) + leaving._unlike(disk.active, "qcow2", known.then)
        usable = chains.usable(disk.target)
        for name, bits in known.changed_now.items():
            if bits & ~usable.get(name, -1):
                wrong.append(f"{disk.target.name}: {name} lacks changes")
        wrong += [f"{path.name} is locked" for path in (disk.target, disk.active) if lab.is_locked(path)]
        return wrong + [damage for path in (disk.target, disk.active) for damage in [chains.damage(path)] if damage]

    def third_wrong(self, _third: runs.Run) -> list[str]:
        """Return what libvirt says of the checkpoints once the domains run."""
        ground, wrong = self._ground, []
        for name in ground.numbers:
            if not ground.domain(name).isActive() and (said := ground.daemon.start_domain(name)):
                wrong.append(f"{name} does not start: {said}")
                continue
            wrong += [
                f"libvirt cannot use {one} of {name}"
                for one in self._known(name)
                if not ground.daemon.size_told(name, one)
            ]
            ground.domain(name).destroy()
        return wrong

    def vm_wrong(self, _run: runs.Run, runs_on: bool, _too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a domain came."""
        return [] if runs_on else self.images_wrong()


def started_at_step(ground: Ground, number: int) -> rounds.Finding:
    """Start a domain while the module is at a step, and have it run on until the run has ended."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    name = sorted(ground.numbers)[-1]
    said = ground.daemon.start_domain(name)
    run = ground.runner.resume()
    wrong = [] if not said or "lock" in said else [f"{name} does not start: {said}"]
    wrong += [*ground.promise.images_wrong(), *faults.message_wrong(ground, run)]
    if not said:
        ground.domain(name).destroy()
    outcome = f"{'starts' if not said else 'does not start'}, {run.domain(name).get('state')}"
    return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), faults.told(ground, run))


AT_STEPS: dict[str, tuple[str, domains.Play]] = {
    "libvirt's daemon dies at a step": ("daemon", domains.daemon_dies),
    "domain is started at a step": ("start", started_at_step),
    "second run at a step": ("second", leaving.second_run),
}
RUNNING = {"libvirt's daemon dies at a step": ("daemon", domains.daemon_dies)}


def around(ground: Ground, kind: kinds.Kind) -> list[rounds.Job[Ground]]:
    """Return the rounds in which something happens around a run, or between it and the next one."""
    ground.use(kind)
    calls = ground.calls()
    plays = RUNNING if ground.wish.runs else AT_STEPS
    jobs = [
        rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{word}-step-{n}", functools.partial(play, number=n), kind)
        for series, (word, play) in plays.items()
        for n in range(1, sum(calls["module"].values()) + 1)
    ]
    if ground.wish.broken is died:
        jobs += leaving.dying(kind, calls)
    return jobs


def jobs_for(crew: rounds.Crew[Ground], asked: rounds.Choice) -> list[rounds.Job[Ground]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs: list[rounds.Job[Ground]] = []
    for kind, wish in WISHES.items():
        if asked.only is not None and not asked.only.startswith((f"{kind.name}-", "*")):
            continue  # to count the calls of a kind takes its time
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += around(ground, kind)
        if wish.broken in (dropped, lost):
            jobs += faults.injected(ground, kind)
        if not wish.runs:
            jobs += faults.quota_jobs(kind, commits.QUOTAS)
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Ground, make_promise=Mended)))
