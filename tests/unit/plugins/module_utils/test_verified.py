# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The option verify: which looks and runs one call makes, on real images, and what it tells of each."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Settings
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._module import Report
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._verified import verified
from ansible_collections.kvmfleet.qcow2.plugins.modules.qcow2_overlay import STATES, argument_spec, requests_from

from . import qemu

SETTINGS = Settings(check_mode=False, seconds=60.0, find_program=shutil.which)
ALONE = {"verify": True, "all_or_none": False}


class Call:
    """A call of qcow2_overlay for overlays, which remembers in which mode it was made."""

    def __init__(self, folder, *names, state="present"):
        given = [{"path": f"{folder}/{name}.snap", "backing_file": f"{folder}/{name}", "vm": name} for name in names]
        defaults = {name: option.get("default") for name, option in argument_spec().items()}
        defaults["cluster_size"] = 65536
        self.state = state
        self.requests = requests_from({**defaults, "state": state, "overlays": given})
        self.defaults = defaults
        self.modes = []
        self.before_run = lambda: None

    def once(self, settings):
        """Make the call."""
        self.modes.append("look" if settings.check_mode else "run")
        if not settings.check_mode:
            self.before_run()
        outcome = run(STATES[self.state].operation(self.defaults), self.requests, settings)
        return Report(outcome.as_result("overlays"), outcome.failures, outcome.warnings)

    def verified(self, *, check_mode=False, **more):
        """Return how it ends with the option."""
        return verified(self.once, SETTINGS._replace(check_mode=check_mode), {**ALONE, **more}, "overlays")


@pytest.fixture
def images(tmp_path):
    """Return a folder with two images that have a bitmap."""
    for name in ("a", "b"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / name, "1M"], check=True)
        subprocess.run(["qemu-img", "bitmap", "--add", tmp_path / name, "monday"], check=True)
    return tmp_path


def states(result):
    """Return the states of the overlays."""
    return [one["state"] for one in result["overlays"]]


def test_a_run_is_looked_at_before_and_after(images):
    call = Call(images, "a", "b")
    report = call.verified()
    result = report.result
    assert call.modes == ["look", "run", "look"]
    assert [states(one) for one in (result["preflight"], result, result["again"])] == [
        ["created", "created"],
        ["created", "created"],
        ["present", "present"],
    ]
    assert result["changed"]
    assert not report.failures
    assert result["check_mode"] is False
    assert [disk["path"] for disk in result["chains"]] == [f"{images}/a.snap", f"{images}/b.snap"]
    assert all(disk["checkpoints"][0]["valid"] for disk in result["chains"])


def test_nothing_is_run_if_nothing_is_to_be_done(images):
    Call(images, "a").verified()
    call = Call(images, "a")
    result = call.verified().result
    assert call.modes == ["look"]
    assert (states(result), result["changed"], result["again"]) == (["present"], False, None)
    assert [disk["path"] for disk in result["chains"]] == [f"{images}/a.snap"]


def test_check_mode_predicts_and_examines_what_is_there(images):
    call = Call(images, "a")
    result = call.verified(check_mode=True).result
    assert call.modes == ["look"]
    assert (states(result), result["changed"], result["again"], result["check_mode"]) == (["created"], True, None, True)
    assert [disk["path"] for disk in result["chains"]] == [f"{images}/a"]
    assert not os.path.exists(images / "a.snap")


def test_all_or_none_holds_back_what_could_be_done(images):
    call = Call(images, "a", "gone")
    report = call.verified(all_or_none=True)
    assert call.modes == ["look"]
    assert states(report.result["preflight"]) == ["created", "failed"]
    assert states(report.result) == ["failed", "failed"]
    assert [one["code"] for one in report.result["overlays"]] == ["held_back", "no_such_file"]
    assert not report.result["changed"]
    assert [failure.code for failure in report.failures] == ["no_such_file"]
    assert not os.path.exists(images / "a.snap")


def test_without_it_what_can_be_done_is_done(images):
    report = Call(images, "a", "gone").verified()
    assert states(report.result) == ["created", "failed"]
    assert states(report.result["again"]) == ["present", "failed"]
    with pytest.raises(Refusal, match="all_or_none"):
        Call(images, "a").verified(verify=False, all_or_none=True)


def test_the_second_look_sees_what_was_changed_meanwhile(images):
    call = Call(images, "a")
    looks = []

    def once(settings):
        looks.append(settings)
        if len(looks) == 3:
            (images / "a.snap").unlink()
        return call.once(settings)

    result = verified(once, SETTINGS, ALONE, "overlays").result
    assert (states(result), states(result["again"])) == (["created"], ["created"])


def test_a_look_that_is_refused_after_the_run_is_told_and_so_is_the_run(images):
    call = Call(images, "a")

    def once(settings):
        if call.modes.count("run"):
            raise Refusal("libvirt_unreachable", "x", "does not answer")
        return call.once(settings)

    report = verified(once, SETTINGS, ALONE, "overlays")
    assert states(report.result) == ["created"]
    assert not report.failures
    assert report.result["again"] == {"msg": "x: does not answer.", "code": "libvirt_unreachable"}


def test_a_run_that_is_refused_altogether_is_looked_at(images):
    call = Call(images, "a")

    def refuse():
        raise Refusal("no_qemu", "", "is gone")

    call.before_run = refuse
    report = call.verified()
    assert call.modes == ["look", "run", "look"]
    assert "overlays" not in report.result
    assert [one.code for one in report.failures] == ["no_qemu"]
    assert states(report.result["again"]) == ["created"]


def test_what_is_merged_down_or_gone_back_from_is_absent_then(images):
    Call(images, "a", "b").verified()
    merged = Call(images, "a", state="committed").verified()
    assert (states(merged.result), states(merged.result["again"])) == (["committed"], ["absent"])
    assert [disk["path"] for disk in merged.result["chains"]] == [f"{images}/a"]
    planned = Call(images, "b", state="committed").verified(check_mode=True)
    assert [disk["path"] for disk in planned.result["chains"]] == [f"{images}/b.snap"]
    back = Call(images, "b", state="reverted").verified()
    assert (states(back.result), states(back.result["again"])) == (["reverted"], ["absent"])


def test_the_chains_are_judged_with_what_is_known_of_the_checkpoints(images):
    """Of a loss whose names cannot be told an image is free that is older than the checkpoint."""
    path = str(images / "a")
    place, length = qemu.directory_of(path)
    qemu.patch(path, place, bytes(length))
    qemu.patch(path, 88, bytes(8))  # autoclear bit 0
    top = qemu.create(images / "a.snap", "1M", "-b", path, "-F", "qcow2")
    subprocess.run(["qemu-img", "bitmap", "--add", top, "tuesday"], check=True)
    os.utime(path, (10_000, 10_000))
    overlay = {"state": "present", "path": top, "backing_file": path, "bitmaps": ["tuesday"]}
    for created, problem in (({top: {"tuesday": 50_000}}, None), ({path: {"tuesday": 50_000}}, "lost"), ({}, "lost")):
        report = Report({"changed": False, "overlays": [overlay]}, created=created)
        (chain,) = verified(lambda _settings, have=report: have, SETTINGS, ALONE, "overlays").result["chains"]
        assert [one["problem"] for one in chain["checkpoints"]] == [problem]
