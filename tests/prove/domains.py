# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Kill domain_overlay at every step, and let what is around it fail; judge images and definitions by libvirt's words.

Run as root, with the Python of an environment that has ansible-core and libvirt-python: python tests/prove/domains.py.
Needs QEMU, libvirt and gcc. Each lab has a libvirt daemon of its own.

After each round a domain is either on all of its overlays, and they are complete, or its definition is the old one;
never on one that is not there. A run that was not killed says just that, and leaves no overlay of a domain that it has
not switched, unless it says so. A second run completes everything, and a third one changes nothing.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import sys
import time
import typing as t
import xml.etree.ElementTree as ET

import estate
import faults
import kills
import kinds
import lab
import rounds
import runs
import switch

Play = t.Callable[..., rounds.Finding]  # in an estate, with what is given by name
FILLER = "filler"
# Questions to libvirt, for each domain: lookup, active, managed save, definition, define, definition, active.
TO_SWITCH = 7
AFTER_DEFINING = 4  # the last two of them, the list of storage pools, and the end of the connection
TITLE = "<title>changed by somebody else</title>"


def daemon_dies(ground: estate.Estate, number: int) -> rounds.Finding:
    """Kill libvirt's daemon while the module is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    ground.daemon.kill()
    run = ground.runner.resume()
    ground.daemon.start()
    return faults.judge(ground, run)


def daemon_is_full(ground: estate.Estate, pages: int) -> rounds.Finding:
    """Have libvirt's daemon no more room than this for the definition."""
    filler = ground.daemon.etc / FILLER
    space = os.statvfs(ground.daemon.etc)
    try:
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - pages * faults.PAGE)
        run = ground.run()
    finally:
        filler.unlink()
    return faults.judge(ground, run)


def started_at_step(ground: estate.Estate, number: int) -> rounds.Finding:
    """Start a domain while the module is at a step."""
    if not ground.stops("*", number):
        return rounds.Finding("the run was over", [])
    name = sorted(ground.numbers)[-1]
    said = ground.daemon.start_domain(name)
    return judge_started(ground, name, said, ground.runner.resume())


def being_started_at_question(ground: estate.Estate, number: int, questions: int) -> rounds.Finding:
    """Let a domain begin to start when the module is about to ask libvirt, before QEMU has opened the images."""
    if not ground.stops("ask", number):
        return rounds.Finding("the run was over", [])
    name = sorted(ground.numbers)[-1]
    with concurrent.futures.ThreadPoolExecutor(1) as starter:
        start = starter.submit(ground.daemon.start_domain, name)
        while not start.done() and not ground.domain(name).isActive():
            time.sleep(0.001)
        ground.runner.say()
        return judge_started(ground, name, start.result(), ground.runner.ended())


def started_at_moment(ground: estate.Estate, pause: float) -> rounds.Finding:
    """Start a domain at a random moment of a run."""
    ground.start()
    time.sleep(pause)
    name = sorted(ground.numbers)[-1]
    said = ground.daemon.start_domain(name)
    return judge_started(ground, name, said, ground.runner.ended())


def judge_started(ground: estate.Estate, name: str, said: str, run: runs.Run) -> rounds.Finding:
    """Judge a run in which a domain was started, or could not be for what was said."""
    state = run.domain(name).get("state", "failed")
    outcome = f"does not start, {state}" if said else f"starts, {state}"
    if said:
        wrong = [] if "lock" in said else [f"{name} does not start: {said}"]
        for path, was in ground.promise.before.items():
            *now, _changed = lab.identity(path)
            if now == [*was[:-1]]:  # libvirt gives an image to QEMU's user before it starts QEMU, were it for nothing
                ground.promise.before[path] = lab.identity(path)
        wrong += ground.ended_wrong(run)
        return rounds.Finding(outcome, wrong + faults.message_wrong(ground, run), faults.told(ground, run))
    # On which images it runs, the daemon knows; it has them open, so there is nothing to be compared in them any more.
    runs_on = set(sources(ground.domain(name).XMLDesc(0)))
    ground.domain(name).destroy()
    overlays = {str(disk.target) for disk in ground.disks_of(name)}
    wrong = []
    if ground.switched(name) is not (state in ("created", "present")):
        wrong.append(f"{name} is {state}, and its definition does not fit that")
    if runs_on != (overlays if state == "created" else {str(disk.active) for disk in ground.disks_of(name)}):
        wrong.append(f"{name} is {state}, and was started on {sorted(runs_on)}")
    if state == "failed" and any(map(os.path.lexists, overlays)):
        wrong.append(f"{name} runs, and there are overlays of it: {run.message}")
    if ground.leftovers() or run.result is None or not run.alone:
        wrong.append(f"left {ground.leftovers()}: {run.message} {run.stderr[-2000:]}")
    return rounds.Finding(outcome, wrong + faults.message_wrong(ground, run), faults.told(ground, run))


def sources(definition: str) -> list[str]:
    """Return the images of the disks of a definition."""
    disks = ET.fromstring(definition).iterfind("devices/disk/source")
    return [source.attrib["file"] for source in disks]


def edited_at_question(ground: estate.Estate, number: int, questions: int) -> rounds.Finding:
    """Edit the definition, as by virsh edit, when the module is about to ask libvirt something."""
    if not ground.stops("ask", number):
        return rounds.Finding("the run was over", [])
    name = sorted(ground.numbers)[-1]
    was_switched = ground.switched(name)
    edited = estate.definition_of(ground.domain(name)).replace("</name>", f"</name>{TITLE}", 1)
    ground.daemon.connection.defineXML(edited)
    run = ground.runner.resume()
    now = estate.definition_of(ground.domain(name))
    is_edited = TITLE in now
    if is_edited:  # take it back, so that the rest is judged as ever
        ground.daemon.connection.defineXML(now.replace(TITLE, ""))
    outcome = "when it was switched already" if was_switched else "before" if is_edited else "too late to be seen"
    wrong = ground.promise.images_wrong()
    # Only when the very next word to libvirt is the new definition, nothing can be done: libvirt does not compare.
    later = len(ground.numbers) - 1 - list(ground.numbers).index(name)
    if not is_edited and number != questions - AFTER_DEFINING - later * TO_SWITCH:
        wrong.append(f"{name}: the edit before question {number} of {questions} is lost")
    if run.status == 0 or was_switched:
        wrong += [] if all(ground.promise.done()) else [f"says {run.states}, which are {ground.promise.done()}"]
    else:
        wrong += ground.ended_wrong(run)
    return rounds.Finding(
        f"{outcome}, told as {'success' if run.status == 0 else 'failure'}",
        wrong + faults.message_wrong(ground, run) + ground.promise.rerun_wrong(),
        faults.told(ground, run),
    )


def second_run(ground: estate.Estate, number: int | None, pause: float) -> rounds.Finding:
    """Let two runs want the same snapshot of the same domains, the second at a step of the first or after a pause."""
    ground.start(f"module:*:{number}:stop" if number else "")
    first = ground.runner.answer() if number else None
    time.sleep(pause)
    arguments = ground.promise.arguments(timeout=1 if number else 20)
    ground.second.start(ground.promise.module, arguments, ground.environment())
    second = ground.second.ended()
    if first is None:
        first = ground.runner.resume() if number else ground.runner.ended()
    wrong = ground.promise.images_wrong()
    words = []
    for name in ground.numbers:
        states = [domain["state"] for run in (first, second) for domain in run.domains if domain["name"] == name]
        words.append(" and ".join(states))
        if states.count("created") != 1 or not ground.switched(name):
            wrong.append(f"{name}: {states}, switched: {ground.switched(name)}: {first.message} / {second.message}")
    if ground.leftovers() or not (first.result and second.result and first.alone and second.alone):
        wrong.append(f"left {ground.leftovers()}: {first.stderr[-1000:]} {second.stderr[-1000:]}")
    for run in (first, second):
        wrong += faults.message_wrong(ground, run)
    messages = faults.told(ground, first) + faults.told(ground, second)
    return rounds.Finding("; ".join(words), wrong + ground.promise.rerun_wrong(), messages)


AT_STEPS: dict[str, tuple[str, Play]] = {
    "libvirt's daemon dies at a step": ("daemon", daemon_dies),
    "domain is started at a step": ("start", started_at_step),
    "second run at a step": ("second", functools.partial(second_run, pause=0)),
}
AT_QUESTIONS: dict[str, tuple[str, Play]] = {
    "domain begins to start at a question to libvirt": ("starting", being_started_at_question),
    "definition is edited at a question to libvirt": ("edit", edited_at_question),
}


def around(ground: estate.Estate, kind: kinds.Kind, asked: rounds.Choice) -> list[rounds.Job[estate.Estate]]:
    """Return the rounds in which something happens around a run."""
    ground.use(kind)
    calls = ground.calls()["module"]
    steps, questions = sum(calls.values()), calls["ask"]
    jobs = [
        rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{word}-step-{n}", functools.partial(play, number=n), kind)
        for series, (word, play) in AT_STEPS.items()
        for n in range(1, steps + 1)
    ]
    for series, (word, play) in AT_QUESTIONS.items():
        for n in range(1, questions + 1):
            round_ = functools.partial(play, number=n, questions=questions)
            jobs.append(rounds.Job(f"{kind.name}: {series}", f"{kind.name}-{word}-question-{n}", round_, kind))
    for pages in range(4):
        play = functools.partial(daemon_is_full, pages=pages)
        jobs.append(rounds.Job(f"{kind.name}: libvirt's disk is full", f"{kind.name}-daemon-full-{pages}", play, kind))
    for n in range(asked.rounds):
        for series, word, play in (
            ("domain is started at a random moment", "start", started_at_moment),
            ("second run at a random moment", "second", functools.partial(second_run, number=None)),
        ):
            name = f"{kind.name}-{word}-moment-{n}"
            pause = asked.randomness(name).random() * 0.3
            jobs.append(rounds.Job(f"{kind.name}: {series}", name, functools.partial(play, pause=pause), kind))
    return jobs


def jobs_for(crew: rounds.Crew[estate.Estate], asked: rounds.Choice) -> list[rounds.Job[estate.Estate]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs: list[rounds.Job[estate.Estate]] = []
    for kind in estate.DOMAINS:
        jobs += kills.step_jobs(ground, kind, asked.full)
        jobs += kills.moment_jobs(ground, kind, asked)
        jobs += faults.injected(ground, kind)
        jobs += around(ground, kind, asked)
    return rounds.sampled(jobs, asked)


if __name__ == "__main__":
    sys.exit(rounds.prove(str(__doc__), 10, jobs_for, functools.partial(estate.Estate, make_promise=switch.Switched)))
