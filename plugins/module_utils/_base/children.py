# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Do several things side by side, each in a process of its own, so that each has its own locks and its own QEMU."""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
import typing as t

from .signals import Interrupted, interruptible

T = t.TypeVar("T")

_PR_SET_PDEATHSIG = 1
_PIECE = 65536  # bytes that are read at once


def dying_with(parent: int) -> t.Callable[[], None]:
    """Return what has the kernel kill the child when its parent dies, or a killed run would leave a process behind."""
    prctl = ctypes.CDLL(None).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


class _Child(t.NamedTuple):
    """A process that does one of the tasks."""

    number: int
    pid: int
    said: bytearray  # of its answer


def side_by_side(
    tasks: t.Sequence[t.Callable[[], T]],
    at_a_time: int,
    done: t.Callable[[int, T], None],
    lost: t.Callable[[int, str], None],
) -> None:
    """Do the tasks, so many at a time; call `done` with the number of each that came to its end, and its result.

    Call `lost` with the number of each whose process was killed, as for a lack of memory, and by what; others go on.

    Interrupted if the run was told to end: then those that run are told, too, and are waited for; no other is begun.
    Raise what a task raised, once the others have ended.
    """
    waiting, failure = list(range(len(tasks)))[::-1], list[BaseException]()
    with selectors.DefaultSelector() as running:
        while waiting or running.get_map():
            while waiting and len(running.get_map()) < at_a_time and not failure:
                fd, child = _begin(waiting.pop(), tasks)
                running.register(fd, selectors.EVENT_READ, child)
            if not running.get_map():
                break
            try:
                with interruptible():
                    ready = running.select()
            except Interrupted as exc:
                failure.append(exc)
                for key in running.get_map().values():
                    os.kill(key.data.pid, signal.SIGTERM)
                continue
            for key, _events in ready:
                if _hear(key.fd, key.data):
                    running.unregister(key.fd)
                    _end(key.fd, key.data, done, lost, failure)
    if failure:
        raise failure[0]


def _begin(index: int, tasks: t.Sequence[t.Callable[[], T]]) -> tuple[int, _Child]:
    """Start the process of a task; return where its answer comes, and the process."""
    parent, (here, there) = os.getpid(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(there)
        return here, _Child(index, pid, bytearray())
    status = 1
    try:
        os.close(here)
        dying_with(parent)()
        with os.fdopen(there, "wb") as answer:
            answer.write(pickle.dumps(_outcome(tasks[index])))
        status = 0
    finally:
        os._exit(status)


def _outcome(task: t.Callable[[], T]) -> tuple[bool, t.Any]:
    """Return whether the task came to its end, and its result or what it raised."""
    try:
        return True, task()
    except BaseException as exc:
        return False, exc


def _hear(fd: int, child: _Child) -> bool:
    """Read what the child says; return whether that was all."""
    piece = os.read(fd, _PIECE)
    child.said.extend(piece)
    return not piece


def _end(
    fd: int,
    child: _Child,
    done: t.Callable[[int, T], None],
    lost: t.Callable[[int, str], None],
    failure: list[BaseException],
) -> None:
    """Take the answer of a process that has ended."""
    os.close(fd)
    _pid, status = os.waitpid(child.pid, 0)
    if os.WIFSIGNALED(status):
        lost(child.number, signal.Signals(os.WTERMSIG(status)).name)
        return
    if not child.said:
        failure.append(RuntimeError(f"process {child.pid} ended without an answer"))
        return
    succeeded, what = pickle.loads(child.said)  # from our own child
    if succeeded:
        done(child.number, what)
    else:
        failure.append(what)
