# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whole disks on real images: what is reported of sound chains, of running VMs, and of what cannot be read."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import chain_size
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import examine as _disks
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

from .. import qemu

MONDAY = Bitmap("monday", 65536, True, False)
TUESDAY = Bitmap("tuesday", 131072, True, False)
OFF = Bitmap("off", 65536, False, False)
BROKEN = Bitmap("broken", 65536, True, True)


def write(path, offset):
    """Have a guest write one sector."""
    subprocess.run(["qemu-io", "-c", f"write {offset} 512", path], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(name="chain")
def _chain(tmp_path):
    """Make a chain of three on a raw base: monday in all, tuesday above the lowest, one disabled, one inconsistent."""
    (tmp_path / "base.raw").write_bytes(bytes(10 << 20))
    low = qemu.create(tmp_path / "low", "10M", "-b", "base.raw", "-F", "raw")
    qemu.add_bitmaps(low, [MONDAY, OFF, BROKEN])
    write(low, 0)
    write(low, "1M")
    mid = qemu.create(tmp_path / "mid", "10M", "-b", low, "-F", "qcow2")
    qemu.add_bitmaps(mid, [MONDAY, TUESDAY])
    write(mid, "1M")
    top = qemu.create(tmp_path / "top", "10M", "-b", "mid", "-F", "qcow2")
    qemu.add_bitmaps(top, [MONDAY, TUESDAY])
    write(top, "2M")
    return top


def checkpoints(result):
    """Return (valid, problem, file name, dirty bytes) by checkpoint."""
    return {
        one["name"]: (one["valid"], one["problem"], one["image"] and os.path.basename(one["image"]), one["dirty_bytes"])
        for one in result["checkpoints"]
    }


def dirty(result):
    """Return the dirty bytes of each bitmap, image by image."""
    return [{bitmap["name"]: bitmap["dirty_bytes"] for bitmap in image["bitmaps"]} for image in result["images"]]


def test_a_sound_chain(chain, tmp_path):
    disk = examine_chain(chain, follow=True, count=True)
    result = disk.as_result()
    assert (result["path"], result["in_use"], "msg" in result, disk.warnings) == (chain, False, False, ())
    assert checkpoints(result) == {
        "monday": (True, None, None, 3 * 65536),
        "tuesday": (True, None, None, 2 * 131072),
        "off": (False, "not_in_top", "top", None),
        "broken": (False, "not_in_top", "top", None),
    }
    assert dirty(result) == [
        {"monday": 65536, "tuesday": 131072},
        {"monday": 65536, "tuesday": 131072},
        {"monday": 2 * 65536, "off": 0, "broken": None},
        {},
    ]
    assert [image["format"] for image in result["images"]] == ["qcow2", "qcow2", "qcow2", "raw"]
    assert json.loads(json.dumps(result)) == result
    assert sorted(str(fault).split(" (", maxsplit=1)[0] for fault in disk.faults(None)) == [
        f"{chain}: checkpoint 'broken' is not valid",
        f"{chain}: checkpoint 'off' is not valid",
    ]


def test_whether_the_bitmap_of_the_topmost_image_alone_would_do(chain, tmp_path):
    def figures(path):
        result = examine_chain(str(path), follow=True, count=True).as_result()
        return {one["name"]: (one["dirty_bytes_top"], one["top_alone"]) for one in result["checkpoints"]}

    # Three images have monday, each with bits of its own; the topmost one has one granule of three.
    assert figures(chain) == {
        "monday": (65536, False),
        "tuesday": (131072, False),
        "off": (None, None),
        "broken": (None, None),
    }
    # Where the top has the same bits as all together, a tool may read it alone; so too where nothing is below.
    write(chain, 0)
    write(chain, "1M")
    assert figures(chain)["monday"] == (3 * 65536, True)
    alone = qemu.create(tmp_path / "alone", "1M")
    qemu.add_bitmaps(alone, [MONDAY])
    assert figures(alone) == {"monday": (0, True)}
    uncounted = examine_chain(chain, follow=True, count=False).as_result()["checkpoints"][0]
    assert (uncounted["dirty_bytes_top"], uncounted["top_alone"]) == (None, None)


def test_the_same_as_qemu_img(chain):
    said = json.loads(qemu.qemu_img("info", "--backing-chain", "--output=json", chain))
    result = examine_chain(chain, follow=True, count=False).as_result()
    assert len(said) == len(result["images"]) == 4
    for theirs, ours in zip(said, result["images"]):
        data = theirs.get("format-specific", {}).get("data", {})
        assert os.path.samefile(theirs["filename"], ours["path"])
        assert theirs["format"] == ours["format"]
        assert theirs["virtual-size"] == ours["virtual_size"]
        assert theirs["actual-size"] == ours["actual_size"]
        assert theirs.get("cluster-size") == ours["cluster_size"]
        assert theirs.get("backing-filename") == ours["backing_file"]
        assert theirs.get("backing-filename-format") == ours["backing_format"]
        assert data.get("compat") == ours["compat"]
        assert data.get("corrupt", False) == ours["corrupt"]
        assert theirs["dirty-flag"] == ours["dirty"]
        assert [
            (bitmap["name"], bitmap["granularity"], "auto" in bitmap["flags"], "in-use" in bitmap["flags"])
            for bitmap in data.get("bitmaps", ())
        ] == [
            (bitmap["name"], bitmap["granularity"], bitmap["recording"], bitmap["inconsistent"])
            for bitmap in ours["bitmaps"]
        ]
        assert all(bitmap["dirty_bytes"] is None for bitmap in ours["bitmaps"])


def test_only_the_topmost_image_leaves_open_what_it_cannot_tell(chain, tmp_path):
    result = examine_chain(chain, follow=False, count=True).as_result()
    assert [image["path"] for image in result["images"]] == [chain]
    assert checkpoints(result)["monday"] == (None, "incomplete", "top", None)
    assert dirty(result) == [{"monday": 65536, "tuesday": 131072}]
    alone = qemu.create(tmp_path / "alone", "1M")
    qemu.add_bitmaps(alone, [MONDAY])
    assert checkpoints(examine_chain(alone, follow=False, count=True).as_result()) == {"monday": (True, None, None, 0)}


def test_a_running_vm(chain):
    with qemu.opened_for_writing(chain):
        result = examine_chain(chain, follow=True, count=True).as_result()
    assert [image["in_use"] for image in result["images"]] == [True, False, False, False]
    assert result["in_use"] is True
    assert checkpoints(result)["monday"] == (None, "in_use", "top", None)
    assert checkpoints(result)["off"] == (False, "gap", "mid", None)
    top = result["images"][0]["bitmaps"]
    assert {(bitmap["inconsistent"], bitmap["dirty_bytes"]) for bitmap in top} == {(None, None)}
    assert dirty(result)[1] == {"monday": 65536, "tuesday": 131072}
    after = examine_chain(chain, follow=True, count=True).as_result()
    assert checkpoints(after)["monday"] == (True, None, None, 3 * 65536)
    assert after["in_use"] is False


def test_a_vm_that_was_killed(chain):
    qemu.add_bitmaps(chain, [BROKEN])
    result = examine_chain(chain, follow=True, count=True).as_result()
    assert checkpoints(result)["broken"] == (False, "inconsistent", "top", None)
    assert checkpoints(result)["monday"] == (False, "inconsistent", "top", None)
    assert result["in_use"] is False


def test_bitmaps_that_another_program_made_worthless(chain):
    with open(chain, "rb") as file:
        file.seek(88)
        assert file.read(8) == struct.pack(">Q", 1)
    qemu.patch(chain, 88, struct.pack(">Q", 0))
    result = examine_chain(chain, follow=True, count=True).as_result()
    assert (result["images"][0]["lost_bitmaps"], result["images"][0]["bitmaps"]) == (2, [])
    assert checkpoints(result)["monday"][:3] == (False, "not_in_top", "top")
    assert "does not know bitmaps" in result["checkpoints"][0]["advice"]


def test_what_another_image_has_lost_is_none_of_a_later_bitmap(chain, tmp_path):
    """The lowest one has lost its own, among which tuesday was not."""
    qemu.patch(tmp_path / "low", 88, struct.pack(">Q", 0))
    found = checkpoints(examine_chain(chain, follow=True, count=True).as_result())
    assert found["monday"][:3] == (False, "lost", "low")
    assert found["tuesday"][:3] == (True, None, None)


def damage_of(tmp_path, what):
    """Break something below the topmost image of the chain."""
    low, mid = str(tmp_path / "low"), str(tmp_path / "mid")
    if what == "missing":
        os.unlink(low)
    elif what == "loop":
        qemu.qemu_img("rebase", "-u", "-b", str(tmp_path / "top"), "-F", "qcow2", mid)
    elif what == "protocol":
        qemu.qemu_img("rebase", "-u", "-b", "nbd://localhost/x", "-F", "raw", mid)
    elif what == "a FIFO":
        os.unlink(low)
        os.mkfifo(low)
    elif what == "a damaged directory":
        qemu.patch(low, qemu.directory_of(low)[0], b"\xff" * 8)
    elif what == "a header that ends":
        os.truncate(low, 50)
    elif what == "another format":
        with open(low, "r+b") as file:
            file.write(b"VMDK")


BROKEN_CHAINS = {
    "missing": (["top", "mid"], "low: does not exist"),
    "loop": (["top", "mid"], "the chain is a loop"),
    "protocol": (["top", "mid"], "is a protocol for QEMU"),
    "a FIFO": (["top", "mid"], "is neither a file nor a block device"),
    "a damaged directory": (["top", "mid"], "low: is damaged: "),
    "a header that ends": (["top", "mid"], "low: is damaged: header_length is 0"),
    "another format": (["top", "mid"], "low: is not a qcow2 image"),
}


@pytest.mark.parametrize("what", BROKEN_CHAINS)
def test_a_broken_chain_is_reported_as_far_as_it_can_be_read(chain, tmp_path, what):
    damage_of(tmp_path, what)
    names, message = BROKEN_CHAINS[what]
    disk = examine_chain(chain, follow=True, count=True)
    result = disk.as_result()
    assert [os.path.basename(image["path"]) for image in result["images"]] == names
    assert message in result["msg"]
    assert (result["msg"], result["code"]) == (str(disk.problem), disk.problem.code)
    assert checkpoints(result)["monday"] == (None, "incomplete", "mid", None)
    assert dirty(result) == [{"monday": 65536, "tuesday": 131072}] * 2


@pytest.mark.parametrize(
    "path, message",
    [
        ("relative", "is not an absolute path"),
        ("", "is not an absolute path"),
        ("/a\0b", "is no name that a file can have here"),
        ("/a\ud800b", "is no name that a file can have here"),
        ("/does/not/exist", "does not exist"),
        ("/", "is neither a file nor a block device"),
        ("/" + "x" * 5000, "File name too long"),
    ],
)
def test_a_path_that_cannot_be(path, message):
    result = examine_chain(path, follow=True, count=True).as_result()
    assert message in result["msg"]
    assert (result["images"], result["checkpoints"], result["in_use"]) == ([], [], None)


@pytest.mark.parametrize("count", [True, False])
def test_a_damaged_bitmap_table_is_found_whether_its_bits_are_counted_or_not(chain, tmp_path, count):
    low = str(tmp_path / "low")
    names = [bitmap.name for bitmap in qemu.read(low).bitmaps]
    qemu.patch(low, qemu.read(low).bitmap_tables[names.index("off")].offset, struct.pack(">Q", 2))
    result = examine_chain(chain, follow=True, count=count).as_result()
    assert "low: is damaged: an entry of the table of the bitmap 'off'" in result["msg"]
    assert len(result["images"]) == 3
    assert checkpoints(result)["monday"] == (None, "incomplete", "low", None)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", chain], check=False, capture_output=True).returncode == 1


def test_a_table_that_is_longer_than_the_image_needs(chain):
    offset, _length = qemu.directory_of(chain)
    qemu.patch(chain, offset + 8, struct.pack(">I", 2))
    assert "has 2 entries" in str(examine_chain(chain, follow=True, count=False).problem)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", chain], check=False, capture_output=True).returncode == 1


def test_a_topmost_image_on_which_no_vm_can_start(chain):
    qemu.patch(chain, 72, struct.pack(">Q", 2))
    result = examine_chain(chain, follow=True, count=True).as_result()
    assert "is marked corrupt" in result["msg"]
    assert result["images"][0]["corrupt"] is True
    assert checkpoints(result)["monday"][:2] == (None, "incomplete")


def test_an_image_further_down_that_is_marked_corrupt_is_warned_of(chain, tmp_path):
    low, backed_up = str(tmp_path / "low"), examine_chain(chain, follow=True, count=True)
    qemu.patch(low, 72, struct.pack(">Q", 2))
    disk = examine_chain(chain, follow=True, count=True)
    assert subprocess.run(["qemu-io", "-c", "read 0 512", chain], check=False, capture_output=True).returncode == 0
    assert (disk.problem, disk.as_result()["checkpoints"]) == (None, backed_up.as_result()["checkpoints"])
    (warning,) = disk.warnings
    assert f"{low}: is below {chain} and marked corrupt" in warning
    # The way out that is told.
    qemu.qemu_img("check", "-q", "-r", "all", low)
    assert examine_chain(chain, follow=True, count=True).warnings == ()


def test_below_a_format_that_is_not_looked_into_anything_may_be(tmp_path):
    base = tmp_path / "base"
    qemu.qemu_img("create", "-q", "-f", "vmdk", str(base), "10M")
    top = qemu.create(tmp_path / "top", "10M", "-b", str(base), "-F", "vmdk")
    qemu.add_bitmaps(top, [MONDAY])
    result = examine_chain(top, follow=True, count=True).as_result()
    assert "msg" not in result
    assert (result["images"][1]["format"], result["images"][1]["virtual_size"]) == ("vmdk", None)
    assert checkpoints(result)["monday"] == (None, "incomplete", "base", None)


@pytest.mark.parametrize("image_format", ["vpc", "vdi", "vhdx", "luks"])
def test_a_format_that_can_have_no_backing_file_is_the_base(tmp_path, image_format):
    base = str(tmp_path / "base")
    options = ["-o", "key-secret=s,iter-time=10", "--object", "secret,id=s,data=abc"] if image_format == "luks" else []
    qemu.qemu_img("create", "-q", "-f", image_format, *options, base, "10M")
    top = qemu.create(tmp_path / "top", "10M", "-u", "-b", base, "-F", image_format)
    qemu.add_bitmaps(top, [MONDAY])
    result = examine_chain(top, follow=True, count=True).as_result()
    assert "msg" not in result
    assert (result["images"][1]["format"], result["images"][1]["virtual_size"]) == (image_format, None)
    assert checkpoints(result)["monday"] == (True, None, None, 0)


def test_a_file_recorded_as_file_is_the_base(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(bytes(1 << 20))
    top = qemu.create(tmp_path / "top", "1M", "-u", "-b", str(base), "-F", "file")
    qemu.add_bitmaps(top, [MONDAY])
    result = examine_chain(top, follow=True, count=True).as_result()
    assert (result["images"][1]["format"], result["images"][1]["virtual_size"]) == ("file", 1 << 20)
    assert checkpoints(result)["monday"] == (True, None, None, 0)


def without_backing_format(path):
    """Have an image not record the format of its backing file."""
    with open(path, "rb") as file:
        place = file.read(4096).index(bytes.fromhex("e2792aca"))
    qemu.patch(path, place, bytes.fromhex("12345678"))  # a kind of extension that nobody knows


def test_an_image_of_another_format_that_is_not_recorded_is_named_and_ends_what_can_be_told(tmp_path):
    low = tmp_path / "low"
    qemu.qemu_img("create", "-q", "-f", "qed", "-b", qemu.create(tmp_path / "base", "1M"), "-F", "qcow2", str(low))
    top = qemu.create(tmp_path / "top", "1M", "-b", str(low), "-F", "qed")
    qemu.add_bitmaps(top, [MONDAY])
    without_backing_format(top)
    result = examine_chain(top, follow=True, count=True).as_result()
    assert [image["format"] for image in result["images"]] == ["qcow2", "qed"]
    assert result["images"][1]["virtual_size"] is None
    assert (result["code"], "low: is an image of the format qed" in result["msg"]) == ("format_not_recorded", True)
    assert checkpoints(result)["monday"] == (None, "incomplete", "low", None)


@pytest.mark.parametrize("image_format", ["qcow", "vmdk"])
def test_a_topmost_image_of_another_format_is_named(tmp_path, image_format):
    path = tmp_path / "top"
    qemu.qemu_img("create", "-q", "-f", image_format, str(path), "1M")
    result = examine_chain(str(path), follow=True, count=True).as_result()
    assert [image["format"] for image in result["images"]] == [image_format]
    assert f"is an image of the format {image_format}" in result["msg"]


def test_an_external_data_file_without_its_folder_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    low = qemu.create(tmp_path / "low", "1M", "-o", "data_file=data")
    top = qemu.create(tmp_path / "top", "1M", "-b", low, "-F", "qcow2")
    assert qemu.read(top).backing_file == low
    disk = examine_chain(top, follow=True, count=True)
    assert disk.problem is None
    assert "low: its external data file 'data' is recorded without its folder" in " ".join(disk.warnings)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == 1
    # The way out that is told.
    monkeypatch.chdir(tmp_path)
    qemu.qemu_img("amend", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", low)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == 0
    assert examine_chain(top, follow=True, count=True).warnings == ()


def test_what_is_wrong_with_a_data_file_further_down_is_told(tmp_path):
    low = qemu.create(tmp_path / "low", "1M", "-o", f"data_file={tmp_path}/data")
    top = qemu.create(tmp_path / "top", "1M", "-b", low, "-F", "qcow2")
    with open(low, "rb") as file:
        place = file.read(4096).index(b"DATA")
    qemu.patch(low, place + 8, b"nbd:")
    assert "low: its external data file 'nbd:" in str(examine_chain(top, follow=True, count=True).problem)
    qemu.patch(low, place, b"DATB")
    result = examine_chain(top, follow=True, count=True).as_result()
    assert (result["code"], "does not name it" in result["msg"]) == ("no_data_file", True)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == 1


def test_more_than_can_be_counted_costs_the_figures_with_a_warning(chain, monkeypatch):
    monkeypatch.setattr(_disks, "MAX_COUNTED_BITS", 99)
    disk = examine_chain(chain, follow=True, count=True)
    assert "dirty bytes are not counted" in " ".join(disk.warnings)
    assert disk.problem is None
    assert checkpoints(disk.as_result())["monday"] == (True, None, None, None)


def test_more_bitmaps_than_can_be_reported(chain, monkeypatch):
    monkeypatch.setattr(chain_size, "MAX_BITMAPS_OF_CHAIN", 3)
    disk = examine_chain(chain, follow=True, count=True)
    assert "more than 3, too many to report" in str(disk.problem)
    assert len(disk.layers) == 1


@pytest.mark.parametrize("limit", ["MAX_BITMAP_BYTES", "MAX_TABLE_ENTRIES"])
def test_larger_bitmaps_than_can_be_looked_at_are_not_read(chain, monkeypatch, limit):
    monkeypatch.setattr(chain_size, limit, 2)
    monkeypatch.setattr(_disks, "DirtyMap", None)
    disk = examine_chain(chain.replace("top", "low"), follow=True, count=True)
    assert "too much to be looked at. Remove those that no backup needs" in str(disk.problem)
    assert disk.layers == ()


@pytest.mark.parametrize("times", [1, 9])
def test_a_vm_that_runs_while_bits_are_counted(chain, monkeypatch, times):
    real, calls = _disks.counting_cost, []

    def counting(maps):  # called once in each attempt for the checkpoint that all three images have
        if len(maps) == 3:
            calls.append(maps)
            if len(calls) <= times:
                write(chain, "5M")
        return real(maps)

    monkeypatch.setattr(_disks, "counting_cost", counting)
    disk = examine_chain(chain, follow=True, count=True)
    figures = checkpoints(disk.as_result())["monday"][3]
    if times == 1:
        assert (len(calls), figures, disk.warnings) == (2, 4 * 65536, ())
    else:
        assert (len(calls), figures) == (3, None)
        assert "changed again and again" in " ".join(disk.warnings)


def test_what_a_gate_is_told(chain, tmp_path):
    disk = examine_chain(chain, follow=True, count=False)
    assert disk.faults("monday") == []
    assert "checkpoint 'off' is not valid" in str(disk.faults("off")[0])
    assert "no image of its chain has the checkpoint 'nobody'" in str(disk.faults("nobody")[0])
    top = examine_chain(chain, follow=False, count=False)
    assert f"checkpoint 'monday' may not be valid: its chain was not read to the end, below {chain}" in str(
        top.faults("monday")[0]
    )
    # All of them worthless: there is no checkpoint of which anything could be said.
    alone = qemu.create(tmp_path / "alone", "1M")
    assert examine_chain(alone, follow=True, count=False).faults(None) == []
    qemu.add_bitmaps(alone, [MONDAY])
    qemu.patch(alone, 88, struct.pack(">Q", 0))
    assert "its 1 bitmaps are worthless" in str(examine_chain(alone, follow=True, count=False).faults(None)[0])
    many = qemu.create(tmp_path / "many", "1M")
    qemu.add_bitmaps(many, [Bitmap(f"b{number}", 65536, False, False) for number in range(30)])
    assert len(examine_chain(many, follow=True, count=False).faults(None)) == 11


def test_nothing_stays_open(chain, tmp_path):
    before = os.listdir("/proc/self/fd")
    for _time in range(3):
        examine_chain(chain, follow=True, count=True)
        examine_chain(chain, follow=False, count=True)
        examine_chain(str(tmp_path / "missing"), follow=True, count=True)
    os.unlink(tmp_path / "low")
    examine_chain(chain, follow=True, count=True)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_odd_names_can_be_returned(tmp_path):
    made = qemu.create(tmp_path / "made", "1M")
    qemu.add_bitmaps(made, [MONDAY, Bitmap("-\n,\u202e", 65536, False, False)])
    folder = os.fsencode(tmp_path) + b"/\xff\n,"
    os.mkdir(folder)
    path = os.fsdecode(folder + b"/a,b")
    os.rename(made, path)
    offset, length = qemu.directory_of(path)
    with open(path, "rb") as file:
        file.seek(offset)
        place = file.read(length).index(b"monday")
    qemu.patch(path, offset + place, b"m\xffnday")
    disk = examine_chain(path, follow=True, count=True)
    result = json.loads(json.dumps(disk.as_result()).encode("utf-8"))
    names = {bitmap["name"] for bitmap in result["images"][0]["bitmaps"]}
    assert names == {"m\\udcffnday", "-\n,\u202e"}
    assert set(checkpoints(result)) == names
    for text in disk.faults(None):
        str(text).encode("utf-8")


def test_an_overlay_larger_than_its_backing_file(chain, tmp_path):
    grown = qemu.create(tmp_path / "grown", "20M", "-b", chain, "-F", "qcow2")
    qemu.add_bitmaps(grown, [MONDAY])
    result = examine_chain(grown, follow=True, count=True).as_result()
    assert checkpoints(result)["monday"] == (False, "different_size", "top", None)


def test_files_that_report_an_error_when_they_are_closed_are_no_failure(chain, monkeypatch):
    close = os.close

    def failing(fd):
        close(fd)
        if sys._getframe(1).f_code.co_name != "open_image":  # whose failure is one, and is told
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    expected = examine_chain(chain, follow=True, count=True)
    monkeypatch.setattr(os, "close", failing)
    disk = examine_chain(chain, follow=True, count=True)
    monkeypatch.undo()
    assert (disk.problem, disk.as_result()) == (None, expected.as_result())


def test_a_format_that_is_known_is_not_guessed(chain):
    assert examine_chain(chain, follow=True, count=True, image_format="raw").checkpoints == ()
    os.truncate(chain, 2)
    assert examine_chain(chain, follow=True, count=True).problem is None
    disk = examine_chain(chain, follow=True, count=True, image_format="qcow2")
    assert "qcow2" in str(disk.problem)
    assert (disk.layers, disk.is_complete) == ((), False)


def test_an_image_that_goes_stale_is_told_and_no_traceback(chain, monkeypatch):
    def stale(_file):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(OpenImage, "status", stale)
    result = examine_chain(chain, follow=True, count=False).as_result()
    assert (result["images"], result["code"]) == ([], "gone")


def test_what_can_be_healed_is_told(chain, tmp_path):
    plain = qemu.create(tmp_path / "plain", "10M", "-b", chain, "-F", "qcow2")

    def advice():
        (monday,) = [one for one in examine_chain(plain, follow=True, count=False).checkpoints if one.name == "monday"]
        return monday.advice

    assert "makes it valid again" in advice()
    with qemu.opened_for_writing(plain):
        assert "open for writing" in advice()
    write(plain, 0)
    assert "makes it valid again" in advice()


def test_a_vault_that_cannot_be_looked_at_is_the_problem_of_its_chain(chain, monkeypatch):
    real = os.lstat

    def failing(path, **options):
        if "kvmfleet-vault" in os.fsdecode(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", failing)
    disk = examine_chain(chain, follow=True, count=False)
    assert "vault" in disk.problem.subject
    assert "cannot be looked at: Input/output error" in str(disk.problem)
    assert len(disk.layers) == 4
