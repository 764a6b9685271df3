# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The reader against QEMU, and against images that nobody should have to open."""

from __future__ import annotations

import os
import random
import re
import resource
import struct
import subprocess
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

from .. import qemu

ODD_NAMES = (
    "a,b",
    'quo"te',
    "new\nline",
    "-leading",
    " ",
    "ümläut",
    "日本",
    "🙂",
    "\u202eright",
    "x" * 1023,
    "$HOME",
    "a=b",
)
COMBINATIONS = qemu.examples(120)


def random_options(dice: random.Random) -> dict[str, str]:
    """Return creation options as qemu-img names them, in a combination that QEMU allows."""
    compat = dice.choice(("0.10", "1.1", "1.1", "1.1"))
    options = {"cluster_size": str(1 << dice.randint(9, 21)), "compat": compat}
    if compat == "0.10":
        return options
    options["refcount_bits"] = str(1 << dice.randint(0, 6))
    options["compression_type"] = dice.choice(("zlib", "zstd"))
    options["lazy_refcounts"] = dice.choice(("on", "off"))
    if int(options["cluster_size"]) >= 16384:
        options["extended_l2"] = dice.choice(("on", "off"))
    return options


def random_bitmaps(dice: random.Random) -> list[Bitmap]:
    """Return bitmaps of random names, granularities and flags; most images have few, some have 300."""
    count = dice.choice((0, 1, 2, 3, 5, 8, 300 if dice.random() < 0.1 else 13))
    names = [*dice.sample(ODD_NAMES, min(count, dice.randint(0, 4))), *(f"chk-{i}" for i in range(300))][:count]
    killed = dice.choice((0, 0, 0, min(count, 2)))
    return [
        Bitmap(name, 1 << dice.randint(14, 31), dice.random() < 0.7, inconsistent=index < killed)
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("seed", range(COMBINATIONS))
def test_reader_and_qemu_agree(tmp_path, seed):
    dice = random.Random(seed)
    options, bitmaps = random_options(dice), random_bitmaps(dice)
    arguments = []
    if dice.random() < 0.4:
        backing = qemu.create(tmp_path / "base,odd name.qcow2", "1M")
        arguments = ["-b", backing, "-F", "qcow2"]
    elif dice.random() < 0.4 and options["compat"] == "1.1":
        options["data_file"] = str(tmp_path / "data.raw")
        options["data_file_raw"] = dice.choice(("on", "off"))
    size = dice.choice((0, 512, 1 << 20, (1 << 20) + 512, 64 << 20, 10 << 30))
    if size > int(options["cluster_size"]) ** 2 << 15:
        size = 1 << 20
    if "data_file" in options:  # or QEMU takes a minute to write all L2 tables beforehand
        size = min(size, 64 << 20)
    path = qemu.create(tmp_path / "image", size, "-o", ",".join(f"{k}={v}" for k, v in options.items()), *arguments)
    if options["compat"] == "1.1" and size:
        qemu.add_bitmaps(path, bitmaps)
    said, image = qemu.info(path), qemu.read(path)
    flat = {**said, **said["format-specific"]["data"]}
    ours = qemu.as_qemu_says(image)
    assert {name: flat[name] for name in ours} == ours
    assert {(b.name, b.granularity, b.recording, b.inconsistent) for b in image.bitmaps} == qemu.bitmaps_of(path)
    assert ("backing-filename" in flat, "data-file" in flat) == (image.backing_file is not None, image.has_data_file)


@pytest.fixture(name="image_with_bitmaps")
def fixture_image_with_bitmaps(tmp_path):
    path = qemu.create(tmp_path / "victim.qcow2", "64M", "-b", qemu.create(tmp_path / "base"), "-F", "qcow2")
    qemu.add_bitmaps(path, [Bitmap(f"chk-{i}", 65536, True, False) for i in range(5)])
    return path


def test_bitmaps_that_a_program_has_made_worthless_are_not_trusted(image_with_bitmaps):
    qemu.patch(image_with_bitmaps, 88, struct.pack(">Q", 0))
    image = qemu.read(image_with_bitmaps)
    assert (image.bitmaps, image.lost_bitmaps) == ((), 5)
    assert image.lost_names == {f"chk-{i}" for i in range(5)}
    assert qemu.bitmaps_of(image_with_bitmaps) == set()


@pytest.mark.parametrize("fault", ["overwritten", "outside", "too long", "within a cluster"])
def test_which_bitmaps_were_lost_cannot_be_told_without_their_directory(image_with_bitmaps, fault):
    """Nothing of it is an error, as QEMU does not look at it any more."""
    offset, length = qemu.directory_of(image_with_bitmaps)
    if fault == "overwritten":
        qemu.patch(image_with_bitmaps, offset, bytes(length))
    with open(image_with_bitmaps, "rb") as file:
        place = file.read(4096).index(struct.pack(">II", 0x23852875, 24)) + 16
    if fault == "outside":
        qemu.patch(image_with_bitmaps, place + 8, struct.pack(">Q", (1 << 64) - 65536))
    if fault == "within a cluster":
        with open(image_with_bitmaps, "rb") as file:
            file.seek(offset)
            moved = file.read(length)
        qemu.patch(image_with_bitmaps, offset + 512, moved)
        qemu.patch(image_with_bitmaps, place + 8, struct.pack(">Q", offset + 512))
    if fault == "too long":
        qemu.patch(image_with_bitmaps, place, struct.pack(">Q", 1 << 40))
    qemu.patch(image_with_bitmaps, 88, struct.pack(">Q", 0))
    image = qemu.read(image_with_bitmaps)
    assert (image.bitmaps, image.lost_bitmaps, image.lost_names) == ((), 5, None)


def test_the_repair_of_qemu_has_an_image_forget_what_it_has_lost(image_with_bitmaps):
    """As the advice says."""
    qemu.patch(image_with_bitmaps, 88, struct.pack(">Q", 0))
    qemu.qemu_img("check", "-q", "-r", "all", image_with_bitmaps)
    image = qemu.read(image_with_bitmaps)
    assert (image.bitmaps, image.lost_bitmaps, image.lost_names) == ((), 0, None)


def test_an_image_that_was_not_closed_is_dirty(tmp_path):
    path = qemu.create(tmp_path / "crashed.qcow2", "1M", "-o", "lazy_refcounts=on")
    subprocess.run(["qemu-io", "-c", "write 0 64k", "-c", "abort", path], check=False, stdout=subprocess.DEVNULL)
    assert qemu.read(path).dirty
    assert qemu.info(path)["dirty-flag"]


def test_an_entry_too_many_in_the_header_is_refused(image_with_bitmaps):
    with open(image_with_bitmaps, "rb") as file:
        place = file.read(4096).index(struct.pack(">II", 0x23852875, 24)) + 8
    qemu.patch(image_with_bitmaps, place, struct.pack(">I", 6))
    with pytest.raises(Refusal, match="has 5 entries, its header says 6"):
        qemu.read(image_with_bitmaps)


HEADER_DAMAGE = {
    "magic": (0, b"QFI\0", "is not a qcow2 image"),
    "version 4": (4, struct.pack(">I", 4), "version 4"),
    "tiny clusters": (20, struct.pack(">I", 8), "cluster_bits is 8"),
    "huge clusters": (20, struct.pack(">I", 0xFFFFFFFF), "cluster_bits is 4294967295"),
    "unknown feature": (72, struct.pack(">Q", 1 << 40), "features that are not known"),
    "short header": (100, struct.pack(">I", 8), "header_length is 8"),
    "long header": (100, struct.pack(">I", 0xFFFFFFFF), "header_length"),
    "refcounts": (96, struct.pack(">I", 7), "refcount_order is 7"),
    "encryption": (32, struct.pack(">I", 9), "crypt_method is 9"),
    "compression": (104, b"\x09", "compression_type is 9"),
    "compression without its bit": (104, b"\x01", "contradict"),
    "backing name outside": (8, struct.pack(">Q", 1 << 60), "outside the header cluster"),
    "backing name too long": (16, struct.pack(">I", 0xFFFFFFFF), "4294967295 bytes long"),
    "extension too long": (116, struct.pack(">I", 0xFFFFFFF0), "reaches out of the header cluster"),
}


@pytest.mark.parametrize("damage", HEADER_DAMAGE)
def test_damaged_headers_are_refused_by_name_and_rule(image_with_bitmaps, damage):
    offset, data, expected = HEADER_DAMAGE[damage]
    qemu.patch(image_with_bitmaps, offset, data)
    with pytest.raises(Refusal, match=expected) as caught:
        qemu.read(image_with_bitmaps)
    assert image_with_bitmaps in str(caught.value)


def test_an_extension_that_occurs_twice_is_read_as_qemu_reads_it(image_with_bitmaps):
    with open(image_with_bitmaps, "rb") as file:
        head = file.read(4096)
    place = head.index(bytes.fromhex("e2792aca"))
    twice = bytes.fromhex("e2792aca") + struct.pack(">I", 3) + b"vhd".ljust(8, b"\0")
    offset = struct.unpack_from(">Q", head, 8)[0]
    qemu.patch(image_with_bitmaps, place, twice + head[place : offset + 1000])
    qemu.patch(image_with_bitmaps, 8, struct.pack(">Q", offset + len(twice)))
    assert qemu.read(image_with_bitmaps).backing_format == "qcow2"
    assert qemu.info(image_with_bitmaps)["backing-filename-format"] == "qcow2"
    qemu.qemu_img("info", "--backing-chain", image_with_bitmaps)


def test_a_file_that_ends_within_an_extension_is_read_as_qemu_reads_it(tmp_path):
    path = qemu.create(tmp_path / "empty", 0, "-u", "-b", "/srv/base", "-F", "raw")
    place = struct.unpack_from(">Q", (tmp_path / "empty").read_bytes(), 8)[0]
    qemu.patch(path, 36, struct.pack(">I", 0))  # no L1 table, which would be lost
    os.truncate(path, place - 24)
    image = qemu.read(path)
    assert (image.backing_file, image.backing_format) == (None, None)
    assert "backing-filename" not in qemu.info(path)


U32, U64 = struct.Struct(">I"), struct.Struct(">Q")
# Of an image without backing file: edits, the words of the refusal, and of the way out.
REFUSED_BY_QEMU = {
    "no refcount table": ([(56, U32.pack(0))], "it has no refcount table", "check -r all"),
    "a huge refcount table": ([(56, U32.pack(0x7FFFFFFF))], "its refcount table of", "restore it"),
    "a refcount table of 8 MiB and more": ([(56, U32.pack(129))], "its refcount table of 129", "restore it"),
    "a crooked refcount table": ([(48, U64.pack(0x10001))], "its refcount table of", "restore it"),
    "too many snapshots": ([(60, U32.pack(0xFFFFFFFF))], "its snapshot table of", "restore it"),
    "a crooked snapshot table": ([(60, U32.pack(1)), (64, U64.pack(0x50001))], "its snapshot table of", "restore it"),
    "a crooked snapshot table of no entries": ([(64, U64.pack(0x50001))], "its snapshot table of 0", "restore it"),
    "too much extra data of a snapshot": (
        [(60, U32.pack(1)), (64, U64.pack(0x30000)), (0x30000 + 36, U32.pack(1025))],
        "1025 bytes of extra data",
        "check -r all",
    ),
    "a raw data file that is none": ([(88, U64.pack(2))], "its external data file is raw", "restore it"),
    "an extension that is too large": ([(8, U64.pack(116)), (112, U32.pack(0x12345678))], "reaches out", "restore it"),
    "an unknown crypt method": ([(32, U32.pack(3))], "crypt_method is 3", "restore it"),
    "LUKS without its header": ([(32, U32.pack(2))], "does not say where its LUKS header is", "restore it"),
    "a LUKS header without LUKS": ([(112, U32.pack(0x0537BE77))], "but not that it is encrypted", "restore it"),
    "a LUKS header of another size": (
        [(32, U32.pack(2)), (112, U32.pack(0x0537BE77))],
        "bytes long instead of 16",
        "restore it",
    ),
    "a bitmaps extension of another size": ([(112, U32.pack(0x23852875))], "instead of 24", "restore it"),
    "a crooked L1 table": ([(40, U64.pack(0x30001))], "its L1 table of", "restore it"),
    "a large L1 table": ([(36, U32.pack(4194305))], "its L1 table of", "restore it"),
    "a small L1 table": ([(36, U32.pack(0))], "its L1 table of", "restore it"),
    "a short header": ([(100, U32.pack(103))], "header_length is 103", "restore it"),
    "an unknown compression": ([(104, b"\2")], "compression_type is 2", "restore it"),
}


@pytest.mark.parametrize("what", REFUSED_BY_QEMU)
def test_what_qemu_refuses_about_a_header_is_refused_with_advice_that_fits(tmp_path, what):
    edits, expected, advice = REFUSED_BY_QEMU[what]
    path = qemu.create(tmp_path / "image", "8M")
    qemu.read(path)
    for offset, data in edits:
        qemu.patch(path, offset, data)
    with pytest.raises(Refusal, match=expected) as caught:
        qemu.read(path)
    assert (caught.value.code, advice in caught.value.remedy) == ("damaged", True)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", path], check=False, capture_output=True).returncode == 1


@pytest.mark.parametrize("what", [name for name, (_edits, _why, advice) in REFUSED_BY_QEMU.items() if "-r" in advice])
def test_the_repair_that_is_told_repairs(tmp_path, what):
    path = qemu.create(tmp_path / "image", "8M")
    for offset, data in REFUSED_BY_QEMU[what][0]:
        qemu.patch(path, offset, data)
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", path], check=False, capture_output=True)
    qemu.read(path)


@pytest.mark.parametrize("name", ["vhd", "VMDK", "QCOW2", "auto", "nbd"])
def test_a_backing_format_that_qemu_does_not_know_is_refused_with_the_way_out(tmp_path, name):
    base = qemu.create(tmp_path / "base", "1M")
    path = qemu.create(tmp_path / "image", "1M", "-b", base, "-F", "qcow2")
    with open(path, "rb") as file:
        place = file.read(4096).index(bytes.fromhex("e2792aca"))
    qemu.patch(path, place + 4, struct.pack(">I", len(name)) + name.encode().ljust(8, b"\0"))
    with pytest.raises(Refusal, match=f"records '{name}' as the format"):
        qemu.read(path)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", path], check=False, capture_output=True).returncode == 1
    qemu.qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", path)
    assert qemu.read(path).backing_format == "qcow2"


ENTRY_DAMAGE = {
    "no table": (0, struct.pack(">Q", 0)),
    "table in the header": (0, struct.pack(">Q", 512)),
    "empty table": (8, struct.pack(">I", 0)),
    "huge table": (8, struct.pack(">I", 0xFFFFFFFF)),
    "unknown flag": (12, struct.pack(">I", 1 << 4)),
    "other type": (16, b"\x02"),
    "granularity too fine": (17, b"\x08"),
    "granularity too coarse": (17, b"\xff"),
    "no name": (18, struct.pack(">H", 0)),
    "name too long": (18, struct.pack(">H", 0xFFFF)),
    "extra data": (20, struct.pack(">I", 8)),
}


@pytest.mark.parametrize("damage", ENTRY_DAMAGE)
def test_damaged_directory_entries_are_refused_as_qemu_refuses_them(image_with_bitmaps, damage):
    offset, data = ENTRY_DAMAGE[damage]
    directory, _length = qemu.directory_of(image_with_bitmaps)
    qemu.patch(image_with_bitmaps, directory + offset, data)
    with pytest.raises(Refusal, match="bitmap directory|name") as told:
        qemu.read(image_with_bitmaps)
    if damage != "table in the header":  # QEMU 7.2 looks at the alignment only
        with pytest.raises(subprocess.CalledProcessError):
            qemu.info(image_with_bitmaps)
    way_out = re.search("printf .* conv=notrunc", told.value.remedy)
    assert way_out
    subprocess.run(["sh", "-c", way_out[0]], check=True)
    qemu.qemu_img("check", "-q", "-r", "all", image_with_bitmaps)
    assert not qemu.why_not_opened(image_with_bitmaps)
    assert not qemu.read(image_with_bitmaps).bitmaps


def test_a_name_that_occurs_twice_is_refused(image_with_bitmaps):
    directory, _length = qemu.directory_of(image_with_bitmaps)
    with open(image_with_bitmaps, "rb") as file:
        file.seek(directory)
        entries = file.read(64)
    qemu.patch(image_with_bitmaps, directory + 32, entries[24:32] if entries[24:29] != entries[56:61] else b"")
    qemu.patch(image_with_bitmaps, directory + 56, entries[24:32])
    with pytest.raises(Refusal, match="has no name, or that of another one"):
        qemu.read(image_with_bitmaps)


def test_a_name_with_a_nul_byte_ends_there_as_it_does_for_qemu(image_with_bitmaps):
    directory, _length = qemu.directory_of(image_with_bitmaps)
    qemu.patch(image_with_bitmaps, directory + 27, b"\0")
    names = {bitmap.name for bitmap in qemu.read(image_with_bitmaps).bitmaps}
    assert "chk" in names
    assert names == {name for name, *_rest in qemu.bitmaps_of(image_with_bitmaps)}


def test_a_directory_that_ends_before_the_padding_of_its_last_entry_is_refused_as_qemu_refuses_it(image_with_bitmaps):
    with open(image_with_bitmaps, "rb") as file:
        place = file.read(4096).index(struct.pack(">II", 0x23852875, 24)) + 8
    qemu.patch(image_with_bitmaps, place + 8, struct.pack(">Q", qemu.directory_of(image_with_bitmaps)[1] - 1))
    with pytest.raises(Refusal, match="ends within an entry"):
        qemu.read(image_with_bitmaps)
    with pytest.raises(subprocess.CalledProcessError):
        qemu.info(image_with_bitmaps)


def test_overlapping_bitmap_tables_are_refused(image_with_bitmaps):
    directory, _length = qemu.directory_of(image_with_bitmaps)
    with open(image_with_bitmaps, "rb") as file:
        file.seek(directory + 32)
        second_table = file.read(8)
    qemu.patch(image_with_bitmaps, directory, second_table)
    with pytest.raises(Refusal, match="overlaps"):
        qemu.read(image_with_bitmaps)


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 104, 111, 150, 300, 65536, 200000])
def test_truncated_images_are_refused(image_with_bitmaps, length):
    os.truncate(image_with_bitmaps, length)
    with pytest.raises(Refusal):
        qemu.read(image_with_bitmaps)


def hostile_directory(path, count, name_size):
    """Write an image of 2 MiB clusters with a directory of so many entries, made by hand."""
    entry_size = (24 + name_size + 7) // 8 * 8
    tables = (2 << 20) * (2 + (count * entry_size >> 21) + 1)
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0, 0, 21, 1 << 20, 0, 1, 0, 0, 1, 0, 0)
    header += struct.pack(">QQQII", 0, 0, 1, 4, 112) + bytes(8)
    header += struct.pack(">IIIIQQ", 0x23852875, 24, count, 0, count * entry_size, 2 << 20)
    with open(path, "wb") as file:
        file.write(header)
        file.seek(2 << 20)
        for index in range(count):
            name = f"{index:0{name_size}d}".encode()
            entry = struct.pack(">QIIBBHI", tables + (index << 21), 1, 2, 1, 16, name_size, 0) + name
            file.write(entry.ljust(entry_size, b"\0"))
        file.truncate(tables + (count << 21))


@pytest.mark.parametrize("count, name_size", [(65535, 5), (65535, 1000)])
def test_the_largest_directories_are_read_in_bounded_time_and_memory(tmp_path, count, name_size):
    path = tmp_path / "hostile.qcow2"
    hostile_directory(path, count, name_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    image = qemu.read(path)
    assert len(image.bitmaps) == count
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024  # KiB


def test_a_directory_larger_than_the_limit_is_refused(image_with_bitmaps):
    with open(image_with_bitmaps, "rb") as file:
        place = file.read(4096).index(struct.pack(">II", 0x23852875, 24)) + 8
    qemu.patch(image_with_bitmaps, place + 8, struct.pack(">Q", 1 << 40))
    os.truncate(image_with_bitmaps, 2 << 40)
    with pytest.raises(Refusal, match="impossible length"):
        qemu.read(image_with_bitmaps)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_image_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = "/dev/zero"
    with pytest.raises(Refusal, match="neither a file nor a block device"):
        open_image(str(path))


def test_reading_needs_no_more_than_the_descriptor(image_with_bitmaps):
    file = open_image(image_with_bitmaps)
    os.unlink(image_with_bitmaps)
    try:
        assert len(read_image(file).bitmaps) == 5
    finally:
        file.close()


def test_an_l1_table_beyond_any_file_is_damage(tmp_path):
    path = qemu.create(tmp_path / "image", "1M")
    qemu.patch(path, 40, struct.pack(">Q", 1 << 63))
    with pytest.raises(Refusal, match="its L1 table of .* does not fit"):
        qemu.read(path)
