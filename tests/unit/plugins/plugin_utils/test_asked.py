# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the variables of the role ask for: the options of the modules, and what is no sensible wish."""

from __future__ import annotations

import datetime

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._asked import DISKS, DOMAINS, asked, variables

DISK = {"path": "/srv/a.snap.qcow2", "backing_file": "/srv/a.qcow2"}
EVERYTHING = {
    "disks": [DISK],
    "snapshot": "monday",
    "directory": "/srv/overlays",
    "running": "live",
    "quiesce": True,
    "owner": "root",
    "cluster_size": "128K",
    "speed": "1M",
    "retire": "keep",
    "parallel": 2,
    "confirm_all": True,
    "targets": ["vda"],
    "timeout": 5,
}


def options(state, **given):
    wish = asked(state, given, ())
    assert wish.mistake == ""
    return wish.options


def test_an_option_without_meaning_in_the_state_is_left_out():
    both = {"directory": "/srv/overlays", "running": "live", "disks": ["vda"], "snapshot": "monday", "name": ["*"]}
    new = {"owner": "root", "cluster_size": "128K", "timeout": 5}
    away = {"retire": "keep", "timeout": 5}
    present, committed, reverted = (options(state, **EVERYTHING) for state in ("present", "committed", "reverted"))
    assert present[DISKS] == {"state": "present", "overlays": [DISK], **new}
    assert present[DOMAINS] == {"state": "present", **both, **new, "quiesce": True}
    assert committed[DISKS] == {"state": "committed", "overlays": [DISK], **away, "speed": "1M", "parallel": 2}
    assert committed[DOMAINS] == {"state": "committed", **both, **away, "speed": "1M"}
    assert reverted[DISKS] == {"state": "reverted", "overlays": [DISK], **away}
    assert reverted[DOMAINS] == {"state": "reverted", **both, **away, "confirm_all": True}


def test_an_empty_state_is_passed_on_and_never_taken_for_present():
    wish = asked("", {"disks": [DISK], "owner": "root"}, ())
    assert wish.options == {DISKS: {"state": "", "overlays": [DISK]}}


def test_progress_is_shown_unless_it_is_turned_off():
    given = [{}, {"progress": ""}, {"progress": None}, {"progress": "no"}, {"progress": False}]
    shown = [asked("present", {"disks": [DISK], **one}, ()).progress for one in given]
    assert shown == [True, True, True, False, False]


def test_quiesce_has_a_meaning_only_with_live():
    assert "quiesce" not in options("present", snapshot="monday", quiesce=True)[DOMAINS]
    assert "quiesce" not in options("present", snapshot="monday", quiesce=True, running="skip")[DOMAINS]


@pytest.mark.parametrize(
    "state, given, called",
    [
        ("present", {"disks": [DISK]}, [DISKS]),
        ("present", {"disks": [DISK], "snapshot": "monday"}, [DISKS, DOMAINS]),
        ("present", {"disks": []}, []),
        ("present", {"snapshot": "monday", "domains": []}, []),
        ("present", {"snapshot": "monday", "domains": None}, [DOMAINS]),
        ("committed", {"older_than": "30d"}, [DOMAINS]),
        ("committed", {"keep": 3, "disks": [DISK]}, [DISKS, DOMAINS]),
    ],
)
def test_a_module_is_called_if_there_is_something_for_it(state, given, called):
    assert list(options(state, **given)) == called


@pytest.mark.parametrize(
    "domains, names",
    [
        ("web*,db", ["web*", "db"]),
        ("web*, db* ", ["web*", "db*"]),
        (101, ["101"]),
        ('["web", "db"]', ["web", "db"]),  # as from the command line
        ("[ab]*", ["[ab]*"]),
        (["a, b", " c"], ["a, b", " c"]),  # such names are possible
        (["web", [101, None], datetime.date(2024, 6, 1)], ["web", "101", "2024-06-01"]),
    ],
)
def test_names_of_domains_are_texts(domains, names):
    assert options("present", snapshot="monday", domains=domains)[DOMAINS]["name"] == names


def test_targets_of_disks_are_split_alike():
    assert options("present", snapshot="monday", targets="vda, vdb")[DOMAINS]["disks"] == ["vda", "vdb"]


@pytest.mark.parametrize("snapshot", ["1.10", 7, datetime.date(2024, 6, 1), "true"])
def test_a_name_that_is_as_it_was_written_is_taken(snapshot):
    assert options("present", snapshot=snapshot)[DOMAINS]["snapshot"] == str(snapshot)


@pytest.mark.parametrize(
    "state, given, mistake",
    [
        ("present", {}, "Nothing was asked for"),
        ("commited", {"snapshot": "monday"}, "overlay_state=commited must be one of present, committed, reverted."),
        ("present", {"disks": None}, "Nothing was asked for"),
        ("present", {"domains": None, "disks": None}, "Nothing was asked for"),
        ("committed", {"older_than": None, "keep": None}, "Nothing was asked for"),
        ("present", {"snapshot": "s", "domains": ""}, "overlay_domains is empty"),
        ("present", {"domains": "", "disks": [DISK]}, "overlay_domains is empty"),
        ("present", {"snapshot": "s", "domains": "web,"}, "overlay_domains has an empty name in it"),
        ("committed", {"snapshot": "s", "domains": ["web", ""]}, "overlay_domains has an empty name in it"),
        ("reverted", {"snapshot": "s", "domains": ["web", " "]}, "overlay_domains has an empty name in it"),
        ("present", {"snapshot": "s", "targets": "vda,"}, "overlay_targets has an empty name in it"),
        ("present", {"snapshot": None}, "is empty"),
        ("present", {"snapshot": "  "}, "is empty"),
        ("present", {"snapshot": 1.1}, "is 1.1 for YAML"),
        ("present", {"snapshot": True}, "is True for YAML"),
        ("present", {"snapshot": datetime.datetime(2024, 6, 1, 12)}, "is 2024-06-01 12:00:00 for YAML"),
        ("present", {"domains": ["web"]}, "needs overlay_snapshot"),
        ("present", {"domains": ["web"], "disks": [DISK]}, "needs overlay_snapshot"),
        ("reverted", {"older_than": "30d"}, "Nothing was asked for"),
        ("present", {"snapshot": "s", "task_timeout": "5m"}, "overlay_task_timeout=5m must be a number of seconds"),
        ("present", {"snapshot": "s", "task_timeout": -1}, "overlay_task_timeout=-1 must be a number of seconds"),
        ("committed", {"older_than": "30d", "snapshot": "monday"}, "and not both"),
        ("committed", {"keep": 0, "snapshot": "monday"}, "and not both"),
    ],
)
def test_what_is_most_likely_a_mistake_is_none_of_the_wishes(state, given, mistake):
    assert mistake in asked(state, given, ()).mistake


def test_what_is_misspelt_comes_first():
    assert asked("present", {}, ["a: unknown.", "b: unknown."]).mistake == "a: unknown. b: unknown."


def test_only_what_has_a_meaning_is_looked_into():
    assert "speed" not in variables("present")
    assert "owner" not in variables("committed")
    assert {"targets", "directory", "timeout", "task_timeout"} <= set(variables("reverted"))


@pytest.mark.parametrize("given, seconds", [({}, 0), ({"task_timeout": None}, 0), ({"task_timeout": "600"}, 600)])
def test_a_call_may_take_so_many_seconds(given, seconds):
    assert asked("present", {"snapshot": "s", **given}, ()).timeout == seconds


def test_an_empty_key_leaves_an_option_to_its_default():
    empty = dict.fromkeys(set(variables("present")) - {"snapshot"})
    wanted = {DOMAINS: {"state": "present", "name": ["*"], "snapshot": "monday"}}
    assert options("present", snapshot="monday", **empty) == wanted


@pytest.mark.parametrize("empty", [{}, {"all_or_none": None, "install": None, "progress": None}])
def test_an_empty_key_is_none(empty):
    wish = asked("present", {"snapshot": "s", **empty}, ())
    assert (wish.all_or_none, wish.installs, wish.progress) == (False, False, True)
    wish = asked("present", {"snapshot": "s", "all_or_none": "yes", "install": True, "progress": "no"}, ())
    assert (wish.all_or_none, wish.installs, wish.progress) == (True, True, False)
