# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: have images mark for a while what those below them mark, too.

A merge leaves an image without bitmaps for a while, and a kill leaves it so. Other tools take such an image out of the
chain ('virsh blockpull'), and what is above it looks right to them. libvirt moves bits then only of bitmaps that are in
each image down to the lowest that has them; of any other one it moves none. So each image on top must be right alone.
What marks more than it has to is right.
"""

from __future__ import annotations

import contextlib
import typing as t

from .._base.files import OpenImage
from .._qcow2.dirty import DirtyBits, maps_of
from .._qcow2.image import read_image
from .._qcow2.lend import Lent, bits_to_lend, lend, take_back

Maps = t.Mapping[str, t.Sequence[DirtyBits]]  # of bitmaps by name, whose union counts


class Loan(t.NamedTuple):
    """What was lent to one image."""

    file: OpenImage
    lent: t.Sequence[Lent]
    written: int  # ns since 1970; when the image was, before


def lend_upwards(uppers: t.Sequence[OpenImage], below: Maps, virtual_size: int) -> list[Loan]:
    """Have each of these images, topmost first, mark what those under it mark, and all that `below` marks.

    `virtual_size` is how many bytes of the disk `below` is about. The caller keeps everybody from the images.
    """
    maps = {name: list(own) for name, own in below.items()}
    loans = []
    for file in reversed(uppers):
        image = read_image(file)
        loans.append(Loan(file, bits_to_lend(file, image, maps, virtual_size), file.written()))
        for name, own in maps_of(file, image).items():
            if name in maps:
                maps[name].append(own)
    try:
        for loan in loans:
            lend(loan.file, loan.lent)
    except BaseException:
        end_loans(loans)
        raise
    return loans


def end_loans(loans: t.Sequence[Loan]) -> None:
    """Have the images mark what they did before, and be as new as they were."""
    for loan in loans:
        take_back(loan.file, loan.lent)
        with contextlib.suppress(OSError):  # another user's stay new
            loan.file.put_time_back(loan.written)
