# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The note of a guest that is being frozen, where no real guest can be brought to it; the rest is in quiesced.yml."""

from __future__ import annotations

import os
import sys
import threading

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal, UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt import connection, quiesced, snapshots
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition, Source

DISK = "<domain id='1'><devices><disk type='file'><source file='{}'/><target dev='vda'/></disk></devices></domain>"
OLD, NEW = DISK.format("/old"), DISK.format("/new")
DOMAIN = Domain("web", "uuid-of-web", "running", True, False, Definition(OLD), Definition(OLD))
FROZEN = "unable to execute QEMU agent command 'guest-fsfreeze-freeze': the agent is in frozen state"


def failure(words, code=libvirt.VIR_ERR_INTERNAL_ERROR):
    error = libvirt.libvirtError(words)
    error.err = (code, 0, words, 0, "", "", "", 0, 0)
    return error


class Host:
    """A daemon and its only domain; `fails` is what the snapshot raises, and `thaws` what the agent then says."""

    def __init__(self, fails=None, thaws=(1,), text=OLD, was_away=False):
        self.connection = self
        self.fails = fails
        self.answers = list(thaws)
        self.text = text
        self.was_away = was_away
        self.thaws = 0
        self.number = 7
        self.time = None  # what the agent says to the question for the time
        self.notes = []  # whether one was there when the snapshot was taken

    def lookupByUUIDString(self, _uuid):  # noqa: N802  libvirt's names
        return self

    def placed(self, definition):
        return definition

    in_time = connection.Libvirt.in_time

    @property
    def _spare(self):  # the only connection that there is
        return self

    @_spare.setter
    def _spare(self, connection):
        pass

    def is_back(self, _seconds, **_how):
        if self.was_away is None:
            raise Refusal("libvirt_unreachable", "uri", "is not back")
        return self.was_away

    def isActive(self):  # noqa: N802
        return 1

    def isAlive(self):  # noqa: N802
        return 1

    def ID(self):  # noqa: N802
        if isinstance(self.number, Exception):
            raise self.number
        return self.number

    def XMLDesc(self, _flags):  # noqa: N802
        return self.text

    def snapshotCreateXML(self, _text, flags):  # noqa: N802
        assert flags & libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE
        self.notes.append(os.listdir(quiesced.FOLDER))
        assert thaw_left(self) == []  # of a run that lives
        if self.fails is not None:
            raise self.fails
        self.text = NEW

    def name(self):
        return "web"

    def getTime(self):  # noqa: N802
        if self.time is not None:
            raise self.time
        return {}

    def fsThaw(self):  # noqa: N802
        self.thaws += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def fixture_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(quiesced, "FOLDER", str(tmp_path / "notes"))
    monkeypatch.setattr(quiesced, "_PAUSE", 0)


def take(host):
    snapshots.take_snapshot(host, DOMAIN, {"vda": Source("/new")}, quiesce=True)


def thaw_left(host, *, check_mode=False):
    return quiesced.thaw_left(lambda: host, check_mode=check_mode)


def left():
    return os.listdir(quiesced.FOLDER)


def test_a_note_is_there_while_the_guest_may_be_frozen():
    host = Host()
    take(host)
    assert (host.notes, left(), host.thaws) == ([["uuid-of-web"]], [], 0)  # libvirt has thawed


BELOW = (
    "<domain id='1'><devices><disk type='file'><source file='/new'/><backingStore type='file'><source file='{}'/>"
    "<backingStore/></backingStore><target dev='vda'/></disk></devices></domain>"
)


@pytest.mark.parametrize("below, is_told", [("/old", False), ("/merged", True)])
def test_a_new_image_that_stands_on_another_one_than_it_records_is_told(monkeypatch, below, is_told):
    monkeypatch.setattr(sys.modules[__name__], "NEW", BELOW.format(below))
    host = Host()
    if not is_told:
        take(host)
        return
    with pytest.raises(UnknownOutcomeError, match="runs on /new, which records /old below it, but QEMU has /merged"):
        take(host)
    assert host.text == BELOW.format(below)


def test_a_domain_that_is_shut_off_after_its_snapshot_keeps_it(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "NEW", DISK.format("/new").replace(" id='1'", ""))
    host = Host()
    take(host)
    assert host.notes


def test_a_guest_is_thawed_after_an_error():
    host = Host(failure("no space"))
    with pytest.raises(Refusal, match="no space") as caught:
        take(host)
    assert (caught.value.code, left(), host.thaws) == ("libvirt_failed", [], 1)


def test_a_guest_that_another_tool_has_frozen_stays_frozen():
    host = Host(failure(FROZEN))
    with pytest.raises(Refusal, match="in frozen state") as caught:
        take(host)
    assert (caught.value.code, left(), host.thaws) == ("not_quiesced", [], 0)


def test_an_agent_that_may_not_tell_the_time_has_answered():
    host = Host()
    host.time = failure("disabled")
    take(host)
    assert host.text == NEW


def test_an_agent_that_does_not_answer_is_not_told_to_freeze(monkeypatch):
    monkeypatch.setattr(connection, "PATIENCE", 0.1)
    host, answers = Host(), threading.Event()
    host.getTime = answers.wait
    with pytest.raises(Refusal, match="its guest agent has not answered") as caught:
        take(host)
    answers.set()
    assert (caught.value.code, host.notes) == ("not_quiesced", [])


def test_without_a_further_connection_no_agent_is_asked_and_none_told_to_freeze(monkeypatch):
    host = Host(failure("no space"))

    def refuse(*_args):
        raise Refusal("libvirt_unreachable", "uri", "libvirt cannot be reached: too many clients")

    monkeypatch.setattr(Host, "in_time", refuse)
    with pytest.raises(Refusal, match="too many clients"):
        take(host)
    assert host.notes == []
    os.mkdir(quiesced.FOLDER, 0o700)
    with open(os.path.join(quiesced.FOLDER, "uuid-of-web"), "w", encoding="ascii") as file:
        file.write("7")
    (told,) = thaw_left(host)
    assert "cannot be thawed: libvirt cannot be reached: too many clients." in told
    assert left() == ["uuid-of-web"]


def test_a_daemon_that_was_away_connects_to_the_agent_first():
    mute = failure("not connected", libvirt.VIR_ERR_AGENT_UNRESPONSIVE)
    host = Host(failure("end of file"), [mute, mute, 1], was_away=True)
    with pytest.raises(UnknownOutcomeError):  # QEMU may have the new images open, whatever libvirt says
        take(host)
    assert (left(), host.thaws) == ([], 3)


def test_a_snapshot_that_is_complete_when_the_daemon_is_back():
    class Switched(Host):
        def snapshotCreateXML(self, text, flags):  # noqa: N802
            self.text = NEW
            super().snapshotCreateXML(text, flags)

    take(Switched(failure("end of file"), was_away=True))
    assert left() == []


@pytest.mark.parametrize("number, thaws, frozen", [(7, [2], True), (7, [0], False), (8, [], False)])
def test_the_next_run_thaws_what_was_left_frozen(number, thaws, frozen):
    with pytest.raises(UnknownOutcomeError):
        take(Host(failure("end of file"), was_away=None))
    assert left() == ["uuid-of-web"]
    host = Host(thaws=thaws)
    host.number = number  # after a start it is another one
    assert quiesced.is_left(host, DOMAIN) == (number == 7)
    told = thaw_left(host, check_mode=True)
    assert ["A run without check mode thaws them" in one for one in told] == [True] * (number == 7)
    assert (left(), host.thaws) == (["uuid-of-web"], 0)
    assert ["2 of them were, and are thawed now" in one for one in thaw_left(host)] == [True] * frozen
    assert (left(), host.thaws, thaw_left(host)) == ([], len(thaws), [])


def test_a_note_stays_while_libvirt_does_not_tell_of_the_domain():
    with pytest.raises(UnknownOutcomeError):
        take(Host(failure("end of file"), was_away=None))
    host = Host()
    host.number = failure("connection lost")
    assert (thaw_left(host), left(), quiesced.is_left(host, DOMAIN)) == ([], ["uuid-of-web"], True)


@pytest.mark.parametrize("lure", [os.mkfifo, os.mkdir, lambda place: os.symlink("/dev/zero", place)])
def test_what_stands_in_the_place_of_a_note_is_not_waited_for(lure):
    os.mkdir(quiesced.FOLDER)
    lure(os.path.join(quiesced.FOLDER, "uuid-of-web"))
    host = Host(thaws=[])
    assert (thaw_left(host), quiesced.is_left(host, DOMAIN)) == ([], False)
    take(Host())  # it goes on without a note, since libvirt thaws


def test_in_a_folder_of_others_no_note_is_left_or_believed():
    os.mkdir(quiesced.FOLDER)
    os.chmod(quiesced.FOLDER, 0o777)
    with open(os.path.join(quiesced.FOLDER, "uuid-of-web"), "w", encoding="ascii") as file:
        file.write("7")
    host = Host(thaws=[])
    assert (thaw_left(host), quiesced.is_left(host, DOMAIN)) == ([], False)
    take(host)
    assert open(os.path.join(quiesced.FOLDER, "uuid-of-web"), encoding="ascii").read() == "7"


def test_without_notes_nobody_connects_to_the_daemon():
    assert quiesced.thaw_left(lambda: pytest.fail("connected"), check_mode=False) == []


def test_a_guest_that_cannot_be_thawed_is_told_of_again_and_again():
    with pytest.raises(UnknownOutcomeError):
        take(Host(failure("end of file"), was_away=None))
    for _time in range(2):
        (told,) = thaw_left(Host(thaws=[failure("agent has died")]))
        assert "cannot be thawed. libvirt says: agent has died" in told


def test_a_run_that_leaves_the_guest_frozen_says_so():
    class Switched(Host):
        def snapshotCreateXML(self, text, flags):  # noqa: N802
            self.text = NEW
            super().snapshotCreateXML(text, flags)

    dead = failure("agent has died")
    for host in (Switched(failure("end of file"), [dead], was_away=True), Host(failure("no space"), [dead])):
        with pytest.raises(Refusal, match="may be frozen"):
            take(host)
        assert left() == ["uuid-of-web"]


@pytest.mark.parametrize("code", ["AGENT_UNRESPONSIVE", "AGENT_UNSYNCED", "ARGUMENT_UNSUPPORTED"])
def test_an_agent_that_is_not_there_is_not_told_to_freeze(code):
    host = Host()
    host.time = failure("no agent", getattr(libvirt, f"VIR_ERR_{code}"))
    with pytest.raises(Refusal, match="no agent") as caught:
        take(host)
    assert (caught.value.code, host.notes) == ("not_quiesced", [])
