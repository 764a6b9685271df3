# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Names: absence is what the kernel says of it, and nothing else."""

from __future__ import annotations

import pathlib

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import is_link, is_there, real_path


@pytest.fixture(name="loop")
def _loop(tmp_path: pathlib.Path) -> pathlib.Path:
    """A symlink to itself, below which the kernel can look at nothing."""
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "loop"


def test_there(tmp_path: pathlib.Path) -> None:
    """A file, a folder, and a symlink that leads nowhere are there."""
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "file").touch()
    assert [name for name in ("dangling", "file", ".") if not is_there(str(tmp_path / name))] == []
    assert [name for name in ("dangling", "file", ".") if is_link(str(tmp_path / name))] == ["dangling"]


@pytest.mark.parametrize("name", ["gone", "gone/x", "file/x", "x" * 300, "nul\0"])
def test_absent(tmp_path: pathlib.Path, name: str) -> None:
    """What has no such name, and what cannot have one, is absent."""
    (tmp_path / "file").touch()
    assert not is_there(str(tmp_path / name))
    assert not is_link(str(tmp_path / name))


def test_no_error_is_absence(loop: pathlib.Path) -> None:
    """What cannot be looked at is refused, with its name."""
    for look in (is_there, is_link):
        with pytest.raises(Refusal, match="cannot be looked at: Too many levels") as told:
            look(str(loop / "x"))
        assert told.value.subject == str(loop / "x")


def test_real_path(tmp_path: pathlib.Path, loop: pathlib.Path) -> None:
    """Symlinks are followed to a file that may not be there; one that cannot be followed is refused."""
    (tmp_path / "link").symlink_to("folder/gone")
    assert real_path(str(tmp_path / "link")) == str(tmp_path.resolve() / "folder" / "gone")
    with pytest.raises(Refusal, match="ends in a symlink that cannot be followed"):
        real_path(str(loop))
