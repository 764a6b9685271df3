# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the libvirt daemon of this host, by its Python bindings.

The calls that are made in this room: open; listAllDomains, lookupByUUIDString, defineXML, listAllStoragePools,
getLibVersion, isAlive of the connection; name, UUIDString, isActive, state, isPersistent, hasManagedSaveImage,
managedSaveGetXMLDesc, XMLDesc, listAllCheckpoints, checkpointLookupByName, checkpointCreateXML, listAllSnapshots,
snapshotCreateXML, ID, getTime, fsThaw, blockCommit, blockJobInfo, blockJobAbort, jobStats of a domain; getName,
getXMLDesc, delete of a checkpoint; getName of a snapshot; name, XMLDesc, isActive, storageVolLookupByName, refresh of a
storage pool; path, info of a volume.
Never a monitor command: it taints the domain.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import typing as t

from .._base.errors import Refusal
from .._base.signals import interruptible
from .bindings import LibvirtError, known, libvirt, words_of
from .definition import CheckpointParts, Definition, DomainDisk, checkpoint_from
from .pools import Pools

_Answer = t.TypeVar("_Answer")
PATIENCE = 10.0  # seconds for an answer of QEMU or of a guest agent; a sound one takes milliseconds
_PAUSE = 0.1  # seconds between two attempts to reach a daemon that is away
_NO_ANSWER = f"its QEMU has not answered within {PATIENCE:.0f} seconds"
# virDomainState
_STATES = {1: "running", 2: "blocked", 3: "paused", 4: "shutting down", 6: "crashed", 7: "suspended"}


class LiveBitmaps(t.NamedTuple):
    """What libvirt says of the bitmaps of a checkpoint while the domain runs."""

    sizes: t.Mapping[str, int] = {}  # dirty bytes by target; only disks on which the whole chain is valid
    problem: str | None = None  # why it cannot tell


class KnownCheckpoint(t.NamedTuple):
    """A checkpoint that libvirt has of a domain."""

    name: str
    bitmaps: t.Mapping[str, str]  # by target
    left_out: frozenset[str] = frozenset()  # targets of the other disks that the domain had when it was made
    created: int = 0  # seconds since 1970
    parent: str | None = None  # name of the checkpoint before
    live: LiveBitmaps | None = None  # None if libvirt was not asked
    images: t.Mapping[str, frozenset[str]] = {}  # real paths, by target, that the disks had, if it was asked for them


class Domain(t.NamedTuple):
    """A domain as libvirt describes it."""

    name: str
    uuid: str
    state: str | None  # running, paused, …; None if it is shut off
    persistent: bool
    managed_save: bool
    definition: Definition  # what the next start uses, with its secrets
    running_definition: Definition | None  # what it runs with; None if it is shut off
    saved_definition: Definition | None = None  # what its managed save goes on with, if there is one and it can be read


class Kept(t.NamedTuple):
    """What libvirt keeps of a domain beside its definition."""

    checkpoints: tuple[KnownCheckpoint, ...] = ()  # by name
    snapshots: tuple[str, ...] = ()  # names of libvirt's own, internal ones and external ones that have metadata
    images: frozenset[str] = frozenset()  # paths of the disks that it had when its checkpoints were made


class Unreadable(t.NamedTuple):
    """A domain, or the name of one, of which nothing can be said."""

    name: str
    problem: Refusal


class Libvirt:
    """A connection to the daemon."""

    def __init__(self, uri: str) -> None:
        """Connect; Refusal if that is not possible."""
        libvirt.registerErrorHandler(lambda _context, _error: None, None)  # or every error is on standard error too
        self._uri = uri
        self._is_lost = False  # it was waited for in vain
        self._spare: t.Any = None  # another connection, for in_time()
        self.connection = _open(uri)
        self.pools = Pools(self.connection)

    @property
    def version(self) -> tuple[int, int, int]:
        """The version of the daemon."""
        return self._version(self.connection.getLibVersion)

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """The version of the host's QEMU, as the daemon has found it."""
        return self._version(self.connection.getVersion)

    def _version(self, ask: t.Callable[[], int]) -> tuple[int, int, int]:
        """Return a version, which libvirt tells as 1,000,000 * major + 1,000 * minor + release."""
        try:
            number = ask()
        except LibvirtError as exc:
            raise unreadable(self._uri, exc) from exc
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    def is_there(self) -> bool:
        """Return whether the daemon answers."""
        try:
            self.connection.getLibVersion()
        except LibvirtError:
            return False
        return True

    def is_back(self, seconds: float, *, can_end: bool = True) -> bool:
        """Return after an error whether the daemon was away, and is back; False if it was there all the time.

        One that is started anew is waited for, but once only if it does not come. Refusal if it is not back within
        `seconds`. All handles are to be looked up again. Without `can_end` no signal ends the run meanwhile.
        """
        if self.is_there():
            return False
        deadline = time.monotonic() + (0.0 if self._is_lost else seconds)
        while True:
            with contextlib.suppress(LibvirtError):
                self.connection = libvirt.open(self._uri)
                self.pools, self._is_lost, self._spare = Pools(self.connection), False, None
                return True
            if time.monotonic() > deadline:
                self._is_lost = True
                why = f"libvirt's daemon went away, and is not back after {seconds:.0f} s. What it was told may go on"
                raise Refusal("libvirt_unreachable", self._uri, why, "Start it, then run this again.")
            with interruptible() if can_end else contextlib.nullcontext():
                time.sleep(_PAUSE)

    def in_time(self, uuid: str, ask: t.Callable[[t.Any], _Answer]) -> _Answer:
        """Return what `ask` returns of the handle of a domain; TimeoutError if that takes longer than PATIENCE.

        It asks QEMU, or a guest, for which libvirt itself waits for ever. So a thread waits, which ends with the
        module, by a connection of its own: of two threads that share one, libvirt 9.0 can fail to wake the other.
        Refusal if there is no further connection.
        """
        connection = self._spare or _open(self._uri)
        self._spare = None  # it is in use, perhaps for ever
        answers: list[_Answer] = []
        errors: list[t.Any] = []

        def wait() -> None:
            try:
                answers.append(ask(connection.lookupByUUIDString(uuid)))
            except LibvirtError as exc:
                errors.append(exc)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        if answers or (errors and _is_alive(connection)):
            self._spare = connection
        if errors:
            raise errors.pop()
        if not answers:
            raise TimeoutError
        return answers[0]

    def domains(self) -> dict[str, Domain | Unreadable]:
        """Return all domains of the host by name."""
        try:
            handles = {handle.name(): handle for handle in self.connection.listAllDomains(0)}
        except LibvirtError as exc:
            why = f"libvirt cannot list its domains: {words_of(exc)}"
            raise Refusal("libvirt_failed", "", why, "See that its daemon runs, then run this again.") from exc
        return {name: self._with_places(_read(handle, name)) for name, handle in handles.items()}

    def _with_places(self, one: Domain | Unreadable) -> Domain | Unreadable:
        """Return a domain with what libvirt knows of the volumes that its definitions name."""
        if isinstance(one, Unreadable):
            return one
        running, saved = one.running_definition, one.saved_definition
        return one._replace(
            definition=self.placed(one.definition),
            running_definition=self.placed(running) if running else None,
            saved_definition=self.placed(saved) if saved else None,
        )

    def placed(self, definition: Definition) -> Definition:
        """Return a definition with what libvirt knows of the volumes that it names."""
        return definition.with_places({volume: self.pools.place_of(volume) for volume in definition.volumes})

    def kept(self, domain: Domain) -> Kept:
        """Return the checkpoints and snapshots of a domain; Refusal if libvirt cannot tell."""
        try:
            handle = self.connection.lookupByUUIDString(domain.uuid)
            parts = [(one.getName(), checkpoint_from(one.getXMLDesc(0))) for one in _checkpoints(handle)]
            snapshots = _snapshots(handle)
        except LibvirtError as exc:
            raise unreadable(domain.name, exc) from exc
        places = [self.pools.place_of(volume) for _name, part in parts for volume in part.volumes]
        return Kept(
            tuple(self._known(name, part) for name, part in parts),
            snapshots,
            # Without a path of today nothing is known, and a disk is rather ambiguous.
            frozenset(place.path for place in places if place.path).union(*(part.images for _name, part in parts)),
        )

    def kept_now(self, domain: Domain) -> Kept:
        """Return the same without the images of that time, and with the live bitmaps of a domain that runs.

        That is much faster: the XML of a checkpoint is little then, unless it can be about disks of other targets now.
        """
        try:
            handle = self.connection.lookupByUUIDString(domain.uuid)
            checkpoints = _checkpoints(handle)
            known_now = (
                self._known_live(domain, checkpoints)
                if domain.state
                else [self._known_stored(domain, one) for one in checkpoints]
            )
            return Kept(tuple(known_now), _snapshots(handle))
        except LibvirtError as exc:
            raise unreadable(domain.name, exc) from exc

    def _known_live(self, domain: Domain, checkpoints: t.Sequence[t.Any]) -> list[KnownCheckpoint]:
        """Return what libvirt keeps of the checkpoints of a domain that runs, and what its QEMU says of their bitmaps.

        That libvirt asks QEMU for them does not taint the domain, as a monitor command of ours would. Do not ask a QEMU
        again that does not answer.
        """
        found: list[KnownCheckpoint] = []
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
        problem = None
        for one in checkpoints:
            if problem != _NO_ANSWER:
                try:
                    name = t.cast("str", one.getName())
                    parts = checkpoint_from(
                        self.in_time(domain.uuid, functools.partial(_described, name=name, flags=flags))
                    )
                    found.append(self._known(name, _with_disks(domain, one, parts), LiveBitmaps(parts.sizes)))
                    continue
                except TimeoutError:
                    problem = _NO_ANSWER
                except LibvirtError as exc:  # such as one that is shut off just now
                    is_old = exc.get_error_code() == libvirt.VIR_ERR_INVALID_ARG  # it does not know the flag
                    problem = words_of(exc) + (" (libvirt 7.0 can)" if is_old else "")
            found.append(self._known_stored(domain, one, LiveBitmaps(problem=problem)))
        return found

    def _known_stored(self, domain: Domain, checkpoint: t.Any, live: LiveBitmaps | None = None) -> KnownCheckpoint:
        """Return what libvirt keeps of a checkpoint."""
        parts = checkpoint_from(checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN))
        return self._known(checkpoint.getName(), _with_disks(domain, checkpoint, parts), live)

    def _known(self, name: str, parts: CheckpointParts, live: LiveBitmaps | None = None) -> KnownCheckpoint:
        images = {disk.target: self._images(disk) for disk in parts.disks}
        return KnownCheckpoint(name, parts.bitmaps, parts.left_out, parts.created, parts.parent, live, images)

    def _images(self, disk: DomainDisk) -> frozenset[str]:
        """Return the real paths of the images of a disk, as far as its definition tells them."""
        top = self.pools.place_of(disk.volume).path if disk.volume is not None else disk.source
        paths = [top or "", *(image.path for image in disk.stated_images)]
        return frozenset(os.path.realpath(path) for path in paths if os.path.isabs(path))


def _open(uri: str) -> t.Any:
    """Return a connection to the daemon; Refusal if that is not possible."""
    try:
        return libvirt.open(uri)
    except LibvirtError as exc:
        why = f"libvirt cannot be reached: {words_of(exc)}"
        remedy = "See that its daemon runs and that this user may use it: run with become, or give another uri."
        raise Refusal("libvirt_unreachable", uri, why, remedy) from exc


def _is_alive(connection: t.Any) -> bool:
    """Return whether the daemon still has the connection."""
    try:
        return bool(connection.isAlive())
    except LibvirtError:
        return False


def _described(handle: t.Any, name: str, flags: int) -> str:
    return t.cast("str", handle.checkpointLookupByName(name).getXMLDesc(flags))


def _checkpoints(handle: t.Any) -> list[t.Any]:
    return sorted(known(handle.listAllCheckpoints), key=lambda one: t.cast("str", one.getName()))


def _snapshots(handle: t.Any) -> tuple[str, ...]:
    return tuple(sorted(one.getName() for one in known(handle.listAllSnapshots)))


def _with_disks(domain: Domain, checkpoint: t.Any, parts: CheckpointParts) -> CheckpointParts:
    """Return what is known of a checkpoint, with the disks of that time where these can have other targets now."""
    definition = domain.running_definition or domain.definition
    own = {disk.target for disk in definition.disks if disk.format == "qcow2"}
    if len(parts.bitmaps) < 2 and not parts.left_out & own:
        return parts
    whole = checkpoint_from(checkpoint.getXMLDesc(0))
    return parts._replace(disks=whole.disks, left_out=whole.left_out)


def _read(handle: t.Any, name: str) -> Domain | Unreadable:
    """Return what libvirt says of a domain."""
    try:
        state = _STATES.get(handle.state()[0], "active") if handle.isActive() else None
        has_save = bool(handle.hasManagedSaveImage(0))
        return Domain(
            name=name,
            uuid=handle.UUIDString(),
            state=state,
            persistent=bool(handle.isPersistent()),
            managed_save=has_save,
            definition=definition_of(handle),
            running_definition=Definition(handle.XMLDesc(0)) if state else None,
            saved_definition=_saved(handle) if has_save else None,
        )
    except LibvirtError as exc:
        return Unreadable(name, unreadable(name, exc))


def _saved(handle: t.Any) -> Definition | None:
    """Return what the managed save of a domain goes on with, which no definition need have; None if it is damaged."""
    try:
        return Definition(handle.managedSaveGetXMLDesc(0))
    except LibvirtError:
        return None


def definition_of(handle: t.Any) -> Definition:
    """Return what the next start uses; with its secrets, or defining it anew would lose them."""
    return Definition(handle.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))


def unreadable(name: str, exc: t.Any) -> Refusal:
    """Return the refusal of a domain of which libvirt cannot tell."""
    return Refusal("libvirt_failed", name, f"libvirt cannot tell about it: {words_of(exc)}", "Run this again.")
