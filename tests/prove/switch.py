# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The promise that the overlays of domains are made, and the domains switched to them."""

from __future__ import annotations

import os
import pathlib
import typing as t

import estate
import kinds
import overlays
import runs


class Switched(overlays.Made):
    """Each domain is on all of its overlays, or has its old definition and, if the run ended, no overlay."""

    module = "domain_overlay"

    def __init__(self, ground: estate.Estate) -> None:
        super().__init__(ground)
        self._estate = ground

    @property
    def subjects(self) -> tuple[str, ...]:
        """With one of which each message begins."""
        return (
            *super().subjects,
            "libvirt cannot ",
            self._estate.daemon.uri,
            *(f"{name}: " for name in self._estate.numbers),
        )

    def arguments(self, disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, which takes domains as a whole."""
        assert disks is None
        place = {"directory": str(self._estate.folder), "uri": self._estate.daemon.uri}
        return {"name": list(self._estate.numbers), "snapshot": estate.SNAPSHOT, "timeout": 20, **place, **options}

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        switched = sum(self._estate.switched(name) is True for name in self._estate.numbers)
        return f"{super().outcome()}, {switched} of {len(self._estate.numbers)} switched"

    def is_told(self, path: pathlib.Path, run: runs.Run) -> bool:
        """Whether a run that has failed says that this overlay is there all the same."""
        numbers = self._estate.numbers
        name = next(name for name in numbers for disk in self._estate.disks_of(name) if disk.target == path)
        said = run.domain(name)
        if said.get("state") in ("created", "present"):
            return True
        return runs.left_in_place(said) or super().is_told(path, run)

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images and definitions, whatever the run was to do."""
        wrong = super().images_wrong()
        for name in self._estate.numbers:
            switched, domain = self._estate.switched(name), self._estate.domain(name)
            if switched is None:
                wrong.append(f"{name} has another definition: {estate.definition_of(domain)}")
            if switched and not all(os.path.lexists(disk.target) for disk in self._estate.disks_of(name)):
                wrong.append(f"{name} is on overlays that are not there")
            if [checkpoint.getName() for checkpoint in domain.listAllCheckpoints()] != [estate.CHECKPOINT]:
                wrong.append(f"{name} has lost its checkpoint")
        return wrong

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left, domain by domain."""
        if not run.domains:  # nothing was begun
            untouched = not any(self.done()) and not any(self._estate.switched(name) for name in self._estate.numbers)
            return [] if run.status and untouched else [f"says nothing of the domains: {run.message!r}"]
        wrong = [problem for domain in run.domains for problem in self._told_of_domain_wrong(domain)]
        if (run.status == 0) != all(domain["state"] == "created" for domain in run.domains):
            wrong.append(f"exit {run.status} with {[domain['state'] for domain in run.domains]}")
        return wrong

    def _told_of_domain_wrong(self, domain: dict[str, t.Any]) -> list[str]:
        """Return what is wrong with what a run says of one domain."""
        name, state = domain["name"], domain["state"]
        there = {os.path.lexists(disk.target) for disk in self._estate.disks_of(name)}
        switched = self._estate.switched(name)
        if runs.left_in_place(domain):
            return [] if there == {True} else [f"{name}: says that overlays were left, of which some are missing"]
        expected = {"created": ({True}, True), "failed": ({False}, False)}.get(state)
        if (there, switched) != expected:
            return [f"{name} is {state}, but overlays there: {there}, switched: {switched}: {domain.get('msg')!r}"]
        # None: it cannot be told, as after a fault that has kept the run from looking; the next run looks again.
        if False in {checkpoint["valid"] for checkpoint in domain["checkpoints"]}:
            return [f"{name}: its checkpoint is said to be of no use: {domain['checkpoints']}"]
        return []

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which completes everything, and a third, which changes nothing."""
        wrong, names = super().rerun_wrong(), list(self._estate.numbers)
        wrong += [f"second run: {name} was not switched" for name in names if not self._estate.switched(name)]
        run = self._estate.run()
        unfit = {domain["name"] for domain in run.domains if [one["valid"] for one in domain["checkpoints"]] != [True]}
        without_bitmaps = {name for name in names if not any(disk.bitmaps for disk in self._estate.disks_of(name))}
        states = {domain["state"] for domain in run.domains}
        if run.status or (run.result or {}).get("changed") or states != {"present"} or unfit != without_bitmaps:
            wrong.append(f"third run: exit {run.status}, {run.message} {run.result}")
        return wrong
