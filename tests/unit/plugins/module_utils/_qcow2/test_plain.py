# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guest data where it lies in an image as the guest wrote it: against what qemu-img says and reads."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.header import read_header
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.plain import PlainData

from .. import qemu

MIB = 1 << 20


def write(path, *commands, image_format="qcow2"):
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *words, str(path)], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def opened(path, data_file=None):
    with contextlib.ExitStack() as files:
        file, data = (one and files.enter_context(open_image(str(one))) for one in (path, data_file))
        yield PlainData(file, data)


def pieces_of(path, data_file=None):
    with opened(path, data_file) as plain:
        return {piece.start: plain.data_of(piece) for piece in plain.pieces()}


def read(path, start, length, data_file=None):
    with opened(path, data_file) as plain:
        return plain.read(start, length)


@pytest.mark.parametrize(
    "layout",
    [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=65536",
        "cluster_size=2M",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=2M,extended_l2=on",
    ],
)
@pytest.mark.parametrize("data_file", [None, "data_file_raw=off", "data_file_raw=on"])
def test_it_is_what_qemu_says_lies_there_as_data(tmp_path, layout, data_file):
    base = qemu.create(tmp_path / "base", "64M")
    write(base, "write -P 1 0 64M")
    below, data = ("-b", base, "-F", "qcow2"), None
    if data_file is not None:
        data, layout = tmp_path / "data", f"{layout},data_file={tmp_path / 'data'},{data_file}"
        below = below if data_file == "data_file_raw=off" else ()  # or it could have none
    path = qemu.create(tmp_path / "top", "64M", *below, "-o", layout)
    write(path, "write -P 5 3M 100k", "write -P 6 63M 512", "write -z 4M 4M", "write -P 7 33M 1M", "write -P 8 0 512")
    raw = tmp_path / "raw"
    qemu.qemu_img("convert", "-O", "raw", path, str(raw))
    said = set()
    for one in json.loads(qemu.qemu_img("map", "--output=json", path)):
        if one["depth"] == 0 and one["data"]:
            said |= set(range(one["start"], one["start"] + one["length"], 512))
    found = pieces_of(path, data)
    assert said == {at for start, held in found.items() for at in range(start, start + len(held), 512)}
    with opened(raw) as whole, opened(path, data) as plain:
        for start, held in found.items():
            assert held == whole.read(start, len(held)) == plain.read(start, len(held))
    assert read(path, 33 * MIB + 1000, 5000, data) == b"\7" * 5000
    assert read(path, 4 * MIB, 512, data) in (None, bytes(512))  # zeroes
    if below:
        assert read(path, 31 * MIB, 4 * MIB, data) is None  # some of it is below
    assert read(path, 1 << 50, 512, data) is None


def test_what_lies_otherwise_is_not_found(tmp_path):
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(MIB) * 2)
    write(raw, f"write -P 3 0 {MIB}", image_format="raw")
    compressed = [str(tmp_path / "compressed"), str(tmp_path / "ext")]
    for path, layout in zip(compressed, ("cluster_size=64k", "extended_l2=on")):
        qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", layout, str(raw), path)
    data_file = qemu.create(tmp_path / "over", "2M", "-o", f"data_file={tmp_path / 'data'}")
    write(data_file, "write -P 3 0 1M")
    for path in (*compressed, data_file):
        assert (pieces_of(path) == {}) is (path == data_file)  # that was not given
        assert read(path, 0, 65536) is None
    for path in compressed:
        assert all(start >= MIB for start in pieces_of(path))  # random data is not compressed
    assert (pieces_of(raw), read(raw, 5, 3)) == ({}, b"\3\3\3")


def test_tables_that_lie_outside_the_file_hold_nothing(tmp_path):
    path = qemu.create(tmp_path / "image", "1G")
    write(path, "write -P 3 0 64k")
    with open_image(path) as file:
        l1_offset = read_header(file).l1_offset
    with open(path, "r+b") as file:
        file.seek(l1_offset)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 40))
    assert pieces_of(path) == {}
    assert read(path, 0, 65536) is None


def test_of_many_tables_some_are_read_that_are_spread_over_the_disk(tmp_path):
    """A table of clusters of 4 KiB is of 2 MiB."""
    path = qemu.create(tmp_path / "image.qcow2", "64M", "-o", "cluster_size=4096")
    write(path, *(f"write -P 7 {2 * number}M 4k" for number in range(32)))
    with open_image(path) as file:
        plain = PlainData(file)
        every = [piece.start for piece in plain.pieces()]
        assert every == [number << 21 for number in range(32)]
        assert [piece.start for piece in plain.pieces(8)] == every[::4]
        assert [piece.start for piece in plain.pieces(9)] == every[::4]
        assert [piece.start for piece in plain.pieces(32)] == every
        assert [piece.start for piece in plain.pieces(99)] == every
