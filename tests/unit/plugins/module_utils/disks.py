# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks whose overlays are merged down: what they look like, what happens to them, and what must hold at any moment."""

from __future__ import annotations

import os
import random
import subprocess
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.vault import find_vault, place_of
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.tests.unit.plugins.module_utils import chains, qemu

SIZE = (4 << 20) + 1536  # bytes
LATER = Bitmap("later", 65536, True, False)


class Disk:
    """A chain in a folder, with what its guest has on it and what its checkpoints were made of."""

    def __init__(self, folder: t.Any) -> None:
        self.folder = str(folder)
        self.dice = random.Random(7)
        self.checkpoints: dict[str, bytes] = {}
        self.now = b""
        self.images: list[str] = []  # topmost first
        self.path = ""  # of TOP
        self.base = ""
        self.above: str | None = None
        self.further: tuple[str, ...] = ()  # on top of that, topmost first
        self.accept = True  # that bitmaps are lost
        self.known: dict[str, int] | None = None  # of a VM, libvirt's checkpoints, and when each was made, s since 1970

    def add(self, name: str, size: int, bitmaps: t.Sequence[Bitmap], *options: str, writes: int = 6) -> str:
        """Put an image on top, with these bitmaps, and have the guest write to it."""
        path = os.path.join(self.folder, name)
        backing = ["-b", self.images[0], "-F", "qcow2"] if self.images else []
        qemu.create(path, size, *backing, *options)
        self.images.insert(0, path)
        self.now = chains.content(path)
        qemu.add_bitmaps(path, bitmaps)
        for bitmap in bitmaps:
            self.checkpoints.setdefault(bitmap.name, self.now)
        self.write(writes, size, path)
        return path

    @property
    def top(self) -> str:
        """The image that the VM has: BASE once TOP, which goes first, is gone, unless there is one above."""
        ends = (*self.further, self.above, self.path, self.base)
        return next(path for path in self.images if path in ends and os.path.exists(path))

    @property
    def vault(self) -> str | None:
        """The path of the vault, if it is there."""
        return find_vault(place_of(self.base, False, self.path))

    def write(self, times: int, size: int = 0, path: str | None = None) -> None:
        """Have a VM run on the topmost image, write, and end."""
        command = ["qemu-io", "-f", "qcow2", "-d", "unmap"]
        for word in self.commands(times, size or len(self.now)):
            command += ["-c", word]
        subprocess.run([*command, path or self.top], check=True, stdout=subprocess.DEVNULL)
        self.now = chains.content(path or self.top)

    def commands(self, times: int, size: int) -> list[str]:
        """Return so many commands of writing for qemu-io."""
        words = []
        for _number in range(times):
            length = self.dice.choice((512, 4096, 65536, 100 * 512))
            offset = self.dice.randrange(0, (size - length) // 512 + 1) * 512
            what = self.dice.choice((f"write -P {self.dice.randrange(1, 255)}", "write -z", "discard"))
            words.append(f"{what} {offset} {length}")
        return words

    def crash(self, path: str | None = None, writes: int = 4) -> None:
        """Have a VM run on the topmost image, or another one, write, and be killed."""
        command = ["qemu-io", "-f", "qcow2", "-d", "unmap", path or self.top]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as vm:
            stdin, stdout = t.cast("t.IO[bytes]", vm.stdin), t.cast("t.IO[bytes]", vm.stdout)
            for word in ["length", *self.commands(writes, len(self.now)), "flush"]:  # it takes one at a time
                await_prompt(stdout)
                stdin.write(f"{word}\n".encode())
            await_prompt(stdout)
            vm.kill()
        self.now = chains.content(self.top)


Scene = t.Callable[[Disk], None]  # makes the images
Event = t.Callable[[Disk], None]


def await_prompt(stdout: t.IO[bytes]) -> None:
    """Read what qemu-io says until it asks for a command."""
    said = b""
    while not said.endswith(b"qemu-io> "):
        piece = stdout.read(4096)
        assert piece, f"the VM has ended with {said!r}"
        said += piece


def recording(*names: str, granularity: int = 65536) -> list[Bitmap]:
    """Return recording bitmaps of these names."""
    return [Bitmap(name, granularity, True, False) for name in names]


def plain(disk: Disk) -> None:
    """An overlay as libvirt makes it, and a checkpoint made since."""
    other = [Bitmap("coarse", 1 << 20, True, False), Bitmap("disabled", 65536, False, False)]
    disk.base = disk.add("base", SIZE, [*recording("a"), *other])
    disk.path = disk.add("top", SIZE, [*recording("a", "new"), Bitmap("coarse", 1 << 20, True, False)])


def unlike(disk: Disk) -> None:
    """Images whose sizes, clusters and granularities differ, with bitmaps that TOP lacks."""
    bitmaps = [*recording("a", "lacking", granularity=4096), Bitmap("b", 1 << 17, True, False)]
    disk.base = disk.add("base", SIZE - (1 << 20), bitmaps, "-o", "lazy_refcounts=on")
    bitmaps = [Bitmap("a", 1 << 17, True, False), Bitmap("b", 4096, True, False)]
    disk.path = disk.add("top", SIZE, bitmaps, "-o", "cluster_size=4096")


def faulty(disk: Disk) -> None:
    """Bitmaps of every kind that no backup can use, or could use by mistake, and an image below BASE."""
    disk.add("below", SIZE, [*recording("gap", "all"), Bitmap("broken_below", 65536, True, True)])
    base = [Bitmap("broken", 65536, True, True), Bitmap("disabled", 65536, False, False)]
    disk.base = disk.add("base", SIZE, [*recording("all", "lost", "stopped", "broken_below"), *base])
    top = [Bitmap("lost", 65536, True, True), Bitmap("stopped", 65536, False, False), Bitmap("own", 65536, True, True)]
    disk.path = disk.add("top", SIZE, [*recording("gap", "all", "broken", "disabled", "broken_below"), *top])


def none(disk: Disk) -> None:
    """Images without bitmaps."""
    disk.base = disk.add("base", SIZE, [])
    disk.path = disk.add("top", SIZE, [])


def bare(disk: Disk) -> None:
    """An overlay as qemu-img makes it, which has no bitmaps."""
    disk.base = disk.add("base", SIZE, recording("a", "b"))
    disk.path = disk.add("top", SIZE, [])


def old(disk: Disk) -> None:
    """An overlay of version 2, which can have no bitmaps, on a BASE without."""
    disk.base = disk.add("base", SIZE, [])
    disk.path = disk.add("top", SIZE, [], "-o", "compat=0.10")


def two(disk: Disk) -> None:
    """Two layers at once, the lower one with a fault."""
    disk.base = disk.add("base", SIZE, recording("a", "b", "c"))
    disk.add("middle", SIZE, [*recording("a", "new"), Bitmap("c", 65536, True, True)])
    disk.path = disk.add("top", SIZE, recording("a", "b", "c", "new", "top"))


def below(disk: Disk) -> None:
    """An image on top of the one that is merged down."""
    disk.base = disk.add("base", SIZE, recording("a"))
    disk.path = disk.add("top", SIZE, recording("a", "new"))
    disk.above = disk.add("above", SIZE, recording("a", "new", "newest"))


def deep_to_the_top(disk: Disk) -> None:
    """Images below BASE, with bitmaps that go on in all on top of them."""
    disk.add("lowest", SIZE, recording("a"))
    disk.add("lower", SIZE, recording("a", "b"))
    disk.base = disk.add("base", SIZE, recording("a", "b", "c"))
    disk.path = disk.add("top", SIZE, recording("a", "b", "c", "new"))


def deep(disk: Disk) -> None:
    """The same, with an image on top of TOP."""
    deep_to_the_top(disk)
    disk.above = disk.add("above", SIZE, recording("a", "b", "c", "new", "newest"))


def deeper(disk: Disk) -> None:
    """The same, with two more on top."""
    deep(disk)
    further = disk.add("further", SIZE, recording("a", "b", "c", "new", "newest"))
    disk.further = (disk.add("topmost", SIZE, recording("a", "b", "c", "new", "newest")), further)


SCENES: tuple[Scene, ...] = (plain, unlike, faulty, none, bare, old, two, below)


def nothing(_disk: Disk) -> None:
    """Nothing happens in between."""


def vm_runs(disk: Disk) -> None:
    """A VM runs and is shut off."""
    disk.write(3)


def vm_dies(disk: Disk) -> None:
    """A VM runs and is killed."""
    disk.crash()


def vm_dies_at_start(disk: Disk) -> None:
    """A VM dies in the moment in which it opens its image, which loses all bitmaps with their names."""
    lose_bitmaps(disk.top)


def vm_runs_after_it_died_at_start(disk: Disk) -> None:
    """The same, and then the VM runs."""
    lose_bitmaps(disk.top)
    disk.write(3)


def lose_bitmaps(path: str) -> None:
    """Take back what says that the bitmaps are in order, as QEMU does before it changes them."""
    with open(path, "rb") as file:
        version = file.read(8)[7]
    if version == 3:
        qemu.patch(path, 88, bytes(8))


def checkpoint(disk: Disk) -> None:
    """A checkpoint is made and the VM writes."""
    if qemu.read(disk.top).version == 3:
        qemu.add_bitmaps(disk.top, [LATER])
        disk.checkpoints[LATER.name] = disk.now
    disk.write(2)


def vault_goes(disk: Disk) -> None:
    """Somebody deletes the vault."""
    if disk.vault:
        os.unlink(disk.vault)


def vault_goes_and_vm_dies(disk: Disk) -> None:
    """Somebody deletes the vault, and the VM dies."""
    vault_goes(disk)
    disk.crash()


def made_anew(disk: Disk) -> None:
    """Somebody gives TOP up, and puts another overlay onto the same image, by the same name; it may get its inode."""
    below = disk.images[disk.images.index(disk.path) + 1] if disk.path != disk.base else None
    if disk.above or below is None or not os.path.exists(disk.path) or not os.path.exists(below):
        return
    os.unlink(disk.path)
    qemu.create(disk.path, len(disk.now), "-b", below, "-F", "qcow2")
    disk.write(3)


def switched(disk: Disk) -> None:
    """The VM runs on BASE, if the vault says that all work is done."""
    if disk.vault and disk.vault.endswith("-given") and not disk.above:
        disk.now = chains.content(disk.base)
        disk.write(3, path=disk.base)
        disk.images = [disk.base]


EVENTS: tuple[Event, ...] = (
    nothing,
    vm_runs,
    vm_dies,
    vm_dies_at_start,
    vm_runs_after_it_died_at_start,
    checkpoint,
    vault_goes,
    vault_goes_and_vm_dies,
    switched,
)
BY_LOSS = {"unfinished", "lost_bitmaps", "closes_gap"}
# After these, what TOP carried may be in no image any more; with the codes by which that is refused.
MAY_REFUSE: dict[Event, set[str]] = {
    vault_goes: BY_LOSS,
    vault_goes_and_vm_dies: BY_LOSS,
    vm_dies_at_start: {"unfinished"},
    vm_runs_after_it_died_at_start: {"unfinished"},
}


def wrong_with(disk: Disk, *, with_base: bool = True) -> list[str]:
    """Return what is wrong at any moment. BASE has all, too, once it is given, unless somebody wrote to TOP since."""
    wrong = [problem for path in disk.images if os.path.exists(path) for problem in [chains.damage(path)] if problem]
    tops = [disk.top]
    if disk.vault and disk.vault.endswith("-given") and disk.top == disk.path and with_base:
        tops.append(disk.base)
    for top in tops:
        if chains.content(top) != disk.now:
            wrong.append(f"{top}: the guest's data are others")
        wrong += [f"{top}: {name} lacks changes" for name in chains.lacking(top, disk.checkpoints, disk.now)]
    return wrong
