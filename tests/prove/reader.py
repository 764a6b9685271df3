# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read mutants in this process, hundreds a second, with little time and memory for each; hostile.py starts this.

Reading ends in what the image says, or in a message that names the file, and in nothing else.
"""

from __future__ import annotations

import collections
import json
import pathlib
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import typing as t

import lab  # noqa: F401  # pylint: disable=unused-import  # finds the collection
import mutants
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.cumulative import uniting_cost
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.examine import MAX_COUNTED_BITS, examine_chain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.dirty import counting_cost, dirty_bytes, united
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.extents import AllocationMap, has_allocated_extents
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.image import read_image

SECONDS = 5.0  # for one mutant
MOST_UNITED = 64 << 20  # bytes of bits; where there are more, time is given by the megabyte
MEMORY = 256 << 20  # bytes more than this process has before the first


def read(path: pathlib.Path) -> str:
    """Read all that there is to be read; return the outcome."""
    with open_image(str(path)) as file:
        try:
            image = read_image(file)
            has_allocated_extents(file)
            count_allocated(file, image.virtual_size)
        except Refusal as exc:
            if str(path) not in str(exc):
                raise AssertionError(f"the message names no file: {exc}") from exc
            image = None
    disk = examine_chain(str(path), follow=True, count=True)
    json.dumps(disk.as_result()).encode()
    if disk.problem and str(path) not in str(disk.problem):
        raise AssertionError(f"the message names no file: {disk.problem}")
    if image is None or disk.problem:
        return "refused" if image is None else "refused because of what lies behind the header"
    return "read, with bitmaps" if image.bitmaps else "read, without bitmaps"


def count_allocated(file: OpenImage, virtual_size: int) -> None:
    """Read all L2 tables, as healing does, where it would; an overlay takes in what its image holds."""
    held = AllocationMap(file)
    if counting_cost([held]) <= MAX_COUNTED_BITS:
        dirty_bytes([held], virtual_size)
    if uniting_cost(held, held.granularity) <= MOST_UNITED:
        collections.deque(united([held], held.granularity, virtual_size), maxlen=0)


def attempt(path: pathlib.Path) -> tuple[str, str | None]:
    """Return the outcome for a mutant, and what is wrong with it."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return read(path), None
    except Exception:  # everything but what is read or refused is a finding
        return "neither read nor refused", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def too_slow(*_args: t.Any) -> t.NoReturn:
    """End the reading of a mutant."""
    raise TimeoutError(f"took longer than {SECONDS} s")


def main() -> None:
    """Read so many mutants from a number on; print the counts by outcome and the violations."""
    corpus_file, word, first, count = sys.argv[1:]
    with open(corpus_file, "rb") as file:
        corpus = pickle.load(file)  # our own, of a moment ago
    signal.signal(signal.SIGALRM, too_slow)
    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: collections.Counter[str] = collections.Counter()
    violations = []
    with tempfile.TemporaryDirectory(prefix="reader-", dir=pathlib.Path(corpus_file).parent) as folder:
        for number in range(int(first), int(first) + int(count)):
            randomness = random.Random(f"{word} {number}")
            seed = randomness.choice(corpus)
            path = pathlib.Path(folder) / "mutant"
            shutil.copyfile(seed.path, path)
            mutation = mutants.mutation(seed, corpus, randomness)
            mutation.apply(path)
            outcome, wrong = attempt(path)
            counts[outcome] += 1
            if wrong:
                violations.append(f"reader of mutant {number} of {seed.name}, {mutation}: {wrong}")
    print(json.dumps({"counts": counts, "violations": violations}))


if __name__ == "__main__":
    main()
