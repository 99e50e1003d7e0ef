"""Whether a base can be used: its weights are sensible, its noise can be trained with and sampled
from, its parts fit together.  Everything here raises UserError in one sentence.
Tested in tests/test_base_files.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from command.errors import UserError, shown
from diffusion import ALL_TIMESTEPS, Base, ddim, encode_captions, encode_images, squared_error

LARGEST = torch.finfo(torch.float32).max ** 0.5  # 1.8e19, whose square is still finite


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Around a call of a library: what it raises becomes a UserError "`what`: the reason".

    A damaged file can make diffusers and transformers raise anything, such as AttributeError.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()).split(" Please ")[0]  # without advice in Python
        reason = shown(text)[:400]
        if not isinstance(
            error, OSError | ValueError | RuntimeError
        ):  # their text alone says little
            reason = f"{type(error).__name__} {reason}"
        raise UserError(f"{what}: {reason}") from None


def check_weights(name: str, part: str, module: torch.nn.Module) -> None:
    """Freeze a part; raises UserError unless each of its tensors is there and sensible."""
    module.requires_grad_(False).eval()
    for key, tensor in module.state_dict().items():
        if tensor.is_meta:  # as from a single file
            raise UserError(f"the {part} of {name} is incomplete: its file lacks {key}")
        low, high = tensor.aminmax() if tensor.numel() else (0.0, 0.0)
        if not (low > -LARGEST and high < LARGEST):  # not so for NaN
            raise UserError(
                f"the {part} of {name} is damaged: {key} holds NaN, infinite or absurdly large "
                f"numbers (as {str(tensor.dtype).removeprefix('torch.')})"
            )


def noise_schedule(name: str, scheduler) -> tuple[torch.Tensor, str]:
    """abar (T,) float32, and "epsilon" or "v_prediction".  Raises UserError for a schedule that
    cannot be trained with or sampled from.
    """
    abar = getattr(scheduler, "alphas_cumprod", None)
    if abar is None:
        kind = type(scheduler).__name__
        raise UserError(f"{name} has a {kind}: only models with a schedule of betas can be adapted")
    prediction = scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{name} predicts '{shown(prediction)}'; only epsilon and v_prediction models can be "
            "adapted"
        )
    if len(abar) <= max(ALL_TIMESTEPS):
        raise UserError(f"{name} has {len(abar)} timesteps; at least 1,000 are needed")
    if not ((abar >= 0) & (abar <= 1)).all():  # not so for NaN; 0 is zero terminal SNR
        raise UserError(f"the betas of {name} are damaged: their signal level leaves 0..1")
    with one_sentence(f"{name} cannot be sampled by DDIM"):
        ddim(scheduler).set_timesteps(2)
    return abar.float(), prediction


def fit_tokenizer(name: str, tokenizer, encoder) -> None:
    """Limit captions to what the text encoder of this config takes.  Raises UserError for a
    tokenizer with tokens that it does not have.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= encoder.vocab_size:
        raise UserError(
            f"the tokenizer of {name} has a token {highest}, but its text encoder has only "
            f"{encoder.vocab_size}: they do not belong together"
        )
    most = encoder.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, most)


def picture_size(name: str, pipeline, size: int | None) -> int:
    """Pixels of a side: `size`, else that of the UNet's config, one number or two equal ones."""
    factor = pipeline.vae_scale_factor
    if not size:
        side = pipeline.unet.config.sample_size
        if isinstance(side, list | tuple) and len(side) == 2 and side[0] == side[1]:
            side = side[0]
        if type(side) is not int or not 0 < side <= 1024:
            raise UserError(
                f"the UNet of {name} does not state a square picture size (its sample_size "
                f"is {shown(side)}): give --size"
            )
        size = side * factor
    multiple = max(8, factor)  # diffusers only samples multiples of 8
    if size % multiple:
        raise UserError(f"the picture size {size} is not a multiple of {multiple}")
    return size


@torch.no_grad()
def try_out(base: Base) -> None:
    """Send a small black picture and an empty caption through all parts.  Raises UserError if they
    do not fit together.
    """
    side = 8 * base.pipeline.vae_scale_factor
    with one_sentence(f"the parts of {shown(base.name)} do not work together"):
        latents = encode_images(base, np.zeros((1, side, side, 3), np.uint8))
        text, zero = encode_captions(base, [""]), torch.zeros(1, dtype=torch.long)
        error = squared_error(base, latents, text, zero.to(base.device), torch.zeros_like(latents))
        picture = base.pipeline.vae.decode(latents.to(base.pipeline.vae.dtype)).sample
        if error.shape != latents.shape or picture.shape != (1, 3, side, side):
            raise ValueError("what they return has another shape than what they were given")
        if not (error.isfinite().all() and picture.isfinite().all()):
            raise ValueError(f"their numbers are not finite in {base.unet.dtype}")
