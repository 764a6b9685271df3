# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What every module does: end with a result, or with a refusal."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

from ._base.errors import Refusal, printable


class Report(t.NamedTuple):
    """How a module's work ended."""

    result: dict[str, t.Any]  # changed, the items, the diff
    failures: t.Sequence[Refusal] = ()  # root causes, each once
    warnings: t.Sequence[str] = ()


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
