"""Forms of folder, kinds of pixel, messages, and splits that keep members apart."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from command.errors import UserError
from files import images as data
from files.copies import near_duplicates
from files.images import FOLDERS, PARTS, ROLES, SIDES, Images, load_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(path: Path, colour=RED, size=(16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def only_pixels(file: Path, size: int = 8) -> np.ndarray:
    return load_images(str(file.parent), size, "a photo").pixels[0]


def message(folder: Path | str, caption: str | None = None, *words: str) -> str:
    """The text of the UserError that loading raises: one line that holds `words`."""
    with pytest.raises(UserError) as caught:
        load_images(str(folder), 8, caption)
    text = str(caught.value)
    assert "\n" not in text and len(text) > 20
    for word in words:
        assert word in text, text
    return text


def test_roles_are_sides_by_parts():
    assert set(ROLES) == {f"{side}_{part}" for side in SIDES for part in PARTS} | {"fresh"}
    assert len(ROLES) == 7 and [r for roles in FOLDERS.values() for r in roles] == list(ROLES[:6])


def test_hashes():
    noise = np.random.default_rng(0).integers(0, 2, (4, 4, 4, 3), dtype=np.uint8)
    images = Images([f"{i}.png" for i in range(4)], ["x"] * 4, 255 * noise)
    images.pixels[3] = images.pixels[2]
    images.captions[1] = "xy"
    hashes = images.hashes()
    assert hashes[0] == hashlib.sha256(bytes(images.pixels[0].flat) + b"x").hexdigest()
    assert hashes[1] == hashlib.sha256(bytes(images.pixels[1].flat) + b"xy").hexdigest()
    assert hashes[2] == hashes[3] and len(set(hashes)) == 3
    images.names[0] = "renamed.png"
    assert images.hashes() == hashes


# ---- forms of folder ----


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_metadata_jsonl(tmp_path, mark):
    save(tmp_path / "b.png", BLUE)
    save(tmp_path / "sub" / "a.png", GREEN)
    save(tmp_path / "not_listed.png")
    rows = [
        {"file_name": "sub/a.png", "text": "gr\u00fcn\u2028 eins"},
        {"file_name": "./b.png", "text": " blue "},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(mark + lines + "\n", encoding="utf-8")
    images = load_images(str(tmp_path), 8)
    assert images.names == ["b.png", "sub/a.png"]
    assert images.captions == ["blue", "gr\u00fcn eins"]
    assert images.pixels.shape == (2, 8, 8, 3) and images.pixels.dtype == np.uint8
    assert (images.pixels[0] == BLUE).all() and (images.pixels[1] == GREEN).all()
    assert images.folders is None


def test_metadata_csv(tmp_path):
    save(tmp_path / "b.png", BLUE)
    save(tmp_path / "a.png", GREEN)
    (tmp_path / "metadata.csv").write_text(
        'id,file_name,text\n1,b.png,"blue, ""deep"""\n2,a.png,green\n'
    )
    images = load_images(str(tmp_path), 8)
    assert list(zip(images.names, images.captions, strict=True)) == [
        ("a.png", "green"),
        ("b.png", 'blue, "deep"'),
    ]
    assert (images.pixels[1] == BLUE).all()


def test_kohya(tmp_path):
    for name, caption in (("b.jpg", "two"), ("a.png", "\u4e00\n"), ("c.WEBP", None)):
        file = save(tmp_path / name)
        if caption:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    images = load_images(str(tmp_path), 8, "the rest")
    assert images.names == ["a.png", "b.jpg", "c.WEBP"]
    assert images.captions == ["\u4e00", "two", "the rest"]


def test_plain_folder(tmp_path):
    for suffix in ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"):
        save(tmp_path / f"{suffix}.{suffix}")
    (tmp_path / "._png.png").write_bytes(b"left by another system")
    (tmp_path / "readme.md").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    images = load_images(str(tmp_path), 8, "a photo")
    assert (
        " ".join(images.names)
        == "bmp.bmp gif.gif jpeg.jpeg jpg.jpg png.png tif.tif tiff.tiff webp.webp"
    )
    assert images.captions == ["a photo"] * 8
    assert np.abs(images.pixels.astype(int) - RED).max() < 8


def test_paper_layout_in_three_forms(tmp_path):
    for k, part in enumerate(FOLDERS):
        for i in range(k + 1):
            save(tmp_path / part / f"{i}.png", (k, i, 0))
    (tmp_path / "D^m_te" / "metadata.csv").write_text(
        "file_name,text\n1.png,listed one\n0.png,listed zero\n"
    )
    (tmp_path / "D^nm_aux" / "2.txt").write_text("beside")
    images = load_images(str(tmp_path), 8, "flag")
    assert images.folders == {
        "D^m_aux": [0],
        "D^m_te": [1, 2],
        "D^nm_aux": [3, 4, 5],
        "D^nm_te": [6, 7, 8, 9],
    }
    assert images.names[1] == "D^m_te/0.png" and images.captions[1] == "listed zero"
    assert images.captions[3:6] == ["flag", "flag", "beside"]
    for k, indices in enumerate(images.folders.values()):
        assert (images.pixels[indices][..., 0] == k).all()


def test_relative_folder(tmp_path, monkeypatch):
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    monkeypatch.chdir(tmp_path / "set")
    assert load_images(".", 8).names == load_images("../set", 8).names == ["a.png"]


# ---- kinds of pixel ----


def palette(file):
    image = Image.new("P", (16, 16), 3)
    image.putpalette([0, 0, 0] * 3 + list(GREEN))
    image.save(file)


def sixteen_bits(file):  # scaled, not clipped
    Image.fromarray(np.full((16, 16), 200 * 257, dtype=np.uint16)).save(file)


def animation(file):  # its first frame
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, BLUE)]
    frames[0].save(file, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "write", "colour"),
    [
        ("a.tif", Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save, RED),
        ("a.png", Image.new("1", (16, 16), 1).save, WHITE),
        ("a.png", palette, GREEN),
        ("a.png", sixteen_bits, (200, 200, 200)),
        ("a.tif", sixteen_bits, (200, 200, 200)),
        ("a.gif", animation, GREEN),
    ],
)
def test_kinds_of_pixel(tmp_path, name, write, colour):
    write(tmp_path / name)
    assert (only_pixels(tmp_path / name) == colour).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    left = {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0}[mode]
    right = {"RGBA": (0, 0, 0, 255), "LA": (0, 255), "P": 1}[mode]
    image = Image.new(mode, (16, 16), left)
    if mode == "P":
        image.putpalette([0, 0, 0, 0, 0, 0])
    image.paste(right, (8, 0, 16, 16))
    image.save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = only_pixels(tmp_path / "a.png", 16)
    assert (pixels[:, :8] == 255).all() and (pixels[:, 8:] == 0).all()


def test_half_transparent_over_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(only_pixels(tmp_path / "a.png").astype(int) - (255, 127, 127)).max() <= 1


def test_transparency_row_by_row():
    noise = np.random.default_rng(0).integers(0, 256, (25, 9, 4), dtype=np.uint8)
    pixels = np.asarray(data._on_white(Image.fromarray(noise), rows=10))
    alpha = noise[..., 3:] / 255
    expected = noise[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels - expected).max() <= 1


SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
PRIMARIES = {  # columns: XYZ of red, green and blue, under D50
    "Adobe RGB": [[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]],
    "Display P3": [[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0010, 0.0419, 0.7841]],
    "ProPhoto": [[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]],
}


def icc(name: str, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A colour profile (ICC.1:2001-04) of one gamma and these primaries."""

    def fixed(*values):
        return b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in values)

    desc = b"desc\0\0\0\0" + (len(name) + 1).to_bytes(4, "big") + name.encode().ljust(91, b"\0")
    curve = b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    white = fixed(0.9642, 1, 0.8249)
    tags = {b"desc": desc, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": b"XYZ \0\0\0\0" + white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, xyz in zip("rgb", zip(*PRIMARIES[name], strict=True), strict=True):
            tags[letter.encode() + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*xyz)
            tags[letter.encode() + b"TRC"] = curve
    table, body = len(tags).to_bytes(4, "big"), b""
    for key, content in tags.items():
        at = 132 + 12 * len(tags) + len(body)
        table += key + at.to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    size = 128 + len(table) + len(body)
    kind = b"\2\x10\0\0mntr" + space + b"XYZ "
    header = size.to_bytes(4, "big") + b"\0" * 4 + kind + b"\0" * 12 + b"acsp"
    return header.ljust(68, b"\0") + white + b"\0" * 48 + table + body


def linear(x):
    """sRGB in 0..1 as amounts of light (IEC 61966-2-1)."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("name", PRIMARIES)
def test_colour_profiles_are_followed(tmp_path, name, capsys):
    """A picture written in wider colours is the one that it was in sRGB, and a copy of it."""
    pixels = np.random.default_rng(0).integers(30, 226, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
    light = linear(pixels / 255) @ np.array(SRGB).T @ np.linalg.inv(PRIMARIES[name]).T
    wide = np.round(255 * light.clip(0, 1) ** (1 / 1.8)).astype(np.uint8)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(wide).save(tmp_path / "b.png", icc_profile=icc(name, 1.8))
    Image.fromarray(wide).save(tmp_path / "c.png")
    found = load_images(str(tmp_path), 16, "x").pixels.astype(int)
    assert (found[0] == pixels).all() and abs(found[1] - pixels).max() <= 3
    assert near_duplicates(found.astype(np.uint8)) == [0, 0, 2]
    assert capsys.readouterr().out == ""


def test_colour_profiles_of_other_modes(tmp_path, capsys):
    """A grey one is followed; one that is damaged, or of another mode, leaves the pixels alone."""
    grey = Image.new("LA", (16, 16), (128, 255))
    grey.save(tmp_path / "a.png", icc_profile=icc("grey", 1.0, b"GRAY"))
    for letter, profile in {"b": icc("ProPhoto", 1.8)[:200], "c": b"none"}.items():
        Image.new("RGB", (16, 16), (9, 99, 199)).save(
            tmp_path / f"{letter}.png", icc_profile=profile
        )
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    ink.save(tmp_path / "d.jpg", icc_profile=icc("ProPhoto", 1.8), quality=100)
    found = load_images(str(tmp_path), 8, "x").pixels
    assert abs(linear(found[0] / 255) - 128 / 255).max() < 0.005
    assert (found[1:3] == (9, 99, 199)).all() and abs(found[3] - RED).max() < 3
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "3 images cannot be used" in said and "b.png" in said


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (0, 0, 16, 8))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    image.save(tmp_path / "a.png", exif=exif)
    pixels = only_pixels(tmp_path / "a.png", 16)
    assert (pixels[2] == RED).all() and (pixels[13] == BLUE).all()


@pytest.mark.parametrize(
    "size, scaled, box",
    [
        ((60, 20), (30, 10), (10, 0, 20, 10)),
        ((20, 60), (10, 30), (0, 10, 10, 20)),
        ((40, 40), (10, 10), (0, 0, 10, 10)),
        ((8, 16), (10, 20), (0, 5, 10, 15)),  # enlarged
    ],
)
def test_short_side_scaled_then_centre_cropped(tmp_path, size, scaled, box):
    # mid-greys: the two ways clip at 0 and 255 in a different order
    noise = np.random.default_rng(0).integers(80, 176, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    expected = Image.fromarray(noise).resize(scaled, Image.Resampling.LANCZOS).crop(box)
    assert np.abs(only_pixels(tmp_path / "a.png", 10).astype(int) - np.asarray(expected)).max() <= 1


# ---- messages: folders ----


def test_folders_that_hold_no_set(tmp_path):
    """None, a file, nothing, some of the paper's four, or one of these empty."""
    message(tmp_path / "nowhere", None, "nowhere", "give a folder")
    message(save(tmp_path / "a.png"), None, "a.png", "is a file")
    (tmp_path / "empty").mkdir()
    message(tmp_path / "empty", "x", "empty", "no images", "png")
    for part in ("D^m_aux", "D^nm_te"):
        save(tmp_path / "four" / part / "a.png")
    text = message(tmp_path / "four", "x", "has D^m_aux, D^nm_te but not D^m_te, D^nm_aux")
    assert str(tmp_path) in text
    for part in ("D^m_te", "D^nm_aux"):
        (tmp_path / "four" / part).mkdir()
    message(tmp_path / "four", "x", "D^m_te holds no images")


# ---- messages: images ----


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("share", [0, 0.1, 0.6])
def test_broken_image(tmp_path, suffix, share):
    file = tmp_path / f"broken.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        file
    )
    only_pixels(file)  # whole, it loads
    cut(file, int(share * file.stat().st_size))
    message(tmp_path, "x", f"broken.{suffix}", "not a readable image", "replace it")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is HEIC, whatever its name says"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "is HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "is AVIF"),
        (b"\xff\x0a\0\0", "is JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is JPEG 2000"),
        (b"8BPS\0\x01", "is a Photoshop file"),
        (b"%PDF-1.7", "is a PDF"),
        (b"\n<!DOCTYPE html><html>", "is a web page or an SVG"),
    ],
)
def test_other_formats_by_their_content(tmp_path, content, words):
    (tmp_path / "a.jpg").write_bytes(content + b"x" * 200)
    message(tmp_path, "x", "a.jpg", words)


@pytest.mark.parametrize(("megabytes", "fits"), [(3, True), (70, False)])
@pytest.mark.parametrize("kind", ["text", "profile"])
def test_png_with_much_text_or_a_large_profile(tmp_path, kind, megabytes, fits):
    """As ComfyUI and scanners write them."""
    much, text = "x" * megabytes * 2**20, PngImagePlugin.PngInfo()
    if kind == "text":
        text.add_text("workflow", much, zip=True)
    profile = {"icc_profile": much.encode()} if kind == "profile" else {}
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", pnginfo=text, **profile)
    if fits:
        assert (load_images(str(tmp_path), 8, "x").pixels == [255, 0, 0]).all()
    else:
        message(tmp_path, "x", "a.png", "64 MB of text or profile")


def test_text_and_foreign_formats_are_not_images(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    message(tmp_path, "x", "a.png", "not a readable image")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", "PPM")
    message(tmp_path, "x", "a.png", "not a readable image")


@pytest.mark.parametrize(
    "size, fits", [((7, 30), False), ((8, 30), True), ((20_001, 8), False), ((20_000, 8), True)]
)
def test_absurd_sides(tmp_path, size, fits):
    file = save(tmp_path / "a.png", RED, size)
    if fits:
        assert (only_pixels(file) == RED).all()
    else:
        message(tmp_path, "x", "a.png", f"{size[0]}x{size[1]}", "8 to 20,000")


@pytest.mark.parametrize(
    "limit", [200, 100]
)  # PIL warns above its limit and refuses above twice its limit
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    file = save(tmp_path / "bomb.png")  # 256 pixels
    only_pixels(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message(tmp_path, "x", "bomb.png", "too large", "scale it down")


def test_32_bits_per_channel(tmp_path):
    Image.fromarray(np.zeros((16, 16), dtype=np.float32)).save(tmp_path / "a.tif")
    message(tmp_path, "x", "a.tif", "32 bits", "8 or 16")


def test_unreadable_files(tmp_path, monkeypatch):
    file = tmp_path / "gone.png"
    file.symlink_to(tmp_path / "nothing")
    message(tmp_path, "x", "cannot read", "gone.png", "No such file")

    file.unlink()
    save(file)

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data.Image, "open", refuse)
    message(tmp_path, "x", "cannot read", "gone.png", "Permission denied", "may be read")


# ---- messages: captions and metadata ----


def test_missing_captions(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("one")
    message(tmp_path, None, "2 of 3", "b.png", "b.txt", "--caption")
    assert len(load_images(str(tmp_path), 8, "x").names) == 3


def test_unusable_captions(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("gr\u00fcn".encode("latin-1"))
    message(tmp_path, "x", "a.txt", "not UTF-8", "byte 2")
    (tmp_path / "a.txt").write_text(" \n")
    message(tmp_path, "x", "a.txt is empty")
    message(tmp_path, " ", "--caption is empty")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"file_name": "a.png", "text": "x"', ["not a JSON object"]),
        ('["a.png", "x"]', ["not a JSON object"]),
        ('{"file": "a.png", "text": "x"}', ["has no file_name"]),
        ('{"file_name": "a.png", "caption": "x"}', ["has no text"]),
        ('{"file_name": "gone.png", "text": "x"}', ["'gone.png'", "does not exist"]),
        ('{"file_name": "", "text": "x"}', ["no usable file_name"]),
        ('{"file_name": 7, "text": "x"}', ["no usable file_name"]),
        ('{"file_name": "a.png", "text": " "}', ["'a.png'", "empty caption"]),
        ('{"file_name": "a.png", "text": null}', ["'a.png'", "empty caption"]),
        ('{"file_name": "sub/../../b.png", "text": "x"}', ["'sub/../../b.png'", "outside"]),
        ('{"file_name": "/b.png", "text": "x"}', ["'/b.png'", "outside"]),
    ],
)
def test_metadata_jsonl_errors(tmp_path, monkeypatch, line, words):
    save(tmp_path / "b.png")
    save(tmp_path / "set" / "a.png")
    good = '{"file_name": "a.png", "text": "x"}'
    metadata = tmp_path / "set" / "metadata.jsonl"
    metadata.write_text(good)
    load_images(str(tmp_path / "set"), 8)  # without the bad line it loads
    metadata.write_text(f"{good}\n\n{line}\n")
    message(tmp_path / "set", None, f"{metadata} line 3", *words)
    monkeypatch.chdir(tmp_path / "set")
    message(".", None, "metadata.jsonl line 3", *words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("file,text\na.png,x\n", ["lacks a column", "file_name and text"]),
        ("", ["lacks a column"]),
        ("file_name,text\na.png,x\ngone.png,x\n", ["line 3", "'gone.png'"]),
        ("file_name,text\na.png\n", ["line 2", "fewer fields"]),
        ("file_name,text\na.png,\n", ["line 2", "empty caption"]),
        ("file_name,text\na.png," + "x" * 200_000 + "\n", ["line 2", "not CSV"]),
        ("file_name,text\n", ["no images"]),
    ],
)
def test_metadata_csv_errors(tmp_path, text, words):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    message(tmp_path, None, str(tmp_path), *words)


# ---- duplicates and splits ----


def copied(pixels: np.ndarray, how: str) -> np.ndarray:
    """A copy as people make them: saved as JPEG, or scaled by a factor and back to its size."""
    image = Image.fromarray(pixels)
    if how == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG")
        return np.asarray(Image.open(file))
    side = round(float(how) * len(pixels))
    small = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(small.resize(image.size, Image.Resampling.LANCZOS))


def test_near_duplicates_against_all_pairs():
    rng = np.random.default_rng(0)
    pixels = 255 * rng.integers(0, 2, (600, 2, 2, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    flat = pixels.reshape(600, -1)
    expected = [int(np.flatnonzero((flat == row).all(1))[0]) for row in flat]
    assert near_duplicates(pixels) == expected  # nothing lies between equal and far apart
    assert 20 < sum(i != j for i, j in enumerate(expected)) < 580


@pytest.mark.parametrize("how", ["jpeg", "0.5", "2"])
def test_copies_of_pictures_are_near_duplicates(how):
    pixels = load_images("twemoji", 72).pixels[::10]
    n = len(pixels)
    copies = np.stack([copied(p, how) for p in pixels])
    assert (copies != pixels).any((1, 2, 3)).all()
    assert near_duplicates(np.concatenate([pixels, copies])) == [*range(n), *range(n)]


@pytest.mark.parametrize("size", [16, 48, 64])
def test_pictures_that_differ_are_not_near_duplicates(size, image_folder):
    for name in ("twemoji", image_folder):
        pixels = load_images(name, size).pixels
        assert near_duplicates(pixels) == list(range(len(pixels)))


def test_small_differences_count_where_there_is_little_contrast():
    ground = np.full((2, 32, 32, 3), 128, np.uint8)
    ground[0, 8:16, 8:16] = 133
    ground[1, 16:24, 16:24] = 133
    assert near_duplicates(ground) == [0, 1]
    ground[1] = ground[0]
    ground[1, 20:22, 20:22] = 130
    assert near_duplicates(ground) == [0, 0]
    ground[1] = ground[0] + (40, 0, 0)  # another colour
    assert near_duplicates(ground.astype(np.uint8)) == [0, 1]


def test_repeats_of_a_repeat_stay():
    rows = np.full((3, 32, 32, 3), 60, np.uint8)
    rows[:, :16] = 180
    rows += np.array([0, 5, 10], np.uint8)[:, None, None, None]  # 7 levels apart is the limit
    assert near_duplicates(rows) == [0, 0, 2]
    assert near_duplicates(rows[[1, 0, 2]]) == [0, 0, 0]


def test_twemoji():
    images = load_images("twemoji", 48)
    n = len(images.names)
    assert n > 1300 and images.pixels.shape == (n, 48, 48, 3) and images.pixels.dtype == np.uint8
    assert len(images.captions) == n and all(caption.strip() for caption in images.captions)
    assert len(set(images.names)) == n
    assert images.pixels.reshape(n, -1).std(1).min() > 0  # none is blank
