# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Guest data where it lies in an image as the guest wrote it: against what qemu-img says and reads."""

from __future__ import annotations

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


def clusters_of(path):
    with open_image(str(path)) as file:
        return dict(PlainData(file).clusters())


def read(path, start, length):
    with open_image(str(path)) as file:
        return PlainData(file).read(start, length)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_it_is_what_qemu_says_lies_there_as_data(tmp_path, cluster_size):
    base = qemu.create(tmp_path / "base", "64M")
    write(base, "write -P 1 0 64M")
    path = qemu.create(tmp_path / "top", "64M", "-b", base, "-F", "qcow2", "-o", f"cluster_size={cluster_size}")
    write(path, "write -P 5 3M 100k", "write -P 6 63M 512", "write -z 4M 4M", "write -P 7 33M 1M")
    raw = tmp_path / "raw"
    qemu.qemu_img("convert", "-O", "raw", path, str(raw))
    said = set()
    for one in json.loads(qemu.qemu_img("map", "--output=json", path)):
        if one["depth"] == 0 and one["data"]:
            said |= set(range(one["start"], one["start"] + one["length"], cluster_size))
    found = clusters_of(path)
    assert said == set(found)
    for start, data in found.items():
        assert data == read(raw, start, cluster_size) == read(path, start, cluster_size)
    assert read(path, 33 * MIB + 1000, 5000) == b"\7" * 5000
    assert read(path, 31 * MIB, 4 * MIB) is None  # some of it is below
    assert read(path, 4 * MIB, 512) is None  # zeroes
    assert read(path, 1 << 50, 512) is None


def test_what_lies_otherwise_is_not_found(tmp_path):
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(MIB) * 2)
    write(raw, f"write -P 3 0 {MIB}", image_format="raw")
    compressed, extended = str(tmp_path / "compressed"), qemu.create(tmp_path / "ext", "2M", "-o", "extended_l2=on")
    qemu.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), compressed)
    write(extended, "write -P 3 0 1M")
    data_file = qemu.create(tmp_path / "over", "2M", "-o", f"data_file={tmp_path / 'data'}")
    write(data_file, "write -P 3 0 1M")
    for path in (compressed, extended, data_file):
        assert (clusters_of(path) == {}) is (path != compressed)
        assert read(path, 0, 65536) is None
    assert all(start >= MIB for start in clusters_of(compressed))  # random data is not compressed
    assert (clusters_of(raw), read(raw, 5, 3)) == ({}, b"\3\3\3")


def test_tables_that_lie_outside_the_file_hold_nothing(tmp_path):
    path = qemu.create(tmp_path / "image", "1G")
    write(path, "write -P 3 0 64k")
    with open_image(path) as file:
        l1_offset = read_header(file).l1_offset
    with open(path, "r+b") as file:
        file.seek(l1_offset)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 40))
    assert clusters_of(path) == {}
    assert read(path, 0, 65536) is None
