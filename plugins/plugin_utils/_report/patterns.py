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
    is_all_told = all(domain["state"] not in (SKIPPED, FAILED) for domain in domains)
    return {pattern: count for pattern, count in counts.items() if count or is_all_told}


def unmatched(hosts: t.Sequence[Result], way_out: str) -> t.Iterator[Problem]:
    """Yield which patterns match nowhere. That one host of many is asked for what it lacks, is no fault.

    `way_out`: the variable that allows it.
    """
    for pattern in dict.fromkeys(pattern for host in hosts for pattern in host["patterns"]):
        found = [host["patterns"][pattern] for host in hosts if pattern in host["patterns"]]
        # All domains is what is asked for by default, also of hosts without libvirt's domains.
        if pattern != "*" and not any(found) and (len(found) > 1 or len(hosts) == 1):
            yield _nowhere(pattern, "domain", way_out)


def unmatched_checkpoints(hosts: t.Sequence[Result], way_out: str) -> t.Iterator[Problem]:
    """Yield which patterns of names of checkpoints match nowhere, if every host was asked for them and could tell."""
    told = [host["checkpoint_patterns"] for host in hosts]
    for pattern in told[0] if told else ():
        if all(one.get(pattern) == 0 for one in told):
            yield _nowhere(pattern, "checkpoint", way_out)


def _nowhere(pattern: str, what: str, way_out: str) -> Problem:
    return problem("no_match", f"{pattern}: no {what} of any host matches it. Correct it, or set {way_out}.")


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
