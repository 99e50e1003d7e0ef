"""The attacks' figures against scikit-learn, and the attacks on a model whose errors can be written down."""

import types

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

import attacks
from diffusion import Base


def scores(seed=0, shift=1.0, n=250):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, 80), rng.normal(0, 1, n)


def test_figures_agree_with_scikit_learn():
    """AUC, balanced ASR and TPR at 5 % FPR by another route; intervals hold the point and narrow with data."""
    member, nonmember = scores()
    found = attacks.figures(member, nonmember, threshold=0.4)
    labels, values = np.r_[np.ones(80), np.zeros(250)], np.r_[member, nonmember]
    assert found["auc"] == pytest.approx(roc_auc_score(labels, values))
    assert found["auc"] == pytest.approx((member[:, None] > nonmember).mean())
    assert found["asr"] == pytest.approx(balanced_accuracy_score(labels, values >= 0.4))
    fpr, tpr, _ = roc_curve(labels, values)
    assert found["tpr_at_5_fpr"] == pytest.approx(tpr[fpr <= 0.05].max())
    low, high = found["auc_interval"]
    assert low < found["auc"] < high and high - low < 0.2
    wide = attacks.figures(member[:8], nonmember[:20])["auc_interval"]
    assert wide[1] - wide[0] > high - low


def test_interval_covers_chance():
    """Over 40 pairs of samples without signal, the 95 % interval misses 0.5 rarely."""
    misses = 0
    for seed in range(40):
        low, high = attacks.figures(*scores(seed, shift=0), seed=seed, rounds=200)["auc_interval"]
        misses += not low <= 0.5 <= high
    assert misses <= 7


def test_too_few_nonmembers_for_five_percent():
    """TPR at 5 % FPR needs 200 non-members; below, it is not given."""
    member, nonmember = scores(n=199)
    assert attacks.figures(member, nonmember)["tpr_at_5_fpr"] is None


def test_auc_is_unfolded():
    """Scores that point the wrong way read below 0.5, and the folded figure says how far."""
    member, nonmember = scores(shift=-1)
    found = attacks.figures(member, nonmember)
    assert found["auc"] < 0.4 and found["auc_folded"] == pytest.approx(1 - 2 * found["auc"])


def test_threshold_is_the_best_on_validation():
    """No other threshold has a better balanced accuracy."""
    member, nonmember = scores()
    best = attacks.balanced_accuracy_threshold(member, nonmember)

    def accuracy(threshold):
        return (member >= threshold).mean() + (nonmember < threshold).mean()

    assert accuracy(best) == pytest.approx(max(accuracy(v) for v in np.r_[member, nonmember]))


class Leaky(torch.nn.Module):
    """A "UNet" that is off by sqrt(h), where h is the constant that the text embedding carries per image."""

    config = types.SimpleNamespace(in_channels=4)
    dtype = torch.float32

    def forward(self, noisy, timesteps, text, return_dict=False):
        return (self.truth.expand_as(noisy) + text[:, :1, :1, None].sqrt(),)


@pytest.fixture
def leaky(monkeypatch):
    """A base whose error map is h everywhere, for known h per image."""
    unet = Leaky()
    pipeline = types.SimpleNamespace(vae_scale_factor=4)
    base = Base("leaky", pipeline, unet, torch.linspace(0.99, 0.01, 1000), "epsilon", 32, torch.device("cpu"))
    real = attacks.squared_error

    def told(base, latents, text, timesteps, noise):
        base.unet.truth = noise
        return real(base, latents, text, timesteps, noise)

    monkeypatch.setattr(attacks, "squared_error", told)
    return base


def test_loss_grid_and_attacks_on_known_errors(leaky):
    """The grid holds h; the loss attack is -h; the difference attack is log of the ratio."""
    h = torch.tensor([0.1, 0.2, 0.4])
    latents = torch.zeros(3, 4, 8, 8)
    grid = attacks.loss_grid(leaky, latents, h.view(3, 1, 1), (5, 100), draws=3)
    assert grid.shape == (3, 2, 3)
    torch.testing.assert_close(grid, h.view(3, 1, 1).expand(3, 2, 3))
    np.testing.assert_allclose(attacks.loss_attack(grid), -h, rtol=1e-5)
    np.testing.assert_allclose(attacks.difference_attack(grid, 2 * grid), np.log(2), rtol=1e-5)


@pytest.mark.parametrize("proxy", ["raw", "pooled"])
def test_proxy_attack_finds_a_planted_signal_and_nothing_else(leaky, proxy):
    """Members with a smaller error are found on the test images; without a difference they are not."""
    rng = np.random.default_rng(0)
    n = 240
    member = np.arange(n) < n // 2
    cut = {"aux": 40, "val": 60, "test": n // 2}
    roles, start = {}, 0
    for part, end in cut.items():
        roles[f"member_{part}"], roles[f"nonmember_{part}"] = (
            list(range(start, end)),
            list(range(n // 2 + start, n // 2 + end)),
        )
        start = end
    for signal in (0.25, 1.0):
        h = torch.tensor(rng.lognormal(0, 0.2, n) * np.where(member, signal, 1.0), dtype=torch.float32)
        score = attacks.proxy_attack(leaky, torch.zeros(n, 4, 8, 8), h.view(n, 1, 1), roles, proxy, seed=0, epochs=30)
        found = attacks.auc(score[roles["member_test"]], score[roles["nonmember_test"]])
        assert found > 0.95 if signal < 1 else 0.3 < found < 0.7
