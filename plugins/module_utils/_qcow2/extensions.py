# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read: the header extensions of one qcow2 image (qcow2 spec, Header extensions)."""

from __future__ import annotations

import struct
import typing as t

from .bitmaps import EXT_BITMAPS, BitmapsExtension, parse_bitmaps_extension
from .formats import BACKING_FORMATS
from .header import CRYPT_LUKS, Header, damaged, each_extension, text_of
from .mark import EXT_MARK, History, Mark, history_from, mark_from

_CRYPTO = struct.Struct(">QQ")
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE = 0x44415441
_CRYPTO_HEADER = 0x0537BE77
_MAX_FORMAT_NAME = 15  # bytes; QEMU's BlockDriverState.backing_format


class Extensions(t.NamedTuple):
    """What the header extensions say. Of an extension that occurs twice the last one counts, as for QEMU."""

    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: BitmapsExtension | None = None
    has_crypto_header: bool = False
    mark: Mark | None = None
    history: History = History()


def read_extensions(area: bytes, header: Header, path: str) -> Extensions:
    """Return what the extensions in the header cluster `area` say; Refusal where QEMU too refuses them."""
    found = Extensions()
    for kind, _start, data in each_extension(area, header, path):
        found = _with_extension(found, kind, data, header, path)
    if header.crypt_method == CRYPT_LUKS and not found.has_crypto_header:
        raise damaged(path, "it is encrypted with LUKS, but does not say where its LUKS header is")
    return found


def _with_extension(found: Extensions, kind: int, data: bytes, header: Header, path: str) -> Extensions:
    """Return `found` with one more extension; those of an unknown kind say nothing."""
    if kind == _BACKING_FORMAT:
        if len(data) > _MAX_FORMAT_NAME:
            raise damaged(path, f"the name of its backing format is {len(data)} bytes long")
        return found._replace(backing_format=text_of(data))
    if kind == _DATA_FILE:
        return found._replace(data_file=text_of(data))
    if kind == EXT_BITMAPS:
        return found._replace(bitmaps=parse_bitmaps_extension(data, header, path))
    if kind == _CRYPTO_HEADER:
        _check_crypto_header(data, header, path)
        return found._replace(has_crypto_header=True)
    if kind == EXT_MARK:
        return found._replace(mark=mark_from(data), history=history_from(data) or History())
    return found


def _check_crypto_header(data: bytes, header: Header, path: str) -> None:
    """Refuse what QEMU too refuses about where the LUKS header is; what it says is not read."""
    if header.crypt_method != CRYPT_LUKS:
        raise damaged(path, "it says where its LUKS header is, but not that it is encrypted with LUKS")
    if len(data) != _CRYPTO.size:
        raise damaged(path, f"the header extension about its LUKS header is {len(data)} bytes long instead of 16")
    offset, _length = _CRYPTO.unpack(data)
    if offset % header.cluster_size:
        raise damaged(path, f"its LUKS header lies at offset {offset}, which is not the beginning of a cluster")


def check_backing_format(backing_format: str | None, path: str) -> None:
    """Refuse a recorded backing format of which no QEMU reads a file."""
    if backing_format is not None and backing_format not in BACKING_FORMATS:
        raise damaged(
            path,
            f"it records {backing_format!r} as the format of its backing file, which is no format of QEMU's",
            "Record the right one with 'qemu-img rebase -u -b … -F …'; the words are raw, qcow2, vpc, vmdk and so on.",
        )
