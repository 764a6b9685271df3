#!/usr/bin/env bash
# fleet.sh roots | up [HOST...] | down [HOST...]: real hosts for the Molecule scenarios, on this machine, without VMs or containers.
#   roots  build the root tree of each host's Debian release, unless it is there and as it should be
#   up     start the hosts (all four, if none is named), and wait until sshd and the libvirt daemon of each answer
#   down   end them with everything that runs on them; without names, remove the keys too. The root trees stay
# A host is a process tree with mount, pid, ipc and uts namespaces of its own, on an overlay of its root tree in memory.
# It shares the machine's network, where its sshd listens on loopback only: 127.77.0.N, port 2222, N as in the name.
# Everything lies below $FLEET. Needs root, for the namespaces and mounts.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
umask 022
self=$(realpath "${BASH_SOURCE[0]}")
declare -A release=([hv11]=bullseye [hv12]=bookworm [hv13]=trixie [hv14]=forky)

die() {
  printf 'fleet.sh: %s\n' "$*" >&2
  exit 1
}

check_machine() {
  [ "$(uname -s)" = Linux ] || die "the hosts are made of Linux namespaces, and this is $(uname -s)"
  [ "$(id -u)" -eq 0 ] || die "making namespaces and mounts needs root; run it with sudo"
  local command missing=()
  for command in mmdebstrap ssh ssh-keygen unshare flock; do
    [ -n "$(command -v "$command")" ] || missing+=("$command")
  done
  [ "${#missing[@]}" -eq 0 ] || die "missing: ${missing[*]} (Debian packages: mmdebstrap, openssh-client, util-linux)"
}

is_up() { [ -e "$fleet/hosts/$1/lock" ] && ! flock --nonblock "$fleet/hosts/$1/lock" true; }

build_root() {  # build_root HOST
  local name=$1 suite=${release[$1]} tree log packages options place mark started=$SECONDS
  tree=$fleet/roots/$suite log=$fleet/roots/$suite.log
  packages=python3,python3-apt,openssh-server,openssh-sftp-server,procps,mount,hostname,qemu-utils,qemu-system-x86
  packages+=,libvirt-daemon,libvirt-daemon-driver-qemu,libvirt-clients,python3-libvirt,acl,exfat-fuse,exfatprogs
  options=('--aptopt=Acquire::Languages "none"' --dpkgopt=force-unsafe-io)
  # Documentation, and emulators that no test starts, are half as much again.
  for place in share/doc share/info share/locale share/man bin/qemu-system-i386 bin/qemu-system-x86_64-microvm; do
    options+=("--dpkgopt=path-exclude=/usr/$place*")
  done
  case $suite in
    bullseye | bookworm) packages+=,qemu-system-common ;;  # where qemu-storage-daemon is, up to Debian 12
    *) packages+=,libvirt-daemon-driver-storage ;;  # a package of its own from Debian 13 on
  esac
  case $suite in
    forky) options+=('--aptopt=Acquire::Check-Valid-Until "false"') ;;  # a mirror may lag behind
  esac
  mark=$(printf '%s\n' "$suite" "$packages" "${options[@]}" | sha256sum)
  [ "$(cat "$tree.mark" 2> /dev/null)" != "$mark" ] || return 0
  ! is_up "$name" || die "$name is up on a root tree that is out of date: fleet.sh down $name"
  echo "Building the root tree of $name (Debian $suite) with mmdebstrap"
  rm -rf --one-file-system "$tree" "$tree.mark"
  if ! mmdebstrap --mode=root --variant=apt "${options[@]}" --include="$packages" "$suite" "$tree" > "$log" 2>&1; then
    tail -n 20 "$log" >&2
    die "no root tree for $name; all of the output is in $log"
  fi
  echo "$mark" > "$tree.mark"
  echo "The root tree of $name is built: $(du -sm "$tree" | cut -f 1) MB, $((SECONDS - started)) s"
}

build_roots() {  # build_roots HOST...: two at a time
  mkdir -p "$fleet/roots"
  printf '%s\n' "$@" | xargs -P 2 -I '{}' "$self" build_root '{}'
}

make_keys() {
  local key
  for key in id_ed25519 ssh_host_ed25519_key; do
    [ -e "$fleet/$key" ] || ssh-keygen -q -t ed25519 -N '' -C "$key of the test fleet" -f "$fleet/$key"
  done
}

start() {  # start HOST: unless it is up
  local name=$1 folder=$fleet/hosts/$1
  mkdir -p "$folder/mnt"
  # unshare holds the lock until all of the host is gone: whether a host is up, and whose the process id is, is never a guess.
  exec 9> "$folder/lock"
  if flock --nonblock 9; then
    rm -f "$folder/pid"
    setsid --fork env -i "FLEET=$fleet" HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
      unshare --mount --uts --ipc --pid --fork --kill-child "$self" boot "$name" < /dev/null > "$folder/log" 2>&1
  fi
  exec 9>&-
}

boot() {  # boot HOST: the first process of the host, which becomes its sshd
  local name=$1 folder=$fleet/hosts/$1 device number pid
  exec 9>&-  # the lock is for unshare alone to hold
  read -r pid _ < /proc/self/stat  # /proc is the machine's still, so this is our number there
  echo "$pid" > "$folder/pid"
  hostname "$name"
  mount -t tmpfs -o size=4g,mode=755 tmpfs "$folder/mnt"
  cd "$folder/mnt"
  mkdir upper work root
  mount -t overlay -o "lowerdir=$fleet/roots/${release[$name]},upperdir=$PWD/upper,workdir=$PWD/work" overlay root
  cd root

  mount -t proc proc proc
  mount --bind /sys sys  # libvirt reads there what the processors are
  mount -o remount,bind,ro sys
  mount -t tmpfs -o mode=755,size=4m tmpfs dev
  for device in null zero full random urandom tty kvm fuse loop-control; do
    [ -e "/dev/$device" ] || continue  # /dev/kvm is not on every machine
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
  done
  for number in {0..63}; do mknod -m 660 "dev/loop$number" b 7 "$number"; done  # the machine's, shared with all others
  ln -s /proc/self/fd dev/fd
  mkdir dev/pts dev/shm
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
  ln -s pts/ptmx dev/ptmx
  mount -t tmpfs -o mode=1777 tmpfs dev/shm
  mount -t tmpfs -o mode=755 tmpfs run
  mkdir -p run/sshd srv/small
  mount -t tmpfs -o size=8m,mode=755 tmpfs srv/small  # a disk that a test can fill up

  configure
  pivot_root . mnt
  cd /
  umount --lazy /mnt
  hash -r
  libvirtd > /var/log/libvirtd.log 2>&1 &
  exec /usr/sbin/sshd -D -e
}

configure() {  # in the folder that will be the host's root
  local number=${name#hv}
  echo "$name" > etc/hostname
  echo "127.0.0.1 localhost $name" > etc/hosts
  rm -f etc/resolv.conf  # the one of the machine that the tree was built on; no name is ever asked of the network
  install -d -m 700 root/.ssh
  install -m 600 "$fleet/id_ed25519.pub" root/.ssh/authorized_keys
  install -m 600 "$fleet/ssh_host_ed25519_key" etc/ssh/ssh_host_ed25519_key
  # Hundreds of inventory names may be one host.
  cat > etc/ssh/sshd_config << CONF
ListenAddress 127.77.0.$number:2222
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile none
UseDNS no
UsePAM no
PasswordAuthentication no
MaxStartups 400
MaxSessions 400
Subsystem sftp /usr/lib/openssh/sftp-server
CONF
  # From OpenSSH 9.8 on, a source that often hangs up early is not let in for a while; here all come from one source.
  case ${release[$name]} in bullseye | bookworm) ;; *) echo 'PerSourcePenalties no' >> etc/ssh/sshd_config ;; esac
  # The hosts share the network, so each has a range of display ports of its own.
  cat > etc/libvirt/qemu.conf << CONF
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
user = "root"
group = "root"
remote_display_port_min = $((5900 + number * 100))
remote_display_port_max = $((5999 + number * 100))
CONF
  echo 'auth_unix_rw = "none"' > etc/libvirt/libvirtd.conf
  # The daemon insists on the user of its package, which only the package with the system service makes.
  grep -q ^libvirt-qemu: etc/passwd || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> etc/passwd
  grep -q ^kvm: etc/group || echo 'kvm:x:64056:' >> etc/group
  grep -q ^libvirt-qemu: etc/group || echo 'libvirt-qemu:x:64055:' >> etc/group
}

remote() {  # remote HOST COMMAND...: with no key, agent, configuration or list of hosts but ours
  local name=$1
  shift
  ssh -F none -i "$fleet/id_ed25519" -o IdentitiesOnly=yes -o IdentityAgent=none -o BatchMode=yes -o ConnectTimeout=5 \
    -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o GlobalKnownHostsFile=/dev/null -o LogLevel=ERROR \
    -p 2222 "root@127.77.0.${name#hv}" "$@"
}

wait_for() {  # wait_for HOST
  local deadline=$((SECONDS + 60)) answer
  until answer=$(remote "$1" virsh --quiet --connect qemu:///system list 2>&1); do
    if [ "$SECONDS" -ge "$deadline" ] || ! is_up "$1"; then
      cat "$fleet/hosts/$1/log" >&2
      die "$1 does not answer: $answer"
    fi
    sleep 0.1
  done
}

up() {
  local name
  build_roots "$@"
  make_keys
  for name; do start "$name"; done
  for name; do wait_for "$name"; done
  echo "Up: $*"
}

stop() {  # stop HOST: if it is up
  local name=$1 folder=$fleet/hosts/$1
  while is_up "$name"; do
    # With the first process the kernel ends all others of the host, and its mounts go with them.
    if [ -s "$folder/pid" ]; then
      kill -KILL "$(cat "$folder/pid")" 2> /dev/null || true
      flock --timeout 30 "$folder/lock" true || die "$name does not end"
    else
      sleep 0.05  # it has just been started
    fi
  done
  rm -rf --one-file-system "$folder"
}

down() {
  local name
  for name; do stop "$name"; done
  echo "Down: $*"
}

forget_keys() {
  rm -f "$fleet"/{id_ed25519,ssh_host_ed25519_key}{,.pub}
  [ ! -d "$fleet/hosts" ] || rmdir "$fleet/hosts"
}

usage() {
  sed -n '2,8s/^# //p' "$self"
  exit 2
}

[ "$#" -gt 0 ] || usage
fleet=$(realpath -m "${FLEET:?is to be the folder that the hosts lie in}")
command=$1
shift
everything=$((! $#))
[ "$#" -gt 0 ] || set -- hv11 hv12 hv13 hv14
for name; do [ -n "${release[$name]:-}" ] || die "no such host: $name (there are hv11 to hv14)"; done
case $command in
  roots) check_machine && build_roots "$@" ;;
  up) check_machine && up "$@" ;;
  down)
    check_machine
    down "$@"
    [ "$everything" -eq 0 ] || forget_keys
    ;;
  build_root | boot) "$command" "$1" ;;  # called by this script itself
  *) usage ;;
esac
