# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Owner, mode, ACL and SELinux context of a new file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import typing as t

from .errors import Qcow2Error

_SELINUX = "security.selinux"
_ACL = "system.posix_acl_access"


class AttributeOptions(t.NamedTuple):
    """Who may use the new overlays; None means as ACTIVE."""

    uid: int | None = None
    gid: int | None = None
    mode: t.Callable[[int], int] | None = None  # from ACTIVE's permission bits to the wanted ones
    context: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)  # user, role, type, level


class Attributes(t.NamedTuple):
    """What a new overlay is given."""

    uid: int
    gid: int
    mode: int
    attributes: dict[str, bytes]  # extended attributes: ACL and SELinux context


def attributes_for(active_fd: int, ownership: AttributeOptions, path: str) -> Attributes:
    """Return the owner, mode, ACL and context that were asked for, or ACTIVE's; Qcow2Error for what cannot be given."""
    active = os.fstat(active_fd)
    uid = active.st_uid if ownership.uid is None else ownership.uid
    gid = active.st_gid if ownership.gid is None else ownership.gid
    if os.geteuid() != 0 and (uid != os.geteuid() or gid not in (os.getegid(), *os.getgroups())):
        raise _not_permitted(path, f"owner {uid} and group {gid}", os.strerror(errno.EPERM))
    # A template is often read-only, but an overlay that its owner cannot write to is of no use.
    mode = (stat.S_IMODE(active.st_mode) & 0o777) | stat.S_IRUSR | stat.S_IWUSR
    attributes = {}
    if not stat.S_ISBLK(active.st_mode):  # those of a device do not fit a file
        for name in (_SELINUX, _ACL) if ownership.mode is None else (_SELINUX,):
            with _ignoring(errno.ENODATA, errno.ENOTSUP):
                attributes[name] = os.getxattr(active_fd, name)
    if any(ownership.context):
        attributes[_SELINUX] = _context(attributes.get(_SELINUX), ownership, path)
    return Attributes(uid, gid, mode if ownership.mode is None else ownership.mode(mode), attributes)


def _context(of_active: bytes | None, ownership: AttributeOptions, path: str) -> bytes:
    """Return ACTIVE's SELinux context with the parts that were asked for."""
    if of_active is None:
        raise Qcow2Error(f"{path}: ACTIVE has no SELinux context of which parts could be changed. Leave out se*.")
    own = of_active.rstrip(b"\0").decode().split(":", 3)
    parts = [asked or current for asked, current in zip(ownership.context, [*own, "s0"])]
    return ":".join(parts).encode() + b"\0"


def apply_attributes(fd: int, attributes: Attributes, path: str) -> None:
    """Give the overlay's file its owner, mode, ACL and context."""
    try:
        own = os.fstat(fd)
        if (own.st_uid, own.st_gid) != (attributes.uid, attributes.gid):
            os.fchown(fd, attributes.uid, attributes.gid)
        for name, value in attributes.attributes.items():
            with _ignoring(errno.ENOTSUP):  # another file system than ACTIVE's
                os.setxattr(fd, name, value)
        os.fchmod(fd, attributes.mode)  # last, since an ACL sets the mode too
    except OSError as exc:
        who = f"owner {attributes.uid}, group {attributes.gid}"
        what = f"{who}, mode {attributes.mode:04o} and the security attributes of ACTIVE"
        raise _not_permitted(path, what, exc.strerror) from exc


def _not_permitted(path: str, what: str, why: str | None) -> Qcow2Error:
    """Return the error for an owner or the like that cannot be given."""
    return Qcow2Error(
        f"{path}: cannot be given {what}: {why}. Run with become, or ask for others with owner, group and mode."
    )


@contextlib.contextmanager
def _ignoring(*numbers: int) -> t.Iterator[None]:
    """Ignore the OSErrors of these numbers."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise
