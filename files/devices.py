"""Which device and dtype "auto" stands for on this machine."""

import torch

from command.errors import UserError


def resolve_device(device: str, before: str | None = None) -> str:
    """ "auto" as the name of a device that is present: `before` if it is, else cuda, mps or cpu."""
    if device != "auto":
        return device
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present["cpu"] = True
    order = [*([before] if before else []), *present]
    return next(name for name in order if present.get(name.split(":")[0]))


def require_device(device: str) -> None:
    """Raises UserError unless a tensor can be made on this device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here: {reason}") from None


def resolve_dtype(dtype: str | None, device: str) -> str:
    """ "auto" or None as the name of a dtype: on CUDA bfloat16, or float16 where the GPU has no
    bfloat16; elsewhere float32.
    """
    if dtype not in ("auto", None):
        return dtype
    if not resolve_device(device).startswith("cuda") or not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
