# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read, decide, act, publish: the four rooms put together, for every module that makes overlays."""

from __future__ import annotations

import contextlib
import os
import resource
import typing as t

from .._base.errors import CHECK_STORAGE, Qcow2Error, QemuError, advice, in_use, printable
from .._base.signals import Interrupted, interruptible
from .._qcow2.chain import identity_of
from .._qcow2.header import close_image, open_image, read_image
from .._qemu import locks as _locks
from .._qemu.monitor import Monitor, find_qemu
from . import build as _build
from . import overlay as _plan
from .observe import Active, Target, is_written, observe_active, observe_target
from .overlay import CREATED, FAILED, PRESENT, Verdict, Wanted
from .publish import Attire, Ownership, StagedFile, choose_attire, dress, find_leftovers, publish_together


class Machine(t.NamedTuple):
    """What is known of a VM beside its overlays."""

    finish: t.Callable[[], None]  # what must succeed for its overlays to stay
    first_image: str | None = None  # path of what it opens first for writing when it starts


Machines = t.Mapping[str, Machine]  # by the name of the VM


class Settings(t.NamedTuple):
    """What holds for all overlays of one call."""

    check_mode: bool
    seconds: float  # that QEMU may take for one step, before the size of the step is added
    find_program: t.Callable[[str], str | None]
    ownership: Ownership


class Outcome(t.NamedTuple):
    """What became of all overlays of one call, in the order in which they were asked for."""

    verdicts: list[Verdict]
    warnings: list[str]

    @property
    def failures(self) -> list[str]:
        """Why overlays failed, each reason once."""
        return list(dict.fromkeys(verdict.message for verdict in self.verdicts if verdict.state == FAILED))

    def as_result(self) -> dict[str, t.Any]:
        """Return the result of a module, but for the message of a failure."""
        created = [verdict for verdict in self.verdicts if verdict.state == CREATED]
        return {
            "changed": bool(created),
            "overlays": [verdict.as_result() for verdict in self.verdicts],
            "diff": {
                "before": {verdict.wanted.path: None for verdict in created},
                "after": {verdict.wanted.path: _as_diff(verdict) for verdict in created},
            },
        }


class _Engine:
    """The QEMU process of this call, started when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._monitor: Monitor | None = None

    def monitor(self) -> Monitor:
        """Return the running process."""
        if self._monitor is None:
            self._monitor = Monitor(find_qemu(self._settings.find_program), self._settings.seconds)
        return self._monitor

    def stop(self) -> None:
        """End the process; the next VM gets a new one. After a failure nothing of the old one is to be trusted."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = None


def make_overlays(wanted: t.Sequence[Wanted], settings: Settings, machines: Machines | None = None) -> Outcome:
    """Make what is missing, VM by VM; in check mode only find out what a run would do.

    A machine is finished once all its overlays are there, the new and the old ones, while no VM can start on any image.
    If that raises, the new ones are removed again.
    """
    machines = machines or {}
    _allow_many_open_files()
    warnings = _leftovers(wanted, settings)
    groups = _groups(wanted)
    verdicts = _first_look(wanted, groups)
    engine = _Engine(settings)
    to_do = [
        group
        for group in groups
        if any(_is_pending(verdicts[index], machines) for index in group)
        and all(verdicts[index].state != FAILED for index in group)
    ]
    done = 0
    try:
        for group in to_do:
            with interruptible():
                pass  # a signal that has been waiting ends the run here
            with contextlib.ExitStack() as held:
                some = _make_group([verdicts[index] for index in group], engine, settings, machines, held)
                _store(verdicts, group, some)
                done += 1
    except Interrupted as exc:
        for index in (index for group in to_do[done:] for index in group):
            verdicts[index] = _interrupted(verdicts[index], exc)
    finally:
        engine.stop()
    warnings += [printable(warning) for verdict in verdicts for warning in verdict.warnings]
    return Outcome(verdicts, list(dict.fromkeys(warnings)))


def _allow_many_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each overlay of a VM takes three while it is made."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leftovers(wanted: t.Sequence[Wanted], settings: Settings) -> list[str]:
    """Remove what killed runs have left in the folders of this call; return a warning for each."""
    usable = [item for item in wanted if not _plan.request_problems(item)]
    folders = dict.fromkeys(os.path.dirname(item.path) for item in usable)
    return [
        printable(f"{path}: is left over from a run that was killed. It is of no use; a run removes it.")
        for folder in folders
        for path in find_leftovers(folder, remove=not settings.check_mode)
    ]


def _groups(wanted: t.Sequence[Wanted]) -> list[list[int]]:
    """Return the positions of the overlays that belong together, VM by VM."""
    groups: dict[str | None, list[int]] = {}
    for index, item in enumerate(wanted):
        groups.setdefault(item.vm, []).append(index)
    return list(groups.values())


def _store(verdicts: list[Verdict], group: t.Sequence[int], some: t.Sequence[Verdict]) -> None:
    """Put the verdicts of one group back to their positions."""
    for index, verdict in zip(group, some):
        verdicts[index] = verdict


def _first_look(wanted: t.Sequence[Wanted], groups: list[list[int]]) -> list[Verdict]:
    """Return what each overlay would become, judged without any lock."""
    verdicts = [Verdict(item, CREATED).with_problems(_plan.request_problems(item)) for item in wanted]
    sound = [index for index, verdict in enumerate(verdicts) if verdict.state != FAILED]
    targets = {index: observe_target(wanted[index].path) for index in sound}
    actives = [os.path.realpath(wanted[index].backing_file) for index in sound]
    repeated = _plan.repeated_problems([targets[index].path for index in sound], actives)
    for index, problem in zip(sound, repeated):
        verdicts[index] = verdicts[index].failed(problem) if problem else _judge(wanted[index], targets[index])
    free: dict[int, int] = {}
    for group in groups:
        some = _plan.all_or_none([verdicts[index] for index in group])
        if all(index in targets for index in group):
            some = _plan.within_space(some, [targets[index] for index in group], free)
        _store(verdicts, group, some)
    return verdicts


def _judge(wanted: Wanted, target: Target) -> Verdict:
    """Return what the overlay would become."""
    try:
        fd = open_image(wanted.backing_file)
        try:
            return _plan.decide(wanted, _observe(fd, wanted), target)
        finally:
            os.close(fd)
    except (Qcow2Error, OSError) as exc:
        return _failed(Verdict(wanted, CREATED), exc)


def _observe(fd: int, wanted: Wanted) -> Active:
    """Return what the open ACTIVE of an overlay is."""
    return observe_active(fd, wanted.backing_file, wanted.backing_format, wanted.relative)


def _is_pending(verdict: Verdict, machines: Machines) -> bool:
    """Whether there is something to be done for the overlay, or for its VM now that the overlay is there."""
    return verdict.state == CREATED or (verdict.state == PRESENT and verdict.wanted.vm in machines)


def _make_group(
    verdicts: list[Verdict], engine: _Engine, settings: Settings, machines: Machines, held: contextlib.ExitStack
) -> list[Verdict]:
    """Make the missing overlays of one VM and finish it, all or none, while every ACTIVE is locked by held."""
    work = _Work(held, engine, settings)
    machine = machines.get(verdicts[0].wanted.vm or "")
    try:
        needed = {verdict.wanted.backing_file for verdict in verdicts if _is_pending(verdict, machines)}
        work.lock(_opened_by_vm(verdicts, machine), needed)
    except (Qcow2Error, OSError) as exc:
        return _all_failed(verdicts, machines, exc)
    for step in (work.judge, work.build):
        for index, verdict in enumerate(verdicts):
            if _is_pending(verdict, machines):
                verdicts[index] = _attempt(step, verdict)
            if verdicts[index].state == FAILED:
                engine.stop()
                return _plan.all_or_none(verdicts)
    try:
        work.publish(machine.finish if machine else None)
    except (Qcow2Error, OSError) as exc:
        return _all_failed(verdicts, machines, exc)
    return verdicts


def _all_failed(verdicts: t.Sequence[Verdict], machines: Machines, exc: Exception) -> list[Verdict]:
    """Return the verdicts of a VM, those that are pending failed by an exception that is expected."""
    return [_failed(verdict, exc) if _is_pending(verdict, machines) else verdict for verdict in verdicts]


def _attempt(step: t.Callable[[Verdict], Verdict], verdict: Verdict) -> Verdict:
    """Return what becomes of an overlay in this step."""
    try:
        return step(verdict)
    except (Qcow2Error, OSError) as exc:
        return _failed(verdict, exc)


def _opened_by_vm(verdicts: t.Sequence[Verdict], machine: Machine | None) -> list[str]:
    """Return the images that the VM opens for writing when it starts, in that order, as far as they are known."""
    images = [machine.first_image] if machine and machine.first_image else []
    for verdict in verdicts:
        if verdict.state == PRESENT and verdict.wanted.vm is None:  # it may be the disk of any VM
            continue
        if verdict.state == PRESENT:  # its VM may be on it, or not yet
            images.append(verdict.wanted.path)
        images.append(verdict.wanted.backing_file)
    return list(dict.fromkeys(images))


def _open_to_lock(path: str) -> int | None:
    """Open an image that is not needed but to keep its VM from starting; None when it cannot be locked.

    Raises when it is in use already: then the VM runs, or is just being started.
    """
    try:
        fd = open_image(path)
    except Qcow2Error:  # then the VM cannot start anyhow
        return None
    try:
        used = _locks.is_used(fd, _locks.WRITE, path)
    except Qcow2Error:  # its file system has no locks
        close_image(fd)
        return None
    if used:
        close_image(fd)
        raise in_use(path)
    return fd


class _Site(t.NamedTuple):
    """Where and as what one overlay is to be built, as found out under the lock of its ACTIVE."""

    target: Target
    backing_file: str  # as the overlay records it
    attire: Attire
    active: _build.Witnessed | None  # None if it is raw


class _Work:
    """What is held while the overlays of one VM are made: locked ACTIVEs, then finished files."""

    def __init__(self, held: contextlib.ExitStack, engine: _Engine, settings: Settings) -> None:
        self._held = held
        self._engine = engine
        self._settings = settings
        self._actives: dict[str, int] = {}  # descriptors by path
        self._sites: dict[str, _Site] = {}  # by path
        self._staged: list[StagedFile] = []

    def lock(self, opened_by_vm: t.Sequence[str], needed: t.Collection[str]) -> None:
        """Lock every ACTIVE that is needed, and what else the VM opens, against writers and other runs like this one.

        A VM that is started meanwhile does not start, and must fail at its first disk: a QEMU that ends at its second
        one leaves the bitmaps of the first in use, so inconsistent for good. So all images that the VM opens are locked
        in the order in which it does, and released in the opposite one; and if it was first at one of them, nothing
        behind that one is locked.
        """
        # Path and descriptor by identity, so a file with two names once.
        files: dict[tuple[int, int], tuple[str, int]] = {}
        for path in opened_by_vm:
            fd = open_image(path) if path in needed else _open_to_lock(path)
            if fd is None:
                continue
            self._held.callback(close_image, fd)
            _path, fd = files.setdefault(identity_of(os.fstat(fd)), (path, fd))
            if path in needed:
                self._actives[path] = fd
        if self._settings.check_mode:  # no lock, or a VM that starts just now would fail because of a mere question
            return
        # In an order that all runs share, or two could wait for each other.
        for _identity, (path, fd) in sorted(files.items()):
            _locks.take_turn(fd, path, self._settings.seconds)
        for path, fd in files.values():
            _locks.hold_off_writers(fd, path)

    def judge(self, verdict: Verdict) -> Verdict:
        """Decide again, now that nobody can change ACTIVE."""
        wanted, fd = verdict.wanted, self._actives[verdict.wanted.backing_file]
        active, target = _observe(fd, wanted), observe_target(wanted.path)
        verdict = _plan.decide(wanted, active, target)
        if verdict.state != CREATED:
            return verdict
        if active.image is not None and active.is_recording and not self._settings.check_mode:
            _locks.hold_off_everybody(fd, wanted.backing_file)
        self._sites[wanted.path] = _Site(
            target,
            _plan.recorded_backing_file(wanted, active, target),
            choose_attire(fd, self._settings.ownership, wanted.path),
            _build.Witnessed(fd, wanted.backing_file, active.image) if active.image is not None else None,
        )
        return verdict

    def build(self, verdict: Verdict) -> Verdict:
        """Make a missing overlay in a file of ours, with QEMU as second witness of ACTIVE, and read it back.

        In check mode QEMU is only the witness.
        """
        if verdict.state != CREATED:
            return verdict
        site, monitor = self._sites[verdict.wanted.path], self._engine.monitor()
        if self._settings.check_mode:
            if site.active is not None:
                _build.cross_check(monitor, site.active)
            return verdict
        file = self._held.enter_context(StagedFile(site.target))
        _build.fill(monitor, file.fd, verdict, site.backing_file, site.active)
        dress(file.fd, site.attire, verdict.wanted.path)
        os.fsync(file.fd)
        _read_back(file, verdict, site.backing_file, monitor)
        self._staged.append(file)
        return verdict

    def publish(self, finish: t.Callable[[], None] | None) -> None:
        """Put all files into place and finish, if every ACTIVE still is what it was."""
        for path, fd in self._actives.items():
            try:
                is_same = identity_of(os.stat(path)) == identity_of(os.fstat(fd))
            except OSError:
                is_same = False
            if not is_same:
                raise Qcow2Error(f"{path}: was moved or replaced while the overlay was being made. Run this again.")
            if is_written(fd, path):  # through another node of its device, where our lock does not reach
                raise in_use(path)
        if not self._settings.check_mode:
            publish_together(self._staged, finish)


def _read_back(file: StagedFile, verdict: Verdict, backing_file: str, monitor: Monitor) -> None:
    """Raise when the finished overlay is not what it was to be: no exit code tells that bitmaps were lost."""
    wrong = _plan.verify(verdict, backing_file, read_image(file.fd, file.target.path))
    if wrong:
        words = monitor.stderr()
        raise Qcow2Error(
            f"{file.target.path}: was not made as it should be and is not published: {'; '.join(wrong)}."
            + (f" QEMU says: {words}." if words else "")
            + f" {CHECK_STORAGE}"
        )


def _failed(verdict: Verdict, exc: Exception) -> Verdict:
    """Return the verdict failed by an exception that is expected."""
    if isinstance(exc, OSError):
        return verdict.failed(f"{verdict.wanted.path}: cannot be made: {exc.strerror}. {advice(exc)}")
    return verdict.failed(f"{verdict.wanted.path}: {exc}" if isinstance(exc, QemuError) else str(exc))


def _interrupted(verdict: Verdict, exc: Interrupted) -> Verdict:
    """Return the verdict of an overlay that was not made because the run was told to end."""
    if verdict.state != CREATED:
        return verdict
    return verdict.failed(f"{verdict.wanted.path}: not made, because the run was ended by {exc}. Run this again.")


def _as_diff(verdict: Verdict) -> dict[str, t.Any]:
    """Return a new overlay in the form in which the diff shows it."""
    return {
        "backing_file": verdict.wanted.backing_file,
        "backing_format": verdict.wanted.backing_format,
        "virtual_size": verdict.virtual_size,
        "bitmaps": {bitmap.name: bitmap.granularity for bitmap in verdict.bitmaps},
    }
