# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of the domains of a host, and how often."""

from __future__ import annotations

import collections
import os

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory, first_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Unreadable
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition, Place
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu


def domain(name, *paths):
    disks = "".join(
        f"<disk type='file'><driver type='qcow2'/><source file='{path}'/><target dev='vd{letter}'/></disk>"
        for letter, path in zip("abc", paths)
    )
    return Domain(name, name, None, True, False, Definition(f"<domain><devices>{disks}</devices></domain>"), None)


@pytest.fixture(name="opened")
def fixture_opened(monkeypatch):
    """Count how often each image is opened as the topmost one of a chain."""
    real, counts = inventory.open_image, collections.Counter()

    def counting(path):
        counts[path] += 1
        return real(path)

    monkeypatch.setattr(inventory, "open_image", counting)
    return counts


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    """Have two clones of one template, and a domain whose image has no chain."""
    template = qemu.create(tmp_path / "template", "1M")
    clones = [qemu.create(tmp_path / name, "1M", "-b", template, "-F", "qcow2") for name in ("one", "two")]
    alone = qemu.create(tmp_path / "alone", "1M")
    return {"one": domain("one", clones[0]), "two": domain("two", clones[1]), "alone": domain("alone", alone)}


def facts(host, name):
    stock = Inventory(host)
    return [stock.facts(host[name], disk) for disk in host[name].definition.disks]


def rebased(path, name):
    """Have an image record a name that qemu-img would look at first."""
    qemu.create(f"{path}.new", "1M", "-u", "-b", name, "-F", "qcow2")
    os.rename(f"{path}.new", path)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: rebased(folder / "top", f'json:{{"driver":"qcow2","file":{{"filename":"{folder}/middle"}}}}'),
        lambda folder: rebased(folder / "top", "file:middle"),
        lambda folder: os.truncate(folder / "top", 1 << 16),
        lambda folder: os.truncate(folder / "middle", 1 << 16),
        lambda folder: os.remove(folder / "deepest"),
    ],
)
def test_a_domain_uses_the_images_of_a_chain_that_cannot_be_read(tmp_path, break_it):
    """Or another domain would be merged into one of them."""
    deepest = qemu.create(tmp_path / "deepest", "1M")
    base = qemu.create(tmp_path / "base", "1M", "-b", deepest, "-F", "qcow2")
    middle = qemu.create(tmp_path / "middle", "1M", "-b", base, "-F", "qcow2")
    top = qemu.create(tmp_path / "top", "1M", "-b", middle, "-F", "qcow2")
    break_it(tmp_path)
    host = {"broken": domain("broken", top), "web": domain("web", str(tmp_path / "none"))}
    stock = Inventory(host)
    (own,) = [stock.facts(host["web"], disk) for disk in host["web"].definition.disks]
    assert [own.others_with(path) for path in (middle, base)] == [["broken"], ["broken"]]
    assert own.unseen() == (("broken (vda)",) if not os.path.exists(deepest) else ())
    (theirs,) = facts(host, "broken")
    assert (theirs.layers, theirs.own) == ((), ())
    assert theirs.problem is not None


def test_a_domain_uses_the_images_that_its_definition_states(tmp_path):
    text = domain("stated", str(tmp_path / "unmounted")).definition.text
    below = f"<backingStore type='file'><format type='qcow2'/><source file='{tmp_path}/base'/></backingStore>"
    stated = domain("stated")._replace(definition=Definition(text.replace("<target", f"{below}<target")))
    host = {"stated": stated, "web": domain("web", str(tmp_path / "none"))}
    (own,) = facts(host, "web")
    assert own.others_with(str(tmp_path / "base")) == ["stated"]


@pytest.mark.parametrize("complete", [True, False])
def test_a_disk_that_cannot_be_read_can_stand_on_any_image(tmp_path, complete):
    text = domain("stated", str(tmp_path / "unmounted")).definition.text
    end = "<backingStore/>" if complete else ""
    below = f"<backingStore type='file'><format type='qcow2'/><source file='{tmp_path}/base'/>{end}</backingStore>"
    stated = domain("stated")._replace(definition=Definition(text.replace("<target", f"{below}<target")))
    raw = text.replace("type='qcow2'", "type='raw'").replace("unmounted", "raw")
    host = {
        "web": domain("web", qemu.create(tmp_path / "web", "1M")),
        "off": domain("off", str(tmp_path / "unmounted")),
        "stated": stated,
        "raw": domain("raw")._replace(definition=Definition(raw)),
        "odd": Unreadable("odd", Refusal("libvirt_failed", "odd", "cannot be read")),
    }
    (own,) = facts(host, "web")
    assert sorted(own.unseen()) == ["odd", "off (vda)", *([] if complete else ["stated (vda)"])]


@pytest.mark.parametrize("kind", ["running_definition", "saved_definition"])
def test_a_domain_uses_what_it_runs_with_and_what_its_managed_save_goes_on_with(host, tmp_path, kind):
    """Neither need be in its definition: a disk can be attached to a domain that runs, which is saved then."""
    template, one = str(tmp_path / "template"), str(tmp_path / "one")
    hot = domain("rescue", str(tmp_path / "alone"), one).definition
    host["rescue"] = domain("rescue", str(tmp_path / "alone"))._replace(**{kind: hot})
    (own,) = facts(host, "one")
    assert (own.writers, own.above(), own.unseen()) == (("rescue",), (), ())
    assert own.others_with(template) == ["rescue", "two"]
    (theirs,) = facts(host, "rescue")  # its own is no other domain's
    assert theirs.writers == ("alone",)


def test_a_managed_save_that_cannot_be_read_can_have_any_disks(host):
    host["two"] = host["two"]._replace(managed_save=True)
    (own,) = facts(host, "one")
    assert own.unseen() == ("two (its managed save)",)
    (theirs,) = facts(host, "two")
    assert theirs.unseen() == ()


def test_of_one_domain_without_a_chain_no_other_is_read(host, opened, tmp_path):
    (alone,) = facts(host, "alone")
    assert [layer.path for layer in alone.own] == [str(tmp_path / "alone")]
    assert opened == {str(tmp_path / "alone"): 1}


def test_a_template_is_not_the_own_image_of_a_clone(host, opened, tmp_path):
    (one,) = facts(host, "one")
    assert [layer.path for layer in one.layers] == [str(tmp_path / "one"), str(tmp_path / "template")]
    assert [layer.path for layer in one.own] == [str(tmp_path / "one")]
    del host["two"]
    (one,) = facts(host, "one")
    assert len(one.own) == 2


def test_the_images_of_a_template_are_its_own_though_clones_stand_on_them(host, tmp_path):
    top = qemu.create(tmp_path / "upgraded", "1M", "-b", str(tmp_path / "template"), "-F", "qcow2")
    clone = qemu.create(tmp_path / "three", "1M", "-b", top, "-F", "qcow2")
    host = {"template": domain("template", top), "three": domain("three", clone)}
    assert [os.path.basename(layer.path) for layer in facts(host, "template")[0].own] == ["upgraded", "template"]
    assert [os.path.basename(layer.path) for layer in facts(host, "three")[0].own] == ["three"]


def test_a_template_of_two_disks_of_a_domain_is_the_own_image_of_neither(host, tmp_path):
    host = {"both": domain("both", str(tmp_path / "one"), str(tmp_path / "two"))}
    assert [[os.path.basename(layer.path) for layer in one.own] for one in facts(host, "both")] == [["one"], ["two"]]


def test_a_chain_is_read_once_for_all_domains(host, opened):
    stock = Inventory(host)
    for _time in range(2):
        for one in host.values():
            for disk in one.definition.disks:
                stock.facts(one, disk)
    assert set(opened.values()) == {1}
    assert len(opened) == 3


def test_domains_that_write_to_one_image_are_known(host, tmp_path):
    host["twin"] = domain("twin", str(tmp_path / "alone"))
    (alone,) = facts(host, "alone")
    assert alone.writers == ("twin",)


def test_names_and_patterns(host):
    host["gone"] = Unreadable("gone", Refusal("libvirt_failed", "gone", "cannot be told"))
    stock = Inventory(host)
    found, unmatched = stock.select(["on*", "two", "one", "nobody*", "nobody", "gone"])
    assert [one.name for one in found] == ["one", "two", "nobody", "gone"]
    assert unmatched == ["nobody*"]
    assert [one.problem.code for one in found[2:]] == ["no_domain", "libvirt_failed"]


def test_a_chain_that_cannot_be_read(host, tmp_path):
    (tmp_path / "template").unlink()
    (one,) = facts(host, "one")
    assert (one.layers, one.problem.code) == ((), "no_such_file")


def test_a_topmost_image_whose_bitmaps_are_damaged_is_told_whatever_is_asked_for(host, tmp_path):
    qemu.add_bitmaps(tmp_path / "one", [Bitmap("monday", 65536, True, False)])
    qemu.patch(tmp_path / "one", qemu.directory_of(tmp_path / "one")[0], b"\xff" * 8)
    (one,) = facts(host, "one")
    assert (one.layers, one.problem.code) == ((), "damaged")


def by_volume(name, place, device="disk"):
    """Return a domain with one disk that is a volume, which has this place."""
    text = (
        f"<domain><devices><disk type='volume' device='{device}'><driver type='qcow2'/><source pool='p' volume='v'/>"
        "<target dev='vda'/></disk></devices></domain>"
    )
    (volume,) = Definition(text).volumes
    return Domain(name, name, None, True, False, Definition(text, {volume: place}), None)


def test_a_volume_is_used_like_a_file(host, tmp_path):
    host["twin"] = by_volume("twin", Place(str(tmp_path / "alone")))
    (alone,) = facts(host, "alone")
    assert (alone.writers, alone.suspects) == (("twin",), ())
    host["twin"] = by_volume("twin", Place(str(tmp_path / "template")))
    del host["two"]
    assert len(facts(host, "one")[0].own) == 1


@pytest.mark.parametrize(
    "suspect, device, names",
    [
        ("{}/alone", "disk", ("twin",)),
        ("{}/link/alone", "disk", ("twin",)),
        ("alone", "disk", ("twin",)),
        ("elsewhere", "disk", ()),
        ("/elsewhere/alone", "disk", ()),
        ("alone", "cdrom", ()),
    ],
)
def test_a_volume_that_cannot_be_looked_up_may_be_an_image(host, tmp_path, suspect, device, names):
    (tmp_path / "link").symlink_to(tmp_path)
    place = Place(None, "volume", "no pool", suspect.format(tmp_path))
    host["twin"] = by_volume("twin", place, device)
    (alone,) = facts(host, "alone")
    assert (alone.writers, alone.suspects) == ((), names)
    assert facts(host, "twin")[0].suspects == ()


def test_the_template_that_a_volume_may_be_is_not_the_own_image_of_a_clone(host):
    del host["two"]
    host["twin"] = by_volume("twin", Place(None, "volume", "no pool", "template"))
    assert len(facts(host, "one")[0].own) == 1


def test_a_file_that_is_absent(host, tmp_path):
    assert not facts(host, "alone")[0].is_absent
    (tmp_path / "alone").unlink()
    assert facts(host, "alone")[0].is_absent
    (tmp_path / "alone").symlink_to("nowhere")
    assert facts(host, "alone")[0].is_absent


def test_the_first_image_is_one_that_is_there(tmp_path):
    text = (
        "<domain><devices><disk type='file'><source file='{}' startupPolicy='{}'/><target dev='vda'/></disk>"
        "<disk type='file'><source file='/x'/><target dev='vdb'/></disk></devices></domain>"
    )
    gone = str(tmp_path / "gone")
    for policy, first in (("optional", "/x"), ("requisite", gone)):
        one = Domain("web", "web", None, True, False, Definition(text.format(gone, policy)), None)
        assert first_image(one) == first


def test_a_file_is_one_by_whichever_name(tmp_path):
    """As by a hard link, or a second mount of its folder."""
    base = qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")
    for name, path in (("linked", base), ("link", top)):
        os.link(path, tmp_path / name)
    host = {
        "web": domain("web", top),
        "below": domain("below", str(tmp_path / "linked")),
        "same": domain("same", str(tmp_path / "link")),
    }
    (own,) = facts(host, "web")
    assert own.writers == ("same",)
    assert [layer.path for layer in own.lent] == [base]
    assert own.others_with(base) == ["below", "same"]
    assert own.others_with(str(tmp_path / "none")) == []


def test_a_domain_that_stands_on_a_topmost_image_is_known(tmp_path):
    """Its overlay can lie in a folder where nobody looks."""
    base = qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")
    (tmp_path / "other").mkdir()
    clone = qemu.create(tmp_path / "other" / "clone", "1M", "-b", top, "-F", "qcow2")
    host = {"web": domain("web", top), "same": domain("same", top), "clone": domain("clone", clone)}
    stock = Inventory(host)
    (own,) = [stock.facts(host["web"], disk) for disk in host["web"].definition.disks]
    assert own.above() == ("clone",)
    assert stock.sharers(own) == tuple((path, "a disk of the domain clone") for path in (top, base))
    (theirs,) = [stock.facts(host["clone"], disk) for disk in host["clone"].definition.disks]
    assert theirs.above() == ()
    assert [path for path, _whose in stock.sharers(theirs)] == [top, base]


def test_a_domain_that_is_called_like_a_pattern_hides_no_other(host):
    host["*"] = domain("*")
    found, unmatched = Inventory(host).select(["*"])
    assert (sorted(one.name for one in found), unmatched) == (["*", "alone", "one", "two"], [])
