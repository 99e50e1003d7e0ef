"""The figures of the notebooks, on the axes of curves/plots.py.  Each returns a closed Figure,
which a notebook shows.  Tested in tests/test_plots.py.
"""

import textwrap

import numpy as np

from curves import plots, roc
from curves.plots import COLOURS, MEMBER, NONMEMBER, OTHER, SECOND, panels


def _colour(name: str) -> str:
    """Of a run, whose name begins with its method."""
    return COLOURS.get(name.split(",")[0].lower(), OTHER)


def _runs(runs: dict[str, list[dict]], key: str):
    """(name, colour, line style, steps (K,), values (K,)) of each run that logged `key`.

    Controls, whose name is more than a method, are dashed.
    """
    for name, rows in runs.items():
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if found:
            style = "--" if "," in name else "-"
            yield name, _colour(name), style, *np.array(found, float).T


def rank_study(spectra: np.ndarray, ranks, member, nonmember):
    """Singular values of B A per layer (layers, r), and both losses by the rank that is kept.

    `ranks` (K,) are the ranks kept, `member` and `nonmember` (K,) the losses at each.
    """
    figure, (left, right) = panels(2)
    index, colour = np.arange(1, spectra.shape[1] + 1), COLOURS["lora"]
    low, middle, high = np.percentile(spectra / spectra[:, :1], [10, 50, 90], axis=0)
    left.plot(index, middle, color=colour, label="median layer")
    plots.band(left, index, low, high, colour, "10 to 90 % of layers")
    left.set(yscale="log", xlabel="index of the singular value", ylabel="share of the largest")
    left.set_title("What training made of BA")
    right.plot(ranks, member, "o-", color=MEMBER, label="members")
    right.plot(ranks, nonmember, "o-", color=NONMEMBER, label="non-members")
    right.set(xscale="symlog", xlabel="rank kept of the trained update")
    right.set_ylabel("adaptation loss (squared error)")
    right.set_xticks(ranks, [str(r) for r in ranks])
    right.set_title("What the gap between them needs")
    for axis in (left, right):
        plots.legend(axis)
    return figure


def loss_by_timestep(timesteps, models: dict[str, tuple]):
    """{model: (member, nonmember)} losses (N, T): means with 95 % bands."""
    figure, axes = panels(len(models), sharey=True)
    styles = (MEMBER, "members"), (NONMEMBER, "non-members")
    for axis, (name, sides) in zip(axes, models.items(), strict=True):
        for loss, (colour, label) in zip(sides, styles, strict=True):
            mean, half = loss.mean(0), 1.96 * loss.std(0, ddof=1) / np.sqrt(len(loss))
            axis.plot(timesteps, mean, "o-", color=colour, label=label)
            plots.band(axis, timesteps, mean - half, mean + half, colour)
        axis.set(title=name, xlabel="timestep t (noisier to the right)", yscale="log")
    axes[0].set_ylabel("adaptation loss (squared error)")
    plots.legend(axes[0])
    return figure


def error_maps(pictures: np.ndarray, rows: dict[str, np.ndarray], titles: list[str]):
    """Pictures (N, H, W, 3) above maps (N, h, w) of the squared error, one row per model.

    All maps share one colour scale.
    """
    count = len(pictures)
    figure, axes = panels(count, 1.7, 1.75, len(rows) + 1)
    top = max(np.percentile(maps, 99) for maps in rows.values())
    cells = [picture for row in (pictures, *rows.values()) for picture in row]
    for axis, cell in zip(axes, cells, strict=True):
        shown = axis.imshow(cell, vmin=0, vmax=top, cmap="viridis")
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, name in zip(axes[::count], ["picture", *rows], strict=True):
        axis.set_ylabel(name)
    label = "squared error,\nmean over channels and draws"
    figure.colorbar(shown, ax=axes[count:], shrink=0.8, label=label)
    return figure


def roc_lines(pairs: dict[str, tuple]):
    """ROC of at most six attacks {name: (member (N,), nonmember (M,))} with their AUC."""
    figure, (axis,) = panels(1, 5.4, 4.8)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for (name, pair), colour in zip(pairs.items(), colours, strict=False):
        label = f"{name}: AUC {roc.auc(*pair):.2f}"
        axis.plot(*plots.roc_curve(*pair), color=colour, lw=1.8, label=label)
    plots.roc_axes(axis)
    return figure


def leakage_over_steps(runs: dict[str, list[dict]]):
    """{method: [{step, auc, low, high, held_out}]}: what leaks (left), what is learned (right)."""
    figure, (left, right) = panels(2)
    for name, rows in runs.items():
        keys = ("step", "auc", "low", "high", "held_out")
        steps, area, low, high, loss = (np.array([row[k] for row in rows]) for k in keys)
        left.plot(steps, area, "o-", color=_colour(name), label=name)
        plots.band(left, steps, low, high, _colour(name))
        right.plot(steps, loss, "o-", color=_colour(name), label=name)
    plots.chance_line(left)
    left.set(xlabel="step", ylabel="AUC of the averaged loss, 95 % band", title="Leakage")
    right.set(xlabel="step", ylabel="loss on non-members (squared error)", title="Held-out loss")
    plots.legend(left)
    return figure


def walks(walked: dict[str, tuple]):
    """{title: (steps (K,), change (K,), slope, reach, change along a random direction (K,))}: an
    objective on both sides of a point, with the line that its gradient says.

    Where the gradient describes the objective, up to `reach`, the ground is shaded.
    """
    figure, axes = panels(len(walked), 3.7)
    for axis, (title, found) in zip(axes, walked.items(), strict=True):
        steps, change, slope, reach, control = found
        axis.axvspan(-reach, reach, color=SECOND, alpha=0.15, lw=0, label="described")
        axis.plot(steps, slope * steps, "k:", lw=1, label="what the gradient says")
        axis.plot(steps, control, color=NONMEMBER, lw=1, label="a random direction")
        style = {"color": COLOURS["lora"], "ms": 2.5, "lw": 1.5, "label": "along -grad"}
        axis.plot(steps, change, "o-", **style)
        low, high = min(change.min(), control.min()), max(change.max(), control.max())
        room = 0.15 * (high - low) or 1.0
        axis.set(xlabel="step along -grad (adapter norm)", title=title)
        axis.set_ylim(low - room, high + room)
        axis.locator_params(axis="x", nbins=5)
        axis.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes[0].set_ylabel("change")
    plots.legend_above(figure, axes)
    return figure


def surfaces(across, along, surface: dict[str, np.ndarray], xlabel: str, ylabel: str, arrows=()):
    """{title: (K, M)} over `across` (M,) to the right and `along` (K,) upwards, one colour scale
    each.

    `arrows` are (2,) directions from the middle, one per panel.
    """
    figure, axes = panels(len(surface), 4.3, 3.8)
    for axis, (title, values) in zip(axes, surface.items(), strict=True):
        axis.grid(False)
        shown = axis.contourf(across, along, values, 24, cmap="viridis")
        axis.contour(across, along, values, 24, colors="white", linewidths=0.3)
        axis.set(xlabel=xlabel, title=title)
        figure.colorbar(shown, ax=axis, shrink=0.9)
    for axis, arrow in zip(axes, arrows, strict=False):
        tip = 0.6 * max(across) * np.asarray(arrow) / max(np.linalg.norm(arrow), 1e-30)
        style = {"arrowstyle": "-|>", "color": "white", "lw": 2}
        axis.annotate("", xy=tip, xytext=(0, 0), arrowprops=style)
        axis.plot(0, 0, "o", color="white", mec="black", ms=6)
    axes[0].set_ylabel(ylabel)
    return figure


def sheets(x, y, pairs: dict[str, tuple[np.ndarray, np.ndarray]], labels: tuple[str, str, str]):
    """{title: (norm, bound)}, each (K, M) over x (M,) and y (K,): a norm as a coloured sheet, and
    its bound as a net that must nowhere lie below it.
    """
    figure, axes = panels(len(pairs), 5.2, 4.6, subplot_kw={"projection": "3d"})
    grid = np.meshgrid(x, y)
    for axis, (title, (norm, bound)) in zip(axes, pairs.items(), strict=True):
        axis.plot_surface(*grid, norm, cmap="viridis", lw=0, alpha=0.9)
        axis.plot_wireframe(*grid, bound, color="black", lw=0.5, rcount=20, ccount=20)
        axis.set(xlabel=labels[0], ylabel=labels[1], zlabel=labels[2])
        axis.set_title(title, y=0.96)
        axis.locator_params(nbins=5)
        axis.set_box_aspect(None, zoom=0.92)  # room for the label of the upright axis
        axis.view_init(elev=24, azim=-56)
    return figure


def lines(x, groups: dict[str, dict[str, np.ndarray]], xlabel: str, scales=()):
    """{title: {name: y (K,)}} over x (K,), a panel per title.

    Names that begin with a method take its colour; `scales` are of the upright axes.
    """
    figure, axes = panels(len(groups), 6.4 if len(groups) == 1 else 4.2)
    scales = scales or ["linear"] * len(groups)
    for axis, scale, (title, values) in zip(axes, scales, groups.items(), strict=True):
        others = iter((SECOND, "#CC79A7", "black", "#56B4E9"))
        for name, y in values.items():
            colour = COLOURS.get(name.split(",")[0].lower()) or next(others)
            axis.plot(x, y, color=colour, lw=2, label=name)
        _titled(axis, title, xlabel, scale)
        plots.legend(axis)
    return figure


def runs_over_steps(runs: dict[str, list[dict]], keys: dict[str, str], scale: str = "log"):
    """One panel per key of metrics.jsonl {key: title}, one line per run.

    What is logged at every step is drawn as a running mean over a pale line of the values.
    """
    figure, axes = panels(len(keys))
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        for name, colour, style, steps, values in _runs(runs, key):
            plots.curve(axis, steps, values, style, True, color=colour, lw=1.6, label=name)
        _titled(axis, title, "step", scale)
    plots.legend_above(figure, axes)
    return figure


def _titled(axis, title: str, xlabel: str, scale: str) -> None:
    """A panel's title, in short lines, and its axes."""
    axis.set(xlabel=xlabel, title="\n".join(textwrap.wrap(title, 44)), yscale=scale)
    if scale == "log":
        plots.plain_numbers(axis.yaxis)


def hessian_against_gradient(runs: dict[str, list[dict]]):
    """Figure 1b of the paper: Hessian norm (spectral) over gradient norm, one panel per run."""
    figure, axes = panels(len(runs), 3.7, 3.6)
    logged = _runs(runs, "hessian_norm")
    for axis, (name, colour, _, steps, hessian) in zip(axes, logged, strict=True):
        gradient = np.array([row["fixed_grad_norm"] for row in runs[name] if "hessian_norm" in row])
        shade = 0.25 + 0.75 * steps / max(steps.max(), 1)
        axis.scatter(gradient, hessian, c=colour, alpha=shade, s=28)
        axis.set(xscale="log", yscale="log", xlabel="gradient norm", title=name)
        for side in (axis.xaxis, axis.yaxis):
            plots.plain_numbers(side)
    axes[0].set_ylabel("Hessian norm (pale: early, full: late)")
    return figure


def bound_along_run(runs: dict[str, list[dict]]):
    """Proposition 2 while training: the Hessian norm and its bound L0' + L1' ||grad J||.

    The part L1' ||grad J|| is also drawn alone.
    """
    figure, axes = panels(len(runs), sharey=True)
    for axis, (name, rows) in zip(axes, runs.items(), strict=True):
        rows = [row for row in rows if "hessian_norm" in row]
        keys = ("step", "hessian_norm", "hessian_bound", "bound_constant")
        step, norm, bound, constant = (np.array([row[k] for row in rows]) for k in keys)
        axis.plot(step, bound, color="black", lw=1, label="bound")
        axis.plot(step, norm, "o-", color=_colour(name), ms=3, label="Hessian norm")
        if (bound - constant).any():
            label = "part of the bound that carries ||grad J||"
            axis.plot(step, bound - constant, "--", color=SECOND, label=label)
        axis.set(xlabel="step", yscale="log", title=name)
        plots.legend(axis, 8)
    axes[0].set_ylabel("spectral norm")
    return figure
