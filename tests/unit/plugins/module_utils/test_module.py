# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which names modules refuse."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._module import check_names


def test_names_are_taken_as_they_are():
    check_names(
        {"name": ["web", "a, b", "[ ]db", "*"], "disks": None, "checkpoints": []}, "name", "disks", "checkpoints"
    )


@pytest.mark.parametrize(
    "names, subject, why",
    [
        (["web", ""], "name", "has an empty name in it"),
        (["web", " "], "name", "has an empty name in it"),
        (["web*", " db*"], "name=' db*'", "begins or ends with a blank"),
        (["web*\t"], "name='web*\\t'", "begins or ends with a blank"),
    ],
)
def test_what_is_left_of_a_text_with_commas_is_refused(names, subject, why):
    with pytest.raises(Refusal) as raised:
        check_names({"name": names, "disks": None}, "disks", "name")
    assert (raised.value.code, raised.value.subject) == ("bad_option", subject)
    assert raised.value.why.startswith(why)
