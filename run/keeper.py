"""A run that survives: its folder, its rows, adapters, pictures and states, and how it stops.

    with Keeper(run, processes) as keeper:
        for row in keeper.rows(algorithm_1):
            ...                                # kept and shown already
    keeper.finish()

Tested in tests/test_train.py, tests/test_checkpoint.py and tests/test_resume.py.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch

import lora
from algorithm import Diverged, Run
from command import progress
from command.errors import PASSING, UserError, terminated
from files import adapters
from files.images import Images
from run import cost, due, identity, pictures, snapshot, state, watch
from run.folder import MetricsLog, RunFolder, git_commit, provenance, tensorboard
from run.precheck import going_on
from run.processes import Processes
from settings import PLACES

INSISTENT = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGBREAK")  # a second one acts at once
ENDING = (*INSISTENT, "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM")
ENDING += ("SIGVTALRM", "SIGPROF", "SIGPWR")  # each as far as the system has it
DEFAULT = (signal.SIG_DFL, signal.default_int_handler, terminated)
Algorithm = Callable[[Run, Iterable[int]], Iterator[dict]]


class Keeper:
    """Keeps a run on disk while it trains.  Only the main process writes and speaks."""

    def __init__(self, run: Run, processes: Processes):
        self.run, self.processes, self.settings = run, processes, run.settings
        self.folder = RunFolder(run.settings.out)
        self.before = 0.0  # seconds of the processes before this one
        self.started = self.saved = time.monotonic()  # saved: when the last state was written
        self.caught: list[int] = []  # signals that ask the run to stop

    @property
    def seconds(self) -> float:
        """Of training until now."""
        return self.before + time.monotonic() - self.started

    def __enter__(self) -> "Keeper":
        if self.processes.main:
            self.folder.sweep()
        if self.settings.resume and any(self.folder.state.glob("**/step-*.safetensors")):
            self.require_the_same()
            if self.processes.main:
                self.folder.move({name: getattr(self.settings, name) for name in PLACES})
        elif self.processes.main:
            self.begin()
        self.signals = stop_signals(self.caught)
        self.signals.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.signals.__exit__(*error)

    # ----------------------------------------------------------------------------------------------
    # The folder

    def begin(self) -> None:
        """Make the run folder."""
        row = watch.base_row(self.run)
        data, count = self.run.data, self.processes.count
        config = {
            "settings": asdict(self.settings) | {"resume": False},
            "identity": identity.of(self.settings, self.run.base),
            "processes": count,
            "roles": {role: len(index) for role, index in data.roles.items()},
            "trainable_parameters": sum(p.numel() for p in self.run.parameters),
        }
        splits = {role: [data.names[i] for i in index] for role, index in data.roles.items()}
        self.folder.begin(config | provenance(), splits, self.hashes(), row)

    def hashes(self) -> dict[str, str]:
        """What each picture and its caption are, by file name."""
        data = self.run.data
        found = Images(data.names, data.captions, data.pixels).hashes()
        return dict(zip(data.names, found, strict=True))

    def require_the_same(self) -> None:
        """Before going on: base, files and settings must be those that the run was started with, by
        content, and the images, also by role; raises UserError.
        """
        s, known, code = self.settings, self.folder.identity(), git_commit()
        identity.require(known, identity.of(s, self.run.base), s, f"{self.folder} was started with")
        if self.processes.main and self.folder.config().get("git_commit", code) != code:
            print(f"note: {self.folder} was started by other code: its numbers may differ")
        now, before = self.hashes(), self.folder.images() or {}
        sets = f"{s.data} or {s.nonmembers}" if s.nonmembers else s.data
        changed = [name for name, known in before.items() if now.get(name, known) != known]
        if changed:
            raise UserError(
                f"{changed[0]} in {sets}, or its caption, is not what {self.folder} was "
                "begun with: put it back, or take another --out"
            )
        data = self.run.data
        dealt = {role: [data.names[i] for i in index] for role, index in data.roles.items()}
        if self.folder.splits() != dealt:
            raise UserError(
                f"{sets} no longer holds the images that {self.folder} was started with: put them "
                "back"
            )

    # ----------------------------------------------------------------------------------------------
    # Training

    def rows(self, algorithm: Algorithm) -> Iterator[dict]:
        """Train from where the run stands to its end; yields the row of every step."""
        run, s, main = self.run, self.settings, self.processes.main
        first = self.start()
        if main:
            where = f"on {run.base.device}, {s.dtype}"
            print(f"plan:     {cost.steps_line(run)}; {where}", flush=True)
        if first == 1 and main and due.draws(run, 0):
            pictures.on_the_way(run, 0)
        tracker = tensorboard(self.folder) if main and s.track else None
        log = MetricsLog(self.folder if main else None, tracker)
        with log, progress.stage(s.method, s.steps, first - 1) as bar:
            for row in self.timed(algorithm, run, range(first, s.steps + 1)):
                show(bar, row)
                if row["step"] == first + 1 and main:  # the first step warms up
                    print(f"time:     {cost.hours(run, row['seconds'])}")
                stopped = self.processes.any(bool(self.caught))
                if main:
                    self.record(row, log, stopped)
                yield row
                if stopped:
                    self.leave(row["step"])

    def timed(self, algorithm: Algorithm, run: Run, steps: range) -> Iterator[dict]:
        """The rows with their seconds and their local smoothness; raises UserError where the run
        diverges.
        """
        began = time.monotonic()
        try:
            for row in algorithm(run, steps):
                row |= getattr(run, "curvature", {})
                yield row | {"seconds": time.monotonic() - began}
                began = time.monotonic()
        except Diverged as diverged:
            raise watch.explained(diverged, run.settings) from None

    def record(self, row: dict, log: MetricsLog, stopped: bool) -> None:
        """After a step: adapter with its held-out loss, pictures, the row, and the state, each when
        it is due.
        """
        run, s, step = self.run, self.settings, row["step"]
        last = step == s.steps or stopped
        if due.saves(s, step):
            losses = watch.held_out(run)
            with forgiving(f"adapter of step {step}", last):
                watch.save_adapter(run, self.folder.checkpoint(step), step)
                row |= losses  # which say that there is an adapter
        if due.draws(run, step):
            pictures.on_the_way(run, step)
        with forgiving(f"row of step {step} yet", last):  # it stays in the file's buffer
            log(row)
        if self.state_due(step, last):
            with forgiving(f"training state of step {step}", last):
                log.sync()
                self.save_state(self.folder.state, run, step, due.KEEP)

    def parts(self, name: str, runs: Iterator[Run], count: int, algorithm: Algorithm) -> None:
        """Train `count` runs that the run needs, such as teachers, in turn; each goes on where a
        killed one stopped.
        """
        main = self.processes.main
        if main:
            plan = f"{count} {name}s, {self.settings.teacher_steps} steps each"
            print(f"plan:     {plan}, then {cost.steps_line(self.run)}", flush=True)
        with progress.stage(f"{count} {name}s", count) as bar:
            for k, part in enumerate(runs):
                folder, steps = self.folder.state / f"{name}-{k}", part.settings.steps
                first = 1 + (self.load(folder, part) or 0 if self.settings.resume else 0)
                for row in self.timed(algorithm, part, range(first, steps + 1)):
                    bar.advance(k + row["step"] / steps - bar.done)
                    stopped = self.processes.any(bool(self.caught))
                    last = row["step"] == steps or stopped
                    if main and self.state_due(row["step"], last):
                        with forgiving(f"training state of {name} {k}", last):
                            self.save_state(folder, part, row["step"], keep=1)
                    if stopped:
                        self.leave(0)

    # ----------------------------------------------------------------------------------------------
    # States

    def start(self) -> int:
        """Put the run where its newest state was; returns the step that comes next."""
        s = self.settings
        step = self.load(self.folder.state, self.run) if s.resume else None
        if s.resume and self.processes.main:
            self.folder.cut(step or 0)
            if step:
                print(f"continuing {self.folder} ({s.method}) after step {step} of {s.steps}")
        return (step or 0) + 1

    def load(self, folder: Path, run: Run) -> int | None:
        """Take up the newest state of a folder and its time; returns its step, None if there is no
        state.
        """

        def take(tensors: dict[str, torch.Tensor], facts: dict) -> None:
            seconds = float(facts["seconds"])
            snapshot.restore(run, tensors)
            self.before = max(self.before, seconds)

        kept = state.load(folder, take)
        return kept and kept[0]

    def state_due(self, step: int, anyway: bool) -> bool:
        """Whether to save the state of a step now; `anyway` where nothing else may come."""
        since = time.monotonic() - self.saved
        return anyway or due.state_due(self.settings, step, since)

    def save_state(self, folder: Path, run: Run, step: int, keep: int) -> None:
        """Write the state of a step."""
        self.saved = time.monotonic()
        state.save(folder, step, snapshot.tensors_of(run), {"seconds": self.seconds}, keep)

    # ----------------------------------------------------------------------------------------------
    # The end

    def leave(self, step: int) -> None:
        """After a signal: the state is saved, say so and exit as the signal would have."""
        line = f"stopped after step {step} of {self.settings.steps}"
        if self.processes.main:
            with suppress(OSError):  # a closed terminal sends SIGHUP and reads no more
                print(f"{line}; to continue: {going_on(self.settings)}", file=sys.stderr)
        self.processes.close()
        raise SystemExit(128 + (self.caught[0] if self.caught else signal.SIGTERM))

    def finish(self, promise=None) -> dict:
        """What is left to do after the last step; returns the summary, in the main process."""
        summary = {}
        if self.processes.main:
            step = self.chosen()
            summary = watch.finish(self.run, self.folder, step, self.seconds, promise)
        self.processes.close()
        return summary

    def chosen(self) -> int:
        """The step of the adapter that --stop chooses among those saved, which the run then has."""
        if self.settings.stop == "last":
            return self.settings.steps
        path, step = self.folder.adapter("best")
        lora.remove(self.run.base.unet, self.run.adapter)
        self.run.adapter, _ = adapters.load(self.run.base, path)
        return step


@contextmanager
def forgiving(what: str, last: bool) -> Iterator[None]:
    """Inside, a file is written of which another will be: that a disk or a network drive fails once
    is a note then, and not the end of the run.
    """
    try:
        yield
    except OSError as error:
        if last or error.errno not in PASSING:
            raise
        where = error.filename or "metrics.jsonl"
        print(f"note: no {what} ({where}: {error.strerror}); the next one is tried")


def show(bar: progress.Stage, row: dict) -> None:
    """A step is done: the main values of its row behind the bar."""
    names = {"loss": "adaptation_loss", "attacker": "attacker_accuracy"}
    shown = {k: row[name] for k, name in names.items() if row.get(name) is not None}
    bar.note = ", ".join(f"{k} {value:.3f}" for k, value in shown.items())
    bar.advance()


@contextmanager
def stop_signals(caught: list[int]) -> Iterator[None]:
    """Inside, a signal that would end the process is noted in the list, to be obeyed after the
    step.  One that is ignored, such as SIGHUP under nohup, or handled already, stays so.
    """
    before = {n: signal.getsignal(n) for n in signal.Signals if n.name in ENDING}
    before = {n: handler for n, handler in before.items() if handler in DEFAULT}
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def note(number, frame):
        caught.append(number)
        if signal.Signals(number).name in INSISTENT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
