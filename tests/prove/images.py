# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile images: mutants of what QEMU has made, and images that claim as much as the format allows."""

from __future__ import annotations

import functools
import json
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import typing as t

import kinds
import lab
import modules
import mutants
import rounds
import runs
import tampered

BOMB_MEMORY = 1 << 30  # bytes of address space that qcow2_info gets for an image that claims the most
READER_BATCH = 1000  # mutants that one process reads
READER_SHARE = 40  # mutants for the reader, for each one for the modules
DIRECTORY_AT, TABLES_AT = 64 << 20, 256 << 20  # bytes; of an image that claims a lot


class Said(t.NamedTuple):
    """What qemu-img says of an image."""

    opens: bool
    size: int  # bytes
    bitmaps: list[tuple[str, int, bool, bool]]  # name, granularity, recording, inconsistent

    @property
    def carried(self) -> dict[str, int]:
        """The granularity of the bitmaps that must go on recording."""
        return {name: granularity for name, granularity, recording, lost in self.bitmaps if recording and not lost}


def ask_qemu(path: pathlib.Path, image_format: str = "qcow2") -> Said:
    """Return what qemu-img says of an image, or that it cannot open it."""
    command = ["qemu-img", "info", "--output=json", "-f", image_format, str(path)]
    said = subprocess.run(command, capture_output=True, check=False, timeout=60)
    if said.returncode:
        return Said(False, 0, [])
    about = json.loads(said.stdout.decode("utf-8", "replace"))
    bitmaps = about.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return Said(
        True,
        about["virtual-size"],
        [(b["name"], b["granularity"], "auto" in b["flags"], "in-use" in b["flags"]) for b in bitmaps],
    )


def play_mutant(ground: lab.Lab, corpus: list[mutants.Seed], name: str, asked: rounds.Choice) -> rounds.Finding:
    """Run both modules on a mutant."""
    randomness = asked.randomness(name)
    seed = randomness.choice(corpus)
    shutil.copyfile(seed.path, ground.disks[0].active)
    mutants.mutation(seed, corpus, randomness).apply(ground.disks[0].active)
    finding = judge_image(ground, seed.format)
    return finding._replace(violations=[f"{what} (a mutant of {seed.name})" for what in finding.violations])


def judge_image(ground: lab.Lab, image_format: str = "qcow2") -> rounds.Finding:
    """Run both modules on the image that is there and compare them with qemu-img."""
    active, target = ground.disks[0].active, ground.disks[0].target
    active.chmod(0o640)
    said = ask_qemu(active, image_format)
    ground.disks = [kinds.Disk(active, target, said.carried, said.size, image_format)]
    ground.promise.prepare()
    info = modules.run(ground, "qcow2_info", path=str(active))
    wrong = [f"qcow2_info: {what}" for what in [*modules.run_wrong(info, [active]), *ground.promise.images_wrong()]]
    if said.opens and image_format == "qcow2":
        wrong += info_wrong(info, said)
    overlay = modules.run(
        ground, "qcow2_overlay", path=str(target), backing_file=str(active), backing_format=image_format, timeout=15
    )
    wrong += [
        *modules.run_wrong(overlay, [active, target]),
        *ground.ended_wrong(overlay),
    ]
    created = overlay.states == ["created"]
    if created and not said.opens:
        wrong.append("created on an image that qemu-img cannot open")
    outcome = "created" if created else "refused" + (", qemu-img opens it" if said.opens else ", and by qemu-img")
    return rounds.Finding(f"{outcome}; qcow2_info {'fails' if info.status else 'reports'}", wrong)


def info_wrong(info: runs.Run, said: Said) -> list[str]:
    """Return in what qcow2_info differs from qemu-img about an image that both can read."""
    images = [image for disk in (info.result or {}).get("disks", ()) for image in disk["images"]]
    if not images:
        return []
    ours = [(b["name"], b["granularity"], b["recording"], b["inconsistent"]) for b in images[0]["bitmaps"]]
    # Names that are no valid text come mangled out of QEMU, and spelt out of the module.
    plain = all(
        name.isprintable() and "\\" not in name and "\ufffd" not in name for name, *_rest in ours + said.bitmaps
    )
    seen, expected = ([bitmap[0 if plain else 1 :] for bitmap in some] for some in (ours, said.bitmaps))
    wrong = []
    if sorted(seen) != sorted(expected):
        wrong.append(f"qcow2_info has the bitmaps {ours}, qemu-img {said.bitmaps}")
    if images[0]["virtual_size"] != said.size:
        wrong.append(f"qcow2_info has the size {images[0]['virtual_size']}, qemu-img {said.size}")
    return wrong


def read_mutants(_ground: lab.Lab, corpus: pathlib.Path, word: str, first: int, count: int) -> rounds.Finding:
    """Have the reader alone read many mutants in one process."""
    command = [sys.executable, str(kinds.HERE / "reader.py"), str(corpus), word, str(first), str(count)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    book = json.loads(said.stdout)
    return rounds.Finding("", book["violations"], (), book["counts"])


def mutant_jobs(folder: pathlib.Path, asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with mutants."""
    corpus = mutants.build_corpus(folder)
    pickled = folder / "corpus.pickle"
    pickled.write_bytes(pickle.dumps(corpus))
    jobs = [
        rounds.Job("mutant, both modules", name, functools.partial(play_mutant, corpus=corpus, name=name, asked=asked))
        for name in (f"mutant-{n}" for n in range(asked.rounds))
    ]
    jobs += tampered.mutant_jobs(corpus, asked)
    for first in range(0, asked.rounds * READER_SHARE, READER_BATCH):
        count = min(READER_BATCH, asked.rounds * READER_SHARE - first)
        play = functools.partial(read_mutants, corpus=pickled, word=str(asked.seed), first=first, count=count)
        jobs.append(rounds.Job("mutant, reader alone", f"reader-{first}", play))
    return jobs


def bomb(path: pathlib.Path, bitmaps: int, name: t.Callable[[int], bytes], entries: int, bits: int, fill: int) -> None:
    """Write a sparse image with so many bitmaps, each with a table of so many entries of this value."""
    cluster, header = 512, bytearray(512)
    directory = b"".join(_entry(number, name(number), entries, bits) for number in range(bitmaps))
    size = (entries * cluster * 8) << bits
    l1 = -(-size // (cluster * cluster // 8))
    struct.pack_into(">4sIQIIQIIQQIIQ", header, 0, b"QFI\xfb", 3, 0, 0, 9, size, 0, l1, 1024, 512, 1, 0, 0)
    struct.pack_into(">QQQII", header, 72, 0, 0, 1, 4, 104)
    struct.pack_into(">IIIIQQ", header, 104, 0x23852875, 24, bitmaps, 0, len(directory), DIRECTORY_AT)
    with open(path, "wb") as file:
        file.write(header)
        file.seek(DIRECTORY_AT)
        file.write(directory)
        file.truncate(TABLES_AT + bitmaps * _room(entries))
        for number in range(bitmaps if fill else 0):
            file.seek(TABLES_AT + number * _room(entries))
            file.write(struct.pack(">Q", fill) * entries)


def _room(entries: int) -> int:
    """Return the bytes from one bitmap table to the next."""
    return -(-entries * 8 // 512) * 512


def _entry(number: int, name: bytes, entries: int, bits: int) -> bytes:
    """Return an entry of the bitmap directory (qcow2 spec)."""
    fixed = struct.pack(">QIIBBHI", TABLES_AT + number * _room(entries), entries, 2, 1, bits, len(name), 0)
    return (fixed + name).ljust(-(-(24 + len(name)) // 8) * 8, b"\0")


BOMBS: dict[str, tuple[int, t.Callable[[int], bytes], int, int, int]] = {
    "all bitmaps with the longest names": (65535, lambda n: b"%06d" % n + "\U0001f600".encode() * 254, 1, 16, 0),
    "names of one byte more each": (1023, lambda n: b"x" * (n + 1), 1, 16, 0),
    "as many tables as are reported, each as long as can be": (16384, lambda n: b"%d" % n, 65536, 9, 0),
    "some tables that say that all is dirty": (8, lambda n: b"%d" % n, 65536, 9, 1),
}


def explode(ground: lab.Lab, what: str) -> rounds.Finding:
    """Run the modules on an image that claims a lot, with little memory for qcow2_info."""
    active, target = ground.disks[0].active, ground.disks[0].target
    bomb(active, *BOMBS[what])
    before = active.stat()
    info = modules.run(ground, "qcow2_info", BOMB_MEMORY, path=str(active))
    wrong = [f"qcow2_info: {each}" for each in modules.run_wrong(info, [active], BOMB_MEMORY >> 10)]
    overlay = modules.run(ground, "qcow2_overlay", path=str(target), backing_file=str(active), timeout=15)
    # QEMU is the one that takes the memory here, as much as is given for bitmaps.
    wrong += modules.run_wrong(overlay, [active, target], (4 << 20) + modules.MOST_MEMORY)
    if (active.stat().st_mtime_ns, active.stat().st_size) != (before.st_mtime_ns, before.st_size):
        wrong.append("ACTIVE was changed")
    if overlay.states == ["created"] and not ask_qemu(active).opens:
        wrong.append("created on an image that qemu-img cannot open")
    words = f"{'+'.join(overlay.states)}; qcow2_info {'fails' if info.status else 'reports'}"
    return rounds.Finding(f"{words}, with {info.memory >> 10} MiB", wrong)


def bomb_jobs() -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with images that claim a lot."""
    return [
        rounds.Job("an image that claims a lot", f"bomb-{number}", functools.partial(explode, what=what))
        for number, what in enumerate(BOMBS)
    ]
