"""What an adapter leaks, and how good its pictures are: twelve attacks on any model, a thirteenth on adapters, controls and intervals.

    python evaluate.py runs/lora runs/mp runs/smp     # a table, figures, and eval.json in each run folder
    python evaluate.py runs/lora --at best            # the adapter of the step with the lowest held-out loss
    python evaluate.py runs/smp --shadow 8            # beside them an attacker who trains adapters of its own
    python evaluate.py --model SD15 --adapter my.safetensors --data FOLDER   # trained elsewhere; FOLDER in four parts

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves open are chosen on
the images that the attacker knows (auxiliary and validation), thresholds and checkpoints of trained attacks on
validation images.  Scores are kept per attack, so a stopped evaluation goes on where it was.
"""

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
        "adapters to train as each run was, on other splits, to calibrate scores with (LiRA); 0: none",
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = option("float32", "of the base of --adapter", ("float32", "bfloat16", "float16"))
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


if (
    __name__ == "__main__"
):  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")

import numpy as np
import torch

import lora
import plots
import roc
from evaluation import attacks, figures, quality, shadows
from evaluation.queries import Store, attack_scores, draw, query, threshold
from evaluation.target import SIDES, SUBSET_SEED, Subject, Target, prepare, read_adapter, read_run
from settings import FREE, LOOKS


def leakage(subject: Subject, scores: dict[str, np.ndarray], rounds: int, seed: int) -> dict:
    """Figures of every attack on the test images, and the worst case."""
    bootstrap = roc.Bootstrap(*(len(subject.roles[f"{side}_test"]) for side in SIDES), rounds, seed)
    test = {name: subject.pair(score, "test") for name, score in scores.items()}
    found = {
        n: roc.figures(*pair, threshold(subject, n, scores[n]), bootstrap)
        for n, pair in test.items()
    }
    return {"attacks": found, "worst": roc.worst_case(test, bootstrap)}


# ---------------------------------------------------------------------------------------------------------------
# Quality


def real_features(subject: Subject, network) -> dict[str, torch.Tensor]:
    """Features of the pictures that generated ones are compared with: the members (as in the paper), and held-out."""
    sets = {"members": subject.pixels[subject.members()], "held_out": subject.held_out}
    return {name: quality.features(network, pixels) for name, pixels in sets.items()}


def picture_quality(real: dict[str, torch.Tensor], generated: torch.Tensor) -> dict:
    """Frechet distance, KID and distance to the nearest, of the features of generated pictures to those of `real`."""
    found = {"pictures": len(generated)}
    for name, features in real.items():
        found[f"frechet_{name}"] = quality.frechet_distance(features, generated)
        found[f"kid_{name}"], found[f"kid_{name}_deviation"] = quality.kernel_distance(
            features, generated
        )
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


def measure(
    subject, network, real, store, adapter, s: Settings, seed: int, label: str, references: dict
) -> Measured:
    """Attack the model as it stands, and judge its pictures."""
    raw = query(subject, network, store, adapter, s.guidance, seed, label)
    scores = attack_scores(subject, raw, references, seed)
    record = leakage(subject, scores, s.bootstrap, seed)
    grid = np.concatenate(
        [raw["losses"][:, :, 0], raw["late"][:, :, 0]], axis=1
    )  # (N, 8): one draw per timestep
    record["held_out_loss"] = float(grid[subject.roles["nonmember_test"]].mean())
    areas = [roc.auc(*subject.pair(-column, "test")) for column in grid.T]
    record["auc_by_timestep"] = dict(zip(map(str, attacks.ALL_TIMESTEPS), areas, strict=True))
    made = None
    if s.pictures:
        adapter.merge()
        index = np.resize(subject.members(), s.pictures)
        kept = store.get(
            f"pictures-{s.pictures}-{s.sampling_steps}",
            lambda: {"made": draw(subject, index, s.sampling_steps, s.guidance)},
        )
        made = kept["made"]
        record["quality"] = picture_quality(real, quality.features(network, made))
    return Measured(record, scores, raw, made)


def calibrate(subject, measured: Measured, answers: tuple, rounds: int, seed: int) -> Measured:
    """`measured` with the attacks that shadow models calibrate beside the others."""
    scores = measured.scores | shadows.scores(subject, measured.raw, *answers)
    return replace(
        measured, scores=scores, record=measured.record | leakage(subject, scores, rounds, seed)
    )


def fingerprint(target: Target, s: Settings) -> str:
    """What the scores and the pictures of the base model depend on, beside the number and steps of the pictures."""
    c = target.config
    choices = {k: getattr(s, k) for k in ("nonmembers", "guidance", "features")}
    seeds = [attacks.GRID_SEED, SUBSET_SEED, c["seed"]]
    return json.dumps(
        [seeds, c["model"], c["data"], c["caption"], c["dtype"], target.splits, choices]
    )


def measure_base(
    subject, network, real, folder: Path, key: str, adapter: lora.Adapter, s: Settings, seed: int
):
    """The control: an adapter of the same shape before its first step, which is the base model with gradients to take.

    Its scores are kept beside the runs, so that every run over the same images finds them.
    """
    layer, unet = next(iter(adapter.layers.values())), subject.base.unet
    untrained = lora.inject(
        unet, adapter.target, layer.rank, layer.alpha, torch.Generator().manual_seed(seed)
    )
    store = Store(folder / f"control-{hashlib.sha256(key.encode()).hexdigest()[:8]}", key)
    try:
        return measure(subject, network, real, store, untrained, s, seed, "the base model", {})
    finally:
        lora.remove(unet, untrained)


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json and figures, prints the tables, returns the records."""
    if s.threads:
        torch.set_num_threads(s.threads)
    flags = (s.model, s.adapter, s.data, s.splits, s.caption, s.dtype, s.out)
    targets = [read_run(folder, s.at) for folder in s.runs] if s.runs else [read_adapter(*flags)]
    network, key, records, test_scores = quality.load_network(s.features), None, [], []
    kinds = [kind(target) for target in targets]
    for target in targets:
        started, seed, folder = time.time(), target.config["seed"], target.folder
        if (
            fingerprint(target, s) != key
        ):  # targets over the same images share the encoding and the control
            subject, key, control = (
                prepare(target, s.device, s.nonmembers),
                fingerprint(target, s),
                None,
            )
            real = real_features(subject, network) if s.pictures else {}
        unet = subject.base.unet
        adapter, _ = lora.load(unet, target.adapter)
        if control is None:
            lora.remove(unet, adapter)
            control = measure_base(subject, network, real, target.run.parent, key, adapter, s, seed)
            adapter, _ = lora.load(unet, target.adapter)
        planned = (
            shadows.plan(target, subject.names, subject.base.size, s.shadow) if s.shadow else None
        )
        store = Store(
            folder / "scores",
            json.dumps([key, str(target.adapter.resolve()), written(target.adapter)]),
        )
        references = {"difference": control.raw["losses"]}
        found = measure(subject, network, real, store, adapter, s, seed, target.name, references)
        lora.remove(unet, adapter)
        base = control
        if planned:
            answers = shadows.query(subject, *planned, key, s.device)
            found, base = (
                calibrate(subject, m, answers, s.bootstrap, seed) for m in (found, control)
            )
        record = {
            "run": target.name,
            "method": target.config["method"],
            "lam": target.config.get("lam"),
            "seed": seed,
            "step": target.step,
            "at": target.at,
            "images": {role: len(index) for role, index in subject.roles.items()},
            "adapted": found.record,
            "base": base.record,
            "blind": blind(subject, s.bootstrap, seed),
            "seconds": round(time.time() - started, 1),
        }
        write_json(folder / "eval.json", record)
        figures.evaluation(subject, found, base, target.config["method"], folder / "figures")
        records.append(record)
        test_scores.append(
            {name: subject.pair(score, "test") for name, score in found.scores.items()}
        )
    print_table(records)
    print_differences(records, test_scores, s.bootstrap)
    pooled = print_seeds(records, kinds, test_scores, s.bootstrap)
    if pooled:
        write_json(targets[0].run.parent / "seeds.json", pooled)
    if len(records) > 1:
        plots.privacy_against_quality(records, targets[0].run.parent / "privacy-quality.png")
    return records


def kind(target: Target) -> str:
    """All that was decided about an adapter but its seed; what is only looked at on the way decides nothing."""
    chosen = {k: v for k, v in target.config.items() if k not in ("seed", *FREE, *LOOKS)}
    return json.dumps([chosen, "best" if target.at == "best" else target.step], sort_keys=True)


def written(adapter: Path) -> list[int]:
    """When the files of an adapter were written: another training into the same folder is another adapter."""
    return sorted(
        p.stat().st_mtime_ns for p in ([adapter] if adapter.is_file() else adapter.iterdir())
    )


def blind(subject: Subject, rounds: int, seed: int) -> dict:
    """The control without any model: a classifier on thumbnails and words, which must be at chance."""
    train = tuple(subject.roles[f"{side}_aux"] for side in SIDES)
    score = attacks.classifier_score(
        attacks.blind_features(subject.pixels, subject.captions), train
    )
    return leakage(subject, {"blind": score}, rounds, seed)["attacks"]["blind"]


# ---------------------------------------------------------------------------------------------------------------
# Tables


def cell(figures: dict | None, key: str = "auc") -> str:
    """0.71 [0.60, 0.80], or a dash."""
    if figures is None or figures.get(key) is None:
        return "-"
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:.2f} [{low:.2f}, {high:.2f}]"


def titles(records: list[dict]) -> list[str]:
    """What to call each run: the last part of its path, or all of it where that names two."""
    short = [Path(r["run"]).name for r in records]
    return [r["run"] if short.count(s) > 1 else s for r, s in zip(records, short, strict=True)]


def print_table(records: list[dict]) -> None:
    """AUC per attack (rows) and model (columns), then the headline and the quality of each."""
    columns = [("base", records[0]["base"])] + [
        (title, r["adapted"]) for title, r in zip(titles(records), records, strict=True)
    ]
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
        for key, title in (
            ("frechet", "Frechet distance"),
            ("kid", "KID"),
            ("nearest", "nearest picture"),
        ):
            for real in ("members", "held_out"):
                values = [c["quality"][f"{key}_{real}"] for _, c in columns]
                line(f"{title}, {real.replace('_', ' ')}", [f"{v:.3f}" for v in values])
    print(f"blind control (no model): {cell(records[0]['blind'])}")
    for name, model in columns[1:]:
        low = [a for a, f in model["attacks"].items() if f["auc_interval"][1] < 0.5]
        if low:
            print(
                f"note: {name} is over-corrected for {', '.join(low)}: AUC below 0.5 gives members away as well"
            )


def print_differences(records: list[dict], test_scores: list[dict], rounds: int) -> None:
    """Each later model against the first on the same images, at the first one's worst attack."""
    names = titles(records)
    for title, record, scores in zip(names[1:], records[1:], test_scores[1:], strict=True):
        name = records[0]["adapted"]["worst"]["attack"]
        first, second = test_scores[0][name], scores[name]
        if record["seed"] != records[0]["seed"] or record["images"] != records[0]["images"]:
            continue
        bootstrap = roc.Bootstrap(len(first[0]), len(first[1]), rounds, record["seed"])
        change, (low, high) = roc.paired_difference(second, first, bootstrap)
        print(
            f"{title} minus {names[0]}, AUC of {name}: {change:+.2f} [{low:+.2f}, {high:+.2f}] (paired)"
        )


def print_seeds(
    records: list[dict], kinds: list[str], test_scores: list[dict], rounds: int
) -> list[dict]:
    """What runs that differ by their seed alone say together, and each kind of run against the first; returns it."""
    groups: dict[str, dict[int, int]] = {}  # kind -> seed -> position
    called = titles(records)
    for i, (record, same) in enumerate(zip(records, kinds, strict=True)):
        groups.setdefault(same, {})[record["seed"]] = i
    groups, found, first = {k: g for k, g in groups.items() if len(g) > 1}, [], None
    for group in groups.values():
        members = [records[i] for i in group.values()]
        worst = roc.pooled_worst([test_scores[i] for i in group.values()], rounds)
        losses = [r["adapted"]["held_out_loss"] for r in members]
        names = [called[i] for i in group.values()]
        entry = (
            {"runs": names, "seeds": list(group)}
            | {k: members[0][k] for k in ("method", "lam")}
            | {"worst": worst}
        )
        entry |= {"held_out_loss": float(np.mean(losses)), "held_out_loss_by_seed": losses}
        qualities = [r["adapted"].get("quality") for r in members]
        if all(qualities):
            entry["quality"] = {k: float(np.mean([q[k] for q in qualities])) for k in qualities[0]}
        text = f"{', '.join(names)}: worst case {cell(worst)} by {worst['attack']}, held-out loss {np.mean(losses):.4f}"
        for real in ("members", "held_out") if "quality" in entry else ():
            text += f", Frechet distance {entry['quality'][f'frechet_{real}']:.0f} ({real.replace('_', ' ')})"
        print(f"{text} (worst case of each: {', '.join(f'{a:.2f}' for a in worst['auc_by_seed'])})")
        if first is None:
            first, name = group, worst["attack"]
        elif shared := [seed for seed in group if seed in first]:
            pairs = [
                (test_scores[group[seed]][name], test_scores[first[seed]][name]) for seed in shared
            ]
            change, (low, high) = roc.pooled_difference(pairs, rounds)
            entry["difference"] = {
                "attack": name,
                "auc": change,
                "interval": [low, high],
                "seeds": shared,
            }
            print(
                f"    minus the first, AUC of {name}: {change:+.2f} [{low:+.2f}, {high:+.2f}] (paired, {len(shared)} seeds)"
            )
        found.append(entry)
    return found


if __name__ == "__main__":
    with one_line_errors():
        evaluate(SETTINGS)
