# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: write the bitmaps of a chain as heal.py has decided. The operation qcow2_bitmap is made of.

::

    keep       beside each image to be written, a vault of its bitmaps
    write      the images, from the top downwards
    publish    say in the vaults' names that all is done, then remove them

A run that finds a vault beside an image whose bitmaps are lost puts them back: what the vault has, and all that the
image holds, since a VM may have run on it since.
"""

from __future__ import annotations

import collections
import os
import secrets
import typing as t

from .._base.errors import QemuError, Refusal, system_refusal
from .._base.files import OpenImage, is_there
from .._qcow2.bitmaps import Bitmap
from .._qcow2.extents import AllocationMap
from . import heal
from .bitmap_rules import names_of
from .carry import Place, Wanted, bring
from .cumulative import most_bytes
from .diagnose import (
    Bits,
    Patient,
    bits_to_be,
    changed_bitmaps,
    counted,
    left_of_images_gone,
    look_at_chain,
    vault_problems,
    with_others,
)
from .heal import HealRequest, HealVerdict, Item, Plan
from .observe import free_bytes, why_not_writable
from .overlay import name_problems
from .publish import StagedFile, check_owner, publish_over
from .session import Held, Images
from .unfinished import healing_vault
from .vault import Content, find_vault, holds, mark_given, read_vault, remove_vault, write_vault
from .verdict import FAILED, Need

_FOR_VAULT = 1 << 20  # bytes that a vault takes, beside bits
_GOES_ON = "The same call again goes on; nothing is lost, since the bitmaps that were in order are in a vault."


class _Work(t.NamedTuple):
    """What is to be done, with all that is open for it."""

    patients: list[Patient]
    plan: Plan
    bits: list[Bits]  # as they are to be, by place and name
    changed: dict[int, list[str]]  # names, by the place of an image that is to be written


class MendBitmaps:
    """States valid and absent of bitmaps. An Operation."""

    def __init__(self) -> None:
        self._works: dict[str, _Work] = {}  # of the last look at each disk; what is open there is open during its turn

    def problems(self, request: HealRequest) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""
        return name_problems(path=request.path)

    def conflicts(self, requests: t.Sequence[HealRequest]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""
        paths = [os.path.realpath(request.path) for request in requests]
        times = collections.Counter(paths)
        why = "is asked for more than once in this call, perhaps through a symlink"
        return [
            Refusal("repeated", request.path, why, "Name it once.") if times[path] > 1 else None
            for request, path in zip(requests, paths)
        ]

    def folders(self, request: HealRequest) -> t.Sequence[str]:
        """Return the folder of the topmost image, where a killed run can have left a vault that was not finished."""
        return [os.path.dirname(os.path.realpath(request.path))]  # which is beside the file, not beside a symlink

    def refused(self, request: HealRequest, problems: t.Sequence[Refusal]) -> HealVerdict:
        """Return the verdict on a request that is refused without a look."""
        return HealVerdict(request, tuple(problems))

    def judge(self, request: HealRequest, held: Held) -> HealVerdict:
        """Look at the chain, and decide."""
        patients = look_at_chain(request, held)
        standing = [one.standing for one in patients]
        plan = heal.decide(request, standing)
        if plan.written or request.state == heal.ABSENT:  # to look through whole folders takes its time
            plan = heal.decide(request, with_others(patients, dict(request.others)))
        wrong = [one.problem for one in plan.found if one.problem is not None]
        if wrong and request.domain is not None:
            return self.refused(request, wrong)
        bits = bits_to_be(patients, plan, held)
        changed = {
            place: names
            for place in plan.written
            # What it has lost makes the bitmaps above it doubtful until QEMU has written its header anew.
            if (names := changed_bitmaps(patients[place], plan.wants[place], bits[place]))
            or patients[place].image.lost_bitmaps
        }
        work = _Work(patients, plan, bits, changed)
        problems = [*_barred(work), *_in_doubt(work), *_problems_with_vaults(work)]
        if problems:
            return self.refused(request, problems)
        for place in changed:
            held.alone(patients[place].layer.path)
        self._works[request.path] = work
        return _promise(request, work)

    def images(self, verdict: HealVerdict) -> Images:
        """Return the whole chain, topmost first."""
        return Images(verdict.chain, frozenset(verdict.chain))

    def rehearse(self, verdict: HealVerdict, held: Held) -> HealVerdict:
        """Start QEMU, if it is to write; nothing else beside the look can be rehearsed without writing."""
        if verdict.written:
            held.monitor()
        return verdict

    def phases(self) -> t.Sequence[t.Callable[[HealVerdict, Held], HealVerdict]]:
        """Keep the bitmaps of all images first, where later runs trust what is kept, then write."""
        return [self.check_owner, self.keep, self.write]

    def check_owner(self, verdict: HealVerdict, _held: Held) -> HealVerdict:
        """Refuse where no later run would trust the vaults."""
        patients = self._works[verdict.request.path].patients
        places = (_place_of_vault(patients[place], patients[0]) for place in verdict.written)
        for path in filter(None, places):
            check_owner(path)
        return verdict

    def keep(self, verdict: HealVerdict, held: Held) -> HealVerdict:
        """Put the bitmaps that are in order, or were when a killed run began, into vaults."""
        work = self._works[verdict.request.path]
        for place in verdict.written:
            _keep(place, work, held, verdict.request)
        return verdict

    def write(self, verdict: HealVerdict, held: Held) -> HealVerdict:
        """Give the images their bitmaps, topmost first, and read them back."""
        work = self._works[verdict.request.path]
        times = _times_to_keep(work.patients, verdict.request)
        for place, patient in enumerate(work.patients):
            if place in verdict.written:
                _bring(place, work, held)
            _put_time_back(patient.file, times[place])
        return verdict

    def publish(
        self, verdicts: t.Sequence[HealVerdict], _held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[HealVerdict]:
        """Say that all is done before anybody can remove a bitmap, or it would be put back; then remove the vaults."""
        for verdict in verdicts:
            self._give(verdict)
        switch()
        return [self._without_vaults(verdict) for verdict in verdicts]

    def _give(self, verdict: HealVerdict) -> None:
        for patient, place in self._vault_places(verdict):
            try:
                if is_there(place):
                    os.fsync(patient.file.fd)  # a run may have been killed before it could see to that
                    mark_given(place)
            except OSError as exc:
                raise system_refusal(exc, place, "cannot be renamed").with_note(_GOES_ON) from exc

    def _vault_places(self, verdict: HealVerdict) -> list[tuple[Patient, str]]:
        """Return the images that have a vault of this disk's, as far as there is one, with its place."""
        patients = self._works[verdict.request.path].patients
        found: list[tuple[Patient, str]] = []
        for number, one in enumerate(patients):
            places = [one.vault.place] if one.vault is not None else []
            places += filter(None, [_place_of_vault(one, patients[0])] if number in verdict.written else [])
            found += [(one, place) for place in dict.fromkeys(places)]
        return found

    def _without_vaults(self, verdict: HealVerdict) -> HealVerdict:
        try:
            for _patient, place in self._vault_places(verdict):
                path = find_vault(place)
                if path is not None:
                    remove_vault(path)
        except Refusal as exc:
            return verdict.failed(exc.with_note("Its bitmaps are as they should be, but a vault was not removed."))
        except OSError as exc:
            what = "its bitmaps are as they should be, but a vault could not be removed"
            return verdict.failed(system_refusal(exc, verdict.request.path, what))
        return verdict


def _bring(place: int, work: _Work, held: Held) -> None:
    """Give an image its bitmaps."""
    patient, wants = work.patients[place], work.plan.wants[place]
    data_file = patient.image.data_file
    wanted = [Wanted(w.bitmap, _maps(work.bits[place], name)) for name, w in wants.items()]
    to_be = Place(patient.file, held.image(data_file) if data_file else None, patient.layer.virtual_size)
    try:
        bring(to_be, wanted, held, {})
    except QemuError as exc:
        raise exc.about(patient.layer.path).with_note(_GOES_ON) from exc
    except Refusal as exc:
        raise exc.with_note(_GOES_ON) from exc


def _times_to_keep(patients: t.Sequence[Patient], request: HealRequest) -> list[int]:
    """Return when the images were last written to, in nanoseconds since 1970, as it is to stay.

    One that a killed run has written to looks new, and that must not hide that it is left over. Else a VM can have run
    on it since. What a domain has is not left over.
    """
    is_known = request.domain is not None
    return [
        one.file.written() if is_known or not _was_left_over(one, patients[place + 1 :]) else _before_a_kill(one)
        for place, one in enumerate(patients)
    ]


def _was_left_over(patient: Patient, below: t.Sequence[Patient]) -> bool:
    """Whether an image was older than one below when a killed run has kept its vault.

    Of what was written to after that the times as they are tell.
    """
    vault, written = patient.vault, _before_a_kill(patient)
    return vault is not None and any(written < _before_a_kill(one) < vault.given_at for one in below)


def _before_a_kill(patient: Patient) -> int:
    """Return when an image was last written to before a killed run has, as far as its vault tells."""
    vault, written = patient.vault, patient.file.written()
    if patient.file.is_device or vault is None or vault.is_given or vault.top_changed is None:
        return written
    return vault.top_changed


def _put_time_back(file: OpenImage, written: int) -> None:
    """Have the time of an image tell when its data was written, not its bitmaps.

    By that a merge refuses an overlay that is older than what is below, and a checkpoint one that was put back.
    """
    try:
        file.put_time_back(written)
    except OSError as exc:
        raise system_refusal(exc, file.path, "its time cannot be put back").with_note(_GOES_ON) from exc


def _barred(work: _Work) -> t.Iterator[Refusal]:
    """Yield why images that are to be written must not be, or lose a vault that others may count on."""
    losing = [place for place, one in enumerate(work.patients) if one.standing.forgotten]
    for place in sorted({*work.changed, *losing}):
        patient, problem = work.patients[place], work.plan.barred.get(place)
        if problem is not None and patient.vault is not None and patient.standing.is_broken_off:
            note = f"Or remove its vault {patient.vault.path}, by which its bitmaps of a killed run are given up."
            problem = problem.with_note(note)
        if problem is not None:
            yield problem


def _in_doubt(work: _Work) -> t.Iterator[Refusal]:
    """Yield the images whose lost bitmaps stay, and would be put back without what may have changed since."""
    for place, patient in enumerate(work.patients):
        yield from (why for name, why in patient.standing.doubtful.items() if name in work.plan.wants[place])


def _problems_with_vaults(work: _Work) -> t.Iterator[Refusal]:
    """Yield why vaults cannot be kept of what the user's word alone makes valid, or cannot be removed in the end."""
    top = work.patients[0].layer
    for place in work.changed:
        by_word = [bitmap for bitmap, _maps in _rebuilt_by_word(place, work)]
        if by_word and healing_vault(work.patients[place].layer, top) is not None:  # a device's only ones need none
            yield from vault_problems(work.patients[place].layer, top, by_word)
    left = (one.vault.path for one in work.patients if one.vault is not None)
    yield from filter(None, (why_not_writable(os.path.dirname(path), path) for path in left))


def _maps(bits: Bits, name: str) -> list[t.Any]:
    return [bits[name]] if name in bits else []


def _place_of_vault(patient: Patient, top: Patient) -> str | None:
    """Return where the vault of an image goes; None if there is no place for it."""
    # One of an older release can lie elsewhere: two would contradict each other after a kill.
    is_unfinished = patient.vault is not None and not patient.vault.is_given
    return patient.vault.place if patient.vault and is_unfinished else healing_vault(patient.layer, top.layer)


def _keep(place: int, work: _Work, held: Held, request: HealRequest) -> None:
    """Put a vault beside an image that is to be written, in the place of an older one.

    One without bitmaps tells that what a kill loses was not to stay.
    """
    patient, wants, top = work.patients[place], work.plan.wants[place], work.patients[0]
    path = _place_of_vault(patient, top)
    below = [(b, maps) for b, maps in _in_order(patient) if b.name in wants]
    below += _rebuilt_by_word(place, work)
    if path is None:
        return
    content = Content(
        token=secrets.token_hex(8),
        top=patient.file,
        others=[top.file] if place else [],
        below=below,
        above=(),
        dead={},
        virtual_size=patient.layer.virtual_size,
        held=AllocationMap(patient.file),
        backing_file=patient.image.backing_file or "",
        top_changed=_before_a_kill(patient),
        known=_known(patient, request) & {bitmap.name for bitmap, _maps in below},
    )
    staged = held.enter(StagedFile(path, os.path.dirname(path)))
    write_vault(staged.file.fd, content)
    os.fsync(staged.file.fd)
    if not holds(read_vault(staged.file), content):
        raise Refusal("not_verified", path, "the vault is not what was written")
    publish_over(staged)


def _known(patient: Patient, request: HealRequest) -> frozenset[str]:
    """Return the bitmaps whose checkpoints libvirt knows, or knew when the first run of several was killed."""
    vault = patient.vault
    then = vault.known if vault is not None and not vault.is_given else frozenset[str]()
    return then | dict(request.created).keys()


def _in_order(patient: Patient) -> t.Iterator[tuple[Bitmap, list[t.Any]]]:
    """Yield the bitmaps of an image that are in order, or were when a killed run began, with their maps."""
    for name, bitmap in patient.standing.bitmaps.items():
        if not bitmap.inconsistent:
            yield bitmap, patient.sources(name, heal.Want(bitmap, held=name in patient.standing.put_back))


def _rebuilt_by_word(place: int, work: _Work) -> t.Iterator[tuple[Bitmap, list[t.Any]]]:
    """Yield the inconsistent bitmaps that are made valid and that no image below has, with their bits to be.

    A QEMU that is killed while it opens the image takes their names away, and no image would tell of them any more.
    """
    patient, below = work.patients[place], work.patients[place + 1 :]
    for name, want in work.plan.wants[place].items():
        was = patient.standing.bitmaps.get(name)
        is_alone = not any(name in one.standing.bitmaps for one in below)
        if was is not None and was.inconsistent and not want.bitmap.inconsistent and is_alone:
            yield want.bitmap, [work.bits[place][name]]


def _promise(request: HealRequest, work: _Work) -> HealVerdict:
    """Return the verdict for the case that all goes well."""
    return HealVerdict(
        request=request,
        items=tuple(_items(request, work)),
        warnings=tuple(_warnings(request, work)),
        checkpoints=tuple(_checkpoints(work)),
        chain=tuple(one.layer.path for one in work.patients),
        written=tuple(sorted(work.changed)),
        vaults=tuple(one.vault.path for one in work.patients if one.vault is not None),
        need=_need(work),
    )


def _warnings(request: HealRequest, work: _Work) -> t.Iterator[str]:
    yield from _not_put_back(request, work)
    if request.domain is None:  # of a domain they are told also where nothing is to be done
        yield from left_of_images_gone(work.patients)


def _not_put_back(request: HealRequest, work: _Work) -> t.Iterator[str]:
    """Yield a warning for each image that lacks bitmaps of its vault, unless libvirt tells that they were removed."""
    for one in work.patients:
        yield from _forgotten(one, request)
        gone = _gone(one, request)
        if gone:
            yield (
                f"{one.layer.path}: a run that was killed has kept its bitmap {names_of(gone)}, which it "
                "lacks now. As those that it has are in order, it counts as removed since, and is not put back. If "
                "nobody has removed it, QEMU has lost it: make a full backup."
            )


def _gone(patient: Patient, request: HealRequest) -> list[Bitmap]:
    """Return the bitmaps that count as removed since a kill because the others are in order, and for no better reason.

    Of the checkpoints that it knew then libvirt tells, but not of the bitmaps of another tool.
    """
    if patient.vault is None or request.state == heal.ABSENT:
        return []
    told = {*request.removed, *(patient.vault.known if request.domain is not None else ())}
    return [one for one in patient.standing.gone if one.name not in told]


def _forgotten(patient: Patient, request: HealRequest) -> t.Iterator[str]:
    """Yield a warning of what only the vault of an image has, and goes with it unasked."""
    names = patient.standing.forgotten - frozenset(request.removed)
    left = [one for one in patient.standing.gone if one.name in names]
    if left:
        yield (
            f"{patient.layer.path}: a run that was killed has kept its bitmap {names_of(left)}. No image has it any "
            "more, and libvirt knows its checkpoint no more. So it counts as removed since, and is not put back."
        )


def _items(request: HealRequest, work: _Work) -> t.Iterator[Item]:
    """Yield what becomes of each bitmap that is asked for, then of the others that are written."""
    changed = {(work.patients[place].layer.path, name): place for place in work.changed for name in work.changed[place]}
    for name, image, problem in work.plan.found:
        place = changed.pop((image or "", name), None)
        if problem is not None:
            yield Item(name, image, FAILED, problem=problem)
        elif place is not None:
            yield _written(name, place, work)
        elif request.state == heal.ABSENT or name in request.removed:
            yield Item(name, image, heal.ABSENT)
        else:
            dirty = _dirty_bytes(name, image, work)
            yield Item(name, image, heal.VALID, dirty, dirty)
    for (_path, name), place in changed.items():
        yield _written(name, place, work)


def _dirty_bytes(name: str, path: str | None, work: _Work) -> int | None:
    """Return what the bitmap of an image that is not written marks."""
    found = (one for one in work.patients if one.layer.path == path and name in one.own)
    return next((counted([one.own[name]], one.layer.virtual_size) for one in found), None)


def _written(name: str, place: int, work: _Work) -> Item:
    """Return what becomes of a bitmap of an image that is written."""
    patient, bits = work.patients[place], work.bits[place]
    size = patient.layer.virtual_size
    before = counted([patient.own[name]], size) if name in patient.own else None
    after = counted([bits[name]], size) if name in bits else None
    state = heal.REBUILT if name in work.plan.wants[place] else heal.REMOVED
    return Item(name, patient.layer.path, state, before, after)


def _checkpoints(work: _Work) -> t.Iterator[dict[str, t.Any]]:
    """Yield all checkpoints of the chain as they are afterwards."""
    for one in work.plan.checkpoints:
        maps = [bits[one.name] for bits in work.bits if one.name in bits] if one.valid else []
        size = work.patients[0].layer.virtual_size
        whole = counted(maps, size)
        top = counted(maps[:1], size) if whole is not None else None
        alone = None if whole is None else whole == top
        yield {**one.as_result(), "dirty_bytes": whole, "dirty_bytes_top": top, "top_alone": alone}


def _need(work: _Work) -> Need | None:
    """Return the space that the vaults and the bitmaps take in the folder of the topmost image that is written."""
    files = [(place, work.patients[place]) for place in work.changed if not work.patients[place].layer.is_device]
    if not files:
        return None
    folder = os.path.dirname(files[0][1].layer.real_path)
    device = os.stat(folder).st_dev
    here = [(place, one) for place, one in files if one.file.status().st_dev == device]
    bits = sum(_bit_bytes(place, work) for place, _one in here)
    held = sum(one.layer.virtual_size // AllocationMap(one.file).granularity // 8 for _place, one in here)
    free = free_bytes(folder)
    return None if free is None else Need(device, folder, 2 * bits + held + _FOR_VAULT * len(here), free)


def _bit_bytes(place: int, work: _Work) -> int:
    patient, bits = work.patients[place], work.bits[place]
    bitmaps = [want.bitmap for name, want in work.plan.wants[place].items() if name in bits]
    maps = {name: [one] for name, one in bits.items()}
    return most_bytes(maps, bitmaps, patient.image.cluster_size, patient.layer.virtual_size)
