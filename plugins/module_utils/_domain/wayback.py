# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what becomes of each disk of a domain that is to leave a snapshot, by merging it down or by going back.

Facts in, a plan out. Which image is the snapshot its mark tells; see names.py.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import typing as t

from .._base.errors import Refusal
from .._base.files import Identity, identity_of, is_there, open_image
from .._disk.begun import find_sign
from .._disk.commit import CommitRequest
from .._disk.retire import REVERTED_AS, all_kept, is_kept
from .._disk.revert_rules import RevertRequest, is_leaving
from .._disk.siblings import Above, folders_beside, overlays_in
from .._disk.unfinished import left_of, of_image_beside, removal_of, vaults_into_device
from .._disk.vault import Vault, find_vault, open_vault, place_of, read_vault
from .._disk.verdict import DELETE, KEEP, How
from .._libvirt.connection import Domain, Kept
from .._libvirt.definition import Source
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, read_head
from .._qcow2.formats import QCOW2
from .._qcow2.image import Image, read_image
from .._qcow2.mark import History, Mark
from .checkpoints import chain_of
from .fitness import fitness_of
from .inventory import DiskFacts
from .names import Found, find_snapshot, flattened, flattened_one, snapshot_in
from .overlay import snapshots_problem, stated_problems
from .plan import DiskPlan, DomainPlan, NotReady, SkippedDisk, not_shut_off
from .retention import NO_STEP, Step

WHY_SAVED = "has a managed save, which would go on with the images that are there now"
_NOT_ON_IT = "is not on the snapshot"
_NONE_OLD = "has no snapshot that is to go"
_NOTHING = Kept()
# By how many nanoseconds a copy can be older, by the unit of its time: FAT, others of whole seconds, exFAT, and tar.
_LOST_DIGITS = ((10**9, 2 * 10**9), (10**7, 10**7), (1, 10**3))


class WayBack(t.NamedTuple):
    """What is wanted of every domain that is to leave a snapshot."""

    snapshot: str  # the topmost one that is merged down, or the lowest one that is gone back from
    targets: tuple[str, ...] | None = None  # None: all disks that are on it
    retire: How | None = None  # what becomes of the images that are not needed any more; None: what is usual
    speed: int = 0  # bytes per second of a merge; 0 is no limit
    skips_running: bool = False
    directory: str | None = None  # where overlays were made, if not beside the images below
    lowest: str | None = None  # the snapshot further down that is merged down with it; all in between are, too
    steps: t.Mapping[str, Step] | None = None  # by the UUID of the domain, instead of the two above
    gone: t.Collection[str] = ()  # paths of images that check mode has not retired, although a run would have
    allows_snapshots: bool = False  # libvirt's own snapshots of a domain that goes back are no failure

    def of(self, domain: Domain) -> WayBack:
        """Return what is wanted of this domain."""
        if self.steps is None:
            return self
        step = self.steps.get(domain.uuid, NO_STEP)
        return self._replace(snapshot=step.highest, lowest=step.lowest, steps=None)


class Left(t.NamedTuple):
    """A snapshot that is not in the chain of its disk any more, but is there."""

    path: str
    below: Layer  # that it stands on


class GivenUp(t.NamedTuple):
    """Snapshots that a killed run has put the VM off, but not retired."""

    paths: list[str]  # topmost first; the lowest one bears the mark
    below: Layer  # that it stands on


PlanDisk = t.Callable[[Domain, DiskFacts, WayBack, Mark], t.Optional[DiskPlan]]


def plan_commit(domain: Domain, facts: t.Sequence[DiskFacts], request: WayBack) -> DomainPlan:
    """Return what is to become of a domain whose snapshot is to be merged down."""

    def not_ready(domain: Domain, _disks: t.Sequence[DiskPlan]) -> list[Refusal]:
        return not_shut_off(domain, "or use running=live, which merges it down while it runs.", WHY_SAVED)

    return plan_way_back(domain, facts, request, _commit_disk, not_ready)


def plan_revert(domain: Domain, facts: t.Sequence[DiskFacts], request: WayBack, kept: Kept = _NOTHING) -> DomainPlan:
    """Return what is to become of a domain that is to go back to what it was at the snapshot."""

    def not_ready(domain: Domain, _disks: t.Sequence[DiskPlan]) -> list[Refusal]:
        why = "'virsh snapshot-revert' would fail without the images that go, or leave the domain defined with them"
        are_in_the_way = kept.snapshots and not request.allows_snapshots
        own = [snapshots_problem(domain, kept.snapshots, why)] if are_in_the_way else []
        return [*not_shut_off(domain, "nobody can go back while it runs.", WHY_SAVED), *own]

    plan = plan_way_back(domain, facts, request, _revert_disk, not_ready)
    plan = plan._replace(lost=lost_checkpoints(plan, kept))
    return plan._replace(notes=(*plan.notes, *_of_two_moments(plan, request), *_of_bitmaps_that_stay(plan, kept)))


def _of_two_moments(plan: DomainPlan, request: WayBack) -> tuple[str, ...]:
    """Return the warning of disks that stay as they are; none if they were asked for, or have gone back before."""
    stay = ", ".join(disk.target for disk in plan.skipped if disk.reason == _NOT_ON_IT)
    goes_on = any(disk.request.is_left for disk in plan.disks if isinstance(disk.request, RevertRequest))
    if request.targets is not None or goes_on or not stay:
        return ()
    why = (
        f"{plan.domain.name}: its disk {stay} is not on the snapshot {request.snapshot} and stays as it is, so the "
        "domain has disks of two moments then. That is right for a disk that was added later."
    )
    return (why,)


def _of_bitmaps_that_stay(plan: DomainPlan, kept: Kept) -> tuple[str, ...]:
    """Return the warning of disks that do not go back and have bitmaps of checkpoints that are lost."""
    gone = {disk.target for disk in plan.disks}
    targets = {target for one in kept.checkpoints if one.name in plan.lost for target in one.bitmaps}
    stay = ", ".join(sorted(targets - gone))
    if not stay:
        return ()
    why = (
        f"{plan.domain.name}: its disk {stay} stays, and so do its bitmaps of the checkpoints that are lost. "
        "A backup that uses such a name again fails. Remove them with kvmfleet.qcow2.domain_checkpoint, state=absent, "
        "orphans=remove."
    )
    return (why,)


def plan_way_back(
    domain: Domain, facts: t.Sequence[DiskFacts], request: WayBack, plan_disk: PlanDisk, not_ready: NotReady
) -> DomainPlan:
    """Return the plan for a domain. A disk that is not on the snapshot takes no part."""
    picks_old = request.steps is not None
    request = request.of(domain)
    disks, skipped, absent = [], [], []
    always: list[str] = []
    for one in facts:
        target, fitness = one.disk.target, fitness_of(one, request.directory)
        unfit = fitness.why_unfit
        planned = None
        if request.targets is not None and target not in request.targets:
            unfit = "not asked for"
        elif unfit is None:
            mark = Mark(domain.uuid, target, request.snapshot)
            try:
                planned = plan_disk(domain, one, request, mark)
            except Refusal as exc:  # of a vault, or of what stands beside the image
                planned = unreadable_disk(domain, exc, mark)
        if unfit is None and (planned is None or picks_old):
            always += _of_another_uuid(domain, one, None if picks_old else request.snapshot)
        if planned is not None:
            disks.append(planned)
        else:
            skipped.append(SkippedDisk(target, unfit or (_NONE_OLD if picks_old else _NOT_ON_IT)))
            absent += [target] if fitness.is_absent and unfit == fitness.why_unfit else []
    problems = [problem for disk in disks for problem in disk.problems]
    if disks:
        problems += not_ready(domain, disks)
        problems += [_absent_disk(domain, target) for target in absent]
    known = {one.disk.target for one in facts}
    problems += [_no_such_disk(domain, target) for target in request.targets or () if target not in known]
    notes = _of_unseen(facts[0].unseen()) if disks else ()
    plan = DomainPlan(
        domain, tuple(disks), tuple(skipped), tuple(problems), domain.definition, notes=notes, always=tuple(always)
    )
    if problems or not plan.sources:
        return plan
    return plan._replace(definition=domain.definition.with_sources(plan.sources))


def _of_another_uuid(domain: Domain, facts: DiskFacts, snapshot: str | None) -> list[str]:
    """Return the warning of images that are snapshots of another domain by their mark; `snapshot` None means of any.

    As after the domain was defined anew: then nobody can tell whose they are, and nothing would be said of them.
    """
    told = []
    for place, (layer, below) in enumerate(zip(facts.layers, facts.layers[1:])):
        mark = layer.image.mark if layer.image is not None else None
        if mark is None or mark.vm == domain.uuid or layer not in facts.own or snapshot not in (None, mark.snapshot):
            continue
        options = [f"path={layer.path}", f"backing_file={below.path}"]
        options += [f"above={facts.layers[place - 1].path}"] if place else []
        then = "" if place else f", and put the domain on {below.path} then ('virsh edit')"
        told.append(
            f"{domain.name}: {layer.path}, in the chain of its disk {facts.disk.target}, bears the mark of the "
            f"snapshot {mark.snapshot} of a domain with another UUID ({mark.vm}), as after it was defined anew. It is "
            "not taken for a snapshot of this one. If it is to be merged down, use kvmfleet.qcow2.qcow2_overlay, "
            f"state=committed, {', '.join(options)}{then}."
        )
    return told


def _of_unseen(disks: t.Sequence[str]) -> tuple[str, ...]:
    """Return the warning of disks of which nobody can tell on which images they stand; none if there are none."""
    if not disks:
        return ()
    why = (
        f"{', '.join(disks)}: the disk cannot be read, so nobody can tell whether it stands on an image that changes "
        "here. If it does, it is broken then. Mount its storage first, or undefine what is gone."
    )
    return (why,)


def _absent_disk(domain: Domain, target: str) -> Refusal:
    """Return the refusal of a domain of which one disk cannot be asked whether it is on the snapshot, as another is."""
    why = f"its disk {target} is not there, and may be on the snapshot, too. Its disks would be of different times"
    return Refusal("disk_unfit", domain.name, why, "Mount its storage; or name the disks that are meant, by disks.")


def _no_such_disk(domain: Domain, target: str) -> Refusal:
    return Refusal("disk_unfit", domain.name, f"has no disk {target}", "Correct disks.")


def _commit_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return what is to become of a disk whose snapshot is to be merged down; None if it has none."""
    if facts.problem is not None:
        return unreadable_disk(domain, facts.problem, mark)
    found = find_snapshot(facts, domain.name, mark, frozenset)
    if found is not None:
        return plan_merge(domain, facts, request, mark, found)
    return (
        flat_disk(domain, facts, mark)
        or half_committed_disk(domain, facts, request, mark)
        or begun_disk(domain, facts, request, mark)
        or only_stated_disk(domain, facts, mark)
        or _left_behind(domain, facts, request, mark)
    )


def _left_behind(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk whose snapshot a killed run has left; None if it is none.

    It went in while its VM ran, and was not retired; or it was being given up.
    """
    left = left_over(facts, facts.own, request, mark)
    if left is None:
        return None
    with open_image(left.path) as file:
        sign = find_sign(file)
    if sign is None:
        return given_up_disk(domain, facts, request, mark)
    why = f"is in no disk of {domain.name} any more, but {sign} tells that its merge was begun while that ran"
    remedy = "Start the domain and run this again with running=live, which keeps the overlay aside."
    problem = why_not_aside(facts, left) or Refusal("unfinished", left.path, why, remedy)
    return unreadable_disk(domain, problem, mark)


def given_up_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk whose snapshot a killed run was giving up; None if it is no such disk.

    Nor if a merge was begun: who gives up an image refuses one of which that is so, so the merge is the later one.
    """
    left = _left_by_revert(facts, request, mark)
    if left is None or any(map(has_sign, left.paths)):
        return None
    why = f"is in no disk of {domain.name} any more, and is to go: it was given up by a run that was killed meanwhile"
    problem = Refusal("unfinished", left.paths[0], why, "Complete that: run state=reverted with the same options.")
    return unreadable_disk(domain, problem, mark)


def only_stated_disk(domain: Domain, facts: DiskFacts, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk on whose snapshot only the definition is, not the images; None if it is no such disk.

    The next start has it on the snapshot, so it is neither merged nor gone.
    """
    recorded = {layer.real_path for layer in facts.layers}
    stated = [os.path.realpath(image.path) for image in facts.disk.stated_images if os.path.isabs(image.path)]
    if not any(path not in recorded and bears(path, mark) for path in stated):
        return None
    problems = stated_problems(domain.name, facts.disk, facts.layers)
    return DiskPlan(mark.target, CommitRequest("", "", vm=domain.uuid), None, tuple(problems))


def unreadable_disk(domain: Domain, problem: Refusal, mark: Mark) -> DiskPlan:
    """Return the plan for a disk of which the chain cannot be read."""
    return DiskPlan(mark.target, CommitRequest("", "", vm=domain.uuid), None, (problem,))


def flat_disk(domain: Domain, facts: DiskFacts, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk whose snapshot has no image below any more; None if it is no such disk."""
    flat = flattened_one(facts, mark)
    if flat is None:
        return None
    gone = CommitRequest(flat.path, flat.path, vm=domain.uuid)
    return DiskPlan(mark.target, gone, None, (flattened(domain.name, flat, mark, is_new=False),))


def half_committed_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk whose snapshot is below already, but not retired; None if it is no such disk."""
    found = _half_committed(facts, request, domain, mark)
    if found is None:
        return None
    finish, paths = found
    problems = [problem for path in paths for problem in taken_over(domain, facts, path, mark)]
    return DiskPlan(mark.target, finish, None, tuple(problems))


def begun_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return the plan for a disk that has BASE without TOP, whose merge into that was begun; None if it is none.

    Somebody has put it on BASE while the merge was under way, or has taken TOP into the image above. As long as the
    definition states TOP, the VM cannot start without it.
    """
    for place, base in enumerate(facts.layers):
        above = facts.layers[place - 1] if place else None
        for vault in _vaults_into(base, facts, request):
            if not vault.is_given and vault.top_path and _mark_of(vault.top_path, vault) == mark:
                problem = _put_on_base(base, domain, vault, vault.top_path, above)
                return only_stated_disk(domain, facts, mark) or unreadable_disk(domain, problem, mark)
    return None


def _put_on_base(base: Layer, domain: Domain, vault: Vault, top_path: str, above: Layer | None) -> Refusal:
    why = (
        f"is in a disk of {domain.name} without {top_path}, whose merge into it was begun by a run that was killed, "
        "and not brought to its end"
    )
    remedy = (
        f"If the domain has not run since, put it on {top_path} again ('virsh edit') and run state=committed. If it "
        "has, what it wrote and what that holds exclude each other: to keep what the domain has, "
        f"{removal_of(vault, top_path)}"
    )
    if above is not None:  # that holds what TOP lacks
        remedy = of_image_beside(above, base.path, vault, top_path, "If ")
    return Refusal("unfinished", base.path, why, remedy)


def plan_merge(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark, found: Found) -> DiskPlan:
    """Return the plan for a disk that is on the snapshot."""
    place = facts.layers.index(found.overlay)
    above = facts.layers[place - 1].path if place else None
    if request.lowest is not None and request.lowest != request.snapshot:
        lowest = find_snapshot(facts, domain.name, mark._replace(snapshot=request.lowest), frozenset)
        found = found._replace(below=lowest.below) if lowest is not None else found
    merge = CommitRequest(
        path=found.overlay.path,
        backing_file=found.below.path,
        backing_format=found.below.format_found,
        vm=domain.uuid,
        above=above,
        further=tuple(layer.path for layer in facts.layers[: max(place - 1, 0)]),
        retire=request.retire or DELETE,
        speed=request.speed,
        is_of_vm=True,
    )
    source = _source(found.below) if above is None else _unstated(facts)
    problems = _chain_problems(domain, facts, request, found, mark, goes_back=False)
    if place and not problems:
        problems = _hidden_by_merge(facts.layers[: place + 1])
    return DiskPlan(mark.target, merge, source, tuple(problems))


def _revert_disk(domain: Domain, facts: DiskFacts, request: WayBack, mark: Mark) -> DiskPlan | None:
    """Return what is to become of a disk that is to go back; None if it is not on the snapshot."""
    if facts.problem is not None:
        return DiskPlan(mark.target, RevertRequest("", "", vm=domain.uuid), None, (facts.problem,))
    found = find_snapshot(facts, domain.name, mark, frozenset)
    retire = request.retire or KEEP
    if found is None:
        flat = flattened_one(facts, mark)
        if flat is not None:
            gone = RevertRequest(flat.path, flat.path, vm=domain.uuid)
            return DiskPlan(mark.target, gone, None, (flattened(domain.name, flat, mark, is_new=False),))
        other = begun_disk(domain, facts, request, mark) or only_stated_disk(domain, facts, mark)
        if other is not None:
            return other
        left = _left_by_revert(facts, request, mark)
        if left is None:
            return None
        problems = [problem for path in left.paths for problem in taken_over(domain, facts, path, mark)]
        return DiskPlan(mark.target, _end_of_revert(domain, facts, left, retire), None, tuple(problems))
    back = RevertRequest(
        path=facts.layers[0].path,
        backing_file=found.below.path,
        backing_format=found.below.format_found,
        vm=domain.uuid,
        retire=retire,
        puts_on_base=True,
        made=_history_of(found.overlay).made,
    )
    problems = _chain_problems(domain, facts, request, found, mark, goes_back=True)
    return DiskPlan(mark.target, back, _source(found.below), tuple(problems))


def _end_of_revert(domain: Domain, facts: DiskFacts, left: GivenUp, retire: How) -> RevertRequest:
    """Return what retires the images that a killed run has left. A VM that has got an overlay since stays on that."""
    is_top = left.below.identity == facts.layers[0].identity
    lowest = _head_of(left.paths[-1])
    return RevertRequest(
        path=left.paths[0],
        backing_file=(facts.disk.source or "") if is_top else left.below.path,
        backing_format=facts.disk.format if is_top else left.below.format_found,
        vm=domain.uuid,
        retire=retire,
        puts_on_base=is_top,
        is_left=True,
        made=lowest.history.made if lowest is not None else 0,
        left_at=_changed_at(left.paths[0]),
    )


def _changed_at(path: str) -> int:
    """Return when an image was changed last, in nanoseconds since 1970; 0 if that cannot be told.

    That is at least the last write of its VM. Whoever gives it up records so in it before the VM is switched, and puts
    back the time of the last write; but nobody can put back that of the last change. After a crash a checkpoint can be
    younger than the last write to the image that it was made on.
    """
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        status = file.status()
        return 0 if file.is_device else max(status.st_mtime_ns, status.st_ctime_ns)
    return 0


def _source(layer: Layer) -> Source:
    """Return how a definition names an image that becomes the topmost one."""
    return Source(layer.path, layer.format_found, "block" if layer.is_device else "file")


def _unstated(facts: DiskFacts) -> Source | None:
    """Return the disk's own image if the definition states what is below it: that has an image in it that goes."""
    return None if facts.disk.stated_chain is None else _source(facts.layers[0])


def _chain_problems(
    domain: Domain, facts: DiskFacts, request: WayBack, found: Found, mark: Mark, *, goes_back: bool
) -> list[Refusal]:
    """Return why the images below the disk must not be touched."""
    part = facts.layers[: facts.layers.index(found.below) + 1]
    other_chain = stated_problems(domain.name, facts.disk, facts.layers)
    taken_in = _taken_in(facts, request, found) if goes_back else []
    return [
        *other_chain,
        *_shared(domain, facts, mark, part),
        *_uncertain(domain, found, mark),
        *((taken_in or _other_base(part, goes_back=goes_back)) if not other_chain else ()),
    ]


def _shared(domain: Domain, facts: DiskFacts, mark: Mark, part: t.Sequence[Layer]) -> list[Refusal]:
    """Return that another domain has one of the images too, on top or below."""
    others = [layer for layer in part if layer not in facts.own]
    domains = [*facts.writers, *facts.suspects, *facts.above()]
    if not others and not domains:
        return []
    path = others[0].path if others else facts.disk.source or ""
    whose = ", ".join(dict.fromkeys([*domains, *facts.others_with(path)]))
    if not whose:  # its users were looked up by its name, which another run has taken from it between two looks
        why = "was moved meanwhile, or what stands on it was, most likely by another run"
        return [Refusal("changed_meanwhile", path, why, "Run this again.")]
    why = f"{path}, in the chain of its disk {mark.target}, is in that of a disk of {whose} too, as a template is"
    remedy = "Give each a disk of its own ('qemu-img convert'), or undefine the domain that is not needed any more."
    return [Refusal("shared_disk", domain.name, why, remedy)]


def _other_base(part: t.Sequence[Layer], *, goes_back: bool) -> list[Refusal]:
    """Return that the lowest one of these images is not what the one above it was made on.

    A disk made from a template would be put back to that, or be merged into it. Of the very file all data that is newer
    is above it, whatever has set its time; but who goes back wants what it had then.
    """
    history, base = _history_of(part[-2]), part[-1]
    # The clock of a storage can be wrong; ours made the overlay after all that.
    recorded = min(history.base_written, history.made or history.base_written)
    written = base.written()
    lost = next(lost for unit, lost in _LOST_DIGITS if written % unit == 0)
    is_older = 0 < written <= recorded - lost
    if not is_older or (base.identity == _made_on(part[-2]) and not goes_back):
        return []
    why = (
        f"is not what {part[-2].path} was made on: it was last written to before that was, as far as {part[-2].path} "
        "tells. So an image between them was taken out, as by 'virsh blockpull', or it was put back from a copy"
    )
    remedy = (
        "If it is a template, leave it alone. If it is right all the same, as when an empty overlay between them was "
        "merged down by other tools, 'touch' it and run this again."
    )
    return [Refusal("base_changed", base.path, why, remedy)]


def _hidden_by_merge(part: t.Sequence[Layer]) -> list[Refusal]:
    """Return that the lowest one of these images, which is to go in, is not what the one above it was made on.

    That is right for who merges. But once it has gone in, nothing keeps anybody from going back to below the one above.
    """
    above = part[-2].path
    remedy = (
        f"If it is a template, leave it alone. Else nobody should go back to below {above} any more, and after the "
        "merge nothing would say so. If nobody will, 'touch' it and run this again."
    )
    return [Refusal(one.code, one.subject, one.why, remedy) for one in _other_base(part, goes_back=False)]


def _made_on(overlay: Layer) -> Identity:
    """Return which image an overlay was made on, if that is on its own file system; its inode is 0 if it is not known.

    It records the inode alone, and small inodes are alike on all file systems.
    """
    return (overlay.identity[0], _history_of(overlay).base_inode)


def _history_of(layer: Layer) -> History:
    """Return what an image tells of its life; nothing if it tells none."""
    return layer.image.history if layer.image is not None else History()


def _taken_in(facts: DiskFacts, request: WayBack, found: Found) -> list[Refusal]:
    """Return that the image between the snapshot and the one below was taken into the snapshot; nothing if none was.

    'virsh blockpull --base' leaves it there. What a merge of ours has left bears the sign of that.
    """
    inode, used = _history_of(found.overlay).base_inode, {layer.identity for layer in facts.layers}
    if inode == 0 or found.below.identity == _made_on(found.overlay):  # as mostly; then no folder is looked through
        return []
    overlays = _overlays_beside(facts, request)
    for one in overlays:
        is_pulled = one.identity[-1] == inode and one.identity not in used and not is_kept(one.path)
        # It is on another file system if the overlay was made in another directory.
        if is_pulled and _stood_on(one, found, used, overlays) and not has_sign(one.path):
            return [_not_made_on(found, one)]
    return []


def _not_made_on(found: Found, made_on: Above) -> Refusal:
    """Return the refusal to go back to below the image that a snapshot was made on."""
    why = (
        f"is not what {found.overlay.path} was made on: that was {made_on.path}, as its inode tells, which was taken "
        "into the snapshot, as by 'virsh blockpull'. What is in it the image below lacks"
    )
    remedy = (
        f"To go back to the moment of the snapshot, put the VM on {made_on.path} ('virsh edit'), with all that it "
        "stands on where it was. To keep all, merge the snapshot down (state=committed)."
    )
    return Refusal("base_changed", found.below.path, why, remedy)


def _stood_on(one: Above, found: Found, used: t.Collection[Identity], overlays: t.Sequence[Above]) -> bool:
    """Whether an image that no disk has was between the snapshot and the image below it, alone or with others.

    An inode can have been given anew since, as to an overlay of the snapshot itself; that stands on another one. Where
    its chain cannot be followed, as once an image of it was moved away, its mark tells whether it is of the same disk.
    """
    known = {other.identity: other for other in overlays if other.identity not in used}
    seen: set[Identity] = set()
    place = one.backing_identity
    while place is not None and place in known and place not in seen:  # or else they stand on each other
        seen.add(place)
        place = known[place].backing_identity
    if place in used:
        return place == found.below.identity
    mark, own = _mark_of(one.path), found.overlay.image and found.overlay.image.mark
    return mark is not None and own is not None and mark[:2] == own[:2]


def has_sign(path: str) -> bool:
    """Whether the merge of an image was begun while its VM ran; so, too, if it cannot be told."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        return find_sign(file) is not None
    return True


def taken_over(domain: Domain, facts: DiskFacts, path: str, mark: Mark) -> list[Refusal]:
    """Return that another domain has an image by now that is left over from this one."""
    whose = ", ".join(facts.others_with(path))
    if not whose:
        return []
    why = f"{path}, which was a snapshot of its disk {mark.target}, is in the chain of a disk of {whose} now"
    remedy = f"Leave {domain.name} out, or undefine the domain that is not needed any more."
    return [Refusal("shared_disk", domain.name, why, remedy)]


def _uncertain(domain: Domain, found: Found, mark: Mark) -> list[Refusal]:
    if found.is_certain:
        return []
    why = (
        f"whether {found.overlay.path} is the snapshot {mark.snapshot} of its disk {mark.target}, or a disk made from "
        "a template, cannot be told: it bears no mark of this domain"
    )
    remedy = "If it is the snapshot, name the images themselves, with kvmfleet.qcow2.qcow2_overlay."
    return [Refusal("ambiguous", domain.name, why, remedy)]


class Begun(t.NamedTuple):
    """A merge into an image of a disk that a killed run has begun."""

    mark: Mark  # of its topmost image
    depth: int | None  # where this is in the chain of the disk; None if it is in that no more


def _half_committed(
    facts: DiskFacts, request: WayBack, domain: Domain, mark: Mark
) -> tuple[CommitRequest, list[str]] | None:
    """Return the merge of a snapshot that is in the image below already, if a run was killed before it was retired.

    With it, the paths of all images that are to be retired.
    """
    for place, base in enumerate(facts.layers):
        for vault in _vaults_into(base, facts, request):
            paths = _rest_of(vault, base, facts)
            if not paths or not _is_rest_of(vault, paths, mark):
                continue
            finish = CommitRequest(
                path=paths[0],
                backing_file=base.path if place else facts.disk.source or "",
                backing_format=base.format_found if place else facts.disk.format,
                vm=domain.uuid,
                above=facts.layers[place - 1].path if place else None,
                retire=request.retire or DELETE,
                speed=request.speed,
            )
            return finish, paths
    return None


def _rest_of(vault: Vault, base: Layer, facts: DiskFacts) -> list[str]:
    """Return the paths of the images that a merge is to retire, if that alone is missing; the first one completes it.

    That is the topmost one, also where it is gone. None if there is nothing to do, or if the disk has one of them.
    """
    top = vault.top_path
    if not vault.is_given or top is None:
        return []
    left = left_of(vault)
    is_other = is_there(os.path.realpath(top)) and _mark_of(top, vault) is None  # a new image has got its name
    is_unseen = not os.path.isdir(os.path.dirname(top))  # so nobody can tell whether it is gone
    if not is_other and not is_unseen:
        left = [top, *left]
    elif base.is_device:  # its vault is found by the topmost image alone
        return []
    chain = {layer.real_path for layer in facts.layers}
    return [] if chain.intersection(map(os.path.realpath, left)) else left


def _is_rest_of(vault: Vault, paths: t.Sequence[str], mark: Mark) -> bool:
    """Whether a snapshot is one of the images that went in; of one that is gone its name tells."""
    known = [vault.top_path or "", *(path for _identity, path in vault.others)]
    gone = [path for path in known if not is_there(os.path.realpath(path))]
    is_named = any(path.endswith(f".{mark.snapshot}.qcow2") for path in gone)
    return is_named or any(bears(path, mark) for path in paths if path not in gone)


def begun_merge(domain: Domain, facts: DiskFacts, base: Layer, request: WayBack) -> Begun | None:
    """Return the merge into this image of a disk that a killed run has begun, if there is one."""
    for vault in _vaults_into(base, facts, request):
        mark = _mark_of(vault.top_path, vault) if vault.top_path is not None else None
        if mark is not None:
            tops = [place for place, layer in enumerate(facts.layers) if vault.is_of(*_known(layer))]
            return Begun(mark, next(iter(tops), None))
        mark = _mark_of_rest(domain, facts, base, vault)
        if mark is not None:
            return Begun(mark, None)
    return None


def _known(layer: Layer) -> tuple[Identity, str, int | None]:
    return layer.identity, layer.path, layer.generation


def _mark_of_rest(domain: Domain, facts: DiskFacts, base: Layer, vault: Vault) -> Mark | None:
    """Return the mark by which a merge is completed whose topmost image is gone; None if there is nothing to do."""
    paths = _rest_of(vault, base, facts)
    if not paths:
        return None
    marks = [_mark_of(path) for path in paths if path != vault.top_path]
    if any(mark is None or mark.vm != domain.uuid for mark in marks):
        return None
    mark = Mark(domain.uuid, facts.disk.target, "")
    if paths[0] != vault.top_path:
        return marks[0]
    snapshot = snapshot_in(paths[0], facts.layers[facts.layers.index(base) :], domain.name, mark)
    return mark._replace(snapshot=snapshot) if snapshot else None


def _vaults_into(base: Layer, facts: DiskFacts, request: WayBack) -> t.Iterator[Vault]:
    """Yield the vaults of merges into an image of a disk; none if others have that, too.

    Of a block device it is beside the overlay, in one of the folders where the disk has images, or had.
    """
    paths = []
    if base in facts.own and base.is_device:
        paths = vaults_into_device(base.identity, _folders_of(facts, request))
    elif base in facts.own:
        paths = [*filter(None, [find_vault(place_of(base.real_path, base.is_device, ""))])]
    for path in paths:
        with open_vault(path) as file:
            yield read_vault(file)


def bears(path: str, mark: Mark) -> bool:
    """Whether an image bears the mark; not if it cannot be read."""
    return _mark_of(path) == mark


def _mark_of(path: str, vault: Vault | None = None) -> Mark | None:
    """Return the mark of an image; None if it is not the one that the vault is of: a new one can have its name."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        if vault is None or vault.is_of(file.identity, path, file.generation):
            return read_head(file).mark
    return None


def left_over(facts: DiskFacts, layers: t.Iterable[Layer], request: WayBack, mark: Mark) -> Left | None:
    """Return the snapshot that stands on one of these images of a disk, if a run was killed before it was retired."""
    chain = {layer.identity for layer in facts.layers}
    overlays = _overlays_beside(facts, request)
    for layer in layers:
        for one in overlays:
            is_gone = one.backing_identity == layer.identity and one.identity not in chain and not is_kept(one.path)
            if is_gone and bears(one.path, mark):
                return Left(one.path, layer)
    return None


def why_not_aside(facts: DiskFacts, left: Left) -> Refusal | None:
    """Return that a snapshot which went in while its VM ran is still needed for its bitmaps; None if it is not.

    If libvirt could not move them, those of the image above miss all that was written to the snapshot.
    """
    place = facts.layers.index(left.below)
    with open_image(left.path) as file:
        if not place or find_sign(file) is None:
            return None
    above = facts.layers[place - 1].path
    own = {bitmap.name for bitmap in _recording(left.path) if not bitmap.inconsistent}
    below = _recording(left.below.path) if left.below.format_found == QCOW2 else []
    moved = {bitmap.name for bitmap in below if not bitmap.inconsistent}
    # Of an image that a VM writes to all are stored as inconsistent.
    names = sorted((own & {bitmap.name for bitmap in _recording(above)}) - moved)
    if not names:
        return None
    why = (
        f"went in while its VM ran, but its bitmaps did not ({', '.join(names)}), so increments since them would lack "
        f"what was written to it: {above} stands on the image below already"
    )
    command = shlex.join(["qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", left.path, above])
    # Not with -u: what else has gone into the image below since nobody can tell.
    remedy = f"With the VM shut off, have it recorded again by '{command}', which compares all data. Run this again."
    return Refusal("lost_bitmaps", left.path, why, remedy)


def _recording(path: str) -> list[Bitmap]:
    """Return the bitmaps of an image that record, or did when it was opened."""
    with open_image(path) as file:
        return [bitmap for bitmap in read_image(file).bitmaps if bitmap.recording]


def _left_by_revert(facts: DiskFacts, request: WayBack, mark: Mark) -> GivenUp | None:
    """Return the snapshots that a killed run has left above an image of a disk; None if there are none.

    The lowest one bears the mark. Those above it were to go with it. The topmost one says that it is to go: or else the
    domain has it, on another host or in another definition.
    """
    overlays = _overlays_beside(facts, request)
    used = {layer.identity for layer in facts.layers}
    known = {one.identity: one for one in overlays if one.identity not in used}
    tops = [one for one in overlays if one.identity not in used and not is_kept(one.path)]
    tops = [one for one in tops if _was_left(one.path, mark)]
    for base in facts.own:  # the VM can have got an overlay since
        paths = max((_way_down(one, base.identity, known, mark) for one in tops), key=len, default=[])
        if paths:
            return GivenUp(paths, base)
    return None


def _way_down(top: Above, base: Identity, known: t.Mapping[Identity, Above], mark: Mark) -> list[str]:
    """Return the paths from an overlay down to the one above BASE that bears the mark; none if it does not lead there.

    A run that was killed can have renamed images in between already.
    """
    to_go, seen = [(top, [top.path])], {top.identity}
    while to_go:
        one, way = to_go.pop()
        for below in [one.backing_identity] if one.backing_identity else _kept_below(one):
            if below == base and bears(one.path, mark):
                return way
            if below in known and below not in seen:  # or else they stand on each other
                seen.add(below)
                to_go.append((known[below], [*way, known[below].path]))
    return []


def _kept_below(one: Above) -> t.Iterator[Identity]:
    """Yield which images may have stood where an overlay records its backing file, and are kept; the newest last."""
    for path in all_kept(one.backing_file, REVERTED_AS):
        with contextlib.suppress(OSError):  # such as a symlink that leads nowhere
            yield identity_of(os.stat(path))


def _was_left(path: str, mark: Mark) -> bool:
    """Whether an image is a snapshot of the disk that a mark tells of, whichever, and was being given up."""
    head = _head_of(path)
    is_of_disk = head is not None and head.mark is not None and head.mark[:2] == mark[:2]
    return is_of_disk and is_leaving(head)


def _head_of(path: str) -> Image | None:
    """Return what an image says of itself, without its bitmaps; None if it cannot be read."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        return read_head(file)
    return None


def signed_leftovers(domain: Domain, facts: DiskFacts, request: WayBack) -> t.Iterator[str]:
    """Yield the snapshots of a disk that went in while its VM ran, or may have, in a run that was killed meanwhile."""
    chain = {layer.identity for layer in facts.layers}
    overlays = _overlays_beside(facts, request)
    for layer in facts.own:
        for one in overlays:
            if one.backing_identity != layer.identity or one.identity in chain or is_kept(one.path):
                continue
            with contextlib.suppress(Refusal, OSError), open_image(one.path) as file:
                mark = read_head(file).mark
                is_ours = mark is not None and (mark.vm, mark.target) == (domain.uuid, facts.disk.target)
                if mark is not None and is_ours and find_sign(file) is not None:
                    yield mark.snapshot


def _overlays_beside(facts: DiskFacts, request: WayBack) -> list[Above]:
    """Return the overlays in the folders of a disk's own images, and in that where overlays were made."""
    return [one for folder in _folders_of(facts, request) for one in overlays_in(folder)]


def _folders_of(facts: DiskFacts, request: WayBack) -> list[str]:
    """Return the folders of a disk's own images, and that where overlays were made."""
    beside = folders_beside(layer.path for layer in facts.own)
    made_in = [] if request.directory is None else [os.path.realpath(request.directory)]
    return list(dict.fromkeys([*beside, *made_in]))


def lost_checkpoints(plan: DomainPlan, kept: Kept) -> tuple[str, ...]:
    """Return the names of the checkpoints whose bitmaps the images lack that the domain goes back to.

    What an image has that is older than the checkpoint is an earlier bitmap of this name. So is what it has of one that
    was made on the snapshot, however often it was written to since. What was made once a killed run had left that was
    made on the image below, and stays.
    """
    requests = {disk.target: disk.request for disk in plan.disks}
    bases = {
        target: layer
        for target, request in requests.items()
        if isinstance(request, RevertRequest) and request.puts_on_base
        for layer in chain_of(request.backing_file, request.backing_format).layers[:1]
    }
    return tuple(
        one.name
        for one in kept.checkpoints
        if any(
            bitmap not in bases[target].bitmaps
            or bases[target].is_older_than(one.created)
            or _is_made_after(one.created, requests[target])
            for target, bitmap in one.bitmaps.items()
            if target in bases
        )
    )


def _is_made_after(created: int, request: RevertRequest) -> bool:
    """Whether a checkpoint was made, then, on the snapshot that a disk goes back from, as far as that tells.

    That it was made on it is taken for true within the second in which it was left.
    """
    made, left_at = request.made // 10**9, request.left_at // 10**9
    return 0 < made < created and not 0 < left_at < created
