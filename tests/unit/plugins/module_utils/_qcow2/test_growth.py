# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much a base grows: never more than was said before, in merges by the real QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.growth import (
    most_growth,
    most_growth_raw,
    used_bytes,
)

from .. import qemu

CLUSTER = 65536
MIB = 1 << 20


def qemu_io(path, *words, file_format="qcow2"):
    """Have a guest write; `words` are commands of qemu-io."""
    command = ["qemu-io", "-f", file_format, "-d", "unmap", *(part for word in words for part in ("-c", word))]
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)


def over(path, below, size, options="cluster_size=64k", file_format="qcow2"):
    """Make an overlay and return its path."""
    return qemu.create(path, size, "-o", options, "-b", str(below), "-F", file_format)


def merge(base, layers, file_format="qcow2"):
    """Merge the layers, topmost first, into the base by the job that takes zeroes over as such."""
    with qemu.storage_daemon() as monitor:
        for number, path in enumerate((base, *reversed(layers))):
            file = {"driver": "file", "filename": str(path), "discard": "unmap"}
            node = {"driver": "qcow2" if number else file_format, "node-name": f"n{number}", "file": file}
            also = {"read-only": True, "backing": f"n{number - 1}"} if number else {"discard": "unmap"}
            monitor.command("blockdev-add", {**node, **also})
        top = f"n{len(layers)}"
        monitor.command("block-commit", {"job-id": "j", "device": top, "base-node": "n0", "auto-dismiss": False})
        job = {"status": "created"}
        while job["status"] != "concluded":
            before = job["status"]
            (job,) = monitor.command("query-jobs")
            if job["status"] == "ready" != before:
                monitor.command("job-complete", {"id": "j"})
            time.sleep(0.002)
        assert "error" not in job, job
        for number in range(len(layers), -1, -1):
            monitor.command("blockdev-del", {"node-name": f"n{number}"})


def growth(base, *layers):
    """Merge the layers, topmost first; return what was said of the growth, and what the file's length has grown by."""
    with contextlib.ExitStack() as stack:
        file, *files = (stack.enter_context(open_image(str(path))) for path in (base, *layers))
        said = most_growth(file, files, 0)
        before = file.length()
        merge(base, layers)
        qemu.qemu_img("check", "-q", str(base))
        return said, file.length() - before


def is_exact(base, *layers):
    """Merge; whether the growth is as was said, but for the holes that the file has beside those of whole clusters."""
    status = os.stat(base)
    said, was = growth(base, *layers)
    return was <= said <= was + max(0, status.st_size - status.st_blocks * 512)


def random_layout(dice, *more):
    """Return options of qemu-img create for an image of a random kind."""
    cluster_size = 1 << dice.choice((9, 12, 12, 14, 16, 16, 17, 20, 21))
    kind = dice.choice(("compat=0.10", "compat=1.1", "compat=1.1", "extended_l2=on"))
    least = 16384 if "extended" in kind else 0
    return ",".join([f"cluster_size={max(cluster_size, least)}", kind, *(more if "0.10" not in kind else ())])


def random_writes(path, dice, size, times):
    """Have a guest write, zero and discard here and there."""
    words = []
    for number in range(times):
        length = min(dice.choice((512, 4096, 65536, 70144, MIB, 5 * MIB)), size)
        offset = size - length if number == 0 else dice.randrange((size - length) // 512 + 1) * 512
        offset -= offset % dice.choice((512, 65536))
        words.append(f"{dice.choice(('write -P 7', 'write -P 8', 'write -z', 'discard'))} {offset} {length}")
    qemu_io(path, *words)


@pytest.mark.parametrize("seed", range(qemu.examples(24)))
def test_never_too_small_for_random_images(tmp_path, seed):
    dice = random.Random(seed)
    size = dice.choice((64 * MIB, 300 * MIB, 100 * MIB + 512 * dice.randrange(1, 5000)))
    layout = random_layout(dice, f"refcount_bits={1 << dice.randrange(7)}")
    below = ["-b", qemu.create(tmp_path / "deep", dice.choice((size, size * 2))), "-F", "qcow2"] * dice.randrange(2)
    base = qemu.create(tmp_path / "base", size, "-o", layout, *below)
    random_writes(base, dice, size, dice.choice((0, 3, 20)))
    if dice.random() < 0.3 and not layout.endswith("refcount_bits=1"):
        qemu.qemu_img("snapshot", "-c", "before", base)
    layers = []
    for number in range(dice.choice((1, 1, 2))):
        if "0.10" not in layout:  # QEMU grows none with a snapshot, and zeroes nothing in it
            size += dice.choice((0, 0, dice.randrange(100000))) * 512
        layers.insert(0, over(tmp_path / f"layer{number}", (layers or [base])[0], size, random_layout(dice)))
        random_writes(layers[0], dice, size, dice.choice((1, 5, 40)))
    with open_image(base) as file:
        said = json.loads(qemu.qemu_img("check", "--output=json", base))
        assert used_bytes(file) == said["image-end-offset"]
    said, was = growth(base, *layers)
    assert was <= said


# Options of the base, of the layer; what a guest has written in the base, in the layer. Then the growth is as was said,
# to the byte; one term of the sum each, beside clusters of data and L2 tables.
EXACT = {
    "data and L2 tables": ("cluster_size=64k", "cluster_size=64k", ["write 2G 1M"], ["write 0 40M"]),
    "the base's own data": ("cluster_size=64k", "cluster_size=64k", ["write 0 8M"], ["write 4M 40M"]),
    "zeroes with a place of their own": (
        "cluster_size=64k",
        "cluster_size=64k",
        ["write 0 8M", "write -z 0 8M"],
        ["write 0 8M"],
    ),
    "zeroes without a place": ("cluster_size=64k", "cluster_size=64k", ["write -z -u 0 8M"], ["write 0 8M"]),
    "refcount blocks": ("cluster_size=4k,refcount_bits=64", "cluster_size=64k", [], ["write 0 20M"]),
    "large clusters over small ones": ("cluster_size=4k", "cluster_size=2M", ["write 6M 1M"], ["write 5M 12k"]),
    "small clusters over large ones": (
        "cluster_size=1M",
        "cluster_size=4k",
        ["write 64M 1M"],
        ["write 5M 4k", "write 9M 8k"],
    ),
    "clusters smaller than what the job copies": (
        "cluster_size=512",
        "cluster_size=512",
        ["write 64M 512"],
        ["write 1M 512"],
    ),
    "zeroes": ("cluster_size=64k", "cluster_size=64k", ["write 0 1M"], ["write -z 0 40M", "write -z 3G 64k"]),
    "zeroes of small clusters": ("cluster_size=64k", "cluster_size=4k", [], ["write -z 0 1M", "write -z 10M 60k"]),
    "zeroes of subclusters": (
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        [],
        ["write -z 0 1M", "write -z 10M 4k"],
    ),
    "zeroes in extended entries": (
        "cluster_size=64k,extended_l2=on",
        "cluster_size=64k",
        [],
        ["write -z 0 1M", "write 10M 4k"],
    ),
    "compressed data": ("cluster_size=64k", "cluster_size=64k", [], ["write -c -P 7 0 64k", "write -c -P 7 5M 64k"]),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_without_holes_in_the_base(tmp_path, case):
    base_options, options, below, above = EXACT[case]
    base = qemu.create(tmp_path / "base", "4G", "-o", base_options)
    qemu_io(base, "write 3G 64k", *below)
    layer = over(tmp_path / "layer", base, "4G", options)
    qemu_io(layer, *above)
    assert is_exact(base, layer)


def test_clusters_for_bitmaps_count_as_data_does(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "cluster_size=4k,refcount_bits=64")  # a block counts 512
    with open_image(base) as file, open_image(over(tmp_path / "layer", base, "64M")) as layer:
        rest = used_bytes(file) - file.length()
        assert most_growth(file, [layer], 0) == rest
        assert most_growth(file, [layer], 7) == rest + 7 * 4096
        assert most_growth(file, [layer], 600) == rest + 601 * 4096


def test_clusters_and_tables_that_a_snapshot_shares(tmp_path):
    base = qemu.create(tmp_path / "base", "4G")
    qemu_io(base, "write 0 8M", "write 2G 64k")
    qemu.qemu_img("snapshot", "-c", "before", base)
    qemu_io(base, "write 0 4M")  # the first table is its own again, with half of the data
    layer = over(tmp_path / "layer", base, "4G")
    qemu_io(layer, "write 0 8M", "write -z 2G 64k")
    said, was = growth(base, layer)
    assert was == 65 * CLUSTER <= said < 68 * CLUSTER  # the new L1 tables are holes in the main


def test_zeroes_are_data_in_a_base_that_can_have_no_zero_clusters(tmp_path):
    deep = qemu.create(tmp_path / "deep", "64M")
    base = over(tmp_path / "base", deep, "64M", "compat=0.10")
    qemu_io(base, "write 32M 64k")
    layer = over(tmp_path / "layer", base, "64M")
    qemu_io(layer, "write -z 0 8M")
    assert is_exact(base, layer)


def test_compressed_clusters_of_the_base_are_not_overwritten(tmp_path):
    base = qemu.create(tmp_path / "base", "4G")
    qemu_io(base, *(f"write -c -P 7 {number * CLUSTER} {CLUSTER}" for number in range(32)))
    layer = over(tmp_path / "layer", base, "4G")
    qemu_io(layer, "write 0 2M")
    said, was = growth(base, layer)
    assert 30 * CLUSTER < was <= said <= 33 * CLUSTER


def test_data_of_a_base_with_a_data_file_lies_elsewhere(tmp_path):
    base = qemu.create(tmp_path / "base", "4G", "-o", f"data_file={tmp_path}/data")
    qemu_io(base, "write 0 64k")
    layer = over(tmp_path / "layer", base, "4G")
    qemu_io(layer, "write 0 8M", "write 2G 8M")
    assert growth(base, layer) == (CLUSTER, CLUSTER)


@pytest.mark.parametrize("refcount_bits", [32, 64])
def test_longer_refcount_tables(tmp_path, refcount_bits):
    base = qemu.create(tmp_path / "base", "64M", "-o", f"cluster_size=512,refcount_bits={refcount_bits}")
    before = table_clusters(base)
    layer = over(tmp_path / "layer", base, "64M")
    qemu_io(layer, "write 0 20M")
    said, was = growth(base, layer)
    assert table_clusters(base) > before
    assert was <= said <= was * 1.3


def table_clusters(path):
    """Return the length of the refcount table."""
    with open(path, "rb") as file:
        return struct.unpack(">I", file.read(60)[56:])[0]


def test_a_longer_refcount_table_far_behind_the_last_cluster(tmp_path):
    base = qemu.create(tmp_path / "base", "1000M", "-o", "cluster_size=4k,refcount_bits=64,preallocation=metadata")
    qemu.qemu_img("resize", "-q", "-f", "qcow2", base, "2G")
    with open_image(base) as file:
        left = (512 * 512 * 4096 - used_bytes(file)) // 4096  # clusters that the table of one cluster still counts
    left -= left // 512 + 16  # for L2 tables and refcount blocks
    qemu_io(base, f"write 1000M {left * 4096}")
    assert table_clusters(base) == 1
    layer = over(tmp_path / "layer", base, "2G")
    qemu_io(layer, "write 1900M 128k")
    said, was = growth(base, layer)
    assert table_clusters(base) > 1
    assert 500 * 4096 < was <= said


def test_clusters_of_a_layer_that_reach_beyond_the_end_of_the_disk(tmp_path):
    size = 64 * MIB + 512
    base = qemu.create(tmp_path / "base", size, "-o", "cluster_size=512")
    qemu_io(base, "write 0 512")
    layer = over(tmp_path / "layer", base, size, "cluster_size=2M")
    qemu_io(layer, "write 64M 512")
    assert growth(base, layer) == (1024, 1024)


def test_a_longer_l1_table(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "cluster_size=4k")
    qemu_io(base, "write 0 4k")
    layer = over(tmp_path / "layer", base, "8G")
    qemu_io(layer, "write 8589869056 64k")
    said, was = growth(base, layer)
    assert said == (8 + 1 + 16) * 4096
    assert was == said - 4096  # the old table is taken for data


def test_what_is_below_the_base_is_zeroed_where_the_disk_grows(tmp_path):
    deep = qemu.create(tmp_path / "deep", "100M")
    qemu_io(deep, "write 0 100M")
    base = over(tmp_path / "base", deep, 64 * MIB + 512, "cluster_size=4k")
    qemu_io(base, "write 0 4k")
    layer = over(tmp_path / "layer", base, "100M")
    qemu_io(layer, "write 0 4k")
    said, was = growth(base, layer)
    assert was == (18 + 1 + 15) * 4096 <= said <= was + 4096


def test_what_a_shorter_layer_lacks_is_zeroed(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "cluster_size=4k")
    qemu_io(base, "write 0 4k")
    lower = over(tmp_path / "lower", base, 64 * MIB + 512)
    upper = over(tmp_path / "upper", lower, "100M")
    qemu_io(upper, "write 0 4k")
    said, was = growth(base, upper, lower)
    assert (18 + 1 + 15) * 4096 <= was <= said <= was + 4096


@pytest.mark.parametrize("cluster_size, most", [(CLUSTER, 1), (4 * CLUSTER, 96), (32 * CLUSTER, 96)])
def test_zeroes_at_an_end_of_the_disk_within_a_cluster(tmp_path, cluster_size, most):
    size = 256 * MIB - CLUSTER - 512
    base = qemu.create(tmp_path / "base", size, "-o", f"cluster_size={cluster_size}")
    qemu_io(base, "write 0 64k")
    layer = over(tmp_path / "layer", base, size, f"cluster_size={cluster_size}")
    qemu_io(layer, f"write -z {250 * MIB} {size - 250 * MIB}")
    said, was = growth(base, layer)
    assert 0 < was <= said
    assert said <= most * CLUSTER


def test_zeroes_that_the_job_looks_at_from_the_middle_of_a_cluster(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "cluster_size=2M")
    lower = over(tmp_path / "lower", base, "64M")
    qemu_io(lower, "write 1M 1M")
    upper = over(tmp_path / "upper", lower, "64M", "cluster_size=2M")
    qemu_io(upper, "write -z 2M 20M")
    said, was = growth(base, upper, lower)
    assert 8 * MIB < was <= said


def test_zeroes_below_a_layer_with_short_tables(tmp_path):
    base = qemu.create(tmp_path / "base", "64M")
    lower = over(tmp_path / "lower", base, "64M")
    qemu_io(lower, "write -z 0 8M")
    upper = over(tmp_path / "upper", lower, "64M", "cluster_size=512")
    qemu_io(upper, "write 32M 512")
    said, was = growth(base, upper, lower)
    assert 8 * MIB < was <= said


def test_zero_clusters_with_places_that_do_not_follow_each_other(tmp_path):
    base = qemu.create(tmp_path / "base", "64M")
    layer = over(tmp_path / "layer", base, "64M", "cluster_size=4k")
    qemu_io(layer, *(f"write {number * 4096} 4k" for number in range(512, -1, -1)), "write -z 0 2M")
    said, was = growth(base, layer)
    assert MIB < was <= said


def test_bit_0_is_no_zero_flag_in_version_2(tmp_path):
    base = qemu.create(tmp_path / "base", "64M")
    qemu_io(base, "write 32M 64k")
    layer = over(tmp_path / "layer", base, "64M", "compat=0.10")
    qemu_io(layer, "write 0 64k")
    with open(layer, "rb") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & (1 << 63) - 1
        file.seek(l2)
        (entry,) = struct.unpack(">Q", file.read(8))
    qemu.patch(layer, l2, struct.pack(">Q", entry | 1))
    with open_image(base) as file, open_image(layer) as above:
        assert most_growth(file, [above], 0) == CLUSTER


def test_holes_of_the_base_are_filled(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "preallocation=metadata")
    layer = over(tmp_path / "layer", base, "64M")
    qemu_io(layer, "write -P 7 0 16M")
    before = os.stat(base).st_blocks
    said, was = growth(base, layer)
    assert was == 0
    assert 16 * MIB <= (os.stat(base).st_blocks - before) * 512 <= said + CLUSTER


def test_refcounts_that_wait_for_a_repair(tmp_path):
    base = qemu.create(tmp_path / "base", "64M", "-o", "lazy_refcounts=on")
    command = ["qemu-io", "-c", "write 0 16M", "-c", "flush", "-c", "sigraise 9", base]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == -9
    assert qemu.info(base)["dirty-flag"]
    layer = over(tmp_path / "layer", base, "64M")
    qemu_io(layer, "write 32M 1M")
    said, was = growth(base, layer)
    assert MIB <= was <= said <= 2 * MIB


@pytest.mark.parametrize("offset", [1 << 40, 512])
def test_a_refcount_block_outside_the_file_is_damage(tmp_path, offset):
    base = qemu.create(tmp_path / "base", "64M")
    qemu.patch(base, CLUSTER, struct.pack(">Q", offset))
    with open_image(base) as file, pytest.raises(Refusal, match="refcount block"):
        used_bytes(file)


def raw_growth(base, *layers):
    """Merge the layers, topmost first; return what was said of the growth, and how much more space the file takes."""
    with contextlib.ExitStack() as stack:
        file, *files = (stack.enter_context(open_image(str(path))) for path in (base, *layers))
        said, before = most_growth_raw(file, files), os.stat(base).st_blocks
        merge(base, layers, "raw")
        os.sync()
        return said, (os.stat(base).st_blocks - before) * 512


@pytest.mark.parametrize("size", [64 * MIB, 80 * MIB + 512])
def test_data_in_holes_of_a_raw_base(tmp_path, size):
    base = tmp_path / "base"
    qemu.qemu_img("create", "-q", "-f", "raw", str(base), "64M")
    qemu_io(base, "write 8M 8M", file_format="raw")
    layer = over(tmp_path / "layer", base, size, file_format="raw")
    qemu_io(layer, "write 4M 8M", f"write {size - 2 * MIB} 2M", "write -z 20M 8M", "write -z 9M 1M")
    said, was = raw_growth(base, layer)
    assert was <= said <= 6 * MIB + CLUSTER


def test_a_raw_base_whose_space_is_reserved(tmp_path):
    base = tmp_path / "base"
    with open(base, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    layer = over(tmp_path / "layer", base, "64M", file_format="raw")
    qemu_io(layer, "write 4M 8M")
    said, was = raw_growth(base, layer)
    assert was == said == 0
