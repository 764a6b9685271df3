# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Keep: what the bitmaps of an image say, beside it, before anything is opened for writing.

A kill while QEMU opens an image with bitmaps for writing loses all of them, names included. So their bits, and the
names of those of the image on top that takes part, go into a vault first: a small qcow2 image that holds nothing but
bitmaps, and is never opened for writing once it is there::

    b/NAME    a bitmap of the image beside which the vault lies, with its bits
    o/NAME    a bitmap of the topmost image; its bits are there
    d…/NAME   a bitmap that must not become usable; the letter tells why
    t/TOKEN   which work it is; the mark in the topmost image has the same token
    i/DEV:INO the topmost image's file
    p/PATH    its path, as it was asked for
    l/DEV:INO:PATH  an image between the two
    g/DEV:INO:GEN   the generation of one of these files, since another one can have its number when it is gone

The vault of a commit lies beside the image that all goes into. That of a healing has another name, and lies beside the
image whose bitmaps are written anew, which is the topmost one that it knows; the topmost one of the chain is among the
others.
"""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import Identity, OpenImage, close, open_image
from .._qcow2.bitmaps import MAX_BITMAP_NAME, Bitmap
from .._qcow2.dirty import DirtyBits, DirtyMap, is_union, maps_of, united
from .._qcow2.image import Image, read_image
from .._qcow2.scratch import write_scratch
from .fates import DISABLED, GAP, INCONSISTENT
from .publish import open_to_list

MAX_NAME = MAX_BITMAP_NAME - 3  # bytes of a bitmap's name that a vault can keep
MARK = "kvmfleet-carried-"  # begins the name of the mark, an empty bitmap in the topmost image
SUFFIX = ".kvmfleet-vault"
_HEALING = ".kvmfleet-healing"  # of a vault that no commit knows
_GIVEN = "-given"  # behind the suffix, once all work on the bitmaps is done
_FLAT = Bitmap("", 65536, recording=False, inconsistent=False)  # of what is told by its name alone
_DEAD = {DISABLED: "dd/", INCONSISTENT: "di/", GAP: "dg/"}


class Kept(t.NamedTuple):
    """A bitmap and its bits."""

    bitmap: Bitmap
    bits: DirtyMap


class Vault(t.NamedTuple):
    """What was kept."""

    path: str
    token: str
    top: Identity  # of the topmost image that takes part
    top_path: str | None  # None if it is longer than the name of a bitmap can be
    others: t.Sequence[tuple[Identity, str]]  # identity and path of the images between the two
    generations: t.Mapping[Identity, int]  # of these files, as far as their file systems say
    below: t.Mapping[str, Kept]  # bitmaps of the image beside which it lies
    above: t.Mapping[str, Bitmap]  # bitmaps of the topmost image
    dead: t.Mapping[str, str]  # by name, why a bitmap must not become usable
    is_given: bool  # whether all work on the bitmaps is done
    given_at: int  # ns since 1970; when it was renamed last

    def is_of(self, identity: Identity, path: str, generation: int | None) -> bool:
        """Whether this file is the topmost image that takes part; by its number alone if its generation is unknown."""
        return self._is_same(identity, path, generation, (self.top, self.top_path))

    def took_in(self, identity: Identity, path: str, generation: int | None) -> bool:
        """Whether this file is an image between the two."""
        return any(self._is_same(identity, path, generation, other) for other in self.others)

    def _is_same(
        self, identity: Identity, path: str, generation: int | None, kept: tuple[Identity, str | None]
    ) -> bool:
        known = self.generations.get(kept[0])
        return _is_same(identity, path, *kept) and (None in (known, generation) or known == generation)

    @property
    def place(self) -> str:
        """The path of a vault of unfinished work."""
        return self.path[: -len(_GIVEN)] if self.is_given else self.path


def _is_same(identity: Identity, path: str, kept: Identity, kept_path: str | None) -> bool:
    """Whether a file is one that was kept in mind. Devices can have other numbers once the host was started anew."""
    if identity == kept:
        return True
    return identity[1] == kept[1] and kept_path is not None and os.path.realpath(path) == os.path.realpath(kept_path)


def place_of(real_path: str, is_device: bool, top_real_path: str) -> str:
    """Return where the vault of an image is: beside it, or, if that is a block device, beside the image on top."""
    beside = top_real_path if is_device else real_path
    return os.path.join(os.path.dirname(beside), f".{os.path.basename(beside)}{SUFFIX}")


def healing_place(real_path: str, folder: str) -> str:
    """Return where the vault of an image is while its bitmaps are healed; `folder` is its own, unless that is /dev."""
    return os.path.join(folder, f".{os.path.basename(real_path)}{_HEALING}")


def find_vault(place: str) -> str | None:
    """Return the path of the vault, of unfinished work or of work that is done; None if there is none."""
    return next((path for path in (place, place + _GIVEN) if os.path.lexists(path)), None)


def open_vault(path: str) -> OpenImage:
    """Open a vault; Refusal if somebody else has put it there."""
    file = open_image(path)
    if file.status().st_uid in (0, os.geteuid()):
        return file
    file.close()
    why = "has the name of a vault of this collection, but belongs to another user, so it is not trusted"
    raise Refusal("unfinished", path, why, "Find out who has put it there, and remove it.")


def read_vault(file: OpenImage) -> Vault:
    """Return what the open vault holds; Refusal if that is not what a vault holds. `file` must stay open."""
    try:
        image = read_image(file)
        maps = maps_of(file, image)
    except Refusal as exc:
        raise _no_vault(file.path) from exc
    named = {kind: {n[len(kind) :]: b for n, b in _by_name(image).items() if n.startswith(kind)} for kind in _KINDS}
    try:
        token = next(iter(named["t/"]))
        top = _identity(*next(iter(named["i/"])).split(":"))
        others = [_named_file(*word.split(":", 2)) for word in named["l/"]]
        generations = {one: int(number) for one, number in (_named_file(*w.split(":", 2)) for w in named["g/"])}
    except (StopIteration, ValueError, TypeError) as exc:
        raise _no_vault(file.path) from exc
    if image.lost_bitmaps or any(bitmap.inconsistent for bitmap in image.bitmaps):
        raise _no_vault(file.path)  # somebody has opened it for writing
    return Vault(
        path=file.path,
        token=token,
        top=top,
        top_path=next(iter(named["p/"]), None),
        others=others,
        generations=generations,
        below={name: Kept(bitmap._replace(name=name), maps["b/" + name]) for name, bitmap in named["b/"].items()},
        above={name: bitmap._replace(name=name) for name, bitmap in named["o/"].items()},
        dead={name: reason for reason, kind in _DEAD.items() for name in named[kind]},
        is_given=file.path.endswith(SUFFIX + _GIVEN),
        given_at=file.status().st_ctime_ns,
    )


def _no_vault(path: str) -> Refusal:
    remedy = "If no commit and no healing was interrupted here, move it away; else make a full backup after that."
    why = "has the name of a vault of this collection but is none"
    return Refusal("unfinished", path, why, remedy)


_KINDS = ("b/", "o/", "t/", "i/", "p/", "l/", "g/", *_DEAD.values())


def _identity(device: str, inode: str) -> Identity:
    return int(device), int(inode)


def _named_file(device: str, inode: str, path: str) -> tuple[Identity, str]:
    return _identity(device, inode), path


def _by_name(image: Image) -> dict[str, Bitmap]:
    return {bitmap.name: bitmap for bitmap in image.bitmaps}


class Content(t.NamedTuple):
    """What goes into a new vault."""

    token: str
    top: OpenImage
    others: t.Sequence[OpenImage]  # between the two
    below: t.Sequence[tuple[Bitmap, t.Sequence[DirtyBits]]]  # with the maps whose union is kept
    above: t.Sequence[Bitmap]
    dead: t.Mapping[str, str]
    virtual_size: int  # bytes; of the larger one of the two images

    @property
    def generations(self) -> dict[Identity, int]:
        """The generations of the files, as far as their file systems say."""
        found = {file.identity: file.generation for file in (self.top, *self.others)}
        return {identity: number for identity, number in found.items() if number is not None}


def write_vault(fd: int, content: Content) -> None:
    """Make the open, empty file a vault."""
    size = content.virtual_size
    words = [f"t/{content.token}", "i/{}:{}".format(*content.top.identity), f"p/{content.top.path}"]
    words += ["l/{}:{}:{}".format(*file.identity, file.path) for file in content.others]
    words += ["g/{}:{}:{}".format(*identity, number) for identity, number in content.generations.items()]
    words = [word for word in words if len(os.fsencode(word)) <= MAX_BITMAP_NAME]  # of a longer path nothing is known
    words += [f"{_DEAD[reason]}{name}" for name, reason in content.dead.items()]
    with_bits = [
        (bitmap._replace(name="b/" + bitmap.name), united(maps, bitmap.granularity, size))
        for bitmap, maps in content.below
    ]
    names_only = [
        *(bitmap._replace(name="o/" + bitmap.name) for bitmap in content.above),
        *(_FLAT._replace(name=word) for word in words),
    ]
    write_scratch(fd, size, [*with_bits, *((bitmap, ()) for bitmap in names_only)])


def holds(vault: Vault, content: Content) -> bool:
    """Whether a vault that was read back is what was to be written, bit by bit."""
    below = {bitmap.name: (bitmap, maps) for bitmap, maps in content.below}
    return (
        (vault.token, vault.top, dict(vault.dead)) == (content.token, content.top.identity, dict(content.dead))
        and vault.generations == content.generations
        and vault.above == {bitmap.name: bitmap for bitmap in content.above}
        and {name: kept.bitmap for name, kept in vault.below.items()} == {n: one for n, (one, _m) in below.items()}
        and all(is_union(vault.below[name].bits, maps, content.virtual_size) for name, (_b, maps) in below.items())
    )


def is_as_kept(vault: Vault, bitmaps: t.Mapping[str, Bitmap], maps: t.Mapping[str, DirtyBits], size: int) -> bool:
    """Whether the image beside which the vault lies still has just the bitmaps that were kept, bit by bit."""
    kept = {name: one.bitmap for name, one in vault.below.items()}
    consistent = {name: bitmap for name, bitmap in bitmaps.items() if not bitmap.inconsistent}
    return kept == consistent and all(is_union(maps[name], [vault.below[name].bits], size) for name in kept)


def mark_given(vault_path: str) -> None:
    """Say beside the image that all work on its bitmaps is done, in the vault's name."""
    _rename(vault_path, vault_path + _GIVEN)


def take_back(vault_path: str) -> None:
    """Say that the work is unfinished again, because the topmost image was written to since."""
    _rename(vault_path, vault_path[: -len(_GIVEN)])


def _rename(path: str, new: str) -> None:
    with _folder_of(path) as folder_fd:
        os.rename(os.path.basename(path), os.path.basename(new), src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        os.fsync(folder_fd)


def remove_vault(path: str) -> None:
    """Remove a vault whose work is done, or was never begun."""
    with _folder_of(path) as folder_fd:
        os.unlink(os.path.basename(path), dir_fd=folder_fd)
        os.fsync(folder_fd)


def sync_folder_of(path: str) -> None:
    """Have the name of the file on stable storage; a killed run may have put it there, or taken it away."""
    with _folder_of(path) as folder_fd:
        os.fsync(folder_fd)


@contextlib.contextmanager
def _folder_of(path: str) -> t.Iterator[int]:
    """Have the folder of a path open for the block."""
    folder_fd, _real = open_to_list(os.path.dirname(path))
    try:
        yield folder_fd
    finally:
        close(folder_fd)
