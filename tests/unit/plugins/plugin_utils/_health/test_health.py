# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the report says of the health of domains, hosts and the fleet, and with which command."""

from __future__ import annotations

import glob
import json
import shlex

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Unreadable
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.carried import as_text, from_text
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.commands import Place
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.domain import DAY, Limits, domain_health
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.metrics import metrics
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.page import lane_of, page_data, visible
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.report import Look, fleet_health, host_health
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.text import size, summary

NOW = 1_800_000_000
ENDED = "2026-01-31T12:00:00Z"


def image(path, bitmaps="", snapshot=None, *, days=1, in_use=False, corrupt=False):
    """Return an image with bitmaps; "one! two0 three" are a broken one, a disabled one and a good one."""
    return {
        "path": path,
        "format": "qcow2",
        "virtual_size": 1 << 30,
        "actual_size": 1 << 20,
        "in_use": in_use,
        "corrupt": corrupt,
        "modified": NOW - days * DAY,
        "made": None,
        "snapshot": snapshot,
        "bitmaps": [
            {"name": name.rstrip("!0"), "recording": name[-1] != "0", "inconsistent": name.endswith("!")}
            for name in bitmaps.split()
        ],
    }


def checkpoint(name="one", problem=None, valid=None, **bitmaps):
    """Return a checkpoint, of vda alone unless told otherwise."""
    is_valid = problem is None if valid is None else valid
    return {
        "name": name,
        "created": NOW - 2 * DAY,
        "parent": None,
        "valid": is_valid,
        "problem": problem,
        "image": None,
        "advice": "Mend it." if problem else None,
        "dirty_bytes": 4096 if is_valid else None,
        "top_alone": None,
        "bitmaps": bitmaps or {"vda": name},
    }


def domain(*images, checkpoints=(), next_backup="incremental", name="web", state="shut off", **more):
    """Return a domain with one disk as domain_info does."""
    source = images[0]["path"] if images else None
    since = next((one["name"] for one in checkpoints if one["valid"]), None)
    return {
        "name": name,
        "uuid": "4dea22b3-1d52-d8f3-2516-782e98ab3fa0",
        "state": state,
        "managed_save": False,
        "libvirt_snapshots": [],
        "disks": [{"target": "vda", "source": source, "unfit": None, "images": list(images)}],
        "checkpoints": list(checkpoints),
        "orphan_bitmaps": [],
        "unfinished": [],
        "next_backup": next_backup,
        "next_backup_since": since if next_backup == "incremental" else None,
        "next_backup_reason": "So it is.",
        **more,
    }


def judged(told, **limits):
    return domain_health(Place("hv1"), told, Limits(**limits), NOW)


def found(told, **limits):
    """Return the findings by code, with the words of their commands."""
    findings = judged(told, **limits)["findings"]
    return {one["code"]: shlex.split(one["command"]) if one["command"] else None for one in findings}


@pytest.mark.parametrize(
    "next_backup, broken, limits, health",
    [
        ("incremental", False, {}, "ok"),
        ("incremental", True, {}, "attention"),
        ("full", False, {}, "full"),
        ("unknown", False, {}, "unknown"),
        ("full", True, {"without_backup": ("w*",)}, "left out"),
        ("full", False, {"without_backup": ("db", "eb")}, "full"),
    ],
)
def test_what_a_domain_is(next_backup, broken, limits, health):
    checkpoints = [checkpoint(), *([checkpoint("two", "gap")] if broken else [])]
    told = domain(image("/a", "one two"), checkpoints=checkpoints, next_backup=next_backup)
    assert judged(told, **limits)["health"] == health


def test_figures_of_a_domain():
    images = [image("/c", "one", "friday"), image("/b", "one", "monday", days=3), image("/a", "one", days=7)]
    one = judged(domain(*images, checkpoints=[checkpoint()]))
    assert one["longest_chain"] == 3
    assert one["oldest_snapshot"] == NOW - 7 * DAY  # monday was taken when /a was written to last
    assert one["snapshot_bytes"] == 2 << 20
    assert one["increment_bytes"] == 4096
    assert one["findings"] == []


@pytest.mark.parametrize("limit, told", [(0, False), (1, True), (2, True), (3, False)])
def test_chains_that_are_too_long(limit, told):
    images = [image("/c", "", "friday"), image("/b", "", "monday"), image("/a")]
    words = found(domain(*images), longest_chain=limit)
    assert ("long_chain" in words) is told
    if told:
        assert words["long_chain"][-2:] == ["-a", '{"name": ["web"], "snapshot": "monday", "state": "committed"}']


@pytest.mark.parametrize("days, told", [(0, []), (2.5, ["monday"]), (0.5, ["friday", "monday"]), (4, [])])
def test_snapshots_that_are_too_old(days, told):
    images = [image("/c", "", "friday"), image("/b", "", "monday"), image("/a", days=3)]
    findings = judged(domain(*images), oldest_snapshot=days)["findings"]
    assert [json.loads(shlex.split(one["command"])[-1])["snapshot"] for one in findings] == told


def test_what_is_written_to_the_image_below_later_does_not_make_a_snapshot_younger():
    """As when a backup tool removes a checkpoint."""
    for made, oldest in ((NOW - 30 * DAY, NOW - 30 * DAY), (NOW, NOW - 9 * DAY)):
        top = {**image("/b", "/a", "monday"), "made": made}
        assert judged(domain(top, image("/a", days=9)))["oldest_snapshot"] == oldest


def test_a_snapshot_of_which_the_age_is_not_known_is_not_too_old():
    below = {**image("/dev/vg/a"), "modified": None}
    one = judged(domain(image("/b", "", "monday"), below), oldest_snapshot=1)
    assert one["findings"] == []
    assert one["oldest_snapshot"] is None


HEAL = ["ansible", "hv1", "-b", "-m", "kvmfleet.qcow2.domain_checkpoint", "-a"]
HEALING = {"target": "vda", "image": "/a", "kind": "healing", "snapshot": None, "what": "is", "completed_by": "Run."}
HEALED = [*HEAL, '{"name": ["web"], "checkpoints": ["one"]}']
MERGE = '{"name": ["web"], "snapshot": "monday", "state": "committed"}'
MERGED = [*HEAL[:-2], "kvmfleet.qcow2.domain_overlay", "-a", MERGE]
REMOVED = [*HEAL, '{"name": ["web"], "checkpoints": ["one"], "unusable": "remove"}']


@pytest.mark.parametrize(
    "problem, images, command",
    [
        ("not_in_top", [image("/b"), image("/a", "one")], HEALED),
        ("inconsistent", [image("/b", "one!"), image("/a", "one")], HEALED),
        ("inconsistent", [image("/a", "one!")], None),  # it may have been emptied
        ("inconsistent", [image("/b", "one"), image("/a", "one!")], None),
        ("not_recording", [image("/a", "one0")], None),
        ("not_in_top", [image("/b"), image("/a", "one0")], None),
        ("different_size", [image("/b", "one"), image("/a", "one")], None),
        ("not_in_top", [image("/b"), image("/a", "other")], REMOVED),
    ],
)
def test_the_command_for_a_broken_checkpoint(problem, images, command):
    told = domain(*images, checkpoints=[checkpoint(problem=problem)], next_backup="full")
    assert found(told)["broken_checkpoint"] == command
    for state in ({"state": "running"}, {"managed_save": True}, {"unfinished": [HEALING]}):
        assert found({**told, **state})["broken_checkpoint"] is None


def test_the_command_mends_all_checkpoints_that_are_broken_alike():
    problems = {"one": "not_in_top", "t*o": "not_in_top", "gone": "not_in_top", "off": "not_recording", "fine": None}
    checkpoints = [checkpoint(name, problem) for name, problem in problems.items()]
    told = domain(image("/b", "fine"), image("/a", "one t*o off0 fine"), checkpoints=checkpoints)
    words = [one["command"] and shlex.split(one["command"])[-1] for one in judged(told)["findings"]]
    both = '{"name": ["web"], "checkpoints": ["one", "t[*/]o"]}'  # and no other that the name would match as a pattern
    assert words == [both, both, '{"name": ["web"], "checkpoints": ["gone"], "unusable": "remove"}', None]


@pytest.mark.parametrize(
    "name", ["web", "*", "w*", "web?", "[ab]", "a]", "a-[b", "!", "[!a]*", " web", "web\t", " ", "a, b"]
)
def test_a_command_names_its_domain_and_no_other(name):
    told = domain(image("/a", "one"), name=name, orphan_bitmaps=[{"image": "/a", "bitmaps": ["one"]}])
    (asked,) = json.loads(found(told)["orphan_bitmaps"][-1])["name"]
    assert asked == asked.strip()  # a blank around it would be refused
    # A domain that is called as the pattern would be glob.escape()'s; libvirt allows no slash.
    others = [glob.escape(name), "web", "w1", "web1", "a", "b", "*", " ", "x", "web ", "webweb"]
    found_names = [
        one.name for one in Inventory({one: Unreadable(one, None) for one in {name, *others}}).select([asked])[0]
    ]
    assert found_names == [name]


def test_the_command_asks_the_daemon_that_was_asked():
    told = domain(image("/b"), image("/a", "one"), checkpoints=[checkpoint(problem="not_in_top")], next_backup="full")
    for uri, arguments in {
        "": '{"name": ["web"], "checkpoints": ["one"]}',
        "qemu:///system": '{"name": ["web"], "checkpoints": ["one"]}',
        "qemu:///x": '{"name": ["web"], "checkpoints": ["one"], "uri": "qemu:///x"}',
    }.items():
        (command,) = (one["command"] for one in domain_health(Place("hv1", uri), told, Limits(), NOW)["findings"][1:])
        assert shlex.split(command)[-1] == arguments


@pytest.mark.parametrize("host, told", [("hv1.example.com", True), ("fe80::1", True), ("hv*", False), ("-i", False)])
def test_no_command_for_a_host_whose_name_is_a_pattern(host, told):
    one = domain(image("/b", "", "monday"), image("/a"))
    (finding,) = domain_health(Place(host), one, Limits(longest_chain=1), NOW)["findings"]
    assert (finding["command"] is not None) is told


def test_a_checkpoint_is_not_forgotten_while_an_image_could_not_be_read():
    told = domain(image("/b"), checkpoints=[checkpoint(problem="not_in_top")], next_backup="full")
    told["disks"][0].update(msg="/a: does not exist.", code="no_such_file")
    assert found(told) == {"full": None, "unreadable_disk": None, "broken_checkpoint": None}


def test_a_bitmap_is_called_as_its_disk_says():
    told = domain(image("/b"), image("/a", "own"), checkpoints=[checkpoint(problem="not_in_top", vda="own")])
    assert found(told)["broken_checkpoint"] == HEALED


def test_an_image_further_down_that_is_marked_corrupt():
    images = [image("/c"), image("/b"), image("/a", corrupt=True)]
    judgement = judged(domain(*images))
    (finding,) = judgement["findings"]
    assert (judgement["health"], finding["code"]) == ("attention", "corrupt_image")
    assert "vda: /a is marked corrupt" in finding["msg"]
    assert "qemu-img check" in finding["msg"]
    # Of the topmost one domain_info tells that the disk cannot be read.
    assert found(domain(image("/a", corrupt=True))) == {}


def test_orphans_are_removed_from_all_disks_at_once():
    orphans = [
        {"target": "vda", "image": "/a", "bitmaps": ["x", "y"]},
        {"target": "vdb", "image": "/b", "bitmaps": ["z"]},
    ]
    told = domain(image("/a"), orphan_bitmaps=orphans)
    (finding,) = judged(told)["findings"]
    assert finding["msg"].startswith("No checkpoint refers to x, y in /a; z in /b. ")
    assert shlex.split(finding["command"]) == [*HEAL, '{"name": ["web"], "checkpoints": [], "orphans": "remove"}']
    told["disks"][0].update(msg="is damaged", code="damaged")
    assert found(told)["orphan_bitmaps"] is None
    assert found({**told, "orphan_bitmaps": None}) == {"unreadable_disk": None}


@pytest.mark.parametrize(
    "left, command",
    [
        (HEALING, [*HEAL, '{"name": ["web"]}']),
        ({**HEALING, "kind": "commit"}, None),  # it is not known of which snapshot
        ({**HEALING, "kind": "commit", "snapshot": "monday"}, MERGED),
    ],
)
def test_what_completes_unfinished_work(left, command):
    told = domain(image("/a"), unfinished=[left])
    assert found(told)["unfinished"] == command
    assert found({**told, "state": "running"}) == {"unfinished": None}
    told["disks"][0].update(msg="/b does not exist.", code="no_such_file")
    assert found(told)["unfinished"] is None


def test_no_other_snapshot_is_merged_down_before_what_is_unfinished():
    images = [image("/c", "", "friday"), image("/b", "", "monday"), image("/a")]
    left = {**HEALING, "kind": "commit", "snapshot": "monday"}
    assert found(domain(*images, unfinished=[left]), longest_chain=1)["long_chain"] is not None
    assert found(domain(*images, unfinished=[HEALING]), longest_chain=1)["long_chain"] is None
    assert found(domain(*images, libvirt_snapshots=["s"]), longest_chain=1)["long_chain"] is None


@pytest.mark.parametrize("name", ["{{ x }}", "{% x", "{# x"])
def test_no_command_has_a_template_in_it(name):
    assert found(domain(image(f"/{name}", "", "monday"), image("/a")), longest_chain=1)["long_chain"] is not None
    told = domain(image("/b", "", "monday"), image("/a"), name=name)
    assert found(told, longest_chain=1) == {"long_chain": None}


@pytest.mark.parametrize("name", ["-f", "a\nb", "a\u202eb", "ä"])
def test_what_a_terminal_would_show_otherwise_is_spelt_out(name):
    told = domain(image("/a"), checkpoints=[checkpoint(name, "not_in_top")], next_backup="full")
    (*_words, arguments) = found(told)["broken_checkpoint"]
    assert arguments.isascii()
    assert arguments.isprintable()
    assert json.loads(arguments)["checkpoints"] == [name]


def test_what_is_quoted_for_a_shell():
    told = domain(image("/b", "", 'it\'s $(x) `y` "z"'), image("/a"), name="ünï\u202e")
    command = judged(told, longest_chain=1)["findings"][0]["command"]
    assert command.isascii()
    assert json.loads(shlex.split(command)[-1])["snapshot"] == 'it\'s $(x) `y` "z"'


def report_on(*domains, **more):
    return host_health(Place("hv1"), Look({"domains": list(domains), **more}, patterns=("w*",)), Limits(), NOW)


WELL = domain(image("/a", "one"), checkpoints=[checkpoint()])
FULL = domain(image("/a"), next_backup="full", name="db")
ODD = domain(image("/a", "one"), checkpoints=[checkpoint(), checkpoint("two", "gap")], name="odd")
GONE = host_health(Place("hv2"), Look({"unreachable": True, "msg": "Connection refused"}), Limits(), NOW)


@pytest.mark.parametrize(
    "hosts, fail_on, ready, failed",
    [
        ({"hv1": report_on(WELL)}, "full", True, {}),
        ({"hv1": report_on(WELL, FULL, FULL)}, "full", False, {"hv1": 2}),
        ({"hv1": report_on(WELL, ODD)}, "full", True, {}),
        ({"hv1": report_on(WELL, ODD)}, "attention", True, {"hv1": 1}),
        ({"hv1": report_on(WELL, FULL)}, "never", False, {}),
        ({"hv1": report_on(WELL), "hv2": GONE}, "full", False, {"hv2": 1}),
        ({"hv1": report_on(WELL), "hv2": GONE}, "never", False, {}),
        ({"hv1": report_on(WELL), "hv2": None}, "full", False, {"hv2": 1}),
    ],
)
def test_what_fails(hosts, fail_on, ready, failed):
    report = fleet_health(hosts, fail_on=fail_on)
    assert report["ready"] is ready
    assert report["failed_hosts"] == failed


@pytest.mark.parametrize(
    "result, state, code",
    [
        ({"unreachable": True, "msg": "x"}, "unreachable", "unreachable"),
        ({"failed": True, "msg": "x", "code": "libvirt_unreachable"}, "failed", "libvirt_unreachable"),
        ({"failed": True, "msg": "x"}, "failed", "module_failed"),
        (None, "failed", "not_run"),
    ],
)
def test_hosts_that_could_not_be_asked(result, state, code):
    report = host_health(Place("hv1"), Look(result), Limits(), NOW)
    assert report["state"] == state
    assert [one["code"] for one in report["problems"]] == [code]


def test_a_domain_that_cannot_be_looked_at_is_unknown_and_its_host_is_told_of():
    nothing = ("uuid", "state", "managed_save", "orphan_bitmaps")
    one = {**domain(next_backup="unknown"), **dict.fromkeys(nothing), "disks": [], "msg": "No.", "code": "no_domain"}
    report = report_on(WELL, one, failed=True, msg="No.", code="no_domain")
    assert report["state"] == "ok"
    assert report["healths"] == {"full": 0, "unknown": 1, "attention": 0, "ok": 1, "left out": 0}
    assert fleet_health({"hv1": report})["failed_hosts"] == {"hv1": 1}


def test_what_was_asked_for_and_is_nowhere():
    nothing = host_health(Place("hv1"), Look({"domains": []}, patterns=("x*",)), Limits(), NOW)
    every = host_health(Place("hv1"), Look({"domains": []}, patterns=("*",)), Limits(), NOW)
    assert [one["code"] for one in fleet_health({"hv1": nothing})["problems"]] == ["no_match"]
    assert [one["code"] for one in fleet_health({"hv1": every})["problems"]] == ["nothing_done"]
    assert not fleet_health({"hv1": every})["ready"]
    assert fleet_health({"hv1": every}, allows_nothing=True)["ready"]
    assert fleet_health({"hv1": every, "hv2": GONE})["problems"] == []


TWIN = {**ODD, "name": "web-old", "uuid": "11111111-1d52-d8f3-2516-782e98ab3fa0"}


def test_a_domain_that_is_defined_on_two_hosts():
    clone = {**WELL, "name": "clone", "uuid": "22222222-1d52-d8f3-2516-782e98ab3fa0"}  # on images of the same names
    orphans = [{"target": "vda", "image": "/a", "bitmaps": ["x"]}]
    here, there = report_on({**TWIN, "orphan_bitmaps": orphans}, WELL), report_on(TWIN, clone)
    assert all(one["command"] for one in here["domains"][0]["findings"])
    report = fleet_health({"hv1": here, "hv2": there, "hv3": GONE}, fail_on="attention")
    told = {host: {one["name"]: one for one in of["domains"]} for host, of in report["hosts"].items()}
    assert next(one["code"] for one in told["hv1"]["web-old"]["findings"]) == "defined_twice"
    assert "a domain on hv2, too" in told["hv1"]["web-old"]["findings"][0]["msg"]
    assert "a domain on hv1, too" in told["hv2"]["web-old"]["findings"][0]["msg"]
    # One definition alone would follow what they do.
    assert not any(one["command"] for one in told["hv1"]["web-old"]["findings"])
    assert told["hv1"]["web"] == here["domains"][1]
    assert told["hv2"]["clone"] == there["domains"][1]
    assert report["findings"]["defined_twice"] == 2
    assert report["hosts"]["hv1"]["findings"]["defined_twice"] == 1


@pytest.mark.parametrize(
    "one, health",
    [(WELL, "attention"), (ODD, "attention"), (FULL, "full"), ({**WELL, "next_backup": "unknown"}, "unknown")],
)
def test_what_a_domain_is_that_is_defined_on_two_hosts(one, health):
    report = fleet_health({"hv1": report_on(one), "hv2": report_on(one)}, fail_on="attention")
    assert [of["domains"][0]["health"] for of in report["hosts"].values()] == [health, health]
    assert report["healths"][health] == 2
    assert report["failed_hosts"] == {"hv1": 1, "hv2": 1}


@pytest.mark.parametrize("count, words", [(4, "on b, c, d, too"), (5, "on b, c, d and 1 more, too")])
def test_a_domain_that_is_defined_on_many_hosts(count, words):
    report = fleet_health(dict.fromkeys("abcdefgh"[:count], report_on(WELL)))
    assert words in report["hosts"]["a"]["domains"][0]["findings"][0]["msg"]


def test_domains_of_which_no_uuid_is_known_are_not_the_same():
    one = {**WELL, "uuid": None}
    assert fleet_health({"hv1": report_on(one), "hv2": report_on(one)})["findings"] == {}


def test_the_summary_has_a_line_for_each_host_and_what_stands_in_the_way():
    lines = summary(fleet_health({"hv1": report_on(WELL, FULL, ODD), "hv22": GONE}))
    assert lines == [
        "hv1   ok           3 VMs: 1 full, 1 attention, 1 ok; next increments 8.0 KiB, in snapshots 0 B",
        "      - db: full. So it is.",
        "hv22  UNREACHABLE  Connection refused",
        "2 hosts: 1 ok, 0 failed, 1 unreachable, 0 not run. 3 VMs: 1 full, 1 attention, 1 ok; next increments 8.0 KiB, "
        "in snapshots 0 B. Not every next increment is possible.",
    ]


@pytest.mark.parametrize(
    "count, words", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 20, "10 MiB"), (5 << 50, "5120.0 TiB")]
)
def test_sizes_in_words(count, words):
    assert size(count) == words


def test_metrics_leave_out_what_has_no_value_and_escape_names():
    odd = domain(image("/a"), next_backup="full", name='a"b\\c\nd')
    text = metrics(fleet_health({"hv1": report_on(WELL, odd)}), ENDED)
    assert 'kvmfleet_health_increment_possible{host="hv1",domain="a\\"b\\\\c\\nd"} 0\n' in text
    assert 'kvmfleet_health_increment_bytes{host="hv1",domain="web"} 4096\n' in text
    assert 'kvmfleet_health_increment_bytes{host="hv1",domain="a' not in text
    assert "kvmfleet_health_run_timestamp_seconds 1769860800\n" in text


def test_a_name_is_one_series():
    text = metrics(fleet_health({"hv1": report_on(WELL, {**FULL, "name": "web"})}), ENDED)
    assert text.count("kvmfleet_health_increment_possible{") == 1


@pytest.mark.parametrize(
    "images, lane",
    [
        ([image("/c", "one"), image("/b", "one"), image("/a")], "++"),
        ([image("/c"), image("/b", "one!"), image("/a", "one0")], "-!0"),
        ([image("/c", "one!", in_use=True), image("/b", "one")], "?+"),
        ([image("/c"), image("/b")], "-"),
        ([], ""),
    ],
)
def test_the_lane_of_a_checkpoint_through_the_images(images, lane):
    assert lane_of({"images": images}, "one") == lane
    assert lane_of({"images": images}, None) is None


@pytest.mark.parametrize("text", ["<script>", "</script>", "&amp;", "\u2028", "a\u202eb", "\x00", "\ud800"])
def test_the_data_of_the_page_are_safe_within_html(text):
    told = {**domain(image(f"/{text}"), name=text, next_backup="full"), "next_backup_reason": text}
    data = page_data(fleet_health({text: report_on(told)}), ENDED)
    assert data.isascii()
    assert not set("<>&") & set(data)
    assert visible(text) in json.loads(data)["texts"]


@pytest.mark.parametrize(
    "verdicts, told", [([], True), ([False], False), ([False, False], False), ([False, True], True)]
)
def test_the_page_says_once_that_no_checkpoint_is_valid(verdicts, told):
    checkpoints = [checkpoint(str(n), None if valid else "gap", valid) for n, valid in enumerate(verdicts)]
    report = fleet_health({"hv1": report_on(domain(image("/a"), checkpoints=checkpoints, next_backup="full"))})
    data = json.loads(page_data(report, ENDED))
    assert ("So it is." in [data["texts"][one[1]] for one in data["domains"][0][11]]) is told
    assert report["findings"]["full"] == 1


@pytest.mark.parametrize("text", ["{{ x }}", "{% x %}", "{# x", "{{{% x"])
def test_a_report_as_text_has_nothing_that_looks_like_a_template(text):
    carried = as_text({"a": {"b": text}, text: [{}]})
    assert not any(mark in carried for mark in ("{{", "{%", "{#"))
    assert from_text(carried) == {"a": {"b": text}, text: [{}]}
