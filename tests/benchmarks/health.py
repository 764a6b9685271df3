# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the playbook health costs over a fleet: seconds, processors and memory of the controller, 'make bench-fleet'.

The hosts are the four of extensions/molecule/fleet.sh, each under many inventory names (aliases). Each has so many
domains, shut off, with a disk of two images and a checkpoint in both. Page, report and metrics are written. Controller
and hosts share this machine; what takes which share of it is told.

A cell of the table is named as ALIASESxDOMAINS, for example 160x40; the cells to measure can be given as arguments.
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import fleet

CELLS = ["20x40", "80x40", "160x40"]

# On a host: domains that are copies of one. Their checkpoint is told to libvirt, which makes one only while they run.
MAKE_DOMAINS = """
set -e
mkdir -p /srv/scale; cd /srv/scale
qemu-img create -q -f qcow2 -o cluster_size=4k base 64M
qemu-img bitmap --add base one
for number in $(seq {disks}); do
  cp base $number.qcow2
  qemu-img create -q -f qcow2 -o cluster_size=4k -b /srv/scale/$number.qcow2 -F qcow2 $number.top.qcow2
  qemu-img bitmap --add $number.top.qcow2 one
  cat > domain.xml << XML
<domain type='qemu'><name>scale$number</name><memory>65536</memory><os><type>hvm</type></os><devices>
  <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/srv/scale/$number.top.qcow2'/>
    <target dev='vda' bus='virtio'/></disk></devices></domain>
XML
  virsh -q define domain.xml
  cat > checkpoint.xml << XML
<domaincheckpoint><name>one</name><creationTime>1700000000</creationTime>
  <disks><disk name='vda' checkpoint='bitmap' bitmap='one'/></disks>$(virsh dumpxml scale$number)</domaincheckpoint>
XML
  virsh -q checkpoint-create scale$number checkpoint.xml --redefine
done
"""
REMOVE_DOMAINS = """
for name in $(virsh list --all --name | grep ^scale); do virsh -q undefine --checkpoints-metadata $name; done
rm -rf /srv/scale
"""


def play(folder: pathlib.Path, cell: fleet.Cell) -> str:
    """Return the line of the table for one run, which must find every domain of every alias in order."""
    (folder / "inventory.json").write_text(json.dumps(fleet.inventory(cell)))
    environment = {
        **os.environ,
        "ANSIBLE_FORKS": str(fleet.FORKS),
        "ANSIBLE_PIPELINING": "true",
        "ANSIBLE_HOME": str(folder),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"),
        "ANSIBLE_NOCOLOR": "1",
    }
    command = ["ansible-playbook", "-i", str(folder / "inventory.json"), "kvmfleet.qcow2.health"]
    command += ["-e", "health_domains=scale*"]
    for variable, file in {"page": "page.html", "report": "report.json", "metrics": "metrics.prom"}.items():
        command += ["-e", f"health_{variable}={folder}/{file}"]
    before, of_hosts = fleet.cpu_of_controller(), fleet.cpu_of_hosts()
    start = time.perf_counter()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode != 0:
        sys.exit(f"exit code {run.returncode}\n{run.stdout[-4000:]}")
    healths = json.loads((folder / "report.json").read_text())["healths"]
    # A host under several names has each VM several times, which somebody should see to.
    assert healths["ok"] + healths["attention"] == cell.aliases * cell.disks == sum(healths.values()), healths
    fleet.end_connections(folder)
    controller, hosts = fleet.cpu_of_controller() - before, fleet.cpu_of_hosts() - of_hosts
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024  # the largest process until now
    size = (folder / "page.html").stat().st_size / 1e6
    figures = [f"{seconds:.0f} s", f"{controller:.1f} s", f"{controller / cell.aliases:.2f} s", f"{hosts:.1f} s"]
    return " | ".join([str(cell.aliases), str(cell.disks), *figures, f"{memory} MB", f"{size:.1f} MB"])


def main() -> None:
    """Measure each cell and print the table."""
    cells = [fleet.Cell(*map(int, text.split("x"))) for text in sys.argv[1:] or CELLS]
    subprocess.run([str(fleet.FLEET_SH), "up"], check=True)
    ctypes.CDLL(None, use_errno=True).prctl(fleet.SUBREAPER, 1, 0, 0, 0)  # as in fleet.py
    try:
        with tempfile.TemporaryDirectory() as name:
            print(f"{fleet.FORKS} forks, {os.cpu_count()} processors for everything")
            heads = ["hosts", "VMs each", "time", "CPU of the controller", "for each host", "CPU of the hosts"]
            print("|", " | ".join([*heads, "memory", "page"]), "|")
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for cell in cells:
                fleet.everywhere(cell, REMOVE_DOMAINS)
                fleet.everywhere(cell, MAKE_DOMAINS)
                print("|", play(pathlib.Path(name), cell), "|", flush=True)
    finally:
        subprocess.run([str(fleet.FLEET_SH), "down"], check=True)


if __name__ == "__main__":
    main()
