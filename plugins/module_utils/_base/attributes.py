# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: owner, mode, ACL and SELinux context of a new file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import typing as t

from .errors import Refusal
from .files import OpenImage

_SELINUX = "security.selinux"
_ACL = "system.posix_acl_access"
# Linux, include/uapi/linux/posix_acl_xattr.h.
_ACL_HEADER = 4  # bytes before the entries
_ACL_ENTRY = struct.Struct("<HHI")  # tag, permissions, user or group
_GROUP = 0x04  # the tag of the file's own group
_MASK = 0x10  # the tag of what all but the owner and others get at most


class AttributeOptions(t.NamedTuple):
    """Who may use new files; None means: as the image that they are derived from."""

    uid: int | None = None
    gid: int | None = None
    mode: t.Callable[[int], int] | None = None  # from that image's permission bits to the wanted ones
    context: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)  # user, role, type, level


class Attributes(t.NamedTuple):
    """What a new file is given."""

    uid: int
    gid: int
    mode: int
    extended: t.Mapping[str, bytes]  # extended attributes: ACL and SELinux context


def attributes_for(image: OpenImage, options: AttributeOptions, path: str) -> Attributes:
    """Return what was asked for, or else what the open image has, for a new file at `path`."""
    own = image.status()
    uid = own.st_uid if options.uid is None else options.uid
    gid = own.st_gid if options.gid is None else options.gid
    if os.geteuid() != 0 and (uid != os.geteuid() or gid not in (os.getegid(), *os.getgroups())):
        raise _not_permitted(path, f"owner {uid} and group {gid}", os.strerror(errno.EPERM))
    # A template is often read-only, but an image that its owner cannot write to is of no use.
    mode = (stat.S_IMODE(own.st_mode) & 0o777) | stat.S_IRUSR | stat.S_IWUSR
    extended = {}
    if not image.is_device:  # those of a device do not fit a file
        for name in (_SELINUX, _ACL):
            with _ignoring(errno.ENODATA, errno.ENOTSUP):
                extended[name] = os.getxattr(image.fd, name)
    if options.mode is not None and _ACL in extended:
        mode = _without_acl(mode, extended.pop(_ACL))
    if any(options.context):
        extended[_SELINUX] = _context(extended.get(_SELINUX), options, image.path)
    return Attributes(uid, gid, mode if options.mode is None else options.mode(mode), extended)


def _without_acl(mode: int, acl: bytes) -> int:
    """Return the mode that gives the group what the ACL does: beside one, the group's bits are what anybody may get."""
    granted: dict[int, int] = {tag: permissions for tag, permissions, _who in _ACL_ENTRY.iter_unpack(acl[_ACL_HEADER:])}
    group = granted.get(_GROUP, 0) & granted.get(_MASK, 0o7)
    return (mode & ~stat.S_IRWXG) | group << 3


def _context(own: bytes | None, options: AttributeOptions, path: str) -> bytes:
    """Return the SELinux context of the image at `path` with the parts that were asked for."""
    if own is None:
        raise Refusal("bad_option", path, "has no SELinux context of which parts could be changed", "Leave out se*.")
    parts = own.rstrip(b"\0").decode().split(":", 3)
    chosen = [asked or current for asked, current in zip(options.context, [*parts, "s0"])]
    return ":".join(chosen).encode() + b"\0"


def apply_attributes(file: OpenImage, attributes: Attributes) -> None:
    """Give a file of ours its owner, mode, ACL and context; Refusal if the system forbids it."""
    try:
        own = file.status()
        if (own.st_uid, own.st_gid) != (attributes.uid, attributes.gid):
            os.fchown(file.fd, attributes.uid, attributes.gid)
        mode = attributes.mode
        for name, value in attributes.extended.items():
            try:
                os.setxattr(file.fd, name, value)
            except OSError as exc:
                if exc.errno != errno.ENOTSUP:
                    raise
                # Another file system than that of the image.
                mode = _without_acl(mode, value) if name == _ACL else mode
        if _ACL not in attributes.extended:  # the folder may have given it one, by its default ACL
            with _ignoring(errno.ENODATA, errno.ENOTSUP):
                os.removexattr(file.fd, _ACL)
        os.fchmod(file.fd, mode)  # last, since an ACL sets the mode too
    except OSError as exc:
        who = f"owner {attributes.uid}, group {attributes.gid}, mode {attributes.mode:04o}"
        raise _not_permitted(file.path, f"{who} and the security attributes of ACTIVE", exc.strerror) from exc


def _not_permitted(path: str, what: str, why: str | None) -> Refusal:
    """Return the refusal of an owner or the like that cannot be given."""
    remedy = "Run with become, or ask for others with owner, group and mode."
    return Refusal("no_permission", path, f"cannot be given {what}: {why}", remedy)


@contextlib.contextmanager
def _ignoring(*numbers: int) -> t.Iterator[None]:
    """Ignore the OSErrors of these numbers."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise
