"""What an adapter leaks, and how good its pictures are: fifteen attacks,
controls, intervals and a report.

    python evaluate.py runs/lora runs/smp       # a table, a report in each run
    python evaluate.py runs/lora --at best      # at its best held-out loss
    python evaluate.py runs/smp --shadow 8      # an attacker who trains, too
    python evaluate.py runs/lora --data FOLDER  # its images, moved or renamed
    python evaluate.py --adapter my.safetensors --model SD15 --data FOLDER

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves
open are chosen on the images that the attacker knows (auxiliary and validation), thresholds and
checkpoints of trained attacks on validation images.  Scores are kept per attack, so a stopped
evaluation goes on where it was.
"""

import os
import time
from dataclasses import dataclass, replace
from importlib import import_module

from attacks.precheck import check
from command import progress
from command.errors import one_line_errors, this_command
from command.flags import option, parse
from command.whole_files import write_json

WHERE, ELSEWHERE, LOOKS = (
    "what and where",
    "an adapter trained elsewhere",
    "saving and looking",
)  # groups of --help


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
    nonmembers: str | None = option(None, "where the --nonmembers of the runs lie now", group=WHERE)
    device: str = option("auto", "as in train.py", group=WHERE)
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
    test_nonmembers: int = option(
        200, "test non-members to score; 0 takes all; 200 are needed for TPR at 5 % FPR"
    )
    bootstrap: int = option(1000, "rounds of permuted labels: what chance reaches")
    shadow: int = option(
        0, "adapters to train as each run was, on its candidates, to attack with (LiRA); 0: none"
    )
    jobs: int | None = option(
        None, "of them at a time, a process each (default: cores, or 1 on a GPU)"
    )
    dtype: str | None = option(
        None,
        "of the base (default: as the run was trained; float32 for --adapter)",
        ("float32", "bfloat16", "float16"),
    )
    threads: int = option(0, "CPU threads; 0 leaves it to torch")


if __name__ == "__main__":
    # before the heavy imports, so that --help and what cannot work are answered at once
    SETTINGS = parse(Settings, __doc__, positional="runs")
    with one_line_errors(this_command):
        check(SETTINGS)
        progress.start()
        with progress.stage("loading the libraries"):
            import_module("attacks.examination")

import torch

from attacks import audit_plan, audit_tasks, quality, shadows, workers
from attacks.examination import Examination, Measured
from attacks.target import Target, kind, read_adapter, read_run, sources
from files.bases import resolve_device
from report import figures, plots, tables
from report import page as report
from run import card
from train import train_adapter

# --------------------------------------------------------------------------------------------------
# The evaluation


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json, a report and figures, prints the tables, returns the
    records.

    Raises UserError for what the user can mend.
    """
    check(s)
    s = replace(s, device=resolve_device(s.device))
    if s.threads:
        torch.set_num_threads(s.threads)
    now = {"model": s.model, "data": s.data, "nonmembers": s.nonmembers, "dtype": s.dtype}
    targets = [read_run(folder, s.at, **now) for folder in s.runs or ()] or [read_adapter(s)]
    network, examination, records, models = quality.load_network(s.features), None, [], []
    for target in targets:
        if examination is None or sources(target) != examination.sources:
            examination = Examination(target, s, network)  # shared by targets over the same images
        record, measured = examine(target, examination)
        records.append(record)
        models.append((target, measured, examination))
    with progress.stage("tables"):
        return finished(s, targets, records, models)


def finished(s: Settings, targets: list[Target], records: list[dict], models: list) -> list[dict]:
    """The tables and figures of all targets together; returns the records.

    `models` are (target, measured, examination) of each.
    """
    scores = [
        {name: e.subject.data.pair(score, "test") for name, score in m.scores.items()}
        for _, m, e in models
    ]
    beside = targets[0].run.parent
    tables.print_tables(records)
    tables.print_differences(records, scores)
    pooled = tables.print_seeds(records, [kind(target) for target in targets], scores)
    if pooled:
        write_json(beside / "seeds.json", pooled)
    if len(records) > 1:
        plots.privacy_against_quality(records, beside / "privacy-quality.png")
    if s.pictures:
        titles = tables.titles(records)
        rows = {t: m.pictures for t, (_, m, _) in zip(titles, models, strict=True)}
        figures.side_by_side(models[-1][2], rows, beside / "pictures.png")
    for target, record in zip(targets, records, strict=True):
        print()
        tables.say(record["verdict"])
        if not record["shadows"]:
            print("An attacker who trains adapters of his own was not tried: --shadow 8.")
        print(f"files:    {target.folder}/report.html, exposure.csv, eval.json, figures/")
    return records


def examine(target: Target, examination: Examination) -> tuple[dict, Measured]:
    """One target: its record, written into its folder with figures and a report, and what was
    measured.
    """
    started, subject = time.time(), examination.subject
    trained = train_shadows(target, examination) if examination.settings.shadow else None
    base = examination.measure_base(target, trained)
    adapted = examination.measure_adapter(target, trained)
    record = {
        "run": target.name,
        "method": target.config["method"],
        "lam": target.config.get("lam"),
        "seed": examination.seed,
        "step": target.step,
        "at": target.at,
        "images": {role: len(index) for role, index in subject.data.roles.items()},
        "shadows": len(trained) if trained else 0,
        "adapted": adapted.record,
        "base": base.record,
        "blind": examination.blind(),
    }
    record |= {"verdict": tables.verdict(record), "seconds": round(time.time() - started, 1)}
    write_json(target.folder / "eval.json", record)
    if target.at == "last":
        card.evaluated(target.adapter, record)
    drawn = target.folder / "figures"
    with progress.stage("figures and report"):
        figures.evaluation(examination, adapted, base, target.config["method"], drawn)
        report.write(examination, adapted, base, record, target.folder)
    return record, adapted


def train_shadows(target: Target, examination: Examination) -> audit_plan.Plan:
    """The shadows of a run, trained as far as they are not there yet."""
    s = examination.settings
    plan = shadows.plan(target, examination.subject, s.shadow, s.device)
    jobs = s.jobs or (os.cpu_count() if s.device == "cpu" else 1)
    title = f"shadows of {target.name}"
    audit_tasks.train_all(plan, train_adapter, workers.processes(jobs), title)
    return plan


if __name__ == "__main__":
    with one_line_errors(this_command):
        evaluate(SETTINGS)
