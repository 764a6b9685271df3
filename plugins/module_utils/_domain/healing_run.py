# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""All domains of a call whose checkpoints are to be valid or absent: select, look, decide, mend, forget, conclude."""

from __future__ import annotations

import functools
import typing as t

from .._base.errors import Refusal, printable
from .._disk import heal
from .._disk.diagnose import left_of_images_gone, look_at_chain, with_others
from .._disk.heal import ABSENT, VALID, HealVerdict
from .._disk.mend import MendBitmaps
from .._disk.run import Batch, run_all
from .._disk.session import Engine, Held, Settings, Vm, failed_by
from .._disk.verdict import FAILED, SKIPPED, problem_fields, root_causes
from .._libvirt.connection import Domain, Kept, KnownCheckpoint, Libvirt, Unreadable
from .._libvirt.definition import DomainDisk
from .._libvirt.switch import check_unchanged, forget
from .healing import CheckpointRequest, Decision, DiskChain, Fate, bitmaps_known, bitmaps_referred, decide
from .healing_live import fates_of_running, remove_from_running
from .inventory import DiskFacts, Inventory, first_image
from .look import DomainLook, look_at
from .overlay import stated_problems

_SAVED = "has a managed save, which goes on with the images, and what is recorded in them, as they are now"


class HealedDomain(t.NamedTuple):
    """What became of one domain."""

    name: str
    uuid: str | None
    state: str
    fates: tuple[Fate, ...] = ()
    rebuilt: frozenset[str] = frozenset()  # names of the checkpoints of which a bitmap was rebuilt
    orphans: tuple[t.Mapping[str, t.Any], ...] | None = ()  # None if it cannot be told
    problems: tuple[Refusal, ...] = ()  # of the domain, beside those of the checkpoints
    is_undone: bool = False  # because of them nothing was done
    changed: bool = False
    warnings: tuple[str, ...] = ()
    diff: tuple[t.Mapping[str, t.Any], t.Mapping[str, t.Any]] = ({}, {})

    @property
    def failures(self) -> list[Refusal]:
        """Why it failed."""
        return root_causes([*self.problems, *(one.problem for one in self.fates if one.problem is not None)])

    def as_result(self) -> dict[str, t.Any]:
        """Return the domain as the module returns it."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "state": self.state,
            "checkpoints": [self._checkpoint(one) for one in sorted(self.fates, key=lambda one: one.name)],
            "removed_orphans": None if self.orphans is None else list(self.orphans),
            **problem_fields(self.failures),
        }

    def _checkpoint(self, one: Fate) -> dict[str, t.Any]:
        problem = one.problem
        if problem is None and self.is_undone and not one.is_as_wanted:
            problem = self.problems[0]
        state = FAILED if problem else heal.REBUILT if one.name in self.rebuilt else one.state
        return {"name": printable(one.name), "state": state, **problem_fields([problem] if problem else [])}


class ShutOff(t.NamedTuple):
    """A domain that is shut off, with what is to be done."""

    domain: Domain
    kept: Kept
    decision: Decision
    has_work: bool
    problems: tuple[Refusal, ...] = ()  # why nothing of it is done
    warnings: tuple[str, ...] = ()


class Running(t.NamedTuple):
    """A domain that runs, with what is to be done."""

    domain: Domain
    look: DomainLook
    fates: tuple[Fate, ...]
    has_work: bool


class HealCall:
    """One call: what is known of each domain, and what became of it."""

    def __init__(
        self, daemon: Libvirt, names: t.Sequence[str], request: CheckpointRequest, settings: Settings, *, live: bool
    ) -> None:
        """Select the domains, and decide what is to become of each."""
        self._daemon = daemon
        self._request = request
        self._settings = settings
        self._live = live
        self._inventory = Inventory(daemon.domains())
        found, self._unmatched = self._inventory.select(names)
        self._plans = [one if isinstance(one, Unreadable) else self._plan(one) for one in found]
        self._begun: set[str] = set()  # UUIDs of domains of which checkpoints were forgotten
        self._is_ended = False  # by a signal, while images were mended

    def _plan(self, domain: Domain) -> ShutOff | Running | Unreadable:
        if domain.state is not None:
            look = look_at(self._daemon, domain, counts=False)
            return look if isinstance(look, Unreadable) else self._plan_running(look)
        try:
            kept = self._daemon.kept_now(domain)
        except Refusal as exc:
            return Unreadable(domain.name, exc)
        return self._plan_shut_off(domain, kept)

    def _plan_running(self, look: DomainLook) -> Running:
        fates = fates_of_running(look, self._request)
        has_work = any(not one.is_as_wanted for one in fates) or self._request.removes_orphans
        return Running(look.domain, look, tuple(fates), has_work or (self._request.cumulative and bool(fates)))

    def _plan_shut_off(self, domain: Domain, kept: Kept) -> ShutOff:
        facts = [self._inventory.facts(domain, disk) for disk in self._disks(domain, kept)]
        chains = [self._chain(one, kept, with_all=False) for one in facts]
        decision = self._decide(domain, kept, chains)
        if decision.writes:  # to look through whole folders takes its time
            decision = self._decide(domain, kept, [self._chain(one, kept, with_all=True) for one in facts])
        has_work = bool(decision.forgotten) or self._would_write(decision)
        asked = [one for one in facts if one.disk.target in decision.requests]
        # Of a chain that the VM does not use no verdict holds either.
        of_chains = _of_other_chains(domain, asked)
        decision = decision._replace(fates=tuple(_untold(one, of_chains) for one in decision.fates))
        problems = [why for found in of_chains.values() for why in found]
        problems += _why_not(domain, asked) if has_work else []
        warnings = tuple(warning for one in chains for warning in one.warnings)
        return ShutOff(domain, kept, decision, has_work, tuple(problems), warnings)

    def _disks(self, domain: Domain, kept: Kept) -> list[DomainDisk]:
        """Return the disks that the checkpoints asked for are about, and all that the domain writes to.

        Beside those a killed run may have left vaults once libvirt had forgotten the checkpoints.
        """
        asked = {target for one in self._request.select(kept.checkpoints) for target in one.bitmaps}
        return [disk for disk in domain.definition.disks if disk.target in asked or disk.can_have_bitmaps]

    def _decide(self, domain: Domain, kept: Kept, chains: t.Sequence[DiskChain]) -> Decision:
        return decide((domain.name, domain.uuid), self._request, kept.checkpoints, chains)

    def _chain(self, facts: DiskFacts, kept: Kept, *, with_all: bool) -> DiskChain:
        """Return a disk with its chain; `with_all`: and with what else stands on its images."""
        disk = facts.disk
        if disk.source is None or disk.why_unfit is not None:
            why = f"cannot be looked at: {disk.why_unfit or 'it has no file'}"
            refusal = Refusal("disk_unfit", disk.source or disk.target, why, "Make it fit.")
            return DiskChain(disk.target, disk.source or "", problem=refusal)
        if not disk.can_have_bitmaps:
            return DiskChain(disk.target, disk.source, holds_none=True)
        others = self._inventory.sharers(facts) if with_all else ()
        with self._look() as held:
            try:
                patients = look_at_chain(self._look_request(disk.source, disk.target, kept), held)
                images = with_others(patients, dict(others)) if with_all else [one.standing for one in patients]
            except (Refusal, OSError) as exc:
                refused = failed_by(HealVerdict(heal.HealRequest(disk.source)), exc)
                return DiskChain(disk.target, disk.source, problem=refused.problems[0])
            has_vault = any(one.vault is not None for one in patients)
            return DiskChain(
                target=disk.target,
                path=disk.source,
                images=tuple(images),
                has_vault=has_vault,
                others=others,
                real_paths=tuple(one.layer.real_path for one in patients),
                warnings=tuple(left_of_images_gone(patients)),
            )

    def _look_request(self, path: str, target: str, kept: Kept) -> heal.HealRequest:
        """Return what tells of the bitmaps of a disk which there are to be, and nothing of what is asked for."""
        return heal.HealRequest(
            path,
            names=(),
            assume_not_emptied=self._request.assume_not_emptied,
            created=bitmaps_known(kept.checkpoints, target),
            referred=bitmaps_referred(kept.checkpoints),
        )

    def _look(self) -> Held:
        return Held(self._settings, Engine(self._settings), locking=False)

    def _would_write(self, decision: Decision) -> bool:
        """Return whether anything is to be written; what headers cannot tell is told by the bits."""
        if not decision.writes or not self._request.cumulative:
            return decision.writes
        with self._look() as held:
            try:
                return any(MendBitmaps().judge(one, held).changed for one in decision.requests.values())
            except (Refusal, OSError):
                return True  # the run will say why

    def run(self) -> tuple[list[HealedDomain], list[str]]:
        """Do it, each domain that is shut off all or none; return what became of them, and warnings."""
        verdicts, of_images = self._mend()
        results = [self._conclude(one, verdicts) for one in self._plans]
        unmatched = [f"{one}: no domain of this host matches it." for one in self._unmatched if one != "*"]
        known = [checkpoint for kept in self._kept() for checkpoint in kept.checkpoints]
        unmatched += [f"{one}: no checkpoint of these domains matches it." for one in self._request.unmatched(known)]
        return results, list(
            dict.fromkeys([*unmatched, *(warning for one in results for warning in one.warnings), *of_images])
        )

    def _kept(self) -> t.Iterator[Kept]:
        """Yield what libvirt keeps of each domain that could be looked at."""
        for one in self._plans:
            if not isinstance(one, Unreadable):
                yield one.look.kept if isinstance(one, Running) else one.kept

    def _mend(self) -> tuple[dict[tuple[str, str], HealVerdict], tuple[str, ...]]:
        """Mend the images of the domains that are shut off; return the verdicts by UUID and target."""
        sound = {
            one.domain.uuid: one
            for one in self._plans
            if isinstance(one, ShutOff) and one.has_work and not one.problems
        }
        keys = [(uuid, target) for uuid, one in sound.items() for target in one.decision.requests]
        batch = Batch(MendBitmaps(), [sound[uuid].decision.requests[target] for uuid, target in keys])
        vms: dict[str | None, Vm] = {uuid: self._vm(one) for uuid, one in sound.items()}
        run_all([batch], self._settings, vms)
        outcome = batch.outcome()
        self._is_ended = any(failure.code == "interrupted" for failure in outcome.failures)
        return dict(zip(keys, outcome.verdicts)), outcome.warnings

    def _vm(self, plan: ShutOff) -> Vm:
        """Return what a session is to know of a domain."""
        forget_them = functools.partial(self._forget, plan)
        return Vm(forget_them, first_image(plan.domain), functools.partial(self._check, plan))

    def _check(self, plan: ShutOff) -> None:
        """Refuse a domain that is not any more what was judged."""
        check_unchanged(self._daemon, plan.domain)
        if self._daemon.kept_now(plan.domain).checkpoints != plan.kept.checkpoints:
            raise _changed(plan.domain)

    def _check_running(self, plan: Running) -> None:
        """Refuse a domain of which somebody has made a checkpoint anew that is to go: libvirt deletes by the name."""
        going = {one.name for one in plan.fates if one.state == heal.REMOVED}
        if not going or self._settings.check_mode:
            return
        judged = {one.name: _essence(one) for one in plan.look.kept.checkpoints if one.name in going}
        now = {one.name: _essence(one) for one in self._daemon.kept_now(plan.domain).checkpoints if one.name in judged}
        if any(judged[name] != essence for name, essence in now.items()):
            raise _changed(plan.domain)

    def _forget(self, plan: ShutOff) -> None:
        """Have libvirt forget the checkpoints whose bitmaps are gone; before, it would refuse an increment."""
        self._begun.add(plan.domain.uuid)
        forget(self._daemon, plan.domain, plan.decision.forgotten)

    def _conclude(
        self, plan: ShutOff | Running | Unreadable, verdicts: t.Mapping[tuple[str, str], HealVerdict]
    ) -> HealedDomain:
        if isinstance(plan, Unreadable):
            return HealedDomain(plan.name, None, FAILED, problems=(plan.problem,))
        if isinstance(plan, Running):
            return self._conclude_running(plan)
        return self._conclude_shut_off(
            plan, {target: one for (uuid, target), one in verdicts.items() if uuid == plan.domain.uuid}
        )

    def _conclude_running(self, plan: Running) -> HealedDomain:
        domain = plan.domain
        if plan.has_work and self._request.skips_running:
            return HealedDomain(domain.name, domain.uuid, SKIPPED)
        if plan.has_work and not self._live:
            remedy = "Shut it down and run this again; or use running=live, which has libvirt delete what is to go."
            refusal = Refusal("running", domain.name, f"is {domain.state}", remedy)
            return HealedDomain(domain.name, domain.uuid, FAILED, plan.fates, problems=(refusal,), is_undone=True)
        try:
            if plan.has_work and self._is_ended:
                raise _ended(domain)
            self._check_running(plan)
            fates = remove_from_running(self._daemon, plan.look, plan.fates, check_mode=self._settings.check_mode)
        except Refusal as exc:
            return HealedDomain(domain.name, domain.uuid, FAILED, plan.fates, problems=(exc,), is_undone=True)
        gone = [one.name for one in fates if one.state == heal.REMOVED and one.problem is None]
        return HealedDomain(
            name=domain.name,
            uuid=domain.uuid,
            state=_state(self._request, fates, removed=bool(gone), rebuilt=False),
            fates=tuple(fates),
            orphans=None if self._request.removes_orphans else (),
            changed=bool(gone),
            warnings=tuple(self._left_for_later(domain)),
            diff=_diff(plan.look.kept, gone, ()),
        )

    def _left_for_later(self, domain: Domain) -> list[str]:
        """Return what was asked for and cannot be done while a domain runs."""
        options = {
            "orphans=remove": self._request.removes_orphans,
            "bitmap_content=cumulative": self._request.cumulative and self._request.state == VALID,
        }
        return [f"{domain.name}: runs, so nothing is done for {one}." for one, asked in options.items() if asked]

    def _conclude_shut_off(self, plan: ShutOff, verdicts: t.Mapping[str, HealVerdict]) -> HealedDomain:
        domain, decision = plan.domain, plan.decision
        failed = root_causes([*plan.problems, *(one for verdict in verdicts.values() for one in verdict.refusals)])
        if not failed and not decision.requests and decision.forgotten:
            failed = self._forget_alone(plan)
        if not failed and self._is_left_undone(plan):
            # Its turn did not come, although its images were ready already: then no image tells of the signal.
            failed = [_ended(domain)]
        begun = domain.uuid in self._begun
        done = () if failed else tuple(verdicts.items())
        items = [(target, item) for target, verdict in done for item in verdict.items]
        rebuilt = {
            one.name
            for one in decision.fates
            for target, item in items
            if item.state == heal.REBUILT and one.bitmaps.get(target) == item.name and one.state != heal.REMOVED
        }
        orphans = _removed_orphans(items, decision)
        gone = () if failed else decision.forgotten
        problems = (*failed, *decision.problems)
        whole = _state(self._request, decision.fates, removed=bool(gone or orphans), rebuilt=bool(rebuilt))
        return HealedDomain(
            name=domain.name,
            uuid=domain.uuid,
            state=FAILED if problems else whole,
            fates=decision.fates,
            rebuilt=frozenset(rebuilt),
            orphans=tuple(orphans),
            problems=problems,
            is_undone=bool(failed),
            changed=begun or bool(gone) or any(verdict.changed for _target, verdict in done),
            warnings=plan.warnings,
            diff=_diff(plan.kept, gone, [verdict for _target, verdict in done if verdict.changed]),
        )

    def _is_left_undone(self, plan: ShutOff) -> bool:
        """Whether libvirt still knows checkpoints that it was to forget."""
        was_to_be = plan.has_work and bool(plan.decision.forgotten) and not self._settings.check_mode
        return was_to_be and plan.domain.uuid not in self._begun

    def _forget_alone(self, plan: ShutOff) -> list[Refusal]:
        """Have libvirt forget checkpoints that are about no image any more; return why that failed."""
        if self._settings.check_mode:
            return []
        try:
            self._check(plan)
            self._forget(plan)
        except Refusal as exc:
            return [exc]
        return []


def _essence(one: KnownCheckpoint) -> tuple[object, ...]:
    """Return what stays of a checkpoint while its domain writes."""
    return one.created, one.bitmaps, None if one.live is None else set(one.live.sizes)


def _changed(domain: Domain) -> Refusal:
    return Refusal("changed_meanwhile", domain.name, "its checkpoints were changed meanwhile", "Run this again.")


def _ended(domain: Domain) -> Refusal:
    """Return the refusal of a domain whose turn did not come."""
    why = "its checkpoints were not removed, because the run was ended"
    return Refusal("interrupted", domain.name, why, "Run this again.")


def _of_other_chains(domain: Domain, facts: t.Sequence[DiskFacts]) -> dict[str, list[Refusal]]:
    """Return by target of which disks the definition states other images than the chain that was looked at has."""
    found = {one.disk.target: stated_problems(domain.name, one.disk, one.layers) for one in facts if one.layers}
    return {target: problems for target, problems in found.items() if problems}


def _untold(fate: Fate, of_chains: t.Mapping[str, t.Sequence[Refusal]]) -> Fate:
    """Return what is to become of a checkpoint; nothing if it is about a disk whose chain the VM does not use."""
    problem = next((of_chains[target][0] for target in fate.bitmaps if target in of_chains), None)
    return fate._replace(problem=fate.problem or problem, is_as_wanted=fate.is_as_wanted and problem is None)


def _why_not(domain: Domain, facts: t.Sequence[DiskFacts]) -> list[Refusal]:
    """Return why nothing can be done to a domain that is shut off, and to these disks."""
    problems = []
    if domain.managed_save:
        remedy = "Start it and shut it down properly, or give up its saved state with 'virsh managedsave-remove'."
        problems.append(Refusal("managed_save", domain.name, _SAVED, remedy))
    for one in facts:
        whose = [*one.writers, *one.suspects]
        if whose:
            why = f"its disk {one.disk.target}, {one.disk.source}, is a disk of {', '.join(whose)} too"
            remedy = "Give each a disk of its own, or undefine the domain that is not needed any more."
            problems.append(Refusal("shared_disk", domain.name, why, remedy))
    return problems


def _state(request: CheckpointRequest, fates: t.Sequence[Fate], *, removed: bool, rebuilt: bool) -> str:
    """Return the word for a domain."""
    if any(one.problem is not None for one in fates):
        return FAILED
    whole = VALID if request.state == VALID else ABSENT
    return heal.REMOVED if removed else heal.REBUILT if rebuilt else whole


def _removed_orphans(items: t.Sequence[tuple[str, heal.Item]], decision: Decision) -> list[dict[str, t.Any]]:
    """Return the bitmaps that no checkpoint refers to and that were removed, image by image."""
    found: dict[tuple[str, str], list[str]] = {}
    for target, item in items:
        if item.state == heal.REMOVED and item.name in decision.orphans.get(target, ()):
            found.setdefault((target, item.image or ""), []).append(printable(item.name))
    return [
        {"target": target, "image": printable(image), "bitmaps": sorted(names)}
        for (target, image), names in found.items()
    ]


def _diff(
    kept: Kept, gone: t.Collection[str], verdicts: t.Sequence[HealVerdict]
) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
    """Return what a diff shows: the checkpoints that libvirt knows, and what the bitmaps mark that are written."""
    names = [printable(one.name) for one in kept.checkpoints]
    left = [printable(one.name) for one in kept.checkpoints if one.name not in gone]
    before: dict[str, t.Any] = {"checkpoints": names, "bitmaps": {}} if gone or verdicts else {}
    after: dict[str, t.Any] = {"checkpoints": left, "bitmaps": {}} if gone or verdicts else {}
    for verdict in verdicts:
        was, now = verdict.as_diff()
        before["bitmaps"].update(was)
        after["bitmaps"].update(now)
    return before, after
