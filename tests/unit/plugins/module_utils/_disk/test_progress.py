# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What other processes can read of a commit: while the data of a real one moves, and of runs that were killed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.signals import ending_cleanly
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk import progress
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.commit import CommitRequest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.merge import MergeLayers
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._disk.run import run

from .. import qemu
from .overlays import SETTINGS

REQUEST = CommitRequest("/srv/top\udcff", "/srv/base", vm="web")


@pytest.fixture(name="folder")
def fixture_folder(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(progress, "FOLDER", str(folder))
    return folder


def test_what_is_told_and_that_it_goes(folder):
    with progress.telling(REQUEST) as tell:
        assert list(folder.iterdir()) == []
        tell(25, 100)
        (file,) = folder.iterdir()
        assert file.name.startswith(f"{os.getpid()}-")
        assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)
        about = json.loads(file.read_text())
        assert about.pop("begun") <= about.pop("updated") <= time.time()
        assert about.pop("bytes_per_second") >= 0
        assert about == {
            "path": "/srv/top\\udcff",
            "backing_file": "/srv/base",
            "vm": "web",
            "pid": os.getpid(),
            "bytes": 25,
            "total_bytes": 100,
            "percent": 25.0,
        }
        tell(0, 0)
        assert json.loads(file.read_text())["percent"] == 100.0
    assert list(folder.iterdir()) == []


def test_how_far_all_merges_of_the_host_are(folder):
    assert progress.how_far() == frozenset()
    with progress.telling(REQUEST) as tell:
        tell(25, 100)
        assert progress.how_far() == {(os.getpid(), 25)}
        tell(26, 100)
        assert progress.how_far() == {(os.getpid(), 26)}
        (folder / f"{_gone()}-1.json").write_text(json.dumps({"pid": _gone(), "bytes": 1, "vm": "web"}))
        assert progress.how_far() == {(os.getpid(), 26)}
    assert progress.how_far() == frozenset()


def test_the_end_of_another_run_is_awaited_if_it_merges_the_same_vm(folder):
    folder.mkdir()
    with subprocess.Popen(["sleep", "1"]) as other:
        (folder / f"{other.pid}-1.json").write_text(json.dumps({"pid": other.pid, "bytes": 1, "vm": "web"}))
        assert not progress.await_merges_of({"db"}, 60)
        # Whoever starts a process has to take note of its end.
        waiter = threading.Thread(target=other.wait)
        waiter.start()
        assert progress.await_merges_of({"db", "web"}, 60)
        assert other.returncode == 0
        waiter.join()
    assert not progress.await_merges_of({"web"}, 60)


def test_a_run_that_does_not_move_on_is_not_awaited_for_ever(folder):
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (folder / f"{other.pid}-1.json").write_text(json.dumps({"pid": other.pid, "bytes": 1, "vm": "web"}))
        begun = time.monotonic()
        assert progress.await_merges_of({"web"}, 0.5)
        assert 0.5 < time.monotonic() - begun < 30
        other.kill()


def test_a_signal_ends_the_wait_for_another_run_with_a_message(folder):
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other, ending_cleanly():
        (folder / f"{other.pid}-1.json").write_text(json.dumps({"pid": other.pid, "bytes": 1, "vm": "web"}))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Refusal, match=f"ended by SIGTERM while it waited for process {other.pid}") as caught:
            progress.await_merges_of({"web"}, 60)
        assert caught.value.code == "interrupted"
        other.kill()


def _gone() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_two_at_a_time_have_a_file_each(folder):
    with progress.telling(REQUEST) as one, progress.telling(REQUEST) as other:
        one(1, 2)
        other(2, 2)
        assert len(list(folder.iterdir())) == 2
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_has_left_goes_and_that_of_a_living_one_stays(folder):
    folder.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"{dead.pid}-1.json", f"{dead.pid}-1.json.new", f"{os.getppid()}-7.json"):
        (folder / name).touch()
    with progress.telling(REQUEST):
        assert [file.name for file in folder.iterdir()] == [f"{os.getppid()}-7.json"]


ODD_TEXTS = (b"", b"\xff\xfe{", b'{"pid": 1, "by', b"[1]", b'{"pid": "x", "bytes": 1, "vm": "web"}', b'{"pid": 1}')


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_that_is_not_whole_tells_nothing(folder, text):
    folder.mkdir()
    (folder / f"{os.getppid()}-1.json").write_bytes(text)
    with progress.telling(REQUEST) as tell:
        tell(25, 100)
        assert progress.how_far() == {(os.getpid(), 25)}
    assert not progress.await_merges_of({"web"}, 60)


def test_what_is_no_file_is_not_waited_for(folder, tmp_path):
    folder.mkdir()
    (tmp_path / "bait").write_text(json.dumps({"pid": 1, "bytes": 1, "vm": "web"}))
    os.mkfifo(folder / "1-1.json")
    (folder / "1-2.json").mkdir()
    (folder / "1-3.json").symlink_to(tmp_path / "bait")
    (folder / f"{_gone()}-1.json").mkdir()
    (folder / f"{_gone()}-2.json").touch()
    with progress.telling(REQUEST):
        assert sorted(one.is_file() for one in folder.iterdir()) == [False, False, False, True]
        assert progress.how_far() == frozenset()


def test_what_stands_in_the_place_of_the_next_text_is_not_written_to(folder, tmp_path):
    (tmp_path / "bait").write_text("bait")
    lures = (lambda place: os.link(tmp_path / "bait", place), os.mkfifo, lambda place: place.symlink_to("bait"))
    for lure in lures:
        with progress.telling(REQUEST) as tell:
            tell(1, 100)
            (file,) = folder.iterdir()
            lure(file.with_name(f"{file.name}.new"))
            tell(25, 100)
            assert progress.how_far() == {(os.getpid(), 25)}
    assert ((tmp_path / "bait").read_text(), list(folder.iterdir())) == ("bait", [])


@pytest.mark.parametrize("kind", ["of another user", "for all", "a symlink"])
def test_in_a_folder_of_others_nothing_is_told_believed_or_removed(folder, tmp_path, monkeypatch, kind):
    real = tmp_path / "real" if kind == "a symlink" else folder
    real.mkdir()
    if kind == "a symlink":
        folder.symlink_to(real)
    elif kind == "for all":
        real.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(real, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    theirs = {f"{os.getppid()}-1.json", f"{_gone()}-1.json"}
    for name in theirs:
        (real / name).write_text(json.dumps({"pid": os.getppid(), "bytes": 1, "vm": "web"}))
    with progress.telling(REQUEST) as tell:
        tell(25, 100)
        assert progress.how_far() == frozenset()
        assert set(os.listdir(real)) == theirs
    assert not progress.await_merges_of({"web"}, 60)


def test_where_nothing_can_be_told_the_work_goes_on(folder):
    folder.parent.joinpath("file").touch()
    progress.FOLDER = str(folder.parent / "file" / "run")
    with progress.telling(REQUEST) as tell:
        tell(1, 2)


def test_a_real_commit_tells_how_far_it_is(tmp_path, folder):
    base = qemu.create(tmp_path / "base", "256M")
    top = qemu.create(tmp_path / "top", "256M", "-b", base, "-F", "qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 200M", top], check=True, stdout=subprocess.DEVNULL)
    seen = []
    stop = threading.Event()

    def look():
        while not stop.wait(0.05):
            seen.extend(json.loads(file.read_text()) for file in folder.glob("*.json") if file.exists())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        request = CommitRequest(top, base, vm="web", speed=96 << 20)
        outcome = run(MergeLayers(), [request], SETTINGS)
    finally:
        stop.set()
        reader.join()
    assert [verdict.state for verdict in outcome.verdicts] == ["committed"]
    assert {(one["path"], one["backing_file"], one["vm"]) for one in seen} == {(top, base, "web")}
    done = [one["bytes"] for one in seen]
    assert done == sorted(done)
    assert any(0 < one["percent"] < 100 for one in seen)
    assert list(folder.iterdir()) == []
