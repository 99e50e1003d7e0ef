"""Low-rank adaptation (LoRA), written by hand: layers, injection, switch and merge.

A frozen layer W gets a trainable low-rank neighbour,

    y = W x + (alpha / r) B A x            Hu et al. 2022, Eq. 3;  Luo et al. 2025, Eq. 2-3

with A (r, in) Gaussian and B (out, r) zero, so an untrained adapter changes nothing.  Typical use:

    adapter = inject(unet, target="attention", rank=64, alpha=32)
    optimizer = torch.optim.AdamW(adapter.parameters())
    with adapter.disabled():               # the base model, at no cost
        ...
    lora_writing.save(adapter, "run/adapter")

`lora_A` and `lora_B` are bias-free children called as diffusers and peft call them, so a state dict
is the file.  Tested in tests/test_lora.py against the merged model and against the plain one.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
TARGETS = {
    "attention": ATTENTION,  # the paper's description
    "transformer": TRANSFORMER,  # what the paper's released code adapts
    "all": (*TRANSFORMER, *RESNET),
}


# --------------------------------------------------------------------------------------------------
# Layers


class LoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A x for a frozen `nn.Linear`: x (..., in) -> y (..., out).

    The base keeps its dtype; A and B are float32, and their product is cast to the base's output.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, float(alpha)
        self.enabled, self.merged = True, False
        self.lora_A, self.lora_B = self.factors(base, rank)
        self.to(base.weight.device)
        self.lora_A.float().requires_grad_(True)
        self.lora_B.float().requires_grad_(True)
        base.requires_grad_(False)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    @staticmethod
    def factors(base: nn.Linear, rank: int) -> tuple[nn.Module, nn.Module]:
        """A: in -> rank and B: rank -> out."""
        a = nn.Linear(base.in_features, rank, bias=False)
        return a, nn.Linear(rank, base.out_features, bias=False)

    @staticmethod
    def shapes(base: nn.Linear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B, without building them."""
        return (rank, base.in_features), (base.out_features, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.enabled or self.merged:
            return y
        if not torch.is_autocast_enabled(x.device.type):  # it casts the factors to the base's dtype
            x = x.to(self.lora_A.weight.dtype)
        low = self.lora_B(self.lora_A(x)).to(y.dtype)
        return torch.add(y, low, alpha=self.alpha / self.rank)  # one pass over y in place of two

    def delta(self) -> torch.Tensor:
        """(alpha / rank) B A in the shape of the base's weight."""
        a, b = self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)
        return self.alpha / self.rank * (b @ a).view(self.base.weight.shape)


class LoRAConv2d(LoRALinear):
    """The same for a frozen `nn.Conv2d`: A is a convolution of its geometry, B a 1x1
    convolution.
    """

    @staticmethod
    def factors(base: nn.Conv2d, rank: int) -> tuple[nn.Module, nn.Module]:
        """A with the base's kernel, stride, padding and dilation; B: rank -> out, 1x1."""
        window = (base.kernel_size, base.stride, base.padding, base.dilation)
        a = nn.Conv2d(base.in_channels, rank, *window, bias=False)
        return a, nn.Conv2d(rank, base.out_channels, 1, bias=False)

    @staticmethod
    def shapes(base: nn.Conv2d, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rank, in, kh, kw) and (out, rank, 1, 1)."""
        return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)


def layer_class(base: nn.Module) -> type[LoRALinear]:
    """The LoRA layer for a linear layer or a convolution."""
    return LoRAConv2d if isinstance(base, nn.Conv2d) else LoRALinear


# --------------------------------------------------------------------------------------------------
# The adapter: all such layers of one UNet


class Adapter:
    """The LoRA layers of one model by module name, in the model's order.

    `target` is the smallest of `TARGETS` that holds them all.  `modules` are the endings that name
    these layers and no others of the model: those of the target, or, for an adapter that covers
    only a part of it, the layers' full names.
    """

    def __init__(self, layers: dict[str, LoRALinear], target: str, modules: tuple[str, ...] = ()):
        self.layers, self.target, self.modules = layers, target, modules

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer; a list, since it is iterated twice."""
        layers = self.layers.values()
        return [p for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)]

    def factors(self) -> list[nn.Module]:
        """A and B of every layer, as modules."""
        return [f for layer in self.layers.values() for f in (layer.lora_A, layer.lora_B)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters by name, detached: what a training state holds."""
        return self.state_dict()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"<module>.lora_A.weight": A, "<module>.lora_B.weight": B, ...}, detached."""
        return {
            f"{name}.lora_{k}.weight": getattr(layer, f"lora_{k}").weight.detach()
            for name, layer in self.layers.items()
            for k in "AB"
        }

    def rank_and_alpha(self) -> tuple[int, float]:
        """(rank, alpha) of all layers; of most layers, where they differ."""
        found = Counter((layer.rank, layer.alpha) for layer in self.layers.values())
        return found.most_common(1)[0][0]

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> "Adapter":
        """An adapter of the same layers in a plain `unet`, before its first step; of one rank."""
        layer = next(iter(self.layers.values()))
        return inject(unet, self.target, layer.rank, layer.alpha, generator)

    def leave(self, unet: nn.Module) -> None:
        """Put the base layers back in place."""
        for name, layer in self.layers.items():
            _replace(unet, name, layer.base)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model; restored on the way out, also after an error."""
        layers = self.layers.values()
        if any(layer.merged for layer in layers):
            raise RuntimeError("call unmerge() before disabled(): the base holds a merged adapter")
        before = [layer.enabled for layer in layers]
        try:
            for layer in layers:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(layers, before, strict=True):
                layer.enabled = enabled

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter into the base weights: the same outputs, no extra work."""
        for layer in self.layers.values():
            if not layer.merged:
                layer.base.weight += layer.delta().to(layer.base.weight.dtype)
                layer.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out of the base weights again (to rounding)."""
        for layer in self.layers.values():
            if layer.merged:
                layer.base.weight -= layer.delta().to(layer.base.weight.dtype)
                layer.merged = False

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, the adapter is in the base weights, which saves its part of a forward without
        gradient; after it they have the same bits as before.

        Layers that are merged already or switched off are left alone, and so are those in half
        precision, whose rounding is as large as what the adapter adds.
        """
        layers = [
            layer
            for layer in self.layers.values()
            if layer.enabled and not layer.merged and layer.base.weight.dtype == torch.float32
        ]
        before = [layer.base.weight for layer in layers]
        with torch.no_grad():
            for layer in layers:
                weight = layer.base.weight
                changed = weight + layer.delta().to(weight.dtype)
                layer.base.weight = nn.Parameter(changed, requires_grad=False)
                layer.merged = True
        try:
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.base.weight, layer.merged = weight, False


# --------------------------------------------------------------------------------------------------
# Into a UNet and out of it


def layer_names(unet: nn.Module, target: str) -> list[str]:
    """The linear layers and convolutions of a plain `unet` that `target` names, in its order."""
    endings = tuple(f".{ending}" for ending in TARGETS[target])
    modules = unet.named_modules()
    return [n for n, m in modules if isinstance(m, nn.Linear | nn.Conv2d) and n.endswith(endings)]


def inject(
    unet: nn.Module, target: str, rank: int, alpha: float, generator: torch.Generator | None = None
) -> Adapter:
    """Freeze `unet` and wrap every layer that `target` names (see `TARGETS`) in a fresh LoRA layer.

    The A matrices are drawn from `generator` in the model's order.  Raises ValueError for a rank
    below 1 or a model without such layers.
    """
    if rank < 1:
        raise ValueError(f"the LoRA rank must be 1 or more, not {rank}")
    names = layer_names(unet, target)
    if not names:
        endings = ", ".join(TARGETS[target])
        raise ValueError(f"the UNet has no layer that target '{target}' names: {endings}")
    unet.requires_grad_(False)
    layers = {name: wrap(unet, name, rank, alpha) for name in names}
    if generator is not None:
        for layer in layers.values():
            weight = layer.lora_A.weight
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / rank)
    return Adapter(layers, target, TARGETS[target])


def wrap(unet: nn.Module, name: str, rank: int, alpha: float) -> LoRALinear:
    """Put a fresh LoRA layer around one module of `unet`; returns it."""
    base = unet.get_submodule(name)
    layer = layer_class(base)(base, rank, alpha)
    _replace(unet, name, layer)
    return layer


def remove(unet: nn.Module, adapter: Adapter) -> None:
    """Take the adapter out: the UNet is as before `inject` or `lora_files.load`."""
    adapter.unmerge()
    adapter.leave(unet)


def _replace(unet: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)
