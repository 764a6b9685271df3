# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Keep: what the bitmaps of an image say, beside it, before anything is opened for writing.

A kill while QEMU opens an image with bitmaps for writing loses all of them, names included. So their bits, and the
names of those of the image on top that takes part, go into a vault first: a small qcow2 image that holds nothing but
bitmaps, and is never opened for writing once it is there::

    b/NAME    a bitmap of the image beside which the vault lies, with its bits
    o/NAME    a bitmap of the topmost image, with its bits
    d…/NAME   a bitmap that must not become usable; the letter tells why
    t/TOKEN   which work it is; the mark in the topmost image has the same token
    i/DEV:INO the topmost image's file
    p/PATH    its path, as it was asked for
    m/TIME    when it was last written to, in ns since 1970
    n/TIME    when it was made, in ns since 1970, if it says so itself
    l/DEV:INO:PATH  an image between the two
    g/DEV:INO:GEN   the generation of one of these files, since another one can have its number when it is gone
    h/held    what the image of a healing held itself; of a commit what all images held together that go in
    f/NAME    of a healing, the backing file that the image recorded; empty if it had none
    k/NAME    a bitmap of those with bits whose checkpoint libvirt knew

The vault of a commit lies beside the image that all goes into. That of a healing has another name, and lies beside the
image whose bitmaps are written anew, which is the topmost one that it knows; the topmost one of the chain is among the
others. Once all work on the bitmaps is done, either has another name, and nothing is ever taken from it again.
"""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import Identity, OpenImage, close, exceeded_name_max, is_ours, is_there, open_image
from .._qcow2.bitmaps import MAX_BITMAP_NAME, Bitmap
from .._qcow2.chain import walk_chain
from .._qcow2.dirty import DirtyBits, DirtyMap, is_union, maps_of, united
from .._qcow2.formats import QCOW2
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
    top_changed: int | None  # ns since 1970; releases before 1.0.1 did not keep it
    others: t.Sequence[tuple[Identity, str]]  # identity and path of the images between the two
    generations: t.Mapping[Identity, int]  # of these files, as far as their file systems say
    below: t.Mapping[str, Kept]  # bitmaps of the image beside which it lies
    above: t.Mapping[str, Kept]  # bitmaps of the topmost image; releases before 1.0.1 kept no bits of them
    dead: t.Mapping[str, str]  # by name, why a bitmap must not become usable
    is_given: bool  # whether all work on the bitmaps is done
    given_at: int  # ns since 1970; when it was renamed last
    held: DirtyMap | None = None  # what the topmost image held, and those between; older releases do not keep it
    backing_file: str | None = None  # that the topmost one recorded; None if that is not known
    top_made: int = 0  # ns since 1970, as the topmost image says itself; 0 if that is not known
    written_at: int = 0  # ns since 1970; when it was written, as a copy says, too
    known: frozenset[str] = frozenset()  # of those, whose checkpoints libvirt knew; older releases do not keep it

    def is_of(self, identity: Identity, path: str, generation: int | None) -> bool:
        """Whether this file is the topmost image that takes part; by its number alone if its generation is unknown."""
        return self._is_same(identity, path, generation, (self.top, self.top_path))

    def is_between(self, identity: Identity, path: str, generation: int | None) -> bool:
        """Whether this file is an image between the two; by its number alone if its generation is unknown."""
        return any(self._is_same(identity, path, generation, other) for other in self.others)

    def without(self, names: t.Collection[str]) -> Vault:
        """Return what was kept without these bitmaps."""
        below, above = (
            {name: kept for name, kept in bitmaps.items() if name not in names} for bitmaps in (self.below, self.above)
        )
        return self._replace(below=below, above=above)

    def took_in(self, file: OpenImage) -> bool:
        """Whether this file is an image between the two that has gone in.

        A new file can have the number of one that is gone. Where no generation tells, the time does: nobody writes to
        an image that has gone in.
        """
        known = file.generation is not None and file.identity in self.generations
        is_newer = not (known or file.is_device) and file.status().st_mtime_ns > self.given_at
        return not is_newer and self.is_between(file.identity, file.path, file.generation)

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


def healing_place(name: str, folder: str) -> str:
    """Return where the vault of an image is while its bitmaps are healed; `folder` is its own, unless that is /dev."""
    return os.path.join(folder, f".{name}{_HEALING}")


def healings_of_none(folder: str) -> list[str]:
    """Return the paths of the vaults of healings in a folder that has no file of the name of their image."""
    found = []
    for name in sorted(os.listdir(folder)):
        stem = name[: -len(_GIVEN)] if name.endswith(_GIVEN) else name
        if (
            name.startswith(".")
            and stem.endswith(_HEALING)
            and not is_there(os.path.join(folder, stem[1 : -len(_HEALING)]))
        ):
            found.append(os.path.join(folder, name))
    return found


def why_no_vault(place: str, path: str) -> Refusal | None:
    """Return why no vault can be at this place, which is that of the image at `path`; None if one can."""
    longest = exceeded_name_max(place + _GIVEN)
    if longest is None:
        return None
    why = f"has a long name: with what a vault adds to it, it is more than the {longest} bytes of its file system"
    return Refusal("name_too_long", path, why, "Rename the image, and what refers to it.")


def find_vault(place: str) -> str | None:
    """Return the path of the vault, of unfinished work or of work that is done; None if there is none."""
    return next((path for path in (place, place + _GIVEN) if is_there(path)), None)


def open_vault(path: str) -> OpenImage:
    """Open a vault; Refusal if somebody else has put it there."""
    file = open_image(path)
    status = file.status()
    if is_ours(status):
        return file
    file.close()
    why = (
        f"has the name of a vault of this collection, but belongs to another user ({status.st_uid}), so it is not "
        "trusted"
    )
    remedy = (
        "If a run of this collection was killed here, run the same call as that user (become_user). Only if none was, "
        "remove it: of unfinished work it can be the only file that has the bitmaps, and without it the next backups "
        "must be full ones."
    )
    raise Refusal("unfinished", path, why, remedy)


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
        top_changed, top_made = next(map(int, named["m/"]), None), next(map(int, named["n/"]), 0)
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
        top_changed=top_changed,
        others=others,
        generations=generations,
        below={name: Kept(bitmap._replace(name=name), maps["b/" + name]) for name, bitmap in named["b/"].items()},
        above={name: Kept(bitmap._replace(name=name), maps["o/" + name]) for name, bitmap in named["o/"].items()},
        dead={name: reason for reason, kind in _DEAD.items() for name in named[kind]},
        is_given=file.path.endswith((SUFFIX + _GIVEN, _HEALING + _GIVEN)),
        given_at=file.status().st_ctime_ns,
        held=maps.get(_HELD),
        backing_file=next(iter(named["f/"]), None),
        top_made=top_made,
        written_at=file.status().st_mtime_ns,
        known=frozenset(named["k/"]),
    )


def top_stands(vault: Vault, base: Identity) -> bool:
    """Whether the image that the vault is of stands where it stood, on this BASE.

    Whoever copies a storage copies the vaults, too. The images that these are of stand on the old one.
    """
    if vault.top_path is None:
        return False
    with contextlib.suppress(Refusal, OSError), open_image(vault.top_path) as file:
        return vault.is_of(file.identity, file.path, file.generation) and _may_stand_on(file, base)
    return False


def _may_stand_on(file: OpenImage, base: Identity) -> bool:
    """Whether BASE is in the chain of an image; the very commit that is unfinished may have broken the chain."""
    try:
        return any(layer.identity == base for layer, _file in walk_chain(file, QCOW2))
    except (Refusal, OSError):
        return True


def _no_vault(path: str) -> Refusal:
    remedy = "If no commit and no healing was interrupted here, move it away; else make a full backup after that."
    why = "has the name of a vault of this collection but is none"
    return Refusal("unfinished", path, why, remedy)


_KINDS = ("b/", "o/", "t/", "i/", "p/", "m/", "n/", "l/", "g/", "f/", "k/", *_DEAD.values())
_HELD = "h/held"


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
    above: t.Sequence[tuple[Bitmap, t.Sequence[DirtyBits]]]
    dead: t.Mapping[str, str]
    virtual_size: int  # bytes; of the larger one of the two images
    held: DirtyBits | None = None  # what the topmost image holds
    held_between: t.Sequence[DirtyBits] = ()  # what the images between the two hold
    backing_file: str | None = None  # that it records
    top_changed: int | None = None  # ns since 1970, of the topmost image; None is as its file tells
    top_made: int = 0  # ns since 1970; 0 if that is not known
    known: frozenset[str] = frozenset()  # of those, whose checkpoints libvirt knows

    @property
    def generations(self) -> dict[Identity, int]:
        """The generations of the files, as far as their file systems say."""
        found = {file.identity: file.generation for file in (self.top, *self.others)}
        return {identity: number for identity, number in found.items() if number is not None}

    @property
    def held_by_all(self) -> list[DirtyBits]:
        """What the images that go in hold; nothing if that is not kept."""
        return [] if self.held is None else [self.held, *self.held_between]


def write_vault(fd: int, content: Content) -> None:
    """Make the open, empty file a vault."""
    size = content.virtual_size
    words = [f"t/{content.token}", "i/{}:{}".format(*content.top.identity), f"p/{content.top.path}"]
    changed = content.top.status().st_mtime_ns if content.top_changed is None else content.top_changed
    words += [f"m/{changed}", *([f"n/{content.top_made}"] if content.top_made else [])]
    words += ["l/{}:{}:{}".format(*file.identity, file.path) for file in content.others]
    words += ["g/{}:{}:{}".format(*identity, number) for identity, number in content.generations.items()]
    words += [f"f/{content.backing_file}"] if content.backing_file is not None else []
    words = [word for word in words if _is_bitmap_name(word)]  # of any other path nothing is known
    words += [f"{_DEAD[reason]}{name}" for name, reason in content.dead.items()]
    words += [f"k/{name}" for name in sorted(content.known)]
    with_bits = [
        (bitmap._replace(name=kind + bitmap.name), united(maps, bitmap.granularity, size))
        for kind, bitmaps in (("b/", content.below), ("o/", content.above))
        for bitmap, maps in bitmaps
    ]
    if content.held_by_all:
        bitmap = _FLAT._replace(name=_HELD, granularity=min(one.granularity for one in content.held_by_all))
        with_bits.append((bitmap, united(content.held_by_all, bitmap.granularity, size)))
    write_scratch(fd, size, [*with_bits, *((_FLAT._replace(name=word), ()) for word in words)])


def _is_bitmap_name(word: str) -> bool:
    """Whether a bitmap can have this name: paths can be longer, or no UTF-8."""
    try:
        return len(word.encode("utf-8")) <= MAX_BITMAP_NAME
    except UnicodeEncodeError:
        return False


def holds(vault: Vault, content: Content) -> bool:
    """Whether a vault that was read back is what was to be written, bit by bit."""
    return (
        (vault.token, vault.top, dict(vault.dead)) == (content.token, content.top.identity, dict(content.dead))
        and vault.generations == content.generations
        and vault.known == content.known
        and (vault.held is None) == (content.held is None)
        and (vault.held is None or is_union(vault.held, content.held_by_all, content.virtual_size))
        and _are(vault.above, content.above, content.virtual_size)
        and _are(vault.below, content.below, content.virtual_size)
    )


def _are(kept: t.Mapping[str, Kept], wanted: t.Sequence[tuple[Bitmap, t.Sequence[DirtyBits]]], size: int) -> bool:
    """Whether just these bitmaps were kept, bit by bit."""
    bitmaps = {name: one.bitmap for name, one in kept.items()}
    return bitmaps == {bitmap.name: bitmap for bitmap, _maps in wanted} and all(
        is_union(kept[bitmap.name].bits, maps, size) for bitmap, maps in wanted
    )


def is_as_kept(vault: Vault, bitmaps: t.Mapping[str, Bitmap], maps: t.Mapping[str, DirtyBits], size: int) -> bool:
    """Whether the image beside which the vault lies still has just the bitmaps that were kept, bit by bit."""
    kept = {name: one.bitmap for name, one in vault.below.items()}
    consistent = {name: bitmap for name, bitmap in bitmaps.items() if not bitmap.inconsistent}
    return kept == consistent and all(is_union(maps[name], [vault.below[name].bits], size) for name in kept)


def mark_given(vault_path: str) -> None:
    """Say beside the image that all work on its bitmaps is done, in the vault's name, on stable storage."""
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
