# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab in which the VMs are domains of a libvirt daemon of its own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import time
import typing as t
import uuid
import xml.etree.ElementTree as ET

import kinds
import lab
import libvirt
import promise
import runs

LAB_SH = kinds.COLLECTION / "tests/integration/targets/domain_overlay/files/lab.sh"
SNAPSHOT = "snap"  # that is asked for, in a directory
CHECKPOINT = "monday"  # its bitmap is in all qcow2 images of the kinds below
_SECONDS_TO_SETTLE = 0.1  # in which the daemon does what a run has asked for that was killed then

THREE = kinds.Kind("one domain", (0, 1, 2))
TWO = kinds.Kind("two domains", (0, 1, 4))
PAIR = kinds.Kind("two domains", (0, 1, 2))  # whose disks are all qcow2
# The numbers of their disks.
DOMAINS: dict[kinds.Kind, dict[str, tuple[int, ...]]] = {
    THREE: {"web": (0, 1, 2)},
    TWO: {"web": (0, 1), "db": (4,)},
}
WITH_PAIR = {**DOMAINS, PAIR: {"web": (0, 1), "db": (2,)}}


class Daemon:
    """A libvirt daemon, whose state lies in a folder, and its domains."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.etc = folder / "etc"
        self.etc.mkdir(parents=True)
        self.uri = f"qemu+unix:///system?socket={folder}/sock/libvirt-sock"
        # So that it can be full.
        lab.quietly(["mount", "-t", "tmpfs", "-o", "size=1m", "prove", str(self.etc)])
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again."""
        self._shell("start_daemon")
        self.connection = libvirt.open(self.uri)

    def size_told(self, name: str, checkpoint: str) -> bool | None:
        """Whether libvirt tells the size of an increment since a checkpoint of a running domain, so whether it can be.

        None if it knows no such checkpoint.
        """
        try:
            found = self.connection.lookupByName(name).checkpointLookupByName(checkpoint)
        except libvirt.libvirtError:
            return None
        told = ET.fromstring(found.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE)).iterfind("disks/disk")
        return all("size" in disk.attrib for disk in told if disk.get("checkpoint") == "bitmap")

    def start_domain(self, name: str) -> str:
        """Start a domain; return why it does not start, in the words of libvirt and of QEMU, or nothing."""
        log = self._folder / "log/qemu" / f"{name}.log"
        before = log.stat().st_size if log.exists() else 0
        try:
            self.connection.lookupByName(name).create()
        except libvirt.libvirtError as exc:  # which does not always wait for what QEMU says
            said = [line for line in log.read_bytes()[before:].decode(errors="replace").splitlines() if "ock" in line]
            return f"{exc} {said}"
        return ""

    def pid_of(self, name: str) -> int:
        """Return the process of a domain that runs."""
        return int((self._folder / "run/qemu" / f"{name}.pid").read_text(encoding="ascii"))

    def kill(self) -> None:
        """Kill it; its state stays."""
        pid = int((self._folder / "libvirtd.pid").read_text(encoding="ascii"))
        os.kill(pid, 9)
        with contextlib.suppress(libvirt.libvirtError):
            self.connection.close()
        while pathlib.Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def close(self) -> None:
        """End it with all that it has started."""
        self._shell("stop_daemon")
        lab.quietly(["umount", "-l", str(self.etc)])

    def _shell(self, function: str) -> None:
        """Call a function of the integration tests."""
        # Not piped: the daemon would hold the pipe open.
        command = ["bash", "-c", f". {LAB_SH} {self._folder}; {function}"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


E = t.TypeVar("E", bound="Estate")


class Estate(lab.Lab):
    """A lab with domains."""

    known_kinds: t.Mapping[kinds.Kind, dict[str, tuple[int, ...]]] = DOMAINS

    def __init__(
        self: E,
        base: pathlib.Path,
        library: pathlib.Path,
        templates: kinds.Templates,
        make_promise: t.Callable[[E], promise.Promise],
    ) -> None:
        # A daemon's words about a call that is meant to fail are no news.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        # What is mounted there later is to be seen by the daemon, too, which has mounts of its own.
        self._shared = base / "disks"
        self._shared.mkdir(parents=True)
        lab.quietly(["mount", "--bind", str(self._shared), str(self._shared)])
        lab.quietly(["mount", "--make-shared", str(self._shared)])
        self.daemon = Daemon(base / "libvirt")
        self._definitions: dict[str, str] = {}  # before the snapshot, by name; of the kind that is in use
        self.numbers: dict[str, tuple[int, ...]] = {}
        super().__init__(base, library, templates, make_promise)

    def close(self) -> None:
        """End all that runs."""
        super().close()
        self.daemon.close()
        lab.quietly(["umount", "-l", str(self._shared)])

    def use(self, kind: kinds.Kind) -> None:
        """Have the domains of this kind."""
        kind = kind if kind in self.known_kinds else THREE
        super().use(kind)
        if self.numbers != self.known_kinds[kind]:
            self._definitions.clear()
        self.numbers = self.known_kinds[kind]
        names = {
            number: f"{name}.vd{'abc'[place]}.{SNAPSHOT}.qcow2"
            for name, numbers in self.numbers.items()
            for place, number in enumerate(numbers)
        }
        self.disks = [disk._replace(target=self.folder / names[disk.number]) for disk in self.disks]

    def lay_out(self) -> None:
        """Have fresh images, no overlays, and the domains with their first definitions and a checkpoint each."""
        super().lay_out()
        for domain in self.daemon.connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            if domain.name() not in self.numbers or not _is_intact(domain, self._definitions.get(domain.name())):
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        known = {domain.name() for domain in self.daemon.connection.listAllDomains()}
        for name in self.numbers.keys() - known:
            domain = self.daemon.connection.defineXML(self._definition(name))
            domain.checkpointCreateXML(self._checkpoint(name), libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)
            self._definitions[name] = definition_of(domain)

    def _definition(self, name: str) -> str:
        """Return the definition of a domain; it needs no operating system."""
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{disk.format}'/><source file='{disk.active}'/>"
            f"<target dev='vd{'abc'[place]}' bus='virtio'/></disk>"
            for place, disk in enumerate(self.disks_of(name))
        )
        kind = "kvm" if os.access("/dev/kvm", os.W_OK) else "qemu"
        return (
            f"<domain type='{kind}'><name>{name}</name><uuid>{_uuid(name)}</uuid><memory unit='MiB'>64</memory>"
            f"<os><type arch='{os.uname().machine}'>hvm</type></os><devices>{disks}</devices></domain>"
        )

    def _checkpoint(self, name: str) -> str:
        """Return the XML of a checkpoint of all qcow2 disks of a domain; raw ones have no bitmaps."""
        disks = "".join(
            f"<disk name='vd{'abc'[place]}' checkpoint='{'bitmap' if disk.format == 'qcow2' else 'no'}'/>"
            for place, disk in enumerate(self.disks_of(name))
        )
        return (
            f"<domaincheckpoint><name>{CHECKPOINT}</name><creationTime>1700000000</creationTime><disks>{disks}</disks>"
            f"{self._definition(name)}</domaincheckpoint>"
        )

    def disks_of(self, name: str) -> list[kinds.Disk]:
        """Return the disks of a domain."""
        return [disk for disk in self.disks if disk.number in self.numbers[name]]

    def domain(self, name: str) -> t.Any:
        """Return libvirt's handle of a domain."""
        return self.daemon.connection.lookupByName(name)

    def run(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> runs.Run:
        """Run the module to its end."""
        run = super().run(rule, log, kill)
        if run.status < 0:
            time.sleep(_SECONDS_TO_SETTLE)
        return run

    def switched(self, name: str) -> bool | None:
        """Whether a domain is on its overlays, by its definition; None if that is neither the old nor the new one."""
        now = ET.canonicalize(definition_of(self.domain(name)))
        old = self._definitions[name]
        if now == ET.canonicalize(old):
            return False
        new = ET.fromstring(old)
        for element, disk in zip(new.iterfind("devices/disk"), self.disks_of(name)):
            t.cast("ET.Element", element.find("source")).set("file", str(disk.target))
            t.cast("ET.Element", element.find("driver")).set("type", "qcow2")
        return True if now == ET.canonicalize(ET.tostring(new, encoding="unicode")) else None


class OfDomains(promise.OfImages[E]):
    """What the promises of domains on a snapshot have in common; every image of theirs may change."""

    module = "domain_overlay"

    @property
    def subjects(self) -> tuple[str, ...]:
        """With one of which each message begins."""
        ground = self._ground
        return (*super().subjects, "libvirt cannot ", ground.daemon.uri, *(f"{name}: " for name in ground.numbers))

    def told_wrong(self, run: runs.Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left, domain by domain."""
        wrong = []
        for name in self._ground.numbers if run.domains else ():
            state = str(run.domain(name).get("state"))
            if state != "failed":
                wrong += [f"{name} is said to be {state}: {what}" for what in self.said_wrong(name, state)]
        if (run.status == 0) != (bool(run.domains) and all(one["state"] != "failed" for one in run.domains)):
            wrong.append(f"exit {run.status} with {[one['state'] for one in run.domains]}: {run.message}")
        return wrong

    def done(self) -> list[bool]:
        """Whether nothing is left to do, for each domain."""
        return [not self.undone(name) for name in self._ground.numbers]

    def done_at(self) -> float:
        """Return 0: that the last step is one of libvirt's, no clock of files tells."""
        return 0.0

    def raced_wrong(
        self, _rival: promise.Rival, _theirs: list[kinds.Disk], _first: runs.Run, _second: runs.Run, _stopped: bool
    ) -> list[str]:
        """Return what is wrong after two runs; the next one completes what neither of them could."""
        return self.images_wrong()

    def said_wrong(self, name: str, _state: str) -> list[str]:
        """Return what is not as it is said to be of a domain that has not failed."""
        return self.undone(name)

    def undone(self, name: str) -> list[str]:
        """Return what is left to do for a domain."""
        raise NotImplementedError

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images and definitions, whatever the run was to do."""
        raise NotImplementedError

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which completes everything, and a third, which changes nothing."""
        ground, leftovers = self._ground, self._ground.leftovers()
        second = ground.run()
        wrong = [*self.images_wrong(), *ground.cleared_wrong(second, leftovers)]
        wrong += [f"{name}: {what}" for name in ground.numbers for what in self.undone(name)]
        if second.status:
            wrong.append(f"exit {second.status}: {second.message} {second.stderr}")
        third = ground.run()
        if third.status or (third.result or {}).get("changed"):
            wrong.append(f"third run: exit {third.status}: {third.message} {third.domains}")
        return [f"second run: {problem}" for problem in [*wrong, *self.third_wrong(third)]]

    def third_wrong(self, _third: runs.Run) -> list[str]:
        """Return what else is wrong when all is done, and with what a third run says."""
        return []


def definition_of(domain: t.Any) -> str:
    """Return what the next start of a domain uses."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    return t.cast("str", domain.XMLDesc(flags))


def _is_intact(domain: t.Any, definition: str | None) -> bool:
    """Whether a domain still has this definition, and its checkpoint."""
    return definition_of(domain) == definition and len(domain.listAllCheckpoints()) == 1


def _uuid(name: str) -> str:
    """Return the UUID of the domain of this name."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, name))
