# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""All domains of a call: select, plan, run, switch, conclude."""

from __future__ import annotations

import functools
import os
import typing as t

from .._base.errors import Refusal, printable
from .._disk.progress import await_merges_of
from .._disk.run import Batch, run_all
from .._disk.session import Operation, Settings, Vm
from .._disk.verdict import FAILED, SKIPPED, root_causes
from .._libvirt.connection import Domain, Kept, KnownCheckpoint, Libvirt, LiveBitmaps, Unreadable
from .._libvirt.definition import DomainDisk
from .._libvirt.switch import forget
from .checkpoints import Chain, chain_of, judge_checkpoints
from .inventory import DiskFacts, Inventory
from .plan import DiskPlan, DomainOutcome, DomainPlan, SkippedDisk, failed_outcome


class Aim(t.Protocol):
    """What a call does to domains: the rules that differ from one state to another, and from one kind of domain."""

    @property
    def words(self) -> tuple[str, str]:
        """Return the states of a domain of which something was done, and of one of which nothing is to be done."""

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Return the disks that are asked for; None for all that can take part."""

    @property
    def skips_running(self) -> bool:
        """Return whether domains that are not shut off are left out, instead of a failure."""

    def takes(self, domain: Domain) -> bool:
        """Return whether it is the aim for this domain, unless one before it is."""

    def operation(self, daemon: Libvirt, domains: t.Sequence[Domain]) -> Operation[t.Any, t.Any]:
        """Return what is done to the images of these domains."""

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""

    def conflicts(self, plans: t.Sequence[DomainPlan]) -> t.Mapping[str, t.Sequence[Refusal]]:
        """Return by the name of the domain what is wrong with a plan beside the others."""

    def chain_after(self, disk: DomainDisk, verdict: t.Any | None) -> Chain:
        """Return the chain of a disk after the run; of what is done the verdict promises what is there then."""

    def is_done(self, problems: t.Collection[Refusal]) -> bool:
        """Return whether a domain is on its images then, although these problems are told of it."""

    def known_then(
        self, known: tuple[KnownCheckpoint, ...], made: t.Mapping[str, t.Any]
    ) -> tuple[KnownCheckpoint, ...]:
        """Return the checkpoints that libvirt would tell of after a run that is only rehearsed; `made` by target."""

    def confirm(self, daemon: Libvirt, domain: Domain) -> None:
        """Refuse a domain that is not any more what was planned for."""

    def guarded_image(self, domain: Domain) -> str | None:
        """Return the image by whose lock the domain is kept from starting meanwhile; None if it is not."""

    def switch(self, daemon: Libvirt, plan: DomainPlan, seconds: float) -> None:
        """Have the domain on the images of its plan; as _libvirt/switch.py says."""


class Call:
    """One call for domains: what is known of each, and what became of it."""

    def __init__(self, daemon: Libvirt, names: t.Sequence[str], aims: t.Sequence[Aim], settings: Settings) -> None:
        """Select the domains, and plan what is to become of each by the first aim that takes it."""
        self._daemon = daemon
        self._names = names
        self._settings = settings
        self._snapshots: set[str] = set()  # that the domains were on at the beginning
        self._plan(aims)
        # A merge may be under way whose controller was lost. What it leaves has to be looked at anew.
        begun = {one.domain.uuid for one in self._plans.values() if one.has_work}
        if not settings.check_mode and await_merges_of(begun, settings.seconds):
            self._plan(aims)

    def _plan(self, aims: t.Sequence[Aim]) -> None:
        inventory = Inventory(self._daemon.domains())
        found, self._unmatched = inventory.select(self._names)
        self._found = [self._with_kept(one) for one in found]
        domains = [(one, kept) for one, kept in self._found if isinstance(one, Domain)]
        self._aims = {one.name: next(aim for aim in aims if aim.takes(one)) for one, _kept in domains}
        facts = {one.name: [inventory.facts(one, disk) for disk in one.definition.disks] for one, _kept in domains}
        self._snapshots |= {name for one, _kept in domains for name in _snapshots_of(one, facts[one.name])}
        self._plans = {one.name: self._aims[one.name].plan(one, facts[one.name], kept) for one, kept in domains}
        taking_part = [plan for plan in self._plans.values() if not self._is_left_out(plan)]
        # The last one takes every domain, so its rule holds for all of them.
        for name, problems in aims[-1].conflicts(taking_part).items():
            self._plans[name] = self._plans[name].failed(problems)

    def snapshots_instead(self, snapshot: str) -> list[str]:
        """Return the snapshots that the domains are on, if none is on this one, and nothing of it is left to do."""
        is_there = snapshot in self._snapshots or any(plan.disks for plan in self._plans.values())
        return [] if is_there else sorted(self._snapshots)

    def _with_kept(self, one: Domain | Unreadable) -> tuple[Domain | Unreadable, Kept]:
        """Return a domain with what libvirt keeps of it; unreadable if libvirt cannot tell that."""
        if isinstance(one, Unreadable):
            return one, Kept()
        try:
            kept = self._daemon.kept(one)
            # What is stored tells nothing of bitmaps that are in the memory of a QEMU.
            return one, kept if one.state is None else self._with_live_bitmaps(one, kept)
        except Refusal as exc:
            return Unreadable(one.name, exc), Kept()

    def _with_live_bitmaps(self, domain: Domain, kept: Kept) -> Kept:
        return kept._replace(checkpoints=self._daemon.kept_now(domain).checkpoints)

    def run(self) -> tuple[list[DomainOutcome], list[str]]:
        """Do it, each domain all or none; return what became of them, and warnings."""
        sound = [plan for plan in self._plans.values() if not plan.problems and not self._is_left_out(plan)]
        switches = {plan.domain.uuid: one for plan in sound if (one := self._switch(plan)) is not None}
        # Its first image is locked too where only images further down change: see Held.lock().
        vms: dict[str | None, Vm] = {
            plan.domain.uuid: self._vm(plan, switches.get(plan.domain.uuid))
            for plan in sound
            if plan.has_work or plan.domain.uuid in switches
        }
        batches = [
            Batch(
                aim.operation(self._daemon, [plan.domain for plan in plans]),
                [disk.request for plan in plans for disk in plan.disks],
            )
            for aim, plans in self._by_aim(sound)
        ]
        run_all(batches, self._settings, vms)
        outcomes = [batch.outcome() for batch in batches]
        all_verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
        verdicts = {(verdict.request.vm, verdict.request.path): verdict for verdict in all_verdicts}
        results = [self._outcome(one, self._kept_after(one, kept), verdicts, switches) for one, kept in self._found]
        unmatched = (f"{one}: no domain of this host matches it." for one in self._unmatched)
        of_domains = (warning for result in results for warning in result.warnings)
        of_images = (warning for outcome in outcomes for warning in outcome.warnings)
        warnings = [*unmatched, *of_domains, *of_images, *self._refresh_pools(all_verdicts)]
        return results, list(dict.fromkeys(warnings))

    def _switch(self, plan: DomainPlan) -> _Switch | None:
        """Return the last step for a domain; None if it is on its images already and loses no checkpoint."""
        aim = self._aims[plan.domain.name]
        return _Switch(self._daemon, plan, aim, self._settings) if plan.sources or plan.lost else None

    def _vm(self, plan: DomainPlan, switch: _Switch | None) -> Vm:
        """Return what a session is to know of a domain."""
        aim = self._aims[plan.domain.name]
        confirm = functools.partial(aim.confirm, self._daemon, plan.domain)
        # A definition that is to stay can have got images meanwhile that are to go.
        return Vm(confirm if switch is None else switch.run, aim.guarded_image(plan.domain), confirm)

    def _by_aim(self, plans: t.Sequence[DomainPlan]) -> list[tuple[Aim, list[DomainPlan]]]:
        """Return the plans by their aims."""
        own: dict[Aim, list[DomainPlan]] = {}
        for plan in plans:
            own.setdefault(self._aims[plan.domain.name], []).append(plan)
        return list(own.items())

    def _kept_after(self, one: Domain | Unreadable, kept: Kept) -> Kept:
        """Return what libvirt says of the checkpoints now; as long as they lie in images, what it said before."""
        if isinstance(one, Unreadable) or all(checkpoint.live is None for checkpoint in kept.checkpoints):
            return kept
        try:
            return self._with_live_bitmaps(one, kept)
        except Refusal as exc:
            unknown = LiveBitmaps(problem=exc.why)
            return kept._replace(checkpoints=tuple(known._replace(live=unknown) for known in kept.checkpoints))

    def _refresh_pools(self, verdicts: t.Sequence[t.Any]) -> list[str]:
        """Have libvirt see the new files; return as warnings where it cannot."""
        aims = {plan.domain.uuid: self._aims[plan.domain.name] for plan in self._plans.values()}
        new = [
            one.request.path
            for one in verdicts
            if one.changed or (one.problems and aims[one.request.vm].is_done(one.problems))
        ]
        return self._daemon.pools.refresh(set() if self._settings.check_mode else set(map(os.path.dirname, new)))

    def _is_left_out(self, plan: DomainPlan) -> bool:
        """Whether it is skipped: by request since it runs, or since only a pattern names it and no disk fits."""
        aim = self._aims[plan.domain.name]
        skips_it = aim.skips_running and plan.domain.state is not None
        if plan.has_work or (skips_it and plan.missed and not plan.disks):
            return skips_it
        is_named = aim.targets is not None or plan.domain.name in self._names
        return not is_named and not plan.disks and {problem.code for problem in plan.problems} == {"no_disk"}

    def _outcome(
        self,
        one: Domain | Unreadable,
        kept: Kept,
        verdicts: t.Mapping[tuple[str | None, str], t.Any],
        switches: t.Mapping[str, _Switch],
    ) -> DomainOutcome:
        """Return what became of a domain."""
        if isinstance(one, Unreadable):
            return failed_outcome(one)
        plan = self._plans[one.name]
        if self._is_left_out(plan):
            return _left_out(plan, kept)
        return self._conclude(plan, kept, verdicts, switches.get(one.uuid))

    def _conclude(
        self,
        plan: DomainPlan,
        kept: Kept,
        verdicts: t.Mapping[tuple[str | None, str], t.Any],
        switched: _Switch | None,
    ) -> DomainOutcome:
        """Return what became of a domain that was not left out."""
        aim = self._aims[plan.domain.name]
        own = [(disk.target, verdicts.get((plan.domain.uuid, disk.request.path))) for disk in plan.disks]
        overlays = {target: verdict for target, verdict in own if verdict is not None}
        problems = [*plan.problems, *(problem for verdict in overlays.values() for problem in verdict.problems)]
        if switched is not None:
            problems += switched.problems(is_expected=not problems and not self._settings.check_mode)
        is_done = aim.is_done(problems)
        definition = plan.definition if is_done else plan.domain.definition
        changed = switched is not None or any(verdict.changed for verdict in overlays.values())
        made = {d.target: overlays[d.target] for d in plan.disks if _is_touched(d, overlays)} if is_done else {}
        lost = plan.lost if switched is not None and not problems else ()
        known = aim.known_then(kept.checkpoints, made) if self._settings.check_mode else kept.checkpoints
        return DomainOutcome(
            name=plan.domain.name,
            uuid=plan.domain.uuid,
            state=FAILED if problems else aim.words[not changed],
            # Of a domain that failed some disks may be done.
            changed=any(verdict.changed for verdict in overlays.values()) or (changed and is_done),
            overlays=tuple(overlays.items()),
            skipped=plan.skipped,
            checkpoints=judge_checkpoints(
                [one for one in known if one.name not in lost],
                # What it runs with is what its guest writes to, whatever the next start uses.
                (plan.domain.running_definition or plan.domain.definition).disks,
                lambda disk: aim.chain_after(disk, made.get(disk.target)),
            ),
            verified=_verified(kept._replace(checkpoints=tuple(one for one in kept.checkpoints if one in known))),
            lost=lost,
            snapshots=kept.snapshots,
            missed=plan.missed,
            warnings=[] if problems else plan.warnings,
            definition=definition,
            problems=tuple(root_causes(problems)),
            diff=(_parts(plan, overlays, before=True), _parts(plan, overlays, before=False)) if is_done else ("", ""),
            tops=definition.tops,
            known=kept.checkpoints,
        )


def _snapshots_of(domain: Domain, facts: t.Sequence[DiskFacts]) -> t.Iterator[str]:
    """Yield the names of the snapshots that a domain is on, as the marks of its images have them."""
    for layer in (layer for one in facts for layer in one.own):
        mark = layer.image.mark if layer.image is not None else None
        if mark is not None and mark.vm == domain.uuid:
            yield mark.snapshot


def _is_touched(disk: DiskPlan, verdicts: t.Mapping[str, t.Any]) -> bool:
    """Whether the chain of a disk is another one after the run."""
    return disk.source is not None or verdicts[disk.target].changed


class _Switch:
    """The last step for a domain, which its session takes once the images are ready."""

    def __init__(self, daemon: Libvirt, plan: DomainPlan, aim: Aim, settings: Settings) -> None:
        self._daemon = daemon
        self._plan = plan
        self._aim = aim
        self._seconds = settings.seconds
        self._problem: Refusal | None = None
        self._is_done = False

    def run(self) -> None:
        """Switch the domain to its new images; Refusal if that fails."""
        sources = self._plan.sources
        try:
            gone = [source.path for source in sources.values() if not os.path.exists(source.path)]
            if gone:
                raise Refusal("changed_meanwhile", gone[0], "was removed meanwhile", "Run this again.")
            if sources:
                self._aim.switch(self._daemon, self._plan, self._seconds)
            self._forget()
        except Refusal as exc:
            self._problem = exc
            raise
        self._is_done = True

    def _forget(self) -> None:
        try:
            forget(self._daemon, self._plan.domain, self._plan.lost)
        except Refusal as exc:
            raise exc.with_note("It is defined with the images that it is to have.") from exc

    def problems(self, *, is_expected: bool) -> list[Refusal]:
        """Return why the domain is not switched; `is_expected`: nothing else has failed, so it should be."""
        if self._problem is not None:
            return [self._problem]
        if self._is_done or not is_expected:
            return []
        # Its turn did not come, although its images were ready already: then no image tells of the signal.
        why = "was not switched, because the run was ended"
        return [Refusal("interrupted", self._plan.domain.name, why, "Run this again.")]


def _left_out(plan: DomainPlan, kept: Kept) -> DomainOutcome:
    """Return the outcome for a domain that is left as it is."""
    reason = f"the domain is {plan.domain.state}"
    return DomainOutcome(
        name=plan.domain.name,
        uuid=plan.domain.uuid,
        state=SKIPPED,
        skipped=(*plan.skipped, *(SkippedDisk(disk.target, reason) for disk in plan.disks)),
        checkpoints=judge_checkpoints(
            kept.checkpoints, plan.domain.definition.disks, lambda disk: chain_of(disk.source, disk.format)
        ),
        verified=_verified(kept),
        snapshots=kept.snapshots,
        # Of one that runs nothing was made, so nothing is missed.
        missed=() if plan.domain.state is not None else plan.missed,
        warnings=[] if plan.domain.state is not None else plan.warnings,
        definition=plan.domain.definition,
    )


def _verified(kept: Kept) -> frozenset[str]:
    """Return the names of the checkpoints of which libvirt itself has said whether they can be used."""
    return frozenset(one.name for one in kept.checkpoints if one.live is not None and one.live.problem is None)


def _parts(plan: DomainPlan, verdicts: t.Mapping[str, t.Any], *, before: bool) -> str:
    """Return what a diff shows: of the definition, and of images that change below the topmost one."""
    definition = plan.domain.definition if before else plan.definition
    parts = definition.parts(plan.sources) if plan.sources else ""
    for target, verdict in verdicts.items():
        if verdict.changed and target not in plan.sources:
            request = verdict.request
            upper = f"{request.path}, which is on " if before else ""
            parts += f"    {target}: {printable(f'{upper}{request.backing_file}')}\n"
    return f"<domain> {plan.domain.name}\n{parts}" if parts else ""
