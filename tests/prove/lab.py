# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the proofs share: images, runs of the module, and the judgement of what a run has left, by QEMU's own tools."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import queue
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import typing as t

HERE = pathlib.Path(__file__).resolve().parent
COLLECTION = HERE.parents[1]
sys.path[:0] = [str(COLLECTION.parents[2]), str(COLLECTION / "tests/unit/plugins/module_utils")]

import qemu  # noqa: E402  makes the images; nothing of it judges

LEFTOVER = ".qcow2_overlay-*.tmp"
SECONDS_TO_ANSWER = 45.0
_OFD_GETLK = 36  # Linux, fcntl(2)
_FLOCK = struct.Struct("@hhqqi4x")

# Of each disk that there can be: name, granularity, recording, inconsistent.
BITMAPS = (
    (("monday", 65536, True, False), ("tuesday", 4096, True, False), ("crashed", 65536, False, True)),
    (("monday", 65536, True, False), ("sunday", 131072, False, False)),
    (("monday", 1048576, True, False), ("Mittwoch, früh", 32768, True, False)),
    (("sunday", 65536, False, False),),
    None,  # raw
)
SIZE = 64 << 20


class Kind(t.NamedTuple):
    """What a VM has: the numbers of its disks."""

    name: str
    numbers: tuple[int, ...]


ONE, THREE, TEMPLATE, RAW = Kind("one", (0,)), Kind("three", (0, 1, 2)), Kind("template", (3,)), Kind("raw", (4,))


class Disk(t.NamedTuple):
    """One disk of the VM."""

    active: pathlib.Path
    target: pathlib.Path
    bitmaps: dict[str, int]  # granularity of those that must go on recording
    size: int = SIZE  # bytes
    format: str = "qcow2"  # of ACTIVE
    number: int = 0  # of its template


class Run(t.NamedTuple):
    """How a run of the module ended."""

    status: int  # as subprocess.Popen.returncode
    seconds: float
    killed: bool  # from outside
    alone: bool  # no process of it is left
    result: dict[str, t.Any] | None  # what it printed
    stderr: str
    memory: int = 0  # KiB that the largest of its processes had at most

    @property
    def domains(self) -> list[dict[str, t.Any]]:
        """What it says of each domain, if it is about domains."""
        return list((self.result or {}).get("domains", ()))

    @property
    def states(self) -> list[str]:
        """What it says of each overlay."""
        return [overlay["state"] for overlay in self._overlays]

    @property
    def messages(self) -> list[str]:
        """Why overlays failed, each that is not only left out because of another; or else their domain, or the run."""
        of_overlays = [overlay.get("msg", "") for overlay in self._overlays]
        said = [message for message in of_overlays if message and ": not made, because" not in message]
        said = said or [domain["msg"] for domain in self.domains if "msg" in domain]
        return said if said or of_overlays or not self.message else [self.message]

    @property
    def _overlays(self) -> list[dict[str, t.Any]]:
        """What it says, domain by domain if it is about domains."""
        of_domains = [overlay for domain in self.domains for overlay in domain["overlays"]]
        return [*(self.result or {}).get("overlays", ()), *of_domains]

    @property
    def message(self) -> str:
        """Why it failed, in its words."""
        return str((self.result or {}).get("msg", ""))


class Finding(t.NamedTuple):
    """What came of a round."""

    outcome: str
    violations: list[str]
    messages: tuple[str, ...] = ()
    counts: t.Mapping[str, int] | None = None  # by outcome, of a round that stands for many


Round = t.Callable[["Lab"], Finding]


def build_library(folder: pathlib.Path) -> pathlib.Path:
    """Compile what stands between the programs and the C library."""
    library = folder / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c"), "-ldl"], check=True)
    return library


class Runner:
    """The process from which runs are forked."""

    def __init__(self, library: pathlib.Path, papers: pathlib.Path) -> None:
        self._papers = papers
        environment = {**os.environ, "PYTHONPATH": str(COLLECTION.parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.update(LD_PRELOAD=str(library), LC_ALL="C.UTF-8")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
            start_new_session=True,  # or who ends this program by a signal to its group breaks rounds under way
        )

    def start(
        self,
        arguments: dict[str, t.Any],
        environment: dict[str, str],
        kill: dict[str, t.Any] | None = None,
        module: str = "qcow2_overlay",
        memory: int | None = None,
    ) -> None:
        """Begin a run of a module, with so many bytes of memory; answer() has what becomes of it."""
        request = {"module": module, "arguments": arguments, "environment": environment, "kill": kill, "memory": memory}
        papers = {name: str(self._papers / name) for name in ("stdout", "stderr")}
        self.say(json.dumps({**request, **papers}))

    def say(self, line: str = "") -> None:
        """Give the process a line: a run, or that one goes on that has stopped."""
        t.cast("t.IO[bytes]", self._process.stdin).write(line.encode() + b"\n")

    def answer(self) -> Run | None:
        """Return how the run ended, or None when it has only stopped itself."""
        stdout = t.cast("t.IO[bytes]", self._process.stdout)
        ready = select.select([stdout], [], [], SECONDS_TO_ANSWER)[0]
        if not ready:
            raise TimeoutError(f"a run gave no sign for {SECONDS_TO_ANSWER:.0f} s")
        line = stdout.readline()
        if not line:
            raise ChildProcessError(f"the runner has ended with {self._process.wait()}")
        said = json.loads(line)
        if said.pop("stopped", False):
            return None
        text = (self._papers / "stdout").read_text(encoding="utf-8")
        stderr = (self._papers / "stderr").read_text(encoding="utf-8", errors="replace")
        return Run(**said, result=_json(text), stderr=stderr)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _json(text: str) -> dict[str, t.Any] | None:
    """Return the result of a module, None when there is none that is whole."""
    try:
        return t.cast("dict[str, t.Any]", json.loads(text))
    except ValueError:
        return None


class Templates:
    """One ACTIVE for each disk, made once and copied for each round."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.paths = []
        for number, bitmaps in enumerate(BITMAPS):
            path = folder / f"template{number}.qcow2"
            if bitmaps is None:
                path.touch()
                os.truncate(path, SIZE)
            else:
                qemu.create(path, SIZE)
                qemu.add_bitmaps(path, [qemu.Bitmap(*bitmap) for bitmap in bitmaps])
            image_format = "raw" if bitmaps is None else "qcow2"
            subprocess.run(
                ["qemu-io", "-f", image_format, "-c", "write -P 7 1M 300k", str(path)], check=True, stdout=-3
            )
            self.paths.append(path)


class Lab:
    """A folder with the disks of one VM, and a runner; what is different for another module, a subclass says."""

    module = "qcow2_overlay"

    def __init__(self, base: pathlib.Path, library: pathlib.Path, templates: Templates) -> None:
        self._templates = templates
        self.place = base / "disks"  # what stands between watches all below this
        self.actives_folder, self.folder = self.place / "a", self.place / "o"
        self.papers = base / "papers"
        self.subjects = [str(self.place)]  # with one of which a message begins
        for folder in (self.actives_folder, self.folder, self.papers):
            folder.mkdir(parents=True, exist_ok=True)
        self.library = library
        (self.papers / "second").mkdir(exist_ok=True)
        self.man()
        self.use(ONE)

    def man(self) -> None:
        """Have new runners."""
        self.runner = Runner(self.library, self.papers)
        self.second = Runner(self.library, self.papers / "second")  # for a run beside the first

    def leave(self) -> None:
        """End the runners, and with them what runs."""
        self.runner.close()
        self.second.close()

    def close(self) -> None:
        """End all that runs."""
        self.leave()

    def use(self, kind: Kind) -> None:
        """Have a VM of this kind."""
        self.disks = [
            Disk(
                self.actives_folder / f"disk{number}.img",
                self.folder / f"disk{number}.snap.qcow2",
                {name: bits for name, bits, recording, lost in BITMAPS[number] or () if recording and not lost},
                format="raw" if BITMAPS[number] is None else "qcow2",
                number=number,
            )
            for number in kind.numbers
        ]

    def reset(self) -> None:
        """Have fresh images and no overlays."""
        for folder in (self.folder, self.actives_folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        for disk in reversed(self.disks):  # so that the order of their inodes is not that of the disks
            shutil.copyfile(self._templates.paths[disk.number], disk.active)
            disk.active.chmod(0o640)
        self.before = {disk.active: identity(disk.active) for disk in self.disks}

    def arguments(self, disks: t.Sequence[Disk] | None = None, **options: t.Any) -> dict[str, t.Any]:
        """Return the options of the module."""
        overlays = [
            {"path": str(disk.target), "backing_file": str(disk.active), "backing_format": disk.format}
            for disk in disks or self.disks
        ]
        return {"overlays": overlays, "timeout": 20, **options}

    def environment(self, rule: str = "") -> dict[str, str]:
        """Return what tells faults.c which files are meant, and what is to go wrong."""
        return {"PROVE_FOLDER": f"{self.place}/", **({"PROVE_RULE": rule} if rule else {})}

    def start(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> None:
        """Begin a run of the module for all disks, with this rule of what is to go wrong; see faults.c."""
        environment = self.environment(rule)
        if log is not None:
            environment["PROVE_LOG"] = str(log)
        self.runner.start(self.arguments(), environment, kill, self.module)

    def run(self, rule: str = "", log: pathlib.Path | None = None, kill: dict[str, t.Any] | None = None) -> Run:
        """Run the module for all disks to its end."""
        self.start(rule, log, kill)
        run = self.runner.answer()
        assert run is not None
        return run

    def stops(self, call: str, number: int) -> bool:
        """Begin a run that stops itself at a step; False when it was over before. It waits for runner.say()."""
        self.start(f"module:{call}:{number}:stop")
        return self.runner.answer() is None

    def calls(self) -> dict[str, collections.Counter[str]]:
        """Return how often module and qemu make each call in a run in which nothing goes wrong."""
        log = self.papers / "log"
        log.unlink(missing_ok=True)
        self.reset()
        assert self.run(log=log).status == 0
        calls: dict[str, collections.Counter[str]] = {"module": collections.Counter(), "qemu": collections.Counter()}
        for line in log.read_text(encoding="ascii").splitlines():
            who, call = line.split()
            calls[who][call] += 1
        return calls

    def there(self) -> list[bool]:
        """Whether the overlay is there, for each disk."""
        return [os.path.lexists(disk.target) for disk in self.disks]

    def leftovers(self) -> list[str]:
        """Return the names of the temporary files."""
        return fnmatch.filter(os.listdir(self.folder), LEFTOVER)

    def outcome(self) -> str:
        """Return in a few words what a run has left."""
        there = self.there()
        return f"{sum(there)} of {len(there)} overlays there"

    def is_told(self, path: pathlib.Path, run: Run) -> bool:
        """Whether a run that has failed says that this overlay is there all the same."""
        return f"{path}: could not be removed" in run.message

    def images_wrong(self) -> list[str]:
        """Return what is wrong with the images, whatever the run was to do."""
        wrong = [f"{path.name} was changed" for path, was in self.before.items() if identity(path) != was]
        for disk in self.disks:
            if os.path.lexists(disk.target):
                wrong += incomplete(disk)
                if disk.target.stat().st_nlink > 1 and not self.leftovers():
                    wrong.append(f"{disk.target.name} has a second name")
            wrong += [
                f"{path.name} is locked" for path in (disk.active, disk.target) if path.exists() and _is_locked(path)
            ]
        expected = {disk.target.name for disk in self.disks}
        wrong += [f"there is {name}" for name in os.listdir(self.folder)
                  if name not in expected and not fnmatch.fnmatch(name, LEFTOVER)]  # fmt: skip
        return wrong

    def ended_wrong(self, run: Run) -> list[str]:
        """Return what is wrong after a run that was not killed: all or none, nothing left, and it says so."""
        wrong = self.images_wrong()
        if run.result is None or "Traceback" in run.stderr:
            return [*wrong, f"ended with {run.status} and no result: {run.stderr[-2000:]}"]
        if run.status != 0 and not run.message:
            wrong.append("failed without a message")
        if self.leftovers():
            wrong.append(f"left {self.leftovers()} behind, and says {run.message!r}")
        wrong += self.told_wrong(run)
        return wrong if run.alone else [*wrong, "left a process behind"]

    def told_wrong(self, run: Run) -> list[str]:
        """Return what is wrong with what a run says of what it has left."""
        there, said = self.there(), run.states
        states = ["created" if each else "failed" for each in there]
        if said != states or len(set(states)) != 1 or run.status != (0 if all(there) else 1):
            return [f"exit {run.status}, says {said} of what is {states}: {run.message!r}"]
        return []

    def rerun_wrong(self) -> list[str]:
        """Return what is wrong with a second run, which must make what is missing and remove what is left."""
        expected = ["present" if there else "created" for there in self.there()]
        leftovers = self.leftovers()
        run = self.run()
        wrong = [f"second run: {what}" for what in self.images_wrong()]
        if run.status != 0 or run.states != expected:
            words = f"{run.message} {run.stderr}"
            wrong.append(f"second run: exit {run.status}, {run.states} instead of {expected}: {words}")
        told = [warning for warning in (run.result or {}).get("warnings", ()) if "is left over" in str(warning)]
        if self.leftovers() or len(told) != len(leftovers):
            wrong.append(f"second run: of {leftovers} it told {len(told)} and left {self.leftovers()}")
        return wrong if all(self.there()) else [*wrong, "second run: an overlay is missing"]


def quietly(command: list[str]) -> None:
    """Run a command whose words matter only when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildProcessError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")


def identity(path: pathlib.Path) -> tuple[t.Any, ...]:
    """Return all that must not change about a file."""
    try:
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        return (exc.errno,)
    return digest, status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_locked(path: pathlib.Path) -> bool:
    """Whether anybody holds a lock on any byte of the file; the question locks nothing."""
    with open(path, "rb") as file:
        answer = fcntl.fcntl(file, _OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def incomplete(disk: Disk) -> list[str]:
    """Return in what the overlay is not what it is to be, as QEMU's own tools see it."""
    command = ["qemu-img", "info", "-f", "qcow2", "--output=json", str(disk.target)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        return [f"{disk.target.name}: {said.stderr}"]
    about = json.loads(said.stdout)
    data = about["format-specific"]["data"]
    seen = {
        "backing file": (about.get("backing-filename"), str(disk.active)),
        "backing format": (about.get("backing-filename-format"), disk.format),
        "size": (about["virtual-size"], disk.size),
        "bitmaps": ({bitmap["name"]: bitmap["granularity"] for bitmap in data.get("bitmaps", ())}, disk.bitmaps),
        "flags": (
            {flag for bitmap in data.get("bitmaps", ()) for flag in bitmap["flags"]},
            {"auto"} if disk.bitmaps else set(),
        ),
        "corrupt": (data["corrupt"], False),
        "mode": (disk.target.stat().st_mode, disk.active.stat().st_mode),
    }
    wrong = [f"{disk.target.name}: {what} is {is_!r}, not {to_be!r}" for what, (is_, to_be) in seen.items()
             if is_ != to_be]  # fmt: skip
    command = ["qemu-img", "check", "-q", str(disk.target)]
    check = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return [*wrong, *([f"{disk.target.name}: check says {check.stdout}{check.stderr}"] if check.returncode else [])]


class Job(t.NamedTuple):
    """A round to be played."""

    series: str
    name: str
    play: Round
    kind: Kind = ONE


class Book:
    """What came of all rounds."""

    def __init__(self, program: str, seed: int) -> None:
        self._program, self._seed = program, seed
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._violations: list[str] = []
        self.messages: collections.Counter[str] = collections.Counter()

    def note(self, job: Job, finding: Finding) -> None:
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


class Crew:
    """The labs in which rounds are played side by side."""

    def __init__(self, base: pathlib.Path, workers: int, make_lab: t.Callable[..., Lab]) -> None:
        library, templates = build_library(base), Templates(base)
        self.labs: list[Lab] = []
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            for number in range(workers):
                self.labs.append(make_lab(base / f"lab{number}", library, templates))
            on_failure.pop_all()
        self._free: queue.SimpleQueue[Lab] = queue.SimpleQueue()
        for lab in self.labs:
            self._free.put(lab)

    def play(self, jobs: t.Sequence[Job], book: Book) -> None:
        """Play all rounds."""
        with concurrent.futures.ThreadPoolExecutor(len(self.labs)) as pool:
            try:
                for job, finding in zip(jobs, pool.map(self._play_one, jobs)):
                    book.note(job, finding)
            except BaseException:  # told to end: what is mounted is unmounted by the rounds that are under way
                pool.shutdown(cancel_futures=True)
                raise

    def _play_one(self, job: Job) -> Finding:
        """Play one round in a lab that is free."""
        lab = self._free.get()
        try:
            lab.use(job.kind)
            lab.reset()
            return job.play(lab)
        except Exception:  # a round that cannot be judged is no proof
            lab.leave()
            lab.man()
            return Finding("could not be judged", [traceback.format_exc()])
        finally:
            self._free.put(lab)

    def close(self) -> None:
        """End all processes."""
        for lab in self.labs:
            lab.close()


class Choice(t.NamedTuple):
    """What the command line asks for."""

    rounds: int
    full: bool
    seed: int
    only: str | None
    workers: int

    def randomness(self, name: str) -> random.Random:
        """Return the random numbers of one round, the same whenever it is played with this seed."""
        return random.Random(f"{self.seed} {name}")


def sampled(jobs: list[Job], asked: Choice, whole: str = "") -> list[Job]:
    """Return at most so many rounds of each series, unless all are asked for, but that one as a whole."""
    series: dict[str, list[Job]] = {}
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
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="rounds side by side")
    return Choice(**vars(parser.parse_args()))


def prove(
    about: str, rounds: int, jobs_for: t.Callable[[Crew, Choice], list[Job]], make_lab: t.Callable[..., Lab] = Lab
) -> int:
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
        crew.play(chosen, book)
        return book.close(start)
