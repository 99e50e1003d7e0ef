"""Membership-inference attacks on a latent diffusion model: one score per image, higher = member.

Each function states its formula and its paper.  Attacks that leave a hyper-parameter open return
one column per candidate, (N, candidates); `evaluate.py` picks the column on images that the
attacker knows, never on test images.  All draws of noise come from one fixed stream: the same for
members and non-members, for the adapted and the base model.  The functions of tensors alone can be
read without the rest; those that take `base` query its UNet without gradient.  Held by
tests/test_attacks.py to models whose answers can be written down, and shown there to work.
"""

import copy

import numpy as np
import torch

from attacker import MEMBER, PROXIES, attacker_gain, attacker_step
from diffusion import (
    DRAWS,
    GRID_BATCH,
    GRID_SEED,
    TIMESTEPS,
    Base,
    at_once,
    error_maps,
    squared_error,
)

GRADIENT_BATCH = 16  # pictures in one forward with gradient


# --------------------------------------------------------------------------------------------------
# Queries


@torch.no_grad()
def predict_noise(base: Base, noisy_latents, t: int, text) -> torch.Tensor:
    """eps(z_t, t, tau(y)), (N, C, h, w), of an epsilon- or v-prediction UNet."""
    parts, batch = [], at_once(base, GRID_BATCH)
    for i in range(0, len(noisy_latents), batch):
        z, c = noisy_latents[i : i + batch], text[i : i + batch]
        at = torch.full((len(z),), t, device=base.device)
        out = base.unet(z.to(base.unet.dtype), at, c, return_dict=False)[0].to(z.dtype)
        a = base.abar[t]
        parts.append(
            a.sqrt() * out + (1 - a).sqrt() * z if base.prediction == "v_prediction" else out
        )
    return torch.cat(parts)


def _l4(x: torch.Tensor) -> np.ndarray:
    """L4 norm per image of (N, C, h, w)."""
    return x.flatten(1).norm(p=4, dim=1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Attacks on the loss


def loss_attack(grid: torch.Tensor) -> np.ndarray:
    """Minus the mean loss over the grid (N, T, K) (Matsumoto et al. 2023): members are fitted
    better.
    """
    return -grid.mean((1, 2)).numpy()


def difference_attack(grid: torch.Tensor, base_grid: torch.Tensor) -> np.ndarray:
    """Mean over the grid of log L_base - log L_adapted at the same (t, eps), both (N, T, K).

    The base model is public, so the attacker knows how hard an image is without the adapter (cf.
    Watson et al. 2022).
    """
    return (base_grid.log() - grid.log()).mean((1, 2)).numpy()


def pfami(losses: torch.Tensor, crop_losses: torch.Tensor) -> np.ndarray:
    """Fluctuation around the image: mean over t and crops of (L(crop x) - L(x)) / L(x) (PFAMI, Fu
    et al. 2023).

    losses (N, T); crop_losses (M, N, T).  A member sits in a local minimum of the loss, its crops
    lie higher.
    """
    return ((crop_losses - losses) / losses).mean((0, 2)).numpy()


def clid(
    losses: torch.Tensor, cut_losses: torch.Tensor, known: list[int], alphas=(0, 0.25, 0.5, 0.75, 1)
):
    """alpha S(mean_i L(c*_i) - L(c)) + (1 - alpha) S(-L(c)) per alpha, (N, len(alphas)) (CLiD, Zhai
    et al. 2024).

    losses (N, T) under the image's caption c, cut_losses (M, N, T) under shortened or empty ones
    c*_i: a model that was fitted on the pair misses the caption more.  S standardises by the images
    `known` to the attacker.
    """

    def standard(x):
        return (x - x[known].mean()) / x[known].std().clamp_min(1e-12)

    gap, fit = standard((cut_losses.mean(0) - losses).mean(1)), standard(-losses.mean(1))
    return torch.stack([a * gap + (1 - a) * fit for a in alphas], dim=1).numpy()


# --------------------------------------------------------------------------------------------------
# Attacks on the predicted noise


def secmi(base: Base, latents, text, t: int = 100, stride: int = 10) -> np.ndarray:
    """SecMI-stat (Duan et al. 2023): minus the squared distance between z_t and its DDIM step
    forward and back.

    z_t is reached from z_0 by deterministic DDIM inversion in strides.
    """

    def move(z, eps, start, end):
        a, b = base.abar[start], base.abar[end]
        return b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    z = latents
    for s in range(0, t, stride):
        z = move(z, predict_noise(base, z, s, text), s, s + stride)
    ahead = move(z, predict_noise(base, z, t, text), t, t + stride)
    back = move(ahead, predict_noise(base, ahead, t + stride, text), t + stride, t)
    return -(back - z).square().flatten(1).sum(1).cpu().numpy()


def pia(
    base: Base, latents, text, timesteps=(100, 200, 300), clean=None, normalised=False
) -> np.ndarray:
    """Minus the L4 norm of eps_0 - eps(sqrt(abar) z_0 + sqrt(1 - abar) eps_0, t), (N, T) (PIA, Kong
    et al. 2024).

    eps_0 = eps(z_0, 0) may be handed over as `clean`; `normalised` rescales it to the mean size of
    Gaussian noise (PIAN).
    """
    eps = predict_noise(base, latents, 0, text) if clean is None else clean
    if normalised:
        eps = eps * (2 / torch.pi) ** 0.5 / eps.abs().mean((1, 2, 3), keepdim=True)
    columns = []
    for t in timesteps:
        a = base.abar[t]
        columns.append(
            -_l4(eps - predict_noise(base, a.sqrt() * latents + (1 - a).sqrt() * eps, t, text))
        )
    return np.stack(columns, axis=1)


def sima(base: Base, latents, text, timesteps=(100, 200, 300), clean=None) -> np.ndarray:
    """Minus the L4 norm of the noise predicted on the CLEAN latent, eps(z_0, t), (N, 1 + T) (SimA,
    Rao et al. 2025).
    """
    eps = predict_noise(base, latents, 0, text) if clean is None else clean
    return np.stack(
        [-_l4(eps)] + [-_l4(predict_noise(base, latents, t, text)) for t in timesteps], axis=1
    )


# --------------------------------------------------------------------------------------------------
# The paper's attacker, trained afresh


def train_proxy(
    base: Base, latents, text, roles: dict[str, list[int]], proxy: str, seed: int, epochs: int = 100
):
    """A fresh attacker h', trained on the auxiliary images for `epochs` (Luo et al. 2025, 100 in
    the paper).

    The checkpoint is that of the best accuracy on *validation* images; the paper takes the test
    set's.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attacker = PROXIES[proxy](base.latent_shape).to(base.device).eval()
        optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-4 if proxy == "raw" else 3e-3)
        best, kept = -1.0, copy.deepcopy(attacker.state_dict())

        @torch.no_grad()
        def draws(role, count=8):
            index = torch.tensor(roles[role]).repeat(count)
            timesteps = torch.randint(max(TIMESTEPS) + 50, (len(index),), generator=generator).to(
                base.device
            )
            noise = torch.randn((len(index), *base.latent_shape), generator=generator).to(
                base.device
            )
            errors = [
                squared_error(base, latents[index[i]], text[index[i]], timesteps[i], noise[i])
                for i in torch.arange(len(index)).split(at_once(base, GRID_BATCH))
            ]
            return torch.cat(errors), timesteps

        # fresh noise costs a UNet forward; eight draws per image, one of them per epoch, are enough
        train, valid = (
            [draws(f"{side}_{part}") for side in ("member", "nonmember")] for part in ("aux", "val")
        )
        for epoch in range(epochs):
            halves = []
            for error, timesteps in train:
                size = len(error) // 8
                order = epoch % 8 * size + torch.randperm(size, generator=generator)
                halves.append([(error[i], timesteps[i]) for i in order.split(16)])
            for pair in zip(*halves, strict=False):
                attacker_step(attacker, optimizer, *pair)
            with torch.no_grad():
                _, accuracy = attacker_gain(attacker, *valid)
            if accuracy > best:
                best, kept = accuracy, copy.deepcopy(attacker.state_dict())
    attacker.load_state_dict(kept)
    return attacker


def sweep(
    base: Base, latents, text, attackers: dict
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One pass over the grid for everything that reads error maps: losses (N, T, K), and per
    attacker the log-odds log h' - log(1 - h') of each error map, (N, T, K).
    """
    grid = torch.empty(len(latents), len(TIMESTEPS), DRAWS)
    odds = {name: torch.empty_like(grid) for name in attackers}
    for at, j, k, error in error_maps(base, latents, text):
        grid[at, j, k] = error.mean((1, 2, 3)).cpu()
        timesteps = torch.full((len(error),), TIMESTEPS[j], device=base.device)
        for name, attacker in attackers.items():
            with torch.no_grad():
                log_h = attacker(error, timesteps)
            odds[name][at, j, k] = (log_h[:, MEMBER] - log_h[:, 1 - MEMBER]).cpu()
    return grid, odds


def one_draw(odds: torch.Tensor, seed: int) -> np.ndarray:
    """The paper's reading of h': one random (t, eps) per image, of (N, T, K)."""
    pick = np.random.default_rng(seed).integers(odds[0].numel(), size=len(odds))
    return odds.flatten(1).numpy()[np.arange(len(odds)), pick]


# --------------------------------------------------------------------------------------------------
# White box and black box


def gradient_features(base: Base, adapter, latents, text) -> np.ndarray:
    """log L2 norm per adapter tensor of the gradient of an image's mean loss over a few timesteps,
    (N, tensors) (GSA1, Pang et al. 2023).

    One backward pass serves several images: a weight's gradient from one image is the sum over
    positions of what its layer was given times what came back for that image.
    """
    timesteps = torch.tensor(TIMESTEPS[::2], device=base.device)
    noise = torch.randn(
        (len(timesteps), *base.latent_shape), generator=torch.Generator().manual_seed(GRID_SEED)
    )
    noise, draws = noise.to(base.device), len(timesteps)
    factors = [f for layer in adapter.layers.values() for f in (layer.lora_A, layer.lora_B)]
    seen: dict[torch.nn.Module, tuple] = {}  # factor -> (what it was given, what it gave)
    hooks = [
        f.register_forward_hook(lambda f, given, gave: seen.update({f: (given[0].detach(), gave)}))
        for f in factors
    ]
    rows, batch = [], at_once(base, GRADIENT_BATCH)
    try:
        for i in range(0, len(latents), batch):
            z, c = (x[i : i + batch].repeat_interleave(draws, dim=0) for x in (latents, text))
            images = len(z) // draws
            loss = squared_error(
                base, z, c, timesteps.repeat(images), noise.repeat(images, 1, 1, 1)
            ).mean((1, 2, 3))
            came_back = torch.autograd.grad(loss.sum() / draws, [seen[f][1] for f in factors])
            norms = [
                _gradient_norms(f, seen[f][0], g, images)
                for f, g in zip(factors, came_back, strict=True)
            ]
            rows.append(torch.stack(norms, dim=1).clamp_min(1e-12).log().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(rows).double().numpy()


def _gradient_norms(layer: torch.nn.Module, given, came_back, images: int) -> torch.Tensor:
    """L2 norm (images,) of the weight's gradient from each image; the rows of an image follow one
    another in the input (B, ..., in) and in the output's gradient (B, ..., out), both with channels
    first for a convolution.
    """
    if isinstance(layer, torch.nn.Conv2d):
        unfold = torch.nn.functional.unfold
        given = unfold(
            given, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        ).transpose(1, 2)
        came_back = came_back.flatten(2).transpose(1, 2)
    given, came_back = (x.float().reshape(images, -1, x.shape[-1]) for x in (given, came_back))
    return torch.einsum("bpo,bpi->boi", came_back, given).flatten(1).norm(dim=1)


def classifier_score(features: np.ndarray, train: tuple[list[int], list[int]]) -> np.ndarray:
    """Log-odds of a logistic regression trained on (member, nonmember) rows of `features` (N,
    F).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    index = [*train[0], *train[1]]
    labels = np.r_[np.ones(len(train[0])), np.zeros(len(train[1]))]
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.05, max_iter=2000, class_weight="balanced")
    )
    return model.fit(features[index], labels).decision_function(features)


def black_box(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Minus the least cosine distance of an image (N, F) to those generated from its caption (N, K,
    F).

    The paper's black-box attack (after Pang & Wang 2023): only captions go in and only pictures
    come out.
    """
    real = real / np.linalg.norm(real, axis=-1, keepdims=True)
    generated = generated / np.linalg.norm(generated, axis=-1, keepdims=True)
    return (generated * real[:, None]).sum(-1).max(1) - 1


def blind_features(pixels: np.ndarray, captions: list[str]) -> np.ndarray:
    """What can be known without any model: thumbnails (N, 6 * 6 * 3) and words, for the control
    that must fail.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    n, size = pixels.shape[:2]
    edge = size // 6
    thumbs = (
        pixels[:, : 6 * edge, : 6 * edge]
        .reshape(n, 6, edge, 6, edge, 3)
        .mean((2, 4))
        .reshape(n, -1)
        / 255
    )
    words = TfidfVectorizer(token_pattern=r"\S+").fit_transform(captions).toarray()
    return np.c_[thumbs, words]
