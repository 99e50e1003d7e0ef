"""The LoRA of others that adapts the text encoder as well as the UNet: read, evaluated, removed.

    adapter, header = load(base, path)       # a TwoLoRA if the file has such a part
    data = seen(base, data, adapter)         # captions as the adapted text encoder embeds them

Both parts are one adapter, which is merged, switched and removed as one.
Tested in tests/test_text_encoder.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import lora
from diffusion import Base, Encoded, encode_captions
from files import lora_files
from files.lora_files import TEXT_ENCODER, TEXT_MODEL


class TwoLoRA(lora.Adapter):
    """The LoRA layers of a UNet, and behind them those of a text encoder, "text_encoder.<name>".

    Rank, alpha and target are those of the UNet's part.
    """

    def __init__(self, unet: lora.Adapter, encoder: nn.Module, text: dict[str, lora.LoRALinear]):
        layers = {TEXT_ENCODER + name: layer for name, layer in text.items()}
        super().__init__(unet.layers | layers, unet.target, unet.modules)
        self.unet, self.encoder, self.text = unet, encoder, text

    def factors(self) -> list[nn.Module]:
        """A and B of the UNet's part: attacks that ask for them embed each caption once."""
        return self.unet.factors()

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> lora.Adapter:
        """The UNet's part alone: an untrained one of the text encoder changes nothing."""
        return self.unet.untrained(unet, generator)

    def leave(self, unet: nn.Module) -> None:
        """Put the base layers of both back in place."""
        self.unet.leave(unet)
        lora.Adapter(self.text, "text").leave(self.encoder)


def load(base: Base, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Put the LoRA of a file or folder into a plain base; returns it and the file's header.

    Everything is checked before the model is changed.  Raises UserError.
    """
    encoder = base.pipeline.text_encoder
    names = {TEXT_ENCODER + n.removeprefix(TEXT_MODEL + "."): n for n, _ in encoder.named_modules()}
    linear = lora_files.layers_of(encoder)
    modules = {listed: linear[name] for listed, name in names.items() if name in linear}
    factors, header = lora_files.read(path, lora_files.layers_of(base.unet) | modules)
    adapter = lora_files.inject(base.unet, factors)
    text = {name: factors[listed] for listed, name in names.items() if listed in factors}
    if not text:
        return adapter, header
    layers = {name: lora_files.wrap(encoder, name, given) for name, given in text.items()}
    return TwoLoRA(adapter, encoder, layers), header


def seen(base: Base, data: Encoded, adapter: lora.Adapter) -> Encoded:
    """The images with their captions embedded by the adapter, if it adapts the text encoder."""
    if not isinstance(adapter, TwoLoRA):
        return data
    return replace(data, text=encode_captions(base, data.captions))
