"""Frechet distance, KID and copying against closed forms on the same features."""

import numpy as np
import pytest
import torch
from scipy import linalg

from attacks import quality


def gaussians(n=300, width=12):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator)
    real = torch.randn(n, width, generator=generator)
    return real, torch.randn(n, width, generator=generator) @ mix + 0.5


def test_frechet_distance_is_the_closed_form():
    """|mu - mu'|^2 + tr(S + S' - 2 sqrt(S S')), with the matrix root by scipy."""
    real, generated = gaussians()
    s, g = (np.cov(x.double().numpy(), rowvar=False) for x in (real, generated))
    shift = (real.mean(0) - generated.mean(0)).square().sum().item()
    expected = shift + np.trace(s + g - 2 * linalg.sqrtm(s @ g).real)
    assert quality.frechet_distance(real, generated) == pytest.approx(expected, rel=1e-4)
    assert quality.frechet_distance(real, real) == pytest.approx(0, abs=1e-3)


def test_the_kernel_distance_of_several_models():
    """That of all pictures together; the interval over models holds that of many of their kind, and
    is wide where models differ.
    """
    g = torch.Generator().manual_seed(0)
    real = torch.randn(60, 8, generator=g)
    held, widths = 0, []
    for spread in (0.0, 0.5):
        shifts = spread * torch.randn(40, 8, 1, 8, generator=g)
        every = torch.randn(40, 8, 12, 8, generator=g) + shifts
        found = [quality.kernel_distance_of_all(real, models) for models in every]
        truth = np.mean([value for value, _ in found])
        held += sum(low <= truth <= high for _, (low, high) in found)
        widths.append(np.mean([high - low for _, (low, high) in found]))
    assert 70 <= held <= 80 and widths[1] > 2 * widths[0]
    whole = every[0].flatten(0, 1)
    pair = [(x.double() @ y.double().T / 8 + 1) ** 3 for x, y in ((real, real), (whole, whole))]
    inside = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in pair)
    want = inside - 2 * ((real.double() @ whole.double().T / 8 + 1) ** 3).mean()
    assert found[0][0] == pytest.approx(want.item())


def test_kernel_distance_is_the_unbiased_mmd():
    """With one subset of all pictures, KID is the unbiased cubic-kernel MMD, written out here."""
    real, generated = (x[:50].double() for x in gaussians())

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    expected = within(real) + within(generated) - 2 * kernel(real, generated).mean()
    mean, deviation = quality.kernel_distance(real, generated)
    assert mean == pytest.approx(expected.item(), rel=1e-4)
    assert deviation == pytest.approx(0, abs=1e-4 * abs(mean) + 1e-6)  # every subset is the whole


def test_nearest_finds_copies():
    """A copy lies at distance 0 of its original."""
    real, generated = gaussians(20)
    generated[3] = 2 * real[7]
    distance, index = quality.nearest(real, generated)
    assert index[3] == 7 and distance[3] == pytest.approx(0, abs=1e-6)
    assert np.delete(distance, 3).min() > 1e-3


def test_embedded_network_has_the_published_features():
    """Norm and three entries that another implementation gives with these weights.

    That is efficientnet-lite-pytorch 0.1.0, the weights' own package, on a picture of ramps.
    """
    y, x = np.mgrid[:48, :48]
    ramps = np.stack([5 * x, 5 * y, 255 - 5 * ((x + y) // 2)], 2).astype(np.uint8)
    white = np.full((48, 48, 3), 255, np.uint8)
    found = quality.features(quality.load_network("embedded"), np.stack([ramps, white]), batch=1)
    assert found.shape == (2, 320)
    assert found[0].norm().item() == pytest.approx(28.3508, abs=1e-3)
    assert found[0, [0, 100, 319]].tolist() == pytest.approx([0.5634, 1.6685, -1.8971], abs=1e-3)
    assert (found[0] - found[1]).norm() > 1


def test_weights_of_another_network_are_refused():
    """A tensor of another shape, another kind in its place, or one too many: no silent mistake."""
    own = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
    good = {"b.weight": torch.ones(2, 3), "b.bias": torch.full((2,), 2.0)}
    found = quality.in_order(good, own)
    assert list(found) == list(own) and found["a.bias"].tolist() == [2, 2]
    for wrong in (
        good | {"b.weight": torch.ones(3, 2)},
        {"b.weight": torch.ones(2, 3), "b.running_mean": torch.ones(2)},
        good | {"c.bias": torch.ones(2)},
    ):
        with pytest.raises(ValueError, match="another network"):
            quality.in_order(wrong, own)
