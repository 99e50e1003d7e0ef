"""Gradients of single images, from one backward pass over a batch of them."""

from collections.abc import Iterator

import torch
from torch import nn


class PerImage:
    """Inside, gradients of modules' weights for each image of a batch, from one backward pass.

        with PerImage(adapter.factors()) as per_image:
            value = f(model(x)).sum()                  # the rows of an image follow one another
            for g in per_image.gradients(value, 8):    # (8, out, in) per module, in their order

    A weight's gradient from one image is the sum over positions of what its layer was given times
    what came back for that image.
    """

    def __init__(self, factors: list[nn.Module]):
        self.factors = factors
        self.seen: dict[nn.Module, tuple] = {}  # factor -> (what it was given, what it gave)

    def __enter__(self) -> "PerImage":
        self.hooks = [factor.register_forward_hook(self._note) for factor in self.factors]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, factor, given, gave) -> None:
        self.seen[factor] = given[0].detach(), gave

    def gradients(self, value: torch.Tensor, images: int) -> Iterator[torch.Tensor]:
        """d value / d weight split by image: (images, out, in * kernel) for each module."""
        came_back = torch.autograd.grad(value, [self.seen[f][1] for f in self.factors])
        for factor, back in zip(self.factors, came_back, strict=True):
            given = self.seen[factor][0]
            if hasattr(factor, "kernel_size"):  # a convolution
                shape = factor.kernel_size, factor.dilation, factor.padding, factor.stride
                given = nn.functional.unfold(given, *shape).transpose(1, 2)
                back = back.flatten(2).transpose(1, 2)
            given, back = (x.float().reshape(images, -1, x.shape[-1]) for x in (given, back))
            yield torch.einsum("bpo,bpi->boi", back, given)
