# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What libvirt is asked for of volumes, pools and checkpoints: by libvirt's own driver for tests, which runs no VM.

What its driver for QEMU does is in the integration target domain_overlay.
"""

from __future__ import annotations

import collections
import threading
import time

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt import connection
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Libvirt, LiveBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Place, Volume
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.pools import Pools

WEB = Volume("images", "web.qcow2", is_direct=False)


@pytest.fixture(name="host")
def fixture_host():
    """Have a host with the pools images and others, which have a volume each, and as often as wanted its daemon."""
    host = libvirt.open("test:///default")
    pools = [define_pool(host, name) for name in ("images", "others")]
    yield host
    for domain in [one for one in host.listAllDomains(0) if one.name() == "web"]:
        for checkpoint in domain.listAllCheckpoints(0):
            checkpoint.delete(0)
        domain.destroy()
    for pool in [one for one in pools if one.name() in host.listStoragePools()]:
        pool.destroy()


def define_pool(host, name, kind="dir"):
    source = "<source><host name='h'/><dir path='/x'/></source>" if kind == "netfs" else ""
    text = f"<pool type='{kind}'><name>{name}</name>{source}<target><path>/srv/{name}</path></target></pool>"
    pool = host.storagePoolCreateXML(text, 0)
    pool.createXML("<volume type='file'><name>web.qcow2</name><capacity>1048576</capacity></volume>", 0)
    return pool


class Daemon:
    """A connection of which the list of pools is what is given, or an error."""

    def __init__(self, answer):
        self.answer = answer
        self.times = 0

    def listAllStoragePools(self, _flags):  # noqa: N802  libvirt's name
        self.times += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(name="calls")
def fixture_calls(monkeypatch):
    """Count what pools are asked for."""
    counts = collections.Counter()
    for name in ("storageVolLookupByName", "refresh"):
        real = getattr(libvirt.virStoragePool, name)

        def counted(pool, *args, name=name, real=real):
            counts[name, pool.name()] += 1
            return real(pool, *args)

        monkeypatch.setattr(libvirt.virStoragePool, name, counted)
    return counts


def test_a_volume_is_looked_up_once(host, calls):
    pools = Pools(host)
    assert [pools.place_of(WEB) for _time in range(3)] == [Place("/srv/images/web.qcow2", "file")] * 3
    assert pools.place_of(WEB._replace(pool="others")).path == "/srv/others/web.qcow2"
    gone = pools.place_of(WEB._replace(name="gone"))
    assert (gone.path, gone.suspect) == (None, "/srv/images/gone")
    assert pools.place_of(WEB._replace(name="gone")) == gone
    assert calls == {("storageVolLookupByName", "images"): 2, ("storageVolLookupByName", "others"): 1}


def test_a_pool_that_is_gone_since_it_was_listed_keeps_no_other_from_being_read(host):
    daemon = Daemon(host.listAllStoragePools(0))
    host.storagePoolLookupByName("others").destroy()  # a transient one is gone then
    pools = Pools(daemon)
    assert pools.place_of(WEB).path == "/srv/images/web.qcow2"
    place = pools.place_of(WEB._replace(pool="others"))
    assert (place.path, place.suspect) == (None, "web.qcow2")
    assert "cannot tell about the storage pool others: " in place.why_unfit
    assert pools.refresh(["/srv/images", "/srv/others"]) == []
    assert daemon.times == 1


def test_pools_that_cannot_be_listed_are_told_where_a_volume_is_used_only():
    error = libvirt.libvirtError("no connection driver available")
    pools = Pools(Daemon(error))
    assert pools.refresh([]) == pools.refresh(["/srv/images"]) == []
    daemon = Daemon(error)
    pools = Pools(daemon)
    assert [pools.place_of(WEB).suspect for _time in range(3)] == ["web.qcow2"] * 3
    assert "libvirt cannot tell about the volume web.qcow2: no connection driver" in pools.place_of(WEB).why_unfit
    (warning,) = pools.refresh(["/srv/images"])
    assert "cannot list its storage pools, so none was refreshed: no connection driver available." in warning
    assert daemon.times == 1


def test_pools_are_refreshed_of_which_a_refresh_that_fails_unmounts_nothing(host, calls):
    mounted = define_pool(host, "mounted", "netfs")
    try:
        assert Pools(host).refresh(["/srv/images", "/srv/mounted", "/srv"]) == []
        assert Pools(host).place_of(WEB._replace(pool="mounted")).path == "/srv/mounted/web.qcow2"
    finally:
        mounted.destroy()
    assert {call for call in calls if call[0] == "refresh"} == {("refresh", "images")}


def test_a_checkpoint_remembers_disks_that_were_volumes_then(host):
    driver = "<driver name='qemu' type='qcow2'/>"
    volume = f"<disk type='volume'>{driver}<source pool='{{}}' volume='web.qcow2'/><target dev='vd{{}}'/></disk>"
    file = f"<disk type='file'>{driver}<source file='/srv/data.qcow2'/><target dev='vdc' bus='virtio'/></disk>"
    disks = volume.format("images", "a") + volume.format("others", "b") + file
    domain = host.createXML(
        "<domain type='test'><name>web</name><memory>1024</memory><os><type>hvm</type></os>"
        f"<devices>{disks}</devices></domain>",
        0,
    )
    for name in ("one", "two"):
        domain.checkpointCreateXML(
            f"<domaincheckpoint><name>{name}</name><disks><disk name='vda' checkpoint='bitmap' bitmap='b{name}'/>"
            "<disk name='vdb' checkpoint='no'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>"
        )
    host.storagePoolLookupByName("others").destroy()
    daemon = Libvirt("test:///default")
    kept = daemon.kept(daemon.domains()["web"])
    assert [one.bitmaps for one in kept.checkpoints] == [{"vda": "bone"}, {"vda": "btwo"}]
    assert [one.left_out for one in kept.checkpoints] == [{"vdb", "vdc"}] * 2
    assert [one.parent for one in kept.checkpoints] == [None, "one"]
    assert all(abs(one.created - time.time()) < 60 for one in kept.checkpoints)
    assert [one.live for one in kept.checkpoints] == [None, None]
    assert kept.images == {"/srv/images/web.qcow2", "/srv/data.qcow2"}
    then = {"vda": {"/srv/images/web.qcow2"}, "vdb": set(), "vdc": {"/srv/data.qcow2"}}
    assert [one.images for one in kept.checkpoints] == [then] * 2
    now = daemon.kept_now(daemon.domains()["web"])
    assert [one._replace(live=None) for one in now.checkpoints] == list(kept.checkpoints)
    assert [one.live for one in now.checkpoints] == [LiveBitmaps({}, None)] * 2  # this driver knows of no bitmaps
    assert now.images == frozenset()


def test_only_a_domain_with_a_managed_save_is_asked_for_what_that_has(host, monkeypatch):
    text = "<domain type='test'><name>{}</name><memory>1024</memory><os><type>hvm</type></os>{}</domain>"
    disk = "<disk type='volume'><source pool='images' volume='web.qcow2'/><target dev='vdb'/></disk>"
    error = libvirt.libvirtError("cannot be read")
    saves = {"saved": text.format("saved", f"<devices>{disk}</devices>"), "odd": error}

    def tell(domain, _flags):
        if isinstance(saves[domain.name()], Exception):
            raise saves[domain.name()]
        return saves[domain.name()]

    monkeypatch.setattr(libvirt.virDomain, "hasManagedSaveImage", lambda domain, _flags: domain.name() in saves)
    monkeypatch.setattr(libvirt.virDomain, "managedSaveGetXMLDesc", tell)
    defined = [host.defineXML(text.format(name, "")) for name in ("saved", "odd", "plain")]
    try:
        domains = Libvirt("test:///default").domains()
    finally:
        for one in defined:
            one.undefine()
    assert domains["saved"].saved_definition.tops == {"vdb": "/srv/images/web.qcow2"}
    assert (domains["odd"].managed_save, domains["odd"].saved_definition) == (True, None)
    assert (domains["plain"].managed_save, domains["plain"].saved_definition) == (False, None)


@pytest.fixture(name="with_sizes")
def fixture_with_sizes(host, monkeypatch):
    """Have a domain with the checkpoints one and two, and what is called when their sizes are asked for."""
    domain = host.createXML(
        "<domain type='test'><name>web</name><memory>1024</memory><os><type>hvm</type></os><devices><disk type='file'>"
        "<source file='/srv/web.qcow2'/><target dev='vda' bus='virtio'/></disk></devices></domain>",
        0,
    )
    for name in ("one", "two"):
        domain.checkpointCreateXML(f"<domaincheckpoint><name>{name}</name></domaincheckpoint>")
    real = libvirt.virDomainCheckpoint.getXMLDesc

    def install(answer):
        def asked(checkpoint, flags=0):
            if flags & libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE:
                answer()
            return real(checkpoint, flags)

        monkeypatch.setattr(libvirt.virDomainCheckpoint, "getXMLDesc", asked)
        daemon = Libvirt("test:///default")
        return daemon.kept_now(daemon.domains()["web"]).checkpoints

    return install


def test_a_libvirt_that_knows_no_sizes_cannot_tell_of_live_bitmaps(with_sizes):
    def as_libvirt_5_6():  # virCheckFlags() of qemuCheckpointGetXMLDesc() there
        error = libvirt.libvirtError("")
        words = "unsupported flags (0x4) in function qemuCheckpointGetXMLDesc"
        error.err = (libvirt.VIR_ERR_INVALID_ARG, 10, words, 2, words, None, None, -1, -1)
        raise error

    one, two = with_sizes(as_libvirt_5_6)
    assert (one.name, one.bitmaps, one.live.sizes) == ("one", {"vda": "one"}, {})
    assert one.live.problem.startswith("unsupported flags (0x4)")
    assert one.live.problem.endswith("(libvirt 7.0 can)")
    assert two.live == one.live


def test_a_qemu_that_does_not_answer_is_asked_once(with_sizes, monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.1)
    asked, ended = [], threading.Event()

    def hang():
        asked.append(1)
        ended.wait(30)

    one, two = with_sizes(hang)
    ended.set()
    assert [one.bitmaps, two.bitmaps] == [{"vda": "one"}, {"vda": "two"}]
    assert "has not answered" in one.live.problem
    assert two.live == one.live
    assert asked == [1]


def test_what_may_wait_for_ever_has_a_connection_of_its_own(with_sizes, monkeypatch):
    """Of two threads that share one, libvirt 9.0 can fail to wake the other, and both wait for ever."""
    monkeypatch.setattr(connection, "PATIENCE", 0.1)
    opened, stuck, ended = [], [], threading.Event()
    real = libvirt.open
    monkeypatch.setattr(libvirt, "open", lambda uri: opened.append(real(uri)) or opened[-1])
    monkeypatch.setattr(
        libvirt.virConnect,
        "lookupByUUIDString",
        lambda self, uuid, look=libvirt.virConnect.lookupByUUIDString: (stuck.append(self), look(self, uuid))[1],
    )
    one, _two = with_sizes(lambda: ended.wait(30))
    ended.set()
    assert one.live.problem
    main, spare = opened
    assert stuck == [main, spare]


def test_an_error_is_an_answer_and_costs_no_further_connection(with_sizes, monkeypatch):
    opened = []
    real = libvirt.open
    monkeypatch.setattr(libvirt, "open", lambda uri: opened.append(uri) or real(uri))

    def fail():
        raise libvirt.libvirtError("no")

    with_sizes(fail)
    assert len(opened) == 2


CDROM = "<disk type='file' device='cdrom'><target dev='vdb' bus='virtio'/><readonly/></disk>"


@pytest.mark.parametrize(
    ("then", "now", "left_out", "is_asked"),
    [
        (["web"], ["web"], set(), False),
        (["web", CDROM], ["web", CDROM], {"vdb"}, False),  # as most domains have it
        (["web", CDROM], ["web", "data"], set(), True),
        (["web", "data"], ["data", "web"], set(), True),
        (["web", "data"], ["data"], set(), True),
    ],
)
def test_a_checkpoint_is_asked_for_its_disks_where_these_can_have_other_targets_now(
    host, monkeypatch, then, now, left_out, is_asked
):
    def definition(disks):
        named = (
            "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/srv/{0}'/><target dev='vd{1}'/></disk>"
        )
        parts = "".join(disk if disk == CDROM else named.format(disk, "ab"[place]) for place, disk in enumerate(disks))
        return (
            "<domain type='test'><name>web</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid><memory>1024</memory>"
            f"<os><type>hvm</type></os><devices>{parts}</devices></domain>"
        )

    domain = host.defineXML(definition(then))
    domain.create()
    checkpoint = domain.checkpointCreateXML("<domaincheckpoint><name>one</name></domaincheckpoint>")
    domain.destroy()
    host.defineXML(definition(now))
    real, flags = libvirt.virDomainCheckpoint.getXMLDesc, []
    monkeypatch.setattr(
        libvirt.virDomainCheckpoint, "getXMLDesc", lambda self, flag: flags.append(flag) or real(self, flag)
    )
    try:
        daemon = Libvirt("test:///default")
        (known,) = daemon.kept_now(daemon.domains()["web"]).checkpoints
    finally:
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        domain.undefine()
    assert (known.left_out, 0 in flags) == (left_out, is_asked)
    disks = {f"vd{'ab'[place]}": {f"/srv/{disk}"} for place, disk in enumerate(then) if disk != CDROM}
    assert known.images == (disks if is_asked else {})
