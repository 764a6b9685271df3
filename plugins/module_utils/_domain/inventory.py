# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: every domain of the host, and which images its disks use.

The disks of a definition are parsed once. A chain is read at most once, and only if somebody asks for it: headers, and
the bitmaps of the topmost image, where damage would otherwise go unnoticed.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import stat
import typing as t

from .._base.errors import Refusal, system_refusal
from .._base.files import open_image
from .._libvirt.connection import Domain, Unreadable
from .._libvirt.definition import DomainDisk
from .._qcow2.chain import Layer, read_chain

OthersWith = t.Callable[[str], t.Sequence[str]]
READ_ONLY = ("cdrom", "floppy", "read-only")  # why a disk is unfit, of those that are not written to


def _nobody(_path: str) -> tuple[str, ...]:
    return ()


class DiskFacts(t.NamedTuple):
    """What is known of a disk beside its definition."""

    disk: DomainDisk
    is_device: bool  # whatever the definition calls it
    is_absent: bool = False  # there is nothing at its path
    layers: tuple[Layer, ...] = ()  # top to base; none if one of them cannot be read
    own: tuple[Layer, ...] = ()  # of these from the top those that no disk has which has not the topmost one
    lent: tuple[Layer, ...] = ()  # of these below the topmost one those that are another domain's disk
    writers: tuple[str, ...] = ()  # names of other domains that write to its topmost image
    suspects: tuple[str, ...] = ()  # names of other domains that may, by a volume that libvirt cannot look up
    problem: Refusal | None = None  # why the chain cannot be read
    others_with: OthersWith = _nobody  # by the path of any image, names of other domains that have it in a chain


class _Chain(t.NamedTuple):
    """The chain of an image, or why it cannot be read."""

    layers: tuple[Layer, ...]
    problem: Refusal | None


class Inventory:
    """All domains of a host."""

    def __init__(self, domains: t.Mapping[str, Domain | Unreadable]) -> None:
        self._domains = domains
        self._chains: dict[tuple[str, str], _Chain] = {}  # by path and format of the topmost image
        self._users: dict[str, set[tuple[str, str]]] | None = None  # name and target of disks by real path
        self._writers: dict[str, set[str]] | None = None
        self._suspects: dict[str, set[str]] | None = None  # by real path, or by the mere name of the file

    def select(self, names: t.Sequence[str]) -> tuple[list[Domain | Unreadable], list[str]]:
        """Return the domains of these names and patterns, each once; and the patterns that match none."""
        found: dict[str, Domain | Unreadable] = {}
        unmatched = []
        for name in names:
            matching = [name] if name in self._domains else fnmatch.filter(sorted(self._domains), name)
            found.update({match: self._domains[match] for match in matching})
            if not matching and any(character in name for character in "*?["):
                unmatched.append(name)
            elif not matching:
                why = "libvirt knows no such domain on this host"
                found[name] = Unreadable(name, Refusal("no_domain", name, why, "Check the name."))
        return list(found.values()), unmatched

    def facts(self, domain: Domain, disk: DomainDisk) -> DiskFacts:
        """Return what is known of a disk; nothing of its chain if it cannot take part anyway."""
        known = facts_without_chain(disk)
        if disk.source is None or disk.why_unfit is not None:
            return known
        chain = self._chain(disk.source, disk.format)
        # A template belongs to all its clones; its snapshots are not those of this disk.
        below = itertools.takewhile(
            lambda layer: self._users_of(layer.real_path) <= self._users_of(chain.layers[0].real_path), chain.layers[1:]
        )
        return known._replace(
            layers=chain.layers,
            own=(*chain.layers[:1], *below),
            lent=tuple(one for one in chain.layers[1:] if self._writers_of(one.real_path) - {domain.name}),
            writers=tuple(sorted(self._writers_of(disk.source) - {domain.name})),
            suspects=tuple(sorted(self._suspects_of(disk.source) - {domain.name})),
            problem=chain.problem,
            others_with=lambda path: self._others_with(os.path.realpath(path), domain),
        )

    def sharers(self, facts: DiskFacts) -> tuple[tuple[str, str], ...]:
        """Return the images of the chain that another disk has without the topmost one, and of which domain that is."""
        if not facts.layers:
            return ()
        own = self._users_of(facts.layers[0].real_path)
        others = [(layer, sorted(self._users_of(layer.real_path) - own)) for layer in facts.layers[1:]]
        return tuple((layer.real_path, f"a disk of the domain {users[0][0]}") for layer, users in others if users)

    def _disks(self) -> t.Iterator[tuple[Domain, DomainDisk]]:
        """Yield every disk, with its domain."""
        for domain in self._domains.values():
            if isinstance(domain, Domain):
                yield from ((domain, disk) for disk in domain.definition.disks)

    def _readable(self) -> t.Iterator[tuple[Domain, DomainDisk, str]]:
        """Yield every disk that has an image, with its domain and its path."""
        return ((domain, disk, disk.source) for domain, disk in self._disks() if disk.source is not None)

    def _others_with(self, real_path: str, domain: Domain) -> list[str]:
        """Return the names of the other domains that have an image anywhere in the chain of a disk."""
        return sorted({name for name, _target in self._users_of(real_path)} - {domain.name})

    def _users_of(self, real_path: str) -> set[tuple[str, str]]:
        """Return the disks, of all domains, that have the image anywhere in their chain."""
        if self._users is None:
            self._users = {}
            for domain, disk, source in self._readable():
                paths = [layer.real_path for layer in self._chain(source, disk.format).layers]
                for path in [os.path.realpath(source), *paths]:
                    self._users.setdefault(path, set()).add((domain.name, disk.target))
        suspects = {(name, "") for name in self._suspects_of(real_path)}
        return self._users.get(real_path, set()) | suspects

    def _writers_of(self, source: str) -> set[str]:
        """Return the names of the domains that have the image as topmost one of a disk that they write to."""
        if self._writers is None:
            self._writers = {}
            for domain, disk, path in self._readable():
                if disk.why_unfit not in READ_ONLY:
                    self._writers.setdefault(os.path.realpath(path), set()).add(domain.name)
        return self._writers.get(os.path.realpath(source), set())

    def _suspects_of(self, source: str) -> set[str]:
        """Return the names of the domains that may have the image as topmost one of a disk that they write to."""
        if self._suspects is None:
            self._suspects = {}
            for domain, disk in self._disks():
                if disk.suspect is not None and disk.why_unfit not in READ_ONLY:
                    path = os.path.realpath(disk.suspect) if os.path.isabs(disk.suspect) else disk.suspect
                    self._suspects.setdefault(path, set()).add(domain.name)
        real_path = os.path.realpath(source)
        names = {real_path, os.path.basename(source), os.path.basename(real_path)}
        return {domain for name in names for domain in self._suspects.get(name, ())}

    def _chain(self, source: str, image_format: str) -> _Chain:
        """Return the chain of an image."""
        if (source, image_format) not in self._chains:
            self._chains[source, image_format] = _read(source, image_format)
        return self._chains[source, image_format]


def facts_without_chain(disk: DomainDisk) -> DiskFacts:
    """Return what is known of a disk without a look at its chain, or that of any other."""
    if disk.source is None or disk.why_unfit is not None:
        return DiskFacts(disk, is_device=False)
    return DiskFacts(disk, is_device=_is_device(disk.source), is_absent=_is_absent(disk.source))


def _read(source: str, image_format: str) -> _Chain:
    """Read the chain of an image."""
    try:
        with open_image(source) as file:
            return _Chain(read_chain(file, image_format), None)
    except Refusal as exc:
        return _Chain((), exc)
    except OSError as exc:
        return _Chain((), system_refusal(exc, source, "cannot be read"))


def first_image(domain: Domain) -> str | None:
    """Return the image that a domain, when it starts, opens first for writing, for itself alone."""
    own = [disk for disk in domain.definition.disks if disk.why_unfit not in (*READ_ONLY, "shareable")]
    # libvirt starts the domain without an optional disk that is not there.
    there = (disk.source for disk in own if disk.source and not (disk.is_optional and _is_absent(disk.source)))
    return next(there, None)


def _is_absent(source: str) -> bool:
    """Whether there is nothing at the path; not if that cannot be told."""
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_device(source: str) -> bool:
    """Whether there is a block device at the path."""
    try:
        return stat.S_ISBLK(os.stat(source).st_mode)
    except OSError:
        return False
