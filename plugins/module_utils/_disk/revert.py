# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: go back to an image below. The operation that revert_rules.py has the rules of.

::

    path ┐     goes: renamed aside, or deleted
      │  │     what was written since the snapshot is in it alone
      S1 ┘     goes too, if BASE is further down
      │
    BASE       stays as it is; from now on the topmost image of the VM
"""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import CHECK_STORAGE, Refusal, system_refusal
from .._base.files import Identity, OpenImage, identity_of, is_link, is_there, open_image, real_path
from .._qcow2.chain import Layer, read_head, resolve_name, walk_chain
from .._qcow2.extents import has_allocated_extents, holds_any
from .._qcow2.formats import QCOW2
from .._qcow2.header import is_qcow2
from .._qcow2.image import Image
from .._qcow2.mark import write_leaving
from .._qemu import locks
from .._qemu.settled import is_open_for_writing, read_settled
from . import revert_rules
from .begun import find_sign
from .common_data import Common, Lower, Placed, in_common, lower_of
from .retire import (
    REVERTED_AS,
    all_kept,
    is_kept,
    kept_path,
    remove_dangling_link,
    retire,
    stands,
    why_not_retired,
)
from .revert_rules import (
    Going,
    Lowest,
    Observed,
    Retired,
    RevertRequest,
    RevertVerdict,
)
from .session import Held, Images
from .siblings import all_standing_on, folders_beside, standing_on
from .unfinished import COMMIT, HEALING, why_in_the_way
from .verdict import ABSENT, DELETE, FAILED, KEEP, How


class GoBack:
    """State reverted: nothing stands at the path any more, and BASE is the topmost image. An Operation."""

    def problems(self, request: RevertRequest) -> list[Refusal]:
        """Return what is wrong with a request whatever the host looks like."""
        return revert_rules.request_problems(request)

    def conflicts(self, requests: t.Sequence[RevertRequest]) -> list[Refusal | None]:
        """Return for each request of a call what is wrong with it beside the others."""
        chains = [_identities(request) for request in requests]
        going = [goes for goes, _all in chains]
        return revert_rules.conflicts([one.path for one in requests], going, [every for _goes, every in chains])

    def folders(self, request: RevertRequest) -> t.Sequence[str]:
        """Return the folder of the overlay."""
        return [os.path.dirname(request.path)]

    def refused(self, request: RevertRequest, problems: t.Sequence[Refusal]) -> RevertVerdict:
        """Return the verdict on a request that is refused without a look."""
        return RevertVerdict(request, FAILED, tuple(problems))

    def judge(self, request: RevertRequest, held: Held) -> RevertVerdict:
        """Look at the chain and at who else uses it, and decide."""
        seen = _observe(request, held)
        verdict = revert_rules.decide(request, seen)
        if verdict.changed and request.puts_on_base:
            verdict = revert_rules.with_common(verdict, _compare(request, seen, held))
        # Of what a killed run has left the VM has BASE already, and writes to it.
        goes_now = request.puts_on_base and not request.is_left
        if verdict.changed and goes_now and seen.staying[0].may_be_written:  # else nothing went in
            verdict = revert_rules.with_lowest(verdict, seen, _lowest(held.image(seen.going[-1].path)))
        if verdict.changed:
            for one in seen.going:
                held.unwritten(one.path)
                held.hold_off_everybody(one.path)
            held.check_images([one.path for one in seen.going])
        return verdict

    def images(self, verdict: RevertVerdict) -> Images:
        """Return the images that go and BASE, in the order in which the VM opens them."""
        request = verdict.request
        if verdict.state == ABSENT:  # BASE may be in use again, unless its VM is still to be switched
            return Images((request.backing_file,) if request.vm is not None else ())
        opened = (*(one.path for one in verdict.retired), request.backing_file)
        # Another run may have retired the others when this one gets its turn: then judge() finds them gone.
        return Images(opened, frozenset([request.backing_file]))

    def rehearse(self, verdict: RevertVerdict, _held: Held) -> RevertVerdict:
        """Nothing more can be told beforehand."""
        return verdict

    def phases(self) -> t.Sequence[t.Callable[[RevertVerdict, Held], RevertVerdict]]:
        """Nothing is made or read back: all that is done is to switch and to retire."""
        return []

    def publish(
        self, verdicts: t.Sequence[RevertVerdict], held: Held, switch: t.Callable[[], None]
    ) -> t.Sequence[RevertVerdict]:
        """Put the VM on BASE, then retire the images above; what fails after the switch is told, not undone."""
        going = [one for one in verdicts if one.request.puts_on_base and one.retired]
        _switch([held.image(one.retired[0].path) for one in going], switch)
        return [_retire_all(verdict, held) if verdict.changed else verdict for verdict in verdicts]


def _compare(request: RevertRequest, seen: Observed, held: Held) -> t.Iterator[Common]:
    """Yield how much each image that goes has in common with each one that stays and may have been written to.

    By default 'virsh blockcommit' merges the topmost image into the lowest one, whatever is between.
    """
    for depth, one in enumerate(seen.staying):
        if not one.may_be_written:
            continue
        path = one.layer.real_path if depth else request.backing_file
        yield from in_common([(goes.path, goes.layer) for goes in seen.going], (path, one.layer), held)


def _lowest(file: OpenImage) -> Lowest:
    return Lowest(holds_any(file), has_allocated_extents(file), file.written())


def _switch(tops: t.Sequence[OpenImage], switch: t.Callable[[], None]) -> None:
    """Put the VM on the images below these, each of which says so from then on.

    A run that is killed now leaves images that no disk has. By what they say the next one knows that they are to go:
    this VM may as well have gone to another host, where it has them. If the switch fails, they go on to say so: the VM
    can have been switched all the same.
    """
    for file in tops:
        written = file.written()
        write_leaving(file, leaving=True)
        with contextlib.suppress(OSError):  # it tells the next run whether its guest has written to it
            file.put_time_back(written)
    switch()


def _retire_all(verdict: RevertVerdict, held: Held) -> RevertVerdict:
    """Retire the images of one disk; return what became of them.

    The topmost one goes last: while it stands the same call finds the work, and by it the chain. So the others are
    only renamed before, which leaves the way down through them, and those that are to be deleted are so at the end.
    Symlinks are on that way, too. So they go when all is renamed, and that of the topmost one last.
    """
    how = verdict.request.retire
    done: list[Retired] = []
    try:
        for one in reversed(verdict.retired):
            is_renamed = one is not verdict.retired[0] or is_link(one.path)
            done.insert(0, _retire(one.path, held.image(one.path), KEEP if is_renamed else how))
        for one in verdict.retired[:1] if how == KEEP else ():  # somebody may give it back to a VM
            with contextlib.suppress(OSError):  # what it says harms only where no disk has it
                write_leaving(held.image(one.path), leaving=False)
        for one in reversed((*verdict.retired, *verdict.kept_already)):
            remove_dangling_link(one.path)
        if how == DELETE:
            for index, one in enumerate(done):
                if one.kept_as is not None:
                    done[index] = _retire(one.kept_as, held.image(one.path), how)._replace(path=one.path)
    except (Refusal, OSError) as exc:
        left = [one.path for one in verdict.retired if one.path not in {gone.path for gone in done}]
        left += [one.kept_as for one in done if how == DELETE and one.kept_as is not None]
        left += [one.path for one in (*done, *verdict.kept_already) if os.path.islink(one.path)]
        left = left or [verdict.request.path]
        return verdict.failed(_not_removed(verdict, exc, left))._replace(warnings=verdict.warnings)
    return verdict._replace(retired=tuple(done))


def _retire(path: str, file: OpenImage, how: How) -> Retired:
    """Retire an image; a symlink that leads to it stays."""
    return Retired(path, retire(real_path(path), file, how, REVERTED_AS))


def _not_removed(verdict: RevertVerdict, exc: Refusal | OSError, left: t.Sequence[str]) -> Refusal:
    """Return the refusal of images that could not be retired although no VM needs them any more."""
    cause = exc.strerror if isinstance(exc, OSError) else exc.why
    request = verdict.request
    verb = "deleted" if request.retire == DELETE else "renamed aside"
    why = f"is not needed any more, since the VM is on {request.backing_file}, but could not be {verb}: {cause}"
    return Refusal("not_removed", left[0], why, CHECK_STORAGE + "".join(f" So is {one}." for one in left[1:]))


def _identities(request: RevertRequest) -> tuple[list[Identity], list[Identity]]:
    """Return the images that go with a request, and those and all below, as far as they can be read."""
    chain: list[Identity] = []
    try:
        base = identity_of(os.stat(request.backing_file))
        top, image_format = (request.path, QCOW2) if is_there(request.path) else request[1:3]
        with open_image(top) as file:
            chain += [layer.identity for layer, _file in walk_chain(file, image_format, read_top=read_head)]
    except (OSError, ValueError, Refusal):  # the look at it will tell
        pass
    return (chain[: chain.index(base)], chain) if chain and base in chain else ([], chain)


def _observe(request: RevertRequest, held: Held) -> Observed:
    """Return what stands at the path and below; Refusal if something there is unusable."""
    if stands(request.path):
        try:
            return _observe_overlay(request, held)
        except (Refusal, OSError):
            if stands(request.path):
                raise  # or else another run has retired it in this moment
    chain = list(_layers(held.image(request.backing_file), request.backing_file, request.backing_format))
    return Observed((), chain[0], False, None, why_in_the_way(chain, (), (COMMIT,)))


def _observe_overlay(request: RevertRequest, held: Held) -> Observed:
    """Return what the image at the path is, and what is below it."""
    below = held.image(request.backing_file)
    if not _is_link_left(request.path):
        _check_overlay(request, held.image(request.path), below)
    found = _chain(request, held, below.identity)
    layers = [layer for _place, layer in found]
    depth = next((depth for depth, layer in enumerate(layers) if layer.identity == below.identity), None)
    going = found[: 1 if depth is None else depth]
    # The images that go may alone have the bits of those further down, whose bitmaps a vault has meanwhile.
    healing = why_in_the_way(layers, (), (HEALING,))
    if healing is not None:
        raise healing
    return Observed(
        going=tuple(_going(going, request, held)),
        base=None if depth is None else layers[depth],
        base_is_open=is_open_for_writing(below),
        below=layers[1].path if len(layers) > 1 else None,
        # A commit that goes on to an image further down has changed what those between are read as.
        commit=why_in_the_way(layers, (), (COMMIT,)),
        others=() if depth is None else tuple(_others_on(layers[depth], request, layers)),
        begun=tuple(filter(None, (find_sign(held.image(place)) for place, _layer in going))),
        staying=() if depth is None else tuple(_staying(layers, depth, held)),
    )


def _staying(layers: t.Sequence[Layer], depth: int, held: Held) -> t.Iterator[Lower]:
    """Yield BASE, which is so deep in the chain, and the images below it."""
    for over, layer in zip(layers[depth - 1 :], layers[depth:]):
        history = revert_rules.what_counts(over, layers[depth - 1])
        yield lower_of(layer, history, held)


def _is_link_left(path: str) -> bool:
    """Whether a symlink that leads nowhere stands there, as after a run that was killed once the image was renamed."""
    return is_link(path) and not is_there(real_path(path))


def _check_overlay(request: RevertRequest, file: OpenImage, below: OpenImage) -> None:
    """Refuse what is no overlay."""
    remedy = "Name the overlay as path, and the image below it as backing_file."
    if not is_qcow2(file):
        why = "is not a qcow2 image, so it is no overlay. It may be the raw disk of a VM"
        raise Refusal("not_qcow2", request.path, why, remedy)
    if file.identity == below.identity:
        why = f"is {request.backing_file} itself, so there is nothing to go back from"
        raise Refusal("backs_itself", request.path, why, remedy)


def _others_on(base: Layer, request: RevertRequest, chain: t.Sequence[Layer]) -> t.Iterator[str]:
    """Yield the paths of the images beside BASE that stand on it and are in use, as far as their names tell."""
    folders = folders_beside([base.path, request.backing_file])
    for path in standing_on(base.identity, folders, [layer.identity for layer in chain]):
        if not is_kept(os.path.realpath(path)):
            yield path


def _settled(file: OpenImage) -> Image:
    return read_settled(file)[0]


def _layers(file: OpenImage, path: str, image_format: str | None) -> t.Iterator[Layer]:
    """Yield the layers of a chain, with their bitmaps."""
    for layer, _file in walk_chain(file, image_format, read_top=_settled, read_below=_settled, path=path):
        yield layer


class _Aside(t.NamedTuple):
    """An image that a killed run may have renamed, so that the chain goes on with it."""

    place: str  # where it is
    path: str  # where it stood
    image_format: str | None
    above: list[Placed]


def _chain(request: RevertRequest, held: Held, base: Identity) -> list[Placed]:
    """Return the layers from the path down to the end of the chain, each with its place.

    A run that was killed can have renamed layers above BASE already, from the lowest upwards: follow them there. Of
    several that are kept, it is the newest one that leads down to BASE.
    """
    found, missing = _walk(request.path, request.path, QCOW2, held)
    if missing is None:
        return found
    if missing.code != "no_such_file" or base in _identities_of(found):
        raise missing
    to_try, tried = _kept_below(found), set[str]()
    if _is_link_left(request.path):
        to_try = _kept_of(request.path, QCOW2, [])
    while to_try:
        one = to_try.pop()
        if one.place in tried:  # what did not lead to BASE does not do so from elsewhere
            continue
        tried.add(one.place)
        found, problem = _walk(one.place, one.path, one.image_format, held)
        whole = [*one.above, *found]
        if len(_identities_of(whole)) < len(whole):  # a loop
            continue
        if base in _identities_of(found):
            if problem is not None:
                raise problem
            return whole
        if problem is not None and problem.code == "no_such_file":
            to_try += _kept_below(whole)
    raise missing


def _kept_below(found: list[Placed]) -> list[_Aside]:
    """Return the images that may be the one which the lowest of these layers stands on, the likeliest last."""
    lowest = found[-1][1] if found else None
    if lowest is None or lowest.image is None or lowest.image.backing_file is None:
        return []
    return _kept_of(resolve_name(lowest.path, lowest.image.backing_file), lowest.image.backing_format, found)


def _kept_of(path: str, image_format: str | None, above: list[Placed]) -> list[_Aside]:
    return [_Aside(place, path, image_format, above) for place in all_kept(path, REVERTED_AS)]


def _identities_of(found: t.Iterable[Placed]) -> set[Identity]:
    return {layer.identity for _place, layer in found}


def _walk(place: str, path: str, image_format: str | None, held: Held) -> tuple[list[Placed], Refusal | None]:
    """Return the layers from the image at this place, which stood at the path; and why they are not all."""
    found: list[Placed] = []
    try:
        for layer in _layers(held.image(place), path, image_format):
            found.append((place if layer.path == path else layer.path, layer))  # noqa: PERF401  they must stay
    except Refusal as exc:
        return found, exc
    except OSError as exc:
        return found, system_refusal(exc, place, "cannot be read")
    return found, None


def _going(found: t.Sequence[tuple[str, Layer]], request: RevertRequest, held: Held) -> t.Iterator[Going]:
    """Yield what there is to know of each image that goes."""
    files = [held.image(place) for place, _layer in found]
    own = {file.identity for file in files}
    folders = folders_beside(one for place, layer in found for one in (place, layer.path))
    standing = all_standing_on(own, folders, own)
    for (place, layer), file in zip(found, files):
        is_aside = place != layer.path
        how = request.retire if layer is found[0][1] and not is_link(place) else KEEP
        problem = None if is_aside else why_not_retired(place, file, how, REVERTED_AS)
        is_kept_by_name = not is_aside and not file.is_device and request.retire == KEEP
        yield Going(
            path=place,
            layer=layer,
            is_open_for_writing=is_open_for_writing(file),
            below_running_vm=locks.is_locked_by_qemu(file, locks.WRITE_UNSHARED),
            standing=tuple(standing[file.identity]),
            problem=problem,
            kept_as=kept_path(place, REVERTED_AS) if is_kept_by_name else None,
            is_kept_already=is_aside,
        )
