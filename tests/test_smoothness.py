"""smoothness.py: products to a dense Hessian, spectra to known ones, the identities to autograd,
the log of a run.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import train
from attacker import PROXIES, ascend, attacker_gain
from diffusion import squared_error
from files.bases import load_base
from lora import inject
from objectives import METHODS, adaptation_loss, mi_gain, objective
from settings import EMBEDDED
from smoothness import (
    bound,
    curvature_term,
    flat_gradient,
    gradient_scale,
    hessian_vector_product,
    lanczos,
    measure,
    plain_attention,
    power_iteration,
    rank_two_norm,
    rank_two_term,
    ratio_gradient,
)

LAM, DELTA = 2.0, 1e-5


def setting(model, dtype, proxy="pooled", rank=2, batch=4):
    """(terms(method) -> Terms on a fixed batch, parameters) of an adapted UNet and a trained
    attacker in `dtype`.
    """
    g = torch.Generator().manual_seed(0)
    base = load_base(model)
    adapter = inject(base.unet, "attention", rank, 2 * rank, g)
    base.unet.to(dtype)
    base.abar = base.abar.to(dtype)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.weight.copy_(0.05 * torch.randn(layer.lora_B.weight.shape, generator=g))
    shape, text = base.latent_shape, base.unet.config.cross_attention_dim
    latents, noise = torch.randn(2, batch, *shape, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(batch, 16, text, generator=g, dtype=torch.float64).to(dtype)
    timesteps = torch.linspace(20, 950, batch).long()

    def error():
        return squared_error(base, latents, text, timesteps, noise)

    torch.manual_seed(0)
    attacker = PROXIES[proxy](shape)
    optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-3)
    with torch.no_grad():
        e = error().float()
    for _ in range(20):
        ascend(optimizer, attacker_gain(attacker(e, timesteps), attacker(1.5 * e, timesteps))[0])
    attacker.to(dtype).eval()

    def terms(method):
        with plain_attention():
            e = error()
            gain = None if method == "lora" else mi_gain(attacker(e, timesteps))
            return objective(method, adaptation_loss(e), gain, LAM, DELTA)

    return terms, adapter.parameters()


def products(terms, parameters, method, part="total"):
    """(gradient (P,), v -> H v) of one part of the objective."""
    graph = flat_gradient(getattr(terms(method), part), parameters)
    return graph.detach(), lambda v: hessian_vector_product(graph, parameters, v)


# ---- Hessian-vector products ----


def test_products_equal_a_dense_hessian():
    """H v of an attention layer small enough to form H with torch.func, which differentiates
    forward over reverse.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    weights = list(torch.randn(3, 3, 3, generator=g, dtype=torch.float64))
    weights = [w.requires_grad_() for w in weights]

    def value(q, k, v):
        with plain_attention():
            return F.scaled_dot_product_attention(x @ q, x @ k, x @ v).square().mean()

    blocks = torch.autograd.functional.hessian(value, tuple(weights))
    dense = torch.cat([torch.cat([b.reshape(9, 9) for b in row], dim=1) for row in blocks])
    gradient = flat_gradient(value(*weights), weights)
    for _ in range(3):
        v = torch.randn(27, generator=g, dtype=torch.float64)
        product = hessian_vector_product(gradient, weights, v)
        assert torch.allclose(product, dense @ v, rtol=1e-10, atol=1e-12)
    true, start = torch.linalg.eigvalsh(dense), gradient.detach()
    found = lanczos(lambda v: hessian_vector_product(gradient, weights, v), start, 27, 1e-9)
    assert found.converged and found.norm == pytest.approx(true.abs().max().item(), rel=1e-9)
    assert all(p.grad is None for p in weights)


@pytest.mark.parametrize("method", METHODS)
def test_products_equal_differences_of_gradients(tiny_base, method):
    """H v through UNet and attacker is (grad(x + h v) - grad(x - h v)) / 2h; for smp-detached, with
    D held.
    """
    terms, parameters = setting(tiny_base, torch.float64)
    gradient, product = products(terms, parameters, method)
    vector = gradient / gradient.norm()
    got = product(vector)
    d0 = terms(method).denominator

    @torch.no_grad()
    def move(step):
        for p, v in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p += step * v.view_as(p)

    def gradient_at(step):
        move(step)
        now = terms(method)
        value = now.loss / d0 if method == "smp-detached" else now.total
        found = flat_gradient(value, parameters).detach()
        move(-step)
        return found

    h = 1e-5
    want = (gradient_at(h) - gradient_at(-h)) / (2 * h)
    assert (got - want).norm() < 1e-6 * want.norm()


# ---- spectra ----


def quadratic(values, seed=0):
    """A symmetric matrix of the given eigenvalues and a start that has a part of every
    eigenvector.
    """
    g, n = torch.Generator().manual_seed(seed), len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    matrix = q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T
    return matrix, torch.randn(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("top", [3.0, -3.0])
def test_known_spectrum(top):
    """The dominant eigenvalue whatever its sign, and the top few of it in the order of
    magnitude.
    """
    matrix, start = quadratic([top, 2.0, -1.5, *np.linspace(-0.5, 0.5, 37)])
    power, lan = power_iteration(matrix.mv, start), lanczos(matrix.mv, start)
    for found in (power, lan):
        assert found.converged and found.residual < 0.01
        assert found.norm == pytest.approx(3, rel=1e-5)
        assert found.values[0] == pytest.approx(top, rel=1e-5)
        assert (matrix @ found.vector - found.values[0] * found.vector).norm() < 0.01
    assert lan.values == pytest.approx([top, 2.0, -1.5], rel=1e-2)
    assert lan.products < power.products <= 50


def test_a_tie_of_signs():
    """+a and -a: the Rayleigh quotient wanders, the norm does not."""
    matrix, start = quadratic([2.0, -2.0, *np.linspace(-1, 1, 20)])
    assert power_iteration(matrix.mv, start).norm == pytest.approx(2, rel=1e-5)
    assert lanczos(matrix.mv, start, 23).norm == pytest.approx(2, rel=1e-5)


def test_no_convergence_is_said():
    """Too few products: flagged, and the estimate stays below the norm, Lanczos nearer than power
    iteration.
    """
    matrix, start = quadratic(np.linspace(0.9, 1.0, 200).tolist())
    power, lan = power_iteration(matrix.mv, start, 6, 1e-9), lanczos(matrix.mv, start, 6)
    assert not power.converged and not lan.converged
    assert power.products == lan.products == 6
    assert power.norm <= lan.norm <= 1 + 1e-12
    assert np.abs(lan.values[0] - np.linspace(0.9, 1.0, 200)).min() <= lan.residual


def test_nothing_to_find():
    """A zero operator, a zero start and an invariant space end without a division by zero."""
    zero = torch.zeros(5, dtype=torch.float64)
    for iterate in (power_iteration, lanczos):
        assert iterate(torch.zeros_like, zero + 1).norm == 0
        assert iterate(lambda v: v, zero).norm == 0
        one = iterate(lambda v: 4 * v, zero + 1)
        assert (one.norm, one.converged) == (pytest.approx(4), True)


# ---- the decomposition ----


@pytest.mark.parametrize("proxy", ["raw", "pooled", "embedded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_decomposition_is_exact(tiny_base, proxy, dtype, tolerance):
    """grad J, hess J v for three v, and the norm of the rank-two term, against autograd; on the
    tiny model with each attacker, and on the embedded one.
    """
    model, proxy = (EMBEDDED, "pooled") if proxy == "embedded" else (tiny_base, proxy)
    terms, parameters = setting(model, dtype, proxy)
    now = terms("smp")
    d, weight = now.denominator, now.lambda_effective
    total, hess_total = products(terms, parameters, "smp")
    grad_loss, hess_loss = products(terms, parameters, "smp", "loss")
    grad_gain, hess_gain = products(terms, parameters, "smp", "gain")
    assert grad_gain.norm() > 1e-4 * grad_loss.norm()

    def close(got, want):
        assert (got - want).norm() <= tolerance * want.norm()

    close(ratio_gradient(grad_loss, grad_gain, weight, d), total)
    g = torch.Generator().manual_seed(3)
    others = torch.randn(2, len(total), generator=g, dtype=torch.float64).to(total.dtype)
    for v in (total / total.norm(), *others):
        curvature = curvature_term(hess_loss(v), hess_gain(v), weight, d)
        rank_two = rank_two_term(total, grad_gain, v, LAM, d)
        close(curvature + rank_two, hess_total(v))
        assert rank_two.norm() > 0
        assert rank_two.norm() <= (1 + 1e-5) * rank_two_norm(total, grad_gain, LAM, d) * v.norm()
    _, hess_sum = products(terms, parameters, "mp")
    close(curvature_term(hess_loss(v), hess_gain(v), LAM, 1.0), hess_sum(v))


def test_rank_two_norm_equals_a_dense_one():
    """(lambda / D) ||a b^T + b a^T||, also for b against a."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, generator=g, dtype=torch.float64)
    for b_ in (b, -b, a, torch.zeros(7, dtype=torch.float64)):
        dense = 2.0 / 1.5 * (torch.outer(a, b_) + torch.outer(b_, a))
        norm = torch.linalg.matrix_norm(dense, 2).item()
        assert rank_two_norm(a, b_, 2.0, 1.5) == pytest.approx(norm)
        assert torch.allclose(rank_two_term(a, b_, b, 2.0, 1.5), dense @ b)


def test_the_bound_by_hand():
    """Proposition 2 with ||hess L|| = 3, ||hess G|| = 5, ||grad G|| = 7, lambda J = 0.5, lambda =
    2, D = 4.
    """
    assert bound(3, 5, 7, 0.5, 2, 4) == (1.375, 7.0)
    assert bound(3, 5, 7, 2, 0, 1) == (13, 0)  # Proposition 1: no term carries the gradient


# ---- one point, and a run ----


@pytest.mark.parametrize("method", METHODS)
def test_measure_equals_power_iteration(tiny_base, method):
    """A converged point of the log: the norm by the paper's way from another start, gradient scales
    by a loop.
    """
    terms, parameters = setting(tiny_base, torch.float64)
    row = measure(method, lambda: terms(method), parameters, LAM, iterations=40)
    gradient, product = products(terms, parameters, method)
    g = torch.Generator().manual_seed(1)
    start = torch.randn(len(gradient), generator=g, dtype=torch.float64)
    power = power_iteration(product, start, 300, 1e-6)
    assert row["hessian_converged"] and power.converged
    assert row["hessian_norm"] == pytest.approx(power.norm, rel=1e-3)
    assert row["fixed_grad_norm"] == pytest.approx(gradient.norm().item())
    by_tensor = [g.norm().item() for g in torch.autograd.grad(terms(method).total, parameters)]
    scale = row["gradient_scale"]
    assert scale == pytest.approx(sum(by_tensor)) == gradient_scale(gradient, parameters)
    assert scale > row["fixed_grad_norm"]
    assert row["hessian_norm"] <= row["hessian_bound"] * (1 + 1e-6)
    rank_two = row["bound_slope"], row["hessian_rank_two"], abs(row["hessian_rank_two_share"])
    assert min(rank_two) > 0 if method == "smp" else rank_two == (0, 0, 0)
    if method == "smp":
        squared = row["fixed_loss"] / row["fixed_denominator"] ** 2
        assert row["fixed_loss_over_denominator_squared"] == pytest.approx(squared)
    if method == "mp":
        constant = row["hessian_norm_loss"] + LAM * row["hessian_norm_gain"]
        assert row["bound_constant"] == pytest.approx(constant)
    assert all(p.grad is None for p in parameters)


def run(tiny_base, image_folder, out, **more):
    """The adapter's weights and the rows of a short training."""
    settings = {"members": 20, "rank": 1, "alpha": 2, "batch_size": 4, "target": "attention"}
    settings |= {"proxy": "pooled", "lam": LAM, "lr": 0.01, "attacker_lr": 0.01, "steps": 3}
    settings |= {"model": tiny_base, "data": image_folder, "out": str(out)} | more
    train.train(train.Settings(**settings))
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return load_file(Path(out) / "adapter" / "pytorch_lora_weights.safetensors"), rows


@pytest.mark.parametrize("method", METHODS)
def test_looking_does_not_change_the_run(tiny_base, image_folder, tmp_path, method):
    """With and without --hessian-every the adapters are bit-equal; the bound holds at every logged
    point.
    """
    looked, rows = run(tiny_base, image_folder, tmp_path / "a", method=method, hessian_every=2)
    plain, other = run(tiny_base, image_folder, tmp_path / "b", method=method)
    assert all(torch.equal(looked[k], plain[k]) for k in plain)
    assert [r.get("adaptation_loss") for r in rows] == [r.get("adaptation_loss") for r in other]
    assert not any("hessian_norm" in r for r in other)
    points = [r for r in rows if "hessian_norm" in r]
    assert [r["step"] for r in points] == [1, 2]
    for r in points:
        assert 0 < r["hessian_norm"] <= r["hessian_bound"] * (1 + 1e-4)
        said = r["bound_constant"] + r["bound_slope"] * r["fixed_grad_norm"]
        assert r["hessian_bound"] == pytest.approx(said)
        assert isinstance(r["hessian_converged"], bool) and r["hessian_products"] >= 1
    if method == "smp":
        weight = LAM * points[0]["fixed_loss"] / points[0]["fixed_denominator"]
        assert points[0]["fixed_lambda_effective"] == pytest.approx(weight, rel=1e-5)
