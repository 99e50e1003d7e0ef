"""Membership-inference attacks on a latent diffusion model: one score per image, higher = member.

Each function states its formula and its paper.  Attacks that leave a hyper-parameter open return
one column per candidate, (N, candidates); the column is chosen on images that the attacker knows,
never on test images.  All draws of noise come from one fixed stream: the same for members and
non-members, for the adapted and the base model.

`ATTACKS` at the end says what each of them asks of a model (model.py).  A further attack is one
function and one line there.  The paper's own attack is in paper.py, attacks by regression are in
classifiers.py.  Tested in tests/test_attacks.py against models whose answers can be written down,
and in tests/test_leaks.py on an over-fitted adapter.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from attacks.classifiers import classifier_score, combined
from attacks.per_image import PerImage
from command import progress
from diffusion import GRID_BATCH, GRID_SEED, TIMESTEPS, Base, answer, at_once, squared_error

GRADIENT_BATCH = 16  # pictures in one forward with gradient
AHEAD = (100, 200, 300, 500)  # candidates of PIA, PIAN and, with 0, of SimA
WALK = (60, 80, 100, 120, 140)  # candidates of SecMI; the authors take 140 for latent models
CUTS_AT = slice(1, None, 2)  # the timesteps of the grid that cut captions are tried at


# --------------------------------------------------------------------------------------------------
# Queries


@torch.no_grad()
def predict_noise(base: Base, noisy_latents, t: int, text) -> torch.Tensor:
    """eps(z_t, t, tau(y)), (N, C, h, w), of an epsilon- or v-prediction UNet."""
    parts, batch = [], at_once(base, GRID_BATCH)
    for i in range(0, len(noisy_latents), batch):
        z, c = noisy_latents[i : i + batch], text[i : i + batch]
        at = torch.full((len(z),), t, device=base.device)
        out = answer(base, z, at, c)
        if base.prediction == "v_prediction":
            out = base.abar[t].sqrt() * out + (1 - base.abar[t]).sqrt() * z
        parts.append(out)
    return torch.cat(parts)


def l4(x: torch.Tensor) -> np.ndarray:
    """L4 norm per image of (N, C, h, w)."""
    return x.flatten(1).norm(p=4, dim=1).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Attacks on the loss


def loss_attack(losses: np.ndarray) -> np.ndarray:
    """Minus the mean loss over timesteps and draws (N, T, K) (Matsumoto et al. 2023): members are
    fitted better.
    """
    return -losses.mean((1, 2))


def difference_attack(losses: np.ndarray, base_losses: np.ndarray) -> np.ndarray:
    """Mean of log L_base - log L_adapted at the same (t, eps), both (N, T, K).

    The base model is public, so the attacker knows how hard an image is without the adapter (cf.
    Watson et al. 2022).
    """
    return (np.log(base_losses) - np.log(losses)).mean((1, 2))


def pfami(losses: np.ndarray, crop_losses: np.ndarray) -> np.ndarray:
    """Fluctuation around the image: mean over crops of (L(crop x) - L(x)) / L(x), (N,) (PFAMI, Fu
    et al. 2023).

    losses (N, T) of the image.  crop_losses (M, N): crop m at timestep m modulo T; all crops at all
    timesteps tell no more.  A member sits in a local minimum of the loss, its crops lie higher.
    """
    own = np.stack([losses[:, m % losses.shape[1]] for m in range(len(crop_losses))])
    return ((crop_losses - own) / own).mean(0)


def clid(
    losses: np.ndarray, cut_losses: np.ndarray, known: list[int], alphas=(0, 0.25, 0.5, 0.75, 1)
) -> np.ndarray:
    """alpha S(mean_i L(c*_i) - L(c)) + (1 - alpha) S(-L(c)) per alpha, (N, len(alphas)) (CLiD, Zhai
    et al. 2024).

    losses (N, T) under the image's caption c, cut_losses (M, N, T) under shortened or empty ones
    c*_i: a model that was fitted on the pair misses the caption more.  S subtracts the median of
    the images `known` to the attacker and divides by their interquartile range.
    """

    def robust(x):
        low, middle, high = np.quantile(x[known], [0.25, 0.5, 0.75])
        return (x - middle) / max(high - low, 1e-12)

    gap, fit = robust((cut_losses.mean(0) - losses).mean(1)), robust(-losses.mean(1))
    return np.stack([a * gap + (1 - a) * fit for a in alphas], axis=1)


def rediffuse(drift: np.ndarray, timesteps, abar: torch.Tensor, prediction: str) -> np.ndarray:
    """Minus the L2 distance of z_0 to the mean of several denoised copies of it, (N, T) (ReDiffuse,
    Li et al. 2024).

    A copy is z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps_k, denoised in one DDIM step; its error is
    sqrt((1 - abar) / abar) (eps_k - f), or sqrt(1 - abar) (v_k - f) of a v-prediction model.
    drift (N, T) is the norm of the mean over k of the last parentheses.  The authors step from
    t = 200 or so in strides of 100; here t decides alone, and is a column.
    """
    a = abar[list(timesteps)].cpu().numpy()
    return -drift * np.sqrt(1 - a if prediction == "v_prediction" else (1 - a) / a)


# --------------------------------------------------------------------------------------------------
# Attacks on the predicted noise


def secmi(base: Base, latents, text, timesteps=WALK, stride: int = 10, clean=None) -> np.ndarray:
    """SecMI-stat (Duan et al. 2023): minus the squared distance between z_t and its DDIM step
    forward and back, (N, T).

    z_t is reached from z_0 by deterministic DDIM inversion in strides.  The step forward is the
    walk's own next one, so a single walk answers for every t, which must be multiples of `stride`.
    """

    def move(z, eps, start, end):
        a, b = base.abar[start], base.abar[end]
        return b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    z, columns = latents, {}
    eps = predict_noise(base, latents, 0, text) if clean is None else clean
    for t in progress.over(range(0, max(timesteps) + 1, stride), "SecMI"):
        ahead = move(z, eps, t, t + stride)
        eps = predict_noise(base, ahead, t + stride, text)
        back = move(ahead, eps, t + stride, t)
        columns[t] = -(back - z).square().flatten(1).sum(1).cpu().numpy()
        z = ahead
    return np.stack([columns[t] for t in timesteps], axis=1)


def pia(base: Base, latents, text, timesteps=AHEAD, clean=None, normalised=False) -> np.ndarray:
    """Minus the L4 norm of eps_0 - eps(sqrt(abar) z_0 + sqrt(1 - abar) eps_0, t), (N, T) (PIA, Kong
    et al. 2024).

    eps_0 = eps(z_0, 0) may be handed over as `clean`; `normalised` rescales it to the mean size of
    Gaussian noise (PIAN).
    """
    eps = predict_noise(base, latents, 0, text) if clean is None else clean
    if normalised:
        eps = eps * (2 / torch.pi) ** 0.5 / eps.abs().mean((1, 2, 3), keepdim=True)
    columns = []
    for t in progress.over(timesteps, "PIA"):
        noisy_latents = base.abar[t].sqrt() * latents + (1 - base.abar[t]).sqrt() * eps
        columns.append(-l4(eps - predict_noise(base, noisy_latents, t, text)))
    return np.stack(columns, axis=1)


def sima(base: Base, latents, text, timesteps=AHEAD, clean=None) -> np.ndarray:
    """Minus the L4 norm of the noise predicted on the CLEAN latent, eps(z_0, t), (N, 1 + T) (SimA,
    Rao et al. 2025).
    """
    eps = predict_noise(base, latents, 0, text) if clean is None else clean
    columns = [-l4(eps)]
    for t in progress.over(timesteps, "SimA"):
        columns.append(-l4(predict_noise(base, latents, t, text)))
    return np.stack(columns, axis=1)


# --------------------------------------------------------------------------------------------------
# White box and black box


def gradient_features(base: Base, adapter, latents, text) -> np.ndarray:
    """log L2 norm per adapter tensor of the gradient of an image's mean loss over a few timesteps,
    (N, tensors) (GSA1, Pang et al. 2023); one backward pass serves several images.
    """
    timesteps = torch.tensor(TIMESTEPS[::2], device=base.device)
    shape, generator = base.latent_shape, torch.Generator().manual_seed(GRID_SEED)
    noise = torch.randn((len(timesteps), *shape), generator=generator).to(base.device)
    rows, batch, draws = [], at_once(base, GRADIENT_BATCH), len(timesteps)
    with PerImage(adapter.factors()) as per_image:
        for i in progress.over(range(0, len(latents), batch), "gradients"):
            z, c = (x[i : i + batch].repeat_interleave(draws, dim=0) for x in (latents, text))
            images = len(z) // draws
            drawn = timesteps.repeat(images), noise.repeat(images, 1, 1, 1)
            loss = squared_error(base, z, c, *drawn).mean((1, 2, 3))
            every = per_image.gradients(loss.sum() / draws, images)
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in every], dim=1)
            rows.append(norms.clamp_min(1e-12).log().cpu())
    return torch.cat(rows).double().numpy()


def black_box(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Minus the least cosine distance of an image (N, F) to those generated from its caption (N, K,
    F).

    The paper's black-box attack (after Pang & Wang 2023): only captions go in and only pictures
    come out.
    """
    real = real / np.linalg.norm(real, axis=-1, keepdims=True)
    generated = generated / np.linalg.norm(generated, axis=-1, keepdims=True)
    return (generated * real[:, None]).sum(-1).max(1) - 1


# --------------------------------------------------------------------------------------------------
# All attacks by name, and what each of them asks of a model (model.Model)

ATTACKS: dict[str, Callable[[object], np.ndarray | None]] = {
    "loss": lambda m: loss_attack(m.grid["losses"]),
    "proxy-raw-1": lambda m: m.paper["score"],  # the paper's
    "proxy-raw": lambda m: m.grid["odds-raw"].mean((1, 2)),
    "proxy-pooled": lambda m: m.grid["odds-pooled"].mean((1, 2)),
    "SecMI-stat": lambda m: m.noise("SecMI-stat", secmi),
    "PIA": lambda m: m.noise("PIA", pia),
    "PIAN": lambda m: m.noise("PIAN", partial(pia, normalised=True)),
    "SimA": lambda m: m.noise("SimA", sima),
    "PFAMI": lambda m: pfami(m.grid["losses"][:, :, 0], m.crops),
    "CLiD": lambda m: clid(m.grid["losses"][:, CUTS_AT, 0], m.cuts, m.data.known()),
    "ReDiffuse": lambda m: rediffuse(m.grid["drift"], TIMESTEPS, m.base.abar, m.base.prediction),
    "GSA1": lambda m: classifier_score(m.gradients, m.data.sides("aux", "val")),
    "black-box": lambda m: m.generated(black_box),
    "difference": lambda m: (
        m.control and difference_attack(m.grid["losses"], m.control.grid["losses"])
    ),
    "combined": combined,
}
# fitted to auxiliary images, which therefore say nothing about them
FITTED = ("proxy-raw-1", "proxy-raw", "proxy-pooled")
