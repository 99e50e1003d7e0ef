"""What a run will do and cost, said before it is done: when it saves, gigabytes, hours.

    plan.say(run, learner)                     # before the first step: steps, adapters, states, GB
    plan.hours(run, seconds)                   # once the time of a step is known
    plan.saves(settings, step)                 # whether the adapter of a step is kept

Held by tests/test_plan.py.
"""

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

import torch

from diffusion import ALL_TIMESTEPS, DRAWS, GRID_BATCH, TIMESTEPS, at_once, loss_grid
from run import pictures
from run.learner import Learner
from run.prepare import Run
from settings import Settings

STATE_SECONDS = 300  # between two states where --state-every does not say; so much is lost at most
PARTS, FIRST = 8, 20  # an adapter each eighth of a run, the first after a twentieth
QUICK = 128  # pixels of a side up to which a CPU draws at every save

# --------------------------------------------------------------------------------------------------
# When something is written


def saves(s: Settings, step: int) -> bool:
    """Whether the adapter of a step is kept, with its held-out loss: every --save-every and the
    last; without the flag each eighth of the run, and before them one after a twentieth.
    """
    if step == s.steps:
        return True
    if s.save_every:
        return step % s.save_every == 0
    return step == first_saved(s) or step % max(1, s.steps // PARTS) == 0


def first_saved(s: Settings) -> int:
    """The first step whose adapter is kept."""
    return min(s.steps, s.save_every or max(1, s.steps // FIRST))


def draws(run: Run, step: int) -> bool:
    """Whether there is a grid of pictures at `step`, which is not the last: at the start and at
    every save, or at every --sample-every.  A CPU, which takes minutes for a large picture, draws
    such at the first save alone unless that flag asks for more.
    """
    s = run.settings
    if not s.samples or step == s.steps:
        return False
    if s.sample_every:
        return step % s.sample_every == 0
    if run.base.device.type == "cpu" and run.base.size > QUICK:
        return step == first_saved(s)
    return step == 0 or saves(s, step)


def state_due(s: Settings, step: int, since: float) -> bool:
    """Whether a state for --resume is due, `since` seconds after the one before."""
    return step % s.state_every == 0 if s.state_every else since >= STATE_SECONDS


# --------------------------------------------------------------------------------------------------
# What it costs


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def gigabytes(run: Run, learner: Learner) -> dict[str, float]:
    """Size in GB (1e9 bytes) of one adapter and of one state, and of all that lies in the run
    folder at most: adapters of the saved steps and the result, --keep states and one being written.
    """
    s, adapter = run.settings, nbytes(run.adapter.state_dict().values())
    moments = 2 * nbytes(learner.parameters)  # AdamW's; the attacker's Adam has as many
    if s.attacked:
        moments += 2 * nbytes(learner.attacker.parameters())
    held = {k: v for k, v in learner.tensors().items() if "optimizer/" not in k}
    state = nbytes(held.values()) + moments
    count = 1 + (s.format == "kohya") + sum(saves(s, step) for step in range(1, s.steps + 1))
    total = count * adapter + (s.keep + 1) * state
    return {"adapter": adapter / 1e9, "state": state / 1e9, "total": total / 1e9}


def steps_line(run: Run, learner: Learner) -> str:
    """`160,000 steps of 1 image, 400 passes; 10 adapters of 0.05 GB, states of 0.15 GB: 1.0 GB`."""
    s, size = run.settings, gigabytes(run, learner)
    passes = s.steps * run.batch / len(run.data.members())
    adapters = counted(sum(saves(s, step) for step in range(1, s.steps + 1)), "adapter")
    return (
        f"{s.steps:,} steps of {counted(run.batch, 'image')}, {passes:.3g} passes; {adapters} of "
        f"{size['adapter']:.2g} GB, {counted(s.keep, 'state')} of {size['state']:.2g} GB: "
        f"{size['total']:.2g} GB at most"
    )


def counted(count: int, thing: str) -> str:
    """`1 adapter`, `2 adapters`."""
    return f"{count} {thing}{'s' * (count != 1)}"


def hours(run: Run, seconds: float, lesson: float = 0.0) -> str:
    """`32 h: 31 h of steps at 0.70 s, 1 h of held-out losses and pictures`: a step takes `seconds`,
    one of a teacher `lesson`.  Sends one batch through the UNet to see what looking costs.
    """
    s = run.settings
    training = s.steps * seconds
    if s.method == "distill":
        training += s.teachers * s.teacher_steps * lesson
    looking = forwards(run) * forward_seconds(run)
    return (
        f"about {lasting(training + looking)}: {lasting(training)} of steps at {seconds:.2g} s, "
        f"{lasting(looking)} of held-out losses and pictures"
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


def forward_seconds(run: Run) -> float:
    """Of one image through the UNet without gradient, in a batch as held-out losses have it."""
    latents, text = run.data.latents, run.data.text
    index = [i % len(latents) for i in range(at_once(run.base, GRID_BATCH))]
    began = time.perf_counter()
    loss_grid(run.base, latents[index], text[index], timesteps=(250,), draws=1)
    return (time.perf_counter() - began) / len(index)


def lasting(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`, `31 h`, `22 days`."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def peak_memory(device: torch.device) -> float:
    """GiB that this process has had at once, on the GPU if it is on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 2 ** (20 if sys.platform == "linux" else 30)  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


# --------------------------------------------------------------------------------------------------
# Saying it


def say(run: Run, learner: Learner) -> None:
    """Print what is known before the first step."""
    if run.processes.main:
        where = f"on {run.base.device}, {run.settings.dtype}"
        print(f"plan:     {steps_line(run, learner)}; {where}", flush=True)


def dry(run: Run, learner: Learner, seconds: float, lesson: float = 0.0) -> dict[str, str]:
    """What a run would do, at `seconds` a step, `lesson` one of a teacher's; printed by the main
    process.
    """
    s = run.settings
    count = sum(p.numel() for p in run.adapter.parameters())
    found = {
        "model": f"{s.model}, {run.base.size} px, {s.dtype}, on {run.base.device}"
        f" x {run.processes.count}",
        "adapter": f"{count:,} parameters in "
        f"{f'{n} layers' if (n := len(run.adapter.layers)) else 'the whole UNet'}",
    }
    if s.method == "distill":
        found["teachers"] = f"{s.teachers} of {s.teacher_steps} steps at {lesson:.2g} s"
        found["public"] = f"{len(run.public)} public pictures from {s.public}"
    found |= {
        "plan": steps_line(run, learner),
        "time": hours(run, seconds, lesson),
        "memory": f"{peak_memory(run.base.device):.1f} GiB at its peak",
    }
    if run.processes.main:
        for name, text in found.items():
            print(f"{name + ':':9} {text}")
        print(f"dry run: nothing was written to {run.folder}")
    return found


def sketch(run: Run) -> Run:
    """The run with one validation image on each side: enough to see that its losses are finite."""
    few = {f"{side}_val": run.data.roles[f"{side}_val"][:1] for side in ("member", "nonmember")}
    return replace(run, data=replace(run.data, roles=run.data.roles | few))
