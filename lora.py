"""Low-rank adaptation (LoRA), written by hand: layers, injection, switch, merge and files.

A frozen layer W gets a trainable low-rank neighbour,

    y = W x + (alpha / r) B A x            Hu et al. 2022, Eq. 3;  Luo et al. 2025, Eq. 2-3

with A (r, in) Gaussian and B (out, r) zero, so an untrained adapter changes nothing.  Typical use:

    adapter = inject(unet, target="attention", rank=64, alpha=32)
    optimizer = torch.optim.AdamW(adapter.parameters())
    with adapter.disabled():               # the base model, at no cost
        ...
    adapter.save("run/adapter")

`lora_A` and `lora_B` are bias-free children called as diffusers and peft call them, so a state dict is the file.
Held by tests/test_lora.py to diffusers + peft loading the same file.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from cli import UserError, write_whole

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
KOHYA_NAME = "kohya_lora_weights.safetensors"

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TARGETS = {
    "attention": ATTENTION,  # the paper's description
    "transformer": TRANSFORMER,  # what the paper's released code adapts
    "all": (
        *TRANSFORMER,
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
    ),  # with the ResNet blocks
}


# ---------------------------------------------------------------------------------------------------------------
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
        return nn.Linear(base.in_features, rank, bias=False), nn.Linear(
            rank, base.out_features, bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.enabled or self.merged:
            return y
        if not torch.is_autocast_enabled(
            x.device.type
        ):  # which else casts the factors to the base's dtype
            x = x.to(self.lora_A.weight.dtype)
        low = self.lora_B(self.lora_A(x)).to(y.dtype)
        return torch.add(y, low, alpha=self.alpha / self.rank)  # one pass over y in place of two

    def delta(self) -> torch.Tensor:
        """(alpha / rank) B A in the shape of the base's weight."""
        product = self.lora_B.weight.flatten(1) @ self.lora_A.weight.flatten(
            1
        )  # (out, in * kh * kw)
        return self.alpha / self.rank * product.view(self.base.weight.shape)


class LoRAConv2d(LoRALinear):
    """The same for a frozen `nn.Conv2d`: A is a convolution of the base's geometry, B a 1x1 convolution."""

    @staticmethod
    def factors(base: nn.Conv2d, rank: int) -> tuple[nn.Module, nn.Module]:
        """A: (rank, in, kh, kw) with the base's stride and padding; B: (out, rank, 1, 1)."""
        a = nn.Conv2d(
            base.in_channels,
            rank,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
        )
        return a, nn.Conv2d(rank, base.out_channels, 1, bias=False)


# ---------------------------------------------------------------------------------------------------------------
# The adapter: all such layers of one UNet


class Adapter:
    """The LoRA layers of one model by module name, in the model's order."""

    def __init__(self, layers: dict[str, LoRALinear], target: str):
        self.layers, self.target = layers, target

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer; a list, since an iterator would be empty when clipping asks a second time."""
        return [
            p for layer in self.layers.values() for p in (layer.lora_A.weight, layer.lora_B.weight)
        ]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"<module>.lora_A.weight": A, "<module>.lora_B.weight": B, ...}, detached."""
        return {
            f"{name}.lora_{k}.weight": getattr(layer, f"lora_{k}").weight.detach()
            for name, layer in self.layers.items()
            for k in "AB"
        }

    def scale(self) -> tuple[int, float]:
        """(rank, alpha) of all layers; raises UserError if they differ, since diffusers' file states one of each."""
        found = {(layer.rank, layer.alpha) for layer in self.layers.values()}
        if len(found) > 1:
            raise UserError("layers of different rank or alpha can only be saved in kohya form")
        return found.pop()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model; restored on the way out, also after an error."""
        if any(layer.merged for layer in self.layers.values()):
            raise RuntimeError(
                "a merged adapter is part of the base weights: call unmerge() before disabled()"
            )
        before = [layer.enabled for layer in self.layers.values()]
        try:
            for layer in self.layers.values():
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
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

    def save(
        self, folder: str | Path, extra: dict[str, object] | None = None, kohya: bool = False
    ) -> Path:
        """Write the adapter into `folder` (diffusers form, or kohya's with `kohya`); returns the file.

        `extra` are our own facts (method, lambda, seed, ...), stored as strings beside the scale that diffusers reads.
        The file is written aside and renamed, so a killed run leaves no torn one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not kohya:
            rank, alpha = self.scale()
        if kohya:
            tensors = {}
            for name, layer in self.layers.items():
                key = "lora_unet_" + name.replace(".", "_")
                tensors[f"{key}.lora_down.weight"] = layer.lora_A.weight
                tensors[f"{key}.lora_up.weight"] = layer.lora_B.weight
                tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
        else:
            tensors = {f"unet.{k}": v for k, v in self.state_dict().items()}
        metadata = {
            "format": "pt",
            "target": self.target,
            **{k: str(v) for k, v in (extra or {}).items()},
        }
        if not kohya:
            config = {
                "unet.r": rank,
                "unet.lora_alpha": int(alpha) if alpha.is_integer() else alpha,
                "unet.target_modules": list(TARGETS[self.target]),
            }
            metadata["lora_adapter_metadata"] = json.dumps(config, sort_keys=True)
        content = serialize(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()}, metadata
        )
        return write_whole(folder / (KOHYA_NAME if kohya else FILE_NAME), content)


def inject(
    unet: nn.Module, target: str, rank: int, alpha: float, generator: torch.Generator | None = None
) -> Adapter:
    """Freeze `unet` and wrap every layer that `target` names (see `TARGETS`) in a fresh LoRA layer.

    The A matrices are drawn from `generator` in the model's order.  Raises UserError for a rank below 1 or a model
    without such layers.
    """
    if rank < 1:
        raise UserError(f"the LoRA rank must be 1 or more, not {rank}")
    names = [n for n, m in unet.named_modules() if _is_target(n, m, TARGETS[target])]
    if not names:
        raise UserError(
            f"the UNet has no layer that target '{target}' names: {', '.join(TARGETS[target])}"
        )
    unet.requires_grad_(False)
    layers = {name: _wrap(unet, name, rank, alpha) for name in names}
    if generator is not None:
        for layer in layers.values():
            weight = layer.lora_A.weight
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) / rank)
    return Adapter(layers, target)


def _is_target(name: str, module: nn.Module, suffixes: tuple[str, ...]) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) and any(
        name.endswith("." + s) for s in suffixes
    )


def _wrap(unet: nn.Module, name: str, rank: int, alpha: float) -> LoRALinear:
    base = unet.get_submodule(name)
    layer = (LoRAConv2d if isinstance(base, nn.Conv2d) else LoRALinear)(base, rank, alpha)
    parent, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent), child, layer)
    return layer


def remove(unet: nn.Module, adapter: Adapter) -> None:
    """Put the base layers back in place: the UNet is as before `inject` or `load`."""
    adapter.unmerge()
    for name, layer in adapter.layers.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.base)


# ---------------------------------------------------------------------------------------------------------------
# Reading adapters, ours and others'


def read(
    path: str | Path,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor, float]], dict[str, str]]:
    """An adapter file in diffusers or kohya form as ({key: (A, B, alpha)}, metadata).

    The keys are module names, for kohya with underscores in place of dots.  A file without a stated alpha takes
    alpha = rank, as diffusers does; peft's alpha_pattern is honoured and ranks are those of the factors.  A part for
    the text encoder is left out with a note.  Only safetensors are read: a pickle can run code.  Raises UserError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a readable safetensors adapter ({error}); pickles are not read"
        ) from None
    config = _peft_config(path, metadata)
    found, used = {}, set()
    for key, a in tensors.items():
        if key.startswith("unet.") and key.endswith(".lora_A.weight"):
            name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            second, alpha = f"unet.{name}.lora_B.weight", _alpha(config, name)
        elif key.startswith("lora_unet_") and key.endswith(".lora_down.weight"):
            stem = key.removesuffix(".lora_down.weight")
            name = stem.removeprefix("lora_unet_")
            second, alpha = f"{stem}.lora_up.weight", tensors.get(f"{stem}.alpha")
            used.add(f"{stem}.alpha")
        else:
            continue
        if second not in tensors:
            raise UserError(f"{path} has the first factor of {name} but not the second")
        if a.ndim < 2 or a.numel() == 0:
            raise UserError(
                f"{path} has a first factor of shape {tuple(a.shape)} for {name}: no LoRA"
            )
        found[name] = (
            a,
            tensors[second],
            _scale(path, name, a.shape[0] if alpha is None else alpha),
        )
        used |= {key, second}
    if not found:
        raise UserError(f"{path} holds no UNet LoRA in diffusers or kohya form")
    others = [key for key in tensors if not key.startswith(("unet.", "lora_unet_"))]
    if others:
        print(
            f"note: {path} also adapts what is not the UNet ({len(others)} tensors, such as {others[0]}): not read"
        )
    for key in (
        tensors
    ):  # a lone second factor, DoRA's magnitudes, ...: leaving them out would be another model
        if key.startswith(("unet.", "lora_unet_")) and key not in used:
            raise UserError(
                f"{path} holds {key}, which is no part of a plain LoRA in diffusers or kohya form"
            )
    return found, metadata


def _peft_config(path: Path, metadata: dict[str, str]) -> dict:
    """The peft settings that diffusers stores in the header; raises UserError for those that change the formula."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} has a damaged header: lora_adapter_metadata is not JSON ({error})"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("unet.alpha_pattern") or {}, dict):
        raise UserError(
            f"{path} has a damaged header: lora_adapter_metadata is not an object of settings"
        )
    for name in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if config.get(f"unet.{name}"):
            raise UserError(
                f"{path} was made with {name}, which is no plain LoRA: it cannot be read here"
            )
    return config


def _alpha(config: dict, name: str):
    """alpha of a module: the first pattern that its name ends with (peft's rule), else that of all, else None."""
    for pattern, alpha in (config.get("unet.alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return alpha
        except re.error:
            continue
    return config.get("unet.lora_alpha")


def _scale(path: Path, name: str, alpha) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path} states no usable alpha for {name}: {alpha!r:.60}")
    return value


def load(unet: nn.Module, path: str | Path) -> tuple[Adapter, dict[str, str]]:
    """Inject the adapter of a file into `unet`; returns it and the file's metadata.

    Everything is checked before the model is touched.  Raises UserError naming the first layer that does not fit.
    """
    found, metadata = read(path)
    modules = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    dotted = {n.replace(".", "_"): n for n in modules}
    plan = {}
    for key, (a, b, alpha) in found.items():
        name = key if key in modules else dotted.get(key)
        if name is None:
            raise UserError(f"{path} adapts the layer {key}, which this base model does not have")
        rank, kind = a.shape[0], LoRAConv2d if isinstance(modules[name], nn.Conv2d) else LoRALinear
        want = tuple(f.weight.shape for f in kind.factors(modules[name], rank))
        if (a.shape, b.shape) != want:
            raise UserError(
                f"{path} does not fit this base model: {name} has factors {tuple(a.shape)} and {tuple(b.shape)}, "
                f"the model wants {tuple(want[0])} and {tuple(want[1])}"
            )
        plan[name] = (a, b, rank, alpha)
    unet.requires_grad_(False)
    layers = {}
    for name in (n for n in modules if n in plan):
        a, b, rank, alpha = plan[name]
        layers[name] = layer = _wrap(unet, name, rank, alpha)
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
    suffixes = {n for n in layers if not _is_target(n, modules[n], ATTENTION)}
    narrow = all(_is_target(n, modules[n], TRANSFORMER) for n in suffixes)
    target = "attention" if not suffixes else "transformer" if narrow else "all"
    return Adapter(layers, target), metadata
