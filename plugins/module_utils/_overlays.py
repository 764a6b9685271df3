# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read, decide, act, publish: the four rooms put together, for every module that makes overlays."""

from __future__ import annotations

import contextlib
import os
import typing as t

from . import _build, _locks, _plan
from ._chain import identity_of
from ._errors import Qcow2Error
from ._image import Image, open_image, read_image
from ._observe import Target, observe_active, observe_target
from ._plan import CREATED, FAILED, Verdict, Wanted
from ._publish import Ownership, StagedFile, dress, find_leftovers, publish_together
from ._qmp import Monitor, find_qemu


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


def make_overlays(wanted: t.Sequence[Wanted], settings: Settings) -> Outcome:
    """Make what is missing, VM by VM; in check mode only find out what a run would do."""
    targets = [observe_target(item.path) for item in wanted]
    verdicts = _first_look(wanted, targets)
    groups = _groups(wanted)
    free: dict[int, int] = {}
    for group in groups:
        _store(verdicts, group, _plan.all_or_none([verdicts[i] for i in group]))
        some = _plan.within_space([verdicts[i] for i in group], [targets[i] for i in group], free)
        _store(verdicts, group, some)
    leftovers = _leftovers(targets, settings)
    engine = _Engine(settings)
    try:
        for group in groups:
            if any(verdicts[i].state == CREATED for i in group):
                _store(verdicts, group, _make_group([verdicts[i] for i in group], engine, settings))
    finally:
        engine.stop()
    warnings = [warning for verdict in verdicts for warning in verdict.warnings]
    return Outcome(verdicts, list(dict.fromkeys(leftovers + warnings)))


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


def _first_look(wanted: t.Sequence[Wanted], targets: t.Sequence[Target]) -> list[Verdict]:
    """Return what each overlay would become, judged without any lock."""
    actives = [os.path.realpath(item.backing_file) for item in wanted]
    repeated = _plan.repeated_problems([target.path for target in targets], actives)
    return [_judge(*each) for each in zip(wanted, targets, repeated)]


def _judge(wanted: Wanted, target: Target, repeated: str | None) -> Verdict:
    """Return what the overlay would become."""
    verdict = Verdict(wanted, FAILED)
    problems = _plan.request_problems(wanted) or ([repeated] if repeated else [])
    if problems:
        return verdict._replace(problems=tuple(problems))
    try:
        fd = open_image(wanted.backing_file)
    except Qcow2Error as exc:
        return verdict.failed(str(exc))
    try:
        return _judge_open(fd, wanted, target)
    finally:
        os.close(fd)


def _judge_open(fd: int, wanted: Wanted, target: Target) -> Verdict:
    """Return what the overlay on the open ACTIVE would become."""
    try:
        active = observe_active(fd, wanted.backing_file, wanted.backing_format)
    except Qcow2Error as exc:
        return Verdict(wanted, FAILED).failed(str(exc))
    return _plan.decide(wanted, active, target)


def _make_group(verdicts: list[Verdict], engine: _Engine, settings: Settings) -> list[Verdict]:
    """Make the missing overlays of one VM, all or none, while every ACTIVE is locked."""
    with contextlib.ExitStack() as held:
        guards = _Guards(held, settings)
        staged: list[StagedFile] = []
        for index, verdict in enumerate(verdicts):
            if verdict.state != CREATED:
                continue
            try:
                verdicts[index] = _make_one(verdict, guards, engine, settings, held, staged)
            except (Qcow2Error, OSError) as exc:
                verdicts[index] = _failed(verdict, exc)
            if verdicts[index].state == FAILED:
                engine.stop()
                return _plan.all_or_none(verdicts)
        try:
            guards.check()
            publish_together(staged)
        except (Qcow2Error, OSError) as exc:
            return [_failed(verdict, exc) if verdict.state == CREATED else verdict for verdict in verdicts]
    return verdicts


def _make_one(
    verdict: Verdict,
    guards: _Guards,
    engine: _Engine,
    settings: Settings,
    held: contextlib.ExitStack,
    staged: list[StagedFile],
) -> Verdict:
    """Judge one overlay again, now under the lock of its ACTIVE, and build it if it is still missing."""
    wanted = verdict.wanted
    active_fd = guards.lock(wanted.backing_file)
    target = observe_target(wanted.path)
    active = observe_active(active_fd, wanted.backing_file, wanted.backing_format)
    verdict = _plan.decide(wanted, active, target)
    if verdict.state != CREATED:
        return verdict
    monitor = engine.monitor()
    if active.image is not None:
        guards.tighten(active_fd, wanted.backing_file, active.image)
        _build.cross_check(monitor, active_fd, wanted.backing_file, active.image)
    if not settings.check_mode:
        file = held.enter_context(StagedFile(target))
        backing_file = _plan.recorded_backing_file(wanted, active, target)
        _build.fill(monitor, file.fd, verdict, backing_file)
        dress(file.fd, active_fd, settings.ownership, wanted.path)
        os.fsync(file.fd)
        _read_back(file, verdict, backing_file, monitor)
        staged.append(file)
    return verdict


class _Guards:
    """The locks on every ACTIVE of one VM, each taken once and held until the overlays are published."""

    def __init__(self, held: contextlib.ExitStack, settings: Settings) -> None:
        self._held = held
        self._settings = settings
        self._fds: dict[tuple[int, int], int] = {}
        self._paths: dict[str, tuple[int, int]] = {}

    def lock(self, path: str) -> int:
        """Return the descriptor through which this ACTIVE is locked against writers and against other runs."""
        fd = open_image(path)
        self._held.callback(os.close, fd)
        if self._settings.check_mode:  # no lock, or a VM that starts just now would fail because of a mere question
            return fd
        identity = identity_of(os.fstat(fd))
        self._paths[path] = identity
        if identity not in self._fds:
            _locks.take_turn(fd, path, self._settings.seconds)
            _locks.hold_off_writers(fd, path)
            self._fds[identity] = fd
        return self._fds[identity]

    def tighten(self, fd: int, path: str, image: Image) -> None:
        """Lock an ACTIVE that has recording bitmaps, so is no template, also against VMs that read it."""
        if any(bitmap.recording for bitmap in image.bitmaps) and not self._settings.check_mode:
            _locks.hold_off_everybody(fd, path)

    def check(self) -> None:
        """Raise when the name of an ACTIVE has become another file's since it was locked."""
        for path, identity in self._paths.items():
            if identity_of(os.stat(path)) != identity:
                raise Qcow2Error(f"{path}: was replaced by another file while the overlay was being made. Run again.")


def _read_back(file: StagedFile, verdict: Verdict, backing_file: str, monitor: Monitor) -> None:
    """Raise when the finished overlay is not what it was to be: no exit code tells that bitmaps were lost."""
    wrong = _plan.verify(verdict, backing_file, read_image(file.fd, file.target.path))
    if wrong:
        words = monitor.stderr()
        raise Qcow2Error(
            f"{file.target.path}: was not made as it should be and is not published: {'; '.join(wrong)}."
            + (f" QEMU says: {words}" if words else "")
        )


def _failed(verdict: Verdict, exc: Exception) -> Verdict:
    """Return the verdict failed by an exception that is expected."""
    if isinstance(exc, OSError):
        return verdict.failed(f"{verdict.wanted.path}: cannot be made: {exc.strerror}. Nothing was left behind.")
    message = str(exc)
    return verdict.failed(message if message.startswith("/") else f"{verdict.wanted.path}: {message}")


def _leftovers(targets: t.Sequence[Target], settings: Settings) -> list[str]:
    """Remove what killed runs have left in the folders of this call; return a warning for each."""
    folders = dict.fromkeys(target.folder for target in targets if target.problem is None)
    return [
        f"{path}: is left over from a run that was killed; it is removed."
        for folder in folders
        for path in find_leftovers(folder, remove=not settings.check_mode)
    ]


def _as_diff(verdict: Verdict) -> dict[str, t.Any]:
    """Return a new overlay in the form in which the diff shows it."""
    return {
        "backing_file": verdict.wanted.backing_file,
        "backing_format": verdict.wanted.backing_format,
        "virtual_size": verdict.virtual_size,
        "bitmaps": {bitmap.name: bitmap.granularity for bitmap in verdict.bitmaps},
    }
