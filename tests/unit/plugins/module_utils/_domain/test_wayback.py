# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of domains that are to leave a snapshot: on real images, with definitions that are switched."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import unittest.mock

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import merge
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.begun import leave_sign
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert import GoBack
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.revert_rules import RevertVerdict
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.session import Vm
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.aims import GoBackTo
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.inventory import Inventory
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.retention import Step
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._domain.wayback import (
    WayBack,
    lost_checkpoints,
    plan_commit,
    plan_revert,
    signed_leftovers,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Kept, KnownCheckpoint
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2 import mark
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import write_base, write_leaving

from .. import qemu
from .._disk.commits import loop_device, write
from .hosts import SETTINGS, Host

DIES = UnknownOutcomeError("not_switched", "web", "the machine dies here")


class WayOfHost(Host):
    """A host whose domains leave snapshots, too."""

    def plan_back(self, plan, name, snapshot, **wanted):
        """Return what would become of a domain."""
        stock, domain = Inventory(self.domains), self.domains[name]
        facts = [stock.facts(domain, disk) for disk in domain.definition.disks]
        return plan(domain, facts, WayBack(snapshot, **wanted))

    def leave(self, plan, operation, name, snapshot, dies=False):
        """Have a domain leave a snapshot; if it dies, then just before the switch, or else return what is left.

        That is the state, or the codes of what is wrong, and the names of its topmost images.
        """
        planned = self.plan_back(plan, name, snapshot)
        if planned.problems:
            return [problem.code for problem in planned.problems]
        switched = []

        def switch():
            switched.append(name)
            if dies:
                raise DIES

        vms = {planned.domain.uuid: Vm(switch)}
        outcome = run(operation(), [disk.request for disk in planned.disks], SETTINGS, vms)
        if switched or not planned.sources:
            self.domains[name] = self.domains[name]._replace(definition=planned.definition)
        states = [verdict.state for verdict in outcome.verdicts]
        return states, [os.path.basename(path) for path in self.domains[name].definition.tops.values()]

    def commit(self, name, snapshot, dies=False):
        return self.leave(plan_commit, MergeLayers, name, snapshot, dies)

    def revert(self, name, snapshot, dies=False):
        return self.leave(plan_revert, GoBack, name, snapshot, dies)

    def files(self):
        return sorted(os.listdir(self.folder))


@pytest.fixture(name="host")
def fixture_host(tmp_path):
    host = WayOfHost(tmp_path)
    for image in ("web-a.qcow2", "web-b.qcow2"):
        qemu.add_bitmaps(host.image(image), [Bitmap("sunday", 65536, True, False)])
    host.define("web", "web-a.qcow2", "web-b.qcow2")
    for snapshot in ("mon", "tue", "wed"):
        assert len(host.snapshot("web", snapshot)) == 2
    return host


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_a_disk_that_is_not_there_may_be_on_the_snapshot_too(host, tmp_path, plan):
    """Or its data would be of another time than that of the others."""
    for name in ("a.qcow2", "b.qcow2"):
        host.image(name)
    host.define("two", "a.qcow2", "b.qcow2")
    host.snapshot("two", "mon")
    two = host.domains["two"]
    text = re.sub(r"(b\.mon\.qcow2.)", r"\1 startupPolicy='optional'", two.definition.text)
    assert text != two.definition.text
    host.domains["two"] = two._replace(definition=Definition(text))
    assert host.plan_back(plan, "two", "mon").problems == ()
    os.rename(tmp_path / "b.mon.qcow2", tmp_path / "unmounted")
    (problem,) = host.plan_back(plan, "two", "mon").problems
    assert (problem.code, problem.subject) == ("disk_unfit", "two")
    assert "its disk vdb is not there, and may be on the snapshot, too" in problem.why
    assert host.plan_back(plan, "two", "mon", targets=("vda",)).problems == ()


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_a_disk_that_cannot_be_read_may_stand_on_what_changes(host, plan):
    """As of a domain whose storage is not mounted: its clone of the image below would be broken."""
    host.define("away", "unmounted.qcow2")
    (warning,) = host.plan_back(plan, "web", "wed").warnings
    assert warning.startswith("away (vda): the disk cannot be read")
    assert host.plan_back(plan, "web", "thu").warnings == []


def test_the_topmost_snapshot_is_merged_down_on_all_disks(host):
    assert host.commit("web", "wed") == (["committed"] * 2, ["web-a.tue.qcow2", "web-b.tue.qcow2"])
    assert host.commit("web", "wed") == ([], ["web-a.tue.qcow2", "web-b.tue.qcow2"])
    assert host.files() == [f"web-{disk}{layer}.qcow2" for disk in "ab" for layer in (".mon", "", ".tue")]


def test_a_snapshot_in_the_middle_is_taken_out_and_the_definition_stays(host):
    assert host.commit("web", "tue") == (["committed"] * 2, ["web-a.wed.qcow2", "web-b.wed.qcow2"])
    assert qemu.info(host.folder / "web-a.wed.qcow2")["backing-filename"] == str(host.folder / "web-a.mon.qcow2")
    assert host.commit("web", "tue")[0] == []


def state_chain(host, *names):
    """Have the definition of web state what is below its first disk."""
    below = ""
    for name in reversed(names):
        source = f"<format type='qcow2'/><source file='{host.folder / name}'/>"
        below = f"<backingStore type='file'>{source}{below}</backingStore>"
    text = host.domains["web"].definition.text.replace('<target dev="vda"', f'{below}<target dev="vda"')
    assert below in text
    host.domains["web"] = host.domains["web"]._replace(definition=Definition(text))


def test_a_chain_that_the_definition_states_goes_from_it_with_an_image_in_the_middle(host):
    """Else libvirt would look for the image that is gone."""
    state_chain(host, "web-a.tue.qcow2", "web-a.mon.qcow2", "web-a.qcow2")
    assert host.commit("web", "tue") == (["committed"] * 2, ["web-a.wed.qcow2", "web-b.wed.qcow2"])
    assert "backingStore" not in host.domains["web"].definition.text


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_another_chain_than_the_images_record_is_refused(host, way):
    """The guest may have written to TOP on top of another image than the one into which it would go."""
    host.image("other.qcow2")
    state_chain(host, "web-a.tue.qcow2", "other.qcow2")
    before = host.files()
    assert getattr(host, way)("web", "wed") == ["other_chain"]
    assert host.files() == before


def test_going_back_discards_the_snapshot_and_all_above(host):
    assert host.revert("web", "tue") == (["reverted"] * 2, ["web-a.mon.qcow2", "web-b.mon.qcow2"])
    kept = [f"web-{disk}.{snapshot}.qcow2.reverted" for disk in "ab" for snapshot in ("tue", "wed")]
    assert [name for name in host.files() if name.endswith(".reverted")] == kept
    # What is kept is not found again.
    assert host.revert("web", "tue") == ([], ["web-a.mon.qcow2", "web-b.mon.qcow2"])
    assert host.revert("web", "wed")[0] == []


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_a_domain_that_is_not_on_the_snapshot_is_left_as_it_is(host, way):
    before = host.files()
    assert getattr(host, way)("web", "thu") == ([], ["web-a.wed.qcow2", "web-b.wed.qcow2"])
    assert host.files() == before


def test_a_run_that_dies_between_switch_and_end_of_a_merge_is_completed(host):
    assert host.commit("web", "wed", dies=True)[0] == ["failed"] * 2
    assert [name for name in host.files() if "vault" in name] == [
        f".web-{d}.tue.qcow2.kvmfleet-vault-given" for d in "ab"
    ]
    assert host.commit("web", "thu")[0] == []  # what was left is of another snapshot
    assert host.commit("web", "wed")[0] == ["committed"] * 2
    assert not [name for name in host.files() if "vault" in name or "wed" in name]
    assert host.commit("web", "wed")[0] == []


@pytest.mark.parametrize("above", [None, "other"])
@pytest.mark.parametrize("way", ["commit", "revert"])
def test_a_domain_that_was_put_on_base_while_the_merge_was_under_way_is_told(host, monkeypatch, way, above):
    """What it writes there, and what the snapshot holds, exclude each other."""
    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, "move", unittest.mock.Mock(side_effect=Refusal("storage", "it", "fails")))
        assert host.commit("web", "wed")[0] == ["failed"] * 2
    host.define("web", "web-a.tue.qcow2", "web-b.tue.qcow2")
    if above is not None:
        host.image("other.qcow2", "web-a.tue.qcow2")
        host.define("web", "other.qcow2", "web-b.tue.qcow2")
    assert getattr(host, way)("web", "wed") == ["unfinished"] * 2
    (problem, _of_b) = host.plan_back(plan_commit, "web", "wed").problems
    vault = host.folder / ".web-a.tue.qcow2.kvmfleet-vault"
    assert f"remove {host.folder / 'web-a.wed.qcow2'} and {vault}" in problem.remedy
    # A way out.
    host.define("web", "web-a.wed.qcow2", "web-b.wed.qcow2")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(host.folder / "other.qcow2")
    assert host.commit("web", "wed")[0] == ["committed"] * 2


@pytest.mark.parametrize("way", ["commit", "revert"])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_snapshot_that_others_took_into_the_one_above_while_its_merge_was_under_way(host, monkeypatch, way, is_known):
    """The disk must stay on what it is on: the snapshot lacks what is newer."""
    with monkeypatch.context() as patch:
        patch.setattr(MergeLayers, "move", unittest.mock.Mock(side_effect=Refusal("storage", "it", "fails")))
        assert host.commit("web", "tue")[0] == ["failed"] * 2
    for disk in "ab":
        above, base = (host.folder / f"web-{disk}.{snapshot}.qcow2" for snapshot in ("wed", "mon"))
        qemu.qemu_img("rebase", "-q", "-b", str(base), "-F", "qcow2", str(above))
        if not is_known:
            with open(above, "r+b") as file, open_image(str(base)) as below:
                write_base(OpenImage(str(above), file.fileno()), below)
    plan = plan_commit if way == "commit" else plan_revert
    problems = host.plan_back(plan, "web", "tue").problems
    assert [problem.code for problem in problems] == ["unfinished"] * 2
    top, vault = host.folder / "web-a.tue.qcow2", host.folder / ".web-a.mon.qcow2.kvmfleet-vault"
    assert problems[0].subject == str(host.folder / "web-a.mon.qcow2")
    assert f"nothing is left to merge{',' if is_known else '.'}" in problems[0].remedy
    assert f"remove {top} and {vault}, then all checkpoints" in problems[0].remedy
    assert "virsh edit" not in problems[0].remedy
    commands = re.findall(r"'(qemu-img rebase [^']*)'", " ".join(problem.remedy for problem in problems))
    assert len(commands) == (2 if is_known else 0)
    for command in commands:
        subprocess.run(shlex.split(command), check=True)
    if is_known:
        assert host.commit("web", "tue") == (["committed"] * 2, ["web-a.wed.qcow2", "web-b.wed.qcow2"])
    else:
        os.unlink(top)
        os.unlink(vault)
        assert [problem.subject for problem in host.plan_back(plan, "web", "tue").problems] == [problems[1].subject]


def test_a_run_that_dies_when_the_image_above_is_on_base_is_completed(host, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge, "retire", unittest.mock.Mock(side_effect=DIES))
        assert host.commit("web", "tue")[0] == ["failed"] * 2
    assert qemu.info(host.folder / "web-a.wed.qcow2")["backing-filename"] == str(host.folder / "web-a.mon.qcow2")
    assert [name for name in host.files() if "tue" in name]
    assert host.commit("web", "tue") == (["committed"] * 2, ["web-a.wed.qcow2", "web-b.wed.qcow2"])
    assert host.files() == [f"web-{disk}{layer}.qcow2" for disk in "ab" for layer in (".mon", "", ".wed")]
    assert host.commit("web", "tue")[0] == []


def test_a_vault_that_is_none_fails_its_domain_only(host):
    """A call plans all domains before it does anything."""
    (host.folder / ".web-a.wed.qcow2.kvmfleet-vault").write_bytes(b"")
    assert host.commit("web", "sun") == ["unfinished"]


def test_a_run_that_dies_between_switch_and_end_of_going_back_is_completed(host):
    assert host.revert("web", "wed", dies=True)[0] == ["failed"] * 2
    assert [name for name in host.files() if "wed" in name] == ["web-a.wed.qcow2", "web-b.wed.qcow2"]
    assert host.revert("web", "wed")[0] == ["reverted"] * 2
    assert [name for name in host.files() if "wed" in name] == ["web-a.wed.qcow2.reverted", "web-b.wed.qcow2.reverted"]


def test_what_its_vm_has_written_since_does_not_keep_it_from_being_completed(host):
    """It can have written again some of what it had discarded."""
    for disk in "ab":
        subprocess.run(["qemu-io", "-c", "write -P 7 0 192k", host.folder / f"web-{disk}.wed.qcow2"], check=True)
    assert host.revert("web", "wed", dies=True)[0] == ["failed"] * 2
    for disk in "ab":
        subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", host.folder / f"web-{disk}.tue.qcow2"], check=True)
    assert host.revert("web", "wed")[0] == ["reverted"] * 2


def test_a_run_that_dies_so_is_completed_also_below_a_snapshot_that_was_made_since(host):
    """The VM stays on that, with all that was written to it and with its checkpoints."""
    assert host.revert("web", "tue", dies=True)[0] == ["failed"] * 2
    assert len(host.snapshot("web", "thu")) == 2
    new = ["web-a.thu.qcow2", "web-b.thu.qcow2"]
    for name in new:
        qemu.add_bitmaps(host.folder / name, [Bitmap("late", 65536, True, False)])
    before = {name: (host.folder / name).read_bytes() for name in (*new, "web-a.mon.qcow2", "web-b.mon.qcow2")}
    assert host.commit("web", "tue") == ["unfinished"] * 2
    plan = host.plan_back(plan_revert, "web", "tue")
    kept = Kept((KnownCheckpoint("late", {"vda": "late", "vdb": "late"}, created=int(time.time())),))
    assert lost_checkpoints(plan, kept) == ()
    (disk, _other), aim = host.domains["web"].definition.disks, GoBackTo(WayBack("tue"))
    chain = aim.chain_after(disk, RevertVerdict(plan.disks[0].request, "reverted"))
    assert os.path.basename(chain.layers[0].path) == "web-a.thu.qcow2"
    assert host.revert("web", "tue") == (["reverted"] * 2, new)
    assert {name: (host.folder / name).read_bytes() for name in before} == before
    kept_as = [f"web-{disk}.{day}.qcow2.reverted" for disk in "ab" for day in ("tue", "wed")]
    assert [name for name in host.files() if name.endswith(".reverted")] == kept_as
    for way in (host.commit, host.revert):
        assert way("web", "tue") == ([], new)


def test_a_run_that_dies_so_when_it_goes_back_over_several_snapshots_is_completed(host):
    assert host.revert("web", "mon", dies=True)[0] == ["failed"] * 2
    assert host.revert("web", "mon")[0] == ["reverted"] * 2
    kept = [f"web-{disk}.{day}.qcow2.reverted" for disk in "ab" for day in ("mon", "tue", "wed")]
    assert host.files() == sorted([*kept, "web-a.qcow2", "web-b.qcow2"])
    assert host.revert("web", "mon")[0] == []


def put_back(host, *images):
    """Have these images stand where they stood when the domain was switched."""
    for name in images:
        os.rename(host.folder / f"{name}.reverted", host.folder / name)
        with open_image(str(host.folder / name)) as file:
            write_leaving(file, leaving=True)


def test_a_run_that_dies_once_the_lowest_snapshots_are_renamed_is_completed(host):
    """From the lowest upwards: the last one that has its name records that of one that is not there any more."""
    assert host.revert("web", "mon")[0] == ["reverted"] * 2
    kept = [f"web-{disk}.{day}.qcow2.reverted" for disk in "ab" for day in ("mon", "tue", "wed")]
    put_back(host, "web-a.wed.qcow2", "web-b.wed.qcow2", "web-b.tue.qcow2")
    assert host.revert("web", "tue")[0] == []  # the images that the domain was to be put back from are others
    assert host.revert("web", "mon")[0] == ["reverted"] * 2
    assert host.files() == sorted([*kept, "web-a.qcow2", "web-b.qcow2"])
    assert host.revert("web", "mon")[0] == []


def test_what_else_is_kept_is_not_taken_for_what_a_killed_run_has_renamed(host):
    assert host.revert("web", "mon")[0] == ["reverted"] * 2
    put_back(host, "web-a.wed.qcow2", "web-b.wed.qcow2")
    (host.folder / "web-a.tue.qcow2.reverted.1").symlink_to("nowhere")
    (host.folder / "web-b.tue.qcow2.reverted.1").symlink_to("web-b.wed.qcow2")
    host.image("web-a.mon.qcow2.reverted.1", below="web-a.qcow2")  # it does not bear the mark
    host.image("web-b.mon.qcow2.reverted.1")
    states, _images = host.revert("web", "mon")
    assert states == ["reverted"] * 2


@pytest.fixture(name="linked")
def fixture_linked(tmp_path):
    """Have a domain on a snapshot of an image that a symlink in another folder names; the overlay is beside that."""
    host = WayOfHost(tmp_path)
    host.image("store/web.qcow2")
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "web.qcow2").symlink_to("../store/web.qcow2")
    host.define("web", "vm/web.qcow2")
    assert host.snapshot("web", "mon") == ["vm/web.mon.qcow2"]
    return host


def test_a_run_that_dies_when_it_goes_back_to_an_image_that_a_symlink_names_is_completed(linked):
    assert linked.revert("web", "mon", dies=True)[0] == ["failed"]
    assert linked.revert("web", "mon")[0] == ["reverted"]
    assert sorted(os.listdir(linked.folder / "vm")) == ["web.mon.qcow2.reverted", "web.qcow2"]
    assert linked.revert("web", "mon")[0] == []


def test_an_overlay_that_is_a_symlink_goes_by_its_name_beside_the_disk(linked):
    """Or the symlink would stay, and lead nowhere."""
    overlay = linked.folder / "vm" / "web.mon.qcow2"
    os.rename(overlay, linked.folder / "store" / "a.qcow2")
    overlay.symlink_to("../store/a.qcow2")
    assert linked.revert("web", "mon", dies=True)[0] == ["failed"]
    assert linked.revert("web", "mon")[0] == ["reverted"]
    assert os.listdir(linked.folder / "vm") == ["web.qcow2"]
    assert sorted(os.listdir(linked.folder / "store")) == ["a.qcow2.reverted", "web.qcow2"]


@pytest.mark.parametrize("is_on_another", [False, True])
def test_what_went_in_below_a_symlink_while_its_vm_ran_is_told_of(linked, is_on_another):
    left = str(linked.folder / "vm" / "web.mon.qcow2")
    if is_on_another:  # which records the image itself
        assert linked.snapshot("web", "tue") == ["vm/web.tue.qcow2"]
        base = str(linked.folder / "store" / "web.qcow2")
        qemu.qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", str(linked.folder / "vm" / "web.tue.qcow2"))
    else:
        linked.define("web", "vm/web.qcow2")
    with open_image(left) as file:
        leave_sign(file)
    assert linked.commit("web", "mon") == ["unfinished"]
    stock, domain = Inventory(linked.domains), linked.domains["web"]
    facts = stock.facts(domain, domain.definition.disks[0])
    assert list(signed_leftovers(domain, facts, WayBack(""))) == ["mon"]


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_a_snapshot_of_a_domain_that_was_defined_anew_is_told_of(host, plan):
    host.define("web", "web-a.wed.qcow2", "web-b.wed.qcow2", uuid="another")
    assert len(host.snapshot("web", "thu")) == 2
    planned = host.plan_back(plan, "web", "tue", targets=("vda",))
    (warning,) = planned.warnings
    assert planned.disks == ()
    assert warning.startswith(f"web: {host.folder / 'web-a.tue.qcow2'}, in the chain of its disk vda, bears the mark")
    assert f"above={host.folder / 'web-a.wed.qcow2'}" in warning
    assert host.plan_back(plan, "web", "thu", targets=("vda",)).always == ()
    assert host.plan_back(plan, "web", "fri").warnings == []
    assert len(host.plan_back(plan_commit, "web", "", steps={"another": Step("thu", "thu")}).always) == 6


@pytest.fixture(name="joined")
def fixture_joined(tmp_path, monkeypatch):
    """A disk of which mon, tue and wed went in together, and only wed is retired."""
    host = WayOfHost(tmp_path)
    host.image("web.qcow2")
    host.define("web", "web.qcow2")
    for snapshot in ("mon", "tue", "wed", "thu"):
        assert len(host.snapshot("web", snapshot)) == 1
    real = merge.retire

    def only_the_topmost(path, *more):
        if not path.endswith(".wed.qcow2"):
            raise Refusal("killed", path, "is killed")
        return real(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "retire", only_the_topmost)
        planned = host.plan_back(plan_commit, "web", "wed", lowest="mon")
        assert run(MergeLayers(), [planned.disks[0].request], SETTINGS).failures
    assert host.files() == [
        ".web.qcow2.kvmfleet-vault-given",
        *(f"web{one}.qcow2" for one in (".mon", "", ".thu", ".tue")),
    ]
    return host


@pytest.mark.parametrize("name", ["mon", "tue", "wed"])
def test_each_of_the_images_that_went_in_together_has_all_retired(joined, name):
    assert joined.commit("web", name) == (["committed"], ["web.thu.qcow2"])
    assert joined.files() == ["web.qcow2", "web.thu.qcow2"]
    assert joined.commit("web", name)[0] == []


def test_a_new_image_with_the_name_of_the_topmost_one_leaves_the_others_to_be_retired(joined):
    joined.image("web.wed.qcow2", below="web.thu.qcow2")
    assert joined.commit("web", "tue")[0] == ["committed"]
    assert joined.files() == ["web.qcow2", "web.thu.qcow2", "web.wed.qcow2"]


@pytest.mark.parametrize("is_defined, is_written", [(False, True), (True, True), (True, False)])
def test_an_image_that_went_in_and_that_a_vm_has_again_stays(joined, is_defined, is_written):
    """Or what it wrote would be lost, or it could not be started."""
    mon = joined.folder / "web.mon.qcow2"
    if is_written:
        write(mon, "write -P 7 0 64k")
    if is_defined:
        joined.define("web", "web.mon.qcow2")
    joined.commit("web", "tue")
    assert mon.exists()
    if is_defined and is_written:
        assert joined.commit("web", "mon")[0] in (["failed"], ["unfinished"])
        assert mon.exists()


def test_an_image_that_went_in_and_another_domain_has_stays(joined):
    joined.define("other", "web.mon.qcow2")
    assert joined.commit("web", "wed")[0] == []
    assert "web.mon.qcow2" in joined.files()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a loop device")
@pytest.mark.parametrize("names", [("mon",), ("mon", "tue")])
def test_what_went_into_a_block_device_is_found_in_the_folder_where_overlays_were_made(tmp_path, monkeypatch, names):
    (tmp_path / "volumes").mkdir()
    (tmp_path / "made").mkdir()
    (tmp_path / "volumes" / "file").touch()
    os.truncate(tmp_path / "volumes" / "file", 8 * 2**20)
    with loop_device(tmp_path / "volumes" / "file") as device:
        qemu.create(device, "1M")
        host, made = WayOfHost(tmp_path), str(tmp_path / "made")
        host.define("web", device)
        for name in names:
            assert host.snapshot("web", name, directory=made) == [f"made/web.vda.{name}.qcow2"]
        planned = host.plan_back(plan_commit, "web", names[-1], lowest=names[0])
        killed = unittest.mock.Mock(side_effect=Refusal("killed", "", "is killed"))
        with monkeypatch.context() as patch:
            patch.setattr(merge, "retire", killed)
            run(
                MergeLayers(),
                [disk.request for disk in planned.disks],
                SETTINGS,
                {planned.domain.uuid: Vm(lambda: None)},
            )
        host.domains["web"] = host.domains["web"]._replace(definition=planned.definition)
        assert host.domains["web"].definition.tops == {"vda": device}
        for name in names:  # each completes it
            (disk,) = host.plan_back(plan_commit, "web", name, directory=made).disks
        assert host.plan_back(plan_commit, "web", "fri", directory=made).disks == ()
        assert [one.state for one in run(MergeLayers(), [disk.request], SETTINGS).verdicts] == ["committed"]
        assert os.listdir(made) == []
        assert host.plan_back(plan_commit, "web", names[0], directory=made).disks == ()


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_an_image_that_another_domain_has_too_is_refused(host, way):
    host.define("clone", "web-a.tue.qcow2")
    assert getattr(host, way)("web", "wed") == ["shared_disk"]


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_an_image_that_another_run_renames_during_the_look_is_in_no_other_domain(host, plan):
    domain = host.domains["web"]
    facts = [Inventory(host.domains).facts(domain, disk) for disk in domain.definition.disks]
    raced = facts[0]._replace(own=facts[0].layers[:1])
    (problem,) = plan(domain, [raced, *facts[1:]], WayBack("wed")).problems
    assert (problem.code, problem.subject) == ("changed_meanwhile", facts[0].layers[1].path)


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_a_snapshot_that_cannot_be_told_from_a_clone_is_refused(host, way):
    host.image("db.qcow2")
    host.image("db.one.qcow2", below="db.qcow2")
    host.define("db", "db.one.qcow2")
    assert getattr(host, way)("db", "one") == ["ambiguous"]


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_a_domain_that_is_not_shut_off_is_refused_only_if_it_is_on_the_snapshot(host, plan):
    for change, code in (
        ({"state": "running"}, "running"),
        ({"managed_save": True}, "managed_save"),
        ({"persistent": False}, "transient"),
    ):
        host.domains["web"] = host.domains["web"]._replace(**change)
        assert [one.code for one in host.plan_back(plan, "web", "wed").problems] == [code]
        assert host.plan_back(plan, "web", "thu").problems == ()
        host.domains["web"] = host.domains["web"]._replace(state=None, managed_save=False, persistent=True)


def test_only_the_disks_that_are_named_take_part(host):
    planned = host.plan_back(plan_commit, "web", "wed", targets=("vdb",))
    assert [disk.target for disk in planned.disks] == ["vdb"]
    assert [(one.target, one.reason) for one in planned.skipped] == [("vda", "not asked for")]
    assert [one.code for one in host.plan_back(plan_commit, "web", "wed", targets=("vdx",)).problems] == ["disk_unfit"]


def test_a_merge_knows_all_images_further_up(host):
    for snapshot, above, further in (("mon", "tue", ["wed"]), ("tue", "wed", []), ("wed", None, [])):
        for disk, name in zip(host.plan_back(plan_commit, "web", snapshot).disks, "ab"):
            paths = [str(host.folder / f"web-{name}.{one}.qcow2") for one in (above, *further) if one]
            assert [one for one in (disk.request.above, *disk.request.further) if one] == paths


def test_checkpoints_that_the_images_below_lack_are_lost(host):
    qemu.add_bitmaps(host.folder / "web-b.wed.qcow2", [Bitmap("late", 65536, True, False)])
    both = {"vda": "sunday", "vdb": "sunday"}
    kept = Kept((KnownCheckpoint("sunday", both), KnownCheckpoint("late", {"vda": "sunday", "vdb": "late"})))
    assert lost_checkpoints(host.plan_back(plan_revert, "web", "wed"), kept) == ("late",)
    assert lost_checkpoints(host.plan_back(plan_revert, "web", "thu"), kept) == ()


def test_a_checkpoint_is_lost_whose_name_an_older_bitmap_of_the_image_below_has(host):
    both = {"vda": "sunday", "vdb": "sunday"}
    base = host.plan_back(plan_revert, "web", "wed").disks[1].request.backing_file
    os.utime(base, (10_000, 10_000))
    for created, lost in ((10_000, ()), (50_000, ("sunday",))):
        kept = Kept((KnownCheckpoint("sunday", both, created=created),))
        assert lost_checkpoints(host.plan_back(plan_revert, "web", "wed"), kept) == lost


def test_a_checkpoint_is_lost_that_was_made_on_the_snapshot(host):
    """However new an older bitmap of its name is in the image below, as after the removal of another checkpoint."""
    base = host.plan_back(plan_revert, "web", "wed").disks[1].request.backing_file
    os.utime(base)
    made = qemu.read(host.folder / "web-b.wed.qcow2").history.made // 10**9
    for created, lost in ((made - 5, ()), (made, ()), (made + 1, ("sunday",))):
        kept = Kept((KnownCheckpoint("sunday", {"vdb": "sunday"}, created=created),))
        assert lost_checkpoints(host.plan_back(plan_revert, "web", "wed"), kept) == lost
        assert host.revert("web", "nosuch")[0] == []
    assert host.revert("web", "wed", dies=True)[0] == ["failed"] * 2
    os.utime(host.folder / "web-b.wed.qcow2", (made + 1, made + 1))
    assert lost_checkpoints(host.plan_back(plan_revert, "web", "wed"), kept) == ("sunday",)


def lost_if_made(host, snapshot, created, name="sunday"):
    kept = Kept((KnownCheckpoint(name, {"vdb": name}, created=created),))
    return lost_checkpoints(host.plan_back(plan_revert, "web", snapshot), kept) == (name,)


@pytest.mark.parametrize("snapshot", ["wed", "tue"])
def test_a_checkpoint_that_was_made_since_a_killed_run_has_left_the_snapshot_stays(host, snapshot):
    """The VM has gone on below. Of several images that are left the topmost one tells when that was."""
    base = host.plan_back(plan_revert, "web", snapshot).disks[1].request.backing_file
    top, lowest = (host.folder / f"web-b.{name}.qcow2" for name in ("wed", snapshot))
    assert host.revert("web", snapshot, dies=True)[0] == ["failed"] * 2
    os.utime(lowest, (time.time() + 900, time.time() + 900))
    made, written = qemu.read(lowest).history.made // 10**9, int(time.time()) + 500
    os.utime(top, (written, written))
    found = [lost_if_made(host, snapshot, created) for created in (made, made + 1, written, written + 1)]
    assert found == [False, True, True, False]
    assert lost_if_made(host, snapshot, written + 1, "later")  # of which the image below has no bitmap
    os.utime(base, (10_000, 10_000))
    assert lost_if_made(host, snapshot, written + 1)  # it has one, but that is older
    os.utime(base)
    time.sleep(1.1)  # so that it changes in another second than that in which it was made
    os.utime(top, (10_000, 10_000))  # after a crash the last write can be older than a checkpoint
    changed = os.stat(top).st_ctime_ns
    assert [lost_if_made(host, snapshot, changed // 10**9 + later) for later in (0, 1)] == [True, False]
    assert host.revert("web", snapshot, dies=True)[0] == ["failed"] * 2
    assert os.stat(top).st_ctime_ns == changed


def test_disks_of_two_moments_and_bitmaps_that_stay_are_warned_of(host):
    host.image("late.qcow2")
    host.define("web", "web-a.wed.qcow2", "late.qcow2")
    plan = host.plan_back(plan_revert, "web", "wed")
    (warning,) = plan.warnings
    assert "its disk vdb is not on the snapshot wed and stays as it is" in warning
    assert host.plan_back(plan_revert, "web", "wed", targets=("vda",)).warnings == []
    assert host.plan_back(plan_commit, "web", "wed").warnings == []
    own, both = KnownCheckpoint("own", {"vda": "own"}), KnownCheckpoint("both", {"vda": "both", "vdb": "both"})
    domain = host.domains["web"]
    facts = [Inventory(host.domains).facts(domain, disk) for disk in domain.definition.disks]
    asked = WayBack("wed", targets=("vda",))
    for kept, expected in ((Kept((own,)), []), (Kept((own, both)), ["its disk vdb stays, and so do its bitmaps"])):
        told = plan_revert(domain, facts, asked, kept).warnings
        assert [words in one for words, one in zip(expected, told)] == [True] * len(expected)
        assert len(told) == len(expected)


def test_snapshots_of_libvirts_own_are_in_the_way_of_going_back(host):
    """They may need the images that go."""

    def codes(snapshot, **wanted):
        domain = host.domains["web"]
        facts = [Inventory(host.domains).facts(domain, disk) for disk in domain.definition.disks]
        aim = GoBackTo(WayBack(snapshot, **wanted))
        return [problem.code for problem in aim.plan(domain, facts, Kept(snapshots=("int1",))).problems]

    assert codes("wed") == ["libvirt_snapshots"]
    assert codes("wed", allows_snapshots=True) == []
    assert codes("thu") == []  # it is not on that, and nothing is to be done


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_an_image_is_not_what_the_one_above_it_was_made_on(host, way):
    """As after `virsh blockpull --base`, which takes in the images between: what is below can be a template."""
    wed, base = host.folder / "web-a.wed.qcow2", host.folder / "web-a.qcow2"
    recorded = (int(time.time()) - 20) * 10**9 + 123_456_789  # it has all digits
    tue = host.folder / "web-a.tue.qcow2"
    os.utime(tue, ns=(0, recorded))
    with open_image(str(wed)) as file, open_image(str(tue)) as below:
        write_base(file, below)
    os.utime(base, ns=(0, recorded - 10**9))
    qemu.qemu_img("rebase", "-q", "-b", str(base), "-F", "qcow2", str(wed))
    for name in ("mon", "tue"):
        os.unlink(host.folder / f"web-a.{name}.qcow2")
    before = host.files()
    assert getattr(host, way)("web", "wed") == ["base_changed"]
    assert host.files() == before
    lost = recorded % 10**9  # a copy can have lost what is below two seconds, 10 ms, or a microsecond
    for written, expected in (
        (recorded - lost, []),
        (recorded - lost - 10**9, []),
        (recorded - lost - 2 * 10**9, ["base_changed"]),
        (recorded - recorded % 10**7, []),
        (recorded - recorded % 10**7 - 10**7, ["base_changed"]),
        (recorded - recorded % 1000, []),
        (recorded - recorded % 1000 - 1000, ["base_changed"]),
        (recorded, []),
    ):
        os.utime(base, ns=(0, written))
        plan = plan_commit if way == "commit" else plan_revert
        assert [problem.code for problem in host.plan_back(plan, "web", "wed").problems] == expected
    os.utime(base)
    assert getattr(host, way)("web", "wed")[0] == ["committed" if way == "commit" else "reverted"] * 2


def test_what_has_an_older_time_since_is_the_image_all_the_same_for_who_merges(host):
    """As where a tool has put its time back; who goes back wants what it had then."""
    for disk in "ab":
        os.utime(host.folder / f"web-{disk}.tue.qcow2", (1, 1))
    assert [one.code for one in host.plan_back(plan_revert, "web", "wed").problems] == ["base_changed"] * 2
    assert host.commit("web", "wed")[0] == ["committed"] * 2


@pytest.fixture(name="elsewhere")
def fixture_elsewhere(tmp_path):
    """Return a folder on another file system than that of the images."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("there is one file system alone")
        yield pathlib.Path(folder)


def record_base(overlay, base):
    """Have an overlay record that it was made on an image, of which it records the inode alone."""
    with open_image(str(overlay)) as file, open_image(str(base)) as below:
        write_base(file, below)


def stand_on(base, *overlays):
    """Have overlays stand on an image, with all that is between in them, as 'virsh blockpull --base' does."""
    for overlay in overlays:
        qemu.qemu_img("rebase", "-q", "-b", str(base), "-F", "qcow2", str(overlay))


def test_an_inode_of_another_file_system_does_not_tell_that_it_is_the_image(host, elsewhere):
    """A template there can have it: small inodes are alike. It would be merged into."""
    template, wed = elsewhere / "template.qcow2", host.folder / "web-a.wed.qcow2"
    qemu.create(template, "1M")
    stand_on(template, wed)
    record_base(wed, template)
    assert qemu.read(wed).history.base_inode == os.stat(template).st_ino
    os.utime(template, (1, 1))
    for plan in (plan_commit, plan_revert):
        (problem,) = host.plan_back(plan, "web", "wed").problems
        assert (problem.code, problem.subject) == ("base_changed", str(template))
    os.utime(template)
    for plan in (plan_commit, plan_revert):
        assert host.plan_back(plan, "web", "wed").problems == ()


@pytest.mark.parametrize("data", ["", "write -P 7 0 1M"])
def test_what_a_merge_in_between_writes_is_in_nobodys_way(host, data):
    """Also if the guest wrote the same again on the snapshot: then the image below holds what the one above it does."""
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    for snapshot in ("mon", "tue", "wed"):
        assert host.snapshot("plain", snapshot)
    if data:
        for snapshot in ("tue", "wed"):
            command = ["qemu-io", "-f", "qcow2", "-c", data, str(host.folder / f"plain.{snapshot}.qcow2")]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    recorded = qemu.read(host.folder / "plain.wed.qcow2").history.base_written
    os.utime(host.folder / "plain.tue.qcow2", ns=(0, recorded))
    os.utime(host.folder / "plain.mon.qcow2", (1, 1))
    assert host.commit("plain", "tue")[0] == ["committed"]
    below = os.stat(host.folder / "plain.mon.qcow2")
    history = qemu.read(host.folder / "plain.wed.qcow2").history
    assert (history.base_written, history.base_inode) == (below.st_mtime_ns, below.st_ino)
    assert host.revert("plain", "wed")[0] == ["reverted"]


def test_merges_one_after_the_other_are_in_nobodys_way(host, monkeypatch):
    """Of an idle disk, whose overlay holds nothing, as if its data had gone into the image below."""
    monkeypatch.setattr(mark, "_UNTIL_SWITCHED", 0)  # as long after the snapshots
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    for snapshot in ("mon", "tue", "wed", "thu"):
        assert host.snapshot("plain", snapshot)
    for snapshot in ("tue", "wed"):
        assert host.commit("plain", snapshot)[0] == ["committed"]
    assert host.revert("plain", "thu")[0] == ["reverted"]


@pytest.mark.parametrize("later", [0.5, 600])
@pytest.mark.parametrize("size", ["256k", "1M"])  # all of it is the same, or so much as a merge has come to
def test_a_merge_does_not_hide_that_the_image_in_between_was_not_what_it_was(host, later, size):
    """As after a merge by other tools that was given up, which has put into it what is above; soon, or late."""
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    for snapshot in ("mon", "tue", "wed"):
        assert host.snapshot("plain", snapshot)
    for snapshot, length in (("wed", "1M"), ("tue", size)):
        command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {length}", f"{host.folder}/plain.{snapshot}.qcow2"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    recorded = qemu.read(host.folder / "plain.wed.qcow2").history.base_written
    os.utime(host.folder / "plain.tue.qcow2", ns=(0, recorded + int(later * 10**9)))
    assert host.commit("plain", "tue")[0] == ["committed"]
    assert host.revert("plain", "wed")[0] == ["failed"]


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_merge_does_not_hide_that_an_image_was_taken_out_above(host, is_copy):
    """As by 'virsh blockpull --base', or because it was put back from a copy."""
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    for snapshot in ("mon", "tue", "wed"):
        assert host.snapshot("plain", snapshot)
    mon, tue, wed = (host.folder / f"plain.{snapshot}.qcow2" for snapshot in ("mon", "tue", "wed"))
    goes_in = tue if is_copy else mon
    if not is_copy:
        stand_on(mon, wed)
        os.unlink(tue)
    os.utime(mon, (1, 1))
    os.utime(goes_in, (1, 1))
    if is_copy:  # the very file with another time is what it was
        assert host.plan_back(plan_commit, "plain", "tue").problems == ()
        shutil.copy2(tue, host.folder / "copy")
        os.rename(host.folder / "copy", tue)
    (problem,) = host.plan_back(plan_commit, "plain", goes_in.name.split(".")[1]).problems
    assert (problem.code, problem.subject) == ("base_changed", str(goes_in))
    assert f"nobody should go back to below {wed} any more" in problem.remedy
    os.utime(goes_in)  # by the word of the user
    assert host.commit("plain", goes_in.name.split(".")[1])[0] == ["committed"]


def test_a_time_that_is_ahead_of_the_clock_is_in_nobodys_way(host):
    """As of a storage whose clock was wrong for a while."""
    for disk in "ab":
        later = os.stat(host.folder / f"web-{disk}.wed.qcow2").st_mtime_ns + 8 * 3600 * 10**9
        os.utime(host.folder / f"web-{disk}.wed.qcow2", ns=(0, later))
    assert host.snapshot("web", "thu")
    for disk in "ab":
        os.utime(host.folder / f"web-{disk}.wed.qcow2")
    assert host.plan_back(plan_commit, "web", "thu").problems == ()
    assert host.revert("web", "thu")[0] == ["reverted"] * 2


def test_the_image_that_was_taken_into_the_snapshot_is_where_to_go_back_to(host):
    """'virsh blockpull --base' leaves it, and any write to the image below hides that it is older."""
    for disk in "ab":
        wed, base = host.folder / f"web-{disk}.wed.qcow2", host.folder / f"web-{disk}.mon.qcow2"
        qemu.qemu_img("rebase", "-q", "-b", str(base), "-F", "qcow2", str(wed))
        os.utime(base)
    (told, _other) = host.plan_back(plan_revert, "web", "wed").problems
    assert (told.code, told.subject) == ("base_changed", str(host.folder / "web-a.mon.qcow2"))
    tue = str(host.folder / "web-a.tue.qcow2")
    assert tue in told.why
    assert f"put the VM on {tue} ('virsh edit')" in told.remedy
    for disk in "ab":
        with open_image(str(host.folder / f"web-{disk}.tue.qcow2")) as file:
            leave_sign(file)
    assert host.plan_back(plan_revert, "web", "wed").problems == ()
    for disk in "ab":
        os.unlink(host.folder / f"web-{disk}.tue.qcow2")
    assert host.plan_back(plan_revert, "web", "wed").problems == ()
    assert host.commit("web", "wed")[0] == ["committed"] * 2


def taken_in(host, name, snapshot, **wanted):
    """Return which image the first disk was on at a snapshot, of those that are not in its chain any more."""
    problems = [
        one for one in host.plan_back(plan_revert, name, snapshot, **wanted).problems if "was made on" in one.why
    ]
    return [os.path.basename(re.search("put the VM on ([^ ]+) ", one.remedy)[1]) for one in problems]


def test_the_topmost_of_several_images_that_were_taken_in_is_where_to_go_back_to(host):
    """Also where one further down was moved away, since it stands on the image that the VM would write to."""
    base, mon = host.folder / "web-a.qcow2", host.folder / "web-a.mon.qcow2"
    stand_on(base, host.folder / "web-a.wed.qcow2")
    os.utime(base)
    assert taken_in(host, "web", "wed") == ["web-a.tue.qcow2"]
    os.rename(mon, host.folder / "away")
    (host.folder / "elsewhere").mkdir()
    os.rename(host.folder / "away", host.folder / "elsewhere" / "web-a.mon.qcow2")
    assert taken_in(host, "web", "wed") == ["web-a.tue.qcow2"]
    assert host.revert("web", "wed") == ["base_changed"]


def test_what_was_never_below_the_snapshot_was_not_taken_in(host):
    """An inode is given anew once an image is gone, as when the one below was put back from a copy."""
    wed, tue = host.folder / "web-a.wed.qcow2", host.folder / "web-a.tue.qcow2"
    host.image("gone.qcow2")
    host.image("other.qcow2", below="gone.qcow2")
    os.unlink(host.folder / "gone.qcow2")
    host.image("above.qcow2", below="web-a.wed.qcow2")
    host.image("one.qcow2")
    host.image("two.qcow2", below="one.qcow2")
    qemu.qemu_img("rebase", "-u", "-b", str(host.folder / "two.qcow2"), "-F", "qcow2", str(host.folder / "one.qcow2"))
    os.utime(tue)
    for name in ("other", "above", "one", "web-b.mon"):
        record_base(wed, host.folder / f"{name}.qcow2")
        assert taken_in(host, "web", "wed") == []
    host.image("beside.qcow2", below="web-a.tue.qcow2")
    record_base(wed, host.folder / "beside.qcow2")
    assert taken_in(host, "web", "wed") == ["beside.qcow2"]


def test_an_image_that_was_taken_in_is_found_wherever_the_overlay_was_made(host, elsewhere):
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    assert host.snapshot("plain", "mon")
    assert host.snapshot("plain", "tue", elsewhere)
    os.utime(host.folder / "plain.mon.qcow2")
    assert taken_in(host, "plain", "tue", directory=str(elsewhere)) == []
    stand_on(host.folder / "plain.qcow2", elsewhere / "plain.vda.tue.qcow2")
    os.utime(host.folder / "plain.qcow2")
    assert taken_in(host, "plain", "tue", directory=str(elsewhere)) == ["plain.mon.qcow2"]


def test_an_image_below_that_has_its_inode_elsewhere_does_not_hide_what_was_taken_in(host):
    stand_on(host.folder / "web-a.qcow2", host.folder / "web-a.wed.qcow2")
    tue, domain = os.stat(host.folder / "web-a.tue.qcow2"), host.domains["web"]
    facts = [Inventory(host.domains).facts(domain, disk) for disk in domain.definition.disks]
    top, below, *more = facts[0].layers
    for device, expected in ((tue.st_dev + 1, ["base_changed"]), (tue.st_dev, [])):
        layers = (top, below._replace(identity=(device, tue.st_ino)), *more)
        os.utime(below.path)
        changed = facts[0]._replace(layers=layers, own=layers)
        assert [one.code for one in plan_revert(domain, [changed, *facts[1:]], WayBack("wed")).problems] == expected


def test_an_overlay_that_is_taken_again_is_as_new_as_the_snapshot(host):
    """As after a run that was killed: the VM has written to the image below since."""
    host.image("plain.qcow2")
    host.define("plain", "plain.qcow2")
    assert host.snapshot("plain", "mon")
    first = qemu.read(host.folder / "plain.mon.qcow2").history
    host.define("plain", "plain.qcow2")
    os.utime(host.folder / "plain.qcow2")
    assert host.snapshot("plain", "mon")
    history, base = qemu.read(host.folder / "plain.mon.qcow2").history, os.stat(host.folder / "plain.qcow2")
    assert history.made > first.made
    assert (history.base_written, history.base_inode) == (base.st_mtime_ns, base.st_ino)
    assert host.snapshot("plain", "mon") == "present"
    assert qemu.read(host.folder / "plain.mon.qcow2").history == history


def test_what_another_host_has_is_not_taken_for_what_a_killed_run_has_left(host):
    """A definition that stays behind when the domain goes to another host has the images of that time."""
    before = host.files()
    host.define("web", "web-a.tue.qcow2", "web-b.tue.qcow2")
    assert host.revert("web", "wed")[0] == []
    assert host.commit("web", "wed")[0] == []
    assert host.files() == before


@pytest.mark.parametrize("way", ["commit", "revert"])
def test_what_is_left_over_stays_as_long_as_another_domain_has_it(host, way):
    getattr(host, way)("web", "wed", dies=True)
    host.define("old", "web-a.wed.qcow2")
    before = host.files()
    assert getattr(host, way)("web", "wed") == ["shared_disk"]
    assert host.files() == before
    del host.domains["old"]
    assert getattr(host, way)("web", "wed")[0]
    assert "web-a.wed.qcow2" not in host.files()


def test_an_image_in_the_middle_that_went_in_while_its_vm_ran_is_told_of(host):
    for disk in "ab":
        with open_image(str(host.folder / f"web-{disk}.mon.qcow2")) as file:
            leave_sign(file)
        base = host.folder / f"web-{disk}.qcow2"
        qemu.qemu_img("rebase", "-u", "-b", str(base), "-F", "qcow2", str(host.folder / f"web-{disk}.tue.qcow2"))
    assert host.commit("web", "mon") == ["unfinished"] * 2
    assert host.commit("web", "wed")[0] == ["committed"] * 2


def state_chains(host, is_complete):
    """Have the definition state what is below the images, as libvirt does after a snapshot while the domain ran."""
    stated = host.domains["web"].definition.text
    for disk, target in ("a", "vda"), ("b", "vdb"):
        below = "<backingStore/>" if is_complete else ""
        for image in (f"web-{disk}.qcow2", f"web-{disk}.mon.qcow2", f"web-{disk}.tue.qcow2")[not is_complete :]:
            source = f"<format type='qcow2'/><source file='{host.folder / image}'/>"
            below = f"<backingStore type='file'>{source}{below}</backingStore>"
        stated = stated.replace(f"<target dev='{target}'/>", f"{below}<target dev='{target}'/>")
        stated = stated.replace(f'<target dev="{target}"/>', f"{below}<target dev='{target}'/>")
    host.domains["web"] = host.domains["web"]._replace(definition=Definition(stated))
    assert all(disk.stated_images for disk in host.domains["web"].definition.disks)


def merge_below_alone(host):
    """Have QEMU merge the lowest overlays of both disks, and the definition go on with them."""
    for disk in "ab":
        images = [str(host.folder / f"web-{disk}{part}.qcow2") for part in ("", ".mon", ".tue")]
        qemu.qemu_img("commit", "-q", "-d", images[1])
        qemu.qemu_img("rebase", "-u", "-b", images[0], "-F", "qcow2", images[2])


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_merge_whose_end_failed_while_the_vm_ran_has_a_way_out(host, is_complete):
    state_chains(host, is_complete)
    for disk in "ab":
        with open_image(str(host.folder / f"web-{disk}.mon.qcow2")) as file:
            leave_sign(file)
    assert [one.code for one in host.plan("web", "thu").problems] == []
    merge_below_alone(host)
    for plan, snapshot in ((plan_commit, "mon"), (plan_commit, "wed"), (plan_revert, "mon"), (plan_revert, "tue")):
        problems = host.plan_back(plan, "web", snapshot).problems
        assert [(one.code, one.subject) for one in problems] == [
            ("not_switched", str(host.folder / f"web-{disk}.mon.qcow2")) for disk in "ab"
        ]
    assert [one.code for one in host.plan("web", "thu").problems] == ["not_switched"] * 2
    for one in problems:
        subprocess.run(shlex.split(re.search("by '(qemu-img .*)', and run this again", one.remedy)[1]), check=True)
    assert host.commit("web", "mon")[0] == ["committed"] * 2
    assert not [name for name in host.files() if ".mon." in name]


@pytest.mark.parametrize("plan", [plan_commit, plan_revert])
def test_a_disk_on_whose_snapshot_the_definition_alone_is_does_not_lack_it(host, plan):
    state_chains(host, is_complete=True)
    merge_below_alone(host)  # but nobody knows by whom
    assert [one.code for one in host.plan_back(plan, "web", "mon").problems] == ["other_chain"] * 2
    assert host.plan_back(plan, "web", "sun").disks == ()
