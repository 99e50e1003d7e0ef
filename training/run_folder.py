"""What one run works on, what it measures of itself, and the folder it leaves behind.

config.json      settings, versions, commit, time; the summary once it is finished
splits.json      file names per role
metrics.jsonl    one object per step; row 0 is the base model
checkpoints/     adapters on the way, each with its held-out loss in metrics.jsonl
state/           training state for --resume, gone when the run is finished (state.py)
adapter/         the result, as diffusers reads it; attacker/, samples/, curves.png
"""

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save as serialize

import lora
import plots
import roc
from cli import UserError, write_json, write_whole
from diffusion import Base, encode_captions, sample
from evaluation import attacks
from training import state
from training.processes import Processes


@dataclass
class Run:
    """What one run works on: the base with its adapter, cached latents and embeddings, and the roles."""

    settings: Any  # train.Settings
    base: Base
    adapter: lora.Adapter
    latents: torch.Tensor  # (N, C, h, w)
    text: torch.Tensor  # (N, L, D)
    roles: dict[str, list[int]]
    names: list[str]  # (N,) file names
    captions: list[str]
    processes: Processes
    steps: int = 0  # of the whole run

    @property
    def out(self) -> Path:
        """The run folder."""
        return Path(self.settings.out)

    @property
    def batch(self) -> int:
        """Members per step, over all forwards and processes."""
        return self.settings.batch_size * self.settings.accumulate * self.processes.count

    @property
    def members(self) -> list[int]:
        """Indices of the images that the adapter trains on."""
        return sorted(
            self.roles["member_aux"] + self.roles["member_val"] + self.roles["member_test"]
        )


# ---------------------------------------------------------------------------------------------------------------
# What a run measures of itself on validation images


def held_out(run: Run) -> dict[str, float]:
    """Adaptation loss of validation members and non-members on a fixed grid of (t, noise).

    The non-members' is the held-out loss: what early stopping goes by.
    """
    loss = {}
    for side in ("member", "nonmember"):
        index = run.roles[f"{side}_val"]
        grid = attacks.loss_grid(
            run.base, run.latents[index], run.text[index], attacks.ALL_TIMESTEPS, draws=1
        )
        loss[f"{side}_val_loss"] = grid.mean().item()
    return loss


def verdict(run: Run) -> tuple[float, tuple[float, float]]:
    """AUC of the loss attack and its 95 % interval on all images but the test ones, which are left to evaluate.py."""
    scores = {}
    for side in ("member", "nonmember"):
        index = run.roles[f"{side}_aux"] + run.roles[f"{side}_val"]
        scores[side] = (
            -attacks.loss_grid(run.base, run.latents[index], run.text[index]).mean((1, 2)).numpy()
        )
    bootstrap = roc.Bootstrap(
        len(scores["member"]), len(scores["nonmember"]), seed=run.settings.seed
    )
    pair = scores["member"], scores["nonmember"]
    return roc.auc(*pair), tuple(bootstrap.interval(bootstrap.auc(*pair)))


def sample_grid(run: Run, name: str) -> None:
    """Pictures from fixed captions and noise, the upper row of members' captions, the lower of others'."""
    columns = run.settings.samples
    if not columns:
        return
    rng = np.random.default_rng(run.settings.seed)
    index = [
        i for r in ("member_test", "nonmember_test") for i in rng.choice(run.roles[r], columns)
    ]
    noise = torch.randn(
        (len(index), *run.base.latent_shape),
        generator=torch.Generator().manual_seed(run.settings.seed),
    )
    images = sample(
        run.base, run.text[index], encode_captions(run.base, [""]), noise.to(run.base.device)
    )
    plots.image_grid(images, columns, run.out / "samples" / f"{name}.png")


# ---------------------------------------------------------------------------------------------------------------
# Files


def begin(run: Run) -> None:
    """Make the run folder: splits.json, then config.json, whose presence says that the folder is taken."""
    run.out.mkdir(parents=True, exist_ok=True)
    state.clear(run.out / "state")
    write_json(run.out / "splits.json", role_names(run))
    config = {
        "settings": asdict(run.settings) | {"steps": run.steps, "resume": False},
        "processes": run.processes.count,
        "roles": {role: len(found) for role, found in run.roles.items()},
        "trainable_parameters": sum(p.numel() for p in run.adapter.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, np)},
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(run.out / "config.json", config)
    with open(run.out / "metrics.jsonl", "w") as log:
        print(json.dumps({"step": 0, **held_out(run)}), file=log)


def role_names(run: Run) -> dict[str, list[str]]:
    """File names per role, the content of splits.json."""
    return {role: [run.names[i] for i in found] for role, found in run.roles.items()}


def check_images(run: Run) -> None:
    """Before going on: the images must be dealt as they were; raises UserError."""
    was = json.loads((run.out / "splits.json").read_text())
    if was != role_names(run):
        raise UserError(
            f"{run.settings.data} no longer holds the images that {run.out} was begun with: put them back"
        )


def cut_metrics(out: Path, step: int) -> None:
    """Cut the rows after `step` off metrics.jsonl, and one torn by a kill; raises UserError if any before is missing."""
    path, rows = out / "metrics.jsonl", []
    for line in path.read_text().splitlines(keepends=True)[: step + 1]:
        try:
            rows.append(json.loads(line)["step"])
        except json.JSONDecodeError:
            break
    if rows != list(range(step + 1)):
        raise UserError(
            f"{path} does not hold every step up to {step}: it cannot be continued, take another --out"
        )
    write_whole(path, "".join(path.read_text().splitlines(keepends=True)[: step + 1]))


class MetricsLog:
    """`log(row)` appends to metrics.jsonl and to the dashboard asked for; only the main process writes."""

    def __init__(self, run: Run):
        self.file, self.tracker, self.flushed = None, None, time.monotonic()
        if run.processes.main:
            self.file = open(run.out / "metrics.jsonl", "a")  # noqa: SIM115 (closed by __exit__)
        if run.settings.track and run.processes.main:
            self.tracker = tracker(run)

    def __call__(self, row: dict) -> None:
        if self.file:
            flush = time.monotonic() - self.flushed > 5
            self.flushed = time.monotonic() if flush else self.flushed
            print(json.dumps(row), file=self.file, flush=flush)
        if self.tracker:
            self.tracker.log(
                {k: v for k, v in row.items() if v is not None and k != "step"}, step=row["step"]
            )

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()
        if self.tracker:
            self.tracker.finish()


def tracker(run: Run):
    """accelerate's TensorBoard tracker, writing to <run folder>/tensorboard; raises UserError without the package."""
    try:
        import accelerate
        from accelerate.tracking import TensorBoardTracker

        accelerate.PartialState()
        found = TensorBoardTracker(run_name="tensorboard", logging_dir=run.out)
        getattr(found, "start", lambda: None)()  # what older versions of accelerate do at once
        return found
    except ImportError:
        raise UserError(
            "--track tensorboard needs a package that is missing: pip install tensorboard"
        ) from None


def save_adapter(run: Run, folder: Path, step: int, kohya: bool = False) -> None:
    """The adapter as of now, with the facts that say where it is from."""
    s = run.settings
    facts = {
        "base_model": Path(s.model).name,
        "method": s.method,
        "lambda": s.lam,
        "seed": s.seed,
        "steps": step,
    }
    run.adapter.save(folder, facts | {"git_commit": git_commit()}, kohya)


def finish(run: Run, attacker: torch.nn.Module, seconds: float) -> dict:
    """Adapter, attacker, samples, curves and the three-line verdict; returns the summary, also in config.json."""
    settings, out, steps = run.settings, run.out, run.steps
    save_adapter(run, out / "adapter", steps)
    if settings.format == "kohya":
        save_adapter(run, out / "kohya", steps, kohya=True)
    if settings.method != "lora":
        (out / "attacker").mkdir(exist_ok=True)
        tensors = {name: t.cpu().contiguous() for name, t in attacker.state_dict().items()}
        write_whole(
            out / "attacker" / "attacker.safetensors", serialize(tensors, {"proxy": settings.proxy})
        )
    sample_grid(run, f"step-{steps:06d}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    plots.training_curves(metrics, settings.method, out / "curves.png")
    auc, (low, high) = verdict(run)
    initial, last = metrics[0], next(m for m in reversed(metrics) if "nonmember_val_loss" in m)
    lambdas = [m["lambda_effective"] for m in metrics if "lambda_effective" in m]
    summary = {
        "seconds": round(seconds, 1),
        "held_out_loss": last["nonmember_val_loss"],
        "held_out_loss_base": initial["nonmember_val_loss"],
        "validation_auc": auc,
        "validation_auc_interval": [low, high],
        "lambda_effective_mean": float(np.mean(lambdas)),
    }
    write_json(
        out / "config.json", json.loads((out / "config.json").read_text()) | {"summary": summary}
    )
    state.clear(out / "state")
    print(
        f"quality:  held-out loss {last['nonmember_val_loss']:.4f}, {initial['nonmember_val_loss']:.4f} before"
    )
    print(
        f"leakage:  loss-attack AUC {auc:.2f} [{low:.2f}, {high:.2f}] on auxiliary and validation images; 0.5 is none"
    )
    print(f"files:    {out}/  ({summary['seconds']:.0f} s); next: python evaluate.py {out}")
    return summary


def git_commit() -> str:
    """The commit of this code, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
