"""Loading a frozen base model: a pipeline folder, a hub name, or one .safetensors checkpoint;
pickles are never read.

Every fault of a base that a user can have is one sentence.  Held by tests/test_diffusion.py and
tests/test_faults.py."""

from pathlib import Path

import torch

from cli import UserError
from diffusion import Base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base(
    model: str, device: str = "cpu", dtype: str = "float32", size: int | None = None
) -> Base:
    """Load and freeze a pipeline.  Raises UserError for a missing or unusable one; pickled weights
    are never read."""
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
            f"{model} takes {channels[0]} channels for latents of {channels[1]}: "
            "is it an inpainting model?"
        )
    size = size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    multiple = max(8, pipeline.vae_scale_factor)  # diffusers samples multiples of 8 only
    if size % multiple:
        raise UserError(f"the picture size {size} is not a multiple of {multiple}")
    abar = pipeline.scheduler.alphas_cumprod.to(device, torch.float32)
    return Base(model, pipeline, pipeline.unet, abar, prediction, size, torch.device(device))


def _pipeline(model: str, dtype: str):
    """A pipeline folder or hub name; raises UserError unless it is Stable Diffusion 1.x or 2.x in
    safetensors."""
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
    """A single .safetensors checkpoint, by diffusers' own loader; its configs come from a folder of
    the same name beside it (any pipeline folder of that architecture, weights not needed), else
    from the hub."""
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
    """ "auto" as the name of a dtype: half precision on a GPU, bfloat16 where it has it, and
    float32 elsewhere."""
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
