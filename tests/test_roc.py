"""Figures of an attack against scikit-learn, and their behaviour without any signal."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

import roc


def scores(seed=0, shift=1.0, n=250):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, 80), rng.normal(0, 1, n)


def test_figures_agree_with_scikit_learn():
    """AUC, balanced ASR and TPR at 5 % FPR by another route; intervals hold the point and narrow
    with data."""
    member, nonmember = scores()
    found = roc.summary(member, nonmember, 0.4, roc.Bootstrap(80, 250))
    labels, values = np.r_[np.ones(80), np.zeros(250)], np.r_[member, nonmember]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, values))
    assert found["asr"] == pytest.approx(balanced_accuracy_score(labels, values >= 0.4))
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    assert found["tpr_at_5_fpr"] == pytest.approx(tpr[fpr <= 0.05].max())
    assert found["tpr_at_1_fpr"] is None  # wants 1,000 non-members
    low, high = found["auc_interval"]
    assert low < found["auc"] < high and high - low < 0.2
    wide = roc.summary(member[:8], nonmember[:20], None, roc.Bootstrap(8, 20))["auc_interval"]
    assert wide[1] - wide[0] > high - low


def test_bootstrap_auc_is_the_auc_of_the_resampled_scores():
    """The matrix form against resampling by index, ties included."""
    member, nonmember = (np.round(x, 1) for x in scores(n=100))
    bootstrap = roc.Bootstrap(80, 100, rounds=20)
    draws = zip(bootstrap.member, bootstrap.nonmember, strict=True)
    wanted = [
        roc_auc_score(np.r_[np.ones(80), np.zeros(100)], np.r_[member[m], nonmember[n]])
        for m, n in draws
    ]
    np.testing.assert_allclose(bootstrap.auc(member, nonmember), wanted, rtol=1e-5)


def test_interval_covers_chance():
    """Over 40 pairs of samples without signal, the 95 % interval misses 0.5 rarely."""
    misses = 0
    for seed in range(40):
        member, nonmember = scores(seed, shift=0)
        bootstrap = roc.Bootstrap(80, 250, 200, seed)
        low, high = bootstrap.interval(bootstrap.auc(member, nonmember))
        misses += not low <= 0.5 <= high
    assert misses <= 7


def test_auc_is_unfolded():
    """Scores that point the wrong way read below 0.5, and the folded figure says how far."""
    member, nonmember = scores(shift=-1)
    found = roc.summary(member, nonmember, None, roc.Bootstrap(80, 250))
    assert found["auc"] < 0.4 and found["auc_folded"] == pytest.approx(1 - 2 * found["auc"])


def test_threshold_is_the_best():
    """No other threshold has a better balanced accuracy."""
    member, nonmember = scores()
    best = roc.balanced_accuracy(member, nonmember, roc.best_threshold(member, nonmember))
    assert best == pytest.approx(
        max(roc.balanced_accuracy(member, nonmember, v) for v in np.r_[member, nonmember])
    )


def test_worst_case_and_its_null():
    """The worst of many useless attacks stays within its null in most draws; a real one does
    not."""
    rng = np.random.default_rng(0)
    bootstrap, exceeded = roc.Bootstrap(40, 100, 200), 0
    for _ in range(20):
        useless = {str(i): (rng.normal(size=40), rng.normal(size=100)) for i in range(8)}
        found = roc.worst_case(useless, bootstrap)
        exceeded += found["auc"] > found["null"]
    assert exceeded <= 4 and found["null"] > 0.55
    found = roc.worst_case(
        useless | {"real": (rng.normal(1, 1, 40), rng.normal(size=100))}, bootstrap
    )
    assert found["attack"] == "real" and found["auc"] > found["null"]


def test_paired_difference_is_tighter_than_unpaired():
    """Two models whose scores move together differ surely where their own intervals overlap."""
    member, nonmember = scores()
    better = member - 0.15
    bootstrap = roc.Bootstrap(80, 250)
    change, (low, high) = roc.paired_difference((better, nonmember), (member, nonmember), bootstrap)
    assert low < change < high < 0
    alone = bootstrap.interval(bootstrap.auc(member, nonmember))
    assert high - low < alone[1] - alone[0]


def test_seeds_pooled():
    """Means over seeds by hand; with as many images, four seeds have half the interval of one; a
    difference is paired."""
    rng = np.random.default_rng(0)
    seeds = [
        {
            "weak": (rng.normal(0.2, 1, 40), rng.normal(size=100)),
            "strong": (rng.normal(1, 1, 40), rng.normal(size=100)),
        }
        for _ in range(4)
    ]
    found = roc.pooled_worst(seeds)
    areas = [roc.auc(*s["strong"]) for s in seeds]
    assert found["attack"] == "strong" and found["auc"] == pytest.approx(np.mean(areas))
    assert found["auc_by_seed"] == pytest.approx(
        [max(a, roc.auc(*s["weak"])) for a, s in zip(areas, seeds, strict=True)]
    )
    one, four = (np.ptp(roc.pooled_worst(s)["auc_interval"]) for s in (seeds[:1], seeds))
    assert 0.35 < four / one < 0.7
    change, (low, high) = roc.pooled_difference(
        [((m - 0.3, n), (m, n)) for m, n in (s["strong"] for s in seeds)]
    )
    wanted = np.mean([roc.auc(m - 0.3, n) - roc.auc(m, n) for m, n in (s["strong"] for s in seeds)])
    assert change == pytest.approx(wanted) and low < change < high < 0
