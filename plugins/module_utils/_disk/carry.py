# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: bring the bitmaps of an image that exists to what they are to be, and read them back, bit by bit.

Idempotent: what is there already is left alone, and where all is there QEMU does not even open the image.
"""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import CHECK_STORAGE, Refusal
from .._base.files import OpenImage
from .._qcow2.bitmaps import Bitmap
from .._qcow2.dirty import DirtyBits, is_union, maps_of, united
from .._qcow2.image import Image, read_image
from .._qcow2.in_use import disown_bitmaps, set_in_use
from .._qcow2.scratch import write_scratch
from .._qemu.monitor import Monitor
from .._qemu.nodes import SCRATCH
from .._qemu.rewrite import Addition, Rewriting, rewrite_bitmaps
from .cumulative import memory_image, most_bytes
from .loan import end_loans, lend_upwards
from .session import Held

_SOURCE = "r{}"  # names of nodes
_TRIES = 2  # QEMU drops lost bitmaps (autoclear bit 0) when it opens the image; the next session begins without them


class Wanted(t.NamedTuple):
    """A bitmap that an image is to have; an inconsistent one has no bits, and only stays as it is."""

    bitmap: Bitmap
    maps: t.Sequence[DirtyBits]  # whose union it is to be
    sources: t.Sequence[
        OpenImage
    ] = ()  # whose bitmaps of this name make that union, so that QEMU itself can merge them


class Place(t.NamedTuple):
    """The image that is to have the bitmaps."""

    file: OpenImage
    data_file: OpenImage | None
    virtual_size: int  # bytes; of all images that take part
    uppers: tuple[OpenImage, ...] = ()  # the images on top of it, topmost first, whose bitmaps go on with these
    below: t.Mapping[str, t.Sequence[DirtyBits]] = {}  # what images below it mark, as far as they do not take part


def bring(place: Place, wanted: t.Sequence[Wanted], held: Held, images: t.Mapping[OpenImage, Image]) -> bool:
    """Give the open image just these bitmaps; return whether anything was changed. Refusal if it has others then.

    `images` has what the sources are. A vault must have been kept.
    """
    if not wrong_bitmaps(place, wanted):
        os.fsync(place.file.fd)  # a run may have been killed before it could see to that
        return False
    # The bits that are wanted come from the image itself, too, which QEMU is about to write anew.
    with expected_bitmaps(wanted, place.virtual_size) as (scratch, expected):
        _bring_expected(place, expected, scratch, held, images)
    return True


def _bring_expected(
    place: Place, expected: t.Sequence[Wanted], scratch: OpenImage, held: Held, images: t.Mapping[OpenImage, Image]
) -> None:
    """Have QEMU write the bitmaps, a second time if they are not as they should be; Refusal if they are not then."""
    with _lending_above(place, expected, held):
        for _number in range(_TRIES):
            try:
                _rewrite(place, expected, scratch, held.monitor(), images)
                os.fsync(place.file.fd)
                wrong = wrong_bitmaps(place, expected)
            except Refusal as exc:
                held.stop_qemu()
                if _set_aside_if_broken(place.file):
                    note = f"{place.file.path} has no bitmaps until the same call has gone on; the vault has them."
                    raise exc.with_note(note) from exc
                raise
            if not wrong:
                return
            _disown_wrong(place, expected)
        raise _not_verified(place, wrong, held)


def _not_verified(place: Place, wrong: t.Sequence[str], held: Held) -> Refusal:
    words = held.monitor().stderr()
    why = f"its bitmaps are not as they should be: {'; '.join(wrong)}" + (f". QEMU says: {words}" if words else "")
    return Refusal("not_verified", place.file.path, why, CHECK_STORAGE)


@contextlib.contextmanager
def _lending_above(place: Place, wanted: t.Sequence[Wanted], held: Held) -> t.Iterator[None]:
    """Have the images above mark for the block all that this one is to mark, and what is below it.

    A kill takes the bitmaps of an image away that QEMU has open for writing, or leaves them inconsistent.
    """
    own = place.file
    before, marked = own.written(), {name: list(maps) for name, _bitmap, maps in _parts(wanted)}
    for name, maps in place.below.items():
        marked.setdefault(name, []).extend(maps)
    loans = lend_upwards(place.uppers, marked, place.virtual_size)
    try:
        yield
    except BaseException:
        held.stop_qemu()  # it may be about to open the image
        if own.is_device or own.written() != before:
            loans = []  # nobody can tell which of its bits it still has
        raise
    finally:
        end_loans(loans)


def _set_aside_if_broken(file: OpenImage) -> bool:
    """Have everybody open the image without its bitmaps if QEMU has left a directory that breaks the format.

    After a flush that failed, QEMU stores the directory once more as it ends, with tables at offset 0; no QEMU opens
    such an image. The vault has the bitmaps. Return whether it was so.
    """
    with contextlib.suppress(Refusal, OSError):  # why QEMU has failed is what is to be told
        read_image(file, with_bitmaps=False)  # or it is not the directory that is broken
        try:
            read_image(file)
        except Refusal:
            disown_bitmaps(file)
            return True
    return False


def wrong_bitmaps(place: Place, wanted: t.Sequence[Wanted]) -> list[str]:
    """Return how the bitmaps of the image, read anew, differ from those that are wanted."""
    image = read_image(place.file)
    there = {bitmap.name: bitmap for bitmap in image.bitmaps}
    to_be = {one.bitmap.name: one.bitmap for one in wanted}
    wrong = [f"{name!r} is missing" for name in to_be if name not in there]
    wrong += [f"there is {name!r}" for name in there if name not in to_be]
    wrong += [f"{name!r} is {there[name]}" for name in to_be if name in there and there[name] != to_be[name]]
    if image.lost_bitmaps:
        wrong.append(f"{image.lost_bitmaps} are lost")
    if wrong:
        return wrong
    return [f"{name!r} has other bits" for name in _with_other_bits(place, image, wanted)]


def _disown_wrong(place: Place, wanted: t.Sequence[Wanted]) -> None:
    """Have no backup use bitmaps that have other bits: the next run makes them again, by the vault."""
    set_in_use(place.file, _with_other_bits(place, read_image(place.file), wanted), in_use=True)


def _with_other_bits(place: Place, image: Image, wanted: t.Sequence[Wanted]) -> list[str]:
    """Return the names of the bitmaps that the image has, and that do not mark what they are to."""
    maps, size = maps_of(place.file, image), place.virtual_size
    return [name for name, _b, own in _parts(wanted) if name in maps and not is_union(maps[name], own, size)]


def _parts(wanted: t.Sequence[Wanted]) -> t.Iterator[tuple[str, Bitmap, t.Sequence[DirtyBits]]]:
    """Yield the bitmaps that have bits."""
    for one in wanted:
        if not one.bitmap.inconsistent:
            yield one.bitmap.name, one.bitmap, one.maps


@contextlib.contextmanager
def expected_bitmaps(wanted: t.Sequence[Wanted], size: int) -> t.Iterator[tuple[OpenImage, list[Wanted]]]:
    """Hold for the block an image in memory that has the bitmaps which are wanted, and these with its bits."""
    with memory_image() as file:
        write_scratch(file.fd, size, ((b, united(own, b.granularity, size)) for _name, b, own in _parts(wanted)))
        maps = maps_of(file, read_image(file))
        yield file, [one._replace(maps=(maps[one.bitmap.name],)) if one.bitmap.name in maps else one for one in wanted]


def _rewrite(
    place: Place,
    wanted: t.Sequence[Wanted],
    scratch: OpenImage,
    monitor: Monitor,
    images: t.Mapping[OpenImage, Image],
) -> None:
    """Have QEMU remove what cannot stay, and add and fill up the rest."""
    image = read_image(place.file)
    own, maps = {bitmap.name: bitmap for bitmap in image.bitmaps}, maps_of(place.file, image)
    size = place.virtual_size
    staying = {
        name
        for name, bitmap, expected in _parts(wanted)
        if own.get(name) == bitmap and is_union(expected[0], [*expected, maps[name]], size)  # merging only adds bits
    }
    sound = [one for one in wanted if not one.bitmap.inconsistent]
    broken = [one.bitmap.name for one in wanted if one.bitmap.inconsistent]
    short = [one for one in sound if one.bitmap.name not in staying or not _has_all(one, maps, size)]
    nodes = {file: _SOURCE.format(number) for number, file in enumerate(images)}
    additions = []
    for one in short:
        stays = one.bitmap.name in staying
        sources = [nodes[file] for file in one.sources if not (stays and file is place.file)]
        is_own_source = not stays and place.file in one.sources
        additions.append(
            Addition(one.bitmap, [SCRATCH] if is_own_source or not one.sources else sources, is_there=stays)
        )
    used = {node for addition in additions for node in addition.sources}
    sources_by_node: dict[str, tuple[OpenImage, Image | None]] = {}
    sources_by_node.update((nodes[file], (file, read)) for file, read in images.items() if nodes[file] in used)
    if SCRATCH in used:
        sources_by_node[SCRATCH] = (scratch, None)
    rewriting = Rewriting(
        file=place.file,
        data_file=place.data_file,
        remove=[name for name in own if name not in staying and name not in broken],
        add=additions,
        sources=sources_by_node,
        bit_bytes=most_bytes(
            {name: expected for name, _b, expected in _parts(wanted)},
            [one.bitmap for one in sound],
            image.cluster_size,
            size,
        ),
    )
    rewrite_bitmaps(monitor, rewriting)


def _has_all(one: Wanted, maps: t.Mapping[str, DirtyBits], size: int) -> bool:
    return is_union(one.maps[0], [maps[one.bitmap.name]], size)
