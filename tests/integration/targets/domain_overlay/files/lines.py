# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""See that no line that a person reads at the end is taken for a template: names are the choice of others.

Run with the Python of the controller, and the folder of the collections in PYTHONPATH.
"""

from __future__ import annotations

import sys

from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from ansible_collections.kvmfleet.qcow2.plugins.filter.fleet_healed import make_fleet_healed
from ansible_collections.kvmfleet.qcow2.plugins.filter.fleet_health import make_fleet_health
from ansible_collections.kvmfleet.qcow2.plugins.filter.fleet_report import make_fleet_report
from ansible_collections.kvmfleet.qcow2.plugins.filter.host_healed import make_host_healed
from ansible_collections.kvmfleet.qcow2.plugins.filter.host_health import make_host_health
from ansible_collections.kvmfleet.qcow2.plugins.plugin_utils._report.host import Steps, host_report

try:
    from ansible.template import trust_as_template
except ImportError:  # before 2.19 all is a template
    trust_as_template = str

TRAP = "x{{ 7 * 7 }}"
FLEETS = {
    "health": make_fleet_health(["hv"], {"hv": {"health_result": make_host_health({"problem": TRAP}, "hv")}}, {}),
    "heal": make_fleet_healed(["hv"], {"hv": {"heal_result": make_host_healed({"problem": TRAP})}}, {}),
    "overlay": make_fleet_report(["hv"], {"hv": {"overlay_result": host_report(Steps(problem=TRAP), False)}}, False),
}

for name, made in FLEETS.items():
    fleet = made
    for _time in range(2):  # each use of a fact is another chance
        lines = Templar(DataLoader(), variables={"fleet": fleet}).template(trust_as_template("{{ fleet.summary }}"))
        if not any(TRAP in line for line in lines):
            sys.exit(f"{name}: {lines}")
        fleet = {"summary": lines}
print(f"{len(FLEETS)} are as they were")
