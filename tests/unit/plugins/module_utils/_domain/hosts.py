# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host as tests need it: domains whose disks are real images, and whose definitions are switched."""

from __future__ import annotations

import os
import shutil

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import Creation
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings, Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.overlay import plan_domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.plan import SnapshotRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Kept
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition, checkpoint_from

from .. import qemu

SETTINGS = Settings(check_mode=False, seconds=60, find_program=shutil.which)


class Host:
    """The domains of a host; several hosts may have one folder of images."""

    def __init__(self, folder):
        self.folder = folder
        self.domains = {}
        self.checkpoints = {}  # images that a checkpoint remembers, by name of the domain

    def image(self, name, below=None):
        """Make an image, on top of another if that is given."""
        (self.folder / name).parent.mkdir(exist_ok=True)
        backing = ("-b", str(self.folder / below), "-F", "qcow2") if below else ()
        return qemu.create(self.folder / name, "1M", *backing)

    def define(self, name, *images, uuid=None, targets="abc"):
        """Define a domain with these images as disks, which are in the folder; its UUID stays if it has one."""
        disks = "".join(
            f"<disk type='file'><driver type='{'raw' if image.endswith('.img') else 'qcow2'}'/>"
            f"<source file='{self.folder / image}'/><target dev='vd{target}'/></disk>"
            for image, target in zip(images, targets)
        )
        uuid = uuid or (self.domains[name].uuid if name in self.domains else f"uuid-of-{name}")
        definition = Definition(f"<domain><devices>{disks}</devices></domain>")
        self.domains[name] = Domain(name, uuid, None, True, False, definition, None)

    def remember(self, name):
        """Have libvirt remember what the domain is like now, by a checkpoint."""
        domain = self.domains[name].definition.text
        self.checkpoints[name] = checkpoint_from(f"<domaincheckpoint>{domain}</domaincheckpoint>").images

    def plan(self, name, snapshot, directory=None):
        """Return what would become of a domain."""
        request = SnapshotRequest(snapshot, None, directory and str(directory), False, Creation())
        stock, domain = Inventory(self.domains), self.domains[name]
        kept = Kept(images=self.checkpoints.get(name, frozenset()))
        return plan_domain(domain, [stock.facts(domain, disk) for disk in domain.definition.disks], request, kept)

    def snapshot(self, name, snapshot, directory=None):
        """Put a domain on a snapshot. Return "present" or the names of what is new, or the codes of what is wrong."""
        plan = self.plan(name, snapshot, directory)
        if plan.problems:
            return [problem.code for problem in plan.problems]
        vms = {plan.domain.uuid: Vm(lambda: None)} if plan.has_work else {}
        outcome = run(MakeOverlays(AttributeOptions()), [disk.request for disk in plan.disks], SETTINGS, vms)
        if outcome.failures:
            return [problem.code for problem in outcome.failures]
        self.domains[name] = self.domains[name]._replace(definition=plan.definition)
        new = [os.path.relpath(source.path, self.folder) for source in plan.sources.values()]
        return new or "present"

    def taken(self, name, snapshot):
        """Return the names of the images that are taken for the snapshot of a domain that is on it."""
        plan = self.plan(name, snapshot)
        assert (plan.sources, plan.problems) == ({}, ())
        return [os.path.relpath(disk.request.path, self.folder) for disk in plan.disks]
