"""The axes that all pictures share: colours, panels, curves, ROC, points with intervals, and rows
of pictures.

A method has one colour everywhere, readable by the colour-blind (Okabe & Ito 2008).  Functions
return a closed Figure, which a notebook shows and `write` makes a PNG of.
Tested in tests/test_plots.py.
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
from matplotlib.legend import Legend
from matplotlib.ticker import LogLocator
from PIL import Image

from command.errors import shown
from command.whole_files import write_whole
from curves import roc

COLOURS = {
    "base": "#000000",
    "lora": "#D55E00",
    "mp": "#E69F00",
    "smp": "#0072B2",
    "smp-detached": "#56B4E9",
    "distill": "#882255",
    "subspace": "#44AA99",  # of records that are kept
    "dp": "#999933",
}
OTHER = "#CC79A7"  # an adapter trained elsewhere
SECOND = "#009E73"  # the other line in a panel
MEMBER, NONMEMBER = "#D55E00", "#666666"
DPI = 110
SMOOTHED = 60  # values from which on a noisy curve is drawn as a running mean


def write(figure, path: Path) -> None:
    """A Figure as PNG, there whole or not at all; letters that the font lacks are boxes, and names
    in a legend are shown as they are: $ is no formula.
    """
    content = io.BytesIO()
    for text in (text for box in figure.findobj(Legend) for text in box.get_texts()):
        text.set(text=shown(text.get_text()), parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format="png", dpi=DPI)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def kept(figure, path: Path | None):
    """The Figure, closed; written too if there is a path."""
    if path:
        write(figure, path)
    plt.close(figure)
    return figure


# --------------------------------------------------------------------------------------------------
# Axes


def panels(columns: int = 1, width: float = 4.6, height: float = 3.6, rows: int = 1, **options):
    """(closed Figure, [its axes, row by row]); `width` and `height` in inches are of one panel."""
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    plt.close(figure)
    axes = list(np.atleast_1d(axes).flat)
    for axis in axes:
        axis.grid(alpha=0.2)
    return figure, axes


def legend(axis, fontsize: float = 9, **options) -> None:
    """The legend of an axis that has lines with a name."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=fontsize, **options)


def legend_above(figure, axes: list) -> None:
    """One legend above all panels: that of the first."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def chance_line(axis) -> None:
    """A dotted line at 0.5, where nothing leaks."""
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")


def plain_numbers(axis) -> None:
    """On an axis in logarithms: 0.2 rather than 2 x 10^-1, at 1, 2 and 5 of a decade where there
    are few.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def curve(axis, x, y, style: str = "-", smooth: bool = False, **options) -> None:
    """A line y (K,) over x (K,); a long one that is to be smoothed is a running mean over a pale
    line of the values.
    """
    if smooth and len(y) >= SMOOTHED:
        axis.plot(x, y, color=options["color"], lw=0.6, alpha=0.25)
        y = running_mean(y)
    axis.plot(x, y, style, **options)


def band(axis, x, low, high, colour: str, label: str | None = None) -> None:
    """The ground between two lines (K,), pale."""
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0, label=label)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Over a fortieth of the values (K,), at least five, up to each of them: (K,)."""
    width = max(5, len(values) // 40)
    padded = np.pad(values, (width - 1, 0), "edge")
    return np.convolve(padded, np.ones(width) / width, "valid")


def intervals(axis, x, y, ends, marker: str = "o", **options) -> None:
    """Points at x, y (K,), each with the ends (K, 2) of an interval of y."""
    reach = np.abs(np.transpose(ends) - np.asarray(y))  # below and above
    axis.errorbar(x, y, reach, fmt=marker, capsize=3, **options)


def roc_curve(member: np.ndarray, nonmember: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(false-positive rates, true-positive rates), both (M + 1,), of scores (N,) and (M,), from (0,
    0) on: the threshold is just below each non-member's score in turn.
    """
    cuts = np.sort(nonmember)[::-1]
    rates = np.arange(len(cuts) + 1) / len(cuts)
    return rates, np.r_[0, roc.hits(member, cuts)]


def roc_axes(axis, members: int = 0, nonmembers: int = 0) -> None:
    """Names, legend and the line of guessing of an ROC; with two numbers of images in logarithms,
    down to what so many can show.
    """
    low = 0.0
    if nonmembers:
        low = 1 / nonmembers
        axis.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(0.5 / members, 1.05))
        axis.grid(alpha=0.2, which="both")
    axis.plot([low, 1], [low, 1], "k:", lw=1, label="guessing")
    axis.set_xlabel("false-positive rate (non-members called members)")
    axis.set_ylabel("true-positive rate (members found)")
    legend(axis, loc="lower right")


# --------------------------------------------------------------------------------------------------
# Rows of pictures


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
    a few lines.  A row whose name is blank has no label.
    """
    below, line = below or {}, 0.15 * DPI
    count = len(next(iter(rows.values())))
    small = {name: [None if x is None else at_size(x) for x in row] for name, row in rows.items()}
    cell = max(x.shape[0] for row in small.values() for x in row if x is not None)
    letters = max(10, cell // 7)  # of a line that is as wide as a picture
    groups = {h: n for h, n in (groups or {"": count}).items() if n}
    ends = np.cumsum(list(groups.values()))
    apart = 18 * np.searchsorted(ends, np.arange(count), "right")
    labels = {name: short(name, 16) for name in small}
    margin = max(122, _width(labels.values(), 9) + 4) if any(labels.values()) else 0
    left = (margin + 8 + (cell + 6) * np.arange(count) + apart).tolist()
    texts, top = [], 8.0  # (x, y, text, options of it), in pixels from the upper left corner
    if title:
        texts.append((8, top, title, {"fontsize": 11, "weight": "bold"}))
        top += 2 * line
    if any(groups):
        for heading, end, n in zip(groups, ends, groups.values(), strict=True):
            wide = n * (cell + 6) // 8
            texts.append((left[end - n], top, short(heading, wide, 1), {"fontsize": 9}))
        top += 1.5 * line
    captions = [short(text, letters) for text in above]
    if captions:
        top += line * _lines(captions)
        texts += [(x, top - 4, t, {"va": "bottom"}) for x, t in zip(left, captions, strict=True)]
    places = []  # (x, y, picture)
    for name, row in small.items():
        beside = {"fontsize": 9, "ha": "right", "va": "center"}
        texts.append((margin, top + cell / 2, labels[name], beside))
        places += [(x, int(top), picture) for x, picture in zip(left, row, strict=True)]
        top += cell + 6
        under = [short(text, letters) for text in below.get(name, [])]
        texts += [(x, top - 4, text, {}) for x, text in zip(left, under, strict=False)]
        top += line * (_lines(under) + 0.5) if under else 0
    canvas = np.full((int(top) + 4, left[-1] + cell + 8, 3), 255, np.uint8)
    for x, y, picture in places:
        if picture is not None:
            canvas[y : y + len(picture), x : x + picture.shape[1]] = picture
    return _canvas_with_texts(canvas, texts)


def captioned(images: np.ndarray, captions: list[str], columns: int, path: Path) -> None:
    """Pictures (N, H, W, 3) uint8 in rows of `columns`, each above its caption, as a PNG."""
    rows, below = {}, {}
    for k in range(0, len(images), columns):
        name = " " * k  # a row without a label
        row = list(images[k : k + columns])
        rows[name] = row + [None] * (columns - len(row))
        below[name] = captions[k : k + columns]
    write(picture_rows(rows, below=below), path)


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


def _lines(texts: list[str]) -> int:
    """Lines of the longest of several texts."""
    return max(text.count("\n") + 1 for text in texts)


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
    plt.close(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(canvas, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    for x, y, text, options in texts:
        options = {"fontsize": 7, "va": "top", "linespacing": 1.1} | options
        axis.text(x, y, text, parse_math=False, **options)
    return figure


# --------------------------------------------------------------------------------------------------
# Several evaluations


def privacy_against_quality(records: list[dict], path: Path | None = None):
    """AUC of each model's headline attack over held-out loss, with intervals, of evaluate.py's
    records.

    The steps of one run are joined.  Returns the closed Figure, and writes it if `path` is given.
    """
    figure, (axis,) = panels(1, 8.6, 5)
    runs: dict[str, list] = {}
    for r in sorted(records, key=lambda r: r["step"] or 0):
        runs.setdefault(r["run"].split(" @")[0], []).append(r)
    markers = {method: iter("o^sDv") for method in COLOURS}  # in the order of a method's runs
    base = [[number] for number in _figures(records[0]["base"])]
    intervals(axis, *base, color=COLOURS["base"], label="base, no adapter")
    for run, points in runs.items():
        method = points[0]["method"]
        colour, marker = COLOURS.get(method, OTHER), next(markers.get(method, iter("")), "P")
        losses, areas, ends = zip(*(_figures(r["adapted"]) for r in points), strict=True)
        axis.plot(losses, areas, color=colour, lw=1)
        name = run.rsplit("/", 1)[-1]
        intervals(axis, losses, areas, ends, marker, color=colour, label=name, ls="")
        for record, *place in zip(points, losses, areas, strict=True):
            if len(points) > 1:
                # to the upper left of a line that rises to the right
                where = {"xytext": (-7, 3), "textcoords": "offset points", "ha": "right"}
                axis.annotate(f"step {record['step']}", place, fontsize=8, **where)
    axis.margins(x=0.12)
    chance_line(axis)
    axis.set_xlabel("held-out loss (lower is better)")
    axis.set_ylabel("AUC of the headline attack (0.5 leaks nothing)")
    figure.legend(loc="outside right upper", frameon=False)
    return kept(figure, path)


def _figures(model: dict) -> tuple[float, float, list[float]]:
    """(held-out loss, AUC, its interval) of one model's record."""
    head = model["headline"]
    return model["held_out_loss"], head["auc"], head["auc_interval"]
