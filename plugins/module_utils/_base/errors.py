# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The failures that are expected, each with a code.

::

    Refusal                   whatever is wrong: subject, rule, way out
    ├── QemuError             of QEMU, which knows no file name
    └── UnknownOutcomeError   nobody knows whether it happened, so nothing may be undone
"""

from __future__ import annotations

import errno
import os
import typing as t

# One word for each kind of refusal. docs/refusals.md has the same words, with what to do.
Code = t.Literal[
    "ambiguous",
    "appeared",
    "backs_itself",
    "bad_name",
    "bad_option",
    "base_changed",
    "below_running_vm",
    "bitmap_name",
    "bitmaps_too_large",
    "block_device",
    "block_job",
    "chain_loop",
    "chain_too_long",
    "changed_meanwhile",
    "closes_gap",
    "cluster_too_small",
    "corrupt",
    "damaged",
    "differs",
    "disk_unfit",
    "encrypted",
    "flattened",
    "format_not_recorded",
    "gone",
    "group_failed",
    "has_overlay",
    "header_fixed",
    "held_back",
    "in_use",
    "interrupted",
    "libvirt_failed",
    "libvirt_snapshots",
    "libvirt_unreachable",
    "lost_bitmaps",
    "managed_save",
    "may_be_emptied",
    "name_too_long",
    "no_checkpoint",
    "no_data_file",
    "no_disk",
    "no_domain",
    "no_folder",
    "no_library",
    "no_locks",
    "no_permission",
    "no_proc",
    "no_qemu",
    "no_rename",
    "no_space",
    "no_such_file",
    "not_a_disk",
    "not_healable",
    "not_qcow2",
    "not_quiesced",
    "not_removed",
    "not_stored",
    "not_switched",
    "not_valid",
    "not_verified",
    "occupied",
    "old_libvirt",
    "old_qemu",
    "other_chain",
    "other_disks",
    "other_run",
    "protocol_name",
    "qemu_differs",
    "qemu_failed",
    "qemu_lost",
    "qemu_option",
    "read_only",
    "relative_data_file",
    "relative_device",
    "repeated",
    "running",
    "same_name",
    "shared_disk",
    "storage",
    "too_many_bitmaps",
    "too_many_files",
    "transient",
    "unfinished",
    "unknown_outcome",
    "unsupported",
    "untrusted_link",
]

CHECK_STORAGE = "Check the space, the quota and the state of the storage there (dmesg), then run this again."
_CHECK_PERMISSIONS = "Check its permissions, run with become."
_CHECK_FOLDER = "Check that its folder is still there and mounted, then run this again."
_BY_ERRNO: dict[int, tuple[Code, str]] = {
    errno.ENOSPC: ("no_space", CHECK_STORAGE),
    errno.EDQUOT: ("no_space", CHECK_STORAGE),
    errno.EROFS: (
        "read_only",
        "Make its file system writable (dmesg tells if an error made it read-only), then run this again.",
    ),
    errno.EACCES: ("no_permission", _CHECK_PERMISSIONS),
    errno.EPERM: ("no_permission", _CHECK_PERMISSIONS),
    errno.EMFILE: ("too_many_files", "Raise the limit of open files (ulimit -n), then run this again."),
    errno.ENFILE: ("too_many_files", "Raise the limit of open files (sysctl fs.file-max), then run this again."),
    errno.ENAMETOOLONG: ("name_too_long", "Give it a shorter name."),
    errno.ENOENT: ("gone", _CHECK_FOLDER),
    errno.ESTALE: ("gone", _CHECK_FOLDER),
}


R = t.TypeVar("R", bound="Refusal")


class Refusal(Exception):  # noqa: N818  it refuses; the program has no error
    """An expected failure. Its text names the subject, the rule and the way out, and is shown to the user as it is.

    :param code: what documentation, reports and tests key on.
    :param subject: the file, the domain or the option; empty if the failure is about none.
    :param why: the rule that is broken, without the last full stop.
    :param remedy: the way out, in whole sentences; empty if `why` says it.
    """

    def __init__(self, code: Code, subject: str, why: str, remedy: str = "") -> None:
        super().__init__(code, subject, why, remedy)
        self.code: Code = code
        self.subject = subject
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        subject = f"{self.subject}: " if self.subject else ""
        return printable(f"{subject}{self.why}. {self.remedy}".rstrip())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refusal) and type(other) is type(self) and other.args == self.args

    def __hash__(self) -> int:
        return hash(self.args)

    def __reduce__(self) -> tuple[t.Any, ...]:
        return _same, (type(self), self.args)  # the types differ in what they are made from

    def about(self: R, subject: str) -> R:
        """Return the same refusal about another subject."""
        return self._changed(subject, self.remedy)

    def with_note(self: R, note: str) -> R:
        """Return the same refusal with one more sentence at its end."""
        return self._changed(self.subject, f"{self.remedy} {note}".lstrip())

    def _changed(self: R, subject: str, remedy: str) -> R:
        return _same(type(self), (self.code, subject, self.why, remedy))


def _same(kind: type[R], fields: tuple[Code, str, str, str]) -> R:
    """Return a refusal of this type with these fields."""
    made = kind.__new__(kind)
    Refusal.__init__(made, *fields)
    return made


class QemuError(Refusal):
    """A failure of QEMU, or that there is none. It has no subject yet; whoever knows the file gives it one."""

    def __init__(self, code: Code, why: str, remedy: str) -> None:
        super().__init__(code, "", why, remedy)


class UnknownOutcomeError(Refusal):
    """A failure after which nobody knows whether the VM is on its new images, so they must stay."""

    def __init__(self, subject: str, why: str, remedy: str) -> None:
        super().__init__("unknown_outcome", subject, why, remedy)


def printable(text: str) -> str:
    """Return `text` with bytes that are not UTF-8 spelt out; Ansible rejects results that have surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def system_refusal(exc: OSError, subject: str, what: str) -> Refusal:
    """Return the refusal for a failed system call; `what` says what could not be done."""
    code, remedy = _BY_ERRNO.get(exc.errno or 0, ("storage", CHECK_STORAGE))
    return Refusal(code, subject, f"{what}: {exc.strerror}", remedy)


def qemu_refusal(words: str) -> QemuError:
    """Return the error for a command or a job that QEMU says, in these words, has failed."""
    code: Code = "qemu_failed"
    remedy = CHECK_STORAGE
    is_option = "arameter '" in words and not any(word in words for word in ("required", "missing"))
    if is_option:  # QAPI refuses what it does not know or was built without, such as zstd
        code, remedy = "qemu_option", "This QEMU does not know that option: leave it out, or update QEMU on this host."
    else:
        known = (found for number, found in _BY_ERRNO.items() if os.strerror(number) in words)
        code, remedy = next(known, (code, remedy))
    return QemuError(code, f"QEMU says: {words}", remedy)
