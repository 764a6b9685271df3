# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: merge images down into BASE. The operation that commit.py has the rules of, and the numbers of its states."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import QemuError, Refusal
from .._base.files import OpenImage, identity_of, open_image, real_path
from .._qcow2.backing import change_backing_file, why_not_changeable
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, read_head, resolve_name, walk_chain
from .._qcow2.dirty import maps_of
from .._qcow2.formats import PLAIN, QCOW2, RAW
from .._qcow2.image import read_image
from .._qcow2.mark import write_base
from .._qemu import jobs
from .._qemu.jobs import Opened
from . import commit, stages
from .carry import Place, Wanted, bring, expected_bitmaps
from .commit import CommitRequest, CommitVerdict, Work
from .loan import Loan, end_loans, lend_upwards
from .observe import observe_chain, why_not_opened
from .progress import telling
from .publish import StagedFile, check_owner, publish_at_once, publish_over
from .retire import KEPT_AS, remove_dangling_link, retire, stands, why_not_retired
from .revert_rules import Retired
from .session import Held, Images, failed_by
from .stages import Seen
from .survey import (
    carried_by,
    content_of,
    judge_gone,
    kept_of_copy,
    layers_of,
    maps_below,
    own_bitmaps,
    promise,
    read_above,
    see,
    token_of,
    uppers_of,
    vault_place,
    wanted_by,
)
from .unfinished import is_left, why_not_merged
from .vault import (
    MARK,
    Content,
    Vault,
    find_vault,
    holds,
    mark_given,
    open_vault,
    read_vault,
    remove_vault,
    sync_folder_of,
    take_back,
    top_stands,
    why_no_vault,
    write_vault,
)
from .verdict import FAILED

_MARK_GRANULARITY = 65536  # bytes


class MergeLayers:
    """State committed: everything down to BASE has gone into it, and is retired. An Operation.

    `gone`: paths of images that are there only because check mode has not retired them.
    """

    def __init__(self, gone: t.Collection[str] = ()) -> None:
        self._gone = frozenset(map(os.path.realpath, gone))
        self._to_give: dict[str, t.Sequence[Wanted]] = {}  # by path of TOP, which marks more than BASE is to
        self._loans: dict[str, t.Sequence[Loan]] = {}  # by path of TOP

    def problems(self, request: CommitRequest) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""
        return commit.request_problems(request)

    def conflicts(self, requests: t.Sequence[CommitRequest]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""
        return commit.conflicts(requests, [_touched(one) for one in requests])

    def folders(self, request: CommitRequest) -> t.Sequence[str]:
        """Return the folders of both ends, where a killed run can have left a vault that was not finished."""
        ends = map(os.path.realpath, (request.path, request.backing_file))  # a vault is beside the file, not a symlink
        return list(dict.fromkeys(map(os.path.dirname, ends)))

    def refused(self, request: CommitRequest, problems: t.Sequence[Refusal]) -> CommitVerdict:
        """Return the verdict on a request that is refused without a look."""
        return CommitVerdict(request, FAILED, tuple(problems))

    def judge(self, request: CommitRequest, held: Held) -> CommitVerdict:
        """Look at the chain, at what earlier runs have left, and decide."""
        base = held.image(request.backing_file)
        if not stands(request.path) or _is_left(request, base):
            return judge_gone(request, base, held)
        chain = observe_chain(held.image(request.path), "qcow2", relative=False).layers
        depth = next((number for number, layer in enumerate(chain) if layer.identity == base.identity), 0)
        above = read_above(request, held)
        wrong = commit.chain_problems(request, chain, depth, above)
        in_the_way = (
            chain[-1].why_no_bottom(),  # QEMU fills up BASE's clusters with what is below it
            why_not_merged(chain, depth, above, vault_place(request, base)),
        )
        wrong += [problem for problem in in_the_way if problem is not None]
        if wrong:
            return self.refused(request, wrong)
        seen = see(request, chain, depth, above, held)
        seen = seen._replace(others=tuple(one for one in seen.others if os.path.realpath(one) not in self._gone))
        stage = stages.stage_of(seen)
        if isinstance(stage, Refusal):
            return self.refused(request, [stage])
        seen = _with_what_counts(seen, stage)
        outcome = commit.outcome_of(seen, stage, dict(request.created))
        problems = commit.problems_of(seen, stage, request, outcome) + _problems_in_the_end(seen, request, held)
        problems += _why_not_written(seen, stage, request, held)
        if problems:
            return self.refused(request, problems)
        token = seen.vault.token if seen.vault else token_of(seen)
        work = Work(seen, stage, outcome, vault_place(request, base), token)
        return promise(request, work, held)

    def images(self, verdict: CommitVerdict) -> Images:
        """Return all that takes part, topmost first."""
        work, request = verdict.work, verdict.request
        if work is None:
            return Images((request.backing_file,), frozenset([request.backing_file]))
        paths = [layer.path for layer in work.seen.chain[: work.seen.depth + 1]]
        paths = [*request.further, *([request.above] if request.above else []), *paths]
        return Images(tuple(paths), frozenset(paths))

    def rehearse(self, verdict: CommitVerdict, held: Held) -> CommitVerdict:
        """Have QEMU open what is below BASE; nothing else beside the look can be rehearsed without writing."""
        if verdict.work is not None and verdict.work.stage.name != stages.GIVEN:
            held.monitor()
            _try_to_open(verdict.work, held)
        return verdict

    def phases(self) -> t.Sequence[t.Callable[[CommitVerdict, Held], CommitVerdict]]:
        """Keep, then carry up, then act on BASE; each for all disks of a VM before the next."""
        steps = (self.keep, self.carry, self.strip, self.move, self.give)
        return [self.check_owner, *(_telling_that_it_goes_on(step) for step in steps)]

    def check_owner(self, verdict: CommitVerdict, _held: Held) -> CommitVerdict:
        """Refuse where no later run would trust the vault."""
        work = verdict.work
        if work is not None and work.seen.vault is None:
            check_owner(work.vault_place)
        return verdict

    def keep(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Put the bits of BASE and TOP into a vault, or take one back that says too much."""
        _try_to_open(work, held)
        vault = work.seen.vault
        stale = find_vault(work.vault_place) if work.stage.stale_vault else None
        if stale is not None:
            remove_vault(stale)
        elif vault is not None:
            if work.stage.not_given:
                take_back(vault.path)
            elif work.stage.name == stages.REBUILT and (work.stage.removed or not work.seen.is_top_of_vault):
                # A kill while QEMU opens a copy takes away what tells that it is one, and BASE soon lacks all.
                publish_over(_staged_vault(kept_of_copy(vault, work, held), work, held))
            else:
                sync_folder_of(vault.path)
            return verdict
        publish_at_once(_staged_vault(content_of(work, held), work, held))
        return verdict

    def carry(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Have TOP's bitmaps take in all that BASE's mark, and give TOP its mark."""
        if work.stage.name == stages.GIVEN or work.seen.top.version == 2:
            return verdict
        top, size = held.image(verdict.request.path), work.seen.chain[0].virtual_size
        wanted = wanted_by(work, held) if work.seen.holds_bitmaps else own_bitmaps(top)
        below = maps_below(work.seen, held)
        carried = carried_by(wanted, work.seen, below)
        if carried != wanted:
            _scratch, self._to_give[top.path] = held.enter(expected_bitmaps(wanted, size))
        mark = Wanted(Bitmap(MARK + work.token, _MARK_GRANULARITY, recording=True, inconsistent=False), ())
        images = {held.image(layer.path): layer.image for layer in work.seen.part if layer.image}
        place = Place(top, None, size, uppers_of(verdict.request, held), below)
        bring(place, [*carried, mark], held, images)
        return verdict

    def strip(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Take BASE's bitmaps away, which TOP has now: a kill could leave some that are wrong and look right."""
        if work.stage.name == stages.GIVEN or not work.seen.holds_bitmaps:
            return verdict
        top, below = held.image(verdict.request.path), maps_below(work.seen, held)
        # Without BASE's there is a gap, if an image below it has them.
        marked = {name: [own, *below[name]] for name, own in maps_of(top, read_image(top)).items() if name in below}
        self._loans[top.path] = lend_upwards(uppers_of(verdict.request, held), marked, work.seen.chain[0].virtual_size)
        bring(_base_place(work.seen, held), (), held, {})
        return verdict

    def move(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Move the data."""
        request = verdict.request
        if work.stage.name == stages.GIVEN:
            return verdict
        with telling(request) as tell:
            job = jobs.Job(held.monitor(), held.seconds, request.speed, tell)
            method = _move_data(job, work.seen, held, is_shared=verdict.method == commit.SHARED)
        return verdict._replace(method=method)

    def give(self, verdict: CommitVerdict, work: Work, held: Held) -> CommitVerdict:
        """Give BASE TOP's bitmaps, and say in the vault's name that all is done."""
        if work.stage.name == stages.GIVEN:
            return verdict
        if work.seen.holds_bitmaps:
            top = held.image(verdict.request.path)
            image = read_image(top)
            exact = {one.bitmap.name: one._replace(sources=()) for one in self._to_give.get(top.path, ())}
            to_give = [exact.get(one.bitmap.name, one) for one in own_bitmaps(top)]
            bring(_base_place(work.seen, held), to_give, held, {top: image})
            end_loans(self._loans.pop(top.path))
        mark_given(work.vault_place)
        return verdict

    def publish(
        self, verdicts: t.Sequence[CommitVerdict], held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[CommitVerdict]:
        """Put the VM, or the image above, onto BASE; then retire what went in, and the vault last."""
        switch()
        return [_finished(verdict, held) if verdict.changed else verdict for verdict in verdicts]


def _is_left(request: CommitRequest, base: OpenImage) -> bool:
    """Whether what stands at the path is only the rest of a merge whose topmost image is gone.

    That is a symlink to it, or an image below it: a run was killed before it removed these.
    """
    path = find_vault(vault_place(request, base))
    if path is None:
        return False
    with open_vault(path) as file:
        vault = read_vault(file)
    if not vault.is_given:
        return False
    if not stands(real_path(request.path)):
        return vault.top_path == request.path
    with open_image(request.path) as file:
        return is_left(file, vault) and not top_stands(vault, base.identity)


def _with_what_counts(seen: Seen, stage: stages.Stage) -> Seen:
    """Return what stands there without a vault that tells nothing of this commit, or without what was removed since."""
    if stage.stale_vault:
        return seen._replace(vault=None, is_top_of_vault=False)
    return seen._replace(vault=seen.vault.without(stage.removed)) if seen.vault is not None else seen


def _touched(request: CommitRequest) -> dict[t.Hashable, str]:
    """Return the paths of the images that a request changes or retires, each by its identity; and by its name.

    Two requests that have none of their ends in common can share what is between them.
    """
    ends = [path for path in (request.path, request.backing_file, request.above) if path is not None]
    found: dict[t.Hashable, str] = {os.path.realpath(path): path for path in ends}
    for path in ends:
        with contextlib.suppress(OSError, ValueError):
            found[identity_of(os.stat(path))] = path
    # The look at them will tell what is wrong with them.
    with contextlib.suppress(OSError, ValueError, Refusal), open_image(request.path) as file:
        base = identity_of(os.stat(request.backing_file))
        between: dict[t.Hashable, str] = {}
        for layer, _file in walk_chain(file, QCOW2, read_top=read_head):
            if layer.identity == base:
                return {**between, **found}
            between[layer.identity] = layer.path
    return found


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


_GOES_ON = "Until then the VM can go on with its overlay. The same call goes on, and no bitmap gets lost."


def _staged_vault(content: Content, work: Work, held: Held) -> StagedFile:
    """Return a vault that is on stable storage and read back, and has no name yet."""
    staged = held.enter(StagedFile(work.vault_place, os.path.dirname(work.vault_place)))
    write_vault(staged.file.fd, content)
    os.fsync(staged.file.fd)
    if not holds(read_vault(staged.file), content):
        raise Refusal("not_verified", work.vault_place, "the vault is not what was written")
    return staged


def _base_place(seen: Seen, held: Held) -> Place:
    base = _opened(seen.base, held)
    return Place(base.file, base.data_file, seen.chain[0].virtual_size)


def _opened(layer: Layer, held: Held) -> Opened:
    """Return an image of the chain as the jobs need it."""
    data_file = layer.image.data_file if layer.image else None
    driver = RAW if layer.format_found in PLAIN else layer.format_found
    return Opened(held.image(layer.path), driver, held.image(data_file) if data_file else None)


def _try_to_open(work: Work, held: Held) -> None:
    """Fail before anything is written if QEMU cannot open what is below BASE, such as an encrypted image."""
    below = work.seen.chain[work.seen.depth + 1 :]
    if below and work.stage.name != stages.GIVEN:
        jobs.try_to_open(held.monitor(), [_opened(layer, held) for layer in below])


def _move_data(job: jobs.Job, seen: Seen, held: Held, *, is_shared: bool) -> str:
    """Move the data of the layers into BASE, on stable storage; return the method that did it."""
    opened = [_opened(layer, held) for layer in seen.chain]
    layers, base = opened[: seen.depth], opened[seen.depth :]
    size = seen.chain[0].virtual_size
    if seen.base.virtual_size < size:
        jobs.resize(job.monitor, base[0], size, job.seconds)
    method = _share(job, layers, base) if is_shared else commit.COPIED
    if method == commit.COPIED:
        jobs.commit(job, layers, base)
    for file in filter(None, (base[0].data_file, base[0].file)):
        os.fsync(file.fd)  # QEMU has done so, and said nothing if it failed
    return method


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
    if request.above is None or work is None:
        return
    base, above = held.image(request.backing_file), held.image(request.above)
    # After a kill nobody can tell when a VM wrote. For whoever merges what a VM has, the time of BASE does not count.
    are_known = work.stage.name == stages.WHOLE
    if not work.seen.part_is_as_recorded:
        base.touch()  # who wrote to it or to TOP may have put in what is above; nothing is to tell that it is right
    if are_known and not request.is_of_vm:
        _put_time_back(base, _newest(work.seen))
    change_backing_file(above, name_for_above(request, work.seen), request.backing_format)
    if work.seen.part_is_as_recorded:
        write_base(above, base)  # or else what has gone in looked as if others had written it
    if are_known:
        _put_time_back(above, work.seen.above_changed)


def _newest(seen: Seen) -> int:
    """Return when what is in BASE now was last written to, in nanoseconds since 1970."""
    below = [changed for layer in seen.part if (changed := seen.below_changed.get(layer.path)) is not None]
    recorded = seen.above.image.history.base_written if seen.above is not None and seen.above.image is not None else 0
    # Where it may hold what is above, it must be newer than what the image above records, for who goes back.
    return max(seen.top_changed, *below, *([] if seen.part_is_as_recorded else [recorded + 1]))


def _put_time_back(file: OpenImage, written: int) -> None:
    """Have an image be as new as its data: else images further up would be older, and one left over would look new."""
    with contextlib.suppress(OSError):  # another user's stay new
        file.put_time_back(written)


def name_for_above(request: CommitRequest, seen: Seen) -> str:
    """Return the name under which the image above records BASE: relative if that is how it records the other one.

    A relative name counts from the folder by which the VM has the image above, which a symlink can make another one
    than it is in, and `..` in it from where that folder really is.
    """
    recorded = seen.above.image.backing_file if seen.above and seen.above.image else None
    if recorded is None or os.path.isabs(recorded):
        return request.backing_file
    above = str(request.above)
    for path, place in ((seen.base.real_path, os.path.realpath(above)), (seen.base.path, above)):
        name = os.path.relpath(path, os.path.dirname(place))
        with contextlib.suppress(OSError):
            if identity_of(os.stat(resolve_name(above, name))) == seen.base.identity:
                return name
    return request.backing_file


def _problems_in_the_end(seen: Seen, request: CommitRequest, held: Held) -> list[Refusal]:
    """Return why the last steps would fail, which is told before the first one."""
    # The way out of a device that goes back, to use the image below, would lose what is to be merged.
    files = [(layer.path, file) for layer, file in layers_of(seen, held) if not file.is_device]
    found = [why_not_retired(path, file, request.retire, KEPT_AS) for path, file in files]
    found.append(why_no_vault(vault_place(request, held.image(request.backing_file)), request.backing_file))
    if request.above is not None:
        name = name_for_above(request, seen)
        found.append(why_not_changeable(held.image(request.above), name, request.backing_format))
    return [problem for problem in found if problem is not None]


def _why_not_written(seen: Seen, stage: stages.Stage, request: CommitRequest, held: Held) -> list[Refusal]:
    """Return why an end could not be opened for writing; of TOP only its bitmaps are written."""
    if stage.name == stages.GIVEN:
        return []
    paths = [request.backing_file, *([request.path] if seen.top.version != 2 else [])]
    return [problem for path in paths if (problem := why_not_opened(held.image(path))) is not None]


def _finished(verdict: CommitVerdict, held: Held) -> CommitVerdict:
    """Put the image above onto BASE and retire what went in; return what became of it. BASE has all by now."""
    try:
        _put_onto_base(verdict, held)
        return verdict._replace(retired=tuple(_retire_all(verdict, held)))
    except (Refusal, OSError) as exc:
        return failed_by(verdict, exc if isinstance(exc, OSError) else exc.with_note(_IS_COMMITTED))


_IS_COMMITTED = "All of it is in the image below, and the VM can go on there; the same call does the rest."


def _retire_all(verdict: CommitVerdict, held: Held) -> t.Iterator[Retired]:
    """Retire the images that went in, TOP first, then the vault: it alone tells that nothing else is to be done."""
    request, work, vault = verdict.request, verdict.work, verdict.finished
    if work is not None:
        for layer, file in layers_of(work.seen, held):
            yield Retired(layer.path, retire(layer.path, file, request.retire, KEPT_AS))
        vault_path = find_vault(work.vault_place)
    else:
        sync_folder_of(os.path.realpath(request.path))  # TOP is gone, as far as the kernel knows
        remove_dangling_link(request.path)
        if vault is not None:
            for _identity, path in vault.others:
                yield from _retire_left_over(path, vault, request)
        vault_path = vault.path if vault is not None else None
    if vault_path is not None:
        remove_vault(vault_path)


def _retire_left_over(path: str, vault: Vault, request: CommitRequest) -> t.Iterator[Retired]:
    """Retire an image that went in, and that a killed run has left; nothing if another one has its name now."""
    try:
        with open_image(path) as file:
            if is_left(file, vault):
                yield Retired(path, retire(path, file, request.retire, KEPT_AS))
    except Refusal as exc:
        if exc.code != "no_such_file":
            raise
        remove_dangling_link(path)
