# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which checkpoints are valid: a table, and every chain of up to five images against libvirt's rule put another way."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import (
    LayerBitmaps,
    judge,
    judge_all,
    why_not_provable,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import HealRequest, Standing, decide
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

# One letter for each image, top to base: has the bitmap and it is (g)ood, (d)isabled, (i)nconsistent, both (b), good in
# an image of another size (s), or it is absent (-), or absent in one that has lost its own (l). In capitals: the image
# is open for writing.
STATES = {
    "g": Bitmap("x", 65536, True, False),
    "d": Bitmap("x", 65536, False, False),
    "i": Bitmap("x", 65536, True, True),
    "b": Bitmap("x", 65536, False, True),
    "s": Bitmap("x", 65536, True, False),
}


def link(letter, number):
    """Return the image that a letter stands for."""
    bitmap = STATES.get(letter.lower())
    size = 512 if letter == "s" else 1024
    return LayerBitmaps(
        f"/{number}",
        size,
        {"x": bitmap} if bitmap else {},
        is_open_for_writing=letter.isupper() or letter == "_",
        lost_bitmaps=letter == "l",
    )


def judged(letters, complete=True):
    """Return (valid, problem, number of the image at fault) for a chain; _ is an image that lacks it and is open."""
    chain = [link(letter, number) for number, letter in enumerate(letters)]
    verdict = judge("x", chain, complete=complete)
    assert verdict.name == "x"
    assert (verdict.advice is None) == (verdict.valid is True)
    return verdict.valid, verdict.problem, int(verdict.image[1:]) if verdict.image else None


TABLE = [
    ("g", True, None, None),
    ("ggggg", True, None, None),
    ("g----", True, None, None),
    ("ggg--", True, None, None),
    ("gl", False, "lost", 1),
    ("gg-l-", False, "lost", 3),
    ("_gl", False, "lost", 2),
    ("_l", False, "lost", 1),
    ("lg", False, "not_in_top", 0),
    ("glg", False, "gap", 1),
    ("gdl", False, "not_recording", 1),
    ("-g", False, "not_in_top", 0),
    ("--d--", False, "not_in_top", 0),
    ("-ii", False, "not_in_top", 0),
    ("g-g", False, "gap", 1),
    ("gg--g", False, "gap", 2),
    ("g-g-g", False, "gap", 1),
    ("g-i", False, "gap", 1),
    ("d", False, "not_recording", 0),
    ("gd", False, "not_recording", 1),
    ("ggggd", False, "not_recording", 4),
    ("dg", False, "not_recording", 0),
    ("i", False, "inconsistent", 0),
    ("gi", False, "inconsistent", 1),
    ("ggi-g", False, "inconsistent", 2),
    ("b", False, "inconsistent", 0),
    ("di", False, "not_recording", 0),
    ("id", False, "inconsistent", 0),
    ("gs", False, "different_size", 1),
    ("gss", False, "different_size", 1),
    ("g-s", False, "gap", 1),
    ("ss", True, None, None),
    # A running VM: nothing is known of its topmost image, but what is wrong further down is wrong.
    ("G", None, "in_use", 0),
    ("I", None, "in_use", 0),
    ("D", None, "in_use", 0),
    ("Igg", None, "in_use", 0),
    ("_gg", None, "in_use", 0),
    ("Ig-g", False, "gap", 2),
    ("_-g", False, "gap", 1),
    ("Id", False, "not_recording", 1),
    ("Gs", False, "different_size", 1),
    ("_ss", False, "different_size", 1),
    ("_i", False, "inconsistent", 1),
    # An image further down is open: the VM's topmost image is another one.
    ("gIg", None, "in_use", 1),
    ("III", None, "in_use", 0),
    ("gI-", None, "in_use", 1),
    ("-I", False, "not_in_top", 0),
    ("g-I", None, "in_use", 2),
    ("g-Ig", False, "gap", 1),
]


@pytest.mark.parametrize("letters, valid, problem, image", TABLE)
def test_decision_table(letters, valid, problem, image):
    assert judged(letters) == (valid, problem, image)


@pytest.mark.parametrize("letters, valid, problem, image", TABLE)
def test_a_chain_that_was_not_read_to_its_base_is_never_valid(letters, valid, problem, image):
    expected = (None, "incomplete", len(letters) - 1) if valid else (valid, problem, image)
    assert judged(letters, complete=False) == expected


@pytest.mark.parametrize("length", range(1, 6))
def test_libvirts_rule_on_every_chain(length):
    valid = 0
    for letters in map("".join, itertools.product("gdib-", repeat=length)):
        if not letters.strip("-"):
            continue  # the name occurs nowhere
        having = letters.rstrip("-")
        expected = bool(having) and set(having) == {"g"}
        assert judged(letters)[0] is expected, letters
        valid += expected
    assert valid == length


def test_every_name_of_the_chain_is_judged_once_in_order_of_appearance():
    names = [["b", "a"], ["a", "c"], ["b"]]
    chain = [LayerBitmaps(f"/{i}", 1, {n: Bitmap(n, 512, True, False) for n in row}) for i, row in enumerate(names)]
    verdicts = [(one.name, one.valid, one.problem) for one in judge_all(chain, complete=True)]
    assert verdicts == [("b", False, "gap"), ("a", True, None), ("c", False, "not_in_top")]
    assert judge_all([], complete=True) == []


def test_advice_names_the_images_and_the_cause():
    good = {"x": STATES["g"]}
    advice = judge("x", [LayerBitmaps("/top", 1, {}), LayerBitmaps("/base", 1, good)]).advice
    assert "/base below has it" in advice
    assert "qemu-img" in advice
    assert "makes it valid again" in advice
    advice = judge("x", [LayerBitmaps("/top", 1, {}), LayerBitmaps("/base", 1, {})]).advice
    assert "put back to an image below the one that has it" in advice
    assert "full backup" in advice
    assert "valid again" not in advice
    advice = judge("x", [LayerBitmaps("/top", 1, {}, lost_bitmaps=2), LayerBitmaps("/base", 1, good)]).advice
    assert "does not know bitmaps" in advice
    assert "qemu-img" not in advice
    advice = judge("x", [LayerBitmaps("/top", 2048, good), LayerBitmaps("/base", 1024, good)]).advice
    assert "1024 bytes and the one above it 2048" in advice


@pytest.mark.parametrize("length", range(1, 6))
def test_the_advice_is_what_the_healing_does(length):
    healed = 0
    for letters in map("".join, itertools.product("gdibs-", repeat=length)):
        chain = [link(letter, number) for number, letter in enumerate(letters)]
        verdict = judge("x", chain)
        if verdict.valid or not letters.strip("-"):
            continue
        standing = [Standing(one.path, one.virtual_size, one.bitmaps) for one in chain]
        plan = decide(HealRequest("/0", ("x",)), standing)
        by_word = decide(HealRequest("/0", ("x",), assume_not_emptied=True), standing)
        can = plan.found[0].problem is None
        assert can == ("makes it valid again" in verdict.advice), letters
        can_by_word = not can and by_word.found[0].problem is None
        assert can_by_word == ("assume_not_emptied" in verdict.advice), letters
        assert ("cannot be made valid again" in verdict.advice) == (not can and not can_by_word), letters
        assert ([one.valid for one in plan.checkpoints] == [True]) == can, letters
        healed += can
    assert healed or length == 1


def test_what_was_lost_before_the_checkpoint_was_made_is_none_of_its():
    """A bitmap is stored when its image is closed, so an image that was last written to before never had it."""
    sound = {"x": Bitmap("x", 512, True, False)}
    for modified, valid in ((10_000, True), (50_000, False), (60_000, False), (None, False)):
        chain = [LayerBitmaps("/top", 1, sound), LayerBitmaps("/base", 1, {}, lost_bitmaps=1, modified=modified)]
        assert judge("x", chain, created=50_000).valid is valid
        assert judge("x", chain).valid is False  # nobody knows when


def test_an_overlay_that_was_made_after_the_checkpoint_goes_on_with_a_bitmap_below():
    sound = {"x": Bitmap("x", 512, True, False)}
    base = LayerBitmaps("/base", 1, {}, modified=60_000)
    for made, valid in ((0, True), (50_000, True), (50_010, True), (50_011, False)):
        lowest = LayerBitmaps("/lowest", 1, sound, made=made)
        for above in ([], [LayerBitmaps("/top", 1, sound, made=90_000)]):
            verdict = judge("x", [*above, lowest, base], created=50_000)
            assert (verdict.valid, verdict.image) == ((True, None) if valid else (False, "/base"))
            assert valid or ("goes on with one of this image" in verdict.advice and "qemu-img" not in verdict.advice)
            assert valid or "cannot be made valid" in verdict.advice
            assert judge("x", [*above, lowest, base]).valid is True  # nobody knows when
            assert judge("x", [*above, lowest, base], created=0).valid is True
            assert judge("x", [*above, lowest, base._replace(bitmaps=sound)], created=50_000).valid is True
            opened = judge("x", [*above, lowest, base._replace(is_open_for_writing=True)], created=50_000)
            assert opened.problem == "in_use"
            assert judge("x", [*above, lowest], complete=False, created=50_000).problem == "incomplete"


def test_an_overlay_that_was_flattened_may_lack_what_was_below_it():
    """Who copies the data up can leave the bits behind."""
    sound = {"x": Bitmap("x", 512, True, False)}
    for made, valid in ((0, True), (50_010, True), (50_011, False)):
        lowest = LayerBitmaps("/lowest", 1, sound, made=made, is_flattened=True)
        for above in ([], [LayerBitmaps("/top", 1, sound, made=90_000)]):
            verdict = judge("x", [*above, lowest], created=50_000)
            assert (verdict.valid, verdict.image) == ((True, None) if valid else (False, "/lowest"))
            assert valid or ("no image below any more" in verdict.advice and "cannot be made valid" in verdict.advice)
            assert judge("x", [*above, lowest]).valid is True  # nobody knows when
            assert judge("x", [*above, lowest._replace(is_flattened=False)], created=50_000).valid is True


def test_a_bitmap_that_is_older_than_the_checkpoint_of_its_name_is_another_one():
    """As that of a template, of which a clone has been set back to nothing."""
    template = LayerBitmaps("/base", 1, {"x": Bitmap("x", 512, True, False)}, modified=10_000)
    chain = [LayerBitmaps("/top", 1, {}, modified=60_000), template]
    assert why_not_provable("x", chain, 50_000) == ("older", template)
    assert why_not_provable("x", chain, 11_000) is None  # the clocks of host and storage may differ so much
    assert why_not_provable("x", chain) is None
    assert "cannot be made valid" in judge("x", chain, created=50_000).advice


def test_a_topmost_image_that_is_older_than_the_checkpoint_has_another_bitmap():
    """As one that was put back from an older file: names are used again."""
    sound = {"x": Bitmap("x", 512, True, False)}
    base = LayerBitmaps("/base", 1, sound, modified=60_000)
    for modified, valid in ((10_000, False), (50_000, True), (46_400, True), (46_399, False), (None, True)):
        top = LayerBitmaps("/top", 1, sound, modified=modified)
        for chain in ([top], [top, base]):
            verdict = judge("x", chain, created=50_000)
            assert (verdict.valid, verdict.problem) == ((True, None) if valid else (False, "older"))
            assert why_not_provable("x", chain, 50_000) == (None if valid else ("older", top))
            assert valid or "cannot be made valid" in verdict.advice
            assert judge("x", chain).valid is True  # nobody knows when
            opened = [top._replace(is_open_for_writing=True), *chain[1:]]
            assert judge("x", opened, created=50_000).problem == "in_use"


def test_an_older_bitmap_further_down_only_adds_bits():
    """As that of a template, above which the name is used again."""
    sound = {"x": Bitmap("x", 512, True, False)}
    template = LayerBitmaps("/base", 1, sound, modified=10_000)
    assert judge("x", [LayerBitmaps("/top", 1, sound, modified=60_000), template], created=50_000).valid is True


def test_only_a_bitmap_that_was_there_is_lost():
    """What the directory of the lost bitmaps tells counts whenever that was; without it all of them may be lost."""
    sound = {"x": Bitmap("x", 512, True, False)}
    for names, problem in (({"x", "y"}, "lost"), ({"y"}, None), (None, "lost")):
        lost = names if names is None else frozenset(names)
        base = LayerBitmaps("/base", 1, {}, lost_bitmaps=2, lost_names=lost, modified=60_000)
        chain = [LayerBitmaps("/top", 1, sound), base]
        assert judge("x", chain).problem == problem
        assert judge("x", chain, created=50_000).problem == problem
        assert why_not_provable("x", chain) == (None if problem is None else ("lost", base))
        advice = judge("x", chain[::-1]).advice
        assert ("does not know bitmaps" in advice) == (problem == "lost")
