# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fleets to make the page from: what domain_info returns of domains of every kind, as the filters take it.

fleet.py HOSTS VMS FILE: write the report on so many hosts with so many VMs each. fleet.py kinds FILE: on a small fleet.
fleet.py names FILE: on one with names that are made to be taken for something else than text.
"""

from __future__ import annotations

import pathlib
import sys
import time
import uuid

from ansible_collections.kvmfleet.qcow2.plugins.filter.fleet_health import make_fleet_health
from ansible_collections.kvmfleet.qcow2.plugins.filter.host_health import make_host_health

NOW = int(time.time())
DAY = 24 * 60 * 60
GIB = 1024**3
MARK = "page-was-taken-over"
HOSTILE = (
    f"<script>document.title='{MARK}'</script>",
    f"</script><script>document.title='{MARK}'</script>",
    f"<img src=x onerror=document.title='{MARK}'>",
    "\"'><b>bold</b>",
    "right\u202eto\u2066left",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;amp&amp;",
    "a\u0000b\nc\u2028d",
    "-rf $(touch x) `touch x`",
    "ünïcödé-日本語",
    "]]><!--",
    "x" * 200,
)


def bitmap(name, *, inconsistent=False, recording=True):
    """Return a bitmap of an image."""
    return {"name": name, "recording": recording, "inconsistent": inconsistent}


def image(path, snapshot=None, bitmaps=(), *, days=1.0, held=3 * GIB, in_use=False):
    """Return an image that was written to last so many days ago."""
    return {
        "path": path,
        "format": "qcow2",
        "virtual_size": 40 * GIB,
        "actual_size": held,
        "in_use": in_use,
        "corrupt": False,
        "modified": int(NOW - days * DAY),
        "made": None,
        "snapshot": snapshot,
        "bitmaps": list(bitmaps),
    }


def checkpoint(name, days, valid=True, problem=None, where=None, advice=None, targets=("vda",)):
    """Return a checkpoint that was made so many days ago."""
    return {
        "name": name,
        "created": int(NOW - days * DAY),
        "parent": None,
        "valid": valid,
        "problem": problem,
        "image": where,
        "advice": advice,
        "dirty_bytes": 200 * 1024**2 if valid else None,
        "top_alone": True if valid else None,
        "bitmaps": dict.fromkeys(targets, name),
    }


def domain(name, disks, checkpoints, since=None, reason=None, *, state="shut off", **more):
    """Return a domain as domain_info does. `since`: the checkpoint of the next increment; None if there is none."""
    told = f"An increment since the checkpoint {since!r} is possible." if since else "No increment is possible."
    return {
        "name": name,
        "uuid": str(uuid.uuid4()),
        "state": state,
        "managed_save": False,
        "libvirt_snapshots": [],
        "disks": [
            {"target": target, "source": images[0]["path"], "unfit": None, "images": images}
            for target, images in disks.items()
        ],
        "checkpoints": checkpoints,
        "orphan_bitmaps": [],
        "unfinished": [],
        "next_backup": "incremental" if since else "full",
        "next_backup_since": since,
        "next_backup_reason": reason or told,
        **more,
    }


def fine(name, *, folder="/var/lib/libvirt/images", state="running"):
    """Return a domain with two disks on two snapshots and three checkpoints, in order."""
    names = [f"backup.{number}" for number in range(3)]
    in_use = state == "running"

    def chain(stem):
        top = [bitmap(one, inconsistent=None if in_use else False) for one in names]  # in the memory of the VM
        return [
            image(f"{stem}.friday.qcow2", "friday", top, days=0.1, in_use=in_use),
            image(f"{stem}.monday.qcow2", "monday", map(bitmap, names[:2]), days=2.5),
            image(f"{stem}.qcow2", None, map(bitmap, names[:1]), days=6, held=30 * GIB),
        ]

    disks = {target: chain(f"{folder}/{name}-{target}") for target in ("vda", "vdb")}
    told = [checkpoint(one, 9 - 3 * number, targets=disks) for number, one in enumerate(names)]
    return domain(name, disks, told, names[-1], state=state)


def missing(name):
    """Return a domain of which the topmost image lacks the bitmap, as qemu-img create leaves it."""
    top, base = f"/srv/{name}.top.qcow2", f"/srv/{name}.qcow2"
    heals = "With the VM shut off, kvmfleet.qcow2.domain_checkpoint makes it valid again."
    advice = f"{top} lacks it, while {base} below has it. {heals}"
    told = [checkpoint("sunday", 4, valid=False, problem="not_in_top", where=top, advice=advice)]
    disks = {"vda": [image(top), image(base, None, [bitmap("sunday")], days=3)]}
    return domain(name, disks, told, reason=f"The checkpoint 'sunday' is not valid (not_in_top in {top}).")


def broken(name):
    """Return a domain with a gap, a broken bitmap and an older checkpoint that is fine."""
    paths = [f"/srv/{name}.{snapshot}.qcow2" for snapshot in ("c", "b", "a")]
    images = [
        image(paths[0], "c", [bitmap("old"), bitmap("gap")]),
        image(paths[1], "b", [bitmap("old"), bitmap("crash", inconsistent=True)], days=20),
        image(paths[2], "a", [bitmap("old"), bitmap("gap"), bitmap("crash")], days=30),
        image(f"/srv/{name}.qcow2", None, [bitmap("old")], days=50),
    ]
    told = [
        checkpoint("old", 60),
        checkpoint("gap", 40, valid=False, problem="gap", where=paths[1], advice="It is missing between."),
        checkpoint("crash", 35, valid=False, problem="not_in_top", where=paths[0], advice="It is not in the top."),
    ]
    orphans = [{"target": "vda", "image": paths[0], "bitmaps": ["forgotten"]}]
    return domain(name, {"vda": images}, told, "old", orphan_bitmaps=orphans)


def unknown(name):
    """Return a domain whose chain cannot be read, with unfinished work."""
    left = {"target": "vda", "image": "/srv/x.qcow2", "kind": "commit", "snapshot": "monday"}
    left.update(what="a commit is unfinished", completed_by="Run it again.")
    told = [checkpoint("one", 1, valid=None, problem="incomplete", where="/srv/x.qcow2", advice="Look further.")]
    found = domain(name, {"vda": [image("/srv/x.qcow2", None, [bitmap("one")])]}, told, unfinished=[left])
    found["disks"][0].update(msg="/srv/base.qcow2: does not exist. Mount it.", code="no_such_file")
    return {**found, "next_backup": "unknown", "next_backup_reason": "Whether 'one' is valid cannot be told."}


def hostile(name):
    """Return a domain in which everything is called so."""
    path = f"/srv/{name}/{name}"
    told = [checkpoint(name, 1, valid=False, problem="not_in_top", where=path, advice=f"{name} is gone.")]
    images = [image(path, name), image(f"{path}.base", None, [bitmap(name)])]
    return domain(name, {name or "vda": images}, [{**told[0], "bitmaps": {name: name}}], reason=f"{name} is why.")


def report(hosts):
    """Return the report on hosts, each a list of domains, or the words why it could not be asked."""
    results = {
        host: {"look": {"domains": found} if isinstance(found, list) else {"unreachable": True, "msg": found}}
        for host, found in hosts.items()
    }
    asked = {"longest_chain": 3, "oldest_snapshot": 40}
    judged = {host: {"health_result": make_host_health(look, host, **asked)} for host, look in results.items()}
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOW))
    head = {"finished": True, "started": ended, "ended": ended, "ansible_version": "2.18.1", "limit": None}
    return make_fleet_health(list(hosts), judged, head)["report"]


def of_every_kind():
    """Return the report on a small fleet with VMs of every kind."""
    return report(
        {
            "hv1.example.com": [fine("web1"), fine("web2"), fine("mail", state="shut off"), missing("db")],
            "hv2.example.com": [fine("web3"), broken("wiki"), unknown("ldap"), fine("web10")],
            "hv3.example.com": "Connection refused",
        }
    )


def of_names():
    """Return the report on hosts that are called as their VMs are."""
    return report({name: [hostile(name), fine(f"2 {name}")] for name in HOSTILE})


def large(hosts, vms):
    """Return the report on many hosts; one VM of twenty is broken in some way."""
    kinds = {7: missing, 13: broken, 19: unknown}  # the others are fine
    return report(
        {
            f"hv{host:03}.example.com": [kinds.get(vm % 40, fine)(f"vm{host:03}-{vm:02}") for vm in range(vms)]
            for host in range(hosts)
        }
    )


def main():
    *asked, file = sys.argv[1:]
    if asked == ["names"]:
        made = of_names()
    elif asked == ["kinds"]:
        made = of_every_kind()
    else:
        made = large(*map(int, asked))
    pathlib.Path(file).write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
