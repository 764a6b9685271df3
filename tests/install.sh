#!/usr/bin/env bash
# install.sh COMMAND-OR-FILE=PACKAGE...: install the Debian packages of which that is missing, after saying so.
# On Fedora and EL the same by dnf, with that family's names for the packages; that branch has never been run.
set -euo pipefail

missing=()
for pair in "$@"; do
  [ -e "${pair%%=*}" ] || PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%=*}" > /dev/null || missing+=("${pair#*=}")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)
if command -v apt-get > /dev/null; then
  echo "Installing these Debian packages, by apt-get${as_root[*]:+ with sudo}: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
elif command -v dnf > /dev/null; then
  declare -A name=([qemu-utils]=qemu-img [qemu-system-common]=qemu-kvm-core [qemu-system-x86]=qemu-kvm-core
    [python3-venv]=python3 [shellcheck]=ShellCheck [libc6-dev]=glibc-devel [python3-dev]=python3-devel
    [libvirt-dev]=libvirt-devel [libvirt-clients]=libvirt-client [pkg-config]=pkgconf-pkg-config)
  packages=()
  for package in "${missing[@]}"; do packages+=("${name[$package]:-$package}"); done
  echo "Installing these packages, by dnf${as_root[*]:+ with sudo}: ${packages[*]}"
  "${as_root[@]}" dnf install -y -q "${packages[@]}"
else
  echo "Neither apt-get nor dnf is here. Install by hand what provides: $*" >&2
  exit 1
fi
