# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The mark of an overlay: what QEMU makes of an image that has one, and whether it stays."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.header import EXT_END, EXTENSION
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import (
    History,
    Mark,
    history_from,
    mark_bytes,
    mark_from,
    write_base,
    write_leaving,
    write_mark,
)

from .. import qemu

MARK = Mark("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "vda", "vor Ümzug 2024.06")


NEW = History()


def marked(path, mark, *options, history=NEW):
    """Return a new image with this mark."""
    qemu.create(path, "8M", *options)
    with open(path, "r+b") as file:
        write_mark(OpenImage(str(path), file.fileno()), mark, history)
    return str(path)


@pytest.fixture(name="base")
def fixture_base(tmp_path):
    path = qemu.create(tmp_path / "base.qcow2", "8M")
    subprocess.run(["qemu-io", "-c", "write -P 5 1M 1M", path], check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=4096", "cluster_size=2M", "extended_l2=on"])
@pytest.mark.parametrize("mark", [MARK, Mark("u", "v", "s"), MARK._replace(snapshot="1234567"), MARK._replace(vm="")])
def test_qemu_sees_the_same_image_with_a_mark_as_without(tmp_path, base, options, mark):
    plain = qemu.create(tmp_path / "plain.qcow2", "8M", "-b", base, "-F", "qcow2", "-o", options)
    path = marked(tmp_path / "over.qcow2", mark, "-b", base, "-F", "qcow2", "-o", options)
    without, there = qemu.info(plain), qemu.info(path)
    for one in (without, there):
        del one["filename"], one["actual-size"]
        one.pop("children", None)
    assert there == without
    assert qemu.read(path) == qemu.read(plain)._replace(mark=mark, history=History())
    assert mark_bytes(mark) % 8 == 0
    qemu.qemu_img("check", "-q", path)
    qemu.qemu_img("compare", "-q", path, plain)


def extensions_as_libvirt_reads_them(path):
    """Return the extensions by their type; libvirt does not round up the length of one to find the next."""
    with open(path, "rb") as file:
        data = file.read(4096)
    offset, found = 104 if data[100:104] == b"\0\0\0\x68" else 112, {}
    while True:
        kind, length = EXTENSION.unpack_from(data, offset)
        offset += EXTENSION.size
        if kind == EXT_END or offset + length > len(data):
            return found
        found[kind] = data[offset : offset + length]
        offset += length


@pytest.mark.parametrize("name", ["s" * length for length in range(1, 18)])
def test_libvirt_finds_the_backing_format_whatever_the_length_of_the_mark(tmp_path, base, name):
    path = marked(tmp_path / "over.qcow2", MARK._replace(snapshot=name), "-b", base, "-F", "qcow2")
    assert extensions_as_libvirt_reads_them(path)[0xE2792ACA] == b"qcow2"


LIFE = [
    ("qemu-io", "-c", "write -P 3 0 3M", "TOP"),
    ("qemu-img", "bitmap", "--add", "TOP", "a"),
    ("qemu-img", "bitmap", "--add", "-g", "512", "TOP", "b"),
    ("qemu-io", "-c", "write -P 4 5M 1M", "TOP"),
    ("qemu-img", "bitmap", "--merge", "a", "TOP", "b"),
    ("qemu-img", "bitmap", "--remove", "TOP", "b"),
    ("qemu-img", "amend", "-o", "lazy_refcounts=on", "TOP"),
    ("qemu-img", "bitmap", "--remove", "TOP", "a"),
    ("qemu-img", "snapshot", "-c", "internal", "TOP"),
    ("qemu-img", "snapshot", "-a", "internal", "TOP"),
    ("qemu-img", "snapshot", "-d", "internal", "TOP"),
    ("qemu-img", "amend", "-o", "compat=0.10", "TOP"),
    ("qemu-img", "amend", "-o", "compat=1.1", "TOP"),
    ("qemu-img", "rebase", "-u", "-b", "BASE", "-F", "qcow2", "TOP"),
    ("qemu-img", "check", "-r", "all", "TOP"),
    ("qemu-img", "resize", "TOP", "9M"),
    ("qemu-img", "commit", "TOP"),
    ("qemu-img", "rebase", "-b", "", "TOP"),
]


def test_qemu_keeps_the_mark_whatever_it_does_and_gives_it_to_no_other_image(tmp_path, base):
    written = os.stat(base).st_mtime_ns
    path = marked(tmp_path / "over.qcow2", MARK, "-b", base, "-F", "qcow2", history=History(written, 5, 6))
    for command in LIFE:
        words = [{"TOP": path, "BASE": base}.get(word, word) for word in command]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        assert (qemu.read(path).mark, qemu.read(path).history) == (MARK, History(written, 5, 6)), command
        qemu.qemu_img("check", "-q", path)
    assert qemu.read(base).mark is None
    copy = tmp_path / "copy.qcow2"
    qemu.qemu_img("convert", "-O", "qcow2", path, str(copy))
    assert qemu.read(copy).mark is None


def test_one_byte_tells_that_an_image_is_to_go(tmp_path, base):
    path = marked(tmp_path / "over.qcow2", MARK, "-b", base, "-F", "qcow2", history=History(7, 9, 8))
    with open(path, "rb") as file:
        before = file.read()
    for leaving in (True, True, False):
        with open_image(path) as image:
            write_leaving(image, leaving=leaving)
        assert qemu.read(path).history == History(7, 9, 8, leaving)
        with open(path, "rb") as file:
            after = file.read()
        assert sum(one != other for one, other in zip(before, after)) == leaving
        assert len(before) == len(after)
        qemu.qemu_img("check", "-q", path)


def test_what_is_below_now_is_recorded_in_place(tmp_path, base):
    path = marked(tmp_path / "over.qcow2", MARK, "-b", base, "-F", "qcow2", history=History(7, 9, 8, leaving=True))
    size = os.stat(path).st_size
    for _time in range(2):
        with open_image(path) as image, open_image(base) as below:
            write_base(image, below)
        found = os.stat(base)
        assert qemu.read(path).history == History(found.st_mtime_ns, found.st_ino, 8, leaving=True)
        assert qemu.read(path).mark == MARK
        assert os.stat(path).st_size == size
        qemu.qemu_img("check", "-q", path)


def test_of_an_image_without_a_history_nothing_is_written(tmp_path, base):
    plain = qemu.create(tmp_path / "plain.qcow2", "8M", "-b", base, "-F", "qcow2")
    before = os.stat(plain).st_mtime_ns
    with open_image(plain) as image:
        write_leaving(image, leaving=True)
        write_base(image, image)
    assert os.stat(plain).st_mtime_ns == before


def test_the_mark_outlives_a_qemu_that_is_killed(tmp_path, base):
    path = marked(tmp_path / "over.qcow2", MARK, "-b", base, "-F", "qcow2")
    qemu.add_bitmaps(path, [qemu.Bitmap("broken", 65536, True, True)])
    assert qemu.read(path).mark == MARK
    assert json.loads(qemu.qemu_img("check", "--output=json", path)).get("corruptions", 0) == 0


@pytest.mark.parametrize(
    "data, mark",
    [
        (None, None),
        (b"", None),
        (b"a\nb", None),
        (b"a\nb\nc", Mark("a", "b", "c")),
        (b"a\nb\nc\nof a later version", Mark("a", "b", "c")),
        (b"a\nb\n\xff", None),
    ],
)
def test_what_the_extension_holds(data, mark):
    assert mark_from(data) == mark
    assert history_from(data) is None


@pytest.mark.parametrize(
    "lines, history",
    [
        (f"base_written={7:020d}\nbase_inode={9:020d}\nmade={8:020d}\nleaving=0", History(7, 9, 8)),
        (
            f"base_written={7:020d}\nbase_inode={9:020d}\nmade={8:020d}\nleaving=1\nof a later version",
            History(7, 9, 8, leaving=True),
        ),
        (f"base_written={7:020d}\nbase_inode={9:020d}\nmade={8:020d}\nleaving=2", None),
        ("base_written=7\nbase_inode=9\nmade=8\nleaving=1", None),
        ("leaving=1", None),
    ],
)
def test_what_the_lines_behind_the_mark_tell(lines, history):
    data = f"a\nb\nc\n{lines}".encode()
    assert (mark_from(data), history_from(data)) == (Mark("a", "b", "c"), history)
