"""Figures of an attack against scikit-learn, and their behaviour without any signal."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from attacks import comparisons
from bench import coverage
from curves import roc


def scores(seed=0, shift=1.0, n=250):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, 80), rng.normal(0, 1, n)


def test_figures_agree_with_scikit_learn():
    """AUC, balanced ASR and TPR at 5 % FPR by another route; intervals hold the point and narrow
    with data.
    """
    member, nonmember = scores()
    found = roc.summary(member, nonmember, 0.4)
    labels, values = np.r_[np.ones(80), np.zeros(250)], np.r_[member, nonmember]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, values))
    assert found["asr"] == pytest.approx(balanced_accuracy_score(labels, values >= 0.4))
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    assert found["tpr_at_5_fpr"] == pytest.approx(tpr[fpr <= 0.05].max())
    assert found["tpr_at_1_fpr"] is None  # wants 1,000 non-members
    low, high = found["auc_interval"]
    assert low < found["auc"] < high and high - low < 0.2
    wide = roc.summary(member[:8], nonmember[:20], 0.4)["auc_interval"]
    assert wide[1] - wide[0] > high - low


def test_interval_covers_chance():
    """Over 40 pairs of samples without signal, the 95 % interval misses 0.5 rarely."""
    misses = 0
    for seed in range(40):
        member, nonmember = scores(seed, shift=0)
        low, high = roc.auc_interval(member, nonmember)
        misses += not low <= 0.5 <= high
    assert misses <= 7


def test_auc_is_unfolded():
    """Scores that point the wrong way read below 0.5, and the folded figure says how far."""
    member, nonmember = scores(shift=-1)
    found = roc.summary(member, nonmember, 0.0)
    assert found["auc"] < 0.4 and found["auc_folded"] == pytest.approx(1 - 2 * found["auc"])


def test_threshold_is_the_best():
    """No other threshold has a better balanced accuracy."""
    member, nonmember = scores()
    best = roc.balanced_accuracy(member, nonmember, roc.best_threshold(member, nonmember))
    assert best == pytest.approx(
        max(roc.balanced_accuracy(member, nonmember, v) for v in np.r_[member, nonmember])
    )


def test_permutation_null():
    """The highest AUC of many useless attacks stays within it mostly; a real one does not."""
    rng = np.random.default_rng(0)
    exceeded = 0
    for _ in range(20):
        useless = {str(i): (rng.normal(size=40), rng.normal(size=100)) for i in range(8)}
        null = comparisons.permutation_null(useless, rounds=200)
        exceeded += max(roc.auc(*pair) for pair in useless.values()) > null
    real = rng.normal(1, 1, 40), rng.normal(size=100)
    assert exceeded <= 4 and 0.55 < null < roc.auc(*real)


def test_paired_difference_is_tighter_than_unpaired():
    """Two models whose scores move together differ surely where their own intervals overlap."""
    member, nonmember = scores()
    better = member - 0.15
    change, (low, high) = comparisons.paired_difference((better, nonmember), (member, nonmember))
    assert low < change < high < 0
    alone = roc.auc_interval(member, nonmember)
    assert high - low < alone[1] - alone[0]


def test_seeds_pooled():
    """Means over seeds by hand; the interval is Student's t over seeds, at least as wide as what
    their images say; a difference is paired.
    """
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(1, 1, 40), rng.normal(size=100)) for _ in range(4)]
    found, areas = comparisons.pooled(pairs), [roc.auc(*pair) for pair in pairs]
    assert found["auc"] == pytest.approx(np.mean(areas)) and found["auc_by_seed"] == areas
    alone = comparisons.pooled(pairs[:1])["auc_interval"]  # no seeds to compare
    assert alone == pytest.approx(roc.auc_interval(*pairs[0]))
    both = [((m - 0.3, n), (m, n)) for m, n in pairs]
    change, (low, high) = comparisons.pooled_difference(both)
    wanted = np.mean([roc.auc(*first) - roc.auc(*second) for first, second in both])
    assert change == pytest.approx(wanted) and low < change < high < 0


def test_seeds_widen_the_interval():
    """Three seeds .07 apart give +-.174 by scipy's t; three equal ones their own +-.1 / sqrt(3)."""
    values = [0.63, 0.7, 0.77]
    mean, (low, high) = comparisons.over_seeds(values, [[v - 0.01, v + 0.01] for v in values])
    wanted = stats.t.interval(0.95, 2, mean, stats.sem(values))
    assert (low, high) == pytest.approx(wanted) and high - mean == pytest.approx(0.174, abs=1e-3)
    mean, (low, high) = comparisons.over_seeds([0.7] * 3, [[0.6, 0.8]] * 3)
    assert high - mean == pytest.approx(0.1 / np.sqrt(3))
    perfect = comparisons.pooled([(np.arange(8.0) + 9, np.arange(5.0))] * 3)
    assert perfect["auc_interval"][0] < 0.9 and perfect["auc_interval"][1] > 0.999


@pytest.mark.parametrize("m, n", [(40, 200), (10, 50)])
@pytest.mark.parametrize("area", [0.5, 0.75, 0.9, 0.99, 0.998])
def test_auc_interval_covers(m, n, area):
    """The interval holds the true AUC in 95 % of 2,000 simulations (standard error .005), with
    equal and unequal variances; conservative at .99 and above.  The percentile bootstrap has .85 at
    .99 and .78 at .998.
    """
    for spread in (1.0, 0.5, 2.0):
        covered, width = coverage.auc_coverage(area, spread, m, n, 2000)
        assert 0.92 < covered < (0.98 if area < 0.99 else 0.99), (spread, covered)
        assert width < (0.25 if m == 40 else 0.46)


def test_perfect_separation_has_a_width():
    """No interval of a perfect sample is a point: not with 13 images, not of AUC, ASR, TPR or a
    difference.
    """
    member, nonmember = np.arange(8.0) + 10, np.arange(5.0)
    low, high = roc.auc_interval(member, nonmember)
    assert 0.5 < low < 0.8 and high == pytest.approx(1)
    assert roc.auc_interval(-member, -nonmember) == pytest.approx([1 - high, 1 - low], abs=1e-6)
    found = roc.summary(np.arange(40.0) + 300, np.arange(200.0), 250)
    clopper = stats.binomtest(40, 40).proportion_ci().low
    assert found["tpr_at_5_fpr_interval"] == pytest.approx([clopper, 1], abs=1e-4)
    assert found["asr"] == 1 and 0.94 < found["asr_interval"][0] < 0.97
    none = roc.tpr_interval(np.zeros(40) - 1, np.arange(200.0), 0.05)
    assert none == pytest.approx([0, 1 - clopper], abs=1e-4)
    change, (low, high) = comparisons.paired_difference((member, nonmember), (member, nonmember))
    assert change == 0 and low < -0.1 and high > 0.1
    low, high = roc.auc_interval(np.zeros(8), np.zeros(5))  # all tied
    assert low < 0.45 and high > 0.55


def test_tpr_interval_covers():
    """The TPR's interval is conservative, not degenerate, and counts the threshold's noise."""
    for rate in (0.2, 0.8, 0.995):
        assert coverage.tpr_coverage(rate, 1.0, 40, 200, 0.05, 100) > 0.93
    member, nonmember = scores(shift=1.6)
    alone = stats.binomtest(int((member > 1.645).sum()), 80).proportion_ci()
    assert np.ptp(roc.tpr_interval(member, nonmember, 0.05)) > alone.high - alone.low


def test_delong_against_pairs():
    """Variance and covariance of the AUC by sums over pairs of pairs, ties included."""
    rng = np.random.default_rng(0)
    m, n = 7, 9
    first, second = (
        (rng.integers(0, 6, m).astype(float), rng.integers(0, 5, n).astype(float)) for _ in range(2)
    )
    areas, covariance = comparisons.delong([first, second])
    for i, a in enumerate((first, second)):
        labels, values = np.r_[np.ones(m), np.zeros(n)], np.concatenate(a)
        assert areas[i] == pytest.approx(roc_auc_score(labels, values))
        for j, b in enumerate((first, second)):
            x, y = ([[(p > q) + (p == q) / 2 for q in s[1]] for p in s[0]] for s in (a, b))
            wanted = 0.0
            for k in range(m):
                wanted += (np.mean(x[k]) - areas[i]) * (np.mean(y[k]) - areas[j]) / (m - 1) / m
            for k in range(n):
                one, two = np.mean([r[k] for r in x]), np.mean([r[k] for r in y])
                wanted += (one - areas[i]) * (two - areas[j]) / (n - 1) / n
            assert covariance[i, j] == pytest.approx(wanted)


def test_model_variance_against_simulation():
    """The mean of the variances of exponential and of normal scores, each simulated."""
    rng, area = np.random.default_rng(0), 0.9
    rate = (1 - area) / area  # P(E1 / rate > E2) = 1 / (1 + rate) = area
    samples = [
        (rng.exponential(1 / rate, (20_000, 12)), rng.exponential(1, (20_000, 12))),
        coverage.normal_scores(rng, area, 1.0, (20_000, 12), (20_000, 12)),
    ]
    variances = [roc.placements(*s)[0].mean(-1).var() for s in samples]
    assert roc.model_variance(area, 12, 12) == pytest.approx(np.mean(variances), rel=0.03)


def test_paired_difference_covers():
    """The difference of two models named beforehand holds the truth."""
    for areas, correlation in (((0.9, 0.9), 0.6), ((0.95, 0.8), 0.6), ((0.99, 0.99), 0.0)):
        assert coverage.paired_coverage(areas, correlation, 40, 200, 150) >= 0.91


def test_headline_is_chosen_on_known_images():
    """The attack is that of the known images, the figures those of the test images; the choice does
    not bias them, where the highest test AUC is too high.
    """
    member, nonmember = scores()
    known = {"good": (member, nonmember), "lucky": (nonmember[:80], nonmember)}
    test = {"good": (member - 0.5, nonmember), "lucky": (member, nonmember)}
    found = comparisons.headline(known | {"unknown": (member + 9, nonmember)}, test)
    assert found["attack"] == "good" and found["auc"] == roc.auc(*test["good"])
    assert found["auc_interval"] == roc.auc_interval(*test["good"])
    chosen, own = coverage.choice_coverage(8, 0.0, 60)
    assert chosen > 0.88 and own < 0.9


def test_bad_scores_are_refused():
    """NaN and empty sets raise, by number; a false-positive rate of 1 accepts everything."""
    good, bad = np.arange(4.0), np.array([0.0, np.nan, np.nan])
    for figure in (roc.auc, roc.auc_interval, roc.best_threshold):
        with pytest.raises(ValueError, match="2 of 3 member scores are NaN"):
            figure(bad, good)
        with pytest.raises(ValueError, match="no non-member score"):
            figure(good, good[:0])
    with pytest.raises(ValueError, match="2 of 3 non-member scores"):
        roc.tpr_at(good, bad, 0.5)
    assert roc.tpr_at(good, good, 1) == 1 and roc.tpr_at(good, good, 0) == 0
