# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Hostile images, folders and names: mutants of images, races for the files of a run, odd names, and bait.

Run as root, with the Python of an environment that has ansible-core: python tests/prove/hostile.py. Needs QEMU, gcc and
strace. For a night: --rounds 50000, with a new --seed each time.

A mutant is made out of an image that QEMU has made; qcow2_overlay and qcow2_info are run on it, and what they say is
compared with what qemu-img says of it. After each run ACTIVE is what it was, to the byte; the overlay is complete and
carries what qemu-img sees in ACTIVE, or is absent; there is a result, and a message that names the file if it failed;
nothing is left. Of what lies outside the folder of the overlays, nothing is made, changed, or opened if it is bait.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile

import bait
import folders
import images
import lab
import names
import overlays
import rounds
import tampered


def jobs_for(crew: rounds.Crew[lab.Lab], asked: rounds.Choice) -> list[rounds.Job[lab.Lab]]:
    """Return all rounds."""
    ground = crew.labs[0]
    jobs = [*images.bomb_jobs(), *names.name_jobs(), *folders.folder_jobs(ground, asked), *bait.bait_jobs(asked)]
    jobs += tampered.planted_jobs(ground, asked)
    if asked.only is None or asked.only.startswith(("*", "mutant", "reader")):  # the corpus takes seconds
        corpus = ground.papers / "corpus"
        corpus.mkdir()
        jobs += images.mutant_jobs(corpus, asked)
    return jobs


if __name__ == "__main__":
    # Thousands of images are written, none of which has to outlive a power cut.
    if os.access("/dev/shm", os.W_OK) and "TMPDIR" not in os.environ:
        tempfile.tempdir = "/dev/shm"
    sys.exit(rounds.prove(str(__doc__), 100, jobs_for, functools.partial(lab.Lab, make_promise=overlays.Made)))
