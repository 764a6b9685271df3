# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: what stands there before a commit, what earlier runs have left, and where the bits of each bitmap are."""

from __future__ import annotations

import contextlib
import os
import secrets

from .._base.errors import Refusal
from .._base.files import OpenImage, open_image
from .._qcow2.chain import Layer, read_head
from .._qcow2.dirty import DirtyBits, dirty_bytes, maps_of
from .._qcow2.extents import AllocationMap, has_compressed_clusters
from .._qcow2.growth import most_growth, most_growth_raw, used_bytes
from .._qcow2.image import Image, read_image
from .._qemu import locks
from .._qemu.settled import is_open_for_writing
from . import commit, stages
from .bitmap_rules import carries_over
from .carry import Wanted
from .commit import CommitRequest, CommitVerdict, Work
from .cumulative import most_bytes
from .fates import DISABLED, REASONS
from .observe import observe_chain
from .retire import KEEP, kept_path
from .revert_rules import Retired
from .session import Held
from .share import shares_extents
from .siblings import standing_on
from .stages import Seen
from .vault import MARK, Content, Vault, find_vault, is_as_kept, open_vault, place_of, read_vault
from .verdict import FAILED, Need

KEPT_AS = "committed"  # the suffix of an image that went in and is kept
_FOR_VAULT = 1 << 20  # bytes that a vault takes, beside bits


def vault_place(request: CommitRequest, base: OpenImage) -> str:
    """Return where the vault of the commit is."""
    return place_of(os.path.realpath(request.backing_file), base.is_device, os.path.realpath(request.path))


def judge_gone(request: CommitRequest, base: OpenImage, held: Held) -> CommitVerdict:
    """Return the verdict where nothing stands at the path: committed before, or not finished."""
    path = find_vault(vault_place(request, base))
    if path is None:
        return CommitVerdict(request, commit.ABSENT, virtual_size=_virtual_size(request, base))
    vault = read_vault(held.enter(open_vault(path)))
    problem = commit.why_gone(request, vault)
    if problem is not None:
        return CommitVerdict(request, FAILED, (problem,))
    return CommitVerdict(request, commit.COMMITTED, virtual_size=_virtual_size(request, base), finished=vault)


def _virtual_size(request: CommitRequest, base: OpenImage) -> int:
    return base.length() if request.backing_format == "raw" else read_head(base).virtual_size


def read_above(request: CommitRequest, held: Held) -> Layer | None:
    """Return the image on top of the one that is committed, if one was given."""
    if request.above is None:
        return None
    file = held.image(request.above)
    held.alone(request.above)
    return observe_chain(file, "qcow2", relative=False).layers[0]


def see(request: CommitRequest, chain: tuple[Layer, ...], depth: int, above: Layer | None, held: Held) -> Seen:
    """Return what stands there. Keep everybody from the images that take part, and writers from those below BASE."""
    part = chain[: depth + 1]
    for layer in part:
        held.alone(layer.path)
    for layer in chain[depth + 1 :]:
        held.unwritten(layer.path)
    files = [held.image(layer.path) for layer in part]
    vault_path = find_vault(vault_place(request, files[depth]))
    vault = read_vault(held.enter(open_vault(vault_path))) if vault_path else None
    base, top = part[depth], part[0].image
    ours = [*([held.image(request.above).identity] if request.above else []), *(layer.identity for layer in part)]
    folders = [os.path.dirname(layer.real_path) for layer in part if not layer.is_device]
    return Seen(
        chain=chain,
        depth=depth,
        top_identity=files[0].identity,
        vault=vault,
        mark_is_empty=_mark_is_empty(files[0], top) if top else None,
        base_is_as_kept=vault is not None and _is_as_kept(vault, files[depth], base),
        top_changed=files[0].status().st_mtime_ns,
        base_changed=None if base.is_device else files[depth].status().st_mtime_ns,
        above=above,
        open_for_writing=tuple(file.path for file in files if is_open_for_writing(file)),
        below_running=tuple(file.path for file in files if locks.is_locked_by_qemu(file, locks.WRITE_UNSHARED)),
        others=tuple(
            path
            for layer in part
            for path in standing_on(layer.identity, folders, ours)
            if not _has_gone_in(path, vault)
        ),
    )


def _has_gone_in(path: str, vault: Vault | None) -> bool:
    """Whether an image was committed before and is only kept: it has a mark, and no vault waits for it."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        marks = [bitmap.name for bitmap in read_image(file).bitmaps if bitmap.name.startswith(MARK)]
        return bool(marks) and (vault is None or MARK + vault.token not in marks)
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
    held_by = sorted((AllocationMap(file) for _layer, file in layers_of(seen, held)), key=lambda one: one.granularity)
    is_shared = _can_share(seen, held)
    return CommitVerdict(
        request=request,
        state=commit.COMMITTED,
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
        need=_need(work, held, is_shared) if work.stage.name != stages.GIVEN else None,
        work=work,
    )


def _can_share(seen: Seen, held: Held) -> bool:
    """Whether the data can get into BASE by extents that both files share."""
    if not commit.can_share(seen) or seen.base.image is None:
        return False
    if any(
        has_compressed_clusters(file) for _layer, file in layers_of(seen, held)
    ):  # at the first, QEMU begins to copy
        return False
    return shares_extents([layer.real_path for layer in seen.part], seen.base.image.cluster_size)


def _need(work: Work, held: Held, is_shared: bool) -> Need | None:
    """Return the space that BASE takes beside what it has; Refusal if a block device has not so much."""
    seen, base = work.seen, held.image(work.seen.base.path)
    files = [file for _layer, file in layers_of(seen, held)]
    if seen.base.image is None:
        growth, end = most_growth_raw(base, files), 0
    else:
        growth = most_growth(base, files, _bitmap_clusters(work, held), shares_data=is_shared)
        end = used_bytes(base) if base.is_device else 0
    if base.is_device:
        if end + growth > base.length():
            why = f"has {base.length()} bytes, and needs {end + growth}"
            raise Refusal("no_space", base.path, why, "Enlarge it (lvextend), then run this again.")
        return None
    folder = os.path.dirname(seen.base.real_path)
    space = os.statvfs(folder)
    free = (space.f_bfree if os.geteuid() == 0 else space.f_bavail) * space.f_frsize
    bits = sum(one.most_dirty_bits // 8 for wanted in wanted_by(work, held) for one in wanted.maps)
    # The vault holds the bits once, and TOP a second time.
    return Need(base.status().st_dev, folder, growth + 2 * bits + _FOR_VAULT, free) if space.f_blocks else None


def _bitmap_clusters(work: Work, held: Held) -> int:
    """Return how many clusters BASE's new bitmaps take at most, with their tables and their directory."""
    image, size = work.seen.base.image, work.seen.chain[0].virtual_size
    wanted = wanted_by(work, held)
    if image is None or not wanted:
        return 0
    tables = sum(-(-one.bitmap.data_bytes(size) // image.cluster_size) * 8 for one in wanted)
    maps = {one.bitmap.name: one.maps for one in wanted}
    data = most_bytes(maps, [one.bitmap for one in wanted], image.cluster_size, size)
    directory = sum(32 + len(one.bitmap.name.encode("utf-8", "surrogateescape")) for one in wanted)
    return data // image.cluster_size + tables // image.cluster_size + len(wanted) + directory // image.cluster_size + 1


def wanted_by(work: Work, held: Held) -> list[Wanted]:
    """Return the bitmaps that TOP must have after the carry, which are those that BASE gets."""
    seen = work.seen
    if not seen.carries_bitmaps:
        return []
    maps = [_maps(layer, held) for layer in seen.chain[: seen.depth + 1]]
    if seen.vault is not None and work.stage.name == stages.REBUILT:
        maps[seen.depth] = {name: kept.bits for name, kept in seen.vault.below.items()}
    are_alike = len({layer.virtual_size for layer in seen.chain[: seen.depth + 1]}) == 1
    all_wanted = []
    for name, fate in work.outcome.fates.items():
        if fate.bitmap is None:
            continue
        own: list[DirtyBits] = [maps[place][name] for place in fate.bits]
        held_all = [AllocationMap(held.image(seen.chain[place].path)) for place in fate.held]
        # QEMU merges no bitmaps of different sizes, and knows nothing of vaults and of what images hold.
        by_qemu = are_alike and not fate.held and work.stage.name != stages.REBUILT
        sources = tuple(held.image(seen.chain[place].path) for place in fate.bits) if by_qemu else ()
        all_wanted.append(Wanted(fate.bitmap, [*own, *held_all], sources))
    return all_wanted


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
    below = [(b, [maps[b.name]]) for b in stages.named(layer.image).values() if b.name in maps]
    fates = work.outcome.fates
    above = [b for b in stages.named(seen.top).values() if carries_over(b) and fates[b.name].bitmap]
    return Content(
        token=work.token,
        top=held.image(seen.chain[0].path),
        others=[held.image(one.path) for one in seen.chain[1 : seen.depth]],
        below=below,
        above=[b for b in above if b.recording and fates[b.name].skipped != DISABLED],
        dead={name: fate.skipped for name, fate in fates.items() if fate.bitmap is None and fate.skipped in REASONS},
        virtual_size=seen.chain[0].virtual_size,
    )
