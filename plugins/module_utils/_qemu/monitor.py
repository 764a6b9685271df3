# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: one QEMU process that has no VM, spoken to in QMP over its standard input and output."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
import typing as t

from .._base.children import dying_with
from .._base.errors import CHECK_STORAGE, QemuError, qemu_refusal, system_refusal
from .._base.signals import interruptible

OLDEST_QEMU = (5, 2)  # the oldest that the whole sequence was run on
_SHOWN_STDERR = 2000  # characters
_LONGEST_ANSWER = 64 * 1024 * 1024  # bytes
_NO_PROGRAM = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOEXEC)
_PIECE = 65536  # bytes that are read or written at once
_SECONDS_TO_DIE = 5.0

Message = dict[str, t.Any]


def find_qemu(find: t.Callable[[str], str | None]) -> list[str]:
    """Return the command of the QEMU process; `find` returns the full path of a program or None."""
    daemon = find("qemu-storage-daemon")
    if daemon:
        return [daemon, "--chardev", "stdio,id=monitor", "--monitor", "monitor"]
    emulators = (f"qemu-system-{os.uname().machine}", "qemu-system-x86_64", "qemu-kvm", "/usr/libexec/qemu-kvm")
    for emulator in filter(None, map(find, emulators)):
        return [emulator, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"]
    raise QemuError(
        "no_qemu",
        "no QEMU found: neither qemu-storage-daemon nor a system emulator is in the PATH of this host",
        "Install qemu-system-common and qemu-utils (Debian, Ubuntu) or qemu-kvm-core (Fedora, EL).",
    )


def _in_child(parent: int) -> t.Callable[[], None]:
    """Return what the child does before it becomes QEMU."""
    die_with_parent = dying_with(parent)

    def prepare() -> None:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a mask is inherited

    return prepare


class Monitor:
    """A running QEMU process and its monitor. If it dies, hangs or babbles, end it and raise QemuError.

    send() gives QEMU a command without waiting; receive() returns the answers in turn. command() does both.
    """

    def __init__(self, command: list[str], seconds: float) -> None:
        """Start the process. `seconds` is what a step may take, before the size of the step is added."""
        self._seconds = seconds
        self._stderr = tempfile.TemporaryFile()
        self._events: list[Message] = []
        self._lines: collections.deque[bytes] = collections.deque()  # that QEMU wrote and nobody asked for yet
        self._rest = bytearray()  # of a line that it has not ended yet
        self._awaited = 0  # answers
        self._program = os.path.basename(command[0])
        try:
            self._process = subprocess.Popen(  # pylint: disable=ansible-bad-function  # a dialogue, not one command
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                cwd="/",
                env={**os.environ, "LC_ALL": "C"},
                preexec_fn=_in_child(os.getpid()),  # noqa: PLW1509  a module has one thread
            )
        except OSError as exc:
            self._stderr.close()
            refusal = system_refusal(exc, command[0], "cannot be started")
            code = "no_qemu" if exc.errno in _NO_PROGRAM else refusal.code
            raise QemuError(code, f"{command[0]}: {refusal.why}", refusal.remedy) from exc
        self._stdin = t.cast("t.IO[bytes]", self._process.stdin)
        self._stdout = t.cast("t.IO[bytes]", self._process.stdout)
        self._to_read = _selector({self._stdout: selectors.EVENT_READ})
        self._to_write = _selector({self._stdout: selectors.EVENT_READ, self._stdin: selectors.EVENT_WRITE})
        try:
            for stream in (self._stdin, self._stdout):
                os.set_blocking(stream.fileno(), False)
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        """Read the greeting, check the version, leave the negotiation mode."""
        greeting = self._next(lambda message: "QMP" in message, self._deadline())
        try:
            version = greeting["QMP"]["version"]["qemu"]
            is_too_old = (version["major"], version["minor"]) < OLDEST_QEMU
        except (TypeError, KeyError) as exc:
            raise self._lost("greets in a way that no QEMU does") from exc
        if is_too_old:
            raise QemuError(
                "old_qemu",
                f"{self._program}: is version {version['major']}.{version['minor']}, too old",
                f"At least {OLDEST_QEMU[0]}.{OLDEST_QEMU[1]} is needed: update QEMU on this host.",
            )
        # With the capability oob, QEMU reads up to eight commands ahead while it executes one.
        reads_ahead = "oob" in greeting["QMP"].get("capabilities", ())
        self.command("qmp_capabilities", {"enable": ["oob"]} if reads_ahead else None)

    def command(self, name: str, arguments: Message | None = None, more_seconds: float = 0.0) -> t.Any:
        """Run a QMP command and return what it returns; QemuError with QEMU's own words if it fails."""
        self.send(name, arguments, more_seconds)
        return self.receive(more_seconds)

    def send(self, name: str, arguments: Message | None = None, more_seconds: float = 0.0) -> None:
        """Give QEMU a command to execute after those that were sent before."""
        # Compact, since QEMU's monitor reads its input byte by byte, and 64 bitmaps are thousands of bytes.
        line = json.dumps({"execute": name, "arguments": arguments or {}}, separators=(",", ":")).encode("ascii")
        self._write(line + b"\n", self._deadline(more_seconds))
        self._awaited += 1

    def receive(self, more_seconds: float = 0.0) -> t.Any:
        """Return what the first command returned whose answer was not received yet; QemuError if it failed."""
        deadline = self._deadline(more_seconds)
        answer = self._next(lambda message: "return" in message or "error" in message, deadline)
        self._awaited -= 1
        if "error" in answer:
            raise qemu_refusal(str(answer["error"].get("desc")))
        return answer["return"]

    def receive_rest(self, more_seconds: float = 0.0) -> None:
        """Receive all answers that were not received yet; QemuError if one of the commands failed."""
        while self._awaited:
            self.receive(more_seconds)

    def run_job(self, name: str, job: str, arguments: Message) -> None:
        """Run a QMP command that is a job, after those that were sent before, to its end."""
        self._events.clear()
        self.send(name, {"job-id": job, **arguments})
        self.receive_rest()
        # The event may have come before the answer to the command.
        if not any(_has_concluded(event, job) for event in self._events):
            self._next(lambda message: _has_concluded(message, job), self._deadline())
        self.send("query-jobs")
        self.send("job-dismiss", {"id": job})
        status = next(entry for entry in self.receive() if entry["id"] == job)
        self.receive()
        if "error" in status:
            raise qemu_refusal(status["error"])

    def start_job(self, name: str, job: str, arguments: Message) -> None:
        """Run a QMP command that begins a job which stays until it is dismissed, after those that were sent before."""
        self._events.clear()
        self.send(name, {"job-id": job, "auto-dismiss": False, **arguments})
        self.receive_rest()

    def next_status(self, job: str, seconds: float) -> str | None:
        """Return the next status that a job has come to; None if it comes to none within `seconds`."""
        end = time.monotonic() + seconds
        while True:
            while self._events:
                data = self._events.pop(0)["data"]
                if data["id"] == job:
                    return str(data["status"])
            left = end - time.monotonic()
            if left <= 0:
                return None
            self._listen(left)

    def stderr(self) -> str:
        """Return the end of what QEMU wrote to its standard error; some failures show only there."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _SHOWN_STDERR))
        return self._stderr.read().decode("utf-8", "replace").strip()

    def close(self) -> None:
        """End the process by force: what is finished is closed already, and the rest will be thrown away."""
        self._kill()
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                stream.close()
        self._stderr.close()

    def _kill(self) -> None:
        """Kill the process, but do not wait long for one that hangs in the kernel, on storage that is gone."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_DIE)

    def _deadline(self, more_seconds: float = 0.0) -> _Deadline:
        """Return until when a step that begins now must be done."""
        seconds = self._seconds + more_seconds
        return _Deadline(seconds, time.monotonic() + seconds)

    def _write(self, data: bytes, deadline: _Deadline) -> None:
        """Give QEMU these bytes. Read what it writes meanwhile, or both would wait for each other."""
        while data:
            if not self._wait(self._to_write, deadline):
                continue
            try:
                data = data[os.write(self._stdin.fileno(), data[:_PIECE]) :]
            except BlockingIOError:
                continue
            except OSError as exc:
                raise self._lost(f"could not be talked to ({exc})") from exc

    def _next(self, wanted: t.Callable[[Message], bool], deadline: _Deadline) -> Message:
        """Return the next message that is wanted; keep the events of jobs that come before it."""
        while True:
            while self._lines:
                message = self._take()
                if wanted(message):
                    return message
                self._keep(message)
            self._wait(self._to_read, deadline)

    def _listen(self, seconds: float) -> None:
        """Wait up to `seconds` for QEMU to write something, and keep the events of jobs that come."""
        with interruptible():
            ready = self._to_read.select(seconds)
        if ready:
            self._read()
        while self._lines:
            self._keep(self._take())

    def _take(self) -> Message:
        """Return the next message that QEMU has written; QemuError if it is none."""
        try:
            message = json.loads(self._lines.popleft())
        except ValueError as exc:
            raise self._lost(f"could not be talked to ({exc})") from exc
        if not isinstance(message, dict):
            raise self._lost(f"could not be talked to (it writes {message!r})")
        return message

    def _keep(self, message: Message) -> None:
        """Keep a message if it is the event of a job."""
        if message.get("event") == "JOB_STATUS_CHANGE":
            self._events.append(message)

    def _wait(self, selector: selectors.PollSelector, deadline: _Deadline) -> bool:
        """Wait until QEMU has written something, and read it, or until it takes input; True if it takes input."""
        left = deadline.end - time.monotonic()
        with interruptible():
            ready = [key.fileobj for key, _events in selector.select(left)] if left > 0 else []
        if not ready:
            raise self._lost(f"gave no answer for {deadline.seconds:.0f} s and was killed")
        if self._stdout in ready:
            self._read()
        return self._stdin in ready

    def _read(self) -> None:
        """Read what QEMU has written; QemuError at its end."""
        try:
            piece = os.read(self._stdout.fileno(), _PIECE)
        except OSError as exc:
            raise self._lost(f"could not be talked to ({exc})") from exc
        if not piece:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise self._lost(f"ended with status {self._process.wait(_SECONDS_TO_DIE)}")
            raise self._lost("closed its monitor")
        self._rest += piece
        if b"\n" in piece:  # look at the new piece only: an answer can have many
            *lines, rest = self._rest.split(b"\n")
            self._lines.extend(map(bytes, lines))
            self._rest = rest
        if len(self._rest) > _LONGEST_ANSWER:
            raise self._lost("writes answers without end")

    def _lost(self, what: str) -> QemuError:
        """Kill the process and return the error that says so."""
        self._kill()
        words = self.stderr()
        return QemuError(
            "qemu_lost", f"{self._program} {what}" + (f". It says: {words}" if words else ""), CHECK_STORAGE
        )


def _selector(events: dict[t.IO[bytes], int]) -> selectors.PollSelector:
    """Return what waits for these events."""
    selector = selectors.PollSelector()
    for stream, event in events.items():
        selector.register(stream, event)
    return selector


class _Deadline(t.NamedTuple):
    """Until when a step must be done."""

    seconds: float  # that it has in all
    end: float  # as time.monotonic()


def _has_concluded(message: Message, job: str) -> bool:
    """Whether the message is the event that the job has come to its end."""
    return message.get("event") == "JOB_STATUS_CHANGE" and message["data"] == {"id": job, "status": "concluded"}
