# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules over the verdicts of a VM."""

from __future__ import annotations

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest, OverlayVerdict
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import (
    CREATED,
    FAILED,
    PRESENT,
    Need,
    all_or_none,
    problem_fields,
    root_causes,
    within_space,
)

REQUEST = OverlayRequest("/srv/over.qcow2", "/srv/active.qcow2")
MADE, THERE = OverlayVerdict(REQUEST, CREATED, virtual_size=1), OverlayVerdict(REQUEST, PRESENT, virtual_size=1)
BECAUSE = Refusal("in_use", "/srv/active.qcow2", "is in use", "Shut it down.")


def broken(path):
    return OverlayVerdict(REQUEST._replace(path=path), FAILED, (BECAUSE,))


def test_one_failure_of_a_vm_fails_what_would_be_created_but_not_what_is_there():
    verdicts = all_or_none([MADE, THERE, broken("/srv/broken")])
    assert [verdict.state for verdict in verdicts] == [FAILED, PRESENT, FAILED]
    assert [problem.code for problem in verdicts[0].problems] == ["group_failed"]
    assert "/srv/broken failed" in problem_fields(verdicts[0].problems)["msg"]
    assert all_or_none([MADE, THERE]) == [MADE, THERE]


def test_a_vm_with_twenty_disks_of_which_one_fails_has_one_root_cause():
    verdicts = all_or_none([*[MADE] * 19, broken("/srv/broken")])
    problems = [problem for verdict in verdicts for problem in verdict.problems]
    assert len(problems) == 20
    assert root_causes(problems) == [BECAUSE]


def test_the_code_of_an_item_is_that_of_its_root_cause():
    group = Refusal("group_failed", "/srv/a", "is not done")
    assert problem_fields([group, BECAUSE])["code"] == "in_use"
    assert problem_fields([group]) == {"msg": "/srv/a: is not done.", "code": "group_failed"}
    assert problem_fields([]) == {}


def needing(device, free, bytes_=200_000):
    return MADE._replace(need=Need(device, "/srv", bytes_, free))


def test_space_is_counted_over_the_vms_of_a_call():
    free = {}
    assert [v.state for v in within_space([needing(1, 300_000)], free)] == [CREATED]
    short = within_space([needing(1, 300_000)], free)[0]
    assert (short.state, short.problems[0].code) == (FAILED, "no_space")
    assert "needs 200000 bytes in /srv, where 100000 are left" in str(short.problems[0])
    assert [v.state for v in within_space([needing(2, 300_000)], free)] == [CREATED]
    assert [v.state for v in within_space([needing(1, 300_000)] * 2, {})] == [FAILED, FAILED]
    assert [v.state for v in within_space([MADE], {})] == [CREATED]


def test_what_does_not_change_anything_takes_no_space():
    assert within_space([THERE._replace(need=Need(1, "/srv", 2, 1))], {})[0].state == PRESENT
