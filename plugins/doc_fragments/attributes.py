# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules of this collection have in common in their documentation."""

from __future__ import annotations


class ModuleDocFragment:
    """Attributes that all modules share."""

    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return what a run would do and return, without changing anything.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, when in diff mode.
    support: full
  idempotent:
    description: When run twice in a row with the same arguments, the second run changes nothing.
    support: full
  platform:
    description: Target OS families that can be operated against.
    platforms: linux
    support: full
"""

    # Beside the one above, for modules that are in groups of meta/runtime.yml. The module names them.
    ACTIONGROUP = r"""
options: {}
attributes:
  action_group:
    description:
      - Options that several modules share can be set for all of them, with C(group/) and the name of the group in
        C(module_defaults).
      - The group C(creation) is for how new overlays are made, such as C(cluster_size) and C(mode). The group
        C(libvirt) is for C(uri), the group C(qemu) for C(timeout).
      - Set those of C(creation) at a block whose tasks make overlays, since a task that merges down or goes back
        refuses them.
    support: full
"""
