"""Second stage: UNet and text encoder on the autoencoder's latents.

The objective is that of DDPM (Ho et al. 2020, Eq. 14), the noise schedule Stable Diffusion's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTokenizer

from embedded.base_model import build_text_encoder, build_tokenizer, build_unet
from embedded.settings import Settings
from embedded.stage import Stage
from embedded.train_vae import to_pixels
from files.bases import load_base


def learned(settings: Settings, captions: list[str]) -> list[int]:
    """Indices of the captions "name, style" whose style the UNet learns."""
    styles = settings.unet_sets.split(",")
    return [i for i, caption in enumerate(captions) if caption.rsplit(", ", 1)[1] in styles]


class Latents:
    """The learned pictures as cached posteriors (N, C, h, w), with three captions of each.

    `ids` (3, N, L) are the tokens of the caption with its style, without it, and of "".
    """

    def __init__(self, settings, vae, tokenizer, captions: list[str], images: np.ndarray):
        kept = learned(settings, captions)
        captions, images = [captions[i] for i in kept], images[kept]
        with torch.no_grad():
            found = [vae.encode(part).latent_dist for part in to_pixels(images).split(64)]
        self.mean = torch.cat([posterior.mean for posterior in found])
        self.std = torch.cat([posterior.std for posterior in found])
        self.scale = float(1 / (self.mean.var() + self.std.square().mean()).sqrt())
        if settings.start:
            self.scale = vae.config.scaling_factor  # that the UNet was trained with
        plain = [caption.rsplit(",", 1)[0] for caption in captions]
        texts = captions, plain, [""] * len(captions)
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = torch.stack([tokenizer(text, **pad).input_ids for text in texts])

    def draw(self, settings: Settings, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """A batch: scaled latents (B, C, h, w), token ids (B, L), timesteps (B,), and noise.

        The noise has the shape of the latents.
        """
        n = settings.unet_batch
        pick = torch.randint(len(self.mean), (n,), generator=generator)
        u = torch.rand(n, generator=generator)
        kind = (u < settings.drop_caption).long() * 2
        kind[(u >= settings.drop_caption) & (u < settings.drop_caption + settings.drop_style)] = 1
        t = torch.randint(1000, (n,), generator=generator)
        noise = torch.randn((2, *self.mean[pick].shape), generator=generator)
        latents = self.scale * (self.mean[pick] + self.std[pick] * noise[0])
        return latents, self.ids[kind, pick], t, noise[1]


def begin(settings: Settings, captions: list[str]) -> tuple[CLIPTokenizer, nn.ModuleDict]:
    """Tokenizer, and "unet" and "text_encoder": new ones, or those of the folder `--start`."""
    if settings.start:
        found = load_base(settings.start).pipeline
        tokenizer, unet, text_encoder = found.tokenizer, found.unet, found.text_encoder
    else:
        tokenizer = build_tokenizer(captions, Path(settings.work) / "tokenizer")
        unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    return tokenizer, model.train().requires_grad_(True)


@dataclass
class Trained:
    """The result of the second stage: averaged weights, and what a pipeline needs with them."""

    model: nn.Module  # "unet" and "text_encoder", in eval mode
    tokenizer: CLIPTokenizer
    scale: float  # of the latents, so that their standard deviation is 1
    seconds: float


def train_unet(
    settings: Settings, vae: AutoencoderKL, captions: list[str], images: np.ndarray
) -> Trained:
    """Train on cached latents of the pictures uint8 (N, H, W, 3) of the styles `--unet-sets`."""
    torch.manual_seed(settings.seed)
    tokenizer, model = begin(settings, captions)
    averaged = AveragedModel(model, multi_avg_fn=torch.no_grad()(blend(settings.ema)))
    model["unet"].to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    modules, steps = {"model": model, "averaged": averaged}, settings.unet_steps
    stage = Stage("unet", settings, modules, steps, settings.unet_lr, warmup=200, fused=True)
    latents = Latents(settings, vae, tokenizer, captions, images)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    denoise = model["unet"] if settings.no_compile else torch.compile(model["unet"])
    for step in stage.steps():
        batch = latents.draw(settings, stage.generator)
        with torch.autocast("cpu", torch.bfloat16):
            error, loss = unet_loss(
                denoise, model["text_encoder"], abar, settings.snr_gamma, *batch
            )
        stage.descend(loss)
        averaged.update_parameters(model)
        if step % 50 == 0:
            print(
                f"unet {step}/{steps} eps-mse {error:.4f} weighted {loss:.4f} "
                f"{stage.seconds:.0f} s",
                flush=True,
            )
    return Trained(averaged.module.eval(), tokenizer, latents.scale, stage.seconds)


def blend(decay: float):
    """Exponential average in place.  The first weights decay faster: they are far from good."""

    def update(old: list[torch.Tensor], new: list[torch.Tensor], count: torch.Tensor) -> None:
        torch._foreach_lerp_(old, new, 1 - min(decay, (1 + float(count)) / (10 + float(count))))

    return update


def unet_loss(
    unet, text_encoder, abar, gamma: float, latents, ids, timesteps, noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error, its min-SNR weighted mean) of the predicted noise, both scalars.

    `abar` (1000,); `latents` and `noise` (B, C, h, w), `ids` (B, L), `timesteps` (B,).  The weight
    of a timestep is min(SNR, gamma) / SNR (Hang et al. 2023), with SNR = abar / (1 - abar).
    """
    a = abar[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    predicted = unet(noisy, timesteps, text_encoder(ids)[0]).sample
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    snr = abar[timesteps] / (1 - abar[timesteps])
    return error.mean(), (error * (snr.clamp_max(gamma) / snr)).mean()
