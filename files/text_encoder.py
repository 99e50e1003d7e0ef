"""A LoRA on the text encoder beside that of the UNet (--as-released text-encoder).

    adapter = inject(base, unet, generator)        # q, k, v and out of every attention of CLIP
    data = seen(base, data, adapter)               # captions as the adapted encoder embeds them

Both are one adapter to whoever trains, merges, switches or removes it.  What captions say to the
UNet then changes in every step, so that their embeddings cannot be kept.  Files have the keys of
diffusers and kohya (lora_files.py).  Tested in tests/test_text_encoder.py.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import lora
from diffusion import Base, Encoded, encode_captions
from files import lora_files

MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
RATE = 0.1  # of --lr: 1e-5 where the UNet has 1e-4, as released
PREFIX, OLD = "text_encoder.", "text_model."  # names in files begin so; newer libraries leave OLD


class TwoLoRA(lora.Adapter):
    """The LoRA layers of a UNet, and behind them those of a text encoder by "text_encoder.<name>".

    Rank, alpha and target are those of the UNet's part.
    """

    def __init__(self, unet: lora.Adapter, encoder: nn.Module, layers: dict[str, lora.LoRALinear]):
        both = unet.layers | {PREFIX + name: layer for name, layer in layers.items()}
        super().__init__(both, unet.target, unet.modules)
        self.unet, self.encoder = unet, encoder
        # by the names that files have
        named = {OLD + name.removeprefix(OLD): layer for name, layer in layers.items()}
        self.text = lora.Adapter(named, "text", MODULES)

    def factors(self) -> list[nn.Module]:
        """A and B of the UNet's part: whoever asks for them embeds captions once for all."""
        return self.unet.factors()

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The text encoder learns at a tenth of the rate."""
        return [(self.unet.parameters(), 1.0), (self.text.parameters(), RATE)]

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> lora.Adapter:
        """The UNet's part alone: an untrained one of the text encoder changes nothing."""
        return self.unet.untrained(unet, generator)

    def leave(self, unet: nn.Module) -> None:
        """Put the base layers of both back in place."""
        self.unet.leave(unet)
        layers = self.layers.items()
        encoder = {n.removeprefix(PREFIX): m for n, m in layers if n.startswith(PREFIX)}
        lora.Adapter(encoder, "text").leave(self.encoder)


def layers_of(encoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a plain text encoder that can be adapted, by name."""
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Linear)}


def inject(base: Base, unet: lora.Adapter, generator: torch.Generator) -> TwoLoRA:
    """Wrap the attention of the text encoder beside an adapter of the UNet, with its rank and
    alpha; A is drawn from `generator`.
    """
    encoder, (rank, alpha) = base.pipeline.text_encoder, unet.rank_and_alpha()
    names = [name for name in layers_of(encoder) if name.endswith(MODULES)]
    layers = {name: lora.wrap(encoder, name, rank, alpha) for name in names}
    for layer in layers.values():
        shape = layer.lora_A.weight.shape
        with torch.no_grad():
            layer.lora_A.weight.copy_(torch.randn(shape, generator=generator) / rank)
    return TwoLoRA(unet, encoder, layers)


def factors_of(base: Base, path: str | Path) -> dict[str, tuple]:
    """{layer: (A, B, alpha)} of the part of a file that is of the text encoder; empty if there is
    none.  Raises UserError for one that does not fit.
    """
    plain = layers_of(base.pipeline.text_encoder)
    flat = {name.removeprefix(OLD): name for name in plain}
    names = flat | {OLD + name: full for name, full in flat.items()}
    modules = {named: plain[name] for named, name in names.items()}
    found, _ = lora_files.read(path, modules, lora_files.TEXT_FORMS)
    return {names[named]: factors for named, factors in found.items()}


def hold(base: Base, unet: lora.Adapter, factors: dict[str, tuple]) -> TwoLoRA:
    """Wrap these layers of the text encoder beside an adapter of the UNet."""
    encoder, layers = base.pipeline.text_encoder, {}
    for name, (a, b, alpha) in factors.items():
        layers[name] = layer = lora.wrap(encoder, name, len(a), alpha)
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    return TwoLoRA(unet, encoder, layers)


def seen(base: Base, data: Encoded, adapter: lora.Adapter) -> Encoded:
    """The images with their captions as an adapter of the text encoder, if it is one, embeds
    them.
    """
    if not isinstance(adapter, TwoLoRA):
        return data
    return replace(data, text=encode_captions(base, data.captions))
