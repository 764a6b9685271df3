# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which names of domains the report takes for patterns, whatever YAML takes the names for."""

from __future__ import annotations

import datetime

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.filter.host_report import make_host_report

_DAY = datetime.date(2024, 6, 1)


@pytest.mark.parametrize(
    "names, patterns",
    [
        (101, {}),
        ([101], {}),
        ([101, "10*"], {"10*": 1}),
        ([_DAY, "2024*"], {"2024*": 1}),
        (_DAY, {}),
        ("101, 2024*,nobody?", {"2024*": 1, "nobody?": 0}),
        (None, {}),
    ],
)
def test_a_name_need_not_be_a_text(names, patterns):
    domains = [_domain("101"), _domain("2024-06-01")]
    report = make_host_report({"domains": [{"domains": domains}], "names": names}, check_mode=True)
    assert report["patterns"] == patterns
    assert report["state"] == "ok"


def _domain(name):
    return {"name": name, "state": "present", "overlays": [], "skipped_disks": [], "unfit_disks": [], "checkpoints": []}
