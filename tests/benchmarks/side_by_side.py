# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module beside the other ways to make an overlay, all in one run: 'make bench-side' writes docs/side-by-side.md.

A cell is named BITMAPSxDISKSxSIZE, for example 8x1x100G; cells can be given as arguments, and then the tables are only
printed. Contenders take turns within a round. It runs as root, since it changes owners, starts libvirt and mounts.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t

from contenders import PLAYBOOK, TASK, Case, Contender, Floor, Libvirt, Module, Play, Shell
from measuring import (
    Cost,
    Daemon,
    Look,
    Template,
    become_subreaper,
    fresh,
    judge,
    look,
    make_template,
    on_disk,
    prove_judge,
    run,
)
from mishaps import Found, disks_in, mishaps, small_folders

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "side-by-side.md"
BEGIN, END = "<!-- begin: written by make bench-side -->", "<!-- end: written by make bench-side -->"
# A star around 8 bitmaps, 1 disk, 100 GiB; and one far corner.
CELLS = ["1x1x100G", "8x1x100G", "64x1x100G", "512x1x100G", "8x10x100G", "8x100x100G", "8x1x1G", "8x1x10T"]
CELLS += ["64x100x100G"]
ROUNDS = 3
ENOUGH_SECONDS = 15.0  # a contender that has taken longer for one cell is not run again for it
FINISHED = """\
*Finished* is an overlay that is as the same contender makes it undisturbed; *half-made* is one that is under its final
name and is not. In the commands, CONTENDER is any of those at the end of this page."""


class Cell(t.NamedTuple):
    """What is measured: so many bitmaps on each of so many disks of a size."""

    bitmaps: int
    disks: int
    size: str

    def __str__(self) -> str:
        """Tell it in words."""
        return f"{count(self.bitmaps, 'bitmap')}, {count(self.disks, 'disk')}, {self.virtual_size}"

    @property
    def virtual_size(self) -> str:
        """The size with its unit."""
        return f"{self.size[:-1]} {self.size[-1]}iB"


class Row(t.NamedTuple):
    """What a contender took for a cell; the medians of its runs."""

    runs: int
    seconds: float
    cpu: float
    look: Look
    on_disk: int
    wrong: list[str]


class Turn:
    """The runs of a contender for a cell."""

    def __init__(self, contender: Contender, case: Case) -> None:
        self.contender, self.case = contender, case
        self.costs: list[Cost] = []
        self.looked: Look | None = None
        self.sizes: list[int] = []
        self.wrong: set[str] = set()

    def take(self) -> None:
        """Run once more, unless it has taken enough time."""
        if sum(cost.seconds for cost in self.costs) < ENOUGH_SECONDS:
            self.costs.append(self.do(run))

    def watch(self) -> None:
        """Run once under strace."""

        def looking(job: t.Any, daemon: Daemon | None) -> Cost:
            cost, self.looked = look(job, daemon)
            return cost

        self.do(looking)

    def do(self, execute: t.Callable[[t.Any, Daemon | None], Cost]) -> Cost:
        """Run on fresh images, and judge what was made."""
        fresh(self.case.disks, self.case.template)
        self.contender.before(self.case)
        cost = execute(self.contender.job(self.case), self.contender.daemon)
        self.contender.after()
        if cost.status != 0:
            sys.exit(f"{self.contender.name}: exit code {cost.status}\n{cost.said[-4000:]}")
        self.wrong |= set(judge(self.case.disks, self.case.template))
        self.sizes.append(on_disk(self.case.disks))
        return cost

    def row(self) -> Row:
        """Return the medians."""
        assert self.looked
        seconds = statistics.median(cost.seconds for cost in self.costs)
        cpu = statistics.median(cost.cpu for cost in self.costs)
        size = round(statistics.median(self.sizes))
        return Row(len(self.costs), seconds, cpu, self.looked, size, sorted(self.wrong))


def measure(cell: Cell, contenders: list[Contender], rounds: int, everything: bool) -> dict[str, Row]:
    """Return the row of each contender that does not take too long."""
    with tempfile.TemporaryDirectory(prefix="side.") as name:
        folder = pathlib.Path(name)
        case = Case(folder, disks_in(folder, cell.disks), template_for(cell, folder))
        turns = [
            Turn(contender, case)
            for contender in contenders
            if everything or contender.commands(cell.disks, cell.bitmaps) <= contender.longest
        ]
        for _round in range(rounds):
            for turn in turns:
                turn.take()
        for turn in turns:
            turn.watch()
        return {turn.contender.name: turn.row() for turn in turns}


def template_for(cell: Cell, folder: pathlib.Path) -> Template:
    """Make the image of a cell, with bitmaps of a few granularities."""
    bitmaps = [(f"b{number}", 65536 << number % 3) for number in range(cell.bitmaps)]
    return make_template(folder / "template.qcow2", bitmaps, cell.size)


def count(number: int, what: str) -> str:
    """Return a number of something."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def against(contender: str) -> str:
    """Return whose figures a contender is compared with: a playbook with a playbook."""
    return "task" if contender in ("task", "playbook") else "module"


def ratio(name: str, rows: dict[str, Row], figure: t.Callable[[Row], float]) -> str:
    """Return a contender's figure as a multiple of ours."""
    ours = against(name)
    if name == ours or not {name, ours} <= rows.keys():
        return ""
    times = figure(rows[name]) / figure(rows[ours])
    return f" ({times:.{2 if times < 1 else 1 if times < 10 else 0}f})"


def one_table(cell: Cell, rows: dict[str, Row], contenders: list[Contender]) -> list[str]:
    """Return the table of a cell."""
    lines = [f"### {cell}", "", "| | runs | time | CPU | peak memory | programs | on disk | result |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in (contender.name for contender in contenders):
        if name not in rows:
            lines.append(f"| {name} | - | - | - | - | - | - | - |")
            continue
        row = rows[name]
        cells = [name, f"{row.runs}", f"{row.seconds:.2f} s{ratio(name, rows, lambda r: r.seconds)}"]
        cells += [f"{row.cpu:.2f} s{ratio(name, rows, lambda r: r.cpu)}", f"{row.look.memory / 2**20:.0f} MiB"]
        cells += [f"{row.look.programs}", f"{row.on_disk >> 10} KiB", ", ".join(row.wrong) or "right"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def ratios_table(found: dict[Cell, dict[str, Row]], contenders: list[Contender]) -> list[str]:
    """Return the table of the times as multiples of ours."""
    others = [contender.name for contender in contenders if contender.name != against(contender.name)]
    lines = ["| bitmaps | disks | size | " + " | ".join(f"{name} / {against(name)}" for name in others) + " |"]
    lines.append("|---" * (3 + len(others)) + "|")
    for cell, rows in found.items():
        ratios = [ratio(name, rows, lambda row: row.seconds).strip(" ()") or "-" for name in others]
        lines.append(f"| {cell.bitmaps} | {cell.disks} | {cell.virtual_size} | {' | '.join(ratios)} |")
    return [*lines, ""]


def mishaps_tables(contenders: list[Contender], small: pathlib.Path) -> list[str]:
    """Let each mishap befall each contender; return the table, the commands, and what was printed."""
    lines, said = [], []
    for mishap in mishaps(small):
        lines += [
            f"### {mishap.title}",
            "",
            f"OverlayRequest: {mishap.wanted}",
            "",
            "| | what was found |",
            "|---|---|",
        ]
        for contender in contenders:
            with tempfile.TemporaryDirectory(prefix="side.") as folder:
                found: Found = mishap.find(contender, pathlib.Path(folder))
            progress(f"{mishap.title}: {contender.name}: {found.text}")
            lines.append(f"| {contender.name} | {found.text} |")
            if found.said:
                text = found.said.replace(folder, "").replace(str(small), "").replace("`", "'")
                said.append(f"{contender.name}: {text if len(text) < 300 else text[:300] + ' …'}")
        lines += ["", "Shown by:", "", "```sh", mishap.shown_by, "```", ""]
        if said:
            lines += ["What was printed:", "", "```", *said, "```", ""]
            said.clear()
    return lines


def commands_of(contenders: list[Contender]) -> list[str]:
    """Return what each contender runs for one disk, to be read and repeated."""
    lines = []
    for contender in contenders:
        folder = pathlib.Path("/srv")
        with tempfile.TemporaryDirectory() as name:
            template = Template(folder / "t", [("b0", 65536)], 0, "")
            case = Case(pathlib.Path(name), disks_in(folder, 1), template)
            job = contender.job(case)
            text = "\n".join(" ".join(map(quoted, command)) for command in job.commands).replace(name, "/tmp/case")
            text += f" <<< '{job.stdin}'" if job.stdin else ""
            if isinstance(contender, Play):
                contender.before(case)
                text += f"\n\n# variables.json\n{(case.folder / 'variables.json').read_text()}"
                text += f"\n\n# playbook.yml{contender.text}".rstrip()
        text = text.replace(f"{pathlib.Path(sys.executable).parent}/", "")
        lines += [f"{contender.name}:", "", "```", text, "```", ""]
    return lines


def quoted(word: str) -> str:
    """Return a word as a shell takes it, if it needs quotes; line breaks stay."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\\''") + "'"


def progress(text: str) -> None:
    """Tell how far it is."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine(contenders: list[Contender]) -> str:
    """Return what it was measured on."""

    def first_line(*command: str) -> str:
        return subprocess.check_output(command, text=True).splitlines()[0]

    system = first_line("findmnt", "-n", "-o", "FSTYPE", "-T", tempfile.gettempdir())
    text = f"{os.cpu_count()} processors, Linux {os.uname().release.split('-')[0]}, images on {system}; "
    text += f"{first_line('qemu-img', '--version')}; Python {sys.version.split()[0]}"
    for contender in contenders:
        if isinstance(contender, Libvirt):
            text += f"; libvirt {first_line('libvirtd', '--version').split()[-1]}, domain type {contender.kind}"
        if contender.name == "task":
            text += f"; {first_line(str(pathlib.Path(sys.executable).with_name('ansible-playbook')), '--version')}"
    return text


def report(cells: list[Cell], contenders: list[Contender], small: pathlib.Path, options: argparse.Namespace) -> str:
    """Measure everything; return the tables."""
    with tempfile.TemporaryDirectory(prefix="side.") as folder:
        judged = prove_judge(pathlib.Path(folder))
    lines = [f"Measured on: {machine(contenders)}.", ""]
    lines += [f"Before it began, the judge was given {judged} wrong overlays and one right one; it told each.", ""]
    found: dict[Cell, dict[str, Row]] = {}
    tables = []
    for cell in cells:
        progress(str(cell))
        found[cell] = measure(cell, contenders, options.rounds, options.full)
        tables += one_table(cell, found[cell], contenders)
        print("\n".join(one_table(cell, found[cell], contenders)), flush=True)
    if cells:
        lines += [
            "## Time, as a multiple of ours",
            "",
            *ratios_table(found, contenders),
            "## Every figure",
            "",
            *tables,
        ]
    if options.mishaps:
        # The task is the module's code, and what it does then is the module's.
        lines += ["## When something is not as it should be", "", FINISHED, ""]
        lines += mishaps_tables([contender for contender in contenders if contender.name != "task"], small)
    return "\n".join([*lines, "## The commands", "", *commands_of(contenders)]).rstrip() + "\n"


def write(text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put the tables into the document, between the marks."""
    whole = DOCUMENT.read_text()
    head, rest = whole.split(begin)
    DOCUMENT.write_text(f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}")


def arguments() -> argparse.Namespace:
    """Return what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cells", nargs="*", help="BITMAPSxDISKSxSIZE; 'none' for the mishaps alone; default all")
    parser.add_argument("--contenders", help="names, with commas; default all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--full", action="store_true", help="also what takes very long")
    parser.add_argument("--mishaps", action=argparse.BooleanOptionalAction, help="default: with the whole run only")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, help="the document; default: a whole run")
    options = parser.parse_args()
    whole = not options.cells and not options.contenders
    options.mishaps = whole if options.mishaps is None else options.mishaps
    options.write = whole if options.write is None else options.write
    return options


def main() -> None:
    """Run what is asked for."""
    options = arguments()
    names = options.cells or CELLS
    cells = [] if names == ["none"] else [Cell(int(b), int(d), size) for b, d, size in (n.split("x") for n in names)]
    become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemon and the images go, too
    lab = pathlib.Path(tempfile.mkdtemp(prefix="side."))
    libvirt = Libvirt(lab)
    contenders: list[Contender] = [Module(), Shell(), libvirt, Floor(), Play("task", TASK)]
    contenders.append(Play("playbook", PLAYBOOK, longest=120))
    if options.contenders:
        contenders = [contender for contender in contenders if contender.name in options.contenders.split(",")]
    with small_folders() as small:
        try:
            if libvirt in contenders:
                libvirt.start()
            text = report(cells, contenders, small, options)
        finally:
            libvirt.stop()
            shutil.rmtree(lab)
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
