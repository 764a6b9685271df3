# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what each overlay must be, whether what is there already is that, and why something is refused.

Values in, verdicts out: nothing is read here. build.py acts on the verdicts.
"""

from __future__ import annotations

import collections
import os
import sys
import typing as t

from .._base.attributes import Attributes
from .._base.errors import Refusal, printable
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import MAX_LAYERS, corrupt_below, has_protocol, relative_data_file, why_unusable
from .._qcow2.header import MAX_BACKING_FILE_NAME, MAX_L1_TABLE, l1_bytes
from .._qcow2.image import Image
from .._qcow2.mark import History, Mark, mark_bytes
from .._qemu.locks import below_running_vm, in_use
from .bitmap_rules import OLDER, bitmap_problems, carries_over, is_expressible, names_of
from .drift import MAY_GO, drift_problems
from .observe import DEVICE, FOLDER, OTHER_FILE, ObservedChain, Target
from .retire import is_kept
from .verdict import CREATED, FAILED, PRESENT, Need, problem_fields

if t.TYPE_CHECKING:
    from .cumulative import Maps

# What the bits of a new bitmap are.
CUMULATIVE = "cumulative"  # those of the chain below
EMPTY = "empty"  # none, as in a snapshot by libvirt

_HEADER_ROOM = 168  # bytes that an overlay's header and extensions take, beside the name of the backing file
_SMALLEST_BLOCK = 4096  # bytes of a file system
# Why nothing can be made, and the way out, by what stands at the place.
_OCCUPIED = {
    FOLDER: ("names a folder", "Give the full name of the overlay's file."),
    DEVICE: (
        "is a block device. An overlay on a block device is not supported yet (ACTIVE may be on one)",
        "Give the name of a file.",
    ),
    OTHER_FILE: (
        "exists already and is not a qcow2 image. Nothing is ever replaced, and it may be the raw disk of a VM",
        "Give the overlay another name or folder, or move it away if nobody needs it.",
    ),
}


class Creation(t.NamedTuple):
    """How a new overlay is laid out; the names are those of qemu-img create -o."""

    cluster_size: int = 65536  # bytes
    extended_l2: bool = False
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: str = "zlib"


class OverlayRequest(t.NamedTuple):
    """One overlay as it was asked for."""

    path: str
    backing_file: str
    backing_format: str = "qcow2"
    vm: str | None = None
    relative: bool = False
    creation: Creation = Creation()
    bitmap_content: str = CUMULATIVE
    must_be_fresh: bool = False  # the VM is not on it yet, so one that exists already must be ours and hold no data
    mark: Mark | None = None  # that a new one is to bear
    created: tuple[tuple[str, int], ...] = ()  # bitmaps of known checkpoints, and when these were made, s since 1970


class SkippedBitmap(t.NamedTuple):
    """A bitmap that no backup can use afterwards: of ACTIVE, that its overlay does not go on recording; of BASE."""

    name: str
    granularity: int  # bytes
    reason: str  # disabled, inconsistent or older; in a commit also gap or raw


class BuildSpec(t.NamedTuple):
    """How a new overlay is to be made."""

    target: Target
    backing_file: str  # as the overlay records it
    attributes: Attributes
    active: Image | None  # None if it is raw
    maps: Maps  # what the bitmaps begin with; nothing for one that begins empty
    bit_bytes: int  # that the bits take at most
    history: History  # for an overlay that gets a mark


class OverlayVerdict(t.NamedTuple):
    """What is to become, or became, of one overlay."""

    request: OverlayRequest
    state: str  # created, present or failed
    problems: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    virtual_size: int | None = None  # bytes
    bitmaps: tuple[Bitmap, ...] = ()
    skipped: tuple[SkippedBitmap, ...] = ()
    need: Need | None = None
    spec: BuildSpec | None = None  # of one that is to be created

    @property
    def changed(self) -> bool:
        """Whether it is to be made, or was made."""
        return self.state == CREATED

    def failed(self, *problems: Refusal) -> OverlayVerdict:
        """Return this verdict as a failure, with these problems beside those that it has."""
        return OverlayVerdict(self.request, FAILED, (*self.problems, *problems), self.warnings)

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        return {
            "path": printable(self.request.path),
            "backing_file": printable(self.request.backing_file),
            "backing_format": self.request.backing_format,
            "virtual_size": self.virtual_size,
            "state": self.state,
            "bitmaps": [{"name": b.name, "granularity": b.granularity} for b in self.bitmaps],
            "skipped_bitmaps": [b._asdict() for b in self.skipped],
            **problem_fields(self.problems),
        }

    def as_diff(self) -> tuple[t.Any, t.Any]:
        """Return what a diff shows: nothing before, the new overlay after."""
        after = {
            "backing_file": printable(self.request.backing_file),
            "backing_format": self.request.backing_format,
            "virtual_size": self.virtual_size,
            "bitmaps": {bitmap.name: bitmap.granularity for bitmap in self.bitmaps},
        }
        return None, after


def request_problems(request: OverlayRequest) -> list[Refusal]:
    """Return what is wrong with a request whatever the host looks like."""
    return name_problems(path=request.path, backing_file=request.backing_file) + _creation_problems(request)


def name_problems(**paths: str) -> list[Refusal]:
    """Return what is wrong with these paths, by the option that each was given in."""
    problems = []
    for option, path in paths.items():
        if not path.startswith("/"):
            why = f"{option} must be an absolute path, one that begins with a slash"
            problems.append(Refusal("bad_name", path or repr(path), why))
        if "\0" in path:
            why = f"{option} has a NUL byte in it, which no file name can have"
            problems.append(Refusal("bad_name", repr(path), why, "Correct it."))
        elif not is_expressible(path):
            why = (
                f"{option} is not UTF-8, or has code points that are no characters, so Ansible or QEMU's monitor "
                "cannot be given it"
            )
            problems.append(Refusal("bad_name", repr(path), why, "Rename the file."))
        elif not path.isascii() and sys.getfilesystemencoding() != "utf-8":
            why = f"{option} is not ASCII, and the locale is not UTF-8"
            problems.append(Refusal("bad_name", repr(path), why, "Set LC_ALL=C.UTF-8."))
    return problems


def _creation_problems(request: OverlayRequest) -> list[Refusal]:
    """Return what QEMU would refuse about the creation options."""
    creation = request.creation
    rules = {
        "cluster_size must be a power of two from 512 to 2M bytes": _is_power_of_two(
            creation.cluster_size, 512, 1 << 21
        ),
        "refcount_bits must be a power of two from 1 to 64": _is_power_of_two(creation.refcount_bits, 1, 64),
        "extended_l2 needs a cluster_size of at least 16K": not creation.extended_l2 or creation.cluster_size >= 16384,
    }
    return [Refusal("bad_option", request.path, rule) for rule, holds in rules.items() if not holds]


def conflicts(targets: t.Sequence[str], actives: t.Sequence[str]) -> list[Refusal | None]:
    """Return for each overlay of one call what is wrong with it beside the others; all paths are resolved."""
    problems: list[Refusal | None] = []
    times, lower = collections.Counter(targets), collections.Counter(actives)
    for path, active in zip(targets, actives):
        if times[path] > 1:
            below = " and of ".join(dict.fromkeys(other for place, other in zip(targets, actives) if place == path))
            why = f"is asked for more than once in this call, perhaps through a symlink, on top of {below}"
            problems.append(Refusal("repeated", path, why, "Name it once."))
        elif lower[path] > (path == active):  # an overlay that is its own ACTIVE is another matter
            why = "is the overlay of one item of this call and the backing file of another"
            problems.append(Refusal("repeated", path, why, "Make one per call, the lower one first."))
        else:
            problems.append(None)
    return problems


def recorded_backing_file(request: OverlayRequest, active: ObservedChain, target: Target) -> str:
    """Return the name under which the overlay records ACTIVE."""
    if not request.relative:
        return request.backing_file
    name = os.path.relpath(active.layers[0].real_path, target.folder)
    return f"./{name}" if has_protocol(name) else name


def decide(request: OverlayRequest, active: ObservedChain, target: Target) -> OverlayVerdict:
    """Return what must become of one overlay: it is to be created, is present already, or is refused."""
    problems = [*_active_problems(active), *_place_problems(request, active, target)]
    if not problems and target.image is None:
        problems = _new_problems(request, active, target)
    elif not problems and target.image is not None:
        problems = drift_problems(request, active, target, target.image)
    promise = _promise(request, active, target)
    return promise.failed(*problems) if problems else promise


def _promise(request: OverlayRequest, active: ObservedChain, target: Target) -> OverlayVerdict:
    """Return the verdict for the case that nothing is wrong."""
    own = active.image.bitmaps if active.image else ()
    there = {bitmap.name: bitmap for bitmap in target.image.bitmaps} if target.image else {}
    earlier = active.earlier_bitmaps(dict(request.created)) - set(there)  # one that is there can be the checkpoint's
    reasons = {bitmap.name: _why_skipped(bitmap, earlier) for bitmap in own}
    carried = tuple(bitmap for bitmap in own if reasons[bitmap.name] is None)
    skipped = tuple(SkippedBitmap(b.name, b.granularity, why) for b in own if (why := reasons[b.name]) is not None)
    warnings = _active_warnings(active)
    if target.image is None:
        return OverlayVerdict(
            request=request,
            state=CREATED,
            warnings=tuple(warnings),
            virtual_size=active.virtual_size,
            bitmaps=carried,
            skipped=skipped,
        )
    warnings += [
        f"{target.path}: bitmap {b.name!r} has a granularity of {there[b.name].granularity} bytes, in "
        f"ACTIVE it has {b.granularity}. Backups stay right; they copy in steps of the coarser one."
        for b in carried
        if b.name in there and there[b.name].granularity != b.granularity
    ]
    return OverlayVerdict(
        request=request,
        state=PRESENT,
        warnings=tuple(warnings),
        virtual_size=target.image.virtual_size,
        bitmaps=tuple(there[bitmap.name] for bitmap in carried if bitmap.name in there),
        skipped=skipped,
    )


def _why_skipped(bitmap: Bitmap, earlier: t.Collection[str]) -> str | None:
    """Return why an overlay does not go on recording a bitmap of ACTIVE; None if it does."""
    if not carries_over(bitmap):
        return "inconsistent" if bitmap.inconsistent else "disabled"
    return OLDER if bitmap.name in earlier else None


def _active_warnings(active: ObservedChain) -> list[str]:
    """Return what is odd about ACTIVE but no reason to refuse."""
    warnings = []
    if active.image and active.image.lost_bitmaps:
        warnings.append(
            f"{active.path}: its {active.image.lost_bitmaps} bitmaps are worthless, because a program that does not "
            "know bitmaps has written to it since (autoclear bit 0). None is carried over; make a full backup."
        )
    if active.disguised:
        warnings.append(
            f"{active.path}: is used as raw, as asked, but begins like a qcow2 image. If it is one, the VM would "
            "read garbage: then remove the overlay and use backing_format=qcow2."
        )
    return [*warnings, *corrupt_below(active.path, active.layers)]


def _active_problems(active: ObservedChain) -> list[Refusal]:
    """Return why nothing can be put on top of this ACTIVE."""
    problems = [in_use(active.path)] if active.is_open_for_writing else []
    image = active.image
    if image is None:
        return problems
    if image.encrypted:
        why = "is encrypted. An overlay would hold the guest's new data in plain text; not supported"
        problems.append(Refusal("encrypted", active.path, why))
    for layer in active.layers:
        if layer.image is not None:
            problems += why_unusable(layer.path, layer.image, for_writing=layer is active.layers[0])
            relative = relative_data_file(layer.path, layer.image)
            problems += [relative] if relative else []
    return [*problems, *bitmap_problems(active.path, image)]


def _place_problems(request: OverlayRequest, active: ObservedChain, target: Target) -> list[Refusal]:
    """Return why no overlay of this ACTIVE can stand at this place."""
    if target.problem is not None:
        return [target.problem]
    if target.stands not in _OCCUPIED:
        return _self_problems(request, active, target)
    return [Refusal("occupied", target.path, *_OCCUPIED[target.stands])]


def _self_problems(request: OverlayRequest, active: ObservedChain, target: Target) -> list[Refusal]:
    """Return why the overlay would back itself."""
    for depth, layer in enumerate(active.layers):
        if target.path == layer.real_path or (target.identity is not None and target.identity == layer.identity):
            if depth == 0:
                return [
                    Refusal("backs_itself", request.path, "is ACTIVE itself", "An overlay needs a name of its own.")
                ]
            why = f"is part of the backing chain of {active.path}, so the overlay would back itself"
            return [Refusal("backs_itself", request.path, why, "Choose another path.")]
    return []


def _new_problems(request: OverlayRequest, active: ObservedChain, target: Target) -> list[Refusal]:
    """Return why this overlay cannot be made where nothing stands yet."""
    problems = []
    if len(active.layers) >= MAX_LAYERS:
        why = f"its backing chain would have more than {MAX_LAYERS} images"
        problems.append(Refusal("chain_too_long", request.path, why, "Merge some with state=committed."))
    if active.below_running_vm and active.is_recording:
        problems.append(below_running_vm(active.path))
    if request.relative and active.layers[0].is_device:
        why = "is a block device, whose name relative to a folder may be another disk's after the next start"
        problems.append(Refusal("relative_device", active.path, why, "Leave out relative."))
    return [*problems, *_layout_problems(request, active, recorded_backing_file(request, active, target))]


def _layout_problems(request: OverlayRequest, active: ObservedChain, backing_file: str) -> list[Refusal]:
    """Return what does not fit into a header, or an L1 table, of the layout that was asked for."""
    problems = []
    cluster_size, name_bytes = request.creation.cluster_size, len(os.fsencode(backing_file))
    if name_bytes > MAX_BACKING_FILE_NAME:
        why = f"is longer than the {MAX_BACKING_FILE_NAME} bytes that qcow2 records"
        problems.append(Refusal("name_too_long", backing_file, why, "Shorten it."))
    elif name_bytes + _HEADER_ROOM + mark_bytes(request.mark) > cluster_size:
        why = f"does not fit into a header of {cluster_size} bytes"
        problems.append(Refusal("cluster_too_small", backing_file, why, "Use a larger cluster_size."))
    if l1_bytes(active.virtual_size, cluster_size, request.creation.extended_l2) > MAX_L1_TABLE:
        why = f"ACTIVE's {active.virtual_size} bytes are too many for a cluster_size of {cluster_size}"
        problems.append(Refusal("cluster_too_small", request.path, why, "Use a larger cluster_size."))
    return problems


def with_waiting(verdict: OverlayVerdict, target: Target, waiting: t.Sequence[str]) -> OverlayVerdict:
    """Return the verdict on a new overlay; it fails if images are `waiting` for a file at its path that is missing.

    With the overlay there they would look whole, and have other data. Those that are only kept are nobody's disk.
    """
    disks = [path for path in waiting if not is_kept(path)]
    if disks:
        why = f"does not exist, and is the backing file of {', '.join(disks)}, which would read other data from it"
        remedy = "Put that file back, remove what nobody needs, or give the overlay another name or folder."
        return verdict.failed(Refusal("occupied", target.path, why, remedy))
    warnings = [
        f"{path}: records the path of the new overlay {target.path} as its backing file, and reads other data from it "
        "than from the image that was there before. Remove it if nobody needs it."
        for path in waiting
    ]
    return verdict._replace(warnings=(*verdict.warnings, *warnings))


def with_stale(verdict: OverlayVerdict, stale: t.Sequence[Bitmap]) -> OverlayVerdict:
    """Return the verdict on an overlay that is there and fresh; it fails if `stale` bitmaps have not the chain's bits.

    So it is if the VM went on running on ACTIVE after a run that was interrupted.
    """
    if not stale:
        return verdict
    why = (
        f"exists and differs: its bitmap {names_of(stale)} has not the bits of the images below, as if the VM had "
        "run on ACTIVE since, or as if it was made with bitmap_content=empty"
    )
    remedy = f"{MAY_GO} Or use bitmap_content=empty."
    return verdict.failed(Refusal("differs", verdict.request.path, why, remedy))


def wrong_content(bitmaps: t.Sequence[Bitmap]) -> list[str]:
    """Return how the bits of a finished overlay, as read back, differ from what they were to be."""
    return [f"the bitmap {names_of(bitmaps)} has other bits than it was to begin with"] if bitmaps else []


def verify(verdict: OverlayVerdict, spec: BuildSpec, image: Image) -> list[str]:
    """Return how a finished overlay, as read back, differs from what it was to be; nothing if it is right."""
    expected = {
        "version": 3,
        "virtual_size": verdict.virtual_size,
        "backing_file": spec.backing_file,
        "backing_format": verdict.request.backing_format,
        "encrypted": False,
        "dirty": False,
        "corrupt": False,
        "has_data_file": False,
        "lost_bitmaps": 0,
        "mark": verdict.request.mark,
        "history": History() if verdict.request.mark is None else spec.history,
        **verdict.request.creation._asdict(),
    }
    found = {name: getattr(image, name) for name in expected}
    wrong = [f"{name} is {found[name]!r}, not {value!r}" for name, value in expected.items() if found[name] != value]
    there, wanted = set(image.bitmaps), set(verdict.bitmaps)
    if wanted - there:
        wrong.append(f"the bitmap {names_of(sorted(wanted - there))} is missing or different")
    if there - wanted:
        wrong.append(f"there is an unexpected bitmap {names_of(sorted(there - wanted))}")
    return wrong


def need(verdict: OverlayVerdict, target: Target, bit_bytes: int) -> Need | None:
    """Return the space that a new overlay takes; None if its file system does not say how much it has."""
    if target.free_bytes is None:
        return None
    return Need(target.device, target.folder, needed_bytes(verdict) + bit_bytes, target.free_bytes)


def needed_bytes(verdict: OverlayVerdict) -> int:
    """Return how many bytes the new overlay takes on disk at least, beside bits, where blocks are of 4 KiB or more."""
    creation, size = verdict.request.creation, verdict.virtual_size or 0
    # Header, refcount table, one refcount block, L1 table.
    needed = 3 * creation.cluster_size + l1_bytes(size, creation.cluster_size, creation.extended_l2)
    for bitmap in verdict.bitmaps:
        entries = -(-bitmap.data_bytes(size) // creation.cluster_size)
        needed += max(entries * 8, min(_SMALLEST_BLOCK, creation.cluster_size))
    return needed


def _is_power_of_two(number: int, low: int, high: int) -> bool:
    """Whether the number is a power of two within the bounds."""
    return low <= number <= high and number & (number - 1) == 0
