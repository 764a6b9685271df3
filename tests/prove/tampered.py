# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What another user plants beside images that are healed, merged down or given up; and mutants of such images."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import stat
import subprocess
import typing as t

import folders
import kinds
import lab
import leftover
import modules
import mutants
import qemu
import rounds
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains

WAYS = ("symlink", "link", "fifo", "folder", "device", "garbage", "theirs", "foreign")
# What is planted in place of: the vault of a commit, done or not, of a healing, the sign of a merge, a kept overlay.
PLACES = {
    "vault": ".base.qcow2.kvmfleet-vault",
    "given vault": ".base.qcow2.kvmfleet-vault-given",
    "vault of a healing": ".top.qcow2.kvmfleet-healing",
    "sign of a merge": ".top.qcow2.{inode}.kvmfleet-merging",
    "kept overlay": "top.qcow2.reverted",
    "odd name": ".top.qcow2\n.kvmfleet-healing",
}
CALLS: dict[str, tuple[str, dict[str, t.Any]]] = {
    "healed": ("qcow2_bitmap", {}),
    "removed": ("qcow2_bitmap", {"state": "absent"}),
    "committed": ("qcow2_overlay", {"state": "committed"}),
    "reverted": ("qcow2_overlay", {"state": "reverted"}),
}
SIZE = 4 << 20


class Pair(t.NamedTuple):
    """An overlay whose bitmap is inconsistent, on a base; both are root's, their folder is not."""

    top: pathlib.Path
    base: pathlib.Path
    now: bytes  # what a guest reads
    then: bytes  # what it read when the checkpoint was made


def lay_out(folder: pathlib.Path) -> Pair:
    """Make the images."""
    base = folder / "base.qcow2"
    top = folder / "top.qcow2"
    qemu.create(base, SIZE)
    _write(base, "write -P 1 0 256k")
    then = chains.content(base)
    qemu.add_bitmaps(base, [qemu.Bitmap("monday", 65536, True, False)])
    _write(base, "write -P 2 1M 64k")
    qemu.create(top, SIZE, "-b", str(base), "-F", "qcow2")
    _write(top, "write -P 3 2M 128k")
    return Pair(top, base, chains.content(top), then)


def _write(path: pathlib.Path, command: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, stdout=subprocess.DEVNULL)


def plant(way: str, place: pathlib.Path, shared: folders.Shared) -> None:
    """Put something there."""
    if way == "symlink":
        place.symlink_to(shared.outside / "bait")
    elif way == "link":
        place.hardlink_to(shared.outside / "bait")
    elif way == "fifo":
        os.mkfifo(place)
    elif way == "folder":
        place.mkdir()
    elif way == "device":
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif way == "garbage":
        place.write_bytes(b"QFI\xfb" + bytes(100))
    else:  # a vault as far as its form goes, of another image: it would make a bitmap valid that lacks all
        qemu.create(place, SIZE)
        status = os.stat(place.with_name("top.qcow2"))
        names = ["t/0123456789abcdef", f"i/{status.st_dev}:{status.st_ino}", "b/never", "b/monday"]
        if way == "foreign":
            names[1] = "i/1:1"
        qemu.add_bitmaps(place, [qemu.Bitmap(name, 65536, name.startswith("b/"), False) for name in names])
    if way in ("garbage", "theirs", "fifo", "folder"):
        os.chown(place, folders.NOBODY, folders.NOBODY)


def planted(ground: lab.Lab, what: str, way: str, call: str) -> rounds.Finding:
    """Run a module where somebody else has planted something."""
    module, options = CALLS[call]
    with folders.shared_folder(ground, 0o777) as shared:
        pair = lay_out(shared.folder)
        place = shared.folder / PLACES[what].format(inode=pair.top.stat().st_ino)
        plant(way, place, shared)
        if module == "qcow2_overlay":
            options = {**options, "backing_file": str(pair.base)}
        ended = modules.run(ground, module, path=str(pair.top), timeout=15, **options)
        wrong = modules.run_wrong(ended, [ground.place, "monday"])
        if folders.snapshot(shared.outside) != shared.before:
            wrong.append("something outside was changed")
        wrong += left_wrong(pair, call, ended.status == 0)
        left = [path.name for path in shared.folder.iterdir() if leftover.is_one(path.name)]
        wrong += [f"left {left}"] if left else []
    return rounds.Finding(f"{call}: {'done' if ended.status == 0 else 'refused'}", wrong)


def left_wrong(pair: Pair, call: str, is_done: bool) -> list[str]:
    """Return what is wrong with the images: what the guest reads, and a bitmap that looks valid and lacks changes."""
    top = pair.top if pair.top.exists() else pair.base
    if call == "reverted" and top == pair.base:
        return [] if is_done else ["TOP is gone, and the run has failed"]
    wrong = [] if chains.content(top) == pair.now else ["a guest reads other data"]
    usable = chains.usable(top)
    if "never" in usable:
        wrong.append("a bitmap that no image ever had is valid")
    if chains.changed(pair.then, pair.now) & ~usable.get("monday", -1):
        wrong.append("monday lacks changes")
    if is_done and call in ("healed", "committed") and "monday" not in usable:
        wrong.append("monday is not valid")
    return wrong


def mutant(ground: lab.Lab, call: str, corpus: list[mutants.Seed], name: str, asked: rounds.Choice) -> rounds.Finding:
    """Have a mutant healed, or merged down into a base that is in order."""
    randomness = asked.randomness(name)
    seed = randomness.choice([one for one in corpus if one.format == "qcow2" and one.name != "luks"])
    folder = ground.folder
    top, base = folder / "top.qcow2", folder / "base.qcow2"
    shutil.copyfile(seed.path, top)
    qemu.create(base, mutants.SIZE)
    _write(base, "write -P 9 4M 64k")
    if call == "committed":
        subprocess.run(["qemu-img", "rebase", "-u", "-b", str(base), "-F", "qcow2", str(top)], check=True)
    mutants.mutation(seed, corpus, randomness).apply(top)
    was_good, was = _check(top) == 0, _content(top)
    base_was = lab.identity(base)
    module, options = CALLS[call]
    options = {**options, "assume_not_emptied": True} if call == "healed" else {**options, "backing_file": str(base)}
    if call == "committed":
        options["accept_lost_bitmaps"] = True
    ended = modules.run(ground, module, path=str(top), timeout=15, **options)
    wrong = modules.run_wrong(ended, [top, base, ground.place])
    is_done = ended.status == 0
    outcome = f"{call}: {'done' if is_done else 'refused'}"
    if was is None and (ended.result or {}).get("changed"):
        wrong.append("something was done to an image that qemu-img cannot read")
    if call == "healed" and lab.identity(base) != base_was:
        wrong.append("an image that has no part in it was changed")
    if was_good and is_done:
        there = top if call == "healed" else base
        wrong += [] if _content(there) == was else ["a guest reads other data"]
        wrong += [] if _check(there) in (0, 3) else ["qemu-img check finds something wrong"]
    return rounds.Finding(outcome, [f"{what} (a mutant of {seed.name})" for what in wrong])


def _check(path: pathlib.Path) -> int:
    """Return how qemu-img check ends, which a mutant can have hang or die."""
    return _quietly(["qemu-img", "check", "-q", "-f", "qcow2", str(path)])


def _content(path: pathlib.Path) -> bytes | None:
    """Return what a guest reads; None if nobody can."""
    raw = path.with_name("raw")
    try:
        done = _quietly(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)])
        return raw.read_bytes() if done == 0 and raw.stat().st_size <= 4 * mutants.SIZE else None
    finally:
        raw.unlink(missing_ok=True)


def _quietly(command: list[str]) -> int:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode
    except subprocess.TimeoutExpired:
        return -1


def planted_jobs(asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with what is planted: all, if so asked, else a share."""
    jobs = [
        rounds.Job(
            f"planted: {what}",
            f"planted-{what}-{way}-{call}",
            functools.partial(planted, what=what, way=way, call=call),
            kinds.ONE,
        )
        for what in PLACES
        for way in WAYS
        for call in CALLS
    ]
    share = max(1, asked.rounds // 4)
    if asked.full or asked.only:
        return jobs
    series = {what: [job for job in jobs if job.series == f"planted: {what}"] for what in PLACES}
    return [job for what, some in series.items() for job in asked.randomness(what).sample(some, min(len(some), share))]


def mutant_jobs(corpus: list[mutants.Seed], asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with mutants that are healed and merged down."""
    return [
        rounds.Job(f"mutant {call}", name, functools.partial(mutant, call=call, corpus=corpus, name=name, asked=asked))
        for call in ("healed", "committed")
        for name in (f"mutant-{call}-{n}" for n in range(max(1, asked.rounds // 2)))
    ]
