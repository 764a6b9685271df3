# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Signals end a run only at safe points.

An exception from a signal handler can surface between any two bytecodes: when a file exists but its cleanup is not
registered, inside fork(), after the work is done. So SIGTERM, SIGHUP and SIGINT stay blocked and are let in only at
safe points: before each VM, and while the run waits for QEMU or for another run.
"""

from __future__ import annotations

import contextlib
import signal
import typing as t

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_came: list[str] = []  # names of the signals that have asked this run to end


class Interrupted(BaseException):
    """A signal asks this run to end. No `except Exception` on the way may mistake it for a failure of one VM."""


class GoesOn(Interrupted):
    """The same, and what was begun cannot be ended: it goes on without this run."""


@contextlib.contextmanager
def ending_cleanly() -> t.Iterator[None]:
    """Have the signals that end a run raise Interrupted in the block, but only at safe points."""

    def end(number: int, _frame: t.Any) -> None:
        _ignore(changed)  # a second signal must not disturb the cleaning up
        _came.append(signal.Signals(number).name)
        raise Interrupted(_came[0])

    previous = {number: signal.getsignal(number) for number in _ENDING}
    changed = [number for number, handler in previous.items() if handler != signal.SIG_IGN]  # ignored under nohup
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        for number in changed:
            signal.signal(number, end)
        yield
    finally:
        _ignore(changed)  # a signal that came too late: the run must still tell what it has done
        _came.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in changed:
            signal.signal(number, previous[number] or signal.SIG_DFL)


@contextlib.contextmanager
def interruptible() -> t.Iterator[None]:
    """Let in the signals that wait already, and those that come in the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def stop_here_if_asked() -> None:
    """Raise Interrupted if a signal that ends the run waits already, or came before and only one VM's turn ended."""
    with interruptible():
        pass
    if _came:
        raise Interrupted(_came[0])


def _ignore(signals: t.Iterable[signal.Signals]) -> None:
    """Ignore the signals, also those that wait already."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
