# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take snapshots of domains that run and merge them down, and kill domain_overlay on the way; judge by libvirt's words.

Run as root, with the Python of an environment that has ansible-core and libvirt-python: python tests/prove/running.py.
Needs QEMU, libvirt and gcc. Each lab has a libvirt daemon of its own.

The domains run on through all of it, and write: before the run, while it is at a step, and before the next one. At any
moment libvirt tells the size of an increment since each checkpoint. The next run completes what was begun, and the one
after it changes nothing. Then the domains are shut off: each has all that it wrote in its topmost image, and each
bitmap marks all that has changed since its checkpoint.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import typing as t

import domains
import estate
import faults
import kills
import kinds
import lab
import leaving
import libvirt_qemu
import promise
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains

NEXT = "next"  # the snapshot that is taken
SIGN = ".kvmfleet-merging"
CHECKPOINTS = {estate.CHECKPOINT, leaving.LATER}
PATTERN = 13  # that a domain writes
WRITTEN = 64 << 10  # bytes, each time elsewhere
FIRST_WRITE = 40 << 20  # bytes; nothing was written there before


class Wish(t.NamedTuple):
    """What is asked for."""

    state: str
    snapshot: str
    found: str  # the state once it is done


WISHES = {
    kinds.Kind("taken", estate.PAIR.numbers): Wish("present", NEXT, "present"),
    kinds.Kind("merged", estate.PAIR.numbers): Wish(leaving.COMMITTED, estate.SNAPSHOT, "absent"),
}


class Ground(leaving.Ground):
    """A lab whose domains run, on a snapshot."""

    known_kinds = estate.WITH_PAIR
    wish: Wish

    def use(self, kind: kinds.Kind) -> None:
        """Have these domains, and ask this of them."""
        self.wish = WISHES.get(kind, next(iter(WISHES.values())))
        estate.Estate.use(self, estate.PAIR)
        self.kind = estate.PAIR

    def lay_out(self) -> None:
        """Have the domains run, and have written."""
        super().lay_out()
        self._writes: dict[str, list[int]] = {name: [] for name in self.numbers}
        for disk in self.disks:
            kept = self.scenery.disks[disk.number].now
            lab.quietly(["cp", "--sparse=always", str(kept), str(self.now(disk))])
        for name in self.numbers:
            said = self.daemon.start_domain(name)
            assert not said, said
        self.write()

    def write(self) -> None:
        """Have each domain that runs write to all its disks."""
        for name in filter(self.is_running, self.numbers):
            start = FIRST_WRITE + len(self._writes[name]) * WRITTEN
            self._writes[name].append(start)
            for place, disk in enumerate(self.disks_of(name)):
                device = f"/machine/peripheral/virtio-disk{place}/virtio-backend"
                words = f'qemu-io -d {device} "write -P {PATTERN} {start} {WRITTEN}"'
                hmp = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
                said = libvirt_qemu.qemuMonitorCommand(self.domain(name), words, hmp)
                assert "error" not in said.lower(), said
                with self.now(disk).open("r+b") as raw:
                    raw.seek(start)
                    raw.write(bytes([PATTERN]) * WRITTEN)

    def is_running(self, name: str) -> bool:
        """Whether a domain runs."""
        return bool(self.domain(name).isActive())

    def now(self, disk: kinds.Disk) -> pathlib.Path:
        """Return the raw image of what a disk is to hold now."""
        return self.papers / f"now{disk.number}"

    def changed(self, name: str, disk: kinds.Disk) -> dict[str, chains.Bits]:
        """Return what has changed on a disk of a domain, by checkpoint."""
        bits = self.scenery.disks[disk.number].changed_now
        written = sum(((1 << WRITTEN // 512) - 1) << start // 512 for start in self._writes[name])
        return {checkpoint: one | written for checkpoint, one in bits.items()}

    def after(self, disk: kinds.Disk) -> pathlib.Path:
        """Return the image that the disk is to be on."""
        if self.wish.snapshot == NEXT:
            return disk.target.with_name(disk.target.name.replace(f".{estate.SNAPSHOT}.", f".{NEXT}."))
        return disk.active

    def sources(self, name: str) -> list[pathlib.Path]:
        """Return the images of a domain: those that it runs on, or else those of its definition."""
        return list(map(pathlib.Path, domains.sources(self.domain(name).XMLDesc(0))))


class RanOn(estate.OfDomains[Ground]):
    """Each domain runs on, with all its checkpoints, on old or new images; and the next run completes it."""

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, which takes domains as a whole."""
        ground = self._ground
        place = {"directory": str(ground.folder), "uri": ground.daemon.uri, "running": "live", "timeout": 20}
        what = {"name": list(ground.numbers), "state": ground.wish.state, "snapshot": ground.wish.snapshot}
        return {**what, **place, **options}

    def undone(self, name: str) -> list[str]:
        """Return what is left to do for a domain."""
        ground = self._ground
        wanted = [ground.after(disk) for disk in ground.disks_of(name)]
        undone = [] if ground.sources(name) == wanted else [f"{name} is on {ground.sources(name)}"]
        defined = domains.sources(estate.definition_of(ground.domain(name)))
        undone += [] if defined == [str(path) for path in wanted] else [f"{name} is defined on {defined}"]
        if ground.wish.state == leaving.COMMITTED:
            undone += [f"{disk.target.name} is left" for disk in ground.disks_of(name) if disk.target.exists()]
            undone += [f"{sign.name} is left" for sign in ground.folder.glob(f".{name}.*{SIGN}")]
        return undone

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        return f"{sum(self.done())} of {len(self._ground.numbers)} domains done"

    def images_wrong(self) -> list[str]:
        """Return what is wrong with domains and images, whatever the run was to do."""
        ground = self._ground
        wrong = [problem for name in ground.numbers for problem in self._domain_wrong(name)]
        known = {path.name for disk in ground.disks for path in (disk.active, disk.target, ground.after(disk))}
        # An overlay that libvirt alone has merged down, since nobody knows what became of it meanwhile.
        known |= {f"{disk.target.name}.{leaving.COMMITTED}" for disk in ground.disks}
        folders = (ground.folder, ground.actives_folder)
        known |= {path.name for folder in folders for path in folder.glob(f"*{SIGN}")}
        return wrong + [problem for folder in folders for problem in promise.names_wrong(folder, known)]

    def _domain_wrong(self, name: str) -> list[str]:
        ground, domain = self._ground, self._ground.domain(name)
        names = {checkpoint.getName() for checkpoint in domain.listAllCheckpoints()}
        wrong = [] if names == CHECKPOINTS else [f"{name} has the checkpoints {names}"]
        for path, disk in zip(ground.sources(name), ground.disks_of(name)):
            if path not in (disk.target, ground.after(disk)) or not path.exists():
                wrong.append(f"{name} is on {path}")
            elif not ground.is_running(name):
                wrong += self._disk_wrong(name, disk, path)
        targets = [f"vd{'abc'[place]}" for place, _disk in enumerate(ground.disks_of(name))]
        if ground.is_running(name) and not any(map(domain.blockJobInfo, targets)):
            wrong += [f"{name}: {one} is broken" for one in CHECKPOINTS if not ground.daemon.size_told(name, one)]
        return wrong

    def _disk_wrong(self, name: str, disk: kinds.Disk, path: pathlib.Path) -> list[str]:
        """Return what is wrong with the images of a disk that nobody has open."""
        usable = {**dict.fromkeys(CHECKPOINTS, 0), **chains.usable(path)}
        wrong = leaving._unlike(path, "qcow2", self._ground.now(disk))
        changed = self._ground.changed(name, disk)
        wrong += [f"{path.name}: {one} lacks changes" for one, bits in changed.items() if bits & ~usable.get(one, -1)]
        images = [one for one in (disk.active, disk.target, self._ground.after(disk)) if one.exists()]
        wrong += [f"{one.name} is locked" for one in images if lab.is_locked(one)]
        return wrong + [damage for one in images for damage in [chains.damage(one)] if damage]

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with the next run, before which the domains write, and with one more."""
        self._ground.write()
        return super().rerun_wrong()

    def third_wrong(self, third: runs.Run) -> list[str]:
        """Return what is wrong with what a third run says, and once the domains have written again and are shut off."""
        ground = self._ground
        states = {domain["state"] for domain in third.domains}
        wrong = [] if states == {ground.wish.found} else [f"third run: {states}: {third.message}"]
        ground.write()
        for name in filter(ground.is_running, ground.numbers):
            ground.domain(name).destroy()
        return wrong + [f"in the end: {problem}" for problem in self.images_wrong()]

    def vm_wrong(self, _run: runs.Run, _runs_on: bool, _too_early: bool) -> list[str]:
        """Return what is wrong after a run in which a domain came or went."""
        return self.images_wrong()


def meanwhile(ground: Ground, number: int, happens: t.Callable[[Ground], None]) -> rounds.Finding:
    """Let something happen while the module is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    happens(ground)
    return faults.judge(ground, ground.runner.resume())


def daemon_restarts(ground: Ground) -> None:
    """Kill libvirt's daemon, and start it again."""
    ground.daemon.kill()
    ground.daemon.start()


def shut_off(ground: Ground) -> None:
    """Shut a domain off."""
    ground.domain(max(ground.numbers)).destroy()


AT_STEPS: dict[str, tuple[str, domains.Play]] = {
    "the domains write at a step": ("write", functools.partial(meanwhile, happens=Ground.write)),
    "libvirt's daemon restarts at a step": ("daemon", functools.partial(meanwhile, happens=daemon_restarts)),
    "a domain is shut off at a step": ("off", functools.partial(meanwhile, happens=shut_off)),
    "second run at a step": ("second", leaving.second_run),
}


def around(ground: Ground, kind: kinds.Kind) -> list[rounds.Job[Ground]]:
    """Return the rounds in which something happens around a run."""
    ground.use(kind)
    steps = sum(ground.calls()["module"].values())
    return [
        rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{word}-step-{n}", functools.partial(play, number=n), kind)
        for series, (word, play) in AT_STEPS.items()
        for n in range(1, steps + 1)
    ]


def jobs_for(crew: rounds.Crew[Ground], asked: rounds.Choice) -> list[rounds.Job[Ground]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs: list[rounds.Job[Ground]] = []
    for kind in WISHES:
        if asked.only is not None and not asked.only.startswith((f"{kind.name}-", "*")):
            continue  # to count the calls of a kind takes its time
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += around(ground, kind)
        jobs += faults.injected(ground, kind)
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Ground, make_promise=RanOn)))
