# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In which state a domain must be to be worked on while it runs, and how it is planned then; on real images."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import running as running_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import leave_sign
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest, CommitVerdict
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import (
    Creation,
    OverlayRequest,
    OverlayVerdict,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.running import Known
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import live
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.aims import MergeDown, PutOnOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.checkpoints import Chain, judge_checkpoints
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.live import (
    Live,
    MergeRunningDown,
    PutRunningOn,
    not_live,
    not_quiescent,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.plan import DomainOutcome, SnapshotRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.run import Call
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.wayback import WayBack, plan_commit
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import (
    Kept,
    KnownCheckpoint,
    LiveBitmaps,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition, Place, Volume
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.pools import Pools
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import write_leaving

from .. import qemu
from .hosts import SETTINGS, Host

LIVE = Live((9, 0, 0))
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>"


class RunningHost(Host):
    """A host whose domains run, with the chains that their images record."""

    def start(self, name, **changed):
        """Have a domain run; libvirt states the whole chain of a domain that runs."""
        domain = self.domains[name]
        text = domain.definition.text
        for facts in self.facts(name):
            below = "<backingStore/>"
            for layer in reversed(facts.layers[1:]):
                source = f"<format type='{layer.format_found}'/><source file='{layer.path}'/>"
                below = f"<backingStore type='file'>{source}{below}</backingStore>"
            place = re.search(f"<target dev=.{facts.disk.target}./>", text).start()
            text = text[:place] + below + text[place:]
        self.domains[name] = domain._replace(state="running", running_definition=Definition(text))._replace(**changed)
        return self.domains[name]

    def facts(self, name):
        inventory, domain = Inventory(self.domains), self.domains[name]
        return [inventory.facts(domain, disk) for disk in domain.definition.disks]

    def put_on(self, name, snapshot, live=LIVE):
        aim = PutRunningOn(SnapshotRequest(snapshot, None, None, False, Creation()), AttributeOptions(), live)
        assert aim.takes(self.domains[name])
        return aim.plan(self.domains[name], self.facts(name), Kept())

    def merge(self, name, snapshot, live=LIVE):
        aim = MergeRunningDown(WayBack(snapshot), live)
        return aim.plan(self.domains[name], self.facts(name), Kept())


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    host = RunningHost(tmp_path)
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    return host


def codes(plan):
    return [problem.code for problem in plan.problems]


def names(plan):
    return [os.path.basename(source.path) for source in plan.sources.values()]


def test_a_domain_that_runs_gets_the_names_of_one_that_is_shut_off(host):
    host.start("web")
    assert (codes(host.put_on("web", "mon")), names(host.put_on("web", "mon"))) == ([], ["web.mon.qcow2"])
    assert codes(host.put_on("web", "mon", None)) == ["running"]


def test_the_chain_that_qemu_has_open_must_be_the_one_that_the_images_record(host):
    assert host.snapshot("web", "mon") == ["web.mon.qcow2"]
    domain = host.start("web")
    assert codes(host.put_on("web", "tue")) == []
    other = domain.running_definition.text.replace("/web.qcow2", "/other.qcow2")
    host.domains["web"] = domain._replace(running_definition=Definition(other))
    assert codes(host.put_on("web", "tue")) == ["other_chain"]
    assert codes(host.merge("web", "mon")) == ["other_chain"]


@pytest.mark.parametrize("has_sign", [True, False])
def test_what_qemu_alone_has_merged_down_is_not_taken_for_the_end_of_a_merge(host, has_sign):
    for snapshot in ("mon", "tue"):
        host.snapshot("web", snapshot)
    host.start("web")
    middle = str(host.folder / "web.mon.qcow2")
    if has_sign:
        with open_image(middle) as file:
            leave_sign(file)
    top, base = host.folder / "web.tue.qcow2", host.folder / "web.qcow2"
    qemu.qemu_img("rebase", "-u", "-b", str(base), "-F", "qcow2", str(top))
    code = "not_switched" if has_sign else "other_chain"
    for plan in (host.merge("web", "mon"), host.merge("web", "tue"), host.put_on("web", "wed")):
        (problem,) = plan.problems
        assert problem.code == code
        assert (f"'qemu-img rebase -u -f qcow2 -F qcow2 -b {middle} {top}'" in problem.remedy) == has_sign


@pytest.mark.parametrize("lacking", [None, "below", "above", "sign"])
def test_what_went_in_without_its_bitmaps_is_not_put_aside(host, lacking):
    """The definition states no chain, so that of an overlay which was made while the domain was shut off."""
    for snapshot in ("mon", "tue"):
        host.snapshot("web", snapshot)
    middle, top, base = (str(host.folder / f"web{part}.qcow2") for part in (".mon", ".tue", ""))
    has_it = [middle, *([top] if lacking != "above" else []), *([base] if lacking is None else [])]
    for path in has_it:
        qemu.add_bitmaps(path, [Bitmap("c1", 65536, True, False)])
    if lacking != "sign":
        with open_image(middle) as file:
            leave_sign(file)
    seen = str(host.folder / "seen")
    qemu.qemu_img("convert", "-O", "raw", top, seen)
    qemu.qemu_img("commit", "-q", "-d", middle)
    qemu.qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", top)
    shut_off = plan_commit(host.domains["web"], host.facts("web"), WayBack("mon")).problems
    host.start("web")
    running = host.merge("web", "mon").problems
    if lacking != "below":
        assert (running, "lost_bitmaps" in [one.code for one in shut_off]) == ((), False)
        return
    assert running == shut_off
    assert (running[0].code, running[0].subject) == ("lost_bitmaps", middle)
    assert "(c1)" in running[0].why
    subprocess.run(shlex.split(re.search("by '(qemu-img .*)', which compares", running[0].remedy)[1]), check=True)
    qemu.qemu_img("compare", "-f", "qcow2", "-F", "raw", top, seen)
    host.domains["web"] = host.domains["web"]._replace(state=None, running_definition=None)
    assert plan_commit(host.domains["web"], host.facts("web"), WayBack("mon")).problems == ()


def test_layers_are_merged_on_top_and_further_down(host):
    for snapshot in ("mon", "tue"):
        host.snapshot("web", snapshot)
    host.start("web")
    assert names(host.merge("web", "tue")) == ["web.mon.qcow2"]
    down = host.merge("web", "mon")
    assert (codes(down), names(down)) == ([], [])  # libvirt sees to the definition
    assert os.path.basename(down.disks[0].request.above) == "web.tue.qcow2"
    assert host.merge("web", "wed").disks == ()


class OneDomain:
    """A daemon with one domain alone, which has this XML."""

    def __init__(self, text):
        self.text = text

    @property
    def connection(self):
        return self

    def lookupByUUIDString(self, _uuid):  # noqa: N802  libvirt's names
        return self

    def XMLDesc(self, _flags):  # noqa: N802
        return self.text


def running(domain):
    """Return the XML of a domain that runs, as libvirt gives it."""
    return domain.running_definition.text.replace("<domain", "<domain id='1'", 1)


@pytest.mark.parametrize(
    "text, why",
    [
        ("<domain><devices/></domain>", "was shut off meanwhile"),
        ("<domain id='2'><devices/></domain>", "has got other disks meanwhile"),
    ],
)
def test_a_domain_whose_turn_comes_must_still_run_as_it_was_planned(host, text, why):
    domain = host.start("web")

    aims = [
        PutRunningOn(SnapshotRequest("mon", None, None, False, Creation()), AttributeOptions(), LIVE),
        MergeRunningDown(WayBack("mon"), LIVE),
    ]
    for aim in aims:
        with pytest.raises(Refusal, match=why):
            aim.confirm(OneDomain(text), domain)
    for aim in aims:
        aim.confirm(OneDomain(running(domain)), domain)


def test_the_disk_whose_jobs_are_asked_for(host):
    """Of a new overlay its mark tells it: of a volume libvirt tells no path."""
    host.snapshot("web", "mon")
    domain = host.start("web")
    asked = []

    class WithBackup(OneDomain):
        """Of whose domain a backup is made."""

        def jobStats(self, _flags):  # noqa: N802
            return {"type": 2, "operation": 9}

        def blockJobInfo(self, target, _flags):  # noqa: N802
            asked.append(target)
            return {"type": 5, "cur": 0, "end": 1}

        def in_time(self, _uuid, ask):
            return ask(self)

    daemon = WithBackup(running(domain))
    domains = live.RunningDomains(daemon, [domain])
    with pytest.raises(Refusal, match="has a block job .backup.") as caught:
        domains.check_for_snapshot(host.put_on("web", "tue").disks[0].request)
    assert caught.value.code == "block_job"
    request = host.merge("web", "mon").disks[0].request
    with pytest.raises(Refusal, match="has a block job of another kind .backup."):
        domains.check_for_merge(request, resumes=True)
    assert asked == ["vda", "vda"]
    daemon.text = daemon.text.replace("web.mon.qcow2", "other.qcow2")
    with pytest.raises(Refusal, match="has got other disks meanwhile"):
        domains.check_for_merge(request, resumes=False)


def test_that_all_is_merged_down_is_told_if_libvirt_cannot_be_asked_afterwards(host, monkeypatch):
    def lost(*_more):
        raise Refusal("libvirt_unreachable", "uri", "libvirt's daemon went away", "Start it, then run this again.")

    host.snapshot("web", "mon")
    host.start("web")
    monkeypatch.setattr(live, "check_on", lost)
    with pytest.raises(Refusal, match="Start it, then run this again. All images of web are merged down already."):
        MergeRunningDown(WayBack("mon"), LIVE).switch(None, host.merge("web", "mon"), 1)


def start_on_volume(host, name, image):
    """Have a domain run that is defined by the volume that this image is."""
    volume = Volume("pool", image, False)
    places = {volume: Place(str(host.folder / image))}
    domain = host.domains[name]
    text = re.sub("<source file=[^/]*[^>]*/>", f"<source pool='pool' volume='{image}'/>", domain.definition.text)
    text = text.replace("type='file'", "type='volume'", 1).replace('type="file"', 'type="volume"', 1)
    host.domains[name] = domain._replace(definition=Definition(text, places))
    running = host.start(name)
    host.domains[name] = running._replace(running_definition=running.running_definition.with_places(places))


@pytest.mark.parametrize("version, is_refused", [((7, 0, 0), True), ((9, 0, 0), False)])
def test_an_old_libvirt_would_leave_the_definition_on_a_volume(host, version, is_refused):
    start_on_volume(host, "web", "web.qcow2")
    plan = host.put_on("web", "mon", Live(version))
    assert codes(plan) == ["old_libvirt"] * is_refused
    assert all("9.0.0 would not" in problem.why for problem in plan.problems)
    host.define("web", "web.qcow2")
    host.start("web")
    assert codes(host.put_on("web", "mon", Live(version))) == []


def test_an_overlay_that_the_domain_has_by_its_volume_is_not_merged_while_it_runs(host):
    host.snapshot("web", "mon")
    start_on_volume(host, "web", "web.mon.qcow2")
    assert codes(host.merge("web", "mon")) == ["disk_unfit"]
    assert codes(host.put_on("web", "tue")) == []


def test_an_overlay_that_no_disk_has_any_more_is_found_by_its_mark(host):
    host.snapshot("web", "mon")
    host.define("web", "web.qcow2")  # as after the end of a merge
    host.start("web")
    (disk,) = host.merge("web", "mon").disks
    assert os.path.basename(disk.request.path) == "web.mon.qcow2"
    assert disk.request.retire == "keep"
    assert host.merge("web", "tue").disks == ()
    assert plan_commit(host.domains["web"], host.facts("web"), WayBack("mon")).disks == ()
    with open_image(disk.request.path) as file:
        write_leaving(file, leaving=True)
    for plan in (host.merge("web", "mon"), plan_commit(host.domains["web"], host.facts("web"), WayBack("mon"))):
        assert codes(plan)[0] == "unfinished"
        assert "run state=reverted" in plan.problems[0].remedy
    with open_image(disk.request.path) as file:
        write_leaving(file, leaving=False)
        leave_sign(file)
    # While the domain is shut off nobody has told libvirt's merge from a definition that somebody has changed.
    shut_off = host.domains["web"]._replace(state=None, running_definition=None)
    assert codes(plan_commit(shut_off, host.facts("web"), WayBack("mon"))) == ["unfinished"]
    # A run that was to give it up can have been killed before, so that the VM went on with it.
    with open_image(disk.request.path) as file:
        write_leaving(file, leaving=True)
    assert codes(plan_commit(shut_off, host.facts("web"), WayBack("mon"))) == ["unfinished"]
    plan = host.merge("web", "mon")
    assert (codes(plan), [one.request.path for one in plan.disks]) == ([], [disk.request.path])
    os.rename(host.folder / "web.mon.qcow2", host.folder / "web.mon.qcow2.committed")
    assert host.merge("web", "mon").disks == ()


def test_what_was_given_up_is_not_put_aside_as_merged_below_a_snapshot_that_was_made_since(host):
    host.snapshot("web", "mon")
    with open_image(str(host.folder / "web.mon.qcow2")) as file:
        write_leaving(file, leaving=True)
    host.define("web", "web.qcow2")
    host.snapshot("web", "tue")
    host.start("web")
    (problem,) = host.merge("web", "mon").problems
    assert problem.code == "unfinished"
    assert "run state=reverted" in problem.remedy


@pytest.mark.parametrize(
    "changed, code",
    [
        ({}, None),
        ({"persistent": False}, "transient"),
        ({"managed_save": True}, "managed_save"),
        ({"definition": "<domain><devices/></domain>"}, "other_disks"),
        ({"running": "<domain><devices/></domain>"}, "other_disks"),
    ],
)
def test_in_which_state_a_domain_must_be(host, changed, code):
    if "definition" in changed:
        changed = {"definition": Definition(changed["definition"])}
    if "running" in changed:
        changed = {"running_definition": Definition(changed["running"])}
    domain = host.start("web", **changed)
    assert [problem.code for problem in not_live(domain, LIVE)] == ([code] if code else [])


def test_a_drive_with_another_medium_does_not_count(host):
    drive = "<disk type='file' device='cdrom'>{}<target dev='sda'/><readonly/></disk></devices>"
    domain = host.start("web")
    changed = domain._replace(
        definition=Definition(domain.definition.text.replace("</devices>", drive.format(""))),
        running_definition=Definition(
            domain.running_definition.text.replace("</devices>", drive.format("<source file='/cd.iso'/>"))
        ),
    )
    assert not_live(changed, LIVE) == []


def test_a_transient_disk_has_another_image_while_the_domain_runs(host):
    host.image("tmp.qcow2")
    host.define("web", "web.qcow2", "tmp.qcow2")
    one = host.domains["web"]
    text = one.definition.text.replace("<target dev='vdb'/>", "<target dev='vdb'/><transient/>")
    host.domains["web"] = one._replace(definition=Definition(text))
    domain = host.start("web")
    text = domain.running_definition.text.replace("tmp.qcow2", "tmp.qcow2.TRANSIENT-web")
    host.domains["web"] = domain._replace(running_definition=Definition(text))
    assert not_live(host.domains["web"], LIVE) == []
    other = domain._replace(running_definition=Definition(text.replace("/web.qcow2", "/other.qcow2")))
    assert [problem.code for problem in not_live(other, LIVE)] == ["other_disks"]


@pytest.mark.parametrize("version, is_refused", [((6, 5, 0), True), ((6, 6, 0), False), ((12, 8, 0), False)])
def test_which_libvirt_can(host, version, is_refused):
    found = not_live(host.start("web"), Live(version))
    assert [problem.code for problem in found] == ["old_libvirt"] * is_refused
    assert all("6.6.0 does" in problem.why for problem in found)


@pytest.mark.parametrize(
    "state, devices, why",
    [("running", AGENT, None), ("paused", AGENT, "the domain is paused"), ("running", "", "no channel")],
)
def test_which_guest_can_be_quiesced(host, state, devices, why):
    domain = host.start("web", state=state)
    running = Definition(domain.running_definition.text.replace("</devices>", f"{devices}</devices>"))
    found = not_quiescent(domain._replace(running_definition=running))
    assert [problem.code for problem in found] == ([] if why is None else ["not_quiesced"])
    assert why is None or why in found[0].why


@pytest.mark.parametrize(
    "live, verdict",
    [
        (LiveBitmaps({"vda": 0}), (True, None)),
        (LiveBitmaps({}), (False, "broken")),
        (LiveBitmaps(problem="no answer"), (None, "in_use")),
        (None, (None, "incomplete")),  # libvirt was not asked, and the images tell nothing
    ],
)
def test_libvirt_judges_the_checkpoints_of_a_domain_that_runs(host, live, verdict):
    known = KnownCheckpoint("one", {"vda": "b", "vdx": "b"}, live=live)
    read = []

    def chain_after(disk):
        read.append(disk.target)
        return Chain((), is_complete=False)

    (found,) = judge_checkpoints([known], host.domains["web"].definition.disks, chain_after)
    assert (found.valid, found.problem) == verdict
    assert read == ["vda"]


def test_libvirt_does_not_see_that_an_image_below_has_lost_its_bitmaps(host):
    """Its QEMU opens that image without them, and merges for a backup what the others have."""
    known = KnownCheckpoint("one", {"vda": "b"}, live=LiveBitmaps({"vda": 0}), created=10_000)
    own = {"b": Bitmap("b", 65536, True, True)}
    for modified, verdict in ((9_000, (False, "lost")), (1_000, (True, None))):
        layers = (
            LayerBitmaps("/top", 1, own, is_open_for_writing=True, modified=20_000),
            LayerBitmaps("/base", 1, {}, lost_bitmaps=1, modified=modified),
        )
        disks = host.domains["web"].definition.disks
        (found,) = judge_checkpoints([known], disks, lambda _disk, have=layers: Chain(have, is_complete=True))
        assert (found.valid, found.problem) == verdict


def lost_below(host, layers):
    """Have the chain of vda with the bitmap b in all images, of which the one above the lowest has lost its own."""
    for number in range(1, layers):
        host.snapshot("web", f"s{number}")
    paths = [layer.path for layer in host.facts("web")[0].layers]
    for path in paths[:-1]:
        qemu.add_bitmaps(path, [Bitmap("b", 65536, True, False)])
    qemu.patch(paths[-2], 88, struct.pack(">Q", 0))  # autoclear bit 0
    host.start("web")
    return paths


@pytest.mark.parametrize("is_new", [False, True])
def test_a_loss_below_an_overlay_of_a_domain_that_runs_is_told(host, is_new):
    paths = lost_below(host, 3)
    aim = PutRunningOn(SnapshotRequest("s3", None, None, False, Creation()), AttributeOptions(), LIVE)
    request = OverlayRequest(f"{paths[0]}.new", paths[0])
    verdict = OverlayVerdict(request, "created", virtual_size=1 << 20) if is_new else None
    known = KnownCheckpoint("one", {"vda": "b"}, live=LiveBitmaps({"vda": 0}))
    disks = host.domains["web"].definition.disks
    (found,) = judge_checkpoints([known], disks, lambda disk: aim.chain_after(disk, verdict))
    assert (found.valid, found.problem, found.image) == (False, "lost", paths[1])
    broken = known._replace(live=LiveBitmaps({}))
    (found,) = judge_checkpoints([broken], disks, lambda disk: aim.chain_after(disk, verdict))
    assert found.problem == "lost"


def test_a_loss_below_a_merge_of_a_domain_that_runs_is_told(host):
    paths = lost_below(host, 4)
    aim = MergeRunningDown(WayBack("s3"), LIVE)
    bitmaps = (Bitmap("b", 65536, True, False),)
    verdict = CommitVerdict(CommitRequest(paths[0], paths[1]), "committed", virtual_size=1 << 20, bitmaps=bitmaps)
    known = KnownCheckpoint("one", {"vda": "b"}, live=LiveBitmaps({"vda": 0}))
    for made in (None, verdict):
        (found,) = judge_checkpoints(
            [known], host.domains["web"].definition.disks, lambda d, v=made: aim.chain_after(d, v)
        )
        assert (found.valid, found.problem, found.image) == (False, "lost", paths[2])
    os.unlink(paths[0])  # as it is after the merge
    (found,) = judge_checkpoints([known], host.domains["web"].definition.disks, lambda d: aim.chain_after(d, verdict))
    assert (found.valid, found.problem) == (False, "lost")


def test_of_the_image_that_qemu_has_open_nothing_stored_counts(host):
    path = host.facts("web")[0].layers[0].path
    qemu.add_bitmaps(path, [Bitmap("b", 65536, False, False)])
    host.start("web")
    aim = MergeRunningDown(WayBack("mon"), LIVE)
    (disk,) = host.domains["web"].definition.disks
    assert [layer.is_open_for_writing for layer in aim.chain_after(disk, None).layers] == [True]
    failed = CommitVerdict(CommitRequest(path, "/base"), "failed")  # so what it promises is not there
    assert aim.chain_after(disk, failed) == aim.chain_after(disk, None)
    known = KnownCheckpoint("one", {"vda": "b"}, live=LiveBitmaps({}))
    (found,) = judge_checkpoints([known], [disk], lambda one: aim.chain_after(one, None))
    assert (found.valid, found.problem) == (False, "broken")


@pytest.mark.parametrize("runs", [True, False])
def test_a_merge_knows_when_the_checkpoints_were_made(host, runs):
    host.snapshot("web", "mon")
    kept = Kept((KnownCheckpoint("one", {"vda": "b"}, created=50_000), KnownCheckpoint("two", {"vdb": "b"}, created=1)))
    if runs:
        host.start("web")
    aim = MergeRunningDown(WayBack("mon"), LIVE) if runs else MergeDown(WayBack("mon"))
    plan = aim.plan(host.domains["web"], host.facts("web"), kept)
    assert [disk.request.created for disk in plan.disks] == [(("b", 50_000),)]


@pytest.mark.parametrize("live", [LIVE, None])
def test_a_call_for_what_runs_on_its_snapshot_knows_when_the_checkpoints_were_made(host, live):
    """By that it tells what the image below still does not store."""
    host.snapshot("web", "mon")
    host.start("web")
    kept = Kept((KnownCheckpoint("one", {"vda": "b"}, created=50_000),))
    aim = PutRunningOn(SnapshotRequest("mon", None, None, False, Creation()), AttributeOptions(), live)
    plan = aim.plan(host.domains["web"], host.facts("web"), kept)
    assert [disk.request.created for disk in plan.disks] == [(("b", 50_000),)]


@pytest.mark.parametrize("check_mode", [True, False])
def test_a_checkpoint_of_a_disk_that_was_put_back_does_not_become_valid_by_a_snapshot(host, check_mode):
    path = host.facts("web")[0].layers[0].path
    qemu.add_bitmaps(path, [Bitmap("b", 65536, True, False)])
    os.utime(path, (10_000, 10_000))
    daemon = Daemon(host)
    known = KnownCheckpoint("one", {"vda": "b"}, created=50_000)
    daemon.kept = lambda _domain: Kept((known,))
    aim = PutOnOverlays(SnapshotRequest("s9", None, None, False, Creation()), AttributeOptions())
    aim.confirm = aim.switch = lambda *_args: None
    daemon.pools.refresh = lambda _folders: []
    ((outcome,), _warnings) = Call(daemon, ["web"], [aim], SETTINGS._replace(check_mode=check_mode)).run()
    (overlay,) = outcome.as_result()["overlays"]
    assert [(one["name"], one["reason"]) for one in overlay["skipped_bitmaps"]] == [("b", "older")]
    (told,) = outcome.as_result()["checkpoints"]
    assert (outcome.state, told["valid"], told["problem"]) == ("created", False, "not_in_top")


class Daemon:
    """Knows the domains of a host, and one checkpoint of each, which it takes for sound."""

    def __init__(self, host):
        self._host = host
        known = KnownCheckpoint("one", {"vda": "b"}, created=50_000, live=LiveBitmaps({"vda": 0}))
        self.kept = self.kept_now = lambda _domain: Kept((known,))
        self.pools = Pools(None)

    def domains(self):
        return self._host.domains


@pytest.mark.parametrize("is_in_order", [True, False])
def test_check_mode_tells_of_a_checkpoint_that_a_merge_makes_valid(host, monkeypatch, is_in_order):
    monkeypatch.setattr(running_module, "why_not_open", lambda *_layers, **_more: None)
    monkeypatch.setattr(live.RunningDomains, "check_for_merge", lambda *_args, **_more: None)
    monkeypatch.setattr(live.RunningDomains, "has", lambda *_args: True)
    monkeypatch.setattr(live.RunningDomains, "known", lambda *_args: Known((), ("b",)))
    qemu.add_bitmaps(host.folder / "web.qcow2", [Bitmap("b", 65536, is_in_order, False)])
    host.snapshot("web", "mon")
    host.start("web")
    daemon = Daemon(host)
    broken = KnownCheckpoint("one", {"vda": "b"}, live=LiveBitmaps())
    daemon.kept = daemon.kept_now = lambda _domain: Kept((broken,))
    call = Call(daemon, ["web"], [MergeRunningDown(WayBack("mon"), LIVE)], SETTINGS._replace(check_mode=True))
    ((outcome,), _warnings) = call.run()
    (told,) = outcome.as_result()["checkpoints"]
    assert outcome.state == "committed"
    assert (told["valid"], told["problem"]) == ((True, None) if is_in_order else (False, "broken"))
    assert told["verified"] is not is_in_order  # libvirt says now that it is broken


@pytest.mark.parametrize("runs_on_it", [True, False])
def test_a_call_tells_of_a_loss_below_the_disks_that_a_domain_runs_with(host, runs_on_it):
    lost_below(host, 3)
    if not runs_on_it:
        host.image("other.qcow2")
        other = Definition(host.domains["web"].running_definition.text.replace("web.s2.qcow2", "other.qcow2"))
        host.domains["web"] = host.domains["web"]._replace(running_definition=other)
    aim = PutRunningOn(SnapshotRequest("s3", None, None, False, Creation()), AttributeOptions(), None)
    ((outcome,), _warnings) = Call(Daemon(host), ["web"], [aim], SETTINGS).run()
    (told,) = outcome.as_result()["checkpoints"]
    assert (outcome.state, outcome.known[0].name) == ("failed", "one")
    assert (told["problem"], told["verified"]) == (("lost", False) if runs_on_it else (None, True))


def test_a_qemu_before_6_1_adds_no_bitmap_below_the_topmost_image(host):
    daemon = Daemon(host)
    for version, words in (((6, 0, 9), "QEMU 6.0.9 lets libvirt write only to the topmost image"), ((6, 1, 0), None)):
        daemon.qemu_version = version
        told = live.RunningDomains(daemon, []).why_none_below()
        assert (told is None) is (words is None)
        assert told is None or (words in told[0] and "6.1.0 can" in told[1])


class Left:
    """A hypervisor whose VMs have left their disks, and which knows the bitmap b of them. A Hypervisor."""

    def __init__(self, *_of_whom):
        pass

    def known(self, _vm, _paths):
        return running_module.Known(("b",))

    def has(self, _request):
        return False

    def check_for_snapshot(self, _request):
        pass


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_call_tells_of_a_disk_whose_bitmaps_qemu_could_not_store(host, monkeypatch, is_stored):
    """The domain is on the overlay all the same."""
    monkeypatch.setattr(live, "RunningDomains", Left)
    refreshed = []
    monkeypatch.setattr(Pools, "refresh", lambda _pools, folders: refreshed.extend(folders) or [])
    monkeypatch.setattr(live, "take_snapshot", lambda *_of_whom, **_how: None)
    monkeypatch.setattr(live, "check_still_runs", lambda *_of_whom: None)
    monkeypatch.setattr(running_module, "why_not_open", lambda *_layers, **_more: None)
    monkeypatch.setattr(running_module, "_LET_GO", 0.1)
    path = host.facts("web")[0].layers[0].path
    qemu.add_bitmaps(path, [Bitmap("b", 65536, True, False)])
    host.start("web")
    aim = PutRunningOn(SnapshotRequest("mon", None, None, False, Creation()), AttributeOptions(), LIVE)
    call = Call(Daemon(host), ["web"], [aim], SETTINGS)
    with contextlib.nullcontext() if is_stored else qemu.opened_for_writing(path):
        ((outcome,), _warnings) = call.run()
    result = outcome.as_result()
    (told,) = result["checkpoints"]
    assert (outcome.state, result.get("code")) == (("created", None) if is_stored else ("failed", "not_stored"))
    assert (outcome.changed, os.path.basename(result["overlays"][0]["topmost"])) == (True, "web.mon.qcow2")
    assert "web.mon.qcow2" in outcome.diff[1]
    assert refreshed == [os.path.dirname(path)]
    where = (told["valid"], told["problem"], told["image"], told["verified"])
    assert where == ((True, None, None, True) if is_stored else (None, "in_use", path, False))


def test_an_outcome_tells_when_the_checkpoints_of_its_images_were_made(host):
    request = OverlayRequest("/top", "/base")
    known = (KnownCheckpoint("one", {"vda": "b"}, created=50_000), KnownCheckpoint("two", {"vdb": "c"}, created=60_000))
    verdict = OverlayVerdict(request, "created")
    outcome = DomainOutcome("web", "uuid", "created", (("vda", verdict),), tops={"vda": "/above"}, known=known)
    assert outcome.created == {path: {"b": 50_000} for path in ("/top", "/base", "/above")}


def test_a_checkpoint_is_not_that_of_a_disk_which_had_another_target_then(host):
    """By libvirt's word it is: that goes by the targets."""
    known = KnownCheckpoint("one", {"vda": "b"}, images={"vda": frozenset(["/a"]), "vdb": frozenset(["/b"])})
    own = {"b": Bitmap("b", 65536, True, False)}
    for base, verdict in (("/a", (True, None)), ("/b", (False, "swapped")), ("/moved", (True, None))):
        chain = Chain((LayerBitmaps("/new", 1, own), LayerBitmaps(base, 1, own)), is_complete=True)
        for said in (None, LiveBitmaps({"vda": 0})):
            disks = host.domains["web"].definition.disks
            (found,) = judge_checkpoints([known._replace(live=said)], disks, lambda _disk, chain=chain: chain)
            assert (found.valid, found.problem) == verdict
