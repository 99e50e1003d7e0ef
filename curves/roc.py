"""How well an attack tells members from non-members: AUC, ASR, TPR at low FPR, their intervals and
their controls.

Scores are one number per image, higher = member.  Everything is unfolded: an AUC below 0.5 says
that the scores point the wrong way, which an attacker who knows it can use.  Empty sets and NaN
scores raise ValueError.  Intervals are of 95 % and never of zero width.  tests/test_roc.py holds
the figures to scikit-learn, and the intervals to the share of simulations that they cover
(bench/coverage.py).
"""

import numpy as np
from scipy.special import betainc, ndtri, owens_t, stdtrit
from scipy.stats import binom, binomtest, rankdata

FPRS = (0.05, 0.01, 0.001)
PER_FPR = 10  # TPR at a false-positive rate f wants at least 10 / f non-members
LEVEL = 0.95


def checked(member: np.ndarray, nonmember: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets of scores as arrays; raises ValueError if one is empty or holds NaN."""
    member, nonmember = np.asarray(member), np.asarray(nonmember)
    for name, scores in (("member", member), ("non-member", nonmember)):
        if scores.shape[-1] == 0:
            raise ValueError(f"there is no {name} score")
        if bad := int(np.isnan(scores).sum()):
            raise ValueError(f"{bad} of {scores.size} {name} scores are NaN")
    return member, nonmember


def placements(member: np.ndarray, nonmember: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(..., M) the share of non-members below each member and (..., N) the share of members above
    each non-member, ties counting half.
    """
    member, nonmember = checked(member, nonmember)
    m, n = member.shape[-1], nonmember.shape[-1]
    ranks = rankdata(np.concatenate([member, nonmember], -1), axis=-1)
    above = (ranks[..., :m] - rankdata(member, axis=-1)) / n
    return above, 1 - (ranks[..., m:] - rankdata(nonmember, axis=-1)) / m


def auc(member: np.ndarray, nonmember: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a member scores above a non-member
    (Mann-Whitney).
    """
    member, nonmember = checked(member, nonmember)
    m, n = len(member), len(nonmember)
    ranks = rankdata(np.concatenate([member, nonmember]))[:m]
    # sums of halves are exact, so equal orders have equal areas to the last bit
    return float((ranks.sum() - m * (m + 1) / 2) / (m * n))


def balanced_accuracy(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> float:
    """The paper's ASR on equal halves: mean of the true-positive and the true-negative rate at
    `threshold`.
    """
    member, nonmember = checked(member, nonmember)
    return float(((member >= threshold).mean() + (nonmember < threshold).mean()) / 2)


def best_threshold(member: np.ndarray, nonmember: np.ndarray) -> float:
    """The threshold of the best balanced accuracy; for validation scores only."""
    values = np.unique(np.r_[member, nonmember])
    cuts = np.r_[values, np.inf]
    return float(cuts[np.argmax([balanced_accuracy(member, nonmember, c) for c in cuts])])


def tpr_at(member: np.ndarray, nonmember: np.ndarray, fpr: float) -> float:
    """The true-positive rate at a false-positive rate of at most `fpr`."""
    member, nonmember = checked(member, nonmember)
    allowed = int(np.floor(fpr * len(nonmember) + 1e-9))  # non-members above the threshold
    if allowed >= len(nonmember):
        return 1.0
    return float((member > np.sort(nonmember)[-1 - allowed]).mean())


def hits(member: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """True-positive rate at each threshold: the share of member scores (M,) at or above `cuts`
    (K,).
    """
    return 1 - np.searchsorted(np.sort(member), cuts, side="left") / len(member)


# --------------------------------------------------------------------------------------------------
# Intervals of one figure


def _crossing(outside, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where `outside` (elementwise, true at `low` and false at `high`) changes, by bisection."""
    for _ in range(30):
        middle = (low + high) / 2
        out = outside(middle)
        low, high = np.where(out, middle, low), np.where(out, high, middle)
    return (low + high) / 2


def model_variance(area: np.ndarray, m: int, n: int) -> np.ndarray:
    """Variance of the AUC of m members and n non-members if the true one is `area` = A:

        [A (1 - A) + (m + n - 2) P(A)] / (m n),

    P being the variance of a placement: the mean of that of two exponentials (Hanley and McNeil
    1982, in Newcombe's form of 2006) and that of two normals of equal variance.  Near A = 1 the
    former is too wide and the latter too narrow.
    """
    square = area**2
    exponentials = (area / (2 - area) + 2 * square / (1 + area)) / 2 - square
    normals = area - 2 * owens_t(ndtri(area), 1 / np.sqrt(3)) - square
    return (area * (1 - area) + (m + n - 2) * (exponentials + normals) / 2) / (m * n)


def auc_interval(member: np.ndarray, nonmember: np.ndarray) -> list:
    """[low, high] of the AUC a of scores (..., M) and (..., N): all A with

        (a - A)^2 <= t^2 r model_variance(A),

    a score interval (Newcombe 2006, method 5) whose variance is scaled to the scores: r is the
    variance of DeLong et al. (1988) over the model's, both at a, to the power k / (k + 1/2), where
    k = 2 min(M, N) min(a, 1 - a) says on how many misplaced images r rests.  Perfect separation has
    k = 0: r is 1 and the width that of the model.  t is Student's at twice Welch's degrees of
    freedom, since placements are bounded and their variance is steadier than that of normals.

    Coverage at 95 %, 40 / 200 and 10 / 50 images, normal scores of equal and unequal variance: .93
    to .975, at AUC .998 up to .98: a perfect sample, not rare there, may not exclude .998, so that
    only the upper end can miss.  Members with a long lower tail (Gumbel) at .99: .92.
    """
    above, below = placements(member, nonmember)
    m, n, area = above.shape[-1], below.shape[-1], above.mean(-1)
    x, y = (v.var(-1) / max(v.shape[-1] - 1, 1) for v in (above, below))
    expected, misplaced = model_variance(area, m, n), 2 * min(m, n) * np.minimum(area, 1 - area)
    known = (x + y > 0) & (expected > 0)
    ratio = np.divide(x + y, expected, out=np.ones_like(area), where=known)
    ratio = np.maximum(ratio, 0.1) ** (misplaced / (misplaced + 0.5))
    welch = x**2 / max(m - 1, 1) + y**2 / max(n - 1, 1)
    least = np.full_like(area, max(min(m, n) - 1, 1))
    freedom = 2 * np.divide((x + y) ** 2, welch, out=least, where=welch > 0)
    reach = stdtrit(freedom, (1 + LEVEL) / 2) ** 2 * ratio

    def outside(value):
        return (area - value) ** 2 > reach * model_variance(value, m, n)

    ends = (_crossing(outside, np.full_like(area, end), area) for end in (0.0, 1.0))
    return [end.tolist() for end in ends]


def tpr_interval(member: np.ndarray, nonmember: np.ndarray, fpr: float) -> list[float]:
    """[low, high] of the true-positive rate at the threshold whose true false-positive rate is
    `fpr`.

    j of N non-members lie above that threshold, j ~ Binomial(N, fpr), and then h_j of M members.
    The limits are the quantiles of Clopper and Pearson's beta distributions, Beta(h_j, M - h_j + 1)
    and Beta(h_j + 1, M - h_j), mixed over j.  Conservative: coverage .97 to .99.
    """
    member, nonmember = (np.sort(s) for s in checked(member, nonmember))
    m, n = len(member), len(nonmember)
    j = np.arange(n + 1)
    weight = binom.pmf(j, n, fpr)
    # between the j-th and the next highest non-member, the middle of the two counts
    above = m - np.searchsorted(member, nonmember[::-1], side="right")
    h = (np.r_[0, above] + np.r_[above, m])[weight > 1e-9] / 2
    weight = weight[weight > 1e-9]

    def quantile(a, b, q):
        # a beta distribution whose parameter is 0 is the point 0 or the point 1
        a, b = np.maximum(a, 1e-12), np.maximum(b, 1e-12)
        return _crossing(lambda p: weight @ betainc(a, b, p) < q * weight.sum(), 0.0, 1.0)

    low, high = quantile(h, m - h + 1, (1 - LEVEL) / 2), quantile(h + 1, m - h, (1 + LEVEL) / 2)
    return [float(low), float(high)]


def asr_interval(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> list[float]:
    """[low, high] of the balanced accuracy at a threshold chosen elsewhere: the Wilson intervals of
    the two rates, joined as in Newcombe (1998), method 10.
    """
    low = high = 0.0
    for hit in (member >= threshold, nonmember < threshold):
        ends = binomtest(int(hit.sum()), len(hit)).proportion_ci(LEVEL, "wilson")
        low += (hit.mean() - ends.low) ** 2
        high += (hit.mean() - ends.high) ** 2
    value = balanced_accuracy(member, nonmember, threshold)
    return [float(value - np.sqrt(low) / 2), float(value + np.sqrt(high) / 2)]


# --------------------------------------------------------------------------------------------------
# All figures of one attack


def figures(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> dict:
    """The paper's figures of one attack: AUC, |AUC - 0.5| / 0.5, balanced ASR at `threshold`, and
    TPR at 5, 1 and 0.1 % FPR, which is None where there are too few non-members for it.
    """
    m, n, area = len(member), len(nonmember), auc(member, nonmember)
    found = {"members": m, "nonmembers": n, "auc": area, "auc_folded": abs(area - 0.5) / 0.5}
    found["asr"] = balanced_accuracy(member, nonmember, threshold)
    found["majority"] = max(m, n) / (m + n)
    for fpr in FPRS:
        enough = n * fpr >= PER_FPR
        found[f"tpr_at_{fpr * 100:g}_fpr"] = tpr_at(member, nonmember, fpr) if enough else None
    return found


def intervals(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> dict:
    """The 95 % intervals of `figures`."""
    found = {
        "auc_interval": auc_interval(member, nonmember),
        "asr_interval": asr_interval(member, nonmember, threshold),
    }
    for fpr in FPRS:
        enough = len(nonmember) * fpr >= PER_FPR
        interval = tpr_interval(member, nonmember, fpr) if enough else None
        found[f"tpr_at_{fpr * 100:g}_fpr_interval"] = interval
    return found


def summary(member: np.ndarray, nonmember: np.ndarray, threshold: float) -> dict:
    """Figures of one attack with their intervals."""
    return figures(member, nonmember, threshold) | intervals(member, nonmember, threshold)
