"""What the attacks ask of a model, kept on disk, and the one score per image that each makes of it.

    raw = query(model, subject, network, guidance, seed)  # every forward and backward pass
    scores = attack_scores(subject.data, raw, {"difference": base_raw["losses"]}, seed)  # (N,) each

Open choices (a timestep, a weight, a threshold) are made on images that the attacker knows, never
on test images.  Tested in tests/test_evaluate.py.
"""

from dataclasses import dataclass

import numpy as np
import torch

import lora
from attacks import proxies, quality, roc
from attacks import single as attacks
from attacks.classifiers import classifier_score
from attacks.store import Store
from attacks.target import CROPS, CUTS, Subject
from command import progress
from command.errors import UserError
from diffusion import (
    DRAWS,
    LATE_TIMESTEPS,
    TIMESTEPS,
    Base,
    Encoded,
    encode_captions,
    loss_grid,
    sample,
)

CUTS_AT = slice(1, None, 2)  # the timesteps of the grid that cut captions are tried at
# fitted to auxiliary images, which therefore say nothing about them
TRAINED = ("proxy-raw-1", "proxy-raw", "proxy-pooled")
PICTURES, PICTURE_STEPS = 2, 6  # pictures per caption of the black-box attack, their DDIM steps
# what kept answers depend on beside images and model; the number rises with any other change
ASKED = [2, TIMESTEPS, LATE_TIMESTEPS, DRAWS, CROPS, CUTS, PICTURES, PICTURE_STEPS]
ASKED += [attacks.AHEAD, attacks.WALK, proxies.FRESH]


@dataclass
class Model:
    """A base with an adapter in it, by the name that people see, and where what it answers is
    kept.
    """

    name: str
    adapter: lora.Adapter
    store: Store


def query(model: Model, subject: Subject, network, guidance: float, seed: int) -> dict:
    """Everything that the attacks ask of a model, as named arrays over the images.

    This is where the time goes; what follows is arithmetic.  Raises UserError for a model whose
    losses are not finite.
    """
    base, data, adapter = subject.base, subject.data, model.adapter
    asked = {
        "grid": lambda: loss_queries(base, data, seed),
        "noise": lambda: noise_queries(base, data),
        "variants": lambda: variant_queries(subject),
        "generated": lambda: picture_queries(subject, network, guidance),
        "gradients": lambda: gradient_queries(base, data, adapter),
    }
    adapter.merge()  # nothing but the gradients needs the factors apart
    raw = {}
    with progress.stage(f"attacks on {model.name}", len(asked)) as bar:
        for name, ask in asked.items():
            bar.note = name
            raw |= model.store.get(name, ask)
            bar.advance()
    if not all(np.isfinite(v).all() for k, v in raw.items() if k != "black-box"):
        raise UserError(
            f"{model.name} gives losses that are not finite: there is nothing to attack"
        )
    return raw


def loss_queries(base: Base, data: Encoded, seed: int) -> dict[str, np.ndarray]:
    """Losses (N, T, K) and (N, T', 1) of the late timesteps, the log-odds of fresh proxy attackers,
    and ReDiffuse (N, T).
    """
    latents, text = data.latents, data.text
    h = proxies.train_proxies(base, latents, text, data.roles, seed)
    losses, averaged, odds = proxies.sweep(base, latents, text, h)
    late = loss_grid(base, latents, text, LATE_TIMESTEPS, draws=1)
    found = {f"odds-{kind}": o.numpy() for kind, o in odds.items()}
    found["ReDiffuse"] = attacks.rediffuse(averaged, TIMESTEPS, base.abar.cpu(), base.prediction)
    return {"losses": losses.numpy(), "late": late.numpy(), **found}


def noise_queries(base: Base, data: Encoded) -> dict[str, np.ndarray]:
    """The attacks on the predicted noise, (N, candidates) each."""
    given = base, data.latents, data.text
    clean = attacks.predict_noise(base, data.latents, 0, data.text)
    return {
        "SecMI-stat": attacks.secmi(*given, clean=clean),
        "PIA": attacks.pia(*given, clean=clean),
        "PIAN": attacks.pia(*given, clean=clean, normalised=True),
        "SimA": attacks.sima(*given, clean=clean),
    }


def variant_queries(subject: Subject) -> dict[str, np.ndarray]:
    """Losses of crops (M, N) and of cut captions (M', N, T') on the first draw of the grid; crops
    take turns at the timesteps, see attacks.pfami.
    """
    base, data = subject.base, subject.data

    def losses(latents, text, timesteps) -> np.ndarray:
        return loss_grid(base, latents, text, timesteps, draws=1)[:, :, 0].numpy()

    turns = [(TIMESTEPS[m % len(TIMESTEPS)],) for m in range(len(subject.crops))]
    pairs = [*zip(subject.crops, turns, strict=True)]
    crops = [losses(z, data.text, t)[:, 0] for z, t in progress.over(pairs, "crops")]
    cuts = [
        losses(data.latents, c, TIMESTEPS[CUTS_AT])
        for c in progress.over(subject.cuts, "cut captions")
    ]
    return {"crops": np.stack(crops), "cuts": np.stack(cuts)}


def picture_queries(subject: Subject, network, guidance: float) -> dict[str, np.ndarray]:
    """PICTURES from each caption of validation and test images, in fewer steps than for quality:
    (N,), NaN for the others.
    """
    index = [i for side in subject.data.sides("val", "test") for i in side]
    score = np.full(len(subject.data.latents), np.nan)
    made = [draw(subject, index, PICTURE_STEPS, guidance, 1 + k) for k in range(PICTURES)]
    drawn = np.stack([quality.features(network, p).numpy() for p in made], axis=1)
    real = subject.features("asked", network, subject.data.pixels[index])
    score[index] = attacks.black_box(real.numpy(), drawn)
    return {"black-box": score}


def gradient_queries(base: Base, data: Encoded, adapter: lora.Adapter) -> dict[str, np.ndarray]:
    """Log gradient norms per adapter tensor: (N, tensors)."""
    adapter.unmerge()
    return {"gradients": attacks.gradient_features(base, adapter, data.latents, data.text)}


def attack_scores(
    data: Encoded, raw: dict, references: dict[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """One score per image and attack, (N,): formulas on what `query` found, open choices made on
    known images.

    `references` are loss grids (N, T, K) of other models, by the name of the attack that compares
    with them.
    """
    losses, first = torch.from_numpy(raw["losses"]), torch.from_numpy(raw["losses"][:, :, 0])
    crops, cuts = (torch.from_numpy(raw[name]) for name in ("crops", "cuts"))
    scores = {
        "loss": attacks.loss_attack(losses),
        "proxy-raw-1": proxies.one_draw(torch.from_numpy(raw["odds-raw"]), seed),
        "proxy-raw": raw["odds-raw"].mean((1, 2)),
        "proxy-pooled": raw["odds-pooled"].mean((1, 2)),
        "SecMI-stat": raw["SecMI-stat"],
        "PIA": raw["PIA"],
        "PIAN": raw["PIAN"],
        "SimA": raw["SimA"],
        "PFAMI": attacks.pfami(first, crops),
        "CLiD": attacks.clid(first[:, CUTS_AT], cuts, data.known()),
        "ReDiffuse": raw["ReDiffuse"],
        "GSA1": classifier_score(raw["gradients"], data.sides("aux", "val")),
        "black-box": raw["black-box"],
    }
    for name, grid in references.items():
        scores[name] = attacks.difference_attack(losses, torch.from_numpy(grid))
    return {name: choose(data, score) for name, score in scores.items()}


def choose(data: Encoded, score: np.ndarray) -> np.ndarray:
    """The column of (N, candidates) with the best AUC on the images that the attacker knows, the
    first of equals; (N,) as it is."""
    if score.ndim == 1:
        return score
    return max(score.T, key=lambda column: roc.auc(*data.pair(column, "aux", "val")))


def threshold(data: Encoded, name: str, score: np.ndarray) -> float:
    """The best threshold on known images: validation alone where the attack was fitted to the
    auxiliary ones.
    """
    return roc.best_threshold(*known_pair(data, name, score))


def known_pair(data: Encoded, name: str, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(member, non-member) scores of the images on which the attacker can judge an attack."""
    parts = ("val",) if name in TRAINED or np.isnan(score).any() else ("aux", "val")
    return data.pair(score, *parts)


def draw(subject: Subject, index, steps: int, guidance: float, seed: int = 1) -> np.ndarray:
    """Pictures from the captions of `index`, from the same noise for every model."""
    noise = torch.randn(
        (len(index), *subject.base.latent_shape), generator=torch.Generator().manual_seed(seed)
    )
    empty = encode_captions(subject.base, [""])
    return sample(
        subject.base,
        subject.data.text[index],
        empty,
        noise.to(subject.base.device),
        steps,
        guidance,
    )
