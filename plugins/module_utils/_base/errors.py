# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The exceptions that are expected, and the texts that more than one room needs."""

from __future__ import annotations

import errno
import os

CHECK_STORAGE = "Check the space, the quota and the state of the storage there (dmesg), then run this again."
_ADVICE = {
    errno.EROFS: "Make its file system writable (dmesg tells if an error made it read-only), then run this again.",
    errno.EACCES: "Check its permissions, run with become.",
    errno.EPERM: "Check its permissions, run with become.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), then run this again.",
    errno.ENFILE: "Raise the limit of open files (sysctl fs.file-max), then run this again.",
    errno.ENOENT: "Check that its folder is still there and mounted, then run this again.",
    errno.ESTALE: "Check that its folder is still there and mounted, then run this again.",
}


class Qcow2Error(Exception):
    """An expected failure. Its text names the file, the rule and the way out, and is shown to the user as it is."""


class QemuError(Qcow2Error):
    """A failure of QEMU, in its own words; whoever knows the file puts its name in front."""


class UnknownOutcomeError(Qcow2Error):
    """A failure after which the new overlays may be in use already, so that they must stay."""


def printable(text: str) -> str:
    """Return the text with what stands for bytes that are not UTF-8 spelt out; Ansible would reject the result."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def advice(exc: OSError) -> str:
    """Return what to do about a failure of the system."""
    return _ADVICE.get(exc.errno or 0, CHECK_STORAGE)


def advice_on(words: str) -> str:
    """Return what to do about a failure that QEMU tells in these words."""
    if "arameter '" in words:  # QAPI refuses what it does not know or was built without, such as zstd
        return "This QEMU does not know that option: leave it out, or update QEMU on this host."
    return next((text for number, text in _ADVICE.items() if os.strerror(number) in words), CHECK_STORAGE)
