#!/usr/bin/python
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Put libvirt domains on overlays, merge these down, or go back, with usable checkpoints."""

from __future__ import annotations

DOCUMENTATION = r"""
module: domain_overlay
short_description: Put libvirt domains on overlays, merge these down, or go back, with usable checkpoints
version_added: 1.0.0
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
  - With O(state=committed) it merges a snapshot down. The overlay of every disk goes into the image below, data and
    bitmaps, and the definition is switched to that. Checkpoints that were valid stay valid.
  - With O(state=reverted) it goes back. The definition is switched to the images below the snapshot, and the overlays
    are renamed aside or deleted. Checkpoints whose bitmaps go with them are removed from libvirt.
options:
  state:
    description:
      - V(present) puts every domain on overlays.
      - V(committed) merges the snapshot O(snapshot) down, on every disk that has it. With later snapshots above it,
        that
        layer alone is taken out of the chain.
      - V(reverted) discards the snapshot O(snapshot) and all above it, on every disk that has it.
      - A domain that is not on the snapshot is left as it is.
      - Options about new overlays must be left out, or have their defaults, unless it is V(present). These are
        O(quiesce), O(unfit_disks), O(bitmap_content), O(relative), O(cluster_size), O(extended_l2), O(lazy_refcounts),
        O(refcount_bits), O(compression_type), O(owner), O(group), O(mode), O(seuser), O(serole), O(setype) and
        O(selevel).
    type: str
    choices: [present, committed, reverted]
    default: present
  retire:
    description:
      - What becomes of overlays that the domain does not need any more, see
        O(kvmfleet.qcow2.qcow2_overlay#module:retire). Not allowed with O(state=present).
    type: str
    choices: [delete, keep]
  speed:
    description: With O(state=committed), how many bytes per second are copied at most. V(0) is no limit.
    type: bytes
    default: 0
  older_than:
    description:
      - With O(state=committed), merge down every snapshot of this collection that is older, instead of the one that
        O(snapshot) names. A number with C(h), C(d) or C(w) for hours, days or weeks, such as V(30d).
      - The time of a snapshot is when the image below it was last written to before it was made, of all its disks the
        latest. Of a domain that was shut off for a month already, a snapshot of today is a month old; O(keep) holds it.
        Overlays that versions before 1.1.0 have made do not tell when that was; such a snapshot counts from the last
        write to the image below, which a merge is too, and the removal of a checkpoint.
      - Each domain's go from the oldest to the newest. Those that lie directly on each other go together if the domain
        is shut off. Snapshots that bear no mark of this collection stay.
      - A merge of a killed run is completed, whatever its age.
    type: str
  keep:
    description:
      - With O(state=committed) and without O(snapshot), how many of the newest snapshots of each domain stay, however
        old they are. Without O(older_than) all others are merged down.
    type: int
  confirm_all:
    description:
      - With O(state=reverted), must be V(true) if a pattern in O(name) consists of nothing but C(*) and C(?), so takes
        everything. Discarding the work of a whole host by a forgotten pattern must not happen.
    type: bool
    default: false
  name:
    description:
      - Names of domains, or patterns of names such as V(web*), as a list.
      - A name that does not exist is a failure; a pattern that matches nothing is worth a warning.
      - A name that is empty, or has a blank around it, is refused. Such a one is most likely of a text with commas.
    type: list
    elements: str
    required: true
  snapshot:
    description:
      - Name of the snapshot that is to be made, merged down or gone back from. The overlay of C(web.qcow2) is called
        C(web.SNAPSHOT.qcow2). The name of an earlier snapshot that this module has made is replaced, so names do not
        grow. See O(directory) for the names there.
      - A domain that is on the snapshot of this name already, or on one above it, is left as it is. The overlay bears a
        mark that tells so (the UUID of the domain, the disk and the snapshot), whatever the file is called by now.
      - An image without the mark that is called as the snapshot would be may be the snapshot, or a clone of a template.
        It counts as the snapshot if an image below it is known to have been the domain's disk, by its mark or by a
        checkpoint, and no other disk has it. Else the domain is refused as ambiguous.
      - With O(state=committed) and O(state=reverted), a snapshot that is nowhere, while the domains are on others, is
        worth a warning, since its name may be misspelt. A second run may find the same.
      - Required unless O(older_than) or O(keep) is given.
    type: str
  disks:
    description:
      - Targets of the disks to take, such as V(vda). By default all that can take part.
      - A disk that is named and cannot take part is a failure.
      - Where some disks of a domain are on O(snapshot) already and others are not, as one that was attached since,
        these others join it now, with a warning. To go back would give the domain disks of two moments.
    type: list
    elements: str
  directory:
    description:
      - Where to make the overlays, as an absolute path of a folder. By default beside the image of each disk.
      - An overlay there is called C(DOMAIN.TARGET.SNAPSHOT.qcow2), such as C(web.vda.monday.qcow2), so that a folder
        can be that of many domains.
      - Needed for disks on block devices.
      - If overlays were made with it, give it with O(state=committed) and O(state=reverted) too. An overlay that the
        domain does not have any more, since a run was killed before it removed it, is looked for there.
    type: str
  running:
    description:
      - What becomes of a domain that is running or paused, and not on the snapshot yet.
      - V(fail) makes it a failure. V(skip) leaves it out, for a run over everything that happens to be shut off.
      - V(live) has libvirt work on it while it runs, with the same names, marks and results. With O(state=present) by
        its disk-only snapshot, of all disks in one moment. With O(state=committed) by its block commit, one disk after
        the other. O(state=reverted) stays a failure. Domains that are shut off are worked on as always.
      - With V(live), libvirt makes the bitmaps of new overlays. They begin empty, whatever O(bitmap_content) says, so a
        tool that reads the topmost image alone misses what was written before (C(top_alone) is false). A warning tells
        so.
    type: str
    choices: [fail, skip, live]
    default: fail
  quiesce:
    description:
      - With O(running=live) and O(state=present), have the guest agent hold the guest's writes while the snapshot is
        taken, so that its file systems are clean. The guest is thawed whatever happens. If the libvirt daemon and this
        task die in that very moment, the next task of this module for the domain thaws it, with a warning.
      - A domain that is paused, or whose agent does not answer, is a failure, and nothing is made. So is one that
        another tool has frozen, which stays so.
    type: bool
    default: false
  libvirt_snapshots:
    description:
      - What becomes of a domain of which libvirt has snapshots of its own (C(virsh snapshot-list)), internal ones or
        external ones with metadata.
      - V(fail) refuses it. C(virsh snapshot-revert) would rewrite, or delete, the image below the overlay. With
        O(state=reverted) the images that go may be those that such a snapshot needs.
      - V(ignore) goes on. Never revert to such a snapshot then.
      - Not allowed with O(state=committed). With that and with O(state=reverted), an image that goes and has internal
        snapshots is always refused.
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
  - QEMU 5.2 or newer on the managed host, as C(qemu-storage-daemon) or a system emulator
  - Python 3.9 or newer on the managed host
notes:
  - Besides python3-libvirt it needs what M(kvmfleet.qcow2.qcow2_overlay) needs, and refuses what that refuses.
  - With O(state=committed) the module works on the host by itself. If the connection or the controller is lost it goes
    on to its end, and the next run waits for it. Meanwhile the controller shows a line every few seconds, unless the
    variable C(overlay_progress) is V(false). With C(async) of your own it is left to you.
  - A domain is refused if it is running, paused or suspended (but see O(running)), if it is transient, if it has a
    managed save (whose restore would write below the overlays), or if its definition states another backing chain than
    the images record. A domain that fails does not stop the others; the task fails at the end, with every result.
  - These can take no part, and are returned with the reason. CD-ROM and floppy drives; disks that are read-only,
    shareable, transient, encrypted or on the network; volumes of a pool that is not active, or that is neither of files
    nor of block devices; block devices, unless O(directory) is given; disks whose C(<source>) has what an overlay
    cannot have (such as C(<slices>), C(<reservations>) or C(fdgroup)). O(unfit_disks) says what becomes of the domain
    then. Disks with C(snapshot='no') in the definition are left out, unless O(disks) names them.
  - Not in the snapshot, and not returned to what it was by going back. The variables of the firmware (see
    RV(domains[].nvram)); the state of a TPM in software (see RV(domains[].tpm)); the memory of the domain; files that
    C(virsh save) has written. Never restore such a file once the domain is on overlays, since that writes to the images
    below them. A domain with a managed save is refused; other files of C(virsh save) cannot be known.
  - A running domain is touched by libvirt only, and only with O(running=live). It needs libvirt 6.6 or newer. A merge
    of it that is ended by a signal, or makes no progress for O(timeout) seconds, is given up, and the domain goes on
    with its overlay; one that goes on after a run was killed is followed by the next run. A libvirt daemon that is
    started anew is waited for, and the merge goes on meanwhile. A block job that no run has begun is left alone. An
    overlay that a killed run has left, and that no disk has any more, is renamed and never deleted. With QEMU before
    6.1, an overlay in the middle whose bitmaps the image below lacks can be merged only while the domain is shut off.
  - Once a merge of a running domain is begun, no disk of the domain can go back from that snapshot, even if the merge
    is given up. A file C(.NAME.INODE.kvmfleet-merging) beside each overlay tells so until the overlay is retired. Do
    not remove it. Complete the merge by the same call.
  - It knows this host alone. Define a domain on one host, also where hosts share a storage, since a definition
    elsewhere does not follow what is changed here. Images that stand on each other must belong to domains of one host,
    or lie in one folder. The playbook C(kvmfleet.qcow2.health) tells of a domain that two hosts of a fleet have.
  - Of a domain that is shut off libvirt alone can do it too, by starting it paused, taking a live snapshot, and
    destroying it. That needs the memory, the network and all devices of the domain, takes seconds for each domain, and
    skips bitmaps that are not valid without a word. It is the better way if this collection cannot be used on the host.
  - No snapshot is added to C(virsh snapshot-list). To go back, use O(state=reverted). Never use C(virsh snapshot-
    revert) on a domain that is on overlays, see O(libvirt_snapshots).
  - While overlays are made, the domain cannot be started. Its first disk is locked too, even if it takes no part. It
    must not be in use. A QEMU that gets its first disk but not its second exits and leaves the first disk's bitmaps
    inconsistent.
  - A domain goes back only to what it was at the snapshot. If other tools have merged data into the image below since,
    as C(virsh blockcommit) that was given up, or have put another image there, it is refused (V(base_changed)), as far
    as the time of that image and the data of both tell. Overlays that versions before 1.1.0 have made do not tell. So
    an image is not merged down either, unless it is what the one above it was made on, as far as its time tells.
  - After going back, increments that were made since the snapshot belong to what was discarded. Apply none of them, nor
    any later one, on each other. Make the next increment since a checkpoint that is left, and apply it on the backup
    that ended there; else make a full backup. A backup tool that asks for a checkpoint that is gone gets a refusal.
  - A domain is merged down as M(kvmfleet.qcow2.qcow2_overlay) does it, all disks in step. If that fails or is killed,
    the domain can start on its overlays and go on with its backups, and the same call completes it. Its definition is
    switched once, when everything is below.
  - A snapshot is not merged down, and not gone back from, if another domain has one of the images in the chain of a
    disk, as a template is.
  - If the host dies between making the overlays and switching the definition, the next run finds the overlays and
    completes the switch. An image of the same name that does not bear the mark, or on which a VM has run, is never
    taken for one of them.
  - The O(timeout) does not cover the libvirt daemon, but for the progress of merges with O(running=live). If somebody
    else changes the definition in the very moment of the switch, that change may be lost. libvirt has no way to
    prevent that.
seealso:
  - module: kvmfleet.qcow2.qcow2_overlay
  - module: kvmfleet.qcow2.qcow2_info
  - module: kvmfleet.qcow2.domain_info
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
    membership: [kvmfleet.qcow2.creation, kvmfleet.qcow2.libvirt, kvmfleet.qcow2.qemu]
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

- name: Snapshot all application servers, those that run with clean file systems, by their guest agents
  kvmfleet.qcow2.domain_overlay:
    name: ["app*"]
    snapshot: before-upgrade
    running: live
    quiesce: true

- name: Merge it down while the domains run, with at most 100 MiB per second
  kvmfleet.qcow2.domain_overlay:
    name: ["app*"]
    snapshot: before-upgrade
    state: committed
    running: live
    speed: 100M

- name: Snapshot one disk of a domain, on faster storage
  kvmfleet.qcow2.domain_overlay:
    name: [db]
    snapshot: monday
    disks: [vda]
    directory: /srv/fast
  register: monday

- name: Merge the snapshot down when the upgrade has proved good
  kvmfleet.qcow2.domain_overlay:
    name: ["web*"]
    snapshot: before-upgrade
    state: committed

- name: Merge down what is older than thirty days, but for the two newest snapshots of each domain
  kvmfleet.qcow2.domain_overlay:
    name: ["*"]
    state: committed
    older_than: 30d
    keep: 2

- name: Go back when it has not
  kvmfleet.qcow2.domain_overlay:
    name: [db]
    snapshot: monday
    state: reverted
  register: back

- name: Show which checkpoints are gone
  ansible.builtin.debug:
    msg: "{{ back.domains | map(attribute='lost_checkpoints') | flatten }}"

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
        - With O(state=committed) and O(state=reverted), V(committed) or V(reverted), V(absent) if it is not on the
          snapshot, or V(failed).
        - V(skipped) if it is not shut off and O(running=skip), or if only a pattern in O(name) names it and none of its
          disks can take part. All its disks are among RV(domains[].skipped_disks).
      type: str
      sample: created
    overlays:
      description: The overlay of each disk that takes part, as M(kvmfleet.qcow2.qcow2_overlay) returns it for the same
        state.
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
          description:
            - With O(state=present), V(created), V(present) if it was there already, or V(failed).
            - With O(state=committed) and O(state=reverted), V(committed) or V(reverted), V(absent), or V(failed).
          type: str
          sample: created
        kept_as:
          description: What RV(domains[].overlays[].path) is kept as; null if it was deleted, was not there, or failed.
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
          description: V(shared) if the data was not copied but its extents are shared, V(copied) if it was copied. Null
            if
            nothing was done.
          returned: when O(state=committed)
          type: str
          sample: shared
        exact:
          description: Whether every bitmap marks just what was recorded. V(false) if one marks all that an image held
            which had not recorded it. A backup is right in either case. Null if it is not known, since an earlier run
            has begun, or if nothing was done.
          returned: when O(state=committed)
          type: bool
          sample: true
        committed_bytes:
          description: Bytes of the disk that the images held which went in, zeroes included. Null if nothing was done,
            or if the domain runs.
          returned: when O(state=committed)
          type: int
          sample: 2147483648
        bitmaps:
          description:
            - With O(state=present), the bitmaps that go on recording in the overlay. Of a running domain those of
              checkpoints that libvirt can use.
            - With O(state=committed), the bitmaps of the image below afterwards that a backup can use.
          returned: when O(state=present) or O(state=committed)
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
          description:
            - With O(state=present), the bitmaps of the image below that do not go on recording.
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
              description: V(disabled) if it is not recording, V(inconsistent) if it was not saved properly, V(broken)
                if libvirt says so of a running domain, and V(older) if the image below was last written to before the
                checkpoint of that name was made, as one that was put back from a copy, so that it is an earlier one.
                With O(state=committed) also V(gap) if an image lacks it below one that has it, V(different_size) or
                V(lost) as M(kvmfleet.qcow2.qcow2_info) tells it of images below that are not merged, and V(raw) if the
                image below can hold no bitmaps. There is no V(older) then, since such a merge is refused.
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
          description:
            - Which rule is broken; null if it is valid. V(broken) if libvirt says so of a running domain.
            - V(in_use) if it cannot be told. Of a running domain, if QEMU has an image below the topmost one open for
              writing, for a block job, or since it could not store its bitmaps (C(not_stored)).
          type: str
          sample: null
        image:
          description: The image at fault; null if it is valid, or if that is not known.
          type: str
          sample: null
        advice:
          description: What it means and what to do; null if it is valid.
          type: str
          sample: null
        verified:
          description:
            - Whether libvirt itself has said so, as of domains that run. In check mode it is what libvirt says now, so
              not of a checkpoint that is broken now and that the merge makes valid. Else it is judged by what the
              images store, as it is always if the problem is V(lost) or V(in_use), of which libvirt knows nothing.
          type: bool
          sample: false
    unfit_disks:
      description:
        - Targets of the disks that the domain writes to, that cannot take part, and that nobody has excluded. The
          reasons are in RV(domains[].skipped_disks). With O(unfit_disks=skip) they are not in the snapshot.
      type: list
      elements: str
      sample: []
    picked_snapshots:
      description:
        - With O(older_than) or O(keep), the snapshots that are merged down, the oldest first.
        - RV(domains[].overlays) has the images.
      type: list
      elements: dict
      contains:
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
          description: Bytes that its images take, which deleting them frees. The images below can grow by as much.
          type: int
          sample: 2147483648
    lost_checkpoints:
      description:
        - With O(state=reverted), the checkpoints that went with the overlays, and that libvirt has forgotten. One
          counts, too, if the image below was last written to more than an hour before it was made. The bitmap of its
          name there is an earlier one's, which kvmfleet.qcow2.domain_checkpoint with C(orphans=remove) removes.
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
preflight:
  description:
    - What the first look found, before anything was done. It has the list RV(domains) as check mode returns it.
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

import os
import time
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ..module_utils._base.errors import Refusal
from ..module_utils._base.signals import ending_cleanly
from ..module_utils._disk.session import Settings
from ..module_utils._disk.verdict import DELETE, KEEP, root_causes
from ..module_utils._domain.aims import GoBackTo, MergeDown, PutOnOverlays
from ..module_utils._domain.live import Live, MergeRunningDown, PutRunningOn
from ..module_utils._domain.merge_old import merge_old
from ..module_utils._domain.plan import DomainOutcome, SnapshotRequest
from ..module_utils._domain.retention import Retention, seconds_of
from ..module_utils._domain.run import Aim, Call
from ..module_utils._domain.wayback import WayBack
from ..module_utils._libvirt.bindings import LIBVIRT_IMPORT_ERROR
from ..module_utils._libvirt.connection import Libvirt
from ..module_utils._libvirt.quiesced import thaw_left
from ..module_utils._module import Module, Report, check_names, require, run
from ..module_utils._options import (
    MERGING,
    attributes_from,
    creation_from,
    creation_spec,
    ownership_spec,
    refuse_given,
    settings_from,
)
from ..module_utils._verified import verified, verify_spec

_MOST_NAMED = 10  # snapshots in a warning


def argument_spec() -> dict[str, t.Any]:
    """Return the options of the module."""
    return {
        "state": {"type": "str", "choices": list(AIMS), "default": "present"},
        "retire": {"type": "str", "choices": [DELETE, KEEP]},
        "speed": {"type": "bytes", "default": MERGING["speed"]},
        "confirm_all": {"type": "bool", "default": False},
        "name": {"type": "list", "elements": "str", "required": True},
        "snapshot": {"type": "str"},
        "older_than": {"type": "str"},
        "keep": {"type": "int"},
        "disks": {"type": "list", "elements": "str"},
        "directory": {"type": "str"},
        "running": {"type": "str", "choices": ["fail", "skip", "live"], "default": "fail"},
        "quiesce": {"type": "bool", "default": False},
        "libvirt_snapshots": {"type": "str", "choices": ["fail", "ignore"], "default": "fail"},
        "unfit_disks": {"type": "str", "choices": ["fail", "skip"], "default": "fail"},
        "uri": {"type": "str", "default": "qemu:///system"},
        "timeout": {"type": "int", "default": 60},
        **creation_spec(defaults=True),
        **ownership_spec(),
        **verify_spec(),
    }


def _put_on(params: dict[str, t.Any], live: Live | None) -> list[Aim]:
    request, attributes = request_from(params), attributes_from(params)
    return [PutRunningOn(request, attributes, live), PutOnOverlays(request, attributes)]


def _merge_down(params: dict[str, t.Any], live: Live | None) -> list[Aim]:
    return _merge(_way_back(params), live)


def _merge(request: WayBack, live: Live | None) -> list[Aim]:
    return [*([MergeRunningDown(request, live)] if live is not None else []), MergeDown(request)]


def _go_back(params: dict[str, t.Any], _live: Live | None) -> list[Aim]:
    everything = [name for name in params["name"] if name and not name.strip("*?")]
    if everything and not params["confirm_all"]:
        why = (
            f"state=reverted with the pattern {everything[0]!r} would discard what every domain of the host has written"
        )
        raise Refusal("bad_option", "confirm_all", why, "Name the domains, or set confirm_all=true if that is meant.")
    return [GoBackTo(_way_back(params))]


def _way_back(params: dict[str, t.Any]) -> WayBack:
    return WayBack(
        snapshot="" if _is_retention(params) else _snapshot(params),
        targets=_targets(params),
        retire=params["retire"],
        speed=params["speed"],
        skips_running=params["running"] == "skip",
        directory=_directory(params),
        allows_snapshots=params["libvirt_snapshots"] == "ignore",
    )


OF_NEW_FILES = (
    "quiesce",
    "unfit_disks",
    *creation_spec(defaults=True),
    *ownership_spec(),
)
AIMS: dict[str, tuple[t.Callable[[dict[str, t.Any], Live | None], list[Aim]], t.Sequence[str]]] = {
    # What it is to do, and the options that have no meaning then.
    "present": (_put_on, ["retire", "speed", "confirm_all", "older_than", "keep"]),
    "committed": (_merge_down, [*OF_NEW_FILES, "libvirt_snapshots", "confirm_all"]),
    "reverted": (_go_back, [*OF_NEW_FILES, "speed", "older_than", "keep"]),
}


def _is_retention(params: dict[str, t.Any]) -> bool:
    """Whether the snapshots are picked by their age; Refusal if it is not said whether, or in two ways."""
    picks = params["older_than"] is not None or params["keep"] is not None
    if picks == (params["snapshot"] is not None):
        raise Refusal("bad_option", "snapshot", "give either snapshot, or older_than or keep with state=committed")
    if params["keep"] is not None and params["keep"] < 0:
        raise Refusal("bad_option", f"keep={params['keep']}", "must not be negative")
    return picks


def _retention(params: dict[str, t.Any]) -> Retention:
    age = params["older_than"]
    return Retention(None if age is None else seconds_of(age), params["keep"] or 0, time.time())


def _snapshot(params: dict[str, t.Any]) -> str:
    snapshot = str(params["snapshot"])
    if not snapshot.strip(".") or "/" in snapshot or not snapshot.isprintable():
        why = "must be a part of a file name: not empty, without slash and control characters"
        raise Refusal("bad_option", f"snapshot={snapshot!r}", why)
    return snapshot


def _targets(params: dict[str, t.Any]) -> tuple[str, ...] | None:
    return None if params["disks"] is None else tuple(params["disks"])


def _directory(params: dict[str, t.Any]) -> str | None:
    directory: str | None = params["directory"]
    if directory is not None and not (os.path.isabs(directory) and directory.isprintable()):
        why = "must be the absolute path of a folder, without control characters"
        raise Refusal("bad_option", f"directory={directory!r}", why)
    return directory


def request_from(params: dict[str, t.Any]) -> SnapshotRequest:
    """Return what is wanted of every domain that is to be on overlays; Refusal for what cannot be."""
    return SnapshotRequest(
        snapshot=_snapshot(params),
        targets=_targets(params),
        directory=_directory(params),
        bitmap_content=params["bitmap_content"],
        relative=params["relative"],
        creation=creation_from(params),
        skips_running=params["running"] == "skip",
        allows_snapshots=params["libvirt_snapshots"] == "ignore",
        skips_unfit=params["unfit_disks"] == "skip",
    )


@ending_cleanly()
def work(module: AnsibleModule) -> Report:
    """Find the domains and do what the state asks for."""
    settings = settings_from(module)
    params = module.params
    check_names(params, "name", "disks")
    make_aims, without = AIMS[params["state"]]
    refuse_given(params, without, f"state={params['state']}")
    retention = _retention(params) if _is_retention(params) else None
    is_live = params["running"] == "live"
    refuse_given(params, [] if is_live else ["quiesce"], f"running={params['running']}")

    calls: list[Call] = []

    def once(settings: Settings) -> Report:
        daemon = Libvirt(params["uri"])
        live = Live(daemon.version, quiesce=params["quiesce"]) if is_live else None
        if retention is None:
            call = Call(daemon, params["name"], make_aims(params, live), settings)
            calls.append(call)
            return _report(*call.run())
        request = _way_back(params)
        return _report(*merge_old(daemon, params["name"], request, retention, lambda one: _merge(one, live), settings))

    thawed = thaw_left(lambda: Libvirt(params["uri"]), check_mode=settings.check_mode)
    report = verified(once, settings, params, "domains")
    # Of the first call only: what comes after the run finds the snapshot gone, as it is to be.
    return report._replace(warnings=[*thawed, *_in_vain(calls[:1], params), *report.warnings])


def _in_vain(calls: t.Sequence[Call], params: dict[str, t.Any]) -> t.Iterator[str]:
    """Yield the warning that a snapshot which is to go is nowhere, while there are others: it may be misspelt.

    No failure, since a second run finds the same.
    """
    for call in calls:
        others = [] if params["state"] == "present" else call.snapshots_instead(params["snapshot"])
        if others:
            more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
            yield (
                f"{params['snapshot']}: none of these domains is on this snapshot, and nothing of it is left to do. "
                f"They are on {', '.join(others[:_MOST_NAMED])}{more}. Check the name, if this one was not merged down "
                "or gone back from before."
            )


def _report(domains: t.Sequence[DomainOutcome], warnings: t.Sequence[str]) -> Report:
    """Return how the call ended."""
    result = {
        "changed": any(domain.changed for domain in domains),
        "domains": [domain.as_result() for domain in domains],
        "diff": {
            "before": "".join(domain.diff[0] for domain in domains),
            "after": "".join(domain.diff[1] for domain in domains),
        },
    }
    failures = root_causes(problem for domain in domains for problem in domain.problems)
    created = {path: times for domain in domains for path, times in domain.created.items()}
    return Report(result, failures, warnings, created)


def main() -> None:
    """Run the module."""
    module = Module(argument_spec=argument_spec(), supports_check_mode=True)
    require(module, "libvirt-python", LIBVIRT_IMPORT_ERROR)
    run(module, work)


if __name__ == "__main__":
    main()
