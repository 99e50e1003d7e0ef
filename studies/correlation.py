"""Correlation of two series of a run, and of several runs.  The intervals know that neighbours in a
run are alike.

Tested in tests/test_smoothness_study.py: r to scipy, intervals to the share of simulated runs that
they cover, the pooled one to a loop.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import pearsonr

LEAST = 3.1  # effective points below which Fisher's interval is everything


@dataclass
class Correlation:
    """Pearson's r of two series of one run, and how far it can be trusted."""

    r: float
    p: float  # two-sided, for independent points, as the paper's
    points: int
    effective_points: float  # after the autocorrelation of both series; the interval is of these
    interval: tuple[float, float]  # 95 %
    warning: str | None


def correlation(x, y, enough: int = 30) -> Correlation:
    """Pearson correlation with p-value, interval and a warning where the points are too few to say
    much.

    Neighbouring points of a run are alike, so n points count for n (1 - a b) / (1 + a b), a and b
    being the lag-one autocorrelations (Bretherton et al. 1999).  The interval is Fisher's; with 30
    points it is about +-0.36 wide at r = 0.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    if n < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        warning = "too few or constant points: no correlation"
        return Correlation(np.nan, np.nan, n, 0.0, (-1.0, 1.0), warning)
    r, p = pearsonr(x, y)
    alike = _lag_one(x) * _lag_one(y)
    effective = float(n * (1 - alike) / (1 + alike))
    half = 1.96 / np.sqrt(effective - 3) if effective > LEAST else np.inf
    interval = (float(np.tanh(_z(r) - half)), float(np.tanh(_z(r) + half)))
    few = f"{n} points count for {effective:.0f} independent ones, fewer than {enough}"
    return Correlation(
        float(r), float(p), n, effective, interval, few if effective < enough else None
    )


def _lag_one(series: np.ndarray) -> float:
    """Autocorrelation of neighbours, 0 where it is negative or the series is constant."""
    if np.ptp(series[:-1]) == 0 or np.ptp(series[1:]) == 0:
        return 0.0
    return max(0.0, np.corrcoef(series[:-1], series[1:])[0, 1])


def _z(r: float) -> float:
    """Fisher's transform, finite also at 1."""
    return float(np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)))


@dataclass
class Pooled:
    """The correlation over several runs: Fisher's z and its standard error."""

    z: float
    error: float  # infinite where no run has enough points
    runs: int  # that have
    effective_points: float  # of all runs together

    @property
    def r(self) -> float:
        """The pooled correlation."""
        return float(np.tanh(self.z))

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        low, high = self.z - 1.96 * self.error, self.z + 1.96 * self.error
        return float(np.tanh(low)), float(np.tanh(high))

    @property
    def side(self) -> int:
        """1 where the one series follows the other, -1 where it runs against it, 0 if not told."""
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def pooled(runs: list[Correlation]) -> Pooled:
    """One correlation of several runs, which may differ: random effects over Fisher's z
    (DerSimonian and Laird 1986).

    A run's own variance is 1 / (effective points - 3); where the runs lie further apart than that
    says, the difference is variance too.  Runs with too few points are left out.
    """
    able = [c for c in runs if c.effective_points > LEAST and not np.isnan(c.r)]
    count = float(sum(c.effective_points for c in runs))
    if not able:
        return Pooled(np.nan, np.inf, 0, count)
    z = np.array([_z(c.r) for c in able])
    weight = np.array([c.effective_points - 3 for c in able])
    mean = (weight * z).sum() / weight.sum()
    spread = (weight * (z - mean) ** 2).sum() - (len(able) - 1)  # Q less its expectation
    scale = weight.sum() - (weight**2).sum() / weight.sum()
    between = max(0.0, spread / scale) if len(able) > 1 else 0.0
    weight = 1 / (1 / weight + between)
    mean, error = (weight * z).sum() / weight.sum(), weight.sum() ** -0.5
    return Pooled(float(mean), float(error), len(able), count)


def higher(a: Pooled, b: Pooled) -> int:
    """1 if a's correlation is above b's, -1 if below, 0 if the two are not told apart (95 %)."""
    apart, error = a.z - b.z, np.hypot(a.error, b.error)
    return int(np.sign(apart)) if abs(apart) > 1.96 * error else 0
