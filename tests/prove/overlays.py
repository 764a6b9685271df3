# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The promise that overlays are made."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import typing as t

import kinds
import lab
import promise
import qemu
import runs
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import maps_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image


class Made(promise.OfImages[lab.Lab]):
    """Each overlay is complete, or it is not there; ACTIVE is not touched; and the run says which."""

    def untouched(self) -> list[pathlib.Path]:
        """Return ACTIVE of each disk."""
        return [disk.active for disk in self._ground.disks]

    def arguments(self, disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, for all disks of the lab if none are given."""
        overlays = [
            {"path": str(disk.target), "backing_file": str(disk.active), "backing_format": disk.format}
            for disk in disks or self._ground.disks
        ]
        return {"overlays": overlays, "timeout": 20, **options}

    def done(self) -> list[bool]:
        """Whether the overlay is there, for each disk."""
        return [os.path.lexists(disk.target) for disk in self._ground.disks]

    def done_at(self) -> float:
        """Return when the last overlay was done: its last change is that its temporary name goes."""
        return max((disk.target.stat().st_ctime for disk in self._ground.disks if disk.target.exists()), default=0.0)

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        there = self.done()
        return f"{sum(there)} of {len(there)} overlays there"

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images, whatever the run was to do."""
        wrong = self.changed_wrong()
        for disk in self._ground.disks:
            if os.path.lexists(disk.target):
                wrong += incomplete(disk)
                if disk.target.stat().st_nlink > 1 and not self._ground.leftovers():
                    wrong.append(f"{disk.target.name} has a second name")
            wrong += [
                f"{path.name} is locked" for path in (disk.active, disk.target) if path.exists() and lab.is_locked(path)
            ]
        return wrong + promise.names_wrong(self._ground.folder, {disk.target.name for disk in self._ground.disks})

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left: all or none."""
        there, said = self.done(), run.states
        states = ["created" if each else "failed" for each in there]
        if said != states or len(set(states)) != 1 or run.status != (0 if all(there) else 1):
            return [f"exit {run.status}, says {said} of what is {states}: {run.message!r}"]
        return []

    def unsaid(self, run: runs.Run) -> list[str]:
        """Return which overlays a failed run has left without a word."""
        left = [disk.target for disk in self._ground.disks if os.path.lexists(disk.target)]
        return [f"left {path}, says: {run.message}" for path in left if not self.is_told(path, run)]

    def is_told(self, path: pathlib.Path, run: runs.Run) -> bool:
        """Whether a run that has failed says that this overlay is there all the same."""
        return run.says_not_removed(path)

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must make what is missing and remove what is left."""
        expected = ["present" if there else "created" for there in self.done()]
        leftovers = self._ground.leftovers()
        run = self._ground.run()
        wrong = [f"second run: {what}" for what in self.images_wrong()]
        if run.status != 0 or run.states != expected:
            words = f"{run.message} {run.stderr}"
            wrong.append(f"second run: exit {run.status}, {run.states} instead of {expected}: {words}")
        wrong += [f"second run: {what}" for what in self._ground.cleared_wrong(run, leftovers)]
        return wrong if all(self.done()) else [*wrong, "second run: an overlay is missing"]

    def raced_wrong(
        self, rival: promise.Rival, theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, stopped: bool
    ) -> list[str]:
        """Return what is wrong with what two runs have made."""
        wrong = []
        created = [set(run.states) == {"created"} for run in (first, second)]
        if sum(created) not in rival.winners:
            wrong.append(f"states {first.states} and {second.states}: {first.message} / {second.message}")
        if not stopped and {*first.states, *second.states} != {"created", rival.other}:  # so waiting helps
            wrong.append(f"{first.states} and {second.states}, but each has waited for the other")
        # What stands there is what the run made that says so.
        made = [disk for won, disks in zip(created, (self._ground.disks, theirs)) if won for disk in disks]
        wrong += [problem for disk in made for problem in incomplete(disk)]
        expected = {disk.target.name for disk in made}
        if set(os.listdir(self._ground.folder)) != expected:
            wrong.append(f"there is {os.listdir(self._ground.folder)}, not {sorted(expected)}")
        ours, self._ground.disks = self._ground.disks, made
        wrong += self.images_wrong()
        self._ground.disks = ours
        return wrong

    def vm_wrong(self, run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Return what is wrong after a run into which a VM came, or tried to."""
        wrong = []
        if run.status == 0 and too_early:
            wrong.append("the VM had ACTIVE open, and the overlays were made all the same")
        if run.status != 0 and runs_on and any(self.done()):
            wrong.append("the VM runs, and an overlay is there that the run says it has not made")
        if not runs_on or (run.status == 0 and not too_early):
            wrong += [problem for disk in self._ground.disks if disk.target.exists() for problem in incomplete(disk)]
        if run.status != 0 and os.listdir(self._ground.folder):
            wrong.append(f"there is {os.listdir(self._ground.folder)} after {run.message}")
        return wrong if runs_on else wrong + self.images_wrong()

    def without_folder_wrong(self, run: runs.Run, done: list[bool], elsewhere: pathlib.Path) -> list[str]:
        """Return what is wrong after the folder of the overlays was taken away, with those that were there."""
        strays = [entry.name for entry in elsewhere.iterdir()] if elsewhere.is_dir() else []
        wrong = self.images_wrong()
        if run.status != 0 and (strays or os.listdir(self._ground.folder)):
            wrong.append(f"failed and left {strays} and {os.listdir(self._ground.folder)}: {run.message}")
        if run.status == 0 and not all(done) and not all(self.done()):
            wrong.append("says that it has created what is not there")
        return wrong


def incomplete(disk: kinds.Disk) -> list[str]:
    """Return in what the overlay is not what it is to be, as QEMU's own tools see it."""
    command = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(disk.target)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return [f"{disk.target.name}: {said.stderr}"]
    about = json.loads(said.stdout)
    data = about["format-specific"]["data"]
    seen = {
        "backing file": (about.get("backing-filename"), str(disk.active)),
        "backing format": (about.get("backing-filename-format"), disk.format),
        "size": (about["virtual-size"], disk.size),
        "bitmaps": ({bitmap["name"]: bitmap["granularity"] for bitmap in data.get("bitmaps", ())}, disk.bitmaps),
        "flags": (
            {flag for bitmap in data.get("bitmaps", ()) for flag in bitmap["flags"]},
            {"auto"} if disk.bitmaps else set(),
        ),
        "corrupt": (data["corrupt"], False),
        "mode": (disk.target.stat().st_mode, disk.active.stat().st_mode),
    }
    wrong = [
        f"{disk.target.name}: {what} is {is_!r}, not {to_be!r}" for what, (is_, to_be) in seen.items() if is_ != to_be
    ]
    if not wrong:
        wrong = [f"{disk.target.name}: {name} begins with other bits" for name in sorted(other_bits(disk))]
    command = ["qemu-img", "check", "-q", str(disk.target)]
    check = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return [*wrong, *([f"{disk.target.name}: check says {check.stdout}{check.stderr}"] if check.returncode else [])]


def other_bits(disk: kinds.Disk) -> set[str]:
    """Return the bitmaps of the overlay that do not begin with the bits of ACTIVE and of the images below it."""
    there = dirty_granules(disk.target, disk.bitmaps)
    wanted: dict[str, set[int]] = {name: set() for name in disk.bitmaps}
    below, missing = str(disk.active) if disk.format == "qcow2" else None, set(disk.bitmaps)
    while below is not None and missing:
        here = dirty_granules(below, disk.bitmaps)
        missing &= set(here)
        for name in missing:
            wanted[name] |= here[name]
        below = qemu.read(below).backing_file
    return {name for name in disk.bitmaps if there[name] != wanted[name]}


def dirty_granules(path: str | pathlib.Path, granularities: t.Mapping[str, int]) -> dict[str, set[int]]:
    """Return what each consistent bitmap of an image marks, as numbers of granules of these sizes."""
    found = {}
    with open_image(str(path)) as file:
        image = read_image(file)
        for name, one in maps_of(file, image).items():
            if name in granularities:
                bits = bin(one.bits(0, image.virtual_size))[:1:-1]
                starts = (number * one.granularity for number, bit in enumerate(bits) if bit == "1")
                own = granularities[name]
                found[name] = {
                    granule for start in starts for granule in range(start // own, -(-(start + one.granularity) // own))
                }
    return found
