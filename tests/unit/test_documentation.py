# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What modules return alike is documented alike."""

from __future__ import annotations

import pathlib

import yaml

MODULES = pathlib.Path(__file__).parents[2] / "plugins/modules"


def returned_by(module):
    """Return the documentation of what a module returns."""
    text = (MODULES / f"{module}.py").read_text(encoding="utf-8")
    return yaml.safe_load(text.split('RETURN = r"""')[1].split('"""')[0])


def shape(documented):
    """Return names and types, without the prose."""
    return {
        name: (one["type"], one.get("elements"), shape(one.get("contains", {}))) for name, one in documented.items()
    }


def test_overlays_are_returned_alike():
    of_disk = shape(returned_by("qcow2_overlay")["overlays"]["contains"])
    of_domain = shape(returned_by("domain_overlay")["domains"]["contains"]["overlays"]["contains"])
    assert {name: one for name, one in of_domain.items() if name not in ("target", "topmost")} == of_disk


def test_checkpoints_are_returned_alike():
    of_disk = shape(returned_by("qcow2_info")["disks"]["contains"]["checkpoints"]["contains"])
    of_domain = shape(returned_by("domain_overlay")["domains"]["contains"]["checkpoints"]["contains"])
    assert of_domain.pop("verified") == ("bool", None, {})  # qcow2_info asks no libvirt
    counted = {"dirty_bytes": "int", "dirty_bytes_top": "int", "top_alone": "bool"}  # by qcow2_info only
    assert {**of_domain, **{name: (kind, None, {}) for name, kind in counted.items()}} == of_disk


def prose(documented, prefix):
    """Return the whole documentation, with references to results as another module has them."""
    return yaml.safe_load(yaml.safe_dump(documented, allow_unicode=True, width=10**6).replace(prefix, ""))


def test_images_are_documented_word_by_word_alike():
    of_disk = returned_by("qcow2_info")["disks"]["contains"]["images"]["contains"]
    of_domain = returned_by("domain_info")["domains"]["contains"]["disks"]["contains"]["images"]["contains"]
    own = {"made", "modified", "snapshot"}
    assert own <= set(of_domain)
    without = {name: one for name, one in of_domain.items() if name not in own}
    assert prose(without, "domains[].") == prose(of_disk, "domains[].")


def test_checkpoints_after_a_healing_are_documented_word_by_word_alike():
    of_info = returned_by("qcow2_info")["disks"]["contains"]["checkpoints"]["contains"]
    assert returned_by("qcow2_bitmap")["disks"]["contains"]["checkpoints"]["contains"] == of_info


def test_checkpoints_of_domains_are_documented_as_those_of_disks():
    of_disk = returned_by("qcow2_info")["disks"]["contains"]["checkpoints"]["contains"]
    of_domain = returned_by("domain_info")["domains"]["contains"]["checkpoints"]["contains"]
    own = {"created": "int", "parent": "str", "bitmaps": "dict"}
    of_one_disk = {"dirty_bytes_top": "int"}
    assert {**shape(of_disk), **{name: (kind, None, {}) for name, kind in own.items()}} == {
        **shape(of_domain),
        **{name: (kind, None, {}) for name, kind in of_one_disk.items()},
    }
    for name in ("name", "valid", "advice"):
        assert of_domain[name] == of_disk[name], name
    # Of a domain that runs there is one more.
    assert (
        of_domain["problem"]["description"][: len(of_disk["problem"]["description"])]
        == (of_disk["problem"]["description"])
    )


def test_what_both_modules_for_domains_return_is_documented_alike():
    of_overlay = returned_by("domain_overlay")["domains"]["contains"]
    of_info = returned_by("domain_info")["domains"]["contains"]
    for name in ("name", "uuid", "nvram", "tpm", "libvirt_snapshots"):
        assert of_info[name] == of_overlay[name], name


def test_every_module_returns_a_code_beside_its_message():
    for module in ("qcow2_overlay", "qcow2_info", "qcow2_bitmap", "domain_overlay", "domain_info"):
        assert shape(returned_by(module))["code"] == ("str", None, {}), module
