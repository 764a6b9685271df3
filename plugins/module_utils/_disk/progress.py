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

from .._base.errors import printable
from .._base.signals import interruptible

FOLDER = "/run/kvmfleet-qcow2"
_SUFFIX = ".json"
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
        with contextlib.suppress(OSError):
            os.unlink(path)


def how_far() -> frozenset[tuple[int, int]]:
    """Return how far each merge of this host is, by its process; nothing where that cannot be read."""
    return frozenset((about["pid"], about["bytes"]) for about in _told())


def await_merges_of(vms: t.Container[str], seconds: float) -> bool:
    """Wait until every other process has ended that merges something of these VMs; return whether there was one.

    One that has not moved on for `seconds` is not waited for any more; the locks of its images will tell of it.
    """
    others = {about["pid"] for about in _told() if about["vm"] in vms and about["pid"] != os.getpid()}
    for pid in others:
        seen, deadline = how_far(), time.monotonic() + seconds
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            with interruptible():
                time.sleep(_PAUSE)
            now = how_far()
            if now != seen:
                seen, deadline = now, time.monotonic() + seconds
    return bool(others)


def _told() -> list[dict[str, t.Any]]:
    """Return what is told of the merges that move data now."""
    found = []
    with contextlib.suppress(OSError):
        for name in filter(lambda name: name.endswith(_SUFFIX), os.listdir(FOLDER)):
            with contextlib.suppress(OSError), open(os.path.join(FOLDER, name), "rb") as file:  # it may end meanwhile
                about = json.load(file)
                if os.path.exists(f"/proc/{about['pid']}"):
                    found.append(about)
    return found


def _write(path: str, text: str) -> None:
    """Write the file so that whoever reads it sees the old text or the new one."""
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode("utf-8"))
    finally:
        os.close(fd)
    os.rename(new, path)


def _remove_those_of_killed_runs() -> None:
    for name in os.listdir(FOLDER):
        if not os.path.exists(f"/proc/{name.split('-')[0]}"):
            os.unlink(os.path.join(FOLDER, name))
