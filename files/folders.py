"""Folders of captioned images, in the forms people have them: which files, with which captions.

    found = find(Path("my_folder"))
    found.images    # [(file, caption or None), ...]
    found.left      # what is not used, by reason

A folder is one of these, recognised in this order:

    metadata.jsonl or metadata.csv with `file_name` and `text`    Hugging Face imagefolder
    name.png, with name.txt or name.caption beside it or not      kohya, as the paper's authors used
    no image, but a sub-folder `train` in one of the two forms    Hugging Face imagefolder
    no image, but sub-folders `10_name` in one of the two         kohya; each image is read once

A file is opened only if it is regular and of bounded size: reading a pipe may never end, and
/dev/zero has no end.  Tested in tests/test_folders.py.
"""

import csv
import functools
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from command.errors import UserError, shown
from command.whole_files import check_file, read_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
if ".avif" in Image.registered_extensions():  # Pillow 11.3 or later
    SUFFIXES.add(".avif")
CAPTIONS = {".txt", ".caption"}
METADATA = ("metadata.jsonl", "metadata.csv")
REPEATS = re.compile(r"\d+_.+")  # kohya: the images of `10_cat` count ten times per pass

# beside the picture it belongs to, as OneTrainer and others name them: cat-masklabel.png
MASK = re.compile(r"(.+)(-masklabel|-condlabel|[-_]mask)", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # UTF-16 read as UTF-8 has them

CHARACTERS = 10_000  # of a caption; the text encoders here read 77 tokens at most
METADATA_BYTES = 50_000_000  # half a million rows, read in a few seconds
IMAGE_BYTES = 500_000_000  # more than any image that Pillow would decode


@dataclass
class Found:
    """The images of a folder with their captions, and what is not used, by reason."""

    images: list[tuple[Path, str | None]] = field(default_factory=list)
    left: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: "Found") -> None:
        """Add what another folder holds."""
        self.images += other.images
        for reason, files in other.left.items():
            self.left[reason] += files

    def unused(self, folder: Path) -> str:
        """What is not used, in one line, with names relative to `folder`."""
        parts = []
        for reason, files in self.left.items():
            names = [shown(file.relative_to(folder).as_posix()) for file in files[:3]]
            names += ["..."] if len(files) > 3 else []
            parts.append(f"{reason} ({len(files)}: {', '.join(names)})")
        return "; ".join(parts)


def find(folder: Path) -> Found:
    """The images of `folder`, sorted by file, with None for the caption of one that has none.

    Raises UserError if there are none or if a file cannot be used, OSError if the system refuses.
    """
    found = Found()
    if not _gather(folder, found):
        inner = [f for f in found.left["sub-folders"] if f.name == "train"]
        repeats = [] if inner else [f for f in found.left["sub-folders"] if REPEATS.match(f.name)]
        for sub in inner or repeats:
            _gather(sub, found)
            found.left["sub-folders"].remove(sub)
        if repeats:
            found.left["repeats, as each image is read once"] = repeats
    found.left = {reason: files for reason, files in found.left.items() if files}
    if not found.images:
        unused = f"; not used: {found.unused(folder)}" if found.left else ""
        raise UserError(
            f"{shown(folder)} holds no images: put png, jpg, webp, bmp, gif or tif files directly "
            f"into it, or give another folder{unused}"
        )
    for file, _ in found.images:
        check_file(file, IMAGE_BYTES)
    return found


def caption(text: str, where: str) -> str:
    """`text` on one line, empty if nothing in it shows, as a zero-width space.  Raises UserError,
    with `where` in front, for one that cannot be used.
    """
    if len(text) > CHARACTERS:
        raise UserError(
            f"{where} has a caption of {len(text):,} characters: shorten it to "
            f"{CHARACTERS:,} at most"
        )
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(
            f"{where} has a caption with half a character (a lone surrogate): correct it"
        )
    line = " ".join(text.split())
    if control := CONTROL.search(line):
        raise UserError(
            f"{where} is not text: its caption holds the control character U+"
            f"{ord(control[0]):04X}; save it as UTF-8"
        )
    return line if any(c.isprintable() and c != " " for c in line) else ""


# ------------------------------------------------------------------------------------------------
# Which files


def _gather(folder: Path, found: Found) -> bool:
    """Add the images directly in `folder`, or those its metadata lists; False if there are none."""
    entries = _entries(folder)
    names = {f.name for f in entries}
    metadata = next((folder / name for name in METADATA if name in names), None)
    if metadata:
        images = _listed(metadata)
        used = {metadata} | {file for file, _ in images}
        above = {parent for file in used for parent in file.parents}
        entries = [f for f in entries if f not in above]
        inside = {file.parent for file, _ in images} - {folder}
        entries += sorted(f for sub in inside for f in _entries(sub) if _is_image(f))
        masks = set()
        beside = f"captions that {metadata.name} stands for"
    else:
        # not is_file(): a link to nothing is an error, not a file to leave out
        files = [f for f in entries if _is_image(f) and not f.is_dir()]
        captions = [f for f in entries if f.suffix.lower() in CAPTIONS]
        masks = _masks(files, captions)
        images, used = _beside([f for f in files if f not in masks], captions)
        beside = "captions without an image"
    found.images += sorted(images, key=lambda pair: pair[0])
    for f in entries:
        if f in used:
            continue
        if f.is_dir():
            found.left["sub-folders"].append(f)
        elif f in masks:
            found.left["masks of other images"].append(f)
        elif _is_image(f):
            found.left[f"images that {metadata.name} does not list"].append(f)
        elif f.suffix.lower() in CAPTIONS:
            found.left[beside].append(f)
        else:
            found.left["files that are neither images it can read nor captions"].append(f)
    return bool(images)


def _entries(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted, without hidden ones."""
    return sorted(f for f in folder.iterdir() if f.name[0] != ".")


def _is_image(file: Path) -> bool:
    """Whether its name ends as that of an image."""
    return file.suffix.lower() in SUFFIXES


def _masks(files: list[Path], captions: list[Path]) -> set[Path]:
    """The images that are named as the mask of another one and have no caption of their own."""
    stems, captioned = {f.stem for f in files}, {f.stem for f in captions}
    matches = {f: MASK.fullmatch(f.stem) for f in files if f.stem not in captioned}
    return {f for f, match in matches.items() if match and match[1] in stems}


def _beside(
    files: list[Path], captions: list[Path]
) -> tuple[list[tuple[Path, str | None]], set[Path]]:
    """Each image with the text of the caption file of the same name, if any; and the files used."""
    by_stem = defaultdict(list)
    for f in captions:
        by_stem[_normal(f.stem)].append(f)
    images, used = [], set(files)
    for file in files:
        texts = by_stem.get(_normal(file.stem), [])
        if len(texts) > 1:
            names = " and ".join(shown(f.name) for f in texts[:2])
            raise UserError(f"{shown(file)} has two captions, {names}: keep one of them")
        text = None
        if texts:
            used.add(texts[0])
            where = shown(texts[0])
            # a byte order mark, and up to four bytes for a character
            text = caption(read_text(texts[0], 3 + 4 * CHARACTERS), where)
            if not text:
                raise UserError(
                    f"{where} is empty: write the caption into it, or delete it and give --caption"
                )
        images.append((file, text))
    return images, used


# ------------------------------------------------------------------------------------------------
# Metadata


def _listed(metadata: Path) -> list[tuple[Path, str]]:
    """(image file, caption) of every row of metadata.jsonl or metadata.csv."""
    rows = _json_rows if metadata.suffix == ".jsonl" else _csv_rows
    listing = functools.cache(lambda folder: {_normal(f.name): f for f in folder.iterdir()})
    found, lines = [], {}
    for line, row in rows(metadata):
        where = f"{shown(metadata)} line {line}"
        file, text = _row(row, metadata.parent, where, listing)
        if file in lines:
            raise UserError(
                f"{where} names {file.name!r} again, as line {lines[file]} does: "
                "keep one caption for each image"
            )
        lines[file] = line
        found.append((file, text))
    if not found:
        raise UserError(f"{shown(metadata)} lists no images: write a row for each, or delete it")
    return found


def _row(row: dict, folder: Path, where: str, listing: Callable) -> tuple[Path, str]:
    """The image file and the caption of one row."""
    for column in ("file_name", "text"):
        if column not in row:
            raise UserError(f"{where} has no {column}: the columns needed are file_name and text")
    name, text = row["file_name"], row["text"]
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{where} has no usable file_name: write the image's path relative to {shown(folder)}"
        )
    if not isinstance(text, str | None):
        kind = "a list of captions" if isinstance(text, list) else "a caption that is not text"
        raise UserError(f"{where} has {kind} for {name!r}: write one string under text")
    text = caption(text or "", where)
    if not text:
        raise UserError(
            f"{where} has an empty caption for {name!r}: write one under text, or remove the row"
        )
    return _inside(folder, name, where, listing), text


def _inside(folder: Path, name: str, where: str, listing: Callable) -> Path:
    """The file `name` of `folder`, in whichever Unicode normal form the two are written."""
    # compared as written: the files of the Hugging Face cache are links to other folders
    path = Path(os.path.normpath(name))
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        if path.is_relative_to(root):
            path = path.relative_to(root)
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise UserError(
            f"{where} names {name!r} outside its folder: move the image into {shown(folder)}"
        )
    file = folder
    for part in path.parts:
        if not os.path.lexists(file / part):
            part = listing(file).get(_normal(part), part) if file.is_dir() else part
        file = file / part
    if not os.path.lexists(file) or (file.is_symlink() and not file.exists()):
        raise UserError(
            f"{where} names {name!r}, which does not exist: add the image, or remove the row"
        )
    return file


def _json_rows(metadata: Path) -> Iterator[tuple[int, dict]]:
    def once(pairs: Iterable[tuple]) -> dict:
        row = dict(pairs)
        if len(row) < len(pairs):
            raise UserError(f"{where} names a column twice: keep one of them")
        return row

    # splitlines() would also split at U+2028
    for line, text in enumerate(read_text(metadata, METADATA_BYTES).split("\n"), 1):
        where = f"{shown(metadata)} line {line}"
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f'{where} is not a JSON object: write {{"file_name": ..., "text": ...}}'
            )
        yield line, row


def _csv_rows(metadata: Path) -> Iterator[tuple[int, dict]]:
    # strict: else a quote left open takes in the rows below it
    reader = csv.DictReader(io.StringIO(read_text(metadata, METADATA_BYTES)), strict=True)
    try:
        for column in ("file_name", "text"):
            if (reader.fieldnames or []).count(column) != 1:
                raise UserError(
                    f"{shown(metadata)} lacks a column or has it twice: its first line must name "
                    "file_name and text once, separated by commas"
                )
        for row in reader:
            fewer = any(value is None for value in row.values())
            if fewer or None in row:
                raise UserError(
                    f"{shown(metadata)} line {reader.line_num} has {'fewer' if fewer else 'more'} "
                    "fields than the first line names: put captions with commas in double quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{shown(metadata)} line {reader.line_num + 1} is not CSV ({error}): correct that line"
        ) from error


def _normal(name: str) -> str:
    """One spelling for names that look the same; macOS writes accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
