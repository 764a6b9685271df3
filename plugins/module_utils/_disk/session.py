# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read, decide, act, publish: the four rooms put together, for every module that makes overlays."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.attributes import AttributeOptions, Attributes, apply_attributes, attributes_for
from .._base.errors import CHECK_STORAGE, Qcow2Error, QemuError, advice
from .._base.files import close_image, open_image
from .._qcow2.chain import identity_of
from .._qcow2.image import read_image
from .._qemu import locks
from .._qemu.locks import in_use
from .._qemu.monitor import Monitor, find_qemu
from .._qemu.nodes import Witnessed, cross_check
from .._qemu.settled import is_open_for_writing
from .build import fill
from .observe import ObservedChain, Target, observe_active, observe_target
from .overlay import decide, recorded_backing_file, verify
from .publish import StagedFile, publish_together
from .verdict import CREATED, OverlayRequest, Verdict


class Vm(t.NamedTuple):
    """What is known of a VM beside its overlays."""

    finish: t.Callable[[], None]  # what must succeed for its overlays to stay
    first_image: str | None = None  # path of what it opens first for writing when it starts


Vms = t.Mapping[str, Vm]  # by the name of the VM


class Settings(t.NamedTuple):
    """What holds for all overlays of one call."""

    check_mode: bool
    seconds: float  # that QEMU may take for one step, before the size of the step is added
    find_program: t.Callable[[str], str | None]
    ownership: AttributeOptions


class Engine:
    """The QEMU process of this call, started when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._monitor: Monitor | None = None

    def monitor(self) -> Monitor:
        """Return the running process."""
        if self._monitor is None:
            self._monitor = Monitor(find_qemu(self._settings.find_program), self._settings.seconds)
        return self._monitor

    def stop(self) -> None:
        """End the process; the next VM gets a new one. After a failure nothing of the old one is to be trusted."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = None


def observe(fd: int, wanted: OverlayRequest) -> ObservedChain:
    """Return what the open ACTIVE of an overlay is."""
    return observe_active(fd, wanted.backing_file, wanted.backing_format, wanted.relative)


def _open_to_lock(path: str) -> int | None:
    """Open an image that is not needed but to keep its VM from starting; None when it cannot be locked.

    Raises when it is in use already: then the VM runs, or is just being started.
    """
    try:
        fd = open_image(path)
    except Qcow2Error:  # then the VM cannot start anyhow
        return None
    try:
        used = locks.is_locked_by_qemu(fd, locks.WRITE, path)
    except Qcow2Error:  # its file system has no locks
        close_image(fd)
        return None
    if used:
        close_image(fd)
        raise in_use(path)
    return fd


class BuildSpec(t.NamedTuple):
    """Where and as what one overlay is to be built, as found out under the lock of its ACTIVE."""

    target: Target
    backing_file: str  # as the overlay records it
    attributes: Attributes
    active: Witnessed | None  # None if it is raw


class Session:
    """What is held while the overlays of one VM are made: locked ACTIVEs, then finished files."""

    def __init__(self, held: contextlib.ExitStack, engine: Engine, settings: Settings) -> None:
        self._held = held
        self._engine = engine
        self._settings = settings
        self._actives: dict[str, int] = {}  # descriptors by path
        self._sites: dict[str, BuildSpec] = {}  # by path
        self._staged: list[StagedFile] = []

    def lock(self, opened_by_vm: t.Sequence[str], needed: t.Collection[str]) -> None:
        """Lock every ACTIVE that is needed, and what else the VM opens, against writers and other runs like this one.

        A VM that is started meanwhile does not start, and must fail at its first disk: a QEMU that ends at its second
        one leaves the bitmaps of the first in use, so inconsistent for good. So all images that the VM opens are locked
        in the order in which it does, and released in the opposite one; and if it was first at one of them, nothing
        behind that one is locked.
        """
        # Path and descriptor by identity, so a file with two names once.
        files: dict[tuple[int, int], tuple[str, int]] = {}
        for path in opened_by_vm:
            fd = open_image(path) if path in needed else _open_to_lock(path)
            if fd is None:
                continue
            self._held.callback(close_image, fd)
            _path, fd = files.setdefault(identity_of(os.fstat(fd)), (path, fd))
            if path in needed:
                self._actives[path] = fd
        if self._settings.check_mode:  # no lock, or a VM that starts just now would fail because of a mere question
            return
        # In an order that all runs share, or two could wait for each other.
        for _identity, (path, fd) in sorted(files.items()):
            locks.take_turn(fd, path, self._settings.seconds)
        for path, fd in files.values():
            locks.hold_off_writers(fd, path)

    def judge(self, verdict: Verdict) -> Verdict:
        """Decide again, now that nobody can change ACTIVE."""
        wanted, fd = verdict.wanted, self._actives[verdict.wanted.backing_file]
        active, target = observe(fd, wanted), observe_target(wanted.path)
        verdict = decide(wanted, active, target)
        if verdict.state != CREATED:
            return verdict
        if active.image is not None and active.is_recording and not self._settings.check_mode:
            locks.hold_off_everybody(fd, wanted.backing_file)
        self._sites[wanted.path] = BuildSpec(
            target,
            recorded_backing_file(wanted, active, target),
            attributes_for(fd, self._settings.ownership, wanted.path),
            Witnessed(fd, wanted.backing_file, active.image) if active.image is not None else None,
        )
        return verdict

    def build(self, verdict: Verdict) -> Verdict:
        """Make a missing overlay in a file of ours, with QEMU as second witness of ACTIVE, and read it back.

        In check mode QEMU is only the witness.
        """
        if verdict.state != CREATED:
            return verdict
        site, monitor = self._sites[verdict.wanted.path], self._engine.monitor()
        if self._settings.check_mode:
            if site.active is not None:
                cross_check(monitor, site.active)
            return verdict
        file = self._held.enter_context(StagedFile(site.target))
        fill(monitor, file.fd, verdict, site.backing_file, site.active)
        apply_attributes(file.fd, site.attributes, verdict.wanted.path)
        os.fsync(file.fd)
        _read_back(file, verdict, site.backing_file, monitor)
        self._staged.append(file)
        return verdict

    def publish(self, finish: t.Callable[[], None] | None) -> None:
        """Put all files into place and finish, if every ACTIVE still is what it was."""
        for path, fd in self._actives.items():
            try:
                is_same = identity_of(os.stat(path)) == identity_of(os.fstat(fd))
            except OSError:
                is_same = False
            if not is_same:
                raise Qcow2Error(f"{path}: was moved or replaced while the overlay was being made. Run this again.")
            if is_open_for_writing(fd, path):  # through another node of its device, where our lock does not reach
                raise in_use(path)
        if not self._settings.check_mode:
            publish_together(self._staged, finish)


def _read_back(file: StagedFile, verdict: Verdict, backing_file: str, monitor: Monitor) -> None:
    """Raise when the finished overlay is not what it was to be: no exit code tells that bitmaps were lost."""
    wrong = verify(verdict, backing_file, read_image(file.fd, file.target.path))
    if wrong:
        words = monitor.stderr()
        raise Qcow2Error(
            f"{file.target.path}: was not made as it should be and is not published: {'; '.join(wrong)}."
            + (f" QEMU says: {words}." if words else "")
            + f" {CHECK_STORAGE}"
        )


def failed_by(verdict: Verdict, exc: Exception) -> Verdict:
    """Return the verdict failed by an exception that is expected."""
    if isinstance(exc, OSError):
        return verdict.failed(f"{verdict.wanted.path}: cannot be made: {exc.strerror}. {advice(exc)}")
    return verdict.failed(f"{verdict.wanted.path}: {exc}" if isinstance(exc, QemuError) else str(exc))
