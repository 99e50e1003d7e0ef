"""Images with captions, and who among them is a member.

    images = load_images("twemoji", size=48)            # the embedded private set
    images = load_images("my_folder", 512, "a photo")   # or your own
    images = load_images("my_folder", 512, nonmembers="openmoji")   # and others' as non-members

A folder holds captioned images in one of the forms of files/folders.py, or the paper's four
sub-folders D^m_aux, D^m_te, D^nm_aux, D^nm_te, each in one of these forms.  The sub-folders are
then the split; other folders are split by files/roles.py.  Tested in tests/test_data.py.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from command import progress
from command.errors import UserError, shown
from files import EMBEDDED_SETS, folders
from files.copies import near_duplicates

SIDES = ("member", "nonmember")
PARTS = ("aux", "val", "test")
ROLES = (*(f"{side}_{part}" for side in SIDES for part in PARTS), "fresh")
# the paper's folder: the roles it is cut into.  Members first: of two copies the first stays
FOLDERS = {
    "D^m_aux": ("member_aux", "member_val"),
    "D^m_te": ("member_test",),
    "D^nm_aux": ("nonmember_aux", "nonmember_val"),
    "D^nm_te": ("nonmember_test",),
}
OUTSIDE = "nonmembers/"  # before the names of the images of --nonmembers
# the only decoders that Pillow may try, whatever the file's name is
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]
FORMATS += ["AVIF"] if ".avif" in folders.SUFFIXES else []
# what others a file can be, by its first bytes; cameras and the web give them any name
OTHERS = {
    "HEIC": rb"....ftyp(hei|hev|mif|msf)",
    "AVIF": rb"....ftypavi",
    "JPEG XL": rb"\xff\n|\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP|\xffO\xffQ",
    "a Photoshop file": rb"8BPS",
    "a PDF": rb"%PDF",
    "a web page or an SVG": rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]",
}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB, in all or at once
PIXELS = (8, 20_000)  # the shortest and longest side of an image
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of a colour profile: Pillow's mode


@dataclass
class Images:
    """N captioned images, in the order of their names."""

    names: list[str]  # file names, relative to the folder
    captions: list[str]
    pixels: np.ndarray  # (N, size, size, 3) uint8 RGB
    # indices per sub-folder (keys of FOLDERS) if the folder comes split
    folders: dict[str, list[int]] | None = None
    private: int | None = None  # with --nonmembers: the number of one's own, which come first
    # (height, width) of the files, upright; None: they are squares of `size`
    sizes: list[tuple[int, int]] | None = None

    def take(self, index: list[int]) -> "Images":
        """Some of the images."""
        names, captions = ([given[i] for i in index] for given in (self.names, self.captions))
        sizes = self.sizes and [self.sizes[i] for i in index]
        return Images(names, captions, self.pixels[index], private=self.private, sizes=sizes)

    def hashes(self) -> list[str]:
        """The SHA-256 of the pixels, at the size loaded, and the caption of each image."""
        return [
            hashlib.sha256(p.tobytes() + c.encode("utf-8", "surrogatepass")).hexdigest()
            for p, c in zip(self.pixels, self.captions, strict=True)
        ]


def load_images(
    data: str, size: int, caption: str | None = None, nonmembers: str | None = None
) -> Images:
    """The set `data`, one of EMBEDDED_SETS or a folder, as squares of `size` pixels.

    The images of the set `nonmembers` follow; OUTSIDE is put before their names.  `caption` is for
    images that have none of their own.  Prints one line if something in the folder is not used, or
    if `caption` is for some images only.
    Raises UserError for a folder, image or caption that cannot be used.
    """
    images = _load(data, size, caption)
    if nonmembers is None:
        return images
    if images.folders:
        raise UserError(f"{shown(data)} has non-members of its own: leave --nonmembers out")
    others = _load(nonmembers, size, caption)
    names = [OUTSIDE + name for name in others.names]
    if set(names) & set(images.names):
        raise UserError(f"{shown(data)} has a sub-folder nonmembers: rename it")
    pixels = np.concatenate([images.pixels, others.pixels])
    captions = images.captions + others.captions
    sizes = [s for x in (images, others) for s in x.sizes or [(size, size)] * len(x.names)]
    private = len(images.names)
    return Images(images.names + names, captions, pixels, private=private, sizes=sizes)


def check(data: str, caption: str | None = None) -> int | None:
    """How many images a folder lists, None for an embedded set; opens no picture.

    Raises UserError for a folder or captions that cannot be used.
    """
    if data in EMBEDDED_SETS:
        return None
    with _readable(Path(data)):
        return len(_listed(Path(data), caption)[2])


def _load(data: str, size: int, caption: str | None) -> Images:
    if data in EMBEDDED_SETS:
        from files import emojis

        with progress.stage(f"reading images of {data}"):
            return Images(*getattr(emojis, data)(size))
    with _readable(Path(data)):
        return _load_folder(Path(data), size, caption)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses is a UserError."""
    try:
        yield
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise UserError(
            f"cannot read {shown(where)} ({why}): check that it exists and may be read"
        ) from error


def _load_folder(folder: Path, size: int, caption: str | None) -> Images:
    found, indices, captions, notes = _listed(folder, caption)
    files = [file for file, _ in found.images]
    if found.left:
        notes.append(f"not used: {found.unused(folder)}")
    if notes:
        print("; ".join([f"images read from {shown(folder)}: {len(files)}", *notes]))
    try:
        pixels = np.empty((len(files), size, size, 3), np.uint8)
    except (MemoryError, ValueError) as error:
        raise UserError(
            f"{len(files)} images of {size}x{size} pixels do not fit in memory: "
            "take fewer or smaller ones"
        ) from error
    damaged: list[Path] = []
    sizes = [(size, size)] * len(files)
    for i in progress.over(range(len(files)), "reading images"):
        pixels[i], sizes[i] = _square(files[i], size, damaged)
    if damaged:
        print(
            f"note: the colour profiles of {len(damaged)} images cannot be used, their pixels are "
            f"taken as they are; the first: {shown(damaged[0])}"
        )
    return Images(
        names=[file.relative_to(folder).as_posix() for file in files],
        captions=captions,
        pixels=pixels,
        folders=indices,
        sizes=sizes,
    )


def _listed(folder: Path, caption: str | None) -> tuple:
    """What a folder holds: (files, their indices per sub-folder of the paper, captions, notes)."""
    if not folder.exists():
        raise UserError(
            f'there is no folder {shown(folder)}: give a folder of images, or "twemoji" for the '
            "embedded set"
        )
    if not folder.is_dir():
        raise UserError(f"{shown(folder)} is a file: give the folder that holds the images")
    if caption is not None:
        caption = folders.caption(caption, "--caption")
        if not caption:
            raise UserError("--caption is empty: give the words that describe the images")
    found, indices = _find(folder)
    return found, indices, *_captions(found.images, caption)


def _find(folder: Path) -> tuple[folders.Found, dict[str, list[int]] | None]:
    """What a folder holds, and the indices of its images per sub-folder of the paper, if any."""
    present = [name for name in FOLDERS if (folder / name).is_dir()]
    if not present:
        return folders.find(folder), None
    if len(present) < len(FOLDERS):
        missing = ", ".join(name for name in FOLDERS if name not in present)
        raise UserError(
            f"{shown(folder)} has {', '.join(present)} but not {missing}: add them, or rename the "
            "others"
        )
    found, indices = folders.Found(), {}
    for name in FOLDERS:
        start = len(found.images)
        found.add(folders.find(folder / name))
        indices[name] = list(range(start, len(found.images)))
    beside = [f for f in folder.iterdir() if f.name not in FOLDERS and f.name[0] != "."]
    if beside:
        found.left["what is beside the four folders"] = sorted(beside)
    return found, indices


def _captions(
    images: list[tuple[Path, str | None]], caption: str | None
) -> tuple[list[str], list[str]]:
    """The caption of every image, and a note if `caption` is for some of them only."""
    bare = [file for file, text in images if text is None]
    if caption is None:
        if bare:
            raise UserError(
                f"{len(bare)} of {len(images)} images have no caption, the first is "
                f"{shown(bare[0])}: write {shown(bare[0].stem)}.txt beside it, or give "
                "--caption for all"
            )
        return [text for _, text in images], []
    notes = [f"--caption is for {len(bare)} of them"] if len(bare) < len(images) else []
    return [caption if text is None else text for _, text in images], notes


def _square(file: Path, size: int, damaged: list[Path]) -> tuple[np.ndarray, tuple[int, int]]:
    """The central square of an image file, upright and on white, scaled by Lanczos, in sRGB: uint8
    (size, size, 3); and the (height, width) of the whole.  A file whose colour profile cannot be
    used joins `damaged`.

    Raises UserError for a file that cannot be used, OSError if the system refuses it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
        with image:
            profile = image.info.get("icc_profile")
            image = _upright(image, shown(file))
            whole = image.height, image.width
            # fit() crops before it scales: a strip of 8 x 20,000 scaled whole would fill the memory
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        try:
            image = _in_srgb(image, profile) if profile else image
        except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
            damaged.append(file)
        return np.asarray(image.convert("RGB")), whole
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(
            f"{shown(file)} is too large to decode safely: scale it down or remove it"
        ) from error
    except (UserError, MemoryError):
        raise
    # a broken file makes Pillow raise anything: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # open() failed; decoders name no file
            raise
        raise UserError(f"{shown(file)} {_why(file, error)}") from error


def _why(file: Path, error: Exception) -> str:
    """Why an image cannot be read."""
    if "MAX_TEXT" in str(error):
        return "holds more than 64 MB of text or profile: save it without"
    with open(file, "rb") as opened:
        begin = opened.read(100)
    for kind, known in OTHERS.items():
        if re.match(known, begin, re.DOTALL):
            return f"is {kind}, whatever its name says: save it as PNG or JPEG"
    return "is not a readable image (corrupt, cut short or empty): replace it"


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image of another colour profile, such as Adobe RGB or Display P3, in sRGB.

    Raises one of several errors for a profile that is damaged or of another kind of image.
    """
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "srgb" in ImageCms.getProfileDescription(given).lower():
        return image
    mode = SPACES[given.profile.xcolor_space.strip()]
    if "CMYK" in (mode, image.mode) and mode != image.mode:
        raise ValueError(f"a profile of {mode} for {image.mode}")
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image.convert(mode), given, srgb, outputMode="RGB")


def _upright(image: Image.Image, where: str) -> Image.Image:
    """The first frame in RGB, or CMYK with a colour profile, turned as its EXIF says, on white."""
    if min(image.size) < PIXELS[0] or max(image.size) > PIXELS[1]:
        raise UserError(
            f"{where} is {image.width}x{image.height} pixels: remove it or scale it to sides of "
            f"{PIXELS[0]} to {PIXELS[1]:,}"
        )
    if image.mode in ("I", "F"):  # 32-bit TIFF does not say which value is white
        raise UserError(f"{where} has 32 bits per channel: save it with 8 or 16")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    profiled = image.mode == "CMYK" and image.info.get("icc_profile")
    if image.mode != mode and not profiled:  # convert() would copy it
        image = image.convert(mode)
    return _on_white(image) if mode == "RGBA" else image


def _on_white(image: Image.Image, rows: int = 1000) -> Image.Image:
    """An RGBA image over white as RGB.  By strips: copies of the whole could take a gigabyte."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        ground = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(ground, strip).convert("RGB"), (0, top))
    return result


def distinct(images: Images, order: list[int]) -> list[int]:
    """The images of `order` that repeat none before them, sorted.  Prints what is left out."""
    first = near_duplicates(images.pixels[order])
    copies = [(order[i], order[f]) for i, f in enumerate(first) if i != f]
    if copies:
        copy, original = (images.names[i] for i in copies[0])
        print(
            f"left out {len(copies)} of {len(order)} images, copies of others; the first: "
            f"{shown(copy)} = {shown(original)}"
        )
    return sorted(set(order) - {copy for copy, _ in copies})


def parts(members: int) -> tuple[int, int, int]:
    """(auxiliary, validation, test) members: half, a fifth of the rest, and what is left."""
    aux = members // 2
    val = round((members - aux) / 5)
    return aux, val, members - aux - val


def split_as_it_comes(images: Images, seed: int) -> dict[str, list[int]]:
    """The roles in a folder with the paper's sub-folders: {role: sorted indices}.

    A random tenth of each auxiliary set is for validation.  Of near-duplicates the member stays.
    Raises UserError if a sub-folder holds too few images.
    """
    kept = set(distinct(images, [i for part in FOLDERS for i in images.folders[part]]))
    rng, roles = np.random.default_rng(seed), {"fresh": []}
    for part, names in FOLDERS.items():
        pool = sorted(set(images.folders[part]) & kept)
        val = max(1, round(len(pool) / 10)) if len(names) == 2 else 0
        if len(pool) < val + 2:
            raise UserError(
                f"{part} holds {len(pool)} distinct images but needs {len(names) + 1}: add "
                "some (the sub-folders are the split, so --members cannot help)"
            )
        roles |= deal(pool, dict(zip(names, (len(pool) - val, val), strict=False)), rng)
    return {role: roles[role] for role in ROLES}


def deal(pool: list[int], sizes: dict[str, int], rng: np.random.Generator) -> dict[str, list[int]]:
    """Shuffle `pool` and cut it into pieces of the given sizes, each sorted; the last takes all the
    rest.
    """
    cuts = np.cumsum(list(sizes.values()))[:-1]
    return {
        role: sorted(cut.tolist())
        for role, cut in zip(sizes, np.split(rng.permutation(pool), cuts), strict=True)
    }
