# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What is done on a host for the role: which module is called when, and what is kept of it for the report.

A module looks, makes, looks again and examines the chains in one call (see _verified.py). More calls are made only for
all or none of disks and domains, and after a call that has told nothing of what it did.
"""

from __future__ import annotations

import typing as t

from ..filter.host_report import make_host_report
from ._asked import DISKS, DOMAINS, Asked
from ._report.host import OK

Result = t.Mapping[str, t.Any]  # what a module returned, or what Ansible says in its place
BEFORE, RUN, AFTER = 0, 1, 2
_KINDS = {DISKS: "disks", DOMAINS: "domains"}  # what the report calls them
_INFO = "qcow2_info"


class NoResultError(Exception):
    """A call that came to no result."""

    def __init__(self, why: str, *, had_begun: bool = False) -> None:
        super().__init__(why)
        self.had_begun = had_begun  # so that it may have gone on to its end


class Call(t.Protocol):
    """Call a module with its options, in check mode if it is to look only; NoResultError if that comes to no result."""

    def __call__(self, module: str, options: Result, *, looks: bool) -> Result:
        """Return what it returned."""


class HostRun:
    """What is done on a host. Of each call that was made the result is kept."""

    def __init__(self, asked: Asked, call: Call, waiting_for: t.Sequence[str], *, check_mode: bool) -> None:
        self._asked, self._call = asked, call
        self._waiting_for, self._check_mode = waiting_for, check_mode
        self._results: dict[str, list[Result]] = {module: [{}, {}, {}] for module in _KINDS}
        self._chains: Result = {}
        self._problem = asked.mistake

    @property
    def results(self) -> list[Result]:
        """Return what the calls returned, in the order in which they were made."""
        return [results[step] for step in (BEFORE, RUN, AFTER) for results in self._results.values() if results[step]]

    @property
    def runs(self) -> list[Result]:
        """Return what the calls returned that were no mere looks, or would not have been without check mode."""
        return [results[RUN] for results in self._results.values() if results[RUN]]

    def unreachable(self, result: Result) -> None:
        """Keep that the host could not be reached before anything was done."""
        for module in self._asked.options:
            self._results[module][RUN] = result

    def report(self) -> dict[str, t.Any]:
        """Return the report. Whatever is wrong with it, what the modules have returned is in it."""
        try:
            return self._report(check_mode=self._check_mode)
        except Exception as exc:  # a bug, after the work was done
            why = (
                f"The report could not be made: {type(exc).__name__}: {exc}. What the modules returned is in `results`"
            )
            bare = make_host_report({"wanted": self._asked.state, "problem": f"{why}."}, self._check_mode)
            warnings = [str(one) for result in self.results for one in result.get("warnings") or ()]
            return {**bare, "warnings": list(dict.fromkeys(warnings)), "results": self.results}

    def run(self) -> None:
        """Do what is asked for."""
        if self._problem or self._waiting_for:
            return
        try:
            if self._may_begin():
                self._make()
        except NoResultError as exc:
            self._problem = str(exc)
        try:
            self._look_afterwards()
        except NoResultError as exc:
            self._problem = self._problem or str(exc)

    def _may_begin(self) -> bool:
        """Look at both first if it is to be all or none of disks and domains, which a call alone cannot know."""
        if not self._asked.all_or_none or self._check_mode or len(self._asked.options) < len(_KINDS):
            return True
        for module in self._asked.options:
            self._results[module][BEFORE] = self._called(module, BEFORE)
            if _is_unreachable(self._results[module][BEFORE]):
                break
        return t.cast("str", self._report(check_mode=True)["state"]) == OK

    def _make(self) -> None:
        """Call each module."""
        for module in self._asked.options:
            try:
                self._results[module][RUN] = self._called(module, RUN)
            except NoResultError as exc:
                if exc.had_begun:
                    self._results[module][RUN] = {"failed": True, "msg": str(exc)}
                raise
            if _is_unreachable(self._results[module][RUN]):
                return

    def _look_afterwards(self) -> None:
        """Look at what there is now, where a call has told nothing of what it did."""
        for module in self._asked.options:
            if _is_lost(self._results[module][RUN]):
                self._results[module][AFTER] = self._called(module, AFTER)
        examined = self.report()["examined"]
        if examined and any(results[AFTER] for results in self._results.values()):
            options = {"paths": examined, "dirty_bytes": False, "fail_on": "never"}
            self._chains = self._call(_INFO, options, looks=True)

    def _called(self, module: str, step: int) -> Result:
        verifies = {"verify": True, "all_or_none": self._asked.all_or_none} if step == RUN else {}
        return self._call(module, {**self._asked.options[module], **verifies}, looks=step != RUN)

    def _report(self, *, check_mode: bool) -> dict[str, t.Any]:
        about = {kind: self._results[module] for module, kind in _KINDS.items()}
        more = {
            "chains": self._chains,
            "wanted": self._asked.state,
            "waiting_for": self._waiting_for,
            "names": self._asked.domains,
            "problem": self._problem,
            "all_or_none": self._asked.all_or_none,
        }
        return make_host_report({**about, **more}, check_mode)


def _is_unreachable(result: Result) -> bool:
    return bool(result.get("unreachable"))


def _is_lost(run: Result) -> bool:
    """Whether a call ended without an answer: a module tells what it found, or by its code why it found nothing."""
    return bool(run) and not _is_unreachable(run) and not {"overlays", "domains", "code"} & run.keys()
