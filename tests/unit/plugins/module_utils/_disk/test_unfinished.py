# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Unfinished work on a chain is told, with the call that completes it, and keeps other work off."""

from __future__ import annotations

import errno
import os
import random
import re
import shlex
import shutil
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import mend as mend_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import merge as merge_module
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.mend import MendBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import MARK, Content, place_of, write_vault
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark, new_history, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu import locks

from .. import qemu
from .commits import merge
from .healing import (
    MONDAY,
    SIZE,
    checkpoints,
    content,
    crash,
    guest_writes,
    leave_healing,
    lose,
    mend,
    overlay,
    recording_overlay,
)
from .overlays import SETTINGS, make_overlays


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    """Paths of an overlay with broken bitmaps, and of its base."""
    base = qemu.create(tmp_path / "base.qcow2", SIZE)
    qemu.add_bitmaps(base, [MONDAY, Bitmap("tuesday", 65536, True, False)])
    recording_overlay(tmp_path / "top.qcow2", base)
    return str(tmp_path / "top.qcow2"), base


def unfinished(path):
    """Return what qcow2_info tells."""
    return examine_chain(path, follow=True, count=False).as_result()["unfinished"]


def broken_off(monkeypatch, module, name):
    """Have a step fail, which leaves the files of a run that was killed just then."""

    def failing(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module, name, failing)


def merged_until(monkeypatch, step, *images, **options):
    """Merge down, and have this step fail."""
    with monkeypatch.context() as patch:
        broken_off(patch, merge_module, step)
        assert merge(*images, **options).failures


def healed_until(chain, monkeypatch, step, words):
    """Heal the chain, and have this step fail; return the paths of its images."""
    top, base = chain
    qemu.qemu_img("bitmap", "--remove", top, "tuesday")
    with monkeypatch.context() as patch:
        broken_off(patch, mend_module, step)
        (failure,) = run(MendBitmaps(), [HealRequest(top)], SETTINGS).failures
    assert (failure.code, words in failure.why) == ("storage", True)
    return top, base


@pytest.fixture(name="half_healed")
def fixture_half_healed(chain, monkeypatch):
    return healed_until(chain, monkeypatch, "mark_given", "cannot be renamed")


@pytest.fixture(name="all_healed")
def fixture_all_healed(chain, monkeypatch):
    return healed_until(chain, monkeypatch, "remove_vault", "a vault could not be removed")


def test_nothing_is_unfinished_in_a_sound_chain(chain):
    assert unfinished(chain[0]) is None


def test_a_healing_is_told_and_the_same_call_completes_it(half_healed):
    top, _base = half_healed
    assert f"with path={top}" in unfinished(top)
    assert "kvmfleet.qcow2.qcow2_bitmap" in unfinished(top)
    crash(top)
    disk, changed = mend(top)
    assert (changed, disk["state"], unfinished(top)) == (True, "rebuilt", None)


def test_a_healing_keeps_other_work_off(half_healed, tmp_path):
    top, base = half_healed
    outcomes = [
        make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), top)], SETTINGS),
        merge(top, base),
        run(GoBack(), [RevertRequest(top, base)], SETTINGS),
    ]
    for outcome in outcomes:
        assert [failure.code for failure in outcome.failures] == ["unfinished"]
        assert "kvmfleet.qcow2.qcow2_bitmap" in outcome.failures[0].remedy
    mend(top)
    assert not make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), top)], SETTINGS).failures


@pytest.mark.parametrize("place", range(4))
def test_a_healing_of_any_image_of_the_chain_keeps_merging_and_going_back_off(tmp_path, monkeypatch, place):
    """Above what is merged a vault may have the only bitmap that tells what is lost; below, bits that only go back."""
    images = [str(tmp_path / name) for name in ("top", "upper", "lower", "base")]
    qemu.create(images[3], SIZE)
    qemu.add_bitmaps(images[3], [MONDAY])
    for path, below in ((2, 3), (1, 2), (0, 1)):
        recording_overlay(images[path], images[below])
    leave_healing(images[0], images[place], monkeypatch)
    for path in (images[2], images[1], images[0]):
        os.utime(path)
    outcomes = [
        merge(images[1], images[2], above=images[0]),
        run(GoBack(), [RevertRequest(images[0], images[2])], SETTINGS),
    ]
    for outcome in outcomes:
        assert [(failure.code, failure.subject) for failure in outcome.failures] == [("unfinished", images[place])]
        assert f"qcow2_bitmap with path={images[0]}." in outcome.failures[0].remedy
    mend(images[0], names=("left",), state="absent")
    assert not merge(images[1], images[2], above=images[0]).failures


def test_what_a_merge_loses_is_not_put_back_above_it_as_if_it_were_valid(tmp_path, monkeypatch):
    """The bitmap of the upper image lacks what was written while that of the one below was not in order."""
    base = qemu.create(tmp_path / "base", SIZE)
    lower, upper = str(tmp_path / "lower"), str(tmp_path / "upper")
    recording_overlay(lower, base)
    qemu.add_bitmaps(lower, [MONDAY._replace(inconsistent=True)])
    recording_overlay(upper, lower)
    qemu.add_bitmaps(upper, [MONDAY])
    guest_writes(upper, random.Random(1))
    leave_healing(upper, upper, monkeypatch)
    lose(upper)  # QEMU was killed as it opened it
    assert [failure.code for failure in merge(lower, base, above=upper).failures] == ["unfinished"]
    mend(upper, names=("left",), state="absent", created=(("monday", 0),))
    assert {one[0] for one in qemu.bitmaps_of(upper)} == {"monday"}
    assert [failure.code for failure in merge(lower, base, above=upper).failures] == ["closes_gap"]


def test_a_commit_into_the_image_above_keeps_a_merge_off(chain, tmp_path, monkeypatch):
    """Its bitmaps are only in what is merged into it meanwhile."""
    top, base = chain
    upper = str(tmp_path / "upper")
    recording_overlay(upper, top)
    merged_until(monkeypatch, "mark_given", upper, top)
    below = qemu.create(tmp_path / "below", SIZE)
    qemu.qemu_img("rebase", "-u", "-b", below, "-F", "qcow2", base)
    (failure,) = merge(base, below, above=top).failures
    assert (failure.code, failure.subject) == ("unfinished", top)


def test_a_vault_that_is_only_left_over_is_told_and_in_nobodys_way(all_healed, tmp_path):
    top, _base = all_healed
    assert "is done, and its vault is left over" in unfinished(top)
    assert not make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), top)], SETTINGS).failures
    os.unlink(tmp_path / "next.qcow2")
    disk, changed = mend(top)
    assert (changed, disk["state"], unfinished(top)) == (True, "valid", None)


def test_nothing_is_put_back_from_a_vault_that_is_only_left_over(all_healed):
    """What was removed since is gone, even if nothing in the image tells that it was not lost."""
    top, base = all_healed
    for path in (top, base):
        qemu.qemu_img("bitmap", "--remove", path, "monday")
        qemu.qemu_img("bitmap", "--remove", path, "tuesday")
    mend(top)
    assert not qemu.bitmaps_of(top)


@pytest.mark.parametrize("gets_its_inode", [False, True])
def test_a_vault_of_another_file_is_no_unfinished_work(half_healed, monkeypatch, gets_its_inode):
    top, base = half_healed
    os.rename(top, f"{top}.other")
    recording_overlay(top, base)
    if gets_its_inode:  # as when the other one is gone: then the generation alone tells them apart
        shutil.copyfile(top, f"{top}.other")
        os.rename(f"{top}.other", top)
        monkeypatch.setattr(OpenImage, "generation", property(lambda _self: 7))
    assert unfinished(top) is None
    place = os.path.join(os.path.dirname(top), ".top.qcow2.kvmfleet-healing")
    with open(place, "rb") as file:
        vault = file.read()
    outcome = run(MendBitmaps(), [HealRequest(top)], SETTINGS)
    assert not outcome.as_result("disks")["changed"]  # where nothing is to be written, nothing is in the way
    assert [one.state for one in outcome.verdicts] == ["valid"]
    crash(top)
    for settings in (SETTINGS._replace(check_mode=True), SETTINGS):
        failures = run(MendBitmaps(), [HealRequest(top)], settings).failures
        assert [(one.code, "of another file" in one.why) for one in failures] == [("unfinished", True)]
    with open(place, "rb") as file:
        assert file.read() == vault  # the other file may come back


def test_a_copy_does_not_get_what_a_vault_of_another_file_has(half_healed):
    top, _base = half_healed
    crash(top)
    os.rename(top, f"{top}.other")
    qemu.qemu_img("convert", "-O", "qcow2", f"{top}.other", top)
    (failure,) = run(MendBitmaps(), [HealRequest(top)], SETTINGS).failures
    assert (failure.code, "another file" in failure.why) == ("unfinished", True)


@pytest.mark.parametrize("step", ["bring", "mark_given"])
def test_a_commit_is_told_and_keeps_other_work_off(chain, tmp_path, monkeypatch, step):
    top, base = chain
    merged_until(monkeypatch, step, top, base)
    told = unfinished(top)
    assert f"state=committed, path={top}, backing_file={base}" in told
    assert "kvmfleet-carried-" not in told  # of the mark nothing is to be told beside its vault
    for outcome in (
        make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), top)], SETTINGS),
        run(MendBitmaps(), [HealRequest(top)], SETTINGS),
    ):
        assert [failure.code for failure in outcome.failures] == ["unfinished"]
    assert not merge(top, base).failures
    assert unfinished(base) is None


def test_the_end_of_a_commit_keeps_only_the_overlay_from_other_work(chain, tmp_path, monkeypatch):
    top, base = chain
    merged_until(monkeypatch, "retire", top, base)
    assert "only the end is missing" in unfinished(base)
    (failure,) = run(MendBitmaps(), [HealRequest(top)], SETTINGS).failures
    assert failure.code == "unfinished"
    assert not make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), base)], SETTINGS).failures


def keep(base, top):
    """Make the vault of a commit of `top` into `base`."""
    path = place_of(os.path.realpath(base), False, "")
    with open_image(top) as file, open(path, "wb") as vault:
        write_vault(vault.fileno(), Content("0123", file, [], [], [], {}, 1 << 20))
    return path


def test_the_call_that_completes_a_commit_out_of_the_middle(chain, tmp_path):
    top, base = chain
    recording_overlay(tmp_path / "above.qcow2", top)
    keep(base, top)
    assert f"path={top}, backing_file={base}, above={tmp_path}/above.qcow2 (" in unfinished(f"{tmp_path}/above.qcow2")


@pytest.mark.parametrize("is_known", [True, False])
def test_what_stands_on_base_beside_the_overlay_of_a_commit_is_told_with_a_way_out(tmp_path, chain, is_known):
    """Others have taken the overlay into it, or have made it since: nothing on BASE can be merged then."""
    top, base = chain
    above = str(tmp_path / "above.qcow2")
    recording_overlay(above, top)
    path = keep(base, top)
    with open(above, "r+b") as file, open_image(top if is_known else base) as below:
        write_mark(OpenImage(above, file.fileno()), Mark("uuid", "vda", "tuesday"), new_history(below))
    qemu.qemu_img("rebase", "-q", "-b", base, "-F", "qcow2", above)
    told = unfinished(above)
    assert f"remove {top} and {path}, then all checkpoints" in told
    command = re.search("'(qemu-img rebase [^']*)'", told)
    assert (command is not None, "state=committed, path=" in told) == (is_known, not is_known)
    if command is not None:
        subprocess.run(shlex.split(command[1]), check=True)
        assert f"above={above} (" in unfinished(above)


def test_the_end_of_a_commit_out_of_the_middle_names_the_image_above(tmp_path, chain, monkeypatch):
    """It stands on BASE by then."""
    top, base = chain
    above = str(tmp_path / "above.qcow2")
    recording_overlay(above, top)
    merged_until(monkeypatch, "retire", top, base, above=above)
    assert f"Give above={above}, too" in unfinished(above)
    assert not merge(top, base, above=above).failures
    assert unfinished(above) is None


def test_the_call_that_completes_a_commit_of_a_snapshot_of_a_domain(chain):
    top, base = chain
    with open(top, "r+b") as file:
        write_mark(OpenImage(top, file.fileno()), Mark("uuid", "vda", "monday"))
    keep(base, top)
    told = unfinished(top)
    by_domain, by_image = "domain_overlay, state=committed, snapshot=monday and", f"path={top}, backing_file={base}."
    assert 0 < told.index(by_domain) < told.index(by_image)  # that one would leave the definition as it is


def test_the_call_that_completes_a_commit_into_a_raw_image(tmp_path):
    base = tmp_path / "raw"
    base.write_bytes(bytes(1 << 20))
    top = qemu.create(tmp_path / "top.qcow2", "1M", "-b", str(base), "-F", "raw")
    keep(base, top)
    assert f"path={top}, backing_file={base}, backing_format=raw (" in unfinished(top)


def test_a_mark_without_its_vault(chain):
    qemu.add_bitmaps(chain[0], [Bitmap(f"{MARK}4567", 65536, True, False)])
    assert f"{MARK}4567" in unfinished(chain[0])


def test_a_file_that_is_no_vault(chain):
    path = place_of(chain[1], False, "")
    with open(path, "wb") as file:
        file.write(b"mine")
    assert path in unfinished(chain[0])


def test_a_run_that_is_going_on(chain):
    keep(chain[1], chain[0])
    with open_image(chain[1]) as file:
        locks.take_turn(file, 1.0)
        assert "Wait for its end" in unfinished(chain[0])
    assert "Wait for its end" not in unfinished(chain[0])


def copied(tmp_path, chain, monkeypatch, step):
    """Break a commit off at this step, and copy all to another storage; return the paths of the images there."""
    top, base = chain
    qemu.qemu_img("rebase", "-u", "-b", os.path.basename(base), "-F", "qcow2", top)
    guest_writes(top, random.Random(5))
    merged_until(monkeypatch, step, top, base)
    new = tmp_path.with_name(f"{tmp_path.name}-new")
    shutil.copytree(tmp_path, new)
    return [os.path.join(new, os.path.basename(path)) for path in chain]


@pytest.mark.parametrize("step", ["bring", "mark_given", "retire"])
def test_a_commit_is_completed_on_a_copy_of_its_storage_while_the_old_one_is_there(tmp_path, chain, monkeypatch, step):
    top, base = copied(tmp_path, chain, monkeypatch, step)
    before = content(top)
    assert f"state=committed, path={top}, backing_file={base} (" in unfinished(top)
    for outcome in (
        run(MendBitmaps(), [HealRequest(top)], SETTINGS),
        run(GoBack(), [RevertRequest(top, base)], SETTINGS),
    ):
        assert f"path={top}, backing_file={base}" in outcome.failures[0].remedy
    assert not merge(top, base).failures
    assert (content(base), unfinished(base), os.path.exists(top)) == (before, None, False)
    assert checkpoints(base) == {"monday", "tuesday"}


def test_a_vault_that_is_left_over_on_a_copy_of_a_storage_is_told(tmp_path, chain, monkeypatch):
    """The overlay of its path is on the old storage, where nothing is to be done."""
    top, base = copied(tmp_path, chain, monkeypatch, "mark_given")
    merged_until(monkeypatch, "remove_vault", top, base)
    outcome = merge(top, base)
    assert [one.state for one in outcome.verdicts] == ["absent"]
    place = f"{place_of(base, False, '')}-given"
    assert unfinished(base).endswith(f"If what went in is gone, or is only kept, remove {place}.")
    os.unlink(place)
    assert unfinished(base) is None


def test_a_copy_of_a_chain_that_is_called_otherwise_is_known_by_its_mark(tmp_path, chain, monkeypatch):
    top, base = copied(tmp_path, chain, monkeypatch, "mark_given")
    os.rename(top, f"{top}.moved")
    upper = f"{top}.upper"
    overlay(upper, f"{top}.moved")
    qemu.add_bitmaps(upper, [Bitmap(*one) for one in qemu.bitmaps_of(f"{top}.moved")])
    assert f"path={top}.moved, backing_file={base}, above={upper} (" in unfinished(upper)
    assert "the commit of the overlay into it is unfinished" in unfinished(base)
    shutil.rmtree(tmp_path)  # then a snapshot may have made a copy of the mark
    assert f"path={chain[0]}, backing_file={base} (" in unfinished(upper)


def test_what_bears_a_copy_of_the_mark_when_all_is_done_is_in_nobodys_way(tmp_path, chain, monkeypatch):
    """A snapshot has made it, and the overlay that went in is gone."""
    top, base = chain
    merged_until(monkeypatch, "retire", top, base)
    upper = overlay(tmp_path / "upper", base)
    qemu.add_bitmaps(upper, [Bitmap(*one) for one in qemu.bitmaps_of(top)])
    os.unlink(top)
    assert f"path={top}, backing_file={base} (" in unfinished(upper)
    assert not make_overlays([OverlayRequest(str(tmp_path / "next.qcow2"), upper)], SETTINGS).failures


@pytest.mark.parametrize("way", ["between", "broken"])
def test_the_overlay_of_a_vault_that_stands_on_base_keeps_another_commit_off(tmp_path, chain, monkeypatch, way):
    """Also over images between, and while the chain is broken, as that of a commit whose lower images have gone."""
    top, base = chain
    upper, other = str(tmp_path / "upper"), str(tmp_path / "other")
    recording_overlay(upper, top)
    merged_until(monkeypatch, "bring", upper, base)
    if way == "broken":
        os.rename(top, f"{top}.away")
    overlay(other, base)
    (failure,) = [one for one in merge(other, base).failures if one.code == "unfinished"]
    assert f"path={upper}, backing_file={base} (" in failure.remedy
    assert "is only a copy" not in failure.remedy


def test_an_overlay_and_its_copy_on_one_base_exclude_each_other_until_one_is_moved_away(tmp_path, chain, monkeypatch):
    top, base = chain
    merged_until(monkeypatch, "mark_given", top, base)
    new = tmp_path.with_name(f"{tmp_path.name}-new")
    os.mkdir(new)
    copy = str(new / "top.qcow2")
    shutil.copy(top, copy)
    failures = merge(copy, base).failures
    assert [one.code for one in failures] == ["unfinished"]
    assert f"path={top}, backing_file={base} (" in failures[0].remedy
    assert f"If {top} is only a copy, which no VM uses, move it away instead." in failures[0].remedy
    os.mkdir(new / "away")
    os.rename(top, new / "away" / "top.qcow2")
    assert not merge(copy, base).failures
