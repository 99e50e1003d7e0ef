"""The paper against its authors' code: SMP, and SMP with each of the differences, over seeds.

    python -m studies.as_released                        # all rows, three seeds: hours on two cores
    python -m studies.as_released paper order --seeds 1  # some; what is finished makes the table
    python -m studies.as_released --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is trained (train.py) and evaluated (evaluate.py) in a folder of its own, seed-S/ROW: a
killed study goes on where it was, and one more row costs that row.  All rows of a seed have the
same images, batches and noise.  At the end stands table.md, of all rows that are there.
docs/paper-and-code.md says what the differences are.
"""

from dataclasses import dataclass
from pathlib import Path

from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from run.released import NAMES
from studies import settings

# name -> flags; the name is a folder.  The pooled attacker has no dropout: that switch has rows of
# its own, beside the paper's attacker without it
ROWS = {"paper": {}} | {name: {"as_released": name} for name in NAMES if name != "dropout"}
ROWS |= {"all": {"as_released": "all"}, "paper-raw": {"proxy": "raw"}}
ROWS |= {
    "dropout-raw": {"as_released": "dropout", "proxy": "raw"},
    "all-raw": {"as_released": "all", "proxy": "raw"},
}


@dataclass
class Study(settings.Study):
    """Flags of train.py; those that a row sets win over them."""

    rows: list[str] | None = option(None, "rows to train (default: all)", group=settings.WHERE)


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__, positional="rows")
    progress.start()

import evaluate
from command.whole_files import write_whole
from studies import runs, seeds
from studies.seeds import COMBINED, LOSS, PROXY, Figure, Records
from train import train

HELD_OUT = Figure("Frechet distance to held-out pictures", "frechet_held_out")
FIGURES = (PROXY, COMBINED, Figure("GSA1, AUC", "auc", "GSA1"), LOSS, HELD_OUT)
CHANGES = (COMBINED, LOSS, HELD_OUT)


def study(s: Study) -> str:
    """Train and evaluate what is missing; returns the table of all that is there, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    chosen, out = s.rows or list(ROWS), Path(s.out or "runs/as-released")
    if unknown := [name for name in chosen if name not in ROWS]:
        raise UserError(f"there is no row {unknown[0]}: take some of {', '.join(ROWS)}")
    runs.check(s)
    asked = [
        runs.settings_of(s, out / f"seed-{seed}" / name, seed=seed, **ROWS[name])
        for seed in runs.seeds(s)
        for name in chosen
    ]
    if s.dry_run:
        print(runs.announced(s, asked))
        return ""
    runs.complete(s, asked, train, evaluate.evaluate, evaluate.Settings)
    found = table({name: there for name in ROWS if (there := seeds.read(out, name))})
    write_whole(out / "table.md", found)
    print(f"\n{found}\nfiles:    {out}/table.md, seed-*/*/report.html")
    return found


# --------------------------------------------------------------------------------------------------
# The table


def table(rows: dict[str, Records]) -> str:
    """A line of markdown per row, then where the runs are from.  Means over its seeds, with 95 %
    intervals that include the seeds; changes are against the row `paper` of the same attacker, seed
    by seed.
    """
    heads = ["row", "seeds", *(f.title for f in FIGURES), *(f"{f.title}, change" for f in CHANGES)]
    lines = [[*heads, "lambda J", "seconds a step"]]
    for name, by_seed in rows.items():
        paper = "paper-raw" if name.endswith("-raw") else "paper"
        reference = rows.get(paper, {}) if name != paper else {}
        found = list(by_seed.values())
        line = [name, str(len(by_seed)), *(f.cell(seeds.mean(by_seed, f)) for f in FIGURES)]
        changes = [(f, seeds.difference(by_seed, reference, f)) for f in CHANGES]
        line += [f.cell(change, signed=True) for f, change in changes]
        line.append(f"{average(r['summary']['lambda_effective_mean'] for r in found):.2g}")
        line.append(f"{average(r['summary']['seconds'] / steps(r) for r in found):.2f}")
        lines.append(line)
    made = seeds.provenance([r for by_seed in rows.values() for r in by_seed.values()])
    note = "Changes are against the row paper, of -raw rows against paper-raw, seed by seed. "
    return f"{seeds.markdown(lines)}\n{note}Brackets are 95 % intervals. {made}\n"


def steps(record: dict) -> int:
    """Of a run's training."""
    return record["settings"]["steps"]


def average(values) -> float:
    """Of any numbers."""
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    with one_line_errors():
        study(SETTINGS)
