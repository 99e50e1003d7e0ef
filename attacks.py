"""Membership-inference attacks on a model at hand, and the figures that say how well they do.

Every attack gives one score per image, higher = member.  They share one grid of timesteps and noise: the same draws
for members and non-members, and for the adapted and the base model.
Held by tests/test_attacks.py: figures to scikit-learn, attacks to a model whose errors can be written down.
"""

import copy

import numpy as np
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from attacker import MEMBER, PROXIES, attacker_gain, attacker_step
from diffusion import Base, squared_error

TIMESTEPS = (50, 150, 250, 350)  # where adapters leak most
ALL_TIMESTEPS = (50, 150, 250, 350, 500, 650, 800, 950)  # where quality is measured
DRAWS = 4  # noise draws per timestep
GRID_SEED = 20240219  # of the attacks' noise; unrelated to any training seed


def error_maps(base: Base, latents, text, timesteps=TIMESTEPS, draws: int = DRAWS, batch: int = 64):
    """Yield (slice, T index, draw, e (b, C, h, w)) over images x timesteps x draws, one noise per (t, draw)."""
    generator = torch.Generator().manual_seed(GRID_SEED)
    noise = torch.randn((len(timesteps), draws, *base.latent_shape), generator=generator).to(base.device)
    with torch.no_grad():
        for j, t in enumerate(timesteps):
            for k in range(draws):
                for i in range(0, len(latents), batch):
                    z, c = latents[i : i + batch], text[i : i + batch]
                    at = torch.full((len(z),), t, device=base.device)
                    yield slice(i, i + len(z)), j, k, squared_error(base, z, c, at, noise[j, k].expand_as(z))


def loss_grid(base: Base, latents, text, timesteps=TIMESTEPS, draws: int = DRAWS) -> torch.Tensor:
    """Adaptation loss per image, timestep and draw: (N, T, K), on the CPU."""
    grid = torch.empty(len(latents), len(timesteps), draws)
    for at, j, k, error in error_maps(base, latents, text, timesteps, draws):
        grid[at, j, k] = error.mean((1, 2, 3)).cpu()
    return grid


# ---------------------------------------------------------------------------------------------------------------
# Attacks


def loss_attack(grid: torch.Tensor) -> np.ndarray:
    """Minus the mean loss over the grid (N, T, K) (Matsumoto et al. 2023): members are fitted better."""
    return -grid.mean((1, 2)).numpy()


def difference_attack(grid: torch.Tensor, base_grid: torch.Tensor) -> np.ndarray:
    """Mean over the grid of log L_base - log L_adapted at the same (t, eps), both (N, T, K).

    The base model is public, so the attacker knows how hard an image is without the adapter (cf. Carlini et al. 2022).
    """
    return (base_grid.log() - grid.log()).mean((1, 2)).numpy()


def proxy_attack(base: Base, latents, text, roles: dict[str, list[int]], proxy: str, seed: int, epochs: int = 100):
    """A fresh attacker h' trained on the auxiliary images; returns its score of every image, (N,).

    As in the paper: one draw of (t, eps) per image and epoch, the checkpoint of the best accuracy; but the accuracy of
    *validation* images, not test ones.  The score is log h' - log(1 - h') averaged over the grid.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    attacker = PROXIES[proxy](base.latent_shape).to(base.device).eval()
    optimizer = torch.optim.Adam(attacker.parameters(), lr=1e-4 if proxy == "raw" else 3e-3)
    best, kept = -1.0, copy.deepcopy(attacker.state_dict())

    def errors(role):
        index = torch.tensor(roles[role])
        timesteps = torch.randint(max(TIMESTEPS) + 50, (len(index),), generator=generator).to(base.device)
        noise = torch.randn((len(index), *base.latent_shape), generator=generator).to(base.device)
        with torch.no_grad():
            return squared_error(base, latents[index], text[index], timesteps, noise), timesteps

    def pooled(draws):
        return tuple(torch.cat(parts) for parts in zip(*draws, strict=True))

    # fresh noise costs a UNet forward; eight draws per image, gone through in turn, are enough not to learn the noise
    train = {side: [errors(f"{side}_aux") for _ in range(8)] for side in ("member", "nonmember")}
    valid = {side: pooled([errors(f"{side}_val") for _ in range(8)]) for side in ("member", "nonmember")}
    for epoch in range(epochs):
        member, nonmember = train["member"][epoch % 8], train["nonmember"][epoch % 8]
        order = [torch.randperm(len(x[0]), generator=generator) for x in (member, nonmember)]
        for a, b in zip(*(o.split(16) for o in order), strict=False):
            attacker_step(attacker, optimizer, (member[0][a], member[1][a]), (nonmember[0][b], nonmember[1][b]))
        with torch.no_grad():
            _, accuracy = attacker_gain(attacker, valid["member"], valid["nonmember"])
        if accuracy > best:
            best, kept = accuracy, copy.deepcopy(attacker.state_dict())
    attacker.load_state_dict(kept)
    scores = torch.zeros(len(latents))
    for at, j, _, error in error_maps(base, latents, text):
        with torch.no_grad():
            log_h = attacker(error, torch.full((len(error),), TIMESTEPS[j], device=base.device))
        scores[at] += (log_h[:, MEMBER] - log_h[:, 1 - MEMBER]).cpu()
    return scores.numpy()


# ---------------------------------------------------------------------------------------------------------------
# Figures


def balanced_accuracy_threshold(member: np.ndarray, nonmember: np.ndarray) -> float:
    """The threshold that best separates validation scores (member if score >= threshold)."""
    labels = np.r_[np.ones(len(member)), np.zeros(len(nonmember))]
    fpr, tpr, thresholds = roc_curve(labels, np.r_[member, nonmember])
    return float(thresholds[np.argmax(tpr - fpr)])


def auc(member: np.ndarray, nonmember: np.ndarray) -> float:
    """Area under the ROC curve, unfolded: below 0.5 the scores point the wrong way."""
    labels = np.r_[np.ones(len(member)), np.zeros(len(nonmember))]
    return float(roc_auc_score(labels, np.r_[member, nonmember]))


def tpr_at(member: np.ndarray, nonmember: np.ndarray, fpr: float) -> float:
    """True-positive rate at the threshold whose false-positive rate is at most `fpr`."""
    labels = np.r_[np.ones(len(member)), np.zeros(len(nonmember))]
    rates, hits, _ = roc_curve(labels, np.r_[member, nonmember], drop_intermediate=False)
    return float(hits[rates <= fpr].max())


def figures(
    member: np.ndarray, nonmember: np.ndarray, threshold: float | None = None, seed: int = 0, rounds: int = 1000
):
    """AUC, |AUC - 0.5| / 0.5, balanced ASR and TPR at 5 % FPR of one attack's test scores, with 95 % intervals.

    The ASR is taken at `threshold`, chosen on validation images, and left out without one.  Intervals are stratified
    bootstraps over images (percentiles); TPR at 5 % FPR wants 200 non-members and is None below.
    """
    measures = {"auc": auc}
    if threshold is not None:
        measures["asr"] = lambda m, n: float(((m >= threshold).mean() + (n < threshold).mean()) / 2)
    if len(nonmember) >= 200:
        measures["tpr_at_5_fpr"] = lambda m, n: tpr_at(m, n, 0.05)
    rng = np.random.default_rng(seed)
    draws = [(rng.choice(member, len(member)), rng.choice(nonmember, len(nonmember))) for _ in range(rounds)]
    result: dict = {"members": len(member), "nonmembers": len(nonmember), "asr": None, "tpr_at_5_fpr": None}
    for name, measure in measures.items():
        result[name] = measure(member, nonmember)
        low, high = np.percentile([measure(m, n) for m, n in draws], [2.5, 97.5])
        result[f"{name}_interval"] = [float(low), float(high)]
    result["auc_folded"] = abs(result["auc"] - 0.5) / 0.5
    return result
