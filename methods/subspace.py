"""The adapter of --method dp: of every layer only a core between public directions is trained.

    dW = U R V        U (out, k) and V (k, in) frozen, R (k, k) trained

U and V are the directions in which the base moved when it was adapted to public pictures, and R
starts where those updates were on average (methods/directions.py).  Directions along which they
moved far are longer, so that a step along them goes farther.  The private images choose a point in
that subspace and can write nothing outside it: 1,760 numbers in place of 4.2 million for the
embedded model, with k = 4.  B = U R and A = V make it a plain LoRA of rank k, which is how it is
saved.

Training in a public subspace is Yu et al. 2021 (arXiv 2102.12677); a small trained core between
frozen factors is LoRA-XS (Balazy et al. 2024, arXiv 2405.17604), there with the base's own
directions.  Tested in tests/test_subspace.py.
"""

from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from torch.nn import functional as F

import lora
from command.errors import UserError
from command.whole_files import write_whole


class Directions(NamedTuple):
    """Of one layer."""

    left: torch.Tensor  # U (out, k)
    right: torch.Tensor  # V (k, in, ...)
    start: torch.Tensor  # R (k, k) before the first step

    def leading(self, k: int) -> "Directions":
        """The first k, or all where there are fewer."""
        return Directions(self.left[:, :k], self.right[:k], self.start[:k, :k])


class Core(nn.Module):
    """U R in the place of B: (..., k) -> (..., out), of a convolution with channels second."""

    def __init__(self, left: torch.Tensor, start: torch.Tensor, convolution: bool):
        super().__init__()
        self.register_buffer("left", left)
        self.convolution = convolution
        if convolution:  # as an nn.Conv2d says it
            self.kernel_size, self.stride, self.padding, self.dilation = 1, 1, 0, 1
        self.core = nn.Parameter(start.clone())

    @property
    def weight(self) -> torch.Tensor:
        """U R in the shape of B's weight."""
        weight = self.left @ self.core
        return weight[:, :, None, None] if self.convolution else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (F.conv2d if self.convolution else F.linear)(x, self.weight)


class CoreAdapter(lora.Adapter):
    """An adapter whose parameters are the cores."""

    def parameters(self) -> list[nn.Parameter]:
        """R of every layer."""
        return [layer.lora_B.core for layer in self.layers.values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """{"<module>.core": R, ...}, detached: what a training state holds."""
        return {f"{name}.core": layer.lora_B.core.detach() for name, layer in self.layers.items()}


class EachImage:
    """Inside, gradients of the cores for each image of a batch, from one backward pass.

        with adapter.folded(), EachImage(adapter) as each:
            value = f(unet(x)).sum()                   # the rows of an image follow one another
            every = each.gradients(value, 8)           # (8, k, k) per layer, in their order

    dL/dR = sum over positions of (U^T dL/dy) (V x)^T: what a layer was given, x, and what came back
    to it are enough.  So the forward can be that of the base with the adapter folded in.
    """

    def __init__(self, adapter: CoreAdapter):
        self.layers = list(adapter.layers.values())
        self.seen: dict[nn.Module, tuple] = {}  # layer -> (V x, y)

    def __enter__(self) -> "EachImage":
        self.hooks = [layer.base.register_forward_hook(self._note(layer)) for layer in self.layers]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, layer: lora.LoRALinear):
        def note(_, given, y):
            if not y.requires_grad:  # nothing before this layer is trained
                y.requires_grad_(True)
            with torch.no_grad():
                self.seen[layer] = layer.lora_A(given[0].to(layer.lora_A.weight.dtype)), y

        return note

    def gradients(self, value: torch.Tensor, images: int) -> list[torch.Tensor]:
        """d value / dR split by image: (images, k, k) for each layer."""
        found = []
        came_back = torch.autograd.grad(value, [self.seen[layer][1] for layer in self.layers])
        for layer, back in zip(self.layers, came_back, strict=True):
            ends = [x.to(layer.lora_B.left.dtype) for x in (back, self.seen[layer][0])]
            if layer.lora_B.convolution:
                ends = [x.flatten(2).transpose(1, 2) for x in ends]
            back, given = (x.reshape(images, -1, x.shape[-1]) for x in ends)
            found.append((back @ layer.lora_B.left).transpose(1, 2) @ given)
        return found


def inject(unet: nn.Module, directions: dict[str, Directions], target: str) -> CoreAdapter:
    """Freeze `unet` and wrap every layer that `target` names in a layer with a core.

    Raises ValueError if the directions are not those of these layers.
    """
    names, rank = lora.layer_names(unet, target), len(next(iter(directions.values())).start)
    if set(names) != set(directions):
        raise ValueError("its directions are those of other layers")
    for name in names:
        base = unet.get_submodule(name)
        b, a = (lora.layer_class(base).shapes(base, rank)[i] for i in (1, 0))
        left, right, _ = directions[name]
        if (*left.shape,) != b[:2] or (*right.shape,) != a:
            raise ValueError(f"its directions of {name} are {tuple(left.shape)}, not {b[:2]}")
    plain = lora.inject(unet, target, rank, rank)  # so that alpha / rank is 1
    for name, layer in plain.layers.items():
        of_layer = (d.to(layer.base.weight.device).float() for d in directions[name])
        left, right, start = of_layer
        with torch.no_grad():
            layer.lora_A.weight.copy_(right)
        layer.lora_B = Core(left, start, isinstance(layer.lora_B, nn.Conv2d))
    return CoreAdapter(plain.layers, plain.target, plain.modules)


# --------------------------------------------------------------------------------------------------
# The directions


def directions_of(updates: list[dict[str, torch.Tensor]], k: int) -> dict[str, Directions]:
    """The leading k left and right singular vectors of several updates of every layer, each as long
    as the root of its singular value, and the cores of the updates' mean.

    `updates` hold dW (out, in, ...) by layer, one of them per public set; all count as much as they
    are large.  The scale of all lengths is such that |u_i| |v_j| is 1 on average over all cores.
    Raises ValueError for a k that a layer does not have.
    """
    found = {}
    for name, first in updates[0].items():
        matrices = [update[name].flatten(1) for update in updates]
        if k > min(matrices[0].shape):
            raise ValueError(f"{name} has no {k} directions")
        left, far, _ = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
        _, wide, right = torch.linalg.svd(torch.cat(matrices, 0), full_matrices=False)
        left, right = left[:, :k], right[:k]
        core = left.T @ (sum(matrices) / len(matrices)) @ right.T
        found[name] = left, right.view(k, *first.shape[1:]), core, far[:k].sqrt(), wide[:k].sqrt()
    products = [torch.outer(far, wide) for *_, far, wide in found.values()]
    scale = torch.stack(products).mean().sqrt().clamp_min(1e-30)
    for name, (left, right, core, *lengths) in found.items():
        far, wide = ((length / scale).clamp_min(1e-6) for length in lengths)
        right = right * wide.view(k, *[1] * (right.ndim - 1))
        found[name] = Directions(left * far, right, core / torch.outer(far, wide))
    return found


def save(directions: dict[str, Directions], target: str, path, facts: dict) -> None:
    """One safetensors file, in half precision."""
    tensors = {
        f"{name}.{part}": tensor.half().contiguous()
        for name, of_layer in directions.items()
        for part, tensor in of_layer._asdict().items()
    }
    header = {"target": target} | {key: str(value) for key, value in facts.items()}
    write_whole(path, serialize(tensors, header))


def load(path) -> tuple[dict[str, Directions], str]:
    """(directions, target) of a file; raises UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            target = (file.metadata() or {})["target"]
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        found = {
            name: Directions(*(tensors[f"{name}.{part}"] for part in Directions._fields))
            for name in names
        }
        if target not in lora.TARGETS or not found:
            raise KeyError("target")
        if len({d.start.shape for d in found.values()}) > 1:
            raise KeyError("one rank")
        return found, target
    except (SafetensorError, OSError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} holds no directions ({error}): python -m methods.directions makes them"
        ) from None
