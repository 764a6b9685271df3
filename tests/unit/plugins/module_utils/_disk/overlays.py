# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of making overlays share."""

from __future__ import annotations

import hashlib
import shutil
import typing as t

from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.attributes import AttributeOptions
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.build import MakeOverlays
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.overlay import OverlayRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import Outcome, run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings, Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap

SETTINGS = Settings(check_mode=False, seconds=60, find_program=shutil.which)
BITMAPS = [
    Bitmap("fine", 65536, True, False),
    Bitmap("coarse", 1 << 21, True, False),
    Bitmap("disabled", 65536, False, False),
    Bitmap("broken", 65536, True, True),
]
CARRIED = {("fine", 65536, True, False), ("coarse", 1 << 21, True, False)}


def make_overlays(
    requests: t.Sequence[OverlayRequest], settings: Settings, vms: t.Mapping[str | None, Vm] | None = None
) -> Outcome:
    """Make overlays, owned as ACTIVE is."""
    return run(MakeOverlays(AttributeOptions()), requests, settings, vms)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def states(outcome):
    return [verdict.state for verdict in outcome.verdicts]
