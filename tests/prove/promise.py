# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operation promises of the disks of a lab; each operation has a class that tells whether it was kept.

The programs know how to kill a run and what can go wrong around it. What must be true afterwards they ask here.
"""

from __future__ import annotations

import os
import pathlib
import typing as t

import kinds
import lab
import leftover
import runs

G = t.TypeVar("G", bound=lab.Lab)


class Rival(t.NamedTuple):
    """What the second of two runs is to do, out of the disks of the VM."""

    what: str
    kind: kinds.Kind
    choose: t.Callable[[list[kinds.Disk]], list[kinds.Disk]]
    winners: tuple[int, ...]  # how many runs may do something
    other: str  # the state that a run comes to that waits, but is not the first


class Promise(t.Protocol):
    """The questions that are asked about any operation; those that end in wrong return what is wrong."""

    module: str  # that does the operation
    before: dict[pathlib.Path, tuple[t.Any, ...]]  # the identity of each file that no run may change

    @property
    def subjects(self) -> tuple[str, ...]:
        """With one of which each message begins."""

    def prepare(self) -> None:
        """Have fresh images as the operation wants to find them, and note what no run may change."""

    def arguments(self, disks: t.Sequence[kinds.Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module, for all disks of the lab if none are given."""

    def done(self) -> list[bool]:
        """Whether the operation is done, for each disk."""

    def done_at(self) -> float:
        """Return when the last of it was done, by the clock of the files; 0 if nothing was."""

    def outcome(self) -> str:
        """Return in a few words what a run has left."""

    def images_wrong(self) -> list[str]:
        """Say what must hold at any moment, whatever becomes of a run; so after a kill, too."""

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Compare what a run that ended says with what it has left."""

    def unsaid(self, run: runs.Run) -> list[str]:
        """Return what a run has left without a word that failed and could not remove it."""

    def rerun_wrong(self) -> list[str]:
        """Run the module again, which must complete what is missing and remove what is left over."""

    def raced_wrong(
        self, rival: Rival, theirs: list[kinds.Disk], first: runs.Run, second: runs.Run, stopped: bool
    ) -> list[str]:
        """Judge what two runs have done; stopped, the first one was held so long that the second may have given up."""

    def vm_wrong(self, run: runs.Run, runs_on: bool, too_early: bool) -> list[str]:
        """Judge a run into which a VM came; too_early, it had its image open before all was done."""

    def without_folder_wrong(self, run: runs.Run, done: list[bool], elsewhere: pathlib.Path) -> list[str]:
        """Judge a run whose folder was moved there, or removed, when so much was done."""


class OfImages(t.Generic[G]):
    """What all promises begin with: what no run may change, and which names there may be in a folder."""

    module = "qcow2_overlay"

    def __init__(self, ground: G) -> None:
        self._ground = ground
        self.before: dict[pathlib.Path, tuple[t.Any, ...]] = {}

    @property
    def subjects(self) -> tuple[str, ...]:
        """With one of which each message begins."""
        return (str(self._ground.place),)

    def prepare(self) -> None:
        """Note what no run may change."""
        self.before = {path: lab.identity(path) for path in self.untouched()}

    def untouched(self) -> t.Iterable[pathlib.Path]:
        """Return the images that no run may change."""
        return ()

    def changed_wrong(self) -> list[str]:
        """Return which of these images are others than before."""
        return [f"{path.name} was changed" for path, was in self.before.items() if lab.identity(path) != was]

    def unsaid(self, _run: runs.Run) -> list[str]:
        """Return nothing: what a failed run has left, the next one goes on with."""
        return []

    def without_folder_wrong(self, _run: runs.Run, _done: list[bool], _elsewhere: pathlib.Path) -> list[str]:
        """Return nothing: no round takes a folder away."""
        return []


def names_wrong(folder: pathlib.Path, known: t.Container[str]) -> list[str]:
    """Return what must not be in a folder: what has none of these names, unless a killed run has left it."""
    return [f"there is {name}" for name in os.listdir(folder) if name not in known and not leftover.is_one(name)]


def locks_wrong(folder: pathlib.Path) -> list[str]:
    """Return what is locked in a folder in which nobody is at work."""
    return [f"{path.name} is locked" for path in folder.iterdir() if lab.is_locked(path)]
