"""Folders of captioned images that a study makes out of --data.

Tested in tests/test_copies.py and tests/test_paper_tables.py.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from files.bases import load_base
from files.images import Images, load_images
from settings import Settings


def read(s: Settings, caption: str | None) -> Images:
    """The images of --data at the size of the model; `caption` is for those without one."""
    return load_images(s.data, load_base(s.model, "cpu", "float32", s.size).size, caption)


def write(folder: Path, images: Iterable[tuple[str, np.ndarray, str]]) -> None:
    """Write (name without suffix, pixels (H, W, 3) uint8, caption) of each image as name.png beside
    name.txt.  A name may have sub-folders.  The folder is there whole or not at all.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill has left
    for name, pixels, caption in images:
        file = aside / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    os.replace(aside, folder)


def one_caption(s: Settings, caption: str, folder: Path) -> Path:
    """`folder` with the images of --data under one caption, written if it is not there.

    A rare token and a word for what they are, as DreamBooth has it (Ruiz et al. 2023): nothing
    tells the images apart by words.  Images keep their order, and the paper's sub-folders, so a
    seed deals the same roles.
    """
    if not folder.is_dir():
        images = read(s, caption)
        inside = [f"{Path(name).parts[0]}/" if images.folders else "" for name in images.names]
        names = [f"{part}{i:06d}" for i, part in enumerate(inside)]
        write(folder, ((n, x, caption) for n, x in zip(names, images.pixels, strict=True)))
    return folder
