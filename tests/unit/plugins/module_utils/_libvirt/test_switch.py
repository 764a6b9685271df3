# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a real daemon cannot be brought to do; the rest is in the integration target domain_overlay and tests/prove."""

from __future__ import annotations

import libvirt
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._base.errors import UnknownOutcomeError
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.connection import Domain
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.definition import Definition
from ansible_collections.kvmfleet.qcow2.plugins.module_utils._libvirt.switch import wait_for_start

DOMAIN = Domain("web", "uuid", None, True, False, Definition("<domain/>"), None)


class Handle:
    """A domain of which these are the answers to whether it is active; the last one is given again and again."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def isActive(self):  # noqa: N802  libvirt's name
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_start_that_fails_is_waited_for():
    handle = Handle(1, 1, 0)
    wait_for_start(handle, DOMAIN, 60)
    assert handle.answers == [0]


@pytest.mark.parametrize(
    "answer, words",
    [(1, "runs on the old images; all images were kept"), (libvirt.libvirtError("gone"), "libvirt says: gone")],
)
def test_overlays_stay_when_a_domain_may_have_been_started_all_the_same(answer, words):
    with pytest.raises(UnknownOutcomeError, match=f"web: .*{words}"):
        wait_for_start(Handle(answer), DOMAIN, 0.05)
