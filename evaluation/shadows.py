"""The adaptive adversary: it trains adapters of its own, as the run was trained, and asks how the
run differs from them.

    python evaluate.py runs/smp --shadow 8      # eight shadows, kept in runs/shadows-<hash>

LiRA offline (Carlini et al. 2022, Algorithm 1 with the out-models alone): for an image x and a
statistic phi,

    score(x) = (phi(run, x) - mean over out-shadows of phi(shadow, x)) / sd

An out-shadow has the run's settings and another seed, so another random split of the same images,
and did not train on x: an image that is easy for every adapter of this kind no longer passes for a
member.  `sd` is pooled over images, as the paper advises for few shadows.  Noise, timesteps and
captions are those of the run's own queries.  Held by tests/test_shadow.py to the formula and to a
planted case that the raw score does not see.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

import lora
import lora_files
from cli import UserError, checked
from data import PARTS, load_images, split
from diffusion import Encoded, loss_grid
from evaluation import attacks
from evaluation.queries import Store, choose
from evaluation.target import Subject, Target, adapter_digest, base_stamp
from settings import FREE, Settings
from training.run_folder import RunFolder

FIRST_SEED = 1001  # of the shadows; the run's own is left out
LEAST = 2  # out-shadows that every image needs


def calibrated(run: np.ndarray, shadows: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(phi(run) - mean_out phi) / sd: run (N, C), shadows (S, N, C), out (S, N) -> (N, C).

    sd (C,) is the root of the out-shadows' variance about each image's own mean, pooled over
    images.
    """
    keep, count = out[:, :, None], out.sum(0)[:, None]  # (S, N, 1), (N, 1)
    mean = np.where(keep, shadows, 0).sum(0) / count
    variance = np.where(keep, (shadows - mean) ** 2, 0).sum((0, 1)) / (count - 1).sum()
    return (run - mean) / np.sqrt(variance).clip(1e-12)


def statistics(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """phi of the two attacks, (N, C) each: minus the mean log loss over the grid, and SimA at every
    candidate t.
    """
    return {"LiRA-loss": -np.log(raw["losses"]).mean((1, 2))[:, None], "LiRA-SimA": raw["SimA"]}


def plan(target: Target, subject: Subject, count: int) -> tuple[list[Settings], np.ndarray]:
    """Settings of `count` shadows of a run, and out (S, N): which images (by name) each does not
    train on.

    Raises UserError, before anything is trained, for what has no shadows.
    """
    s = as_trained(target)
    images = load_images(s.data, subject.base.size, s.caption)
    if images.folders is not None:
        raise UserError(
            f"--shadow needs a random split: {s.data} comes split, "
            "so all shadows would share its members"
        )
    free = {"seed", *FREE}
    matters = [{k: v for k, v in asdict(s).items() if k not in free}, base_stamp(s.model)]
    matters += [images.names, images.hashes()]
    digest = hashlib.sha256(json.dumps(matters).encode()).hexdigest()[:8]
    shadows, out = [], []
    for seed in [k for k in range(FIRST_SEED, FIRST_SEED + count + 1) if k != s.seed][:count]:
        roles = split(images, seed, s.members, s.split)
        members = {images.names[i] for part in PARTS for i in roles[f"member_{part}"]}
        folder = target.run.parent / f"shadows-{digest}" / f"seed-{seed}"
        shadows.append(replace(s, seed=seed, out=str(folder)))
        out.append([name not in members for name in subject.data.names])
    bare = (np.array(out).sum(0) < LEAST).sum()
    if bare:
        raise UserError(
            f"--shadow {count} leaves {bare} images with fewer than {LEAST} shadows without them: "
            "take more"
        )
    return shadows, np.array(out)


def as_trained(target: Target) -> Settings:
    """The settings of a run up to the target's step, without what was only looked at on the way;
    model and images from where they lie now.
    """
    config = RunFolder(target.run).config()
    s = Settings(**checked(Settings, config["settings"], target.run / "config.json"))
    s = replace(s, model=target.config["model"], data=target.config["data"])
    whole = s.accumulate * config.get("processes", 1)  # the same whole batch in one process
    s = replace(s, steps=target.step, accumulate=whole, save_every=target.step)
    s = replace(s, samples=0, sample_every=None, hessian_every=0, norms_every=10**9)
    return replace(s, track=None, format="diffusers", dry_run=False, resume=True)


def query(
    subject: Subject,
    train: Callable[[Settings], object],
    shadows: list[Settings],
    key: str,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Ask every shadow what the run was asked: {attack: (S, N, C)}.  `train` makes those that are
    not there yet.
    """
    base, data, answers = subject.base, subject.data, []
    for s in shadows:
        folder = RunFolder(s.out)
        train(replace(s, device=device, threads=torch.get_num_threads()))
        path, _ = folder.adapter()
        adapter, _ = lora_files.load(base.unet, path)
        adapter.merge()

        def ask():
            losses = loss_grid(base, data.latents, data.text).numpy()
            return {"losses": losses, "SimA": attacks.sima(base, data.latents, data.text)}

        store = Store(folder.path / "scores", json.dumps([key, adapter_digest(path)]))
        answers.append(statistics(store.get("shadow", ask)))
        lora.remove(base.unet, adapter)
    return {name: np.stack([answer[name] for answer in answers]) for name in answers[0]}


def scores(
    data: Encoded, raw: dict[str, np.ndarray], shadows: dict[str, np.ndarray], out: np.ndarray
) -> dict[str, np.ndarray]:
    """The calibrated attacks on the model that answered `raw`: {attack: (N,)}.

    Columns are chosen on known images.
    """
    return {
        name: choose(data, calibrated(phi, shadows[name], out))
        for name, phi in statistics(raw).items()
    }
