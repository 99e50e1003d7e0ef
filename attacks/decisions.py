"""Figures of N x P decisions: N adapters, each asked about the P images of a pool.

    decisions = Decisions(member)                  # (N, P) bool: who trained on what
    figures = decisions.figures(score)             # (N, P), higher = member

An image comes N times, so the bootstrap draws images, each with all its decisions.  How far
adapters are apart is stated beside it.  Where the bootstrap is narrower than the interval of
independent decisions, as at perfect separation, where it has no width, the latter counts as well.
Tested in tests/test_audit.py against curves/roc.py and scipy.
"""

import math

import numpy as np
from scipy.stats import beta, binomtest, norm, t

from curves import roc

ROUNDS = 300  # of the bootstrap
MIN_FALSE_POSITIVES = 5  # that a false-positive rate must allow for its TPR to be stated
TOGETHER = 10  # images that are asked about at once
CAUGHT_FPR = 0.01  # at which an image counts as caught


class Decisions:
    """Who trained on what, and which images each round of the bootstrap draws."""

    def __init__(self, member: np.ndarray, seed: int = 0):
        self.member = member  # (N, P)
        images = member.shape[1]
        drawn = np.random.default_rng(seed).multinomial(images, [1 / images] * images, ROUNDS)
        # (1 + ROUNDS, P) how often an image is drawn; the first row is the pool as it is
        self.weights = np.vstack([np.ones(images, int), drawn])

    def rates(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(FPR, TPR) of every threshold from high to low, each (1 + ROUNDS, thresholds + 1)."""
        values, order = score.ravel(), np.argsort(-score.ravel(), kind="stable")
        weights = self.weights[:, order % score.shape[1]]
        inside = self.member.ravel()[order]
        last = np.append(np.diff(values[order]) != 0, True)  # of those with the same score

        def rate(side: np.ndarray) -> np.ndarray:
            counts = np.cumsum(weights * side, axis=1)[:, last].astype(float)
            return np.hstack([np.zeros((len(weights), 1)), counts / counts[:, -1:]])

        return rate(~inside), rate(inside)

    def auc(self, score: np.ndarray) -> np.ndarray:
        """(1 + ROUNDS,) areas under the ROC: first the figure, then those of the bootstrap."""
        return _area(*self.rates(score))

    def figures(self, score: np.ndarray) -> dict:
        """AUC, TPR at 5, 1 and 0.1 % FPR with 95 % intervals, and the spread over adapters.

        A TPR is None where the FPR allows fewer than MIN_FALSE_POSITIVES.
        """
        fpr, tpr = self.rates(score)
        area = _area(fpr, tpr)
        independent = roc.auc_interval(score[self.member], score[~self.member])
        found = {"auc": float(area[0]), "auc_interval": _wider(_interval(area[1:]), independent)}
        positives = int(self.member.sum())
        for most in roc.FPRS:
            name = f"tpr_at_{most * 100:g}_fpr"
            found |= {name: None, f"{name}_interval": None}
            if most * (~self.member).sum() >= MIN_FALSE_POSITIVES:
                rate = np.where(fpr <= most + 1e-9, tpr, 0).max(1)
                independent = clopper_pearson(round(rate[0] * positives), positives)
                found[name] = float(rate[0])
                found[f"{name}_interval"] = _wider(_interval(rate[1:]), independent)
        by_adapter = [roc.auc(s[m], s[~m]) for s, m in zip(score, self.member, strict=True)]
        mean, sd, count = np.mean(by_adapter), np.std(by_adapter, ddof=1), len(by_adapter)
        half = t.ppf(0.975, count - 1) * sd / math.sqrt(count)
        found |= {"auc_by_adapter": by_adapter, "auc_sd": float(sd)}
        found["mu_bound"] = mu_bound(score, self.member)
        return found | {"auc_t_interval": [float(mean - half), float(mean + half)]}

    def together(self, score: np.ndarray, count: int = TOGETHER) -> dict:
        """AUC with its 95 % interval of an attacker who asks about `count` images at once, all of
        them members or none, by their mean score, taken as normal; the interval is the bootstrap's.
        """

        def moments(side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Mean and variance, each (1 + ROUNDS,)."""
            weights = self.weights[:, None] * side
            mean, square = ((weights * x).sum((1, 2)) for x in (score, score**2))
            total = weights.sum((1, 2))
            return mean / total, square / total - (mean / total) ** 2

        (inside, spread), (outside, other) = moments(self.member), moments(~self.member)
        deviation = np.sqrt((spread + other).clip(1e-12) / count)
        area = norm.cdf((inside - outside) / deviation)
        return {"auc": float(area[0]), "auc_interval": _interval(area[1:])}

    def caught(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) and (P,): how often an image scores above the threshold of CAUGHT_FPR, as a member
        and, a false alarm, as none.
        """
        outside = np.sort(score[~self.member])
        cut = outside[-1 - math.floor(CAUGHT_FPR * len(outside) + 1e-9)]
        return tuple((side & (score > cut)).sum(0) for side in (self.member, ~self.member))


def difference(decisions: Decisions, score: np.ndarray, other: np.ndarray) -> tuple:
    """(AUC of `score` minus that of `other`, its 95 % interval), paired over images."""
    change = decisions.auc(score) - decisions.auc(other)
    return float(change[0]), _interval(change[1:])


def mu_bound(score: np.ndarray, member: np.ndarray) -> float:
    """A lower bound on the mu of Gaussian differential privacy, of 95 % (cf. Nasr et al. 2023).

    mu >= Phi^-1(TPR) - Phi^-1(FPR) at any threshold, TPR at its lower and FPR at its upper
    Clopper-Pearson bound.  The threshold is chosen on every other image and read on the rest.
    Decisions on one adapter depend on each other a little, which the bounds leave out.
    """
    choose, read = (slice(k, None, 2) for k in (0, 1))
    cuts = np.unique(score[:, choose])
    best = cuts[_mu_at(score[:, choose], member[:, choose], cuts).argmax()]
    return max(0.0, float(_mu_at(score[:, read], member[:, read], best[None])[0]))


def _mu_at(score: np.ndarray, member: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The bound at each of some thresholds, -inf where it says nothing."""
    rates = []
    for side, low in ((member, True), (~member, False)):
        count, values = int(side.sum()), np.sort(score[side])
        hits = count - np.searchsorted(values, cuts)  # at or above the threshold
        shape = (hits, count - hits + 1) if low else (hits + 1, count - hits)
        with np.errstate(invalid="ignore"):
            rates.append(np.nan_to_num(beta.ppf(0.025 if low else 0.975, *shape), nan=1 - low))
    return norm.ppf(rates[0]) - norm.ppf(rates[1])


def clopper_pearson(hits: int, count: int) -> list[float]:
    """The exact 95 % interval of a rate with `hits` among `count` independent decisions."""
    return list(binomtest(hits, count).proportion_ci(0.95, "exact"))


def _area(fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    return (np.diff(fpr, axis=1) * (tpr[:, 1:] + tpr[:, :-1]) / 2).sum(1)


def _wider(first: list[float], second: list[float]) -> list[float]:
    return [float(min(first[0], second[0])), float(max(first[1], second[1]))]


def _interval(values: np.ndarray) -> list[float]:
    return np.percentile(values, [2.5, 97.5]).tolist()
