# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: who has an image open for writing, and an image in a moment when nothing changes in it."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import time
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage
from .._qcow2.image import Image, read_image
from . import locks

_LOOKS = 20  # at an image that somebody is opening or closing, as it seems
_PATIENCE = 5.0  # seconds for one whose header is being changed: QEMU waits for the storage in between
_PAUSE = 0.01  # seconds between two looks


def is_open_for_writing(file: OpenImage) -> bool:
    """Whether a VM or a tool has the image open for writing."""
    if locks.is_locked_by_qemu(file, locks.WRITE):
        return True
    # Of a device there can be several nodes, each with locks of its own: libvirt gives every VM a /dev of its own.
    return file.is_device and _device_is_open_for_writing(file.status().st_rdev)


def _device_is_open_for_writing(device: int) -> bool:
    """Whether any process has a node of this block device open for writing, as far as this user may see."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to see
            for number in os.listdir(f"/proc/{process}/fd"):
                status = os.stat(f"/proc/{process}/fd/{number}")
                if stat.S_ISBLK(status.st_mode) and status.st_rdev == device and _is_writable(process, number):
                    return True
    return False


def _is_writable(process: str, number: str) -> bool:
    """Whether a process has this descriptor open for writing (proc_pid_fdinfo(5), flags)."""
    with open(f"/proc/{process}/fdinfo/{number}", encoding="ascii") as file:
        flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_RDONLY


class _Look(t.NamedTuple):
    """What one look at an image shows."""

    image: Image
    open_before: bool  # a process had it open for writing before it was read
    open_after: bool
    is_ours: bool  # a run of this collection has it locked, which looks like a process that has it open

    @property
    def is_plain(self) -> bool:
        """Whether nothing hints at somebody who is opening or closing the image just now."""
        bitmaps_fit = self.open_after or not any(bitmap.inconsistent for bitmap in self.image.bitmaps)
        is_still = self.open_before == self.open_after and not self.is_ours
        return is_still and bitmaps_fit and not self.image.lost_bitmaps

    @property
    def may_be_amid_a_change(self) -> bool:
        """Whether the bitmaps may be declared worthless for a moment only."""
        return self.open_after and self.image.lost_bitmaps > 0


def _look(file: OpenImage) -> _Look:
    """Read the image between two questions for its locks."""
    before = locks.is_locked(file, locks.WRITE)
    image = read_image(file)
    after = locks.is_locked(file, locks.WRITE)
    return _Look(image, before, after, (before or after) and locks.is_locked(file, locks.OUR_TURN))


class Settled(t.NamedTuple):
    """An image, and who has it, in a moment in which nothing changes."""

    image: Image
    is_open_for_writing: bool  # by whomever
    is_in_work: bool  # by a run of this collection, not by a VM


def read_settled(file: OpenImage) -> Settled:
    """Return the image and who has it open for writing, from a moment when nothing changes in it.

    While a QEMU opens or closes an image it declares the bitmaps worthless for a moment, and then writes them anew. So
    look up to _LOOKS times, with a pause between, until two looks agree or nothing hints at such a moment. A slow
    storage can make the moment long, so go on for _PATIENCE while that is what the looks show.
    """
    seen: _Look | None = None
    error: Refusal | None = None
    deadline = time.monotonic() + _PATIENCE
    for number in itertools.count(1):
        previous = seen
        try:
            seen, error = _look(file), None
        except Refusal as exc:
            seen, error = None, exc
            if not locks.is_locked(file, locks.WRITE):
                raise
        if seen is not None and (seen.is_plain or (seen == previous and not seen.open_after)):
            break
        is_amid = seen is not None and seen.may_be_amid_a_change
        if number >= _LOOKS and (not is_amid or time.monotonic() > deadline):
            break
        time.sleep(_PAUSE)
    if seen is None:
        raise error or AssertionError("a look either shows the image or raises")
    return Settled(seen.image, seen.open_before or seen.open_after, seen.is_ours)
