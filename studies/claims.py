"""What the paper claims, C1 to C7, and the rules by which finished results say whether it holds.

    claims(Results(runs, audits, smoothness))      # [Claim, ...], each with its parts

A rule asks on which side of a value a 95 % interval lies; where it holds the value, the claim is
not told apart from its opposite.  Nothing here depends on the result of a run that was looked at.
Tested in tests/test_verdicts.py on made-up records.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from studies import correlation, records
from studies.correlation import Pooled
from studies.equal_loss import at_equal_loss, best_step, of_step
from studies.paper_tables import CORRELATIONS, DATA, PAPER
from studies.records import COMBINED, LOSS, PICTURES, PROXY, SHADOWED, Estimate, Figure, Records

# AUCs between these are taken for chance: the paper's SMP has .57 on Pokemon, by its folded AUC
CHANCE = (0.4, 0.6)
MIDDLE = sum(CORRELATIONS.values()) / 2  # between the paper's two correlations
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
    """One measurement, and whether what the claim says of it holds."""

    says: str
    here: str
    over: str  # of how many seeds or adapters
    side: int | None  # 1 holds, -1 does not, 0 is not told apart, None is not measured


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
# Rules: of one measurement, and of the parts of a claim


def at_chance(found: Estimate) -> int | None:
    """1 where the interval of an AUC lies within CHANCE, -1 where it lies outside."""
    if found.interval is None:
        return None
    (low, high), (least, most) = found.interval, CHANCE
    if least <= low and high <= most:
        return 1
    return -1 if low > most or high < least else 0


def leaks(found: Estimate) -> int | None:
    """The opposite of at_chance."""
    side = at_chance(found)
    return None if side is None else -side


def higher(found: Estimate) -> int:
    """1 where a difference is above zero."""
    return found.side()


def lower(found: Estimate) -> int:
    """1 where a difference is below zero."""
    return -found.side()


def every(parts: list[Part]) -> int | None:
    """A claim that says several things: it fails with any of them, and holds with all."""
    sides = [part.side for part in parts]
    if -1 in sides:
        return -1
    return None if None in sides or not sides else min(sides)


def some(parts: list[Part]) -> int | None:
    """A claim that one attack is enough for: it holds with any of those that were tried."""
    return max((part.side for part in parts if part.side is not None), default=None)


def better(parts: list[Part]) -> int | None:
    """A claim to be better: in one figure at least, and worse in none.  Better in one and worse in
    another is not told apart.
    """
    sides = [part.side for part in parts]
    if None in sides or not sides:
        return None
    return (1 in sides) - (-1 in sides)


def worst(*sides: int | None) -> int | None:
    """Of several rules, as far as they were measured: one that fails is enough."""
    return min((side for side in sides if side is not None), default=None)


# --------------------------------------------------------------------------------------------------
# Measurements


def measured(
    found: Results, says: str, figures: tuple[Figure, ...], terms: dict[str, float], rule: Callable
) -> list[Part]:
    """A part for each figure: the mean over seeds of the sum of a role's figure times its weight.

    `says` stands behind the figure's name.
    """
    parts = []
    for figure in figures:
        at = records.weighted([(weight, found.of(role), figure) for role, weight in terms.items()])
        if len(terms) == 1:
            at = records.mean(found.of(*terms), figure)
        over = f"{len(at.seeds)} seed{'s' * (len(at.seeds) > 1)}" if at else "-"
        cell = figure.cell(at, signed=len(terms) > 1)
        parts.append(Part(figure.title + says, cell, over, rule(at) if at else None))
    return parts


def against(found: Results, role: str, title: str) -> list[Part]:
    """SMP less another, in leakage, pictures and loss: below is better."""
    figures, terms = (COMBINED, PICTURES, LOSS), {"smp": 1.0, role: -1.0}
    return measured(found, f", SMP - {title}", figures, terms, lower)


def follows(found: Results) -> list[Part]:
    """In each setting: SMP's correlation is above 0, MP's is not, and SMP's is the higher one."""
    parts = []
    for row in dict.fromkeys(group["row"] for group in found.smoothness):
        of = {group["method"]: group for group in found.smoothness if group["row"] == row}
        r = {method: Pooled(**group["norms"]) for method, group in of.items()}
        if not {"mp", "smp"} <= set(r) or not all(r[method].runs for method in r):
            parts.append(Part(f"r, {row}", "-", "-", None))
            continue
        flat = int(r["mp"].interval[1] < MIDDLE) if r["mp"].side < 1 else -1
        side = min(r["smp"].side, flat, correlation.higher(r["smp"], r["mp"]))
        cells = []
        for method in ("smp", "mp"):
            low, high = r[method].interval
            cells.append(f"{method.upper()} {r[method].r:.2f} [{low:.2f}, {high:.2f}]")
        seeds = f"{len(of['mp']['seeds'])} seeds"
        parts.append(Part(f"r, {row}", ", ".join(cells), seeds, side))
    return parts or [Part("r", "-", "-", None)]


def shadows(found: Results) -> list[Part]:
    """The shadow attack on SMP, as it ends and where it is best."""
    parts = []
    for audit in found.audits.get("smp", []):
        for at in dict.fromkeys([list(audit["steps"])[-1], best_step(audit)]):
            auc = of_step(audit["steps"][at])
            says, over = f"audit, step {at}: AUC at chance", f"{len(auc.seeds)} adapters"
            parts.append(Part(says, SHADOWED.cell(auc), over, at_chance(auc)))
    return parts or [Part("audit: AUC at chance", "-", "-", None)]


def equal_loss(found: Results) -> Part:
    """The shadow attack on SMP at its best step, less that on LoRA at the same held-out loss."""
    says, compared = "audits, AUC of shadow attacks, SMP - LoRA at the same held-out loss", None
    for audit in found.audits.get("smp", [])[:1]:
        step = audit["steps"][best_step(audit)]
        compared = at_equal_loss(step, found.audits.get("lora", []))
    if compared is None:
        return Part(says, "-", "-", None)
    change = compared.change
    return Part(
        says, SHADOWED.cell(change, signed=True), f"{len(change.seeds)} pairs", lower(change)
    )


# --------------------------------------------------------------------------------------------------
# The claims


def claims(found: Results) -> list[Claim]:
    """All seven, measured or not."""
    paper, attacks, quality = PAPER[DATA], (PROXY, COMBINED), (PICTURES, LOSS)
    rate = {
        method: f"ASR {100 * f['asr']:.1f} %, folded AUC {f['folded']:g}"
        for method, f in paper.items()
    }
    fid = {method: f"{f['fid']:g}" for method, f in paper.items()}
    lora = measured(found, "", attacks, {"lora": 1.0}, leaks)
    mp = measured(found, " at chance", attacks, {"mp": 1.0}, at_chance)
    mp += measured(found, ", MP - LoRA", quality, {"mp": 1.0, "lora": -1.0}, higher)
    smp = measured(found, " at chance", attacks, {"smp": 1.0}, at_chance)
    middle = {"smp": 1.0, "lora": -0.5, "mp": -0.5}
    smp += measured(found, ", SMP - the middle of LoRA and MP", quality, middle, lower)
    curves, equal, of_shadows = follows(found), equal_loss(found), shadows(found)
    matched = against(found, "mp-matched", "MP at SMP's mean weight")
    early = against(found, "lora-best", "LoRA at its best held-out loss")
    stopped = worst(better(early), equal.side)
    c2 = f"{rate['mp']}; FID {fid['lora']} to {fid['mp']}"
    c3 = f"{rate['smp']}; FID {fid['lora']} to {fid['smp']}"
    c4 = f"r {CORRELATIONS['smp']:.2f} and {CORRELATIONS['mp']:.2f}"
    c5 = f"MP at the same lambda: FID {fid['smp']} to {fid['mp']}"
    norms = "the Hessian's norm follows the gradient's for SMP, and not for MP"
    return [
        Claim("C1", "LoRA leaks", rate["lora"], lora, some(lora)),
        Claim("C2", "MP protects, and ruins the model", c2, mp, every(mp)),
        Claim("C3", "SMP protects, and keeps the model", c3, smp, every(smp)),
        Claim("C4", norms, c4, curves, every(curves)),
        Claim("C5", "it is the ratio, not a smaller lambda", c5, matched, better(matched)),
        Claim("C6", "SMP is better than stopping early", "-", [*early, equal], stopped),
        Claim("C7", "SMP survives shadow models", "-", of_shadows, every(of_shadows)),
    ]
