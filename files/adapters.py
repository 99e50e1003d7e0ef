"""An adapter of any kind, a LoRA or a whole UNet, into a file and out of one.

    save(adapter, folder, facts)
    adapter, header = load(base, path)

Tested in tests/test_whole.py and tests/test_text_encoder.py.
"""

from pathlib import Path

import lora
from diffusion import Base
from files import lora_writing, text_encoder, whole


def save(
    adapter: lora.Adapter,
    folder: str | Path,
    facts: dict[str, object] | None = None,
    kohya: bool = False,
) -> Path:
    """Write an adapter in its own form, a LoRA with `kohya` in that of ComfyUI; returns the file
    of its weights.  `facts` become strings in the file's header.
    """
    if isinstance(adapter, whole.WholeUNet):
        return whole.save(adapter, folder, facts)
    return lora_writing.save(adapter, folder, facts, kohya)


def load(base: Base, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Put the adapter of a file or folder into a plain base; returns it and the file's header.

    Everything is checked before the model is changed.  Raises UserError.
    """
    if whole.is_one(path):
        return whole.load(base.unet, path)
    return text_encoder.load(base, path)
