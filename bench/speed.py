"""Seconds and peak memory of a training step, of attacks, and of the Hessian; ratios in one run.

    python bench/speed.py step                        # embedded model, default settings
    python bench/speed.py step --model SD15_FOLDER    # full size: bench/sd15.py writes one
    python bench/speed.py attacks --times 1           # seconds for --images images
    python bench/speed.py hessian
    python bench/speed.py waiting --busy 1            # threads that wait, beside a busy program

Every figure is of a process of its own that does nothing else, on random latents: time does not
depend on them.  Ratios are against the first row of the same round, so that drift of the machine
shows.  Memory is the peak resident set while it works (Linux), weights included.

    lora             this project
    lora peft        the same layers, rank and batch by `unet.add_adapter` of diffusers + peft
    smp pooled/raw   Algorithm 1: a forward of 2 B for the attacker, one forward of B for L and G
    smp released     L and G from two forwards with noise of their own, as released; raw proxy
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

# --------------------------------------------------------------------------------------------------
# What is timed: each row is a function of the flags that returns the work, a function without any


def training(args, method: str = "smp", proxy: str = "pooled", extra: tuple = ()):
    """A run of Algorithm 1 on eight random images, four of them members."""
    import torch

    import lora
    from algorithm import Run
    from diffusion import Encoded, encode_captions
    from files.bases import load_base
    from run.resolve import resolve
    from settings import Settings

    flags = {"method": method, "proxy": proxy, "model": args.model, "device": args.device}
    flags |= {"dtype": args.dtype, "batch_size": args.batch_size, "out": "/unused", "steps": 10**9}
    s = resolve(Settings(**flags, norms_every=10**9))
    torch.manual_seed(0)
    base = load_base(s.model, s.device, s.dtype)
    text = encode_captions(base, ["a picture"]).expand(args.images, -1, -1)
    latents = torch.randn(args.images, *base.latent_shape, device=base.device)
    roles = {"member_aux": [0, 1], "member_val": [2], "member_test": [3]}
    roles |= {"nonmember_aux": [4, 5], "nonmember_val": [6], "nonmember_test": [7]}
    adapter = lora.inject(base.unet, s.target, s.rank, s.alpha)
    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    timed = type("Timed", (*extra, Run), {})
    return timed(s, base, Encoded([], [], None, latents, text, roles), adapter)


def steps(args, method: str, proxy: str = "pooled", released: bool = False) -> Callable:
    """A step of Algorithm 1."""
    from algorithm import algorithm_1
    from studies.as_released import Forward

    run = training(args, method, proxy, (Forward,) if released else ())
    return lambda: list(algorithm_1(run, [2]))


def peft(args) -> Callable:
    """The LoRA step of diffusers' own training example: mean squared error, clipping, AdamW."""
    import torch
    from peft import LoraConfig

    import lora
    from diffusion import squared_error

    run = training(args, "lora")
    s, base = run.settings, run.base
    lora.remove(base.unet, run.adapter)
    base.unet.requires_grad_(False)
    layers = list(lora.TARGETS[s.target])
    base.unet.add_adapter(
        LoraConfig(
            r=s.rank, lora_alpha=s.alpha, init_lora_weights="gaussian", target_modules=layers
        )
    )
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=s.lr)

    def step() -> None:
        index = torch.randint(8, (s.batch_size,))
        timesteps = torch.randint(1000, (s.batch_size,), device=base.device)
        noise = torch.randn(s.batch_size, *base.latent_shape, device=base.device)
        error = squared_error(base, run.data.latents[index], run.data.text[index], timesteps, noise)
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def attack(args, name: str) -> Callable:
    """What an attack asks about all images."""
    import torch

    from attacks import single
    from diffusion import encode_captions, loss_grid, sample

    run = training(args)
    data = run.data
    given = run.base, data.latents, data.text
    if name == "gradients":
        return lambda: single.gradient_features(run.base, run.adapter, data.latents, data.text)
    run.adapter.merge()
    empty = encode_captions(run.base, [""])
    return {
        "losses": lambda: loss_grid(*given),
        "SecMI": lambda: single.secmi(*given),
        "PIA": lambda: single.pia(*given),
        "SimA": lambda: single.sima(*given),
        "pictures": lambda: sample(run.base, data.text, empty, torch.randn_like(data.latents)),
    }[name]


def curvature(args, name: str) -> Callable:
    """A gradient of SMP's objective, a Hessian-vector product, or the Hessian's norm by Lanczos."""
    import torch

    from objectives import adaptation_loss, mi_gain, objective
    from smoothness import flat_gradient, hessian_vector_product, lanczos, plain_attention

    run = training(args)
    s, batch, parameters = run.settings, run.batch(run.D_tr), run.parameters

    def total() -> torch.Tensor:
        e = run.error(batch)
        gain = mi_gain(run.log_h(e, batch))
        return objective(s.method, adaptation_loss(e), gain, s.lam).total

    def graph() -> torch.Tensor:
        with plain_attention():
            return flat_gradient(total(), parameters)

    def norm() -> None:
        g = graph()
        with plain_attention():
            lanczos(lambda v: hessian_vector_product(g, parameters, v), g.detach())

    if name == "gradient":
        return lambda: torch.autograd.grad(total(), parameters)
    if name == "norm":
        return norm
    g = graph()
    return lambda: hessian_vector_product(g, parameters, g.detach())


ROWS = {  # table -> {row: (function, its arguments behind the flags)}
    "step": {
        "lora": (steps, "lora"),
        "lora peft": (peft,),
        "smp pooled": (steps, "smp"),
        "smp raw": (steps, "smp", "raw"),
        "smp released": (steps, "smp", "raw", True),
    },
    "attacks": {
        name: (attack, name) for name in ("losses", "SecMI", "PIA", "SimA", "gradients", "pictures")
    },
    "hessian": {name: (curvature, name) for name in ("gradient", "product", "norm")},
    "waiting": dict.fromkeys(("libgomp", "commands", "one thread"), (steps, "smp")),
}
# what a row of "waiting" has in its environment; command/__init__.py says why
WAITING = {"libgomp": ("GOMP_SPINCOUNT", "300000"), "one thread": ("OMP_NUM_THREADS", "1")}

# --------------------------------------------------------------------------------------------------
# How it is timed


def peak_gib(reset: bool = False) -> float:
    """The peak resident set since the last reset, in GiB; not a number where the kernel does not
    say.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    except OSError:
        return float("nan")


def measure(row: tuple, args, queue) -> None:
    """Put (median seconds, peak GiB) of a row; what warms up is not counted."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    function, *given = row
    work = function(args, *given)
    seconds = []
    for i in range(args.warm_up + args.times):
        if i == args.warm_up:
            peak_gib(reset=True)
        began = time.perf_counter()
        work()
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    queue.put((median(seconds[args.warm_up :]), peak_gib()))


def spin() -> None:
    """Another program that is never done."""
    while True:
        pass


def main() -> None:
    """All rows of a table in turn, `--rounds` times."""
    from settings import EMBEDDED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=ROWS)
    parser.add_argument("--only", nargs="*", help="some of its rows")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--images", type=int, default=8, help="8 or more")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--busy", type=int, default=0, help="other programs, a core each")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = {name: row for name, row in ROWS[args.table].items() if name in (args.only or [name])}
    context, found = multiprocessing.get_context("spawn"), {name: [] for name in rows}
    for _ in range(args.busy):
        context.Process(target=spin, daemon=True).start()
    for _ in range(args.rounds):
        for name, row in rows.items():
            queue = context.SimpleQueue()
            process = context.Process(target=measure, args=(row, args, queue))
            key, value = WAITING.get(name, ("", ""))
            with patch.dict(os.environ, {key: value} if key else {}):
                process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} failed with exit code {process.exitcode}")
            found[name].append(queue.get())
    first = next(iter(found))
    print(f"{'':14}{'seconds':>9}{'GiB':>7}   seconds and memory against {first}, per round")
    for name, rounds in found.items():
        seconds, gib = (median(column) for column in zip(*rounds, strict=True))
        pairs = zip(rounds, found[first], strict=True)
        ratios = "  ".join(f"{s / a:.2f}/{g / b:.2f}" for (s, g), (a, b) in pairs)
        print(f"{name:14}{seconds:9.3f}{gib:7.2f}   {ratios}")


if __name__ == "__main__":
    main()
