"""A set of images under one caption, a rare token and a word for what they are, as DreamBooth has
it (Ruiz et al. 2023): a copy of the set in which nothing tells the images apart by words.

Tested in tests/test_paper_tables.py.
"""

import hashlib
import os
import shutil
from pathlib import Path

from PIL import Image

from base_files import load_base
from cli import UserError
from data import load_images
from settings import EMBEDDED_SETS, Settings


def one_caption(s: Settings, caption: str | None, folder: Path) -> Path:
    """The folder of the images of a run's --data, at the size of its model, all captioned alike;
    made in `folder` if it is not there.

    Images keep their order, and the paper's sub-folders, so a seed deals the same roles.
    `caption` None is "sks emoji" for the embedded sets, "a picture of sks" for others.
    """
    caption = caption or ("sks emoji" if s.data in EMBEDDED_SETS else "a picture of sks")
    if not caption.strip():
        raise UserError("--token is empty: give a rare word and what the images are")
    found = folder / f"one-caption-{hashlib.sha256(caption.encode()).hexdigest()[:8]}"
    if not found.is_dir():
        aside = found.with_name(f"{found.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)  # what a kill has left
        _write(s, caption, aside)
        os.replace(aside, found)
    return found


def _write(s: Settings, caption: str, folder: Path) -> None:
    images = load_images(s.data, load_base(s.model, "cpu", "float32", s.size).size, caption)
    for i, (name, pixels) in enumerate(zip(images.names, images.pixels, strict=True)):
        inside = Path(name).parts[0] if images.folders else ""
        file = folder / inside / f"{i:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
