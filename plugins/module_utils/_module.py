# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What every module does: end with a result, or with a refusal."""

from __future__ import annotations

import json
import typing as t

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ._base.errors import Refusal, printable


class Report(t.NamedTuple):
    """How a module's work ended."""

    result: dict[str, t.Any]  # changed, the items, the diff
    failures: t.Sequence[Refusal] = ()  # root causes, each once
    warnings: t.Sequence[str] = ()
    created: t.Mapping[str, t.Mapping[str, int]] = {}  # when checkpoints were made, by image and bitmap, s since 1970


class Module(AnsibleModule):  # type: ignore[misc]  # Ansible has no types
    """Gives parameters that cannot be a code, and says of a list of dicts what it must be."""

    _is_made = False

    def __init__(self, **options: t.Any) -> None:
        super().__init__(**options)
        self._is_made = True

    def fail_json(self, msg: str, **more: t.Any) -> None:
        """End the module; Ansible calls it, too, for parameters that cannot be."""
        if not self._is_made:
            more.setdefault("code", "bad_option")  # tells that nothing was done
        checked = getattr(self, "validation_result", None)  # none yet if there are no parameters at all
        for name in [name for name, option in self.argument_spec.items() if option.get("elements") == "dict"]:
            if checked and any(one.startswith(f"Elements value for option '{name}'") for one in checked.error_messages):
                refusal = _no_dicts(name)
                super().fail_json(msg=str(refusal), code=refusal.code)
        super().fail_json(msg=msg, **more)


def _no_dicts(name: str) -> Refusal:
    """Return the refusal of a list of dicts that has something else in it."""
    why = "must be a list, with the options of each item by name. A text is not split at commas"
    remedy = f"For a single command give all as JSON, as in -a '{{\"{name}\": [{{...}}, {{...}}]}}'."
    return Refusal("bad_option", name, why, remedy)


def run(module: AnsibleModule, work: t.Callable[[AnsibleModule], Report]) -> None:
    """Do the work of a module, and end it. Nothing outside this file calls fail_json or exit_json.

    An exception that is no Refusal is a bug and stays a traceback.
    """
    try:
        report = work(module)
    except Refusal as exc:
        module.fail_json(msg=str(exc), code=exc.code)
    for warning in report.warnings:
        module.warn(printable(warning))
    if report.failures:
        message = "\n".join(map(str, report.failures))
        module.fail_json(msg=message, code=report.failures[0].code, **report.result)
    module.exit_json(**report.result)


def require(module: AnsibleModule, library: str, import_error: str | None) -> None:
    """End the module if a Python library is missing on the managed host."""
    if import_error is not None:
        module.fail_json(msg=missing_required_lib(library), code="no_library", exception=import_error)


def real_list(option: str, value: t.Any, kind: str, example: str, remedy: str = "") -> list[str]:
    """Return the list of texts that an option has, or that its text is in JSON; Refusal for anything else.

    An option of the type list would split a text at commas, which names may contain.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise Refusal(
                "bad_option", option, f"begins like a list in JSON, but is none: {exc}", "Correct it."
            ) from exc
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        why = (
            f"must be a list of {kind}, or such a list in JSON, as in {option}='[\"{example}\"]'. A text is not split "
            "at commas, since names may contain them"
        )
        raise Refusal("bad_option", f"{option}={value}", why, remedy)
    return value


def check_names(params: dict[str, t.Any], *options: str) -> None:
    """Refuse names that are empty or have blanks around them: Ansible leaves both when it splits a text at commas.

    A pattern with such a blank would match nothing, without a failure; and a domain may be called like that.
    """
    for option in options:
        for name in params[option] or ():
            if not name.strip():
                why = "has an empty name in it, as a comma too many makes it"
                raise Refusal("bad_option", option, why, "Leave that out.")
            if name != name.strip():
                why = "begins or ends with a blank, which stays when a text is split at commas"
                remedy = "Leave the blank out. If it belongs to the name, put it in brackets, as in '[ ]web'."
                raise Refusal("bad_option", f"{option}={name!r}", why, remedy)


def image_paths(params: dict[str, t.Any]) -> list[str]:
    """Return the topmost images that a task asks for by `path` or `paths`; Refusal if their list is none."""
    if params["path"] is not None:
        return [params["path"]]
    return real_list("paths", params["paths"], "absolute paths", "/srv/a.qcow2", "For one image use path.")
