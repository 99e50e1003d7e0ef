"""The grid of runs behind every study: rows times seeds, each run in the folder seed-S/ROW.

    runs = [run_of(s, ROWS[name], out / "seed-0" / name, seed=0) for name in names]
    complete(s, runs)                    # trains what is missing, then evaluates it

A finished run stays.  So a killed study goes on where it was, and one more row costs that row.
Imports nothing heavy.  Tested in tests/test_studies.py.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

from attacks import workers
from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from command.whole_files import read_json
from run.precheck import precheck
from run.resolve import resolve
from settings import Settings

WHERE = "what and where"


@dataclass
class Study(Settings):
    """Flags of train.py and how many runs; the flags that a row sets win over them."""

    seeds: int = option(3, "runs of each row, from --seed upwards", group=WHERE)
    jobs: int | None = option(
        None, "runs at a time, a process each (default: cores, or 1 on a GPU)", group=WHERE
    )


@dataclass
class EvaluatedStudy(Study):
    """The flags of evaluate.py that a study has beside them."""

    pictures: int = option(100, "pictures of each run for the Frechet distance", group=WHERE)
    features: str = option(
        "embedded",
        "network of the Frechet distance; the paper's is inception",
        ("embedded", "inception"),
        group=WHERE,
    )
    test_nonmembers: int = option(200, "test non-members to score; 0 takes all", group=WHERE)


@dataclass(frozen=True)
class Row:
    """One kind of run, of which there is one for each seed."""

    says: str  # what a table calls it
    flags: dict  # of train.py
    times: dict = field(default_factory=dict)  # flags as multiples of the model's own defaults
    extra: tuple[type, ...] = ()  # classes that train.train adds to the run


class GridRun(NamedTuple):
    """What train.train takes for one run."""

    settings: Settings
    extra: tuple[type, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.out)


def command(flags: type, run: Callable, doc: str, positional: str | None = None) -> None:
    """Run a study with the flags of the command line; `doc` is its --help."""
    settings = parse(flags, doc, positional)
    with one_line_errors():
        progress.start()
        run(settings)


def chosen(names: list[str] | None, there: dict, what: str = "row") -> list[str]:
    """The names that are asked for, or all; raises UserError for one that there is not."""
    for name in names or ():
        if name not in there:
            raise UserError(f"there is no {what} {name}: take some of {', '.join(there)}")
    return names or list(there)


def seeds(s: Study) -> range:
    """The seeds of every row; raises UserError for fewer than one."""
    if s.seeds < 1:
        raise UserError(f"--seeds must be 1 or more, not {s.seeds}")
    return range(s.seed, s.seed + s.seeds)


def processes(s: Study) -> int:
    """How many runs go on at a time; raises UserError for fewer than one."""
    from files.devices import resolve_device

    if s.jobs is not None and s.jobs < 1:
        raise UserError(f"--jobs must be 1 or more, not {s.jobs}")
    return s.jobs or (os.cpu_count() if resolve_device(s.device) == "cpu" else 1)


def run_of(s: Study, row: Row, folder: Path, seed: int, **flags) -> GridRun:
    """One run: the flags of the study, over them `flags`, over them those of its row."""
    own = {f.name: getattr(s, f.name) for f in fields(Settings)}
    fixed = {"seed": seed, "out": str(folder), "resume": True, "dry_run": False}
    settings = Settings(**own | flags | row.flags | fixed)
    whole = resolve(settings) if row.times else settings
    for name, factor in row.times.items():
        value = factor * getattr(whole, name)
        if name == "rank":
            value = max(1, round(value))
        settings = replace(settings, **{name: value})
    return GridRun(settings, row.extra)


def missing(s: Study, runs: list[GridRun]) -> list[GridRun]:
    """The runs that are not evaluated, or of a study that does not evaluate, not finished."""
    if isinstance(s, EvaluatedStudy):
        return [run for run in runs if not (run.folder / "eval.json").is_file()]
    return [run for run in runs if not finished(run.folder)]


def finished(folder: Path) -> bool:
    """Whether a run has a summary."""
    config = folder / "config.json"
    return config.is_file() and bool(read_json(config).get("summary"))


def announce(s: Study, runs: list[GridRun]) -> None:
    """Print what a study would do; raises UserError for flags that cannot be."""
    for run in runs:
        resolve(run.settings)
    todo = missing(s, runs)
    names = ", ".join(dict.fromkeys(run.folder.name for run in todo))
    print(f"dry run: {len(todo)} of {len(runs)} runs are missing, {processes(s)} at a time")
    if todo:
        print(f"rows {names}; seeds {', '.join(map(str, seeds(s)))}")
        print("python train.py --dry-run says how long a run takes")


def complete(s: Study, runs: list[GridRun]) -> None:
    """Train the runs that are missing, and evaluate them where the study has flags for that.

    Raises UserError before anything is trained: for flags that cannot be, for a model or images
    that are not there, and for a run that was started with other flags.
    """
    import train

    for run in runs:
        precheck(run.settings)
    todo = missing(s, runs)
    trained = {}
    for run in todo:
        log = run.folder.with_name(f"{run.folder.name}.log")
        trained[run.folder] = (train.train, log, *run)
    _work(s, "runs trained", trained, "adapter")
    if isinstance(s, EvaluatedStudy):
        _work(s, "runs evaluated", _evaluations(s, todo), "eval.json")


def _evaluations(s: EvaluatedStudy, runs: list[GridRun]) -> dict[Path, tuple]:
    """The tasks of `_work`, one run of each seed first: it answers for the base too, and the others
    of its seed find these answers.
    """
    import evaluate

    first = {run.folder.parent: run for run in reversed(runs)}.values()
    tasks = {}
    for run in sorted(runs, key=lambda run: run not in first):
        judge = evaluate.Settings(
            runs=[str(run.folder)],
            device=s.device,
            pictures=s.pictures,
            features=s.features,
            test_nonmembers=s.test_nonmembers,
        )
        log = run.folder.with_name(f"{run.folder.name}.log")
        tasks[run.folder] = (evaluate.evaluate, log, judge)
    return tasks


def _work(s: Study, title: str, tasks: dict[Path, tuple], leaves: str) -> None:
    """Run the tasks {run folder: arguments of _quietly} in processes; a task is finished when
    `leaves` is in its folder.
    """
    if not tasks:
        return
    with workers.processes(processes(s)) as pool, progress.stage(title, len(tasks)) as bar:

        def show() -> None:
            finished = sum((folder / leaves).exists() for folder in tasks)
            bar.advance(finished - bar.done)

        workers.complete(pool, _quietly, dict(enumerate(tasks.values())), show)


def _quietly(function: Callable, log: Path, *given) -> None:
    """function(*given) on one thread; what it prints goes to the end of the file `log`."""
    import torch

    torch.set_num_threads(1)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        function(*given)
