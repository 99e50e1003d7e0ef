"""Cost of a Hessian-vector product in gradient evaluations (one forward and one backward pass of
the SMP objective).

python bench/hessian.py                # embedded model, defaults; about a minute on two cores
python bench/hessian.py --model DIR    # any other base
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import lora
from attacker import PROXIES
from diffusion import squared_error
from files.bases import load_base
from objectives import adaptation_loss, mi_gain, objective
from settings import EMBEDDED, FAST
from smoothness import flat_gradient, hessian_vector_product, lanczos, plain_attention


def seconds(call, times: int) -> float:
    """Median seconds of a call, the first one left out."""
    found = []
    for _ in range(times + 1):
        tick = time.perf_counter()
        call()
        found.append(time.perf_counter() - tick)
    return median(found[1:])


def main() -> None:
    """Three rounds in turn, so that drift of the machine shows; random latents, since time does not
    depend on them.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--batch-size", type=int, default=FAST["batch_size"])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    g = torch.Generator().manual_seed(0)
    base = load_base(args.model)
    f = FAST
    parameters = lora.inject(base.unet, f["target"], f["rank"], f["alpha"], g).parameters()
    latents, noise = torch.randn(2, args.batch_size, *base.latent_shape, generator=g)
    tokens = base.pipeline.tokenizer.model_max_length
    text = torch.randn(args.batch_size, tokens, base.unet.config.cross_attention_dim, generator=g)
    timesteps = torch.randint(len(base.abar), (args.batch_size,), generator=g)
    attacker = PROXIES[f["proxy"]](base.latent_shape).eval()

    def total():
        error = squared_error(base, latents, text, timesteps, noise)
        gain = mi_gain(attacker, error, timesteps)
        return objective("smp", adaptation_loss(error), gain, f["lam"]).total

    def analysis():
        with plain_attention():
            graph = flat_gradient(total(), parameters)
        return graph, lanczos(
            lambda v: hessian_vector_product(graph, parameters, v), graph.detach()
        )

    with plain_attention():
        graph = flat_gradient(total(), parameters)
    vector = graph.detach()
    print(f"{len(vector):,} parameters, batch {args.batch_size}, {torch.get_num_threads()} threads")
    print(
        f"{'gradient [s]':>13}{'H v [s]':>10}{'H v / gradient':>17}"
        f"{'Lanczos / gradient':>21}  (products)"
    )
    for _ in range(args.rounds):
        gradient = seconds(lambda: torch.autograd.grad(total(), parameters), args.times)
        product = seconds(lambda: hessian_vector_product(graph, parameters, vector), args.times)
        tick = time.perf_counter()
        used = analysis()[1].products
        whole = time.perf_counter() - tick
        print(
            f"{gradient:13.3f}{product:10.3f}{product / gradient:17.2f}"
            f"{whole / gradient:21.1f}  ({used})",
            flush=True,
        )


if __name__ == "__main__":
    main()
