# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: how far a commit is, told by what stands there.

::

    TOP     topmost image that goes in      ┐ everything of these,
    layer   …                               ┘ data and bitmaps, goes into …
    BASE    … this one; it may have images below it

Before BASE is touched, TOP gets all that BASE's bitmaps mark. From then on TOP alone is a right chain. Each state is
told by a look, each step can be taken twice, and the same call goes on from any of them:

1) WHOLE: no vault, no mark. Nothing was written. Next: keep the bits of BASE and TOP in a vault.
2) VAULTED: a vault, no mark. Next: carry BASE's bits into TOP's bitmaps, and give TOP a mark with the vault's token.
   A kill leaves TOP's bitmaps inconsistent or gone, which the vault tells: then they are made again (REBUILT).
3) CARRIED: the mark, TOP's bitmaps in order. Next: strip BASE of its bitmaps, commit the data, give BASE those of TOP.
   Each of the three begins anew after a kill. Of BASE only data that TOP covers is written.
   If TOP's bitmaps are not in order, a VM has died on it: they are made again from the vault and from what the images
   hold (REBUILT).
4) GIVEN: the vault says so by its name. BASE alone is right as well. Next: switch the VM to BASE, retire what went in,
   remove the vault. Never commit again from here, or stale data would overwrite what a VM writes to BASE, unless TOP
   was written to since: its mark is a recording bitmap, so it tells.

The vault goes last: one that says GIVEN is in nobody's way.
"""

from __future__ import annotations

import os
import typing as t

from .._base.errors import Refusal
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer
from .._qcow2.image import Image
from .bitmap_rules import LayerBitmaps
from .fates import Named
from .retire import KEPT_AS, is_kept
from .vault import MARK, Vault

WHOLE = "whole"
VAULTED = "vaulted"
CARRIED = "carried"
REBUILT = "rebuilt"
GIVEN = "given"


class Seen(t.NamedTuple):
    """What stands there, as it was read."""

    chain: tuple[Layer, ...]  # from TOP down to the bottom
    depth: int  # of BASE in it
    is_top_of_vault: bool  # whether the vault was made for TOP
    went_in_below_another: bool  # whether the vault says that TOP was between its topmost image and BASE
    vault: Vault | None
    mark_is_empty: bool | None  # None if TOP has no mark, or an inconsistent one
    base_lacks: frozenset[str] | None  # what the vault has and BASE no more; None if the rest is not as the vault says
    top_has_all: bool  # TOP's bitmaps mark all that those of BASE, and of the vault, of the same names mark
    top_changed: int  # ns since 1970
    below_changed: t.Mapping[str, int]  # the same of all images below, by path; not of block devices
    above: Layer | None  # the image on top of TOP
    open_for_writing: tuple[str, ...]  # paths of images that a process has open for writing
    below_running: tuple[str, ...]  # paths of images that a running VM has as a backing file
    others: tuple[str, ...]  # images that stand on one that takes part, and do not take part
    begun: tuple[str, ...] = ()  # paths of the signs that merges of images that go in were begun while their VM ran
    written: t.Mapping[str, int] = {}  # when images that take part were last, s since 1970; not those of devices
    further: tuple[tuple[LayerBitmaps, ...], ...] = ()  # what stands on `above`, topmost first, in each way up
    above_changed: int = 0  # ns since 1970; 0 if there is none, or it is a block device
    above_is_begun: bool = False  # whether others have merged some of it into TOP, as far as its data tells
    holds_what_it_held: bool = True  # whether what goes in holds all that it held when the vault was made
    known: t.Mapping[str, int] | None = None  # bitmaps of the VM's checkpoints, made when, s since 1970; None of no VM

    @property
    def top(self) -> Image:
        """TOP's header and bitmaps."""
        return t.cast("Image", self.chain[0].image)

    @property
    def part_is_as_recorded(self) -> bool:
        """Whether nobody has written to the images that take part since those on top of them were made, as these tell.

        Whoever did may have put into them what is above. After a kill, and of a block device, nothing tells that. What
        was written to one further down before the image above was made was below that already. To TOP a VM that runs
        writes for a while longer, so its data tells.
        """
        above = self.above.image if self.above is not None else None
        if above is None or self.above_is_begun or self.vault is not None:
            return False
        between = [layer.image.history for layer in self.part[:-1] if layer.image is not None]
        made = min(above.history.made, above.history.base_written)  # by the clock of the storage, too
        recorded = [above.history.settled, *(max(one.base_written, made) for one in between)]
        changed = [self.top_changed, *(self.below_changed.get(layer.path) for layer in self.part[1:])]
        return all(time is not None and time <= settled for time, settled in zip(changed, recorded))

    @property
    def part(self) -> tuple[Layer, ...]:
        """The images that take part: those that go in, and BASE."""
        return self.chain[: self.depth + 1]

    @property
    def base(self) -> Layer:
        """The image that all goes into."""
        return self.chain[self.depth]

    @property
    def base_is_as_kept(self) -> bool:
        """Whether BASE is just as the vault says."""
        return self.base_lacks is not None and not self.base_lacks

    @property
    def names_above(self) -> frozenset[str]:
        """The names of the bitmaps of all images on top of TOP."""
        further = [name for way in self.further for one in way for name in one.bitmaps]
        return frozenset([*(named(self.above.image) if self.above is not None else ()), *further])

    @property
    def base_changed(self) -> int | None:
        """When BASE was written to last, in ns since 1970; None if that cannot be told, as of a block device."""
        return self.below_changed.get(self.base.path)

    @property
    def mark(self) -> Bitmap | None:
        """The bitmap by which TOP says that it carries BASE's bits."""
        return next(filter(_is_mark, self.top.bitmaps), None)

    @property
    def is_the_one_kept(self) -> bool:
        """Whether TOP is the very file that the vault is of, and bears its mark."""
        vault, mark = self.vault, self.mark
        return bool(vault and mark and mark.name == MARK + vault.token and self.is_top_of_vault)

    @property
    def base_bitmaps(self) -> tuple[Bitmap, ...]:
        """BASE's bitmaps; none if it is raw."""
        return self.base.image.bitmaps if self.base.image else ()

    @property
    def holds_bitmaps(self) -> bool:
        """Whether BASE can have bitmaps at all."""
        return self.base.image is not None and self.base.image.version == 3

    @property
    def carries_bitmaps(self) -> bool:
        """Whether TOP can carry bitmaps for a BASE that can have them."""
        return self.holds_bitmaps and self.top.version == 3


class Stage(t.NamedTuple):
    """How far a commit is."""

    name: str
    stale_vault: bool = False  # the vault there is of other work that is done, or was never begun
    not_given: bool = False  # the vault says GIVEN, but TOP was written to since
    is_before_base: bool = False  # of one that was begun: no run has written to BASE yet, as TOP gets its mark first
    removed: frozenset[str] = frozenset()  # bitmaps that the vault has, and that others have removed since


def stage_of(seen: Seen) -> Stage | Refusal:
    """Return how far the commit is; a Refusal if that cannot be told, or if somebody has come between."""
    stage = _found_stage(seen)
    if isinstance(stage, Refusal) or stage.name != REBUILT or seen.vault is None:
        return stage
    if not seen.holds_what_it_held:
        return _emptied(seen)
    return stage._replace(removed=_removed_since(seen, seen.vault, is_before_base=stage.is_before_base))


def _emptied(seen: Seen) -> Refusal:
    """Return the refusal of what no longer tells what was written, where only that is to make bitmaps again."""
    vault = seen.vault.path if seen.vault is not None else "the vault"
    return _unfinished(
        seen,
        f"it has lost bitmaps, and holds less than when the vault {vault} was made, or may have: it was emptied, as by "
        "'qemu-img commit', or is an older copy. So nothing tells what changed since the checkpoints of these bitmaps",
        "If another file was put in its place, put back the one that was there. Else remove the checkpoints of the "
        "domain ('virsh checkpoint-delete DOMAIN NAME --metadata'), all bitmaps of the images below, then those of "
        f"this one, '{MARK}…' too ('qemu-img bitmap --remove'), and {vault}. Then run this again, and make a full "
        "backup.",
    )


def _found_stage(seen: Seen) -> Stage | Refusal:
    """Return how far the commit is, as bitmaps, times and the vault tell, whatever the images hold."""
    copied = _why_copied(seen)
    if copied is not None:
        return copied
    if seen.vault is None:
        # Of an image between, or one that was merged while its VM ran, the name alone tells that it has gone in.
        is_new = seen.mark is None and not is_kept(seen.chain[0].real_path, KEPT_AS)
        return Stage(WHOLE) if is_new else _stage_without_vault(seen)
    if seen.vault.is_given:
        return _stage_when_given(seen, seen.vault)
    if seen.mark is not None:
        return _stage_when_marked(seen, seen.mark, seen.vault)
    is_same = seen.is_top_of_vault
    if _has_lost_bitmaps(seen, seen.vault) and (is_same or _may_be_copy(seen, seen.vault)):
        return _stage_when_lost(seen, seen.vault)
    if seen.base_is_as_kept or (is_same and seen.top.version == 2 and _is_stripped(seen)):
        is_before_base = seen.top.version == 3 or bool(seen.vault.below and seen.base_is_as_kept)
        return Stage(VAULTED if is_same else WHOLE, stale_vault=not is_same, is_before_base=is_before_base)
    if is_same and seen.top.version == 3 and _lacks_what_top_lacks(seen, seen.vault):
        # The VM went on with TOP, and a backup tool has deleted checkpoints meanwhile. No bit was carried yet.
        return Stage(WHOLE, stale_vault=True)
    return _excluded(seen)


def _stage_when_marked(seen: Seen, mark: Bitmap, vault: Vault) -> Stage | Refusal:
    """Return the stage where TOP has a mark, and the vault says that work is unfinished."""
    if mark.name != MARK + vault.token:
        return _unfinished(seen, "the vault beside BASE is of another commit", "Finish that one first.")
    is_as_left = _is_sound(seen) and seen.mark_is_empty
    # Before a commit writes to BASE it empties the mark. So it was a VM on TOP, and then something else on BASE.
    if not is_as_left and seen.base_changed is not None and seen.base_changed > seen.top_changed:
        return _written_by_others(seen, vault)
    if not _is_sound(seen):
        return Stage(REBUILT)
    # BASE is as it was, or stripped, or has got some of TOP's bitmaps already.
    return Stage(CARRIED) if seen.base_is_as_kept or seen.top_has_all else _excluded(seen)


def _written_by_others(seen: Seen, vault: Vault) -> Refusal:
    return _unfinished(
        seen,
        "a VM has run on it since, and after that something else has written to BASE, such as 'qemu-img commit', or a "
        "VM that was put on BASE. With this overlay old data would go over newer data",
        f"If BASE has all by now, put the VM on it ('virsh edit'), move this overlay and {vault.path} away, or remove "
        "both, and make a full backup. If "
        "no VM has run on BASE since and nothing was merged into it, as where only 'qemu-img check' has written to it, "
        f"'touch {seen.chain[0].path}' says so: then run this again.",
    )


def _stage_when_lost(seen: Seen, vault: Vault) -> Stage | Refusal:
    """Return the stage where TOP has no mark and has lost bitmaps, and the vault says that work is unfinished.

    A copy of the image that the vault is of is told by the names that are left in it. A bitmap that BASE has in order
    takes in all that an overlay on it holds, and is right. So is one that had begun in TOP when the copy was made. Of
    any other one nothing tells whether TOP is a copy of an earlier state, or another overlay, in which it never was:
    what the disk was when the checkpoint was made can be in no image then, and no bit of the vault tells of that.
    """
    left = {bitmap.name for bitmap in seen.top.bitmaps} | (seen.top.lost_names or frozenset())
    is_marked = MARK + vault.token in left
    is_stripped = (seen.is_top_of_vault or is_marked) and _is_stripped(seen)
    if not (seen.base_is_as_kept or is_stripped or (seen.is_top_of_vault and not is_marked and seen.base_lacks)):
        return _excluded(seen)
    missing = _unexplained(seen, vault) if not is_stripped else []
    if missing:
        return _lacking(seen, vault, missing)
    unknown = sorted(vault.above.keys() - vault.below.keys() - left)
    if seen.is_top_of_vault or is_marked or not unknown:
        return Stage(REBUILT, is_before_base=not is_marked)
    names = ", ".join(map(repr, unknown))
    return _unfinished(
        seen,
        f"it lacks bitmaps that the vault {vault.path} has ({names}), which is of another file of this name",
        "If that file is still there, and no VM has run on this one since, put it back and run this again. If there is "
        f"none any more, as where this is a copy of it, or if this overlay was made since, remove {vault.path} and run "
        "this again. Of a copy these bitmaps are lost then: remove their checkpoints, and make a full backup with a "
        "new one.",
    )


def _lacks_what_top_lacks(seen: Seen, vault: Vault) -> bool:
    """Whether BASE is as the vault says but for bitmaps that TOP has not either, or that were made anew in TOP."""
    made = {name for name, time in (seen.known or {}).items() if time * 10**9 > vault.written_at}
    return seen.base_lacks is not None and seen.base_lacks.isdisjoint(named(seen.top).keys() - made)


def _removed_since(seen: Seen, vault: Vault, *, is_before_base: bool) -> frozenset[str]:
    """Return which bitmaps of the vault others have removed since, with their checkpoints, as far as that is certain.

    No image has one then, and libvirt knows no checkpoint of its. That it knew it tells that one was removed, except of
    a copy, whose domain can be another one. So does that BASE has lost it and nothing else, as long as no run has
    written to BASE. Without a VM the image above tells.
    """
    lacks = seen.base_lacks if is_before_base and not _is_stripped(seen) else None
    removed = lacks or frozenset()
    if seen.known is not None:
        removed = (removed | (vault.known if seen.is_top_of_vault else frozenset())) - seen.known.keys()
    elif seen.above is None or seen.above.image is None or seen.above.image.lost_bitmaps:
        return frozenset()
    there = {*named(seen.base.image), *named(seen.top), *seen.names_above}
    return (removed & {*vault.below, *vault.above}) - there


def _unexplained(seen: Seen, vault: Vault) -> list[str]:
    """Return which bitmaps BASE lacks of which nothing tells why, where all others are as the vault says.

    One that an image on top has can be of a checkpoint that was made anew, to which the bits of the vault only add. If
    it is not, they are all of it, as another bitmap of BASE tells that nothing was written there since.
    """
    anew = {bitmap.name for bitmap in seen.top.bitmaps if not bitmap.inconsistent} | seen.names_above
    is_unwritten = any(bitmap.recording and not bitmap.inconsistent for bitmap in seen.base_bitmaps)
    told = _removed_since(seen, vault, is_before_base=True) | (anew if is_unwritten else frozenset())
    return sorted((seen.base_lacks or frozenset()) - told)


def _lacking(seen: Seen, vault: Vault, missing: t.Sequence[str]) -> Refusal:
    names = ", ".join(map(repr, missing))
    if seen.known is not None and not seen.known.keys().isdisjoint(missing):
        remedy = (
            "If nobody needs their checkpoints any more, have libvirt forget them ('virsh checkpoint-delete DOMAIN "
            "NAME --metadata') and run this again. Else, if they were removed"
        )
    else:
        remedy = "If they were removed, as with their checkpoints"
    return _unfinished(
        seen,
        f"BASE lacks bitmaps that the vault {vault.path} has ({names}), and nothing tells whether they were removed",
        f"{remedy}, and no VM has run on BASE since, remove {vault.path} and run this again. It may name bitmaps that "
        "are to be healed first. Of checkpoints that began in this overlay all bits are lost then: remove these, and "
        "make a full backup. If a VM has run on BASE, keep one of the two images, and make a full backup.",
    )


def _may_be_copy(seen: Seen, vault: Vault) -> bool:
    """Whether TOP, another file than the vault is of, can be a copy of that one: it has its name, and was made then."""
    name = os.path.basename(vault.top_path) if vault.top_path is not None else None
    made = seen.top.history.made
    is_other = bool(vault.top_made and made) and vault.top_made != made
    return not is_other and name in (None, os.path.basename(seen.chain[0].path))


def _excluded(seen: Seen) -> Refusal:
    return _unfinished(
        seen,
        "BASE is not as the vault beside it says: it was written to since, or its bitmaps are in another overlay",
        "If a VM ran on BASE since, what it wrote and what the overlay holds exclude each other: keep one of the two, "
        "remove the vault, and make a full backup. Else finish the commit of the other overlay first.",
    )


def _why_copied(seen: Seen) -> Refusal | None:
    """Return why TOP's mark, or one further down, may be a copy: it says that TOP has all bits, and it has not.

    A snapshot, or 'virsh blockcommit', copies bitmaps to another image, the mark among them.
    """
    also = f" and {seen.vault.path}" if seen.vault else ""
    for layer in seen.part[1:]:
        marks = [bitmap.name for bitmap in (layer.image.bitmaps if layer.image else ()) if _is_mark(bitmap)]
        if layer is seen.base and seen.is_the_one_kept and seen.mark is not None and seen.mark.name in marks:
            return _unfinished(
                seen,
                "BASE has its mark, too, as after 'virsh blockcommit': then it has gone in, and what BASE has is newer",
                f"Move this overlay{also} away, or remove both. Then remove the mark of BASE, the bitmap "
                f"{seen.mark.name!r}, with 'qemu-img bitmap --remove', and make a full backup.",
            )
        if marks:
            return _unfinished(
                seen,
                f"{layer.path}, which takes part below it, has the mark of another one",
                "If a commit of that image into one below it was interrupted, complete that first, with the image on "
                f"top of it as above. If the mark is a copy that a snapshot or 'virsh blockcommit' made, remove it: "
                f"the bitmap {marks[0]!r}, with 'qemu-img bitmap --remove'.",
            )
    if seen.mark is None or seen.is_the_one_kept or seen.top_has_all:
        return None
    again = f",{also}, make a full backup," if also else ""
    return _unfinished(
        seen,
        "it has a mark, but not all that the bitmaps below it mark. So a snapshot has copied the mark from an image "
        "that has gone in since, or a VM ran on BASE since",
        "If a VM ran on BASE since, keep one of the two, and make a full backup. If none did, remove the mark, the "
        f"bitmap {seen.mark.name!r}, with 'qemu-img bitmap --remove'{again} and run this again.",
    )


def _stage_without_vault(seen: Seen) -> Stage | Refusal:
    """Return the stage of a commit whose vault is gone: TOP's bitmaps alone tell."""
    if is_kept(seen.chain[0].real_path):
        return _unfinished(
            seen,
            "it has the name of an image that a commit has kept when all of it was in the image below, on which a VM "
            "may have run since",
            "Leave it alone, or remove it if nobody needs it. If its commit was not complete, give it its old name.",
        )
    if not _is_sound(seen):
        return _unfinished(
            seen,
            "its bitmaps are broken, and the vault with what they carried is gone",
            "Put the vault back. If that is lost: remove the bitmaps of the overlay, and make a full backup.",
        )
    has_own = any(not bitmap.inconsistent for bitmap in seen.base_bitmaps)
    carries = any(not bitmap.name.startswith(MARK) for bitmap in seen.top.bitmaps)
    is_base_newer = seen.base_changed is None or seen.base_changed > seen.top_changed
    # BASE with bitmaps, and written to after the overlay: all may be done, and a VM may have run on it since.
    if is_base_newer and (has_own or not carries):
        return _unfinished(
            seen,
            "the vault is gone, and BASE was written to after the overlay, so the commit may be done already",
            "If the VM ran on BASE since, remove the overlay. If it did not, remove the mark, the bitmap "
            f"{seen.mark.name if seen.mark else ''!r}, with 'qemu-img bitmap --remove' and run this again.",
        )
    return Stage(CARRIED)


def _stage_when_given(seen: Seen, vault: Vault) -> Stage | Refusal:
    """Return the stage where a vault says that all work on the bitmaps is done."""
    if seen.went_in_below_another:
        return _unfinished(
            seen,
            "it went into BASE already, together with the overlay on top of it",
            f"Run that commit again, with path={vault.top_path}. If this overlay was made since, remove {vault.path}.",
        )
    if seen.top.version == 2 and not seen.is_top_of_vault and _may_be_copy(seen, vault):
        return _unfinished(  # it can bear no mark, so nothing tells
            seen,
            f"it may be a copy of what went into BASE, of which the vault {vault.path} is",
            f"If it was made since, or if no VM has run on BASE since, remove {vault.path} and run this again. If it "
            "is a copy, as where the whole folder was copied, and a VM has run on BASE, remove this overlay instead "
            "and run this again: BASE has all that went in.",
        )
    is_marked = seen.mark is not None and seen.mark.name == MARK + vault.token
    if not is_marked and (not seen.is_top_of_vault or (seen.top.bitmaps and _is_sound(seen))):
        return Stage(WHOLE, stale_vault=True)  # of an overlay that went in and is gone; its number may be given anew
    if seen.top.version == 3:
        has_grown = seen.chain[0].virtual_size > seen.base.virtual_size
        has_run = has_grown or not (is_marked and _is_sound(seen) and seen.mark_is_empty)
    else:
        # It is never written to here. Times of the vault tell less: they change with its owner, and go by the clock.
        kept = vault.top_changed
        has_run = seen.top_changed > vault.given_at if kept is None else seen.top_changed != kept
    if not has_run:
        return Stage(GIVEN)
    if _has_base_run(seen, vault):
        return _unfinished(
            seen,
            "after it was committed a VM has written to the overlay, and another one to BASE",
            "What they wrote excludes each other: keep one of the two images, and make a full backup. If the overlay "
            f"is not the one that was committed, but was made on BASE since, remove {vault.path} and run this again.",
        )
    if not is_marked:  # BASE has all bits; the vault lacks those of the old overlay, and this may be a new one
        return Stage(WHOLE, stale_vault=True)
    if _is_sound(seen):
        return Stage(CARRIED, not_given=True)
    if not seen.is_top_of_vault:  # the vault lacks what the old overlay has recorded since, and BASE was given
        return _unfinished(
            seen,
            f"its bitmaps are broken, and the vault {vault.path} is of another file",
            f"Remove {vault.path}, and the bitmaps of the overlay with 'qemu-img bitmap --remove', and run this again. "
            "BASE has what it needs, unless the overlay is a copy of the old one: then make a full backup.",
        )
    return Stage(REBUILT, not_given=True)


def _has_base_run(seen: Seen, vault: Vault) -> bool:
    """Whether BASE was, or may have been, written to since all was given: of a block device only the bits tell."""
    if seen.base_changed is not None:
        return seen.base_changed > vault.given_at
    return not (seen.top_has_all and (vault.below or vault.above))


def _is_mark(bitmap: Bitmap) -> bool:
    return bitmap.name.startswith(MARK)


def _is_stripped(seen: Seen) -> bool:
    return all(bitmap.inconsistent for bitmap in seen.base_bitmaps)


def _is_sound(seen: Seen) -> bool:
    return not seen.top.lost_bitmaps and not any(bitmap.inconsistent for bitmap in seen.top.bitmaps)


def _has_lost_bitmaps(seen: Seen, vault: Vault) -> bool:
    """Whether TOP has lost bitmaps that it had when the vault was made, as by a kill while it was opened."""
    there = {bitmap.name: bitmap for bitmap in seen.top.bitmaps}
    broken = any(there[name].inconsistent for name in vault.above if name in there)
    carried = vault.above or (vault.below and seen.top.version == 3)  # some of it, perhaps, when it lost all
    return bool(seen.top.lost_bitmaps or broken or (carried and not there))


def _unfinished(seen: Seen, why: str, remedy: str) -> Refusal:
    return Refusal("unfinished", seen.chain[0].path, f"its commit is unfinished, and {why}", remedy)


def named(image: Image | None) -> Named:
    """Return the bitmaps of an image by name, without a mark."""
    return {bitmap.name: bitmap for bitmap in image.bitmaps if not bitmap.name.startswith(MARK)} if image else {}
