#!/usr/bin/env bash
# images.sh FOLDER: images of three VMs in that folder, with bitmaps as incremental backups leave them.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
mkdir -p "$1"
cd "$1"
for disk in web-a web-b db; do
  qemu-img create -q -f qcow2 "$disk.qcow2" 64M
  qemu-img bitmap --add "$disk.qcow2" monday
  qemu-img bitmap --add -g 128k "$disk.qcow2" tuesday
  qemu-img bitmap --add --disable "$disk.qcow2" sunday
done
qemu-img create -q -f raw plain.raw 64M
