# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM that comes into a run."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import subprocess
import time
import typing as t


class VM:
    """A QEMU that opens an image for writing, as a VM does, and goes on holding it if it could."""

    def __init__(self, image: pathlib.Path, image_format: str, emulator: bool) -> None:
        command = ["qemu-io", "-f", image_format, str(image)]
        if emulator:
            node = {"driver": image_format, "node-name": "d", "file": {"driver": "file", "filename": str(image)}}
            command = [f"qemu-system-{os.uname().machine}", "-machine", "none", "-nodefaults", "-display", "none"]
            command += ["-qmp", "stdio", "-blockdev", json.dumps(node)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe)
        self._word = b'{"execute": "qmp_capabilities"}\n' if emulator else b"length\n"
        self._sign = b'"return"' if emulator else b"MiB"
        self._farewell = b'{"execute": "quit"}\n' if emulator else b"quit\n"
        self.opened_at: float | None = None

    def settle(self) -> bool:
        """Return whether it has the image open, once that is decided."""
        stdin, stdout = t.cast("t.IO[bytes]", self._process.stdin), t.cast("t.IO[bytes]", self._process.stdout)
        with contextlib.suppress(BrokenPipeError):
            stdin.write(self._word)
        seen = b""
        while self._sign not in seen:
            select.select([stdout], [], [], 30)
            piece = stdout.read(4096)
            if not piece:
                return False
            seen += piece
        self.opened_at = time.time()
        return True

    def end(self) -> str:
        """Have it end by itself, which stores its bitmaps, and return what it said."""
        try:
            return self._process.communicate(self._farewell, timeout=30)[1].decode()
        finally:
            self._process.kill()
