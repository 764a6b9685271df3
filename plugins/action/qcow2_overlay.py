# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run the module qcow2_overlay, and follow a merge to its end."""

from __future__ import annotations

from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._follow import Following


class ActionModule(Following):
    """What Ansible looks for by the name of this file."""
