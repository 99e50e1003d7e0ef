"""What an adapter leaks, and how good its pictures are: twelve attacks on any model, a thirteenth
on adapters, controls and intervals.

    python evaluate.py runs/lora runs/mp runs/smp  # a table, figures, eval.json in each run folder
    python evaluate.py runs/lora --at best         # the adapter with the lowest held-out loss
    python evaluate.py runs/smp --shadow 8         # and an attacker who trains adapters too
    python evaluate.py --model SD15 --adapter my.safetensors --data FOLDER   # trained elsewhere

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves
open are chosen on the images that the attacker knows (auxiliary and validation), thresholds and
checkpoints of trained attacks on validation images.  Scores are kept per attack, so a stopped
evaluation goes on where it was."""

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cli import one_line_errors, option, parse, write_json


@dataclass
class Settings:
    """Flags of evaluate.py; everything else is read from the run."""

    runs: list[str] | None = option(None, "run folders made by train.py")
    at: str = option(
        "last", "which adapter: last, best (lowest held-out loss), or a step that was saved"
    )
    model: str | None = option(None, "base model of --adapter")
    adapter: str | None = option(
        None, "adapter file or folder trained elsewhere (diffusers, peft or kohya form)"
    )
    data: str | None = option(None, "its images, in the paper's four sub-folders, or with --splits")
    splits: str | None = option(None, "JSON of role -> file names, as splits.json of a run")
    caption: str | None = option(None, "one caption for images that have none of their own")
    out: str | None = option(None, "folder for the results of --adapter (default: runs/evaluation)")
    nonmembers: int = option(
        200, "test non-members to score; 0 takes all; 200 are needed for TPR at 5 % FPR"
    )
    pictures: int = option(100, "pictures to generate for quality; 0 skips it")
    sampling_steps: int = option(20, "DDIM steps per picture")
    guidance: float = option(3.0, "classifier-free guidance scale")
    features: str = option(
        "embedded", "network of the Frechet distance and KID", ("embedded", "inception")
    )
    bootstrap: int = option(1000, "bootstrap rounds for the intervals")
    shadow: int = option(
        0,
        "adapters to train as each run was, on other splits, to calibrate with (LiRA); 0: none",
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "of the base of --adapter", ("float32", "bfloat16", "float16"))
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


if __name__ == "__main__":
    # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")

import numpy as np
import torch

import lora
import lora_files
import plots
import roc
from diffusion import ALL_TIMESTEPS, GRID_SEED
from evaluation import attacks, figures, quality, shadows, tables
from evaluation.queries import Model, Store, attack_scores, draw, query, threshold
from evaluation.target import SUBSET_SEED, Subject, Target, prepare, read_adapter, read_run
from settings import FREE, LOOKS
from train import train


@dataclass
class Measured:
    """One model: the record that goes into eval.json, and what its figures are drawn from."""

    record: dict
    scores: dict[str, np.ndarray]  # attack -> (N,)
    raw: dict[str, np.ndarray]
    pictures: np.ndarray | None


class Examination:
    """The images of one or several targets, what their models are asked, and the control."""

    def __init__(self, target: Target, s: Settings, network):
        self.settings, self.seed, self.network = s, target.config["seed"], network
        self.key = fingerprint(target, s)
        self.subject: Subject = prepare(target, s.device, s.nonmembers)
        data, held_out = self.subject.data, self.subject.held_out
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
        """Figures of every attack on the test images, and the worst case."""
        data, s = self.subject.data, self.settings
        test = {name: data.pair(score, "test") for name, score in scores.items()}
        member, nonmember = next(iter(test.values()))
        bootstrap = roc.Bootstrap(len(member), len(nonmember), s.bootstrap, self.seed)
        attacked = {
            name: roc.summary(*pair, threshold(data, name, scores[name]), bootstrap)
            for name, pair in test.items()
        }
        return {"attacks": attacked, "worst": roc.worst_case(test, bootstrap)}

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
        where = str(target.adapter.resolve())
        key = json.dumps([self.key, where, written(target.adapter)])
        model = Model(target.name, adapter, Store(target.folder / "scores", key))
        references = {"difference": self.measure_base(target).raw["losses"]}
        try:
            return self.measure(model, references)
        finally:
            lora.remove(unet, adapter)

    def with_shadows(self, measured: Measured, answers: dict, out: np.ndarray) -> Measured:
        """`measured` with the attacks that shadow models calibrate beside the others."""
        scores = measured.scores | shadows.scores(self.subject.data, measured.raw, answers, out)
        return replace(measured, scores=scores, record=measured.record | self.leakage(scores))

    def blind(self) -> dict:
        """The control without any model: a classifier on thumbnails and words, which must be at
        chance."""
        data = self.subject.data
        features = attacks.blind_features(data.pixels, data.captions)
        train_on = data.roles["member_aux"], data.roles["nonmember_aux"]
        score = attacks.classifier_score(features, train_on)
        return self.leakage({"blind": score})["attacks"]["blind"]


def fingerprint(target: Target, s: Settings) -> str:
    """What the scores and the pictures of the base model depend on, beside the number and steps of
    the pictures."""
    c = target.config
    choices = {k: getattr(s, k) for k in ("nonmembers", "guidance", "features")}
    seeds = [GRID_SEED, SUBSET_SEED, c["seed"]]
    images = [c["model"], c["data"], c["caption"], c["dtype"], target.splits]
    return json.dumps([seeds, *images, choices])


def kind(target: Target) -> str:
    """All that was decided about an adapter but its seed; what is only looked at on the way decides
    nothing."""
    chosen = {k: v for k, v in target.config.items() if k not in ("seed", *FREE, *LOOKS)}
    return json.dumps([chosen, "best" if target.at == "best" else target.step], sort_keys=True)


def written(adapter: Path) -> list[int]:
    """When the files of an adapter were written: another training into the same folder is another
    adapter."""
    files = [adapter] if adapter.is_file() else adapter.iterdir()
    return sorted(p.stat().st_mtime_ns for p in files)


# --------------------------------------------------------------------------------------------------
# The evaluation


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json and figures, prints the tables, returns the records.

    Raises UserError for what the user can mend.
    """
    if s.threads:
        torch.set_num_threads(s.threads)
    targets = [read_run(folder, s.at) for folder in s.runs] if s.runs else [read_adapter(s)]
    network, examination, records, models = quality.load_network(s.features), None, [], []
    for target in targets:
        if examination is None or fingerprint(target, s) != examination.key:
            examination = Examination(target, s, network)  # shared by targets over the same images
        record, measured = examine(target, examination)
        records.append(record)
        models.append((target, measured, examination))
    scores = [
        {name: e.subject.data.pair(score, "test") for name, score in m.scores.items()}
        for _, m, e in models
    ]
    tables.print_table(records)
    tables.print_differences(records, scores, s.bootstrap)
    beside = targets[0].run.parent
    pooled = tables.print_seeds(records, [kind(target) for target in targets], scores, s.bootstrap)
    if pooled:
        write_json(beside / "seeds.json", pooled)
    if len(records) > 1:
        plots.privacy_against_quality(records, beside / "privacy-quality.png")
    if s.pictures:
        titles = tables.titles(records)
        rows = {t: m.pictures for t, (_, m, _) in zip(titles, models, strict=True)}
        figures.side_by_side(examination, rows, beside / "pictures.png")
    return records


def examine(target: Target, examination: Examination) -> tuple[dict, Measured]:
    """One target: its record, written into its folder with figures, and what was measured."""
    started, s, subject = time.time(), examination.settings, examination.subject
    planned = shadows.plan(target, subject, s.shadow) if s.shadow else None
    base, adapted = examination.measure_base(target), examination.measure_adapter(target)
    if planned:
        answers = shadows.query(subject, train, planned[0], examination.key, s.device)
        adapted, base = (
            examination.with_shadows(measured, answers, planned[1]) for measured in (adapted, base)
        )
    record = {
        "run": target.name,
        "method": target.config["method"],
        "lam": target.config.get("lam"),
        "seed": examination.seed,
        "step": target.step,
        "at": target.at,
        "images": {role: len(index) for role, index in subject.data.roles.items()},
        "adapted": adapted.record,
        "base": base.record,
        "blind": examination.blind(),
        "seconds": round(time.time() - started, 1),
    }
    write_json(target.folder / "eval.json", record)
    figures.evaluation(subject, adapted, base, target.config["method"], target.folder / "figures")
    return record, adapted


if __name__ == "__main__":
    with one_line_errors():
        evaluate(SETTINGS)
