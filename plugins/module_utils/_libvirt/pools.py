# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the storage pools of this host, and where the images of their volumes are. Act: have libvirt see new files.

No domain can open a volume of a pool that is not active, until somebody starts the pool. Its path is known beforehand
in most pools. So such a domain counts as a possible user of the image there (Place.suspect).
"""

from __future__ import annotations

import os
import typing as t

from .bindings import LibvirtError, known, words_of
from .definition import Place, Volume, pool_from

# Types of pools (libvirt 12.8, storagepool.rng) of which libvirt lets a disk be a volume on this host. That leaves out
# rbd, gluster, sheepdog and mpath, and what comes later.
_NAMED = ("dir", "fs", "netfs", "vstorage", "logical", "zfs")  # its path is the folder of the pool and its name
_LOCAL = (*_NAMED, "disk", "scsi", "iscsi", "iscsi-direct")
_ISCSI = ("iscsi", "iscsi-direct")
_KINDS = {0: "file", 1: "block"}  # virStorageVolType


class _Pool(t.NamedTuple):
    """A storage pool."""

    handle: t.Any
    type: str
    folder: str | None  # of its volumes
    is_active: bool
    problem: str | None = None  # why libvirt cannot tell about it


class Pools:
    """The storage pools of a host, read when the first one is asked for."""

    def __init__(self, connection: t.Any) -> None:
        self._connection = connection
        self._read: dict[str, _Pool] | None = None
        self._problem: str | None = None  # why libvirt cannot list them
        self._places: dict[Volume, Place] = {}

    def place_of(self, volume: Volume) -> Place:
        """Return where the image of a volume is; why it can take no part if libvirt cannot tell."""
        if volume not in self._places:
            self._places[volume] = self._look_up(volume)
        return self._places[volume]

    def _look_up(self, volume: Volume) -> Place:
        pool = self._pools().get(volume.pool)
        if self._problem is not None:
            return _unknown(f"libvirt cannot tell about the volume {volume.name}: {self._problem}", volume.name)
        if pool is None:
            return _unknown(f"libvirt knows no storage pool {volume.pool}", volume.name)
        if pool.problem is not None:
            return _unknown(f"libvirt cannot tell about the storage pool {volume.pool}: {pool.problem}", volume.name)
        return _place_in(pool, volume)

    def refresh(self, folders: t.Collection[str]) -> list[str]:
        """Have libvirt see the new files in these folders; return as warnings where it cannot."""
        wanted = {os.path.realpath(folder) for folder in folders}
        warnings = []
        pools = self._pools() if wanted else {}
        if self._problem is not None and self._places:  # else nobody uses pools: there may be no storage driver at all
            return [f"libvirt cannot list its storage pools, so none was refreshed: {self._problem}."]
        for name, pool in pools.items():
            if _is_refreshed(pool) and os.path.realpath(pool.folder or "") in wanted:
                try:
                    pool.handle.refresh(0)
                except LibvirtError as exc:  # libvirt has stopped the pool then, if it is not busy with a job
                    warnings.append(
                        f"{name}: this storage pool could not be refreshed, so 'virsh vol-list' lacks new overlays: "
                        f"{words_of(exc)}. See 'virsh pool-list --all'; start it, or refresh it later."
                    )
        return warnings

    def _pools(self) -> dict[str, _Pool]:
        """Return all pools by name; none if libvirt cannot list them."""
        if self._read is None:
            try:
                handles = known(self._connection.listAllStoragePools)
            except LibvirtError as exc:
                self._problem, handles = words_of(exc), []
            self._read = {handle.name(): _pool_from(handle) for handle in handles}
        return self._read


def _pool_from(handle: t.Any) -> _Pool:
    """Return what libvirt says of a pool, which may be gone since it was listed."""
    try:
        kind, folder = pool_from(handle.XMLDesc(0))
        return _Pool(handle, kind, folder, bool(handle.isActive()))
    except LibvirtError as exc:
        return _Pool(handle, "", None, is_active=False, problem=words_of(exc))


def _is_refreshed(pool: _Pool) -> bool:
    # When a refresh fails, libvirt stops the pool (libvirt 12.8, storagePoolRefreshFailCleanup). That does nothing to a
    # folder, but unmounts a file system (fs, netfs, vstorage) and deactivates a volume group (logical).
    return pool.is_active and pool.type == "dir" and pool.folder is not None


def _place_in(pool: _Pool, volume: Volume) -> Place:
    """Return where a volume is, in a pool that is there."""
    is_foreseeable = pool.type in _NAMED and pool.folder is not None
    foreseen = os.path.join(pool.folder or "", volume.name) if is_foreseeable else volume.name
    if pool.type not in _LOCAL:
        return Place(None, "volume", f"volume of a {pool.type} pool")
    if not pool.is_active:
        why = f"the storage pool {volume.pool} is not active; start it with 'virsh pool-start'"
        return _unknown(why, foreseen)
    try:
        handle = pool.handle.storageVolLookupByName(volume.name)
        path, kind = handle.path(), _KINDS.get(handle.info()[0])
    except LibvirtError as exc:
        why = f"the storage pool {volume.pool} cannot tell about its volume {volume.name}: {words_of(exc)}"
        return _unknown(f"{why}; see 'virsh pool-refresh'", foreseen)
    if pool.type in _ISCSI and volume.is_direct:
        return Place(None, "volume", "iSCSI volume with mode='direct'", suspect=path)
    if kind is None:
        return Place(None, "volume", "volume that is neither a file nor a block device")
    return Place(path, kind)


def _unknown(why: str, suspect: str) -> Place:
    """Return that it cannot be told where a volume is, which may be what has this path, or this name."""
    return Place(None, "volume", why, suspect)
