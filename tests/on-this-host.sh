#!/usr/bin/env bash
# on-this-host.sh [--domain]: tell on one page whether the collection works on this host, whatever its distribution. As root.
# It works on small images in a folder of its own, .cache/on-this-host, and removes them. --domain defines a libvirt domain,
# kvmfleet-on-this-host, never starts it, and undefines it. Nothing is installed but ansible-core, with pip, into that folder.
# FOLDER=/srv/vms has the images made there, to try the storage of the VMs.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$PWD cache=$PWD/.cache/on-this-host
python=${PYTHON:-/usr/bin/python3}
domain=kvmfleet-on-this-host
export LIBVIRT_DEFAULT_URI=${LIBVIRT_DEFAULT_URI:-qemu:///system}
failed=() lab=''

row() { printf '%-26s %s\n' "$1" "$2"; }

first_line() { "$@" 2> /dev/null | head -n 1 || true; }  # first_line COMMAND...: of what it tells, nothing if it is not there

module() {  # module NAME ARGUMENTS: run a module as Ansible does on a host; its result is in $cache/result
  local status=0
  PYTHONPATH=$cache/ansible:$cache/collections "$python" -m "ansible_collections.kvmfleet.qcow2.plugins.modules.$1" \
    <<< "{\"ANSIBLE_MODULE_ARGS\": $2}" > "$cache/result" 2> "$cache/errors" || status=$?
  [ -s "$cache/result" ] || cat "$cache/errors" > "$cache/result"
  return "$status"
}

holds() {  # holds CONDITION: whether it holds of the result r, as Python
  "$python" -c 'import json, sys; r = json.load(open(sys.argv[1])); sys.exit(not eval(sys.argv[2]))' "$cache/result" "$1" 2> /dev/null
}

recording() {  # recording IMAGE BITMAP: whether qemu-img, not this collection, says so
  qemu-img info --output=json "$1" | "$python" -c 'import json, sys
bitmaps = json.load(sys.stdin)["format-specific"]["data"].get("bitmaps", [])
sys.exit(not any(one["name"] == sys.argv[1] and one["flags"] == ["auto"] for one in bitmaps))' "$2"
}

check() {  # check WHAT FUNCTION: tell whether it works
  if "$2" > "$cache/output" 2>&1; then row "$1" works; return; fi
  row "$1" FAILED
  sed 's/^/    /' "$cache/output" "$cache/result" 2> /dev/null | cut -c 1-400 | head -n 12
  failed+=("$1")
}

make_images() {
  rm -rf "$lab"
  mkdir -p "$lab"
  : > "$cache/result"
  qemu-img create -q -f qcow2 "$lab/vm.qcow2" 64M
  qemu-img bitmap --add "$lab/vm.qcow2" monday
  qemu-io -c 'write -P 1 0 1M' "$lab/vm.qcow2"
}

overlay() { module qcow2_overlay "{\"path\": \"$lab/vm.snap.qcow2\", \"backing_file\": \"$lab/vm.qcow2\" ${1:-}}"; }

makes_overlay() { make_images && overlay && holds 'r["changed"]' && recording "$lab/vm.snap.qcow2" monday && qemu-img check -q "$lab/vm.snap.qcow2"; }

is_idempotent() { overlay && holds 'not r["changed"]'; }

examines() {
  module qcow2_info "{\"paths\": [\"$lab/vm.snap.qcow2\"]}" && holds '[one["valid"] for one in r["disks"][0]["checkpoints"]] == [True]'
}

reads_as() {  # reads_as IMAGE COMMAND: whether qemu-io reads the pattern in it; its exit code does not tell that in every version
  qemu-io -c "$2" "$1" > "$cache/read" && [ "$(grep -c 'verification failed' "$cache/read")" -eq 0 ]
}

merges_down() {
  qemu-io -c 'write -P 2 8M 1M' "$lab/vm.snap.qcow2"
  overlay ', "state": "committed"' && [ ! -e "$lab/vm.snap.qcow2" ] && recording "$lab/vm.qcow2" monday &&
    qemu-img check -q "$lab/vm.qcow2" && reads_as "$lab/vm.qcow2" 'read -P 1 0 1M' && reads_as "$lab/vm.qcow2" 'read -P 2 8M 1M'
}

goes_back() {
  overlay && overlay ', "state": "reverted"' && [ ! -e "$lab/vm.snap.qcow2" ] && [ -e "$lab/vm.snap.qcow2.reverted" ] &&
    recording "$lab/vm.qcow2" monday
}

heals() {
  make_images && qemu-img create -q -f qcow2 -F qcow2 -b "$lab/vm.qcow2" "$lab/vm.snap.qcow2" &&
    module qcow2_bitmap "{\"path\": \"$lab/vm.snap.qcow2\"}" && recording "$lab/vm.snap.qcow2" monday
}

sees_what_is_in_use() {  # by QEMU's locks, which the storage must have
  make_images
  local status=0
  qemu-io -c 'sleep 20000' "$lab/vm.qcow2" &
  local vm=$!
  sleep 1
  overlay || status=$?
  kill "$vm"
  wait "$vm" || true
  [ "$status" -ne 0 ] && holds 'r["code"] == "in_use"' && [ ! -e "$lab/vm.snap.qcow2" ]
}

on_domain() {  # on_domain STATE: with the snapshot `before`
  module domain_overlay "{\"name\": [\"$domain\"], \"snapshot\": \"before\", \"state\": \"$1\", \"uri\": \"$LIBVIRT_DEFAULT_URI\"}"
}

disk_is() { virsh -q domblklist "$domain" | grep -qF "$lab/$1"; }

switches_domain() {
  make_images
  cat > "$cache/domain.xml" << XML
<domain type='qemu'><name>$domain</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='$lab/vm.qcow2'/>
<target dev='vda' bus='virtio'/></disk></devices></domain>
XML
  virsh -q define "$cache/domain.xml" && on_domain present && disk_is vm.before.qcow2 &&
    recording "$lab/vm.before.qcow2" monday && on_domain reverted && disk_is vm.qcow2
}

clean() {
  [ -z "$lab" ] || rm -rf "$lab"
  [ -z "${with_domain:-}" ] || virsh -q undefine "$domain" > /dev/null 2>&1 || true
}

of_system() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }  # of_system KEY

tell_packages() {
  case " $(of_system ID) $(of_system ID_LIKE) " in
    *" debian "* | *" ubuntu "*) echo "qemu-utils qemu-system-common qemu-system-x86 python3-libvirt python3-pip" ;;
    *" fedora "* | *" rhel "*) echo "qemu-img qemu-kvm-core python3-libvirt python3-pip" ;;
    *suse*) echo "qemu-img (or qemu-tools) qemu-x86 python3-libvirt-python python3-pip" ;;
    *) echo "QEMU's tools, its storage daemon or a system emulator, libvirt's bindings for Python, pip" ;;
  esac
}

[ "$(id -u)" -eq 0 ] || { echo "Run this as root." >&2; exit 2; }
case ${1:-} in
  '') ;;
  --domain) with_domain=yes ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac
mkdir -p "$cache/collections/ansible_collections/kvmfleet"
ln -sfn "$project" "$cache/collections/ansible_collections/kvmfleet/qcow2"
lab=$(mktemp -d "${FOLDER:-$cache}/kvmfleet-XXXXXX")
trap clean EXIT

row collection "$(sed -n 's/^version: //p' galaxy.yml), $(git rev-parse --short HEAD 2> /dev/null || echo 'no checkout')"
row system "$(of_system PRETTY_NAME), Linux $(uname -r), $(uname -m)"
row Python "$(first_line "$python" --version), $python"
row qemu-img "$(first_line qemu-img --version)"
row qemu-storage-daemon "$(first_line qemu-storage-daemon --version)"
emulator=$(command -v "qemu-system-$(uname -m)" qemu-kvm | head -n 1 || true)
[ -z "$emulator" ] && [ -x /usr/libexec/qemu-kvm ] && emulator=/usr/libexec/qemu-kvm
row 'system emulator' "${emulator:+$(first_line "$emulator" --version), $emulator}"
row 'bindings of libvirt' "$("$python" -c 'import libvirt; print(libvirt.getVersion())' 2> /dev/null || echo none)"
row "libvirt's sockets" "$(compgen -G '/run/libvirt/*-sock' | tr '\n' ' ' || true)"
row SELinux "$(first_line getenforce)"
row AppArmor "$(cat /sys/module/apparmor/parameters/enabled 2> /dev/null || true)"
row 'file system' "$(findmnt -n -o FSTYPE,OPTIONS -T "$lab")"
echo

lacking=''
command -v qemu-img > /dev/null && command -v qemu-io > /dev/null || lacking=yes
command -v qemu-storage-daemon > /dev/null || [ -n "$emulator" ] || lacking=yes
[ -z "${with_domain:-}" ] || "$python" -c 'import libvirt' 2> /dev/null || lacking=yes
if [ -n "$lacking" ]; then
  echo "Something is missing above. Packages: $(tell_packages)"
  echo "VERDICT: not tested"
  exit 1
fi
if [ ! -d "$cache/ansible/ansible" ]; then
  echo "Installing ansible-core 2.18 with pip into .cache/on-this-host: it runs the modules as on a managed host."
  # Only its part for managed hosts is used, which runs on Pythons that its controller's part does not.
  "$python" -m pip install --quiet --no-deps --ignore-requires-python --target "$cache/ansible" 'ansible-core==2.18.*' 2>&1 |
    { grep -v '^WARNING' || true; }
fi

check 'makes an overlay' makes_overlay
check 'changes nothing again' is_idempotent
check 'examines the chain' examines
check 'merges down' merges_down
check 'goes back' goes_back
check 'heals bitmaps' heals
check 'sees what is in use' sees_what_is_in_use
[ -z "${with_domain:-}" ] || check 'switches a domain' switches_domain

echo
if [ "${#failed[@]}" -gt 0 ]; then
  printf -v all ', %s' "${failed[@]}"
  echo "VERDICT: does not work here: ${all#, }"
  exit 1
fi
echo "VERDICT: works here${with_domain:+, with domains}"
