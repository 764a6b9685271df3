# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Act: the signals that end a run take effect only where the run waits.

Python raises what a signal handler raises between any two instructions: after a file is made and before anybody is to
remove it, in the middle of fork(), or when everything is done. So the signals wait by themselves, blocked, and come
through in a few places: before each VM, and while the run waits for QEMU or for another run.
"""

from __future__ import annotations

import contextlib
import signal
import typing as t

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(BaseException):
    """A signal asks this run to end; no except clause on the way may mistake it for a failure of one VM."""


@contextlib.contextmanager
def ending_cleanly() -> t.Iterator[None]:
    """Have the signals that end a run raise Interrupted in the block, but only where it is interruptible()."""

    def end(number: int, _frame: t.Any) -> None:
        _ignore(changed)  # a second one must not disturb the cleaning up
        raise Interrupted(signal.Signals(number).name)

    previous = {number: signal.getsignal(number) for number in _ENDING}
    changed = [number for number, handler in previous.items() if handler != signal.SIG_IGN]  # ignored under nohup
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        for number in changed:
            signal.signal(number, end)
        yield
    finally:
        _ignore(changed)  # one that came too late: what the run has done is to be told all the same
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in changed:
            signal.signal(number, previous[number] or signal.SIG_DFL)


@contextlib.contextmanager
def interruptible() -> t.Iterator[None]:
    """Let the signals through that have been waiting, or that come in the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _ignore(signals: t.Iterable[signal.Signals]) -> None:
    """Ignore the signals, also those that are waiting already."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
