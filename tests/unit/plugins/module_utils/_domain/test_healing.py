# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is decided about the checkpoints of a domain that is shut off, over all its disks."""

from __future__ import annotations

import itertools

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import LayerBitmaps, judge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.heal import Standing
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import MARK
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
        assert "give the disks the targets that they had" in str(decision.fates[0].problem)
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
