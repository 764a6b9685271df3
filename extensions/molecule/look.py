# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""look.py FOLDER: on a host of the fleet, ask its own qemu-img and virsh what is there, and print it as JSON."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys


def ask(*command: str) -> str:
    """Return what a command says."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def image(path: pathlib.Path) -> dict[str, object]:
    """Return what qemu-img says of an image; a running VM may have it open."""
    said = json.loads(ask("qemu-img", "info", "-U", "--output=json", str(path)))
    bitmaps = said["format-specific"]["data"].get("bitmaps", [])
    return {
        "backing_file": said.get("full-backing-filename"),
        "virtual_size": said["virtual-size"],
        "bitmaps": {bitmap["name"]: [bitmap["granularity"], *sorted(bitmap["flags"])] for bitmap in bitmaps},
    }


def main() -> None:
    """Print the images of the folder, which of the first ones have changed, and the disks of the domains."""
    folder = pathlib.Path(sys.argv[1])
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=False)
    names = ask("virsh", "list", "--all", "--name").split()
    blocks = {name: ask("virsh", "domblklist", "--inactive", name).split() for name in names}
    print(
        json.dumps(
            {
                "images": {path.name: image(path) for path in sorted(folder.glob("*.qcow2"))},
                "others": sorted(path.name for path in folder.iterdir() if path.suffix not in (".qcow2", ".xml")),
                "changed": checked.stdout.splitlines(),
                "domains": {
                    name: [word.rsplit("/", 1)[1] for word in words if word.startswith(str(folder))]
                    for name, words in blocks.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
