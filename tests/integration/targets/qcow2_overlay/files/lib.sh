#!/usr/bin/env bash
# Functions for the tasks that make images, hold them as a VM would, and clean up. To be read in: . lib.sh FOLDER
# goes to that folder and makes it first. What has to be ended again is kept in the folder run, beside this file.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
set -euo pipefail
work=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=$work/run
mkdir -p "$run" "$1"
cd "$1"

image() { # image FILE [OPTION...]: of 64 MiB
  local file=$PWD/$1 # or a name such as nbd:x would be a protocol
  shift
  qemu-img create -q -f qcow2 "$@" -- "$file" 64M
}

overlay() { # overlay FILE BACKING_FILE [FORMAT]: as qemu-img makes it, without bitmaps
  qemu-img create -q -f qcow2 -b "$PWD/$2" -F "${3:-qcow2}" -- "$1"
}

bitmap() { # bitmap FILE NAME [GRANULARITY [--disable]]
  local file=$1 name=$2 granularity=${3:-65536}
  shift "$(($# < 3 ? $# : 3))"
  [[ "$file" = /* ]] || file=$PWD/$file
  qemu-img bitmap --add -g "$granularity" "$@" -- "$file" "$name"
}

crash() { # crash FILE: a VM that dies while it writes; all bitmaps of the image become inconsistent
  qemu-io -f qcow2 -c 'write 0 64k' -c abort "$1" > /dev/null 2>&1 || true
  qemu-img info "$1" | grep -q in-use
}

poke() { # poke FILE OFFSET BYTES: overwrite bytes, given as printf takes them
  # shellcheck disable=SC2059  # BYTES is a format
  printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}

start() { # start NAME COMMAND...: run it until 'end NAME'; back when it has written something, so is ready
  local name=$1 i
  shift
  mkdir "$run/$name"
  mkfifo "$run/$name/stdin"
  # Opened for reading and writing, a FIFO never comes to an end, so the monitor or prompt stays open.
  (cd "$run/$name" && exec setsid "$@" <> stdin > output 2>&1) &
  echo $! > "$run/$name/pid"
  for ((i = 0; i < 100; i++)); do
    kill -0 $! 2> /dev/null || break
    [ ! -s "$run/$name/output" ] || return 0
    sleep 0.05
  done
  cat "$run/$name/output" >&2
  return 1
}

daemon() { # daemon NAME FILE: a storage daemon that has the image, with its chain, open for writing
  start "$1" qemu-storage-daemon --blockdev "driver=qcow2,node-name=top,file.driver=file,file.filename=$2" \
    --chardev stdio,id=monitor --monitor monitor
}

emulator() { # emulator NAME FILE: a VM without a machine that has the image, with its chain, open for writing
  start "$1" qemu-system-x86_64 -machine none -nodefaults -display none -qmp stdio \
    -blockdev "driver=qcow2,node-name=top,file.driver=file,file.filename=$2"
}

end() { # end NAME...: as a crash does, without saving anything
  local name pid
  for name; do
    pid=$(cat "$run/$name/pid")
    # Its own folder tells the process from a later one with the same number.
    while [ "$(readlink "/proc/$pid/cwd")" = "$run/$name" ]; do
      kill -KILL "$pid" 2> /dev/null || true
      sleep 0.05
    done
    rm -r "${run:?}/$name"
  done
}

loop() { # loop FILE: make it a block device and print its name
  losetup --find --show "$PWD/$1" | tee -a "$run/loops"
}

clean() { # end, unmount and detach all that was started, mounted and attached here
  local name target device
  for name in "$run"/*/; do
    [ ! -d "$name" ] || end "$(basename "$name")"
  done
  findmnt --raw --noheadings --output TARGET | { grep "^$work/" || true; } | sort -r | while read -r target; do
    umount "$target"
  done
  [ ! -e "$run/loops" ] || while read -r device; do
    # A FUSE file system lets go of its device a moment after it is unmounted.
    for ((i = 0; i < 50; i++)); do
      losetup --detach "$device" 2> /dev/null || true
      losetup "$device" 2> /dev/null | grep -q "$work/" || break
      sleep 0.1
    done
  done < "$run/loops"
}
