# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the checkpoints of a domain that runs, by what libvirt says of them.

What libvirt itself does is in the integration target domain_overlay.
"""

from __future__ import annotations

import re
import typing as t

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import Checkpoint
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.unfinished import COMMIT, HEALING, Unfinished
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import healing_live
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.healing import CheckpointRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.healing_live import (
    fates_of_running,
    remove_from_running,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.look import DomainLook
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.verdicts import (
    DiskLook,
    DomainCheckpoint,
    NextBackup,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt import checkpoints
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Kept, KnownCheckpoint
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import (
    Definition,
    DomainDisk,
    checkpoint_from,
    only_disk,
)

from .. import qemu

DOMAIN = Domain("web", "uuid", "running", True, False, Definition("<domain/>"), Definition("<domain/>"))
DISK = DomainDisk("vda", "file", "/a", "qcow2", None, False, None)
# Oldest first.
VERDICTS = {
    "valid": Checkpoint("valid", True),
    "broken": Checkpoint("broken", False, "broken", None, "Shut it down."),
    "unknown": Checkpoint("unknown", None, "in_use", "/a", "The domain runs, and libvirt cannot tell."),
    "diskless": Checkpoint("diskless", None, "incomplete"),
}


def looked(names=tuple(VERDICTS), chain=None):
    """Return the look at a domain that has these checkpoints."""
    known = [KnownCheckpoint(name, {"vdx" if name == "diskless" else "vda": name}) for name in names]
    judged = tuple(DomainCheckpoint(one, VERDICTS[one.name], None, None) for one in known)
    return DomainLook(DOMAIN, Kept(tuple(known)), (DiskLook(DISK, None, chain),), judged, NextBackup("full", None, ""))


def fates(names=tuple(VERDICTS), **request):
    """Return what is to become of these checkpoints, in order."""
    return fates_of_running(looked(names), CheckpointRequest(**request))


def told(found):
    return [(one.name, one.problem.code if one.problem else one.state) for one in found]


def test_nothing_is_healed_and_nothing_goes_unasked():
    assert told(fates()) == [
        ("diskless", "no_checkpoint"),
        ("unknown", "libvirt_failed"),
        ("broken", "not_valid"),
        ("valid", "valid"),
    ]
    assert [one.name for one in fates() if one.is_as_wanted] == ["valid"]
    (problem,) = (one.problem for one in fates() if one.name == "broken")
    assert "Shut it down and run this again" in str(problem)
    assert "unusable=remove" in str(problem)


def test_only_what_libvirt_calls_broken_is_unusable():
    assert told(fates(removes_unusable=True)) == [
        ("diskless", "removed"),
        ("unknown", "libvirt_failed"),
        ("broken", "removed"),
        ("valid", "valid"),
    ]


def test_absent_takes_what_is_asked_for_the_newest_first():
    found = fates(state="absent", checkpoints=("valid", "u*", "never", "x*"))
    assert told(found) == [("unknown", "removed"), ("valid", "removed"), ("never", "absent")]
    assert told(fates(checkpoints=("never",))) == [("never", "no_checkpoint")]


class Daemon:
    """A daemon that is only asked for versions, since it is to be told nothing."""

    def __init__(self, version=(7, 0, 0), qemu_version=(5, 2, 0)):
        self.version, self.qemu_version = version, qemu_version


def test_an_old_libvirt_is_asked_to_delete_nothing():
    going = fates(state="absent", checkpoints=("valid",))
    assert told(remove_from_running(Daemon((6, 5, 0)), looked(), going, check_mode=False)) == [("valid", "old_libvirt")]
    kept = fates(names=("valid",))
    assert remove_from_running(Daemon((6, 5, 0)), looked(), kept, check_mode=False) == kept


@pytest.fixture(name="chain")
def chain_with_a_bitmap_below(tmp_path):
    """Return a chain of which both images have the bitmap valid, and the topmost one alone has the bitmap unknown."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu.create(base, "1M")
    qemu.qemu_img("bitmap", "--add", str(base), "valid")
    qemu.create(top, "1M", "-b", str(base), "-F", "qcow2")
    for name in ("valid", "unknown"):
        qemu.qemu_img("bitmap", "--add", str(top), name)
    return examine_chain(str(top), follow=True, count=False, image_format="qcow2")


def test_an_old_qemu_is_asked_to_remove_nothing_from_images_below(chain, monkeypatch):
    # QEMU 5.2 takes the bitmap of the topmost image from the disk before it fails, so it must not be tried.
    deleted = []
    monkeypatch.setattr(healing_live, "delete_live", lambda _daemon, _domain, names: deleted.extend(names) or {})
    look = looked(chain=chain)
    going = fates_of_running(look, CheckpointRequest(state="absent", checkpoints=("valid", "unknown")))
    for check_mode in (True, False):
        found = remove_from_running(Daemon(), look, going, check_mode=check_mode)
        assert told(found) == [("unknown", "removed"), ("valid", "old_libvirt")]
    (problem,) = (one.problem for one in found if one.problem)
    assert "base.qcow2 has a bitmap of its checkpoint 'valid', and QEMU 5.2.0" in str(problem)
    assert deleted == ["unknown"]


def test_a_newer_qemu_is_asked_to_remove_all(chain, monkeypatch):
    deleted = []
    monkeypatch.setattr(healing_live, "delete_live", lambda _daemon, _domain, names: deleted.extend(names) or {})
    look = looked(chain=chain)
    going = fates_of_running(look, CheckpointRequest(state="absent", checkpoints=("valid",)))
    newer = Daemon((9, 0, 0), (6, 1, 0))
    assert told(remove_from_running(newer, look, going, check_mode=False)) == [("valid", "removed")]
    assert deleted == ["valid"]


@pytest.mark.parametrize(
    ("work", "targets", "expected"),
    [
        (Unfinished(COMMIT, "/a", "its commit is unfinished", "Complete it."), ["vda"], "unfinished"),
        (Unfinished(COMMIT, "/a", "its commit is unfinished", "Complete it."), ["vdb"], "removed"),  # of another disk
        (Unfinished(COMMIT, "/a", "its vault is left over", "", is_in_the_way=False), ["vda"], "removed"),
        (Unfinished(HEALING, "/a", "work on its bitmaps is unfinished", ""), ["vda"], "removed"),
    ],
)
def test_nothing_is_removed_that_the_end_of_a_merge_would_make_valid_or_put_back(
    chain, monkeypatch, work, targets, expected
):
    deleted = []
    monkeypatch.setattr(healing_live, "delete_live", lambda _daemon, _domain, names: deleted.extend(names) or {})
    look = looked(("broken",), chain._replace(unfinished=(work,)))
    (fate,) = fates_of_running(look, CheckpointRequest(removes_unusable=True))
    fate = fate._replace(bitmaps=dict.fromkeys(targets, "broken"))
    for check_mode in (True, False):
        found = remove_from_running(Daemon((9, 0, 0), (9, 0, 0)), look, [fate], check_mode=check_mode)
        assert told(found) == [("broken", expected)]
    assert deleted == (["broken"] if expected == "removed" else [])


DESCRIBED = """<domaincheckpoint><name>one</name><description>{}</description><disks>
<disk name='vda' checkpoint='bitmap' bitmap='one'/><disk name='vdb' checkpoint='bitmap' bitmap='&quot;ö\n'/>
<disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"""


@pytest.mark.parametrize("target", ["vda", "vdb"])
def test_a_checkpoint_is_described_with_one_disk_and_known_as_it_was(target):
    whole = DESCRIBED.format("weekly")
    was = checkpoint_from(whole)
    assert not was.is_half_deleted
    begun = only_disk(whole, was.bitmaps, "vda")
    for text in (only_disk(whole, was.bitmaps, target), only_disk(begun, was.bitmaps, target)):
        assert re.findall(r'<disk name="(\w+)" checkpoint="bitmap"', text) == [target]
        assert text.count("<description>") == 1
        assert checkpoint_from(text) == was._replace(is_half_deleted=True)


@pytest.mark.parametrize("rest", ["", "[1]", "{", '{"vda": 1}', "null"])
def test_a_description_that_is_not_whole_tells_nothing(rest):
    begun = only_disk(DESCRIBED.format(""), {"vda": "one"}, "vda")
    start = begun.index("The bitmaps that it had: ") + len("The bitmaps that it had: ")
    parts = checkpoint_from(begun[:start] + rest + begun[begun.index("</description>") :])
    assert (parts.bitmaps, parts.is_half_deleted) == ({"vda": "one"}, False)


class Known(t.NamedTuple):
    """A checkpoint that libvirt has; `fails` when it is asked for its XML."""

    name: str
    handle: Handle
    fails: bool = False

    def getName(self):  # noqa: N802  as libvirt has it
        return self.name

    def getXMLDesc(self, _flags):  # noqa: N802
        if self.fails:
            raise libvirt.libvirtError("end of file")
        return f"<domaincheckpoint><name>{self.name}</name></domaincheckpoint>"

    def delete(self, _flags):
        self.handle.gone.add(self.name)


class Handle:
    """A domain with checkpoints; `answers` tells how often it lists them."""

    def __init__(self, names, fails, answers, by_others=()):
        self.gone = set()
        self.by_others = by_others  # names of those that somebody deletes meanwhile
        self.answers = answers
        self.all = [Known(name, self, name in fails) for name in names]

    def isActive(self):  # noqa: N802
        return True

    def listAllCheckpoints(self, _flags):  # noqa: N802
        self.answers -= 1
        if self.answers < 0:
            raise libvirt.libvirtError("end of file")
        found = [one for one in self.all if one.name not in self.gone]
        self.gone.update(self.by_others)
        return found


@pytest.mark.parametrize(
    "fails, answers, by_others, expected",
    [
        ((), 2, (), []),
        (("b",), 2, (), ["b"]),  # of the two others it is told that they are gone
        (("b",), 2, ("b",), []),
        ((), 1, (), ["a", "b", "c"]),  # nobody can tell what is gone
    ],
)
def test_what_libvirt_has_deleted_is_told_although_a_call_fails(monkeypatch, fails, answers, by_others, expected):
    handle = Handle("abcd", fails, answers, by_others)
    monkeypatch.setattr(checkpoints, "look_up", lambda _daemon, _domain: handle)
    problems = checkpoints.delete_live(Daemon(), DOMAIN, ["a", "b", "c", "never"])
    assert sorted(problems) == expected
    assert handle.gone == {"a", "b", "c"} - (set(fails) - set(by_others))


def test_a_daemon_that_lists_nothing_is_told_of(monkeypatch):
    monkeypatch.setattr(checkpoints, "look_up", lambda _daemon, _domain: Handle("a", (), 0))
    with pytest.raises(Refusal, match="libvirt cannot tell about it: end of file"):
        checkpoints.delete_live(Daemon(), DOMAIN, ["a"])
