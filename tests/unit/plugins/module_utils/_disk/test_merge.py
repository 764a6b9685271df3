# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a commit makes of random chains, judged by QEMU and by a small model of what must become of each bitmap."""

from __future__ import annotations

import hashlib
import os
import random
import typing as t

import pytest

from .. import qemu
from . import commits
from .commits import Bits, Extents, granules

NAMES = ("x", "y ü,\n", "z")
BASES = (
    "plain",
    "snapshots",
    "extended_l2",
    "data_file",
    "data_file_raw",
    "below",
    "below_raw",
    "smaller",
    "raw",
    "v2",
)
MiB = 1 << 20


class Layer(t.NamedTuple):
    """An image of a chain, and its bitmaps by name: recording, disabled or inconsistent."""

    path: str
    form: str
    size: int
    bitmaps: dict[str, str]


class Chain(t.NamedTuple):
    """What a round begins with; the topmost image first."""

    layers: list[Layer]
    depth: int  # of BASE


def a_bitmap_of_each(dice: random.Random, likely: float) -> dict[str, str]:
    """Draw which bitmaps an image has, mostly as libvirt leaves them."""
    others = (*commits.KINDS, "absent")
    drawn = {name: "recording" if dice.random() < likely else dice.choice(others) for name in NAMES}
    return {name: kind for name, kind in drawn.items() if kind != "absent"}


def an_image(
    folder: t.Any, number: int, dice: random.Random, size: int, kind: str, below: Layer | None, likely: float
) -> Layer:
    """Make an image of a random shape, with bitmaps, that a guest has written to."""
    path, bitmaps = str(folder / f"image{number}"), a_bitmap_of_each(dice, likely)
    if kind == "raw":
        qemu.qemu_img("create", "-q", "-f", "raw", path, str(size))
        commits.random_writes(path, dice, size, dice.randint(0, 12), 0, "raw")
        return Layer(path, "raw", size, {})
    is_extended = kind == "extended_l2" or (kind == "overlay" and dice.random() < 0.2)
    cluster_size = 1 << dice.choice((*range(14 if is_extended else 12, 22), 16, 16, 16))
    options = [f"cluster_size={cluster_size}"]
    if is_extended:
        options.append("extended_l2=on")
    if kind.startswith("data_file"):
        options += [f"data_file={path}.data", f"data_file_raw={'on' if kind == 'data_file_raw' else 'off'}"]
    if kind == "v2":
        options, bitmaps = [*options, "compat=0.10"], {}
    more = ["-b", below.path, "-F", below.form] if below else []
    qemu.create(path, size, *more, "-o", ",".join(options))
    qemu.add_bitmaps(path, [commits.bitmap(name, kind, 1 << dice.randint(9, 20)) for name, kind in bitmaps.items()])
    compressed = cluster_size if not (is_extended or kind.startswith("data_file")) else 0
    commits.random_writes(path, dice, size, dice.choice((0, 1, 5, 25)), compressed, "qcow2")
    if kind == "snapshots":
        qemu.qemu_img("snapshot", "-c", "s", path)
        commits.random_writes(path, dice, size, 5, 0, "qcow2")
    return Layer(path, "qcow2", size, bitmaps)


def a_chain(folder: t.Any, dice: random.Random, kind: str) -> Chain:
    """Make a chain: perhaps an image below BASE, BASE of this kind, and one to three overlays."""
    size = dice.choice((8 * MiB, 16 * MiB + 512 * 77, 24 * MiB + 4096))
    likely = dice.choice((0.55, 0.85, 1.0))
    layers: list[Layer] = []
    if kind in ("below", "below_raw", "v2"):
        form = "raw" if kind == "below_raw" else "plain"
        layers.insert(0, an_image(folder, 0, dice, size, form, None, likely))
    depth = dice.randint(1, 3)
    for number in range(1, depth + 2):
        of_layer = kind if number == 1 else "overlay"
        below = layers[0] if layers else None
        layers.insert(0, an_image(folder, number, dice, size, of_layer, below, likely))
        if kind == "smaller" and number == 1:
            size += dice.choice((512, 65536, 5 * MiB + 512))
    return Chain(layers, depth)


def is_valid(kinds: t.Sequence[str | None]) -> bool:
    """Whether libvirt can take an incremental backup by a bitmap that has these kinds, topmost image first."""
    has_it = [kind is not None for kind in kinds]
    return has_it[0] and {kind for kind in kinds if kind} == {"recording"} and has_it == sorted(has_it, reverse=True)


class Expected(t.NamedTuple):
    """What BASE must have of a bitmap."""

    kind: str | None  # None if it must be gone
    granularity: int
    least: list[Extents]  # that must be marked
    most: list[Extents]  # that may be marked; nothing else


def expected_of(name: str, chain: Chain, before: list[dict[str, Bits]]) -> Expected:
    """Return what must become of a bitmap: libvirt's rule, and what is not in it never becomes usable unrecorded."""
    kinds = [layer.bitmaps.get(name) for layer in chain.layers]
    part, base = before[: chain.depth + 1], kinds[chain.depth]
    all_own = [bits[name] for bits in part if name in bits]
    exact, whole = [bits.extents for bits in all_own], [bits.whole() for bits in all_own]
    if is_valid(kinds):
        return Expected("recording", before[0][name].granularity, exact, whole)
    if base is None or base == "inconsistent":
        return Expected(None, 0, [], [])
    of_base = before[chain.depth][name]
    if base == "disabled":
        return Expected("disabled", of_base.granularity, [of_base.extents], [of_base.extents])
    if all(kind == "recording" for kind in kinds[: chain.depth]):  # only below BASE something is wrong
        return Expected("recording", before[0][name].granularity, exact, whole)
    # Above an image that has not recorded, a bitmap of that name may be a later one: all that is held there counts.
    least, most, is_bad = [of_base.extents], [of_base.whole()], False
    for place in range(chain.depth - 1, -1, -1):
        is_bad = is_bad or kinds[place] != "recording"
        own = before[place].get(name) if kinds[place] == "recording" else None
        held = [commits.held_by(chain.layers[place].path)] if is_bad else []
        least += held or ([own.extents] if own else [])
        most += held + ([own.whole()] if own else [])
    return Expected("recording", of_base.granularity, least, most)


def judged(name: str, wanted: Expected, found: Bits, size: int) -> None:
    """Compare what BASE has with what it must have."""
    assert found.granularity == wanted.granularity, name
    marked = granules(found.extents, found.granularity)
    least = set().union(*(granules(extents, found.granularity) for extents in wanted.least))
    most = set().union(*(granules(extents, found.granularity) for extents in wanted.most))
    assert least <= marked <= most, (name, sorted(least - marked)[:5], sorted(marked - most)[:5])
    assert all(start + length <= size for start, length in found.extents)


def a_round(folder: t.Any, seed: int, kind: str) -> None:
    """Merge a random chain down, and judge all that came of it."""
    chain = a_chain(folder, random.Random(f"{seed} {kind}"), kind)
    top, base = chain.layers[0], chain.layers[chain.depth]
    paths = [layer.path for layer in chain.layers if layer.form == "qcow2"]
    before = commits.bits_of(folder, paths) + [{} for layer in chain.layers if layer.form == "raw"]
    wanted = {name: expected_of(name, chain, before) for name in NAMES}
    data = commits.content(top.path)
    snapshot = commits.content(base.path, "-l", "snapshot.name=s") if kind == "snapshots" else ""
    result = commits.merged(top.path, base.path, backing_format=base.form, accept_lost_bitmaps=kind in ("raw", "v2"))
    assert (result["state"], result["virtual_size"]) == ("committed", top.size)
    assert commits.content(base.path, "-f", base.form) == data
    data_file = {f"{os.path.basename(base.path)}.data"} if kind.startswith("data_file") else set()
    staying = {os.path.basename(layer.path) for layer in chain.layers[chain.depth :]}
    assert set(os.listdir(folder)) - {"nbd"} == staying | data_file
    if kind == "snapshots":
        assert commits.content(base.path, "-l", "snapshot.name=s") == snapshot
    if kind == "data_file_raw":
        with open(f"{base.path}.data", "rb") as file:  # which ends with a cluster
            assert hashlib.sha256(file.read(top.size)).hexdigest() == data
    if base.form == "qcow2":
        commits.check(base.path)
    if kind in ("raw", "v2"):
        assert (result["bitmaps"], result["exact"]) == ([], True)
    else:
        judge_bitmaps(folder, chain, wanted, result)


def judge_bitmaps(folder: t.Any, chain: Chain, wanted: dict[str, Expected], result: dict[str, t.Any]) -> None:
    """Compare BASE's bitmaps with what they must be, and what the result tells with what is there."""
    base = chain.layers[chain.depth].path
    (after,) = commits.bits_of(folder, [base])
    states = {name: recording for name, _granularity, recording, _inconsistent in qemu.bitmaps_of(base)}
    assert states == {name: one.kind == "recording" for name, one in wanted.items() if one.kind}
    for name, bits in after.items():
        judged(name, wanted[name], bits, chain.layers[0].size)
    below = [layer.bitmaps for layer in chain.layers[chain.depth + 1 :]]
    of_base = {name: "recording" if recording else "disabled" for name, recording in states.items()}
    after_all = {name: [kind, *(own.get(name) for own in below)] for name, kind in of_base.items()}
    usable = {name for name, kinds in after_all.items() if is_valid(kinds)}
    assert {one["name"] for one in result["bitmaps"]} == usable
    skipped = {one["name"]: one["reason"] for one in result["skipped_bitmaps"]}
    assert set(skipped) == {name for layer in chain.layers[: chain.depth + 1] for name in layer.bitmaps} - usable
    for name, reason in skipped.items():
        kinds = {layer.bitmaps.get(name, "gap") for layer in chain.layers}
        assert reason in kinds, (name, reason)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("seed", range(qemu.examples(2)))
def test_the_data_and_the_bits_of_random_chains(tmp_path, seed, kind):
    a_round(tmp_path, seed, kind)


def test_an_overlay_that_can_carry_nothing_is_refused_while_the_base_has_bitmaps(tmp_path):
    base = qemu.create(tmp_path / "base", "16M")
    qemu.add_bitmaps(base, [commits.bitmap("x", "recording", 65536)])
    top = commits.overlay(tmp_path / "top", base, "-o", "compat=0.10")
    commits.write(top, "write -P 7 1M 1M")
    data = commits.content(top)
    told = commits.refusal(top, base)
    assert (told.code, told.subject) == ("lost_bitmaps", top)
    assert "holds no bitmaps" in told.why
    qemu.qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", top)  # as it advises
    assert [one["name"] for one in commits.merged(top, base)["bitmaps"]] == ["x"]
    assert commits.content(base) == data
    (bits,) = commits.bits_of(tmp_path, [base])
    assert granules(bits["x"].extents, 65536) == set(range(16, 32))


def test_an_overlay_of_version_2_on_a_base_without_bitmaps(tmp_path):
    base = qemu.create(tmp_path / "base", "16M")
    top = commits.overlay(tmp_path / "top", base, "-o", "compat=0.10")
    commits.write(top, "write -P 7 1M 1M", "write -z 3M 1M")
    data = commits.content(top)
    assert commits.merged(top, base)["state"] == "committed"
    assert commits.content(base) == data
    assert commits.merged(top, base)["state"] == "absent"
