"""The flags of `python -m embedded.pretrain`; imports nothing heavy, so that --help is quick."""

from dataclasses import dataclass

from command.flags import option


@dataclass
class Settings:
    """Everything that decides the weights; each field is a flag."""

    icons: str = option(
        "icons",
        "folder of the unpacked npm packages, one sub-folder per set (noto/icons.json, ...)",
    )
    out: str = option("base", "the StableDiffusionPipeline folder to write")
    work: str = option("pretraining", "raster cache, state, and the pictures to look at")
    start: str | None = option(
        None, "a pipeline folder to train further; its autoencoder stays as it is"
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
    no_compile: bool = option(
        False, "do not compile the UNet: a fifth slower, and needs no C++ compiler"
    )
    save_minutes: float = option(4.0, "between two saved states")
    threads: int = option(2, "CPU threads")
