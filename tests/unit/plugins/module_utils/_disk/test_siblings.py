# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who else stands on an image, in folders that hold all kinds of files."""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
import types

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import identity_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import siblings
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.siblings import (
    Above,
    folders_beside,
    overlays_in,
    standing_on,
    ways_up,
)

from .. import qemu


def identity(path):
    return identity_of(os.stat(path))


@pytest.fixture(name="base")
def fixture_base(tmp_path):
    return qemu.create(tmp_path / "base.qcow2", "8M")


def over(path, backing, *options):
    return qemu.create(path, "8M", "-b", str(backing), "-F", "qcow2", "-u", *options)


def test_only_images_that_stand_on_others_are_found(tmp_path, base):
    over(tmp_path / "a", base)
    over(tmp_path / "b", "base.qcow2", "-o", "cluster_size=512")
    over(tmp_path / "c", f"{tmp_path}/gone", "-o", "compat=0.10")
    over(tmp_path / "d", "nbd:localhost:1")
    (tmp_path / "e").symlink_to("a")
    (tmp_path / "f").symlink_to("nowhere")
    (tmp_path / "g").write_bytes(b"QFI\xfb")
    (tmp_path / "h").write_bytes(b"")
    (tmp_path / "i").mkdir()
    os.mkfifo(tmp_path / "j")
    found = {os.path.basename(one.path): one for one in overlays_in(str(tmp_path))}
    assert set(found) == {"a", "b", "c", "e"}
    assert found["a"] == Above(str(tmp_path / "a"), identity(tmp_path / "a"), base, identity(base))
    assert found["b"].backing_identity == identity(base)
    assert found["c"][2:] == (f"{tmp_path}/gone", None)
    assert found["e"].identity == found["a"].identity
    assert overlays_in(str(tmp_path / "no-such-folder")) == []


@pytest.mark.parametrize(
    "name",
    [
        'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}',
        'json:{{"file.driver":"file","file.filename":"{}","driver":"qcow2"}}',
        'json:{{"driver":"qcow2","file":{{"driver":"throttle","throttle-group":"g","file":{{"filename":"{}"}}}}}}',
        'json:{{"driver":"qcow2","file.filename":"file:{}"}}',
        "file:{}",
    ],
)
def test_an_image_that_records_its_backing_file_in_another_way_stands_on_it_too(tmp_path, base, name):
    over(tmp_path / "a", name.format(base))
    assert standing_on(identity(base), [str(tmp_path)], ()) == [str(tmp_path / "a")]


@pytest.mark.parametrize("name", ['json:{"driver":"nbd","server.path":"/base.qcow2"}', "json:{", "json:" + "[" * 900])
def test_a_name_that_leads_to_no_file_hides_nothing_else(tmp_path, base, name):
    over(tmp_path / "a", base)
    with open(over(tmp_path / "b", base), "r+b") as file:  # qemu-img would write no such name
        start, _length = struct.unpack(">QI", file.read(20)[8:])
        file.seek(8)
        file.write(struct.pack(">QI", start, len(name)))
        file.seek(start)
        file.write(name.encode())
    assert standing_on(identity(base), [str(tmp_path)], ()) == [str(tmp_path / "a")]


def test_what_the_storage_does_not_give_is_not_left_out(tmp_path, base):
    over(tmp_path / "a", base)
    (tmp_path / "b").symlink_to("/proc/self/mem")  # a file whose first bytes no process can read: EIO
    with pytest.raises(Refusal, match="cannot be read, so nobody can tell on which image it stands") as told:
        overlays_in(str(tmp_path))
    assert (told.value.code, told.value.subject) == ("storage", str(tmp_path / "b"))


@pytest.mark.parametrize("target", ["b", "a/x", "x" * 300, "gone"])
def test_a_symlink_that_leads_nowhere_hides_nothing_else(tmp_path, base, target):
    over(tmp_path / "a", base)
    (tmp_path / "b").symlink_to(target)
    assert [one.path for one in overlays_in(str(tmp_path))] == [str(tmp_path / "a")]


def test_a_lack_of_descriptors_hides_nothing(tmp_path, base, monkeypatch):
    over(tmp_path / "a", base)
    real = os.open
    lack = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(
        os, "open", lambda path, *how, **more: _raise(lack) if path[-2:] == "/a" else real(path, *how, **more)
    )
    with pytest.raises(Refusal, match="Too many open files"):
        overlays_in(str(tmp_path))


def _raise(error):
    raise error


@pytest.mark.parametrize("damage", [(24, b"\xff" * 8), (36, b"\xff" * 4), (40, b"\xff" * 8), (72, b"\xff" * 8)])
def test_what_is_damaged_elsewhere_still_stands_there(tmp_path, base, damage):
    path = over(tmp_path / "a", base)
    qemu.patch(path, *damage)
    assert [one.backing_file for one in overlays_in(str(tmp_path))] == [base]


@pytest.mark.parametrize("damage", [(0, b"xxxx"), (8, b"\xff" * 8), (16, b"\xff" * 4), (16, bytes(4))])
def test_what_has_lost_the_name_is_left_out(tmp_path, base, damage):
    qemu.patch(over(tmp_path / "a", base), *damage)
    assert overlays_in(str(tmp_path)) == []


def test_a_name_far_behind_in_the_header_is_found(tmp_path, base):
    path = over(tmp_path / "a", base)
    qemu.patch(path, 60000, os.fsencode(base))
    qemu.patch(path, 8, (60000).to_bytes(8, "big"))
    assert [one.backing_identity for one in overlays_in(str(tmp_path))] == [identity(base)]


def test_who_stands_on_an_image_by_whatever_name(tmp_path, base):
    (tmp_path / "other").mkdir()
    os.link(base, tmp_path / "other" / "hard")
    (tmp_path / "soft").symlink_to("base.qcow2")
    for place, backing in (("a", base), ("b", "soft"), ("other/c", "hard"), ("other/d", "../base.qcow2")):
        over(tmp_path / place, backing)
    over(tmp_path / "e", "a")
    over(tmp_path / ".kvmfleet-0123456789abcdef.tmp", base)  # a run that was killed has left it
    folders = [str(tmp_path), str(tmp_path / "other"), str(tmp_path)]
    names = [f"{tmp_path}/{name}" for name in ("a", "b", "other/c", "other/d")]
    assert standing_on(identity(base), folders, set()) == names
    assert standing_on(identity(base), folders[:1], {identity(tmp_path / "a")}) == names[1:2]
    assert standing_on(identity(tmp_path / "a"), folders, set()) == [f"{tmp_path}/e"]


@pytest.fixture(name="linked")
def fixture_linked(tmp_path):
    """Have a symlink in one folder to a symlink in another one to a file in a third; and a symlink to the first one."""
    for folder, link in (("vm", "../between/b"), ("between", f"{tmp_path}/store/b"), ("store", None)):
        (tmp_path / folder).mkdir()
        if link is not None:
            (tmp_path / folder / "b").symlink_to(link)
    (tmp_path / "folder").symlink_to("vm")
    return str(tmp_path / "vm" / "b")


def test_the_folder_of_each_name_of_an_image_counts_once(tmp_path, linked, base):
    os.rename(base, tmp_path / "store" / "b")
    folders = [str(tmp_path / name) for name in ("vm", "between", "store")]
    assert folders_beside([linked]) == folders
    assert folders_beside([f"{tmp_path}/folder/b", linked, f"{tmp_path}/store/b"]) == folders
    (tmp_path / "between" / "b").unlink()
    assert folders_beside([linked]) == folders[:2]  # to what is not there a symlink can lead, too
    assert folders_beside([f"{tmp_path}/gone/b", f"{tmp_path}/gone/c"]) == [f"{tmp_path}/gone"]
    (tmp_path / "between" / "b").symlink_to("b")
    assert folders_beside([linked]) == folders[:2]


def test_one_folder_with_two_names_counts_once(tmp_path, monkeypatch):
    """As of a file system that is mounted twice."""
    monkeypatch.setattr(siblings, "_status_of", lambda _path: os.stat(tmp_path))
    assert folders_beside([f"{tmp_path}/a", "/mnt/b"]) == [str(tmp_path)]


def test_the_folder_of_a_block_device_holds_no_images_and_that_of_a_symlink_to_it_may(tmp_path, linked, monkeypatch):
    real, device = siblings._status_of, types.SimpleNamespace(st_mode=stat.S_IFBLK)
    monkeypatch.setattr(siblings, "_status_of", lambda path: device if path[-2:] == "/b" else real(path))
    assert folders_beside([linked]) == [str(tmp_path / "vm"), str(tmp_path / "between")]
    assert folders_beside([f"{tmp_path}/store/b"]) == []


def test_a_symlink_that_cannot_be_read_hides_nothing(linked, monkeypatch):
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "readlink", lambda _path, **_more: _raise(failure))
    with pytest.raises(Refusal, match="cannot be followed") as told:
        folders_beside([linked])
    assert (told.value.code, told.value.subject) == ("storage", linked)


def test_a_folder_of_hundreds_of_images_is_quickly_looked_through(tmp_path, base):
    head = open(over(tmp_path / "a", base), "rb").read()
    for number in range(499):
        (tmp_path / f"{number}.qcow2").write_bytes(head)
    seconds = []
    for _round in range(3):
        begun = time.process_time()
        assert len(standing_on(identity(base), [str(tmp_path)], set())) == 500
        seconds.append(time.process_time() - begun)
    print(seconds)
    assert min(seconds) < 0.1  # 0.02 on an idle machine


def test_every_way_up_is_found(tmp_path, base):
    low = over(tmp_path / "low", base)
    middle = over(tmp_path / "middle", low)
    for name in ("one", "two"):
        over(tmp_path / name, middle)
    over(tmp_path / "other", base)
    found = ways_up(identity(low), overlays_in(str(tmp_path)))
    assert sorted(found) == [[str(tmp_path / "one"), middle], [str(tmp_path / "two"), middle]]
    assert ways_up(identity(tmp_path / "one"), overlays_in(str(tmp_path))) == []


def test_images_that_stand_on_each_other_have_no_end(tmp_path, base):
    for name, below in (("one", base), ("two", "one"), ("three", "two"), ("two", "three")):
        over(tmp_path / name, below)
    found = ways_up(identity(base), overlays_in(str(tmp_path)))
    assert found == [[str(tmp_path / "one")]]
    found = ways_up(identity(tmp_path / "two"), overlays_in(str(tmp_path)))
    assert found == [[str(tmp_path / "three")]]
