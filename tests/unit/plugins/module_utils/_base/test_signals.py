# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the signals that end a run come through, and where they wait."""

from __future__ import annotations

import os
import signal

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    Interrupted,
    ending_cleanly,
    interruptible,
)


def send(*numbers):
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.fixture(name="handled", autouse=True)
def fixture_handled():
    """Have SIGTERM handled in a way that shows, and SIGHUP ignored as under nohup; restore both."""
    seen = []
    handlers = {signal.SIGTERM: lambda number, _frame: seen.append(number), signal.SIGHUP: signal.SIG_IGN}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield seen
    for number, handler in previous.items():
        signal.signal(number, handler)


def run(steps):
    """Send SIGTERM in a run and note the steps that it comes to."""
    with ending_cleanly():
        send(signal.SIGTERM)
        steps.append("the one that it came in")
        with interruptible():
            steps.append("the waiting")


def wait(steps):
    """Send SIGTERM while a run waits, and some more while it cleans up, and note the steps that it comes to."""
    with ending_cleanly():
        try:
            with interruptible():
                send(signal.SIGTERM)
                steps.append("the waiting")
        finally:
            with interruptible():
                send(signal.SIGTERM, signal.SIGINT)
            steps.append("the cleaning up")


def test_a_signal_waits_until_the_run_is_interruptible(handled):
    steps = []
    with pytest.raises(Interrupted, match="SIGTERM"):
        run(steps)
    assert steps == ["the one that it came in"]
    send(signal.SIGTERM)
    assert handled == [signal.SIGTERM]  # the handler that was there before is back


def test_a_signal_ends_the_waiting_and_a_second_one_does_not_disturb_the_cleaning_up():
    steps = []
    with pytest.raises(Interrupted, match="SIGTERM"):
        wait(steps)
    assert steps == ["the cleaning up"]


def test_a_signal_that_was_ignored_before_ends_nothing():
    with ending_cleanly(), interruptible():
        send(signal.SIGHUP)


def test_a_signal_after_the_last_step_does_not_make_a_done_run_fail(handled):
    with ending_cleanly():
        send(signal.SIGTERM)
    assert handled == []
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
