# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is decided about the checkpoints of a domain that is shut off, over all its disks."""

from __future__ import annotations

import itertools
import random

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import heal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps, judge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import Standing
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import MARK
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain import healing
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.healing import (
    CheckpointRequest,
    DiskChain,
    decide,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import KnownCheckpoint
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

SOUND = Bitmap("", 65536, True, False)
BROKEN = Bitmap("", 65536, True, True)
ENDED = Bitmap("", 65536, False, False)
STATES = {"s": SOUND, "b": BROKEN, "e": ENDED, "-": None}
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def fixture_each_decision_ends(monkeypatch):
    move = healing._Draft.move

    def counted(draft):
        draft.moves = getattr(draft, "moves", 0) + 1
        assert draft.moves < 20
        return move(draft)

    monkeypatch.setattr(healing._Draft, "move", counted)


def image(path, bitmaps, **more):
    """Return an image; `bitmaps` has by name how each is: s(ound), b(roken), e(nded), - for none."""
    own = {name: STATES[how]._replace(name=name) for name, how in bitmaps.items() if how != "-"}
    return Standing(path, SIZE, own, **more)


def disk(target, *images, **more):
    """Return a disk with these images, the topmost one first."""
    chain = tuple(image(f"/{target}-{number}", bitmaps) for number, bitmaps in enumerate(images))
    return DiskChain(target, chain[0].path if chain else f"/{target}", chain, **more)


def checkpoint(name, *targets):
    return KnownCheckpoint(name, dict.fromkeys(targets or ("vda", "vdb"), name))


def decided(known, disks, **request):
    """Return the decision, and the state or the code of each checkpoint."""
    decision = decide(("web", "uuid"), CheckpointRequest(**request), known, disks)
    return decision, {one.name: one.problem.code if one.problem else one.state for one in decision.fates}


LOST_IN_TOP = ({"one": "-"}, {"one": "s"})
HOPELESS = ({"one": "s"}, {"one": "b"})
WHOLE = ({"one": "s"}, {"one": "s"})


def test_a_checkpoint_is_healed_on_the_disk_where_it_is_broken():
    decision, states = decided([checkpoint("one")], [disk("vda", *LOST_IN_TOP), disk("vdb", *WHOLE)])
    assert states == {"one": "valid"}
    assert {target: one.names for target, one in decision.requests.items()} == {"vda": ("one",), "vdb": ("one",)}
    assert (decision.writes, decision.forgotten, decision.fates[0].is_as_wanted) == (True, (), False)


def test_where_all_is_valid_nothing_is_written():
    decision, states = decided([checkpoint("one")], [disk("vda", *WHOLE), disk("vdb", *WHOLE)], removes_unusable=True)
    assert (states, decision.writes, decision.fates[0].is_as_wanted) == ({"one": "valid"}, False, True)


def test_a_vault_is_completed_though_libvirt_has_forgotten_its_checkpoint():
    disks = [disk("vda", {"two": "s"}, has_vault=True), disk("vdb", {"two": "s"})]
    decision, states = decided([checkpoint("two")], disks, state="absent", checkpoints=("one", "o*"))
    assert states == {"one": "absent"}
    assert {target: (one.names, one.removed) for target, one in decision.requests.items()} == {"vda": ((), ("one",))}
    assert decision.writes
    decision, states = decided([], disks, removes_unusable=True)
    assert states == {}
    assert {target: (one.names, one.removed) for target, one in decision.requests.items()} == {"vda": ((), ())}


def test_what_is_hopeless_on_one_disk_is_not_touched_on_the_others():
    decision, states = decided([checkpoint("one")], [disk("vda", *LOST_IN_TOP), disk("vdb", *HOPELESS)])
    assert states == {"one": "not_healable"}
    assert (dict(decision.requests), decision.writes, decision.forgotten) == ({}, False, ())
    assert "unusable=remove removes it" in str(decision.fates[0].problem)


def test_what_is_hopeless_on_one_disk_goes_from_all_of_them():
    disks = [disk("vda", *LOST_IN_TOP), disk("vdb", *HOPELESS)]
    decision, states = decided([checkpoint("one")], disks, removes_unusable=True)
    assert (states, decision.forgotten) == ({"one": "removed"}, ("one",))
    assert {target: (one.names, one.removed) for target, one in decision.requests.items()} == {
        "vda": ((), ("one",)),
        "vdb": ((), ("one",)),
    }


def test_what_is_hopeless_keeps_no_other_from_being_healed():
    disks = [disk("vda", {"one": "b", "two": "-"}, {"two": "s"})]
    known = [checkpoint("one", "vda"), checkpoint("two", "vda")]
    decision, states = decided(known, disks)
    assert (states, decision.requests["vda"].names) == ({"one": "may_be_emptied", "two": "valid"}, ("two",))
    _decision, states = decided(known, disks, assume_not_emptied=True)
    assert states == {"one": "valid", "two": "valid"}


def test_what_goes_is_not_in_the_way_of_what_is_healed():
    """Without its bitmaps the layer in the middle would make the one that is ended there look valid."""
    disks = [disk("vda", {"bad": "s", "good": "-"}, {"bad": "e", "good": "b"}, {"good": "s"})]
    known = [checkpoint("bad", "vda"), checkpoint("good", "vda")]
    _decision, states = decided(known, disks)
    assert states == {"bad": "not_healable", "good": "closes_gap"}
    decision, states = decided(known, disks, removes_unusable=True)
    assert states == {"bad": "removed", "good": "valid"}
    assert decision.requests["vda"].names == ("good",)


def test_a_checkpoint_of_disks_that_have_swapped_their_targets_is_not_valid_and_can_go():
    then = {"vda": frozenset(["/vdb-1"]), "vdb": frozenset(["/vda-1"])}
    known = [checkpoint("one")._replace(images=then)]
    for images in (WHOLE, LOST_IN_TOP):
        disks = [disk(target, *images, real_paths=(f"/{target}-0", f"/{target}-1")) for target in ("vda", "vdb")]
        decision, states = decided(known, disks)
        assert (states, dict(decision.requests), decision.forgotten) == ({"one": "not_healable"}, {}, ())
        problem = str(decision.fates[0].problem)
        assert "give the targets back ('virsh edit')" in problem
        assert "leave the targets" in problem  # files that were moved crosswise look the same
        assert "unusable=remove removes it" in problem
        decision, states = decided(known, disks, removes_unusable=True)
        assert (states, decision.forgotten) == ({"one": "removed"}, ("one",))
        assert all(one.removed == ("one",) for one in decision.requests.values())


def test_a_checkpoint_of_a_disk_that_is_raw_now_is_never_valid_again_and_can_go():
    disks = [disk("vda", *WHOLE), disk("vdb", holds_none=True)]
    decision, states = decided([checkpoint("one")], disks)
    assert (states, dict(decision.requests), decision.forgotten) == ({"one": "no_checkpoint"}, {}, ())
    for request in ({"removes_unusable": True}, {"state": "absent"}):
        decision, states = decided([checkpoint("one")], disks, **request)
        assert (states, decision.forgotten, decision.problems) == ({"one": "removed"}, ("one",), ())
        assert {target: one.removed for target, one in decision.requests.items()} == {"vda": ("one",)}


def test_a_disk_that_cannot_be_read_spares_its_checkpoints():
    wrong = Refusal("in_use", "/vdb", "is in use")
    disks = [disk("vda", *HOPELESS), disk("vdb", problem=wrong)]
    for request in ({"removes_unusable": True}, {"state": "absent"}):
        decision, states = decided([checkpoint("one")], disks, **request)
        assert (states, dict(decision.requests), decision.forgotten) == ({"one": "in_use"}, {}, ())


@pytest.mark.parametrize("request_, state", [({}, "no_checkpoint"), ({"removes_unusable": True}, "removed")])
def test_a_checkpoint_of_disks_that_are_gone(request_, state):
    decision, states = decided([checkpoint("one", "vdx")], [disk("vda", {"one": "s"})], **request_)
    assert states == {"one": state}
    assert (dict(decision.requests), decision.forgotten) == ({}, ("one",) if state == "removed" else ())


def test_a_disk_that_is_gone_does_not_count():
    _decision, states = decided([checkpoint("one")], [disk("vda", *WHOLE)])
    assert states == {"one": "valid"}


def test_names_and_patterns():
    known = [checkpoint("mon-1", "vda"), checkpoint("mon-2", "vda"), checkpoint("tue", "vda")]
    disks = [disk("vda", {"mon-1": "s", "mon-2": "s", "tue": "s"})]
    decision, states = decided(known, disks, checkpoints=("mon-*", "wed", "x*"), state="absent")
    assert states == {"mon-1": "removed", "mon-2": "removed", "wed": "absent"}
    assert decision.requests["vda"].removed == ("mon-1", "mon-2")
    _decision, states = decided(known, disks, checkpoints=("wed",))
    assert states == {"wed": "no_checkpoint"}


def test_orphans_are_what_no_checkpoint_refers_to_whether_it_is_asked_for_or_not():
    marked = {"one": "s", "left": "s", f"{MARK}1": "s"}
    disks = [disk("vda", marked, {"old": "b"}), disk("vdb", {"one": "s", "two": "s"})]
    known = [checkpoint("one"), checkpoint("two", "vdb")]
    decision, states = decided(known, disks, checkpoints=("one",), removes_orphans=True)
    assert states == {"one": "valid"}
    assert decision.orphans == {"vda": ("left", "old")}
    assert decision.requests["vda"].removed == ("left", "old")


def test_the_bitmaps_of_a_template_are_no_orphans():
    chain = (image("/top", {"left": "s"}), image("/template", {"its": "s"}, others=("/clone",)))
    decision, _states = decided([], [DiskChain("vda", "/top", chain)], removes_orphans=True)
    assert decision.orphans == {"vda": ("left",)}
    assert decision.problems == ()


def test_orphans_that_cannot_be_removed_are_told_and_the_rest_is_done():
    fault = Refusal("unsupported", "/vda-1", "is old")
    chain = (image("/vda-0", {"one": "s"}), image("/vda-1", {"one": "s", "left": "s"}, fault=fault))
    decision, states = decided([checkpoint("one", "vda")], [DiskChain("vda", "/vda-0", chain)], removes_orphans=True)
    assert (states, decision.orphans, decision.problems) == ({"one": "valid"}, {}, (fault,))


def test_what_an_image_keeps_from_going_stays_with_libvirt():
    fault = Refusal("unsupported", "/vda-1", "is old")
    chain = (image("/vda-0", {"one": "s", "two": "s"}), image("/vda-1", {"one": "s"}, fault=fault))
    known = [checkpoint("one", "vda"), checkpoint("two", "vda")]
    decision, states = decided(known, [DiskChain("vda", "/vda-0", chain)], state="absent")
    assert states == {"one": "unsupported", "two": "removed"}
    assert (decision.forgotten, decision.requests["vda"].removed) == (("two",), ("two",))


def is_valid(disks, name):
    chains = [[LayerBitmaps(one.path, SIZE, one.bitmaps) for one in disk.images] for disk in disks]
    return all(judge(name, chain).valid for chain in chains)


@pytest.mark.parametrize("removes", [False, True])
def test_every_pair_of_chains(removes):
    """Two disks, two images, two checkpoints: nobody is called valid who is not, and nothing valid goes."""
    seen = set()
    hows = list(itertools.product("sbe-", repeat=4))
    for left, right in itertools.product(hows, hows[::7]):
        disks = [
            disk(target, {"one": how[0], "two": how[1]}, {"one": how[2], "two": how[3]})
            for target, how in (("vda", left), ("vdb", right))
        ]
        decision, states = decided([checkpoint("one"), checkpoint("two")], disks, removes_unusable=removes)
        for name, state in states.items():
            seen.add(state)
            fate = next(one for one in decision.fates if one.name == name)
            assert fate.is_as_wanted == is_valid(disks, name)
            asked = [name in (*one.names, *one.removed) for one in decision.requests.values()]
            if state == "removed":
                assert removes
                assert not fate.is_as_wanted
                assert all(name in one.removed for one in decision.requests.values())
            elif state == "valid":
                assert all(name in one.names for one in decision.requests.values())
            else:
                assert not any(asked)
        assert set(decision.forgotten) == {name for name, state in states.items() if state == "removed"}
    assert {"valid", "removed" if removes else "not_healable"} <= seen


def test_a_bitmap_of_a_disk_that_has_another_target_now_is_no_orphan():
    disks = [disk("vdc", {"one": "s", "old": "s"}), disk("vda", {"one": "s"})]
    decision, _states = decided([checkpoint("one", "vda", "vdb")], disks, removes_orphans=True)
    assert decision.orphans == {"vdc": ("old",)}


DOUBT = Refusal("may_be_emptied", "/vda-0", "has lost its bitmap since a run was killed")


def test_what_only_a_vault_has_is_not_yet_as_wanted():
    chain = (image("/vda-0", {"one": "s"}, put_back=frozenset(["one"])),)
    decision, states = decided([checkpoint("one", "vda")], [DiskChain("vda", "/vda-0", chain, has_vault=True)])
    assert (states, decision.fates[0].is_as_wanted, decision.writes) == ({"one": "valid"}, False, True)


def test_what_a_vault_may_tell_wrongly_is_unusable():
    chain = (image("/vda-0", {"one": "s", "two": "s"}, put_back=frozenset(["one"]), doubtful={"one": DOUBT}),)
    known, disks = [checkpoint("one", "vda"), checkpoint("two", "vda")], [DiskChain("vda", "/", chain, has_vault=True)]
    _decision, states = decided(known, disks)
    assert states == {"one": "may_be_emptied", "two": "valid"}
    decision, states = decided(known, disks, removes_unusable=True)
    assert (states, decision.forgotten) == ({"one": "removed", "two": "valid"}, ("one",))
    assert (decision.requests["vda"].names, decision.requests["vda"].removed) == (("two",), ("one",))


@pytest.mark.parametrize("orphans", [False, True])
def test_what_libvirt_has_forgotten_and_cannot_go_is_told(orphans):
    """A killed run has left a vault, and a clone stands on the image now."""
    chain = (image("/vda-0", {"one": "s", "two": "s"}, others=("/clone",)),)
    disks = [DiskChain("vda", "/vda-0", chain, has_vault=True), disk("vdb", {"one": "s"})]
    request = {"state": "absent", "checkpoints": ("one", "none"), "removes_orphans": orphans}
    decision, states = decided([checkpoint("two")], disks, **request)
    assert (states, decision.fates[0].is_as_wanted) == ({"one": "has_overlay", "none": "absent"}, False)
    assert "one" not in decision.requests["vda"].removed


def test_what_libvirt_has_forgotten_goes_once():
    disks = [disk("vda", {"one": "s"}, has_vault=True)]
    decision, states = decided([], disks, state="absent", checkpoints=("one", "one"), removes_orphans=True)
    assert (states, decision.requests["vda"].removed) == ({"one": "absent"}, ("one",))
    assert not decision.fates[0].is_as_wanted  # if that fails it has failed


def test_the_bitmap_of_another_checkpoint_is_not_what_libvirt_has_forgotten():
    disks = [disk("vda", {"one": "s"}, has_vault=True)]
    known = [KnownCheckpoint("two", {"vda": "one"})]
    decision, states = decided(known, disks, state="absent", checkpoints=("one",))
    assert (states, decision.requests["vda"].removed) == ({"one": "absent"}, ())


NAMES = ("one", "two", "three")


def random_image(dice, path):
    """Draw an image: its bitmaps, what a killed run has lost of them, and what keeps it from being written."""
    bitmaps = {name: dice.choice("sssbe--") for name in NAMES}
    own = image(path, bitmaps).bitmaps
    lost = frozenset(name for name, one in own.items() if dice.random() < 0.15 and not one.inconsistent)
    return image(
        path,
        bitmaps,
        put_back=lost,
        doubtful={name: DOUBT for name in lost if dice.random() < 0.3},
        lost_bitmaps=dice.choice((0, 0, 0, 2)),
        modified=dice.choice((None, 100, 100_000)),
        fault=Refusal("unsupported", path, "is old") if dice.random() < 0.1 else None,
        others=("/clone",) if dice.random() < 0.1 else (),
    )


def random_disk(dice, target):
    chain = tuple(random_image(dice, f"/{target}-{number}") for number in range(dice.randint(1, 3)))
    kind = dice.random()
    if kind < 0.05:
        return DiskChain(target, f"/{target}", problem=Refusal("in_use", f"/{target}", "is in use"))
    if kind < 0.1:
        return DiskChain(target, f"/{target}", holds_none=True)
    return DiskChain(target, f"/{target}", chain, has_vault=any(one.put_back for one in chain) or dice.random() < 0.3)


def random_case(dice):
    """Draw what libvirt knows, the disks, and what is asked for."""
    disks = [random_disk(dice, target) for target in ("vda", "vdb")[: dice.randint(1, 2)]]
    shift = dice.choice((0, 0, 1))  # checkpoints whose bitmaps have the names of other checkpoints
    known = [
        KnownCheckpoint(
            name,
            {one.target: NAMES[number - shift] for one in disks if dice.random() < 0.8},
            created=dice.choice((50, 50_000)),
        )
        for number, name in enumerate(NAMES)
        if dice.random() < 0.6
    ]
    request = CheckpointRequest(
        checkpoints=tuple(dice.sample([*NAMES, "*"], dice.randint(0, 2))),
        state=dice.choice(("valid", "absent")),
        removes_unusable=dice.random() < 0.5,
        removes_orphans=dice.random() < 0.4,
        cumulative=dice.random() < 0.3,
        assume_not_emptied=dice.random() < 0.3,
    )
    return request, known, disks


def is_in_order(one, bitmap, created):
    """Whether a disk has the bitmap in order, without what only a vault has."""
    if not one.images or any(bitmap in each.put_back for each in one.images):
        return False
    return judge(bitmap, [each.layer for each in one.images], created=created).valid


def assert_kept(fate, request, decision, plans, known, disks):
    """See that a promise without a problem is kept by what is asked of the disks, and that nothing valid goes."""
    created = {one.name: one.created for one in known}.get(fate.name)
    for target, bitmap in fate.bitmaps.items():
        if fate.state == "valid":
            assert bitmap in decision.requests[target].names
            assert {one.name: one.valid for one in plans[target].checkpoints}[bitmap]
            assert not any(bitmap in one.doubtful for one in disks[target].images)
        elif target in plans:
            assert not left_in(plans[target], disks[target], bitmap)
    in_order = [is_in_order(disks[target], bitmap, created) for target, bitmap in fate.bitmaps.items()]
    assert not (fate.is_as_wanted and fate.bitmaps) or all(in_order)
    assert not (fate.state == "removed" and request.state == "valid" and in_order) or not all(in_order)
    if fate.state == "absent" and fate.name not in {name for one in known for name in one.bitmaps.values()}:
        with_vault = [one for one in disks.values() if one.has_vault]
        assert not any(left_in(plans[one.target], one, fate.name) for one in with_vault)
        has_it = any(fate.name in image.bitmaps for one in with_vault for image in one.images[: own_of(one)])
        assert not (fate.is_as_wanted and has_it)


def own_of(one):
    """Return how many images of a disk, from the top, are not somebody else's, too."""
    return next((place for place, each in enumerate(one.images) if each.others), len(one.images))


def left_in(plan, one, bitmap):
    return any(bitmap in plan.wants[place] for place in range(own_of(one)))


def test_whatever_is_there_it_ends_and_nothing_is_promised_that_is_not_done():
    dice, seen = random.Random(7), set()
    for _round in range(1500):
        request, known, disks = random_case(dice)
        decision = decide(("web", "uuid"), request, known, disks)
        by_target = {one.target: one for one in disks}
        plans = {target: heal.decide(one, by_target[target].images) for target, one in decision.requests.items()}
        assert not [one for plan in plans.values() for one in plan.found if one.problem is not None]
        for one in decision.requests.values():
            assert len({*one.names, *one.removed}) == len(one.names) + len(one.removed)
        for fate in decision.fates:
            seen.add(fate.problem.code if fate.problem else fate.state)
            if fate.problem is None:
                assert_kept(fate, request, decision, plans, known, by_target)
                continue
            assert not fate.is_as_wanted
            assert fate.name not in decision.forgotten
            touched = {(target, name) for target, one in decision.requests.items() for name in one.names + one.removed}
            assert touched.isdisjoint(fate.bitmaps.items())
    assert {"valid", "removed", "absent", "not_healable", "may_be_emptied", "unsupported", "has_overlay"} <= seen
