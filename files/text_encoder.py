"""The LoRA of others that adapts text encoders as well as the UNet: read, evaluated, removed.

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
from files import lora_files, sdxl
from files.lora_files import TEXT_ENCODER, TEXT_ENCODER_2, TEXT_MODEL

FIRST = (TEXT_ENCODER, TEXT_ENCODER_2)


class TwoLoRA(lora.Adapter):
    """The LoRA layers of a UNet, and behind them those of text encoders, "text_encoder.<name>".

    `encoders` are the text encoders by what stands before their names.  Rank, alpha and target are
    those of the UNet's part.
    """

    def __init__(
        self, unet: lora.Adapter, encoders: dict[str, nn.Module], text: dict[str, lora.LoRALinear]
    ):
        super().__init__(unet.layers | text, unet.target, unet.modules)
        self.unet, self.encoders, self.text = unet, encoders, text

    def factors(self) -> list[nn.Module]:
        """A and B of the UNet's part: attacks that ask for them embed each caption once."""
        return self.unet.factors()

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> lora.Adapter:
        """The UNet's part alone: an untrained one of the text encoder changes nothing."""
        return self.unet.untrained(unet, generator)

    def leave(self, unet: nn.Module) -> None:
        """Put the base layers of all back in place."""
        self.unet.leave(unet)
        for first, encoder in self.encoders.items():
            own = {k.removeprefix(first): x for k, x in self.text.items() if k.startswith(first)}
            lora.Adapter(own, "text").leave(encoder)


def load(base: Base, path: str | Path) -> tuple[lora.Adapter, dict[str, str]]:
    """Put the LoRA of a file or folder into a plain base; returns it and the file's header.

    Everything is checked before the model is changed.  Raises UserError.
    """
    encoders = {n: e for n, (_, e) in zip(FIRST, sdxl.encoders(base.pipeline), strict=False)}
    places, modules = {}, lora_files.layers_of(base.unet)  # listed: (encoder, name, its own key)
    for first, encoder in encoders.items():
        for name, module in lora_files.layers_of(encoder).items():
            listed = first + name.removeprefix(TEXT_MODEL + ".")
            places[listed], modules[listed] = (encoder, name, first + name), module
    factors, header = lora_files.read(path, modules)
    adapter, text = lora_files.inject(base.unet, factors), {}
    for listed, (encoder, name, key) in places.items():
        if listed in factors:
            text[key] = lora_files.wrap(encoder, name, factors[listed])
    return (TwoLoRA(adapter, encoders, text) if text else adapter), header


def seen(base: Base, data: Encoded, adapter: lora.Adapter) -> Encoded:
    """The images with their captions embedded by the adapter, if it adapts the text encoder."""
    if not isinstance(adapter, TwoLoRA):
        return data
    text = encode_captions(base, data.captions)
    return replace(data, text=sdxl.framed_as(base, text, data.text))
