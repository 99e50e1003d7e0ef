"""Attacks by regression: a planted shift is found, nothing is found in noise, and no known image is
scored by a regression that has seen it."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from attacks import classifiers
from curves import roc

KNOWN = list(range(50)), list(range(100, 150))


def planted(shift, features=30, seed=0):
    """(200, F) features of which the first hundred rows are shifted in one column."""
    x = np.random.default_rng(seed).normal(size=(200, features))
    x[:100, 2] += shift
    return x


def test_a_planted_shift_is_found_on_images_not_trained_on():
    """And on the known ones by folds that have not seen them, about as well."""
    score = classifiers.classifier_score(planted(3), KNOWN)
    assert roc.auc(score[50:100], score[150:]) > 0.85
    assert roc.auc(score[:50], score[100:150]) > 0.85


def test_noise_is_not_found_even_on_known_images():
    """Sixty features of a hundred images: a regression on them would rank its own images well."""
    x = planted(0, features=60)
    score = classifiers.classifier_score(x, KNOWN)
    assert 0.35 < roc.auc(score[:50], score[100:150]) < 0.65
    index = [*KNOWN[0], *KNOWN[1]]
    own = LogisticRegression(C=0.05).fit(x[index], np.arange(100) < 50).decision_function(x)
    assert roc.auc(own[:50], own[100:150]) > 0.9


def test_one_image_of_a_side_leaves_no_folds():
    """Then there is one regression; a score for every image all the same."""
    score = classifiers.classifier_score(planted(5), ([0], [100, 101]))
    assert np.isfinite(score).all() and score[0] > score[100]


def test_combined_features_are_logs_of_distances_and_all_candidates():
    """One column per candidate, higher for members; gradients by their mean log."""
    rng = np.random.default_rng(0)
    sizes = {"PIA": 3, "SimA": 2, "PIAN": 1, "SecMI-stat": 2, "ReDiffuse": 4}
    losses, gradients = rng.uniform(1, 2, (5, 4, 2)), rng.normal(size=(5, 7))
    model = SimpleNamespace(
        grid={"losses": losses},
        gradients=gradients,
        candidates={name: -rng.uniform(1, 2, (5, k)) for name, k in sizes.items()},
        scores={name: rng.normal(size=5) for name in ("PFAMI", "CLiD", "GSA1", "difference")},
        shadow_scores={},
    )
    found = np.hstack(classifiers.combined_features(model))
    assert found.shape == (5, 1 + sum(sizes.values()) + 3 + 1 + 1)
    assert found[2, 0] == pytest.approx(-np.log(losses[2]).mean())
    assert found[3, 1] == pytest.approx(-np.log(-model.candidates["SecMI-stat"][3, 0]))
    assert found[4, -2] == pytest.approx(-gradients[4].mean())
    assert found[4, -1] == model.scores["difference"][4]
