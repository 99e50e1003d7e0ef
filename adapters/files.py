"""Whatever kind of adapter it is: into a file, and out of a file into a base model.

    save(adapter, folder, facts)
    adapter, header = load(base.unet, path)       # a LoRA (lora_files.py), or a whole UNet

Tested in tests/test_whole.py.
"""

from pathlib import Path

from torch import nn

import lora
import lora_files
from adapters import whole


def save(
    adapter: lora.Adapter,
    folder: str | Path,
    extra: dict[str, object] | None = None,
    kohya: bool = False,
) -> Path:
    """Write an adapter in its own form, with `kohya` a LoRA in that of ComfyUI; returns the file of
    weights.
    """
    if isinstance(adapter, whole.WholeUNet):
        return whole.save(adapter, folder, extra)
    return lora_files.save(adapter, folder, extra, kohya)


def load(unet: nn.Module, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Put the adapter of a file or folder into a plain `unet`; returns it and the file's header.

    Everything is checked before the model is touched.  Raises UserError.
    """
    return whole.load(unet, path) if whole.is_one(path) else lora_files.load(unet, path)
