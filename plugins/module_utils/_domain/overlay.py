# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read, decide, act: overlays for the disks of libvirt domains, and the domains switched to them."""

from __future__ import annotations

import itertools
import os
import stat
import typing as t

from .._base.errors import Qcow2Error, advice, printable
from .._disk.bitmap_rules import INCOMPLETE, Checkpoint, Link, judge
from .._disk.examine import examine
from .._disk.overlay import CREATED, FAILED, PRESENT, Creation, Verdict, Wanted
from .._disk.session import Machine, Settings, make_overlays
from .._libvirt.connection import Domain, KnownCheckpoint, Libvirt, Unreadable, select
from .._libvirt.definition import DomainDisk, StatedChain, StatedImage, disks_of, parts_of, switched
from .._qcow2.chain import Layer, read_chain
from .._qcow2.header import Bitmap, open_image

_EXTENSIONS = (".qcow2", ".qcow", ".img", ".raw")  # that are no part of an image's stem
_NOT_ASKED_FOR = "not asked for"
_READ_ONLY = ("cdrom", "floppy", "read-only")  # why a disk is unfit, of those that are not written to
SKIPPED = "skipped"


class Request(t.NamedTuple):
    """What is wanted of every domain."""

    snapshot: str
    targets: list[str] | None  # None: all disks that can take part
    directory: str | None  # None: beside each disk
    relative: bool
    creation: Creation
    skips_running: bool = False  # domains that are not shut off are left out, instead of a failure


class Skipped(t.NamedTuple):
    """A disk that takes no part."""

    target: str
    reason: str


class Plan(t.NamedTuple):
    """What is to become of one domain."""

    domain: Domain
    wanted: dict[str, Wanted]  # by target; the overlays, those that are there already too
    overlays: dict[str, str]  # path by target, of the disks that the definition does not have as overlays yet
    skipped: list[Skipped]
    problems: list[str]

    @property
    def definition(self) -> str:
        """The definition that the domain is to get."""
        return switched(self.domain.definition, self.overlays)


class DomainOutcome(t.NamedTuple):
    """What became of one domain."""

    name: str
    uuid: str | None
    state: str  # created, present, failed or skipped
    overlays: list[tuple[str, Verdict]]  # with the target
    skipped: list[Skipped]
    checkpoints: list[Checkpoint]
    problems: list[str]
    diff: tuple[str, str]  # the disks' elements before and after
    tops: t.Mapping[str, str]  # the topmost image of each disk, by target, as the definition has it after the task

    def as_result(self) -> dict[str, t.Any]:
        """Return the domain as the module returns it."""
        result: dict[str, t.Any] = {
            "name": self.name,
            "uuid": self.uuid,
            "state": self.state,
            "overlays": [
                {
                    "target": target,
                    **verdict.as_result(),
                    "topmost": printable(self.tops.get(target, verdict.wanted.path)),
                }
                for target, verdict in self.overlays
            ],
            "skipped_disks": [disk._asdict() for disk in self.skipped],
            "checkpoints": [checkpoint.as_result() for checkpoint in self.checkpoints],
        }
        return {**result, "msg": self.message} if self.problems else result

    @property
    def message(self) -> str:
        """Why it failed, in one text."""
        return printable(" ".join(self.problems))


def overlay_domains(
    libvirt: Libvirt, names: t.Sequence[str], request: Request, settings: Settings
) -> tuple[list[DomainOutcome], list[str]]:
    """Make the overlays of all these domains and switch the domains, each all or none; return them, and warnings."""
    everybody = libvirt.domains()
    found, unmatched = select(everybody, names)
    users = _users_of_images([domain for domain in everybody.values() if isinstance(domain, Domain)])
    plans = [plan_domain(domain, request, users) for domain in found if isinstance(domain, Domain)]
    left_out = {plan.domain.name: _left_out(plan) for plan in plans if _is_to_be_left_out(plan, request, names)}
    sound = [plan for plan in plans if not plan.problems and plan.domain.name not in left_out]
    switches = {plan.domain.uuid: _Switch(libvirt, plan, settings.seconds) for plan in sound if plan.overlays}
    wanted = [wanted for plan in sound for wanted in plan.wanted.values()]
    first_images = {plan.domain.uuid: _first_image(plan.domain) for plan in sound}
    machines = {uuid: Machine(switch.run, first_images[uuid]) for uuid, switch in switches.items()}
    outcome = make_overlays(wanted, settings, machines)
    verdicts = {(verdict.wanted.vm, verdict.wanted.path): verdict for verdict in outcome.verdicts}
    results = {
        plan.domain.name: _conclude(plan, verdicts, switches.get(plan.domain.uuid), settings.check_mode)
        for plan in plans
    }
    results.update(left_out)
    everything = [_unreadable(one) if isinstance(one, Unreadable) else results[one.name] for one in found]
    warnings = [f"{pattern}: no domain of this host matches it." for pattern in unmatched]
    return everything, warnings + outcome.warnings


class Users(t.NamedTuple):
    """The names of the domains of this host that use an image, by its real path."""

    anyhow: dict[str, set[str]]  # anywhere in the chain of a disk
    writing: dict[str, set[str]]  # as the topmost image of a disk that they write to


def _users_of_images(domains: t.Sequence[Domain]) -> Users:
    """Return which domains use which images."""
    users = Users({}, {})
    for domain in domains:
        for disk in disks_of(domain.definition):
            if disk.source is not None:
                layers, _problem = _layers_of(disk.source, disk.format)
                for path in [os.path.realpath(disk.source), *(layer.real_path for layer in layers)]:
                    users.anyhow.setdefault(path, set()).add(domain.name)
                if disk.unfit not in _READ_ONLY:
                    users.writing.setdefault(os.path.realpath(disk.source), set()).add(domain.name)
    return users


def _first_image(domain: Domain) -> str | None:
    """Return the image that a domain, when it starts, opens first for writing, for itself alone."""
    own = [disk.source for disk in disks_of(domain.definition) if disk.unfit not in (*_READ_ONLY, "shareable")]
    return next(filter(None, own), None)


class _Switch:
    """The last step for a domain, which the engine takes once its overlays are there."""

    def __init__(self, libvirt: Libvirt, plan: Plan, seconds: float) -> None:
        self._libvirt = libvirt
        self._seconds = seconds
        self._plan = plan
        self.problem: str | None = None
        self.is_done = False

    def run(self) -> None:
        """Switch the domain to its overlays; Qcow2Error when that fails."""
        try:
            gone = [path for path in self._plan.overlays.values() if not os.path.exists(path)]
            if gone:
                raise Qcow2Error(f"{gone[0]}: was removed meanwhile. Run this again.")
            self._libvirt.switch(self._plan.domain, self._plan.definition, self._plan.overlays, self._seconds)
        except Qcow2Error as exc:
            self.problem = str(exc)
            raise
        self.is_done = True


def plan_domain(domain: Domain, request: Request, users: Users) -> Plan:
    """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
    plan = Plan(domain, {}, {}, [], [])
    for disk in disks_of(domain.definition):
        reason = _reason_to_skip(disk, request)
        if reason is None:
            _plan_disk(plan, disk, request, users)
        else:
            plan.skipped.append(Skipped(disk.target, reason))
    skipped = {disk.target: disk.reason for disk in plan.skipped}
    for target in request.targets or ():
        if target not in plan.wanted:
            why = skipped.get(target, "it has no such disk")
            plan.problems.append(f"{domain.name}: its disk {target} cannot take part: {why}. Correct disks.")
    if not plan.wanted and not plan.problems:
        listed = ", ".join(f"{disk.target}: {disk.reason}" for disk in plan.skipped) or "it has no disks"
        plan.problems.append(f"{domain.name}: none of its disks can take part ({listed}).")
    plan.problems.extend(_state_problems(plan))
    return plan


def _reason_to_skip(disk: DomainDisk, request: Request) -> str | None:
    """Return why a disk is left out, or None."""
    if disk.unfit is not None:
        return disk.unfit
    if request.targets is not None and disk.target not in request.targets:
        return _NOT_ASKED_FOR
    if disk.excluded and request.targets is None:
        return "excluded by snapshot='no' in the definition"
    if request.directory is None and (disk.kind == "block" or _is_device(disk.source)):
        return "block device, beside which no overlay can be made; give a directory"
    return None


def _is_device(source: str | None) -> bool:
    """Whether the image of a disk is a block device, whatever the definition calls it."""
    try:
        return source is not None and stat.S_ISBLK(os.stat(source).st_mode)
    except OSError:
        return False


def _plan_disk(plan: Plan, disk: DomainDisk, request: Request, users: Users) -> None:
    """Add to the plan what is to become of a disk that takes part."""
    name, source = plan.domain.name, t.cast("str", disk.source)
    layers, problem = _layers_of(source, disk.format)
    # A template belongs to all its clones; neither its name nor its snapshots are those of this domain.
    below_top = itertools.takewhile(lambda layer: users.anyhow.get(layer.real_path) == {name}, layers[1:])
    own = [*layers[:1], *below_top]
    others = users.writing.get(os.path.realpath(source), set()) - {name}
    # Whoever is on that snapshot already, or above it, may have been given another directory then.
    for above, below in zip(own, layers[1:]):
        if os.path.basename(above.path).endswith(f".{request.snapshot}.qcow2"):
            plan.wanted[disk.target] = Wanted(above.path, below.path, below.format or "qcow2", vm=plan.domain.uuid)
            break
    else:
        stem = stem_of([layer.path for layer in own] or [source])
        path = os.path.join(request.directory or os.path.dirname(source), f"{stem}.{request.snapshot}.qcow2")
        if others:
            problem = (
                f"{name}: its disk {disk.target} is a disk of {', '.join(sorted(others))} too, which would go on "
                "writing below the overlay. Give each a disk of its own."
            )
        if path in plan.overlays.values():
            problem = (
                f"{name}: several of its disks would get the overlay {path}. Take them one by one, by disks, into "
                "directories of their own."
            )
        plan.overlays[disk.target] = path
        plan.wanted[disk.target] = Wanted(
            path=path,
            backing_file=source,
            backing_format=disk.format,
            vm=plan.domain.uuid,
            relative=request.relative,
            creation=request.creation,
            unused=True,
        )
    if problem is None and disk.stated_chain is not None:
        problem = _stated_problem(name, disk, disk.stated_chain, layers)
    if problem is not None:
        plan.problems.append(problem)


def _layers_of(source: str, image_format: str) -> tuple[list[Layer], str | None]:
    """Return the chain of a disk's image, or why it cannot be read."""
    try:
        fd = open_image(source)
        try:
            return list(read_chain(fd, source, image_format)), None
        finally:
            os.close(fd)
    except Qcow2Error as exc:
        return [], str(exc)
    except OSError as exc:
        return [], f"{source}: cannot be read: {exc.strerror}. {advice(exc)}"


def stem_of(paths: t.Sequence[str]) -> str:
    """Return what an overlay's name begins with, from the chain's paths, top to base.

    It is the name of the topmost image without its extension, and without what snapshots have added to the name of
    the image below: on top of web.qcow2 and web.monday.qcow2 it is still web.
    """
    stem = ""
    for path in reversed(paths):
        name = os.path.basename(path)
        own = next((name[: -len(end)] for end in _EXTENSIONS if name.endswith(end) and name != end), name)
        if not stem or not own.startswith(f"{stem}."):
            stem = own
    return stem


def _stated_problem(name: str, disk: DomainDisk, stated: StatedChain, layers: t.Sequence[Layer]) -> str | None:
    """Return how the chain that the definition states differs from the one that the images record."""
    recorded = [StatedImage(layer.real_path, layer.format or "") for layer in layers[1:]]
    images = [StatedImage(os.path.realpath(image.path), image.format) for image in stated.images]
    unnamed = [layer.path for layer in layers[1:] if layer.format is None]
    # Where the images record no format, the one that the definition states is not another one.
    known = [image if image.format else image._replace(format=own.format) for image, own in zip(recorded, images)]
    if images != known or (stated.is_complete and len(images) != len(recorded)):
        return (
            f"{name}: its definition states another backing chain for {disk.target} ({_shown(images)}) than the images "
            f"record ({_shown(recorded)}), so the guest may have been seeing other data than an overlay would show. "
            "Find out which is right; then correct <backingStore> in the definition, or the images with "
            "'qemu-img rebase -u'."
        )
    if unnamed:
        return (
            f"{name}: the format of {unnamed[0]} is stated in the definition only, not in the image above it, which an "
            "overlay needs. Record it with 'qemu-img rebase -u -b … -F …'."
        )
    return None


def _shown(images: t.Sequence[StatedImage]) -> str:
    """Return a chain for a message."""
    return " > ".join(f"{image.path} as {image.format or 'no format'}" for image in images) or "none"


def _state_problems(plan: Plan) -> list[str]:
    """Return why the domain cannot be switched as it is just now."""
    domain = plan.domain
    if domain.running_definition is not None and not plan.overlays:
        running = {disk.target: disk.source for disk in disks_of(domain.running_definition)}
        defined = {disk.target: disk.source for disk in disks_of(domain.definition)}
        if any(running.get(target) != defined[target] for target in plan.wanted):
            return [f"{domain.name}: runs with other disks than its definition has. Shut it down and run this again."]
    if not plan.overlays:
        return []
    if not domain.persistent:
        return [f"{domain.name}: is transient: it has no definition that could be changed. Define it first."]
    if domain.activity is not None:
        return [
            f"{domain.name}: is {domain.activity}. Shut it down and run this again; for a running domain, "
            "'virsh snapshot-create-as --disk-only' does it all, bitmaps included."
        ]
    if domain.managed_save:
        return [
            f"{domain.name}: has a managed save, which would go on writing to the images below the overlays. Start it "
            "and shut it down properly, or give up its saved state with 'virsh managedsave-remove'."
        ]
    return []


def _is_to_be_left_out(plan: Plan, request: Request, names: t.Sequence[str]) -> bool:
    """Whether the domain is skipped: by request since it runs, or since only a pattern names it and it has no disk."""
    if plan.overlays:
        return request.skips_running and plan.domain.activity is not None
    return not plan.wanted and request.targets is None and plan.domain.name not in names


def _left_out(plan: Plan) -> DomainOutcome:
    """Return the outcome for a domain that is left as it is."""
    reason = f"the domain is {plan.domain.activity}"
    skipped = [*plan.skipped, *(Skipped(target, reason) for target in plan.wanted)]
    checkpoints = _judge_checkpoints(plan, {})
    return DomainOutcome(plan.domain.name, plan.domain.uuid, SKIPPED, [], skipped, checkpoints, [], ("", ""), {})


def _conclude(
    plan: Plan, verdicts: t.Mapping[tuple[str | None, str], Verdict], switch: _Switch | None, check_mode: bool
) -> DomainOutcome:
    """Return what became of a domain."""
    own = [(target, verdicts.get((plan.domain.uuid, wanted.path))) for target, wanted in plan.wanted.items()]
    overlays = [(target, verdict) for target, verdict in own if verdict is not None]
    problems = list(plan.problems)
    problems += [verdict.message for _target, verdict in overlays if verdict.state == FAILED]
    if switch is not None and switch.problem is not None:
        problems.append(switch.problem)
    elif switch is not None and not problems and not switch.is_done and not check_mode:
        problems.append(f"{plan.domain.name}: was not switched to its overlays. Run this again.")
    changed = switch is not None or any(verdict.state == CREATED for _target, verdict in overlays)
    is_fine = not problems
    return DomainOutcome(
        name=plan.domain.name,
        uuid=plan.domain.uuid,
        state=FAILED if problems else CREATED if changed else PRESENT,
        overlays=overlays,
        skipped=plan.skipped,
        checkpoints=_judge_checkpoints(plan, dict(overlays) if is_fine else {}),
        problems=list(dict.fromkeys(problems)),
        diff=(_parts(plan.domain.definition, plan), _parts(plan.definition, plan)) if is_fine else ("", ""),
        tops=_topmost(plan.definition if is_fine else plan.domain.definition),
    )


def _topmost(definition: str) -> dict[str, str]:
    """Return the topmost image of each disk that a definition has, by target."""
    return {disk.target: disk.source for disk in disks_of(definition) if disk.source is not None}


def _parts(definition: str, plan: Plan) -> str:
    """Return what a diff shows of a definition."""
    return f"<domain> {plan.domain.name}\n{parts_of(definition, plan.overlays)}" if plan.overlays else ""


def _unreadable(domain: Unreadable) -> DomainOutcome:
    """Return the outcome for a domain of which nothing is known."""
    return DomainOutcome(domain.name, None, FAILED, [], [], [], [domain.problem], ("", ""), {})


class _Chain(t.NamedTuple):
    """The chain of a disk as it is, or will be, after the run."""

    links: list[Link]
    is_complete: bool


def _judge_checkpoints(plan: Plan, overlays: t.Mapping[str, Verdict]) -> list[Checkpoint]:
    """Return for each checkpoint that libvirt knows whether it can be used after the run."""
    targets = {target for known in plan.domain.checkpoints for target in known.bitmaps}
    chains = {
        disk.target: _chain_after(disk, overlays.get(disk.target), plan)
        for disk in disks_of(plan.domain.definition)
        if disk.target in targets
    }
    return [_judge_checkpoint(known, chains) for known in plan.domain.checkpoints]


def _chain_after(disk: DomainDisk, verdict: Verdict | None, plan: Plan) -> _Chain:
    """Return the chain of a disk after the run; the overlay is taken as it was promised, so also in check mode."""
    source = examine(disk.source or "", follow=True, count=False, image_format=disk.format)
    if verdict is None or disk.target not in plan.overlays:
        return _Chain(source.links, source.is_complete)
    bitmaps = {b.name: Bitmap(b.name, b.granularity, recording=True, inconsistent=False) for b in verdict.bitmaps}
    overlay = Link(verdict.wanted.path, verdict.virtual_size or 0, bitmaps)
    return _Chain([overlay, *source.links], source.is_complete)


def _judge_checkpoint(known: KnownCheckpoint, chains: t.Mapping[str, _Chain]) -> Checkpoint:
    """Return the worst verdict of all disks of a checkpoint, since a backup needs all of them."""
    verdicts = [
        judge(bitmap, chains[target].links, chains[target].is_complete)
        if chains[target].links
        else Checkpoint(
            bitmap, None, INCOMPLETE, None, f"The image of the disk {target} cannot be read. Mend it first."
        )
        for target, bitmap in known.bitmaps.items()
        if target in chains  # the definition may have lost a disk since
    ]
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.valid], default=None)
    return worst._replace(name=known.name) if worst else Checkpoint(known.name, None)
