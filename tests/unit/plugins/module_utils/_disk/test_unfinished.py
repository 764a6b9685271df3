# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What interrupted commits leave in a chain, and which call completes them."""

from __future__ import annotations

import os

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.unfinished import find_unfinished
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import (
    MARK,
    Content,
    mark_given,
    place_of,
    write_vault,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu

CALL = "kvmfleet.qcow2.qcow2_overlay state=committed"


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    """Have the chain c > b > a, the topmost one first."""
    paths = [qemu.create(tmp_path / "a", "1M")]
    for name in "bc":
        paths.insert(0, qemu.create(tmp_path / name, "1M", "-b", paths[0], "-F", "qcow2"))
    return paths


def keep(base, top):
    """Make the vault of a commit of `top` into `base`."""
    path = place_of(os.path.realpath(base), False, "")
    with open_image(top) as file, open(path, "wb") as vault:
        write_vault(vault.fileno(), Content("0123", file, [], [], [], {}, 1 << 20))
    return path


def mark(path, token="0123"):
    qemu.add_bitmaps(path, [Bitmap(MARK + token, 65536, recording=True, inconsistent=False)])


def found(path):
    return find_unfinished(examine_chain(path, follow=True, count=False).layers)


def test_nothing_is_left_in_a_chain_that_nobody_commits(chain):
    assert found(chain[0]) == []


def test_a_commit_of_the_topmost_image(chain):
    vault = keep(chain[1], chain[0])
    (left,) = found(chain[0])
    assert (left.image, left.stage, left.is_in_work) == (chain[1], "begun", False)
    assert vault in left.what
    assert left.completed_by == f"{CALL} path={chain[0]} backing_file={chain[1]}"
    mark(chain[0])  # of the same commit
    assert found(chain[0]) == [left]


def test_a_commit_of_an_image_in_the_middle_names_the_one_above(chain):
    keep(chain[2], chain[1])
    (left,) = found(chain[0])
    assert left.completed_by == f"{CALL} path={chain[1]} backing_file={chain[2]} above={chain[0]}"


def test_a_commit_whose_overlay_is_not_in_the_chain_any_more(chain):
    keep(chain[2], chain[0])
    (left,) = found(chain[2])
    assert (left.image, left.stage) == (chain[2], "begun")
    assert left.completed_by == f"{CALL} path={chain[0]} backing_file={chain[2]}"


def test_a_commit_of_which_all_is_done_but_the_rest(chain):
    vault = mark_given(keep(chain[2], chain[0]))
    (left,) = found(chain[0])
    assert (left.stage, left.image) == ("merged", chain[2])
    assert "retire" in left.what
    (left,) = found(chain[2])
    assert left.stage == "merged"
    assert vault in left.what


def test_a_mark_without_its_vault(chain):
    mark(chain[0])
    (left,) = found(chain[0])
    assert (left.image, left.stage) == (chain[0], "no_vault")
    assert left.completed_by.startswith(f"{CALL} path={chain[0]}, with the backing_file")
    keep(chain[2], chain[1])
    mark(chain[1], "4567")  # and the vault that is there belongs to neither of the two, or to one
    assert [one.stage for one in found(chain[0])] == ["begun", "no_vault"]


def test_a_file_that_is_no_vault(chain):
    path = place_of(os.path.realpath(chain[2]), False, "")
    with open(path, "wb") as file:
        file.write(b"mine")
    (left,) = found(chain[0])
    assert (left.image, left.stage, left.completed_by) == (chain[2], "unreadable", None)
    assert path in left.what


def test_a_commit_that_is_going_on(chain):
    keep(chain[1], chain[0])
    with open_image(chain[1]) as file:
        locks.take_turn(file, 1.0)
        assert [one.is_in_work for one in found(chain[0])] == [True]
    assert [one.is_in_work for one in found(chain[0])] == [False]


def test_a_base_on_raw(tmp_path):
    base = tmp_path / "raw"
    base.write_bytes(bytes(1 << 20))
    top = qemu.create(tmp_path / "top", "1M", "-b", str(base), "-F", "raw")
    keep(str(base), top)
    (left,) = found(top)
    assert left.completed_by == f"{CALL} path={top} backing_file={base} backing_format=raw"
