#!/usr/bin/env bash
# run.sh STEP...: build, galaxy, lint, sanity, quick, units, page, integration, between, fleet, prove, bench, bench-fleet,
# bench-side, bench-back or screenshot, in the order given; what is missing is installed. Side by side run build, galaxy, lint and
# sanity; page and quick; the last leg of integration, fleet and prove.
# $PROVE has the options of the programs of step prove, which tell them with --help. A leg that takes longer than $LIMIT seconds
# hangs: it is ended, and its log tells what it was at.
# A line tells what came of each step, or of each leg of it; its output lies in .cache/log. VERBOSE=1 shows that, too.
# All that it makes lies in .cache: virtual environments, a copy of the collection at the path that Ansible wants.
# Integration tests mount small file systems, change owners and make hosts, so they run as root, by sudo if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$PWD cache=$PWD/.cache log=$PWD/.cache/log results=$PWD/.cache/results
copy=$cache/collections/ansible_collections/kvmfleet/qcow2
export NO_COLOR=1  # what the tools print is read in files, and summed up
exec 3>&1  # the screen, also for a leg, whose output is a file
fresh=''  # put before a line: on a terminal, it takes the place of the line that tells what runs
[ ! -t 1 ] || [ "${TERM:-dumb}" = dumb ] || [ -n "${VERBOSE:-}" ] || fresh=$'\r\e[K'
leg_name=() leg_title=() leg_start=() leg_tail=()  # of the legs that run, by process id; the last one shows the log
leg_clock=()  # the process that ends when a leg has had its time
limit=${LIMIT:-}
failed=0

# The matrix: ansible-core, the controller's Python, the managed host's Python. Oldest and newest that are supported.
legs=("2.18 3.11 3.9" "2.21 3.13 3.13")
# Those in between. Step quick looks at the modules and one target of each, step between at role and playbook, which depend on
# the controller. The hosts' Pythons are those of the legs.
between=("2.19 3.11 3.9" "2.20 3.12 3.13")
# One leg alone, such as "devel 3.14 3.14"; then nothing is in between.
[ -z "${LEG:-}" ] || { legs=("$LEG"); between=(); }
# The groups of cases that run with one core alone when both run, or integration would take half as long again. What is not
# here depends most on Ansible and on Python. One leg alone runs all. Step fleet has some of the newest core on four hosts.
declare -A only_with=(
  [domain_overlay/healed]=2.18 [domain_overlay/tools]=2.18 [domain_overlay/refused]=2.21 [domain_overlay/failures]=2.18
  [domain_overlay/started]=2.18 [domain_overlay/restarted]=2.18 [domain_overlay/retention]=2.21 [domain_overlay/health]=2.18
  [domain_overlay/kinds]=2.21 [domain_overlay/names]=2.21 [domain_overlay/volumes]=2.21 [domain_overlay/info]=2.21
  [domain_overlay/quiesced]=2.21 [domain_overlay/live]=2.18 [domain_overlay/wayback]=2.18 [domain_overlay/proof]=2.21
  [qcow2_overlay/bitmaps]=2.18 [qcow2_overlay/committed]=2.18 [qcow2_overlay/reverted]=2.21
  [qcow2_overlay/refused_target]=2.18 [qcow2_overlay/in_use]=2.18 [qcow2_overlay/full_disk]=2.18 [qcow2_overlay/no_links]=2.18
  [qcow2_overlay/refused_active]=2.21 [qcow2_overlay/names]=2.21 [qcow2_overlay/layouts]=2.21 [qcow2_overlay/devices]=2.21
  [qcow2_overlay/killed]=2.21 [qcow2_overlay/engines]=2.18 [qcow2_overlay/ownership]=2.21
  [overlay_role/states]=2.18 [overlay_role/playbooks]=2.21)
system_core=2.19  # for a machine with one Python only, such as a fresh Debian

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

announce() {  # show what it reads on the screen, too, unless VERBOSE does
  local line
  while IFS= read -r line; do
    echo "$line"
    [ -n "${VERBOSE:-}" ] || printf '%s%s\n' "$fresh" "$line" >&3
  done
}

install() { tests/install.sh "$@" | announce; }  # install COMMAND-OR-FILE=PACKAGE...

make_venv() {  # make_venv NAME PYTHON REQUIREMENT...: a virtual environment in the cache, made once
  local name=$1 python=$2 mark
  shift 2
  mark=$({ printf '%s\n' "$python" "$@"; cat tests/requirements-*.txt tests/unit/requirements.txt; } | sha256sum)
  [ "$(cat "$cache/venv/$name/.mark" 2> /dev/null)" = "$mark" ] && return
  echo "Installing with pip into .cache/venv/$name: $*" | announce
  rm -rf "$cache/venv/$name"
  "$python" -m venv "$cache/venv/$name"
  "$cache/venv/$name/bin/pip" install --quiet "$@" 2>&1 | { grep -v '^WARNING: Location' || true; }
  echo "$mark" > "$cache/venv/$name/.mark"
}

is_usable() {  # is_usable CORE CONTROLLER-PYTHON HOST-PYTHON: whether the Pythons of a leg are here
  if find_python "$2" > /dev/null && find_python "$3" > /dev/null; then return; fi
  echo "MISSING: Python $2 or $3, so ansible-core $1 is not tested here." >&2
  [ -z "${CI:-}" ] || exit 1
  return 1
}

core_package() {  # core_package CORE: print what pip is to install
  [ "$1" != devel ] || { echo https://github.com/ansible/ansible/archive/devel.tar.gz; return; }
  echo "ansible-core==$1.*"
}

find_legs() {  # set usable: the legs of the matrix whose Pythons are here
  local leg core controller host
  usable=()
  for leg in "${legs[@]}"; do
    read -r core controller host <<< "$leg"
    if is_usable "$core" "$controller" "$host"; then usable+=("$leg"); fi
  done
  [ "${#usable[@]}" -gt 0 ] || fall_back_on_system_python
}

fall_back_on_system_python() {
  local version
  version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  [[ "$version" = 3.1[1-3] ]] || { echo "Needs Python 3.11, 3.12 or 3.13." >&2; exit 1; }
  usable=("$system_core $version $version")
}

prepare() {
  local drivers leg core controller host
  drivers=/usr/lib/$(uname -m)-linux-gnu/libvirt/connection-driver
  install qemu-img=qemu-utils qemu-nbd=qemu-utils qemu-storage-daemon=qemu-system-common qemu-system-x86_64=qemu-system-x86 \
    shellcheck=shellcheck ip=iproute2 jq=jq gcc=gcc mkfs.ext4=e2fsprogs setfacl=acl strace=strace mount.exfat-fuse=exfat-fuse mkfs.exfat=exfatprogs mkfs.btrfs=btrfs-progs mkfs.xfs=xfsprogs \
    libvirtd=libvirt-daemon virsh=libvirt-clients virtnbdbackup=virtnbdbackup pkg-config=pkg-config /usr/include/libvirt/libvirt.h=libvirt-dev \
    "$drivers/libvirt_driver_qemu.so=libvirt-daemon-driver-qemu"
  # After the daemon: Debian 12 has this driver in the package of the daemon, and no package of that name.
  install "$drivers/libvirt_driver_storage.so=libvirt-daemon-driver-storage"
  # Elsewhere the group quiesced fails, which needs it.
  if command -v apt-get > /dev/null; then tests/guest.sh "$cache/guest" | announce; fi
  python3 -c 'import ensurepip' 2> /dev/null || install no-ensurepip-yet=python3-venv
  find_legs
  for leg in "${usable[@]}"; do
    read -r core controller host <<< "$leg"
    make_venv "core-$core" "$(find_python "$controller")" "$(core_package "$core")" -r tests/unit/requirements.txt
    [ "$core" != "$system_core" ] || install "/usr/include/python$host/Python.h=python3-dev"
    # Only to run module code and its unit tests in: the Python of a managed host needs no Ansible.
    make_venv "host-$host" "$(find_python "$host")" -r tests/unit/requirements.txt libvirt-python
  done
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

empty_run() {  # empty_run CORE COLLECTIONS: the playbook, with the role and all that both need, where nothing is to be done
  ANSIBLE_COLLECTIONS_PATH=$2 ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_INVENTORY_UNPARSED_WARNING=false \
    "$cache/venv/core-$1/bin/ansible-playbook" -i localhost, -c local -e overlay_become=false -e '{"overlay_disks": []}' \
    -e overlay_allow_nothing=true kvmfleet.qcow2.overlay | tee "$2/told"
  grep -q '^ *"localhost  ok ' "$2/told"
}

build() {  # the archive builds, installs from the archive and from a folder, and works with the folders alone that are for users
  local core=${usable[-1]%% *} out=$cache/build copy=$cache/build/source galaxy
  galaxy="$cache/venv/core-$core/bin/ansible-galaxy"
  rm -rf "$out"
  copy_collection "$copy"
  export HOME=$cache/home
  (cd "$copy" && "$galaxy" collection build --output-path "$out")
  "$galaxy" collection install --offline -p "$out/from-archive" "$out"/kvmfleet-qcow2-*.tar.gz
  "$galaxy" collection install --offline -p "$out/from-folder" "$copy"
  for installed in from-archive from-folder; do
    find "$out/$installed/ansible_collections/kvmfleet/qcow2" -mindepth 1 -maxdepth 1 \
      ! -name meta ! -name plugins ! -name roles ! -name playbooks -exec rm -rf {} +
    ANSIBLE_COLLECTIONS_PATH=$out/$installed "$cache/venv/core-$core/bin/ansible-doc" kvmfleet.qcow2.qcow2_overlay > /dev/null
    empty_run "$core" "$out/$installed"
  done
}

galaxy() {  # what Galaxy checks when an archive is uploaded; ansible-lint is left to step lint, which is stricter
  local core=${usable[-1]%% *} out=$cache/galaxy copy=$cache/galaxy/source
  make_venv galaxy "$(readlink -f "$cache/venv/core-$core/bin/python")" "$(core_package "$core")" -r tests/requirements-galaxy.txt
  rm -rf "$out"
  copy_collection "$copy"  # of its own, since ansible-lint leaves files in the other one
  export HOME=$cache/home PATH=$cache/venv/galaxy/bin:$PATH GALAXY_IMPORTER_RUN_ANSIBLE_LINT=false GALAXY_IMPORTER_RUN_ANSIBLE_TEST=false
  (cd "$copy" && ansible-galaxy collection build --output-path "$out")
  (cd "$out" && python -m galaxy_importer.main kvmfleet-qcow2-*.tar.gz) | tee "$out/told"
  # What it only warns of is a fault of the collection, too.
  if grep -E '^(WARNING|ERROR)' "$out/told"; then return 1; fi
}

lint() {  # ruff, mypy, shellcheck, ansible-lint, and what is published beside the code
  local core=${usable[-1]%% *} bin=$cache/venv/lint/bin
  make_venv lint "$(readlink -f "$cache/venv/core-$core/bin/python")" "$(core_package "$core")" -r tests/requirements-lint.txt
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  (cd "$cache/collections" && "$bin/mypy" --config-file "$project/pyproject.toml" -p ansible_collections.kvmfleet.qcow2.plugins)
  shellcheck tests/*.sh tests/integration/targets/*/files/*.sh extensions/molecule/*.sh .github/*.sh .ci/run
  (cd "$copy" && HOME=$cache/home PATH=$bin:$PATH ANSIBLE_COLLECTIONS_PATH=$cache/collections "$bin/ansible-lint" --offline --profile production)
  export HOME=$cache/home PATH=$bin:$PATH ANSIBLE_COLLECTIONS_PATH=$cache/collections
  check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
  check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
  find .github/ISSUE_TEMPLATE -name '*.yml' ! -name config.yml -exec check-jsonschema --builtin-schema vendor.github-issue-forms {} +
  (cd "$copy" && reuse lint --quiet && antsibull-changelog lint && antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs all .)
  ansible-builder create --file docs/awx/execution-environment.yml --context "$cache/ee" --output-filename Containerfile
  site
}

site() {  # the documentation site, in .cache/site/html; a warning fails it
  local out=$cache/site
  rm -rf "$out"
  mkdir -p "$out/pages/reference"
  antsibull-docs collection --use-current --squash-hierarchy --fail-on-error --dest-dir "$out/pages/reference" kvmfleet.qcow2
  cp docs/*.md docs/*.json docs/*.png docs/docsite/conf.py docs/docsite/index.md "$out/pages"
  sphinx-build -q -W --keep-going -c "$out/pages" "$out/pages" "$out/html"
}

# sanity, units, integration CORE CONTROLLER-PYTHON HOST-PYTHON [TARGET...]

sanity() {  # with a copy of the collection and a home of its own, since the legs run side by side
  local copy=$cache/sanity-$1/ansible_collections/kvmfleet/qcow2 home=$cache/sanity-$1/home
  copy_collection "$copy"
  ansible_test "$1" sanity --local --python "$2" "${@:4}"
}

units() { ansible_test "$1" units --local --python "$3" --python-interpreter "$cache/venv/host-$3/bin/python"; }

prepare_page() {  # what the page is looked at with: Chromium, and axe-core
  install chromium=chromium chromedriver=chromium-driver npm=npm
  local core=${usable[-1]%% *}
  make_venv page "$(readlink -f "$cache/venv/core-$core/bin/python")" "ansible-core==$core.*" -r tests/requirements-page.txt
  export ANSIBLE_COLLECTIONS_PATH=$cache/collections PYTHONPATH=$cache/collections AXE=$cache/page/node_modules/axe-core/axe.min.js
  mkdir -p "$cache/page"
  cmp -s tests/page/package.json "$cache/page/package.json" && [ -e "$AXE" ] && return
  echo "Installing with npm into .cache/page: axe-core" | announce
  cp tests/page/package.json "$cache/page"
  (cd "$cache/page" && npm install --ignore-scripts --no-audit --no-fund)
}

page() {  # the page of the playbook health, in a real browser
  prepare_page
  (cd "$copy/tests/page" && "$cache/venv/page/bin/python" -m pytest -p no:cacheprovider .)
}

screenshot() {  # writes docs/health.png
  prepare_page
  (cd "$copy/tests/page" && "$cache/venv/page/bin/python" screenshot.py "$project/docs/health.png")
}

integration() {  # with a copy of the collection and a home of its own, since the legs run side by side
  local copy=$cache/leg-$1/ansible_collections/kvmfleet/qcow2 home=$cache/leg-$1/home
  local alone=("${own_world[@]}") config=$copy/tests/integration/integration_config.yml target group
  copy_collection "$copy"
  printf '%s\n' "ansible_python_interpreter: $cache/venv/host-$3/bin/python" "domain_overlay_guest: $cache/guest" > "$config"
  for target in domain_overlay qcow2_overlay overlay_role; do
    echo "${target}_left_out:" >> "$config"
    for group in "${!only_with[@]}"; do
      [ "${#usable[@]}" -eq 1 ] || [ "${only_with[$group]}" = "$1" ] || [ "${group%/*}" != "$target" ] ||
        echo "  - ${group#*/}" >> "$config"
    done
  done
  ansible_test "$1" integration --local --python "$2" --allow-root --allow-destructive "${@:4}"
}

fleet() {  # Molecule on four hosts
  install mmdebstrap=mmdebstrap ssh=openssh-client
  local core=${usable[-1]%% *} status=0
  make_venv fleet "$(readlink -f "$cache/venv/core-$core/bin/python")" "$(core_package "$core")" -r tests/requirements-fleet.txt
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

prove() {  # prove PROGRAM
  local options
  read -ra options <<< "${PROVE:-}"
  PYTHONPATH=$cache/collections "${own_world[@]}" "$cache/venv/prove/bin/python" "$copy/tests/prove/$1.py" "${options[@]}"
}

make_prove_venv() {  # with the bindings of libvirt, for what needs Python and both
  local core=${usable[-1]%% *}
  make_venv prove "$(readlink -f "$cache/venv/core-$core/bin/python")" "$(core_package "$core")" libvirt-python
}

bench() {
  local core=${usable[-1]%% *}
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/overlay.py
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/info.py
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/heal.py
  PYTHONPATH=$cache/collections "$cache/venv/core-$core/bin/python" tests/benchmarks/merge.py
  make_prove_venv
  PYTHONPATH=$cache/collections "$cache/venv/prove/bin/python" tests/benchmarks/domains.py
}

bench_fleet() {
  install mmdebstrap=mmdebstrap ssh=openssh-client
  FLEET=$cache/fleet ANSIBLE_COLLECTIONS_PATH=$cache/collections PATH="$cache/venv/core-${usable[-1]%% *}/bin:$PATH" \
    python3 tests/benchmarks/fleet.py
  FLEET=$cache/fleet ANSIBLE_COLLECTIONS_PATH=$cache/collections PATH="$cache/venv/core-${usable[-1]%% *}/bin:$PATH" \
    python3 tests/benchmarks/health.py
}

bench_side() {  # writes docs/side-by-side.md
  install strace=strace qemu-io=qemu-utils findmnt=util-linux
  PYTHONPATH=$cache/collections ANSIBLE_COLLECTIONS_PATH=$cache/collections \
    "$cache/venv/core-${usable[-1]%% *}/bin/python" tests/benchmarks/side_by_side.py
}

bench_back() {  # writes the second part of docs/side-by-side.md
  install strace=strace qemu-io=qemu-utils findmnt=util-linux
  make_prove_venv
  PYTHONPATH=$cache/collections "${own_world[@]}" "$cache/venv/prove/bin/python" tests/benchmarks/way_back.py
}

begin() {  # begin NAME TITLE FUNCTION ARGUMENT...: start a leg, with its output in the log of that name
  # Not after "if", nor before "||" or "&&": bash would ignore -e in the leg, too.
  # In the background bash ignores an interrupt, unless told otherwise.
  (trap - INT QUIT; echo "$2: ${*:3}"; "${@:3}"; echo "Ended well.") > "$log/$1.log" 2>&1 &
  local leg=$!
  leg_name[leg]=$1 leg_title[leg]=$2 leg_start[leg]=$SECONDS
  [ -z "$limit" ] || { sleep "$limit" > /dev/null 3>&- & leg_clock[leg]=$!; }
  [ -z "${VERBOSE:-}" ] || { tail -s 0.2 -f -n +1 --pid="$leg" "$log/$1.log" & leg_tail[leg]=$!; }
}

await() {  # await [NUMBER]: wait until no more legs run than that, by default none, and tell of each that ends
  # Once one has failed, wait for all, and end here.
  local leg all
  while [ "${#leg_name[@]}" -gt $((failed ? 0 : ${1:-0})) ]; do
    printf -v all ', %s' "${leg_title[@]}"
    [ -z "$fresh" ] || printf '%s%s ...' "$fresh" "${all#, }"
    wait -n "${!leg_name[@]}" "${leg_clock[@]}" || true
    for leg in "${!leg_name[@]}"; do
      if kill -0 "$leg" 2> /dev/null && [ -n "${leg_clock[leg]:-}" ] && ! kill -0 "${leg_clock[leg]}" 2> /dev/null; then
        end_late "$leg"
      fi
      kill -0 "$leg" 2> /dev/null || judge "$leg"
    done
  done
  [ "$failed" -eq 0 ] || exit 1
}

end_late() {  # end_late LEG: end a leg that hangs, and write to its log what it was at
  local all
  mapfile -t all < <(echo "$1"; descendants "$1")
  {
    echo "It has taken $limit s, so it hangs, and is ended. What it was at:"
    ps -o pid,ppid,etimes,stat,wchan:20,args --cols 200 -p "${all[*]}" || true
  } >> "$log/${leg_name[$1]}.log"
  kill -KILL "${all[@]}" 2> /dev/null || true
  wait "$1" || true
}

tell() {  # tell LEG VERDICT: print its line, which also names the log unless all is well
  local dots=................................. verdict=$2 file="   .cache/log/${leg_name[$1]}.log"
  [ "$verdict" != ok ] || file=''
  printf '%s%s %s %-6s %4d s%s\n' "$fresh" "${leg_title[$1]}" "${dots:${#leg_title[$1]}}" "$verdict" \
    $((SECONDS - leg_start[$1])) "$file"
}

judge() {  # judge LEG: tell what came of a leg that has ended, and show the end of the log of one that has failed
  local file=$log/${leg_name[$1]}.log status=0 verdict=FAILED good bad
  wait "$1" || status=$?
  [ -z "${leg_tail[$1]:-}" ] || wait "${leg_tail[$1]}"
  kill "${leg_clock[$1]:-}" 2> /dev/null || true
  read -r good bad _ <<< "$(count "${leg_name[$1]}")"
  if [ "$status" -eq 0 ] && [ "$good" -gt 0 ] && [ "$bad" -eq 0 ]; then verdict=ok; fi
  tell "$1" "$verdict"
  if [ "$verdict" = FAILED ]; then
    failed=1 bad=$((bad ? bad : 1))
    [ -n "${leg_tail[$1]:-}" ] || tail -n 60 "$file"
    [ "$status" -ne 0 ] || echo "It ended well, but its log does not tell of anything that passed, or tells of what failed."
  fi
  echo "${leg_name[$1]} $verdict $good $bad" >> "$results"
  unset "leg_name[$1]" "leg_title[$1]" "leg_start[$1]" "leg_tail[$1]" "leg_clock[$1]"
}

# What the runners of tests print at their end, as awk programs that count what is good and what is bad in it.
# shellcheck disable=SC2016  # awk expands it
declare -A counting=(
  [units]='/^=.* in [0-9.]+s.*=$/ { for (i = 2; i < NF; i++) n[$(i + 1)] += $i }
    END { good = n["passed"]; bad = n["failed"] + n["error"] + n["errors"]; more = n["skipped"] }'
  [page]='/^=.* in [0-9.]+s.*=$/ { for (i = 2; i < NF; i++) n[$(i + 1)] += $i }
    END { good = n["passed"]; bad = n["failed"] + n["error"] + n["errors"]; more = n["skipped"] }'
  # A sanity test says only that it begins; those that have failed are listed in the end.
  [sanity]='/^Running sanity test / { good += runs; runs = 1 } /^Ended well/ { good += runs; runs = 0 }
    $4 == "sanity" && $6 == "listed" { good += runs - $3; bad += $3; runs = 0 }'
  [integration]='/^testhost +: ok=/ { more += substr($3, 4); if ($5 $6 == "unreachable=0failed=0") good++; else bad++ }'
  # Molecule tells twice of the scenario that makes the hosts and ends them.
  [fleet]='$3 ~ /^actions=/ { if ($NF != "failed=0") bad++; else if (!seen[$1]++) good++ }'
  [prove]='$3 == "rounds" && $8 == "violations" { good += $2 - $7; bad += $7 }'
)
declare -A words=(
  [units]="%d tests passed, %d failed, %d skipped"
  [page]="%d tests passed, %d failed, %d skipped"
  [sanity]="%d tests passed, %d failed"
  [integration]="%d targets passed, %d failed, %d tasks"
  [fleet]="%d scenarios passed, %d failed"
  [prove]="%d rounds passed, %d violations"
)

count() {  # count NAME...: print of these legs, all of one step, how much is good, how much is bad, and that in words
  local step=${1%%-*} files=("${@/#/$log/}") program='/^Ended well/ { good++ }'
  program=${counting[$step]:-$program}' END { printf "%d %d " words "\n", good, bad, good, bad, more }'
  awk -F '[ ,]+' -v "words=${words[$step]:-}" "$program" "${files[@]/%/.log}"
}

summarize() {  # on exit: the sums. The last line is for whoever reads no more than that
  local status=$? step leg verdict good bad sum of_step all_good=0 all_bad=0
  echo
  for step in units sanity page integration fleet prove; do
    mapfile -t of_step < <(grep -o "^${step}[^ ]*" "$results")
    [ "${#of_step[@]}" -gt 0 ] || continue
    read -r _ _ sum <<< "$(count "${of_step[@]}")"
    echo "$step: $sum"
  done
  while read -r leg verdict good bad; do
    [ "$leg $verdict" != "prepare ok" ] || continue  # which is no test
    all_good=$((all_good + good)) all_bad=$((all_bad + bad))
    [ "$verdict" = ok ] || echo "FAILED: .cache/log/$leg.log"
  done < "$results"
  [ "$status" -eq 0 ] || [ "$all_bad" -gt 0 ] || all_bad=1  # what ended this is no leg
  echo "$all_good passed, $all_bad failed"
}

descendants() {  # descendants PROCESS: print all that it has started, and what that has
  local child children=()
  read -ra children 2> /dev/null < "/proc/$1/task/$1/children" || true
  for child in "${children[@]}"; do
    echo "$child"
    descendants "$child"
  done
}

interrupted() {  # interrupted SIGNAL: end the legs, and wait for them to clean up
  local leg all patience
  trap - INT TERM  # a second one ends this at once
  mapfile -t all < <(for leg in "${!leg_name[@]}"; do descendants "$leg"; done)
  # Ctrl-C has reached all of them already.
  [ "$1" = INT ] || kill -TERM "${!leg_name[@]}" "${all[@]}" 2> /dev/null || true
  for ((patience = 10; patience > 0; patience--)); do
    kill -0 "${!leg_name[@]}" 2> /dev/null || break
    sleep 1
  done
  kill -KILL "${all[@]}" 2> /dev/null || true  # often it is pytest that does not end, for its workers
  kill "${leg_clock[@]}" 2> /dev/null || true
  wait
  for leg in "${!leg_name[@]}"; do tell "$leg" ENDED; done
  exit $((128 + $(kill -l "$1")))
}

as_root() (  # as_root STEP: by sudo, if we are not root
  echo "$1 runs as root: by sudo."
  trap : INT TERM  # which sudo passes on; what root has made is to change hands all the same
  status=0
  sudo --preserve-env=CI,LEG,LIMIT,PROVE,CASES,VERBOSE env "PYENV_ROOT=${PYENV_ROOT:-$HOME/.pyenv}" \
    "$project/tests/run.sh" --prepared "$1" || status=$?
  sudo chown -R "$(id -u):$(id -g)" "$cache"  # or the next run could not remove what root has made
  exit "$status"
)

each_leg() {  # each_leg STEP: all of the matrix, side by side
  local leg core controller host
  for leg in "${usable[@]}"; do
    read -r core controller host <<< "$leg"
    begin "$1-$core" "$1, ansible-core $core" "$1" "$core" "$controller" "$host"
  done
}

quick() {  # quick CORE CONTROLLER-PYTHON HOST-PYTHON: whether this core takes the modules, one target and the role
  make_venv "core-$1" "$(find_python "$2")" "$(core_package "$1")" -r tests/unit/requirements.txt
  sanity "$@" --test ansible-doc --test validate-modules
  integration "$@" qcow2_info
  HOME=$cache/leg-$1/home empty_run "$1" "$cache/leg-$1"
}

between() {  # between CORE CONTROLLER-PYTHON HOST-PYTHON: what depends on the controller, with a core between those of the legs
  make_venv "core-$1" "$(find_python "$2")" "$(core_package "$1")" -r tests/unit/requirements.txt
  integration "$@" overlay_role
}

declare -A title=([between]="role and playbook" [quick]="quick pass")

run() {  # run STEP
  local program leg core controller host
  case $1 in
    sanity | units | integration) each_leg "$1" ;;
    between | quick)
      for leg in "${between[@]}"; do
        read -r core controller host <<< "$leg"
        is_usable "$core" "$controller" "$host" || continue
        begin "$1-$core" "${title[$1]}, ansible-core $core" "$1" "$core" "$controller" "$host"
        [ "$1" = quick ] || await
      done
      await
      ;;
    build | galaxy | lint | page | fleet) begin "$1" "$1" "$1" ;;  # with those that come next
    prove)
      make_prove_venv > /dev/null  # before two programs would make it
      for program in domains faults checkpoints hostile leaving storage running commits mending powerloss reverts kills; do
        await 1  # two side by side, or one beside fleet
        begin "prove-$program" "prove, $program" prove "$program"
      done
      await
      ;;
    bench*) local VERBOSE=1 fresh=''; begin "$1" "$1" "${1//-/_}"; await ;;  # for its tables
    *) begin "$1" "$1" "$1"; await ;;
  esac
}

[ "$#" -gt 0 ] || { sed -n '2,9s/^# //p' "$0"; exit 2; }
prepared=''
[ "$1" != --prepared ] || { prepared=yes; shift; }  # by as_root alone
for step; do
  case $step in
    build | galaxy | lint | sanity | quick | units | page | integration | between | fleet | prove | bench | bench-fleet | bench-side | bench-back | screenshot) ;;
    *) echo "unknown step: $step" >&2; exit 2 ;;
  esac
done
mkdir -p "$cache/home" "$log"
trap 'interrupted INT' INT
trap 'interrupted TERM' TERM
if [ -z "$prepared" ]; then
  : > "$results"
  trap summarize EXIT
  echo "The output of each step: .cache/log"
  run prepare
fi
find_legs
copy_collection "$copy"
for step; do
  case $step in
    build | galaxy | lint | sanity | quick | prove) ;;
    fleet) await 1 ;;
    *) await ;;
  esac
  case $step in
    integration | quick | between | fleet | prove | bench-fleet | bench-side | bench-back) [ "$(id -u)" -eq 0 ] || { as_root "$step"; continue; } ;;
  esac
  run "$step"
done
await
