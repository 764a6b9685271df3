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
from .._base.files import Identity, identity_of, open_image
from .._libvirt.connection import Domain, Unreadable
from .._libvirt.definition import DomainDisk
from .._qcow2.backing import recorded_name
from .._qcow2.chain import Layer, files_named, resolve_name, walk_chain
from .._qcow2.formats import RAW
from .._qcow2.image import read_image

OthersWith = t.Callable[[str], t.Sequence[str]]
File = t.Union[Identity, str]  # what a path leads to; the path itself if that is nowhere
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
    above: t.Callable[[], tuple[str, ...]] = tuple  # names of others that have its topmost image further down
    problem: Refusal | None = None  # why the chain cannot be read
    others_with: OthersWith = _nobody  # by the path of any image, names of other domains that have it in a chain
    unseen: t.Callable[[], tuple[str, ...]] = tuple  # disks of others of which nobody can tell on what they stand


class _Chain(t.NamedTuple):
    """The chain of an image, or why it cannot be read."""

    layers: tuple[Layer, ...]
    problem: Refusal | None
    used: tuple[Identity, ...]  # its images, as far as they could be read
    further: tuple[str, ...] = ()  # paths at which it goes on, where it could not be read any further
    is_seen: bool = True  # or else nobody can tell whether it goes on


class Inventory:
    """All domains of a host."""

    def __init__(self, domains: t.Mapping[str, Domain | Unreadable]) -> None:
        self._domains = domains
        self._chains: dict[tuple[str, str | None], _Chain] = {}  # by path and format of the topmost image
        self._users: dict[File, set[tuple[str, str]]] | None = None  # name and target of disks
        self._tops: dict[File, set[tuple[str, str]]] = {}  # of those that have it as topmost image
        self._unseen: dict[str, list[str]] = {}  # what _users cannot have, by the name of the domain
        self._writers: dict[File, set[str]] | None = None
        self._suspects: dict[str, set[str]] | None = None  # by real path, or by the mere name of the file

    def select(self, names: t.Sequence[str]) -> tuple[list[Domain | Unreadable], list[str]]:
        """Return the domains of these names and patterns, each once; and the patterns that match none."""
        found: dict[str, Domain | Unreadable] = {}
        unmatched = []
        for name in names:
            # A domain can have the name of a pattern, such as "*", which must not hide the others.
            matching = [one for one in sorted(self._domains) if one == name or fnmatch.fnmatchcase(one, name)]
            found.update({match: self._domains[match] for match in matching})
            if not matching and is_pattern(name):
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
            above=lambda: self._above(chain.layers[0].path, domain) if chain.layers else (),
            problem=chain.problem,
            others_with=lambda path: self._others_with(path, domain),
            unseen=lambda: self._unseen_beside(domain),
        )

    def sharers(self, facts: DiskFacts) -> tuple[tuple[str, str], ...]:
        """Return the images of the chain that a disk with another topmost image has, too, and of which domain it is."""
        others = [(layer, self._standing_on(layer.real_path, facts.disk.source or "")) for layer in facts.layers]
        return tuple((layer.real_path, f"a disk of the domain {users[0][0]}") for layer, users in others if users)

    def _above(self, top: str, domain: Domain) -> tuple[str, ...]:
        """Return the names of the other domains that have a topmost image further down in a chain."""
        return tuple(dict.fromkeys(name for name, _target in self._standing_on(top, top) if name != domain.name))

    def _standing_on(self, path: str, top: str) -> list[tuple[str, str]]:
        """Return the disks that have an image in their chain, without those that have `top` as topmost image."""
        users = self._users_of(path)
        return sorted(users - self._tops.get(_file_at(top), set()))

    def _disks(self) -> t.Iterator[tuple[Domain, DomainDisk]]:
        """Yield every disk, with its domain: as it is defined, as it runs, and as its managed save goes on with it."""
        for domain in self._domains.values():
            if isinstance(domain, Domain):
                definitions = (domain.definition, domain.running_definition, domain.saved_definition)
                yield from ((domain, disk) for one in definitions if one is not None for disk in one.disks)

    def _readable(self) -> t.Iterator[tuple[Domain, DomainDisk, str]]:
        """Yield every disk that has an image, with its domain and its path."""
        return ((domain, disk, disk.source) for domain, disk in self._disks() if disk.source is not None)

    def _others_with(self, path: str, domain: Domain) -> list[str]:
        """Return the names of the other domains that have an image anywhere in the chain of a disk."""
        return sorted({name for name, _target in self._users_of(path)} - {domain.name})

    def _unseen_beside(self, domain: Domain) -> tuple[str, ...]:
        """Return the disks of other domains that can stand on any image."""
        self._users_of("")
        disks = (disk for name, disks in self._unseen.items() if name != domain.name for disk in disks)
        return tuple(dict.fromkeys(disks))

    def _users_of(self, path: str) -> set[tuple[str, str]]:
        """Return the disks, of all domains, that have the image anywhere in their chain, by whichever name."""
        if self._users is None:
            self._users = {}
            self._unseen = {name: _hidden(one) for name, one in self._domains.items()}
            for domain, disk, source in self._readable():
                files, is_seen = self._used_by(disk, source)
                for file in files:
                    self._users.setdefault(file, set()).add((domain.name, disk.target))
                self._tops.setdefault(_file_at(source), set()).add((domain.name, disk.target))
                if not is_seen:
                    self._unseen[domain.name].append(f"{domain.name} ({disk.target})")
        suspects = {(name, "") for name in self._suspects_of(path)}
        return self._users.get(_file_at(path), set()) | suspects

    def _used_by(self, disk: DomainDisk, source: str) -> tuple[set[File], bool]:
        """Return the images of a disk, whatever is wrong with its chain, and whether these are all."""
        is_stated = disk.stated_chain is not None and disk.stated_chain.is_complete
        chain = self._chain(source, disk.format)
        files = {
            _file_at(source),
            *chain.used,
            *map(_file_at, filter(os.path.isabs, (one.path for one in disk.stated_images))),
        }
        to_read, read = list(chain.further), set[str]()
        is_seen = chain.is_seen
        while to_read:
            path = to_read.pop()
            if path not in read:
                read.add(path)
                below = self._chain(path, None)
                files |= {_file_at(path), *below.used}
                to_read += below.further
                is_seen &= below.is_seen
        return files, is_seen or is_stated or disk.format == RAW  # which stands on nothing

    def _writers_of(self, source: str) -> set[str]:
        """Return the names of the domains that have the image as topmost one of a disk that they write to."""
        if self._writers is None:
            self._writers = {}
            for domain, disk, path in self._readable():
                if disk.why_unfit not in READ_ONLY:
                    self._writers.setdefault(_file_at(path), set()).add(domain.name)
        return self._writers.get(_file_at(source), set())

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

    def _chain(self, source: str, image_format: str | None) -> _Chain:
        """Return the chain of an image."""
        if (source, image_format) not in self._chains:
            self._chains[source, image_format] = _read(source, image_format)
        return self._chains[source, image_format]


def _hidden(one: Domain | Unreadable) -> list[str]:
    """Return what there is of a domain that can have any disks."""
    if isinstance(one, Unreadable):
        return [one.name]
    return [f"{one.name} (its managed save)"] if one.managed_save and one.saved_definition is None else []


def is_pattern(name: str) -> bool:
    """Whether a name that was asked for can match others."""
    return any(character in name for character in "*?[")


def facts_without_chain(disk: DomainDisk) -> DiskFacts:
    """Return what is known of a disk without a look at its chain, or that of any other."""
    if disk.source is None or disk.why_unfit is not None:
        return DiskFacts(disk, is_device=False)
    return DiskFacts(disk, is_device=_is_device(disk.source), is_absent=_is_absent(disk.source))


def _read(source: str, image_format: str | None) -> _Chain:
    """Read the chain of an image; a format of None is looked up, only to read what is below it."""
    layers: list[Layer] = []
    try:
        with open_image(source) as file:
            for layer, _file in walk_chain(file, image_format, read_top=read_image):
                layers.append(layer)  # those above a fault stay
    except (Refusal, OSError) as exc:
        problem = exc if isinstance(exc, Refusal) else system_refusal(exc, source, "cannot be read")
        further = _goes_on_at(source, layers)
        return _Chain((), problem, _identities(layers), tuple(further or ()), further is not None)
    return _Chain(tuple(layers), None, _identities(layers))


def _identities(layers: t.Iterable[Layer]) -> tuple[Identity, ...]:
    return tuple(layer.identity for layer in layers)


def _file_at(path: str) -> File:
    """Return what a path leads to: a file has as many names as hard links, and mounts, give it."""
    try:
        return identity_of(os.stat(path))
    except (OSError, ValueError):
        return os.path.realpath(path)


def _goes_on_at(source: str, layers: t.Sequence[Layer]) -> list[str] | None:
    """Return the paths at which a chain goes on that could be read so far, and no further; None if that is unknown."""
    path = layers[-1].path if layers else source
    try:
        if layers:
            name = layers[-1].image.backing_file if layers[-1].image is not None else None
        else:
            with open_image(source) as file:
                name = recorded_name(file)
    except (Refusal, OSError):
        return None
    return [] if name is None else [resolve_name(path, one) for one in files_named(name)]


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
