"""The paper against its authors' code: SMP, and SMP with each of the differences, over seeds.

    python -m studies.as_released                        # all rows, three seeds: hours on two cores
    python -m studies.as_released paper order --seeds 1  # some; what is finished makes the table
    python -m studies.as_released --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is trained and evaluated in seed-S/ROW: a killed study goes on where it was, and one more
row costs that row.  All rows of a seed have the same images, batches and noise.  At the end stands
table.md, of all rows that are there.  docs/paper-and-code.md says what the differences are.  Tested
in tests/test_released.py against steps written out by hand.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from algorithm import Batch
from command.flags import option
from command.whole_files import write_whole
from diffusion import draw_noise, prediction_target
from studies import grid, records
from studies.grid import EvaluatedStudy, Row
from studies.records import COMBINED, HELD_OUT, LOSS, PROXY

# --------------------------------------------------------------------------------------------------
# The differences that are no flags, each a class that train.train puts before algorithm.Run


class Order:
    """The adapter's step first, then the attacker's: h does not learn before the adapter has."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        ascend = self.attacker_optimizer.step
        self.attacker_optimizer.step = lambda: ascend() if self.optimizer.state else None


class Forward:
    """The batch is noised once more, and sent through the UNet once more, for G."""

    first: Batch | None = None

    def error(self, b: Batch) -> torch.Tensor:
        """e of the batch (B, C, h, w); with gradient, e of the second noise is kept aside."""
        if not torch.is_grad_enabled():
            return super().error(b)
        t, eps = draw_noise(self.base, len(b), self.outer)
        target = prediction_target(b.z0, eps, t, self.base.abar, self.base.prediction)
        again = replace(b, t=t, eps=eps, target=target)
        pairs = ((getattr(b, name), getattr(again, name)) for name in vars(b))
        e = super().error(Batch(*(torch.cat(pair) for pair in pairs)))  # (2 B, C, h, w)
        self.first, self.second = b, (e[len(b) :], again)
        return e[: len(b)]

    def log_h(self, e: torch.Tensor, b: Batch) -> torch.Tensor:
        """What the attacker says of the second noise, where there is one."""
        return super().log_h(*(self.second if b is self.first else (e, b)))


class Dropout:
    """The attacker's dropout is on in the outer step as well."""

    def log_h(self, e: torch.Tensor, b: Batch) -> torch.Tensor:
        """(B, 2) log-probabilities with a fresh mask."""
        training = self.h.training
        self.h.train()
        log_h = super().log_h(e, b)
        self.h.train(training)
        return log_h


SMP, RAW = {"method": "smp"}, {"method": "smp", "proxy": "raw"}
# name -> row; the name is a folder.  G without the 1/2 of Eq. 5 is twice the lambda, and alpha =
# beta = 1 in L / (beta + alpha CE + delta) is lambda 1, or 2 without the 1/2.  The pooled attacker
# has no dropout: that difference has a row beside the paper's attacker.
ROWS = {
    "paper": Row("paper", SMP),
    "order": Row("order", SMP, extra=(Order,)),
    "half": Row("half", SMP, {"lam": 2}),
    "lambda": Row("lambda", SMP | {"lam": 1.0}),
    "forward": Row("forward", SMP, extra=(Forward,)),
    "all-unet": Row("all-unet", SMP | {"lam": 2.0}, extra=(Order, Forward)),
    "paper-raw": Row("paper-raw", RAW),
    "dropout-raw": Row("dropout-raw", RAW, extra=(Dropout,)),
    "all-unet-raw": Row("all-unet-raw", RAW | {"lam": 2.0}, extra=(Order, Forward, Dropout)),
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


if __name__ == "__main__":
    grid.command(Study, study, __doc__, "rows")
