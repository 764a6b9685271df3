# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: work on the images of a chain that a killed run has left unfinished, and which call completes it."""

from __future__ import annotations

import contextlib
import os
import shlex
import typing as t
from urllib.parse import quote

from .._base.errors import Refusal, system_refusal
from .._base.files import Identity, OpenImage, is_there, open_image
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, walk_chain
from .._qcow2.formats import QCOW2
from .._qcow2.image import read_image
from .._qcow2.mark import Mark
from .bitmap_rules import INCOMPLETE, Checkpoint
from .siblings import folders_beside
from .vault import MARK, SUFFIX, Vault, find_vault, healing_place, open_vault, place_of, read_vault, top_stands

COMMIT = "commit"
HEALING = "healing"


class Unfinished(t.NamedTuple):
    """Work that was begun on an image and is not done."""

    kind: str
    path: str  # of the image
    what: str  # without full stop
    remedy: str
    is_in_the_way: bool = True  # of other work on the chain
    mark: Mark | None = None  # of the overlay that is merged down
    doubtful: frozenset[str] = frozenset()  # bitmaps of which nothing tells whether the images have all of them

    def __str__(self) -> str:
        return f"{self.path}: {self.what}. {self.remedy}"

    def as_refusal(self) -> Refusal:
        """Return the refusal of other work on the chain."""
        return Refusal("unfinished", self.path, self.what, self.remedy)


def left_of(vault: Vault) -> list[str]:
    """Return the paths of the images between the two that have gone in and are not retired."""
    found = []
    for _identity, path in vault.others:
        with contextlib.suppress(Refusal, OSError), open_image(path) as file:
            if is_left(file, vault):
                found.append(path)
    return found


def is_left(file: OpenImage, vault: Vault) -> bool:
    """Whether this file is an image between the two that has gone in, and that nobody has written to since."""
    is_newer = not file.is_device and file.status().st_mtime_ns > vault.given_at
    return vault.took_in(file) and not is_newer


def left_in_vault(name: str, unfinished: t.Iterable[Unfinished]) -> Checkpoint | None:
    """Return the verdict on a checkpoint of which a killed run has left a part in its vault alone; None if not so."""
    left = next((one for one in unfinished if name in one.doubtful), None)
    return None if left is None else Checkpoint(name, None, INCOMPLETE, left.path, str(left))


def unfinished_work(chain: t.Sequence[Layer], top_bitmaps: t.Iterable[Bitmap]) -> list[Unfinished]:
    """Return what is unfinished in a chain, topmost image first."""
    found, tokens = list[Unfinished](), set[str]()
    for depth, layer in enumerate(chain):
        for path, vault in _commits_into(layer, chain[:depth]):
            tokens |= {vault.token} if isinstance(vault, Vault) else set()
            found.append(_commit(layer, path, vault, chain))
        for path in healing_vaults(layer, chain[0]):
            at_healing = _read(path)
            is_other = isinstance(at_healing, Vault) and not is_healing_of(at_healing, layer, chain[:depth])
            if at_healing is not None and not is_other:
                found.append(_healing(layer, path, at_healing, chain[0]))
    marks = [bitmap.name for bitmap in top_bitmaps if bitmap.name.startswith(MARK)]
    return [_mark(chain[0].path, name) for name in marks if name[len(MARK) :] not in tokens] + found


def merged_below_alone(path: str, above: str) -> Refusal:
    """Return the refusal of an image that its hypervisor still has, although the one above records the image below.

    So it is where QEMU has merged it down while its VM ran, and the end of that has failed: bitmaps may be in it alone.
    """
    why = (
        f"was merged down while its VM ran, and the end of that failed: {above} records the image below by now, but "
        "libvirt still has it between both. It must stay, since bitmaps may be in it alone"
    )
    command = shlex.join(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", path, above])
    remedy = (
        "See the space in the folder of the image below, and shut the VM off. If it is still there then, have it "
        f"recorded again by '{command}', and run this again."
    )
    return Refusal("not_switched", path, why, remedy)


def why_in_the_way(
    chain: t.Sequence[Layer], top_bitmaps: t.Iterable[Bitmap], kinds: t.Container[str] = (COMMIT, HEALING)
) -> Refusal | None:
    """Return why other work must wait for the end of this kind of work; None if it need not."""
    found = (one for one in unfinished_work(chain, top_bitmaps) if one.is_in_the_way and one.kind in kinds)
    return next((one.as_refusal() for one in found), None)


def why_not_merged(chain: t.Sequence[Layer], depth: int, above: Layer | None, own: str | None) -> Refusal | None:
    """Return which other work has to be completed before a chain is merged into its image at `depth`; None if none.

    `above` is the image on top of the chain, if there is one; `own` is where the vault of this merge is, which the
    stages judge; None if the merge goes on with no vault.
    """
    whole = [*([above] if above is not None else []), *chain]
    # What only a vault has, the merge cannot judge: above, it may be what lacks changes; below, what others count on.
    healing = why_in_the_way(whole, (), (HEALING,))
    if healing is not None:
        return healing
    for place, layer in enumerate(whole):
        for path, vault in _commits_into(layer, whole[:place]):
            # What went into an image above BASE is in it, and a VM may have written to it since.
            begun = _commit(layer, path, vault, whole)
            if own is not None and layer is chain[depth]:
                is_other = isinstance(vault, Vault) and _is_of_another(vault, chain, depth, own)
            else:
                is_other = begun.is_in_the_way or (isinstance(vault, Vault) and top_stands(vault, layer.identity))
            if is_other:
                return begun.as_refusal()
    return None


def _is_of_another(vault: Vault, chain: t.Sequence[Layer], depth: int, own: str) -> bool:
    """Whether a vault beside BASE is of another commit under way. Of one that is done the stages tell."""
    is_own = vault.place == own and _is_of(vault, chain[0])
    return not is_own and not vault.is_given and top_stands(vault, chain[depth].identity)


def healing_vault(layer: Layer, top: Layer) -> str | None:
    """Return the place of the vault of an image whose bitmaps are healed; None if there is no folder that stays."""
    if not layer.is_device:
        return healing_place(os.path.basename(layer.real_path), os.path.dirname(layer.real_path))
    # Not by its real path: that has the number of the device, which the next start of the host can give another one.
    return None if top.is_device else healing_place(quote(layer.path, safe=""), os.path.dirname(top.real_path))


def healing_vaults(layer: Layer, top: Layer) -> list[str]:
    """Return the paths of the vaults that can be of an image whose bitmaps are healed."""
    places = [healing_vault(layer, top)]
    if layer.is_device and not top.is_device:  # as releases before 1.0.1 called it
        places.append(healing_place(os.path.basename(layer.real_path), os.path.dirname(top.real_path)))
    return [path for path in map(find_vault, filter(None, places)) if path is not None]


def is_healing_of(vault: Vault, layer: Layer, above: t.Sequence[Layer]) -> bool:
    """Whether a vault of a healing is of this image, which has those above it.

    The number of a device tells nothing: another one can have it, once the host was started anew. So its path must
    lead to the one that is kept, and an image above it be the same, since a new volume can have the name of an old one.
    """
    if not layer.is_device:
        return _is_of(vault, layer)
    is_named = vault.top_path is not None and os.path.realpath(vault.top_path) == layer.real_path
    return is_named and any(vault.is_between(one.identity, one.path, one.generation) for one in above)


def _commits_into(layer: Layer, above: t.Sequence[Layer]) -> t.Iterator[tuple[str, Vault | Refusal]]:
    """Yield the paths of the vaults of commits into this image, and what they hold.

    Beside an image lies also the vault of its own commit into a block device.
    """
    tops = [one.real_path for one in above if not one.is_device] if layer.is_device else [layer.real_path]
    places = dict.fromkeys(place_of(layer.real_path, layer.is_device, top) for top in tops)
    found = [*filter(None, map(find_vault, places))]
    # Once the image on top is on a device, the vault lies beside an overlay that is in no chain.
    found += vaults_into_device(layer.identity, folders_beside(tops)) if layer.is_device else []
    for path in dict.fromkeys(found):
        vault = _read(path)
        if vault is not None and not (isinstance(vault, Vault) and _is_of(vault, layer)):
            yield path, vault


def vaults_into_device(device: Identity, folders: t.Iterable[str]) -> list[str]:
    """Return the paths of the vaults in these folders that are of merges into a block device.

    Such a vault lies beside its topmost image. That one tells which device it is, or one below it that is left.
    """
    found = []
    for folder in folders:
        for path in _vaults_in(folder):
            vault = _read(path)
            if isinstance(vault, Vault) and _is_into_device(vault, device):
                found.append(path)
    return found


def _is_into_device(vault: Vault, device: Identity) -> bool:
    if vault.top_path is None or vault.place != place_of(
        "", is_device=True, top_real_path=os.path.realpath(vault.top_path)
    ):
        return False
    if is_there(os.path.realpath(vault.top_path)):
        return top_stands(vault, device)
    return any(_stands_on(path, device) for path in left_of(vault))


def _stands_on(path: str, image: Identity) -> bool:
    """Whether this image is in the chain of the one at the path."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        return any(layer.identity == image for layer, _file in walk_chain(file, QCOW2))
    return False


def _vaults_in(folder: str) -> list[str]:
    """Return the paths of all vaults of merges in a folder; none if it cannot be listed."""
    places = set()
    with contextlib.suppress(OSError):
        places = {name.partition(SUFFIX)[0] + SUFFIX for name in os.listdir(folder) if SUFFIX in name}
    return [*filter(None, (find_vault(os.path.join(folder, place)) for place in sorted(places)))]


def _mark(path: str, name: str) -> Unfinished:
    what = f"its commit is unfinished: it has the mark {name!r}"
    remedy = (
        "Complete it with the same call again (kvmfleet.qcow2.qcow2_overlay or kvmfleet.qcow2.domain_overlay with "
        "state=committed). If that finds nothing to complete, other tools have copied the mark: remove it, with "
        f"'qemu-img bitmap --remove {path} {name}'. If the image was committed before and is only kept, nothing is to "
        "be done with it."
    )
    return Unfinished(COMMIT, path, what, remedy)


def _commit(layer: Layer, path: str, vault: Vault | Refusal, chain: t.Sequence[Layer]) -> Unfinished:
    if isinstance(vault, Refusal):
        return Unfinished(COMMIT, layer.path, f"the vault {path} {vault.why}", vault.remedy)
    stands = top_stands(vault, layer.identity)
    copy = _place_of_copy(vault, layer, chain)
    place = next((place for place, one in enumerate(chain) if _is_of(vault, one)), None if stands else copy)
    is_known = vault.top_path is not None and (stands or not os.path.lexists(vault.top_path))
    if vault.is_given and place is None and vault.top_path is not None and not is_known:
        what = (
            f"a commit into it is done, and its vault is left over ({path}), while {vault.top_path} is another image "
            "than the one that went in, or stands on another one"
        )
        remedy = f"If what went in is gone, or is only kept, remove {path}."
        return Unfinished(COMMIT, layer.path, what, remedy, is_in_the_way=False)
    top = chain[place].path if place is not None else (vault.top_path if is_known else None) or "the overlay"
    options = [f"path={top}", f"backing_file={layer.path}"]
    options += ["backing_format=raw"] if layer.image is None else []
    options += [f"above={chain[place - 1].path}"] if place else []
    image = chain[place].image if place is not None else None
    mark = image.mark if image is not None else None
    of_images = f"kvmfleet.qcow2.qcow2_overlay, state=committed, {', '.join(options)}"
    call = _call_of_commit(of_images, mark, is_joined=bool(vault.others))
    if place is None and copy is not None:
        call += f" If {top} is only a copy, which no VM uses, move it away instead."
    above = chain[chain.index(layer) - 1] if place is None and layer is not chain[0] else None
    if not vault.is_given:
        what = f"the commit of {top} into it is unfinished (vault {path})"
        if above is not None and stands and vault.top_path is not None:
            call = of_image_beside(above, layer.path, vault, vault.top_path, f"{call} If ")
        elif place is None and layer is chain[0]:
            call += (
                f" But if a VM has run on {layer.path} since, that and what {top} holds exclude each other. To keep "
                f"what is in {layer.path}, {removal_of(vault, top)}"
            )
        # Another tool may have merged it into an image above, whose bitmaps lack what only the vault has.
        doubtful = frozenset((*vault.above, *vault.below)) if place is None else frozenset[str]()
        return Unfinished(COMMIT, layer.path, what, call, mark=mark, doubtful=doubtful)
    if above is not None and stands:  # it may have been switched already
        call += f" Give above={above.path}, too, if that stood on {top}."
    what = f"of the commit of {top} into it only the end is missing: what went in is to be retired (vault {path})"
    return Unfinished(COMMIT, layer.path, what, call, is_in_the_way=place is not None, mark=mark)


def of_image_beside(above: Layer, base_path: str, vault: Vault, top_path: str, else_if: str) -> str:
    """Return what to do about a commit that is unfinished, where an image of the chain stands on BASE beside TOP.

    If it was made on TOP, another tool has taken that into it, and what it holds is newer: nobody must put a VM on TOP.
    `else_if` begins what is said if that cannot be told.
    """
    removal = removal_of(vault, top_path)
    history = above.image.history if above.image is not None else None
    if history is not None and history.base_inode == vault.top[-1]:
        command = shlex.join(["qemu-img", "rebase", "-f", QCOW2, "-F", QCOW2, "-b", top_path, above.path])
        # Not with -u: what else has gone into BASE since nobody can tell.
        return (
            f"{above.path} was made on {top_path}, so another tool has taken that into it, as 'virsh blockpull' does. "
            f"With the VM shut off, have it recorded again by '{command}', which compares all data. Then run the call "
            "again that was killed, which completes the merge with all bitmaps. Or, as nothing is left to merge, "
            f"{removal}"
        )
    return (
        f"{else_if}another tool has taken {top_path} into {above.path}, as 'virsh blockpull' does, nothing is left to "
        f"merge. If {above.path} was made while the VM was on {base_path}, what it holds and what {top_path} holds "
        f"exclude each other. To keep what {above.path} has, which is right in both cases, {removal}"
    )


def removal_of(vault: Vault, top_path: str) -> str:
    """Return how to give up a commit that is unfinished, and keep what VMs have without TOP."""
    return (
        f"remove {top_path} and {vault.path}, then all checkpoints (kvmfleet.qcow2.domain_checkpoint with "
        "state=absent), which can lack changes although they look valid, and make a full backup with a new one."
    )


def _place_of_copy(vault: Vault, base: Layer, chain: t.Sequence[Layer]) -> int | None:
    """Return the place of the copy of the image that the vault is of, where both were copied; None if there is none.

    It bears the mark. But a snapshot makes a copy of that, too, further up. So its name counts, unless the other one
    is still there and all of this chain is a copy. Before it bears the mark, it has the name alone.
    """
    name = os.path.basename(vault.top_path or "")
    places = range(chain.index(base) - 1, -1, -1)
    named = [place for place in places if os.path.basename(chain[place].path) == name]
    marked = [place for place in places if _bears(chain[place], MARK + vault.token)]
    if vault.is_given or not os.path.lexists(vault.top_path or ""):
        marked = [place for place in marked if place in named]
    return next(iter([*marked, *([] if vault.is_given else named)]), None)


def _bears(layer: Layer, mark: str) -> bool:
    """Whether an image bears the mark of a commit; most chains are read without their bitmaps."""
    with contextlib.suppress(Refusal, OSError), open_image(layer.path) as file:
        return any(bitmap.name == mark for bitmap in read_image(file).bitmaps)
    return False


def _is_of(vault: Vault, layer: Layer) -> bool:
    return vault.is_of(layer.identity, layer.path, layer.generation)


def _call_of_commit(of_images: str, mark: Mark | None, *, is_joined: bool) -> str:
    """Return which call completes a commit. A domain must be given a definition without the overlay, too."""
    if mark is not None and is_joined:
        return (
            "Complete it with kvmfleet.qcow2.domain_overlay, state=committed with older_than or keep "
            f"as before and the name of its domain; if libvirt does not know that any more, with {of_images}."
        )
    if mark is None:
        return f"Complete it with {of_images} (or with the same call of kvmfleet.qcow2.domain_overlay)."
    return (
        f"Complete it with kvmfleet.qcow2.domain_overlay, state=committed, snapshot={mark.snapshot} and the name of "
        f"its domain; if libvirt does not know that any more, with {of_images}."
    )


def _healing(layer: Layer, path: str, vault: Vault | Refusal, top: Layer) -> Unfinished:
    if isinstance(vault, Refusal):
        return Unfinished(HEALING, layer.path, f"the vault {path} {vault.why}", vault.remedy)
    what = f"work on its bitmaps is unfinished (vault {path})"
    if vault.is_given:
        what = f"work on its bitmaps is done, and its vault is left over ({path}), which is of no use"
    remedy = (
        "With the VM shut off, complete it with the same call again: kvmfleet.qcow2.domain_checkpoint with the name of "
        f"its domain, or kvmfleet.qcow2.qcow2_bitmap with path={top.path}."
    )
    return Unfinished(HEALING, layer.path, what, remedy, is_in_the_way=not vault.is_given)


def _read(path: str) -> Vault | Refusal | None:
    """Return what a vault holds, or why that cannot be told; None if it has gone meanwhile."""
    try:
        with open_vault(path) as file:
            return read_vault(file)
    except Refusal as exc:
        return None if exc.code == "no_such_file" else exc
    except OSError as exc:
        return system_refusal(exc, path, "cannot be read")
