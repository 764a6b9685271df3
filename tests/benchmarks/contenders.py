# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The ways to make overlays that are set side by side; each as good as its own means allow."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import typing as t

from measuring import Daemon, Disk, Job, Template
from overlay import SHELL_LOOP

LAB = pathlib.Path(__file__).parents[1] / "integration/targets/domain_overlay/files/lab.sh"
MODULE = "ansible_collections.kvmfleet.qcow2.plugins.modules.qcow2_overlay"

TASK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - kvmfleet.qcow2.qcow2_overlay:
        overlays: "{{ overlays }}"
"""

PLAYBOOK = """
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.command:
        argv: [qemu-img, create, -q, -f, qcow2, -F, qcow2, -b, "{{ item.backing_file }}", "{{ item.path }}"]
        creates: "{{ item.path }}"
      loop: "{{ overlays }}"
    - ansible.builtin.command:
        argv: [qemu-img, bitmap, --add, -g, "{{ item.1[1] }}", --, "{{ item.0.path }}", "{{ item.1[0] }}"]
      loop: "{{ overlays | product(bitmaps) }}"
"""

# With the working folder of lab.sh, the name of the domain, and what virsh is to be told of the disks.
LIBVIRT = """
set -euo pipefail
domain=$1
shift
virsh -q start --paused "$domain"
virsh -q snapshot-create-as "$domain" --disk-only --no-metadata "$@"
virsh -q destroy "$domain"
"""

# Starts something and waits for all that descends from it. libvirt expects its QEMU processes to go away when they end,
# and they do so only when someone has waited for them.
KEEPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
starter = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr).pid
try:
    while True:
        pid, status = os.wait()
        if pid == starter:
            print(os.waitstatus_to_exitcode(status), flush=True)
except ChildProcessError:
    pass
"""


class Case(t.NamedTuple):
    """Overlays to be made, of one VM; every ACTIVE is a copy of the template."""

    folder: pathlib.Path
    disks: list[Disk]
    template: Template

    @property
    def overlays(self) -> list[dict[str, str]]:
        """The overlays as the module takes them."""
        return [{"path": str(disk.overlay), "backing_file": str(disk.active)} for disk in self.disks]


class Contender:
    """One way to make overlays."""

    name = ""
    per_disk, per_bitmap = 0, 0  # commands, if there are more the more there is to do
    longest = sys.maxsize  # commands, beyond which it takes too long to be measured
    daemon: Daemon | None = None

    def commands(self, disks: int, bitmaps: int) -> int:
        """Return how many commands it runs one after the other for so many disks with so many bitmaps each."""
        return disks * (self.per_disk + bitmaps * self.per_bitmap)

    def before(self, case: Case) -> None:
        """Do what is not measured."""

    def job(self, case: Case) -> Job:
        """Return what is measured."""
        raise NotImplementedError

    def settle(self) -> bool:
        """End what is left running after a run that was not undisturbed; return whether there was something."""
        return False

    def after(self) -> None:
        """Clean up what is not a file of the case."""


class Module(Contender):
    """The module in a Python of its own, as Ansible starts it on a host."""

    name = "module"

    def job(self, case: Case) -> Job:
        arguments = {"ANSIBLE_MODULE_ARGS": {"overlays": case.overlays}}
        return Job([[sys.executable, "-m", MODULE]], json.dumps(arguments))


class Play(Contender):
    """A playbook on localhost."""

    def __init__(self, name: str, text: str, longest: int = sys.maxsize) -> None:
        self.name, self.text, self.longest = name, text, longest
        self.per_disk, self.per_bitmap = (0, 0) if text == TASK else (1, 1)

    def before(self, case: Case) -> None:
        variables = {"overlays": case.overlays, "bitmaps": case.template.bitmaps}
        (case.folder / "variables.json").write_text(json.dumps(variables))
        (case.folder / "playbook.yml").write_text(self.text)
        (case.folder / "ansible.cfg").write_text("")  # not the user's

    def job(self, case: Case) -> Job:
        environment = {
            "ANSIBLE_CONFIG": str(case.folder / "ansible.cfg"),
            "ANSIBLE_HOME": str(case.folder / "ansible"),
            "ANSIBLE_REMOTE_TEMP": str(case.folder / "ansible"),
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
        }
        command = [str(pathlib.Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "-c", "local"]
        command += ["-e", f"@{case.folder}/variables.json", str(case.folder / "playbook.yml")]
        return Job([command], environment=environment)


class Shell(Contender):
    """The algorithm that libvirt documents, with one process for each bitmap."""

    name = "shell"
    per_disk, per_bitmap = 3, 1
    longest = 1200

    def job(self, case: Case) -> Job:
        paths = [str(path) for disk in case.disks for path in disk]
        return Job([["bash", "-c", SHELL_LOOP, "bash", *paths]])


class Floor(Contender):
    """Nothing but the image: no bitmaps."""

    name = "floor"
    per_disk = 1

    def job(self, case: Case) -> Job:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
        return Job([[*create, str(disk.active), str(disk.overlay)] for disk in case.disks])


class Libvirt(Contender):
    """libvirt alone: the domain is started paused, snapshotted, and destroyed. The daemon is one of our own."""

    name = "libvirt"

    def __init__(self, lab: pathlib.Path) -> None:
        self.lab = lab
        self.keeper: subprocess.Popen[str] | None = None
        self.kind = "kvm" if os.access("/dev/kvm", os.W_OK) else "qemu"
        self.environment = {"LIBVIRT_DEFAULT_URI": f"qemu+unix:///system?socket={lab}/sock/libvirt-sock"}

    def start(self) -> None:
        """Start the daemon; what QEMU can do it finds out when the first domain is defined."""
        command = [sys.executable, "-c", KEEPER, *self.in_bash("start_daemon")]
        self.keeper = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.keeper.stdout
        if self.keeper.stdout.readline() != "0\n":
            sys.exit("libvirtd does not start")
        self.daemon = Daemon(int((self.lab / "libvirtd.pid").read_text()), self.keeper.pid)

    def stop(self) -> None:
        """End the domains and the daemon, if it was started."""
        if self.keeper:
            self.bash("stop_daemon")
            self.keeper.wait(10)

    def in_bash(self, text: str) -> list[str]:
        """Return a command that has the functions of lab.sh."""
        return ["bash", "-c", f'. "$1" "$2"; {text}', "bash", str(LAB), str(self.lab)]

    def bash(self, text: str) -> None:
        """Run commands with the functions of lab.sh."""
        subprocess.run(self.in_bash(text), check=True, stdin=subprocess.DEVNULL)

    def before(self, case: Case) -> None:
        """Define the domain, with nothing in it but what starts fastest."""
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk.active}'/>"
            f"<target dev='{target(number)}' bus='scsi'/></disk>"
            for number, disk in enumerate(case.disks)
        )
        (self.lab / "domain.xml").write_text(
            f"<domain type='{self.kind}'><name>bench</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
            f"<os><type arch='{os.uname().machine}'>hvm</type></os>"
            f"<devices><controller type='scsi' model='virtio-scsi'/>{disks}</devices></domain>"
        )
        self.bash('virsh -q define "$lab/domain.xml"')

    def job(self, case: Case) -> Job:
        specs = []
        for number, disk in enumerate(case.disks):
            specs += ["--diskspec", f"{target(number)},file={disk.overlay}"]
        return Job([["bash", "-c", LIBVIRT, "bash", "bench", *specs]], environment=self.environment)

    def settle(self) -> bool:
        """Destroy the domain, if it was left running or paused."""
        done = subprocess.run(
            ["virsh", "-q", "destroy", "bench"],
            env={**os.environ, **self.environment},
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def after(self) -> None:
        self.settle()
        self.bash("virsh -q undefine bench > /dev/null")


def target(number: int) -> str:
    """Return the name of a disk in a domain: sda, sdb, … sdaa."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(97 + digit) + letters
    return f"sd{letters}"
