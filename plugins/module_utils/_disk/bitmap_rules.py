# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide: is a chain fit for an incremental backup since a checkpoint, and if not, which image breaks which rule?

Pure. The rule is libvirt's: the bitmap is in the topmost image; the images that have it are contiguous from there;
all of them are recording; none is inconsistent (libvirt, "Incremental backup internals"). One more is QEMU's: their
images have one virtual size, since bitmaps of different sizes cannot be merged, which the backup does.
"""

from __future__ import annotations

import typing as t

from .._base.errors import printable
from .._qcow2.header import Bitmap

NOT_IN_TOP = "not_in_top"
GAP = "gap"
NOT_RECORDING = "not_recording"
INCONSISTENT = "inconsistent"
DIFFERENT_SIZE = "different_size"
IN_USE = "in_use"
INCOMPLETE = "incomplete"

_FULL = "Make a full backup with a new checkpoint, and delete this checkpoint."
_REMAKE = (
    "; if the VM has never run on it, remove it and make it again with kvmfleet.qcow2.qcow2_overlay or domain_overlay. "
    "Else: "
)
_ASK_LIBVIRT = (
    "A process has the image open for writing, most likely the running VM, so what is stored tells nothing. libvirt "
    "knows more while the VM runs; or look again when it is shut off."
)
_LOOK_FURTHER = "The chain below this image was not read. Look at the whole chain, or mend it first."


class Link(t.NamedTuple):
    """What matters of one image of a chain."""

    path: str
    virtual_size: int  # bytes
    bitmaps: dict[str, Bitmap]  # by name
    in_use: bool = False  # a process has it open for writing, so what is stored tells nothing about its bitmaps
    lost_bitmaps: int = 0  # made worthless by a program that does not know them


class Checkpoint(t.NamedTuple):
    """Whether the next incremental backup since a checkpoint is possible."""

    name: str
    valid: bool | None  # None when it cannot be told
    problem: str | None = None  # one of the constants above
    image: str | None = None  # path of the image at fault
    advice: str | None = None

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the modules return it."""
        return {key: printable(value) if isinstance(value, str) else value for key, value in self._asdict().items()}


def judge_all(chain: t.Sequence[Link], complete: bool) -> list[Checkpoint]:
    """Return a verdict for each bitmap name found in the chain, top to base; complete says whether it ends with it."""
    names = dict.fromkeys(name for link in chain for name in link.bitmaps)
    return [judge(name, chain, complete) for name in names]


def judge(name: str, chain: t.Sequence[Link], complete: bool = True) -> Checkpoint:
    """Return whether this checkpoint can be used, judged from the top of the chain downwards."""
    top = chain[0]
    if not top.in_use and name not in top.bitmaps:
        return _without(name, NOT_IN_TOP, top, next((link for link in chain if name in link.bitmaps), None))
    missing: Link | None = None  # the uppermost image that lacks the bitmap
    unknown: Link | None = None
    above: Link | None = None  # the image with the bitmap just above
    for link in chain:
        bitmap = link.bitmaps.get(name)
        if link.in_use:
            unknown = unknown or link
        elif bitmap is None:
            missing = missing or link
        elif missing is not None:
            return _without(name, GAP, missing, link)
        else:
            fault = _fault(bitmap, link, above)
            if fault is not None:
                return fault
            above = link
    if unknown is not None:
        return Checkpoint(name, None, IN_USE, unknown.path, _ASK_LIBVIRT)
    if not complete:
        return Checkpoint(name, None, INCOMPLETE, chain[-1].path, _LOOK_FURTHER)
    return Checkpoint(name, True)


def _without(name: str, problem: str, missing: Link, below: Link | None) -> Checkpoint:
    """Return that an image lacks the bitmap, while one below has it, or none."""
    has = f", while {below.path} below has it" if below is not None else ""
    if missing.lost_bitmaps:
        cause = "A program that does not know bitmaps has written to this image and made its bitmaps worthless. "
    elif below is None:
        cause = "No image of the chain has it: it was removed, or the VM died in the very run in which it was made. "
    else:
        cause = "It was most likely made with qemu-img or by an offline snapshot, which drop the bitmaps"
        cause += _REMAKE if problem == NOT_IN_TOP else ". "
    return Checkpoint(
        name,
        False,
        problem,
        missing.path,
        f"This image lacks the bitmap{has}, so changes were not recorded. {cause}{_FULL}",
    )


def _fault(bitmap: Bitmap, link: Link, above: Link | None) -> Checkpoint | None:
    """Return what is wrong with the bitmap of one image."""
    problem: str | None = None
    if bitmap.inconsistent:
        problem = INCONSISTENT
        why = "The bitmap was not saved properly, as after a crash or power loss, so changes are not recorded in it."
    elif not bitmap.recording:
        problem = NOT_RECORDING
        why = "The bitmap is disabled in this image, so changes were not recorded."
    elif above is not None and above.virtual_size != link.virtual_size:
        problem = DIFFERENT_SIZE
        why = (
            f"The image has {link.virtual_size} bytes and the one above it {above.virtual_size}; QEMU cannot merge "
            "bitmaps of different sizes."
        )
    if problem is None:
        return None
    return Checkpoint(bitmap.name, False, problem, link.path, f"{why} {_FULL}")
