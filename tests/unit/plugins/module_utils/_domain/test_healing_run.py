# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checkpoints of domains that are shut off, healed and removed on real images, with libvirt's driver for tests.

What its driver for QEMU does, and domains that run, are in the integration target domain_checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import Interrupted
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import mend
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import run as image_run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import healing_run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.healing import CheckpointRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.healing_run import HealCall
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Libvirt
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu
from .._disk.healing import as_info_tells, lose, overlay
from .hosts import SETTINGS

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
OTHER_UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa1"


class Fleet:
    """Domains in libvirt's driver for tests, whose disks are real images in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.host = libvirt.open("test:///default")
        self.made = []

    def path(self, name):
        return str(self.folder / name)

    def define(self, name, *images, checkpoints=(), uuid=UUID):
        """Define a domain with these images as vda, vdb, …; a checkpoint is its name, or that and its disks."""
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{self.path(image)}'/>"
            f"<target dev='vd{letter}' bus='virtio'/></disk>"
            for letter, image in zip("abc", images)
        )
        text = (
            f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>1024</memory><os><type>hvm</type></os>"
            f"<devices>{disks}</devices></domain>"
        )
        domain = self.host.defineXML(text)
        self.made.append(domain)
        if checkpoints:  # the driver makes none of a domain that is shut off
            domain.create()
            for checkpoint in checkpoints:
                domain.checkpointCreateXML(f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>")
            domain.destroy()
        return domain

    def close(self):
        for domain in self.made:
            if domain.isActive():
                domain.destroy()
            for checkpoint in domain.listAllCheckpoints(0):
                checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
            domain.undefine()

    def state(self):
        """Return all that could change: the files with their content, and the checkpoints of libvirt."""
        files = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in os.listdir(self.folder)
        }
        return files, {domain.name(): self.checkpoints(domain) for domain in self.made}

    def checkpoints(self, domain):
        return sorted(one.getName() for one in domain.listAllCheckpoints(0))


@pytest.fixture(name="fleet")
def fixture_fleet(tmp_path):
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def bitmap(name, recording=True, inconsistent=False):
    return Bitmap(name, 65536, recording, inconsistent)


def base(fleet, name, *bitmaps):
    path = qemu.create(fleet.path(name), 8 << 20)
    qemu.add_bitmaps(path, bitmaps)
    return path


def top(fleet, name, below, *bitmaps):
    """Make an overlay as qemu-img does, write to it, and add bitmaps."""
    path = overlay(fleet.path(name), fleet.path(below))
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", path], check=True, stdout=subprocess.DEVNULL)
    qemu.add_bitmaps(path, bitmaps)
    return path


def call(*names, settings=SETTINGS, **request):
    daemon = Libvirt("test:///default")
    return HealCall(daemon, names or ["web"], CheckpointRequest(**request), settings, live=False).run()


def healed(fleet, **request):
    """Do it for the domain web. Check mode must have said the same, and a second run must change nothing."""
    before = fleet.state()
    predicted, _warnings = call(settings=SETTINGS._replace(check_mode=True), **request)
    assert fleet.state() == before
    (done,), warnings = call(**request)
    assert warnings == []
    assert [one.as_result() for one in predicted] == [done.as_result()]
    assert (predicted[0].changed, predicted[0].diff) == (done.changed, done.diff)
    after = fleet.state()
    (again,), _warnings = call(settings=SETTINGS._replace(find_program=lambda _name: None), **request)
    assert not again.changed
    assert fleet.state() == after
    assert not [name for name in after[0] if name.startswith(".")]  # vault, temporary file
    return done


def states(domain):
    return {one["name"]: one.get("code", one["state"]) for one in domain.as_result()["checkpoints"]}


def test_an_overlay_of_another_tool_is_healed_on_all_disks(fleet):
    for letter in "ab":
        base(fleet, f"{letter}.qcow2", bitmap("one"))
        top(fleet, f"{letter}.top.qcow2", f"{letter}.qcow2")
    fleet.define("web", "a.top.qcow2", "b.top.qcow2", checkpoints=["one"])
    done = healed(fleet)
    assert (done.state, states(done), done.changed) == ("rebuilt", {"one": "rebuilt"}, True)
    for letter in "ab":
        (told,) = as_info_tells(fleet.path(f"{letter}.top.qcow2"))
        assert (told["name"], told["valid"], told["dirty_bytes"]) == ("one", True, 65536)


def test_disks_that_have_swapped_their_targets_are_not_valid_and_not_healed(fleet):
    """The bitmaps are in order, and each tells what has changed on the other disk."""
    for letter in "ab":
        base(fleet, f"{letter}.qcow2", bitmap("one"))
        top(fleet, f"{letter}.top.qcow2", f"{letter}.qcow2")
    domain = fleet.define("web", "a.qcow2", "b.qcow2", checkpoints=["one"])
    fleet.define("web", "b.top.qcow2", "a.top.qcow2")
    fleet.made.pop()
    before = fleet.state()
    done = healed(fleet)
    assert (done.state, states(done), done.changed) == ("failed", {"one": "not_healable"}, False)
    assert fleet.state() == before
    fleet.define("web", "a.top.qcow2", "b.top.qcow2")
    fleet.made.pop()
    assert states(healed(fleet)) == {"one": "rebuilt"}
    fleet.define("web", "b.top.qcow2", "a.top.qcow2")
    fleet.made.pop()
    assert states(healed(fleet)) == {"one": "not_healable"}
    assert states(healed(fleet, removes_unusable=True)) == {"one": "removed"}
    assert fleet.checkpoints(domain) == []


def test_what_is_valid_is_left_alone(fleet):
    base(fleet, "a.qcow2", bitmap("one"))
    domain = fleet.define("web", "a.qcow2", checkpoints=["one"])
    before = fleet.state()
    done = healed(fleet, removes_unusable=True)
    assert (done.state, states(done), done.changed, done.diff) == ("valid", {"one": "valid"}, False, ({}, {}))
    assert fleet.state() == before
    assert fleet.checkpoints(domain) == ["one"]


def test_what_is_hopeless_stays_or_goes_from_all_disks(fleet):
    base(fleet, "a.qcow2", bitmap("one", recording=False), bitmap("two"))
    base(fleet, "b.qcow2", bitmap("one"), bitmap("two"))
    top(fleet, "b.top.qcow2", "b.qcow2")
    domain = fleet.define("web", "a.qcow2", "b.top.qcow2", checkpoints=["one", "two"])
    done = healed(fleet)
    assert (done.state, states(done)) == ("failed", {"one": "not_healable", "two": "rebuilt"})
    assert qemu.bitmaps_of(fleet.path("b.top.qcow2")) == {("two", 65536, True, False)}
    done = healed(fleet, removes_unusable=True)
    assert (done.state, states(done)) == ("removed", {"one": "removed", "two": "valid"})
    assert fleet.checkpoints(domain) == ["two"]
    for name in ("a.qcow2", "b.qcow2", "b.top.qcow2"):
        assert {one[0] for one in qemu.bitmaps_of(fleet.path(name))} == {"two"}


def test_a_crash_without_overlays_needs_the_users_word(fleet):
    base(fleet, "a.qcow2", bitmap("one", inconsistent=True))
    fleet.define("web", "a.qcow2", checkpoints=["one"])
    assert states(healed(fleet)) == {"one": "may_be_emptied"}
    assert states(healed(fleet, assume_not_emptied=True)) == {"one": "rebuilt"}


def test_checkpoints_are_removed_with_their_bitmaps(fleet):
    base(fleet, "a.qcow2", bitmap("one"), bitmap("two"), bitmap("left"))
    top(fleet, "a.top.qcow2", "a.qcow2", bitmap("one"), bitmap("two"))
    domain = fleet.define("web", "a.top.qcow2", checkpoints=["one", "two"])
    done = healed(fleet, state="absent", checkpoints=("one", "none"))
    assert (done.state, states(done)) == ("removed", {"one": "removed", "none": "absent"})
    assert done.diff[0]["checkpoints"] == ["one", "two"]
    assert done.diff[1]["checkpoints"] == ["two"]
    assert fleet.checkpoints(domain) == ["two"]
    assert {one[0] for one in qemu.bitmaps_of(fleet.path("a.top.qcow2"))} == {"two"}
    assert {one[0] for one in qemu.bitmaps_of(fleet.path("a.qcow2"))} == {"two", "left"}


def test_orphans_are_removed_and_told(fleet):
    base(fleet, "a.qcow2", bitmap("one"), bitmap("left"))
    top(fleet, "a.top.qcow2", "a.qcow2", bitmap("one"), bitmap("left"), bitmap("new"))
    fleet.define("web", "a.top.qcow2", checkpoints=["one"])
    done = healed(fleet, removes_orphans=True)
    assert (done.state, states(done)) == ("removed", {"one": "valid"})
    assert done.as_result()["removed_orphans"] == [
        {"target": "vda", "image": fleet.path("a.top.qcow2"), "bitmaps": ["left", "new"]},
        {"target": "vda", "image": fleet.path("a.qcow2"), "bitmaps": ["left"]},
    ]


def test_a_checkpoint_of_disks_that_are_gone_is_forgotten(fleet):
    base(fleet, "a.qcow2")
    domain = fleet.define("web", "a.qcow2", checkpoints=["one"])
    fleet.host.defineXML(domain.XMLDesc(0).replace("dev='vda'", "dev='vdz'"))
    assert states(healed(fleet)) == {"one": "no_checkpoint"}
    done = healed(fleet, removes_unusable=True)
    assert (done.state, states(done)) == ("removed", {"one": "removed"})
    assert fleet.checkpoints(domain) == []


def test_a_checkpoint_goes_though_one_of_its_disks_is_raw_now(fleet):
    base(fleet, "a.qcow2", bitmap("one"))
    base(fleet, "b.qcow2", bitmap("one"))
    domain = fleet.define("web", "a.qcow2", "b.qcow2", checkpoints=["one"])
    before, stated, after = domain.XMLDesc(0).rpartition("type='qcow2'")
    fleet.host.defineXML(f"{before}{stated.replace('qcow2', 'raw')}{after}")
    raw = hashlib.sha256((fleet.folder / "b.qcow2").read_bytes()).hexdigest()
    assert states(healed(fleet)) == {"one": "no_checkpoint"}
    done = healed(fleet, state="absent")
    assert (done.state, states(done)) == ("removed", {"one": "removed"})
    assert (fleet.checkpoints(domain), qemu.bitmaps_of(fleet.path("a.qcow2"))) == ([], set())
    assert hashlib.sha256((fleet.folder / "b.qcow2").read_bytes()).hexdigest() == raw


def test_a_template_keeps_its_bitmaps_wherever_its_other_clones_are(fleet, tmp_path_factory):
    base(fleet, "template.qcow2", bitmap("one"), bitmap("its"))
    top(fleet, "web.qcow2", "template.qcow2", bitmap("one"))
    other = overlay(tmp_path_factory.mktemp("elsewhere") / "other.qcow2", fleet.path("template.qcow2"))
    domain = fleet.define("web", "web.qcow2", checkpoints=["one"])
    fleet.define("other", other, uuid=UUID.replace("4", "5"))
    done = healed(fleet, state="absent", removes_orphans=True)
    assert (done.state, states(done), done.orphans) == ("removed", {"one": "removed"}, ())
    assert fleet.checkpoints(domain) == []
    assert {one[0] for one in qemu.bitmaps_of(fleet.path("template.qcow2"))} == {"one", "its"}
    assert qemu.bitmaps_of(fleet.path("web.qcow2")) == set()


def test_an_image_that_another_domain_writes_to_is_refused(fleet):
    base(fleet, "a.qcow2", bitmap("one"))
    fleet.define("web", "a.qcow2", checkpoints=["one"])
    fleet.define("other", "a.qcow2", uuid=UUID.replace("4", "5"))
    done = healed(fleet)
    assert done.state == "valid"
    done = healed(fleet, state="absent")
    assert (done.state, states(done), done.failures[0].code) == ("failed", {"one": "shared_disk"}, "shared_disk")


def test_what_fails_under_locks_leaves_all_disks_and_checkpoints(fleet):
    """The second disk is opened by a process in the middle of the run."""
    for letter in "ab":
        base(fleet, f"{letter}.qcow2", bitmap("one"))
        top(fleet, f"{letter}.top.qcow2", f"{letter}.qcow2")
    fleet.define("web", "a.top.qcow2", "b.top.qcow2", checkpoints=["one"])
    before = fleet.state()
    plan = HealCall(Libvirt("test:///default"), ["web"], CheckpointRequest(state="absent"), SETTINGS, live=False)
    with qemu.storage_daemon() as monitor:
        qemu._open(monitor, fleet.path("b.top.qcow2"))
        (done,), _warnings = plan.run()
    assert (done.state, states(done), done.changed) == ("failed", {"one": "in_use"}, False)
    assert fleet.state() == before


def test_what_cannot_be_healed_any_more_under_locks_leaves_the_other_disk_alone(fleet):
    for letter in "ab":
        base(fleet, f"{letter}.qcow2", bitmap("one"))
        top(fleet, f"{letter}.top.qcow2", f"{letter}.qcow2")
    fleet.define("web", "a.top.qcow2", "b.top.qcow2", checkpoints=["one"])
    plan = HealCall(Libvirt("test:///default"), ["web"], CheckpointRequest(), SETTINGS, live=False)
    qemu.qemu_img("bitmap", "--remove", fleet.path("b.qcow2"), "one")
    before = fleet.state()
    (done,), _warnings = plan.run()
    assert (done.state, states(done), done.changed) == ("failed", {"one": "no_checkpoint"}, False)
    assert fleet.state() == before


def changed_meanwhile(fleet, monkeypatch):
    """Have another checkpoint appear between the look and the locks."""
    original = Libvirt.kept_now
    calls = []

    def kept_now(daemon, domain):
        kept = original(daemon, domain)
        calls.append(domain)
        return kept if len(calls) == 1 else kept._replace(checkpoints=kept.checkpoints[:-1])

    monkeypatch.setattr(Libvirt, "kept_now", kept_now)


def started_meanwhile(fleet, monkeypatch):
    """Have the domain be started between the look and the locks."""
    original = Libvirt.kept_now

    def kept_now(daemon, domain):
        kept = original(daemon, domain)
        fleet.made[0].create()
        return kept

    monkeypatch.setattr(Libvirt, "kept_now", kept_now)


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("meanwhile", [changed_meanwhile, started_meanwhile])
def test_a_domain_that_is_not_what_was_judged_is_left_alone(fleet, monkeypatch, removes, meanwhile):
    base(fleet, "a.qcow2", bitmap("one"), bitmap("two", inconsistent=True))
    top(fleet, "a.top.qcow2", "a.qcow2")
    fleet.define("web", "a.top.qcow2", checkpoints=["one", "two"])
    before = fleet.state()
    meanwhile(fleet, monkeypatch)
    (done,), _warnings = call(removes_unusable=removes)
    two = "changed_meanwhile" if removes else "not_healable"
    assert (done.state, states(done)) == ("failed", {"one": "changed_meanwhile", "two": two})
    assert not done.changed
    assert fleet.state() == before


def test_a_run_that_ends_before_libvirt_forgets_is_completed_by_the_next(fleet, monkeypatch):
    base(fleet, "a.qcow2", bitmap("one"), bitmap("two"))
    domain = fleet.define("web", "a.qcow2", checkpoints=["one", "two"])

    def broken(_daemon, domain, _names):
        raise Refusal("libvirt_failed", domain.name, "libvirt could not forget its checkpoints")

    with monkeypatch.context() as patch:
        patch.setattr(healing_run, "forget", broken)
        (done,), _warnings = call(state="absent", checkpoints=("one",))
    assert (done.state, states(done), done.changed) == ("failed", {"one": "libvirt_failed"}, True)
    # libvirt refuses an increment since the one, since the bitmap is gone already.
    assert {one[0] for one in qemu.bitmaps_of(fleet.path("a.qcow2"))} == {"two"}
    assert fleet.checkpoints(domain) == ["one", "two"]
    done = healed(fleet, state="absent", checkpoints=("one",))
    assert (done.state, states(done)) == ("removed", {"one": "removed"})
    assert fleet.checkpoints(domain) == ["two"]


def test_what_a_kill_has_lost_is_put_back_though_a_backup_has_made_a_checkpoint_since(fleet):
    """Nobody has removed its bitmap, since libvirt still knows the checkpoint."""
    path = killed_at_removal(fleet)
    for name in ("one", "two"):
        qemu.qemu_img("bitmap", "--remove", path, name)
    qemu.add_bitmaps(path, [bitmap("three")])
    done = healed(fleet, checkpoints=("three",), removes_unusable=True)  # what is not asked for is not given up either
    assert (done.state, states(done), done.changed) == ("valid", {"three": "valid"}, True)
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"one", "two", "three"}


def test_what_a_kill_has_lost_is_removed_by_the_same_call(fleet):
    path = killed_at_removal(fleet)
    for name in ("one", "two"):
        qemu.qemu_img("bitmap", "--remove", path, name)
    qemu.add_bitmaps(path, [bitmap("three")])
    done = healed(fleet, state="absent", checkpoints=("one",))
    assert (done.state, states(done)) == ("removed", {"one": "removed"})
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"two", "three"}


def killed_at_healing(fleet):
    """Have the healing of an overlay killed whose second checkpoint is of its own; return its path and the domain."""
    base(fleet, "base.qcow2", bitmap("one"))
    path = overlay(fleet.path("a.qcow2"), fleet.path("base.qcow2"))
    qemu.add_bitmaps(path, [bitmap("two")])
    domain = fleet.define("web", "a.qcow2", checkpoints=["one", "two"])
    killed()
    return path, domain


def test_what_a_vault_may_tell_wrongly_is_not_valid_and_goes_as_unusable(fleet):
    """The image held nothing when the run was killed, so nobody can tell what it held since."""
    path, domain = killed_at_healing(fleet)
    lose(path)
    for options in ({}, {"checkpoints": ("one",)}):
        for settings in (SETTINGS._replace(check_mode=True), SETTINGS):
            (done,), _warnings = call(settings=settings, **options)
            assert (done.state, done.changed) == ("failed", False)
            assert set(states(done).values()) == {"may_be_emptied"}
    done = healed(fleet, removes_unusable=True)
    assert (done.state, states(done)) == ("removed", {"one": "rebuilt", "two": "removed"})
    assert fleet.checkpoints(domain) == ["one"]
    assert {one["name"]: one["valid"] for one in as_info_tells(path)} == {"one": True}


def test_what_a_vault_may_tell_wrongly_is_put_back_by_the_users_word(fleet):
    path, _domain = killed_at_healing(fleet)
    lose(path)
    done = healed(fleet, assume_not_emptied=True)
    assert (done.state, states(done)) == ("rebuilt", {"one": "rebuilt", "two": "rebuilt"})


def test_a_checkpoint_that_was_removed_since_a_kill_does_not_come_back(fleet):
    """A backup tool has removed its bitmap, too, while the VM ran, from all images that had it."""
    path, domain = killed_at_healing(fleet)
    qemu.qemu_img("bitmap", "--remove", path, "two")
    domain.checkpointLookupByName("two").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    (done,), warnings = call()
    assert (done.state, states(done)) == ("rebuilt", {"one": "rebuilt"})
    assert [path in one and "'two'" in one for one in warnings] == [True]
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"one"}


def test_the_vault_of_an_image_that_was_merged_meanwhile_is_told(fleet):
    """Also where nothing is to be done."""
    base(fleet, "base.qcow2", bitmap("one"))
    path = overlay(fleet.path("a.qcow2"), fleet.path("base.qcow2"))
    fleet.define("web", "a.qcow2", checkpoints=["one"])
    killed()
    os.unlink(path)
    fleet.made.pop()
    fleet.define("web", "base.qcow2")
    for _time in range(2):
        (done,), warnings = call()
        assert (done.state, done.changed) == ("valid", False)
        assert [f"{fleet.path('.a.qcow2.kvmfleet-healing')}: " in one for one in warnings] == [True]


def test_what_only_a_vault_has_is_not_called_valid_where_nothing_is_done(fleet):
    base(fleet, "base.qcow2", bitmap("one"))
    path = top(fleet, "a.qcow2", "base.qcow2", bitmap("two"))
    fleet.define("web", "a.qcow2", checkpoints=["one", "two"])
    killed()
    lose(path)
    fleet.define("other", "a.qcow2", uuid=OTHER_UUID)  # shares the disk
    (done,), _warnings = call()
    assert states(done) == {"one": "shared_disk", "two": "shared_disk"}


@pytest.mark.parametrize("orphans", [False, True])
def test_what_libvirt_has_forgotten_and_a_clone_needs_stays_and_is_told(fleet, orphans):
    path = killed_before_removal(fleet)
    overlay(fleet.path("clone.qcow2"), path)
    request = {"state": "absent", "checkpoints": ("one",), "removes_orphans": orphans}
    (foretold,), _warnings = call(settings=SETTINGS._replace(check_mode=True), **request)
    (done,), _warnings = call(**request)
    assert foretold.as_result() == done.as_result()
    assert (done.state, states(done)) == ("failed", {"one": "has_overlay"})
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"one", "two"}


@pytest.mark.parametrize("orphans", [False, True])
def test_what_libvirt_has_forgotten_goes_once(fleet, orphans):
    path = killed_before_removal(fleet)
    done = healed(fleet, state="absent", checkpoints=("one",), removes_orphans=orphans)
    assert (done.changed, states(done)) == (True, {"one": "absent"})
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"two"}


@pytest.mark.parametrize("orphans", [False, True])
def test_what_libvirt_has_forgotten_stays_in_an_image_that_is_corrupt(fleet, orphans):
    path = killed_before_removal(fleet)
    qemu.patch(path, 79, b"\2")  # QEMU has marked it so
    (done,), _warnings = call(state="absent", checkpoints=("one",), removes_orphans=orphans)
    assert (done.state, states(done)) == ("failed", {"one": "corrupt"})
    assert {one[0] for one in qemu.bitmaps_of(path)} == {"one", "two"}


def killed_before_removal(fleet):
    """Leave a vault beside an image, and a checkpoint of it that libvirt has forgotten; return the path."""
    path = base(fleet, "a.qcow2", bitmap("one"), bitmap("two"))
    domain = fleet.define("web", "a.qcow2", checkpoints=["one", "two"])
    killed(state="absent", checkpoints=("one",))
    domain.checkpointLookupByName("one").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    return path


def killed(**request):
    """Have a run be killed before it writes to the first image."""
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            mend.bring = lambda *_args: os._exit(9)
            call(**request)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9


def killed_at_removal(fleet):
    """Leave a domain whose vault has the bitmaps one and two, as libvirt knows them; return the path of its image."""
    path = base(fleet, "a.qcow2", bitmap("one"), bitmap("two"), bitmap("zero"))
    fleet.define("web", "a.qcow2", checkpoints=["one", "two", "three"])
    killed(removes_orphans=True)
    assert ".a.qcow2.kvmfleet-healing" in os.listdir(fleet.folder)
    qemu.qemu_img("bitmap", "--remove", path, "zero")
    return path


def test_domains_that_do_not_exist_and_patterns_that_match_none(fleet):
    base(fleet, "a.qcow2", bitmap("one"))
    fleet.define("web", "a.qcow2", checkpoints=["one"])
    domains, warnings = call("web", "nobody", "no*")
    assert [(one.name, one.state) for one in domains] == [("web", "valid"), ("nobody", "failed")]
    assert domains[1].as_result()["code"] == "no_domain"
    assert warnings == ["no*: no domain of this host matches it."]


def test_a_domain_whose_turn_did_not_come_is_not_said_to_be_done(fleet, monkeypatch):
    """Nothing is to be written to its images, only libvirt is to forget its checkpoint."""
    base(fleet, "a.qcow2", bitmap("two"))
    domain = fleet.define("web", "a.qcow2", checkpoints=["one", "two"])

    def asked():
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(image_run, "stop_here_if_asked", asked)
    (done,), _warnings = call(removes_unusable=True)
    assert (done.state, states(done), done.changed) == ("failed", {"one": "interrupted", "two": "valid"}, False)
    assert fleet.checkpoints(domain) == ["one", "two"]


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_checkpoint_of_a_running_domain_that_was_made_anew_is_not_deleted_by_its_name(fleet, is_made_anew):
    running = fleet.define("db", "b.qcow2", checkpoints=["three"], uuid=OTHER_UUID)
    running.create()
    heal = HealCall(Libvirt("test:///default"), ["db"], CheckpointRequest(state="absent"), SETTINGS, live=True)
    if is_made_anew:
        running.checkpointLookupByName("three").delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        time.sleep(1.1)  # libvirt tells the time in seconds
        running.checkpointCreateXML("<domaincheckpoint><name>three</name></domaincheckpoint>")
    (done,), _warnings = heal.run()
    if is_made_anew:
        assert [(one.code, one.why) for one in done.problems] == [
            ("changed_meanwhile", "its checkpoints were changed meanwhile")
        ]
        assert fleet.checkpoints(running) == ["three"]
    else:
        assert "changed_meanwhile" not in [one.code for one in done.failures]


def test_a_domain_that_runs_is_left_alone_once_a_signal_has_ended_the_healing_of_another(fleet, monkeypatch):
    base(fleet, "a.qcow2", bitmap("two"))
    fleet.define("web", "a.qcow2", checkpoints=["one", "two"])
    running = fleet.define("db", "b.qcow2", checkpoints=["three"], uuid=OTHER_UUID)
    running.create()

    def asked():
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(image_run, "stop_here_if_asked", asked)
    heal = HealCall(Libvirt("test:///default"), ["web", "db"], CheckpointRequest(state="absent"), SETTINGS, live=True)
    outcomes, _warnings = heal.run()
    assert [(one.name, one.problems[0].code) for one in outcomes] == [("web", "interrupted"), ("db", "interrupted")]
    assert fleet.checkpoints(running) == ["three"]


def test_no_verdict_holds_of_a_chain_that_the_vm_does_not_use(fleet):
    """Also where nothing would be done."""
    base(fleet, "base", bitmap("one"))
    base(fleet, "other")
    top(fleet, "a", "base", bitmap("one"))
    domain = fleet.define("web", "a", checkpoints=["one"])
    assert states(healed(fleet)) == {"one": "valid"}
    below = f"<backingStore type='file'><format type='qcow2'/><source file='{fleet.path('other')}'/><backingStore/>"
    text = domain.XMLDesc(0).replace("<target dev='vda'", f"{below}</backingStore><target dev='vda'")
    fleet.host.defineXML(text)
    found = healed(fleet)
    assert (found.state, [one.code for one in found.failures]) == ("failed", ["other_chain"])
    assert states(found) == {"one": "other_chain"}  # what would be valid if the VM used it is told as valid nowhere


def test_a_pattern_that_matches_no_checkpoint_is_told(fleet):
    base(fleet, "a", bitmap("one"))
    fleet.define("web", "a", checkpoints=["one"])
    (done,), warnings = call(checkpoints=("two*", "o*", "*"))
    assert (done.state, warnings) == ("valid", ["two*: no checkpoint of these domains matches it."])
