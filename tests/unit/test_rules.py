# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules that tests/prove/rules.py breaks: each line is in the code, once."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "prove" / "rules.py"
_spec = importlib.util.spec_from_file_location("kvmfleet_rules", PROGRAM)
assert _spec is not None
assert _spec.loader is not None
rules = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(rules)


@pytest.mark.parametrize("rule", rules.RULES, ids=[rule.what for rule in rules.RULES])
def test_a_rule_can_be_broken(rule):
    text = (PROGRAM.parents[2] / rules.CODE / rule.room / f"{rule.file}.py").read_text(encoding="utf-8")
    assert text.count(rule.line) == 1
