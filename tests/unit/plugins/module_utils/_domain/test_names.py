# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which image is which snapshot, and what overlays are called: on real images, with definitions that are switched."""

from __future__ import annotations

import os

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.names import same_names
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark

from .. import qemu
from .hosts import SETTINGS, Host


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    return Host(tmp_path)


def test_a_snapshot_of_a_single_image_is_present_the_second_time(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    assert host.snapshot("web", "monday") == ["web.monday.qcow2"]
    assert host.snapshot("web", "monday") == "present"
    assert host.snapshot("web", "tuesday") == ["web.tuesday.qcow2"]
    assert host.snapshot("web", "monday") == "present"
    assert host.taken("web", "monday") == ["web.monday.qcow2"]


@pytest.mark.parametrize(
    "image, expected",
    [
        ("web.qcow2", "web.s.qcow2"),
        ("web.qcow", "web.s.qcow2"),
        ("web", "web.s.qcow2"),
        ("web-1.5", "web-1.5.s.qcow2"),
        ("web.s", "web.s.s.qcow2"),
        ("web.raw", "web.s.qcow2"),
        (".qcow2", ".qcow2.s.qcow2"),
        ("Größe 1:2.qcow2", "Größe 1:2.s.qcow2"),
    ],
)
def test_names_of_first_overlays(host, image, expected):
    host.image(image)
    host.define("web", image)
    assert host.snapshot("web", "s") == [expected]
    assert host.snapshot("web", "s") == "present"


@pytest.mark.parametrize(
    "first, then, expected",
    [
        ("2024.06.01", "01", "web.01.qcow2"),
        ("2024.06.01", "06.01", "web.06.01.qcow2"),
        ("before.upgrade", "upgrade", "web.upgrade.qcow2"),
        ("01", "2024.06.01", "web.2024.06.01.qcow2"),
        ("upgrade", "Upgrade", "web.Upgrade.qcow2"),
        ("e\u0301", "\u00e9", "web.\u00e9.qcow2"),
        ("vor Ümzug", "Ümzug", "web.Ümzug.qcow2"),
        ("qcow2", "web", "web.web.qcow2"),
    ],
)
def test_a_snapshot_whose_name_ends_like_another_is_another(host, first, then, expected):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    assert host.snapshot("web", first) == [f"web.{first}.qcow2"]
    assert host.snapshot("web", then) == [expected]
    assert host.snapshot("web", first) == host.snapshot("web", then) == "present"


@pytest.mark.parametrize("clone, snapshot", [("web.prod.qcow2", "prod"), ("debian12.web.prod.qcow2", "prod")])
def test_a_clone_whose_name_ends_like_the_snapshot_is_not_the_snapshot(host, clone, snapshot):
    host.image("debian12.qcow2")
    host.image(clone, "debian12.qcow2")
    host.define("web", clone)
    name = f"{clone[:-6]}.{snapshot}.qcow2"
    assert host.snapshot("web", snapshot) == [name]
    assert host.snapshot("web", snapshot) == "present"
    assert host.taken("web", snapshot) == [name]


def test_a_clone_that_is_called_as_a_snapshot_would_be_is_ambiguous_and_only_if_that_is_asked_for(host):
    host.image("debian.qcow2")
    host.image("debian.web1.qcow2", "debian.qcow2")
    host.define("web1", "debian.web1.qcow2")
    assert host.snapshot("web1", "web1") == ["ambiguous"]
    (problem,) = host.plan("web1", "web1").problems
    assert "debian.web1.qcow2 is either that snapshot of " in str(problem)
    assert "as a template" in str(problem)
    assert "another name for the snapshot" in problem.remedy
    running = host.domains["web1"]
    host.domains["web1"] = running._replace(state="running", running_definition=running.definition)
    assert host.snapshot("web1", "web1") == ["ambiguous"]
    host.domains["web1"] = running
    assert host.snapshot("web1", "up") == ["debian.web1.up.qcow2"]
    assert host.snapshot("web1", "up") == "present"
    # A second disk on the image below settles nothing: it may have been made from below a snapshot.
    host.image("debian.web2.qcow2", "debian.qcow2")
    host.define("web2", "debian.web2.qcow2")
    assert host.snapshot("web2", "web2") == ["ambiguous"]
    # What another domain has as its disk is no image below a snapshot.
    host.define("template", "debian.qcow2")
    assert host.snapshot("web2", "web2") == ["debian.web2.web2.qcow2"]
    assert host.snapshot("web2", "web2") == "present"


def test_no_name_depends_on_the_other_domains_of_a_host(tmp_path):
    one, two = Host(tmp_path), Host(tmp_path)
    one.image("debian.qcow2")
    for host, name in ((one, "web1"), (two, "web2")):
        host.image(f"debian.{name}.qcow2", "debian.qcow2")
        host.define(name, f"debian.{name}.qcow2")
        assert host.snapshot(name, "up") == [f"debian.{name}.up.qcow2"]
        assert host.snapshot(name, "next") == [f"debian.{name}.next.qcow2"]
        assert host.snapshot(name, "up") == "present"


def test_the_snapshot_of_a_template_is_not_that_of_its_clones_here_or_on_another_host(tmp_path):
    one, two = Host(tmp_path), Host(tmp_path)
    one.image("debian.qcow2")
    one.define("template", "debian.qcow2")
    assert one.snapshot("template", "upgrade") == ["debian.upgrade.qcow2"]
    for host, name in ((one, "clone1"), (two, "clone2")):
        host.image(f"debian.{name}.qcow2", "debian.upgrade.qcow2")
        host.define(name, f"debian.{name}.qcow2")
        assert host.snapshot(name, "upgrade") == [f"debian.{name}.upgrade.qcow2"]
        assert host.snapshot(name, "upgrade") == "present"
    assert one.snapshot("template", "upgrade") == "present"


def test_a_snapshot_stays_one_when_the_image_below_it_becomes_a_template(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    host.image("clone.qcow2", "web.qcow2")
    host.define("clone", "clone.qcow2")
    assert host.snapshot("web", "s") == "present"
    assert host.snapshot("clone", "s") == ["clone.s.qcow2"]


def test_two_disks_of_one_template(host):
    host.image("debian.qcow2")
    for disk in "ab":
        host.image(f"debian.{disk}.qcow2", "debian.qcow2")
    host.define("web", "debian.a.qcow2", "debian.b.qcow2")
    assert host.snapshot("web", "a") == ["ambiguous"]
    assert host.snapshot("web", "c") == ["debian.a.c.qcow2", "debian.b.c.qcow2"]
    assert host.snapshot("web", "c") == "present"


def test_a_disk_made_from_the_snapshot_of_another_disk_of_the_domain_is_not_on_it(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    host.snapshot("web", "t")
    host.image("rescue.qcow2", "web.s.qcow2")
    host.define("web", "web.t.qcow2", "rescue.qcow2")
    assert host.snapshot("web", "s") == ["rescue.s.qcow2"]
    assert host.taken("web", "s") == ["web.s.qcow2", "rescue.s.qcow2"]


def test_what_changes_about_a_domain_changes_no_snapshot(host, tmp_path):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s", tmp_path)
    host.domains["db"] = host.domains.pop("web")._replace(name="db")  # virsh domrename
    assert host.snapshot("db", "s") == "present"
    assert host.snapshot("db", "s", tmp_path / "elsewhere") == "present"
    host.define("db", "web.vda.s.qcow2", targets="c")  # another bus
    assert host.snapshot("db", "s") == "present"
    os.rename(tmp_path / "web.vda.s.qcow2", tmp_path / "disk.qcow2")
    host.define("db", "disk.qcow2")
    assert host.snapshot("db", "s") == "present"
    assert host.snapshot("db", "t") == ["disk.t.qcow2"]


def test_a_domain_that_was_defined_anew_is_not_taken_for_the_old_one(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    host.snapshot("web", "t")
    host.define("web", "web.t.qcow2", uuid="another")
    assert host.snapshot("web", "s") == host.snapshot("web", "t") == ["ambiguous"]
    assert host.snapshot("web", "u") == ["web.t.u.qcow2"]


def test_an_image_that_is_no_overlay_any_more_is_no_snapshot(host, tmp_path):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    qemu.qemu_img("rebase", "-b", "", str(host.folder / "web.s.qcow2"))  # as virsh blockpull leaves it
    assert host.snapshot("web", "s") == host.snapshot("web", "s", tmp_path) == ["flattened"]
    (problem,) = host.plan("web", "s").problems
    assert "web.s.qcow2 was the overlay of the snapshot s of its disk vda, and has no image below any" in problem.why
    assert problem.remedy == "Choose another name for the snapshot."
    running = host.domains["web"]
    host.domains["web"] = running._replace(state="running", running_definition=running.definition)
    assert host.snapshot("web", "s") == ["flattened"]
    host.domains["web"] = running
    assert host.snapshot("web", "t") == ["web.t.qcow2"]
    assert host.snapshot("web", "s") == ["flattened"]
    host.image("copy.qcow2", "web.s.qcow2")
    host.define("other", "copy.qcow2")
    assert host.snapshot("other", "s") == ["copy.s.qcow2"]


def test_names_do_not_grow_with_snapshots_or_with_those_that_libvirt_takes_of_a_running_domain(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    for number in range(4):
        assert host.snapshot("web", f"s{number}") == [f"web.s{number}.qcow2"]
        host.image(f"web.live{number}", f"web.s{number}.qcow2")
        host.define("web", f"web.live{number}")
    assert host.snapshot("web", "s0") == "present"


def test_names_in_a_directory_have_the_domain_and_the_disk(host, tmp_path):
    place = tmp_path / "snaps"
    place.mkdir()
    for name in ("web", "db"):
        host.image(f"{name}/disk0.qcow2")
        host.image(f"{name}/disk0.raw.qcow2")
        host.define(name, f"{name}/disk0.qcow2", f"{name}/disk0.raw.qcow2")
        assert host.snapshot(name, "s", place) == [f"snaps/{name}.vda.s.qcow2", f"snaps/{name}.vdb.s.qcow2"]
        assert host.snapshot(name, "t", place) == [f"snaps/{name}.vda.t.qcow2", f"snaps/{name}.vdb.t.qcow2"]
        assert host.snapshot(name, "u") == [f"snaps/{name}.vda.u.qcow2", f"snaps/{name}.vdb.u.qcow2"]
        assert host.snapshot(name, "s") == host.snapshot(name, "s", place) == "present"


def test_a_name_that_two_disks_would_get_is_told_with_both(host):
    (host.folder / "db.img").write_bytes(bytes(1 << 20))
    host.image("db.qcow2")
    host.define("db", "db.qcow2", "db.img")
    problems = same_names([host.plan("db", "s")])
    assert [problem.code for problem in problems["db"]] == ["same_name"]
    assert "db.s.qcow2 would be the overlay of disk vda of db and of disk vdb of db" in str(problems["db"][0])
    host.define("db", "db.qcow2")
    host.define("other", "db.img")
    problems = same_names([host.plan("db", "s"), host.plan("other", "s")])
    assert [str(problem).split(". ", maxsplit=1)[0] for name in ("db", "other") for problem in problems[name]] == [
        f"{name}: {host.folder}/db.s.qcow2 would be the overlay of disk vda of db and of disk vda of other"
        for name in ("db", "other")
    ]
    assert same_names([host.plan("db", "s", host.folder), host.plan("other", "s", host.folder)]) == {}


def test_names_that_are_too_long_are_refused_with_the_reason(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    assert host.snapshot("web", "ä" * 122) == [f"web.{'ä' * 122}.qcow2"]  # 254 bytes
    assert host.snapshot("web", "ä" * 123) == ["name_too_long"]
    host.define("w" * 250, "web.qcow2", uuid="long")
    assert host.snapshot("w" * 250, "s", host.folder) == ["name_too_long"]


def old_overlay(host, name, *chain, template=None):
    """Have a domain on an overlay without a mark, as version 0.1 made it, or as libvirt copies it."""
    host.image(chain[0], template)
    host.define(name, chain[0])
    host.remember(name)
    for below, image in zip(chain, chain[1:]):
        run(MakeOverlays(AttributeOptions()), [path_on(host, image, below)], SETTINGS)
        host.define(name, image)


def path_on(host, image, below):
    return OverlayRequest(str(host.folder / image), str(host.folder / below))


def test_overlays_without_a_mark_are_snapshots_where_libvirt_remembers_the_image_below(host):
    old_overlay(host, "web", "web.qcow2", "web.monday.qcow2", "web.tuesday.qcow2")
    assert host.snapshot("web", "monday") == "present"
    assert host.taken("web", "monday") == ["web.monday.qcow2"]
    assert host.snapshot("web", "tuesday") == "present"
    assert host.snapshot("web", "day") == ["web.tuesday.day.qcow2"]
    host.checkpoints.clear()
    host.define("web", "web.tuesday.qcow2")
    assert host.snapshot("web", "monday") == host.snapshot("web", "tuesday") == ["ambiguous"]


def clones_and_an_old_overlay(host, *clones):
    """Have web1 on an overlay of its clone that version 0.1 made when it was the only one, and define more clones."""
    host.image("debian.qcow2")
    host.image("debian.web1.qcow2", "debian.qcow2")
    host.image("debian.S.qcow2", "debian.web1.qcow2")
    host.define("web1", "debian.web1.qcow2")
    host.remember("web1")
    host.define("web1", "debian.S.qcow2")
    for clone in clones:
        host.image(f"debian.{clone}.qcow2", "debian.qcow2")
        host.define(clone, f"debian.{clone}.qcow2")


@pytest.mark.parametrize("clones", [(), ("web2",), ("web2", "web3")])
def test_an_old_overlay_is_found_whatever_clones_were_defined_since(host, clones):
    clones_and_an_old_overlay(host, *clones)
    assert host.snapshot("web1", "S") == "present"
    assert host.taken("web1", "S") == ["debian.S.qcow2"]
    host.checkpoints.clear()
    assert host.snapshot("web1", "S") == ["ambiguous"]


def test_an_old_overlay_below_which_is_a_template_since_is_not_made_twice(host):
    old_overlay(host, "deb", "deb.qcow2", "deb.monday.qcow2")
    host.image("clone.qcow2", "deb.qcow2")
    host.define("clone", "clone.qcow2")
    assert host.snapshot("deb", "monday") == "present"
    host.checkpoints.clear()
    assert host.snapshot("deb", "monday") == ["ambiguous"]
    assert host.snapshot("clone", "monday") == ["clone.monday.qcow2"]


def test_an_old_overlay_whose_name_can_be_read_as_two_snapshots_is_the_one_of_the_longer_stem_only(host):
    host.image("debian.qcow2")
    old_overlay(host, "clone", "debian.web1.qcow2", "debian.web1.monday.qcow2", template="debian.qcow2")
    assert host.snapshot("clone", "monday") == "present"
    assert host.snapshot("clone", "web1.monday") == ["ambiguous"]


@pytest.mark.parametrize("remembers", [True, False])
def test_an_old_overlay_that_is_a_template_since_is_not_made_twice(host, remembers):
    old_overlay(host, "web", "web.qcow2", "web.s.qcow2", "web.t.qcow2")
    if not remembers:
        host.checkpoints.clear()
    host.image("clone.qcow2", "web.s.qcow2")
    host.define("clone", "clone.qcow2")
    assert host.snapshot("web", "s") == host.snapshot("web", "t") == ["ambiguous"]


def test_an_old_overlay_that_another_domain_has_as_its_disk_is_the_snapshot_of_that_one(host):
    old_overlay(host, "template", "debian.qcow2", "debian.monday.qcow2")
    host.image("debian.clone1.qcow2", "debian.monday.qcow2")
    host.define("clone1", "debian.clone1.qcow2")
    assert host.snapshot("template", "monday") == "present"
    assert host.snapshot("clone1", "monday") == ["debian.clone1.monday.qcow2"]
    del host.domains["template"]
    host.define("clone1", "debian.clone1.qcow2")
    assert host.snapshot("clone1", "monday") == ["ambiguous"]


def test_an_old_overlay_whose_name_fits_nothing_below_is_not_made_twice_and_not_taken_for_the_snapshot(host):
    old_overlay(host, "web", "web.qcow2", "web.2024.06.01.qcow2")
    assert host.snapshot("web", "2024.06.01") == "present"
    assert host.snapshot("web", "01") == ["ambiguous"]
    old_overlay(host, "db", "db.qcow2", "db.01.qcow2", "db.2024.06.01.qcow2")
    assert host.snapshot("db", "01") == "present"
    assert host.taken("db", "01") == ["db.01.qcow2"]
    host.checkpoints.clear()
    assert host.snapshot("web", "01") == ["web.2024.06.01.01.qcow2"]


def test_an_overlay_without_a_mark_is_a_snapshot_on_top_of_one_that_has_it(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "monday")
    for name in ("tuesday", "wednesday"):  # as libvirt makes them of a running domain, if it is told the names
        host.image(f"web.{name}.qcow2", host.domains["web"].definition.tops["vda"])
        host.define("web", f"web.{name}.qcow2")
    assert host.snapshot("web", "tuesday") == host.snapshot("web", "wednesday") == "present"
    assert host.snapshot("web", "thursday") == ["web.thursday.qcow2"]


def test_an_overlay_without_a_mark_in_another_folder_is_found_by_its_name(host):
    (host.folder / "fast").mkdir()
    old_overlay(host, "web", "web.qcow2", "fast/web.s.qcow2")
    assert host.snapshot("web", "s") == "present"
    host.image("x.qcow2")
    host.image("web.vda.t.qcow2", "x.qcow2")
    host.define("web", "web.vda.t.qcow2")
    assert host.snapshot("web", "t") == ["ambiguous"]


@pytest.mark.parametrize("mark", [None, Mark("another", "vda", "s"), Mark("uuid-of-web", "vda", "other")])
def test_an_empty_image_at_the_place_is_taken_for_an_overlay_of_ours_only_if_it_bears_the_mark(host, mark):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    plan = host.plan("web", "s")
    request = plan.disks[0].request
    run(MakeOverlays(AttributeOptions()), [request._replace(mark=mark)], SETTINGS)
    assert host.snapshot("web", "s") == ["differs"]
    os.unlink(request.path)
    run(MakeOverlays(AttributeOptions()), [request], SETTINGS)  # as a run does that is killed before the switch
    assert host.snapshot("web", "s") == ["web.s.qcow2"]


def test_a_disk_that_came_later_is_of_another_moment_than_the_others(host):
    for name in ("web.qcow2", "new.qcow2"):
        host.image(name)
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    host.define("web", "web.s.qcow2", "new.qcow2")
    (warning,) = host.plan("web", "s").warnings
    assert "its disk vda is on the snapshot s already, and its disk vdb joins it now" in warning
    assert host.snapshot("web", "s") == ["new.s.qcow2"]
    assert host.plan("web", "s").warnings == []
    assert host.plan("web", "t").warnings == []


def test_an_overlay_takes_no_place_that_another_domain_names(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.define("other", "web.s.qcow2")  # whose disk is missing
    assert host.snapshot("web", "s") == ["occupied"]
    assert "web.s.qcow2 would be the overlay of its disk vda, and is named already by other" in str(
        host.plan("web", "s").problems[0]
    )
    assert host.snapshot("web", "t") == ["web.t.qcow2"]


def test_an_overlay_takes_no_place_that_is_missing_below_a_clone_of_another_domain(host):
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    host.snapshot("web", "s")
    host.image("clones/clone.qcow2", "web.s.qcow2")
    host.define("clone", "clones/clone.qcow2")
    os.rename(host.folder / "web.s.qcow2", host.folder / "moved")
    host.define("web", "web.qcow2")
    assert host.snapshot("web", "s") == ["occupied"]


@pytest.mark.parametrize("below", ["", "<backingStore type='file'><format type='qcow2'/><source file='{}'/>"])
def test_an_overlay_takes_no_place_that_another_disk_of_the_domain_names(host, below):
    host.image("web.qcow2")
    host.define("web", "web.qcow2", "clone.qcow2" if below else "web.s.qcow2")
    if below:
        domain = host.domains["web"]
        stated = f"{below.format(host.folder / 'web.s.qcow2')}</backingStore><target dev='vdb'/>"
        text = domain.definition.text.replace("<target dev='vdb'/>", stated)
        host.domains["web"] = domain._replace(definition=Definition(text))
    taken = [problem for problem in host.plan("web", "s").problems if problem.code == "occupied"]
    assert ["its disk vdb" in problem.why for problem in taken] == [True]
