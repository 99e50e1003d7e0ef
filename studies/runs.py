"""The runs of one table: each trained and evaluated in a folder of its own, in processes.

    runs = [settings_of(s, out / "seed-0" / name, seed=0, **flags) for name, flags in rows]
    complete(s, runs, train, evaluate.evaluate, evaluate.Settings)

What is finished stays, so a killed study goes on where it was and one more row costs that row.
train.py and evaluate.py are handed in by the study, which is a script as they are.  Tested in
tests/test_studies.py.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from attacks import workers
from command import progress
from command.errors import UserError
from files.bases import resolve_device
from run.precheck import precheck
from run.resolve import resolve
from settings import Settings, is_embedded, most_members
from studies.settings import Study

TITLES = {"adapter": "runs trained", "eval.json": "groups evaluated"}  # what leaves which file
# seconds of one core on the embedded model: a step, an evaluation, and the base's for each seed
STEP, ATTACKED_STEP, EVALUATION, CONTROL = 0.185, 0.28, 140, 150
OF_THE_RUN = ("model", "data", "nonmembers", "caption", "out", "dtype")  # not of its evaluation


def check(s: Study) -> None:
    """Raise UserError for a number of seeds or of processes that cannot be."""
    if s.seeds < 1 or (s.jobs is not None and s.jobs < 1):
        raise UserError("--seeds and --jobs must be 1 or more")


def seeds(s: Study) -> range:
    """The seeds of every row."""
    return range(s.seed, s.seed + s.seeds)


def processes(s: Study) -> int:
    """Runs at a time."""
    return s.jobs or (os.cpu_count() if resolve_device(s.device) == "cpu" else 1)


def settings_of(s: Study, folder: Path, **flags) -> Settings:
    """One run in `folder`: the flags of the study, and over them those of its row."""
    each = {f.name: getattr(s, f.name) for f in fields(Settings)}
    return replace(Settings(**each), **flags, out=str(folder), resume=True, dry_run=False)


def missing(asked: list[Settings]) -> list[Settings]:
    """Those that are not yet evaluated.

    Raises UserError for flags that cannot be, a model or images that are not there, and a run that
    is there with other flags.
    """
    for run in asked:
        precheck(run)
    return unevaluated(asked)


def unevaluated(asked: list[Settings]) -> list[Settings]:
    """Those without an eval.json."""
    return [run for run in asked if not (Path(run.out) / "eval.json").is_file()]


def announced(s: Study, asked: list[Settings]) -> str:
    """What a study would do."""
    todo = unevaluated([resolve(run) for run in asked])
    said = f"dry run: {len(todo)} of {len(asked)} runs are to train and to evaluate"
    jobs, names = processes(s), ", ".join(dict.fromkeys(Path(run.out).name for run in todo))
    said += f": {names}, seeds {', '.join(map(str, seeds(s)))}" if todo else ""
    if not is_embedded(s.model) or resolve_device(s.device) != "cpu":
        return f"{said}\ntrain.py and evaluate.py say how long one takes, train.py with --dry-run"
    groups = {Path(run.out).parent for run in todo}
    seconds = CONTROL * len(groups) + EVALUATION * len(todo)
    for run in todo:
        members = run.members or most_members(run)
        steps = run.steps or -(-run.epochs * members // (run.batch_size * run.accumulate))
        seconds += steps * (ATTACKED_STEP if run.attacked else STEP)
    return f"{said}\nabout {seconds / jobs / 60:.0f} minutes, {jobs} at a time"


def complete(
    s: Study, asked: list[Settings], train: Callable, evaluate: Callable, judge: type
) -> None:
    """Train and evaluate what is missing; `judge` are the settings that `evaluate` takes.

    The runs of one folder share the base's answers.  pictures.png and seeds.json beside them are of
    those evaluated together last; evaluate.py, given all of them, makes them of all from what is
    kept.
    """
    todo = missing(asked)
    judged = {f.name: getattr(s, f.name) for f in fields(judge) if hasattr(s, f.name)}
    judged |= dict.fromkeys(OF_THE_RUN)
    parts = divided([run.out for run in todo], processes(s))
    groups = {there[-1]: judge(**judged | {"runs": there}) for there in parts}
    _everything(train, {run.out: run for run in todo}, processes(s), "adapter")
    _everything(evaluate, groups, processes(s), "eval.json")


def divided(folders: list[str], jobs: int) -> list[list[str]]:
    """The runs to evaluate together: those of one folder.

    Where that would leave processes idle at the end, in parts; the first parts of all folders come
    first, so that the base's answers are there for the others.
    """
    beside = defaultdict(list)
    for run in folders:
        beside[Path(run).parent].append(run)
    count = jobs if len(beside) % jobs else 1
    sizes = {place: -(-len(there) // count) for place, there in beside.items()}
    parts = [
        there[k * sizes[place] : (k + 1) * sizes[place]]
        for k in range(count)
        for place, there in beside.items()
    ]
    return [part for part in parts if part]


def _everything(function: Callable, tasks: dict, jobs: int, leaves: str) -> None:
    """function(settings) of every task, in as many processes; one is done when there is a file or
    folder `leaves` in the run folder that it is named by.
    """
    if not tasks:
        return
    with workers.processes(jobs) as pool, progress.stage(TITLES[leaves], len(tasks)) as bar:

        def show() -> None:
            bar.advance(sum((Path(run) / leaves).exists() for run in tasks) - bar.done)

        given = enumerate((function, s, Path(run)) for run, s in tasks.items())
        workers.complete(pool, _aside, dict(given), show)


def _aside(function: Callable, settings, run: Path) -> None:
    """function(settings) in this process; what it prints goes to a file beside the run."""
    torch.set_num_threads(settings.threads or 1)
    run.parent.mkdir(parents=True, exist_ok=True)
    training = isinstance(settings, Settings)
    log = run.with_name(f"{run.name}.log" if training else "evaluation.log")
    with open(log, "a") as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        function(settings)
