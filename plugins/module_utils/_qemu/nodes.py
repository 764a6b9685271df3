# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Act: open descriptors as block nodes of QEMU.

QEMU is never given a file name: it opens the very files that are open here, through /proc/PID/fd. So nobody can swap
a file between the check and the use, no name can be taken for a protocol, and the backing file is not opened at all.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Qcow2Error
from .._qcow2.image import Image
from .monitor import Monitor

# Node names; short, because the overlay's is sent once for each bitmap.
_ACTIVE = "a"
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
    ask_for_bitmaps(monitor, active)
    compare_bitmaps(monitor, active)


def ask_for_bitmaps(monitor: Monitor, active: Witnessed) -> None:
    """Have QEMU open ACTIVE, say what it sees, and close it."""
    node: dict[str, t.Any] = {
        "driver": "qcow2",
        "node-name": _ACTIVE,
        "read-only": True,
        # The locks are held already, through the very same open file; see locks.
        "force-share": True,
        "backing": None,
        "file": {"driver": _file_driver(active.fd), "filename": name_for_qemu(active.fd), "locking": "off"},
    }
    if active.image.has_data_file:  # the data plays no part here, so it stays closed
        node["data-file"] = {"driver": "null-co", "size": active.image.virtual_size}
    monitor.send("blockdev-add", node)
    monitor.send("query-named-block-nodes", {"flat": True})
    monitor.send("blockdev-del", {"node-name": _ACTIVE})


def compare_bitmaps(monitor: Monitor, active: Witnessed) -> None:
    """Receive QEMU's answers and raise when it sees other bitmaps than were read."""
    _fd, path, image = active
    try:
        monitor.receive(extra_seconds(len(image.bitmaps)))
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


def extra_seconds(bitmaps: int) -> float:
    """Return what a step with so many bitmaps may take longer than one without."""
    return bitmaps * _SECONDS_PER_BITMAP


def _file_driver(fd: int) -> str:
    """Return the name of QEMU's driver for the open file or block device."""
    return "host_device" if os.fstat(fd).st_rdev else "file"


def name_for_qemu(fd: int) -> str:
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
