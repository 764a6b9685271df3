# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of the domains of a host, by libvirt's driver for tests and on real images.

What its driver for QEMU does is in the integration target domain_overlay.
"""

from __future__ import annotations

import hashlib
import os
import shutil

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base import files
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import Content, place_of, write_vault
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.look import (
    DomainLook,
    look,
    unreadable_as_result,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Libvirt, Unreadable
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu

UUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"


def element(target, path, inner="", image_format="qcow2", device="disk"):
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='{image_format}'/><source file='{path}'/>{inner}"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


@pytest.fixture(name="define")
def fixture_define():
    """Define domains in the test driver, as many as wanted, and undefine them."""
    host = libvirt.open("test:///default")
    made = []

    def define(name, *disks, uuid=UUID, checkpoint=None):
        text = (
            f"<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory>1024</memory><os><type>hvm</type></os>"
            f"<devices>{''.join(disks)}</devices></domain>"
        )
        made.append(host.defineXML(text))
        if checkpoint:  # the driver makes none of a domain that is shut off
            made[-1].create()
            made[-1].checkpointCreateXML(f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>")
            made[-1].destroy()
        return made[-1]

    yield define
    for domain in made:
        for checkpoint in domain.listAllCheckpoints(0):
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        domain.undefine()


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    """Have an overlay with the mark of a snapshot, and both images with the bitmap one."""
    base = qemu.create(tmp_path / "web.qcow2", "1M")
    top = qemu.create(tmp_path / "web.monday.qcow2", "1M", "-b", base, "-F", "qcow2")
    for path in (base, top):
        qemu.add_bitmaps(path, [Bitmap("one", 65536, recording=True, inconsistent=False)])
    write(top, Mark(UUID, "vda", "monday"))
    return top, base


def write(path, mark):
    with open(path, "r+b") as file:
        write_mark(files.owning(path, os.dup(file.fileno())), mark, History(made=1_700_000_000_999_999_999))


def looked(name="web", **more):
    (one,), warnings = look(Libvirt("test:///default"), [name], counts=True, **more)
    assert warnings == []
    return one.as_result() if isinstance(one, DomainLook) else unreadable_as_result(one)


def test_a_domain_with_a_checkpoint_on_a_snapshot(define, chain):
    define("web", element("vda", chain[0]), checkpoint="one")
    result = looked()
    assert (result["name"], result["uuid"], result["state"]) == ("web", UUID, "shut off")
    assert (result["managed_save"], result["tpm"], result["nvram"]) == (False, False, None)
    (disk,) = result["disks"]
    assert (disk["target"], disk["source"], disk["unfit"]) == ("vda", chain[0], None)
    assert [(one["path"], one["snapshot"]) for one in disk["images"]] == [(chain[0], "monday"), (chain[1], None)]
    assert [one["modified"] for one in disk["images"]] == [int(os.stat(path).st_mtime) for path in chain]
    assert [one["made"] for one in disk["images"]] == [1_700_000_000, None]
    (checkpoint,) = result["checkpoints"]
    assert (checkpoint["name"], checkpoint["valid"], checkpoint["dirty_bytes"]) == ("one", True, 0)
    assert result["next_backup"] == "incremental"
    assert (result["orphan_bitmaps"], result["unfinished"]) == ([], [])


def test_a_loss_that_is_older_than_the_checkpoint_costs_no_figures(define, chain):
    """Whose directory is gone, so that only the time tells."""
    place, length = qemu.directory_of(chain[1])
    qemu.patch(chain[1], place, bytes(length))
    qemu.patch(chain[1], 88, bytes(8))  # autoclear bit 0
    os.utime(chain[1], (10_000, 10_000))
    define("web", element("vda", chain[0]), checkpoint="one")
    (checkpoint,) = looked()["checkpoints"]
    assert (checkpoint["valid"], checkpoint["dirty_bytes"]) == (True, 0)


def test_a_disk_that_was_put_back_from_an_older_file_has_not_the_bitmap_of_the_checkpoint(define, chain):
    os.utime(chain[0], (10_000, 10_000))
    define("web", element("vda", chain[0]), checkpoint="one")
    result = looked()
    (checkpoint,) = result["checkpoints"]
    assert (checkpoint["valid"], checkpoint["problem"], checkpoint["image"]) == (False, "older", chain[0])
    assert result["next_backup"] == "full"


def test_a_merge_that_was_killed_tells_which_snapshot_it_was(define, chain):
    with open_image(chain[0]) as file, open(place_of(chain[1], False, ""), "wb") as vault:
        write_vault(vault.fileno(), Content("0123", file, [], [], [], {}, 1 << 20))
    define("web", element("vda", chain[0]), checkpoint="one")
    (left,) = looked()["unfinished"]
    assert (left["target"], left["image"], left["kind"], left["snapshot"]) == ("vda", chain[1], "commit", "monday")


@pytest.mark.parametrize("name", ["one", "other"])
def test_what_the_vault_of_an_image_that_is_not_in_the_chain_may_have_alone_is_in_doubt(define, chain, tmp_path, name):
    """As once 'virsh blockpull' has taken that one in."""
    gone = qemu.create(tmp_path / "gone.qcow2", "1M")
    below = [(Bitmap(name, 65536, True, False), [])]
    with open_image(gone) as file, open(place_of(chain[1], False, ""), "wb") as vault:
        write_vault(vault.fileno(), Content("0123", file, [], below, [], {}, 1 << 20))
    define("web", element("vda", chain[0]), checkpoint="one")
    result = looked()
    (checkpoint,) = result["checkpoints"]
    told = (checkpoint["valid"], checkpoint["problem"], checkpoint["image"], result["next_backup"])
    assert told == ((None, "incomplete", chain[1], "unknown") if name == "one" else (True, None, None, "incremental"))


@pytest.mark.parametrize("mark", [Mark("other", "vda", "monday"), Mark(UUID, "vdb", "monday")])
def test_the_snapshot_of_another_domain_or_disk_is_none_of_this_one(define, chain, mark):
    plain = qemu.create(chain[1] + ".plain", "1M", "-b", chain[1], "-F", "qcow2")
    write(plain, mark)
    define("web", element("vda", plain))
    assert [one["snapshot"] for one in looked()["disks"][0]["images"]] == [None, None]


def test_a_definition_that_states_another_chain_tells_nothing(define, chain, tmp_path):
    other = qemu.create(tmp_path / "other.qcow2", "1M")
    stated = f"<backingStore type='file'><format type='qcow2'/><source file='{other}'/><backingStore/></backingStore>"
    define("web", element("vda", chain[0], stated), checkpoint="one")
    result = looked()
    assert result["disks"][0]["code"] == "other_chain"
    assert (result["checkpoints"][0]["valid"], result["checkpoints"][0]["problem"]) == (None, "incomplete")
    assert result["next_backup"] == "unknown"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_data_file_that_qemu_would_not_find_allows_no_increment(define, tmp_path, monkeypatch, depth):
    monkeypatch.chdir(tmp_path)
    path = base = qemu.create(tmp_path / "base.qcow2", "1M", "-o", f"data_file={tmp_path}/data")
    if depth:
        path = qemu.create(tmp_path / "top.qcow2", "1M", "-b", base, "-F", "qcow2")
    for one in dict.fromkeys((base, path)):
        qemu.add_bitmaps(one, [Bitmap("one", 65536, recording=True, inconsistent=False)])
    qemu.qemu_img("amend", "-f", "qcow2", "-o", "data_file=data", base)
    define("web", element("vda", path), checkpoint="one")
    ((one,), _warnings) = look(Libvirt("test:///default"), ["web"], counts=True)
    result = one.as_result()
    assert (result["disks"][0]["code"], result["next_backup"]) == ("relative_data_file", "unknown")
    # The way out that is told.
    qemu.qemu_img("amend", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", base)
    assert looked()["next_backup"] == "incremental"


def test_disks_that_cannot_take_part_or_cannot_be_read(define, chain, tmp_path):
    disks = [
        element("vda", chain[0]),
        element("vdb", tmp_path / "gone.qcow2"),
        element("vdc", chain[1], "<readonly/>"),
        element("vdd", chain[1]).replace("device='disk'", "device='disk' snapshot='no'"),
    ]
    define("web", *disks)
    result = {one["target"]: one for one in looked()["disks"]}
    assert {target: one["unfit"] for target, one in result.items()} == {
        "vda": None,
        "vdb": None,
        "vdc": "read-only",
        "vdd": "excluded by snapshot='no' in the definition",
    }
    assert {target: one.get("code") for target, one in result.items() if "code" in one} == {"vdb": "no_such_file"}
    assert result["vdb"]["images"] == []
    assert [one["path"] for one in result["vdc"]["images"]] == [chain[1]]


def test_a_name_that_is_not_there_and_patterns(define, chain):
    define("web", element("vda", chain[0]))
    found, warnings = look(Libvirt("test:///default"), ["nobody", "we*", "nobody*"], counts=False)
    assert [one.problem.code if isinstance(one, Unreadable) else one.domain.name for one in found] == [
        "no_domain",
        "web",
    ]
    assert warnings == ["nobody*: no domain of this host matches it."]


def test_what_cannot_be_looked_at_has_the_same_keys(define, chain):
    define("web", element("vda", chain[0]))
    unreadable = unreadable_as_result(Unreadable("x", Refusal("libvirt_failed", "x", "it is gone")))
    assert set(unreadable) - set(looked()) == {"msg", "code"}
    assert set(looked()) <= set(unreadable)
    assert (unreadable["next_backup"], unreadable["code"]) == ("unknown", "libvirt_failed")


def test_a_domain_of_which_libvirt_cannot_tell_does_not_stop_the_others(define, chain, monkeypatch):
    define("web", element("vda", chain[0]))
    define("last", uuid="4dea22b3-1d52-d8f3-2516-782e98ab3fa1")
    daemon, real = Libvirt("test:///default"), Libvirt.kept_now

    def failing(self, domain):
        if domain.name == "web":
            raise Refusal("libvirt_failed", "web", "libvirt cannot tell about it")
        return real(self, domain)

    monkeypatch.setattr(Libvirt, "kept_now", failing)
    found, _warnings = look(daemon, ["web", "last"], counts=False)
    assert [isinstance(one, Unreadable) for one in found] == [True, False]


def test_nothing_is_written_and_no_lock_is_taken(define, chain, monkeypatch, tmp_path):
    def refuse(*_args):
        raise AssertionError("a lock was taken")

    monkeypatch.setattr(locks, "_set_lock", refuse)
    define("web", element("vda", chain[0]), checkpoint="one")
    before = {path: (path.stat(), hashlib.sha256(path.read_bytes()).digest()) for path in sorted(tmp_path.iterdir())}
    result = looked()
    after = {path: (path.stat(), hashlib.sha256(path.read_bytes()).digest()) for path in sorted(tmp_path.iterdir())}
    assert [(status.st_mtime_ns, status.st_ctime_ns, content) for status, content in before.values()] == [
        (status.st_mtime_ns, status.st_ctime_ns, content) for status, content in after.values()
    ]
    assert list(before) == list(after)
    assert result["next_backup"] == "incremental"


def test_an_image_that_a_process_has_open(define, chain):
    define("web", element("vda", chain[0]), checkpoint="one")
    with qemu.storage_daemon() as monitor:
        node = {"driver": "file", "filename": chain[0]}
        monitor.command("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": node, "backing": None})
        result = looked()
    assert (result["checkpoints"][0]["valid"], result["checkpoints"][0]["problem"]) == (None, "in_use")
    assert result["orphan_bitmaps"] is None
    assert result["next_backup"] == "unknown"


@pytest.mark.parametrize("replaced", [None, 0, 1])
def test_a_copy_in_the_place_of_an_image_of_a_domain_that_runs(define, chain, replaced):
    domain = define("web", element("vda", chain[0]), checkpoint="one")
    domain.create()
    try:
        with qemu.opened_for_writing(chain[0]):
            if replaced is not None:
                shutil.copy(chain[replaced], f"{chain[replaced]}.copy")
                os.rename(f"{chain[replaced]}.copy", chain[replaced])
            result = looked()
    finally:
        domain.destroy()
    (disk,) = result["disks"]
    assert disk.get("code") == (None if replaced is None else "other_disks")
    if replaced is not None:
        assert disk["msg"].startswith(chain[replaced])
        assert (result["next_backup"], result["checkpoints"][0]["problem"]) == ("unknown", "incomplete")
        assert result["checkpoints"][0]["image"] == chain[replaced]


def test_a_domain_that_was_shut_off_since_libvirt_was_asked_has_no_other_image(define, chain, monkeypatch):
    domain = define("web", element("vda", chain[0]))
    domain.create()
    real = Libvirt.kept_now

    def ends(self, one):
        domain.destroy()
        return real(self, one)

    monkeypatch.setattr(Libvirt, "kept_now", ends)
    assert "code" not in looked()["disks"][0]
