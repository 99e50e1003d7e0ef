"""How well an attack tells members from non-members: AUC, ASR, TPR at low FPR, their intervals and
their controls.

Scores are one number per image, higher = member.  Everything is unfolded: an AUC below 0.5 says
that the scores point the wrong way, which an attacker who knows it can use.  Held by
tests/test_roc.py to scikit-learn and to simulated scores without signal."""

import numpy as np
from scipy.stats import rankdata

FPRS = (0.05, 0.01, 0.001)
PER_FPR = 10  # TPR at a false-positive rate f wants at least 10 / f non-members


def comparisons(member: np.ndarray, nonmember: np.ndarray) -> np.ndarray:
    """(M, N): 1 where the member scores above the non-member, 1/2 for ties.  Its mean is the
    AUC."""
    return (member[:, None] > nonmember) + 0.5 * (member[:, None] == nonmember)


def auc(member: np.ndarray, nonmember: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a member scores above a non-member
    (Mann-Whitney)."""
    return float(comparisons(member, nonmember).mean())


def balanced_accuracy(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> float:
    """The paper's ASR on equal halves: mean of the true-positive and the true-negative rate at
    `threshold`."""
    return float(((member >= threshold).mean() + (nonmember < threshold).mean()) / 2)


def best_threshold(member: np.ndarray, nonmember: np.ndarray) -> float:
    """The threshold of the best balanced accuracy; for validation scores only."""
    values = np.unique(np.r_[member, nonmember])
    cuts = np.r_[values, np.inf]
    return float(cuts[np.argmax([balanced_accuracy(member, nonmember, c) for c in cuts])])


def tpr_at(member: np.ndarray, nonmember: np.ndarray, fpr: float) -> np.ndarray | float:
    """True-positive rate at a false-positive rate of at most `fpr`; scores (..., M) and (...,
    N)."""
    allowed = int(
        np.floor(fpr * nonmember.shape[-1] + 1e-9)
    )  # so many non-members may score above the threshold
    threshold = np.sort(nonmember, axis=-1)[..., -1 - allowed]
    return (member > threshold[..., None]).mean(-1)


def hits(member: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """True-positive rate at each threshold: the share of member scores (M,) at or above `cuts`
    (K,)."""
    return 1 - np.searchsorted(np.sort(member), cuts, side="left") / len(member)


# --------------------------------------------------------------------------------------------------
# Intervals


class Bootstrap:
    """A stratified bootstrap over images: the same resampled images for every attack and every
    model."""

    def __init__(self, members: int, nonmembers: int, rounds: int = 1000, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.member = rng.integers(members, size=(rounds, members))  # (R, M)
        self.nonmember = rng.integers(nonmembers, size=(rounds, nonmembers))  # (R, N)
        self.counts = _counts(self.member, members), _counts(self.nonmember, nonmembers)

    def auc(self, member: np.ndarray, nonmember: np.ndarray) -> np.ndarray:
        """(R,) AUCs of the resampled scores."""
        m, n = self.counts
        return ((m @ comparisons(member, nonmember)) * n).sum(1) / (len(member) * len(nonmember))

    @staticmethod
    def interval(values: np.ndarray) -> list[float]:
        """The central 95 % of (R,) values."""
        return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def _counts(index: np.ndarray, n: int) -> np.ndarray:
    """(R, n): how often each of n images was drawn."""
    counts = np.zeros((len(index), n), np.float32)
    np.add.at(counts, (np.arange(len(index))[:, None], index), 1)
    return counts


def summary(
    member: np.ndarray, nonmember: np.ndarray, threshold: float | None, bootstrap: Bootstrap
) -> dict:
    """AUC, |AUC - 0.5| / 0.5 as in the paper, balanced ASR at a given threshold, and TPR at 5, 1
    and 0.1 % FPR.

    Each with its 95 % interval; a TPR for which there are too few non-members is None.
    """
    area = auc(member, nonmember)
    found: dict = {"members": len(member), "nonmembers": len(nonmember), "auc": area}
    found["auc_interval"] = bootstrap.interval(bootstrap.auc(member, nonmember))
    found["auc_folded"] = abs(area - 0.5) / 0.5
    m, n = member[bootstrap.member], nonmember[bootstrap.nonmember]
    if threshold is not None:
        found["asr"] = balanced_accuracy(member, nonmember, threshold)
        found["asr_interval"] = bootstrap.interval(
            ((m >= threshold).mean(1) + (n < threshold).mean(1)) / 2
        )
    found["majority"] = max(len(member), len(nonmember)) / (len(member) + len(nonmember))
    for fpr in FPRS:
        key, enough = f"tpr_at_{fpr * 100:g}_fpr", len(nonmember) * fpr >= PER_FPR
        found[key] = float(tpr_at(member, nonmember, fpr)) if enough else None
        found[f"{key}_interval"] = bootstrap.interval(tpr_at(m, n, fpr)) if enough else None
    return found


# --------------------------------------------------------------------------------------------------
# Several attacks, several models


def worst_case(scores: dict[str, tuple], bootstrap: Bootstrap, seed: int = 0) -> dict:
    """The highest AUC over attacks {name: (member, nonmember)}, with the interval of that maximum.

    A maximum of many noisy figures lies above 0.5 without any leak.  `null` is the 95th percentile
    of the same maximum with the labels of the images permuted: what no leakage at all looks like.
    """
    areas = {name: auc(*s) for name, s in scores.items()}
    name = max(areas, key=areas.get)
    draws = np.max([bootstrap.auc(*s) for s in scores.values()], axis=0)
    rng, m = np.random.default_rng(seed), len(next(iter(scores.values()))[0])
    ranks = [rankdata(np.concatenate(s)) for s in scores.values()]
    n = len(ranks[0]) - m
    null = []
    for _ in range(len(draws)):
        pick = rng.permutation(m + n)[:m]
        null.append(max((r[pick].sum() - m * (m + 1) / 2) / (m * n) for r in ranks))
    return {
        "attack": name,
        "auc": areas[name],
        "auc_interval": bootstrap.interval(draws),
        "null": float(np.percentile(null, 95)),
    }


def paired_difference(
    first: tuple, second: tuple, bootstrap: Bootstrap
) -> tuple[float, list[float]]:
    """AUC of `first` minus AUC of `second` on the same images (member, nonmember), with a paired
    bootstrap."""
    draws = bootstrap.auc(*first) - bootstrap.auc(*second)
    return auc(*first) - auc(*second), bootstrap.interval(draws)


# --------------------------------------------------------------------------------------------------
# Several seeds: other splits, other images, other adapters


def _over_seeds(pairs: list[tuple], rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each seed's (member, nonmember), (S,), and its bootstrap draws, (S, R); seeds are
    drawn independently."""
    draws = [Bootstrap(len(m), len(n), rounds, seed).auc(m, n) for seed, (m, n) in enumerate(pairs)]
    return np.array([auc(*pair) for pair in pairs]), np.array(draws)


def pooled_worst(seeds: list[dict[str, tuple]], rounds: int = 1000) -> dict:
    """The attack with the highest AUC on average over seeds, each {attack: (member, nonmember)}.

    The interval is that of the maximum, over the images of each seed; `auc_by_seed` shows how far
    seeds are apart, each at its own worst attack, which the interval does not hold."""
    found = {
        name: _over_seeds([s[name] for s in seeds], rounds)
        for name in seeds[0]
        if all(name in s for s in seeds)
    }
    name = max(found, key=lambda n: found[n][0].mean())
    return {
        "attack": name,
        "auc": float(found[name][0].mean()),
        "auc_interval": Bootstrap.interval(
            np.max([draws.mean(0) for _, draws in found.values()], axis=0)
        ),
        "auc_by_seed": np.max([areas for areas, _ in found.values()], axis=0).tolist(),
    }


def pooled_difference(
    pairs: list[tuple[tuple, tuple]], rounds: int = 1000
) -> tuple[float, list[float]]:
    """Mean over seeds of AUC(first) - AUC(second) of [(first, second), ...], both on the images of
    that seed."""
    (first, one), (second, two) = (_over_seeds([p[k] for p in pairs], rounds) for k in (0, 1))
    return float((first - second).mean()), Bootstrap.interval((one - two).mean(0))
