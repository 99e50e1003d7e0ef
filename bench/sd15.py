"""Stable Diffusion v1.5 in full size with random weights, for machines that cannot download it; and
a check on it.

    pip install --no-deps open-clip-torch    # for CLIP's real vocabulary, a text file in it
    python bench/sd15.py FOLDER              # 860 M + 123 M + 84 M parameters, float16
    python bench/sd15.py FOLDER --check      # three steps of each method, attacks, a Hessian norm
    python bench/step.py --model FOLDER --steps 3 --warm-up 1 --rounds 1

Shapes, memory and time are those of the real model; what it draws is noise.  Not part of the test
suite.
"""

import argparse
import gzip
import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}


def clip_tokenizer(folder: Path):
    """CLIP's byte-pair tokenizer of 49,408 tokens from the merges that open-clip-torch carries."""
    from transformers import CLIPTokenizer

    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise SystemExit(
            "error: CLIP's vocabulary is missing: pip install --no-deps open-clip-torch"
        )
    with gzip.open(
        Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz",
        "rt",
        encoding="utf-8",
    ) as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m.split()) for m in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )
    assert len(tokenizer) == 49408 and tokenizer("a photo of a cat").input_ids == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
    ]
    return tokenizer


def write(folder: Path) -> None:
    """The pipeline folder, random weights of seed 0 in float16: 2.1 GB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from embedded.base_model import pipeline

    torch.manual_seed(0)
    vae, text_encoder = AutoencoderKL(**VAE).half(), CLIPTextModel(CLIPTextConfig(**TEXT)).half()
    unet = UNet2DConditionModel(**UNET).half()
    pipeline(vae, text_encoder, clip_tokenizer(folder / "tokenizer"), unet).save_pretrained(folder)


def said(what: str, value: float, tick: float) -> None:
    """One line: what was done, what came out, seconds since `tick`, peak memory."""
    from step import peak_gib

    spent = time.time() - tick
    print(f"{what:28} {value:10.4f}  {spent:7.1f} s  peak {peak_gib():5.2f} GiB", flush=True)


def questions(base, adapter, latents, text) -> None:
    """What an evaluation asks of one or two images, and a Hessian norm at half the size."""
    import torch

    from attacks import single as attacks
    from diffusion import encode_captions, loss_grid, sample

    def picture():
        noise = torch.randn(1, *base.latent_shape)
        return sample(base, text[:1], encode_captions(base, [""]), noise, steps=2)

    two = latents[:2], text[:2]
    asked = {
        "loss of 2 images at t = 250": lambda: loss_grid(base, *two, timesteps=(250,), draws=1),
        "SimA, 2 images": lambda: attacks.sima(base, *two, (100,)),
        "GSA1, 1 image": lambda: attacks.gradient_features(base, adapter, latents[:1], text[:1]),
        "1 picture, 2 DDIM steps": picture,
        "Hessian norm, 3 products": lambda: hessian_norm(base, adapter.parameters(), text[:1]),
    }
    for what, ask in asked.items():
        tick = time.time()
        said(what, float(ask().mean()), tick)


def hessian_norm(base, parameters, text):
    """Spectral norm of the Hessian of the loss of one random latent of half the size, a tensor."""
    import torch

    import smoothness
    from diffusion import squared_error

    c, h, w = base.latent_shape
    noise, t = torch.randn(1, c, h // 2, w // 2), torch.tensor([250])
    with smoothness.plain_attention():
        error = squared_error(base, noise, text, t, noise)
        gradient = smoothness.flat_gradient(error.mean(), parameters)
        product = partial(smoothness.hessian_vector_product, gradient, parameters)
        return torch.tensor(smoothness.power_iteration(product, gradient.detach(), 3).norm)


def check(folder: Path, dtype: str, size: int) -> None:
    """Three steps of each method, what an evaluation asks of a few images, and a Hessian norm at
    half the size.
    """
    import torch
    from run.learner import Learner
    from step import peak_gib

    import lora
    from diffusion import Encoded, encode_captions, encode_images
    from files.bases import load_base
    from run.prepare import Run
    from run.processes import Processes
    from run.resolve import resolve
    from settings import Settings
    from train import algorithm_1

    base = load_base(str(folder), "cpu", dtype, size)
    print(
        f"UNet {sum(p.numel() for p in base.unet.parameters()):,} parameters, "
        f"latents {base.latent_shape}, {dtype}"
    )
    text = encode_captions(base, ["a photo of a cat", "a drawing of a house"] * 3)
    pixels = torch.randint(256, (1, size, size, 3), dtype=torch.uint8).numpy()
    latents = torch.cat([encode_images(base, pixels), torch.randn(5, *base.latent_shape)])
    roles = {"member_aux": [0, 1], "member_val": [2], "member_test": [3], "nonmember_aux": [4, 5]}

    data = Encoded([], [], None, latents, text, roles)
    for method in ("lora", "mp", "smp"):
        settings = resolve(Settings(method=method, model=str(folder), out="/unused", dtype=dtype))
        adapter = lora.inject(base.unet, settings.target, settings.rank, settings.alpha)
        run = Run(settings, base, data, adapter, Processes())
        learner = Learner(run)
        peak_gib(reset=True)
        tick = time.time()
        for i, row in enumerate(algorithm_1(run, learner, (2, 2, 2)), 1):
            said(f"{method} step {i}: objective", row["objective"], tick)
            tick = time.time()
        if method == "smp":
            questions(base, adapter, latents, text)
        lora.remove(base.unet, adapter)


def main() -> None:
    """Write the folder if it is not there, then check if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args()
    if not (args.folder / "model_index.json").is_file():
        write(args.folder)
    if args.check:
        check(args.folder, args.dtype, args.size)


if __name__ == "__main__":
    main()
