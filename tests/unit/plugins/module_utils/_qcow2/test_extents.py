# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What an image holds itself: equal to what qemu-img map says, for random images of all kinds."""

from __future__ import annotations

import contextlib
import json
import random
import re
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import is_union, maps_of, united
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.extents import (
    AllocationMap,
    has_allocated_extents,
    has_compressed_clusters,
)

from .. import qemu


def random_layout(dice, folder):
    """Return options of qemu-img create, and whether clusters can be compressed."""
    cluster_size = 1 << dice.choice((9, 12, 14, 16, 16, 18, 21))
    options, kind = (
        [f"cluster_size={cluster_size}"],
        dice.choice(("v2", "v3", "extended", "data file", "raw data file")),
    )
    if kind == "v2":
        options.append("compat=0.10")
    elif kind == "extended":
        options[0] = f"cluster_size={max(cluster_size, 16384)},extended_l2=on"
    elif "data file" in kind:
        raw = "on" if kind.startswith("raw") else "off"
        options.append(f"data_file={folder}/data,data_file_raw={raw}")
    return ",".join(options), "data file" not in kind, kind == "raw data file"


def guest_writes(path, dice, size, compresses):
    """Have a guest write, zero, discard and compress here and there, at the very end too."""
    words = ["write -P 7", "write -P 9", "write -z", "write -z -u", "discard"] + ["write -c -P 5"] * compresses
    cluster_size = qemu.info(path)["cluster-size"]
    command = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
    for number in range(dice.choice((1, 5, 60))):
        word = dice.choice(words)
        unit = cluster_size if "-c" in word else 512
        length = min(dice.choice((1, 3, 20, 300)) * unit, size // unit * unit)
        last = size // unit - length // unit
        offset = (last if number == 0 else dice.randint(0, last)) * unit
        if length:
            command += ["-c", f"{word} {offset} {length}"]
    # Compressed data over other data fails, and so does the status; what counts is what is there in the end.
    subprocess.run([*command, path], check=not compresses, stdout=subprocess.DEVNULL)


def mapped(path):
    """Return (start, length) of what qemu-img map says that the topmost image holds, neighbours joined."""
    said = json.loads(qemu.qemu_img("map", "--output=json", path))
    return joined([(extent["start"], extent["length"]) for extent in said if extent["depth"] == 0])


def extents(pieces, granularity, size):
    """Return (start, length) of the bits in pieces of bitmap data, neighbours joined."""
    found = []
    for offset, data in pieces:
        for run in re.finditer("1+", bin(int.from_bytes(data, "little"))[:1:-1]):
            start, end = ((offset * 8 + number) * granularity for number in run.span())
            assert end - size < granularity  # no bit lies beyond the end of the disk
            found.append((start, min(end, size) - start))
    return joined(found)


def widened(wanted, granularity, size):
    """Return the extents rounded outwards to whole granules, neighbours joined."""
    rounded = []
    for start, length in wanted:
        first = start // granularity * granularity
        rounded.append((first, min(-(-(start + length) // granularity) * granularity, size) - first))
    return joined(rounded)


def joined(wanted):
    """Return the extents with those in one that touch or overlap."""
    found = []
    for start, length in wanted:
        if found and sum(found[-1]) >= start:
            first, before = found.pop()
            found.append((first, max(start + length - first, before)))
        else:
            found.append((start, length))
    return found


@pytest.mark.parametrize("seed", range(qemu.examples(48)))
def test_equal_to_qemu_for_every_kind_of_image(tmp_path, seed):
    dice = random.Random(seed)
    size = dice.randrange(1, 1 << 9) * dice.choice((512, 4096, 65536 + 512, 1 << 20))
    qemu.qemu_img("create", "-q", "-f", "raw", str(tmp_path / "base"), str(size))
    options, compresses, is_raw = random_layout(dice, tmp_path)
    # A raw external data file allows no backing file; then what is not allocated reads as zeroes at depth 0.
    backing = [] if is_raw else ["-b", str(tmp_path / "base"), "-F", "raw"]
    path = qemu.create(tmp_path / "image", size, "-o", options, *backing)
    guest_writes(path, dice, size, compresses)
    with open_image(path) as file:
        allocated = AllocationMap(file)
        own = extents(united([allocated], allocated.granularity, size), allocated.granularity, size)
        if not is_raw:
            assert own == mapped(path)
            assert has_allocated_extents(file) == bool(own)
        for granularity in (512, 65536, 1 << 20, 1 << 31):
            assert extents(united([allocated], granularity, size), granularity, size) == widened(own, granularity, size)
        assert bool(own) <= bool(allocated.most_dirty_bits)


@pytest.mark.parametrize("seed", range(4))
def test_united_in_every_granularity_with_other_images_and_with_bitmaps(tmp_path, seed):
    dice = random.Random(seed)
    size = dice.randrange(1, 1 << 12) * 65536 + 512
    maps = []
    layouts = ("cluster_size=512", "cluster_size=64k", "cluster_size=2M,extended_l2=on", "cluster_size=4k,compat=0.10")
    with contextlib.ExitStack() as stack:
        for number, layout in enumerate(layouts):
            path = qemu.create(tmp_path / f"image{number}", size, "-o", layout)
            bitmaps = [] if "compat" in layout else [Bitmap("x", 1 << dice.randint(9, 31), True, False)]
            qemu.add_bitmaps(path, bitmaps)
            qemu.guest_writes(path, dice, size, dice.choice((1, 10, 40)))
            file = stack.enter_context(open_image(path))
            maps += [AllocationMap(file), *maps_of(file, qemu.read(path)).values()]
        own = [extents(united([one], one.granularity, size), one.granularity, size) for one in maps]
        assert any(own)
        for granularity in (1 << bits for bits in range(9, 32)):
            pieces = list(united(maps, granularity, size))
            wanted = [extent for one in own for extent in widened(one, granularity, size)]
            assert extents(pieces, granularity, size) == joined(sorted(wanted))
            for one, held in zip(maps, own):
                clusters = clusters_of(united([one], granularity, size))
                assert bool(held) <= len(clusters) <= one.most_clusters(granularity, 512)
        assert all(is_union(one, [one], size) for one in maps)
        assert not is_union(maps[0], maps, size)


def clusters_of(pieces):
    """Return the indices of the clusters of 512 bytes that have a bit, in pieces of bitmap data."""
    return {(offset + byte) // 512 for offset, data in pieces for byte, bits in enumerate(data) if bits}


def test_a_table_that_is_asked_for_piece_by_piece(tmp_path):
    size = 1 << 40  # one L2 table of clusters of 2 MiB is about 512 GiB, a piece of 64 KiB of bits about 32 GiB
    path = qemu.create(tmp_path / "image", size, "-o", "cluster_size=2M")
    places = [0, 33 << 30, (512 << 30) - 1, 512 << 30, size - 512]
    writes = [word for place in places for word in ("-c", f"write -z {place // 512 * 512} 512")]
    subprocess.run(["qemu-io", *writes, path], check=True, stdout=subprocess.DEVNULL)
    with open_image(path) as file:
        allocated = AllocationMap(file)
        found = extents(united([allocated], 65536, size), 65536, size)
    assert [start for start, _length in found] == [
        place >> 21 << 21 for place in (0, 33 << 30, (512 << 30) - 1, size - 1)
    ]
    assert found[2][1] == 2 << 21


@pytest.mark.parametrize("offset", [0x00FFFFFFFFFFFE00, 512])
def test_a_table_outside_the_file_is_damage(tmp_path, offset):
    path = qemu.create(tmp_path / "image", "64M")
    subprocess.run(["qemu-io", "-c", "write 0 512", path], check=True, stdout=subprocess.DEVNULL)
    with open(path, "rb") as file:
        file.seek(40)
        (l1,) = struct.unpack(">Q", file.read(8))
    qemu.patch(path, l1, struct.pack(">Q", 1 << 63 | offset))
    with open_image(path) as file, pytest.raises(Refusal, match="L2 table"):
        list(united([AllocationMap(file)], 65536, 64 << 20))


@pytest.mark.parametrize("options", ["cluster_size=65536", "cluster_size=65536,extended_l2=on", "cluster_size=512"])
def test_whether_a_cluster_is_compressed(tmp_path, options):
    path = qemu.create(tmp_path / "image", "16M", "-o", options)
    command = ["qemu-io", "-f", "qcow2", "-c", "write 0 8M", "-c", "write -z 9M 64k", path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open_image(path) as file:
        assert not has_compressed_clusters(file)
    cluster = 512 if options.endswith("=512") else 65536
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -c -P 7 15M {cluster}", path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open_image(path) as file:
        assert has_compressed_clusters(file)
