"""Images with captions, and who among them is a member.

    images = load_images("twemoji", size=48)            # the embedded private set
    images = load_images("my_folder", 512, "a photo")   # or your own
    roles = split(images, seed=0, members=100)          # {"member_aux": [3, 17, ...], ...}

A folder may come in three forms, recognised in this order:

    metadata.jsonl or metadata.csv with `file_name` and `text`    Hugging Face imagefolder
    name.png beside name.txt                                      kohya, as the paper's authors used
    images alone                                                  one caption for all: --caption

or as the paper's four sub-folders D^m_aux, D^m_te, D^nm_aux, D^nm_te, each in one of these forms; the split is then
taken from them.
"""

import csv
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cli import UserError

SIDES = ("member", "nonmember")
PARTS = ("aux", "val", "test")
ROLES = (*(f"{side}_{part}" for side in SIDES for part in PARTS), "fresh")
# the paper's folder -> the roles it is cut into; members first, so that they win over copies
FOLDERS = {
    "D^m_aux": ("member_aux", "member_val"),
    "D^m_te": ("member_test",),
    "D^nm_aux": ("nonmember_aux", "nonmember_val"),
    "D^nm_te": ("nonmember_test",),
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
)  # whatever the suffix says, PIL tries no other decoder
PIXELS = (8, 20_000)  # a side outside is taken for a mistake


@dataclass
class Images:
    """N captioned images, in the order of their names."""

    names: list[str]  # file names, relative to the folder
    captions: list[str]
    pixels: np.ndarray  # (N, size, size, 3) uint8 RGB
    # indices per sub-folder (keys of FOLDERS) if the folder comes split
    folders: dict[str, list[int]] | None = None

    def hashes(self) -> list[str]:
        """Per image the SHA-256 of its pixels, at the size loaded, and its caption; names do not count.

        Test: tests/test_data.py::test_hashes.
        """
        return [
            hashlib.sha256(p.tobytes() + c.encode("utf-8", "surrogatepass")).hexdigest()
            for p, c in zip(self.pixels, self.captions, strict=True)
        ]


def load_images(data: str, size: int, caption: str | None = None) -> Images:
    """The set `data`: "twemoji", or a folder in one of the forms above, as squares of `size` pixels.

    `caption` is given to images that have no caption of their own.  Where there is a metadata file, only the images
    that it names are read; otherwise those directly in the folder, hidden files excepted.
    Raises UserError for a folder, image or caption that cannot be used.  Test: tests/test_data.py.
    """
    if data == "twemoji":
        from embedded import emojis

        return Images(*emojis.twemoji(size))
    folder = Path(data)
    try:
        return _load_folder(folder, size, caption)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(
            f"cannot read {where} ({why}): check that it exists and is yours to read"
        ) from error


def _load_folder(folder: Path, size: int, caption: str | None) -> Images:
    if not folder.exists():
        raise UserError(
            f'there is no folder {folder}: give a folder of images, or "twemoji" for the embedded set'
        )
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder that holds the images")
    if caption is not None and not caption.strip():
        raise UserError("--caption is empty: give the words that describe the images")
    present = [part for part in FOLDERS if (folder / part).is_dir()]
    if present and len(present) < len(FOLDERS):
        missing = ", ".join(part for part in FOLDERS if part not in present)
        raise UserError(
            f"{folder} has {', '.join(present)} but not {missing}: add them, or rename the others"
        )
    found: list[tuple[Path, str]] = []
    folders: dict[str, list[int]] = {}
    for part in present or [""]:
        start = len(found)
        found += _captioned(folder / part, caption)
        folders[part] = list(range(start, len(found)))
    return Images(
        names=[path.relative_to(folder).as_posix() for path, _ in found],
        captions=[" ".join(text.split()) for _, text in found],
        pixels=np.stack([_square(path, size) for path, _ in found]),
        folders=folders if present else None,
    )


def _captioned(folder: Path, caption: str | None) -> list[tuple[Path, str]]:
    """(image file, caption) of one folder, sorted by file."""
    for metadata in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if metadata.exists():
            found = sorted(_listed(metadata))
            break
    else:
        # not is_dir() rather than is_file(): a dangling link is to be complained of, not passed over
        files = (
            f
            for f in folder.iterdir()
            if f.suffix.lower() in SUFFIXES and f.name[0] != "." and not f.is_dir()
        )
        found = [(f, _beside(f, caption)) for f in sorted(files)]
    if not found:
        raise UserError(
            f"{folder} holds no images: put png, jpg, webp, bmp, gif or tif files directly into it"
        )
    bare = [file for file, text in found if text is None]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(found)} images have no caption, the first is {bare[0]}: "
            f"write {bare[0].stem}.txt beside it, or give --caption for all"
        )
    return found


def _beside(file: Path, caption: str | None) -> str | None:
    """The caption in the .txt file beside an image, else `caption`."""
    text_file = file.with_suffix(".txt")
    if not text_file.exists():
        return caption
    text = _read(text_file)
    if not text.strip():
        raise UserError(
            f"{text_file} is empty: write the caption into it, or delete it and give --caption"
        )
    return text


def _listed(metadata: Path) -> list[tuple[Path, str]]:
    """(image file, caption) of every row of metadata.jsonl or metadata.csv."""
    found = []
    for line, row in (_json_rows if metadata.suffix == ".jsonl" else _csv_rows)(metadata):
        where = f"{metadata} line {line}"
        for column in ("file_name", "text"):
            if column not in row:
                raise UserError(
                    f"{where} has no {column}: the columns needed are file_name and text"
                )
        name, text = row["file_name"], row["text"]
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{where} has no usable file_name: write the image's path relative to {metadata.parent}"
            )
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where} has an empty caption for {name!r}: write one under text, or remove the row"
            )
        # compared as written, not resolved: the Hugging Face cache is made of links that lead elsewhere
        relative = Path(os.path.normpath(name))
        if relative.is_absolute() or relative.parts[:1] == ("..",):
            raise UserError(
                f"{where} names {name!r} outside its folder: move the image into {metadata.parent}"
            )
        if not (metadata.parent / relative).is_file():
            raise UserError(
                f"{where} names {name!r}, which does not exist: add the image, or remove the row"
            )
        found.append((metadata.parent / relative, text))
    return found


def _json_rows(metadata: Path) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(
        _read(metadata).split("\n"), 1
    ):  # splitlines() would also split at U+2028
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f'{metadata} line {line} is not a JSON object: write {{"file_name": ..., "text": ...}}'
            )
        yield line, row


def _csv_rows(metadata: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_read(metadata)))
    try:
        if not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise UserError(
                f"{metadata} lacks a column: its first line must name file_name and text"
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{metadata} line {reader.line_num + 1} is not CSV ({error}): mend that line"
        ) from error


def _read(file: Path) -> str:
    try:
        return file.read_text(
            encoding="utf-8-sig"
        )  # -sig: without the mark that Windows editors put first
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _square(file: Path, size: int) -> np.ndarray:
    """An image file as (size, size, 3) uint8: upright, on white, its central square, scaled with Lanczos."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        with image:
            if min(image.size) < PIXELS[0] or max(image.size) > PIXELS[1]:
                sides = f"{image.width}x{image.height} pixels"
                raise UserError(
                    f"{file} is {sides}: remove it or scale it to sides of {PIXELS[0]} to {PIXELS[1]:,}"
                )
            if image.mode in ("I", "F"):  # 32-bit TIFF; nothing says which value is white
                raise UserError(f"{file} has 32 bits per channel: save it with 8 or 16")
            image = ImageOps.exif_transpose(image)  # reads the first frame of an animation
            if image.mode.startswith(
                "I;16"
            ):  # PIL's own conversion clips at 255 instead of scaling
                image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            if image.mode == "RGBA":
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image
                ).convert("RGB")
            # fit() scales only what the crop needs: a strip of 8 x 20,000 scaled whole would fill the memory
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} is too large to decode safely: scale it down or remove it"
        ) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a broken file makes PIL raise anything: SyntaxError, struct.error, IndexError, ...
        if (
            isinstance(error, OSError) and error.filename
        ):  # open() was refused; the decoders name no file
            raise
        raise UserError(
            f"{file} is not a readable image (corrupt, cut short or empty): replace it"
        ) from error


def duplicates(pixels: np.ndarray) -> list[int]:
    """For each image of `pixels` (N, H, W, 3) the index of the first image with exactly the same pixels."""
    first: dict[bytes, int] = {}
    return [first.setdefault(hashlib.sha256(p.tobytes()).digest(), i) for i, p in enumerate(pixels)]


def split(images: Images, seed: int, members: int, preset: str = "default") -> dict[str, list[int]]:
    """Disjoint random roles: {role: sorted indices into `images`} for every role of ROLES.

        default    half of `members` in member_aux, a fifth of the rest in member_val, what is left in member_test;
                   nonmember_aux = member_aux, nonmember_val = 2 member_val; of what is left then a fifth is fresh,
                   the rest nonmember_test
        pokemon    the paper's sizes: aux 200, test 200 | aux 200, test 233, a tenth of each aux set aside for
                   validation, what is left is fresh (of the paper's 833 images none)

    A folder that comes split keeps its sub-folders, with the same tenth set aside; `members` and `preset` then do nothing.
    Of images with identical pixels only the first gets a role, so that no member is also a non-member (in a folder
    that comes split, the member), and a line is printed that says so.
    Raises UserError if there are too few images.  Test: tests/test_data.py.
    """
    order = (
        [i for part in FOLDERS for i in images.folders[part]]
        if images.folders
        else list(range(len(images.names)))
    )
    first = duplicates(images.pixels[order])
    copies = [(order[i], order[f]) for i, f in enumerate(first) if i != f]
    if copies:
        copy, original = (images.names[i] for i in copies[0])
        print(
            f"left out {len(copies)} of {len(order)} images, exact copies of others; the first: {copy} = {original}"
        )
    kept = sorted(set(order) - {copy for copy, _ in copies})
    rng = np.random.default_rng(seed)
    if images.folders:
        roles: dict[str, list[int]] = {"fresh": []}
        for part, names in FOLDERS.items():
            pool = sorted(set(images.folders[part]) & set(kept))
            val = max(1, round(len(pool) / 10)) if len(names) == 2 else 0
            if len(pool) < val + 2:
                raise UserError(
                    f"{part} holds {len(pool)} distinct images but needs {len(names) + 1}: add some "
                    "(--members cannot help, the folder comes split)"
                )
            roles |= _deal(pool, dict(zip(names, (len(pool) - val, val), strict=False)), rng)
    else:
        roles = _deal(kept, _sizes(len(kept), members, preset), rng)
    return {role: roles[role] for role in ROLES}


def _sizes(total: int, members: int, preset: str) -> dict[str, int]:
    """Number of images per role, for a set of `total` distinct images."""
    if preset == "default":
        aux = members // 2
        val = round((members - aux) / 5)
        if members < 5:
            raise UserError(
                f"--members is {members}: 5 is the least that gives every role an image"
            )
        needed, remedy = members + aux + 2 * val + 2, "add images or lower --members"
        fresh = round((total - needed + 2) / 5)
        counts = (aux, val, members - aux - val, aux, 2 * val, total - needed + 2 - fresh, fresh)
    elif preset == "pokemon":
        needed, remedy = 833, "add images, or take the default preset and choose --members"
        counts = (180, 20, 200, 180, 20, 233, total - needed)
    else:
        raise UserError(
            f'there is no preset "{preset}": take "default" (with --members) or "pokemon"'
        )
    if total < needed:
        raise UserError(
            f"the split needs at least {needed} distinct images and there are {total}: {remedy}"
        )
    return dict(zip(ROLES, counts, strict=True))


def _deal(pool: list[int], sizes: dict[str, int], rng: np.random.Generator) -> dict[str, list[int]]:
    """Shuffle `pool` and cut it into consecutive pieces of the given sizes, each then sorted."""
    cuts = np.cumsum(list(sizes.values()))[:-1]
    return {
        role: sorted(cut.tolist())
        for role, cut in zip(sizes, np.split(rng.permutation(pool), cuts), strict=True)
    }
