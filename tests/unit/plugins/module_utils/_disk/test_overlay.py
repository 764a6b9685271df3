# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The decision tables: every combination of what a bitmap is and what stands at the place of the overlay."""

from __future__ import annotations

import itertools
import json

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import Attributes
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.bitmap_rules import carries_over
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.observe import FOLDER, IMAGE, ObservedChain, Target
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import (
    BuildSpec,
    Creation,
    OverlayRequest,
    OverlayVerdict,
    conflicts,
    decide,
    recorded_backing_file,
    request_problems,
    verify,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.verdict import (
    CREATED,
    FAILED,
    PRESENT,
    problem_fields,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.chain import Layer
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import Image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark

GIB = 1 << 30
ACTIVE_ID, OTHER_ID, OVERLAY_ID = (1, 10), (1, 11), (1, 12)
DEVICE_ID = (-1, 64512)
HEADER = Image(
    version=3,
    virtual_size=GIB,
    cluster_size=65536,
    refcount_bits=16,
    backing_file=None,
    backing_format=None,
    encrypted=False,
    encrypted_with_aes=False,
    dirty=False,
    corrupt=False,
    lazy_refcounts=False,
    extended_l2=False,
    compression_type="zlib",
    has_data_file=False,
    data_file=None,
    data_file_raw=False,
    bitmaps=(),
    bitmap_tables=(),
    lost_bitmaps=0,
)
WANTED = OverlayRequest("/srv/over.qcow2", "/srv/active.qcow2")
ABSENT = Target("/srv/over.qcow2", "/srv", device=1, free_bytes=GIB)


def active(**changes):
    """Return an ACTIVE whose header has these fields."""
    image = HEADER._replace(**changes)
    layer = Layer(
        "/srv/active.qcow2", "/srv/active.qcow2", ACTIVE_ID, "qcow2", "qcow2", image.virtual_size, False, image
    )
    return ObservedChain(
        path="/srv/active.qcow2",
        layers=(layer,),
        is_open_for_writing=False,
        below_running_vm=False,
        disguised=False,
    )


def overlay(live=False, backing=ACTIVE_ID, **changes):
    """Return a target at which an overlay with these header fields stands."""
    fields = {"backing_file": "/srv/active.qcow2", "backing_format": "qcow2", **changes}
    path = "/srv/active.qcow2" if backing == ACTIVE_ID else "/srv/other.qcow2"
    return Target(
        "/srv/over.qcow2",
        "/srv",
        stands=IMAGE,
        image=HEADER._replace(**fields),
        identity=OVERLAY_ID,
        backing_path=path,
        backing_identity=backing,
        is_open_for_writing=live,
    )


def message(verdict):
    """Return why a verdict failed, as a module tells it."""
    return problem_fields(verdict.problems)["msg"]


def bitmap(recording=True, inconsistent=False, granularity=65536, name="b"):
    return Bitmap(name, granularity, recording, inconsistent)


KINDS = list(itertools.product((True, False), (True, False)))  # recording, inconsistent
RULE = {
    (True, False): (True, None),
    (True, True): (False, "inconsistent"),
    (False, True): (False, "inconsistent"),
    (False, False): (False, "disabled"),
}
# What stands at the place, as the overlay's own bitmap or None, and what it means for a bitmap that must go on
# recording and for one that need not.
THERE = {
    "absent": (None, CREATED, CREATED),
    "right": (overlay(bitmaps=(bitmap(),)), PRESENT, PRESENT),
    "coarser": (overlay(bitmaps=(bitmap(granularity=1 << 20),)), PRESENT, PRESENT),
    "bitmap missing": (overlay(), FAILED, PRESENT),
    "bitmap of another name": (overlay(bitmaps=(bitmap(name="c"),)), FAILED, PRESENT),
    "bitmap disabled": (overlay(bitmaps=(bitmap(recording=False),)), FAILED, PRESENT),
    "bitmap inconsistent": (overlay(bitmaps=(bitmap(inconsistent=True),)), FAILED, PRESENT),
    "bitmap disabled and inconsistent": (overlay(bitmaps=(bitmap(False, True),)), FAILED, PRESENT),
    "in use by a VM": (overlay(live=True, bitmaps=(bitmap(inconsistent=True),)), PRESENT, PRESENT),
    "disabled, in use by a VM": (overlay(live=True, bitmaps=(bitmap(False, True),)), FAILED, PRESENT),
    "missing, in use by a VM": (overlay(live=True), FAILED, PRESENT),
    "bitmaps worthless": (overlay(lost_bitmaps=1), FAILED, PRESENT),
    "larger": (overlay(virtual_size=2 * GIB, bitmaps=(bitmap(),)), PRESENT, PRESENT),
    "smaller": (overlay(virtual_size=GIB - 512, bitmaps=(bitmap(),)), FAILED, FAILED),
    "other backing file": (overlay(backing=OTHER_ID, bitmaps=(bitmap(),)), FAILED, FAILED),
    "no backing file": (
        overlay(bitmaps=(bitmap(),))._replace(backing_path=None, backing_identity=None),
        FAILED,
        FAILED,
    ),
    "backing format raw": (overlay(backing_format="raw", bitmaps=(bitmap(),)), FAILED, FAILED),
    "no backing format": (overlay(backing_format=None, bitmaps=(bitmap(),)), FAILED, FAILED),
    "corrupt": (overlay(corrupt=True, bitmaps=(bitmap(),)), FAILED, FAILED),
    "cannot be looked at": (ABSENT._replace(problem=Refusal("gone", "/srv/over.qcow2", "is gone")), FAILED, FAILED),
    "a folder": (Target("/srv/over.qcow2", "/srv", stands=FOLDER), FAILED, FAILED),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", THERE)
def test_decision_table(kind, there):
    own = bitmap(*kind)
    target, when_carried, when_not = THERE[there]
    carried, reason = RULE[kind]
    verdict = decide(WANTED, active(bitmaps=(own,)), target or ABSENT)
    assert verdict.state == (when_carried if carried else when_not)
    assert bool(verdict.problems) == (verdict.state == FAILED)
    if verdict.state == FAILED:
        assert "/srv/over.qcow2" in message(verdict)
        assert (verdict.bitmaps, verdict.skipped, verdict.virtual_size) == ((), (), None)
    else:
        granularity = 1 << 20 if there == "coarser" and carried else 65536
        assert [b.granularity for b in verdict.bitmaps] == ([granularity] if carried else [])
        assert [(b.name, b.reason) for b in verdict.skipped] == ([] if carried else [("b", reason)])
        assert bool(verdict.warnings) == (there == "coarser" and carried)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rule_of_the_algorithm(kind):
    assert carries_over(bitmap(*kind)) == RULE[kind][0]


REFUSED = {
    "encrypted": active(encrypted=True),
    "marked corrupt": active(corrupt=True),
    "does not name it": active(has_data_file=True),
    "is a protocol": active(has_data_file=True, data_file="json:{}"),
    "protocol for QEMU": active(has_data_file=True, data_file="nbd://host/x"),
    "cannot be passed": active(bitmaps=(bitmap(name="caf\udce9"),)),
    "no characters": active(bitmaps=(bitmap(name="x\ufffe"),)),
    "open for writing": active()._replace(is_open_for_writing=True),
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("target", [ABSENT, overlay()], ids=["absent", "present"])
def test_an_unusable_active_is_refused_whether_or_not_the_overlay_is_there(reason, target):
    verdict = decide(WANTED, REFUSED[reason], target)
    assert verdict.state == FAILED
    assert reason in message(verdict)


@pytest.mark.parametrize("recording, refused", [(True, True), (False, False)])
def test_only_a_template_may_back_running_vms(recording, refused):
    shared = active(bitmaps=(bitmap(recording),))._replace(below_running_vm=True)
    assert (decide(WANTED, shared, ABSENT).state == FAILED) == refused
    assert decide(WANTED, shared, overlay(live=True, bitmaps=(bitmap(),))).state == PRESENT


def test_active_itself_and_its_chain_are_no_places_for_the_overlay():
    base = Layer("/srv/base.qcow2", "/srv/base.qcow2", OTHER_ID, "raw", "raw", GIB, False, None)
    chained = active()
    chained = chained._replace(layers=(*chained.layers, base))
    for identity, path, expected in (
        (ACTIVE_ID, "/srv/active.qcow2", "is ACTIVE itself"),
        (ACTIVE_ID, "/srv/hardlink.qcow2", "is ACTIVE itself"),
        (OTHER_ID, "/srv/base.qcow2", "part of the backing chain"),
    ):
        target = overlay()._replace(path=path, identity=identity)
        assert expected in message(decide(WANTED, chained, target))


def with_base(**changes):
    """Return an ACTIVE above a qcow2 image whose header has these fields."""
    chained = active()
    base = chained.layers[0]._replace(path="/srv/base", real_path="/srv/base", image=HEADER._replace(**changes))
    return chained._replace(layers=(*chained.layers, base))


UNFIT_BASES = {
    "a data file without a name": ({"has_data_file": True}, "no_data_file"),
    "a data file that is a protocol": ({"has_data_file": True, "data_file": "nbd://h/x"}, "protocol_name"),
    "a data file without its folder": ({"has_data_file": True, "data_file": "data"}, "relative_data_file"),
    "a data file of which versions of QEMU differ": ({"has_data_file": True, "data_file": "file:/x"}, "protocol_name"),
    "AES": ({"encrypted": True, "encrypted_with_aes": True}, "encrypted"),
}


@pytest.mark.parametrize("what", UNFIT_BASES)
def test_every_layer_is_judged(what):
    changes, code = UNFIT_BASES[what]
    for chain in (with_base(**changes), active(**changes)):
        problems = decide(WANTED, chain, ABSENT).problems
        assert code in [problem.code for problem in problems]
        assert chain.layers[-1].path in [problem.subject for problem in problems if problem.code == code]


def test_what_qemu_opens_further_down_is_no_reason_to_refuse():
    assert decide(WANTED, with_base(has_data_file=True, data_file="/srv/data"), ABSENT).state == CREATED
    assert decide(WANTED, with_base(encrypted=True), ABSENT).state == CREATED
    corrupt = decide(WANTED, with_base(corrupt=True), ABSENT)
    assert (corrupt.state, len(corrupt.warnings)) == (CREATED, 1)
    assert "/srv/base: is below /srv/active.qcow2 and marked corrupt" in corrupt.warnings[0]


def test_a_device_is_not_recorded_by_a_relative_name():
    device = active()
    device = device._replace(layers=(device.layers[0]._replace(identity=DEVICE_ID, is_device=True),))
    assert "is a block device, whose name relative" in message(decide(WANTED._replace(relative=True), device, ABSENT))
    assert decide(WANTED, device, ABSENT).state == CREATED
    assert decide(WANTED._replace(relative=True), active(), ABSENT).state == CREATED


def test_limits_of_qemu_are_known_before_it_is_asked():
    fine = active(virtual_size=2 << 40, bitmaps=(bitmap(granularity=512),))
    assert decide(WANTED, fine, ABSENT).state == CREATED
    finer = active(virtual_size=(2 << 40) + 512 * 8, bitmaps=(bitmap(granularity=512),))
    assert "more than 512 MiB" in message(decide(WANTED, finer, ABSENT))
    small = WANTED._replace(creation=Creation(cluster_size=512))
    assert decide(small, active(virtual_size=128 * GIB), ABSENT).state == CREATED
    assert "larger cluster_size" in message(decide(small, active(virtual_size=129 * GIB), ABSENT))
    long = WANTED._replace(backing_file="/" + "x" * 1023)
    assert "longer than the 1023 bytes" in message(decide(long, active(), ABSENT))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"path": "relative.qcow2"}, "path must be an absolute path"),
        ({"path": ""}, "path must be an absolute path"),
        ({"backing_file": "active.qcow2"}, "backing_file must be an absolute path"),
        ({"path": "/srv/\0"}, "NUL byte"),
        ({"backing_file": "/srv/\udce9"}, "backing_file is not UTF-8"),
        ({"path": "/srv/\udce9"}, "path is not UTF-8"),
        ({"backing_file": "/srv/\ufffe"}, "no characters"),
        ({"creation": Creation(cluster_size=1000)}, "cluster_size must be a power of two"),
        ({"creation": Creation(cluster_size=4 << 20)}, "cluster_size must be a power of two"),
        ({"creation": Creation(cluster_size=0)}, "cluster_size must be a power of two"),
        ({"creation": Creation(refcount_bits=3)}, "refcount_bits must be a power of two"),
        ({"creation": Creation(cluster_size=8192, extended_l2=True)}, "extended_l2 needs"),
    ],
)
def test_requests(changes, expected):
    problems = request_problems(WANTED._replace(**changes))
    assert [expected in str(problem) for problem in problems] == ([True] if expected else [])


def test_one_place_is_asked_for_once():
    problems = conflicts(["/a", "/b", "/a", "/c", "/d"], ["/x", "/x", "/x", "/b", "/d"])
    assert [problem and problem.why[:12] for problem in problems] == [
        "is asked for",
        "is the overl",
        "is asked for",
        None,
        None,
    ]
    assert "/a: is asked for more than once" in str(problems[0])
    assert conflicts(["/a", "/a"], ["/x", "/y"])[1].why.endswith("on top of /x and of /y")


@pytest.mark.parametrize(
    "relative, active_path, folder, recorded",
    [
        (False, "/srv/real.qcow2", "/srv", "/srv/active.qcow2"),
        (True, "/srv/real.qcow2", "/srv", "real.qcow2"),
        (True, "/srv/a:b.qcow2", "/srv", "./a:b.qcow2"),
        (True, "/srv/x/a:b.qcow2", "/srv", "x/a:b.qcow2"),
        (True, "/srv/real.qcow2", "/srv/snap", "../real.qcow2"),
    ],
)
def test_recorded_backing_file(relative, active_path, folder, recorded):
    there = active()
    there = there._replace(layers=(there.layers[0]._replace(real_path=active_path),))
    target = ABSENT._replace(folder=folder)
    assert recorded_backing_file(WANTED._replace(relative=relative), there, target) == recorded


RIGHT = HEADER._replace(backing_file="/srv/active.qcow2", backing_format="qcow2", bitmaps=(bitmap(), bitmap(name="c")))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"bitmaps": RIGHT.bitmaps[::-1]}, None),
        ({"bitmaps": RIGHT.bitmaps[:1]}, "the bitmap 'c' is missing or different"),
        ({"bitmaps": (bitmap(granularity=512), RIGHT.bitmaps[1])}, "the bitmap 'b' is missing or different"),
        ({"bitmaps": (bitmap(recording=False), RIGHT.bitmaps[1])}, "the bitmap 'b' is missing or different"),
        ({"bitmaps": (bitmap(inconsistent=True), RIGHT.bitmaps[1])}, "the bitmap 'b' is missing or different"),
        ({"bitmaps": (*RIGHT.bitmaps, bitmap(name="d"))}, "there is an unexpected bitmap 'd'"),
        ({"bitmaps": (), "lost_bitmaps": 2}, "lost_bitmaps is 2"),
        ({"virtual_size": GIB + 512}, "virtual_size"),
        ({"backing_file": "/srv/other"}, "backing_file"),
        ({"backing_format": None}, "backing_format"),
        ({"cluster_size": 4096}, "cluster_size"),
        ({"version": 2}, "version"),
        ({"corrupt": True}, "corrupt"),
        ({"mark": Mark("uuid", "vda", "s")}, "mark is Mark(vm='uuid'"),
        ({"history": History(7)}, "history is History(base_written=7"),
    ],
)
def test_a_finished_overlay_is_verified(changes, expected):
    verdict = decide(WANTED, active(bitmaps=RIGHT.bitmaps), ABSENT)
    spec = BuildSpec(ABSENT, "/srv/active.qcow2", Attributes(0, 0, 0o600, {}), None, {}, 0, History())
    wrong = "; ".join(verify(verdict, spec, RIGHT._replace(**changes)))
    assert expected in wrong if expected else not wrong


def test_more_than_qemu_can_hold_is_refused():
    terabytes = active(virtual_size=16 << 40, bitmaps=tuple(bitmap(granularity=4096, name=str(i)) for i in range(8)))
    assert decide(WANTED, terabytes, ABSENT).state == CREATED
    more = active(virtual_size=16 << 40, bitmaps=tuple(bitmap(granularity=4096, name=str(i)) for i in range(9)))
    assert "9 bitmaps need 4608 MiB of memory" in message(decide(WANTED, more, ABSENT))
    many = active(bitmaps=tuple(bitmap(name=str(i)) for i in range(4097)))
    assert "has 4097 bitmaps, more than the 4096" in message(decide(WANTED, many, ABSENT))


def test_messages_stay_readable():
    odd = active(bitmaps=tuple(bitmap(name=f"{i}\udcff" + "x" * 1000) for i in range(4000)))
    text = message(decide(WANTED, odd, ABSENT))
    assert len(text) < 2000
    assert "and 3995 more" in text
    text.encode("utf-8")
    missing = active(bitmaps=tuple(bitmap(name="y" * 1000 + str(i)) for i in range(4000)))
    assert len(message(decide(WANTED, missing, overlay()))) < 2000


def test_a_small_header_holds_a_short_name_only():
    small = WANTED._replace(creation=Creation(cluster_size=512), backing_file="/" + "x" * 343)
    assert decide(small, active(), ABSENT).state == CREATED
    long = small._replace(backing_file="/" + "x" * 344)
    assert "does not fit into a header of 512 bytes" in message(decide(long, active(), ABSENT))
    marked = small._replace(mark=Mark("u" * 36, "vda", "s" * 14))  # 8 and 160 bytes, with the history
    assert "does not fit into a header of 512 bytes" in message(decide(marked, active(), ABSENT))
    shorter = marked._replace(backing_file="/" + "x" * 175)
    assert decide(shorter, active(), ABSENT).state == CREATED
    assert decide(shorter._replace(backing_file="/" + "x" * 176), active(), ABSENT).state == FAILED


def test_the_chain_has_room_for_one_more():
    layers = active().layers
    assert decide(WANTED, active()._replace(layers=layers * 199), ABSENT).state == CREATED
    assert "more than 200 images" in message(decide(WANTED, active()._replace(layers=layers * 200), ABSENT))


def test_names_that_are_not_utf8_can_be_returned():
    odd = OverlayVerdict(WANTED._replace(path="/srv/\udcff", backing_file="/srv/caf\udce9"), CREATED)
    json.dumps([odd.as_result(), odd.as_diff()], ensure_ascii=False).encode("utf-8")
