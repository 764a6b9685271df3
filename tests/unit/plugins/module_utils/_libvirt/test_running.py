# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the XML of a domain that runs says of its disks and of its guest agent."""

from __future__ import annotations

import xml.dom.minidom

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.running import (
    Mirror,
    RunningImage,
    running_disks,
    snapshot_xml,
    why_not_quiesced,
)

# As libvirt 9.0 writes it, without addresses and aliases.
VDA = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.s2' index='3'/>
  <backingStore type='file' index='2'><format type='qcow2'/><source file='/a.s1'/>
    <backingStore type='block' index='1'><format type='raw'/><source dev='/dev/a'/><backingStore/></backingStore>
  </backingStore>{}<target dev='vda' bus='virtio'/></disk>"""
MIRROR = """<mirror type='file' job='active-commit' ready='yes'><format type='qcow2'/>
  <source file='/a.s1' index='2'/></mirror>"""
CDROM = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>"
VOLUME = """<disk type='volume' device='disk'><source pool='p' volume='v' index='1'/><backingStore/>
  <target dev='vdb' bus='virtio'/></disk>"""
AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'{}/></channel>"


def domain(*devices):
    return f"<domain type='kvm'><devices>{''.join(devices)}</devices></domain>"


def test_a_chain_is_read_with_the_numbers_of_its_images():
    (disk,) = running_disks(domain(VDA.format("")))
    assert disk.target == "vda"
    assert disk.images == (RunningImage("/a.s2", "3"), RunningImage("/a.s1", "2"), RunningImage("/dev/a", "1"))
    assert [disk.name_of(place) for place in range(3)] == ["vda[3]", "vda[2]", "vda[1]"]
    assert [disk.place_of(path) for path in ("/a.s2", "/a.s1", "/dev/a", "/b")] == [0, 1, 2, None]
    assert disk.mirror is None


def test_an_image_is_found_by_any_of_its_names(tmp_path):
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    (disk,) = running_disks(domain(VDA.format("").replace("/a.s1", str(tmp_path / "real"))))
    assert disk.place_of(str(tmp_path / "link")) == 1


def test_a_job_that_writes_to_another_image_is_seen():
    (disk,) = running_disks(domain(VDA.format(MIRROR)))
    assert disk.mirror == Mirror("active-commit", RunningImage("/a.s1", "2"))


def test_an_empty_drive_and_a_volume_have_no_path():
    drive, volume = running_disks(domain(CDROM, VOLUME))
    assert (drive.target, drive.images) == ("sda", ())
    assert volume.images == (RunningImage(None, "1"),)
    assert (volume.name_of(0), volume.place_of("/srv/v")) == ("vdb[1]", None)


@pytest.mark.parametrize(
    "devices, why",
    [
        ([], "no channel"),
        ([AGENT.format("").replace("org.qemu.guest_agent.0", "com.redhat.spice.0")], "no channel"),
        ([AGENT.format(" state='disconnected'")], "no guest agent answers"),
        ([AGENT.format(" state='connected'")], None),
        ([AGENT.format("")], None),  # not told, so libvirt has to find out
    ],
)
def test_whether_a_guest_has_an_agent(devices, why):
    found = why_not_quiesced(domain(*devices))
    assert (found is None) == (why is None)
    assert why is None or why in found


def test_only_the_disks_that_take_part_are_in_a_snapshot():
    text = snapshot_xml(["vda", "vdb", "sda"], {"vda": '/srv/it\'s <a> "b" & c.qcow2'})
    disks = xml.dom.minidom.parseString(text).getElementsByTagName("disk")
    assert [disk.getAttribute("name") for disk in disks] == ["vda", "vdb", "sda"]
    assert [disk.getAttribute("snapshot") for disk in disks] == ["external", "no", "no"]
    (source,) = disks[0].getElementsByTagName("source")
    assert source.getAttribute("file") == '/srv/it\'s <a> "b" & c.qcow2'
