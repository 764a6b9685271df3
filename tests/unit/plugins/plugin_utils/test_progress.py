# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What people are told of a merge that goes on. That it is followed over real connections: extensions/molecule/long."""

from __future__ import annotations

import json

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils import _progress

MERGE = {"path": "/srv/web.vda.mon.qcow2", "bytes": 3 << 30, "total_bytes": 8 << 30, "percent": 37.5}


@pytest.mark.parametrize(
    ("rate", "end"),
    [
        (512 << 20, "512.00 MB/s, 10 s left"),
        (32 << 20, "32.00 MB/s, 2 min 40 s left"),
        (1 << 20, "1.00 MB/s, 1 h 25 min left"),
        (0, "0.00 Bytes/s"),
    ],
)
def test_a_line_tells_all(rate, end):
    line = _progress.line_of({**MERGE, "bytes_per_second": rate})
    assert line == f"web.vda.mon.qcow2: 37.5 %, 3.00 GB of 8.00 GB, {end}"


def test_what_is_no_progress_is_left_out():
    whole = json.dumps({**MERGE, "bytes_per_second": 0})
    assert list(_progress.merges(["alive", whole, whole[:-3], "7", '{"total_bytes": null}', ""])) == [json.loads(whole)]
