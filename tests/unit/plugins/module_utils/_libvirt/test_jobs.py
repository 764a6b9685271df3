# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How a merge is followed where no real daemon can be brought to behave so; the rest is in domain_overlay, live.yml."""

from __future__ import annotations

import os
import signal

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import (
    GoesOn,
    Interrupted,
    ending_cleanly,
    interruptible,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.jobs import (
    Merge,
    check_may_merge,
    check_no_job,
    merge_down,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.running import Mirror, running_disks

DOMAIN = Domain("web", "uuid", "running", True, False, Definition("<domain/>"), Definition("<domain/>"))
ACTIVE = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT
COMMIT = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT
BACKUP = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP
COPY = libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY


class Running:
    """A domain with one disk on top.s on /mid on /base; its job has these looks, then it has done its work or not."""

    def __init__(self, looks, merges="/top", works=True, not_ready=0):
        self.chain = ["/top", "/mid", "/base"]
        self.numbers = {"/top": 9, "/mid": 1, "/base": 0, "/other": 8}  # an image keeps its own
        self.looks = list(looks)
        self.merges = merges
        self.works = works
        self.number = 1  # of the run of the domain
        self.not_ready = not_ready
        self.calls = []
        self.is_begun = bool(looks) and looks[0] is not None
        self.looks = [look for look in self.looks if look is not None]
        self.signs = []  # for each, whether a job was there already

    def begin(self):
        self.signs.append(self.is_begun)
        self.has_ended = False
        return self

    def withdraw(self):
        self.signs.clear()

    def end(self):
        self.has_ended = True

    def XMLDesc(self, _flags):  # noqa: N802  libvirt's name
        inner = "<backingStore/>"
        for path in reversed(self.chain[1:]):
            source = f"<format type='qcow2'/><source file='{path}'/>"
            inner = f"<backingStore type='file' index='{self.numbers[path]}'>{source}{inner}</backingStore>"
        top = f"<source file='{self.chain[0]}' index='{self.numbers[self.chain[0]]}'/>" if self.chain else ""
        if not self.number:
            return "<domain/>"
        disk = f"<disk type='file'>{top}{inner}<target dev='vda'/></disk>"
        return f"<domain id='{self.number}'><devices>{disk}</devices></domain>"

    def blockCommit(self, *arguments):  # noqa: N802
        self.calls.append(arguments)
        self.is_begun = True

    def blockJobInfo(self, _target, _flags):  # noqa: N802
        if not self.is_begun:
            return {}
        if not self.looks:
            self._end()
            return {}
        kind, done = self.looks[0] if len(self.looks) == 1 and self.looks[0][0] == ACTIVE else self.looks.pop(0)
        return {"type": kind, "bandwidth": 0, "cur": done, "end": 10}

    def blockJobAbort(self, _target, flags):  # noqa: N802
        self.calls.append(flags)
        if flags and self.not_ready:
            self.not_ready -= 1
            raise failure(libvirt.VIR_ERR_BLOCK_COPY_ACTIVE)
        self.looks = []
        if flags:
            self._end()
        self.is_begun = False

    def _end(self):
        self.is_begun = False
        if self.works and self.merges in self.chain:
            self.chain.remove(self.merges)


class Daemon:
    """The daemon of one domain, which is away for a while when it is told so."""

    def __init__(self, handle):
        self._handle = handle
        self.connection = self
        self.is_away = False
        self.returns = 0

    def lookupByUUIDString(self, _uuid):  # noqa: N802  libvirt's name
        if self.is_away:
            raise failure(libvirt.VIR_ERR_RPC)
        return self._handle

    def is_there(self):
        return not self.is_away

    def is_back(self, _seconds):
        was_away, self.is_away = self.is_away, False
        self.returns += was_away
        return was_away


def failure(code):
    error = libvirt.libvirtError("said")
    error.err = (code, 0, "said", 0, "", "", "", 0, 0)
    return error


def merged(handle, path, seconds=60.0, daemon=None, **more):
    seen = []
    merge = Merge(DOMAIN, "vda", path, **more)
    daemon = daemon or Daemon(handle)
    merge_down(daemon, merge, lambda done, total: seen.append((done, total)), seconds, handle.begin)
    return seen


def merged_after(handle, happens):
    """Have /mid be merged, and something happen to the domain while it is."""
    look = handle.blockJobInfo

    def look_first(target, flags):
        info = look(target, flags)
        if info:
            happens(handle)
            handle.is_begun = False
        return {} if info else info

    handle.blockJobInfo = look_first
    merged(handle, "/mid")


def test_the_topmost_image_goes_with_a_pivot_when_the_job_is_ready():
    handle = Running([None, (ACTIVE, 3), (ACTIVE, 10)], not_ready=1)
    assert merged(handle, "/top", speed=5) == [(3, 10), (10, 10), (10, 10)]
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    pivot = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
    assert handle.calls == [("vda", "vda[1]", "vda[9]", 5, flags), pivot, pivot]
    assert handle.chain == ["/mid", "/base"]


def test_an_image_further_down_goes_without_a_pivot():
    handle = Running([None, (COMMIT, 3), (COMMIT, 10)], merges="/mid")
    merged(handle, "/mid", relative=True)
    flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_RELATIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
    assert handle.calls == [("vda", "vda[0]", "vda[1]", 0, flags)]
    assert handle.signs == [False]  # before the job writes to the image below
    assert handle.chain == ["/top", "/base"]


def test_a_job_of_a_run_that_was_killed_is_followed():
    handle = Running([(COMMIT, 3), (COMMIT, 10)], merges="/mid")
    assert merged(handle, "/mid", resumes=True) == [(10, 10)]  # the first look has found it
    assert handle.calls == []
    assert handle.signs == [True]


@pytest.mark.parametrize("kind, path", [(COMMIT, "/mid"), (ACTIVE, "/top")])
def test_a_merge_of_somebody_else_is_neither_followed_nor_ended(kind, path):
    handle = Running([(kind, 3), (kind, 10)], merges=path)
    with pytest.raises(Refusal, match="has a block job that this run has not begun .*commit") as caught:
        merged(handle, path)
    assert (caught.value.code, handle.calls, handle.signs) == ("block_job", [], [])


def test_a_merge_that_begins_first_goes_on_and_the_sign_of_the_data_that_it_moves_stays():
    handle = Running([None, (COMMIT, 3)], merges="/mid")

    def refuse(*_arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        handle.is_begun = True
        raise failure(libvirt.VIR_ERR_BLOCK_COPY_ACTIVE)

    handle.blockCommit = refuse
    with pytest.raises(Refusal, match="a block job that has just been begun"), ending_cleanly():
        merged(handle, "/mid")
    assert (handle.calls, handle.signs, handle.has_ended) == ([], [False], True)  # of no job of this run


@pytest.mark.parametrize("kind, signs", [(COPY, []), (COMMIT, [False])])
def test_the_sign_stays_only_where_a_job_may_write_to_the_image_below(kind, signs):
    handle = Running([None, (kind, 3)], merges="/mid")

    def refuse(*_arguments):
        handle.is_begun = True
        raise failure(libvirt.VIR_ERR_BLOCK_COPY_ACTIVE)

    handle.blockCommit = refuse
    with pytest.raises(Refusal, match="a block job that has just been begun"):
        merged(handle, "/mid")
    assert handle.signs == signs


def lose_the_disk(handle):
    handle.chain = ["/other"]


def start_on_another_image(handle):
    handle.number = 2
    handle.chain = ["/base"]


def shut_off(handle):
    handle.number = 0


def detach(handle):
    handle.chain = []


def attach_the_image_below(handle):
    handle.chain = ["/top", "/base"]
    handle.numbers = {"/top": 11, "/base": 10}


def pull_up(handle):
    handle.chain = ["/top"]


def put_another_below(handle):
    handle.chain = ["/top", "/other"]


@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize(
    "happens, said",
    [
        (start_on_another_image, "web: has got other disks meanwhile"),
        (shut_off, "web: was shut off meanwhile"),
        (lose_the_disk, "web: has got other disks meanwhile"),
        (detach, "web: has got other disks meanwhile"),
        (attach_the_image_below, "web: has got other disks meanwhile"),
        (pull_up, "web: has got other disks meanwhile"),
    ],
)
def test_what_the_domain_has_not_any_more_is_not_merged_for_that(happens, said, is_away):
    handle = Running([None, (COMMIT, 2), (COMMIT, 3)], merges="/mid", works=False)
    daemon, look = Daemon(handle), handle.blockJobInfo

    def look_or_end(target, flags):
        info = look(target, flags)
        if info and info["cur"] == 3:
            happens(handle)
            handle.is_begun = False
            daemon.is_away = is_away
            if is_away:
                raise failure(libvirt.VIR_ERR_RPC)
            return {}
        return info

    handle.blockJobInfo = look_or_end
    with pytest.raises(Refusal, match=said) as caught:
        merged(handle, "/mid", daemon=daemon)
    assert caught.value.code == "changed_meanwhile"
    assert handle.signs == [False]  # data may be below


def test_what_another_has_merged_when_the_job_is_to_begin_is_not_retired():
    handle = Running([None])

    def refuse(*_arguments):
        handle.chain = ["/top", "/base"]
        raise failure(libvirt.VIR_ERR_INVALID_ARG)

    handle.blockCommit = refuse
    with pytest.raises(Refusal, match="web: has got other disks meanwhile"):
        merged(handle, "/mid")


def test_images_without_numbers_are_known_by_their_paths():
    handle = Running([None, (COMMIT, 3)], merges="/mid")
    handle.numbers = dict.fromkeys(handle.numbers, "")
    merged(handle, "/mid")
    handle = Running([None, (COMMIT, 3)], merges="/base")
    handle.numbers = dict.fromkeys(handle.numbers, "")
    with pytest.raises(Refusal, match="web: has got other disks meanwhile"):
        merged_after(handle, put_another_below)


def test_an_image_that_has_none_below_any_more_is_not_merged():
    handle = Running([])
    handle.chain = ["/top"]
    with pytest.raises(Refusal, match="web: has got other disks meanwhile"):
        merged(handle, "/top")
    assert (handle.calls, handle.signs) == ([], [])


@pytest.mark.parametrize("happens", [lose_the_disk, start_on_another_image])
def test_what_is_gone_before_a_job_was_seen_is_not_merged(happens):
    handle = Running([])
    happens(handle)
    with pytest.raises(Refusal, match="web: has got other disks meanwhile"):
        merged(handle, "/mid", resumes=True)
    assert (handle.calls, handle.signs) == ([], [])


def test_a_daemon_that_is_started_anew_is_waited_for_and_the_job_found_again():
    handle = Running([None, *[(COMMIT, done) for done in (2, 3, 10)]], merges="/mid")
    daemon, look = Daemon(handle), handle.blockJobInfo

    def look_or_fail(target, flags):
        info = look(target, flags)
        if info and info["cur"] == 3 and not daemon.returns:
            daemon.is_away = True
            raise failure(libvirt.VIR_ERR_RPC)
        return info

    handle.blockJobInfo = look_or_fail
    assert merged(handle, "/mid", daemon=daemon) == [(2, 10)]  # the rest is done while nobody looks
    assert daemon.returns == 1
    assert len(handle.calls) == 1  # it was begun once
    assert handle.chain == ["/top", "/base"]


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_daemon_that_goes_while_it_is_told_to_begin(has_begun):
    handle = Running([None, (COMMIT, 3), (COMMIT, 10)], merges="/mid")
    daemon, start = Daemon(handle), handle.blockCommit

    def fail(*arguments):
        if has_begun:
            start(*arguments)
        handle.blockCommit = start
        daemon.is_away = True
        raise failure(libvirt.VIR_ERR_RPC)

    handle.blockCommit = fail
    merged(handle, "/mid", daemon=daemon)
    assert len(handle.calls) == 1
    assert handle.chain == ["/top", "/base"]


def test_a_domain_that_is_not_on_this_host_any_more_is_told():
    handle = Running([None, (COMMIT, 3)], merges="/mid")
    daemon = Daemon(handle)

    def vanish(_target, _flags):
        def look_up(_uuid):
            raise failure(libvirt.VIR_ERR_NO_DOMAIN)

        daemon.lookupByUUIDString = look_up
        raise failure(libvirt.VIR_ERR_OPERATION_INVALID)

    handle.blockJobInfo = vanish
    with pytest.raises(Refusal, match="web: is not on this host any more") as caught:
        merged(handle, "/mid", daemon=daemon)
    assert caught.value.code == "changed_meanwhile"


def test_a_signal_while_the_daemon_is_away_tells_that_the_job_goes_on():
    handle = Running([None, *[(COMMIT, 3)] * 1000], merges="/mid")
    daemon = Daemon(handle)

    def go_away(_target, _flags):
        daemon.is_away = True
        raise failure(libvirt.VIR_ERR_RPC)

    def wait(_seconds):
        os.kill(os.getpid(), signal.SIGTERM)
        with interruptible():
            pass

    handle.blockJobInfo, daemon.is_back = go_away, wait
    handle.is_begun = True
    with pytest.raises(GoesOn, match="SIGTERM"), ending_cleanly():
        merged(handle, "/mid", daemon=daemon, resumes=True)


@pytest.mark.parametrize("number, codes", [("7", []), ("8", ["block_job"]), ("", ["block_job"])])
def test_a_job_into_a_volume_is_known_by_the_number_of_the_image(number, codes):
    handle = Running([(ACTIVE, 3), (ACTIVE, 10)])
    volume = "<source pool='p' volume='v'{}/>"
    chain = f"<backingStore type='volume' index='{number}'>{volume.format('')}<backingStore/></backingStore>"
    mirror = f"<mirror type='volume' job='active-commit'>{volume.format(' index=' + repr('7'))}</mirror>"

    def text(_flags):
        is_below = handle.chain[0] != "/top"
        paths = volume.format(" index='7'") if is_below else "<source file='/top' index='9'/>"
        inner = "" if is_below else chain + mirror
        return f"<domain id='1'><devices><disk type='file'>{paths}{inner}<target dev='vda'/></disk></devices></domain>"

    handle.XMLDesc = text
    found = []
    try:
        merged(handle, "/top", resumes=True)
    except Refusal as exc:
        found.append(exc.code)
    assert found == codes
    assert handle.chain[0] == ("/top" if codes else "/mid")


def test_a_job_that_ends_too_early_is_told():
    with pytest.raises(Refusal, match="web: the merge of /mid ended before it was complete") as caught:
        merged(Running([None, (COMMIT, 3)], works=False), "/mid")
    assert caught.value.code == "libvirt_failed"
    assert caught.value.why.endswith("; libvirt has the domain go on with it")  # what QEMU has, it does not tell


def test_a_job_of_another_kind_is_left_alone():
    handle = Running([(COPY, 3), (COPY, 4)])
    with pytest.raises(Refusal, match="web: its disk vda has a block job of another kind .copy.") as caught:
        merged(handle, "/top")
    assert caught.value.code == "block_job"
    assert handle.calls == []
    assert handle.signs == []


def test_a_job_without_progress_is_given_up():
    handle = Running([None, *[(COMMIT, 3)] * 100], merges="/mid")
    with pytest.raises(Refusal, match="made no progress for 0 s and was given up"):
        merged(handle, "/mid", seconds=0.05)
    assert handle.calls[1:] == [0]
    assert handle.chain == ["/top", "/mid", "/base"]
    assert (handle.signs, handle.has_ended) == ([False], True)  # the sign stays, and a job that comes is not ours


def test_a_signal_gives_the_job_up_without_a_pivot():
    handle = Running([None, *[(COMMIT, number % 7) for number in range(1000)]], merges="/mid")

    def tell(done, _total):
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"), ending_cleanly():
        merge_down(Daemon(handle), Merge(DOMAIN, "vda", "/mid"), tell, 60, handle.begin)
    assert handle.calls[1:] == [0]
    assert handle.chain == ["/top", "/mid", "/base"]
    assert (handle.signs, handle.has_ended) == ([False], True)


def test_a_job_that_libvirt_refuses_leaves_no_sign():
    handle = Running([None], merges="/mid")

    def refuse(*_arguments):
        raise failure(libvirt.VIR_ERR_OPERATION_UNSUPPORTED)

    handle.blockCommit = refuse
    with pytest.raises(Refusal, match="libvirt could not merge /mid down"):
        merged(handle, "/mid")
    assert handle.signs == []


def test_a_daemon_that_tells_of_the_disk_before_it_knows_that_the_job_has_ended():
    handle = Running([None, (COMMIT, 3)], merges="/mid")
    daemon, look, tell = Daemon(handle), handle.blockJobInfo, handle.XMLDesc
    said = []

    def look_or_fail(target, flags):
        if handle.is_begun and not daemon.returns:
            daemon.is_away, handle.looks = True, []
            look(target, flags)  # it ends while the daemon is away
            said.append(old)
            raise failure(libvirt.VIR_ERR_RPC)
        return look(target, flags)

    old = tell(0)
    handle.XMLDesc = lambda flags: said.pop() if said else tell(flags)
    handle.blockJobInfo = look_or_fail
    assert merged(handle, "/mid", daemon=daemon) == []
    assert handle.chain == ["/top", "/base"]


class Asked(Daemon):
    """A daemon that is asked for the jobs of the domain and of its disk."""

    def __init__(self, of_disk=None, operation=None):
        super().__init__(Running([(of_disk, 1)] * 9 if of_disk is not None else []))
        self._operation = operation
        self.answers = [True]  # when it is asked: whether it answers, None if it is away
        (self.disk,) = running_disks(self._handle.XMLDesc(0))

    def jobStats(self, _flags):  # noqa: N802  libvirt's name
        return {"type": 0} if self._operation is None else {"type": 2, "operation": self._operation}

    def blockJobInfo(self, target, flags):  # noqa: N802
        return self._handle.blockJobInfo(target, flags)

    def is_back(self, seconds, *, can_end=True):
        assert not can_end
        return super().is_back(seconds)

    def in_time(self, _uuid, ask):
        answer = self.answers.pop(0)
        if answer is None:
            self.is_away = True
            raise failure(libvirt.VIR_ERR_RPC)
        if not answer:
            raise TimeoutError
        return ask(self)

    def snapshot(self):
        return code_of(lambda: check_no_job(self, DOMAIN, "vda"))

    def merge(self, resumes=False):
        return code_of(lambda: check_may_merge(self, Merge(DOMAIN, "vda", "/top", resumes=resumes), self.disk))


def code_of(check):
    try:
        check()
    except Refusal as exc:
        return exc.code
    return None


MIGRATION = libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
BACKUP_OF_DOMAIN = libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP


@pytest.mark.parametrize(
    "of_disk, operation, snapshot, merge, resumed",
    [
        (None, None, None, None, None),
        (ACTIVE, None, "block_job", "block_job", None),
        (COMMIT, None, "block_job", "block_job", None),
        (COPY, None, "block_job", "block_job", "block_job"),
        (BACKUP, BACKUP_OF_DOMAIN, "block_job", "block_job", "block_job"),
        (None, BACKUP_OF_DOMAIN, "block_job", None, None),  # of another disk
        (None, MIGRATION, "block_job", "block_job", "block_job"),
    ],
)
def test_which_job_is_in_the_way_of_what(of_disk, operation, snapshot, merge, resumed):
    assert Asked(of_disk, operation).snapshot() == snapshot
    assert Asked(of_disk, operation).merge() == merge
    assert Asked(of_disk, operation).merge(resumes=True) == resumed


def test_a_merge_does_not_go_on_with_a_job_that_writes_to_another_image():
    daemon = Asked(ACTIVE)
    for place, code in ((2, "block_job"), (1, None)):
        daemon.answers = [True]
        daemon.disk = daemon.disk._replace(mirror=Mirror("active-commit", daemon.disk.images[place]))
        assert daemon.merge(resumes=True) == code


def test_a_qemu_that_does_not_tell_of_its_jobs_is_not_waited_for():
    daemon = Asked()
    daemon.answers = [False]
    assert daemon.snapshot() == "libvirt_failed"


def test_a_daemon_that_is_started_anew_is_asked_for_the_jobs_again():
    daemon = Asked(COPY)
    daemon.answers = [None, True]
    assert (daemon.snapshot(), daemon.returns) == ("block_job", 1)
    daemon.answers, daemon.is_back = [None], lambda _seconds, **_more: False
    assert daemon.snapshot() == "libvirt_failed"
