# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role, the playbook, their documentation and the schema of the report say of the same things."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import typing as t

import jsonschema
import pytest
import yaml
from ansible_collections.kvmfleet.qcow2.plugins.filter.fleet_report import make_fleet_report
from ansible_collections.kvmfleet.qcow2.plugins.filter.host_report import make_host_report
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils import _asked, _variables
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.domain import HEALTHS, FindingCode
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.healed import SCHEMA_VERSION as HEAL_VERSION
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.healed import (
    STATES,
    Work,
    fleet_healed,
    host_healed,
)
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.metrics import metrics
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._health.report import SCHEMA_VERSION as HEALTH_VERSION
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.fleet import COLLECTION_VERSION

ROOT = pathlib.Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w.])overlay_\w+")
ROLE = ROOT / "roles/overlay"
PLAYBOOK = (ROOT / "playbooks/overlay.yml").read_text(encoding="utf-8")
HEAL = json.loads((ROOT / "docs/heal.schema.json").read_text(encoding="utf-8"))
HEALTH = json.loads((ROOT / "docs/health.schema.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((ROOT / "docs/report.schema.json").read_text(encoding="utf-8"))
HEAD = {"started": "2026-01-31T12:00:00Z", "ended": None, "ansible_version": "2.18.1", "limit": None, "snapshot": None}
OPTIONS = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]["main"][
    "options"
]

OVERLAY_STATES = OPTIONS["overlay_state"]["choices"]


def load_validator():
    """Return the program that validates the reports of real runs."""
    path = ROOT / "tests/integration/targets/overlay_role/files/valid.py"
    spec = importlib.util.spec_from_file_location("valid", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VALID = load_validator()


def documented(name, kind="filter"):
    """Return what a filter, or a module, returns, by its documentation."""
    text = (ROOT / f"plugins/{kind}/{name}.py").read_text(encoding="utf-8")
    told = yaml.safe_load(text.split('RETURN = r"""')[1].split('"""')[0])
    return told["_value"]["contains"] if kind == "filter" else told


def names(folder):
    """Return the names of variables that the files of a folder of the role have."""
    return {name for path in (ROLE / folder).glob("*.yml") for name in NAME.findall(path.read_text(encoding="utf-8"))}


def test_the_known_variables_are_those_that_role_and_playbook_use():
    read = {_asked.PREFIX + name for state in OVERLAY_STATES for name in _asked.variables(state)}
    used = {"overlay_state", *read} | names("tasks") | names("vars") | names("defaults")
    assert used - {"overlay_result", "overlay_host"} == set(OPTIONS)
    of_playbook = set(NAME.findall(PLAYBOOK)) - set(OPTIONS) - {"overlay_result"}
    assert of_playbook == set(_variables.OF_PLAYBOOK)
    assert _variables.known_variables() == {*OPTIONS, *_variables.OF_PLAYBOOK, "overlay_result"}


def test_each_variable_of_the_playbook_has_its_words():
    head = PLAYBOOK.split("\n- name:")[0]
    fleet = (ROOT / "docs/fleet.md").read_text(encoding="utf-8")
    for name in _variables.OF_PLAYBOOK:
        assert f"#   {name} " in head, name
        assert f"`{name}`" in fleet, name


@pytest.mark.parametrize("name", ["health", "heal"])
def test_the_known_variables_of_a_playbook_are_those_that_it_uses_and_each_has_its_words(name):
    text = (ROOT / f"playbooks/{name}.yml").read_text(encoding="utf-8")
    head, _rest = text.split("\n- name:", 1)
    used = set(re.findall(rf"(?<![\w.]){name}_\w+", text)) - {f"{name}_result"}
    assert used == set(_variables.FAMILIES[name].of_playbook)
    assert _variables.known_variables(name) == {*used, f"{name}_result"}
    page = (ROOT / "docs/health.md").read_text(encoding="utf-8")
    for variable in used:
        assert f"#   {variable} " in head, variable
        assert re.search(rf"^\| .*`{variable}`.* \|", page, re.MULTILINE), variable


def test_each_finding_is_in_the_schema_and_has_its_row():
    codes = sorted(t.get_args(FindingCode))
    table = (ROOT / "docs/health.md").read_text(encoding="utf-8").split("| finding |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE) == codes
    assert HEALTH["$defs"]["finding"]["properties"]["code"]["enum"] == codes
    assert HEALTH["properties"]["findings"]["propertyNames"]["enum"] == codes
    assert HEALTH["$defs"]["domain"]["properties"]["health"]["enum"] == list(HEALTHS)
    assert HEALTH["properties"]["schema_version"]["const"] == HEALTH_VERSION


def test_the_report_of_a_healing_is_as_its_schema_says():
    of_module = documented("domain_checkpoint", "modules")["domains"]["contains"]
    assert set(HEAL["$defs"]["domain"]["properties"]) == set(of_module)
    assert set(HEAL["$defs"]["checkpoint"]["properties"]) == set(of_module["checkpoints"]["contains"])
    assert HEAL["$defs"]["domain"]["properties"]["state"]["enum"] == list(STATES)
    assert HEAL["properties"]["schema_version"]["const"] == HEAL_VERSION
    failed = {"name": "a", "state": "failed", "msg": "b", "code": "c"}
    told = {**failed, "uuid": None, "checkpoints": [failed], "removed_orphans": None}
    hosts = {"up": host_healed(Work({"domains": [told]}, "", ["*"])), "never": None}
    head = {name: HEAD.get(name) for name in ("started", "ended", "ansible_version", "limit")}
    report = {"finished": True, **head, **fleet_healed(hosts, check_mode=True), "summary": []}
    jsonschema.validate(report, HEAL)
    assert set(HEAL["required"]) == set(report)
    assert set(HEAL["$defs"]["host"]["required"]) == set(report["hosts"]["up"])
    for part in (report, report["hosts"]["up"], report["hosts"]["up"]["domains"][0]):
        part.pop(next(iter(set(part) & {"problems", "state", "hosts"})))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(report, HEAL)


def test_each_metric_has_its_row():
    report = {"hosts": {}, "ready": True}
    told = re.findall(r"^# TYPE kvmfleet_health_(\w+) gauge$", metrics(report, "2026-01-31T12:00:00Z"), re.MULTILINE)
    page = (ROOT / "docs/health.md").read_text(encoding="utf-8").split("## The metrics")[1].split("\n\n")[1]
    assert re.findall(r"`(\w+)`(?=[ ,])", "".join(line.split("|")[1] for line in page.splitlines()[2:])) == told


def test_the_version_is_the_one_of_the_collection():
    assert yaml.safe_load((ROOT / "galaxy.yml").read_text(encoding="utf-8"))["version"] == COLLECTION_VERSION


def properties(schema):
    """Return the names of a schema, with those of what is in it, without the counts."""
    if "$ref" in schema:
        return properties(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "items" in schema:
        return properties(schema["items"])
    return {name: properties(part) for name, part in schema.get("properties", {}).items() if name != "states"}


def contents(documentation):
    """Return the same of a documentation."""
    return {name: contents(part.get("contains", {})) for name, part in documentation.items() if name != "states"}


def test_the_schema_has_what_the_documentation_of_the_filters_has():
    host = contents(documented("host_report"))
    assert properties(SCHEMA["$defs"]["host"]) == host
    counts = {
        name: {} for name in host if name in SCHEMA["properties"] and name not in ("check_mode", "problems", "summary")
    }
    head = {name: {} for name in ("finished", "started", "ended", "ansible_version", "limit", "snapshot")}
    assert properties(SCHEMA) == {**contents(documented("fleet_report")), **counts, **head}


def of_all_kinds():
    """Return a report with hosts of every state, and everything in it that a report can have."""
    overlay = {"path": "/a.snap", "backing_file": "/a", "state": "created", "bitmaps": [{"name": "monday"}]}
    done = {**overlay, "skipped_bitmaps": [{"name": "sunday", "granularity": 65536, "reason": "disabled"}]}
    failed = {**done, "path": "/b.snap", "state": "failed", "msg": "is in use.", "code": "in_use"}
    nothing: dict[str, list[str]] = {"overlays": [], "skipped_disks": [], "unfit_disks": []}
    domains = [
        {
            "name": "web",
            "state": "created",
            "overlays": [done],
            "skipped_disks": [{"target": "sda", "reason": "cdrom"}, {"target": "vdb", "reason": "network"}],
            "unfit_disks": ["vdb"],
        },
        {"name": "db", "state": "failed", **nothing, "msg": "is running.", "code": "running"},
    ]
    made = {"domains": [{**domain, "checkpoints": []} for domain in domains], "warnings": ["x*: nothing."]}
    in_use = {"disks": [{"path": "/a.snap", "checkpoints": [{"name": "monday", "valid": None, "problem": "in_use"}]}]}
    reports = {
        "fine": {"disks": [{"overlays": [done]}] * 2, "chains": in_use},
        "wrong": {
            "disks": [{"overlays": [failed]}],
            "domains": [made, made, made],
            "names": "x*,web",
            "problem": "A task",
        },
        "gone": {"disks": [{"unreachable": True, "msg": "Connection refused"}]},
        "bare": {"waiting_for": ["qemu-utils"]},
    }
    hosts = {name: {"overlay_result": make_host_report(results, check_mode=False)} for name, results in reports.items()}
    return make_fleet_report([*hosts, "never"], {**hosts, "never": {}}, check_mode=False)


def test_the_schema_describes_every_kind_of_report():
    report = {"finished": True, **HEAD, **of_all_kinds()}
    assert all(report["states"].values())
    assert all(report[name] for name in ("skipped_because", "bitmaps_left_behind", "bitmaps_unverified", "repeat"))
    VALID.validate(SCHEMA, report)
    VALID.validate(SCHEMA, {"finished": False, **HEAD, **make_fleet_report([], {}, check_mode=True)})
    nothing = {"hv1": {"overlay_result": make_host_report({}, check_mode=False)}}
    VALID.validate(SCHEMA, {"finished": True, **HEAD, **make_fleet_report(["hv1"], nothing, check_mode=False)})


@pytest.mark.parametrize(
    "wrong", [{"ended": "noon"}, {"created": "1"}, {"more": 1}, {"schema_version": 1}, {"hosts": {"a": {}}}]
)
def test_the_schema_tells_what_is_wrong(wrong):
    with pytest.raises(jsonschema.ValidationError):
        VALID.validate(SCHEMA, {"finished": False, **HEAD, **make_fleet_report([], {}, check_mode=True), **wrong})
