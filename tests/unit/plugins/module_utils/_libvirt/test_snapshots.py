# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Questions about a domain to a daemon that has gone, by libvirt's driver for tests; the rest is in live.yml."""

from __future__ import annotations

import os
import signal
import time

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    Interrupted,
    ending_cleanly,
    stop_here_if_asked,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt import snapshots
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain, Libvirt
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition, Source

IMAGE = "/guest/diskimage1"
DOMAIN = Domain(
    "test",
    "6695eb01-f6a4-8304-79aa-97f2502e193f",  # the one that the driver for tests always has
    "running",
    True,
    False,
    Definition("<domain/>"),
    Definition("<domain/>"),
)


@pytest.fixture(name="daemon")
def fixture_daemon(monkeypatch):
    """Have a daemon that has gone since."""
    monkeypatch.setattr(snapshots, "RESTART", 0.5)
    daemon = Libvirt("test:///default")
    daemon.connection.close()
    return daemon


def test_a_daemon_that_is_back_answers(daemon):
    assert [disk.target for disk in snapshots.disks_now(daemon, DOMAIN)] == ["vda"]


def test_a_signal_does_not_end_the_wait_for_a_daemon_but_the_run_after_it(daemon):
    """What was done before it could not be told any more."""
    daemon._uri = "test:///nowhere"
    with ending_cleanly():
        os.kill(os.getpid(), signal.SIGTERM)
        begun = time.monotonic()
        with pytest.raises(Refusal, match="is not back after 0 s") as caught:
            snapshots.disks_now(daemon, DOMAIN)
        assert (caught.value.code, time.monotonic() - begun >= 0.5) == ("libvirt_unreachable", True)
        with pytest.raises(Interrupted):
            stop_here_if_asked()


def test_a_daemon_that_does_not_come_is_waited_for_once(daemon, monkeypatch):
    monkeypatch.setattr(snapshots, "RESTART", 2)  # seconds, so that a busy machine does not take as long for nothing
    daemon._uri = "test:///nowhere"
    for is_waited_for in (True, False):
        begun = time.monotonic()
        with pytest.raises(Refusal, match="went away"):
            snapshots.defined_now(daemon, DOMAIN)
        assert (time.monotonic() - begun >= 2) is is_waited_for
    daemon._uri = "test:///default"
    assert snapshots.defined_now(daemon, DOMAIN).tops == {"vda": IMAGE}


def test_a_domain_that_was_given_other_images_after_its_merge_is_told(daemon):
    snapshots.check_on(daemon, DOMAIN, {"vda": Source(IMAGE)})
    with pytest.raises(UnknownOutcomeError, match="test: was given other images"):
        snapshots.check_on(daemon, DOMAIN, {"vda": Source("/below")})


class Unstored:
    """A daemon, its connection, and a domain that runs on its new image, with a definition that cannot be stored."""

    TEXT = f"""<domain id='1'><devices><disk type='file' device='disk'><driver type='qcow2'/><source file='{IMAGE}'/>
<target dev='vda'/></disk></devices></domain>"""

    def __init__(self, is_full):
        self.is_full = is_full
        self.stored = []
        self.connection = self

    def lookupByUUIDString(self, _uuid):  # noqa: N802  as libvirt has it
        return self

    def isActive(self):  # noqa: N802
        return True

    def isPersistent(self):  # noqa: N802
        return True

    def XMLDesc(self, _flags):  # noqa: N802
        return self.TEXT

    def setMetadata(self, *what):  # noqa: N802
        if self.is_full:
            raise libvirt.libvirtError("no space left")
        self.stored.append(what)

    def placed(self, definition):
        return definition

    def is_back(self, _seconds, *, can_end):
        return can_end


@pytest.mark.parametrize("is_full, words", [(True, "libvirt says: no space left"), (False, "may or may")])
def test_images_that_a_domain_runs_on_stay_although_its_definition_was_not_stored(is_full, words):
    """Any other refusal has them removed, under a QEMU that writes to them."""
    daemon, error = Unstored(is_full), libvirt.libvirtError("Failed to create file")
    with pytest.raises(UnknownOutcomeError, match=words):
        snapshots.check_switched(daemon, daemon, DOMAIN, {"vda": Source(IMAGE)}, error)
    assert len(daemon.stored) == (not is_full)
