# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What can be done to domains: the aims that run.py is given. The rules are in overlay.py and wayback.py."""

from __future__ import annotations

import typing as t

from .._base.attributes import AttributeOptions
from .._base.errors import Refusal
from .._disk.build import MakeOverlays
from .._disk.commit import CommitVerdict
from .._disk.merge import MergeLayers
from .._disk.overlay import OverlayVerdict
from .._disk.revert import GoBack
from .._disk.revert_rules import RevertVerdict
from .._disk.verdict import ABSENT, COMMITTED, CREATED, PRESENT, REVERTED
from .._libvirt.connection import Domain, Kept, KnownCheckpoint, Libvirt
from .._libvirt.definition import DomainDisk
from .._libvirt.switch import check_unchanged, switch
from .checkpoints import Chain, chain_of, promised
from .healing import bitmaps_known
from .inventory import DiskFacts, first_image
from .names import same_names
from .overlay import plan_domain
from .plan import DomainPlan, SnapshotRequest
from .wayback import WayBack, plan_commit, plan_revert


class OfShutOff:
    """What holds for every aim for domains that are shut off: they are kept from starting, then defined anew."""

    def takes(self, _domain: Domain) -> bool:
        """Take every domain. One that is not shut off fails, or is left out, unless nothing is to be done."""
        return True

    def confirm(self, daemon: Libvirt, domain: Domain) -> None:
        """Refuse a domain that is not any more what was planned for."""
        check_unchanged(daemon, domain)

    def guarded_image(self, domain: Domain) -> str | None:
        """Return the image that the domain opens first when it starts."""
        return first_image(domain)

    def switch(self, daemon: Libvirt, plan: DomainPlan, seconds: float) -> None:
        """Give the domain its new definition."""
        switch(daemon, plan.domain, plan.sources, plan.definition, seconds)

    def is_done(self, problems: t.Collection[Refusal]) -> bool:
        """Return whether nothing is wrong."""
        return not problems

    def known_then(
        self, known: tuple[KnownCheckpoint, ...], _made: t.Mapping[str, t.Any]
    ) -> tuple[KnownCheckpoint, ...]:
        """Return the checkpoints as they are: libvirt knows no bits of them that could change."""
        return known


class PutOnOverlays(OfShutOff):
    """State present: every domain has the overlays of the snapshot. An Aim."""

    words = (CREATED, PRESENT)

    def __init__(self, request: SnapshotRequest, attributes: AttributeOptions) -> None:
        self._request = request
        self._attributes = attributes
        self.targets = request.targets
        self.skips_running = request.skips_running

    def operation(self, _daemon: Libvirt, _domains: t.Sequence[Domain]) -> MakeOverlays:
        """Return what is done to the images."""
        return MakeOverlays(self._attributes)

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
        return with_times(plan_domain(domain, facts, self._request, kept), kept)

    def conflicts(self, plans: t.Sequence[DomainPlan]) -> dict[str, list[Refusal]]:
        """Return by the name of the domain which overlays would have the name of another one."""
        return same_names(plans)

    def chain_after(self, disk: DomainDisk, verdict: OverlayVerdict | None) -> Chain:
        """Return the chain of a disk after the run, with the overlay as it was promised, so also in check mode."""
        chain = chain_of(disk.source, disk.format)
        if verdict is None:
            return chain
        top = promised(verdict.request.path, verdict.virtual_size, verdict.bitmaps)
        return chain._replace(layers=(top, *chain.layers))


class MergeDown(OfShutOff):
    """State committed: no domain is on the snapshot any more, and all that it held is below. An Aim."""

    words = (COMMITTED, ABSENT)

    def __init__(self, request: WayBack) -> None:
        self._request = request
        self.targets = request.targets
        self.skips_running = request.skips_running

    def operation(self, _daemon: Libvirt, _domains: t.Sequence[Domain]) -> MergeLayers:
        """Return what is done to the images."""
        return MergeLayers(self._request.gone)

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
        return with_times(plan_commit(domain, facts, self._request), kept)

    def conflicts(self, _plans: t.Sequence[DomainPlan]) -> dict[str, list[Refusal]]:
        """Find none: an image that two domains have is refused for each."""
        return {}

    def chain_after(self, disk: DomainDisk, verdict: CommitVerdict | None) -> Chain:
        """Return the chain of a disk after the run: what is above the snapshot, and the image that all went into."""
        if verdict is None:
            return chain_of(disk.source, disk.format)
        request = verdict.request
        base = promised(request.backing_file, verdict.virtual_size, verdict.bitmaps)
        below = chain_of(request.backing_file, request.backing_format)
        above = [] if request.above is None else chain_of(disk.source, disk.format).down_to(request.above)
        return below._replace(layers=(*above, base, *below.layers[1:]))


def with_times(plan: DomainPlan, kept: Kept) -> DomainPlan:
    """Return the plan of overlays or a merge which knows when the checkpoints were made: an older image has none."""
    times = {disk.target: bitmaps_known(kept.checkpoints, disk.target) for disk in plan.disks}
    own = [disk._replace(request=disk.request._replace(created=times[disk.target])) for disk in plan.disks]
    return plan._replace(disks=tuple(own))


class GoBackTo(OfShutOff):
    """State reverted: every domain is as it was at the snapshot. An Aim."""

    words = (REVERTED, ABSENT)

    def __init__(self, request: WayBack) -> None:
        self._request = request
        self.targets = request.targets
        self.skips_running = request.skips_running

    def operation(self, _daemon: Libvirt, _domains: t.Sequence[Domain]) -> GoBack:
        """Return what is done to the images."""
        return GoBack()

    def plan(self, domain: Domain, facts: t.Sequence[DiskFacts], kept: Kept) -> DomainPlan:
        """Return what is to become of a domain, as far as that can be said without its images' bitmaps."""
        return plan_revert(domain, facts, self._request, kept)

    def conflicts(self, _plans: t.Sequence[DomainPlan]) -> dict[str, list[Refusal]]:
        """Find none: an image that two domains have is refused for each."""
        return {}

    def chain_after(self, disk: DomainDisk, verdict: RevertVerdict | None) -> Chain:
        """Return the chain of a disk after the run, which begins with the image below the snapshot.

        Or with what the domain has got since, if it was put on that by a run that was killed.
        """
        if verdict is None or verdict.request.is_left:
            return chain_of(disk.source, disk.format)
        return chain_of(verdict.request.backing_file, verdict.request.backing_format)
