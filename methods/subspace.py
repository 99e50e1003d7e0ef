"""The adapter of --method dp: of every layer only a core between public directions is trained.

    dW = U R V        U (out, k) and V (k, in) frozen, R (k, k) trained, zero at first

U and V are the directions in which the base moved when it was adapted to public pictures
(methods/directions.py).  The private images choose a point in that subspace and can write nothing
outside it: 21,560 numbers in place of 4.2 million for the embedded model, with k = 14.  B = U R and
A = V make it a plain LoRA of rank k, which is how it is saved.

Training in a public subspace is Yu et al. 2021 (arXiv 2102.12677); a small trained core between
frozen factors is LoRA-XS (Balazy et al. 2024, arXiv 2405.17604), there with the base's own
directions.  Tested in tests/test_subspace.py.
"""

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.nn import functional as F

import lora
from command.errors import UserError
from command.whole_files import write_whole

Directions = dict[str, tuple[torch.Tensor, torch.Tensor]]  # layer -> U (out, k), V (k, in, ...)


class Core(nn.Module):
    """U R in the place of B: (..., k) -> (..., out), of a convolution with channels second."""

    def __init__(self, left: torch.Tensor, convolution: bool):
        super().__init__()
        self.register_buffer("left", left)
        self.convolution = convolution
        if convolution:  # as an nn.Conv2d says it
            self.kernel_size, self.stride, self.padding, self.dilation = 1, 1, 0, 1
        self.core = nn.Parameter(torch.zeros(left.shape[1], left.shape[1], device=left.device))

    @property
    def weight(self) -> torch.Tensor:
        """U R in the shape of B's weight."""
        weight = self.left @ self.core
        return weight[:, :, None, None] if self.convolution else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.conv2d if self.convolution else F.linear)(x, self.weight)

    def to_parameter(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradients (images, out, k) of U R as those of R, (images, k, k)."""
        return self.left.T @ gradient


class CoreAdapter(lora.Adapter):
    """An adapter whose parameters are the cores."""

    def parameters(self) -> list[nn.Parameter]:
        """R of every layer."""
        return [module.core for module in self.trained()]

    def trained(self) -> list[Core]:
        """The modules that hold the parameters."""
        return [layer.lora_B for layer in self.layers.values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """{"<module>.core": R, ...}, detached: what a training state holds."""
        return {f"{name}.core": layer.lora_B.core.detach() for name, layer in self.layers.items()}


def inject(unet: nn.Module, directions: Directions, target: str) -> CoreAdapter:
    """Freeze `unet` and wrap every layer that `target` names in a layer with a core.

    Raises ValueError if the directions are not those of these layers.
    """
    names, rank = lora.layer_names(unet, target), next(iter(directions.values()))[0].shape[1]
    if set(names) != set(directions):
        raise ValueError("its directions are those of other layers")
    for name in names:
        base = unet.get_submodule(name)
        b, a = (lora.layer_class(base).shapes(base, rank)[i] for i in (1, 0))
        left, right = directions[name]
        if (*left.shape,) != b[:2] or (*right.shape,) != a:
            raise ValueError(f"its directions of {name} are {tuple(left.shape)}, not {b[:2]}")
    plain = lora.inject(unet, target, rank, rank)  # so that alpha / rank is 1
    for name, layer in plain.layers.items():
        left, right = (d.to(layer.base.weight.device).float() for d in directions[name])
        with torch.no_grad():
            layer.lora_A.weight.copy_(right)
        layer.lora_B = Core(left, isinstance(layer.lora_B, nn.Conv2d))
    return CoreAdapter(plain.layers, plain.target, plain.modules)


# --------------------------------------------------------------------------------------------------
# The directions


def directions_of(updates: list[dict[str, torch.Tensor]], rank: int) -> Directions:
    """The leading `rank` left and right singular vectors of several updates of every layer.

    `updates` hold dW (out, in, ...) by layer, one of them per public set; all count as much as they
    are large.  Raises ValueError for a rank that a layer does not have.
    """
    found = {}
    for name, first in updates[0].items():
        matrices = [update[name].flatten(1) for update in updates]
        if rank > min(matrices[0].shape):
            raise ValueError(f"{name} has no {rank} directions")
        left = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)[0][:, :rank]
        right = torch.linalg.svd(torch.cat(matrices, 0), full_matrices=False)[2][:rank]
        found[name] = left.contiguous(), right.view(rank, *first.shape[1:]).contiguous()
    return found


def leading(directions: Directions, rank: int) -> Directions:
    """The first `rank` directions of every layer, or all where there are fewer."""
    return {name: (left[:, :rank], right[:rank]) for name, (left, right) in directions.items()}


def save(directions: Directions, target: str, path, facts: dict) -> None:
    """One safetensors file, in half precision."""
    tensors = {}
    for name, (left, right) in directions.items():
        tensors[f"{name}.left"], tensors[f"{name}.right"] = left.half(), right.half()
    header = {"target": target} | {key: str(value) for key, value in facts.items()}
    write_whole(path, serialize({k: t.contiguous() for k, t in tensors.items()}, header))


def load(path) -> tuple[Directions, str]:
    """(directions, target) of a file; raises UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            target = (file.metadata() or {})["target"]
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        found = {name: (tensors[f"{name}.left"], tensors[f"{name}.right"]) for name in names}
        if target not in lora.TARGETS or not found:
            raise KeyError("target")
        if len({left.shape[1] for left, _ in found.values()}) > 1:
            raise KeyError("one rank")
        return found, target
    except (SafetensorError, OSError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} holds no directions ({error}): python -m methods.directions makes them"
        ) from None
