# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the images of a chain as heal.py needs them, what killed runs have left beside them, and the bits to be."""

from __future__ import annotations

import contextlib
import itertools
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import OpenImage, is_there
from .._qcow2.bitmaps import Bitmap
from .._qcow2.chain import Layer, relative_data_file, resolve_name, why_unusable
from .._qcow2.dirty import (
    DirtyBits,
    DirtyMap,
    counting_cost,
    covers,
    dirty_bytes,
    is_union,
    maps_of,
    stored_maps,
    united,
)
from .._qcow2.extents import AllocationMap
from .._qcow2.image import Image, read_image
from .._qcow2.scratch import write_scratch
from .._qemu import locks
from .bitmap_rules import bitmap_problems, names_of
from .cumulative import MAX_UNITED, memory_image, uniting_cost
from .examine import MAX_COUNTED_BITS
from .heal import HealRequest, Plan, Standing, Want, in_doubt
from .observe import observe_chain, why_not_opened, why_not_writable
from .retire import is_kept
from .session import Held
from .siblings import all_standing_on, folders_beside
from .unfinished import COMMIT, healing_vault, healing_vaults, is_healing_of, why_in_the_way
from .vault import MAX_NAME, Vault, healings_of_none, open_vault, read_vault, why_no_vault

Bits = dict[str, DirtyBits]  # by the name of the bitmap

_RUN_NS = 3600 * 10**9  # from the vault that a run keeps to its last write, at most


class Patient(t.NamedTuple):
    """An open image of the chain."""

    layer: Layer
    file: OpenImage
    own: t.Mapping[str, DirtyMap]  # its consistent bitmaps
    stored: t.Mapping[str, DirtyMap]  # the others, as they were stored last
    vault: Vault | None  # that a killed run has left
    standing: Standing

    @property
    def image(self) -> Image:
        """Its header and bitmaps; only of qcow2."""
        return t.cast("Image", self.layer.image)

    def sources(self, name: str, want: Want) -> list[DirtyBits]:
        """Return the maps, as far as they are this image's, whose union the bitmap is to be."""
        maps: list[DirtyBits] = []
        if want.own and self.vault is not None and name in self.standing.put_back:
            maps.append(self.vault.below[name].bits)
            # A VM that has run since wrote that, perhaps before the image was emptied.
            maps += [self.stored[name]] if name in self.stored else []
        elif want.own and name in self.own:
            maps.append(self.own[name])
        return [*maps, AllocationMap(self.file)] if want.held else maps


def look_at_chain(request: HealRequest, held: Held) -> list[Patient]:
    """Return the images of a chain, topmost first; Refusal if one is in use, or if other work on it is unfinished.

    While locks are held, nobody can begin to write to one of them.
    """
    layers = observe_chain(held.image(request.path), "qcow2", relative=False).layers
    for layer in layers:
        held.unwritten(layer.path)
    problem = layers[-1].why_no_bottom()
    if problem is not None:
        raise problem
    top_bitmaps = layers[0].image.bitmaps if layers[0].image else ()
    problem = why_in_the_way(layers, top_bitmaps, (COMMIT,))
    if problem is not None:
        raise problem
    all_there = [_look(layer, layers[:depth], held, request.missed) for depth, layer in enumerate(layers)]
    patients = [_without_forgotten(one, all_there, request) for one in all_there]
    is_trusted = request.assume_not_emptied
    return patients if is_trusted else [_doubted(one, patients[place + 1 :]) for place, one in enumerate(patients)]


def _look(layer: Layer, above: t.Sequence[Layer], held: Held, missed: t.AbstractSet[str]) -> Patient:
    top, file = above[0] if above else layer, held.image(layer.path)
    if file.identity != layer.identity:
        raise Refusal("changed_meanwhile", layer.path, "was moved or replaced meanwhile", "Run this again.")
    if layer.image is None:
        return Patient(layer, file, {}, {}, None, Standing(layer.path, layer.virtual_size, {}))
    image = read_image(file)  # what was read before it was kept from writers may be of yesterday
    layer = layer._replace(image=image)
    vault = _find_vault(layer, above, held)
    named = {bitmap.name: bitmap for bitmap in image.bitmaps}
    put_back = _lost(image, vault, missed) if vault is not None else frozenset[str]()
    fault = _fault(layer, top, file, image)
    if vault is not None and not vault.is_given and not is_healing_of(vault, layer, above):
        if put_back:
            raise _of_another_file(file, vault, "lacks bitmaps that the vault {} has")
        fault = fault or _of_another_file(file, vault, "is beside the vault {}")  # no other could be there
        vault = None
    kept = vault.below if vault is not None and not vault.is_given else {}
    bitmaps = {**named, **{name: kept[name].bitmap for name in put_back & kept.keys()}}
    standing = Standing(
        path=layer.path,
        virtual_size=layer.virtual_size,
        bitmaps=bitmaps,
        put_back=put_back,
        gone=tuple(one.bitmap for name, one in sorted(kept.items()) if name not in bitmaps),
        lost_bitmaps=image.lost_bitmaps,
        lost_names=image.lost_names,
        lost_by_kill=bool(image.lost_bitmaps) and vault is not None and _is_of_its_run(file, vault),
        modified=None if file.is_device else int(file.status().st_mtime),
        made=image.made,
        is_flattened=image.is_flattened,
        fault=fault,
    )
    return Patient(layer, file, maps_of(file, image), stored_maps(file, image), vault, standing)


def _find_vault(layer: Layer, above: t.Sequence[Layer], held: Held) -> Vault | None:
    """Return the vault of an image, or that of another file which lies in its place."""
    top = above[0] if above else layer
    found = [read_vault(held.enter(open_vault(path))) for path in healing_vaults(layer, top)]
    ours = (vault for vault in found if is_healing_of(vault, layer, above))
    in_its_place = (vault for vault in found if vault.place == healing_vault(layer, top))
    return next(itertools.chain(ours, in_its_place), None)


def _lost(image: Image, vault: Vault, missed: t.AbstractSet[str]) -> frozenset[str]:
    """Return what a killed run has lost; once all work was done, what is missing was removed since.

    So was a bitmap that is missing where all others are in order, unless somebody still counts on it.
    """
    if vault.is_given:
        return frozenset()
    sound = {bitmap.name for bitmap in image.bitmaps if not bitmap.inconsistent}
    lost = frozenset(vault.below) - sound
    if image.bitmaps and not image.lost_bitmaps and not any(bitmap.inconsistent for bitmap in image.bitmaps):
        return lost & missed
    return lost


def _is_of_its_run(file: OpenImage, vault: Vault) -> bool:
    """Whether it was the run that has kept the vault which has written to the image last, as far as its time tells.

    Whoever has come since can have lost bitmaps that were made since, of which the vault knows nothing.
    """
    return not vault.is_given and (file.is_device or file.status().st_mtime_ns - vault.given_at < _RUN_NS)


def _without_forgotten(patient: Patient, chain: t.Sequence[Patient], request: HealRequest) -> Patient:
    """Return an image without what only vaults have, and whose checkpoint somebody has removed since a run was killed.

    Libvirt knew it then and does not now. Of what it did not know then it tells nothing, nor if it knows no checkpoint
    of the domain any more, whose definition can be a new one.
    """
    standing, vault = patient.standing, patient.vault
    if vault is None or not request.referred:
        return patient
    unknown = (standing.put_back & vault.known) - request.referred - request.missed
    forgotten = frozenset(name for name in unknown if not any(_may_have(one, name) for one in chain))
    standing = standing._replace(
        bitmaps={name: bitmap for name, bitmap in standing.bitmaps.items() if name not in forgotten},
        put_back=standing.put_back - forgotten,
        gone=(*standing.gone, *(vault.below[name].bitmap for name in sorted(forgotten))),
        forgotten=forgotten,
    )
    return patient._replace(standing=standing)


def _may_have(patient: Patient, name: str) -> bool:
    """Whether an image has a bitmap itself, or had it until another program has lost it."""
    standing = patient.standing
    is_named = standing.lost_names is None or name in standing.lost_names
    is_lost = bool(standing.lost_bitmaps) and is_named and not standing.lost_by_kill
    return is_lost or (patient.layer.image is not None and any(one.name == name for one in patient.image.bitmaps))


def _doubted(patient: Patient, below: t.Sequence[Patient]) -> Patient:
    """Return an image with what only its vault tells, and may tell wrongly, as it is without the vault."""
    standing, vault = patient.standing, patient.vault
    alone = frozenset(name for name in standing.put_back if all(name not in one.own for one in below))
    if vault is None or not alone or not _may_be_emptied(patient, vault):
        return patient
    there = {bitmap.name: bitmap for bitmap in patient.image.bitmaps if bitmap.name in alone}
    standing = standing._replace(
        bitmaps={**standing.bitmaps, **there},
        put_back=standing.put_back - there.keys(),
        doubtful={name: in_doubt(standing.path, vault.path, name) for name in sorted(alone - there.keys())},
    )
    return patient._replace(standing=standing)


def _may_be_emptied(patient: Patient, vault: Vault) -> bool:
    """Whether the image may hold less than it held since the vault was kept, and so tells less of what changed.

    'qemu-img commit' without -d takes all away, and 'qemu-img rebase' gives it another backing file.
    """
    if vault.held is None:
        return False  # nobody can tell
    backing_file, size = patient.image.backing_file or "", patient.layer.virtual_size
    if vault.backing_file not in (None, backing_file):
        return True
    if backing_file and is_union(vault.held, (), size):
        return True  # all that came since may have gone, too
    return not covers([AllocationMap(patient.file)], vault.held, size)


def _of_another_file(file: OpenImage, vault: Vault, what: str) -> Refusal:
    """Return the refusal of an image beside which the vault of another file lies, whose bitmaps only that has."""
    remedy = "Put back the file that the vault is of. If there is none any more, remove the vault."
    why = f"{what.format(vault.path)}, which is of another file of this name"
    return Refusal("unfinished", file.path, why, remedy)


def _fault(layer: Layer, top: Layer, file: OpenImage, image: Image) -> Refusal | None:
    """Return why the bitmaps of an image cannot be written; None if they can."""
    if locks.is_locked_by_qemu(file, locks.WRITE_UNSHARED):
        return locks.below_running_vm(layer.path)
    if image.version == 2:
        why = "is an image of version 2 (compat 0.10), which holds no bitmaps"
        # One that no VM has can be left over, which would look new then.
        remedy = "If a VM has it, as a disk or below one, use 'qemu-img amend -f qcow2 -o compat=1.1' on it."
        return Refusal("unsupported", layer.path, why, remedy)
    if image.encrypted:
        why = "is encrypted, so QEMU cannot open it for writing without its key; not supported"
        return Refusal("encrypted", layer.path, why)
    relative = relative_data_file(layer.path, image)
    kept = [bitmap for bitmap in image.bitmaps if not bitmap.inconsistent]
    problems = [*why_unusable(layer.path, image, for_writing=True), *([relative] if relative else [])]
    problems += [*bitmap_problems(layer.path, image), *vault_problems(layer, top, kept)]
    return next(iter(problems), why_not_opened(file) or _why_time_not_kept(file))


def _why_time_not_kept(file: OpenImage) -> Refusal | None:
    """Return why the time of an image could not be put back once it was written; None if it could."""
    if file.is_device or os.geteuid() in (0, file.status().st_uid):
        return None
    why = "belongs to another user, so the time of its last write could not be kept, which tells what is older"
    return Refusal("no_permission", file.path, why, "Run with become, or as that user (become_user).")


def vault_problems(layer: Layer, top: Layer, kept: t.Sequence[Bitmap]) -> list[Refusal]:
    """Return why no vault of these bitmaps can be kept for the image."""
    place = healing_vault(layer, top)
    if place is None and not kept:
        return []
    if place is None:
        why = "is a block device, as is the topmost image, so there is no folder for a vault of its bitmaps"
        remedy = "Have 'virsh backup-begin' make a full backup with a new checkpoint while the VM runs."
        return [Refusal("block_device", layer.path, why, remedy)]
    problem = why_no_vault(place, layer.path) or why_not_writable(os.path.dirname(place), place)
    long = [bitmap for bitmap in kept if len(bitmap.name.encode("utf-8", "surrogateescape")) > MAX_NAME]
    if long:
        why = f"the bitmap name {names_of(long)} has more than {MAX_NAME} bytes, too many to be kept in a vault"
        return [Refusal("bitmap_name", layer.path, why, "Remove the bitmap with 'qemu-img bitmap --remove'.")]
    return [problem] if problem is not None else []


def with_others(patients: t.Sequence[Patient], known: t.Mapping[str, str]) -> list[Standing]:
    """Return the images with what stands on them and is in other chains, as the folders of this one show.

    `known` has beside that what else has an image, by its real path.
    """
    ours = {one.layer.identity for one in patients}
    standing = all_standing_on(ours, folders_beside(one.layer.path for one in patients), ours)
    there = [[path for path in standing[one.layer.identity] if not is_kept(path)] for one in patients]
    named = [[known[one.layer.real_path]] if one.layer.real_path in known else [] for one in patients]
    return [one.standing._replace(others=(*paths, *names)) for one, paths, names in zip(patients, there, named)]


def left_of_images_gone(patients: t.Sequence[Patient]) -> t.Iterator[str]:
    """Yield a warning for each vault of an image that stood on one of these and is gone: no call looks for it there."""
    ours = {one.layer.real_path for one in patients}
    for folder in folders_beside(one.layer.path for one in patients):
        with contextlib.suppress(OSError):
            for path in healings_of_none(folder):
                if _stood_on(path, ours):
                    yield (
                        f"{path}: a run that was killed has left this vault of an image that is gone. If the image was "
                        "merged, or is not needed, remove the vault. If it was moved away, put it back."
                    )


def _stood_on(vault_path: str, ours: t.Container[str]) -> bool:
    """Whether the image of a vault is gone, and stood on one of these images."""
    with contextlib.suppress(Refusal, OSError), open_vault(vault_path) as file:
        vault = read_vault(file)
        if vault.top_path is not None and vault.backing_file and not is_there(vault.top_path):
            return os.path.realpath(resolve_name(vault.top_path, vault.backing_file)) in ours
    return False


def bits_to_be(patients: t.Sequence[Patient], plan: Plan, held: Held) -> list[Bits]:
    """Return the bits of each image's bitmaps as they are to be, in images in memory where those are written."""
    found: list[Bits] = [dict(one.own) for one in patients]
    for place in sorted(plan.written, reverse=True):  # the topmost one may take in those below
        patient, wants = patients[place], plan.wants[place]
        sound = {name: want for name, want in wants.items() if not want.bitmap.inconsistent}
        maps = {name: patient.sources(name, want) for name, want in sound.items()}
        for name, want in sound.items():
            maps[name] += [found[lower][name] for lower in want.below]
        _check_cost(patient.layer.path, sound, maps)
        size = patient.layer.virtual_size
        file = held.enter(memory_image())
        pieces = ((w.bitmap, united(maps[name], w.bitmap.granularity, size)) for name, w in sound.items())
        write_scratch(file.fd, size, pieces)
        found[place] = dict(maps_of(file, read_image(file)))
    return found


def _check_cost(path: str, wants: t.Mapping[str, Want], maps: t.Mapping[str, t.Sequence[DirtyBits]]) -> None:
    """Refuse what would take too long to unite."""
    cost = sum(uniting_cost(one, want.bitmap.granularity) for name, want in wants.items() for one in maps[name])
    if cost > MAX_UNITED:
        why = "has so many bits set in its bitmaps, or holds so much, that uniting them would take too long"
        raise Refusal("bitmaps_too_large", path, why, "Remove those bitmaps that no backup needs.")


def changed_bitmaps(patient: Patient, wants: t.Mapping[str, Want], bits: Bits) -> list[str]:
    """Return the bitmaps of an image that are not yet as they are to be."""
    there = {bitmap.name: bitmap for bitmap in patient.image.bitmaps}
    size = patient.layer.virtual_size
    return [
        name
        for name in dict.fromkeys([*there, *wants])
        if name not in wants
        or there.get(name) != wants[name].bitmap
        or (name in bits and not is_union(patient.own[name], [bits[name]], size))
    ]


def counted(maps: t.Sequence[DirtyBits], virtual_size: int) -> int | None:
    """Return how many bytes the maps mark together; None if that would take too long."""
    if not maps or counting_cost(maps) > MAX_COUNTED_BITS:
        return None
    return dirty_bytes(maps, virtual_size)
