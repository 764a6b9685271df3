# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs of either module, and what is wrong with one whatever it was for."""

from __future__ import annotations

import typing as t

import lab
import runs

LONGEST = 20.0  # seconds that a run may take, whatever the image says
MOST_MEMORY = 512 << 10  # KiB that a run may take for a mutant, whatever the image says


def run(ground: lab.Lab, module: str, memory: int | None = None, **arguments: t.Any) -> runs.Run:
    """Run a module to its end."""
    if any(isinstance(value, str) and not _is_text(value) for value in arguments.values()):
        arguments["_ansible_no_log"] = True  # or Ansible would end on the name before the module begins
    ground.runner.start(module, arguments, ground.environment(), None, memory)
    return ground.runner.ended()


def _is_text(value: str) -> bool:
    """Whether there are only bytes in it that are UTF-8, and no NUL."""
    return "\0" not in value and value == value.encode("utf-8", "replace").decode()


def run_wrong(ended: runs.Run, names: t.Sequence[t.Any], most: int = MOST_MEMORY) -> list[str]:
    """Return what is wrong with a run whatever it was for; a message must have one of the names in it."""
    if ended.result is None or "Traceback" in ended.stderr:
        return [f"ended with {ended.status} and no result: {ended.stderr[-2000:]}"]
    wrong = []
    if ended.status and not any(in_message(name) in ended.message for name in names):
        wrong.append(f"the message names no file: {ended.message!r}")
    if ended.seconds > LONGEST or ended.memory > most:
        wrong.append(f"took {ended.seconds:.1f} s and {ended.memory} KiB")
    return wrong if ended.alone else [*wrong, "left a process behind"]


def in_message(name: t.Any) -> str:
    """Return a name as a message can have it."""
    return str(name).encode("utf-8", "backslashreplace").decode()
