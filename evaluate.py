"""What an adapter leaks, and how good its pictures are: twelve attacks, controls and intervals.

    python evaluate.py runs/lora runs/mp runs/smp     # a table, figures, and eval.json in each run folder
    python evaluate.py runs/lora --at best            # the adapter of the step with the lowest held-out loss
    python evaluate.py --model SD15 --adapter my.safetensors --data FOLDER   # trained elsewhere; FOLDER in four parts
    python evaluate.py runs/smp --shadow 8            # and an adversary who trains eight adapters of the same kind

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves open are chosen on
the images that the attacker knows (auxiliary and validation), thresholds and checkpoints of trained attacks on
validation images.  Scores are kept per attack, so a stopped evaluation goes on where it was.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli import one_line_errors, option, parse
from errors import UserError


@dataclass
class Settings:
    """Flags of evaluate.py; everything else is read from the run."""

    runs: list[str] | None = option(None, "run folders made by train.py")
    at: str = option("last", "which adapter: last, best (lowest held-out loss), or a step that was saved")
    model: str | None = option(None, "base model of --adapter")
    adapter: str | None = option(None, "adapter file or folder trained elsewhere (diffusers, peft or kohya form)")
    data: str | None = option(None, "its images, in the paper's four sub-folders, or with --splits")
    splits: str | None = option(None, "JSON of role -> file names, as splits.json of a run")
    caption: str | None = option(None, "one caption for images that have none of their own")
    out: str | None = option(None, "folder for the results of --adapter (default: runs/evaluation)")
    nonmembers: int = option(200, "test non-members to score; 0 takes all; 200 are needed for TPR at 5 % FPR")
    pictures: int = option(100, "pictures to generate for quality; 0 skips it")
    sampling_steps: int = option(20, "DDIM steps per picture")
    guidance: float = option(3.0, "classifier-free guidance scale")
    features: str = option("embedded", "network of the Frechet distance and KID", ("embedded", "inception"))
    shadow: int = option(0, "adapters to train for the calibrated attack; 8 is a good number")
    bootstrap: int = option(1000, "bootstrap rounds for the intervals")
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "of the base of --adapter", ("float32", "bfloat16", "float16"))
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


if __name__ == "__main__":  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")

import numpy as np
import torch
import tqdm

import attacks
import lora
import plots
import quality
import roc
from diffusion import encode_captions, sample
from runfolder import write_json
from targets import SIDES, Subject, Target, prepare, read_adapter, read_run

VARIANT_TIMESTEPS = attacks.TIMESTEPS[1::2]  # for crops and cut captions
TRAINED = ("proxy-raw-1", "proxy-raw", "proxy-pooled", "GSA1", "blind")  # fitted to auxiliary images: no choice there

# ---------------------------------------------------------------------------------------------------------------
# Scores


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
            aside = path.with_suffix(".tmp")
            with open(aside, "wb") as file:
                np.savez(file, **compute())
            aside.rename(path)
        with np.load(path) as arrays:
            return dict(arrays)


def query(subject: Subject, network, store: Store, adapter: lora.Adapter, s: Settings, seed: int, label: str) -> dict:
    """Everything that the attacks ask of the model as it stands, as named arrays over the images.

    This is where the time goes; what follows is arithmetic.
    """
    base, latents, text = subject.base, subject.latents, subject.text

    def grid():
        h = {p: attacks.train_proxy(base, latents, text, subject.roles, p, seed) for p in ("raw", "pooled")}
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
        crops = [attacks.loss_grid(base, z, text, VARIANT_TIMESTEPS, draws=1)[:, :, 0] for z in subject.crops]
        cuts = [attacks.loss_grid(base, latents, c, VARIANT_TIMESTEPS, draws=1)[:, :, 0] for c in subject.cuts]
        return {"crops": torch.stack(crops).numpy(), "cuts": torch.stack(cuts).numpy()}

    def generated():
        """Pictures from the captions of validation and test images, fewer steps than for quality."""
        found = [i for side in SIDES for part in ("val", "test") for i in subject.roles[f"{side}_{part}"]]
        score = np.full(len(latents), np.nan)
        sets = subject.pixels[found], draw(subject, found, 8, s.guidance)
        real, made = (quality.features(network, pictures).numpy() for pictures in sets)
        score[found] = attacks.black_box(real, made[:, None])
        return {"black-box": score}

    def gradients():
        adapter.unmerge()
        return {"gradients": attacks.gradient_features(base, adapter.parameters(), latents, text)}

    adapter.merge()  # nothing but the gradients needs the factors apart
    raw, stages = {}, (grid, noise, variants, generated, gradients)
    with tqdm.tqdm(stages, desc=f"attacks on {label}") as bar:
        for stage in bar:
            bar.set_postfix_str(stage.__name__)
            raw |= store.get(stage.__name__, stage)
    if not all(np.isfinite(v).all() for k, v in raw.items() if k != "black-box"):
        raise UserError(f"{label} gives losses that are not finite: there is nothing to attack")
    return raw


def attack_scores(subject: Subject, raw: dict, references: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """One score per image and attack, (N,): formulas on what `query` found, open choices made on known images.

    `references` are loss grids (N, T, K) of other models: the base for "difference", shadow models for "shadow".
    """
    losses, first = torch.from_numpy(raw["losses"]), torch.from_numpy(raw["losses"][:, 1::2, 0])  # VARIANT_TIMESTEPS
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


def leakage(subject: Subject, scores: dict[str, np.ndarray], rounds: int, seed: int) -> dict:
    """Figures of every attack on the test images, and the worst case."""
    bootstrap = roc.Bootstrap(*(len(subject.roles[f"{side}_test"]) for side in SIDES), rounds, seed)
    test = {name: subject.pair(score, "test") for name, score in scores.items()}
    found = {n: roc.figures(*pair, threshold(subject, n, scores[n]), bootstrap) for n, pair in test.items()}
    return {"attacks": found, "worst": roc.worst_case(test, bootstrap)}


# ---------------------------------------------------------------------------------------------------------------
# Quality


def draw(subject: Subject, index, steps: int, guidance: float) -> np.ndarray:
    """Pictures from the captions of `index`, from the same noise for every model."""
    noise = torch.randn((len(index), *subject.base.latent_shape), generator=torch.Generator().manual_seed(1))
    empty = encode_captions(subject.base, [""])
    return sample(subject.base, subject.text[index], empty, noise.to(subject.base.device), steps, guidance)


def picture_quality(subject: Subject, network, made: np.ndarray) -> dict:
    """Frechet distance, KID and distance to the nearest, of generated pictures to the members (as in the paper) and to
    held-out pictures, on features of `network`."""
    generated, found = quality.features(network, made), {"pictures": len(made)}
    for name, real in (("members", subject.pixels[subject.members()]), ("held_out", subject.held_out)):
        features = quality.features(network, real)
        found[f"frechet_{name}"] = quality.frechet_distance(features, generated)
        found[f"kid_{name}"], found[f"kid_{name}_deviation"] = quality.kernel_distance(features, generated)
        found[f"nearest_{name}"] = float(quality.nearest(features, generated)[0].mean())
    return found


# ---------------------------------------------------------------------------------------------------------------
# The evaluation


@dataclass
class Measured:
    """One model: the record that goes into eval.json, and what its figures are drawn from."""

    record: dict
    scores: dict[str, np.ndarray]  # attack -> (N,)
    raw: dict[str, np.ndarray]
    pictures: np.ndarray | None


def measure(subject, network, store, adapter, s: Settings, seed: int, label: str, references: dict) -> Measured:
    """Attack the model as it stands, and judge its pictures."""
    raw = query(subject, network, store, adapter, s, seed, label)
    scores = attack_scores(subject, raw, references, seed)
    record = leakage(subject, scores, s.bootstrap, seed)
    grid = np.concatenate([raw["losses"][:, :, 0], raw["late"][:, :, 0]], axis=1)  # (N, 8): one draw per timestep
    record["held_out_loss"] = float(grid[subject.roles["nonmember_test"]].mean())
    areas = [roc.auc(*subject.pair(-column, "test")) for column in grid.T]
    record["auc_by_timestep"] = dict(zip(map(str, attacks.ALL_TIMESTEPS), areas, strict=True))
    made = None
    if s.pictures:
        adapter.merge()
        index = np.resize(subject.members(), s.pictures)
        made = store.get("pictures", lambda: {"pictures": draw(subject, index, s.sampling_steps, s.guidance)})[
            "pictures"
        ]
        record["quality"] = picture_quality(subject, network, made)
    return Measured(record, scores, raw, made)


def fingerprint(target: Target, s: Settings) -> str:
    """What the scores of the base model depend on."""
    c = target.config
    choices = {k: getattr(s, k) for k in ("nonmembers", "pictures", "sampling_steps", "guidance", "features")}
    return json.dumps(
        [attacks.GRID_SEED, c["model"], c["data"], c["caption"], c["dtype"], c["seed"], target.splits, choices]
    )


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json and figures, prints the tables, returns the records."""
    if s.threads:
        torch.set_num_threads(s.threads)
    flags = (s.model, s.adapter, s.data, s.splits, s.caption, s.dtype, s.out)
    targets = [read_run(folder, s.at) for folder in s.runs] if s.runs else [read_adapter(*flags)]
    network, key, records, test_scores = quality.load_network(s.features), None, [], []
    for target in targets:
        started, seed, folder = time.time(), target.config["seed"], target.folder
        if fingerprint(target, s) != key:  # targets over the same images share the encoding and the control
            subject, key, control = prepare(target, s.device, s.nonmembers), fingerprint(target, s), None
        unet = subject.base.unet
        adapter, _ = lora.load(unet, target.adapter)
        files = sorted(
            p.stat().st_mtime_ns for p in ([target.adapter] if target.adapter.is_file() else target.adapter.iterdir())
        )
        layer = next(iter(adapter.layers.values()))
        if control is None:  # the base model is an adapter of the same shape before its first step
            lora.remove(unet, adapter)
            untrained = lora.inject(unet, adapter.target, layer.rank, layer.alpha, torch.Generator().manual_seed(seed))
            store = Store(folder.parent / f"control-{hashlib.sha256(key.encode()).hexdigest()[:8]}", key)
            control = measure(subject, network, store, untrained, s, seed, "the base model", {})
            lora.remove(unet, untrained)
            adapter, _ = lora.load(unet, target.adapter)
        references = {"difference": control.raw["losses"]}
        store = Store(folder / "scores" / "adapter", json.dumps([key, str(target.adapter), files]))
        found = measure(subject, network, store, adapter, s, seed, target.name, references)
        lora.remove(unet, adapter)
        record = {
            "run": target.name,
            "method": target.config["method"],
            "lam": target.config.get("lam"),
            "seed": seed,
            "step": target.step,
            "at": target.at,
            "images": {role: len(index) for role, index in subject.roles.items()},
            "adapted": found.record,
            "base": control.record,
            "blind": blind(subject, s.bootstrap, seed),
            "seconds": round(time.time() - started, 1),
        }
        write_json(folder / "eval.json", record)
        plots.evaluation(subject, found, control, folder / "figures")
        records.append(record)
        test_scores.append({name: subject.pair(score, "test") for name, score in found.scores.items()})
    print_table(records)
    print_differences(records, test_scores, s.bootstrap)
    if len(records) > 1:
        plots.privacy_against_quality(records, targets[0].folder.parent / "privacy-quality.png")
    return records


def blind(subject: Subject, rounds: int, seed: int) -> dict:
    """The control without any model: a classifier on thumbnails and words, which must be at chance."""
    train = tuple(subject.roles[f"{side}_aux"] for side in SIDES)
    score = attacks.classifier_score(attacks.blind_features(subject.pixels, subject.captions), train)
    return leakage(subject, {"blind": score}, rounds, seed)["attacks"]["blind"]


# ---------------------------------------------------------------------------------------------------------------
# Tables


def cell(figures: dict | None, key: str = "auc") -> str:
    """0.71 [0.60, 0.80], or a dash."""
    if figures is None or figures.get(key) is None:
        return "-"
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.2f} [{low:.2f}, {high:.2f}]"


def print_table(records: list[dict]) -> None:
    """AUC per attack (rows) and model (columns), then the headline and the quality of each."""
    columns = [("base", records[0]["base"])] + [(r["run"], r["adapted"]) for r in records]
    width = max(20, *(len(name) + 2 for name, _ in columns))
    names = list(dict.fromkeys(a for _, c in reversed(columns) for a in c["attacks"]))

    def line(title, cells):
        print(f"{title:24}" + "".join(f"{c:>{width}}" for c in cells))

    sizes = records[0]["images"]
    print(
        f"\nAUC on {sizes['member_test']} members and {sizes['nonmember_test']} non-members, 95 % intervals; 0.5 is chance"
    )
    line("", [name for name, _ in columns])
    for name in names:
        line(name, [cell(c["attacks"].get(name)) for _, c in columns])
    line("worst case", [cell(c["worst"]) for _, c in columns])
    line("  by", [c["worst"]["attack"] for _, c in columns])
    line("  chance reaches (95 %)", [f"{c['worst']['null']:.2f}" for _, c in columns])
    worst = [c["attacks"][c["worst"]["attack"]] for _, c in columns]
    line("  its balanced ASR", [cell(w, "asr") for w in worst])
    for percent in ("5", "1", "0.1"):
        if any(w[f"tpr_at_{percent}_fpr"] is not None for w in worst):
            line(f"  its TPR at {percent} % FPR", [cell(w, f"tpr_at_{percent}_fpr") for w in worst])
    line("held-out loss", [f"{c['held_out_loss']:.4f}" for _, c in columns])
    if columns[0][1].get("quality"):
        for key, title in (("frechet", "Frechet distance"), ("kid", "KID"), ("nearest", "nearest picture")):
            for real in ("members", "held_out"):
                values = [c["quality"][f"{key}_{real}"] for _, c in columns]
                line(f"{title}, {real.replace('_', ' ')}", [f"{v:.3f}" for v in values])
    print(f"blind control (no model): {cell(records[0]['blind'])}")
    for r in records:
        low = [a for a, f in r["adapted"]["attacks"].items() if f["auc_interval"][1] < 0.5]
        if low:
            print(f"note: {r['run']} is over-corrected for {', '.join(low)}: AUC below 0.5 gives members away as well")


def print_differences(records: list[dict], test_scores: list[dict], rounds: int) -> None:
    """Each later model against the first on the same images, at the first one's worst attack; seeds pooled."""
    for record, scores in zip(records[1:], test_scores[1:], strict=True):
        name = records[0]["adapted"]["worst"]["attack"]
        first, second = test_scores[0][name], scores[name]
        if record["seed"] != records[0]["seed"] or record["images"] != records[0]["images"]:
            continue
        bootstrap = roc.Bootstrap(len(first[0]), len(first[1]), rounds, record["seed"])
        change, (low, high) = roc.paired_difference(second, first, bootstrap)
        print(
            f"{record['run']} minus {records[0]['run']}, AUC of {name}: {change:+.2f} [{low:+.2f}, {high:+.2f}] (paired)"
        )
    groups: dict = {}
    for record in records:
        groups.setdefault((record["method"], record["lam"], record["step"]), []).append(record)
    for (method, lam, step), group in groups.items():
        if len(seeds := {r["seed"] for r in group}) > 1:
            worst = [r["adapted"]["worst"]["auc"] for r in group]
            loss = [r["adapted"]["held_out_loss"] for r in group]
            print(
                f"{method}, lambda {lam}, step {step}, {len(seeds)} seeds: worst-case AUC {np.mean(worst):.3f} "
                f"(sd {np.std(worst, ddof=1):.3f}), held-out loss {np.mean(loss):.4f} (sd {np.std(loss, ddof=1):.4f})"
            )


if __name__ == "__main__":
    with one_line_errors():
        evaluate(SETTINGS)
