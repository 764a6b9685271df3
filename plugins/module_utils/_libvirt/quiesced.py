# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Keep and act: that the file systems of a guest are being frozen, and thaw those that were left so.

libvirt freezes and thaws in one call, which it ends even if this run is killed meanwhile. A daemon that dies in between
leaves the guest frozen, hanging in its next write, and remembers nothing of it. So a note tells of it until the guest
is known to be thawed. It holds the number of the domain, which is another one after each start, and is locked by the
run that lives: nobody thaws what is just being snapshotted. A guest does not survive its host, nor does /run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import typing as t

from .._base.errors import Refusal
from .._base.files import close
from .bindings import LibvirtError, libvirt, words_of
from .connection import PATIENCE, Domain, Libvirt, in_time

FOLDER = "/run/kvmfleet-qcow2.quiesced"
RECONNECT = 10.0  # seconds in which a daemon that was just started is connected to the agent of a guest
_PAUSE = 0.1  # seconds between two attempts
_FREEZE = "'guest-fsfreeze-freeze'"  # the command, in libvirt's words

NO_ANSWER = f"its guest agent has not answered within {PATIENCE:.0f} seconds"
MAY_BE_FROZEN = (
    "an earlier run or libvirt's daemon has ended while the file systems of its guest were being frozen, so they may be"
)


class Note:
    """That the file systems of a domain are being frozen. Unless it is dropped, it stays."""

    def __init__(self, domain: Domain, number: int) -> None:
        """Leave it."""
        self._path = _place_of(domain)
        self._fd: int | None = None
        # It is a second net: where it cannot be left, libvirt thaws all the same.
        with contextlib.suppress(OSError):
            os.makedirs(FOLDER, 0o700, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.write(self._fd, str(number).encode("ascii"))

    def __enter__(self) -> Note:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._fd is not None:
            close(self._fd)

    def drop(self) -> None:
        """Remove it: the guest is thawed."""
        _remove(self._path)


def thaw(handle: t.Any, seconds: float) -> int:
    """Have the guest thaw its file systems; return of how many its agent says that they were frozen.

    Wait so long for the agent: a daemon that was just started has to connect to it first. TimeoutError if it does not
    answer.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return in_time(lambda: t.cast("int", handle.fsThaw()))
        except LibvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_AGENT_UNRESPONSIVE or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def check_answers(handle: t.Any, domain: Domain) -> None:
    """Refuse a guest whose agent does not answer: libvirt would wait for it for ever, and for nothing else."""
    try:
        in_time(handle.getTime)
    except TimeoutError as exc:
        remedy = "See to the guest agent, or leave out quiesce."
        raise Refusal("not_quiesced", domain.name, f"cannot be quiesced: {NO_ANSWER}", remedy) from exc
    except LibvirtError:
        pass  # an answer, such as that it may not tell the time


def is_freeze(exc: t.Any) -> bool:
    """Return whether it is the freezing itself that has failed: then nothing is frozen, or it is so for others."""
    return _FREEZE in words_of(exc)


def is_left(daemon: Libvirt, domain: Domain) -> bool:
    """Return whether the guest of a domain may have been left frozen."""
    with _locked(_place_of(domain)) as number:
        return number is not None and _number_of(daemon, domain) == number


def thaw_left(daemon: Libvirt, domain: Domain) -> str | None:
    """Thaw a guest that was left frozen; return a warning if it was, or may be still."""
    path = _place_of(domain)
    with _locked(path) as number:
        if number is None:
            return None
        if _number_of(daemon, domain) != number:  # it was started anew
            _remove(path)
            return None
        try:
            count = thaw(daemon.connection.lookupByUUIDString(domain.uuid), RECONNECT)
        except LibvirtError as exc:
            return f"{domain.name}: {MAY_BE_FROZEN}, and cannot be thawed. libvirt says: {words_of(exc)}."
        except TimeoutError:
            return f"{domain.name}: {MAY_BE_FROZEN}, and cannot be thawed: {NO_ANSWER}."
        _remove(path)
        return f"{domain.name}: {MAY_BE_FROZEN}. {count} of them were, and are thawed now." if count else None


def _place_of(domain: Domain) -> str:
    return os.path.join(FOLDER, domain.uuid)


@contextlib.contextmanager
def _locked(path: str) -> t.Iterator[int | None]:
    """Yield the number in a note of a run that does not live any more; None if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = os.read(fd, 20)
            yield int(text) if text.isdigit() else None
            return
        yield None
    finally:
        close(fd)


def _number_of(daemon: Libvirt, domain: Domain) -> int | None:
    try:
        return t.cast("int", daemon.connection.lookupByUUIDString(domain.uuid).ID())
    except LibvirtError:
        return None


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
