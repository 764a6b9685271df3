# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Read and write: the name of the backing file, in the header of an image.

`qemu-img rebase -u` opens the image for writing. Killed just then, it loses all bitmaps. Here only the name changes, in
place: the new one is written into bytes of the header cluster that nobody uses, and then 12 bytes in the first sector
tell where it is. A kill, or a power loss, leaves the old name or the new one. Bitmaps are not touched.
"""

from __future__ import annotations

import os

from .._base.errors import CHECK_STORAGE, Refusal
from .._base.files import OpenImage, close, write_all
from .chain import has_protocol
from .extensions import read_extensions
from .header import (
    BACKING_FILE,
    BACKING_FILE_AT,
    MAGIC,
    MAX_BACKING_FILE_NAME,
    V2_HEADER,
    Header,
    backing_file_of,
    end_of_extensions,
    read_as_qemu,
    read_header,
    text_of,
)

_HEAD = 1024  # bytes in which the name usually is
_LARGEST_HEADER = 1 << 21  # bytes; one cluster
# The name that is recorded already, since with another one the guest would read other data.
_REWRITE = (
    "With the VM shut off, have QEMU write the header anew, by 'qemu-img rebase -u' with the backing file and the "
    "format that it has now. If that is killed, the bitmaps can be lost."
)


def recorded_name(file: OpenImage) -> str | None:
    """Return the name of the backing file, whatever else may be wrong with the image; None if there is none."""
    head = file.read(_HEAD, 0)
    if len(head) < V2_HEADER.size or not head.startswith(MAGIC):
        return None
    start, length = BACKING_FILE.unpack_from(head, BACKING_FILE_AT)
    if not 0 < start <= _LARGEST_HEADER or not 0 < length <= MAX_BACKING_FILE_NAME:
        return None
    return text_of(head[start : start + length] if start + length <= len(head) else file.read(length, start))


def why_not_changeable(file: OpenImage, name: str, backing_format: str) -> Refusal | None:
    """Return why change_backing_file() would refuse; None if it would not."""
    try:
        _place_for(file, name, backing_format)
    except Refusal as exc:
        return exc
    return None


def change_backing_file(file: OpenImage, name: str, backing_format: str) -> None:
    """Have the image record another name of its backing file, of the format that it records already.

    The caller keeps everybody else from the image, which is open for reading; this opens it for writing once more.
    Refusal if that cannot be done in place. If the image records the name already, nothing is written.
    """
    place, data = _place_for(file, name, backing_format)
    if place is None:
        os.fsync(file.fd)  # a run may have been killed before it could see to that
        return
    fd = os.open(f"/proc/self/fd/{file.fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_all(fd, data, place)
        os.fsync(fd)  # or the power could go when the first sector is on the disk and the name is not
        pointer = BACKING_FILE.pack(place, len(data))
        if os.pwrite(fd, pointer, BACKING_FILE_AT) != len(pointer):
            raise Refusal("storage", file.path, "its header could be written only in part", CHECK_STORAGE)
        os.fsync(fd)
    finally:
        close(fd)
    if _place_for(file, name, backing_format)[0] is not None:
        why = f"was to have {name} as its backing file, but does not say so when it is read back"
        raise Refusal("not_verified", file.path, why, CHECK_STORAGE)


def _place_for(file: OpenImage, name: str, backing_format: str) -> tuple[int | None, bytes]:
    """Return where in the header cluster the name can be written, and its bytes; no place if it is recorded already."""
    data = _bytes_of(name)
    header = read_header(file)
    area = read_as_qemu(file, header.cluster_size, 0)
    recorded = backing_file_of(area, header, file.path)
    if recorded is None:
        raise Refusal("differs", file.path, "records no backing file, so no other can be put in its place")
    _check_format(area, header, backing_format, file.path)
    if recorded == name:
        return None, data
    end = end_of_extensions(area, header, file.path)
    if end is None:
        raise Refusal(
            "header_fixed",
            file.path,
            "the extensions in its header have no explicit end, so the name of its backing file cannot be changed in "
            "place",
            _REWRITE,
        )
    old_end = header.backing_offset + header.backing_length
    # A run that was killed can have left the name itself. QEMU clears all of this when it next writes the header.
    for wanted in (data, bytes(len(data))):
        for start, stop in ((end, header.backing_offset), (old_end, header.cluster_size)):
            place = area.find(wanted, start, stop)
            if place >= 0:
                return place, data
    raise Refusal(
        "header_fixed",
        file.path,
        f"the {header.cluster_size} bytes of its header have no room for {len(data)} more, the name {name} of another "
        "backing file",
        f"Give that file a shorter name. If the header is full of other data: {_REWRITE}",
    )


def _bytes_of(name: str) -> bytes:
    """Return the name as it is recorded; Refusal if none can be recorded so."""
    data = name.encode("utf-8", "surrogateescape")
    if len(data) > MAX_BACKING_FILE_NAME:
        why = f"is longer than the {MAX_BACKING_FILE_NAME} bytes that qcow2 records"
        raise Refusal("name_too_long", name, why, "Shorten it.")
    if not data or b"\0" in data or has_protocol(name):
        raise Refusal("bad_name", repr(name), "is no name of a file for QEMU", "Give its absolute path.")
    return data


def _check_format(area: bytes, header: Header, backing_format: str, path: str) -> None:
    """Refuse an image that records another format of its backing file."""
    found = read_extensions(area, header, path).backing_format
    if found != backing_format:
        raise Refusal(
            "header_fixed",
            path,
            f"records {found or 'no format'} as the format of its backing file, not {backing_format}, which cannot be "
            "changed in place",
            "If it is the right one, use backing files of that format only; else have QEMU record the right one by "
            "'qemu-img rebase -u -F' with the backing file that it has now, while the VM is shut off. If that is "
            "killed, the bitmaps can be lost.",
        )
