# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How the playbooks are made. What comes of it the integration target overlay_role shows, by runs of them."""

from __future__ import annotations

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
PLAYBOOKS = ("overlay", "health", "heal")
ALWAYS = ["always"]


def text_of(name):
    return (ROOT / f"playbooks/{name}.yml").read_text(encoding="utf-8")


def plays_of(name):
    return yaml.safe_load(text_of(name))


def tags_of(tasks):
    """Return the tags that tasks, and those of their blocks, have beside the one of what is always played."""
    parts = [one.get(part, ()) for one in tasks for part in ("block", "rescue", "always")]
    own = [tag for one in tasks for tag in one.get("tags", ()) if one["tags"] != ALWAYS]
    return own + [tag for part in parts for tag in tags_of(part)]


def test_no_task_has_a_tag_of_its_own():
    """Or it would not be true of all what one of them learns of the tags that are asked for."""
    files = [*ROOT.glob("playbooks/tasks/*.yml"), *ROOT.glob("roles/*/tasks/*.yml")]
    assert len(files) > len(PLAYBOOKS)
    for path in files:
        assert tags_of(yaml.safe_load(path.read_text(encoding="utf-8"))) == [], path
    for name in PLAYBOOKS:
        first, *others = plays_of(name)
        assert first["tags"] == ALWAYS
        assert [play for play in others if "tags" in play] == []
        assert tags_of([task for play in others for task in play.get("tasks", ())]) == []


@pytest.mark.parametrize("name", PLAYBOOKS)
def test_the_report_is_begun_whatever_tags_leave_out_and_then_these_are_refused(name):
    first, second, *_rest = plays_of(name)
    assert "ansible_skip_tags" in first["hosts"]
    imported = [task.get("ansible.builtin.import_tasks") for task in second["tasks"]]
    place = imported.index("tasks/tags.yml")
    assert set(imported[:place]) == {"tasks/write.yml"}
    assert all(task["tags"] == ALWAYS for task in second["tasks"][:place])
    assert "tags" not in second["tasks"][place]
    expect, learn, refuse = yaml.safe_load(text_of("tasks/tags"))
    assert (expect["tags"], learn.get("tags"), refuse["tags"]) == (ALWAYS, None, ALWAYS)


@pytest.mark.parametrize("name", PLAYBOOKS)
def test_an_empty_list_of_names_is_not_the_default(name):
    """`default` with true takes it for that, as it takes false."""
    empty_is_default = re.findall(r"(\w+) \| default\(([^)]*), true\)", text_of(name))
    of_ours = [one for one in empty_is_default if one[0].endswith(("_domains", "_checkpoints", "_become"))]
    # Only for the report, which has nothing to count of no names.
    assert [one for one in of_ours if one != ("heal_checkpoints", "[]")] == []
    assert not re.search(r"_become \| default\(true\)", text_of(name))  # which leaves an empty key


def test_heal_tells_what_it_did_before_the_page_is_made_and_fails_at_the_end():
    names = [play["name"] for play in plays_of("heal")]
    assert names[-4:] == [
        "Heal the checkpoints",
        "Tell what became of the fleet",
        "Look at the fleet afterwards",
        "Fail what failed",
    ]
    told = [task["name"] for task in plays_of("heal")[-3]["tasks"]]
    assert told[1:] == ["Tell what became of the fleet", "Write the report"]


@pytest.mark.parametrize("name, files", [("health", ["report", "page", "metrics"]), ("heal", ["report", "pages"])])
def test_what_could_not_be_written_or_judged_in_the_end_is_refused_at_the_beginning(name, files):
    tasks = plays_of(name)[1]["tasks"]
    imported = {task["ansible.builtin.import_tasks"]: task for task in tasks}
    assert {"tasks/places.yml", "tasks/limits.yml", "tasks/names.yml"} <= set(imported)
    places = str(imported["tasks/places.yml"]["vars"]["__fleet_files"])
    assert re.findall(r"__heal(?:th)?_([a-z]+)", places) == files
    conditions = imported["tasks/limits.yml"].get("when", "")
    assert conditions == ("__heal_pages | select | length > 0" if name == "heal" else "")


@pytest.mark.parametrize("name", ["overlay", "heal"])
def test_check_mode_leaves_the_report_of_a_run(name):
    mark = plays_of(name)[0]["vars"]
    assert mark["__fleet_mark"] == "{{ '.check' if ansible_check_mode else '' }}"
    assert "splitext | join(__fleet_mark)" in mark[f"__{name}_report_file"]
    if name == "overlay":
        assert "if not ansible_check_mode and " in mark["__overlay_retry_file"]
