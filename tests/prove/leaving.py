# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Have domains leave a snapshot, merged down or given up, and kill domain_overlay on the way; judge by libvirt's words.

Run as root, with the Python of an environment that has ansible-core and libvirt-python: python tests/prove/leaving.py.
Needs QEMU, libvirt and gcc. Each lab has a libvirt daemon of its own.

At any moment a domain's definition is the old or the new one, and the images in it hold what the guest is to have:
what it wrote last, or, once it has gone back, what it had at the snapshot. A bitmap that libvirt would use marks all
that has changed since its checkpoint. The next run completes what was begun, and the one after it changes nothing; then
libvirt has the checkpoints that can be used, and no other.
"""

from __future__ import annotations

import collections
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import typing as t

import domains
import estate
import faults
import kills
import kinds
import lab
import leftover
import libvirt
import promise
import qemu
import rounds
import runs
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import find_vault, place_of
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains

COMMITTED, REVERTED = "committed", "reverted"
# What becomes of which domains.
LEAVING = {
    kinds.Kind(f"{kind.name}, {state}", kind.numbers): (state, kind)
    for state in (COMMITTED, REVERTED)
    for kind in (estate.THREE, estate.TWO)
}
LATER = "later"  # a checkpoint that is made on the snapshot


class Known(t.NamedTuple):
    """What one disk holds, as raw images, and what has changed since its checkpoints."""

    then: pathlib.Path  # at the snapshot
    now: pathlib.Path
    changed_then: dict[str, chains.Bits]  # by checkpoint, until the snapshot
    changed_now: dict[str, chains.Bits]


class Scenery(t.NamedTuple):
    """Domains on a snapshot, as rounds want to find them."""

    kept: pathlib.Path
    before: dict[str, str]  # the definitions without the snapshot
    definitions: dict[str, str]
    checkpoints: dict[str, list[str]]  # of each domain, as XML
    disks: dict[int, Known]  # by number


class Ground(estate.Estate):
    """A lab whose domains are on a snapshot."""

    state = COMMITTED
    has_died = False  # a domain, since the kill, which costs its topmost images their bitmaps

    def use(self, kind: kinds.Kind) -> None:
        """Have the domains of this kind."""
        self.state, domains_kind = LEAVING.get(kind, (COMMITTED, estate.THREE))
        super().use(domains_kind)
        self.kind = domains_kind

    def lay_out(self) -> None:
        """Have the domains on the snapshot, with a checkpoint of before and one of since."""
        known: dict[kinds.Kind, Scenery] = self.__dict__.setdefault("_known", {})
        if self.kind not in known:
            known[self.kind] = self._build()
        self.scenery = known[self.kind]
        for folder in (self.folder, self.actives_folder):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.scenery.kept / folder.name, folder, dirs_exist_ok=True)  # a file system may lie there
        self.begin()

    def _build(self) -> Scenery:
        super().lay_out()
        kept = self.papers / "kept" / self.kind.name
        before = {disk.number: _raw(disk.active, disk.format, kept / f"then{disk.number}") for disk in self.disks}
        arguments = {"name": list(self.numbers), "snapshot": estate.SNAPSHOT, "directory": str(self.folder)}
        self.runner.start("domain_overlay", {**arguments, "uri": self.daemon.uri}, self.environment())
        run = self.runner.ended()
        assert run.status == 0, run
        known = {}
        for disk in self.disks:
            _write(disk.target, "write -P 9 1M 200k", "write -P 9 20M 300k")
            at_later = _raw(disk.target, "qcow2", kept / f"later{disk.number}")
            if disk.format == "qcow2":
                qemu.add_bitmaps(disk.target, [qemu.Bitmap(LATER, 65536, True, False)])
            _write(disk.target, "write -P 10 1M 64k", "write -P 10 30M 200k", "write -z 20M 64k")
            now = _raw(disk.target, "qcow2", kept / f"now{disk.number}")
            then = before[disk.number]
            # The templates' bitmaps are older than all that was written to them.
            until_then, until_now = _allocated(then), _allocated(then) | _differing(then, now)
            known[disk.number] = Known(
                then,
                now,
                dict.fromkeys(disk.bitmaps, until_then),
                {**dict.fromkeys(disk.bitmaps, until_now), LATER: _differing(at_later, now)},
            )
        checkpoints = {}
        for name in self.numbers:
            first = self._checkpoint(name)
            second = first.replace(f"<name>{estate.CHECKPOINT}<", f"<name>{LATER}<", 1)
            # One that is older than the overlay would go on with a bitmap below.
            made = f"<parent><name>{estate.CHECKPOINT}</name></parent><creationTime>{int(time.time())}<"
            second = re.sub("<creationTime>[0-9]+<", made, second, count=1)
            checkpoints[name] = [first, second]
        definitions = {name: estate.definition_of(self.domain(name)) for name in self.numbers}
        for folder in (self.folder, self.actives_folder):
            shutil.copytree(folder, kept / folder.name)
        return Scenery(kept, dict(self._definitions), definitions, checkpoints, known)

    def begin(self) -> None:
        """Have libvirt know the domains as they were in the beginning."""
        self.has_died = False
        self._definitions = dict(self.scenery.before)
        for domain in self.daemon.connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        for name in self.numbers:
            domain = self.daemon.connection.defineXML(self.scenery.definitions[name])
            for checkpoint in self.scenery.checkpoints[name]:
                domain.checkpointCreateXML(checkpoint, libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)

    def leftovers(self) -> list[str]:
        """Return the names of the temporary files."""
        return [name for _folder, _folders, names in os.walk(self.place) for name in filter(leftover.is_one, names)]

    def vault_of(self, disk: kinds.Disk) -> str | None:
        """Return the path of the vault of a disk, if it is there."""
        return find_vault(place_of(str(disk.active), False, str(disk.target)))


def _write(path: pathlib.Path, *words: str) -> None:
    commands = [part for word in words for part in ("-c", word)]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, stdout=subprocess.DEVNULL)


def _raw(path: pathlib.Path, image_format: str, raw: pathlib.Path) -> pathlib.Path:
    """Keep what a guest reads from an image as a raw one."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    lab.quietly(["qemu-img", "convert", "-f", image_format, "-O", "raw", str(path), str(raw)])
    return raw


def _differing(one: pathlib.Path, other: pathlib.Path) -> chains.Bits:
    return chains.changed(one.read_bytes(), other.read_bytes())


def _allocated(raw: pathlib.Path) -> chains.Bits:
    return chains.changed(b"", raw.read_bytes())


class Left(estate.OfDomains[Ground]):
    """Each domain is off the snapshot with all that it promises, or can go on; and the next run completes it."""

    def arguments(self, _disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, which takes domains as a whole."""
        place = {"directory": str(self._ground.folder), "uri": self._ground.daemon.uri}
        what = {"name": list(self._ground.numbers), "snapshot": estate.SNAPSHOT, **place}
        return {**what, "state": self._ground.state, "timeout": 20, **options}

    def done(self) -> list[bool]:
        """Whether nothing is left to do, for each disk."""
        return [not os.path.lexists(d.target) and self._ground.vault_of(d) is None for d in self._ground.disks]

    def done_at(self) -> float:
        """Return when the last overlay went; 0 if one is there."""
        return os.stat(self._ground.folder).st_mtime if all(self.done()) else 0.0

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        off = sum(self._ground.switched(name) is False for name in self._ground.numbers)
        return f"{sum(self.done())} of {len(self._ground.disks)} disks done, {off} domains switched"

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images and definitions, whatever the run was to do."""
        return [
            *(problem for name in self._ground.numbers for problem in self._domain_wrong(name)),
            *self._files_wrong(),
        ]

    def _domain_wrong(self, name: str) -> list[str]:
        ground, wrong = self._ground, []
        is_on, domain = ground.switched(name), ground.domain(name)
        if is_on is None:
            return [f"{name} has another definition: {estate.definition_of(domain)}"]
        for disk in ground.disks_of(name):
            wrong += self._disk_wrong(disk, is_on)
        names = {checkpoint.getName() for checkpoint in domain.listAllCheckpoints()}
        must = {estate.CHECKPOINT} if ground.state == REVERTED and not is_on else {estate.CHECKPOINT, LATER}
        if not must <= names:
            wrong.append(f"{name} has lost checkpoints: {names}")
        return wrong

    def _disk_wrong(self, disk: kinds.Disk, is_on: bool) -> list[str]:
        """Return what is wrong with the image that a domain has now."""
        path, image_format = (disk.target, "qcow2") if is_on else (disk.active, disk.format)
        if not path.exists():
            return [f"{path.name} is in the definition and is not there"]
        known = self._ground.scenery.disks[disk.number]
        is_back = self._ground.state == REVERTED and not is_on
        wrong = _unlike(path, image_format, known.then if is_back else known.now)
        changed = known.changed_then if is_back else known.changed_now
        usable = chains.usable(path) if image_format == "qcow2" else {}
        wrong += [f"{path.name}: {n} lacks changes" for n, bits in changed.items() if bits & ~usable.get(n, -1)]
        return wrong

    def _files_wrong(self) -> list[str]:
        ground, wrong = self._ground, []
        known = {path.name for disk in ground.disks for path in (disk.active, disk.target)}
        known |= {os.path.basename(vault) for disk in ground.disks if (vault := ground.vault_of(disk))}
        known |= {f"{disk.target.name}.{REVERTED}" for disk in ground.disks}
        for folder in (ground.folder, ground.actives_folder):
            wrong += [*promise.locks_wrong(folder), *promise.names_wrong(folder, known)]
        return wrong + [
            damage
            for disk in ground.disks
            for path in (disk.active, disk.target)
            if path.exists() and (path == disk.target or disk.format == "qcow2")
            for damage in [chains.damage(path)]
            if damage
        ]

    def said_wrong(self, name: str, state: str) -> list[str]:
        """Return what is not as it is said to be of a domain that has not failed."""
        wrong = [] if state in (self._ground.state, "absent") else ["it is not asked for"]
        return wrong + self.undone(name)

    def undone(self, name: str) -> list[str]:
        """Return what is not done for a domain that is said to be done."""
        ground, wrong = self._ground, []
        if ground.switched(name) is not False:
            wrong.append(f"{name} was not switched")
        done = {disk.number: is_done for disk, is_done in zip(ground.disks, self.done())}
        wrong += [f"{disk.target.name} is left" for disk in ground.disks_of(name) if not done[disk.number]]
        names = sorted(checkpoint.getName() for checkpoint in ground.domain(name).listAllCheckpoints())
        # Of a domain whose disks are all raw, no overlay has a bitmap, nor has what is below.
        expected = (
            [estate.CHECKPOINT] if ground.state == REVERTED and self._has_bitmaps(name) else [LATER, estate.CHECKPOINT]
        )
        if names != expected:
            wrong.append(f"{name} has the checkpoints {names}, not {expected}")
        if ground.state == REVERTED:
            wrong += [problem for disk in ground.disks_of(name) for problem in self._kept_wrong(disk)]
        elif not ground.has_died:
            wrong += [
                f"{disk.active.name}: {missing} cannot be used"
                for disk in ground.disks_of(name)
                if disk.format == "qcow2"
                for missing in {estate.CHECKPOINT, LATER} - chains.usable(disk.active).keys()
            ]
        return wrong

    def _has_bitmaps(self, name: str) -> bool:
        return any(disk.format == "qcow2" for disk in self._ground.disks_of(name))

    def _kept_wrong(self, disk: kinds.Disk) -> list[str]:
        """Return what is wrong with an overlay that was kept aside."""
        kept = disk.target.with_name(f"{disk.target.name}.{REVERTED}")
        if not kept.exists():
            return [f"{kept.name} is not there"]
        return _unlike(kept, "qcow2", self._ground.scenery.disks[disk.number].now)

    def third_wrong(self, third: runs.Run) -> list[str]:
        """Return what else is wrong with what a third run says."""
        states = {domain["state"] for domain in third.domains}
        return [] if states == {"absent"} else [f"third run: {states}: {third.message}"]

    def raced_wrong(
        self, _rival: promise.Rival, _theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, stopped: bool
    ) -> list[str]:
        """Return what is wrong with what two runs have done: one does it, the other waits for it, or says so."""
        wrong = self.images_wrong()
        for name in self._ground.numbers:
            states = [run.domain(name).get("state") for run in (first, second)]
            if states.count(self._ground.state) > 1 or not (stopped or self._ground.state in states):
                wrong.append(f"{name}: {states}: {first.message} / {second.message}")
        return wrong

    def vm_wrong(self, run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a domain came; too_early, it runs on the snapshot."""
        wrong = (
            ["the domain runs on the snapshot, and the run says that it left it"]
            if too_early and not run.status
            else []
        )
        return wrong if runs_on else wrong + self.images_wrong()


def _unlike(path: pathlib.Path, image_format: str, raw: pathlib.Path) -> list[str]:
    """Return that a guest does not read from an image what a raw one holds."""
    command = ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(path), str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [f"{path.name} is not {raw.name}: {done.stdout}{done.stderr}"]


def started_at_step(ground: Ground, number: int) -> rounds.Finding:
    """Start a domain while the module is at a step, and shut it off when the run has ended."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    name = sorted(ground.numbers)[-1]
    said = ground.daemon.start_domain(name)
    runs_on = [] if said else domains.sources(ground.domain(name).XMLDesc(0))
    run = ground.runner.resume()
    wrong = [] if not said or "lock" in said else [f"{name} does not start: {said}"]
    is_early = set(runs_on) == {str(disk.target) for disk in ground.disks_of(name)}
    if runs_on:
        wrong += [f"{path} is gone, and {name} runs on it" for path in runs_on if not os.path.exists(path)]
        is_said = run.domain(name).get("state") in (ground.state, "absent")
        wrong += [f"{name} runs on the snapshot, and is said to have left it"] if is_early and is_said else []
        ground.domain(name).destroy()
    wrong += [*ground.promise.vm_wrong(run, False, False), *faults.message_wrong(ground, run)]
    outcome = f"{'starts' if not said else 'does not start'}, {run.domain(name).get('state')}"
    return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), faults.told(ground, run))


def second_run(ground: Ground, number: int) -> rounds.Finding:
    """Let a second run come while the first one is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    ground.second.start(ground.promise.module, ground.promise.arguments(timeout=1), ground.environment())
    second = ground.second.ended()
    first = ground.runner.resume()
    rival = promise.Rival("the same", kinds.ONE, list, (0, 1), "absent")
    wrong = ground.promise.raced_wrong(rival, ground.disks, first, second, True)
    for run in (first, second):
        wrong += faults.message_wrong(ground, run)
    outcome = " and ".join(f"{run.domain(sorted(ground.numbers)[-1]).get('state')}" for run in (first, second))
    messages = faults.told(ground, first) + faults.told(ground, second)
    return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), messages)


def then_dies(ground: Ground, rule: str) -> rounds.Finding:
    """Kill a run and its QEMU at a step; start the domain and kill it; have the next run complete it."""
    run = ground.run(rule)
    outcome = ground.promise.outcome()
    wrong = [f"after the kill: {problem}" for problem in ground.promise.images_wrong()]
    name = sorted(ground.numbers)[0]
    said = ground.daemon.start_domain(name)
    if said:
        wrong.append(f"{name} does not start: {said}")
    else:
        ground.has_died = True
        os.kill(ground.daemon.pid_of(name), signal.SIGKILL)
        while ground.domain(name).isActive():
            time.sleep(0.01)
    wrong += [f"after {name} died: {problem}" for problem in ground.promise.images_wrong()]
    return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), (run.message,) if run.message else ())


AT_STEPS: dict[str, tuple[str, domains.Play]] = {
    "libvirt's daemon dies at a step": ("daemon", domains.daemon_dies),
    "domain is started at a step": ("start", started_at_step),
    "second run at a step": ("second", second_run),
}


def around(ground: Ground, kind: kinds.Kind) -> list[rounds.Job[Ground]]:
    """Return the rounds in which something happens around a run, or between it and the next one."""
    ground.use(kind)
    calls = ground.calls()
    jobs = [
        rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{word}-step-{n}", functools.partial(play, number=n), kind)
        for series, (word, play) in AT_STEPS.items()
        for n in range(1, sum(calls["module"].values()) + 1)
    ]
    return jobs + dying(kind, calls)


def dying(kind: kinds.Kind, calls: dict[str, collections.Counter[str]]) -> list[rounds.Job[Ground]]:
    """Return the rounds in which a run is killed, and then a domain."""
    jobs = []
    for who in ("module", "qemu"):
        for call, number in kills.steps(calls, who, False):
            if call not in faults.DIALOGUE and call != "setlk":
                rule = f"{who}:{call}:{number}:group"
                play = functools.partial(then_dies, rule=rule)
                series = f"{kind.name}: killed, then a domain runs and dies"
                jobs.append(rounds.Job(series, f"{kind.name}-{rule}-dies", play, kind))
    return jobs


def jobs_for(crew: rounds.Crew[Ground], asked: rounds.Choice) -> list[rounds.Job[Ground]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs: list[rounds.Job[Ground]] = []
    for kind in LEAVING:
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += around(ground, kind)
    # Errors of the images' own calls are met in commits.py, too; here libvirt comes after them.
    jobs += [job for kind in list(LEAVING)[1::2] for job in faults.injected(ground, kind)]
    return rounds.sampled(list(map(rounds.of_all_kinds, jobs)), asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(Ground, make_promise=Left)))
