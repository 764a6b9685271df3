# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: open descriptors as block nodes of QEMU.

Never give QEMU a file name. It opens the very files that are open here, through /proc/PID/fd: nobody can swap a file
between the check and the use, no name can be taken for a protocol, and no backing file is opened that is not given.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import QemuError, Refusal
from .._base.files import OpenImage
from .._qcow2.bitmaps import Bitmap
from .._qcow2.header import INSPECT
from .._qcow2.image import Image
from .monitor import Message, Monitor

# Node names; short, because most are sent once for each bitmap.
ACTIVE = "a"
SCRATCH = "s"
_FILE = "f"
_NEW = "o"

_SECONDS_PER_BITMAP = 0.1  # that a step may take longer, on slow storage
_SECONDS_PER_BYTE = 1 / (1 << 20)  # of bits; QEMU looks for each free cluster from the beginning


class _Seen(t.NamedTuple):
    """A bitmap in QEMU's eyes."""

    name: str
    granularity: int  # bytes
    recording: bool
    inconsistent: bool


class Witness:
    """QEMU as second witness of an open image: it must see the bitmaps that were read from it."""

    def __init__(self, monitor: Monitor, file: OpenImage, image: Image) -> None:
        self._monitor = monitor
        self._file = file
        self._image = image

    def ask(self) -> None:
        """Have QEMU open the image as the node ACTIVE, and say what it sees; do not wait for the answers."""
        self._monitor.send("blockdev-add", bitmaps_only(ACTIVE, self._file, self._image))
        self._monitor.send("query-named-block-nodes", {"flat": True})

    def close(self) -> None:
        """Have QEMU close the image; do not wait for the answer."""
        close_node(self._monitor, ACTIVE)

    def compare(self) -> None:
        """Receive the answers; Refusal if QEMU sees other bitmaps than were read."""
        path, bitmaps = self._file.path, self._image.bitmaps
        try:
            self._monitor.receive(extra_seconds(len(bitmaps)))
        except QemuError as exc:
            remedy = INSPECT if exc.code == "qemu_failed" else exc.remedy  # it only reads, so space is not the matter
            raise Refusal(exc.code, path, f"QEMU cannot open it. {exc.why}", remedy) from exc
        node = next(node for node in self._monitor.receive() if node["node-name"] == ACTIVE)
        seen = {
            _Seen(entry["name"], entry["granularity"], entry["recording"], entry.get("inconsistent", False))
            for entry in node.get("dirty-bitmaps", ())
        }
        # A bitmap that is inconsistent never records, whatever its flag says.
        read = {_Seen(b.name, b.granularity, b.recording and not b.inconsistent, b.inconsistent) for b in bitmaps}
        if seen != read:
            names = ", ".join(repr(name) for name in sorted({entry.name for entry in seen ^ read})[:5])
            raise Refusal(
                "qemu_differs",
                path,
                f"QEMU sees other bitmaps in it than this collection reads ({names}). Nothing was made",
                "Please report this with the output of 'qemu-img info'.",
            )


def create_image(monitor: Monitor, file: OpenImage, options: Message) -> None:
    """Make the open, empty file a qcow2 image with these options of blockdev-create. Call close_file() in the end.

    The backing file is only recorded, never opened.
    """
    # QEMU need not flush: the file is ours alone, and gets its one fsync before it is published.
    node = {"driver": "file", "node-name": _FILE, "filename": name_for_qemu(file), "cache": {"no-flush": True}}
    monitor.send("blockdev-add", node)
    monitor.run_job(
        "blockdev-create", "create", {"options": {"driver": "qcow2", "file": _FILE, "version": "v3", **options}}
    )


def open_scratch(monitor: Monitor, file: OpenImage) -> None:
    """Have QEMU open an image that holds nothing but bitmaps as the node SCRATCH; do not wait for the answer."""
    monitor.send("blockdev-add", bitmaps_only(SCRATCH, file, None))


def add_bitmaps(
    monitor: Monitor, bitmaps: t.Sequence[Bitmap], sources: t.Mapping[str, t.Sequence[str]], more_seconds: float
) -> None:
    """Have QEMU add recording bitmaps to the new image in one transaction; do not wait for the answers.

    `sources` has by the name of a bitmap the nodes whose bitmaps of the same name it begins with. The bitmaps are
    stored when the node goes away.
    """
    monitor.send("blockdev-add", {"driver": "qcow2", "node-name": _NEW, "file": _FILE, "backing": None})
    adding = [
        {
            "type": "block-dirty-bitmap-add",
            "data": {"node": _NEW, "name": bitmap.name, "granularity": bitmap.granularity, "persistent": True},
        }
        for bitmap in bitmaps
    ]
    merging = [
        {
            "type": "block-dirty-bitmap-merge",
            "data": {"node": _NEW, "target": name, "bitmaps": [{"node": node, "name": name} for node in nodes]},
        }
        for name, nodes in sources.items()
    ]
    monitor.send("transaction", {"actions": adding + merging}, more_seconds)
    close_node(monitor, _NEW)


def close_file(monitor: Monitor) -> None:
    """Have QEMU close the file of the new image; do not wait for the answer."""
    close_node(monitor, _FILE)


def close_node(monitor: Monitor, node: str) -> None:
    """Have QEMU close what it has open under this name; do not wait for the answer."""
    monitor.send("blockdev-del", {"node-name": node})


def extra_seconds(bitmaps: int, data_bytes: int = 0) -> float:
    """Return what a step with so many bitmaps, and so many bytes of their bits, may take longer than one without."""
    return bitmaps * _SECONDS_PER_BITMAP + data_bytes * _SECONDS_PER_BYTE


def bitmaps_only(name: str, file: OpenImage, image: Image | None) -> Message:
    """Return the node of an open image of which only the bitmaps are read; None if it is a scratch image of ours."""
    node = {
        "driver": "qcow2",
        "node-name": name,
        "read-only": True,
        # The locks are held already, through the very same open file; see locks.py.
        "force-share": True,
        "backing": None,
        "file": file_node(file),
    }
    if image is not None and image.has_data_file:  # the data plays no part here, so it stays closed
        node["data-file"] = {"driver": "null-co", "size": image.virtual_size}
    return node


def file_node(file: OpenImage) -> Message:
    """Return the node of an open file or block device, below that of its format. The locks are held by us."""
    driver = "host_device" if file.is_device else "file"
    return {"driver": driver, "filename": name_for_qemu(file), "locking": "off"}


def name_for_qemu(file: OpenImage) -> str:
    """Return a file name under which QEMU, our child, opens the very file that is open here."""
    name = f"/proc/{os.getpid()}/fd/{file.fd}"
    try:
        is_ours = os.path.samestat(os.stat(name), file.status())
    except OSError:
        is_ours = False
    if not is_ours:  # another namespace's /proc would show the files of a stranger that has our number there
        why = "is missing, or not that of this process's PID namespace"
        raise Refusal("no_proc", "/proc", why, "Mount a proc file system there.")
    return name
