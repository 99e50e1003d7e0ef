"""What the paper claims, C1 to C7, and the rules by which finished results say whether it holds.

    claims(Results(runs, audits, smoothness))      # [Claim, ...], each with its parts

A rule asks on which side of a value a 95 % interval lies; where it does not leave the value out,
the claim is not told apart from its opposite.  Nothing here depends on the result of a run that was
looked at.  Tested in tests/test_verdicts.py on made-up records.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from attacks.lira import HEADLINE
from settings import ATTACKED
from studies import seeds
from studies.paper_tables import CORRELATIONS, DATA, SETS
from studies.seeds import COMBINED, LOSS, PICTURES, PROXY, Estimate, Figure, Records

# AUCs between these are taken for chance: the paper's SMP has .57 on Pokemon, by its folded AUC
CHANCE = (0.4, 0.6)
MIDDLE = sum(CORRELATIONS.values()) / 2  # between the paper's two correlations
SHADOWED = Figure(HEADLINE, "auc", HEADLINE)
WORDS = {1: "holds", -1: "does not hold", 0: "not told apart", None: "not measured"}


@dataclass
class Results:
    """What has been measured."""

    runs: dict[str, Records] = field(default_factory=dict)  # by role, see verdicts.py
    audits: dict[str, list[dict]] = field(default_factory=dict)  # by method: audit.json
    smoothness: list[dict] = field(default_factory=list)  # groups of smoothness.json

    def of(self, role: str) -> Records:
        """The runs of a role, none where none were given."""
        return self.runs.get(role, {})


@dataclass
class Part:
    """One measurement, and whether what the claim says of it holds: 1, -1, 0, or None for not
    measured.
    """

    says: str
    here: str
    over: str
    side: int | None


@dataclass
class Claim:
    """One claim of the paper with what was measured of it."""

    name: str
    says: str
    paper: str
    parts: list[Part]
    side: int | None

    @property
    def verdict(self) -> str:
        """holds, does not hold, not told apart, or not measured."""
        return WORDS[self.side]


# --------------------------------------------------------------------------------------------------
# Rules


def every(parts: list[Part]) -> int | None:
    """A claim that says several things: it fails with any of them, and holds with all."""
    sides = [part.side for part in parts]
    if -1 in sides:
        return -1
    return None if None in sides or not sides else min(sides)


def some(parts: list[Part]) -> int | None:
    """A claim that one attack is enough for: it holds with any of those that were tried."""
    sides = [part.side for part in parts if part.side is not None]
    return max(sides) if sides else None


def better(parts: list[Part]) -> int | None:
    """A claim to be better: in one figure at least, and worse in none.  Better in one and worse in
    another is not told apart.
    """
    sides = [part.side for part in parts]
    if None in sides or not sides:
        return None
    return (1 in sides) - (-1 in sides)


def at_chance(found: Estimate | None) -> int | None:
    """1 where the interval of an AUC lies within CHANCE, -1 where it lies outside."""
    if found is None or found.interval is None:
        return None
    (low, high), (least, most) = found.interval, CHANCE
    if least <= low and high <= most:
        return 1
    return -1 if low > most or high < least else 0


def below(found: Estimate | None, value: float = 0.0) -> int | None:
    """1 where the interval lies below a value, -1 where above."""
    return None if found is None else -found.side(value)


def part(says: str, figure: Figure, found: Estimate | None, side: int | None, signed=True) -> Part:
    """A part of runs over seeds."""
    over = f"{len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}" if found else "-"
    return Part(says, figure.cell(found, signed), over, side)


# --------------------------------------------------------------------------------------------------
# The claims


def claims(found: Results) -> list[Claim]:
    """All seven, measured or not."""
    lora, mp, smp = (SETS[DATA][m] for m in ("lora", "mp", "smp"))
    price = "FID {:g} to {:g}".format
    leaks = [
        part(figure.title, figure, at, None if (side := at_chance(at)) is None else -side, False)
        for figure in (PROXY, COMBINED)
        for at in [seeds.mean(found.of("lora"), figure)]
    ]
    ruined = [
        part(f"{f.title}, MP - LoRA", f, at, None if (side := below(at)) is None else -side)
        for f in (PICTURES, LOSS)
        for at in [seeds.difference(found.of("mp"), found.of("lora"), f)]
    ]
    kept = [_nearer(found, figure) for figure in (PICTURES, LOSS)]
    hidden = {m: [_hidden(found.of(m), f) for f in (PROXY, COMBINED)] for m in ("mp", "smp")}
    ratio = _against(found, "mp-matched")
    ratio += _against(found, "smp-detached") if found.of("smp-detached") else []
    shapes = [_follows(row, found.smoothness) for row in _rows(found.smoothness)]
    early, shadows = _against(found, "lora-best"), _shadows(found)
    equal = [at_equal_loss(found.audits)]
    return [
        Claim("C1", "LoRA leaks", _rate(lora), leaks, some(leaks)),
        Claim(
            "C2",
            "MP protects, and ruins the model",
            f"{_rate(mp)}; {price(lora['fid'], mp['fid'])}",
            hidden["mp"] + ruined,
            every(hidden["mp"] + ruined),
        ),
        Claim(
            "C3",
            "SMP protects, and keeps the model",
            f"{_rate(smp)}; {price(lora['fid'], smp['fid'])}",
            hidden["smp"] + kept,
            every(hidden["smp"] + kept),
        ),
        Claim(
            "C4",
            "the Hessian's norm follows the gradient's for SMP, and not for MP",
            f"r {CORRELATIONS['smp']:.2f} and {CORRELATIONS['mp']:.2f}",
            shapes,
            every(shapes),
        ),
        Claim(
            "C5",
            "it is the ratio, not a smaller lambda",
            f"MP at the same lambda: {price(smp['fid'], mp['fid'])}",
            ratio,
            _ratio(found),
        ),
        Claim("C6", "SMP is better than stopping early", "-", early + equal, _both(early, equal)),
        Claim("C7", "SMP survives shadow models", "-", shadows, every(shadows)),
    ]


def _rate(figures: dict) -> str:
    return f"ASR {100 * figures['asr']:.1f} %, folded AUC {figures['folded']:g}"


def _hidden(by_seed: Records, figure: Figure) -> Part:
    """Whether an attack is at chance."""
    found = seeds.mean(by_seed, figure)
    return part(f"{figure.title} at chance", figure, found, at_chance(found), signed=False)


def _nearer(found: Results, figure: Figure) -> Part:
    """Whether a figure of SMP is nearer to LoRA's than to MP's."""
    terms = [(1.0, "smp"), (-0.5, "lora"), (-0.5, "mp")]
    at = seeds.weighted([(weight, found.of(role), figure) for weight, role in terms])
    return part(f"{figure.title}, SMP - the middle of LoRA and MP", figure, at, below(at))


def _against(found: Results, role: str) -> list[Part]:
    """SMP less another, in leakage, pictures and loss: below is better."""
    parts = []
    for figure in (COMBINED, PICTURES, LOSS):
        at = seeds.difference(found.of("smp"), found.of(role), figure)
        parts.append(part(f"{figure.title}, SMP - {NAMES[role]}", figure, at, below(at)))
    return parts


NAMES = {
    "mp-matched": "MP at SMP's mean weight",
    "smp-detached": "SMP without the gain's gradient",
    "lora-best": "LoRA at its best held-out loss",
}


def _ratio(found: Results) -> int | None:
    """Better than the sum at its own weight; the other control counts where it was tried."""
    matched, detached = (
        better(_against(found, "mp-matched")),
        better(_against(found, "smp-detached")),
    )
    if matched is None:
        return None
    return matched if detached is None else min(matched, detached)


def _both(early: list[Part], equal: list[Part]) -> int | None:
    """By runs and by audits, as far as there are any: one that fails it is enough."""
    sides = [side for side in (better(early), every(equal)) if side is not None]
    return min(sides) if sides else None


# ---- curvature ----


def _rows(groups: list[dict]) -> list[str]:
    return list(dict.fromkeys(g["row"] for g in groups)) or ["-"]


def _follows(row: str, groups: list[dict]) -> Part:
    """In one setting: SMP's correlation is above 0, MP's is not, and SMP's is the higher one.

    Correlations are pooled over seeds as Fisher's z with a standard error, see
    studies/smoothness.py.
    """
    z = {g["method"]: g["norms"] for g in groups if g["row"] == row}
    if not {"mp", "smp"} <= set(z) or not all(z[m]["runs"] for m in ("mp", "smp")):
        return Part(f"r, {row}", "-", "-", None)
    at = {m: interval(z[m]["z"], z[m]["error"]) for m in z}
    apart = interval(z["smp"]["z"] - z["mp"]["z"], math.hypot(z["smp"]["error"], z["mp"]["error"]))
    sides = [
        at["smp"].side(),
        -1 if at["mp"].side() == 1 else int(math.tanh(at["mp"].interval[1]) < MIDDLE),
        apart.side(),
    ]
    said = "{:.2f} [{:.2f}, {:.2f}]".format
    cells = [f"{m.upper()} {said(*np.tanh([at[m].value, *at[m].interval]))}" for m in ("smp", "mp")]
    seeds_of = next(g["seeds"] for g in groups if g["row"] == row)
    side = -1 if -1 in sides else min(sides)
    return Part(f"r, {row}", ", ".join(cells), f"{len(seeds_of)} seeds", side)


def interval(value: float, error: float) -> Estimate:
    """Of a normal value with a standard error."""
    return Estimate(value, [value - 1.96 * error, value + 1.96 * error], [])


# ---- audits ----


def of_step(step: dict) -> Estimate:
    """The AUC of the shadow attack at a step of an audit, with its interval over adapters."""
    figures = step["attacks"][HEADLINE]
    low, high = figures["auc_t_interval"]
    adapters = list(range(len(figures["auc_by_adapter"])))
    value = figures["auc"]  # of all decisions together, which may lie beside the adapters' mean
    return Estimate(value, [max(min(low, value), 0.0), min(max(high, value), 1.0)], adapters)


def best_step(record: dict) -> str:
    """The step with the lowest held-out loss."""
    return min(record["steps"], key=lambda at: record["steps"][at]["held_out_loss"])


def _shadows(found: Results) -> list[Part]:
    """The shadow attack on SMP, as it ends and where it is best; and on single runs, if it was
    tried.
    """
    parts = []
    for record in found.audits.get("smp", []):
        for at in dict.fromkeys([list(record["steps"])[-1], best_step(record)]):
            auc = of_step(record["steps"][at])
            here = SHADOWED.cell(auc)
            over = f"{len(auc.seeds)} adapters"
            parts.append(Part(f"audit, step {at}: AUC at chance", here, over, at_chance(auc)))
    alone = {k: r for k, r in found.of("smp").items() if SHADOWED.read(r)}
    if alone:
        parts.append(_hidden(alone, SHADOWED))
    return parts or [Part("audit: AUC at chance", "-", "-", None)]


def at_equal_loss(
    audits: dict[str, list[dict]], method: str = "smp", at: str | None = None
) -> Part:
    """AUC of SMP, or another method, at its best step, or at another, less that of LoRA stopped at
    the same held-out loss, read off the line between LoRA's steps on the way to its own best; of
    several audits of LoRA the lowest.

    Where no audit of LoRA came down to the loss, the best step of the one that came nearest is
    taken.  An audit of LoRA that was first asked at a lower loss than the other's says nothing:
    LoRA has been at that before.  Intervals are over adapters, joined as if independent.
    """
    name = method.upper() if method in ATTACKED else method
    says = f"audits, AUC of shadow attacks, {name} - LoRA at the same held-out loss"
    if not audits.get(method) or not audits.get("lora"):
        return Part(says, "-", "-", None)
    record = audits[method][0]
    step = record["steps"][at or best_step(record)]
    ours, loss = of_step(step), step["held_out_loss"]
    best = {i: r["steps"][best_step(r)]["held_out_loss"] for i, r in enumerate(audits["lora"])}
    reached = [i for i in best if best[i] <= loss] or [min(best, key=best.get)]
    there = [audits["lora"][i] for i in reached]
    paths = [path for record in there if (path := _on_the_path(record, loss))]
    if not paths:
        return Part(says, "-", "-", None)
    found = minus(ours, theirs := min(paths, key=lambda e: e.value))
    over = f"{len(ours.seeds)} and {len(theirs.seeds)} adapters"
    return Part(says, SHADOWED.cell(found, signed=True), over, below(found))


def _on_the_path(record: dict, loss: float) -> Estimate | None:
    """An audit's AUC where its held-out loss was `loss`, before its best step; None where it was
    not asked that early.
    """
    best, path = best_step(record), []
    for at, step in record["steps"].items():
        path.append((step["held_out_loss"], of_step(step)))
        if at == best:
            break
    path.sort(key=lambda pair: pair[0])
    losses = [x for x, _ in path]
    if loss > losses[-1]:
        return None
    value, low, high = (
        float(np.interp(loss, losses, ends))
        for ends in zip(*[(e.value, *e.interval) for _, e in path], strict=True)
    )
    return Estimate(value, [low, high], path[0][1].seeds)


def minus(first: Estimate, second: Estimate) -> Estimate:
    """The difference of two independent estimates (Zou 2007)."""
    value = first.value - second.value
    low = math.hypot(first.value - first.interval[0], second.interval[1] - second.value)
    high = math.hypot(first.interval[1] - first.value, second.value - second.interval[0])
    return Estimate(value, [value - low, value + high], first.seeds)
