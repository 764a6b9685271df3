# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation of the options for new overlays."""

from __future__ import annotations


class ModuleDocFragment:
    """Options that all modules share which make overlays."""

    DOCUMENTATION = r"""
options:
  bitmap_content:
    description:
      - What a bitmap of a new overlay begins with.
      - V(cumulative) means all that the bitmaps of this name mark in the images below. The overlay's bitmap alone then
        tells what has changed since the checkpoint. Many tools read only that one, such as C(virtnbdbackup) on a VM
        that is shut off, C(qemu-nbd --bitmap), or QMP C(blockdev-backup). Backups by libvirt unite the bitmaps of the
        chain, so they are as large as with V(empty).
      - V(empty) means nothing, as in a live snapshot by libvirt. A tool that reads only the topmost image copies then
        none of the changes from before the overlay, without an error.
      - What the bitmaps of an existing overlay mark is not looked at. M(kvmfleet.qcow2.qcow2_info) tells it by
        C(top_alone).
    type: str
    choices: [cumulative, empty]
    default: cumulative
  relative:
    description:
      - Record the image below relative to the overlay's folder, for storage mounted at different places.
      - It is recorded by its real path. If it is named by a symlink, and would stand on other files by that path than
        by this name, as its own relative backing file is looked for beside it, the overlay is refused.
    type: bool
    default: false
  cluster_size:
    description: Cluster size of the overlay, a power of two from 512 to 2M, as a number of bytes or such as V(128K).
    type: bytes
    default: 64K
  extended_l2:
    description: Give the overlay extended L2 entries (subclusters). Needs a O(cluster_size) of at least 16K.
    type: bool
    default: false
  lazy_refcounts:
    description: Postpone refcount updates in the overlay.
    type: bool
    default: false
  refcount_bits:
    description: Width of a reference count in the overlay, a power of two from 1 to 64.
    type: int
    default: 16
  compression_type:
    description: How compressed clusters of the overlay would be compressed.
    type: str
    choices: [zlib, zstd]
    default: zlib
  owner:
    description: User name or number that is to own a new overlay. By default the owner of the image below.
    type: str
  group:
    description: Group name or number of a new overlay. By default the group of the image below.
    type: str
  mode:
    description:
      - Permissions of a new overlay, as in M(ansible.builtin.file), such as V('0660') or V(u=rw,g=r).
      - By default those of the image below, with its ACL, and made readable and writable for the owner, since templates
        are often read-only.
    type: raw
  seuser:
    description: User part of the SELinux context of a new overlay. By default, as all parts, that of the image below.
    type: str
  serole:
    description: The role part of the SELinux context.
    type: str
  setype:
    description: The type part of the SELinux context.
    type: str
  selevel:
    description: The level part of the SELinux context.
    type: str
  timeout:
    description:
      - Seconds that QEMU may take for one step before it is ended and the overlay reported as failed. A tenth of a
        second is added for each bitmap.
      - Also the seconds to wait while another run of this collection works on the same image below.
      - Where data is moved, the seconds that may pass without progress, also while a full disk is waited for.
      - From 1 to 86400.
    type: int
    default: 60
"""
