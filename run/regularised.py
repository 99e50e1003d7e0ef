"""What keeps an adapter from memorising without an attacker: a schedule and mirrored images.

Tested in tests/test_regularisation.py.
"""

import math
from dataclasses import replace

import torch

from algorithm import Batch, Run, Shuffled
from diffusion import encode_images, prediction_target


class Scheduled(Run):
    """--schedule: the learning rate falls from --lr to 0."""

    def descend(self, g: list[torch.Tensor], step: int) -> None:
        """`step` counts from 1."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * share_of_rate(s.schedule, step, s.steps)
        super().descend(g, step)


def share_of_rate(schedule: str, step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ..., `steps` as a share of --lr: in (0, 1], 1 at step 1."""
    done = (step - 1) / steps
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shares[schedule]


class Mirrored(Run):
    """--flip: every other draw of a member is mirrored; the attacker's batches stay as they are."""

    def __init__(self, *given, mirror: torch.Tensor | None = None, **more):
        """`mirror` (N, C, h, w) are the latents of the mirrored images, where they are known."""
        super().__init__(*given, **more)
        if mirror is None:
            mirror = encode_images(self.base, self.data.pixels[:, :, ::-1].copy())
        self.mirror = mirror

    def batch(self, *sets: Shuffled) -> Batch:
        """Of the members, half are mirrored by chance."""
        b = super().batch(*sets)
        if sets[0] is not self.D_tr:
            return b
        mirrored = (torch.rand(len(b), generator=self.outer) < 0.5).to(self.base.device)
        z0 = torch.where(mirrored.view(-1, 1, 1, 1), self.mirror[b.index], b.z0)
        target = prediction_target(z0, b.eps, b.t, self.base.abar, self.base.prediction)
        return replace(b, z0=z0, target=target)
