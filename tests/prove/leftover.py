# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Temporary files, by whose names a run finds what a killed one has left."""

from __future__ import annotations

import re

PREFIXES, SUFFIX = (".kvmfleet-", ".qcow2_overlay-"), ".tmp"
EXAMPLE = f"{PREFIXES[0]}0123456789abcdef{SUFFIX}"
_RANDOM = re.compile(f"({'|'.join(map(re.escape, PREFIXES))})[0-9a-f]{{16}}")


def is_one(name: str) -> bool:
    """Whether a file of this name may be removed by a run that finds it."""
    return name.startswith(PREFIXES) and name.endswith(SUFFIX)


def shown(text: str) -> str:
    """Return a text without what is random in the names."""
    return _RANDOM.sub(r"\1X", text)
