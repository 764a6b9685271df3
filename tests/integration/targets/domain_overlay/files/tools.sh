#!/usr/bin/env bash
# Backup tools that read the topmost image's bitmap alone. To be read in after lab.sh, which says where the lab is.
# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

lab=${lab:?}

# by_nbd IMAGE CHECKPOINT FULL: bring the raw file FULL up to date with what qemu-nbd says is dirty since a checkpoint.
by_nbd() {
  rm -f "$lab/nbd.sock"
  qemu-nbd --fork --persistent --read-only -f qcow2 -x disk --bitmap "$2" -k "$lab/nbd.sock" --pid-file "$lab/nbd.pid" "$1"
  local disk="driver=nbd,server.type=unix,server.path=$lab/nbd.sock,export=disk"
  qemu-img convert -O raw --image-opts "$disk" "$lab/nbd.raw"
  qemu-img map --output=json --image-opts "$disk,x-dirty-bitmap=qemu:dirty-bitmap:$2" > "$lab/nbd.json"
  kill "$(cat "$lab/nbd.pid")"
  python3 - "$lab/nbd.raw" "$lab/nbd.json" "$3" << 'PYTHON'
import json, sys
disk, extents, full = sys.argv[1:]
with open(disk, "rb") as source, open(full, "r+b") as target, open(extents) as file:
    for extent in json.load(file):
        if not extent["data"]:  # so an NBD client is told of what is dirty
            source.seek(extent["start"])
            target.seek(extent["start"])
            target.write(source.read(extent["length"]))
PYTHON
}

# by_qmp IMAGE CHECKPOINT FULL: the same by QMP blockdev-backup; on a copy of the image, since the job clears its bitmap.
by_qmp() {
  cp "$1" "$lab/qmp.qcow2"
  python3 - "$lab/qmp.qcow2" "$2" "$3" << 'PYTHON'
import json, subprocess, sys
image, bitmap, full = sys.argv[1:]
daemon = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "m"]
process = subprocess.Popen(daemon, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
events = []
def wait(wanted):
    for line in process.stdout:
        message = json.loads(line)
        assert "error" not in message, message
        if wanted(message):
            return message
        events.append(message)  # which can come before the answer to the command
def command(name, **arguments):
    process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
    process.stdin.flush()
    return wait(lambda message: "return" in message)
def is_done(message):
    return message.get("event") == "BLOCK_JOB_COMPLETED"
command("qmp_capabilities")
command("blockdev-add", driver="qcow2", **{"node-name": "d", "file": {"driver": "file", "filename": image}})
command("blockdev-add", driver="raw", **{"node-name": "t", "file": {"driver": "file", "filename": full}})
command("blockdev-backup", device="d", target="t", sync="incremental", bitmap=bitmap, **{"job-id": "j"})
done = next(filter(is_done, events), None) or wait(is_done)
assert "error" not in done["data"], done
for node in ("d", "t"):
    command("blockdev-del", **{"node-name": node})
command("quit")
process.wait()
PYTHON
}

# offline TOOL DOMAIN IMAGE-OF-VDA IMAGE-OF-VDB: whether the full backup and an increment by the tool are the disks.
offline() {
  local tool=$1 domain=$2 images=("$3" "$4") number target
  for number in 0 1; do
    target=vd$(printf %b "\\$((141 + number))")
    qemu-img convert -f qcow2 -O raw "$lab/backups/$domain-full.$target" "$lab/increased.raw"
    "$tool" "${images[$number]}" "$domain-one" "$lab/increased.raw" || return 2
    qemu-img convert -f qcow2 -O raw "${images[$number]}" "$lab/truth.raw"
    cmp "$lab/increased.raw" "$lab/truth.raw" || return 1
  done
}

fail() {
  echo "$*" >&2
  return 1
}

# extents_in LABEL: what a backup holds itself, for both disks.
extents_in() {
  local target
  for target in vda vdb; do
    qemu-img map --output=json "$lab/backups/$1.$target" |
      python3 -c 'if True:
        import json, sys
        found = []
        for one in json.load(sys.stdin):
            if one["depth"]:
                continue
            if found and found[-1][1] == one["start"]:  # how it is stored makes no difference
                found[-1][1] += one["length"]
            else:
                found.append([one["start"], one["start"] + one["length"]])
        print(found)'
  done
}

# client backup|restore OPTION...: Debian's virtnbdbackup or virtnbdrestore.
client() {
  # A user and a password must be given with a socket of one's own; nobody asks for them. Its own socket would have a name
  # of its process number, which may be that of another one in another namespace.
  "virtnbd$1" -U "$LIBVIRT_DEFAULT_URI" --user none --password none -f "$lab/client.sock" "${@:2}" > "$lab/client.log" 2>&1 || {
    cat "$lab/client.log" >&2
    return 1
  }
}

# restored FOLDER IMAGE-OF-VDA IMAGE-OF-VDB: restore what is in the folder, and compare it with the images.
restored() {
  local folder=$1 images=("$2" "$3") number target name
  for number in 0 1; do
    target=vd$(printf %b "\\$((141 + number))")
    rm -rf "$lab/restored"
    mkdir "$lab/restored"
    # One disk at a time: the client does not wait for the end of the server that it writes the one to, and writes the next
    # one to whichever answers.
    client restore -d "$target" -i "$folder" -o "$lab/restored"
    while pgrep -f "qemu-nbd .*$lab/restored/" > /dev/null; do sleep 0.1; done
    name=$(basename "${images[$number]}")
    # The client names a disk as the definition did when it was backed up last.
    qemu-img compare "$lab/restored/${name%%.*}".*qcow2 "${images[$number]}"
  done
}
