# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The name of the backing file, changed in place: what QEMU makes of it, and what a kill leaves."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.files import OpenImage, open_image
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2 import backing
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.backing import (
    change_backing_file,
    recorded_name,
    why_not_changeable,
)
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.bitmaps import Bitmap
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._qcow2.mark import Mark, write_mark

from .. import qemu

BITMAPS = (Bitmap("monday", 65536, True, False), Bitmap("broken", 65536, True, True), Bitmap("off", 512, False, False))
MARK = Mark("4dea22b3-1d52-d8f3-2516-782e98ab3fa0", "vda", "weekly")


@pytest.fixture(name="images")
def fixture_images(tmp_path, monkeypatch):
    """Have BASE, of which one name is as good as another, and an overlay with bitmaps and data, in this folder."""
    monkeypatch.chdir(tmp_path)
    base = qemu.create(tmp_path / "base.qcow2", "8M")
    subprocess.run(["qemu-io", "-c", "write -P 5 1M 1M", base], check=True, stdout=subprocess.DEVNULL)
    return base


def overlay_of(base, *options, bitmaps=BITMAPS):
    """Return a new overlay with bitmaps and a mark."""
    path = qemu.create(os.path.join(os.path.dirname(base), "over.qcow2"), "8M", "-b", base, "-F", "qcow2", *options)
    with open(path, "r+b") as file:
        write_mark(OpenImage(path, file.fileno()), MARK)
    qemu.add_bitmaps(path, bitmaps)
    subprocess.run(["qemu-io", "-c", "write -P 6 4M 1M", path], check=True, stdout=subprocess.DEVNULL)
    return path


def change(path, name, backing_format="qcow2"):
    """Change the name; what is told beforehand must be what happens."""
    with open_image(path) as file:
        told = why_not_changeable(file, name, backing_format)
        if told is None:
            change_backing_file(file, name, backing_format)
            return
        with pytest.raises(Refusal) as raised:
            change_backing_file(file, name, backing_format)
        assert raised.value == told
        raise told


def without_name(path):
    """Return what our reader and QEMU say of the image, but for the name of its backing file."""
    said = qemu.info(path)
    for name in ("backing-filename", "full-backing-filename", "actual-size", "children"):
        said.pop(name, None)
    return qemu.read(path)._replace(backing_file=None), said


def name_of(length, folder):
    """Return a name of BASE that is so long: a plain one, a relative one, or a long way round."""
    if length < 3:
        os.link(f"{folder}/base.qcow2", f"{folder}/{'b' * length}")
        return "b" * length
    return "./" * ((length - 10) // 2) + ("" if length % 2 == 0 else "/") + "base.qcow2"


@pytest.mark.parametrize("length", [1, 2, 10, 100, 511, 512, 513, 1022, 1023])
@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=4096"), ("-o", "extended_l2=on,cluster_size=2M")])
def test_qemu_reads_the_new_name_and_writes_the_header_anew(images, tmp_path, length, options):
    path = overlay_of(images, *options)
    name = name_of(length, tmp_path)
    assert len(name) == length
    before = without_name(path)
    change(path, name)
    assert qemu.info(path)["backing-filename"] == qemu.read(path).backing_file == name
    assert without_name(path) == before
    with open_image(path) as file:
        assert recorded_name(file) == name
    qemu.qemu_img("check", "-q", path)
    # Opened for writing, QEMU writes the header anew; so does rebase -u.
    subprocess.run(["qemu-io", "-c", "write -P 7 6M 64k", path], check=True, stdout=subprocess.DEVNULL)
    assert qemu.info(path)["backing-filename"] == name
    assert qemu.read(path).mark == MARK
    assert qemu.bitmaps_of(path) >= {("monday", 65536, True, False), ("off", 512, False, False)}
    subprocess.run(["qemu-io", "-c", "read -P 5 1M 1M", "-c", "read -P 6 4M 1M", path], check=True)
    qemu.qemu_img("rebase", "-u", "-b", images, "-F", "qcow2", path)
    assert qemu.read(path).backing_file == images
    change(path, name)
    qemu.qemu_img("check", "-q", path)
    assert qemu.read(path).backing_file == name


def test_an_image_of_version_2(images):
    path = qemu.create("v2.qcow2", "8M", "-o", "compat=0.10", "-b", images, "-F", "qcow2")
    before = without_name(path)
    change(path, "./base.qcow2")
    assert qemu.info(path)["backing-filename"] == "./base.qcow2"
    assert without_name(path) == before
    qemu.qemu_img("check", "-q", path)


def test_a_name_that_is_recorded_already_is_not_written(images, monkeypatch):
    path = overlay_of(images)
    monkeypatch.setattr(os, "pwrite", None)
    change(path, images)


def test_changing_it_to_and_fro_does_not_fill_the_header(images):
    path = overlay_of(images, "-o", "cluster_size=512", bitmaps=())
    for _round in range(20):
        change(path, "base.qcow2")
        change(path, images)
    assert qemu.info(path)["backing-filename"] == images
    qemu.qemu_img("check", "-q", path)


def refusal(path, name, backing_format="qcow2"):
    with open(path, "rb") as file:
        before = file.read()
    with pytest.raises(Refusal) as raised:
        change(path, name, backing_format)
    with open(path, "rb") as file:
        assert file.read() == before
    return raised.value


def test_no_room(images):
    path = overlay_of(images, "-o", "cluster_size=512", bitmaps=())
    said = refusal(path, "x" * 500)
    assert said.code == "header_fixed"
    assert "512 bytes of its header have no room for 500 more" in said.why


def test_names_that_cannot_be(images):
    path = overlay_of(images, bitmaps=())
    assert refusal(path, "x" * 1024).code == "name_too_long"
    for name in ("", "a\0b", "nbd:localhost"):
        assert refusal(path, name).code == "bad_name"


def test_another_format_or_none(images, tmp_path):
    path = overlay_of(images, bitmaps=())
    said = refusal(path, "base.qcow2", "raw")
    assert said.code == "header_fixed"
    assert "records qcow2 as the format of its backing file, not raw" in said.why
    with open(path, "rb") as file:
        place = file.read(4096).index(struct.pack(">II", 0xE2792ACA, 5))
    qemu.patch(path, place, b"kvmx")  # an extension that nobody knows
    assert "records no format" in refusal(path, "base.qcow2").why
    assert refusal(images, "base.qcow2").code == "differs"


def test_extensions_without_an_end(images):
    path = overlay_of(images, bitmaps=())
    with open(path, "rb") as file:
        start, length = struct.unpack_from(">QI", file.read(4096), 8)
    # The name in the place of the end, as other programs than QEMU may have it.
    qemu.patch(path, start - 8, images.encode() + bytes(8))
    qemu.patch(path, 8, struct.pack(">QI", start - 8, length))
    assert qemu.info(path)["backing-filename"] == images
    said = refusal(path, "base.qcow2")
    assert (said.code, "no explicit end" in said.why) == ("header_fixed", True)
    qemu.qemu_img("rebase", "-u", "-b", images, "-F", "qcow2", path)  # the remedy
    change(path, "base.qcow2")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(5))
def test_a_kill_leaves_the_old_name_or_the_new_one(images, monkeypatch, step):
    path = overlay_of(images)
    before, calls = without_name(path), []

    def killed_at(name):
        real = getattr(os, name)

        def call(*args):
            calls.append(name)
            if len(calls) == step + 1:
                raise Killed
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("pwrite", "fsync"):
            patch.setattr(backing.os, name, killed_at(name))
        if step < 4:
            with pytest.raises(Killed):
                change(path, "./base.qcow2")
        else:
            change(path, "./base.qcow2")
            assert calls == ["pwrite", "fsync", "pwrite", "fsync"]
    assert qemu.info(path)["backing-filename"] == (images if step < 3 else "./base.qcow2")
    assert without_name(path) == before
    qemu.qemu_img("check", "-q", path)
    change(path, "./base.qcow2")
    assert qemu.info(path)["backing-filename"] == "./base.qcow2"


def test_parts_of_the_name_and_of_the_pointer(images, monkeypatch):
    path, real = overlay_of(images), os.pwrite
    monkeypatch.setattr(backing.os, "pwrite", lambda fd, data, at: real(fd, data[:5] if at > 8 else data, at))
    change(path, "./base.qcow2")
    assert qemu.info(path)["backing-filename"] == "./base.qcow2"
    monkeypatch.setattr(backing.os, "pwrite", lambda fd, data, at: real(fd, data, at) if at > 8 else 3)
    with open_image(path) as file, pytest.raises(Refusal, match="only in part"):
        change_backing_file(file, images, "qcow2")


def test_what_was_not_written_is_noticed(images, monkeypatch):
    path = overlay_of(images)
    monkeypatch.setattr(backing.os, "pwrite", lambda _fd, data, _at: len(data))
    with open_image(path) as file, pytest.raises(Refusal, match="does not say so"):
        change_backing_file(file, "./base.qcow2", "qcow2")


@pytest.mark.parametrize("data", [b"", b"QFI", b"QFI\xfb", b"raw" * 400, b"QFI\xfb" + b"\xff" * 2000])
def test_what_has_no_name(tmp_path, data):
    (tmp_path / "file").write_bytes(data)
    with open_image(str(tmp_path / "file")) as file:
        assert recorded_name(file) is None
