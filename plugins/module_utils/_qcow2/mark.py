# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and write: the mark in the header of an overlay, which tells whose snapshot it is.

By name and place alone, snapshot "web1" of the image debian.qcow2 and the clone debian.web1.qcow2 of a template are the
same. The mark is a header extension of a type of our own. Whoever does not know it ignores it (qcow2 spec, Header
extensions); QEMU keeps it whatever it does with the image, and gives it to no other image.
"""

from __future__ import annotations

import os
import typing as t

from .._base.files import OpenImage
from .header import (
    BACKING_FILE,
    BACKING_FILE_AT,
    EXTENSION,
    end_of_extensions,
    extension_bytes,
    read_header,
)

EXT_MARK = 0x6B766D66  # "kvmf"


class Mark(t.NamedTuple):
    """Which snapshot an overlay is."""

    vm: str  # UUID of the domain
    target: str  # of the disk, such as vda
    snapshot: str


def mark_from(data: bytes | None) -> Mark | None:
    """Return the mark that the data of the extension holds: a line for each field, and lines that are not known yet."""
    try:
        lines = (data or b"").decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return None
    return Mark(*lines[:3]) if len(lines) >= 3 else None


def mark_bytes(mark: Mark | None) -> int:
    """Return how many bytes of the header the mark takes."""
    return len(_extension_of(mark)) if mark else 0


def write_mark(file: OpenImage, mark: Mark) -> None:
    """Give an image that QEMU has just made its mark. The image is ours alone; nobody has it open as qcow2.

    The extension goes behind all others, as QEMU has it when it writes the header anew: libvirt does not round up the
    length of an extension, so it finds none behind one whose length is no multiple of 8. The end of the extensions, and
    the name of the backing file behind it, move up.
    """
    header = read_header(file)
    start, length = header.backing_offset, header.backing_length
    area, added = file.read(start + length, 0), _extension_of(mark)
    end = end_of_extensions(area, header, file.path)
    place = header.extensions_end if end is None else end - EXTENSION.size
    area = area[:place] + added + area[place:]
    behind = BACKING_FILE_AT + BACKING_FILE.size
    area = area[:BACKING_FILE_AT] + BACKING_FILE.pack(start + len(added), length) + area[behind:]
    os.pwrite(file.fd, area, 0)


def _extension_of(mark: Mark) -> bytes:
    return extension_bytes(EXT_MARK, "\n".join(mark).encode("utf-8"))
