"""A model under attack: what it is asked, once, and what the attacks make of its answers.

    model = measured(examination, target, s)       # the adapter of a target, and its base before it
    model.scores["SimA"], model.record             # (N,) higher = member; what eval.json holds
    model.grid["losses"], model.crops              # (N, ...) what it was asked

Open choices (a timestep, a weight, a threshold) are made on images that the attacker knows, never
on test images.  Tested in tests/test_evaluate.py and, on an over-fitted adapter, in
tests/test_leaks.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import lora
from attacks import audit_tasks, comparisons, paper, quality, shadows, single
from attacks.audit_plan import Plan
from attacks.classifiers import blind_features, classifier_score
from attacks.examination import CROPS, CUTS, Examination, cut
from attacks.single import ATTACKS, CUTS_AT, FITTED
from attacks.store import Store
from attacks.target import Target
from command import progress
from command.errors import UserError
from curves import roc
from diffusion import (
    ALL_TIMESTEPS,
    DRAWS,
    TIMESTEPS,
    Encoded,
    encode_captions,
    loss_grid,
)
from files import adapters as files
from files import contents, sdxl, text_encoder

KINDS = tuple(paper.RATES)  # of the fresh attackers
PICTURES, PICTURE_STEPS = 2, 6  # pictures per caption of the black-box attack, their DDIM steps
# in forwards of an image through the UNet: a picture through the VAE, its gradients of a draw, its
# features, which matter beside the embedded model alone
CODING, BACKWARD, FEATURES, SMALL = 2.5, 11, 12, 128
# what kept answers depend on beside images and model; the number rises with any other change
ASKED = [3, ALL_TIMESTEPS, DRAWS, CROPS, CUTS, PICTURES, PICTURE_STEPS]
ASKED += [single.AHEAD, single.WALK, paper.FRESH, paper.GUIDANCE]


class Model:
    """The base with an adapter in it; `control` is the base without, None for the base itself."""

    def __init__(
        self, name: str, examination: Examination, adapter, store: Store, control=None, bar=None
    ):
        self.name, self.adapter, self.store, self.control = name, adapter, store, control
        self.examination, self.base = examination, examination.base
        # the captions as the model's text encoder has them, if it is adapted
        self.data: Encoded = text_encoder.seen(self.base, examination.data, adapter)
        self.given = self.base, self.data.latents, self.data.text
        self.candidates: dict[str, np.ndarray] = {}  # what an attack returned
        self.scores: dict[str, np.ndarray] = {}  # (N,) of it
        self.shadow_scores: dict[str, np.ndarray] = {}
        self.record: dict = {}
        self.bar = bar or progress.Stage(name, None, 0, 0)  # a model of which counts as 1
        self.shares: dict[str, float] = {}  # what is asked -> its part of that

    def keep(self, name: str, ask: Callable[[], dict], merged: bool = True) -> dict:
        """The arrays that `ask` returns, from the store if they are there.

        Raises UserError for numbers that are not finite.
        """

        share, new = self.shares.pop(name, 0.0), []  # an attack may ask again: it is kept

        def asked() -> dict:
            new.append(name)
            (self.adapter.merge if merged else self.adapter.unmerge)()
            return ask()

        with self.bar.part(share):
            found = self.store.get(name, asked)
        if not new:  # an earlier evaluation did it
            self.bar.first += share
        if not all(np.isfinite(array).all() for array in found.values()):
            raise UserError(f"{self.name} gives numbers that are not finite: nothing to attack")
        return found

    # ----------------------------------------------------------------------------------------------
    # What it is asked

    @cached_property
    def grid(self) -> dict[str, np.ndarray]:
        """What is read from error maps, see paper.error_maps."""
        seed = self.examination.seed
        return self.keep("grid", lambda: paper.error_maps(self.base, self.data, seed, KINDS))

    @cached_property
    def clean(self) -> torch.Tensor:
        """eps(z_0, 0), (N, C, h, w), where the attacks on the predicted noise begin."""
        return single.predict_noise(self.base, self.data.latents, 0, self.data.text)

    def noise(self, name: str, attack: Callable) -> np.ndarray:
        """An attack on the predicted noise, (N, candidates)."""
        return self.keep(name, lambda: {name: attack(*self.given, clean=self.clean)})[name]

    def first_draw(self, name: str, variants: Callable[[], Iterable[tuple]]) -> np.ndarray:
        """Losses (M, N, T) of variants of the images, (latents, text, timesteps) each."""

        def ask() -> dict:
            grids = [loss_grid(self.base, *variant, draws=1)[:, :, 0] for variant in variants()]
            return {name: np.stack(grids)}

        return self.keep(name, ask)[name]

    @cached_property
    def crops(self) -> np.ndarray:
        """Losses (M, N) of crops, which take turns at the timesteps."""

        def variants() -> Iterator[tuple]:
            with self.bar.part(self.shares.get("encoding", 0.0)):
                every = self.examination.crops()
            for m, latents in enumerate(progress.over(every, "PFAMI")):
                yield latents, self.data.text, (TIMESTEPS[m % len(TIMESTEPS)],)

        return self.first_draw("crops", variants)[:, :, 0]

    @cached_property
    def cuts(self) -> np.ndarray:
        """Losses (M, N, T) under the captions' beginnings."""

        def variants() -> Iterator[tuple]:
            for share in progress.over(CUTS, "CLiD"):
                captions = [cut(caption, share) for caption in self.data.captions]
                text = encode_captions(self.base, captions)
                text = sdxl.framed_as(self.base, text, self.data.text)
                yield self.data.latents, text, TIMESTEPS[CUTS_AT]

        return self.first_draw("cuts", variants)

    @cached_property
    def gradients(self) -> np.ndarray:
        """Log gradient norms per adapter tensor: (N, tensors)."""

        def ask() -> dict:
            base, latents, text = self.given
            return {"norms": single.gradient_features(base, self.adapter, latents, text)}

        return self.keep("gradients", ask, merged=False)["norms"]

    def generated(self, attack: Callable) -> np.ndarray:
        """An attack on PICTURES from each caption of validation and test images: (N,), NaN for the
        others.
        """
        members, nonmembers = self.data.sides("val", "test")
        index, network = members + nonmembers, self.examination.network

        def ask() -> dict:
            text, drawn = self.data.text[index], []
            for k in range(PICTURES):
                with self.bar.part(self.shares.get("drawing", 0.0)):
                    made = paper.draw(self.base, text, PICTURE_STEPS, seed=1 + k)
                with self.bar.part(self.shares.get("features", 0.0)):
                    drawn.append(quality.features(network, made).numpy())
            real = self.examination.features("asked", self.data.pixels[index]).numpy()
            return {"score": attack(real, np.stack(drawn, axis=1))}

        score = np.full(len(self.data.latents), np.nan)
        score[index] = self.keep("generated", ask)["score"]
        return score

    # ----------------------------------------------------------------------------------------------
    # What comes out

    def measure(self, s, shadows_plan: Plan | None = None) -> "Model":
        """The paper's evaluation, then every other attack, with a plan of trained shadows theirs as
        well.  `s` are the settings of evaluate.py.
        """
        e, data = self.examination, self.data
        self.shares, self.bar.note = shares(self, s, shadows_plan), self.name
        with self.bar.part(1):
            rest = e.network, e.real, s.pictures, s.sampling_steps, KINDS, self.keep
            self.paper = paper.evaluation(self.base, data, e.seed, *rest)
            self.pictures, self.features = map(self.paper.get, ("pictures", "features"))
            if shadows_plan:
                self.shadow_scores = self.ask_as_shadows(shadows_plan)
            for name, attack in ATTACKS.items():
                found = attack(self)
                if found is not None:
                    self.candidates[name], self.scores[name] = found, choose(data, found)
        self.scores |= self.shadow_scores
        with progress.stage("intervals"):
            self.record = leakage(data, self.scores, self.paper["figures"])
        areas = [roc.auc(*data.pair(-column, "test")) for column in self.grid["by_timestep"].T]
        self.record["auc_by_timestep"] = dict(zip(map(str, ALL_TIMESTEPS), areas, strict=True))
        self.record["held_out_loss"] = self.paper["held_out_loss"]
        if s.pictures:
            copies = {n: quality.nearest(x, self.features)[0].mean() for n, x in e.real.items()}
            near = {f"nearest_{name}": float(distance) for name, distance in copies.items()}
            self.record["quality"] = self.paper["quality"] | near
        return self

    def ask_as_shadows(self, plan: Plan) -> dict[str, np.ndarray]:
        """The attacks that trained shadows make possible: {attack: (N,)}."""
        data, name = self.examination.data, f"asked-{Path(plan.out).name}"

        def ask() -> dict:
            return audit_tasks.ask(self.base, data, plan, self.adapter)

        return shadows.scores(data, plan, self.keep(name, ask, merged=False))


# --------------------------------------------------------------------------------------------------
# What it costs, for the bar


def shares(model: Model, s, shadows_plan: Plan | None) -> dict[str, float]:
    """The part of each thing that a model is asked, by its name in the store, in the time of all.

    It is counted in forwards of an image through the UNet.
    """
    small = model.base.size <= SMALL
    images, text = len(model.data.names), sum(map(len, model.data.sides("val", "test")))
    look = FEATURES if small else 0
    cost = {
        "grid": paper.forwards(model.data),
        f"pictures-{s.pictures}-{s.sampling_steps}": s.pictures * (2 * s.sampling_steps + CODING),
        f"features-{s.pictures}-{s.sampling_steps}": s.pictures * look,
        "SecMI-stat": images * (max(single.WALK) // 10 + 2),
        **{name: images * len(single.AHEAD) for name in ("PIA", "PIAN", "SimA")},
        "encoding": 0 if model.control else images * len(CROPS) * CODING,
        "cuts": images * len(CUTS) * len(TIMESTEPS[CUTS_AT]),
        "gradients": images * len(TIMESTEPS[::2]) * BACKWARD,
        "drawing": text * (2 * PICTURE_STEPS + CODING),
        "features": text * look,
    }
    if shadows_plan:
        asked = len(TIMESTEPS) * shadows_plan.noises + shadows_plan.ways
        cost[f"asked-{Path(shadows_plan.out).name}"] = images * asked
    cost["crops"] = cost["encoding"] + images * len(CROPS)
    cost["generated"] = PICTURES * (cost["drawing"] + cost["features"]) + cost["features"]
    whole = sum(n for name, n in cost.items() if name not in ("encoding", "drawing", "features"))
    return {name: n / whole for name, n in cost.items()}


# --------------------------------------------------------------------------------------------------
# The models of a target


def measured(
    e: Examination, target: Target, s, shadows_plan: Plan | None = None, bar=None
) -> Model:
    """The adapter of a target, measured; `control` is the base, measured once for all targets.

    The base has an adapter of the same shape before its first step, which changes nothing and has
    gradients to take.
    """
    unet = e.base.unet
    if e.control is None or shadows_plan:
        adapter, _ = files.load(e.base, target.adapter)
        lora.remove(unet, adapter)
        untrained = adapter.untrained(unet, torch.Generator().manual_seed(e.seed))
        with inside(unet, untrained):
            control = Model("the base model", e, untrained, e.store, bar=bar)
            e.control = control.measure(s, shadows_plan)
    adapter, _ = files.load(e.base, target.adapter)
    with inside(unet, adapter):
        key = json.dumps([e.store.key.decode(), contents.of_adapter(target.adapter)])
        store = Store(target.folder / "scores", key)
        return Model(target.name, e, adapter, store, e.control, bar).measure(s, shadows_plan)


@contextmanager
def inside(unet: torch.nn.Module, adapter: lora.Adapter) -> Iterator[None]:
    """Take the adapter out of the UNet at the end, also after an error."""
    try:
        yield
    finally:
        lora.remove(unet, adapter)


def blind(data: Encoded) -> dict:
    """The control without any model: a classifier on thumbnails and words, which must be at
    chance.
    """
    features = blind_features(data.pixels, data.captions)
    score = classifier_score(features, data.sides("aux", "val"))
    return leakage(data, {"blind": score})["attacks"]["blind"]


# --------------------------------------------------------------------------------------------------
# Choices on known images, figures on test images


def choose(data: Encoded, score: np.ndarray) -> np.ndarray:
    """The column of (N, candidates) with the best AUC on the images that the attacker knows, the
    first of equals; (N,) as it is.
    """
    if score.ndim == 1:
        return score
    return max(score.T, key=lambda column: roc.auc(*data.pair(column, "aux", "val")))


def known_pair(data: Encoded, name: str, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(member, non-member) scores of the known images on which an attack can be judged: validation
    alone where it was fitted to the auxiliary ones.
    """
    parts = ("val",) if name in FITTED or np.isnan(score).any() else ("aux", "val")
    return data.pair(score, *parts)


def leakage(data: Encoded, scores: dict[str, np.ndarray], of_paper: dict | None = None) -> dict:
    """Figures of every attack on the test images, the attack that the attacker would choose on
    known images (`headline`), and what the best of all reaches by chance (`null`).
    """
    attacks, known, test = {}, {}, {}
    for name, score in scores.items():
        known[name], test[name] = known_pair(data, name, score), data.pair(score, "test")
        threshold = roc.best_threshold(*known[name])
        own = of_paper if name == "proxy-raw-1" else None
        figures = own or roc.figures(*test[name], threshold)
        attacks[name] = figures | roc.intervals(*test[name], threshold)
    headline, null = comparisons.headline(known, test), comparisons.permutation_null(test)
    return {"attacks": attacks, "headline": headline, "null": null}
