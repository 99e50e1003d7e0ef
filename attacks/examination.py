"""All figures of one adapter and of its base: the attacks, the headline, the pictures' quality.

    examination = Examination(target, settings, network)       # images and base, encoded once
    base = examination.measure_base(target)                    # the control
    adapted = examination.measure_adapter(target)

Tested in tests/test_evaluate.py and, on an over-fitted adapter, in tests/test_leaks.py.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import lora
from attacks import comparisons, quality, roc
from attacks.audit_plan import Plan
from attacks.classifiers import blind_features, classifier_score, combined_features
from attacks.queries import ASKED, Model, attack_scores, draw, known_pair, query, threshold
from attacks.shadows import ask as ask_as_shadows
from attacks.shadows import scores as shadow_scores
from attacks.store import Store
from attacks.target import Subject, Target, adapter_digest, fingerprint, prepare, sources
from command import progress
from command.errors import UserError
from diffusion import ALL_TIMESTEPS
from files import adapters as files
from files import text_encoder


@dataclass
class Measured:
    """One model: the record that goes into eval.json, and what its figures are drawn from."""

    record: dict
    scores: dict[str, np.ndarray]  # attack -> (N,)
    raw: dict[str, np.ndarray]
    pictures: np.ndarray | None
    features: torch.Tensor | None  # (P, F) of the pictures


class Examination:
    """The images of one or several targets, what their models are asked, and the control."""

    def __init__(self, target: Target, s, network):
        self.settings, self.seed, self.network = s, target.config["seed"], network
        self.sources = sources(target)
        subject = prepare(target, s.device, s.test_nonmembers)
        self.key = json.dumps([fingerprint(target, subject, s), ASKED])
        data, held_out = subject.data, subject.held_out
        if s.pictures and len(held_out) < 2:
            raise UserError("one held-out image is too few for the Frechet distance: --pictures 0")
        # beside the runs, so that every run over the same images finds what is in it
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        self.store = Store(target.run.parent / f"control-{digest}", self.key)
        self.subject: Subject = replace(subject, store=self.store)
        # what generated pictures are compared with: the members, as in the paper, and held-out ones
        sets = {"members": data.pixels[data.members()], "held_out": held_out} if s.pictures else {}
        self.real = {name: self.subject.features(name, network, x) for name, x in sets.items()}
        self.control: Measured | None = None

    @property
    def data(self):
        """The images, encoded."""
        return self.subject.data

    @property
    def held_out(self) -> np.ndarray:
        """(M, H, W, 3): held-out pictures."""
        return self.subject.held_out

    @property
    def held_out_captions(self) -> list[str]:
        """(M,)"""
        return self.subject.held_out_captions

    def measure(
        self, model: Model, control: Measured | None, shadows: Plan | None = None
    ) -> Measured:
        """Attack a model as it stands, and judge its pictures.

        `control` is the base without the adapter, which the attacker has as well; `shadows` have
        been trained.
        """
        s, subject = self.settings, self.seen_by(model)
        data = subject.data
        raw = query(model, subject, self.network, s.guidance, self.seed)
        references = {"difference": control.raw["losses"]} if control else {}
        with progress.stage("scores"):
            scores = attack_scores(data, raw, references, self.seed)
        calibrated = self.with_shadows(model, shadows) if shadows else {}
        beside = calibrated | {name: scores[name] for name in references}
        features = [combined_features(raw, scores) | {n: x[:, None] for n, x in beside.items()}]
        if control:
            features.append(combined_features(control.raw, control.scores))
        with progress.stage("combined score and intervals"):
            scores |= calibrated | {"combined": self.combined(features)}
            record = self.leakage(scores)
        losses = [raw["losses"][:, :, 0], raw["late"][:, :, 0]]
        grid = np.concatenate(losses, axis=1)  # (N, 8): one draw per timestep
        record["held_out_loss"] = float(grid[data.roles["nonmember_test"]].mean())
        areas = [roc.auc(*data.pair(-column, "test")) for column in grid.T]
        record["auc_by_timestep"] = dict(zip(map(str, ALL_TIMESTEPS), areas, strict=True))
        pictures = self.draw(model, subject) if s.pictures else None
        made = quality.features(self.network, pictures) if s.pictures else None
        if made is not None:
            with progress.stage("distances of pictures"):
                record["quality"] = quality.compare(self.real, made)
        return Measured(record, scores, raw, pictures, made)

    def with_shadows(self, model: Model, shadows: Plan) -> dict[str, np.ndarray]:
        """The attacks that the shadows of a run make possible on a model: {attack: (N,)}."""
        model.adapter.unmerge()
        name = Path(shadows.out).name
        answers = model.store.get(
            f"asked-{name}", lambda: ask_as_shadows(self.subject, shadows, model.adapter)
        )
        return shadow_scores(self.subject.data, shadows, answers)

    def combined(self, features: list[dict[str, np.ndarray]]) -> np.ndarray:
        """One logistic regression over all that is known of an image, (N,), of this model and of
        the base (after CDI, Dubinski et al. 2025); features (N, K) by name, per model.
        """
        table = np.hstack([x for model in features for x in model.values()])
        return classifier_score(table, self.subject.data.sides("aux", "val"))

    def leakage(self, scores: dict[str, np.ndarray]) -> dict:
        """Figures of every attack on the test images; the one that the attacker would choose on
        images he knows (`headline`), and what the highest AUC reaches without any leak (`null`).
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
        return {"attacks": attacked, "headline": headline, "worst": worst, "null": worst["null"]}

    def seen_by(self, model: Model) -> Subject:
        """The images with their captions as the model's text encoder has them, if it is adapted."""
        data = text_encoder.seen(self.subject.base, self.subject.data, model.adapter)
        return self.subject if data is self.subject.data else replace(self.subject, data=data)

    def draw(self, model: Model, subject: Subject) -> np.ndarray:
        """Pictures from the members' captions, kept with the model's answers: (P, H, W, 3)."""
        s = self.settings
        model.adapter.merge()
        index = np.resize(self.subject.data.members(), s.pictures)
        return model.store.get(
            f"pictures-{s.pictures}-{s.sampling_steps}",
            lambda: {"made": draw(subject, index, s.sampling_steps, s.guidance)},
        )["made"]

    def measure_base(self, target: Target, shadows: Plan | None = None) -> Measured:
        """The control: an adapter of the same shape before its first step, which is the base with
        gradients to take.
        """
        if self.control is None or shadows:
            unet = self.subject.base.unet
            trained, _ = files.load(self.subject.base, target.adapter)
            lora.remove(unet, trained)
            untrained = trained.untrained(unet, torch.Generator().manual_seed(self.seed))
            base = Model("the base model", untrained, self.store)
            try:
                self.control = self.measure(base, None, shadows)
            finally:
                lora.remove(unet, untrained)
        return self.control

    def measure_adapter(self, target: Target, shadows: Plan | None = None) -> Measured:
        """The adapter of a target, in the base for as long as it takes."""
        control, unet = self.measure_base(target, shadows), self.subject.base.unet
        adapter, _ = files.load(self.subject.base, target.adapter)
        key = json.dumps([self.key, adapter_digest(target.adapter)])
        model = Model(target.name, adapter, Store(target.folder / "scores", key))
        try:
            return self.measure(model, control, shadows)
        finally:
            lora.remove(unet, adapter)

    def blind(self) -> dict:
        """The control without any model: a classifier on thumbnails and words, which must be at
        chance.
        """
        data = self.subject.data
        features = blind_features(data.pixels, data.captions)
        score = classifier_score(features, data.sides("aux", "val"))
        return self.leakage({"blind": score})["attacks"]["blind"]
