"""Which pictures are copies of others, saved or scaled anew.  Tested in tests/test_data.py."""

import numpy as np
from PIL import Image

# Two images are near-duplicates if the mean squared differences of their thumbnails, in 0..1, are
# below these bounds: grey thumbnails of 16 x 16, also relative to the smaller variance of the two,
# and coloured ones of 4 x 4.  JPEG at quality 75, or scaling to a half, stays below them at 48
# pixels; any two images of the embedded set are above.
NEAR_GREY, NEAR_RELATIVE, NEAR_COLOUR = 1.2e-3, 0.1, 8e-4
ROUNDING = 1e-5  # added to the grey bound for images without contrast; less than a grey level
BLOCK = 512  # images compared with all before them in one product


def near_duplicates(pixels: np.ndarray) -> list[int]:
    """For each image of `pixels` (N, H, W, 3) the index of the first image that it repeats, its own
    if it repeats none.

    Copies that were saved or scaled anew count, see NEAR_GREY.  5,000 images take some seconds and
    0.1 GB.
    """
    grey, colour = _shades(pixels)
    variance = grey.var(1)
    first: list[int] = []
    for start in range(0, len(pixels), BLOCK):
        block, before = slice(start, start + BLOCK), slice(0, start + BLOCK)
        flatter = np.minimum(variance[block, None], variance[None, before])
        near = _distances(grey[block], grey[before]) < ROUNDING + np.minimum(
            NEAR_GREY, NEAR_RELATIVE * flatter
        )
        near &= _distances(colour[block], colour[before]) < NEAR_COLOUR
        for i, row in enumerate(near, start):
            repeated = (int(j) for j in np.flatnonzero(row[:i]) if first[j] == j)
            first.append(next(repeated, i))
    return first


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, 16, 16, 3) of pixels (N, H, W, 3)."""
    boxes = [Image.fromarray(p).resize((16, 16), Image.Resampling.BOX) for p in pixels]
    return np.stack([np.asarray(box) for box in boxes])


def _shades(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey (N, 256) and coloured (N, 48) thumbnails of values in -0.5..0.5."""
    small = thumbnails(pixels).astype(np.float32) / 255 - 0.5
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    colour = small.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4))
    return grey.reshape(len(small), -1), colour.reshape(len(small), -1)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference of each row of `a` (M, D) from each of `b` (N, D): (M, N)."""
    return ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T) / a.shape[1]
