"""What several commands draw, one colour per method, readable by the colour-blind.

The colours are those of Okabe & Ito 2008.  The figures of the notebooks alone are in
notebooks/figures.py.  Tested in tests/test_plots.py.
"""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

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


def image_grid(images: np.ndarray, columns: int, path: Path, scale: int = 2, gap: int = 2) -> None:
    """Pictures (N, H, W, 3) uint8 in rows of `columns` on white, each `scale` times larger, as PNG.

    `gap` is the number of white pixels around each picture.
    """
    import torch
    from torchvision.utils import make_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    blank = -len(images) % columns  # white pictures that fill the last row
    images = np.pad(images, ((0, blank), (0, 0), (0, 0), (0, 0)), constant_values=255)
    pixels = torch.from_numpy(images.repeat(scale, 1).repeat(scale, 2)).permute(0, 3, 1, 2)
    grid = make_grid(pixels, columns, padding=gap, pad_value=255)  # (3, height, width)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


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


def training_curves(metrics: list[dict], method: str, path: Path) -> None:
    """Losses, the attacker, gradient norms and the effective lambda of one run, as a PNG.

    `metrics` are the rows of metrics.jsonl, `method` one of COLOURS.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    colour = COLOURS[method]

    def line(axis, key, label, colour, smooth=False, **style):
        rows = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if rows:
            steps, values = np.array(rows, dtype=float).T
            if smooth and len(values) >= 20:
                axis.plot(steps, values, color=colour, alpha=0.15, lw=0.8)
                values = running_mean(values)
            axis.plot(steps, values, color=colour, label=label, **style)

    loss, attack, gradient, weight = axes.flat
    line(loss, "adaptation_loss", "training batch", colour, smooth=True)
    line(loss, "member_val_loss", "validation members", SECOND, marker="o", ms=3)
    line(loss, "nonmember_val_loss", "validation non-members (held out)", "black", marker="o", ms=3)
    loss.set(ylabel="adaptation loss (squared error)", title="Fit: the gap between the dots leaks")
    line(attack, "attacker_accuracy", "accuracy of the proxy attacker", colour, smooth=True)
    attack.axhline(0.5, color="grey", lw=0.8, ls=":")
    attack.set(ylim=(0, 1), ylabel="accuracy", title="Attacker in the loop (0.5 is guessing)")
    line(gradient, "grad_norm", "objective, before clipping", colour, smooth=True)
    line(gradient, "grad_norm_loss", "adaptation loss L alone", "black", lw=0.8)
    line(gradient, "grad_norm_gain", "MI gain G alone", SECOND, lw=0.8)
    gradient.set(yscale="log", ylabel="L2 norm over A and B", title="Gradient norms")
    line(weight, "lambda_effective", "weight of grad G", colour, smooth=True)
    weight.set(ylabel="effective lambda (lambda J for SMP)", title="How hard privacy pulls")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.2)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{method.upper()}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
