# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the report on a healing has, whatever is wrong with it."""

from __future__ import annotations

import json

from ansible_collections.kvmfleet.qcow2.plugins.filter.host_healed import make_host_healed


def test_a_report_that_cannot_be_made_throws_no_result_away():
    told = {"domains": [{"name": "web", "state": "removed"}], "warnings": ["web: was removed"]}
    report = json.loads(make_host_healed({"work": told, "names": "web", "checkpoints": "*"}))
    assert (report["state"], report["results"], report["warnings"]) == ("failed", [told], told["warnings"])
    assert "KeyError: 'checkpoints'" in report["problems"][0]["msg"]
