# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A corpus of images made by the real QEMU, and mutations of what is written in them."""

from __future__ import annotations

import os
import pathlib
import random
import struct
import subprocess
import typing as t

import qemu

SIZE = 8 << 20
WAYS = 8  # see _edit
INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 9, 15, 20, 21, 22, 31, 32, 63, 64, 71, 72, 103, 104, 105, 112, 255, 256, 511, 512, 513),
    *(1022, 1023, 1024, 4096, 16384, 65534, 65535, 65536, 1024 * 65535, 1024 * 65535 + 1, 32 << 20, (32 << 20) + 1),
    *((1 << bits) + off for bits in (31, 32, 55, 56, 62, 63, 64) for off in (-1, 0, 1)),
    *(0xE2792ACA, 0x23852875, 0x44415441, 0x0537BE77, 0x6803F857),  # the types of header extensions
)
TEXTS = (b"\0", b"\xff\xfe", "\u202e\u200b".encode(), b'\n",\\', "\U0001f600".encode(), b"json:{", b"nbd:", b"/", b"..")
_HEADER = (
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
)
_ENTRY = ((0, 8), (8, 4), (12, 4), (16, 1), (17, 1), (18, 2), (20, 4), (24, 1))  # of the bitmap directory
_OFFSET = 0x00FFFFFFFFFFFE00  # of an entry of the L1 table
_BITMAPS = ((0, 4), (4, 4), (8, 8), (16, 8))  # of the header extension


class Field(t.NamedTuple):
    """A number in an image."""

    offset: int  # bytes
    size: int  # bytes


class Seed(t.NamedTuple):
    """An image of the corpus."""

    name: str
    path: pathlib.Path
    format: str
    length: int  # bytes
    regions: dict[str, list[Field]]  # the numbers by the structure that they belong to


class Mutation(t.NamedTuple):
    """What is done to an image."""

    edits: tuple[tuple[int, bytes], ...]  # at this offset, these bytes
    length: int | None  # bytes to which it is cut or grown at last

    def apply(self, path: pathlib.Path) -> None:
        """Do it to a copy of the seed."""
        with open(path, "r+b") as file:
            for offset, data in self.edits:
                file.seek(offset)
                file.write(data)
            if self.length is not None:
                file.truncate(self.length)


def build_corpus(folder: pathlib.Path) -> list[Seed]:
    """Return the seeds, made in the folder; what images name lies there too."""
    three = [
        qemu.Bitmap("monday", 65536, True, False),
        qemu.Bitmap("off", 4096, False, False),
        qemu.Bitmap("crashed", 65536, True, True),
    ]
    long = [qemu.Bitmap("ä" * 511, 512, True, False), qemu.Bitmap("x" * 1023, 65536, True, False)]
    base = qemu.create(folder / "base.qcow2", SIZE)
    compressed = ("-o", "compression_type=zstd")
    many = [qemu.Bitmap(f"chk-{n}", 1 << (9 + n % 9), n % 3 > 0, False) for n in range(40)]
    made = {
        "v2": ((), "compat=0.10", []),
        "v2-backing": (("-b", base, "-F", "qcow2"), "compat=0.10", []),
        "v3": ((), "cluster_size=64k", three),
        "small": ((), "cluster_size=512", three),
        "large": ((), "cluster_size=2M,extended_l2=on,lazy_refcounts=on", three[:1]),
        "backing": (("-b", base, "-F", "qcow2"), "cluster_size=4k,refcount_bits=1", three),
        "long-names": ((), "cluster_size=1k", long),
        "many": ((), "cluster_size=512", many),
        "data-file": ((), f"data_file={folder}/data", three[:2]),
        "data-file-raw": ((), f"data_file={folder}/data-raw,data_file_raw=on", three[:1]),
        "snapshots": ((), "cluster_size=4k", three),
        "compressed": (compressed, "cluster_size=64k", three[:2]),
    }
    seeds = []
    for name, (arguments, options, bitmaps) in made.items():
        path = folder / f"{name}.qcow2"
        qemu.create(path, SIZE, *arguments, "-o", options)
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write {'-c ' if name == 'compressed' else ''}0 64k", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        if name == "snapshots":  # a snapshot taken later would hold bitmaps in use
            qemu.qemu_img("snapshot", "-c", "one", str(path))
        qemu.add_bitmaps(path, bitmaps)
        subprocess.run(  # after which bits are set
            ["qemu-io", "-f", "qcow2", "-c", "write 1M 300k", str(path)], check=True, stdout=subprocess.DEVNULL
        )
        seeds.append(_seed(name, path))
    seeds.append(_seed("luks", _encrypted(folder / "luks.qcow2")))
    raw = folder / "raw.img"
    raw.write_bytes(random.Random(0).randbytes(65536))
    return [*seeds, Seed("raw", raw, "raw", 65536, {"anywhere": [Field(0, 8)]})]


def _encrypted(path: pathlib.Path) -> pathlib.Path:
    """Make an encrypted image."""
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    command = ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o", options, str(path), str(SIZE)]
    qemu.qemu_img(*command)
    return path


def _seed(name: str, path: pathlib.Path) -> Seed:
    """Return a qcow2 image with the places of what is written in it (qcow2 spec)."""
    data = path.read_bytes()
    (length,) = struct.unpack_from(">I", data, 100) if data[7] == 3 else (72,)
    l1_entries, l1_offset, refcounts, clusters = struct.unpack_from(">IQQI", data, 36)
    snapshots, snapshots_offset = struct.unpack_from(">IQ", data, 60)
    regions = {
        "header": [Field(*field) for field in _HEADER if field[0] + field[1] <= length],
        "L1 table": [Field(l1_offset + 8 * n, 8) for n in range(min(l1_entries, 64))],
        "refcount table": [Field(refcounts + 8 * n, 8) for n in range(min(64 * clusters, 64))],
        "anywhere": [Field(offset, 8) for offset in range(0, len(data), 512)],
    }
    l2_offset = struct.unpack_from(">Q", data, l1_offset)[0] & _OFFSET
    if l2_offset:
        regions["L2 table"] = [Field(l2_offset + 8 * n, 8) for n in range(32)]
    if snapshots:
        regions["snapshot table"] = [Field(snapshots_offset + 4 * n, 4) for n in range(16)]
    extensions, offset = [], length
    while offset + 8 <= len(data):
        kind, size = struct.unpack_from(">II", data, offset)
        extensions += [Field(offset, 4), Field(offset + 4, 4)]
        if kind == 0:
            break
        if kind == 0x23852875:
            regions["bitmaps extension"] = [Field(offset + 8 + at, width) for at, width in _BITMAPS]
            regions.update(_bitmap_regions(data, *struct.unpack_from(">QQ", data, offset + 16)))
        else:
            extensions += [Field(offset + 8 + n, 1) for n in range(min(size, 32))]
        offset += 8 + (size + 7) // 8 * 8
    return Seed(name, path, "qcow2", len(data), {**regions, "header extensions": extensions})


def _bitmap_regions(data: bytes, size: int, offset: int) -> dict[str, list[Field]]:
    """Return the numbers of the bitmap directory and of the bitmap tables."""
    entries: list[Field] = []
    tables: list[Field] = []
    end = offset + size
    while offset < end:
        table, length = struct.unpack_from(">QI", data, offset)
        entries += [Field(offset + at, width) for at, width in _ENTRY]
        tables += [Field(table + 8 * n, 8) for n in range(min(length, 8))]
        offset += (24 + struct.unpack_from(">H", data, offset + 18)[0] + 7) // 8 * 8
    return {"bitmap directory": entries, "bitmap table": tables}


def mutation(seed: Seed, corpus: t.Sequence[Seed], randomness: random.Random) -> Mutation:
    """Return a random mutation: one to three edits, and now and then another length."""
    edits = [_edit(seed, corpus, randomness) for _each in range(randomness.choice((1, 1, 1, 2, 3)))]
    length = None
    if randomness.random() < 0.06:
        near = randomness.choice([field for fields in seed.regions.values() for field in fields])
        length = randomness.choice(
            (
                randomness.choice(INTERESTING[:24]),
                near.offset,
                near.offset + 1,
                seed.length - 1,
                seed.length // 2,
                seed.length + 1,
                seed.length + (1 << 24),
            )
        )
    return Mutation(tuple(edits), length)


def _edit(seed: Seed, corpus: t.Sequence[Seed], randomness: random.Random) -> tuple[int, bytes]:
    """Return one edit, of a number in most cases."""
    fields = seed.regions[randomness.choice(sorted(seed.regions))]
    field = randomness.choice(fields)
    with open(seed.path, "rb") as file:
        old = os.pread(file.fileno(), field.size, field.offset).ljust(field.size, b"\0")
    way = randomness.randrange(WAYS)
    if way == 0:
        return field.offset, randomness.randbytes(randomness.randint(1, 24))
    if way == 1:
        return field.offset + randomness.randrange(32), randomness.choice(TEXTS)
    if way == 2:
        return field.offset, _piece(randomness.choice(corpus), randomness)
    if way == 3:
        return field.offset, _piece(seed, randomness)
    return field.offset, _near(int.from_bytes(old, "big"), seed, field.size, randomness)


def _near(number: int, seed: Seed, size: int, randomness: random.Random) -> bytes:
    """Return a number that is just off, or at a limit."""
    flipped = number ^ (1 << randomness.randrange(8 * size))
    around = (number - 1, number + 1, number * 2, number // 2, flipped, seed.length, seed.length - 512, number + 512)
    value = randomness.choice(randomness.choice((around, INTERESTING, (flipped,))))
    return (value % (1 << 8 * size)).to_bytes(size, "big")


def _piece(seed: Seed, randomness: random.Random) -> bytes:
    """Return a piece out of an image."""
    field = randomness.choice(seed.regions[randomness.choice(sorted(seed.regions))])
    with open(seed.path, "rb") as file:
        return os.pread(file.fileno(), randomness.choice((8, 16, 24, 64, 512)), field.offset) or b"\0"
