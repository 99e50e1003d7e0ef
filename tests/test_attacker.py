"""attacker.py: log-probabilities, Eq. 5 against numpy, and an inner step that moves the attacker
and nothing else.
"""

import math

import numpy as np
import pytest
import torch

from attacker import (
    MEMBER,
    NONMEMBER,
    PROXIES,
    PooledProxy,
    RawProxy,
    ascend,
    attacker_gain,
)

SHAPE = (4, 8, 8)


def errors(n=6, seed=0, scale=1.0):
    """(errors (n, 4, 8, 8) >= 0, timesteps (n,))."""
    generator = torch.Generator().manual_seed(seed)
    e = scale * torch.randn(n, *SHAPE, generator=generator) ** 2
    return e, torch.randint(1000, (n,), generator=generator)


@pytest.fixture(params=PROXIES)
def proxy(request):
    """Each of the attackers, in eval mode."""
    torch.manual_seed(0)
    return PROXIES[request.param](SHAPE).eval()


def step(proxy, optimizer, member, nonmember):
    """The inner step of Algorithm 1; returns G before it."""
    proxy.train()  # with its dropout
    gain, _ = attacker_gain(proxy(*member), proxy(*nonmember))
    ascend(optimizer, gain)
    proxy.eval()
    return gain.item()


def test_output_is_log_probabilities(proxy):
    """Both columns are <= 0 and their exponentials sum to 1; two different inputs differ."""
    out = proxy(*errors())
    assert out.shape == (6, 2) and (out <= 0).all() and out.std(0).min() > 0
    assert torch.allclose(out.exp().sum(1), torch.ones(6), atol=1e-6)


def test_clueless_attacker_has_gain_minus_log_2(proxy):
    """Eq. 5 at h = 1/2."""
    with torch.no_grad():
        proxy.layers[-1].weight.zero_()
        proxy.layers[-1].bias.zero_()
    gain, accuracy = attacker_gain(proxy(*errors(seed=1)), proxy(*errors(seed=2)))
    assert gain.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert accuracy == 0.5  # a tie goes to one class for everybody


def test_gain_equals_equation_5_in_numpy(proxy):
    """G = (1/2) mean log h(e_m) + (1/2) mean log(1 - h(e_n)) and the balanced accuracy, from the
    logits by hand.
    """
    member, nonmember = errors(5, 1, 0.3), errors(7, 2)
    h = []
    for given in (member, nonmember):
        first = given[0] if isinstance(proxy, RawProxy) else proxy.features(*given)
        logits = proxy.layers(first).detach().double().numpy()
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        h.append(p[:, MEMBER])
    want = 0.5 * np.log(h[0]).mean() + 0.5 * np.log(1 - h[1]).mean()
    gain, accuracy = attacker_gain(proxy(*member), proxy(*nonmember))
    assert gain.item() == pytest.approx(want, abs=1e-6) and gain.item() < 0
    assert accuracy == pytest.approx(((h[0] > 0.5).mean() + (h[1] < 0.5).mean()) / 2)
    assert {MEMBER, NONMEMBER} == {0, 1}


def test_step_moves_the_attacker_and_leaves_no_gradient(proxy):
    """Algorithm 1, inner step: its weights move up the slope of G by one step of Adam, each by the
    learning rate at first, and nothing stays behind in them.
    """
    before = [p.detach().clone() for p in proxy.parameters()]
    gain, _ = attacker_gain(proxy(*errors(seed=1)), proxy(*errors(seed=2)))
    slopes = torch.autograd.grad(gain, list(proxy.parameters()), retain_graph=True)
    ascend(torch.optim.Adam(proxy.parameters(), lr=1e-3), gain)
    for p, start, slope in zip(proxy.parameters(), before, slopes, strict=True):
        steep = slope.abs() > 1e-5
        moved = (p.detach() - start)[steep]
        torch.testing.assert_close(moved, 1e-3 * slope[steep].sign(), atol=2e-6, rtol=0)
        assert steep.any() and p.grad is None


def test_steps_raise_the_gain_on_separable_errors(proxy):
    """Members with a third of the error: G climbs from about -log 2 toward 0, and accuracy to 1."""
    optimizer = torch.optim.Adam(proxy.parameters(), lr=1e-3)
    member, nonmember = errors(32, 1, 0.3), errors(32, 2)
    first = step(proxy, optimizer, member, nonmember)
    for _ in range(150):
        step(proxy, optimizer, member, nonmember)
    gain, accuracy = attacker_gain(proxy(*member), proxy(*nonmember))
    assert -1.0 < first < -0.5  # of the untrained attacker
    assert gain.item() > -0.1 and accuracy > 0.95


def test_raw_proxy_has_the_papers_sizes():
    """d -> 512 -> 256 -> 2 with biases."""
    d = math.prod(SHAPE)
    n = sum(p.numel() for p in RawProxy(SHAPE).parameters())
    assert n == d * 512 + 512 + 512 * 256 + 256 + 256 * 2 + 2


def test_raw_proxy_drops_out_in_training_only():
    """Dropout 0.5 twice: two calls differ in train mode and agree in eval mode."""
    torch.manual_seed(0)
    proxy, batch = RawProxy(SHAPE), errors()
    assert not torch.equal(proxy.train()(*batch), proxy(*batch))
    assert torch.equal(proxy.eval()(*batch), proxy(*batch))
    assert [m.p for m in proxy.modules() if isinstance(m, torch.nn.Dropout)] == [0.5, 0.5]


def test_pooled_features_equal_numpy():
    """Log mean, log channel means, log quantiles, then sines and cosines of pi t / 1000 in four
    octaves.
    """
    e, t = errors()
    x, phase = (
        e.double().numpy(),
        t.double().numpy()[:, None] / 1000 * np.pi * np.array([1, 2, 4, 8]),
    )
    quantiles = np.quantile(x.reshape(6, -1), [0.1, 0.25, 0.5, 0.75, 0.9], axis=1).T
    pooled = np.concatenate([x.reshape(6, -1).mean(1)[:, None], x.mean((2, 3)), quantiles], axis=1)
    want = np.concatenate([np.log(pooled + 1e-6), np.sin(phase), np.cos(phase)], axis=1)
    np.testing.assert_allclose(PooledProxy(SHAPE).features(e, t).numpy(), want, atol=2e-5)


def test_only_the_pooled_proxy_knows_the_timestep():
    torch.manual_seed(0)
    e, t = errors()
    raw, pooled = RawProxy(SHAPE).eval(), PooledProxy(SHAPE).eval()
    assert torch.equal(raw(e, t), raw(e, t + 1))
    assert not torch.allclose(pooled(e, t), pooled(e, (t + 300) % 1000), atol=1e-3)


def test_half_precision_errors_are_taken(proxy):
    """The frozen base may run in bfloat16; the attacker stays in float32."""
    e, t = errors()
    assert proxy(e.bfloat16(), t).dtype == torch.float32
