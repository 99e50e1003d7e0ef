"""Several attacks, several models, several seeds: which figure to report, and what differs.

Tested in tests/test_roc.py: DeLong's variance against a loop over pairs, and intervals against the
share of simulations that they cover (bench/coverage.py).
"""

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

from curves import roc

ROUNDS = 1000  # permutations of the labels


# --------------------------------------------------------------------------------------------------
# Several attacks, several models


def delong(scores: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """AUCs (K,) of K (member, nonmember) on the same images, and their covariance (K, K):
    cov(placements of members) / M + cov(placements of non-members) / N (DeLong, DeLong and
    Clarke-Pearson 1988).
    """
    above, below = (np.array(v) for v in zip(*(roc.placements(*s) for s in scores), strict=True))
    centred = [v - v.mean(1, keepdims=True) for v in (above, below)]
    parts = [v @ v.T / (v.shape[1] * max(v.shape[1] - 1, 1)) for v in centred]
    return above.mean(1), parts[0] + parts[1]


def headline(known: dict[str, tuple], test: dict[str, tuple]) -> dict:
    """What is to be reported: the attack that does best on images that the attacker knows,
    {attack: (member, nonmember)}, and its AUC and interval on the test images.

    Best is the highest lower end of the AUC's interval, since attacks fitted to some of the known
    images are judged on the few others.  The choice has not seen the test images, so the interval
    covers as that of one attack.  Attacks without test scores are left out.
    """
    least = {name: roc.auc_interval(*s)[0] for name, s in known.items() if name in test}
    name = max(least, key=least.get)
    return {
        "attack": name,
        "auc_known": roc.auc(*known[name]),
        "auc": roc.auc(*test[name]),
        "auc_interval": roc.auc_interval(*test[name]),
    }


def permutation_null(scores: dict[str, tuple], rounds: int = ROUNDS, seed: int = 0) -> float:
    """What the highest AUC of all attacks {name: (member, nonmember)} reaches without any leak: the
    95th percentile of that maximum with the labels of the images permuted in `rounds` ways.

    A maximum of many noisy figures lies above 0.5; an attack below this one may be luck.
    """
    rng = np.random.default_rng(seed)
    members, nonmembers = (np.array(s) for s in zip(*scores.values(), strict=True))
    m, n = members.shape[1], nonmembers.shape[1]
    ranks = rankdata(np.concatenate([members, nonmembers], 1), axis=1)  # (K, M + N)
    labels = np.tile(np.arange(m + n) < m, (rounds, 1))
    sums = rng.permuted(labels, axis=1) @ ranks.T  # (R, K)
    null = (sums.max(1) - m * (m + 1) / 2) / (m * n)
    return float(np.percentile(null, 95))


def paired_difference(first: tuple, second: tuple) -> tuple[float, list[float]]:
    """AUC of `first` minus AUC of `second`, an attack named beforehand on the same images (member,
    nonmember), and its interval.

    With d = a - b, the ends l, u of `roc.auc_interval` and the correlation c of a and b by DeLong:

        d - sqrt(x^2 + y^2 - 2 c x y), x = a - l_a, y = u_b - b; above with x = u_a - a, y = b - l_b

    (Zou 2007).
    """
    areas, covariance = delong([first, second])
    low, high = np.array(roc.auc_interval(*(np.array(s) for s in zip(first, second, strict=True))))
    deviation = np.sqrt(covariance[0, 0] * covariance[1, 1])
    c = covariance[0, 1] / deviation if deviation > 0 else 0.0
    down, up = areas - low, high - areas
    change = float(areas[0] - areas[1])
    below = np.sqrt(down[0] ** 2 + up[1] ** 2 - 2 * c * down[0] * up[1])
    above = np.sqrt(up[0] ** 2 + down[1] ** 2 - 2 * c * up[0] * down[1])
    return change, [change - float(below), change + float(above)]


# --------------------------------------------------------------------------------------------------
# Several seeds: other splits, other images, other adapters


def over_seeds(values: list[float], intervals: list[list[float]]) -> tuple[float, list[float]]:
    """The mean of one value per seed, (S,), and its interval, seeds included.

    On either side the larger of two reaches: Student's t on S - 1 degrees of freedom times the
    standard error between the seeds, and the seeds' own 95 % `intervals`, joined as independent.
    Three seeds that differ by .07 (standard deviation) give +-.17; one seed gives its own interval.
    """
    values, ends = np.array(values), np.transpose(intervals)  # (S,), (2, S)
    seeds, mean = len(values), float(np.mean(values))
    between = 0.0
    if seeds > 1:
        between = stdtrit(seeds - 1, (1 + roc.LEVEL) / 2) * values.std(ddof=1) / np.sqrt(seeds)
    within = np.sqrt(((ends - values) ** 2).sum(1)) / seeds
    low, high = np.maximum(between, within).tolist()
    return mean, [mean - low, mean + high]


def pooled(pairs: list[tuple]) -> dict:
    """Mean AUC over seeds, of one (member, nonmember) each, its interval and the AUCs."""
    areas = [roc.auc(*pair) for pair in pairs]
    mean, (low, high) = over_seeds(areas, [roc.auc_interval(*pair) for pair in pairs])
    return {"auc": mean, "auc_interval": [max(low, 0.0), min(high, 1.0)], "auc_by_seed": areas}


def pooled_difference(pairs: list[tuple]) -> tuple[float, list[float]]:
    """Mean over seeds of AUC(first) - AUC(second) of [(first, second), ...], both on the images of
    that seed; the interval includes the seeds.
    """
    found = [paired_difference(first, second) for first, second in pairs]
    return over_seeds([change for change, _ in found], [interval for _, interval in found])
