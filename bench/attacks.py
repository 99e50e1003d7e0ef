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
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))


def attacks_on(args):
    """(adapter, attacks on it merged, attacks on it apart), the latter as {attack: a function that
    scores all images}.
    """
    import numpy as np
    import torch

    import lora
    from attacker import PROXIES
    from base_files import load_base
    from diffusion import TIMESTEPS, encode_captions, encode_images, loss_grid, sample
    from evaluation import attacks, proxies, quality
    from evaluation.queries import PICTURE_STEPS, PICTURES
    from evaluation.target import CROPS, CUTS, crop
    from settings import Settings, resolve

    settings = resolve(Settings(method="lora", model=args.model, device=args.device, out="/unused"))
    base, n = load_base(args.model, args.device), args.images
    adapter = lora.inject(base.unet, settings.target, settings.rank, settings.alpha)
    latents = torch.randn(n, *base.latent_shape, device=base.device)
    text, empty = (
        encode_captions(base, ["a picture"]).expand(n, -1, -1),
        encode_captions(base, [""]),
    )
    h = {name: kind(base.latent_shape).to(base.device).eval() for name, kind in PROXIES.items()}
    network = quality.load_network("embedded")
    real = np.random.default_rng(0).integers(0, 256, (n, base.size, base.size, 3), np.uint8)
    few = TIMESTEPS[1::2]  # as evaluate.py tries crops and captions

    def grids(variants: int):
        for _ in range(variants):
            loss_grid(base, latents, text, few, draws=1)

    def pfami():
        for share in CROPS:
            encode_images(base, crop(real, share))
        loss_grid(base, latents, text, TIMESTEPS[:1], draws=len(CROPS) + len(TIMESTEPS))

    def rediffuse():
        averaged = proxies.sweep(base, latents, text, {})[1]
        attacks.rediffuse(averaged, TIMESTEPS, base.abar.cpu(), base.prediction)

    def black_box():
        made = [
            sample(base, text, empty, torch.randn_like(latents), steps=PICTURE_STEPS)
            for _ in range(PICTURES)
        ]
        generated = np.stack([quality.features(network, m).numpy() for m in made], axis=1)
        attacks.black_box(quality.features(network, real).numpy(), generated)

    merged = {
        "loss": lambda: loss_grid(base, latents, text),
        "difference": lambda: [loss_grid(base, latents, text) for _ in range(2)],
        "proxy raw": lambda: proxies.sweep(base, latents, text, {"raw": h["raw"]}),
        "proxy pooled": lambda: proxies.sweep(base, latents, text, {"pooled": h["pooled"]}),
        "SecMI-stat": lambda: attacks.secmi(base, latents, text),
        "PIA": lambda: attacks.pia(base, latents, text),
        "PIAN": lambda: attacks.pia(base, latents, text, normalised=True),
        "SimA": lambda: attacks.sima(base, latents, text),
        "PFAMI": pfami,
        "CLiD": lambda: grids(len(CUTS) + 1),
        "ReDiffuse": rediffuse,
        "black-box": black_box,
    }
    return (
        adapter,
        merged,
        {"GSA1": lambda: attacks.gradient_features(base, adapter, latents, text)},
    )


def main() -> None:
    """Every attack `--rounds` times, after one pass that is not counted."""
    from settings import EMBEDDED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    adapter, merged, apart = attacks_on(args)
    seconds: dict[str, list[float]] = {name: [] for name in [*merged, *apart]}
    for counted in range(args.rounds + 1):
        for group, prepare in ((merged, adapter.merge), (apart, adapter.unmerge)):
            prepare()
            for name, run in group.items():
                tick = time.perf_counter()
                run()
                if counted:
                    seconds[name].append(time.perf_counter() - tick)
    print(f"{'':14}{'images/s':>9}   time against the loss attack, per round")
    for name, found in seconds.items():
        ratios = "  ".join(
            f"{s / reference:.2f}" for s, reference in zip(found, seconds["loss"], strict=True)
        )
        print(f"{name:14}{args.images / median(found):9.1f}   {ratios}")


if __name__ == "__main__":
    main()
