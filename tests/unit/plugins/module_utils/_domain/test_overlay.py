# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the disks of a domain, decided from facts."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.fitness import Fitness, fitness_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import DiskFacts
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.overlay import plan_domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.plan import SnapshotRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Kept
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import Layer
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import Image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark

from .. import qemu

REQUEST = SnapshotRequest(snapshot="s", targets=None, directory=None, relative=False, creation=Creation())


def disk(target, path, more=""):
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>{more}"
        f"<target dev='{target}'/></disk>"
    )


def domain(*disks, state=None):
    definition = Definition(f"<domain><devices>{''.join(disks)}</devices></domain>")
    return Domain("web", "uuid", state, True, False, definition, definition if state else None)


@pytest.fixture(name="image", scope="module")
def fixture_image(tmp_path_factory):
    """Have what is read of an overlay that is the snapshot s."""
    path = qemu.create(tmp_path_factory.mktemp("images") / "marked.qcow2")
    return qemu.read(path)._replace(mark=Mark("uuid", "vda", "s"))


def layer(path, image_format="qcow2", image=None, data_file=None):
    image = image or Image(*[None] * len(Image._fields))._replace(data_file=data_file)
    return Layer(path, path, (1, hash(path)), image_format, image_format or "qcow2", 1 << 20, False, image)


def facts(one, *layers, **more):
    """Return the facts of each disk of a domain, all with the same chain."""
    return [DiskFacts(disk=each, is_device=False, layers=layers, own=layers, **more) for each in one.definition.disks]


def test_every_problem_of_a_disk_is_told():
    web = domain(
        disk(
            "vda",
            "/srv/web.qcow2",
            "<backingStore type='file'><format type='qcow2'/><source file='/x'/></backingStore>",
        )
    )
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2"), writers=("db",)), REQUEST, Kept())
    assert sorted(problem.code for problem in plan.problems) == ["other_chain", "shared_disk"]
    running = domain(disk("vda", "/srv/web.qcow2"), disk("vdb", "/srv/web.qcow2"), state="running")
    plan = plan_domain(running, facts(running, layer("/srv/web.qcow2"), writers=("db",)), REQUEST, Kept())
    assert sorted(problem.code for problem in plan.problems) == ["running", "shared_disk", "shared_disk"]


def test_a_chain_that_cannot_be_read_is_told_beside_the_rest():
    gone = Refusal("no_such_file", "/srv/web.qcow2", "does not exist")
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, problem=gone, writers=("db",)), REQUEST, Kept())
    assert [problem.code for problem in plan.problems] == ["no_such_file", "shared_disk"]


@pytest.mark.parametrize(
    "targets, codes", [(None, []), (("vda",), []), (("vda", "vdz"), ["disk_unfit"]), (("vdz",), ["disk_unfit"])]
)
def test_disks_that_are_asked_for(targets, codes):
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2")), REQUEST._replace(targets=targets), Kept())
    assert [problem.code for problem in plan.problems] == codes


def test_a_plan_holds_the_definition_that_the_domain_is_to_get(image):
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2")), REQUEST, Kept())
    assert plan.definition.tops == {"vda": "/srv/web.s.qcow2"}
    assert plan.domain.definition.tops == {"vda": "/srv/web.qcow2"}
    on_it = domain(disk("vda", "/srv/web.s.qcow2"))
    plan = plan_domain(
        on_it, facts(on_it, layer("/srv/web.s.qcow2", image=image), layer("/srv/web.qcow2")), REQUEST, Kept()
    )
    assert (plan.sources, plan.definition.text) == ({}, on_it.definition.text)


def test_snapshots_of_libvirts_own_are_refused_only_where_something_is_to_be_done(image):
    web = domain(disk("vda", "/srv/web.qcow2"))
    own = facts(web, layer("/srv/web.qcow2"))
    plan = plan_domain(web, own, REQUEST, Kept(snapshots=tuple(f"s{number}" for number in range(7))))
    assert [problem.code for problem in plan.problems] == ["libvirt_snapshots"]
    assert "(s0, s1, s2, s3, s4 and 2 more)" in str(plan.problems[0])
    assert plan_domain(web, own, REQUEST._replace(allows_snapshots=True), Kept(snapshots=("s",))).problems == ()
    on_it = domain(disk("vda", "/srv/web.s.qcow2"))
    there = facts(on_it, layer("/srv/web.s.qcow2", image=image), layer("/srv/web.qcow2"))
    assert plan_domain(on_it, there, REQUEST, Kept(snapshots=("s",))).problems == ()


def plan_of(*disks, layers=(), **wanted):
    """Return the plan of a domain with these disks, each with these layers."""
    web = domain(*disks)
    return plan_domain(web, facts(web, *(layers or [layer("/srv/web.qcow2")])), REQUEST._replace(**wanted), Kept())


NETWORK = "<disk type='network'><source protocol='rbd' name='x'/><target dev='vdb'/></disk>"
LOGICAL = "<disk type='block'><source dev='/dev/vg/lv'/><target dev='vdb'/></disk>"
FITS = disk("vda", "/srv/web.qcow2")


def codes(plan):
    return [problem.code for problem in plan.problems]


@pytest.mark.parametrize("unfit", [NETWORK, LOGICAL])
def test_half_a_snapshot_is_a_failure(unfit):
    plan = plan_of(FITS, unfit)
    assert codes(plan) == ["disk_unfit"]
    assert "web: its disk vdb cannot take part" in str(plan.problems[0])
    assert plan.skipped[0].reason in str(plan.problems[0])
    assert "unfit_disks=skip" in str(plan.problems[0])
    assert plan.missed == ("vdb",)


def test_half_a_snapshot_is_a_warning_if_it_is_wanted():
    plan = plan_of(FITS, NETWORK, skips_unfit=True)
    assert (codes(plan), plan.missed, len(plan.disks)) == ([], ("vdb",), 1)
    assert plan.warnings == ["web: its disk vdb is not in the snapshot: network."]


@pytest.mark.parametrize(
    "more, wanted",
    [
        ([NETWORK.replace("<disk", "<disk snapshot='no'")], {}),
        ([LOGICAL.replace("<disk", "<disk snapshot='no'")], {}),
        ([NETWORK], {"targets": ("vda",)}),
        (["<disk type='network' device='cdrom'><source protocol='http'/><target dev='sda'/></disk>"], {}),
        (["<disk type='file' device='floppy'><target dev='fda'/></disk>"], {}),
        ([NETWORK.replace("<target", "<readonly/><target")], {}),
        ([disk("vdb", "/srv/t.qcow2", "<transient/>")], {}),
        (["<disk type='file'><target dev='vdb'/></disk>"], {}),
    ],
)
def test_what_is_excluded_or_not_written_to_is_not_missed(more, wanted):
    plan = plan_of(FITS, *more, **wanted)
    assert (codes(plan), plan.missed, plan.warnings) == ([], (), [])


def test_a_disk_that_is_named_and_unfit_is_told_once_whatever_is_said_of_unfit_disks():
    for skips_unfit in (False, True):
        plan = plan_of(FITS, NETWORK, targets=("vda", "vdb"), skips_unfit=skips_unfit)
        assert [str(problem) for problem in plan.problems] == [
            "web: its disk vdb cannot take part: network. Correct disks."
        ]


def test_the_rule_of_fitness_needs_no_call():
    (lv,) = facts(domain(LOGICAL))
    assert fitness_of(lv, None).why_unfit.startswith("block device")
    assert fitness_of(lv, "/srv") == Fitness(None, is_missed=False)
    (file,) = facts(domain(FITS))
    assert fitness_of(file._replace(is_device=True), None).is_missed


def test_an_optional_disk_whose_file_is_absent_is_left_out_with_a_warning():
    web = domain(FITS, disk("vdb", "/srv/usb.qcow2"), disk("vdc", "/srv/x.qcow2"))
    gone = Refusal("no_such_file", "/srv/usb.qcow2", "does not exist")
    first, second, third = facts(web, layer("/srv/web.qcow2"))
    absent = second._replace(is_absent=True, problem=gone, layers=(), own=())
    optional = absent._replace(disk=absent.disk._replace(is_optional=True))
    assert codes(plan_domain(web, [first, absent], REQUEST, Kept())) == ["no_such_file"]
    plan = plan_domain(web, [first, optional], REQUEST, Kept())
    assert (codes(plan), plan.missed, plan.absent) == ([], (), ("vdb",))
    assert "web: its disk vdb was left out: its file does not exist" in plan.warnings[0]
    there = third._replace(disk=third.disk._replace(is_optional=True))
    assert len(plan_domain(web, [first, there], REQUEST, Kept()).disks) == 2
    assert plan_domain(web, [first, optional], REQUEST._replace(targets=("vda",)), Kept()).warnings == []
    assert codes(plan_domain(web, [first, optional], REQUEST._replace(targets=("vdb",)), Kept())) == ["disk_unfit"]


STATED = "<source file='/srv/web.qcow2'><dataStore type='file'><source file='{}'/></dataStore></source>"


@pytest.mark.parametrize(
    "stated, recorded, problems",
    [
        ("/srv/web.data", "/srv/web.data", []),
        ("/srv/web.data", "web.data", []),
        ("/srv/web.data", None, ["other_chain"]),
        ("/srv/web.data", "/srv/other.data", ["other_chain"]),
    ],
)
def test_a_stated_data_file_is_the_recorded_one(stated, recorded, problems):
    top = disk("vda", "/srv/web.qcow2").replace("<source file='/srv/web.qcow2'/>", STATED.format(stated))
    plan = plan_of(top, layers=[layer("/srv/web.qcow2", data_file=recorded)])
    assert codes(plan) == problems
    assert ("dataStore" in plan.definition.text) == bool(problems)
    below = "<backingStore type='file'><format type='qcow2'/>" + STATED.format(stated) + "</backingStore>"
    layers = [layer("/srv/x.qcow2"), layer("/srv/web.qcow2", data_file=recorded)]
    plan = plan_of(disk("vda", "/srv/x.qcow2", below), layers=layers)
    assert codes(plan) == problems


def test_a_stated_chain_has_nothing_that_no_image_records():
    below = "<backingStore type='file'><format type='qcow2'/><source file='/srv/base.qcow2'>{}</source></backingStore>"
    layers = [layer("/srv/web.qcow2"), layer("/srv/base.qcow2")]
    assert codes(plan_of(disk("vda", "/srv/web.qcow2", below.format("<seclabel/>")), layers=layers)) == []
    plan = plan_of(disk("vda", "/srv/web.qcow2", below.format("<slices/>")), layers=layers)
    assert codes(plan) == ["other_chain"]
    assert "vda: <backingStore> has slices for /srv/base.qcow2" in str(plan.problems[0])


def test_a_disk_that_may_be_that_of_another_domain_is_refused():
    web = domain(FITS)
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2"), suspects=("db",)), REQUEST, Kept())
    assert codes(plan) == ["shared_disk"]
    assert "may be a disk of db too" in str(plan.problems[0])
