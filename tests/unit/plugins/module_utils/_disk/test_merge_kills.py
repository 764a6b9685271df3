# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Merge down, killed together with QEMU at any step; then something happens to the disk, and the same call goes on.

Whatever happens, the guest's data stay, and no bitmap that libvirt would use lacks a change. MERGE_KILLS in the
environment sets how many rounds are played of each scene; 0 plays all.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import time
import traceback
import typing as t

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import QemuError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import carry, retire
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import open_vault, read_vault
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.in_use import disown_bitmaps, set_in_use
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import History, Mark, write_mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qemu.monitor import Monitor

from .. import chains, disks, qemu
from ..disks import SIZE, Disk, Event, Scene, recording, wrong_with
from .overlays import SETTINGS

_SUBREAPER = 36


class Ended(t.NamedTuple):
    """How a run ended."""

    state: str
    failures: list[str]
    codes: list[str]
    exact: bool | None
    warnings: list[str]
    steps: int


def request(disk: Disk) -> CommitRequest:
    """Return the commit of all from TOP down to BASE."""
    return CommitRequest(
        disk.path,
        disk.base,
        above=disk.above,
        further=disk.further,
        accept_lost_bitmaps=disk.accept,
        is_of_vm=disk.known is not None,
        created=tuple((disk.known or {}).items()),
    )


def merge(disk: Disk, step: int | str = 0, delay: float = 0.0) -> Ended | None:
    """Run the commit in a process of its own; None if it, and QEMU, were killed at this step, or before this phase."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    hear, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            count = die_at(step, delay)
            outcome = run(MergeLayers(), [request(disk)], SETTINGS)
            failures = [str(failure) for failure in outcome.failures]
            codes = [failure.code for failure in outcome.failures]
            verdict = outcome.verdicts[0]
            said = [verdict.state, failures, codes, verdict.is_exact, list(outcome.warnings), count[0]]
            os.write(say, json.dumps(said).encode())
            os._exit(0)
        except BaseException:
            os.write(say, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(say)
    with open(hear, "rb") as words:
        said = words.read()
    _pid, status = os.waitpid(pid, 0)
    ended = os.WIFSIGNALED(status)
    try:
        while True:  # QEMU holds its locks until it is gone
            os.waitpid(-pid, 0)
    except ChildProcessError:
        pass
    if ended:
        assert step
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, said
    return Ended(*json.loads(said))


def die_at(step: int | str, delay: float) -> list[int]:
    """Have this process, and its QEMU, be killed at a step or before a phase; return what counts the steps."""
    count = [0]
    if isinstance(step, str):
        setattr(MergeLayers, step, lambda *_args: os.killpg(0, signal.SIGKILL))

    def stepping(real: t.Any) -> t.Any:
        def call(*args: t.Any, **kwargs: t.Any) -> t.Any:
            count[0] += 1
            if count[0] == step:
                time.sleep(delay)
                os.killpg(0, signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "link", "unlink", "rename", "pwrite", "ftruncate"):
        setattr(os, name, stepping(getattr(os, name)))
    retire.rename_without_replacing = stepping(retire.rename_without_replacing)
    Monitor.send = stepping(Monitor.send)  # type: ignore[method-assign]
    return count


def killed_again(disk: Disk) -> None:
    """The next run is killed, too."""
    merge(disk, disk.dice.randrange(1, 60), disk.dice.choice((0, 0.002)))


def vm_dies_and_killed_again(disk: Disk) -> None:
    """The VM dies, and the next run is killed."""
    disk.crash()
    killed_again(disk)


def copied(disk: Disk, how: str = "-a") -> None:
    """Have a copy of the whole folder, by cp with this option, in its place: all files have other numbers."""
    before = {one.name: one.inode() for one in os.scandir(disk.folder)}
    away = f"{disk.folder}.away"
    os.rename(disk.folder, away)
    subprocess.run(["cp", how, away, disk.folder], check=True)
    assert {one.name for one in os.scandir(disk.folder) if one.inode() != before[one.name]} == before.keys()
    shutil.rmtree(away)
    if how != "-a":  # all is new then, in any order, as somebody says who was told that it is not
        os.utime(disk.path)


EVENTS = (*disks.EVENTS, killed_again, vm_dies_and_killed_again, copied)
MAY_REFUSE = {**disks.MAY_REFUSE, copied: {"unfinished"}}  # a copy tells less than the very file
MOST = int(os.environ.get("MERGE_KILLS", qemu.examples(2)))


class Stage:
    """A scene that is played again and again, and how it ends when nothing happens."""

    def __init__(self, folder: t.Any, scene: Scene) -> None:
        os.makedirs(folder / "images")
        self._kept = folder / "kept"
        self.disk = Disk(folder / "images")
        scene(self.disk)
        self._then = dict(self.disk.checkpoints), self.disk.now, list(self.disk.images)
        shutil.copytree(self.disk.folder, self._kept)
        assert not wrong_with(self.disk)
        self.before = chains.usable(self.disk.top)
        ended = merge(self.disk)
        assert ended is not None
        assert ended.state == "committed", ended
        self.steps, self.exact = ended.steps, ended.exact
        self.bits = chains.own_bits(self.disk.base)
        self.bitmaps = qemu.bitmaps_of(self.disk.base)
        self.usable = chains.usable(self.disk.top)
        self.names = set(os.listdir(self.disk.folder))
        assert not self.wrong_in_the_end(ended, disks.nothing)
        # What a backup could use it can use afterwards, and it is the same.
        assert not [name for name, bits in self.before.items() if self.usable[name] & bits != bits]

    def reset(self, dice: random.Random) -> None:
        """Have all as it was in the beginning."""
        shutil.rmtree(self.disk.folder)
        shutil.copytree(self._kept, self.disk.folder)
        checkpoints, self.disk.now, images = self._then
        self.disk.checkpoints, self.disk.images, self.disk.dice = dict(checkpoints), list(images), dice

    def wrong_in_the_end(self, ended: Ended | None, event: Event) -> list[str]:
        """Return what is wrong after a run that has come to its end."""
        if ended is None or ended.failures or ended.state not in ("committed", "absent"):
            return [f"the run has ended with {ended}"]
        wrong = wrong_with(self.disk)
        if event not in disks.MAY_REFUSE and set(os.listdir(self.disk.folder)) != self.names:
            wrong.append(f"there is {sorted(os.listdir(self.disk.folder))}")
        return wrong

    def unlike_undisturbed(self, *, may_be_wide: bool, exact: bool | None) -> list[str]:
        """Return in what BASE's bitmaps differ from those that a run leaves to which nothing happens."""
        wrong = []
        if qemu.bitmaps_of(self.disk.base) != self.bitmaps:
            wrong.append(f"BASE has {sorted(qemu.bitmaps_of(self.disk.base))}, not {sorted(self.bitmaps)}")
        # Those that are made again from what images hold lack discards that had no effect, and have more elsewhere.
        if (exact or not may_be_wide) and chains.own_bits(self.disk.base) != self.bits:
            wrong.append(f"BASE has other bits, said to be exact: {exact}")
        return wrong

    def play(self, step: int, event: Event, dice: random.Random) -> tuple[str, list[str]]:
        """Kill a run at a step, let something happen, and run again; return the outcome and what is wrong."""
        self.reset(dice)
        disk = self.disk
        ended = merge(disk, step, dice.choice((0.0, 0.0, 0.001, 0.003)))
        outcome = "went through" if ended else "killed"
        wrong = [f"after the kill: {problem}" for problem in wrong_with(disk)]
        sound = not os.path.exists(disk.path) or not any(b.inconsistent for b in qemu.read(disk.path).bitmaps)
        event(disk)
        wrong += [f"after the event: {problem}" for problem in wrong_with(disk, with_base=event is disks.nothing)]
        again = merge(disk)
        assert again is not None
        if again.codes and set(again.codes) <= MAY_REFUSE.get(event, set()):
            return f"{outcome}, refused", wrong + [f"refused: {problem}" for problem in wrong_with(disk)]
        wrong += [f"in the end: {problem}" for problem in self.wrong_in_the_end(again, event)]
        if not wrong and event is disks.nothing:
            wrong += self.unlike_undisturbed(may_be_wide=not sound, exact=again.exact)
        if event is disks.checkpoint and disk.checkpoints.keys() & {disks.LATER.name} - chains.usable(disk.top).keys():
            wrong.append("the checkpoint is lost")
        if again.exact and not self.exact and event is disks.nothing:
            wrong.append("is told as exact")
        return f"{outcome}, {again.state}", wrong


def played(tmp_path: t.Any, scene: Scene, phase: str, *events: Event) -> Disk:
    """Return a disk whose commit was killed before a phase, to which these things have happened since."""
    disk = Disk(tmp_path)
    scene(disk)
    assert merge(disk, phase) is None
    for event in events:
        event(disk)
        assert not wrong_with(disk, with_base=False)
    return disk


def completed(disk: Disk) -> Ended:
    """Run the commit to its end, which must be a good one."""
    ended = merge(disk)
    assert ended is not None
    assert ended.state == "committed", ended
    assert not wrong_with(disk)
    assert not os.path.exists(disk.path)
    assert disk.vault is None
    return ended


def test_a_bitmap_that_only_the_vault_knows_any_more(tmp_path):
    disk = played(tmp_path, disks.plain, "move", disks.vm_dies_at_start)
    completed(disk)
    assert ("disabled", 65536, False, False) in qemu.bitmaps_of(disk.base)


def test_an_overlay_that_had_no_bitmaps_before_loses_those_that_it_carries(tmp_path):
    completed(played(tmp_path, disks.bare, "move", disks.vm_runs_after_it_died_at_start))


@pytest.mark.parametrize("phase", ["strip", "give", "publish"])
def test_a_run_that_goes_on_does_not_know_whether_bitmaps_are_exact(tmp_path, phase):
    """What TOP carries may be what it holds, not what was recorded."""
    assert completed(played(tmp_path, disks.bare, phase)).exact is None


@pytest.mark.parametrize("step", ["carry", "strip"])
def test_the_image_on_top_is_judged_by_what_was_below_it_before_the_kill(tmp_path, step):
    """A kill leaves bitmaps in use, of TOP or of BASE, which the next run makes again."""
    disk = played(tmp_path, disks.below, step)
    disk.crash(disk.path if step == "carry" else disk.base, writes=0)  # as a kill in mid-step does
    assert not wrong_with(disk)
    completed(disk)


@contextlib.contextmanager
def as_qemu_opens_top(act: t.Callable[[Monitor], t.Any]) -> t.Iterator[None]:
    """Have this happen, in the block, as QEMU is told to open TOP for writing."""
    real = Monitor.send

    def send(self: Monitor, name: str, *args: t.Any) -> None:
        if name == "blockdev-add" and args[0].get("node-name") == "w":
            act(self)
        real(self, name, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "send", send)
        yield


def die() -> None:
    """Be killed, and QEMU with us."""
    os.killpg(0, signal.SIGKILL)


def killed_as_qemu_opens_top(disk: Disk) -> None:
    """QEMU takes the bitmaps of an image away as it opens it for writing, names included."""
    with as_qemu_opens_top(lambda _monitor: (disks.lose_bitmaps(disk.path), die())):
        assert merge(disk, -1) is None
    assert not qemu.bitmaps_of(disk.path)


def killed_while_top_is_open(disk: Disk) -> None:
    """QEMU leaves the bitmaps inconsistent that it has open."""

    def break_bitmaps(_monitor: Monitor) -> None:
        with open_image(disk.path) as file:
            set_in_use(file, [bitmap.name for bitmap in qemu.read(disk.path).bitmaps], in_use=True)
        die()

    with as_qemu_opens_top(break_bitmaps):
        assert merge(disk, -1) is None
    assert all(inconsistent for *_rest, inconsistent in qemu.bitmaps_of(disk.path))


KILLED = [killed_as_qemu_opens_top, killed_while_top_is_open]


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("meanwhile", [disks.nothing, disks.vm_runs, disks.vm_dies])
def test_a_kill_while_top_is_open_for_writing_costs_no_bitmap_above(tmp_path, killed, meanwhile):
    """Nothing but the image above tells then of bits that TOP alone had."""
    disk = Disk(tmp_path)
    disks.below(disk)
    killed(disk)
    assert not wrong_with(disk)
    assert ("new", 65536, True, False) in qemu.bitmaps_of(disk.above)
    meanwhile(disk)
    assert not wrong_with(disk)
    ended = completed(disk)
    assert bool(ended.warnings) == (meanwhile is disks.vm_dies)
    if meanwhile is not disks.vm_dies:
        assert set(chains.usable(disk.above)) == {"a", "new", "newest"}


def rotated(disk: Disk) -> None:
    """Two checkpoints that began in BASE, and one in TOP, which has an image on top."""
    disk.base = disk.add("base", SIZE, recording("a", "b"))
    disk.path = disk.add("top", SIZE, recording("a", "b", "new"))
    disk.above = disk.add("above", SIZE, recording("a", "b", "new"))


def rotated_on_top(disk: Disk) -> None:
    """The same, and TOP is what the VM has."""
    disk.base = disk.add("base", SIZE, recording("a", "b"))
    disk.path = disk.add("top", SIZE, recording("a", "b", "new"))


def killed_and_deleted(
    tmp_path: t.Any, scene: Scene, killed: t.Callable[[Disk], None], *names: str, of_vm: bool = True
) -> Disk:
    """Return a disk whose commit was killed while QEMU had TOP open, and which has lost these checkpoints since."""
    disk = Disk(tmp_path)
    scene(disk)
    if of_vm:
        disk.known = dict.fromkeys(disk.checkpoints, 0)
    killed(disk)
    delete(disk, *names)
    disk.write(3)
    if not of_vm:
        os.utime(disk.path)  # or else it looks as if a VM had run on BASE
    assert not wrong_with(disk)
    return disk


def delete(disk: Disk, *names: str) -> None:
    """Have libvirt delete checkpoints: the bitmaps of all images go, of those that still have them."""
    for name in names:
        disk.checkpoints.pop(name)
        if disk.known is not None:
            disk.known.pop(name)
        for path in disk.images:
            if name in {own for own, *_rest in qemu.bitmaps_of(path)}:
                qemu.qemu_img("bitmap", "--remove", path, name)


def names_in(*paths: str) -> set[str]:
    """Return the names of all bitmaps that these images have."""
    return {name for path in paths for name, *_rest in qemu.bitmaps_of(path)}


@pytest.mark.parametrize(
    ("killed", "scene", "of_vm", "names"),
    [
        (killed_as_qemu_opens_top, rotated, True, "a"),
        (killed_as_qemu_opens_top, rotated, True, "a b new"),
        (killed_as_qemu_opens_top, rotated, False, "a"),
        (killed_as_qemu_opens_top, rotated_on_top, True, "a b"),
        (killed_while_top_is_open, rotated, True, "new"),
        (killed_while_top_is_open, rotated, True, "a b"),
        (killed_while_top_is_open, rotated, False, "a"),
        (killed_while_top_is_open, rotated_on_top, True, "a"),
    ],
)
def test_checkpoints_that_were_deleted_after_a_kill_do_not_come_back_and_are_in_nobodys_way(
    tmp_path, killed, scene, of_vm, names
):
    """A backup tool deletes its oldest one while TOP has lost its bitmaps; the others are complete."""
    disk = killed_and_deleted(tmp_path, scene, killed, *names.split(), of_vm=of_vm)
    left = {"a", "b", "new"} - set(names.split())
    completed(disk)
    assert names_in(disk.base, disk.top) == left
    assert set(chains.usable(disk.top)) == left


@pytest.mark.parametrize(
    ("phase", "harm"),
    [
        ("carry", lambda disk: disk.crash(disk.path, 0)),
        ("strip", lambda disk: disks.lose_bitmaps(disk.path)),
        ("give", lambda disk: disk.crash(disk.path, 0)),
    ],
)
def test_a_checkpoint_that_was_deleted_after_a_kill_does_not_come_back_after_the_next_one(tmp_path, phase, harm):
    """Once BASE is stripped it tells no more what was removed; so the vault does."""
    disk = killed_and_deleted(tmp_path, rotated, killed_as_qemu_opens_top, "a", of_vm=False)
    assert merge(disk, phase) is None
    harm(disk)
    completed(disk)
    assert names_in(disk.base, disk.top) == {"b", "new"}


@pytest.mark.parametrize(("phase", "name"), [("strip", "a"), ("move", "new"), ("give", "a")])
def test_a_checkpoint_that_was_deleted_once_top_has_all_does_not_come_back(tmp_path, phase, name):
    disk = Disk(tmp_path)
    rotated_on_top(disk)
    disk.known = dict.fromkeys(disk.checkpoints, 0)
    assert merge(disk, phase) is None
    delete(disk, name)
    disk.crash()
    completed(disk)
    assert names_in(disk.base) == {"a", "b", "new"} - {name}


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize(("scene", "names"), [(rotated, "a b"), (rotated_on_top, "a"), (rotated_on_top, "a b new")])
def test_a_checkpoint_that_is_made_anew_after_a_kill_is_complete(tmp_path, killed, scene, names):
    disk = killed_and_deleted(tmp_path, scene, killed, *names.split())
    time.sleep(1.1)  # libvirt tells the second
    qemu.add_bitmaps(disk.top, recording("a"))
    disk.checkpoints["a"] = disk.now
    assert disk.known is not None
    disk.known["a"] = int(time.time())
    disk.write(3)
    completed(disk)
    left = ({"a", "b", "new"} - set(names.split())) | {"a"}
    if scene is rotated_on_top and killed is killed_as_qemu_opens_top:
        left -= {"new"}  # QEMU forgets what was lost
    assert names_in(disk.base, disk.top) == left
    assert set(chains.usable(disk.top)) == left


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("scene", [rotated, rotated_on_top])
def test_what_libvirt_did_not_know_at_the_kill_is_of_other_tools_and_stays(tmp_path, killed, scene):
    disk = Disk(tmp_path)
    scene(disk)
    disk.known = {}
    killed(disk)
    disk.write(3)
    completed(disk)
    assert set(chains.usable(disk.top)) == {"a", "b", "new"}


def test_what_the_domain_of_a_copy_does_not_know_was_not_removed(tmp_path):
    (tmp_path / "images").mkdir()
    disk = Disk(tmp_path / "images")
    rotated_on_top(disk)
    disk.known = dict.fromkeys(disk.checkpoints, 0)
    killed_as_qemu_opens_top(disk)
    copied(disk)
    disk.known = {"other": 0}
    completed(disk)
    assert set(chains.usable(disk.base)) == {"a", "b", "new"}


def test_what_libvirt_still_knows_is_made_again_though_no_image_has_it(tmp_path):
    disk = Disk(tmp_path)
    rotated_on_top(disk)
    disk.known = dict.fromkeys(disk.checkpoints, 0)
    assert merge(disk, "move") is None
    disks.vm_runs_after_it_died_at_start(disk)
    assert names_in(*disk.images) == set()
    completed(disk)
    assert set(chains.usable(disk.base)) == {"a", "b", "new"}


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("of_vm", [True, False])
def test_bitmaps_of_base_that_are_gone_and_nothing_tells_why(tmp_path, killed, of_vm):
    """Somebody removed one by hand. The advice leads out."""
    disk = killed_and_deleted(tmp_path, rotated_on_top, killed, "a", of_vm=of_vm)
    if disk.known is not None:
        disk.known["a"] = 0
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert f"BASE lacks bitmaps that the vault {disk.vault} has ('a')" in ended.failures[0]
    assert f"remove {disk.vault} and run this again" in ended.failures[0]
    if disk.known is not None:
        assert "have libvirt forget them" in ended.failures[0]
        disk.known.pop("a")
    else:
        os.unlink(str(disk.vault))
    completed(disk)
    assert set(chains.usable(disk.base)) >= {"b"}


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize("scene", [rotated, rotated_on_top])
def test_a_base_that_was_written_to_is_told_although_checkpoints_were_deleted(tmp_path, killed, scene):
    disk = killed_and_deleted(tmp_path, scene, killed, "a")
    subprocess.run(["qemu-io", "-c", "write -P 9 0 2M", disk.base], check=True, stdout=subprocess.DEVNULL)
    ended = merge(disk)
    assert ended is not None
    assert "BASE is not as the vault beside it says" in ended.failures[0]


@pytest.mark.parametrize("killed", KILLED)
def test_another_tool_takes_top_out_of_the_chain_after_a_kill(tmp_path, killed):
    """It takes the data into the image above, and of the bits those that are left in TOP: none."""
    disk = Disk(tmp_path)
    disks.below(disk)
    killed(disk)
    disk.write(3)
    qemu.pull(disk.above, disk.base)
    assert {"a"} <= set(chains.usable(disk.above))
    assert not wrong_with(disk)


@pytest.mark.parametrize("killed", KILLED)
@pytest.mark.parametrize(("scene", "base"), [(disks.deep, "lowest"), (disks.deeper, "base")])
def test_another_tool_takes_out_also_what_is_below_top_after_a_kill(tmp_path, killed, scene, base):
    """It moves no bits of a bitmap that TOP has lost, and that an image below has."""
    disk = Disk(tmp_path)
    scene(disk)
    killed(disk)
    assert not wrong_with(disk)
    disk.write(3)
    qemu.pull(disk.top, tmp_path / base)
    assert "a" in chains.usable(disk.top)
    assert not wrong_with(disk)


@pytest.mark.parametrize(
    ("scene", "phase"),
    [(disks.deep, "move"), (disks.deeper, "give"), (disks.deep_to_the_top, "strip"), (disks.deep_to_the_top, "give")],
)
def test_another_tool_takes_out_what_a_killed_run_has_left_without_bitmaps(tmp_path, scene, phase):
    """It moves none over BASE, which has none meanwhile."""
    disk = Disk(tmp_path)
    scene(disk)
    assert merge(disk, phase) is None
    disk.write(3)
    qemu.pull(disk.top, tmp_path / "lowest")
    assert "a" in chains.usable(disk.top)
    assert not wrong_with(disk, with_base=False)


@pytest.mark.parametrize("scene", [disks.deep, disks.deeper, disks.deep_to_the_top])
def test_nothing_stays_of_what_other_images_mark_meanwhile(tmp_path, scene):
    disk = Disk(tmp_path)
    scene(disk)
    own = {path: chains.own_bits(path) for path in disk.images}
    top, base = own[disk.path], own[disk.base]
    merge(disk)
    assert chains.own_bits(disk.base) == {name: bits | base.get(name, 0) for name, bits in top.items()}
    assert all(chains.own_bits(path) == own[path] for path in disk.images if path not in (disk.path, disk.base))
    assert not wrong_with(disk)


def test_what_is_lent_to_the_image_above_stays_until_qemu_has_ended(tmp_path, monkeypatch):
    """A run that is told to end stops QEMU, which can be about to open TOP: until then its bitmaps look sound."""
    disk = Disk(tmp_path)
    disks.below(disk)
    alone = chains.own_bits(disk.path)["new"]
    before, written = chains.own_bits(disk.above), os.stat(disk.above).st_mtime_ns
    assert alone & ~before["new"]
    seen, close = f"{disk.above}.seen", Monitor.close

    def interrupted(_monitor):
        raise KeyboardInterrupt

    def ended(self):
        shutil.copy(disk.above, seen)
        close(self)

    monkeypatch.setattr(Monitor, "close", ended)
    with as_qemu_opens_top(interrupted), pytest.raises(KeyboardInterrupt):
        run(MergeLayers(), [request(disk)], SETTINGS)
    monkeypatch.undo()
    assert not alone & ~chains.own_bits(seen)["new"]
    assert chains.own_bits(disk.above) == before
    assert os.stat(disk.above).st_mtime_ns == written


def test_what_is_lent_stays_where_a_failed_qemu_has_written_to_top(tmp_path):
    """Nobody can tell which bits TOP still has."""
    disk = Disk(tmp_path)
    disks.below(disk)
    alone = chains.own_bits(disk.path)["new"]
    with as_qemu_opens_top(lambda monitor: (os.utime(disk.path), monitor._process.kill())):
        ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["qemu_lost"]
    assert not alone & ~chains.own_bits(disk.above)["new"]
    assert not completed(disk).warnings
    assert not wrong_with(disk)


def test_bitmaps_that_break_while_base_still_has_its_own_are_made_again(tmp_path):
    disk = played(tmp_path, disks.plain, "strip", disks.vm_dies)
    before = set(chains.usable(disk.base))
    assert before
    assert any(inconsistent for *_rest, inconsistent in qemu.bitmaps_of(disk.path))
    completed(disk)
    assert before <= set(chains.usable(disk.base))


def test_a_failure_in_the_carry_leaves_the_image_above_as_it_was(tmp_path):
    disk = Disk(tmp_path)
    disks.below(disk)
    before = chains.usable(disk.above)
    with as_qemu_opens_top(lambda monitor: monitor._process.kill()):
        ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["qemu_lost"]
    assert chains.usable(disk.above) == before
    assert not completed(disk).warnings
    assert chains.usable(disk.above) == before


@pytest.mark.parametrize("session", [1, 2, 3], ids=["carry", "strip", "give"])
def test_an_image_whose_directory_qemu_leaves_broken_is_openable_and_the_same_call_goes_on(
    tmp_path, monkeypatch, session
):
    """After a flush that failed, QEMU ends with entries whose table is at offset 0, which no QEMU opens."""
    disk = Disk(tmp_path)
    disk.base = disk.add("base", SIZE, recording("a", "b"))
    disk.path = disk.add("top", SIZE, recording("a"))
    real, monitors = carry.rewrite_bitmaps, []

    def failing(monitor, wanted):
        monitors.append(monitor)
        if len(monitors) < session:
            return real(monitor, wanted)
        if not wanted.add:  # or else the directory goes with the last bitmap
            real(monitor, wanted._replace(remove=wanted.remove[1:]))
        else:
            real(monitor, wanted)
        place, _length = qemu.directory_of(wanted.file.path)
        qemu.patch(wanted.file.path, place, bytes(8))
        assert "constraints" in qemu.why_not_opened(wanted.file.path)
        raise QemuError(wanted.file.path, "QEMU says: Input/output error", "Run this again.")

    def disown_when_qemu_has_ended(file):
        assert monitors[-1]._process.poll() is not None
        disown_bitmaps(file)

    monkeypatch.setattr(carry, "rewrite_bitmaps", failing)
    monkeypatch.setattr(carry, "disown_bitmaps", disown_when_qemu_has_ended)
    ended = merge(disk)
    assert ended is not None
    path = disk.path if session == 1 else disk.base
    assert (
        f"Run this again. {path} has no bitmaps until the same call has gone on; the vault has them. "
        in ended.failures[0]
    )
    assert not wrong_with(disk)
    assert not qemu.why_not_opened(disk.path)
    monkeypatch.undo()
    completed(disk)


@pytest.mark.parametrize("fault", ["BASE of version 2", "TOP of version 2"])
def test_bitmaps_that_are_lost_are_not_to_look_valid_from_above(tmp_path, fault):
    disk = Disk(tmp_path)
    old = ("-o", "compat=0.10")
    disk.base = disk.add("base", SIZE, [], *old) if "BASE" in fault else disk.add("base", SIZE, recording("a"))
    disk.path = disk.add("top", SIZE, recording("a")) if "BASE" in fault else disk.add("top", SIZE, [], *old)
    disk.above = disk.add("above", SIZE, recording("a"))
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["closes_gap"]
    assert not wrong_with(disk)


@pytest.mark.parametrize("phase", ["carry", "strip"])
def test_an_overlay_of_version_2_takes_no_bitmaps_from_base_unless_their_loss_is_accepted(tmp_path, phase):
    """What they mark could be in no image while BASE is written to."""
    disk = Disk(tmp_path)
    disk.base = disk.add("base", SIZE, recording("a"))
    disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")
    disk.accept = False
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["lost_bitmaps"]
    assert "compat=1.1" in ended.failures[0]
    assert qemu.bitmaps_of(disk.base) == {("a", 65536, True, False)}
    qemu.qemu_img("amend", "-f", "qcow2", "-o", "compat=1.1", disk.path)
    assert merge(disk, phase) is None
    completed(disk)
    assert qemu.bitmaps_of(disk.base) == {("a", 65536, True, False)}


def test_an_overlay_of_version_2_goes_in_if_the_loss_is_accepted(tmp_path):
    disk = Disk(tmp_path)
    disk.base = disk.add("base", SIZE, recording("a"))
    disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")
    for phase in ("strip", "move", "give", "publish"):
        assert merge(disk, phase) is None
        assert not wrong_with(disk)
    completed(disk)
    assert not qemu.bitmaps_of(disk.base)


@pytest.mark.parametrize("bitmaps", [[], recording("a", "new")], ids=["without bitmaps", "with bitmaps"])
@pytest.mark.parametrize("runs", [False, True], ids=["", "BASE has run"])
def test_another_overlay_whose_file_got_the_number_of_one_that_is_gone(tmp_path, bitmaps, runs):
    """A run was killed when all but the vault was gone; file systems give numbers away again."""
    disk = played(tmp_path, disks.plain, "publish")
    identity = os.stat(disk.path).st_ino
    disk.images = [disk.base]
    if runs:
        disk.write(2)
    with open(disk.path, "r+b") as file:  # keep the number
        file.truncate(0)
        disk.add("other", SIZE, bitmaps)
        with open(disk.images[0], "rb") as other:
            shutil.copyfileobj(other, file)
    os.unlink(disk.images[0])
    disk.images[0] = disk.path
    assert os.stat(disk.path).st_ino == identity
    assert not wrong_with(disk, with_base=False)
    ended = merge(disk)
    assert ended is not None
    assert not wrong_with(disk, with_base=False)
    if runs and not bitmaps:  # it could be the old one, of which all bitmaps were lost
        assert ended.codes == ["unfinished"]
        assert str(disk.vault) in ended.failures[0]
    else:
        assert ended.state == "committed", ended
        assert not os.path.exists(disk.path)


def other_device(path):
    """Have a vault tell of another device, as after a new start of the host."""
    with open(path, "r+b") as file:
        data = file.read()
        for device, inode in {(s.st_dev, s.st_ino) for s in map(os.stat, os.scandir(os.path.dirname(path)))}:
            word = f"/{device}:{inode}".encode()
            data = data.replace(word, word.replace(b"/" + str(device)[:1].encode(), b"/9", 1))
        file.seek(0)
        file.write(data)


@pytest.mark.parametrize(("scene", "phase"), [(disks.plain, "carry"), (disks.two, "publish"), (disks.old, "publish")])
def test_devices_may_have_other_numbers_when_a_commit_goes_on(tmp_path, scene, phase):
    disk = Disk(tmp_path)
    scene(disk)
    names = chains.usable(disk.top).keys()
    assert merge(disk, phase) is None
    vault = disk.vault
    other_device(vault)
    if phase == "carry":
        disk.crash(writes=0)  # as a kill in the carry does
    if phase == "publish" and scene is disks.two:
        os.unlink(disk.path)
    if phase == "publish" and scene is disks.old:
        disk.images = [disk.base]
        command = ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4M", disk.base]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        disk.now = chains.content(disk.base)
    completed(disk)
    assert names <= chains.usable(disk.base).keys()
    assert os.listdir(disk.folder) == ["base"]


@pytest.mark.parametrize("is_named", [False, True])
def test_an_overlay_that_a_killed_run_has_left_does_not_go_in_again(tmp_path, is_named):
    """What it holds is old once BASE has run."""
    disk = played(tmp_path, disks.two, "publish")
    top, middle = disk.path, disk.images[1]
    os.unlink(top)  # then the run was killed
    disk.images = [disk.base]
    disk.write(3)
    disk.path = middle if is_named else top
    completed(disk)
    assert not os.path.exists(middle)


def test_what_a_killed_run_has_left_is_on_stable_storage_before_the_next_step(tmp_path, monkeypatch):
    """It may have been killed before it could see to that."""
    disk = Disk(tmp_path)
    disks.plain(disk)
    order = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    for phase, needed in (("carry", disk.folder), ("strip", disk.path), ("publish", disk.folder)):
        assert merge(disk, phase) is None
        order.clear()
        for name in ("strip", "move", "give", "publish"):
            monkeypatch.setattr(MergeLayers, name, lambda *args: args[1])
        run(MergeLayers(), [request(disk)], SETTINGS)
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
        assert needed in order, phase


def loses(disk: Disk) -> None:
    """QEMU is killed while it opens TOP, which loses all bitmaps with their names."""
    disks.lose_bitmaps(disk.path)


def breaks(disk: Disk) -> None:
    """QEMU is killed once it has TOP open."""
    disk.crash(disk.path, writes=0)


def stopped_at_carry(tmp_path: t.Any, scene: Scene, *events: Event, phase: str = "carry") -> Disk:
    """Return a disk in a folder of its own whose commit was killed, to which these things have happened since."""
    (tmp_path / "images").mkdir()
    return played(tmp_path / "images", scene, phase, *events)


@pytest.mark.parametrize(("how", "harm"), [("-a", breaks), ("-r", loses)])
@pytest.mark.parametrize("scene", [disks.plain, disks.two, disks.below, disks.bare])
def test_a_copy_of_what_a_killed_run_has_left_goes_on_as_the_original_does(tmp_path, scene, harm, how):
    """The vault alone has the bits of the bitmaps that began in TOP."""
    disk = stopped_at_carry(tmp_path, scene)
    with open_vault(disk.vault) as file:
        vault = read_vault(file)
    names = set(vault.above) | set(vault.below)
    harm(disk)
    copied(disk, how)
    (outcome,) = run(MergeLayers(), [request(disk)], SETTINGS._replace(check_mode=True)).verdicts
    assert names - {"disabled"} <= {one.name for one in outcome.bitmaps}
    assert completed(disk).exact is False
    assert names <= {name for name, *_rest in qemu.bitmaps_of(disk.base)}


@pytest.mark.parametrize("phase", ["carry", "strip"])
def test_a_copy_of_what_a_killed_run_has_left_is_the_one_that_is_kept_then(tmp_path, phase):
    """The next kill takes away what tells that it is a copy, and a VM that runs then the last trace of it."""
    disk = stopped_at_carry(tmp_path, disks.two, loses)
    copied(disk)
    assert merge(disk, phase) is None
    for event in (loses, disks.vm_runs):
        event(disk)
        assert not wrong_with(disk, with_base=False)
    completed(disk)
    assert {"a", "b", "new", "top"} <= chains.usable(disk.base).keys()


def test_a_copy_elsewhere_goes_on_and_leaves_the_original_alone(tmp_path):
    def scene(disk):
        disks.plain(disk)
        qemu.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "base", "-F", "qcow2", disk.path)

    disk = stopped_at_carry(tmp_path, scene, loses)
    original = Disk(tmp_path / "images")
    original.base, original.path, original.images = disk.base, disk.path, list(disk.images)
    original.checkpoints, original.now = disk.checkpoints, disk.now
    subprocess.run(["cp", "-a", disk.folder, tmp_path / "copy"], check=True)
    disk.folder = str(tmp_path / "copy")
    disk.base, disk.path = f"{disk.folder}/base", f"{disk.folder}/top"
    disk.images = [disk.path, disk.base]
    before = {one.name: one.stat().st_mtime_ns for one in os.scandir(original.folder)}
    for one in (disk, original):
        completed(one)
        assert {"a", "coarse", "new"} <= chains.usable(one.base).keys()
        if one is disk:
            assert {two.name: two.stat().st_mtime_ns for two in os.scandir(original.folder)} == before


def test_a_copy_whose_mark_is_lost_while_base_is_stripped_goes_on(tmp_path):
    disk = stopped_at_carry(tmp_path, disks.plain, disks.vm_dies_at_start, phase="move")
    copied(disk)
    completed(disk)
    assert {"a", "coarse", "new"} <= chains.usable(disk.base).keys()


def refused_for_the_vault(disk: Disk) -> None:
    """The commit must be refused, for what the vault alone has, and change nothing; its advice leads out."""
    before, vault = qemu.bitmaps_of(disk.base), disk.vault
    for check_mode in (True, False):
        (failure,) = run(MergeLayers(), [request(disk)], SETTINGS._replace(check_mode=check_mode)).failures
        assert (failure.code, failure.subject) == ("unfinished", disk.path)
        assert f"lacks bitmaps that the vault {vault} has ('new'), which is of another file" in failure.why
        assert f"remove {vault} and run this again" in failure.remedy
    assert (qemu.bitmaps_of(disk.base), disk.vault) == (before, vault)
    os.unlink(vault)
    completed(disk)
    assert "new" not in chains.usable(disk.base)
    assert "a" in chains.usable(disk.base)


def test_a_copy_in_which_no_name_is_left_is_not_told_from_another_overlay(tmp_path):
    disk = stopped_at_carry(tmp_path, disks.plain, loses)
    copied(disk)
    disk.write(3)  # QEMU forgets what was lost
    refused_for_the_vault(disk)


def anew(disk: Disk, bitmaps: t.Sequence[Bitmap], made: int = 0) -> None:
    """Give TOP up, and put another overlay onto BASE, by the same name."""
    os.rename(disk.path, f"{disk.folder}/../gone")  # so that its number is not given away again
    disk.images.remove(disk.path)
    disk.checkpoints.pop("new")
    disk.path = disk.add("top", SIZE, bitmaps)
    made_at(disk.path, made)
    os.unlink(f"{disk.folder}/../gone")


def made_at(path: str, made: int) -> None:
    """Have an overlay tell when it was made."""
    if made:
        with OpenImage(path, os.open(path, os.O_RDWR)) as file:
            write_mark(file, Mark("uuid", "vda", "s"), History(made=made))


def test_another_overlay_of_the_same_name_that_is_in_order_is_not_the_one_of_the_vault(tmp_path):
    disk = stopped_at_carry(tmp_path, disks.plain)
    anew(disk, recording("a"))
    completed(disk)
    assert set(chains.usable(disk.base)) == {"a", "coarse"}


@pytest.mark.parametrize("harm", [disks.nothing, loses, breaks])
def test_another_overlay_of_the_same_name_does_not_get_what_began_in_the_one_before_it(tmp_path, harm):
    """What the disk was when that checkpoint was made is in no image any more."""
    disk = stopped_at_carry(tmp_path, disks.plain)
    anew(disk, [] if harm is disks.nothing else recording("a"))
    harm(disk)
    refused_for_the_vault(disk)


@pytest.mark.parametrize("harm", [disks.nothing, loses, breaks])
def test_another_overlay_of_the_same_name_that_says_when_it_was_made_is_not_refused(tmp_path, harm):
    def scene(disk):
        disk.base = disk.add("base", SIZE, recording("a"))
        disk.path = disk.add("top", SIZE, recording("a", "new"))
        made_at(disk.path, 10**18)

    disk = stopped_at_carry(tmp_path, scene)
    anew(disk, [] if harm is disks.nothing else recording("a"), made=2 * 10**18)
    harm(disk)
    completed(disk)
    assert set(chains.usable(disk.base)) == {"a"}


def test_a_copy_that_is_older_than_base_may_have_gone_in(tmp_path):
    """Names alone do not tell whether its VM has gone on with BASE."""
    disk = stopped_at_carry(tmp_path, disks.plain, loses)
    copied(disk)
    os.utime(disk.path, ns=(0, os.stat(disk.base).st_mtime_ns - 1))
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert "it may have gone in already" in ended.failures[0]


@pytest.mark.parametrize("harm", [disks.nothing, breaks, loses])
@pytest.mark.parametrize("scene", [disks.plain, disks.bare])
def test_what_was_begun_is_stale_where_base_was_written_to_before_top_had_its_mark(tmp_path, scene, harm):
    """As by 'virsh blockcommit --pivot', after which the VM goes on with BASE; other calls advise to complete this."""
    disk = stopped_at_carry(tmp_path, scene, harm)
    os.utime(disk.path, ns=(0, os.stat(disk.base).st_mtime_ns - 1))
    before, vault = chains.content(disk.base), disk.vault
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert "it may have gone in already" in ended.failures[0]
    assert f"remove the vault of its commit, {vault}" in ended.failures[0]
    assert (chains.content(disk.base), disk.vault) == (before, vault)
    os.utime(disk.path)  # by the word of the user
    completed(disk)


@pytest.mark.parametrize("phase", ["carry", "move"])
def test_of_an_overlay_of_version_2_bitmaps_of_base_alone_tell_whether_that_was_written_to(tmp_path, phase):
    def scene(disk):
        disk.base = disk.add("base", SIZE, recording("a"))
        disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")

    disk = stopped_at_carry(tmp_path, scene, phase=phase)
    os.utime(disk.path, ns=(0, os.stat(disk.base).st_mtime_ns - 1))
    if phase == "carry":
        ended = merge(disk)
        assert ended is not None
        assert ended.codes == ["unfinished"]
        os.utime(disk.path)
    completed(disk)


def emptied(disk: Disk) -> None:
    """Somebody merges TOP by other tools, which leaves it there."""
    qemu.qemu_img("commit", "-q", disk.path)


def put_back_empty(disk: Disk) -> None:
    """Another file is in the place of TOP, as it was once, with the mark that it has."""
    marks = [one for one in qemu.read(disk.path).bitmaps if one.name.startswith("kvmfleet")]
    with open(disk.path, "r+b") as file:  # keep the number
        file.truncate(0)
        qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", disk.base, "-F", "qcow2", f"{disk.path}.new")
        qemu.add_bitmaps(f"{disk.path}.new", marks)
        with open(f"{disk.path}.new", "rb") as other:
            shutil.copyfileobj(other, file)
    os.unlink(f"{disk.path}.new")
    disk.now = chains.content(disk.path)


@pytest.mark.parametrize(("emptying", "writes"), [(emptied, 0), (emptied, 2), (put_back_empty, 2)])
@pytest.mark.parametrize(("phase", "harm"), [("carry", loses), ("carry", breaks), ("strip", breaks), ("give", breaks)])
def test_bitmaps_are_not_made_again_from_what_holds_less_than_it_held(tmp_path, phase, harm, emptying, writes):
    disk = stopped_at_carry(tmp_path, disks.plain, harm, phase=phase)
    emptying(disk)
    disk.write(writes)
    os.utime(disk.path)  # or else it tells of the merge if 'qemu-img commit' has written to BASE last
    before = chains.content(disk.top)
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    if phase != "carry" or emptying is put_back_empty:  # or else BASE's bitmaps tell that it was written to
        assert f"holds less than when the vault {disk.vault} was made" in ended.failures[0]
    # The way out.
    disk.checkpoints.clear()
    for path in (disk.base, disk.path):
        for name, *_rest in qemu.bitmaps_of(path):
            qemu.qemu_img("bitmap", "--remove", path, name)
    os.unlink(disk.vault)
    if not qemu.bitmaps_of(disk.path):
        os.utime(disk.path)  # as the next refusal says, where nothing was to be removed
    completed(disk)
    assert chains.content(disk.base) == before


def idle(disk: Disk) -> None:
    """The overlay holds nothing."""
    disk.base = disk.add("base", SIZE, recording("a"))
    disk.path = disk.add("top", SIZE, [])
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", disk.base, "-F", "qcow2", disk.path)
    qemu.add_bitmaps(disk.path, recording("a", "new"))
    disk.now = chains.content(disk.path)
    disk.checkpoints["new"] = disk.now


@pytest.mark.parametrize(("phase", "harm"), [("carry", loses), ("carry", breaks), ("strip", breaks), ("give", breaks)])
@pytest.mark.parametrize("writes", [0, 2])
def test_an_overlay_that_held_nothing_goes_on(tmp_path, phase, harm, writes):
    disk = stopped_at_carry(tmp_path, idle, harm, phase=phase)
    disk.write(writes)
    completed(disk)
    assert {"a", "new"} <= chains.usable(disk.base).keys()


@pytest.mark.parametrize("phase", ["carry", "strip"])
def test_an_overlay_that_held_nothing_and_was_emptied_since_does_not_go_on(tmp_path, phase):
    def idle(disk):
        disk.base = disk.add("base", SIZE, [] if phase == "carry" else recording("a"))
        disk.path = disk.add("top", SIZE, [])
        qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", disk.base, "-F", "qcow2", disk.path)
        qemu.add_bitmaps(disk.path, recording("a", "new"))
        disk.now = chains.content(disk.path)

    disk = stopped_at_carry(tmp_path, idle, disks.nothing, phase=phase)
    breaks(disk)
    disk.write(3)
    emptied(disk)
    os.utime(disk.path)
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]


@pytest.mark.parametrize("phase", ["strip", "give"])
def test_what_a_vm_wrote_before_the_overlay_was_emptied_is_in_bitmaps_that_are_made_again(tmp_path, phase):
    """The overlay held nothing when the vault was made, and holds something now, which is not all that was written."""
    disk = stopped_at_carry(tmp_path, idle, phase=phase)
    disk.write(3)
    emptied(disk)
    disk.crash(writes=2)
    completed(disk)
    assert {"a", "new"} <= chains.usable(disk.base).keys()


def test_what_only_a_vault_has_is_in_doubt_once_others_have_merged_the_overlay_up(tmp_path):
    """As by 'virsh blockpull': then no gap tells what a killed run has lost."""
    disk = stopped_at_carry(tmp_path, disks.below)
    loses(disk)
    qemu.qemu_img("rebase", "-q", "-b", disk.base, "-F", "qcow2", disk.above)

    def told() -> dict[str, t.Any]:
        found = examine_chain(disk.above, follow=True, count=True)
        return {one.name: (one.valid, one.problem, one.name in found.dirty) for one in found.checkpoints}

    doubt, known = (None, "incomplete", False), (True, None, True)
    assert told() == {"a": doubt, "new": doubt, "newest": known}
    os.unlink(disk.vault)
    assert told() == dict.fromkeys(("a", "new", "newest"), known)


def without_bitmaps(disk: Disk) -> None:
    """There is nothing that would tell who wrote to BASE, and what."""
    disk.base = disk.add("base", SIZE, [])
    disk.path = disk.add("top", SIZE, [])


@pytest.mark.parametrize("runs", [disks.vm_runs, disks.vm_dies])
def test_what_others_wrote_to_base_after_a_vm_ran_on_the_overlay_is_not_overwritten(tmp_path, runs):
    """As the VM does that 'qemu-img commit -d' and 'virsh edit' have put on BASE."""
    disk = stopped_at_carry(tmp_path, without_bitmaps, runs, phase="strip")
    disk.write(2, path=disk.base)
    before = chains.content(disk.base)
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert "after that something else has written to BASE" in ended.failures[0]
    assert f"put the VM on it ('virsh edit'), move this overlay and {disk.vault} away" in ended.failures[0]
    assert chains.content(disk.base) == before
    os.utime(disk.path)  # by the word of the user
    disk.now = chains.content(disk.top)
    completed(disk)


def test_an_overlay_whose_mark_base_has_got_has_gone_in(tmp_path):
    """'virsh blockcommit' merges bitmaps, too."""
    disk = stopped_at_carry(tmp_path, without_bitmaps, disks.vm_runs, phase="strip")
    (mark,) = qemu.read(disk.path).bitmaps
    qemu.add_bitmaps(disk.base, [mark])
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert "BASE has its mark, too" in ended.failures[0]
    assert f"Move this overlay and {disk.vault} away, or remove both. Then remove the mark" in ended.failures[0]


def test_the_vault_knows_what_all_images_together_held(tmp_path):
    """Work of other tools can have put what TOP held into the image between."""
    disk = stopped_at_carry(tmp_path, disks.two, breaks)
    emptied(disk)
    os.utime(disk.path)  # by the word of the user
    completed(disk)


@pytest.mark.parametrize("is_copy", [True, False])
def test_an_overlay_of_version_2_may_be_a_copy_of_what_went_in(tmp_path, is_copy):
    """It bears no mark, and whatever it holds could be older than what a VM has written to BASE since."""

    def scene(disk):
        disk.base = disk.add("base", SIZE, [])
        disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")

    disk = stopped_at_carry(tmp_path, scene, phase="publish")
    if is_copy:
        disk.images = [disk.base]
        disk.write(3)  # its VM is on BASE
        copied(disk, "-r")
    else:
        disk.images = [disk.base]
        os.rename(disk.path, f"{disk.folder}/../gone")
        disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")
    before, vault = chains.content(disk.base), disk.vault
    ended = merge(disk)
    assert ended is not None
    assert ended.codes == ["unfinished"]
    assert f"remove {vault} and run this again" in ended.failures[0]
    assert chains.content(disk.base) == before
    if is_copy:
        os.unlink(disk.path)
        completed(disk)
        assert chains.content(disk.base) == before
    else:
        os.unlink(vault)
        completed(disk)


@pytest.mark.parametrize("scene", disks.SCENES)
def test_killed_at_any_step(tmp_path, scene):
    stage = Stage(tmp_path, scene)
    wrong, outcomes = [], collections.Counter()
    rounds = [(step, event) for event in EVENTS for step in range(1, stage.steps + 2)]
    for step, event in random.Random(scene.__name__).sample(rounds, min(MOST or len(rounds), len(rounds))):
        outcome, problems = stage.play(step, event, random.Random(f"{scene.__name__} {event.__name__} {step}"))
        outcomes[f"{event.__name__}: {outcome}"] += 1
        wrong += [f"step {step}, {event.__name__}: {problem}" for problem in problems]
    print(f"{scene.__name__}, {stage.steps} steps:", *(f"{count} {what};" for what, count in sorted(outcomes.items())))
    assert not wrong, "\n".join(wrong)
