"""The paper against its authors' code: SMP, and SMP with each of the differences, over seeds.

    python -m studies.as_released                        # all rows, three seeds: hours on two cores
    python -m studies.as_released paper order --seeds 1  # some; what is finished makes the table
    python -m studies.as_released --model SD15_FOLDER --data MY_IMAGES --device cuda

Each run is trained (train.py) and evaluated (evaluate.py) in a folder of its own, seed-S/ROW: a
killed study goes on where it was, and one more row costs that row.  All rows of a seed have the
same images, batches and noise.  At the end stands table.md, of all rows that are there.
docs/paper-and-code.md says what the differences are.
"""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cli import UserError, one_line_errors, option, parse
from settings import Settings, resolve
from training.released import NAMES

# name -> flags; the name is a folder.  The pooled attacker has no dropout: that switch has rows of
# its own, beside the paper's attacker without it
ROWS = {"paper": {}} | {name: {"as_released": name} for name in NAMES if name != "dropout"}
ROWS |= {"all": {"as_released": "all"}, "paper-raw": {"proxy": "raw"}}
ROWS |= {
    "dropout-raw": {"as_released": "dropout", "proxy": "raw"},
    "all-raw": {"as_released": "all", "proxy": "raw"},
}
ATTACKS = ("combined", "GSA1", "loss")
WHERE = "what and where"


@dataclass
class Study(Settings):
    """Flags of train.py; those that a row sets win over them."""

    rows: list[str] | None = option(None, "rows to train (default: all)", group=WHERE)
    seeds: int = option(3, "runs of each row, from --seed upwards", group=WHERE)
    jobs: int | None = option(
        None, "runs at a time, a process each (default: cores, or 1 on a GPU)", group=WHERE
    )
    pictures: int = option(100, "pictures of each run for the Frechet distance", group=WHERE)
    test_nonmembers: int = option(200, "test non-members to score; 0 takes all", group=WHERE)


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__, positional="rows")

import contextlib

import torch

import evaluate
import progress
from base_files import resolve_device
from cli import read_json, write_whole
from evaluation import workers
from evaluation.comparisons import over_seeds
from evaluation.tables import cell
from train import train


def study(s: Study) -> str:
    """Train and evaluate what is missing; returns the table of all that is there, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    chosen, out = s.rows or list(ROWS), Path(s.out or "runs/as-released")
    if unknown := [name for name in chosen if name not in ROWS]:
        raise UserError(f"there is no row {unknown[0]}: take some of {', '.join(ROWS)}")
    if s.seeds < 1 or (s.jobs is not None and s.jobs < 1):
        raise UserError("--seeds and --jobs must be 1 or more")
    each = {f.name: getattr(s, f.name) for f in fields(Settings)}
    seeds = range(s.seed, s.seed + s.seeds)
    runs = [
        resolve(replace(Settings(**each), **ROWS[name], seed=seed, out=str(place), resume=True))
        for seed in seeds
        for name in chosen
        if not evaluated(place := out / f"seed-{seed}" / name)
    ]
    judged = {f.name: getattr(s, f.name) for f in fields(evaluate.Settings) if hasattr(s, f.name)}
    # as the runs have them
    judged |= dict.fromkeys(("model", "data", "nonmembers", "caption", "out", "dtype"))
    judge = [
        evaluate.Settings(**judged | {"runs": there})
        for seed in seeds  # runs of one seed share their images and the base's answers
        if (there := [run.out for run in runs if run.seed == seed])
    ]
    jobs = s.jobs or (os.cpu_count() if resolve_device(s.device) == "cpu" else 1)
    everything(train_one, {run.out: run for run in runs}, jobs, "adapter")
    everything(evaluate_one, {e.runs[-1]: e for e in judge}, jobs, "eval.json")
    found = table(records(out))
    write_whole(out / "table.md", found)
    print(f"\n{found}\nfiles:    {out}/table.md, seed-*/*/report.html")
    return found


def evaluated(run: Path) -> bool:
    """Whether a run has been trained and evaluated."""
    return (run / "eval.json").is_file()


def everything(function, tasks: dict[str, object], jobs: int, leaves: str) -> None:
    """function(settings) of every task, in as many processes; one is done when there is a file or
    folder `leaves` in the run folder that it is named by.
    """
    if not tasks:
        return
    title = {"adapter": "runs trained", "eval.json": "seeds evaluated"}[leaves]
    with workers.processes(jobs) as pool, progress.stage(title, len(tasks)) as bar:

        def show() -> None:
            bar.advance(sum((Path(run) / leaves).exists() for run in tasks) - bar.done)

        numbered = enumerate(tasks.items())
        workers.complete(pool, aside, {i: (function, *task) for i, task in numbered}, show)


def aside(function, run: str, settings) -> None:
    """function(settings) in this process; what it prints goes to a file beside the run."""
    torch.set_num_threads(settings.threads or 1)
    Path(run).parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{run}.log") if function is train_one else Path(run).with_name("evaluation.log")
    with open(log, "a") as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        function(settings)


def train_one(settings: Settings) -> None:
    """One run, from where it is."""
    train(settings)


def evaluate_one(settings) -> None:
    """The runs of one seed."""
    evaluate.evaluate(settings)


# --------------------------------------------------------------------------------------------------
# The table


def records(out: Path) -> dict[str, dict[int, dict]]:
    """{row: {seed: eval.json with the summary of the training}} of all runs that are there."""
    found: dict[str, dict[int, dict]] = {}
    for name in ROWS:
        for path in sorted(out.glob(f"seed-*/{name}/eval.json")):
            config = read_json(path.with_name("config.json"))
            record = read_json(path) | {"summary": config["summary"]}
            record["steps"] = config["settings"]["steps"]
            found.setdefault(name, {})[record["seed"]] = record
    return found


def table(rows: dict[str, dict[int, dict]]) -> str:
    """A line of markdown per row: means over its seeds, with 95 % intervals that include the seeds;
    the difference is to the row `paper` of the same attacker, seed by seed.
    """
    heads = ["row", "seeds", *(f"AUC, {a}" for a in ATTACKS), "combined, minus the paper's"]
    heads += ["held-out loss", "Frechet, held out", "lambda J", "seconds a step"]
    lines = [heads, ["---"] * len(heads)]
    for name, by_seed in rows.items():
        found = list(by_seed.values())
        line = [name, str(len(found)), *(auc_cell(found, attack) for attack in ATTACKS)]
        reference = rows.get("paper-raw" if name.endswith("-raw") else "paper", {})
        line.append("-" if name.startswith("paper") else difference(by_seed, reference))
        line.append(f"{mean(r['adapted']['held_out_loss'] for r in found):.4f}".lstrip("0"))
        drawn = [r["adapted"].get("quality") for r in found]
        line.append(f"{mean(q['frechet_held_out'] for q in drawn):.0f}" if all(drawn) else "-")
        line.append(f"{mean(r['summary']['lambda_effective_mean'] for r in found):.2g}")
        line.append(f"{mean(r['summary']['seconds'] / r['steps'] for r in found):.2f}")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def auc_cell(found: list[dict], attack: str) -> str:
    """The mean AUC of an attack over seeds with its interval."""
    figures = [r["adapted"]["attacks"][attack] for r in found]
    auc, (low, high) = over_seeds([f["auc"] for f in figures], [f["auc_interval"] for f in figures])
    return cell({"auc": auc, "auc_interval": [max(low, 0.0), min(high, 1.0)]})


def difference(by_seed: dict[int, dict], reference: dict[int, dict]) -> str:
    """Mean difference of the combined attack's AUC on the seeds that both have, and its interval
    by Student's t over them; a dash below two seeds.
    """
    shared = [seed for seed in by_seed if seed in reference]
    if len(shared) < 2:
        return "-"
    change = [
        by_seed[k]["adapted"]["attacks"]["combined"]["auc"]
        - reference[k]["adapted"]["attacks"]["combined"]["auc"]
        for k in shared
    ]
    value, (low, high) = over_seeds(change, [[c, c] for c in change])
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def mean(values) -> float:
    """Of any numbers."""
    values = list(values)
    return sum(values) / len(values)


if __name__ == "__main__":
    progress.speak()
    with one_line_errors():
        study(SETTINGS)
