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

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

from cli import one_line_errors, option, parse
from errors import UserError

EMBEDDED = str(Path(__file__).parent / "base")
HESSIAN_SEED = 20251  # of the batch that --hessian-every looks at; unrelated to any training seed

# What the flags left out are set to.  The paper's values for Stable Diffusion; for the embedded model, values
# set by hand and not tuned yet (README, "How the defaults were chosen").
PAPER = {
    "rank": 64, "alpha": 32.0, "target": "attention", "proxy": "raw", "lam": 0.05,
    "lr": 1e-4, "attacker_lr": 1e-5, "batch_size": 1, "epochs": 400, "members": 400,
}  # fmt: skip
FAST = {
    "rank": 64, "alpha": 64.0, "target": "all", "proxy": "pooled", "lam": 4.0,
    "lr": 1e-3, "attacker_lr": 3e-3, "batch_size": 8, "epochs": 60, "members": 100,
}  # fmt: skip


@dataclass
class Settings:
    """Everything that decides a run; each field is a flag.  None: PAPER, or FAST for the embedded model."""

    method: str = option(
        "smp",
        "lora, or with the defence: mp (the sum, Eq. 6) or smp (the ratio, Eq. 10); smp-detached is a control",
        ("lora", "mp", "smp", "smp-detached"),
    )
    model: str = option(EMBEDDED, "StableDiffusionPipeline folder, hub name, or single .safetensors checkpoint")
    size: int | None = option(None, "pixels of a side, a multiple of 8 (default: what the model was trained at)")
    data: str = option("twemoji", "twemoji, or a folder of captioned images")
    caption: str | None = option(None, "one caption for images that have none of their own")
    split: str = option(
        "default", "roles of the images; pokemon is the paper's 200/200/200/233", ("default", "pokemon")
    )
    members: int | None = option(None, "how many images to adapt on; half of them also train the attacker")
    out: str | None = option(None, "run folder (default: runs/<method>)")
    init: str | None = option(None, "adapter to start from; its rank, alpha and layers win over the flags")
    rank: int | None = option(None, "LoRA rank r; more adapts faster and leaks more")
    alpha: float | None = option(None, "LoRA alpha: the adapter is scaled by alpha / rank")
    target: str | None = option(None, "which layers are adapted", ("attention", "transformer", "all"))
    proxy: str | None = option(
        None, "the attacker in the loop: the paper's MLP on raw errors, or pooled statistics", ("raw", "pooled")
    )
    lam: float | None = option(None, "privacy weight lambda; 0 is plain LoRA")
    delta: float = option(1e-5, "stabiliser in the ratio's denominator")
    lr: float | None = option(None, "learning rate of the adapter (AdamW, constant)")
    attacker_lr: float | None = option(None, "learning rate of the attacker (Adam)")
    batch_size: int | None = option(None, "members per forward, and per half of the attacker's batch")
    accumulate: int = option(1, "forwards per step: with N, a step is that of a batch N times as large")
    steps: int | None = option(None, "outer steps; overrides --epochs")
    epochs: int | None = option(None, "passes over the members")
    clip: float = option(1.0, "limit of the gradient norm")
    seed: int = option(0, "decides split, initialisation, data order and noise")
    dtype: str = option(
        "auto",
        "of the frozen base, the rest stays float32; auto: bfloat16 or float16 on a GPU, float32 on a CPU",
        ("auto", "float32", "bfloat16", "float16"),
    )
    gradient_checkpointing: bool = option(False, "compute activations twice to keep fewer: a third slower, far smaller")
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    threads: int = option(0, "CPU threads; 0 leaves it to torch")
    save_every: int | None = option(
        None, "steps between adapters kept, each with its held-out loss (default: an eighth of the run)"
    )
    sample_every: int | None = option(None, "steps between sample grids (default: only the last)")
    norms_every: int = option(20, "steps between separate gradient norms of L and G (two more backward passes)")
    hessian_every: int = option(
        0, "steps between Hessian norms and their bound on a fixed batch (each costs dozens of steps); 0 is never"
    )
    state_every: int = option(100, "steps between training states for --resume")
    keep: int = option(2, "how many of them are kept")
    resume: bool = option(False, "continue the run in --out, with its settings; a run not begun is begun")
    format: str = option("diffusers", "kohya writes that form too, for ComfyUI and A1111", ("diffusers", "kohya"))
    track: str | None = option(None, "also log to a dashboard", ("tensorboard",))
    dry_run: bool = option(False, "say what would happen, with time and memory from two steps, and stop")


FREE = ("out", "device", "threads", "state_every", "keep", "resume", "track", "dry_run")  # may change on --resume


def resolve(settings: Settings) -> Settings:
    """Fill the flags that were left out and refuse what cannot work; raises UserError."""
    embedded = Path(settings.model).resolve() == Path(EMBEDDED).resolve()
    for name, value in (FAST if embedded else PAPER).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.out = settings.out or f"runs/{settings.method}"
    settings.dtype = resolve_dtype(settings.dtype, settings.device)
    positive = "size rank members batch_size accumulate epochs steps lr attacker_lr clip alpha"
    for name in (*positive.split(), "norms_every", "save_every", "sample_every", "state_every", "keep"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not (0 <= settings.lam < float("inf") and 0 <= settings.delta < float("inf")):
        raise UserError(f"--lam and --delta must be 0 or more, not {settings.lam} and {settings.delta}")
    for name in ("hessian_every", "threads"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(settings, name)}")
    if not 0 <= settings.seed < 2**62:
        raise UserError(f"--seed must be from 0 to 2**62, not {settings.seed}")
    if Path(settings.out).is_file():
        raise UserError(f"{settings.out} is a file: give --out the name of a folder")
    if (Path(settings.out) / "config.json").exists() and not (settings.resume or settings.dry_run):
        raise UserError(f"{settings.out} already holds a run: give another --out, or --resume to continue it")
    return settings


def stored(settings: Settings) -> tuple[Settings, dict | None]:
    """For --resume: the settings of the run in --out, and its summary if it is finished.

    A flag given that says something else is refused, save those in FREE.
    """
    path = Path(settings.out or f"runs/{settings.method}") / "config.json"
    if not path.is_file():
        return settings, None
    try:
        config = json.loads(path.read_text())
        known = {f.name: config["settings"][f.name] for f in fields(Settings) if f.name in config["settings"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a run's config ({error}): it cannot be continued, take another --out") from None
    for f in fields(Settings):
        given = getattr(settings, f.name)
        if f.name in known and f.name not in FREE and given not in (f.default, known[f.name]):
            flag = "--" + f.name.replace("_", "-")
            raise UserError(f"{path.parent} was begun with {flag} {known[f.name]}, not {given}: leave {flag} out")
    return replace(Settings(**known), **{name: getattr(settings, name) for name in FREE}), config.get("summary")


if __name__ == "__main__":  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__)

import torch
import tqdm

import checkpoint
import lora
import runfolder
import smoothness
from attacker import PROXIES, attacker_step
from data import load_images, split
from diffusion import Base, encode_captions, encode_images, load_base, resolve_dtype, squared_error
from objectives import clip_, gradient_norms, objective
from parallel import Processes, WholeBatch, gradients_of_mean
from runfolder import Run, write_json

# ---------------------------------------------------------------------------------------------------------------
# Batches


class Batches:
    """Endless shuffled batches of `size` from `indices`: every index once per pass, a pass may end inside a batch."""

    def __init__(self, indices: list[int], size: int, generator: torch.Generator):
        self.indices, self.size, self.generator = torch.tensor(indices), size, generator
        self.queue = torch.empty(0, dtype=torch.long)

    def draw(self) -> torch.Tensor:
        """(size,) indices."""
        while len(self.queue) < self.size:
            order = torch.randperm(len(self.indices), generator=self.generator)
            self.queue = torch.cat([self.queue, self.indices[order]])
        batch, self.queue = self.queue[: self.size], self.queue[self.size :]
        return batch


def draw_noise(base: Base, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (count,) uniform in 0..T-1 and Gaussian noise (count, C, h, w), drawn on the CPU for every device."""
    timesteps = torch.randint(len(base.abar), (count,), generator=generator)
    noise = torch.randn((count, *base.latent_shape), generator=generator)
    return timesteps.to(base.device), noise.to(base.device)


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
    run = Run(settings, base, adapter, latents, text, roles, images.names, images.captions, processes)
    run.steps = settings.steps or -(-settings.epochs * len(run.members) // run.batch)
    return run


class Learner:
    """All that changes while a run trains, and so what a training state holds: weights, optimisers, orders, noise."""

    def __init__(self, run: Run):
        settings = run.settings
        # separate streams, so that every method sees the same batches and noise in its outer steps
        self.outer, self.inner = (torch.Generator().manual_seed(settings.seed * 2 + k) for k in (1, 2))
        self.private = Batches(run.members, run.batch, self.outer)
        self.aux = [Batches(run.roles[f"{side}_aux"], run.batch, self.inner) for side in ("member", "nonmember")]
        self.adapter, self.parameters, self.device = run.adapter, run.adapter.parameters(), run.base.device
        self.attacker = PROXIES[settings.proxy](run.base.latent_shape).to(run.base.device).eval()
        self.attacker_optimizer = torch.optim.Adam(self.attacker.parameters(), lr=settings.attacker_lr)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as named tensors; random streams as the bytes of their state."""
        groups = {
            "adapter": self.adapter.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            "attacker": self.attacker.state_dict(),
            "attacker_optimizer": checkpoint.optimizer_tensors(self.attacker_optimizer),
            "random": {"outer": self.outer.get_state(), "inner": self.inner.get_state(), "cpu": torch.get_rng_state()},
            "queue": {str(i): batches.queue for i, batches in enumerate([self.private, *self.aux])},
        }
        if self.device.type != "cpu":
            groups["random"]["device"] = getattr(torch, self.device.type).get_rng_state()
        return {f"{group}/{name}": t for group, found in groups.items() for name, t in found.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        groups: dict[str, dict[str, torch.Tensor]] = {"optimizer": {}, "attacker_optimizer": {}}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = tensor
        with torch.no_grad():
            for name, weight in self.adapter.state_dict().items():
                weight.copy_(groups["adapter"][name])
        self.attacker.load_state_dict(groups["attacker"])
        checkpoint.restore_optimizer(self.optimizer, groups["optimizer"])
        checkpoint.restore_optimizer(self.attacker_optimizer, groups["attacker_optimizer"])
        self.outer.set_state(groups["random"]["outer"])
        self.inner.set_state(groups["random"]["inner"])
        torch.set_rng_state(groups["random"]["cpu"])
        if "device" in groups["random"] and self.device.type != "cpu":
            getattr(torch, self.device.type).set_rng_state(groups["random"]["device"])
        for i, batches in enumerate([self.private, *self.aux]):
            batches.queue = groups["queue"][str(i)]


# ---------------------------------------------------------------------------------------------------------------
# Algorithm 1


def attacker_turn(run: Run, learner: Learner) -> dict[str, float]:
    """Algorithm 1 (a): the attacker ascends G on D_aux; no gradient through the UNet."""
    index = torch.cat([batches.draw() for batches in learner.aux])  # members, then non-members
    timesteps, noise = draw_noise(run.base, len(index), learner.inner)
    parts = run.processes.parts(len(index), 2 * run.settings.batch_size)
    with torch.no_grad():
        error = torch.cat(
            [squared_error(run.base, run.latents[index[p]], run.text[index[p]], timesteps[p], noise[p]) for p in parts]
        )
    halves = zip(run.processes.gather(error).chunk(2), timesteps.chunk(2), strict=True)
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
        return squared_error(run.base, run.latents[index[part]], run.text[index[part]], timesteps[part], noise[part])

    def value(error: torch.Tensor, part: slice = slice(None)):
        return objective(s.method, error, timesteps[part], learner.attacker, s.lam, s.delta)

    norms = step % s.norms_every == 0 or step == 1
    if len(parts) > 1 and s.method in ("lora", "mp") and not norms:
        grads, error = gradients_of_mean(forward, parts, parameters, processes, lambda e, part: value(e, part).total)
        terms = value(error)
    else:
        batch = WholeBatch(forward, parts, parameters, processes)
        terms = value(batch.error)
        if norms:
            row = gradient_norms(terms, lambda v: batch.gradients(v, last=False))
        grads = batch.gradients(terms.total)
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

    with stop_signals() as caught, runfolder.metrics_log(run) as log, progress(run, first) as bar:
        for step in bar:
            tick, row = time.time(), {"step": step}
            if settings.method != "lora":
                row |= attacker_turn(run, learner)
            row |= adapter_turn(run, learner, step)
            if settings.hessian_every and (step % settings.hessian_every == 0 or step == 1):
                row |= local_smoothness(run, learner.attacker)
            learner.optimizer.step()
            row["seconds"] = time.time() - tick
            if processes.main and (step % save_every == 0 or step == run.steps):
                row |= runfolder.held_out(run)
                runfolder.save_adapter(run, run.out / "checkpoints" / f"step-{step:06d}", step)
            if processes.main and settings.sample_every and step % settings.sample_every == 0:
                runfolder.sample_grid(run, f"step-{step:06d}")
            log(row)
            bar.set_postfix(_postfix(row), refresh=False)
            stopped = processes.any(bool(caught))
            if processes.main and (step % settings.state_every == 0 or step == run.steps or stopped):
                log.sync()
                facts = {"seconds": before + time.time() - started}
                checkpoint.save(run.out / "state", step, learner.tensors(), facts, settings.keep)
            if stopped:
                leave(run, step, caught)
    summary = runfolder.finish(run, learner.attacker, before + time.time() - started) if processes.main else {}
    processes.close()
    return summary


def _postfix(row: dict) -> dict[str, str]:
    shown = {"loss": "adaptation_loss", "G": "mi_gain", "grad": "grad_norm", "attacker": "attacker_accuracy"}
    return {k: f"{row[v]:.3f}" for k, v in shown.items() if row.get(v) is not None}


def progress(run: Run, first: int) -> tqdm.tqdm:
    """The steps still to do, with a bar."""
    return tqdm.trange(
        first, run.steps + 1, initial=first - 1, total=run.steps, desc=run.settings.method, disable=not run.processes.main
    )


def start(run: Run, learner: Learner) -> tuple[int, float]:
    """Begin the run folder, or put `learner` where the folder's newest state was: (first step, seconds before)."""
    found = checkpoint.load(run.out / "state") if run.settings.resume else None
    if found is None:
        if run.processes.main:
            runfolder.begin(run)
        return 1, 0.0
    step, tensors, facts = found
    runfolder.check_images(run)
    if run.processes.main:
        runfolder.cut_metrics(run.out, step)
        print(f"continuing {run.out} ({run.settings.method}) after step {step} of {run.steps}")
    learner.restore(tensors)
    return step + 1, facts["seconds"]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Inside, SIGINT and SIGTERM are noted in the list, to be obeyed after the step; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(run: Run, step: int, caught: list[int]) -> None:
    """After a signal: the state is saved, say so and exit as the signal would have."""
    if run.processes.main:
        print(f"\nstopped after step {step} of {run.steps}; to go on: --out {run.out} --resume", file=sys.stderr)
    run.processes.close()
    raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


def local_smoothness(run: Run, attacker: torch.nn.Module) -> dict[str, float]:
    """Hessian norm, its parts and its bound at the adapter as it is, on a batch of members that never changes."""
    settings, generator = run.settings, torch.Generator().manual_seed(HESSIAN_SEED)  # no stream of the run's own
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
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "linux" else 30)
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
