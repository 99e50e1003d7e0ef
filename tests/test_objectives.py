"""objectives.py in float64 on the tiny base: values against numpy, gradients against closed forms
and differences.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import settings
from attacker import MEMBER, PROXIES, ascend, attacker_gain
from diffusion import squared_error
from files.bases import load_base
from lora import inject
from objectives import (
    METHODS,
    adaptation_loss,
    clip_,
    denominator,
    gradient_norms,
    gradients,
    mi_gain,
    norm,
    objective,
    ratio_objective,
    sum_objective,
)

LAM, DELTA = 0.5, 1e-5


@dataclass
class Setting:
    """An adapted UNet, an attacker that has seen a few batches, and one batch of members, all in
    float64.
    """

    attacker: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    error: object  # () -> e (4, 4, 8, 8) with its graph
    timesteps: torch.Tensor

    def loss(self):
        return adaptation_loss(self.error())

    def gain(self):
        return mi_gain(self.attacker(self.error(), self.timesteps))

    def terms(self, method, lam=LAM):
        """The objective on one forward, as an outer step computes it."""
        e = self.error()
        gain = None if method == "lora" else mi_gain(self.attacker(e, self.timesteps))
        return objective(method, adaptation_loss(e), gain, lam, DELTA)

    def gradients(self, value, keep_graph=False):
        return gradients(value, self.parameters, keep_graph)


@pytest.fixture(scope="module", params=["raw", "pooled"])
def setting(request, tiny_base):
    g = torch.Generator().manual_seed(0)
    base = load_base(tiny_base)
    adapter = inject(base.unet, "attention", 2, 4, g)
    base.unet.double()
    base = replace(base, abar=base.abar.double())
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.weight.copy_(0.3 * torch.randn(layer.lora_B.weight.shape, generator=g))
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=g, dtype=torch.float64)
    text = torch.randn(4, 16, 32, generator=g, dtype=torch.float64)
    timesteps = torch.tensor([20, 300, 600, 950])

    def error():
        return squared_error(base, latents, text, timesteps, noise)

    torch.manual_seed(0)
    attacker = PROXIES[request.param]((4, 8, 8)).double()
    optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-3)
    e = error().detach()
    for _ in range(5):
        G, _ = attacker_gain(attacker(e, timesteps), attacker(1.5 * e, timesteps))
        ascend(optimizer, G)
    assert e.dtype == torch.float64
    return Setting(attacker.eval(), adapter.parameters(), error, timesteps)


def flat(tensors) -> np.ndarray:
    return torch.cat([t.detach().flatten() for t in tensors]).numpy()


def gradient(setting, value) -> np.ndarray:
    """d value / d(A, B) as one vector, by plain autograd."""
    return flat(torch.autograd.grad(value, setting.parameters))


# ---- values ----


def test_values_equal_numpy(setting):
    """Eq. 1-3, the member half of Eq. 5, Eq. 6 and Eq. 10, from e and h as arrays."""
    e = setting.error().detach()
    h = setting.attacker(e, setting.timesteps).detach().exp().numpy()[:, MEMBER]
    loss, gain = np.mean(e.numpy()), 0.5 * np.mean(np.log(h))
    mp, smp = setting.terms("mp"), setting.terms("smp")
    assert mp.total.item() == pytest.approx(loss + LAM * gain, rel=1e-12)
    assert smp.total.item() == pytest.approx(loss / (1 - LAM * gain + DELTA), rel=1e-12)
    assert (mp.denominator, mp.lambda_effective) == (1.0, LAM)
    assert smp.denominator == pytest.approx(1 - LAM * gain + DELTA, rel=1e-12)
    assert smp.lambda_effective == pytest.approx(LAM * smp.total.item(), rel=1e-12)
    assert (smp.loss.item(), smp.gain.item()) == pytest.approx((loss, gain), rel=1e-12)


def test_lambda_zero_is_lora(setting):
    """SMP at lambda = 0 is L / (1 + delta), MP is L."""
    e, t = setting.error().detach(), setting.timesteps
    loss, gain = adaptation_loss(e), mi_gain(setting.attacker(e, t))
    lora = objective("lora", loss, None, LAM)
    assert lora.gain is None and lora.total.item() == e.mean().item()
    assert objective("mp", loss, gain, 0.0).total.item() == lora.total.item()
    smp = objective("smp", loss, gain, 0.0, DELTA)
    assert smp.total.item() == pytest.approx(lora.total.item() / (1 + DELTA), rel=1e-14)
    assert smp.lambda_effective == 0


def test_the_ratio_is_bounded_and_the_sum_is_not():
    """G has no lower bound: the sum falls below any number, the ratio stays in [0, L / (1 +
    delta)].
    """
    loss = torch.tensor(0.3, dtype=torch.float64)
    for gain in -torch.logspace(-6, 9, 16, dtype=torch.float64):
        ratio = ratio_objective(loss, gain, LAM, DELTA)
        assert 0 <= ratio <= loss / (1 + DELTA) and denominator(gain, LAM, DELTA) >= 1 + DELTA
        assert sum_objective(loss, gain, LAM) == loss - LAM * gain.abs()
    assert sum_objective(loss, gain, LAM) < -1e8


# ---- gradients ----


def test_gradients_equal_the_closed_forms(setting):
    """grad(L + lambda G) = grad L + lambda grad G;  grad J = (grad L + lambda J grad G) / D."""
    loss, gain = setting.loss(), setting.gain()
    d = 1 - LAM * gain.item() + DELTA
    j = loss.item() / d
    grad_loss, grad_gain = gradient(setting, loss), gradient(setting, gain)
    for method, want in (
        ("lora", grad_loss),
        ("mp", grad_loss + LAM * grad_gain),
        ("smp", (grad_loss + LAM * j * grad_gain) / d),
    ):
        terms = setting.terms(method)
        got = flat(setting.gradients(terms.total))
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8 * np.abs(want).max())


def test_gain_gradient_equals_finite_differences(setting):
    """dG / d(A, B) is not zero, and is the slope of G along three random directions (central
    differences).
    """
    got = gradient(setting, setting.gain())
    assert np.linalg.norm(got) > 1e-4
    start, h = [p.detach().clone() for p in setting.parameters], 1e-5

    @torch.no_grad()
    def gain_at(step, direction):
        for p, p0, v in zip(setting.parameters, start, direction, strict=True):
            p.copy_(p0 + step * v)
        return setting.gain().item()

    g = torch.Generator().manual_seed(1)
    try:
        for _ in range(3):
            v = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in start]
            v = [x / norm(v) for x in v]
            slope = (gain_at(h, v) - gain_at(-h, v)) / (2 * h)
            assert slope == pytest.approx(float(got @ flat(v)), rel=1e-5, abs=1e-9)
    finally:
        gain_at(0, start)


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_detached_denominator_is_a_shorter_plain_step(setting):
    """The control for the shape of the objective: grad L / D, parallel to grad L."""
    gain = setting.gain().detach()
    got = gradient(setting, ratio_objective(setting.loss(), gain, LAM, DELTA))
    want = gradient(setting, setting.loss()) / denominator(gain, LAM, DELTA).item()
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)
    terms = setting.terms("smp-detached")
    np.testing.assert_allclose(flat(setting.gradients(terms.total)), want, rtol=1e-10, atol=1e-14)
    smp = setting.terms("smp")
    assert (terms.total.item(), terms.denominator) == (smp.total.item(), smp.denominator)
    assert terms.lambda_effective == 0


def test_outer_step_leaves_the_attacker_alone(setting):
    """Algorithm 1, outer step: no attacker weight moves, and no `.grad` is left there or in A and
    B.
    """
    before = [p.detach().clone() for p in setting.attacker.parameters()]
    terms = setting.terms("smp")
    gradient_norms(terms, setting.gradients)
    optimizer = torch.optim.SGD(setting.parameters, lr=0.0)
    for p, grad in zip(setting.parameters, setting.gradients(terms.total), strict=True):
        assert p.grad is None
        p.grad = grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert all(
        torch.equal(a, b) for a, b in zip(before, setting.attacker.parameters(), strict=True)
    )
    assert all(p.grad is None for p in setting.attacker.parameters())


def test_gradient_norms_equal_separate_calls(setting):
    """||grad L||, ||grad G|| and their cosine; the graph is still there for the step itself."""
    terms = setting.terms("smp")
    got = gradient_norms(terms, setting.gradients)
    grad_loss, grad_gain = gradient(setting, setting.loss()), gradient(setting, setting.gain())
    assert got["grad_norm_loss"] == pytest.approx(np.linalg.norm(grad_loss), rel=1e-8)
    assert got["grad_norm_gain"] == pytest.approx(np.linalg.norm(grad_gain), rel=1e-8)
    assert got["grad_cosine"] == pytest.approx(cosine(grad_loss, grad_gain), rel=1e-8)
    assert -1 <= got["grad_cosine"] <= 1
    assert norm(setting.gradients(terms.total)) > 0
    lora = setting.terms("lora")
    only = gradient_norms(lora, setting.gradients)
    assert only == {"grad_norm_loss": pytest.approx(got["grad_norm_loss"])}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clip_equals_torch(limit):
    """Scaled to the limit if above it, untouched if below; the norm before is returned."""
    g = torch.Generator().manual_seed(0)
    ours = [
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (7,), (2, 2, 2))
    ]
    theirs = [torch.nn.Parameter(torch.zeros_like(t)) for t in ours]
    for p, t in zip(theirs, ours, strict=True):
        p.grad = t.clone()
    want = torch.nn.utils.clip_grad_norm_(theirs, limit).item()
    assert clip_(ours, limit) == pytest.approx(want, rel=1e-12) and want == pytest.approx(
        5.0, abs=2
    )
    for p, t in zip(theirs, ours, strict=True):
        assert torch.allclose(t, p.grad, rtol=1e-5)  # torch divides by the norm + 1e-6
    assert norm(ours) == pytest.approx(min(limit, want), rel=1e-12)


def test_an_unknown_method_is_refused():
    """A typo must not train something else; the flag offers exactly these methods."""
    loss, gain = torch.tensor(0.3), torch.tensor(-0.5)
    with pytest.raises(ValueError, match="no method 'smp-detatched'"):
        objective("smp-detatched", loss, gain, LAM)
    assert ("lora", *settings.ATTACKED) == METHODS
