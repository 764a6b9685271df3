# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Act: one QEMU process that has no VM, spoken to in QMP over its standard input and output."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import typing as t

from .._base.errors import CHECK_STORAGE, QemuError, advice_on
from .._base.signals import interruptible

OLDEST_QEMU = (5, 2)  # the oldest that the whole sequence was run on
_PR_SET_PDEATHSIG = 1
_SHOWN_STDERR = 2000  # characters
_LONGEST_ANSWER = 64 * 1024 * 1024  # bytes
_SECONDS_TO_DIE = 5.0


class _TimeOverError(Exception):
    """The time limit of a step is over."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> t.Iterator[None]:
    """Raise _TimeOverError in the block when it takes longer."""

    def end(_signal: int, _frame: t.Any) -> None:
        raise _TimeOverError

    previous = signal.signal(signal.SIGALRM, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})  # a mask is inherited
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def find_qemu(find: t.Callable[[str], str | None]) -> list[str]:
    """Return the command of the QEMU process; find returns the full path of a program or None."""
    daemon = find("qemu-storage-daemon")
    if daemon:
        return [daemon, "--chardev", "stdio,id=monitor", "--monitor", "monitor"]
    emulators = (f"qemu-system-{os.uname().machine}", "qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm")
    for emulator in filter(None, map(find, emulators)):
        return [emulator, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    raise QemuError(
        "no QEMU found: neither qemu-storage-daemon nor a system emulator is in the PATH of this host. Install "
        "qemu-system-common and qemu-utils (Debian, Ubuntu) or qemu-kvm-core (Fedora, EL)."
    )


def _dying_with(parent: int) -> t.Callable[[], None]:
    """Return what has the kernel kill the child when its parent dies, or a killed run would leave a QEMU behind."""
    prctl = ctypes.CDLL(None).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a mask is inherited
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


class Monitor:
    """A running QEMU process and its monitor. Every failure of it ends it and raises QemuError."""

    def __init__(self, command: list[str], seconds: float) -> None:
        """Start the process; seconds is what it may take for one step, before the size of the step is added."""
        self._seconds = seconds
        self._stderr = tempfile.TemporaryFile()
        self._events: list[dict[str, t.Any]] = []
        self._awaited = 0  # answers
        self._program = os.path.basename(command[0])
        try:
            self._process = subprocess.Popen(  # pylint: disable=ansible-bad-function  # a dialogue, not one command
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                cwd="/",
                env={**os.environ, "LC_ALL": "C"},
                preexec_fn=_dying_with(os.getpid()),  # noqa: PLW1509  a module has one thread
            )
        except OSError as exc:
            self._stderr.close()
            raise QemuError(f"{command[0]}: cannot be started: {exc.strerror}.") from exc
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        """Read the greeting, check the version, leave the negotiation mode."""
        greeting = self._read(lambda message: "QMP" in message)
        try:
            version = greeting["QMP"]["version"]["qemu"]
            is_too_old = (version["major"], version["minor"]) < OLDEST_QEMU
        except (TypeError, KeyError) as exc:
            raise self._lost("greets in a way that no QEMU does") from exc
        if is_too_old:
            raise QemuError(
                f"{self._program}: is version {version['major']}.{version['minor']}, too old. "
                f"At least {OLDEST_QEMU[0]}.{OLDEST_QEMU[1]} is needed."
            )
        # With it, QEMU reads up to eight commands ahead while it executes one. Without, everything works too.
        reads_ahead = "oob" in greeting["QMP"].get("capabilities", ())
        self.command("qmp_capabilities", {"enable": ["oob"]} if reads_ahead else None)

    def command(self, name: str, arguments: dict[str, t.Any] | None = None, more_seconds: float = 0.0) -> t.Any:
        """Run a QMP command and return what it returns; QemuError with QEMU's own words when it fails."""
        self.send(name, arguments, more_seconds)
        return self.receive(more_seconds)

    def send(self, name: str, arguments: dict[str, t.Any] | None = None, more_seconds: float = 0.0) -> None:
        """Give QEMU a command to execute after those that were sent before; receive() returns the answers in turn."""
        # Compact, since QEMU's monitor reads its input byte by byte, and 64 bitmaps are thousands of bytes.
        line = json.dumps({"execute": name, "arguments": arguments or {}}, separators=(",", ":")).encode("ascii")
        stdin = t.cast("t.IO[bytes]", self._process.stdin)
        with self._in_time(more_seconds):
            stdin.write(line + b"\n")
            stdin.flush()
        self._awaited += 1

    def receive(self, more_seconds: float = 0.0) -> t.Any:
        """Return what the first command returned whose answer was not received yet; QemuError when it failed."""
        answer = self._read(lambda message: "return" in message or "error" in message, more_seconds)
        self._awaited -= 1
        if "error" in answer:
            raise _refused(answer["error"].get("desc"))
        return answer["return"]

    def receive_rest(self, more_seconds: float = 0.0) -> None:
        """Receive all answers that were not received yet; QemuError when one of the commands failed."""
        while self._awaited:
            self.receive(more_seconds)

    def run_job(self, name: str, job: str, arguments: dict[str, t.Any]) -> None:
        """Run a QMP command that is a job, after those that were sent before, to its end."""
        self._events.clear()
        self.send(name, {"job-id": job, **arguments})
        self.receive_rest()
        # The event may have come before the answer to the command.
        if not any(_has_concluded(event, job) for event in self._events):
            self._read(lambda message: _has_concluded(message, job))
        self.send("query-jobs")
        self.send("job-dismiss", {"id": job})
        status = next(entry for entry in self.receive() if entry["id"] == job)
        self.receive()
        if "error" in status:
            raise _refused(status["error"])

    def stderr(self) -> str:
        """Return the end of what QEMU wrote to its standard error; some failures show only there."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _SHOWN_STDERR))
        return self._stderr.read().decode("utf-8", "replace").strip()

    def close(self) -> None:
        """End the process. By force: what is finished is closed already, and what is not will be thrown away."""
        self._kill()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                t.cast("t.IO[bytes]", stream).close()
        self._stderr.close()

    def _kill(self) -> None:
        """Kill the process; one that hangs in the kernel, on storage that is gone, is not waited for for ever."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_DIE)

    def _read(self, wanted: t.Callable[[dict[str, t.Any]], bool], more_seconds: float = 0.0) -> dict[str, t.Any]:
        """Return the next message that is wanted."""
        stdout = t.cast("t.IO[bytes]", self._process.stdout)
        with self._in_time(more_seconds):
            while answer := stdout.readline(_LONGEST_ANSWER):
                message = json.loads(answer)
                if wanted(message):
                    return t.cast("dict[str, t.Any]", message)
                if message.get("event") == "JOB_STATUS_CHANGE":
                    self._events.append(message)
            status = self._process.wait()
        raise self._lost(f"ended with status {status}")

    @contextlib.contextmanager
    def _in_time(self, more_seconds: float) -> t.Iterator[None]:
        """Kill a QEMU that dies, hangs or babbles in the block, and raise QemuError."""
        seconds = self._seconds + more_seconds
        try:
            with _time_limit(seconds), interruptible():
                yield
        except _TimeOverError:
            raise self._lost(f"gave no answer for {seconds:.0f} s and was killed") from None
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            raise self._lost(f"could not be talked to ({exc})") from exc

    def _lost(self, what: str) -> QemuError:
        """Kill the process and return the error that says so."""
        self._kill()
        words = self.stderr()
        return QemuError(f"{self._program} {what}." + (f" It says: {words}" if words else "") + f" {CHECK_STORAGE}")


def _refused(words: str) -> QemuError:
    """Return the error for a command or a job that QEMU says, in these words, has failed."""
    return QemuError(f"QEMU says: {words}. {advice_on(words)}")


def _has_concluded(message: dict[str, t.Any], job: str) -> bool:
    """Whether the message is the event that the job has come to its end."""
    return message.get("event") == "JOB_STATUS_CHANGE" and message["data"] == {"id": job, "status": "concluded"}
