# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the options mean, and which values are refused."""

from __future__ import annotations

import os
import pwd
import types

import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import Refusal
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._options import (
    attributes_from,
    creation_spec,
    ownership_spec,
    refuse_given,
    settings_from,
)


def attributes(**params):
    """Return who may use new files, for a task with these options; its timeout is looked at too."""
    names = ("owner", "group", "mode", "seuser", "serole", "setype", "selevel")
    options = {**dict.fromkeys(names), "timeout": 60, **params}
    settings_from(types.SimpleNamespace(params=options, check_mode=False, get_bin_path=None))
    return attributes_from(options)


@pytest.mark.parametrize(
    "mode, current, expected",
    [
        ("0640", 0o600, 0o640),
        ("640", 0o600, 0o640),
        (0o640, 0o600, 0o640),
        ("u=rw,g=r,o=", 0o777, 0o640),
        ("g+w", 0o644, 0o664),
        (None, 0o600, None),
    ],
)
def test_modes(mode, current, expected):
    change = attributes(mode=mode).mode
    assert (change and change(current)) == expected


def test_owners_by_name_and_number():
    name = pwd.getpwuid(os.getuid()).pw_name
    assert attributes(owner=name).uid == os.getuid()
    assert attributes(owner="4242", group="0")[:2] == (4242, 0)


@pytest.mark.parametrize(
    "params, expected",
    [
        ({"mode": "rw"}, "mode=rw: is neither"),
        ({"mode": "99"}, "mode=99: is neither"),
        ({"mode": 0o10000}, "up to 7777"),
        ({"mode": -1}, "up to 7777"),
        ({"mode": "07777777777777"}, "up to 7777"),
        ({"mode": []}, "up to 7777"),
        ({"owner": "no such user"}, "knows no such owner"),
        ({"group": "²"}, "knows no such group"),
        ({"owner": "4294967295"}, "too large a number"),
        ({"owner": "99999999999999999999"}, "too large a number"),
        ({"timeout": 0}, "must be from 1 to 86400"),
        ({"timeout": -5}, "must be from 1 to 86400"),
        ({"timeout": 10**12}, "must be from 1 to 86400"),
    ],
)
def test_values_that_cannot_be(params, expected):
    with pytest.raises(Refusal, match=expected):
        attributes(**params)


def test_options_without_a_meaning_are_refused_unless_they_have_their_defaults():
    names = (*creation_spec(defaults=True), *ownership_spec(), "retire")
    defaults = {name: option.get("default") for name, option in creation_spec(defaults=True).items()}
    params = {**dict.fromkeys(names), **defaults, "cluster_size": 65536}
    refuse_given(params, names, "state=x")
    others = {"relative": True, "cluster_size": 4096, "mode": "0600", "retire": "keep", "bitmap_content": "empty"}
    for name, value in others.items():
        with pytest.raises(Refusal) as raised:
            refuse_given({**params, name: value}, names, "state=x")
        assert (raised.value.code, raised.value.subject) == ("bad_option", f"{name}={value}")
        refuse_given({**params, name: value}, set(names) - {name}, "state=x")
