# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of the refusals in the documentation, beside the code."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import typing as t

import pytest
import yaml
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Code
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils import _variables
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.rows import ReportCode

ROOT = pathlib.Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)
RAISED = {"Refusal", "QemuError", "problem", "_Excuse"}  # take the code as their first argument
CODES = {*t.get_args(Code), *t.get_args(ReportCode)}
ROWS = ROW.findall((ROOT / "docs/refusals.md").read_text(encoding="utf-8"))
MODULES = sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
PLAYBOOKS = sorted(path.stem for path in (ROOT / "playbooks").glob("*.yml"))
BY_MODULE = {  # commands that lose what the module keeps, and the module for each
    "qemu-img bitmap": ("qcow2_bitmap", "domain_checkpoint"),
    "qemu-img commit": ("qcow2_overlay", "domain_overlay", "domain_checkpoint"),
    "virsh blockcommit": ("domain_overlay",),
    "virsh checkpoint-delete": ("domain_checkpoint",),
}
OTHER_COMMANDS = {"dmesg", "lvremove", "qemu-nbd", "sysctl", "touch", "ulimit"}
OTHER_OPTIONS = {"conv", "discard", "g", "id", "u"}  # of dd, QEMU and chmod, in other texts
OTHER_WORDS = {"-d", "ansible_python_interpreter", "nolock", "snapshot='no'"}


def literals(folder):
    """Return the texts that are a code by their place, from all files of a folder, but for the lists of all codes."""
    found = set()
    for path in folder.rglob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in ("Code", "ReportCode"):
                continue
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) in RAISED and node.args:
                    found |= {one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)}
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found |= {node.value} & CODES  # in a table, or as a default
    return found


def test_every_code_has_its_row_and_every_row_its_code():
    codes = [code for code, _meaning, _remedy in ROWS]
    assert codes == sorted(codes)
    assert len(codes) == len(set(codes))
    assert set(codes) == CODES


def documentation(path):
    return yaml.safe_load(path.read_text(encoding="utf-8").split('DOCUMENTATION = r"""')[1].split('"""')[0])


def options():
    """Return by its name what an option of any module can be; None for anything."""
    found = {}
    for name in MODULES:
        documented = documentation(ROOT / f"plugins/modules/{name}.py")
        fragments = [one.split(".")[2] for one in documented["extends_documentation_fragment"]]
        parts = [documented, *(documentation(ROOT / f"plugins/doc_fragments/{one}.py") for one in fragments)]
        for option, one in (pair for part in parts for pair in part.get("options", {}).items()):
            values = ["true", "false"] if one["type"] == "bool" else one.get("choices")
            found[option] = values and [*(found.get(option) or []), *values]
    return found


OPTIONS = options()


def exists(word):
    """Return whether a word that a remedy names is there: a module, a playbook, an option, a variable or a command."""
    first, _space, rest = word.partition(" ")
    if first == "qemu-img":
        usage = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, check=True).stdout
        return re.search(rf"^  {rest.split()[0]} ", usage, re.MULTILINE) is not None
    if first == "virsh":
        return subprocess.run(["virsh", "help", rest.split()[0]], capture_output=True, check=False).returncode == 0
    if first in OTHER_COMMANDS or word in (*MODULES, *PLAYBOOKS, *OTHER_WORDS):
        return True
    name, _colon, value = word.partition(": ")
    if name.partition("_")[0] in _variables.FAMILIES:
        return name in _variables.known_variables(name.partition("_")[0])
    return name in OPTIONS and (not value or value in (OPTIONS[name] or [value]))


@pytest.mark.parametrize("code, remedy", [(code, remedy) for code, _meaning, remedy in ROWS])
def test_a_remedy_names_what_there_is(code, remedy):
    assert [word for word in re.findall(r"`([^`]+)`", remedy) if not exists(word)] == []


@pytest.mark.parametrize("code, remedy", [(code, remedy) for code, _meaning, remedy in ROWS])
def test_a_remedy_does_not_send_to_a_tool_without_the_module_that_does_it_right(code, remedy):
    for command, modules in BY_MODULE.items():
        if f"`{command}" in remedy:
            assert any(f"`{module}`" in remedy for module in modules), command


def test_what_the_messages_name_is_there():
    texts = [
        node.value
        for path in (ROOT / "plugins/module_utils").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = {name for text in texts for name in re.findall(r"kvmfleet\.qcow2\.(\w+)", text)}
    assert named, "no module is named"
    assert named <= {*MODULES, *PLAYBOOKS}
    given = {pair for text in texts for pair in re.findall(r"(?<![\w.-])([a-z_]+)=([a-z]+)\b(?!=)", text)}
    assert given, "no option is named"
    assert {pair for pair in given if pair[0] not in OTHER_OPTIONS and not exists(": ".join(pair))} == set()


def test_the_month_names_codes_that_there_are_and_has_the_way_to_all():
    month = (ROOT / "docs/month.md").read_text(encoding="utf-8")
    table = month.split("| what the report tells |")[1].split("\n\n")[0]
    told = [line.split("|")[1] for line in table.splitlines()[2:]]
    codes = re.findall(r"`(\w+)`", " ".join(told))
    assert codes
    assert sorted(set(codes)) == sorted(codes)
    assert set(codes) <= CODES
    assert "[refusals.md](refusals.md) has for each code" in month


def test_every_code_is_used_and_no_other():
    assert literals(ROOT / "plugins/module_utils") | literals(ROOT / "plugins/plugin_utils") == CODES
