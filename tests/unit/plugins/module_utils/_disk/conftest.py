# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the tests of making overlays."""

from __future__ import annotations

import pytest

from .. import qemu
from .overlays import BITMAPS


@pytest.fixture(name="disk")
def fixture_disk(tmp_path):
    path = qemu.create(tmp_path / "active.qcow2", "1G")
    qemu.add_bitmaps(path, BITMAPS)
    return path
