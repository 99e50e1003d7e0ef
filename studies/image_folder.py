"""A folder of captioned images that is there whole or not at all, as --data takes it.

Tested in tests/test_copies.py and tests/test_paper_tables.py.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path, images: Iterable[tuple[str, np.ndarray, str]]) -> None:
    """Write (name without suffix, pixels (H, W, 3) uint8, caption) of each image as name.png beside
    name.txt; a name may have sub-folders.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill has left
    for name, pixels, caption in images:
        file = aside / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        file.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    os.replace(aside, folder)
