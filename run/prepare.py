"""What one run works on and does not change: settings, base, images, adapter, processes, folder."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch

import lora
from command.errors import UserError
from diffusion import (
    Base,
    Encoded,
    embed,
    encode,
    encode_captions,
    encode_images,
    joined,
    residual,
    squared_error,
    tokenize,
)
from files import lora_files, text_encoder, whole
from files import roles as dealing
from files.bases import load_base
from files.images import PARTS, Images, load_images, near_duplicates
from methods import subspace
from run.folder import RunFolder
from run.processes import Processes, WholeBatch
from settings import DIRECTIONS, Settings, most_members

FEW = 4  # images that a dry run encodes
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
    again: int | None = None  # where the same images stand again with other noise, for G alone

    def __len__(self) -> int:
        return len(self.index)

    def fitted(self, error: torch.Tensor) -> torch.Tensor:
        """The error maps that L is of: all, or with --as-released forward the first half."""
        return error[: self.again]

    def judged(self, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(error maps, timesteps) that G is of: all, or with --as-released forward the second
        half.
        """
        return error[self.again :], self.timesteps[self.again :]


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
    # (N + 1, L) of the captions and of "", where the text encoder is adapted too
    tokens: torch.Tensor | None = None
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
        latents, bare = self.data.latents[index], batch.bare
        if batch.mirrored is not None:
            where = batch.mirrored[part].view(-1, 1, 1, 1)
            latents = torch.where(where, self.mirror[index], latents)
        text = self.text(index, None if bare is None else bare[part])
        return latents, text, batch.timesteps[part], batch.noise[part]

    def text(self, index: torch.Tensor, bare: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (b, L, D) of captions, of "" where `bare`: kept, or through the adapted text
        encoder.
        """
        if self.tokens is not None:
            index = index.to(self.tokens.device)
            which = index if bare is None else torch.where(bare, len(self.tokens) - 1, index)
            return embed(self.base, self.tokens[which])
        text = self.data.text[index]
        return text if bare is None else torch.where(bare.view(-1, 1, 1), self.empty, text)

    def seen_data(self) -> Encoded:
        """The images with their captions as the adapter has them now."""
        return text_encoder.seen(self.base, self.data, self.adapter)

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
        with self.folded():
            errors = [self.errors(batch, part) for part in parts]
        return self.processes.gather(torch.cat(errors))

    def shown(self, batch: Batch, error: torch.Tensor) -> torch.Tensor:
        """What the attacker is shown of a whole batch: its error maps (B, C, h, w), with --proxy
        calibrated those of the base behind them (B, 2C, h, w).
        """
        if self.settings.proxy != "calibrated":
            return error
        with torch.no_grad(), self.adapter.disabled():
            parts = self.processes.parts(len(batch), 2 * self.settings.batch_size)
            base = [squared_error(self.base, *self.seen(batch, part)) for part in parts]
        return torch.cat([error, self.processes.gather(torch.cat(base))], dim=1)

    def folded(self) -> AbstractContextManager:
        """Inside, the adapter is in the base weights, which saves its part of a forward; apart
        from them in half precision, whose steps are as large as what the adapter adds.
        """
        return self.adapter.folded() if self.base.unet.dtype == torch.float32 else nullcontext()


def prepare(settings: Settings, processes: Processes) -> Run:
    """Load the model and the images, split them, encode them, inject the adapter.

    Raises UserError for a model, images or adapter that cannot be used.
    """
    torch.manual_seed(settings.seed)  # attacker initialisation and dropout
    base = load_base(settings.model, processes.device, settings.dtype, settings.size)
    images = load_images(settings.data, base.size, settings.caption, settings.nonmembers)
    s, images, roles = deal(settings, images, processes.main)
    return assemble(s, base, encoded(s, base, images, roles), processes)


def encoded(s: Settings, base: Base, images: Images, roles: dict[str, list[int]]) -> Encoded:
    """The images as the base sees them; for a dry run a few of them stand for all."""
    if not s.dry_run:
        return encode(base, images, roles)
    few = min(FEW, len(images.names))
    names, captions = images.names[:few], images.captions[:few]
    data = encode(base, Images(names, captions, images.pixels[:few]), {})
    at = torch.arange(len(images.names)) % few
    everything = images.names, images.captions, images.pixels, data.latents[at], data.text[at]
    return Encoded(*everything, roles)


def deal(s: Settings, images: Images, speak: bool) -> tuple[Settings, Images, dict[str, list[int]]]:
    """Who among the images is a member, said in a line; settings with --members filled in, and the
    images that are needed.

    Raises UserError if there are too few.
    """
    roles = dealing.split(images, s.seed, s.members, s.split, most_members(s))
    if images.private is not None:
        images, roles = dealing.only_dealt(images, roles)
    if speak:
        dealing.say(roles, s.nonmembers)
    count = sum(len(roles[f"member_{part}"]) for part in PARTS)
    return replace(s, members=s.members or count), images, roles


def assemble(settings: Settings, base: Base, data: Encoded, processes: Processes) -> Run:
    """A run on images that are encoded already: the adapter injected, `steps` complete.

    Raises UserError for an adapter that does not fit.
    """
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
    tokens = tokenize(base, [*data.captions, ""]) if settings.released("text-encoder") else None
    run = Run(settings, base, data, adapter, processes, mirror, empty, public, tokens)
    steps = settings.steps or -(-settings.epochs * len(data.members()) // run.batch)
    teacher_steps = settings.teacher_steps or -(-steps // 4)
    return replace(run, settings=replace(settings, steps=steps, teacher_steps=teacher_steps))


def fresh(settings: Settings, base: Base) -> lora.Adapter:
    """A new adapter in the base, or that of --init; raises ValueError where there cannot be one,
    UserError for a file that does not fit.
    """
    if settings.init:
        if (settings.target == "full") != whole.is_one(settings.init):
            kind = "no whole UNet" if settings.target == "full" else "a whole UNet"
            raise UserError(f"--init {settings.init} is {kind}: --target full goes with one")
        kind = whole if settings.target == "full" else lora_files
        return kind.load(base.unet, settings.init)[0]
    if settings.target == "full":
        return whole.WholeUNet(base.unet)
    if settings.subspace:
        file = DIRECTIONS if settings.subspace == "public" else settings.subspace
        return subspace.inject(base.unet, *subspace.load(file))
    generator = torch.Generator().manual_seed(settings.seed)
    adapter = lora.inject(base.unet, settings.target, settings.rank, settings.alpha, generator)
    both = settings.released("text-encoder")
    return text_encoder.inject(base, adapter, generator) if both else adapter


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
    more = encoded(settings, base, Images(names, captions, images.pixels[chosen]), {})
    return list(range(own, own + len(chosen))), joined(data, more)


@cache
def _public_images(name: str, size: int, caption: str | None) -> Images:
    return load_images(name, size, caption)
