#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Put libvirt domains that are shut off on overlays that go on recording the incremental backups' bitmaps."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_overlay
short_description: Put libvirt domains that are shut off on overlays, and keep their checkpoints usable
version_added: 0.1.0
description:
  - Makes an overlay (an external, disk-only snapshot) for every disk of a domain, or for none, and switches the
    domain's definition to the overlays.
  - Every dirty bitmap that is recording and not inconsistent goes on recording in the overlays, so that the domain's
    checkpoints stay usable and incremental backups go on. libvirt itself refuses an offline snapshot as soon as a
    domain has a checkpoint.
  - In the definition only the path of each disk changes, and its type and format if these were others. A
    C(<backingStore>) is dropped, since it would end at the wrong image, and so is a C(<dataStore>). The definition is
    read back. If it cannot be changed, the overlays are removed again and the old definition stands.
  - A disk that is a volume of a storage pool becomes a file. The pools of type V(dir) in whose folders overlays
    were made are refreshed, so that C(virsh vol-list) has them. Refresh pools of other types with
    C(virsh pool-refresh).
options:
  name:
    description:
      - Names of domains, or patterns of names such as V(web*), as a list.
      - A name that does not exist is a failure; a pattern that matches nothing is worth a warning.
    type: list
    elements: str
    required: true
  snapshot:
    description:
      - Name of the snapshot. The overlay of C(web.qcow2) is called C(web.SNAPSHOT.qcow2). The name of an earlier
        snapshot that this module has made is replaced, so names do not grow. See O(directory) for the names there.
      - A domain that is on the snapshot of this name already, or on one above it, is left as it is. The overlay bears a
        mark that tells so (the UUID of the domain, the disk and the snapshot), whatever the file is called by now.
      - An image without the mark that is called as the snapshot would be may be the snapshot, or a clone of a template.
        It counts as the snapshot if an image below it is known to have been the domain's disk, by its mark or by a
        checkpoint, and no other disk has it. Else the domain is refused as ambiguous.
    type: str
    required: true
  disks:
    description:
      - Targets of the disks to take, such as V(vda). By default all that can take part.
      - A disk that is named and cannot take part is a failure.
    type: list
    elements: str
  directory:
    description:
      - Where to make the overlays, as an absolute path of a folder. By default beside the image of each disk.
      - An overlay there is called C(DOMAIN.TARGET.SNAPSHOT.qcow2), such as C(web.vda.monday.qcow2), so that a folder
        can be that of many domains.
      - Needed for disks on block devices.
    type: str
  running:
    description:
      - What becomes of a domain that is running or paused, and not on the snapshot yet.
      - V(fail) makes it a failure. V(skip) leaves it out, for a run over everything that happens to be shut off.
    type: str
    choices: [fail, skip]
    default: fail
  libvirt_snapshots:
    description:
      - What becomes of a domain of which libvirt has snapshots of its own (C(virsh snapshot-list)), internal ones or
        external ones with metadata.
      - V(fail) refuses it. C(virsh snapshot-revert) would rewrite, or delete, the image below the overlay.
      - V(ignore) goes on. Never revert to such a snapshot then.
    type: str
    choices: [fail, ignore]
    default: fail
  unfit_disks:
    description:
      - What becomes of a domain with a disk that it writes to, that cannot take part, and that nobody has excluded, by
        O(disks) or with C(snapshot='no') in the definition.
      - V(fail) refuses it before anything is made, since it would get half a snapshot. V(skip) leaves the disk out,
        with a warning.
      - CD-ROM and floppy drives never count; nor do disks that are read-only, or transient (what is written to them is
        thrown away), or whose file is absent while C(startupPolicy='optional') lets the domain start without it.
    type: str
    choices: [fail, skip]
    default: fail
  uri:
    description: The libvirt daemon to talk to, on the managed host.
    type: str
    default: qemu:///system
requirements:
  - python3-libvirt (libvirt-python) on the managed host
notes:
  - Besides python3-libvirt it needs what M(kvmfleet.qcow2.qcow2_overlay) needs, and refuses what that refuses.
  - A domain is refused if it is running, paused or suspended (see O(running)), if it is transient, if it has a managed
    save (whose restore would write below the overlays), or if its definition states another backing chain than the
    images record. A domain that fails does not stop the others; the task fails at the end, with every result.
  - These can take no part, and are returned with the reason. CD-ROM and floppy drives; disks that are read-only,
    shareable, transient, encrypted or on the network; volumes of a pool that is not active, or that is neither of files
    nor of block devices; block devices, unless O(directory) is given; disks whose C(<source>) has what an overlay
    cannot have (such as C(<slices>), C(<reservations>) or C(fdgroup)). O(unfit_disks) says what becomes of the domain
    then. Disks with C(snapshot='no') in the definition are left out, unless O(disks) names them.
  - Not in the snapshot, and not returned to what it was by going back. The variables of the firmware (see
    RV(domains[].nvram)); the state of a TPM in software (see RV(domains[].tpm)); the memory of the domain; files that
    C(virsh save) has written. Never restore such a file once the domain is on overlays, since that writes to the images
    below them. A domain with a managed save is refused; other files of C(virsh save) cannot be known.
  - For a B(running) domain libvirt itself is the better way. C(virsh snapshot-create-as --disk-only --no-metadata)
    makes the overlays, and lets the bitmaps go on, without any help.
  - Of a domain that is shut off libvirt alone can do it too, by starting it paused, taking a live snapshot, and
    destroying it. That needs the memory, the network and all devices of the domain, takes seconds for each domain, and
    skips bitmaps that are not valid without a word. It is the better way if this collection cannot be used on the host.
  - No snapshot is added to C(virsh snapshot-list). To go back, switch the definition to the images below and move the
    overlays away. Never use C(virsh snapshot-revert) on a domain that is on overlays, see O(libvirt_snapshots).
  - While overlays are made, the domain cannot be started. Its first disk is locked too, even if it takes no part. It
    must not be in use. A QEMU that gets its first disk but not its second exits and leaves the first disk's bitmaps
    inconsistent.
  - If the host dies between making the overlays and switching the definition, the next run finds the overlays and
    completes the switch. An image of the same name that does not bear the mark, or on which a VM has run, is never
    taken for one of them.
  - The O(timeout) does not cover the libvirt daemon. If somebody else changes the definition in the very moment of the
    switch, that change may be lost. libvirt has no way to prevent that.
seealso:
  - module: kvmfleet.qcow2.qcow2_overlay
  - module: kvmfleet.qcow2.qcow2_info
  - name: Incremental backup internals of libvirt
    description: The algorithm that this module follows, in the section about offline snapshots with bitmaps.
    link: https://libvirt.org/kbase/internals/incremental-backup.html
extends_documentation_fragment:
  - kvmfleet.qcow2.attributes
  - kvmfleet.qcow2.creation
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Snapshot all web servers of the host before an upgrade
  kvmfleet.qcow2.domain_overlay:
    name: ["web*"]
    snapshot: before-upgrade

- name: Snapshot everything on this host that happens to be shut off
  kvmfleet.qcow2.domain_overlay:
    name: ["*"]
    snapshot: sunday
    running: skip

- name: Snapshot one disk of a domain, on faster storage
  kvmfleet.qcow2.domain_overlay:
    name: [db]
    snapshot: monday
    disks: [vda]
    directory: /srv/fast
  register: monday

- name: Show which checkpoints can still be used
  ansible.builtin.debug:
    msg: "{{ monday.domains | map(attribute='checkpoints') | flatten | items2dict('name', 'valid') }}"
"""

RETURN = r"""
domains:
  description:
    - Every domain that was asked for. Always a list, and the same in check mode.
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
        - V(created) if it was switched to overlays, V(present) if it was on them, or above them, already, or V(failed).
        - V(skipped) if it is not shut off and O(running=skip), or if only a pattern in O(name) names it and none of its
          disks can take part. All its disks are among RV(domains[].skipped_disks).
      type: str
      sample: created
    overlays:
      description: The overlay of each disk that takes part, as M(kvmfleet.qcow2.qcow2_overlay) returns it.
      type: list
      elements: dict
      contains:
        target:
          description: The disk.
          type: str
          sample: vda
        path:
          description: The overlay. If it is V(present), the image that was taken for the snapshot.
          type: str
          sample: /srv/web.before-upgrade.qcow2
        backing_file:
          description: The image below it.
          type: str
          sample: /srv/web.qcow2
        backing_format:
          description: Format of the image below it.
          type: str
          sample: qcow2
        virtual_size:
          description: Virtual size of the overlay in bytes; null if it failed.
          type: int
          sample: 10737418240
        state:
          description: V(created), V(present) if it was there already, or V(failed).
          type: str
          sample: created
        bitmaps:
          description: The bitmaps that go on recording in the overlay.
          type: list
          elements: dict
          contains:
            name:
              description: Name of the bitmap.
              type: str
              sample: monday
            granularity:
              description: Bytes that one bit covers, in the overlay.
              type: int
              sample: 65536
        skipped_bitmaps:
          description: The bitmaps of the image below that do not go on recording.
          type: list
          elements: dict
          contains:
            name:
              description: Name of the bitmap.
              type: str
              sample: sunday
            granularity:
              description: Bytes that one bit covers.
              type: int
              sample: 65536
            reason:
              description: V(disabled) if it is not recording, V(inconsistent) if it was not saved properly.
              type: str
              sample: inconsistent
        topmost:
          description:
            - The topmost image of the disk after this task. It is the overlay, or an image above it if that was
              V(present) already.
          type: str
          sample: /srv/web.before-upgrade.qcow2
        msg:
          description: Why it failed.
          returned: when RV(domains[].overlays[].state) is V(failed)
          type: str
        code:
          description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
          returned: when RV(domains[].overlays[].state) is V(failed)
          type: str
          sample: in_use
    skipped_disks:
      description: The disks that take no part.
      type: list
      elements: dict
      contains:
        target:
          description: The disk.
          type: str
          sample: sda
        reason:
          description: Why it takes no part.
          type: str
          sample: cdrom
    checkpoints:
      description:
        - The checkpoints that libvirt knows of the domain, and whether each can be used for the next incremental backup
          after this task. See M(kvmfleet.qcow2.qcow2_info) for what the problems mean.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the checkpoint.
          type: str
          sample: monday
        valid:
          description: Whether an incremental backup since it is possible; null if that cannot be told.
          type: bool
          sample: true
        problem:
          description: Which rule is broken; null if it is valid.
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
    unfit_disks:
      description:
        - Targets of the disks that the domain writes to, that cannot take part, and that nobody has excluded. The
          reasons are in RV(domains[].skipped_disks). With O(unfit_disks=skip) they are not in the snapshot.
      type: list
      elements: str
      sample: []
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
  sample: in_use
"""

import os
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Refusal
from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.build import MakeOverlays
from ..module_utils._disk.verdict import root_causes
from ..module_utils._domain.plan import SnapshotRequest
from ..module_utils._domain.run import Call
from ..module_utils._libvirt.bindings import LIBVIRT_IMPORT_ERROR
from ..module_utils._libvirt.connection import Libvirt
from ..module_utils._module import Report, require, run
from ..module_utils._options import attributes_from, creation_from, creation_spec, ownership_spec, settings_from


def argument_spec() -> dict[str, t.Any]:
    """Return the options of the module."""
    return {
        "name": {"type": "list", "elements": "str", "required": True},
        "snapshot": {"type": "str", "required": True},
        "disks": {"type": "list", "elements": "str"},
        "directory": {"type": "str"},
        "running": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
        "libvirt_snapshots": {"type": "str", "choices": ["fail", "ignore"], "default": "fail"},
        "unfit_disks": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
        "uri": {"type": "str", "default": "qemu:///system"},
        "timeout": {"type": "int", "default": 60},
        **creation_spec(defaults=True),
        **ownership_spec(),
    }


def request_from(params: dict[str, t.Any]) -> SnapshotRequest:
    """Return what is wanted of every domain; Refusal for what cannot be."""
    snapshot, directory = params["snapshot"], params["directory"]
    if not snapshot.strip(".") or "/" in snapshot or not snapshot.isprintable():
        why = "must be a part of a file name: not empty, without slash and control characters"
        raise Refusal("bad_option", f"snapshot={snapshot!r}", why)
    if directory is not None and not (os.path.isabs(directory) and directory.isprintable()):
        why = "must be the absolute path of a folder, without control characters"
        raise Refusal("bad_option", f"directory={directory!r}", why)
    return SnapshotRequest(
        snapshot=snapshot,
        targets=None if params["disks"] is None else tuple(params["disks"]),
        directory=directory,
        bitmap_content=params["bitmap_content"],
        relative=params["relative"],
        creation=creation_from(params),
        skips_running=params["running"] == "skip",
        allows_snapshots=params["libvirt_snapshots"] == "ignore",
        skips_unfit=params["unfit_disks"] == "skip",
    )


@ending_cleanly()
def work(module: AnsibleModule) -> Report:
    """Find the domains and put them on overlays."""
    request, settings = request_from(module.params), settings_from(module)
    operation = MakeOverlays(attributes_from(module.params))
    call = Call(Libvirt(module.params["uri"]), module.params["name"], request, settings)
    domains, warnings = call.run(operation)
    result = {
        "changed": any(domain.changed for domain in domains),
        "domains": [domain.as_result() for domain in domains],
        "diff": {
            "before": "".join(domain.diff[0] for domain in domains),
            "after": "".join(domain.diff[1] for domain in domains),
        },
    }
    return Report(result, root_causes(problem for domain in domains for problem in domain.problems), warnings)


def main() -> None:
    """Run the module."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    require(module, "libvirt-python", LIBVIRT_IMPORT_ERROR)
    run(module, work)


if __name__ == "__main__":
    main()
