"""Full fine-tuning: the weights of the UNet themselves are what is trained (--target full).

    adapter = WholeUNet(unet)              # float32 weights that are the base's until they move
    with adapter.disabled():               # the base's own, bit for bit
        ...
    save(adapter, "run/adapter")           # a UNet folder as diffusers reads it
    lora.remove(unet, adapter)             # the base again

The base's weights are kept aside and change places with the trained ones, so that nothing else has
to know which of the two is in the UNet.  Tested in tests/test_whole.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

import lora
from command.errors import UserError, shown
from command.whole_files import write_whole

FILE_NAME, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
LARGEST = 1e30  # numbers beyond this overflow float32 a few products later


class WholeUNet(lora.Adapter):
    """All weights of a UNet, with the interface of an adapter.

    The trained ones are float32 whatever the base is in; there is nothing to merge, and no layer
    is wrapped.
    """

    def __init__(self, unet: nn.Module):
        super().__init__({}, "full")
        self.unet = unet
        self.base = [p.data for p in unet.parameters()]
        for p in unet.parameters():
            p.data = p.data.to(torch.float32, copy=True)
            p.requires_grad_(True)

    def parameters(self) -> list[nn.Parameter]:
        """Every weight and bias of the UNet."""
        return list(self.unet.parameters())

    def factors(self) -> list[nn.Module]:
        """The linear layers and convolutions, whose gradients are known per image; the biases and
        the scales of the norms are a thousandth of the weights.
        """
        return [m for m in self.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{name: weight} of the UNet, detached."""
        return {name: p.detach() for name, p in self.unet.named_parameters()}

    def rank_and_alpha(self) -> tuple[None, None]:
        """It has neither."""
        return None, None

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> "WholeUNet":
        """The base's own weights, as they are before the first step."""
        return WholeUNet(unet)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the UNet has the base's weights and dtype; after it the trained ones."""
        trained = [p.data for p in self.unet.parameters()]
        self._hold(self.base)
        try:
            yield
        finally:
            self._hold(trained)

    def leave(self, unet: nn.Module) -> None:
        """Put the base's weights back, frozen."""
        self._hold(self.base)
        unet.requires_grad_(False)

    def _hold(self, weights: list[torch.Tensor]) -> None:
        for p, weight in zip(self.unet.parameters(), weights, strict=True):
            p.data = weight


# --------------------------------------------------------------------------------------------------
# Files


def is_one(path: str | Path) -> bool:
    """Whether a folder, or a file, is of a whole UNet as diffusers names it."""
    path = Path(path)
    return path.name == FILE_NAME or (path / FILE_NAME).is_file()


def save(adapter: WholeUNet, folder: str | Path, extra: dict[str, object] | None = None) -> Path:
    """Write a UNet folder as diffusers reads it; returns the file of the weights.

    `extra` are our own facts, strings in the file's header.  Each file is there whole or not at
    all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, adapter.unet.to_json_string())
    facts = {"format": "pt"} | {k: str(v) for k, v in (extra or {}).items()}
    tensors = {k: v.contiguous().cpu() for k, v in adapter.state_dict().items()}
    return write_whole(folder / FILE_NAME, serialize(tensors, facts))


def load(unet: nn.Module, path: str | Path) -> tuple[WholeUNet, dict[str, str]]:
    """Put the weights of a UNet folder, or of its file, into `unet`; returns them and the header.

    All names and shapes are compared before the first tensor is read.  Raises UserError naming the
    first that does not fit; the UNet is then as before.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    want = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            shapes = {k: tuple(file.get_slice(k).get_shape()) for k in keys & want.keys()}
            for name in sorted(keys ^ want.keys()):
                what = "lacks" if name in want else "holds a tensor that this base has not,"
                raise UserError(shown(f"{path} is no UNet of this base model: it {what} {name}"))
            for name, shape in shapes.items():
                if shape != want[name]:
                    sizes = f"{shape}, not {want[name]}"
                    raise UserError(shown(f"{path} is of another base model: {name} is {sizes}"))
            tensors = {name: _finite(path, name, file) for name in want}
    except (SafetensorError, OSError) as error:
        raise UserError(shown(f"{path} is not a readable safetensors file ({error})")) from None
    adapter = WholeUNet(unet)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(tensors[name])
    return adapter, metadata


def _finite(path: Path, name: str, file) -> torch.Tensor:
    tensor = file.get_tensor(name).float()
    if tensor.numel() and not tensor.abs().max() < LARGEST:  # so also for NaN
        what = f"{name} holds NaN, infinite or absurdly large numbers"
        raise UserError(shown(f"{path} is damaged: {what}"))
    return tensor
