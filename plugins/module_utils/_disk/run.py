# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All VMs of a call: first look, groups, interruption, outcome."""

from __future__ import annotations

import contextlib
import os
import resource
import typing as t

from .._base.errors import Qcow2Error, printable
from .._base.files import open_image
from .._base.signals import Interrupted, interruptible
from .observe import Target, observe_target
from .overlay import decide, repeated_problems, request_problems
from .publish import find_leftovers
from .session import Engine, Session, Settings, Vm, Vms, failed_by, observe
from .verdict import CREATED, FAILED, PRESENT, OverlayRequest, Verdict, all_or_none, within_space


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


def make_overlays(wanted: t.Sequence[OverlayRequest], settings: Settings, machines: Vms | None = None) -> Outcome:
    """Make what is missing, VM by VM; in check mode only find out what a run would do.

    A machine is finished once all its overlays are there, the new and the old ones, while no VM can start on any image.
    If that raises, the new ones are removed again.
    """
    machines = machines or {}
    _allow_many_open_files()
    warnings = _leftovers(wanted, settings)
    groups = _groups(wanted)
    verdicts = _first_look(wanted, groups)
    engine = Engine(settings)
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


def _leftovers(wanted: t.Sequence[OverlayRequest], settings: Settings) -> list[str]:
    """Remove what killed runs have left in the folders of this call; return a warning for each."""
    usable = [item for item in wanted if not request_problems(item)]
    folders = dict.fromkeys(os.path.dirname(item.path) for item in usable)
    return [
        printable(f"{path}: is left over from a run that was killed. It is of no use; a run removes it.")
        for folder in folders
        for path in find_leftovers(folder, remove=not settings.check_mode)
    ]


def _groups(wanted: t.Sequence[OverlayRequest]) -> list[list[int]]:
    """Return the positions of the overlays that belong together, VM by VM."""
    groups: dict[str | None, list[int]] = {}
    for index, item in enumerate(wanted):
        groups.setdefault(item.vm, []).append(index)
    return list(groups.values())


def _store(verdicts: list[Verdict], group: t.Sequence[int], some: t.Sequence[Verdict]) -> None:
    """Put the verdicts of one group back to their positions."""
    for index, verdict in zip(group, some):
        verdicts[index] = verdict


def _first_look(wanted: t.Sequence[OverlayRequest], groups: list[list[int]]) -> list[Verdict]:
    """Return what each overlay would become, judged without any lock."""
    verdicts = [Verdict(item, CREATED).with_problems(request_problems(item)) for item in wanted]
    sound = [index for index, verdict in enumerate(verdicts) if verdict.state != FAILED]
    targets = {index: observe_target(wanted[index].path) for index in sound}
    actives = [os.path.realpath(wanted[index].backing_file) for index in sound]
    repeated = repeated_problems([targets[index].path for index in sound], actives)
    for index, problem in zip(sound, repeated):
        verdicts[index] = verdicts[index].failed(problem) if problem else _judge(wanted[index], targets[index])
    free: dict[int, int] = {}
    for group in groups:
        some = all_or_none([verdicts[index] for index in group])
        if all(index in targets for index in group):
            some = within_space(some, [targets[index] for index in group], free)
        _store(verdicts, group, some)
    return verdicts


def _judge(wanted: OverlayRequest, target: Target) -> Verdict:
    """Return what the overlay would become."""
    try:
        fd = open_image(wanted.backing_file)
        try:
            return decide(wanted, observe(fd, wanted), target)
        finally:
            os.close(fd)
    except (Qcow2Error, OSError) as exc:
        return failed_by(Verdict(wanted, CREATED), exc)


def _is_pending(verdict: Verdict, machines: Vms) -> bool:
    """Whether there is something to be done for the overlay, or for its VM now that the overlay is there."""
    return verdict.state == CREATED or (verdict.state == PRESENT and verdict.wanted.vm in machines)


def _make_group(
    verdicts: list[Verdict], engine: Engine, settings: Settings, machines: Vms, held: contextlib.ExitStack
) -> list[Verdict]:
    """Make the missing overlays of one VM and finish it, all or none, while every ACTIVE is locked by held."""
    work = Session(held, engine, settings)
    machine = machines.get(verdicts[0].wanted.vm or "")
    try:
        needed = {verdict.wanted.backing_file for verdict in verdicts if _is_pending(verdict, machines)}
        work.lock(opened_by_vm(verdicts, machine), needed)
    except (Qcow2Error, OSError) as exc:
        return _all_failed(verdicts, machines, exc)
    for step in (work.judge, work.build):
        for index, verdict in enumerate(verdicts):
            if _is_pending(verdict, machines):
                verdicts[index] = _attempt(step, verdict)
            if verdicts[index].state == FAILED:
                engine.stop()
                return all_or_none(verdicts)
    try:
        work.publish(machine.finish if machine else None)
    except (Qcow2Error, OSError) as exc:
        return _all_failed(verdicts, machines, exc)
    return verdicts


def _all_failed(verdicts: t.Sequence[Verdict], machines: Vms, exc: Exception) -> list[Verdict]:
    """Return the verdicts of a VM, those that are pending failed by an exception that is expected."""
    return [failed_by(verdict, exc) if _is_pending(verdict, machines) else verdict for verdict in verdicts]


def _attempt(step: t.Callable[[Verdict], Verdict], verdict: Verdict) -> Verdict:
    """Return what becomes of an overlay in this step."""
    try:
        return step(verdict)
    except (Qcow2Error, OSError) as exc:
        return failed_by(verdict, exc)


def opened_by_vm(verdicts: t.Sequence[Verdict], machine: Vm | None) -> list[str]:
    """Return the images that the VM opens for writing when it starts, in that order, as far as they are known."""
    images = [machine.first_image] if machine and machine.first_image else []
    for verdict in verdicts:
        if verdict.state == PRESENT and verdict.wanted.vm is None:  # it may be the disk of any VM
            continue
        if verdict.state == PRESENT:  # its VM may be on it, or not yet
            images.append(verdict.wanted.path)
        images.append(verdict.wanted.backing_file)
    return list(dict.fromkeys(images))


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
