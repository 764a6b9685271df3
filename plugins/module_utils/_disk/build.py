# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Act: what QEMU is told, to look at ACTIVE once more and to fill the overlay's file.

QEMU is never given a file name: it opens the very files that are open here, through /proc/PID/fd. So nobody can swap
a file between the check and the use, no name can be taken for a protocol, and the backing file is not opened at all.
"""

from __future__ import annotations

import typing as t

from .._qemu.monitor import Monitor
from .._qemu.nodes import Witnessed, ask_for_bitmaps, compare_bitmaps, extra_seconds, name_for_qemu
from .verdict import Verdict

_FILE = "f"
_OVERLAY = "o"


def fill(monitor: Monitor, fd: int, verdict: Verdict, backing_file: str, active: Witnessed | None) -> None:
    """Make the open, empty file the overlay of the verdict, and cross-check ACTIVE if it has a format of bitmaps.

    What became of the file must be read back.
    """
    # QEMU need not flush: the file is ours alone, and gets its one fsync before it is published.
    node = {"driver": "file", "node-name": _FILE, "filename": name_for_qemu(fd), "cache": {"no-flush": True}}
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
        ask_for_bitmaps(monitor, active)
    if verdict.bitmaps:
        _send_bitmaps(monitor, verdict)
    monitor.send("blockdev-del", {"node-name": _FILE})
    if active is not None:
        compare_bitmaps(monitor, active)
    monitor.receive_rest(extra_seconds(len(verdict.bitmaps)))


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
    monitor.send("transaction", {"actions": actions}, extra_seconds(len(actions)))
    monitor.send("blockdev-del", {"node-name": _OVERLAY})
