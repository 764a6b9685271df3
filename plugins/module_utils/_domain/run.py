# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Select, plan, run, switch, conclude."""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Qcow2Error
from .._disk.run import make_overlays
from .._disk.session import Settings, Vm
from .._disk.verdict import CREATED, FAILED, PRESENT, Verdict
from .._libvirt.connection import Domain, Libvirt, Unreadable
from .._libvirt.definition import disks_of, parts_of
from .checkpoints import judge_checkpoints
from .inventory import first_image, select, users_of_images
from .overlay import plan_domain
from .plan import SKIPPED, DomainOutcome, DomainPlan, SkippedDisk, SnapshotRequest


def overlay_domains(
    libvirt: Libvirt, names: t.Sequence[str], request: SnapshotRequest, settings: Settings
) -> tuple[list[DomainOutcome], list[str]]:
    """Make the overlays of all these domains and switch the domains, each all or none; return them, and warnings."""
    everybody = libvirt.domains()
    found, unmatched = select(everybody, names)
    users = users_of_images([domain for domain in everybody.values() if isinstance(domain, Domain)])
    plans = [plan_domain(domain, request, users) for domain in found if isinstance(domain, Domain)]
    left_out = {plan.domain.name: _left_out(plan) for plan in plans if _is_to_be_left_out(plan, request, names)}
    sound = [plan for plan in plans if not plan.problems and plan.domain.name not in left_out]
    switches = {plan.domain.uuid: _Switch(libvirt, plan, settings.seconds) for plan in sound if plan.overlays}
    wanted = [wanted for plan in sound for wanted in plan.wanted.values()]
    first_images = {plan.domain.uuid: first_image(plan.domain) for plan in sound}
    machines = {uuid: Vm(switch.run, first_images[uuid]) for uuid, switch in switches.items()}
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


class _Switch:
    """The last step for a domain, which the engine takes once its overlays are there."""

    def __init__(self, libvirt: Libvirt, plan: DomainPlan, seconds: float) -> None:
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


def _is_to_be_left_out(plan: DomainPlan, request: SnapshotRequest, names: t.Sequence[str]) -> bool:
    """Whether the domain is skipped: by request since it runs, or since only a pattern names it and it has no disk."""
    if plan.overlays:
        return request.skips_running and plan.domain.state is not None
    return not plan.wanted and request.targets is None and plan.domain.name not in names


def _left_out(plan: DomainPlan) -> DomainOutcome:
    """Return the outcome for a domain that is left as it is."""
    reason = f"the domain is {plan.domain.state}"
    skipped = [*plan.skipped, *(SkippedDisk(target, reason) for target in plan.wanted)]
    checkpoints = judge_checkpoints(plan, {})
    return DomainOutcome(plan.domain.name, plan.domain.uuid, SKIPPED, [], skipped, checkpoints, [], ("", ""), {})


def _conclude(
    plan: DomainPlan, verdicts: t.Mapping[tuple[str | None, str], Verdict], switch: _Switch | None, check_mode: bool
) -> DomainOutcome:
    """Return what became of a domain."""
    own = [(target, verdicts.get((plan.domain.uuid, wanted.path))) for target, wanted in plan.wanted.items()]
    overlays = [(target, verdict) for target, verdict in own if verdict is not None]
    problems = list(plan.problems)
    problems += [verdict.message for _target, verdict in overlays if verdict.state == FAILED]
    if switch is not None and switch.problem is not None:
        problems.append(switch.problem)
    elif switch is not None and not problems and not switch.is_done and not check_mode:
        problems.append(f"{plan.domain.name}: was not with_sources to its overlays. Run this again.")
    changed = switch is not None or any(verdict.state == CREATED for _target, verdict in overlays)
    is_fine = not problems
    return DomainOutcome(
        name=plan.domain.name,
        uuid=plan.domain.uuid,
        state=FAILED if problems else CREATED if changed else PRESENT,
        overlays=overlays,
        skipped=plan.skipped,
        checkpoints=judge_checkpoints(plan, dict(overlays) if is_fine else {}),
        problems=list(dict.fromkeys(problems)),
        diff=(_parts(plan.domain.definition, plan), _parts(plan.definition, plan)) if is_fine else ("", ""),
        tops=_topmost(plan.definition if is_fine else plan.domain.definition),
    )


def _topmost(definition: str) -> dict[str, str]:
    """Return the topmost image of each disk that a definition has, by target."""
    return {disk.target: disk.source for disk in disks_of(definition) if disk.source is not None}


def _parts(definition: str, plan: DomainPlan) -> str:
    """Return what a diff shows of a definition."""
    return f"<domain> {plan.domain.name}\n{parts_of(definition, plan.overlays)}" if plan.overlays else ""


def _unreadable(domain: Unreadable) -> DomainOutcome:
    """Return the outcome for a domain of which nothing is known."""
    return DomainOutcome(domain.name, None, FAILED, [], [], [], [domain.problem], ("", ""), {})
