# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs of a module, each asked of runner.py, and how they ended."""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import typing as t

import kinds

SECONDS_TO_ANSWER = 45.0
# By these codes, and by one word, it is judged what a run says has become of files.
LEFT_OUT = "group_failed"  # an overlay that has not failed itself
LEFT_IN_PLACE = "unknown_outcome"  # nobody knows whether the domain uses its overlays
NOT_REMOVED = "not_removed"
LEFT_OVER = "is left over"  # a warning about a temporary file, from a killed run


def left_in_place(domain: t.Mapping[str, t.Any]) -> bool:
    """Whether what a run says of a domain is that its overlays were left where they are."""
    return domain.get("code") == LEFT_IN_PLACE


class Run(t.NamedTuple):
    """How a run of the module ended."""

    status: int  # as subprocess.Popen.returncode
    seconds: float
    killed: bool  # from outside
    alone: bool  # no process of it is left
    result: dict[str, t.Any] | None  # what it printed
    stderr: str
    memory: int = 0  # KiB that the largest of its processes had at most

    @property
    def domains(self) -> list[dict[str, t.Any]]:
        """What it says of each domain, if it is about domains."""
        return list((self.result or {}).get("domains", ()))

    def domain(self, name: str) -> dict[str, t.Any]:
        """What it says of this domain; nothing, if it does not come to it."""
        return next((domain for domain in self.domains if domain["name"] == name), {})

    @property
    def states(self) -> list[str]:
        """What it says of each overlay, or of each disk whose bitmaps it is about."""
        return [overlay["state"] for overlay in self._overlays]

    @property
    def messages(self) -> list[str]:
        """Why overlays failed, each that is not only left out because of another; or else their domain, or the run."""
        said = [one["msg"] for one in self._overlays if "msg" in one and one["code"] != LEFT_OUT]
        said = said or [domain["msg"] for domain in self.domains if "msg" in domain]
        return said if said or self._overlays or not self.message else [self.message]

    @property
    def _overlays(self) -> list[dict[str, t.Any]]:
        """What it says, domain by domain if it is about domains."""
        of_domains = [overlay for domain in self.domains for overlay in domain.get("overlays", ())]
        result = self.result or {}
        return [*result.get("overlays", ()), *result.get("disks", ()), *of_domains]

    @property
    def message(self) -> str:
        """Why it failed, in its words."""
        return str((self.result or {}).get("msg", ""))

    def says_not_removed(self, path: pathlib.Path | None = None) -> bool:
        """Whether it says that this file, or any if none is given, could not be removed again."""
        said = [overlay["msg"] for overlay in self._overlays if overlay.get("code") == NOT_REMOVED]
        return any(path is None or f"{path}: " in message for message in said)

    @property
    def said_left_over(self) -> list[str]:
        """Its warnings of what a killed run has left, one for each file."""
        warnings = map(str, (self.result or {}).get("warnings", ()))
        return [warning for warning in warnings if LEFT_OVER in warning]


def build_library(folder: pathlib.Path) -> pathlib.Path:
    """Compile what stands between the programs and the C library."""
    library = folder / "faults.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(kinds.HERE / "faults.c"), "-ldl"], check=True
    )
    return library


class Runner:
    """The process from which runs are forked."""

    def __init__(self, library: pathlib.Path, papers: pathlib.Path) -> None:
        self._papers = papers
        environment = {**os.environ, "PYTHONPATH": str(kinds.COLLECTION.parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.update(LD_PRELOAD=str(library), LC_ALL="C.UTF-8")
        self._process = subprocess.Popen(
            [sys.executable, str(kinds.HERE / "runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # or who ends this program by a signal to its group breaks rounds under way
        )

    def start(
        self,
        module: str,
        arguments: dict[str, t.Any],
        environment: dict[str, str],
        kill: dict[str, t.Any] | None = None,
        memory: int | None = None,
    ) -> None:
        """Begin a run of a module, with so many bytes of memory; answer() has what becomes of it."""
        request = {"module": module, "arguments": arguments, "environment": environment, "kill": kill, "memory": memory}
        papers = {name: str(self._papers / name) for name in ("stdout", "stderr")}
        self.say(json.dumps({**request, **papers}))

    def say(self, line: str = "") -> None:
        """Give the process a line: a run, or that the one goes on that has stopped."""
        t.cast("t.IO[bytes]", self._process.stdin).write(line.encode() + b"\n")

    def answer(self) -> Run | None:
        """Return how the run ended, or None when it has only stopped itself."""
        stdout = t.cast("t.IO[bytes]", self._process.stdout)
        ready = select.select([stdout], [], [], SECONDS_TO_ANSWER)[0]
        if not ready:
            raise TimeoutError(f"a run gave no sign for {SECONDS_TO_ANSWER:.0f} s")
        line = stdout.readline()
        if not line:
            raise ChildProcessError(f"the runner has ended with {self._process.wait()}")
        said = json.loads(line)
        if said.pop("stopped", False):
            return None
        text = (self._papers / "stdout").read_text(encoding="utf-8")
        stderr = (self._papers / "stderr").read_text(encoding="utf-8", errors="replace")
        return Run(**said, result=_json(text), stderr=stderr)

    def pid(self) -> int:
        """Return the process of the run that has stopped itself."""
        runner = self._process.pid
        return int(pathlib.Path(f"/proc/{runner}/task/{runner}/children").read_text(encoding="ascii").split()[0])

    def ended(self) -> Run:
        """Return how the run ended, which does not stop itself any more."""
        run = self.answer()
        assert run is not None
        return run

    def resume(self) -> Run:
        """Let the run go on that has stopped, and return how it ended."""
        self.say()
        return self.ended()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _json(text: str) -> dict[str, t.Any] | None:
    """Return the result of a module, None when there is none that is whole."""
    try:
        return t.cast("dict[str, t.Any]", json.loads(text))
    except ValueError:
        return None
