"""What several commands draw, one colour per method, readable by the colour-blind.

The colours are those of Okabe & Ito 2008.  The figures of the notebooks alone are in
notebooks/figures.py.  `captioned` and `privacy_against_quality` write a file; the others return a
closed Figure, which `write` writes.  Tested in tests/test_plots.py.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from command.errors import shown
from command.whole_files import write_whole

COLOURS = {
    "base": "#000000",
    "lora": "#D55E00",
    "mp": "#E69F00",
    "smp": "#0072B2",
    "smp-detached": "#56B4E9",
    "distill": "#882255",
    "subspace": "#44AA99",
    "dp": "#999933",
}
OTHER = "#CC79A7"  # an adapter trained elsewhere
SECOND = "#009E73"  # the other line in a panel
MEMBER, NONMEMBER = "#D55E00", "#666666"
DPI = 110


def picture_rows(
    rows: dict[str, list],
    above: list[str] = (),
    below: dict[str, list[str]] | None = None,
    groups: dict[str, int] | None = None,
    title: str = "",
):
    """Rows of pictures {name: K of (H, W, 3) uint8, or None for a blank}, as a closed Figure whose
    pixels are those of the pictures, enlarged by a whole number or made smaller.

    `above` are the K captions of the columns, `below` {row: K texts} stands under a row's pictures.
    `groups` {heading: columns} set columns apart, in order.  Texts are shown as they are, cut to
    a few lines.
    """
    below, lines = below or {}, 0.15 * DPI
    count = len(next(iter(rows.values())))
    small = {name: [None if x is None else at_size(x) for x in row] for name, row in rows.items()}
    cell = max(x.shape[0] for row in small.values() for x in row if x is not None)
    letters = max(10, cell // 7)  # of a line that is as wide as a picture
    groups = {h: n for h, n in (groups or {"": count}).items() if n}
    ends = np.cumsum(list(groups.values()))
    apart = 18 * np.searchsorted(ends, np.arange(count), "right")
    labels = {name: short(name, 16) for name in small}
    beside = {"fontsize": 9, "ha": "right", "va": "center"}
    margin = max(122, _width(labels.values(), 9) + 4)  # where the labels end
    left = (margin + 8 + (cell + 6) * np.arange(count) + apart).tolist()
    texts, top = [], 8.0  # (x, y, text, options of it), in pixels from the upper left corner
    if title:
        texts.append((8, top, title, {"fontsize": 11, "weight": "bold"}))
        top += 2 * lines
    if any(groups):
        for heading, end, n in zip(groups, ends, groups.values(), strict=True):
            wide = n * (cell + 6) // 8
            texts.append((left[end - n], top, short(heading, wide, 1), {"fontsize": 9}))
        top += 1.5 * lines
    captions = [short(text, letters) for text in above]
    if captions:
        depth = max(text.count("\n") + 1 for text in captions)
        top += depth * lines
        texts += [(x, top - 4, t, {"va": "bottom"}) for x, t in zip(left, captions, strict=True)]
    places = []
    for name, row in small.items():
        texts.append((margin, top + cell / 2, labels[name], beside))
        places += [(x, int(top), picture) for x, picture in zip(left, row, strict=True)]
        top += cell + 6
        under = [short(text, letters) for text in below.get(name, [])]
        texts += [(x, top - 4, text, {}) for x, text in zip(left, under, strict=False)]
        top += lines * max((text.count("\n") + 1.5 for text in under), default=0)
    canvas = np.full((int(top) + 4, left[-1] + cell + 8, 3), 255, np.uint8)
    for x, y, picture in places:
        if picture is not None:
            canvas[y : y + len(picture), x : x + picture.shape[1]] = picture
    return _canvas_with_texts(canvas, texts)


def _width(texts: Iterable[str], fontsize: float) -> int:
    """Pixels that the widest of several texts takes."""
    figure = plt.figure(dpi=DPI)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn = [figure.text(0, 0, x, fontsize=fontsize, parse_math=False) for x in texts]
        widest = max(x.get_window_extent().width for x in drawn)
    plt.close(figure)
    return math.ceil(widest)


def _canvas_with_texts(canvas: np.ndarray, texts: list[tuple]):
    """A closed Figure of one picture with texts (x, y, text, options) upon it."""
    height, width = canvas.shape[:2]
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for x, y, text, options in texts:
        options = {"fontsize": 7, "va": "top", "linespacing": 1.1} | options
        axis.text(x, y, text, parse_math=False, **options)
    plt.close(figure)
    return figure


def at_size(picture: np.ndarray, small: int = 128, large: int = 224) -> np.ndarray:
    """A picture (H, W, 3) enlarged by a whole number to `small` pixels or just above, or made
    smaller to `large`.
    """
    side = max(picture.shape[:2])
    if side > large:
        shape = [round(length * large / side) for length in (picture.shape[1], picture.shape[0])]
        return np.asarray(Image.fromarray(picture).resize(shape, Image.Resampling.LANCZOS))
    times = -(-small // side)
    return picture.repeat(times, 0).repeat(times, 1)


def short(text: str, letters: int, lines: int = 3) -> str:
    """A caption in at most so many lines of so many letters."""
    return "\n".join(textwrap.wrap(shown(text), letters, max_lines=lines, placeholder="..."))


def write(figure, path: Path) -> None:
    """A Figure as PNG, there whole or not at all; letters that the font lacks are boxes."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format="png", dpi=DPI)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def captioned(images: np.ndarray, captions: list[str], columns: int, path: Path) -> None:
    """Pictures (N, H, W, 3) uint8 in rows of `columns`, each above its caption, as a PNG."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.58 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(caption, 20)), fontsize=6.5, y=-0.07, va="top")
    figure.subplots_adjust(
        left=0, right=1, bottom=0.3 / (1.58 * rows), top=0.995, wspace=0.06, hspace=0.28
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def kept(figure, path: Path | None):
    """The Figure, closed; written too if there is a path."""
    if path:
        write(figure, path)
    plt.close(figure)
    return figure


def running_mean(values: np.ndarray) -> np.ndarray:
    """Over a fortieth of the values (K,), at least five, up to each of them: (K,)."""
    width = max(5, len(values) // 40)
    padded = np.pad(values, (width - 1, 0), "edge")
    return np.convolve(padded, np.ones(width) / width, "valid")


# --------------------------------------------------------------------------------------------------
# Several evaluations


def privacy_against_quality(records: list[dict], path: Path | None = None):
    """Worst-case AUC over held-out loss of evaluate.py's records, with intervals.

    The steps of one run are joined.  Returns the closed Figure, and writes it if `path` is given.
    """
    figure, axis = plt.subplots(figsize=(8.6, 5), layout="constrained")
    runs: dict[str, list] = {}
    for r in sorted(records, key=lambda r: r["step"] or 0):
        runs.setdefault(r["run"].split(" @")[0], []).append(r)
    markers = {method: iter("o^sDv") for method in COLOURS}  # in the order of a method's runs
    dot = {"fmt": "o", "color": COLOURS["base"], "capsize": 3}
    axis.errorbar(*_point(records[0]["base"]), **dot, label="base, no adapter")
    for run, points in runs.items():
        method = points[0]["method"]
        colour, marker = COLOURS.get(method, OTHER), next(markers.get(method, iter("")), "P")
        found = [_point(r["adapted"]) for r in points]
        axis.plot([x for x, *_ in found], [y for _, y, _ in found], color=colour, lw=1)
        for record, point in zip(points, found, strict=True):
            label = run.rsplit("/", 1)[-1] if record is points[-1] else None
            axis.errorbar(*point, fmt=marker, color=colour, capsize=3, label=label)
            if len(points) > 1:
                # to the upper left of a line that rises to the right
                where = {"xytext": (-7, 3), "textcoords": "offset points", "ha": "right"}
                axis.annotate(f"step {record['step']}", point[:2], fontsize=8, **where)
    axis.margins(x=0.12)
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set_xlabel("held-out loss (lower is better)")
    axis.set_ylabel("AUC of the headline attack (0.5 leaks nothing)")
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False)
    return kept(figure, path)


def _point(model: dict) -> tuple[float, float, list]:
    """(x, y, interval about y) of one model's record, as `errorbar` takes them."""
    y, (low, high) = model["headline"]["auc"], model["headline"]["auc_interval"]
    return model["held_out_loss"], y, [[max(0, y - low)], [max(0, high - y)]]
