"""The base model as the rest of the project sees it: latents, text embeddings, noise, error maps.

Any epsilon- or v-prediction `StableDiffusionPipeline`; the embedded default is such a folder, so it
takes no path of its own.

    base = load_base("base")                                    # files/bases.py
    data = encode(base, images, roles)            # latents (N, C, h, w), text (N, L, D), once
    e = squared_error(base, latents, text, timesteps, noise)    # (B, C, h, w)
    grid = loss_grid(base, data.latents, data.text)             # (N, T, K)
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

TIMESTEPS = (50, 150, 250, 350)  # where adapters leak most
LATE_TIMESTEPS = (500, 650, 800, 950)
ALL_TIMESTEPS = TIMESTEPS + LATE_TIMESTEPS  # where quality is measured
DRAWS = 4  # noise draws per timestep: the average over draws is what leaks
GRID_SEED = 20240219  # of the noise of loss grids; unrelated to any training seed
GRID_BATCH = 64  # small pictures in one forward without gradient
PARTS = ("aux", "val", "test")  # of the members, and of the non-members
# What DDIM is told where a base's config is silent: its own defaults are for pixels, and would clip
# latents to +-1.
LATENT = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

Done = Callable[[float], object]


def ignore(count: float) -> None:
    """Nobody wants to know how far a loop is."""


@dataclass
class Base:
    """A frozen pipeline and the two facts of its noise process that training needs."""

    name: str
    pipeline: object  # diffusers.StableDiffusionPipeline; owns vae, text_encoder, tokenizer
    unet: nn.Module
    abar: (
        torch.Tensor
    )  # (T,) cumulative product of 1 - beta: z_t = sqrt(abar) z0 + sqrt(1 - abar) eps
    prediction: str  # "epsilon" or "v_prediction"
    size: int  # pixels of a side
    device: torch.device
    source: object = None  # Path of the folder or file that it was loaded from

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        side = self.size // self.pipeline.vae_scale_factor
        return self.unet.config.in_channels, side, side

    def embed(self, captions: list[str]) -> torch.Tensor:
        """tau: captions -> (N, L, D); longer ones than the tokenizer takes are cut."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.pipeline.tokenizer(captions, **options).input_ids.to(self.device)  # (N, L)
        return self.pipeline.text_encoder(ids)[0]

    def condition(self, text: torch.Tensor, dtype: torch.dtype) -> dict:
        """The arguments by which the UNet is given what `embed` returned."""
        return {"encoder_hidden_states": text.to(dtype)}


# --------------------------------------------------------------------------------------------------
# Images as the base sees them


def at_once(base: Base, most: int = 32) -> int:
    """Pictures that go through a network together, so that memory stays bounded: `most` up to 128
    px, of 512 px a 16th.
    """
    return min(most, max(1, most * 128**2 // base.size**2))


@dataclass
class Encoded:
    """N captioned images as the base sees them, encoded once, and who is a member."""

    names: list[str]  # (N,) file names
    captions: list[str]  # (N,)
    pixels: np.ndarray  # (N, H, W, 3) uint8
    latents: torch.Tensor  # (N, C, h, w) float32
    text: torch.Tensor  # (N, L, D)
    roles: dict[str, list[int]]  # positions per role

    def members(self) -> list[int]:
        """All images that the adapter is trained on."""
        return sorted(i for part in PARTS for i in self.roles[f"member_{part}"])

    def known(self) -> list[int]:
        """The images that the attacker may choose on: auxiliary and validation."""
        members, nonmembers = self.sides("aux", "val")
        return members + nonmembers

    def sides(self, *parts: str) -> tuple[list[int], list[int]]:
        """Positions of the (members, non-members) in the given parts of the roles."""
        members = [i for part in parts for i in self.roles[f"member_{part}"]]
        return members, [i for part in parts for i in self.roles[f"nonmember_{part}"]]

    def pair(self, score: np.ndarray, *parts: str) -> tuple[np.ndarray, np.ndarray]:
        """(member scores, non-member scores) of the given parts of the roles, out of (N,)
        scores.
        """
        members, nonmembers = self.sides(*parts)
        return score[members], score[nonmembers]


@torch.no_grad()
def encode_images(base: Base, pixels: np.ndarray, done: Done = ignore) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> scaled latents z0 (N, C, h, w), float32: the mode of the VAE's
    posterior.
    """
    vae, parts, batch = base.pipeline.vae, [], at_once(base)
    for i in range(0, len(pixels), batch):
        x = torch.from_numpy(pixels[i : i + batch]).to(base.device).permute(0, 3, 1, 2)
        x = (x.float() / 127.5 - 1).to(vae.dtype)
        parts.append(vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor)
        done(len(x))
    return torch.cat(parts)


@torch.no_grad()
def encode_captions(
    base: Base, captions: list[str], done: Done = ignore, batch: int = 64
) -> torch.Tensor:
    """Captions -> text embeddings (N, L, D), or as the base packs them in `embed`."""
    parts = []
    for i in range(0, len(captions), batch):
        parts.append(base.embed(captions[i : i + batch]))
        done(len(parts[-1]))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# The noise process and the error map


def draw_noise(base: Base, count: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Timesteps (count,) uniform in 0..T-1 and Gaussian noise (count, C, h, w).

    Drawn on the CPU, so that every device sees the same.
    """
    timesteps = torch.randint(len(base.abar), (count,), generator=generator)
    noise = torch.randn((count, *base.latent_shape), generator=generator)
    return timesteps.to(base.device), noise.to(base.device)


def add_noise(latents, noise, timesteps, abar) -> torch.Tensor:
    """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps (Ho et al. 2020, Eq. 4); latents, noise (B, C,
    h, w).
    """
    a = abar[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def prediction_target(latents, noise, timesteps, abar, prediction: str) -> torch.Tensor:
    """eps, or v = sqrt(abar) eps - sqrt(1 - abar) z0 (Salimans & Ho 2022) for v-prediction
    models.
    """
    if prediction == "epsilon":
        return noise
    a = abar[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def answer(base: Base, noisy_latents, timesteps, text) -> torch.Tensor:
    """What the UNet answers to z_t, f(z_t, t, tau(y)): (B, C, h, w) in the dtype of z_t, whatever
    those of the UNet and of the text are; the adapter's gradient flows.
    """
    dtype = base.unet.dtype  # float32 with --target full, also where text encoder and VAE are half
    half = dtype in (torch.bfloat16, torch.float16)
    # autocast brings float32 adapters and a half-precision base together
    with torch.autocast(base.device.type, dtype) if half else nullcontext():
        given = base.condition(text, dtype)
        found = base.unet(noisy_latents.to(dtype), timesteps, **given, return_dict=False)[0]
        return found.to(noisy_latents.dtype)


def predict(base: Base, latents, text, timesteps, noise) -> torch.Tensor:
    """What the UNet answers where this noise is in the latents: (B, C, h, w)."""
    return answer(base, add_noise(latents, noise, timesteps, base.abar), timesteps, text)


def residual(base: Base, latents, text, timesteps, noise) -> torch.Tensor:
    """eps - f, or v - f of a v-prediction model: (B, C, h, w)."""
    target = prediction_target(latents, noise, timesteps, base.abar, base.prediction)
    return target - predict(base, latents, text, timesteps, noise)


def squared_error(base: Base, latents, text, timesteps, noise) -> torch.Tensor:
    """The error map e = (eps - f(z_t, t, tau(y)))^2, elementwise (B, C, h, w)."""
    return residual(base, latents, text, timesteps, noise) ** 2


@torch.no_grad()
def residuals(
    base: Base, latents, text, timesteps=TIMESTEPS, draws: int = DRAWS, done: Done = ignore
) -> Iterator[tuple[slice, int, int, torch.Tensor]]:
    """Yield (slice, T index, draw, eps - f (b, C, h, w)) over images x timesteps x draws.

    One noise per (t, draw) from a fixed stream: the same for members and non-members, for the
    adapted and the base model.
    """
    batch = at_once(base, GRID_BATCH)
    for j, t in enumerate(timesteps):
        # the noise of a timestep is the same in any grid
        generator = torch.Generator().manual_seed(GRID_SEED + t)
        noise = torch.randn((draws, *base.latent_shape), generator=generator).to(base.device)
        for k in range(draws):
            for i in range(0, len(latents), batch):
                z, c = latents[i : i + batch], text[i : i + batch]
                at = torch.full((len(z),), t, device=base.device)
                yield slice(i, i + len(z)), j, k, residual(base, z, c, at, noise[k].expand_as(z))
                done(len(z))


def loss_grid(
    base: Base, latents, text, timesteps=TIMESTEPS, draws: int = DRAWS, done: Done = ignore
) -> torch.Tensor:
    """Adaptation loss per image, timestep and draw: (N, T, K), on the CPU."""
    grid = torch.empty(len(latents), len(timesteps), draws)
    for at, j, k, off in residuals(base, latents, text, timesteps, draws, done):
        grid[at, j, k] = off.square().mean((1, 2, 3)).cpu()
    return grid


def ddim(scheduler, **changes):
    """A DDIM scheduler with the noise levels, the prediction and all else that the config of
    `scheduler`, of any family, says; silent on LATENT, it has these.
    """
    from diffusers import DDIMScheduler

    config = dict(scheduler.config)
    silent = set(LATENT).intersection(config.pop("_use_default_values", ()))
    said = {k: v for k, v in config.items() if k not in silent}
    return DDIMScheduler.from_config(LATENT | said | changes)


@torch.no_grad()
def sample(
    base: Base,
    text: torch.Tensor,
    empty: torch.Tensor,
    noise: torch.Tensor,
    steps: int = 25,
    guidance: float = 3.0,
    done: Done = ignore,
) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) from text embeddings (N, L, D) by DDIM with classifier-free
    guidance.

    `empty` (1, L, D) embeds "" and `noise` (N, C, h, w) is z_T, so two models can be drawn from the
    same noise.
    """
    scheduler = ddim(base.pipeline.scheduler)
    scheduler.set_timesteps(steps, base.device)
    vae, parts, batch = base.pipeline.vae, [], at_once(base)
    for i in range(0, len(text), batch):
        z, c = noise[i : i + batch], text[i : i + batch]
        both = torch.cat([empty.expand_as(c), c])
        for t in scheduler.timesteps:
            without, with_text = answer(base, torch.cat([z, z]), t, both).chunk(2)
            z = scheduler.step(without + guidance * (with_text - without), t, z).prev_sample
            done(len(z) / steps)
        x = vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        x = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        parts.append((x * 255).round().astype(np.uint8))
    return np.concatenate(parts)
