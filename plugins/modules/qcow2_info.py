#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell whether the chains of disks are fit for the next incremental backup, and if not, why."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qcow2_info
short_description: Tell whether backing chains are fit for the next incremental backup, and if not, why
version_added: 1.0.0
description:
  - Reads the backing chains of disks, with all dirty bitmaps, and tells for each checkpoint whether an incremental
    backup since it is possible; if not, which image of the chain breaks which rule, and what to do.
  - Tells how many bytes the next incremental backup since a checkpoint would copy, which C(qemu-img) cannot.
  - Never writes, starts no process, and takes no lock, so it is safe to use while VMs run.
options:
  path:
    description:
      - The topmost image of one disk, a file or a block device, as an absolute path. C(~) and variables are not
        expanded.
      - Required unless O(paths) is given.
    type: str
  paths:
    description:
      - The topmost images of several disks, as a list, which is much faster than a loop. The result is in the same
        order.
      - Give a real list, or the text of a list in JSON. Any other text is refused. It would have to be split at commas,
        which file names may contain.
    type: raw
  chain:
    description:
      - Follow the backing files down to the base.
      - If V(false), only the topmost image is read. That is rarely enough to tell that a checkpoint is valid.
    type: bool
    default: true
  dirty_bytes:
    description: Count the dirty bytes of each bitmap and each valid checkpoint, which reads the bitmaps' bits.
    type: bool
    default: true
  checkpoint:
    description:
      - A checkpoint that every disk is to have. Then O(fail_on=invalid) is about this one alone, and a disk without it
        is a failure too.
      - Without it, bitmaps that no backup needs any more are judged too, and a disk without any bitmap is no failure.
    type: str
  fail_on:
    description:
      - When the task fails. Everything that could be read is returned in any case.
      - V(error) if the chain of any disk cannot be read completely.
      - V(invalid) also if any checkpoint of any disk is not valid, or O(checkpoint) is missing, or that cannot be told
        since the chain was not read to its end, as with O(chain=false). A checkpoint of a running VM, of which nothing
        can be told, does not count.
      - V(never) leaves the judgement to the playbook.
    type: str
    choices: [never, error, invalid]
    default: error
requirements:
  - Python 3.9 or newer on the managed host
notes:
  - Needs nothing on the managed host but Python 3.9 or newer with its standard library.
  - The format of an image is the one that the image above it records. Of the topmost image, and where none is
    recorded, the first bytes tell, as they do for QEMU, which here decides only what is read and shown.
  - What is below a qcow, qed, vmdk or parallels image is not read. A checkpoint above it is V(incomplete), and so is
    one above any image that is neither qcow2 nor raw if its format is not recorded, which is a failure too. All other
    formats have no backing file.
  - An image that QEMU does not open is a failure, wherever it is in the chain.
  - An external data file that is recorded without its folder is warned of. QEMU looks for it in the folder that QEMU
    itself was started in. C(qemu-img amend -f qcow2 -o data_file=/full/name), run in the folder where it is, records
    its full name.
  - Chains of up to 200 images with up to 16384 bitmaps are followed. Dirty bytes are counted where up to 2**33 bits of
    one disk have to be looked at; beyond that they are null, with a warning.
seealso:
  - module: kvmfleet.qcow2.domain_info
  - module: kvmfleet.qcow2.qcow2_overlay
  - module: kvmfleet.qcow2.qcow2_bitmap
  - name: A whole fleet
    description: P(kvmfleet.qcow2.overlay#role) and its playbook use this module on all hosts, with a report.
    link: https://github.com/kvmfleet/qcow2/blob/main/docs/fleet.md
  - name: Incremental backup internals of libvirt
    description: The rules by which a checkpoint is valid.
    link: https://libvirt.org/kbase/internals/incremental-backup.html
extends_documentation_fragment:
  - kvmfleet.qcow2.attributes
attributes:
  check_mode:
    details: It only reads.
  diff_mode:
    support: none
    details: It changes nothing.
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Go on to the backups only if the next increment of every disk is possible
  kvmfleet.qcow2.qcow2_info:
    paths:
      - /srv/web.qcow2
      - /srv/db.qcow2
    checkpoint: monday
    dirty_bytes: false
    fail_on: invalid

- name: Find the images of a host
  ansible.builtin.find:
    paths: /srv
    patterns: "*.qcow2"
  register: found

- name: Look at all of them
  kvmfleet.qcow2.qcow2_info:
    paths: "{{ found.files | map(attribute='path') | sort }}"
    fail_on: never
  register: chains

- name: Show a table of them, with the state of each checkpoint
  ansible.builtin.debug:
    msg: "{{ table.splitlines() }}"
  vars:
    table: |-
      {% for disk in chains.disks %}
      {{ disk.path }}: {{ disk.msg | default(disk.images | map(attribute='path') | join(' > ')) }}
      {% for checkpoint in disk.checkpoints %}
      {{ '  %-20s %-14s %15s' | format(checkpoint.name, checkpoint.problem or 'valid', checkpoint.dirty_bytes) }}
      {% endfor %}
      {% endfor %}

- name: Tell how much the next increments since one checkpoint would copy, over all hosts of the play
  ansible.builtin.debug:
    msg: "{{ ansible_play_hosts | map('extract', hostvars, ['chains', 'disks']) | flatten
      | map(attribute='checkpoints') | flatten | selectattr('name', 'equalto', 'monday')
      | selectattr('dirty_bytes', 'number') | map(attribute='dirty_bytes') | sum | human_readable }}"
  run_once: true
"""

RETURN = r"""
disks:
  description:
    - Every disk that was asked for, in that order. Always a list.
    - Also returned when the task fails.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The topmost image, as it was asked for.
      type: str
      sample: /srv/web.snap.qcow2
    in_use:
      description: Whether a process, most likely a running VM, has it open for writing; null if it could not be opened.
      type: bool
      sample: false
    images:
      description: The images of the chain, from the top to the base, as far as they could be read.
      type: list
      elements: dict
      contains:
        path:
          description: The name under which QEMU opens it.
          type: str
          sample: /srv/web.snap.qcow2
        format:
          description:
            - Its format, as the image above it records. Of the topmost image, and where none is recorded, the format
              for which QEMU would take it. Only qcow2 is looked into.
          type: str
          sample: qcow2
        virtual_size:
          description: Virtual size in bytes; null if the format is neither qcow2 nor raw, nor V(file) or the like.
          type: int
          sample: 10737418240
        actual_size:
          description: Bytes that it takes on its file system.
          type: int
          sample: 458752
        in_use:
          description: Whether a process has this image open for writing.
          type: bool
          sample: false
        cluster_size:
          description:
            - Cluster size in bytes.
            - Null if it is not qcow2, as are RV(disks[].images[].compat), RV(disks[].images[].backing_file),
              RV(disks[].images[].backing_format) and RV(disks[].images[].data_file).
          type: int
          sample: 65536
        compat:
          description: Version of the format, as qemu-img names it, V(0.10) or V(1.1).
          type: str
          sample: "1.1"
        backing_file:
          description: The backing file as it is recorded; null if there is none.
          type: str
          sample: /srv/web.qcow2
        backing_format:
          description: Format of the backing file as it is recorded; null if it is not.
          type: str
          sample: qcow2
        encrypted:
          description: Whether it is encrypted.
          type: bool
          sample: false
        corrupt:
          description: Whether QEMU has marked it corrupt. Of an image below the topmost one that is a warning.
          type: bool
          sample: false
        dirty:
          description: Whether its reference counts were not saved properly, which QEMU mends when it opens it.
          type: bool
          sample: false
        data_file:
          description: Its external data file as it is recorded; null if there is none.
          type: str
          sample: null
        lost_bitmaps:
          description: Number of bitmaps that a program which does not know them has made worthless.
          type: int
          sample: 0
        bitmaps:
          description: The bitmaps that are stored in this image.
          type: list
          elements: dict
          contains:
            name:
              description: Name of the bitmap, which libvirt calls a checkpoint.
              type: str
              sample: monday
            granularity:
              description: Bytes that one bit covers.
              type: int
              sample: 65536
            recording:
              description: Whether it is recording, which QEMU calls V(auto).
              type: bool
              sample: true
            inconsistent:
              description:
                - Whether it was not saved properly, which QEMU calls V(in-use).
                - Null while a process has the image open for writing, since then every bitmap is marked so.
              type: bool
              sample: false
            persistent:
              description: Whether it is kept when the VM is shut off, as every stored bitmap is.
              type: bool
              sample: true
            dirty_bytes:
              description: Bytes that are marked in this image; null if it was not, or cannot be, counted.
              type: int
              sample: 131072
    checkpoints:
      description: Every bitmap name found anywhere in the chain.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the checkpoint.
          type: str
          sample: monday
        valid:
          description:
            - Whether an incremental backup since it is possible. The bitmap must be in the topmost image, and in all
              below it down to the one where it begins, everywhere recording, nowhere inconsistent, and these images
              must have one virtual size.
            - Null if it cannot be told.
          type: bool
          sample: true
        problem:
          description:
            - V(not_in_top), V(gap), V(not_recording), V(inconsistent), V(different_size), V(lost) or V(older) if it
              is not valid.
            - V(in_use) if it cannot be told because a process, most likely the running VM, has the image open for
              writing. V(incomplete) if it cannot be told because not the whole chain was read, or because an image that
              a killed run was merging down is not in it any more.
            - Null if it is valid.
          type: str
          sample: null
        image:
          description: The image at fault; null if it is valid.
          type: str
          sample: null
        advice:
          description: What it means and what to do; null if it is valid.
          type: str
          sample: null
        dirty_bytes:
          description:
            - Bytes that the next incremental backup since this checkpoint would copy, in granules of the bitmap in the
              topmost image. The bitmaps of all images are taken together, as a backup does.
            - Null if it is not valid or was not counted.
          type: int
          sample: 196608
        dirty_bytes_top:
          description:
            - Bytes that the bitmap of the topmost image alone marks. A backup tool that reads only this bitmap would
              copy so much.
            - Null if RV(disks[].checkpoints[].dirty_bytes) is.
          type: int
          sample: 65536
        top_alone:
          description:
            - Whether the bitmap of the topmost image alone marks all that changed since the checkpoint. If not, an
              increment by a tool that reads only this bitmap (C(qemu-nbd -B), or C(blockdev-backup) with
              C(sync=incremental)) would be silently incomplete. libvirt's own backups read the whole chain.
            - Null if RV(disks[].checkpoints[].dirty_bytes) is.
          type: bool
          sample: false
    unfinished:
      description:
        - What runs that were killed have left unfinished on images of the chain, and which call completes it. A commit
          or the healing of bitmaps leaves such traces.
        - Null if nothing is unfinished.
      type: str
      sample: null
    msg:
      description: Why not everything could be read, or why no VM could start on it.
      returned: when there is such a reason
      type: str
    code:
      description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
      returned: when there is such a reason
      type: str
      sample: damaged
code:
  description: The kind of the first failure, one word. The collection's documentation lists all, with what to do.
  returned: when the task fails
  type: str
  sample: not_valid
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Refusal, printable
from ..module_utils._disk.examine import ExaminedChain, examine_chain
from ..module_utils._module import Report, image_paths, run


def failures(disks: t.Sequence[ExaminedChain], fail_on: str, checkpoint: str | None) -> list[Refusal]:
    """Return why the task is to fail."""
    if fail_on == "never":
        return []
    problems = [disk.problem for disk in disks if disk.problem]
    return problems + [fault for disk in disks for fault in disk.faults(checkpoint) if fail_on == "invalid"]


def work(module: AnsibleModule) -> Report:
    """Examine the disks."""
    params = module.params
    disks = [examine_chain(path, follow=params["chain"], count=params["dirty_bytes"]) for path in image_paths(params)]
    return Report(
        result={"changed": False, "disks": [disk.as_result() for disk in disks]},
        failures=failures(disks, params["fail_on"], params["checkpoint"]),
        warnings=[printable(warning) for disk in disks for warning in disk.warnings],
    )


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "str"},
            "paths": {"type": "raw"},
            "chain": {"type": "bool", "default": True},
            "dirty_bytes": {"type": "bool", "default": True},
            "checkpoint": {"type": "str"},
            "fail_on": {"type": "str", "choices": ["never", "error", "invalid"], "default": "error"},
        },
        mutually_exclusive=[("path", "paths")],
        required_one_of=[("path", "paths")],
        supports_check_mode=True,
    )
    run(module, work)


if __name__ == "__main__":
    main()
