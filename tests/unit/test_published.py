# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What others see of the collection names everything that is in it, and nothing else."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import yaml
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils import _asked
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._variables import known_variables

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GROUPS = yaml.safe_load((ROOT / "meta/runtime.yml").read_text(encoding="utf-8"))["action_groups"]
# What a module needs to be able to take to be in a group: any of these options.
OPTIONS_OF_GROUP = {"creation": {"cluster_size", "mode"}, "libvirt": {"uri"}, "qemu": {"timeout"}}
MODULES = sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
RELEASED = yaml.safe_load((ROOT / "changelogs/changelog.yaml").read_text(encoding="utf-8"))["releases"]
GUIDES = "https://github.com/kvmfleet/qcow2/blob/main/"


def documentation(path):
    """Return the documentation of a plugin, or of a fragment, from its file."""
    return yaml.safe_load(path.read_text(encoding="utf-8").split('DOCUMENTATION = r"""')[1].split('"""')[0])


def options(module):
    """Return all options of a module, with those of its fragments."""
    documented = documentation(ROOT / f"plugins/modules/{module}.py")
    found = {}
    for fragment in documented["extends_documentation_fragment"]:
        found |= documentation(ROOT / f"plugins/doc_fragments/{fragment.split('.')[2]}.py")["options"]
    return {**found, **documented["options"]}


def contents(kind):
    """Return the names in a row of the table of contents in the README."""
    row = re.search(rf"^\| {kind} \|(.*)\|$", README, re.MULTILINE)
    assert row, f"No row {kind} in the contents of the README"
    return sorted(re.findall(r"`(\w+)`", row[1]))


def stems(pattern):
    """Return the names of files without what is behind the first point."""
    return sorted(path.name.partition(".")[0] for path in ROOT.glob(pattern))


def test_the_contents_of_the_readme_are_what_there_is():
    action_only = stems("plugins/modules/*.yml")
    assert contents("modules") == sorted([*MODULES, *action_only])
    assert contents("roles") == stems("roles/*")
    assert contents("playbooks") == stems("playbooks/*.yml")
    assert contents("filters") == stems("plugins/filter/*.py")


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_an_action_group_has_every_module_that_takes_its_options(group):
    assert GROUPS[group] == [name for name in MODULES if OPTIONS_OF_GROUP[group] <= set(options(name))]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_the_groups_that_it_is_in(module):
    documented = documentation(ROOT / f"plugins/modules/{module}.py")
    named = documented.get("attributes", {}).get("action_group", {}).get("membership", [])
    assert named == [f"kvmfleet.qcow2.{group}" for group in sorted(GROUPS) if module in GROUPS[group]]
    assert bool(named) == ("kvmfleet.qcow2.attributes.actiongroup" in documented["extends_documentation_fragment"])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_tells_what_it_needs_and_where_to_go_on(module):
    documented = documentation(ROOT / f"plugins/modules/{module}.py")
    needs = "\n".join(documented["requirements"])
    assert "Python 3.9" in needs
    assert ("QEMU 5.2" in needs) == ("timeout" in options(module))
    assert ("python3-libvirt" in needs) == ("uri" in options(module))
    assert "kvmfleet.qcow2.overlay#role" in json.dumps(documented["seealso"])


def test_links_of_the_readme_are_absolute_and_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        path = link.removeprefix(GUIDES).partition("#")[0] if link.startswith(GUIDES) else "README.md"
        # The changelog is made by the first release, docs/releasing.md.
        assert (ROOT / path).exists() or (path == "CHANGELOG.rst" and RELEASED == {}), link


def test_private_code_says_so():
    for room in ("module_utils", "plugin_utils"):
        for path in (ROOT / "plugins" / room).rglob("*.py"):
            assert "\n# PRIVATE to this collection: may change at any time.\n" in path.read_text(encoding="utf-8"), path


# What the role says by itself, in other words than the module's option.
SAID_BY_THE_ROLE = {
    _asked.DISKS: {"state", "overlays", "verify", "all_or_none", "path", "backing_file", "backing_format", "above"},
    _asked.DOMAINS: {"state", "name", "snapshot", "verify", "all_or_none"},
}


@pytest.mark.parametrize("module", SAID_BY_THE_ROLE)
def test_each_option_of_a_module_can_be_given_by_a_variable_of_the_role(module):
    assert set(options(module)) == {*_asked.OPTIONS[module], *SAID_BY_THE_ROLE[module]}


def test_the_defaults_of_the_role_are_documented():
    documented = yaml.safe_load((ROOT / "roles/overlay/meta/argument_specs.yml").read_text(encoding="utf-8"))
    documented = documented["argument_specs"]["main"]["options"]
    own = yaml.safe_load((ROOT / "roles/overlay/defaults/main.yml").read_text(encoding="utf-8"))
    # Those that the role has not, the modules have: it passes on what is given.
    passed_on = {f"overlay_{name}": one.get("default") for name, one in options("domain_overlay").items()}
    for name, option in documented.items():
        default = own.get(name, passed_on.get(name))
        if isinstance(default, str) and "{{" in default:  # what depends on others is told in the prose
            default = None
        assert option.get("default") == default, name


def test_the_survey_asks_for_variables_that_there_are():
    survey = json.loads((ROOT / "docs/awx/survey.json").read_text(encoding="utf-8"))
    asked = [question["variable"] for question in survey["spec"]]
    assert asked
    assert set(asked) <= known_variables()
    roles = yaml.safe_load((ROOT / "roles/overlay/meta/argument_specs.yml").read_text(encoding="utf-8"))
    documented = roles["argument_specs"]["main"]["options"]
    for question in survey["spec"]:
        if question["type"] == "multiplechoice":
            possible = documented[question["variable"]].get("choices", ["true", "false"])
            assert set(question["choices"]) <= set(possible), question["variable"]
            assert question["default"] in question["choices"]


def test_changelog_fragments_have_the_markup_of_the_changelog():
    for path in (ROOT / "changelogs/fragments").glob("*.yml"):
        assert re.findall(r"\b[A-Z]+\([^)]*\)", path.read_text(encoding="utf-8")) == [], path.name
