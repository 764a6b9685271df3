# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A snapshot that is asked for in vain, while domains are on others: on real images."""

from __future__ import annotations

import os
import shutil
import types

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.aims import GoBackTo, MergeDown
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.run import Call
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.wayback import WayBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Kept
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import write_leaving
from ansible_collections.kvmfleet.qcow2.plugins.modules import domain_overlay

from .hosts import SETTINGS, Host


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    host = Host(tmp_path)
    for name in ("web", "db", "bare"):
        host.image(f"{name}.qcow2")
        host.define(name, f"{name}.qcow2")
    for name, snapshot in (("web", "mon"), ("web", "tue"), ("db", "wed")):
        host.snapshot(name, snapshot)
    return host


def warnings(host, names, snapshot, aim=MergeDown, state="committed", **wanted):
    """Return what the module warns of in check mode; of the first of its calls."""
    daemon = types.SimpleNamespace(domains=lambda: host.domains, kept=lambda _domain: Kept())
    call = Call(daemon, names, [aim(WayBack(snapshot, **wanted))], SETTINGS._replace(check_mode=True))
    return list(domain_overlay._in_vain([call], {"state": state, "snapshot": snapshot}))


@pytest.mark.parametrize("aim, state", [(MergeDown, "committed"), (GoBackTo, "reverted")])
def test_a_snapshot_that_is_nowhere_while_there_are_others_is_warned_of(host, aim, state):
    (told,) = warnings(host, ["*"], "mno", aim, state)
    assert told.startswith(
        "mno: none of these domains is on this snapshot, and nothing of it is left to do. They are on mon, "
    )
    assert "They are on mon, tue, wed." in told
    (told,) = warnings(host, ["web"], "wed", aim, state)
    assert "They are on mon, tue." in told


def test_of_many_snapshots_some_are_named(host):
    for number in range(10):
        host.snapshot("web", f"n{number}")
    (told,) = warnings(host, ["web"], "mno")
    assert "They are on mon, n0, n1, n2, n3, n4, n5, n6, n7, n8 and 2 more. Check" in told


def test_what_is_on_any_domain_or_where_there_is_none_is_not_warned_of(host):
    assert warnings(host, ["*"], "mon") == []
    assert warnings(host, ["*"], "wed", targets=("vdb",)) == []  # its disk vda is on it
    assert warnings(host, ["bare"], "mno") == []
    assert warnings(host, ["nosuch*"], "mno") == []
    assert warnings(host, ["*"], "mno", state="present") == []
    del host.domains["db"]
    host.define("copy", "db.wed.qcow2")
    assert warnings(host, ["copy"], "mno") == []  # the snapshot is another domain's


def test_what_is_left_of_a_snapshot_is_not_warned_of(host):
    left = "web.mno.qcow2"
    host.snapshot("web", "mno")
    host.define("web", "web.tue.qcow2")
    (told,) = warnings(host, ["web"], "mno", GoBackTo, "reverted")  # another host may have it
    assert "nothing of it is left to do" in told
    with open_image(str(host.folder / left)) as file:
        write_leaving(file, leaving=True)
    assert warnings(host, ["web"], "mno", GoBackTo, "reverted") == []


def test_a_merge_that_another_run_ends_meanwhile_is_not_warned_of(host, monkeypatch):
    def ended(_begun, _seconds):
        host.define("db", "db.qcow2")
        host.define("web", "web.tue.qcow2")
        os.unlink(host.folder / "db.wed.qcow2")
        return True

    monkeypatch.setattr("ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.run.await_merges_of", ended)
    daemon = types.SimpleNamespace(domains=lambda: host.domains, kept=lambda _domain: Kept())
    call = Call(daemon, ["*"], [MergeDown(WayBack("wed"))], SETTINGS)
    assert call.snapshots_instead("wed") == []


def told(host, monkeypatch, snapshot, *, check_mode=False):
    """Return what the whole module warns of, with verify, and what became of the first domain."""
    pools = types.SimpleNamespace(refresh=lambda _folders: [])
    daemon = types.SimpleNamespace(
        domains=lambda: host.domains, kept=lambda _domain: Kept(), pools=pools, version=(9, 0)
    )
    monkeypatch.setattr(domain_overlay, "Libvirt", lambda _uri: daemon)
    monkeypatch.setattr(domain_overlay, "thaw_left", lambda _daemon, **_: [])
    monkeypatch.setattr(MergeDown, "confirm", lambda *_: None)
    defaults = {name: option.get("default") for name, option in domain_overlay.argument_spec().items()}
    asked = {"name": ["web"], "snapshot": snapshot, "state": "committed", "verify": True, "cluster_size": 65536}
    module = types.SimpleNamespace(params={**defaults, **asked}, check_mode=check_mode, get_bin_path=shutil.which)
    report = domain_overlay.work(module)
    assert not report.failures
    return report.warnings, report.result["domains"][0]["state"]


def test_the_look_after_the_run_warns_of_nothing_and_check_mode_warns_as_the_run_does(host, monkeypatch):
    assert told(host, monkeypatch, "mon", check_mode=True) == ([], "committed")
    assert told(host, monkeypatch, "mon") == ([], "committed")
    (foreseen,), state = told(host, monkeypatch, "mon", check_mode=True)
    assert (told(host, monkeypatch, "mon"), state) == (([foreseen], "absent"), "absent")
    assert "They are on tue." in foreseen
