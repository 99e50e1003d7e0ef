"""Images scored per second by each attack, alone and with what it needs, on one model.

    python bench/attacks.py                     # embedded model, an adapter of the default shape
    python bench/attacks.py --model SD15_FOLDER --images 4

`evaluate.py` is cheaper than the sum of these rows: one pass over the grid serves the loss, the
proxies, ReDiffuse, the difference and half of PFAMI and CLiD, and one clean prediction serves
SecMI, PIA, PIAN and SimA.  The combined attacker asks nothing of its own.  Training of the proxies
is not counted.  Latents are random, since time does not depend on them; ratios are against
the loss attack of the same round.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import lora
from attacker import PROXIES
from attacks import paper, quality
from attacks import single as attacks
from attacks.examination import CROPS, CUTS, crop
from attacks.model import PICTURE_STEPS, PICTURES
from attacks.single import CUTS_AT
from diffusion import TIMESTEPS, Base, encode_captions, encode_images, loss_grid, sample
from files.bases import load_base
from run.resolve import resolve
from settings import EMBEDDED, Settings


@dataclass
class Subject:
    """What the attacks ask: a base, and n images of noise with one caption for all."""

    base: Base
    latents: torch.Tensor  # (n, C, h, w)
    text: torch.Tensor  # (n, L, D)
    empty: torch.Tensor  # (1, L, D)
    pixels: np.ndarray  # (n, H, W, 3)
    network: torch.nn.Module  # of the pictures' features

    @property
    def given(self) -> tuple:
        """The first arguments of an attack."""
        return self.base, self.latents, self.text


def subject(base: Base, n: int) -> Subject:
    """`n` images for a base."""
    text, empty = encode_captions(base, ["a picture"]), encode_captions(base, [""])
    pixels = np.random.default_rng(0).integers(0, 256, (n, base.size, base.size, 3), np.uint8)
    latents = torch.randn(n, *base.latent_shape, device=base.device)
    network = quality.load_network("embedded")
    return Subject(base, latents, text.expand(n, -1, -1), empty, pixels, network)


def proxy(s: Subject, kind: str) -> None:
    """The paper's attacker on every error map of the grid."""
    h = PROXIES[kind](s.base.latent_shape).to(s.base.device).eval()
    paper.sweep(*s.given, {kind: h})


def pfami(s: Subject) -> None:
    """Crops encoded, each asked at one timestep, and the images at all."""
    for share in CROPS:
        encode_images(s.base, crop(s.pixels, share))
    loss_grid(*s.given, TIMESTEPS[:1], draws=len(CROPS) + len(TIMESTEPS))


def clid(s: Subject) -> None:
    """The captions whole and cut."""
    for _ in range(1 + len(CUTS)):
        loss_grid(*s.given, TIMESTEPS[CUTS_AT], draws=1)


def rediffuse(s: Subject) -> None:
    """The grid's residuals, averaged."""
    drift = paper.sweep(*s.given, {})["drift"]
    attacks.rediffuse(drift, TIMESTEPS, s.base.abar, s.base.prediction)


def black_box(s: Subject) -> None:
    """Pictures drawn, and features of them and of the images."""
    drawn = []
    for _ in range(PICTURES):
        noise = torch.randn_like(s.latents)
        drawn.append(sample(s.base, s.text, s.empty, noise, steps=PICTURE_STEPS))
    real, *made = (quality.features(s.network, p).numpy() for p in (s.pixels, *drawn))
    attacks.black_box(real, np.stack(made, axis=1))


def attacks_on(s: Subject) -> dict:
    """{attack: a function that scores all images}, the adapter being merged."""
    return {
        "loss": partial(loss_grid, *s.given),
        "difference": lambda: [loss_grid(*s.given) for _ in range(2)],
        "proxy raw": partial(proxy, s, "raw"),
        "proxy pooled": partial(proxy, s, "pooled"),
        "SecMI-stat": partial(attacks.secmi, *s.given),
        "PIA": partial(attacks.pia, *s.given),
        "PIAN": partial(attacks.pia, *s.given, normalised=True),
        "SimA": partial(attacks.sima, *s.given),
        "PFAMI": partial(pfami, s),
        "CLiD": partial(clid, s),
        "ReDiffuse": partial(rediffuse, s),
        "black-box": partial(black_box, s),
    }


def measure(groups: list[tuple], rounds: int) -> dict[str, list[float]]:
    """Seconds of every attack of [(prepare, {attack: function})] in each of `rounds`, after one
    that is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for _, group in groups for name in group}
    for counted in range(rounds + 1):
        for prepare, group in groups:
            prepare()
            for name, run in group.items():
                tick = time.perf_counter()
                run()
                if counted:
                    seconds[name].append(time.perf_counter() - tick)
    return seconds


def main() -> None:
    """Print a row per attack."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = resolve(Settings(method="lora", model=args.model, device=args.device, out="/unused"))
    base = load_base(args.model, args.device)
    adapter = lora.inject(base.unet, shape.target, shape.rank, shape.alpha)
    s = subject(base, args.images)
    gradients = {"GSA1": partial(attacks.gradient_features, base, adapter, s.latents, s.text)}
    groups = [(adapter.merge, attacks_on(s)), (adapter.unmerge, gradients)]
    seconds = measure(groups, args.rounds)
    print(f"{'':14}{'images/s':>9}   time against the loss attack, per round")
    for name, found in seconds.items():
        ratios = "  ".join(
            f"{s / reference:.2f}" for s, reference in zip(found, seconds["loss"], strict=True)
        )
        print(f"{name:14}{args.images / median(found):9.1f}   {ratios}")


if __name__ == "__main__":
    main()
