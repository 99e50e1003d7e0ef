"""The base model as the rest of the project sees it: latents, text embeddings, noise and the error map.

Any epsilon- or v-prediction `StableDiffusionPipeline` folder (or hub name) in safetensors; the embedded default is one
such folder, so it takes no path of its own.

    base = load_base("base")
    latents = encode_images(base, pixels)          # (N, C, h, w), once per run
    text = encode_captions(base, captions)         # (N, L, D), once per run
    e = squared_error(base, latents, text, timesteps, noise)    # (N, C, h, w)
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cli import UserError
from settings import EMBEDDED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        side = self.size // self.pipeline.vae_scale_factor
        return self.unet.config.in_channels, side, side


def load_base(
    model: str = EMBEDDED, device: str = "cpu", dtype: str = "float32", size: int | None = None
) -> Base:
    """Load and freeze a pipeline.  Raises UserError for a missing or unusable one; pickled weights are never read."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {device} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    dtype = resolve_dtype(dtype, str(device))
    pipeline = (
        _single_file(Path(model), dtype) if Path(model).is_file() else _pipeline(model, dtype)
    )
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{model} predicts '{prediction}'; only epsilon and v_prediction models can be adapted"
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    channels = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels[0] != channels[1]:
        raise UserError(
            f"{model} takes {channels[0]} channels for latents of {channels[1]}: is it an inpainting model?"
        )
    size = size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    multiple = max(8, pipeline.vae_scale_factor)  # diffusers samples multiples of 8 only
    if size % multiple:
        raise UserError(f"the picture size {size} is not a multiple of {multiple}")
    abar = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    return Base(model, pipeline, pipeline.unet, abar, prediction, size, torch.device(device))


def _pipeline(model: str, dtype: str):
    """A pipeline folder or hub name; raises UserError unless it is Stable Diffusion 1.x or 2.x in safetensors."""
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError

    local = Path(model).exists()
    if local and not (Path(model) / "model_index.json").is_file():
        raise UserError(
            f"{model} is not a StableDiffusionPipeline folder: it has no model_index.json"
        )
    try:
        kind = StableDiffusionPipeline.load_config(model, local_files_only=local).get("_class_name")
        if kind not in ("StableDiffusionPipeline", "StableDiffusionPipelineSafe"):
            raise UserError(
                f"{model} is a {kind}: only a StableDiffusionPipeline (1.x or 2.x) can be adapted"
            )
        return StableDiffusionPipeline.from_pretrained(
            model,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            safety_checker=None,
            local_files_only=local,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"cannot load the base model {model} from safetensors: {_reason(error)}"
        ) from None


def _single_file(path: Path, dtype: str):
    """A single .safetensors checkpoint, by diffusers' own loader; its configs come from a folder of the same name
    beside it (any pipeline folder of that architecture, weights not needed), else from the hub."""
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({_reason(error)}); pickles are not read"
        ) from None
    beside = path.with_suffix("")
    config = {"config": str(beside)} if (beside / "model_index.json").is_file() else {}
    try:
        return StableDiffusionPipeline.from_single_file(
            str(path), dtype=DTYPES[dtype], safety_checker=None, **config
        )
    except (
        Exception
    ) as error:  # the converters raise whatever a foreign key layout makes them raise
        where = (
            f"with the configs in {beside}"
            if config
            else f"(no configs in {beside}/, so they are asked of the hub)"
        )
        raise UserError(f"cannot load the checkpoint {path} {where}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def resolve_dtype(dtype: str, device: str) -> str:
    """ "auto" as the name of a dtype: half precision on a GPU, bfloat16 where it has it, and float32 elsewhere."""
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


# ---------------------------------------------------------------------------------------------------------------
# What is cached once per run


def at_once(base: Base, most: int = 32) -> int:
    """Pictures that go through a network together, so that memory stays bounded: `most` up to 128 px, of 512 px a 16th."""
    return min(most, max(1, most * 128**2 // base.size**2))


@torch.no_grad()
def encode_images(base: Base, pixels: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> scaled latents z0 (N, C, h, w), float32: the mode of the VAE's posterior."""
    vae, parts, batch = base.pipeline.vae, [], at_once(base)
    for i in range(0, len(pixels), batch):
        x = torch.from_numpy(pixels[i : i + batch]).to(base.device).permute(0, 3, 1, 2)
        x = (x.float() / 127.5 - 1).to(vae.dtype)
        parts.append(vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor)
    return torch.cat(parts)


@torch.no_grad()
def encode_captions(base: Base, captions: list[str], batch: int = 64) -> torch.Tensor:
    """Captions -> text embeddings (N, L, D); longer ones than the tokenizer takes are cut, with one warning."""
    tokenizer, parts = base.pipeline.tokenizer, []
    long = sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(captions).input_ids)
    if long:
        print(
            f"note: {long} of {len(captions)} captions are cut to {tokenizer.model_max_length} tokens"
        )
    for i in range(0, len(captions), batch):
        ids = tokenizer(
            captions[i : i + batch], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        parts.append(base.pipeline.text_encoder(ids.to(base.device))[0])
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------
# The noise process and the error map


def add_noise(latents, noise, timesteps, abar) -> torch.Tensor:
    """z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps (Ho et al. 2020, Eq. 4); latents, noise (B, C, h, w)."""
    a = abar[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def prediction_target(latents, noise, timesteps, abar, prediction: str) -> torch.Tensor:
    """eps, or v = sqrt(abar) eps - sqrt(1 - abar) z0 (Salimans & Ho 2022) for v-prediction models."""
    if prediction == "epsilon":
        return noise
    a = abar[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * noise - (1 - a).sqrt() * latents


def squared_error(base: Base, latents, text, timesteps, noise) -> torch.Tensor:
    """e = (eps - f(z_t, t, tau(y)))^2, elementwise (B, C, h, w), in the dtype of eps; the adapter's gradient flows."""
    noisy_latents, dtype = add_noise(latents, noise, timesteps, base.abar), base.unet.dtype
    half = dtype in (
        torch.bfloat16,
        torch.float16,
    )  # then autocast brings float32 adapters and half base together
    with torch.autocast(base.device.type, dtype) if half else nullcontext():
        noise_pred = base.unet(
            noisy_latents.to(dtype), timesteps, text.to(dtype), return_dict=False
        )[0]
    noise_pred = noise_pred.to(noise.dtype)
    return (
        prediction_target(latents, noise, timesteps, base.abar, base.prediction) - noise_pred
    ) ** 2


@torch.no_grad()
def sample(base: Base, text, empty, noise, steps: int = 25, guidance: float = 3.0) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) from text embeddings (N, L, D) by DDIM with classifier-free guidance.

    `empty` (1, L, D) embeds "" and `noise` (N, C, h, w) is z_T, so two models can be drawn from the same noise.
    """
    from diffusers import DDIMScheduler

    base.pipeline.scheduler = DDIMScheduler.from_config(base.pipeline.scheduler.config)
    parts, batch = [], at_once(base)
    for i in range(0, len(text), batch):
        prompts = text[i : i + batch]
        images = base.pipeline(
            prompt_embeds=prompts,
            negative_prompt_embeds=empty.expand(len(prompts), -1, -1),
            latents=noise[i : i + batch].to(base.unet.dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=base.size,
            width=base.size,
            output_type="np",
        ).images
        parts.append((images * 255).round().astype(np.uint8))
    return np.concatenate(parts)
