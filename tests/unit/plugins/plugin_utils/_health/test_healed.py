# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the report says of what was healed on hosts and in the fleet."""

from __future__ import annotations

from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.healed import (
    Work,
    fleet_healed,
    host_healed,
    summary,
)


def domain(name, state, *checkpoints, orphans=(), **more):
    """Return a domain as domain_checkpoint returns it."""
    told = [{"name": str(number), "state": one} for number, one in enumerate(checkpoints)]
    return {"name": name, "uuid": name, "state": state, "checkpoints": told, "removed_orphans": orphans, **more}


def test_states_are_counted_and_failures_told():
    failed = domain("db", "failed", "failed", "valid", msg="db: cannot be healed. Remove it.", code="not_healable")
    orphans = [{"target": "vda", "image": "/a", "bitmaps": ["x", "y"]}]
    well = host_healed(Work({"domains": [domain("web", "rebuilt", "rebuilt", "valid", orphans=orphans)]}, "", ["web"]))
    bad = host_healed(Work({"domains": [failed, domain("on", "skipped", orphans=None)]}, "", ["*"]))
    report = fleet_healed({"hv1": well, "hv2": bad}, check_mode=False)
    assert (well["state"], bad["state"]) == ("ok", "failed")
    assert report["domain_states"] == {"valid": 0, "rebuilt": 1, "removed": 0, "skipped": 1, "failed": 1}
    assert report["checkpoint_states"] == {"valid": 2, "rebuilt": 1, "removed": 0, "failed": 1}
    assert report["removed_orphans"] == 2
    assert report["failed_hosts"] == {"hv2": 1}
    assert bad["problems"] == [{"code": "not_healable", "msg": "db: cannot be healed. Remove it."}]
    assert summary(report) == [
        "hv1  ok           1 VMs: 1 rebuilt; checkpoints: 1 valid, 1 rebuilt; 2 orphan bitmaps removed",
        "hv2  FAILED       2 VMs: 1 skipped, 1 failed; checkpoints: 1 valid, 1 failed",
        "     db: cannot be healed. Remove it.",
        "2 hosts: 1 ok, 1 failed, 0 unreachable, 0 not run. 3 VMs: 1 rebuilt, 1 skipped, 1 failed; "
        "checkpoints: 2 valid, 1 rebuilt, 1 failed; 2 orphan bitmaps removed.",
    ]


def test_it_is_told_whose_image_failed():
    failed = domain("db", "failed", msg="/srv/db.qcow2: is damaged. Repair it.", code="damaged")
    host = host_healed(Work({"domains": [failed]}, "", ["*"]))
    assert [one["msg"] for one in host["problems"]] == ["db: /srv/db.qcow2: is damaged. Repair it."]


def test_hosts_that_tell_nothing_are_told_of():
    lost = host_healed(Work({"unreachable": True, "msg": "no route"}))
    crashed = host_healed(Work({"msg": "boom"}))
    report = fleet_healed({"lost": lost, "crashed": crashed, "never": None}, check_mode=True)
    assert [host["state"] for host in report["hosts"].values()] == ["unreachable", "failed", "not run"]
    assert [host["problems"][0]["code"] for host in report["hosts"].values()] == [
        "unreachable",
        "module_failed",
        "not_run",
    ]
    assert summary(report)[-1].endswith("Nothing was changed: this is what a run would do.")


def test_what_is_nowhere_is_a_problem_unless_it_may_be():
    host = host_healed(Work({"domains": []}, "", ["web*"]))
    assert [one["code"] for one in fleet_healed({"hv": host}, check_mode=False)["problems"]] == ["no_match"]
    anything = host_healed(Work({"domains": []}, "", ["*"]))
    assert [one["code"] for one in fleet_healed({"hv": anything}, check_mode=False)["problems"]] == ["nothing_done"]
    assert fleet_healed({"hv": host}, check_mode=False, allows_nothing=True)["problems"] == []


def test_a_pattern_of_checkpoints_that_is_nowhere_is_told():
    def report(*domains, allows_nothing=False):
        hosts = {
            str(number): host_healed(Work({"domains": [one]}, "", ["*"], ["0", "nosuch*"]))
            for number, one in enumerate(domains)
        }
        return fleet_healed(hosts, check_mode=False, allows_nothing=allows_nothing)

    web, on = domain("web", "valid", "valid"), domain("on", "skipped")
    told = "nosuch*: no checkpoint of any host that was asked for it matches it. Correct it, or set heal_allow_nothing."
    assert [one["msg"] for one in report(web)["problems"]] == [told]
    assert [one["msg"] for one in report(web, domain("db", "valid"))["problems"]] == [told]
    assert report(web, allows_nothing=True)["problems"] == []
    # What was left out may have it.
    assert report(on)["hosts"]["0"]["checkpoint_patterns"] == {}
    assert report(on)["problems"] == []
    assert report(on, web, web)["problems"] == []
    assert report(web)["hosts"]["0"]["checkpoint_patterns"] == {"0": 1, "nosuch*": 0}


def test_a_pattern_of_checkpoints_of_one_host_alone_may_be_in_vain_too():
    def report(other):
        own = host_healed(Work({"domains": [domain("web", "valid", "valid")]}, "", ["*"], ["nosuch*"]))
        return fleet_healed({"own": own, "other": other}, check_mode=False)

    def healed(*domains, checkpoints=("0",)):
        return host_healed(Work({"domains": list(domains)}, "", ["*"], checkpoints))

    assert [one["code"] for one in report(healed(domain("db", "valid", "valid")))["problems"]] == ["no_match"]
    # A host that does not tell all may have it.
    assert report(healed(domain("db", "skipped"), checkpoints=("nosuch*",)))["problems"] == []
    assert report(host_healed(Work({"msg": "boom"}, "", ["*"], ["nosuch*"])))["problems"] == []
    assert report(None)["problems"] == []
