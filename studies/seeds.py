"""Figures of runs over seeds: read from eval.json, their means, and what two rows differ by.

    by_seed = read(out, "smp")                       # {seed: eval.json with the training's summary}
    mean(by_seed, ASR)                               # Estimate(value, interval, seeds)
    difference(by_seed, read(out, "lora"), ASR)      # on the seeds that both have

Intervals are of 95 %.  Tested in tests/test_seeds.py against sums by hand.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from attacks.comparisons import over_seeds
from command.whole_files import read_json
from report.tables import cell
from run.folder import RunFolder

Records = dict[int, dict]  # seed -> record
OF_THE_TRAINING = ("settings", "summary", "git_commit")  # what a record has of config.json


class Estimate(NamedTuple):
    """A figure over seeds; without an interval where one seed says nothing of the others."""

    value: float
    interval: list[float] | None
    seeds: list[int]

    def side(self, of: float = 0.0) -> int:
        """1 where the interval lies wholly above a value, -1 wholly below, 0 where neither."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return int(low > of) - int(high < of)


@dataclass(frozen=True)
class Figure:
    """One number of `adapted` in eval.json: of an attack, of the pictures, or the loss."""

    title: str
    key: str
    attack: str | None = None  # a share in [0, 1] then

    def read(self, record: dict) -> tuple[float, list[float] | None] | None:
        """(value, its own interval or None); None where the evaluation has not asked for it."""
        found = record["adapted"]
        if self.attack:
            found = found["attacks"].get(self.attack, {})
        elif self.key not in found:
            found = found.get("quality", {})
        return (found[self.key], found.get(f"{self.key}_interval")) if self.key in found else None

    def cell(self, found: Estimate | None, signed: bool = False) -> str:
        """`0.81 [0.73, 0.88]`, `+26 [-110, +162]` or a dash."""
        if found is None:
            return "-"
        value, interval, _ = found
        if self.attack and not signed:
            return cell({"auc": value, "auc_interval": interval})
        number = f"{'+' if signed else ''}{FORMATS.get(self.key, '.2f')}"
        ends = ", ".join(format(end, number) for end in interval or ())
        return format(value, number) + (f" [{ends}]" if ends else "")


FORMATS = {"held_out_loss": ".4f", "frechet_members": ".0f", "frechet_held_out": ".0f"}
LOSS = Figure("held-out loss", "held_out_loss")
PICTURES = Figure("Frechet distance to members", "frechet_members")
ASR = Figure("the paper's attack, balanced ASR", "asr", "proxy-raw-1")
PROXY = Figure("the paper's attack, AUC", "auc", "proxy-raw-1")
COMBINED = Figure("combined attack, AUC", "auc", "combined")


def read(out: Path, row: str, at: str = "") -> Records:
    """Every evaluated run of a row in a study's folder, by seed; arguments as for `record`."""
    found = [record(folder, at) for folder in sorted(out.glob(f"seed-*/{row}"))]
    return {r["seed"]: r for r in found if r}


def record(run: Path, at: str = "") -> dict | None:
    """eval.json of a run with OF_THE_TRAINING; None where it is not evaluated.  `at` is the folder
    in it, such as at-best.
    """
    if not (run / at / "eval.json").is_file():
        return None
    config = RunFolder(run).config()
    return read_json(run / at / "eval.json") | {k: config.get(k) for k in OF_THE_TRAINING}


def mean(by_seed: Records, figure: Figure) -> Estimate | None:
    """Of a figure over seeds; None where there is none."""
    found = weighted([(1.0, by_seed, figure)])
    if found is None or found.interval is None or not figure.attack:
        return found
    low, high = found.interval
    return found._replace(interval=[max(low, 0.0), min(high, 1.0)])


def weighted(terms: list[tuple[float, Records, Figure]]) -> Estimate | None:
    """Mean over the shared seeds of a sum of figures, each times its weight; None without any.

    The interval is of `over_seeds`.  A seed's own is that of its figures, joined as if they were
    independent; on the same images they are not, so it is wide.
    """
    seeds = [k for k in terms[0][1] if all(k in r and f.read(r[k]) for _, r, f in terms)]
    if not seeds:
        return None
    values, intervals = [], []
    for k in seeds:
        at = [(weight, *figure.read(records[k])) for weight, records, figure in terms]
        value = sum(weight * v for weight, v, _ in at)
        ends = [sorted(w * (end - v) for end in own or (v, v)) for w, v, own in at]
        low, high = (math.hypot(*side) for side in zip(*ends, strict=True))
        values.append(value)
        intervals.append([value - low, value + high])
    value, interval = over_seeds(values, intervals)
    bare = len(seeds) == 1 and intervals[0][0] == intervals[0][1]
    return Estimate(value, None if bare else interval, seeds)


def difference(
    first: Records, second: Records, figure: Figure, other: Figure | None = None
) -> Estimate | None:
    """`figure` of the first row minus that, or `other`, of the second."""
    return weighted([(1.0, first, figure), (-1.0, second, other or figure)])


def provenance(records: list[dict]) -> str:
    """`9 runs of commit 1a2b3c4: 945 s of training, 1,830 s of evaluation.`"""
    commits = sorted({(r["git_commit"] or "unknown")[:7] for r in records})
    seconds = [r["summary"]["seconds"] for r in records], [r["seconds"] for r in records]
    training, evaluation = (f"{sum(s):,.0f} s" for s in seconds)
    return (
        f"{len(records)} runs of commit {', '.join(commits)}: {training} of training, "
        f"{evaluation} of evaluation."
    )


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"
