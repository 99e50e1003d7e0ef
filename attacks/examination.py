"""The images that a target is judged on, as the base model sees them.

    examination = prepare(target, "cpu", nonmembers=200)    # base and images, encoded once
    examination = examine(target, s, network)               # the same with a store and features

Only images with a role are encoded; `roles` are positions among them.  The images of a run are
found by what they show and say, whatever they are called now.  Held by tests/test_evaluate.py and
tests/test_evaluate_faults.py.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torchvision.transforms.functional import InterpolationMode, affine

from attacks import quality
from attacks.store import Store
from attacks.target import Target, sources
from command import progress
from command.errors import UserError, shown
from diffusion import GRID_SEED, Base, Encoded, encode_images
from files.bases import content, load_base
from files.encode import encode
from files.images import FOLDERS, OUTSIDE, PARTS, SIDES, Images, load_images, split_as_it_comes
from files.roles import say, split
from run.identity import digest_of

SUBSET_SEED = 0  # of the choice of test non-members
CROPS = np.linspace(0.95, 0.7, 10).tolist()  # shares of a side, as PFAMI's authors have them
CUTS = (0.75, 0.5, 0.25, 0)  # shares of the words of a caption that CLiD keeps


@dataclass(eq=False)
class Examination:
    """The images of one or several targets, and what they alone decide."""

    base: Base
    data: Encoded
    seed: int
    sources: str  # targets of the same sources share an examination
    # SHA-256 of the base's files, and of the pictures and captions of every role, in their order
    content: tuple[str | None, str]
    positions: list[int]  # (N,) of the encoded images among those of the data folder
    # (M, H, W, 3): fresh pictures, or the test non-members where there are none
    held_out: np.ndarray
    held_out_captions: list[str]  # (M,)
    network: torch.nn.Module | None = None  # of the pictures' features
    store: Store | None = None  # beside the runs: the base's answers, and what `kept` computes
    real: dict[str, torch.Tensor] = field(default_factory=dict)  # features to compare with
    control: object = None  # model.Model of the base, once it is measured

    def crops(self) -> torch.Tensor:
        """(M, N, C, h, w): latents of the central parts of CROPS, enlarged."""

        def ask() -> np.ndarray:
            shares = progress.over(CROPS, "encoding crops")
            every = [encode_images(self.base, crop(self.data.pixels, c)) for c in shares]
            return torch.stack(every).cpu().numpy()

        return self.keep("crop-latents", ask).to(self.base.device)

    def features(self, name: str, pixels: np.ndarray) -> torch.Tensor:
        """Features (P, F) of pictures (P, H, W, 3) that are known by `name` among these images."""
        return self.keep(f"real-{name}", lambda: quality.features(self.network, pixels).numpy())

    def keep(self, name: str, ask: Callable[[], np.ndarray]) -> torch.Tensor:
        """What `ask` returns for every model alike, from the store if it is there."""
        return torch.from_numpy(self.store.get(name, lambda: {name: ask()})[name])


def prepare(target: Target, device: str = "cpu", nonmembers: int = 0) -> Examination:
    """Load base and images, keep those with a role, `nonmembers` of the test non-members (0: all).

    Raises UserError.
    """
    c = target.config
    base = load_base(c["model"], device, c["dtype"], c.get("size"))
    if (now := content(base)) != target.identity.get("model", now):
        raise UserError(
            f"the base model {shown(c['model'])} is not the one that {target.run} was trained on: "
            "put it back, or give its path with --model"
        )
    images = load_images(c["data"], base.size, c["caption"], c.get("nonmembers"))
    every = dealt(target, images)
    roles, chosen = {}, []
    for role in (f"{side}_{part}" for side in SIDES for part in PARTS):
        index = subset(every[role], nonmembers) if role == "nonmember_test" else every[role]
        roles[role] = list(range(len(chosen), len(chosen) + len(index)))
        chosen += index
    data = encode(base, images.take(chosen), roles)
    hashes = images.hashes()
    digest = digest_of({role: [hashes[i] for i in index] for role, index in every.items()})
    fresh = every.get("fresh", [])
    held_out = fresh if len(fresh) > 1 else every["nonmember_test"]
    pictures, said = images.pixels[held_out], [images.captions[i] for i in held_out]
    held = now, digest
    return Examination(base, data, c["seed"], sources(target), held, chosen, pictures, said)


def examine(target: Target, s, network, asked: list) -> Examination:
    """The images of a target, ready for attacks; `s` are the settings of evaluate.py, `asked` what
    the models' answers depend on beside them.
    """
    e = prepare(target, s.device, s.test_nonmembers)
    if s.pictures and len(e.held_out) < 2:
        raise UserError("one held-out image is too few for the Frechet distance: --pictures 0")
    key = json.dumps([fingerprint(target, [*e.content], s), asked])
    # beside the runs, so that every run over the same images finds what is in it
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    e.network, e.store = network, Store(target.run.parent / f"control-{digest}", key)
    if s.pictures:  # the members, as in the paper, and held-out ones
        e.real["members"] = e.features("members", e.data.pixels[e.data.members()])
        e.real["held_out"] = e.features("held_out", e.held_out)
    return e


def fingerprint(target: Target, held: list[str], s) -> str:
    """What the scores and the pictures of the base model depend on, beside the number and steps of
    the pictures; `held` are the hashes of the base and of the images.
    """
    choices = {"nonmembers": s.test_nonmembers, "features": s.features}
    seeds = [GRID_SEED, SUBSET_SEED, target.config["seed"]]
    return json.dumps([seeds, target.config["dtype"], held, choices])


def dealt(target: Target, images: Images) -> dict[str, list[int]]:
    """Positions per role among `images`, as the run dealt them or as the folder comes split.

    Raises UserError.
    """
    source = target.config["data"]
    if target.splits is None:
        if images.private is not None:
            roles = split(images, target.config["seed"], None, most=images.private)
            say(roles, target.config["nonmembers"])
            return roles
        if images.folders is None:
            raise UserError(
                f"{source} does not say which images are members: use --members and --nonmembers "
                f"instead, or --splits, or sub-folders {', '.join(FOLDERS)}"
            )
        return split_as_it_comes(images, target.config["seed"])
    position = {name: i for i, name in enumerate(images.names)}
    now = position if target.images is None else by_content(target.images, images)
    missing = [name for names in target.splits.values() for name in names if name not in now]
    if missing:
        name, count = shown(missing[0]), f"{len(missing)} images of {target.name}"
        beside = missing[0].startswith(OUTSIDE) and target.config.get("nonmembers")
        flag, where = "--nonmembers" if beside else "--data", shown(beside or source)
        wrong = f"{where} no longer holds {name} ({count} are gone)"
        if missing[0] in position:
            wrong = f"the pixels or the caption of {name} in {where} are not those that "
            wrong += f"{target.run} was trained on ({count} are not found)"
        raise UserError(f"{wrong}: put them back, or give their folder with {flag}")
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
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    x = affine(x, 0, [0, 0], 1 / share, [0.0], InterpolationMode.BILINEAR)
    return x.permute(0, 2, 3, 1).numpy()


def cut(caption: str, share: float) -> str:
    """The first `share` of the words of a caption, rounded up, but never all of several."""
    words = caption.split()
    return " ".join(words[: min(math.ceil(share * len(words)), max(len(words) - 1, 0))])
