"""LiRA against loops written by hand and scipy; planted signals are found, and none where there is
none, however many features there are."""

import numpy as np
import pytest
from scipy.stats import norm

from attacks import lira
from attacks.decisions import Decisions
from curves import roc


def halves(adapters, images, seed=0):
    """(N, P) membership: complementary random halves."""
    rng, member = np.random.default_rng(seed), np.zeros((adapters, images), bool)
    for pair in range(adapters // 2):
        inside = rng.permutation(images) < images // 2
        member[2 * pair], member[2 * pair + 1] = inside, ~inside
    return member


def area(score, member):
    """AUC over all decisions."""
    return roc.auc(score[member], score[~member])


def by_hand(x, member, target, side):
    """Per image and feature (mean, shrunk variance) on one side, one number at a time."""
    adapters, images, features = x.shape
    others = [k for k in range(adapters) if k not in (target, target ^ 1)]
    rest = others if adapters > 4 else [k for k in range(4) if k != target]
    mean, variance = np.empty((images, features)), np.empty((images, features))
    for f in range(features):
        squares = freedom = 0
        for i in range(images):
            there = [x[k, i, f] for k in rest if member[k, i] == side]
            squares += sum((v - sum(there) / len(there)) ** 2 for v in there)
            freedom += len(there) - 1
        for i in range(images):
            there = [x[k, i, f] for k in others if member[k, i] == side]
            mean[i, f] = sum(there) / len(there)
            own, n = sum((v - mean[i, f]) ** 2 for v in there), len(there)
            variance[i, f] = (4 * squares / freedom + own) / (4 + n - 1)
    return mean, variance


@pytest.mark.parametrize("adapters", [4, 8])
def test_formulas(adapters):
    """Offline and online, image by image, with scipy's Gaussian."""
    member = halves(adapters, 6)
    x = np.random.default_rng(1).normal(size=(adapters, 6, 2)) + 2 * member[:, :, None]
    for target in range(adapters):
        (a, va), (b, vb) = (by_hand(x, member, target, side) for side in (True, False))
        z = ((x[target] - b) / np.sqrt(vb)).sum(1)
        np.testing.assert_allclose(lira.offline(x, member, target), z)
        ratio = norm.logpdf(x[target], a, np.sqrt(va)) - norm.logpdf(x[target], b, np.sqrt(vb))
        np.testing.assert_allclose(lira.online(x, member, target), ratio.sum(1))


def test_projection_by_hand():
    """Image by image; each of the K predictions weighed by its own noise."""
    member = halves(6, 8)
    x = np.random.default_rng(3).normal(size=(6, 8, 2, 5)) * np.array([1, 10])[:, None]
    target, want = 1, np.zeros(8)
    for k in range(2):
        left, squares = [s for s in range(6) if s not in (0, 1)], []
        for i in range(8):
            for side in (True, False):
                there = np.array([x[s, i, k] for s in left if member[s, i] == side])
                squares.extend((there - there.mean(0)).ravel() ** 2)
        for i in range(8):
            a, b = (
                np.mean([x[s, i, k] for s in left if member[s, i] == side], 0) for side in (1, 0)
            )
            want[i] += (x[target, i, k] - (a + b) / 2) @ (a - b) / np.mean(squares)
    np.testing.assert_allclose(lira.projected(x, member, target), want, rtol=1e-4)


def test_levelling_by_hand():
    """Each adapter's answers less a line through them over the images' hardness, which is the
    middle of the means of the shadows; numpy's own fit of a line.
    """
    member = halves(6, 12)
    x = np.random.default_rng(4).normal(size=(6, 12, 2)) + 3 * np.arange(12)[:, None]
    target, found = 5, lira.without_difficulty(x, member, 5)
    for f in range(2):
        hard = [
            np.mean(
                [np.mean([x[k, i, f] for k in range(4) if member[k, i] == side]) for side in (0, 1)]
            )
            for i in range(12)
        ]
        for k in range(6):
            line = np.polyval(np.polyfit(hard, x[k, :, f], 1), hard)
            np.testing.assert_allclose(found[k, :, f], x[k, :, f] - line, atol=1e-9)
    assert np.abs(found[target].mean(0)).max() < 1e-9


def test_pooled_shift_is_fishers_discriminant():
    """By hand in two dimensions, covariances as in the joint attack."""
    member = halves(6, 10)
    x = np.random.default_rng(2).normal(size=(6, 10, 2)) @ [[1, 0.8], [0, 0.6]] + member[..., None]
    (a, _), (b, _) = (by_hand(x, member, 3, side) for side in (True, False))
    sums = np.zeros((2, 2))
    for side in (True, False):
        rows, freedom = [], 0
        for i in range(10):
            there = np.array([x[k, i] for k in (0, 1, 4, 5) if member[k, i] == side])
            rows.extend(there - there.mean(0))
            freedom += len(there) - 1
        sums += np.array(rows).T @ np.array(rows) / freedom / 2
    sums[0, 1] *= 0.9
    sums[1, 0] *= 0.9
    want = (x[3] - (a + b) / 2) @ np.linalg.inv(sums) @ (a - b).mean(0)
    np.testing.assert_allclose(lira.pooled(x, member, 3), want)


def test_scaling_finds_more_where_images_scatter_unlike():
    """A shift of membership that is the same everywhere, under noise of .3 to 3: dividing by each
    image's own deviation catches more at few false alarms.
    """
    rng = np.random.default_rng(0)
    halves = [rng.permutation(400) < 200 for _ in range(8)]
    member = np.concatenate([[half, ~half] for half in halves])
    noise = np.exp(rng.uniform(np.log(0.3), np.log(3), 400))
    x = (rng.normal(size=member.shape) * noise + member)[:, :, None]
    rates = {}
    for attack in (lira.pooled, lira.scaled):
        score = np.stack([attack(x, member, k) for k in range(16)])
        rates[attack] = Decisions(member).figures(score)
    plain, own = (rates[attack] for attack in (lira.pooled, lira.scaled))
    assert own["auc"] > plain["auc"] + 0.01
    assert own["tpr_at_1_fpr"] > 1.5 * plain["tpr_at_1_fpr"]


def test_adapters_of_unlike_level_hide_nothing():
    """Adapters that end at other losses, and steeper ones: as they are, their levels drown what
    membership does; levelled they do not.
    """
    answers, member = planted(1.0)
    rng = np.random.default_rng(7)
    level, steep = rng.normal(0, 3, (8, 1, 1, 1)), rng.uniform(0.5, 1.5, (8, 1, 1, 1))
    logs = level + steep * np.log(answers["losses"])
    answers |= {"losses": np.exp(logs)}
    phi = lira.statistics(answers)["loss"]
    bare = np.stack([lira.online(phi, member, target) for target in range(8)])
    found = {name: area(score, member) for name, score in lira.attacks(answers, member).items()}
    assert area(bare, member) < 0.7
    for name in ("LiRA online, loss", "LiRA offline, loss", "LiRA pooled, loss"):
        assert found[name] > 0.8, (name, found[name])


def planted(signal, adapters=8, images=200, seed=0):
    """Answers of adapters whose images differ far more than membership moves them."""
    rng, member = np.random.default_rng(seed), halves(adapters, images, seed)
    hard = rng.normal(0, 2, images)
    inside = member[:, :, None, None]

    def noise(*shape):
        return rng.normal(size=(adapters, images, *shape))

    losses = np.exp(hard[:, None, None] - signal * inside + noise(4, 2))
    direction = rng.normal(size=(images, 4, 50)) * 0.3
    answers = {
        "losses": losses,
        "sima": np.exp(hard[:, None] - signal * inside[..., 0] + noise(2)),
        "predictions": rng.normal(size=(images, 4, 50))
        + noise(4, 50)
        + signal * direction * inside,
    }
    return answers, member


def test_planted_signals_are_found():
    """Every attack with shadows sees them; a threshold for all is blinded by their hardness."""
    answers, member = planted(1.0)
    found = {name: area(s, member) for name, s in lira.attacks(answers, member).items()}
    assert found[lira.THRESHOLD] < 0.65
    assert found["LiRA online, loss"] > 0.9 and found["LiRA offline, loss"] > 0.9
    assert found["LiRA pooled, all"] >= found["LiRA pooled, loss"] > 0.9
    assert found["projected prediction"] > 0.8


def test_nothing_is_found_where_nothing_is():
    """Also by the projection in 200 dimensions, whose means alone would tell who is a member if the
    target's partner were among its shadows."""
    answers, member = planted(0.0, seed=5)
    scores = lira.attacks(answers, member)
    found = {name: area(score, member) for name, score in scores.items()}
    assert len(found) == 7
    assert all(0.44 < value < 0.56 for value in found.values()), found


def test_the_targets_own_labels_are_not_read():
    """Nor those of its partner: exchanging the two changes no score of the pair."""
    answers, member = planted(1.0)
    changed = member.copy()
    changed[[2, 3]] = changed[[3, 2]]
    scores, other = lira.attacks(answers, member), lira.attacks(answers, changed)
    for name, score in scores.items():
        np.testing.assert_array_equal(score[2:4], other[name][2:4])
        if name != lira.THRESHOLD:
            assert not np.array_equal(score[4], other[name][4])


def test_four_adapters_have_no_projection():
    """Which needs two shadows on each side; the others do with one."""
    scores = lira.attacks(*planted(1.0, adapters=4))
    assert "projected prediction" not in scores and len(scores) == 6
    assert all(np.isfinite(score).all() for score in scores.values())
