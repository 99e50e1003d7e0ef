"""Every picture the project makes, with one colour per method, readable by the colour-blind (Okabe & Ito 2008)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

COLOURS = {"base": "#000000", "lora": "#D55E00", "mp": "#E69F00", "smp": "#0072B2", "smp-detached": "#56B4E9"}
SECOND = "#009E73"  # the other line in a panel


def image_grid(images: np.ndarray, columns: int, path: Path, scale: int = 2, gap: int = 2) -> None:
    """Pictures (N, H, W, 3) uint8 in rows of `columns` on white, each enlarged `scale` times, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images.repeat(scale, 1).repeat(scale, 2)
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        canvas[y : y + h, x : x + w] = image
    Image.fromarray(canvas).save(path)


def training_curves(metrics: list[dict], method: str, path: Path) -> None:
    """Losses, the attacker, gradient norms and the effective lambda of one run (rows of metrics.jsonl)."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    colour = COLOURS[method]

    def line(axis, key, label, colour, smooth=False, **style):
        rows = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        if rows:
            steps, values = np.array(rows, dtype=float).T
            if smooth and len(values) >= 20:
                axis.plot(steps, values, color=colour, alpha=0.15, lw=0.8)
                width = max(5, len(values) // 40)
                values = np.convolve(np.pad(values, (width - 1, 0), "edge"), np.ones(width) / width, "valid")
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
