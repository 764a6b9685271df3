# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read and decide: everything about one disk, its chain, its bitmaps and what they are worth for backups."""

from __future__ import annotations

import collections
import contextlib
import os
import typing as t

from .._base.errors import Qcow2Error, printable
from .._base.files import close_image, open_image
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, walk_chain, why_unusable
from .._qcow2.dirty import DirtyMap, counting_cost, dirty_bytes
from .._qcow2.header import SECTOR
from .._qcow2.image import Image
from .._qemu.settled import is_open_for_writing, read_settled
from .bitmap_rules import Checkpoint, LayerBitmaps, judge_all

MAX_BITMAPS_OF_CHAIN = 16384
MAX_BITMAP_BYTES = 64 << 30  # of the bits of all bitmaps of one chain; each look at them takes seconds
MAX_TABLE_ENTRIES = 1 << 22  # of all bitmap tables of one chain, which are held in memory
MAX_COUNTED_BITS = 1 << 33  # of one disk; looking at more takes minutes
_ATTEMPTS = 3  # at a disk that changes while its dirty bytes are counted
_SHOWN_FAULTS = 10  # of one disk
_COMPAT = {2: "0.10", 3: "1.1"}  # as qemu-img names the versions


class ExaminedLayer(t.NamedTuple):
    """One image of the chain as it was read."""

    layer: Layer
    fd: int
    image: Image | None  # with its bitmaps; None when it is raw
    in_use: bool
    actual_size: int  # bytes on its file system
    maps: dict[str, DirtyMap]  # by the name of the bitmap; of those that hold what is stored
    dirty: dict[str, int]  # bytes by the name of the bitmap, as far as they were counted

    @property
    def is_bottom(self) -> bool:
        """Whether nothing is below it, as far as that can be known: what other formats say is not read."""
        if self.image is not None:
            return self.image.backing_file is None
        return self.layer.format in (None, "raw")

    def link(self) -> LayerBitmaps:
        """Return what matters for the checkpoints."""
        return LayerBitmaps(
            path=self.layer.path,
            virtual_size=self.layer.virtual_size,
            bitmaps={bitmap.name: bitmap for bitmap in self.image.bitmaps} if self.image else {},
            in_use=self.in_use,
            lost_bitmaps=self.image.lost_bitmaps if self.image else 0,
        )

    def map_all(self) -> None:
        """Map all bitmaps that hold what is stored, which checks their tables; Qcow2Error when one is damaged."""
        if self.image is not None and not self.in_use:
            for bitmap, table in zip(self.image.bitmaps, self.image.bitmap_tables):
                if not bitmap.inconsistent:
                    self.maps[bitmap.name] = DirtyMap(self.fd, self.layer.path, self.image, bitmap, table)

    def is_unchanged(self) -> bool:
        """Whether the open image still is as it was read."""
        if self.image is None:
            return True
        image, in_use = read_settled(self.fd, self.layer.path)
        return (image, in_use or is_open_for_writing(self.fd, self.layer.path)) == (self.image, self.in_use)


class ExaminedChain(t.NamedTuple):
    """A disk as it was examined."""

    path: str  # as asked for
    members: list[ExaminedLayer]  # top to base
    is_complete: bool  # the members are the whole chain
    checkpoints: list[Checkpoint]
    dirty: dict[str, int]  # bytes by the name of the checkpoint, as far as they were counted
    problem: str | None  # why not everything could be read
    warning: str | None

    @property
    def links(self) -> list[LayerBitmaps]:
        """What matters of the chain for a checkpoint."""
        return [member.link() for member in self.members]

    def faults(self, name: str | None) -> list[str]:
        """Return why incremental backups are not possible, since this checkpoint or since any of them."""
        invalid = [one for one in self.checkpoints if one.valid is False and name in (None, one.name)]
        faults = [
            f"{self.path}: checkpoint {one.name!r} is not valid ({one.problem} in {one.image}). {one.advice}"
            for one in invalid[:_SHOWN_FAULTS]
        ]
        if len(invalid) > _SHOWN_FAULTS:
            faults.append(f"{self.path}: {len(invalid) - _SHOWN_FAULTS} more checkpoints are not valid.")
        lost = sum(member.image.lost_bitmaps for member in self.members if member.image)
        if name is not None and all(one.name != name for one in self.checkpoints) and not self.problem:
            faults.append(
                f"{self.path}: no image of its chain has the checkpoint {name!r}. Make a full backup with it."
            )
        elif lost and not self.checkpoints:
            faults.append(
                f"{self.path}: its {lost} bitmaps are worthless, because a program that does not know bitmaps has "
                "written to it. Make a full backup with a new checkpoint."
            )
        return [printable(fault) for fault in faults]

    def as_result(self) -> dict[str, t.Any]:
        """Return the disk as the module returns it."""
        return {
            "path": printable(self.path),
            "in_use": self.members[0].in_use if self.members else None,
            "images": [_image_as_result(member) for member in self.members],
            "checkpoints": [{**one.as_result(), "dirty_bytes": self.dirty.get(one.name)} for one in self.checkpoints],
            **({"msg": printable(self.problem)} if self.problem else {}),
        }


def examine_chain(path: str, follow: bool, count: bool, image_format: str | None = None) -> ExaminedChain:
    """Return everything about the disk with this topmost image; what is wrong there is in the answer.

    follow: down to the base, not only the topmost image. count: the dirty bytes too. image_format: of the topmost
    image, where it is known.
    """
    for _attempt_number in range(_ATTEMPTS):
        with contextlib.ExitStack() as held:
            disk = _examine(path, follow, count, image_format, held)
            # A VM that starts and stops meanwhile moves its bitmaps, and the figures would be of nothing.
            if not count or all(member.is_unchanged() for member in disk.members):
                return disk
    for member in disk.members:
        member.dirty.clear()
    disk.dirty.clear()
    return disk._replace(warning=f"{path}: is being changed again and again, so dirty bytes are not counted.")


def _examine(
    path: str, follow: bool, count: bool, image_format: str | None, held: contextlib.ExitStack
) -> ExaminedChain:
    """Return everything about the disk, with images that held closes."""
    members: list[ExaminedLayer] = []
    dirty: dict[str, int] = {}
    warning: str | None = None
    problem = _attempt(path, lambda: _read(path, follow, image_format, members, held))
    complete = problem is None and members[-1].is_bottom
    checkpoints = judge_all([member.link() for member in members], complete)
    if count and _is_too_much(members, checkpoints):
        warning = f"{path}: has so many bits set in its bitmaps that dirty bytes are not counted."
    elif count:
        counting_problem = _attempt(path, lambda: _count(members, checkpoints, dirty))
        problem = problem or counting_problem
    return ExaminedChain(path, members, complete, checkpoints, dirty, problem, warning)


def _attempt(path: str, step: t.Callable[[], None]) -> str | None:
    """Return why a step failed, or None."""
    try:
        step()
    except Qcow2Error as exc:
        return str(exc)
    except OSError as exc:
        return f"{path}: its chain cannot be read: {exc.strerror}. Check its storage and its permissions."
    return None


def _read(
    path: str, follow: bool, image_format: str | None, members: list[ExaminedLayer], held: contextlib.ExitStack
) -> None:
    """Add the images of the chain to members, top to base, with descriptors that held closes."""
    if not os.path.isabs(path):
        raise Qcow2Error(f"{path!r}: is not an absolute path. Give the full path of the topmost image.")
    top = open_image(path)
    held.callback(close_image, top)
    # Without a definition the format of the topmost image is recorded nowhere; it decides only what is read and shown.
    chain = walk_chain(top, path, image_format, with_bitmaps=False)
    held.callback(chain.close)
    totals: collections.Counter[str] = collections.Counter()
    for layer, fd in chain:
        own = os.dup(fd)
        held.callback(close_image, own)
        member = _member(layer, own)
        _add_up(member, totals)
        members.append(member)
        member.map_all()
        if member.image is not None and member is members[0]:
            _check_usable(member.image, layer.path)
        if not follow:
            break


def _add_up(member: ExaminedLayer, totals: collections.Counter[str]) -> None:
    """Add an image to the totals of its chain; raise when that has more bitmaps, or larger, than can be handled."""
    image = member.image
    if image is None:
        return
    totals["bitmaps"] += len(image.bitmaps)
    totals["bytes"] += sum(bitmap.data_bytes(image.virtual_size) for bitmap in image.bitmaps)
    totals["entries"] += sum(table.entries for table in image.bitmap_tables)
    if totals["bitmaps"] > MAX_BITMAPS_OF_CHAIN:
        problem = f"has more than {MAX_BITMAPS_OF_CHAIN}, too many to report"
    elif totals["bytes"] > MAX_BITMAP_BYTES or totals["entries"] > MAX_TABLE_ENTRIES:
        problem = f"has {totals['bytes'] >> 20} MiB of them in {totals['entries']} clusters, too much to be looked at"
    else:
        return
    raise Qcow2Error(
        f"{member.layer.path}: with its bitmaps the chain {problem}. Remove those that no backup needs with "
        "'qemu-img bitmap --remove'."
    )


def _check_usable(image: Image, path: str) -> None:
    """Raise when no VM can start on the topmost image, whatever its bitmaps are."""
    problems = why_unusable(path, image)
    if problems:
        raise Qcow2Error(" ".join(problems))


def _member(layer: Layer, fd: int) -> ExaminedLayer:
    """Return an open image with its bitmaps, from a moment when nobody is about to open or close it."""
    image, in_use = (None, False) if layer.image is None else read_settled(fd, layer.path)
    actual_size = os.fstat(fd).st_blocks * SECTOR
    return ExaminedLayer(layer, fd, image, in_use or is_open_for_writing(fd, layer.path), actual_size, {}, {})


def _maps_of(name: str, members: t.Sequence[ExaminedLayer]) -> list[DirtyMap]:
    """Return the maps of the bitmaps of this name, top to base."""
    return [member.maps[name] for member in members if name in member.maps]


def _is_too_much(members: t.Sequence[ExaminedLayer], checkpoints: t.Sequence[Checkpoint]) -> bool:
    """Whether counting would take too long: each bitmap by itself, and the bitmaps of each name together."""
    maps = filter(None, (_maps_of(checkpoint.name, members) for checkpoint in checkpoints))
    return 2 * sum(map(counting_cost, maps)) > MAX_COUNTED_BITS


def _count(members: t.Sequence[ExaminedLayer], checkpoints: t.Sequence[Checkpoint], dirty: dict[str, int]) -> None:
    """Count the dirty bytes of each bitmap, and of each valid checkpoint into dirty."""
    for member in members:
        for name, own in member.maps.items():
            member.dirty[name] = dirty_bytes([own], member.layer.virtual_size)
    for checkpoint in checkpoints:
        if checkpoint.valid:
            name = checkpoint.name
            maps = _maps_of(name, members)
            is_one = len(maps) == 1
            dirty[name] = members[0].dirty[name] if is_one else dirty_bytes(maps, members[0].layer.virtual_size)


def _image_as_result(member: ExaminedLayer) -> dict[str, t.Any]:
    """Return an image as the module returns it."""
    image = member.image
    result: dict[str, t.Any] = {
        "path": member.layer.path,
        "format": "qcow2" if image else member.layer.format or "raw",
        "virtual_size": member.layer.virtual_size if image or member.layer.format in (None, "raw") else None,
        "actual_size": member.actual_size,
        "in_use": member.in_use,
        "cluster_size": image.cluster_size if image else None,
        "compat": _COMPAT[image.version] if image else None,
        "backing_file": image.backing_file if image else None,
        "backing_format": image.backing_format if image else None,
        "encrypted": image.encrypted if image else False,
        "corrupt": image.corrupt if image else False,
        "dirty": image.dirty if image else False,
        "data_file": image.data_file if image else None,
        "lost_bitmaps": image.lost_bitmaps if image else 0,
    }
    return {
        **{key: _printable(value) for key, value in result.items()},
        "bitmaps": [_bitmap_as_result(member, bitmap) for bitmap in image.bitmaps] if image else [],
    }


def _bitmap_as_result(member: ExaminedLayer, bitmap: Bitmap) -> dict[str, t.Any]:
    """Return a bitmap of an image as the module returns it."""
    return {
        "name": printable(bitmap.name),
        "granularity": bitmap.granularity,
        "recording": bitmap.recording,
        # While a process has the image open, every bitmap is marked in-use, whether it is damaged or not.
        "inconsistent": None if member.in_use else bitmap.inconsistent,
        "persistent": True,
        "dirty_bytes": member.dirty.get(bitmap.name),
    }


def _printable(value: t.Any) -> t.Any:
    """Return a value such that Ansible takes it."""
    return printable(value) if isinstance(value, str) else value
