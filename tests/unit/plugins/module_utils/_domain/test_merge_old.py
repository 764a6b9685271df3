# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What retention takes for a merge that a killed run has begun."""

from __future__ import annotations

import os
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import merge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import leave_sign
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import merge_old
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.plan import DomainOutcome
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.retention import OwnImage, Retention, Step
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.wayback import WayBack, plan_commit
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark

from .. import qemu
from .hosts import SETTINGS, Host

MONTH = 30 * 86400


NEW = History()


class Daemon:
    """Knows one domain, with these images at vda and vdb."""

    def __init__(self, *paths):
        disk = "<disk type='file'><driver type='qcow2'/><source file='{}'/><target dev='{}'/></disk>"
        disks = "".join(disk.format(path, target) for path, target in zip(paths, ("vda", "vdb")))
        definition = Definition(f"<domain><devices>{disks}</devices></domain>")
        self._domain = Domain("web", "uuid", "running", True, False, definition, definition)

    def domains(self):
        return {"web": self._domain}


def snapshot(tmp_path, target, history=NEW):
    """Make a disk with a snapshot of today, and return the path of both."""
    base, top = tmp_path / f"{target}.qcow2", tmp_path / f"{target}.mon.qcow2"
    qemu.create(base, "1M")
    qemu.create(top, "1M", "-b", str(base), "-F", "qcow2")
    with OpenImage(str(top), os.open(top, os.O_RDWR)) as file:
        write_mark(file, Mark("uuid", target, "mon"), history)
    return str(base), str(top)


@pytest.mark.parametrize("is_begun, picked", [(True, ["mon"]), (False, [])])
def test_a_snapshot_that_was_made_since_by_the_name_of_a_leftover_is_not_merged_down(tmp_path, is_begun, picked):
    _base, on_it = snapshot(tmp_path, "vda")
    base, left_over = snapshot(tmp_path, "vdb")  # the domain is on the image below it
    for path in (left_over, *([on_it] if is_begun else [])):
        with open_image(path) as file:
            leave_sign(file)
    retention = Retention(MONTH, 0, time.time())
    old = merge_old._find_old(Daemon(on_it, base), ["web"], WayBack(""), retention)
    assert [one.snapshot for one in old["uuid"].picked] == picked


@pytest.mark.parametrize("days_made, days_written, picked", [(40, 0, ["mon"]), (0, 40, ["mon"]), (0, 0, [])])
def test_what_is_written_to_the_image_below_later_does_not_make_a_snapshot_younger(
    tmp_path, days_made, days_written, picked
):
    """As when a backup tool removes a checkpoint."""
    now = time.time()
    base, top = snapshot(tmp_path, "vda", History(made=int(now - days_made * 86400) * 10**9))
    os.utime(base, (now, now - days_written * 86400))
    old = merge_old._find_old(Daemon(top), ["web"], WayBack(""), Retention(MONTH, 0, now))
    assert [one.snapshot for one in old["uuid"].picked] == picked


def test_the_vault_of_a_merge_that_is_done_has_no_new_snapshot_of_that_name_merged_down(tmp_path, monkeypatch):
    base, top = snapshot(tmp_path, "vda")
    monkeypatch.setattr(merge, "remove_vault", lambda _path: None)  # as if it had been killed before
    run(merge.MergeLayers(), [CommitRequest(top, base)], SETTINGS)
    assert sorted(os.listdir(tmp_path)) == [".vda.qcow2.kvmfleet-vault-given", "vda.qcow2"]
    os.unlink(base)
    assert snapshot(tmp_path, "vda") == (base, top)
    retention = Retention(MONTH, 3, time.time())
    old = merge_old._find_old(Daemon(top), ["web"], WayBack(""), retention)
    assert [one.snapshot for one in old["uuid"].picked] == []


@pytest.mark.parametrize("ends", ["refused", "signal"])
def test_what_earlier_rounds_have_done_is_told_if_a_later_one_is_not_made(monkeypatch, ends):
    """Two domains have two old snapshots each; a signal cuts off the first merge of the second one, or libvirt goes."""
    names = []

    class Rounds:
        def __init__(self, _daemon, names_now, _aims, _settings):
            names.append(list(names_now))
            if len(names) == 2:
                raise Refusal("libvirt_failed", "", "libvirt cannot list its domains")

        def run(self):
            cut_off = Refusal("interrupted", "db", "is not done")
            web = DomainOutcome("web", "web", "committed", changed=True)
            db = DomainOutcome("db", "db", "committed", changed=True)
            if ends == "signal":
                db = db._replace(state="failed", changed=False, problems=(cut_off,))
            return [web, db], ["odd"]

    steps = (Step("mon", "mon"), Step("tue", "tue"))
    monkeypatch.setattr(merge_old, "Call", Rounds)
    monkeypatch.setattr(
        merge_old, "_find_old", lambda *_more: {name: merge_old._Old((), steps, 2) for name in ("web", "db")}
    )
    (web, db), warnings = merge_old.merge_old(
        None, ["*"], WayBack(""), Retention(MONTH, 0, time.time()), lambda _request: [], SETTINGS
    )
    assert names == ([["*"]] if ends == "signal" else [["*"], ["web", "db"]])
    code = "interrupted" if ends == "signal" else "libvirt_failed"
    assert [(one.state, one.problems[0].code) for one in (web, db)] == [("failed", code)] * 2
    assert (web.changed, warnings, web.problems[0].subject) == (True, ["odd"], "web")


class Known:
    """Knows the domains of a host."""

    def __init__(self, host):
        self.domains = lambda: host.domains


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    host = Host(tmp_path)
    host.image("a.qcow2")
    host.image("b.qcow2")
    host.define("web", "a.qcow2", "b.qcow2")
    for name in ("mon", "tue", "wed"):
        assert len(host.snapshot("web", name)) == 2
    return host


def joined(host, keep, **more):
    """Merge down all but so many snapshots of the domain."""
    settings = SETTINGS._replace(**more)
    daemon, retention = Known(host), Retention(None, keep, time.time())
    old = merge_old._find_old(daemon, ["web"], WayBack(""), retention)["uuid-of-web"]
    states = []
    for step in old.steps[: old.foreseen] if settings.check_mode else old.steps:
        facts, domain = Inventory(host.domains), host.domains["web"]
        disks = [facts.facts(domain, disk) for disk in domain.definition.disks]
        plan = plan_commit(domain, disks, WayBack(step.highest, lowest=step.lowest))
        assert plan.problems == ()
        vms = {domain.uuid: Vm(lambda: None)}
        outcome = run(merge.MergeLayers(), [disk.request for disk in plan.disks], settings, vms)
        states += [verdict.state for verdict in outcome.verdicts]
        if plan.sources and not outcome.failures and not settings.check_mode:
            host.domains["web"] = domain._replace(definition=plan.definition)
    return old, states


def cut_off(monkeypatch, where, allowed=0):
    """Have a step of a merge fail as if the run had been killed there, once it was taken so many times."""
    left, real = [None] * allowed, getattr(merge, where)

    def killed(*arguments):
        if not left:
            raise Refusal("killed", "", "is killed")
        left.pop()
        return real(*arguments)

    monkeypatch.setattr(merge, where, killed)


@pytest.mark.parametrize("where", ["bring", "mark_given"])
def test_what_is_picked_since_is_merged_down_after_what_was_begun(host, monkeypatch, where):
    host.snapshot("web", "thu")
    with monkeypatch.context() as patch:
        cut_off(patch, where)
        old, states = joined(host, keep=2)
        assert (old.steps, states) == ((Step("tue", "mon"),), ["failed"] * 2)
    old, states = joined(host, keep=1, check_mode=True)
    assert (old.steps, old.foreseen, states) == ((Step("tue", "mon"), Step("wed", "wed")), 1, ["committed"] * 2)
    assert [one.snapshot for one in old.picked] == ["mon", "tue", "wed"]
    _old, states = joined(host, keep=1)
    assert states == ["committed"] * 4
    assert sorted(os.listdir(host.folder)) == ["a.qcow2", "a.thu.qcow2", "b.qcow2", "b.thu.qcow2"]
    assert joined(host, keep=1)[1] == []


@pytest.mark.parametrize("allowed", range(4))
def test_joined_images_of_which_some_are_retired_are_all_retired_by_the_same_call(host, monkeypatch, allowed):
    with monkeypatch.context() as patch:
        cut_off(patch, "retire", allowed)
        assert "failed" in joined(host, keep=1)[1]
    assert joined(host, keep=1, check_mode=True)[1] != []
    _old, states = joined(host, keep=1)
    assert set(states) == {"committed"}
    assert sorted(os.listdir(host.folder)) == ["a.qcow2", "a.wed.qcow2", "b.qcow2", "b.wed.qcow2"]
    assert joined(host, keep=1)[1] == []


def test_a_vault_that_alone_is_left_goes(host, monkeypatch):
    with monkeypatch.context() as patch:
        cut_off(patch, "remove_vault")
        joined(host, keep=1)
    joined(host, keep=1)
    assert sorted(os.listdir(host.folder)) == ["a.qcow2", "a.wed.qcow2", "b.qcow2", "b.wed.qcow2"]


def test_the_end_of_a_merge_has_no_snapshot_of_that_name_merged_that_was_made_since():
    """As on another disk, or in another folder."""
    done = merge_old._BegunMerge("vda", ("tue",), is_in_chain=False)
    begun = merge_old._BegunMerge("vdb", ("mon", "tue"), is_in_chain=True)
    on_it = [OwnImage("vdb", "mon", 1, None, 0), OwnImage("vdb", "tue", 2, None, 0)]
    assert merge_old._without_new([], [done]) == [done]
    assert merge_old._without_new(on_it, [done]) == []
    assert merge_old._without_new(on_it, [done, begun]) == [done, begun]
    assert merge_old._without_new([*on_it, OwnImage("vda", "tue", 3, None, 0)], [done, begun]) == [begun]
