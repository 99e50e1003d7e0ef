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

Algorithm 1 is in algorithm.py.  This file loads a run, says what it has beyond the paper, and hands
it to run/keeper.py, which keeps it on disk.  Imports of torch wait until the flags are checked.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from command import progress
from command.errors import one_line_errors
from command.flags import parse
from run import lock
from run.folder import RunFolder
from run.precheck import going_on, launched, precheck, writes
from run.resolve import out_folder
from settings import Settings


def train_adapter(base, data, s: Settings, extra: tuple[type, ...] = ()) -> Iterator[tuple]:
    """The whole method on images that are encoded already: (step, adapter) after every step.

    The base is as before when the generator is closed.  The same start, batches and noise as those
    of a run with this seed.
    """
    import torch

    from algorithm import algorithm_1
    from lora import remove
    from methods.assembly import assemble
    from run.processes import Processes

    torch.manual_seed(s.seed)  # attacker initialisation and dropout
    run = assemble(s, base, data, Processes(str(base.device)), extra)
    try:
        for teacher in run.lessons() if s.method == "distill" else ():
            for _ in algorithm_1(teacher, range(1, teacher.settings.steps + 1)):
                pass
        for row in algorithm_1(run, range(1, run.settings.steps + 1)):
            yield row["step"], run.adapter
    finally:
        remove(base.unet, run.adapter)


def train(settings: Settings, extra: tuple[type, ...] = ()) -> dict:
    """Run Algorithm 1.  Writes the run folder `settings.out`; returns its summary.

    Raises UserError for what the user can mend, SystemExit when asked to stop.
    """
    folder = out_folder(settings)
    with lock.held(Path(folder)) if writes(settings) else nullcontext():
        checked, summary = precheck(settings)
        if summary is None:
            return learn(checked, extra)
        if writes(settings):
            RunFolder(folder).clear()
    print(f"{checked.out} is finished: nothing to resume")
    return summary


def learn(s: Settings, extra: tuple[type, ...] = ()) -> dict:
    """The run itself, in a folder that no other process writes to; returns its summary."""
    with progress.stage("loading the libraries"):
        from algorithm import algorithm_1
        from methods.assembly import assemble
        from methods.dp import promise
        from run import cost, prepare
        from run.keeper import Keeper
        from run.processes import Processes

    s = prepare.on_device(s)
    processes = Processes(s.device)
    s, base, data = prepare.load(s, processes)
    run = assemble(s, base, data, processes, extra)
    promised = promise(run) if s.method == "dp" else None
    if s.dry_run:
        return cost.dry_run(run, processes, algorithm_1, promised)
    with Keeper(run, processes) as keeper:
        if s.method == "distill":
            keeper.parts("teacher", run.lessons(), s.teachers, algorithm_1)
        for _ in keeper.rows(algorithm_1):
            pass
    return keeper.finish(promised)


def main() -> None:
    """The command."""
    settings = parse(Settings, __doc__)
    with one_line_errors(partial(going_on, settings)):
        progress.start(main=launched()[1] == 0)
        train(settings)


if __name__ == "__main__":
    main()
