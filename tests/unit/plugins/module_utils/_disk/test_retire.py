# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Retire an image: never replace anything, never take another file, leave it or finish it when killed."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import publish, retire
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import find_sign, leave_sign, remove_signs
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.retire import (
    all_kept,
    kept_path,
    why_not_kept,
    why_not_retired,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import DELETE, KEEP


@pytest.fixture(name="path")
def fixture_path(tmp_path):
    (tmp_path / "a.qcow2").write_text("mine")
    return str(tmp_path / "a.qcow2")


@pytest.fixture(name="by_link", params=[False, True], ids=["by rename", "by link"])
def fixture_by_link(request, monkeypatch):
    """Have a file system that renames without replacing, or one that only has hard links, as NFS."""
    if request.param:
        monkeypatch.setattr(retire, "rename_without_replacing", lambda *_args: False)
    return request.param


def do(path, how):
    """Retire, and check what was told beforehand."""
    with open_image(path) as file:
        assert why_not_retired(path, file, how, "reverted") is None
        predicted = kept_path(path, "reverted") if how == KEEP else None
        assert retire.retire(path, file, how, "reverted") == predicted
    return predicted


def test_delete(tmp_path, path):
    assert do(path, DELETE) is None
    assert os.listdir(tmp_path) == []


def test_the_sign_of_a_merge_goes_before_its_image(tmp_path, path, monkeypatch):
    gone, unlink = [], os.unlink
    monkeypatch.setattr(os, "unlink", lambda name, **folder: (gone.append(name), unlink(name, **folder)))
    with open_image(path) as file:
        leave_sign(file)
        sign = os.path.basename(find_sign(file))
        gone.clear()
        retire.retire(path, file, DELETE, "committed")
    assert gone == [sign, "a.qcow2"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", [DELETE, KEEP])
def test_a_sign_that_another_run_leaves_in_the_moment_before_its_image_goes(tmp_path, path, how, monkeypatch):
    def remove_then_leave(file, place):
        monkeypatch.setattr(retire, "remove_signs", remove_signs)
        remove_signs(file, place)
        leave_sign(file)

    monkeypatch.setattr(retire, "remove_signs", remove_then_leave)
    with open_image(path) as file:
        retire.retire(path, file, how, "committed")
    assert [name for name in os.listdir(tmp_path) if "kvmfleet" in name] == []


@pytest.mark.parametrize("how", [DELETE, KEEP])
def test_an_image_that_another_run_has_retired(tmp_path, path, how):
    with open_image(path) as file:
        retire.retire(path, file, DELETE, "committed")
        with pytest.raises(Refusal, match="was moved or replaced meanwhile"):
            retire.retire(path, file, how, "committed")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("by_link")
def test_keep_beside_what_was_kept_before(tmp_path, path):
    (tmp_path / "a.qcow2.reverted").write_text("old")
    (tmp_path / "a.qcow2.reverted.1").symlink_to("nowhere")
    assert do(path, KEEP) == f"{path}.reverted.2"
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2.reverted", "a.qcow2.reverted.1", "a.qcow2.reverted.2"]
    assert (tmp_path / "a.qcow2.reverted").read_text() == "old"
    assert (tmp_path / "a.qcow2.reverted.2").read_text() == "mine"
    assert (tmp_path / "a.qcow2.reverted.2").stat().st_nlink == 1


@pytest.mark.usefixtures("by_link")
@pytest.mark.parametrize("there, name", [((".1",), ".2"), ((".9", ".10"), ".11"), ((".x", ".1x", "0"), "")])
def test_a_number_is_above_all_that_are_there(tmp_path, path, there, name):
    """Or the newest could not be told once somebody has removed an older one."""
    for one in there:
        (tmp_path / f"a.qcow2.reverted{one}").write_text("old")
    assert do(path, KEEP) == f"{path}.reverted{name}"


def test_the_newest_that_is_kept_is_the_last(tmp_path, path):
    assert all_kept(path, "reverted") == all_kept(f"{tmp_path}/gone/b", "reverted") == []
    kept = []
    for number in (".1", "", ".10", ".9"):  # earlier releases filled gaps
        (tmp_path / "new").write_text("")
        kept.append(f"{path}.reverted{number}")
        before = time.time_ns()
        while (tmp_path / "new").stat().st_ctime_ns <= before:  # the clock of a file system has long ticks
            (tmp_path / "new").touch()
        os.rename(tmp_path / "new", kept[-1])
    (tmp_path / "a.qcow2.committed").write_text("")
    assert all_kept(path, "reverted") == kept


def test_a_folder_that_cannot_be_listed_hides_nothing(path, monkeypatch):
    def listdir(_folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(Refusal, match="cannot be searched for images that are kept"):
        all_kept(path, "reverted")


@pytest.mark.usefixtures("by_link")
def test_a_name_that_is_taken_in_that_moment_is_left_alone(tmp_path, path):
    with open_image(path) as file:
        assert kept_path(path, "reverted") == f"{path}.reverted"
        (tmp_path / "a.qcow2.reverted").write_text("theirs")
        assert retire.retire(path, file, KEEP, "reverted") == f"{path}.reverted.1"
    assert (tmp_path / "a.qcow2.reverted").read_text() == "theirs"


@pytest.mark.parametrize("how", [DELETE, KEEP])
def test_another_file_that_stands_there_meanwhile_is_left_alone(tmp_path, path, how):
    with open_image(path) as file:
        os.rename(path, tmp_path / "moved")
        (tmp_path / "a.qcow2").write_text("theirs")
        with pytest.raises(Refusal, match="was moved or replaced meanwhile"):
            retire.retire(path, file, how, "reverted")
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {
        "a.qcow2": "theirs",
        "moved": "mine",
    }


def test_a_kill_between_link_and_unlink_is_completed(tmp_path, path, monkeypatch):
    monkeypatch.setattr(retire, "rename_without_replacing", lambda *_args: False)
    real = os.unlink

    def killed(*_args, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", killed)
    with open_image(path) as file, pytest.raises(KeyboardInterrupt):
        retire.retire(path, file, KEEP, "reverted")
    monkeypatch.setattr(os, "unlink", real)
    assert len(os.listdir(tmp_path)) == 2
    assert kept_path(path, "reverted") == f"{path}.reverted"
    with open_image(path) as file:
        assert retire.retire(path, file, KEEP, "reverted") == f"{path}.reverted"
    assert os.listdir(tmp_path) == ["a.qcow2.reverted"]


def test_neither_renaming_nor_links(tmp_path, path, monkeypatch):
    def link(*_args, **_more):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(retire, "rename_without_replacing", lambda *_args: False)
    monkeypatch.setattr(os, "link", link)
    with open_image(path) as file, pytest.raises(Refusal) as raised:
        retire.retire(path, file, KEEP, "reverted")
    assert raised.value.code == "no_rename"
    assert os.listdir(tmp_path) == ["a.qcow2"]


@pytest.mark.parametrize("how", [DELETE, KEEP])
def test_the_file_goes_and_then_the_symlink_to_it(tmp_path, path, how):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link"
    link.symlink_to("../a.qcow2")
    kept = do(str(link), how)
    assert os.listdir(tmp_path / "links") == []
    assert sorted(os.listdir(tmp_path)) == (["links"] if how == DELETE else ["a.qcow2.reverted", "links"])
    assert kept == (None if how == DELETE else f"{path}.reverted")


def test_a_symlink_that_may_be_a_trap(tmp_path, path, monkeypatch):
    link = tmp_path / "link"
    link.symlink_to("a.qcow2")
    os.chown(link, 4243, 4243, follow_symlinks=False)
    with open_image(str(link)) as file:
        said = why_not_retired(str(link), file, DELETE, "reverted")
        assert (said.code, "symlink of the user 4243" in said.why) == ("untrusted_link", True)
        os.chown(path, 4243, 4243)
        assert why_not_retired(str(link), file, DELETE, "reverted") is None


def test_a_name_that_would_be_too_long(tmp_path):
    path = str(tmp_path / ("x" * 247))
    open(path, "w").close()
    with open_image(path) as file:
        said = why_not_retired(path, file, KEEP, "reverted")
        assert said == why_not_kept(path, "reverted")
        assert (said.code, said.remedy) == ("name_too_long", "Rename the file, or use retire=delete.")
        assert why_not_retired(path, file, DELETE, "reverted") is None
    short = str(tmp_path / ("y" * 246))
    open(short, "w").close()
    assert why_not_kept(short, "reverted") is None
    open(f"{short}.reverted", "w").close()
    assert why_not_kept(short, "reverted").code == "name_too_long"  # for the number


@pytest.mark.parametrize("how", [DELETE, KEEP])
def test_a_block_device_stays(how):
    class Device:
        is_device = True

    said = why_not_retired("/dev/vg/web", Device(), how, "reverted")
    assert (said.code, "nothing is ever deleted" in said.why) == ("block_device", True)


def test_a_folder_that_cannot_be_written_to(tmp_path, path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, _how: folder != str(tmp_path))
    with open_image(path) as file:
        said = why_not_retired(path, file, DELETE, "reverted")
    assert (said.code, str(tmp_path) in said.why) == ("no_permission", True)


def test_a_c_library_without_renameat2(tmp_path, path, monkeypatch):
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_args, **_more: object())
    assert do(path, KEEP) == f"{path}.reverted"
    assert stat.S_ISREG(os.stat(f"{path}.reverted").st_mode)
