# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Publish: temporary files beside their place, then all of them put into place, or none.

Everything is done through open descriptors of the folder and of the file, so that in a folder that others may write
to nobody can slip us another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import typing as t

from .._base.errors import CHECK_STORAGE, Qcow2Error, UnknownOutcomeError
from .._base.files import close_image, open_folder
from .._qemu import locks
from .observe import Target

_PREFIX = ".qcow2_overlay-"
_SUFFIX = ".tmp"
_MOST_TRIES = 100  # more runs than that do not collide in one folder
_RENAME_NOREPLACE = 1
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class StagedFile:
    """A file of ours beside its place, not yet published; gone again when the block ends without publishing."""

    def __init__(self, target: Target) -> None:
        """Create the empty file, readable and writable for us alone."""
        self.target = target
        self.folder_fd, folder = _open_to_list(target.folder)
        try:
            if folder != target.folder:
                raise Qcow2Error(
                    f"{target.path}: its folder was replaced by a symlink while the overlay was being made. Find out "
                    "by whom, then run this again."
                )
            self.name, self.fd = _new_file(self.folder_fd, target.folder)
        except BaseException:
            os.close(self.folder_fd)
            raise

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.name, dir_fd=self.folder_fd)
        close_image(self.fd)
        close_image(self.folder_fd)

    @property
    def place(self) -> str:
        """The name of the overlay within its folder."""
        return os.path.basename(self.target.path)

    def publish(self) -> None:
        """Put the file into its place, where nothing may stand."""
        try:
            # Not by name: the name could have been made another file's. AT_SYMLINK_FOLLOW needs a dir_fd here.
            os.link(f"/proc/self/fd/{self.fd}", self.place, dst_dir_fd=self.folder_fd, follow_symlinks=True)
        except FileExistsError as exc:
            raise _appeared(self.target.path) from exc
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            _rename_without_replacing(self.folder_fd, self.name, self.place, self.target.path)

    def check_place(self) -> None:
        """Raise when the published file cannot be found under the path that was asked for."""
        try:
            found = os.path.samestat(os.stat(self.target.path), os.fstat(self.fd))
        except OSError:
            found = False
        if not found:
            raise Qcow2Error(
                f"{self.target.path}: its folder was moved or mounted over while the overlay was being made, which was "
                "removed again. Run this again."
            )

    def retract(self) -> str | None:
        """Take the published file away again, if it is still ours; return why that could not be done."""
        try:
            status = os.stat(self.place, dir_fd=self.folder_fd, follow_symlinks=False)
            if os.path.samestat(status, os.fstat(self.fd)):
                os.unlink(self.place, dir_fd=self.folder_fd)
        except FileNotFoundError:
            return None
        except OSError as exc:
            return f"{self.target.path}: could not be removed again: {exc.strerror}."
        with contextlib.suppress(OSError):
            os.fsync(self.folder_fd)
        return None


def _open_to_list(folder: str) -> tuple[int, str]:
    """Return the open folder, and its path without symlinks."""
    place, real = open_folder(folder)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place), real
    finally:
        os.close(place)


def _new_file(folder_fd: int, folder: str) -> tuple[str, int]:
    """Return name and descriptor of a new file in the folder that is marked as in work."""
    for _try in range(_MOST_TRIES):
        name = f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        is_ours = False
        try:
            # Not ours any more if another run took it for a leftover before it was marked.
            is_ours = locks.claim(fd, os.path.join(folder, name)) and os.fstat(fd).st_nlink > 0
            if is_ours:
                return name, fd
        finally:
            if not is_ours:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder_fd)
                close_image(fd)
    raise Qcow2Error(
        f"{folder}: {_MOST_TRIES} new files in it were each taken away or locked at once by another program. Find out "
        "which one works in this folder, then run this again."
    )


def publish_together(staged: t.Sequence[StagedFile], finish: t.Callable[[], None] | None = None) -> None:
    """Publish all of these files, finished and on stable storage, or none.

    finish is what must succeed for them to stay, such as pointing the VM at them; no VM can start on them before.
    """
    for file in staged:
        # No VM may start on the first overlay while the second can still fail.
        locks.hold_off_writers(file.fd, file.target.path)
        locks.hold_off_everybody(file.fd, file.target.path)
    begun = []
    try:
        for file in staged:
            begun.append(file)
            file.publish()
            file.check_place()
        for file in staged:
            with contextlib.suppress(FileNotFoundError):  # renamed, where there are no hard links
                os.unlink(file.name, dir_fd=file.folder_fd)
        for file in {file.target.folder: file for file in staged}.values():
            os.fsync(file.folder_fd)
        if finish is not None:
            finish()
    except UnknownOutcomeError:
        raise
    except BaseException as exc:
        _retract_all(begun, exc)
        raise


def _retract_all(begun: t.Sequence[StagedFile], exc: BaseException) -> None:
    """Take all published files away again; Qcow2Error when one stays, so that nobody takes it for gone."""
    stuck = [problem for problem in [file.retract() for file in reversed(begun)] if problem]
    if stuck:
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise Qcow2Error(
            f"{' '.join(stuck)} The overlays that belong together are made all or none, and one failed: {why}. What is "
            f"there is complete, but its VM is not on it. {CHECK_STORAGE} That finds it present, and makes the others."
        ) from exc


def find_leftovers(folder: str, remove: bool) -> list[str]:
    """Return the paths of the files in the folder that killed runs have left, removed if so wanted."""
    try:
        folder_fd, folder = _open_to_list(folder)
    except (OSError, Qcow2Error):  # the overlays in it will tell
        return []
    try:
        names = [name for name in os.listdir(folder_fd) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
        return sorted(os.path.join(folder, name) for name in names if _is_abandoned(name, folder_fd, remove))
    except OSError:
        return []
    finally:
        close_image(folder_fd)


def _is_abandoned(name: str, folder_fd: int, remove: bool) -> bool:
    """Whether no run is at work on this temporary file any more; it is removed, if so wanted, while nobody can be."""
    try:
        fd = _open_file(name, folder_fd)
    except OSError:
        return False
    try:
        abandoned = not locks.is_locked(fd, locks.OUR_TURN, name)
        if abandoned and remove:
            abandoned = locks.claim(fd, name)
            if abandoned:
                os.unlink(name, dir_fd=folder_fd)
    except (OSError, Qcow2Error):
        return False
    finally:
        os.close(fd)
    return abandoned


def _open_file(name: str, folder_fd: int) -> int:
    """Open a file of this name in the folder for writing; OSError when it is none, of which nothing is opened."""
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(place)


def _rename_without_replacing(folder_fd: int, name: str, place: str, path: str) -> None:
    """Rename within a folder and fail where something stands, for file systems without hard links."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(folder_fd, os.fsencode(name), folder_fd, os.fsencode(place), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        raise _appeared(path)
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise Qcow2Error(
            f"{path}: its file system has neither hard links nor renaming without replacing, so the overlay cannot be "
            "published safely there. Choose a folder on another file system."
        )
    raise OSError(number, os.strerror(number))


def _appeared(path: str) -> Qcow2Error:
    """Return the error for a target that somebody else made in the meantime."""
    return Qcow2Error(f"{path}: has appeared while the overlay was being made; it was left alone. Run this again.")
