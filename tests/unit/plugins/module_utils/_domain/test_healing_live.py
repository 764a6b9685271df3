# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the checkpoints of a domain that runs, by what libvirt says of them.

What libvirt itself does is in the integration target domain_overlay.
"""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import Checkpoint
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
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Kept, KnownCheckpoint
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import (
    Definition,
    DomainDisk,
    checkpoint_from,
    only_disk,
)

DOMAIN = Domain("web", "uuid", "running", True, False, Definition("<domain/>"), Definition("<domain/>"))
DISK = DomainDisk("vda", "file", "/a", "qcow2", None, False, None)
# Oldest first.
VERDICTS = {
    "valid": Checkpoint("valid", True),
    "broken": Checkpoint("broken", False, "broken", None, "Shut it down."),
    "unknown": Checkpoint("unknown", None, "in_use", "/a", "The domain runs, and libvirt cannot tell."),
    "diskless": Checkpoint("diskless", None, "incomplete"),
}


def fates(names=tuple(VERDICTS), **request):
    """Return by name what is to become of these checkpoints, in order."""
    known = [KnownCheckpoint(name, {"vdx" if name == "diskless" else "vda": name}) for name in names]
    judged = tuple(DomainCheckpoint(one, VERDICTS[one.name], None, None) for one in known)
    look = DomainLook(DOMAIN, Kept(tuple(known)), (DiskLook(DISK, None, None),), judged, NextBackup("full", None, ""))
    return fates_of_running(look, CheckpointRequest(**request))


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


class OldLibvirt:
    """A daemon that is only asked for its version."""

    version = (6, 5, 0)


def test_an_old_libvirt_is_asked_to_delete_nothing():
    found = remove_from_running(OldLibvirt(), DOMAIN, fates(state="absent", checkpoints=("valid",)), check_mode=False)
    assert told(found) == [("valid", "old_libvirt")]
    kept = fates(names=("valid",))
    assert remove_from_running(OldLibvirt(), DOMAIN, kept, check_mode=False) == kept


@pytest.mark.parametrize("target, bitmaps", [("vda", {"vda": "one"}), ("vdb", {"vdb": "one"}), ("vdz", {})])
def test_a_checkpoint_is_described_with_one_disk(target, bitmaps):
    disks = "".join(f"<disk name='{name}' checkpoint='bitmap' bitmap='one'/>" for name in ("vda", "vdb"))
    text = (
        f"<domaincheckpoint><name>one</name><disks>{disks}<disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
    )
    parts = checkpoint_from(only_disk(text, target))
    assert parts.bitmaps == bitmaps
    assert parts.left_out == {"vda", "vdb", "vdc"} - set(bitmaps)
