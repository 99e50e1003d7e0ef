"""Attacks that are a logistic regression, fitted on images whose membership the attacker knows.

The score of an image that it was fitted on would flatter it, so every known image is scored by a
regression that has not seen it (cross-validation); the others by the one fitted on all known
images.  Tested in tests/test_classifiers.py on planted signals, and on labels without any.
"""

import numpy as np

FOLDS = 5
C = 0.05  # inverse strength of the penalty: few images, many features


def classifier_score(
    features: np.ndarray, known: tuple[list[int], list[int]], strength: float = C
) -> np.ndarray:
    """Log-odds (N,) of a logistic regression on the standardised features (N, F).

    `known` are the positions of (members, non-members) that it is fitted on, two of each or more
    for their own scores to be out of fold.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    index = np.array([*known[0], *known[1]])
    labels = np.r_[np.ones(len(known[0])), np.zeros(len(known[1]))]
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")
    )
    score = model.fit(features[index], labels).decision_function(features)
    folds = min(FOLDS, *map(len, known))
    if folds > 1:
        cut = StratifiedKFold(folds, shuffle=True, random_state=0)
        score[index] = cross_val_predict(
            model, features[index], labels, cv=cut, method="decision_function"
        )
    return score


def logs(score: np.ndarray) -> np.ndarray:
    """-log(-score) of scores that are minus a distance or a loss, (N,) or (N, K) -> (N, K)."""
    return -np.log(np.maximum(-score.reshape(len(score), -1), 1e-12))


def combined_features(model) -> list[np.ndarray]:
    """What the combined attacker asks of one model (model.Model), (N, K) each: every attack's
    score, of several candidates all, and the mean log gradient norm.

    Proxies are left out, since they have seen the auxiliary images; pictures, since not all images
    have them.
    """
    scores = model.scores | model.shadow_scores
    found = [-np.log(model.grid["losses"]).mean((1, 2))[:, None]]
    for name in ("SecMI-stat", "PIA", "PIAN", "SimA", "ReDiffuse"):
        found.append(logs(model.candidates[name]))
    found += [scores[name][:, None] for name in ("PFAMI", "CLiD", "GSA1")]
    found.append(-model.gradients.mean(1)[:, None])
    beside = (*model.shadow_scores, "difference")
    return found + [scores[name][:, None] for name in beside if name in scores]


def combined(model) -> np.ndarray:
    """One logistic regression over all that is known of an image, (N,), of this model and of the
    base, which the attacker has as well (after CDI, Dubinski et al. 2025).
    """
    table = combined_features(model)
    table += combined_features(model.control) if model.control else []
    return classifier_score(np.hstack(table), model.data.sides("aux", "val"))


def blind_features(pixels: np.ndarray, captions: list[str]) -> np.ndarray:
    """What can be known without any model: thumbnails (N, 6 * 6 * 3) and words, for the control
    that must fail.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    n, edge = len(pixels), pixels.shape[1] // 6
    blocks = pixels[:, : 6 * edge, : 6 * edge].reshape(n, 6, edge, 6, edge, 3)
    thumbs = blocks.mean((2, 4)).reshape(n, -1) / 255
    words = TfidfVectorizer(token_pattern=r"\S+").fit_transform(captions).toarray()
    return np.c_[thumbs, words]
