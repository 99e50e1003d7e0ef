"""A LoRA into a file: in the form of diffusers, or in kohya's for ComfyUI and A1111.

    save(adapter, "run/adapter", {"method": "smp"})
    save(adapter, "run/kohya", kohya=True)

What the keys are stands in files/lora_files.py, which reads them.  Tested in
tests/test_lora_files.py against diffusers and peft loading the file.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save as serialize

import lora
from command.whole_files import write_whole
from files.lora_files import FILE_NAME, HEADER, KOHYA_NAME


def save(
    adapter: lora.Adapter,
    folder: str | Path,
    extra: dict[str, object] | None = None,
    kohya: bool = False,
    text: lora.Adapter | None = None,
) -> Path:
    """Write the adapter into `folder` (diffusers form, or kohya's with `kohya`); returns the file.
    `text` is one of the text encoder beside it.

    `extra` are our own facts (method, lambda, seed, ...), stored as strings beside the scale.  Rank
    and alpha may differ between layers: in the diffusers form those of most layers are stated for
    all, the others in patterns.  The file is there whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {k: str(v) for k, v in (extra or {}).items()}
    metadata = {"format": "pt", "target": adapter.target, **facts}
    parts, header, tensors = {"unet": adapter} | ({"text_encoder": text} if text else {}), {}, {}
    for part, of_part in parts.items():
        header |= _header(of_part, part)
        if kohya:
            tensors |= _kohya(of_part, part)
        else:
            tensors |= {f"{part}.{k}": v for k, v in of_part.state_dict().items()}
    if not kohya:
        metadata[HEADER] = json.dumps(header, sort_keys=True)
    content = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    return write_whole(folder / (KOHYA_NAME if kohya else FILE_NAME), serialize(content, metadata))


def _kohya(adapter: lora.Adapter, part: str) -> dict[str, torch.Tensor]:
    """Its tensors in kohya's form."""
    tensors = {}
    for name, layer in adapter.layers.items():
        key = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A.weight
        tensors[f"{key}.lora_up.weight"] = layer.lora_B.weight
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def _header(adapter: lora.Adapter, part: str) -> dict:
    """peft's settings of the adapter under the names that diffusers asks for.

    A pattern that begins with ^ is a full name; without it another name could end so.
    """
    rank, alpha = adapter.rank_and_alpha()
    config = {
        f"{part}.r": rank,
        f"{part}.lora_alpha": _number(alpha),
        f"{part}.target_modules": list(adapter.modules),
    }
    layers = adapter.layers.items()
    ranks = {f"^{n}": layer.rank for n, layer in layers if layer.rank != rank}
    alphas = {f"^{n}": _number(layer.alpha) for n, layer in layers if layer.alpha != alpha}
    patterns = {f"{part}.rank_pattern": ranks, f"{part}.alpha_pattern": alphas}
    return config | {k: v for k, v in patterns.items() if v}


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
