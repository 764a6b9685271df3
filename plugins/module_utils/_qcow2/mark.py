# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and write: the mark in the header of an overlay, which tells whose snapshot it is, and what becomes of it.

By name and place alone, snapshot "web1" of the image debian.qcow2 and the clone debian.web1.qcow2 of a template are the
same. The mark is a header extension of a type of our own. Whoever does not know it ignores it (qcow2 spec, Header
extensions); QEMU keeps it whatever it does with the image, and gives it to no other image.
"""

from __future__ import annotations

import os
import re
import time
import typing as t

from .._base.files import OpenImage
from .header import (
    BACKING_FILE,
    BACKING_FILE_AT,
    EXTENSION,
    each_extension,
    end_of_extensions,
    extension_bytes,
    read_as_qemu,
    read_header,
)

EXT_MARK = 0x6B766D66  # "kvmf"
_UNTIL_SWITCHED = 60_000_000_000  # nanoseconds in which a VM that runs still writes to the image below
# The lines behind those of the mark. Their length never changes, so that they are changed in place.
_HISTORY = re.compile("base_written=([0-9]{20})\nbase_inode=([0-9]{20})\nmade=([0-9]{20})\nleaving=([01])")


class Mark(t.NamedTuple):
    """Which snapshot an overlay is."""

    vm: str  # UUID of the domain
    target: str  # of the disk, such as vda
    snapshot: str


class History(t.NamedTuple):
    """What an overlay tells of its life. Those that versions before 1.1 have made tell nothing."""

    base_written: int = 0  # nanoseconds since 1970: the last write to the image below that is right; 0: not known
    base_inode: int = 0  # of the image below; 0: not known
    made: int = 0  # nanoseconds since 1970: when the overlay was made
    leaving: bool = False  # whether its VM is being put on the image below, or was, so that it is to go

    @property
    def settled(self) -> int:
        """When all was written that the image below holds of before the snapshot, in nanoseconds since 1970.

        What runs has its bitmaps stored there as it is switched to the overlay. 0 if that is not known.
        """
        return max(self.base_written, self.made) + _UNTIL_SWITCHED if self.base_written else 0


_NEW = History()


def mark_from(data: bytes | None) -> Mark | None:
    """Return the mark that the data of the extension holds: a line for each field, and lines that are not known yet."""
    lines = _lines_of(data)
    return Mark(*lines[:3]) if len(lines) >= 3 else None


def history_from(data: bytes | None) -> History | None:
    """Return the history that the data of the extension holds; None if it holds none."""
    found = _HISTORY.match("\n".join(_lines_of(data)[3:]))
    return History(int(found[1]), int(found[2]), int(found[3]), found[4] == "1") if found else None


def _lines_of(data: bytes | None) -> list[str]:
    try:
        return (data or b"").decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return []


def mark_bytes(mark: Mark | None) -> int:
    """Return how many bytes of the header the mark takes."""
    return len(_extension_of(mark, _NEW)) if mark else 0


def write_mark(file: OpenImage, mark: Mark, history: History = _NEW) -> None:
    """Give an image that QEMU has just made its mark. The image is ours alone; nobody has it open as qcow2.

    The extension goes behind all others, as QEMU has it when it writes the header anew: libvirt does not round up the
    length of an extension, so it finds none behind one whose length is no multiple of 8. The end of the extensions, and
    the name of the backing file behind it, move up.
    """
    header = read_header(file)
    start, length = header.backing_offset, header.backing_length
    area, added = file.read(start + length, 0), _extension_of(mark, history)
    end = end_of_extensions(area, header, file.path)
    place = header.extensions_end if end is None else end - EXTENSION.size
    area = area[:place] + added + area[place:]
    behind = BACKING_FILE_AT + BACKING_FILE.size
    area = area[:BACKING_FILE_AT] + BACKING_FILE.pack(start + len(added), length) + area[behind:]
    os.pwrite(file.fd, area, 0)


def write_leaving(file: OpenImage, *, leaving: bool) -> None:
    """Record whether an image is to go; it is on stable storage then. Nothing if it has no history to record it in.

    Nobody has the image open as qcow2: QEMU would write the header anew as it has read it. One byte changes.
    """
    _change_history(file, lambda history: history._replace(leaving=leaving))


def write_base(file: OpenImage, base: OpenImage) -> None:
    """Record what the image below is now, since the one between has gone into it; as write_leaving() does."""
    now = new_history(base)
    _change_history(file, lambda history: history._replace(base_written=now.base_written, base_inode=now.base_inode))


def write_made(file: OpenImage, base: OpenImage) -> None:
    """Have an overlay be as new as if it was made now, on the image below as it is; as write_leaving() does."""
    now = new_history(base)
    _change_history(file, lambda _history: now)


def new_history(base: OpenImage) -> History:
    """Return the history of an overlay that is made now, on an open image."""
    inode = 0 if base.is_device else base.status().st_ino
    return History(base_written=base.written(), base_inode=inode, made=time.time_ns())


def _change_history(file: OpenImage, change: t.Callable[[History], History]) -> None:
    header = read_header(file)
    area = read_as_qemu(file, header.cluster_size, 0)
    marks = [(start, data) for kind, start, data in each_extension(area, header, file.path) if kind == EXT_MARK]
    found = history_from(marks[-1][1]) if marks else None
    if found is None or change(found) == found:
        return
    start, data = marks[-1]
    old, new = (_history_lines(one).encode("ascii") for one in (found, change(found)))
    differ = [place for place, (one, other) in enumerate(zip(old, new)) if one != other]
    file.overwrite([(start + data.index(b"\n" + old) + 1 + differ[0], new[differ[0] : differ[-1] + 1])])


def _extension_of(mark: Mark, history: History) -> bytes:
    return extension_bytes(EXT_MARK, "\n".join([*mark, _history_lines(history)]).encode("utf-8"))


def _history_lines(history: History) -> str:
    base = f"base_written={history.base_written:020d}\nbase_inode={history.base_inode:020d}"
    return f"{base}\nmade={history.made:020d}\nleaving={history.leaving:d}"
