"""Local smoothness: the Hessian norm of an objective in the adapter, what it is made of, and the
bound on it.

The claim under study (Luo et al. 2025, Propositions 1 and 2): an objective trains well if its
curvature is bounded by its gradient, ||hess|| <= L0 + L1 ||grad|| (Zhang et al. 2020), and the
ratio has L1 > 0 where the sum has L1 = 0. With D = 1 - lambda G + delta and J = L / D, both of
these are identities:

    grad J = (grad L + lambda J grad G) / D
    hess J = (hess L + lambda J hess G) / D + (lambda / D) (grad J grad G^T + grad G grad J^T)

so   ||hess J|| <= (||hess L|| + lambda J ||hess G||) / D + (2 lambda ||grad G|| / D) ||grad J||
                 =               L0'                     +             L1'           ||grad J||.

Vectors are flat, (P,) for P adapter parameters.  Nothing here forms a Hessian: it is known by its
products H v.

    with plain_attention():  # fused attention has no double backward
        gradient = flat_gradient(terms().total, parameters)  # fixed batch, t, eps
    spectrum = lanczos(lambda v: hessian_vector_product(gradient, parameters, v), gradient.detach())

Held by tests/test_smoothness.py: products to a dense Hessian, spectra to known ones, the identities
to autograd.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from objectives import Terms

Product = Callable[[torch.Tensor], torch.Tensor]  # v (P,) -> H v (P,)


# --------------------------------------------------------------------------------------------------
# Hessian-vector products


def plain_attention() -> AbstractContextManager:
    """Attention of plain matrix products inside; the fused kernels can be differentiated only
    once.
    """
    return sdpa_kernel(SDPBackend.MATH)


def flat_gradient(value: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
    """d value / d parameters as one vector (P,), itself with a graph; touches no `.grad`."""
    gradient = torch.autograd.grad(value, parameters, create_graph=True)
    return torch.cat([g.flatten() for g in gradient])


def hessian_vector_product(
    gradient: torch.Tensor, parameters: list[nn.Parameter], vector: torch.Tensor
) -> torch.Tensor:
    """H v = d (gradient . v) / d parameters (Pearlmutter 1994): (P,); one backward pass through
    `flat_gradient`.
    """
    product = torch.autograd.grad(
        gradient, parameters, vector, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([p.flatten() for p in product])


# --------------------------------------------------------------------------------------------------
# Spectra of a symmetric operator known by its products


@dataclass
class Spectrum:
    """What an iteration found out about a symmetric operator H."""

    norm: float  # largest absolute eigenvalue; never above the true one, also when not converged
    values: list[float]  # eigenvalues found, signed, the largest magnitude first
    residual: float  # ||H v - values[0] v||: a true eigenvalue is within this of values[0]
    converged: bool
    products: int  # how many H v were computed
    vector: torch.Tensor  # v (P,) of norm 1


def power_iteration(
    product: Product, start: torch.Tensor, iterations: int = 50, tolerance: float = 1e-6
) -> Spectrum:
    """The spectral norm by v <- H v / ||H v||, the paper's way (50 iterations, tolerance 1e-6).

    The estimate is ||H v||, which rises to the largest |eigenvalue| whatever its sign, also where
    +a and -a tie (there the Rayleigh quotient v.Hv says nothing).  Converged: its relative change
    is at most `tolerance`.
    """
    vector, norm, products = start / start.norm().clamp_min(1e-30), 0.0, 0
    while True:
        image = product(vector)
        products += 1
        before, norm = norm, image.norm().item()
        value = torch.dot(vector, image).item()
        residual = (image - value * vector).norm().item()
        converged = abs(norm - before) <= tolerance * norm
        if converged or products == iterations:
            return Spectrum(norm, [value], residual, converged, products, vector)
        vector = image / norm


def lanczos(
    product: Product,
    start: torch.Tensor,
    iterations: int = 20,
    tolerance: float = 1e-3,
    count: int = 3,
) -> Spectrum:
    """The `count` eigenvalues of largest magnitude by Lanczos (1950) with full reorthogonalisation.

    After k products its estimate is the best in the space that power iteration has walked through,
    so it needs fewer.  Converged: the residual bound is at most `tolerance` of the largest
    |eigenvalue|.  The error of an isolated eigenvalue is of the order of residual^2 / gap, so 1e-3
    here stands for about 1e-6 in the value.
    """
    basis, alphas, betas = [start / start.norm().clamp_min(1e-30)], [], []
    while True:
        image = product(basis[-1])
        scale = image.norm().item()
        alphas.append(torch.dot(basis[-1], image).item())
        for _ in range(2):  # twice is enough (Parlett 1980)
            for v in basis:
                image = image - torch.dot(v, image) * v
        beta = image.norm().item()
        beside = torch.tensor(betas, dtype=torch.float64)
        projected = torch.diag(torch.tensor(alphas, dtype=torch.float64))  # H in the basis: (k, k)
        projected += torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(projected)
        order = values.abs().argsort(descending=True)
        top = order[0]
        residual = beta * vectors[-1, top].abs().item()
        # the basis spans a space that H maps into itself: nothing is left to find
        exhausted = beta <= 1e-7 * max(scale, 1e-30)
        converged = residual <= tolerance * values[top].abs().item() or exhausted
        if converged or len(alphas) == iterations:
            break
        betas.append(beta)
        basis.append(image / beta)
    vector = sum(c * v for c, v in zip(vectors[:, top].tolist(), basis, strict=True))
    found = values[order[:count]].tolist()
    return Spectrum(abs(found[0]), found, residual, converged, len(alphas), vector)


# --------------------------------------------------------------------------------------------------
# The exact decomposition


def ratio_gradient(grad_loss, grad_gain, weight: float, denominator: float) -> torch.Tensor:
    """grad J = (grad L + lambda J grad G) / D, with weight = lambda J; all (P,)."""
    return (grad_loss + weight * grad_gain) / denominator


def curvature_term(hess_loss_v, hess_gain_v, weight: float, denominator: float) -> torch.Tensor:
    """(hess L + weight hess G) v / D from hess L v and hess G v: (P,).

    All of hess v for the sum (weight = lambda, D = 1); for the ratio (weight = lambda J) the part
    without ||grad J||.
    """
    return (hess_loss_v + weight * hess_gain_v) / denominator


def rank_two_term(grad_total, grad_gain, vector, lam: float, denominator: float) -> torch.Tensor:
    """(lambda / D) (grad J grad G^T + grad G grad J^T) v: (P,); the part of hess J v that carries
    ||grad J||.
    """
    along_gain, along_total = torch.dot(grad_gain, vector), torch.dot(grad_total, vector)
    return lam / denominator * (along_gain * grad_total + along_total * grad_gain)


def rank_two_norm(grad_total, grad_gain, lam: float, denominator: float) -> float:
    """Spectral norm of that term, (lambda / D) (|a.b| + ||a|| ||b||): a b^T + b a^T has eigenvalues
    a.b +- ||a|| ||b||.
    """
    dot = torch.dot(grad_total, grad_gain).abs()
    return (lam / denominator * (dot + grad_total.norm() * grad_gain.norm())).item()


def bound(norm_loss, norm_gain, grad_norm_gain, weight, lam, denominator) -> tuple[float, float]:
    """(L0', L1') of ||hess J|| <= L0' + L1' ||grad J|| (Proposition 2), from Hessian norms of L and
    G and ||grad G||.

    With lam = 0, weight = lambda and D = 1 it is Proposition 1's bound on the sum: L0' = ||hess L||
    + lambda ||hess G|| and L1' = 0.
    """
    return (norm_loss + weight * norm_gain) / denominator, 2 * lam * grad_norm_gain / denominator


# --------------------------------------------------------------------------------------------------
# One point of a run

SUFFIX = {"total": "", "loss": "_loss", "gain": "_gain"}  # of the columns about J, L and G


def gradient_scale(gradient: torch.Tensor, parameters: list[nn.Parameter]) -> float:
    """The paper's "gradient scale": the SUM over tensors of their L2 norms (the gradient norm is
    the root of the sum of squares).
    """
    return sum(g.norm() for g in gradient.split([p.numel() for p in parameters])).item()


def measure(
    method: str,
    terms: Callable[[], Terms],
    parameters: list[nn.Parameter],
    lam: float,
    iterations: int = 20,
) -> dict[str, float | bool | int]:
    """Everything above at the parameters as they are, for one row of metrics.jsonl; changes
    nothing.

    `terms` computes the objective anew on a fixed batch with fixed (t, eps), the attacker in eval
    mode.  `fixed_*` is of that batch.  For smp-detached the denominator is held, so the Hessian is
    hess L / D.
    """
    now, gradients, spectra = _spectra(method, terms, parameters, iterations)
    total, coupling = spectra["total"], lam if method == "smp" else 0.0
    d, weight = now.denominator, now.lambda_effective
    norms = {part: g.norm().item() for part, g in gradients.items()}
    norm_gain = spectra["gain"].norm if "gain" in spectra else 0.0
    constant, slope = bound(spectra["loss"].norm, norm_gain, norms["gain"], weight, coupling, d)
    pair = gradients["total"], gradients["gain"]
    along = rank_two_term(*pair, total.vector, coupling, d)
    row = {
        "hessian_norm": total.norm,
        "hessian_value": total.values[0],
        "hessian_residual": total.residual,
        "hessian_converged": all(s.converged for s in spectra.values()),
        "hessian_products": sum({id(s): s.products for s in spectra.values()}.values()),
        "hessian_norm_loss": spectra["loss"].norm,
        "hessian_norm_gain": norm_gain,
        "hessian_rank_two": rank_two_norm(*pair, coupling, d),
        "hessian_rank_two_share": torch.dot(total.vector, along).item() / (total.values[0] or 1.0),
        "hessian_bound": constant + slope * norms["total"],
        "bound_constant": constant,
        "bound_slope": slope,
        "fixed_loss": now.loss.item(),
        "fixed_gain": 0.0 if now.gain is None else now.gain.item(),
        "fixed_denominator": d,
        "fixed_lambda_effective": weight,
        "fixed_loss_over_denominator_squared": now.loss.item() / d**2,
    }
    row |= {f"fixed_grad_norm{SUFFIX[part]}": norm for part, norm in norms.items()}
    for part, gradient in gradients.items():
        row[f"gradient_scale{SUFFIX[part]}"] = gradient_scale(gradient, parameters)
    return row


def _spectra(
    method: str, terms: Callable[[], Terms], parameters: list[nn.Parameter], iterations: int
) -> tuple[Terms, dict[str, torch.Tensor], dict[str, Spectrum]]:
    """Gradients (P,) and Hessian spectra of J, L and G, by part; for plain LoRA J is L, and G is
    nothing.

    `terms` is called once for each, so that only one double graph is held at a time.
    """
    parts = ["total"] if method == "lora" else ["total", "loss", "gain"]
    gradients, spectra = {}, {}
    for part in parts:
        with plain_attention():
            now = terms()
        graph = flat_gradient(getattr(now, part), parameters)
        gradient = gradients[part] = graph.detach()
        start = gradient if gradient.any() else torch.ones_like(gradient)
        spectra[part] = lanczos(
            lambda v, g=graph: hessian_vector_product(g, parameters, v), start, iterations
        )
        del graph
    if method == "lora":
        gradients |= {"loss": gradients["total"], "gain": torch.zeros_like(gradients["total"])}
        spectra["loss"] = spectra["total"]
    return now, gradients, spectra
