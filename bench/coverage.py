"""How often the intervals of curves/roc.py and attacks/decisions.py hold the truth in simulations.

    python bench/coverage.py                     # about a minute on one core
    python bench/coverage.py --repetitions 1000  # a quick look

Scores are normal, those of members with a standard deviation of `spread` times the non-members',
shifted to a known AUC or TPR.  0.95 is wanted of a 95 % interval; --repetitions counts for the AUC,
whose simulations run as one array, and the others have a tenth of it.  No model is needed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from scipy.special import ndtr, ndtri

from attacks import comparisons
from attacks.decisions import TOGETHER, Decisions
from curves import roc

AREAS = (0.5, 0.75, 0.9, 0.99, 0.998)
SIZES = ((40, 200), (10, 50), (8, 5))
SPREADS = (1.0, 0.5, 2.0)


def normal_scores(rng, area: float, spread: float, member: tuple, nonmember: tuple):
    """Scores of the shapes `member` and `nonmember` whose true AUC is `area`."""
    shift = ndtri(area) * np.sqrt(1 + spread**2)
    return rng.normal(shift, spread, member), rng.normal(0, 1, nonmember)


def auc_coverage(area, spread, m, n, repetitions, seed=0) -> tuple[float, float]:
    """Coverage and mean width of `roc.auc_interval`."""
    rng = np.random.default_rng(seed)
    scores = normal_scores(rng, area, spread, (repetitions, m), (repetitions, n))
    low, high = np.array(roc.auc_interval(*scores))
    return float(((low <= area) & (area <= high)).mean()), float((high - low).mean())


def tpr_coverage(rate, spread, m, n, fpr, repetitions, seed=0) -> float:
    """Coverage of `roc.tpr_interval` where `rate` of members lie above the threshold of `fpr`."""
    rng, held = np.random.default_rng(seed), 0
    shift = -ndtri(fpr) + spread * ndtri(rate)
    for _ in range(repetitions):
        low, high = roc.tpr_interval(rng.normal(shift, spread, m), rng.normal(size=n), fpr)
        held += low <= rate <= high
    return held / repetitions


def correlated(rng, areas: np.ndarray, correlation: float, m: int, n: int) -> list[tuple]:
    """Scores of several attacks on the same images."""
    share, own = np.sqrt(correlation), np.sqrt(1 - correlation)
    member, nonmember = (
        share * rng.normal(size=(k, 1)) + own * rng.normal(size=(k, len(areas))) for k in (m, n)
    )
    return list(zip((member + np.sqrt(2) * ndtri(areas)).T, nonmember.T, strict=True))


def paired_coverage(areas, correlation, m, n, repetitions, seed=0) -> float:
    """Coverage of `comparisons.paired_difference` of two attacks with these true AUCs."""
    rng, held = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        pair = correlated(rng, np.array(areas), correlation, m, n)
        _, (low, high) = comparisons.paired_difference(*pair)
        held += low <= areas[0] - areas[1] <= high
    return held / repetitions


def choice_coverage(count, correlation, repetitions, seed=0) -> tuple[float, float]:
    """Of `count` attacks with a true AUC of .75, 40 / 200 images: coverage of `headline`, and of
    the interval of the attack with the highest AUC, which holds no choice.
    """
    rng, held = np.random.default_rng(seed), np.zeros(2)
    areas = np.full(count, 0.75)
    for _ in range(repetitions):
        known, test = (
            dict(enumerate(correlated(rng, areas, correlation, 40, 200))) for _ in range(2)
        )
        highest = max(test.values(), key=lambda scores: roc.auc(*scores))
        found = comparisons.headline(known, test)["auc_interval"], roc.auc_interval(*highest)
        held += [low <= 0.75 <= high for low, high in found]
    return tuple(held / repetitions)


def seeds_coverage(area, deviation, seeds, repetitions, seed=0) -> float:
    """Coverage of `comparisons.pooled`, the mean over seeds, whose shift differs by `deviation`."""
    rng, held = np.random.default_rng(seed), 0
    shift = ndtri(area)
    true = ndtr(shift / np.sqrt(1 + deviation**2))
    for _ in range(repetitions):
        each = ndtr(shift + deviation * rng.normal(size=seeds))
        runs = [normal_scores(rng, own, 1.0, (40,), (200,)) for own in each]
        low, high = comparisons.pooled(runs)["auc_interval"]
        held += low <= true <= high
    return held / repetitions


def together_coverage(shift, spread, adapters, repetitions, seed=0) -> float:
    """Coverage of `Decisions.together`: 200 images, each shifted by its own amount as a member."""
    rng, held = np.random.default_rng(seed), 0
    truth = ndtr(shift * np.sqrt(TOGETHER / (2 + spread**2)))
    for _ in range(repetitions):
        halves = [rng.permutation(200) < 100 for _ in range(adapters // 2)]
        member = np.concatenate([[half, ~half] for half in halves])
        score = rng.normal(size=member.shape) + rng.normal(shift, spread, 200) * member
        low, high = Decisions(member).together(score)["auc_interval"]
        held += low <= truth <= high
    return held / repetitions


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5000)
    count = parser.parse_args().repetitions
    print("AUC: coverage (mean width)" + "".join(f"{a:>15}" for a in AREAS))
    for m, n in SIZES:
        for spread in SPREADS:
            cells = [auc_coverage(a, spread, m, n, count) for a in AREAS]
            text = "".join(f"{c:>8.3f} ({w:.3f})" for c, w in cells)
            print(f"  {m:>2} / {n:<4} spread {spread:<7}{text}", flush=True)
    count //= 10
    rates = (0.05, 0.2, 0.5, 0.8, 0.95, 0.995)
    print("TPR" + "".join(f"{r:>10}" for r in rates))
    for m, n, fpr in ((40, 200, 0.05), (10, 200, 0.05), (40, 1000, 0.01)):
        cells = [tpr_coverage(r, 1.0, m, n, fpr, count) for r in rates]
        print(f"  {m} / {n} at {fpr:.0%}: " + "  ".join(f"{c:.3f}" for c in cells), flush=True)
    print("paired difference, 40 / 200, correlation of scores 0, .6, .95")
    for areas in ((0.75, 0.6), (0.9, 0.9), (0.95, 0.8), (0.99, 0.9), (0.99, 0.99)):
        cells = [paired_coverage(areas, c, 40, 200, count) for c in (0.0, 0.6, 0.95)]
        print(f"  {areas}: " + "  ".join(f"{c:.3f}" for c in cells), flush=True)
    print("equally good attacks: headline, the highest one's own interval")
    for attacks, correlation in ((8, 0.0), (8, 0.8), (20, 0.9)):
        chosen, highest = choice_coverage(attacks, correlation, count // 3)
        print(f"  {attacks} at {correlation}: {chosen:.3f}  {highest:.3f}", flush=True)
    print("three seeds")
    for area, deviation in ((0.75, 0.0), (0.75, 0.25), (0.99, 0.0), (0.99, 0.25)):
        found = seeds_coverage(area, deviation, 3, count // 3)
        print(f"  AUC {area}, shift +-{deviation}: {found:.3f}")
    print("ten images at once, 8 and 16 adapters")
    for shift, spread in ((0.0, 0.0), (0.3, 0.4), (0.66, 0.6), (1.1, 0.6)):
        found = [together_coverage(shift, spread, n, count // 3) for n in (8, 16)]
        print(f"  shift {shift}+-{spread}: " + "  ".join(f"{c:.3f}" for c in found), flush=True)


if __name__ == "__main__":
    main()
