# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""All VMs of a call: a first look at everything, then one VM's turn after the other; the same for every operation."""

from __future__ import annotations

import contextlib
import functools
import resource
import typing as t

from .._base.children import side_by_side
from .._base.errors import Refusal, printable
from .._base.signals import Interrupted, stop_here_if_asked
from .publish import leftovers, sweep
from .session import Engine, Held, Operation, Session, Settings, Vm, failed_by
from .verdict import FAILED, Request, V, all_or_none, printable_warnings, root_causes, within_space

R = t.TypeVar("R", bound=Request)


class Outcome(t.Generic[V]):
    """What became of all requests of one call, in the order in which they were given."""

    def __init__(self, verdicts: t.Sequence[V], warnings: t.Sequence[str]) -> None:
        self.verdicts = tuple(verdicts)
        self.warnings = tuple(warnings)

    @property
    def failures(self) -> list[Refusal]:
        """Why requests failed: root causes only, each once."""
        return root_causes(problem for verdict in self.verdicts for problem in verdict.problems)

    def as_result(self, items: str) -> dict[str, t.Any]:
        """Return the result of a module, in which the list of requests has the name `items`."""
        changed = [verdict for verdict in self.verdicts if verdict.changed]
        diffs = {printable(verdict.request.path): verdict.as_diff() for verdict in changed}
        return {
            "changed": bool(changed),
            items: [verdict.as_result() for verdict in self.verdicts],
            "diff": {
                "before": {path: before for path, (before, _after) in diffs.items()},
                "after": {path: after for path, (_before, after) in diffs.items()},
            },
        }


class Group(t.Generic[R, V]):
    """The requests of one VM, which are done all or none, and the verdicts on them."""

    def __init__(self, vm: str | None) -> None:
        self.vm = vm
        self.indexes: list[int] = []  # in the call
        self.requests: list[R] = []
        self.verdicts: list[V] = []

    def is_pending(self, session: Session[V]) -> bool:
        """Whether nothing failed, and something is to be done."""
        if any(verdict.state == FAILED for verdict in self.verdicts):
            return False
        return any(session.is_pending(verdict) for verdict in self.verdicts)


class Batch(t.Generic[R, V]):
    """Requests of a call that are for one operation. A VM has all of its requests in one batch."""

    def __init__(self, operation: Operation[R, V], requests: t.Sequence[R]) -> None:
        self.operation = operation
        self.requests = requests
        self.groups: list[Group[R, V]] = _groups(requests)
        self.warnings: list[str] = []

    def look(self, settings: Settings, engine: Engine, free: dict[int, int]) -> None:
        """Judge everything without any lock; `free` has the bytes that are left for all, by device."""
        operation = self.operation
        wrong = {index: problems for index, one in enumerate(self.requests) if (problems := operation.problems(one))}
        sound = {index: one for index, one in enumerate(self.requests) if index not in wrong}
        self.warnings = _leftovers(operation, sound.values(), settings)
        for index, conflict in zip(sound, operation.conflicts(list(sound.values()))):
            if conflict is not None:
                wrong[index] = [conflict]
        _first_look(operation, self.groups, wrong, lambda: Held(settings, engine, locking=False), free)

    def outcome(self) -> Outcome[V]:
        """Return what became of the requests."""
        verdicts = dict(pair for group in self.groups for pair in zip(group.indexes, group.verdicts))
        in_order = [verdicts[index] for index in range(len(self.requests))]
        return Outcome(in_order, [*self.warnings, *printable_warnings(in_order)])


def run(
    operation: Operation[R, V],
    requests: t.Sequence[R],
    settings: Settings,
    vms: t.Mapping[str | None, Vm] | None = None,
) -> Outcome[V]:
    """Do what is asked for by one operation, as run_all() does it."""
    batch = Batch(operation, requests)
    run_all([batch], settings, vms)
    return batch.outcome()


def run_all(
    batches: t.Sequence[Batch[t.Any, t.Any]], settings: Settings, vms: t.Mapping[str | None, Vm] | None
) -> None:
    """Do what is asked for, VM by VM; in check mode only find out what a run would do.

    `vms` has what is known of a VM by its name. Such a VM is switched once everything of it is in place, new and old,
    while it cannot start on any image. If that raises, what is new is removed again.
    """
    vms = vms or {}
    _allow_many_open_files()
    engine = Engine(settings)
    free: dict[int, int] = {}
    for batch in batches:
        batch.look(settings, engine, free)
    sessions = [
        (group, Session(batch.operation, settings, engine, vms.get(group.vm)))
        for batch in batches
        for group in batch.groups
    ]
    to_do = [(group, session) for group, session in sessions if group.is_pending(session)]
    try:
        if settings.parallel > 1 and not settings.check_mode:
            _run_side_by_side(to_do, settings.parallel)
        while to_do:
            stop_here_if_asked()
            group, session = to_do[0]
            group.verdicts = session.run(group.verdicts)
            del to_do[0]
    except Interrupted as exc:
        for group, _session in to_do:
            group.verdicts = [_interrupted(verdict, exc) for verdict in group.verdicts]
    finally:
        engine.stop()


def _run_side_by_side(to_do: list[tuple[Group[R, V], Session[V]]], at_a_time: int) -> None:
    """Have several VMs' turns at a time, each in a process of its own; those that were had leave the list."""
    begun = list(to_do)

    def done(index: int, verdicts: list[V]) -> None:
        begun[index][0].verdicts = verdicts
        to_do.remove(begun[index])

    def lost(index: int, by: str) -> None:
        done(index, [_killed(verdict, by) for verdict in begun[index][0].verdicts])

    side_by_side([functools.partial(session.run, group.verdicts) for group, session in begun], at_a_time, done, lost)


def _allow_many_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each image of a VM takes several."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _groups(requests: t.Sequence[R]) -> list[Group[R, t.Any]]:
    """Return the requests VM by VM."""
    groups: dict[str | None, Group[R, t.Any]] = {}
    for index, request in enumerate(requests):
        group = groups.setdefault(request.vm, Group(request.vm))
        group.indexes.append(index)
        group.requests.append(request)
    return list(groups.values())


def _leftovers(operation: Operation[R, t.Any], sound: t.Iterable[R], settings: Settings) -> list[str]:
    """Return a warning for each file that a killed run has left in the folders of this call; a run removes it."""
    folders = dict.fromkeys(folder for request in sound for folder in operation.folders(request))
    find = leftovers if settings.check_mode else sweep
    return [
        printable(f"{path}: is left over from a run that was killed. It is of no use; a run removes it.")
        for folder in folders
        for path in find(folder)
    ]


def _first_look(
    operation: Operation[R, V],
    groups: t.Sequence[Group[R, V]],
    wrong: t.Mapping[int, t.Sequence[Refusal]],
    hold: t.Callable[[], Held],
    free: dict[int, int],
) -> None:
    """Judge everything without any lock, but for the requests that are `wrong` by themselves."""
    for group in groups:
        for index, request in zip(group.indexes, group.requests):
            if index in wrong:
                group.verdicts.append(operation.refused(request, wrong[index]))
            else:
                group.verdicts.append(_look(operation, request, hold))
        group.verdicts = within_space(all_or_none(group.verdicts), free)


def _look(operation: Operation[R, V], request: R, hold: t.Callable[[], Held]) -> V:
    """Return what would become of a request."""
    with hold() as held:  # for one request only, so that a call for hundreds of VMs never has all images open
        try:
            return operation.judge(request, held)
        except (Refusal, OSError) as exc:
            return failed_by(operation.refused(request, ()), exc)


def _interrupted(verdict: V, exc: Interrupted) -> V:
    """Return the verdict on a request that was not done, because the run was told to end."""
    if not verdict.changed:
        return verdict
    why = f"is not done, because the run was ended by {exc}"
    return verdict.failed(Refusal("interrupted", verdict.request.path, why, "Run this again."))


def _killed(verdict: V, by: str) -> V:
    """Return the verdict on a request whose process was killed."""
    if not verdict.changed:
        return verdict
    why = f"is not done, because its process was ended by {by}"
    remedy = "If the kernel's log tells of a lack of memory, use a smaller parallel. Run this again."
    return verdict.failed(Refusal("interrupted", verdict.request.path, why, remedy))
