# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hold one byte of a file locked, as a run of the module does while it is at work: lock.py FILE BYTE, until killed."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys

OFD_SETLK = 37  # Linux, fcntl(2), "Open file description locks"

descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(descriptor, OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, int(sys.argv[2]), 1, 0))
print("locked", flush=True)
signal.pause()
