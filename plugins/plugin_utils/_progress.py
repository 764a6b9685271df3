# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What people are told of merges that go on, from the files of the modules; docs/design.md has their fields."""

from __future__ import annotations

import json
import os
import typing as t

from ansible.module_utils.common.text.formatters import bytes_to_human

PROGRESS = "/run/kvmfleet-qcow2"  # the folder of _disk/progress.py


def merges(lines: t.Sequence[str]) -> t.Iterator[dict[str, t.Any]]:
    """Yield what the files of PROGRESS say; a file that is not whole is left out."""
    for line in lines:
        try:
            about = json.loads(line)
        except ValueError:
            continue
        if isinstance(about, dict) and isinstance(about.get("total_bytes"), int):
            yield about


def line_of(merge: t.Mapping[str, t.Any]) -> str:
    """Return what people are told of a merge that goes on."""
    done, total, rate = merge["bytes"], merge["total_bytes"], merge["bytes_per_second"]
    left = f", {_duration((total - done) / rate)} left" if rate else ""
    amount = f"{bytes_to_human(done)} of {bytes_to_human(total)}"
    return f"{os.path.basename(merge['path'])}: {merge['percent']} %, {amount}, {bytes_to_human(rate)}/s{left}"


def _duration(seconds: float) -> str:
    """Return so many seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
