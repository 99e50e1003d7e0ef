"""Adapt a latent diffusion model to private images, with or without a defence against membership inference.

    python train.py --method smp                      # embedded model and images, minutes on a laptop CPU
    python train.py --method lora                     # the same without a defence; mp is the paper's unstable sum
    python train.py --method smp --model SD15_FOLDER --data MY_IMAGES --device cuda --dtype bfloat16
    python evaluate.py runs/smp runs/lora             # what leaks, and at what quality

This is Algorithm 1 of Luo et al. 2025 (arXiv 2402.11989): each iteration (a) improves the proxy attacker on a
balanced batch of auxiliary members and non-members, then (b) takes one step on the adapter against it.
"""

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cli import one_line_errors, option, parse
from errors import UserError

EMBEDDED = str(Path(__file__).parent / "base")

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
        "smp", "lora, or with the defence: mp (the sum, Eq. 6) or smp (the ratio, Eq. 10)", ("lora", "mp", "smp")
    )
    model: str = option(EMBEDDED, "StableDiffusionPipeline folder or hub name")
    data: str = option("twemoji", "twemoji, or a folder of captioned images")
    caption: str | None = option(None, "one caption for images that have none of their own")
    split: str = option(
        "default", "roles of the images; pokemon is the paper's 200/200/200/233", ("default", "pokemon")
    )
    members: int | None = option(None, "how many images to adapt on; half of them also train the attacker")
    out: str | None = option(None, "run folder (default: runs/<method>)")
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
    batch_size: int | None = option(None, "members per step, and per half of the attacker's batch")
    steps: int | None = option(None, "outer steps; overrides --epochs")
    epochs: int | None = option(None, "passes over the members")
    clip: float = option(1.0, "limit of the gradient norm")
    seed: int = option(0, "decides split, initialisation, data order and noise")
    dtype: str = option("float32", "of the frozen base; the adapter stays float32", ("float32", "bfloat16", "float16"))
    device: str = option("cpu", "cpu, cuda, cuda:1, mps")
    threads: int = option(0, "CPU threads; 0 leaves it to torch")
    save_every: int | None = option(
        None, "steps between adapters kept, each with its held-out loss (default: an eighth of the run)"
    )
    sample_every: int | None = option(None, "steps between sample grids (default: only the last)")
    norms_every: int = option(20, "steps between separate gradient norms of L and G (two more backward passes)")
    resume: bool = option(False, "continue a run (not built yet)")


def resolve(settings: Settings) -> Settings:
    """Fill the flags that were left out and refuse what cannot work; raises UserError."""
    embedded = Path(settings.model).resolve() == Path(EMBEDDED).resolve()
    for name, value in (FAST if embedded else PAPER).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.out = settings.out or f"runs/{settings.method}"
    for name in (
        "rank",
        "members",
        "batch_size",
        "epochs",
        "steps",
        "lr",
        "attacker_lr",
        "norms_every",
        "save_every",
        "sample_every",
        "clip",
    ):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not (0 <= settings.lam < float("inf") and 0 <= settings.delta < float("inf")):
        raise UserError(f"--lam and --delta must be 0 or more, not {settings.lam} and {settings.delta}")
    if settings.seed < 0:
        raise UserError(f"--seed must be 0 or more, not {settings.seed}")
    if settings.resume:
        raise UserError("--resume is not built yet: start again with another --out")
    if Path(settings.out).is_file():
        raise UserError(f"{settings.out} is a file: give --out the name of a folder")
    if (Path(settings.out) / "config.json").exists():
        raise UserError(f"{settings.out} already holds a run: give another --out, or --resume to continue it")
    return settings


if __name__ == "__main__":  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__)

import diffusers
import numpy as np
import torch
import tqdm
from safetensors.torch import save_file

import attacks
import lora
import plots
from attacker import PROXIES, attacker_step
from data import load_images, split
from diffusion import Base, encode_captions, encode_images, load_base, sample, squared_error
from objectives import clip_, gradient_norms, gradients, objective

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


@dataclass
class Run:
    """What one run works on: the base with its adapter, cached latents and embeddings, and the roles."""

    settings: Settings
    base: Base
    adapter: lora.Adapter
    latents: torch.Tensor  # (N, C, h, w)
    text: torch.Tensor  # (N, L, D)
    roles: dict[str, list[int]]
    captions: list[str]


def prepare(settings: Settings) -> Run:
    """Load the model and the images, split them, cache latents and text embeddings, inject the adapter."""
    torch.manual_seed(settings.seed)  # attacker initialisation and dropout
    base = load_base(settings.model, settings.device, settings.dtype)
    images = load_images(settings.data, base.size, settings.caption)
    roles = split(images, settings.seed, settings.members, settings.split)
    latents, text = encode_images(base, images.pixels), encode_captions(base, images.captions)
    generator = torch.Generator().manual_seed(settings.seed)
    adapter = lora.inject(base.unet, settings.target, settings.rank, settings.alpha, generator)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "splits.json", {role: [images.names[i] for i in found] for role, found in roles.items()})
    return Run(settings, base, adapter, latents, text, roles, images.captions)


def train(settings: Settings) -> dict:
    """Algorithm 1.  Writes the run folder `settings.out` and returns its summary (also in config.json)."""
    resolve(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    started = time.time()
    run = prepare(settings)
    base, parameters, method = run.base, run.adapter.parameters(), settings.method
    members = sorted(run.roles["member_aux"] + run.roles["member_val"] + run.roles["member_test"])
    steps = settings.steps or -(-settings.epochs * len(members) // settings.batch_size)
    save_every = settings.save_every or max(1, steps // 8)
    write_json(Path(settings.out) / "config.json", config(settings, run, steps))

    # separate streams, so that every method sees the same batches and noise in its outer steps
    outer, inner = (torch.Generator().manual_seed(settings.seed * 2 + k) for k in (1, 2))
    private = Batches(members, settings.batch_size, outer)
    aux = [Batches(run.roles[f"{side}_aux"], settings.batch_size, inner) for side in ("member", "nonmember")]
    attacker = PROXIES[settings.proxy](base.latent_shape).to(base.device).eval()
    attacker_optimizer = torch.optim.Adam(attacker.parameters(), lr=settings.attacker_lr)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr)

    with open(Path(settings.out) / "metrics.jsonl", "w") as log, tqdm.trange(1, steps + 1, desc=method) as bar:
        initial = held_out(run)
        print(json.dumps({"step": 0, **initial}), file=log, flush=True)
        for step in bar:
            tick, row = time.time(), {"step": step}
            if method != "lora":
                # Algorithm 1 (a): the attacker ascends G on D_aux; no gradient through the UNet
                index = torch.cat([a.draw() for a in aux])
                timesteps, noise = draw_noise(base, len(index), inner)
                with torch.no_grad():
                    error = squared_error(base, run.latents[index], run.text[index], timesteps, noise)
                halves = zip(error.chunk(2), timesteps.chunk(2), strict=True)  # members, then non-members
                row["attacker_loss"], row["attacker_accuracy"] = attacker_step(attacker, attacker_optimizer, *halves)

            # Algorithm 1 (b): the adapter descends the objective on members; one forward serves L and G
            index = private.draw()
            timesteps, noise = draw_noise(base, len(index), outer)
            error = squared_error(base, run.latents[index], run.text[index], timesteps, noise)
            terms = objective(method, error, timesteps, attacker, settings.lam, settings.delta)
            if step % settings.norms_every == 0 or step == 1:
                row |= gradient_norms(terms, parameters)
            grads = gradients(terms.total, parameters)
            row["grad_norm"] = clip_(grads, settings.clip)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            row |= {
                "adaptation_loss": terms.loss.item(),
                "mi_gain": None if terms.gain is None else terms.gain.item(),
                "objective": terms.total.item(),
                "denominator": terms.denominator,
                "lambda_effective": terms.lambda_effective,
            }
            if not np.isfinite([row["objective"], row["grad_norm"]]).all():
                raise UserError(
                    f"the objective or its gradient is no longer finite at step {step}: lower --lr or --lam; "
                    f"adapters saved before it are in {settings.out}/checkpoints"
                )
            optimizer.step()
            row["seconds"] = time.time() - tick
            if step % save_every == 0 or step == steps:
                row |= held_out(run)
                save_adapter(run, Path(settings.out) / "checkpoints" / f"step-{step:06d}", step)
            if settings.sample_every and step % settings.sample_every == 0:
                sample_grid(run, f"step-{step:06d}")
            print(json.dumps(row), file=log, flush=step % 50 == 0)
            bar.set_postfix(_postfix(row), refresh=False)
    return finish(run, attacker, steps, initial, started)


def _postfix(row: dict) -> dict[str, str]:
    shown = {"loss": "adaptation_loss", "G": "mi_gain", "grad": "grad_norm", "attacker": "attacker_accuracy"}
    return {k: f"{row[v]:.3f}" for k, v in shown.items() if row.get(v) is not None}


# ---------------------------------------------------------------------------------------------------------------
# What a run measures of itself on validation images, and what it leaves behind


def held_out(run: Run) -> dict[str, float]:
    """Adaptation loss of validation members and non-members on a fixed grid of (t, noise).

    The non-members' is the held-out loss: what early stopping goes by.
    """
    loss = {}
    for side in ("member", "nonmember"):
        index = run.roles[f"{side}_val"]
        grid = attacks.loss_grid(run.base, run.latents[index], run.text[index], attacks.ALL_TIMESTEPS, draws=1)
        loss[f"{side}_val_loss"] = grid.mean().item()
    return loss


def verdict(run: Run) -> tuple[float, tuple[float, float]]:
    """AUC of the loss attack on the validation images, with its interval; the test images are left to evaluate.py."""
    scores = {}
    for side in ("member", "nonmember"):
        index = run.roles[f"{side}_val"]
        scores[side] = -attacks.loss_grid(run.base, run.latents[index], run.text[index]).mean((1, 2)).numpy()
    figures = attacks.figures(scores["member"], scores["nonmember"], seed=run.settings.seed)
    return figures["auc"], figures["auc_interval"]


def sample_grid(run: Run, name: str, columns: int = 8) -> None:
    """Sixteen pictures from fixed captions and noise, the upper row of members' captions, the lower of others'."""
    rng = np.random.default_rng(run.settings.seed)
    index = [i for r in ("member_test", "nonmember_test") for i in rng.choice(run.roles[r], columns)]
    noise = torch.randn(
        (len(index), *run.base.latent_shape), generator=torch.Generator().manual_seed(run.settings.seed)
    )
    images = sample(run.base, run.text[index], encode_captions(run.base, [""]), noise.to(run.base.device))
    plots.image_grid(images, columns, Path(run.settings.out) / "samples" / f"{name}.png")


def save_adapter(run: Run, folder: Path, step: int) -> None:
    """The adapter as of now, with the facts that say where it is from."""
    s = run.settings
    facts = {"base_model": Path(s.model).name, "method": s.method, "lambda": s.lam, "seed": s.seed, "steps": step}
    run.adapter.save(folder, facts | {"git_commit": git_commit()})


def finish(run: Run, attacker: torch.nn.Module, steps: int, initial: dict, started: float) -> dict:
    """Adapter, attacker, samples, curves and the three-line verdict."""
    settings, out = run.settings, Path(run.settings.out)
    save_adapter(run, out / "adapter", steps)
    if settings.method != "lora":
        (out / "attacker").mkdir(exist_ok=True)
        save_file(attacker.state_dict(), out / "attacker" / "attacker.safetensors", {"proxy": settings.proxy})
    sample_grid(run, f"step-{steps:06d}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plots.training_curves(metrics, settings.method, out / "curves.png")
    auc, (low, high) = verdict(run)
    last = next(m for m in reversed(metrics) if "nonmember_val_loss" in m)
    lambdas = [m["lambda_effective"] for m in metrics if "lambda_effective" in m]
    summary = {
        "seconds": round(time.time() - started, 1),
        "held_out_loss": last["nonmember_val_loss"],
        "held_out_loss_base": initial["nonmember_val_loss"],
        "validation_auc": auc,
        "validation_auc_interval": [low, high],
        "lambda_effective_mean": float(np.mean(lambdas)),
    }
    write_json(out / "config.json", json.loads((out / "config.json").read_text()) | {"summary": summary})
    print(f"quality:  held-out loss {last['nonmember_val_loss']:.4f}, {initial['nonmember_val_loss']:.4f} before")
    print(f"leakage:  loss-attack AUC {auc:.2f} [{low:.2f}, {high:.2f}] on validation images; 0.5 is none")
    print(f"files:    {out}/  ({summary['seconds']:.0f} s); next: python evaluate.py {out}")
    return summary


def config(settings: Settings, run: Run, steps: int) -> dict:
    """Settings, versions and machine of a run."""
    return {
        "settings": asdict(settings) | {"steps": steps},
        "roles": {role: len(found) for role, found in run.roles.items()},
        "trainable_parameters": sum(p.numel() for p in run.adapter.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, np)},
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def git_commit() -> str:
    """The commit of this code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, value: dict) -> None:
    """Write aside, then rename: a killed run leaves no torn file."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


if __name__ == "__main__":
    with one_line_errors():
        train(SETTINGS)
