"""The paper's attacker as the adversary: fresh networks h', trained on error maps of images whose
membership the attacker knows, and what they say of every image.

Luo et al. 2025, section on evaluation; h is in attacker.py.  Tested in tests/test_attacks.py on a
planted signal.
"""

import copy

import numpy as np
import torch

from attacker import MEMBER, PROXIES, ascend, attacker_gain
from command import progress
from diffusion import DRAWS, GRID_BATCH, TIMESTEPS, Base, at_once, residuals, squared_error
from files.images import SIDES

FRESH = 8  # draws of noise per known image: fresh noise costs a UNet forward
RATES = {"raw": 1e-4, "pooled": 3e-3}  # learning rates
BATCH = 16

Errors = list[tuple[torch.Tensor, torch.Tensor]]  # (errors, timesteps) of members, of non-members


def train_proxies(
    base: Base,
    latents,
    text,
    roles: dict[str, list[int]],
    seed: int,
    kinds=tuple(RATES),
    epochs: int = 100,
) -> dict[str, torch.nn.Module]:
    """A fresh attacker h' of each kind, trained on the auxiliary images for `epochs` (100 in the
    paper).

    The checkpoint is that of the best accuracy on *validation* images; the paper takes the test
    set's.  All kinds see the same error maps.
    """
    generator = torch.Generator().manual_seed(seed)
    train, valid = (
        [known_errors(base, latents, text, roles[f"{side}_{part}"], generator) for side in SIDES]
        for part in ("aux", "val")
    )
    state, found = generator.get_state(), {}
    for kind in kinds:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            generator.set_state(state)
            attacker = PROXIES[kind](base.latent_shape).to(base.device).eval()
            optimizer = torch.optim.Adam(attacker.parameters(), lr=RATES[kind])
            found[kind] = fit(attacker, optimizer, train, valid, epochs, generator)
    return found


@torch.no_grad()
def known_errors(base: Base, latents, text, index: list[int], generator) -> tuple:
    """FRESH error maps (FRESH * len(index), C, h, w) of each image and their timesteps."""
    index = torch.tensor(index).repeat(FRESH)
    timesteps = torch.randint(max(TIMESTEPS) + 50, (len(index),), generator=generator)
    noise = torch.randn((len(index), *base.latent_shape), generator=generator)
    timesteps, noise = timesteps.to(base.device), noise.to(base.device)
    parts = torch.arange(len(index)).split(at_once(base, GRID_BATCH))
    errors = [
        squared_error(base, latents[index[i]], text[index[i]], timesteps[i], noise[i])
        for i in progress.over(parts, "errors of known images")
    ]
    return torch.cat(errors), timesteps


def fit(attacker, optimizer, train: Errors, valid: Errors, epochs: int, generator):
    """Ascend on G over one of the draws per image and epoch; the best attacker on `valid`."""
    best, kept = -1.0, copy.deepcopy(attacker.state_dict())
    for epoch in progress.over(range(epochs), "proxy attacker"):
        halves = []
        for error, timesteps in train:
            size = len(error) // FRESH
            order = epoch % FRESH * size + torch.randperm(size, generator=generator)
            halves.append([(error[i], timesteps[i]) for i in order.split(BATCH)])
        attacker.train()
        for member, nonmember in zip(*halves, strict=False):
            gain, _ = attacker_gain(attacker(*member), attacker(*nonmember))
            ascend(optimizer, gain)
        attacker.eval()
        with torch.no_grad():
            _, accuracy = attacker_gain(attacker(*valid[0]), attacker(*valid[1]))
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(attacker.state_dict())
    attacker.load_state_dict(kept)
    return attacker


def sweep(
    base: Base, latents, text, attackers: dict
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """One pass over the grid for everything that reads residuals: losses (N, T, K), residuals
    averaged over draws (N, T, C, h, w), and per attacker the log-odds log h' - log(1 - h') of each
    error map, (N, T, K).
    """
    grid = torch.empty(len(latents), len(TIMESTEPS), DRAWS)
    averaged = torch.zeros(len(latents), len(TIMESTEPS), *base.latent_shape)
    odds = {name: torch.empty_like(grid) for name in attackers}
    for at, j, k, off in residuals(base, latents, text):
        error = off.square()
        grid[at, j, k] = error.mean((1, 2, 3)).cpu()
        averaged[at, j] += off.cpu() / DRAWS
        timesteps = torch.full((len(error),), TIMESTEPS[j], device=base.device)
        for name, attacker in attackers.items():
            with torch.no_grad():
                log_h = attacker(error, timesteps)
            odds[name][at, j, k] = (log_h[:, MEMBER] - log_h[:, 1 - MEMBER]).cpu()
    return grid, averaged, odds


def one_draw(odds: torch.Tensor, seed: int) -> np.ndarray:
    """The paper's reading of h': one random (t, eps) per image, of (N, T, K)."""
    pick = np.random.default_rng(seed).integers(odds[0].numel(), size=len(odds))
    return odds.flatten(1).numpy()[np.arange(len(odds)), pick]
