# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rooms of the code: what may import what."""

from __future__ import annotations

import ast
import pathlib

import pytest

PLUGINS = pathlib.Path(__file__).parents[2] / "plugins"
UTILS = PLUGINS / "module_utils"
# From the lowest upwards. A room may import from those that are named for it, and from itself.
BELOW = {
    "_base": set(),
    "_qcow2": {"_base"},
    "_qemu": {"_base", "_qcow2"},
    "_disk": {"_base", "_qcow2", "_qemu"},
    "_libvirt": {"_base"},
    "_domain": {"_base", "_qcow2", "_disk", "_libvirt"},
    "_module": {"_base"},
    "_options": {"_base", "_disk"},
    "_verified": {"_base", "_disk", "_module"},
}
FILES = sorted(UTILS.rglob("*.py"))


def room_of(path):
    """Return the room of a file, which is a folder or, at the top, the file itself."""
    return path.relative_to(UTILS).parts[0].removesuffix(".py")


def imports_of(path):
    """Return the files of module_utils that this one imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found |= {folder / alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()} or {folder}
    return {file.with_suffix(".py") for file in found}


def test_there_are_rooms_and_imports_to_look_at():
    assert {room_of(path) for path in FILES} == set(BELOW)
    assert UTILS / "_qemu/locks.py" in imports_of(UTILS / "_qemu/settled.py")
    assert UTILS / "_base/errors.py" in imports_of(UTILS / "_disk/session.py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_import_runs_upward(path):
    own = room_of(path)
    for imported in imports_of(path):
        assert imported.exists(), imported
        assert room_of(imported) in BELOW[own] | {own}, f"{path} imports {imported}"


def test_no_imports_run_in_a_circle():
    graph = {path: imports_of(path) for path in FILES}
    done = set()

    def visit(path, way):
        assert path not in way, " > ".join(map(str, [*way, path]))
        if path not in done:
            for imported in graph[path]:
                visit(imported, [*way, path])
            done.add(path)

    for path in FILES:
        visit(path, [])


def test_the_machinery_knows_no_operation():
    """A second operation must not need an if here: neither file names one, or a state that only one has."""
    for name in ("session.py", "run.py"):
        path = UTILS / "_disk" / name
        assert not {file.stem for file in imports_of(path)} & {"build", "overlay", "observe"}
        text = path.read_text(encoding="utf-8")
        assert "CREATED" not in text
        assert "PRESENT" not in text


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_files_say_so(path):
    assert "PRIVATE to this collection" in path.read_text(encoding="utf-8")
