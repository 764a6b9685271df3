# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Mutated headers and directories: an image or Refusal, never anything else; where QEMU can read it, the same.

FUZZ_EXAMPLES in the environment sets how many mutations are tried.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .. import qemu

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", qemu.examples(1500)))
INTERESTING = (
    0,
    1,
    2,
    8,
    9,
    21,
    22,
    31,
    32,
    63,
    64,
    104,
    112,
    255,
    512,
    1023,
    1024,
    65535,
    65536,
    1 << 31,
    (1 << 32) - 1,
)
LONG = (*INTERESTING, 1 << 32, 1 << 55, 1 << 56, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

mutation = st.tuples(
    st.sampled_from(("header", "directory")),
    st.integers(0, 400),
    st.one_of(
        st.integers(0, 255).map(lambda value: bytes([value])),
        st.sampled_from(INTERESTING).map(lambda value: struct.pack(">I", value)),
        st.sampled_from(LONG).map(lambda value: struct.pack(">Q", value)),
        st.binary(min_size=1, max_size=24),
    ),
)


@pytest.fixture(name="corpus", scope="module")
def fixture_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    seeds = []
    for index, options in enumerate(("cluster_size=512", "cluster_size=64K", "cluster_size=2M,extended_l2=on")):
        base = qemu.create(folder / f"base{index}", "1M")
        path = qemu.create(folder / f"seed{index}", "8M", "-o", options, "-b", base, "-F", "qcow2")
        qemu.add_bitmaps(path, [Bitmap(f"chk-{i}", 65536 << i, i != 1, i == 0) for i in range(4)])
        seeds.append((path, qemu.directory_of(path)[0]))
    return seeds


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2), st.lists(mutation, min_size=1, max_size=4))
def test_mutated_images_are_read_or_refused(corpus, seed, mutations):
    path, directory = corpus[seed]
    restore = []
    for part, offset, data in mutations:
        place = offset + (directory if part == "directory" else 0)
        with open(path, "rb") as file:
            file.seek(place)
            restore.append((place, file.read(len(data))))
        qemu.patch(path, place, data)
    try:
        compare_with_qemu(path)
    finally:
        for place, data in reversed(restore):
            qemu.patch(path, place, data)


def compare_with_qemu(path):
    """Read the image; when QEMU can open it too, the bitmaps must be the same."""
    try:
        image = qemu.read(path)
    except Refusal as exc:
        refusal = str(exc)
    else:
        refusal = None
    if refusal is not None:
        assert path in refusal
        return
    command = ["qemu-img", "info", "--output=json", path]
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", timeout=60)
    if result.returncode == 0:
        said = json.loads(result.stdout)
        flat, ours = {**said, **said["format-specific"]["data"]}, qemu.as_qemu_says(image)
        # Names that are no valid text, in the eyes of JSON, come mangled out of QEMU.
        ours = {name: value for name, value in ours.items() if not isinstance(value, str) or value.isprintable()}
        assert {name: flat.get(name) for name in ours} == ours
        theirs = said["format-specific"]["data"].get("bitmaps", ())
        assert sorted((b.granularity, b.recording, b.inconsistent) for b in image.bitmaps) == sorted(
            (e["granularity"], "auto" in e["flags"], "in-use" in e["flags"]) for e in theirs
        )
