"""What is evaluated: an adapter, and the images it is judged on, as the attacks see them.

A target comes from a run folder of train.py, or from flags for an adapter trained elsewhere.  Of its images only those
with a role are encoded; `roles` are positions among them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import UserError, read_json
from data import PARTS, load_images, split
from diffusion import Base, encode_captions, encode_images, load_base

SIDES = ("member", "nonmember")
SUBSET_SEED = 0  # of the choice of test non-members


@dataclass
class Target:
    """One adapter to evaluate."""

    name: str
    run: Path  # the run folder; what several runs share lies beside it
    folder: Path  # where the results go: the run folder, or one in it
    adapter: Path
    step: int | None
    at: str
    config: dict  # settings: model, data, caption, dtype, method, seed, and for runs the others
    splits: dict[str, list[str]] | None  # file names per role; None: the data folder comes split


def read_run(folder: str, at: str = "last") -> Target:
    """The adapter of a run folder `at` last, best or a saved step; raises UserError."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no config.json (train.py writes one)"
        )
    config, splits = read_json(path / "config.json")["settings"], read_json(path / "splits.json")
    try:
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a complete run: {error}") from None
    adapter, step = adapter_folder(path, at, metrics)
    results = path if at == "last" else path / f"at-{at}"
    return Target(f"{path} @{step}", path, results, adapter, step, at, config, splits)


def adapter_folder(folder: Path, at: str, metrics: list[dict]) -> tuple[Path, int]:
    """(folder of the adapter, its step); raises UserError."""
    saved = {
        m["step"]: m["nonmember_val_loss"]
        for m in metrics
        if m["step"] and "nonmember_val_loss" in m
    }
    if not saved or (at == "last" and not (folder / "adapter").is_dir()):
        raise UserError(f"{folder} has no adapter yet: its training did not finish")
    if at == "last":
        return folder / "adapter", max(saved)
    step = min(saved, key=saved.get) if at == "best" else int(at) if at.isdigit() else -1
    path = folder / "checkpoints" / f"step-{step:06d}"
    if step not in saved or not path.is_dir():
        raise UserError(
            f"{folder} has no adapter of step {at}: take last, best or one of {', '.join(map(str, saved))}"
        )
    return path, step


def read_adapter(
    model: str | None,
    adapter: str | None,
    data: str | None,
    splits: str | None,
    caption: str | None,
    dtype: str,
    out: str | None,
) -> Target:
    """An adapter trained elsewhere, named by flags; raises UserError."""
    for flag, value in (("--model", model), ("--adapter", adapter), ("--data", data)):
        if value is None:
            raise UserError(
                f"name run folders, such as runs/smp, or --model, --adapter and --data: {flag} is missing"
            )
    config = {
        "model": model,
        "data": data,
        "caption": caption,
        "dtype": dtype,
        "method": "adapter",
        "seed": 0,
    }
    roles = read_json(Path(splits)) if splits else None
    folder = Path(out or "runs/evaluation")
    return Target(adapter, folder, folder, Path(adapter), None, "file", config, roles)


@dataclass
class Subject:
    """The images of a target with the base model, encoded once."""

    base: Base
    captions: list[str]
    pixels: np.ndarray  # (N, H, W, 3)
    latents: torch.Tensor  # (N, C, h, w)
    text: torch.Tensor  # (N, L, D)
    roles: dict[str, list[int]]
    held_out: (
        np.ndarray
    )  # (M, H, W, 3): fresh pictures, or the test non-members where there are none
    crops: torch.Tensor  # (2, N, C, h, w): latents of the central 90 % and 80 %
    cuts: torch.Tensor  # (2, N, L, D): embeddings of the first half of the caption, and of none
    names: list[str]  # (N,) file names

    def known(self) -> list[int]:
        """The images that the attacker may choose on: auxiliary and validation."""
        return [
            i for side in SIDES for part in ("aux", "val") for i in self.roles[f"{side}_{part}"]
        ]

    def members(self) -> list[int]:
        """All images that the adapter was trained on."""
        return [i for part in ("aux", "val", "test") for i in self.roles[f"member_{part}"]]

    def pair(self, score: np.ndarray, *parts: str) -> tuple[np.ndarray, np.ndarray]:
        """(member scores, non-member scores) of the given parts of the roles."""
        return tuple(
            np.concatenate([score[self.roles[f"{side}_{p}"]] for p in parts]) for side in SIDES
        )


def prepare(target: Target, device: str = "cpu", nonmembers: int = 0) -> Subject:
    """Load base and images, keep those with a role, `nonmembers` of the test non-members (0: all).

    Raises UserError.
    """
    c = target.config
    base = load_base(c["model"], device, c["dtype"], c.get("size"))
    images = load_images(c["data"], base.size, c["caption"])
    if target.splits is not None:
        position = {name: i for i, name in enumerate(images.names)}
        missing = [n for found in target.splits.values() for n in found if n not in position]
        if missing:
            raise UserError(
                f"{c['data']} no longer holds {missing[0]} ({len(missing)} images of the run are gone)"
            )
        every = {role: [position[n] for n in found] for role, found in target.splits.items()}
    elif images.parts is not None:
        every = split(images, c["seed"], 0)
    else:
        raise UserError(
            f"{c['data']} does not say who is a member: give --splits, or sub-folders {', '.join(PARTS)}"
        )
    roles, chosen = {}, []
    for role in (f"{side}_{part}" for side in SIDES for part in ("aux", "val", "test")):
        if not every.get(role):
            raise UserError(f"the split has no images for the role {role}")
        found = subset(every[role], nonmembers) if role == "nonmember_test" else every[role]
        roles[role] = list(range(len(chosen), len(chosen) + len(found)))
        chosen += found
    fresh = every.get("fresh", [])
    held_out = images.pixels[fresh if len(fresh) > 1 else every["nonmember_test"]]
    pixels, captions = images.pixels[chosen], [images.captions[i] for i in chosen]
    halves = [" ".join(words[: len(words) // 2]) for words in map(str.split, captions)]
    return Subject(
        base,
        captions,
        pixels,
        encode_images(base, pixels),
        encode_captions(base, captions),
        roles,
        held_out,
        torch.stack([encode_images(base, crop(pixels, share)) for share in (0.9, 0.8)]),
        torch.stack([encode_captions(base, cut) for cut in (halves, [""] * len(captions))]),
        [images.names[i] for i in chosen],
    )


def subset(found: list[int], count: int) -> list[int]:
    """`count` of `found` at random, the same for every run (0: all); the first ones by name would be all of a kind."""
    if not 0 < count < len(found):
        return found
    return sorted(np.random.default_rng(SUBSET_SEED).permutation(found)[:count].tolist())


def crop(pixels: np.ndarray, share: float) -> np.ndarray:
    """The central `share` of each side of (N, H, W, 3), enlarged to the full picture."""
    size = pixels.shape[1]
    edge = round(size * (1 - share) / 2)
    x = (
        torch.from_numpy(pixels[:, edge : size - edge, edge : size - edge])
        .permute(0, 3, 1, 2)
        .float()
    )
    x = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
