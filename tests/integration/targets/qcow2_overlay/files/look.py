# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""look.py FOLDER [OVERLAY...]: tell as JSON what there is, without any code of the collection.

That is all files of the folder, and what qemu-img says of the overlays.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import typing as t


def checksum(path: str) -> str:
    """Return the checksum of a file's or block device's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def attribute(path: str, name: str) -> str | None:
    """Return an extended attribute as text; that of an ACL is binary, so in hexadecimal digits."""
    try:
        value = os.getxattr(path, name)
    except OSError:
        return None
    return value.hex() if name.startswith("system.") else value.rstrip(b"\0").decode()


def ownership(path: str) -> dict[str, t.Any]:
    """Return who may do what with a file."""
    status = os.stat(path)
    return {
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mode": f"{stat.S_IMODE(status.st_mode):04o}",
        "acl": attribute(path, "system.posix_acl_access"),
        "selinux": attribute(path, "security.selinux"),
    }


def describe(path: str) -> dict[str, t.Any]:
    """Return all that must not change about a file, a folder, a symlink or a device."""
    status = os.lstat(path)
    about: dict[str, t.Any] = {"kind": stat.S_IFMT(status.st_mode), "mode": status.st_mode, "owner": status.st_uid}
    if stat.S_ISLNK(status.st_mode):
        about["target"] = os.readlink(path)
        if os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode):
            about["sha256"] = checksum(path)
    elif stat.S_ISREG(status.st_mode):
        about.update(ownership(path), sha256=checksum(path), inode=status.st_ino, changed=status.st_mtime_ns)
    return about


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of QEMU and return how it ended and what it printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def inspect(path: str) -> dict[str, t.Any]:
    """Return what qemu-img says of an overlay."""
    info = json.loads(tool("qemu-img", "info", "--force-share", "-f", "qcow2", "--output=json", path).stdout)
    specific = info["format-specific"]["data"]
    bitmaps = specific.get("bitmaps", [])
    return {
        **ownership(path),
        "backing_file": info.get("backing-filename"),
        "resolved_backing_file": os.path.realpath(info.get("full-backing-filename", "")),
        "backing_format": info.get("backing-filename-format"),
        "virtual_size": info["virtual-size"],
        "cluster_size": info["cluster-size"],
        **{key: specific[key] for key in ("compat", "extended-l2", "lazy-refcounts", "refcount-bits", "corrupt")},
        "compression_type": specific["compression-type"],
        "bitmaps": {bitmap["name"]: bitmap["granularity"] for bitmap in bitmaps},
        "flags": sorted({" ".join(bitmap["flags"]) for bitmap in bitmaps}),
        "check": tool("qemu-img", "check", "--force-share", "-f", "qcow2", path).returncode,
    }


def main() -> None:
    """Print what there is."""
    found = [
        os.path.join(folder, name) for folder, folders, files in os.walk(sys.argv[1]) for name in [*folders, *files]
    ]
    json.dump(
        {
            "files": {path: describe(path) for path in sorted(found)},
            "overlays": [inspect(path) for path in sys.argv[2:]],
        },
        sys.stdout,
    )


main()
