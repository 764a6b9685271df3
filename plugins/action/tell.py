# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Show lines on the screen, whatever the callback hides."""

from __future__ import annotations

import typing as t

from ansible import constants
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible has no types
    """As ansible.builtin.debug, of which display_ok_hosts=false shows nothing."""

    _requires_connection = False

    def run(self, tmp: None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Show the lines."""
        _result, arguments = self.validate_argument_spec(
            {"lines": {"type": "list", "elements": "str", "required": True}}
        )
        lines = arguments["lines"]
        if _callback_hides_ok():
            for line in lines:
                Display().display(line)
        return {**super().run(tmp, task_vars), "msg": lines, "changed": False, "_ansible_verbose_always": True}


def _callback_hides_ok() -> bool:
    """Whether what has not changed is left out on the screen; false for a callback that has no such option."""
    config, callback = constants.config, constants.DEFAULT_STDOUT_CALLBACK
    if "." in callback:  # Ansible knows the options of a callback of a collection by where it lies
        collection, _dot, name = callback.rpartition(".")
        callback = f"ansible_collections.{collection}.plugins.callback.{name}"
    if "display_ok_hosts" not in config.get_configuration_definitions("callback", callback):
        return False
    return not config.get_config_value("display_ok_hosts", plugin_type="callback", plugin_name=callback)
