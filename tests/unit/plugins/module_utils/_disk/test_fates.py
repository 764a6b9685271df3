# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of a bitmap in a commit, for every chain of up to five images, and each state that it can have there."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps, judge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.fates import Fate, fates, wrongly_mended
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

STATES = {"-": None, "r": (True, False), "d": (False, False), "i": (True, True)}
# Chains from the top down: layers that go in, BASE, images below; a letter is the state of the bitmap in an image.
SHAPES = [(layers, below) for layers in (1, 2, 3) for below in (0, 1)]


def image(state, granularity=65536):
    """Return the bitmaps of an image in which the one of the name b has this state."""
    return {} if STATES[state] is None else {"b": Bitmap("b", granularity, *STATES[state])}


def chain_of(text):
    """Return the images, each with a granularity of its own."""
    return [image(state, 512 << number) for number, state in enumerate(text)]


def is_usable(images):
    """Whether a backup can use the bitmap, by the rules that qcow2_info has."""
    layers = [LayerBitmaps(f"/{number}", 1 << 30, bitmaps) for number, bitmaps in enumerate(images)]
    return "b" in images[0] and judge("b", layers).valid is True


def fate_of(text, depth):
    return fates(chain_of(text), depth).get("b")


CASES = {
    # what stands there, BASE's place: bits of its own that go in, all that is held, why not usable
    "r r": ((0, 1), (), None),
    "r -": ((0,), (), None),
    "- r": ((1,), (0,), None),
    "i r": ((1,), (0,), None),
    "d r": ((1,), (0,), None),
    "r-r": ((2,), (0, 1), None),
    "-rr": ((1, 2), (0,), None),
}


@pytest.mark.parametrize("text", CASES)
def test_what_goes_in(text):
    bits, held, skipped = CASES[text]
    text = text.replace(" ", "")
    fate = fate_of(text, len(text) - 1)
    assert (fate.bits, fate.held, fate.skipped) == (bits, held, skipped)
    assert fate.bitmap.granularity == (512 << (len(text) - 1) if held else 512)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("d-", "disabled"), ("i-", "inconsistent"), ("ri", "inconsistent"), ("r--", None), ("-r-", "gap")],
)
def test_what_goes(text, reason):
    fate = fate_of(text, len(text) - 1)
    assert (fate.bitmap is None, fate.skipped) == (reason is not None, reason)


def test_a_disabled_bitmap_of_base_stays_as_it_is():
    assert fate_of("rd", 1) == Fate(Bitmap("b", 1024, False, False), bits=(1,), skipped="disabled")


def test_what_only_images_below_base_have_is_not_touched():
    assert fate_of("--r", 1) is None


@pytest.mark.parametrize(("layers", "below"), SHAPES)
def test_every_chain(layers, below):
    for states in itertools.product(STATES, repeat=layers + 1 + below):
        images, base = chain_of(states), layers
        fate = fate_of(states, base)
        after = [{"b": fate.bitmap} if fate and fate.bitmap else {}, *images[base + 1 :]]
        begun = [after[0], *images[1:base], {}, *images[base + 1 :]]  # BASE is stripped, and TOP has all
        was_intact_in_base = is_usable(images[base:])
        text = "".join(states)
        # What libvirt's own commit keeps is kept, exactly; what it does not is usable only if BASE had it in order.
        if is_usable(images):
            assert (is_usable(after), fate.is_exact, fate.bitmap.granularity) == (True, True, 512), text
        elif is_usable(after):
            assert (was_intact_in_base, fate.is_exact) == (True, False), text
        if was_intact_in_base:
            assert is_usable(after), text
        # While the data moves no chain looks valid that will not be.
        if is_usable(begun):
            assert is_usable(after), text
        # Of an image that goes in either its own bits count, or all that it holds, unless the bitmap is made above it.
        if fate and fate.bitmap and fate.bitmap.recording and "b" in images[base]:
            assert sorted((*fate.bits, *fate.held)) == list(range(base + 1)), text
        assert is_usable(after) == bool(fate and fate.bitmap and not fate.skipped), text


@pytest.mark.parametrize(("layers", "below"), SHAPES)
def test_an_image_above_that_goes_onto_base_never_looks_better_than_it_is(layers, below):
    for states in itertools.product(STATES, repeat=1 + layers + 1 + below):
        above, *images = chain_of(states)
        fate = fates(images, layers).get("b")
        after = [above, {"b": fate.bitmap} if fate and fate.bitmap else {}, *images[layers + 1 :]]
        looks_better = is_usable(after) and not is_usable([above, *images])
        assert bool(wrongly_mended([above], images, layers)) == looks_better, "".join(states)
        for further in STATES:
            top = image(further)
            looks_better = is_usable([top, *after]) and not is_usable([top, above, *images])
            assert bool(wrongly_mended([top, above], images, layers)) == looks_better, "".join([further, *states])


def named(*images):
    """Return a chain, the topmost image first, whose images have these bitmaps of one letter, all in order."""
    return [{name: Bitmap(name, 65536, True, False) for name in names} for names in images]


# libvirt's own test cases (tests/qemublocktest.c, "bitmap block commit"): a chain of five, numbered from the top.
BASIC = named("abcde", "", "", "", "")
SNAPSHOTS = named("abcde", "abcd", "abc", "a", "a")
NOTHING = named("", "", "", "", "")
# By the name of a bitmap: whether it is made in BASE, and the images whose bits are merged into it.
LIBVIRTS_PLANS = [
    (NOTHING, 1, 2, {}),
    (BASIC, 1, 2, {name: (True, [1]) for name in "abcde"}),
    (BASIC, 1, 3, {name: (True, [1]) for name in "abcde"}),
    (BASIC, 2, 3, {}),
    (SNAPSHOTS, 1, 2, {"e": (True, [1]), **{name: (False, [1]) for name in "abcd"}}),
    (SNAPSHOTS, 1, 3, {"e": (True, [1]), "d": (True, [1, 2]), **{name: (False, [1, 2]) for name in "abc"}}),
    (
        SNAPSHOTS,
        1,
        4,
        {
            "e": (True, [1]),
            "d": (True, [1, 2]),
            "c": (True, [1, 2, 3]),
            "b": (True, [1, 2, 3]),
            "a": (False, [1, 2, 3]),
        },
    ),
    (
        SNAPSHOTS,
        1,
        5,
        {
            "e": (True, [1]),
            "d": (True, [1, 2]),
            "c": (True, [1, 2, 3]),
            "b": (True, [1, 2, 3]),
            "a": (False, [1, 2, 3, 4]),
        },
    ),
    (SNAPSHOTS, 2, 3, {"d": (True, [2]), **{name: (False, [2]) for name in "abc"}}),
    (SNAPSHOTS, 2, 4, {"d": (True, [2]), "b": (True, [2, 3]), "c": (True, [2, 3]), "a": (False, [2, 3])}),
    (SNAPSHOTS, 2, 5, {"d": (True, [2]), "b": (True, [2, 3]), "c": (True, [2, 3]), "a": (False, [2, 3, 4])}),
    (SNAPSHOTS, 3, 4, {"b": (True, [3]), "c": (True, [3]), "a": (False, [3])}),
    (SNAPSHOTS, 3, 5, {"b": (True, [3]), "c": (True, [3]), "a": (False, [3, 4])}),
    (SNAPSHOTS, 4, 5, {"a": (False, [4])}),
]


@pytest.mark.parametrize(("chain", "top", "base", "plan"), LIBVIRTS_PLANS)
def test_the_plans_of_libvirts_own_commit(chain, top, base, plan):
    depth = base - top
    found = fates(chain[top - 1 :], depth)
    ours = {}
    for name, fate in found.items():
        assert fate.bitmap == Bitmap(name, 65536, True, False)
        assert fate.is_exact
        assert fate.skipped is None
        ours[name] = (depth not in fate.bits, [place + top for place in fate.bits if place != depth])
    assert ours == plan
