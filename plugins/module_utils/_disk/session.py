# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""One VM's turn: lock its images in order, decide again, act phase by phase, publish; the same for every operation.

::

    read → decide → keep → act → read back → publish → retire
    └── judge() ──┘ └───── phases() ─────┘ └─ publish() ─┘

An operation says what to do; this file says when, under which locks, and what a failure means for the VM.
"""

from __future__ import annotations

import contextlib
import typing as t

from .._base.errors import QemuError, Refusal, system_refusal
from .._base.files import Identity, OpenImage, open_image
from .._qemu import locks
from .._qemu.monitor import Monitor, find_qemu
from .._qemu.settled import is_open_for_writing
from .progress import how_far
from .publish import StagedFile
from .verdict import FAILED, V, all_or_none

C = t.TypeVar("C")


class Settings(t.NamedTuple):
    """What holds for everything in one call."""

    check_mode: bool
    seconds: float  # that QEMU may take for one step, before the size of the step is added
    find_program: t.Callable[[str], str | None]
    parallel: int = 1  # VMs at a time


class Vm(t.NamedTuple):
    """What is known of a VM beside its requests."""

    switch: t.Callable[[], None]  # must succeed for what was published to stay
    first_image: str | None = None  # path of what it opens first for writing when it starts
    confirm: t.Callable[[], None] | None = None  # raises Refusal if it is not any more what its requests were made for


class Images(t.NamedTuple):
    """The images of one request that its VM opens, in the order in which QEMU does."""

    opened: tuple[str, ...]
    needed: frozenset[str] = frozenset()  # the request is refused if one of these cannot be locked
    running: tuple[str, ...] = ()  # a VM that runs has these, so only other runs are kept from working on them


class Engine:
    """The QEMU process of a call, started when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._monitor: Monitor | None = None

    def monitor(self) -> Monitor:
        """Return the running process."""
        if self._monitor is None:
            self._monitor = Monitor(find_qemu(self._settings.find_program), self._settings.seconds)
        return self._monitor

    def stop(self) -> None:
        """End the process. After a failure nothing of it is to be trusted, so the next VM gets a new one."""
        if self._monitor is not None:
            self._monitor.close()
        self._monitor = None


class Held:
    """What is held for one VM: open images, their locks, files that are not published yet. The block's end lets it go.

    With `locking` the images that are opened get locked too; without, this is a mere look. `engine` is for those
    steps that need QEMU.
    """

    def __init__(self, settings: Settings, engine: Engine, *, locking: bool) -> None:
        self._settings = settings
        self._engine = engine
        self._locking = locking
        self._stack = contextlib.ExitStack()
        self._images: dict[str, OpenImage] = {}  # by path
        self.staged: list[StagedFile] = []

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exc: t.Any) -> None:
        self._stack.__exit__(*exc)

    def image(self, path: str) -> OpenImage:
        """Return the open image; Refusal if it cannot be opened."""
        if path not in self._images:
            self._images[path] = self._stack.enter_context(open_image(path))
        return self._images[path]

    def enter(self, context: t.ContextManager[C]) -> C:
        """Enter a context that ends with the block; return what it yields."""
        return self._stack.enter_context(context)

    def alone(self, path: str) -> OpenImage:
        """Return an open image that nobody else has; with `locking` nobody can begin to have it."""
        file = self.image(path)
        if self._locking:
            locks.hold_off_writers(file)
            locks.hold_off_everybody(file)
        return file

    def unwritten(self, path: str) -> OpenImage:
        """Return an open image below others, to which nobody writes; with `locking` nobody can begin to.

        VMs may have it as a backing file. Refusal if a process has it open for writing.
        """
        file = self.image(path)
        if self._locking:
            locks.hold_off_writers(file)
        if is_open_for_writing(file):
            raise locks.in_use(path)
        return file

    @property
    def seconds(self) -> float:
        """What QEMU may take for one step, before the size of the step is added."""
        return self._settings.seconds

    def monitor(self) -> Monitor:
        """Return the QEMU process."""
        return self._engine.monitor()

    def stop_qemu(self) -> None:
        """End the QEMU process, whatever it is doing, so that images stay as they are."""
        self._engine.stop()

    def stage(self, path: str, folder: str) -> StagedFile:
        """Return a new file of ours, to be published at `path`, a resolved path in `folder`."""
        staged = self._stack.enter_context(StagedFile(path, folder))
        self.staged.append(staged)
        return staged

    def hold_off_everybody(self, path: str) -> None:
        """Keep VMs also from having the locked image as a backing file."""
        if self._locking:
            locks.hold_off_everybody(self.image(path))

    def lock(self, images: Images) -> None:
        """Lock the images against writers and against other runs of this collection.

        Lock them in the order in which QEMU opens them; release in reverse. A VM started meanwhile must be refused at
        its *first* image: a QEMU that gets the first but not the second exits and leaves the first's bitmaps in-use,
        which is for good. So stop at the first image that a starting VM got before us.
        """
        files: dict[Identity, OpenImage] = {}  # a file with two names once
        for path in images.opened:
            file = self.image(path) if path in images.needed else self._open_to_lock(path)
            if file is not None:
                # The lock is on the first one; the name stays, since relative backing files count from it.
                self._images[path] = files.setdefault(file.identity, file).named(path)
        if not self._locking:  # or a VM that starts just now would fail because of a mere question
            return
        self._take_turns(files, locks.OUR_TURN)
        for file in files.values():
            locks.hold_off_writers(file)
        self._take_turns({file.identity: file for file in map(self.image, images.running)}, locks.LIVE_TURN)

    def _take_turns(self, files: t.Mapping[Identity, OpenImage], byte: int) -> None:
        """Take turns in an order that all runs share, or two could wait for each other."""
        for _identity, file in sorted(files.items(), key=lambda item: item[0]):
            locks.take_turn(file, self._settings.seconds, how_far, byte)

    def _open_to_lock(self, path: str) -> OpenImage | None:
        """Return an image that is only locked to keep its VM from starting; None if it cannot be locked.

        Refusal if it is in use already: then the VM runs, or is just being started.
        """
        try:
            file = self.image(path)
            is_used = locks.is_locked_by_qemu(file, locks.WRITE)
        except Refusal:  # without the image the VM cannot start anyhow; without locks nothing can be held
            return None
        if is_used:
            raise locks.in_use(path)
        return file

    def check_images(self, paths: t.Iterable[str]) -> None:
        """Refuse if one of these images is not what its path leads to any more, or is written to."""
        for path in paths:
            file = self.image(path)
            if not file.is_still_at_its_path():
                raise Refusal("changed_meanwhile", path, "was moved or replaced meanwhile", "Run this again.")
            if is_open_for_writing(file):  # through another node of its device, where our lock does not reach
                raise locks.in_use(path)


R_contra = t.TypeVar("R_contra", contravariant=True)


class Operation(t.Protocol[R_contra, V]):
    """What is different between making overlays and other work on the images of a VM that is shut off."""

    def problems(self, request: R_contra) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""

    def conflicts(self, requests: t.Sequence[R_contra]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""

    def folders(self, request: R_contra) -> t.Sequence[str]:
        """Return the folders in which a killed run can have left temporary files."""

    def refused(self, request: R_contra, problems: t.Sequence[Refusal]) -> V:
        """Return the verdict on a request that is refused without a look."""

    def judge(self, request: R_contra, held: Held) -> V:
        """Read and decide. The same call makes the first look, without locks, and the one that counts, with them."""

    def images(self, verdict: V) -> Images:
        """Return the images that the VM opens when it starts, as far as the request is about them."""

    def rehearse(self, verdict: V, held: Held) -> V:
        """Do what check mode does in place of the phases: nothing is written."""

    def phases(self) -> t.Sequence[t.Callable[[V, Held], V]]:
        """Return the steps to take: first keep what must survive, then act and read back.

        Each is taken for all requests of the VM before the next one begins.
        """

    def publish(self, verdicts: t.Sequence[V], held: Held, switch: t.Callable[[], None], /) -> t.Sequence[V]:
        """Put into place what was made, call `switch`, then retire what is not needed; return what became of them.

        Raise if nothing of it is done, or all of it is undone. What fails after the switch is in the verdicts.
        """


class Session(t.Generic[V]):
    """The turn of one VM. Its verdicts are all done, or all left as they were."""

    def __init__(self, operation: Operation[t.Any, V], settings: Settings, engine: Engine, vm: Vm | None) -> None:
        self._operation = operation
        self._settings = settings
        self._engine = engine
        self._vm = vm

    def is_pending(self, verdict: V) -> bool:
        """Whether something is to be done for it, or for its VM now that it is done."""
        return verdict.changed or (self._vm is not None and verdict.state != FAILED)

    def run(self, verdicts: t.Sequence[V]) -> list[V]:
        """Do what the verdicts say, under locks, and return what became of them."""
        with Held(self._settings, self._engine, locking=not self._settings.check_mode) as held:
            try:
                return self._run(list(verdicts), held)
            except BaseException:
                self._engine.stop()  # as long as the locks are held: it may be writing
                raise

    def _run(self, verdicts: list[V], held: Held) -> list[V]:
        images = self._images(verdicts)
        try:
            held.lock(images)
            if self._vm is not None and self._vm.confirm is not None and not self._settings.check_mode:
                self._vm.confirm()  # its turn can come hours after the plan was made; from here on it cannot start
        except (Refusal, OSError) as exc:
            return self._all_failed(verdicts, exc)
        acts = [self._operation.rehearse] if self._settings.check_mode else self._operation.phases()
        for phase in (self._judge_again, *acts):
            for index, verdict in enumerate(verdicts):
                if self.is_pending(verdict):
                    verdicts[index] = self._attempt(phase, verdict, held)
                if verdicts[index].state == FAILED:
                    self._engine.stop()
                    return all_or_none(verdicts)
        try:
            held.check_images(sorted(images.needed))
            if not self._settings.check_mode:
                switch = self._vm.switch if self._vm else _nothing_to_switch
                return list(self._operation.publish(verdicts, held, switch))
        except (Refusal, OSError) as exc:
            return self._all_failed(verdicts, exc)
        return verdicts

    def _images(self, verdicts: t.Sequence[V]) -> Images:
        """Return the images that the VM opens, in that order, as far as they are known."""
        first = [self._vm.first_image] if self._vm and self._vm.first_image else []
        parts = [(verdict, self._operation.images(verdict)) for verdict in verdicts]
        opened = [path for _verdict, part in parts for path in part.opened]
        needed = [path for verdict, part in parts if self.is_pending(verdict) for path in part.needed]
        running = [path for _verdict, part in parts for path in part.running]
        return Images(tuple(dict.fromkeys([*first, *opened])), frozenset(needed), tuple(running))

    def _judge_again(self, verdict: V, held: Held) -> V:
        """Decide once more, now that nobody can change what is locked."""
        return self._operation.judge(verdict.request, held)

    def _attempt(self, phase: t.Callable[[V, Held], V], verdict: V, held: Held) -> V:
        """Return what becomes of a verdict in this phase."""
        try:
            return phase(verdict, held)
        except (Refusal, OSError) as exc:
            return failed_by(verdict, exc)

    def _all_failed(self, verdicts: t.Sequence[V], exc: Refusal | OSError) -> list[V]:
        """Return the verdicts, those that are pending failed by the exception."""
        return [failed_by(verdict, exc) if self.is_pending(verdict) else verdict for verdict in verdicts]


def _nothing_to_switch() -> None:
    """Leave the definition of a VM that nobody told of alone."""


def failed_by(verdict: V, exc: Refusal | OSError) -> V:
    """Return the verdict failed by an exception that is expected."""
    if isinstance(exc, OSError):
        return verdict.failed(system_refusal(exc, verdict.request.path, "failed"))
    return verdict.failed(exc.about(verdict.request.path) if isinstance(exc, QemuError) else exc)
