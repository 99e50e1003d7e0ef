"""The proxy attacker h: tells members from non-members by the elementwise denoising error.

    e = (eps - f(z_t, t, tau(y)))^2     (B, C, h, w), not reduced    Luo et al. 2025
    h(e) = P(member | e)                a two-way softmax

During training h is the opponent (Algorithm 1); a fresh h' trained from scratch afterwards is a
measurement (evaluate.py).  Two architectures behind one call, `attacker(error, timesteps) ->
log-probabilities (B, 2)`, column `MEMBER` being log h and the other log(1 - h):

- `RawProxy`, the paper's: an MLP on all C*h*w errors of one draw.  It overfits a small auxiliary
  set.
- `PooledProxy`: a few statistics of the error map and the timestep, into a small MLP.  It does
  not, and it knows that an error of 0.1 means one thing at t = 50 and another at t = 900.

Held by tests/test_attacker.py.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

NONMEMBER, MEMBER = 0, 1


class RawProxy(nn.Module):
    """MLP d -> 512 -> 256 -> 2 with ReLU and dropout 0.5 on the flattened error map (the paper's
    h_omega).
    """

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(shape), 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(256, 2),
        )

    def forward(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(
            self.layers(error.to(self.layers[1].weight.dtype)), dim=1
        )  # (B, 2); blind to t


class PooledProxy(nn.Module):
    """Log mean, log channel means and log quantiles of the error map, with sines of t, into an MLP
    64 -> 64 -> 2.
    """

    QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
    FREQUENCIES = 4

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.pooled = 1 + shape[0] + len(self.QUANTILES)  # features of the errors
        width = self.pooled + 2 * self.FREQUENCIES
        self.layers = nn.Sequential(
            nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def features(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) errors and (B,) timesteps in 0..999 -> (B, 1 + C + 5 + 8)."""
        error = error.to(self.layers[0].weight.dtype)
        q = torch.quantile(error.flatten(1), error.new_tensor(self.QUANTILES), dim=1).T  # (B, 5)
        pooled = torch.cat([error.mean((1, 2, 3))[:, None], error.mean((2, 3)), q], dim=1)
        phase = (
            timesteps.to(q.dtype)[:, None]
            / 1000
            * math.pi
            * 2.0 ** torch.arange(self.FREQUENCIES, device=q.device)
        )
        return torch.cat([torch.log(pooled + 1e-6), phase.sin(), phase.cos()], dim=1)

    def forward(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.layers(self.features(error, timesteps)), dim=1)


PROXIES = {"raw": RawProxy, "pooled": PooledProxy}


def attacker_gain(log_m: torch.Tensor, log_n: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Eq. 5 on one balanced batch: (G, accuracy) of the log-probabilities (B, 2) of members and of
    non-members.

    G = (1/2) mean log h(e_m) + (1/2) mean log(1 - h(e_n)) <= 0; a clueless attacker has G = -log 2.
    """
    gain = 0.5 * log_m[:, MEMBER].mean() + 0.5 * log_n[:, NONMEMBER].mean()
    member_hits = (log_m.argmax(1) == MEMBER).float().mean()
    nonmember_hits = (log_n.argmax(1) == NONMEMBER).float().mean()
    return gain, (member_hits + nonmember_hits).item() / 2


def ascend(optimizer: torch.optim.Optimizer, gain: torch.Tensor) -> None:
    """Algorithm 1, inner step: one step of the attacker's weights up the slope of G; no gradient
    stays behind in them.
    """
    optimizer.zero_grad(set_to_none=True)
    (-gain).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
