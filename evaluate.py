"""What an adapter leaks, and how good its pictures are: fifteen attacks,
controls, intervals and a report.

    python evaluate.py runs/lora runs/smp       # a table, a report in each run
    python evaluate.py runs/lora --at best      # at its best held-out loss
    python evaluate.py runs/smp --shadow 8      # an attacker who trains, too
    python evaluate.py runs/lora --data FOLDER  # its images, moved or renamed
    python evaluate.py --adapter my.safetensors --model SD15 \\
        --members TRAINED_ON --nonmembers OTHERS

Figures are of test images that no choice was made on.  The hyper-parameters that an attack leaves
open are chosen on the images that the attacker knows (auxiliary and validation), thresholds and
checkpoints of trained attacks on validation images.  Scores are kept per attack, so a stopped
evaluation goes on where it was.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from command import progress
from command.errors import one_line_errors, this_command
from command.flags import option, parse
from command.whole_files import write_json

# groups of --help
WHERE, ELSEWHERE, LOOKS = "what and where", "an adapter trained elsewhere", "saving and looking"


@dataclass
class Settings:
    """Flags of evaluate.py; everything else is read from the run."""

    runs: list[str] | None = option(None, "run folders made by train.py", group=WHERE)
    at: str = option(
        "last",
        "adapter of a run: last, best (lowest held-out loss), or a saved step",
        group=WHERE,
    )
    model: str | None = option(
        None, "base model of --adapter, or the new place of the runs' base model", group=WHERE
    )
    data: str | None = option(
        None,
        "images of --adapter, in the paper's four sub-folders or with --splits; or the new place "
        "of the runs' images",
        group=WHERE,
    )
    nonmembers: str | None = option(
        None, "goes with --members; or the new place of the runs' --nonmembers", group=WHERE
    )
    device: str = option("auto", "as in train.py", group=WHERE)
    adapter: str | None = option(
        None, "file or folder of an adapter (diffusers, peft or kohya form)", group=ELSEWHERE
    )
    members: str | None = option(
        None,
        "folder of images that --adapter was trained on, in place of --data; put images of the "
        "same kind that it was not trained on into --nonmembers",
        group=ELSEWHERE,
    )
    trained_with: str | None = option(
        None,
        "flags of train.py that --adapter was trained with, in JSON (a run's config.json); --data "
        "are then candidates, whose members are searched for",
        group=ELSEWHERE,
    )
    splits: str | None = option(
        None, "JSON file of role -> file names, like the splits.json of a run", group=ELSEWHERE
    )
    caption: str | None = option(None, "caption for all images without one", group=ELSEWHERE)
    out: str | None = option(
        None, "folder for the results of --adapter (default: runs/evaluation)", group=ELSEWHERE
    )
    pictures: int = option(100, "pictures to draw for quality; 0 skips them", group=LOOKS)
    sampling_steps: int = option(20, "DDIM steps per picture", group=LOOKS)
    features: str = option(
        "embedded",
        "network of Frechet distance and KID",
        ("embedded", "inception"),
        group=LOOKS,
    )
    test_nonmembers: int = option(
        200, "test non-members to score; 0: all; a TPR at 5 % FPR needs 200"
    )
    shadow: int = option(0, "shadow adapters to train as each run was, for LiRA; 0: none")
    jobs: int | None = option(None, "shadows in parallel (default: one per core, or 1 on a GPU)")
    dtype: str | None = option(
        None, "dtype of the base (default: as trained)", ("float32", "bfloat16", "float16")
    )


def evaluate(s: Settings) -> list[dict]:
    """Evaluate every target; writes eval.json, a report and figures, prints the tables, returns the
    records.

    Raises UserError for what the user can mend, most of it before anything heavy is imported.
    """
    from attacks import target

    if s.trained_with:
        return [search(s)]
    found = target.targets(s)
    with progress.stage("loading the libraries"):
        from attacks import quality
        from attacks.examination import examine
        from attacks.model import ASKED, measured
        from files.devices import resolve_device
    s = replace(s, device=resolve_device(s.device))
    network, examination, records, models = quality.load_network(s.features), None, [], []
    count, asked = target.models(found, bool(s.shadow)), 0
    for one in found:
        if examination is None or target.sources(one) != examination.sources:
            examination = examine(one, s, network, ASKED)  # shared by targets over the same images
        started = time.monotonic()
        trained = train_shadows(one, examination, s) if s.shadow else None
        with progress.stage("attacks", count, asked) as bar:  # in models, the base being one
            model = measured(examination, one, s, trained, bar)
        asked = bar.done
        models.append(model)
        records.append(written(one, model, trained, started))
    with progress.stage("tables"):
        conclude(s, found, models, records)
    return records


def search(s: Settings) -> dict:
    """Which candidates an adapter from elsewhere was trained on; see attacks/candidates.py."""
    from attacks import target

    target.check_flags(s)
    with progress.stage("loading the libraries"):
        from attacks import candidates
        from files.devices import resolve_device
        from train import train_adapter
    return candidates.search(replace(s, device=resolve_device(s.device)), train_adapter)


def train_shadows(target, examination, s: Settings):
    """The shadows of a run, a plan, trained as far as they are not there yet."""
    from attacks import audit_tasks, shadows, workers
    from train import train_adapter

    plan = shadows.plan(target, examination, s.shadow, s.device)
    jobs = s.jobs or (os.cpu_count() if s.device == "cpu" else 1)
    title = f"shadows of {target.name}"
    audit_tasks.train_all(plan, train_adapter, workers.processes(jobs), title)
    return plan


def written(target, model, trained, started: float) -> dict:
    """The record of one target, written into its folder with figures and a report."""
    from attacks.model import blind
    from report import figures, page, tables
    from run import card

    data, config = model.examination.data, target.config
    record = {
        "run": target.name,
        "method": config["method"],
        "lam": config.get("lam"),
        "seed": config["seed"],
        "step": target.step,
        "at": target.at,
        "images": {role: len(index) for role, index in data.roles.items()},
        "shadows": len(trained) if trained else 0,
        "promise": target.promise,
        "adapted": model.record,
        "base": model.control.record,
        "blind": blind(data),
    }
    record |= {"verdict": tables.verdict(record), "seconds": round(time.monotonic() - started, 1)}
    write_json(target.folder / "eval.json", record)
    if target.at == "last":
        card.evaluated(target.adapter, record)
    with progress.stage("figures and report"):
        both = model.examination, model, model.control
        figures.evaluation(*both, config["method"], target.folder / "figures")
        page.write(*both, record, target.folder)
    return record


def conclude(s: Settings, found: list, models: list, records: list[dict]) -> None:
    """The tables and figures of all targets together."""
    from attacks import shadows
    from attacks.target import kind
    from curves import plots
    from report import figures, tables

    beside: Path = found[0].run.parent
    scores = [{n: m.data.pair(score, "test") for n, score in m.scores.items()} for m in models]
    tables.print_tables(records)
    tables.print_differences(records, scores)
    pooled = tables.print_seeds(records, [kind(target) for target in found], scores)
    if pooled:
        write_json(beside / "seeds.json", pooled)
    if len(records) > 1:
        plots.privacy_against_quality(records, beside / "privacy-quality.png")
    if s.pictures:
        rows = {t: m.pictures for t, m in zip(tables.titles(records), models, strict=True)}
        figures.side_by_side(models[-1].examination, rows, beside / "pictures.png")
    for target, record in zip(found, records, strict=True):
        print()
        tables.say(record["verdict"])
        if record["promise"]:
            tables.say(f"Guaranteed: {record['promise']}.")
        if not record["shadows"] and record["method"] != "adapter":
            count = shadows.advised(record)
            print(f"An attacker with shadow adapters was not tried: add --shadow {count}.")
        print(f"files:    {target.folder}/report.html, exposure.csv, eval.json, figures/")


def main() -> None:
    """The command: --help and what cannot work are answered before the heavy imports."""
    settings = parse(Settings, __doc__, positional="runs")
    with one_line_errors(this_command):
        progress.start()
        evaluate(settings)


if __name__ == "__main__":
    main()
