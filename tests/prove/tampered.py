# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What another user plants beside images that are healed, merged down or given up, or swaps meanwhile; and mutants.

Planted are vaults, signs and kept overlays, and what tells of the progress of runs. Swapped are the vaults of a run,
also while they are written, or an older one is put back. In the end nothing outside is changed, no bitmap is valid
that lacks changes, and each run is done or says what is in its way; to tell of progress is a comfort, which is in no
run's way.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import signal
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
import runs
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains, disks

WAYS = ("symlink", "link", "fifo", "folder", "device", "garbage", "theirs", "foreign")
# What is planted in place of: the vault of a commit or a healing, done or not, the sign of a merge, a kept overlay, a
# temporary file.
PLACES = {
    "vault": ".base.qcow2.kvmfleet-vault",
    "given vault": ".base.qcow2.kvmfleet-vault-given",
    "vault of a healing": ".top.qcow2.kvmfleet-healing",
    "given vault of a healing": ".top.qcow2.kvmfleet-healing-given",
    "sign of a merge": ".top.qcow2.{inode}.kvmfleet-merging",
    "kept overlay": "top.qcow2.reverted",
    "odd name": ".top.qcow2\n.kvmfleet-healing",
    "temporary file": leftover.EXAMPLE,
}
CALLS: dict[str, tuple[str, dict[str, t.Any]]] = {
    "healed": ("qcow2_bitmap", {}),
    "removed": ("qcow2_bitmap", {"state": "absent"}),
    "committed": ("qcow2_overlay", {"state": "committed"}),
    "reverted": ("qcow2_overlay", {"state": "reverted"}),
}
VAULTS = tuple(PLACES[one] for one in PLACES if "vault" in one)
SWAPPED = ("healed", "committed")
SWAPS = (*WAYS, "image", "gone")
# What is planted below /run, in place of: the text of another run and of the run itself, the next one, their folder.
TOLD = {
    "progress of another run": "kvmfleet-qcow2/1-1.json",
    "progress of the run": "kvmfleet-qcow2/{pid}-1.json",
    "next progress of the run": "kvmfleet-qcow2/{pid}-1.json.new",
    "next progress, in their own folder": "kvmfleet-qcow2/{pid}-1.json.new",
    "folder of progress": "kvmfleet-qcow2",
}
TEXTS = {
    "garbage": b"\xff\xfe{",
    "cut": b'{"pid": 1, "bytes',
    "odd": b'[{"pid": "1"}]',
    "theirs": json.dumps({"pid": 1, "bytes": 1, "total_bytes": 2, "vm": None}).encode(),
}
TELLING_WAYS = (*folders.LURES, *TEXTS)
SIZE = 4 << 20


class Pair(t.NamedTuple):
    """An overlay that lacks a bitmap of its base, and has one more; both are root's, their folder is not."""

    top: pathlib.Path
    base: pathlib.Path
    now: bytes  # what a guest reads
    then: dict[str, bytes]  # what it read when the checkpoints were made
    all_stay: bool = True  # so that a run which is done has made each of them usable

    def arguments(self, call: str) -> dict[str, t.Any]:
        """Return the options of a call."""
        module, options = CALLS[call]
        base = {"backing_file": str(self.base)} if module == "qcow2_overlay" else {}
        return {"path": str(self.top), "timeout": 15, **base, **options}


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
    later = chains.content(top)
    qemu.add_bitmaps(top, [qemu.Bitmap("tuesday", 65536, True, False)])
    _write(top, "write -P 3 2M 128k")
    return Pair(top, base, chains.content(top), {"monday": then, "tuesday": later})


def _write(path: pathlib.Path, command: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, stdout=subprocess.DEVNULL)


def plant(way: str, place: pathlib.Path, shared: folders.Shared) -> None:
    """Put something there."""
    if way in folders.LURES:
        folders.LURES[way](place, shared.outside)
    elif way == "garbage":
        place.write_bytes(b"QFI\xfb" + bytes(100))
    elif way == "image":
        qemu.create(place, SIZE)
    else:  # a vault as far as its form goes, of another image: it would make a bitmap valid that lacks all
        qemu.create(place, SIZE)
        status = os.stat(place.with_name("top.qcow2") if place.with_name("top.qcow2").exists() else place)
        names = ["t/0123456789abcdef", f"i/{status.st_dev}:{status.st_ino}", "b/never", "b/monday"]
        if way == "foreign":
            names[1] = "i/1:1"
        qemu.add_bitmaps(place, [qemu.Bitmap(name, 65536, name.startswith("b/"), False) for name in names])
    if way not in ("link", "device", "foreign", "image"):
        os.chown(place, folders.NOBODY, folders.NOBODY, follow_symlinks=False)


def planted(ground: lab.Lab, what: str, way: str, call: str) -> rounds.Finding:
    """Run a module where somebody else has planted something."""
    with folders.shared_folder(ground, 0o777) as shared:
        pair = lay_out(shared.folder)
        place = shared.folder / PLACES[what].format(inode=pair.top.stat().st_ino)
        plant(way, place, shared)
        ended = modules.run(ground, CALLS[call][0], **pair.arguments(call))
        wrong = run_wrong(ground, shared, pair, call, ended)
        left = [path for path in shared.folder.iterdir() if leftover.is_one(path.name)]
        wrong += [f"left {path.name}" for path in left if path != place or path.is_file()]
    return rounds.Finding(f"{call}: {'done' if ended.status == 0 else 'refused'}", wrong)


def swapped(ground: lab.Lab, call: str, way: str, number: int, killed: bool) -> rounds.Finding:
    """Swap the vaults of a run, finished or not, while it is at a step, or kill it then; run again on what is left."""
    with folders.shared_folder(ground, 0o777) as shared:
        pair = lay_out(shared.folder)
        rule = ground.environment(f"module:*:{number}:stop")
        ground.runner.start(CALLS[call][0], pair.arguments(call), rule)
        first, places = ground.runner.answer(), []
        if first is None:
            places = [path for path in shared.folder.iterdir() if path.name in VAULTS or leftover.is_one(path.name)]
            for place in places:
                place.unlink()
                if way != "gone":
                    plant(way, place, shared)
            if killed:
                os.killpg(ground.runner.pid(), signal.SIGKILL)
            first = ground.runner.resume()
        wrong = run_wrong(ground, shared, pair, call, first)
        if killed and places and pair.top.exists():  # a VM dies as it opens its image: only the vault knew of some then
            disks.lose_bitmaps(str(pair.top))
            pair = pair._replace(all_stay=False)
        second = modules.run(ground, CALLS[call][0], **pair.arguments(call))
        wrong += [f"second run: {what}" for what in run_wrong(ground, shared, pair, call, second)]
    ends = {0: "done", -signal.SIGKILL: "killed"}
    words = " and ".join(ends.get(one.status, "refused") for one in (first, second))
    return rounds.Finding(f"{call}: {words}" if places else f"{call}: nothing to be swapped", wrong)


def replayed(ground: lab.Lab, call: str, number: int, lost: bool) -> rounds.Finding:
    """Put an older vault back, which is the run's own and root's, when the work is done and a guest has written on."""
    with folders.shared_folder(ground, 0o777) as shared:
        pair = lay_out(shared.folder)
        ground.runner.start(CALLS[call][0], pair.arguments(call), ground.environment(f"module:*:{number}:stop"))
        if ground.runner.answer() is not None:
            return rounds.Finding(f"{call}: nothing to be put back", [])
        places = [path for path in shared.folder.iterdir() if path.name in VAULTS]
        aside = {place: place.with_name(f"aside{place.name}") for place in places}
        for place in places:
            place.rename(aside[place])
        os.killpg(ground.runner.pid(), signal.SIGKILL)
        ground.runner.resume()
        if places:  # which may have had the only bits of some
            pair = pair._replace(all_stay=False)
        second = modules.run(ground, CALLS[call][0], **pair.arguments(call))
        wrong = run_wrong(ground, shared, pair, call, second)
        if not pair.top.exists():  # another one by its name, which often gets its inode
            _write(pair.base, "write -P 4 3M 64k")
            qemu.create(pair.top, SIZE, "-b", str(pair.base), "-F", "qcow2")
        _write(pair.top, "write -P 5 3584k 64k")
        pair = pair._replace(now=chains.content(pair.top), all_stay=False)
        if lost:
            disks.lose_bitmaps(str(pair.top))
        for place in places:
            aside[place].rename(place)
        third = modules.run(ground, CALLS[call][0], **pair.arguments(call))
        wrong += [f"third run: {what}" for what in run_wrong(ground, shared, pair, call, third)]
    words = " and ".join("done" if one.status == 0 else "refused" for one in (second, third))
    return rounds.Finding(f"{call}: {words}" if places else f"{call}: nothing to be put back", wrong)


def run_wrong(ground: lab.Lab, shared: folders.Shared, pair: Pair, call: str, ended: runs.Run) -> list[str]:
    """Return what is wrong after a run in a folder of another user, which may have been killed."""
    wrong = [] if ended.status < 0 else modules.run_wrong(ended, [ground.place, *pair.then])
    if folders.snapshot(shared.outside) != shared.before:
        wrong.append("something outside was changed")
    return wrong + left_wrong(pair, call, ended.status == 0)


def telling(ground: lab.Lab, what: str, way: str) -> rounds.Finding:
    """Plant something where runs tell of their progress, while one is at work and another one waits for it."""
    folder = ground.papers / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with folders.shared_folder(ground, 0o777) as shared:
        pair = lay_out(shared.folder)
        environment = {**ground.environment("module:fork:1:stop"), "PROVE_RUN": str(folder)}
        module, arguments = CALLS["committed"][0], pair.arguments("committed")
        ground.runner.start(module, arguments, environment)
        stopped = ground.runner.answer()
        assert stopped is None, stopped
        place = folder / TOLD[what].format(pid=ground.runner.pid())
        place.parent.mkdir(0o700, exist_ok=True)
        if way in TEXTS:
            place.write_bytes(TEXTS[way])
        else:
            folders.LURES[way](place, shared.outside)
        for path in (*([] if way == "link" else [place]), *([place.parent] if "their" in what else [])):
            os.chown(path, folders.NOBODY, folders.NOBODY, follow_symlinks=False)
        ground.second.start(module, {**arguments, "timeout": 1}, {**ground.environment(), "PROVE_RUN": str(folder)})
        second = ground.second.ended()
        first = ground.runner.resume()
        wrong = [f"the one that waits: {problem}" for problem in modules.run_wrong(second, [ground.place])]
        wrong += run_wrong(ground, shared, pair, "committed", first)
        if first.status or not second.status:
            wrong.append(f"exit {first.status} and {second.status}: {first.message} / {second.message}")
    return rounds.Finding("done, and the other one waited", wrong)


def left_wrong(pair: Pair, call: str, is_done: bool) -> list[str]:
    """Return what is wrong with the images: what the guest reads, and a bitmap that looks valid and lacks changes."""
    top = pair.top if pair.top.exists() else pair.base
    if call == "reverted" and top == pair.base:
        return [] if is_done else ["TOP is gone, and the run has failed"]
    wrong = [] if chains.content(top) == pair.now else ["a guest reads other data"]
    usable = chains.usable(top)
    if "never" in usable:
        wrong.append("a bitmap that no image ever had is valid")
    for name, then in pair.then.items():
        if chains.changed(then, pair.now) & ~usable.get(name, -1):
            wrong.append(f"{name} lacks changes")
        if is_done and pair.all_stay and call in SWAPPED and name not in usable:
            wrong.append(f"{name} is not valid")
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


def steps_of(ground: lab.Lab, call: str) -> range:
    """Return the steps of a call at which something of a vault is there, if nothing happens to it."""
    log = ground.papers / "log"
    log.unlink(missing_ok=True)
    with folders.shared_folder(ground, 0o777) as shared:
        arguments = lay_out(shared.folder).arguments(call)
        ground.runner.start(CALLS[call][0], arguments, {**ground.environment(), "PROVE_LOG": str(log)})
        ended = ground.runner.ended()
        assert ended.status == 0, ended
    lines = log.read_text(encoding="ascii").splitlines()
    steps = [line.removeprefix("module ") for line in lines if line.startswith("module ")]
    return range(steps.index("create") + 1, len(steps) + 1 - steps[::-1].index("unlinkat"))


def planted_jobs(ground: lab.Lab, asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with what is planted or swapped: all, if so asked, else a share."""
    steps = {call: steps_of(ground, call) for call in SWAPPED}
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
    jobs += [
        rounds.Job(f"planted: {what}", f"planted-{what}-{way}", functools.partial(telling, what=what, way=way))
        for what in TOLD
        for way in TELLING_WAYS
    ]
    jobs += [
        rounds.Job(
            f"swapped: the vault of what is {call}, and the run {'is killed' if killed else 'goes on'}",
            f"swapped-{call}-{way}-{number}{'-killed' * killed}",
            functools.partial(swapped, call=call, way=way, number=number, killed=killed),
        )
        for call in SWAPPED
        for killed in (False, True)
        for way in SWAPS
        for number in steps[call]
    ]
    jobs += [
        rounds.Job(
            f"put back: an older vault of what is {call}{', and bitmaps are lost' * lost}",
            f"replayed-{call}-{number}{'-lost' * lost}",
            functools.partial(replayed, call=call, number=number, lost=lost),
        )
        for call in SWAPPED
        for lost in (False, True)
        for number in steps[call]
    ]
    return rounds.sampled(jobs, asked._replace(rounds=max(1, asked.rounds // 4)))


def mutant_jobs(corpus: list[mutants.Seed], asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with mutants that are healed and merged down."""
    return [
        rounds.Job(f"mutant {call}", name, functools.partial(mutant, call=call, corpus=corpus, name=name, asked=asked))
        for call in ("healed", "committed")
        for name in (f"mutant-{call}-{n}" for n in range(max(1, asked.rounds // 2)))
    ]
