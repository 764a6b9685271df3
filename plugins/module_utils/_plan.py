# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: what each overlay must be, whether what is there already is that, and why something is refused.

Pure: values in, verdicts out. The same verdicts feed the prediction of check mode, the diff and the result.
"""

from __future__ import annotations

import os
import typing as t

from . import _locks
from ._chain import has_protocol
from ._image import MAX_BACKING_FILE_NAME, MAX_BITMAP_DATA, Bitmap, Image
from ._observe import Active, Target

CREATED = "created"
PRESENT = "present"
FAILED = "failed"

_MAX_L1_TABLE = 32 * 1024 * 1024  # bytes; QEMU's QCOW_MAX_L1_SIZE


class Creation(t.NamedTuple):
    """How a new overlay is laid out; the names are those of qemu-img create -o."""

    cluster_size: int = 65536  # bytes
    extended_l2: bool = False
    lazy_refcounts: bool = False
    refcount_bits: int = 16
    compression_type: str = "zlib"


class Wanted(t.NamedTuple):
    """One overlay as it was asked for."""

    path: str
    backing_file: str
    backing_format: str = "qcow2"
    vm: str | None = None
    relative: bool = False
    creation: Creation = Creation()


class Skipped(t.NamedTuple):
    """A bitmap of ACTIVE that the overlay does not go on recording."""

    name: str
    granularity: int  # bytes
    reason: str  # disabled or inconsistent


class Verdict(t.NamedTuple):
    """What is to become, or became, of one overlay."""

    wanted: Wanted
    state: str  # created, present or failed
    problems: tuple[str, ...] = ()
    virtual_size: int | None = None  # bytes
    bitmaps: tuple[Bitmap, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[str, ...] = ()

    def failed(self, problem: str) -> Verdict:
        """Return this verdict as a failure."""
        return Verdict(self.wanted, FAILED, (*self.problems, problem), warnings=self.warnings)

    @property
    def message(self) -> str:
        """Why it failed, in one text."""
        return " ".join(self.problems)

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        result: dict[str, t.Any] = {
            "path": self.wanted.path,
            "backing_file": self.wanted.backing_file,
            "backing_format": self.wanted.backing_format,
            "virtual_size": self.virtual_size,
            "state": self.state,
            "bitmaps": [{"name": b.name, "granularity": b.granularity} for b in self.bitmaps],
            "skipped_bitmaps": [b._asdict() for b in self.skipped],
        }
        return {**result, "msg": self.message} if self.state == FAILED else result


def request_problems(wanted: Wanted) -> list[str]:
    """Return what is wrong with a request whatever the host looks like."""
    problems = []
    for option, path in (("path", wanted.path), ("backing_file", wanted.backing_file)):
        if not path.startswith("/"):
            problems.append(f"{path}: {option} must be an absolute path, one that begins with a slash.")
        if "\0" in path:
            problems.append(f"{path!r}: {option} has a NUL byte in it, which no file name can have.")
    if not _is_utf8(wanted.backing_file):
        problems.append(f"{wanted.backing_file}: is not UTF-8, so QEMU's monitor cannot be given it. Rename ACTIVE.")
    return problems + _creation_problems(wanted)


def _creation_problems(wanted: Wanted) -> list[str]:
    """Return what QEMU would refuse about the creation options."""
    creation = wanted.creation
    problems = []
    if not _is_power_of_two(creation.cluster_size, 512, 2 * 1024 * 1024):
        problems.append(f"{wanted.path}: cluster_size must be a power of two from 512 to 2M bytes.")
    if not _is_power_of_two(creation.refcount_bits, 1, 64):
        problems.append(f"{wanted.path}: refcount_bits must be a power of two from 1 to 64.")
    if creation.extended_l2 and creation.cluster_size < 16384:
        problems.append(f"{wanted.path}: extended_l2 needs a cluster_size of at least 16K.")
    return problems


def repeated_problems(targets: t.Sequence[str], actives: t.Sequence[str]) -> list[str | None]:
    """Return for each of the resolved overlay paths of one call what is wrong with it beside the others."""
    problems: list[str | None] = []
    for path in targets:
        if targets.count(path) > 1:
            problems.append(f"{path}: is asked for more than once in this call, perhaps through a symlink.")
        elif path in actives:
            problems.append(
                f"{path}: is the overlay of one item of this call and the backing file of another. Make one per "
                "call, the lower one first."
            )
        else:
            problems.append(None)
    return problems


def recorded_backing_file(wanted: Wanted, active: Active, target: Target) -> str:
    """Return the name under which the overlay records ACTIVE."""
    if not wanted.relative:
        return wanted.backing_file
    name = os.path.relpath(active.chain[0].path, target.folder)
    return f"./{name}" if has_protocol(name) else name


def decide(wanted: Wanted, active: Active, target: Target) -> Verdict:
    """Return what must become of one overlay: it is to be created, is present already, or is refused."""
    verdict = _promise(wanted, active, target)
    problems = [*_active_problems(active), *_place_problems(wanted, active, target)]
    if not problems and target.image is None:
        problems = _new_problems(wanted, active, target)
    elif not problems and target.image is not None:
        problems = _drift_problems(wanted, active, target, target.image)
    for problem in problems:
        verdict = verdict.failed(problem)
    return verdict


def _promise(wanted: Wanted, active: Active, target: Target) -> Verdict:
    """Return the verdict for the case that nothing is wrong."""
    own = active.image.bitmaps if active.image else ()
    carried = tuple(bitmap for bitmap in own if bitmap.carries_over)
    skipped = tuple(
        Skipped(b.name, b.granularity, "inconsistent" if b.inconsistent else "disabled")
        for b in own
        if not b.carries_over
    )
    warnings = _active_warnings(active)
    if target.image is None:
        return Verdict(wanted, CREATED, (), active.virtual_size, carried, skipped, tuple(warnings))
    there = {bitmap.name: bitmap for bitmap in target.image.bitmaps}
    present = tuple(there[bitmap.name] for bitmap in carried if bitmap.name in there)
    warnings += [
        f"{target.path}: bitmap {there[b.name].name!r} has a granularity of {there[b.name].granularity} bytes, in "
        f"ACTIVE it has {b.granularity}. Backups stay right; they copy in steps of the coarser one."
        for b in carried
        if b.name in there and there[b.name].granularity != b.granularity
    ]
    return Verdict(wanted, PRESENT, (), target.image.virtual_size, present, skipped, tuple(warnings))


def _active_warnings(active: Active) -> list[str]:
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
    return warnings


def _active_problems(active: Active) -> list[str]:
    """Return why nothing can be put on top of this ACTIVE."""
    problems = []
    if active.open_for_writing:
        problems.append(str(_locks.in_use(active.path)))
    image = active.image
    if image is None:
        return problems
    if image.encrypted:
        problems.append(
            f"{active.path}: is encrypted. An overlay would hold the guest's new data in plain text; not supported."
        )
    if image.corrupt:
        problems.append(
            f"{active.path}: is marked corrupt, by a QEMU that found its metadata damaged. Repair it with "
            "'qemu-img check -r all', or restore it, first."
        )
    if image.has_data_file and image.data_file is None:
        problems.append(f"{active.path}: keeps its data in an external data file but does not name it; not supported.")
    elif image.data_file is not None and has_protocol(image.data_file):
        problems.append(
            f"{active.path}: its external data file {image.data_file!r} is a protocol for QEMU, not a file. Refused: "
            "such an image can make QEMU open whatever its author wants."
        )
    return problems + [
        f"{active.path}: the bitmap name {bitmap.name!r} cannot be passed to QEMU's monitor (it is not UTF-8, or has "
        "code points that are no characters). Remove the bitmap with 'qemu-img bitmap --remove'."
        for bitmap in image.bitmaps
        if not _is_expressible(bitmap.name)
    ]


def _place_problems(wanted: Wanted, active: Active, target: Target) -> list[str]:
    """Return why no overlay of this ACTIVE can stand at this place."""
    if target.problem is not None:
        return [target.problem]
    for depth, layer in enumerate(active.chain):
        if target.path == layer.path or (target.identity is not None and target.identity == layer.identity):
            if depth == 0:
                return [f"{wanted.path}: is ACTIVE itself. An overlay needs a name of its own."]
            return [
                f"{wanted.path}: is part of the backing chain of {active.path}, so the overlay would back itself. "
                "Choose another path."
            ]
    return []


def _new_problems(wanted: Wanted, active: Active, target: Target) -> list[str]:
    """Return why this overlay cannot be made where nothing stands yet."""
    problems = []
    if active.below_running_vm and active.image and any(bitmap.recording for bitmap in active.image.bitmaps):
        problems.append(str(_locks.below_running_vm(active.path)))
    name = recorded_backing_file(wanted, active, target)
    if len(os.fsencode(name)) > MAX_BACKING_FILE_NAME:
        problems.append(f"{name}: is longer than the {MAX_BACKING_FILE_NAME} bytes that qcow2 can record.")
    if _l1_bytes(wanted.creation, active.virtual_size) > _MAX_L1_TABLE:
        problems.append(
            f"{wanted.path}: ACTIVE's {active.virtual_size} bytes are too many for a cluster_size of "
            f"{wanted.creation.cluster_size}. Use a larger cluster_size."
        )
    carried = [bitmap for bitmap in active.image.bitmaps if bitmap.carries_over] if active.image else []
    return problems + [
        f"{active.path}: bitmap {bitmap.name!r} has a granularity of {bitmap.granularity} bytes, which needs more "
        f"than {MAX_BITMAP_DATA >> 20} MiB for {active.virtual_size} bytes. QEMU stores no larger one: remove it "
        "and make a full backup with a coarser bitmap."
        for bitmap in carried
        if _bitmap_bytes(bitmap, active.virtual_size) > MAX_BITMAP_DATA
    ]


def _drift_problems(wanted: Wanted, active: Active, target: Target, image: Image) -> list[str]:
    """Return how the image that stands there differs from the overlay that was asked for."""
    drift = []
    if target.backing_path != active.chain[0].path and target.backing_identity != active.chain[0].identity:
        drift.append(f"its backing file is {target.backing_path or 'none'}, not {active.chain[0].path}")
    elif image.backing_format != wanted.backing_format:
        drift.append(f"it records the backing format {image.backing_format or 'none'}, not {wanted.backing_format}")
    if image.virtual_size < active.virtual_size:
        drift.append(f"its virtual size is {image.virtual_size}, smaller than ACTIVE's {active.virtual_size}")
    if image.corrupt:
        drift.append("it is marked corrupt")
    drift += _bitmap_drift(active, image, target.open_for_writing)
    if not drift:
        return []
    return [
        f"{wanted.path}: exists already, but is not the overlay that was asked for: {'; '.join(drift)}. Nothing was "
        "changed. If the VM has never run on it, remove it and run this again; a bitmap cannot be added later without "
        "losing what was written before, so if the VM has run on it, make a full backup."
    ]


def _bitmap_drift(active: Active, image: Image, live: bool) -> list[str]:
    """Return which bitmaps the overlay should be recording and is not; in a live one in-use means nothing."""
    there = {bitmap.name: bitmap for bitmap in image.bitmaps}
    drift = []
    for bitmap in active.image.bitmaps if active.image else ():
        if not bitmap.carries_over:
            continue
        own = there.get(bitmap.name)
        if own is None:
            drift.append(f"it lacks the bitmap {bitmap.name!r}")
        elif not own.recording:
            drift.append(f"its bitmap {bitmap.name!r} is not recording")
        elif own.inconsistent and not live:
            drift.append(f"its bitmap {bitmap.name!r} is inconsistent")
    return drift


def verify(verdict: Verdict, backing_file: str, image: Image) -> list[str]:
    """Return how a finished overlay, as read back, differs from what it was to be; nothing when it is right."""
    creation = verdict.wanted.creation
    expected = {
        "version": 3,
        "virtual_size": verdict.virtual_size,
        "backing_file": backing_file,
        "backing_format": verdict.wanted.backing_format,
        "encrypted": False,
        "dirty": False,
        "corrupt": False,
        "has_data_file": False,
        "lost_bitmaps": 0,
        **creation._asdict(),
    }
    wrong = [f"{name} is {getattr(image, name)!r}, not {value!r}" for name, value in expected.items()
             if getattr(image, name) != value]  # fmt: skip
    there, wanted = set(image.bitmaps), set(verdict.bitmaps)
    wrong += [
        f"the bitmap {bitmap.name!r} is missing or different" for bitmap in verdict.bitmaps if bitmap not in there
    ]
    return wrong + [
        f"there is an unexpected bitmap {bitmap.name!r}" for bitmap in image.bitmaps if bitmap not in wanted
    ]


def all_or_none(verdicts: t.Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts of one VM, where one failure means that none of its overlays is made."""
    failed = next((verdict for verdict in verdicts if verdict.state == FAILED), None)
    if failed is None:
        return list(verdicts)
    reason = (
        f"not made, because the overlays that belong together are made all or none and {failed.wanted.path} failed."
    )
    return [v.failed(f"{v.wanted.path}: {reason}") if v.state == CREATED else v for v in verdicts]


def needed_bytes(verdict: Verdict) -> int:
    """Return how many bytes the new overlay takes on disk at least, where blocks are of 4 KiB or larger."""
    creation, size = verdict.wanted.creation, verdict.virtual_size or 0
    needed = 3 * creation.cluster_size + _l1_bytes(creation, size)  # header, refcount table, one refcount block
    for bitmap in verdict.bitmaps:
        entries = -(-_bitmap_bytes(bitmap, size) // creation.cluster_size)
        needed += max(entries * 8, min(4096, creation.cluster_size))
    return needed


def within_space(verdicts: t.Sequence[Verdict], targets: t.Sequence[Target], free: dict[int, int]) -> list[Verdict]:
    """Return the verdicts of one VM, failed where they do not fit; free, bytes by device, is what is left for all."""
    settled = list(verdicts)
    left = dict(free)
    for index, (verdict, target) in enumerate(zip(verdicts, targets)):
        if verdict.state != CREATED or target.free_bytes is None:
            continue
        available = left.setdefault(target.device, target.free_bytes)
        needed = needed_bytes(verdict)
        if needed > available:
            settled[index] = verdict.failed(
                f"{verdict.wanted.path}: needs at least {needed} bytes in {target.folder}, where {available} are left "
                "after the overlays before it. Make room, or choose another folder."
            )
        left[target.device] = available - needed
    settled = all_or_none(settled)
    if all(verdict.state != FAILED for verdict in settled):
        free.update(left)
    return settled


def _l1_bytes(creation: Creation, virtual_size: int) -> int:
    """Return the size of the L1 table in bytes (qcow2 spec, Cluster mapping)."""
    l2_entries = creation.cluster_size // (16 if creation.extended_l2 else 8)
    return -(-virtual_size // (l2_entries * creation.cluster_size)) * 8


def _bitmap_bytes(bitmap: Bitmap, virtual_size: int) -> int:
    """Return the bytes of a bitmap's data for an image of that size."""
    return -(-virtual_size // (bitmap.granularity * 8))


def _is_power_of_two(number: int, low: int, high: int) -> bool:
    """Whether the number is a power of two within the bounds."""
    return low <= number <= high and number & (number - 1) == 0


def _is_utf8(text: str) -> bool:
    """Whether the text can be encoded, so has no surrogates that stand for bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_expressible(name: str) -> bool:
    """Whether QEMU's JSON parser takes the name: it refuses the code points that Unicode calls noncharacters."""
    return _is_utf8(name) and not any(
        0xFDD0 <= ord(character) <= 0xFDEF or ord(character) & 0xFFFE == 0xFFFE for character in name
    )
