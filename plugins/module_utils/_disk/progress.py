# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Tell other processes how far a commit is, in a file that only root can read.

One file for each commit whose data is moving, `/run/kvmfleet-qcow2/PID-NUMBER.json`, written anew about four times
a second. It goes with the commit; of a run that was killed the next one removes it. docs/design.md has the fields.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import typing as t

from .._base.errors import Refusal, printable
from .._base.files import is_private, read_note, write_all
from .._base.signals import Interrupted, interruptible

FOLDER = "/run/kvmfleet-qcow2"
_SUFFIX = ".json"
_MOST = 65536  # bytes of a file; it has two paths
_PAUSE = 0.2  # seconds between two looks at a process that is to end
_NUMBERS = itertools.count(1)


class Subject(t.Protocol):
    """What is told of a request."""

    @property
    def path(self) -> str:
        """Return the topmost image that goes in."""

    @property
    def backing_file(self) -> str:
        """Return the image that it goes into."""

    @property
    def vm(self) -> str | None:
        """Return the VM."""


@contextlib.contextmanager
def telling(subject: Subject) -> t.Iterator[t.Callable[[int, int], None]]:
    """Yield what is to be called with the bytes that are done, and with all; nothing is told where nothing can be."""
    path = os.path.join(FOLDER, f"{os.getpid()}-{next(_NUMBERS)}{_SUFFIX}")
    begun = time.time()

    def tell(done: int, total: int) -> None:
        seconds = time.time() - begun
        about = {
            "path": printable(subject.path),
            "backing_file": printable(subject.backing_file),
            "vm": subject.vm,
            "pid": os.getpid(),
            "bytes": done,
            "total_bytes": total,
            "percent": round(100 * done / total, 1) if total else 100.0,
            "bytes_per_second": round(done / seconds) if seconds > 0 else 0,
            "begun": round(begun, 3),
            "updated": round(begun + seconds, 3),
        }
        # Progress is a comfort: a full /run must not end a commit.
        with contextlib.suppress(OSError):
            _write(path, f"{json.dumps(about)}\n")

    with contextlib.suppress(OSError):
        os.makedirs(FOLDER, 0o700, exist_ok=True)
    _remove_those_of_killed_runs()
    try:
        yield tell
    finally:
        _remove(path)


def how_far() -> frozenset[tuple[int, int]]:
    """Return how far each merge of this host is, by its process; nothing where that cannot be read."""
    return frozenset((about.pid, about.bytes) for about in _told())


def await_merges_of(vms: t.Container[str], seconds: float) -> bool:
    """Wait until every other process has ended that merges something of these VMs; return whether there was one.

    One that has not moved on for `seconds` is not waited for any more; the locks of its images will tell of it.
    Refusal if a signal ends the run meanwhile.
    """
    others = {about.pid for about in _told() if about.vm in vms and about.pid != os.getpid()}
    for pid in others:
        seen, deadline = how_far(), time.monotonic() + seconds
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            try:
                with interruptible():
                    time.sleep(_PAUSE)
            except Interrupted as exc:
                why = f"the run was ended by {exc} while it waited for process {pid}, which merges images of a VM"
                raise Refusal("interrupted", "", why, "That goes on. Run this again.") from exc
            now = how_far()
            if now != seen:
                seen, deadline = now, time.monotonic() + seconds
    return bool(others)


class _Told(t.NamedTuple):
    """What a file tells of a merge."""

    pid: int
    bytes: int
    vm: str | None


def _told() -> list[_Told]:
    """Return what is told of the merges that move data now."""
    read = (read_note(os.path.join(FOLDER, name), _MOST) for name in _names() if name.endswith(_SUFFIX))
    found = (_parsed(text) for text in read if text is not None)  # one may have ended meanwhile
    return [told for told in found if told is not None and os.path.exists(f"/proc/{told.pid}")]


def _parsed(text: bytes) -> _Told | None:
    """Return what the text of a file tells; None if it is none of ours, or not whole."""
    try:
        about = json.loads(text)
        vm = about["vm"]
        return _Told(int(about["pid"]), int(about["bytes"]), vm if isinstance(vm, str) else None)
    except (ValueError, TypeError, KeyError):
        return None


def _write(path: str, text: str) -> None:
    """Write the file so that whoever reads it sees the old text or the new one."""
    if not is_private(FOLDER):
        return
    new = f"{path}.new"
    _remove(new)  # whatever it is: it is never written to
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, text.encode("utf-8"), 0)
    finally:
        os.close(fd)
    os.rename(new, path)


def _names() -> list[str]:
    """Return the names of the files; none where somebody else could have put them."""
    with contextlib.suppress(OSError):
        return os.listdir(FOLDER) if is_private(FOLDER) else []
    return []


def _remove_those_of_killed_runs() -> None:
    for name in _names():
        if not os.path.exists(f"/proc/{name.split('-')[0]}"):
            _remove(os.path.join(FOLDER, name))


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
