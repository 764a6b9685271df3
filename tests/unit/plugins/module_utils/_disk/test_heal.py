# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the bitmaps of a chain: a table, and every kill in the healing of every short chain."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps, judge_all
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest, Standing, decide
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

# One letter for each image, top to base: has the bitmap and it is (g)ood, (d)isabled, (i)nconsistent, good in an image
# of another size (s), or it is absent (-), or absent in an image that has lost its bitmaps (l).
STATES = {"g": (True, False), "s": (True, False), "d": (False, False), "i": (True, True)}
ASKED = HealRequest("/0", ("x",))


def bitmap(letter, name="x", granularity=65536):
    return {name: Bitmap(name, granularity, *STATES[letter])} if letter in STATES else {}


def standing(letters, **more):
    return [
        Standing(
            path=f"/{place}",
            virtual_size=512 if letter == "s" else 1024,
            bitmaps=bitmap(letter),
            lost_bitmaps=letter == "l",
            **{name: value[place] for name, value in more.items() if place in value},
        )
        for place, letter in enumerate(letters)
    ]


TABLE = [
    ("g", []),
    ("ggg", []),
    ("g--", []),
    ("-g", [0]),
    ("ig", [0]),
    ("lg", [0]),
    ("-ggg", [0]),
    ("--g", [0, 1]),
    ("il-g", [0, 1, 2]),
    ("g-g", [0, 1]),
    ("gg-g", [0, 1, 2]),
    ("gigg-", [0, 1]),
    ("i", "may_be_emptied"),
    ("i--", "may_be_emptied"),
    ("gi", "not_healable"),
    ("-i", "not_healable"),
    ("g-i", "not_healable"),
    ("d", "not_healable"),
    ("dg", "not_healable"),
    ("g-d", "not_healable"),
    ("gs", "not_healable"),
    ("-s", "not_healable"),
    ("s-g", "not_healable"),
    ("-gl", "not_healable"),
    ("il", "not_healable"),
    ("---", "no_checkpoint"),
]


@pytest.mark.parametrize(("letters", "expected"), TABLE)
def test_decision_table(letters, expected):
    plan = decide(ASKED, standing(letters))
    if isinstance(expected, str):
        assert [one.problem.code for one in plan.found] == [expected]
        assert plan.written == ()
    else:
        assert [one.problem for one in plan.found] == [None] * len(plan.found)
        assert [place for place, want in plan.wants.items() for one in want.values() if one.held] == expected
        assert set(expected) <= set(plan.written)
        assert [one.valid for one in plan.checkpoints] == [True]


@pytest.mark.parametrize("letters", ["i", "i-"])
def test_the_word_of_the_user(letters):
    plan = decide(ASKED._replace(assume_not_emptied=True), standing(letters))
    assert plan.found[0].problem is None
    assert plan.wants[0]["x"].held
    assert [one.valid for one in plan.checkpoints] == [True]


@pytest.mark.parametrize("letters", ["gi", "d", "il"])
def test_the_word_of_the_user_helps_nowhere_else(letters):
    plan = decide(ASKED._replace(assume_not_emptied=True), standing(letters))
    assert plan.found[0].problem.code == "not_healable"


def test_the_granularity_is_that_of_the_image_below():
    chain = [Standing("/0", 1024, bitmap("g", granularity=4096)), Standing("/1", 1024, {})]
    chain += [Standing("/2", 1024, bitmap("g", granularity=1 << 20)), Standing("/3", 1024, bitmap("g"))]
    plan = decide(ASKED, chain)
    assert [plan.wants[place]["x"].bitmap.granularity for place in range(4)] == [1 << 20, 1 << 20, 1 << 20, 65536]


FAULT = Refusal("corrupt", "/1", "is marked corrupt")


def test_an_image_that_cannot_be_written_keeps_others_from_nothing():
    chain = [Standing("/0", 1024, {}), Standing("/1", 1024, {**bitmap("i"), **bitmap("g", "y")}, fault=FAULT)]
    chain.append(Standing("/2", 1024, {**bitmap("g"), **bitmap("g", "y")}))
    plan = decide(HealRequest("/0"), chain)
    assert [(one.name, one.problem and one.problem.code) for one in plan.found] == [("x", "corrupt"), ("y", None)]
    assert plan.written == (0,)


def test_what_others_stand_on_is_not_written_and_nothing_below_it():
    found = decide(ASKED, standing("--g", others={1: ("/clone",)})).found
    assert [(one.image, one.problem.code) for one in found] == [("/1", "has_overlay")]
    assert "a backup that libvirt has made ('virsh backup-begin'): move it away" in found[0].problem.remedy
    assert decide(ASKED, standing("-gg", others={1: ("/clone",)})).written == (0,)
    assert decide(ASKED, standing("-g", others={0: ("/on top",)})).found[0].problem.code == "has_overlay"


def test_removal_leaves_templates_alone():
    chain = standing("gg-g", others={1: ("/clone",)})
    by_name = decide(ASKED._replace(state="absent"), chain)
    assert [(one.image, one.problem and one.problem.code) for one in by_name.found] == [
        ("/0", None),
        ("/1", "has_overlay"),
        ("/3", "has_overlay"),
    ]
    assert by_name.written == (0,)
    plan = decide(HealRequest("/0", state="absent"), chain)
    assert [(one.image, one.problem) for one in plan.found] == [("/0", None)]
    nothing = decide(HealRequest("/0", state="absent"), standing("-g", others={1: ("/clone",)}))
    assert (nothing.found, nothing.written) == ((), ())


def test_cumulative_takes_in_all_that_is_below():
    plan = decide(ASKED._replace(cumulative=True), standing("ggg-"))
    assert plan.wants[0]["x"].below == (1, 2)
    assert decide(ASKED._replace(cumulative=True), standing("g-")).written == ()
    assert decide(ASKED._replace(cumulative=True), standing("gi")).written == ()


def test_a_mark_is_meant_only_by_its_name():
    chain = [Standing("/0", 1024, bitmap("i", "kvmfleet-carried-0123"))]
    assert decide(HealRequest("/0"), chain).found == ()


def test_an_image_whose_loss_would_look_valid_is_not_written():
    """The middle has a broken bitmap that the top has in order; without the middle nobody could see that."""
    middle = {**bitmap("i"), **bitmap("i", "y")}
    chain = [Standing("/0", 1024, {**bitmap("g"), **bitmap("g", "y")}), Standing("/1", 1024, middle)]
    chain.append(Standing("/2", 1024, bitmap("g", "y")))
    plan = decide(HealRequest("/0", ("y",)), chain)
    assert [(one.image, one.problem.code) for one in plan.found] == [("/1", "closes_gap")]
    assert plan.written == ()
    removed = decide(HealRequest("/0", ("x", "y"), state="absent"), chain)
    assert removed.written == (0, 1, 2)


ALL = frozenset(range(3))
NEVER = frozenset(["nobody knows"])


def really_changed(letters):
    """Return what has changed since a bitmap began: the data of each image down to the lowest that has it."""
    having = letters.rstrip("-")
    if "d" in having or having.endswith("i"):
        return NEVER  # some of it is told nowhere
    return frozenset(range(len(having)))


def marked(letters, place):
    """Return what a good bitmap marks: above an image that has not recorded it can be one that began a moment ago."""
    having = letters.rstrip("-")
    return frozenset([place]) if set(having[place:]) <= {"g"} else frozenset()


def wanted_marks(plan, place, name, letters):
    want = plan.wants[place][name]
    marks = marked(letters, place) if want.own else frozenset()
    marks |= frozenset([place]) if want.held else frozenset()
    return marks.union(*(wanted_marks(plan, lower, name, letters) for lower in want.below))


def short(chain):
    """Return the bitmaps that look valid in a chain and lack what changed. An image is {name: (bitmap, marks)}."""
    layers = [LayerBitmaps(str(place), 1024, {n: b for n, (b, _m) in one.items()}) for place, one in enumerate(chain)]
    for one in judge_all(layers, complete=True):
        if one.valid:
            yield one.name, frozenset().union(*(image[one.name][1] for image in chain if one.name in image))


@pytest.mark.parametrize(
    "request_for", [{"names": ("x",)}, {}, {"names": ("x",), "state": "absent"}, {"state": "absent"}]
)
def test_no_kill_in_any_step_leaves_what_looks_valid_and_is_not(request_for):
    written = 0
    for x, y in itertools.product(map("".join, itertools.product("gdi-", repeat=3)), repeat=2):
        letters = {"x": x, "y": y}
        changed = {name: really_changed(one) for name, one in letters.items()}
        chain = [Standing(f"/{p}", 1024, {**bitmap(x[p]), **bitmap(y[p], "y")}) for p in range(3)]
        before = [{n: (b, marked(letters[n], p)) for n, b in chain[p].bitmaps.items()} for p in range(3)]
        plan = decide(HealRequest("/0", **request_for), chain)
        now = list(before)
        for place in plan.written:
            after = {n: (w.bitmap, wanted_marks(plan, place, n, letters[n])) for n, w in plan.wants[place].items()}
            for state in ({}, after):  # killed while QEMU opens it, and done
                now[place] = state
                for name, marks in short(now):
                    assert changed[name] <= marks, (x, y, place, name)
        written += bool(plan.written)
    assert written > 500


def with_vault(lost_names):
    """Return an image with x on one that has lost bitmaps, of which its vault has only y."""
    top, base = standing("gl", put_back={1: frozenset("y")}, lost_names={1: lost_names})
    return [top, base._replace(bitmaps=bitmap("g", "y"))]


def test_a_vault_answers_only_for_what_it_has():
    asked = HealRequest("/0", ("x", "y"))
    plan = decide(asked, with_vault(frozenset("y")))
    assert [one.problem for one in plan.found if one.name == "x"] == [None]
    assert plan.barred == {}
    for lost_names in (frozenset("xy"), None):
        plan = decide(asked, with_vault(lost_names))
        assert plan.barred[1].code == "closes_gap"  # x would look valid once y is put back
        assert "perhaps 'x', too" in plan.barred[1].why
        assert [one.problem.code for one in plan.found if one.name == "x"] == ["not_healable"]
        assert decide(asked._replace(names=("y",), removed=("x",)), with_vault(lost_names)).barred == {}


def test_an_image_that_has_lost_others_is_written():
    """What hides no loss is barred by nothing."""
    chain = standing("glg", lost_names={1: frozenset("z")})
    own = Standing("/0", 1024, {**bitmap("g"), **bitmap("g", "y")})
    plan = decide(ASKED, [own, *chain[1:]])
    assert [one.problem for one in plan.found] == [None, None]
    assert {one.name for one in plan.checkpoints if one.valid} == {"x", "y"}
    chain = standing("gllg", lost_names={1: frozenset("z"), 2: frozenset("y")})
    assert set(decide(ASKED, [own, *chain[1:]]).barred) == {2}


def test_nothing_is_rebuilt_from_a_bitmap_that_is_older_than_its_checkpoint():
    chain = standing("-g", modified={1: 10_000})
    (found,) = decide(ASKED._replace(created=(("x", 50_000),)), chain).found
    assert (found.problem.code, found.image) == ("not_healable", "/1")
    assert "its own is another one's" in found.problem.why
    assert decide(ASKED._replace(created=(("x", 10_000),)), chain).written == (0,)


def test_no_image_is_written_that_alone_tells_why_a_bitmap_above_it_is_not_valid():
    """It has lost its bitmaps: y of the topmost one can have begun there."""
    chain = standing("glg")
    own = Standing("/0", 1024, {**bitmap("g"), **bitmap("g", "y")})
    plan = decide(ASKED, [own, *chain[1:]])
    assert [one.problem.code for one in plan.found] == ["closes_gap"]
    assert plan.written == ()
    plan = decide(ASKED._replace(removed=("y",)), [own, *chain[1:]])
    assert (plan.written, [one.problem for one in plan.found]) == ((0, 1), [None, None, None])
    assert {one.name for one in plan.checkpoints if one.valid} == {"x"}


def test_an_image_is_written_that_lacks_what_the_overlay_on_it_goes_on_with():
    """The overlay tells it, also once that image has other bitmaps."""
    chain = standing("g-g", made={0: 90_000})
    chain[0] = chain[0]._replace(bitmaps={**chain[0].bitmaps, **bitmap("g", "y")})
    plan = decide(ASKED._replace(created=(("y", 50_000),)), chain)
    assert (plan.written, [one.problem for one in plan.found]) == ((0, 1), [None] * 2)
    assert {one.name for one in plan.checkpoints if one.valid} == {"x"}


@pytest.mark.parametrize("top", ["-", "i", "g"])
def test_no_image_is_written_that_tells_what_can_be_healed_once_nothing_tells_it(top):
    """Whatever else is wrong with y, which can have begun in the image that has lost its bitmaps."""
    images = standing("--lg", lost_names={2: frozenset("y")})
    chain = [images[0]._replace(bitmaps=bitmap(top, "y")), images[1]._replace(bitmaps=bitmap("g", "y")), *images[2:]]
    for names in (("x",), ("x", "y")):
        plan = decide(ASKED._replace(names=names), chain)
        assert plan.written == ()
        assert plan.barred[2].code == "closes_gap"
    plan = decide(ASKED._replace(removed=("y",)), chain)
    assert plan.written == (0, 1, 2)
    assert [one.problem for one in plan.found if one.name == "x"] == [None] * 3


def test_no_image_is_written_whose_time_tells_that_a_bitmap_is_older_than_its_checkpoint():
    """The topmost one tells it of a bitmap that looks valid else, another one of what could be rebuilt above it."""
    created = (("x", 5_000), ("y", 50_000))
    for letters, place in (("-g", 0), ("--g", 1), ("---g", 2)):
        chain = standing(letters, modified=dict.fromkeys(range(place), 60000) | {place: 10_000})
        chain[place] = chain[place]._replace(bitmaps=bitmap("g", "y"))
        plan = decide(ASKED._replace(created=created), chain)
        assert plan.written == ()
        assert plan.barred[place].code == "closes_gap"
        assert "older than the checkpoint of 'y'" in plan.barred[place].why
        plan = decide(ASKED._replace(created=created, removed=("y",)), chain)
        assert plan.written == tuple(range(place + 1))
        assert {one.name for one in plan.checkpoints if one.valid} == {"x"}


BOTH = {**bitmap("g"), **bitmap("g", "y")}
RE_USED = (("x", 50_000), ("y", 60_000))


def test_an_older_bitmap_below_one_that_is_valid_keeps_nothing_from_being_removed():
    """Names are used again: those further down are earlier ones, and only add bits."""
    chain = [Standing("/0", 1024, BOTH, modified=90_000), Standing("/1", 1024, BOTH, modified=10_000)]
    for name, other in ("xy", "yx"):
        plan = decide(HealRequest("/0", (name,), "absent", created=RE_USED), chain)
        assert (plan.barred, plan.written) == ({}, (0, 1))
        assert [(one.name, one.valid) for one in plan.checkpoints] == [(other, True)]
        assert plan.wants[0][other].below == (1,)  # before the image below it is written
    doubtful = chain[0]._replace(put_back=frozenset("xy"), doubtful={"y": FAULT})
    for top in (doubtful, chain[0]._replace(bitmaps=bitmap("g")), chain[0]._replace(modified=10_000)):
        plan = decide(HealRequest("/0", ("x",), "absent", created=RE_USED), [top, chain[1]])
        assert plan.barred[1].code == "closes_gap"


def test_an_image_is_written_while_another_one_goes_on_telling_that_a_bitmap_is_older():
    chain = standing("-gg", modified=dict.fromkeys((1, 2), 10_000), others={2: ("/clone",)})
    removed = HealRequest("/0", (), removed=("x",), created=RE_USED)
    plan = decide(removed, chain)
    assert ([(one.image, one.problem) for one in plan.found], plan.written) == ([("/1", None)], (1,))
    plan = decide(removed, [*chain[:2], chain[2]._replace(modified=90_000)])
    assert (plan.found[0].problem.code, plan.written) == ("closes_gap", ())


def test_of_bitmaps_that_are_in_the_way_of_each_other_all_are_named():
    """Whichever of them one call removes, the others stand in its way."""
    older = [Standing("/0", 1024, BOTH, modified=10_000)]
    broken = [Standing("/0", 1024, BOTH), Standing("/1", 1024, {**bitmap("i"), **bitmap("i", "y")})]
    for chain, place in ((older, 0), (broken, 1)):
        for name in "xy":
            asked = HealRequest("/0", (name,), "absent", created=RE_USED)
            assert "emove 'x', 'y', all in one call" in decide(asked, chain).barred[place].remedy
        plan = decide(HealRequest("/0", ("x", "y"), "absent", created=RE_USED), chain)
        assert (plan.barred, plan.written) == ({}, tuple(range(len(chain))))
