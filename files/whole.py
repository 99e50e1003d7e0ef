"""Full fine-tuning: the weights of the UNet themselves are what is trained (--target full).

    adapter = WholeUNet(unet)              # a float32 copy of the base's weights
    with adapter.disabled():               # the base's own, bit for bit
        ...
    save(adapter, "run/adapter")           # a UNet folder as diffusers reads it
    lora.remove(unet, adapter)             # the base again

The base's weights are kept, and are exchanged with the trained ones in place: nothing else has to
know which of the two is in the UNet.  Tested in tests/test_whole.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import nn

import lora
from command.whole_files import write_whole
from files.tensors import finite, opened, refusal

FILE_NAME, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


class WholeUNet(lora.Adapter):
    """All weights of a UNet, with the interface of an adapter.

    They are float32, whatever the base's dtype is.  No layer is wrapped, and nothing is merged.
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
        """The linear layers and convolutions, whose gradients can be split by image.  What is left
        out, biases and norms, is a thousandth of the weights.
        """
        return [m for m in self.unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{name: weight} of the UNet, detached."""
        return {name: p.detach() for name, p in self.unet.named_parameters()}

    def rank_and_alpha(self) -> tuple[None, None]:
        """A whole UNet has neither."""
        return None, None

    def untrained(self, unet: nn.Module, generator: torch.Generator | None = None) -> "WholeUNet":
        """The base's own weights."""
        return WholeUNet(unet)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the UNet has the base's weights and dtype."""
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
    """Whether a file, or a folder, has the name that diffusers gives to a UNet."""
    path = Path(path)
    return path.name == FILE_NAME or (path / FILE_NAME).is_file()


def save(adapter: WholeUNet, folder: str | Path, facts: dict[str, object] | None = None) -> Path:
    """Write a UNet folder as diffusers reads it; returns the file of the weights.

    `facts` become strings in the file's header.  Each file is there whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, adapter.unet.to_json_string())
    header = {"format": "pt"} | {k: str(v) for k, v in (facts or {}).items()}
    tensors = {k: v.contiguous().cpu() for k, v in adapter.state_dict().items()}
    return write_whole(folder / FILE_NAME, serialize(tensors, header))


def load(unet: nn.Module, path: str | Path) -> tuple[WholeUNet, dict[str, str]]:
    """Put the weights of a UNet folder, or of its file, into `unet`; returns them and the header.

    All names and shapes are compared before the first tensor is read.  Raises UserError naming the
    first that does not fit; the UNet is then unchanged.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    want = {name: tuple(p.shape) for name, p in unet.named_parameters()}
    with opened(path) as file:
        keys, header = set(file.keys()), file.metadata() or {}
        for name in sorted(keys ^ want.keys()):
            what = "lacks" if name in want else "holds a tensor that this base does not have,"
            raise refusal(path, f"is not a UNet of this base model: it {what} {name}")
        for name, shape in want.items():
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise refusal(path, f"is for another base model: {name} is {found}, not {shape}")
        tensors = {name: finite(path, name, file) for name in want}
    adapter = WholeUNet(unet)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.copy_(tensors[name])
    return adapter, header
