# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images that name what nobody may open: FIFOs, devices, network names and the like, as data or backing file."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import typing as t

import kinds
import lab
import leftover
import modules
import mutants
import qemu
import rounds
import runs

MODULES = ("qcow2_overlay", "qcow2_info")


class Bait(t.NamedTuple):
    """What an image names, and may make nobody open."""

    name: str  # as the image records it
    watched: pathlib.Path | None  # the file that must not be opened; None when there is none
    usable: bool  # whether it may stand where it is named
    may_be_opened: bool  # for reading: a regular file as backing file, whose size is needed


BAITS = (
    "file",
    "fifo",
    "device",
    "link-to-fifo",
    "link-to-device",
    "folder",
    "socket",
    "json",
    "nbd",
    "old-nbd",
    "host-device",
    "fat",
)
PLACES = ("data file", "backing file", "backing file as qcow2", "backing file without format", "base", "target")
_OPEN = re.compile(r'^(?:open|openat|openat2|creat)\((?:[^"]*, )?"((?:[^"\\]|\\.)*)"\.*, (.*)\) = (-?\d+)(?:<(.*?)>)?')
_READ = re.compile(r"^(?:read|pread64|readv|preadv)\(\d+<(.*?)>.* = (\d+)$")
_IN_OPEN = 0x20


def lay(ground: lab.Lab, what: str, where: str, port: int) -> Bait:
    """Have the bait, and return how it is named."""
    folder = ground.place / "bait"
    folder.mkdir()
    place, link = folder / "thing", folder / "link"
    if "fifo" in what:
        os.mkfifo(place)
    elif what in ("device", "link-to-device", "host-device"):
        os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # of which there is no end
    elif what in ("folder", "fat"):
        place.mkdir()
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    else:
        place.write_bytes(bytes(mutants.SIZE))
    link.symlink_to(place)
    named = {
        "json": f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{place}"}}}}',
        "nbd": f"nbd://127.0.0.1:{port}/x",
        "old-nbd": f"nbd:127.0.0.1:{port}:exportname=x",
        "host-device": f"host_device:{place}",
        "fat": f"fat:{place}",
        **{kind: str(link) for kind in BAITS if kind.startswith("link-")},
    }.get(what, str(place))
    usable = what == "file" and where not in ("backing file as qcow2", "target")
    return Bait(named, place, usable, what == "file" and where in PLACES[1:5])


def set_bait(ground: lab.Lab, bait: Bait, where: str) -> None:
    """Have images that name the bait there."""
    active, target = ground.disks[0].active, ground.disks[0].target
    if where == "data file":
        # The name that QEMU was given for it is replaced by hand: QEMU would open what it is given.
        subprocess.run(["truncate", "-s", str(kinds.SIZE), str(ground.place / "bait" / "real")], check=True)
        active.unlink()
        qemu.create(active, kinds.SIZE, "-o", f"data_file={ground.place}/bait/real")
        qemu.qemu_img("bitmap", "--add", str(active), "monday")
        set_extension(active, 0x44415441, bait.name.encode())
    else:
        image = {"target": target, "base": ground.actives_folder / "middle.qcow2"}.get(where, active)
        image.unlink(missing_ok=True)
        image_format = "qcow2" if where == "backing file as qcow2" else "raw"
        qemu.create(image, kinds.SIZE, "-u", "-b", bait.name, "-F", image_format)
        if where == "backing file without format":
            set_extension(image, 0xE2792ACA, None)
        if where == "base":
            active.unlink()
            qemu.create(active, kinds.SIZE, "-u", "-b", str(image), "-F", "qcow2")
    ground.promise.prepare()


def set_extension(path: pathlib.Path, wanted: int, new: bytes | None) -> None:
    """Give a header extension other data, or take it away (qcow2 spec, Header extensions)."""
    data = path.read_bytes()[:65536]
    backing_offset, backing_length = struct.unpack_from(">QI", data, 8)
    (offset,) = struct.unpack_from(">I", data, 100)
    name, area = data[backing_offset : backing_offset + backing_length] if backing_offset else b"", data[:offset]
    while (extension := struct.unpack_from(">II", data, offset))[0]:
        kind, size = extension
        own: bytes | None = data[offset + 8 : offset + 8 + size]
        offset += 8 + (size + 7) // 8 * 8
        own = new if kind == wanted else own
        if own is not None:
            area += struct.pack(">II", kind, len(own)) + own.ljust(-(-len(own) // 8) * 8, b"\0")
    area += bytes(8)
    place = len(area) if name else 0
    area = area[:8] + struct.pack(">QI", place, len(name)) + area[20:] + name
    qemu.patch(path, 0, area.ljust(4096, b"\0"))


class Watch:
    """Sees every opening of a file, by whomever; an independent witness beside strace."""

    def __init__(self, path: pathlib.Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch")

    def opened(self) -> bool:
        """Return whether it was opened, and end the watch."""
        try:
            return bool(os.read(self._fd, 4096))
        except BlockingIOError:
            return False
        finally:
            os.close(self._fd)


def traced(ground: lab.Lab, module: str, arguments: dict[str, t.Any]) -> tuple[runs.Run, list[tuple[bool, list[str]]]]:
    """Run a module under strace; return how it ended and, of each of its threads, whether it is QEMU's, and calls."""
    logs = ground.papers / "strace"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    command = [
        "strace",
        "-ff",
        "-qq",
        "-y",
        "-s",
        "4096",
        "-o",
        f"{logs}/log",
        "-e",
        "trace=%file,connect,read,pread64,readv,preadv,execve",
        sys.executable,
        "-m",
        f"ansible_collections.kvmfleet.qcow2.plugins.modules.{module}",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(kinds.COLLECTION.parents[2]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
    }
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, env=environment, start_new_session=True)
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
    try:
        stdout, stderr = process.communicate(text, timeout=runs.SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        stderr += b"hung"
    try:
        result = json.loads(stdout)
    except ValueError:
        result = None
    threads = [path.read_text(encoding="ascii", errors="replace").splitlines() for path in sorted(logs.iterdir())]
    ended = runs.Run(process.returncode, 0.0, False, True, result, stderr.decode(errors="replace"))
    return ended, [(any("execve(" in line and "/qemu-" in line for line in lines), lines) for lines in threads]


def opened_wrong(ground: lab.Lab, module: str, bait: Bait, threads: list[tuple[bool, list[str]]]) -> list[str]:
    """Return what was opened that must not be, or for writing."""
    wrong = []
    active = str(ground.disks[0].active)
    for is_qemu, lines in threads:
        who = "QEMU" if is_qemu else module
        for line in lines:
            match = _OPEN.match(line)
            if line.startswith("connect(") and "AF_INET" in line:
                wrong.append(f"{who} connects: {line}")
            if not match or "O_PATH" in line:
                continue
            asked, flags, number, real = match.groups()
            place = real if real and int(number) >= 0 else asked
            if not place.startswith(str(ground.place)) or "O_DIRECTORY" in flags:
                continue
            writes = "O_RDWR" in flags or "O_WRONLY" in flags or "O_CREAT" in flags
            is_ours = leftover.is_one(pathlib.Path(place.removesuffix(" (deleted)")).name)
            if place.startswith(f"{ground.place}/bait/") and (is_qemu or not bait.may_be_opened or writes):
                wrong.append(f"{who} opens the bait: {line}")
            elif is_qemu and place != active and not is_ours:
                wrong.append(f"QEMU opens {line}")
            elif writes and (module != "qcow2_overlay" or not is_ours):
                wrong.append(f"{who} opens for writing: {line}")
    return wrong


def read_of_bait(bait: Bait, threads: list[tuple[bool, list[str]]]) -> int:
    """Return how many bytes of the bait were read."""
    reads = filter(None, (_READ.match(line) for _is_qemu, lines in threads for line in lines))
    return sum(int(match[2]) for match in reads if match[1] == str(bait.watched))


def play_bait(ground: lab.Lab, module: str, what: str, where: str) -> rounds.Finding:
    """Run a module on images that name the bait, and see what is opened."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        bait = lay(ground, what, where, server.getsockname()[1])
        if module == "qcow2_info" and where == "target":  # there it is the topmost image, and looked at with its chain
            bait = bait._replace(usable=what == "file", may_be_opened=what == "file")
        set_bait(ground, bait, where)
        watch = Watch(t.cast("pathlib.Path", bait.watched))
        disk = ground.disks[0]
        overlay = {"path": str(disk.target), "backing_file": str(disk.active), "timeout": 15}
        top = str(disk.target if where == "target" else disk.active)
        ended, threads = traced(ground, module, overlay if module == "qcow2_overlay" else {"path": top})
        opened = watch.opened()
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            server.accept()
            ended = ended._replace(stderr=f"{ended.stderr} Traceback: somebody has connected")
    wrong = [*modules.run_wrong(ended, [ground.place]), *opened_wrong(ground, module, bait, threads)]
    if not any("execve(" in line for _is_qemu, lines in threads for line in lines):
        wrong.append("strace has seen nothing")
    if opened and not bait.may_be_opened:
        wrong.append("inotify has seen that the bait was opened")
    most = {"backing file without format": 8, "target": 4, "backing file as qcow2": 112 + 65536}.get(where, 0)
    if read_of_bait(bait, threads) > most:
        wrong.append(f"{read_of_bait(bait, threads)} bytes of the bait were read")
    if (ended.status == 0) != bait.usable:
        wrong.append(f"exit {ended.status}: {ended.message}")
    if lab.identity(disk.active) != ground.promise.before[disk.active]:
        wrong.append("ACTIVE was changed")
    return rounds.Finding("goes on" if ended.status == 0 else "refused", wrong)


def clean_bait(ground: lab.Lab, module: str, what: str, where: str) -> rounds.Finding:
    """Play a round with bait and take the bait away."""
    try:
        return play_bait(ground, module, what, where)
    finally:
        shutil.rmtree(ground.place / "bait", ignore_errors=True)


def bait_jobs(asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return the rounds with bait: all, if so asked, else some in each place."""
    everything = asked.full or asked.only
    return [
        rounds.Job(
            f"{module}: bait as {where}",
            f"bait-{module}-{where.replace(' ', '-')}-{what}",
            functools.partial(clean_bait, module=module, what=what, where=where),
        )
        for module in MODULES
        for where in PLACES
        for what in (BAITS if everything else asked.randomness(f"{module} {where}").sample(BAITS, 3))
    ]
