# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read and hold QEMU's image locks.

Every QEMU process, so every VM and every qemu-img, locks single bytes of the images that it opens: byte 100+P for
each permission P that it uses, byte 200+P for each permission that it does not share with others, always as a
shared lock, and then looks whether somebody holds a byte that contradicts (QEMU, block/file-posix.c, "image
locking"; unchanged since 2.10, or VMs of two versions could not share a storage). Taking part in this from here,
rather than through a QEMU process, needs no process at all for a question, cannot be lost by a QEMU that dies, and
opens the image for reading only.

The locks belong to the open file description: they are gone when the descriptor is closed or its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import random
import struct
import time

from .._base.errors import Qcow2Error
from .._base.signals import interruptible

# Linux, fcntl(2), "Open file description locks"; not every build of Python has names for them.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid

WRITE = 101  # held by whoever has the image open for writing
WRITE_UNSHARED = 201  # held by whoever has it open and cannot stand another writer, also below a VM's top image
OUR_TURN = 300  # outside QEMU's range: "a run of this collection is at work on this file"


def _set_lock(fd: int, byte: int, kind: int) -> None:
    """Lock (F_RDLCK, F_WRLCK) or unlock (F_UNLCK) one byte of the file."""
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def is_locked(fd: int, byte: int, path: str) -> bool:
    """Whether somebody else holds a lock on this byte of the file."""
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    except OSError as exc:
        raise _no_locks(path, exc) from exc
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_locked_by_qemu(fd: int, byte: int, path: str) -> bool:
    """Whether a VM or a tool holds a lock on this byte; what another run of this collection holds is not counted.

    Such a run holds OUR_TURN before, during and after it holds the other bytes.
    """
    if is_locked(fd, OUR_TURN, path):
        return False
    return is_locked(fd, byte, path) and not is_locked(fd, OUR_TURN, path)


def hold_off_writers(fd: int, path: str) -> None:
    """Keep everybody from opening the image for writing; allow that running VMs have it as a backing file."""
    _hold(fd, path, WRITE_UNSHARED)
    if is_locked(fd, WRITE, path):
        raise in_use(path)


def hold_off_everybody(fd: int, path: str) -> None:
    """After hold_off_writers: keep VMs also from having the image as a backing file."""
    _hold(fd, path, WRITE)
    if is_locked(fd, WRITE_UNSHARED, path):
        raise below_running_vm(path)


def take_turn(fd: int, path: str, seconds: float) -> None:
    """Wait, for so many seconds at most, until no other run of this collection works on the image."""
    deadline = time.monotonic() + seconds
    while True:
        _hold(fd, path, OUR_TURN)
        if not is_locked(fd, OUR_TURN, path):
            return
        _set_lock(fd, OUR_TURN, fcntl.F_UNLCK)
        if time.monotonic() > deadline:
            raise Qcow2Error(
                f"{path}: another run of this module has been at work on it for more than {seconds:.0f} s. "
                "Wait for it to end, then run this again."
            )
        # A random pause, or two runs that collide would go on colliding in step.
        with interruptible():
            time.sleep(random.uniform(0.005, 0.05))


def claim(fd: int, path: str) -> bool:
    """Mark a file of ours, open for writing, as in work, unless somebody else has; the mark goes with the process."""
    try:
        _set_lock(fd, OUR_TURN, fcntl.F_WRLCK)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise _no_locks(path, exc) from exc
    return True


def _hold(fd: int, path: str, byte: int) -> None:
    """Take a shared lock on a byte, as QEMU does."""
    try:
        _set_lock(fd, byte, fcntl.F_RDLCK)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            raise in_use(path) from exc
        raise _no_locks(path, exc) from exc


def _no_locks(path: str, exc: OSError) -> Qcow2Error:
    """Return the error for storage on which QEMU's locks cannot work."""
    return Qcow2Error(
        f"{path}: its file system does not support the locks that QEMU uses ({exc.strerror}), so a running VM "
        "could not be seen. Mount it with locks (NFS: without nolock)."
    )


def in_use(path: str) -> Qcow2Error:
    """Return the error for an ACTIVE that a process has open for writing."""
    return Qcow2Error(
        f"{path}: is open for writing in another process, most likely a running VM. "
        "Only images of VMs that are shut off can be worked on; shut it down and run this again."
    )


def below_running_vm(path: str) -> Qcow2Error:
    """Return the error for an ACTIVE that is not the top of its VM's chain any more."""
    return Qcow2Error(
        f"{path}: is the backing file of a running VM, or is being read by a tool such as qemu-img convert, and has "
        "bitmaps that are recording. It is most likely not the topmost image of that VM any more: name the image "
        "that is (virsh domblklist), and shut the VM down."
    )
