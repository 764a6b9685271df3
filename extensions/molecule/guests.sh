#!/usr/bin/env bash
# guests.sh FOLDER NAME[=DISKS]...: on a host of the fleet, make images with bitmaps for each of these guests, by the
# host's own QEMU, and define it as a libvirt domain. web=2 has the disks web-vda.qcow2 and web-vdb.qcow2. A guest called
# plain-… gets images only. What is there already stays as it is.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
folder=$1
shift
kind=qemu
[ ! -w /dev/kvm ] || kind=kvm
mkdir -p "$folder"
cd "$folder"

make_disk() {  # make_disk FILE: with a bitmap of each kind that incremental backups leave behind
  qemu-img create -q -f qcow2 "$1" 64M
  qemu-img bitmap --add "$1" crashed
  # A VM that dies leaves the bitmaps that it was recording to marked as in use.
  (qemu-io -c 'write 0 64k' -c abort "$1" || true) > /dev/null 2>&1
  qemu-img bitmap --add "$1" monday
  qemu-img bitmap --add -g 128k "$1" tuesday
  qemu-img bitmap --add --disable "$1" sunday
  sha256sum "$1" >> SHA256SUMS
}

for guest; do
  name=${guest%%=*} disks='' letter=a
  count=${guest#"$name"}
  for _ in $(seq "${count#=}"); do
    file=$folder/$name-vd$letter.qcow2
    [ -e "$file" ] || make_disk "$name-vd$letter.qcow2"
    disks+="<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='$file'/><target dev='vd$letter' bus='virtio'/></disk>"
    letter=$(tr a-y b-z <<< "$letter")
  done
  [[ "$name" != plain-* ]] || continue
  virsh --quiet dominfo "$name" > /dev/null 2>&1 && continue
  cat > "$name.xml" << XML
<domain type='$kind'>
  <name>$name</name>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='$(uname -m)'>hvm</type></os>
  <devices>
    $disks
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
  </devices>
</domain>
XML
  virsh --quiet define "$name.xml"
done
