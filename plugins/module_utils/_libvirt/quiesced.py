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
from .._base.files import close, is_private
from .bindings import LibvirtError, libvirt, words_of
from .connection import PATIENCE, Domain, Libvirt

FOLDER = "/run/kvmfleet-qcow2.quiesced"
_RECONNECT = 10.0  # seconds in which a daemon that was just started is connected to the agent of a guest
_PAUSE = 0.1  # seconds between two attempts
_FREEZE = "'guest-fsfreeze-freeze'"  # the command, in libvirt's words

NO_ANSWER = f"its guest agent has not answered within {PATIENCE:.0f} seconds"
MAY_BE_FROZEN = (
    "an earlier run or libvirt's daemon has ended while the file systems of its guest were being frozen, so they may be"
)
_SEE_TO_AGENT = "See to the guest agent, or leave out quiesce."


class Note:
    """That the file systems of a domain are being frozen. It stays until its guest is known to be thawed."""

    def __init__(self, path: str | None, number: int) -> None:
        self._path = path  # None of one that could not be left
        self.number = number  # of the domain then

    def drop(self) -> None:
        """Remove it: the guest is thawed, or was started anew."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def thaw(self, daemon: Libvirt, uuid: str) -> int:
        """Have the guest thaw its file systems, then remove the note; return how many were frozen, by its agent.

        The note stays if that raises LibvirtError, or TimeoutError since the agent does not answer.
        """
        count = _thaw(daemon, uuid)
        self.drop()
        return count

    def is_settled(self, daemon: Libvirt, uuid: str, error: t.Any) -> bool:
        """Return after a snapshot whether the guest is thawed; after an `error` have it thawed.

        libvirt has thawed it itself, unless that is what failed.
        """
        if error is None or is_freeze(error):
            self.drop()
            return True
        try:
            self.thaw(daemon, uuid)
        except (LibvirtError, TimeoutError, Refusal):
            return False
        return True


@contextlib.contextmanager
def noted(domain: Domain, number: int) -> t.Iterator[Note]:
    """Leave a note, and hold its lock in the block."""
    with contextlib.ExitStack() as held:
        path = None
        # It is a second net: where it cannot be left, libvirt thaws all the same.
        with contextlib.suppress(OSError):
            os.makedirs(FOLDER, 0o700, exist_ok=True)
            if is_private(FOLDER):
                fd = os.open(_place_of(domain.uuid), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                held.callback(close, fd)
                path = _place_of(domain.uuid)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, 0)
                os.write(fd, str(number).encode("ascii"))
        yield Note(path, number)


def _thaw(daemon: Libvirt, uuid: str) -> int:
    """Have the guest thaw its file systems; return of how many its agent says that they were frozen.

    Wait for the agent: a daemon that was just started has to connect to it first.
    """
    deadline = time.monotonic() + _RECONNECT
    while True:
        try:
            return daemon.in_time(uuid, lambda handle: t.cast("int", handle.fsThaw()))
        except LibvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_AGENT_UNRESPONSIVE or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)


def check_answers(daemon: Libvirt, domain: Domain) -> None:
    """Refuse a guest whose agent does not answer: libvirt would wait for it for ever, and for nothing else."""
    try:
        daemon.in_time(domain.uuid, lambda handle: handle.getTime())
    except TimeoutError as exc:
        raise Refusal("not_quiesced", domain.name, f"cannot be quiesced: {NO_ANSWER}", _SEE_TO_AGENT) from exc
    except LibvirtError as exc:
        if is_no_answer(exc):
            why = f"cannot be quiesced. libvirt says: {words_of(exc)}"
            raise Refusal("not_quiesced", domain.name, why, _SEE_TO_AGENT) from exc
        # Else it is an answer, such as that it may not tell the time.


def is_no_answer(exc: t.Any) -> bool:
    """Return whether the agent has answered nothing, or there is none."""
    codes = (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED)
    return exc.get_error_code() in codes


def is_freeze(exc: t.Any) -> bool:
    """Return whether it is the freezing itself that has failed: then nothing is frozen, or it is so for others."""
    return _FREEZE in words_of(exc)


def is_left(daemon: Libvirt, domain: Domain) -> bool:
    """Return whether the guest of a domain may have been left frozen."""
    with _left(domain.uuid) as note:
        return note is not None and _number_of(daemon, domain.uuid) in (note.number, None)


def thaw_left(connect: t.Callable[[], Libvirt], *, check_mode: bool) -> list[str]:
    """Thaw all guests of a daemon that were left frozen; return warnings of those that were, or may be still.

    Whatever a run is asked for: a frozen guest hangs, and nobody else knows why. Connect only if there may be one.
    """
    uuids: list[str] = []
    with contextlib.suppress(OSError):
        uuids = sorted(os.listdir(FOLDER)) if is_private(FOLDER) else []
    if not uuids:
        return []
    daemon = connect()
    told = [_told_of_one_left(daemon, uuid, check_mode=check_mode) for uuid in uuids]
    return [warning for warning in told if warning is not None]


def _told_of_one_left(daemon: Libvirt, uuid: str, *, check_mode: bool) -> str | None:
    with _left(uuid) as note:
        if note is None:
            return None
        try:
            handle = daemon.connection.lookupByUUIDString(uuid)
            name, number = handle.name(), handle.ID()
        except LibvirtError:  # it is another daemon's, or this one does not answer: nobody knows, so the note stays
            return None
        if number != note.number:  # it was started anew
            if not check_mode:
                note.drop()
            return None
        if check_mode:
            return f"{name}: {MAY_BE_FROZEN}. A run without check mode thaws them."
        try:
            count = note.thaw(daemon, uuid)
        except LibvirtError as exc:
            return f"{name}: {MAY_BE_FROZEN}, and cannot be thawed. libvirt says: {words_of(exc)}."
        except TimeoutError:
            return f"{name}: {MAY_BE_FROZEN}, and cannot be thawed: {NO_ANSWER}."
        except Refusal as exc:
            return f"{name}: {MAY_BE_FROZEN}, and cannot be thawed: {exc.why}."
        return f"{name}: {MAY_BE_FROZEN}. {count} of them were, and are thawed now." if count else None


def _place_of(uuid: str) -> str:
    return os.path.join(FOLDER, uuid)


@contextlib.contextmanager
def _left(uuid: str) -> t.Iterator[Note | None]:
    """Yield the note of a run that does not live any more, and hold its lock in the block; None if there is none."""
    path = _place_of(uuid)
    try:
        # To open a FIFO would hang.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        text = b""
        with contextlib.suppress(OSError):  # a run that lives has it, or it is no file
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            text = os.read(fd, 20) if is_private(FOLDER) else b""
        yield Note(path, int(text)) if text.isdigit() else None
    finally:
        close(fd)


def _number_of(daemon: Libvirt, uuid: str) -> int | None:
    """Return the number of a domain that runs, another one after each start; None if libvirt does not tell."""
    try:
        return t.cast("int", daemon.connection.lookupByUUIDString(uuid).ID())
    except LibvirtError:
        return None
