# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The one exception for failures that are expected."""

from __future__ import annotations


class Qcow2Error(Exception):
    """An expected failure. Its text names the file, the rule and the way out, and is shown to the user as it is."""
