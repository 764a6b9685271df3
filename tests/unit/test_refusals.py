# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of the refusals in the documentation, beside the code."""

from __future__ import annotations

import ast
import pathlib
import re
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Code
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.rows import ReportCode

ROOT = pathlib.Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)
RAISED = {"Refusal", "QemuError", "problem", "_Excuse"}  # take the code as their first argument
CODES = {*t.get_args(Code), *t.get_args(ReportCode)}


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
    rows = ROW.findall((ROOT / "docs/refusals.md").read_text(encoding="utf-8"))
    codes = [code for code, _meaning, _remedy in rows]
    assert codes == sorted(codes)
    assert len(codes) == len(set(codes))
    assert set(codes) == CODES


def test_every_code_is_used_and_no_other():
    assert literals(ROOT / "plugins/module_utils") | literals(ROOT / "plugins/plugin_utils") == CODES
