# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read, and hold, QEMU's image locks.

Every QEMU process, so every VM and every qemu-img, locks single bytes of the images that it opens: byte 100+P for each
permission P that it uses, byte 200+P for each permission that it does not share. Both are shared locks. Then it looks
whether somebody holds a byte that contradicts (QEMU, block/file-posix.c, "image locking"; unchanged since 2.10, or VMs
of two versions could not share a storage). Taking part in this without a QEMU process costs no process for a question,
cannot be lost by a QEMU that dies, and opens the image for reading only.

The locks belong to the open file description: they go when the descriptor is closed or its process dies.
"""

from __future__ import annotations

import errno
import fcntl
import random
import struct
import time
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage
from .._base.signals import interruptible

# Linux, fcntl(2), "Open file description locks"; not every build of Python has names for them.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid

_FIRST, _COUNT = 100, 200  # all bytes of QEMU's range
WRITE = 101  # held by whoever has the image open for writing
WRITE_UNSHARED = 201  # held by whoever has it open and cannot stand another writer, also below a VM's top image
OUR_TURN = 300  # outside QEMU's range: "a run of this collection works on this file"
LIVE_TURN = 301  # the same while its VM runs; of its own, since the other tells that QEMU's locks may be ours


def _set_lock(fd: int, byte: int, kind: int) -> None:
    """Lock (F_RDLCK, F_WRLCK) or unlock (F_UNLCK) one byte."""
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def is_locked(file: OpenImage, byte: int, count: int = 1) -> bool:
    """Whether somebody else holds a lock on this byte of the file, or on one of so many from it on."""
    try:
        answer = fcntl.fcntl(file.fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, count, 0))
    except OSError as exc:
        raise _no_locks(file, exc) from exc
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def is_locked_by_qemu(file: OpenImage, byte: int) -> bool:
    """Whether QEMU, not another run of this collection, holds `byte`.

    Our runs take OUR_TURN first and give it up last. So if OUR_TURN is held before or after the look at `byte`, what is
    seen there may be theirs.
    """
    if is_locked(file, OUR_TURN):
        return False
    return is_locked(file, byte) and not is_locked(file, OUR_TURN)


def is_open(file: OpenImage) -> bool:
    """Whether some QEMU has the image open: whatever for, also below others and during jobs, it locks a byte of it."""
    return is_locked(file, _FIRST, _COUNT)


def hold_off_writers(file: OpenImage) -> None:
    """Keep everybody from opening the image for writing; running VMs may have it as a backing file."""
    _hold(file, WRITE_UNSHARED)
    if is_locked(file, WRITE):
        raise in_use(file.path)


def hold_off_everybody(file: OpenImage) -> None:
    """After hold_off_writers(): keep VMs also from having the image as a backing file."""
    _hold(file, WRITE)
    if is_locked(file, WRITE_UNSHARED):
        raise below_running_vm(file.path)


def take_turn(
    file: OpenImage, seconds: float, how_far: t.Callable[[], object] = frozenset, byte: int = OUR_TURN
) -> None:
    """Wait until no other run of this collection works on the image, which may merge it for hours.

    `byte` tells of what kind the work is. Wait up to `seconds` after what `how_far` returns has changed last.
    """
    if _has_taken_turn(file, byte):
        return
    deadline, seen = time.monotonic() + seconds, how_far()
    while True:
        if time.monotonic() > deadline:
            now = how_far()
            if now == seen:
                why = f"another run of this collection has been working on it for more than {seconds:.0f} s"
                raise Refusal("other_run", file.path, why, "Wait for it to end, then run this again.")
            deadline, seen = time.monotonic() + seconds, now
        # Pause for a random time, or two runs that collide would go on colliding in step.
        with interruptible():
            time.sleep(random.uniform(0.005, 0.05))
        if _has_taken_turn(file, byte):
            return


def _has_taken_turn(file: OpenImage, byte: int) -> bool:
    if not _try_lock(file, byte, fcntl.F_RDLCK):  # a run has claimed it, since it has made it
        return False
    if not is_locked(file, byte):
        return True
    _set_lock(file.fd, byte, fcntl.F_UNLCK)
    return False


def claim(file: OpenImage) -> bool:
    """Mark a file of ours, open for writing, as in work; False if somebody else has. The mark goes with the process."""
    return _try_lock(file, OUR_TURN, fcntl.F_WRLCK)


def _hold(file: OpenImage, byte: int) -> None:
    """Take a shared lock on a byte, as QEMU does."""
    if not _try_lock(file, byte, fcntl.F_RDLCK):
        raise in_use(file.path)


def _try_lock(file: OpenImage, byte: int, kind: int) -> bool:
    """Return whether a lock on a byte could be taken."""
    try:
        _set_lock(file.fd, byte, kind)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise _no_locks(file, exc) from exc
    return True


def _no_locks(file: OpenImage, exc: OSError) -> Refusal:
    """Return the refusal of storage on which QEMU's locks cannot work."""
    return Refusal(
        "no_locks",
        file.path,
        f"its file system does not support the locks that QEMU uses ({exc.strerror}), so a running VM could not be "
        "seen",
        "Mount it with locks (NFS: without nolock).",
    )


def in_use(path: str) -> Refusal:
    """Return the refusal of an image that a process has open for writing."""
    return Refusal(
        "in_use",
        path,
        "is open for writing in another process, most likely a running VM. Only images of VMs that are shut off can be "
        "worked on",
        "Shut the VM down and run this again.",
    )


def below_running_vm(path: str) -> Refusal:
    """Return the refusal of an image that is not the topmost one of its VM any more."""
    return Refusal(
        "below_running_vm",
        path,
        "is below a running VM and has recording bitmaps, so it is most likely not the VM's topmost image; or it is "
        "read by a tool such as 'qemu-nbd -r' or 'qemu-img convert', as of a backup",
        "Name the topmost one (virsh domblklist), and shut the VM down; or wait for the end of that tool, or end it.",
    )
