#!/usr/bin/env bash
# Functions for the tests with libvirt. To be read in, with the working folder: . lab.sh FOLDER
# The libvirt daemon is one of our own: its state lies in the folder, in a mount namespace that goes with it.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
lab=$1
export LIBVIRT_DEFAULT_URI="qemu+unix:///system?socket=$lab/sock/libvirt-sock"

start_daemon() {
  local place
  mkdir -p "$lab"/{etc,lib,cache,log,run,sock,disks,backups}
  for place in etc lib cache log run; do
    mkdir -p "$(state_of "$place")"  # a mount point, if libvirt has not made it yet
  done
  cat > "$lab/etc/qemu.conf" << 'CONF'
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
user = "root"
group = "root"
CONF
  # Hosts that share a network have ranges of display ports of their own.
  if [ -e /etc/libvirt/qemu.conf ]; then sed -n "/^remote_display_port/p" /etc/libvirt/qemu.conf >> "$lab/etc/qemu.conf"; fi
  # The daemon insists on the user of its package, which only the package with the system service makes.
  cp /etc/passwd /etc/group "$lab"
  grep -q ^libvirt-qemu: "$lab/passwd" || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> "$lab/passwd"
  grep -q ^kvm: "$lab/group" || echo 'kvm:x:64056:' >> "$lab/group"
  grep -q ^libvirt-qemu: "$lab/group" || echo 'libvirt-qemu:x:64055:' >> "$lab/group"
  printf 'unix_sock_dir = "%s"\nauth_unix_rw = "none"\n' "$lab/sock" > "$lab/libvirtd.conf"
  export -f state_of
  export lab
  # shellcheck disable=SC2016  # the shell inside expands it
  setsid unshare --mount --propagation slave bash -c '
    for place in etc lib cache log run; do mount --bind "$lab/$place" "$(state_of "$place")"; done
    for file in passwd group; do mount --bind "$lab/$file" "/etc/$file"; done
    exec libvirtd --config "$lab/libvirtd.conf" --pid-file "$lab/libvirtd.pid"
  ' < /dev/null > "$lab/libvirtd.log" 2>&1 &
  local deadline=$((SECONDS + 60))
  until virsh version > /dev/null 2>&1; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      cat "$lab/libvirtd.log" >&2
      return 1
    fi
    sleep 0.1
  done
}

state_of() {
  case $1 in
    etc) echo /etc/libvirt ;;
    lib) echo /var/lib/libvirt ;;
    cache) echo /var/cache/libvirt ;;
    log) echo /var/log/libvirt ;;
    run) echo /run/libvirt ;;
  esac
}

# End the domains, then the daemon; only what was started here.
stop_daemon() {
  local pid
  for pid in "$lab"/run/qemu/*.pid "$lab/libvirtd.pid"; do
    if [ -s "$pid" ]; then kill -KILL "$(cat "$pid")" 2> /dev/null || true; fi
  done
}

# Print all that the module could change: the files in the folder of the disks, with checksums, and the definitions.
# One virsh for all domains, and cksum, not sha256sum: either would take most of the time of a case.
world() {
  local commands
  (cd "$lab/disks" && find . | sort && find . -type f -exec cksum {} + | sort -k 3)
  commands=$(virsh list --all --uuid | sort | sed -n 's/..*/dumpxml --inactive &;/p' | tr -d '\n')
  [ -z "$commands" ] || virsh -q "$commands"
  commands=$(virsh pool-list --uuid | sort | sed -n 's/..*/vol-list &;/p' | tr -d '\n')
  [ -z "$commands" ] || virsh -q "$commands"
}

# define NAME DISK-ELEMENT...: define a domain with these disks; it needs no operating system.
define() {
  local name=$1 kind=qemu uuid asked=
  shift
  uuid=$(virsh -q domuuid "$name" 2> /dev/null) || true  # it may be there already
  [ -w /dev/kvm ] && kind=kvm
  # libvirt 7.0 can make checkpoints, and wants to be asked for it.
  case $(virsh --version) in 7.0.*) asked=" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'" ;; esac
  cat > "$lab/$name.xml" << XML
<domain type='$kind'$asked>
  <name>$name</name>${uuid:+<uuid>$uuid</uuid>}
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='$(uname -m)'>hvm</type></os>
  <devices>
    $*
    <graphics type='vnc' passwd='secret'/>
  </devices>
  ${asked:+<qemu:capabilities><qemu:add capability='incremental-backup'/></qemu:capabilities>}
</domain>
XML
  virsh -q define "$lab/$name.xml"
}

# disk TARGET FILE [FORMAT [INNER-ELEMENTS]]: the element of a disk.
disk() {
  printf "<disk type='file' device='disk'><driver name='qemu' type='%s'/><source file='%s'/>%s<target dev='%s' bus='virtio'/></disk>" \
    "${3:-qcow2}" "$2" "${4:-}" "$1"
}

# volume TARGET POOL NAME [MORE-ATTRIBUTES]: the element of a disk that is a volume of a storage pool.
volume() {
  printf "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='%s' volume='%s' %s/><target dev='%s' bus='virtio'/></disk>" \
    "$2" "$3" "${4:-}" "$1"
}

# killed DOMAIN: have its QEMU die, and wait until libvirt has seen it.
killed() {
  kill -KILL "$(cat "$lab/run/qemu/$1.pid")"
  until [[ $(virsh domstate "$1") == 'shut off' ]]; do sleep 0.05; done
}

# guest DOMAIN TARGET COMMAND...: have the guest write, by commands of qemu-io.
guest() {
  local domain=$1 number command answer
  number=$(printf %d "'${2#vd}")
  shift 2
  for command; do
    answer=$(virsh qemu-monitor-command "$domain" --hmp \
      "qemu-io -d /machine/peripheral/virtio-disk$((number - 97))/virtio-backend \"$command\"")
    case $answer in *rror* | *ailed*) echo "$answer" >&2; return 1 ;; esac
  done
}

# merging DOMAIN: wait until a run has libvirt merge something of a domain, and print the process of the run.
merging() {
  local uuid i file
  uuid=$(virsh -q domuuid "$1" | head -n 1)
  for ((i = 0; i < 600; i++)); do
    for file in /run/kvmfleet-qcow2/*.json; do
      if grep -qs "$uuid" "$file"; then
        basename "${file%%-[0-9]*.json}"
        return
      fi
    done
    sleep 0.05
  done
  return 1
}

# Kill the daemon, and have another one.
restart_daemon() {
  kill -KILL "$(cat "$lab/libvirtd.pid")"
  sleep "${1:-0.2}"
  start_daemon
}

targets=(vda vdb)  # the disks of a domain that backup and same are about

# backup DOMAIN LABEL CHECKPOINT [SINCE]: back up its disks to files with that label; with SINCE only what has changed.
backup() {
  local domain=$1 label=$2 checkpoint=$3 since=${4:-} target disks=
  for target in "${targets[@]}"; do
    rm -f "$lab/backups/$label.$target"
    disks+="<disk name='$target' type='file'><driver type='qcow2'/><target file='$lab/backups/$label.$target'/></disk>"
  done
  echo "<domainbackup>${since:+<incremental>$since</incremental>}<disks>$disks</disks></domainbackup>" > "$lab/backup.xml"
  echo "<domaincheckpoint><name>$checkpoint</name></domaincheckpoint>" > "$lab/checkpoint.xml"
  virsh -q backup-begin "$domain" "$lab/backup.xml" "$lab/checkpoint.xml" > /dev/null
  until [[ $(virsh domjobinfo "$domain") == *None* ]]; do sleep 0.05; done
  [[ $(virsh domjobinfo --completed "$domain") == *Completed* ]]
}

# same LABEL-OF-FULL LABEL... IMAGE...: rebuild the disks from a full backup and increments, and compare them with their
# images byte by byte.
same() {
  local count=${#targets[@]}
  local images=("${@: -count}") labels=("${@:1:$#-count}") number target label previous
  for number in "${!targets[@]}"; do
    target=${targets[$number]}
    previous=
    for label in "${labels[@]}"; do
      cp "$lab/backups/$label.$target" "$lab/rebuilt.$label"
      # The target of an increment has the live disk below it; what it holds itself goes on top of the backup before.
      [ -z "$previous" ] || qemu-img rebase -q -u -b "$previous" -F qcow2 "$lab/rebuilt.$label"
      previous=$lab/rebuilt.$label
    done
    qemu-img convert -f qcow2 -O raw "$previous" "$lab/rebuilt.raw"
    qemu-img convert -f qcow2 -O raw "${images[$number]}" "$lab/truth.raw"
    cmp "$lab/rebuilt.raw" "$lab/truth.raw"
    # Comparing nothing with nothing would prove nothing.
    if cmp -s -n 1048576 "$lab/truth.raw" /dev/zero; then return 1; fi
  done
}
