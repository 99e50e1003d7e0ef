"""Folders as people have them, one line on what is not used, bounds on reading."""

import json
import os
import socket
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command.errors import UserError
from files.folders import CHARACTERS
from files.images import FOLDERS, load_images

RED = (255, 0, 0)


def save(path: Path, colour=RED, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, **how)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, *pairs: tuple[str, object]) -> Path:
    """A metadata.jsonl of (file_name, text) pairs."""
    return write(path, "\n".join(json.dumps({"file_name": f, "text": t}) for f, t in pairs))


def message(folder: Path, *words: str, caption: str | None = None) -> str:
    """The text of the UserError that loading raises within five seconds: one line with `words`."""
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_images(str(folder), 8, caption)
    assert time.perf_counter() - start < 5
    text = str(caught.value)
    assert text.isprintable(), text  # no newline, no escape
    for word in words:
        assert word in text, text
    return text


def loaded(folder: Path, caption: str | None = None) -> dict[str, str]:
    images = load_images(str(folder), 8, caption)
    assert images.pixels.shape == (len(images.names), 8, 8, 3)
    return dict(zip(images.names, images.captions, strict=True))


def line(capsys) -> str:
    """What was printed since the last call: one line, returned, or nothing."""
    text = capsys.readouterr().out
    assert text.count("\n") == bool(text)
    return text.strip()


# ---- one caption for one image ----


@pytest.mark.parametrize("again", ["a.png", "./a.png", "sub/../a.png"])
def test_metadata_that_names_a_file_twice(tmp_path, again):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    metadata = rows(tmp_path / "metadata.jsonl", ("a.png", "one"), ("b.png", "x"), (again, "two"))
    message(tmp_path, f"{metadata} line 3", "'a.png' again", "line 1")
    metadata.unlink()
    write(tmp_path / "metadata.csv", f"file_name,text\na.png,one\nb.png,x\n{again},one\n")
    message(tmp_path, "metadata.csv line 4", "'a.png' again", "line 2")


def test_two_caption_files(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "a.caption", "two")
    message(tmp_path, "a.png has two captions", "a.caption", "a.txt", "keep one")


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption"])
def test_caption_files(tmp_path, capsys, name):
    save(tmp_path / "a.png")
    write(tmp_path / name, "\ufeff one \r\n two ")
    assert loaded(tmp_path) == {"a.png": "one two"} and line(capsys) == ""


@pytest.mark.parametrize(
    "text, words",
    [
        ("file_name,text\na.png,a cat, sitting on a red mat\n", ["line 2", "more fields"]),
        ("file_name,text\na.png,x,\n", ["line 2", "more fields"]),
        ("file_name,text,id\na.png,x,1\nb.png,x\n", ["line 3", "fewer fields"]),
        ('file_name,text\na.png,"open\nb.png,x\n', ["line", "not CSV"]),
        ('file_name,text\na.png,"blue" sky\n', ["line 2", "not CSV"]),
        ("file_name,text,text\na.png,x,y\n", ["has it twice"]),
        ("file_name;text\na.png;x\n", ["lacks a column", "commas"]),
    ],
)
def test_csv_rows_that_would_lose_words(tmp_path, text, words):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write(tmp_path / "metadata.csv", text)
    message(tmp_path, "metadata.csv", *words)


def test_csv_quotes(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    write(
        tmp_path / "metadata.csv", 'file_name,text\r\na.png,"red, ""x"",\nb"\r\nb.png,5" disk\r\n'
    )
    assert loaded(tmp_path) == {"a.png": 'red, "x", b', "b.png": '5" disk'}


@pytest.mark.parametrize(
    "text, words",
    [
        (["a", "b"], ["a list of captions", "'a.png'", "one string"]),
        (5, ["not text", "'a.png'"]),
        ({"en": "x"}, ["not text"]),
        ("\ud83d", ["half a character"]),
        ("x" * (CHARACTERS + 1), ["10,001 characters", "10,000"]),
    ],
)
def test_captions_that_are_none(tmp_path, text, words):
    save(tmp_path / "a.png")
    metadata = rows(tmp_path / "metadata.jsonl", ("a.png", text))
    message(tmp_path, f"{metadata} line 1", *words)
    write(metadata, '{"file_name": "a.png", "text": "x", "text": "y"}')
    message(tmp_path, "line 1", "twice")


# ---- one line on what is not used ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a cat".encode("utf-16-le"), "U+0000"),
        ("кот".encode("utf-16-le"), "U+0004"),
        ("a cat".encode("utf-16"), "not UTF-8"),
        ("a cat".encode("utf-32-be"), "U+0000"),
        (bytes(40), "U+0000"),
        (b"a \x1b[0m cat", "U+001B"),
        ("\u200b \ufeff\u2060".encode(), "is empty"),
    ],
)
def test_captions_that_are_not_text(tmp_path, content, words):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    message(tmp_path, "a.txt", words)


@pytest.mark.parametrize(("text", "words"), [("\0cat", "U+0000"), ("\u200b", "empty caption")])
def test_captions_in_metadata_that_are_not_text(tmp_path, text, words):
    save(tmp_path / "a.png")
    rows(tmp_path / "metadata.jsonl", ("a.png", text))
    message(tmp_path, "metadata.jsonl line 1", words)


def test_captions_that_are_text(tmp_path):
    """Joined emojis, accents, other scripts and directions."""
    captions = [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "e\u0301t\u00e9",
        "\u200f\u05d0",
        "猫",
    ]
    for i, text in enumerate(captions):
        save(tmp_path / f"{i}.png")
        write(tmp_path / f"{i}.txt", text)
    assert load_images(str(tmp_path), 8).captions == captions


def test_masks_are_no_pictures(tmp_path, capsys):
    """As OneTrainer and others name them; not if the picture is not there, or they have a caption,
    or the metadata lists them.
    """
    for name in ("a.jpg", "a-masklabel.png", "a_mask.PNG", "b.png", "b-mask.png", "c_mask.png"):
        save(tmp_path / name)
    write(tmp_path / "b-mask.txt", "a mask on a wall")
    names = ["a.jpg", "b-mask.png", "b.png", "c_mask.png"]
    assert load_images(str(tmp_path), 8, "x").names == names
    assert "masks of other images (2: a-masklabel.png, a_mask.PNG)" in capsys.readouterr().out
    rows(tmp_path / "metadata.jsonl", ("a.jpg", "a"), ("a_mask.PNG", "b"))
    assert load_images(str(tmp_path), 8).names == ["a.jpg", "a_mask.PNG"]


def test_line_on_files_that_are_not_read(tmp_path, capsys):
    save(tmp_path / "a.png")
    assert loaded(tmp_path, "x") == {"a.png": "x"} and line(capsys) == ""
    for name in ("b.heic", "captions.csv", "c.txt", "old/d.png", ".hidden"):
        write(tmp_path / name, "x")
    for i in range(1000):
        write(tmp_path / f"d{i:03d}.txt", "x")
    assert loaded(tmp_path, "x") == {"a.png": "x"}
    text = line(capsys)
    assert text.startswith(f"images read from {tmp_path}: 1; not used: ")
    for words in (
        "neither images it can read nor captions (2: b.heic, captions.csv)",
        "captions without an image (1001: c.txt, d000.txt, d001.txt, ...)",
        "sub-folders (1: old)",
    ):
        assert words in text
    assert "hidden" not in text


def test_line_beside_metadata(tmp_path, capsys):
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.png", "old/e.png"):
        save(tmp_path / name)
    write(tmp_path / "a.txt", "another caption")
    rows(tmp_path / "metadata.jsonl", ("a.png", "x"), ("sub/c.png", "y"))
    write(tmp_path / "metadata.csv", "file_name,text\nb.png,z\n")
    assert loaded(tmp_path) == {"a.png": "x", "sub/c.png": "y"}
    text = line(capsys)
    for words in (
        "images that metadata.jsonl does not list (2: b.png, sub/d.png)",
        "captions that metadata.jsonl stands for (1: a.txt)",
        "nor captions (1: metadata.csv)",
        "sub-folders (1: old)",
    ):
        assert words in text


def test_line_on_a_caption_for_some(tmp_path, capsys):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    write(tmp_path / "a.txt", "one")
    assert loaded(tmp_path, "the rest")["b.png"] == "the rest"
    assert line(capsys) == f"images read from {tmp_path}: 3; --caption is for 2 of them"


def test_line_beside_the_papers_folders(tmp_path, capsys):
    for folder in FOLDERS:
        save(tmp_path / folder / "a.png")
    write(tmp_path / "D^m_te" / "note.md", "x")
    save(tmp_path / "b.png")
    assert len(loaded(tmp_path, "x")) == 4
    text = line(capsys)
    assert "captions (1: D^m_te/note.md)" in text and "four folders (1: b.png)" in text


def test_a_folder_of_nothing_readable_says_what_is_there(tmp_path):
    write(tmp_path / "a.heic", "x")
    save(tmp_path / "inner" / "a.png")
    message(tmp_path, "no images", "a.heic", "inner", caption="x")


# ---- forms of folder and of name ----


@pytest.mark.parametrize("suffix, form", [("jfif", "JPEG"), ("avif", "AVIF"), ("JFIF", "JPEG")])
def test_other_suffixes(tmp_path, suffix, form):
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow has no {form}")
    save(tmp_path / f"a.{suffix}", format=form)
    pixels = load_images(str(tmp_path), 8, "x").pixels[0]
    assert np.abs(pixels.astype(int) - RED).max() < 8


def test_kohya_repeats(tmp_path, capsys):
    for name in ("10_cat/a.png", "10_cat/b.png", "2_dog/a.png", "log/x.png"):
        save(tmp_path / name)
    write(tmp_path / "10_cat" / "a.txt", "a cat")
    write(tmp_path / "10_cat" / "b.caption", "two cats")
    assert loaded(tmp_path, "a dog") == {
        "10_cat/a.png": "a cat",
        "10_cat/b.png": "two cats",
        "2_dog/a.png": "a dog",
    }
    text = line(capsys)
    assert "repeats, as each image is read once (2: 10_cat, 2_dog)" in text
    assert "sub-folders (1: log)" in text


@pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv"])
def test_hugging_face_train(tmp_path, capsys, metadata):
    save(tmp_path / "train" / "images" / "a.png")
    save(tmp_path / "test" / "b.png")
    if metadata.endswith("csv"):
        write(tmp_path / "train" / metadata, "file_name,text\nimages/a.png,x\n")
    else:
        rows(tmp_path / "train" / metadata, ("images/a.png", "x"))
    assert loaded(tmp_path) == {"train/images/a.png": "x"}
    assert "not used: sub-folders (1: test)" in line(capsys)


def test_folders_that_hold_themselves(tmp_path):
    for name in ("10_a", "2_b", "train"):
        (tmp_path / name).symlink_to(tmp_path)
    message(tmp_path, "no images", caption="x")


@pytest.mark.parametrize("on_disk, written", [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_normal_forms(tmp_path, on_disk, written):
    disk, listed = (unicodedata.normalize(form, "grün/é.png") for form in (on_disk, written))
    assert disk != listed
    save(tmp_path / disk)
    rows(tmp_path / "metadata.jsonl", (listed, "x"))
    assert loaded(tmp_path) == {disk: "x"}
    rows(tmp_path / "metadata.jsonl", (listed, "x"), (disk, "y"))
    message(tmp_path, "line 2", "again", "line 1")

    caption = Path(unicodedata.normalize(written, "grün/é.txt")).name
    write(tmp_path / disk, "").with_name(caption).write_text("beside")
    save(tmp_path / disk)
    assert loaded((tmp_path / disk).parent) == {Path(disk).name: "beside"}


def test_absolute_paths(tmp_path, monkeypatch):
    inside, outside = save(tmp_path / "set" / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    metadata = rows(tmp_path / "set" / "metadata.jsonl", (str(inside), "x"))
    assert loaded(tmp_path / "set") == loaded(tmp_path / "link") == {"a.png": "x"}
    monkeypatch.chdir(tmp_path)
    assert loaded(Path("set")) == {"a.png": "x"}
    for path in (outside, tmp_path / "set" / ".." / "b.png", "/set2/a.png"):
        rows(metadata, (str(path), "x"))
        message(tmp_path / "set", "line 1", "outside its folder")


def test_links_into_a_cache(tmp_path):
    save(tmp_path / "blobs" / "1234", format="PNG")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "blobs" / "1234")
    rows(tmp_path / "set" / "metadata.jsonl", ("a.png", "x"))
    assert loaded(tmp_path / "set") == {"a.png": "x"}


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[31m.png", "a\x00.png", "a" * 300, "a/b.png"])
def test_names_in_metadata_stay_on_one_line(tmp_path, name):
    save(tmp_path / "a.png")
    rows(tmp_path / "metadata.jsonl", (name, "x"))
    message(tmp_path, "line 1", "does not exist")


@pytest.mark.parametrize("name", [b"a\nb.png", b"a\x1b[31m.png", b"gr\xfcn.png"])
def test_names_on_disk_stay_on_one_line(tmp_path, name, capsys):
    file = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    file.write_text("no image")
    message(tmp_path, "not a readable image", caption="x")
    message(tmp_path, "no caption")
    file.rename(file.with_suffix(".raw"))
    save(tmp_path / "a.png")
    loaded(tmp_path, "x")
    assert line(capsys).isprintable()


# ---- bounds ----


def special(path: Path, kind: str) -> str:
    """Put something that is no regular file at `path`; returns the words that tell of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(path.parent)  # the name of a socket has 108 bytes at most
            server.bind(path.name)
    elif kind == "folder":
        path.mkdir()
        return "a folder"
    else:
        path.symlink_to(kind)
    return "a pipe, socket or device"


@pytest.mark.parametrize("kind", ["pipe", "socket", "/dev/zero", "/dev/null", "folder"])
@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl", "metadata.csv"])
def test_files_that_are_none(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    if name != "a.png":
        save(tmp_path / "a.png")
    words = special(tmp_path / name, kind)
    if (name, kind) != ("a.png", "folder"):  # that is a sub-folder
        message(tmp_path, f"cannot read {tmp_path / name}: it is {words}", caption="x")
    if name == "a.png":
        rows(tmp_path / "metadata.jsonl", ("a.png", "x"))
        message(tmp_path, f"cannot read {tmp_path / name}: it is {words}")


@pytest.mark.parametrize(
    "name, size", [("a.png", 10**12), ("a.txt", 20_000_000), ("metadata.csv", 10**12)]
)
def test_huge_files(tmp_path, name, size):
    save(tmp_path / "a.png")
    write(tmp_path / name, "x")
    os.truncate(tmp_path / name, size)  # a sparse file
    tracemalloc.start()
    message(tmp_path, name, "too large", f"{size:,} bytes", caption="x")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_long_captions(tmp_path):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "\U0001f34e" * CHARACTERS)  # four bytes each
    assert loaded(tmp_path)["a.png"] == "\U0001f34e" * CHARACTERS
    write(tmp_path / "a.txt", "x" * (CHARACTERS + 1))
    message(tmp_path, "a.txt", "10,001 characters", "10,000 at most")
    (tmp_path / "a.txt").unlink()
    message(tmp_path, "--caption", "10,001 characters", caption="x" * (CHARACTERS + 1))


def test_sizes_that_fit_in_no_memory(tmp_path):
    save(tmp_path / "a.png")
    for size in (10**7, 10**18):
        with pytest.raises(UserError, match="do not fit in memory"):
            load_images(str(tmp_path), size, "x")
