# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Have a module work on the host by itself, and show how far it is.

A merge may take hours. As a child of its connection the module would end with it, so it runs as Ansible's asynchronous
jobs do, and is asked now and then. If the connection or the controller is lost it goes on to its end. The next run
waits for it: see take_turn() in _qemu/locks.py.
"""

from __future__ import annotations

import contextlib
import posixpath
import time
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ._progress import PROGRESS, line_of, merges

_QUIET = "overlay_progress"  # the variable that turns the lines off
_LIMIT = 90 * 24 * 3600  # seconds, after which Ansible ends a job
_PAUSES = (0.2, 0.4, 0.8, 1.6)  # seconds between looks at first, since most merges are short
_PAUSE = 5.0  # seconds between further ones
_PATIENCE = 600.0  # seconds for which a host that cannot be reached any more is tried again
_DATA = {"data", "outdata"}  # what Ansible has in place of a result that it cannot read
_OF_THE_JOB = (
    "ansible_job_id",
    "results_file",
    "started",
    "finished",
    "stdout",
    "stderr",
    "stdout_lines",
    "stderr_lines",
)


class Job(t.NamedTuple):
    """A job, as Ansible knows it."""

    name: str
    folder: str  # in which its results are


class Look(t.NamedTuple):
    """What a host tells of a job."""

    is_alive: bool
    merges: list[dict[str, t.Any]]  # as in the files of PROGRESS


class Caller(ActionBase):  # type: ignore[misc]  # Ansible has no types
    """Calls modules. A merge is followed to its end."""

    def call(
        self, module: str, arguments: dict[str, t.Any], task_vars: dict[str, t.Any], *, tells: bool = True
    ) -> dict[str, t.Any]:
        """Return what a module returns. `tells`: whether to show how far a merge is."""
        if arguments.get("state") != "committed" or self._task.check_mode:
            return t.cast("dict[str, t.Any]", self._execute_module(module, arguments, task_vars=task_vars))
        begun = self._begin(module, arguments, task_vars)
        job = begun.get("ansible_job_id")
        if job is None:  # it could not even be started
            return begun
        # Where Ansible looks by itself is not where it wrote, if the home of the user is not the one of the process.
        ended = self._follow(Job(str(job), posixpath.dirname(begun["results_file"])), task_vars, tells=tells)
        return {key: value for key, value in ended.items() if key not in _OF_THE_JOB}

    def _begin(self, module: str, arguments: dict[str, t.Any], task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Start the module as a job; return what Ansible says of that."""
        self._task.async_val = _LIMIT
        try:
            return t.cast(
                "dict[str, t.Any]", self._execute_module(module, arguments, task_vars=task_vars, wrap_async=True)
            )
        finally:
            self._task.async_val = 0  # or Ansible would wait for it, in its own way, without a word

    def _follow(self, job: Job, task_vars: dict[str, t.Any], *, tells: bool) -> dict[str, t.Any]:
        """Return the result of the job once it has ended."""
        host = str(task_vars.get("inventory_hostname", "localhost"))
        looks, was_alive, lost_since = 0, True, 0.0
        while True:
            time.sleep(_PAUSES[looks] if looks < len(_PAUSES) else _PAUSE)
            looks += 1
            try:
                status = self._ask(job, "status", task_vars)
                if status.get("finished"):
                    with contextlib.suppress(AnsibleConnectionFailure):  # or what it tells would be lost
                        self._ask(job, "cleanup", task_vars)
                    return _without_result(status) if _DATA & status.keys() else status
                look = self._look(job)
            except AnsibleConnectionFailure as exc:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() > lost_since + _PATIENCE:
                    raise AnsibleConnectionFailure(
                        f"{exc} The merge goes on on the host; run this again to wait for it."
                    ) from exc
                if tells:
                    _show(f"{host}: cannot be reached; the merge goes on there, and is asked for again")
                self._reconnect()
                continue
            lost_since = 0.0
            if not look.is_alive and not was_alive:
                return _without_result({})
            was_alive = look.is_alive
            if tells and looks > len(_PAUSES):
                for merge in look.merges:
                    _show(f"{host}: {line_of(merge)}")

    def _ask(self, job: Job, mode: str, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Return what Ansible knows of the job, or have it forget the job."""
        arguments = {"jid": job.name, "mode": mode, "_async_dir": job.folder}
        answer = self._execute_module("ansible.legacy.async_status", module_args=arguments, task_vars=task_vars)
        return t.cast("dict[str, t.Any]", answer)

    def _look(self, job: Job) -> Look:
        """Return whether the job has a process, and how far the merges of the host are."""
        # What Ansible has named its process; the pattern does not match itself, in the command line of this shell.
        name = job.name.split(".")[0]
        alive = f"grep -qsa '[{name[0]}]{name[1:]}' /proc/[0-9]*/cmdline && echo alive"
        answer = self._low_level_execute_command(f"{alive}; cat {PROGRESS}/*.json 2>/dev/null; true")
        lines = answer["stdout"].splitlines()
        return Look("alive" in lines, list(merges(lines)))

    def _reconnect(self) -> None:
        reset = getattr(self._connection, "reset", None)
        if reset is not None:
            with contextlib.suppress(AnsibleConnectionFailure):  # the next look tells
                reset()


class Following(Caller):
    """Call the module of the same name."""

    _supports_async = True

    def run(self, tmp: None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return what the module returns."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        if self._task.async_val:
            wrap_async = not self._connection.has_native_async
            return {**result, **self._execute_module(task_vars=task_vars, wrap_async=wrap_async)}
        given = task_vars or {}
        tells = boolean(self._templar.template(given.get(_QUIET, True)), strict=False)
        return {**result, **self.call(self._task.action, self._task.args, given, tells=tells)}


def _without_result(status: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """Return the result for a module that has ended without one, from what Ansible's job has of its words."""
    said = {"module_stdout": str(status.get("data", "")), "module_stderr": str(status.get("stderr", ""))}
    reason = next(iter(said["module_stderr"].strip().splitlines()[-1:]), "it was killed")
    msg = f"The module ended on the host without a result: {reason}. Run this again: the next run completes it."
    return {"failed": True, "changed": True, "msg": msg, **said}


def _show(line: str) -> None:
    Display().display(line)
