"""Every picture the project makes, one colour per method, readable by the colour-blind.

The colours are those of Okabe & Ito 2008.  `captioned` and `privacy_against_quality`
write a file; the others return a closed Figure, which a notebook shows and `write` writes.  Tested
in tests/test_plots.py.
"""

import io
import textwrap
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image

import roc
from cli import shown, write_whole

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
    left = (130 + (cell + 6) * np.arange(count) + apart).tolist()
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
        beside = {"fontsize": 9, "ha": "right", "va": "center"}
        texts.append((122, top + cell / 2, short(name, 16), beside))
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
                text, where = f"step {record['step']}", {"textcoords": "offset points"}
                axis.annotate(text, point[:2], xytext=(6, -11), fontsize=8, **where)
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set_xlabel("held-out loss (lower is better)")
    axis.set_ylabel("worst-case AUC over attacks (0.5 leaks nothing)")
    axis.grid(alpha=0.2)
    figure.legend(loc="outside right upper", frameon=False)
    if path:
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return figure


def _point(model: dict) -> tuple[float, float, list]:
    """(x, y, interval about y) of one model's record, as `errorbar` takes them."""
    y, (low, high) = model["worst"]["auc"], model["worst"]["auc_interval"]
    return model["held_out_loss"], y, [[max(0, y - low)], [max(0, high - y)]]


# --------------------------------------------------------------------------------------------------
# The notebooks' figures: each returns a closed Figure, which a notebook shows


def _panels(count: int, width: float = 4.6, height: float = 3.6, **options):
    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", **options)
    plt.close(figure)
    for axis in np.atleast_1d(axes):
        axis.grid(alpha=0.2)
    return figure, axes


def _runs(runs: dict[str, list[dict]], key: str):
    """(name, colour, line style, steps (K,), values (K,)) of each run that logged `key`.

    Controls, whose name is more than a method, are dashed.
    """
    for name, rows in runs.items():
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if found:
            method = name.split(",")[0]
            style = "-" if name == method else "--"
            yield name, COLOURS.get(method, OTHER), style, *np.array(found, float).T


def rank_study(spectra: np.ndarray, ranks, member, nonmember):
    """Singular values of B A per layer (layers, r), and both losses by the rank that is kept.

    `ranks` (K,) are the ranks kept, `member` and `nonmember` (K,) the losses at each.
    """
    figure, (left, right) = _panels(2)
    index = np.arange(1, spectra.shape[1] + 1)
    share = spectra / spectra[:, :1]
    low, middle, high = np.percentile(share, [10, 50, 90], axis=0)
    colour = COLOURS["lora"]
    left.plot(index, middle, color=colour, label="median layer")
    left.fill_between(index, low, high, color=colour, alpha=0.2, lw=0, label="10 to 90 % of layers")
    left.set(yscale="log", xlabel="index of the singular value", ylabel="share of the largest")
    left.set_title("What training made of BA")
    right.plot(ranks, member, "o-", color=MEMBER, label="members")
    right.plot(ranks, nonmember, "o-", color=NONMEMBER, label="non-members")
    right.set(xscale="symlog", xlabel="rank kept of the trained update")
    right.set_ylabel("adaptation loss (squared error)")
    right.set_xticks(ranks, [str(r) for r in ranks])
    right.set_title("What the gap between them needs")
    for axis in (left, right):
        axis.legend(frameon=False)
    return figure


def loss_by_timestep(timesteps, models: dict[str, tuple]):
    """{model: (member, nonmember)} losses (N, T): means with 95 % bands, and their gap below."""
    figure, axes = _panels(len(models), sharey=True)
    for axis, (name, sides) in zip(np.atleast_1d(axes), models.items(), strict=True):
        styles = (MEMBER, "members"), (NONMEMBER, "non-members")
        for loss, (colour, label) in zip(sides, styles, strict=True):
            mean, half = loss.mean(0), 1.96 * loss.std(0, ddof=1) / np.sqrt(len(loss))
            axis.plot(timesteps, mean, "o-", color=colour, label=label)
            axis.fill_between(timesteps, mean - half, mean + half, color=colour, alpha=0.2, lw=0)
        axis.set(title=name, xlabel="timestep t (noisier to the right)", yscale="log")
    np.atleast_1d(axes)[0].set_ylabel("adaptation loss (squared error)")
    np.atleast_1d(axes)[0].legend(frameon=False)
    return figure


def error_maps(pictures: np.ndarray, rows: dict[str, np.ndarray], titles: list[str]):
    """Pictures (N, H, W, 3) above maps (N, h, w) of the squared error, one row per model.

    All maps share one colour scale.
    """
    n, height = len(pictures), len(rows) + 1
    size = (1.7 * n, 1.75 * height)
    figure, axes = plt.subplots(height, n, figsize=size, layout="constrained", squeeze=False)
    plt.close(figure)
    top = max(np.percentile(maps, 99) for maps in rows.values())
    for j in range(n):
        axes[0, j].imshow(pictures[j])
        axes[0, j].set_title(titles[j], fontsize=9)
        for i, maps in enumerate(rows.values(), 1):
            shown = axes[i, j].imshow(maps[j], vmin=0, vmax=top, cmap="viridis")
    for i, name in enumerate(["picture", *rows]):
        axes[i, 0].set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    label = "squared error, mean over channels and draws"
    figure.colorbar(shown, ax=axes[1:], shrink=0.8, label=label)
    return figure


def roc_lines(pairs: dict[str, tuple]):
    """ROC of at most six attacks {name: (member (N,), nonmember (M,))} with their AUC."""
    figure, axis = _panels(1, 5.4, 4.8)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for (name, (member, nonmember)), colour in zip(pairs.items(), colours, strict=False):
        cuts = np.sort(nonmember)[::-1]
        rates = np.r_[0, np.arange(1, len(cuts) + 1) / len(cuts)]
        found = np.r_[0, roc.hits(member, cuts)]
        label = f"{name}: AUC {roc.auc(member, nonmember):.2f}"
        axis.plot(rates, found, color=colour, lw=1.8, label=label)
    axis.plot([0, 1], [0, 1], "k:", lw=1, label="guessing")
    axis.set_xlabel("false-positive rate (non-members called members)")
    axis.set_ylabel("true-positive rate (members found)")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def leakage_over_steps(runs: dict[str, list[dict]]):
    """{method: [{step, auc, low, high, held_out}]}: what leaks (left), what is learned (right)."""
    figure, (left, right) = _panels(2)
    for name, rows in runs.items():
        colour = COLOURS.get(name.split(",")[0], OTHER)
        keys = ("step", "auc", "low", "high", "held_out")
        steps, area, low, high, loss = (np.array([row[k] for row in rows]) for k in keys)
        left.plot(steps, area, "o-", color=colour, label=name)
        left.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        right.plot(steps, loss, "o-", color=colour, label=name)
    left.axhline(0.5, color="grey", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="AUC of the averaged loss, 95 % band", title="Leakage")
    right.set(xlabel="step", ylabel="loss on non-members (squared error)", title="Held-out loss")
    left.legend(frameon=False)
    return figure


def surfaces(offsets, surface: dict[str, np.ndarray]):
    """{title: (K, K)} over steps `offsets` (K,) along -grad L (columns) and -grad G (rows).

    Each has its own colour scale.
    """
    figure, axes = _panels(len(surface), 4.7, 4.0)
    for axis, (title, values) in zip(np.atleast_1d(axes), surface.items(), strict=True):
        shown = axis.contourf(offsets, offsets, values, 24, cmap="viridis")
        axis.contour(offsets, offsets, values, 24, colors="white", linewidths=0.3)
        axis.plot(0, 0, "o", color="white", mec="black", ms=6)
        axis.set(xlabel="step along -grad L (adapter norm)", title=title)
        figure.colorbar(shown, ax=axis, shrink=0.9)
    np.atleast_1d(axes)[0].set_ylabel("step along -grad G, made orthogonal (adapter norm)")
    return figure


def lines(x, values: dict[str, np.ndarray], xlabel: str, ylabel: str, title="", scale="linear"):
    """Lines (K,) over `x` (K,) in one panel; names that begin with a method take its colour."""
    figure, axis = _panels(1, 6.4, 3.8)
    for name, y in values.items():
        axis.plot(x, y, color=COLOURS.get(name.split(",")[0].lower(), SECOND), lw=2, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale=scale)
    axis.legend(frameon=False)
    return figure


def runs_over_steps(runs: dict[str, list[dict]], keys: dict[str, str], scale: str = "log"):
    """One panel per key of metrics.jsonl {key: axis label}, one line per run."""
    figure, axes = _panels(len(keys))
    for axis, (key, label) in zip(np.atleast_1d(axes), keys.items(), strict=True):
        for name, colour, style, steps, values in _runs(runs, key):
            axis.plot(steps, values, style, color=colour, lw=1.2, label=name)
        axis.set(xlabel="step", ylabel=label, yscale=scale)
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def hessian_against_gradient(runs: dict[str, list[dict]]):
    """Figure 1b of the paper: Hessian norm (spectral) over gradient norm, one panel per run."""
    figure, axes = _panels(len(runs), 3.7, 3.6)
    logged = _runs(runs, "hessian_norm")
    for axis, (name, colour, _, steps, hessian) in zip(np.atleast_1d(axes), logged, strict=True):
        gradient = np.array([row["fixed_grad_norm"] for row in runs[name] if "hessian_norm" in row])
        shade = 0.25 + 0.75 * steps / max(steps.max(), 1)
        axis.scatter(gradient, hessian, c=colour, alpha=shade, s=28)
        axis.set(xscale="log", yscale="log", xlabel="gradient norm", title=name)
        for side in (axis.xaxis, axis.yaxis):  # few decades: numbers at 1, 2 and 5 only
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
    np.atleast_1d(axes)[0].set_ylabel("Hessian norm (pale: early, full: late)")
    return figure


def bound_along_run(runs: dict[str, list[dict]]):
    """Proposition 2 while training: the Hessian norm and its bound L0' + L1' ||grad J||.

    The part L1' ||grad J|| is also drawn alone.
    """
    figure, axes = _panels(len(runs), sharey=True)
    for axis, (name, rows) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        rows = [row for row in rows if "hessian_norm" in row]
        keys = ("step", "hessian_norm", "hessian_bound", "bound_constant")
        step, norm, bound, constant = (np.array([row[k] for row in rows]) for k in keys)
        colour = COLOURS.get(name.split(",")[0], OTHER)
        axis.plot(step, bound, color="black", lw=1, label="bound")
        axis.plot(step, norm, "o-", color=colour, ms=3, label="Hessian norm")
        if (bound - constant).any():
            label = "part of the bound that carries ||grad J||"
            axis.plot(step, bound - constant, "--", color=SECOND, label=label)
        axis.set(xlabel="step", yscale="log", title=name)
        axis.legend(frameon=False, fontsize=8)
    np.atleast_1d(axes)[0].set_ylabel("spectral norm")
    return figure
