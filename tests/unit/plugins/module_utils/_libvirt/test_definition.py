# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Definitions of domains: what they say of their disks, and that a switch changes nothing else."""

from __future__ import annotations

import difflib

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import (
    Definition,
    Place,
    Source,
    StatedChain,
    StatedImage,
    Volume,
    checkpoint_from,
    pool_from,
)

DEFINITION = """<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' type='kvm'>
  <name>a &amp; b</name>
  <!-- kept -->
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/srv/it&apos;s.qcow2' startupPolicy='optional'>
        <seclabel model='dac' relabel='no'/>
      </source>
      <backingStore type='file'>
        <format type='qcow2'/>
        <source file='/srv/mid'/>
        <backingStore type='file'>
          <format type='raw'/>
          <source file='/srv/base'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>x</serial>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/vg/lv'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' io='native'/>
      <source file='/srv/c.img'/>
      <backingStore/>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <graphics type='vnc' passwd='secret'/>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-foo'/>
  </qemu:commandline>
</domain>
"""


def changes(before, after):
    """Return the lines that are gone and those that are new, whatever the kind of quotes."""
    diff = difflib.ndiff(before.replace("'", '"').splitlines(), after.replace("'", '"').splitlines())
    lines = [line for line in diff if line[0] in "+-"]
    return [line[2:].strip() for line in lines if line[0] == "-"], [
        line[2:].strip() for line in lines if line[0] == "+"
    ]


def switched(definition, overlays):
    """Return the text of the definition with these targets switched to overlays with these paths."""
    return Definition(definition).with_sources({target: Source(path) for target, path in overlays.items()}).text


def test_what_a_definition_says_of_its_disks():
    first, second, third = Definition(DEFINITION).disks
    assert first[:5] == ("vda", "file", "/srv/it's.qcow2", "qcow2", None)
    assert first.stated_chain == StatedChain((StatedImage("/srv/mid", "qcow2"), StatedImage("/srv/base", "raw")), True)
    assert second[:7] == ("vdb", "block", "/dev/vg/lv", "raw", None, False, None)
    assert third[:7] == ("vdc", "file", "/srv/c.img", "raw", None, True, StatedChain((), True))
    assert [disk.is_optional for disk in (first, second, third)] == [True, False, False]


def test_a_switch_changes_the_path_and_drops_the_stated_chain():
    after = switched(DEFINITION, {"vda": "/srv/it's.snap.qcow2"})
    gone, new = changes(DEFINITION, after)
    assert new == ['<source file="/srv/it"s.snap.qcow2" startupPolicy="optional">']
    assert gone[0] == '<source file="/srv/it&apos;s.qcow2" startupPolicy="optional">'
    assert [line.split()[0].strip("</>") for line in gone[1:]] == [
        "backingStore",
        "format",
        "source",
        "backingStore",
        "format",
        "source",
        "backingStore",
        "backingStore",
        "backingStore",
    ]
    assert Definition(after).disks[0][2:7] == ("/srv/it's.snap.qcow2", "qcow2", None, False, None)
    assert Definition(after).has_only_switched(Definition(DEFINITION), {"vda": Source("/srv/it's.snap.qcow2")})


def test_everything_outside_the_switched_disks_stays_byte_by_byte():
    odd = "<metadata><x k='one&#10;two&#9;three'>ü&#13;\n<![CDATA[<disk>]]></x></metadata>\r\n  <devices>"
    definition = DEFINITION.replace("  <devices>", odd).replace("<name>", "<!-- <disk/> --><name>")
    after = switched(definition, {"vdc": "/srv/c.x.qcow2"})
    start, end = definition.index("<disk type='file' device='disk' snapshot"), definition.index("    <graphics")
    assert after.startswith(definition[:start])
    assert after.endswith(definition[end:])
    assert "/srv/c.x.qcow2" in after
    assert switched(definition, {}) == definition


def test_a_raw_disk_becomes_qcow2_and_a_device_a_file():
    after = switched(DEFINITION, {"vdb": "/srv/lv.x.qcow2", "vdc": "/srv/c.x.qcow2"})
    assert Definition(after).disks[1][:7] == ("vdb", "file", "/srv/lv.x.qcow2", "qcow2", None, False, None)
    assert Definition(after).disks[2][:7] == ("vdc", "file", "/srv/c.x.qcow2", "qcow2", None, True, None)
    _gone, new = changes(DEFINITION, after)
    assert '<driver name="qemu" type="qcow2" io="native"/>' in new
    assert "/dev/vg/lv" not in after
    assert switched(after, {"vdb": "/srv/lv.x.qcow2", "vdc": "/srv/c.x.qcow2"}) == after


def test_a_diff_shows_the_disks_only():
    text = Definition(DEFINITION).parts({"vdc"})
    assert "/srv/c.img" in text
    assert "secret" not in text
    assert "vda" not in text
    assert Definition(DEFINITION).parts(set()) == ""


UNFIT = {
    "cdrom": "<disk type='file' device='cdrom'><source file='/x'/><target dev='sda'/></disk>",
    "floppy": "<disk type='file' device='floppy'><target dev='sda'/></disk>",
    "lun": "<disk type='block' device='lun'><source dev='/dev/x'/><target dev='sda'/></disk>",
    "read-only": "<disk type='file'><source file='/x'/><target dev='sda'/><readonly/></disk>",
    "shareable": "<disk type='file'><source file='/x'/><target dev='sda'/><shareable/></disk>",
    "transient": "<disk type='file'><source file='/x'/><target dev='sda'/><transient/></disk>",
    "network": "<disk type='network'><source protocol='rbd' name='x'/><target dev='sda'/></disk>",
    "volume": "<disk type='volume'><source pool='p' volume='v'/><target dev='sda'/></disk>",
    "no source": "<disk type='file'><target dev='sda'/></disk>",
    "encrypted": "<disk type='file'><source file='/x'><encryption format='luks'/></source><target dev='sda'/></disk>",
    "slice of a file": "<disk type='file'><source file='/x'><slices/></source><target dev='sda'/></disk>",
    "format vmdk": "<disk type='file'><driver type='vmdk'/><source file='/x'/><target dev='sda'/></disk>",
    "nvme": "<disk type='nvme'><source type='pci' namespace='1'/><target dev='sda'/></disk>",
    "its definition has reservations, which an overlay cannot have": (
        "<disk type='block'><source dev='/x'><reservations managed='yes'/></source><target dev='sda'/></disk>"
    ),
    "its definition has fdgroup, which an overlay cannot have": (
        "<disk type='file'><source file='/x' fdgroup='group'/><target dev='sda'/></disk>"
    ),
    "its definition has auth, cookies, new, which an overlay cannot have": (
        "<disk type='file'><auth username='x'/><source file='/x' new='y'><cookies/></source><target dev='sda'/></disk>"
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_disks_that_can_take_no_part(reason):
    (disk,) = Definition(f"<domain><devices>{UNFIT[reason]}</devices></domain>").disks
    assert disk.why_unfit == reason


HARMLESS = """<source file='/x' startupPolicy='requisite' index='1'>
    <!-- text --> <seclabel model='dac' relabel='no'/><dataStore type='file'><format type='raw'/>
    <source file='/x.data'/></dataStore></source>"""


def test_what_a_source_may_have_stays_and_only_the_data_file_goes():
    disk = f"<disk type='file'>{HARMLESS}<target dev='vda'/></disk>"
    definition = Definition(f"<domain><devices>{disk}</devices></domain>")
    assert (definition.disks[0].why_unfit, definition.disks[0].data_file) == (None, "/x.data")
    after = definition.with_sources({"vda": Source("/y")})
    assert after.disks[0].data_file is None
    assert "dataStore" not in after.text
    assert [part in after.text for part in ("requisite", "index=", "relabel=", "<!-- text -->")] == [True] * 4
    assert after.has_only_switched(definition, {"vda": Source("/y")})
    kept = Definition(definition.text.replace("file='/x'", "file='/y'"))
    assert not kept.has_only_switched(definition, {"vda": Source("/y")})


VOLUMES = """<domain><devices>
  <disk type='volume'><driver type='qcow2'/><source pool='p' volume='v' mode='host' index='2'/>
    <target dev='vda'/></disk>
  <disk type='file'><source file='/x'/><backingStore type='volume'><source pool='p' volume='w'/></backingStore>
    <target dev='vdb'/></disk></devices></domain>"""
V, W = Volume("p", "v", False), Volume("p", "w", False)


def test_a_volume_is_what_libvirt_says_it_is():
    assert Definition(DEFINITION).volumes == ()
    assert Definition(VOLUMES).volumes == (V, W)
    assert Definition(VOLUMES).disks[0][:5] == ("vda", "volume", None, "qcow2", "volume")
    places = {V: Place("/srv/v"), W: Place("/srv/w"), Volume("p", "z", True): Place("/srv/z")}
    first, second = Definition(VOLUMES).with_places(places).disks
    assert first[:5] == ("vda", "file", "/srv/v", "qcow2", None)
    assert (first.volume, first.suspect) == (V, None)
    assert second.stated_chain.images == (StatedImage("/srv/w", "raw"),)
    device = Definition(VOLUMES, {V: Place("/dev/vg/v", "block"), W: Place(None, "volume", "no pool", "w")})
    assert device.disks[0][:5] == ("vda", "block", "/dev/vg/v", "qcow2", None)
    assert device.disks[1].stated_chain.images[0].path == "w"
    lost = Definition(VOLUMES, {V: Place(None, "volume", "no pool", "/srv/v")})
    assert (lost.disks[0].source, lost.disks[0].why_unfit, lost.disks[0].suspect) == (None, "no pool", "/srv/v")


def test_a_volume_becomes_a_file():
    before = Definition(VOLUMES, {V: Place("/srv/v"), W: Place("/srv/w")})
    sources = {"vda": Source("/srv/v.x.qcow2")}
    after = before.with_sources(sources)
    assert after.disks[1] == before.disks[1]
    assert after.volumes == (W,)
    assert after.disks[0][:5] == ("vda", "file", "/srv/v.x.qcow2", "qcow2", None)
    assert after.has_only_switched(before, sources)
    same_place = Definition(VOLUMES, {**before.places, V: Place("/srv/v.x.qcow2")})
    assert not same_place.has_only_switched(before, sources)


@pytest.mark.parametrize("mode, is_direct", [("", False), ("mode='host'", False), ("mode='direct'", True)])
def test_the_mode_of_a_volume(mode, is_direct):
    text = f"<domain><devices><disk type='volume'><source pool='p' volume='v' {mode}/></disk></devices></domain>"
    assert Definition(text).volumes == (Volume("p", "v", is_direct),)


@pytest.mark.parametrize(
    "target, folder", [("<target><path>/srv/a b</path></target>", "/srv/a b"), ("<target/>", None), ("", None)]
)
def test_what_a_pool_says(target, folder):
    assert pool_from(f"<pool type='dir'><name>p</name>{target}</pool>") == ("dir", folder)


@pytest.mark.parametrize(
    "nvram, path",
    [
        ("", None),
        ("<nvram/>", None),
        ("<nvram template='/t'>/var/web.fd</nvram>", "/var/web.fd"),
        ("<nvram type='file'><source file='/var/web.fd'/></nvram>", "/var/web.fd"),
        ("<nvram type='block'>\n<source dev='/dev/vg/web'/></nvram>", "/dev/vg/web"),
        ("<nvram type='network'><source protocol='iscsi' name='x'/></nvram>", None),
    ],
)
def test_where_the_firmware_keeps_its_variables(nvram, path):
    assert Definition(f"<domain><os><type>hvm</type>{nvram}</os><devices/></domain>").nvram == path


@pytest.mark.parametrize(
    "backend, has_state", [("emulator", True), ("external", True), ("passthrough", False), (None, False)]
)
def test_whether_there_is_the_state_of_a_tpm(backend, has_state):
    tpm = f"<tpm model='tpm-crb'><backend type='{backend}' version='2.0'/></tpm>" if backend else ""
    assert Definition(f"<domain><devices>{tpm}</devices></domain>").has_tpm_state is has_state


@pytest.mark.parametrize(
    "stated, expected",
    [
        ("<backingStore/>", StatedChain((), True)),
        (
            "<backingStore type='file'><source file='/a'/></backingStore>",
            StatedChain((StatedImage("/a", "raw"),), False),
        ),
        (
            "<backingStore type='file'><source file='/a'/><backingStore/></backingStore>",
            StatedChain((StatedImage("/a", "raw"),), True),
        ),
        (
            "<backingStore type='network'><source protocol='nbd'/></backingStore>",
            StatedChain((StatedImage("network", "raw"),), False),
        ),
        (
            "<backingStore type='block'><format type='qcow2'/><source dev='/b'/></backingStore>",
            StatedChain((StatedImage("/b", "qcow2"),), False),
        ),
        (
            "<backingStore type='file'><source file='/a' index='3'><slices/><dataStore><source file='/d'/></dataStore>"
            "</source></backingStore>",
            StatedChain((StatedImage("/a", "raw", "/d", ("slices",)),), False),
        ),
        ("", None),
    ],
)
def test_the_chain_that_a_definition_states(stated, expected):
    text = (
        f"<domain><devices><disk type='file'><source file='/x'/>{stated}<target dev='vda'/></disk></devices></domain>"
    )
    assert Definition(text).disks[0].stated_chain == expected


def test_the_bitmaps_of_a_checkpoint():
    text = """<domaincheckpoint><name>one</name><disks>
      <disk name='vda' checkpoint='bitmap' bitmap='one'/><disk name='vdb' checkpoint='no'/>
      <disk name='vdc' checkpoint='bitmap' bitmap='other'/></disks>
      <domain><devices><disk><target dev='vdb'/></disk></devices></domain></domaincheckpoint>"""
    parts = checkpoint_from(text)
    assert (parts.bitmaps, parts.images, parts.volumes) == ({"vda": "one", "vdc": "other"}, frozenset(), frozenset())
    assert (parts.left_out, parts.created, parts.parent, parts.sizes) == ({"vdb"}, 0, None, {})


def test_a_checkpoint_has_its_time_the_one_before_and_sizes_of_disks_with_a_valid_chain():
    text = """<domaincheckpoint><name>two</name><parent><name>one</name></parent><creationTime>1767225600</creationTime>
      <disks><disk name='vda' checkpoint='bitmap' bitmap='two' size='0'/><disk name='vdb' checkpoint='bitmap'
      bitmap='two' size='65536'/><disk name='vdc' checkpoint='bitmap' bitmap='two'/></disks></domaincheckpoint>"""
    parts = checkpoint_from(text)
    assert (parts.created, parts.parent, parts.sizes) == (1767225600, "one", {"vda": 0, "vdb": 65536})


def test_the_images_that_a_domain_could_write_to_when_a_checkpoint_was_made():
    disks = (
        "<disk type='file'><source file='/srv/web.qcow2'/>{}</disk><disk><source file='/srv/b'/>{}</disk>"
        "<disk type='block'><source dev='/dev/vg/web'/>{}</disk><disk type='network'><source name='x'/>{}</disk>"
        "<disk type='volume'><source pool='p' volume='v'/>{}</disk>"
        "<disk type='file' device='cdrom'><source file='/srv/debian.iso'/>{}</disk>"
        "<disk type='volume' device='floppy'><source pool='p' volume='iso'/>{}</disk>"
        "<disk type='file'><source file='/srv/template.qcow2'/><readonly/>{}</disk>"
    ).format(*(f"<target dev='vd{letter}'/>" for letter in "abcdefgh"))
    named = "<disk name='vda' checkpoint='bitmap' bitmap='c'/>"
    named += "".join(f"<disk name='vd{letter}' checkpoint='no'/>" for letter in "bcdefgh")
    text = "<domaincheckpoint><name>c</name><disks>{}</disks>{}</domaincheckpoint>"
    parts = checkpoint_from(text.format(named, f"<domain><devices>{disks}</devices></domain>"))
    # What it could not write to may have been a CD-ROM, whose target another disk has now.
    assert parts.left_out == {"vdb", "vdc", "vdd", "vde"}
    assert checkpoint_from(text.format(named, "")).left_out == {f"vd{letter}" for letter in "bcdefgh"}
    assert parts.images == {"/srv/web.qcow2", "/srv/b", "/dev/vg/web"}
    assert parts.volumes == {Volume("p", "v", is_direct=False)}
    assert checkpoint_from("<domaincheckpoint><name>c</name><disks/></domaincheckpoint>").images == frozenset()


def test_a_disk_can_be_switched_to_any_type_and_format():
    before, sources = Definition(DEFINITION), {"vda": Source("/dev/vg/base", "raw", "block")}
    after = before.with_sources(sources)
    assert after.disks[0][:5] == ("vda", "block", "/dev/vg/base", "raw", None)
    assert '<source startupPolicy="optional" dev="/dev/vg/base">' in after.text
    assert after.has_only_switched(before, sources)
    assert not after.has_only_switched(before, {"vda": Source("/dev/vg/base", "raw", "file")})
    assert not after.has_only_switched(before, {})
    back = after.with_sources({"vda": Source("/srv/it's.qcow2")})
    assert back.disks[0][:4] == ("vda", "file", "/srv/it's.qcow2", "qcow2")


def test_a_definition_in_which_something_else_has_changed_is_not_only_switched():
    before, sources = Definition(DEFINITION), {"vda": Source("/srv/x.qcow2")}
    after = before.with_sources({**sources, "vdc": Source("/srv/y.qcow2")})
    assert not after.has_only_switched(before, sources)
