# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Publish: temporary files beside their place, then all of them put into place, or none.

Do everything through open descriptors of the folder and of the file, so that in a folder that others may write to
nobody can slip in another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import typing as t

from .._base.errors import CHECK_STORAGE, Refusal, UnknownOutcomeError
from .._base.files import OpenImage, close, is_ours, open_folder, owning
from .._qemu import locks

_PREFIX = ".kvmfleet-"
_PREFIXES = (_PREFIX, ".qcow2_overlay-")  # the second is of version 0.1
_SUFFIX = ".tmp"
_MOST_TRIES = 100  # more runs than that do not collide in one folder
_RENAME_NOREPLACE = 1
_CANNOT_RENAME = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # without replacing
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class StagedFile:
    """A file of ours beside its place, not yet published; it goes when the block ends without publishing."""

    def __init__(self, path: str, folder: str) -> None:
        """Create the empty file, readable and writable for us alone. Both paths are resolved; `path` is its place."""
        self.folder = folder
        self.folder_fd, real = open_to_list(folder)
        try:
            if real != folder:
                why = "its folder was replaced by a symlink meanwhile"
                raise Refusal("changed_meanwhile", path, why, "Find out by whom, then run this again.")
            self.name, self.file = _new_file(self.folder_fd, folder, path)
        except BaseException:
            os.close(self.folder_fd)
            raise

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.name, dir_fd=self.folder_fd)
        self.file.close()
        close(self.folder_fd)

    @property
    def path(self) -> str:
        """Its place."""
        return self.file.path

    @property
    def place(self) -> str:
        """The name of its place within the folder."""
        return os.path.basename(self.path)

    def publish(self) -> None:
        """Put the file into its place, where nothing may stand."""
        try:
            # Not by name: the name could have been made another file's. AT_SYMLINK_FOLLOW needs a dir_fd here.
            os.link(f"/proc/self/fd/{self.file.fd}", self.place, dst_dir_fd=self.folder_fd, follow_symlinks=True)
        except FileExistsError as exc:
            raise _appeared(self.path) from exc
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            self._rename()

    def _rename(self) -> None:
        """Put the file into its place on a file system without hard links."""
        try:
            if rename_without_replacing(self.folder_fd, self.name, self.place):
                return
        except FileExistsError as exc:
            raise _appeared(self.path) from exc
        why = (
            "its file system has neither hard links nor renaming without replacing, so nothing can be published safely "
            "there"
        )
        raise Refusal("no_rename", self.path, why, "Choose a folder on another file system.")

    def check_place(self) -> None:
        """Refuse if the published file cannot be found at the path that was asked for."""
        if not self.file.is_still_at_its_path():
            why = "its folder was moved or mounted over meanwhile, so the new file was removed again"
            raise Refusal("changed_meanwhile", self.path, why, "Run this again.")

    def retract(self) -> Refusal | None:
        """Take the published file away again, if it is still ours; return why that could not be done."""
        try:
            status = os.stat(self.place, dir_fd=self.folder_fd, follow_symlinks=False)
            if os.path.samestat(status, self.file.status()):
                os.unlink(self.place, dir_fd=self.folder_fd)
        except FileNotFoundError:
            return None
        except OSError as exc:
            return Refusal("not_removed", self.path, f"could not be removed again: {exc.strerror}")
        with contextlib.suppress(OSError):
            os.fsync(self.folder_fd)
        return None


def open_to_list(folder: str) -> tuple[int, str]:
    """Return the open folder, and its path without symlinks."""
    place, real = open_folder(folder)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place), real
    finally:
        os.close(place)


def _new_file(folder_fd: int, folder: str, path: str) -> tuple[str, OpenImage]:
    """Return a new file in the folder that is marked as in work, and its name there; `path` is its place."""
    for _number in range(_MOST_TRIES):
        name = f"{_PREFIX}{os.urandom(8).hex()}{_SUFFIX}"
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        is_ours = False
        try:
            file = OpenImage(path, fd)
            # Another run may have taken it for a leftover before it was marked.
            is_ours = locks.claim(file) and file.status().st_nlink > 0
            if is_ours:
                return name, file
        finally:
            if not is_ours:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder_fd)
                close(fd)
    raise Refusal(
        "changed_meanwhile",
        folder,
        f"{_MOST_TRIES} new files in it were each taken away or locked at once by another program",
        "Find out which one works in this folder, then run this again.",
    )


def check_owner(path: str) -> None:
    """Refuse if what we make at this resolved path would belong to somebody else: no later run would trust it.

    Only a file that was made tells, so no mere look can.
    """
    with StagedFile(path, os.path.dirname(path)) as staged:
        status = staged.file.status()
        os.unlink(staged.name, dir_fd=staged.folder_fd)  # that it could not be removed would be told nowhere else
    if is_ours(status):
        return
    why = (
        f"cannot be made safely: its storage gives it to the user {status.st_uid}, as NFS does that squashes users, so "
        "nothing would tell that it is ours"
    )
    remedy = "Run this as that user (become_user), or have the storage give us what is ours (no_root_squash)."
    raise Refusal("no_permission", path, why, remedy)


def publish_at_once(staged: StagedFile) -> None:
    """Publish one file, finished and on stable storage, that stays whatever becomes of the rest."""
    staged.publish()
    staged.check_place()
    with contextlib.suppress(FileNotFoundError):  # renamed, where there are no hard links
        os.unlink(staged.name, dir_fd=staged.folder_fd)
    os.fsync(staged.folder_fd)


def publish_over(staged: StagedFile) -> None:
    """Publish one file, finished and on stable storage, in the place of an older one of ours, or of none."""
    os.rename(staged.name, staged.place, src_dir_fd=staged.folder_fd, dst_dir_fd=staged.folder_fd)
    os.fsync(staged.folder_fd)
    staged.check_place()


def publish_together(staged: t.Sequence[StagedFile], switch: t.Callable[[], None]) -> None:
    """Publish all of these files, finished and on stable storage, or none.

    `switch` must succeed for them to stay, such as pointing the VM at them. No VM can start on them before.
    """
    for staged_file in staged:
        # No VM may start on the first one while the second can still fail.
        locks.hold_off_writers(staged_file.file)
        locks.hold_off_everybody(staged_file.file)
    publish_unlocked(staged, switch)


def publish_unlocked(staged: t.Sequence[StagedFile], switch: t.Callable[[], None]) -> None:
    """Publish all of these files or none, without locks: it is `switch` that has a VM open them."""
    begun = []
    try:
        for staged_file in staged:
            begun.append(staged_file)
            staged_file.publish()
            staged_file.check_place()
        for staged_file in staged:
            with contextlib.suppress(FileNotFoundError):  # renamed, where there are no hard links
                os.unlink(staged_file.name, dir_fd=staged_file.folder_fd)
        for folder_fd in {one.folder: one.folder_fd for one in staged}.values():
            os.fsync(folder_fd)
        switch()
    except UnknownOutcomeError:
        raise
    except BaseException as exc:
        _retract_all(begun, exc)
        raise


def _retract_all(begun: t.Sequence[StagedFile], exc: BaseException) -> None:
    """Take all published files away again; Refusal if one stays, so that nobody takes it for gone.

    UnknownOutcomeError if a QEMU has one open: another run may have found it in its place, and given it to its VM.
    """
    for staged_file in begun:
        _hold_off_everybody(staged_file, exc)
    stuck = [problem for problem in [one.retract() for one in reversed(begun)] if problem]
    if not stuck:
        return
    cause = exc.strerror if isinstance(exc, OSError) else str(exc).rstrip(".")
    others = "".join(f" {problem}" for problem in stuck[1:])
    raise stuck[0].with_note(
        f"It is complete but unused, because what belongs to it failed: {cause}.{others} {CHECK_STORAGE}"
    ) from exc


def _hold_off_everybody(staged: StagedFile, exc: BaseException) -> None:
    """Keep every QEMU from a file that is to be taken away."""
    try:
        locks.hold_off_writers(staged.file)
        locks.hold_off_everybody(staged.file)
    except Refusal:
        why = "has been given to its VM meanwhile, most likely by another run, so it was left in place"
        raise UnknownOutcomeError(staged.path, why, "Look at 'virsh domblklist', then run this again.") from exc


def leftovers(folder: str) -> list[str]:
    """Return the paths of the files in the folder that killed runs have left."""
    return _of_runs(folder, _is_abandoned)


def sweep(folder: str) -> list[str]:
    """Remove the files in the folder that killed runs have left, and return their paths."""
    return _of_runs(folder, _remove)


def _of_runs(folder: str, counts: t.Callable[[str, int], bool]) -> list[str]:
    """Return the paths of the temporary files of runs that count."""
    try:
        folder_fd, folder = open_to_list(folder)
    except (OSError, Refusal):  # what is to be done in it will tell
        return []
    try:
        names = sorted(filter(is_temporary, os.listdir(folder_fd)))
        return [os.path.join(folder, name) for name in names if counts(name, folder_fd)]
    except OSError:
        return []
    finally:
        close(folder_fd)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that a run has not published yet, or a killed run has left."""
    return name.startswith(_PREFIXES) and name.endswith(_SUFFIX)


def _is_abandoned(name: str, folder_fd: int) -> bool:
    """Whether no run holds this temporary file."""
    try:
        with _open_file(name, folder_fd) as file:
            return not locks.is_locked(file, locks.OUR_TURN)
    except (OSError, Refusal):
        return False


def _remove(name: str, folder_fd: int) -> bool:
    """Claim a file that no run holds, then unlink it, so that no run can pick it up in between; False if that fails."""
    try:
        with _open_file(name, folder_fd) as file:
            if locks.claim(file):
                os.unlink(name, dir_fd=folder_fd)
                return True
    except (OSError, Refusal):
        pass
    return False


def _open_file(name: str, folder_fd: int) -> OpenImage:
    """Open a file of this name in the folder for writing; OSError if it is no file, of which nothing is opened."""
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return owning(name, os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC))
    finally:
        os.close(place)


def rename_without_replacing(folder_fd: int, name: str, place: str) -> bool:
    """Rename within a folder; False if the file system cannot do so without replacing, FileExistsError if one stands.

    Nothing happens in between: the file has the one name or the other.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not in every C library
    if rename is None:
        return False
    if rename(folder_fd, os.fsencode(name), folder_fd, os.fsencode(place), _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_RENAME:
        return False
    raise OSError(number, os.strerror(number))


def _appeared(path: str) -> Refusal:
    """Return the refusal of a place at which somebody else made something in the meantime."""
    return Refusal("appeared", path, "has appeared meanwhile; it was left alone", "Run this again.")
