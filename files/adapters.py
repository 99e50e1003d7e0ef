"""Whatever kind of adapter it is: into a file, and out of a file into a base model.

    save(adapter, folder, facts)
    adapter, header = load(base, path)       # a LoRA, one with a part for the text encoder, a UNet

Tested in tests/test_whole.py and tests/test_text_encoder.py.
"""

from pathlib import Path

import lora
from diffusion import Base
from files import lora_files, lora_writing, text_encoder, whole


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
    if isinstance(adapter, text_encoder.TwoLoRA):
        return lora_writing.save(adapter.unet, folder, extra, kohya, adapter.text)
    return lora_writing.save(adapter, folder, extra, kohya)


def load(base: Base, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Put the adapter of a file or folder into a plain base; returns it and the file's header.

    Everything is checked before the model is touched.  Raises UserError.
    """
    if whole.is_one(path):
        return whole.load(base.unet, path)
    text = text_encoder.factors_of(base, path)
    adapter, header = lora_files.load(base.unet, path, beside=bool(text))
    return (text_encoder.hold(base, adapter, text) if text else adapter), header
