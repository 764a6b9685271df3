# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a refusal says, and that its kind stays when more is said about it."""

from __future__ import annotations

import errno

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import (
    QemuError,
    Refusal,
    UnknownOutcomeError,
    qemu_refusal,
    system_refusal,
)


def test_the_sentence_names_subject_rule_and_way_out():
    refusal = Refusal("in_use", "/a", "is open", "Close it.")
    assert str(refusal) == "/a: is open. Close it."
    assert str(refusal.about("/b")) == "/b: is open. Close it."
    assert str(refusal.with_note("It is below /c.")) == "/a: is open. Close it. It is below /c."
    assert str(Refusal("in_use", "", "something is open")) == "something is open."
    assert str(Refusal("in_use", "/\udcff", "is open")) == "/\\udcff: is open."


def test_two_that_say_the_same_are_one():
    assert len({Refusal("in_use", "/a", "is open"), Refusal("in_use", "/a", "is open")}) == 1
    assert Refusal("in_use", "/a", "is open") != UnknownOutcomeError("/a", "is open", "")


@pytest.mark.parametrize("error", [QemuError("qemu_lost", "died", ""), UnknownOutcomeError("web", "unknown", "Look.")])
def test_the_kind_stays(error):
    for changed in (error.about("/x"), error.with_note("More.")):
        assert type(changed) is type(error)
        assert changed.code == error.code


@pytest.mark.parametrize(
    "number, code",
    [(errno.ENOSPC, "no_space"), (errno.EROFS, "read_only"), (errno.EACCES, "no_permission"), (errno.EIO, "storage")],
)
def test_failures_of_the_system_have_the_code_of_their_kind(number, code):
    refusal = system_refusal(OSError(number, "words"), "/a", "cannot be read")
    assert refusal.code == code
    assert str(refusal).startswith("/a: cannot be read: words. ")


def test_failures_in_qemus_words_too():
    assert qemu_refusal("Could not write: No space left on device").code == "no_space"
    assert qemu_refusal("Invalid parameter 'zstd'").code == "qemu_option"
    assert qemu_refusal("nonsense").code == "qemu_failed"
