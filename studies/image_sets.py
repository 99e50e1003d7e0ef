"""The images of --data under one caption, as DreamBooth has it (Ruiz et al. 2023).

Tested in tests/test_paper_tables.py.
"""

import os
import shutil
from pathlib import Path

from PIL import Image

from files.bases import load_base
from files.images import load_images
from settings import Settings


def one_caption(s: Settings, caption: str, folder: Path) -> Path:
    """`folder` with the images of --data under one caption, written if it is not there.

    A rare token and a word for what they are: nothing tells the images apart by words.  Images keep
    their order, and the paper's sub-folders, so a seed deals the same roles.
    """
    if folder.is_dir():
        return folder
    images = load_images(s.data, load_base(s.model, "cpu", "float32", s.size).size, caption)
    aside = folder.with_name(f"{folder.name}.tmp")  # the folder is there whole or not at all
    shutil.rmtree(aside, ignore_errors=True)  # what a kill has left
    for i, (name, pixels) in enumerate(zip(images.names, images.pixels, strict=True)):
        inside = aside / Path(name).parts[0] if images.folders else aside
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(inside / f"{i:06d}.png")
        (inside / f"{i:06d}.txt").write_text(f"{caption}\n", encoding="utf-8")
    os.replace(aside, folder)
    return folder
