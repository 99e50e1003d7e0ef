"""What keeps an adapter from memorising without an attacker: a schedule, mirrored images and crops.

Tested in tests/test_regularisation.py.
"""

import math
import zlib
from dataclasses import replace

import numpy as np
import torch
from torchvision.transforms.v2.functional import resized_crop

from algorithm import Batch, Run, Shuffled
from diffusion import encode_images, prediction_target

CROPS = 16  # views of an image with --crop
AREA = (0.7, 1.0)  # of a crop, as a share of the image's


class Scheduled(Run):
    """--schedule: the learning rate falls from --lr to 0."""

    def descend(self, g: list[torch.Tensor], step: int) -> None:
        """`step` counts from 1."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * share_of_rate(s.schedule, step, s.steps)
        super().descend(g, step)


def share_of_rate(schedule: str, step: int, steps: int) -> float:
    """The learning rate of step 1, 2, ..., `steps` as a share of --lr: in (0, 1], 1 at step 1."""
    done = (step - 1) / steps
    shares = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return shares[schedule]


class Views(Run):
    """--flip and --crop: a member is shown as one of its views; the attacker's batches stay as they
    are.
    """

    def __init__(self, *given, views: dict | None = None, **more):
        """`views` {(position, k): latents (C, h, w)} are those known, and are added to."""
        super().__init__(*given, **more)
        self.views = {} if views is None else views

    def batch(self, *sets: Shuffled) -> Batch:
        """Of the members, each as a view by chance."""
        b = super().batch(*sets)
        if sets[0] is not self.D_tr:
            return b
        count = CROPS if self.settings.crop else 2
        which = (torch.rand(len(b), generator=self.outer) * count).long()
        seen = zip(b.index.tolist(), which.tolist(), strict=True)
        z0 = torch.stack([self.latents(i, k).to(b.z0.device) for i, k in seen])
        target = prediction_target(z0, b.eps, b.t, self.base.abar, self.base.prediction)
        return replace(b, z0=z0, target=target)

    def latents(self, i: int, k: int) -> torch.Tensor:
        """Of view k of image i, (C, h, w).

        A view is encoded when it is first drawn.  It is encoded alone, so that a resumed run has
        the same bits.  It is kept off the device, since there may be many.
        """
        s = self.settings
        if s.dry_run or (k and not s.crop):
            return self.data.latents[i]  # as it is; a dry run's steps take what most steps take
        if (i, k) not in self.views:
            shown = view(self.data.pixels[i], k, s.flip, s.crop)
            self.views[i, k] = encode_images(self.base, shown[None])[0].cpu()
        return self.views[i, k]


def view(picture: np.ndarray, k: int, flip: bool, crop: bool) -> np.ndarray:
    """View k = 0, 1, ... of a picture (H, W, 3), of the same size.

    With `crop` it is a part of the picture, enlarged, whose share of the area is in AREA.  With
    `flip` it is mirrored where k is even.  The part follows from the picture and k alone: the
    guarantee of --method dp needs draws that no other image has a say in.
    """
    if crop:
        low, top, left = np.random.default_rng([k, zlib.crc32(picture.tobytes())]).random(3)
        (h, w), side = picture.shape[:2], (AREA[0] + (AREA[1] - AREA[0]) * low) ** 0.5
        part = round(side * h), round(side * w)
        where = round(top * (h - part[0])), round(left * (w - part[1])), *part
        whole = torch.from_numpy(picture).permute(2, 0, 1)
        picture = resized_crop(whole, *where, [h, w], antialias=True).permute(1, 2, 0).numpy()
    return (picture[:, ::-1] if flip and k % 2 == 0 else picture).copy()
