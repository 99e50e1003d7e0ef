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
from attacker import PROXIES, attacker_step
from diffusion import squared_error
from files.bases import load_base
from lora import inject
from objectives import METHODS, adaptation_loss, mi_gain, objective
from settings import EMBEDDED
from smoothness import (
    bound,
    curvature_term,
    descend,
    flat_gradient,
    gradient_scale,
    hessian_vector_product,
    lanczos,
    linear_reach,
    measure,
    moved,
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
    attacker = PROXIES[proxy](shape).eval()
    optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-3)
    with torch.no_grad():
        e = error().float()
    for _ in range(20):
        attacker_step(attacker, optimizer, (e, timesteps), (1.5 * e, timesteps))
    attacker.to(dtype)

    def terms(method):
        with plain_attention():
            e = error()
            gain = None if method == "lora" else mi_gain(attacker, e, timesteps)
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
    weights = [
        torch.randn(3, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)
    ]

    def value(q, k, v):
        with plain_attention():
            return F.scaled_dot_product_attention(x @ q, x @ k, x @ v).square().mean()

    blocks = torch.autograd.functional.hessian(value, tuple(weights))
    dense = torch.cat([torch.cat([b.reshape(9, 9) for b in row], dim=1) for row in blocks])
    gradient = flat_gradient(value(*weights), weights)
    for _ in range(3):
        v = torch.randn(27, generator=g, dtype=torch.float64)
        assert torch.allclose(
            hessian_vector_product(gradient, weights, v), dense @ v, rtol=1e-10, atol=1e-12
        )
    true = torch.linalg.eigvalsh(dense)
    start = gradient.detach()
    found = lanczos(
        lambda v: hessian_vector_product(gradient, weights, v), start, 27, tolerance=1e-9
    )
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
    g = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, torch.randn(
        n, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize("top", [3.0, -3.0])
def test_known_spectrum(top):
    """The dominant eigenvalue whatever its sign, and the top few of it in the order of
    magnitude.
    """
    matrix, start = quadratic([top, 2.0, -1.5, *np.linspace(-0.5, 0.5, 37)])
    power, lan = power_iteration(matrix.mv, start), lanczos(matrix.mv, start)
    for found in (power, lan):
        assert found.converged
        assert found.norm == pytest.approx(3, rel=1e-5) and found.values[0] == pytest.approx(
            top, rel=1e-5
        )
        assert found.residual < 0.01
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
        assert (
            iterate(torch.zeros_like, zero + 1).norm == 0 and iterate(lambda v: v, zero).norm == 0
        )
        one = iterate(lambda v: 4 * v, zero + 1)
        assert (one.norm, one.converged) == (pytest.approx(4), True)


# ---- the decomposition ----


def check_decomposition(terms, parameters, tolerance):
    """grad J, hess J v for three v, the triangle bound and the norm of the rank-two term, against
    autograd.
    """
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
    for v in (
        total / total.norm(),
        *(torch.randn(2, len(total), generator=g, dtype=torch.float64).to(total.dtype)),
    ):
        curvature = curvature_term(hess_loss(v), hess_gain(v), weight, d)
        rank_two = rank_two_term(total, grad_gain, v, LAM, d)
        close(curvature + rank_two, hess_total(v))
        assert rank_two.norm() > 0
        assert rank_two.norm() <= (1 + 1e-5) * rank_two_norm(total, grad_gain, LAM, d) * v.norm()
    _, hess_sum = products(terms, parameters, "mp")
    close(curvature_term(hess_loss(v), hess_gain(v), LAM, 1.0), hess_sum(v))


@pytest.mark.parametrize("proxy", ["raw", "pooled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_decomposition_is_exact(tiny_base, proxy, dtype, tolerance):
    check_decomposition(*setting(tiny_base, dtype, proxy), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_decomposition_is_exact_on_the_embedded_model(dtype, tolerance):
    check_decomposition(*setting(EMBEDDED, dtype), tolerance)


def test_rank_two_norm_equals_a_dense_one():
    """(lambda / D) ||a b^T + b a^T||, also for b against a."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, generator=g, dtype=torch.float64)
    for b_ in (b, -b, a, torch.zeros(7, dtype=torch.float64)):
        dense = 2.0 / 1.5 * (torch.outer(a, b_) + torch.outer(b_, a))
        assert rank_two_norm(a, b_, 2.0, 1.5) == pytest.approx(
            torch.linalg.matrix_norm(dense, 2).item()
        )
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
    power = power_iteration(product, start, 300, 1e-8)
    assert row["hessian_converged"] and power.converged
    assert row["hessian_norm"] == pytest.approx(power.norm, rel=1e-4)
    assert row["fixed_grad_norm"] == pytest.approx(gradient.norm().item())
    by_tensor = [g.norm().item() for g in torch.autograd.grad(terms(method).total, parameters)]
    assert (
        row["gradient_scale"]
        == pytest.approx(sum(by_tensor))
        == gradient_scale(gradient, parameters)
    )
    assert row["gradient_scale"] > row["fixed_grad_norm"]
    assert row["hessian_norm"] <= row["hessian_bound"] * (1 + 1e-6)
    if method == "smp":
        assert (
            row["bound_slope"] > 0
            and row["hessian_rank_two"] > 0
            and row["hessian_rank_two_share"] != 0
        )
        assert row["fixed_loss_over_denominator_squared"] == pytest.approx(
            row["fixed_loss"] / row["fixed_denominator"] ** 2
        )
    else:
        assert row["bound_slope"] == row["hessian_rank_two"] == row["hessian_rank_two_share"] == 0
    if method == "mp":
        assert row["bound_constant"] == pytest.approx(
            row["hessian_norm_loss"] + LAM * row["hessian_norm_gain"]
        )
    assert all(p.grad is None for p in parameters)


def run(tiny_base, image_folder, out, **more):
    train.train(
        train.Settings(
            model=tiny_base,
            data=image_folder,
            out=str(out),
            members=20,
            rank=1,
            alpha=2,
            batch_size=4,
            target="attention",
            proxy="pooled",
            lam=LAM,
            lr=0.01,
            attacker_lr=0.01,
            **more,
        )
    )
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return load_file(Path(out) / "adapter" / "pytorch_lora_weights.safetensors"), rows


@pytest.mark.parametrize("method", METHODS)
def test_looking_does_not_change_the_run(tiny_base, image_folder, tmp_path, method):
    """With and without --hessian-every the adapters are bit-equal; the bound holds at every logged
    point.
    """
    looked, rows = run(
        tiny_base, image_folder, tmp_path / "a", method=method, steps=3, hessian_every=2
    )
    plain, other = run(tiny_base, image_folder, tmp_path / "b", method=method, steps=3)
    assert all(torch.equal(looked[k], plain[k]) for k in plain)
    assert [r.get("adaptation_loss") for r in rows] == [r.get("adaptation_loss") for r in other]
    assert not any("hessian_norm" in r for r in other)
    points = [r for r in rows if "hessian_norm" in r]
    assert [r["step"] for r in points] == [1, 2]
    for r in points:
        assert 0 < r["hessian_norm"] <= r["hessian_bound"] * (1 + 1e-4)
        assert r["hessian_bound"] == pytest.approx(
            r["bound_constant"] + r["bound_slope"] * r["fixed_grad_norm"]
        )
        assert isinstance(r["hessian_converged"], bool) and r["hessian_products"] >= 1
    if method == "smp":
        assert points[0]["fixed_lambda_effective"] == pytest.approx(
            LAM * points[0]["fixed_loss"] / points[0]["fixed_denominator"], rel=1e-5
        )


# ---- walks ----


def bowl():
    """((a - 3)^2 + 100 b^2) / 2 in float64, and its parameters at (0, 1)."""
    a, b = (torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (0.0, 1.0))
    return lambda: (((a - 3) ** 2 + 100 * b**2) / 2).sum(), [a, b]


def test_a_move_is_taken_back():
    """Inside the parameters stand elsewhere; afterwards, also after an error, where they were."""
    value, parameters = bowl()
    before = [p.detach().clone() for p in parameters]
    with moved(parameters, torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5):
        assert [p.item() for p in parameters] == [0.5, 0.5]
        assert value().item() == pytest.approx((2.5**2 + 100 * 0.25) / 2)
    with pytest.raises(ZeroDivisionError), moved(parameters, torch.ones(2, dtype=torch.float64)):
        _ = 1 / 0
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))


def test_a_descent_follows_the_gradient():
    """The flow of the bowl is exp(-t) and exp(-100 t): at b = 0.1, a is where that has it.  The
    path goes on to the minimum, ends where the gradient is zero, and is taken back.
    """
    value, parameters = bowl()
    places = {
        length: [p.item() for p in parameters]
        for length in descend(value, parameters, size=1e-3, steps=5000)
    }
    lengths = list(places)
    assert lengths == pytest.approx(1e-3 * np.arange(5001))
    steps = np.linalg.norm(np.diff(list(places.values()), axis=0), axis=1)
    assert steps == pytest.approx(1e-3)
    a = next(a for a, b in places.values() if b < 0.1)
    assert a == pytest.approx(3 * (1 - 0.1 ** (1 / 100)), rel=0.02)
    assert places[lengths[-1]] == pytest.approx([3, 0], abs=0.05)
    assert [p.item() for p in parameters] == [0, 1]
    walk = descend(value, parameters, size=1e-3, steps=5)
    assert next(walk) == 0 and next(walk) == 1e-3
    walk.close()
    assert [p.item() for p in parameters] == [0, 1]
    assert list(descend(lambda: 0 * value(), parameters, size=1.0, steps=5)) == [0]


def test_how_far_a_gradient_describes():
    """x + x^2 is its slope to a quarter up to x = 1/4, on the worse side too; a kink or a
    wrong slope nowhere.
    """
    steps = [0.05, 0.1, 0.2, 0.25, 0.3, 0.05]
    both = {sign: [sign * x + x * x for x in steps] for sign in (1, -1)}
    assert linear_reach(steps, both, 1.0) == 0.25
    kink = {1: steps, -1: steps}
    assert linear_reach(steps, kink, 1.0) == 0 == linear_reach(steps, both, 3.0)
