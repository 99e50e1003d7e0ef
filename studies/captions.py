"""A set of images under one caption, a rare token and a word for what they are, as DreamBooth has
it (Ruiz et al. 2023): a copy of the set in which nothing tells the images apart by words.

Tested in tests/test_paper_tables.py.
"""

import hashlib
from pathlib import Path

from command.errors import UserError
from files import EMBEDDED_SETS
from files.bases import load_base
from files.images import load_images
from settings import Settings
from studies import image_folder


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
        size = load_base(s.model, "cpu", "float32", s.size).size
        images = load_images(s.data, size, caption)
        inside = [f"{Path(name).parts[0]}/" if images.folders else "" for name in images.names]
        names = (f"{folder}{i:06d}" for i, folder in enumerate(inside))
        image_folder.write(
            found, ((n, x, caption) for n, x in zip(names, images.pixels, strict=True))
        )
    return found
