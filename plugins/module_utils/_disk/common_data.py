# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: whether other tools have begun to merge an image into one further down, and gave up.

Then that one holds data of the image already ('virsh blockcommit', 'qemu-img commit -d'), and is not what it was when
the image was made.
"""

from __future__ import annotations

import os
import typing as t

from .._base.files import OpenImage
from .._qcow2.chain import Layer
from .._qcow2.mark import History
from .._qcow2.plain import Piece, PlainData
from .session import Held

_MOST_COMPARED = 1 << 23  # bytes; of clusters of 2 MiB these are four
_MOST_LOOKED_AT = 1 << 26  # bytes, with those that are zero
_MOST_TABLES = 128  # that are read to choose among; of clusters of 64 KiB these are of 64 GiB
_MOST_PIECES = 2048  # of which those are chosen that are spread over the disk; a power of two
# More than one part in so many is more than a guest writes again, if a merge may have been given up early. A VM that is
# below already may do again what it has discarded; but if it is there since a merge, that was brought to its end.
_IF_GIVEN_UP = 8
_IF_ENDED = 2
# A merge goes in order. If it was given up early, what an overlay holds first is the same, and nothing after that. A
# guest may write again what is there already: a boot sector, a superblock. It hardly does so with all that comes first,
# for four clusters of the usual size. Of large clusters one may be a single write, so that two have to be the same.
_BEGUN_BYTES = 1 << 18
_BEGUN_PIECES = 2


Placed = tuple[str, Layer]  # a layer, and where it is: a killed run can have renamed it


class Lower(t.NamedTuple):
    """An image that one above it can have been merged into. Times are in nanoseconds since 1970; 0: cannot be told."""

    layer: Layer
    history: History  # of the image above it, or what stands in for it
    written: int  # when it was last written to; 0 for a block device
    data_written: int | None = None  # the same of its external data file; None if it has none

    @property
    def may_be_written(self) -> bool:
        """Whether it may have been written to since the image above it was made, as far as that image records it.

        To remove a checkpoint or to heal one writes to it, too. What is written to an external data file can leave the
        time of the image itself as it is.
        """
        recorded = max(self.history.made, self.history.base_written)
        if 0 in (self.written, self.data_written):
            return recorded != 0
        was_written = self.history.base_written != 0 and self.written > self.history.base_written
        return was_written or (recorded != 0 and self.data_written is not None and self.data_written > recorded)


class Sample(t.NamedTuple):
    """Guest data that the upper one of two images holds itself, bytes."""

    same: int = 0  # is in the lower one at the same place
    compared: int = 0
    begun: int = 0  # is the same before the first that differs
    begun_pieces: int = 0  # in so many pieces

    @property
    def begins_alike(self) -> bool:
        """Whether so much is the same from the very start on as after a merge that was given up early."""
        return self.begun >= _BEGUN_BYTES and self.begun_pieces >= _BEGUN_PIECES

    def exceeds(self, parts: int) -> bool:
        """Whether more than one in so many parts of what was compared is the same."""
        return parts * self.same > self.compared


class Common(t.NamedTuple):
    """What two images of a chain have in common."""

    upper: str  # path
    lower: str  # path
    first: Sample  # on the disk
    spread: Sample  # over all that the upper one holds

    def is_merged(self, *, is_left: bool = False) -> bool:
        """Whether that is as much as after a merge by other tools.

        `is_left`: whether the VM is on the lower one already, as far as an earlier run has come.
        """
        parts = _IF_ENDED if is_left else _IF_GIVEN_UP
        is_begun = self.first.begins_alike and not is_left
        return is_begun or self.first.exceeds(parts) or self.spread.exceeds(parts)


def lower_of(layer: Layer, history: History, held: Held) -> Lower:
    """Return an image with when it and its external data file were written to."""
    data_file = _data_file(layer, held)
    return Lower(layer, history, layer.written(), None if data_file is None else data_file.written())


def in_common(uppers: t.Iterable[Placed], lower: Placed, held: Held) -> t.Iterator[Common]:
    """Yield what each of the upper images has in common with the lower one.

    A merge goes from the start of the disk to its end. So look at the first clusters that are not empty, and how many
    are the same before the first that differs. But a disk is written to there most, also once the merge was given up.
    So look at some of all, too.
    """
    below = _plain(lower, held)
    for upper in uppers:
        above = _plain(upper, held)
        first = _sample(above.pieces(), above, below)
        yield Common(upper[0], lower[0], first, _sample(_spread(above.pieces(_MOST_TABLES)), above, below))


def _plain(placed: Placed, held: Held) -> PlainData:
    place, layer = placed
    return PlainData(held.image(place), _data_file(layer, held))


def _sample(pieces: t.Iterable[Piece], upper: PlainData, lower: PlainData) -> Sample:
    """Return how much of these pieces the lower image holds, too, until that is enough."""
    same = compared = looked_at = begun = begun_pieces = 0
    for piece in pieces:
        data = upper.data_of(piece)
        looked_at += piece.length
        if any(data):  # a disk is full of others
            compared += len(data)
            same += len(data) if lower.read(piece.start, len(data)) == data else 0
            if same == compared:  # so far nothing differs
                begun, begun_pieces = same, begun_pieces + 1
        if compared >= _MOST_COMPARED or looked_at >= _MOST_LOOKED_AT:
            break
    return Sample(same, compared, begun, begun_pieces)


def _spread(pieces: t.Iterable[Piece]) -> t.Iterator[Piece]:
    """Yield some of the pieces, however many they are: as far as one comes, they are spread evenly over all."""
    kept: list[Piece] = []
    step = 1
    for number, piece in enumerate(pieces):
        if number % step == 0:
            kept.append(piece)
            if len(kept) > _MOST_PIECES:
                kept, step = kept[::2], 2 * step
    step = _MOST_PIECES
    yield from kept[::step]
    while step > 1:  # those in the middle between them
        yield from kept[step // 2 :: step]
        step //= 2


def _data_file(layer: Layer, held: Held) -> OpenImage | None:
    """Return the file that has the data of an image, if it names one that can be found."""
    name = layer.image.data_file if layer.image is not None else None
    return held.image(name) if name is not None and os.path.isabs(name) else None
