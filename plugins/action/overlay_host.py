# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Do on a host what the variables of the role ask for, and make its report, in one task.

Over a fleet the controller's work is what a run costs. A task costs it some 20 milliseconds for each host, also one
that is skipped, and each template some two, since every host has a process of its own that compiles all of them. So
what role and report need is decided here, and only variables that are set and have a meaning are looked into.
"""

from __future__ import annotations

import contextlib
import signal
import typing as t

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._asked import PREFIX, PRESENT, asked, variables
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._follow import Caller
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._host_run import HostRun, NoResultError

_COLLECTION = "kvmfleet.qcow2"
_UNKNOWN = "__overlay_unknown"  # sentences on variables that are most likely misspelt
_WAITING_FOR = "__overlay_waiting_for"  # packages that check mode would install
_FACTS = "__overlay_facts"  # the answer of the host when it was asked what to install


class _TookTooLong(BaseException):
    """A call has had its time. No Exception, which what waits for the host might take for an error of its own."""


class ActionModule(Caller):
    """What Ansible looks for by the name of this file."""

    _seconds = 0  # that a call may take
    _tells = True
    _given: dict[str, t.Any]

    def run(self, tmp: None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Return the report, and what Ansible needs to know."""
        result: dict[str, t.Any] = super().run(tmp, task_vars)
        _result, arguments = self.validate_argument_spec({"begin": {"type": "bool", "default": True}})
        self._given = task_vars or {}
        state = self._values([PREFIX + "state"]).get(PREFIX + "state")
        state = PRESENT if state is None else state  # an empty text may have been meant for another one
        names = [PREFIX + name for name in variables(state)]
        given = {name[len(PREFIX) :]: value for name, value in self._values(names).items()}
        wish = asked(state, given, self._values([_UNKNOWN]).get(_UNKNOWN, ()))
        if not arguments["begin"]:
            return {**result, "mistake": wish.mistake}
        self._seconds, self._tells = wish.timeout, wish.progress
        # Of what was to be installed first.
        installed = self._values([_FACTS, _WAITING_FOR]) if wish.installs and not wish.mistake else {}
        host = HostRun(wish, self._called, installed.get(_WAITING_FOR, ()), check_mode=self._task.check_mode)
        if installed.get(_FACTS, {}).get("unreachable"):
            host.unreachable(installed[_FACTS])
        else:
            host.run()
        return {**result, **_told(host), "report": host.report()}

    def _values(self, names: t.Sequence[str]) -> dict[str, t.Any]:
        """Return the values of those variables that are set; one that is omitted is not."""
        values: dict[str, t.Any] = {}
        for name in names:
            if name in self._given:
                try:
                    values.update(self._templar.template({name: self._given[name]}))
                except AnsibleError as exc:
                    raise AnsibleActionFail(f"{name}: {exc}") from exc
        # What ansible-core before 2.19 has in place of what is omitted, which it does not take out by itself.
        omitted = self._given.get("omit")
        return _without(values, omitted) if isinstance(omitted, str) else values

    def _called(self, module: str, options: t.Mapping[str, t.Any], *, looks: bool) -> t.Mapping[str, t.Any]:
        """Call a module; what HostRun needs."""
        check_mode, name = self._task.check_mode, f"{_COLLECTION}.{module}"
        self._task.check_mode = check_mode or looks
        try:
            with _at_most(self._seconds):
                return self.call(name, {**self._defaults(name), **options}, self._given, tells=self._tells)
        except AnsibleConnectionFailure as exc:
            return {"unreachable": True, "msg": str(exc)}
        except _TookTooLong:
            why = f"{module}: did not end in the expected time frame, overlay_task_timeout={self._seconds} seconds."
            raise NoResultError(why, had_begun=True) from None
        except Exception as exc:
            raise NoResultError(f"{module}: {exc}") from exc
        finally:
            self._task.check_mode = check_mode

    def _defaults(self, module: str) -> dict[str, t.Any]:
        """Return what `module_defaults` say of a module, which Ansible knows of this task's alone."""
        groups = {f"group/{group}" for group in self._task.play._action_groups.get(module, ())}
        given: dict[str, t.Any] = {}
        for defaults in self._task.module_defaults or ():
            given.update(defaults)
        of_groups = [given[name] for name in given if name in groups]
        found: dict[str, t.Any] = {}
        for options in (*of_groups, given.get(module)):
            found.update(self._templar.template(options) or {})
        return found


def _told(host: HostRun) -> dict[str, t.Any]:
    """Return what Ansible shows and counts of the results of modules."""
    lost = next((one for one in host.results if one.get("unreachable")), None)
    # Which Python was discovered, so that the next task need not look for it.
    facts = {name: fact for one in host.results for name, fact in (one.get("ansible_facts") or {}).items()}
    return {
        "changed": any(one.get("changed") for one in host.runs),
        "diff": [one["diff"] for one in host.runs if one.get("diff")],
        **{key: _each_once(one.get(key) for one in host.results) for key in ("warnings", "deprecations")},
        **({"ansible_facts": facts} if facts else {}),
        **({"unreachable": True, "msg": lost.get("msg", "")} if lost else {}),
    }


def _each_once(lists: t.Iterable[t.Sequence[t.Any] | None]) -> list[t.Any]:
    return list({str(one): one for some in lists for one in some or ()}.values())


def _without(values: t.Any, omitted: str) -> t.Any:
    """Return values without those that are omitted."""
    if isinstance(values, dict):
        return {name: _without(value, omitted) for name, value in values.items() if value != omitted}
    return [_without(value, omitted) for value in values if value != omitted] if isinstance(values, list) else values


@contextlib.contextmanager
def _at_most(seconds: int) -> t.Iterator[None]:
    """End what goes on after so many seconds; 0 for no limit. Each call has its own, so no `timeout` of a task."""
    if not seconds:
        yield
        return

    def end(_signal: int, _frame: t.Any) -> None:
        raise _TookTooLong

    former = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
