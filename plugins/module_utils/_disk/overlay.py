# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: what each overlay must be, whether what is there already is that, and why something is refused.

Pure: values in, verdicts out. The same verdicts feed the prediction of check mode, the diff and the result.
"""

from __future__ import annotations

import collections
import os
import sys
import typing as t

from .._qcow2.chain import MAX_LAYERS, has_protocol, why_unusable
from .._qcow2.header import MAX_BACKING_FILE_NAME, MAX_L1_TABLE, l1_bytes
from .._qcow2.image import Image
from .._qemu.locks import below_running_vm, in_use
from .bitmap_rules import bitmap_drift, bitmap_problems, is_expressible, names_of
from .observe import ObservedChain, Target
from .verdict import CREATED, PRESENT, OverlayRequest, SkippedBitmap, Verdict

_HEADER_ROOM = 168  # bytes that an overlay's header and extensions take, beside the name of the backing file


def request_problems(wanted: OverlayRequest) -> list[str]:
    """Return what is wrong with a request whatever the host looks like."""
    problems = []
    for option, path in (("path", wanted.path), ("backing_file", wanted.backing_file)):
        if not path.startswith("/"):
            problems.append(f"{path or repr(path)}: {option} must be an absolute path, one that begins with a slash.")
        if "\0" in path:
            problems.append(f"{path!r}: {option} has a NUL byte in it, which no file name can have. Correct it.")
        elif not is_expressible(path):
            problems.append(
                f"{path!r}: {option} is not UTF-8, or has code points that are no characters, so Ansible or QEMU's "
                "monitor cannot be given it. Rename the file."
            )
        elif not path.isascii() and sys.getfilesystemencoding() != "utf-8":
            problems.append(f"{path!r}: {option} is not ASCII, and the locale is not UTF-8. Set LC_ALL=C.UTF-8.")
    return problems + _creation_problems(wanted)


def _creation_problems(wanted: OverlayRequest) -> list[str]:
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
    times, lower = collections.Counter(targets), collections.Counter(actives)
    for path, active in zip(targets, actives):
        if times[path] > 1:
            problems.append(f"{path}: is asked for more than once in this call, perhaps through a symlink.")
        elif lower[path] > (path == active):  # an item of which it is the own ACTIVE is another matter
            problems.append(
                f"{path}: is the overlay of one item of this call and the backing file of another. Make one per "
                "call, the lower one first."
            )
        else:
            problems.append(None)
    return problems


def recorded_backing_file(wanted: OverlayRequest, active: ObservedChain, target: Target) -> str:
    """Return the name under which the overlay records ACTIVE."""
    if not wanted.relative:
        return wanted.backing_file
    name = os.path.relpath(active.chain[0].real_path, target.folder)
    return f"./{name}" if has_protocol(name) else name


def decide(wanted: OverlayRequest, active: ObservedChain, target: Target) -> Verdict:
    """Return what must become of one overlay: it is to be created, is present already, or is refused."""
    problems = [*_active_problems(active), *_place_problems(wanted, active, target)]
    if not problems and target.image is None:
        problems = _new_problems(wanted, active, target)
    elif not problems and target.image is not None:
        problems = _drift_problems(wanted, active, target, target.image)
    return _promise(wanted, active, target).with_problems(problems)


def _promise(wanted: OverlayRequest, active: ObservedChain, target: Target) -> Verdict:
    """Return the verdict for the case that nothing is wrong."""
    own = active.image.bitmaps if active.image else ()
    carried = tuple(bitmap for bitmap in own if bitmap.carries_over)
    skipped = tuple(
        SkippedBitmap(b.name, b.granularity, "inconsistent" if b.inconsistent else "disabled")
        for b in own
        if not b.carries_over
    )
    warnings = _active_warnings(active)
    if target.image is None:
        return Verdict(wanted, CREATED, (), active.virtual_size, carried, skipped, tuple(warnings))
    there = {bitmap.name: bitmap for bitmap in target.image.bitmaps}
    present = tuple(there[bitmap.name] for bitmap in carried if bitmap.name in there)
    warnings += [
        f"{target.path}: bitmap {b.name!r} has a granularity of {there[b.name].granularity} bytes, in "
        f"ACTIVE it has {b.granularity}. Backups stay right; they copy in steps of the coarser one."
        for b in carried
        if b.name in there and there[b.name].granularity != b.granularity
    ]
    return Verdict(wanted, PRESENT, (), target.image.virtual_size, present, skipped, tuple(warnings))


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
    return warnings


def _active_problems(active: ObservedChain) -> list[str]:
    """Return why nothing can be put on top of this ACTIVE."""
    problems = []
    if active.open_for_writing:
        problems.append(str(in_use(active.path)))
    image = active.image
    if image is None:
        return problems
    if image.encrypted:
        problems.append(
            f"{active.path}: is encrypted. An overlay would hold the guest's new data in plain text; not supported."
        )
    problems += why_unusable(active.path, image)
    return problems + bitmap_problems(active, image)


def _place_problems(wanted: OverlayRequest, active: ObservedChain, target: Target) -> list[str]:
    """Return why no overlay of this ACTIVE can stand at this place."""
    if target.problem is not None:
        return [target.problem]
    for depth, layer in enumerate(active.chain):
        if target.path == layer.real_path or (target.identity is not None and target.identity == layer.identity):
            if depth == 0:
                return [f"{wanted.path}: is ACTIVE itself. An overlay needs a name of its own."]
            return [
                f"{wanted.path}: is part of the backing chain of {active.path}, so the overlay would back itself. "
                "Choose another path."
            ]
    return []


def _new_problems(wanted: OverlayRequest, active: ObservedChain, target: Target) -> list[str]:
    """Return why this overlay cannot be made where nothing stands yet."""
    problems = []
    if len(active.chain) >= MAX_LAYERS:
        problems.append(
            f"{wanted.path}: its backing chain would have more than {MAX_LAYERS} images. Merge some with "
            "'qemu-img commit'."
        )
    if active.below_running_vm and active.is_recording:
        problems.append(str(below_running_vm(active.path)))
    if wanted.relative and active.chain[0].is_device:
        problems.append(
            f"{active.path}: is a block device, whose name relative to a folder may be another disk's after the next "
            "start. Leave out relative."
        )
    name = recorded_backing_file(wanted, active, target)
    if len(os.fsencode(name)) > MAX_BACKING_FILE_NAME:
        problems.append(f"{name}: is longer than the {MAX_BACKING_FILE_NAME} bytes that qcow2 records. Shorten it.")
    elif len(os.fsencode(name)) + _HEADER_ROOM > wanted.creation.cluster_size:
        problems.append(
            f"{name}: does not fit into a header of {wanted.creation.cluster_size} bytes. Use a larger cluster_size."
        )
    if l1_bytes(active.virtual_size, wanted.creation.cluster_size, wanted.creation.extended_l2) > MAX_L1_TABLE:
        problems.append(
            f"{wanted.path}: ACTIVE's {active.virtual_size} bytes are too many for a cluster_size of "
            f"{wanted.creation.cluster_size}. Use a larger cluster_size."
        )
    return problems


def _drift_problems(wanted: OverlayRequest, active: ObservedChain, target: Target, image: Image) -> list[str]:
    """Return how the image that stands there differs from the overlay that was asked for."""
    drift = []
    if target.backing_path != active.chain[0].real_path and target.backing_identity != active.chain[0].identity:
        drift.append(f"its backing file is {target.backing_path or 'none'}, not {active.chain[0].real_path}")
    elif image.backing_format != wanted.backing_format:
        drift.append(f"it records the backing format {image.backing_format or 'none'}, not {wanted.backing_format}")
    if image.virtual_size < active.virtual_size:
        drift.append(f"its virtual size is {image.virtual_size}, smaller than ACTIVE's {active.virtual_size}")
    if image.corrupt:
        drift.append("it is marked corrupt")
    if wanted.must_be_fresh:
        drift += _signs_of_use(active, target, image)
    drift += bitmap_drift(active, image, target.open_for_writing)
    if not drift:
        return []
    return [
        f"{wanted.path}: exists already, but is not the overlay that was asked for: {'; '.join(drift)}. Nothing was "
        "changed. If the VM has never run on it, remove it and run this again; a bitmap cannot be added later without "
        "losing what was written before, so if the VM has run on it, make a full backup."
    ]


def _signs_of_use(active: ObservedChain, target: Target, image: Image) -> list[str]:
    """Return why an overlay that exists already is none that was just made, for a VM that is not on it yet."""
    own = {bitmap.name for bitmap in active.image.bitmaps} if active.image else set()
    foreign = [bitmap for bitmap in image.bitmaps if bitmap.name not in own]
    signs = []
    if target.has_data:
        signs.append("it holds data, so a VM has run on it and was later put back to the image below")
    if foreign:
        signs.append(
            f"it has the bitmap {names_of(foreign)}, made while a VM ran on it, and would lack what came after"
        )
    if target.open_for_writing:
        signs.append("a process has it open for writing, most likely another VM")
    if image.virtual_size != active.virtual_size:
        signs.append(f"its virtual size is {image.virtual_size}, not ACTIVE's {active.virtual_size}")
    if image.encrypted or image.has_data_file or image.dirty:
        signs.append("it is encrypted, has a data file, or was not closed properly, so this collection has not made it")
    return signs


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
    if wanted - there:
        wrong.append(f"the bitmap {names_of(sorted(wanted - there))} is missing or different")
    if there - wanted:
        wrong.append(f"there is an unexpected bitmap {names_of(sorted(there - wanted))}")
    return wrong


def _is_power_of_two(number: int, low: int, high: int) -> bool:
    """Whether the number is a power of two within the bounds."""
    return low <= number <= high and number & (number - 1) == 0
