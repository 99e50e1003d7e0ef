"""What one run works on and does not change: settings, base, images, adapter, processes, folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch

import lora
import lora_files
from base_files import load_base
from cli import UserError
from data import Images, load_images, near_duplicates, split
from defences import subspace
from diffusion import (
    Base,
    Encoded,
    encode,
    encode_captions,
    encode_images,
    joined,
    residual,
    squared_error,
)
from settings import DIRECTIONS, Settings
from training.processes import Processes, WholeBatch
from training.run_folder import RunFolder

PUBLIC = 1000  # pictures beside the private ones, at most


@dataclass
class Batch:
    """Images with the noise that they get in one step."""

    index: torch.Tensor  # (B,) positions among the run's images
    timesteps: torch.Tensor  # (B,) in 0..T-1
    noise: torch.Tensor  # (B, C, h, w)
    mirrored: torch.Tensor | None = None  # (B,) bool, with --flip
    bare: torch.Tensor | None = None  # (B,) bool: without a caption, with --caption-dropout
    taught: torch.Tensor | None = None  # (B, C, h, w): a teacher's residual
    dropped: int | None = None  # seed of the masks, with --dropout
    counted: int | None = None  # images that count, where others only fill the batch up

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Run:
    """One run: nothing in it moves but the weights inside `adapter`."""

    settings: Settings  # complete: `steps`, and rank, alpha and target of --init, are filled in
    base: Base
    data: Encoded
    adapter: lora.Adapter
    processes: Processes
    mirror: torch.Tensor | None = None  # (N, C, h, w) latents of the mirrored images, with --flip
    empty: torch.Tensor | None = None  # (1, L, D) embedding of "", with --caption-dropout
    public: list[int] = field(default_factory=list)  # positions of the public pictures in `data`
    # what the base draws for the grids, once it has, by the sampler's steps (pictures.py)
    drawn: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """Where the run is written."""
        return RunFolder(self.settings.out)

    @property
    def batch(self) -> int:
        """Members per step, over all forwards and processes."""
        return self.settings.batch_size * self.settings.accumulate * self.processes.count

    def errors(self, batch: Batch, part: slice = slice(None)) -> torch.Tensor:
        """Error maps e (b, C, h, w) of a part of a batch: one UNet forward."""
        with self.masks(batch, part):
            if batch.taught is None:
                return squared_error(self.base, *self.seen(batch, part))
            return (self.residuals(batch, part) - batch.taught[part]) ** 2

    @contextmanager
    def masks(self, batch: Batch, part: slice) -> Iterator[None]:
        """Inside, the adapter's inputs are dropped as the batch says: a part that is sent through
        twice has the same masks.
        """
        if batch.dropped is None:
            yield
            return
        with torch.random.fork_rng(), self.adapter.dropping(self.settings.dropout):
            torch.manual_seed(batch.dropped + (part.start or 0))
            yield

    def residuals(self, batch: Batch, part: slice | list[int]) -> torch.Tensor:
        """eps - f (b, C, h, w) of a part of a batch, the root of the error map with its sign."""
        return residual(self.base, *self.seen(batch, part))

    def seen(self, batch: Batch, part: slice | list[int]) -> tuple[torch.Tensor, ...]:
        """(latents, text, timesteps, noise) of a part of a batch, as its draws say."""
        index = batch.index[part]
        latents, text = self.data.latents[index], self.data.text[index]
        if batch.mirrored is not None:
            where = batch.mirrored[part].view(-1, 1, 1, 1)
            latents = torch.where(where, self.mirror[index], latents)
        if batch.bare is not None:
            text = torch.where(batch.bare[part].view(-1, 1, 1), self.empty, text)
        return latents, text, batch.timesteps[part], batch.noise[part]

    def parts(self, batch: Batch) -> list[slice]:
        """What this process sends through the UNet of a batch: as many forwards for any batch."""
        return self.processes.parts(
            len(batch), self.settings.batch_size * (len(batch) // self.batch)
        )

    def through(self, batch: Batch) -> WholeBatch:
        """The error maps of a batch, and gradients of functions of them in the adapter."""
        parts = self.parts(batch)
        return WholeBatch(
            partial(self.errors, batch), parts, self.adapter.parameters(), self.processes
        )

    @torch.no_grad()
    def errors_alone(self, batch: Batch) -> torch.Tensor:
        """Error maps (B, C, h, w) of a batch over all processes, without gradient."""
        parts = self.processes.parts(len(batch), 2 * self.settings.batch_size)
        return self.processes.gather(torch.cat([self.errors(batch, part) for part in parts]))


def prepare(settings: Settings, processes: Processes) -> Run:
    """Load the model and the images, split them, encode them, inject the adapter.

    Raises UserError for a model, images or adapter that cannot be used.
    """
    torch.manual_seed(settings.seed)  # attacker initialisation and dropout
    base = load_base(settings.model, processes.device, settings.dtype, settings.size)
    images = load_images(settings.data, base.size, settings.caption)
    roles = split(images, settings.seed, settings.members, settings.split)
    return assemble(settings, base, encode(base, images, roles), processes)


def assemble(settings: Settings, base: Base, data: Encoded, processes: Processes) -> Run:
    """A run on images that are encoded already: the adapter injected, `steps` complete.

    Raises UserError for an adapter that does not fit.
    """
    if settings.init:
        adapter, _ = lora_files.load(base.unet, settings.init)
        rank, alpha = adapter.rank_and_alpha()
        settings = replace(settings, rank=rank, alpha=alpha, target=adapter.target)
    else:
        try:
            adapter = fresh(settings, base)
        except ValueError as error:
            raise UserError(f"{settings.model} cannot be adapted so: {error}") from None
        rank, alpha = adapter.rank_and_alpha()
        settings = replace(settings, rank=rank, alpha=alpha, target=adapter.target)
    public, data = with_public(settings, base, data)
    if settings.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    mirror = encode_images(base, data.pixels[:, :, ::-1].copy()) if settings.flip else None
    empty = encode_captions(base, [""]) if settings.caption_dropout else None
    run = Run(settings, base, data, adapter, processes, mirror, empty, public)
    steps = settings.steps or -(-settings.epochs * len(data.members()) // run.batch)
    teacher_steps = settings.teacher_steps or -(-steps // 4)
    return replace(run, settings=replace(settings, steps=steps, teacher_steps=teacher_steps))


def fresh(settings: Settings, base: Base) -> lora.Adapter:
    """A new adapter in the base; raises ValueError where there cannot be one."""
    if settings.subspace:
        file = DIRECTIONS if settings.subspace == "public" else settings.subspace
        return subspace.inject(base.unet, *subspace.load(file))
    generator = torch.Generator().manual_seed(settings.seed)
    return lora.inject(base.unet, settings.target, settings.rank, settings.alpha, generator)


def with_public(settings: Settings, base: Base, data: Encoded) -> tuple[list[int], Encoded]:
    """Positions of the public pictures, and the images with them at the end; none without --public.

    Copies of the private images are left out: a teacher may have seen them.  Of more than PUBLIC a
    random part is taken.
    """
    if settings.public in (None, "none"):
        return [], data
    images = _public_images(settings.public, base.size, settings.caption)
    first, own = near_duplicates(np.concatenate([data.pixels, images.pixels])), len(data.names)
    kept = [i for i, at in enumerate(first[own:]) if at == own + i]
    if not kept:
        raise UserError(f"all pictures in {settings.public} are copies of the private images")
    chosen = np.random.default_rng(settings.seed).permutation(kept)[:PUBLIC].tolist()
    names = [f"public/{images.names[i]}" for i in chosen]
    captions = [images.captions[i] for i in chosen]
    more = encode(base, Images(names, captions, images.pixels[chosen]), {})
    return list(range(own, own + len(chosen))), joined(data, more)


@cache
def _public_images(name: str, size: int, caption: str | None) -> Images:
    return load_images(name, size, caption)
