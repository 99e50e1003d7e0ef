"""What the attacks ask of a model, kept on disk, and the one score per image that each makes of it.

    store = Store(folder, key)
    raw = query(model, subject, network, guidance, seed)    # every forward and backward pass
    scores = attack_scores(subject.data, raw, {"difference": base_raw["losses"]}, seed)  # (N,) each

Open choices (a timestep, a weight, a threshold) are made on images that the attacker knows, never
on test images. Held by tests/test_evaluate.py.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tqdm

import lora
import lora_files
import roc
from cli import UserError, write_whole
from data import SIDES
from diffusion import (
    ALL_TIMESTEPS,
    LATE_TIMESTEPS,
    TIMESTEPS,
    Base,
    Encoded,
    encode_captions,
    loss_grid,
    sample,
)
from evaluation import attacks, comparisons, quality
from evaluation.target import Subject, Target, adapter_digest, fingerprint, prepare, sources

DIGEST = 32  # bytes of a SHA-256
VARIANTS = slice(1, None, 2)  # the timesteps of the grid that crops and cut captions are tried at
# fitted to auxiliary images, which therefore say nothing about them
TRAINED = ("proxy-raw-1", "proxy-raw", "proxy-pooled", "GSA1", "blind")


class Store:
    """Arrays kept by name in a folder and computed once, as long as `key` stays.

    A file is an .npz with a SHA-256 of key and content behind it, which numpy overlooks.  One of
    another key, or cut, or changed, is computed again; so a kill does no harm at any moment, nor
    does another evaluation at work in the same folder.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key.encode()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], dict]) -> dict[str, np.ndarray]:
        """The named arrays that `compute` returns, from the folder if they are there."""
        path = self.folder / f"{name}.npz"
        content = self._kept(path)
        if content is None:
            buffer = io.BytesIO()
            np.savez(buffer, **compute())
            content = buffer.getvalue()
            write_whole(path, content + self._digest(content))
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def _kept(self, path: Path) -> bytes | None:
        found = path.read_bytes() if path.is_file() else b""
        content, digest = found[:-DIGEST], found[-DIGEST:]
        return content if digest == self._digest(content) else None

    def _digest(self, content: bytes) -> bytes:
        return hashlib.sha256(self.key + content).digest()


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
    attackers.
    """
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
    (N,).
    """
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
    with them.
    """
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


# --------------------------------------------------------------------------------------------------
# All figures of one adapter, and of its base


@dataclass
class Measured:
    """One model: the record that goes into eval.json, and what its figures are drawn from."""

    record: dict
    scores: dict[str, np.ndarray]  # attack -> (N,)
    raw: dict[str, np.ndarray]
    pictures: np.ndarray | None


class Examination:
    """The images of one or several targets, what their models are asked, and the control."""

    def __init__(self, target: Target, s, network):
        self.settings, self.seed, self.network = s, target.config["seed"], network
        self.sources = sources(target)
        self.subject: Subject = prepare(target, s.device, s.nonmembers)
        self.key = fingerprint(target, self.subject, s)
        data, held_out = self.subject.data, self.subject.held_out
        if s.pictures and len(held_out) < 2:
            raise UserError("one held-out image is too few for the Frechet distance: --pictures 0")
        # what generated pictures are compared with: the members, as in the paper, and held-out ones
        sets = {"members": data.pixels[data.members()], "held_out": held_out} if s.pictures else {}
        self.real = {name: quality.features(network, pixels) for name, pixels in sets.items()}
        self.control: Measured | None = None

    def measure(self, model: Model, references: dict[str, np.ndarray]) -> Measured:
        """Attack a model as it stands, and judge its pictures."""
        s, data = self.settings, self.subject.data
        raw = query(model, self.subject, self.network, s.guidance, self.seed)
        scores = attack_scores(data, raw, references, self.seed)
        record = self.leakage(scores)
        losses = [raw["losses"][:, :, 0], raw["late"][:, :, 0]]
        grid = np.concatenate(losses, axis=1)  # (N, 8): one draw per timestep
        record["held_out_loss"] = float(grid[data.roles["nonmember_test"]].mean())
        areas = [roc.auc(*data.pair(-column, "test")) for column in grid.T]
        record["auc_by_timestep"] = dict(zip(map(str, ALL_TIMESTEPS), areas, strict=True))
        pictures = self.draw(model) if s.pictures else None
        if pictures is not None:
            made = quality.features(self.network, pictures)
            record["quality"] = quality.compare(self.real, made)
        return Measured(record, scores, raw, pictures)

    def leakage(self, scores: dict[str, np.ndarray]) -> dict:
        """Figures of every attack on the test images; the one that the attacker would choose on
        images he knows (`headline`), and the highest of all (`worst`).
        """
        data, s = self.subject.data, self.settings
        test = {name: data.pair(score, "test") for name, score in scores.items()}
        attacked = {
            name: roc.summary(*pair, threshold(data, name, scores[name]))
            for name, pair in test.items()
        }
        known = {name: known_pair(data, name, score) for name, score in scores.items()}
        headline, worst = (
            comparisons.headline(known, test),
            comparisons.worst_case(test, s.bootstrap),
        )
        return {"attacks": attacked, "headline": headline, "worst": worst}

    def draw(self, model: Model) -> np.ndarray:
        """Pictures from the members' captions, kept with the model's answers: (P, H, W, 3)."""
        s = self.settings
        model.adapter.merge()
        index = np.resize(self.subject.data.members(), s.pictures)
        return model.store.get(
            f"pictures-{s.pictures}-{s.sampling_steps}",
            lambda: {"made": draw(self.subject, index, s.sampling_steps, s.guidance)},
        )["made"]

    def measure_base(self, target: Target) -> Measured:
        """The control: an adapter of the same shape before its first step, which is the base with
        gradients to take.

        Its scores are kept beside the runs, so that every run over the same images finds them.
        """
        if self.control is None:
            unet = self.subject.base.unet
            trained, _ = lora_files.load(unet, target.adapter)
            lora.remove(unet, trained)
            layer = next(iter(trained.layers.values()))
            generator = torch.Generator().manual_seed(self.seed)
            untrained = lora.inject(unet, trained.target, layer.rank, layer.alpha, generator)
            digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
            store = Store(target.run.parent / f"control-{digest}", self.key)
            try:
                self.control = self.measure(Model("the base model", untrained, store), {})
            finally:
                lora.remove(unet, untrained)
        return self.control

    def measure_adapter(self, target: Target) -> Measured:
        """The adapter of a target, in the base for as long as it takes."""
        unet = self.subject.base.unet
        adapter, _ = lora_files.load(unet, target.adapter)
        key = json.dumps([self.key, adapter_digest(target.adapter)])
        model = Model(target.name, adapter, Store(target.folder / "scores", key))
        references = {"difference": self.measure_base(target).raw["losses"]}
        try:
            return self.measure(model, references)
        finally:
            lora.remove(unet, adapter)

    def blind(self) -> dict:
        """The control without any model: a classifier on thumbnails and words, which must be at
        chance.
        """
        data = self.subject.data
        features = attacks.blind_features(data.pixels, data.captions)
        train_on = data.roles["member_aux"], data.roles["nonmember_aux"]
        score = attacks.classifier_score(features, train_on)
        return self.leakage({"blind": score})["attacks"]["blind"]
