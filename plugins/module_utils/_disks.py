# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read and decide: everything about one disk, its chain, its bitmaps and what they are worth for backups."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ._chain import Layer, walk_chain
from ._checkpoints import Checkpoint, Link, judge_all
from ._dirty import DirtyMap, dirty_bytes
from ._errors import Qcow2Error, printable
from ._image import MAX_ALL_BITMAP_DATA, SECTOR, Bitmap, Image, open_image
from ._observe import is_written, read_settled

_COMPAT = {2: "0.10", 3: "1.1"}  # as qemu-img names the versions


class _Member(t.NamedTuple):
    """One image of the chain as it was read."""

    layer: Layer
    fd: int
    image: Image | None  # with its bitmaps; None when it is raw
    in_use: bool
    actual_size: int  # bytes on its file system
    dirty: dict[str, int]  # bytes by the name of the bitmap, as far as they were counted

    def link(self) -> Link:
        """Return what matters for the checkpoints."""
        return Link(
            path=self.layer.path,
            virtual_size=self.layer.virtual_size,
            bitmaps={bitmap.name: bitmap for bitmap in self.image.bitmaps} if self.image else {},
            in_use=self.in_use,
            lost_bitmaps=self.image.lost_bitmaps if self.image else 0,
        )

    def maps(self) -> dict[str, DirtyMap]:
        """Return the bits of all bitmaps, by name, that hold what is stored; Qcow2Error when one is damaged."""
        if self.image is None or self.in_use:
            return {}
        return {
            bitmap.name: DirtyMap(self.fd, self.layer.path, self.image, bitmap, table)
            for bitmap, table in zip(self.image.bitmaps, self.image.bitmap_tables)
            if not bitmap.inconsistent
        }


class Disk(t.NamedTuple):
    """A disk as it was examined."""

    path: str  # as asked for
    members: list[_Member]  # top to base
    is_complete: bool  # the members are the whole chain
    checkpoints: list[Checkpoint]
    dirty: dict[str, int]  # bytes by the name of the checkpoint, as far as they were counted
    problem: str | None  # why not everything could be read
    warning: str | None

    @property
    def links(self) -> list[Link]:
        """What matters of the chain for a checkpoint."""
        return [member.link() for member in self.members]

    @property
    def faults(self) -> list[str]:
        """Why incremental backups since some of the checkpoints are not possible."""
        return [
            printable(f"{self.path}: checkpoint {one.name!r} is not valid ({one.problem} in {one.image}). {one.advice}")
            for one in self.checkpoints
            if one.valid is False
        ]

    def as_result(self) -> dict[str, t.Any]:
        """Return the disk as the module returns it."""
        return {
            "path": printable(self.path),
            "in_use": self.members[0].in_use if self.members else None,
            "images": [_image_as_result(member) for member in self.members],
            "checkpoints": [self._checkpoint_as_result(checkpoint) for checkpoint in self.checkpoints],
            **({"msg": printable(self.problem)} if self.problem else {}),
        }

    def _checkpoint_as_result(self, checkpoint: Checkpoint) -> dict[str, t.Any]:
        """Return a checkpoint as the module returns it."""
        result = {key: _printable(value) for key, value in checkpoint._asdict().items()}
        return {**result, "dirty_bytes": self.dirty.get(checkpoint.name)}


def examine(path: str, follow: bool, count: bool) -> Disk:
    """Return everything about the disk with this topmost image; what is wrong there is in the answer.

    follow: down to the base, not only the topmost image. count: the dirty bytes too.
    """
    members: list[_Member] = []
    dirty: dict[str, int] = {}
    warning: str | None = None
    with contextlib.ExitStack() as held:
        problem = _attempt(path, lambda: _read(path, follow, members, held))
        last = members[-1].image if members else None
        complete = problem is None and (last is None or last.backing_file is None)
        checkpoints = judge_all([member.link() for member in members], complete)
        if count and _too_much(members):
            limit = MAX_ALL_BITMAP_DATA >> 20
            warning = printable(f"{path}: has more than {limit} MiB of bitmaps, so dirty bytes are not counted.")
        elif count:
            counting_problem = _attempt(path, lambda: _count(members, checkpoints, dirty))
            problem = problem or counting_problem
    return Disk(path, members, complete, checkpoints, dirty, problem, warning)


def _attempt(path: str, step: t.Callable[[], None]) -> str | None:
    """Return why a step failed, or None."""
    try:
        step()
    except Qcow2Error as exc:
        return str(exc)
    except OSError as exc:
        return f"{path}: its chain cannot be read: {exc.strerror}. Check its storage and its permissions."
    return None


def _read(path: str, follow: bool, members: list[_Member], held: contextlib.ExitStack) -> None:
    """Add the images of the chain to members, top to base, with descriptors that held closes."""
    if not os.path.isabs(path) or "\0" in path:
        raise Qcow2Error(f"{path!r}: is not an absolute path. Give the full path of the topmost image.")
    top = open_image(path)
    held.callback(os.close, top)
    # Which format the topmost image has is recorded nowhere; here it decides only what is read and shown.
    chain = walk_chain(top, path, None, with_bitmaps=False)
    held.callback(chain.close)
    for layer, fd in chain:
        own = os.dup(fd)
        held.callback(os.close, own)
        members.append(_member(layer, own))
        if not follow:
            break


def _member(layer: Layer, fd: int) -> _Member:
    """Return an open image with its bitmaps, from a moment when nobody is about to open or close it."""
    image, in_use = (None, False) if layer.image is None else read_settled(fd, layer.path)
    actual_size = os.fstat(fd).st_blocks * SECTOR
    return _Member(layer, fd, image, in_use or is_written(fd, layer.path), actual_size, {})


def _too_much(members: t.Sequence[_Member]) -> bool:
    """Whether counting would take too long: as much as an image made to harm can demand."""
    images = [member.image for member in members if member.image]
    whole = sum(bitmap.data_bytes(image.virtual_size) for image in images for bitmap in image.bitmaps)
    return whole > MAX_ALL_BITMAP_DATA


def _count(members: t.Sequence[_Member], checkpoints: t.Sequence[Checkpoint], dirty: dict[str, int]) -> None:
    """Count the dirty bytes of each bitmap, and of each valid checkpoint into dirty."""
    maps = [member.maps() for member in members]
    for member, own in zip(members, maps):
        for name, one in own.items():
            member.dirty[name] = dirty_bytes([one], member.layer.virtual_size)
    for checkpoint in checkpoints:
        if checkpoint.valid:
            name = checkpoint.name
            chain = [own[name] for own in maps if name in own]
            dirty[name] = (
                dirty_bytes(chain, members[0].layer.virtual_size) if len(chain) > 1 else members[0].dirty[name]
            )


def _image_as_result(member: _Member) -> dict[str, t.Any]:
    """Return an image as the module returns it."""
    image = member.image
    result: dict[str, t.Any] = {
        "path": member.layer.path,
        "format": "qcow2" if image else member.layer.format or "raw",
        "virtual_size": member.layer.virtual_size,
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


def _bitmap_as_result(member: _Member, bitmap: Bitmap) -> dict[str, t.Any]:
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
