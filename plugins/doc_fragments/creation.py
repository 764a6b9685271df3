# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The documentation of the options for new overlays."""

from __future__ import annotations


class ModuleDocFragment:
    """Options that all modules share which make overlays."""

    DOCUMENTATION = r"""
options:
  relative:
    description: Record the image below relative to the overlay's folder, for storage mounted at different places.
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
      - From 1 to 86400.
    type: int
    default: 60
"""
