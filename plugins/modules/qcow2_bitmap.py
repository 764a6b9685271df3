#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make broken dirty bitmaps of shut-off VMs valid again where that is provably right, or remove bitmaps."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qcow2_bitmap
short_description: Make broken dirty bitmaps valid again where that is provably right, or remove them
version_added: 1.0.0
description:
  - Heals the dirty bitmaps in the backing chain of a disk of a VM that is shut off, so that the next incremental backup
    is possible. Crashes leave bitmaps inconsistent, and C(qemu-img create) and offline snapshots drop them.
  - An overlay differs from the image below only where it holds something itself. So where a bitmap is valid in the
    image below, it is rebuilt in the overlay from what the overlay holds. It then marks at least what has changed,
    whatever became of the bitmap in the meantime.
  - A bitmap is only ever made valid where that is right. Else it stays broken, and the result says why.
  - No data of the guest is read or written. What the bitmaps say is kept beside each image in a small file, the vault,
    before the image is written to. After a kill or a power loss the same call goes on.
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
        order. Each disk is done by itself. One that fails does not stop the others; the task fails at the end.
      - Give a real list, or the text of a list in JSON. Any other text is refused. It would have to be split at commas,
        which file names may contain.
    type: raw
  names:
    description:
      - The bitmaps, as a list like O(paths). libvirt calls them checkpoints.
      - By default all that are found in the chain. With O(state=absent) those are left out that only images have which
        other images stand on, too.
    type: raw
  state:
    description:
      - V(valid) means that an incremental backup since each of the bitmaps is possible. A bitmap that is missing or
        inconsistent in overlays is rebuilt in them, in the granularity of the image below. Above the lowest such
        overlay it is rebuilt in all, since there it may be a later one of the same name.
      - A bitmap cannot be made valid that is disabled, that is inconsistent in the lowest image with it, or that no
        image has; nor one whose images have different sizes, or below which an image has lost the bitmap.
      - V(absent) means that no image of the chain has the bitmaps. They are removed from the top downwards. An image
        that others stand on, such as a template, is never written to. If it has a bitmap of O(names), that one fails.
      - The bitmaps that are not asked for stay as they are.
    type: str
    choices: [valid, absent]
    default: valid
  assume_not_emptied:
    description:
      - Rebuild a bitmap, too, that is inconsistent in the topmost image and that no image below has. If it was made in
        that image, what the image holds tells all changes since, unless the image was emptied meanwhile by
        C(qemu-img commit) without C(-d). Neither can be seen.
      - Give your word that the checkpoint was made on this image, not on one below that has lost the bitmap since, as
        by C(qemu-img convert), and that the image was not emptied.
      - What a killed run has lost is put back without this word from what that run has kept, unless the image does not
        hold all any more that it held then.
    type: bool
    default: false
  bitmap_content:
    description:
      - V(keep) leaves it at that.
      - V(cumulative) has each valid bitmap of the topmost image mark as well all that those in the images below mark,
        also if nothing is broken. Tools that read only the topmost image are right then, see C(top_alone) of
        M(kvmfleet.qcow2.qcow2_info). Backups by libvirt unite the bitmaps of the chain in any case.
      - Where an image below the topmost one has to be written, the bitmaps of the topmost one take in those bits in
        either case, so that the topmost one alone is right meanwhile.
    type: str
    choices: [keep, cumulative]
    default: keep
  timeout:
    description:
      - Seconds that QEMU may take for one step before it is ended and the disk reported as failed. A tenth of a second
        is added for each bitmap, and a second for each MiB of bits.
      - Also the seconds to wait while another run of this collection works on the same image.
      - From 1 to 86400.
    type: int
    default: 60
requirements:
  - QEMU 5.2 or newer on the managed host, as C(qemu-storage-daemon) or a system emulator
  - Python 3.9 or newer on the managed host
notes:
  - Where nothing is to be written no QEMU is needed.
  - Refused is a disk that is in use, an image below a running VM that would have to be written, and a chain on which a
    commit is unfinished. While bitmaps are written, no VM can start on the images.
  - Other images in the folders of the chain that stand on one of its images are seen, those elsewhere are not. The
    folder of a symlink that names one of them counts, too. Images called C(.committed) or C(.reverted) count as such
    that nobody needs.
  - If the VM runs before an interrupted call is run again, its bitmaps are broken or right, but never look valid while
    bits are missing. Bitmaps that were lost are put back then with what they marked and all that the image holds.
  - The time of an image that is written to stays as it was, since it tells when its data was written last. So run this
    as root, or as the owner of the images. A backup of image files that goes by their time alone does not notice.
  - libvirt is not asked, and not told. A checkpoint whose bitmaps are removed is still known to it. For domains of
    libvirt use M(kvmfleet.qcow2.domain_checkpoint).
seealso:
  - module: kvmfleet.qcow2.domain_checkpoint
  - module: kvmfleet.qcow2.qcow2_info
  - module: kvmfleet.qcow2.domain_info
  - module: kvmfleet.qcow2.qcow2_overlay
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
    membership: [kvmfleet.qcow2.qemu]
author:
  - kvmfleet contributors (@kvmfleet)
"""

EXAMPLES = r"""
- name: Heal what a crash of the host has broken
  kvmfleet.qcow2.qcow2_bitmap:
    paths:
      - /srv/web.snap.qcow2
      - /srv/db.snap.qcow2
  register: healed
  failed_when: healed.disks is undefined

- name: Tell which checkpoints need a full backup
  ansible.builtin.debug:
    msg: "{{ item.msg }}"
  loop: "{{ healed.disks | selectattr('state', 'eq', 'failed') }}"
  loop_control:
    label: "{{ item.path }}"

- name: Have tools that read only the topmost image see all changes since one checkpoint
  kvmfleet.qcow2.qcow2_bitmap:
    path: /srv/web.snap.qcow2
    names: [monday]
    bitmap_content: cumulative

- name: Remove a checkpoint's bitmap that no backup needs any more
  kvmfleet.qcow2.qcow2_bitmap:
    path: /srv/web.snap.qcow2
    names: [monday]
    state: absent
"""

RETURN = r"""
disks:
  description:
    - Every disk that was asked for, in that order. Always a list, and the same in check mode.
    - Also returned when the task fails.
  returned: always
  type: list
  elements: dict
  contains:
    path:
      description: The topmost image, as it was asked for.
      type: str
      sample: /srv/web.snap.qcow2
    state:
      description:
        - V(rebuilt) or V(removed) if any bitmap was; V(failed) if any failed, also if others were rebuilt or removed.
        - Else V(valid) or V(absent), as O(state).
      type: str
      sample: rebuilt
    bitmaps:
      description:
        - What became of each bitmap, once for each image in which it was written. Those that were not asked for are
          told as well if they were written.
        - Empty if the whole disk failed.
      type: list
      elements: dict
      contains:
        name:
          description: Name of the bitmap, which libvirt calls a checkpoint.
          type: str
          sample: monday
        image:
          description: The image in which it was written, or the image at fault; null if no image has it.
          type: str
          sample: /srv/web.snap.qcow2
        state:
          description:
            - V(valid) if it was before. V(rebuilt) if it was made, put back, or marks more now.
            - V(removed) if it was removed from this image. V(absent) if no image had it.
            - V(failed) if nothing was done with it.
          type: str
          sample: rebuilt
        dirty_bytes_before:
          description: Bytes that it marked in this image; null if it did not tell, or was not counted.
          type: int
          sample: null
        dirty_bytes_after:
          description: Bytes that it marks in this image now; null if it is not there, or was not counted.
          type: int
          sample: 131072
        msg:
          description: Why it failed.
          returned: when RV(disks[].bitmaps[].state) is V(failed)
          type: str
        code:
          description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
          returned: when RV(disks[].bitmaps[].state) is V(failed)
          type: str
          sample: not_healable
    checkpoints:
      description: Every bitmap name found anywhere in the chain, as it is afterwards, sorted by name.
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
    msg:
      description: Why it failed.
      returned: when RV(disks[].state) is V(failed)
      type: str
    code:
      description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
      returned: when RV(disks[].state) is V(failed)
      type: str
      sample: in_use
code:
  description: The kind of the first failure, one word. The collection's documentation lists all, with what to do.
  returned: when the task fails
  type: str
  sample: in_use
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.heal import HealRequest
from ..module_utils._disk.mend import MendBitmaps
from ..module_utils._disk.run import run
from ..module_utils._module import Module, Report, image_paths, real_list
from ..module_utils._module import run as run_module
from ..module_utils._options import settings_from


def requests_from(params: dict[str, t.Any]) -> list[HealRequest]:
    """Return what the task asks for, disk by disk."""
    names = (
        None if params["names"] is None else tuple(real_list("names", params["names"], "names of bitmaps", "monday"))
    )
    return [
        HealRequest(
            path=path,
            names=names,
            state=params["state"],
            assume_not_emptied=params["assume_not_emptied"],
            cumulative=params["bitmap_content"] == "cumulative",
        )
        for path in image_paths(params)
    ]


@ending_cleanly()
def work(module: AnsibleModule) -> Report:
    """Heal the bitmaps."""
    outcome = run(MendBitmaps(), requests_from(module.params), settings_from(module))
    return Report(outcome.as_result("disks"), outcome.failures, outcome.warnings)


def main() -> None:
    """Run the module."""
    module = Module(
        argument_spec={
            "path": {"type": "str"},
            "paths": {"type": "raw"},
            "names": {"type": "raw"},
            "state": {"type": "str", "choices": ["valid", "absent"], "default": "valid"},
            "assume_not_emptied": {"type": "bool", "default": False},
            "bitmap_content": {"type": "str", "choices": ["keep", "cumulative"], "default": "keep"},
            "timeout": {"type": "int", "default": 60},
        },
        mutually_exclusive=[("path", "paths")],
        required_one_of=[("path", "paths")],
        supports_check_mode=True,
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
