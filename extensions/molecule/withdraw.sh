#!/usr/bin/env bash
# withdraw.sh PACKAGE: on a host of the fleet, remove this Debian package, and offer it in a repository of files, which is the
# only one that apt knows from then on: no host of a test asks the network for anything.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
package=$1 repository=/srv/packages
tree=$repository/tree
mkdir -p "$tree/DEBIAN"
# Packed again from what is installed, without its maintainer's scripts. dpkg left the manuals out when it installed it.
dpkg --listfiles "$package" | while read -r file; do
  if [ -f "$file" ] || [ -L "$file" ]; then echo ".$file"; fi
done | tar --create --directory / --files-from - | tar --extract --directory "$tree"
dpkg-query --status "$package" | sed '/^Status:/d; /^Conffiles:/,/^[^ ]/{/^Conffiles:/d; /^ /d}' > "$tree/DEBIAN/control"
dpkg-deb --build "$tree" "$repository/$package.deb" > /dev/null
rm -r "$tree"
dpkg --purge "$package" > /dev/null
cd "$repository"
{
  dpkg-deb --field "$package.deb"
  echo "Filename: ./$package.deb"
  echo "Size: $(stat --format %s "$package.deb")"
  echo "SHA256: $(sha256sum "$package.deb" | cut -d ' ' -f 1)"
} > Packages
rm -rf /etc/apt/sources.list.d/*
echo "deb [trusted=yes] file:$repository ./" > /etc/apt/sources.list
apt-get update -qq
