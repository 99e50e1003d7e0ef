"""Captioned images as a base sees them, with progress and one note on captions that are cut."""

import torch

from command import progress
from diffusion import Base, Encoded, encode_captions, encode_images
from files import sdxl
from files.images import Images

FEW = 4  # images that stand for all in a dry run


def encode(base: Base, images: Images, roles: dict[str, list[int]], few: bool = False) -> Encoded:
    """The images with their latents and text embeddings; `roles` are positions among them.

    With `few` only FEW images are encoded, and stand for all of them.
    """
    if few:
        part = images.take(list(range(len(images.names)))[:FEW])
        data, at = encode(base, part, {}), torch.arange(len(images.names)) % len(part.names)
        latents, text = data.latents[at], data.text[at]
        return Encoded(images.names, images.captions, images.pixels, latents, text, roles)
    with progress.stage("encoding images", len(images.names)) as bar:
        latents = encode_images(base, images.pixels, bar.advance)
    tokenizer = base.pipeline.tokenizer
    most = tokenizer.model_max_length
    long = sum(len(ids) > most for ids in tokenizer(images.captions).input_ids)
    if long:
        print(f"note: {long} of {len(images.captions)} captions are cut to {most} tokens")
    with progress.stage("encoding captions", len(images.captions)) as bar:
        text = sdxl.framed(base, encode_captions(base, images.captions, bar.advance), images.sizes)
    return Encoded(images.names, images.captions, images.pixels, latents, text, roles)
