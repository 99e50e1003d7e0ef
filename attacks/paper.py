"""The paper's own evaluation of a model, top to bottom (Luo et al. 2025, section on evaluation).

    found = evaluation(base, data, seed, network, real)     # the adapter stands in the base's UNet

1. What leaks: a fresh attacker h' is trained from scratch on the error maps of auxiliary images,
   whose membership the adversary knows.  What it says of test images gives ASR, AUC and TPR at low
   FPR.
2. What was learned: the adaptation loss on test non-members.
3. How good the pictures are: Frechet distance and KID of pictures from the members' captions.

The paper differs in two choices: it takes the epoch of h' that is best on the *test* images, here
it is the best on validation images; and it compares pictures with the members alone, which rewards
memorisation, so `real` holds other pictures as well.  The networks h are in attacker.py, the
statistics in roc.py and quality.py.  What else evaluate.py asks stands in model.py and single.py.
Tested in tests/test_attacks.py on a planted signal.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from attacker import MEMBER, PROXIES, ascend, attacker_gain
from attacks import quality
from command import progress
from curves import roc
from diffusion import (
    DRAWS,
    GRID_BATCH,
    LATE_TIMESTEPS,
    TIMESTEPS,
    Base,
    Encoded,
    at_once,
    encode_captions,
    ignore,
    loss_grid,
    residuals,
    sample,
    squared_error,
)
from files import sdxl

FRESH = 8  # draws of noise per known image: fresh noise costs a UNet forward
EPOCHS = 100  # as in the paper
BATCH = 16
RATES = {"raw": 1e-4, "pooled": 3e-3}  # learning rate per kind of h'; raw is the paper's
GUIDANCE = 3.0

Errors = list[tuple[torch.Tensor, torch.Tensor]]  # (errors, timesteps) of members, of non-members


def evaluation(
    base: Base,
    data: Encoded,
    seed: int,
    network: nn.Module | None,
    real: dict[str, torch.Tensor],
    pictures: int = 100,
    steps: int = 20,
    kinds: tuple[str, ...] = ("raw",),
    keep: Callable[[str, Callable[[], dict]], dict] = lambda name, ask: ask(),
) -> dict:
    """What the model leaks, its held-out loss, and the quality of `pictures` of it (0: none).

    `real` {name: (N, F)} are features by `network` of the pictures to compare with.  `keep(name,
    ask)` may return what `ask` returned before.  Attackers of further `kinds` learn beside the
    paper's, for other attacks.
    """
    asked = keep("grid", lambda: error_maps(base, data, seed, kinds))
    score = one_draw(asked["odds-raw"], seed)  # (N,), higher = member
    threshold = roc.best_threshold(*data.pair(score, "val"))
    found = {
        "score": score,
        "figures": roc.figures(*data.pair(score, "test"), threshold),  # AUC, ASR, TPR
        "held_out_loss": float(asked["by_timestep"][data.roles["nonmember_test"]].mean()),
    }
    if pictures:
        text = data.text[np.resize(data.members(), pictures)]
        which = f"{pictures}-{steps}"
        made = keep(f"pictures-{which}", lambda: {"made": draw(base, text, steps)})["made"]
        kept = keep(
            f"features-{which}", lambda: {"features": quality.features(network, made).numpy()}
        )
        features = torch.from_numpy(kept["features"])
        found |= {"pictures": made, "features": features}
        found["quality"] = quality.compare(real, features)  # Frechet distance and KID
    return found


def error_maps(base: Base, data: Encoded, seed: int, kinds: tuple[str, ...]) -> dict:
    """What is read from the error maps of every image: the arrays of `sweep`, and "by_timestep"
    (N, 8), the loss at one draw of every timestep.
    """
    with progress.stage("error maps", forwards(data)) as bar:
        proxies = train_proxies(base, data, seed, kinds, done=bar.advance)
        asked = sweep(base, data.latents, data.text, proxies, bar.advance)
        late = loss_grid(base, data.latents, data.text, LATE_TIMESTEPS, 1, bar.advance)
    by_timestep = np.concatenate([asked["losses"][:, :, 0], late[:, :, 0].numpy()], axis=1)
    return asked | {"by_timestep": by_timestep}


def forwards(data: Encoded) -> int:
    """Images that `error_maps` sends through the UNet."""
    each = len(TIMESTEPS) * DRAWS + len(LATE_TIMESTEPS)
    return len(data.names) * each + FRESH * len(data.known())


# --------------------------------------------------------------------------------------------------
# A fresh attacker


def train_proxies(
    base: Base, data: Encoded, seed: int, kinds=tuple(RATES), epochs: int = EPOCHS, done=ignore
) -> dict[str, nn.Module]:
    """A fresh attacker h' of each kind, trained on the error maps of the auxiliary images; all
    kinds see the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    train, valid = (
        [known_errors(base, data, index, generator, done) for index in data.sides(part)]
        for part in ("aux", "val")
    )
    state, found = generator.get_state(), {}
    for kind in kinds:
        generator.set_state(state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attacker = PROXIES[kind](base.latent_shape).to(base.device).eval()
            optimizer = torch.optim.Adam(attacker.parameters(), lr=RATES[kind])
            found[kind] = fit(attacker, optimizer, train, valid, epochs, generator)
    return found


@torch.no_grad()
def known_errors(base: Base, data: Encoded, index: list[int], generator, done=ignore) -> tuple:
    """FRESH error maps (FRESH * len(index), C, h, w) of each image, and their timesteps."""
    index = torch.tensor(index).repeat(FRESH)
    timesteps = torch.randint(max(TIMESTEPS) + 50, (len(index),), generator=generator)
    noise = torch.randn((len(index), *base.latent_shape), generator=generator)
    timesteps, noise = timesteps.to(base.device), noise.to(base.device)
    errors = []
    for i in torch.arange(len(index)).split(at_once(base, GRID_BATCH)):
        given = data.latents[index[i]], data.text[index[i]], timesteps[i], noise[i]
        errors.append(squared_error(base, *given))
        done(len(i))
    return torch.cat(errors), timesteps


def fit(attacker, optimizer, train: Errors, valid: Errors, epochs: int, generator):
    """Ascend on G (Eq. 5), one draw per image and epoch; returns h' of the epoch with the best
    accuracy on validation images.
    """
    best, kept = -1.0, copy.deepcopy(attacker.state_dict())
    for epoch in range(epochs):
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


# --------------------------------------------------------------------------------------------------
# What it says of every image


@torch.no_grad()
def sweep(
    base: Base, latents, text, attackers: dict[str, nn.Module], done=ignore
) -> dict[str, np.ndarray]:
    """One pass over images x timesteps x draws for everything that reads error maps.

    "losses" (N, T, K); "odds-<kind>" (N, T, K), what each attacker says of an error map, log h' -
    log(1 - h'); "drift" (N, T), the L2 norm of the mean residual eps - f over draws, for ReDiffuse.
    """
    losses = torch.empty(len(latents), len(TIMESTEPS), DRAWS)
    mean = torch.zeros(len(latents), len(TIMESTEPS), *base.latent_shape)
    odds = {name: torch.empty_like(losses) for name in attackers}
    for at, j, k, off in residuals(base, latents, text, done=done):
        error = off.square()
        losses[at, j, k] = error.mean((1, 2, 3)).cpu()
        mean[at, j] += off.cpu() / DRAWS
        timesteps = torch.full((len(error),), TIMESTEPS[j], device=base.device)
        for name, attacker in attackers.items():
            log_h = attacker(error, timesteps)
            odds[name][at, j, k] = (log_h[:, MEMBER] - log_h[:, 1 - MEMBER]).cpu()
    found = {"losses": losses, "drift": mean.flatten(2).norm(dim=2)}
    found |= {f"odds-{name}": values for name, values in odds.items()}
    return {name: values.numpy() for name, values in found.items()}


def one_draw(odds: np.ndarray, seed: int) -> np.ndarray:
    """The paper's reading of h': one random (t, eps) per image, (N,) of (N, T, K)."""
    pick = np.random.default_rng(seed).integers(odds[0].size, size=len(odds))
    return odds.reshape(len(odds), -1)[np.arange(len(odds)), pick]


# --------------------------------------------------------------------------------------------------
# Pictures


def draw(base: Base, text: torch.Tensor, steps: int, seed: int = 1) -> np.ndarray:
    """Pictures (N, H, W, 3) from embedded captions (N, L, D), of the same noise for every model."""
    shape = len(text), *base.latent_shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(base.device)
    empty = encode_captions(base, [""])
    text = sdxl.framed_as(base, text, empty)  # pictures that are not cut
    with progress.stage("pictures", len(text)) as bar:
        return sample(base, text, empty, noise, steps, GUIDANCE, done=bar.advance)
