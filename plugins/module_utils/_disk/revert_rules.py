# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Decide: whether the images above BASE can be given up, so that the VM goes on with BASE.

Values in, verdicts out: nothing is read here. revert.py acts on the verdicts.
"""

from __future__ import annotations

import typing as t

from .._base.errors import Refusal, printable
from .._base.files import Identity
from .._qcow2.chain import Layer, relative_data_file, why_unusable
from .._qcow2.image import Image
from .._qcow2.mark import History
from .._qemu.locks import in_use
from .bitmap_rules import carries_over, names_of
from .common_data import Common, Lower
from .overlay import name_problems
from .siblings import IS_NO_DISK
from .vault import MARK
from .verdict import ABSENT, FAILED, KEEP, REVERTED, How, problem_fields


class RevertRequest(t.NamedTuple):
    """One disk that is to go back to an image below."""

    path: str
    backing_file: str
    backing_format: str = "qcow2"
    vm: str | None = None
    retire: How = KEEP
    puts_on_base: bool = False  # whether the VM is put on BASE, and is going to write to it
    is_left: bool = False  # whether it is on BASE already, as a run that was killed has left it
    made: int = 0  # nanoseconds since 1970: when the image above BASE was; 0 if that is not known
    left_at: int = 0  # the same: when the topmost image was left, at the latest; 0 if it is not left, or not known


class Going(t.NamedTuple):
    """An image above BASE, as it was read."""

    path: str  # where it is
    layer: Layer
    is_open_for_writing: bool
    below_running_vm: bool
    standing: tuple[str, ...]  # paths of images on top of it that do not go
    problem: Refusal | None  # why it cannot be retired
    kept_as: str | None  # path
    is_kept_already: bool = False  # by a run that was killed before it came to the images above


class Observed(t.NamedTuple):
    """What stands where an overlay is to go, and below."""

    going: tuple[Going, ...]  # topmost first; none if nothing stands at the path
    base: Layer | None  # None if the backing file that was named is not in the chain
    base_is_open: bool  # for writing
    below: str | None  # path of the image below the topmost one
    commit: Refusal | None  # why a commit of the chain has to be completed first, as its vault tells
    others: tuple[str, ...] = ()  # paths of further images that stand on BASE, without those that are only kept
    begun: tuple[str, ...] = ()  # paths of the signs that merges of images that go were begun while the VM ran
    staying: tuple[Lower, ...] = ()  # BASE and all below, topmost first; none if BASE is None


class Lowest(t.NamedTuple):
    """What the image above BASE holds itself."""

    holds_any: bool  # data or zeroes
    has_tables: bool  # in which it could hold some
    written: int  # nanoseconds since 1970: when it was last written to; 0 if that cannot be told


class Retired(t.NamedTuple):
    """An image that is to be retired, or was."""

    path: str
    kept_as: str | None  # path; None if it is deleted

    def as_result(self) -> dict[str, t.Any]:
        """Return it in the form in which the module returns it."""
        return {name: value and printable(value) for name, value in self._asdict().items()}


class RevertVerdict(t.NamedTuple):
    """What is to become, or became, of one disk."""

    request: RevertRequest
    state: str  # reverted, absent or failed
    problems: tuple[Refusal, ...] = ()
    warnings: tuple[str, ...] = ()
    virtual_size: int | None = None  # bytes; of BASE
    retired: tuple[Retired, ...] = ()  # topmost first
    kept_already: tuple[Retired, ...] = ()  # further down, by a run that was killed
    need: None = None

    @property
    def changed(self) -> bool:
        """Whether images are to be retired, or were."""
        return self.state == REVERTED

    def failed(self, *problems: Refusal) -> RevertVerdict:
        """Return this verdict as a failure, with these problems beside those that it has.

        What going back means for the backups is nothing to warn of then.
        """
        return RevertVerdict(self.request, FAILED, (*self.problems, *problems))

    def as_result(self) -> dict[str, t.Any]:
        """Return the verdict in the form in which the module returns it."""
        retired = [*self.retired, *self.kept_already]
        return {
            "path": printable(self.request.path),
            "backing_file": printable(self.request.backing_file),
            "backing_format": self.request.backing_format,
            "virtual_size": self.virtual_size,
            "state": self.state,
            "kept_as": retired[0].as_result()["kept_as"] if retired else None,
            "retired": [one.as_result() for one in retired],
            **problem_fields(self.problems),
        }

    def as_diff(self) -> tuple[t.Any, t.Any]:
        """Return what a diff shows: the images above BASE before, and where they are after."""
        before = {
            "backing_file": printable(self.request.backing_file),
            "images": [printable(one.path) for one in self.retired],
        }
        kept = [printable(one.kept_as) for one in self.retired if one.kept_as is not None]
        return before, {"kept": kept} if kept else None


def request_problems(request: RevertRequest) -> list[Refusal]:
    """Return what is wrong with a request whatever the host looks like."""
    return name_problems(path=request.path, backing_file=request.backing_file)


def conflicts(
    paths: t.Sequence[str], going: t.Sequence[t.Collection[Identity]], chains: t.Sequence[t.Collection[Identity]]
) -> list[Refusal | None]:
    """Return for each request of a call whether an image that it has retired is in the chain of another one.

    `going` has the images that go with each request, `chains` those and all below.
    """
    users: dict[Identity, set[int]] = {}
    for index, chain in enumerate(chains):
        for identity in chain:
            users.setdefault(identity, set()).add(index)
    problems: list[Refusal | None] = []
    for index, own in enumerate(going):
        others = [paths[other] for identity in own for other in sorted(users[identity] - {index})]
        if others:
            why = f"goes, or is above an image that goes, and that is in the chain of {others[0]}, too, in this call"
            remedy = "Name each overlay once, and of a chain only the topmost image that is to go."
            problems.append(Refusal("repeated", paths[index], why, remedy))
        else:
            problems.append(None)
    return problems


def decide(request: RevertRequest, seen: Observed) -> RevertVerdict:
    """Return what must become of one disk: its images go, are gone already, or it is refused."""
    verdict = _promise(request, seen)
    if seen.base is None:
        return verdict.failed(_other_chain(request, seen))
    problems = _unfinished(request, seen)
    if seen.going:
        problems += [in_use(request.backing_file)] if seen.base_is_open else []
        problems += _base_problems(request, seen.base)
        problems += _others_problems(request, seen) if request.puts_on_base else []
    for one in seen.going:
        problems += _going_problems(one)
    return verdict.failed(*problems) if problems else verdict


def what_counts(over: Layer, lowest: Layer) -> History:
    """Return from when on the image below `over` may have been written to: what `over` records, if it does.

    What other tools have made records nothing ('virsh snapshot-create-as'). By default 'virsh blockcommit' goes into
    what is below that all the same. What was written there before the lowest image that goes was made has not come from
    what goes. Of that image's own storage the last write to BASE tells, which was before: the clocks can differ.
    """
    own, since = (one.image.history if one.image is not None else History() for one in (over, lowest))
    if own.made or own.base_written:
        return own
    known = [time for time in (since.base_written, since.made) if time]  # a merge of ours has raised the first
    return History(base_written=min(known, default=0), made=since.made)


def is_leaving(image: Image | None) -> bool:
    """Whether the VM was put on the image below already, as far as an earlier run has come."""
    return image is not None and image.history.leaving


def with_common(verdict: RevertVerdict, found: t.Iterable[Common]) -> RevertVerdict:
    """Refuse if what the VM would read is not what it was at the snapshot, since other tools have merged into it."""
    is_left = verdict.request.is_left
    one = next((one for one in found if one.is_merged(is_left=is_left)), None)
    if one is None:
        return verdict
    base = verdict.request.backing_file
    why = (
        f"{'it' if one.lower == base else one.lower} holds data of {one.upper} already, as after a merge by other "
        "tools that was not brought to its end ('virsh blockcommit', 'qemu-img commit')"
    )
    return verdict.failed(_base_changed(verdict.request, why))


def with_lowest(verdict: RevertVerdict, seen: Observed, lowest: Lowest) -> RevertVerdict:
    """Refuse if the image above BASE was emptied, as after a merge by other tools."""
    above = seen.going[-1].path
    if not _was_emptied(seen, lowest):
        return verdict
    why = f"it was written to since {above} was made, which holds nothing, as 'qemu-img commit' leaves what went in"
    way_out = " If its guest has written nothing to that disk, name the disks that are meant, without it (disks)."
    return verdict.failed(_base_changed(verdict.request, why, way_out))


def _base_changed(request: RevertRequest, why: str, way_out: str = "") -> Refusal:
    by_hand = f"give up the images above by kvmfleet.qcow2.qcow2_overlay, state=reverted.{way_out}"
    if request.is_left:
        remedy = f"If it went into that, so that the VM needs it no more, move {request.path} away. Or else {by_hand}"
    else:
        remedy = (
            "Merge it down instead (state=committed), or restore a backup. If you know that the image is right, put "
            f"the VM on it ('virsh edit'), and {by_hand}"
        )
    return Refusal("base_changed", request.backing_file, f"is not what it was at the snapshot: {why}", remedy)


def _was_emptied(seen: Observed, lowest: Lowest) -> bool:
    """Whether the image above BASE holds nothing since it went into BASE, as far as can be told.

    'qemu-img commit' leaves empty tables where an image has bitmaps, and no tables where it has none. The overlay of an
    idle disk has none either. But if it has no bitmaps, nothing has written to it since it was made. BASE is written to
    until a VM that runs is switched: its bitmaps are stored then.
    """
    base, image = seen.staying[0], seen.going[-1].layer.image
    has_bitmaps = image is not None and bool(image.bitmaps)
    was_never_written = (has_bitmaps and not lowest.has_tables) or 0 < lowest.written <= base.history.settled
    is_late = max(base.written, base.data_written or 0) > base.history.settled > 0
    return is_late and not lowest.holds_any and not was_never_written


def _promise(request: RevertRequest, seen: Observed) -> RevertVerdict:
    """Return the verdict for the case that nothing is wrong."""
    virtual_size = seen.base.virtual_size if seen.base is not None else None
    if not seen.going:
        return RevertVerdict(request, ABSENT, virtual_size=virtual_size)
    return RevertVerdict(
        request,
        REVERTED,
        warnings=tuple(_warnings(request, seen)),
        virtual_size=virtual_size,
        retired=tuple(Retired(one.path, one.kept_as) for one in seen.going if not one.is_kept_already),
        kept_already=tuple(Retired(one.layer.path, one.path) for one in seen.going if one.is_kept_already),
    )


def _warnings(request: RevertRequest, seen: Observed) -> t.Iterator[str]:
    """Yield what going back means for the backups."""
    top, base = seen.going[0].layer.image, seen.base
    below = {bitmap.name for bitmap in base.image.bitmaps} if base and base.image else set()
    lost = [b for b in (top.bitmaps if top else ()) if carries_over(b) and b.name not in below]
    if lost:
        yield (
            f"{request.path}: the checkpoint {names_of(lost)} goes with it, and increments made since the snapshot "
            "belong to what is discarded: make the next increment since a checkpoint that "
            f"{request.backing_file} has, and apply it on the backup that ended there, or make a full backup."
        )


def _other_chain(request: RevertRequest, seen: Observed) -> Refusal:
    """Return the refusal of an image at the path that has not BASE below it."""
    what = f"its backing file is {seen.below}" if seen.below else "it has no backing file"
    why = f"does not have {request.backing_file} in its chain: {what}"
    remedy = "Name the image that the disk is to go back to, or leave this one alone: it may be another VM's disk."
    return Refusal("differs", request.path, why, remedy)


def _unfinished(request: RevertRequest, seen: Observed) -> list[Refusal]:
    """Return that a commit of these images was begun: BASE is not any more what it was at the snapshot."""
    if seen.begun:
        why = (
            f"cannot go any more: {seen.begun[0]} tells that its merge was begun while its VM ran, so data of it may "
            "be in the image below, or another disk of the VM is merged already"
        )
        remedy = "Complete that: state=committed of kvmfleet.qcow2.domain_overlay, with running=live if the VM runs."
        return [Refusal("unfinished", request.path, why, remedy)]
    marked = [
        one.path
        for one in seen.going
        if one.layer.image and any(bitmap.name.startswith(MARK) for bitmap in one.layer.image.bitmaps)
    ]
    if seen.commit is not None:
        return [seen.commit]
    if not marked:
        return []
    why = (
        f"cannot go any more: a bitmap in {marked[0]} tells that a commit was interrupted, so data of it may be in the "
        "image below"
    )
    return [Refusal("unfinished", request.path, why, "Complete that: state=committed with the same options again.")]


def internal_snapshots(layer: Layer) -> list[Refusal]:
    """Return that an image which goes has internal snapshots, that nobody has asked to be discarded."""
    if layer.image is None or not layer.image.snapshots:
        return []
    why = f"has {layer.image.snapshots} internal snapshots, which would go with it"
    remedy = "Remove them first ('qemu-img snapshot -d'; those that libvirt knows by 'virsh snapshot-delete')."
    return [Refusal("unsupported", layer.path, why, remedy)]


def _going_problems(one: Going) -> list[Refusal]:
    """Return why this image cannot go."""
    problems = [] if one.is_kept_already else internal_snapshots(one.layer)
    if one.is_open_for_writing:
        problems.append(in_use(one.path))
    elif one.below_running_vm:
        why = (
            "is open in another process that lets nobody write to it: it is below a running VM, or a tool such as "
            "'qemu-nbd -r' or 'qemu-img convert' reads it, as for a backup"
        )
        remedy = "Shut the VM down, or wait for the end of that tool. Run this again."
        problems.append(Refusal("below_running_vm", one.path, why, remedy))
    if one.standing:
        why = f"is the backing file of {one.standing[0]}, which would be lost with it"
        remedy = f"If a VM has that one as a disk, put it back first, or merge it down. {IS_NO_DISK}"
        problems.append(Refusal("has_overlay", one.path, why, remedy))
    return problems + ([one.problem] if one.problem else [])


def _others_problems(request: RevertRequest, seen: Observed) -> list[Refusal]:
    """Return that BASE, to which the VM is going to write, is the backing file of images that stay."""
    remedy = f"If a VM has that one as a disk, put it on a copy of this image ('qemu-img rebase'). {IS_NO_DISK}"
    why = "is the backing file of {}, too, which would be broken by what the VM writes to it"
    return [Refusal("has_overlay", request.backing_file, why.format(one), remedy) for one in seen.others]


def _base_problems(request: RevertRequest, base: Layer) -> list[Refusal]:
    """Return why no VM can go on with BASE."""
    if base.format not in (None, request.backing_format):
        why = f"is recorded as {base.format} by the image above it, not as {request.backing_format}"
        remedy = f"Use backing_format={base.format} if that is right."
        return [Refusal("differs", request.backing_file, why, remedy)]
    if base.image is None:
        return []
    relative = relative_data_file(base.path, base.image)
    return [*why_unusable(base.path, base.image, for_writing=True), *([relative] if relative else [])]
