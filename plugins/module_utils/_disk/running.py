# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: operations on the images of a VM that runs. Its hypervisor does what touches images that the VM has open.

No image of the VM is locked here against QEMU, which has them; other runs of this collection wait. What QEMU has in
memory, above all the bitmaps, no image tells, so the hypervisor is asked.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing as t

from .._base.attributes import AttributeOptions
from .._base.errors import Refusal
from .._base.files import OpenImage, identity_of, is_there
from .._base.signals import GoesOn, Interrupted
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, resolve_name
from .._qcow2.formats import QCOW2
from .._qcow2.growth import most_growth
from .._qcow2.image import read_image
from .._qemu.settled import Settled, read_settled
from . import commit
from .begun import (
    check_owner_of_signs,
    end_job,
    find_sign,
    has_begun_job,
    leave_sign,
    remove_signs,
    stranger_with_sign,
)
from .bitmap_rules import BROKEN, LayerBitmaps, carries_over, names_of
from .build import MakeOverlays
from .commit import CommitRequest, CommitVerdict
from .merge import MergeLayers
from .observe import ObservedChain, free_bytes, observe_chain, why_not_open
from .overlay import CUMULATIVE, OverlayRequest, OverlayVerdict, SkippedBitmap
from .progress import telling
from .publish import publish_unlocked
from .retire import KEPT_AS, is_kept, kept_path, retire, why_not_retired
from .revert_rules import Retired
from .session import Held, Images, failed_by
from .siblings import folders_beside, standing_on
from .stages import Seen, named
from .survey import last_written, read_further
from .unfinished import merged_below_alone, why_not_merged
from .verdict import ABSENT, COMMITTED, DELETE, FAILED, KEEP, PRESENT, How, Need

_LEAST_GRANULARITY = 4096  # bytes; between this and the next QEMU takes the size of a cluster
_MOST_GRANULARITY = 65536
_LET_GO = 10.0  # seconds in which QEMU closes an image that it does not need any more
_PAUSE = 0.05  # seconds between two looks whether it has

_BEGIN_EMPTY = (
    "Of domains that run, libvirt begins the bitmaps of new overlays empty. Backups by libvirt itself are right. A "
    "tool that reads the topmost image alone misses what was written before (top_alone is false)."
)


class Known(t.NamedTuple):
    """The names of the bitmaps of a disk that the hypervisor knows."""

    usable: tuple[str, ...] = ()  # by an incremental backup
    unusable: tuple[str, ...] = ()

    def with_usable(self, names: t.Sequence[str]) -> Known:
        """Return the names, with these as usable, too."""
        return Known((*self.usable, *names), tuple(name for name in self.unusable if name not in names))


class Signs:
    """The signs beside the images of a VM that are still to be merged; there is a job of the first one alone."""

    def __init__(self, files: t.Sequence[OpenImage]) -> None:
        """Leave them, if later runs will take them for ours."""
        check_owner_of_signs(files)
        self._file = files[0]
        self._new = [file for file in files if find_sign(file) is None]
        for number, file in enumerate(files):
            leave_sign(file, has_job=number == 0)

    def withdraw(self) -> None:
        """Take back that anything was begun; older signs stay."""
        for file in self._new:
            remove_signs(file, os.path.realpath(file.path))
        self.end()

    def end(self) -> None:
        """Say that the job is not there any more: one that comes is somebody else's."""
        end_job(self._file)


Begin = t.Callable[[], Signs]


class Hypervisor(t.Protocol):
    """What has the VMs' images open."""

    def known(self, vm: str | None, paths: t.Sequence[str]) -> Known:
        """Return the bitmaps of the disk that has the first of these images that any disk has in its chain."""

    def has(self, request: CommitRequest | OverlayRequest) -> bool:
        """Return whether the VM has the image at `path` in the chain of a disk, or is defined with it."""

    def why_none_below(self) -> tuple[str, str] | None:
        """Return why a merge adds no bitmap to an image below the topmost one, and the way out; None if it does."""

    def check_for_snapshot(self, request: OverlayRequest) -> None:
        """Refuse a disk on which a job of somebody else goes on that keeps it from a snapshot."""

    def check_for_merge(self, request: CommitRequest, *, resumes: bool) -> None:
        """Refuse an image if merge() would find a job in its way."""

    def store(self, request: CommitRequest) -> None:
        """Have the definition of the VM as it is now on disk, where the next start of the hypervisor finds it."""

    def merge(
        self,
        request: CommitRequest,
        watch: t.Callable[[int, int], None],
        seconds: float,
        begin: Begin,
        *,
        relative: bool,
        resumes: bool,
    ) -> None:
        """Merge the image into the one below it while the VM runs; return when the VM does not need it any more.

        `begin` is called before anything is written to the image below; what it returns, if nothing is written after
        all. `resumes`: a job that is found may be one of an earlier run; else it is somebody else's.
        """


class MakeForRunning(MakeOverlays):
    """State present: every overlay is there, and the VM writes to it. An Operation.

    The overlay has no bitmaps when it is published; the hypervisor adds them in the moment in which it opens it.
    """

    def __init__(self, attributes: AttributeOptions, hypervisor: Hypervisor) -> None:
        super().__init__(attributes)
        self._hypervisor = hypervisor

    def observe(self, request: OverlayRequest, file: OpenImage) -> ObservedChain:
        """Return what the chain is, without what only the hypervisor knows."""
        seen = observe_chain(file, request.backing_format, relative=request.relative)
        top = seen.layers[0]
        image = top.image and top.image._replace(bitmaps=(), bitmap_tables=(), lost_bitmaps=0)
        layers = (top._replace(image=image), *seen.layers[1:])
        return seen._replace(layers=layers, is_open_for_writing=False, below_running_vm=False)

    def judge(self, request: OverlayRequest, held: Held) -> OverlayVerdict:
        """Look at ACTIVE and at the place, and decide."""
        verdict = super().judge(request, held)
        if verdict.state == FAILED and request.must_be_fresh and self._hypervisor.has(request):
            why = "was given to its VM meanwhile, most likely by another run"
            return self.refused(request, [Refusal("changed_meanwhile", request.path, why, "Run this again.")])
        if verdict.state == PRESENT and not request.must_be_fresh:
            return _still_stored(self._foretold(verdict, held), held)
        if verdict.state != FAILED:
            file = held.image(request.backing_file)
            layers = observe_chain(file, request.backing_format, relative=False).layers
            other = why_not_open(layers, is_written=True)
            if other is not None:
                return verdict.failed(other)
        if verdict.spec is not None:  # of ACTIVE's bitmaps QEMU could witness nothing
            verdict = verdict._replace(spec=verdict.spec._replace(active=None))
        return verdict

    def images(self, verdict: OverlayVerdict) -> Images:
        """Return the VM's topmost image, on which only one run works at a time."""
        return Images((), running=(verdict.request.backing_file,))

    def rehearse(self, verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
        """Say which bitmaps the overlay would have."""
        held.monitor()  # a host without QEMU is refused
        return self._foretold(self._check_jobs(verdict, held), held)

    def phases(self) -> t.Sequence[t.Callable[[OverlayVerdict, Held], OverlayVerdict]]:
        """Build only what can be taken."""
        return [self._check_jobs, *super().phases()]

    def _check_jobs(self, verdict: OverlayVerdict, _held: Held) -> OverlayVerdict:
        """Refuse what a job is in the way of. Not before this run has its turn: it may be one of another run."""
        if verdict.changed:
            self._hypervisor.check_for_snapshot(verdict.request)
        return verdict

    def publish(
        self, verdicts: t.Sequence[OverlayVerdict], held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[OverlayVerdict]:
        """Put all new overlays into place, and have the VM write to them, or none."""
        after = [self._foretold(verdict, held) for verdict in verdicts]
        publish_unlocked(held.staged, switch)
        return [_stored(verdict, held) if verdict.request.must_be_fresh else verdict for verdict in after]

    def _foretold(self, verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
        """Return the verdict with the bitmaps that the hypervisor gives the overlay, which are those in order below."""
        request = verdict.request
        known = self._hypervisor.known(request.vm, [request.path, request.backing_file])
        layers = observe_chain(held.image(request.backing_file), request.backing_format, relative=False).layers
        begins_empty = verdict.changed and known.usable and request.bitmap_content == CUMULATIVE
        return verdict._replace(
            bitmaps=bitmaps_of(known.usable, layers),
            skipped=tuple(SkippedBitmap(b.name, b.granularity, BROKEN) for b in bitmaps_of(known.unusable, layers)),
            warnings=(*verdict.warnings, *([_BEGIN_EMPTY] if begins_empty else [])),
        )


def _stored(verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
    """Return the verdict, failed if ACTIVE, which its VM has just left, does not store the bitmaps that go on."""
    request = verdict.request
    try:
        _check_stored(held.image(request.backing_file), verdict.bitmaps, _is_taken(request))
    except (Refusal, OSError) as exc:  # the VM is on the overlay all the same
        return failed_by(verdict, exc)
    return verdict


def _still_stored(verdict: OverlayVerdict, held: Held) -> OverlayVerdict:
    """Return the verdict on an overlay that its VM has, failed as long as ACTIVE lacks bitmaps that began before it.

    Of one whose header does not tell when it was made nothing is said.
    """
    request = verdict.request
    if request.backing_format != QCOW2:
        return verdict
    image = read_image(held.image(request.path), with_bitmaps=False)
    top, created = LayerBitmaps(request.path, image.virtual_size, {}, made=image.made), dict(request.created)
    older = [bitmap for bitmap in verdict.bitmaps if top.was_made_after(created.get(bitmap.name))]
    if not older:
        return verdict
    file = held.image(request.backing_file)
    problem = _why_not_stored(file.path, older, read_settled(file), _is_taken(request))
    return verdict if problem is None else verdict.failed(problem)


def _is_taken(request: OverlayRequest) -> str:
    return f"The snapshot is taken: the VM runs on {request.path}"


def _check_stored(file: OpenImage, bitmaps: t.Sequence[Bitmap], done: str) -> None:
    """Refuse an image that its VM does not write to any more if it does not store these bitmaps; `done` is what is.

    QEMU stores them before it says that the VM does not. If it cannot, it goes on without a word.
    """
    deadline = time.monotonic() + _LET_GO
    while bitmaps:
        settled = read_settled(file)
        problem = _why_not_stored(file.path, bitmaps, settled, done)
        if problem is None:
            return
        if not settled.is_open_for_writing or time.monotonic() > deadline:
            raise problem
        time.sleep(_PAUSE)


def _why_not_stored(path: str, bitmaps: t.Sequence[Bitmap], settled: Settled, done: str) -> Refusal | None:
    """Return which of these bitmaps an image does not store in order; None if it stores all."""
    in_order = {bitmap.name for bitmap in settled.image.bitmaps if carries_over(bitmap)}
    missing = [bitmap for bitmap in bitmaps if bitmap.name not in in_order]
    if not missing:
        return None
    why = f"does not store its bitmaps {names_of(missing)}, as when its storage is full. {done}"
    way_out = (
        "remove these checkpoints (kvmfleet.qcow2.domain_checkpoint with state=absent and running=live), and make a "
        "full backup with a new one"
    )
    if not settled.is_open_for_writing:
        remedy = f"What they mark is told nowhere once the VM is shut off: {way_out}."
    else:
        remedy = (
            "QEMU has them in its memory. Before the VM is shut off make room there, then it stores them with its end; "
            f"or make an incremental backup with a new checkpoint; or {way_out}. Else increments since these "
            "checkpoints lack what has changed."
        )
    return Refusal("not_stored", path, why, remedy)


def bitmaps_of(names: t.Iterable[str], layers: t.Sequence[Layer]) -> tuple[Bitmap, ...]:
    """Return the bitmaps of these names; what no image stores has the granularity that QEMU gives by default."""
    stored = {b.name: b.granularity for layer in reversed(layers) if layer.image for b in layer.image.bitmaps}
    cluster_size = layers[0].image.cluster_size if layers[0].image else _MOST_GRANULARITY
    default = max(_LEAST_GRANULARITY, min(_MOST_GRANULARITY, cluster_size))
    return tuple(Bitmap(name, stored.get(name, default), recording=True, inconsistent=False) for name in names)


class MergeRunning(MergeLayers):
    """State committed: the image has gone into the one below, by the hypervisor, and is retired. An Operation.

    An image that the VM does not have any more, and that stands on an image of it, is left over from a run that was
    ended; or somebody has put the VM back to the image below. Which of both nobody can tell, so it is kept.

    `gone`: paths of images that are there only because check mode has not retired them.
    """

    def __init__(self, hypervisor: Hypervisor, gone: t.Collection[str] = ()) -> None:
        self._hypervisor = hypervisor
        self._gone = frozenset(map(os.path.realpath, gone))

    def judge(self, request: CommitRequest, held: Held) -> CommitVerdict:
        """Look at the chain, and decide."""
        base = held.image(request.backing_file)
        if not is_there(request.path):
            return CommitVerdict(request, ABSENT)
        chain = observe_chain(held.image(request.path), "qcow2", relative=False).layers
        depth = next((number for number, layer in enumerate(chain) if layer.identity == base.identity), 0)
        wrong = commit.chain_problems(request, chain, depth, _above(request, held))
        if wrong:
            return self.refused(request, wrong)
        known = self._hypervisor.known(request.vm, [request.path, request.backing_file])
        is_left_over = not self._hypervisor.has(request)
        if depth > 1 and not is_left_over:  # planned for a VM that was shut off then
            why = "is to be merged down together with what is below it, and its VM was started meanwhile"
            return self.refused(request, [Refusal("changed_meanwhile", request.path, why, "Run this again.")])
        # What is left over is put aside, and nothing below it changes: what stands there may be the VM's.
        seen = _see(request, chain, depth, held, is_left_over=is_left_over)
        seen = seen._replace(others=tuple(one for one in seen.others if os.path.realpath(one) not in self._gone))
        half = self._why_half_merged(request, held)  # of which QEMU does not have all files open
        other = None if is_left_over else half or _in_the_way(request, chain, depth, seen.above)
        if other is not None:
            return self.refused(request, [other])
        problems = [*commit.image_problems(seen), *commit.size_problems(seen), *_problems(request, seen, known, held)]
        if not is_left_over:
            problems += _not_added(request, seen, known, self._hypervisor)
            unusable = {name: made for name, made in request.created if name not in known.usable}
            problems += commit.hidden_ages(seen, unusable, is_running=True)
        if problems:
            return self.refused(request, problems)
        return self._promise(request, seen, known, held, is_left_over=is_left_over)

    def _promise(
        self, request: CommitRequest, seen: Seen, known: Known, held: Held, *, is_left_over: bool
    ) -> CommitVerdict:
        """Return the verdict for the case that nothing is wrong."""
        mark = seen.top.mark
        how: How = DELETE if not is_left_over and mark is not None and mark.vm == request.vm else KEEP
        kept = kept_path(request.path, KEPT_AS) if KEEP in (how, request.retire) else None
        if not is_left_over and request.above is None:  # else BASE is not what a backup begins with
            known = known.with_usable(commit.usable_in_base(seen, known.unusable, dict(request.created)))
        layers = seen.chain[seen.depth :: -1]  # what BASE has stored of a bitmap counts
        return CommitVerdict(
            request=request,
            state=COMMITTED,
            warnings=(_left_over(request, kept),) if is_left_over else (),
            virtual_size=seen.chain[0].virtual_size,
            bitmaps=bitmaps_of(known.usable, layers),
            skipped=tuple(SkippedBitmap(b.name, b.granularity, BROKEN) for b in bitmaps_of(known.unusable, layers)),
            is_exact=None if is_left_over else True,
            method=None if is_left_over else commit.COPIED,
            retired=(Retired(request.path, kept),),
            need=None if is_left_over else _need(seen, held),
        )

    def images(self, verdict: CommitVerdict) -> Images:
        """Return the VM's images that change, on which only one run works at a time."""
        request = verdict.request
        paths = (request.path, request.backing_file, *([request.above] if request.above is not None else []))
        return Images((), running=tuple(filter(is_there, paths)))  # another run may have retired the first one

    def rehearse(self, verdict: CommitVerdict, held: Held) -> CommitVerdict:
        """Look for jobs; nothing else beside the look can be rehearsed."""
        return self._check_jobs(verdict, held)

    def phases(self) -> t.Sequence[t.Callable[[CommitVerdict, Held], CommitVerdict]]:
        """Do nothing that could be undone: a disk whose merge is complete stays so."""
        return [self._check_jobs]

    def _check_jobs(self, verdict: CommitVerdict, held: Held) -> CommitVerdict:
        """Refuse what a job is in the way of. Not before this run has its turn: it may be one of another run."""
        request = verdict.request
        if verdict.method is not None:  # of what is left over nothing is merged
            self._hypervisor.check_for_merge(request, resumes=has_begun_job(held.image(request.path)))
        return verdict

    def publish(
        self, verdicts: t.Sequence[CommitVerdict], held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[CommitVerdict]:
        """Merge the disks one after the other, until one fails; what is done is done.

        `switch` only looks whether the VM has the images below, and is the one to tell if it does not.
        """
        done: list[CommitVerdict] = []

        def begin() -> Signs:
            # With one disk merged the VM cannot go back with the others, either.
            return Signs([held.image(verdict.request.path) for verdict in verdicts[len(done) :] if verdict.changed])

        for verdict in verdicts:
            failed = next((one for one in done if one.state == FAILED), None)
            if not verdict.changed:
                done.append(verdict)
            elif failed is not None:
                why = f"is not merged down, because the merge of {failed.request.path} failed before"
                done.append(verdict.failed(Refusal("group_failed", verdict.request.path, why)))
            else:
                done.append(self._attempt(verdict, held, begin))
        if all(verdict.state != FAILED for verdict in done):
            with contextlib.suppress(Refusal):
                switch()
        return done

    def _attempt(self, verdict: CommitVerdict, held: Held, begin: Begin) -> CommitVerdict:
        try:
            return self._merge(verdict, held, begin)
        except Interrupted as exc:
            half = None if isinstance(exc, GoesOn) else self._why_half_merged(verdict.request, held)
            why = half.why if half is not None else self._how_ended(verdict.request, exc)
            remedy = half.remedy if half is not None else "Run this again."
            return verdict.failed(Refusal("interrupted", verdict.request.path, why, remedy))
        except Refusal as exc:
            half = self._why_half_merged(verdict.request, held)
            return failed_by(verdict, exc if half is None else half.with_note(f"At its end this was said: {exc.why}."))
        except OSError as exc:
            return failed_by(verdict, exc)

    def _why_half_merged(self, request: CommitRequest, held: Held) -> Refusal | None:
        """Return that a merge was begun of which the images tell the end, and the hypervisor not; None if not known."""
        if request.above is None:
            return None
        with contextlib.suppress(Refusal, OSError):
            is_begun = find_sign(held.image(request.path)) is not None
            if is_begun and _is_on_base(request, held) and self._hypervisor.has(request):
                return merged_below_alone(request.path, request.above)
        return None

    def _how_ended(self, request: CommitRequest, exc: Interrupted) -> str:
        """Return what has become of a merge when a signal has ended the run."""
        if isinstance(exc, GoesOn):
            return f"the run was ended by {exc}, and its merge goes on, since libvirt's daemon is away"
        with contextlib.suppress(Refusal):
            if self._hypervisor.has(request):
                return f"its merge was given up, because the run was ended by {exc}; the VM goes on with it"
            return f"its VM does not have it any more; it was not retired, because the run was ended by {exc}"
        return f"the run was ended by {exc}, and whether it is merged down could not be told"

    def _merge(self, verdict: CommitVerdict, held: Held, begin: Begin) -> CommitVerdict:
        """Have one image merged down, and retire it."""
        request = verdict.request
        if verdict.method is not None:  # of what is left over nothing is merged
            self._have_merged(request, held, begin)
            self._check_left(request)
            self._check_base(request, verdict.bitmaps, held)
        self._hypervisor.store(request)
        base = held.image(request.backing_file)
        base.touch()  # as merge.py does where nothing was to be written to it
        os.fsync(base.fd)  # before the only other copy of the data goes
        how: How = DELETE if verdict.retired[0].kept_as is None else KEEP
        kept_as = retire(request.path, _alone(request.path, held), how, KEPT_AS)
        return self._with_bitmaps(verdict._replace(retired=(Retired(request.path, kept_as),)))

    def _with_bitmaps(self, verdict: CommitVerdict) -> CommitVerdict:
        """Return the verdict on a merge that is done with what the hypervisor says now of the bitmaps told of there."""
        request = verdict.request
        if verdict.method is None:  # of what is left over nothing is merged
            return verdict
        try:
            known = self._hypervisor.known(request.vm, [request.backing_file])
        except Refusal as exc:  # the image is merged down all the same
            warning = f"{request.path}: is merged down. Which bitmaps a backup can use now cannot be told: {exc}"
            return verdict._replace(bitmaps=(), skipped=(), warnings=(*verdict.warnings, warning))
        told = {
            **{bitmap.name: bitmap.granularity for bitmap in verdict.bitmaps},
            **{bitmap.name: bitmap.granularity for bitmap in verdict.skipped},
        }
        return verdict._replace(
            bitmaps=tuple(Bitmap(name, told[name], True, False) for name in told if name in known.usable),
            skipped=tuple(SkippedBitmap(name, told[name], BROKEN) for name in told if name in known.unusable),
        )

    def _have_merged(self, request: CommitRequest, held: Held, begin: Begin) -> None:
        file = held.image(request.path)
        resumes, relative = has_begun_job(file), _is_relative(request, held)
        try:
            with telling(request) as tell:
                self._hypervisor.merge(request, tell, held.seconds, begin, relative=relative, resumes=resumes)
        except Refusal as exc:
            stranger = stranger_with_sign(file) if exc.code == "block_job" else None
            if stranger is None:
                raise
            note = f"A run as the user {stranger} has left the sign of such a merge: if that was yours, run this as it."
            raise exc.with_note(note) from exc

    def _check_left(self, request: CommitRequest) -> None:
        """Refuse to retire an image that is merged down if its VM still has it, or if that cannot be told."""
        try:
            still_has = self._hypervisor.has(request)
        except Refusal as exc:
            note = f"{request.path} is merged down, and left in place until it is known that its VM does not have it."
            raise exc.with_note(note) from exc
        if still_has:
            why = "is merged down, but the definition of its VM still has it, so it is left in place"
            raise Refusal(
                "not_switched", request.path, why, "Look at 'virsh domblklist --inactive', then run this again."
            )

    def _check_base(self, request: CommitRequest, usable: t.Sequence[Bitmap], held: Held) -> None:
        """Refuse to retire an image of which the one below does not store the bitmaps; a topmost one does so later."""
        if request.above is None:
            return
        image = read_image(held.image(request.path))
        own = {bitmap.name for bitmap in image.bitmaps if carries_over(bitmap)}
        done = f"All data of {request.path} is merged into it; that image is left in place"
        _check_stored(held.image(request.backing_file), [one for one in usable if one.name in own], done)


def _above(request: CommitRequest, held: Held) -> Layer | None:
    if request.above is None:
        return None
    return observe_chain(held.image(request.above), "qcow2", relative=False).layers[0]


def _is_on_base(request: CommitRequest, held: Held) -> bool:
    """Whether the image above, if there is one, records BASE instead of the image that is merged down."""
    above = _above(request, held)
    name = above.image.backing_file if above is not None and above.image is not None else None
    if above is None or name is None:
        return False
    return identity_of(os.stat(resolve_name(above.path, name))) == held.image(request.backing_file).identity


def _is_relative(request: CommitRequest, held: Held) -> bool:
    """Whether the images record those below by relative names, as the one above is to go on doing."""
    above = _above(request, held)
    layers = [above, *observe_chain(held.image(request.path), "qcow2", relative=False).layers[:1]]
    names = [layer.image.backing_file for layer in layers if layer is not None and layer.image is not None]
    return above is not None and all(name is not None and not os.path.isabs(name) for name in names)


def _see(request: CommitRequest, chain: tuple[Layer, ...], depth: int, held: Held, *, is_left_over: bool) -> Seen:
    """Return what stands there. Of the bitmaps it tells nothing."""
    ours = [*([held.image(request.above).identity] if request.above else []), *(one.identity for one in chain)]
    changing = chain[: depth if is_left_over else depth + 1]
    above = _above(request, held)
    folders = folders_beside([*(layer.path for layer in changing), request.backing_file])
    standing = [path for layer in changing for path in standing_on(layer.identity, folders, ours)]
    return Seen(
        chain=chain,
        depth=depth,
        is_top_of_vault=False,
        went_in_below_another=False,
        vault=None,
        top_has_all=False,
        mark_is_empty=None,
        base_lacks=None,
        top_changed=0,
        below_changed={},
        above=above,
        open_for_writing=(),
        below_running=(),
        others=tuple(path for path in standing if not is_kept(path, KEPT_AS)),
        written=last_written([*([above] if above is not None else []), *chain[: depth + 1]], held),
        further=read_further(request, above),
    )


def _in_the_way(request: CommitRequest, chain: tuple[Layer, ...], depth: int, above: Layer | None) -> Refusal | None:
    """Return why nothing can be told of these images, or which other work has to be completed before."""
    begun = why_not_merged(chain, depth, above, None)
    return why_not_open(chain, is_written=request.above is None) or (
        begun.with_note("Its VM has to be shut off for that.") if begun is not None else None
    )


def _problems(request: CommitRequest, seen: Seen, known: Known, held: Held) -> t.Iterator[Refusal]:
    """Yield why the image cannot be merged down while the VM runs."""
    if not seen.holds_bitmaps and known.usable:
        kind = "raw" if seen.base.image is None else "an image of version 2 (compat 0.10)"
        lost = names_of(bitmaps_of(known.usable, seen.chain))
        why = f"is {kind}, which holds no bitmaps, so {lost} of {request.path} would be lost"
        yield Refusal(
            "lost_bitmaps", request.backing_file, why, "Delete these checkpoints first, if no backup needs them."
        )
    yield from commit.lost_before(seen, bitmaps_of(known.usable, seen.chain), request)
    yield from commit.closed_gaps(seen, _as_in_memory(seen), [named(layer.image) for layer in seen.chain], seen.depth)
    file = held.image(request.path)
    problem = None if file.is_device else why_not_retired(request.path, file, request.retire, KEPT_AS)
    if problem is not None:
        yield problem


def _not_added(request: CommitRequest, seen: Seen, known: Known, hypervisor: Hypervisor) -> list[Refusal]:
    """Return which bitmaps BASE would lack after the merge, since it has none of these names."""
    in_base = {bitmap.name for bitmap in seen.base_bitmaps if carries_over(bitmap)}
    own = [b for b in seen.top.bitmaps if carries_over(b) and b.name in known.usable and b.name not in in_base]
    why_none = hypervisor.why_none_below() if own and request.above is not None else None
    if why_none is None:
        return []
    why = f"lacks the bitmaps {names_of(own)} of {request.path}, which a merge now would lose: {why_none[0]}"
    return [Refusal("old_libvirt", request.backing_file, why, why_none[1])]


def _as_in_memory(seen: Seen) -> list[list[LayerBitmaps]]:
    """Return what stands on the image that is merged down, with the bitmaps of the topmost image as QEMU has them."""
    # QEMU may be writing to that: then what is stored of its bitmaps is that they are in use.
    ways = commit.all_above(seen)
    own = [{b.name: b._replace(recording=True, inconsistent=False) for b in way[0].bitmaps.values()} for way in ways]
    return [[way[0]._replace(bitmaps=bitmaps), *way[1:]] for way, bitmaps in zip(ways, own)]


def _need(seen: Seen, held: Held) -> Need | None:
    """Return the space that BASE takes beside what it has, as far as that can be told while the VM writes."""
    base = seen.base
    if base.image is None or base.is_device:
        return None
    with contextlib.suppress(Refusal):  # a table that is just being written
        growth = most_growth(held.image(base.path), [held.image(seen.chain[0].path)], 0, shares_data=False)
        folder = os.path.dirname(base.real_path)
        free = free_bytes(folder)
        return Need(held.image(base.path).status().st_dev, folder, growth, free) if free is not None else None
    return None


def _left_over(request: CommitRequest, kept: str | None) -> str:
    return (
        f"{request.path}: stands on {request.backing_file}, and its VM does not have it any more. Most likely its "
        f"merge was complete when an earlier run was ended. If somebody has put the VM back to {request.backing_file}, "
        f"its data is in it alone. So it is kept, as {kept}."
    )


def _alone(path: str, held: Held) -> OpenImage:
    """Return the open image that nobody has any more; wait for QEMU to close it."""
    deadline = time.monotonic() + _LET_GO
    while True:
        try:
            return held.alone(path)
        except Refusal:
            if time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE)
