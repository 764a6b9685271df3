# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: what a commit does to the bitmaps, and why it is refused. merge.py acts on the verdicts."""

from __future__ import annotations

import collections
import datetime
import os
import typing as t

from .._base.errors import Refusal, printable
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, relative_data_file, resolve_name, why_unusable
from .._qcow2.extents import SUBCLUSTERS
from .._qcow2.formats import PLAIN
from .._qcow2.image import Image
from .._qemu.locks import below_running_vm, in_use
from .bitmap_rules import LayerBitmaps, bitmap_problems, carries_over, judge, judge_all, lost_below, names_of
from .fates import DISABLED, INCONSISTENT, Fate, Named, fates, fault_below, wrongly_mended
from .overlay import SkippedBitmap, name_problems
from .retire import is_kept
from .revert_rules import Retired, internal_snapshots
from .siblings import IS_NO_DISK
from .stages import CARRIED, GIVEN, REBUILT, WHOLE, Seen, Stage, named
from .vault import MARK, MAX_NAME, Vault
from .verdict import COMMITTED, DELETE, FAILED, How, Need, problem_fields

# How the data gets into BASE.
SHARED = "shared"  # by extents that both files share
COPIED = "copied"

DEFAULT_GRANULARITY = 65536  # bytes; said of a bitmap that is gone from every image
_UNIT = 65536  # bytes that QEMU copies at once when it shares extents


class CommitRequest(t.NamedTuple):
    """What is to be merged down, as it was asked for."""

    path: str
    backing_file: str
    backing_format: str = "qcow2"
    vm: str | None = None
    above: str | None = None  # the image on top of `path`, which is then put onto `backing_file`
    further: tuple[str, ...] = ()  # paths of the images on top of `above`, topmost first, of a disk of a VM
    retire: How = DELETE
    speed: int = 0  # bytes per second; 0 is no limit
    accept_lost_bitmaps: bool = False
    is_of_vm: bool = False  # whether it is certain that the VM has `path`, so that nothing of it is below already
    created: tuple[tuple[str, int], ...] = ()  # bitmaps of known checkpoints, and when these were made, s since 1970


class Outcome(t.NamedTuple):
    """What becomes of the bitmaps."""

    fates: t.Mapping[str, Fate]  # of those that BASE has afterwards, and of those that go
    is_exact: bool | None  # None if an earlier run has begun, which may have taken what images hold for bits
    skipped: tuple[SkippedBitmap, ...]

    @property
    def bitmaps(self) -> list[Bitmap]:
        """The bitmaps that BASE has afterwards."""
        return [fate.bitmap for fate in self.fates.values() if fate.bitmap is not None]

    @property
    def usable(self) -> tuple[Bitmap, ...]:
        """Those of them that a backup can use."""
        return tuple(fate.bitmap for fate in self.fates.values() if fate.bitmap is not None and not fate.skipped)


class Work(t.NamedTuple):
    """What is to be done."""

    seen: Seen
    stage: Stage
    outcome: Outcome
    vault_place: str
    token: str


class CommitVerdict(t.NamedTuple):
    """What is to become, or became, of one request."""

    request: CommitRequest
    state: str  # committed, absent or failed
    problems: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    virtual_size: int | None = None  # bytes; of BASE afterwards
    bitmaps: tuple[Bitmap, ...] = ()
    skipped: tuple[SkippedBitmap, ...] = ()
    is_exact: bool | None = None
    method: str | None = None
    committed_bytes: int | None = None
    retired: tuple[Retired, ...] = ()  # topmost first
    need: Need | None = None
    work: Work | None = None  # of one that is to be committed, or on the way
    finished: Vault | None = None  # of one of which only this is left

    @property
    def changed(self) -> bool:
        """Whether something is to be done, or was done."""
        return self.state == COMMITTED

    def failed(self, *problems: Refusal) -> CommitVerdict:
        """Return this verdict as a failure, with these problems beside those that it has."""
        return CommitVerdict(self.request, FAILED, (*self.problems, *problems), self.warnings)

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        return {
            "path": printable(self.request.path),
            "backing_file": printable(self.request.backing_file),
            "backing_format": self.request.backing_format,
            "virtual_size": self.virtual_size,
            "state": self.state,
            "bitmaps": [{"name": b.name, "granularity": b.granularity} for b in self.bitmaps],
            "skipped_bitmaps": [b._asdict() for b in self.skipped],
            "exact": self.is_exact,
            "method": self.method,
            "committed_bytes": self.committed_bytes,
            "kept_as": self.retired[0].as_result()["kept_as"] if self.retired else None,
            "retired": [one.as_result() for one in self.retired],
            **problem_fields(self.problems),
        }

    def as_diff(self) -> tuple[t.Any, t.Any]:
        """Return what a diff shows: the overlay before, BASE's bitmaps after."""
        before = {"backing_file": printable(self.request.backing_file), "committed": False}
        after = {"bitmaps": {bitmap.name: bitmap.granularity for bitmap in self.bitmaps}, "committed": True}
        return before, after


def request_problems(request: CommitRequest) -> list[Refusal]:
    """Return what is wrong with a request whatever the host looks like."""
    above = {} if request.above is None else {"above": request.above}
    return name_problems(path=request.path, backing_file=request.backing_file, **above)


def conflicts(
    requests: t.Sequence[CommitRequest], touched: t.Sequence[t.Mapping[t.Hashable, str]]
) -> list[Refusal | None]:
    """Return for each request of a call what is wrong with it beside the others.

    `touched` has for each the paths of the images that it changes or retires, by what tells an image from all others.
    """
    times = collections.Counter(image for images in touched for image in images)
    problems: list[Refusal | None] = []
    for request, images in zip(requests, touched):
        twice = next((path for image, path in images.items() if times[image] > 1), None)
        why = f"takes part in more than one commit of this call ({twice})"
        remedy = "Name the topmost and the lowest image once; all between them goes in. Or commit one after the other."
        problems.append(Refusal("repeated", request.path, why, remedy) if twice else None)
    return problems


def chain_problems(request: CommitRequest, chain: t.Sequence[Layer], depth: int, above: Layer | None) -> list[Refusal]:
    """Return why `path`, `backing_file` and `above` are no part of one chain; `depth` is BASE's place, 0 if none."""
    top = chain[0]
    if not depth:
        names = ", ".join(layer.path for layer in chain[1:]) or "none"
        why = f"does not stand on {request.backing_file}; the images below it are: {names}"
        return [Refusal("other_chain", request.path, why, "Give one of these as backing_file.")]
    lowest = chain[depth - 1].image
    recorded = lowest.backing_format if lowest else None
    problems = []
    if recorded != request.backing_format:
        why = f"is recorded as {recorded or 'of no format'} by the image on top of it, not as {request.backing_format}"
        problems.append(Refusal("other_chain", request.backing_file, why, "Find out which is right, and give that."))
    if above is not None and _below(above) not in (top.real_path, chain[depth].real_path):
        why = f"does not stand on {request.path} but on {_below(above) or 'nothing'}"
        problems.append(Refusal("other_chain", above.path, why, "Name the image directly on top of it."))
    return problems


def why_gone(request: CommitRequest, vault: Vault, *, is_top_there: bool) -> Refusal | None:
    """Return what is wrong where the overlay is gone and a vault is there; None if all but the vault is done."""
    if is_top_there:
        why = f"does not exist. What has gone, or is to go, into {request.backing_file} is {vault.top_path}"
        return Refusal("unfinished", request.path, why, "Complete that commit: give its path.")
    if vault.is_given:
        return None
    why = f"is gone, but its commit into {request.backing_file} was not finished: the vault {vault.path} is there"
    remedy = (
        "Put it back in its place and run this again. If it is lost, so is what the VM wrote to it: remove the vault, "
        "and make a full backup."
    )
    return Refusal("unfinished", request.path, why, remedy)


def outcome_of(seen: Seen, stage: Stage, created: t.Mapping[str, int]) -> Outcome:
    """Return what becomes of the bitmaps from this stage on."""
    if stage.name in (CARRIED, GIVEN):
        found = _carried(seen)
    elif stage.name == REBUILT and seen.vault is not None:
        found = _rebuilt(seen, seen.vault)
    else:
        found = fates([named(layer.image) for layer in seen.chain], seen.depth)
    if not seen.carries_bitmaps:
        found = {name: fate._replace(bitmap=None, skipped=fate.skipped or "raw") for name, fate in found.items()}
    found = _with_faults_below(found, seen, created)
    dead = seen.vault.dead if seen.vault else {}
    kept = {name: fate.bitmap.granularity for name, fate in found.items() if fate.bitmap is not None}
    granularity = {**dict.fromkeys(dead, DEFAULT_GRANULARITY), **kept, **_granularities(seen)}
    reasons = {**dead, **{name: fate.skipped for name, fate in found.items() if fate.skipped}}
    return Outcome(
        found,
        None if stage.name in (CARRIED, GIVEN) else all(fate.is_exact for fate in found.values()),
        tuple(SkippedBitmap(name, granularity[name], reason) for name, reason in reasons.items() if reason),
    )


def _with_faults_below(found: t.Mapping[str, Fate], seen: Seen, created: t.Mapping[str, int]) -> dict[str, Fate]:
    """Return the fates with what is wrong below BASE beside bitmaps: another size, or a loss."""
    after = {name: fate.bitmap for name, fate in found.items() if fate.bitmap is not None}
    base = LayerBitmaps(seen.base.path, seen.chain[0].virtual_size, after)
    chain = [base, *(_for_rules(layer, seen) for layer in seen.chain[seen.depth + 1 :])]
    problems = {one.name: one.problem for one in judge_all(chain, complete=True, created=created)}
    return {
        name: fate._replace(skipped=fate.skipped or (problems[name] if name in after else None))
        for name, fate in found.items()
    }


def usable_in_base(seen: Seen, names: t.Iterable[str], created: t.Mapping[str, int]) -> tuple[str, ...]:
    """Return which of these bitmaps, that no backup can use from TOP, one can use from BASE after a merge by libvirt.

    BASE has them in order and records the merge: they take in all that TOP holds, whatever is wrong with them there.
    """
    own = named(seen.base.image)
    found = {name: Fate(own[name]) for name in names if name in own and carries_over(own[name])}
    return tuple(name for name, fate in _with_faults_below(found, seen, created).items() if fate.skipped is None)


def _granularities(seen: Seen) -> dict[str, int]:
    return {name: b.granularity for layer in seen.chain[seen.depth :: -1] for name, b in named(layer.image).items()}


def _carried(seen: Seen) -> dict[str, Fate]:
    """Return the fates where TOP has all: what was made or removed there meanwhile counts."""
    return {name: Fate(b, bits=(0,), skipped=_skipped(b, seen)) for name, b in named(seen.top).items()}


def _skipped(bitmap: Bitmap, seen: Seen) -> str | None:
    """Return why no backup can use a bitmap that BASE has afterwards."""
    if not bitmap.recording:
        return DISABLED
    return fault_below(bitmap.name, [named(layer.image) for layer in seen.chain[seen.depth + 1 :]])


def _rebuilt(seen: Seen, vault: Vault) -> dict[str, Fate]:
    """Return the fates where TOP has lost its bitmaps: those that the vault knows take in all that the images hold."""
    layers = tuple(range(seen.depth))
    there = named(seen.top)
    found: dict[str, Fate] = {}
    for name, kept in vault.below.items():
        held = layers if kept.bitmap.recording else ()
        found[name] = Fate(kept.bitmap, bits=(seen.depth,), held=held, skipped=_skipped(kept.bitmap, seen))
    for name, kept in vault.above.items():  # wanted_by() adds the bits of these
        below = found.get(name, Fate(None, held=layers))
        found[name] = below._replace(bitmap=kept.bitmap)
    for name, bitmap in there.items():
        if name not in found and name not in vault.dead:  # made since; to revive it needs the user's word
            found[name] = Fate(bitmap, bits=(0,)) if carries_over(bitmap) else Fate(None, skipped=INCONSISTENT)
    return found


def problems_of(seen: Seen, stage: Stage, request: CommitRequest, outcome: Outcome) -> list[Refusal]:
    """Return why nothing may be merged."""
    # A VM has all of them open, and one reason is enough.
    problems = [in_use(path) for path in seen.open_for_writing] or [below_running_vm(p) for p in seen.below_running]
    stale = _begun_problems(seen, request) or _newer_below(seen, stage, request)
    if stale:  # other advice would have somebody write to that image, and then it looks new
        return [*problems, *stale]
    problems += _beside(seen, stage)
    problems += [*image_problems(seen), *_size_problems(seen, stage)]
    problems += _unordered(seen)
    lost = [bitmap for bitmap in seen.top.bitmaps if not bitmap.name.startswith(MARK) and not bitmap.inconsistent]
    if not seen.holds_bitmaps and lost and not request.accept_lost_bitmaps:
        kind = "raw" if seen.base.image is None else "an image of version 2 (compat 0.10)"
        why = f"is {kind}, which holds no bitmaps, so {names_of(lost)} of {request.path} would be lost"
        remedy = "If no backup needs them, use accept_lost_bitmaps=true; the next backup must be a full one."
        problems.append(Refusal("lost_bitmaps", seen.base.path, why, remedy))
    problems += closed_gaps(seen, all_above(seen), *_below_above(seen, stage))
    if seen.top.version == 2 and not request.accept_lost_bitmaps:
        problems += _lost_by_version(seen)
    created = dict(request.created)
    # What was begun was looked at then, and has broken bitmaps on its way.
    problems += hidden_ages(seen, created) if stage.name == WHOLE else _put_back(seen, stage, outcome, created)
    return [*problems, *_lost_problems(seen, stage, request, outcome), *_name_problems(seen, outcome)]


def _beside(seen: Seen, stage: Stage) -> list[Refusal]:
    """Return that the image above stands on BASE, beside TOP, whose data it would have then. In the end it does."""
    if seen.above is None or stage.name == GIVEN or _below(seen.above) == seen.chain[0].real_path:
        return []
    top = seen.chain[0].path
    why = f"does not stand on {top} but, as that does, on {seen.base.path}, whose data would change"
    remedy = (
        f"If it is another overlay of that image, neither can be merged down. If another tool has taken {top} into it, "
        "as 'virsh blockpull' does, nothing is left to merge: remove that image, and the vault beside the one below if "
        "there is one."
    )
    return [Refusal("other_chain", seen.above.path, why, remedy)]


def _below(layer: Layer) -> str | None:
    """Return the real path of the image that an image records as its backing file; None if it records none."""
    backing_file = layer.image.backing_file if layer.image is not None else None
    return os.path.realpath(resolve_name(layer.path, backing_file)) if backing_file else None


def _lost_problems(seen: Seen, stage: Stage, request: CommitRequest, outcome: Outcome) -> list[Refusal]:
    """Return that the merge would hide a loss. What a killed run of ours has lost is not: its vault has it."""
    if seen.vault is not None and stage.name in (CARRIED, GIVEN):
        return []  # TOP alone has all
    above = [bitmap for way in all_above(seen) for image in way for bitmap in image.bitmaps.values()]
    kept = {*seen.vault.above, *seen.vault.below} if seen.vault is not None and stage.name == REBUILT else ()
    bitmaps = [bitmap for bitmap in (*outcome.usable, *filter(carries_over, above)) if bitmap.name not in kept]
    return lost_before(seen, bitmaps, request)


def lost_before(seen: Seen, bitmaps: t.Sequence[Bitmap], request: CommitRequest) -> list[Refusal]:
    """Return which images have lost their bitmaps, and so perhaps the beginning of these, which a merge would hide.

    The images that go in are gone then, and the header of BASE is written anew.
    """
    part = [_for_rules(layer, seen) for layer in seen.part]
    if seen.above is None:  # what TOP has lost it does not go on with; what is in memory alone began in it
        part[0] = part[0]._replace(is_open_for_writing=True)
    hidden: dict[str, dict[str, Bitmap]] = {}
    created = dict(request.created)
    for bitmap in bitmaps:
        image = lost_below(bitmap.name, part, created.get(bitmap.name))
        if image is not None:
            hidden.setdefault(image.path, {})[bitmap.name] = bitmap
    forgetful = {image.path for image in part if image.lost_bitmaps}
    return [
        _hides_loss(path, list(lost.values()), request, can_forget=path in forgetful) for path, lost in hidden.items()
    ]


def hidden_ages(seen: Seen, created: t.Mapping[str, int], *, is_running: bool = False) -> list[Refusal]:
    """Return which images tell that a bitmap is not its checkpoint's, as they are older, and would not after the merge.

    The images that go in are gone then, and BASE and the image above are written to. It does not count what else is
    wrong with the bitmap: that may be healed later. `is_running`: a VM has the topmost image open, in whose memory its
    bitmaps are; then `created` is without those that are usable.
    """
    written = {layer.path for layer in (*seen.part, *([seen.above] if seen.above is not None else ()))}
    hidden: dict[str, dict[str, None]] = {}
    for way in all_above(seen) or [[]]:
        chain = [*way, *(_for_rules(layer, seen) for layer in seen.chain)]
        chain[0] = chain[0]._replace(is_open_for_writing=is_running)
        for name, made in created.items():
            lowest = max((place for place, one in enumerate(chain) if name in one.bitmaps), default=-1)
            tells = (one.path for one in chain[: lowest + 1] if one.path in written and one.is_older_than(made))
            path = next(tells, None)
            if path is not None and not judge(name, chain, created=made).valid:
                hidden.setdefault(path, {})[name] = None
    return [_hides_age(path, list(names)) for path, names in hidden.items()]


def _put_back(seen: Seen, stage: Stage, outcome: Outcome, created: t.Mapping[str, int]) -> list[Refusal]:
    """Return that the topmost image tells by its age that what was begun was put back from a copy, vault and all.

    Only that one counts, as its bitmaps are to be valid. Where all is given and it goes, BASE tells the same by its own
    age, since nothing is written to it any more.
    """
    is_topmost = not all(seen.further or ((),))  # in one of the ways up
    if not is_topmost or (stage.name == GIVEN and seen.above is None):
        return []
    topmost = _for_rules(seen.above or seen.chain[0], seen)
    names = [bitmap.name for bitmap in outcome.usable if topmost.is_older_than(created.get(bitmap.name))]
    if not names:
        return []
    remedy = (
        f"Have libvirt forget that checkpoint ('virsh checkpoint-delete DOMAIN {names[0]} --metadata'; nothing else "
        "removes it while a merge is unfinished) and run this again. Then remove its bitmap "
        "(kvmfleet.qcow2.domain_checkpoint with orphans=remove), and make a full backup with a new checkpoint."
    )
    return [_hides_age(topmost.path, names, remedy)]


_REMOVE_FIRST = (
    "Remove that checkpoint first (kvmfleet.qcow2.domain_checkpoint with unusable=remove), and make a full backup "
    "with a new one."
)


def _hides_age(path: str, names: t.Sequence[str], remedy: str = _REMOVE_FIRST) -> Refusal:
    shown = ", ".join(map(repr, names))
    why = f"is older than the checkpoint of {shown}, as one put back from a copy, which nothing would tell any more"
    return Refusal("closes_gap", path, why, remedy)


def _for_rules(layer: Layer, seen: Seen) -> LayerBitmaps:
    """Return what the rules about checkpoints need of an image that takes part."""
    image = layer.image
    return LayerBitmaps(
        path=layer.path,
        virtual_size=layer.virtual_size,
        bitmaps=named(image),
        lost_bitmaps=image.lost_bitmaps if image else 0,
        lost_names=image.lost_names if image else None,
        modified=seen.written.get(layer.path),
        made=image.made if image else 0,
    )


def _hides_loss(path: str, bitmaps: t.Sequence[Bitmap], request: CommitRequest, *, can_forget: bool) -> Refusal:
    what = f"has lost its bitmaps, perhaps {names_of(bitmaps)}, too," if can_forget else f"lacks {names_of(bitmaps)},"
    why = f"{what} which would look valid after the merge, and not be"
    remedy = (
        "Remove these from the images above (kvmfleet.qcow2.domain_checkpoint with unusable=remove, or orphans=remove "
        "if libvirt has no checkpoint of theirs; without libvirt kvmfleet.qcow2.qcow2_bitmap with state=absent), and "
        "make a full backup with a new checkpoint."
    )
    if can_forget:
        know = "Or, if you know that they did not begin there, 'qemu-img check -r all"
        remedy = f"{remedy} {know} {path}' has it forget them, with the VM shut off."
        if not request.is_of_vm:  # only of such images the times count
            remedy += f" It looks new then: if no VM has run on it since, 'touch {request.path}' says so."
    return Refusal("lost_bitmaps", path, why, remedy)


def all_above(seen: Seen) -> list[list[LayerBitmaps]]:
    """Return what stands on TOP, topmost first, in each way up; none if it is the topmost image."""
    if seen.above is None:
        return []
    return [[*way, _for_rules(seen.above, seen)] for way in seen.further or ((),)]


def closed_gaps(
    seen: Seen, ways: t.Sequence[t.Sequence[LayerBitmaps]], chain: t.Sequence[Named], depth: int
) -> list[Refusal]:
    """Return of which images on top of TOP bitmaps would be wrong after the merge, and look right."""
    part = {name for layer in seen.part for name in named(layer.image)}
    found: dict[str, list[Bitmap]] = {}
    for images in (way[place:] for way in ways for place in range(len(way))):
        own = images[0].bitmaps
        wrong = wrongly_mended([image.bitmaps for image in images], chain, depth)
        if not seen.carries_bitmaps:
            wrong = [name for name, bitmap in own.items() if carries_over(bitmap) and name in part]
        if wrong:
            found[images[0].path] = [own[name] for name in wrong]
    return [closes_gap(path, bitmaps) for path, bitmaps in found.items()]


def closes_gap(above: str, bitmaps: t.Sequence[Bitmap]) -> Refusal:
    """Return the refusal of a merge after which bitmaps of the image above would be wrong, and look right."""
    why = f"its bitmap {names_of(bitmaps)} would look valid after the merge, in which what it lacks is lost"
    return Refusal("closes_gap", above, why, "Heal it first, or remove it, with kvmfleet.qcow2.qcow2_bitmap.")


def _begun_problems(seen: Seen, request: CommitRequest) -> list[Refusal]:
    """Return that an image may have gone in already, and the VM may have written to BASE since."""
    if request.is_of_vm or seen.vault is not None or not seen.begun:
        return []
    why = f"may have gone into the image below already: {seen.begun[0]} tells that its merge was begun while its VM ran"
    remedy = "Use state=committed of kvmfleet.qcow2.domain_overlay, which sees what its domain has."
    return [Refusal("unfinished", request.path, why, remedy)]


def _newer_below(seen: Seen, stage: Stage, request: CommitRequest) -> list[Refusal]:
    """Return that an image below was written to after TOP, as after 'virsh blockcommit --pivot', or by a VM on it.

    No overlay stays behind like that while its VM runs. A commit writes to BASE itself once TOP has its mark. An image
    below BASE counts, too: BASE would look new after the merge, and could be left over as well.
    """
    newer = [path for path, changed in seen.below_changed.items() if changed > seen.top_changed]
    is_told = not (request.is_of_vm or seen.chain[0].is_device or seen.open_for_writing)
    if not is_told or not (stage.name == WHOLE or stage.is_before_base) or not newer:
        return []
    why = (
        f"was last written to at {_shown(seen.top_changed)}, and {newer[0]} below it after that, at "
        f"{_shown(seen.below_changed[newer[0]])}. So it may have gone in already, or be a backup, and would put old "
        "data over newer data"
    )
    remedy = (
        "If no VM has run on that one since, as where only 'qemu-img check -r all' or 'qemu-img bitmap' has written to "
        f"it, 'touch {request.path}' says so: then run this again. Else leave {request.path} as it is. {IS_NO_DISK}"
    )
    if seen.vault is not None:  # or else every other call would refer to this one
        remedy += f" And remove the vault of its commit, {seen.vault.path}: that has written nothing to BASE yet."
    return [Refusal("unfinished", request.path, why, remedy)]


def _shown(changed: int) -> str:
    return datetime.datetime.fromtimestamp(changed / 10**9, datetime.timezone.utc).isoformat(" ", "milliseconds")


def image_problems(seen: Seen) -> list[Refusal]:
    """Return why the images cannot be merged, whatever bitmaps and sizes they have."""
    return [
        *(_stood_on(seen, path) for path in seen.others),
        *(problem for layer in seen.chain for problem in _opening_problems(seen, layer)),
        *(problem for layer in seen.part for problem in _layer_problems(seen, layer)),
    ]


def _lost_by_version(seen: Seen) -> list[Refusal]:
    """Return why a TOP that can have no bitmaps must not go in: BASE's bits could be in no image meanwhile."""
    lost = [bitmap for bitmap in named(seen.base.image).values() if not bitmap.inconsistent]
    if not lost:
        return []
    why = (
        f"is an image of version 2 (compat 0.10), which holds no bitmaps, so {names_of(lost)} of {seen.base.path} "
        "would be lost"
    )
    remedy = (
        f"Run 'qemu-img amend -f qcow2 -o compat=1.1 {seen.chain[0].path}' with the VM shut off, then run this again. "
        "Or, if no backup needs them, use accept_lost_bitmaps=true; the next backup must be a full one."
    )
    return [Refusal("lost_bitmaps", seen.chain[0].path, why, remedy)]


def _below_above(seen: Seen, stage: Stage) -> tuple[list[Named], int]:
    """Return the bitmaps of the chain below the image on top, and BASE's place: as they were before a killed run."""
    chain = [named(layer.image) for layer in seen.chain]
    if stage.name in (CARRIED, GIVEN):  # TOP alone has all
        return [chain[0], *chain[seen.depth + 1 :]], 0
    if stage.name == REBUILT and seen.vault is not None:
        chain[0] = {name: kept.bitmap for name, kept in seen.vault.above.items()}
        chain[seen.depth] = {name: kept.bitmap for name, kept in seen.vault.below.items()}
    return chain, seen.depth


def warnings_of(seen: Seen, outcome: Outcome) -> tuple[str, ...]:
    """Return which bitmaps of the image above no backup can use, although those below it are in order."""
    above = named(seen.above.image) if seen.above is not None else {}
    lost = [bitmap for bitmap in outcome.usable if bitmap.name in above and above[bitmap.name].inconsistent]
    if seen.above is None or not lost:
        return ()
    return (
        f"{seen.above.path}: its bitmap {names_of(lost)} is inconsistent, as after a VM that died on it, so no backup "
        "can use it. kvmfleet.qcow2.domain_checkpoint with unusable=remove (without libvirt: "
        "kvmfleet.qcow2.qcow2_bitmap) heals it if that is provable, or else removes it; then make a full backup.",
    )


def _stood_on(seen: Seen, path: str) -> Refusal:
    why = f"is the backing file of {path}, or an image that takes part below it is, whose data would change"
    if is_kept(path):
        remedy = (
            "By its name it was kept when it was merged down, or when its VM went back: what it holds is no part of "
            "any disk any more. Remove it, or move it to another folder; never merge it."
        )
    else:
        remedy = (
            "If a VM has that one as a disk, commit it first, or give it as above if it is on top of the image that is "
            f"committed. {IS_NO_DISK}"
        )
    return Refusal("has_overlay", seen.chain[0].path, why, remedy)


def _opening_problems(seen: Seen, layer: Layer) -> list[Refusal]:
    """Return why QEMU cannot, or must not, open an image of the chain; those below BASE fill up its clusters."""
    if layer.image is None:
        return []
    problems = why_unusable(layer.path, layer.image, for_writing=layer in (seen.base, seen.chain[0]))
    if layer.image.encrypted:
        problems.append(Refusal("encrypted", layer.path, "is encrypted; not supported"))
    relative = relative_data_file(layer.path, layer.image)
    return [*problems, *([relative] if relative else [])]


def _layer_problems(seen: Seen, layer: Layer) -> list[Refusal]:
    """Return why one image cannot take part."""
    image, is_base, is_top = layer.image, layer is seen.base, layer is seen.chain[0]
    if image is None:
        return []
    problems = [] if is_base else internal_snapshots(layer)
    if not is_base and image.has_data_file:
        why = "has an external data file, which is no part of the image; not supported in an image that goes in"
        problems.append(Refusal("unsupported", layer.path, why, "Use 'virsh blockcommit' while the VM runs."))
    if not is_base and layer.is_device:
        why = "is a block device. Only files can be merged down (BASE may be a device)"
        problems.append(Refusal("unsupported", layer.path, why, "Use 'virsh blockcommit' while the VM runs."))
    if is_base or is_top:
        problems += bitmap_problems(layer.path, image)
    return problems


def _size_problems(seen: Seen, stage: Stage) -> list[Refusal]:
    """Return where an image is smaller than the one below it, of which it hides the end."""
    has_begun = stage.name in (CARRIED, REBUILT, GIVEN)
    if has_begun and seen.base.virtual_size == seen.chain[0].virtual_size:
        return []  # it was judged before the first run gave BASE the size of TOP
    return size_problems(seen) + _hidden_ends(seen)


def size_problems(seen: Seen) -> list[Refusal]:
    """Return where an image is smaller than the one below it, of which it hides the end."""
    pairs = zip(seen.chain[: seen.depth], seen.chain[1 : seen.depth + 1])
    return [
        Refusal(
            "unsupported",
            upper.path,
            f"is smaller ({upper.virtual_size} bytes) than the image below it ({lower.virtual_size} bytes), whose end "
            "would become visible again",
            "Enlarge it with 'qemu-img resize' if it has no bitmaps, or copy the disk ('qemu-img convert').",
        )
        for upper, lower in pairs
        if upper.virtual_size < lower.virtual_size
    ]


def _hidden_ends(seen: Seen) -> list[Refusal]:
    """Return that BASE cannot grow, since it hides the end of an image below.

    QEMU would zero that, but it can be killed when BASE is longer already and the zeroes are not in the file yet.
    """
    size = seen.base.virtual_size
    below = seen.chain[seen.depth + 1 :]
    # Of other formats only the length of the file is known, which can be less than that of the disk.
    longer = [one for one in below if one.virtual_size > size or (one.image is None and one.format_found not in PLAIN)]
    if not longer or size >= seen.chain[0].virtual_size:
        return []
    why = (
        f"is smaller ({size} bytes) than {seen.chain[0].path}, so it would have to grow, and hides the end of "
        f"{longer[0].path} ({longer[0].virtual_size} bytes), which could become visible again"
    )
    return [Refusal("unsupported", seen.base.path, why, "Copy the disk ('qemu-img convert').")]


def _unordered(seen: Seen) -> list[Refusal]:
    """Return that QEMU would fill up clusters of BASE, and not flush them before the L2 entries that lead to them.

    They are in the external data file, the entries in the image, and a loss of power could leave the entries alone.
    """
    base, below = seen.base.image, seen.chain[seen.depth + 1 :]
    units = [_unit(layer.image) for layer in seen.chain[: seen.depth] if layer.image is not None]
    if base is None or not base.has_data_file or not below or min(units) >= base.cluster_size:
        return []
    why = (
        f"has an external data file and an image below, and larger clusters ({base.cluster_size} bytes) than what is "
        f"to go in ({min(units)} bytes), so a loss of power could leave clusters that are filled up by half"
    )
    return [Refusal("unsupported", seen.base.path, why, "Copy the disk ('qemu-img convert').")]


def _unit(image: Image) -> int:
    """Return the smallest number of bytes that an image can hold by itself."""
    return image.cluster_size // (SUBCLUSTERS if image.extended_l2 else 1)


def _name_problems(seen: Seen, outcome: Outcome) -> list[Refusal]:
    """Return which names are too long to be kept."""
    names = {*outcome.fates, *named(seen.top), *named(seen.base.image)}
    long = [name for name in names if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME]
    return [
        Refusal(
            "bitmap_name",
            seen.chain[0].path,
            f"the bitmap name {name[:100]!r}… has more than {MAX_NAME} bytes, too many to be kept in a vault",
            "Remove the bitmap with 'qemu-img bitmap --remove'.",
        )
        for name in long
    ]


def can_share(seen: Seen) -> bool:
    """Whether QEMU may copy whole units of 64 KiB of what the layers hold; see _qemu/jobs.py, share()."""
    base = seen.base.image
    if base is None or base.has_data_file or seen.base.is_device:
        return False
    size = seen.chain[0].virtual_size
    return all(
        layer.image is not None
        and layer.virtual_size == size
        and layer.image.cluster_size >= max(_UNIT, base.cluster_size)
        and not layer.image.extended_l2
        for layer in seen.chain[: seen.depth]
    )
