# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Write: the flag in-use of bitmaps, in place, by which no backup uses them; and that no bitmap of an image counts.

QEMU sets it too, but takes all bitmaps away for a moment, names included. Here four bytes of the directory change: a
kill, or a power loss, leaves each bitmap with the flag or without it.
"""

from __future__ import annotations

import struct
import typing as t

from .._base.errors import CHECK_STORAGE, Refusal
from .._base.files import OpenImage
from .bitmaps import BITMAP_ENTRY, FLAG_IN_USE
from .extensions import read_extensions
from .header import AUTOCLEAR, AUTOCLEAR_AT, AUTOCLEAR_BITMAPS, read_as_qemu, read_header, text_of
from .image import read_image

_FLAGS = struct.Struct(">I")
_FLAGS_AT = 12  # bytes from the beginning of an entry (qcow2 spec, Bitmap directory entry)


def set_in_use(file: OpenImage, names: t.Collection[str], *, in_use: bool) -> None:
    """Set or clear the flag of these bitmaps of the image, on stable storage; Refusal if it is not so afterwards.

    The caller keeps everybody else from the image.
    """
    if not names:
        return
    file.overwrite(
        (place, _FLAGS.pack(flags | FLAG_IN_USE if in_use else flags & ~FLAG_IN_USE))
        for name, (place, flags) in _flags_of(file).items()
        if name in names
    )
    there = {bitmap.name: bitmap.inconsistent for bitmap in read_image(file).bitmaps}
    if any(there.get(name) != in_use for name in names):
        why = f"was to have the flag in-use {'set' if in_use else 'cleared'}, but has not when it is read back"
        raise Refusal("not_verified", file.path, why, CHECK_STORAGE)


def disown_bitmaps(file: OpenImage) -> None:
    """Have no program count on the bitmaps of the image, on stable storage; Refusal if it is not so afterwards.

    Clear autoclear bit 0 (qcow2 spec, Header), as a program does that writes to the image and knows no bitmaps. The
    caller keeps everybody else from the image.
    """
    file.overwrite([(AUTOCLEAR_AT, AUTOCLEAR.pack(read_header(file).autoclear & ~AUTOCLEAR_BITMAPS))])
    if read_image(file).bitmaps:
        raise Refusal("not_verified", file.path, "was to lose its bitmaps, but has them still", CHECK_STORAGE)


def _flags_of(file: OpenImage) -> dict[str, tuple[int, int]]:
    """Return for each bitmap where its flags are, and what they are."""
    read_image(file)  # which refuses a directory that is damaged
    header = read_header(file)
    extension = read_extensions(read_as_qemu(file, header.cluster_size, 0), header, file.path).bitmaps
    found: dict[str, tuple[int, int]] = {}
    if extension is None or not extension.is_trusted:
        return found
    directory = file.read(extension.size, extension.offset)
    position = 0
    while position < len(directory):
        _table, _size, flags, _kind, _bits, length, _extra = BITMAP_ENTRY.unpack_from(directory, position)
        start = position + BITMAP_ENTRY.size
        name = text_of(directory[start : start + length])
        if name is not None:
            found[name] = extension.offset + position + _FLAGS_AT, flags
        position = (start + length + 7) // 8 * 8
    return found
