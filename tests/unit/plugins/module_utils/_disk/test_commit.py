# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Why nothing is merged down: each reason, found on real images, of which not a byte has changed then."""

from __future__ import annotations

import contextlib
import os
import struct
import typing as t

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import merge, survey
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.retire import why_not_retired
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.in_use import set_in_use
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark

from .. import qemu
from . import commits
from .overlays import SETTINGS, digest

SIZE = 16 << 20
CHECK = SETTINGS._replace(check_mode=True)


class Chain(t.NamedTuple):
    """BASE, an image on it, and one on top, each with the bitmap x, each written to."""

    base: str
    middle: str
    top: str


def a_chain(folder: t.Any, *options: str, size: int = SIZE) -> Chain:
    """Make a chain; options are those of BASE."""
    base = qemu.create(folder / "base", size, *options)
    middle = commits.overlay(folder / "middle", base)
    top = commits.overlay(folder / "top", middle)
    for number, path in enumerate((base, middle, top)):
        qemu.add_bitmaps(path, [commits.bitmap("x", "recording", 65536)])
        commits.write(path, f"write -P {number + 1} {number + 1}M 64k")
    return Chain(base, middle, top)


@pytest.fixture(name="chain")
def fixture_chain(tmp_path):
    return a_chain(tmp_path)


@contextlib.contextmanager
def untouched(*paths: str) -> t.Iterator[None]:
    """Nothing may change in the block: the images, and what lies beside them."""
    before, names = [digest(path) for path in paths], [os.listdir(os.path.dirname(path)) for path in paths]
    yield
    assert [digest(path) for path in paths] == before
    assert [sorted(os.listdir(os.path.dirname(path))) for path in paths] == [sorted(own) for own in names]


def refused(chain: Chain, code: str, subject: str, words: str, **options: t.Any) -> None:
    """The merge of TOP into BASE must be refused, with this code, of this image, in these words."""
    with untouched(*chain):
        told = commits.refusal(chain.top, chain.base, **options)
    assert (told.code, told.subject) == (code, subject), str(told)
    assert words in str(told)


@pytest.mark.parametrize("which", ["base", "middle", "top"])
def test_an_image_that_is_open_for_writing(chain, which):
    path = getattr(chain, which)
    with qemu.opened_for_writing(path):
        told = commits.refusal(chain.top, chain.base)
    assert (told.code, told.subject) == ("in_use", path)


def test_an_image_below_a_running_vm(chain, tmp_path):
    other = commits.overlay(tmp_path / "of a vm", chain.top)
    with qemu.opened_for_writing(other):
        told = commits.merge(chain.top, chain.base).failures
    assert {one.code for one in told} == {"below_running_vm", "has_overlay"}
    assert {one.subject for one in told} == set(chain)


@pytest.mark.parametrize("which", ["base", "middle", "top"])
def test_an_image_that_another_one_stands_on(chain, tmp_path, which):
    other = commits.overlay(tmp_path / "other", getattr(chain, which))
    refused(chain, "has_overlay", chain.top, other)
    # It may be a backup that libvirt has made: to merge it down would put old data over newer data.
    refused(chain, "has_overlay", chain.top, "If a VM has that one as a disk, commit it first")
    refused(chain, "has_overlay", chain.top, "a backup that libvirt has made ('virsh backup-begin'): move it away")


def test_the_image_above_is_no_stranger(chain, tmp_path):
    above = commits.overlay(tmp_path / "above", chain.top)
    data = commits.content(above)
    assert commits.merged(chain.top, chain.base, above=above)["state"] == "committed"
    assert commits.content(above) == data
    assert qemu.info(above)["full-backing-filename"] == chain.base


def test_an_image_above_that_stands_on_another_one(chain, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    above = commits.overlay(tmp_path / "elsewhere" / "above", chain.base)
    told = commits.refusal(chain.top, chain.middle, above=above)
    assert (told.code, told.subject) == ("other_chain", above)


@pytest.mark.parametrize("step", [None, "carry", "give"])
def test_an_image_above_that_stands_beside_what_goes_in(chain, tmp_path, step):
    """It stands on BASE, whose data would change under it. Only once all is given that is the end of the merge."""
    if step is not None:
        stop_before(step, chain.top, chain.base)
    beside = commits.overlay(tmp_path / "beside", chain.base)
    with untouched(*chain, beside):
        told = commits.refusal(chain.top, chain.base, above=beside)
    assert (told.code, told.subject) == ("other_chain", beside)
    assert f"but, as that does, on {chain.base}" in told.why


def test_a_base_that_is_not_in_the_chain(chain, tmp_path):
    stranger = qemu.create(tmp_path / "stranger", SIZE)
    told = commits.refusal(chain.top, stranger)
    assert (told.code, told.subject) == ("other_chain", chain.top)
    assert f"{chain.middle}, {chain.base}" in told.why


def test_a_base_of_another_format_than_it_is_recorded_as(chain):
    refused(chain, "other_chain", chain.base, "not as raw", backing_format="raw")


def test_an_image_above_whose_useless_bitmap_would_look_valid(tmp_path):
    base, top = qemu.create(tmp_path / "base", SIZE), str(tmp_path / "top")
    commits.overlay(top, base)  # it has not recorded what was written to it
    above = commits.overlay(tmp_path / "above", top)
    qemu.add_bitmaps(above, [commits.bitmap("later", "recording", 65536)])
    low = Chain(base, base, top)
    qemu.add_bitmaps(top, [commits.bitmap("later", "disabled", 65536)])
    refused(low, "closes_gap", above, "'later'", above=above)


@pytest.fixture(name="gap")
def fixture_gap(tmp_path):
    """A chain with an image on its top, and one further up in another folder, which alone has the bitmap later."""
    chain = a_chain(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    further = commits.overlay(tmp_path / "elsewhere" / "further", chain.top)
    qemu.add_bitmaps(further, [commits.bitmap("later", "recording", 65536)])
    return chain, further


def old_base(chain: Chain) -> None:
    """Have a BASE that can hold no bitmaps, and the bitmap in the image that goes in."""
    qemu.qemu_img("amend", "-f", "qcow2", "-o", "compat=0.10", chain.base)
    qemu.add_bitmaps(chain.middle, [commits.bitmap("later", "recording", 65536)])


def broken(which: str, kind: str) -> t.Callable[[Chain], None]:
    """Return what gives an image a bitmap in which not all is recorded."""
    return lambda chain: qemu.add_bitmaps(getattr(chain, which), [commits.bitmap("later", kind, 65536)])


@pytest.mark.parametrize(
    ("harm", "options"),
    [
        (broken("middle", "disabled"), {}),
        (broken("middle", "inconsistent"), {}),
        (broken("base", "inconsistent"), {}),
        (old_base, {"accept_lost_bitmaps": True}),
    ],
)
def test_an_image_further_up_whose_useless_bitmap_would_look_valid(gap, harm, options):
    """The image above has no bitmap of the name, so there is a gap, which is gone after the merge."""
    chain, further = gap
    for path in chain:
        qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", path, "x")
    harm(chain)
    os.utime(chain.middle)
    of_vm = {"is_of_vm": True, "further": (further,)}
    with untouched(*chain, further):
        told = commits.refusal(chain.middle, chain.base, above=chain.top, **of_vm, **options)
    assert (told.code, told.subject) == ("closes_gap", further)
    beside = chain.top + ".further"
    os.rename(further, beside)
    with untouched(*chain, beside):  # which nobody names
        told = commits.refusal(chain.middle, chain.base, above=chain.top, **options)
    assert (told.code, told.subject) == ("closes_gap", beside)
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", beside, "later")
    assert commits.merged(chain.middle, chain.base, above=chain.top, **options)["state"] == "committed"


def test_what_goes_in_has_lost_what_an_image_further_up_goes_on_with(gap):
    chain, further = gap
    qemu.add_bitmaps(chain.middle, [commits.bitmap("later", "recording", 65536)])
    for path in chain:
        qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", path, "x")
    lose(chain.middle)
    with untouched(*chain, further):
        told = commits.refusal(chain.middle, chain.base, above=chain.top, is_of_vm=True, further=(further,))
    assert (told.code, told.subject) == ("lost_bitmaps", chain.middle)


def test_what_is_kept_on_the_image_above_is_no_disk(gap):
    chain, further = gap
    broken("middle", "disabled")(chain)
    os.rename(further, chain.top + ".reverted")
    assert commits.merged(chain.middle, chain.base, above=chain.top)["state"] == "committed"


@pytest.mark.parametrize("upper", ["top", "middle"])
def test_an_image_that_is_smaller_than_the_one_below(tmp_path, upper):
    base = qemu.create(tmp_path / "base", SIZE)
    middle = commits.overlay(tmp_path / "middle", base, size=SIZE if upper == "top" else SIZE - 512)
    top = commits.overlay(tmp_path / "top", middle, size=SIZE - 512 if upper == "top" else SIZE)
    smaller = top if upper == "top" else middle
    refused(Chain(base, middle, top), "unsupported", smaller, "is smaller")


@pytest.mark.parametrize("which", ["middle", "top"])
def test_internal_snapshots_in_an_image_that_goes_in(chain, which):
    path = getattr(chain, which)
    qemu.qemu_img("snapshot", "-c", "s", path)
    os.utime(chain.top)
    refused(chain, "unsupported", path, "1 internal snapshots")


def test_a_block_device_that_goes_in_has_no_way_out_that_loses_its_data(chain, monkeypatch):
    """What is to be done before going back, to use the image below, would."""
    is_device = property(lambda file: file.path == chain.top)
    monkeypatch.setattr(OpenImage, "is_device", is_device)
    (told,) = run(MergeLayers(), [CommitRequest(chain.top, chain.base)], SETTINGS).verdicts[0].problems
    assert (told.code, told.subject) == ("unsupported", chain.top)
    with open_image(chain.top) as file:
        assert why_not_retired(chain.top, file, "delete", "committed").code == "block_device"


def test_a_data_file_of_an_image_that_goes_in(tmp_path):
    base = qemu.create(tmp_path / "base", SIZE)
    top = commits.overlay(tmp_path / "top", base, "-o", f"data_file={tmp_path}/top.data")
    refused(Chain(base, base, top), "unsupported", top, "external data file")


@pytest.mark.parametrize("which", ["low", "base"])
def test_a_data_file_without_its_folder(tmp_path, which, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    paths, below = {}, []
    for name in ("low", "base"):
        paths[name] = qemu.create(tmp_path / name, SIZE, *below, *(["-o", "data_file=the data"] * (name == which)))
        below = ["-b", paths[name], "-F", "qcow2"]
    top = commits.overlay(tmp_path / "top", paths["base"])
    refused(Chain(paths["base"], paths["base"], top), "relative_data_file", paths[which], "'the data'")


def test_an_encrypted_image_below_base(tmp_path):
    secret = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    low = qemu.create(tmp_path / "low", SIZE, *secret)
    for path, below in (("base", "low"), ("top", "base")):
        more = ["-u", "-b", str(tmp_path / below), "-F", "qcow2"]
        qemu.create(tmp_path / path, SIZE, *more)
    refused(Chain(str(tmp_path / "base"), low, str(tmp_path / "top")), "encrypted", low, "is encrypted")


@pytest.mark.parametrize("kind", ["raw", "v2"])
def test_a_base_that_holds_no_bitmaps(tmp_path, kind):
    form = "raw" if kind == "raw" else "qcow2"
    base = str(tmp_path / "base")
    qemu.qemu_img("create", "-q", "-f", form, *(["-o", "compat=0.10"] * (kind == "v2")), base, str(SIZE))
    top = commits.overlay(tmp_path / "top", base, form=form)
    qemu.add_bitmaps(top, [commits.bitmap("x", "recording", 65536)])
    commits.write(top, "write -P 9 5M 1M")
    data = commits.content(top)
    refused(Chain(base, base, top), "lost_bitmaps", base, "'x'", backing_format=form)
    result = commits.merged(top, base, backing_format=form, accept_lost_bitmaps=True)
    assert [(one["name"], one["reason"]) for one in result["skipped_bitmaps"]] == [("x", "raw")]
    assert commits.content(base, "-f", form) == data


@pytest.mark.parametrize("length", [1020, 1021])
def test_a_name_that_is_too_long_for_the_vault(tmp_path, length):
    base = qemu.create(tmp_path / "base", SIZE)
    top = commits.overlay(tmp_path / "top", base)
    for path in (base, top):
        qemu.add_bitmaps(path, [commits.bitmap("ü" * (length // 2) + "x" * (length % 2), "recording", 65536)])
    if length > 1020:
        refused(Chain(base, base, top), "bitmap_name", top, "more than 1020 bytes")
    else:
        assert commits.merged(top, base)["state"] == "committed"
        assert len(qemu.bitmaps_of(base)) == 1


@pytest.mark.parametrize("option", ["path", "backing_file", "above"])
def test_a_path_that_is_not_absolute(chain, option):
    request = CommitRequest(chain.top, chain.base)._replace(**{option: "relative"})
    (told,) = run(MergeLayers(), [request], SETTINGS).failures
    assert told.code == "bad_name"
    assert option in told.why


def test_an_image_that_takes_part_twice(chain):
    requests = [CommitRequest(chain.top, chain.middle), CommitRequest(chain.middle, chain.base)]
    with untouched(*chain):
        told = run(MergeLayers(), requests, SETTINGS).failures
    assert {one.code for one in told} == {"repeated"}


# What is found after a run that has not come to its end.


class Stopped(MergeLayers):
    """A commit that ends before one of its steps, as if the storage had failed."""

    def __init__(self, step: str) -> None:
        super().__init__()
        setattr(self, step, self._fail)

    def _fail(self, *_arguments: t.Any) -> t.NoReturn:
        raise Refusal("storage", "the storage", "has failed")


def stop_before(step: str, top: str, base: str, **options: t.Any) -> str:
    """Have a commit end before a step; return the path of its vault."""
    outcome = run(Stopped(step), [CommitRequest(top, base, **options)], SETTINGS)
    assert [one.code for one in outcome.failures] == ["storage"]
    folder = os.path.dirname(base)
    (vault,) = [name for name in os.listdir(folder) if "kvmfleet-vault" in name]
    return os.path.join(folder, vault)


def test_room_is_asked_for_what_the_vault_tells_of_what_the_image_holds(tmp_path):
    """A few clusters all over a large disk: each takes a cluster of the vault, and little in BASE."""
    base = qemu.create(tmp_path / "base", "1T", "-o", "cluster_size=4k")
    top = qemu.create(tmp_path / "top", "1T", "-b", base, "-F", "qcow2", "-o", "cluster_size=4k")
    commits.write(top, *(f"write -z {place * 4}G 4k" for place in range(256)))
    (planned,) = run(MergeLayers(), [CommitRequest(top, base)], CHECK).verdicts
    taken = os.stat(stop_before("carry", top, base)).st_blocks * 512
    assert 256 * 65536 < taken < planned.need.bytes


STEPS = ["carry", "strip", "move", "give", "publish"]


@pytest.mark.parametrize("step", STEPS)
def test_the_same_call_goes_on(chain, step):
    data = commits.content(chain.top)
    stop_before(step, chain.top, chain.base)
    assert commits.merged(chain.top, chain.base)["state"] == "committed"
    assert commits.content(chain.base) == data
    assert [name for name in os.listdir(os.path.dirname(chain.base)) if "kvmfleet" in name] == []


def test_an_overlay_that_is_gone_while_its_commit_is_unfinished(chain):
    vault = stop_before("give", chain.top, chain.base)
    os.rename(chain.top, f"{chain.top}.away")
    told = commits.refusal(chain.top, chain.base)
    assert (told.code, told.subject) == ("unfinished", chain.top)
    assert vault in told.why
    os.rename(f"{chain.top}.away", chain.top)
    assert commits.merged(chain.top, chain.base)["state"] == "committed"


def test_an_overlay_that_is_gone_after_its_commit(chain):
    vault = stop_before("publish", chain.top, chain.base)
    os.unlink(chain.top)
    assert commits.merged(chain.top, chain.base)["state"] == "committed"
    assert (os.path.exists(vault), os.path.exists(chain.middle)) == (False, False)
    assert commits.merged(chain.top, chain.base)["state"] == "absent"


@pytest.mark.parametrize("step", ["carry", "strip"])
def test_base_was_written_to_after_the_vault_was_made(chain, step):
    stop_before(step, chain.top, chain.base)
    commits.write(chain.base, "write -P 9 9M 64k")
    refused(chain, "unfinished", chain.top, "BASE is not as the vault beside it says")


@pytest.mark.parametrize("others", [(), ("y",)])
def test_checkpoints_were_deleted_and_made_after_the_vault_was_made(tmp_path, others):
    """The VM goes on with its overlay, and so does the backup tool."""
    base = qemu.create(tmp_path / "base", SIZE)
    top = commits.overlay(tmp_path / "top", base)
    for number, path in enumerate((base, top), start=1):
        qemu.add_bitmaps(path, [commits.bitmap(name, "recording", 65536) for name in ("x", *others)])
        commits.write(path, f"write -P {number} {number}M 64k")
    stop_before("carry", top, base)
    for path in (top, base):
        qemu.qemu_img("bitmap", "--remove", path, "x")
    qemu.add_bitmaps(top, [commits.bitmap("new", "recording", 65536)])
    commits.write(top, "write -P 9 9M 64k")
    data = commits.content(top)
    result = commits.merged(top, base)
    assert sorted(one["name"] for one in result["bitmaps"]) == ["new", *others]
    assert commits.content(base) == data
    (bits,) = commits.bits_of(tmp_path, [base])
    assert {name: commits.granules(one.extents, 65536) for name, one in bits.items()} == {
        "new": {144},
        **{name: {16, 32, 144} for name in others},
    }


def test_a_checkpoint_was_deleted_and_base_was_written_to_after_the_vault_was_made(chain):
    for path in chain:
        qemu.add_bitmaps(path, [commits.bitmap("y", "recording", 65536)])
    stop_before("carry", chain.top, chain.base)
    for path in chain:
        qemu.qemu_img("bitmap", "--remove", path, "y")
    commits.write(chain.base, "write -P 9 9M 64k")
    refused(chain, "unfinished", chain.top, "BASE is not as the vault beside it says")


@pytest.mark.parametrize("step", STEPS)
def test_an_image_between_into_which_a_commit_is_unfinished(chain, step):
    """A VM may have gone on with the middle one, whose new data the old overlay would come over."""
    stop_before(step, chain.top, chain.middle)
    refused(chain, "unfinished", chain.middle, f"of {chain.top} into it")
    assert commits.merged(chain.top, chain.middle)["state"] == "committed"
    assert commits.merged(chain.middle, chain.base)["state"] == "committed"


def test_bits_of_what_the_overlay_holds_no_longer(tmp_path):
    """A bitmap can mark more than its image holds: here somebody has emptied it since the checkpoint."""
    base = qemu.create(tmp_path / "base", SIZE)
    top = commits.overlay(tmp_path / "top", base)
    qemu.add_bitmaps(top, [commits.bitmap("x", "recording", 65536)])
    commits.write(top, "write -P 1 1M 256k")
    qemu.qemu_img("commit", "-q", top)
    commits.write(top, "write -P 2 4M 64k")
    before = commits.granules(commits.bits_of(tmp_path, [top])[0]["x"].extents, 65536)
    assert before == {16, 17, 18, 19, 64}
    stop_before("carry", top, base)
    with open_image(top) as file:
        set_in_use(file, ["x"], in_use=True)  # as a kill leaves it
    result = commits.merged(top, base)
    assert (result["exact"], [one["name"] for one in result["bitmaps"]]) == (False, ["x"])
    assert commits.granules(commits.bits_of(tmp_path, [base])[0]["x"].extents, 65536) >= before


def test_an_overlay_of_version_2_that_was_written_to_after_all_was_given(tmp_path):
    base = qemu.create(tmp_path / "base", SIZE)
    top = commits.overlay(tmp_path / "top", base, "-o", "compat=0.10")
    commits.write(top, "write -P 1 1M 64k")
    vault = stop_before("publish", top, base)
    commits.write(top, "write -P 2 4M 64k")
    data = commits.content(top)
    os.chown(vault, 1, 1)  # with a backup's restorer, say; its time says now that it is younger than the overlay
    os.chown(vault, 0, 0)
    assert commits.merged(top, base)["state"] == "committed"
    assert commits.content(base) == data


def test_a_symlink_whose_overlay_was_retired_by_a_killed_run(tmp_path):
    base = qemu.create(tmp_path / "base", SIZE)
    top, link = commits.overlay(tmp_path / "top", base), str(tmp_path / "link")
    os.symlink(top, link)
    stop_before("publish", link, base)
    os.unlink(top)
    other = str(tmp_path / "other link")
    os.symlink(tmp_path / "not there", other)
    assert commits.refusal(other, base).code == "no_such_file"  # nobody says that it went in
    os.unlink(other)
    os.unlink(link)
    os.symlink(tmp_path / "not mounted" / "top", link)
    assert commits.refusal(link, base).code == "no_folder"
    os.unlink(link)
    os.symlink(top, link)
    assert commits.merged(link, base)["state"] == "committed"
    assert os.listdir(tmp_path) == ["base"]
    os.symlink(top, link)  # without a vault nobody knows what it led to
    assert commits.refusal(link, base).code == "no_such_file"


@pytest.mark.parametrize("length", [236, 230])
def test_a_base_whose_name_leaves_no_room_for_the_vault(tmp_path, length):
    base = qemu.create(tmp_path / ("b" * length), SIZE)
    top = commits.overlay(tmp_path / "top", base)
    if length == 230:
        assert commits.merged(top, base)["state"] == "committed"
        return
    with untouched(top, base):
        assert commits.refusal(top, base).code == "name_too_long"


def test_an_image_between_whose_name_is_no_text(tmp_path):
    base = qemu.create(tmp_path / "base", SIZE)
    middle = commits.overlay(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"middle-\xff")), base)
    top = commits.overlay(tmp_path / "top", middle)
    commits.write(top, "write -P 1 1M 64k")
    assert commits.merged(top, base)["state"] == "committed"
    assert os.listdir(tmp_path) == ["base"]


def test_an_image_below_base_that_nobody_can_look_below(tmp_path):
    """QEMU would fill up clusters of BASE from it without what is below it."""
    root = tmp_path / "root"
    root.write_bytes(b"r" * SIZE)
    middle = str(tmp_path / "middle")
    qemu.qemu_img("create", "-q", "-f", "qed", "-b", str(root), "-F", "raw", middle)
    base = commits.overlay(tmp_path / "base", middle, form="qed")
    top = commits.overlay(tmp_path / "top", base, "-o", "cluster_size=4k")
    commits.write(top, "write -P 1 8k 4k")
    with untouched(top, base, middle):
        told = commits.refusal(top, base)
    assert (told.code, told.subject) == ("unsupported", middle)


def test_a_base_that_would_grow_over_an_image_of_unknown_size(tmp_path):
    bottom = str(tmp_path / "bottom")
    qemu.qemu_img("create", "-q", "-f", "vdi", bottom, "8M")
    assert os.path.getsize(bottom) < 4 << 20  # of the file; the disk's end would become visible
    base = commits.overlay(tmp_path / "base", bottom, form="vdi", size="4M")
    top = commits.overlay(tmp_path / "top", base, size="8M")
    with untouched(top, base, bottom):
        told = commits.refusal(top, base)
    assert (told.code, told.subject) == ("unsupported", base)


def test_a_data_file_whose_clusters_would_be_filled_up_from_below(tmp_path):
    bottom = qemu.create(tmp_path / "bottom", SIZE)
    base = commits.overlay(tmp_path / "base", bottom, "-o", f"data_file={tmp_path}/data")
    same = commits.overlay(tmp_path / "same", base)
    commits.write(same, "write -P 1 8k 4k")
    assert commits.merged(same, base)["state"] == "committed"
    small = commits.overlay(tmp_path / "small", base, "-o", "extended_l2=on")
    with untouched(small, base, bottom):
        told = commits.refusal(small, base)
    assert (told.code, told.subject) == ("unsupported", base)


def test_a_base_with_lazy_refcounts_gets_its_data_before_what_leads_to_it(tmp_path, monkeypatch):
    """QEMU marks such an image as dirty as long as it writes, and then leaves out the flush between the two."""
    base = qemu.create(tmp_path / "base", SIZE, "-o", "lazy_refcounts=on")
    top = commits.overlay(tmp_path / "top", base)
    commits.write(top, "write -P 1 0 8M")
    dirty = []

    def look(_done: int, _total: int) -> None:
        with open(base, "rb") as file:
            dirty.append(struct.unpack(">Q", file.read(80)[72:])[0] & 1)

    monkeypatch.setattr(merge, "telling", lambda _request: contextlib.nullcontext(look))
    assert commits.merged(top, base, speed=8 << 20)["method"] == "copied"
    assert set(dirty) == {0}


def test_the_vault_and_the_bitmaps_are_gone(chain):
    os.unlink(stop_before("strip", chain.top, chain.base))
    mark = next(name for name, *_more in qemu.bitmaps_of(chain.top) if name.startswith("kvmfleet"))
    qemu.qemu_img("bitmap", "--remove", chain.top, "x")
    qemu.add_bitmaps(chain.top, [commits.bitmap("x", "inconsistent", 65536)])  # and the mark with it
    assert (mark, 65536, True, True) in qemu.bitmaps_of(chain.top)
    refused(chain, "unfinished", chain.top, "the vault with what they carried is gone")


def test_the_vault_is_gone_and_base_is_younger(chain):
    os.unlink(stop_before("publish", chain.top, chain.base))
    refused(chain, "unfinished", chain.top, "may be done already")


def test_the_vault_alone_is_gone(chain):
    data = commits.content(chain.top)
    os.unlink(stop_before("strip", chain.top, chain.base))
    assert commits.merged(chain.top, chain.base)["state"] == "committed"
    assert commits.content(chain.base) == data


def test_both_ends_were_written_to_after_all_was_given(chain):
    stop_before("publish", chain.top, chain.base)
    commits.write(chain.top, "write -P 8 8M 64k")
    commits.write(chain.base, "write -P 9 9M 64k")
    refused(chain, "unfinished", chain.top, "another one to BASE")


def test_the_overlay_was_written_to_after_all_was_given(chain, tmp_path):
    stop_before("publish", chain.top, chain.base)
    commits.write(chain.top, "write -P 8 8M 64k")
    data = commits.content(chain.top)
    assert commits.merged(chain.top, chain.base)["state"] == "committed"
    assert commits.content(chain.base) == data
    (bits,) = commits.bits_of(tmp_path, [chain.base])
    assert commits.granules(bits["x"].extents, 65536) >= {16, 32, 48, 128}


def test_the_vault_is_of_another_overlay(tmp_path):
    base, tops = qemu.create(tmp_path / "base", SIZE), []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tops.append(commits.overlay(tmp_path / name / "top", base))
    for path in (base, *tops):
        qemu.add_bitmaps(path, [commits.bitmap("x", "recording", 65536)])
    os.unlink(stop_before("strip", tops[0], base))  # it carries what that vault told
    stop_before("strip", tops[1], base)
    told = commits.refusal(tops[0], base)
    assert (told.code, told.subject) == ("unfinished", base)
    assert f"the commit of {tops[1]} into it is unfinished" in told.why
    assert commits.merged(tops[1], base)["state"] == "committed"


def test_a_vault_of_a_stranger_is_not_trusted(chain, monkeypatch):
    vault = stop_before("carry", chain.top, chain.base)
    if os.geteuid() == 0:
        os.chown(vault, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    told = commits.refusal(chain.top, chain.base)
    assert (told.code, told.subject) == ("unfinished", vault)
    assert "belongs to another user" in told.why
    assert "run the same call as that user" in told.remedy
    assert "the next backups must be full ones" in told.remedy


@pytest.mark.usefixtures("squashed")
def test_nothing_is_begun_where_no_later_run_would_trust_the_vault(chain, tmp_path):
    """It would refuse all that a killed run has left, for ever."""
    refused(chain, "no_permission", f"{tmp_path}/.base.kvmfleet-vault", "(become_user)")


def test_what_an_image_has_lost_must_not_come_to_look_valid(chain):
    """The bitmap of TOP may have begun there: after the merge nothing would tell that it lacks what changed before."""
    qemu.patch(chain.base, 88, struct.pack(">Q", 0))  # autoclear bit 0
    os.utime(chain.top)
    refused(chain, "lost_bitmaps", chain.base, "perhaps 'x', too")
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.middle, "x")
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.top, "x")
    assert commits.merged(chain.top, chain.base)["state"] == "committed"


def test_what_an_image_between_has_lost_is_what_it_holds_where_base_has_it(chain):
    qemu.patch(chain.middle, 88, struct.pack(">Q", 0))
    os.utime(chain.top)
    done = commits.merged(chain.top, chain.base)
    assert (done["state"], [one["name"] for one in done["bitmaps"]]) == ("committed", ["x"])


def lose(path: str) -> None:
    """Have an image lose its bitmaps, as by a program that knows none, long ago."""
    before = os.stat(path)
    qemu.patch(path, 88, struct.pack(">Q", 0))  # autoclear bit 0
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def without_directory(path: str) -> None:
    """Have an image lose its bitmaps, and what tells their names."""
    offset, length = qemu.directory_of(path)
    qemu.patch(path, offset, bytes(length))
    lose(path)


def test_what_an_image_lacks_that_an_overlay_goes_on_with_must_not_come_to_look_valid(chain):
    """QEMU could not store it as its VM left the image: that the overlay is newer than the checkpoint tells."""
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.base, "x")
    with OpenImage(chain.middle, os.open(chain.middle, os.O_RDWR)) as file:
        write_mark(file, Mark("web", "vda", "mon"), History(made=90_000 * 10**9))
    os.utime(chain.top)
    told = commits.refusal(chain.top, chain.base, created=(("x", 50_000),))
    assert (told.code, told.subject) == ("lost_bitmaps", chain.base)
    assert ("lacks 'x'" in told.why, "qemu-img" in told.remedy) == (True, False)
    assert commits.merged(chain.top, chain.base, created=(("x", 89_995),))["state"] == "committed"


@pytest.fixture(name="newer")
def fixture_newer(chain):
    """A chain whose topmost image alone has the bitmap new."""
    qemu.add_bitmaps(chain.top, [commits.bitmap("new", "recording", 65536)])
    for path in chain:
        qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", path, "x")
        qemu.add_bitmaps(path, [commits.bitmap("old", "recording", 65536)] if path == chain.base else [])
    os.utime(chain.top)
    return chain


def test_a_bitmap_that_an_image_never_had_is_not_lost_there(newer):
    lose(newer.base)
    assert [one["name"] for one in commits.merged(newer.top, newer.base)["bitmaps"]] == ["new"]


def test_without_a_directory_only_the_time_tells_what_is_not_lost(newer):
    without_directory(newer.base)
    os.utime(newer.base, (10_000, 10_000))
    refused(newer, "lost_bitmaps", newer.base, "perhaps 'new', too")
    refused(newer, "lost_bitmaps", newer.base, "perhaps 'new', too", created=(("new", 10_000),))
    assert commits.merged(newer.top, newer.base, created=(("new", 50_000),))["state"] == "committed"


EARLIER = (("x", 50_000),)  # an image of second 10,000 was last written to before that checkpoint was made


def without_x(*paths: str) -> None:
    for path in paths:
        qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", path, "x")


@pytest.mark.parametrize("settings", [CHECK, SETTINGS])
def test_a_disk_that_was_put_back_from_an_older_file_does_not_get_younger_by_a_merge(chain, settings):
    os.utime(chain.top, (10_000, 10_000))
    with untouched(*chain):
        (told,) = commits.merge(chain.top, chain.base, settings, is_of_vm=True, created=EARLIER).failures
    assert (told.code, told.subject) == ("closes_gap", chain.top)
    assert "is older than the checkpoint of 'x'" in str(told)
    assert commits.merged(chain.top, chain.base, is_of_vm=True, created=(("x", 10_000),))["state"] == "committed"


def test_an_older_image_below_one_that_lacks_the_bitmap_does_not_make_it_valid(chain):
    """As an overlay does on a disk that was put back. Once the checkpoint is removed the merge goes on."""
    without_x(chain.middle, chain.top)
    os.utime(chain.top)
    os.utime(chain.base, (10_000, 10_000))
    refused(chain, "closes_gap", chain.base, "the checkpoint of 'x'", created=(*EARLIER, ("gone", 50_000)))
    assert commits.merged(chain.top, chain.base, created=EARLIER[1:])["state"] == "committed"


def test_what_an_older_image_below_has_only_adds_bits(chain):
    os.utime(chain.base, (10_000, 10_000))
    done = commits.merged(chain.top, chain.base, created=EARLIER)
    assert [one["name"] for one in done["bitmaps"]] == ["x"]


def test_an_older_image_below_all_that_have_the_bitmap_tells_nothing_of_it(chain):
    without_x(chain.base, chain.middle, chain.top)
    qemu.add_bitmaps(chain.top, [commits.bitmap("x", "disabled", 65536)])
    os.utime(chain.base, (10_000, 10_000))
    done = commits.merged(chain.top, chain.base, created=EARLIER)
    assert [one["reason"] for one in done["skipped_bitmaps"]] == ["disabled"]


def test_an_image_above_does_not_get_younger_when_it_is_put_on_another_one(chain):
    os.utime(chain.top, (10_000, 10_000))
    with untouched(*chain):
        told = commits.refusal(chain.middle, chain.base, above=chain.top, is_of_vm=True, created=EARLIER)
    assert (told.code, told.subject) == ("closes_gap", chain.top)
    os.utime(chain.top)
    os.utime(chain.middle, (10_000, 10_000))
    done = commits.merged(chain.middle, chain.base, above=chain.top, is_of_vm=True, created=EARLIER)
    assert done["state"] == "committed"  # by the topmost image it is the checkpoint's


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_topmost", [True, False])
def test_a_folder_that_was_put_back_after_a_kill_tells_that_by_its_age(chain, step, is_topmost):
    """Vault and all, and the checkpoint was made anew since, by the same name."""
    top, above = (chain.top, None) if is_topmost else (chain.middle, chain.top)
    stop_before(step, top, chain.base, above=above)
    for path in chain:
        os.utime(path, (10_000, 10_000))
    options = {"above": above, "is_of_vm": True}
    if is_topmost and step == "publish":
        commits.merged(top, chain.base, created=EARLIER, **options)
        assert os.stat(chain.base).st_mtime == 10_000  # it tells
        return
    with untouched(*chain):
        told = commits.refusal(top, chain.base, created=EARLIER, **options)
    assert (told.code, told.subject) == ("closes_gap", chain.top)
    assert "is older than the checkpoint of 'x'" in told.why
    assert "'virsh checkpoint-delete DOMAIN x --metadata'" in told.remedy
    assert commits.merged(top, chain.base, created=(("x", 10_000),), **options)["state"] == "committed"


def test_only_the_topmost_image_tells_that_a_folder_was_put_back(chain, tmp_path):
    """Its bitmaps count, and it stays as it is."""
    further = commits.overlay(tmp_path / "further", chain.top)
    stop_before("strip", chain.middle, chain.base, above=chain.top, further=(further,), is_of_vm=True)
    for path in chain:
        os.utime(path, (10_000, 10_000))
    options = {"above": chain.top, "further": (further,), "is_of_vm": True, "created": EARLIER}
    assert commits.merged(chain.middle, chain.base, **options)["state"] == "committed"


@pytest.mark.parametrize("is_topmost", [True, False])
def test_a_merge_that_was_begun_goes_on_however_old_what_it_has_not_written_to_is(chain, monkeypatch, is_topmost):
    """A kill has taken TOP's bitmaps, which the vault has; or has left those of the image above held back."""
    os.utime(chain.base, (10_000, 10_000))

    def killed(*_arguments: t.Any) -> t.NoReturn:
        raise Refusal("no_space", chain.top, "is full")

    top = chain.top if is_topmost else chain.middle
    options = {"created": EARLIER, "is_of_vm": True, "above": None if is_topmost else chain.top}
    with monkeypatch.context() as patch:
        patch.setattr(merge, "bring", killed)
        assert commits.refusal(top, chain.base, **options).code == "no_space"
    if is_topmost:
        qemu.patch(top, 88, struct.pack(">Q", 0))  # autoclear bit 0
    else:
        with open_image(chain.top) as file:
            set_in_use(file, ["x"], in_use=True)
    done = commits.merged(top, chain.base, **options)
    assert [one["name"] for one in done["bitmaps"]] == ["x"]


def test_an_image_forgets_what_it_has_lost_as_the_refusal_advises(newer):
    without_directory(newer.base)
    os.utime(newer.top)
    told = commits.refusal(newer.top, newer.base)
    assert f"'qemu-img check -r all {newer.base}'" in told.remedy
    qemu.qemu_img("check", "-q", "-r", "all", newer.base)
    refused(newer, "unfinished", newer.top, "as where only 'qemu-img check -r all'")
    assert f"if no VM has run on it since, 'touch {newer.top}' says so" in told.remedy
    os.utime(newer.top)
    assert commits.merged(newer.top, newer.base)["state"] == "committed"


@pytest.mark.parametrize("which", ["middle", "base"])
def test_what_goes_in_has_lost_what_the_image_above_goes_on_with(chain, which):
    """Only TOP was looked past: the bitmap of the image above can have begun in it."""
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.base if which == "middle" else chain.middle, "x")
    lose(getattr(chain, which))
    os.utime(chain.middle)
    with untouched(*chain):
        told = commits.refusal(chain.middle, chain.base, above=chain.top)
    assert (told.code, told.subject) == ("lost_bitmaps", getattr(chain, which))
    assert "perhaps 'x', too" in told.why
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.top, "x")
    assert commits.merged(chain.middle, chain.base, above=chain.top)["state"] == "committed"


def test_what_topmost_image_has_lost_it_does_not_go_on_with(chain):
    """BASE has the bitmap in order, so what TOP holds is all that changed since."""
    lose(chain.top)
    assert [one["name"] for one in commits.merged(chain.top, chain.base)["bitmaps"]] == ["x"]


def test_a_vault_whose_work_is_done_answers_for_nothing(chain):
    vault = stop_before("publish", chain.top, chain.base)
    assert vault.endswith("-given")
    os.unlink(chain.top)
    new = commits.overlay(chain.base + ".new", chain.base)
    qemu.add_bitmaps(new, [commits.bitmap("x", "recording", 65536)])
    os.unlink(chain.middle)
    lose(chain.base)
    told = commits.refusal(new, chain.base)
    assert (told.code, told.subject) == ("lost_bitmaps", chain.base)


def test_a_vault_answers_only_for_what_it_has(chain):
    """TOP has lost what it got before a kill, and a bitmap made since, with which the image above goes on."""
    os.unlink(chain.top)
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.base, "x")
    os.utime(chain.middle)
    stop_before("strip", chain.middle, chain.base)
    qemu.add_bitmaps(chain.middle, [commits.bitmap("new", "recording", 65536)])
    above = commits.overlay(chain.top, chain.middle)
    qemu.add_bitmaps(above, [commits.bitmap(name, "recording", 65536) for name in ("x", "new")])
    lose(chain.middle)
    told = commits.refusal(chain.middle, chain.base, above=above)
    assert (told.code, told.subject) == ("lost_bitmaps", chain.middle)
    assert "perhaps 'new', too" in told.why
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", above, "new")
    done = commits.merged(chain.middle, chain.base, above=above)
    assert (done["state"], [one["name"] for one in done["bitmaps"]]) == ("committed", ["x"])


def test_a_vault_of_other_work_tells_nothing_of_the_image_above(chain):
    """Or a bitmap that began there would stay marked as in use: TOP, which would tell that it is safe, has none."""
    vault = stop_before("publish", chain.top, chain.base)
    os.unlink(chain.top)
    os.unlink(chain.middle)
    qemu.qemu_img("bitmap", "--remove", "-f", "qcow2", chain.base, "x")
    middle = commits.overlay(chain.base + ".new", chain.base)
    qemu.add_bitmaps(middle, [commits.bitmap("other", "recording", 65536)])
    above = commits.overlay(chain.base + ".above", middle)
    qemu.add_bitmaps(above, [commits.bitmap("x", "recording", 65536)])
    assert os.path.exists(vault)
    assert commits.merged(middle, chain.base, above=above)["state"] == "committed"
    assert qemu.bitmaps_of(above) == {("x", 65536, True, False)}


@pytest.mark.parametrize("which", ["base", "middle"])
def test_an_image_that_is_older_than_what_is_below_it_may_be_a_backup_or_have_gone_in(chain, which):
    """Such as virsh blockcommit leaves it; libvirt's backups stand beside the disk and record it as backing file."""
    below = getattr(chain, which)
    commits.write(below, "write -P 9 2M 64k")  # TOP holds older data there
    os.utime(chain.top, ns=(0, os.stat(below).st_mtime_ns - 1))
    refused(chain, "unfinished", chain.top, f"and {below} below it after that")
    with untouched(*chain):
        assert commits.merge(chain.top, chain.base, CHECK).failures[0].code == "unfinished"
    refused(chain, "unfinished", chain.top, f"Else leave {chain.top} as it is. If no VM has it")
    os.utime(chain.top)  # by the word of the user
    data = commits.content(chain.top)
    assert commits.merged(chain.top, chain.base)["state"] == "committed"
    assert commits.content(chain.base) == data


def old_version(chain: Chain) -> None:
    """Have a TOP of version 2 that goes into one with a bitmap."""
    os.unlink(chain.top)
    commits.overlay(chain.top, chain.middle, "-o", "compat=0.10")


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (old_version, "lost_bitmaps"),  # 'qemu-img amend' would have TOP look new
        (lambda chain: qemu.qemu_img("snapshot", "-c", "s", chain.top), "unsupported"),
    ],
)
def test_nothing_is_advised_that_has_an_older_image_look_new(chain, harm, code):
    harm(chain)
    told = commits.merge(chain.top, chain.base, CHECK).failures
    assert code in {one.code for one in told}, told
    os.utime(chain.top, (0, 0))
    refused(chain, "unfinished", chain.top, "may have gone in already")


def test_an_image_that_was_merged_while_its_vm_ran_has_one_reason(chain, monkeypatch):
    old_version(chain)
    monkeypatch.setattr(survey, "find_sign", lambda file: f"{file.path}.sign" if file.path == chain.top else None)
    refused(chain, "unfinished", chain.top, "its merge was begun while its VM ran")


def test_an_image_that_is_older_than_one_below_base_goes_not_into_base(chain):
    """BASE would look new then, and go into what is newer than both."""
    os.utime(chain.middle, (0, 0))
    os.utime(chain.top, (1, 1))
    with untouched(*chain):
        told = commits.refusal(chain.top, chain.middle)
    assert (told.code, f"and {chain.base} below it after that" in told.why) == ("unfinished", True)


@pytest.mark.parametrize("is_older", [False, True])
def test_an_image_above_is_as_old_after_the_merge_as_before(chain, tmp_path, is_older):
    """One that was left over must not look new, nor one look left over since the images below it were written to."""
    above = commits.overlay(tmp_path / "above", chain.top)
    further = commits.overlay(tmp_path / "further", above)
    if is_older:
        os.utime(above, (1, 1))
    assert commits.merged(chain.top, chain.base, above=above)["state"] == "committed"
    if is_older:
        assert commits.refusal(above, chain.base, above=further).code == "unfinished"
    else:
        assert commits.merged(further, above)["state"] == "committed"


def test_an_image_whose_vm_has_it_is_merged_whatever_the_times_are(chain):
    os.utime(chain.top, (0, 0))
    assert commits.merged(chain.top, chain.base, is_of_vm=True)["state"] == "committed"


def test_a_commit_that_was_begun_has_written_to_base_itself(chain, monkeypatch):
    def fail(*_args):
        raise Refusal("storage", chain.base, "fails")

    with monkeypatch.context() as patched:
        patched.setattr(MergeLayers, "give", fail)
        assert commits.refusal(chain.top, chain.base).code == "storage"
    os.utime(chain.top, ns=(0, os.stat(chain.base).st_mtime_ns - 1))
    assert commits.merged(chain.top, chain.base)["state"] == "committed"


def test_what_has_its_data_in_another_file_is_as_new_as_that(tmp_path):
    data_file = tmp_path / "data"
    base = qemu.create(tmp_path / "base", SIZE, "-o", f"data_file={data_file},data_file_raw=on")
    top = commits.overlay(tmp_path / "top", base)
    commits.write(top, "write -P 1 0 1M")
    os.utime(base, (0, 0))
    os.utime(data_file, ns=(0, os.stat(top).st_mtime_ns + 1))
    assert commits.refusal(top, base).code == "unfinished"
    os.utime(top)
    assert commits.merged(top, base)["state"] == "committed"


def test_a_block_device_does_not_tell_when_it_was_written_to(chain, monkeypatch):
    os.utime(chain.top, (0, 0))
    monkeypatch.setattr(OpenImage, "is_device", property(lambda file: file.path != chain.top))
    assert "unfinished" not in {one.code for one in commits.merge(chain.top, chain.base, CHECK).failures}


@pytest.mark.parametrize(("harm", "reason"), [(lose, "lost"), (None, "different_size")])
def test_a_bitmap_is_not_told_as_usable_for_what_is_wrong_below_base(tmp_path, harm, reason):
    """The images below it stay as they are, and so does what qcow2_info tells of them."""
    chain = a_chain(tmp_path)
    if harm is not None:
        harm(chain.base)
    else:
        os.unlink(chain.top)
        commits.overlay(chain.top, chain.middle, size=2 * SIZE)
        qemu.add_bitmaps(chain.top, [commits.bitmap("x", "recording", 65536)])
    result = commits.merged(chain.top, chain.middle)
    assert result["bitmaps"] == []
    assert result["skipped_bitmaps"] == [{"name": "x", "granularity": 65536, "reason": reason}]
    (told,) = examine_chain(chain.middle, follow=True, count=False).checkpoints
    assert (told.valid, told.problem) == (False, reason)


def test_what_was_lost_below_base_before_the_checkpoint_was_made_is_none_of_its(tmp_path):
    chain = a_chain(tmp_path)
    without_directory(chain.base)
    os.utime(chain.base, (10_000, 10_000))
    result = commits.merged(chain.top, chain.middle, created=(("x", 50_000),))
    assert ([one["name"] for one in result["bitmaps"]], result["skipped_bitmaps"]) == (["x"], [])
