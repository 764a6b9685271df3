# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""The report on the health of the fleet for Prometheus, as text."""

from __future__ import annotations

import calendar
import time
import typing as t

from .._report.host import OK
from .domain import ATTENTION, FULL, UNKNOWN
from .domain import OK as WELL

Result = t.Mapping[str, t.Any]
Sample = tuple[t.Mapping[str, str], t.Union[float, None]]  # labels and value; None is left out

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})

# Metrics of a domain, which are left out where there is no value: name, what it is, how to read it from the report.
_OF_DOMAIN: t.Sequence[tuple[str, str, t.Callable[[Result], float | None]]] = (
    (
        "increment_possible",
        "Whether the next backup can be incremental. Left out for domains that are not to be backed up.",
        lambda one: {FULL: 0, UNKNOWN: 0, ATTENTION: 1, WELL: 1}.get(one["health"]),
    ),
    (
        "unknown",
        "Whether it could not be told if the next backup can be incremental.",
        lambda one: {FULL: 0, UNKNOWN: 1, ATTENTION: 0, WELL: 0}.get(one["health"]),
    ),
    ("findings", "Number of things that somebody should see to.", lambda one: len(one["findings"])),
    ("increment_bytes", "Bytes that the next increment copies.", lambda one: one["increment_bytes"]),
    (
        "checkpoint_timestamp_seconds",
        "When the checkpoint was made since which the next increment is possible.",
        lambda one: next((c["created"] for c in one["checkpoints"] if c["name"] == one["next_backup_since"]), None),
    ),
    ("longest_chain_images", "Images of the longest chain.", lambda one: one["longest_chain"]),
    ("oldest_snapshot_timestamp_seconds", "When the oldest snapshot was taken.", lambda one: one["oldest_snapshot"]),
    ("snapshot_bytes", "Bytes that its snapshots hold.", lambda one: one["snapshot_bytes"]),
)


def metrics(report: Result, ended: str) -> str:
    """Return the report in the text format. `ended`: when the run ended, as the report has it."""
    at = calendar.timegm(time.strptime(ended, "%Y-%m-%dT%H:%M:%SZ"))
    hosts = report["hosts"]
    lines = [
        *_family("run_timestamp_seconds", "When the look at the fleet ended.", [({}, at)]),
        *_family("ready", "Whether every next increment is possible.", [({}, int(report["ready"]))]),
        *_family(
            "host_up",
            "Whether the domains of the host could be told.",
            _of_hosts(hosts, lambda one: one["state"] == OK),
        ),
        *_family("host_domains", "Number of domains.", _of_hosts(hosts, lambda one: len(one["domains"]))),
    ]
    for name, words, read in _OF_DOMAIN:
        lines += _family(name, words, [(labels, read(domain)) for labels, domain in _domains(hosts)])
    return "".join(f"{line}\n" for line in lines)


def _of_hosts(hosts: t.Mapping[str, Result], read: t.Callable[[Result], float]) -> list[Sample]:
    """Return a sample for each host."""
    return [({"host": host}, int(read(one))) for host, one in hosts.items()]


def _domains(hosts: t.Mapping[str, Result]) -> t.Iterator[tuple[dict[str, str], Result]]:
    """Yield each domain with its labels. Names that are equal as texts would be one series twice: the first counts."""
    for host, one in hosts.items():
        told = dict.fromkeys(domain["name"] for domain in one["domains"])
        for domain in one["domains"]:
            if domain["name"] in told:
                del told[domain["name"]]
                yield {"host": host, "domain": domain["name"]}, domain


def _family(name: str, words: str, samples: t.Iterable[Sample]) -> t.Iterator[str]:
    """Yield the lines of a metric."""
    full = f"kvmfleet_health_{name}"
    yield f"# HELP {full} {words}"
    yield f"# TYPE {full} gauge"
    for labels, value in samples:
        if value is not None:
            inner = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
            yield f"{full}{{{inner}}} {value}" if inner else f"{full} {value}"
