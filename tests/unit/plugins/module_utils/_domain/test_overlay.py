# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the disks of a domain, decided from facts."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import DiskFacts
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.overlay import plan_domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.plan import SnapshotRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import Layer

REQUEST = SnapshotRequest(snapshot="s", targets=None, directory=None, relative=False, creation=Creation())


def disk(target, path, more=""):
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>{more}"
        f"<target dev='{target}'/></disk>"
    )


def domain(*disks, state=None):
    definition = Definition(f"<domain><devices>{''.join(disks)}</devices></domain>")
    return Domain("web", "uuid", state, True, False, definition, definition if state else None)


def layer(path, image_format="qcow2"):
    return Layer(path, path, (1, hash(path)), image_format, image_format or "qcow2", 1 << 20, False, None)


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
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2"), writers=("db",)), REQUEST)
    assert sorted(problem.code for problem in plan.problems) == ["other_chain", "shared_disk"]
    running = domain(disk("vda", "/srv/web.qcow2"), disk("vdb", "/srv/web.qcow2"), state="running")
    plan = plan_domain(running, facts(running, layer("/srv/web.qcow2"), writers=("db",)), REQUEST)
    codes = sorted(problem.code for problem in plan.problems)
    assert codes == ["running", "same_name", "shared_disk", "shared_disk"]


def test_a_chain_that_cannot_be_read_is_told_beside_the_rest():
    gone = Refusal("no_such_file", "/srv/web.qcow2", "does not exist")
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, problem=gone, writers=("db",)), REQUEST)
    assert [problem.code for problem in plan.problems] == ["no_such_file", "shared_disk"]


@pytest.mark.parametrize(
    "targets, codes", [(None, []), (("vda",), []), (("vda", "vdz"), ["disk_unfit"]), (("vdz",), ["disk_unfit"])]
)
def test_disks_that_are_asked_for(targets, codes):
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2")), REQUEST._replace(targets=targets))
    assert [problem.code for problem in plan.problems] == codes


def test_a_plan_holds_the_definition_that_the_domain_is_to_get():
    web = domain(disk("vda", "/srv/web.qcow2"))
    plan = plan_domain(web, facts(web, layer("/srv/web.qcow2")), REQUEST)
    assert plan.definition.tops == {"vda": "/srv/web.s.qcow2"}
    assert plan.domain.definition.tops == {"vda": "/srv/web.qcow2"}
    on_it = domain(disk("vda", "/srv/web.s.qcow2"))
    plan = plan_domain(on_it, facts(on_it, layer("/srv/web.s.qcow2"), layer("/srv/web.qcow2")), REQUEST)
    assert (plan.sources, plan.definition.text) == ({}, on_it.definition.text)


def test_snapshots_of_libvirts_own_are_refused_only_where_something_is_to_be_done():
    web = domain(disk("vda", "/srv/web.qcow2"))
    own = facts(web, layer("/srv/web.qcow2"))
    plan = plan_domain(web, own, REQUEST, [f"s{number}" for number in range(7)])
    assert [problem.code for problem in plan.problems] == ["libvirt_snapshots"]
    assert "(s0, s1, s2, s3, s4 and 2 more)" in str(plan.problems[0])
    assert plan_domain(web, own, REQUEST._replace(allows_snapshots=True), ["s"]).problems == ()
    on_it = domain(disk("vda", "/srv/web.s.qcow2"))
    there = facts(on_it, layer("/srv/web.s.qcow2"), layer("/srv/web.qcow2"))
    assert plan_domain(on_it, there, REQUEST, ["s"]).problems == ()
