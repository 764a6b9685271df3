# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The rounds of a program: which are asked for, who plays them, and what came of them."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import os
import pathlib
import queue
import random
import signal
import sys
import tempfile
import time
import traceback
import typing as t

import kinds
import lab
import runs

L = t.TypeVar("L", bound=lab.Lab)
L_contra = t.TypeVar("L_contra", bound=lab.Lab, contravariant=True)
MakeLab = t.Callable[[pathlib.Path, pathlib.Path, kinds.Templates], L]


class Finding(t.NamedTuple):
    """What came of a round."""

    outcome: str
    violations: list[str]
    messages: tuple[str, ...] = ()
    counts: t.Mapping[str, int] | None = None  # by outcome, of a round that stands for many


@dataclasses.dataclass(frozen=True)
class Job(t.Generic[L_contra]):
    """A round to be played, in any lab that has what it needs."""

    series: str
    name: str
    play: t.Callable[[L_contra], Finding]
    kind: kinds.Kind = kinds.ONE


def of_all_kinds(job: Job[L]) -> Job[L]:
    """Return a round as one of its series for all kinds of disks together, and for all errors."""
    series = job.series.split(": ", 1)[1]
    series = f"an error in {series.split(' in ', 1)[1]}" if "'s calls" in series else series
    return dataclasses.replace(job, series=series)


class Book:
    """What came of all rounds."""

    def __init__(self, program: str, seed: int) -> None:
        self._program, self._seed = program, seed
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._violations: list[str] = []
        self.messages: collections.Counter[str] = collections.Counter()

    def note(self, job: Job[L], finding: Finding) -> None:
        """Note what came of a round, and tell at once of what must not be."""
        for outcome, count in (finding.counts or {finding.outcome: 1}).items():
            self._counts[job.series, outcome] += count
        self.messages.update(finding.messages)
        for violation in finding.violations:
            self._violations.append(f"VIOLATION in '{job.name}' (--seed {self._seed} --only '{job.name}'): {violation}")
            print(self._violations[-1], flush=True)

    def close(self, start: float) -> int:
        """Print the table; return the exit code."""
        for message, count in sorted(self.messages.items()):
            print(f"message, {count} times: {message}")
        width = max((len(series) for series, _outcome in self._counts), default=0)
        for (series, outcome), count in sorted(self._counts.items()):
            print(f"{series:<{width}}  {count:>6}  {outcome}")
        print(
            f"{self._program}: {sum(self._counts.values())} rounds in {time.monotonic() - start:.0f} s, "
            f"{len(self._violations)} violations, seed {self._seed}"
        )
        return 1 if self._violations or not self._counts else 0


class Crew(t.Generic[L]):
    """The labs in which rounds are played side by side."""

    def __init__(self, base: pathlib.Path, workers: int, make_lab: MakeLab[L]) -> None:
        library, templates = runs.build_library(base), kinds.Templates(base)
        self.labs: list[L] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            for number in range(workers):
                self.labs.append(make_lab(base / f"lab{number}", library, templates))
            on_failure.pop_all()
        self._free: queue.SimpleQueue[L] = queue.SimpleQueue()
        for ground in self.labs:
            self._free.put(ground)

    def play(self, jobs: t.Sequence[Job[L]], book: Book) -> None:
        """Play all rounds."""
        with concurrent.futures.ThreadPoolExecutor(len(self.labs)) as pool:
            try:
                for job, finding in zip(jobs, pool.map(self._play_one, jobs)):
                    book.note(job, finding)
            except BaseException:  # told to end: what is mounted is unmounted by the rounds that are under way
                pool.shutdown(cancel_futures=True)
                raise

    def _play_one(self, job: Job[L]) -> Finding:
        """Play one round in a lab that is free."""
        ground = self._free.get()
        try:
            ground.use(job.kind)
            ground.reset()
            return job.play(ground)
        except Exception:  # a round that cannot be judged is no proof
            ground.leave()
            ground.man()
            return Finding("could not be judged", [traceback.format_exc()])
        finally:
            self._free.put(ground)

    def close(self) -> None:
        """End all processes."""
        for ground in self.labs:
            ground.close()


class Choice(t.NamedTuple):
    """What the command line asks for."""

    rounds: int
    full: bool
    seed: int
    only: str | None
    workers: int
    at_most: int | None

    def randomness(self, name: str) -> random.Random:
        """Return the random numbers of one round, the same whenever it is played with this seed."""
        return random.Random(f"{self.seed} {name}")


def sampled(jobs: list[Job[L]], asked: Choice, whole: str = "") -> list[Job[L]]:
    """Return at most so many rounds of each series, unless all are asked for, but that one as a whole."""
    series: dict[str, list[Job[L]]] = {}
    for job in jobs:
        series.setdefault(job.series, []).append(job)
    if asked.full or asked.only:
        return jobs
    return [
        job
        for name, some in series.items()
        for job in asked.randomness(name).sample(some, len(some) if name == whole else min(len(some), asked.rounds))
    ]


def choice(about: str, rounds: int) -> Choice:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds, help="of each series")
    parser.add_argument("--full", action="store_true", help="every step, not only those that change or hold something")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--only", help="play only the rounds of this name; * stands for anything")
    parser.add_argument(
        "--at-most", type=int, metavar="N", help="of all rounds, picked at random (storage.py: of each series)"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="rounds side by side")
    return Choice(**vars(parser.parse_args()))


def prove(about: str, rounds: int, jobs_for: t.Callable[[Crew[L], Choice], list[Job[L]]], make_lab: MakeLab[L]) -> int:
    """Play what the command line asks for and return the exit code."""
    asked, start = choice(about, rounds), time.monotonic()
    if os.geteuid() != 0:
        sys.exit("Run this as root: it mounts file systems and gives files away.")
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(1))
    book = Book(pathlib.Path(sys.argv[0]).name, asked.seed)
    with tempfile.TemporaryDirectory(prefix="prove-") as folder, contextlib.ExitStack() as stack:
        crew = Crew(pathlib.Path(folder), asked.workers, make_lab)
        stack.callback(crew.close)
        jobs = jobs_for(crew, asked)
        chosen = [job for job in jobs if asked.only is None or fnmatch.fnmatch(job.name, asked.only)]
        # Side by side work best when long and short rounds are mixed.
        random.Random(asked.seed).shuffle(chosen)
        try:
            crew.play(chosen[: asked.at_most], book)
        finally:  # also of hours of rounds that are told to end
            status = book.close(start)
        return status
