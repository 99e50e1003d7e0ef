"""The attacks on models whose answers can be written down, and on planted signals."""

import types

import numpy as np
import pytest
import torch

import diffusion
import lora
from attacks import paper
from attacks import single as attacks
from curves import roc
from diffusion import GRID_SEED, TIMESTEPS, Base, Encoded, loss_grid
from files.bases import load_base


class Leaky(torch.nn.Module):
    """A "UNet" that is off by sqrt(h), where h is the constant that the text embedding carries per
    image.
    """

    config = types.SimpleNamespace(in_channels=4)
    dtype = torch.float32

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict=False):
        return (self.truth.expand_as(noisy) + encoder_hidden_states[:, :1, :1, None].sqrt(),)


@pytest.fixture
def leaky(monkeypatch):
    """A base whose error map is h everywhere, for known h per image."""
    unet = Leaky()
    pipeline = types.SimpleNamespace(vae_scale_factor=4)
    base = Base(
        "leaky",
        pipeline,
        unet,
        torch.linspace(0.99, 0.01, 1000),
        "epsilon",
        32,
        torch.device("cpu"),
    )
    real = diffusion.residual

    def told(base, latents, text, timesteps, noise):
        base.unet.truth = noise
        return real(base, latents, text, timesteps, noise)

    monkeypatch.setattr(diffusion, "residual", told)
    return base


def test_loss_grid_and_attacks_on_known_errors(leaky):
    """The grid holds h; the loss attack is -h; the difference attack is log of the ratio."""
    h = torch.tensor([0.1, 0.2, 0.4])
    latents = torch.zeros(3, 4, 8, 8)
    grid = loss_grid(leaky, latents, h.view(3, 1, 1), (5, 100), draws=3)
    assert grid.shape == (3, 2, 3)
    torch.testing.assert_close(grid, h.view(3, 1, 1).expand(3, 2, 3))
    grid = grid.numpy()
    np.testing.assert_allclose(attacks.loss_attack(grid), -h, rtol=1e-5)
    np.testing.assert_allclose(attacks.difference_attack(grid, 2 * grid), np.log(2), rtol=1e-5)


def test_large_pictures_go_through_in_small_batches(leaky, monkeypatch):
    """Of 512 px four at a time where small ones go in one batch; the figures are the same."""
    h, sizes, real = torch.rand(6) + 0.1, [], diffusion.residual
    monkeypatch.setattr(
        diffusion, "residual", lambda b, z, *rest: sizes.append(len(z)) or real(b, z, *rest)
    )
    for pixels, expected in ((32, [6]), (512, [4, 2]), (4096, [1] * 6)):
        leaky.size = pixels
        grid = loss_grid(leaky, torch.zeros(6, *leaky.latent_shape), h.view(6, 1, 1), (5,), draws=1)
        assert sizes == expected
        torch.testing.assert_close(grid, h.view(6, 1, 1))
        sizes.clear()


@pytest.mark.parametrize("proxy", ["raw", "pooled"])
def test_proxy_attack_finds_a_planted_signal_and_nothing_else(leaky, proxy):
    """Members with a smaller error are found on the test images; without a difference they are
    not.
    """
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
        h = torch.tensor(
            rng.lognormal(0, 0.2, n) * np.where(member, signal, 1.0), dtype=torch.float32
        )
        latents, text = torch.zeros(n, 4, 8, 8), h.view(n, 1, 1)
        data = Encoded(None, None, None, latents, text, roles)
        h_ = paper.train_proxies(leaky, data, 0, (proxy,), epochs=30)
        asked = paper.sweep(leaky, latents, text, h_)
        np.testing.assert_allclose(asked["losses"][:, 0, 0], h, rtol=1e-5)
        np.testing.assert_allclose(asked["drift"][:, 1], 16 * h.sqrt(), rtol=1e-5)  # of 256 values
        score = asked[f"odds-{proxy}"].mean((1, 2))
        found = roc.auc(score[roles["member_test"]], score[roles["nonmember_test"]])
        assert found > 0.95 if signal < 1 else 0.3 < found < 0.7


class Scaling(torch.nn.Module):
    """eps(z, t) = c z: every attack on the predicted noise has a closed form."""

    dtype = torch.float64

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, noisy, timesteps, encoder_hidden_states, return_dict=False):
        return (self.c * noisy,)


@pytest.fixture
def scaling():
    """A base that predicts 0.3 z, three latents and unused captions."""
    abar = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    base = Base("scaling", None, Scaling(0.3), abar, "epsilon", 32, torch.device("cpu"))
    latents = torch.randn(
        3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    return base, latents, torch.zeros(3, 1, 1)


def test_sima_and_pia_closed_forms(scaling):
    """SimA is c |z|_4 at every t; PIA is |c z - c (sqrt(abar) + sqrt(1 - abar) c) z|_4."""
    base, latents, text = scaling
    l4 = (latents**4).sum((1, 2, 3)).numpy() ** 0.25
    np.testing.assert_allclose(
        attacks.sima(base, latents, text, (100, 300)), -0.3 * np.stack([l4] * 3, 1), rtol=1e-9
    )
    a = base.abar[100].item()
    factor = abs(0.3 - 0.3 * (a**0.5 + (1 - a) ** 0.5 * 0.3))
    np.testing.assert_allclose(
        attacks.pia(base, latents, text, (100,))[:, 0], -factor * l4, rtol=1e-9
    )
    scale = (2 / np.pi) ** 0.5 / latents.abs().mean((1, 2, 3)).numpy()  # PIAN: eps_0 = scale z
    z = latents.numpy()
    wanted = scale[:, None, None, None] * z - 0.3 * (
        a**0.5 * z + (1 - a) ** 0.5 * scale[:, None, None, None] * z
    )
    found = attacks.pia(base, latents, text, (100,), normalised=True)[:, 0]
    np.testing.assert_allclose(found, -((wanted**4).sum((1, 2, 3)) ** 0.25), rtol=1e-9)


def test_secmi_closed_form(scaling):
    """With eps = c z each DDIM move is a factor, so the whole walk is a product of factors, for
    each t of a single walk.
    """
    base, latents, text = scaling
    abar = base.abar.numpy()

    def factor(s, t):
        return (
            np.sqrt(abar[t]) * (1 - np.sqrt(1 - abar[s]) * 0.3) / np.sqrt(abar[s])
            + np.sqrt(1 - abar[t]) * 0.3
        )

    found = attacks.secmi(base, latents, text, timesteps=(0, 40, 100))
    for column, t in zip(found.T, (0, 40, 100), strict=True):
        z = latents.numpy() * np.prod([factor(s, s + 10) for s in range(0, t, 10)])
        back = z * factor(t, t + 10) * factor(t + 10, t)
        np.testing.assert_allclose(column, -((back - z) ** 2).sum((1, 2, 3)), rtol=1e-9)
    assert attacks.secmi(base, latents, text).shape == (3, len(attacks.WALK))


def test_pfami_and_clid_formulas():
    """By hand, one image at a time."""
    rng = np.random.default_rng(0)
    losses, crops, cuts = (rng.uniform(0.1, 1, s) for s in ((5, 4), (6, 5), (4, 5, 2)))
    for i, score in enumerate(attacks.pfami(losses, crops)):
        at = [0, 1, 2, 3, 0, 1]  # the timestep of each crop
        terms = [(crops[m, i] - losses[i, t]) / losses[i, t] for m, t in enumerate(at)]
        assert score == pytest.approx(float(sum(terms) / 6))
    known, losses = [0, 1, 2, 4], losses[:, :2]
    found = attacks.clid(losses, cuts, known, alphas=(0, 0.25, 1))
    gap, fit = (cuts.mean(0) - losses).mean(1), -losses.mean(1)
    scaled = []
    for x in (gap, fit):
        low, high = np.percentile(x[known], [25, 75])
        scaled.append((x - np.median(x[known])) / (high - low))
    gap, fit = scaled
    np.testing.assert_allclose(found, np.stack([fit, 0.25 * gap + 0.75 * fit, gap], 1), rtol=1e-9)


@pytest.mark.parametrize("model", ["tiny_base", "tiny_base_v"])
def test_rediffuse_averages_denoised_copies(model, request):
    """Against copies that are made: noised, denoised in one DDIM step to t = 0, averaged."""
    base = load_base(request.getfixturevalue(model))
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 16, 32)
    drift = paper.sweep(base, latents, text, {})["drift"]
    found = attacks.rediffuse(drift, TIMESTEPS, base.abar, base.prediction)
    for column, t in zip(found.T, TIMESTEPS, strict=True):
        noise = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(GRID_SEED + t))
        copies, a = [], base.abar[t]
        for eps in noise:
            noisy_latents = a.sqrt() * latents + (1 - a).sqrt() * eps
            eps_pred = attacks.predict_noise(base, noisy_latents, t, text)
            copies.append((noisy_latents - (1 - a).sqrt() * eps_pred) / a.sqrt())
        away = (torch.stack(copies).mean(0) - latents).flatten(1).norm(dim=1)
        np.testing.assert_allclose(column, -away.numpy(), rtol=1e-3)


def test_black_box():
    """A copy among the pictures of a caption lies at distance zero."""
    rng = np.random.default_rng(0)
    features, generated = rng.normal(size=(200, 6)), rng.normal(size=(200, 2, 6))
    generated[7, 1] = 3 * features[7]
    found = attacks.black_box(features, generated)
    assert found[7] == pytest.approx(0, abs=1e-12) and np.delete(found, 7).max() < 0


@pytest.mark.parametrize("model", ["tiny_base", "tiny_base_linear"])
def test_gradient_features_equal_autograd_image_by_image(model, request, monkeypatch):
    """One backward pass for several images gives each image's own norms, over linear layers and
    convolutions.
    """
    base = load_base(request.getfixturevalue(model))
    adapter = lora.inject(base.unet, "all", 3, 2.0, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for p in adapter.parameters():  # B is zero before training
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    latents, text = (
        torch.randn(5, 4, 8, 8, generator=generator),
        torch.randn(5, 16, 32, generator=generator),
    )
    monkeypatch.setattr(attacks, "GRADIENT_BATCH", 3)
    found = attacks.gradient_features(base, adapter, latents, text)
    timesteps = torch.tensor(TIMESTEPS[::2])
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(GRID_SEED))
    for i in range(5):
        z, c = latents[i].expand(2, -1, -1, -1), text[i].expand(2, -1, -1)
        loss = attacks.squared_error(base, z, c, timesteps, noise).mean()
        wanted = [g.norm().log().item() for g in torch.autograd.grad(loss, adapter.parameters())]
        np.testing.assert_allclose(found[i], wanted, atol=2e-4)
    assert not any(layer.lora_A._forward_hooks for layer in adapter.layers.values())
