# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and decide: everything about one chain, its images, their bitmaps, and what these are worth for backups."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal, printable, system_refusal
from .._base.files import OpenImage, open_image, owning
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, corrupt_below, relative_data_file, walk_chain, why_unusable
from .._qcow2.dirty import DirtyMap, counting_cost, dirty_bytes, maps_of
from .._qcow2.formats import PLAIN
from .._qcow2.header import SECTOR
from .._qcow2.image import Image
from .._qemu import locks
from .._qemu.settled import is_open_for_writing, read_settled
from .bitmap_rules import INCOMPLETE, Checkpoint, LayerBitmaps, judge_all
from .chain_size import ChainSize
from .unfinished import Unfinished, left_in_vault, unfinished_work

MAX_COUNTED_BITS = 1 << 33  # of one chain; looking at more takes minutes
_ATTEMPTS = 3  # at a chain that changes while its dirty bytes are counted
_SHOWN_FAULTS = 10  # of one chain
_COMPAT = {2: "0.10", 3: "1.1"}  # as qemu-img names the versions


class ExaminedLayer(t.NamedTuple):
    """One image of the chain as it was read."""

    layer: Layer
    image: Image | None  # with its bitmaps; None if it is not qcow2
    is_open_for_writing: bool
    actual_size: int  # bytes on its file system
    modified: int | None  # seconds since 1970, of the last write; None if that cannot be told, as of a block device
    dirty: t.Mapping[str, int]  # bytes by the name of the bitmap, as far as they were counted

    def bitmaps(self) -> LayerBitmaps:
        """Return what the rules about checkpoints need."""
        return LayerBitmaps(
            path=self.layer.path,
            virtual_size=self.layer.virtual_size,
            bitmaps={bitmap.name: bitmap for bitmap in self.image.bitmaps} if self.image else {},
            is_open_for_writing=self.is_open_for_writing,
            lost_bitmaps=self.image.lost_bitmaps if self.image else 0,
            lost_names=self.image.lost_names if self.image else None,
            modified=self.modified,
            made=self.image.made if self.image else 0,
            is_flattened=self.image is not None and self.image.is_flattened,
        )

    def as_result(self) -> dict[str, t.Any]:
        """Return the image in the form in which the modules return it."""
        layer, image = self.layer, self.image
        result: dict[str, t.Any] = {
            "path": layer.path,
            "format": layer.format_found,
            "virtual_size": layer.virtual_size if image or layer.format_found in PLAIN else None,
            "actual_size": self.actual_size,
            "in_use": self.is_open_for_writing,
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
            **{key: printable(value) if isinstance(value, str) else value for key, value in result.items()},
            "bitmaps": [self._bitmap_as_result(bitmap) for bitmap in image.bitmaps] if image else [],
        }

    def _bitmap_as_result(self, bitmap: Bitmap) -> dict[str, t.Any]:
        return {
            "name": printable(bitmap.name),
            "granularity": bitmap.granularity,
            "recording": bitmap.recording,
            # While a process has the image open, every bitmap is marked in-use, whether it is damaged or not.
            "inconsistent": None if self.is_open_for_writing else bitmap.inconsistent,
            "persistent": True,
            "dirty_bytes": self.dirty.get(bitmap.name),
        }


class ExaminedChain(t.NamedTuple):
    """A chain as it was examined."""

    path: str  # of the topmost image, as asked for
    layers: tuple[ExaminedLayer, ...]  # top to base
    is_complete: bool  # `layers` is the whole chain
    checkpoints: tuple[Checkpoint, ...]
    dirty: t.Mapping[str, int]  # bytes by the name of the checkpoint, as far as they were counted
    dirty_top: t.Mapping[str, int]  # of these what the topmost image's bitmap alone says
    problem: Refusal | None  # why not everything could be read
    warnings: tuple[str, ...]
    unfinished: tuple[Unfinished, ...] = ()  # work of killed runs on its images
    is_in_work: bool = False  # whether a run of this collection is at that just now

    def bitmaps(self) -> list[LayerBitmaps]:
        """Return what the rules about checkpoints need, top to base."""
        return [layer.bitmaps() for layer in self.layers]

    def faults(self, name: str | None) -> list[Refusal]:
        """Return why incremental backups are not possible, since the checkpoint `name`, or since any of them."""
        asked = [one for one in self.checkpoints if name in (None, one.name)]
        invalid = [one for one in asked if one.valid is False or one.problem == INCOMPLETE]
        faults = [
            Refusal("not_valid", self.path, f"checkpoint {one.name!r} {_why_not_valid(one)}", one.advice or "")
            for one in invalid[:_SHOWN_FAULTS]
        ]
        if len(invalid) > _SHOWN_FAULTS:
            why = f"{len(invalid) - _SHOWN_FAULTS} more checkpoints are not valid"
            faults.append(Refusal("not_valid", self.path, why))
        return [*faults, *self._absent(name)]

    def _absent(self, name: str | None) -> list[Refusal]:
        """Return why the checkpoint `name`, or any at all, is not in the chain although it should be."""
        lost = sum(one.image.lost_bitmaps for one in self.layers if one.image)
        if name is not None and all(one.name != name for one in self.checkpoints) and not self.problem:
            why = f"no image of its chain has the checkpoint {name!r}"
            return [Refusal("no_checkpoint", self.path, why, "Make a full backup with it, or correct the name.")]
        if lost and not self.checkpoints:
            why = f"its {lost} bitmaps are worthless, because a program that does not know bitmaps has written to it"
            return [Refusal("lost_bitmaps", self.path, why, "Make a full backup with a new checkpoint.")]
        return []

    def _figures(self, name: str) -> dict[str, t.Any]:
        """Return what was counted of a checkpoint.

        The bits of the topmost image's bitmap are among those of the chain, so equal sums mean equal bits.
        """
        whole, top = self.dirty.get(name), self.dirty_top.get(name)
        return {"dirty_bytes": whole, "dirty_bytes_top": top, "top_alone": None if whole is None else whole == top}

    def _told_unfinished(self) -> t.Iterator[str]:
        """Yield what is unfinished, and which call completes it."""
        yield from map(str, self.unfinished)
        if self.is_in_work:
            yield "But a run of this collection is working on the chain just now. Wait for its end."

    def as_result(self) -> dict[str, t.Any]:
        """Return the chain in the form in which qcow2_info returns a disk."""
        return {
            "path": printable(self.path),
            "in_use": self.layers[0].is_open_for_writing if self.layers else None,
            "images": [layer.as_result() for layer in self.layers],
            "checkpoints": [{**one.as_result(), **self._figures(one.name)} for one in self.checkpoints],
            "unfinished": printable(" ".join(self._told_unfinished())) or None,
            **({"msg": str(self.problem), "code": self.problem.code} if self.problem else {}),
        }


def examine_chain(
    path: str,
    *,
    follow: bool,
    count: bool,
    image_format: str | None = None,
    created: t.Mapping[str, int] | None = None,
) -> ExaminedChain:
    """Return everything about the chain with this topmost image; what is wrong there is in the answer.

    :param follow: down to the base, not only the topmost image.
    :param count: the dirty bytes too.
    :param image_format: of the topmost image, where it is known.
    :param created: when checkpoints were made, by the name of their bitmaps, in seconds since 1970, as far as known.
    """
    attempts = _ATTEMPTS
    while True:
        attempts -= 1
        with _Examination(path, created or {}) as examination:
            examination.read(follow=follow, image_format=image_format)
            examination.doubt()
            if count:
                examination.count()
            # A VM that starts and stops meanwhile moves its bitmaps, and the figures would be of nothing.
            is_settled = not count or examination.is_unchanged()
            if is_settled or not attempts:
                return examination.result(with_figures=is_settled)


class _OpenLayer:
    """An image of the chain while it is open."""

    def __init__(self, layer: Layer, file: OpenImage) -> None:
        """Read the image in a moment when nobody is about to open or close it."""
        self.layer = layer
        self.file = file
        self.image, self.is_open_for_writing = self._look()
        status = file.status()
        self.actual_size = status.st_blocks * SECTOR
        self.modified = None if file.is_device else int(status.st_mtime)
        self.maps: dict[str, DirtyMap] = {}  # by the name of the bitmap; of those that hold what is stored
        self.dirty: dict[str, int] = {}  # bytes by the name of the bitmap

    def _look(self) -> tuple[Image | None, bool]:
        if self.layer.image is None:
            return None, is_open_for_writing(self.file)
        settled = read_settled(self.file)
        return settled.image, settled.is_open_for_writing or is_open_for_writing(self.file)

    def is_unchanged(self) -> bool:
        """Whether the image still is as it was read."""
        return self.image is None or self._look() == (self.image, self.is_open_for_writing)

    def map_bitmaps(self) -> None:
        """Map all bitmaps that hold what is stored, which checks their tables; Refusal if one is damaged."""
        if self.image is not None and not self.is_open_for_writing:
            self.maps = maps_of(self.file, self.image)

    def examined(self, *, with_figures: bool = True) -> ExaminedLayer:
        """Return the image as it was read, without anything that is open."""
        return ExaminedLayer(
            layer=self.layer,
            image=self.image,
            is_open_for_writing=self.is_open_for_writing,
            actual_size=self.actual_size,
            modified=self.modified,
            dirty=self.dirty if with_figures else {},
        )


class _Examination:
    """One attempt at a chain. The end of the block closes its images."""

    def __init__(self, path: str, created: t.Mapping[str, int]) -> None:
        self._path = path
        self._created = created
        self._held = contextlib.ExitStack()
        self._layers: list[_OpenLayer] = []  # top to base
        self._size = ChainSize()
        self._is_complete = False
        self._checkpoints: list[Checkpoint] = []
        self._dirty: dict[str, int] = {}  # bytes by the name of the checkpoint
        self._problem: Refusal | None = None
        self._warnings: list[str] = []
        self._unfinished: list[Unfinished] = []

    def __enter__(self) -> _Examination:
        return self

    def __exit__(self, *exc: t.Any) -> None:
        self._held.__exit__(*exc)

    def read(self, *, follow: bool, image_format: str | None) -> None:
        """Read the images, top to base, as far as that is possible, and judge the checkpoints."""
        with self._problem_told():
            if not os.path.isabs(self._path):
                why = "is not an absolute path"
                raise Refusal("bad_name", repr(self._path), why, "Give the full path of the topmost image.")
            top = self._held.enter_context(open_image(self._path))
            # The format of the topmost image is recorded nowhere; it decides only what is read and shown.
            chain = walk_chain(top, image_format)
            self._held.callback(chain.close)
            for layer, file in chain:
                self._add(layer, file)
                if not follow:
                    break
            bottom = self._layers[-1].layer
            self._is_complete = bottom.is_bottom()
            self._problem = bottom.why_not_read()
        layers = [one.examined().bitmaps() for one in self._layers]
        self._checkpoints = judge_all(layers, complete=self._is_complete, created=self._created)

    def _add(self, layer: Layer, file: OpenImage) -> None:
        """Add an image, with a descriptor of its own, since the walk closes the one that it has."""
        new = _OpenLayer(layer, self._held.enter_context(owning(layer.path, os.dup(file.fd))))
        if new.image is not None:
            self._size.add(layer.path, new.image)
        self._layers.append(new)
        new.map_bitmaps()
        if new.image is not None:
            relative = relative_data_file(layer.path, new.image)
            self._warnings += [str(relative)] if relative else []
            problems = why_unusable(layer.path, new.image, for_writing=len(self._layers) == 1)
            if problems:
                raise problems[0].with_note(" ".join(map(str, problems[1:])))

    @contextlib.contextmanager
    def _problem_told(self) -> t.Iterator[None]:
        """Remember the first problem of the block instead of raising it."""
        try:
            yield
        except Refusal as exc:
            self._problem = self._problem or exc
        except OSError as exc:
            self._problem = self._problem or system_refusal(exc, self._path, "its chain cannot be read")

    def doubt(self) -> None:
        """Look for what is unfinished, and take back the verdict on what it leaves in doubt."""
        top = self._layers[0].image if self._layers else None
        layers = [one.layer for one in self._layers]
        with self._problem_told():
            self._unfinished = unfinished_work(layers, top.bitmaps if top else ()) if layers else []
        self._checkpoints = [left_in_vault(one.name, self._unfinished) or one for one in self._checkpoints]

    def count(self) -> None:
        """Count the dirty bytes of each bitmap, and of each valid checkpoint, unless that would take too long."""
        together = [self._maps_of(checkpoint.name) for checkpoint in self._checkpoints]
        if 2 * sum(counting_cost(maps) for maps in together if maps) > MAX_COUNTED_BITS:
            self._warnings.append(
                f"{self._path}: has so many bits set in its bitmaps that dirty bytes are not counted."
            )
            return
        with self._problem_told():
            for one in self._layers:
                for name, own in one.maps.items():
                    one.dirty[name] = dirty_bytes([own], one.layer.virtual_size)
            for checkpoint in self._checkpoints:
                if checkpoint.valid:
                    self._dirty[checkpoint.name] = self._dirty_bytes_since(checkpoint.name)

    def _dirty_bytes_since(self, name: str) -> int:
        """Return what the next backup since a valid checkpoint copies; of a single bitmap that was counted already."""
        maps = self._maps_of(name)
        top = self._layers[0]
        return top.dirty[name] if len(maps) == 1 else dirty_bytes(maps, top.layer.virtual_size)

    def _maps_of(self, name: str) -> list[DirtyMap]:
        """Return the maps of the bitmaps of this name, top to base."""
        return [one.maps[name] for one in self._layers if name in one.maps]

    def is_unchanged(self) -> bool:
        """Whether all images still are as they were read; one that cannot be read any more is not."""
        try:
            return all(one.is_unchanged() for one in self._layers)
        except (Refusal, OSError):
            return False

    def result(self, *, with_figures: bool) -> ExaminedChain:
        """Return what was found, without the figures if they are of different moments."""
        layers = [one.layer for one in self._layers]
        changing = f"{self._path}: is being changed again and again, so dirty bytes are not counted."
        return ExaminedChain(
            path=self._path,
            layers=tuple(one.examined(with_figures=with_figures) for one in self._layers),
            is_complete=self._is_complete,
            checkpoints=tuple(self._checkpoints),
            dirty=self._dirty if with_figures else {},
            dirty_top=self._layers[0].dirty if self._dirty and with_figures else {},
            problem=self._problem,
            warnings=(
                *self._warnings,
                *corrupt_below(self._path, layers),
                *([] if with_figures else [changing]),
            ),
            unfinished=tuple(self._unfinished),
            is_in_work=bool(self._unfinished)
            and any(locks.is_locked(one.file, locks.OUR_TURN) for one in self._layers),
        )


def _why_not_valid(one: Checkpoint) -> str:
    """Return why backups since a checkpoint are not possible, or are not known to be."""
    if one.valid is None:
        return f"may not be valid: its chain was not read to the end, below {one.image}"
    return f"is not valid ({one.problem} in {one.image})"
