"""The Frechet distance against its closed form, and the feature network on real pictures."""

import numpy as np
import torch
from scipy.linalg import sqrtm

import emojis
import quality


def test_frechet_distance_is_the_closed_form():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by scipy's matrix root."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), rng.normal(0.5, 2.0, size=(200, 6))
    s, t = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert abs(quality.frechet_distance(torch.tensor(a), torch.tensor(b)) - expected) < 1e-3 * expected


def test_features_tell_pictures_from_noise():
    """Half of the emoji are nearer to the other half than to noise of the same colours, by far."""
    images = emojis.twemoji()[2][::8]
    network = quality.Features()
    real = quality.features(network, images)
    noise = np.random.default_rng(0).permutation(images.reshape(-1, 3)).reshape(images.shape)
    assert real.shape == (len(images), quality.FEATURES)
    near = quality.frechet_distance(real[::2], real[1::2])
    assert quality.frechet_distance(real[::2], quality.features(network, noise)) > 2 * near
