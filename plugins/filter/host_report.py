# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the report of a host from what the modules returned there."""

from __future__ import annotations

DOCUMENTATION = r"""
name: host_report
short_description: Make the report of a host from what the modules of this collection returned there
version_added: 1.0.0
description:
  - The role P(kvmfleet.qcow2.overlay#role) uses it. It says what became of each overlay, whether the idempotence check
    and the examination of the chains found anything, and counts.
positional: check_mode
options:
  _input:
    description:
      - Registered results. A step that was left out, or skipped, is no problem.
    type: dict
    required: true
    suboptions:
      disks:
        description:
          - Results of M(kvmfleet.qcow2.qcow2_overlay) before the run in check mode, of the run, and after it in check
            mode.
          - The result of a run with C(verify=true) has all three. Before it, C(all_or_none) of a host with disks and
            domains needs one more; after it, a run that told nothing does.
        type: list
        elements: dict
      domains:
        description: Results of M(kvmfleet.qcow2.domain_overlay) of the same three steps.
        type: list
        elements: dict
      chains:
        description: The result of M(kvmfleet.qcow2.qcow2_info) about the images that an earlier report names in
          C(examined). Results of runs with C(verify=true) have that, too.
        type: dict
      waiting_for:
        description: Packages that check mode did not install.
        type: list
        elements: str
      all_or_none:
        description: Whether the host was left as it is if anything of it was refused.
        type: bool
        default: false
      problem:
        description: What ended the steps before their end.
        type: str
      wanted:
        description: The C(state) that was asked for.
        type: str
        default: present
      names:
        description: Names and patterns of the domains that were asked for.
        type: list
        elements: str
  check_mode:
    description: Whether the run was made in check mode.
    type: bool
    required: true
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Make the report of a host
  ansible.builtin.set_fact:
    overlay_result: >-
      {{ {'disks': [looked, made, looked_again], 'chains': chains} | kvmfleet.qcow2.host_report(ansible_check_mode) }}
"""

RETURN = r"""
_value:
  description: The report.
  type: dict
  contains:
    summary:
      description: The counts in one line, for a person to read.
      type: str
      sample: "1 created, 0 present, 0 skipped, 0 failed; bitmaps: 2 carried, 0 left behind"
    state:
      description:
        - V(ok), V(failed) or V(unreachable).
        - In the report of the fleet also V(not run), of a host whose turn never came.
      type: str
      sample: ok
    check_mode:
      description: Whether the run was made in check mode.
      type: bool
      sample: false
    wanted:
      description: The state that was asked for.
      type: str
      sample: present
    created:
      description: Number of overlays that were made.
      type: int
      sample: 1
    present:
      description: Number of overlays that were there already.
      type: int
      sample: 0
    committed:
      description: Number of overlays that were merged down.
      type: int
      sample: 0
    reverted:
      description: Number of overlays that were gone back from.
      type: int
      sample: 0
    absent:
      description: Number of overlays that were to be merged down or gone back from, and were not there any more.
      type: int
      sample: 0
    failed:
      description: Number of overlays that should be there and are not, or should not and are.
      type: int
      sample: 0
    skipped:
      description: Number of disks that take no part.
      type: int
      sample: 1
    skipped_because:
      description: The number of these by reason.
      type: dict
      sample: {"cdrom": 1}
    unfit:
      description: Number of these that their domain writes to and that nobody has excluded.
      type: int
      sample: 0
    bitmaps_carried:
      description: Number of bitmaps that go on recording.
      type: int
      sample: 2
    bitmaps_left_behind:
      description: Number of bitmaps that do not, by reason.
      type: dict
      sample: {"disabled": 1}
    bitmaps_unverified:
      description: Number of checkpoints of which it cannot be told whether a backup can use them, as a VM runs.
      type: int
      sample: 0
    overlays:
      description: Each overlay. A domain that failed before it had overlays has one without a path.
      type: list
      elements: dict
      contains:
        domain:
          description: Name of the domain; null for a disk that was asked for by its path.
          type: str
          sample: web
        path:
          description: The overlay; null if the domain failed before that was known.
          type: str
          sample: /srv/web.before-upgrade.qcow2
        backing_file:
          description: The image below it; null likewise.
          type: str
          sample: /srv/web.qcow2
        examine:
          description:
            - The image of which the chain is examined. In check mode the one below, if the overlay is not there yet.
          type: str
          sample: /srv/web.before-upgrade.qcow2
        state:
          description: V(created), V(present), V(committed), V(reverted), V(absent) or V(failed).
          type: str
          sample: created
        kept_as:
          description: What an overlay that was retired is called now; null of any other, and if it was deleted.
          type: str
          sample: null
        bitmaps:
          description: Names of the bitmaps that go on recording in it, or after V(committed) in the image below.
          type: list
          elements: str
          sample: [monday, tuesday]
        skipped_bitmaps:
          description: The bitmaps that do not.
          type: list
          elements: dict
          contains:
            name:
              description: Name of the bitmap.
              type: str
              sample: sunday
            reason:
              description: Why it does not, as the module returns it. V(disabled) if it is not recording,
                V(inconsistent) if it was not saved properly.
              type: str
              sample: disabled
        msg:
          description: Why it failed.
          returned: if V(failed)
          type: str
        code:
          description: The kind of failure, one word.
          returned: if V(failed)
          type: str
          sample: in_use
    skipped_disks:
      description: The disks of domains that take no part.
      type: list
      elements: dict
      contains:
        domain:
          description: Name of the domain.
          type: str
          sample: web
        target:
          description: The disk.
          type: str
          sample: sda
        reason:
          description: Why it takes no part.
          type: str
          sample: cdrom
        unfit:
          description: Whether its domain writes to it and nobody has excluded it.
          type: bool
          sample: false
    picked_snapshots:
      description: Snapshots of domains that were merged down since they are old, or are to be.
      type: list
      elements: dict
      contains:
        domain:
          description: Name of the domain.
          type: str
          sample: web
        snapshot:
          description: Name of the snapshot.
          type: str
          sample: before-upgrade
        modified:
          description:
            - When the image below it was last written to before it was made, in seconds since 1970; null if that
              cannot be told.
          type: int
          sample: 1767225600
        size:
          description: Bytes that its images take, which deleting them frees.
          type: int
          sample: 2147483648
    lost_checkpoints:
      description: Checkpoints that went with overlays from which was gone back, and that libvirt has forgotten.
      type: list
      elements: dict
      contains:
        domain:
          description: Name of the domain.
          type: str
          sample: web
        checkpoint:
          description: Name of the checkpoint.
          type: str
          sample: tuesday
    examined:
      description: Topmost images of the chains that are to be examined, or were.
      type: list
      elements: str
      sample: [/srv/web.before-upgrade.qcow2]
    unverified:
      description: Checkpoints that could not be examined, as a VM runs.
      type: list
      elements: dict
      contains:
        path:
          description: The topmost image.
          type: str
          sample: /srv/db.qcow2
        checkpoint:
          description: Name of the checkpoint.
          type: str
          sample: monday
    waiting_for:
      description: Packages that check mode did not install, without which it can predict nothing.
      type: list
      elements: str
      sample: []
    patterns:
      description: Of each pattern of names of domains the number of domains that it matches.
      type: dict
      sample: {"web*": 2}
    results:
      description: What the modules returned. Everything else but RV(_value.warnings) is empty then, and that is a bug.
      returned: if the report could not be made
      type: list
      elements: dict
    warnings:
      description: The warnings of the modules.
      type: list
      elements: str
      sample: []
    problems:
      description: What is wrong with the host. Each is told once.
      type: list
      elements: dict
      contains:
        code:
          description: The kind of problem, one word. The collection's documentation lists all of them, with what to do.
          type: str
          sample: running
        msg:
          description: What is wrong, and what to do.
          type: str
          sample: web is running. Shut it down and run this again.
"""

import typing as t

from ..module_utils._disk.verdict import PRESENT
from ..plugin_utils._report.host import Steps, host_report, pass_of
from ..plugin_utils._report.text import summary_of_host
from ..plugin_utils._variables import texts


def _taken(result: t.Mapping[str, t.Any] | None) -> t.Mapping[str, t.Any] | None:
    """Return the result of a step, or None if it was not taken."""
    return None if not result or result.get("skipped") else result


def make_host_report(results: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """Return the report of a host."""
    steps = Steps(
        pass_of(*map(_taken, results.get("disks", ())), check_mode=check_mode),
        pass_of(*map(_taken, results.get("domains", ())), check_mode=check_mode),
        _taken(results.get("chains")),
        results.get("waiting_for", ()),
        results.get("all_or_none", False),
        results.get("problem", ""),
        [name for name in texts(results.get("names")) if any(character in name for character in "*?[")],
        results.get("wanted", PRESENT),
    )
    report = host_report(steps, check_mode)
    return {**report, "summary": summary_of_host(report)}


class FilterModule:
    """The filter, for Ansible."""

    def filters(self) -> dict[str, t.Callable[..., t.Any]]:
        """Return the filter by its name."""
        return {"host_report": make_host_report}
