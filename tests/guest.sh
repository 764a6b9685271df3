#!/usr/bin/env bash
# guest.sh FOLDER: make a Linux guest of Debian packages, which are downloaded and not installed: FOLDER/vmlinuz and
# FOLDER/initrd. It mounts the file system on its disk, writes to it for ever, and runs QEMU's guest agent.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
folder=$1
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console)
mark=$(sha256sum "${BASH_SOURCE[0]}")
[ "$(cat "$folder/mark" 2> /dev/null)" != "$mark" ] || exit 0

meta=linux-image-cloud-$(dpkg --print-architecture)
kernel=$(apt-cache depends "$meta" | awk '/Depends: linux-image-/ { print $2 }')
[ -n "$kernel" ] || { echo "apt knows no package $meta; run apt-get update" >&2; exit 1; }
rm -rf "$folder"
mkdir -p "$folder/packages" "$folder/files" "$folder/root"/{bin,dev,lib,mnt,modules,proc,sys,tmp,var/run}
cd "$folder"
echo "Downloading these Debian packages, by apt-get: $kernel qemu-guest-agent busybox-static"
(cd packages && apt-get -qq download "$kernel" qemu-guest-agent busybox-static 2> /dev/null)
for package in packages/*.deb; do dpkg-deb -x "$package" files; done
cp files/boot/vmlinuz-* vmlinuz
cp files/bin/busybox files/usr/sbin/qemu-ga root/bin || cp files/usr/bin/busybox files/usr/sbin/qemu-ga root/bin
for module in "${modules[@]}"; do
  file=$(find files -name "$module.ko*")
  case $file in
    *.xz) xz -dc "$file" > "root/modules/$module.ko" ;;
    *) cp "$file" root/modules/ ;;
  esac
done
ldd root/bin/qemu-ga | grep -o '/[^ ]*' | while read -r library; do
  mkdir -p "root${library%/*}"
  cp -L "$library" "root$library"
done

cat > root/init << INIT
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in ${modules[*]}; do insmod "/modules/\$module.ko"; done
INIT
cat >> root/init << 'INIT'
mount -t ext4 /dev/vda /mnt
for port in /sys/class/virtio-ports/*; do
  [ "$(cat "$port/name")" != org.qemu.guest_agent.0 ] || qemu-ga -d -m virtio-serial -p "/dev/${port##*/}" -t /var/run -F/hook
done
i=0
while :; do
  i=$((i + 1))
  echo $i >> /mnt/log
  echo $i > /mnt/new
  mv /mnt/new /mnt/last
  sync
  echo "wrote $i"
  usleep 100000
done
INIT
# Once told to freeze, it takes its time, so that a test can do something meanwhile.
cat > root/hook << 'HOOK'
#!/bin/sh
echo "hook $1" > /dev/console
[ "$1" != freeze ] || sleep 2
HOOK
chmod +x root/init root/hook
(cd root && find . | bin/busybox cpio -o -H newc 2> /dev/null | gzip -1 > ../initrd)
rm -rf packages files root
echo "$mark" > mark
