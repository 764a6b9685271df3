# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: have libvirt merge an image of a domain that runs into the one below it, and follow its job to the end.

Read: whether a job of somebody else is in the way of that, or of a snapshot.
"""

from __future__ import annotations

import time
import typing as t

from .._base.errors import Refusal
from .._base.signals import GoesOn, Interrupted, interruptible
from .bindings import LibvirtError, libvirt, words_of
from .connection import PATIENCE, Domain, Libvirt, unreadable
from .running import RunningDisk, RunningImage, run_of, running_disks
from .snapshots import RESTART, gone_meanwhile, other_disks_meanwhile, running_text

Watch = t.Callable[[int, int], None]  # is called with the bytes that are done, and with all


class Begun(t.Protocol):
    """That a job was begun, as others can see it."""

    def withdraw(self) -> None:
        """Nothing was begun after all."""

    def end(self) -> None:
        """The job has come to an end, and was not complete."""


Begin = t.Callable[[], Begun]

_PAUSES = (0.02, 0.1, 0.5)  # seconds between two looks at a job; the last one again and again
_STEP = 32 << 20  # bytes that QEMU moves at most before it pauses for the sake of a speed
_KINDS = ("unknown", "pull", "copy", "commit", "active commit", "backup")  # virDomainBlockJobType
_OURS = (3, 4)  # commit, active commit
_BACKUP = 9  # virDomainJobOperation


class Merge(t.NamedTuple):
    """What is to be merged into the image below it."""

    domain: Domain
    target: str
    path: str
    speed: int = 0  # bytes per second; 0 is no limit
    relative: bool = False  # the image above is to record the one below by a relative name
    resumes: bool = False  # an earlier run has begun a job of this very image


def merge_down(daemon: Libvirt, merge: Merge, watch: Watch, seconds: float, begin: Begin) -> None:
    """Merge the image down, until it is not in the chain of the disk any more; Refusal if that fails.

    That the disk does not have it is no sign of a merge: it may have been detached, or the domain was started anew on
    another image. So it counts as merged only if a job of it was there in the same run of the domain, and the disk has
    the image below in its place.

    Go on with a job that runs already, if it is of a run that was killed; never touch one of somebody else. After
    `seconds` without progress, or after a signal, give the job up; then the domain keeps the chain that it has. A
    daemon that is started anew is waited for: QEMU goes on with the job meanwhile. `begin` is called before a job is
    begun, and before one is followed.
    """
    _Merging(daemon, merge, watch, seconds + (_STEP / merge.speed if merge.speed else 0), begin).run()


class _Job(t.NamedTuple):
    """Where a job of the image was there."""

    run: str  # libvirt's number of the run of the domain
    place: int  # of the image in the chain
    below: RunningImage  # that it goes into

    def is_done(self, run: str, disk: RunningDisk | None) -> bool:
        """Whether the disk, which does not have the image any more, has the one below it in its place."""
        there = disk.images[self.place : self.place + 1] if disk is not None else ()
        return run == self.run and any(_is_still(self.below, image) for image in there)


class _Merging:
    """One merge, over all restarts of the daemon."""

    def __init__(self, daemon: Libvirt, merge: Merge, watch: Watch, seconds: float, begin: Begin) -> None:
        self._daemon = daemon
        self._merge = merge
        self._watch = watch
        self._seconds = seconds
        self._begin = begin
        self._is_ours = merge.resumes  # a job of the disk
        self._is_started = False
        self._job: _Job | None = None  # None if none was there
        self._begun: Begun | None = None

    def run(self) -> None:
        """Do it."""
        is_away = True
        while is_away:
            is_away = False
            try:
                self._attempt(self._handle())
            except Interrupted as exc:
                if not self._give_up():
                    raise GoesOn(str(exc)) from exc
                raise
            except LibvirtError as exc:
                is_away = self._is_away(exc)

    def _handle(self) -> t.Any:
        return self._daemon.connection.lookupByUUIDString(self._merge.domain.uuid)

    def _attempt(self, handle: t.Any) -> None:
        while True:
            found = self._find(handle)
            if found is None:
                return
            disk, job = found
            _check_mirror(disk, job.place, self._merge)
            info = handle.blockJobInfo(self._merge.target, 0)
            if info:
                _check_job(self._merge, info, is_ours=self._is_ours)
                self._job = job
                self._begun = self._begin()
            elif self._is_started:
                # A daemon that was just started tells first what was, and is asked once it knows of the job.
                if self._find(handle) is None:
                    return
                self._end()
                raise _ended(self._merge)
            else:
                self._start(handle, disk, job)
            self._follow(handle)

    def _find(self, handle: t.Any) -> tuple[RunningDisk, _Job] | None:
        """Return the disk, and where a job of the image is or would be there; None if the image is merged.

        Refusal if the disk does not have it any more, and that is not known to be the work of a job.
        """
        text = running_text(handle, self._merge.domain)
        number = run_of(text)
        disk = next((disk for disk in running_disks(text) if disk.target == self._merge.target), None)
        place = disk.place_of(self._merge.path) if disk is not None else None
        if disk is not None and place is not None and place + 1 < len(disk.images):
            return disk, _Job(number, place, disk.images[place + 1])
        if place is None and self._job is not None and self._job.is_done(number, disk):
            return None
        raise other_disks_meanwhile(self._merge.domain)

    def _start(self, handle: t.Any, disk: RunningDisk, job: _Job) -> None:
        merge, place = self._merge, job.place
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        if place == 0:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        elif merge.relative:
            flags |= libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE
        self._begun = begun = self._begin()
        # If the daemon goes now, the job may have begun, and nobody tells.
        self._is_ours = True
        seen, self._job = self._job, job
        try:
            handle.blockCommit(merge.target, disk.name_of(place + 1), disk.name_of(place), merge.speed, flags)
        except LibvirtError as exc:
            if self._daemon.is_there():
                self._job = seen
                self._settle(begun, handle.blockJobInfo(merge.target, 0), exc)
            raise
        self._is_started = True

    def _settle(self, begun: Begun, info: t.Mapping[str, int], exc: t.Any) -> None:
        """See to the sign of a job that libvirt has refused; Refusal if there is one of somebody else."""
        is_busy = exc.get_error_code() == libvirt.VIR_ERR_BLOCK_COPY_ACTIVE
        if info and info["type"] in _OURS:
            if is_busy:
                # It writes to the image below, whoever has begun it: the sign is that of its merge, too.
                begun.end()
        else:
            begun.withdraw()
        if is_busy:
            raise _busy(self._merge.domain, self._merge.target, "that has just been begun") from exc

    def _follow(self, handle: t.Any) -> None:
        """Return when there is no job any more; when one has the disk on both images, put the domain on the lower."""
        merge = self._merge
        seen, since, pauses = None, time.monotonic(), iter(_PAUSES)
        while True:
            info = handle.blockJobInfo(merge.target, 0)
            if not info:
                return
            _check_job(merge, info, is_ours=self._is_ours)
            done, total = info["cur"], info["end"]
            self._watch(done, total)
            is_ready = info["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT and done == total
            if is_ready and _pivot(handle, merge.target):
                continue
            if (done, total) != seen:
                seen, since = (done, total), time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._give_up()
                why = f"the merge of {merge.path} made no progress for {self._seconds:.0f} s and was given up"
                raise Refusal("libvirt_failed", merge.domain.name, why, "Check the storage, then run this again.")
            with interruptible():
                time.sleep(next(pauses, _PAUSES[-1]))

    def _give_up(self) -> bool:
        """End our job, if there is one, so that the disk keeps its chain; return whether none goes on."""
        if not self._is_ours:
            return True
        try:
            self._handle().blockJobAbort(self._merge.target, 0)
        except LibvirtError:
            if not self._daemon.is_there():
                return False
        self._end()  # also where there was no job
        return True

    def _end(self) -> None:
        """Say that no job of ours is there any more: one that comes is somebody else's."""
        if self._begun is not None:
            self._begun.end()

    def _is_away(self, exc: t.Any) -> bool:
        """Return after an error whether the daemon was away, and is back; Refusal if the merge has failed."""
        try:
            if self._daemon.is_back(self._seconds):
                return True
        except Interrupted as ended:
            raise GoesOn(str(ended)) from ended
        refusal = self._refusal(exc)
        if refusal is not None:
            raise refusal from exc
        return False

    def _refusal(self, exc: t.Any) -> Refusal | None:
        """Return the refusal of a merge that libvirt has not done; None if it is done all the same, as by others."""
        merge = self._merge
        try:
            if self._find(self._handle()) is None:
                return None
        except Refusal as now:
            return now
        except LibvirtError as now:
            if now.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return gone_meanwhile(merge.domain)
        why = f"libvirt could not merge {merge.path} down. libvirt says: {words_of(exc)}"
        remedy = "See its log and that of the domain, then run this again."
        return Refusal("libvirt_failed", merge.domain.name, why, remedy)


class _Jobs(t.NamedTuple):
    """The jobs that could be in the way of what is to be done to a disk."""

    of_domain: t.Mapping[str, int]  # as virDomainGetJobStats() says
    of_disk: t.Mapping[str, int]  # as virDomainGetBlockJobInfo() says; empty if it has none


def check_no_job(daemon: Libvirt, domain: Domain, target: str) -> None:
    """Refuse a disk of which no snapshot can be taken, since a job of it or of the whole domain goes on."""
    jobs = _jobs_now(daemon, domain, target)
    if jobs.of_disk:
        raise _busy(domain, target, f"({_kind_of(jobs.of_disk)})")
    if jobs.of_domain["type"]:
        raise _domain_busy(domain)


def check_may_merge(daemon: Libvirt, merge: Merge, disk: RunningDisk) -> None:
    """Refuse a merge if merge_down() would find a job in its way."""
    jobs = _jobs_now(daemon, merge.domain, merge.target)
    _check_mirror(disk, disk.place_of(merge.path) or 0, merge)
    if jobs.of_disk:
        _check_job(merge, jobs.of_disk, is_ours=merge.resumes)
    # A backup of other disks lets libvirt begin block jobs; a dump or a migration does not.
    if jobs.of_domain["type"] and jobs.of_domain.get("operation") != _BACKUP:
        raise _domain_busy(merge.domain)


def _jobs_now(daemon: Libvirt, domain: Domain, target: str) -> _Jobs:
    """Return the jobs of a domain and of one of its disks; Refusal if that cannot be told."""
    while True:
        try:
            return daemon.in_time(
                domain.uuid, lambda handle: _Jobs(handle.jobStats(0), handle.blockJobInfo(target, 0) or {})
            )
        except TimeoutError as exc:
            why = f"its QEMU has not answered within {PATIENCE:.0f} seconds, so its jobs cannot be told"
            remedy = "See the log of the domain, then run this again."
            raise Refusal("libvirt_failed", domain.name, why, remedy) from exc
        except LibvirtError as exc:
            if not daemon.is_back(RESTART, can_end=False):
                raise unreadable(domain.name, exc) from exc


def _check_job(merge: Merge, info: t.Mapping[str, int], *, is_ours: bool) -> None:
    """Refuse a job that is no merge of ours."""
    if info["type"] not in _OURS:
        raise _busy(merge.domain, merge.target, f"of another kind ({_kind_of(info)})")
    if not is_ours:
        raise _busy(merge.domain, merge.target, f"that this run has not begun ({_kind_of(info)})")


def _kind_of(info: t.Mapping[str, int]) -> str:
    return _KINDS[info["type"]] if info["type"] < len(_KINDS) else "unknown"


def _check_mirror(disk: RunningDisk, place: int, merge: Merge) -> None:
    """Refuse a disk that is just being written to another image than the one below."""
    if disk.mirror is None:
        return
    below = disk.images[place + 1] if place == 0 and len(disk.images) > 1 else None
    image = disk.mirror.image
    if disk.mirror.job != "active-commit" or below is None or not _is_same(image, below):
        which = f"of another kind ({disk.mirror.job} to {image.path or 'an image without a path'})"
        raise _busy(merge.domain, merge.target, which)


def _is_same(one: RunningImage, other: RunningImage) -> bool:
    """Whether both are the same image of a chain; of a volume, which has no path, only the number tells."""
    if one.path is not None or other.path is not None:
        return one.path == other.path
    return one.number != "" and one.number == other.number


def _is_still(one: RunningImage, other: RunningImage) -> bool:
    """Whether both are one image of a disk, before and after a job."""
    # A disk that was detached, and attached again with the image below alone, has another number of it.
    if one.number and other.number:
        return one.number == other.number
    return one.path is not None and one.path == other.path


def _pivot(handle: t.Any, target: str) -> bool:
    """Put the domain on the lower image; False if the job is not ready for that yet."""
    try:
        handle.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except LibvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
            raise
        return False
    return True


def _busy(domain: Domain, target: str, which: str) -> Refusal:
    why = f"its disk {target} has a block job {which}"
    remedy = "Wait for its end ('virsh blockjob'; of a backup 'virsh domjobinfo'), or end it, then run this again."
    return Refusal("block_job", domain.name, why, remedy)


def _domain_busy(domain: Domain) -> Refusal:
    why = "has a job of its own, as a backup or a migration, while which libvirt begins nothing of this kind"
    remedy = "Wait for its end ('virsh domjobinfo'), or end it ('virsh domjobabort'), then run this again."
    return Refusal("block_job", domain.name, why, remedy)


def _ended(merge: Merge) -> Refusal:
    """Return the refusal of a job that has ended without having done its work."""
    # What QEMU has done to the images by then libvirt does not tell.
    why = f"the merge of {merge.path} ended before it was complete; libvirt has the domain go on with it"
    remedy = "See the space in the folder of the image below, and the log of the domain; then run this again."
    return Refusal("libvirt_failed", merge.domain.name, why, remedy)
