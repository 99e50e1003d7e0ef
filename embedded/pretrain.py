"""Train the embedded base model: a small but complete latent diffusion model of public emoji pictures.

    for s in noto fluent-emoji-flat emojione; do   # the public sets that are not on PyPI
        npm pack @iconify-json/$s; mkdir -p icons/$s; tar xzf iconify-json-$s-*.tgz -C icons/$s --strip 1; done
    python pretrain.py                             # autoencoder, then UNet and text encoder: base/, hours on a CPU
    python pretrain.py --start base --out base2    # the UNet of a finished folder further

Two stages, as for Stable Diffusion (Rombach et al. 2022): an autoencoder with a 4x smaller latent picture, then
a text-conditioned UNet on its latents with the epsilon objective (DDPM, Ho et al. 2020, Eq. 14).  The private
pictures (Twemoji) take no part; they are only looked at after the fact, to report how well the autoencoder
reconstructs pictures that it has never seen.  Both stages save `--work` every few minutes and go on from there.

Data: OpenMoji (CC BY-SA 4.0, all emojis designed by OpenMoji, the open-source emoji and icon project), Noto Emoji
(Apache-2.0, Google Inc.), Fluent Emoji Flat (MIT, Microsoft Corporation), EmojiOne 2 (CC BY 4.0, EmojiOne).  The
weights carry the strictest of these licences, CC BY-SA 4.0.  Settings, versions and time: base/pretraining.json.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cli import one_line_errors, option, parse


@dataclass
class Settings:
    """Everything that decides the weights; each field is a flag."""

    icons: str = option(
        "icons",
        "folder of the unpacked npm packages, one sub-folder per set (noto/icons.json, ...)",
    )
    out: str = option("base", "the StableDiffusionPipeline folder to write")
    work: str = option("pretraining", "raster cache, checkpoints, and the pictures to look at")
    stage: str = option("all", "what to do; export writes what there is", ("vae", "export", "all"))
    start: str | None = option(
        None, "a pipeline folder to go on from: its autoencoder stays as it is"
    )
    seed: int = option(0, "decides initialisation, batches and noise")
    vae_steps: int = option(900, "batches of --vae-batch")
    vae_batch: int = option(32, "pictures")
    vae_lr: float = option(2e-3, "peak learning rate of the autoencoder; cosine")
    unet_steps: int = option(4000, "batches of --unet-batch")
    unet_batch: int = option(64, "pictures")
    unet_lr: float = option(1e-3, "peak learning rate of UNet and text encoder; cosine")
    snr_gamma: float = option(
        5.0, "min-SNR weight (Hang et al. 2023): lower spends more of the fit on noisy latents"
    )
    ema: float = option(0.999, "decay of the averaged weights, which are the ones exported")
    drop_caption: float = option(
        0.1, "share of empty captions: what classifier-free guidance needs"
    )
    drop_style: float = option(
        0.15, 'share of captions without the ", noto" that names the drawing style'
    )
    unet_sets: str = option(
        "noto,fluent", "styles the UNet learns; the autoencoder sees all of them"
    )
    precision: str = option(
        "bfloat16", "of the UNet's activations, not of its weights", ("float32", "bfloat16")
    )
    no_compile: bool = option(
        False, "run the UNet as it is; compiled it is a fifth faster but needs a C++ compiler"
    )
    guidance: float = option(3.0, "classifier-free guidance of the sample grid")
    save_minutes: float = option(4.0, "between checkpoints")
    threads: int = option(2, "CPU threads")


if (
    __name__ == "__main__"
):  # before the heavy imports, so that --help and a mistyped flag are answered at once
    SETTINGS = parse(Settings, __doc__)

# ---------------------------------------------------------------------------------------------------------------
# Pictures as tensors


def to_pixels(images):
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(pixels, generator):
    """Random flip, zoom (0.75 to 1.15), shift, and channel mixing of half the pictures; white outside."""
    import torch
    from torch.nn import functional as F

    n = len(pixels)
    u = torch.rand(n, 8, generator=generator)
    scale = 1 / (0.75 + 0.4 * u[:, 0])
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * torch.where(u[:, 1] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (u[:, 2:4] - 0.5) * 0.3
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    moved = (
        F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    )  # zero padding is white after the shift
    mix = torch.eye(3) + 0.5 * (u[:, 4:5, None] < 0.5) * (
        torch.rand(n, 3, 3, generator=generator) - 0.5
    )
    return torch.einsum(
        "nij,njhw->nihw", mix / mix.sum(2, keepdim=True), moved
    )  # rows sum to one: white stays


# ---------------------------------------------------------------------------------------------------------------
# Training


class Checkpoint:
    """Modules, optimiser, step and random state of one stage, saved atomically every few minutes."""

    def __init__(self, path, minutes, **parts):
        self.path, self.seconds, self.parts, self.saved, self.spent = (
            path,
            60 * minutes,
            parts,
            time.time(),
            0.0,
        )
        self.started = time.time()

    def load(self, generator) -> int:
        import torch

        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        self.spent = state["seconds"]
        return state["step"]

    def save(self, step, generator, now=False):
        import torch

        if not now and time.time() - self.saved < self.seconds:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": step, "generator": generator.get_state()}
        state["seconds"] = self.spent + time.time() - self.started
        aside = self.path.with_suffix(".tmp")
        torch.save(state, aside)
        aside.rename(self.path)
        self.saved = time.time()


def cosine(step, steps, warmup=50):
    """Learning-rate factor: linear warm-up, then a half cosine down to 1 %."""
    return min(1, (step + 1) / warmup) * (
        0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    )


def load_pipeline(folder):
    """The pipeline in `folder`, in single precision."""
    import torch
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)


def train_vae(settings, images):
    """Squared + absolute error and a weak KL term; returns the trained autoencoder and the seconds it took."""
    import torch
    from torch.nn import functional as F

    from embedded.base_model import build_vae

    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=settings.vae_lr, weight_decay=1e-3, betas=(0.9, 0.99)
    )
    checkpoint = Checkpoint(
        Path(settings.work) / "vae.pt", settings.save_minutes, vae=vae, optimizer=optimizer
    )
    pixels = to_pixels(images)
    for step in range(checkpoint.load(generator), settings.vae_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.vae_lr * cosine(step, settings.vae_steps)
        pick = torch.randint(len(pixels), (settings.vae_batch,), generator=generator)
        batch = augment(pixels[pick], generator).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(z).sample
        error = F.mse_loss(output, batch)
        mse = error.item()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error + 0.1 * F.l1_loss(output, batch) + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(
                f"vae {step}/{settings.vae_steps} mse {mse:.4f} kl {kl.item():.2f} psnr {10 * math.log10(4 / mse):.2f}",
                flush=True,
            )
        checkpoint.save(step + 1, generator)
    checkpoint.save(settings.vae_steps, generator, now=True)
    return vae.eval(), checkpoint.spent + time.time() - checkpoint.started


def reconstruct(vae, images):
    """(pictures in [-1, 1] (N, 3, H, W), PSNR of each in dB (N,)) of mode reconstructions of uint8 (N, H, W, 3)."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x = to_pixels(images)
    with torch.no_grad():
        y = [
            vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
            for part in x.split(64)
        ]
    y = torch.cat(y)
    return y, peak_signal_noise_ratio(y, x, data_range=(-1, 1), reduction="none", dim=(1, 2, 3))


def psnr(vae, images) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB."""
    return float(reconstruct(vae, images)[1].mean())


class Latents:
    """The public pictures of the chosen styles as cached posteriors, and three captions of each as token ids."""

    def __init__(self, settings, vae, tokenizer, captions, images):
        import torch

        kept = [
            i
            for i, c in enumerate(captions)
            if c.rsplit(", ", 1)[1] in settings.unet_sets.split(",")
        ]
        captions, images = [captions[i] for i in kept], images[kept]
        with torch.no_grad():
            chunks = [
                vae.encode(to_pixels(images[i : i + 64])).latent_dist
                for i in range(0, len(images), 64)
            ]
        self.mean, self.std = (
            torch.cat([c.mean for c in chunks]),
            torch.cat([c.std for c in chunks]),
        )  # (N, C, h, w)
        self.scale = float(1 / (self.mean.var() + self.std.square().mean()).sqrt())
        if settings.start:
            self.scale = vae.config.scaling_factor  # what the UNet knows
        plain = [c.rsplit(",", 1)[0] for c in captions]
        texts = captions, plain, [""] * len(captions)
        pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = torch.stack([tokenizer(t, **pad).input_ids for t in texts])  # (3, N, L)

    def draw(self, settings, generator):
        """A batch: scaled latents (B, C, h, w), token ids (B, L), timesteps (B,), noise (B, C, h, w)."""
        import torch

        n = settings.unet_batch
        pick = torch.randint(len(self.mean), (n,), generator=generator)
        u = torch.rand(n, generator=generator)
        kind = (u < settings.drop_caption).long() * 2  # 0 with style, 1 without, 2 no caption
        kind[(u >= settings.drop_caption) & (u < settings.drop_caption + settings.drop_style)] = 1
        t = torch.randint(1000, (n,), generator=generator)
        noise = torch.randn((2, *self.mean[pick].shape), generator=generator)
        return (
            self.scale * (self.mean[pick] + self.std[pick] * noise[0]),
            self.ids[kind, pick],
            t,
            noise[1],
        )


def begin(settings, captions):
    """(tokenizer, {"unet": ..., "text_encoder": ...}) with fresh weights, or those of the folder to go on from."""
    from embedded.base_model import build_text_encoder, build_tokenizer, build_unet

    if settings.start:
        found = load_pipeline(settings.start)
        return found.tokenizer, {"unet": found.unet, "text_encoder": found.text_encoder}
    tokenizer = build_tokenizer(captions, Path(settings.work) / "tokenizer")
    return tokenizer, {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}


def train_unet(settings, vae, captions, images):
    """UNet and text encoder on cached latents; returns the averaged pair, the tokenizer, the scale and the seconds."""
    import torch
    from torch.optim.swa_utils import AveragedModel

    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    tokenizer, parts = begin(settings, captions)
    model = torch.nn.ModuleDict(parts).train()

    def blend(old, new, count):  # the early weights are forgotten quickly, whatever the final decay
        torch._foreach_lerp_(
            old, new, 1 - min(settings.ema, (1 + float(count)) / (10 + float(count)))
        )

    averaged = AveragedModel(model, multi_avg_fn=torch.no_grad()(blend))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.unet_lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=True
    )
    model["unet"].to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    checkpoint = Checkpoint(Path(settings.work) / "unet.pt", settings.save_minutes, **parts)
    latents = Latents(settings, vae, tokenizer, captions, images)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    start, tick = checkpoint.load(generator), time.time()
    denoise = model["unet"] if settings.no_compile else torch.compile(model["unet"])
    precision = getattr(torch, settings.precision)
    for step in range(start, settings.unet_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.unet_lr * cosine(step, settings.unet_steps, warmup=200)
        batch = latents.draw(settings, generator)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            error, loss = unet_loss(
                denoise, model["text_encoder"], abar, settings.snr_gamma, *batch
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        if step % 50 == 0:
            pace = (time.time() - tick) / (step - start + 1)
            print(
                f"unet {step}/{settings.unet_steps} eps-mse {error:.4f} weighted {loss:.4f} {pace:.2f} s/step",
                flush=True,
            )
        checkpoint.save(step + 1, generator)
    checkpoint.save(max(start, settings.unet_steps), generator, now=True)
    return (
        averaged.module.eval(),
        tokenizer,
        latents.scale,
        checkpoint.spent + time.time() - checkpoint.started,
    )


def unet_loss(unet, text_encoder, abar, gamma, z0, ids, t, noise):
    """(mean squared error, its min-SNR weighted mean) of the predicted noise."""
    a = abar[t].view(-1, 1, 1, 1)
    pred = unet(a.sqrt() * z0 + (1 - a).sqrt() * noise, t, text_encoder(ids)[0]).sample
    error = (pred.float() - noise).square().mean((1, 2, 3))
    snr = abar[t] / (1 - abar[t])
    return error.mean(), (error * (snr.clamp_max(gamma) / snr)).mean()


def show(settings, captions):
    """Two pictures of the finished pipeline in the work folder: 40 samples from random captions that the UNet learned,
    and reconstructions of 20 random private pictures, each with its PSNR."""
    import numpy as np
    import torch

    import plots
    from diffusion import encode_captions, load_base, sample
    from embedded import emojis

    base, rng, work = (
        load_base(settings.out),
        np.random.default_rng(settings.seed),
        Path(settings.work),
    )
    learned = [c for c in captions if c.rsplit(", ", 1)[1] in settings.unet_sets.split(",")]
    texts = [str(c) for c in rng.choice(learned, 40, replace=False)]
    noise = torch.randn(
        (40, *base.latent_shape), generator=torch.Generator().manual_seed(settings.seed)
    )
    made = sample(
        base,
        encode_captions(base, texts),
        encode_captions(base, [""]),
        noise,
        50,
        settings.guidance,
    )
    plots.captioned(made, texts, 10, work / "samples.png")
    private = emojis.twemoji()
    chosen = rng.choice(len(private[1]), 20, replace=False)
    pictures, values = reconstruct(base.pipeline.vae, private[2][chosen])
    pictures = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    titles = [
        f"{private[1][i]}, {value:.1f} dB" for i, value in zip(chosen, values.tolist(), strict=True)
    ]
    plots.captioned(pictures, titles, 10, work / "reconstructions.png")


def main(settings):
    """Run the stages asked for."""
    import diffusers
    import torch
    import transformers

    from embedded import emojis
    from embedded.base_model import export, pipeline

    torch.set_num_threads(settings.threads)
    made_by = asdict(settings)
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    captions, images = emojis.public(Path(settings.icons), Path(settings.work))
    print(f"{len(captions)} public pictures of {images.shape[1]} px")
    if settings.stage == "export":
        settings.vae_steps = settings.unet_steps = 0  # load what there is
    vae, vae_seconds = (
        (load_pipeline(settings.start).vae, 0) if settings.start else train_vae(settings, images)
    )
    private = psnr(vae, emojis.twemoji()[2])
    print(
        f"reconstruction PSNR: public {psnr(vae, images[::10]):.2f} dB, private (never seen) {private:.2f} dB"
    )
    if settings.stage == "vae":
        return
    model, tokenizer, scale, unet_seconds = train_unet(settings, vae, captions, images)
    card = {
        "settings": made_by,
        "public_images": len(captions),
        "psnr_private_db": round(private, 2),
        "seconds": {"vae": round(vae_seconds), "unet": round(unet_seconds)},
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
    }
    before = Path(settings.start or ".") / "pretraining.json"
    if settings.start and before.is_file():
        card["started_from"] = json.loads(before.read_text())
    vae.register_to_config(scaling_factor=scale)
    export(
        pipeline(vae, model["text_encoder"], tokenizer, model["unet"]),
        settings.out,
        settings.start or settings.work,
    )
    (Path(settings.out) / "pretraining.json").write_text(json.dumps(card, indent=2) + "\n")
    show(settings, captions)
    print(f"wrote {settings.out}; look at samples.png and reconstructions.png in {settings.work}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
