# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the tests of making overlays."""

from __future__ import annotations

import os

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import publish

from .. import qemu
from .overlays import BITMAPS


@pytest.fixture(name="disk")
def fixture_disk(tmp_path):
    path = qemu.create(tmp_path / "active.qcow2", "1G")
    qemu.add_bitmaps(path, BITMAPS)
    return path


@pytest.fixture(name="squashed")
def fixture_squashed(monkeypatch):
    """Have the storage give all that we make to another user."""
    make = publish._new_file

    def made(*args):
        name, file = make(*args)
        os.fchown(file.fd, 4242, 4242)
        return name, file

    if os.geteuid() == 0:
        monkeypatch.setattr(publish, "_new_file", made)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
