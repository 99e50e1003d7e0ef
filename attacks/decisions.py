"""Figures of N x P decisions: N adapters, each asked about the P images of a pool.

    decisions = Decisions(member)                  # (N, P) bool: who trained on what
    figures = decisions.figures(score)             # (N, P), higher = member

An image comes N times, so the bootstrap draws images, each with all its decisions; how far adapters
are apart is stated beside it.  Where the bootstrap is narrower than the interval of independent
decisions, as at perfect separation, where it has no width, that interval is taken.  Tested in
tests/test_audit.py against attacks/roc.py and scipy.
"""

import math

import numpy as np
from scipy.stats import beta, t

from attacks import roc

ROUNDS = 300  # of the bootstrap
ALLOWED = 5  # false positives that a TPR at a low FPR must allow
DELTA = 1e-5  # of the epsilon bound
CAUGHT_AT = 0.01  # FPR at which an image counts as caught


class Decisions:
    """Who trained on what, and which images each round of the bootstrap draws."""

    def __init__(self, member: np.ndarray, seed: int = 0):
        self.member = member  # (N, P)
        images = member.shape[1]
        drawn = np.random.default_rng(seed).multinomial(images, [1 / images] * images, ROUNDS)
        self.weights = np.vstack([np.ones(images, int), drawn])  # (1 + R, P), first as it is

    def rates(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(FPR, TPR) of every threshold from high to low, (1 + R, thresholds + 1) each."""
        values, order = score.ravel(), np.argsort(-score.ravel(), kind="stable")
        weights = self.weights[:, order % score.shape[1]]
        inside = self.member.ravel()[order]
        last = np.append(np.diff(values[order]) != 0, True)  # of those with the same score
        hits, alarms = (
            np.cumsum(weights * side, axis=1)[:, last].astype(float) for side in (inside, ~inside)
        )
        zero = np.zeros((len(weights), 1))
        return tuple(np.hstack([zero, r / r[:, -1:]]) for r in (alarms, hits))

    def auc(self, score: np.ndarray) -> np.ndarray:
        """(1 + R,) areas under the ROC: the first is the figure, the others the bootstrap's."""
        return _area(*self.rates(score))

    def figures(self, score: np.ndarray) -> dict:
        """AUC, TPR at 5, 1 and 0.1 % FPR with 95 % intervals, spread over adapters, epsilon.

        A TPR is None where the FPR allows fewer than ALLOWED false positives.
        """
        alarms, hits = self.rates(score)
        area = _area(alarms, hits)
        pair = score[self.member], score[~self.member]
        found = {"auc": float(area[0])}
        found["auc_interval"] = _wider(_interval(area[1:]), roc.auc_interval(*pair))
        for fpr in roc.FPRS:
            key, enough = f"tpr_at_{fpr * 100:g}_fpr", fpr * (~self.member).sum() >= ALLOWED
            rate = np.where(alarms <= fpr + 1e-9, hits, 0).max(1)
            found[key] = float(rate[0]) if enough else None
            alone = _clopper_pearson(float(rate[0]), int(self.member.sum()))
            found[f"{key}_interval"] = _wider(_interval(rate[1:]), alone) if enough else None
        by_adapter = [roc.auc(s[m], s[~m]) for s, m in zip(score, self.member, strict=True)]
        mean, sd, count = np.mean(by_adapter), np.std(by_adapter, ddof=1), len(by_adapter)
        half = t.ppf(0.975, count - 1) * sd / math.sqrt(count)
        found |= {"auc_by_adapter": by_adapter, "auc_sd": float(sd)}
        found["auc_t_interval"] = [float(mean - half), float(mean + half)]
        return found | {"epsilon": epsilon_bound(score, self.member)}

    def caught(self, score: np.ndarray) -> np.ndarray:
        """(P,) in how many of its memberships an image scores above the threshold of 1 % FPR."""
        outside = np.sort(score[~self.member])
        cut = outside[-1 - math.floor(CAUGHT_AT * len(outside) + 1e-9)]
        return (self.member & (score > cut)).sum(0)


def difference(decisions: Decisions, score: np.ndarray, other: np.ndarray) -> tuple:
    """(AUC of `score` minus that of `other`, its 95 % interval), paired over images."""
    change = decisions.auc(score) - decisions.auc(other)
    return float(change[0]), _interval(change[1:])


def epsilon_bound(score: np.ndarray, member: np.ndarray) -> float:
    """A lower bound on epsilon, at delta = DELTA, from the best (TPR, FPR) (cf. Jagielski 2020).

    epsilon >= log((TPR - delta) / FPR), and the same with the roles of the sides exchanged, by the
    Clopper-Pearson bounds of both rates at 97.5 % each.  The threshold is chosen on every other
    image and read on the rest.  It is not a guarantee that the true epsilon is near, which no
    attack gives; and not a proof either: decisions on one adapter depend on each other, and
    the pool is an average, not the worst data set.
    """
    choose, read = (slice(k, None, 2) for k in (0, 1))
    best = []
    for values, inside in ((score, member), (-score, ~member)):  # the second: surely no member
        cuts = np.unique(values[:, choose])
        bounds = _bounds(values[:, choose], inside[:, choose], cuts)
        cut = cuts[bounds.argmax()]
        best.append((bounds.max(), _bounds(values[:, read], inside[:, read], cut[None])[0]))
    return max(0.0, float(max(best)[1]))


def _bounds(values: np.ndarray, inside: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """log((TPR - delta) / FPR) at each threshold, TPR at its lower and FPR at its upper bound."""
    true, false = ((values[side][:, None] >= cuts).sum(0) for side in (inside, ~inside))
    members, others = inside.sum(), (~inside).sum()
    low = np.where(true, beta.ppf(0.025, np.maximum(true, 1), members - true + 1), 0)
    high = np.where(false < others, beta.ppf(0.975, false + 1, np.maximum(others - false, 1)), 1)
    return np.log(np.maximum(low - DELTA, 1e-12) / high)


def _area(alarms: np.ndarray, hits: np.ndarray) -> np.ndarray:
    return (np.diff(alarms, axis=1) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(1)


def _wider(first: list[float], second: list[float]) -> list[float]:
    return [min(first[0], second[0]), max(first[1], second[1])]


def _clopper_pearson(rate: float, count: int) -> list[float]:
    """The 95 % interval of a rate among `count` independent decisions."""
    hits = round(rate * count)
    low = beta.ppf(0.025, hits, count - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, count - hits) if hits < count else 1.0
    return [float(low), float(high)]


def _interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]
