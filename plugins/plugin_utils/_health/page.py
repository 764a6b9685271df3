# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report on the health of the fleet as the page has it: small, and as text that is safe within an element of HTML.

Names are the choice of others. What a browser would hide, or turn around, is spelt out.
"""

from __future__ import annotations

import json
import os
import re
import typing as t

from .domain import snapshots

Result = t.Mapping[str, t.Any]

# Controls, marks that turn the direction of text or have no width, and what ends a line in JavaScript.
_INVISIBLE = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff]|[\\ud800-\\udfff]"
)
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
# What a checkpoint is in an image: the characters that the drawing knows.
RECORDING = "+"
BROKEN = "!"
DISABLED = "0"
MISSING = "-"
IN_MEMORY = "?"


def visible(text: t.Any) -> str:
    """Return a text in which nothing is invisible."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text))


def page_data(report: Result, ended: str) -> str:
    """Return the report as JSON. `ended`: when the run ended, as the report has it.

    Texts are in a table, once each, and are numbers elsewhere; what has names in the report has places here, as
    health.js reads them. So 20,000 domains are some ten megabytes.
    """
    texts = _Texts()
    hosts = [
        [texts(name), texts(one["state"]), [texts(problem["msg"]) for problem in one["problems"]]]
        for name, one in report["hosts"].items()
    ]
    domains = [
        _domain(texts, number, domain)
        for number, one in enumerate(report["hosts"].values())
        for domain in one["domains"]
    ]
    data = {
        "ended": visible(ended),
        "problems": [texts(problem["msg"]) for problem in report["problems"]],
        "hosts": hosts,
        "domains": domains,
        "texts": texts.all,
    }
    compact = json.dumps(data, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: _UNSAFE[match[0]], compact)


class _Texts:
    """A table of texts, each of which is in it once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __call__(self, text: t.Any) -> int | None:
        """Return the place of a text; None if there is none."""
        return None if text is None else self._places.setdefault(visible(text), len(self._places))

    @property
    def all(self) -> list[str]:
        """The texts, by place."""
        return list(self._places)

    def path(self, path: str | None) -> list[int | None] | None:
        """Return the places of folder and name, since many images share a folder."""
        return None if path is None else [self(os.path.dirname(path)), self(os.path.basename(path))]


def _domain(texts: _Texts, host: int, domain: Result) -> list[t.Any]:
    """Return a domain."""
    return [
        host,
        texts(domain["name"]),
        texts(domain["state"]),
        texts(domain["health"]),
        texts(domain["next_backup_since"]),
        texts(domain["next_backup_reason"]),
        domain["increment_bytes"],
        domain["snapshot_bytes"],
        domain["longest_chain"],
        domain["oldest_snapshot"],
        [texts(name) for name in dict.fromkeys(one["name"] for one in snapshots(domain))],
        [[texts(one[key]) for key in ("code", "msg", "command")] for one in _told(domain)],
        [_disk(texts, disk, domain) for disk in domain["disks"]],
        [_checkpoint(texts, one) for one in domain["checkpoints"]],
        [texts(name) for name in domain["libvirt_snapshots"]],
        int(bool(domain["managed_save"])),
    ]


def _told(domain: Result) -> list[Result]:
    """Return the findings, without the one that says in short what others say of each checkpoint."""
    is_said = domain["checkpoints"] and all(one["valid"] is False for one in domain["checkpoints"])
    return [one for one in domain["findings"] if not (is_said and one["code"] == "full")]


def _checkpoint(texts: _Texts, one: Result) -> list[t.Any]:
    """Return a checkpoint."""
    valid = None if one["valid"] is None else int(one["valid"])
    return [texts(one["name"]), one["created"], valid, texts(one["problem"]), texts(one["advice"]), one["dirty_bytes"]]


def _disk(texts: _Texts, disk: Result, domain: Result) -> list[t.Any]:
    """Return a disk, with what each checkpoint is in each of its images, top to base."""
    images = [
        [
            *(texts.path(image["path"]) or ()),
            texts(image["format"]),
            image["virtual_size"],
            image["actual_size"],
            image["modified"],
            texts(image["snapshot"]),
            int(image["in_use"]),
        ]
        for image in disk["images"]
    ]
    lanes = [texts(lane_of(disk, one["bitmaps"].get(disk["target"]))) for one in domain["checkpoints"]]
    return [texts(disk["target"]), texts(disk["unfit"]), texts(disk.get("msg")), images, lanes]


def lane_of(disk: Result, bitmap: str | None) -> str | None:
    """Return what a bitmap is in each image, from the top to the lowest with it; None if the disk takes no part."""
    if bitmap is None:
        return None
    marks = "".join(_mark(image, bitmap) for image in disk["images"])
    return marks.rstrip(MISSING) or marks[:1]


def _mark(image: Result, bitmap: str) -> str:
    """Return what a bitmap is in an image."""
    if image["in_use"]:  # what is stored tells nothing
        return IN_MEMORY
    found = next((one for one in image["bitmaps"] if one["name"] == bitmap), None)
    if found is None:
        return MISSING
    return BROKEN if found["inconsistent"] else RECORDING if found["recording"] else DISABLED
