# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Publishing on a real file system: never replaces, all or none, and dressed as asked."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import stat
import struct

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base import files
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import (
    AttributeOptions,
    apply_attributes,
    attributes_for,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import observe
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.observe import observe_target
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.publish import (
    StagedFile,
    check_owner,
    leftovers,
    publish_together,
    publish_unlocked,
    sweep,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu


def staged(path, content=b"ours"):
    staged_file = StagedFile(str(path), os.path.dirname(str(path)))
    os.write(staged_file.file.fd, content)
    return staged_file


def publish(*staged_files):
    """Publish the files of a VM whose definition is nobody's business here."""
    publish_together(staged_files, lambda: None)


def no_hard_links(*_args, **_kwargs):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(name="links", params=["hard links", "no hard links"])
def fixture_links(request, monkeypatch):
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", no_hard_links)


@pytest.mark.usefixtures("links")
def test_files_are_private_until_they_are_published(tmp_path):
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        names = os.listdir(tmp_path)
        assert sorted(names) == sorted([first.name, second.name])
        assert all(stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600 for name in names)
        publish(first, second)
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert os.stat(tmp_path / "a").st_nlink == 1


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("obstacle", ["file", "folder", "dangling symlink"])
def test_nothing_is_ever_replaced_and_the_first_is_taken_back(tmp_path, obstacle):
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        if obstacle == "file":
            (tmp_path / "b").write_text("theirs")
        elif obstacle == "folder":
            (tmp_path / "b").mkdir()
        else:
            (tmp_path / "b").symlink_to("nowhere")
        with pytest.raises(Refusal, match="has appeared"):
            publish(first, second)
    assert os.listdir(tmp_path) == ["b"]
    if obstacle == "file":
        assert (tmp_path / "b").read_text() == "theirs"


def test_a_file_slipped_in_under_the_temporary_name_is_not_published(tmp_path):
    with staged(tmp_path / "a") as file:
        os.unlink(tmp_path / file.name)
        (tmp_path / file.name).write_text("theirs")
        with pytest.raises(OSError, match="No such file"):
            publish(file)
    assert not (tmp_path / "a").exists()


def test_a_failing_fsync_of_the_folder_takes_everything_back(tmp_path, monkeypatch):
    with staged(tmp_path / "a") as file:
        calls = []

        def fsync(fd):
            calls.append(fd)
            if len(calls) == 1:
                raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="Input/output"):
            publish(file)
    assert os.listdir(tmp_path) == []


def failing(number):
    def fail(*_args, **_keywords):
        raise OSError(number, os.strerror(number))

    return fail


def test_an_overlay_that_cannot_be_removed_again_is_told(tmp_path, monkeypatch):
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", failing(errno.EROFS))
            with pytest.raises(Refusal) as raised:
                publish(first, second)
        for path in (tmp_path / "a", tmp_path / "b"):
            assert f"{path}: could not be removed again: Read-only file system." in str(raised.value)
        assert raised.value.code == "not_removed"
        assert "run this again" in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_overlay_that_another_run_has_given_to_its_vm_stays(tmp_path):
    """As a run can that comes between the publishing and the switch, where nothing keeps QEMU from the file."""
    paths = [str(tmp_path / name) for name in ("a", "b")]
    content = pathlib.Path(qemu.create(tmp_path / "made", "1M")).read_bytes()
    with contextlib.ExitStack() as stack:
        files_made = [stack.enter_context(staged(path, content)) for path in paths]

        def switch():
            stack.enter_context(qemu.opened_for_writing(paths[0]))
            raise Refusal("changed_meanwhile", "web", "has got other disks meanwhile")

        with pytest.raises(UnknownOutcomeError, match="a: has been given to its VM meanwhile, most likely by another"):
            publish_unlocked(files_made, switch)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "made"]


def test_an_overlay_that_nobody_has_goes_when_the_switch_fails(tmp_path):
    def switch():
        assert os.listdir(tmp_path) == ["a"]
        raise Refusal("changed_meanwhile", "web", "has got other disks meanwhile")

    with staged(tmp_path / "a") as one, pytest.raises(Refusal, match="has got other disks meanwhile"):
        publish_unlocked([one], switch)
    assert os.listdir(tmp_path) == []


def test_what_was_not_published_yet_is_not_said_to_be_stuck(tmp_path, monkeypatch):
    with staged(tmp_path / "a") as first, staged(tmp_path / "b") as second:
        monkeypatch.setattr(StagedFile, "publish", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            publish(first, second)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_listed_has_no_leftovers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", failing(errno.EIO))
    assert sweep(str(tmp_path)) == []


def test_a_file_that_only_tells_whose_it_is_is_told_of_if_it_cannot_be_removed(tmp_path, monkeypatch):
    unlink, failures = os.unlink, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def failing_once(path, **options):
        if failures:
            raise failures.pop()
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", failing_once)
    with pytest.raises(OSError, match="Input/output error"):
        check_owner(str(tmp_path / "vault"))
    assert os.listdir(tmp_path) == []
    check_owner(str(tmp_path / "vault"))
    assert os.listdir(tmp_path) == []


def test_a_close_that_fails_fails_nothing(tmp_path, monkeypatch):
    real = os.close

    def close(fd):
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    with staged(tmp_path / "a") as file:
        publish(file)
        monkeypatch.setattr(os, "close", close)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]


def test_no_vm_can_start_on_an_overlay_before_all_are_published(tmp_path, monkeypatch):
    path = qemu.create(tmp_path / "image", "1M")
    with staged(tmp_path / "a", open(path, "rb").read()) as file:
        held = []

        def not_publishing(self):
            with open_image(os.path.join(self.folder, self.name)) as image:
                held.append((locks.is_locked(image, locks.WRITE), locks.is_locked(image, locks.WRITE_UNSHARED)))

        monkeypatch.setattr(StagedFile, "publish", not_publishing)
        with pytest.raises(Refusal, match="moved or mounted over"):  # for it is not published in this test
            publish(file)
    assert held == [(True, True)]


def test_only_what_killed_runs_have_left_is_removed(tmp_path):
    (tmp_path / "other.tmp").touch()
    (tmp_path / ".kvmfleet-folder.tmp").mkdir()
    (tmp_path / ".kvmfleet-link.tmp").symlink_to("other.tmp")
    abandoned = tmp_path / ".qcow2_overlay-0123456789abcdef.tmp"
    abandoned.touch()
    with staged(tmp_path / "a") as alive:
        assert leftovers(str(tmp_path)) == [str(abandoned)]
        assert abandoned.exists()
        assert sweep(str(tmp_path)) == [str(abandoned)]
        assert sweep(str(tmp_path)) == []
        assert alive.name in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    assert sweep(str(tmp_path / "absent")) == []


def given(tmp_path, active_mode, options):
    """Return mode, owner and context of an overlay of an ACTIVE with this mode."""
    active = tmp_path / "active"
    active.touch()
    active.chmod(active_mode)
    with open_image(str(active)) as image, staged(tmp_path / "a") as one:
        apply_attributes(one.file, attributes_for(image, options, one.path))
        status = one.file.status()
    return stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


@pytest.mark.parametrize(
    "active_mode, asked, expected",
    [
        (0o640, None, 0o640),
        (0o444, None, 0o644),
        (0o4755, None, 0o755),
        (0o640, lambda _current: 0o600, 0o600),
        (0o444, lambda current: current | 0o020, 0o664),
    ],
)
def test_modes(tmp_path, active_mode, asked, expected):
    assert given(tmp_path, active_mode, AttributeOptions(mode=asked)) == (expected, os.getuid(), os.getgid())


def acl(uid):
    """Return the ACL that gives a user as much as the owner, and the group and others nothing."""
    entries = ((1, 6, -1), (2, 6, uid), (4, 0, -1), (0x10, 6, -1), (0x20, 0, -1))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def active_beside(folder, **acls):
    """Return an image in a folder, with the ACLs of the folder and of the image."""
    active = folder / "active"
    active.touch()
    active.chmod(0o660)
    try:
        for name, value in acls.items():
            os.setxattr(folder if name == "default" else active, f"system.posix_acl_{name}", value)
    except OSError:
        pytest.skip("the file system has no ACLs")
    return active


@pytest.mark.parametrize("has_own", [False, True])
def test_the_default_acl_of_the_folder_gives_nobody_access_whom_active_does_not(tmp_path, has_own):
    own = {"access": acl(1234)} if has_own else {}
    active = active_beside(tmp_path, default=acl(65534), **own)
    with open_image(str(active)) as image, staged(tmp_path / "a") as one:
        apply_attributes(one.file, attributes_for(image, AttributeOptions(), one.path))
        names = os.listxattr(one.file.fd)
        assert ("system.posix_acl_access" in names) == has_own
        for name in names if has_own else ():
            assert os.getxattr(one.file.fd, name) == os.getxattr(active, name)


@pytest.mark.parametrize("asked, expected", [(None, 0o600), (lambda current: current | 0o004, 0o604)])
def test_the_group_gets_no_more_where_an_acl_is_not_taken_over(tmp_path, monkeypatch, asked, expected):
    def refuse(*_args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    active = active_beside(tmp_path, access=acl(1234))
    monkeypatch.setattr(os, "setxattr", refuse)
    with open_image(str(active)) as image, staged(tmp_path / "a") as one:
        apply_attributes(one.file, attributes_for(image, AttributeOptions(mode=asked), one.path))
        assert stat.S_IMODE(one.file.status().st_mode) == expected


def test_an_owner_that_cannot_be_given_is_named_with_a_way_out(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(Refusal, match="cannot be given owner 4242.*Run with become"):
        given(tmp_path, 0o640, AttributeOptions(uid=4242))


def test_a_folder_that_is_moved_away_meanwhile_is_noticed(tmp_path):
    (tmp_path / "folder").mkdir()
    with staged(tmp_path / "folder" / "a") as file:
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "folder").mkdir()
        with pytest.raises(Refusal, match="moved or mounted over"):
            publish(file)
    assert os.listdir(tmp_path / "folder") == os.listdir(tmp_path / "moved") == []


def test_a_temporary_file_that_is_taken_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    real, removed = locks.claim, []

    def slow_claim(file):
        if not removed:
            removed.extend(os.listdir(tmp_path))
            os.unlink(tmp_path / removed[0])
        return real(file)

    monkeypatch.setattr(locks, "claim", slow_claim)
    with staged(tmp_path / "a") as file:
        assert file.name != removed[0]
        publish(file)
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_where_every_new_file_is_locked_by_others_is_told_and_left_clean(tmp_path, monkeypatch):
    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(locks, "claim", lambda *_args: False)
    with pytest.raises(Refusal, match=f"{tmp_path}: 100 new files .* run this again"):
        staged(tmp_path / "a")
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_that_cannot_be_marked_is_not_left_behind(tmp_path, monkeypatch):
    def refuse(file):
        raise Refusal("no_locks", file.path, "no locks here")

    monkeypatch.setattr(locks, "claim", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Refusal, match="no locks"):
        StagedFile(str(tmp_path / "a"), str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.fixture(name="link")
def fixture_link(tmp_path):
    """Have a symlink, relative and on the way, to a folder."""
    (tmp_path / "real" / "folder").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to("../links/../real")
    return tmp_path / "links" / "link"


def owned_by(monkeypatch, link_owner, me):
    """Have every symlink belong to this user, and be that one."""
    real = files._read_link
    monkeypatch.setattr(files, "_read_link", lambda *args: (real(*args)[0], link_owner))
    monkeypatch.setattr(files.os, "geteuid", lambda: me)


@pytest.mark.parametrize(
    "link_owner, me, is_followed",
    [
        (0, 4242, True),
        (4242, 4242, True),
        (os.geteuid(), 4242, True),  # the folder is that user's too
        (4243, 4242, False),
        (4243, 0, False),
    ],
)
def test_a_symlink_leads_only_to_what_its_owner_has(tmp_path, link, monkeypatch, link_owner, me, is_followed):
    owned_by(monkeypatch, link_owner, me)
    (tmp_path / "real" / "folder" / ".qcow2_overlay-0123456789abcdef.tmp").touch()
    target = observe_target(f"{link}//./folder/a")
    descriptors = len(os.listdir("/proc/self/fd"))
    found = leftovers(f"{link}/folder")
    if is_followed:
        assert (target.path, target.problem) == (str(tmp_path / "real" / "folder" / "a"), None)
        assert len(found) == 1
    else:
        assert "leads through a symlink of the user 4243 into a folder of" in str(target.problem)
        assert "Give the real path" in str(target.problem)
        assert found == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_folder_swapped_with_a_symlink_is_not_followed(tmp_path, link):
    target = observe_target(str(tmp_path / "real" / "folder" / "a"))
    (tmp_path / "bait").mkdir()
    (tmp_path / "real" / "folder").rename(tmp_path / "real" / "aside")
    (tmp_path / "real" / "folder").symlink_to(tmp_path / "bait")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Refusal, match="was replaced by a symlink"):
        StagedFile(target.path, target.folder)
    assert os.listdir(tmp_path / "bait") == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    "what, message", [("loop", "Too many levels"), ("file", "is not a folder"), ("no", "not exist")]
)
def test_a_way_that_ends_nowhere(tmp_path, what, message):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert message in str(observe_target(str(tmp_path / what / "a")).problem)


@pytest.mark.parametrize("what", ["fifo", "symlink", "folder"])
def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path, what):
    place = tmp_path / ".qcow2_overlay-0123456789abcdef.tmp"
    (tmp_path / "file").touch()
    {"fifo": lambda: os.mkfifo(place), "symlink": lambda: place.symlink_to("file"), "folder": place.mkdir}[what]()
    assert sweep(str(tmp_path)) == []
    assert len(os.listdir(tmp_path)) == 2


def test_who_may_not_give_files_away_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(Refusal, match="cannot be given owner 0 and group 0.*Run with become"):
        given(tmp_path, 0o640, AttributeOptions(uid=0, gid=0))


def test_a_context_needs_one_to_begin_with(tmp_path):
    with pytest.raises(Refusal, match="no SELinux context"):
        given(tmp_path, 0o640, AttributeOptions(context=(None, None, "virt_image_t", None)))


def test_a_folder_that_is_missing_for_a_moment_is_not_said_to_be_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(observe, "open_folder", failing(errno.ENOENT))
    problem = observe_target(str(tmp_path / "a")).problem
    assert f"its folder {tmp_path} does not exist. Create it first." in str(problem)
