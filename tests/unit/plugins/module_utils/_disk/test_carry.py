# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What QEMU says that it has stored, and has not, is found by reading back, where bitmaps are healed or merged down."""

from __future__ import annotations

import random

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import carry
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run

from .. import qemu
from .commits import merge
from .healing import MONDAY, SIZE, bits_of, checkpoints, held_bits, lose, overlay, union_of_granules
from .overlays import SETTINGS


def heal(top, _base):
    """Heal the bitmaps of the topmost image."""
    return run(MendBitmaps(), [HealRequest(top)], SETTINGS)


def empty(path):
    """Have all bits of the bitmaps be zero; an entry of a bitmap table that is zero says so."""
    for table in qemu.read(path).bitmap_tables:
        qemu.patch(path, table.offset, bytes(8 * table.entries))


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    """Paths of an overlay by qemu-img, and of its base with a bitmap; a guest has written to both."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.add_bitmaps(base, [MONDAY])
    qemu.guest_writes(base, random.Random(1), SIZE, 5)
    top = overlay(tmp_path / "top.qcow2", base)
    qemu.guest_writes(top, random.Random(2), SIZE, 5)
    return top, base


@pytest.mark.parametrize("lose_some", [lose, empty])
@pytest.mark.parametrize("operate, place", [(heal, 0), (merge, 1)])
@pytest.mark.parametrize("always", [False, True])
def test_what_qemu_did_not_store_is_stored_again_or_told(chain, monkeypatch, lose_some, operate, place, always):
    path = chain[place]
    right = bits_of([chain[1]], "monday") | union_of_granules(held_bits(chain[0], 65536), 65536)
    lies, rewrite = [], carry.rewrite_bitmaps

    def rewritten(monitor, wanted):
        rewrite(monitor, wanted)
        if wanted.file.path == path and (always or not lies):
            lies.append(1)
            lose_some(path)

    with monkeypatch.context() as patch:
        patch.setattr(carry, "rewrite_bitmaps", rewritten)
        codes = [failure.code for failure in operate(*chain).failures]
    assert lies
    assert codes == (["not_verified"] if always else [])
    if always:
        if "monday" in checkpoints(chain[0]):  # by the overlay, which has taken in what the base has
            assert right & ~bits_of(chain, "monday") == 0
        assert not operate(*chain).failures  # from what was kept before
    assert checkpoints(path) == {"monday"}
    assert right & ~bits_of([chain[1], path], "monday") == 0
