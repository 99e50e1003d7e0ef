"""What the attacks ask of a model, kept on disk, and the one score per image that each makes of it.

    store = Store(folder, key)
    raw = query(model, subject, network, guidance, seed)    # every forward and backward pass
    scores = attack_scores(subject.data, raw, {"difference": base_raw["losses"]}, seed)  # (N,) each

Open choices (a timestep, a weight, a threshold) are made on images that the attacker knows, never
on test images. Held by tests/test_evaluate.py."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tqdm

import lora
import roc
from cli import UserError, write_whole
from data import SIDES
from diffusion import (
    LATE_TIMESTEPS,
    TIMESTEPS,
    Base,
    Encoded,
    encode_captions,
    loss_grid,
    sample,
)
from evaluation import attacks, quality
from evaluation.target import Subject

VARIANTS = slice(1, None, 2)  # the timesteps of the grid that crops and cut captions are tried at
# fitted to auxiliary images, which therefore say nothing about them
TRAINED = ("proxy-raw-1", "proxy-raw", "proxy-pooled", "GSA1", "blind")


class Store:
    """Arrays kept by name in a folder and computed once; emptied when `key` changes."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "key.json").is_file() or (folder / "key.json").read_text() != key:
            for old in folder.glob("*.npz"):
                old.unlink()
            (folder / "key.json").write_text(key)

    def get(self, name: str, compute: Callable[[], dict]) -> dict[str, np.ndarray]:
        """The named arrays that `compute` returns, from the folder if they are there."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            content = io.BytesIO()
            np.savez(content, **compute())
            write_whole(path, content.getvalue())
        with np.load(path) as arrays:
            return dict(arrays)


@dataclass
class Model:
    """A base with an adapter in it, by the name that people see, and where what it answers is
    kept."""

    name: str
    adapter: lora.Adapter
    store: Store


def query(model: Model, subject: Subject, network, guidance: float, seed: int) -> dict:
    """Everything that the attacks ask of a model, as named arrays over the images.

    This is where the time goes; what follows is arithmetic.  Raises UserError for a model whose
    losses are not finite."""
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
    with tqdm.tqdm(asked.items(), desc=f"attacks on {model.name}") as bar:
        for name, ask in bar:
            bar.set_postfix_str(name)
            raw |= model.store.get(name, ask)
    if not all(np.isfinite(v).all() for k, v in raw.items() if k != "black-box"):
        raise UserError(
            f"{model.name} gives losses that are not finite: there is nothing to attack"
        )
    return raw


def loss_queries(base: Base, data: Encoded, seed: int) -> dict[str, np.ndarray]:
    """Losses (N, T, K) and (N, T', 1) of the late timesteps, and the log-odds of fresh proxy
    attackers."""
    h = {
        proxy: attacks.train_proxy(base, data.latents, data.text, data.roles, proxy, seed)
        for proxy in ("raw", "pooled")
    }
    losses, odds = attacks.sweep(base, data.latents, data.text, h)
    late = loss_grid(base, data.latents, data.text, LATE_TIMESTEPS, draws=1)
    named = {f"odds-{proxy}": o.numpy() for proxy, o in odds.items()}
    return {"losses": losses.numpy(), "late": late.numpy(), **named}


def noise_queries(base: Base, data: Encoded) -> dict[str, np.ndarray]:
    """The attacks on the predicted noise: (N,) or (N, candidates) each."""
    latents, text = data.latents, data.text
    clean = attacks.predict_noise(base, latents, 0, text)
    return {
        "SecMI-stat": attacks.secmi(base, latents, text),
        "PIA": attacks.pia(base, latents, text, clean=clean),
        "PIAN": attacks.pia(base, latents, text, clean=clean, normalised=True),
        "SimA": attacks.sima(base, latents, text, clean=clean),
    }


def variant_queries(subject: Subject) -> dict[str, np.ndarray]:
    """Losses of crops and of cut captions on the first draw of the grid: (2, N, T) each."""
    base, data, timesteps = subject.base, subject.data, TIMESTEPS[VARIANTS]

    def losses(pairs) -> np.ndarray:
        grids = [loss_grid(base, z, c, timesteps, draws=1)[:, :, 0] for z, c in pairs]
        return torch.stack(grids).numpy()

    return {
        "crops": losses((z, data.text) for z in subject.crops),
        "cuts": losses((data.latents, c) for c in subject.cuts),
    }


def picture_queries(subject: Subject, network, guidance: float) -> dict[str, np.ndarray]:
    """Pictures from the captions of validation and test images, in fewer steps than for quality:
    (N,)."""
    data = subject.data
    index = [i for side in SIDES for part in ("val", "test") for i in data.roles[f"{side}_{part}"]]
    score = np.full(len(data.latents), np.nan)
    sets = data.pixels[index], draw(subject, index, 8, guidance)
    real, made = (quality.features(network, pictures).numpy() for pictures in sets)
    score[index] = attacks.black_box(real, made[:, None])
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
    with them."""
    losses, first = torch.from_numpy(raw["losses"]), torch.from_numpy(raw["losses"][:, VARIANTS, 0])
    train = tuple(data.roles[f"{side}_aux"] for side in SIDES)
    scores = {
        "loss": attacks.loss_attack(losses),
        "proxy-raw-1": attacks.one_draw(torch.from_numpy(raw["odds-raw"]), seed),
        "proxy-raw": raw["odds-raw"].mean((1, 2)),
        "proxy-pooled": raw["odds-pooled"].mean((1, 2)),
        "SecMI-stat": raw["SecMI-stat"],
        "PIA": raw["PIA"],
        "PIAN": raw["PIAN"],
        "SimA": raw["SimA"],
        "PFAMI": attacks.pfami(first, torch.from_numpy(raw["crops"])),
        "CLiD": attacks.clid(first, torch.from_numpy(raw["cuts"]), data.known()),
        "GSA1": attacks.classifier_score(raw["gradients"], train),
        "black-box": raw["black-box"],
    }
    for name, grid in references.items():
        scores[name] = attacks.difference_attack(losses, torch.from_numpy(grid))
    return {name: choose(data, score) for name, score in scores.items()}


def choose(data: Encoded, score: np.ndarray) -> np.ndarray:
    """The column of (N, candidates) with the best AUC on the images that the attacker knows; (N,)
    as it is."""
    if score.ndim == 1:
        return score
    return max(score.T, key=lambda column: roc.auc(*data.pair(column, "aux", "val")))


def threshold(data: Encoded, name: str, score: np.ndarray) -> float:
    """The best threshold on known images: validation alone where the attack was fitted to the
    auxiliary ones."""
    parts = ("val",) if name in TRAINED or np.isnan(score).any() else ("aux", "val")
    return roc.best_threshold(*data.pair(score, *parts))


def draw(subject: Subject, index, steps: int, guidance: float) -> np.ndarray:
    """Pictures from the captions of `index`, from the same noise for every model."""
    noise = torch.randn(
        (len(index), *subject.base.latent_shape), generator=torch.Generator().manual_seed(1)
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
