# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Merge down where a call, a chain or what was left is odd: no data and no bits are lost."""

from __future__ import annotations

import os

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run

from .. import qemu
from . import commits
from .overlays import SETTINGS


def test_two_merges_of_a_call_have_no_image_in_common(tmp_path):
    """One would go into an image that the other retires."""
    base = qemu.create(tmp_path / "base")
    s1 = commits.overlay(tmp_path / "s1", base)
    s2 = commits.overlay(tmp_path / "s2", s1)
    s3 = commits.overlay(tmp_path / "s3", s2)
    commits.write(s3, "write -P 1 0 1M")
    before = commits.content(s3)
    for pair in (
        (CommitRequest(s2, base, above=s3), CommitRequest(s3, s1)),
        (CommitRequest(s1, base, above=s2), CommitRequest(s3, s2)),
        (CommitRequest(s3, s2), CommitRequest(s2, base, above=s3)),
    ):
        outcome = run(MergeLayers(), pair, SETTINGS)
        assert [one.problems[0].code for one in outcome.verdicts] == ["repeated", "repeated"]
    other = tmp_path / "other name"
    os.link(base, other)
    clone = commits.overlay(tmp_path / "clone", other)
    outcome = run(MergeLayers(), [CommitRequest(s3, base), CommitRequest(clone, str(other))], SETTINGS)
    assert [one.problems[0].code for one in outcome.verdicts] == ["repeated", "repeated"]
    assert commits.content(s3) == before
