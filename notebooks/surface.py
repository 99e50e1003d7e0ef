"""Walks on the surface of an objective, for notebook 3: steps along a direction, descent along the
gradient, and how far a gradient describes the objective.

Directions are flat, (P,) for P parameters.  Held by tests/test_notebooks.py to a bowl whose
descent is known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@contextmanager
def moved(
    parameters: list[nn.Parameter], direction: torch.Tensor, step: float = 1.0
) -> Iterator[None]:
    """Inside, the parameters stand `step` times the flat `direction` (P,) away; afterwards they are
    back, bit for bit.
    """
    here = parameters_to_vector(parameters).detach()
    try:
        vector_to_parameters(here + step * direction, parameters)
        yield
    finally:
        vector_to_parameters(here, parameters)


def descend(
    value: Callable[[], torch.Tensor], parameters: list[nn.Parameter], size: float, steps: int
) -> Iterator[float]:
    """Follow -grad of `value` with the gradient taken anew at every step (gradient flow, by Euler).

    Every step has length `size` (L2 norm over all parameters).  Yields the length of the path so
    far, 0 first, while the parameters stand at its end; they are put back when the generator is
    closed or exhausted.  The path ends early where the gradient is zero.
    """
    start = parameters_to_vector(parameters).detach()
    try:
        yield 0.0
        for k in range(1, steps + 1):
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value(), parameters)])
            if not gradient.any():
                return
            here = parameters_to_vector(parameters).detach()
            vector_to_parameters(here - size / gradient.norm() * gradient, parameters)
            yield k * size
    finally:
        vector_to_parameters(start, parameters)


def linear_reach(steps, changes, slope: float, share: float = 0.25) -> float:
    """How far a gradient describes a function: the longest of `steps` (K,), rising and above 0, up
    to which every change is within `share` of what the slope says, on both sides.

    `changes` are {+1: (K,), -1: (K,)} values less that at 0, `slope` the derivative for +1.  0
    where the shortest step is not described.
    """
    reach = 0.0
    for k, step in enumerate(steps):
        said = slope * step
        if any(abs(changes[sign][k] - sign * said) > share * abs(said) for sign in (1, -1)):
            break
        reach = float(step)
    return reach
