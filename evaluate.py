"""What an adapter leaks, and how good its pictures are: twelve attacks on any model, a thirteenth
on adapters, controls and intervals.

    python evaluate.py runs/lora runs/mp runs/smp  # a table, figures, eval.json in each run folder
    python evaluate.py runs/lora --at best         # the adapter with the lowest held-out loss
    python evaluate.py runs/smp --shadow 8         # and an attacker who trains adapters too
    python evaluate.py runs/lora --data FOLDER     # its images, moved or renamed
    python evaluate.py --model SD15 --adapter my.safetensors --data FOLDER   # trained elsewhere

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves
open are chosen on the images that the attacker knows (auxiliary and validation), thresholds and
checkpoints of trained attacks on validation images.  Scores are kept per attack, so a stopped
evaluation goes on where it was."""

import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import settings
from cli import UserError, checked, one_line_errors, option, parse, read_json, write_json

WHERE, ELSEWHERE, LOOKS = "what and where", "adapter", "saving and looking"  # groups of --help


@dataclass
class Settings:
    """Flags of evaluate.py; everything else is read from the run."""

    runs: list[str] | None = option(None, "run folders made by train.py", group=WHERE)
    at: str = option(
        "last",
        "which adapter of a run: last, best (lowest held-out loss), or a step that was saved",
        group=WHERE,
    )
    model: str | None = option(
        None, "base model of --adapter, or where that of the runs lies now", group=WHERE
    )
    data: str | None = option(
        None,
        "images of --adapter, in the paper's four sub-folders or with --splits; or where those of "
        "the runs lie now",
        group=WHERE,
    )
    device: str = option("cpu", "cpu, cuda, cuda:1, mps", group=WHERE)
    adapter: str | None = option(
        None,
        "adapter file or folder trained elsewhere (diffusers, peft or kohya form)",
        group=ELSEWHERE,
    )
    splits: str | None = option(
        None, "JSON of role -> file names, as splits.json of a run", group=ELSEWHERE
    )
    caption: str | None = option(
        None, "one caption for images that have none of their own", group=ELSEWHERE
    )
    out: str | None = option(
        None, "folder for the results of --adapter (default: runs/evaluation)", group=ELSEWHERE
    )
    pictures: int = option(100, "pictures to generate for quality; 0 skips it", group=LOOKS)
    sampling_steps: int = option(20, "DDIM steps per picture", group=LOOKS)
    guidance: float = option(3.0, "classifier-free guidance scale", group=LOOKS)
    features: str = option(
        "embedded",
        "network of the Frechet distance and KID",
        ("embedded", "inception"),
        group=LOOKS,
    )
    nonmembers: int = option(
        200, "test non-members to score; 0 takes all; 200 are needed for TPR at 5 % FPR"
    )
    bootstrap: int = option(1000, "bootstrap rounds for the intervals")
    shadow: int = option(
        0,
        "adapters to train as each run was, on other splits, to calibrate with (LiRA); 0: none",
    )
    dtype: str | None = option(
        None,
        "of the base (default: as the run was trained; float32 for --adapter)",
        ("float32", "bfloat16", "float16"),
    )
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


# --------------------------------------------------------------------------------------------------
# What a glance at flags and small files can refuse, before anything heavy is imported or loaded

NUMBERS = {  # lowest and highest
    "nonmembers": (0, 10**7),
    "pictures": (0, 10**5),
    "sampling_steps": (1, 999),  # schedules have at least 1,000, some begin at 1
    "guidance": (0, 1000),
    "bootstrap": (1, 10**5),
    "shadow": (0, 1000),
    "threads": (0, 4096),
}
ASKED = ("method", "model", "data", "caption", "dtype", "seed")  # of the settings of a run


def check(s: Settings) -> None:
    """Raises UserError for flags, paths and run folders that cannot work."""
    for name, (low, high) in NUMBERS.items():
        if not low <= getattr(s, name) <= high:  # NaN is not
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {low:,} to {high:,}, not {getattr(s, name)}")
    if s.pictures == 1:
        raise UserError("--pictures must be 0 or at least 2: the Frechet distance needs two")
    if not re.fullmatch(r"(last|best|[0-9]{1,18})", s.at):
        raise UserError(f"--at must be last, best or a step, not {s.at}")
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", s.device):
        raise UserError(f"--device must be cpu, cuda, cuda:1 or mps, not {s.device}")
    if not s.runs:
        check_elsewhere(s)
    for flag in ("adapter", "splits", "caption", "out") if s.runs else ():
        if getattr(s, flag) is not None:
            raise UserError(
                f"--{flag} is for an adapter without a run folder; a run has its own: leave it out"
            )
    for folder in s.runs or ():
        check_run(Path(folder), s)


def check_elsewhere(s: Settings) -> None:
    """Raises UserError unless an adapter trained elsewhere, its base and images are named."""
    for flag in ("model", "adapter", "data"):
        if getattr(s, flag) is None:
            raise UserError(
                "name run folders, such as runs/smp, or --model, --adapter and --data: "
                f"--{flag} is missing"
            )
    if s.at != "last":
        raise UserError("--at needs a run folder: --adapter is one adapter, without steps")
    if s.shadow:
        raise UserError(
            f"--shadow needs a run of train.py: nothing says how {s.adapter} was trained"
        )
    if not os.path.exists(s.adapter):
        raise UserError(f"there is no adapter {s.adapter}: --adapter takes a file or a folder")
    check_places(s.model, s.data)
    if s.splits is not None:
        check_splits(Path(s.splits))
    out = Path(s.out or "runs/evaluation")
    there = next(path for path in (out, *out.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise UserError(f"{there} is not a folder: give --out the name of one")


def check_places(model: str, data: str) -> None:
    """Raises UserError unless base and images are there; a hub name is only known by its form."""
    hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+(?<!\.safetensors)", model)
    if not hub and not os.path.exists(model):
        raise UserError(
            f"there is no base model {model}: name it, or where it lies now, with --model"
        )
    if data != "twemoji" and not os.path.isdir(data):
        raise UserError(
            f"there is no folder {data}: name that of the images, or where it lies now, with --data"
        )


def check_run(folder: Path, s: Settings) -> None:
    """Raises UserError unless `folder` is a run that can be evaluated; RunFolder, which is heavy to
    import, knows more."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json (train.py writes one)"
        )
    config = read_json(path)
    found = config.get("settings") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a run's config: no settings in it")
    if lacking := [name for name in ASKED if name not in found]:
        raise UserError(f"{path} is damaged: its settings lack {lacking[0]}")
    known = checked(settings.Settings, {name: found[name] for name in ASKED}, path)
    if s.at == "last" and not (folder / "adapter").is_dir():
        raise UserError(f"{folder} has no adapter yet: its training did not finish")
    check_splits(folder / "splits.json")
    path = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is not a complete run: cannot read {path}: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is damaged: not every line is an object")
    check_places(s.model or known["model"], s.data or known["data"])


def check_splits(path: Path) -> None:
    """Raises UserError unless a file gives every role its images, and no image two roles."""
    from data import ROLES  # with numpy, which --help need not wait for

    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: it is not a file")  # a pipe may never end
    splits = read_json(path)
    lists = splits.values() if isinstance(splits, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(n, str) for n in v) for v in lists):
        raise UserError(f"{path} is not an object of role -> list of file names")
    if unknown := [role for role in splits if role not in ROLES]:
        raise UserError(f"{path} has an unknown role {unknown[0]}: take {', '.join(ROLES)}")
    if bare := [role for role in ROLES if role != "fresh" and not splits.get(role)]:
        raise UserError(f"{path} has no images for the role {bare[0]}")
    seen = set()
    for name in (name for names in splits.values() for name in names):
        if name in seen:
            raise UserError(f"{path} names {name} twice: an image has one role")
        seen.add(name)


if __name__ == "__main__":
    # before the heavy imports, so that --help and what cannot work are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")
    with one_line_errors():
        check(SETTINGS)

import numpy as np
import torch

import plots
from evaluation import figures, quality, shadows, tables
from evaluation.queries import Examination, Measured
from evaluation.target import Target, kind, read_adapter, read_run, sources
from train import train

# --------------------------------------------------------------------------------------------------
# The evaluation


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json and figures, prints the tables, returns the records.

    Raises UserError for what the user can mend.
    """
    check(s)
    if s.threads:
        torch.set_num_threads(s.threads)
    now = {"model": s.model, "data": s.data, "dtype": s.dtype}
    targets = [read_run(folder, s.at, **now) for folder in s.runs or ()] or [read_adapter(s)]
    network, examination, records, models = quality.load_network(s.features), None, [], []
    for target in targets:
        if examination is None or sources(target) != examination.sources:
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
            with_shadows(examination, measured, answers, planned[1]) for measured in (adapted, base)
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


def with_shadows(
    examination: Examination, measured: Measured, answers: dict, out: np.ndarray
) -> Measured:
    """`measured` with the attacks that shadow models calibrate beside the others."""
    new = shadows.scores(examination.subject.data, measured.raw, answers, out)
    scores = measured.scores | new
    record = measured.record | examination.leakage(scores)
    return replace(measured, scores=scores, record=record)


if __name__ == "__main__":
    with one_line_errors():
        evaluate(SETTINGS)
