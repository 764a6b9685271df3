# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: whether a chain differs from its definition because the end of a merge failed while the domain ran."""

from __future__ import annotations

import contextlib
import os
import typing as t

from .._base.errors import Refusal
from .._base.files import open_image
from .._disk.begun import find_sign
from .._disk.unfinished import merged_below_alone
from .._libvirt.definition import StatedChain
from .._qcow2.chain import Layer, read_head, resolve_name


def why_differs(stated: StatedChain, layers: t.Sequence[Layer]) -> Refusal | None:
    """Return that the definition has one image more than the images record, of which a merge was begun; None if not."""
    recorded = [layer.real_path for layer in layers]
    images = [layers[0].real_path, *(os.path.realpath(image.path) for image in stated.images)]
    place = next((place for place, (one, other) in enumerate(zip(images, recorded)) if one != other), None)
    if place is None:
        return None
    rest = [*images[:place], *images[place + 1 :]]
    is_rest = rest == (recorded if stated.is_complete else recorded[: len(rest)])
    if not is_rest or not _was_to_go_into(images[place], recorded[place]):
        return None
    return merged_below_alone(images[place], layers[place - 1].path)


def _was_to_go_into(path: str, below: str) -> bool:
    """Whether an image records this one below it, and its merge was begun while its VM ran."""
    with contextlib.suppress(Refusal, OSError), open_image(path) as file:
        name = read_head(file).backing_file
        return name is not None and os.path.realpath(resolve_name(path, name)) == below and find_sign(file) is not None
    return False
