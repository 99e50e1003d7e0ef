"""--proxy calibrated: the attacker in the loop also reads the base's errors with the same noise.

It so knows how hard an image is without the adapter (Watson et al. 2022, arXiv 2111.08440).

Tested in tests/test_calibrated.py.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from algorithm import Batch, Run, Shuffled
from attacker import PROXIES, PooledProxy


class CalibratedProxy(PooledProxy):
    """The pooled statistics, and how far they are below the base's: (B, 2C, h, w), the error maps
    of the base behind those of the adapter.
    """

    STRETCH = 10  # of the differences, a few per cent where an image was learned

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__(shape)
        self.layers[0] = nn.Linear(self.layers[0].in_features + self.pooled, 64)

    def forward(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        own, base = (self.features(e, timesteps) for e in error.chunk(2, dim=1))
        less = self.STRETCH * (own - base)[:, : self.pooled]
        return F.log_softmax(self.layers(torch.cat([own, less], dim=1)), dim=1)


@dataclass
class Compared(Batch):
    """A batch with what the base makes of it."""

    base: torch.Tensor  # (B, C, h, w) error maps of the base


class Calibrated(Run):
    """A run whose attacker sees e and behind it the base's error maps, (B, 2C, h, w)."""

    proxies = PROXIES | {"calibrated": CalibratedProxy}

    def batch(self, *sets: Shuffled) -> Batch:
        """One more forward, without gradient and without the adapter.

        The whole batch goes through the base as it goes through the adapter: in parts of another
        size the rounding differs, and the first steps of Adam make a step of any difference.
        """
        b = super().batch(*sets)
        if not self.settings.attacked:
            return b
        with torch.no_grad(), self.adapter.disabled():
            base = self.error(b)
        return Compared(**vars(b), base=base)

    def log_h(self, e: torch.Tensor, b: Compared) -> torch.Tensor:
        """Of both, one behind the other."""
        return self.h(torch.cat([e, b.base], dim=1), b.t)
