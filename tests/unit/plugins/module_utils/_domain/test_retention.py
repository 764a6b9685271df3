# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which snapshots of a domain are old enough to go, and which go together."""

from __future__ import annotations

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.retention import (
    OwnImage,
    Picked,
    Retention,
    Step,
    pick,
    seconds_of,
    steps,
)

DAY = 86400
NOW = 1_000 * DAY


def disk(target, *snapshots, first=1):
    """Return the images of a disk from the lowest upwards, from name and age in days; a name of None is not ours."""
    return [
        OwnImage(target, name, place, None if days is None else NOW - days * DAY, 1000)
        for place, (name, days) in enumerate(snapshots, start=first)
        if name is not None
    ]


def names(images, older_than=30, keep=0, begun=()):
    """Return the names of what is picked."""
    return [one.snapshot for one in pick(images, begun, Retention(older_than and older_than * DAY, keep, NOW))]


THREE = disk("vda", ("a", 60), ("b", 40), ("c", 0))


@pytest.mark.parametrize(
    "images, more, expected",
    [
        (THREE, {}, ["a", "b"]),
        (THREE, {"keep": 1}, ["a", "b"]),
        (THREE, {"keep": 2}, ["a"]),
        (THREE, {"keep": 9}, []),
        (THREE, {"older_than": None, "keep": 1}, ["a", "b"]),
        (THREE, {"older_than": None}, ["a", "b", "c"]),
        (THREE, {"older_than": 40}, ["a"]),  # just as old is not older
        (disk("vda", ("a", 60), ("b", None)), {}, ["a"]),  # what cannot be told is not old
        ([], {}, []),
        # A merge has written to the base, so that a counts from then, and b is older by that.
        (disk("vda", ("a", 0), ("b", 40)), {}, ["b"]),
        # The latest of all disks counts.
        ([*disk("vda", ("a", 60)), *disk("vdb", ("a", 0))], {}, []),
        ([*disk("vda", ("a", 60)), *disk("vdb", ("a", None))], {}, []),
        # Of a disk that was added later, too, the lower one is the older one.
        ([*disk("vdb", ("b", 40), ("c", 35)), *disk("vda", ("a", 60), ("b", 40))], {}, ["a", "b", "c"]),
        ([*disk("vdb", ("b", 40), ("c", 35)), *disk("vda", ("a", 60), ("b", 40))], {"keep": 1}, ["a", "b"]),
        # Disks that contradict each other end the search all the same.
        ([*disk("vda", ("a", 60), ("b", 60)), *disk("vdb", ("b", 60), ("a", 60))], {}, ["a", "b"]),
        # What was begun is completed, whatever its age, and whether or not it is in a chain still.
        (THREE, {"keep": 9, "begun": ["c"]}, ["c"]),
        (THREE, {"begun": ["gone"]}, ["gone", "a", "b"]),
        # It goes anyway, so it takes no place among those that stay.
        (THREE, {"older_than": None, "keep": 2, "begun": ["c"]}, ["c"]),
        (THREE, {"older_than": None, "keep": 1, "begun": ["c"]}, ["a", "c"]),
    ],
)
def test_the_old_ones_are_picked(images, more, expected):
    assert names(images, **more) == expected


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("keep", range(13))
def test_so_many_are_kept_however_many_there_are(count, keep):
    own = [f"s{number}" for number in range(count)]
    images = disk("vda", *((name, 60) for name in own))
    assert names(images, older_than=None, keep=keep) == own[: max(count - keep, 0)]
    assert names(images, keep=keep) == own[: max(count - keep, 0)]


def test_what_each_would_free_is_told():
    images = [*disk("vda", ("a", 60)), *disk("vdb", ("a", 50))]
    picked = pick(images, [], Retention(30 * DAY, 0, NOW))
    assert picked == [Picked("a", NOW - 50 * DAY, 2000)]
    assert picked[0].as_result() == {"snapshot": "a", "modified": NOW - 50 * DAY, "size": 2000}


def together(images, *picked, begun=(), joins=True):
    """Return the steps as texts."""
    found = steps([Picked(name, None, 0) for name in picked], images, begun, joins=joins)
    return ["-".join(dict.fromkeys([one.lowest, one.highest])) for one in found]


def test_snapshots_that_lie_on_each_other_go_together():
    assert together(THREE, "a", "b", "c") == ["a-c"]
    assert together(THREE, "a", "b") == ["a-b"]
    assert together(THREE, "a", "c") == ["a", "c"]
    assert together(THREE, "a", "b", "c", joins=False) == ["a", "b", "c"]
    assert together(THREE) == []
    assert steps([Picked("a", None, 0)], THREE, joins=True) == [Step("a", "a")]


def test_an_image_of_somebody_else_between_them_parts_them():
    assert together(disk("vda", ("a", 60), (None, 50), ("b", 40)), "a", "b") == ["a", "b"]


def test_only_what_is_on_the_same_disks_goes_together():
    assert together([*THREE, *disk("vdb", ("a", 60), ("b", 40))], "a", "b") == ["a-b"]
    assert together([*THREE, *disk("vdb", ("b", 40))], "a", "b") == ["a", "b"]
    assert together([*THREE, *disk("vdb", ("a", 40))], "a", "b") == ["a", "b"]
    assert together([*THREE, *disk("vdb", ("a", 60), (None, 50), ("b", 40))], "a", "b") == ["a", "b"]
    assert together([], "gone", "lost") == ["gone", "lost"]


@pytest.mark.parametrize(
    "begun, expected",
    [
        ([("a", "b")], ["a-b", "c"]),
        ([("b",)], ["b", "a", "c"]),  # the vault in a lets nothing else pass
        ([("a",)], ["a", "b-c"]),
        ([("b",), ("a", "b")], ["a-b", "c"]),  # one disk of two is done
        ([("a", "b"), ("b",)], ["a-b", "c"]),
        ([("gone",)], ["gone", "a-c"]),
    ],
)
def test_what_was_begun_is_brought_to_its_own_end_first(begun, expected):
    """Its vault is of its own topmost image, and would refuse the others for ever."""
    assert together(THREE, *(["gone"] if begun == [("gone",)] else []), "a", "b", "c", begun=begun) == expected
    assert together(THREE, "a", "b", "c", begun=begun, joins=False) == ["a", "b", "c"]


@pytest.mark.parametrize("text, seconds", [("30d", 30 * DAY), ("12h", 43200), (" 2w ", 14 * DAY)])
def test_an_age_has_its_seconds(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["30", "0d", "-1d", "d", "30 d", "1.5d", "30m", "30D", "", "1234567d"])
def test_what_is_no_age_is_refused(text):
    with pytest.raises(Refusal) as refused:
        seconds_of(text)
    assert refused.value.code == "bad_option"
