# Functions for the tests with libvirt; the sourcing script gives the working folder: . lab.sh FOLDER
# The libvirt daemon is one of our own: its state lies in the folder, in a mount namespace that goes with it.
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
  # The daemon insists on the user of its package, which only the package with the system service makes.
  cp /etc/passwd /etc/group "$lab"
  grep -q ^libvirt-qemu: "$lab/passwd" || echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> "$lab/passwd"
  grep -q ^kvm: "$lab/group" || echo 'kvm:x:64056:' >> "$lab/group"
  grep -q ^libvirt-qemu: "$lab/group" || echo 'libvirt-qemu:x:64055:' >> "$lab/group"
  printf 'unix_sock_dir = "%s"\nauth_unix_rw = "none"\n' "$lab/sock" > "$lab/libvirtd.conf"
  export -f state_of
  export lab
  setsid unshare --mount --propagation private bash -c '
    for place in etc lib cache log run; do mount --bind "$lab/$place" "$(state_of "$place")"; done
    for file in passwd group; do mount --bind "$lab/$file" "/etc/$file"; done
    exec libvirtd --config "$lab/libvirtd.conf" --pid-file "$lab/libvirtd.pid"
  ' < /dev/null > "$lab/libvirtd.log" 2>&1 &
  local attempt
  for attempt in $(seq 300); do
    virsh version > /dev/null 2>&1 && return
    sleep 0.1
  done
  cat "$lab/libvirtd.log" >&2
  return 1
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
    [ -s "$pid" ] && kill -KILL "$(cat "$pid")" 2> /dev/null || true
  done
}
