# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a module as Ansible does, again and again, each time in a process of its own that is forked from this one.

So a run does not cost the imports, and begins where the module's own work does. For each line of JSON on standard input
that describes a run, lines come back: {"stopped": true} each time that it stops itself, which waits for any line to let
it go on, and at last how it ended. As subreaper this process sees every process that a run leaves behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import random
import resource
import runpy
import signal
import subprocess  # noqa: F401  # pylint: disable=unused-import  # imported here once, so that no run has to
import sys
import time
import typing as t

import ansible.module_utils.basic  # noqa: F401  # pylint: disable=unused-import

MODULES = "ansible_collections.kvmfleet.qcow2.plugins.modules"
_SET_CHILD_SUBREAPER = 36
_SET_PDEATHSIG = 1
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000  # Linux, unshare(2) and mount(2)
_SECONDS_TO_END = 5.0  # for what a run has left


def import_all() -> None:
    """Import all modules and what they need: without bytecode on the disk, each run would compile it again."""
    package = importlib.import_module(MODULES)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{MODULES}.{module.name}")
    gc.freeze()  # or each run would copy the pages of what it has inherited, only to look through it


def lines() -> t.Iterator[str]:
    """Return the lines of standard input without reading ahead, which would take them from the runs."""
    rest = b""
    while piece := os.read(0, 65536):
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in whole)


def say(**answer: t.Any) -> None:
    """Write an answer."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def become_run(request: dict[str, t.Any]) -> t.NoReturn:
    """Run the module in this process, which was just forked, and end."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)  # one that hangs goes with this program
    arguments = os.memfd_create("arguments")
    os.write(arguments, json.dumps({"ANSIBLE_MODULE_ARGS": request["arguments"]}).encode())
    os.lseek(arguments, 0, os.SEEK_SET)
    os.dup2(arguments, 0)
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.update(request["environment"])
    module = f"{MODULES}.{request['module']}"
    sys.argv = [module]
    random.seed()
    if request["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    if "PROVE_RUN" in os.environ:
        have_as_run(os.environ["PROVE_RUN"])
    if "LD_PRELOAD" in os.environ:
        ctypes.CDLL(None).prove_begin()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def have_as_run(folder: str) -> None:
    """Have this folder as /run, in this process and those that it starts."""
    libc = ctypes.CDLL(None)
    for done in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(os.fsencode(folder), b"/run", None, _MS_BIND, None),
    ):
        assert done == 0


def qemu_of(pid: int) -> int | None:
    """Return the number of the process that the run has started."""
    with contextlib.suppress(OSError):
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        if children:
            return int(children[0])
    return None


def kill(pid: int, whom: str, after: float) -> bool:
    """Kill the run, its module alone or its QEMU alone, or ask it to end, so long after its start or QEMU's start."""
    if whom != "qemu":
        time.sleep(after)
        (os.killpg if whom == "group" else os.kill)(pid, signal.SIGTERM if whom == "asked" else signal.SIGKILL)
        return True
    deadline = time.monotonic() + 10
    while (qemu := qemu_of(pid)) is None:
        if time.monotonic() > deadline or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(qemu)
        try:
            if qemu_of(pid) == qemu:  # not another process that has got its number
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                return True
        finally:
            os.close(descriptor)
    return False


def wait_for(pid: int, commands: t.Iterator[str]) -> dict[str, int]:
    """Return how the run ended, in the form of subprocess.Popen.returncode, and the KiB that it took at most.

    Tells of each stop on the way.
    """
    while True:
        _pid, status, usage = os.wait4(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return {"status": os.waitstatus_to_exitcode(status), "memory": usage.ru_maxrss}
        say(stopped=True)
        next(commands)
        os.kill(pid, signal.SIGCONT)


def nothing_left() -> bool:
    """Whether all other processes of the run are gone, after a moment at most."""
    deadline = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < deadline:
        try:
            pid, _status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            time.sleep(0.001)
    return False


def main() -> None:
    """Serve."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1)
    import_all()
    commands = lines()
    for line in commands:
        request = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            become_run(request)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # both do, so that it is done whoever comes first
        was_killed = kill(pid, **request["kill"]) if request["kill"] else False
        ended = wait_for(pid, commands)
        seconds = time.monotonic() - start
        say(**ended, seconds=seconds, killed=was_killed, alone=nothing_left())


if __name__ == "__main__":
    main()
