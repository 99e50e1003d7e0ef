"""First stage: the autoencoder, with a 4x smaller latent picture (Rombach et al. 2022)."""

import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from embedded.base_model import build_vae
from embedded.settings import Settings
from embedded.stage import Stage


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random flip, zoom (0.75 to 1.15), shift, and channel mixing of half the pictures.

    `pixels` (N, 3, H, W) in [-1, 1].  What comes in from outside is white.
    """
    n = len(pixels)
    u = torch.rand(n, 8, generator=generator)
    scale = 1 / (0.75 + 0.4 * u[:, 0])
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (u[:, 2:4] - 0.5) * 0.3
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    # shifted by one, so that the zeros outside are white
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    mixed = 0.5 * (u[:, 4:5, None] < 0.5)
    mix = torch.eye(3) + mixed * (torch.rand(n, 3, 3, generator=generator) - 0.5)
    mix = mix / mix.sum(2, keepdim=True)  # rows sum to one: white stays white
    return torch.einsum("nij,njhw->nihw", mix, moved)


def train_vae(settings: Settings, images: np.ndarray) -> tuple[AutoencoderKL, float]:
    """Train on pictures uint8 (N, H, W, 3): (the autoencoder in eval mode, seconds it took).

    The loss is squared error + 0.1 absolute error + 1e-4 KL to the standard normal, all means.
    Raises UserError as Stage.
    """
    torch.manual_seed(settings.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    stage = Stage("vae", settings, {"vae": vae}, settings.vae_steps, settings.vae_lr, warmup=50)
    pixels, generator = to_pixels(images), stage.generator
    for step in stage.steps():
        pick = torch.randint(len(pixels), (settings.vae_batch,), generator=generator)
        batch = augment(pixels[pick], generator).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        mse = F.mse_loss(output, batch)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        stage.descend(mse + 0.1 * F.l1_loss(output, batch) + 1e-4 * kl)
        if step % 25 == 0:
            print(
                f"vae {step}/{settings.vae_steps} mse {mse.item():.4f} kl {kl.item():.2f} "
                f"psnr {10 * math.log10(4 / mse.item()):.2f}",
                flush=True,
            )
    return vae.eval(), stage.seconds


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions of uint8 (N, H, W, 3) from the posterior's mode: pictures (N, 3, H, W) in
    [-1, 1], and the peak signal-to-noise ratio (N,) of each in dB, 10 log10(4 / mse).
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x = to_pixels(images)
    made = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(64)]
    y = torch.cat(made).clamp(-1, 1)
    return y, peak_signal_noise_ratio(y, x, data_range=(-1, 1), reduction="none", dim=(1, 2, 3))
