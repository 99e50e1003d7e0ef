"""A LoRA into a file: in the form of diffusers, or in kohya's for ComfyUI and A1111.

    save(adapter, "run/adapter", {"method": "smp"})
    save(adapter, "run/kohya", kohya=True)

files/lora_files.py reads both and says what the keys are.  Tested in tests/test_lora_files.py
against diffusers and peft loading the file.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save as serialize

import lora
from command.whole_files import write_whole
from files.lora_files import FILE_NAME, HEADER, KOHYA_NAME, TEXT_MODEL


def save(
    adapter: lora.Adapter,
    folder: str | Path,
    facts: dict[str, object] | None = None,
    kohya: bool = False,
) -> Path:
    """Write the adapter into `folder` in the form of diffusers or of kohya; returns the file.

    `facts` (method, lambda, seed, ...) become strings in the file's header.  The file is there
    whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "target": adapter.target}
    header |= {k: str(v) for k, v in (facts or {}).items()}
    if kohya:
        tensors = _kohya(adapter)
    else:
        tensors = {f"unet.{k}": v for k, v in adapter.state_dict().items()}
        header[HEADER] = json.dumps(_peft_settings(adapter), sort_keys=True)
    content = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    return write_whole(folder / (KOHYA_NAME if kohya else FILE_NAME), serialize(content, header))


def _kohya(adapter: lora.Adapter) -> dict[str, torch.Tensor]:
    """Its tensors under kohya's keys."""
    tensors = {}
    for name, layer in adapter.layers.items():
        key = _kohya_key(name, getattr(adapter, "encoders", {})).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A.weight
        tensors[f"{key}.lora_up.weight"] = layer.lora_B.weight
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def _kohya_key(name: str, encoders: dict[str, torch.nn.Module]) -> str:
    """What kohya calls a layer of the UNet, or of one of these text encoders."""
    for number, first in enumerate(encoders, 1):
        if name.startswith(first):
            own = name.removeprefix(first).removeprefix(f"{TEXT_MODEL}.")
            return f"lora_te{number if len(encoders) > 1 else ''}_{TEXT_MODEL}_{own}"
    return f"lora_unet_{name}"


def _peft_settings(adapter: lora.Adapter) -> dict:
    """peft's settings of the adapter, under the names that diffusers asks for.

    Rank and alpha are those of most layers; patterns state the others.  A pattern that begins with
    ^ is a full name; without it another name could end so.
    """
    rank, alpha = adapter.rank_and_alpha()
    layers = adapter.layers.items()
    ranks = {f"^{n}": layer.rank for n, layer in layers if layer.rank != rank}
    alphas = {f"^{n}": _number(layer.alpha) for n, layer in layers if layer.alpha != alpha}
    settings = {"r": rank, "lora_alpha": _number(alpha), "target_modules": list(adapter.modules)}
    if ranks:
        settings["rank_pattern"] = ranks
    if alphas:
        settings["alpha_pattern"] = alphas
    return {f"unet.{name}": value for name, value in settings.items()}


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
