"""What the attacks ask of a model, kept on disk, and the one score per image that each makes of it.

    store = Store(folder, key)
    raw = query(subject, network, store, adapter, ...)      # every forward and backward pass there is
    scores = attack_scores(subject, raw, {"difference": base_raw["losses"]}, seed)      # arithmetic: {attack: (N,)}

Open choices (a timestep, a weight, a threshold) are made on images that the attacker knows, never on test images.
Held by tests/test_evaluate.py.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tqdm

import lora
import roc
from cli import UserError, write_whole
from diffusion import encode_captions, sample
from evaluation import attacks, quality
from evaluation.target import SIDES, Subject

VARIANTS = slice(1, None, 2)  # the timesteps of the grid that crops and cut captions are tried at
TRAINED = (
    "proxy-raw-1",
    "proxy-raw",
    "proxy-pooled",
    "GSA1",
    "blind",
)  # fitted to auxiliary images: no choice there


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


def query(
    subject: Subject,
    network,
    store: Store,
    adapter: lora.Adapter,
    guidance: float,
    seed: int,
    label: str,
) -> dict:
    """Everything that the attacks ask of the model as it stands, as named arrays over the images.

    This is where the time goes; what follows is arithmetic.
    """
    base, latents, text = subject.base, subject.latents, subject.text

    def grid():
        h = {
            p: attacks.train_proxy(base, latents, text, subject.roles, p, seed)
            for p in ("raw", "pooled")
        }
        losses, odds = attacks.sweep(base, latents, text, h)
        late = attacks.loss_grid(base, latents, text, attacks.LATE_TIMESTEPS, draws=1)
        odds = {f"odds-{p}": o.numpy() for p, o in odds.items()}
        return {"losses": losses.numpy(), "late": late.numpy(), **odds}

    def noise():
        clean = attacks.predict_noise(base, latents, 0, text)
        return {
            "SecMI-stat": attacks.secmi(base, latents, text),
            "PIA": attacks.pia(base, latents, text, clean=clean),
            "PIAN": attacks.pia(base, latents, text, clean=clean, normalised=True),
            "SimA": attacks.sima(base, latents, text, clean=clean),
        }

    def variants():
        """Losses of crops and of cut captions on the first draw of the grid: (2, N, T) each."""
        crops = [
            attacks.loss_grid(base, z, text, attacks.TIMESTEPS[VARIANTS], draws=1)[:, :, 0]
            for z in subject.crops
        ]
        cuts = [
            attacks.loss_grid(base, latents, c, attacks.TIMESTEPS[VARIANTS], draws=1)[:, :, 0]
            for c in subject.cuts
        ]
        return {"crops": torch.stack(crops).numpy(), "cuts": torch.stack(cuts).numpy()}

    def generated():
        """Pictures from the captions of validation and test images, fewer steps than for quality."""
        found = [
            i for side in SIDES for part in ("val", "test") for i in subject.roles[f"{side}_{part}"]
        ]
        score = np.full(len(latents), np.nan)
        sets = subject.pixels[found], draw(subject, found, 8, guidance)
        real, made = (quality.features(network, pictures).numpy() for pictures in sets)
        score[found] = attacks.black_box(real, made[:, None])
        return {"black-box": score}

    def gradients():
        adapter.unmerge()
        return {"gradients": attacks.gradient_features(base, adapter, latents, text)}

    adapter.merge()  # nothing but the gradients needs the factors apart
    raw, stages = {}, (grid, noise, variants, generated, gradients)
    with tqdm.tqdm(stages, desc=f"attacks on {label}") as bar:
        for stage in bar:
            bar.set_postfix_str(stage.__name__)
            raw |= store.get(stage.__name__, stage)
    if not all(np.isfinite(v).all() for k, v in raw.items() if k != "black-box"):
        raise UserError(f"{label} gives losses that are not finite: there is nothing to attack")
    return raw


def attack_scores(
    subject: Subject, raw: dict, references: dict[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """One score per image and attack, (N,): formulas on what `query` found, open choices made on known images.

    `references` are loss grids (N, T, K) of other models, by the name of the attack that compares with them.
    """
    losses, first = torch.from_numpy(raw["losses"]), torch.from_numpy(raw["losses"][:, VARIANTS, 0])
    train = tuple(subject.roles[f"{side}_aux"] for side in SIDES)
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
        "CLiD": attacks.clid(first, torch.from_numpy(raw["cuts"]), subject.known()),
        "GSA1": attacks.classifier_score(raw["gradients"], train),
        "black-box": raw["black-box"],
    }
    for name, grid in references.items():
        scores[name] = attacks.difference_attack(losses, torch.from_numpy(grid))
    return {name: choose(subject, score) for name, score in scores.items()}


def choose(subject: Subject, score: np.ndarray) -> np.ndarray:
    """The column of (N, candidates) with the best AUC on the images that the attacker knows; (N,) as it is."""
    if score.ndim == 1:
        return score
    return max(score.T, key=lambda column: roc.auc(*subject.pair(column, "aux", "val")))


def threshold(subject: Subject, name: str, score: np.ndarray) -> float:
    """The best threshold on known images: validation alone where the attack was fitted to the auxiliary ones."""
    parts = ("val",) if name in TRAINED or np.isnan(score).any() else ("aux", "val")
    return roc.best_threshold(*subject.pair(score, *parts))


def draw(subject: Subject, index, steps: int, guidance: float) -> np.ndarray:
    """Pictures from the captions of `index`, from the same noise for every model."""
    noise = torch.randn(
        (len(index), *subject.base.latent_shape), generator=torch.Generator().manual_seed(1)
    )
    empty = encode_captions(subject.base, [""])
    return sample(
        subject.base, subject.text[index], empty, noise.to(subject.base.device), steps, guidance
    )
