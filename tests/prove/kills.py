# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kill the module, with its QEMU and alone, and its QEMU alone, or ask the module to end; judge what is left.

It happens at every step and at random moments.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/kills.py. Needs QEMU and gcc.

A step is a call to the C library that concerns the images, their folders, or the dialogue of module and QEMU; it is not
made any more. After each kill ACTIVE is what it was, to the byte; every overlay is complete, as qemu-img sees it, or
absent; no process and no lock is left; and a second run makes what is missing and removes what is left over.
"""

from __future__ import annotations

import collections
import functools
import sys

import kinds
import lab
import overlays
import rounds
import runs

WHOM = {
    "group": "module and QEMU killed",
    "module": "module alone killed",
    "qemu": "QEMU alone killed",
    "asked": "module asked to end by SIGTERM",
}
# Calls that change nothing, hold nothing, and tell nobody anything: between two of the others all of them are alike.
LOOKING = {"stat", "open", "readdir", "close", "access", "fstat", "getlk", "pread", "fgetxattr", "hear", "read", "wait"}


def judge(ground: lab.Lab, run: runs.Run, whom: str) -> rounds.Finding:
    """Judge what a killed run has left, and then the second run."""
    outcome = ground.promise.outcome()
    # Of a run whose QEMU was killed, the module is to tell; of one that was over before, too.
    if run.status < 0:
        wrong = ground.promise.images_wrong()
        outcome += f", {len(ground.leftovers())} leftovers"
    else:
        wrong = ground.ended_wrong(run)
        outcome += ", told as " + ("success" if run.status == 0 else "failure")
        if whom == "qemu" and run.status != 0 and str(ground.place) not in run.message:
            wrong.append(f"the message names no file: {run.message}")
    if not run.alone:
        wrong.append("a process of the run is left")
    messages = (run.message.replace(str(ground.place), "…"),) if run.status > 0 else ()
    return rounds.Finding(outcome, wrong + ground.promise.rerun_wrong(), messages)


def at_step(ground: lab.Lab, rule: str, whom: str) -> rounds.Finding:
    """Have a run kill itself at a step."""
    run = ground.run(rule)
    finding = judge(ground, run, whom)
    return finding if run.status else finding._replace(outcome=f"the run went through, {finding.outcome}")


def at_moment(ground: lab.Lab, whom: str, share: float, longest: float) -> rounds.Finding:
    """Kill a run after this share of the time that runs take."""
    run = ground.run(kill={"whom": whom, "after": share * longest})
    finding = judge(ground, run, whom)
    return finding if run.killed and run.status else finding._replace(outcome=f"too late, {finding.outcome}")


def steps(calls: dict[str, collections.Counter[str]], who: str, full: bool) -> list[tuple[str, int]]:
    """Return the call and its number for all steps of the module or of QEMU."""
    return [
        (call, number)
        for call, count in sorted(calls[who].items())
        if full or call not in LOOKING
        for number in range(1, count + 1)
    ]


def step_jobs(ground: lab.Lab, kind: kinds.Kind, full: bool) -> list[rounds.Job[lab.Lab]]:
    """Return a round for each step of a run for such a VM."""
    ground.use(kind)
    calls = ground.calls()
    # Of three disks each step of QEMU comes three times; of the locks, which it takes on each opening, dozens of times.
    sides = [
        ("module", "group", "group"),
        ("module", "module", "self"),
        ("module", "asked", "term"),
        ("qemu", "qemu", "self"),
    ]
    return [
        rounds.Job(
            f"{kind.name}: {WHOM[whom]} at a step",
            f"{kind.name}-{who}-{call}-{number}-{action}",
            functools.partial(at_step, rule=f"{who}:{call}:{number}:{action}", whom=whom),
            kind,
        )
        for who, whom, action in sides
        for call, number in steps(calls, who, full)
        if full or who == "module" or call != "setlk"
    ]


def moment_jobs(ground: lab.Lab, kind: kinds.Kind, asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return so many rounds of each kind with a kill at a random moment."""
    ground.use(kind)
    durations = []
    for _time in range(5):
        ground.reset()
        durations.append(ground.run().seconds)
    longest = 1.1 * max(durations)
    jobs = []
    for whom in WHOM:
        for number in range(asked.rounds):
            name = f"{kind.name}-{whom}-moment-{number}"
            share = asked.randomness(name).random() * (0.4 if whom == "qemu" else 1)  # QEMU is not there from the start
            jobs.append(
                rounds.Job(
                    f"{kind.name}: {WHOM[whom]} at a random moment",
                    name,
                    functools.partial(at_moment, whom=whom, share=share, longest=longest),
                    kind,
                )
            )
    return jobs


def jobs_for(crew: rounds.Crew[lab.Lab], asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs = [
        job
        for kind in (kinds.ONE, kinds.THREE, kinds.RAW)
        for job in [*step_jobs(ground, kind, asked.full), *moment_jobs(ground, kind, asked)]
    ]
    return rounds.sampled(jobs, asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 100, jobs_for, functools.partial(lab.Lab, make_promise=overlays.Made)))
