"""Adapt a latent diffusion model to private images, with or without a defence against membership inference.

    python train.py --method smp                      # embedded model and images, minutes on a laptop CPU
    python train.py --method lora                     # the same without a defence; mp is the paper's unstable sum
    python train.py --method smp --model SD15_FOLDER --data MY_IMAGES --device cuda
    python train.py --out runs/smp --resume           # go on after a kill, to the same numbers bit for bit
    accelerate launch --num_processes 4 train.py ...  # several GPUs
    python evaluate.py runs/smp runs/lora             # what leaks, and at what quality

This is Algorithm 1 of Luo et al. 2025 (arXiv 2402.11989): each iteration (a) improves the proxy attacker on a
balanced batch of auxiliary members and non-members, then (b) takes one step on the adapter against it.
"""

import resource
import signal
import sys
import time

from cli import UserError, one_line_errors, parse
from settings import Settings, resolve, stored

if (
    __name__ == "__main__"
):  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__)

import torch
import tqdm

import lora
import smoothness
from attacker import attacker_step
from data import load_images, split
from diffusion import encode_captions, encode_images, load_base, resolve_dtype, squared_error
from objectives import clip_, gradient_norms, objective
from training import run_folder, state
from training.learner import Batches, Learner, draw_noise
from training.processes import Processes, WholeBatch, gradients_of_mean
from training.run_folder import Run

HESSIAN_SEED = 20251  # of the batch that --hessian-every looks at; unrelated to any training seed

# ---------------------------------------------------------------------------------------------------------------
# The run


def prepare(settings: Settings, processes: Processes) -> Run:
    """Load the model and the images, split them, cache latents and text embeddings, inject the adapter."""
    torch.manual_seed(settings.seed)  # attacker initialisation and dropout
    base = load_base(settings.model, processes.device, settings.dtype, settings.size)
    images = load_images(settings.data, base.size, settings.caption)
    roles = split(images, settings.seed, settings.members, settings.split)
    latents, text = encode_images(base, images.pixels), encode_captions(base, images.captions)
    if settings.init:
        adapter, _ = lora.load(base.unet, settings.init)
        settings.rank, settings.alpha = adapter.scale()
        settings.target = adapter.target
    else:
        generator = torch.Generator().manual_seed(settings.seed)
        adapter = lora.inject(base.unet, settings.target, settings.rank, settings.alpha, generator)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    run = Run(
        settings, base, adapter, latents, text, roles, images.names, images.captions, processes
    )
    run.steps = settings.steps or -(-settings.epochs * len(run.members) // run.batch)
    return run


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1


def attacker_turn(run: Run, learner: Learner) -> dict[str, float]:
    """Algorithm 1 (a): the attacker ascends G on D_aux; no gradient through the UNet.

    With --attacker-members reused its members are those that the last outer step has already sent through the UNet.
    """
    reused = run.settings.attacker_members == "reused"
    if reused and (not learner.reused or not len(learner.reused[0])):
        return {}  # no outer step yet, or none of its batch is auxiliary
    drawn = learner.aux[1:] if reused else learner.aux
    index = torch.cat([batches.draw() for batches in drawn])  # members, then non-members
    timesteps, noise = draw_noise(run.base, len(index), learner.inner)
    parts = run.processes.parts(len(index), 2 * run.settings.batch_size)
    with torch.no_grad():
        error = torch.cat(
            [
                squared_error(
                    run.base, run.latents[index[p]], run.text[index[p]], timesteps[p], noise[p]
                )
                for p in parts
            ]
        )
    error = run.processes.gather(error)
    halves = (
        (learner.reused, (error, timesteps))
        if reused
        else zip(error.chunk(2), timesteps.chunk(2), strict=True)
    )
    loss, accuracy = attacker_step(learner.attacker, learner.attacker_optimizer, *halves)
    run.processes.same(learner.attacker)
    return {"attacker_loss": loss, "attacker_accuracy": accuracy}


def adapter_turn(run: Run, learner: Learner, step: int) -> dict[str, float | None]:
    """Algorithm 1 (b): the adapter descends the objective on members; one forward serves L and G."""
    s, processes, parameters = run.settings, run.processes, learner.parameters
    index = learner.private.draw()
    timesteps, noise = draw_noise(run.base, len(index), learner.outer)
    parts, row = processes.parts(len(index), s.batch_size), {}

    def forward(part: slice) -> torch.Tensor:
        return squared_error(
            run.base, run.latents[index[part]], run.text[index[part]], timesteps[part], noise[part]
        )

    def value(error: torch.Tensor, part: slice = slice(None)):
        return objective(s.method, error, timesteps[part], learner.attacker, s.lam, s.delta)

    norms = step % s.norms_every == 0 or step == 1
    if len(parts) > 1 and s.method in ("lora", "mp") and not norms:
        grads, error = gradients_of_mean(
            forward, parts, parameters, processes, lambda e, part: value(e, part).total
        )
        terms = value(error)
    else:
        batch = WholeBatch(forward, parts, parameters, processes)
        error = batch.error
        terms = value(error)
        if norms:
            row = gradient_norms(terms, lambda v: batch.gradients(v, last=False))
        grads = batch.gradients(terms.total)
    if s.attacker_members == "reused":
        known = torch.isin(index, learner.aux[0].indices).to(error.device)
        learner.reused = error.detach()[known], timesteps[known]
    row["grad_norm"] = clip_(grads, s.clip)
    row |= {
        "adaptation_loss": terms.loss.item(),
        "mi_gain": None if terms.gain is None else terms.gain.item(),
        "objective": terms.total.item(),
        "denominator": terms.denominator,
        "lambda_effective": terms.lambda_effective,
    }
    if not all(abs(row[name]) < float("inf") for name in ("objective", "grad_norm")):
        raise UserError(
            f"the objective or its gradient is no longer finite at step {step}: lower --lr or --lam; "
            f"adapters saved before it are in {s.out}/checkpoints"
        )
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return row


def train(settings: Settings) -> dict:
    """Algorithm 1.  Writes the run folder `settings.out` and returns its summary (also in config.json)."""
    summary = None
    if settings.resume:
        settings, summary = stored(settings)
    resolve(settings)
    settings.dtype = resolve_dtype(settings.dtype, settings.device)
    if summary is not None:
        print(f"{settings.out} is finished: nothing to resume")
        return summary
    if settings.threads:
        torch.set_num_threads(settings.threads)
    processes, started = Processes(settings.device), time.time()
    run = prepare(settings, processes)
    learner = Learner(run)
    if settings.dry_run:
        return dry_run(run, learner)
    first, before = start(run, learner)
    save_every = settings.save_every or max(1, run.steps // 8)

    with (
        state.stop_signals() as caught,
        run_folder.MetricsLog(run) as log,
        progress(run, first) as bar,
    ):
        for step in bar:
            tick, row = time.time(), {"step": step}
            if settings.method != "lora" and (step - 1) % settings.attacker_every == 0:
                row |= attacker_turn(run, learner)
            row |= adapter_turn(run, learner, step)
            if settings.hessian_every and (step % settings.hessian_every == 0 or step == 1):
                row |= local_smoothness(run, learner.attacker)
            learner.optimizer.step()
            row["seconds"] = time.time() - tick
            if processes.main and (step % save_every == 0 or step == run.steps):
                row |= run_folder.held_out(run)
                run_folder.save_adapter(run, run.out / "checkpoints" / f"step-{step:06d}", step)
            if processes.main and settings.sample_every and step % settings.sample_every == 0:
                run_folder.sample_grid(run, f"step-{step:06d}")
            log(row)
            bar.set_postfix(_postfix(row), refresh=False)
            stopped = processes.any(bool(caught))
            if processes.main and (
                step % settings.state_every == 0 or step == run.steps or stopped
            ):
                log.sync()
                facts = {"seconds": before + time.time() - started}
                state.save(run.out / "state", step, learner.tensors(), facts, settings.keep)
            if stopped:
                leave(run, step, caught)
    summary = (
        run_folder.finish(run, learner.attacker, before + time.time() - started)
        if processes.main
        else {}
    )
    processes.close()
    return summary


def _postfix(row: dict) -> dict[str, str]:
    shown = {
        "loss": "adaptation_loss",
        "G": "mi_gain",
        "grad": "grad_norm",
        "attacker": "attacker_accuracy",
    }
    return {k: f"{row[v]:.3f}" for k, v in shown.items() if row.get(v) is not None}


def progress(run: Run, first: int) -> tqdm.tqdm:
    """The steps still to do, with a bar."""
    return tqdm.trange(
        first,
        run.steps + 1,
        initial=first - 1,
        total=run.steps,
        desc=run.settings.method,
        disable=not run.processes.main,
    )


def start(run: Run, learner: Learner) -> tuple[int, float]:
    """Begin the run folder, or put `learner` where the folder's newest state was: (first step, seconds before)."""
    found = state.load(run.out / "state") if run.settings.resume else None
    if found is None:
        if run.processes.main:
            run_folder.begin(run)
        return 1, 0.0
    step, tensors, facts = found
    run_folder.check_images(run)
    if run.processes.main:
        run_folder.cut_metrics(run.out, step)
        print(f"continuing {run.out} ({run.settings.method}) after step {step} of {run.steps}")
    learner.restore(tensors)
    return step + 1, facts["seconds"]


def leave(run: Run, step: int, caught: list[int]) -> None:
    """After a signal: the state is saved, say so and exit as the signal would have."""
    if run.processes.main:
        print(
            f"\nstopped after step {step} of {run.steps}; to go on: --out {run.out} --resume",
            file=sys.stderr,
        )
    run.processes.close()
    raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


def local_smoothness(run: Run, attacker: torch.nn.Module) -> dict[str, float]:
    """Hessian norm, its parts and its bound at the adapter as it is, on a batch of members that never changes."""
    settings, generator = (
        run.settings,
        torch.Generator().manual_seed(HESSIAN_SEED),
    )  # no stream of the run's own
    index = Batches(run.members, min(settings.batch_size, len(run.members)), generator).draw()
    timesteps, noise = draw_noise(run.base, len(index), generator)

    def terms():
        error = squared_error(run.base, run.latents[index], run.text[index], timesteps, noise)
        return objective(settings.method, error, timesteps, attacker, settings.lam, settings.delta)

    return smoothness.measure(settings.method, terms, run.adapter.parameters(), settings.lam)


def dry_run(run: Run, learner: Learner) -> dict:
    """Print what a run would do, with the time of the second of two steps; nothing is written."""
    s, seconds = run.settings, []
    for step in (1, 2):
        tick = time.time()
        if s.method != "lora":
            attacker_turn(run, learner)
        adapter_turn(run, learner, step)
        learner.optimizer.step()
        seconds.append(time.time() - tick)
    if run.base.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.base.device) / 2**30
    else:  # kilobytes on Linux, bytes on macOS
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (
            20 if sys.platform == "linux" else 30
        )
    plan = {
        "model": f"{s.model}, {run.base.size} px, {s.dtype}, on {run.base.device} x {run.processes.count}",
        "images": ", ".join(f"{role} {len(found)}" for role, found in run.roles.items()),
        "adapter": f"{sum(p.numel() for p in learner.parameters):,} parameters in {len(run.adapter.layers)} layers",
        "steps": f"{run.steps} of {run.batch} images, {run.steps * run.batch / len(run.members):.1f} passes",
        "time": f"{seconds[1]:.2f} s a step, {run.steps * seconds[1] / 60:.0f} min without pictures and held-out losses",
        "memory": f"{memory:.1f} GiB at its peak",
    }
    if run.processes.main:
        for name, text in plan.items():
            print(f"{name + ':':9} {text}")
        print(f"dry run: nothing was written to {run.out}")
    run.processes.close()
    return plan


if __name__ == "__main__":
    with one_line_errors():
        train(SETTINGS)
