# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation of the option verify and of what belongs to it."""

from __future__ import annotations


class ModuleDocFragment:
    """Options that modules share which look, make and look again in one call."""

    DOCUMENTATION = r"""
options:
  verify:
    description:
      - Do in one call what takes four otherwise. Look at everything as check mode does; do what is missing; look again
        from scratch, which must find everything done; and examine the chains of the disks that have bitmaps, as
        M(kvmfleet.qcow2.qcow2_info) does with C(dirty_bytes=false).
      - Nothing is judged by it. What the looks find is in the result beside what was done, and the task fails for the
        same reasons as without it.
      - If the first look finds everything done, or in check mode, the run and the second look are left out.
    type: bool
    default: false
  all_or_none:
    description:
      - With O(verify), leave everything as it is if the first look finds that anything would be refused. What would
        have been done fails with the code C(held_back).
    type: bool
    default: false
"""
