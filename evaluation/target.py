"""What is evaluated: an adapter, and the images it is judged on, as the attacks see them.

A target comes from a run folder of train.py, or from flags for an adapter trained elsewhere.  Of
its images only those with a role are encoded; `roles` are positions among them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from base_files import load_base
from cli import UserError, read_json
from data import FOLDERS, PARTS, SIDES, Images, load_images, split
from diffusion import Base, Encoded, encode, encode_captions, encode_images
from training.run_folder import RunFolder

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
    run = RunFolder(folder)
    config, splits = run.config()["settings"], run.splits()
    adapter, step = run.adapter(at)
    results = run.path if at == "last" else run.path / f"at-{at}"
    return Target(f"{run} @{step}", run.path, results, adapter, step, at, config, splits)


def read_adapter(s) -> Target:
    """An adapter trained elsewhere, named by evaluate.py's flags; raises UserError."""
    for flag in ("model", "adapter", "data"):
        if getattr(s, flag) is None:
            raise UserError(
                "name run folders, such as runs/smp, or --model, --adapter and --data: "
                f"--{flag} is missing"
            )
    config = {name: getattr(s, name) for name in ("model", "data", "caption", "dtype")}
    config |= {"method": "adapter", "seed": 0}
    splits = read_json(Path(s.splits)) if s.splits else None
    folder = Path(s.out or "runs/evaluation")
    return Target(s.adapter, folder, folder, Path(s.adapter), None, "file", config, splits)


@dataclass
class Subject:
    """The images of a target with the base model, encoded once."""

    base: Base
    data: Encoded
    held_out: (
        np.ndarray
    )  # (M, H, W, 3): fresh pictures, or the test non-members where there are none
    crops: torch.Tensor  # (2, N, C, h, w): latents of the central 90 % and 80 %
    cuts: torch.Tensor  # (2, N, L, D): embeddings of the first half of the caption, and of none


def prepare(target: Target, device: str = "cpu", nonmembers: int = 0) -> Subject:
    """Load base and images, keep those with a role, `nonmembers` of the test non-members (0: all).

    Raises UserError.
    """
    c = target.config
    base = load_base(c["model"], device, c["dtype"], c.get("size"))
    images = load_images(c["data"], base.size, c["caption"])
    every = dealt(target, images)
    roles, chosen = {}, []
    for role in (f"{side}_{part}" for side in SIDES for part in PARTS):
        if not every.get(role):
            raise UserError(f"the split has no images for the role {role}")
        index = subset(every[role], nonmembers) if role == "nonmember_test" else every[role]
        roles[role] = list(range(len(chosen), len(chosen) + len(index)))
        chosen += index
    fresh = every.get("fresh", [])
    held_out = images.pixels[fresh if len(fresh) > 1 else every["nonmember_test"]]
    names, captions = ([given[i] for i in chosen] for given in (images.names, images.captions))
    data = encode(base, Images(names, captions, images.pixels[chosen]), roles)
    halves = [" ".join(words[: len(words) // 2]) for words in map(str.split, captions)]
    crops = [encode_images(base, crop(data.pixels, share)) for share in (0.9, 0.8)]
    cuts = [encode_captions(base, cut) for cut in (halves, [""] * len(captions))]
    return Subject(base, data, held_out, torch.stack(crops), torch.stack(cuts))


def dealt(target: Target, images: Images) -> dict[str, list[int]]:
    """Positions per role among `images`, as the run dealt them or as the folder comes split.

    Raises UserError.
    """
    source = target.config["data"]
    if target.splits is None and images.folders is None:
        raise UserError(
            f"{source} does not say who is a member: give --splits, or sub-folders "
            f"{', '.join(FOLDERS)}"
        )
    if target.splits is None:
        return split(images, target.config["seed"], 0)
    roles = target.splits
    if not isinstance(roles, dict) or not all(isinstance(names, list) for names in roles.values()):
        raise UserError("the splits are not an object of role -> list of file names")
    every = [name for names in roles.values() for name in names]
    twice = sorted({name for name in every if every.count(name) > 1}, key=str)
    if twice:
        raise UserError(f"the splits name {twice[0]} twice: an image has one role")
    position = {name: i for i, name in enumerate(images.names)}
    missing = [name for name in every if name not in position]
    if missing:
        raise UserError(
            f"{source} no longer holds {missing[0]} ({len(missing)} images of the run are gone)"
        )
    return {role: [position[name] for name in names] for role, names in roles.items()}


def subset(positions: list[int], count: int) -> list[int]:
    """`count` of `positions` at random, the same for every run (0: all).

    The first ones by name would be all of a kind.
    """
    if not 0 < count < len(positions):
        return positions
    rng = np.random.default_rng(SUBSET_SEED)
    return sorted(rng.permutation(positions)[:count].tolist())


def crop(pixels: np.ndarray, share: float) -> np.ndarray:
    """The central `share` of each side of (N, H, W, 3), enlarged to the full picture."""
    size = pixels.shape[1]
    edge = round(size * (1 - share) / 2)
    inner = pixels[:, edge : size - edge, edge : size - edge]
    x = torch.from_numpy(inner).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
