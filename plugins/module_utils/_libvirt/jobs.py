# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: have libvirt merge an image of a domain that runs into the one below it, and follow its job to the end."""

from __future__ import annotations

import contextlib
import time
import typing as t

from .._base.errors import Refusal
from .._base.signals import Interrupted, interruptible
from .bindings import LibvirtError, libvirt, words_of
from .connection import Domain
from .running import RunningDisk, RunningImage, running_disks
from .snapshots import shut_off_meanwhile

Watch = t.Callable[[int, int], None]  # is called with the bytes that are done, and with all

_PAUSES = (0.02, 0.1, 0.5)  # seconds between two looks at a job; the last one again and again
_STEP = 32 << 20  # bytes that QEMU moves at most before it pauses for the sake of a speed
_KINDS = ("unknown", "pull", "copy", "commit", "active commit", "backup")  # virDomainBlockJobType
_OURS = (3, 4)  # commit, active commit


class Merge(t.NamedTuple):
    """What is to be merged into the image below it."""

    domain: Domain
    target: str
    path: str
    speed: int = 0  # bytes per second; 0 is no limit
    relative: bool = False  # the image above is to record the one below by a relative name


def merge_down(handle: t.Any, merge: Merge, watch: Watch, seconds: float, begin: t.Callable[[], None]) -> None:
    """Merge the image down, until it is not in the chain of the disk any more; Refusal if that fails.

    Go on with a job that runs already, as of a run that was killed. After `seconds` without progress, or after a
    signal, give the job up; then the domain keeps the chain that it has. `begin` is called before a job is begun, and
    before one is followed.
    """
    try:
        _merge_down(handle, merge, watch, seconds + (_STEP / merge.speed if merge.speed else 0), begin)
    except Interrupted:
        give_up(handle, merge.target)
        raise
    except LibvirtError as exc:
        refusal = _refusal(handle, merge, exc)
        if refusal is not None:
            raise refusal from exc


def _merge_down(handle: t.Any, merge: Merge, watch: Watch, seconds: float, begin: t.Callable[[], None]) -> None:
    started = False
    while True:
        disk = _disk_of(handle, merge)
        place = disk.place_of(merge.path)
        if place is None:
            return
        _check_mirror(disk, place, merge)
        info = handle.blockJobInfo(merge.target, 0)
        if info:
            _check_kind(info, merge)
            begin()
        else:
            if started:
                raise _ended(merge)
            begin()
            _start(handle, merge, disk, place)
            started = True
        _follow(handle, merge, watch, seconds)


def give_up(handle: t.Any, target: str) -> None:
    """End a job, if there is one; the disk keeps its chain."""
    with contextlib.suppress(LibvirtError):
        handle.blockJobAbort(target, 0)


def _disk_of(handle: t.Any, merge: Merge) -> RunningDisk:
    """Return the disk as it is now."""
    disks = [disk for disk in running_disks(handle.XMLDesc(0)) if disk.target == merge.target]
    if not handle.isActive() or not disks:
        raise shut_off_meanwhile(merge.domain)
    return disks[0]


def _check_kind(info: t.Mapping[str, int], merge: Merge) -> None:
    """Refuse a job that is no merge."""
    if info["type"] not in _OURS:
        raise _busy(merge, _KINDS[info["type"]] if info["type"] < len(_KINDS) else "unknown")


def _check_mirror(disk: RunningDisk, place: int, merge: Merge) -> None:
    """Refuse a disk that is just being written to another image than the one below."""
    if disk.mirror is None:
        return
    below = disk.images[place + 1] if place == 0 and len(disk.images) > 1 else None
    image = disk.mirror.image
    if disk.mirror.job != "active-commit" or below is None or not _is_same(image, below):
        raise _busy(merge, f"{disk.mirror.job} to {image.path or 'an image without a path'}")


def _is_same(one: RunningImage, other: RunningImage) -> bool:
    """Whether both are the same image of a chain; of a volume, which has no path, only the number tells."""
    if one.path is not None or other.path is not None:
        return one.path == other.path
    return one.number == other.number != ""


def _start(handle: t.Any, merge: Merge, disk: RunningDisk, place: int) -> None:
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    if place == 0:
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
    elif merge.relative:
        flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE
    handle.blockCommit(merge.target, disk.name_of(place + 1), disk.name_of(place), merge.speed, flags)


def _follow(handle: t.Any, merge: Merge, watch: Watch, seconds: float) -> None:
    """Return when there is no job any more; when one has the disk on both images, put the domain on the lower one."""
    seen, since, pauses = None, time.monotonic(), iter(_PAUSES)
    while True:
        info = handle.blockJobInfo(merge.target, 0)
        if not info:
            return
        _check_kind(info, merge)
        done, total = info["cur"], info["end"]
        watch(done, total)
        is_ready = info["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT and done == total
        if is_ready and _pivot(handle, merge.target):
            continue
        if (done, total) != seen:
            seen, since = (done, total), time.monotonic()
        elif time.monotonic() - since > seconds:
            give_up(handle, merge.target)
            why = f"the merge of {merge.path} made no progress for {seconds:.0f} s and was given up"
            raise Refusal("libvirt_failed", merge.domain.name, why, "Check the storage, then run this again.")
        with interruptible():
            time.sleep(next(pauses, _PAUSES[-1]))


def _pivot(handle: t.Any, target: str) -> bool:
    """Put the domain on the lower image; False if the job is not ready for that yet."""
    try:
        handle.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except LibvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
            raise
        return False
    return True


def _busy(merge: Merge, kind: str) -> Refusal:
    why = f"its disk {merge.target} has a block job of another kind ({kind})"
    remedy = "Wait for its end ('virsh blockjob'), or end it, then run this again."
    return Refusal("block_job", merge.domain.name, why, remedy)


def _ended(merge: Merge) -> Refusal:
    """Return the refusal of a job that has ended without having done its work."""
    why = f"the merge of {merge.path} ended before it was complete; the domain goes on with the images that it had"
    remedy = "See the space in the folder of the image below, and the log of the domain; then run this again."
    return Refusal("libvirt_failed", merge.domain.name, why, remedy)


def _refusal(handle: t.Any, merge: Merge, exc: t.Any) -> Refusal | None:
    """Return the refusal of a merge that libvirt has not done; None if it is done all the same, as by another run."""
    with contextlib.suppress(LibvirtError):
        if not handle.isActive():
            return shut_off_meanwhile(merge.domain)
        if _disk_of(handle, merge).place_of(merge.path) is None:
            return None
    why = f"libvirt could not merge {merge.path} down. libvirt says: {words_of(exc)}"
    return Refusal("libvirt_failed", merge.domain.name, why, "See its log and that of the domain, then run this again.")
