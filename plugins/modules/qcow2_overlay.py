#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make qcow2 overlays of shut-off VMs that go on recording the incremental backups' bitmaps."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qcow2_overlay
short_description: Make qcow2 overlays that go on recording the dirty bitmaps of the image below
version_added: 0.1.0
description:
  - Makes a new qcow2 image, the overlay, on top of the topmost image of a disk of a VM that is shut off (an external,
    disk-only snapshot). The image below, called ACTIVE here, is never written to.
  - Every dirty bitmap of ACTIVE that is recording and not inconsistent goes on recording in the overlay, with the same
    name and granularity, so that incremental backups go on. C(qemu-img create) alone would drop the bitmaps, and the
    next backup would have to be a full one.
  - After a run each overlay either is complete, as verified by reading it back, or does not exist. Nothing that exists
    already is ever replaced.
  - The VM still has to be pointed at the overlay afterwards.
options:
  path:
    description:
      - The overlay's file, as an absolute path. C(~) and variables are not expanded.
      - Required unless O(overlays) is given.
    type: str
  backing_file:
    description:
      - ACTIVE, the topmost image of the disk's chain, a file or a block device, as an absolute path. It is recorded in
        the overlay just as it is given here, and a relative backing file of its own is looked for beside this name.
      - Required with O(path).
    type: str
  overlays:
    description:
      - Several overlays in one call, which is much faster than a loop. The result is in the same order.
      - Give all disks of a VM, with O(overlays[].vm), in the order in which the VM has them. A VM that is started
        meanwhile then fails at its first disk. A QEMU that can open its first disk but not its second one, whatever the
        reason, ends with the bitmaps of the first inconsistent. So while others of its overlays are made, those that
        it has already are locked too, and must not be in use.
      - Options that an item does not give are taken from the options of the task.
    type: list
    elements: dict
    suboptions:
      path:
        description: As O(path).
        type: str
        required: true
      backing_file:
        description: As O(backing_file).
        type: str
        required: true
      backing_format:
        description: As O(backing_format).
        type: str
        choices: [qcow2, raw]
      vm:
        description:
          - A name of the VM, free to choose. Overlays with the same O(overlays[].vm) are made all or none, while one
            VM that fails does not stop the others; the task fails at the end, with every result.
          - Overlays without it all belong together.
        type: str
      relative:
        description: As O(relative).
        type: bool
      cluster_size:
        description: As O(cluster_size).
        type: bytes
      extended_l2:
        description: As O(extended_l2).
        type: bool
      lazy_refcounts:
        description: As O(lazy_refcounts).
        type: bool
      refcount_bits:
        description: As O(refcount_bits).
        type: int
      compression_type:
        description: As O(compression_type).
        type: str
        choices: [zlib, zstd]
  backing_format:
    description:
      - Format of ACTIVE. It is never guessed.
      - An ACTIVE that is V(raw) has no bitmaps.
    type: str
    choices: [qcow2, raw]
    default: qcow2
notes:
  - Needs C(qemu-storage-daemon) or a QEMU system emulator on the managed host, version 5.2 or newer, and Python 3.9 or
    newer with its standard library.
  - An overlay that exists already is V(present) when it is a qcow2 image of at least the size of ACTIVE, on top of
    ACTIVE, with its format recorded, and every bitmap of ACTIVE that must go on recording is recording in it and not
    inconsistent. Anything else is drift, which fails the task and changes nothing. A different granularity is only
    worth a warning.
  - Refused is an ACTIVE that a running VM has open, or, if it has recording bitmaps, that a running VM has as a backing
    file. QEMU's own locks tell, so this works on local file systems and on network file systems with locks. While
    overlays are made, no VM can start on their ACTIVE.
  - Of an ACTIVE on a block device, the processes of the host are looked through as well, since libvirt gives each VM
    device nodes, and so locks, of its own. There a VM that starts in the very moment of the run is not kept from it.
  - Refused is a place for the overlay to which a symlink leads that belongs neither to root, nor to the owner of the
    folder that it leads to, nor to who runs the module. Its owner could have the overlay made anywhere.
  - Handled are up to 4096 bitmaps of an image, up to 4 GiB of bitmap data together, and chains of up to 200 images.
  - The overlays of one VM are put into place within a millisecond, but one after the other. If the run is killed by
    SIGKILL or a power loss just then, some of them are there, each complete, and the next run makes the others.
  - Without a bitmap to carry over, the overlay is made all the same.
seealso:
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
- name: Snapshot one disk of a VM that is shut off
  kvmfleet.qcow2.qcow2_overlay:
    path: /srv/vm1.snap.qcow2
    backing_file: /srv/vm1.qcow2

- name: Snapshot the disks of two VMs, each VM all or none
  kvmfleet.qcow2.qcow2_overlay:
    overlays:
      - {vm: web, path: /srv/web-a.snap.qcow2, backing_file: /srv/web-a.qcow2}
      - {vm: web, path: /srv/web-b.snap.qcow2, backing_file: /srv/web-b.qcow2}
      - {vm: db, path: /srv/db.snap.qcow2, backing_file: /srv/db.raw, backing_format: raw}
  register: snapshot

- name: Show the bitmaps that go on recording
  ansible.builtin.debug:
    msg: "{{ item.path }}: {{ item.bitmaps | map(attribute='name') | join(', ') }}"
  loop: "{{ snapshot.overlays }}"
  loop_control:
    label: "{{ item.path }}"

- name: Lay out the overlay for small random writes
  kvmfleet.qcow2.qcow2_overlay:
    path: /srv/vm2.snap.qcow2
    backing_file: /srv/vm2.qcow2
    cluster_size: 128K
    extended_l2: true
    relative: true
    mode: "0640"
"""

RETURN = r"""
overlays:
  description:
    - Every overlay that was asked for, in that order. Always a list, and the same in check mode.
    - Also returned when the task fails.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The overlay, as it was asked for.
      type: str
      sample: /srv/vm1.snap.qcow2
    backing_file:
      description: ACTIVE, as it was asked for.
      type: str
      sample: /srv/vm1.qcow2
    backing_format:
      description: Format of ACTIVE.
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
      description: The bitmaps of ACTIVE that go on recording in the overlay.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the bitmap, which libvirt calls a checkpoint.
          type: str
          sample: monday
        granularity:
          description: Bytes that one bit covers, in the overlay.
          type: int
          sample: 65536
    skipped_bitmaps:
      description: The bitmaps of ACTIVE that do not go on recording.
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
          sample: disabled
    msg:
      description: Why it failed.
      returned: when RV(overlays[].state) is V(failed)
      type: str
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Qcow2Error
from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.run import make_overlays
from ..module_utils._disk.verdict import OverlayRequest
from ..module_utils._module import (
    BACKING_FORMATS,
    creation_from,
    creation_spec,
    exit_with,
    ownership_spec,
    settings_from,
)


def argument_spec() -> dict[str, t.Any]:
    """Return the options of the module."""
    item = {
        "path": {"type": "str", "required": True},
        "backing_file": {"type": "str", "required": True},
        "backing_format": {"type": "str", "choices": BACKING_FORMATS},
        "vm": {"type": "str"},
        **creation_spec(defaults=False),
    }
    return {
        "path": {"type": "str"},
        "backing_file": {"type": "str"},
        "overlays": {"type": "list", "elements": "dict", "options": item},
        "backing_format": {"type": "str", "choices": BACKING_FORMATS, "default": "qcow2"},
        "timeout": {"type": "int", "default": 60},
        **creation_spec(defaults=True),
        **ownership_spec(),
    }


def wanted_overlays(params: dict[str, t.Any]) -> list[OverlayRequest]:
    """Return the overlays that the task asks for; what an item leaves open comes from the task."""
    wanted = []
    for item in [params] if params["overlays"] is None else params["overlays"]:
        own = {**params, **{option: value for option, value in item.items() if value is not None}}
        wanted.append(
            OverlayRequest(
                path=own["path"],
                backing_file=own["backing_file"],
                backing_format=own["backing_format"],
                vm=own.get("vm"),
                relative=own["relative"],
                creation=creation_from(own),
            )
        )
    return wanted


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=argument_spec(),
        mutually_exclusive=[("path", "overlays"), ("backing_file", "overlays")],
        required_one_of=[("path", "overlays")],
        required_together=[("path", "backing_file")],
        supports_check_mode=True,
    )
    if module.params["overlays"] is None and None in (module.params["path"], module.params["backing_file"]):
        module.fail_json(msg="path and backing_file, or overlays, must have a value that is not null.")
    try:
        with ending_cleanly():
            outcome = make_overlays(wanted_overlays(module.params), settings_from(module))
    except Qcow2Error as exc:
        module.fail_json(msg=str(exc))
    exit_with(module, outcome)


if __name__ == "__main__":
    main()
