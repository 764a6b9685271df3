# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the playbook costs over a fleet beside the obvious playbook, both sides in one run: 'make bench-fleet'.

The hosts are the four of extensions/molecule/fleet.sh, each under many inventory names (aliases), each alias with a
folder of its own. Controller and hosts share this machine, so a figure has the work of both. Seconds of processors
(CPU) are counted process by process, of the controller with its ssh and of the hosts with all that runs on them, so
other work on the machine does not disturb them much; wall time it does. Both sides take turns, several times, and the
medians are told. The obvious playbook makes each overlay by
'qemu-img create' and each bitmap by 'qemu-img bitmap --add', in loops; it is told the bitmaps' names, reads nothing,
and verifies nothing. Where it would take too long, only the collection's side is measured.

A cell of the table is named as ALIASESxDISKS, for example 40x10; the cells to measure can be given as arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import typing as t

HOSTS = ["hv11", "hv12", "hv13", "hv14"]
CELLS = ["4x1", "20x1", "40x1", "100x1", "4x10", "4x100", "40x100"]
BITMAPS = ["monday", "tuesday"]
LONGEST_LOOP = 1300  # commands of the obvious playbook, over all hosts, beyond which it is not measured
ROUNDS = 3
ONE_ROUND = 200  # commands of the obvious playbook, over all hosts, from which on there is one round
FORKS = 20
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
TICKS = os.sysconf("SC_CLK_TCK")
FLEET_SH = pathlib.Path(__file__).parents[2] / "extensions" / "molecule" / "fleet.sh"

# Small clusters, on both sides, since the hosts keep their files in memory.
OBVIOUS = """
- hosts: hypervisors
  gather_facts: false
  tasks:
    - ansible.builtin.command:
        argv: [qemu-img, create, -q, -f, qcow2, -o, cluster_size=4k, -F, qcow2, -b, "{{ item.backing_file }}",
               "{{ item.path }}"]
      loop: "{{ overlay_disks }}"
    - ansible.builtin.command:
        argv: [qemu-img, bitmap, --add, "{{ item.0.path }}", "{{ item.1 }}"]
      loop: "{{ overlay_disks | product(bitmaps) }}"
"""

# On a host: images for its aliases, all copies of one.
MAKE_IMAGES = """
set -e
mkdir -p /srv/scale; cd /srv/scale
qemu-img create -q -f qcow2 -o cluster_size=4k template 64M
for bitmap in {bitmaps}; do qemu-img bitmap --add template $bitmap; done
for alias in {aliases}; do
  mkdir $alias
  for number in $(seq {disks}); do cp template $alias/$number.qcow2; done
done
"""
REMOVE_OVERLAYS = "find /srv/scale -name '*.snap.qcow2' -delete"


class Cell(t.NamedTuple):
    """What is measured: so many aliases with so many disks each."""

    aliases: int
    disks: int

    @property
    def overlays(self) -> int:
        """How many overlays are made."""
        return self.aliases * self.disks

    @property
    def commands(self) -> int:
        """How many commands the obvious playbook runs."""
        return self.overlays * (1 + len(BITMAPS))


class Cost(t.NamedTuple):
    """What a run of a playbook takes."""

    seconds: float
    cpu: float  # seconds of processors, on the controller and on the hosts

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.cpu:.1f} s CPU"


def disks_of(alias: str, count: int) -> list[dict[str, str]]:
    """Return the overlays to make; each disk is a VM of its own, as most are."""
    stems = {str(number): f"/srv/scale/{alias}/{number}" for number in range(1, count + 1)}
    return [{"vm": vm, "path": f"{stem}.snap.qcow2", "backing_file": f"{stem}.qcow2"} for vm, stem in stems.items()]


def inventory(cell: Cell) -> dict[str, t.Any]:
    """Return an inventory whose aliases are spread over the hosts."""
    addresses = {f"alias{number}": f"127.77.0.{HOSTS[number % len(HOSTS)][2:]}" for number in range(cell.aliases)}
    return {
        "hypervisors": {
            "hosts": {
                alias: {"ansible_host": address, "overlay_disks": disks_of(alias, cell.disks)}
                for alias, address in addresses.items()
            },
            "vars": {
                "ansible_port": 2222,
                "ansible_user": "root",
                "ansible_python_interpreter": "/usr/bin/python3",
                "ansible_ssh_private_key_file": f"{os.environ['FLEET']}/id_ed25519",
                "ansible_ssh_common_args": "-F none -o IdentitiesOnly=yes -o IdentityAgent=none "
                "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
                "bitmaps": BITMAPS,
                "overlay_cluster_size": "4k",
            },
        }
    }


def on_host(host: str, command: str) -> None:
    """Run a shell command on a host."""
    options = ["-F", "none", "-i", f"{os.environ['FLEET']}/id_ed25519", "-p", "2222", "-o", "LogLevel=ERROR"]
    options += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    subprocess.run(["ssh", *options, f"root@127.77.0.{host[2:]}", command], check=True, stdout=subprocess.DEVNULL)


def everywhere(cell: Cell, command: str) -> None:
    """Run a shell command on each host; {aliases} are those of the host."""
    for number, host in enumerate(HOSTS):
        aliases = " ".join(f"alias{alias}" for alias in range(number, cell.aliases, len(HOSTS)))
        on_host(host, command.format(aliases=aliases, disks=cell.disks, bitmaps=" ".join(BITMAPS)))


def cpu_of_hosts() -> float:
    """Return the seconds of processors that the hosts have taken, with all processes that have ended there."""
    pids = [(pathlib.Path(os.environ["FLEET"]) / "hosts" / host / "pid").read_text().strip() for host in HOSTS]
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in pids}
    ticks = 0
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile; then its parent has what it took
            if os.readlink(process / "ns/pid") in spaces:
                ticks += sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / TICKS


def cpu_of_controller() -> float:
    """Return the seconds of processors that all processes of ours have taken that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def end_connections(folder: pathlib.Path) -> None:
    """End the ssh processes that wait for further commands, so that what they took is counted."""
    for socket in (folder / "cp").glob("*"):
        subprocess.run(
            ["ssh", "-F", "none", "-O", "exit", "-o", f"ControlPath={socket}", "x"],
            stderr=subprocess.DEVNULL,
            check=False,
        )
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def play(folder: pathlib.Path, playbook: str, cell: Cell) -> Cost:
    """Return what a playbook takes; it must do what it is to do on every alias."""
    environment = {
        **os.environ,
        "ANSIBLE_FORKS": str(FORKS),
        "ANSIBLE_PIPELINING": "true",
        "ANSIBLE_HOME": str(folder),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(folder / "cp"),
        "ANSIBLE_NOCOLOR": "1",
    }
    command = ["ansible-playbook", "-i", str(folder / "inventory.json"), playbook]
    command += ["-e", f"overlay_report={folder}/report.json"]
    before = cpu_of_controller() + cpu_of_hosts()
    start = time.perf_counter()
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode != 0:
        sys.exit(f"{playbook}: exit code {run.returncode}\n{run.stdout[-4000:]}")
    if sum(line.startswith("alias") and " failed=0 " in line for line in run.stdout.splitlines()) != cell.aliases:
        sys.exit(f"{playbook}: not every alias is in the recap")
    end_connections(folder)
    return Cost(seconds, cpu_of_controller() + cpu_of_hosts() - before)


def counts(folder: pathlib.Path) -> list[int]:
    """Return what the report says was created, present, and carried."""
    report = json.loads((folder / "report.json").read_text())
    return [report["created"], report["present"], report["bitmaps_carried"]]


def measure(cell: Cell, folder: pathlib.Path) -> list[str]:
    """Return the line of the table for a cell."""
    (folder / "inventory.json").write_text(json.dumps(inventory(cell)))
    everywhere(cell, "rm -rf /srv/scale")
    everywhere(cell, MAKE_IMAGES)
    (folder / "obvious.yml").write_text(OBVIOUS)
    rounds = [take_turns(cell, folder) for _round in range(ROUNDS if cell.commands < ONE_ROUND else 1)]
    first, again, *theirs = (median(costs) for costs in zip(*rounds))
    line = [f"{cell.aliases}", f"{cell.disks}", f"{first}", f"{first.cpu / cell.overlays * 1000:.0f} ms", f"{again}"]
    if not theirs:
        return [*line, "-", "-", "-"]
    return [*line, f"{theirs[0]}", f"{first.cpu / theirs[0].cpu:.3f}", f"{again.cpu / theirs[0].cpu:.3f}"]


def take_turns(cell: Cell, folder: pathlib.Path) -> list[Cost]:
    """Return what our first run costs, our second one, and, if it does not take too long, the obvious playbook."""
    carried = cell.overlays * len(BITMAPS)
    costs = [play(folder, "kvmfleet.qcow2.overlay", cell)]
    assert counts(folder) == [cell.overlays, 0, carried], counts(folder)
    costs.append(play(folder, "kvmfleet.qcow2.overlay", cell))
    assert counts(folder) == [0, cell.overlays, carried], counts(folder)
    everywhere(cell, REMOVE_OVERLAYS)
    if cell.commands <= LONGEST_LOOP:
        costs.append(play(folder, str(folder / "obvious.yml"), cell))
        everywhere(cell, REMOVE_OVERLAYS)
    return costs


def median(costs: t.Sequence[Cost]) -> Cost:
    """Return the cost in the middle, by CPU."""
    return sorted(costs, key=lambda cost: cost.cpu)[len(costs) // 2]


def main() -> None:
    """Measure each cell and print the table."""
    cells = [Cell(*map(int, text.split("x"))) for text in sys.argv[1:] or CELLS]
    subprocess.run([str(FLEET_SH), "up"], check=True)
    # So that ssh, which leaves its parent for the background, is counted with us; not the hosts, which are counted.
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        with tempfile.TemporaryDirectory() as name:
            print(f"{len(BITMAPS)} bitmaps for each disk, {FORKS} forks, {os.cpu_count()} processors for everything")
            print(
                "| hosts | disks each | first run | CPU per disk | again | obvious playbook | CPU, first | CPU, again |"
            )
            print("|---|---|---|---|---|---|---|---|", flush=True)
            for cell in cells:
                print("|", " | ".join(measure(cell, pathlib.Path(name))), "|", flush=True)
    finally:
        subprocess.run([str(FLEET_SH), "down"], check=True)


if __name__ == "__main__":
    main()
