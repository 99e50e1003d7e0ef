"""What a run costs: steps, gigabytes, hours, memory.

    cost.steps_line(run)                       # before the first step
    cost.hours(run, seconds)                   # once the time of a step is known

Tested in tests/test_cost.py.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from algorithm import Run
from diffusion import ALL_TIMESTEPS, DRAWS, GRID_BATCH, TIMESTEPS, Encoded, at_once, loss_grid
from run import pictures, snapshot, watch
from run.due import KEEP, draws, saves
from run.processes import Processes

try:
    import resource
except ImportError:  # Windows
    resource = None


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def gigabytes(run: Run) -> dict[str, float]:
    """Size in GB (1e9 bytes) of one adapter and of one state, and of all that lies in the run
    folder at most: adapters of the saved steps and the result, KEEP states and one being written.
    """
    s, adapter = run.settings, nbytes(run.adapter.state_dict().values())
    moments = 2 * nbytes(run.parameters)  # AdamW's; the attacker's Adam has as many
    if s.attacked:
        moments += 2 * nbytes(run.h.parameters())
    held = {k: v for k, v in snapshot.tensors_of(run).items() if "optimizer/" not in k}
    state = nbytes(held.values()) + moments
    count = 1 + sum(saves(s, step) for step in range(1, s.steps + 1))
    total = count * adapter + (KEEP + 1) * state
    return {"adapter": adapter / 1e9, "state": state / 1e9, "total": total / 1e9}


def steps_line(run: Run) -> str:
    """`160,000 steps of 1 image, 400 passes; 10 adapters of 0.05 GB, states of 0.15 GB: 1.0 GB`."""
    s, size = run.settings, gigabytes(run)
    passes = s.steps * run.size / len(run.data.members())
    adapters = counted(sum(saves(s, step) for step in range(1, s.steps + 1)), "adapter")
    return (
        f"{s.steps:,} steps of {counted(run.size, 'image')}, {passes:.3g} passes; {adapters} of "
        f"{size['adapter']:.2g} GB, {counted(KEEP, 'state')} of {size['state']:.2g} GB: "
        f"{size['total']:.2g} GB at most"
    )


def counted(count: int, thing: str) -> str:
    """`1 adapter`, `2 adapters`."""
    return f"{count} {thing}{'s' * (count != 1)}"


def hours(run: Run, seconds: float, teaching: float = 0.0) -> str:
    """`32 h: 31 h of steps at 0.70 s, 1 h of held-out losses and pictures`.

    A step takes `seconds`, and all steps of teachers `teaching` seconds together.  Sends one batch
    through the UNet to time the forwards without gradient.
    """
    training = run.settings.steps * seconds + teaching
    looking = forwards(run) * forward_seconds(run.base, run.data)
    return (
        f"about {duration(training + looking)}: {duration(training)} of steps at {seconds:.2g} s, "
        f"{duration(looking)} of held-out losses and pictures"
    )


def forwards(run: Run) -> int:
    """Images sent through the UNet without gradient: held-out losses of the base and of the saved
    steps, pictures, and the loss attack at the end.
    """
    s, roles = run.settings, run.data.roles
    validation = len(roles["member_val"]) + len(roles["nonmember_val"])
    steps = range(1, s.steps + 1)
    losses = (1 + sum(saves(s, step) for step in steps)) * validation * len(ALL_TIMESTEPS)
    attack = len(run.data.known()) * len(TIMESTEPS) * DRAWS
    return losses + attack + drawing(run)


def drawing(run: Run) -> int:
    """Forwards of the pictures, each step of the sampler with and without the caption: a row of the
    adapter in every grid, and of the base once for the last and once for those on the way.
    """
    s = run.settings
    if not s.samples:
        return 0
    prompts = len(s.prompt or [])
    last = (2 * s.samples + prompts) * pictures.STEPS
    few = (2 * min(s.samples, pictures.FEW) + prompts) * pictures.FEW_STEPS
    grids = [draws(run, step) for step in range(s.steps)]
    rows = sum(grids[1:]) + any(grids) + (grids[0] and s.init is not None)
    return 2 * (2 * last + rows * few)


def forward_seconds(base, data: Encoded) -> float:
    """Of one image through the UNet without gradient, in a batch as held-out losses have it."""
    index = [i % len(data.latents) for i in range(at_once(base, GRID_BATCH))]
    began = time.perf_counter()
    loss_grid(base, data.latents[index], data.text[index], timesteps=(250,), draws=1)
    return (time.perf_counter() - began) / len(index)


def duration(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`, `31 h`, `22 days`."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def peak_memory(device: torch.device) -> str:
    """What this process has had at once, on the GPU if it is on one, in words: `3.1 GiB`."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    if resource is None:
        return "an unknown amount (this system does not tell it)"
    scale = 2 ** (20 if sys.platform == "linux" else 30)  # kilobytes on Linux, bytes on macOS
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale:.1f} GiB"


# --------------------------------------------------------------------------------------------------
# A dry run


def dry_run(
    run: Run, processes: Processes, algorithm: Callable, promised: object = None
) -> dict[str, str]:
    """Print what a run would do, with the time of the second of two steps; nothing is written.

    `promised` is a bound that the run will keep, if there is one.
    """
    s, data = run.settings, run.data
    run.data = few_images(data)
    watch.base_row(run)  # raises UserError where the losses are not finite
    run.data, found, teaching = data, {}, 0.0
    if teacher := getattr(run, "teacher", None):
        lesson = second_step(algorithm, teacher(0))
        run.untrained()
        teaching = s.teachers * s.teacher_steps * lesson
        found["teachers"] = f"{s.teachers} of {s.teacher_steps} steps at {lesson:.2g} s"
    if promised:
        found["guarantee"] = str(promised)
    if s.method == "dp":  # all members are in a step, hours of a large model
        with run.one_forward() as forwards_of_a_step:
            seconds = forwards_of_a_step * second_step(algorithm, run)
    else:
        seconds = second_step(algorithm, run)
    layers = len(run.adapter.layers)
    where = f"{layers} layers" if layers else "the whole UNet"
    device = f"on {run.base.device} x {processes.count}"
    found |= {
        "model": f"{s.model}, {run.base.size} px, {s.dtype}, {device}",
        "adapter": f"{sum(p.numel() for p in run.parameters):,} parameters in {where}",
        "plan": steps_line(run),
        "time": hours(run, seconds, teaching),
        "memory": f"{peak_memory(run.base.device)} at its peak",
    }
    if processes.main:
        for name, text in found.items():
            print(f"{name + ':':9} {text}")
        print(f"dry run: nothing was written to {s.out}")
    processes.close()
    return found


def second_step(algorithm: Callable, run: Run) -> float:
    """Seconds of the second step; the first warms up."""
    rows = algorithm(run, (1, 2))
    next(rows)
    began = time.monotonic()
    next(rows)
    return time.monotonic() - began


def few_images(data: Encoded) -> Encoded:
    """The images with one of validation on each side: enough to see that its losses are finite."""
    few = {f"{side}_val": data.roles[f"{side}_val"][:1] for side in ("member", "nonmember")}
    return replace(data, roles=data.roles | few)
