"""The adaptive adversary: it trains adapters of its own, as the run was trained, and asks how the run differs from them.

    python evaluate.py runs/smp --shadow 8      # eight shadows, kept in runs/shadows-<hash>, then evaluated as ever

LiRA offline (Carlini et al. 2022, Algorithm 1 with the out-models alone): for an image x and a statistic phi,

    score(x) = (phi(run, x) - mean over out-shadows of phi(shadow, x)) / sd

An out-shadow has the run's settings and another seed, so another random split of the same images, and did not train on
x: an image that is easy for every adapter of this kind no longer passes for a member.  `sd` is pooled over images, as
the paper advises for few shadows.  Noise, timesteps and captions are those of the run's own queries.
Held by tests/test_shadow.py to the formula and to a planted case that the raw score does not see.
"""

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch

import lora
import settings
import train
from cli import UserError, read_json
from data import load_images, split
from evaluation import attacks
from evaluation.queries import Store, choose
from evaluation.target import Subject, Target

FIRST_SEED = 1001  # of the shadows; the run's own is left out
LEAST = 2  # out-shadows that every image needs


def calibrated(run: np.ndarray, shadows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(phi(run) - mean_out phi) / sd: run (N, C), shadows (S, N, C), out (S, N) -> (N, C).

    sd (C,) is the root of the out-shadows' variance about each image's own mean, pooled over images.
    """
    keep, count = out[:, :, None], out.sum(0)[:, None]  # (S, N, 1), (N, 1)
    mean = np.where(keep, shadows, 0).sum(0) / count
    variance = np.where(keep, (shadows - mean) ** 2, 0).sum((0, 1)) / (count - 1).sum()
    return (run - mean) / np.sqrt(variance).clip(1e-12)


def statistics(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """phi of the two attacks, (N, C) each: minus the mean log loss over the grid, and SimA at every candidate t."""
    return {"LiRA-loss": -np.log(raw["losses"]).mean((1, 2))[:, None], "LiRA-SimA": raw["SimA"]}


def plan(
    target: Target, names: list[str], size: int, count: int
) -> tuple[list[settings.Settings], np.ndarray]:
    """Settings of `count` shadows of a run, and out (S, N): which images (by name) each does not train on.

    Raises UserError, before anything is trained, for what has no shadows.
    """
    if count < 1:
        raise UserError(f"--shadow must be 0 or more, not {count}")
    path = target.run / "config.json"
    if target.splits is None or target.step is None or not path.is_file():
        raise UserError(
            f"--shadow needs a run of train.py: nothing says how {target.name} was trained"
        )
    config = read_json(path)
    known = {
        f.name: config["settings"][f.name]
        for f in fields(settings.Settings)
        if f.name in config["settings"]
    }
    s = settings.Settings(**known)
    s = replace(
        s, steps=target.step, accumulate=s.accumulate * config.get("processes", 1)
    )  # the same whole batch
    s = replace(s, save_every=s.steps, samples=0, sample_every=None, hessian_every=0, resume=True)
    s = replace(s, norms_every=10**9, track=None, format="diffusers", dry_run=False)
    images = load_images(s.data, size, s.caption)
    if images.parts is not None:
        raise UserError(
            f"--shadow needs a random split: {s.data} comes split, so all shadows would share its members"
        )
    free = {"seed", *settings.FREE}
    matters = [{k: v for k, v in asdict(s).items() if k not in free}, images.names]
    home = (
        target.run.parent
        / f"shadows-{hashlib.sha256(json.dumps(matters).encode()).hexdigest()[:8]}"
    )
    shadows, out = [], []
    for seed in [k for k in range(FIRST_SEED, FIRST_SEED + count + 1) if k != s.seed][:count]:
        roles = split(images, seed, s.members, s.split)
        members = {
            images.names[i] for r, found in roles.items() if r.startswith("member_") for i in found
        }
        shadows.append(replace(s, seed=seed, out=str(home / f"seed-{seed}")))
        out.append([name not in members for name in names])
    bare = (np.array(out).sum(0) < LEAST).sum()
    if bare:
        raise UserError(
            f"--shadow {count} leaves {bare} images with fewer than {LEAST} shadows without them: take more"
        )
    return shadows, np.array(out)


def query(
    subject: Subject,
    shadows: list[settings.Settings],
    out: np.ndarray,
    key: str,
    device: str = "cpu",
):
    """Train what `plan` names and is not there yet, and ask each what the run was asked: ({attack: (S, N, C)}, out)."""
    base, found = subject.base, []
    for s in shadows:
        folder = Path(s.out)
        train.train(replace(s, device=device, threads=torch.get_num_threads()))
        adapter, _ = lora.load(base.unet, folder / "adapter")
        adapter.merge()

        def ask():
            losses = attacks.loss_grid(base, subject.latents, subject.text).numpy()
            return {"losses": losses, "SimA": attacks.sima(base, subject.latents, subject.text)}

        started = read_json(folder / "config.json")["started"]
        found.append(
            statistics(Store(folder / "scores", json.dumps([key, started])).get("shadow", ask))
        )
        lora.remove(base.unet, adapter)
    return {name: np.stack([f[name] for f in found]) for name in found[0]}, out


def scores(
    subject: Subject, raw: dict[str, np.ndarray], shadows: dict[str, np.ndarray], out: np.ndarray
) -> dict:
    """The calibrated attacks on the model that answered `raw`: {attack: (N,)}, columns chosen on known images."""
    return {
        n: choose(subject, calibrated(phi, shadows[n], out)) for n, phi in statistics(raw).items()
    }
