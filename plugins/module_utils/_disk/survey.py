# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what stands there before a commit, what earlier runs have left, and where the bits of each bitmap are."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage, open_image
from .._qcow2.chain import Layer, read_head
from .._qcow2.dirty import DirtyBits, covers, dirty_bytes, is_union, maps_of, stored_maps
from .._qcow2.extents import AllocationMap, has_allocated_extents, holds_any
from .._qcow2.image import Image, read_image
from .._qcow2.mark import History
from .._qemu import locks
from .._qemu.settled import is_open_for_writing
from . import commit, stages
from .begun import find_sign
from .bitmap_rules import LayerBitmaps, carries_over
from .carry import Wanted
from .commit import CommitRequest, CommitVerdict, Work
from .common_data import in_common, lower_of
from .fates import DISABLED, REASONS
from .loan import Maps
from .observe import observe_chain
from .retire import KEPT_AS, is_kept, kept_path
from .revert_rules import Retired
from .room import can_share, need_of
from .session import Held
from .siblings import all_standing_on, folders_beside, overlays_in, ways_up
from .stages import Seen
from .unfinished import left_of
from .vault import MARK, Content, Vault, find_vault, is_as_kept, open_vault, place_of, read_vault, top_stands
from .verdict import ABSENT, COMMITTED, FAILED, KEEP


def vault_place(request: CommitRequest, base: OpenImage) -> str:
    """Return where the vault of the commit is."""
    return place_of(os.path.realpath(request.backing_file), base.is_device, os.path.realpath(request.path))


def judge_gone(request: CommitRequest, base: OpenImage, held: Held) -> CommitVerdict:
    """Return the verdict where the path leads to nothing that is to go in: committed before, or not finished."""
    path = find_vault(vault_place(request, base))
    if path is None:
        return CommitVerdict(request, ABSENT, virtual_size=_virtual_size(request, base))
    vault = read_vault(held.enter(open_vault(path)))
    is_top_there = top_stands(vault, base.identity)
    if vault.is_given and not is_top_there and not _is_of(vault, request.path):
        return CommitVerdict(request, ABSENT, virtual_size=_virtual_size(request, base))
    problem = commit.why_gone(request, vault, is_top_there=is_top_there)
    if problem is not None:
        return CommitVerdict(request, FAILED, (problem,))
    left = tuple(Retired(one, kept_path(one, KEPT_AS) if request.retire == KEEP else None) for one in left_of(vault))
    size = _virtual_size(request, base)
    return CommitVerdict(request, COMMITTED, virtual_size=size, retired=left, finished=vault)


def _is_of(vault: Vault, path: str) -> bool:
    """Whether an image that had this path went in by the merge that the vault is of."""
    paths = [vault.top_path, *(other for _identity, other in vault.others)]
    return vault.top_path is None or os.path.realpath(path) in {os.path.realpath(one) for one in paths if one}


def _virtual_size(request: CommitRequest, base: OpenImage) -> int:
    return base.length() if request.backing_format == "raw" else read_head(base).virtual_size


def read_above(request: CommitRequest, held: Held) -> Layer | None:
    """Return the image on top of the one that is committed, if one was given."""
    if request.above is None:
        return None
    file = held.image(request.above)
    held.alone(request.above)
    return observe_chain(file, "qcow2", relative=False).layers[0]


def read_further(request: CommitRequest, above: Layer | None) -> tuple[tuple[LayerBitmaps, ...], ...]:
    """Return the bitmaps of what stands on the image above: of a VM's chain, or of what lies beside that image."""
    if above is None:
        return ()
    ways: t.Sequence[t.Sequence[str]] = [request.further]
    if not request.is_of_vm:
        folders = folders_beside([above.path])
        beside = [one for folder in folders for one in overlays_in(folder) if not is_kept(one.path)]
        ways = ways_up(above.identity, beside)
    return tuple(tuple(map(_read_bitmaps, way)) for way in ways)


def _read_bitmaps(path: str) -> LayerBitmaps:
    with open_image(path) as file:
        image = read_image(file)
    return LayerBitmaps(path, image.virtual_size, stages.named(image))


def see(request: CommitRequest, chain: tuple[Layer, ...], depth: int, above: Layer | None, held: Held) -> Seen:
    """Return what stands there. Keep everybody from the images that are written to, and writers from those below."""
    part = chain[: depth + 1]
    for path in [*request.further, *(layer.path for layer in part)]:
        held.alone(path)
    for layer in chain[depth + 1 :]:
        held.unwritten(layer.path)
    files = [held.image(layer.path) for layer in part]
    vault_path = find_vault(vault_place(request, files[depth]))
    vault = read_vault(held.enter(open_vault(vault_path))) if vault_path else None
    base, top = part[depth], part[0].image
    known = (files[0].identity, files[0].path, files[0].generation)
    ours = [*([held.image(request.above).identity] if request.above else []), *(layer.identity for layer in part)]
    folders = folders_beside([*(layer.path for layer in part), request.backing_file])
    standing = all_standing_on([layer.identity for layer in part], folders, ours)
    return Seen(
        chain=chain,
        depth=depth,
        is_top_of_vault=vault is not None and vault.is_of(*known),
        went_in_below_another=vault is not None and vault.took_in(files[0]),
        vault=vault,
        mark_is_empty=_mark_is_empty(files[0], top) if top else None,
        base_lacks=_lacks(vault, files[depth], base) if vault is not None else None,
        top_has_all=top is None
        or _has_all(files[0], top, _bits_below(vault, files[depth], base), chain[0].virtual_size),
        top_changed=files[0].status().st_mtime_ns,
        below_changed={
            layer.path: _changed(layer, held.image(layer.path)) for layer in chain[1:] if not layer.is_device
        },
        above=above,
        open_for_writing=tuple(file.path for file in files if is_open_for_writing(file)),
        below_running=tuple(file.path for file in files if locks.is_locked_by_qemu(file, locks.WRITE_UNSHARED)),
        others=tuple(path for layer in part for path in standing[layer.identity] if not _has_gone_in(path, vault)),
        begun=tuple(filter(None, map(find_sign, files[:-1]))),
        written=last_written([*([above] if above is not None else []), *chain], held),
        further=read_further(request, above),
        above_changed=held.image(above.path).written() if above is not None else 0,
        above_is_begun=above is not None and _is_begun(above, part[0], request, held),
        holds_what_it_held=vault is None
        or vault.held is None
        or _holds(files[:-1], vault.held, chain[0].virtual_size)
        or _was_never_written(files[0], part, vault, None if base.is_device else _changed(base, files[depth])),
        known=dict(request.created) if request.is_of_vm else None,
    )


def _holds(files: t.Sequence[OpenImage], kept: DirtyBits, size: int) -> bool:
    """Whether images together hold all that is kept in mind; or anything, if that is nothing."""
    if is_union(kept, (), size):
        return any(map(holds_any, files))
    return covers([AllocationMap(file) for file in files], kept, size)


def _was_never_written(file: OpenImage, part: t.Sequence[Layer], vault: Vault, base_changed: int | None) -> bool:
    """Whether TOP, and all between, that held nothing when the vault was made, has got nothing since that is gone.

    Where it goes, BASE is written to. Once TOP has its mark a killed run can have done that. But 'qemu-img commit'
    leaves empty tables where an image has bitmaps, as TOP has since then.
    """
    top = part[0]
    if vault.held is None or not is_union(vault.held, (), top.virtual_size):
        return False
    if any(bitmap.name == MARK + vault.token for bitmap in (top.image.bitmaps if top.image else ())):
        return not has_allocated_extents(file)
    return base_changed is not None and base_changed <= vault.written_at


def last_written(layers: t.Sequence[Layer], held: Held) -> dict[str, int]:
    """Return when the images were last written to, in seconds since 1970, by path; a block device does not tell."""
    files = {layer.path: held.image(layer.path) for layer in layers if not layer.is_device}
    return {path: int(file.status().st_mtime) for path, file in files.items()}


def _changed(layer: Layer, file: OpenImage) -> int:
    """Return when an image, or the external data file that has its data, was written to last, in ns since 1970."""
    found = file.status().st_mtime_ns
    data_file = layer.image.data_file if layer.image is not None else None
    with contextlib.suppress(OSError, ValueError):  # what is wrong with it is told where it is opened
        status = os.stat(data_file or "")
        return max(found, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else found
    return found


def _is_begun(above: Layer, top: Layer, request: CommitRequest, held: Held) -> bool:
    """Whether TOP holds data of the image above, or of one on that, as after a merge by others that was given up."""
    history = above.image.history if above.image is not None else History()
    if not lower_of(top, history, held).may_be_written:
        return False
    topmost = next(iter(request.further), above.path)
    layers = observe_chain(held.image(topmost), "qcow2", relative=False).layers
    uppers = itertools.takewhile(lambda one: one.identity != top.identity, layers)
    found = in_common([(one.path, one) for one in uppers], (top.path, top), held)
    return any(one.is_merged() for one in found)


def _has_gone_in(path: str, vault: Vault | None) -> bool:
    """Whether an image was committed before and is only kept: it has a mark, and no vault waits for it.

    Its name tells, too: a snapshot copies the mark to an image that a VM has. An image between has only the mark of
    whose snapshot it is; by that name no commit takes it any more.
    """
    if not is_kept(path):
        return False
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        image = read_image(file)
        marks = [bitmap.name for bitmap in image.bitmaps if bitmap.name.startswith(MARK)]
        if not marks:
            return image.mark is not None and is_kept(path, KEPT_AS)
        return vault is None or MARK + vault.token not in marks
    return False


def _mark_is_empty(file: OpenImage, image: Image) -> bool | None:
    """Whether nobody has written to TOP since it got its mark; None if it has none, or a broken one."""
    mark = next((own for name, own in maps_of(file, image).items() if name.startswith(MARK)), None)
    return None if mark is None else not dirty_bytes([mark], image.virtual_size)


def _is_as_kept(vault: Vault, file: OpenImage, base: Layer) -> bool:
    if base.image is None:
        return not vault.below
    own = {bitmap.name: bitmap for bitmap in base.image.bitmaps}
    return not base.image.lost_bitmaps and is_as_kept(vault, own, maps_of(file, base.image), base.virtual_size)


def _lacks(vault: Vault, file: OpenImage, base: Layer) -> frozenset[str] | None:
    """Return which bitmaps of the vault BASE has no more; None if it has anything else than the others, as kept."""
    missing = frozenset(vault.below.keys() - stages.named(base.image).keys())
    return missing if _is_as_kept(vault.without(missing), file, base) else None


def _bits_below(vault: Vault | None, file: OpenImage, base: Layer) -> list[tuple[str, DirtyBits]]:
    """Return the bits, each with its name, that TOP has all once it carries BASE's."""
    kept = [(name, one.bits) for name, one in vault.below.items()] if vault else []
    own = maps_of(file, base.image) if base.image else {}
    return [*kept, *own.items()]


def _has_all(file: OpenImage, image: Image, below: list[tuple[str, DirtyBits]], size: int) -> bool:
    """Whether the bitmaps of an image mark all these bits, as far as it has bitmaps of these names."""
    own = maps_of(file, image)
    return all(covers([own[name]], bits, size) for name, bits in below if name in own)


def token_of(seen: Seen) -> str:
    """Return the token of the mark that is there, or a new one."""
    return seen.mark.name[len(MARK) :] if seen.mark else secrets.token_hex(8)


def layers_of(seen: Seen, held: Held) -> list[tuple[Layer, OpenImage]]:
    """Return the images that go in, topmost first."""
    return [(layer, held.image(layer.path)) for layer in seen.chain[: seen.depth]]


def promise(request: CommitRequest, work: Work, held: Held) -> CommitVerdict:
    """Return the verdict for the case that nothing is wrong."""
    seen, outcome = work.seen, work.outcome
    size = seen.chain[0].virtual_size
    files = [file for _layer, file in layers_of(seen, held)]
    wanted = carried_by(wanted_by(work, held), seen, maps_below(seen, held))
    held_by = sorted(map(AllocationMap, files), key=lambda one: one.granularity)
    is_shared = can_share(seen, files)
    return CommitVerdict(
        request=request,
        state=COMMITTED,
        warnings=commit.warnings_of(seen, outcome),
        virtual_size=size,
        bitmaps=outcome.usable,
        skipped=outcome.skipped,
        is_exact=outcome.is_exact,
        method=commit.SHARED if is_shared else commit.COPIED,
        committed_bytes=dirty_bytes(held_by, size),
        retired=tuple(
            Retired(layer.path, kept_path(layer.path, KEPT_AS) if request.retire == KEEP else None)
            for layer in seen.chain[: seen.depth]
        ),
        need=need_of(seen, held, wanted, shares_data=is_shared) if work.stage.name != stages.GIVEN else None,
        work=work,
    )


def wanted_by(work: Work, held: Held) -> list[Wanted]:
    """Return the bitmaps that TOP must have after the carry, which are those that BASE gets."""
    seen = work.seen
    if not seen.carries_bitmaps:
        return []
    maps = [_maps(layer, held) for layer in seen.chain[: seen.depth + 1]]
    stored: t.Mapping[str, DirtyBits] = {}
    if seen.vault is not None and work.stage.name == stages.REBUILT:
        maps[seen.depth] = {name: kept.bits for name, kept in seen.vault.below.items()}
        stored = {**maps[0], **stored_maps(held.image(seen.chain[0].path), seen.top)}
    are_alike = len({layer.virtual_size for layer in seen.chain[: seen.depth + 1]}) == 1
    all_wanted = []
    for name, fate in work.outcome.fates.items():
        if fate.bitmap is None:
            continue
        own: list[DirtyBits] = [maps[place][name] for place in fate.bits]
        if seen.vault is not None and work.stage.name == stages.REBUILT and name in seen.vault.above:
            # TOP can have marked more than it holds: all of a cumulative bitmap, or what it held before it was emptied.
            own.append(seen.vault.above[name].bits)
        if name in stored:  # a VM that has run since wrote that before TOP was emptied, or with a bitmap made anew
            own.append(stored[name])
        held_all = [AllocationMap(held.image(seen.chain[place].path)) for place in fate.held]
        # QEMU merges no bitmaps of different sizes, and knows nothing of vaults and of what images hold.
        by_qemu = are_alike and not fate.held and work.stage.name != stages.REBUILT
        sources = tuple(held.image(seen.chain[place].path) for place in fate.bits) if by_qemu else ()
        all_wanted.append(Wanted(fate.bitmap, [*own, *held_all], sources))
    return all_wanted


def carried_by(wanted: list[Wanted], seen: Seen, below: Maps) -> list[Wanted]:
    """Return the bitmaps that TOP must have after the carry. If it is the topmost image it must be right alone.

    `below` is of the images below BASE. While that has no bitmaps other tools move none from there to TOP: see loan.py.
    """
    if seen.above is not None:
        return wanted
    return [
        Wanted(one.bitmap, [*one.maps, *below[one.bitmap.name]], ()) if one.bitmap.name in below else one
        for one in wanted
    ]


def maps_below(seen: Seen, held: Held) -> dict[str, list[DirtyBits]]:
    """Return by name the bitmaps of the images below BASE."""
    found: dict[str, list[DirtyBits]] = {}
    for layer in seen.chain[seen.depth + 1 :]:
        for name, own in _maps(layer, held).items():
            found.setdefault(name, []).append(own)
    return found


def uppers_of(request: CommitRequest, held: Held) -> tuple[OpenImage, ...]:
    """Return the images on top of TOP, topmost first."""
    return tuple(map(held.image, [*request.further, *filter(None, [request.above])]))


def _maps(layer: Layer, held: Held) -> dict[str, DirtyBits]:
    return dict(maps_of(held.image(layer.path), layer.image)) if layer.image else {}


def own_bitmaps(top: OpenImage) -> list[Wanted]:
    """Return TOP's bitmaps as they are, without the mark."""
    image = read_image(top)
    maps = maps_of(top, image)
    return [Wanted(b, [maps[b.name]], (top,)) for b in image.bitmaps if b.name in maps and not b.name.startswith(MARK)]


def content_of(work: Work, held: Held) -> Content:
    """Return what the vault keeps: BASE's bits; if BASE is stripped already, those that TOP carries."""
    seen = work.seen
    place = 0 if work.stage.name == stages.CARRIED else seen.depth
    layer = seen.chain[place]
    maps = _maps(layer, held)
    tops = maps if place == 0 else _maps(seen.chain[0], held)
    below = [(b, [maps[b.name]]) for b in stages.named(layer.image).values() if b.name in maps]
    fates = work.outcome.fates
    above = [b for b in stages.named(seen.top).values() if carries_over(b) and b.name in fates and fates[b.name].bitmap]
    kept = {bitmap.name for bitmap in (*(one for one, _maps in below), *above)}
    return Content(
        token=work.token,
        top=held.image(seen.chain[0].path),
        others=[held.image(one.path) for one in seen.chain[1 : seen.depth]],
        below=below,
        above=[(b, [tops[b.name]]) for b in above if b.recording and fates[b.name].skipped != DISABLED],
        dead={name: fate.skipped for name, fate in fates.items() if fate.bitmap is None and fate.skipped in REASONS},
        virtual_size=seen.chain[0].virtual_size,
        held=AllocationMap(held.image(seen.chain[0].path)),
        held_between=[AllocationMap(held.image(one.path)) for one in seen.chain[1 : seen.depth]],
        top_made=seen.top.history.made,
        known=frozenset(kept.intersection(seen.known or ())),
    )


def kept_of_copy(vault: Vault, work: Work, held: Held) -> Content:
    """Return what a vault keeps, as that of the files that are there, which can be copies."""
    return content_of(work, held)._replace(
        token=vault.token,
        below=[(one.bitmap, [one.bits]) for one in vault.below.values()],
        above=[(one.bitmap, [one.bits]) for one in vault.above.values()],
        dead=vault.dead,
        top_changed=vault.top_changed,
        known=vault.known & {*vault.below, *vault.above},
    )
