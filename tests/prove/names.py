# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Odd names of files, folders and bitmaps."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import struct
import subprocess
import typing as t

import kinds
import lab
import leftover
import modules
import overlays
import qemu
import rounds


class Odd(t.NamedTuple):
    """A name for a file, folder or bitmap."""

    name: str
    as_file: bool = True  # whether an overlay can be made with it
    as_bitmap: bool = True


ODD_NAMES = (
    Odd("new\nline"),
    Odd("comma,size=1"),
    Odd("a=b"),
    Odd("'single'"),
    Odd('"double"'),
    Odd("back\\slash\\"),
    Odd("-leading"),
    Odd("--help"),
    Odd("nbd:localhost:1"),
    Odd('json:{"driver":"null-co"}'),
    Odd("file:x"),
    Odd("fat:rw:"),
    Odd("fd:0"),
    Odd("{{ lookup }}"),
    Odd("{% x %}"),
    Odd("%s%n%d"),
    Odd("$HOME"),
    Odd("~root"),
    Odd("$(id)`id`"),
    Odd("\u202eright to left"),
    Odd("zero\u200bwidth\ufeff"),
    Odd("\u0301combining"),
    Odd("e\u0301"),
    Odd("\U0001f600"),
    Odd("tab\t\rreturn\x1b[31m\x07"),
    Odd(" blank "),
    Odd("..."),
    Odd("x" * 255),
    Odd("\u00e4" * 127),
    Odd(f"{leftover.EXAMPLE}.x"),
    Odd("#x?y&z*[a]"),
    Odd("\x7f\x01"),
    Odd("not UTF-8 \udcff", as_file=False, as_bitmap=False),
    Odd("half \udcc3", as_file=False, as_bitmap=False),
    Odd("\ufdd0 no character", as_file=False, as_bitmap=False),
    Odd("\ufffe", as_file=False, as_bitmap=False),
    Odd("\U0010ffff", as_file=False, as_bitmap=False),
)
WHERE = ("target", "ACTIVE", "folder", "bitmap")


def set_up_name(ground: lab.Lab, odd: Odd, where: str) -> kinds.Disk:
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


def play_name(ground: lab.Lab, odd: Odd, where: str, relative: bool) -> rounds.Finding:
    """Run both modules with an odd name somewhere."""
    disk = set_up_name(ground, odd, where)
    ground.disks = [disk]
    ground.promise.prepare()
    overlay = modules.run(
        ground, "qcow2_overlay", path=str(disk.target), backing_file=str(disk.active), relative=relative, timeout=15
    )
    wrong = modules.run_wrong(overlay, [disk.active, disk.target, ascii(str(disk.active)), ascii(str(disk.target))])
    made = odd.as_bitmap if where == "bitmap" else odd.as_file
    if overlay.states != ["created" if made else "failed"]:
        wrong.append(f"{overlay.states}: {overlay.message!r}")
    if made:
        wrong += chain_wrong(disk)
        if not relative:
            wrong += overlays.incomplete(disk)
    if lab.identity(disk.active) != ground.promise.before[disk.active]:
        wrong.append("ACTIVE was changed")
    left = [path.name for path in ground.folder.rglob("*") if path.is_file() and path != disk.target]
    if left or (not made and os.path.lexists(disk.target)):
        wrong.append(f"left {left}")
    wrong += name_info_wrong(ground, disk, made)
    return rounds.Finding(" and ".join(overlay.states), wrong, ())


def name_info_wrong(ground: lab.Lab, disk: kinds.Disk, made: bool) -> list[str]:
    """Return what is wrong with what qcow2_info says of the same disk."""
    path = disk.target if made else disk.active
    info = modules.run(ground, "qcow2_info", path=str(path))
    wrong = [f"qcow2_info: {what}" for what in modules.run_wrong(info, [path])]
    if wrong or info.status:
        return wrong or [f"qcow2_info fails: {info.message}"]
    about = (info.result or {})["disks"][0]
    carried = {b["name"]: b["granularity"] for b in about["images"][0]["bitmaps"] if b["recording"]}
    expected = {modules.in_message(name): granularity for name, granularity in disk.bitmaps.items()}
    if about["path"] != modules.in_message(path) or carried != expected:
        wrong.append(f"qcow2_info says {about['path']!r} with {carried}, not {expected}")
    return wrong


def chain_wrong(disk: kinds.Disk) -> list[str]:
    """Return what is wrong with the chain as QEMU itself finds it from the overlay."""
    command = ["qemu-img", "info", "-f", "qcow2", "--backing-chain", "--output=json", str(disk.target)]
    said = subprocess.run(command, capture_output=True, check=False)
    if said.returncode:
        return [f"QEMU cannot follow the chain: {said.stderr!r}"]
    below = json.loads(said.stdout)[1:]
    depth = 2 if disk.number == 0 else 1  # the first disk has an image below
    if len(below) != depth or not os.path.samefile(below[0]["filename"], disk.active):
        return [f"below the overlay QEMU finds {below}"]
    return []


def long_path(ground: lab.Lab, length: int) -> rounds.Finding:
    """Run the module on an ACTIVE whose path has so many bytes; qcow2 records 1023 at most."""
    disk = ground.disks[0]
    folder = ground.actives_folder
    while length - len(str(folder)) > 200:
        folder = folder / ("d" * 99)
    folder.mkdir(parents=True, exist_ok=True)
    active = folder / ("a" * (length - len(str(folder)) - 1))
    disk.active.rename(active)
    disk = disk._replace(active=active)
    ground.disks = [disk]
    ground.promise.prepare()
    overlay = modules.run(ground, "qcow2_overlay", path=str(disk.target), backing_file=str(active))
    wrong = [*modules.run_wrong(overlay, [active]), *ground.ended_wrong(overlay)]
    if overlay.states != ["created" if length <= 1023 else "failed"]:
        wrong.append(f"{overlay.states}: {overlay.message}")
    return rounds.Finding(f"{length} bytes {overlay.states[0]}", wrong)


def impossible_target(ground: lab.Lab, name: str) -> rounds.Finding:
    """Run the module for a target that no file system takes."""
    disk = ground.disks[0]
    target = f"{ground.folder}/{name}"
    overlay = modules.run(ground, "qcow2_overlay", path=target, backing_file=str(disk.active))
    wrong = [*modules.run_wrong(overlay, [target, repr(target)]), *ground.promise.images_wrong()]
    if overlay.states != ["failed"] or os.listdir(ground.folder):
        wrong.append(f"{overlay.states}: {overlay.message}")
    return rounds.Finding("failed", wrong)


def name_jobs() -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with odd names."""
    jobs = []
    for number, odd in enumerate(ODD_NAMES):
        for where in WHERE:
            for relative in (False, True) if where == "ACTIVE" else (False,):
                play = functools.partial(play_name, odd=odd, where=where, relative=relative)
                how = ", recorded relative" * relative
                jobs.append(
                    rounds.Job(f"odd name of the {where}{how}", f"name-{number}-{where}{'-r' * relative}", play)
                )
    jobs += [
        rounds.Job("long path of ACTIVE", f"long-{length}", functools.partial(long_path, length=length))
        for length in (1022, 1023, 1024, 1025)
    ]
    for number, name in enumerate(("x" * 256, "\u00e4" * 128, "d/" * 2100 + "x", "", ".", "..", "a\0b", "x/../y/x")):
        play = functools.partial(impossible_target, name=name)
        jobs.append(rounds.Job("impossible target", f"impossible-{number}", play))
    longest = [Odd("\u20ac" * 341), Odd("x" * 1023), Odd("\n" * 1023)]
    for number, odd in enumerate(longest):
        play = functools.partial(play_name, odd=odd, where="bitmap", relative=False)
        jobs.append(rounds.Job("odd name of the bitmap", f"longest-{number}", play))
    return jobs
