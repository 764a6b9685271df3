# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""libvirt's Python bindings, which may be missing, and its errors."""

from __future__ import annotations

import traceback
import typing as t

__all__ = ["LIBVIRT_IMPORT_ERROR", "LibvirtError", "known", "libvirt", "words_of"]

try:
    import libvirt
except ImportError:
    libvirt = None
    LibvirtError: t.Any = Exception
    LIBVIRT_IMPORT_ERROR: str | None = traceback.format_exc()
else:
    LibvirtError = libvirt.libvirtError
    LIBVIRT_IMPORT_ERROR = None


def known(list_all: t.Callable[[int], list[t.Any]]) -> list[t.Any]:
    """Return what libvirt lists; nothing where the driver knows no such thing."""
    try:
        return list_all(0)
    except LibvirtError as exc:
        if exc.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return []
        raise


def words_of(exc: t.Any) -> str:
    """Return libvirt's own words."""
    return t.cast("str", exc.get_error_message() or str(exc)).rstrip(".")
