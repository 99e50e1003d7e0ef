"""Every picture the project makes, with one colour per method, readable by the colour-blind (Okabe & Ito 2008)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import roc

COLOURS = {"base": "#000000", "lora": "#D55E00", "mp": "#E69F00", "smp": "#0072B2", "smp-detached": "#56B4E9"}
OTHER = "#CC79A7"  # an adapter trained elsewhere
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


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluation(subject, found, control, method: str, folder: Path) -> None:
    """The four figures of one evaluated adapter, from evaluate.py's `Measured` of it and of the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    colour = COLOURS.get(method, OTHER)
    worst = found.record["worst"]["attack"]
    roc_curves(subject, found, folder / "roc.png", colour)
    name = worst if worst in control.scores else "loss"
    pairs = {n: subject.pair(m.scores[name], "test") for n, m in (("base model", control), ("adapted", found))}
    score_histograms(pairs, name, folder / "scores.png")
    leakage_by_timestep(
        control.record["auc_by_timestep"], found.record["auc_by_timestep"], folder / "timesteps.png", colour
    )
    if found.pictures is not None:
        members = subject.members()
        nearest_members(found.pictures, subject.pixels[members], folder / "nearest.png")


def roc_curves(subject, found, path: Path, colour: str) -> None:
    """ROC of every attack on log axes, the worst one with its 95 % band."""
    figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
    worst = found.record["worst"]["attack"]
    for name, score in found.scores.items():
        member, nonmember = subject.pair(score, "test")
        rates = np.arange(1, len(nonmember) + 1) / len(nonmember)
        cuts = np.sort(nonmember)[::-1]  # just below the i-th highest non-member: FPR i / N
        if name != worst:
            axis.plot(rates, roc.hits(member, cuts), color="grey", lw=0.8, alpha=0.6)
            continue
        axis.plot(rates, roc.hits(member, cuts), color=colour, lw=2.2, zorder=3, label=f"{name} (worst case)")
        drawn = np.random.default_rng(0).choice(member, (1000, len(member)))
        low, high = np.percentile([roc.hits(m, cuts) for m in drawn], [2.5, 97.5], axis=0)
        axis.fill_between(rates, low, high, color=colour, alpha=0.15, lw=0, label="its 95 % band over members")
    axis.plot([], [], color="grey", lw=0.8, label="the other attacks")
    axis.plot([1e-4, 1], [1e-4, 1], "k:", lw=1, label="guessing")
    axis.set(xscale="log", yscale="log", xlim=(1 / len(nonmember), 1), ylim=(0.5 / len(member), 1.05))
    axis.set(xlabel="false-positive rate (non-members called members)", ylabel="true-positive rate (members found)")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.grid(alpha=0.2, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def score_histograms(pairs: dict[str, tuple], attack: str, path: Path) -> None:
    """Scores of test members against non-members, one panel per model: {name: (member, nonmember)}."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.6 * len(pairs), 3.4), layout="constrained")
    for axis, (name, (member, nonmember)) in zip(np.atleast_1d(axes), pairs.items(), strict=True):
        low, high = np.percentile(np.r_[member, nonmember], [1, 99])
        bins = np.linspace(low, high, 24)
        axis.hist(np.clip(nonmember, low, high), bins, density=True, color="grey", alpha=0.5, label="non-members")
        axis.hist(
            np.clip(member, low, high), bins, density=True, histtype="step", lw=2, color="#D55E00", label="members"
        )
        axis.set(title=name, xlabel=f"score of the {attack} attack (higher = member)", ylabel="density")
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def leakage_by_timestep(base: dict[str, float], adapted: dict[str, float], path: Path, colour: str) -> None:
    """AUC of the loss at one timestep and one draw, over the timestep."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axis.plot([int(t) for t in base], list(base.values()), "o--", color=COLOURS["base"], label="base model")
    axis.plot([int(t) for t in adapted], list(adapted.values()), "o-", color=colour, label="adapted")
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set(xlabel="timestep t (noisier to the right)", ylabel="AUC of the loss, one draw")
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def nearest_members(made: np.ndarray, members: np.ndarray, path: Path, columns: int = 10) -> None:
    """The generated pictures closest to a member (upper rows) above that member (lower rows), by squared error."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (made, members))
    distance = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    order = np.argsort(distance.min(1))[:columns]
    image_grid(np.concatenate([made[order], members[distance[order].argmin(1)]]), columns, path)


def privacy_against_quality(records: list[dict], path: Path) -> None:
    """Worst-case AUC against held-out loss, one point with its interval per evaluated adapter; lower left is better."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    seen = set()
    points = [("base", records[0]["base"])] + [(r["method"], r["adapted"]) for r in records]
    for method, point in points:
        x, worst = point["held_out_loss"], point["worst"]
        low, high = worst["auc_interval"]
        colour, label = COLOURS.get(method, OTHER), None if method in seen else method
        spread = [[max(0, worst["auc"] - low)], [max(0, high - worst["auc"])]]
        axis.errorbar(x, worst["auc"], yerr=spread, fmt="o", color=colour, capsize=3, label=label)
        seen.add(method)
    for record in records:
        axis.annotate(record["run"].rsplit("/", 1)[-1], (record["adapted"]["held_out_loss"], record["adapted"]["worst"]["auc"]),
                      xytext=(5, 4), textcoords="offset points", fontsize=8)  # fmt: skip
    axis.axhline(0.5, color="grey", lw=0.8, ls=":")
    axis.set(
        xlabel="held-out adaptation loss (lower is better)", ylabel="worst-case AUC over attacks (0.5 leaks nothing)"
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
