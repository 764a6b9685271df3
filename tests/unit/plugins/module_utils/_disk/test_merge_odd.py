# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Merge down where a call, a chain or what was left is odd: no data and no bits are lost."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import typing as t
import unittest.mock

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import ending_cleanly
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import merge, siblings, survey
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import leave_sign
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.observe import observe_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.unfinished import unfinished_work
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import (
    MARK,
    find_vault,
    open_vault,
    place_of,
    read_vault,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import qemu
from . import commits
from .overlays import SETTINGS


def test_two_merges_of_a_call_have_no_image_in_common(tmp_path):
    """One would go into an image that the other retires."""
    base = qemu.create(tmp_path / "base")
    s1 = commits.overlay(tmp_path / "s1", base)
    s2 = commits.overlay(tmp_path / "s2", s1)
    s3 = commits.overlay(tmp_path / "s3", s2)
    commits.write(s3, "write -P 1 0 1M")
    before = commits.content(s3)
    for pair in (
        (CommitRequest(s2, base, above=s3), CommitRequest(s3, s1)),
        (CommitRequest(s1, base, above=s2), CommitRequest(s3, s2)),
        (CommitRequest(s3, s2), CommitRequest(s2, base, above=s3)),
    ):
        outcome = run(MergeLayers(), pair, SETTINGS)
        assert [one.problems[0].code for one in outcome.verdicts] == ["repeated", "repeated"]
    other = tmp_path / "other name"
    os.link(base, other)
    clone = commits.overlay(tmp_path / "clone", other)
    outcome = run(MergeLayers(), [CommitRequest(s3, base), CommitRequest(clone, str(other))], SETTINGS)
    assert [one.problems[0].code for one in outcome.verdicts] == ["repeated", "repeated"]
    assert commits.content(s3) == before


def test_an_overlay_that_may_have_gone_in_while_its_vm_ran_is_merged_only_where_the_vm_has_it(tmp_path):
    """Or old data would come over what the VM has written to BASE since."""
    base = qemu.create(tmp_path / "base")
    top = commits.overlay(tmp_path / "top", base)
    commits.write(top, "write -P 1 0 1M")
    commits.write(base, "write -P 2 0 1M")
    with open_image(top) as file:
        leave_sign(file)
    newer = commits.content(base)
    refusal = commits.refusal(top, base)
    assert (refusal.code, refusal.subject) == ("unfinished", top)
    assert commits.content(base) == newer
    older = commits.content(top)
    assert commits.merged(top, base, is_of_vm=True)["state"] == "committed"
    assert commits.content(base) == older
    assert os.listdir(tmp_path) == ["base"]


def test_a_base_that_hides_the_end_of_an_image_below_does_not_grow(tmp_path):
    """The guest would read that end in place of zeroes."""
    bottom = qemu.create(tmp_path / "bottom", "8M")
    commits.write(bottom, "write -P 9 6M 1M")
    base = commits.overlay(tmp_path / "base", bottom, size="4M")
    top = commits.overlay(tmp_path / "top", base, size="8M")
    before = commits.content(top)
    refused = commits.refusal(top, base)
    assert (refused.code, refused.subject) == ("unsupported", base)
    assert bottom in refused.why
    assert commits.content(top) == before
    same = commits.overlay(tmp_path / "same", base)  # nothing has to grow
    commits.write(same, "write -P 1 0 1M")
    os.unlink(top)
    before = commits.content(same)
    commits.merged(same, base)
    assert commits.content(base) == before


def test_a_merge_goes_on_when_base_has_grown_beyond_a_layer_between(tmp_path, monkeypatch):
    base = qemu.create(tmp_path / "base", "4M")
    middle = commits.overlay(tmp_path / "middle", base)
    top = commits.overlay(tmp_path / "top", middle, size="8M")
    commits.write(middle, "write -P 1 0 4M")
    commits.write(top, "write -P 2 7M 1M")
    before = commits.content(top)
    for phase in ("give", "publish"):
        interrupt(monkeypatch, phase, top, base)
        assert qemu.info(base)["virtual-size"] == 8 << 20
        assert commits.content(top) == before
    commits.merged(top, base)
    assert commits.content(base) == before
    assert sorted(os.listdir(tmp_path)) == ["base"]


def interrupt(monkeypatch: pytest.MonkeyPatch, phase: str, top: str, base: str, **options: t.Any) -> None:
    """Have a merge end before a phase, and leave everything as it is then."""

    def end(*_args: t.Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, phase, end)
        with pytest.raises(KeyboardInterrupt):
            commits.merge(top, base, **options)


def snapshot(path: t.Any, below: str) -> str:
    """Make an overlay as libvirt does for a snapshot: it has all bitmaps of the image below, empty."""
    commits.overlay(path, below)
    qemu.add_bitmaps(path, [Bitmap(name, size, True, False) for name, size, _r, _i in qemu.bitmaps_of(below)])
    return str(path)


def dirty(folder: t.Any, path: str) -> commits.Extents:
    return commits.bits_of(folder, [path])[0]["a"].extents


MiB = 1 << 20


def half_committed(folder: t.Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """Return BASE and TOP of a merge that was interrupted, and a snapshot that was taken since."""
    base = qemu.create(folder / "base")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    commits.write(base, "write -P 1 0 1M")
    top = snapshot(folder / "top", base)
    commits.write(top, "write -P 2 1M 1M")
    interrupt(monkeypatch, "give", top, base)
    above = snapshot(folder / "above", top)
    assert any(name.startswith(MARK) for name, *_others in qemu.bitmaps_of(above))
    commits.write(above, "write -P 3 4M 1M")
    return base, top, above


def test_a_snapshot_that_has_copied_the_mark_does_not_carry_what_the_mark_says(tmp_path, monkeypatch):
    base, top, above = half_committed(tmp_path, monkeypatch)
    for below in (base, top):
        refused = commits.refusal(above, below)
        assert (refused.code, refused.subject) == ("unfinished", base)
        assert f"the commit of {top} into it is unfinished" in refused.why
        assert f"above={above}" in refused.remedy
    vault = find_vault(place_of(base, False, top))
    os.rename(vault, f"{vault}.away")
    assert f"{top}, which takes part below it, has the mark" in commits.refusal(above, base).why
    os.rename(f"{vault}.away", vault)
    commits.merged(top, base, above=above)
    # Nothing tells now that the mark is a copy, but for the bits.
    refused = commits.refusal(above, base)
    assert refused.code == "unfinished"
    (mark,) = (name for name, *_others in qemu.bitmaps_of(above) if name.startswith(MARK))
    assert mark in refused.remedy
    qemu.qemu_img("bitmap", "--remove", above, mark)
    commits.merged(above, base)
    assert dirty(tmp_path, base) == [(0, 2 * MiB), (4 * MiB, MiB)]


def leave_vault(monkeypatch: pytest.MonkeyPatch, top: str, base: str, **options: t.Any) -> None:
    """Have a merge be killed when all is done but that its vault goes."""
    with monkeypatch.context() as patch:
        patch.setattr(merge, "remove_vault", unittest.mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            commits.merge(top, base, **options)


def files_of(folder: t.Any) -> dict[str, tuple[int, int]]:
    return {one.name: (one.stat().st_ino, one.stat().st_mtime_ns) for one in os.scandir(folder)}


@pytest.mark.parametrize("phase", ["carry", "strip", "give"])
def test_no_other_commit_comes_between_a_killed_one_and_its_end(tmp_path, monkeypatch, phase):
    """It would take away the vault, which alone has the bits, or BASE's data would be another's."""
    base = qemu.create(tmp_path / "base")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    s1 = snapshot(tmp_path / "s1", base)
    s2 = snapshot(tmp_path / "s2", s1)
    commits.write(s1, "write -P 1 0 1M")
    commits.write(s2, "write -P 2 2M 1M")
    before = commits.content(s2)
    interrupt(monkeypatch, phase, s2, base)
    was = files_of(tmp_path)
    for request in ((s1, base, s2), (s1, base, None), (s2, s1, None)):
        refused = commits.refusal(request[0], request[1], above=request[2])
        assert (refused.code, refused.subject) == ("unfinished", base)
        assert f"the commit of {s2} into it" in refused.why
    assert files_of(tmp_path) == was
    commits.merged(s2, base)
    assert commits.content(base) == before
    assert os.listdir(tmp_path) == ["base"]
    assert dirty(tmp_path, base) == [(0, MiB), (2 * MiB, MiB)]


def test_an_image_that_another_commit_went_into_is_not_put_onto_another_one_before_that_is_complete(
    tmp_path, monkeypatch
):
    """To edit its header looked like a VM that has written to it."""
    base = qemu.create(tmp_path / "base")
    s1 = snapshot(tmp_path / "s1", base)
    s2 = snapshot(tmp_path / "s2", s1)
    s3 = snapshot(tmp_path / "s3", s2)
    interrupt(monkeypatch, "publish", s3, s2)
    refused = commits.refusal(s1, base, above=s2)
    assert (refused.code, refused.subject) == ("unfinished", s2)
    commits.merged(s3, s2)
    commits.merged(s1, base, above=s2)
    assert commits.merged(s2, base)["state"] == "committed"


def test_a_vault_of_a_commit_that_is_done_tells_nothing_of_another_one(tmp_path, monkeypatch):
    base = qemu.create(tmp_path / "base")
    old = commits.overlay(tmp_path / "old", base)
    leave_vault(monkeypatch, old, base)
    assert commits.merged(tmp_path / "never", base, retire="delete")["state"] == "absent"
    top = commits.overlay(tmp_path / "top", base)
    with open_image(top) as file:
        leave_sign(file)
    assert commits.refusal(top, base).code == "unfinished"
    assert commits.merged(top, base, is_of_vm=True)["state"] == "committed"
    assert os.listdir(tmp_path) == ["base"]


def test_a_new_image_with_the_number_of_one_that_went_in_is_not_retired(tmp_path, monkeypatch):
    """Where a file system tells no generation, the time does."""
    monkeypatch.setattr(OpenImage, "generation", None)
    base = qemu.create(tmp_path / "base")
    s1 = commits.overlay(tmp_path / "s1", base)
    s2 = commits.overlay(tmp_path / "s2", s1)
    leave_vault(monkeypatch, s2, base)
    (vault_path,) = (one.path for one in os.scandir(tmp_path) if one.name.endswith("-given"))
    anew = commits.overlay(tmp_path / "s1", base)
    with open_vault(vault_path) as file:
        vault = read_vault(file)
    with open_image(anew) as file:
        went_in = vault._replace(others=[(file.identity, anew)])
        assert not went_in.took_in(file)
        os.utime(anew, ns=(0, vault.given_at - 1))
        assert went_in.took_in(file)
    os.utime(anew)
    monkeypatch.setattr(survey, "read_vault", lambda _file: went_in)
    assert commits.merged(s2, base)["state"] == "committed"
    assert os.path.exists(anew)


@pytest.fixture(name="joined")
def fixture_joined(tmp_path, monkeypatch):
    """Images of which s1, s2 and s3 went into the base together, and only s3 is retired."""
    below = base = qemu.create(tmp_path / "base", "1M")
    for name in ("s1", "s2", "s3"):
        below = commits.overlay(tmp_path / name, below)

    def only_the_topmost(path, *_more):
        if path != below:
            raise Refusal("killed", path, "is killed")
        os.unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "retire", only_the_topmost)
        assert commits.refusal(below, base).code == "killed"
    assert files_of(tmp_path).keys() == {".base.kvmfleet-vault-given", "base", "s1", "s2"}
    return tmp_path


@pytest.mark.parametrize("name", ["s1", "s2", "s3"])
def test_the_path_of_each_of_the_images_that_went_in_together_has_all_retired(joined, name):
    told = commits.merge(joined / name, joined / "base", SETTINGS._replace(check_mode=True)).verdicts
    paths = [os.path.basename(one.path) for one in told[0].retired]
    assert (told[0].state, paths) == ("committed", ["s2", "s1"])
    assert commits.merged(joined / name, joined / "base")["state"] == "committed"
    assert os.listdir(joined) == ["base"]
    assert commits.merged(joined / name, joined / "base")["state"] == "absent"


@pytest.mark.parametrize("name", ["s2", "s3"])
def test_an_image_that_went_in_and_was_written_to_since_stays(joined, name):
    """Or what a VM wrote to it would be lost."""
    commits.write(joined / "s1", "write -P 7 0 64k")
    commits.merged(joined / name, joined / "base")
    assert sorted(os.listdir(joined)) == ["base", "s1"]


def test_an_image_that_went_in_and_was_written_to_since_is_not_said_to_be_in(joined):
    commits.write(joined / "s1", "write -P 7 0 64k")
    assert commits.refusal(joined / "s1", joined / "base").code == "unfinished"


def test_check_mode_does_not_mind_what_an_earlier_round_would_have_retired(tmp_path):
    base = qemu.create(tmp_path / "base", "1M")
    top, left = (commits.overlay(tmp_path / name, base) for name in ("top", "left"))
    settings = SETTINGS._replace(check_mode=True)
    for gone, state in (([], "failed"), ([left], "committed")):
        (verdict,) = run(merge.MergeLayers(gone), [CommitRequest(top, base)], settings).verdicts
        assert verdict.state == state


@pytest.mark.parametrize("form", ["luks", "file"])
def test_what_qemu_cannot_open_below_base_is_told_before_anything_is_written(tmp_path, form):
    """Else BASE's bitmaps were gone, and no call led out."""
    secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"] if form == "luks" else []
    below = str(tmp_path / "below")
    qemu.qemu_img("create", "-q", "-f", "luks" if secret else "raw", *secret, below, "8M")
    base = commits.overlay(tmp_path / "base", below, form="raw", size="32M")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    qemu.qemu_img("rebase", "-u", "-b", below, "-F", form, base)
    top = qemu.create(tmp_path / "top", "32M", "-u", "-b", base, "-F", "qcow2")
    was = files_of(tmp_path)
    if form == "file":
        assert commits.merged(top, base)["state"] == "committed"
        return
    for check_mode in (True, False):
        refused = commits.refusal(top, base, settings=SETTINGS._replace(check_mode=check_mode))
        assert "key-secret" in str(refused)
        assert refused.code == "qemu_failed"
    assert files_of(tmp_path) == was


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a loop device")
def test_a_killed_commit_into_a_block_device_goes_on(tmp_path, monkeypatch):
    """Its vault lies beside TOP, where the vaults of commits into TOP would be."""
    qemu.create(tmp_path / "volume", "8M")
    qemu.add_bitmaps(tmp_path / "volume", [Bitmap("a", 65536, True, False)])
    os.truncate(tmp_path / "volume", 16 * MiB)
    with commits.loop_device(tmp_path / "volume") as base:
        top = snapshot(tmp_path / "top", base)
        commits.write(top, "write -P 1 0 1M")
        before = commits.content(top)
        for phase in ("strip", "give", "publish"):
            interrupt(monkeypatch, phase, top, base)
        with open_image(top) as file:
            layers = observe_chain(file, "qcow2", relative=False).layers
        (begun,) = unfinished_work(layers, ())
        assert begun.path == base
        commits.merged(top, base)
        assert commits.content(base) == before
        assert os.listdir(tmp_path) == ["volume"]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a loop device")
def test_nothing_tells_whether_a_raw_device_was_written_to_since_all_was_given(tmp_path, monkeypatch):
    (tmp_path / "volume").touch()
    os.truncate(tmp_path / "volume", 8 * MiB)
    with commits.loop_device(tmp_path / "volume") as base:
        top = commits.overlay(tmp_path / "top", base, form="raw")
        interrupt(monkeypatch, "publish", top, base, backing_format="raw")
        commits.write(top, "write -P 1 0 1M")
        refused = commits.refusal(top, base, backing_format="raw")
        assert (refused.code, refused.subject) == ("unfinished", top)


def test_a_snapshot_with_a_copied_mark_while_the_vault_that_says_given_is_still_there(tmp_path, monkeypatch):
    base, top, above = half_committed(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "remove_vault", unittest.mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            commits.merge(top, base, above=above)
    assert commits.refusal(above, base).code == "unfinished"
    assert dirty(tmp_path, base) == [(0, 2 * MiB)]
    # What its VM leaves that was killed is not made again from a vault that is older than what BASE has.
    offset, length = qemu.directory_of(above)
    with open(above, "rb") as file:
        file.seek(offset)
        directory = file.read(length)
    at = 0
    while at < length:
        qemu.patch(above, offset + at + 15, bytes([directory[at + 15] | 1]))  # in use
        _offset, _entries, _flags, _type, _bits, name, extra = struct.unpack_from(">QIIBBHI", directory, at)
        at += -(-(24 + name + extra) // 8) * 8
    assert commits.refusal(above, base).code == "unfinished"
    assert dirty(tmp_path, base) == [(0, 2 * MiB)]


@pytest.mark.parametrize("phase", ["move", "publish"])
def test_the_vault_of_another_overlay_that_is_still_there_stays(tmp_path, monkeypatch, phase):
    base = qemu.create(tmp_path / "base")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    top = snapshot(tmp_path / "top", base)
    interrupt(monkeypatch, phase, top, base)
    before = sorted(os.listdir(tmp_path))
    refused = commits.refusal(tmp_path / "typo", base)
    assert refused.code == "unfinished"
    assert top in refused.why
    assert "full backup" not in refused.remedy  # nothing is lost
    assert sorted(os.listdir(tmp_path)) == before
    commits.merged(top, base)
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_an_overlay_on_storage_that_is_not_mounted_is_not_gone(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    base = qemu.create(tmp_path / "base")
    top = snapshot(tmp_path / "store" / "top", base)
    for _number in range(2):
        (tmp_path / "store").rename(tmp_path / "away")
        assert commits.refusal(top, base).code == "no_folder"
        (tmp_path / "away").rename(tmp_path / "store")
        interrupt(monkeypatch, "publish", top, base)


def test_an_overlay_that_was_enlarged_after_all_was_given_goes_in_again(tmp_path, monkeypatch):
    """Nothing was written to it, so its mark is empty; but its guest has a larger disk."""
    base = qemu.create(tmp_path / "base", "4M")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    top = snapshot(tmp_path / "top", base)
    interrupt(monkeypatch, "publish", top, base)
    qemu.qemu_img("resize", "-q", "-f", "qcow2", top, "8M")
    before = commits.content(top)
    commits.merged(top, base)
    assert commits.content(base) == before


def test_an_image_that_was_kept_never_goes_in_again(tmp_path):
    """Once its bitmaps are removed, BASE looks as it does in the middle of a commit."""
    base = qemu.create(tmp_path / "base")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    top = snapshot(tmp_path / "top", base)
    commits.write(top, "write -P 1 0 1M")
    kept = commits.merged(top, base, retire="keep")["kept_as"]
    qemu.qemu_img("bitmap", "--remove", base, "a")
    commits.write(base, "write -P 2 0 1M")
    before = commits.content(base)
    refused = commits.refusal(kept, base)
    assert refused.code == "unfinished"
    assert commits.content(base) == before


def test_an_image_between_that_was_kept_goes_in_no_more_and_is_in_the_way_of_nothing(tmp_path):
    base = below = qemu.create(tmp_path / "base")
    for name in ("a", "b", "c"):
        below = commits.overlay(tmp_path / name, below)
        with OpenImage(below, os.open(below, os.O_RDWR)) as file:
            write_mark(file, Mark("uuid", "vda", name))
        commits.write(below, "write -P 1 0 1M")
    commits.merged(tmp_path / "b", base, above=str(tmp_path / "c"), retire="keep")
    assert sorted(os.listdir(tmp_path)) == ["a.committed", "b.committed", "base", "c"]
    commits.merged(tmp_path / "c", base, retire="keep")
    commits.write(base, "write -P 2 0 1M")
    before = commits.content(base)
    assert commits.refusal(tmp_path / "a.committed", base).code == "unfinished"
    assert commits.refusal(tmp_path / "b.committed", base).code == "no_such_file"  # records the old name of a
    assert commits.content(base) == before


@pytest.mark.parametrize("is_emptied", [False, True])
def test_a_vault_that_somebody_has_written_to_is_none(tmp_path, monkeypatch, is_emptied):
    base = qemu.create(tmp_path / "base")
    qemu.add_bitmaps(base, [Bitmap("a", 65536, True, False)])
    top = snapshot(tmp_path / "top", base)
    interrupt(monkeypatch, "carry", top, base)
    (vault,) = tmp_path.glob(".*")
    if is_emptied:
        vault.write_bytes(b"")
    else:
        qemu.qemu_img("bitmap", "--add", vault, "more")
        offset, _length = qemu.directory_of(vault)
        qemu.patch(vault, offset + 15, b"\1")  # in use
    refused = commits.refusal(top, base)
    assert (refused.code, refused.subject) == ("unfinished", str(vault))
    assert "move it away" in refused.remedy
    vault.unlink()
    commits.merged(top, base)


@pytest.mark.parametrize("has_base", [False, True])
def test_an_image_above_that_the_vm_has_by_a_symlink_finds_base_by_a_relative_name(tmp_path, has_base):
    """Relative names count from the symlink, not from the file."""
    pool, vms = tmp_path / "pool", tmp_path / "vms"
    pool.mkdir()
    vms.mkdir()
    base = qemu.create(pool / "base")
    middle = commits.overlay(pool / "middle", base)
    commits.overlay(pool / "top", middle)
    qemu.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "middle", "-F", "qcow2", str(pool / "top"))
    for name in ("middle", "top"):
        (vms / name).symlink_to(pool / name)
    if has_base:  # of another VM
        qemu.create(vms / "base")
    commits.write(middle, "write -P 1 0 1M")
    before = commits.content(vms / "top")
    commits.merged(vms / "middle", base, above=str(vms / "top"))
    assert commits.content(vms / "top") == before


def test_a_run_that_is_told_to_end_stops_qemu_before_it_gives_up_the_locks(tmp_path, monkeypatch):
    """It is in the midst of writing."""
    base = qemu.create(tmp_path / "base")
    top = commits.overlay(tmp_path / "top", base)
    commits.write(top, "write -P 1 0 32M")
    seen = []

    def told(monitor: Monitor) -> None:
        with open_image(base) as file:
            seen.append(locks.is_locked(file, locks.OUR_TURN))
        end(monitor)

    end = Monitor.close
    monkeypatch.setattr(Monitor, "close", told)
    monkeypatch.setattr(merge, "telling", lambda _request: contextlib.nullcontext(tell_to_end))
    with ending_cleanly():
        outcome = commits.merge(top, base, speed=1 << 20)
    assert [failure.code for failure in outcome.failures] == ["interrupted"]
    assert seen == [True]
    monkeypatch.undo()
    commits.merged(top, base)


def test_an_overlay_with_a_copied_mark_is_not_taken_for_one_that_was_kept(tmp_path, monkeypatch):
    """It is the disk of a VM, which would see the data of the other one."""
    base, top, above = half_committed(tmp_path, monkeypatch)
    commits.merged(top, base, above=above)
    clone = commits.overlay(tmp_path / "clone", base)
    commits.write(clone, "write -P 9 0 1M")
    before = commits.content(above)
    refused = commits.refusal(clone, base)
    assert refused.code == "has_overlay"
    assert above in refused.why
    assert commits.content(above) == before


@pytest.mark.parametrize("way", ["merged down", "back"])
def test_an_image_that_was_kept_is_never_to_be_merged(tmp_path, way):
    base = qemu.create(tmp_path / "base")
    middle, top = tmp_path / "middle", tmp_path / "top"
    for number in range(2):
        commits.overlay(middle, base)
        commits.overlay(top, middle)
        if number == 0 and way == "back":
            run(GoBack(), [RevertRequest(str(top), base)], SETTINGS)
        elif number == 0:
            commits.merged(top, base, retire="keep")
    failures = commits.merge(top, base).failures
    assert {failure.code for failure in failures} == {"has_overlay"}
    assert any(f"{middle}." in failure.why for failure in failures)
    assert all("never merge it" in failure.remedy for failure in failures)
    for kept in tmp_path.glob("*.*ed"):
        kept.unlink()
    commits.merged(top, base)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_an_image_that_another_one_stands_on_beside_a_symlink_to_it(tmp_path, is_recorded):
    base, link = qemu.create(tmp_path / "base"), tmp_path / "links" / "base"
    for folder in ("links", "far"):
        (tmp_path / folder).mkdir()
    link.symlink_to(base)
    clone = commits.overlay(tmp_path / "links" / "clone", link)
    top = commits.overlay(tmp_path / "far" / "top", link if is_recorded else base)
    refused = commits.refusal(top, base if is_recorded else link)
    assert (refused.code, f"is the backing file of {clone}" in refused.why) == ("has_overlay", True)
    os.unlink(clone)
    commits.merged(top, link)


def test_what_a_killed_run_has_left_beside_the_file_of_a_symlink_goes(tmp_path):
    base, link = qemu.create(tmp_path / "base"), tmp_path / "links" / "base"
    (tmp_path / "links").mkdir()
    link.symlink_to(base)
    top = commits.overlay(tmp_path / "links" / "top", link)
    (tmp_path / ".kvmfleet-0123456789abcdef.tmp").touch()
    commits.merged(top, link)
    assert sorted(os.listdir(tmp_path)) == ["base", "links"]


def test_a_process_that_is_killed_fails_its_vm_only(tmp_path, monkeypatch):
    requests = []
    for number in range(3):
        base = qemu.create(tmp_path / f"base{number}")
        top = commits.overlay(tmp_path / f"top{number}", base)
        requests.append(CommitRequest(top, base, vm=f"vm{number}"))
    move = MergeLayers.move

    def moved(operation: t.Any, verdict: t.Any, *args: t.Any) -> t.Any:
        if verdict.request.vm == "vm0":
            os.kill(os.getpid(), signal.SIGKILL)
        return move(operation, verdict, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, "move", moved)
        outcome = run(MergeLayers(), requests, SETTINGS._replace(parallel=2))
    assert [one.state for one in outcome.verdicts] == ["failed", "committed", "committed"]
    assert [failure.code for failure in outcome.failures] == ["interrupted"]
    assert run(MergeLayers(), requests, SETTINGS).verdicts[0].state == "committed"


def test_a_folder_is_looked_through_once_for_all_images_of_a_chain(tmp_path, monkeypatch):
    below = qemu.create(tmp_path / "0")
    for number in range(1, 5):
        below = commits.overlay(tmp_path / str(number), below)
    looked = []
    look = siblings.overlays_in
    monkeypatch.setattr(siblings, "overlays_in", lambda folder: looked.append(folder) or look(folder))
    commits.merged(below, tmp_path / "0")
    assert looked == [str(tmp_path)] * 2  # before the locks, and under them


def tell_to_end(_done: int, _total: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


LONG_AGO = 1_600_000_000 * 10**9


def made_on(below: str, path: t.Any, made: int) -> str:
    """Make an overlay that says that it was made then, on the image below as that is; nobody has written to it."""
    commits.overlay(path, below)
    with OpenImage(str(path), os.open(path, os.O_RDWR)) as file:
        write_mark(file, Mark("uuid", "vda", path.name), History(os.stat(below).st_mtime_ns, 0, made))
    os.utime(path, ns=(made, made))
    return str(path)


def codes_of_going_back(path: t.Any, backing_file: t.Any) -> list[str]:
    """Return why a VM cannot be put on an image below."""
    request = RevertRequest(str(path), str(backing_file), puts_on_base=True)
    return [one.code for one in run(GoBack(), [request], SETTINGS).failures]


def stack(tmp_path: t.Any, *seconds: int) -> list[str]:
    """Return BASE, last written to long ago, and overlays, which say that they were made so many seconds later."""
    images = [qemu.create(tmp_path / "base", 16 << 20)]
    os.utime(images[0], ns=(LONG_AGO, LONG_AGO))
    for number, later in enumerate(seconds, 1):
        images.append(made_on(images[-1], tmp_path / f"s{number}", LONG_AGO + later * 10**9))
    return images


@pytest.mark.parametrize(
    ("written", "is_of_vm"),
    [(None, False), (None, True), ("base", True), ("s1", True), ("s2", True), ("s2", False)],
)
def test_a_merge_does_not_hide_that_what_takes_part_was_not_what_it_was(tmp_path, written, is_of_vm):
    """As after 'virsh blockcommit' of what is above into one of them, which was given up."""
    images = stack(tmp_path, 600, 1200, 1800)
    for path in (str(tmp_path / written), images[-1]) if written else ():
        commits.write(path, "write -P 7 0 1M")
    base, _s1, s2, s3 = images
    assert commits.merged(s2, base, above=s3, is_of_vm=is_of_vm)["state"] == "committed"
    assert codes_of_going_back(s3, base) == (["base_changed"] if written else [])


def test_the_clock_of_a_storage_that_is_behind_does_not_hide_it(tmp_path):
    """Then what was written there after the image above was made looks older than that."""
    base, top, above = stack(tmp_path, 600, 1200)
    for path in (base, above):
        commits.write(path, "write -P 7 0 1M")
    os.utime(base, ns=(0, LONG_AGO + 900 * 10**9))
    assert commits.merged(top, base, above=above, is_of_vm=True)["state"] == "committed"
    assert codes_of_going_back(above, base) == ["base_changed"]


def test_a_merge_does_not_hide_what_others_have_merged_into_an_image_that_records_nothing(tmp_path):
    """As 'virsh blockcommit' goes into the template below a disk by default."""
    template = qemu.create(tmp_path / "template", 16 << 20)
    base = commits.overlay(tmp_path / "disk", template)
    for path in (template, base):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    top = made_on(base, tmp_path / "s1", LONG_AGO + 600 * 10**9)
    commits.write(top, "write -P 3 4M 64k")
    os.utime(top, ns=(0, LONG_AGO + 600 * 10**9))
    above = made_on(top, tmp_path / "s2", LONG_AGO + 1200 * 10**9)
    for path in (template, above):
        commits.write(path, "write -P 7 0 1M")
    os.utime(template, ns=(0, LONG_AGO + 1800 * 10**9))
    assert commits.merged(top, base, above=above, is_of_vm=True)["state"] == "committed"
    assert codes_of_going_back(above, base) == ["base_changed"]


def test_a_merge_does_not_hide_what_others_have_merged_from_further_up(tmp_path):
    """As 'virsh blockcommit' of what is topmost, into the lower of two snapshots, soon after both."""
    base, top, above, topmost = stack(tmp_path, 1, 2, 3)
    for path in (top, topmost):
        commits.write(path, "write -P 7 0 1M")
    os.utime(top, ns=(0, LONG_AGO + 10 * 10**9))
    assert commits.merged(top, base, above=above, further=(topmost,), is_of_vm=True)["state"] == "committed"
    assert codes_of_going_back(topmost, above) == ["base_changed"]


@pytest.mark.parametrize("step", ["carry", "give", "publish"])
def test_after_a_kill_nothing_tells_whether_what_takes_part_is_what_it_was(tmp_path, monkeypatch, step):
    base, top, above = stack(tmp_path, 600, 1200)
    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, step, unittest.mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            commits.merge(top, base, above=above)
    for path in (top, above):
        commits.write(path, "write -P 7 0 1M")
    assert commits.merged(top, base, above=above)["state"] == "committed"
    assert codes_of_going_back(above, base) == ["base_changed"]


def test_what_was_written_before_the_image_above_was_made_is_what_goes_back(tmp_path):
    """As where the lowest one that goes in was made by others, or bitmaps of the one below it were worked on since."""
    base = qemu.create(tmp_path / "base", 16 << 20)
    top = commits.overlay(tmp_path / "s1", base)
    recorded = os.stat(top).st_mtime_ns
    above = made_on(top, tmp_path / "s2", recorded + 10**9)
    for path in (top, above):
        commits.write(path, "write -P 7 0 1M")
    os.utime(top, ns=(0, recorded))
    assert commits.merged(top, base, above=above, is_of_vm=True)["state"] == "committed"
    assert codes_of_going_back(above, base) == []
