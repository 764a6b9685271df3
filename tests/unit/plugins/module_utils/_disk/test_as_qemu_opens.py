# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Chains of which one image was changed: what QEMU opens is fit, and what QEMU refuses is refused.

What stays different is listed here, and in docs/design.md with the reasons. OPEN_EXAMPLES in the environment sets how
many changed images are tried.
"""

from __future__ import annotations

import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import typing as t

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import QemuError, Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.observe import Target, observe_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest, decide
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor, find_qemu

from .. import qemu

EXAMPLES = int(os.environ.get("OPEN_EXAMPLES", qemu.examples(450)))
PARTS = 6  # the examples are shared out, so that they run at the same time
SIZE = 8 << 20
SECRET = {"qom-type": "secret", "id": "s", "data": "0123456789abcdef"}
# What this collection refuses although QEMU opens it, by words of the message.
STRICTER = {
    "bitmaps that overlap, or lie outside the file": r"overlaps another one or leaves the file|directory.* lies at|"
    r"ends within the (bitmap directory|table of the bitmap)",
    "bitmaps that cannot be named": r"has no name, or that of another one|cannot be passed to QEMU's monitor",
    "a file that ends within its L1 table": r"ends within the L1 table",
    "an encrypted image as ACTIVE": r"is encrypted\. An overlay would hold",
    "AES, on which VMs do not run": r"encrypted in the old way",
    "a data file that can be anything": r"is a protocol for QEMU|neither a file nor a block device",
    "ACTIVE that is marked corrupt": r"is marked corrupt",
}
# What QEMU refuses although this collection does not, by QEMU's words.
LOOSER = {
    "the LUKS header itself": r"Request for data outside of extension header|not in LUKS format|LUKS",
    "images of other formats": r"invalid VPC image",
}


class Place(t.NamedTuple):
    """An image of a chain that is changed, and the image from which QEMU opens the chain."""

    name: str
    changed: pathlib.Path
    top: pathlib.Path
    whole: bytes  # what is in it
    fields: tuple[tuple[int, int], ...]  # offset and length in bytes of the numbers in it


def build(folder: pathlib.Path) -> list[Place]:
    """Return the places; all images lie in the folder."""
    three = [
        Bitmap("monday", 65536, True, False),
        Bitmap("off", 4096, False, False),
        Bitmap("crashed", 65536, True, True),
    ]
    base = folder / "base"
    qemu.create(base, SIZE, "-o", "cluster_size=4k")
    qemu.add_bitmaps(base, three)
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    made: dict[str, tuple[str, list[Bitmap]]] = {
        "v2": ("compat=0.10,cluster_size=4k", []),
        "v3": ("cluster_size=64k", three),
        "fresh": ("cluster_size=4k", []),
        "small": ("cluster_size=512", three),
        "snapshots": ("cluster_size=4k", three[:2]),
        "v2-snapshots": ("cluster_size=4k,compat=0.10", []),
        "extended": ("cluster_size=16k,extended_l2=on,lazy_refcounts=on", three[:1]),
        "compressed": ("compression_type=zstd", []),
        "data-file": (f"data_file={folder}/data", three[:1]),
        "data-file-raw": (f"data_file={folder}/data-raw,data_file_raw=on", []),
        "luks": (luks, []),
    }
    places = []
    for name, (options, bitmaps) in made.items():
        top, middle = folder / name, folder / f"{name} below"
        # An image with a raw data file has no backing file.
        _make(top, options, [] if "raw" in options else ["-b", str(base), "-F", "qcow2"])
        if "snapshots" in name:
            qemu.qemu_img("snapshot", "-c", "one", str(top))
            qemu.qemu_img("snapshot", "-c", "two", str(top))
        qemu.add_bitmaps(top, bitmaps)
        shutil.copyfile(top, middle)
        qemu.create(folder / f"{name} above", SIZE, "-u", "-b", str(middle), "-F", "qcow2")
        data = top.read_bytes()
        fields = tuple(_fields(data))
        places.append(Place(f"{name} as the topmost image", top, top, data, fields))
        places.append(Place(f"{name} below another image", middle, folder / f"{name} above", data, fields))
    data = base.read_bytes()
    return [*places, Place("the base of three", base, folder / "fresh above", data, tuple(_fields(data)))]


def _make(path: pathlib.Path, options: str, backing: list[str]) -> None:
    """Make an image; QEMU measures the processor before it makes an encrypted one, and now and then cannot."""
    secret = ["--object", f"secret,id=s,data={SECRET['data']}"] if "luks" in options else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, "-u", *backing, str(path), str(SIZE)]
    for _try in range(20):
        if subprocess.run(command, check=False, capture_output="luks" in options).returncode == 0:
            return
    raise RuntimeError(f"QEMU does not make {path}")


def _fields(data: bytes) -> t.Iterator[tuple[int, int]]:
    """Yield the places of the numbers in an image (qcow2 spec)."""
    header = ((4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8))
    yield from header
    offset = 72
    if data[7] == 3:
        yield from ((72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1))
        (offset,) = struct.unpack_from(">I", data, 100)
    snapshots, table = struct.unpack_from(">IQ", data, 60)
    yield from ((table + at, 4) for at in range(0, 100 if snapshots else 0, 4))
    kind = 1
    while kind:
        kind, length = struct.unpack_from(">II", data, offset)
        yield from ((offset, 4), (offset + 4, 4), *((offset + 8 + at, 8) for at in range(0, min(length, 40), 8)))
        if kind == 0x23852875:
            yield from _bitmap_fields(data, *struct.unpack_from(">QQ", data, offset + 16))
        offset += 8 + (length + 7) // 8 * 8


def _bitmap_fields(data: bytes, size: int, offset: int) -> t.Iterator[tuple[int, int]]:
    """Yield the places of the numbers in the bitmap directory and the first entries of the bitmap tables."""
    end = offset + size
    while offset < end:
        (table,) = struct.unpack_from(">Q", data, offset)
        yield from (
            (offset, 8),
            (offset + 8, 4),
            (offset + 12, 4),
            (offset + 16, 1),
            (offset + 17, 1),
            (offset + 18, 2),
        )
        yield from ((offset + 20, 4), (offset + 24, 8), (table, 8))
        offset += (24 + struct.unpack_from(">H", data, offset + 18)[0] + 7) // 8 * 8


class Change(t.NamedTuple):
    """What is changed in an image."""

    edits: tuple[tuple[int, bytes], ...]
    length: int | None  # bytes to which the file is cut

    def apply(self, place: Place) -> None:
        """Make it."""
        with open(place.changed, "r+b") as file:
            for offset, data in self.edits:
                file.seek(offset)
                file.write(data)
            if self.length is not None:
                file.truncate(self.length)

    def take_back(self, place: Place) -> None:
        """Have the image be as it was."""
        with open(place.changed, "r+b") as file:
            for offset, data in [*self.edits, *([] if self.length is None else [(self.length, place.whole)])]:
                file.seek(offset)
                file.write(place.whole[offset : offset + len(data)])
            file.truncate(len(place.whole))


NUMBERS = (
    *(0, 1, 2, 3, 4, 8, 9, 16, 21, 23, 24, 71, 72, 103, 104, 105, 112, 113, 511, 512, 1023, 1024, 1025, 4096, 0x50001),
    *(65535, 65536, 65537, 1 << 20, 8 << 20, 1 << 31, (1 << 32) - 1, 0x1_0001, 0x7FFF_FFFF),
    *(1 << 55, 1 << 62, (1 << 63) - 65536, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
    *(0xE2792ACA, 0x23852875, 0x44415441, 0x0537BE77, 0x6803F857, 0x12345678),  # types of header extensions
)
WORDS = (
    b"\0",
    b"raw\0",
    b"vhd\0",
    b"QCOW2",
    b"auto\0",
    b"vpc\0",
    b"file:",
    b"json:",
    b"nbd:",
    b"/",
    b"x/../",
    b"\xff\n",
)


def change_of(place: Place, dice: random.Random) -> Change:
    """Return a random change: one to three edits, or a file that is cut."""
    edits = []
    for _each in range(dice.choice((1, 1, 1, 1, 2, 3))):
        offset, size = dice.choice(place.fields)
        old = int.from_bytes(place.whole[offset : offset + size], "big")
        near = (old - 1, old + 1, old * 2, old // 2, old ^ (1 << dice.randrange(8 * size)), old + 512, old + 65536)
        number = dice.choice(dice.choice((NUMBERS, near)))
        data = (number % (1 << 8 * size)).to_bytes(size, "big")
        edits.append((offset, dice.choice((data, data, data, dice.choice(WORDS), dice.randbytes(size)))))
    length = dice.choice((len(place.whole) // 2, *(at for at, _size in place.fields))) if dice.random() < 0.03 else None
    return Change(tuple(edits), length)


class Opener:
    """A QEMU that opens chains, and another one after it was killed by one."""

    def __init__(self) -> None:
        self._monitor = self._new()

    def _new(self) -> Monitor:
        monitor = Monitor(find_qemu(shutil.which), qemu.SECONDS)
        monitor.command("object-add", SECRET)
        return monitor

    def close(self) -> None:
        """End it."""
        self._monitor.close()

    def why_not(self, place: Place) -> str | None:
        """Return in QEMU's words why it does not open the chain; None if it does."""
        node = _node(place.changed)
        if place.top != place.changed:
            above = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(place.top)}}
            node = {**above, "backing": node} if "encrypt" in node else above
        try:
            self._monitor.command("blockdev-add", {**node, "node-name": "top"})
            self._monitor.command("blockdev-del", {"node-name": "top"})
        except QemuError as exc:
            if exc.code == "qemu_lost":
                self.close()
                self._monitor = self._new()
            return str(exc)
        return None


def _node(path: pathlib.Path) -> dict[str, t.Any]:
    """Return how QEMU is to open the image, with the secret if its header says that one is needed."""
    node: dict[str, t.Any] = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(path)}}
    with open(path, "rb") as file:
        method = {1: "aes", 2: "luks"}.get(int.from_bytes(file.read(36)[32:36], "big"))
    return {**node, "encrypt": {"format": method, "key-secret": "s"}} if method else node


def refusals(path: pathlib.Path) -> list[str | None]:
    """Return why the modules that read warn of the chain, and those that write refuse it; None where they do not."""
    examined = examine_chain(str(path), follow=True, count=False)
    return [" ".join([*examined.warnings, str(examined.problem or "")]) or None, _why_no_overlay(path)]


def _why_no_overlay(path: pathlib.Path) -> str | None:
    """Return why there can be no overlay on the chain."""
    try:
        with open_image(str(path)) as file:
            active = observe_chain(file, "qcow2", relative=False)
    except Refusal as exc:
        return str(exc)
    overlay = str(path.parent / "overlay")
    problems = decide(OverlayRequest(overlay, str(path)), active, Target(overlay, str(path.parent))).problems
    return " ".join(map(str, problems)) or None


def differences(place: Place, opener: Opener) -> list[str]:
    """Return in what this collection and QEMU differ about the chain, but for what is known."""
    theirs = opener.why_not(place)
    found = []
    for ours in refusals(place.top):
        known = STRICTER if ours else LOOSER
        if (ours is None) != (theirs is None) and not any(
            re.search(each, ours or theirs or "") for each in known.values()
        ):
            found.append(f"{place.name}: QEMU: {theirs or 'opens it'}; here: {ours or 'fit'}")
    return found


@pytest.mark.parametrize("known, heading", [(STRICTER, "stricter"), (LOOSER, "looser")])
def test_each_known_difference_is_documented(known, heading):
    text = (pathlib.Path(__file__).parents[5] / "docs/design.md").read_text(encoding="utf-8")
    table = text.split(f"| {heading} | because |\n|---|---|\n")[1].split("\n\n")[0]
    assert [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()] == list(known)


@pytest.fixture(name="places", scope="module")
def fixture_places(tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    return build(tmp_path_factory.mktemp("chains"))


@pytest.mark.parametrize("part", range(PARTS))
def test_what_qemu_opens_is_fit_and_nothing_else(places, part):
    opener = Opener()
    wrong = []
    try:
        assert [difference for place in places for difference in differences(place, opener)] == []
        for number in range(part, EXAMPLES, PARTS):
            dice = random.Random(number)
            place = dice.choice(places)
            change = change_of(place, dice)
            change.apply(place)
            wrong += [f"{number}: {difference} ({change})" for difference in differences(place, opener)]
            change.take_back(place)
            assert place.changed.read_bytes() == place.whole, change
    finally:
        opener.close()
    assert not wrong, f"{len(wrong)} differences:\n" + "\n".join(wrong[:40])
