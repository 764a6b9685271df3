# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: make overlays. The operation that overlay.py has the rules of.

::

    OVERLAY  (new, ours alone until it is published)
       │     recording bitmaps, as ACTIVE has them, with the bits of the chain below or with none
       ▼
    ACTIVE   (locked, never written to)
"""

from __future__ import annotations

import os
import typing as t

from .._base.attributes import AttributeOptions, apply_attributes, attributes_for
from .._base.errors import CHECK_STORAGE, Refusal
from .._base.files import OpenImage, open_image
from .._qcow2.bitmaps import Bitmap
from .._qcow2.image import read_image
from .._qcow2.mark import new_history, write_made, write_mark
from .._qemu.nodes import (
    ACTIVE,
    SCRATCH,
    Witness,
    add_bitmaps,
    close_file,
    close_node,
    create_image,
    extra_seconds,
    open_scratch,
)
from . import overlay
from .begun import remove_signs
from .cumulative import Maps, has_bits, lower_bits, map_chain, most_bytes, read_all, wrong_bits
from .observe import ObservedChain, observe_chain, observe_target
from .overlay import BuildSpec, OverlayRequest, OverlayVerdict
from .publish import StagedFile, publish_together
from .session import Held, Images, failed_by
from .siblings import Above, folders_beside, overlays_in
from .unfinished import why_in_the_way
from .verdict import FAILED, PRESENT

if t.TYPE_CHECKING:
    from .._qemu.monitor import Monitor


class MakeOverlays:
    """State present: every overlay that was asked for is there, complete, or does not exist. An Operation."""

    def __init__(self, attributes: AttributeOptions) -> None:
        self._attributes = attributes
        self._waiting: dict[str, list[Above]] = {}  # by folder, the images whose backing file is missing

    def problems(self, request: OverlayRequest) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""
        return overlay.request_problems(request)

    def conflicts(self, requests: t.Sequence[OverlayRequest]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""
        targets = [_place_of(request.path) for request in requests]
        return overlay.conflicts(targets, [os.path.realpath(request.backing_file) for request in requests])

    def folders(self, request: OverlayRequest) -> t.Sequence[str]:
        """Return the folder of the overlay."""
        return [os.path.dirname(request.path)]

    def refused(self, request: OverlayRequest, problems: t.Sequence[Refusal]) -> OverlayVerdict:
        """Return the verdict on a request that is refused without a look."""
        return OverlayVerdict(request, FAILED, tuple(problems))

    def judge(self, request: OverlayRequest, held: Held) -> OverlayVerdict:
        """Look at ACTIVE and at the place, and decide."""
        file = held.image(request.backing_file)
        active = self.observe(request, file)
        target = observe_target(request.path)
        verdict = overlay.decide(request, active, target)
        if verdict.state == FAILED:
            return verdict
        unfinished = why_in_the_way(active.layers, active.image.bitmaps if active.image else ())
        if verdict.changed and unfinished is not None:
            return verdict.failed(unfinished)
        if verdict.changed:
            folders = folders_beside([target.path, request.backing_file])
            verdict = overlay.with_waiting(verdict, target, self._waiting_for(target.path, folders))
            if verdict.state == FAILED:
                return verdict
        maps: Maps = {}
        if request.bitmap_content == overlay.CUMULATIVE and (verdict.changed or request.must_be_fresh):
            maps = map_chain(active, file, {bitmap.name for bitmap in verdict.bitmaps}, held.unwritten)
        if verdict.state == PRESENT:
            return overlay.with_stale(verdict, _stale_bitmaps(verdict, maps))
        if active.is_recording:
            held.hold_off_everybody(request.backing_file)
        try:
            attributes = attributes_for(file, self._attributes, request.path)
        except (Refusal, OSError) as exc:
            return failed_by(verdict, exc)  # with its warnings
        backing_file = overlay.recorded_backing_file(request, active, target)
        size = active.virtual_size
        bit_bytes = most_bytes(maps, verdict.bitmaps, request.creation.cluster_size, size)
        return verdict._replace(
            need=overlay.need(verdict, target, bit_bytes),
            spec=BuildSpec(target, backing_file, attributes, active.image, maps, bit_bytes, new_history(file)),
        )

    def _waiting_for(self, path: str, folders: t.Sequence[str]) -> list[str]:
        """Return the images in the folders that record a path at which nothing stands as their backing file.

        Each folder is looked through once in a call: every overlay of a fleet can be in one.
        """
        for folder in folders:
            if folder not in self._waiting:
                self._waiting[folder] = [one for one in overlays_in(folder) if one.backing_identity is None]
        waiting = (one for folder in folders for one in self._waiting[folder])
        return [one.path for one in waiting if os.path.realpath(one.backing_file) == path]

    def observe(self, request: OverlayRequest, file: OpenImage) -> ObservedChain:
        """Return what the open ACTIVE and the chain below it are."""
        return observe_chain(file, request.backing_format, relative=request.relative)

    def images(self, verdict: OverlayVerdict) -> Images:
        """Return ACTIVE, and before it an overlay that is there: its VM may be on it, or not yet."""
        request = verdict.request
        if verdict.state == PRESENT and request.vm is None:  # it may be the disk of any VM
            return Images(())
        above = (request.path,) if verdict.state == PRESENT else ()
        return Images((*above, request.backing_file), frozenset([request.backing_file]))

    def rehearse(self, verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
        """Have QEMU as second witness of ACTIVE, and read all bits."""
        if verdict.spec is not None:
            read_all(verdict.spec.maps, verdict.bitmaps, verdict.virtual_size or 0)
            witness = _witness(verdict, verdict.spec, held)
            if witness is not None:
                witness.ask()
                witness.close()
                witness.compare()
                held.monitor().receive_rest()
        return verdict

    def phases(self) -> t.Sequence[t.Callable[[OverlayVerdict, Held], OverlayVerdict]]:
        """Build only: an overlay writes to no image that is not ours, so there is nothing to keep."""
        return [self.build, self.renew]

    def build(self, verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
        """Make a missing overlay in a file of ours, with QEMU as second witness of ACTIVE, and read it back."""
        spec = verdict.spec
        if spec is None:
            return verdict
        monitor = held.monitor()
        staged = held.stage(spec.target.path, spec.target.folder)
        remove_signs(staged.file, spec.target.path)  # of images that had its name before
        witness = _witness(verdict, spec, held)
        _fill(monitor, staged, verdict, spec, witness)
        apply_attributes(staged.file, spec.attributes)
        os.fsync(staged.file.fd)
        _read_back(staged, verdict, spec, monitor)
        return verdict

    def renew(self, verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
        """Have an overlay that an earlier run has left be as new as the snapshot: the VM wrote to ACTIVE since."""
        if verdict.state == PRESENT and verdict.request.must_be_fresh:
            with open_image(verdict.request.path) as file:
                write_made(file, held.image(verdict.request.backing_file))
        return verdict

    def publish(
        self, verdicts: t.Sequence[OverlayVerdict], held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[OverlayVerdict]:
        """Put all new overlays into place, and the VM on them, or none."""
        publish_together(held.staged, switch)
        return verdicts


def _witness(verdict: OverlayVerdict, spec: BuildSpec, held: Held) -> Witness | None:
    """Return QEMU as witness of ACTIVE; None if that is raw. A host without QEMU is refused in either case."""
    monitor = held.monitor()
    return spec.active and Witness(monitor, held.image(verdict.request.backing_file), spec.active)


def _place_of(path: str) -> str:
    """Return the resolved path at which an overlay would be made; a dangling symlink is no way to one."""
    is_dangling = os.path.islink(path) and not os.path.exists(path)
    return path if is_dangling else os.path.realpath(path)


def _stale_bitmaps(verdict: OverlayVerdict, maps: Maps) -> list[Bitmap]:
    """Return the bitmaps of an overlay on which no VM has run that lack bits of the chain below, or have others."""
    with open_image(verdict.request.path) as file:
        return wrong_bits(maps, [b for b in verdict.bitmaps if b.name in maps], file, read_image(file))


def _fill(
    monitor: Monitor, staged: StagedFile, verdict: OverlayVerdict, spec: BuildSpec, witness: Witness | None
) -> None:
    """Make the empty file the overlay of the verdict. What became of it must be read back."""
    creation = verdict.request.creation
    create_image(
        monitor,
        staged.file,
        {
            "size": verdict.virtual_size,
            "backing-file": spec.backing_file,
            "backing-fmt": verdict.request.backing_format,
            "cluster-size": creation.cluster_size,
            "extended-l2": creation.extended_l2,
            "lazy-refcounts": creation.lazy_refcounts,
            "refcount-bits": creation.refcount_bits,
            "compression-type": creation.compression_type,
        },
    )
    if verdict.request.mark is not None:
        write_mark(staged.file, verdict.request.mark, spec.history)
    # QEMU opens ACTIVE while its monitor is still reading the bitmaps, so send all before the answers are awaited.
    if witness is None or spec.active is None:  # ACTIVE is raw, so there are no bitmaps
        close_file(monitor)
        monitor.receive_rest()
        return
    witness.ask()
    more_seconds = extra_seconds(len(verdict.bitmaps), spec.bit_bytes)
    with lower_bits(spec.maps, verdict.bitmaps, spec.active.virtual_size) as scratch:
        if scratch is not None:
            open_scratch(monitor, scratch)
        if verdict.bitmaps:
            add_bitmaps(monitor, verdict.bitmaps, _sources(spec.maps), more_seconds)
        if scratch is not None:
            close_node(monitor, SCRATCH)
        witness.close()
        close_file(monitor)
        witness.compare()
        monitor.receive_rest(more_seconds)


def _sources(maps: Maps) -> dict[str, list[str]]:
    """Return by the name of each bitmap the nodes that have bits of it: QEMU reads those of ACTIVE itself."""
    nodes = {name: [ACTIVE] * has_bits(own[:1]) + [SCRATCH] * has_bits(own[1:]) for name, own in maps.items()}
    return {name: wanted for name, wanted in nodes.items() if wanted}


def _read_back(staged: StagedFile, verdict: OverlayVerdict, spec: BuildSpec, monitor: Monitor) -> None:
    """Refuse a finished overlay that is not what it was to be: no exit code tells that bitmaps were lost."""
    image = read_image(staged.file)
    wrong = overlay.verify(verdict, spec, image)
    if not wrong:
        wrong = overlay.wrong_content(wrong_bits(spec.maps, verdict.bitmaps, staged.file, image))
    if not wrong:
        return
    words = monitor.stderr()
    why = f"was not made as it should be and is not published: {'; '.join(wrong)}"
    raise Refusal("not_verified", staged.path, why + (f". QEMU says: {words}" if words else ""), CHECK_STORAGE)
