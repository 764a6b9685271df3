# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Break each rule of merging, healing and going back in a copy of the code, and see that a test tells.

Run with the Python of an environment that has ansible-core, pytest and libvirt-python: python tests/prove/rules.py.
Needs QEMU. Prints a line for each rule: the test that told, or NOTHING, which makes the program fail.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import typing as t

COLLECTION = pathlib.Path(__file__).resolve().parents[2]
NAMESPACE = pathlib.Path("ansible_collections/kvmfleet/qcow2")
CODE, TESTS = "plugins/module_utils", "tests/unit/plugins/module_utils"
SECONDS = 300  # for the tests of one rule
COMMIT, ODD, KILLS, HEAL, KILLED = "test_commit", "test_merge_odd", "test_merge_kills", "test_heal", "test_mend_killed"


class Rule(t.NamedTuple):
    """A rule, the line that it is in, what takes its place, and the tests that may tell, the fastest first."""

    what: str
    file: str
    line: str
    broken: str
    tests: tuple[str, ...]
    room: str = "_disk"


RULES = (
    Rule(
        "a mark is of the vault's own commit",
        "stages",
        "if mark.name != MARK + vault.token:",
        "if False:",
        (COMMIT, ODD, KILLS),
    ),
    Rule("a mark can be a copy", "stages", "if copied is not None:", "if False:", (COMMIT, ODD)),
    Rule(
        "TOP that was written to since is not done",
        "stages",
        "and _is_sound(seen) and seen.mark_is_empty)",
        "and _is_sound(seen))",
        (COMMIT, ODD, KILLS),
    ),
    Rule(
        "what is given is never committed again",
        "stages",
        "return Stage(GIVEN)",
        "return Stage(CARRIED)",
        (COMMIT, ODD, KILLS),
    ),
    Rule(
        "BASE is as the vault says",
        "stages",
        "if seen.base_is_as_kept or (is_same and",
        "if True or (is_same and",
        (COMMIT, ODD, KILLS),
    ),
    Rule(
        "an image that is only kept goes in no more",
        "stages",
        "if is_kept(seen.chain[0].real_path):",
        "if False:",
        (COMMIT, ODD),
    ),
    Rule(
        "without a vault, a BASE that is newer may have all",
        "stages",
        "if is_base_newer and (has_own or not carries):",
        "if False:",
        (COMMIT, ODD, KILLS),
    ),
    Rule("a BASE that ran excludes TOP", "stages", "if _has_base_run(seen, vault):", "if False:", (COMMIT, ODD, KILLS)),
    Rule(
        "broken bitmaps of TOP are made again",
        "stages",
        "if not _is_sound(seen):\n        return Stage(REBUILT)",
        "if False:\n        return Stage(REBUILT)",
        (COMMIT, KILLS),
    ),
    Rule(
        "TOP carries before BASE is stripped",
        "merge",
        "(self.keep, self.carry, self.strip, self.move, self.give)",
        "(self.keep, self.strip, self.carry, self.move, self.give)",
        (KILLS,),
    ),
    Rule(
        "a vault is kept first",
        "merge",
        "(self.keep, self.carry, self.strip, self.move, self.give)",
        "(self.carry, self.keep, self.strip, self.move, self.give)",
        (COMMIT, KILLS),
    ),
    Rule(
        "between two steps BASE is as it was",
        "stages",
        "if seen.base_is_as_kept or seen.top_has_all else",
        "if True else",
        (COMMIT,),
    ),
    Rule(
        "a commit into an image between is completed first",
        "unfinished",
        "is_other = begun.is_in_the_way or (isinstance(vault, Vault) and top_stands(vault, layer.identity))",
        "is_other = False",
        (COMMIT, ODD),
    ),
    Rule(
        "no other commit comes between a killed one and its end",
        "unfinished",
        "return not is_own and not vault.is_given and top_stands(vault, chain[depth].identity)",
        "return False",
        (COMMIT, ODD),
    ),
    Rule(
        "the vault of a commit that is done tells nothing of the next one",
        "merge",
        "if stage.stale_vault:  # it tells nothing of this commit",
        "if False:",
        (COMMIT, ODD),
    ),
    Rule(
        "where no generation tells, the time tells what has gone in",
        "vault",
        "return not is_newer and self.is_between(",
        "return self.is_between(",
        (ODD,),
    ),
    Rule(
        "what is below BASE can be read to its end",
        "merge",
        "chain[-1].why_no_bottom(),",
        "None,",
        (COMMIT,),
    ),
    Rule(
        "what TOP's bitmaps marked is in the vault",
        "survey",
        "own.append(seen.vault.above[name].bits)",
        "pass",
        (COMMIT,),
    ),
    Rule(
        "a VM whose turn comes is what was planned",
        "session",
        "self._vm.confirm()  # its turn",
        "pass  # its turn",
        ("test_session",),
    ),
    Rule(
        "the bits are read back",
        "carry",
        "                wrong = wrong_bitmaps(place, expected)\n",
        "                wrong = list[str]()\n",
        ("test_carry",),
    ),
    Rule(
        "an image whose directory QEMU has left broken is opened without it",
        "carry",
        "            disown_bitmaps(file)\n",
        "",
        (KILLS,),
    ),
    Rule(
        "QEMU has ended before its broken directory is set aside",
        "carry",
        "                held.stop_qemu()\n",
        "",
        (KILLS,),
    ),
    Rule(
        "no backup uses what was read back with other bits",
        "carry",
        "            _disown_wrong(place, expected)\n",
        "",
        ("test_carry",),
    ),
    Rule(
        "above an image that has not recorded all is taken that is held",
        "fates",
        "if not _records(name, chain[place])), -1)",
        "if False), -1)",
        ("test_fates",),
    ),
    Rule(
        "no gap is closed by BASE",
        "fates",
        "if any(name in image for image in chain[depth + 1 :]):",
        "if False:",
        ("test_fates",),
    ),
    Rule("no gap is closed by the image above", "fates", "if then and not now:", "if False:", ("test_fates", ODD)),
    Rule(
        "TOP is not smaller than BASE",
        "commit",
        "if upper.virtual_size < lower.virtual_size",
        "if False",
        (COMMIT, ODD, "test_merge"),
    ),
    Rule(
        "another image with the number of TOP is another one",
        "vault",
        " and (None in (known, generation) or known == generation)",
        "",
        (KILLED,),
    ),
    Rule(
        "a vault of another user is not trusted",
        "vault",
        "if is_ours(status):",
        "if True:",
        ("test_unfinished", COMMIT, ODD),
    ),
    Rule(
        "a vault that was written to is none",
        "vault",
        "if image.lost_bitmaps or any(bitmap.inconsistent for bitmap in image.bitmaps):",
        "if False:",
        (KILLED,),
    ),
    Rule(
        "no image beside what goes in gets other data",
        "commit",
        "problems += _beside(seen, stage)",
        "problems += []",
        (COMMIT,),
    ),
    Rule(
        "the image above marks all that is in danger below it",
        "carry",
        "        lend(above, lent)",
        "        pass",
        (KILLS,),
    ),
    Rule(
        "what was lent stays where TOP was written to",
        "carry",
        "if own.is_device or own.written() != times[1]:",
        "if False:",
        (KILLS,),
    ),
    Rule(
        "QEMU has ended before what was lent is taken back",
        "carry",
        "held.stop_qemu()  # it may be about to open the image",
        "pass",
        (KILLS,),
    ),
    Rule(
        "what was lent is taken back",
        "carry",
        "        take_back(above, lent)",
        "        pass",
        (KILLS,),
    ),
    Rule(
        "all is marked where a bitmap has no data",
        "lend",
        "yield Lent(place, _ENTRY.pack(entry), _ENTRY.pack(ENTRY_ALL_ONES))",
        "pass",
        ("test_lend",),
        "_qcow2",
    ),
    Rule(
        "bits that are lent are added to those that are there",
        "lend",
        "after = (before | added).to_bytes",
        "after = added.to_bytes",
        ("test_lend",),
        "_qcow2",
    ),
    Rule(
        "what was lent is read back",
        "lend",
        "if any(file.read(len(data), place) != data for place, data in pieces):",
        "if False:",
        ("test_lend",),
        "_qcow2",
    ),
    Rule(
        "the topmost image takes in what is below",
        "heal",
        "lower = [place for place in self._written if place > 0]",
        "lower: list[int] = []",
        (HEAL, KILLED),
    ),
    Rule("no image is written whose loss would look valid", "heal", "if wrong:", "if False:", (HEAL,)),
    Rule(
        "above the first bad image all are rebuilt",
        "heal",
        "rebuilt = range(max(bad, default=0) + 1)",
        "rebuilt = bad",
        (HEAL,),
    ),
    Rule(
        "a template is not written to",
        "heal",
        "barred[place] = _has_overlay(",
        "_unused = _has_overlay(",
        (HEAL, "test_mend"),
    ),
    Rule(
        "what a VM wrote since a kill is taken in",
        "heal",
        "held=name in image.put_back)",
        "held=False)",
        (HEAL, KILLED),
    ),
    Rule(
        "what is broken at the bottom stays so",
        "bitmap_rules",
        "if lowest.bitmaps[name].inconsistent and places[-1] > 0:",
        "if False:",
        ("test_bitmap_rules", HEAL),
    ),
    Rule(
        "what is disabled stays so",
        "bitmap_rules",
        "if not layer.bitmaps[name].recording and not layer.bitmaps[name].inconsistent:",
        "if False:",
        ("test_bitmap_rules", HEAL),
    ),
    Rule(
        "vaults are kept before anything is written",
        "mend",
        "return [self.check_owner, self.keep, self.write]",
        "return [self.check_owner, self.write]",
        (KILLED,),
    ),
    Rule(
        "an image that has nothing to keep has a vault, too",
        "mend",
        "if path is None:",
        "if path is None or not below:",
        (KILLED,),
    ),
    Rule(
        "what a kill has lost is not held against what is above for ever",
        "heal",
        "return bool(self.put_back or self.forgotten) or self.lost_by_kill",
        "return bool(self.put_back or self.forgotten)",
        (KILLED,),
    ),
    Rule(
        "what was lost long after a vault was kept is not told by it",
        "diagnose",
        "st_mtime_ns - vault.given_at < _RUN_NS",
        "st_mtime_ns > 0",
        (KILLED,),
    ),
    Rule("the number of a device tells nothing", "unfinished", "return is_named and any(", "return any(", (KILLED,)),
    Rule(
        "no vault is kept that no later run would trust",
        "mend",
        "return [self.check_owner, self.keep, self.write]",
        "return [self.keep, self.write]",
        ("test_mend",),
    ),
    Rule(
        "a name that only the user's word makes valid is kept",
        "mend",
        "below += _rebuilt_by_word(place, work)",
        "",
        (KILLED,),
    ),
    Rule(
        "what was removed since is not put back",
        "diagnose",
        "if image.bitmaps and not image.lost_bitmaps and not any(bitmap.inconsistent for bitmap in image.bitmaps):",
        "if False:",
        (KILLED,),
    ),
    Rule(
        "what is counted on is lost, not removed", "diagnose", "return lost & missed", "return frozenset()", (KILLED,)
    ),
    Rule(
        "what libvirt has forgotten since a kill does not come back",
        "diagnose",
        "unknown = (standing.put_back & vault.known) - request.referred - request.missed",
        "unknown = frozenset()",
        (KILLED, "../_domain/test_healing_run"),
    ),
    Rule(
        "what libvirt never knew it has not forgotten",
        "diagnose",
        "(standing.put_back & vault.known) - request.referred",
        "standing.put_back - request.referred",
        (KILLED,),
    ),
    Rule(
        "what another disk needs is not forgotten",
        "diagnose",
        " - request.referred - request.missed",
        " - request.missed",
        (KILLED,),
    ),
    Rule(
        "a domain that was defined anew tells of nothing that it is removed",
        "diagnose",
        "if vault is None or not request.referred:",
        "if vault is None:",
        (KILLED,),
    ),
    Rule(
        "what another image has was not removed",
        "diagnose",
        "if not any(_may_have(one, name) for one in chain)",
        "",
        (KILLED,),
    ),
    Rule(
        "what another program has lost was not removed",
        "diagnose",
        "return is_lost or (patient.layer.image is not None",
        "return (patient.layer.image is not None",
        (KILLED,),
    ),
    Rule(
        "what libvirt knew at the first of several kills counts",
        "mend",
        "return then | dict(request.created).keys()",
        "return frozenset(dict(request.created))",
        (KILLED,),
    ),
    Rule(
        "the vault of an image that others stand on stays",
        "mend",
        "for place in sorted({*work.changed, *losing}):",
        "for place in work.changed:",
        (KILLED,),
    ),
    Rule("what is forgotten is told", "mend", "yield from _forgotten(one, request)", "pass", (KILLED,)),
    Rule(
        "a domain says which bitmaps its checkpoints need",
        "healing",
        "referred=self._referred(),",
        "",
        ("test_healing_run",),
        "_domain",
    ),
    Rule(
        "no checkpoint is told as valid by a chain that the VM does not use",
        "healing_run",
        "_untold(one, of_chains) for one in",
        "one for one in",
        ("test_healing_run",),
        "_domain",
    ),
    Rule(
        "nothing is removed while a merge is unfinished",
        "healing_live",
        "too_old or why_unfinished(look, one) or why_left_below(",
        "too_old or why_left_below(",
        ("test_healing_live",),
        "_domain",
    ),
    Rule(
        "what is left over of a merge keeps nothing from being removed",
        "healing_live",
        "if one.kind == COMMIT and one.is_in_the_way)",
        "if one.kind == COMMIT)",
        ("test_healing_live",),
        "_domain",
    ),
    Rule(
        "the vault of an image that is gone is told",
        "diagnose",
        "if _stood_on(path, ours):",
        "if False:",
        (KILLED,),
    ),
    Rule(
        "a vault is told only where its image is gone",
        "diagnose",
        "vault.backing_file and not is_there(vault.top_path)",
        "vault.backing_file",
        (KILLED,),
    ),
    Rule(
        "a vault of another disk is not told",
        "diagnose",
        "return os.path.realpath(resolve_name(vault.top_path, vault.backing_file)) in ours",
        "return True",
        (KILLED,),
    ),
    Rule(
        "the vault of an image that is gone is told where nothing is done, too",
        "healing_run",
        "warnings=plan.warnings,",
        "",
        ("test_healing_run",),
        "_domain",
    ),
    Rule(
        "what libvirt knew it tells of itself",
        "mend",
        "told = {*request.removed, *(patient.vault.known if request.domain is not None else ())}",
        "told = {*request.removed}",
        (KILLED,),
    ),
    Rule(
        "what another tool had is not lost without a word",
        "mend",
        "if patient.vault is None or request.state == heal.ABSENT:",
        "if patient.vault is None or request.state == heal.ABSENT or request.domain:",
        (KILLED,),
    ),
    Rule(
        "nothing is put back once all was done",
        "diagnose",
        "if vault.is_given:",
        "if False:",
        (KILLED, "test_unfinished"),
    ),
    Rule(
        "a healing of any image of a chain keeps merging off",
        "unfinished",
        "healing = why_in_the_way(whole, (), (HEALING,))",
        "healing = None",
        ("test_unfinished",),
    ),
    Rule(
        "a healing of any image of a chain keeps going back off",
        "revert",
        "healing = why_in_the_way(layers, (), (HEALING,))",
        "healing = None",
        ("test_unfinished",),
    ),
    Rule("all is said to be done before anybody can remove a bitmap", "mend", "mark_given(place)", "pass", (KILLED,)),
    Rule(
        "an image that was emptied since tells less",
        "diagnose",
        "return patients if is_trusted else",
        "return patients if True else",
        (KILLED,),
    ),
    Rule(
        "the vault of another file stays",
        "diagnose",
        "if vault is not None and not vault.is_given and not is_healing_of(",
        "if False and not is_healing_of(",
        ("test_unfinished",),
    ),
    Rule(
        "what goes is the file that was looked at",
        "retire",
        "if not _is_there(file, name, folder_fd):",
        "if False:",
        ("test_retire", "test_revert"),
    ),
    Rule(
        "no sign stays of a run that came second",
        "retire",
        "remove_signs(file, real)  # one that another run",
        "pass  # one that another run",
        ("test_retire",),
    ),
    Rule(
        "an image that is gone gets no sign",
        "begun",
        "if _remove_if_lost(file, place):\n        why",
        "if False:\n        why",
        ("test_running",),
    ),
    Rule(
        "nothing is believed in a folder of others",
        "progress",
        "return os.listdir(FOLDER) if is_private(FOLDER) else []",
        "return os.listdir(FOLDER)",
        ("test_progress",),
    ),
    Rule(
        "what stands in the place of the next text is not written to",
        "progress",
        "_remove(new)",
        "pass",
        ("test_progress",),
    ),
    Rule(
        "the way down stays while TOP is there",
        "revert",
        "_retire(one.path, held.image(one.path), KEEP if is_renamed else how))",
        "_retire(one.path, held.image(one.path), how))",
        ("test_revert",),
    ),
    Rule(
        "an image whose merge was begun is not given up",
        "revert",
        "begun=tuple(filter(None, (find_sign(held.image(place)) for place, _layer in going))),",
        "begun=(),",
        ("test_revert", "test_running"),
    ),
    Rule(
        "an image with an unfinished commit is not given up",
        "revert",
        "commit=why_in_the_way(layers, (), (COMMIT,)),",
        "commit=None,",
        ("test_revert",),
    ),
    Rule(
        "no image is merged into, or put in the place of, what is older than what it was made on",
        "wayback",
        "is_older = 0 < written <= recorded - lost",
        "is_older = False",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "no VM is put on an image that holds data of what goes",
        "revert_rules",
        "if one is None:",
        "if True:",
        ("test_revert",),
    ),
    Rule(
        "data of each image that goes is looked for",
        "revert",
        "for goes in seen.going], (path",
        "for goes in seen.going[-1:]], (path",
        ("test_revert",),
    ),
    Rule(
        "a merge soon after a snapshot does not hide what others have merged till then",
        "survey",
        "return any(one.is_merged() for one in found)",
        "return False",
        ("../_domain/test_wayback",),
    ),
    Rule(
        "data is looked for in each image that stays",
        "revert",
        "for depth, one in enumerate(seen.staying):",
        "for depth, one in enumerate(seen.staying[:1]):",
        ("test_revert",),
    ),
    Rule(
        "a merge that was given up early is seen",
        "common_data",
        "_IF_GIVEN_UP = 8",
        "_IF_GIVEN_UP = 2",
        ("test_revert",),
    ),
    Rule(
        "an image of other tools does not hide what went in below it",
        "revert_rules",
        "if own.made or own.base_written:",
        "if True:",
        ("test_revert",),
    ),
    Rule(
        "a merge that was given up at its very start is seen",
        "common_data",
        "return is_begun or ",
        "return ",
        ("test_revert",),
    ),
    Rule(
        "what is the same after the first that differs is no beginning of a merge",
        "common_data",
        "if same == compared:",
        "if same:",
        ("test_revert",),
    ),
    Rule(
        "a VM that is below already may do again what comes first",
        "common_data",
        "self.first.begins_alike and not is_left",
        "self.first.begins_alike",
        ("test_revert",),
    ),
    Rule(
        "data tells of a merge where times do not",
        "common_data",
        "return recorded != 0\n",
        "return False\n",
        ("test_revert",),
    ),
    Rule(
        "what a killed run has left may have been merged since",
        "revert",
        "if verdict.changed and request.puts_on_base:",
        "if verdict.changed and request.puts_on_base and not request.is_left:",
        ("test_revert",),
    ),
    Rule(
        "a bitmap of the vault that counts as removed is told",
        "mend",
        "warnings=(*_not_put_back(request, work), *",
        "warnings=(*(), *",
        ("test_mend_killed",),
    ),
    Rule(
        "times count as long as a commit has not written to BASE",
        "stages",
        "is_before_base=not is_marked",
        "is_before_base=False",
        (KILLS,),
    ),
    Rule(
        "bitmaps are made again only from all that was held",
        "stages",
        "if is_rebuilt and not seen.holds_what_it_held",
        "if False",
        (KILLS,),
    ),
    Rule(
        "a copy of an overlay of version 2 is not merged again",
        "stages",
        "if seen.top.version == 2 and not seen.is_top_of_vault and _may_be_copy(seen, vault):",
        "if False:",
        (KILLS,),
    ),
    Rule(
        "a folder that was put back in the middle tells by its age",
        "commit",
        "if stage.name == WHOLE else _put_back(seen, stage, outcome, created)",
        "if stage.name == WHOLE else []",
        ("test_commit",),
    ),
    Rule(
        "BASE is as recorded only if nobody has written to it",
        "stages",
        "changed = [self.top_changed, *(self.below_changed.get(layer.path) for layer in self.part[1:])]",
        "changed = [self.top_changed]",
        ("test_merge_odd",),
    ),
    Rule(
        "an inode tells nothing on another file system",
        "wayback",
        "base.identity == _made_on(part[-2])",
        "base.identity[-1] == _made_on(part[-2])[-1]",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "what a killed run has left is found below a newer snapshot",
        "wayback",
        "for base in facts.own:",
        "for base in facts.own[:1]:",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "no VM is put on an image that an emptied one went into",
        "revert_rules",
        "if not _was_emptied(seen, lowest):",
        "if True:",
        ("test_revert",),
    ),
    Rule(
        "the overlay of an idle disk is not one that was emptied",
        "revert_rules",
        " and not was_never_written",
        "",
        ("test_revert",),
    ),
    Rule(
        "a VM that is switched while it runs writes below until then",
        "mark",
        "max(self.base_written, self.made) + _UNTIL_SWITCHED",
        "self.base_written + _UNTIL_SWITCHED",
        ("../_disk/test_revert",),
        "_qcow2",
    ),
    Rule(
        "a guest does not hide a merge by what it writes at the start",
        "common_data",
        " or self.spread.exceeds(parts)",
        "",
        ("test_revert",),
    ),
    Rule(
        "what is written to a data file is written to BASE",
        "common_data",
        "self.data_written > recorded)",
        "False)",
        ("test_revert",),
    ),
    Rule(
        "what was emptied can have tables",
        "revert",
        "Lowest(holds_any(file)",
        "Lowest(has_allocated_extents(file)",
        ("test_revert",),
    ),
    Rule(
        "the data of BASE can lie in an external data file",
        "common_data",
        "PlainData(held.image(place), _data_file(layer, held))",
        "PlainData(held.image(place))",
        ("test_revert",),
    ),
    Rule(
        "to record that an image is to go does not make it one that its guest wrote to",
        "revert",
        "file.put_time_back(written)",
        "pass",
        ("test_revert",),
    ),
    Rule(
        "of a cluster only those subclusters are data that it holds",
        "plain",
        "return bits & ~(bits >> SUBCLUSTERS) & _ALL",
        "return _ALL",
        ("test_plain",),
        "_qcow2",
    ),
    Rule(
        "a merge records in the image above what is below then",
        "merge",
        "write_base(above, base)",
        "pass",
        ("../_domain/test_wayback",),
    ),
    Rule(
        "a vault is not stale for a copy of its image that has lost bitmaps",
        "stages",
        "(is_same or _may_be_copy(seen, seen.vault))",
        "is_same",
        (KILLS,),
    ),
    Rule(
        "what no name in a copy tells is not made again",
        "stages",
        "or is_marked or not unknown:",
        "or True:",
        (KILLS,),
    ),
    Rule(
        "another overlay of the same name is known by when it was made",
        "stages",
        "return not is_other and name in",
        "return name in",
        (KILLS,),
    ),
    Rule(
        "a vault becomes that of the copy with which it goes on",
        "merge",
        "elif work.stage.name == stages.REBUILT and not work.seen.is_top_of_vault:",
        "elif False:",
        (KILLS,),
    ),
    Rule(
        "a copy that is older than BASE may have gone in",
        "commit",
        "(stage.name == WHOLE or stage.is_before_base)",
        "stage.name == WHOLE",
        (KILLS,),
    ),
    Rule(
        "a merge does not hide that another one has changed what goes in",
        "stages",
        "<= settled",
        "<= settled + (1 << 99)",
        ("../_domain/test_wayback",),
    ),
    Rule(
        "a checkpoint that was made on what goes is lost",
        "wayback",
        "return 0 < made < created",
        "return False",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "a checkpoint that was made below what a killed run has left is not lost",
        "wayback",
        " and not 0 < left_at < created",
        "",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "the topmost image tells when it was left",
        "wayback",
        "left_at=_changed_at(left.paths[0]),",
        "left_at=_changed_at(left.paths[-1]),",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "after a crash a checkpoint can be younger than the last write to the image that it was made on",
        "wayback",
        "max(status.st_mtime_ns, status.st_ctime_ns)",
        "status.st_mtime_ns",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "what another host has is not what a killed run has left",
        "wayback",
        "return is_of_disk and is_leaving(head)",
        "return is_of_disk",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "an image says that it is to go before its VM is switched",
        "revert",
        "write_leaving(file, leaving=True)",
        "pass",
        ("test_revert",),
    ),
    Rule(
        "no VM is put on an image that others stand on",
        "revert",
        "others=() if depth is None else tuple(_others_on(layers[depth], request, layers)),",
        "others=(),",
        ("test_revert",),
    ),
    Rule(
        "an image that was copied with its sign has it",
        "begun",
        "return copied[0] if copied and _bears_mark(file) else None",
        "return None",
        ("test_running",),
    ),
    Rule(
        "what QEMU is led to by a description stands on it, too",
        "siblings",
        "for one in files_named(name)]",
        "for one in [name]]",
        ("test_siblings",),
    ),
    Rule(
        "a disk that is not there may be on the snapshot, too",
        "wayback",
        "problems += [_absent_disk(domain, target) for target in absent]",
        "pass",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "the way down goes through what a killed run has renamed",
        "wayback",
        "for below in [one.backing_identity] if one.backing_identity else _kept_below(one):",
        "for below in [one.backing_identity]:",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "what is below a fault of a chain is in use",
        "inventory",
        "to_read, read = list(chain.further), set[str]()",
        "to_read, read = list[str](), set[str]()",
        ("test_inventory",),
        "_domain",
    ),
    Rule(
        "what cannot be read may stand on anything",
        "inventory",
        "is_seen &= below.is_seen",
        "pass",
        ("test_inventory",),
        "_domain",
    ),
    Rule(
        "what an image below has lost is valid nowhere",
        "bitmap_rules",
        "if lost is not None:  # rule 6",
        "if False:  # rule 6",
        ("test_bitmap_rules",),
    ),
    Rule(
        "a bitmap that is older than its overlay goes on with one below",
        "bitmap_rules",
        "        if below:",
        "        if False:",
        ("test_bitmap_rules",),
    ),
    Rule(
        "what is in use is not stored",
        "running",
        "in_order = {bitmap.name for bitmap in settled.image.bitmaps if carries_over(bitmap)}",
        "in_order = {bitmap.name for bitmap in settled.image.bitmaps}",
        ("test_running",),
    ),
    Rule(
        "what is not stored is told until it is",
        "running",
        "return verdict if problem is None else verdict.failed(problem)",
        "return verdict",
        ("test_running",),
    ),
    Rule(
        "an image whose bitmaps are not stored below is not retired",
        "running",
        "self._check_base(request, verdict.bitmaps, held)",
        "pass",
        ("test_running",),
    ),
    Rule(
        "what an image never had it has not lost",
        "bitmap_rules",
        "return self.lost_names is None or name in self.lost_names",
        "return True",
        ("test_bitmap_rules",),
    ),
    Rule(
        "an overlay without what was below it may lack its bits",
        "bitmap_rules",
        "        if chain[lowest].is_flattened:",
        "        if False:",
        ("test_bitmap_rules",),
    ),
    Rule(
        "what no directory tells may be lost",
        "bitmap_rules",
        "return self.lost_names is None or name in self.lost_names",
        "return self.lost_names is not None and name in self.lost_names",
        ("test_bitmap_rules",),
    ),
    Rule(
        "a vault of a healing answers only for what it has",
        "heal",
        "lost_bitmaps=0 if place in written else image.lost_bitmaps,",
        "lost_bitmaps=0 if place in written or image.put_back else image.lost_bitmaps,",
        (HEAL, KILLED),
    ),
    Rule(
        "a vault of a commit answers only for what it has",
        "commit",
        "if seen.vault is not None and stage.name in (CARRIED, GIVEN):",
        "if seen.vault is not None:",
        (COMMIT,),
    ),
    Rule(
        "what TOP has lost a merge does not hide from the image above",
        "commit",
        "image = lost_below(bitmap.name, part, created.get(bitmap.name))",
        "image = lost_below(bitmap.name, part[1:], created.get(bitmap.name))",
        (COMMIT,),
    ),
    Rule(
        "a bitmap that is older than its checkpoint is another one",
        "bitmap_rules",
        "if older is not None:",
        "if False:",
        ("test_bitmap_rules",),
    ),
    Rule(
        "a topmost image that is older than the checkpoint has not its bitmap",
        "bitmap_rules",
        "if top.is_older_than(created):",
        "if False:",
        ("test_bitmap_rules",),
    ),
    Rule(
        "what is being given up is not taken for merged",
        "wayback",
        "if left is None or any(map(has_sign, left.paths)):",
        "if True:",
        ("test_live",),
        "_domain",
    ),
    Rule(
        "nobody goes back to below an image that was taken into the snapshot",
        "wayback",
        "is_pulled = one.identity[-1] == inode and",
        "is_pulled = False and",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "no image is older for a clock that was ahead",
        "wayback",
        "recorded = min(history.base_written, history.made or history.base_written)",
        "recorded = history.base_written",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "an overlay that is taken again is as new as the snapshot",
        "build",
        "write_made(file, held.image(verdict.request.backing_file))",
        "pass",
        ("../_domain/test_wayback",),
    ),
    Rule(
        "nobody goes back to a bitmap that is older than its checkpoint",
        "wayback",
        "or bases[target].is_older_than(one.created)",
        "or False",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "libvirt does not see what an image below has lost",
        "checkpoints",
        "if stored.problem == LOST:",
        "if False:",
        ("test_verdicts",),
        "_domain",
    ),
    Rule(
        "a loss is looked for below a domain that runs",
        "live",
        "return _as_open(chain_of(disk.source, disk.format))",
        "return Chain((), is_complete=False)",
        ("test_live",),
        "_domain",
    ),
    Rule(
        "a file is one by whichever name",
        "inventory",
        "return identity_of(os.stat(path))",
        "return os.path.realpath(path)",
        ("test_inventory",),
        "_domain",
    ),
    Rule(
        "what stands on a topmost image stands on all below",
        "inventory",
        "for layer in facts.layers]",
        "for layer in facts.layers[1:]]",
        ("test_inventory",),
        "_domain",
    ),
    Rule(
        "what was begun takes no place of what is kept",
        "retention",
        "staying = [name for name in order if name not in begun]",
        "staying = order",
        ("test_retention",),
        "_domain",
    ),
    Rule(
        "what a VM wrote before the overlay was emptied is in the bitmaps",
        "survey",
        "if name in stored:",
        "if False:",
        (KILLS,),
    ),
    Rule(
        "what others wrote to BASE after a VM ran on the overlay stays",
        "stages",
        "if not is_as_left and seen.base_changed is not None and",
        "if False and",
        (KILLS,),
    ),
    Rule(
        "an overlay whose mark BASE has got has gone in",
        "stages",
        "if layer is seen.base and seen.is_the_one_kept and",
        "if False and",
        (KILLS,),
    ),
    Rule(
        "a domain that was put on BASE meanwhile is told",
        "wayback",
        "if vault is not None and not vault.is_given and vault.top_path and",
        "if False and vault and vault.top_path and",
        ("../_domain/test_wayback",),
        "_domain",
    ),
    Rule(
        "room is asked for what the vault tells of what is held",
        "room",
        "vault += _bitmap_clusters([_what_is_held(layers)], CLUSTER, seen) + _NAMES_ONLY",
        "vault += _NAMES_ONLY",
        (COMMIT,),
    ),
    Rule(
        "an image whose header is being changed is waited for",
        "settled",
        "return self.open_after and self.image.lost_bitmaps > 0",
        "return False",
        ("../_qemu/test_settled",),
        "_qemu",
    ),
    Rule(
        "what a VM wrote before an image was emptied and filled again is in its bitmap",
        "diagnose",
        "maps += [self.stored[name]] if name in self.stored else []",
        "pass",
        (KILLED,),
    ),
    Rule(
        "a VM that died has run, too",
        "stages",
        "is_as_left = _is_sound(seen) and seen.mark_is_empty",
        "is_as_left = not _is_sound(seen) or seen.mark_is_empty",
        (KILLS,),
    ),
    Rule(
        "a merge does not hide what others have merged into what records nothing",
        "revert_rules",
        "min(known, default=0)",
        "max(known, default=0)",
        ("test_merge_odd",),
    ),
    Rule(
        "a merge does not hide what others have merged from further up",
        "survey",
        "topmost = next(iter(request.further), above.path)",
        "topmost = above.path",
        ("test_merge_odd",),
    ),
    Rule(
        "the clock of a storage that is behind does not hide a merge of others",
        "stages",
        "made = min(above.history.made, above.history.base_written)",
        "made = above.history.made",
        ("test_merge_odd",),
    ),
    Rule(
        "a live merge below the topmost image loses no bitmap that an old QEMU cannot add",
        "running",
        "if own and request.above is not None else None",
        "if False else None",
        ("test_running",),
    ),
    Rule(
        "a merge does not hide that an image was taken out above",
        "wayback",
        "if place and not problems:",
        "if False:",
        ("test_wayback",),
        "_domain",
    ),
    Rule(
        "what a killed run has left in a vault alone is not called valid",
        "unfinished",
        "doubtful = frozenset((*vault.above, *vault.below)) if place is None else",
        "doubtful = frozenset[str]() if place is None else",
        (KILLS,),
    ),
)


def told_by(rule: Rule, copy: pathlib.Path) -> str | None:
    """Return the test that fails once a rule is broken in the copy; None if none does."""
    path = copy / NAMESPACE / CODE / rule.room / f"{rule.file}.py"
    code = path.read_text(encoding="utf-8")
    if code.count(rule.line) != 1:
        return f"cannot be broken: {rule.line!r} is there {code.count(rule.line)} times"
    path.write_text(code.replace(rule.line, rule.broken), encoding="utf-8")
    try:
        return next(filter(None, (_failure(f"{TESTS}/{rule.room}/{test}.py", copy) for test in rule.tests)), None)
    finally:
        path.write_text(code, encoding="utf-8")


def _failure(test: str, copy: pathlib.Path) -> str | None:
    """Return the first failure of a file of tests."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--import-mode=importlib", test]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy / NAMESPACE, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{test}: no end"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].rsplit("/", 1)[-1] if lines else None


def main() -> int:
    """Break one rule after the other; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__))
    parser.add_argument("--only", default="", help="play only the rules with this text")
    only = parser.parse_args().only
    if importlib.util.find_spec("pytest") is None:  # or no rule would be told
        sys.exit(f"{sys.executable} has no pytest.")
    untold = 0
    with tempfile.TemporaryDirectory(prefix="rules-") as name:
        copy = pathlib.Path(name)
        shutil.copytree(COLLECTION, copy / NAMESPACE, ignore=shutil.ignore_patterns(".*", "output"))
        for rule in (one for one in RULES if only in one.what):
            told = told_by(rule, copy)
            untold += told is None or told.startswith("cannot")
            print(f"{rule.file}.py: {rule.what}: {told or 'NOTHING'}", flush=True)
    return 1 if untold else 0


if __name__ == "__main__":
    sys.exit(main())
