#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell what every libvirt domain of a host has: chains, snapshots, checkpoints, and what its next backup can be."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_info
short_description: Tell of libvirt domains whether their next incremental backup is possible, and if not, why
version_added: 1.0.0
description:
  - Looks at domains, running ones too, with all their disks. Tells which snapshots they are on, what each checkpoint is
    worth, what was left behind, and whether the next backup can be an incremental one.
  - A checkpoint counts as valid only if it is valid on every disk that takes part in it.
  - Never writes, and takes no lock, so it is safe to use while VMs run.
options:
  name:
    description:
      - Names of domains, or patterns of names such as V(web*), as a list. By default all domains of the host.
      - A name that does not exist is a failure; a pattern that matches nothing is worth a warning.
      - A name that is empty, or has a blank around it, is refused. Such a one is most likely of a text with commas.
    type: list
    elements: str
    default: ["*"]
  dirty_bytes:
    description:
      - Count the dirty bytes of each bitmap and each valid checkpoint, which reads the bitmaps' bits.
    type: bool
    default: true
  uri:
    description: The libvirt daemon to talk to, on the managed host.
    type: str
    default: qemu:///system
requirements:
  - python3-libvirt (libvirt-python) on the managed host
  - Python 3.9 or newer on the managed host
notes:
  - A domain that is broken is no failure. Its verdicts say what is wrong; judge them in the playbook. The task fails if
    libvirt cannot be asked, or cannot tell about a domain, and if a name that is no pattern matches nothing. All that
    could be read is returned in any case.
  - Of a domain that is B(not shut off) what is stored in its images tells nothing about its checkpoints, since the
    bitmaps are in the memory of its QEMU. libvirt is asked instead, which does not taint the domain (as C(virsh
    checkpoint-dumpxml --size) does). It tells whether a checkpoint is valid, and how much is dirty, and not which image
    is at fault. It waits for other work on the domain, such as a migration. After 10 seconds it is left at that, and
    nothing is told about the checkpoints of this domain.
  - Of a domain that runs, the disks are those that it runs with. The next start may use others.
  - Whether a checkpoint of a domain that is shut off is valid is told by the images, as M(kvmfleet.qcow2.qcow2_info)
    does. If the definition states another backing chain than the images record, or QEMU would not find an external
    data file, since it is recorded without its folder, nothing can be told.
  - The chain of a disk on the network is not read.
  - Times are in seconds since 1970.
seealso:
  - module: kvmfleet.qcow2.qcow2_info
  - module: kvmfleet.qcow2.domain_overlay
  - name: A whole fleet
    description: P(kvmfleet.qcow2.overlay#role) and its playbook make snapshots on all hosts, with a report.
    link: https://github.com/kvmfleet/qcow2/blob/main/docs/fleet.md
  - name: Incremental backup internals of libvirt
    description: The rules by which a checkpoint is valid.
    link: https://libvirt.org/kbase/internals/incremental-backup.html
extends_documentation_fragment:
  - kvmfleet.qcow2.attributes
  - kvmfleet.qcow2.attributes.actiongroup
attributes:
  action_group:
    membership: [kvmfleet.qcow2.libvirt]
  check_mode:
    details: It only reads.
  diff_mode:
    support: none
    details: It changes nothing.
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Look at all domains of the host
  kvmfleet.qcow2.domain_info:
  register: host

- name: Fail if any of them needs a full backup
  ansible.builtin.assert:
    that: host.domains | rejectattr('next_backup', 'eq', 'incremental') | length == 0
    fail_msg: "{{ host.domains | rejectattr('next_backup', 'eq', 'incremental')
      | items2dict('name', 'next_backup_reason') | to_nice_yaml }}"

- name: Show how much the next increment of each domain copies
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ sizes | map('human_readable') | first | default('not counted') }}"
  vars:
    sizes: "{{ item.checkpoints | selectattr('name', 'eq', item.next_backup_since)
      | map(attribute='dirty_bytes') | select('number') | list }}"
  loop: "{{ host.domains | selectattr('next_backup_since') }}"
  loop_control:
    label: "{{ item.name }}"

- name: List the snapshots that each disk is on, the newest first
  ansible.builtin.debug:
    msg: "{{ host.domains | map(attribute='disks') | flatten | map(attribute='images') | flatten
      | selectattr('snapshot') | items2dict('path', 'snapshot') }}"

- name: Look at the web servers only, without reading the bits of their bitmaps
  kvmfleet.qcow2.domain_info:
    name: ["web*"]
    dirty_bytes: false
"""

RETURN = r"""
domains:
  description:
    - Every domain that was asked for. Always a list.
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
      description: UUID of the domain; null if there is no such domain.
      type: str
      sample: 4dea22b3-1d52-d8f3-2516-782e98ab3fa0
    state:
      description:
        - V(shut off), V(running), V(paused), V(blocked), V(shutting down), V(suspended), V(crashed), or V(active) if
          libvirt has another word for it. Null if the domain cannot be looked at.
      type: str
      sample: running
    managed_save:
      description: Whether it has a managed save, whose restore goes on with the disks that it had then.
      type: bool
      sample: false
    nvram:
      description:
        - The file or block device in which the firmware (UEFI) keeps its variables, which is B(not) in the snapshot;
          null if there is none.
      type: str
      sample: /var/lib/libvirt/qemu/nvram/web_VARS.fd
    tpm:
      description:
        - Whether the domain has a TPM in software, whose state is B(not) in the snapshot. Null if there is no such
          domain.
      type: bool
      sample: false
    libvirt_snapshots:
      description: Names of the snapshots that libvirt itself has of the domain.
      type: list
      elements: str
      sample: []
    disks:
      description: All disks of the domain, in the order of its definition.
      type: list
      elements: dict
      contains:
        target:
          description: The disk.
          type: str
          sample: vda
        source:
          description: Its topmost image; null if it has none that is a file or a block device.
          type: str
          sample: /srv/web.monday.qcow2
        unfit:
          description:
            - Why it could take no part in a snapshot by M(kvmfleet.qcow2.domain_overlay); null if it can. Of a block
              device it says what is needed.
          type: str
          sample: cdrom
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
                - Its format, as the image above it records. Of the topmost image, and where none is recorded, the
                  format for which QEMU would take it. Only qcow2 is looked into.
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
                - Null if it is not qcow2, as are RV(domains[].disks[].images[].compat),
                  RV(domains[].disks[].images[].backing_file), RV(domains[].disks[].images[].backing_format) and
                  RV(domains[].disks[].images[].data_file).
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
            modified:
              description: When the file was written to last, in seconds since 1970; null of a block device.
              type: int
              sample: 1767225600
            made:
              description:
                - When it was made, in seconds since 1970; null unless M(kvmfleet.qcow2.domain_overlay) of version 1.1.0
                  or later has made it.
              type: int
              sample: 1767225600
              version_added: 1.1.0
            snapshot:
              description:
                - The name of the snapshot that it is, of those made by M(kvmfleet.qcow2.domain_overlay) for this disk.
                  Null if it bears no mark of this domain and this disk.
              type: str
              sample: monday
        msg:
          description:
            - Why not everything could be read, or why no VM could start on it.
            - Or that the domain runs, and its QEMU has other files open than stand at the paths of its images.
          returned: when there is such a reason
          type: str
        code:
          description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
          returned: when there is such a reason
          type: str
          sample: damaged
    checkpoints:
      description: The checkpoints that libvirt knows of the domain, over all their disks, the oldest one first.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the checkpoint.
          type: str
          sample: monday
        created:
          description: When it was made, in seconds since 1970.
          type: int
          sample: 1767225600
        parent:
          description: Name of the checkpoint before it; null if there is none.
          type: str
          sample: sunday
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
            - V(broken) if it is not valid by the word of libvirt, which does not say why, since the domain runs.
            - V(in_use) of a running domain if its QEMU has an image below the topmost one open for writing, for a block
              job, or since it could not store its bitmaps as it was left.
            - V(swapped) if it is not valid because a disk has the images, by their paths, that another one had when it
              was made.
          type: str
          sample: null
        image:
          description: The image at fault; null if it is valid, or if nobody can tell which it is.
          type: str
          sample: null
        advice:
          description: What it means and what to do; null if it is valid.
          type: str
          sample: null
        dirty_bytes:
          description:
            - Bytes that the next incremental backup since this checkpoint would copy, of all its disks together.
            - Null if it is not valid or was not counted.
          type: int
          sample: 196608
        top_alone:
          description:
            - Whether the bitmaps of the topmost images alone mark all that changed since the checkpoint. If not, an
              increment by a tool that reads only these bitmaps (C(qemu-nbd -B), or C(blockdev-backup) with
              C(sync=incremental)) would be silently incomplete. libvirt's own backups read the whole chain.
            - Null if RV(domains[].checkpoints[].dirty_bytes) is, and of a domain that is not shut off.
          type: bool
          sample: false
        bitmaps:
          description: The name of its bitmap by disk, for each disk that takes part in it.
          type: dict
          sample: {"vda": monday}
    orphan_bitmaps:
      description:
        - The bitmaps of the topmost images that no checkpoint of the domain refers to, of disks that have such. Each
          costs memory and time, and none is of use to libvirt.
        - Null if it cannot be told, because a process, most likely the running VM, has such an image open for writing.
      type: list
      elements: dict
      contains:
        target:
          description: The disk.
          type: str
          sample: vda
        image:
          description: Its topmost image.
          type: str
          sample: /srv/web.monday.qcow2
        bitmaps:
          description: Names of the bitmaps.
          type: list
          elements: str
          sample: [forgotten]
    unfinished:
      description:
        - Work on the chains, commits (C(state=committed)) and healings (M(kvmfleet.qcow2.qcow2_bitmap)), that a killed
          run has left unfinished.
        - Also that the file systems of a guest may have been left frozen, by a snapshot that C(quiesce) was asked for.
      type: list
      elements: dict
      contains:
        target:
          description: The disk; null if it is the whole domain.
          type: str
          sample: vda
        image:
          description: The image that is worked on; of a commit the one that all goes into. Null if there is none.
          type: str
          sample: /srv/web.qcow2
        kind:
          description: V(commit), V(healing), or V(quiesce) for a guest that may have been left frozen.
          type: str
          sample: commit
        snapshot:
          description:
            - Of a commit the snapshot of the domain that is merged down. M(kvmfleet.qcow2.domain_overlay) with
              C(state=committed) and this name completes it.
            - Null of a healing, and if it is none of this collection's snapshots of the domain.
          type: str
          sample: monday
        what:
          description: What it is.
          type: str
          sample: the commit of /srv/b.qcow2 into it is unfinished (vault /srv/.a.qcow2.kvmfleet-vault)
        completed_by:
          description: What completes it, once the domain is shut off.
          type: str
          sample: Complete it with kvmfleet.qcow2.domain_overlay, state=committed, snapshot=monday and …
    next_backup:
      description:
        - V(incremental) if an incremental backup of the domain is possible, V(full) if only a full one is, V(unknown)
          if that cannot be told.
        - All disks count that libvirt takes into a backup unless told otherwise. A qcow2 disk that the domain did not
          have yet when the checkpoint was made needs a full backup; one that was left out of the checkpoint then does
          not count.
      type: str
      sample: incremental
    next_backup_since:
      description: Name of the newest checkpoint since which an increment is possible; null if there is none.
      type: str
      sample: monday
    next_backup_reason:
      description: Why, in a few sentences. Also why not since a newer checkpoint.
      type: str
      sample: An increment since the checkpoint 'monday' is possible.
    msg:
      description: Why the domain cannot be looked at. Everything else is null, empty or V(unknown) then.
      returned: when it cannot
      type: str
    code:
      description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
      returned: when it cannot
      type: str
      sample: no_domain
code:
  description: The kind of the first failure, one word. The collection's documentation lists all, with what to do.
  returned: when the task fails
  type: str
  sample: no_domain
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import printable
from ..module_utils._disk.verdict import root_causes
from ..module_utils._domain.look import DomainLook, look, unreadable_as_result
from ..module_utils._libvirt.bindings import LIBVIRT_IMPORT_ERROR
from ..module_utils._libvirt.connection import Libvirt, Unreadable
from ..module_utils._module import Report, check_names, require, run


def work(module: AnsibleModule) -> Report:
    """Look at the domains."""
    params = module.params
    check_names(params, "name")
    looks, warnings = look(Libvirt(params["uri"]), params["name"], counts=params["dirty_bytes"])
    domains = [one.as_result() if isinstance(one, DomainLook) else unreadable_as_result(one) for one in looks]
    return Report(
        result={"changed": False, "domains": domains},
        failures=root_causes(one.problem for one in looks if isinstance(one, Unreadable)),
        warnings=[printable(warning) for warning in warnings],
    )


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "default": ["*"]},
            "dirty_bytes": {"type": "bool", "default": True},
            "uri": {"type": "str", "default": "qemu:///system"},
        },
        supports_check_mode=True,
    )
    require(module, "libvirt-python", LIBVIRT_IMPORT_ERROR)
    run(module, work)


if __name__ == "__main__":
    main()
