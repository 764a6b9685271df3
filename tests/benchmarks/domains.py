# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What looking at all domains of a host costs. Run it by 'make bench'.

Measured is the module's own work, in a process of its own that has imported what a module imports, without the start of
Ansible. The domains are those of libvirt's driver for tests, which is in that process; the images are real. Each figure
is the median of the rounds.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from info import make_chain
from overlay import make_disk

ROUNDS = 5
DOMAINS = 100
DISKS = 3  # of each domain
BITMAPS = 7  # as of a week of daily backups; each is a checkpoint

# The module's work in a process of its own: prints the seconds of each round, without and with dirty bytes.
OUR_TURN = """
import json, sys, time
import ansible.module_utils.basic
import libvirt
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.look import look
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Libvirt
domains, checkpoints, rounds = json.load(sys.stdin)
host = libvirt.open("test:///default")
host.lookupByName("test").destroy()
disk = "<disk type='file'><driver type='qcow2'/><source file='{}'/><target dev='vd{}' bus='virtio'/></disk>"
for number, paths in enumerate(domains):
    disks = "".join(disk.format(path, "abc"[index]) for index, path in enumerate(paths))
    domain = host.defineXML(
        f"<domain type='test'><name>vm{number}</name><memory>1024</memory><os><type>hvm</type></os>"
        f"<devices>{disks}</devices></domain>"
    )
    domain.create()
    for name in checkpoints:
        domain.checkpointCreateXML(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>")
    domain.destroy()
figures = []
for counts in [False, True] * rounds:
    start = time.perf_counter()
    looks, warnings = look(Libvirt("test:///default"), ["vm*"], counts=counts)
    results = [one.as_result() for one in looks]
    figures.append(time.perf_counter() - start)
    assert not warnings and len(results) == len(domains)
    assert {one["next_backup"] for one in results} == {"incremental"}, results[0]
    assert {len(one["checkpoints"]) for one in results} == {len(checkpoints)}
    assert {len(disk["images"]) for one in results for disk in one["disks"]} == {3}
    assert all((one["dirty_bytes"] is not None) == counts for result in results for one in result["checkpoints"])
print(json.dumps(figures))
"""


def ours(domains: list[list[str]]) -> list[float]:
    """Return the seconds that the module's work takes, in turns without and with dirty bytes."""
    text = json.dumps([domains, [f"b{number}" for number in range(BITMAPS)], ROUNDS])
    command = [sys.executable, "-c", OUR_TURN]
    figures: list[float] = json.loads(
        subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    return figures


def main() -> None:
    """Measure in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        templates = [make_disk(folder / f"template{level}", BITMAPS) for level in range(3)]
        subprocess.run(["qemu-io", "-c", "write 50G 64k", str(templates[2])], check=True, stdout=subprocess.DEVNULL)
        tops = [str(make_chain(folder, number, templates)) for number in range(DOMAINS * DISKS)]
        domains = [tops[number : number + DISKS] for number in range(0, len(tops), DISKS)]
        figures = ours(domains)
    plain, counting = statistics.median(figures[::2]), statistics.median(figures[1::2])
    print(f"{DOMAINS} domains of {DISKS} disks, chains of three, {BITMAPS} checkpoints each, all shut off:")
    print(f"  domain_info, without dirty bytes {plain:.3f} s; with them {counting:.3f} s")


if __name__ == "__main__":
    main()
