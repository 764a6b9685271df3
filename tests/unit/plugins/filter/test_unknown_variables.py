# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which names are taken for misspelt ones, and which for somebody else's."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.filter.unknown_variables import unknown_variables
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._variables import known_variables

_WAY_OUT = "If it belongs to something else, name it in overlay_other_variables."


@pytest.mark.parametrize(
    "name, near",
    [
        ("overlay_domain", "overlay_domains"),
        ("overlay_runing", "overlay_running"),
        ("overlay_seriel", "overlay_serial"),
        ("overlay_host", "overlay_hosts"),
        ("overlay_libvirt_snapshot", "overlay_libvirt_snapshots"),
        ("Overlay_Domains", "overlay_domains"),
        ("overlay-domains", "overlay_domains"),
        ("overlays_domains", "overlay_domains"),
        ("ovelay_domains", "overlay_domains"),
        ("overlya_snapshot", "overlay_snapshot"),
        ("overlay_al_or_none", "overlay_all_or_none"),
        ("overlay_snapshot_name", "overlay_snapshot"),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest_and_the_other_way_out(name, near):
    assert unknown_variables([name]) == [f"{name}: no variable of this name is known. Is it {near}? {_WAY_OUT}"]


@pytest.mark.parametrize(
    "name",
    [
        "overlay_xyzxyzxyz",
        "overlay_network_cidr",
        "overlay_network",
        "overlay_net",
        "overlay_mtu",
        "overlay_path",
        "overlay_lowerdir",
        "overlay_",
    ],
)
def test_a_name_to_which_none_is_near_is_told_with_the_way_out(name):
    assert unknown_variables([name]) == [f"{name}: no variable of this name is known. {_WAY_OUT}"]


def test_what_is_known_and_what_is_somebody_elses_is_no_mistake():
    others = [
        "overlap_hosts",
        "relay_hosts",
        "overlays",
        "overlay",
        "__overlay_disks_run",
        "my_overlay_domain",
        "slaves_uri",
    ]
    assert unknown_variables([*known_variables(), *others, "ansible_host"]) == []


@pytest.mark.parametrize(
    "name, near",
    [
        ("health_domain", "health_domains"),
        ("health_pages", "health_page"),
        ("helth_page", "health_page"),
        ("health-report", "health_report"),
        ("Health_metric", "health_metrics"),
    ],
)
def test_a_misspelt_name_of_another_playbook_is_told_with_its_own_way_out(name, near):
    way_out = "If it belongs to something else, name it in health_other_variables."
    told = [f"{name}: no variable of this name is known. Is it {near}? {way_out}"]
    assert unknown_variables([name, "overlay_hots"], family="health") == told
    assert unknown_variables([], hosts=[{name: 1}], family="health") == told
    assert unknown_variables([name, "health_network"], [name, "health_network"], family="health") == []
    assert unknown_variables([name]) == []


def test_the_playbooks_whose_names_are_much_alike_are_told_apart():
    known = "no variable of this name is known"
    assert [one.split(". ")[0] for one in unknown_variables(["heal_unusabel"], family="heal")] == [
        f"heal_unusabel: {known}"
    ]
    assert unknown_variables(["health_pages"], family="heal") == []


def test_what_begins_nearly_as_the_names_of_another_playbook_is_somebody_elses():
    others = [*known_variables("health"), "heat_map", "hall_height", "__health_look", "healthy", "stealth_mode"]
    assert unknown_variables(others, family="health") == []


@pytest.mark.parametrize("others", [["overlay_network", "overlay_nets"], "overlay_network, overlay_nets"])
def test_names_can_be_let_pass(others):
    assert unknown_variables(["overlay_network", "overlay_nets"], others) == []
    assert len(unknown_variables(["overlay_network", "overlay_net"], others)) == 1


def test_each_name_is_told_once_and_in_order():
    told = unknown_variables(["overlay_z", "overlay_hots", "overlay_z"])
    assert [text.split(":")[0] for text in told] == ["overlay_hots", "overlay_z"]


@pytest.mark.parametrize("own", [["overlay_network"], "overlay_network, overlay_nets", ("overlay_network",)])
def test_a_host_lets_pass_what_it_names_itself(own):
    listed = {"overlay_network": "10.0.0.0/8", "overlay_other_variables": own}
    assert unknown_variables(["overlay_snapshot"], [], [{"overlay_disks": []}, listed, {"ansible_host": "x"}]) == []


def test_what_one_host_lets_pass_is_unknown_on_another():
    listed = {"overlay_network": "10.0.0.0/8", "overlay_other_variables": ["overlay_network"]}
    told = unknown_variables(
        [], [], [listed, {"overlay_network": "10.0.0.0/8"}, {"overlay_hots": 1}, {"overlay_hots": 2}]
    )
    assert [text.split(":")[0] for text in told] == ["overlay_hots", "overlay_network"]


def test_what_the_play_lets_pass_is_known_on_every_host():
    hosts = [
        {"overlay_network": 1},
        {"overlay_network": 2, "overlay_nets": 3, "overlay_other_variables": "overlay_nets"},
    ]
    assert unknown_variables(["overlay_network"], ["overlay_network"], hosts) == []


def test_an_empty_key_lets_nothing_pass():
    assert len(unknown_variables([], [], [{"overlay_network": 1, "overlay_other_variables": None}])) == 1


def test_what_another_playbook_knows_is_no_misspelt_name():
    """An inventory has the variables of all playbooks, some for a part of the hosts."""
    names = ["heal_domains", "heal_become", "overlay_domains", "health_domains"]
    for family in ("overlay", "health", "heal"):
        assert unknown_variables(names, hosts=[dict.fromkeys(names, 1), {}], family=family) == []
