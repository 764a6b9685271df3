# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains on real images."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import MAX_LAYERS, has_protocol, walk_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

from .. import qemu
from .._disk.overlays import SETTINGS


def read_chain(top, image_format):
    """Return the layers from the open image down to its base."""
    return tuple(layer for layer, _file in walk_chain(top, image_format, read_top=read_image))


def chain_of(path):
    """Return the chain of an image as (file name, format) from the top."""
    file = open_image(str(path))
    try:
        return [(os.path.basename(layer.path), layer.format) for layer in read_chain(file, "qcow2")]
    finally:
        file.close()


def rebase(path, backing_file, backing_format="qcow2"):
    """Record another backing file, whatever it is."""
    qemu.qemu_img("rebase", "-u", "-b", str(backing_file), "-F", backing_format, str(path))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("json:{}", True),
        ("nbd://h/x", True),
        ("a:b", True),
        ("./a:b", False),
        ("/a:b", False),
        ("a/b:c", False),
        ("a", False),
    ],
)
def test_protocols_are_told_from_files(name, expected):
    assert has_protocol(name) == expected


def test_relative_absolute_and_symlinked_backing_files_are_followed(tmp_path):
    (tmp_path / "low").mkdir()
    (tmp_path / "low" / "base.raw").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to("low")
    qemu.create(tmp_path / "low" / "mid", "1M", "-b", "base.raw", "-F", "raw")
    top = qemu.create(tmp_path / "top", "1M", "-b", "link/mid", "-F", "qcow2")
    assert chain_of(top) == [("top", "qcow2"), ("mid", "qcow2"), ("base.raw", "raw")]


def test_a_raw_size_is_rounded_up_to_sectors(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(1000))
    with open_image(str(tmp_path / "raw")) as file:
        assert read_chain(file, "raw")[0].virtual_size == 1024


def test_a_format_that_is_not_recorded_is_looked_up_for_reading(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    mid = qemu.create(tmp_path / "mid", "1M", "-b", base, "-F", "qcow2")
    top = qemu.create(tmp_path / "top", "1M", "-b", mid, "-F", "qcow2")
    with open(top, "rb") as file:
        place = file.read(4096).index(bytes.fromhex("e2792aca"))
    qemu.patch(top, place, bytes.fromhex("12345678"))  # a kind of extension that nobody knows
    assert chain_of(top) == [("top", "qcow2"), ("mid", None), ("base", "qcow2")]


def test_a_missing_image_is_named_with_the_one_that_needs_it(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    mid = qemu.create(tmp_path / "mid", "1M", "-b", base, "-F", "qcow2")
    top = qemu.create(tmp_path / "top", "1M", "-b", mid, "-F", "qcow2")
    os.unlink(base)
    with pytest.raises(Refusal, match=f"{base}: does not exist.*backing file of {mid}"):
        chain_of(top)


@pytest.mark.parametrize("loop", ["itself", "its overlay", "hard link"])
def test_a_loop_is_found(tmp_path, loop):
    base = qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")
    os.link(top, tmp_path / "other name")
    rebase(base, {"itself": base, "its overlay": top, "hard link": tmp_path / "other name"}[loop])
    with pytest.raises(Refusal, match="is a loop"):
        chain_of(top)


def test_a_chain_has_an_end(tmp_path):
    qemu.create(tmp_path / "0", "1M")
    for number in range(1, MAX_LAYERS + 1):
        qemu.create(tmp_path / str(number), "1M", "-u", "-b", str(number - 1), "-F", "qcow2")
    assert len(chain_of(tmp_path / str(MAX_LAYERS - 1))) == MAX_LAYERS
    with pytest.raises(Refusal, match="more than 200 images"):
        chain_of(tmp_path / str(MAX_LAYERS))
    # What the refusal says to do.
    names = [str(tmp_path / number) for number in ("1", "0", "2")]
    assert run(MergeLayers(), [CommitRequest(*names[:2], above=names[2])], SETTINGS).failures == []
    assert len(chain_of(tmp_path / str(MAX_LAYERS))) == MAX_LAYERS


@pytest.mark.parametrize("name", ["json:{}", "nbd://127.0.0.1/x", "foo:bar"])
def test_protocols_in_the_chain_are_refused_without_being_opened(tmp_path, name):
    top = qemu.create(tmp_path / "top", "1M", "-u", "-b", name, "-F", "raw")
    with pytest.raises(Refusal, match="is a protocol"):
        chain_of(top)


@pytest.mark.parametrize("place, opens", [("real", False), ("link", True)])
def test_a_relative_backing_file_lies_beside_the_name_that_is_used(tmp_path, place, opens):
    for folder in ("real", "link"):
        (tmp_path / folder).mkdir()
    qemu.create(tmp_path / place / "base", "1M")
    qemu.create(tmp_path / "real" / "top", "1M", "-u", "-b", "base", "-F", "qcow2")
    (tmp_path / "link" / "top").symlink_to(tmp_path / "real" / "top")
    command = ["qemu-img", "info", "--backing-chain", str(tmp_path / "link" / "top")]
    assert (subprocess.run(command, check=False, capture_output=True).returncode == 0) == opens
    if opens:
        assert len(chain_of(tmp_path / "link" / "top")) == 2
    else:
        with pytest.raises(Refusal, match="does not exist"):
            chain_of(tmp_path / "link" / "top")


def test_a_missing_data_file_is_named(tmp_path):
    data = tmp_path / "data"
    top = qemu.create(tmp_path / "top", "1M", "-o", f"data_file={data}")
    assert len(chain_of(top)) == 1
    data.unlink()
    with pytest.raises(Refusal, match=f"external data file {data} does not exist"):
        chain_of(top)


@pytest.mark.parametrize("what", ["fifo", "folder", "symlink to a fifo"])
def test_a_data_file_that_is_no_file_is_refused_without_being_opened(tmp_path, what):
    data = tmp_path / "data"
    top = qemu.create(tmp_path / "top", "1M", "-o", f"data_file={data}")
    data.unlink()
    if what == "folder":
        data.mkdir()
    elif what == "fifo":
        os.mkfifo(data)
    else:
        os.mkfifo(tmp_path / "fifo")
        data.symlink_to("fifo")
    with pytest.raises(Refusal, match=f"external data file {data} is neither a file nor a block device"):
        chain_of(top)


def test_padding_of_the_backing_format_does_not_end_the_chain(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-b", base, "-F", "qcow2")
    with open(top, "rb") as file:
        place = file.read(4096).index(bytes.fromhex("e2792aca"))
    qemu.patch(top, place + 7, b"\6")
    assert chain_of(top) == [("top", "qcow2"), ("base", "qcow2")]


def with_backing_name(path, name):
    """Record a name of a backing file as it is, byte by byte."""
    with open(path, "rb") as file:
        offset, length = struct.unpack_from(">QI", file.read(20), 8)
    qemu.patch(path, offset, name.ljust(length, b"\0"))
    qemu.patch(path, 16, struct.pack(">I", len(name)))


@pytest.mark.parametrize("prefix, suffix", [("", "\0"), ("", "\0more"), ("file:", ""), ("file://", "\0")])
def test_a_name_that_qemu_takes_for_the_same_file_is_followed(tmp_path, prefix, suffix):
    base = qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-u", "-b", base + "x" * 20, "-F", "qcow2")
    with_backing_name(top, f"{prefix}{base}{suffix}".encode())
    assert chain_of(top) == [("top", "qcow2"), ("base", "qcow2")]
    qemu.qemu_img("info", "--backing-chain", top)


def test_a_file_that_qemu_looks_for_where_it_was_started_is_refused_with_the_reason(tmp_path, monkeypatch):
    qemu.create(tmp_path / "base", "1M")
    top = qemu.create(tmp_path / "top", "1M", "-u", "-b", "file:base", "-F", "qcow2")
    with pytest.raises(Refusal, match="looked for in the folder that QEMU was started in"):
        chain_of(top)
    for folder, status in ((tmp_path, 0), ("/", 1)):
        monkeypatch.chdir(folder)
        assert (
            subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == status
        )


@pytest.mark.parametrize("recorded", ["qcow2", "qed", "vdi", "host_device"])
def test_another_format_than_the_recorded_one_is_refused_as_qemu_refuses_it(tmp_path, recorded):
    base = tmp_path / "base"
    qemu.qemu_img("create", "-q", "-f", "qcow", str(base), "1M")
    top = qemu.create(tmp_path / "top", "1M", "-u", "-b", str(base), "-F", recorded)
    with pytest.raises(Refusal, match="old format qcow" if recorded == "qcow2" else f"recorded as {recorded}, but it"):
        chain_of(top)
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == 1
    rebase(top, base, "qcow")  # the way out that is told
    assert chain_of(top) == [("top", "qcow2"), ("base", "qcow")]
    assert subprocess.run(["qemu-io", "-r", "-c", "quit", top], check=False, capture_output=True).returncode == 0


def test_bitmap_directories_further_down_are_not_read(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    qemu.add_bitmaps(base, [Bitmap("b", 65536, True, False)])
    qemu.patch(base, qemu.directory_of(base)[0], bytes(24))
    assert len(chain_of(qemu.create(tmp_path / "top", "1M", "-u", "-b", base, "-F", "qcow2"))) == 2
