"""Adapt a latent diffusion model to private images, with or without a defence
against membership inference.

    python train.py --method smp           # the small model, images with it
    python train.py --method lora          # without a defence
    python train.py --method distill       # teachers that never saw the image
    python train.py --data MY_IMAGES       # one's own, with captions
    python train.py --data MY_IMAGES --nonmembers openmoji   # all as members
    python train.py --data MY_IMAGES --model SD15_FOLDER     # Stable Diffusion
    python train.py --data MY_IMAGES --model SD15_FOLDER --dry-run  # costs
    python train.py --out runs/smp --resume          # go on, to the same bits
    accelerate launch --num_processes 4 train.py ... # several GPUs
    python evaluate.py runs/smp runs/lora  # what leaks, and at what quality

`algorithm_1` is Algorithm 1 of Luo et al. 2025 (arXiv 2402.11989); everything else here sets it up
and keeps what it does.  Held by tests/test_train.py, tests/test_parallel.py and
tests/test_checkpoint.py.
"""

from functools import partial
from importlib import import_module
from pathlib import Path

from command import progress
from command.errors import one_line_errors
from command.flags import parse
from run import lock
from run.precheck import glance, going_on, launched, precheck, writes
from settings import Settings

if __name__ == "__main__":
    # before the heavy imports, so that --help and what cannot work are answered at once
    SETTINGS = parse(Settings, __doc__)
    with one_line_errors(partial(going_on, SETTINGS)):
        glance(SETTINGS)
        progress.start(main=launched()[1] == 0)
        with progress.stage("loading the libraries"):
            import_module("run.watch")

import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch

from attacker import attacker_step
from diffusion import Base, Encoded
from files.bases import resolve_device, resolve_dtype
from lora import Adapter, remove
from methods.distill import Student, Teachers
from methods.dp import PrivateLearner, guarantee
from objectives import adaptation_loss, clip_, gradient_norms, mi_gain, objective
from run import cost as plan
from run import pictures, state
from run import watch as monitor
from run.folder import RunFolder
from run.learner import Learner
from run.prepare import Run, assemble, prepare
from run.processes import Processes


def algorithm_1(run: Run, learner: Learner, steps: Iterable[int]) -> Iterator[dict]:
    """Algorithm 1: attacker h and adapter A, B in turn.  Yields a row of metrics.jsonl per step.

    Members D_tr = D_aux^m + D_te^m are what the adapter trains on; D_aux, half members and half
    not, is what the attacker trains on.  e (B, C, h, w) are the elementwise squared errors of one
    UNet forward, over all micro-batches and processes.  Raises UserError when a number is no longer
    finite, before any weight has moved by it.
    """
    s, h = run.settings, learner.attacker
    for step in steps:
        began, row = time.time(), {"step": step}

        if s.attacked and not (s.released("order") and step == 1):
            # (a) the attacker ascends its gain on a balanced auxiliary batch
            pair = auxiliary_batch(run, learner)  # (e, t) of members, (e, t) of non-members
            if pair:
                loss, accuracy = attacker_step(h, learner.attacker_optimizer, *pair)  # G, Eq. 5
                row |= {"attacker_loss": loss, "attacker_accuracy": accuracy}
            run.processes.same(h)

        batch = learner.member_batch()  # (b) the adapter descends on a fresh batch of D_tr
        forward = learner.through(batch)
        e = forward.error
        loss = adaptation_loss(batch.fitted(e))  # L, Eq. 3
        shown = run.shown(batch, e) if s.attacked else e
        gain = mi_gain(learner.judge, *batch.judged(shown)) if s.attacked else None  # G, Eq. 5
        # L + lam G (Eq. 6), or L / D (Eq. 10)
        terms = objective(s.objective, loss, gain, s.weight, s.delta)
        if step % s.norms_every == 0 or step == 1:
            row |= gradient_norms(terms, forward.gradients)
        gradients = forward.gradients(terms.total, last=True)  # through h and through the UNet
        row |= monitor.metrics(terms, grad_norm=clip_(gradients, s.clip, s.normalise))
        monitor.require_finite(row, s)
        row |= monitor.local_smoothness(run, h, step)
        learner.keep(batch, shown)
        learner.descend(gradients, step)  # AdamW
        yield row | {"seconds": time.time() - began}


def auxiliary_batch(run: Run, learner: Learner) -> tuple[tuple, tuple] | None:
    """(errors, timesteps) of auxiliary members and of as many non-members; without gradient.

    With --attacker-members reused the members are those that the last outer step has sent through
    the UNet already, and there is no batch where there are none.
    """
    if learner.reuses and (not learner.reused or not len(learner.reused[0])):
        return None
    batch = learner.auxiliary_batch()
    error = run.shown(batch, run.errors_alone(batch))
    if learner.reuses:
        return learner.reused, (error, batch.timesteps)
    return tuple(zip(error.chunk(2), batch.timesteps.chunk(2), strict=True))


def train_adapter(base: Base, data: Encoded, s: Settings) -> Iterator[tuple[int, Adapter]]:
    """The whole method on images that are encoded already: (step, adapter) after every step.

    The base is as before when the generator is closed.  The same start, batches and noise as those
    of a run with this seed.
    """
    torch.manual_seed(s.seed)  # attacker initialisation and dropout
    run = assemble(s, base, data, Processes(str(base.device)))
    try:
        teachers = Teachers(run) if s.method == "distill" else None
        for _ in teachers.train(algorithm_1) if teachers else ():
            pass
        learner = learner_of(run, teachers)
        for row in algorithm_1(run, learner, range(1, run.settings.steps + 1)):
            with learner.averaged():
                yield row["step"], run.adapter
    finally:
        remove(base.unet, run.adapter)


def learner_of(run: Run, teachers: Teachers | None) -> Learner:
    """All that changes while the run trains; with teachers their student."""
    if teachers:
        return Student(run, teachers)
    return PrivateLearner(run) if run.settings.method == "dp" else Learner(run)


# --------------------------------------------------------------------------------------------------
# Around it: a run from its settings to its summary


def train(settings: Settings) -> dict:
    """Run Algorithm 1.  Writes the run folder `settings.out`; returns its summary.

    Raises UserError for what the user can mend, SystemExit when asked to stop.
    """
    checked, summary = precheck(settings)
    if summary is None:
        with lock.held(Path(checked.out)) if writes(checked) else nullcontext():
            checked, summary = precheck(settings)  # until now another may have trained there
            if summary is None:
                return learn(checked)
    print(f"{checked.out} is finished: nothing to resume")
    return summary


def learn(settings: Settings) -> dict:
    """The run itself, in a folder that no other process writes to; returns its summary."""
    clock = Clock()
    settings = on_device(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes = Processes(settings.device)
    run = prepare(settings, processes)
    if settings.dry_run:
        return dry_run(run)
    open_folder(run)
    with state.stop_signals() as caught:
        teachers = taught(run, clock, caught) if settings.method == "distill" else None
        learner = learner_of(run, teachers)
        first, steps = start(run, learner, clock), run.settings.steps
        plan.say(run, learner)
        if first == 1 and processes.main and plan.draws(run, 0):
            pictures.on_the_way(run, 0)
        name = run.settings.method
        with monitor.log(run) as log, progress.stage(name, steps, first - 1) as bar:
            for row in algorithm_1(run, learner, range(first, steps + 1)):
                monitor.show(bar, row)
                if row["step"] == first + 1 and processes.main:  # the first one warms up
                    print(f"time:     {plan.hours(run, row['seconds'])}")
                stopped = processes.any(bool(caught))
                if processes.main:
                    record(run, learner, row, log, clock, stopped)
                if stopped:
                    leave(run, row["step"], caught)
    promised = guarantee(run) if settings.method == "dp" else None
    with learner.averaged():
        summary = monitor.finish(run, learner, clock.seconds, promised) if processes.main else {}
    processes.close()
    return summary


def on_device(s: Settings) -> Settings:
    """The settings with the device and the dtype that "auto" stands for here."""
    before = RunFolder(s.out).device() if s.resume else None
    device = resolve_device(s.device, before)
    if before not in (None, device) and s.device == "auto":
        print(f"note: {s.out} was begun on {before}, which is not here: it goes on on {device}")
    return replace(s, device=device, dtype=resolve_dtype(s.dtype, device))


class Clock:
    """Seconds of a run, with those of the processes before this one, and when a state is due."""

    def __init__(self):
        self.started, self.before = time.time(), 0.0
        self.saved = time.monotonic()  # the last state

    @property
    def seconds(self) -> float:
        """Until now."""
        return self.before + time.time() - self.started

    def due(self, s: Settings, step: int, anyway: bool) -> bool:
        """Whether to save the state of a step now; `anyway` where nothing else may come."""
        due = anyway or plan.state_due(s, step, time.monotonic() - self.saved)
        self.saved = time.monotonic() if due else self.saved
        return due


def open_folder(run: Run) -> None:
    """Begin the run folder, or make sure that it can be gone on with."""
    folder = run.folder
    if run.processes.main:
        folder.sweep()
    if run.settings.resume and any(folder.state.glob("**/step-*.safetensors")):
        monitor.require_same(run)
    elif run.processes.main:
        monitor.begin(run)


def taught(run: Run, clock: Clock, caught: list[int]) -> Teachers:
    """The teachers of a run, each gone on with where a killed one stopped."""
    s, teachers = run.settings, Teachers(run)

    def where(k: int) -> Path:
        return run.folder.state / f"teacher-{k}"

    def take_up(k: int, learner: Learner) -> int:
        kept = load(where(k), learner, clock) if s.resume else None
        return kept or 0

    with progress.stage(f"{s.teachers} teachers", s.teachers * s.teacher_steps) as bar:
        for k, step, learner in teachers.train(algorithm_1, take_up):
            bar.advance(k * s.teacher_steps + step - bar.done)
            stopped = run.processes.any(bool(caught))
            if run.processes.main and clock.due(s, step, step == s.teacher_steps or stopped):
                facts = {"seconds": clock.seconds}
                state.save(where(k), step, learner.tensors(), facts, keep=1)
            if stopped:
                leave(run, 0, caught)
    return teachers


def start(run: Run, learner: Learner, clock: Clock) -> int:
    """Put `learner` where its newest state was; returns the step that comes next."""
    step = load(run.folder.state, learner, clock) if run.settings.resume else None
    if run.settings.resume and run.processes.main:
        run.folder.cut(step or 0)
        if step:
            s = run.settings
            print(f"continuing {run.folder} ({s.method}) after step {step} of {s.steps}")
    return (step or 0) + 1


def load(folder: Path, learner: Learner, clock: Clock) -> int | None:
    """Take up the newest state of a folder and its time; returns its step, None if there is no
    state.
    """

    def take(tensors: dict[str, torch.Tensor], facts: dict) -> None:
        seconds = float(facts["seconds"])
        learner.restore(tensors)
        clock.before = max(clock.before, seconds)

    kept = state.load(folder, take)
    return kept and kept[0]


def record(run: Run, learner: Learner, row: dict, log, clock: Clock, stopped: bool) -> None:
    """After a step: adapter with its held-out loss, pictures, the row, and the state, each when it
    is due.
    """
    s, step = run.settings, row["step"]
    with learner.averaged():
        if plan.saves(s, step):
            row |= monitor.held_out(run)
            monitor.save_adapter(run, run.folder.checkpoint(step), step)
        if plan.draws(run, step):
            pictures.on_the_way(run, step)
    log(row)
    if clock.due(s, step, step == s.steps or stopped):
        log.sync()
        state.save(run.folder.state, step, learner.tensors(), {"seconds": clock.seconds}, s.keep)


def leave(run: Run, step: int, caught: list[int]) -> None:
    """After a signal: the state is saved, say so and exit as the signal would have."""
    if run.processes.main:
        print(
            f"stopped after step {step} of {run.settings.steps}; "
            f"to go on: {going_on(run.settings)}",
            file=sys.stderr,
        )
    run.processes.close()
    raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


def dry_run(run: Run) -> dict[str, str]:
    """Print what a run would do, with the time of the second of two steps; nothing is written."""
    monitor.base_row(plan.sketch(run))
    teachers, lesson = None, 0.0
    if run.settings.method == "distill":
        teachers = Teachers(run).untrained()
        plain = teachers.as_run(0)
        lesson = list(algorithm_1(plain, Learner(plain), (1, 2)))[1]["seconds"]
    learner = learner_of(run, teachers)
    rows = list(algorithm_1(run, learner, (1, 2)))
    found = plan.dry(run, learner, rows[1]["seconds"], lesson)
    run.processes.close()
    return found


if __name__ == "__main__":
    with one_line_errors(partial(going_on, SETTINGS)):
        train(SETTINGS)
