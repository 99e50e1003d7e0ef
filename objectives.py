"""The objectives: adaptation loss, MI gain, their sum (MP-LoRA) and their ratio (SMP-LoRA), with
their gradients.

    L   = mean e                                              Eq. 1-3   `adaptation_loss`
    G   = (1/2) mean log h(e_m) + (1/2) mean log(1 - h(e_n))  Eq. 5     `mi_gain` (its member half)
    MP  = L + lambda G                                        Eq. 6     `sum_objective`
    SMP = L / (1 - lambda G + delta) = L / D                  Eq. 10    `ratio_objective`

The outer step minimises over the adapter on members alone, so only the member half of G is there.
L and G are functions of the same error map e, so one UNet forward serves both, and the gradient of
G runs through the attacker and through the UNet into A and B.  With J = L / D,

    grad J = (grad L + lambda J grad G) / D

so SMP is MP with the adaptive weight lambda J, and its steps are scaled by 1 / D.
Held by tests/test_objectives.py: to the closed forms, and dG/d(A, B) to finite differences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from attacker import MEMBER


def adaptation_loss(error: torch.Tensor) -> torch.Tensor:
    """Eq. 1-3: the mean of the elementwise squared error (B, C, h, w); a scalar >= 0."""
    return error.mean()


def mi_gain(log_h: torch.Tensor) -> torch.Tensor:
    """The member half of Eq. 5: (1/2) mean log h(e), of the attacker's log-probabilities (B, 2); a
    scalar <= 0, without lower bound.
    """
    return 0.5 * log_h[:, MEMBER].mean()


def sum_objective(loss: torch.Tensor, gain: torch.Tensor, lam: float) -> torch.Tensor:
    """Eq. 6, MP-LoRA: L + lambda G.  Unbounded below, since G is."""
    return loss + lam * gain


def ratio_objective(
    loss: torch.Tensor, gain: torch.Tensor, lam: float, delta: float = 1e-5
) -> torch.Tensor:
    """Eq. 10, SMP-LoRA: L / (1 - lambda G + delta).  At least 0, since L is and the denominator is
    above 1.
    """
    return loss / denominator(gain, lam, delta)


def denominator(gain: torch.Tensor, lam: float, delta: float = 1e-5) -> torch.Tensor:
    """D = 1 - lambda G + delta, at least 1 + delta."""
    return 1 - lam * gain + delta


@dataclass
class Terms:
    """What one outer step minimises and what it is made of: scalars with their graph."""

    loss: torch.Tensor  # L, the adaptation loss
    gain: torch.Tensor | None  # G, None for plain LoRA
    denominator: float  # D; 1 where the method has none
    lambda_effective: float  # the weight of grad G against grad L: lambda for MP, lambda J for SMP
    total: torch.Tensor  # what is minimised

    def numbers(self) -> dict[str, float | None]:
        """All of them as plain numbers, for the row of a step."""
        return {
            "adaptation_loss": self.loss.item(),
            "mi_gain": None if self.gain is None else self.gain.item(),
            "objective": self.total.item(),
            "denominator": self.denominator,
            "lambda_effective": self.lambda_effective,
        }


METHODS = ("lora", "mp", "smp", "smp-detached")


def objective(
    method: str,
    loss: torch.Tensor,
    gain: torch.Tensor | None,
    lam: float,
    delta: float = 1e-5,
) -> Terms:
    """What `method` minimises, of the scalars L and G (None for plain LoRA).

    "smp-detached" is a control: the value of SMP, but D is held, so the step is grad L / D and the
    gain has no pull. Raises ValueError for another method.
    """
    if method == "lora":
        return Terms(loss, None, 1.0, 0.0, loss)
    if method == "mp":
        return Terms(loss, gain, 1.0, lam, sum_objective(loss, gain, lam))
    d = denominator(gain.detach(), lam, delta).item()
    if method == "smp":
        ratio = ratio_objective(loss, gain, lam, delta)
        return Terms(loss, gain, d, lam * ratio.item(), ratio)
    if method == "smp-detached":
        return Terms(loss, gain, d, 0.0, ratio_objective(loss, gain.detach(), lam, delta))
    raise ValueError(f"there is no method {method!r}: take one of {', '.join(METHODS)}")


# --------------------------------------------------------------------------------------------------
# Gradients


def gradients(
    value: torch.Tensor, parameters: list[nn.Parameter], keep_graph: bool = False
) -> list[torch.Tensor]:
    """d value / d parameters, touching no `.grad`, so nothing is left behind in the attacker."""
    return list(torch.autograd.grad(value, parameters, retain_graph=keep_graph))


def norm(tensors: list[torch.Tensor]) -> float:
    """L2 norm over all tensors together."""
    return torch.stack([t.norm() for t in tensors]).norm().item()


def gradient_norms(terms: Terms, gradient: Callable) -> dict[str, float]:
    """L2 norms of grad L and grad G apart, and their cosine.

    `gradient(value, keep_graph=True)` gives d value / d(A, B) and keeps the graph for the step
    after it.  A cosine of -1 says that privacy and adaptation pull straight against each other.
    """
    grad_loss = gradient(terms.loss, keep_graph=True)
    norms = {"grad_norm_loss": norm(grad_loss)}
    if terms.gain is not None:
        grad_gain = gradient(terms.gain, keep_graph=True)
        norms["grad_norm_gain"] = norm(grad_gain)
        dot = sum((a * b).sum() for a, b in zip(grad_loss, grad_gain, strict=True)).item()
        norms["grad_cosine"] = dot / max(norms["grad_norm_loss"] * norms["grad_norm_gain"], 1e-30)
    return norms


def clip_(tensors: list[torch.Tensor], limit: float, normalise: bool = False) -> float:
    """Scale gradients in place so that their joint L2 norm is at most `limit`, or is `limit`;
    returns the norm before.
    """
    before = norm(tensors)
    if before > limit or (normalise and before > 0):
        for t in tensors:
            t.mul_(limit / before)
    return before
