# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which names a variable has."""

from __future__ import annotations

import datetime

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.filter.names import FilterModule


@pytest.mark.parametrize(
    "value, names",
    [
        ("web", ["web"]),
        ("web*, db*", ["web*", "db*"]),
        ('["web", "db"]', ["web", "db"]),  # as from the command line
        ("[ab]*", ["[ab]*"]),
        (["web", [101, None]], ["web", "101"]),
        (["a, b", " c"], ["a, b", " c"]),  # such names are possible
        (101, ["101"]),
        ([datetime.date(2024, 6, 1)], ["2024-06-01"]),
        ("web,", ["web", ""]),  # which the module refuses
        ([], []),
        (None, []),
    ],
)
def test_a_text_says_what_a_list_does(value, names):
    assert FilterModule().filters()["names"](value) == names
