#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the checkpoints of libvirt domains valid again over all their disks, or remove them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_checkpoint
short_description: Make the checkpoints of libvirt domains valid again, or remove them with their bitmaps
version_added: 1.0.0
description:
  - Heals the checkpoints of libvirt domains, so that the next incremental backup is possible. A VM that was killed
    leaves bitmaps inconsistent, C(qemu-img create) and offline snapshots drop them, and C(virsh backup-begin) says
    C(missing or broken bitmap).
  - A checkpoint is only ever made valid where that is right on all its disks. Else it stays as it is, and the result
    says why; or it is removed, so that it is in no backup's way.
  - Of a domain that is shut off all disks are done, or none, as by M(kvmfleet.qcow2.qcow2_bitmap). Of one that runs
    libvirt tells what is valid, and deletes what is to go (O(running=live)).
  - No data of the guest is read or written, and the definition of the domain stays as it is.
options:
  name:
    description:
      - Names of domains, or patterns such as V(web*). A pattern that matches no domain is a warning. A name that
        libvirt does not know is an error.
      - A name that is empty, or has a blank around it, is refused, here and in O(checkpoints). Such a one is most
        likely of a text with commas.
    type: list
    elements: str
    required: true
  checkpoints:
    description:
      - Names of checkpoints, or patterns. By default all that libvirt knows of the domain.
      - A name that libvirt does not know fails with O(state=valid), and is V(absent) with O(state=absent).
    type: list
    elements: str
    default: ["*"]
  state:
    description:
      - V(valid) means that an incremental backup since each of the checkpoints is possible. What can be healed, and
        what cannot, is the same as with M(kvmfleet.qcow2.qcow2_bitmap).
      - V(absent) means that the checkpoints are gone, from libvirt and with their bitmaps in all images of the chains.
        An image that others stand on, such as a template, is never written to and keeps its bitmaps.
      - The bitmaps are removed first, from the top downwards, and libvirt's part last. Meanwhile libvirt refuses an
        increment since the checkpoint.
    type: str
    choices: [valid, absent]
    default: valid
  unusable:
    description:
      - What becomes of checkpoints that cannot be made valid, with O(state=valid). V(keep) leaves them as they are, and
        the domain has failed. V(remove) removes them with their bitmaps.
      - One of them is a checkpoint whose bitmap a killed run has lost, and that is not put back without
        O(assume_not_emptied).
      - A checkpoint that something else keeps from being healed, such as a process that uses an image, is never
        removed.
      - Of a domain that runs, all are unusable that libvirt does not call valid, also those that could be healed while
        it is shut off.
    type: str
    choices: [keep, remove]
    default: keep
  orphans:
    description:
      - What becomes of bitmaps that no checkpoint of the domain refers to, in the images of all qcow2 disks that the
        domain writes to. V(remove) removes them. Each takes space and a little time with each write.
      - A backup tool that does without checkpoints of libvirt, or that gives them to libvirt only for the time of a
        backup, needs such bitmaps. Keep them then.
      - Of a domain that runs they cannot be told. Nothing is removed then, with a warning.
    type: str
    choices: [keep, remove]
    default: keep
  assume_not_emptied:
    description:
      - Rebuild a bitmap, too, that is inconsistent in the topmost image and that no image below has, as after a crash
        of a domain without overlays. If the checkpoint was made on this image, what the image holds tells all changes
        since, unless the image was emptied meanwhile by C(qemu-img commit) without C(-d). Neither can be seen.
      - Give your word that the checkpoints were made on these images, not on images below that have lost the bitmaps
        since, as by C(qemu-img convert), and that the images were not emptied.
      - What a killed run has lost is put back without this word from what that run has kept, unless the image does not
        hold all any more that it held then.
    type: bool
    default: false
  bitmap_content:
    description:
      - V(cumulative) has each bitmap of the topmost images mark as well all that those in the images below mark, for
        tools that read only the topmost image. See M(kvmfleet.qcow2.qcow2_bitmap).
      - V(keep) leaves it at that.
    type: str
    choices: [keep, cumulative]
    default: keep
  running:
    description:
      - What to do with domains that are not shut off and of which something is to be done.
      - V(fail) reports them as failed. V(skip) leaves them out.
      - V(live) has libvirt delete what is to go, with O(state=absent) or O(unusable=remove). Nothing can be healed
        while QEMU has the images open. Needs libvirt 6.6 or newer.
      - A domain that runs and of which nothing is to be done is fine in any case. To know that, libvirt 7.0 or newer is
        needed.
    type: str
    choices: [fail, skip, live]
    default: fail
  uri:
    description: The libvirt daemon to use. It must be on this host, since the images are.
    type: str
    default: qemu:///system
  timeout:
    description:
      - Seconds that QEMU may take for one step before it is ended and the domain reported as failed. A tenth of a
        second is added for each bitmap, and a second for each MiB of bits.
      - Also the seconds to wait while another run of this collection works on the same image.
      - From 1 to 86400.
    type: int
    default: 60
requirements:
  - python3-libvirt (libvirt-python) on the managed host
  - QEMU 5.2 or newer on the managed host, as C(qemu-storage-daemon) or a system emulator
  - Python 3.9 or newer on the managed host
notes:
  - Needs libvirt's Python bindings (C(python3-libvirt)) on the managed host, and to write also C(qemu-storage-daemon)
    or a QEMU system emulator, version 5.2 or newer.
  - Healed is a bitmap that is missing or inconsistent in overlays and in order in the lowest image that has it. Not
    healed is one that is disabled, that is inconsistent in the lowest image with it, that no image has, whose images
    have different sizes, or below which an image has lost the bitmap. Nor is one of disks that have swapped their
    targets, or the paths of their images, since.
  - After V(unusable=remove) make a full backup with a new checkpoint. Backup tools that have a checkpoint removed under
    them may keep a note of it; see their own way to begin a new chain of backups.
  - A domain with a managed save is refused if anything is to be written.
  - Of a domain that is shut off the time of an image that is written to stays as it was, since it tells when its data
    was written last. A backup of image files that goes by their time alone does not notice.
  - A run that is killed is completed by the same call again. Until then libvirt refuses an increment since what is not
    done.
  - Images that stand on one of the chain are seen in its folders, and in the chains of the host's other domains.
seealso:
  - module: kvmfleet.qcow2.domain_info
  - module: kvmfleet.qcow2.qcow2_bitmap
  - name: A whole fleet
    description: P(kvmfleet.qcow2.overlay#role) keeps checkpoints alive over snapshots, on all hosts.
    link: https://github.com/kvmfleet/qcow2/blob/main/docs/fleet.md
  - name: Incremental backup internals of libvirt
    description: The rules by which a checkpoint is valid.
    link: https://libvirt.org/kbase/internals/incremental-backup.html
extends_documentation_fragment:
  - kvmfleet.qcow2.attributes
  - kvmfleet.qcow2.attributes.actiongroup
attributes:
  action_group:
    membership: [kvmfleet.qcow2.libvirt, kvmfleet.qcow2.qemu]
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Heal what a crash of the host has broken, and have the rest begin anew with the next full backup
  kvmfleet.qcow2.domain_checkpoint:
    name: "*"
    unusable: remove
    running: skip
  register: healed

- name: Tell which domains need a full backup
  ansible.builtin.debug:
    msg: "{{ item.name }}"
  loop: "{{ healed.domains | selectattr('state', 'eq', 'removed') }}"
  loop_control:
    label: "{{ item.name }}"

- name: Remove two checkpoints of a domain that runs
  kvmfleet.qcow2.domain_checkpoint:
    name: web
    checkpoints: [monday, "old-*"]
    state: absent
    running: live

- name: Clean up before another backup tool is introduced
  kvmfleet.qcow2.domain_checkpoint:
    name: "db*"
    state: absent
    orphans: remove
"""

RETURN = r"""
domains:
  description:
    - Every domain that was asked for, once. The same in check mode.
    - Also returned when the task fails.
  returned: always
  type: list
  elements: dict
  contains:
    name:
      description: Name of the domain.
      type: str
      sample: web
    uuid:
      description: UUID of the domain; null if libvirt does not know it.
      type: str
      sample: 4dea22b3-1d52-d8f3-2516-782e98ab3fa0
    state:
      description:
        - V(failed) if the domain, or any checkpoint of it, failed, also if others were healed or removed.
        - Else V(removed) if anything was removed, V(rebuilt) if any checkpoint was healed.
        - Else V(valid) or V(absent), as O(state); V(skipped) if it was left out.
      type: str
      sample: rebuilt
    checkpoints:
      description: The checkpoints that were asked for, sorted by name. Empty of a domain that was left out.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the checkpoint.
          type: str
          sample: monday
        state:
          description:
            - V(valid) if it was before. V(rebuilt) if a bitmap of it was made anew, or marks more now.
            - V(removed) if it was removed. V(absent) if libvirt did not know it.
            - V(failed) if it is left as it is, and is not as it should be.
          type: str
          sample: rebuilt
        msg:
          description: Why it failed.
          returned: when RV(domains[].checkpoints[].state) is V(failed)
          type: str
        code:
          description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
          returned: when RV(domains[].checkpoints[].state) is V(failed)
          type: str
          sample: not_healable
    removed_orphans:
      description:
        - The bitmaps that no checkpoint refers to and that were removed, image by image. Empty without
          O(orphans=remove).
        - Null if they cannot be told, since the domain runs.
      type: list
      elements: dict
      contains:
        target:
          description: Name of the disk in the guest.
          type: str
          sample: vda
        image:
          description: The image from which they were removed.
          type: str
          sample: /srv/web.snap.qcow2
        bitmaps:
          description: Their names.
          type: list
          elements: str
          sample: [forgotten]
    msg:
      description: Why it failed.
      returned: when RV(domains[].state) is V(failed)
      type: str
    code:
      description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
      returned: when RV(domains[].state) is V(failed)
      type: str
      sample: running
code:
  description: The kind of the first failure, one word. The collection's documentation lists all, with what to do.
  returned: when the task fails
  type: str
  sample: not_healable
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Refusal, printable
from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.heal import ABSENT, VALID
from ..module_utils._disk.verdict import root_causes
from ..module_utils._domain.healing import CheckpointRequest
from ..module_utils._domain.healing_run import HealCall
from ..module_utils._libvirt.bindings import LIBVIRT_IMPORT_ERROR
from ..module_utils._libvirt.connection import Libvirt
from ..module_utils._module import Report, check_names, require, run
from ..module_utils._options import settings_from

_OF_VALID = {"unusable": "keep", "assume_not_emptied": False, "bitmap_content": "keep"}


def request_from(params: dict[str, t.Any]) -> CheckpointRequest:
    """Return what is wanted of every domain; Refusal for an option that has no meaning."""
    if params["state"] == ABSENT:
        for name, default in _OF_VALID.items():
            if params[name] != default:
                why = "has no meaning with state=absent"
                raise Refusal("bad_option", f"{name}={params[name]}", why, "Leave it out.")
    return CheckpointRequest(
        checkpoints=tuple(params["checkpoints"]),
        state=params["state"],
        removes_unusable=params["unusable"] == "remove",
        removes_orphans=params["orphans"] == "remove",
        cumulative=params["bitmap_content"] == "cumulative",
        assume_not_emptied=params["assume_not_emptied"],
        skips_running=params["running"] == "skip",
    )


@ending_cleanly()
def work(module: AnsibleModule) -> Report:
    """Heal, or remove, the checkpoints of the domains."""
    params = module.params
    check_names(params, "name", "checkpoints")
    request, settings = request_from(params), settings_from(module)
    call = HealCall(Libvirt(params["uri"]), params["name"], request, settings, live=params["running"] == "live")
    domains, warnings = call.run()
    result = {
        "changed": any(domain.changed for domain in domains),
        "domains": [domain.as_result() for domain in domains],
        "diff": {
            "before": {domain.name: domain.diff[0] for domain in domains if domain.changed},
            "after": {domain.name: domain.diff[1] for domain in domains if domain.changed},
        },
    }
    failures = root_causes(problem for domain in domains for problem in domain.failures)
    return Report(result, failures, [printable(warning) for warning in warnings])


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "checkpoints": {"type": "list", "elements": "str", "default": ["*"]},
            "state": {"type": "str", "choices": [VALID, ABSENT], "default": VALID},
            "unusable": {"type": "str", "choices": ["keep", "remove"], "default": "keep"},
            "orphans": {"type": "str", "choices": ["keep", "remove"], "default": "keep"},
            "assume_not_emptied": {"type": "bool", "default": False},
            "bitmap_content": {"type": "str", "choices": ["keep", "cumulative"], "default": "keep"},
            "running": {"type": "str", "choices": ["fail", "skip", "live"], "default": "fail"},
            "uri": {"type": "str", "default": "qemu:///system"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    require(module, "libvirt-python", LIBVIRT_IMPORT_ERROR)
    run(module, work)


if __name__ == "__main__":
    main()
