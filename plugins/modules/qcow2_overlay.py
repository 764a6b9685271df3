#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make qcow2 overlays of shut-off VMs that keep incremental backups going, merge them down, or go back from them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: qcow2_overlay
short_description: Make qcow2 overlays that keep incremental backups going, merge them down, or go back
version_added: 1.0.0
description:
  - Makes a new qcow2 image, the overlay, on top of the topmost image of a disk of a VM that is shut off (an external,
    disk-only snapshot). The image below, called ACTIVE here, is never written to.
  - Every dirty bitmap of ACTIVE that is recording and not inconsistent goes on recording in the overlay, with the same
    name and granularity, so that incremental backups go on. C(qemu-img create) alone would drop the bitmaps, and the
    next backup would have to be a full one.
  - The bitmap in the overlay begins with what those in the images below mark, so that backup tools which read only the
    topmost image are right too, see O(bitmap_content).
  - After a run each overlay is complete, as verified by reading it back, or does not exist. Nothing that exists is ever
    replaced.
  - With O(state=committed) it merges overlays down. Their data and their bitmaps go into the image below, so that
    incremental backups go on there, and the overlays are deleted or renamed aside. At every moment, also after SIGKILL
    or a power loss, the guest's data is whole, and no backup tool is given a chain that looks valid and is not. The
    same call again completes it.
  - With O(state=reverted) it goes back. The overlay is renamed aside, or deleted, so that the VM can go on with the
    image below as it was at the snapshot. What was written since is in the overlay alone.
  - Point the VM at the overlay afterwards, or before going back at the image below.
    M(kvmfleet.qcow2.domain_overlay) points libvirt domains at overlays.
  - Of the VM only the disks that are given are in the snapshot, not its other disks, the variables of its firmware
    (NVRAM), the state of a TPM, its memory, or files that C(virsh save) has written.
options:
  state:
    description:
      - V(present) makes the overlays that are not there yet.
      - V(committed) merges everything from O(path) down to, not including, O(backing_file) into O(backing_file), data
        and bitmaps, then retires it in the way that O(retire) tells. If nothing stands at O(path), nothing is done.
      - V(reverted) retires everything from O(path) down to, not including, O(backing_file), in the way that O(retire)
        tells. O(backing_file) is not written to. If nothing stands at O(path), nothing is done.
      - Options about new overlays must be left out, or have their defaults, unless it is V(present). These are
        O(bitmap_content), O(relative), O(cluster_size), O(extended_l2), O(lazy_refcounts), O(refcount_bits),
        O(compression_type), O(owner), O(group), O(mode), O(seuser), O(serole), O(setype) and O(selevel). So must
        O(above), O(speed), O(accept_lost_bitmaps) and O(parallel) unless it is V(committed).
    type: str
    choices: [present, committed, reverted]
    default: present
  retire:
    description:
      - What becomes of images that the VM does not need any more.
      - V(keep) renames each to its own name with C(.reverted) or C(.committed) behind it, and, where such are there
        already, a number above theirs, so that the old name is free. Of an image that was reverted, what it was at the
        snapshot comes back if it is renamed back before a VM has run on O(backing_file). Keep it until the first backup
        afterwards is good.
      - V(delete) deletes them. Of an image that was reverted, all that was written since the snapshot is gone.
      - The default is V(keep) with O(state=reverted) and V(delete) with O(state=committed). Not allowed with
        O(state=present), which retires nothing.
    type: str
    choices: [delete, keep]
  above:
    description:
      - With O(state=committed), the image directly on top of O(path), if O(path) is not the topmost one. It is put onto
        O(backing_file).
      - Only the name in its header is changed, in place, so that its bitmaps stay.
      - The commit is refused if a bitmap of this image that no backup can use would look usable afterwards. Of images
        further up those are looked at that lie in the folder of this one. Of images elsewhere only
        M(kvmfleet.qcow2.domain_overlay) knows.
    type: str
  speed:
    description:
      - With O(state=committed), how many bytes per second are copied at most. V(0) is no limit.
    type: bytes
    default: 0
  accept_lost_bitmaps:
    description:
      - With O(state=committed), whether bitmaps of the overlay may be lost because O(backing_file) can hold none, being
        raw or of version 2 (compat 0.10), or those of O(backing_file) because the overlay is of version 2. Without it
        such a commit is refused. The next backup must then be a full one.
    type: bool
    default: false
  parallel:
    description:
      - With O(state=committed), how many VMs are committed at a time. Each takes a QEMU process of its own.
      - From 1 to 64.
    type: int
    default: 1
  path:
    description:
      - The overlay's file, as an absolute path. C(~) and variables are not expanded.
      - With O(state=committed) and O(state=reverted) it can be several images above O(backing_file).
      - A new overlay is refused where an image in its folder, or in that of O(backing_file), has lost its backing file
        of this name, and would read other data from the overlay.
      - Required unless O(overlays) is given.
    type: str
  backing_file:
    description:
      - ACTIVE, the topmost image of the disk's chain, a file or a block device, as an absolute path. The overlay
        records this very name. A relative backing file of ACTIVE is looked for beside it.
      - With O(state=committed), the image that all goes into. With O(state=reverted), the image that the disk goes back
        to.
      - Required with O(path).
    type: str
  overlays:
    description:
      - Several overlays in one call, which is much faster than a loop. The result is in the same order.
      - Give all disks of a VM, with O(overlays[].vm), in the order in which the VM has them. They are locked in this
        order, so a VM that is started meanwhile is refused at its first disk. A QEMU that gets its first disk but not
        its second exits and leaves the first disk's bitmaps inconsistent.
      - Overlays that the VM has already are locked too, and must not be in use.
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
          - A name of the VM, free to choose. Overlays with the same O(overlays[].vm) are made, or retired, all or none.
            A VM that fails does not stop the others; the task fails at the end, with every result.
          - Overlays without it all belong together.
        type: str
      above:
        description: As O(above).
        type: str
      bitmap_content:
        description: As O(bitmap_content).
        type: str
        choices: [cumulative, empty]
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
requirements:
  - QEMU 5.2 or newer on the managed host, as C(qemu-storage-daemon) or a system emulator
  - Python 3.9 or newer on the managed host
notes:
  - With O(state=committed) an overlay is refused that was last written to before an image below it was. It may be left
    over from a merge by C(virsh blockcommit --pivot), or be a backup by C(virsh backup-begin). If it is to go in all
    the same, since no VM has run on that image, C(touch) it.
  - With O(state=committed) the module works on the host by itself. If the connection or the controller is lost it goes
    on to its end, and the next run waits for it. Meanwhile the controller shows a line every few seconds, unless the
    variable C(overlay_progress) is V(false). With C(async) of your own it is left to you.
  - An overlay that exists is V(present) if it is a qcow2 image of at least the size of ACTIVE, on top of ACTIVE, with
    ACTIVE's format recorded, and every bitmap of ACTIVE that must go on recording is recording in it and not
    inconsistent. Anything else is drift, which fails the task and changes nothing. A different granularity is only
    worth a warning.
  - Refused is an ACTIVE that a running VM has open, or, if it has recording bitmaps, that a running VM has as a backing
    file. QEMU's own locks tell, on local file systems and on network file systems with locks. While overlays are made,
    no VM can start on their ACTIVE.
  - Refused is a chain of which QEMU does not open an image, wherever it is, since no VM could start on the overlay; so
    too an external data file that is recorded without its folder, which QEMU looks for in the folder that QEMU itself
    was started in. C(qemu-img amend -f qcow2 -o data_file=/full/name), run in the folder where it is, records its full
    name.
  - If ACTIVE is on a block device, the processes of the host are looked through as well, since libvirt gives each VM
    device nodes, and so locks, of its own. A VM that starts in the very moment of the run is not kept from the device.
  - A symlink on the way to the overlay's folder is followed if it belongs to root, to the owner of the folder that it
    leads to, or to the user who runs the module. Any other is refused, since its owner could have the overlay made
    anywhere.
  - Limits are 4096 bitmaps of an image, 4 GiB of bitmap data together, and chains of 200 images.
  - The overlays of one VM are put into place within a millisecond, but one after the other. If the run is killed by
    SIGKILL or a power loss just then, some of them are there, each complete, and the next run makes the others.
  - An ACTIVE without bitmaps gets an overlay without bitmaps.
  - A bitmap of O(backing_file) holds after a commit exactly what it and those of the images that went in have marked,
    in the granularity of the topmost one. Where an image that goes in lacks a bitmap that O(backing_file) has, as after
    C(qemu-img create), all that the image holds is marked in its place, so that the bitmap is right again.
  - On file systems whose files can share extents (XFS, btrfs) the data is not copied if the images have clusters of at
    least 64 KiB, as large as those of O(backing_file) or larger, no extended L2 entries and one virtual size.
  - While data moves, root can read how far it is in C(/run/kvmfleet-qcow2).
  - If a commit fails or is killed, the VM can start on its overlay and go on with its backups. Do not start it on
    O(backing_file), and do not remove the file C(.NAME.kvmfleet-vault) beside it, before the same call has completed
    the commit. That a VM was started on O(backing_file) just then cannot always be seen.
  - If a commit with O(above) is killed in the few milliseconds in which the bitmaps of the overlay are written, bitmaps
    that O(backing_file) lacks can stay inconsistent in O(above). The next run warns of that. Their checkpoints need a
    full backup.
  - A commit is refused if a process has one of the images open; if any image in their folders stands on one of them
    that does not take part; if an overlay is smaller than the image below it, has internal snapshots, an external data
    file, or is on a block device; if there is not enough room, which is computed beforehand. O(backing_file) may be a
    block device, smaller than the overlay, have internal snapshots, an external data file, or any cluster size.
  - Where an image is named by a symlink, the folder of the symlink is looked through for others that stand on it, too.
  - A full disk pauses a commit. It goes on when there is room again within O(timeout), else the task fails, and the
    same call goes on later.
  - Going back is refused if a process has one of the images open, if another image in one of their folders stands on an
    image that would go, if that has internal snapshots, or if a commit of these images was interrupted. It is also
    refused on a block device. While images are retired, no VM can start on them or on O(backing_file).
  - Checkpoints that were made since the snapshot are in the overlay alone. A warning names them. libvirt still has them
    after going back; M(kvmfleet.qcow2.domain_checkpoint) with
    O(kvmfleet.qcow2.domain_checkpoint#module:unusable=remove) has it forget them. Increments that were made since the
    snapshot belong to what was discarded. Apply none of them, nor any later one, on each other.
  - Images are retired one after the other, the lowest first. If the run is killed by SIGKILL or a power loss just then,
    the same call does the rest. With O(retire=delete), images between O(path) and O(backing_file) can be left,
    renamed as O(retire=keep) renames them.
seealso:
  - module: kvmfleet.qcow2.domain_overlay
  - module: kvmfleet.qcow2.qcow2_info
  - module: kvmfleet.qcow2.qcow2_bitmap
  - name: A whole fleet
    description: P(kvmfleet.qcow2.overlay#role) and its playbook use this module on all hosts, with a report.
    link: https://github.com/kvmfleet/qcow2/blob/main/docs/fleet.md
  - name: Incremental backup internals of libvirt
    description: The algorithm that this module follows, in the section about offline snapshots with bitmaps.
    link: https://libvirt.org/kbase/internals/incremental-backup.html
extends_documentation_fragment:
  - kvmfleet.qcow2.attributes
  - kvmfleet.qcow2.attributes.actiongroup
  - kvmfleet.qcow2.creation
  - kvmfleet.qcow2.verify
attributes:
  action_group:
    membership: [kvmfleet.qcow2.creation, kvmfleet.qcow2.qemu]
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

- name: Merge the snapshot down into the image below, with the VM shut off
  kvmfleet.qcow2.qcow2_overlay:
    path: /srv/vm2.snap.qcow2
    backing_file: /srv/vm2.qcow2
    state: committed
  register: merged

- name: Show what was moved
  ansible.builtin.debug:
    msg: "{{ merged.overlays.0.committed_bytes | ansible.builtin.human_readable }}, {{ merged.overlays.0.method }}"

- name: Go back to the state before the snapshot, and keep what was written since in /srv/vm1.snap.qcow2.reverted
  kvmfleet.qcow2.qcow2_overlay:
    path: /srv/vm1.snap.qcow2
    backing_file: /srv/vm1.qcow2
    state: reverted

- name: Go back on both disks of a VM, or on none, and delete what was written since
  kvmfleet.qcow2.qcow2_overlay:
    overlays:
      - {vm: web, path: /srv/web-a.snap.qcow2, backing_file: /srv/web-a.qcow2}
      - {vm: web, path: /srv/web-b.snap.qcow2, backing_file: /srv/web-b.qcow2}
    state: reverted
    retire: delete
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
      description: Virtual size of the disk in bytes, of the overlay or, unless O(state=present), of the image below.
        Null if it failed.
      type: int
      sample: 10737418240
    state:
      description:
        - With O(state=present), V(created), V(present) if it was there already, or V(failed).
        - With O(state=committed), V(committed), V(absent) if nothing stood there already, or V(failed).
        - With O(state=reverted), V(reverted), V(absent) if nothing stood there already, or V(failed).
      type: str
      sample: created
    kept_as:
      description: What O(path) is kept as; null if it was deleted, was not there, or failed.
      returned: when O(state=committed) or O(state=reverted)
      type: str
      sample: /srv/vm1.snap.qcow2.reverted
    retired:
      description: All images that were retired, the topmost first.
      returned: when O(state=committed) or O(state=reverted)
      type: list
      elements: dict
      contains:
        path:
          description: The image, by the name that it had.
          type: str
          sample: /srv/vm1.snap.qcow2
        kept_as:
          description: What it is kept as; null if it was deleted.
          type: str
          sample: /srv/vm1.snap.qcow2.reverted
    method:
      description: V(shared) if the data was not copied but its extents are shared, V(copied) if it was copied. Null if
        nothing was done.
      returned: when O(state=committed)
      type: str
      sample: shared
    exact:
      description: Whether every bitmap marks just what was recorded. V(false) if one marks all that an image held
        which had not recorded it. A backup is right in either case. Null if it is not known, since an earlier run has
        begun, or if nothing was done.
      returned: when O(state=committed)
      type: bool
      sample: true
    committed_bytes:
      description: Bytes of the disk that the images held which went in, zeroes included. Null if nothing was done.
      returned: when O(state=committed)
      type: int
      sample: 2147483648
    bitmaps:
      description:
        - With O(state=present), the bitmaps of ACTIVE that go on recording in the overlay.
        - With O(state=committed), the bitmaps of O(backing_file) afterwards that a backup can use.
      returned: when O(state=present) or O(state=committed)
      type: list
      elements: dict
      contains:
        name:
          description: Name of the bitmap, which libvirt calls a checkpoint.
          type: str
          sample: monday
        granularity:
          description: Bytes that one bit covers, in the overlay or in O(backing_file).
          type: int
          sample: 65536
    skipped_bitmaps:
      description:
        - With O(state=present), the bitmaps of ACTIVE that do not go on recording.
        - With O(state=committed), the other ones, which no backup can use.
      returned: when O(state=present) or O(state=committed)
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
          description: V(disabled) if it is not recording, V(inconsistent) if it was not saved properly. With
            O(state=committed) also V(gap) if an image lacks it below one that has it, V(different_size) or V(lost) as
            M(kvmfleet.qcow2.qcow2_info) tells it of images below O(backing_file), and V(raw) if O(backing_file) can
            hold no bitmaps.
          type: str
          sample: disabled
    msg:
      description: Why it failed.
      returned: when RV(overlays[].state) is V(failed)
      type: str
    code:
      description: The kind of failure, one word. The collection's documentation lists all of them, with what to do.
      returned: when RV(overlays[].state) is V(failed)
      type: str
      sample: in_use
preflight:
  description:
    - What the first look found, before anything was done. It has the list RV(overlays) as check mode returns it.
  returned: when O(verify=true)
  type: dict
again:
  description:
    - What the second look found, as RV(preflight) has it. If it could not be made, C(msg) and C(code) say why.
    - Null if there was no run, so in check mode and if everything was done already, or if it was ended by a signal.
  returned: when O(verify=true)
  type: dict
check_mode:
  description: Whether the result is what would be done, as in check mode.
  returned: when O(verify=true)
  type: bool
  sample: false
chains:
  description:
    - The chains of the disks that have bitmaps, as M(kvmfleet.qcow2.qcow2_info) returns C(disks). In check mode they
      are examined as they are now.
  returned: when O(verify=true)
  type: list
  elements: dict
code:
  description: The kind of the first failure, one word. The collection's documentation lists all, with what to do.
  returned: when the task fails
  type: str
  sample: in_use
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Refusal
from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.run import run
from ..module_utils._disk.session import Operation, Settings
from ..module_utils._disk.verdict import DELETE, KEEP
from ..module_utils._module import Module, Report
from ..module_utils._module import run as run_module
from ..module_utils._options import (
    BACKING_FORMATS,
    attributes_from,
    creation_from,
    creation_spec,
    merging_spec,
    ownership_spec,
    refuse_given,
    settings_from,
)
from ..module_utils._verified import verified, verify_spec

if t.TYPE_CHECKING:
    from ..module_utils._disk.commit import CommitRequest
    from ..module_utils._disk.overlay import OverlayRequest
    from ..module_utils._disk.revert_rules import RevertRequest


class State(t.NamedTuple):
    """What one value of the option state means."""

    operation: t.Callable[[dict[str, t.Any]], Operation[t.Any, t.Any]]  # from the options of the task
    request: t.Callable[[dict[str, t.Any]], t.Any]  # from the options of one item
    without: t.Iterable[str]  # options that have no meaning


# What only one state needs is imported where it begins: a host compiles all that is imported, at each call.
def _making(params: dict[str, t.Any]) -> Operation[t.Any, t.Any]:
    from ..module_utils._disk.build import MakeOverlays

    return MakeOverlays(attributes_from(params))


def _merging(_params: dict[str, t.Any]) -> Operation[t.Any, t.Any]:
    from ..module_utils._disk.merge import MergeLayers

    return MergeLayers()


def _going_back(_params: dict[str, t.Any]) -> Operation[t.Any, t.Any]:
    from ..module_utils._disk.revert import GoBack

    return GoBack()


def _to_make(own: dict[str, t.Any]) -> OverlayRequest:
    from ..module_utils._disk.overlay import OverlayRequest

    return OverlayRequest(
        path=own["path"],
        backing_file=own["backing_file"],
        backing_format=own["backing_format"],
        vm=own.get("vm"),
        relative=own["relative"],
        creation=creation_from(own),
        bitmap_content=own["bitmap_content"],
    )


def _to_revert(own: dict[str, t.Any]) -> RevertRequest:
    from ..module_utils._disk.revert_rules import RevertRequest

    return RevertRequest(
        path=own["path"],
        backing_file=own["backing_file"],
        backing_format=own["backing_format"],
        vm=own.get("vm"),
        retire=own["retire"] or KEEP,
    )


def _to_commit(own: dict[str, t.Any]) -> CommitRequest:
    from ..module_utils._disk.commit import CommitRequest

    return CommitRequest(
        path=own["path"],
        backing_file=own["backing_file"],
        backing_format=own["backing_format"],
        vm=own.get("vm"),
        above=own["above"],
        retire=own["retire"] or DELETE,
        speed=own["speed"],
        accept_lost_bitmaps=own["accept_lost_bitmaps"],
    )


OF_NEW_FILES = (*creation_spec(defaults=True), *ownership_spec())
OF_COMMITS = ("above", *merging_spec())
STATES = {
    "present": State(_making, _to_make, ["retire", *OF_COMMITS]),
    "committed": State(_merging, _to_commit, OF_NEW_FILES),
    "reverted": State(_going_back, _to_revert, [*OF_NEW_FILES, *OF_COMMITS]),
}


def argument_spec() -> dict[str, t.Any]:
    """Return the options of the module."""
    item = {
        "path": {"type": "str", "required": True},
        "backing_file": {"type": "str", "required": True},
        "backing_format": {"type": "str", "choices": BACKING_FORMATS},
        "vm": {"type": "str"},
        "above": {"type": "str"},
        **creation_spec(defaults=False),
    }
    return {
        "state": {"type": "str", "choices": list(STATES), "default": "present"},
        "retire": {"type": "str", "choices": [DELETE, KEEP]},
        "above": {"type": "str"},
        **merging_spec(),
        "path": {"type": "str"},
        "backing_file": {"type": "str"},
        "overlays": {"type": "list", "elements": "dict", "options": item},
        "backing_format": {"type": "str", "choices": BACKING_FORMATS, "default": "qcow2"},
        "timeout": {"type": "int", "default": 60},
        **creation_spec(defaults=True),
        **ownership_spec(),
        **verify_spec(),
    }


def requests_from(params: dict[str, t.Any]) -> list[t.Any]:
    """Return what the task asks for, in order; what an item leaves open comes from the task."""
    if params["overlays"] is None and None in (params["path"], params["backing_file"]):
        raise Refusal("bad_option", "", "path and backing_file, or overlays, must have a value that is not null")
    state = STATES[params["state"]]
    requests = []
    for item in [params] if params["overlays"] is None else params["overlays"]:
        own = {**params, **{option: value for option, value in item.items() if value is not None}}
        refuse_given(own, state.without, f"state={params['state']}")
        requests.append(state.request(own))
    return requests


@ending_cleanly()
def work(module: AnsibleModule) -> Report:
    """Do what the state asks for."""
    requests = requests_from(module.params)

    def once(settings: Settings) -> Report:
        outcome = run(STATES[module.params["state"]].operation(module.params), requests, settings)
        return Report(outcome.as_result("overlays"), outcome.failures, outcome.warnings)

    return verified(once, settings_from(module), module.params, "overlays")


def main() -> None:
    """Run the module."""
    module = Module(
        argument_spec=argument_spec(),
        mutually_exclusive=[("path", "overlays"), ("backing_file", "overlays")],
        required_one_of=[("path", "overlays")],
        required_together=[("path", "backing_file")],
        supports_check_mode=True,
    )
    run_module(module, work)


if __name__ == "__main__":
    main()
