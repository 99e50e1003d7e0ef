"""Train the embedded base model: a small latent diffusion model of public emoji pictures.

    # the public sets that are not on PyPI
    for s in noto fluent-emoji-flat emojione; do
        npm pack @iconify-json/$s; mkdir -p icons/$s
        tar xzf iconify-json-$s-*.tgz -C icons/$s --strip 1; done
    # autoencoder, then UNet and text encoder: hours on a CPU
    python -m embedded.pretrain
    # train the UNet of a finished folder further
    python -m embedded.pretrain --start base --out base2 --work pretraining/further

Two stages, as for Stable Diffusion (Rombach et al. 2022): train_vae.py, then train_unet.py.  Both
save their state in --work every few minutes, and the same command continues from there.  The
private pictures (Twemoji) take no part: they only show, at the end, how well the autoencoder
reconstructs pictures that it has never seen.

Credits and licences of the pictures are in base/README.md; settings, versions and time in
base/pretraining.json.
"""

import json
from dataclasses import asdict
from pathlib import Path

from command.errors import one_line_errors
from command.flags import parse
from command.whole_files import write_json
from embedded.settings import Settings


def main(settings: Settings) -> None:
    """Train both stages, or with `--start` the second one, and write the folder.

    Raises UserError for missing npm packages, a `--start` that cannot be loaded, and a `--work`
    that belongs to another run.  Imports are local, so that --help is answered at once.
    """
    import torch

    from embedded.train_unet import train_unet
    from embedded.train_vae import reconstruct, train_vae
    from files import emojis
    from files.bases import load_base

    torch.set_num_threads(settings.threads)
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    captions, images = emojis.public(Path(settings.icons), Path(settings.work))
    print(f"{len(captions)} public pictures of {images.shape[1]} px")
    if settings.start:
        vae, seconds = load_base(settings.start).pipeline.vae, 0.0
    else:
        vae, seconds = train_vae(settings, images)
    sets = images[::10], emojis.twemoji()[2]
    public, private = (float(reconstruct(vae, some)[1].mean()) for some in sets)
    print(f"reconstruction PSNR: public {public:.2f} dB, private (never seen) {private:.2f} dB")
    trained = train_unet(settings, vae, captions, images)
    facts = {
        "public_images": len(captions),
        "psnr_private_db": round(private, 2),
        "seconds": {"vae": round(seconds), "unet": round(trained.seconds)},
    }
    write(settings, vae, trained, facts)
    show(settings, captions)
    print(f"wrote {settings.out}; look at samples.png and reconstructions.png in {settings.work}")


def write(settings: Settings, vae, trained, facts: dict) -> None:
    """Write the pipeline folder `--out` and its pretraining.json, with the settings, `facts`,
    versions, and the same of the folder `--start`.
    """
    import diffusers
    import torch
    import transformers

    from embedded.base_model import export, pipeline

    versions = {m.__name__: m.__version__ for m in (torch, diffusers, transformers)}
    card = {"settings": asdict(settings), **facts, "versions": versions}
    before = Path(settings.start or ".") / "pretraining.json"
    if settings.start and before.is_file():
        card["started_from"] = json.loads(before.read_text())
    vae.register_to_config(scaling_factor=trained.scale)
    model = trained.model
    made = pipeline(vae, model["text_encoder"], trained.tokenizer, model["unet"])
    export(made, settings.out, settings.start or settings.work)
    write_json(Path(settings.out) / "pretraining.json", card)


def show(settings: Settings, captions: list[str]) -> None:
    """Draw two pictures of the finished folder, in `--work`.

    samples.png: 40 samples of captions that the UNet learned.  reconstructions.png: 20 private
    pictures after the autoencoder, each with its PSNR.
    """
    import numpy as np
    import torch

    from curves import plots
    from diffusion import encode_captions, sample
    from embedded.train_unet import learned
    from embedded.train_vae import reconstruct
    from files import emojis
    from files.bases import load_base

    base, work = load_base(settings.out), Path(settings.work)
    rng = np.random.default_rng(settings.seed)
    known = [captions[i] for i in learned(settings, captions)]
    texts = [str(caption) for caption in rng.choice(known, 40, replace=False)]
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn((40, *base.latent_shape), generator=generator)
    text, empty = encode_captions(base, texts), encode_captions(base, [""])
    made = sample(base, text, empty, noise, 50)
    plots.captioned(made, texts, 10, work / "samples.png")
    _, names, images = emojis.twemoji()
    chosen = rng.choice(len(names), 20, replace=False)
    pictures, values = reconstruct(base.pipeline.vae, images[chosen])
    pictures = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    pairs = zip(chosen, values.tolist(), strict=True)
    titles = [f"{names[i]}, {value:.1f} dB" for i, value in pairs]
    plots.captioned(pictures, titles, 10, work / "reconstructions.png")


if __name__ == "__main__":
    with one_line_errors():
        main(parse(Settings, __doc__))
