# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read: every domain of the host, and which images its disks use."""

from __future__ import annotations

import fnmatch
import os
import stat
import typing as t

from .._base.errors import Qcow2Error, advice
from .._base.files import open_image
from .._libvirt.connection import Domain, Unreadable
from .._libvirt.definition import disks_of
from .._qcow2.chain import Layer, read_chain

READ_ONLY = ("cdrom", "floppy", "read-only")  # why a disk is unfit, of those that are not written to


class Users(t.NamedTuple):
    """The names of the domains of this host that use an image, by its real path."""

    anyhow: dict[str, set[str]]  # anywhere in the chain of a disk
    writing: dict[str, set[str]]  # as the topmost image of a disk that they write to


def users_of_images(domains: t.Sequence[Domain]) -> Users:
    """Return which domains use which images."""
    users = Users({}, {})
    for domain in domains:
        for disk in disks_of(domain.definition):
            if disk.source is not None:
                layers, _problem = layers_of(disk.source, disk.format)
                for path in [os.path.realpath(disk.source), *(layer.real_path for layer in layers)]:
                    users.anyhow.setdefault(path, set()).add(domain.name)
                if disk.why_unfit not in READ_ONLY:
                    users.writing.setdefault(os.path.realpath(disk.source), set()).add(domain.name)
    return users


def first_image(domain: Domain) -> str | None:
    """Return the image that a domain, when it starts, opens first for writing, for itself alone."""
    own = [disk.source for disk in disks_of(domain.definition) if disk.why_unfit not in (*READ_ONLY, "shareable")]
    return next(filter(None, own), None)


def is_device_path(source: str | None) -> bool:
    """Whether the image of a disk is a block device, whatever the definition calls it."""
    try:
        return source is not None and stat.S_ISBLK(os.stat(source).st_mode)
    except OSError:
        return False


def layers_of(source: str, image_format: str) -> tuple[list[Layer], str | None]:
    """Return the chain of a disk's image, or why it cannot be read."""
    try:
        fd = open_image(source)
        try:
            return list(read_chain(fd, source, image_format)), None
        finally:
            os.close(fd)
    except Qcow2Error as exc:
        return [], str(exc)
    except OSError as exc:
        return [], f"{source}: cannot be read: {exc.strerror}. {advice(exc)}"


def select(
    domains: t.Mapping[str, Domain | Unreadable], names: t.Sequence[str]
) -> tuple[list[Domain | Unreadable], list[str]]:
    """Return the domains of these names and patterns, each once; and the patterns that match none."""
    found: dict[str, Domain | Unreadable] = {}
    unmatched = []
    for name in names:
        matching = [name] if name in domains else fnmatch.filter(sorted(domains), name)
        found.update({match: domains[match] for match in matching})
        if not matching and any(character in name for character in "*?["):
            unmatched.append(name)
        elif not matching:
            found[name] = Unreadable(name, f"{name}: libvirt knows no such domain on this host. Check the name.")
    return list(found.values()), unmatched
