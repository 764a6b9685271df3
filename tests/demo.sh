#!/usr/bin/env bash
# demo.sh: the main job on a sample disk. Installs QEMU and ansible-core if they are missing; all else is in .cache/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
demo=$PWD/.cache/demo
active=$demo/vm1.qcow2 overlay=$demo/vm1.snap.qcow2

say() { printf '\n== %s\n' "$*"; }

say "What is needed"
tests/install.sh qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common python3=python3
rm -rf "$demo"
mkdir -p "$demo"
# Debian 12 has an ansible-core that is too old, so an own one goes into a virtual environment.
ansible=$PWD/.cache/venv/demo/bin
if ! "$ansible/ansible" --version > /dev/null 2>&1; then
  python3 -c 'import venv, ensurepip' 2> /dev/null || tests/install.sh no-ensurepip-yet=python3-venv
  echo "Installing with pip into .cache/venv/demo: ansible-core"
  python3 -m venv .cache/venv/demo
  "$ansible/pip" install --quiet 'ansible-core>=2.18' 2>&1 | { grep -v '^WARNING: Location' || true; }
fi
export ANSIBLE_COLLECTIONS_PATH=$demo/collections ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_INVENTORY_UNPARSED_WARNING=false
"$ansible/ansible-galaxy" collection install --offline --force -p "$demo/collections" "$PWD" > /dev/null

say "A disk with bitmaps: ACTIVE"
qemu-img create -q -f qcow2 "$active" 10G
qemu-img bitmap --add "$active" crashed
# A VM that dies leaves the bitmaps it was recording to marked as in use.
(qemu-io -c 'write 0 64k' -c abort "$active" || true) > /dev/null 2>&1
qemu-img bitmap --add -g 4k "$active" monday
qemu-img bitmap --add "$active" tuesday
qemu-img bitmap --add -g 1M "$active" "wednesday, noon"
qemu-img bitmap --add --disable "$active" sunday
before=$(sha256sum < "$active")
echo "$active"

call=(localhost -m kvmfleet.qcow2.qcow2_overlay -a "path=$overlay backing_file=$active")
say "ansible ${call[*]}"
"$ansible/ansible" "${call[@]}"

say "The bitmaps of both images, as qemu-img tells them"
python3 - "$active" "$overlay" <<'PYTHON'
import json, subprocess, sys

def bitmaps(path):
    said = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", path]))
    return {b["name"]: b for b in said["format-specific"]["data"].get("bitmaps", [])}

def state(bitmap):
    if bitmap is None:
        return "-"
    flags = ["recording" if "auto" in bitmap["flags"] else "disabled"]
    flags += ["inconsistent"] if "in-use" in bitmap["flags"] else []
    return f"{', '.join(flags)} ({bitmap['granularity'] // 1024} KiB)"

active, overlay = map(bitmaps, sys.argv[1:])
row = "{:<18}{:<38}{}".format
print(row("bitmap", "ACTIVE", "OVERLAY"))
for name, bitmap in active.items():
    print(row(name, state(bitmap), state(overlay.get(name))))
PYTHON

say "The same call again"
"$ansible/ansible" "${call[@]}" | grep -E 'SUCCESS|changed|state'

[ "$before" = "$(sha256sum < "$active")" ] && say "ACTIVE was not written to: its checksum is what it was"
