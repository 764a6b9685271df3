# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""What the patterns of names match that hosts were asked for."""

from __future__ import annotations

import fnmatch
import typing as t

from ...module_utils._disk.verdict import FAILED, SKIPPED
from .rows import Problem, Result, problem


def matches(patterns: t.Sequence[str], results: t.Iterable[Result | None]) -> dict[str, int]:
    """Return how many domains each pattern matches; nothing if the domains were never told."""
    told = next((one["domains"] for one in results if one and "domains" in one), None)
    if told is None:
        return {}
    names = [domain["name"] for domain in told]
    return {one: sum(_fits(name, one) for name in names) for one in patterns}


def checkpoint_matches(patterns: t.Sequence[str], domains: t.Sequence[Result]) -> dict[str, int]:
    """Return on how many domains each pattern of names of checkpoints matches one.

    Of domains that were left out no checkpoint is told, so there a pattern that matches nothing is left out, too.
    """
    names = [[checkpoint["name"] for checkpoint in domain["checkpoints"]] for domain in domains]
    counts = {one: sum(any(_fits(name, one) for name in of_one) for of_one in names) for one in patterns}
    return {pattern: count for pattern, count in counts.items() if count or _are_told(domains)}


def unmatched(hosts: t.Sequence[Result], way_out: str) -> t.Iterator[Problem]:
    """Yield which patterns match on none of the hosts that were asked for them. One of these may lack it.

    `way_out`: the variable that allows it.
    """
    for pattern in _in_vain(hosts, "patterns", []):
        if pattern != "*":  # what is asked for by default, also of hosts without libvirt's domains
            yield _nowhere(pattern, "domain", way_out)


def unmatched_checkpoints(hosts: t.Sequence[Result], way_out: str) -> t.Iterator[Problem]:
    """Yield which patterns of names of checkpoints match on none of the hosts that were asked for them."""
    silent = [host for host in hosts if not _are_told(host["domains"])]
    for pattern in _in_vain(hosts, "checkpoint_patterns", silent):
        yield _nowhere(pattern, "checkpoint", way_out)


def _in_vain(hosts: t.Sequence[Result], key: str, silent: t.Container[Result]) -> t.Iterator[str]:
    """Yield the patterns that match on no host; `silent`: hosts that have not told all."""
    for pattern in dict.fromkeys(pattern for host in hosts for pattern in host[key]):
        without = [host for host in hosts if pattern not in host[key]]
        # A host that could not tell may have been asked for it, and have it.
        may_be_there = any(host["problems"] or host in silent for host in without)
        if not may_be_there and not any(host[key].get(pattern) for host in hosts):
            yield pattern


def _nowhere(pattern: str, what: str, way_out: str) -> Problem:
    where = f"no {what} of any host that was asked for it matches it"
    return problem("no_match", f"{pattern}: {where}. Correct it, or set {way_out}.")


def _are_told(domains: t.Sequence[Result]) -> bool:
    """Whether of each of these domains its checkpoints are told."""
    return all(domain["state"] not in (SKIPPED, FAILED) for domain in domains)


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
