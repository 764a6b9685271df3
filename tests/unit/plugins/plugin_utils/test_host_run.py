# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which module is called when for a host, and what its report is made of."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._asked import DISKS, DOMAINS, asked
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._host_run import HostRun, NoResultError

OVERLAY = {"path": "/srv/a.snap.qcow2", "backing_file": "/srv/a.qcow2", "bitmaps": [], "skipped_bitmaps": []}
KILLED = {"failed": True, "msg": "MODULE FAILURE", "module_stdout": "", "module_stderr": "Killed"}
NO_LIBVIRT = {"failed": True, "msg": "libvirt cannot be reached", "code": "libvirt_unreachable"}
GONE = {"unreachable": True, "msg": "Failed to connect to the host"}


def overlays(state, name="a"):
    return [{**OVERLAY, "path": f"/srv/{name}.snap.qcow2", "state": state}]


def looked(state):
    return {"changed": state == "created", "overlays": overlays(state)}


def made(state="created"):
    before = {"overlays": overlays("created")}
    return {"changed": True, "overlays": overlays(state), "preflight": before, "again": None, "chains": []}


def domains(state="present"):
    domain = {"name": "web", "state": state, "skipped_disks": [], "unfit_disks": [], "checkpoints": []}
    listed = [{**domain, "overlays": overlays(state, "web")}]
    return {"changed": False, "domains": listed, "preflight": {"domains": listed}, "again": None, "chains": []}


def broken(problem="in_use"):
    failed = {**OVERLAY, "state": "failed", "msg": "is in use", "code": problem}
    return {"failed": True, "overlays": [failed], "code": problem, "msg": "is in use"}


def play(*answers, check_mode=False, waiting_for=(), **given):
    """Return the report, and the calls that were made: which module, and whether it only looks."""
    calls, left = [], list(answers)

    def call(module, options, *, looks):
        calls.append((module, "look" if looks else "run"))
        assert options.get("verify", False) is not looks
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    wish = asked("present", {"disks": [{"path": "a"}], **given}, ())
    host = HostRun(wish, call, waiting_for, check_mode=check_mode)
    host.run()
    assert not left
    return host.report(), calls


def test_an_ordinary_run_is_one_call_for_each_module():
    report, calls = play(made(), domains(), snapshot="s")
    assert calls == [(DISKS, "run"), (DOMAINS, "run")]
    assert (report["state"], report["created"], report["present"]) == ("ok", 1, 1)


def test_nothing_is_called_for_a_mistake_or_without_packages():
    report, calls = play(snapshot=None)
    assert (calls, report["state"], report["problems"][0]["code"]) == ([], "failed", "task_failed")
    report, calls = play(waiting_for=["qemu-utils"], check_mode=True)
    assert (calls, report["waiting_for"]) == ([], ["qemu-utils"])


def test_all_or_none_of_both_looks_at_both_before_either_is_touched():
    ready = domains("created")
    report, calls = play(looked("created"), ready, made(), ready, snapshot="s", all_or_none=True)
    assert calls == [(DISKS, "look"), (DOMAINS, "look"), (DISKS, "run"), (DOMAINS, "run")]
    assert report["state"] == "ok"


@pytest.mark.parametrize("second, problem", [(NO_LIBVIRT, "libvirt_unreachable"), (KILLED, "module_failed")])
def test_all_or_none_of_both_begins_nothing_if_a_look_finds_a_problem(second, problem):
    report, calls = play(looked("created"), second, snapshot="s", all_or_none=True)
    assert calls == [(DISKS, "look"), (DOMAINS, "look")]
    assert [one["code"] for one in report["problems"]] == [problem]
    assert (report["created"], report["failed"], report["overlays"][0]["code"]) == (0, 1, "held_back")


def test_all_or_none_begins_nothing_if_a_look_has_no_result():
    report, calls = play(looked("created"), NoResultError("slow", had_begun=True), snapshot="s", all_or_none=True)
    assert calls == [(DISKS, "look"), (DOMAINS, "look")]
    assert (report["state"], report["created"]) == ("failed", 0)


def test_all_or_none_asks_no_further_if_the_host_is_gone():
    report, calls = play(GONE, snapshot="s", all_or_none=True)
    assert (calls, report["state"]) == ([(DISKS, "look")], "unreachable")


def test_in_check_mode_there_is_one_look():
    _report, calls = play(made(), domains(), snapshot="s", all_or_none=True, check_mode=True)
    assert calls == [(DISKS, "run"), (DOMAINS, "run")]


def test_a_module_that_is_killed_is_looked_at_afterwards_and_the_other_is_called_all_the_same():
    report, calls = play(KILLED, domains(), looked("present"), snapshot="s")
    assert calls == [(DISKS, "run"), (DOMAINS, "run"), (DISKS, "look")]
    assert (report["state"], report["created"], report["present"]) == ("failed", 0, 2)
    assert {one["code"] for one in report["problems"]} == {"module_failed"}


def test_what_a_killed_module_has_not_made_is_not_told_as_made():
    report, _calls = play(KILLED, looked("created"))
    assert (report["created"], report["failed"]) == (0, 1)


def test_what_is_found_afterwards_has_its_chains_examined():
    carried = {**OVERLAY, "state": "present", "bitmaps": [{"name": "monday"}]}
    checkpoint = {"name": "monday", "valid": False, "advice": "Make a full backup."}
    chains = {"disks": [{"path": OVERLAY["path"], "checkpoints": [checkpoint]}]}
    calls = iter([KILLED, {"overlays": [carried]}, chains])
    host = HostRun(asked("present", {"disks": [{}]}, ()), lambda *_, **__: next(calls), (), check_mode=False)
    host.run()
    assert [one["code"] for one in host.report()["problems"]] == ["module_failed", "module_failed", "no_backup"]


def test_a_call_that_takes_too_long_is_looked_at_and_nothing_more_is_begun():
    report, calls = play(NoResultError("slow", had_begun=True), looked("present"), snapshot="s")
    assert calls == [(DISKS, "run"), (DISKS, "look")]
    assert (report["state"], report["created"], report["present"]) == ("failed", 0, 1)
    assert "task_failed" in {one["code"] for one in report["problems"]}


def test_a_call_that_could_not_begin_is_a_problem_and_nothing_more_is_begun():
    report, calls = play(NoResultError("no Python"), snapshot="s")
    assert calls == [(DISKS, "run")]
    assert [(one["code"], one["msg"]) for one in report["problems"]] == [("task_failed", "no Python")]


def test_a_look_afterwards_without_a_result_leaves_the_first_reason():
    slow = NoResultError("slow", had_begun=True)
    report, _calls = play(slow, NoResultError("slower"))
    assert "slow" in [one["msg"] for one in report["problems"]]
    assert "slower" not in [one["msg"] for one in report["problems"]]


def test_a_report_that_cannot_be_made_throws_no_result_away():
    told = {**domains("reverted"), "warnings": ["web: a checkpoint goes with it"]}
    told["domains"][0].pop("checkpoints")
    report, calls = play(made(), told, snapshot="s")
    assert calls == [(DISKS, "run"), (DOMAINS, "run")]
    assert (report["state"], report["results"][1]) == ("failed", told)
    assert report["warnings"] == ["web: a checkpoint goes with it"]
    assert [(one["code"], "KeyError: 'checkpoints'" in one["msg"]) for one in report["problems"]] == [
        ("task_failed", True)
    ]


def test_of_a_host_that_is_gone_nothing_more_is_asked():
    report, calls = play(GONE, snapshot="s")
    assert (calls, report["state"]) == ([(DISKS, "run")], "unreachable")
    report, calls = play(made(), GONE, snapshot="s")
    assert (calls, report["state"], report["created"]) == ([(DISKS, "run"), (DOMAINS, "run")], "unreachable", 1)


def test_a_refusal_is_an_answer():
    report, calls = play(broken(), NO_LIBVIRT, snapshot="s")
    assert calls == [(DISKS, "run"), (DOMAINS, "run")]
    assert {one["code"] for one in report["problems"]} == {"in_use", "libvirt_unreachable"}


def test_a_host_that_is_gone_before_anything_is_done_is_not_ok():
    host = HostRun(asked("present", {"disks": [{}], "snapshot": "s"}, ()), None, (), check_mode=False)
    host.unreachable(GONE)
    assert host.report()["state"] == "unreachable"
