"""What finished runs say: figures over seeds and their differences.  All intervals are of 95 %.

    by_seed = read(out, "smp")                       # {seed: eval.json with the training's summary}
    mean(by_seed, ASR)                               # Estimate(value, interval, seeds)
    difference(by_seed, read(out, "lora"), ASR)      # on the seeds that both have

Tested in tests/test_seeds.py against sums by hand.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from attacks.comparisons import over_seeds
from attacks.lira import HEADLINE
from command.whole_files import read_json
from report.tables import cell

Records = dict[int, dict]  # seed -> record
OF_THE_TRAINING = ("settings", "summary", "git_commit")  # what a record has of config.json


class Estimate(NamedTuple):
    """A figure over seeds, or over the adapters of an audit."""

    value: float
    interval: list[float] | None  # None: one seed says nothing of the others
    seeds: list[int]

    def side(self, of: float = 0.0) -> int:
        """1 where the interval lies above a value, -1 where it lies below, 0 where it holds it."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return int(low > of) - int(high < of)


@dataclass(frozen=True)
class Figure:
    """One number of `adapted` in eval.json: of an attack, of the pictures, or the loss."""

    title: str
    key: str
    attack: str | None = None  # with an attack the number is a share in [0, 1]

    def read(self, record: dict) -> tuple[float, list[float] | None] | None:
        """(value, its own interval or None); None where the evaluation has not measured it."""
        found = record["adapted"]
        if self.attack:
            found = found["attacks"].get(self.attack, {})
        elif self.key not in found:
            found = found.get("quality", {})
        if found.get(self.key) is None:
            return None
        return found[self.key], found.get(f"{self.key}_interval")

    def cell(self, found: Estimate | None, signed: bool = False) -> str:
        """`0.81 [0.73, 0.88]`, `+26 [-110, +162]` or a dash."""
        if found is None:
            return "-"
        if self.attack and not signed:
            return cell({"auc": found.value, "auc_interval": found.interval})
        number = FORMATS.get(self.key, ".2f")
        if signed:
            number = f"+{number}"
        ends = ", ".join(format(end, number) for end in found.interval or ())
        return format(found.value, number) + (f" [{ends}]" if ends else "")


FORMATS = {"held_out_loss": ".4f", "frechet_members": ".0f", "frechet_held_out": ".0f"}
LOSS = Figure("held-out loss", "held_out_loss")
PICTURES = Figure("Frechet distance to members", "frechet_members")
HELD_OUT = Figure("Frechet distance to held-out pictures", "frechet_held_out")
ASR = Figure("the paper's attack, balanced ASR", "asr", "proxy-raw-1")
PROXY = Figure("the paper's attack, AUC", "auc", "proxy-raw-1")
COMBINED = Figure("combined attack, AUC", "auc", "combined")
SHADOWED = Figure(HEADLINE, "auc", HEADLINE)


def read(out: Path, row: str, at: str = "") -> Records:
    """Every evaluated run of a row in a study's folder, by seed.

    `at` is the folder of the evaluation in the run folder, such as at-best.
    """
    found = {}
    for run in sorted(out.glob(f"seed-*/{row}")):
        if (run / at / "eval.json").is_file():
            config = read_json(run / "config.json")
            record = read_json(run / at / "eval.json")
            record |= {key: config.get(key) for key in OF_THE_TRAINING}
            found[record["seed"]] = record
    return found


def mean(by_seed: Records, figure: Figure) -> Estimate | None:
    """Of a figure over seeds; None where there is none."""
    found = weighted([(1.0, by_seed, figure)])
    if found is None or found.interval is None or not figure.attack:
        return found
    low, high = found.interval
    return found._replace(interval=[max(low, 0.0), min(high, 1.0)])


def difference(
    first: Records, second: Records, figure: Figure, other: Figure | None = None
) -> Estimate | None:
    """`figure` of the first row minus that, or `other`, of the second, seed by seed."""
    return weighted([(1.0, first, figure), (-1.0, second, other or figure)])


def weighted(terms: list[tuple[float, Records, Figure]]) -> Estimate | None:
    """Mean over the shared seeds of a sum of figures, each times its weight; None without any.

    The interval is of `over_seeds`.  A seed's own is that of its figures, joined as if they were
    independent; on the same images they are not, so it is wide.
    """
    shared = [k for k in terms[0][1] if all(k in r and f.read(r[k]) for _, r, f in terms)]
    if not shared:
        return None
    values, intervals = [], []
    for seed in shared:
        value, below, above = 0.0, 0.0, 0.0
        for weight, records, figure in terms:
            own, interval = figure.read(records[seed])
            ends = sorted(weight * (end - own) for end in interval or (own, own))
            value += weight * own
            below = math.hypot(below, ends[0])
            above = math.hypot(above, ends[1])
        values.append(value)
        intervals.append([value - below, value + above])
    value, interval = over_seeds(values, intervals)
    bare = len(shared) == 1 and intervals[0][0] == intervals[0][1]
    return Estimate(value, None if bare else interval, shared)


def provenance(records: list[dict]) -> str:
    """`9 runs of commit 1a2b3c4: 945 s of training, 1,830 s of evaluation.`"""
    commits = sorted({(r["git_commit"] or "unknown")[:7] for r in records})
    training = sum(r["summary"]["seconds"] for r in records)
    evaluation = sum(r["seconds"] for r in records)
    return (
        f"{len(records)} runs of commit {', '.join(commits)}: {training:,.0f} s of training, "
        f"{evaluation:,.0f} s of evaluation."
    )


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"
