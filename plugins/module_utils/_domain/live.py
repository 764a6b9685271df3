# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What can be done to domains that run, by libvirt: the aims that run.py is given for them.

The rules are those of aims.py; what differs is in which state a domain must be, and who touches its images.
"""

from __future__ import annotations

import os
import typing as t

from .._base.attributes import AttributeOptions
from .._base.errors import Refusal
from .._disk.commit import CommitRequest, CommitVerdict
from .._disk.overlay import OverlayRequest, OverlayVerdict
from .._disk.running import Begin, Known, MakeForRunning, MergeRunning
from .._disk.verdict import FAILED, KEEP
from .._libvirt.connection import Domain, Kept, KnownCheckpoint, Libvirt
from .._libvirt.definition import Definition, DomainDisk
from .._libvirt.jobs import Merge, check_may_merge, check_no_job, merge_down
from .._libvirt.running import RunningDisk, why_not_quiesced
from .._libvirt.snapshots import (
    check_on,
    check_still_runs,
    defined_now,
    disks_now,
    other_disks_meanwhile,
    store_definition,
    take_snapshot,
)
from .._qcow2.formats import QCOW2
from .._qcow2.mark import Mark
from .aims import MergeDown, PutOnOverlays, with_times
from .checkpoints import Chain, as_promised, chain_of
from .inventory import READ_ONLY, DiskFacts
from .names import find_snapshot
from .overlay import plan_domain
from .plan import DiskPlan, DomainPlan, SnapshotRequest, running_elsewhere
from .wayback import (
    WHY_SAVED,
    WayBack,
    begun_disk,
    flat_disk,
    given_up_disk,
    half_committed_disk,
    left_over,
    only_stated_disk,
    plan_merge,
    plan_way_back,
    taken_over,
    unreadable_disk,
    why_not_aside,
)

OLDEST = (6, 6, 0)  # of libvirt that has bitmaps go on over live snapshots and merges
# The oldest QEMU that can open an image below the topmost one for writing later (blockdev-reopen).
_WRITES_BELOW = (6, 1, 0)

_KNOWS_VOLUMES = (9, 0, 0)  # the oldest that was seen to put a domain off its volume for the next start, too; not 7.0


class Live(t.NamedTuple):
    """That domains are worked on while they run."""

    version: tuple[int, int, int]  # of libvirt
    quiesce: bool = False


class _OfRunning:
    """What holds for every aim for domains that run: nothing keeps them from anything, so their state is looked at."""

    def takes(self, domain: Domain) -> bool:
        """Take every domain that is not shut off."""
        return domain.state is not None

    def confirm(self, daemon: Libvirt, domain: Domain) -> None:
        """Refuse a domain that does not run any more, or has other images: its turn can come hours after the plan."""
        check_still_runs(daemon, domain)

    def guarded_image(self, _domain: Domain) -> str | None:
        """Return none: the domain has them all."""
        return None


def _as_open(chain: Chain) -> Chain:
    """Return a chain of which the topmost image tells nothing, since QEMU has its bitmaps in memory."""
    top = [one._replace(is_open_for_writing=True) for one in chain.layers[:1]]
    return chain._replace(layers=(*top, *chain.layers[1:]))


class PutRunningOn(_OfRunning, PutOnOverlays):
    """State present for domains that run. Without `live` only those succeed that are on the snapshot. An Aim."""

    def __init__(self, request: SnapshotRequest, attributes: AttributeOptions, live: Live | None) -> None:
        super().__init__(request, attributes)
        self._live = live

    def operation(self, daemon: Libvirt, domains: t.Sequence[Domain]) -> MakeForRunning:
        """Return what is done to the images."""
        return MakeForRunning(self._attributes, RunningDomains(daemon, domains))

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
        live = self._live
        if live is None:
            return with_times(plan_domain(domain, facts, self._request, kept), kept)

        def not_ready(domain: Domain, disks: t.Sequence[DiskPlan]) -> list[Refusal]:
            if not any(disk.source for disk in disks):
                return running_elsewhere(domain, disks)
            volumes = _volumes_left(domain, disks, live)
            return [*not_live(domain, live), *volumes, *(not_quiescent(domain) if live.quiesce else ())]

        as_run = [as_it_runs(domain, one) for one in facts]
        return with_times(plan_domain(domain, as_run, self._request, kept, not_ready), kept)

    def chain_after(self, disk: DomainDisk, verdict: OverlayVerdict | None) -> Chain:
        """Return the chain that the overlay comes on top of: what libvirt does not look at is further down."""
        if verdict is not None and verdict.state == FAILED:  # ACTIVE is below already, and has not stored its bitmaps
            return _as_open(chain_of(verdict.request.path, QCOW2))
        return _as_open(chain_of(disk.source, disk.format))

    def switch(self, daemon: Libvirt, plan: DomainPlan, _seconds: float) -> None:
        """Have libvirt put the domain on its overlays."""
        quiesce = self._live is not None and self._live.quiesce
        take_snapshot(daemon, plan.domain, plan.sources, quiesce=quiesce)

    def is_done(self, problems: t.Collection[Refusal]) -> bool:
        """Return whether nothing is wrong, or all that is: the images below do not store their bitmaps."""
        return all(problem.code == "not_stored" for problem in problems)


class MergeRunningDown(_OfRunning, MergeDown):
    """State committed for domains that run. An Aim."""

    def __init__(self, request: WayBack, live: Live) -> None:
        super().__init__(request)
        self._live = live

    def operation(self, daemon: Libvirt, domains: t.Sequence[Domain]) -> MergeRunning:
        """Return what is done to the images."""
        return MergeRunning(RunningDomains(daemon, domains), self._request.gone)

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
        as_run = [as_it_runs(domain, one) for one in facts]
        plan = plan_way_back(domain, as_run, self._request, _merge_disk, lambda one, _disks: not_live(one, self._live))
        return with_times(plan, kept)

    def chain_after(self, disk: DomainDisk, verdict: CommitVerdict | None) -> Chain:
        """Return the chain of a disk after the run."""
        is_told = verdict is not None and verdict.state != FAILED
        return _as_open(super().chain_after(disk, verdict if is_told else None))

    def switch(self, daemon: Libvirt, plan: DomainPlan, _seconds: float) -> None:
        """See that the domain is on the images below: libvirt has put it there with the end of each merge."""
        try:
            check_on(daemon, plan.domain, plan.sources)
        except Refusal as exc:
            raise exc.with_note(f"All images of {plan.domain.name} are merged down already.") from exc

    def known_then(
        self, known: tuple[KnownCheckpoint, ...], made: t.Mapping[str, CommitVerdict]
    ) -> tuple[KnownCheckpoint, ...]:
        """Return the checkpoints with the bitmaps that the merges promise."""
        return as_promised(known, {target: [bitmap.name for bitmap in one.bitmaps] for target, one in made.items()})


def shown(version: tuple[int, int, int]) -> str:
    """Return a version as it is written."""
    return ".".join(map(str, version))


def why_not_written_below(version: tuple[int, int, int]) -> tuple[str, str] | None:
    """Return why this QEMU writes no bitmap to an image below the topmost one, and the way out; None if it does."""
    if version >= _WRITES_BELOW:
        return None
    why = f"QEMU {shown(version)} lets libvirt write only to the topmost image while it runs"
    return why, f"Shut it down and run this again. Or update QEMU: {shown(_WRITES_BELOW)} can."


def as_it_runs(domain: Domain, facts: DiskFacts) -> DiskFacts:
    """Return the facts of a disk as the domain has it just now, with the chain that QEMU has open."""
    running = domain.running_definition.disks if domain.running_definition is not None else ()
    return next((facts._replace(disk=disk) for disk in running if disk.target == facts.disk.target), facts)


def not_live(domain: Domain, live: Live) -> list[Refusal]:
    """Return why a domain that runs cannot be worked on."""
    if live.version < OLDEST:
        what = "does not keep bitmaps over snapshots of a running domain"
        why = f"libvirt {shown(live.version)} {what}; {shown(OLDEST)} does"
        return [Refusal("old_libvirt", domain.name, why, "Update libvirt, or shut the domain down and run this again.")]
    if not domain.persistent:
        why = "is transient: it has no definition that could be changed"
        return [Refusal("transient", domain.name, why, "Define it first.")]
    if domain.managed_save:
        return [Refusal("managed_save", domain.name, WHY_SAVED, "Remove it with 'virsh managedsave-remove'.")]
    if domain.running_definition is None or _written(domain.running_definition) != _written(domain.definition):
        why = "runs with other disks than its definition has, so after the next start it would have others"
        remedy = "Make them the same ('virsh attach-disk --config', 'virsh detach-disk --config'), or shut it down."
        return [Refusal("other_disks", domain.name, why, f"{remedy} Then run this again.")]
    return []


def _volumes_left(domain: Domain, disks: t.Sequence[DiskPlan], live: Live) -> list[Refusal]:
    """Return which disks an old libvirt would leave on their volumes in the definition, for the next start."""
    volumes = {disk.target: disk.volume for disk in domain.definition.disks if disk.volume is not None}
    left = [disk.target for disk in disks if disk.source is not None and disk.target in volumes]
    if live.version >= _KNOWS_VOLUMES or not left:
        return []
    why = (
        f"its disk {left[0]} is defined by the volume {volumes[left[0]].name}. libvirt {shown(live.version)} would "
        f"leave it so, and the next start would go on below the overlay; {shown(_KNOWS_VOLUMES)} would not"
    )
    remedy = "Update libvirt, define the disk by its path, or shut the domain down; then run this again."
    return [Refusal("old_libvirt", domain.name, why, remedy)]


def not_quiescent(domain: Domain) -> list[Refusal]:
    """Return why the guest of a domain cannot be asked to hold its writes."""
    running = domain.running_definition
    why = why_not_quiesced(running.text) if running is not None else None
    if domain.state != "running":
        why = f"the domain is {domain.state}, so its guest agent cannot answer"
    if why is None:
        return []
    return [Refusal("not_quiesced", domain.name, f"cannot be quiesced: {why}", "Mend that, or leave out quiesce.")]


def _written(definition: Definition) -> dict[str, str | None]:
    """Return the images of the disks that are written to for good, by target."""
    # A transient disk has an image of that run alone, which libvirt has put on its own.
    passing = (*READ_ONLY, "transient")
    return {disk.target: disk.source for disk in definition.disks if disk.why_unfit not in passing}


def _merge_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return what is to become of a disk whose snapshot is to be merged down; None if it has none."""
    if facts.problem is not None:
        return unreadable_disk(domain, facts.problem, mark)
    found = find_snapshot(facts, domain.name, mark, frozenset)
    if found is not None:
        plan = plan_merge(domain, facts, request, mark, found)
        if plan.request.above is not None:
            return plan._replace(source=None)  # libvirt sees to the definition
        return plan._replace(problems=(*plan.problems, *_is_volume(domain, facts)))
    begun = half_committed_disk(domain, facts, request, mark)
    if begun is not None and not begun.problems:
        why = "its merge was begun while the domain was shut off, and is all but complete"
        problem = Refusal("unfinished", begun.request.path, why, "Shut it down and run this again.")
        begun = begun._replace(problems=(problem,))
    stated = only_stated_disk(domain, facts, mark)
    begun = begun or begun_disk(domain, facts, request, mark)
    return flat_disk(domain, facts, mark) or begun or stated or _left_over(domain, facts, request, mark)


def _is_volume(domain: Domain, facts: DiskFacts) -> list[Refusal]:
    """Return that the topmost image is defined as a volume, which libvirt does not follow when it is merged down."""
    disk = facts.disk
    if disk.volume is None:
        return []
    why = f"cannot be merged down while it runs: its disk {disk.target} is defined by the volume {disk.volume.name}"
    return [Refusal("disk_unfit", domain.name, f"{why}, not by a path", "Shut it down and run this again.")]


def _left_over(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return the plan for a snapshot that stands on an image of the disk and is not in its chain any more."""
    left = left_over(facts, facts.own, request, mark)
    if left is None:
        return None
    given_up, needed = given_up_disk(domain, facts, request, mark), why_not_aside(facts, left)
    if given_up is not None:
        return given_up
    if needed is not None:
        return unreadable_disk(domain, needed, mark)
    image_format = left.below.format_found
    aside = CommitRequest(left.path, left.below.path, image_format, domain.uuid, retire=KEEP, speed=request.speed)
    return DiskPlan(mark.target, aside, None, tuple(taken_over(domain, facts, left.path, mark)))


class RunningDomains:
    """The domains that run, as libvirt has them. A Hypervisor."""

    def __init__(self, daemon: Libvirt, domains: t.Sequence[Domain]) -> None:
        self._daemon = daemon
        self._domains = {domain.uuid: domain for domain in domains}

    def known(self, vm: str | None, paths: t.Sequence[str]) -> Known:
        """Return the bitmaps of the disk that has the first of these images that any disk has in its chain."""
        domain = self._domains[vm or ""]
        disk = next(filter(None, (self._disk_with(domain, path) for path in paths)), None)
        if disk is None:
            return Known()
        own = {
            one.bitmaps[disk.target]: disk.target in one.live.sizes
            for one in self._daemon.kept_now(domain).checkpoints
            if disk.target in one.bitmaps and one.live is not None and one.live.problem is None
        }
        return Known(
            tuple(name for name, is_usable in own.items() if is_usable),
            tuple(name for name, is_usable in own.items() if not is_usable),
        )

    def has(self, request: CommitRequest | OverlayRequest) -> bool:
        """Return whether the domain has the image at `path` in the chain of a disk, or is defined with it."""
        domain = self._domains[request.vm or ""]
        if self._disk_with(domain, request.path) is not None:
            return True
        paths = defined_now(self._daemon, domain).paths
        return os.path.realpath(request.path) in map(os.path.realpath, paths)

    def store(self, request: CommitRequest) -> None:
        """Have libvirt store the definition of the domain, which it may have only in its memory."""
        store_definition(self._daemon, self._domains[request.vm or ""])

    def merge(
        self,
        request: CommitRequest,
        watch: t.Callable[[int, int], None],
        seconds: float,
        begin: Begin,
        *,
        relative: bool,
        resumes: bool,
    ) -> None:
        """Merge the image into the one below it while the domain runs."""
        domain = self._domains[request.vm or ""]
        disk = self._disk_with(domain, request.path)
        if disk is None:
            raise other_disks_meanwhile(domain)
        merge = Merge(domain, disk.target, request.path, request.speed, relative, resumes)
        merge_down(self._daemon, merge, watch, seconds, begin)

    def check_for_snapshot(self, request: OverlayRequest) -> None:
        """Refuse a disk on which a job goes on that keeps it from a snapshot."""
        if request.mark is not None:
            check_no_job(self._daemon, self._domains[request.vm or ""], request.mark.target)

    def why_none_below(self) -> tuple[str, str] | None:
        """Return why a merge adds no bitmap to an image below the topmost one, and the way out; None if it does."""
        return why_not_written_below(self._daemon.qemu_version)

    def check_for_merge(self, request: CommitRequest, *, resumes: bool) -> None:
        """Refuse an image if a job is in the way of its merge."""
        domain = self._domains[request.vm or ""]
        disk = self._disk_with(domain, request.path)
        if disk is None:
            raise other_disks_meanwhile(domain)
        check_may_merge(self._daemon, Merge(domain, disk.target, request.path, resumes=resumes), disk)

    def _disk_with(self, domain: Domain, path: str) -> RunningDisk | None:
        """Return the disk that has an image in its chain just now."""
        disks = disks_now(self._daemon, domain)
        return next((disk for disk in disks if disk.place_of(path) is not None), None)
