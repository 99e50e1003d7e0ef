"""The paper against its authors' code: SMP, and SMP with each of the differences, over seeds.

    python -m studies.as_released                        # all rows, three seeds: hours on two cores
    python -m studies.as_released paper order --seeds 1  # some; what is finished makes the table
    python -m studies.as_released --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is trained and evaluated in seed-S/ROW: a killed study goes on where it was, and one more
row costs that row.  All rows of a seed have the same images, batches and noise.  At the end stands
table.md, of all rows that are there.  docs/paper-and-code.md says what the differences are.  Tested
in tests/test_released.py against steps written out by hand.
"""

from dataclasses import dataclass
from pathlib import Path

from command import progress
from command.errors import one_line_errors
from command.flags import option, parse
from command.whole_files import write_whole
from studies import grid, records
from studies.grid import EvaluatedStudy, Row
from studies.records import COMBINED, HELD_OUT, LOSS, PROXY

SMP, RAW = {"method": "smp"}, {"method": "smp", "proxy": "raw"}
# name -> row; the name is a folder.  G without the 1/2 of Eq. 5 is twice the lambda, and alpha =
# beta = 1 in L / (beta + alpha CE + delta) is lambda 1, or 2 without the 1/2.  The pooled attacker
# has no dropout: that switch has rows of its own, beside the paper's attacker without it.
ROWS = {
    "paper": Row("paper", SMP),
    "order": Row("order", SMP),
    "half": Row("half", SMP, {"lam": 2}),
    "lambda": Row("lambda", SMP | {"lam": 1.0}),
    "forward": Row("forward", SMP),
    "all-unet": Row("all-unet", SMP | {"lam": 2.0}),
    "paper-raw": Row("paper-raw", RAW),
    "dropout-raw": Row("dropout-raw", RAW),
    "all-unet-raw": Row("all-unet-raw", RAW | {"lam": 2.0}),
}
# rows of the records that cannot be trained any more: with a LoRA on the text encoder
TEXT_ENCODER = ("text-encoder", "all", "all-raw")
CHANGES = (COMBINED, LOSS, HELD_OUT)


@dataclass
class Study(EvaluatedStudy):
    """Flags of train.py; those that a row sets win over them."""

    rows: list[str] | None = option(None, "rows to train (default: all)", group=grid.WHERE)


def study(s: Study) -> str:
    """Train and evaluate what is missing; returns the table of all that is there, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    names, out = grid.chosen(s.rows, ROWS), Path(s.out or "runs/as-released")
    runs = [
        grid.run_of(s, ROWS[name], out / f"seed-{seed}" / name, seed)
        for seed in grid.seeds(s)
        for name in names
    ]
    if s.dry_run:
        grid.announce(s, runs)
        return ""
    grid.complete(s, runs)
    found = table(out)
    write_whole(out / "table.md", found)
    print(f"\n{found}\nfiles:    {out}/table.md, seed-*/*/report.html")
    return found


def table(out: Path) -> str:
    """A line of markdown for each row in a folder, then where the runs are from.

    Means over its seeds, with 95 % intervals that include the seeds; changes are against the row
    `paper` of the same attacker, seed by seed.
    """
    rows = {name: records.read(out, name) for name in (*ROWS, *TEXT_ENCODER)}
    figures = (PROXY, *CHANGES)
    lines = [
        ["row", "seeds", *(f.title for f in figures), *(f"{f.title}, change" for f in CHANGES)]
    ]
    for name, by_seed in rows.items():
        paper = "paper-raw" if name.endswith("-raw") else "paper"
        against = {} if name == paper else rows[paper]
        changes = [(f, records.difference(by_seed, against, f)) for f in CHANGES]
        line = [name, str(len(by_seed)), *(f.cell(records.mean(by_seed, f)) for f in figures)]
        if by_seed:
            lines.append([*line, *(f.cell(change, signed=True) for f, change in changes)])
    made = records.provenance([r for by_seed in rows.values() for r in by_seed.values()])
    note = "Changes are against the row paper, of -raw rows against paper-raw, seed by seed. "
    return f"{records.markdown(lines)}\n{note}Brackets are 95 % intervals. {made}\n"


def main() -> None:
    """The command."""
    settings = parse(Study, __doc__, positional="rows")
    with one_line_errors():
        progress.start()
        study(settings)


if __name__ == "__main__":
    main()
