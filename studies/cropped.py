"""LoRA on random crops, a baseline that no flag of train.py makes: the row lora-crop of
studies/defences.py.

A member in a batch is one of sixteen crops of it, each a square of 70 to 100 % of its area, half of
them mirrored.  Tested in tests/test_leaving_out.py.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torchvision.transforms.v2.functional import resized_crop

from algorithm import Batch, Run, Shuffled
from diffusion import Base, Encoded, encode_images, prediction_target
from lora import Adapter
from settings import Settings
from train import train_adapter

CROPS = 16  # of an image, encoded beforehand
AREA = (0.7, 1.0)  # of a crop


class Cropped(Run):
    """A run whose members are shown as crops; the attacker's batches stay as they are."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        members, latents = self.data.members(), self.data.latents
        generator = torch.Generator().manual_seed(self.settings.seed)
        self.crops = latents.new_zeros(CROPS, *latents.shape)  # of members alone
        for crops in self.crops:
            pixels = [crop(self.data.pixels[i], generator) for i in members]
            crops[members] = encode_images(self.base, np.stack(pixels))

    def batch(self, *sets: Shuffled) -> Batch:
        """Of each member a crop by chance."""
        b = super().batch(*sets)
        if sets[0] is not self.D_tr:
            return b
        which = torch.randint(CROPS, (len(b),), generator=self.outer)
        z0 = self.crops[which, b.index]
        target = prediction_target(z0, b.eps, b.t, self.base.abar, self.base.prediction)
        return replace(b, z0=z0, target=target)


def crop(picture: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """One crop (H, W, 3) of a picture (H, W, 3), by chance mirrored."""
    low, top, left, mirror = torch.rand(4, generator=generator).tolist()
    side = (AREA[0] + (AREA[1] - AREA[0]) * low) ** 0.5
    size = picture.shape[:2]
    h, w = (round(side * of) for of in size)
    where = round(top * (size[0] - h)), round(left * (size[1] - w)), h, w
    cut = resized_crop(torch.from_numpy(picture).permute(2, 0, 1), *where, [*size], antialias=True)
    return (cut.flip(2) if mirror < 0.5 else cut).permute(1, 2, 0).numpy()


def train_cropped(base: Base, data: Encoded, s: Settings) -> Iterator[tuple[int, Adapter]]:
    """As train.train_adapter, with `Cropped`, which mirrors by itself."""
    return train_adapter(base, data, replace(s, flip=False), (Cropped,))
