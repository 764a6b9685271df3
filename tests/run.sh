#!/usr/bin/env bash
# run.sh STEP...: build, lint, sanity, units, integration, fleet, prove, bench, bench-fleet or bench-side, in the order
# given; what is missing is installed. $PROVE has the options of the programs of step prove, which tell them with --help.
# All that it makes lies in .cache: virtual environments, a copy of the collection at the path that Ansible wants.
# Integration tests mount small file systems, change owners and make hosts, so they run as root, by sudo if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$PWD cache=$PWD/.cache
copy=$cache/collections/ansible_collections/kvmfleet/qcow2

say() { printf '\n== %s\n' "$*"; }

# The matrix: ansible-core, the controller's Python, the managed host's Python. Oldest and newest that are supported.
legs=("2.18 3.11 3.9" "2.21 3.13 3.13")

# Put before a command: processes, mounts and loopback of its own. Two libvirt daemons would now and then choose the same
# display port, and a daemon has a session of its own, so an interrupt would not reach it. The kernel ends all with bash.
# shellcheck disable=SC2016  # bash expands it
own_world=(unshare --net --pid --fork --kill-child --mount-proc bash -c 'ip link set lo up && "$@"; exit' -)

find_python() {  # find_python X.Y: print the path of that Python, of the system or of pyenv
  local path
  for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python /usr/bin/python"$1" /usr/local/bin/python"$1"; do
    [ -x "$path" ] && "$path" -c 'import venv, ensurepip' 2> /dev/null && { echo "$path"; return; }
  done
  return 1
}

make_venv() {  # make_venv NAME PYTHON REQUIREMENT...: a virtual environment in the cache, made once
  local name=$1 python=$2 mark
  shift 2
  mark=$(printf '%s\n' "$python" "$@" | sha256sum)
  [ "$(cat "$cache/venv/$name/.mark" 2> /dev/null)" = "$mark" ] && return
  echo "Installing with pip into .cache/venv/$name: $*"
  rm -rf "$cache/venv/$name"
  "$python" -m venv "$cache/venv/$name"
  "$cache/venv/$name/bin/pip" install --quiet "$@" 2>&1 | { grep -v '^WARNING: Location' || true; }
  echo "$mark" > "$cache/venv/$name/.mark"
}

prepare() {
  say "prepare"
  tests/install.sh qemu-img=qemu-utils qemu-storage-daemon=qemu-system-common qemu-system-x86_64=qemu-system-x86 \
    shellcheck=shellcheck ip=iproute2 jq=jq gcc=gcc mkfs.ext4=e2fsprogs setfacl=acl strace=strace mount.exfat-fuse=exfat-fuse mkfs.exfat=exfatprogs mkfs.btrfs=btrfs-progs \
    libvirtd=libvirt-daemon virsh=libvirt-clients pkg-config=pkg-config /usr/include/libvirt/libvirt.h=libvirt-dev \
    "/usr/lib/$(uname -m)-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so=libvirt-daemon-driver-qemu"
  python3 -c 'import ensurepip' 2> /dev/null || tests/install.sh no-ensurepip-yet=python3-venv
  usable=()
  local leg core controller host
  for leg in "${legs[@]}"; do
    read -r core controller host <<< "$leg"
    local python target
    if python=$(find_python "$controller") && target=$(find_python "$host"); then
      make_venv "core-$core" "$python" "ansible-core==$core.*" -r tests/unit/requirements.txt
      # Only to run module code and its unit tests in: the Python of a managed host needs no Ansible.
      make_venv "host-$host" "$target" -r tests/unit/requirements.txt libvirt-python
      usable+=("$leg")
    else
      echo "MISSING: Python $controller or $host, so ansible-core $core is not tested here." >&2
      [ -z "${CI:-}" ] || exit 1
    fi
  done
  [ "${#usable[@]}" -gt 0 ] || fall_back_on_system_python
}

fall_back_on_system_python() {  # a machine with one Python only, such as a fresh Debian
  local version
  version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  [[ "$version" = 3.1[1-3] ]] || { echo "Needs Python 3.11, 3.12 or 3.13." >&2; exit 1; }
  local core=2.19
  make_venv "core-$core" "$(find_python "$version")" "ansible-core==$core.*" -r tests/unit/requirements.txt
  tests/install.sh "/usr/include/python$version/Python.h=python3-dev"
  make_venv "host-$version" "$(find_python "$version")" -r tests/unit/requirements.txt libvirt-python
  usable=("$core $version $version")
}

copy_collection() {  # copy_collection FOLDER: ansible-test wants it below ansible_collections, and no symlink
  rm -rf "$1"
  mkdir -p "$1"
  git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --ignore-failed-read -cf - | tar -xf - -C "$1"
  # ansible-test asks git which files belong to the collection.
  git -C "$1" init -q
  git -C "$1" add -A
}

ansible_test() {  # ansible_test CORE ARGUMENT...: with a home of its own, so that nothing of the user's is touched
  local core=$1 home=${home:-$cache/home} alone=("${alone[@]:-env}")
  shift
  mkdir -p "$home"
  HOME=$home "$cache/venv/core-$core/bin/python" tests/seed_pip.py
  (cd "$copy" && HOME=$home PATH="$cache/venv/core-$core/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" \
    "${alone[@]}" ansible-test "$@")
}

each_leg() {  # each_leg FUNCTION: call it with core, controller Python and host Python
  local leg
  for leg in "${usable[@]}"; do
    # shellcheck disable=SC2086  # three words
    "$1" $leg
  done
}

build() {
  say "build: the archive builds, and installs from the archive and from a folder"
  local core=${usable[-1]%% *} out=$cache/build galaxy
  galaxy="$cache/venv/core-$core/bin/ansible-galaxy"
  rm -rf "$out"
  mkdir -p "$out"
  export HOME=$cache/home
  (cd "$copy" && "$galaxy" collection build --output-path "$out")
  "$galaxy" collection install --offline -p "$out/from-archive" "$out"/kvmfleet-qcow2-*.tar.gz
  "$galaxy" collection install --offline -p "$out/from-folder" "$copy"
  for installed in from-archive from-folder; do
    ANSIBLE_COLLECTIONS_PATH=$out/$installed "$cache/venv/core-$core/bin/ansible-doc" kvmfleet.qcow2.qcow2_overlay > /dev/null
  done
}

lint() {
  say "lint: ruff, mypy, shellcheck, ansible-lint"
  local core=${usable[-1]%% *} bin=$cache/venv/lint/bin
  make_venv lint "$(readlink -f "$cache/venv/core-$core/bin/python")" "ansible-core==$core.*" -r tests/requirements-lint.txt
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  (cd "$cache/collections" && "$bin/mypy" --config-file "$project/pyproject.toml" -p ansible_collections.kvmfleet.qcow2.plugins)
  shellcheck tests/*.sh tests/integration/targets/*/files/*.sh extensions/molecule/*.sh .ci/run
  (cd "$copy" && HOME=$cache/home PATH=$bin:$PATH ANSIBLE_COLLECTIONS_PATH=$cache/collections "$bin/ansible-lint" --offline --profile production)
}

sanity_leg() { say "sanity: ansible-core $1"; ansible_test "$1" sanity --local --python "$2"; }
sanity() { each_leg sanity_leg; }

units_leg() {
  say "units: ansible-core $1, Python $3"
  ansible_test "$1" units --local --python "$3" --python-interpreter "$cache/venv/host-$3/bin/python"
}
units() { each_leg units_leg; }

integration_leg() {  # with a copy of the collection and a home of its own, since the legs run side by side
  local copy=$cache/leg-$1/ansible_collections/kvmfleet/qcow2 home=$cache/leg-$1/home
  local alone=("${own_world[@]}")
  copy_collection "$copy"
  echo "ansible_python_interpreter: $cache/venv/host-$3/bin/python" > "$copy/tests/integration/integration_config.yml"
  ansible_test "$1" integration --local --python "$2" --allow-root --allow-destructive
}

as_root() {  # as_root STEP: by sudo, if we are not root
  echo "This step runs as root: by sudo."
  local status=0
  sudo --preserve-env=CI,PROVE,CASES env "PYENV_ROOT=${PYENV_ROOT:-$HOME/.pyenv}" "$project/tests/run.sh" "$1" || status=$?
  sudo chown -R "$(id -u):$(id -g)" "$cache"  # or the next run could not remove what root has made
  return "$status"
}

integration() {
  [ "$(id -u)" -eq 0 ] || { as_root integration; return; }
  local leg core controller host jobs=() failed=0
  for leg in "${usable[@]}"; do
    read -r core controller host <<< "$leg"
    say "integration: ansible-core $core on Python $controller, managed host on Python $host (runs beside the others)"
    integration_leg "$core" "$controller" "$host" > "$cache/integration-$core.log" 2>&1 &
    jobs+=("$core $!")
  done
  # An interrupt reaches the legs, too, which are in our process group. All are waited for, whatever becomes of one.
  for leg in "${jobs[@]}"; do
    read -r core job <<< "$leg"
    local verdict=passed
    wait "$job" || { verdict=FAILED; failed=1; }
    say "integration: ansible-core $core: $verdict. Its output:"
    cat "$cache/integration-$core.log"
  done
  return "$failed"
}

fleet() {
  [ "$(id -u)" -eq 0 ] || { as_root fleet; return; }
  say "fleet: Molecule on four hosts"
  tests/install.sh mmdebstrap=mmdebstrap ssh=openssh-client
  local core=${usable[-1]%% *} status=0
  make_venv fleet "$(readlink -f "$cache/venv/core-$core/bin/python")" "ansible-core==$core.*" -r tests/requirements-fleet.txt
  export FLEET=$cache/fleet
  # Molecule remembers in its home what it has created, and ssh's sockets want a short path.
  scratch=$(mktemp -d)
  trap '"$copy/extensions/molecule/fleet.sh" down > /dev/null; rm -rf "$scratch"' EXIT
  (cd "$copy" && HOME=$scratch ANSIBLE_HOME=$scratch ANSIBLE_SSH_CONTROL_PATH_DIR=$scratch/cp PATH="$cache/venv/fleet/bin:$PATH" \
    molecule test --all) || status=$?
  trap - EXIT
  "$copy/extensions/molecule/fleet.sh" down
  rm -rf "$scratch"
  return "$status"
}

prove() {
  [ "$(id -u)" -eq 0 ] || { as_root prove; return; }
  local program options
  read -ra options <<< "${PROVE:-}"
  local core=${usable[-1]%% *}
  make_venv prove "$(readlink -f "$cache/venv/core-$core/bin/python")" "ansible-core==$core.*" libvirt-python
  for program in kills faults domains hostile; do
    say "prove: tests/prove/$program.py ${options[*]}"
    "${own_world[@]}" "$cache/venv/prove/bin/python" "$copy/tests/prove/$program.py" "${options[@]}"
  done
}

bench() {
  say "bench"
  local core=${usable[-1]%% *}
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/overlay.py
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/info.py
}

bench_fleet() {
  [ "$(id -u)" -eq 0 ] || { as_root bench-fleet; return; }
  say "bench-fleet"
  tests/install.sh mmdebstrap=mmdebstrap ssh=openssh-client
  FLEET=$cache/fleet ANSIBLE_COLLECTIONS_PATH=$cache/collections PATH="$cache/venv/core-${usable[-1]%% *}/bin:$PATH" \
    python3 tests/benchmarks/fleet.py
}

bench_side() {
  [ "$(id -u)" -eq 0 ] || { as_root bench-side; return; }
  say "bench-side: writes docs/side-by-side.md"
  tests/install.sh strace=strace qemu-io=qemu-utils findmnt=util-linux
  PYTHONPATH=$cache/collections ANSIBLE_COLLECTIONS_PATH=$cache/collections \
    "$cache/venv/core-${usable[-1]%% *}/bin/python" tests/benchmarks/side_by_side.py
}

[ "$#" -gt 0 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
mkdir -p "$cache/home"
prepare
copy_collection "$copy"
for step in "$@"; do
  case $step in
    build | lint | sanity | units | integration | fleet | prove | bench) "$step" ;;
    bench-fleet) bench_fleet ;;
    bench-side) bench_side ;;
    *) echo "unknown step: $step" >&2; exit 2 ;;
  esac
done
