# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the report says of what the modules returned."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.fleet import fleet_report
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.host import Pass, Steps, host_report, pass_of
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.text import summary_of_fleet, summary_of_host

GONE = {"unreachable": True, "changed": False, "msg": "Connection refused"}
CRASHED = {"failed": True, "msg": "MODULE FAILURE", "module_stderr": "Traceback\nSyntaxError: f-string", "rc": 1}


def overlay(path, state="created", bitmaps=("monday",), skipped=(), **more):
    """Return an overlay as qcow2_overlay returns it."""
    return {
        "path": path,
        "backing_file": path.replace(".snap", ""),
        "state": state,
        "bitmaps": [{"name": name, "granularity": 65536} for name in bitmaps],
        "skipped_bitmaps": [{"name": name, "granularity": 65536, "reason": reason} for name, reason in skipped],
        **({"msg": f"{path}: is wrong.", "code": "in_use"} if state == "failed" else {}),
        **more,
    }


def of_disks(*overlays):
    """Return what qcow2_overlay returns."""
    return {"changed": True, "overlays": list(overlays)}


def of_domains(*domains):
    """Return what domain_overlay returns, from name, state and overlays of each."""
    return {
        "domains": [
            {
                "name": name,
                "state": state,
                "overlays": list(overlays),
                "skipped_disks": [{"target": "sda", "reason": "cdrom"}],
                "unfit_disks": [],
                "checkpoints": [],
                **({"msg": f"{name}: is wrong.", "code": "running"} if state == "failed" else {}),
            }
            for name, state, *overlays in domains
        ]
    }


def asked(names, *domains):
    """Return the report of a host that was asked for domains of these patterns, and has these, all done."""
    made = of_domains(*((name, "present", overlay(f"/{name}.snap.qcow2", "present")) for name in domains))
    for domain in made["domains"]:
        domain["skipped_disks"] = []
    return report((), [made], patterns=names)


def codes(fleet):
    """Return the codes of what is wrong with the fleet."""
    return [problem["code"] for problem in fleet["problems"]]


def chains(*disks):
    """Return what qcow2_info returns, from path and verdict by checkpoint of each."""
    return {
        "disks": [
            {"path": path, "checkpoints": [{"name": name, **verdict} for name, verdict in verdicts.items()], **more}
            for path, verdicts, more in disks
        ]
    }


VALID = {"valid": True, "problem": None, "advice": None}
BROKEN = {"valid": False, "problem": "gap", "advice": "An image in between lacks it."}
IN_USE = {"valid": None, "problem": "in_use", "advice": "Shut it off."}
A = "/a.snap.qcow2"


def report(disks=(), domains=(), chains=None, check_mode=False, **more):
    """Return the report of a host."""
    return host_report(Steps(Pass(*disks), Pass(*domains), chains, **more), check_mode)


def messages(report):
    """Return the words of the problems."""
    return [problem["msg"] for problem in report["problems"]]


def test_every_problem_has_a_code():
    looked = of_disks(overlay(A, "failed"))
    assert report([looked])["problems"] == [{"code": "in_use", "msg": f"{A}: is wrong."}]
    assert report((), [of_domains(("web", "failed"))])["problems"] == [{"code": "running", "msg": "web: is wrong."}]
    codes = {
        "module_failed": report([CRASHED]),
        "unreachable": report([GONE]),
        "task_failed": report(problem="A task: timed out"),
        "unstable": report([of_disks(overlay(A)), of_disks(overlay(A)), of_disks()]),
        "no_backup": report([of_disks(overlay(A, "present"))], chains=chains((A, {"monday": BROKEN}, {}))),
        "not_run": fleet_report({"hv1": None}, check_mode=False)["hosts"]["hv1"],
        "no_match": fleet_report({"hv1": asked(["x*"])}, check_mode=False),
        "nothing_done": fleet_report({"hv1": report()}, check_mode=False),
        "no_library": report([{"failed": True, "msg": "Failed to import", "code": "no_library"}]),
    }
    assert {expected: [problem["code"] for problem in one["problems"]] for expected, one in codes.items()} == {
        expected: [expected] for expected in codes
    }


def test_an_overlay_that_was_held_back_says_so_by_its_code():
    looked = of_disks(overlay(A), overlay("/b.snap.qcow2", "failed"))
    codes = [one["code"] for one in report([looked], all_or_none=True)["overlays"]]
    assert codes == ["held_back", "in_use"]
    assert [one["code"] for one in report([of_disks(overlay(A))])["overlays"]] == ["not_begun"]


def test_a_run_in_which_all_is_well():
    before = of_disks(overlay(A), overlay("/b.snap.qcow2", bitmaps=(), skipped=[("old", "disabled")]))
    after = of_disks(overlay(A, "present"), overlay("/b.snap.qcow2", "present", bitmaps=()))
    result = report([before, before, after], chains=chains((A, {"monday": VALID}, {})))
    assert (result["state"], messages(result), result["examined"]) == ("ok", [], [A])
    assert summary_of_host(result) == (
        "2 created, 0 present, 0 skipped, 0 failed; bitmaps: 1 carried, 1 left behind (1 disabled)"
    )


def test_disks_and_domains_are_counted_together():
    made = of_domains(("web", "created", overlay("/w.snap.qcow2")))
    result = report([of_disks(overlay(A, "present"))], [made, made])
    assert (result["created"], result["present"], result["skipped"], result["bitmaps_carried"]) == (1, 1, 1, 2)
    assert [one["domain"] for one in result["overlays"]] == [None, "web"]
    assert result["skipped_disks"] == [{"domain": "web", "target": "sda", "reason": "cdrom", "unfit": False}]


def test_disks_that_are_in_no_snapshot_although_they_are_written_to_are_counted_by_themselves():
    made = of_domains(("web", "created", overlay(A)), ("db", "failed"))
    for domain in made["domains"]:
        domain["skipped_disks"].append({"target": "vdb", "reason": "network"})
        domain["unfit_disks"] = ["vdb"]
    result = report((), [made, made])
    assert (result["unfit"], result["skipped"]) == (1, 4)
    assert [one["unfit"] for one in result["skipped_disks"]] == [False, True, False, False]
    words = "4 skipped (2 cdrom, 2 network), 1 of them written to and in no snapshot, 1 failed"
    assert words in summary_of_host(result)
    assert fleet_report({"hv1": result, "hv2": result}, False)["unfit"] == 2


def test_the_run_decides_and_not_what_was_seen_before():
    result = report([of_disks(overlay(A)), of_disks(overlay(A, "failed")), of_disks(overlay(A, "failed"))])
    assert (result["state"], result["created"], result["failed"]) == ("failed", 0, 1)
    assert messages(result) == [f"{A}: is wrong."]
    assert result["examined"] == []


@pytest.mark.parametrize("again", [overlay(A), overlay(A, "failed")])
def test_an_overlay_that_is_not_there_at_the_second_look_is_a_problem(again):
    result = report([of_disks(overlay(A))] * 2 + [of_disks(again)], chains=chains((A, {"monday": VALID}, {})))
    assert result["state"] == "failed"
    assert f"{A}: is created, but the idempotence check finds otherwise" in messages(result)[0]


def test_a_domain_without_a_name_is_told_like_any_other():
    failed = of_domains(("", "failed"))
    assert messages(report((), [failed, failed, failed])) == [": is wrong."]


def test_a_domain_that_is_not_there_at_the_second_look_is_a_problem():
    made = of_domains(("web", "created", overlay(A)), ("db", "failed"))
    result = report((), [made, made, of_domains(("web", "failed", overlay(A, "failed")), ("db", "failed"))])
    assert messages(result) == [
        "db: is wrong.",
        "web: is created, but the idempotence check finds otherwise: web: is wrong.",
    ]


def test_a_second_look_that_failed_altogether_is_a_problem():
    result = report([of_disks(overlay(A))] * 2 + [CRASHED])
    assert messages(result) == [
        "The idempotence check could not be made: MODULE FAILURE SyntaxError: f-string",
    ]


@pytest.mark.parametrize(
    "verdicts, more, problem",
    [
        ({"monday": VALID}, {}, None),
        ({"monday": IN_USE}, {}, None),
        ({"monday": BROKEN}, {}, f"{A}: checkpoint monday cannot be used for a backup: An image in between lacks it."),
        ({"tuesday": VALID}, {}, f"{A}: checkpoint monday cannot be used for a backup: is not in the chain."),
        ({}, {"msg": "is damaged."}, f"{A}: checkpoint monday cannot be used for a backup: is damaged."),
    ],
)
def test_each_carried_bitmap_must_be_a_valid_checkpoint(verdicts, more, problem):
    result = report([of_disks(overlay(A, "present"))], chains=chains((A, verdicts, more)))
    assert messages(result) == ([problem] if problem else [])


def test_an_overlay_that_was_not_examined_is_a_problem():
    result = report([of_disks(overlay(A, "present"))], chains=chains())
    assert messages(result) == [f"{A}: checkpoint monday cannot be used for a backup: was not examined."]
    result = report([of_disks(overlay(A, "present"))], chains=CRASHED)
    assert "could not be examined" in messages(result)[0]


def test_what_is_to_be_examined_is_told_before_it_is():
    result = report([of_disks(overlay(A, "present"))])
    assert (result["examined"], messages(result)) == ([A], [])


def test_check_mode_examines_what_is_there():
    both = of_disks(overlay(A), overlay("/b.snap.qcow2", "present"))
    assert report([both], check_mode=True)["examined"] == ["/a.qcow2", "/b.snap.qcow2"]
    assert report([both, both], check_mode=False)["examined"] == [A, "/b.snap.qcow2"]


def test_what_counts_is_the_topmost_image_of_a_domain():
    below = of_domains(("web", "present", overlay(A, "present", topmost="/top.qcow2")))
    assert report((), [below])["examined"] == ["/top.qcow2"]
    result = report((), [below], chains((("/top.qcow2"), {"monday": BROKEN}, {})))
    assert messages(result) == [
        "/top.qcow2: checkpoint monday cannot be used for a backup: An image in between lacks it."
    ]


def test_a_checkpoint_that_is_broken_on_another_disk_of_the_domain_is_a_problem():
    made = of_domains(("web", "created", overlay(A), overlay("/b.snap.qcow2", bitmaps=())))
    broken = {"name": "monday", "valid": False, "image": "/b.snap.qcow2", "advice": "It lacks it."}
    made["domains"][0]["checkpoints"] = [broken, {**broken, "name": "of-old"}]
    result = report((), [made, made], chains((A, {"monday": VALID}, {})))
    assert messages(result) == ["web: checkpoint monday cannot be used for a backup: /b.snap.qcow2: It lacks it."]
    # Told once if the chain of the disk itself tells it.
    assert len(messages(report((), [made, made], chains((A, {"monday": BROKEN}, {}))))) == 1


def test_a_checkpoint_of_a_running_vm_is_counted_as_not_verified():
    result = report([of_disks(overlay(A, "present"))], chains=chains((A, {"monday": IN_USE}, {})))
    assert result["unverified"] == [{"path": A, "checkpoint": "monday"}]
    assert summary_of_host(result).endswith("bitmaps: 1 carried, 0 left behind, 1 not verified, as a VM runs")


def test_nothing_counts_as_created_without_a_run():
    before = of_disks(overlay(A), overlay("/b.snap.qcow2", "present"))
    result = report([before], [GONE])
    assert (result["state"], result["created"], result["present"], result["failed"]) == ("unreachable", 0, 1, 1)
    assert "the run did not begin" in result["overlays"][0]["msg"]


def test_a_run_that_told_nothing_is_judged_by_what_is_found_afterwards():
    before = of_disks(overlay(A), overlay("/b.snap.qcow2"))
    after = of_disks(overlay(A, "present"), overlay("/b.snap.qcow2"))
    result = report([before, CRASHED, after])
    assert (result["state"], result["created"], result["present"], result["failed"]) == ("failed", 0, 1, 1)
    assert messages(result)[0] == "MODULE FAILURE SyntaxError: f-string"
    assert "did not tell what it made" in messages(result)[1]
    assert report([before, CRASHED])["overlays"] == []


def test_what_ended_the_steps_is_a_problem_and_loses_nothing():
    result = report([of_disks(overlay(A, "present"))], problem="A task: timed out")
    assert (result["state"], result["present"], messages(result)) == ("failed", 1, ["A task: timed out"])


def test_what_is_left_out_before_and_after_is_stable():
    made = of_domains(("web", "created", overlay(A)), ("db", "skipped"))
    after = of_domains(("db", "skipped"), ("web", "present", overlay(A, "present")))
    assert report((), [made, made, after], chains((A, {"monday": VALID}, {})))["state"] == "ok"
    gone = report((), [made, made, of_domains(("db", "skipped"))], chains((A, {"monday": VALID}, {})))
    assert messages(gone) == ["web: is created, but the idempotence check finds otherwise: it is not there any more."]


def test_warnings_of_the_modules_are_kept_once():
    warned = {**of_disks(overlay(A, "present")), "warnings": ["x*: no domain of this host matches it."]}
    assert report([warned], [warned])["warnings"] == ["x*: no domain of this host matches it."]


def test_a_domain_that_failed_has_no_overlay_whatever_became_of_each():
    made = of_domains(("web", "failed", overlay(A, "present"), overlay("/b.snap.qcow2", "failed")))
    result = report((), [made])
    assert (result["present"], result["failed"], result["bitmaps_carried"]) == (0, 2, 0)
    assert messages(result) == ["web: is wrong."]


def test_a_domain_that_failed_before_it_had_overlays_counts_as_one_failure():
    result = report((), [of_domains(("web", "failed"))])
    assert (result["failed"], messages(result)) == (1, ["web: is wrong."])


def test_a_domain_that_was_left_out_is_no_failure():
    result = report((), [of_domains(("web", "skipped"))])
    assert (result["state"], result["failed"], result["skipped"]) == ("ok", 0, 1)
    assert summary_of_host(result).startswith("0 created, 0 present, 1 skipped (1 cdrom), 0 failed")


def test_a_module_that_could_not_run_is_a_problem():
    assert messages(report([CRASHED])) == ["MODULE FAILURE SyntaxError: f-string"]
    foreseen = report(pass_of(None, CRASHED, check_mode=True), check_mode=True)
    assert (foreseen["state"], messages(foreseen)) == ("failed", ["MODULE FAILURE SyntaxError: f-string"])


def test_a_state_that_is_none_ends_in_words():
    assert "0 failed" in summary_of_host({**report([CRASHED]), "wanted": "commited"})


def test_a_host_that_cannot_be_reached():
    result = report([GONE])
    assert (result["state"], messages(result)) == ("unreachable", ["Connection refused"])


def test_a_connection_lost_during_the_run_leaves_open_what_was_made():
    result = report([of_disks(overlay(A)), GONE])
    assert result["state"] == "unreachable"
    assert (result["created"], result["overlays"]) == (0, [])
    assert "did not tell what it made" in messages(result)[1]


def test_a_connection_lost_after_the_run_does_not_lose_what_was_made():
    result = report([of_disks(overlay(A)), of_disks(overlay(A)), GONE])
    assert (result["state"], result["created"]) == ("unreachable", 1)


def test_all_or_none_holds_back_what_could_have_been_made():
    before = of_disks(overlay(A), overlay("/b.snap.qcow2", "failed"), overlay("/c.snap.qcow2", "present"))
    result = report([before], all_or_none=True)
    assert (result["created"], result["failed"], result["present"]) == (0, 2, 1)
    assert "all_or_none" in result["overlays"][0]["msg"]
    assert result["examined"] == ["/c.snap.qcow2"]
    # What fails in the run itself holds nothing back any more.
    assert report([before, before], all_or_none=True)["created"] == 1
    assert report([of_disks(overlay(A))], all_or_none=True, check_mode=True)["created"] == 1
    assert report([before], all_or_none=True, check_mode=True)["created"] == 0


def test_packages_that_check_mode_would_install_end_the_prediction():
    result = report(waiting_for=["qemu-utils"], check_mode=True)
    assert result["state"] == "ok"
    assert summary_of_host(result) == "would install qemu-utils; what comes then cannot be predicted"


def test_the_fleet_has_a_line_for_each_host_and_a_sum():
    made = of_disks(overlay(A, skipped=[("x", "inconsistent"), ("y", "disabled")]))
    fine = report([made, made])
    bad = report(
        [of_disks(overlay(A, "failed", bitmaps=(), msg="/a: is\nin use."), overlay("/b.snap.qcow2", "present"))]
    )
    fleet = fleet_report({"hv1": fine, "hypervisor2": bad, "hv3": report([GONE]), "hv4": None}, check_mode=False)
    assert fleet["states"] == {"ok": 1, "failed": 1, "unreachable": 1, "not run": 1}
    assert summary_of_fleet(fleet) == [
        "hv1          ok           1 created, 0 present, 0 skipped, 0 failed; bitmaps: 1 carried, 2 left behind "
        "(1 disabled, 1 inconsistent)",
        "hypervisor2  FAILED       0 created, 1 present, 0 skipped, 1 failed; bitmaps: 1 carried, 0 left behind",
        "             - /a: is in use.",
        "hv3          UNREACHABLE  Connection refused",
        "hv4          NOT RUN      Its turn never came: too many hosts before it failed, or an earlier play lost it.",
        "4 hosts: 1 ok, 1 failed, 1 unreachable, 1 not run. 1 created, 1 present, 0 skipped, 1 failed; "
        "bitmaps: 2 carried, 2 left behind (1 disabled, 1 inconsistent)",
    ]


def test_a_fleet_in_check_mode_says_so():
    assert summary_of_fleet(fleet_report({}, check_mode=True))[-1].startswith("Check mode, nothing was changed.")


def test_a_pattern_tells_how_many_domains_it_matches():
    assert asked(["web*", "d?", "x*"], "web1", "web2", "db")["patterns"] == {"web*": 2, "d?": 1, "x*": 0}
    assert asked(["[ab]"], "[ab]", "a")["patterns"] == {"[ab]": 2}
    assert report((), [CRASHED], patterns=["web*"])["patterns"] == {}


def test_a_pattern_that_matches_nowhere_is_a_problem_of_the_fleet():
    hosts = {"hv1": asked(["web*", "bd*"], "web"), "hv2": asked(["web*", "bd*"])}
    fleet = fleet_report(hosts, check_mode=False)
    told = "bd*: no domain of any host that was asked for it matches it. Correct it, or set overlay_allow_nothing."
    assert fleet["problems"] == [{"code": "no_match", "msg": told}]
    assert summary_of_fleet(fleet)[-2] == fleet["problems"][0]["msg"]
    assert (fleet["states"]["ok"], fleet["repeat"]) == (2, [])
    assert codes(fleet_report(hosts, check_mode=False, allows_nothing=True)) == []


def test_one_host_of_many_may_lack_what_it_is_asked_for():
    assert codes(fleet_report({"hv1": asked(["web*"], "web"), "hv2": asked(["web*"])}, check_mode=False)) == []
    # But not by a pattern of its own.
    hosts = {"hv1": asked(["web*"], "web"), "hv2": asked(["x*"])}
    assert codes(fleet_report(hosts, check_mode=False)) == ["no_match"]
    assert codes(fleet_report({"hv2": asked(["x*"])}, check_mode=False)) == ["no_match"]


def test_a_fleet_in_which_there_was_nothing_to_do_is_a_problem():
    assert codes(fleet_report({"hv1": asked(["*"]), "hv2": report([of_disks()])}, check_mode=True)) == ["nothing_done"]
    assert codes(fleet_report({"hv1": asked(["*"])}, check_mode=False, allows_nothing=True)) == []
    disks = report(
        [of_disks(overlay(A, "present"))], [of_domains()], chains((A, {"monday": VALID}, {})), patterns=["*"]
    )
    assert codes(fleet_report({"hv1": disks, "hv2": disks}, check_mode=False)) == []
    left_out = report((), [of_domains(("web", "skipped"))])
    assert codes(fleet_report({"hv1": left_out}, check_mode=False)) == []


@pytest.mark.parametrize(
    "unknown",
    [report([GONE]), None, report((), [CRASHED], patterns=["x*"]), report(waiting_for=["qemu-utils"], check_mode=True)],
)
def test_where_nobody_could_look_it_may_be(unknown):
    assert codes(fleet_report({"hv1": asked(["x*"]), "hv2": asked(["x*"]), "hv3": unknown}, check_mode=False)) == []


def test_the_hosts_to_repeat_are_those_that_are_not_ok():
    hosts = {"hv1": asked(["*"], "web"), "hv2": report([GONE]), "hv3": report(problem="x"), "hv4": None}
    assert fleet_report(hosts, check_mode=False)["repeat"] == ["hv2", "hv3", "hv4"]


def in_one_call(*overlays, before=None, again=(), **more):
    """Return what qcow2_overlay returns with the option verify."""
    looks = {"preflight": before or of_disks(*overlays), "again": again and of_disks(*again), "check_mode": False}
    return {**of_disks(*overlays), **looks, "chains": chains((A, {"monday": VALID}, {}))["disks"], **more}


def test_a_run_with_verify_tells_all_three_steps():
    one = in_one_call(overlay(A), again=[overlay(A, "present")])
    result = report(pass_of(None, one, check_mode=False))
    assert (result["state"], result["created"], result["examined"]) == ("ok", 1, [A])
    one = in_one_call(overlay(A), again=[overlay(A)])
    assert "the idempotence check finds otherwise" in messages(report(pass_of(None, one, check_mode=False)))[0]
    one = in_one_call(overlay(A), again=[overlay(A, "present")], chains=chains((A, {"monday": BROKEN}, {}))["disks"])
    assert [one["code"] for one in report(pass_of(None, one, check_mode=False))["problems"]] == ["no_backup"]


def test_what_was_held_back_is_told_with_the_overlay_alone():
    held = overlay(A, "failed", code="held_back", msg="is left as it is.")
    one = in_one_call(held, overlay("/b.snap.qcow2", "failed"), before=of_disks(overlay(A)), again=None)
    result = report(pass_of(None, one, check_mode=False))
    assert (result["created"], result["failed"]) == (0, 2)
    assert [one["code"] for one in result["overlays"]] == ["held_back", "in_use"]
    assert [one["code"] for one in result["problems"]] == ["in_use"]


def test_a_refusal_before_anything_was_done_is_no_loss():
    refused = {"failed": True, "msg": "wrong.", "code": "bad_option"}
    assert report(pass_of(None, refused, check_mode=False))["problems"] == [{"code": "bad_option", "msg": "wrong."}]


def test_of_a_run_that_is_lost_a_look_afterwards_tells():
    result = report(pass_of(None, CRASHED, of_disks(overlay(A, "present")), check_mode=False), chains=chains())
    assert (result["present"], result["state"]) == (1, "failed")
    assert [one["code"] for one in result["problems"]][:2] == ["module_failed", "module_failed"]
    # A prediction of the look afterwards is no deed.
    assert report(pass_of(None, CRASHED, of_disks(overlay(A)), check_mode=False))["failed"] == 1


def test_a_run_that_was_refused_after_the_first_look_is_told_by_the_second():
    refused = {"failed": True, "msg": "gone.", "code": "no_qemu", "changed": False}
    one = {**refused, "preflight": of_disks(overlay(A)), "again": of_disks(overlay(A)), "chains": []}
    result = report(pass_of(None, one, check_mode=False))
    assert (result["created"], result["failed"]) == (0, 1)
    assert result["problems"][0] == {"code": "no_qemu", "msg": "gone."}


def test_a_host_that_is_not_reached_in_its_only_call_is_just_that():
    result = report(pass_of(None, GONE, check_mode=False))
    assert (result["state"], messages(result)) == ("unreachable", ["Connection refused"])


def test_check_mode_reads_what_would_be_done():
    one = in_one_call(
        overlay(A), again=None, check_mode=True, chains=chains(("/a.qcow2", {"monday": VALID}, {}))["disks"]
    )
    result = report(pass_of(None, one, check_mode=True), check_mode=True)
    assert (result["created"], result["examined"], result["state"]) == (1, ["/a.qcow2"], "ok")


@pytest.mark.parametrize("state", ["committed", "reverted"])
def test_what_is_done_must_be_absent_then(state):
    done, gone = overlay(A, state, kept_as=f"{A}.{state}"), overlay(A, "absent")
    result = report(
        [of_disks(done), of_disks(done), of_disks(gone)], chains=chains(("/a.qcow2", {"monday": VALID}, {}))
    )
    assert (result["state"], result[state], result["absent"]) == ("ok", 1, 0)
    assert (result["overlays"][0]["kept_as"], result["overlays"][0]["examine"]) == (f"{A}.{state}", "/a.qcow2")
    result = report([of_disks(done), of_disks(done), of_disks(done)])
    assert "a second run would do it once more" in messages(result)[0]


@pytest.mark.parametrize(
    "wanted, words",
    [
        ("present", "0 created, 0 present, 1 committed, 0 skipped, 0 failed"),
        ("committed", "1 committed, 0 absent, 0 skipped, 0 failed"),
        ("reverted", "1 committed, 0 reverted, 0 absent, 0 skipped, 0 failed"),
    ],
)
def test_the_line_of_a_host_has_the_counts_of_what_was_asked_for(wanted, words):
    result = report([of_disks(overlay(A, "committed", bitmaps=()))], wanted=wanted, check_mode=True)
    assert summary_of_host(result).startswith(words)
    assert fleet_report({"hv1": None, "hv2": result}, check_mode=True)["wanted"] == wanted


def test_what_went_with_domains_is_told_by_domain():
    made = of_domains(("web", "reverted", overlay(A, "reverted", bitmaps=())))
    made["domains"][0]["lost_checkpoints"] = ["tuesday"]
    made["domains"][0]["picked_snapshots"] = [{"snapshot": "jan", "modified": 1, "size": 2}]
    result = report((), [made])
    assert result["lost_checkpoints"] == [{"domain": "web", "checkpoint": "tuesday"}]
    assert result["picked_snapshots"] == [{"domain": "web", "snapshot": "jan", "modified": 1, "size": 2}]
