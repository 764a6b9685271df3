# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: merge images down into BASE. The operation that commit.py has the rules of, and the numbers of its states."""

from __future__ import annotations

import functools
import os
import secrets
import typing as t

from .._base.errors import QemuError, Refusal
from .._base.files import Identity, OpenImage, open_image
from .._qcow2.backing import change_backing_file, why_not_changeable
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, read_head
from .._qcow2.dirty import DirtyBits, dirty_bytes, maps_of
from .._qcow2.extents import AllocationMap
from .._qcow2.growth import most_growth, most_growth_raw, used_bytes
from .._qcow2.image import Image, read_image
from .._qemu import jobs, locks
from .._qemu.jobs import Opened
from .._qemu.settled import is_open_for_writing
from . import commit
from .bitmap_rules import carries_over
from .carry import Place, Wanted, bring
from .commit import CommitRequest, CommitVerdict, Seen, Work
from .cumulative import most_bytes
from .fates import DISABLED, REASONS
from .observe import observe_chain
from .publish import StagedFile, publish_at_once
from .retire import KEEP, How, kept_path, retire, why_not_retired
from .session import Held, Images
from .share import shares_extents
from .siblings import standing_on
from .vault import (
    MARK,
    Content,
    Vault,
    find_vault,
    holds,
    is_as_kept,
    mark_given,
    open_vault,
    place_of,
    read_vault,
    remove_vault,
    take_back,
    write_vault,
)
from .verdict import FAILED, Need

_SUFFIX = "committed"  # of the name under which an image is kept
_MARK_GRANULARITY = 65536  # bytes
_FOR_VAULT = 1 << 20  # bytes that a vault takes, beside bits


class MergeLayers:
    """State committed: everything down to BASE has gone into it, and is retired. An Operation."""

    def __init__(self, watch: t.Callable[[CommitRequest, jobs.Progress], None]) -> None:
        self._watch = watch

    def problems(self, request: CommitRequest) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""
        return commit.request_problems(request)

    def conflicts(self, requests: t.Sequence[CommitRequest]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""
        ends = [(os.path.realpath(one.path), os.path.realpath(one.backing_file)) for one in requests]
        return commit.conflicts(requests, ends)

    def folders(self, request: CommitRequest) -> t.Sequence[str]:
        """Return the folders of both ends, where a killed run can have left a vault that was not finished."""
        return list(dict.fromkeys(os.path.dirname(path) for path in (request.path, request.backing_file)))

    def refused(self, request: CommitRequest, problems: t.Sequence[Refusal]) -> CommitVerdict:
        """Return the verdict on a request that is refused without a look."""
        return CommitVerdict(request, FAILED, tuple(problems))

    def judge(self, request: CommitRequest, held: Held) -> CommitVerdict:
        """Look at the chain, at what earlier runs have left, and decide."""
        base = held.image(request.backing_file)
        if not os.path.lexists(request.path):
            return _judge_gone(request, base, held)
        chain = observe_chain(held.image(request.path), "qcow2", relative=False).layers
        depth = next((number for number, layer in enumerate(chain) if layer.identity == base.identity), 0)
        above = _read_above(request, held)
        wrong = commit.chain_problems(request, chain, depth, above)
        if wrong:
            return self.refused(request, wrong)
        seen = _see(request, chain, depth, above, held)
        stage = commit.stage_of(seen)
        if isinstance(stage, Refusal):
            return self.refused(request, [stage])
        outcome = commit.outcome_of(seen, stage)
        problems = commit.problems_of(seen, request, outcome) + _problems_in_the_end(seen, request, held)
        if problems:
            return self.refused(request, problems)
        token = seen.vault.token if seen.vault and not stage.stale_vault else _token_of(seen)
        work = Work(seen, stage, outcome, _vault_place(request, base), token)
        return _promise(request, work, held)

    def images(self, verdict: CommitVerdict) -> Images:
        """Return all that takes part, topmost first."""
        work, request = verdict.work, verdict.request
        if work is None:
            return Images((request.backing_file,), frozenset([request.backing_file]))
        paths = [layer.path for layer in work.seen.chain[: work.seen.depth + 1]]
        above = [request.above] if request.above else []
        return Images((*above, *paths), frozenset([*above, *paths]))

    def rehearse(self, verdict: CommitVerdict, _held: Held) -> CommitVerdict:
        """Nothing beside the look can be rehearsed without writing."""
        return verdict

    def phases(self) -> t.Sequence[t.Callable[[CommitVerdict, Held], CommitVerdict]]:
        """Keep, then carry up, then act on BASE; each for all disks of a VM before the next."""
        steps = (self.keep, self.carry, self.strip, self.move, self.give)
        return [_telling_that_it_goes_on(step) for step in steps]

    def keep(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Put BASE's bits and TOP's names into a vault, or take one back that says too much."""
        vault = work.seen.vault
        if vault is not None and work.stage.stale_vault:
            remove_vault(vault.path)
        elif vault is not None:
            if work.stage.not_given:
                take_back(vault.path)
            return verdict
        content = _content_of(work, held)
        staged = held.enter(StagedFile(work.vault_place, os.path.dirname(work.vault_place)))
        write_vault(staged.file.fd, content)
        os.fsync(staged.file.fd)
        if not holds(read_vault(staged.file), content):
            raise Refusal("not_verified", work.vault_place, "the vault is not what was written")
        publish_at_once(staged)
        return verdict

    def carry(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Have TOP's bitmaps take in all that BASE's mark, and give TOP its mark."""
        if work.stage.name == commit.GIVEN or work.seen.top.version == 2:
            return verdict
        top = held.image(verdict.request.path)
        wanted = _wanted(work, held) if work.seen.holds_bitmaps else _own(top)
        mark = Wanted(Bitmap(MARK + work.token, _MARK_GRANULARITY, recording=True, inconsistent=False), ())
        images = {held.image(layer.path): layer.image for layer in work.seen.part if layer.image}
        place = Place(top, None, work.seen.chain[0].virtual_size)
        bring(place, [*wanted, mark], held.monitor, images)
        return verdict

    def strip(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Take BASE's bitmaps away, which TOP has now: a kill could leave some that are wrong and look right."""
        if work.stage.name == commit.GIVEN or not work.seen.holds_bitmaps:
            return verdict
        bring(_base_place(work.seen, held), (), held.monitor, {})
        return verdict

    def move(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Move the data."""
        request, seen = verdict.request, work.seen
        if work.stage.name == commit.GIVEN:
            return verdict
        job = jobs.Job(held.monitor(), held.seconds, request.speed, functools.partial(self._watch, request))
        opened = [_opened(layer, held) for layer in seen.chain]
        layers, base = opened[: seen.depth], opened[seen.depth :]
        if seen.base.virtual_size < seen.chain[0].virtual_size:
            jobs.resize(job.monitor, base[0], seen.chain[0].virtual_size, job.seconds)
        method = verdict.method
        if method == commit.SHARED:
            method = _share(job, layers, base)
        if method == commit.COPIED:
            jobs.commit(job, layers, base)
        os.fsync(base[0].file.fd)
        return verdict._replace(method=method)

    def give(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Give BASE TOP's bitmaps, and say in the vault's name that all is done."""
        if work.stage.name == commit.GIVEN:
            return verdict
        if work.seen.holds_bitmaps:
            top = held.image(verdict.request.path)
            image = read_image(top)
            bring(_base_place(work.seen, held), _own(top), held.monitor, {top: image})
        mark_given(work.vault_place)
        return verdict

    def publish(self, verdicts: t.Sequence[CommitVerdict], held: Held, switch: t.Callable[[], None]) -> None:
        """Put the VM, or the image above, onto BASE; then retire what went in, and the vault last."""
        done = [verdict for verdict in verdicts if verdict.changed]
        switch()
        for verdict in done:
            _put_onto_base(verdict, held)
        for verdict in done:
            _retire_all(verdict, held)


def _telling_that_it_goes_on(
    step: t.Callable[[CommitVerdict, Work, Held], CommitVerdict],
) -> t.Callable[[CommitVerdict, Held], CommitVerdict]:
    """Return the step as a phase, whose failure says what the next run does."""

    def taken(verdict: CommitVerdict, held: Held) -> CommitVerdict:
        if verdict.work is None:
            return verdict
        try:
            return step(verdict, verdict.work, held)
        except QemuError as exc:
            raise exc.about(verdict.request.path).with_note(_GOES_ON) from exc
        except Refusal as exc:
            raise exc.with_note(_GOES_ON) from exc

    return taken


_GOES_ON = "Until then the VM can go on with its overlay, and with its incremental backups; the same call goes on."


def _vault_place(request: CommitRequest, base: OpenImage) -> str:
    return place_of(os.path.realpath(request.backing_file), base.is_device, os.path.realpath(request.path))


def _judge_gone(request: CommitRequest, base: OpenImage, held: Held) -> CommitVerdict:
    """Return the verdict where nothing stands at the path: committed before, or not finished."""
    path = find_vault(_vault_place(request, base))
    if path is None:
        return CommitVerdict(request, commit.ABSENT, virtual_size=_virtual_size(request, base))
    vault = read_vault(held.enter(open_vault(path)))
    problem = commit.why_gone(request, vault)
    if problem is not None:
        return CommitVerdict(request, FAILED, (problem,))
    return CommitVerdict(request, commit.COMMITTED, virtual_size=_virtual_size(request, base), finished=vault)


def _virtual_size(request: CommitRequest, base: OpenImage) -> int:
    return base.length() if request.backing_format == "raw" else read_head(base).virtual_size


def _read_above(request: CommitRequest, held: Held) -> Layer | None:
    """Return the image on top of the one that is committed, if one was given."""
    if request.above is None:
        return None
    file = held.image(request.above)
    held.alone(request.above)
    return observe_chain(file, "qcow2", relative=False).layers[0]


def _see(request: CommitRequest, chain: tuple[Layer, ...], depth: int, above: Layer | None, held: Held) -> Seen:
    """Return what stands there. Keep everybody from the images that take part, and writers from those below BASE."""
    part = chain[: depth + 1]
    for layer in part:
        held.alone(layer.path)
    for layer in chain[depth + 1 :]:
        held.unwritten(layer.path)
    files = [held.image(layer.path) for layer in part]
    vault_path = find_vault(_vault_place(request, files[depth]))
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
        others=tuple(path for layer in part for path in standing_on(layer.identity, folders, ours)),
    )


def _mark_is_empty(file: OpenImage, image: Image) -> bool | None:
    """Whether nobody has written to TOP since it got its mark; None if it has none, or a broken one."""
    mark = next((own for name, own in maps_of(file, image).items() if name.startswith(MARK)), None)
    return None if mark is None else not dirty_bytes([mark], image.virtual_size)


def _is_as_kept(vault: Vault, file: OpenImage, base: Layer) -> bool:
    if base.image is None:
        return not vault.below
    own = {bitmap.name: bitmap for bitmap in base.image.bitmaps}
    return not base.image.lost_bitmaps and is_as_kept(vault, own, maps_of(file, base.image), base.virtual_size)


def _token_of(seen: Seen) -> str:
    """Return the token of the mark that is there, or a new one."""
    return seen.mark.name[len(MARK) :] if seen.mark else secrets.token_hex(8)


def _layers(seen: Seen, held: Held) -> list[tuple[Layer, OpenImage]]:
    """Return the images that go in, topmost first."""
    return [(layer, held.image(layer.path)) for layer in seen.chain[: seen.depth]]


def _promise(request: CommitRequest, work: Work, held: Held) -> CommitVerdict:
    """Return the verdict for the case that nothing is wrong."""
    seen, outcome = work.seen, work.outcome
    size = seen.chain[0].virtual_size
    held_by = sorted((AllocationMap(file) for _layer, file in _layers(seen, held)), key=lambda one: one.granularity)
    is_shared = commit.can_share(seen) and shares_extents([layer.real_path for layer in seen.chain[: seen.depth + 1]])
    return CommitVerdict(
        request=request,
        state=commit.COMMITTED,
        virtual_size=size,
        bitmaps=outcome.usable,
        skipped=outcome.skipped,
        is_exact=outcome.is_exact,
        method=commit.SHARED if is_shared else commit.COPIED,
        committed_bytes=dirty_bytes(held_by, size),
        kept_as=kept_path(request.path, _SUFFIX) if request.retire == KEEP else None,
        need=_need(work, held, is_shared) if work.stage.name != commit.GIVEN else None,
        work=work,
    )


def _need(work: Work, held: Held, is_shared: bool) -> Need | None:
    """Return the space that BASE takes beside what it has; Refusal if a block device has not so much."""
    seen, base = work.seen, held.image(work.seen.base.path)
    files = [file for _layer, file in _layers(seen, held)]
    if seen.base.image is None:
        growth, end = most_growth_raw(base, files), 0
    else:
        growth = most_growth(base, files, _bitmap_clusters(work, held))
        end = used_bytes(base) if base.is_device else 0
    if base.is_device:
        if end + growth > base.length():
            why = f"has {base.length()} bytes, and needs {end + growth}"
            raise Refusal("no_space", base.path, why, "Enlarge it (lvextend), then run this again.")
        return None
    folder = os.path.dirname(seen.base.real_path)
    space = os.statvfs(folder)
    free = (space.f_bfree if os.geteuid() == 0 else space.f_bavail) * space.f_frsize
    bits = sum(one.most_dirty_bits // 8 for wanted in _wanted(work, held) for one in wanted.maps)
    # The vault holds the bits once, and TOP a second time.
    return Need(base.status().st_dev, folder, growth + 2 * bits + _FOR_VAULT, free) if space.f_blocks else None


def _bitmap_clusters(work: Work, held: Held) -> int:
    """Return how many clusters BASE's new bitmaps take at most, with their tables and their directory."""
    image, size = work.seen.base.image, work.seen.chain[0].virtual_size
    wanted = _wanted(work, held)
    if image is None or not wanted:
        return 0
    tables = sum(-(-one.bitmap.data_bytes(size) // image.cluster_size) * 8 for one in wanted)
    maps = {one.bitmap.name: one.maps for one in wanted}
    data = most_bytes(maps, [one.bitmap for one in wanted], image.cluster_size, size)
    directory = sum(32 + len(one.bitmap.name.encode("utf-8", "surrogateescape")) for one in wanted)
    return data // image.cluster_size + tables // image.cluster_size + len(wanted) + directory // image.cluster_size + 1


def _wanted(work: Work, held: Held) -> list[Wanted]:
    """Return the bitmaps that TOP must have after the carry, which are those that BASE gets."""
    seen = work.seen
    if not seen.holds_bitmaps:
        return []
    maps = [_maps(layer, held) for layer in seen.chain[: seen.depth + 1]]
    if seen.vault is not None and work.stage.name == commit.REBUILT:
        maps[seen.depth] = {name: kept.bits for name, kept in seen.vault.below.items()}
    are_alike = len({layer.virtual_size for layer in seen.chain[: seen.depth + 1]}) == 1
    all_wanted = []
    for name, fate in work.outcome.fates.items():
        if fate.bitmap is None:
            continue
        own: list[DirtyBits] = [maps[place][name] for place in fate.bits]
        held_all = [AllocationMap(held.image(seen.chain[place].path)) for place in fate.held]
        # QEMU merges no bitmaps of different sizes, and knows nothing of vaults and of what images hold.
        by_qemu = are_alike and not fate.held and work.stage.name != commit.REBUILT
        sources = tuple(held.image(seen.chain[place].path) for place in fate.bits) if by_qemu else ()
        all_wanted.append(Wanted(fate.bitmap, [*own, *held_all], sources))
    return all_wanted


def _maps(layer: Layer, held: Held) -> dict[str, DirtyBits]:
    return dict(maps_of(held.image(layer.path), layer.image)) if layer.image else {}


def _own(top: OpenImage) -> list[Wanted]:
    """Return TOP's bitmaps as they are, without the mark."""
    image = read_image(top)
    maps = maps_of(top, image)
    return [Wanted(b, [maps[b.name]], (top,)) for b in image.bitmaps if b.name in maps and not b.name.startswith(MARK)]


def _content_of(work: Work, held: Held) -> Content:
    """Return what the vault keeps: BASE's bits; if BASE is stripped already, those that TOP carries."""
    seen = work.seen
    place = 0 if work.stage.name == commit.CARRIED else seen.depth
    layer = seen.chain[place]
    maps = _maps(layer, held)
    below = [(b, [maps[b.name]]) for b in commit.named(layer.image).values() if b.name in maps]
    fates = work.outcome.fates
    above = [b for b in commit.named(seen.top).values() if carries_over(b) and fates[b.name].bitmap]
    return Content(
        token=work.token,
        top=held.image(seen.chain[0].path),
        others=[held.image(one.path) for one in seen.chain[1 : seen.depth]],
        below=below,
        above=[b for b in above if b.recording and fates[b.name].skipped != DISABLED],
        dead={name: fate.skipped for name, fate in fates.items() if fate.bitmap is None and fate.skipped in REASONS},
        virtual_size=seen.chain[0].virtual_size,
    )


def _base_place(seen: Seen, held: Held) -> Place:
    base = _opened(seen.base, held)
    return Place(base.file, base.data_file, seen.chain[0].virtual_size)


def _opened(layer: Layer, held: Held) -> Opened:
    """Return an image of the chain as the jobs need it."""
    data_file = layer.image.data_file if layer.image else None
    return Opened(held.image(layer.path), layer.format_found, held.image(data_file) if data_file else None)


def _share(job: jobs.Job, layers: t.Sequence[Opened], base: t.Sequence[Opened]) -> str:
    """Share the extents of the layers, the lowest first; return the method that did it."""
    for layer in reversed(layers):
        try:
            jobs.share(job, layer, base)
        except QemuError as exc:
            if exc.code != "qemu_option":  # as of one that is too old
                raise
            return commit.COPIED
    return commit.SHARED


def _put_onto_base(verdict: CommitVerdict, held: Held) -> None:
    """Have the image above record BASE as its backing file, if one was given."""
    request, work = verdict.request, verdict.work
    if request.above is not None and work is not None:
        name = _name_for_above(request, work.seen)
        change_backing_file(held.image(request.above), name, request.backing_format)


def _name_for_above(request: CommitRequest, seen: Seen) -> str:
    """Return the name under which the image above records BASE: relative if that is how it records the other one."""
    recorded = seen.above.image.backing_file if seen.above and seen.above.image else None
    if recorded is None or os.path.isabs(recorded):
        return request.backing_file
    return os.path.relpath(seen.base.real_path, os.path.dirname(os.path.realpath(str(request.above))))


def _problems_in_the_end(seen: Seen, request: CommitRequest, held: Held) -> list[Refusal]:
    """Return why the last steps would fail, which is told before the first one."""
    found = [why_not_retired(layer.path, file, _how(request), _SUFFIX) for layer, file in _layers(seen, held)]
    if request.above is not None:
        name = _name_for_above(request, seen)
        found.append(why_not_changeable(held.image(request.above), name, request.backing_format))
    return [problem for problem in found if problem is not None]


def _retire_all(verdict: CommitVerdict, held: Held) -> None:
    """Retire the images that went in, TOP first, then the vault: it alone tells that nothing else is to be done."""
    request, work, vault = verdict.request, verdict.work, verdict.finished
    if work is not None:
        for layer, file in _layers(work.seen, held):
            retire(layer.path, file, _how(request), _SUFFIX)
        found = find_vault(work.vault_place)
    elif vault is not None:
        for identity, path in vault.others:
            _retire_left_over(path, identity, request)
        found = vault.path
    else:
        found = None
    if found is not None:
        remove_vault(found)


def _retire_left_over(path: str, identity: Identity, request: CommitRequest) -> None:
    """Retire an image that went in, and that a killed run has left; nothing if another one has its name now."""
    try:
        with open_image(path) as file:
            if file.identity == identity:
                retire(path, file, _how(request), _SUFFIX)
    except Refusal as exc:
        if exc.code != "no_such_file":
            raise


def _how(request: CommitRequest) -> How:
    return "keep" if request.retire == KEEP else "delete"
