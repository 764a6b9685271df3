# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a domain is worth for its next incremental backup."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import ExaminedChain, ExaminedLayer
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import MARK
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.verdicts import (
    DiskLook,
    judge_domain,
    next_backup,
    orphan_bitmaps,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import KnownCheckpoint, LiveBitmaps
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import DomainDisk
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import Layer
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import Image

SIZE = 1 << 26


def image(bitmaps):
    given = {name: Bitmap(name, 65536, recording=True, inconsistent=state == "broken") for name, state in bitmaps}
    flags = dict.fromkeys(
        ("encrypted", "encrypted_with_aes", "dirty", "corrupt", "lazy_refcounts", "extended_l2"), False
    )
    return Image(
        version=3,
        virtual_size=SIZE,
        cluster_size=65536,
        refcount_bits=16,
        backing_file=None,
        backing_format=None,
        compression_type="zlib",
        has_data_file=False,
        data_file=None,
        data_file_raw=False,
        bitmaps=tuple(given.values()),
        bitmap_tables=(),
        lost_bitmaps=0,
        **flags,
    )


def layer(path, names="", *, is_open=False):
    """Return an image with bitmaps; "one two!" are a good one and a broken one."""
    bitmaps = [(name.rstrip("!"), "broken" if name.endswith("!") else "good") for name in names.split()]
    found = image(bitmaps)
    read = Layer(path, path, (1, hash(path)), "qcow2", "qcow2", SIZE, is_device=False, image=found)
    return ExaminedLayer(read, found, is_open, actual_size=0, modified=0, dirty={})


def look(target="vda", *layers, dirty=None, top=None, problem=None, stated=None, why_unfit=None, image_format="qcow2"):
    """Return a disk with these images, top to base."""
    source = f"/srv/{target}"
    disk = DomainDisk(target, "file", source, image_format, why_unfit, opted_out=False, stated_chain=None)
    chain = ExaminedChain(
        path=source,
        layers=layers,
        is_complete=problem is None,
        checkpoints=(),
        dirty=dirty or {},
        dirty_top=dirty if top is None else top,
        problem=problem,
        warnings=(),
    )
    return DiskLook(disk, why_unfit, chain, stated or problem)


def known(name="one", *targets, created=1, live=None, **more):
    return KnownCheckpoint(name, dict.fromkeys(targets or ("vda",), name), created=created, live=live, **more)


def judged(checkpoint, *disks, counts=True):
    (verdict,) = judge_domain([checkpoint], disks, counts=counts)
    return verdict


GONE = Refusal("no_such_file", "/srv/base", "does not exist")
OTHER = Refusal("other_chain", "web", "the definition says something else")


def test_a_checkpoint_is_valid_if_it_is_valid_on_each_disk_that_takes_part():
    good, bad = look("vda", layer("/a", "one"), dirty={"one": 65536}), look("vdb", layer("/b", "two"))
    assert judged(known("one", "vda"), good, bad).verdict.valid is True
    both = judged(known("one", "vda", "vdb"), good, bad)
    assert (both.verdict.name, both.verdict.valid, both.verdict.problem) == ("one", False, "not_in_top")
    assert both.verdict.image == "/b"
    assert (both.dirty_bytes, both.top_alone) == (None, None)


def test_a_broken_disk_outweighs_one_of_which_nothing_can_be_told():
    unread, bad = look("vda", problem=GONE), look("vdb", layer("/b"))
    assert judged(known("one", "vda"), unread).verdict.problem == "incomplete"
    assert judged(known("one", "vda", "vdb"), unread, bad).verdict.problem == "not_in_top"


def test_the_bitmap_of_a_disk_may_have_another_name():
    checkpoint = KnownCheckpoint("one", {"vda": "b"})
    verdict = judged(checkpoint, look("vda", layer("/a", "b"), dirty={"b": 1}))
    assert (verdict.verdict.name, verdict.verdict.valid, verdict.dirty_bytes) == ("one", True, 1)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (({"one": 5}, {"one": 5}), ({"one": 7}, {"one": 7}), (12, True)),
        (({"one": 5}, {"one": 5}), ({"one": 7}, {"one": 6}), (12, False)),
        (({"one": 5}, {"one": 5}), ({}, {}), (None, None)),
    ],
)
def test_dirty_bytes_are_those_of_all_disks(first, second, expected):
    disks = [
        look(target, layer("/x", "one"), dirty=dirty, top=top)
        for target, (dirty, top) in {"vda": first, "vdb": second}.items()
    ]
    verdict = judged(known("one", "vda", "vdb"), *disks)
    assert (verdict.dirty_bytes, verdict.top_alone) == expected
    verdict = judged(known("one", "vda", "vdb"), *disks, counts=False)
    assert (verdict.verdict.valid, verdict.dirty_bytes, verdict.top_alone) == (True, None, None)


def test_a_chain_that_is_read_in_part_tells_what_is_wrong_and_never_that_all_is_right():
    assert judged(known(), look("vda", layer("/a", "one"), problem=GONE)).verdict.valid is None
    assert judged(known(), look("vda", layer("/a", "one!"), problem=GONE)).verdict.problem == "inconsistent"
    # All of it was read, and then something else went wrong.
    read = look("vda", layer("/a", "one"), problem=GONE)
    verdict = judged(known(), read._replace(chain=read.chain._replace(is_complete=True))).verdict
    assert (verdict.valid, verdict.problem, verdict.advice) == (None, "incomplete", str(GONE))


def test_of_a_chain_that_the_guest_does_not_see_nothing_is_told():
    for names in ("one", "one!"):
        verdict = judged(known(), look("vda", layer("/a", names), stated=OTHER)).verdict
        assert (verdict.valid, verdict.problem, verdict.advice) == (None, "incomplete", str(OTHER))


def test_a_disk_without_an_image_that_can_be_read():
    disk = look("vda")._replace(chain=None)
    verdict = judged(known(), disk).verdict
    assert (verdict.valid, verdict.problem) == (None, "incomplete")
    assert "disk vda" in verdict.advice


THEN = {"vda": frozenset(["/a.s1", "/a", "/t"]), "vdb": frozenset(["/b.s1", "/b", "/t"])}


@pytest.mark.parametrize(
    ("first", "second", "problems"),
    [
        ("/a.s1 /a /t", "/b.s1 /b /t", [None, None]),
        ("/b.s1 /b /t", "/a.s1 /a /t", ["swapped", "swapped"]),
        ("/b /t", "/a /t", ["swapped", "swapped"]),  # merged down since
        ("/n.s2 /b", "/b.s2 /b", ["swapped", None]),  # a linked clone of the other disk
        ("/n /t", "/b.s2 /b.s1", [None, None]),  # a move, or a copy
        ("/moved", "/b", [None, None]),
        ("/new", "/a", [None, "swapped"]),
    ],
)
def test_a_disk_that_was_another_one_has_no_valid_checkpoint_and_one_with_other_images_has(first, second, problems):
    disks = [
        look("vda", *(layer(path, "one") for path in first.split())),
        look("vdb", *(layer(path, "one") for path in second.split())),
    ]
    for live in (None, LiveBitmaps({"vda": 0, "vdb": 0})):  # libvirt goes by the targets
        checkpoint = known("one", "vda", "vdb", images=THEN, live=live)
        verdict = judged(checkpoint, *disks, counts=False).verdict
        assert (verdict.valid, verdict.problem) == ((problems == [None, None]), max(problems, key=bool))
        for disk, problem in zip(disks, problems):
            alone = known("one", disk.disk.target, images=THEN, live=live)
            verdict = judged(alone, disk, counts=False).verdict
            assert (verdict.problem, verdict.image) == (problem, disk.disk.source if problem else None)
            for way in ("give the targets back ('virsh edit')", "If only the files were moved or renamed"):
                assert (way in (verdict.advice or "")) == bool(problem)
    told = judge_domain([known("one", "vda", "vdb", images=THEN)], disks, counts=False)
    assert next_backup(told, disks).kind == ("full" if any(problems) else "incremental")


def test_a_checkpoint_whose_disks_are_gone():
    verdict = judged(known("one", "vdz"), look("vda", layer("/a", "one"))).verdict
    assert (verdict.valid, verdict.problem) == (None, "incomplete")
    assert "none of the disks" in verdict.advice


# A domain that runs


def running(*lower, names=""):
    return look("vda", layer("/top", names, is_open=True), *lower)


def test_libvirt_tells_of_a_domain_that_runs():
    live = LiveBitmaps({"vda": 65536, "vdb": 0})
    disks = [running(names="one!"), look("vdb", layer("/b", is_open=True))]
    verdict = judged(known("one", "vda", "vdb", live=live), *disks)
    assert (verdict.verdict.valid, verdict.dirty_bytes, verdict.top_alone) == (True, 65536, None)
    assert judged(known("one", "vda", "vdb", live=live), *disks, counts=False).dirty_bytes is None


def test_without_a_size_it_is_broken_though_what_is_stored_looks_fine():
    verdict = judged(known(live=LiveBitmaps({})), running(layer("/base", "one"), names="one!")).verdict
    assert (verdict.valid, verdict.problem, verdict.image) == (False, "broken", None)
    assert "disk vda" in verdict.advice


def test_the_images_below_tell_where_it_is_broken():
    verdict = judged(known(live=LiveBitmaps({})), running(layer("/base", "one!"), names="one!")).verdict
    assert (verdict.valid, verdict.problem, verdict.image) == (False, "inconsistent", "/base")


def test_libvirt_has_the_last_word():
    verdict = judged(known(live=LiveBitmaps({"vda": 1})), running(layer("/base", "one!"))).verdict
    assert verdict.valid is True


def test_where_libvirt_cannot_tell_nothing_is_guessed():
    live = LiveBitmaps(problem="unsupported flags (0x4)")
    verdict = judged(known(live=live), running(layer("/base", "one"), names="one")).verdict
    assert (verdict.valid, verdict.problem) == (None, "in_use")
    assert "unsupported flags" in verdict.advice
    assert judged(known(live=live), running(layer("/base", "one!"))).verdict.valid is False
    # The stored image looks fine, as if the domain had been shut off meanwhile.
    assert judged(known(live=live), look("vda", layer("/a", "one"))).verdict.valid is None


# The order, and what the next backup can be


def test_checkpoints_are_in_the_order_in_which_they_were_made():
    named = [
        known("b", created=5),
        known("a", created=5, parent="b"),
        known("c", created=5, parent="a"),
        known("old", created=1),
        known("lost", created=5, parent="nobody"),
    ]
    assert [one.known.name for one in judge_domain(named, [], counts=True)] == ["old", "b", "lost", "a", "c"]


def test_a_loop_of_parents_ends():
    named = [known("a", parent="b"), known("b", parent="a")]
    assert len(judge_domain(named, [], counts=True)) == 2


def next_of(names, *disks, **more):
    """Return what the next backup can be, of checkpoints of these names, the oldest first."""
    checkpoints = [known(name, created=number, **more) for number, name in enumerate(names.split())]
    return next_backup(judge_domain(checkpoints, disks, counts=False), disks)


def test_without_a_checkpoint_the_next_backup_is_a_full_one():
    assert next_of("", look("vda", layer("/a", "one"))) == ("full", None, "libvirt knows no checkpoint of the domain.")
    assert next_of("", look("vda", layer("/a"), image_format="raw")).reason.endswith("it writes to no qcow2 disk.")


def test_the_next_backup_is_since_the_newest_checkpoint():
    found = next_of("one two", look("vda", layer("/a", "one two")))
    assert found == ("incremental", "two", "An increment since the checkpoint 'two' is possible.")


def test_it_is_since_an_older_one_if_the_newest_is_broken_and_says_so():
    found = next_of("one two three", look("vda", layer("/a", "one two!")))
    assert found[:2] == ("incremental", "one")
    assert "The checkpoint 'three' is not valid (not_in_top in /a)." in found.reason
    assert found.reason.endswith("The checkpoint 'two' is not valid (inconsistent in /a).")


def test_it_is_a_full_one_if_all_are_broken():
    found = next_of("one two", look("vda", layer("/a", "one!")))
    assert found[:2] == ("full", None)
    assert found.reason.startswith("The checkpoint 'two' is not valid (not_in_top in /a).")
    assert "older" in found.reason


def test_it_is_unknown_if_of_any_nothing_can_be_told_and_none_is_valid():
    disks = [look("vda", layer("/a", "one!"), problem=GONE)]
    assert next_of("one", *disks)[0] == "full"
    disks = [look("vda", layer("/a", "one two!"), problem=GONE)]
    found = next_of("one two", *disks)
    assert found[:2] == ("unknown", None)
    assert found.reason == "Whether the checkpoint 'one' is valid cannot be told (incomplete in /a)."


def test_a_disk_that_came_later_needs_a_full_backup_unless_it_was_left_out():
    disks = [look("vda", layer("/a", "one")), look("vdb", layer("/b"))]
    found = next_of("one", *disks)
    assert found[:2] == ("full", None)
    assert "older than the disks vdb" in found.reason
    assert next_of("one", *disks, left_out=frozenset(["vdb"]))[0] == "incremental"


def test_a_disk_that_was_left_out_and_has_another_target_now_covers_no_other():
    disks = [look("vda", layer("/new", "one")), look("vdb", layer("/a"))]
    found = next_of("one", *disks, left_out=frozenset(["vdb"]), images=THEN)
    assert (found.kind, "older than the disks vdb" in found.reason) == ("full", True)
    disks[1] = look("vdb", layer("/b"))
    assert next_of("one", *disks, left_out=frozenset(["vdb"]), images=THEN).kind == "incremental"


@pytest.mark.parametrize(
    "more", [{"why_unfit": "cdrom"}, {"why_unfit": "read-only"}, {"why_unfit": "transient"}, {"image_format": "raw"}]
)
def test_a_disk_of_which_libvirt_makes_no_checkpoint_does_not_count(more):
    assert next_of("one", look("vda", layer("/a", "one")), look("vdb", layer("/b"), **more))[0] == "incremental"


# Orphans


def test_orphans_are_bitmaps_of_the_topmost_image_that_no_checkpoint_refers_to():
    """On whichever disk: the target of one can be another since."""
    mark = MARK + "0123"
    disks = [
        look("vda", layer("/a", f"one old {mark}"), layer("/base", "older")),
        look("vdb", layer("/b", "one")),
        look("vdc", layer("/c", "theirs"), why_unfit="read-only"),
        look("vdd", problem=GONE),
    ]
    assert orphan_bitmaps([known("one", "vda")], disks) == [
        {"target": "vda", "image": "/srv/vda", "bitmaps": ["old"]},
    ]


def test_orphans_of_a_domain_that_runs_cannot_be_told():
    disks = [look("vda", layer("/a", "old")), look("vdb", layer("/b", "one", is_open=True))]
    assert orphan_bitmaps([], disks) is None
    assert orphan_bitmaps([], disks[:1]) == [{"target": "vda", "image": "/srv/vda", "bitmaps": ["old"]}]


def test_what_qemu_has_not_stored_of_an_image_below_is_not_verified():
    base = layer("/base", is_open=True)
    verdict = judged(known(live=LiveBitmaps({"vda": 0})), running(base, names="one!"), counts=True).verdict
    assert (verdict.valid, verdict.problem, verdict.image) == (None, "in_use", "/base")
    assert "before the domain is shut off" in verdict.advice


def test_libvirt_does_not_see_that_an_image_below_has_lost_its_bitmaps():
    """Its QEMU opens that image without them, and merges for a backup what the others have."""
    base = layer("/base")
    lost = base._replace(image=base.image._replace(lost_bitmaps=1))
    live = LiveBitmaps({"vda": 0})
    assert judged(known(live=live), running(base, names="one!"), counts=False).verdict.valid is True
    verdict = judged(known(live=live), running(lost, names="one!"), counts=False).verdict
    assert (verdict.valid, verdict.problem, verdict.image) == (False, "lost", "/base")
