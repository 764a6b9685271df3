# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be said of the sizes of batches."""

from __future__ import annotations

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.kvmfleet.qcow2.plugins.filter.batches import batches


@pytest.mark.parametrize(
    "value, sizes",
    [
        (3, [3]),
        ("3", [3]),
        ("50%", ["50%"]),
        ([1, 10, "25%"], [1, 10, "25%"]),
        ("[1,2]", [1, 2]),
        ('[1, 10, "25%"]', [1, 10, "25%"]),
        ("['1', '25%']", [1, "25%"]),
        ("1,2", [1, 2]),
        (" 1, 25% ", [1, "25%"]),
        (["1", "2"], [1, 2]),
        ("", ["100%"]),
        ("100%", ["100%"]),
    ],
)
def test_a_text_says_what_a_list_does(value, sizes):
    assert batches(value) == sizes


@pytest.mark.parametrize("value", [0, "0", -1, "0%", "abc", "1,,2", "1;2", "12.5%", [], [1, "x"], True, None, {"a": 1}])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(AnsibleFilterError, match="must be a number of hosts from 1 on") as refused:
        batches(value)
    assert f"serial={value!r}: " in str(refused.value)
