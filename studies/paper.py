"""The paper's tables, one command each, with our figures beside the paper's and what holds.

    python -m studies.paper lambda                      # SMP over lambda, three seeds
    python -m studies.paper lambda rank --dry-run       # which runs
    python -m studies.paper datasets --model SD15_FOLDER --data Pokemon --device cuda

Tables: datasets (methods), attackers (black-box and white-box), lambda, lr, rank,
full (fine-tuning of all weights), captions (DreamBooth), and clipping (MP with
clipped and normalised gradients); all of them if none is named.  Three seeds of
400 steps on the embedded model, 100 pictures and 100 test non-members take from
15 minutes (attackers) to an hour (lambda, rank) on two cores.

    --out DIR/SET/lambda.md     the table; DIR/SET/seed-S/RUN are the runs

Tables share runs: what one has trained and evaluated, another finds.  A killed study goes on where
it was.  studies/paper_tables.py holds the rows.  Tested in tests/test_paper_tables.py.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from command.errors import UserError
from command.flags import option
from command.whole_files import write_whole
from files import EMBEDDED_SETS
from studies import grid, records
from studies.grid import WHERE, EvaluatedStudy, GridRun
from studies.paper_tables import DATA, ONE_CAPTION, PAPER, RUNS, TABLES, Change, Table
from studies.records import ASR, COMBINED, LOSS, PICTURES, Estimate, Figure

FIGURES = {
    "asr": ASR,
    "combined": COMBINED,
    "pictures": PICTURES,
    "black-box": Figure("black-box attack, balanced ASR", "asr", "black-box"),
    "GSA1": Figure("GSA1, balanced ASR", "asr", "GSA1"),
}
# which of the paper's figures each is held against; the first that both runs have
AGAINST = {"asr": ["asr"], "combined": ["asr"], "pictures": ["fid", "kid"]}
AGAINST |= {"black-box": ["black-box"], "GSA1": ["GSA1"]}
MARKS = {1: "**{}**", -1: "*{}*", 0: "{}", None: "{}"}  # of a verdict
NAMES = {"fid": "FID", "kid": "KID", "asr": "ASR", "folded": "folded AUC"}


@dataclass
class Study(EvaluatedStudy):
    """Flags of train.py; those that a row sets win over them."""

    tables: list[str] | None = option(
        None, f"some of {', '.join(TABLES)} (default: all)", group=WHERE
    )
    out: str | None = option(None, "folder of tables and runs (default: runs/paper)", group=WHERE)
    token: str | None = option(
        None,
        "captions: the caption of every image (default: sks emoji; of a folder, a picture of sks)",
        group=WHERE,
    )
    test_nonmembers: int = option(100, "test non-members to score; 0 takes all", group=WHERE)


def study(s: Study) -> str:
    """Train and evaluate what is missing; returns the tables, in markdown.

    Raises UserError for a table that there is not, before anything is trained.
    """
    names = grid.chosen(s.tables, TABLES, "table")
    place = Path(s.out or "runs/paper") / Path(s.data).name
    rows = list(dict.fromkeys(row for name in names for row in TABLES[name].paper))
    runs = [run_of(s, row, seed, place) for seed in grid.seeds(s) for row in rows]
    if s.dry_run:
        grid.announce(s, runs)
        return ""
    grid.complete(s, runs)
    pages = {name: page(name, place) for name in names}
    for name, text in pages.items():
        write_whole(place / f"{name}.md", text)
    found = "\n".join(pages.values())
    print(f"\n{found}\nfiles:    {', '.join(f'{place}/{name}.md' for name in pages)}")
    return found


def run_of(s: Study, row: str, seed: int, place: Path) -> GridRun:
    """One run of RUNS; writes the images under one caption that some of them are trained on."""
    flags = {}
    if row in ONE_CAPTION:
        caption = s.token or ("sks emoji" if s.data in EMBEDDED_SETS else "a picture of sks")
        if not caption.strip():
            raise UserError("--token is empty: give a rare word and what the images are")
        if s.nonmembers:
            raise UserError("the table captions has all images in --data: leave --nonmembers out")
        folder = place / f"one-caption-{hashlib.sha256(caption.encode()).hexdigest()[:8]}"
        flags["data"] = str(folder)
        if not s.dry_run:
            from studies.image_sets import one_caption

            one_caption(s, caption, folder)
    return grid.run_of(s, RUNS[row], place / f"seed-{seed}" / row, seed, **flags)


# --------------------------------------------------------------------------------------------------
# The page of a table


def page(name: str, place: Path) -> str:
    """Our figures beside the paper's, and its changes beside ours, in markdown.

    `place` is the folder of one set of images, with the runs in seed-S/RUN.
    """
    table = TABLES[name]
    figures = [
        Figure(f"{attack}, {key.upper()}", key, attack)
        for attack in table.attacks
        for key in (["auc"] if attack == "combined" else ["asr", "auc"])
    ]
    figures += [PICTURES, LOSS]
    own, theirs = of_paper(table, place)
    lines, there = [["run", "seeds", *(f.title for f in figures), f"the paper, {own}"]], []
    for row in table.paper:
        by_seed = records.read(place, row)
        there += by_seed.values()
        cells = [f.cell(records.mean(by_seed, f)) for f in figures]
        lines.append([RUNS[row].says, str(len(by_seed)), *cells, in_words(theirs.get(row, {}))])
    note = f"The proxy attack is the paper's, raw with one draw. {records.provenance(there)}"
    tables = f"{records.markdown(lines)}\n{records.markdown([HEADS, *changes(name, place)])}"
    return f"### {table.title}: {place.name}\n\n{tables}\n{NOTE}\n{note}\n"


HEADS = ["table", "change", "the paper", *(f.title for f in FIGURES.values())]
NOTE = "Differences are taken seed by seed, with 95 % intervals. Bold has the paper's direction, "
NOTE += "italics the other one; the other differences are not told apart from none."


def changes(name: str, place: Path) -> list[list[str]]:
    """A line for each change in a table of the paper: what, the paper's, and ours of FIGURES."""
    table, lines = TABLES[name], []
    theirs = of_paper(table, place)[1]
    for change in table.changes:
        cells, said = dict.fromkeys(FIGURES, "-"), {}
        for key in change.figures:
            ours = our_change(place, change, key)
            value, words = paper_change(theirs, change, key)
            cells[key] = MARKS[verdict(ours, value)].format(FIGURES[key].cell(ours, signed=True))
            said[words] = None
        lines.append([name, change.says, ", ".join(said), *cells.values()])
    return lines


def of_paper(table: Table, place: Path) -> tuple[str, dict]:
    """The paper's figures (set, {run: {figure: value}}) of a set, by its name, or of Pokemon."""
    name = place.name.casefold()
    if table is TABLES["datasets"] and name in PAPER:
        return name, PAPER[name]
    return DATA, table.paper


def in_words(figures: dict[str, float]) -> str:
    """`FID 0.2, ASR 82.3 %`, or a dash."""
    said = []
    for key, value in figures.items():
        number = f"{value:g}" if key in ("fid", "kid", "folded") else f"{100 * value:.1f} %"
        said.append(f"{NAMES.get(key, key)} {number}")
    return ", ".join(said) or "-"


def our_change(place: Path, change: Change, key: str) -> Estimate | None:
    """A figure of the first run minus that of the second, seed by seed."""
    first, second = records.read(place, change.first), records.read(place, change.second)
    other = FIGURES[change.other] if change.other else None
    return records.difference(first, second, FIGURES[key], other)


def paper_change(paper: dict, change: Change, key: str) -> tuple[float | None, str]:
    """First minus second in the paper, and in words; None where the paper has not both."""
    first, second = (paper.get(name, {}) for name in (change.first, change.second))
    pairs = [(key, change.other)] if change.other else [(k, k) for k in AGAINST[key]]
    for a, b in pairs:
        if a in first and b in second:
            difference = first[a] - second[b]
            return difference, f"{NAMES.get(a, a)} {difference:+.3g}"
    return None, "-"


def verdict(ours: Estimate | None, paper: float | None) -> int | None:
    """1 where our difference has the direction of the paper's, -1 where it has the other one, 0
    where its 95 % interval holds zero; None where either is missing.
    """
    if ours is None or not paper:
        return None
    return ours.side() * (1 if paper > 0 else -1)


if __name__ == "__main__":
    grid.command(Study, study, __doc__, "tables")
