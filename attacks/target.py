"""What is evaluated: an adapter, and the images it is judged on, as the attacks see them.

A target comes from a run folder of train.py, or from flags for an adapter trained elsewhere.  The
images of a run are found by what they show and say, whatever they are called now.  Only those with
a role are encoded; `roles` are positions among them.  Held by tests/test_evaluate.py and
tests/test_evaluate_faults.py.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from attacks import quality
from attacks.store import Store
from command.errors import UserError, shown
from command.whole_files import read_json
from diffusion import GRID_SEED, Base, Encoded, encode_captions, encode_images
from files.bases import load_base
from files.encode import encode
from files.images import FOLDERS, OUTSIDE, PARTS, SIDES, Images, load_images, split_as_it_comes
from files.lora_files import PEFT_CONFIG
from run.folder import RunFolder
from settings import FREE, LOOKS, Settings

SUBSET_SEED = 0  # of the choice of test non-members
CROPS = np.linspace(0.95, 0.7, 10).tolist()  # shares of a side, as PFAMI's authors have them
CUTS = (0.75, 0.5, 0.25, 0)  # shares of the words of a caption that CLiD keeps
BASE_FILES = (".safetensors", ".json", ".txt")  # weights, configs, and merges of a tokenizer


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
    images: dict[str, str] | None = None  # file name -> hash; None: nothing says what they were


def read_run(folder: str, at: str = "last", **instead: str | None) -> Target:
    """The adapter of a run folder `at` last, best or a saved step; raises UserError.

    `instead` of what the run says: model and data where they lie now, another dtype.
    """
    run = RunFolder(folder)
    config, splits, images = run.config()["settings"], run.splits(), run.images()
    config |= {name: value for name, value in instead.items() if value is not None}
    for name in (name for names in splits.values() for name in names if images is not None):
        if not isinstance(images.get(name), str):
            raise UserError(f"the images.json of {run} is damaged: it has no hash of {shown(name)}")
    adapter, step = run.adapter(at)
    results = run.path if at == "last" else run.path / f"at-{at}"
    return Target(f"{run} @{step}", run.path, results, adapter, step, at, config, splits, images)


def read_adapter(s) -> Target:
    """An adapter trained elsewhere, named by evaluate.py's flags."""
    config = {name: getattr(s, name) for name in ("model", "data", "caption")}
    config |= {"method": "adapter", "seed": 0, "dtype": s.dtype or "float32"}
    splits = read_json(Path(s.splits)) if s.splits else None
    folder = Path(s.out or "runs/evaluation")
    return Target(s.adapter, folder, folder, Path(s.adapter), None, "file", config, splits)


@dataclass(eq=False)
class Subject:
    """The images of a target with the base model, encoded once."""

    base: Base
    data: Encoded
    content: str  # SHA-256 of the pictures and captions of every role, in their order
    # (M, H, W, 3): fresh pictures, or the test non-members where there are none
    held_out: np.ndarray
    positions: list[int]  # (N,) of the encoded images among those of the data folder
    held_out_captions: list[str]  # (M,)
    store: Store | None = None  # of what the images alone decide

    @functools.cached_property
    def crops(self) -> torch.Tensor:
        """(M, N, C, h, w): latents of the central parts of CROPS, enlarged."""

        def encoded() -> np.ndarray:
            every = [encode_images(self.base, crop(self.data.pixels, c)) for c in CROPS]
            return torch.stack(every).cpu().numpy()

        return self.kept("crops", encoded).to(self.base.device)

    def features(self, name: str, network, pixels: np.ndarray) -> torch.Tensor:
        """Features (P, F) of pictures (P, H, W, 3) that are known by `name` among these images."""
        return self.kept(f"real-{name}", lambda: quality.features(network, pixels).numpy())

    def kept(self, name: str, compute: Callable[[], np.ndarray]) -> torch.Tensor:
        """What `compute` returns, which is the same for every model: from the store if there is
        one.
        """
        if self.store is None:
            return torch.from_numpy(compute())
        return torch.from_numpy(self.store.get(name, lambda: {name: compute()})[name])

    @functools.cached_property
    def cuts(self) -> torch.Tensor:
        """(M, N, L, D): embeddings of the captions' beginnings, CUTS of their words."""
        cuts = [[cut(caption, share) for caption in self.data.captions] for share in CUTS]
        return torch.stack([encode_captions(self.base, captions) for captions in cuts])


def prepare(target: Target, device: str = "cpu", nonmembers: int = 0) -> Subject:
    """Load base and images, keep those with a role, `nonmembers` of the test non-members (0: all).

    Raises UserError.
    """
    c = target.config
    base = load_base(c["model"], device, c["dtype"], c.get("size"))
    images = load_images(c["data"], base.size, c["caption"], c.get("nonmembers"))
    every = dealt(target, images)
    roles, chosen = {}, []
    for role in (f"{side}_{part}" for side in SIDES for part in PARTS):
        index = subset(every[role], nonmembers) if role == "nonmember_test" else every[role]
        roles[role] = list(range(len(chosen), len(chosen) + len(index)))
        chosen += index
    fresh = every.get("fresh", [])
    held_out = fresh if len(fresh) > 1 else every["nonmember_test"]
    names, captions = ([given[i] for i in chosen] for given in (images.names, images.captions))
    data = encode(base, Images(names, captions, images.pixels[chosen]), roles)
    hashes = images.hashes()
    content = json.dumps({role: [hashes[i] for i in index] for role, index in every.items()})
    digest = hashlib.sha256(content.encode()).hexdigest()
    said = [images.captions[i] for i in held_out]
    return Subject(base, data, digest, images.pixels[held_out], chosen, said)


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
        return split_as_it_comes(images, target.config["seed"])
    position = {name: i for i, name in enumerate(images.names)}
    now = position if target.images is None else by_content(target.images, images)
    missing = [name for names in target.splits.values() for name in names if name not in now]
    if missing:
        name, count = shown(missing[0]), f"{len(missing)} images of {target.name}"
        beside = missing[0].startswith(OUTSIDE) and target.config.get("nonmembers")
        flag = "--nonmembers" if beside else "--data"
        source = beside or source
        if missing[0] in position:
            raise UserError(
                f"the pixels or the caption of {name} in {shown(source)} are not those that "
                f"{target.run} was trained on ({count} are not found): put them back, or name the "
                f"folder that holds them with {flag}"
            )
        raise UserError(
            f"{shown(source)} no longer holds {name} ({count} are gone): put them back, or name "
            f"the folder that holds them with {flag}"
        )
    return {role: [now[name] for name in names] for role, names in target.splits.items()}


def by_content(known: dict[str, str], images: Images) -> dict[str, int]:
    """Positions among `images` of those in `known` {former name: hash}, as far as they are there.

    Of copies it is the one that kept its name, else the first.
    """
    hashes = images.hashes()
    named = dict(zip(images.names, hashes, strict=True))
    first = {digest: i for i, digest in reversed(list(enumerate(hashes)))}
    position = {name: i for i, name in enumerate(images.names)}
    return {
        name: position[name] if named.get(name) == digest else first[digest]
        for name, digest in known.items()
        if digest in first
    }


def subset(positions: list[int], count: int) -> list[int]:
    """`count` of `positions` at random in their order, the same for every run (0: all).

    The first ones by name would be all of a kind.
    """
    if not 0 < count < len(positions):
        return positions
    rng = np.random.default_rng(SUBSET_SEED)
    return [positions[i] for i in sorted(rng.permutation(len(positions))[:count])]


def crop(pixels: np.ndarray, share: float) -> np.ndarray:
    """The central `share` of each side of (N, H, W, 3), enlarged to the full picture; its edges may
    lie between pixels.
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    where = torch.tensor([[share, 0, 0], [0, share, 0]]).expand(len(x), 2, 3)
    grid = torch.nn.functional.affine_grid(where, x.shape, align_corners=False)
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def cut(caption: str, share: float) -> str:
    """The first `share` of the words of a caption, rounded up, but never all of several."""
    words = caption.split()
    return " ".join(words[: min(math.ceil(share * len(words)), max(len(words) - 1, 0))])


# --------------------------------------------------------------------------------------------------
# Which targets belong together, and what kept scores depend on


def sources(target: Target) -> str:
    """Where images and base of a target come from: targets that agree share an examination."""
    names = ("model", "data", "nonmembers", "caption", "dtype", "seed", "size")
    return json.dumps([[target.config.get(k) for k in names], target.splits, target.images])


def fingerprint(target: Target, subject: Subject, s) -> str:
    """What the scores and the pictures of the base model depend on, by content and not by name,
    beside the number and steps of the pictures.
    """
    choices = {"nonmembers": s.test_nonmembers, "guidance": s.guidance, "features": s.features}
    seeds = [GRID_SEED, SUBSET_SEED, target.config["seed"]]
    base = [base_stamp(target.config["model"]), target.config["dtype"]]
    return json.dumps([seeds, base, subject.content, choices])


def kind(target: Target) -> str:
    """All that was decided about an adapter but its seed; what is only looked at on the way decides
    nothing, nor does a flag that a run does not know, at the value it has left out.
    """
    flags = {f.name: f.default for f in fields(Settings)}
    retired = {name: neutral for name, (_, neutral, *_) in Settings.RETIRED.items()}
    looks = [name for name, neutral in retired.items() if neutral is ...]
    chosen = flags | retired | target.config
    for name in ("seed", *FREE, *LOOKS, *looks):
        chosen.pop(name, None)
    best = target.at == "best" or (target.at == "last" and chosen["stop"] == "best")
    return json.dumps([chosen, "best" if best else target.step], sort_keys=True)


def base_stamp(model: str) -> list:
    """Names, sizes and times of the files of a base; of one from the hub its name.

    Hashes of gigabytes would take longer than some attacks.
    """
    path = Path(model)
    if path.is_file():
        files = [path, *sorted(path.with_suffix("").rglob("*"))]  # with its configs beside it
    else:
        files = sorted(path.rglob("*"))
    stats = [(f.name, f.stat()) for f in files if f.suffix in BASE_FILES and f.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats] or [model]


def adapter_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's files: of a folder all that may say something about it."""
    if adapter.is_dir():
        files = [f for f in sorted(adapter.iterdir()) if f.suffix in (".safetensors", ".json")]
    else:
        files = [adapter, adapter.with_name(PEFT_CONFIG)]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
