# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: move the data of the upper images of a chain down into BASE.

BASE alone is open for writing, together with the images below it: QEMU fills up clusters from them. The images that go
in are open read-only, so their bitmaps stay as they are whatever happens.

A full disk pauses the job. It goes on when there is room again, and is cancelled if none comes.

While QEMU writes, the kernel is told again and again to begin putting that on the disk. Else it would begin when all is
written and fsync waits for it, or when a tenth of the host's memory waits for the disk.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing as t

from .._base.errors import QemuError, qemu_refusal
from .._base.files import OpenImage
from .monitor import Message, Monitor
from .nodes import close_node, file_node

_BASE = "b"
_TOP = "o"
_JOB = "j"
_PAUSE = 0.25  # seconds between two questions for the progress
_STEP = 32 << 20  # bytes that QEMU moves at most before it pauses for the sake of a speed


class Opened(t.NamedTuple):
    """An open image of a chain."""

    file: OpenImage
    driver: str  # QEMU's name of its format
    data_file: OpenImage | None = None


Watch = t.Callable[[int, int], None]  # is called with the bytes that are done, and with all


class Job(t.NamedTuple):
    """What all ways of moving data need."""

    monitor: Monitor
    seconds: float  # that may pass without progress
    speed: int  # bytes per second at most; 0 is no limit
    watch: Watch  # about four times a second


def commit(job: Job, layers: t.Sequence[Opened], base: t.Sequence[Opened]) -> None:
    """Have QEMU write what the layers hold, topmost first, into the first image of `base`; the others are below it."""
    job.monitor.send("blockdev-add", {"node-name": _BASE, **_writable(base)})
    job.monitor.send("blockdev-add", {"node-name": _TOP, **_read_only(layers, _BASE)})
    arguments = {"device": _TOP, "base-node": _BASE, "on-error": "enospc", "speed": job.speed}
    _run(job, "block-commit", arguments, [_TOP, _BASE], base[0])


def share(job: Job, layer: Opened, base: t.Sequence[Opened]) -> None:
    """Have QEMU copy what the layer itself holds into BASE by copy_file_range, which shares the extents.

    It copies whole units of 64 KiB. So it is right only if nothing but the layer's own clusters can be in a unit: where
    those have at least 64 KiB, and at least the size of BASE's, and no subclusters, and both have one virtual size.
    """
    job.monitor.send("blockdev-add", {"node-name": _BASE, **_writable(base)})
    job.monitor.send("blockdev-add", {"node-name": _TOP, **_read_only([layer], None)})
    arguments = {
        "device": _TOP,
        "target": _BASE,
        "sync": "top",
        "speed": job.speed,
        "on-target-error": "enospc",
        "x-perf": {"use-copy-range": True},  # not stable; 5.2 does not know it
    }
    _run(job, "blockdev-backup", arguments, [_TOP, _BASE], base[0])


def try_to_open(monitor: Monitor, chain: t.Sequence[Opened]) -> None:
    """Have QEMU open a chain for reading, and close it again; QemuError if it cannot."""
    monitor.command("blockdev-add", {"node-name": _BASE, **_read_only(chain, None)})
    close_node(monitor, _BASE)
    monitor.receive_rest()


def resize(monitor: Monitor, base: Opened, virtual_size: int, seconds: float) -> None:
    """Have QEMU give BASE this virtual size. It must have no bitmaps."""
    monitor.send("blockdev-add", {"node-name": _BASE, **_writable([base])})
    monitor.send("block_resize", {"node-name": _BASE, "size": virtual_size}, seconds)
    close_node(monitor, _BASE)
    monitor.receive_rest(seconds)


def _writable(base: t.Sequence[Opened]) -> Message:
    """Return the node of BASE with what is below it."""
    node = _node(base[0], read_only=False)
    if base[0].driver == "raw":
        return node
    return {
        **node,
        "discard": "unmap",
        # With them QEMU would not flush the data before the L2 entry that leads to it, and a cluster of BASE that it
        # fills up from below would read as zeroes after a loss of power.
        "lazy-refcounts": False,
        "backing": _read_only(base[1:], None) if base[1:] else None,
    }


def _read_only(images: t.Sequence[Opened], below: Message | str | None) -> Message:
    """Return the node of a chain of images, the topmost one first, on top of `below`."""
    backing = _read_only(images[1:], below) if images[1:] else below
    node = _node(images[0], read_only=True)
    return {**node, "backing": backing} if images[0].driver in _WITH_BACKING else node


_WITH_BACKING = ("qcow2", "qcow", "qed", "vmdk")


def _node(image: Opened, *, read_only: bool) -> Message:
    node: Message = {"driver": image.driver, "read-only": read_only, "file": file_node(image.file)}
    if not read_only:
        node["file"]["discard"] = "unmap"
    if image.data_file is not None:
        node["data-file"] = file_node(image.data_file)
    return node


def _run(job: Job, command: str, arguments: Message, nodes: t.Sequence[str], target: Opened) -> None:
    """Run a job that writes to `target` to its end, then close the nodes; QemuError if the job failed."""
    monitor = job.monitor
    try:
        monitor.start_job(command, _JOB, arguments)
    except QemuError:
        with contextlib.suppress(QemuError):  # a node that could not be opened cannot be closed either
            _close(job, nodes)  # or what takes the place of this job could not open them
        raise
    error = _follow(job, [file for file in (target.data_file, target.file) if file is not None])
    monitor.command("job-dismiss", {"id": _JOB})
    _close(job, nodes)
    if error is not None:
        raise qemu_refusal(error)


def _close(job: Job, nodes: t.Sequence[str]) -> None:
    for node in nodes:
        close_node(job.monitor, node)
    job.monitor.receive_rest(job.seconds)


def _follow(job: Job, written: t.Sequence[OpenImage]) -> str | None:
    """Return why the job has failed, when it has come to its end; None if it has not failed."""
    monitor, done, since, is_full = job.monitor, -1, time.monotonic(), False
    allowed = job.seconds + (_STEP / job.speed if job.speed else 0)
    while True:
        status = monitor.next_status(_JOB, _PAUSE)
        if status == "ready":
            monitor.command("job-complete", {"id": _JOB})
        about = next(entry for entry in monitor.command("query-jobs") if entry["id"] == _JOB)
        if about["status"] == "concluded":
            return t.cast("str | None", about.get("error"))
        job.watch(about["current-progress"], about["total-progress"])
        for file in written:
            # Does not wait: begins to write what is dirty, and drops from memory what is on the disk.
            os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        # All that is tried again after an error counts once more in the total.
        if about["current-progress"] != done or about["status"] == "ready":
            done, since, is_full = about["current-progress"], time.monotonic(), False
        # A job that was resumed runs for a moment, then it pauses again.
        is_full = is_full or about["status"] == "paused"
        if time.monotonic() - since > allowed:
            monitor.command("job-cancel", {"id": _JOB})
            return _await_end(job, is_full=is_full)
        if about["status"] == "paused" and status is None:
            monitor.command("job-resume", {"id": _JOB})


def _await_end(job: Job, *, is_full: bool) -> str:
    """Wait for the end of a job that was cancelled; return why it was."""
    while job.monitor.next_status(_JOB, job.seconds) not in ("concluded", None):
        pass
    if is_full:
        return "No space left on device"
    raise QemuError(
        "qemu_lost", f"the commit made no progress for {job.seconds:.0f} s and was cancelled", "Check the storage."
    )
