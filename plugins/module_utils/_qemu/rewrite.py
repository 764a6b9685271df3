# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Act: change the bitmaps of an image that exists. A vault must have been kept before; see _disk/vault.py.

The image is opened without its backing files: no data is read or written. QEMU stores the bitmaps when it closes the
image, and says nothing if it could not, so what became of it must be read back.
"""

from __future__ import annotations

import typing as t

from .._base.files import OpenImage
from .._qcow2.bitmaps import Bitmap
from .._qcow2.image import Image
from .monitor import Message, Monitor
from .nodes import bitmaps_only, close_node, extra_seconds, file_node

_IMAGE = "w"  # name of the node; short, because it is sent several times for each bitmap


class Addition(t.NamedTuple):
    """A bitmap that an image is to have, and what it begins with."""

    bitmap: Bitmap
    sources: t.Sequence[str] = ()  # nodes whose bitmaps of the same name are merged into it
    is_there: bool = False  # the image has it already, with these properties


class Rewriting(t.NamedTuple):
    """What is to be done to the bitmaps of one image."""

    file: OpenImage
    data_file: OpenImage | None
    remove: t.Sequence[str]  # names
    add: t.Sequence[Addition]
    sources: t.Mapping[str, tuple[OpenImage, Image | None]]  # the images to merge from, by the name of the node
    bit_bytes: int  # that the bits take at most


def rewrite_bitmaps(monitor: Monitor, wanted: Rewriting) -> None:
    """Have QEMU remove bitmaps and add others. What became of it must be read back."""
    count = len(wanted.remove) + len(wanted.add)
    more_seconds = extra_seconds(count, wanted.bit_bytes)
    monitor.send("blockdev-add", _for_writing(wanted.file, wanted.data_file), more_seconds)
    for name, (file, image) in wanted.sources.items():
        monitor.send("blockdev-add", bitmaps_only(name, file, image))
    if wanted.remove:
        removing = [_action("remove", node=_IMAGE, name=name) for name in wanted.remove]
        monitor.send("transaction", {"actions": removing}, more_seconds)
    if wanted.add:
        adding = [_adding(one.bitmap) for one in wanted.add if not one.is_there]
        monitor.send("transaction", {"actions": [*adding, *_merging(wanted.add)]}, more_seconds)
    for name in wanted.sources:
        close_node(monitor, name)
    close_node(monitor, _IMAGE)
    monitor.receive_rest(more_seconds)


def _adding(bitmap: Bitmap) -> Message:
    return _action(
        "add",
        node=_IMAGE,
        name=bitmap.name,
        granularity=bitmap.granularity,
        persistent=True,
        disabled=not bitmap.recording,
    )


def _merging(additions: t.Sequence[Addition]) -> t.Iterator[Message]:
    for bitmap, sources, _is_there in additions:
        if sources:
            bitmaps = [{"node": node, "name": bitmap.name} for node in sources]
            yield _action("merge", node=_IMAGE, target=bitmap.name, bitmaps=bitmaps)


def _action(what: str, **data: t.Any) -> Message:
    return {"type": f"block-dirty-bitmap-{what}", "data": data}


def _for_writing(file: OpenImage, data_file: OpenImage | None) -> Message:
    node = {"driver": "qcow2", "node-name": _IMAGE, "backing": None, "file": file_node(file)}
    return {**node, "data-file": file_node(data_file)} if data_file else node
