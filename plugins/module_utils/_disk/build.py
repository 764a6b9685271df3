# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Act: what QEMU is told, to look at ACTIVE once more and to fill the overlay's file.

QEMU is never given a file name: it opens the very files that are open here, through /proc/PID/fd. So nobody can swap
a file between the check and the use, no name can be taken for a protocol, and the backing file is not opened at all.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Qcow2Error
from .._qcow2.header import Image
from .._qemu.monitor import Monitor
from .overlay import Verdict

# Node names; short, because the overlay's is sent once for each bitmap.
_ACTIVE = "a"
_FILE = "f"
_OVERLAY = "o"

_SECONDS_PER_BITMAP = 0.1  # that a step may take longer, on slow storage


class _Seen(t.NamedTuple):
    """A bitmap in QEMU's eyes."""

    name: str
    granularity: int  # bytes
    recording: bool
    inconsistent: bool


class Witnessed(t.NamedTuple):
    """An open ACTIVE and what was read from it, which QEMU is to confirm."""

    fd: int
    path: str
    image: Image


def cross_check(monitor: Monitor, active: Witnessed) -> None:
    """Raise when QEMU sees other bitmaps in the open ACTIVE than were read from it."""
    _ask_for_bitmaps(monitor, active)
    _compare_bitmaps(monitor, active)


def _ask_for_bitmaps(monitor: Monitor, active: Witnessed) -> None:
    """Have QEMU open ACTIVE, say what it sees, and close it."""
    node: dict[str, t.Any] = {
        "driver": "qcow2",
        "node-name": _ACTIVE,
        "read-only": True,
        # The locks are held already, through the very same open file; see _locks.
        "force-share": True,
        "backing": None,
        "file": {"driver": _file_driver(active.fd), "filename": _name_for_qemu(active.fd), "locking": "off"},
    }
    if active.image.has_data_file:  # the data plays no part here, so it stays closed
        node["data-file"] = {"driver": "null-co", "size": active.image.virtual_size}
    monitor.send("blockdev-add", node)
    monitor.send("query-named-block-nodes", {"flat": True})
    monitor.send("blockdev-del", {"node-name": _ACTIVE})


def _compare_bitmaps(monitor: Monitor, active: Witnessed) -> None:
    """Receive QEMU's answers and raise when it sees other bitmaps than were read."""
    _fd, path, image = active
    try:
        monitor.receive(_extra_seconds(len(image.bitmaps)))
    except Qcow2Error as exc:
        raise Qcow2Error(f"{path}: QEMU cannot open it. {exc}") from exc
    node = next(node for node in monitor.receive() if node["node-name"] == _ACTIVE)
    seen = {
        _Seen(entry["name"], entry["granularity"], entry["recording"], entry.get("inconsistent", False))
        for entry in node.get("dirty-bitmaps", ())
    }
    monitor.receive()
    # A bitmap that is inconsistent never records, whatever its flag says.
    read = {_Seen(b.name, b.granularity, b.recording and not b.inconsistent, b.inconsistent) for b in image.bitmaps}
    if seen != read:
        names = ", ".join(repr(name) for name in sorted({entry.name for entry in seen ^ read})[:5])
        raise Qcow2Error(
            f"{path}: QEMU sees other bitmaps in it than this module reads ({names}). Nothing was made. Please report "
            "this with the output of 'qemu-img info'."
        )


def fill(monitor: Monitor, fd: int, verdict: Verdict, backing_file: str, active: Witnessed | None) -> None:
    """Make the open, empty file the overlay of the verdict, and cross-check ACTIVE if it has a format of bitmaps.

    What became of the file must be read back.
    """
    # QEMU need not flush: the file is ours alone, and gets its one fsync before it is published.
    node = {"driver": "file", "node-name": _FILE, "filename": _name_for_qemu(fd), "cache": {"no-flush": True}}
    monitor.send("blockdev-add", node)
    creation = verdict.wanted.creation
    options: dict[str, t.Any] = {
        "driver": "qcow2",
        "file": _FILE,
        "version": "v3",
        "size": verdict.virtual_size,
        "backing-file": backing_file,
        "backing-fmt": verdict.wanted.backing_format,
        "cluster-size": creation.cluster_size,
        "extended-l2": creation.extended_l2,
        "lazy-refcounts": creation.lazy_refcounts,
        "refcount-bits": creation.refcount_bits,
        "compression-type": creation.compression_type,
    }
    monitor.run_job("blockdev-create", "create", {"options": options})
    # QEMU opens ACTIVE while its monitor is still reading the bitmaps, so all is sent before the answers are awaited.
    if active is not None:
        _ask_for_bitmaps(monitor, active)
    if verdict.bitmaps:
        _send_bitmaps(monitor, verdict)
    monitor.send("blockdev-del", {"node-name": _FILE})
    if active is not None:
        _compare_bitmaps(monitor, active)
    monitor.receive_rest(_extra_seconds(len(verdict.bitmaps)))


def _send_bitmaps(monitor: Monitor, verdict: Verdict) -> None:
    """Have QEMU add the bitmaps in one transaction and store them, which happens when the node goes away."""
    monitor.send("blockdev-add", {"driver": "qcow2", "node-name": _OVERLAY, "file": _FILE, "backing": None})
    actions = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {"node": _OVERLAY, "name": bitmap.name, "granularity": bitmap.granularity, "persistent": True},
        }
        for bitmap in verdict.bitmaps
    ]
    monitor.send("transaction", {"actions": actions}, _extra_seconds(len(actions)))
    monitor.send("blockdev-del", {"node-name": _OVERLAY})


def _extra_seconds(bitmaps: int) -> float:
    """Return what a step with so many bitmaps may take longer than one without."""
    return bitmaps * _SECONDS_PER_BITMAP


def _file_driver(fd: int) -> str:
    """Return the name of QEMU's driver for the open file or block device."""
    return "host_device" if os.fstat(fd).st_rdev else "file"


def _name_for_qemu(fd: int) -> str:
    """Return a file name under which QEMU, our child, opens the very file that is open here."""
    name = f"/proc/{os.getpid()}/fd/{fd}"
    try:
        is_ours = os.path.samestat(os.stat(name), os.fstat(fd))
    except OSError:
        is_ours = False
    if not is_ours:  # another namespace's /proc would show the files of a stranger that has our number there
        raise Qcow2Error(
            "/proc: is missing, or not that of this process's PID namespace. Mount a proc file system there."
        )
    return name
