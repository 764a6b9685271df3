# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# PRIVATE to this collection: may change at any time.
"""Options that modules which write share, and what they mean."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._base.attributes import AttributeOptions
from ._base.errors import Refusal
from ._disk.overlay import CUMULATIVE, EMPTY, Creation
from ._disk.session import Settings

BACKING_FORMATS = ["qcow2", "raw"]
MERGING = {"speed": 0, "accept_lost_bitmaps": False, "parallel": 1}  # options of a commit, and their defaults
_LONGEST_TIMEOUT = 86400  # seconds
_MOST_PARALLEL = 64
_LARGEST_ID = (1 << 32) - 2  # the number above means "leave it" to chown


def creation_spec(*, defaults: bool) -> dict[str, t.Any]:
    """Return the argument spec of the creation options: for a task with defaults, for an item of a list without."""
    spec: dict[str, dict[str, t.Any]] = {
        "bitmap_content": {"type": "str", "choices": [CUMULATIVE, EMPTY], "default": CUMULATIVE},
        "relative": {"type": "bool", "default": False},
        "cluster_size": {"type": "bytes", "default": "64K"},
        "extended_l2": {"type": "bool", "default": False},
        "lazy_refcounts": {"type": "bool", "default": False},
        "refcount_bits": {"type": "int", "default": 16},
        "compression_type": {"type": "str", "choices": ["zlib", "zstd"], "default": "zlib"},
    }
    if defaults:
        return spec
    return {name: {key: option[key] for key in option if key != "default"} for name, option in spec.items()}


def ownership_spec() -> dict[str, t.Any]:
    """Return the argument spec of the file options."""
    strings = ("owner", "group", "seuser", "serole", "setype", "selevel")
    return {**{name: {"type": "str"} for name in strings}, "mode": {"type": "raw"}}


def creation_from(params: dict[str, t.Any]) -> Creation:
    """Return the creation options of one overlay."""
    return Creation(**{name: params[name] for name in Creation._fields})


def merging_spec() -> dict[str, t.Any]:
    """Return the argument spec of the options of a commit that hold for the whole call."""
    return {
        "speed": {"type": "bytes", "default": MERGING["speed"]},
        "accept_lost_bitmaps": {"type": "bool", "default": MERGING["accept_lost_bitmaps"]},
        "parallel": {"type": "int", "default": MERGING["parallel"]},
    }


def refuse_given(params: dict[str, t.Any], options: t.Iterable[str], where: str) -> None:
    """Refuse options that have no meaning `where` they are given, if they have another value than their default."""
    of_domains = {"libvirt_snapshots": "fail", "unfit_disks": "fail", "confirm_all": False, "quiesce": False}
    defaults = {**Creation()._asdict(), "bitmap_content": CUMULATIVE, "relative": False, **MERGING, **of_domains}
    for name in options:
        if params[name] != defaults.get(name):
            raise Refusal("bad_option", f"{name}={params[name]}", f"has no meaning with {where}", "Leave it out.")


def settings_from(module: AnsibleModule) -> Settings:
    """Return what holds for everything in the call; Refusal for a value that cannot be."""
    if not 1 <= module.params["timeout"] <= _LONGEST_TIMEOUT:
        why = f"must be from 1 to {_LONGEST_TIMEOUT} seconds"
        raise Refusal("bad_option", f"timeout={module.params['timeout']}", why)
    parallel = module.params.get("parallel", 1)
    if not 1 <= parallel <= _MOST_PARALLEL:
        raise Refusal("bad_option", f"parallel={parallel}", f"must be from 1 to {_MOST_PARALLEL}")
    return Settings(
        check_mode=module.check_mode,
        seconds=float(module.params["timeout"]),
        find_program=module.get_bin_path,
        parallel=parallel,
    )


def attributes_from(params: dict[str, t.Any]) -> AttributeOptions:
    """Return who may use new files; Refusal for a value that cannot be."""
    return AttributeOptions(
        uid=_number("owner", params["owner"], lambda name: pwd.getpwnam(name).pw_uid),
        gid=_number("group", params["group"], lambda name: grp.getgrnam(name).gr_gid),
        mode=_mode(params["mode"]),
        context=(params["seuser"], params["serole"], params["setype"], params["selevel"]),
    )


def _number(option: str, name: str | None, look_up: t.Callable[[str], int]) -> int | None:
    """Return the number of a user or group that `name` is the name or the number of."""
    if name is None:
        return None
    try:
        number = int(name) if name.isascii() and name.isdigit() else look_up(name)
    except (KeyError, ValueError) as exc:
        why = f"this host knows no such {option}"
        raise Refusal("bad_option", f"{option}={name}", why, "Give another, or its number.") from exc
    if number > _LARGEST_ID:
        raise Refusal("bad_option", f"{option}={name}", f"is too large a number; at most {_LARGEST_ID} is possible")
    return number


def _mode(wanted: t.Any) -> t.Callable[[int], int] | None:
    """Return how the wanted mode comes from another image's: an octal number, its text, or a symbolic mode."""
    if wanted is None:
        return None

    def resulting(current: int) -> int:
        if isinstance(wanted, int):
            return wanted
        if all(character in "01234567" for character in wanted):
            return int(wanted, 8)
        status = os.stat_result((stat.S_IFREG | current, *[0] * 9))
        return int(AnsibleModule._symbolic_mode_to_octal(status, wanted))

    try:
        if 0 <= resulting(0o600) <= 0o7777:
            return resulting
    except Exception as exc:  # what the private parser of Ansible raises is not said anywhere
        raise _no_mode(wanted) from exc
    raise _no_mode(wanted)


def _no_mode(wanted: t.Any) -> Refusal:
    """Return the refusal of a mode that is none."""
    why = "is neither an octal number up to 7777 nor a symbolic mode such as u=rw,g=r"
    return Refusal("bad_option", f"mode={wanted}", why)
