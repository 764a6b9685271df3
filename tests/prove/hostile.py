# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile images, folders and names: mutants of images, races for the files of a run, odd names, and bait.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/hostile.py. Needs QEMU, gcc and
strace. For a night: --rounds 50000, with a new --seed each time.

A mutant is made out of an image that QEMU has made; qcow2_overlay and qcow2_info are run on it, and what they say is
compared with what qemu-img says of it. After each run ACTIVE is what it was, to the byte; the overlay is complete and
carries what qemu-img sees in ACTIVE, or is absent; there is a result, and a message that names the file if it failed;
nothing is left. Of what lies outside the folder of the overlays, nothing is made, changed, or opened if it is bait.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import typing as t

import lab
import mutants
import qemu

MODULES = ("qcow2_overlay", "qcow2_info")
LONGEST = 20.0  # seconds that a run may take, whatever the image says
MOST_MEMORY = 512 << 10  # KiB that a run may take for a mutant, whatever the image says
BOMB_MEMORY = 1 << 30  # bytes of address space that qcow2_info gets for an image that claims the most
READER_BATCH = 1000  # mutants that one process reads
READER_SHARE = 40  # mutants for the reader, for each one for the modules
NOBODY = 65534
HERE = pathlib.Path(__file__).resolve().parent


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


def run(ground: lab.Lab, module: str, memory: int | None = None, **arguments: t.Any) -> lab.Run:
    """Run a module to its end."""
    if any(isinstance(value, str) and not _is_text(value) for value in arguments.values()):
        arguments["_ansible_no_log"] = True  # or Ansible would end on the name before the module begins
    ground.runner.start(arguments, {"PROVE_FOLDER": f"{ground.place}/"}, None, module, memory)
    ended = ground.runner.answer()
    assert ended is not None
    return ended


def _is_text(value: str) -> bool:
    """Whether there are only bytes in it that are UTF-8, and no NUL."""
    return "\0" not in value and value == value.encode("utf-8", "replace").decode()


def run_wrong(ended: lab.Run, names: t.Sequence[t.Any], most: int = MOST_MEMORY) -> list[str]:
    """Return what is wrong with a run whatever it was for; a message must have one of the names in it."""
    if ended.result is None or "Traceback" in ended.stderr:
        return [f"ended with {ended.status} and no result: {ended.stderr[-2000:]}"]
    wrong = []
    if ended.status and not any(_in_message(name) in ended.message for name in names):
        wrong.append(f"the message names no file: {ended.message!r}")
    if ended.seconds > LONGEST or ended.memory > most:
        wrong.append(f"took {ended.seconds:.1f} s and {ended.memory} KiB")
    return wrong if ended.alone else [*wrong, "left a process behind"]


def _in_message(name: t.Any) -> str:
    """Return a name as a message can have it."""
    return str(name).encode("utf-8", "backslashreplace").decode()


# Mutants


def play_mutant(ground: lab.Lab, corpus: list[mutants.Seed], name: str, asked: lab.Choice) -> lab.Finding:
    """Run both modules on a mutant."""
    randomness = asked.randomness(name)
    seed = randomness.choice(corpus)
    shutil.copyfile(seed.path, ground.disks[0].active)
    mutants.mutation(seed, corpus, randomness).apply(ground.disks[0].active)
    finding = judge_image(ground, seed.format)
    return finding._replace(violations=[f"{what} (a mutant of {seed.name})" for what in finding.violations])


def judge_image(ground: lab.Lab, image_format: str = "qcow2") -> lab.Finding:
    """Run both modules on the image that is there and compare them with qemu-img."""
    active, target = ground.disks[0].active, ground.disks[0].target
    active.chmod(0o640)
    said = ask_qemu(active, image_format)
    ground.disks = [lab.Disk(active, target, said.carried, said.size, image_format)]
    ground.before = {active: lab.identity(active)}
    info = run(ground, "qcow2_info", path=str(active))
    wrong = [f"qcow2_info: {what}" for what in [*run_wrong(info, [active]), *ground.images_wrong()]]
    if said.opens and image_format == "qcow2":
        wrong += info_wrong(info, said)
    overlay = run(
        ground, "qcow2_overlay", path=str(target), backing_file=str(active), backing_format=image_format, timeout=15
    )
    # What is wrong below ACTIVE, such as a format that QEMU does not know, was so before, and no overlay's fault.
    below = "Could not open backing file: Could not open backing file"
    wrong += [*run_wrong(overlay, [active, target]), *(w for w in ground.ended_wrong(overlay) if below not in w)]
    created = overlay.states == ["created"]
    if created and not said.opens:
        wrong.append("created on an image that qemu-img cannot open")
    outcome = "created" if created else "refused" + (", qemu-img opens it" if said.opens else ", and by qemu-img")
    return lab.Finding(f"{outcome}; qcow2_info {'fails' if info.status else 'reports'}", wrong)


def info_wrong(info: lab.Run, said: Said) -> list[str]:
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


def read_mutants(_ground: lab.Lab, corpus: pathlib.Path, word: str, first: int, count: int) -> lab.Finding:
    """Have the reader alone read many mutants in one process."""
    command = [sys.executable, str(HERE / "reader.py"), str(corpus), word, str(first), str(count)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    book = json.loads(said.stdout)
    return lab.Finding("", book["violations"], (), book["counts"])


def mutant_jobs(folder: pathlib.Path, asked: lab.Choice) -> list[lab.Job]:
    """Return the rounds with mutants."""
    corpus = mutants.build_corpus(folder)
    pickled = folder / "corpus.pickle"
    pickled.write_bytes(pickle.dumps(corpus))
    jobs = [
        lab.Job("mutant, both modules", f"mutant-{n}", lambda g, n=n: play_mutant(g, corpus, f"mutant-{n}", asked))
        for n in range(asked.rounds)
    ]
    for first in range(0, asked.rounds * READER_SHARE, READER_BATCH):
        count = min(READER_BATCH, asked.rounds * READER_SHARE - first)
        play = lambda g, first=first, count=count: read_mutants(g, pickled, str(asked.seed), first, count)  # noqa: E731
        jobs.append(lab.Job("mutant, reader alone", f"reader-{first}", play))
    return jobs


# Images that claim as much as the format allows


def bomb(path: pathlib.Path, bitmaps: int, name: t.Callable[[int], bytes], entries: int, bits: int, fill: int) -> None:
    """Write a sparse image with so many bitmaps, each with a table of so many entries of this value."""
    cluster, header = 512, bytearray(512)
    directory = b"".join(_entry(number, name(number), entries, bits, bitmaps) for number in range(bitmaps))
    size = (entries * cluster * 8) << bits
    l1 = -(-size // (cluster * cluster // 8))
    tables = _tables_at(bitmaps)
    struct.pack_into(">4sIQIIQIIQQIIQ", header, 0, b"QFI\xfb", 3, 0, 0, 9, size, 0, l1, 1024, 512, 1, 0, 0)
    struct.pack_into(">QQQII", header, 72, 0, 0, 1, 4, 104)
    struct.pack_into(">IIIIQQ", header, 104, 0x23852875, 24, bitmaps, 0, len(directory), 64 << 20)
    with open(path, "wb") as file:
        file.write(header)
        file.seek(64 << 20)
        file.write(directory)
        file.truncate(tables + bitmaps * _room(entries))
        for number in range(bitmaps if fill else 0):
            file.seek(tables + number * _room(entries))
            file.write(struct.pack(">Q", fill) * entries)


def _tables_at(bitmaps: int) -> int:
    """Return the offset of the first bitmap table."""
    return 256 << 20


def _room(entries: int) -> int:
    """Return the bytes from one bitmap table to the next."""
    return -(-entries * 8 // 512) * 512


def _entry(number: int, name: bytes, entries: int, bits: int, bitmaps: int) -> bytes:
    """Return an entry of the bitmap directory (qcow2 spec)."""
    fixed = struct.pack(">QIIBBHI", _tables_at(bitmaps) + number * _room(entries), entries, 2, 1, bits, len(name), 0)
    return (fixed + name).ljust(-(-(24 + len(name)) // 8) * 8, b"\0")


BOMBS: dict[str, tuple[int, t.Callable[[int], bytes], int, int, int]] = {
    "all bitmaps with the longest names": (65535, lambda n: b"%06d" % n + "\U0001f600".encode() * 254, 1, 16, 0),
    "names of one byte more each": (1023, lambda n: b"x" * (n + 1), 1, 16, 0),
    "as many tables as are reported, each as long as can be": (16384, lambda n: b"%d" % n, 65536, 9, 0),
    "some tables that say that all is dirty": (8, lambda n: b"%d" % n, 65536, 9, 1),
}


def explode(ground: lab.Lab, what: str) -> lab.Finding:
    """Run the modules on an image that claims a lot, with little memory for qcow2_info."""
    active, target = ground.disks[0].active, ground.disks[0].target
    bomb(active, *BOMBS[what])
    before = active.stat()
    info = run(ground, "qcow2_info", BOMB_MEMORY, path=str(active))
    wrong = [f"qcow2_info: {each}" for each in run_wrong(info, [active], BOMB_MEMORY >> 10)]
    overlay = run(ground, "qcow2_overlay", path=str(target), backing_file=str(active), timeout=15)
    # QEMU is the one that takes the memory here, as much as is given for bitmaps.
    wrong += run_wrong(overlay, [active, target], (4 << 20) + MOST_MEMORY)
    if (active.stat().st_mtime_ns, active.stat().st_size) != (before.st_mtime_ns, before.st_size):
        wrong.append("ACTIVE was changed")
    if overlay.states == ["created"] and not ask_qemu(active).opens:
        wrong.append("created on an image that qemu-img cannot open")
    words = f"{'+'.join(overlay.states)}; qcow2_info {'fails' if info.status else 'reports'}"
    return lab.Finding(f"{words}, with {info.memory >> 10} MiB", wrong)


# Names


class Odd(t.NamedTuple):
    """A name for a file, folder or bitmap."""

    name: str
    as_file: bool = True  # whether an overlay can be made with it
    as_bitmap: bool = True


ODD_NAMES = (
    Odd("new\nline"), Odd("comma,size=1"), Odd("a=b"), Odd("'single'"), Odd('"double"'), Odd("back\\slash\\"),
    Odd("-leading"), Odd("--help"), Odd("nbd:localhost:1"), Odd('json:{"driver":"null-co"}'), Odd("file:x"),
    Odd("fat:rw:"), Odd("fd:0"), Odd("{{ lookup }}"), Odd("{% x %}"), Odd("%s%n%d"), Odd("$HOME"), Odd("~root"),
    Odd("$(id)`id`"), Odd("\u202eright to left"), Odd("zero\u200bwidth\ufeff"), Odd("\u0301combining"), Odd("e\u0301"),
    Odd("\U0001f600"), Odd("tab\t\rreturn\x1b[31m\x07"), Odd(" blank "), Odd("..."), Odd("x" * 255),
    Odd("\u00e4" * 127), Odd(".qcow2_overlay-0123456789abcdef.tmp.x"), Odd("#x?y&z*[a]"), Odd("\x7f\x01"),
    Odd("not UTF-8 \udcff", as_file=False, as_bitmap=False), Odd("half \udcc3", as_file=False, as_bitmap=False),
    Odd("\ufdd0 no character", as_file=False, as_bitmap=False), Odd("\ufffe", as_file=False, as_bitmap=False),
    Odd("\U0010ffff", as_file=False, as_bitmap=False),
)  # fmt: skip
WHERE = ("target", "ACTIVE", "folder", "bitmap")


def set_up_name(ground: lab.Lab, odd: Odd, where: str) -> lab.Disk:
    """Have a disk with this name somewhere."""
    disk, raw = ground.disks[0], os.fsencode(odd.name)
    if where == "target":
        return disk._replace(target=ground.folder / odd.name)
    if where == "bitmap":
        # Put there by hand, since QEMU would not take all of them; the directory is written anew behind all else.
        rename_bitmap(disk.active, raw)
        bitmaps = {odd.name if name == "monday" else name: size for name, size in disk.bitmaps.items()}
        return disk._replace(bitmaps=bitmaps)
    active = ground.actives_folder / odd.name
    if where == "folder":
        active.mkdir()
        (ground.folder / odd.name).mkdir()
        active = active / "disk.qcow2"
        disk = disk._replace(target=ground.folder / odd.name / "disk.snap.qcow2")
    disk.active.rename(active)
    return disk._replace(active=active)


def rename_bitmap(path: pathlib.Path, new: bytes) -> None:
    """Give the bitmap "monday" of an image another name."""
    offset, length = qemu.directory_of(path)
    with open(path, "r+b") as file:
        directory = os.pread(file.fileno(), length, offset)
        entries, at = b"", 0
        while at < length:
            (name_size,) = struct.unpack_from(">H", directory, at + 18)
            name = directory[at + 24 : at + 24 + name_size]
            name = new if name == b"monday" else name
            entry = directory[at : at + 18] + struct.pack(">H", len(name)) + directory[at + 20 : at + 24] + name
            entries += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
            at += -(-(24 + name_size) // 8) * 8
        end = -(-file.seek(0, os.SEEK_END) // 65536) * 65536
        os.pwrite(file.fileno(), entries.ljust(65536, b"\0"), end)
        head = os.pread(file.fileno(), 4096, 0)
        place = head.index(struct.pack(">II", 0x23852875, 24)) + 16
        os.pwrite(file.fileno(), struct.pack(">QQ", len(entries), end), place)


def play_name(ground: lab.Lab, odd: Odd, where: str, relative: bool) -> lab.Finding:
    """Run both modules with an odd name somewhere."""
    disk = set_up_name(ground, odd, where)
    ground.disks, ground.before = [disk], {disk.active: lab.identity(disk.active)}
    overlay = run(
        ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), relative=relative, timeout=15
    )
    wrong = run_wrong(overlay, [disk.active, disk.target, ascii(str(disk.active)), ascii(str(disk.target))])
    made = odd.as_bitmap if where == "bitmap" else odd.as_file
    if overlay.states != ["created" if made else "failed"]:
        wrong.append(f"{overlay.states}: {overlay.message!r}")
    if made:
        wrong += chain_wrong(disk)
        if not relative:
            wrong += lab.incomplete(disk)
    if lab.identity(disk.active) != ground.before[disk.active]:
        wrong.append("ACTIVE was changed")
    left = [path.name for path in ground.folder.rglob("*") if path.is_file() and path != disk.target]
    if left or (not made and os.path.lexists(disk.target)):
        wrong.append(f"left {left}")
    wrong += name_info_wrong(ground, disk, made)
    return lab.Finding(" and ".join(overlay.states), wrong, ())


def name_info_wrong(ground: lab.Lab, disk: lab.Disk, made: bool) -> list[str]:
    """Return what is wrong with what qcow2_info says of the same disk."""
    path = disk.target if made else disk.active
    info = run(ground, "qcow2_info", path=str(path))
    wrong = [f"qcow2_info: {what}" for what in run_wrong(info, [path])]
    if wrong or info.status:
        return wrong or [f"qcow2_info fails: {info.message}"]
    about = (info.result or {})["disks"][0]
    carried = {b["name"]: b["granularity"] for b in about["images"][0]["bitmaps"] if b["recording"]}
    expected = {_in_message(name): granularity for name, granularity in disk.bitmaps.items()}
    if about["path"] != _in_message(path) or carried != expected:
        wrong.append(f"qcow2_info says {about['path']!r} with {carried}, not {expected}")
    return wrong


def chain_wrong(disk: lab.Disk) -> list[str]:
    """Return what is wrong with the chain as QEMU itself finds it from the overlay."""
    command = ["qemu-img", "info", "-f", "qcow2", "--backing-chain", "--output=json", str(disk.target)]
    said = subprocess.run(command, capture_output=True, check=False)
    if said.returncode:
        return [f"QEMU cannot follow the chain: {said.stderr!r}"]
    below = json.loads(said.stdout)[1:]
    if len(below) != 1 or not os.path.samefile(below[0]["filename"], disk.active):
        return [f"below the overlay QEMU finds {below}"]
    return []


def long_path(ground: lab.Lab, length: int) -> lab.Finding:
    """Run the module on an ACTIVE whose path has so many bytes; qcow2 records 1023 at most."""
    disk = ground.disks[0]
    folder = ground.actives_folder
    while length - len(str(folder)) > 200:
        folder = folder / ("d" * 99)
    folder.mkdir(parents=True, exist_ok=True)
    active = folder / ("a" * (length - len(str(folder)) - 1))
    disk.active.rename(active)
    disk = disk._replace(active=active)
    ground.disks, ground.before = [disk], {active: lab.identity(active)}
    overlay = run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(active))
    wrong = [*run_wrong(overlay, [active]), *ground.ended_wrong(overlay)]
    if overlay.states != ["created" if length <= 1023 else "failed"]:
        wrong.append(f"{overlay.states}: {overlay.message}")
    return lab.Finding(f"{length} bytes {overlay.states[0]}", wrong)


def impossible_target(ground: lab.Lab, name: str) -> lab.Finding:
    """Run the module for a target that no file system takes."""
    disk = ground.disks[0]
    target = f"{ground.folder}/{name}"
    overlay = run(ground, "qcow2_overlay", path=target, backing_file=str(disk.active))
    wrong = [*run_wrong(overlay, [target, repr(target)]), *ground.images_wrong()]
    if overlay.states != ["failed"] or os.listdir(ground.folder):
        wrong.append(f"{overlay.states}: {overlay.message}")
    return lab.Finding("failed", wrong)


def name_jobs() -> list[lab.Job]:
    """Return the rounds with odd names."""
    jobs = []
    for number, odd in enumerate(ODD_NAMES):
        for where in WHERE:
            for relative in (False, True) if where == "ACTIVE" else (False,):
                play = lambda g, o=odd, w=where, r=relative: play_name(g, o, w, r)  # noqa: E731
                how = ", recorded relative" * relative
                jobs.append(lab.Job(f"odd name of the {where}{how}", f"name-{number}-{where}{'-r' * relative}", play))
    jobs += [
        lab.Job("long path of ACTIVE", f"long-{length}", functools.partial(long_path, length=length))
        for length in (1022, 1023, 1024, 1025)
    ]
    for number, name in enumerate(("x" * 256, "\u00e4" * 128, "d/" * 2100 + "x", "", ".", "..", "a\0b", "x/../y/x")):
        play = functools.partial(impossible_target, name=name)
        jobs.append(lab.Job("impossible target", f"impossible-{number}", play))
    longest = [Odd("\u20ac" * 341), Odd("x" * 1023), Odd("\n" * 1023)]
    for number, odd in enumerate(longest):
        play = functools.partial(play_name, odd=odd, where="bitmap", relative=False)
        jobs.append(lab.Job("odd name of the bitmap", f"longest-{number}", play))
    return jobs


# Races


class Shared(t.NamedTuple):
    """A folder in which another user may write, and what must stay as it is outside."""

    parent: pathlib.Path
    folder: pathlib.Path  # in it
    outside: pathlib.Path
    before: dict[str, tuple[t.Any, ...]]


@contextlib.contextmanager
def shared_folder(ground: lab.Lab, mode: int) -> t.Iterator[Shared]:
    """Have such a folder for the block."""
    for folder in [ground.place, *ground.place.parents][:3]:
        folder.chmod(0o755)  # the other user has to get there
    parent, outside = ground.place / "shared", ground.place / "outside"
    for folder in (parent, outside, parent / "folder"):
        folder.mkdir()
    for folder in (parent, parent / "folder"):
        folder.chmod(mode)
    (outside / "bait").write_bytes(b"bait")
    (outside / "bait").chmod(0o644)
    try:
        yield Shared(parent, parent / "folder", outside, snapshot(outside))
    finally:
        shutil.rmtree(parent, ignore_errors=True)
        shutil.rmtree(outside, ignore_errors=True)


def snapshot(folder: pathlib.Path) -> dict[str, tuple[t.Any, ...]]:
    """Return all that must not change about a folder and what is in it; hard links do change the time of change."""
    found = {}
    for path in (folder, *folder.iterdir()):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[path.name] = (content, status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    return found


def race_wrong(ground: lab.Lab, shared: Shared, disk: lab.Disk, ended: lab.Run) -> list[str]:
    """Return what is wrong after a run in a shared folder, whatever it says."""
    wrong = run_wrong(ended, [ground.place])
    if snapshot(shared.outside) != shared.before:
        wrong.append(f"outside was {shared.before}, is {snapshot(shared.outside)}")
    if lab.identity(disk.active) != ground.before[disk.active]:
        wrong.append("ACTIVE was changed")
    if ended.states == ["created"]:
        wrong += lab.incomplete(disk) if disk.target.is_file() and not disk.target.is_symlink() else ["is not there"]
    return wrong


@contextlib.contextmanager
def intruder(what: str, place: pathlib.Path, bait: pathlib.Path) -> t.Iterator[list[int]]:
    """Have another user at work for the block; afterwards the list has how often it did what it can."""
    command = [sys.executable, "-S", str(HERE / "intruder.py"), what, str(NOBODY), str(place), str(bait)]
    done: list[int] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        stdin, stdout = t.cast("t.IO[str]", process.stdin), t.cast("t.IO[str]", process.stdout)
        try:
            assert stdout.readline() == "ready\n"
            yield done
        finally:
            stdin.close()
            done.append(int(stdout.readline() or -1))


def race(ground: lab.Lab, what: str, mode: int, owned: bool) -> lab.Finding:
    """Run the module while another user swaps something; owned, the image is that user's, and so is the overlay."""
    with shared_folder(ground, mode) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        if owned:
            os.chown(disk.active, NOBODY, NOBODY)
            ground.before[disk.active] = lab.identity(disk.active)
        place = {"target": disk.target, "temporary": shared.folder, "link": shared.folder}[what]
        if what == "link":
            os.chown(shared.folder, NOBODY, NOBODY)  # or it could not be moved out of a sticky folder
        with intruder(what, place, shared.outside) as done:
            ended = run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), timeout=15)
        if what == "link" and shared.folder.is_symlink():
            shared.folder.unlink()
            pathlib.Path(f"{shared.folder}.link").rename(shared.folder)
        wrong = race_wrong(ground, shared, disk, ended)
        if done[0] < 0:
            wrong.append("the other user has failed")
    return lab.Finding(f"{ended.states[0]}, {'after' if done[0] else 'without'} swaps", wrong)


STEP_TRICKS = ("target-symlink", "target-new", "target-link", "temporary-symlink", "temporary-new", "temporary-link",
               "temporary-gone", "temporary-folder", "folder-symlink")  # fmt: skip


def trick(shared: Shared, disk: lab.Disk, what: str) -> bool:
    """Do once what another user could do in a folder that is not sticky; whether it could be done."""
    thing, way = what.split("-")
    if thing == "folder":
        shared.folder.rename(shared.parent / "aside")
        shared.folder.symlink_to(shared.outside)
        os.chown(shared.folder, NOBODY, NOBODY, follow_symlinks=False)
        return True
    places = [disk.target] if thing == "target" else list(shared.folder.glob(lab.LEFTOVER))
    for place in places:
        with contextlib.suppress(FileNotFoundError):
            if thing == "target" and place.exists():
                return False  # the overlay is there already, and who takes it away is told nothing
            place.unlink()
        if way == "symlink":
            place.symlink_to(shared.outside / "bait")
        elif way == "new":
            place.symlink_to(shared.outside / "new")
        elif way == "link":
            place.hardlink_to(shared.outside / "bait")
        elif way == "folder":
            place.mkdir()
    return bool(places)


def race_at_step(ground: lab.Lab, what: str, number: int) -> lab.Finding:
    """Do something in the folder while the module is at a step."""
    with shared_folder(ground, 0o777) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        arguments = {"path": str(disk.target), "backing_file": str(disk.active), "timeout": 15}
        rule = {"PROVE_FOLDER": f"{ground.place}/", "PROVE_RULE": f"module:*:{number}:stop"}
        ground.runner.start(arguments, rule)
        ended = ground.runner.answer()
        done = False
        if ended is None:
            done = trick(shared, disk, what)
            ground.runner.say()
            ended = ground.runner.answer()
        there = disk.target
        if what == "folder-symlink" and done:
            shared.folder.unlink()
            (shared.parent / "aside").rename(shared.folder)
        wrong = race_wrong(ground, shared, disk._replace(target=there), t.cast("lab.Run", ended))
        states = t.cast("lab.Run", ended).states
    return lab.Finding(f"{' '.join(states)}, {'after the trick' if done else 'nothing to be tricked'}", wrong)


def standing_link(ground: lab.Lab, owner: int, to_owner: int, mode: int) -> lab.Finding:
    """Have a symlink on the way to the overlay, of this owner and to a folder of that one."""
    with shared_folder(ground, mode) as shared:
        link = shared.parent / "link"
        link.symlink_to(shared.outside)
        os.chown(link, owner, owner, follow_symlinks=False)
        os.chown(shared.outside, to_owner, to_owner)
        disk = ground.disks[0]._replace(target=link / "disk.snap.qcow2")
        (shared.outside / ".qcow2_overlay-0123456789abcdef.tmp").write_bytes(b"left over")
        before = snapshot(shared.outside)
        ended = run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), timeout=15)
        wrong = run_wrong(ended, [disk.target])
        trusted = owner in (0, to_owner)
        if ended.states != ["created" if trusted else "failed"]:
            wrong.append(f"{ended.states}: {ended.message}")
        if not trusted:
            wrong += race_wrong(ground, shared._replace(before=before), disk, ended)
    return lab.Finding(ended.states[0], wrong)


def planted(ground: lab.Lab, way: str) -> lab.Finding:
    """Have something in the folder that looks like what a killed run has left."""
    with shared_folder(ground, 0o777) as shared:
        disk = ground.disks[0]._replace(target=shared.folder / "disk.snap.qcow2")
        place = shared.folder / ".qcow2_overlay-0123456789abcdef.tmp"
        if way == "symlink":
            place.symlink_to(shared.outside / "bait")
        elif way == "link":
            place.hardlink_to(shared.outside / "bait")
        elif way == "fifo":
            os.mkfifo(place)
        elif way == "folder":
            place.mkdir()
        else:
            os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        ended = run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), timeout=15)
        wrong = race_wrong(ground, shared, disk, ended)
        if ended.states != ["created"]:
            wrong.append(f"{ended.states}: {ended.message}")
        if os.path.lexists(place) != (way != "link"):  # another name of a file is taken away, but never the file
            wrong.append("what was planted is " + ("still there" if way == "link" else "gone"))
    return lab.Finding(ended.states[0], wrong)


def race_jobs(ground: lab.Lab, asked: lab.Choice) -> list[lab.Job]:
    """Return the rounds with another user in the folder."""
    jobs = []
    for n in range(max(1, asked.rounds // 20)):
        for what in ("target", "temporary", "link"):
            for mode, word in ((0o777, "a folder for all"), (0o1777, "a sticky folder")):
                play = functools.partial(race, what=what, mode=mode, owned=bool(n % 2))
                jobs.append(lab.Job(f"another user swaps the {what} in {word}", f"race-{what}-{mode:o}-{n}", play))
    ground.use(lab.ONE)
    ground.reset()
    steps = sum(ground.calls()["module"].values()) + 8
    for what in STEP_TRICKS:
        numbers = range(1, steps + 1)
        if not asked.full:
            numbers = sorted(asked.randomness(what).sample(numbers, min(steps, max(4, asked.rounds // 20))))
        for number in numbers:
            play = functools.partial(race_at_step, what=what, number=number)
            jobs.append(lab.Job(f"{what} at a step", f"step-{what}-{number}", play))
    for owner, to_owner in ((0, 0), (0, NOBODY), (NOBODY, NOBODY), (NOBODY, 0), (NOBODY, 1)):
        for mode in (0o777, 0o1777):
            play = functools.partial(standing_link, owner=owner, to_owner=to_owner, mode=mode)
            series = f"a symlink of user {owner} to a folder of user {to_owner}"
            jobs.append(lab.Job(series, f"link-{owner}-{to_owner}-{mode:o}", play))
    return jobs + [
        lab.Job(f"a planted leftover, {way}", f"planted-{way}", functools.partial(planted, way=way))
        for way in ("symlink", "link", "fifo", "folder", "device")
    ]


# Bait


class Bait(t.NamedTuple):
    """What an image names, and may make nobody open."""

    name: str  # as the image records it
    watched: pathlib.Path | None  # the file that must not be opened; None when there is none
    usable: bool  # whether it may stand where it is named
    may_be_opened: bool  # for reading: a regular file as backing file, whose size is needed


BAITS = ("file", "fifo", "device", "link-to-fifo", "link-to-device", "folder", "socket", "json", "nbd", "old-nbd",
         "host-device", "fat")  # fmt: skip
PLACES = ("data file", "backing file", "backing file as qcow2", "backing file without format", "base", "target")
_OPEN = re.compile(r'^(?:open|openat|openat2|creat)\((?:[^"]*, )?"((?:[^"\\]|\\.)*)"\.*, (.*)\) = (-?\d+)(?:<(.*?)>)?')
_READ = re.compile(r"^(?:read|pread64|readv|preadv)\(\d+<(.*?)>.* = (\d+)$")
_IN_OPEN = 0x20


def lay(ground: lab.Lab, what: str, where: str, port: int) -> Bait:
    """Have the bait, and return how it is named."""
    folder = ground.place / "bait"
    folder.mkdir()
    place, link = folder / "thing", folder / "link"
    if "fifo" in what:
        os.mkfifo(place)
    elif what in ("device", "link-to-device", "host-device"):
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # of which there is no end
    elif what in ("folder", "fat"):
        place.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    else:
        place.write_bytes(bytes(mutants.SIZE))
    link.symlink_to(place)
    named = {
        "json": f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{place}"}}}}',
        "nbd": f"nbd://127.0.0.1:{port}/x",
        "old-nbd": f"nbd:127.0.0.1:{port}:exportname=x",
        "host-device": f"host_device:{place}",
        "fat": f"fat:{place}",
        **{kind: str(link) for kind in BAITS if kind.startswith("link-")},
    }.get(what, str(place))
    usable = what == "file" and where not in ("backing file as qcow2", "target")
    return Bait(named, place, usable, what == "file" and where in PLACES[1:5])


def set_bait(ground: lab.Lab, bait: Bait, where: str) -> None:
    """Have images that name the bait there."""
    active, target = ground.disks[0].active, ground.disks[0].target
    if where == "data file":
        # The name that QEMU was given for it is replaced by hand: QEMU would open what it is given.
        subprocess.run(["truncate", "-s", str(lab.SIZE), str(ground.place / "bait" / "real")], check=True)
        active.unlink()
        qemu.create(active, lab.SIZE, "-o", f"data_file={ground.place}/bait/real")
        qemu.qemu_img("bitmap", "--add", str(active), "monday")
        set_extension(active, 0x44415441, bait.name.encode())
    else:
        image = {"target": target, "base": ground.actives_folder / "middle.qcow2"}.get(where, active)
        image.unlink(missing_ok=True)
        image_format = "qcow2" if where == "backing file as qcow2" else "raw"
        qemu.create(image, lab.SIZE, "-u", "-b", bait.name, "-F", image_format)
        if where == "backing file without format":
            set_extension(image, 0xE2792ACA, None)
        if where == "base":
            active.unlink()
            qemu.create(active, lab.SIZE, "-u", "-b", str(image), "-F", "qcow2")
    ground.before = {active: lab.identity(active)}


def set_extension(path: pathlib.Path, wanted: int, new: bytes | None) -> None:
    """Give a header extension other data, or take it away (qcow2 spec, Header extensions)."""
    data = path.read_bytes()[:65536]
    backing_offset, backing_length = struct.unpack_from(">QI", data, 8)
    (offset,) = struct.unpack_from(">I", data, 100)
    name, area = data[backing_offset : backing_offset + backing_length] if backing_offset else b"", data[:offset]
    while (extension := struct.unpack_from(">II", data, offset))[0]:
        kind, size = extension
        own: bytes | None = data[offset + 8 : offset + 8 + size]
        offset += 8 + (size + 7) // 8 * 8
        own = new if kind == wanted else own
        if own is not None:
            area += struct.pack(">II", kind, len(own)) + own.ljust(-(-len(own) // 8) * 8, b"\0")
    area += bytes(8)
    place = len(area) if name else 0
    area = area[:8] + struct.pack(">QI", place, len(name)) + area[20:] + name
    qemu.patch(path, 0, area.ljust(4096, b"\0"))


class Watch:
    """Sees every opening of a file, by whomever; an independent witness beside strace."""

    def __init__(self, path: pathlib.Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def opened(self) -> bool:
        """Return whether it was opened, and end the watch."""
        try:
            return bool(os.read(self._fd, 4096))
        except BlockingIOError:
            return False
        finally:
            os.close(self._fd)


def traced(ground: lab.Lab, module: str, arguments: dict[str, t.Any]) -> tuple[lab.Run, list[tuple[bool, list[str]]]]:
    """Run a module under strace; return how it ended and, of each of its threads, whether it is QEMU's, and calls."""
    logs = ground.papers / "strace"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    command = ["strace", "-ff", "-qq", "-y", "-s", "4096", "-o", f"{logs}/log", "-e",
               "trace=%file,connect,read,pread64,readv,preadv,execve", sys.executable, "-m",
               f"ansible_collections.kvmfleet.qcow2.plugins.modules.{module}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(lab.COLLECTION.parents[2]), "PYTHONDONTWRITEBYTECODE": "1",
                   "LC_ALL": "C.UTF-8"}  # fmt: skip
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, env=environment, start_new_session=True)
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
    try:
        stdout, stderr = process.communicate(text, timeout=lab.SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        stderr += b"hung"
    try:
        result = json.loads(stdout)
    except ValueError:
        result = None
    threads = [path.read_text(encoding="ascii", errors="replace").splitlines() for path in sorted(logs.iterdir())]
    ended = lab.Run(process.returncode, 0.0, False, True, result, stderr.decode(errors="replace"))
    return ended, [(any("execve(" in line and "/qemu-" in line for line in lines), lines) for lines in threads]


def opened_wrong(ground: lab.Lab, module: str, bait: Bait, threads: list[tuple[bool, list[str]]]) -> list[str]:
    """Return what was opened that must not be, or for writing."""
    wrong = []
    active = str(ground.disks[0].active)
    for is_qemu, lines in threads:
        who = "QEMU" if is_qemu else module
        for line in lines:
            match = _OPEN.match(line)
            if line.startswith("connect(") and "AF_INET" in line:
                wrong.append(f"{who} connects: {line}")
            if not match or "O_PATH" in line:
                continue
            asked, flags, number, real = match.groups()
            place = real if real and int(number) >= 0 else asked
            if not place.startswith(str(ground.place)) or "O_DIRECTORY" in flags:
                continue
            writes = "O_RDWR" in flags or "O_WRONLY" in flags or "O_CREAT" in flags
            is_ours = pathlib.Path(place.removesuffix(" (deleted)")).match(lab.LEFTOVER)
            if place.startswith(f"{ground.place}/bait/") and (is_qemu or not bait.may_be_opened or writes):
                wrong.append(f"{who} opens the bait: {line}")
            elif is_qemu and place != active and not is_ours:
                wrong.append(f"QEMU opens {line}")
            elif writes and (module != "qcow2_overlay" or not is_ours):
                wrong.append(f"{who} opens for writing: {line}")
    return wrong


def read_of_bait(bait: Bait, threads: list[tuple[bool, list[str]]]) -> int:
    """Return how many bytes of the bait were read."""
    reads = filter(None, (_READ.match(line) for _is_qemu, lines in threads for line in lines))
    return sum(int(match[2]) for match in reads if match[1] == str(bait.watched))


def play_bait(ground: lab.Lab, module: str, what: str, where: str) -> lab.Finding:
    """Run a module on images that name the bait, and see what is opened."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        bait = lay(ground, what, where, server.getsockname()[1])
        if module == "qcow2_info" and where == "target":  # there it is the topmost image, and looked at with its chain
            bait = bait._replace(usable=what == "file", may_be_opened=what == "file")
        set_bait(ground, bait, where)
        watch = Watch(t.cast("pathlib.Path", bait.watched))
        disk = ground.disks[0]
        overlay = {"path": str(disk.target), "backing_file": str(disk.active), "timeout": 15}
        top = str(disk.target if where == "target" else disk.active)
        ended, threads = traced(ground, module, overlay if module == "qcow2_overlay" else {"path": top})
        opened = watch.opened()
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            server.accept()
            ended = ended._replace(stderr=f"{ended.stderr} Traceback: somebody has connected")
    wrong = [*run_wrong(ended, [ground.place]), *opened_wrong(ground, module, bait, threads)]
    if not any("execve(" in line for _is_qemu, lines in threads for line in lines):
        wrong.append("strace has seen nothing")
    if opened and not bait.may_be_opened:
        wrong.append("inotify has seen that the bait was opened")
    most = {"backing file without format": 8, "target": 4, "backing file as qcow2": 112 + 65536}.get(where, 0)
    if read_of_bait(bait, threads) > most:
        wrong.append(f"{read_of_bait(bait, threads)} bytes of the bait were read")
    if (ended.status == 0) != bait.usable:
        wrong.append(f"exit {ended.status}: {ended.message}")
    if lab.identity(disk.active) != ground.before[disk.active]:
        wrong.append("ACTIVE was changed")
    return lab.Finding("goes on" if ended.status == 0 else "refused", wrong)


def clean_bait(ground: lab.Lab, module: str, what: str, where: str) -> lab.Finding:
    """Play a round with bait and take the bait away."""
    try:
        return play_bait(ground, module, what, where)
    finally:
        shutil.rmtree(ground.place / "bait", ignore_errors=True)


def bait_jobs(asked: lab.Choice) -> list[lab.Job]:
    """Return the rounds with bait: all, if so asked, else some in each place."""
    everything = asked.full or asked.only
    return [
        lab.Job(
            f"{module}: bait as {where}",
            f"bait-{module}-{where.replace(' ', '-')}-{what}",
            functools.partial(clean_bait, module=module, what=what, where=where),
        )
        for module in MODULES
        for where in PLACES
        for what in (BAITS if everything else asked.randomness(f"{module} {where}").sample(BAITS, 3))
    ]


def jobs_for(crew: lab.Crew, asked: lab.Choice) -> list[lab.Job]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs = [lab.Job("an image that claims a lot", f"bomb-{n}", functools.partial(explode, what=what))
            for n, what in enumerate(BOMBS)]  # fmt: skip
    jobs += [*name_jobs(), *race_jobs(ground, asked), *bait_jobs(asked)]
    if asked.only is None or asked.only.startswith(("*", "mutant", "reader")):  # the corpus takes seconds
        corpus = ground.papers / "corpus"
        corpus.mkdir()
        jobs += mutant_jobs(corpus, asked)
    return jobs


if __name__ == "__main__":
    # Thousands of images are written, none of which has to outlive a power cut.
    if os.access("/dev/shm", os.W_OK) and "TMPDIR" not in os.environ:
        tempfile.tempdir = "/dev/shm"
    sys.exit(lab.prove(str(__doc__), 100, jobs_for))
