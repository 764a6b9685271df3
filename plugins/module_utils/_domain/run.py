# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""All domains of a call: select, plan, run, switch, conclude."""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal, printable
from .._disk.run import run
from .._disk.session import Operation, Settings, Vm
from .._disk.verdict import FAILED, SKIPPED, root_causes
from .._libvirt.connection import Domain, Kept, Libvirt, Unreadable
from .._libvirt.definition import DomainDisk
from .._libvirt.switch import forget, switch
from .checkpoints import Chain, chain_of, judge_checkpoints
from .inventory import DiskFacts, Inventory, first_image
from .plan import DiskPlan, DomainOutcome, DomainPlan, SkippedDisk, failed_outcome


class Aim(t.Protocol):
    """What a call does to domains: the rules that differ from one state to another."""

    @property
    def words(self) -> tuple[str, str]:
        """Return the states of a domain of which something was done, and of one of which nothing is to be done."""

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Return the disks that are asked for; None for all that can take part."""

    @property
    def skips_running(self) -> bool:
        """Return whether domains that are not shut off are left out, instead of a failure."""

    def operation(self) -> Operation[t.Any, t.Any]:
        """Return what is done to the images."""

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""

    def conflicts(self, plans: t.Sequence[DomainPlan]) -> t.Mapping[str, t.Sequence[Refusal]]:
        """Return by the name of the domain what is wrong with a plan beside the others."""

    def chain_after(self, disk: DomainDisk, verdict: t.Any | None) -> Chain:
        """Return the chain of a disk after the run; of what is done the verdict promises what is there then."""

    def lost_checkpoints(self, plan: DomainPlan, kept: Kept) -> tuple[str, ...]:
        """Return the names of the checkpoints that libvirt is to forget once the domain is switched."""


class Call:
    """One call for domains: what is known of each, and what became of it."""

    def __init__(self, daemon: Libvirt, names: t.Sequence[str], aim: Aim, settings: Settings) -> None:
        """Select the domains and plan what is to become of each."""
        self._daemon = daemon
        self._names = names
        self._aim = aim
        self._settings = settings
        inventory = Inventory(daemon.domains())
        found, self._unmatched = inventory.select(names)
        self._found = [self._with_kept(one) for one in found]
        self._plans = {
            one.name: aim.plan(one, [inventory.facts(one, disk) for disk in one.definition.disks], kept)
            for one, kept in self._found
            if isinstance(one, Domain)
        }
        for name, problems in aim.conflicts([p for p in self._plans.values() if not self._is_left_out(p)]).items():
            self._plans[name] = self._plans[name].failed(problems)

    def _with_kept(self, one: Domain | Unreadable) -> tuple[Domain | Unreadable, Kept]:
        """Return a domain with what libvirt keeps of it; unreadable if libvirt cannot tell that."""
        if isinstance(one, Unreadable):
            return one, Kept()
        try:
            return one, self._daemon.kept(one)
        except Refusal as exc:
            return Unreadable(one.name, exc), Kept()

    def run(self) -> tuple[list[DomainOutcome], list[str]]:
        """Do it, each domain all or none; return what became of them, and warnings."""
        sound = [plan for plan in self._plans.values() if not plan.problems and not self._is_left_out(plan)]
        kept_of = {one.name: kept for one, kept in self._found}
        lost = {plan.domain.uuid: self._aim.lost_checkpoints(plan, kept_of[plan.domain.name]) for plan in sound}
        switches = {
            plan.domain.uuid: _Switch(self._daemon, plan, lost[plan.domain.uuid], self._settings)
            for plan in sound
            if plan.sources or lost[plan.domain.uuid]
        }
        requests = [disk.request for plan in sound for disk in plan.disks]
        # Its first image is locked too where only images further down change: see Held.lock().
        at_work = [plan.domain for plan in sound if plan.has_work]
        vms: dict[str | None, Vm] = {one.uuid: Vm(_nothing_to_switch, first_image(one)) for one in at_work}
        vms.update((uuid, Vm(one.run, first_image(one.domain))) for uuid, one in switches.items())
        outcome = run(self._aim.operation(), requests, self._settings, vms)
        verdicts = {(verdict.request.vm, verdict.request.path): verdict for verdict in outcome.verdicts}
        results = [self._outcome(one, kept, verdicts, switches) for one, kept in self._found]
        unmatched = (f"{one}: no domain of this host matches it." for one in self._unmatched)
        of_domains = (warning for result in results for warning in result.warnings)
        return results, [*unmatched, *of_domains, *outcome.warnings, *self._refresh_pools(outcome.verdicts)]

    def _refresh_pools(self, verdicts: t.Sequence[t.Any]) -> list[str]:
        """Have libvirt see the new files; return as warnings where it cannot."""
        new = () if self._settings.check_mode else [one.request.path for one in verdicts if one.changed]
        return self._daemon.pools.refresh({os.path.dirname(path) for path in new})

    def _is_left_out(self, plan: DomainPlan) -> bool:
        """Whether it is skipped: by request since it runs, or since only a pattern names it and no disk fits."""
        skips_it = self._aim.skips_running and plan.domain.state is not None
        if plan.has_work or (skips_it and plan.missed and not plan.disks):
            return skips_it
        is_named = self._aim.targets is not None or plan.domain.name in self._names
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
        own = [(disk.target, verdicts.get((plan.domain.uuid, disk.request.path))) for disk in plan.disks]
        overlays = {target: verdict for target, verdict in own if verdict is not None}
        problems = [*plan.problems, *(problem for verdict in overlays.values() for problem in verdict.problems)]
        if switched is not None:
            problems += switched.problems(is_expected=not problems and not self._settings.check_mode)
        definition = plan.domain.definition if problems else plan.definition
        changed = switched is not None or any(verdict.changed for verdict in overlays.values())
        made = {} if problems else {d.target: overlays[d.target] for d in plan.disks if _is_touched(d, overlays)}
        lost = switched.lost if switched is not None and not problems else ()
        return DomainOutcome(
            name=plan.domain.name,
            uuid=plan.domain.uuid,
            state=FAILED if problems else self._aim.words[not changed],
            changed=changed and not problems,
            overlays=tuple(overlays.items()),
            skipped=plan.skipped,
            checkpoints=judge_checkpoints(
                [one for one in kept.checkpoints if one.name not in lost],
                plan.domain.definition.disks,
                lambda disk: self._aim.chain_after(disk, made.get(disk.target)),
            ),
            lost=lost,
            snapshots=kept.snapshots,
            missed=plan.missed,
            warnings=[] if problems else plan.warnings,
            definition=definition,
            problems=tuple(root_causes(problems)),
            diff=("", "") if problems else (_parts(plan, overlays, before=True), _parts(plan, overlays, before=False)),
            tops=definition.tops,
        )


def _nothing_to_switch() -> None:
    """Leave the definition as it is."""


def _is_touched(disk: DiskPlan, verdicts: t.Mapping[str, t.Any]) -> bool:
    """Whether the chain of a disk is another one after the run."""
    return disk.source is not None or verdicts[disk.target].changed


class _Switch:
    """The last step for a domain, which its session takes once the images are ready.

    `lost` are the names of the checkpoints that libvirt is to forget then.
    """

    def __init__(self, daemon: Libvirt, plan: DomainPlan, lost: tuple[str, ...], settings: Settings) -> None:
        self._daemon = daemon
        self._plan = plan
        self.lost = lost
        self._seconds = settings.seconds
        self._problem: Refusal | None = None
        self._is_done = False

    @property
    def domain(self) -> Domain:
        """The domain."""
        return self._plan.domain

    def run(self) -> None:
        """Switch the domain to its new images; Refusal if that fails."""
        sources = self._plan.sources
        try:
            gone = [source.path for source in sources.values() if not os.path.exists(source.path)]
            if gone:
                raise Refusal("changed_meanwhile", gone[0], "was removed meanwhile", "Run this again.")
            if sources:
                switch(self._daemon, self.domain, sources, self._plan.definition, self._seconds)
            forget(self._daemon, self.domain, self.lost)
        except Refusal as exc:
            self._problem = exc
            raise
        self._is_done = True

    def problems(self, *, is_expected: bool) -> list[Refusal]:
        """Return why the domain is not switched; `is_expected`: nothing else has failed, so it should be."""
        if self._problem is not None:
            return [self._problem]
        if self._is_done or not is_expected:
            return []
        # Its turn did not come, although its images were ready already: then no image tells of the signal.
        why = "was not switched, because the run was ended"
        return [Refusal("interrupted", self.domain.name, why, "Run this again.")]


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
        snapshots=kept.snapshots,
        # Of one that runs nothing was made, so nothing is missed.
        missed=() if plan.domain.state is not None else plan.missed,
        warnings=[] if plan.domain.state is not None else plan.warnings,
        definition=plan.domain.definition,
    )


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
