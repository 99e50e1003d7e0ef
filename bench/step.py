"""Seconds and peak memory of a training step: ours, diffusers + peft's, and the arrangement of the
paper's released code.

    python bench/step.py                          # embedded model, default settings
    python bench/step.py --model SD15_FOLDER      # full size: bench/sd15.py writes one

Every figure is of a process of its own that does nothing but steps on random latents; ratios are
per round, so that drift of the machine shows.  Memory is the peak resident set while stepping
(Linux), weights included.

    lora            this project, the reference of the ratios
    lora peft       the same layers, rank and batch by `unet.add_adapter` of diffusers + peft
    smp pooled/raw  Algorithm 1: a forward of 2 B for the attacker, one forward of B for L and G
    smp reused      with --attacker-members reused: a forward of B / 2 for the attacker (at B = 1,
                    of 1 in those steps that follow an auxiliary member, half of them)
    smp released    L and G from two forwards with noise of their own, as released; raw proxy
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

VARIANTS = (
    "lora",
    "lora peft",
    "smp pooled",
    "smp raw",
    "smp reused",
    "smp released",
)


def build(args, method: str, proxy: str, adapted: bool = True, members: str = "drawn"):
    """(run, learner) on random latents; without our adapter if not `adapted`."""
    import torch

    import lora
    from diffusion import Encoded, encode_captions
    from files.bases import load_base, resolve_dtype
    from run.learner import Learner
    from run.prepare import Run
    from run.processes import Processes
    from run.resolve import resolve
    from settings import Settings

    s = Settings(
        method=method,
        proxy=proxy,
        model=args.model,
        dtype=resolve_dtype(args.dtype, args.device),
        device=args.device,
        out="/unused",
        attacker_members=members,
        batch_size=args.batch_size,
        steps=10**9,
        norms_every=10**9,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    s = resolve(s)
    torch.manual_seed(0)
    base = load_base(s.model, s.device, s.dtype)
    text = encode_captions(base, ["a picture"]).expand(8, -1, -1)
    latents = torch.randn(8, *base.latent_shape, device=base.device)
    # half of the members are auxiliary
    roles = {"member_aux": [0, 1], "member_val": [2], "member_test": [3], "nonmember_aux": [4, 5]}
    data = Encoded([], [], None, latents, text, roles)
    adapter = lora.Adapter({}, "")
    if adapted:
        adapter = lora.inject(base.unet, s.target, s.rank, s.alpha)
    if s.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    run = Run(s, base, data, adapter, Processes())
    return run, Learner(run) if adapted else None


def ours(args, method: str, proxy: str, kind: str = ""):
    """(a function that takes steps of Algorithm 1, how many): a whole round of what differs between
    steps.
    """
    from train import algorithm_1

    run, learner = build(args, method, proxy, members="reused" if kind == "reused" else "drawn")
    # with batches below the members, half of whom are auxiliary, "reused" depends on who is in it
    count = max(1, len(run.data.members()) // run.batch) if kind == "reused" else 1

    def step():
        for _ in algorithm_1(run, learner, [2] * count):
            pass

    return step, count


def peft(args):
    """The LoRA step of diffusers' own training example: mean squared error, clipping, AdamW."""
    import torch
    from peft import LoraConfig

    from diffusion import squared_error
    from lora import TARGETS

    run, _ = build(args, "lora", "raw", adapted=False)
    s, base = run.settings, run.base
    base.unet.requires_grad_(False)
    config = LoraConfig(
        r=s.rank,
        lora_alpha=s.alpha,
        init_lora_weights="gaussian",
        target_modules=list(TARGETS[s.target]),
    )
    base.unet.add_adapter(config)
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=s.lr)

    def step():
        index = torch.randint(8, (s.batch_size,))
        timesteps = torch.randint(1000, (s.batch_size,), device=base.device)
        noise = torch.randn(s.batch_size, *base.latent_shape, device=base.device)
        error = squared_error(base, run.data.latents[index], run.data.text[index], timesteps, noise)
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def released(args):
    """L and G of one batch from two forwards, each with its own timesteps and noise."""
    from attacker import attacker_step
    from diffusion import draw_noise
    from objectives import adaptation_loss, clip_, gradients, mi_gain, ratio_objective
    from run.prepare import Batch
    from train import auxiliary_batch

    run, learner = build(args, "smp", "raw")
    s, h = run.settings, learner.attacker

    def step():
        attacker_step(h, learner.attacker_optimizer, *auxiliary_batch(run, learner))
        index = learner.private.draw()
        first, second = (
            Batch(index, *draw_noise(run.base, len(index), learner.outer)) for _ in range(2)
        )
        loss, gain = (
            adaptation_loss(run.errors(first)),
            mi_gain(h, run.errors(second), second.timesteps),
        )
        grads = gradients(ratio_objective(loss, gain, s.lam), learner.parameters)
        clip_(grads, s.clip)
        learner.descend(grads, 1)

    return step


def peak_gib(reset: bool = False) -> float:
    """The peak resident set since the last reset, in GiB; not a number where the kernel does not
    say.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(
            x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
        )
        return int(line.split()[1]) / 2**20
    except OSError:
        return float("nan")


def measure(variant: str, args, queue) -> None:
    """Put (median seconds of a step, peak GiB); the first two steps warm up."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    name, _, kind = variant.partition(" ")
    if kind in ("peft", "released"):
        step, count = {"peft": peft, "released": released}[kind](args), 1
    else:
        step, count = ours(args, name, "raw" if kind == "raw" else "pooled", kind)
    seconds = []
    for i in range(args.steps + args.warm_up):
        if i == args.warm_up:
            peak_gib(reset=True)
        tick = time.perf_counter()
        step()
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - tick) / count)
    queue.put((median(seconds[args.warm_up :]), peak_gib()))


def main() -> None:
    """All variants in turn, `--rounds` times."""
    from settings import EMBEDDED

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    args = parser.parse_args()
    context, found = multiprocessing.get_context("spawn"), {v: [] for v in args.only}
    for _ in range(args.rounds):
        for variant in args.only:
            queue = context.SimpleQueue()
            process = context.Process(target=measure, args=(variant, args, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{variant} failed with exit code {process.exitcode}")
            found[variant].append(queue.get())
    first = args.only[0]
    print(f"{'':14}{'seconds':>9}{'GiB':>7}   seconds and memory against {first}, per round")
    for variant, rounds in found.items():
        ratios = "  ".join(
            f"{s / a:.2f}/{g / b:.2f}" for (s, g), (a, b) in zip(rounds, found[first], strict=True)
        )
        print(
            f"{variant:14}{median(s for s, _ in rounds):9.3f}"
            f"{median(g for _, g in rounds):7.2f}   {ratios}"
        )


if __name__ == "__main__":
    main()
