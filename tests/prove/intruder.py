# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Another user, who may write to the folder of the overlays and swaps what is there as fast as it goes; for hostile.py.

Started as intruder.py WHAT UID PLACE BAIT: says "ready", goes on until standard input ends, then says how often it did
what it can. PLACE is the name that it swaps, or for temporary files the folder in which they are. BAIT is a folder that
this user may not write to, with the file "bait" in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import select
import sys
import typing as t

import leftover

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

Trick = t.Callable[[], bool]


def exchange(one: str, other: str) -> bool:
    """Swap two names at once; whether that could be done."""
    names = (os.fsencode(one), os.fsencode(other))
    return bool(ctypes.CDLL(None).renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def lures(place: str, bait: pathlib.Path) -> list[Trick]:
    """Return the ways in which something else can be put where a file is to be."""

    def attempt(make: t.Callable[[], None]) -> bool:
        try:
            make()
        except OSError:
            return False
        return True

    return [
        lambda: attempt(lambda: os.symlink(bait / "bait", place)),
        lambda: attempt(lambda: os.symlink(bait / "new", place)),  # what is created through it lies outside
        lambda: attempt(lambda: os.link(bait / "bait", place)),
        lambda: attempt(lambda: os.mkfifo(place)),
        lambda: attempt(lambda: os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL))),
    ]


def swap_target(place: str, bait: pathlib.Path) -> t.Iterator[bool]:
    """Put one thing after the other at the target, and take it away again."""
    while True:
        for lure in lures(place, bait):
            made = lure()
            if made:  # so it is this user's, and stays until here whatever the module does
                os.unlink(place)
            yield made


def swap_temporary(place: str, bait: pathlib.Path) -> t.Iterator[bool]:
    """Put one thing after the other in the place of each temporary file that turns up."""
    number = 0
    while True:
        done = False
        for name in os.listdir(place):
            if leftover.is_one(name):
                path = os.path.join(place, name)
                with contextlib.suppress(OSError):
                    if not os.path.islink(path):
                        number += 1
                        os.rename(path, os.path.join(place, f"stolen-{number}"))
                        done = lures(path, bait)[number % 5]()
        yield done


def swap_with_link(place: str, bait: pathlib.Path) -> t.Iterator[bool]:
    """Swap what is there with a symlink to the bait."""
    link = place + ".link"
    os.symlink(bait, link)
    while True:
        yield exchange(place, link)


TRICKS = {"target": swap_target, "temporary": swap_temporary, "link": swap_with_link}


def main() -> None:
    """Do it until told to end."""
    what, uid, place, bait = sys.argv[1:]
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    steps = TRICKS[what](place, pathlib.Path(bait))
    print("ready", flush=True)
    done = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        done += sum(next(steps) for _each in range(20))
    print(done, flush=True)


if __name__ == "__main__":
    main()
